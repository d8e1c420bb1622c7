"""Instruction sets that models are judged on, and files of answers to them, in the formats that people have.

Light: importing this loads neither torch nor an API client.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from alpaca import UserError
from alpaca.common.files import git_blob_id
from alpaca.common.records import jload
from alpaca.prompts import INPUT_HEADING

# The 252 user-oriented instructions of Self-Instruct, on which Alpaca was judged.
THE_252 = "user_oriented_instructions.jsonl"
THE_252_BLOB = "ed6d5d986e3f4c65ff64d70328a2e1dab146f914"  # git hash-object
THE_252_URL = f"https://raw.githubusercontent.com/yizhongw/self-instruct/main/human_eval/{THE_252}"


@dataclass(frozen=True)
class Item:
    """One instruction to answer.

    Attributes:
        id: unique in its set.
        instruction: the text as it stands in the file.
        input: what it is about; may be "".
        reference: an answer that is known to be good, or None.
        category: the set's own grouping (motivation_app, dataset); "" if it has none.
    """

    id: str
    instruction: str
    input: str
    reference: str | None
    category: str

    @property
    def task(self) -> str:
        """Instruction and input as one text, the input under its heading: what a chat model is asked, and judges see.

        A model that train.py has made gets training's prompt from it, through its chat template (alpaca/prompts.py).
        """
        return self.instruction + (INPUT_HEADING + self.input if self.input else "")

    def row(self, output_path: str | os.PathLike) -> dict:
        """What the row of its answer begins with; where that goes to ``.json``, in alpaca_eval's columns.

        alpaca_eval shows its judge the instruction alone, so the whole task has to be in it.
        """
        if Path(output_path).suffix == ".json":
            return {"id": self.id, "dataset": self.category, "instruction": self.task}
        return {"id": self.id, "instruction": self.instruction, "input": self.input}


@dataclass(frozen=True)
class Answers:
    """A model's answers to a set.

    Attributes:
        generator: the model's name.
        outputs: item id → answer, without white space around it; "" where the model said nothing.
        unanswered: ids of the set's items that have no answer, in the set's order.
        rows: item id → the whole row of the file.
    """

    generator: str
    outputs: dict[str, str]
    unanswered: list[str]
    rows: dict[str, dict] = field(repr=False)


def is_the_252(path: str | os.PathLike) -> bool:
    """Whether a file is Self-Instruct's 252 instructions, byte for byte."""
    return git_blob_id(path) == THE_252_BLOB


def read_set(path: str | os.PathLike) -> list[Item]:
    """Reads an instruction set: a JSON list, or JSON Lines if the name ends in ``.jsonl``.

    - Self-Instruct: {"id", "instruction", "instances": [{"input", "output"}], "motivation_app"}. Of several instances,
      each is an item; the second's id is "ID#2".
    - AlpacaEval: {"instruction", "output", "dataset"}.
    - Alpaca: {"instruction", "input", "output"}.

    The output, where it is more than white space, is the reference. A record without an id is numbered, from 1. A
    file with the shape of the 252, but not their content, is told on stderr.

    Raises:
        UserError: a file that is missing, malformed or holds no record, a malformed record, an id twice.
    """
    path = Path(path)
    if not path.exists() and path.name == THE_252:
        raise UserError(
            f"{path} does not exist; it is Self-Instruct's (yizhongw/self-instruct, human_eval/{THE_252}): "
            f"python analyze_data.py fetch --url {THE_252_URL} --blob_id {THE_252_BLOB} --output_path {path}"
        )
    items, records = [], jload(path)
    for number, record in enumerate(records, 1):
        try:
            items += _items(record, number)
        except UserError as e:
            raise UserError(f"{path}, record {number}: {e}") from None
    if not items:
        raise UserError(f"{path} holds no instructions: give a file with at least one")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise UserError(f"{path} has the id {item.id!r} twice: give each record its own, or none an id")
        seen.add(item.id)
    if "motivation_app" in records[0] and not is_the_252(path):
        print(
            f"note: {path} is not the 252 instructions that Self-Instruct published ({len(items)} instructions, git "
            f"blob {git_blob_id(path)[:12]}, not {THE_252_BLOB[:12]}): its figures do not compare with theirs",
            file=sys.stderr,
        )
    return items


