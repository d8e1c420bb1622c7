"""A dataset as a folder that others can load: Parquet and JSON Lines, a card (README.md), and its upload to the hub.

The card's header names the Parquet files, so ``datasets.load_dataset`` reads each record once. So does our own reader,
which reads only the files named "train" in a folder, if there are any: the JSON Lines have other names.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import huggingface_hub
import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from alpaca import UserError
from alpaca.chat_template import messages_of
from alpaca.common.files import read_text
from alpaca.common.records import FIELDS, is_on_hub, json_text, read_records, sources
from alpaca.common.shapes import has_several_turns, task_key
from alpaca.common.text import check_utf8, first_line, public_name, templates

FILES = {"train": ("data/train.parquet", "jsonl/records.jsonl"), "test": ("data/test.parquet", "jsonl/test.jsonl")}
ROWS_AT_ONCE = 5000  # also a row group, which the hub's viewer reads whole
TEXT = pyarrow.string()
KINDS = {bool: pyarrow.bool_(), int: pyarrow.int64(), float: pyarrow.float64()}
SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B")  # of the hub's size categories
OPEN = "To be answered by the publisher."


def names(path: str) -> dict[str, str]:
    """Return each source with its public name: for a file, as much of its path as sets it apart from the others."""
    local = {file: os.path.abspath(file) for file in sources(path) if not is_on_hub(file)}
    shared = os.path.commonpath([os.path.dirname(place) for place in local.values()]) if local else ""
    named = {file: Path(os.path.relpath(place, shared)).as_posix() for file, place in local.items()}
    return {file: named.get(file, file) for file in sources(path)}


def read(path: str, fields: str | None) -> list[dict]:
    """Return the records of a path; with several files each gets its "source", unless it has one."""
    named, records = names(path), []
    for place, record in read_records(path, fields, answers=True):
        check_utf8(json.dumps(record, ensure_ascii=False), place)
        source = {"source": named[place.rpartition(", ")[0]]} if len(named) > 1 else {}
        records.append(source | record)
    return records


def give_ids(records: list[dict]) -> None:
    """Give each record an "id" that does not depend on the others: the start of its conversation's SHA-256.

    The n-th copy of a conversation ends in "-n". A record's own id, if different, becomes its "original_id".
    """
    seen: Counter[str] = Counter()
    for record in records:
        digest = hashlib.sha256(json_text(messages_of(record)).encode()).hexdigest()[:16]
        seen[digest] += 1
        made = f"{digest}-{seen[digest]}" if seen[digest] > 1 else digest
        if (own := record.get("id")) not in (None, made):
            record["original_id"] = own
        record["id"] = made


def split(records: list[dict], fraction: float) -> tuple[list[dict], list[dict]]:
    """Return (train, test): a hash of instruction and input decides, so copies of a task are on the same side.

    A task also stays on its side when the data grows. The test gets about this fraction, not exactly.
    """
    sides: tuple[list[dict], list[dict]] = [], []
    for record in records:
        digest = hashlib.sha256(json.dumps(task_key(record)).encode()).digest()
        sides[int.from_bytes(digest[:8], "big") < fraction * 2**64].append(record)
    return sides


def columns(records: list[dict]) -> pyarrow.Schema:
    """Return the columns' types. A field with mixed types, lists or objects becomes a column of JSON text."""
    kinds: dict[str, set] = {name: {str} for name in ("id", *FIELDS, "messages")}
    parts = {"role": TEXT, "content": TEXT}
    for record in records:
        for name, value in record.items():
            large = isinstance(value, int) and not -(2**63) <= value < 2**63
            kinds.setdefault(name, set()).update([] if value is None else [str if large else type(value)])
        if any("weight" in message for message in record.get("messages") or ()):
            parts["weight"] = pyarrow.int64()
    types = {}
    for name, found in kinds.items():
        found = {float} if found == {int, float} else found
        types[name] = KINDS.get(found.pop(), TEXT) if len(found) == 1 else TEXT
    message = pyarrow.struct(list(parts.items()))
    return pyarrow.schema(list((types | {"messages": pyarrow.list_(message)}).items()))


def _row(record: dict, schema: pyarrow.Schema) -> dict:
    row = {name: record.get(name) for name in schema.names} | {"messages": messages_of(record)}
    for field in schema:
        if field.type == TEXT and not isinstance(row[field.name], str | None):
            row[field.name] = json_text(row[field.name])
    return row


def write(folder: Path, splits: dict[str, list[dict]], schema: pyarrow.Schema) -> None:
    """Write each split's rows as Parquet and as JSON Lines, a few thousand at a time."""
    for name, records in splits.items():
        table_path, lines_path = (folder / file for file in FILES[name])
        for path in (table_path, lines_path):
            path.parent.mkdir(exist_ok=True)
        with (
            pyarrow.parquet.ParquetWriter(table_path, schema) as table,
            open(lines_path, "w", encoding="utf-8", newline="\n") as lines,
        ):
            for start in tqdm(range(0, len(records), ROWS_AT_ONCE), desc=name, unit="block", disable=None):
                rows = [_row(record, schema) for record in records[start : start + ROWS_AT_ONCE]]
                table.write_table(pyarrow.Table.from_pylist(rows, schema))
                lines.writelines(json_text(row) + "\n" for row in rows)


def read_report(path: str) -> dict:
    """Return the generator's report of its run, with a public name for the teacher."""
    try:
        report = json.loads(read_text(path))
        report["parsed"] + report["kept"] + sum(report["dropped"].values())
        return report | {"model_name": public_name(report["model_name"])}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{path} is not a report.json of generate_instruction.py: choose another file") from None


def card(splits: dict[str, list[dict]], schema: pyarrow.Schema, paths: list[str], findings: list[dict], **facts) -> str:
    """Return the card in Markdown, with the header that the hub and ``datasets`` read.

    ``findings`` are lint's for all records from ``paths``; ``facts`` is what else templates/dataset_card.md needs.
    """
    files = []
    for file, name in [named for path in paths for named in names(path).items()]:
        sha256 = hashlib.sha256(Path(file).read_bytes()).hexdigest() if os.path.isfile(file) else None
        files.append({"name": name, "sha256": sha256})
    count = sum(map(len, splits.values()))
    return (
        templates(Path(__file__).with_name("templates"))
        .get_template("dataset_card.md")
        .render(
            facts,
            splits={name: (len(records), *FILES[name]) for name, records in splits.items()},
            count=count,
            size="{}<n<{}".format(*SIZES[len(str(count)) - 4 :]) if count >= 1000 else "n<1K",
            fields=schema,
            files=files,
            several_turns=sum(has_several_turns(record) for records in splits.values() for record in records),
            shared=len({*map(task_key, splits["train"])} & {*map(task_key, splits.get("test", []))}),
            findings=Counter((finding["class"], finding["reason"]) for finding in findings).most_common(),
            faulty=len({finding["record"] for finding in findings}),
            open=OPEN,
        )
    )


def upload(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder to a hub dataset, created if it does not exist; return its address."""
    try:
        api = huggingface_hub.HfApi()
        address = api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, repo_type="dataset", folder_path=folder, commit_message="Publish the data")
    except Exception as e:  # of the network, and of the hub's client
        why = getattr(e, "server_message", None) or first_line(e)
        again = "" if huggingface_hub.get_token() else "run hf auth login, then "
        again += f"hf upload {repo} {folder} --repo-type dataset"
        raise UserError(f"{folder} is complete, but its upload failed ({why}): to upload it, {again}") from None
    return str(address)
