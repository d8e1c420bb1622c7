"""chat.py: the answer alone is on stdout, whatever is asked and however; and a file of answers survives a kill."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
from conftest import ROOT, assert_user_error, make_records, run_script
from huggingface_hub.utils import filter_repo_objects
from made_models import chain, stream_text

import chat
import train
import utils
from alpaca import UserError
from alpaca.chat_template import mark_trained
from alpaca.common import cli
from alpaca.inference import answer_file
from alpaca.inference.generate import answer_batch
from alpaca.inference.load import load
from alpaca.inference.web import page as web_page


@pytest.fixture(scope="module")
def paris(tmp_path_factory) -> Path:
    """Says " Paris is." after a line break, as models that were trained on "### Response:\\n" do."""
    return chain(tmp_path_factory.mktemp("models") / "paris", "\n", " Paris", " is", ".")


# ---------------------------------------------------------------------------------------------------------------------
# chat.py.


def run_chat(monkeypatch, *argv, stdin: str = "") -> None:
    """``python chat.py argv…`` in this process."""
    monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, argv)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    cli.run_cli(chat.chat)


def test_an_instruction_on_the_command_line_is_answered_on_stdout(paris):
    result = run_script("chat.py", "--model_path", paris, "--instruction", "What is the capital of France?")
    assert (result.returncode, result.stdout) == (0, "Paris is.\n"), result.stderr


def test_a_conversation_can_be_piped(paris):
    """The answers alone are on stdout, and what else there is to say on stderr."""
    lines = "What is it?\n/input France\n\n  And this?  \n/help\n/quit\nnever asked\n"
    result = run_script("chat.py", "--model_path", paris, input=lines)
    assert (result.returncode, result.stdout) == (0, "Paris is.\nParis is.\n"), result.stderr
    assert result.stderr == chat.ALONE + "\n"


def test_every_documented_command_runs(tiny_llama, tmp_path, monkeypatch, capsys):
    commands = [line.strip() for line in chat.__doc__.splitlines() if line.strip().startswith("python ")]
    assert len(commands) == 5
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}")
    (tmp_path / "in.jsonl").write_text('{"instruction": "Hi"}\n')
    for command in commands:
        for word, path in {
            "DIR": model,
            "IN.jsonl": tmp_path / "in.jsonl",
            "OUT.jsonl": tmp_path / "out.jsonl",
        }.items():
            command = command.replace(word, str(path))
        _, script, *argv = shlex.split(command)
        assert script == "chat.py"
        run_chat(monkeypatch, *argv, "--max_new_tokens", "8", "--device", "cpu", stdin="Hi\n")
        output = capsys.readouterr().out
        if "--batch_path" in argv:
            output += json.loads((tmp_path / "out.jsonl").read_text())["output"] + "\n"
        assert output.endswith("\n") and output.strip()


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The prompts that the model is given, special tokens left out; it continues to answer."""
    seen = []

    def note(model, tokenizer, prompts, *given):
        seen.extend(tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts)
        return answer_batch(model, tokenizer, prompts, *given)

    monkeypatch.setattr("alpaca.inference.chat.answer_batch", note)
    return seen


QUICK = ("--device", "cpu", "--max_new_tokens", "2", "--temperature", "0")


def test_prompts_are_the_bytes_that_training_formats(tiny_llama, monkeypatch, asked):
    run_chat(monkeypatch, "--model_path", tiny_llama, *QUICK, "--instruction", "1, 2", "--input", "[3]")
    run_chat(monkeypatch, "--model_path", tiny_llama, *QUICK, "--instruction", " spaces stay ")
    assert asked == [utils.format_prompt("1, 2", "[3]"), utils.format_prompt(" spaces stay ")]
    assert asked[0] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n1, 2\n\n### Input:\n[3]\n\n### Response:"
    )


@pytest.mark.parametrize("end", ["/quit\nnever\n", "/exit\nnever\n", ""])
def test_an_input_holds_for_one_instruction_and_quit_or_the_end_leaves(tiny_llama, monkeypatch, asked, end):
    lines = f"one\n/input a b\ntwo\nthree\n/input c\n/input\nfour\n/input d\n/reset\nfive\n{end}"
    run_chat(monkeypatch, "--model_path", tiny_llama, *QUICK, stdin=lines)
    expected = [("one", ""), ("two", "a b"), ("three", ""), ("four", ""), ("five", "")]
    assert asked == [utils.format_prompt(*pair) for pair in expected]


