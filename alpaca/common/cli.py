"""Command lines from functions: ``fire`` without its traps, and errors of one line."""

from __future__ import annotations

import difflib
import errno
import inspect
import math
import re
import socket
import sys
import textwrap
import typing
from collections.abc import Callable
from pathlib import Path

from alpaca import UserError

KINDS = {bool: "True or False", int: "whole number", float: "number"}  # text is left as it is given
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what makes a terminal do things; not tab and line feed


def run_cli(commands: Callable | dict[str, Callable]) -> None:
    """``fire.Fire`` without its traps: flags are checked and typed before anything runs, errors are one line.

    Fire alone calls the function first and complains about an unknown flag afterwards, and it turns
    ``--instruction "1, 2"`` into a tuple. Here a parameter annotated str stays text.
    """
    import fire

    if hasattr(sys.stdout, "reconfigure"):  # one that is not UTF-8 must not end a run at the first emoji
        sys.stdout.reconfigure(errors="replace")
    try:
        argv = _typed_argv(commands, sys.argv[1:])
        if argv is None:
            print(help_text(Path(sys.argv[0]).name, commands, sys.argv[1:]))
            sys.exit(0)
        fire.Fire(commands, command=argv, name=Path(sys.argv[0]).name)
    except UserError as e:  # it may quote a file of a stranger
        sys.exit("error: " + CONTROL.sub(lambda found: ascii(found[0])[1:-1], str(e)))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader (head, less) went away
        sys.stdout = None
        sys.exit(141)
    except OSError as e:
        sys.exit(f"error: {os_error_message(e)}")


def os_error_message(e: OSError) -> str:
    """One line for a failed file operation: which file, why, and for a full disk the cure."""
    cure = ": free some, or choose another folder" if e.errno == errno.ENOSPC else ""
    return f"{e.filename2 or e.filename or 'writing'}: {e.strerror or e}{cure}"


def help_text(script: str, commands: Callable | dict[str, Callable], argv: list[str]) -> str:
    """What --help prints. Fire's own offers short flags and positional values, which are refused here.

    With several tasks, and none of them in ``argv``, that is the list of them.
    """
    if isinstance(commands, dict):
        named = next((word for word in argv[:1] if word in commands), None)
        if named is None:
            tasks = (f"    {name}\n        {_documented(task)[0]}" for name, task in commands.items())
            head = f"SYNOPSIS\n    {script} TASK --FLAG VALUE …\n\nTASKS (TASK --help tells its flags)\n"
            return head + "\n".join(tasks)
        script, commands = f"{script} {named}", commands[named]
    first, rest, told = _documented(commands)
    flags, required = [], ""
    for name, parameter in inspect.signature(commands, eval_str=True).parameters.items():
        kinds = typing.get_args(parameter.annotation) or (parameter.annotation,)
        kind = next((what for kind, what in KINDS.items() if kind in kinds), "text")
        default = parameter.default
        said = None if default in (None, "") else f"default: {default}"
        if default is inspect.Parameter.empty:
            required, said = f"{required} --{name} {kind.upper()}", "required"
        flags.append(f"    --{name} ({', '.join(filter(None, (kind, said)))})")
        flags += textwrap.wrap(told.get(name, ""), 120, initial_indent=" " * 8, subsequent_indent=" " * 8)
    about = textwrap.indent("\n\n".join(filter(None, (first, rest))), "    ")
    return f"SYNOPSIS\n    {script}{required} --FLAG VALUE …\n\nDESCRIPTION\n{about}\n\nFLAGS\n" + "\n".join(flags)


def _documented(function: Callable) -> tuple[str, str, dict[str, str]]:
    """A Google-style docstring's first line, the rest before its sections, and what it says of each argument."""
    text = inspect.getdoc(function) or ""
    about, _, sections = text.partition("\nArgs:\n")
    first, _, rest = re.split(r"\n(?=(?:Returns|Raises|Yields):\n)", about)[0].strip().partition("\n")
    arguments = re.split(r"\n(?=\S)", sections)[0]
    told = {
        name: " ".join(said.split()) for name, said in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", arguments, re.M)
    }
    return first, rest.strip(), told


def unknown_flag(name: str, known: typing.Iterable[str]) -> UserError:
    """The error for a flag that is not there, with the nearest one that is."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return UserError(f"unknown flag --{name}" + (f": did you mean --{near[0]}?" if near else "; --help lists them"))


def free_port(port: int = 0) -> int:
    """``port`` if nothing listens there (0: any free one)."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port} is no port: take 1 to 65535, or 0 for a free one")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as e:
            raise UserError(
                f"port {port} cannot be used ({e.strerror}): choose another --port, or 0 for a free one"
            ) from e
        return probe.getsockname()[1]


def _typed_argv(commands, argv: list[str]) -> list[str] | None:
    """Checks the flags in argv against the command's signature and quotes text, so that Fire leaves it alone.

    None where help is asked for.
    """
    head, rest = [], list(argv)
    if isinstance(commands, dict):
        if not rest or rest[0] in ("-h", "--help"):
            return None
        if rest[0] not in commands:
            raise UserError(f"no task named {rest[0]!r}: choose from {', '.join(commands)}")
        head, function = [rest[0]], commands[rest.pop(0)]
    else:
        function = commands
    parameters = inspect.signature(function, eval_str=True).parameters
    out, given = [], set()
    while rest:
        token = rest.pop(0)
        if token in ("-h", "--help"):
            return None
        if not token.startswith("--"):
            raise UserError(f"unexpected argument {token!r}: values follow a flag, as in --{next(iter(parameters))} …")
        name, has_value, value = token[2:].partition("=")
        name = name.replace("-", "_")
        if name.startswith("no") and name[2:] in parameters and not has_value:
            name, has_value, value = name[2:], "=", "False"
        if name not in parameters:
            raise unknown_flag(name, parameters)
        annotation = parameters[name].annotation
        kinds = typing.get_args(annotation) or (annotation,)
        if not has_value:
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif bool in kinds:
                value = "True"
            else:
                raise UserError(f"--{name} needs a value")
        given.add(name)
        out.append(f"--{name}={_typed(name, value, kinds)!r}")
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in given:
            raise UserError(f"--{name} is missing: it has no default (--help explains it)")
    return head + out


def _typed(name: str, text: str, kinds: tuple):
    if type(None) in kinds and text == "None":
        return None
    if bool in kinds:
        if text.lower() in ("true", "1", "yes"):
            return True
        if text.lower() in ("false", "0", "no"):
            return False
        raise UserError(f"--{name} takes True or False, not {text!r}")
    for kind, what in ((int, "a whole number"), (float, "a number")):
        if kind in kinds:
            try:
                value = kind(text)
                if math.isfinite(value):  # Fire would hand on inf and nan as text
                    return value
            except (ValueError, OverflowError):
                pass
            raise UserError(f"--{name} takes {what}, not {text!r}")
    return text
