"""Records in and out: files in any common format and shape, read the same way by every script.

A path is a file, a folder of files, several of these separated by commas, or a hub dataset. JSON (a list, or an object
with one list of objects) and JSON Lines are recognized by content; CSV, TSV and Parquet by name. Text may be compressed
(.gz). The shapes of records are in shapes.py; other field names can be given.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from alpaca import UserError
from alpaca.common.files import git_blob_id, open_bytes, open_text, replace_file
from alpaca.common.shapes import (
    ALPACA,
    CONVERSATIONS,
    FIELDS,
    has_several_turns,
    in_our_fields,
    task_key,
    user_message,
    without_system,
)
from alpaca.common.text import counted, first_line, shorten

SHIPPED = Path(__file__).resolve().parents[2] / "alpaca_data.json"  # this project's; absent where it is installed
RELEASED_BLOB = "3779ddbc040543ab1834ef216c983d6fcc06cc9a"  # git hash-object of the 52,002 records of Stanford Alpaca

LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
SUFFIXES = (*LINES, ".json", ".json.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")


# ---------------------------------------------------------------------------------------------------------------------
# Formats: a path → entries.


Entry = tuple[str, str, Any, str]  # the file; "record 3" or "line 3"; its value; its fault, or ""


def sources(path: str | os.PathLike) -> list[str]:
    """Return the files, and names on the hub, that a path stands for.

    A folder stands for the data files in it, at any depth; as on the hub, only for those named "train" if any are.
    """
    found: list[str] = []
    for part in [str(path)] if os.path.exists(path) else [part.strip() for part in str(path).split(",")]:
        if not os.path.isdir(part):
            found.append(part)
            continue
        names = sorted(file.relative_to(part).as_posix() for file in Path(part).rglob("[!.]*"))
        names = [name for name in names if name.endswith(SUFFIXES) and "/." not in f"/{name}"]
        if not names:
            raise UserError(f"{part} is a folder without data files ({', '.join(SUFFIXES)}): choose another")
        train = [name for name in names if re.search(r"(?<![a-z])train(?![a-z])", name)]
        found += [os.path.join(part, name) for name in train or names]
    return found


def is_on_hub(source: str) -> bool:
    """Return whether a source is a hub dataset: it looks like OWNER/NAME, and no such file exists."""
    is_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) and not source.endswith(SUFFIXES)
    return bool(is_name) and not os.path.exists(source)


def files_of(path: str | os.PathLike) -> list[Path]:
    """Return the files that a path stands for, without hub datasets."""
    return [Path(source) for source in sources(path) if not is_on_hub(source)]


def title(path: str | os.PathLike) -> str:
    """Return the names of what a path stands for, without their folders: "a.json, b.json"."""
    return ", ".join(Path(part).name for part in str(path).split(","))


def read_entries(path: str | os.PathLike) -> Iterator[Entry]:
    """Yield every value that a path stands for. JSON Lines are streamed: they take the memory of a line.

    Raises:
        UserError: a file is missing, unreadable, not what its name says, or has no list of records.
    """
    for file in sources(path):
        name = file.removesuffix(".gz")
        if is_on_hub(file) or name.endswith(".parquet"):
            rows = _hub(file) if is_on_hub(file) else _parquet(file)
            # Columns may hold dates and bytes, which JSON does not have.
            yield from _numbered(file, (json.loads(json.dumps(row, default=str)) for row in rows))
        elif name.endswith((".csv", ".tsv")):
            with open_text(file, newline="") as text:
                yield from _csv(file, text, "\t" if name.endswith(".tsv") else ",")
        else:
            with open_text(file) as text:
                yield from _json(file, text)


def _numbered(file: str, values: Iterable) -> Iterator[Entry]:
    return ((file, f"record {number}", value, "") for number, value in enumerate(values, 1))


def _hub(name: str) -> Iterable[dict]:
    try:
        import datasets
        import huggingface_hub

        if not huggingface_hub.is_offline_mode():  # load_dataset() tries for 24 s to reach an unreachable hub
            huggingface_hub.dataset_info(name, timeout=10)
        return datasets.load_dataset(name, split="train")
    except Exception as e:  # of the network, and of two libraries
        why = first_line(e)
        raise UserError(f"{name} is not a file, and the hub dataset cannot be loaded: {why}") from None


def _parquet(file: str) -> Iterator[dict]:
    import pyarrow.parquet

    with open_bytes(file) as raw:
        try:
            for batch in pyarrow.parquet.ParquetFile(raw).iter_batches():
                yield from batch.to_pylist()
        except pyarrow.ArrowException as e:
            raise UserError(f"{file} is not a complete Parquet file ({first_line(e)}): download it again") from None


def _csv(file: str, text: TextIO, delimiter: str) -> Iterator[Entry]:
    """Yield the rows of a table as strings: pandas, and so datasets, would turn 42 into a number and N/A into null."""
    csv.field_size_limit(2**31 - 1)  # 131,072 characters by default
    rows = csv.DictReader(text, delimiter=delimiter, strict=True)
    try:
        for number, row in enumerate(rows, 1):
            yield file, f"record {number}", row, "more columns than the header" if None in row else ""
    except csv.Error as e:
        raise UserError(f"{file}, line {rows.line_num}: malformed table, {e}") from None


def _json(file: str, text: TextIO) -> Iterator[Entry]:
    """Yield the entries of JSON or JSON Lines: the first line shows which, or the name if that line is malformed."""
    first, second = text.readline(), text.readline()
    (data, fault), named_so = _parsed(first), file.endswith(LINES)
    if fault:
        is_lines = named_so and not first.rstrip().endswith(("[", "{", ","))  # the value continues on the next line
    elif second.strip():
        is_lines = named_so or isinstance(data, dict)
    else:
        is_lines = isinstance(data, dict) and _list_in(data) is None
    if is_lines:
        for number, line in enumerate(chain((first, second), text), 1):
            if line.strip():
                yield file, f"line {number}", *_parsed(line)
        return
    if fault or second:
        if text.seekable():  # reading all at once saves a copy; a pipe cannot
            text.seek(0)
            first = second = ""
        data, fault = _parsed(first + second + text.read(), whole=True)
    if fault:
        raise UserError(f"{file}{', ' if fault.startswith('line') else ': '}{fault}")
    if (records := _list_in(data)) is None:
        what = f"is a JSON {type(data).__name__}, not a list of records or an object with one such list"
        raise UserError(f"{file} {what}: wrap the records in [ ]")
    yield from _numbered(file, records)


def _list_in(data) -> list | None:
    """Return a JSON value if it is a list, or the only list of objects in an object that is not itself a record."""
    if not isinstance(data, dict) or data.keys() & {"instruction", "prompt", *CONVERSATIONS}:
        return data if isinstance(data, list) else None
    lists = [v for v in data.values() if isinstance(v, list) and v and all(isinstance(one, dict) for one in v)]
    return lists[0] if len(lists) == 1 else None


def _parsed(text: str, whole: bool = False) -> tuple[Any, str]:
    """Return the value of JSON, and "" or its fault; for a whole file, the fault starts with the line number."""
    try:
        return json.loads(text), ""
    except json.JSONDecodeError as e:
        return None, (f"line {e.lineno}: " if whole else "") + f"malformed JSON, {e.msg} at column {e.colno}"
    except RecursionError:
        return None, "malformed JSON, nested too deeply"
    except ValueError:
        return None, "malformed JSON, a number with too many digits"  # than 4,300


def jload(path: str | os.PathLike) -> list:
    """Return all values that a path stands for, unchanged.

    Raises:
        UserError: see read_entries; also a malformed line, with its number.
    """
    values = []
    for file, place, value, fault in read_entries(path):
        if fault:
            raise UserError(f"{file}, {place}: {fault}")
        values.append(value)
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Entries → records (shapes.py).


def _refuse(fault: str) -> None:
    raise UserError(fault)


def read_records(
    path: str | os.PathLike,
    fields: str | None = None,
    say: Callable[[str], object] = print,
    answers: bool = False,
    on_fault: Callable[[str], object] = _refuse,
) -> Iterator[tuple[str, dict]]:
    """Yield (file and number, record) in Alpaca's fields; other fields are kept, and Alpaca's own records unchanged.

    A conversation of several turns, or with a system text, also has "messages" (shapes.py). One that is not a sequence
    of text turns (tools, images) is dropped and counted.

    Args:
        path: see sources().
        fields: field names of records in another format: "instruction=question,output=answer".
        say: gets one line at the end, unless all were in Alpaca's format: what was recognized, and what was dropped.
        answers: whether records need the texts "input" (null or missing becomes "") and "output". A record without an
            answer is dropped, and so is a last question without one. In Alpaca's format an empty text is an answer,
            and a missing one is a fault.
        on_fault: gets the file, number and fault of a malformed record; by default it raises.

    Raises:
        UserError: see read_entries; also no records, a name in ``fields`` that no record has, or a malformed record.
    """
    names, shapes, dropped, there, seen, several = _field_map(fields), Counter(), {}, {}, False, 0
    for file, place, entry, fault in read_entries(path):
        try:
            if fault:
                raise UserError(fault)
            shape, record = in_our_fields(entry, names, answers)
        except UserError as e:
            seen = True
            on_fault(f"{file}, {place}: {e}")
            continue
        shapes[shape] += 1
        there |= entry if names else {}
        if isinstance(record, dict):
            seen = True
            several += has_several_turns(record)
            yield f"{file}, {place}", record
        else:
            where = "" if file == str(path) else f"{Path(file).name} "
            dropped.setdefault(record, []).append(where + place.split()[1])
    if unknown := ", ".join(sorted(set(names.values()) - there.keys() - set(FIELDS))) if there else "":
        raise UserError(f"{path} has no field {unknown}: choose from {shorten(', '.join(there), 200)}")
    found = ", ".join(f"{counted(count, 'record')} in {shape}" for shape, count in shapes.items())
    found += f", {several:,} of several turns" if several else ""
    for why, numbers in dropped.items():
        found += f"; {len(numbers):,} {why} dropped: {', '.join(numbers[:10])}" + ", …" * (len(numbers) > 10)
    if not seen:
        if not found:
            raise UserError(f"{path} has no records: choose another file")
        cure = "set fields, as in instruction=question,output=answer, or choose other data"
        raise UserError(f"{path}: {found}; no records left: {cure}")
    if dropped or several or shapes.keys() - {ALPACA}:
        say(f"{path}: {found}")


def _field_map(text: str | None) -> dict[str, str]:
    """Return "instruction=question,output=answer" as a dictionary with all of our fields; {} for no text."""
    given = dict(part.strip().partition("=")[::2] for part in (text or "").split(",") if part.strip())
    if not all(ours in FIELDS and theirs for ours, theirs in given.items()):
        raise UserError(f"fields must look like instruction=question,input=context,output=answer, not {text!r}")
    return {field: field for field in FIELDS} | given if given else {}


def load_records(
    path: str | os.PathLike, fields: str | None = None, say: Callable[[str], object] = print
) -> list[dict]:
    """Return records with the texts "instruction", "input" and "output"; see read_records."""
    return [record for _, record in read_records(path, fields, say, answers=True)]


def restricted_parts(records: Iterable[dict], files: Iterable[Path]) -> dict[str, int]:
    """Return how many records are from data under CC BY-NC 4.0, by the name of that data: this project's or Stanford's.

    Records are compared by their texts, of a conversation the first question and answer, without a system text.
    Stanford's are recognized only if their whole file is among ``files``.
    """

    def key(record: dict) -> tuple[str, ...]:
        own = without_system(record)
        return task_key(user_message(own["instruction"], own["input"]) | {"output": own["output"]}, "content", "output")

    places = [("alpaca_data.json of alpaca-reproduced", SHIPPED)] if SHIPPED.exists() else []
    released = [file for file in files if file.is_file() and git_blob_id(file) == RELEASED_BLOB]
    places += [("the data that Stanford Alpaca released", file) for file in released[:1]]
    keys, parts = [key(record) for record in records], {}
    for name, place in places:
        known = {key(record) for record in load_records(place, say=lambda line: None)}
        if count := sum(one in known for one in keys):
            parts[name] = count
    return parts


def load_seed_tasks(path: str | os.PathLike) -> list[dict]:
    """Read seed tasks, one JSON object a line: ``{"instruction": str, "instances": [{"input": str, "output": str}]}``.

    Raises:
        UserError: see jload; also no tasks, or one without these texts (with its number).
    """
    if not (tasks := jload(path)):
        raise UserError(f"{path} has no records: choose another file")
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


# ---------------------------------------------------------------------------------------------------------------------
# Writing.


def jdump(obj, path: str | os.PathLike, indent: int = 4) -> None:
    """Write JSON through a temporary file and a rename: readers see the old file or the new one, never a part."""
    with replace_file(path) as file:
        file.write(json_text(obj, indent) + "\n")


def json_text(obj, indent: int | None = None) -> str:
    """Return JSON that UTF-8 can encode: all ASCII if it contains half of a surrogate pair, which JSON allows."""
    text = json.dumps(obj, indent=indent, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(obj, indent=indent)
    return text


def write_records(records: Iterable[dict], path: str | os.PathLike, lines: bool | None = None) -> int:
    """Write records as they come into a temporary file, and rename it at the end; return how many.

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