@pytest.mark.parametrize(
    ("lines", "message", "left"),
    [
        (["one", "two"], ("", "one"), 1),
        (["one \\", "  two\\", "three", "four"], ("", "one \n  two\nthree"), 1),
        (["one\\"], ("", "one"), 0),
        (['"""', " if x:", "", "    y", '"""', "next"], ("", " if x:\n\n    y"), 1),
        (['"""one', 'two"""', "next"], ("", "one\ntwo"), 1),
        (['"""one"""', "next"], ("", "one"), 1),
        (['"""', "never closed"], ("", "never closed"), 0),
        (['"""', "/quit", '"""'], ("", "/quit"), 0),
        (["pasted\n/quit\nat once", "next"], ("", "pasted\n/quit\nat once"), 1),
        (['say """x"""', "next"], ("", 'say """x"""'), 1),
        (['/system """You', 'are."""', "next"], ("/system", "You\nare."), 1),
        (["/system You\\", "are.", "next"], ("/system", "You\nare."), 1),
        (["/input a b ", "next"], ("/input", "a b"), 1),
        (["/input a\\", "b"], ("/input", "a\nb"), 0),
        (['/input """', "a", " b", '"""', "next"], ("/input", "a\n b"), 1),
        (["/input"], ("/input", ""), 0),
        (["/input\ta\tb"], ("/input", "a\tb"), 0),
        (["/input\\", "a"], ("/input", "a"), 0),
        (["/input\npasted\nlines"], ("/input", "pasted\nlines"), 0),
        (["/reset\npasted"], ("", "/reset\npasted"), 0),
        (["/temprature 0"], ("/temprature", "0"), 0),  # to be refused
        (['"""/temprature 0"""'], ("", "/temprature 0"), 0),
        (["/etc/passwd is what?"], ("", "/etc/passwd is what?"), 0),
        ([" /quit "], ("/quit", ""), 0),
        ([""], ("", ""), 0),
        ([], None, 0),
    ],
)
def test_a_message_may_have_several_lines(lines, message, left):
    rest = iter(lines)
    assert chat.read_message(lambda prompt: next(rest, None)) == message
    assert len(list(rest)) == left


def test_sampling_can_be_set_in_a_conversation_and_a_wrong_command_is_an_error(tiny_llama, monkeypatch, capsys, asked):
    lines = "/temperature 0\n/max_new_tokens 3\n/temprature 1\n/top_p 2\n/seed x\n/top_p\none\n"
    with pytest.raises(SystemExit) as exit:
        run_chat(monkeypatch, "--model_path", tiny_llama, "--device", "cpu", stdin=lines)
    assert exit.value.code == 1
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        "temperature is 0.0",
        "max_new_tokens is 3",
        "error: unknown command /temprature: /help lists them",
        "error: max_new_tokens must be at least 1, temperature at least 0, top_p above 0 and at most 1",
        "error: /seed needs a number, as in the line that /help shows",
        "top_p is 0.9",
        "note: cut off at --max_new_tokens",
    ]
    assert asked == [utils.format_prompt("one")]
    greedy = "".join(stream_text(*load(tiny_llama, "cpu"), utils.format_prompt("one"), 3, 0))
    assert out == greedy + "\n"


TURNS = "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


def test_with_the_models_chat_template_turns_are_remembered(tiny_llama, tmp_path, monkeypatch, asked, capsys):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "chat_template.jinja").write_text(TURNS)
    lines = "one\n/input x\ntwo\n/reset\nthree\n"
    run_chat(monkeypatch, "--model_path", model, *QUICK, "--template", "chat", stdin=lines)
    first = asked[1].removeprefix("user: one\nassistant: ").removesuffix("\nuser: two\n\n### Input:\nx\n")
    assert asked[0] == "user: one\n" and asked[2] == "user: three\n"
    assert capsys.readouterr().out.split("\n")[0] == first.strip() != ""


def test_a_system_text_begins_a_conversation_of_a_chat_template_alone(tiny_llama, tmp_path, monkeypatch, asked, capsys):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "chat_template.jinja").write_text(TURNS)
    lines = "zero\n/system Be brief.\none\n/reset\ntwo\n"
    run_chat(monkeypatch, "--model_path", model, *QUICK, "--template", "chat", stdin=lines)
    assert asked[1:] == ["system: Be brief.\nuser: one\n", "user: two\n"]
    with pytest.raises(SystemExit):
        run_chat(monkeypatch, "--model_path", model, *QUICK, "--template", "alpaca", stdin="/system Be brief.\n")
    assert "error: Alpaca's prompt has no system text: put it into the instruction\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("system", "words"),
    [
        ("", "leaves a system text out: put it into the instruction"),
        ("{{ raise_exception('no system') }}", "no system"),
    ],
)
def test_a_system_text_that_the_template_does_not_write_is_refused_at_once(
    tiny_llama, tmp_path, monkeypatch, asked, capsys, system, words
):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    around = "{% for m in messages %}{% if m['role'] == 'system' %}" + system + "{% else %}"
    template = TURNS.replace("{% for m in messages %}", around).replace("{% endfor %}", "{% endif %}{% endfor %}")
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(SystemExit):
        run_chat(monkeypatch, "--model_path", model, *QUICK, "--template", "chat", stdin="/system Be brief.\none\n")
    assert words in capsys.readouterr().err
    assert asked == ["user: one\n"]


