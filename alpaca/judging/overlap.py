"""How much of an evaluation set is in the training data: shared n-grams, equal instructions, nearest by ROUGE-L.

Words are those of rouge.tokenize_unicode: runs of letters and digits, case-folded. An item's instruction and input are
one text, and so are instruction, input and output of a training record. Of a conversation, its questions and answers
count, without a system text that many share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from alpaca.common.shapes import whole_text
from alpaca.data.dedup import MAX_SIMILARITY
from alpaca.data.instruction_sets import Item
from alpaca.data.rouge import RougePool, tokenize_unicode

# GPT-3's authors (Brown et al., 2020, appendix C) called an example dirty if it shared an N-gram with the training
# data, N being the fifth percentile of the examples' lengths in words, but at least 8 and at most 13.
SHORT_NGRAM, LONG_NGRAM = 8, 13


@dataclass(frozen=True)
class Overlap:
    """What one item shares with the training data.

    Attributes:
        id: of the item.
        words: number of words in its instruction and input.
        longest: length in words of its longest n-gram that is in a training record, or 0.
        ngram: that n-gram.
        ngram_record: number of the first record that has it, from 0; None without one.
        rouge_l: highest ROUGE-L F of its instruction to a record's instruction.
        nearest_record: number of the record with that score, the first of several.
    """

    id: str
    words: int
    longest: int
    ngram: str
    ngram_record: int | None
    rouge_l: float
    nearest_record: int


def measure(items: Sequence[Item], records: Sequence[dict]) -> list[Overlap]:
    """Return the overlap of each item with training records: 252 items with 52,000 records in about ten seconds.

    Args:
        items: the evaluation set.
        records: with "instruction", "input" and "output"; at least one.
    """
    texts = [tokenize_unicode(f"{item.instruction} {item.input}") for item in items]
    corpus = (tokenize_unicode(f"{record['instruction']} {record['input']} {record['output']}") for record in records)
    shared = longest_shared(texts, corpus)
    pool = RougePool((record["instruction"] for record in records), tokenizer="unicode")
    overlaps = []
    all_scores = pool.scores_of_each([item.instruction for item in items])
    for item, words, (length, start, record), scores in zip(items, texts, shared, all_scores, strict=True):
        nearest = int(scores.argmax())
        ngram = " ".join(words[start : start + length])
        overlaps.append(Overlap(item.id, len(words), length, ngram, record, float(scores[nearest]), nearest))
    return overlaps


def duplicates(items: Sequence[Item], records: Sequence[dict]) -> tuple[list[str], list[str]]:
    """Return ids of items with the same words as a record: in the instruction, and in instruction and input."""
    of_items = {item.id: tuple(tokenize_unicode(item.instruction)) for item in items}
    inputs: dict[tuple, set] = {words: set() for words in of_items.values()}
    for record in records:
        if (words := tuple(tokenize_unicode(record["instruction"]))) in inputs:
            inputs[words].add(tuple(tokenize_unicode(record["input"])))
    alike = [item for item in items if inputs[of_items[item.id]]]
    both = [item.id for item in alike if tuple(tokenize_unicode(item.input)) in inputs[of_items[item.id]]]
    return [item.id for item in alike], both


def summary(items: Sequence[Item], records: Sequence[dict], most: int = 10) -> dict:
    """Return the overlap of a set as figures, with the nearest pairs.

    Returns:
        records; ngrams, for n of (8, 13) {n, long_enough, shared}: items of at least n words, and how many of them
        share an n-gram; same_instruction and same_task (with the input): ids; above_duplicate: number of items whose
        instruction is nearer than MAX_SIMILARITY; rouge_l: median and highest; nearest and longest: the ``most`` items
        nearest by ROUGE-L and with the longest n-grams, each with its record.
    """
    items = [replace(item, instruction=whole_text(vars(item))) for item in items]
    records = [record | {field: whole_text(record, field) for field in ("instruction", "output")} for record in records]
    overlaps = measure(items, records)
    same_instruction, same_task = duplicates(items, records)
    instructions = {item.id: item.instruction for item in items}
    by_score = sorted(overlaps, key=lambda each: -each.rouge_l)[:most]
    by_length = sorted(overlaps, key=lambda each: -each.longest)[:most]
    scores = [each.rouge_l for each in overlaps]
    return {
        "records": len(records),
        "ngrams": [
            {
                "n": n,
                "long_enough": sum(each.words >= n for each in overlaps),
                "shared": sum(each.longest >= n for each in overlaps),
            }
            for n in (SHORT_NGRAM, LONG_NGRAM)
        ],
        "same_instruction": same_instruction,
        "same_task": same_task,
        "above_duplicate": sum(score > MAX_SIMILARITY for score in scores),
        "rouge_l": {"median": float(np.median(scores)), "highest": max(scores)},
        "nearest": [
            {
                "id": each.id,
                "rouge_l": each.rouge_l,
                "instruction": instructions[each.id],
                "record": each.nearest_record,
                "record_instruction": records[each.nearest_record]["instruction"],
            }
            for each in by_score
        ],
        "longest": [
            {"id": each.id, "words": each.longest, "ngram": each.ngram, "record": each.ngram_record}
            for each in by_length
        ],
    }


def longest_shared(
    texts: Sequence[Sequence[str]], corpus: Iterable[Sequence[str]]
) -> list[tuple[int, int, int | None]]:
    """Return each text's longest run of words that is in a document of the corpus.

    The texts become one automaton that reads each document once, word by word: the time is linear in the words of both,
    and the memory in those of the texts.

    Returns:
        (length, where it begins in the text, number of the first document that has it) for each text, the first of
        several runs; (0, 0, None) if no word is shared.
    """
    runs, ends, last = _Automaton(), [], 0
    for text in texts:
        ends.append([last := runs.extend(last, word) for word in text])
        last = runs.extend(last, object())  # a border, which equals no word
    link, length, follow = runs.link, runs.length, runs.follow
    longest = [0] * len(length)  # of each state: words of its longest run that is in the corpus
    witness = [math.inf] * len(length)  # number of the first document with that run
    first = [math.inf] * len(length)  # … with any of the state's runs
    for number, document in enumerate(corpus):
        state = matched = 0
        for word in document:
            while state and word not in follow[state]:
                state = link[state]
                matched = length[state]
            if word in follow[state]:
                state = follow[state][word]
                matched += 1
                if matched > longest[state]:
                    longest[state], witness[state] = matched, number
                    first[state] = min(first[state], number)
    states = sorted(range(1, len(length)), key=length.__getitem__)
    for state in reversed(states):  # the shorter runs at the end of a run are everywhere it is
        shorter = link[state]
        if longest[state] and shorter:
            before = witness[shorter] if longest[shorter] == length[shorter] else math.inf
            longest[shorter], witness[shorter] = length[shorter], min(before, first[state])
            first[shorter] = min(first[shorter], first[state])
    for state in states:  # a run that occurs nowhere may end in one that does
        if not longest[state]:
            longest[state], witness[state] = longest[link[state]], witness[link[state]]
    found = []
    for states_of_text in ends:
        end, state = max(enumerate(states_of_text, 1), key=lambda place: longest[place[1]], default=(0, 0))
        size = longest[state]
        found.append((size, end - size, int(witness[state])) if size else (0, 0, None))
    return found


class _Automaton:
    """A suffix automaton (Blumer et al., 1985): a state for all runs of words that end at the same places of the texts.

    Of each state: length, the words of its longest run; link, the state of the longest run that ends there and at more
    places; follow, the state after each next word. State 0 is the empty run.
    """

    def __init__(self):
        self.link, self.length, self.follow = [-1], [0], [{}]

    def extend(self, last: int, word) -> int:
        """Add a word to the text, which ends in the state ``last``; return the state that it ends in then."""
        new = self._add(0, self.length[last] + 1, {})
        while last >= 0 and word not in self.follow[last]:
            self.follow[last][word] = new
            last = self.link[last]
        if last >= 0:
            self.link[new] = self._state_of(last, word)
        return new

    def _state_of(self, before: int, word) -> int:
        """Return the state of the run ``before`` plus one word, split from the longer runs in the same state."""
        after, length = self.follow[before][word], self.length[before] + 1
        if self.length[after] == length:
            return after
        split = self._add(self.link[after], length, dict(self.follow[after]))
        self.link[after] = split
        while before >= 0 and self.follow[before].get(word) == after:
            self.follow[before][word] = split
            before = self.link[before]
        return split

    def _add(self, link: int, length: int, follow: dict) -> int:
        self.link.append(link)
        self.length.append(length)
        self.follow.append(follow)
        return len(self.length) - 1
