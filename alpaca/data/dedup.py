"""Near-duplicates by ROUGE-L: for the generator's selection, and as a task for existing data.

Records are taken in order. A record is kept if the highest ROUGE-L F of its instruction to the seeds and to every
instruction kept so far is at most the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from alpaca import UserError
from alpaca.common.records import LINES, files_of, read_records, sources, write_records
from alpaca.common.shapes import whole_text
from alpaca.common.text import counted
from alpaca.data.rouge import RougePool, is_mostly_unseen, tokenizer_named, unseen_warning

MAX_SIMILARITY = 0.7  # ROUGE-L F; above it two texts are near-duplicates, as in Self-Instruct (Wang et al., 2022)
NEAREST = 10  # instructions written with each kept one
LEARNED = 10_000  # records whose tokens are counted first: all of them made lookups no faster
BLOCK = 64  # records scored at a time: unpacking the other text is two thirds of a comparison, done once per block


def similarity_fields(scores: np.ndarray, instructions: list[str]) -> dict:
    """Return the two fields that a kept record gets from its scores against ``instructions``, as in the original.

    The 10 nearest are in descending order, the later of equal scores first. An instruction that occurs twice takes two
    of the ten places but appears once, since instructions are the keys. Without instructions the mean is 0.
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

    With stats every pair is scored; without, only a few pairs, and the decisions are the same.

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
        """Decide on each text in order: (number of the nearest kept text if it is too near, else None; fields).

        A text with None is kept. The fields are ``similarity_fields``, or empty for a dropped text and without stats.
        A block of texts is scored several times faster than the same texts one by one.
        """
        if self._texts is None:
            return [(nearest, {}) for nearest in self.pool.admit(texts, self.threshold)]
        verdicts: list[tuple[int | None, dict]] = []
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

    Memory: the encoded instructions of the kept records; with stats also their texts.

    Args:
        records: not a generator: without stats the first are read twice, to learn which tokens are rare.
        seeds: instructions that count as kept.
    """
    kept = DistinctPool(seeds, threshold, similarity_stats, tokenizer)
    if not similarity_stats:
        kept.pool.learn(map(whole_text, islice(records, LEARNED)))
    bar = iter(tqdm(records, desc="dedup", unit="record", disable=None))
    while block := list(islice(bar, BLOCK)):
        verdicts = kept.take(list(map(whole_text, block)))
        for record, (nearest, fields) in zip(block, verdicts, strict=True):
            if nearest is None:
                yield record | fields


# ---------------------------------------------------------------------------------------------------------------------
# The task.


class Records:
    """The records that a path stands for; JSON Lines are read again each time they are iterated."""

    def __init__(self, path: str, fields: str | None = None):
        self.path, self.fields = path, fields
        # Every record is checked before the first is used. Others are read once: they may come from a pipe.
        streamed = all(source.endswith(LINES) for source in sources(path))
        self.records = None if streamed else list(self._read(print))
        self.count = sum(1 for _ in self._read(print)) if self.records is None else len(self.records)

    def _read(self, say: Callable[[str], object]) -> Iterator[dict]:
        return (record for _, record in read_records(self.path, self.fields, say))

    def __iter__(self) -> Iterator[dict]:
        return iter(self.records) if self.records else self._read(lambda _: None)

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class Engine:
    """Where ``dedup`` runs.

    Args:
        engine: local: one process. ray: many, on this machine or a cluster; the same records are kept, without
            similarity fields. An output_path without a suffix is then a folder with a shard for each input shard.
        address: of a running Ray cluster: auto, or HOST:PORT (default: start one on this machine). Its machines need
            this project installed, and the same files under the same paths.
        workers: tasks at a time on this machine; default: one a core.
        worker_gb: memory of a task in GB.
    """

    engine: str = "local"
    address: str | None = None
    workers: int | None = None
    worker_gb: float = 2.0


def dedup(
    input_path: str,
    output_path: str,
    seed_tasks_path: str | None = None,
    threshold: float = MAX_SIMILARITY,
    similarity_stats: bool = True,
    tokenizer: str = "rouge",
    fields: str | None = None,
    engine: Engine = Engine(),  # noqa: B008  never changed
) -> None:
    """Drop near-duplicates from instruction data, as the generator does, and write the rest in the same order.

    A record is kept if the highest ROUGE-L of its instruction (a conversation's: all its questions, no system text) to
    the seeds and to all kept so far is at most the threshold. Records need only the field "instruction" and keep all
    their fields; other formats are written in Alpaca's fields. JSON Lines are streamed: the records take no memory.

    Args:
        input_path: the data: a file, a folder, several separated by commas, or a hub dataset.
        output_path: file for the kept records, as JSON Lines if it ends in .jsonl; an existing file is replaced.
        seed_tasks_path: instructions that count as kept but are not written; default: none.
        threshold: ROUGE-L F, 0 to 1; above it two instructions are near-duplicates.
        similarity_stats: add most_similar_instructions (the 10 nearest) and avg_similarity_score. 52,000 records take
            about a minute with it and seconds without; the same records are kept.
        tokenizer: rouge compares a-z and 0-9 only, like the original; unicode compares words in any script.
        fields: field name of records in another format: instruction=question.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold must be from 0 to 1, not {threshold}")
    tokenizer_named(tokenizer)
    target = Path(output_path)
    if target.exists() and any(source.exists() and source.samefile(target) for source in files_of(input_path)):
        raise UserError(f"output_path {output_path} is the input: choose another file")
    if target.is_dir():
        raise UserError(f"output_path {output_path} is a folder: choose a file in it")
    if engine.engine not in ("local", "ray"):
        raise UserError(f"engine must be local or ray, not {engine.engine!r}")
    if engine.engine == "ray":
        from alpaca.data.cluster import dedup_on_ray

        return dedup_on_ray(input_path, target, seed_tasks_path, threshold, tokenizer, fields, engine)
    seeds = list(map(whole_text, Records(seed_tasks_path))) if seed_tasks_path else []
    records = Records(input_path, fields)
    if tokenizer == "rouge" and (unseen := sum(map(is_mostly_unseen, map(whole_text, records)))):
        print(unseen_warning(unseen, counted(len(records), "instruction")))
    kept = write_records(distinct(records, seeds, threshold, similarity_stats, tokenizer), target)
    dropped = counted(len(records) - kept, "near-duplicate")
    print(f"{counted(len(records), 'record')}: {kept:,} kept in {output_path}, {dropped} dropped")
