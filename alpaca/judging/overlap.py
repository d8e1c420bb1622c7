"""How much of an evaluation set is in the training data: shared n-grams, equal instructions, nearest by ROUGE-L.

Words are those of rouge.tokenize_unicode: runs of letters and digits, case-folded. Of a training record instruction,
input and output are searched as one text; of an item its instruction and input, as one text too.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from alpaca.data.instruction_sets import Item
from alpaca.data.rouge import RougePool, tokenize_unicode

# GPT-3 (Brown et al., 2020, appendix C) called an example dirty that shared an N-gram with the training data, N the
# fifth percentile of the examples' lengths in words, but 8 at least and 13 at most.
SHORT_NGRAM, LONG_NGRAM = 8, 13
DUPLICATE = 0.7  # ROUGE-L above which the generator takes two instructions for one
WORDS_AT_ONCE = 1_000_000  # of the training data: some 60 MB with the places that are still alike


@dataclass(frozen=True)
class Overlap:
    """What one item shares with the training data.

    Attributes:
        id: of the item.
        words: number of words of its instruction and input.
        longest: length in words of its longest n-gram that is in a training record; 0: none of its words is.
        ngram: that n-gram.
        ngram_record: number of a record, from 0, that has it; None without one.
        rouge_l: highest ROUGE-L F of its instruction to a record's instruction.
        nearest_record: the record with that score, the first of several.
    """

    id: str
    words: int
    longest: int
    ngram: str
    ngram_record: int | None
    rouge_l: float
    nearest_record: int


def measure(items: Sequence[Item], records: Sequence[dict]) -> list[Overlap]:
    """The overlap of each item with training records: 252 items with 52,000 records in some ten seconds.

    Args:
        items: the evaluation set.
        records: with "instruction", "input" and "output"; at least one.
    """
    texts = [tokenize_unicode(f"{item.instruction} {item.input}") for item in items]
    shared = longest_shared(
        texts, (tokenize_unicode(f"{r['instruction']} {r['input']} {r['output']}") for r in records)
    )
    pool = RougePool((record["instruction"] for record in records), tokenizer="unicode")
    overlaps = []
    for item, words, (length, start, record), scores in zip(
        items, texts, shared, pool.scores_of_each([item.instruction for item in items]), strict=True
    ):
        nearest = int(scores.argmax())
        ngram = " ".join(words[start : start + length])
        overlaps.append(Overlap(item.id, len(words), length, ngram, record, float(scores[nearest]), nearest))
    return overlaps


def duplicates(items: Sequence[Item], records: Sequence[dict]) -> tuple[list[str], list[str]]:
    """Ids of the items whose instruction, and of those whose instruction and input, a record has in the same words."""
    instructions = {tuple(tokenize_unicode(record["instruction"])) for record in records}
    of_items = {item.id: tuple(tokenize_unicode(item.instruction)) for item in items}
    alike = [item for item in items if of_items[item.id] in instructions]
    inputs: dict[tuple, set] = {}
    wanted = {of_items[item.id] for item in alike}
    for record in records:
        if (key := tuple(tokenize_unicode(record["instruction"]))) in wanted:
            inputs.setdefault(key, set()).add(tuple(tokenize_unicode(record["input"])))
    both = [item.id for item in alike if tuple(tokenize_unicode(item.input)) in inputs[of_items[item.id]]]
    return [item.id for item in alike], both


def summary(items: Sequence[Item], records: Sequence[dict], most: int = 10) -> dict:
    """The overlap of a set as figures, with the nearest pairs.

    Returns:
        records; for n of (8, 13) {n, long_enough, shared}: items of at least n words, and those of them that share an
        n-gram; same_instruction and same_task (with the input): ids; above_duplicate: number of items whose instruction
        is nearer than DUPLICATE; rouge_l: median and highest; nearest and longest: the ``most`` items nearest by
        ROUGE-L and with the longest n-grams, each with its record.
    """
    overlaps = measure(items, records)
    same_instruction, same_task = duplicates(items, records)
    instructions = {item.id: item.instruction for item in items}
    by_score = sorted(overlaps, key=lambda overlap: -overlap.rouge_l)[:most]
    by_length = sorted(overlaps, key=lambda overlap: -overlap.longest)[:most]
    scores = [overlap.rouge_l for overlap in overlaps]
    return {
        "records": len(records),
        "ngrams": [
            {
                "n": n,
                "long_enough": sum(overlap.words >= n for overlap in overlaps),
                "shared": sum(overlap.longest >= n for overlap in overlaps),
            }
            for n in (SHORT_NGRAM, LONG_NGRAM)
        ],
        "same_instruction": same_instruction,
        "same_task": same_task,
        "above_duplicate": sum(score > DUPLICATE for score in scores),
        "rouge_l": {"median": float(np.median(scores)), "highest": max(scores)},
        "nearest": [
            {
                "id": overlap.id,
                "rouge_l": overlap.rouge_l,
                "instruction": instructions[overlap.id],
                "record": overlap.nearest_record,
                "record_instruction": records[overlap.nearest_record]["instruction"],
            }
            for overlap in by_score
        ],
        "longest": [
            {"id": overlap.id, "words": overlap.longest, "ngram": overlap.ngram, "record": overlap.ngram_record}
            for overlap in by_length
        ],
    }


# ---------------------------------------------------------------------------------------------------------------------
# The longest shared n-gram.


def longest_shared(
    texts: Sequence[Sequence[str]], corpus: Iterator[Sequence[str]]
) -> list[tuple[int, int, int | None]]:
    """For each text its longest run of words that is in a document of the corpus, in memory that knows no corpus size.

    Length by length: a place of the corpus can begin a shared (n+1)-gram only if it begins a shared n-gram, so that
    each round looks at the few places that are left, as whole arrays.

    Returns:
        (length, where it begins in the text, number of the first document found with it) of each text; (0, 0, None)
        where no word is shared.
    """
    numbers: dict[str, int] = {}
    mine = _Words([[numbers.setdefault(word, len(numbers)) for word in text] for text in texts])
    levels = _Levels(mine)
    best: list[tuple[int, int, int | None]] = [(0, 0, None)] * len(texts)
    first, block, size = 0, [], 0
    for document in corpus:
        block.append([numbers.get(word, -1) for word in document])
        size += len(document)
        if size >= WORDS_AT_ONCE:
            _search(levels, _Words(block), first, best)
            first, block, size = first + len(block), [], 0
    _search(levels, _Words(block), first, best)
    return best


class _Words:
    """Documents end to end: words int64, and -1 after each, which equals no word of the texts."""

    def __init__(self, documents: Sequence[Sequence[int]]):
        flat = array("q")
        starts = array("q")
        for document in documents:
            starts.append(len(flat))
            flat.extend(document)
            flat.append(-1)
        self.words = np.frombuffer(flat, np.int64) if flat else np.zeros(0, np.int64)
        self.starts = np.frombuffer(starts, np.int64) if starts else np.zeros(0, np.int64)

    def document_of(self, places: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, places, side="right") - 1


class _Levels:
    """The n-grams of the texts, numbered, for each n that was asked for.

    An (n+1)-gram is an n-gram and the word behind it: the key n-gram·V + word, and its number the key's rank.
    """

    def __init__(self, text: _Words):
        self.text = text
        places = np.flatnonzero(text.words >= 0)
        self.vocabulary = int(text.words.max(initial=-1)) + 1
        keys, grams = np.unique(text.words[places], return_inverse=True)
        self._levels = [(keys, places, grams)]

    def get(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(sorted keys of the n-grams, places where the texts have one, number of the n-gram at each)."""
        while len(self._levels) < n:
            _, places, grams = self._levels[-1]
            following = self.text.words[places + len(self._levels)]
            places, grams, following = (x[following >= 0] for x in (places, grams, following))
            keys, numbers = np.unique(grams * self.vocabulary + following, return_inverse=True)
            self._levels.append((keys, places, numbers))
        return self._levels[n - 1]


def _search(levels: _Levels, corpus: _Words, first: int, best: list) -> None:
    """Betters ``best`` by what a block of the corpus has; ``first`` is the number of its first document."""
    alive = np.flatnonzero(corpus.words >= 0)  # places of the corpus that begin a shared n-gram
    grams = np.zeros(len(alive), np.int64)
    n = 0
    while len(alive):
        n += 1
        keys, places, mine = levels.get(n)
        if not len(keys):
            return
        following = corpus.words[alive + n - 1]
        wanted = grams * levels.vocabulary + following
        found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        hit = (following >= 0) & (keys[found] == wanted)
        alive, grams = alive[hit], found[hit]
        witness = np.full(len(keys), -1, np.int64)
        witness[grams[::-1]] = alive[::-1]  # the first place is written last
        shared = witness[mine] >= 0
        for text, place, record in zip(
            levels.text.document_of(places[shared]).tolist(),
            places[shared].tolist(),
            corpus.document_of(witness[mine][shared]).tolist(),
            strict=True,
        ):
            if n > best[text][0]:  # of equally long ones the first in the text, in the first block
                best[text] = (n, place - int(levels.text.starts[text]), first + record)
