"""overlap.py: the longest shared n-gram against a search by hand, duplicates, the nearest instruction."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracles
import pytest

from alpaca.data.instruction_sets import Item
from alpaca.judging import overlap


def item(id: str, instruction: str, input: str = "") -> Item:
    return Item(id, instruction, input, None, "")


def record(instruction: str, input: str = "", output: str = "") -> dict:
    return {"instruction": instruction, "input": input, "output": output}


def slow_longest(text: list[str], corpus: list[list[str]]) -> int:
    for n in range(len(text), 0, -1):
        grams = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
        if any(tuple(document[i : i + n]) in grams for document in corpus for i in range(len(document) - n + 1)):
            return n
    return 0


def test_the_longest_shared_run_of_words_and_where_it_is():
    """
    text      the cat sat on the mat
    corpus 0  the mat on
           1  a [cat sat on] a mat
    """
    text, corpus = "the cat sat on the mat".split(), ["the mat on".split(), "a cat sat on a mat".split()]
    assert overlap.longest_shared([text], iter(corpus)) == [(3, 1, 1)]


def test_a_run_of_words_stays_within_one_document_and_one_text():
    """c d stands across two documents, and b c across two texts."""
    assert overlap.longest_shared([["c", "d"]], iter([["a", "c"], ["d", "b"]])) == [(1, 0, 0)]
    assert overlap.longest_shared([["a", "b"], ["c"]], iter([["b", "c"]])) == [(1, 1, 0), (1, 0, 0)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("letters", ["ab", "abcd", "abcdefgh"])
def test_the_longest_run_equals_a_search_of_all_runs(letters, seed):
    random = np.random.default_rng([len(letters), seed])
    texts = [list(random.choice(list(letters), size=random.integers(0, 12))) for _ in range(25)]
    corpus = [list(random.choice([*letters, "z"], size=random.integers(0, 15))) for _ in range(25)]
    found = overlap.longest_shared(texts, iter(corpus))
    assert [length for length, _, _ in found] == [slow_longest(text, corpus) for text in texts]
    for text, (length, start, document) in zip(texts, found, strict=True):
        if length:
            runs = [text[i : i + length] for i in range(len(text) - length + 1)]
            assert start == next(i for i, run in enumerate(runs) if slow_longest(run, corpus) == length)
            run = text[start : start + length]
            assert document == next(i for i, doc in enumerate(corpus) if slow_longest(run, [doc]) == length)
        else:
            assert document is None


@pytest.mark.parametrize("texts, corpus", [([], [["a"]]), ([[]], [["a"]]), ([["a"]], []), ([["a"]], [[]])])
def test_nothing_to_compare_shares_nothing(texts, corpus):
    assert overlap.longest_shared(texts, iter(corpus)) == [(0, 0, None)] * len(texts)


def test_an_item_is_compared_with_instruction_input_and_output_of_a_record():
    items = [item("1", "Name the capital.", "It is a country in Europe."), item("2", "Зачем это нужно людям?")]
    records = [record("Sing."), record("Tell me", "more", "A COUNTRY, in Europe!"), record("Скажи зачем это нужно")]
    one, two = overlap.measure(items, records)
    assert (one.words, one.longest, one.ngram, one.ngram_record) == (9, 4, "a country in europe", 1)
    assert (two.words, two.longest, two.ngram, two.ngram_record) == (4, 3, "зачем это нужно", 2)
    assert (one.rouge_l, one.nearest_record) == (0.0, 0)
    assert (two.rouge_l, two.nearest_record) == (0.75, 2)  # 3 of 4 words on both sides


@pytest.mark.parametrize("seed", range(3))
def test_the_nearest_record_is_the_oracles(seed):
    random = np.random.default_rng(seed)
    texts = [" ".join(random.choice(list("abcdef"), size=random.integers(1, 25))) for _ in range(60)]
    items, records = [item(str(i), text) for i, text in enumerate(texts[:20])], [record(text) for text in texts[20:]]
    for text, found in zip(texts, overlap.measure(items, records), strict=False):
        scores = oracles.rouge_l(text, texts[20:])
        assert (found.rouge_l, found.nearest_record) == (max(scores), scores.index(max(scores)))


def test_duplicates_are_told_with_and_without_their_input():
    items = [item("same", "Add the numbers.", "1, 2"), item("other input", "add  the NUMBERS", "3"), item("new", "Add")]
    records = [record("Add the numbers", "1 2", "3"), record("Subtract")]
    assert overlap.duplicates(items, records) == (["same", "other input"], ["same"])


def test_the_summary_counts_items_that_are_long_enough():
    eight, thirteen = "one two three four five six seven eight", "a b c d e f g h i j k l m"
    items = [item("8", eight), item("13", thirteen), item("7", "one two three four five six seven"), item("0", "!")]
    found = overlap.summary(items, [record("So: " + eight), record("no", "", thirteen)], most=2)
    assert found["ngrams"] == [{"n": 8, "long_enough": 2, "shared": 2}, {"n": 13, "long_enough": 1, "shared": 1}]
    assert [near["id"] for near in found["nearest"]] == ["8", "7"]
    assert found["nearest"][0]["rouge_l"] == pytest.approx(2 * 8 / 17)
    assert found["nearest"][0]["record_instruction"] == "So: " + eight
    assert [(long["id"], long["words"], long["record"]) for long in found["longest"]] == [("13", 13, 1), ("8", 8, 0)]
    assert found["above_duplicate"] == 2 and found["same_instruction"] == [] and found["records"] == 2


def test_a_conversation_is_compared_by_its_questions_and_answers_not_by_a_system_text_that_all_share():
    system, question = "You are a patient tutor who explains every step.", "Name the longest river of Peru."
    turns = [("system", system), ("user", question), ("assistant", "The Ucayali."), ("user", "How long is it?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    chat = {"instruction": f"{system}\n\n{question}", "input": "", "output": "The Ucayali.", "messages": messages}
    other = record(f"{system}\n\nTranslate this letter into Danish.")
    asked = replace(item("a", f"{system}\n\n{question}"), messages=messages[:2])
    found = overlap.summary([asked], [other | {"messages": [messages[0], user("Translate this letter.")]}, chat])
    assert found["same_instruction"] == [] and found["nearest"][0]["record"] == 1
    assert found["nearest"][0]["record_instruction"] == f"{question}\n\nHow long is it?"
    assert found["nearest"][0]["rouge_l"] == pytest.approx(2 * 6 / (6 + 10))
    assert found["longest"][0] == {"id": "a", "words": 6, "ngram": question[:-1].lower(), "record": 1}


def user(content: str) -> dict:
    return {"role": "user", "content": content}
