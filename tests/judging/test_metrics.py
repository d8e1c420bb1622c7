"""alpaca/judging/metrics.py: ROUGE-L as Tk-Instruct has it, and losses on references."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from alpaca.data.instruction_sets import Answers, Item
from alpaca.judging import metrics

WORDS = [
    "running",
    "runs",
    "the",
    "generalization",
    "Generally",
    "sky",
    "skies",
    "can't",
    "Zürich",
    "42",
    "!?",
    "-",
    "",
]


def tk_instruct(answer: str, truth: str) -> float:
    """What Tk-Instruct's compute_metrics.py calls for English."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    return scorer.score(prediction=answer, target=truth)["rougeL"].fmeasure


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=12), st.lists(st.sampled_from(WORDS), max_size=12))
def test_rouge_l_equals_rouge_score_with_the_stemmer(answer, truth):
    answer, truth = " ".join(answer), " ".join(truth)
    assert metrics.rouge_l([(answer, truth)]) == [tk_instruct(answer, truth)]


def test_rouge_l_by_hand():
    """the cats sat / the cat was sitting: "cats" is stemmed to "cat", "sat" is not "sit": lcs 2 of 3 and of 4."""
    assert metrics.rouge_l([("The cats sat", "the cat was sitting")]) == [pytest.approx(2 * 2 / 7)]
    assert metrics.rouge_l([("", "something"), ("дом", "дом"), ("a", "a")]) == [0.0, 0.0, 1.0]


def test_losses_are_read_where_rows_have_them():
    rows = {
        "1": {"reference_loss": 2.5, "reference_tokens": 4},
        "2": {"output": "x"},
        "3": {"reference_loss": None, "reference_tokens": 4},
        "4": {"reference_loss": 1, "reference_tokens": 0},
    }
    assert metrics.reference_losses(rows) == {"1": (2.5, 4)}


ITEMS = [
    Item("1", "Say a.", "", "alpha beta", ""),
    Item("2", "Say b.", "", "gamma", ""),
    Item("3", "Say c.", "", "delta", ""),
    Item("4", "Say what you like.", "", None, ""),
]


def answers(name: str, outputs: dict[str, str], losses: dict[str, tuple[float, int]] | None = None) -> Answers:
    rows = {id: {"reference_loss": loss, "reference_tokens": n} for id, (loss, n) in (losses or {}).items()}
    return Answers(name, outputs, [item.id for item in ITEMS if item.id not in outputs], rows)


def test_means_are_over_what_was_answered_and_differences_over_what_both_answered():
    a = answers("a", {"1": "alpha beta", "2": "", "4": "hm"})
    b = answers("b", {"1": "alpha", "2": "gamma", "3": "delta", "4": "well"})
    (first, second), scores = metrics.summary(ITEMS, [a, b])
    assert scores == [{"1": 1.0, "2": 0.0}, {"1": pytest.approx(2 / 3), "2": 1.0, "3": 1.0}]
    assert (first["rouge_l"]["mean"], first["rouge_l"]["items"]) == (0.5, 2)
    assert (first["answered"], first["unanswered"], first["empty"], first["characters"]) == (3, 1, 1, 4)
    assert second["rouge_l"]["mean"] == pytest.approx(8 / 9)
    assert second["rouge_l_difference"]["mean"] == pytest.approx((-1 / 3 + 1) / 2)
    assert second["rouge_l_difference"]["items"] == 2 and first["rouge_l_difference"] is None
    assert first["loss"] is None


def test_the_loss_is_weighted_by_tokens():
    """1 nat on 3 tokens and 5 on 1: 2 nats a token, perplexity e²; a second model 0.5 lower on each."""
    texts = {"1": "x", "2": "y"}
    a = answers("a", texts, {"1": (1.0, 3), "2": (5.0, 1)})
    b = answers("b", texts, {"1": (0.5, 3), "2": (4.5, 1)})
    other = answers("other tokenizer", texts, {"1": (0.5, 4), "2": (4.5, 1)})
    (first, second, third), _ = metrics.summary(ITEMS, [a, b, other])
    assert (first["loss"]["mean"], first["loss"]["perplexity"]) == (2.0, pytest.approx(math.exp(2)))
    assert second["loss_difference"]["mean"] == -0.5 and second["loss_difference"]["interval"] == (-0.5, -0.5)
    assert third["loss"]["mean"] == pytest.approx(1.3) and third["loss_difference"] is None


def test_a_loss_that_is_no_number_is_left_out_and_counted():
    a = answers("a", {"1": "x", "2": "y", "3": "z"}, {"1": (2.0, 3), "2": (math.nan, 1), "3": (math.inf, 1)})
    (found,), _ = metrics.summary(ITEMS, [a])
    assert (found["loss"]["mean"], found["loss"]["items"], found["loss_not_finite"]) == (2.0, 1, 2)


def test_one_score_has_a_mean_and_no_interval():
    (found,), scores = metrics.summary(ITEMS, [answers("a", {"1": "alpha"}, {"1": (1.0, 3)})])
    assert scores == [{"1": pytest.approx(2 / 3)}] and found["rouge_l"]["items"] == 1
    assert found["loss"]["mean"] == 1.0 and all(map(math.isnan, found["rouge_l"]["interval"]))
