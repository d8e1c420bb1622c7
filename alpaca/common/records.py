"""Records in and out: files in the formats and shapes that people have, read the same way by every script.

A path is a file, a folder of files, several of these with commas between, or a data set's name on the hub. JSON (a
list, or an object with one list of objects) and JSON Lines are known by their content; CSV, TSV and Parquet by name.
Text may be compressed (.gz). Records may have Alpaca's fields, Dolly's, or prompt and completion, or be conversations
of one turn, as ShareGPT or OpenAI writes them; the names of other fields can be given.
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
from alpaca.common.files import open_bytes, open_text, replace_file
from alpaca.common.text import counted, first_line, shorten

RELEASED_BLOB = "3779ddbc040543ab1834ef216c983d6fcc06cc9a"  # git hash-object of the 52,002 records of Stanford Alpaca

LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
SUFFIXES = (*LINES, ".json", ".json.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
FIELDS = ("instruction", "input", "output")
ALPACA, DOLLY, PROMPTS = "Alpaca's format", "Dolly's format", "prompt/completion format"
THEIRS = {  # names of our fields
    DOLLY: {"instruction": "instruction", "input": "context", "output": "response"},
    PROMPTS: {"instruction": "prompt", "output": "completion"},
}
CONVERSATIONS = {"messages": "OpenAI's messages", "conversations": "ShareGPT's format"}
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant"}
ROLES |= {"gpt": "assistant"} | dict.fromkeys(("tool", "function", "function_call", "observation"), "tool")


# ---------------------------------------------------------------------------------------------------------------------
# Formats: a path → entries.


Entry = tuple[str, str, Any, str]  # the file; "record 3" or "line 3"; its value; its fault, or ""


def sources(path: str | os.PathLike) -> list[str]:
    """Return the files, and names on the hub, that a path stands for.

    A folder stands for the data files in it, at any depth; as on the hub, for those named "train" alone if any are.
    """
    found: list[str] = []
    for part in [str(path)] if os.path.exists(path) else [part.strip() for part in str(path).split(",")]:
        if not os.path.isdir(part):
            found.append(part)
            continue
        names = sorted(file.relative_to(part).as_posix() for file in Path(part).rglob("[!.]*"))
        names = [name for name in names if name.endswith(SUFFIXES) and "/." not in f"/{name}"]
        if not names:
            raise UserError(f"{part} is a folder without data files: choose another ({', '.join(SUFFIXES)})")
        train = [name for name in names if re.search(r"(?<![a-z])train(?![a-z])", name)]
        found += [os.path.join(part, name) for name in train or names]
    return found


def is_on_hub(source: str) -> bool:
    """Return whether a source is a data set on the hub: it reads OWNER/NAME, and there is no such file."""
    is_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) and not source.endswith(SUFFIXES)
    return bool(is_name) and not os.path.exists(source)


def files_of(path: str | os.PathLike) -> list[Path]:
    """Return the files that a path stands for, without what is on the hub."""
    return [Path(source) for source in sources(path) if not is_on_hub(source)]


def title(path: str | os.PathLike) -> str:
    """Return the names of what a path stands for, without their folders: "a.json, b.json"."""
    return ", ".join(Path(part).name for part in str(path).split(","))


def read_entries(path: str | os.PathLike) -> Iterator[Entry]:
    """Yield every value that a path stands for. JSON Lines are streamed: they take the memory of a line.

    Raises:
        UserError: a file that is missing, unreadable or not what its name says, or without a list of records.
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

        if not huggingface_hub.is_offline_mode():  # load_dataset() tries for 24 s to reach a hub that is out of reach
            huggingface_hub.dataset_info(name, timeout=10)
        return datasets.load_dataset(name, split="train")
    except Exception as e:  # of the network, and of two libraries
        why = first_line(e)
        raise UserError(f"{name} is not a file, and cannot be loaded from the Hugging Face hub: {why}") from None


def _parquet(file: str) -> Iterator[dict]:
    import pyarrow.parquet

    with open_bytes(file) as raw:
        try:
            for batch in pyarrow.parquet.ParquetFile(raw).iter_batches():
                yield from batch.to_pylist()
        except pyarrow.ArrowException as e:
            raise UserError(f"{file} is not a whole Parquet file: {first_line(e)}") from None


def _csv(file: str, text: TextIO, delimiter: str) -> Iterator[Entry]:
    """Yield the rows of a table as texts: pandas, and so datasets, would make a number of 42 and a null of N/A."""
    csv.field_size_limit(2**31 - 1)  # 131,072 characters by default
    rows = csv.DictReader(text, delimiter=delimiter, strict=True)
    try:
        for number, row in enumerate(rows, 1):
            yield file, f"record {number}", row, "more columns than the first line has" if None in row else ""
    except csv.Error as e:
        raise UserError(f"{file}, line {rows.line_num}: malformed table, {e}") from None


