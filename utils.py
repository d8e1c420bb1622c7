"""What the scripts share: prompt templates, and JSON in and out.

Light on purpose: importing this loads neither torch nor an API client.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from alpaca import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Prompt templates. Models in the wild were trained on these bytes: they do not change.

PROMPT_DICT = {
    "prompt_input": (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    ),
    "prompt_no_input": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    ),
}


def format_prompt(instruction: str, input: str = "") -> str:
    """The one place where a prompt is written: training, chat, judge and the recover smoke test all call it.

    The template without an input is taken when ``input`` is empty, as the original does.
    """
    if input:
        return PROMPT_DICT["prompt_input"].format_map({"instruction": instruction, "input": input})
    return PROMPT_DICT["prompt_no_input"].format_map({"instruction": instruction})


# ---------------------------------------------------------------------------------------------------------------------
# JSON in and out.

LIST_HINT = " (a JSON list? let its name end in .json)"


def read_text(path: str | os.PathLike) -> str:
    """A UTF-8 file's text, without a byte order mark; UserError when it is missing, unreadable or not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}): convert it to UTF-8") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None


def jload(path: str | os.PathLike) -> list:
    """Reads a JSON list, or JSON Lines when the name ends in ``.jsonl``.

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
    """Whether what should be a file of one object a line begins as a JSON list does."""
    return first_line and isinstance(text, str) and text.lstrip().startswith("[")


def json_fault(e: ValueError | RecursionError) -> str:
    """What json.loads did not like, without the advice that it gives to programmers."""
    if isinstance(e, json.JSONDecodeError):
        return f"{e.msg} at column {e.colno}"
    return "nested too deeply" if isinstance(e, RecursionError) else "a number with too many digits"  # than 4,300


def jdump(obj, path: str | os.PathLike, indent: int = 4) -> None:
    """Writes JSON through a temporary file and a rename, so that readers see the old file or the new one, whole."""
    with replace_file(path) as file:
        file.write(json_text(obj, indent) + "\n")


def json_text(obj, indent: int | None = None) -> str:
    """JSON that UTF-8 can hold: half of a surrogate pair, which JSON can spell and UTF-8 cannot, makes it all ASCII."""
    text = json.dumps(obj, indent=indent, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(obj, indent=indent)
    return text


@contextmanager
def replace_file(path: str | os.PathLike, mode: str = "w"):
    """Opens a temporary file beside ``path``; on success it is fsynced and renamed to ``path``, else removed.

    ``mode`` is "w" for UTF-8 text or "wb" for bytes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(fd, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes 0600 files; others may read what we publish
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_records(path: str | os.PathLike) -> list[dict]:
    """Reads Alpaca-format records: ``{"instruction": str, "input": str, "output": str}`` (other fields are kept).

    Raises:
        UserError: see jload; also an empty data set, or a record without the three text fields (with its number).
    """
    records = jload(path)
    if not records:
        raise UserError(f"{path} holds no records: give a file with at least one")
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


def load_seed_tasks(path: str) -> list[dict]:
    """Reads seed tasks, one JSON object a line: ``{"instruction": str, "instances": [{"input": str, "output": str}]}``.

    Raises:
        UserError: see jload; also no task at all, or one without these texts (with its number).
    """
    tasks = jload(path)
    if not tasks:
        raise UserError(f"{path} holds no seed tasks: give a file with at least one")
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
