"""JSON and JSON Lines in and out: records, seed tasks and rows of answers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from alpaca import UserError
from alpaca.common.files import open_text, replace_file

LIST_HINT = " (a JSON list? let its name end in .json)"  # for what should be JSON Lines
RELEASED_BLOB = "3779ddbc040543ab1834ef216c983d6fcc06cc9a"  # git hash-object of the 52,002 records of Stanford Alpaca


def read_entries(path: str | os.PathLike) -> Iterator[tuple[str, Any, str]]:
    """Yield (place, value, fault) for each entry of a JSON list, or of JSON Lines if the name ends in ``.jsonl``.

    ``place`` is "record 3" or "line 3"; ``fault`` is "" or says what is wrong with a line, which then has no value.
    JSON Lines are streamed: they take the memory of a line.

    Raises:
        UserError: a file that is missing, unreadable, not UTF-8, or no JSON list.
    """
    path = Path(path)
    with open_text(path) as file:
        if path.suffix == ".jsonl":
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {number}", *_parsed(line, LIST_HINT, number == 1)
            return
        data, fault = _parsed(file.read(), " (one object a line? let its name end in .jsonl)")
    if fault:
        raise UserError(f"{path}{', ' if fault.startswith('line') else ': '}{fault}")
    if not isinstance(data, list):
        raise UserError(f"{path} holds a JSON {type(data).__name__}, not a list of records: wrap the records in [ ]")
    for number, value in enumerate(data, 1):
        yield f"record {number}", value, ""


def _parsed(text: str, other_format: str, first_line: bool | None = None) -> tuple[Any, str]:
    """Return the value of JSON, and "" or its fault; ``first_line`` is None for a whole file, not a line of one."""
    try:
        return json.loads(text), ""
    except json.JSONDecodeError as e:
        line = f"line {e.lineno}: " if first_line is None else ""
        other = first_line and text.lstrip().startswith("[") or first_line is None and "Extra data" in e.msg
        return None, f"{line}malformed JSON, {e.msg} at column {e.colno}{other_format if other else ''}"
    except RecursionError:
        return None, "malformed JSON, nested too deeply"
    except ValueError:
        return None, "malformed JSON, a number with too many digits"  # than 4,300


def jload(path: str | os.PathLike) -> list:
    """Read a JSON list, or JSON Lines if the name ends in ``.jsonl``.

    Raises:
        UserError: see read_entries; also a malformed line, with its number.
    """
    values = []
    for place, value, fault in read_entries(path):
        if fault:
            raise UserError(f"{path}, {place}: {fault}")
        values.append(value)
    return values


def jdump(obj, path: str | os.PathLike, indent: int = 4) -> None:
    """Write JSON through a temporary file and a rename, so that readers see the old file or the new one, whole."""
    with replace_file(path) as file:
        file.write(json_text(obj, indent) + "\n")


def json_text(obj, indent: int | None = None) -> str:
    """Return JSON that UTF-8 can encode: all ASCII if it has half of a surrogate pair, which JSON can spell."""
    text = json.dumps(obj, indent=indent, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(obj, indent=indent)
    return text


def load_records(path: str | os.PathLike) -> list[dict]:
    """Read Alpaca-format records: ``{"instruction": str, "input": str, "output": str}`` (other fields are kept).

    Raises:
        UserError: see jload; also an empty data set, or a record without the three text fields (with its number).
    """
    if not (records := jload(path)):
        raise UserError(f"{path} holds no records: choose a file with at least one")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UserError(f"{path}, record {number}: a {type(record).__name__} where an object was expected")
        for field in ("instruction", "input", "output"):
            if not isinstance(record.get(field), str):
                has = "no" if field not in record else "a non-text"
                raise UserError(
                    f'{path}, record {number}: {has} "{field}" field; each record needs the texts '
                    '"instruction", "input" (may be "") and "output"'
                )
    return records


def load_seed_tasks(path: str | os.PathLike) -> list[dict]:
    """Read seed tasks, one JSON object a line: ``{"instruction": str, "instances": [{"input": str, "output": str}]}``.

    Raises:
        UserError: see jload; also no task at all, or one without these texts (with its number).
    """
    if not (tasks := jload(path)):
        raise UserError(f"{path} holds no seed tasks: choose a file with at least one")
    for number, task in enumerate(tasks, 1):
        try:
            instance = task["instances"][0]
            texts = (task["instruction"], instance["input"], instance["output"])
        except (KeyError, IndexError, TypeError):
            texts = (None,)
        if not all(isinstance(text, str) for text in texts):
            raise UserError(
                f'{path}, task {number}: needs an "instruction" and "instances": [{{"input": …, "output": …}}]'
            )
    return tasks


def write_records(records: Iterable[dict], path: str | os.PathLike, lines: bool | None = None) -> int:
    """Write records as they come, to appear at once; return how many. Where one raises, ``path`` stays as it was.

    Args:
        records: JSON objects.
        path: gets a JSON list, with the bytes of jdump, or JSON Lines if its name ends in ``.jsonl``.
        lines: True for JSON Lines whatever the name.
    """
    count = 0
    with replace_file(path) as file:
        lines = Path(path).suffix == ".jsonl" if lines is None else lines
        for count, record in enumerate(records, 1):
            if lines:
                file.write(json_text(record) + "\n")
            else:
                file.write(("[" if count == 1 else ",") + "\n    " + json_text(record, 4).replace("\n", "\n    "))
        if not lines:
            file.write("\n]\n" if count else "[]\n")
    return count