def test_a_model_that_was_trained_with_its_template_remembers_turns_unless_told_otherwise(
    tiny_llama, tmp_path, monkeypatch, asked, capsys
):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "chat_template.jinja").write_text(mark_trained(TURNS))
    run_chat(monkeypatch, "--model_path", model, *QUICK, stdin="one\n/help\ntwo\n/reset\nthree\n")
    assert asked[0] == "user: one\n" and asked[1].startswith("user: one\nassistant: ") and asked[2] == "user: three\n"
    assert "The turns so far are remembered." in capsys.readouterr().err
    asked.clear()
    run_chat(monkeypatch, "--model_path", model, *QUICK, "--template", "alpaca", stdin="one\n/help\ntwo\n")
    assert asked == [utils.format_prompt("one"), utils.format_prompt("two")]
    assert "Each is answered on its own" in capsys.readouterr().err


def test_an_instruction_that_is_too_long_does_not_end_a_conversation(tiny_llama, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        run_chat(monkeypatch, "--model_path", tiny_llama, *QUICK, stdin="Q" * 2000 + "\nHi\n")
    assert exit.value.code == 1
    out, err = capsys.readouterr()
    error, note = err.splitlines()
    assert error.startswith("error: the prompt has ") and error.endswith("shorten it")
    assert note == "note: cut off at --max_new_tokens"
    assert out.strip()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--instruction", "  "], "--instruction is empty"),
        (["--instruction", "x", "--top_p", "2"], "top_p above 0 and at most 1"),
        (["--instruction", "x", "--max_new_tokens", "0"], "max_new_tokens must be at least 1"),
        (["--instruction", "x", "--device", "nonsense"], "device nonsense is not available"),
        (["--instruction", "x", "--batch_path", "x"], "--batch_path does not use --instruction: drop it"),
        (["--instruction", "x", "--output_path", "x"], "--output_path goes with --batch_path: add that"),
        (["--batch_path", "x"], "--batch_path needs --output_path, for the answers"),
        (["--batch_path", "x", "--output_path", "y", "--input", "z"], "--batch_path does not use --input: drop it"),
        (["--web", "--template", "chat"], "--web does not use --template: drop it"),
        (["--web", "--input", "x"], "--web does not use --input: drop it"),
        (
            ["--web", "--instruction", "x", "--output_path", "x"],
            "--web does not use --instruction, --output_path: drop",
        ),
        (["--web", "--skip_errors"], "--web does not use --skip_errors: drop it"),
        (["--host", "::", "--instruction", "x"], "--host goes with --web: add that"),
        (["--instruction", "x", "--skip_errors"], "--skip_errors goes with --batch_path: add that"),
        (["--batch_path", "nowhere.json", "--output_path", "x"], "nowhere.json does not exist"),
        (["--template", "llama"], "--template must be alpaca or chat"),
        (["--instruction", "x", "--template", "chat"], "this tokenizer has no chat template"),
        (["--instruction", "x", "--dtype", "int8"], "dtype int8 is unknown"),
        (["--batch_path", "x", "--output_path", "y", "--batch_tokens", "0"], "--batch_tokens must be at least 1"),
        (["--instruction", "x", "--max_tokens", "3"], "unknown flag --max_tokens: did you mean --max_new_tokens?"),
    ],
)
def test_a_bad_flag_is_one_line(paris, monkeypatch, capsys, flags, words):
    monkeypatch.setattr(web_page, "serve", lambda *_, **__: pytest.fail("a page was served"))  # and would never end
    with pytest.raises(SystemExit) as exit:
        run_chat(monkeypatch, "--model_path", paris, *flags)
    assert exit.value.code.startswith("error: ") and words in exit.value.code
    assert "\n" not in exit.value.code
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("breakage", "words"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda folder: (folder / "weight_diff.json").write_text("{}"), "is a weight diff: recover it first"),
    ],
)
def test_a_folder_without_a_tokenizer_or_with_a_diff_is_one_line(paris, tmp_path, monkeypatch, breakage, words):
    folder = shutil.copytree(paris, tmp_path / "model")
    breakage(folder)
    with pytest.raises(SystemExit) as exit:
        run_chat(monkeypatch, "--model_path", folder)
    assert exit.value.code.startswith(f"error: model_path {folder} {words}")
    assert "\n" not in exit.value.code


