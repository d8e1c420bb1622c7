"""The flags, read from sources without importing them, as torch and transformers take seconds: names, --help, --config.

A script that reads its command line here before its imports answers --help and mistakes at once.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from alpaca import UserError
from alpaca.common import cli
from alpaca.common.files import read_text
from alpaca.training import legacy_flags


class Flag(NamedTuple):
    kind: str
    default: str
    about: str


def own_flags(script: str | os.PathLike) -> dict[str, dict[str, Flag]]:
    """Return the flags of each class of a script whose name ends in "Arguments": its annotated fields."""
    found = {}
    for node in ast.parse(Path(script).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments"):
            fields = (
                part for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.value, ast.Call)
            )
            found[node.name] = {part.target.id: _flag(part) for part in fields}
    return found


def _flag(field: ast.AnnAssign) -> Flag:
    """Read ``name: type = call(default, help)``, or the library's ``field(default=…, metadata={"help": …, …})``."""
    default, *_, about = [*field.value.args, *(keyword.value for keyword in field.value.keywords)]
    if isinstance(about, ast.Dict):
        about = about.values[0]
    return Flag(ast.unparse(field.annotation), ast.unparse(default), ast.literal_eval(about).replace("%%", "%"))


def library_flags() -> dict[str, Flag]:
    """Return the fields of transformers' TrainingArguments."""
    if not (library := importlib.util.find_spec("transformers")):
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
    return own_flags(Path(library.origin).with_name("training_args.py"))["TrainingArguments"]


def read(argv: Sequence[str], script: str | os.PathLike, about: str, required: Sequence[str] = ()) -> list[str]:
    """Return a command line with the flags of --config FILE in front of its own, which so win. --help ends here.

    Args:
        argv: the words after the script's name.
        script: with the classes of its flags (own_flags), one of them made from the library's.
        about: what --help shows first.
        required: flags that must be given.

    Raises:
        UserError: a flag that neither the script, the library, nor the library of 2023 knows; one that is missing; a
            configuration that cannot be read.
    """
    own, library = own_flags(script), library_flags()
    if wanted := {"-h", "--help", "--help_all"} & set(argv):
        print(_help(about, own | {"transformers": library} if "--help_all" in wanted else own))
        sys.exit(0)
    words, rest = [], list(argv)
    while rest:
        word, has_value, path = rest.pop(0).partition("=")
        if word != "--config":
            words.append(word + has_value + path)
        elif has_value or rest:
            words = config_words(path or rest.pop(0)) + words
        else:
            raise UserError("--config needs a file, YAML or JSON")
    every = library | {name: flag for flags in own.values() for name, flag in flags.items()}
    names = {*every, *(f"no_{name}" for name, flag in every.items() if flag.default == "True")}
    given = {word.split("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    for name in sorted(given - names - legacy_flags.ALL):
        raise cli.unknown_flag(name, sorted(names | {"config"}))
    if missing := [name for name in required if name not in given]:
        raise UserError(f"--{', --'.join(missing)} must be given (--help shows an example)")
    return words


def config_words(path: str | os.PathLike) -> list[str]:
    """Return the flags in a YAML or JSON file as words of a command line; of a receipt, those that repeat its run."""
    text = read_text(path)
    try:  # in YAML, a save_strategy of no is text, as on a command line, and not false
        config = json.loads(text) if str(path).endswith(".json") else yaml.load(text, yaml.BaseLoader)
    except (ValueError, yaml.YAMLError) as e:
        raise UserError(f"--config {path} is malformed: {' '.join(str(e).split())}") from None
    if isinstance(config, dict) and isinstance(config.get("arguments"), dict):
        config = config["arguments"] | {"resume_from_checkpoint": None}
    if not isinstance(config, dict):
        raise UserError(f"--config {path} holds no flags: write a line for each, as in learning_rate: 2e-5")
    words = []
    for name, value in config.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)] if value else []
        elif value not in (None, "", "null", "~"):
            words.append(f"--{name}={json.dumps(_typed(value)) if isinstance(value, dict) else value}")
    return words


def _typed(value):
    """Turn the texts "1e-6", "true" and so on inside a flag's own object into what they stand for."""
    if isinstance(value, dict):
        return {key: _typed(entry) for key, entry in value.items()}
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _help(about: str, groups: dict[str, dict[str, Flag]]) -> str:
    lines, shown = [about], set()
    for group, flags in groups.items():
        lines.append(f"\n{group.removesuffix('Arguments').upper()}")
        for name, flag in flags.items():
            if name not in shown:
                default = "" if flag.default in ("None", "''") else f", default: {flag.default}"
                lines.append(f"    --{name} ({flag.kind.removesuffix(' | None').removeprefix('None | ')}{default})")
                lines += textwrap.wrap(flag.about, 120, initial_indent=" " * 8, subsequent_indent=" " * 8)
            shown.add(name)
    ending = "" if "transformers" in groups else "\n\n--help_all lists the flags of transformers.TrainingArguments too."
    return "\n".join(lines) + ending
