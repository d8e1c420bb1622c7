"""The command line: flags, types, help, and errors of one line."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca import UserError
from alpaca.common.cli import parse, run_cli

quick = settings(deadline=None, database=None, max_examples=60)


@pytest.fixture
def cli(monkeypatch):
    """``cli(*argv)`` runs a command line; returns the values that the command got, or None when it did not run."""

    def call(*argv: str, task: str | None = None):
        got = []

        def show(
            text: str = "none",
            count: int = 1,
            rate: float = 0.5,
            web: bool = False,
            path: str | None = None,
            limit: float | None = None,
            node: bool = True,
        ) -> None:
            """Shows what it got."""
            got.append(dict(text=text, count=count, rate=rate, web=web, path=path, limit=limit, node=node))

        monkeypatch.setattr(sys, "argv", ["show.py", *([task] if task else []), *argv])
        run_cli({"show": show, "other": print} if task else show)
        return got[0] if got else None

    return call


@pytest.mark.parametrize("task", [None, "show"])
def test_without_flags_the_defaults_hold(cli, task):
    got = cli(task=task)
    assert got == dict(text="none", count=1, rate=0.5, web=False, path=None, limit=None, node=True)


@pytest.mark.parametrize(
    "text", ["1, 2", "True", "[1]", "None", "{'a': 1}", "1e3", "0x10", "'q'", '"', "a\\nb\n", "-", ""]
)
def test_text_stays_text(cli, text):
    assert cli("--text", text)["text"] == text
    assert cli(f"--text={text}")["text"] == text


@quick
@given(text=st.text())
def test_any_text_stays_text(text):
    def echo(text: str, more: str | None = None) -> None: ...

    assert parse(echo, [f"--text={text}"]) == (echo, {"text": text})
    assert text.startswith("--") or parse(echo, ["--text", text]) == (echo, {"text": text})


def test_text_that_looks_like_a_flag_needs_the_equals_sign(cli):
    assert cli("--text=--count")["text"] == "--count"
    with pytest.raises(SystemExit, match="^error: --text needs a value$"):
        cli("--text", "--count", "3")


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--count", "-3"], "count", -3),
        (["--count=12"], "count", 12),
        (["--rate", "1"], "rate", 1.0),
        (["--rate", "1e-3"], "rate", 0.001),
        (["--limit", "None"], "limit", None),
        (["--limit", "2"], "limit", 2.0),
        (["--path", "None"], "path", None),
        (["--path", "7"], "path", "7"),
        (["--web"], "web", True),
        (["--web", "True"], "web", True),
        (["--web=yes"], "web", True),
        (["--web", "false"], "web", False),
        (["--web", "0"], "web", False),
        (["--noweb"], "web", False),
        (["--no-web"], "web", False),
        (["--no_web"], "web", False),
        (["--nonode"], "node", False),
        (["--node"], "node", True),  # not "no" + "de"
        (["--web", "--count", "2"], "web", True),
    ],
)
def test_a_value_has_the_type_of_its_parameter(cli, argv, name, value):
    got = cli(*argv)[name]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--count", "1.5"], "--count must be a whole number, not '1.5'"),
        (["--count", "many"], "--count must be a whole number, not 'many'"),
        (["--count", "None"], "--count must be a whole number, not 'None'"),
        (["--rate", "1,5"], "--rate must be a number, not '1,5'"),
        (["--limit", "inf"], "--limit must be a number, not 'inf'"),
        (["--rate", "nan"], "--rate must be a number, not 'nan'"),
        (["--web", "maybe"], "--web must be True or False, not 'maybe'"),
        (["--count"], "--count needs a value"),
        (["--rat", "1"], "unknown flag --rat: did you mean --rate?"),
        (["--zzz", "1"], "unknown flag --zzz; --help lists them"),
        (["stray"], "unexpected argument 'stray': put a flag before it, as in --text …"),
        (["--text", "a", "b"], "unexpected argument 'b': put a flag before it, as in --text …"),
    ],
)
def test_a_wrong_flag_or_value_is_one_line(cli, argv, message):
    with pytest.raises(SystemExit) as exit:
        cli(*argv)
    assert exit.value.code == f"error: {message}"  # Python prints it to stderr and exits with 1


def test_a_missing_value_without_a_default_is_one_line(monkeypatch):
    def copy(source: str, target: str) -> None:
        raise AssertionError("must not run")

    monkeypatch.setattr(sys, "argv", ["copy.py", "--target", "b"])
    with pytest.raises(SystemExit) as exit:
        run_cli(copy)
    assert exit.value.code == "error: --source is missing (--help explains it)"


def test_an_unknown_task_is_one_line_with_the_tasks(cli):
    with pytest.raises(SystemExit) as exit:
        cli(task="shw")
    assert exit.value.code == "error: unknown task 'shw': choose from show, other"


@pytest.mark.parametrize(
    ("argv", "task"), [(["--help"], None), (["-h"], None), (["--count", "2", "--help"], "show"), ([], "--help")]
)
def test_help_is_printed_with_exit_code_0_and_nothing_runs(cli, capfd, argv, task):
    with pytest.raises(SystemExit) as exit:
        assert cli(*argv, task=task) is None
    assert exit.value.code == 0
    printed = "".join(capfd.readouterr())
    assert "SYNOPSIS" in printed and "Shows what it got" in printed


def test_help_tells_each_flag_as_it_is_taken_and_no_other_way(monkeypatch, capsys):
    def copy(source: str, count: int = 2, fast: bool = False, note: str | None = None, mark: str = "") -> None:
        """Copies.

        Into the same folder.

        Args:
            source: what to copy,
                a file (yes: a file).
            count: how often.

        Raises:
            UserError: never.
        """

    monkeypatch.setattr(sys, "argv", ["do.py", "copy", "--help"])
    with pytest.raises(SystemExit):
        run_cli({"copy": copy})
    assert capsys.readouterr().out == (
        "SYNOPSIS\n    do.py copy --source TEXT --FLAG VALUE …\n\nDESCRIPTION\n    Copies.\n\n"
        "    Into the same folder.\n\n"
        "FLAGS\n    --source (text, required)\n        what to copy, a file (yes: a file).\n"
        "    --count (whole number, default: 2)\n        how often.\n    --fast (True or False, default: False)\n"
        "    --note (text)\n    --mark (text)\n"
    )


@dataclass(frozen=True)
class Limits:
    """How much.

    Args:
        most: of it,
            in all.
    """

    most: int = 3
    at_once: float | None = None


def test_a_parameter_that_is_a_dataclass_is_a_flag_for_each_of_its_fields(monkeypatch, capsys):
    def fill(path: str, limits: Limits = Limits()) -> None:  # noqa: B008  never changed
        """Fills."""

    assert parse(fill, ["--path", "p"]) == (fill, {"path": "p", "limits": Limits()})
    assert parse(fill, ["--at-once=0.5", "--path", "p"]) == (fill, {"path": "p", "limits": Limits(at_once=0.5)})
    for argv, message in ((["--mos", "1"], "did you mean --most?"), (["--most", "x"], "--most must be a whole number")):
        with pytest.raises(UserError, match=message.replace("?", r"\?")):
            parse(fill, argv)
    monkeypatch.setattr(sys, "argv", ["fill.py", "--help"])
    with pytest.raises(SystemExit):
        run_cli(fill)
    assert capsys.readouterr().out.endswith(
        "FLAGS\n    --path (text, required)\n    --most (whole number, default: 3)\n        of it, in all.\n"
        "    --at_once (number)\n"
    )


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (UserError("the cause: the cure"), "error: the cause: the cure"),
        (KeyboardInterrupt(), 130),
        (FileExistsError(17, "File exists", "out"), "error: out: File exists"),
        (OSError(28, "No space", "x.bin"), "error: x.bin: No space: free some, or choose another folder"),
    ],
)
def test_an_error_of_the_users_ends_in_one_line(monkeypatch, raised, code):
    def fail() -> None:
        raise raised

    monkeypatch.setattr(sys, "argv", ["fail.py"])
    with pytest.raises(SystemExit) as exit:
        run_cli(fail)
    assert exit.value.code == code


def test_an_error_that_quotes_a_strangers_file_moves_no_cursor(monkeypatch):
    def fail():
        raise UserError("a\x1b[2J, \x9b1A\rb\nc é")

    monkeypatch.setattr("sys.argv", ["script.py"])
    with pytest.raises(SystemExit) as exit:
        run_cli(fail)
    assert exit.value.code == "error: a\\x1b[2J, \\x9b1A\\rb\nc é"


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["fail.py"])
    with pytest.raises(ZeroDivisionError):
        run_cli(fail)


def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    script = tmp_path / "long.py"
    script.write_text(
        "from alpaca.common.cli import run_cli\n"
        "def long():\n    for _ in range(99999):\n        print('x' * 99)\nrun_cli(long)\n"
    )
    process = subprocess.Popen(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"x" * 99 + b"\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(30) == 141