def read_answers(path: str | os.PathLike, items: list[Item]) -> Answers:
    """Reads a model's answers to a set, in any order.

    A row has the instruction that it answers, as "instruction" and "input" or as one text (Item.task), and the answer
    as "output" (judge.py answer, chat.py --batch_path, alpaca_eval) or "response" (Self-Instruct's predictions). It
    belongs to the item with the same texts, white space around them aside; of several such items to the one with its
    "id", else to the first that has no answer yet. The model's name is "generator", else the file's name without
    "_predictions". A row without an answer, or with null, counts as unanswered.

    Raises:
        UserError: a file that is missing, malformed or holds no answer; a row of another set, a second answer to an
            item, rows of several models.
    """
    path = Path(path)
    places: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        for texts in {(item.instruction.strip(), item.input.strip()), (item.task.strip(), "")}:
            places.setdefault(texts, []).append(item)
    outputs: dict[str, str] = {}
    rows: dict[str, dict] = {}
    strangers: list[str] = []
    names: dict[str, None] = {}
    for number, row in enumerate(jload(path), 1):
        try:
            instruction, input = _texts(row)
            answer, name = _answer(row), _generator(row)
        except UserError as e:
            raise UserError(f"{path}, record {number}: {e}") from None
        same = places.get((instruction.strip(), input.strip()), [])
        if not same:
            strangers.append(f"record {number}, {_short(instruction)}")
            continue
        named = [item for item in same if item.id == str(row.get("id"))]
        free = [item for item in named or same if item.id not in rows]
        if not free:
            raise UserError(f"{path}, record {number} answers {_short(instruction)} once more: keep one answer to each")
        if name:
            names[name] = None
        rows[free[0].id] = row
        if answer is not None:
            outputs[free[0].id] = answer.strip()
    if strangers:
        raise UserError(
            f"{path}: {len(strangers)} of its {len(strangers) + len(rows)} answers are to no instruction of the set "
            f"({strangers[0]}): give the set that they answer"
        )
    if not outputs:
        raise UserError(f"{path} holds no answers: give a file with at least one")
    if len(names) > 1:
        raise UserError(
            f"{path} holds answers of {len(names)} models ({', '.join(names)}): give each a file of its own"
        )
    generator = next(iter(names), None) or path.name.partition(".json")[0].removesuffix("_predictions")
    return Answers(generator, outputs, [item.id for item in items if item.id not in outputs], rows)


def read_pair(instructions: str | os.PathLike, answers: str) -> tuple[list[Item], list[Answers]]:
    """The set and two models' answers to it; what is not answered is told.

    Raises:
        UserError: not two files, or both of one model.
    """
    items, paths = read_set(instructions), [path.strip() for path in answers.split(",")]
    if len(paths) != 2:
        raise UserError(f"--answers takes two files with a comma between them, A.jsonl,B.jsonl, not {len(paths)}")
    pair = [read_answers(path, items) for path in paths]
    if pair[0].generator == pair[1].generator:
        raise UserError(
            f'both files of --answers are by {pair[0].generator!r}: give one another name ("generator" in its rows; '
            "judge.py answer --generator writes it)"
        )
    for one in pair:
        if one.unanswered:
            print(f"note: {one.generator} has no answer to {len(one.unanswered):,} of {len(items):,} instructions")
    return items, pair


def _items(record, number: int) -> list[Item]:
    """The items of a record of any of the formats."""
    if not isinstance(record, dict):
        raise UserError(f"a {type(record).__name__} where an object was expected")
    id, category = record.get("id", number), record.get("motivation_app", record.get("dataset", ""))
    if not isinstance(id, str | int) or not isinstance(category, str):
        raise UserError('its "id", "motivation_app" or "dataset" is no text')
    _encodable(f"{id}{category}")
    if "instances" not in record:
        return [Item(str(id), *_texts(record), _reference(record), category)]
    instances = record["instances"]
    if not isinstance(instances, list) or not instances or not all(isinstance(one, dict) for one in instances):
        raise UserError('"instances" must be a list of objects, one at least')
    return [
        Item(
            f"{id}#{n}" if n > 1 else str(id), *_texts(record | {"input": one.get("input")}), _reference(one), category
        )
        for n, one in enumerate(instances, 1)
    ]


def _texts(record) -> tuple[str, str]:
    """Instruction and input of a record or an answer."""
    if not isinstance(record, dict):
        raise UserError(f"a {type(record).__name__} where an object was expected")
    instruction, input, instances = record.get("instruction"), record.get("input"), record.get("instances")
    if input is None and isinstance(instances, list) and len(instances) == 1 and isinstance(instances[0], dict):
        input = instances[0].get("input")  # chat.py --batch_path leaves a record as it was
    input = "" if input is None else input
    if not isinstance(instruction, str) or not instruction.strip() or not isinstance(input, str):
        raise UserError('needs a text "instruction", and "input" must be a text if it is there')
    _encodable(instruction + input)
    return instruction, input


def _reference(record: dict) -> str | None:
    output = record.get("output")
    if output is not None and not isinstance(output, str):
        raise UserError('"output" must be a text if it is there')
    _encodable(output or "")
    return output if output and output.strip() else None


def _answer(row: dict) -> str | None:
    answer = row.get("output", row.get("response"))
    if answer is not None and not isinstance(answer, str):
        raise UserError('the answer, "output" or "response", is no text')
    _encodable(answer or "")
    return answer


def _generator(row: dict) -> str | None:
    name = row.get("generator")
    if name is not None and not is_name(name):
        raise UserError('"generator" must be a name in one line if it is there')
    return name


def is_name(name) -> bool:
    """Whether a model or a judge can be called that: a text in one line, with nothing unprintable in it."""
    return isinstance(name, str) and bool(name.strip()) and name.isprintable()


def _encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("holds half of a surrogate pair, which is no text") from None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else text[:59] + "…")
