"""Command lines from functions: flags from a signature, help from a docstring, errors of one line."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import inspect
import math
import os
import re
import signal
import socket
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from alpaca import RankError, UserError
from alpaca.common.text import printable

Commands = Callable | dict[str, Callable]  # a function, or several by the names of their tasks
KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
ENDED_BY: list[int] = []  # signals other than Ctrl-C


class Flag(typing.NamedTuple):
    kind: type  # one of KINDS
    optional: bool  # whether the text "None" is None
    default: object  # inspect.Parameter.empty if it is required
    about: str


def run_cli(commands: Commands) -> None:
    """Call the function that ``sys.argv`` names, with its flags as arguments.

    Flags are checked and converted to the annotated types before anything runs; text stays text. A parameter annotated
    with a dataclass stands for one flag per field of it. UserError, OSError and Ctrl-C end in one line.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that is not UTF-8 must not end a run at the first emoji
        sys.stdout.reconfigure(errors="replace")
    try:
        if (call := parse(commands, sys.argv[1:])) is None:
            print(help_text(Path(sys.argv[0]).name, commands, sys.argv[1:]))
            sys.exit(0)
        function, arguments = call
        function(**arguments)
    except UserError as e:
        fail(e)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(128 + (ENDED_BY or [signal.SIGINT])[0])
    except BrokenPipeError:  # the reader (head, less) went away
        sys.stdout = None
        sys.exit(141)
    except OSError as e:
        sys.exit(f"error: {printable(os_error_message(e))}")


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP end the process like Ctrl-C, with what a run saves, prints and removes at its end."""

    def end(number: int, frame) -> None:
        ENDED_BY.append(number)
        interrupt = signal.getsignal(signal.SIGINT)  # in asyncio.run() its own, which lets replies be saved
        (interrupt if callable(interrupt) else signal.default_int_handler)(number, frame)

    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # Windows has no SIGHUP
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores it
            signal.signal(number, end)


def parse(commands: Commands, argv: list[str]) -> tuple[Callable, dict[str, object]] | None:
    """Return the function that a command line names and its arguments by name, or None if it asks for help.

    Raises:
        UserError: an unknown task or flag, a value of the wrong type, or a missing required flag.
    """
    rest = list(argv)
    if isinstance(commands, dict):
        if not rest or rest[0] in ("-h", "--help"):
            return None
        if rest[0] not in commands:
            raise UserError(f"unknown task {rest[0]!r}: choose from {', '.join(commands)}")
        commands = commands[rest.pop(0)]
    flags, values = _flags(commands), {}
    while rest:
        token = rest.pop(0)
        if token in ("-h", "--help"):
            return None
        if not token.startswith("--"):
            raise UserError(f"unexpected argument {token!r}: put a flag before it, as in --{next(iter(flags))} …")
        name, has_value, value = token[2:].partition("=")
        name = name.replace("-", "_")
        if name not in flags and not has_value and (positive := re.sub("^no_?", "", name)) in flags:
            name, has_value, value = positive, "=", "False"
        if name not in flags:
            raise unknown_flag(name, flags)
        if not has_value:
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif flags[name].kind is bool:
                value = "True"
            else:
                raise UserError(f"--{name} needs a value")
        values[name] = _convert(name, value, flags[name])
    for name, flag in flags.items():
        if flag.default is inspect.Parameter.empty and name not in values:
            raise UserError(f"--{name} is missing (--help explains it)")
    for name, parameter in inspect.signature(commands, eval_str=True).parameters.items():
        if dataclasses.is_dataclass(group := parameter.annotation):
            values[name] = group(**{field: values.pop(field) for field in _flags(group) if field in values})
    return commands, values


def _flags(function: Callable) -> dict[str, Flag]:
    """Return a function's flags by name: its parameters, and the fields of a parameter that is a dataclass."""
    about, flags = _documented(function)[2], {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if dataclasses.is_dataclass(parameter.annotation):
            flags |= _flags(parameter.annotation)
        else:
            kinds = typing.get_args(parameter.annotation) or (parameter.annotation,)
            kind = next((kind for kind in KINDS if kind in kinds), str)
            flags[name] = Flag(kind, type(None) in kinds, parameter.default, about.get(name, ""))
    return flags


def _convert(name: str, text: str, flag: Flag):
    if flag.optional and text == "None":
        return None
    if flag.kind is str:
        return text
    try:
        value = TRUTH[text.lower()] if flag.kind is bool else flag.kind(text)
        if math.isfinite(value):
            return value
    except (KeyError, ValueError, OverflowError):
        pass
    raise UserError(f"--{name} must be {KINDS[flag.kind]}, not {text!r}")


def help_text(script: str, commands: Commands, argv: list[str]) -> str:
    """Return a task's synopsis, description and flags, or the list of tasks if ``argv`` names none."""
    if isinstance(commands, dict):
        named = next((word for word in argv[:1] if word in commands), None)
        if named is None:
            tasks = "\n".join(f"    {name}\n        {_documented(task)[0]}" for name, task in commands.items())
            return f"SYNOPSIS\n    {script} TASK --FLAG VALUE …\n\nTASKS (TASK --help lists its flags)\n{tasks}"
        script, commands = f"{script} {named}", commands[named]
    lines, required = [], ""
    for name, flag in _flags(commands).items():
        kind = KINDS[flag.kind].removeprefix("a ")
        note = None if flag.default in (None, "") else f"default: {flag.default}"
        if flag.default is inspect.Parameter.empty:
            required, note = f"{required} --{name} {kind.upper()}", "required"
        lines.append(f"    --{name} ({', '.join(filter(None, (kind, note)))})")
        lines += textwrap.wrap(flag.about, 120, initial_indent=" " * 8, subsequent_indent=" " * 8)
    about = textwrap.indent("\n\n".join(filter(None, _documented(commands)[:2])), "    ")
    return f"SYNOPSIS\n    {script}{required} --FLAG VALUE …\n\nDESCRIPTION\n{about}\n\nFLAGS\n" + "\n".join(lines)


def _documented(function: Callable) -> tuple[str, str, dict[str, str]]:
    """Return a Google-style docstring's first line, the rest before its sections, and each argument's description."""
    about, _, sections = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    first, _, rest = re.split(r"\n(?=(?:Returns|Raises|Yields):\n)", about)[0].strip().partition("\n")
    arguments = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", re.split(r"\n(?=\S)", sections)[0], re.M)
    return first, rest.strip(), {name: " ".join(text.split()) for name, text in arguments}


def say(message: str) -> None:
    """Print, on the first process of a run only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, flush=True)


def fail(e: UserError) -> NoReturn:
    """Exit with ``error: …``. All processes of a run meet the same error; only the first of a node prints it.

    A RankError may have hit this process alone, so any process prints it.
    """
    here = int(os.environ.get("LOCAL_RANK", 0)) == 0 or isinstance(e, RankError)
    sys.exit(f"error: {printable(str(e))}" if here else 1)  # it may quote an untrusted file


def unknown_flag(name: str, known: Iterable[str]) -> UserError:
    """Return the error for an unknown flag; it names the nearest known one."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return UserError(f"unknown flag --{name}" + (f": did you mean --{near[0]}?" if near else "; --help lists them"))


def os_error_message(e: OSError) -> str:
    """Return one line for a failed file operation: the file, the reason, and for a full disk what to do."""
    remedy = ": free some, or choose another folder" if e.errno == errno.ENOSPC else ""
    return f"{e.filename2 or e.filename or 'writing'}: {e.strerror or e}{remedy}"


def free_port(port: int = 0) -> int:
    """Return ``port`` if nothing listens there, or any free one for 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as e:  # OverflowError: out of range
            why = getattr(e, "strerror", None) or e
            raise UserError(f"port {port} cannot be used ({why}): choose another, or 0 for a free one") from e
        return probe.getsockname()[1]
