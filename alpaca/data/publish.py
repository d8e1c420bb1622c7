"""A data set as a folder that others can load: Parquet and JSON Lines, a card (README.md), and the way to the hub.

The card's header names the Parquet files, so ``datasets.load_dataset`` reads each record once. So does our own reader,
which takes the files of a folder that are named "train", if any are: the JSON Lines have other names.
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
from markupsafe import Markup
from tqdm import tqdm

from alpaca import UserError
from alpaca.chat_template import messages_of
from alpaca.common.files import read_text
from alpaca.common.records import FIELDS, is_on_hub, json_text, read_records, sources
from alpaca.common.text import check_utf8, first_line, markdown_templates, public_name
from alpaca.data.lint.classes import task_key
from alpaca.data.plots_page import TEMPLATES

FILES = {"train": ("data/train.parquet", "jsonl/records.jsonl"), "test": ("data/test.parquet", "jsonl/test.jsonl")}
ROWS_AT_ONCE = 5000  # also a row group, which the hub's viewer reads whole
OURS = ("id", *FIELDS, "messages", "source")  # the first columns; then what the records have besides
KINDS = {str: pyarrow.string(), bool: pyarrow.bool_(), int: pyarrow.int64(), float: pyarrow.float64()}
SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B")  # of the hub's size categories
OPEN = "To be answered by the publisher."


# ---------------------------------------------------------------------------------------------------------------------
# Records.


def read(path: str, fields: str | None) -> list[dict]:
    """Return the records of a path; of several files each with its "source", unless it has one already."""
    names, records = _names(path), []
    for place, record in read_records(path, fields, answers=True):
        check_utf8(json.dumps(record, ensure_ascii=False), place)
        source = {"source": names[place.rpartition(", ")[0]]} if len(names) > 1 else {}
        records.append(source | record)
    return records


def _names(path: str) -> dict[str, str]:
    """Return each file's name to publish: as much of its path as sets it apart, and no folder of this machine."""
    local = {file: os.path.realpath(file) for file in sources(path) if not is_on_hub(file)}
    shared = os.path.commonpath([os.path.dirname(place) for place in local.values()]) if local else ""
    return {
        file: Path(os.path.relpath(local[file], shared)).as_posix() if file in local else file for file in sources(path)
    }


def facts_of_files(path: str) -> list[dict]:
    """Return the name of each source, and of a file its bytes and SHA-256."""
    facts = []
    for file, name in _names(path).items():
        facts.append({"name": name, "bytes": None, "sha256": None})
        if os.path.isfile(file):
            with open(file, "rb") as opened:
                facts[-1] |= {
                    "bytes": os.path.getsize(file),
                    "sha256": hashlib.file_digest(opened, "sha256").hexdigest(),
                }
    return facts


def give_ids(records: list[dict]) -> bool:
    """Give each record a text "id" that stays when others come or go: the start of its conversation's SHA-256.

    If the records have ids already, and all differ, these stay; else they become "original_id".

    Returns:
        Whether the ids are the records' own.
    """
    own = [record.get("id") for record in records]
    keep = all(isinstance(one, str | int) for one in own) and len({str(one) for one in own}) == len(own)
    seen: Counter[str] = Counter()
    for record in records:
        if keep:
            record["id"] = str(record["id"])
            continue
        if (given := record.pop("id", None)) is not None:
            record["original_id"] = given
        digest = hashlib.sha256(json_text(messages_of(record)).encode()).hexdigest()[:16]
        seen[digest] += 1
        record["id"] = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    return keep


def split(records: list[dict], fraction: float) -> tuple[list[dict], list[dict]]:
    """Return (train, test): a hash of instruction and input decides, so copies of a task are on the same side.

    A task also stays on its side when the data grows. The test gets about the fraction, not exactly.
    """
    sides: tuple[list[dict], list[dict]] = [], []
    for record in records:
        digest = hashlib.sha256(json.dumps(task_key(record)).encode()).digest()
        sides[int.from_bytes(digest[:8], "big") < fraction * 2**64].append(record)
    return sides


# ---------------------------------------------------------------------------------------------------------------------
# Files.


def columns(records: list[dict]) -> pyarrow.Schema:
    """Return the columns' types. A field of several types, or of lists and objects, becomes a column of JSON text."""
    kinds: dict[str, set] = {}
    for record in records:
        for name, value in record.items():
            whole = isinstance(value, int) and not -(2**63) <= value < 2**63
            kinds.setdefault(name, set()).update(() if value is None else (dict if whole else type(value),))
    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    types = dict.fromkeys(OURS[:-1], pyarrow.string()) | {"messages": pyarrow.list_(message)}
    types |= {"source": pyarrow.string()} if "source" in kinds else {}
    for name, found in kinds.items():
        kind = float if found == {int, float} else found.pop() if len(found) == 1 else str
        types.setdefault(name, KINDS.get(kind, pyarrow.string()))
    return pyarrow.schema(list(types.items()))


