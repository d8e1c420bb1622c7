"""Instruction sets that models are judged on, and files of answers to them, in the common formats.

Light: importing this loads neither torch nor an API client.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from alpaca import UserError
from alpaca.chat_template import asked_of
from alpaca.common.files import git_blob_id
from alpaca.common.records import jload, read_records
from alpaca.common.shapes import INPUT_HEADING, has_several_turns, task_of, text_of
from alpaca.common.text import check_utf8, counted, shorten

# The 252 user-oriented instructions of Self-Instruct, on which Alpaca was judged.
THE_252 = "user_oriented_instructions.jsonl"
THE_252_BLOB = "ed6d5d986e3f4c65ff64d70328a2e1dab146f914"  # git hash-object
THE_252_URL = f"https://raw.githubusercontent.com/yizhongw/self-instruct/main/human_eval/{THE_252}"


@dataclass(frozen=True)
class Item:
    """One instruction to answer.

    Attributes:
        id: unique in its set.
        instruction: the text as in the file; for a conversation of several turns, all of it.
        input: what the instruction is about; may be "".
        reference: a known good answer, or None.
        category: the set's own grouping (motivation_app, dataset); "" if it has none.
        messages: for a conversation that instruction and input cannot hold, what to send: {"role", "content"}, the
            question last.
    """

    id: str
    instruction: str
    input: str
    reference: str | None
    category: str
    messages: list[dict] | None = field(default=None, compare=False)

    @property
    def task(self) -> str:
        """Instruction and input as one text, the input under its heading: what chat models and judges see.

        The chat template of a model trained by train.py turns it into the training prompt (alpaca/prompts.py).
        """
        return self.instruction + (INPUT_HEADING + self.input if self.input else "")

    def row(self, output_path: str | os.PathLike) -> dict:
        """Return the first fields of this item's row in a file of answers; for ``.json``, alpaca_eval's columns.

        alpaca_eval shows its judge the instruction alone, so there it contains the whole task.
        """
        if Path(output_path).suffix == ".json":
            return {"id": self.id, "dataset": self.category, "instruction": self.task}
        return {"id": self.id, "instruction": self.instruction, "input": self.input}


@dataclass(frozen=True)
class Answers:
    """A model's answers to a set.

    Attributes:
        generator: the model's name.
        outputs: item id → answer, stripped of white space; "" for an empty answer.
        unanswered: ids of the items without an answer, in the set's order.
        rows: item id → the whole row of the file.
    """

    generator: str
    outputs: dict[str, str]
    unanswered: list[str]
    rows: dict[str, dict] = field(repr=False)


def is_the_252(path: str | os.PathLike) -> bool:
    """Return whether a file is Self-Instruct's 252 instructions, byte for byte."""
    return os.path.isfile(path) and git_blob_id(path) == THE_252_BLOB


def read_set(path: str | os.PathLike, fields: str | None = None) -> list[Item]:
    """Read an instruction set.

    - Self-Instruct: {"id", "instruction", "instances": [{"input", "output"}], "motivation_app"}. Each instance is an
      item; the id of the second is "ID#2".
    - AlpacaEval: {"instruction", "output", "dataset"}.
    - Alpaca: {"instruction", "input", "output"}, and all that read_records turns into it.

    The output is the reference, unless it is blank. Records without an id are numbered from 1. If a file looks like the
    252 but differs from them, a note on stderr says so.

    Raises:
        UserError: a file is missing, malformed or empty; a record is malformed, or an id repeated.
    """
    path = Path(path)
    if not path.exists() and path.name == THE_252:
        raise UserError(
            f"{path} does not exist; get Self-Instruct's with "
            f"python analyze_data.py fetch --url {THE_252_URL} --blob_id {THE_252_BLOB} --output_path {path}"
        )
    items: dict[str, Item] = {}
    from_self_instruct = False
    for number, (place, record) in enumerate(read_records(path, fields), 1):
        try:
            found = _items(record, number)
        except UserError as e:
            raise UserError(f"{place}: {e}") from None
        from_self_instruct = from_self_instruct or bool(record.get("motivation_app"))
        for item in found:
            check_utf8(f"{item.id}{item.category}{item.task}{item.reference}", place)
            if item.id in items:
                raise UserError(f"{path} has the id {item.id!r} twice: give each record its own id, or remove all ids")
            items[item.id] = item
    if from_self_instruct and path.is_file() and not is_the_252(path):
        print(
            f"note: {path} is not Self-Instruct's published set of 252 "
            f"({counted(len(items), 'instruction')}, git blob {git_blob_id(path)[:12]}, not {THE_252_BLOB[:12]}): "
            "do not compare results with published ones",
            file=sys.stderr,
        )
    return list(items.values())


