"""What a newcomer reads is true: commands parse, links lead somewhere, flags and figures are the real ones."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shlex
import statistics
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, run_script
from figures import FIGURES
from test_boundaries import ARROWS

import train
from alpaca import embedded_model
from alpaca.common import cli
from alpaca.common.text import shorten
from alpaca.endpoint.budget import RequestSettings
from alpaca.training import distributed

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"
# docs/LOG.md shows commands as they were then.
DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md") if path.name != "LOG.md")]
PAGES = ["docs/data.md", "docs/generate.md", "docs/train.md", "docs/weights.md", "docs/chat.md", "docs/judge.md"]

SCRIPTS = {
    "generate_instruction": ["generate_instruction_following_data", "dedup"],
    "weight_diff": ["make_diff", "recover", "verify", "compare"],
    "chat": None,
    "analyze_data": ["fetch", "stats", "lint", "review", "plot", "publish"],
    "judge": ["answer", "judge", "people", "report"],
}


EMBEDDED = {"prepare": embedded_model.prepare, "run": embedded_model.run}
TEACHER = "generate_instruction.py generate_instruction_following_data"


def commands_of(module: str) -> cli.Commands:
    """What a script hands to run_cli."""
    if module == "alpaca.embedded_model":
        return EMBEDDED
    script = importlib.import_module(module)
    return {task: getattr(script, task) for task in SCRIPTS[module]} if SCRIPTS[module] else script.chat


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def up_to_date(document: str, new: str) -> None:
    """Fail if a document is not as ``new``, and write that."""
    if new != text_of(document):
        (ROOT / document).write_text(new)
        pytest.fail(f"{document} was out of date and is now rewritten: read it and commit it")


def commands(text: str) -> list[str]:
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [line.strip() for line in lines if re.match(r"\s*(\S+/)?(python|torchrun) ", line)]


def all_commands() -> list[tuple[str, str]]:
    """Those of code blocks, those that are a code span, and those of the scripts' docstrings."""
    found = []
    for document in DOCUMENTS:
        text = text_of(document)
        found += [(document, command) for command in commands("\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)))]
        spans = re.findall(r"`(python [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
        found += [(document, span) for span in spans if "--" in span]
    for script in [*SCRIPTS, "train"]:
        found += [(f"{script}.py", command) for command in commands(importlib.import_module(script).__doc__)]
    return [(where, command) for where, command in found if "llama.cpp/" not in command]  # not ours


@pytest.mark.parametrize("where, command", all_commands(), ids=lambda text: text[:60])
def test_a_documented_command_parses(where, command, monkeypatch, tmp_path):
    words = shlex.split(command, comments=True)
    if "alpaca.embedded_model" in words:  # what it runs follows "--"
        own, _, words = " ".join(words).partition(" -- ")
        assert cli.parse(EMBEDDED, own.split()[3:])[1]
        words = words.split()
        if not words:
            return
    script = next(word for word in words if word.endswith(".py"))
    argv = [str(tmp_path) if word == "OUT" else word for word in words[words.index(script) + 1 :]]
    if script == "train.py":
        # as on a machine with the GPUs that --bf16 and --fsdp ask for
        monkeypatch.setattr(distributed, "_set_up_fsdp", lambda args, gpu: vars(args).update(fsdp=None, use_cpu=True))
        model_args, _, _ = train.parse_args(argv)
        assert model_args.model_name_or_path == "MODEL"
        return
    function, flags = cli.parse(commands_of(script.removesuffix(".py")), argv)
    assert flags
    if function.__name__ == "plot":
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
        folder = Path(flags["output_dir"]).as_posix()
        assert not any(file.startswith(f"{folder}/") for file in tracked), "it would draw over the project's pictures"


def test_the_readme_shows_every_script():
    shown = " ".join(command for where, command in all_commands() if where == "README.md")
    for script in (*SCRIPTS, "train"):
        assert f"{script}.py" in shown, script


# ---------------------------------------------------------------------------------------------------------------------
# Flags.


REQUEST = [field.name for field in dataclasses.fields(RequestSettings)]
FLAG_TABLE = re.compile(r"(?<=^### )(?:Flags of `(.+)`|Request flags)\n[^|#]*\n(\| flag .*\n(?:\|.*\n)+)", re.M)


def flag_table(command: str | None) -> str:
    """What --help says of a command's flags, as a table; those of each request are in one of their own (None)."""
    if command == "train.py":
        text = run_script("train.py", "--help").stdout
    else:
        script, *words = (command or TEACHER).removeprefix("python -m ").split()
        text = cli.help_text(script, commands_of(script.removesuffix(".py")), words)
    rows = {}
    for name, required, default, about in re.findall(
        r"^    --(\w+) \(.*?(?:, (required)|, default: (.*))?\)\n((?:        .*\n?)*)", text, re.M
    ):
        default = f"`{default.strip(chr(39))}`" if default else required
        about = " ".join(about.split()).replace("|", r"\|")
        rows[name] = f"| `--{name}` | {default} | {about} |".replace("|  |", "| |")
    if command is None:
        rows = {name: rows[name] for name in REQUEST}
    elif rows.keys() >= set(REQUEST):
        rows = {name: row for name, row in rows.items() if name not in REQUEST}
        rows["…"] = "| [request flags](generate.md#request-flags) | | how requests are sent, limited and paid for |"
    return "\n".join(["| flag | default | what it does |", "|---|---|---|", *rows.values(), ""])


@pytest.mark.parametrize("page", PAGES)
def test_a_flag_table_says_what_help_says(page):
    text = text_of(page)
    new = FLAG_TABLE.sub(lambda found: found[0].replace(found[2], flag_table(found[1])), text)
    up_to_date(page, new)


def test_every_task_has_a_flag_table():
    shown = [found[1] or "requests" for page in PAGES for found in FLAG_TABLE.finditer(text_of(page))]
    tasks = [f"{script}.py {task}".strip() for script, names in SCRIPTS.items() for task in names or [""]]
    tasks += [f"python -m alpaca.embedded_model {task}" for task in EMBEDDED]
    assert sorted(shown) == sorted([*tasks, "train.py", "requests"])


# ---------------------------------------------------------------------------------------------------------------------
# English.

# Words by which English reads as if it were translated.
ODD = re.compile(
    r"\b(told|anew|whoever|of which|is none|are none|is no \w+:|stands? (in|behind|before|there)|"
    r"that is there( already)?|comes? along|goes? on\b|give it|lies? there)\b"
)


def sentences(text: str) -> list[str]:
    """The sentences of paragraphs and list items, without code blocks, tables, headings and HTML; links as text."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    text = re.sub(r"^(#|\||<).*$", "", text, flags=re.M)
    text = re.sub(r"^(> |- |\d\. )", "\n", text, flags=re.M)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    parts = [part for text in paragraphs for part in re.split(r"(?<=[.!?])[*)]*\s+(?=[^a-z])", text)]
    return [part for part in parts if part]


@pytest.mark.parametrize("document", ["README.md", *PAGES, "docs/results.md"])
def test_sentences_are_short_and_plain(document):
    found = sentences(text_of(document))
    lengths = [len(sentence.split()) for sentence in found]
    assert statistics.mean(lengths) < 18
    assert max(lengths) <= 30, max(found, key=lambda sentence: len(sentence.split()))
    assert not [match[0] for match in ODD.finditer(text_of(document))]


def test_the_readme_can_be_skimmed():
    assert README.count("\n") <= 250
    order = ["Quick start", "Data", "Generate", "Train", "Recover", "Chat", "Judge", "Measured results", "Files"]
    headings = re.findall(r"^## (.+)$", README, re.M)
    assert [heading for heading in headings if heading in order] == order and headings[-1].startswith("Licenses")


# ---------------------------------------------------------------------------------------------------------------------
# Figures.


def figure_rows() -> list[tuple[str, list[str]]]:
    """Each row of a table whose last column says from which file its figure is."""
    rows = []
    for document in ("README.md", "docs/results.md"):
        for table in re.findall(r"^\| what \| figure \|.* from \|\n\|[-|]+\|\n((?:\|.*\n)+)", text_of(document), re.M):
            rows += [(document, re.split(r" \| ", line.strip("| "))) for line in table.splitlines()]
    return rows


@pytest.mark.parametrize("document", ["README.md", "docs/results.md"])
def test_a_figure_is_that_of_its_file(document):
    new = text_of(document)
    for cells in [cells for where, cells in figure_rows() if where == document]:
        what, _, *commit, source = cells
        path = (ROOT / document).parent / re.search(r"\((.+)\)", source)[1]
        result = json.loads(path.read_text())
        phrase = max((phrase for phrase in FIGURES[path.name] if phrase in what), key=len)
        if commit:
            known = [result["commit"]] if "commit" in result else [part["commit"] for part in result.values()]
            commit = commit if commit[0] in known else known[:1]
        row = [what, FIGURES[path.name][phrase](result), *commit, source]
        new = new.replace(f"| {' | '.join(cells)} |", f"| {' | '.join(row)} |")
    up_to_date(document, new)


def test_every_figure_is_in_the_results_and_the_ten_that_matter_in_the_readme():
    shown = {document: [] for document, _ in figure_rows()}
    for document, (what, *_, source) in figure_rows():
        name = re.search(r"\[(.+)\]", source)[1]
        shown[document].append((name, max((phrase for phrase in FIGURES[name] if phrase in what), key=len)))
    all_of_them = [(name, phrase) for name, phrases in FIGURES.items() for phrase in phrases]
    assert sorted(shown["docs/results.md"]) == sorted(all_of_them)
    assert len(set(shown["README.md"])) == len(shown["README.md"]) == 10


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_a_result_names_the_commit_of_its_code(path):
    result = json.loads(path.read_text())
    for part in [result] if "commit" in result else result.values():
        assert re.fullmatch(r"[0-9a-f]{7,40}", part["commit"]) and part["command"]


def test_the_sample_of_the_demo_is_what_it_printed():
    stages = json.loads((RESULTS / "demo_cpu.json").read_text())["stages"]
    rows = [f"{stage['stage']:<17}  {stage['seconds']:>3} s  {shorten(stage['made'], 74)}\n" for stage in stages]
    assert max(map(len, rows)) <= 100 + len("\n")
    readme = text_of("README.md")
    sample = re.search(r"```\nstage [^\n]*\n─[^\n]*\n(.*?)```", readme, re.S)[1]
    up_to_date("README.md", readme.replace(sample, "".join(rows)))


def test_what_has_not_been_run_on_a_gpu_is_not_said_to_have_been():
    for document in ("README.md", "docs/train.md"):
        said = re.search(r"(has not yet|has) been run on GPUs here( yet)? \(", " ".join(text_of(document).split()))
        assert bool(said) != (RESULTS / "gpu").exists(), document


# ---------------------------------------------------------------------------------------------------------------------
# Names.


def test_every_make_target_of_the_readme_exists():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    named = set(re.findall(r"(?:`|^)make ([a-z]+)", README, re.M))
    assert named and named <= set(targets)


def anchors(document: Path) -> set[str]:
    """Those that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", document.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [*DOCUMENTS, "docs/LOG.md"])
def test_every_link_leads_to_a_file_and_a_heading(document):
    text = re.sub(r"^```.*?^```", "", text_of(document), flags=re.S | re.M)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|srcset)=\"([^\"]+)\"", text)
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_picture_that_exists_for_dark_pages_is_shown_there(document):
    def in_both(found: re.Match) -> str:
        dark = f"{found[1]}_dark.png"
        if not ((ROOT / document).parent / dark).exists():
            return found[0]
        return f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">{found[0]}</picture>'

    plain = re.sub(r"<picture><source [^>]+>(<img [^>]+>)</picture>", r"\1", text_of(document))
    up_to_date(document, re.sub(r'<img src="([^"]+)\.png"[^>]*>', in_both, plain))


def test_every_file_of_the_readmes_tree_exists():
    for line in re.search(r"## Files\n+```\n(.*?)```", README, re.S)[1].splitlines():
        assert list(ROOT.glob(line.split()[0])), line


MAP = (ROOT / "docs" / "architecture.md").read_text()


@pytest.mark.parametrize("row", re.findall(r"^\|(.*)\|$", MAP, re.M), ids=lambda row: row.split("|")[0].strip()[:50])
def test_every_file_and_name_of_the_map_exists(row):
    """A code span with a slash or a suffix is a path; the names after it are in that file."""
    path = None
    for span in re.findall(r"`([^`]+)`", row):
        if re.search(r"[/.]", span):
            path = ROOT / span
            assert path.exists(), f"{span} does not exist"
        else:
            assert re.search(rf"^\s*(async def|def|class) {span}\b|^{span}\b", path.read_text(), re.M), (
                f"{path}: {span}"
            )


def test_the_map_draws_the_arrows_that_are_enforced():
    drawn = set(re.findall(r"^    (\w+) --> (\w+)$", MAP.split("```mermaid\n")[2], re.M))
    allowed = {(room, other) for room, others in ARROWS.items() for other in others if room and other}
    beside_common = {(room, other) for room, other in allowed if other != "common"}
    assert beside_common <= drawn <= allowed
    rooms = re.findall(r"^\| `alpaca/(\w+)` ", MAP, re.M)
    assert sorted(rooms) == sorted(room for room in ARROWS if room)


def test_every_file_that_a_document_or_a_comment_names_exists():
    """docs/LOG.md tells of files as they were called then."""
    sources = [path for path in ROOT.glob("docs/*.md") if path.name != "LOG.md"]
    sources += [*ROOT.glob("*.md"), *ROOT.glob("*.py"), *ROOT.glob("runs/*"), *ROOT.glob("configs/**/*.md")]
    for folder in ("alpaca", "tests", "benchmarks"):
        sources += ROOT.glob(f"{folder}/**/*.py")
    for path in sources:
        for named in re.findall(
            r"\b(?:alpaca|tests|benchmarks|configs|runs)/[a-z\d_/]+\.(?:py|sh)\b", path.read_text()
        ):
            assert (ROOT / named).exists(), f"{path.relative_to(ROOT)} names {named}"


def test_every_benchmark_can_be_imported():
    """In one process, which imports torch once; each finds what it imports on its own additions to the path."""
    code = (
        "import importlib, sys\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]\n"
        "before = list(sys.path)\n"
        "for name in sys.argv[1:]:\n"
        "    sys.path[:] = ['benchmarks', *before]\n"
        "    importlib.import_module(name)\n"
    )
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    result = run_script("-c", code, *names)
    assert result.returncode == 0, result.stderr
