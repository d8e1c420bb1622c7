"""RougePool gives rouge_score's floats, bit for bit (tests/oracles.py)."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score import tokenize as rouge_score_tokenize

from alpaca.rouge import RougePool, tokenize

# The bit-parallel kernel works in words of 64 tokens.
LENGTHS = (0, 1, 2, 7, 63, 64, 65, 128, 129)
quick = settings(deadline=None, database=None, max_examples=60)


def assert_same_floats(text: str, pool: list[str]) -> None:
    scores = RougePool(pool).scores(text)
    assert scores.dtype == np.float64
    assert scores.tolist() == oracles.rouge_l(text, pool)  # exact: no tolerance


@quick
@given(st.text())
@example("")
@example("Don't; café, naïve İstanbul ſ K 1,000.5 ß")
def test_tokens_are_those_of_rouge_score(text):
    assert tokenize(text) == rouge_score_tokenize.tokenize(text, None)


@quick
@given(st.text(alphabet="abAB1 .,é\n"), st.lists(st.text(alphabet="abAB1 .,é\n"), max_size=4))
def test_floats_are_those_of_rouge_score_for_any_text(text, pool):
    assert_same_floats(text, pool)


@quick
@given(st.randoms(use_true_random=False), st.sampled_from((1, 3, 40)))
def test_floats_are_those_of_rouge_score_at_the_word_sizes_of_the_kernel(rng, distinct):
    def text(length):
        return " ".join(f"t{rng.randrange(distinct)}" for _ in range(length))

    assert_same_floats(text(rng.choice(LENGTHS)), [text(length) for length in LENGTHS])


def test_small_scores_by_hand():
    """query: a b c d;  lcs 4 of 4 → 1;  lcs 2: p = 2/2, r = 2/4 → 2/3;  "d c b a" has lcs 1 → 1/4;  nothing → 0"""
    scores = RougePool(["A, b; c (d)!", "a d", "d c b a", "x y"]).scores("a b c d")
    assert scores.tolist() == [1.0, 2 / 3, 0.25, 0.0]


def test_scores_are_in_the_order_of_adding_and_a_text_is_not_added_by_asking():
    pool = RougePool(["one two"])
    pool.scores("three four")
    pool.add("three four")
    assert len(pool) == 2
    assert pool.scores("three four").tolist() == [0.0, 1.0]


def test_an_empty_pool_gives_no_scores():
    scores = RougePool().scores("a b")
    assert scores.shape == (0,) and scores.dtype == np.float64


@pytest.mark.parametrize("text", ["", "...", "日本語", "é"])
def test_a_text_without_tokens_scores_0_and_not_nan(text):
    assert RougePool(["a b", text]).scores(text).tolist() == [0.0, 0.0]
    assert RougePool([text]).scores("a b").tolist() == [0.0]


def test_scores_at_exactly_7_tenths_fall_on_the_side_that_they_fell_on_in_the_original():
    """2·lcs/(a+b) = 7/10 in every case, but as floats some are 0.7 (kept: not above 0.7), some 0.7000000000000001."""

    def pair(lcs, a, b):
        common = "c " * lcs
        return common + "a " * (a - lcs), common + "b " * (b - lcs)

    text, other = pair(7, 10, 10)
    assert RougePool([other]).scores(text).tolist() == [0.7]
    text, other = pair(7, 9, 11)
    assert RougePool([other]).scores(text).tolist() == [0.7000000000000001]
    for lcs in (7, 14, 21):
        for a in range(lcs, 20 * lcs // 7 - lcs + 1):
            text, other = pair(lcs, a, 20 * lcs // 7 - a)
            assert_same_floats(text, [other])


@quick
@given(st.lists(st.text(alphabet="abc "), min_size=1, max_size=6))
@example(["alone"])
@example(["a b", "", "a b"])
def test_the_nearest_of_each_text_is_the_highest_score_against_the_others(texts):
    others = [texts[:i] + texts[i + 1 :] for i in range(len(texts))]
    expected = [max(oracles.rouge_l(text, rest), default=0.0) for text, rest in zip(texts, others, strict=True)]
    assert RougePool(texts).nearest().tolist() == expected


def test_the_nearest_are_found_across_blocks_and_each_pair_is_counted_once():
    """1,600 texts are more than one block of 2,000,000 pairs; the twin of text 0 is the last one."""
    texts = [f"w{i} w{i // 2} w{i // 3} x" for i in range(1599)] + ["w0 w0 w0 x"]
    pool, done = RougePool(texts), []
    nearest = pool.nearest(done.append)
    assert len(done) > 1 and sum(done) == 1600 * 1599 // 2
    for i in (0, 1, 799, 1249, 1250, 1251, 1598, 1599):
        assert nearest[i] == np.delete(pool.scores(texts[i]), i).max()
    assert nearest[0] == nearest[1599] == 1.0


def test_more_tokens_than_code_points_below_the_surrogates():
    """Token 0xD800 − 3 and the nine after it straddle the gap of code points that are no characters."""
    pool = RougePool([" ".join(f"w{i}" for i in range(0xD800 - 4))])
    names = [f"new{i}" for i in range(10)]
    texts = [" ".join(names[i:] + names[:i]) for i in range(10)] + ["new4 new4 w0 new9", "w1 new2"]
    for text in texts:
        pool.add(text)
    for text in texts:
        assert pool.scores(text).tolist()[1:] == oracles.rouge_l(text, texts)