def _row(record: dict, schema: pyarrow.Schema) -> dict:
    row = {name: record.get(name) for name in schema.names} | {"messages": messages_of(record)}
    for field in schema:
        if field.type == pyarrow.string() and not isinstance(row[field.name], str | None):
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
            tqdm(total=len(records), desc=name, unit="record", disable=None) as bar,
        ):
            for start in range(0, len(records), ROWS_AT_ONCE):
                rows = [_row(record, schema) for record in records[start : start + ROWS_AT_ONCE]]
                table.write_table(pyarrow.Table.from_pylist(rows, schema))
                lines.writelines(json_text(row) + "\n" for row in rows)
                bar.update(len(rows))


# ---------------------------------------------------------------------------------------------------------------------
# The card.


def read_report(path: str) -> dict:
    """Return what the generator has written about its run."""
    try:
        report = json.loads(read_text(path))
    except ValueError:
        report = None
    if not isinstance(report, dict) or not {"model_name", "parsed", "kept", "dropped"} <= report.keys():
        raise UserError(f"{path} is not a report.json of generate_instruction.py: give the one beside regen.json")
    return report | {"model_name": public_name(str(report["model_name"]))}


def card(
    splits: dict[str, list[dict]],
    schema: pyarrow.Schema,
    license: str,
    languages: list[str],
    findings: list[dict],
    **facts,
) -> str:
    """Return the card in Markdown, with the header that the hub and ``datasets`` read.

    Args:
        splits, schema: what ``write`` writes.
        license, languages: as the hub names them.
        findings: lint's, of all records.
        facts: what templates/dataset_card.md needs besides.
    """
    count = sum(map(len, splits.values()))
    files = [{"split": name, "path": FILES[name][0]} for name in splits]
    header = huggingface_hub.DatasetCardData(
        pretty_name=facts["name"],
        license=license,
        language=languages or None,
        task_categories=["text-generation"],
        size_categories=["{}<n<{}".format(*SIZES[len(str(count)) - 4 :]) if count >= 1000 else "n<1K"],
        tags=["instruction-following", "alpaca"],
        configs=[{"config_name": "default", "data_files": files}],
    )
    return (
        markdown_templates(TEMPLATES)
        .get_template("dataset_card.md")
        .render(
            facts,
            header=Markup(header.to_yaml()),
            splits={name: len(records) for name, records in splits.items()},
            files=FILES,
            count=count,
            license=license,
            languages=languages,
            columns=schema.names,
            others=[field for field in schema if field.name not in OURS],
            several_turns=sum(len(messages_of(record)) > 2 for records in splits.values() for record in records),
            shared=len({*map(task_key, splits["train"])} & {*map(task_key, splits.get("test", []))}),
            findings=Counter((finding["class"], finding["reason"]) for finding in findings).most_common(),
            faulty=len({finding["record"] for finding in findings}),
            open=Markup(f"*{OPEN}*"),
        )
    )


# ---------------------------------------------------------------------------------------------------------------------
# The hub.


def check_hub(repo: str) -> None:
    """Raise UserError if an upload to ``repo`` cannot succeed, as far as this can be known without a request."""
    try:
        huggingface_hub.utils.validate_repo_id(repo)
    except ValueError as e:
        raise UserError(f"{repo!r} is not a name on the hub, OWNER/NAME: {first_line(e)}") from None
    if huggingface_hub.is_offline_mode():
        raise UserError("the hub cannot be reached in offline mode: unset HF_HUB_OFFLINE")
    if not huggingface_hub.get_token():
        raise UserError("the hub needs a token that may write: run hf auth login, or set HF_TOKEN")


def upload(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder to a data set on the hub, made if it does not exist; return its address."""
    try:
        api = huggingface_hub.HfApi()
        address = api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, repo_type="dataset", folder_path=folder, commit_message="Publish the data")
    except Exception as e:  # of the network, and of the hub's client
        why = getattr(e, "server_message", None) or first_line(e)
        again = f"hf upload {repo} {folder} --repo-type dataset"
        raise UserError(f"{folder} is complete, but the upload failed: {why}. To upload it: {again}") from None
    return str(address)
