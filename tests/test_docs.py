"""Every command that a newcomer reads is one that works: README and docstrings, parsed by the scripts' own parsers."""

from __future__ import annotations

import importlib
import re
import shlex

import pytest
from conftest import ROOT, run_script
from test_boundaries import ARROWS

import train
from alpaca.common import cli
from alpaca.training import distributed

SCRIPTS = {
    "generate_instruction": ["generate_instruction_following_data", "dedup"],
    "weight_diff": ["make_diff", "recover", "verify", "compare"],
    "chat": None,
    "analyze_data": ["fetch", "stats", "lint", "review", "plot", "publish"],
    "judge": ["answer", "judge", "people", "report"],
}


def commands(text: str) -> list[str]:
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if re.match(r"\s*(python|torchrun) ", line)]


def all_commands() -> list[tuple[str, str]]:
    readme = "\n".join(re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S))
    found = [("README.md", command) for command in commands(readme)]
    for script in [*SCRIPTS, "train"]:
        found += [(f"{script}.py", command) for command in commands(importlib.import_module(script).__doc__)]
    return found


@pytest.mark.parametrize("where, command", all_commands(), ids=lambda text: text[:60])
def test_a_documented_command_parses(where, command, monkeypatch, tmp_path):
    words = shlex.split(command, comments=True)
    script = next(word for word in words if word.endswith(".py"))
    argv = [str(tmp_path) if word == "OUT" else word for word in words[words.index(script) + 1 :]]
    if script == "train.py":
        # as on a machine with the GPUs that --bf16 and --fsdp ask for
        monkeypatch.setattr(distributed, "_set_up_fsdp", lambda args, gpu: vars(args).update(fsdp=None, use_cpu=True))
        model_args, _, _ = train.parse_args(argv)
        assert model_args.model_name_or_path == "MODEL"
        return
    module = importlib.import_module(script.removesuffix(".py"))
    tasks = SCRIPTS[module.__name__]
    functions = module.chat if tasks is None else {task: getattr(module, task) for task in tasks}
    assert cli.parse(functions, argv)[1]


def test_the_readme_shows_every_script():
    shown = " ".join(command for where, command in all_commands() if where == "README.md")
    for script in (*SCRIPTS, "train"):
        assert f"{script}.py" in shown, script


def test_every_make_target_of_the_readme_exists():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    named = set(re.findall(r"\bmake ([a-z]+)", (ROOT / "README.md").read_text()))
    assert named and named <= set(targets)


def test_every_path_of_the_readme_exists():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(([^)#:]+)\)|src=\"([^\":]+)\"", text):
        path = "".join(path)
        assert (ROOT / path).exists(), path
    for line in re.search(r"## Files\n+```\n(.*?)```", text, re.S).group(1).splitlines():
        assert (ROOT / line.split()[0]).exists(), line


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
        for named in re.findall(r"\b(?:alpaca|tests|benchmarks|configs|runs)/[\w/]+\.(?:py|sh)\b", path.read_text()):
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