CONFIG, TOKENIZER, GENERATION = "config.json", "tokenizer_config.json", "generation_config.json"
ODD_VALUES = [
    *((CONFIG, "max_position_embeddings", value) for value in (None, "2048", 0, 2.5, [1])),
    *((CONFIG, "num_attention_heads", value) for value in (0, None, "1", 3, -1)),
    *((CONFIG, "eos_token_id", value) for value in ("</s>", [[2]], {"a": 1}, -1)),
    *((CONFIG, "vocab_size", value) for value in (None, "7", 0, -7)),
    *((CONFIG, "num_hidden_layers", value) for value in ("1", None, -1)),
    *((CONFIG, "rope_parameters", value) for value in ("x", {"rope_type": "nothing"}, [])),
    *((CONFIG, "architectures", value) for value in ([1], [None], 5)),
    *((CONFIG, "model_type", value) for value in (None, 5, [])),
    *((CONFIG, "dtype", value) for value in ("float99", [])),
    *((CONFIG, name, "x") for name in ("quantization_config", "hidden_act", "rms_norm_eps")),
    *((TOKENIZER, "eos_token", value) for value in (5, {}, True)),
    *((TOKENIZER, name, "x") for name in ("model_max_length", "added_tokens_decoder", "padding_side", "chat_template")),
    *((GENERATION, "eos_token_id", value) for value in ("</s>", {}, 2.0, [[2]])),
    *((file, "", value) for file in (CONFIG, TOKENIZER, GENERATION) for value in ([], None, 5, "x")),
]