def read_answers(path: str | os.PathLike, items: list[Item]) -> Answers:
    """Read a model's answers to a set, in any order.

    A row has the instruction that it answers, as "instruction" and "input" or as one text (Item.task), and the answer
    as "output" or "response" (Self-Instruct's predictions). It belongs to the item with the same texts, ignoring white
    space around them; if there are several, to the one with the row's "id", else to the first without an answer. The
    model's name is "generator", else the file's name. A row with a missing or null answer counts as unanswered.

    Raises:
        UserError: a file is missing, malformed or without answers; rows of another set, of one item, or several models.
    """
    path = Path(path)
    places: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        for texts in {(item.instruction.strip(), item.input.strip()), (item.task.strip(), "")}:
            places.setdefault(texts, []).append(item)
    outputs: dict[str, str] = {}
    rows: dict[str, dict] = {}
    names: dict[str, None] = {}
    for number, row in enumerate(jload(path), 1):
        place = f"{path}, record {number}"
        try:
            if not isinstance(row, dict):
                raise UserError(f"a JSON {type(row).__name__}, not an object")
            instruction, input = task_of(row)
            if has_several_turns(row):
                instruction, input = as_text(asked_of(row)), ""
            answer = text_of(row, "output" if "output" in row else "response")
        except UserError as e:
            raise UserError(f"{place}: {e}") from None
        check_utf8(f"{instruction}{input}{answer}", place)
        name = row.get("generator")
        if name is not None and not is_name(name):
            raise UserError(f'{place}: "generator" must be a name in one line')
        same = places.get((instruction.strip(), input.strip()), [])
        if not same:
            raise UserError(f"{place} answers another set, {shorten(instruction)!r}: give the set that it answers")
        named = [item for item in same if item.id == str(row.get("id"))]
        free = [item for item in named or same if item.id not in rows]
        if not free:
            raise UserError(f"{place} answers {shorten(instruction)!r} again: keep one answer to each instruction")
        if name:
            names[name] = None
        rows[free[0].id] = row
        if answer is not None:
            outputs[free[0].id] = answer.strip()
    if not outputs:
        raise UserError(f"{path} has no answers: choose another file")
    if len(names) > 1:
        raise UserError(f"{path} has answers of {len(names)} models ({', '.join(names)}): give each its own file")
    name = re.sub(r"\.(json|ndjson|csv|tsv|parquet).*", "", path.name).removesuffix("_predictions")
    generator = next(iter(names), name)
    return Answers(generator, outputs, [item.id for item in items if item.id not in outputs], rows)


def read_pair(
    instructions: str | os.PathLike, answers: str, fields: str | None = None
) -> tuple[list[Item], list[Answers]]:
    """Read the set and two models' answers to it; print how many instructions each left unanswered.

    Raises:
        UserError: not two files, or both of one model.
    """
    items, paths = read_set(instructions, fields), [path.strip() for path in answers.split(",")]
    if len(paths) != 2:
        raise UserError(f"answers must be two files, not {len(paths)}: give A.jsonl,B.jsonl")
    pair = [read_answers(path, items) for path in paths]
    if pair[0].generator == pair[1].generator:
        raise UserError(
            f'both files have answers of {pair[0].generator!r}: change the name ("generator") in the rows of one'
        )
    for one in pair:
        if one.unanswered:
            print(f"note: {one.generator} has no answer to {len(one.unanswered):,} of {len(items):,} instructions")
    return items, pair


def _items(record: dict, number: int) -> list[Item]:
    """Return the item of a record, or one for each of a Self-Instruct task's instances."""
    category = text_of(record, "motivation_app") or text_of(record, "dataset") or ""
    id, instances = record.get("id"), record.get("instances")  # null in a table without them
    id, instances = number if id is None else id, [record] if instances is None else instances
    if not isinstance(id, str | int):
        raise UserError('"id" must be text or a whole number')
    if not isinstance(instances, list) or not instances or not all(isinstance(one, dict) for one in instances):
        raise UserError('"instances" must be a list with at least one object')
    if record.get("messages"):
        messages = asked_of(record)
        texts = (as_text(messages), "") if has_several_turns(record) else task_of(record)
        reference = "".join(answer["content"] for answer in record["messages"][len(messages) :])
        return [Item(str(id), *texts, reference if reference.strip() else None, category, messages)]
    items = []
    for n, one in enumerate(instances, 1):
        texts, name = task_of(record | {"input": one.get("input") or ""}), f"{id}#{n}" if n > 1 else str(id)
        reference = text_of(one, "output") or ""
        items.append(Item(name, *texts, reference if reference.strip() else None, category))
    return items


def as_text(messages: list[dict]) -> str:
    """Return a conversation as judges see it: each message after "User: ", "Assistant: " or "System: "."""
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def is_name(name) -> bool:
    """Return whether this can be the name of a model or a judge: printable text in one line."""
    return isinstance(name, str) and bool(name.strip()) and name.isprintable()
