"""Near-duplicates by ROUGE-L: what generate_instruction.py keeps and writes, and the same as a task for existing data.

Records are taken in order. One is kept if the highest ROUGE-L F of its instruction to the seeds and to every
instruction kept so far is at most the threshold.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from alpaca import UserError
from alpaca.common.files import replace_file
from alpaca.common.records import jload, json_fault, json_text
from alpaca.data.rouge import RougePool, is_mostly_unseen, tokenizer_named

MAX_SIMILARITY = 0.7  # ROUGE-L F; above it two texts are near-duplicates, as in Self-Instruct (Wang et al., 2022)
NEAREST = 10  # instructions that are written beside each kept one
BLOCK = 64  # records scored at a time: unpacking the other text is two thirds of a comparison, and is done once a block


def similarity_fields(scores: np.ndarray, instructions: list[str]) -> dict:
    """Return the two fields that a kept record gains from its scores against ``instructions``, as in the original.

    The 10 nearest are in falling order; of equal scores the later one comes first. An instruction that occurs twice
    takes two of the ten places but appears once, since instructions are the keys. Without instructions the mean is 0.
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
    """The instructions kept so far; decides in order which new ones to add.

    With stats every pair is scored; without, few pairs are, and the decisions are the same.

    Args:
        instructions: kept before the first call (seeds, records of an earlier run), numbered from 0.
        threshold: ROUGE-L F; above it two instructions are near-duplicates.
        similarity_stats: whether to compute ``similarity_fields``.
        tokenizer: see RougePool.
    """

    def __init__(
        self,
        instructions: Iterable[str] = (),
        threshold: float = MAX_SIMILARITY,
        similarity_stats: bool = True,
        tokenizer: str = "rouge",
    ):
        instructions = list(instructions)
        self.threshold, self.tokenizer = threshold, tokenizer
        self.pool = RougePool(instructions, tokenizer)
        self._texts = instructions if similarity_stats else None  # what the similarity fields name

    def take(self, texts: list[str]) -> list[tuple[int | None, dict]]:
        """Decide on each text in order: (number of the nearest kept text if that is too near, else None; fields).

        A text with None is kept. The fields are ``similarity_fields``; empty for a text that is not kept, and without
        stats. A block of texts is scored several times faster than the same texts one by one.
        """
        verdicts: list[tuple[int | None, dict]] = []
        if self._texts is None:
            for text in texts:
                nearest = self.pool.exceeds(text, self.threshold)
                if nearest is None:
                    self.pool.add(text)
                verdicts.append((nearest, {}))
            return verdicts
        kept: list[int] = []  # of this block; the pool gets them after it
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
    threshold: float = MAX_SIMILARITY,
    similarity_stats: bool = True,
    tokenizer: str = "rouge",
) -> Iterator[dict]:
    """Yield the records that are kept, in order; with stats as copies that have ``similarity_fields``.

    Memory: the encoded instructions of the kept records; with stats their texts too.

    Args:
        records: read twice without stats (first to learn which tokens are rare), so not a generator.
        seeds: instructions that count as kept.
    """
    kept = DistinctPool(seeds, threshold, similarity_stats, tokenizer)
    if not similarity_stats:
        kept.pool.learn(record["instruction"] for record in records)
    bar = iter(tqdm(records, desc="dedup", unit="record", disable=None))
    while block := list(islice(bar, BLOCK)):
        verdicts = kept.take([record["instruction"] for record in block])
        for record, (nearest, fields) in zip(block, verdicts, strict=True):
            if nearest is None:
                yield record | fields


# ---------------------------------------------------------------------------------------------------------------------
# The task.


class JsonLines:
    """The records of a .jsonl file, read from disk each time they are iterated: memory for one line."""

    def __init__(self, path: Path):
        self.path = path
        self.count = sum(1 for _ in self)  # and so every line is checked before the first is used

    def __iter__(self) -> Iterator[dict]:
        with open(self.path, encoding="utf-8-sig", newline="\n") as file:
            try:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _checked(json.loads(line), f"{self.path}, line {number}")
            except json.JSONDecodeError as e:
                raise UserError(f"{self.path}, line {number}: malformed JSON, {json_fault(e)}") from None
            except UnicodeDecodeError as e:
                raise UserError(f"{self.path} is not UTF-8 text (byte {e.start}): convert it to UTF-8") from None

    def __len__(self) -> int:
        return self.count


def _checked(record, place: str) -> dict:
    if not isinstance(record, dict) or not isinstance(record.get("instruction"), str):
        raise UserError(f'{place}: not a record, which is an object with a text "instruction"')
    return record


def _read(path: str) -> list[dict] | JsonLines:
    """Return the records of a JSON list, or of JSON Lines if the name ends in .jsonl, all of them checked."""
    if path.endswith(".jsonl") and Path(path).is_file():
        records = JsonLines(Path(path))
    else:
        records = [_checked(record, f"{path}, record {number}") for number, record in enumerate(jload(path), 1)]
    if not len(records):
        raise UserError(f"{path} contains no records: give a file with at least one")
    return records


def dedup(
    input_path: str,
    output_path: str,
    seed_tasks_path: str | None = None,
    threshold: float = MAX_SIMILARITY,
    similarity_stats: bool = True,
    tokenizer: str = "rouge",
) -> None:
    """Drop near-duplicates from instruction data, as the generator does, and write the rest in the same order.

    A record is kept if the highest ROUGE-L of its instruction to the seeds and to every instruction kept so far is at
    most the threshold. Records need no field but "instruction" and keep all that they have. Files are JSON lists, or
    JSON Lines if the name ends in .jsonl; JSON Lines are streamed, so the records take no memory.

    Args:
        input_path: the data.
        output_path: where the kept records go; an existing file is replaced at the end.
        seed_tasks_path: instructions that count as kept (they are not written); default: none.
        threshold: ROUGE-L F, 0 to 1; above it two instructions are near-duplicates.
        similarity_stats: adds most_similar_instructions (the 10 nearest) and avg_similarity_score. 52,000 records take
            about a minute with it and seconds without; what is kept is the same.
        tokenizer: rouge compares as the original does, by a-z and 0-9 alone; unicode by the words of any script.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold must be from 0 to 1, not {threshold}")
    tokenizer_named(tokenizer)
    source, target = Path(input_path), Path(output_path)
    if source.exists() and target.exists() and source.samefile(target):
        raise UserError(f"output_path {output_path} is the input: choose another file")
    if target.is_dir():
        raise UserError(f"output_path {output_path} is a folder: name a file")
    seeds = [record["instruction"] for record in _read(seed_tasks_path)] if seed_tasks_path else []
    records = _read(input_path)
    if tokenizer == "rouge" and (unseen := sum(is_mostly_unseen(record["instruction"]) for record in records)):
        print(
            f"warning: {unseen} of {len(records)} instructions are mostly not ASCII, and the tokenizer rouge sees only "
            "ASCII: their near-duplicates may be missed (the tokenizer unicode sees all scripts)"
        )
    kept = 0
    with replace_file(target) as file:
        lines = target.suffix == ".jsonl"
        for record in distinct(records, seeds, threshold, similarity_stats, tokenizer):
            if lines:
                file.write(json_text(record) + "\n")
            else:
                file.write(("," if kept else "[") + "\n    " + json_text(record, indent=4).replace("\n", "\n    "))
            kept += 1
        if not lines:
            file.write("\n]\n" if kept else "[]\n")
    print(f"{len(records)} records: {kept} kept, {len(records) - kept} near-duplicates; {output_path}")