def _json(file: str, text: TextIO) -> Iterator[Entry]:
    """Yield the entries of JSON or JSON Lines: the first line shows which it is, or the name if that is malformed."""
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
        what = f"a JSON {type(data).__name__}, not a list of records or an object with one such list"
        raise UserError(f"{file} holds {what}: wrap the records in [ ]")
    yield from _numbered(file, records)


def _list_in(data) -> list | None:
    """Return a JSON value if it is a list, or the only list of objects in an object that is not itself a record."""
    if not isinstance(data, dict) or data.keys() & {"instruction", "prompt", *CONVERSATIONS}:
        return data if isinstance(data, list) else None
    lists = [v for v in data.values() if isinstance(v, list) and v and all(isinstance(one, dict) for one in v)]
    return lists[0] if len(lists) == 1 else None


def _parsed(text: str, whole: bool = False) -> tuple[Any, str]:
    """Return the value of JSON, and "" or its fault; that of a whole file begins with the line."""
    try:
        return json.loads(text), ""
    except json.JSONDecodeError as e:
        return None, (f"line {e.lineno}: " if whole else "") + f"malformed JSON, {e.msg} at column {e.colno}"
    except RecursionError:
        return None, "malformed JSON, nested too deeply"
    except ValueError:
        return None, "malformed JSON, a number with too many digits"  # than 4,300


def jload(path: str | os.PathLike) -> list:
    """Return everything that a path stands for, as it is.

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
# Shapes: entries → records in Alpaca's fields.


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

    A conversation of one turn is a record, with its system text before the instruction. Other conversations, and those
    with tools or images, are dropped and counted.

    Args:
        path: see sources().
        fields: our fields by their names there, for records of no known shape: "instruction=question,output=answer".
        say: gets one line at the end, unless all were in Alpaca's format: what was recognized, and what was dropped.
        answers: whether records need the texts "input" (a null or missing one becomes "") and "output". One without an
            answer is dropped, but in Alpaca's format an empty text is an answer, and none at all is a fault.
        on_fault: gets the file, number and fault of a malformed record; by default it raises.

    Raises:
        UserError: see read_entries; also no record at all, a name in ``fields`` that no record has, and faults.
    """
    names, shapes, dropped, there, seen = _field_map(fields), Counter(), {}, {}, False
    for file, place, entry, fault in read_entries(path):
        try:
            if fault:
                raise UserError(fault)
            shape, record = _in_our_fields(entry, names)
            if answers and isinstance(record, dict):
                record = _with_answer(record, shape == ALPACA)
        except UserError as e:
            seen = True
            on_fault(f"{file}, {place}: {e}")
            continue
        shapes[shape] += 1
        there |= entry if names else {}
        if isinstance(record, dict):
            seen = True
            yield f"{file}, {place}", record
        else:
            where = "" if file == str(path) else f"{Path(file).name} "
            dropped.setdefault(record, []).append(where + place.split()[1])
    if unknown := ", ".join(sorted(set(names.values()) - there.keys() - set(FIELDS))) if there else "":
        raise UserError(f"{path} has no field {unknown}: its fields are {shorten(', '.join(there), 200)}")
    found = ", ".join(f"{counted(count, 'record')} in {shape}" for shape, count in shapes.items())
    for why, numbers in dropped.items():
        found += f"; {len(numbers):,} {why} dropped: {', '.join(numbers[:10])}" + ", …" * (len(numbers) > 10)
    if not seen:
        raise UserError(f"{path}: {found}" if found else f"{path} holds no records: choose a file with at least one")
    if dropped or shapes.keys() - {ALPACA}:
        say(f"{path}: {found}")


def _with_answer(record: dict, is_alpaca: bool) -> dict | str:
    """Return a record with a text as input, or why it is dropped."""
    input, output = text_of(record, "input"), text_of(record, "output")
    if is_alpaca and output is None:
        raise UserError('no "output" field with a text')
    if not (is_alpaca or (output or "").strip()):
        return "without an answer"
    return record | {"input": ""} if input is None else record


def _field_map(text: str | None) -> dict[str, str]:
    """Return "instruction=question,output=answer" as a dictionary with all of our fields; {} for no text."""
    given = dict(part.strip().partition("=")[::2] for part in (text or "").split(",") if part.strip())
    if not all(ours in FIELDS and theirs for ours, theirs in given.items()):
        raise UserError(f"fields are given as in instruction=question,input=context,output=answer, not {text!r}")
    return {field: field for field in FIELDS} | given if given else {}