@pytest.mark.parametrize(("file", "name", "value"), ODD_VALUES)
def test_an_odd_value_in_a_models_files_is_one_line_or_does_not_matter(
    paris, tmp_path, monkeypatch, capsys, file, name, value
):
    folder = shutil.copytree(paris, tmp_path / "model")
    values = json.loads((folder / file).read_text()) | {name: value} if name else value
    (folder / file).write_text(json.dumps(values))
    try:
        run_chat(monkeypatch, "--model_path", folder, "--device", "cpu", "--instruction", "x")
        assert capsys.readouterr().out == "Paris is.\n"
    except SystemExit as exit:
        assert exit.code.startswith(f"error: {folder}") and len(exit.code) > len(f"error: {folder}: ") + 10
        assert len(exit.code.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The terminal, a real one.


def in_a_terminal(model: Path, *steps: tuple[str, str]) -> tuple[int, str]:
    """Exit code, and all that the chat shows in a pseudo-terminal; each step waits for a text and then types one."""
    import pty
    import select

    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.environ["TERM"] = "xterm"
        argv = [sys.executable, "chat.py", "--model_path", str(model), "--max_new_tokens", "100000", "--device", "cpu"]
        os.execv(sys.executable, argv)
    shown, steps, deadline = b"", list(steps), time.monotonic() + 120
    seen = 0
    try:
        while time.monotonic() < deadline:
            if not select.select([terminal], [], [], 10)[0]:  # to leave takes a busy machine more than 2 s
                if not steps:  # one that comes between readline's prompt and its wait is noticed at the next key
                    os.write(terminal, b"\x03")
                continue
            try:
                data = os.read(terminal, 4096)
            except OSError:  # Linux says so at the end
                data = b""
            if not data:
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode(errors="replace")
            shown += data
            while steps and (found := shown.find(steps[0][0].encode(), seen)) >= 0:  # several may come in one read
                seen = found + len(steps[0][0])
                os.write(terminal, steps.pop(0)[1].encode())
        raise AssertionError(f"still waits for {steps[:1]}: {shown[-2000:]!r}")
    finally:
        os.close(terminal)
        if os.path.exists(f"/proc/{pid}"):
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                pass


@pytest.mark.skipif(sys.platform != "linux", reason="a pseudo-terminal, as Linux has it")
def test_in_a_terminal_pasted_lines_are_one_message_and_ctrl_c_stops_an_answer_and_twice_leaves(tmp_path):
    model = chain(tmp_path / "model", " again", " and", loop=True)
    paste = "\x1b[200~/quit\n/quit\x1b[201~\r"
    code, shown = in_a_terminal(
        model,
        ("> ", paste),  # two lines that would each leave
        ("again and again", "\x03"),
        ("[stopped]", ""),
        ("> ", "\x10\r"),  # the line before, from the history
        ("again and again", "\x03"),
        ("[stopped]", ""),
        ("> ", "\x03"),
    )
    assert code == 0
    assert chat.ALONE.splitlines()[0] in shown and "Traceback" not in shown


@pytest.mark.skipif(sys.platform != "linux", reason="a pseudo-terminal, as Linux has it")
def test_in_a_terminal_ctrl_c_on_a_line_that_has_begun_clears_the_line_alone(tmp_path):
    """Also right after another Ctrl-C, which would make it the second, and in the middle of a message."""
    model = chain(tmp_path / "model", " again", " and", loop=True)
    code, shown = in_a_terminal(
        model,
        ("> ", "say it\r"),
        ("again and again", "\x03"),
        ("[stopped]", ""),
        ("> ", "half a line"),
        ("half a line", "\x03"),
        ("> ", '"""\r'),
        ("… ", "\x03"),
        ("> ", "\x03"),
        ("press Ctrl-C again to leave", ""),
        ("> ", "more"),
        ("more", "\x03"),
        ("> ", "/quit\r"),
    )
    assert code == 0 and "Traceback" not in shown
    assert shown.count("press Ctrl-C again") == 1


# ---------------------------------------------------------------------------------------------------------------------
# A file of instructions.


@pytest.fixture
def loaded(tiny_llama):
    return load(tiny_llama, "cpu")


def run_file(monkeypatch, model: Path, records: list | str, out: Path, *flags) -> list[dict]:
    """The rows of ``out`` after ``chat.py --batch_path``; the records go to a file beside it."""
    source = out.with_name("in.jsonl")
    lines = records if isinstance(records, str) else "".join(json.dumps(record) + "\n" for record in records)
    source.write_text(lines)
    run_chat(
        monkeypatch,
        *("--model_path", model, "--device", "cpu", "--max_new_tokens", "8", "--seed", "3"),
        *("--batch_path", source, "--output_path", out, *flags),
    )
    return json.loads(out.read_text()) if out.suffix == ".json" else list(map(json.loads, out.open()))


RECORDS = [
    {"instruction": "Name a colour.", "input": "", "output": "the reference", "id": 7},
    {"instruction": "Say hello.", "dataset": "helpful_base"},
    {"instruction": "Sort these letters, from the first to the last.", "instances": [{"input": "b a", "output": ""}]},
    {"instruction": "Translate.", "input": "Guten Tag, ihr Lieben"},
]
INPUTS = ["", "", "b a", "Guten Tag, ihr Lieben"]
PAIRS = [(record["instruction"], text) for record, text in zip(RECORDS, INPUTS, strict=True)]


@pytest.mark.parametrize("name", ["out.jsonl", "out.json"])
def test_the_answers_of_a_file_are_those_of_streams_in_the_order_of_the_file(
    tiny_llama, loaded, tmp_path, monkeypatch, capsys, name
):
    rows = run_file(monkeypatch, tiny_llama, RECORDS, tmp_path / name)
    said = ["".join(stream_text(*loaded, utils.format_prompt(*pair), 8, 0.7, 0.9, 3)).strip() for pair in PAIRS]
    cut = {"generator": "tiny-llama", "finish_reason": "length"}
    expected = [record | {"output": text} | cut for record, text in zip(RECORDS, said, strict=True)]
    assert rows == expected
    out, err = capsys.readouterr()
    assert out == "" and f"4 answers in {tmp_path / name} (4 cut off at --max_new_tokens" in err
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", name]  # no journal, no temporary file


def test_one_answer_is_the_one_in_a_file_with_the_same_seed(tiny_llama, tmp_path, monkeypatch, capsys):
    rows = run_file(monkeypatch, tiny_llama, RECORDS, tmp_path / "out.jsonl")
    flags = ("--device", "cpu", "--max_new_tokens", "8", "--seed", "3")
    run_chat(monkeypatch, "--model_path", tiny_llama, *flags, "--instruction", PAIRS[3][0], "--input", PAIRS[3][1])
    assert capsys.readouterr().out == rows[3]["output"] + "\n"


def test_answers_are_not_written_over(tiny_llama, tmp_path, monkeypatch):
    (tmp_path / "out.jsonl").write_text("precious")
    with pytest.raises(SystemExit) as exit:
        run_file(monkeypatch, tiny_llama, RECORDS, tmp_path / "out.jsonl")
    assert "out.jsonl already exists: remove it" in exit.value.code
    assert (tmp_path / "out.jsonl").read_text() == "precious"


BAD_LINES = {
    "{broken": "malformed JSON, Expecting property name enclosed in double quotes at column 2",
    "[1]": "a JSON list, not an object",
    '{"input": "x"}': 'no text "instruction" in its fields (input)',
    '{"instruction": "  "}': 'no text "instruction"',
    '{"instruction": "x", "input": 3}': '"input" must be text',
    '{"instruction": "x", "instances": []}': '"instances" must be a list of one object',
    '{"instruction": "a\\ud800"}': "the text contains '\\ud800', half of a surrogate pair",
    '{"instruction": "x", "more": ' + "[" * 100_000: "malformed JSON, nested too deeply",
    '{"instruction": "x", "more": ' + "1" * 5_000 + "}": "malformed JSON, a number with too many digits",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_by_its_number_or_left_out_and_counted(tiny_llama, tmp_path, monkeypatch, capsys, line):
    good = [json.dumps(record) for record in RECORDS[:2]]
    lines = f"{good[0]}\n\n{line}\n{good[1]}\n"
    with pytest.raises(SystemExit) as exit:
        run_file(monkeypatch, tiny_llama, lines, tmp_path / "out.jsonl")
    assert f"in.jsonl, line 3: {BAD_LINES[line]}" in exit.value.code and "\n" not in exit.value.code
    assert not (tmp_path / "out.jsonl").exists()
    capsys.readouterr()
    rows = run_file(monkeypatch, tiny_llama, lines, tmp_path / "out.jsonl", "--skip_errors")
    assert [row["instruction"] for row in rows] == [record["instruction"] for record in RECORDS[:2]]
    err = capsys.readouterr().err
    assert f"left out: {tmp_path / 'in.jsonl'}, line 3: " in err and "1 malformed records left out" in err


def test_an_instruction_longer_than_the_context_is_told_by_its_number_and_never_cut(tiny_llama, tmp_path, monkeypatch):
    records = [RECORDS[0], {"instruction": "Q" * 2000, "output": "the reference"}, RECORDS[1]]
    with pytest.raises(SystemExit) as exit:
        run_file(monkeypatch, tiny_llama, records, tmp_path / "out.jsonl")
    assert "in.jsonl, line 2: the prompt has " in exit.value.code and "reads at most 1024" in exit.value.code
    assert os.listdir(tmp_path) == ["in.jsonl"]
    rows = run_file(monkeypatch, tiny_llama, records, tmp_path / "out.jsonl", "--skip_errors")
    assert "output" not in rows[1] and "reads at most 1024" in rows[1]["error"] and rows[1]["instruction"] == "Q" * 2000
    assert rows[0]["output"] and rows[2]["output"] and "error" not in rows[0]


def test_any_data_is_answered_and_what_was_recognized_is_said(tiny_llama, tmp_path, monkeypatch, capsys):
    rows = [{"instruction": "Name a colour.", "context": "Dark.", "response": "Navy", "category": "open_qa"}]
    asked = run_file(monkeypatch, tiny_llama, json.dumps(rows), tmp_path / "out.jsonl")[0]
    assert asked["output"] != "Navy" and capsys.readouterr().err.startswith(
        f"{tmp_path / 'in.jsonl'}: 1 record in Dolly's format\n"
    )
    expected = {"instruction": "Name a colour.", "input": "Dark.", "category": "open_qa", "generator": "tiny-llama"}
    assert asked == expected | {"output": asked["output"], "finish_reason": "length"}
    (asked,) = run_file(
        monkeypatch, tiny_llama, '{"question": "Hi"}', tmp_path / "o.jsonl", "--fields=instruction=question"
    )
    assert (asked["instruction"], asked["input"]) == ("Hi", "")


def test_where_all_records_are_malformed_the_first_fault_is_told(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"input": "x"}\n{}\n')
    said = ("all 2 records are malformed", 'in.jsonl, line 1: no text "instruction"')
    assert_user_error(lambda: answer_file.read_requests(tmp_path / "in.jsonl", skip_errors=True), *said)


def test_a_list_that_is_nested_too_deeply_is_one_line(tmp_path):
    (tmp_path / "in.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="in.json: malformed JSON, nested too deeply"):
        answer_file.read_requests(tmp_path / "in.json")


def test_an_error_of_an_earlier_run_does_not_stay_beside_an_answer(tiny_llama, tmp_path, monkeypatch):
    rows = run_file(monkeypatch, tiny_llama, [{"instruction": "Hi", "error": "too long"}], tmp_path / "out.jsonl")
    assert rows[0].keys() == {"instruction", "output", "generator", "finish_reason"}


def test_a_stdout_that_is_not_utf_8_takes_any_answer(tmp_path, monkeypatch):
    model, out = chain(tmp_path / "model", "caf", "é ", "好", "!"), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "latin-1"))
    run_chat(monkeypatch, "--model_path", model, "--device", "cpu", "--instruction", "x")
    sys.stdout.flush()
    assert out.getvalue() == "café ?!\n".encode("latin-1")


@pytest.mark.parametrize(
    ("pieces", "cut", "note"),
    [
        ([], "", "note: the answer is empty: the model ended at once\n"),
        (["a", " b"], "", ""),
        ([], "max_new_tokens", "note: cut off at --max_new_tokens\n"),
    ],
)
def test_an_answer_of_nothing_is_told(capsys, pieces, cut, note):
    def ask(instruction, input, say):
        for piece in pieces:
            say(piece)
        return "".join(pieces)

    chat.answer(SimpleNamespace(cut=cut, ask=ask), "x", "")
    assert capsys.readouterr() == ("".join(pieces) + "\n", note)


@pytest.mark.parametrize(
    ("terminal", "shown"),
    [
        (True, "é\tok\\x1b]0;title\\x07\\x9b\\r\\x1b[2J\\u202eabc\\u2066\n\n"),
        (False, "é\tok\x1b]0;title\x07\x9b\r\x1b[2J\u202eabc\u2066\n\n"),
    ],
)
def test_a_terminal_gets_control_characters_spelled_out_and_a_file_gets_every_byte(monkeypatch, terminal, shown):
    class Conversation:
        cut = ""

        def ask(self, instruction, input, say):
            for piece in ("é\tok\x1b]0;title\x07", "\x9b\r\x1b[2J\u202eabc\u2066\n"):
                say(piece)
            return "é"

    out = io.StringIO()
    out.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", out)
    chat.answer(Conversation(), "x", "")
    assert out.getvalue() == shown


def test_no_instruction_at_all_is_told(tiny_llama, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as exit:
        run_file(monkeypatch, tiny_llama, "\n", tmp_path / "out.jsonl")
    assert "has no records" in exit.value.code


MANY = [{"instruction": f"Count to {i}.", "input": "x" * (i % 7)} for i in range(24)]


def test_a_run_that_was_killed_goes_on_and_ends_as_an_uninterrupted_one(tiny_llama, tmp_path, monkeypatch, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    flags = ("--batch_tokens", "700")  # about four instructions a batch
    whole = run_file(monkeypatch, tiny_llama, MANY, tmp_path / "a" / "out.jsonl", *flags)
    out = tmp_path / "b" / "out.jsonl"
    out.with_name("in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in MANY))
    slow = (  # the real script, but a batch takes a while
        "import sys, time; sys.path.insert(0, '.'); import chat; from alpaca.common import cli\n"
        "from alpaca.inference import answer_file as answers\n"
        "inner = answers.answer_batch\n"
        "answers.answer_batch = lambda *args: (time.sleep(0.2), inner(*args))[1]\n"
        "cli.run_cli(chat.chat)"
    )
    argv = ["--model_path", tiny_llama, "--device", "cpu", "--max_new_tokens", "8", "--seed", "3"]
    argv += ["--batch_path", out.with_name("in.jsonl"), "--output_path", out, *flags]
    run = subprocess.Popen([sys.executable, "-c", slow, *map(str, argv)], cwd=ROOT, stderr=subprocess.DEVNULL)
    journal = tmp_path / "b" / "out.jsonl.journal"
    try:
        deadline = time.monotonic() + 120
        while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert not out.exists()
    with open(journal, "ab") as file:
        file.write(b"1234abcd {torn")
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run_file(monkeypatch, tiny_llama, MANY, out, *flags, "--temperature", "0")
    assert "is from a run that differs in temperature: use the same again" in exit.value.code
    assert run_file(monkeypatch, tiny_llama, MANY, out, *flags) == whole
    assert "of an earlier run" in capsys.readouterr().err
    assert out.read_bytes() == (tmp_path / "a" / "out.jsonl").read_bytes()


def test_ctrl_c_says_how_to_go_on(tiny_llama, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(answer_file, "answer_batch", interrupted)
        with pytest.raises(SystemExit) as exit:
            run_file(monkeypatch, tiny_llama, RECORDS, tmp_path / "out.jsonl")
    assert exit.value.code == 130
    assert (
        f"run the same command to continue: the answers are in {tmp_path}/out.jsonl.journal" in capsys.readouterr().err
    )
    assert len(run_file(monkeypatch, tiny_llama, RECORDS, tmp_path / "out.jsonl")) == len(RECORDS)


def test_a_torn_batch_is_answered_again_with_the_seed_that_was_drawn(tiny_llama, tmp_path, monkeypatch):
    """Also without a seed: the journal holds the one that was drawn."""

    class Stop(Exception):
        pass

    def stop(*_, **__):
        raise Stop

    flags = ("--batch_tokens", "700", "--seed", "None")
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(answer_file, "write_records", stop)
        with pytest.raises(Stop):
            run_file(monkeypatch, tiny_llama, MANY, out, *flags)
    journal = out.with_name("out.jsonl.journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    said = {row["row"]: row["output"] for row in (json.loads(line[9:]) for line in lines[1:])}
    journal.write_bytes(b"".join(lines[:10]) + lines[10][:30])
    rows = run_file(monkeypatch, tiny_llama, MANY, out, *flags)
    assert [row["output"] for row in rows] == [said[i] for i in range(len(MANY))]


def test_another_model_in_the_same_folder_does_not_finish_a_run(tiny_llama, tmp_path, monkeypatch):
    model, out = shutil.copytree(tiny_llama, tmp_path / "model"), tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(answer_file, "write_records", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_file(monkeypatch, model, RECORDS, out)
    os.utime(model / "model.safetensors")
    with pytest.raises(SystemExit) as exit:
        run_file(monkeypatch, model, RECORDS[:3], out)
    assert "from a run that differs in model, requests: use the same again, or choose another" in exit.value.code


def test_a_run_goes_on_in_the_template_that_it_began_with_named_or_not(tiny_llama, tmp_path, monkeypatch):
    model, out = shutil.copytree(tiny_llama, tmp_path / "model"), tmp_path / "out.jsonl"
    (model / "chat_template.jinja").write_text(TURNS)
    with monkeypatch.context() as patch:
        patch.setattr(answer_file, "write_records", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_file(monkeypatch, model, RECORDS, out)
    with pytest.raises(SystemExit) as exit:
        run_file(monkeypatch, model, RECORDS, out, "--template", "chat")
    assert "from a run that differs in template: use the same again" in exit.value.code
    assert len(run_file(monkeypatch, model, RECORDS, out, "--template", "alpaca")) == len(RECORDS)


def test_another_base_or_dtype_does_not_finish_a_run(tiny_llama, tmp_path, monkeypatch):
    base, adapter, out = shutil.copytree(tiny_llama, tmp_path / "base"), tmp_path / "adapter", tmp_path / "out.jsonl"
    lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(load(base, "cpu")[0], lora)
    model.save_pretrained(adapter)
    with monkeypatch.context() as patch:
        patch.setattr(answer_file, "write_records", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_file(monkeypatch, adapter, RECORDS, out)
    with pytest.raises(SystemExit) as exit:
        run_file(monkeypatch, adapter, RECORDS, out, "--dtype", "bfloat16")
    assert "from a run that differs in dtype: use the same again" in exit.value.code
    with pytest.raises(SystemExit) as exit:
        run_file(monkeypatch, adapter, RECORDS, out, "--base_path", tiny_llama)
    assert "from a run that differs in base_path: use the same again" in exit.value.code
    os.utime(base / "model.safetensors")
    with pytest.raises(SystemExit) as exit:
        run_file(monkeypatch, adapter, RECORDS, out)
    assert "from a run that differs in base: use the same again" in exit.value.code


# ---------------------------------------------------------------------------------------------------------------------
# docs/weights.md.


def published() -> str:
    return (ROOT / "docs" / "weights.md").read_text()


def test_what_goes_to_the_hub_is_the_model_and_what_tells_of_it(tiny_llama, tmp_path):
    """The documented patterns, through the hub library's own filter, on the folder of a real run."""
    out = tmp_path / "out"
    (tmp_path / "data.json").write_text(json.dumps(make_records(8)))
    argv = ["--model_name_or_path", tiny_llama, "--data_path", tmp_path / "data.json", "--output_dir", out]
    argv += ["--max_steps", 2, "--save_strategy", "steps", "--save_steps", 1, "--lora_r", 2, "--report_to", "none"]
    argv += ["--skip_save_rehearsal"]
    train.train(*train.parse_args([str(word) for word in argv]))
    shutil.copytree(
        out / "checkpoint-1", out / "abandoned-1" / "checkpoint-1"
    )  # what a run from an earlier checkpoint left
    (out / "training_args.bin").touch()  # what the library leaves, and TensorBoard where it is installed
    (out / "runs").mkdir()
    (out / "runs" / "events.out.tfevents.1").touch()
    (command,) = [shlex.split(line) for line in published().splitlines() if line.startswith("hf upload REPO OUT .")]
    patterns = [word for flag, word in zip(command, command[1:], strict=False) if flag == "--exclude"]
    there = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert {"checkpoint-2/optimizer.pt", "abandoned-1/checkpoint-1/training_args.bin"} <= set(there)
    tokenizer = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    expected = ["config.json", "generation_config.json", "loss.png", "model.safetensors", "model_card.md"]
    expected += ["Modelfile", "training_receipt.json", *tokenizer, "adapter/README.md", "adapter/adapter_config.json"]
    expected += ["adapter/adapter_model.safetensors", *(f"adapter/{name}" for name in tokenizer)]
    assert sorted(filter_repo_objects(there, ignore_patterns=patterns)) == sorted(expected)


def test_the_cards_upload_command_puts_it_where_the_hub_shows_it():
    assert "hf upload REPO OUT/model_card.md README.md\n" in published()
