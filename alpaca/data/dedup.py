"""Near-duplicates by ROUGE-L: what generate_instruction.py keeps and writes, as a task for data that is already there.

In the order of the input a record is kept when its instruction's highest ROUGE-L F to the seeds and to all that were
kept before it is not above the threshold.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from alpaca import UserError
from alpaca.common.files import replace_file
from alpaca.common.records import jload, json_text
from alpaca.data.rouge import RougePool, is_mostly_unseen, tokenizer_named

NEAREST = 10  # instructions that are written beside each kept one
BLOCK = 64  # records scored at a time: two thirds of a comparison is unpacking the other text, here once for all


def similarity_fields(scores: np.ndarray, instructions: list[str]) -> dict:
    """The two fields that a kept record gains from its scores against ``instructions``, as the original wrote them.

    The 10 nearest are in falling order, and the later one first where scores are equal. An instruction that is there
    twice takes two of the ten places but stands once: the field is an object with instructions for keys. Against
    nothing at all the mean is 0.
    """
    if not len(scores):
        return {"most_similar_instructions": {}, "avg_similarity_score": 0.0}
    first = max(0, len(scores) - NEAREST)
    near = (scores >= np.partition(scores, first)[first]).nonzero()[0]  # more than 10 where the tenth has equals
    nearest = near[scores[near].argsort(kind="stable")[::-1][:NEAREST]]
    return {
        "most_similar_instructions": {instructions[i]: float(scores[i]) for i in nearest},
        "avg_similarity_score": float(scores.mean()),
    }


class DistinctPool:
    """The instructions kept so far. Takes new ones in order, says of each whether it is new, and keeps those that are.

    With stats every pair is scored; without, few are looked at, and the decisions are the same.

    Args:
        instructions: kept before the first call: seeds, records of an earlier run. Numbered from 0.
        threshold: ROUGE-L F; above it two instructions are the same.
        similarity_stats: whether ``similarity_fields`` are made.
        tokenizer: see RougePool.
    """

    def __init__(
        self,
        instructions: Iterable[str] = (),
        threshold: float = 0.7,
        similarity_stats: bool = True,
        tokenizer: str = "rouge",
    ):
        instructions = list(instructions)
        self.threshold, self.tokenizer = threshold, tokenizer
        self.pool = RougePool(instructions, tokenizer)
        self._texts = instructions if similarity_stats else None  # what the similarity fields name

    def take(self, texts: list[str]) -> list[tuple[int | None, dict]]:
        """For each text: the number of its nearest kept one if that is too near, or None, and then it is kept.

        The second item is its similarity fields; empty for one that is not kept, and without stats. A block of texts is
        scored several times faster than the same texts one by one.
        """
        verdicts: list[tuple[int | None, dict]] = []
        if self._texts is None:
            for text in texts:
                nearest = self.pool.exceeds(text, self.threshold)
                if nearest is None:
                    self.pool.add(text)
                verdicts.append((nearest, {}))
            return verdicts
        kept: list[int] = []  # of this block: they are in the pool only after it
        rows = zip(self.pool.scores_of_each(texts), RougePool(texts, self.tokenizer).scores_of_each(texts), strict=True)
        for i, (earlier, here) in enumerate(rows):
            scores = np.concatenate([earlier, here[kept]])
            if scores.max(initial=-np.inf) > self.threshold:
                verdicts.append((int(scores.argmax()), {}))
                continue
            verdicts.append((None, similarity_fields(scores, self._texts)))
            kept.append(i)
            self._texts.append(texts[i])
        for i in kept:
            self.pool.add(texts[i])
        return verdicts


def distinct(
    records: Iterable[dict],
    seeds: Iterable[str] = (),
    threshold: float = 0.7,
    similarity_stats: bool = True,
    tokenizer: str = "rouge",
) -> Iterator[dict]:
    """Yields the records that are kept, in order; with stats as copies that have ``similarity_fields``.

    Memory: the encoded instructions of what was kept, with stats their texts too, and none of the records.

    Args:
        records: gone through twice without stats (to learn which tokens are rare), so not a generator.
        seeds: instructions that count as kept.
    """
    kept = DistinctPool(seeds, threshold, similarity_stats, tokenizer)
    if not similarity_stats:
        kept.pool.learn(record["instruction"] for record in records)
    bar = tqdm(records, desc="dedup", unit="record", disable=None)
    for block in _blocks(bar, BLOCK):
        verdicts = kept.take([record["instruction"] for record in block])
        for record, (nearest, fields) in zip(block, verdicts, strict=True):
            if nearest is None:
                yield record | fields


def _blocks(records: Iterable[dict], size: int) -> Iterator[list[dict]]:
    block = []
    for record in records:
        block.append(record)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block


# ---------------------------------------------------------------------------------------------------------------------
# The task.


class JsonLines:
    """The records of a .jsonl file, read anew each time it is gone through: memory for one line."""

    def __init__(self, path: Path):
        self.path, self._count = path, None

    def __iter__(self) -> Iterator[dict]:
        count = 0
        with open(self.path, encoding="utf-8-sig", newline="\n") as file:
            try:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        count += 1
                        yield _checked(json.loads(line), f"{self.path}, line {number}")
            except json.JSONDecodeError as e:
                raise UserError(f"{self.path}, line {number}: malformed JSON, {e.msg} at column {e.colno}") from None
            except UnicodeDecodeError as e:
                raise UserError(f"{self.path} is not UTF-8 text (byte {e.start}): convert it to UTF-8") from None
        self._count = count

    def __len__(self) -> int:
        if self._count is None:
            for _ in self:
                pass
        return self._count


def _checked(record, place: str) -> dict:
    if not isinstance(record, dict) or not isinstance(record.get("instruction"), str):
        raise UserError(f'{place}: not a record, which is an object with a text "instruction"')
    return record


def _read(path: str) -> list[dict] | JsonLines:
    """Records of a JSON list, or of JSON Lines when the name ends in .jsonl; all are checked before any is used."""
    if Path(path).suffix == ".jsonl":
        if not Path(path).is_file():
            raise UserError(f"{path} {'is no file' if Path(path).exists() else 'does not exist'}: check the path")
        records = JsonLines(Path(path))
    else:
        records = [_checked(record, f"{path}, record {number}") for number, record in enumerate(jload(path), 1)]
    if not len(records):
        raise UserError(f"{path} holds no records: give a file with at least one")
    return records


def dedup(
    input_path: str,
    output_path: str,
    seed_tasks_path: str | None = None,
    threshold: float = 0.7,
    similarity_stats: bool = True,
    tokenizer: str = "rouge",
) -> None:
    """Drops near-duplicates from instruction data, as the generator does, and writes the rest in the same order.

    A record is kept when the highest ROUGE-L of its instruction to the seeds and to all that were kept before it is not
    above the threshold. Records need no field but "instruction" and keep all that they have. Files are JSON lists, or
    JSON Lines where the name ends in .jsonl; .jsonl is read and written line by line, and the records take no memory.

    Args:
        input_path: the data.
        output_path: where the kept records go; it is replaced at the end, whole.
        seed_tasks_path: instructions that count as kept (they are not written); default: none.
        threshold: ROUGE-L F, 0 to 1; above it two instructions are the same.
        similarity_stats: adds most_similar_instructions (the 10 nearest) and avg_similarity_score. 52,000 records take
            about a minute with it and seconds without; what is kept is the same.
        tokenizer: rouge compares as the original does, by a-z and 0-9 alone; unicode by the words of any script.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold takes a number from 0 to 1, not {threshold}")
    tokenizer_named(tokenizer)
    source, target = Path(input_path), Path(output_path)
    if source.resolve() == target.resolve() or (source.exists() and target.exists() and source.samefile(target)):
        raise UserError(f"--output_path {output_path} is the input: give another file")
    if target.is_dir():
        raise UserError(f"--output_path {output_path} is a folder: give a file")
    seeds = [record["instruction"] for record in _read(seed_tasks_path)] if seed_tasks_path else []
    records = _read(input_path)
    if tokenizer == "rouge":
        unseen = sum(is_mostly_unseen(record["instruction"]) for record in records)
        if unseen:
            print(
                f"warning: {unseen} of {len(records)} instructions are mostly not ASCII, which is all that --tokenizer "
                "rouge sees: they are compared by little or nothing (--tokenizer unicode sees all scripts)"
            )
    kept, of = 0, len(records)
    found = distinct(records, seeds, threshold, similarity_stats, tokenizer)
    with replace_file(target) as file:
        lines = target.suffix == ".jsonl"
        for record in found:
            if lines:
                file.write(json_text(record) + "\n")
            else:
                file.write(("," if kept else "[") + "\n    " + json_text(record, indent=4).replace("\n", "\n    "))
            kept += 1
        if not lines:
            file.write("\n]\n" if kept else "[]\n")
    print(f"{of} records: {kept} kept, {of - kept} near-duplicates; {output_path}")