def _in_our_fields(entry, names: dict[str, str]) -> tuple[str, dict | str]:
    """Return an entry's shape, and the entry in Alpaca's fields, or why it is dropped."""
    if not isinstance(entry, dict):
        raise UserError(f"a {type(entry).__name__} where an object was expected")
    shape, theirs = "the given fields", names
    if not names:
        is_dolly = "output" not in entry and ("response" in entry or "context" in entry)
        shape = (DOLLY if is_dolly else ALPACA) if entry.get("instruction") is not None else PROMPTS
        theirs = THEIRS.get(shape, {})
    for field in CONVERSATIONS if shape == PROMPTS else ():
        if isinstance(turns := entry.get(field), list):
            if isinstance(system := entry.get("system"), str):
                turns = [{"role": "system", "content": system}, *turns]
            made = _single_turn(turns)
            if isinstance(made, dict):
                made |= {name: value for name, value in entry.items() if name not in (*FIELDS, field, "system")}
            return CONVERSATIONS[field], made
    record = _renamed(entry, theirs) if theirs else entry
    if not isinstance(record.get("instruction"), str):
        name, others = names.get("instruction", "instruction"), shorten(", ".join(entry), 200)
        hint = "name them as in instruction=question,output=answer"
        raise UserError(f'no text "{name}" among its fields ({others}): {hint}')
    return shape, record


def _renamed(entry: dict, names: dict[str, str]) -> dict:
    """Return an entry with Alpaca's names for its fields, and "input", then its other fields."""
    ours = {field: entry.get(names.get(field, field), entry.get(field)) for field in FIELDS}
    ours = {field: value for field, value in (ours | {"input": ours["input"] or ""}).items() if value is not None}
    return ours | {name: value for name, value in entry.items() if name not in (*FIELDS, *names.values())}


def _single_turn(turns: list) -> dict | str:
    """Return a conversation of one turn in Alpaca's fields, or why it is none."""
    texts: dict[str, str] = {}
    for turn in turns:
        if not isinstance(turn, dict):
            return "with a malformed turn"
        said, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if turn.get("tool_calls") or (role := ROLES.get(str(said))) == "tool":
            return "with tool calls"
        if isinstance(content, list):  # OpenAI's parts
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(parts) if all(isinstance(part, str) for part in parts) else content
        if not isinstance(content, str | None):
            return "with images or other parts that are not text"
        if role is None:
            return f"with the unknown role {shorten(repr(said), 20)}"
        if role == "assistant" and "user" not in texts:
            return "that begin with the assistant"
        if texts and (role in texts or role == "system" or "assistant" in texts):
            return "of several turns"
        texts[role] = content or ""
    if not texts.get("user", "").strip():
        return "without a question"
    instruction = "\n\n".join(filter(None, (texts.get("system"), texts["user"])))
    return {"instruction": instruction, "input": ""} | ({"output": texts["assistant"]} if "assistant" in texts else {})


def text_of(record: dict, field: str) -> str | None:
    """Return a field's text, or None if it is null or missing; UserError if it is something else."""
    value = record.get(field)
    if not isinstance(value, str | None):
        raise UserError(f'"{field}" must be a text')
    return value


def task_of(record: dict) -> tuple[str, str]:
    """Return a record's instruction and input ("" for none); Self-Instruct's tasks have theirs in "instances".

    Raises:
        UserError: something else than a text, an instruction that is blank, or several instances.
    """
    instruction, input = text_of(record, "instruction"), text_of(record, "input")
    if not (instruction or "").strip():
        raise UserError('needs a text "instruction"')
    if input is None and record.get("instances") is not None:
        instances = record["instances"]
        if not isinstance(instances, list) or len(instances) != 1 or not isinstance(instances[0], dict):
            raise UserError('"instances" must be a list of one object: make a record of each')
        input = text_of(instances[0], "input")
    return instruction, input or ""


def task_key(record: dict) -> tuple[str, ...]:
    """Return a key that is equal for records that ask the same, ignoring case and white space.

    A conversation asks with all that precedes its last answer.
    """
    texts, messages = [record["instruction"], record["input"]], record.get("messages") or []
    if answers := [i for i, message in enumerate(messages) if message["role"] == "assistant"]:
        texts = [message["content"] for message in messages[: answers[-1]]]
    return tuple(" ".join(text.split()).casefold() for text in texts)


def load_records(
    path: str | os.PathLike, fields: str | None = None, say: Callable[[str], object] = print
) -> list[dict]:
    """Return records with the texts "instruction", "input" and "output"; see read_records."""
    return [record for _, record in read_records(path, fields, say, answers=True)]


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


# ---------------------------------------------------------------------------------------------------------------------
# Writing.


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
