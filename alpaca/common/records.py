"""JSON and JSON Lines in and out: records, seed tasks and rows of answers."""

from __future__ import annotations

import json
import os
from pathlib import Path

from alpaca import UserError
from alpaca.common.files import read_text, replace_file

LIST_HINT = " (a JSON list? let its name end in .json)"
RELEASED_BLOB = "3779ddbc040543ab1834ef216c983d6fcc06cc9a"  # git hash-object of the 52,002 records of Stanford Alpaca


def jload(path: str | os.PathLike) -> list:
    """Read a JSON list, or JSON Lines if the name ends in ``.jsonl``.

    Raises:
        UserError: missing or unreadable file, or malformed JSON (with the line).
    """
    path, text = Path(path), read_text(path)
    if path.suffix == ".jsonl":
        return [_parse_json(line, path, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    data = _parse_json(text, path)
    if not isinstance(data, list):
        raise UserError(f"{path} holds a JSON {type(data).__name__}, not a list of records: wrap the records in [ ]")
    return data


def _parse_json(text: str, path: Path, line: int | None = None):
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        hint = "" if line or "Extra data" not in e.msg else " (one object a line? name it .jsonl)"
        hint = LIST_HINT if begins_a_list(text, line == 1) else hint
        raise UserError(f"{path}, line {line or e.lineno}: malformed JSON, {json_fault(e)}{hint}") from None
    except (RecursionError, ValueError) as e:
        raise UserError(f"{path}{f', line {line}' if line else ''}: malformed JSON, {json_fault(e)}") from None


def begins_a_list(text, first_line: bool) -> bool:
    """Whether what should be a file of one object a line begins as a JSON list."""
    return first_line and isinstance(text, str) and text.lstrip().startswith("[")


def json_fault(e: ValueError | RecursionError) -> str:
    """Return what json.loads rejected, without its advice to programmers."""
    if isinstance(e, json.JSONDecodeError):
        return f"{e.msg} at column {e.colno}"
    return "nested too deeply" if isinstance(e, RecursionError) else "a number with too many digits"  # than 4,300


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


def write_answers(rows: list[dict], path: str | os.PathLike) -> None:
    """Write rows at once: JSON Lines or, if the name ends in ``.json``, the JSON list that alpaca_eval reads."""
    if Path(path).suffix == ".json":
        jdump(rows, path)
        return
    with replace_file(path) as file:
        file.writelines(json_text(row) + "\n" for row in rows)
