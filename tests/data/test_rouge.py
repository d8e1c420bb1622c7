"""RougePool gives rouge_score's floats, bit for bit (tests/oracles.py)."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score import tokenize as rouge_score_tokenize

from alpaca import UserError
from alpaca.data import rouge
from alpaca.data.rouge import RougePool, count_words, is_mostly_unseen, tokenize, tokenize_unicode

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


def test_scores_of_each_are_the_scores_one_by_one(monkeypatch):
    texts = [f"w{i % 7} w{i % 5} w{i % 3} x{i}" for i in range(40)] + ["", "w1 " * 70]
    pool = RougePool(texts[::2])
    monkeypatch.setattr(rouge, "PAIRS_AT_ONCE", 100)  # blocks of 4 rows
    for text, scores in zip(texts, pool.scores_of_each(texts), strict=True):
        assert scores.tolist() == pool.scores(text).tolist() == oracles.rouge_l(text, texts[::2])
    assert [scores.tolist() for scores in RougePool().scores_of_each(["a", "b"])] == [[], []]


# ---------------------------------------------------------------------------------------------------------------------
# More tokens than code points.


def test_token_numbers_that_are_surrogates_compare_like_others():
    """Numbers 0xD800 to 0xDFFF are code points that no encoder accepts; rapidfuzz encodes nothing."""
    pool = RougePool([" ".join(f"w{i}" for i in range(0xD800 - 4))])
    names = [f"new{i}" for i in range(10)]
    texts = [" ".join(names[i:] + names[:i]) for i in range(10)] + ["new4 new4 w0 new9", "w1 new2"]
    for text in texts:
        pool.add(text)
    for text in texts:
        assert pool.scores(text).tolist()[1:] == oracles.rouge_l(text, texts)
        assert exceeds(pool, text, 0.7) is not None


@quick
@given(st.lists(st.text(alphabet="abcdefgh "), min_size=2, max_size=8), st.sampled_from((0.0, 0.5, 0.7)))
def test_tokens_beyond_the_last_code_point_compare_with_those_below(texts, threshold):
    """From number 4 on, here, a text with such a token is an array of numbers and the others stay strings."""
    texts = [" ".join(text) for text in texts]
    expected = RougePool(texts[1:]).nearest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rouge, "CHARACTERS", 4)
        pool = RougePool(texts[1:])
        assert pool.scores(texts[0]).tolist() == oracles.rouge_l(texts[0], texts[1:])
        nearest = exceeds_slowly(texts[0], texts[1:], threshold)
        assert exceeds(pool, texts[0], threshold) == nearest and pool.admit(texts[:1], threshold) == [nearest]
        assert RougePool(texts[1:]).nearest().tolist() == expected.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Decisions without scores.


def exceeds(pool: RougePool, text: str, threshold: float) -> int | None:
    """Return admit()'s verdict on one text, and add nothing."""
    return pool.admit([text], threshold, lambda i, nearest: False)[0]


def exceeds_slowly(text: str, pool: list[str], threshold: float) -> int | None:
    scores = oracles.rouge_l(text, pool)
    best = max(scores, default=-1.0)
    return scores.index(best) if scores and best > threshold else None


THRESHOLDS = (0.0, 0.2, 1 / 3, 0.5, 2 / 3, 0.7, 0.7000000000000001, 0.9, 1.0)


@settings(quick, max_examples=150)
@given(
    st.lists(st.lists(st.sampled_from("aaabbcdefgh"), max_size=9).map(" ".join), max_size=12),
    st.sampled_from(THRESHOLDS),
    st.booleans(),
)
@example(["a b", "a c"], 0.5, False)  # 2·1/4: not above
@example(["a b c", "a b d"], 2 / 3, True)
@example(["", ""], 0.0, False)
def test_exceeds_is_the_decision_of_the_scores_while_the_pool_grows(texts, threshold, learn):
    pool, in_blocks, added, verdicts = RougePool(), RougePool(), [], []
    if learn:
        pool.learn(texts)
        in_blocks.learn(texts)
    for text in texts:
        found = exceeds(pool, text, threshold)
        assert found == exceeds_slowly(text, added, threshold)
        verdicts.append(found)
        if found is None:
            pool.add(text)
            added.append(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rouge, "TEXTS_AT_ONCE", 3)
        patch.setattr(rouge, "POSTINGS_AT_ONCE", 2)
        assert in_blocks.admit(texts[:4], threshold) + in_blocks.admit(texts[4:], threshold) == verdicts
    assert len(in_blocks) == len(added)


@quick
@given(st.randoms(use_true_random=False), st.sampled_from((0.3, 0.5, 2 / 3, 0.7)), st.booleans())
def test_exceeds_misses_no_longer_text(rng, threshold, learn):
    """Texts of up to 130 tokens, copies of each other with some tokens changed, so that many are near the threshold."""
    texts = [[f"t{int(200 * rng.random() ** 3)}" for _ in range(rng.choice(LENGTHS))] for _ in range(6)]
    for _ in range(14):
        copy = list(rng.choice(texts))
        for _ in range(int(len(copy) * rng.random())):
            copy[rng.randrange(len(copy))] = f"t{rng.randrange(200)}"
        texts.append(copy[rng.randrange(5) :])
    rng.shuffle(texts)
    texts = [" ".join(text) for text in texts]
    pool = RougePool()
    if learn:
        pool.learn(texts[::2])
    expected = []
    for i, text in enumerate(texts):
        scores = pool.scores(text)
        expected.append(int(scores.argmax()) if scores.max(initial=0.0) > threshold else None)
        assert exceeds(pool, text, threshold) == expected[-1], i
        pool.add(text)
    assert RougePool().admit(texts, threshold, lambda i, nearest: nearest == expected[i]) == expected  # all are added
    kept, some = [], RougePool()
    assert len(some.admit(texts, threshold, lambda i, nearest: bool(i % 3) and not kept.append(texts[i]))) == len(texts)
    assert len(some) == len(kept) and some.scores(texts[0]).tolist() == RougePool(kept).scores(texts[0]).tolist()


def test_a_text_whose_bits_all_differ_is_compared_where_the_lengths_allow_it():
    """The other has 64 tokens more, one for each bit: all bits differ, as in F > 0 they may."""
    pool = RougePool(["a " + " ".join(f"w{i}" for i in range(64))])
    assert exceeds(pool, "a", 0.0) == 0


def test_exceeds_at_exactly_7_tenths():
    """F = 0.7 as a float is not above 0.7; of 9 and 11 tokens it is 0.7000000000000001, which is."""
    for a in range(7, 14):
        text, other = "c " * 7 + "a " * (a - 7), "c " * 7 + "b " * (13 - a)
        above = oracles.rouge_l(text, [other])[0] > 0.7
        assert (exceeds(RougePool([other]), text, 0.7) == 0) == above
    assert exceeds(RougePool(["c " * 7 + "b " * 3]), "c " * 7 + "a " * 3, 0.7) is None
    assert exceeds(RougePool(["c " * 7 + "b " * 4]), "c " * 7 + "a " * 2, 0.7) == 0


def test_exceeds_names_the_nearest_and_of_equals_the_first():
    pool = RougePool(["x y", "a b c d", "a b c e f", "a b c d"])
    assert exceeds(pool, "a b c d", 0.5) == 1
    assert exceeds(pool, "a b c e", 0.5) == 2


def test_thresholds_from_1_on_and_a_change_of_threshold():
    pool = RougePool(["a b", ""])
    assert exceeds(pool, "a b", 1.0) is None and exceeds(pool, "a b", 7) is None
    assert exceeds(pool, "a c", 0.4) == 0 and exceeds(pool, "a c", 0.5) is None and exceeds(pool, "a c", 0.4) == 0
    assert exceeds(pool, "", 0.0) is None


def test_the_index_leaves_few_pairs_to_compare(monkeypatch):
    """Else the decisions would be right, and slow."""
    texts = [f"what is the {i} of {i * 7 % 1000} and the {i % 37} in {i % 101}" for i in range(1000)]  # all alike
    pool, compared, cpdist = RougePool(texts), [], rouge.cpdist
    monkeypatch.setattr(rouge, "cpdist", lambda a, b, **how: compared.append(len(b)) or cpdist(a, b, **how))
    for text in texts[:100]:
        assert exceeds(pool, text, 0.7) is not None
    assert 100 <= sum(compared) < 100 * 100  # of 1,000 each


# ---------------------------------------------------------------------------------------------------------------------
# Scripts other than Latin.


@quick
@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_ascii_text_has_the_same_tokens_beside_other_letters(text):
    assert tokenize_unicode(text) == tokenize(text) == tokenize_unicode(f"é {text}")[1:]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Don't_stop: STRASSE, Straße!", ["don", "t", "stop", "strasse", "strasse"]),
        ("ＡＢＣ１２ caf\u00e9 cafe\u0301", ["abc12", "café", "café"]),
        ("今天天气很好！Hello世界", ["今", "天", "天", "气", "很", "好", "hello", "世", "界"]),
        ("カードを", ["カ", "ー", "ド", "を"]),
        ("हिन्दी में लिखो", ["हिन्दी", "में", "लिखो"]),
        ("ที่นี่ ২৩ Привет", ["ที่", "นี่", "২৩", "привет"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("\ud800 🙂 …", []),
    ],
)
def test_unicode_tokens(text, tokens):
    assert tokenize_unicode(text) == tokens


def test_words_are_between_white_space_and_characters_in_scripts_without_it():
    texts = ["don't stop – now", "naïve café", "今天天气很好！", "Say 世界 (world).", "ที่นี่", "…", " "]
    assert [count_words(text) for text in texts] == [4, 2, 6, 4, 2, 1, 0]


def test_chinese_is_compared_by_the_unicode_tokenizer_alone():
    texts = ["请写一首关于春天的诗", "请写一首关于秋天的诗", "解释光合作用"]
    assert exceeds(RougePool(texts[:1]), texts[0], 0.7) is None
    pool = RougePool(texts[:1], tokenizer="unicode")
    assert pool.scores(texts[1]).tolist() == [0.9]  # 9 of 10 characters
    assert exceeds(pool, texts[1], 0.7) == 0 and exceeds(pool, texts[2], 0.7) is None


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(UserError, match="rouge or unicode, not 'words'"):
        RougePool(tokenizer="words")


def test_what_the_default_tokenizer_does_not_see_is_said():
    expected = {
        "plain": 0,
        "naïve café": 0,
        "Привет": 1,
        "Привет wor": 1,
        "Привет worlds": 0,
        "请写诗": 1,
        "…": 0,
        "": 0,
    }
    assert {text: is_mostly_unseen(text) for text in expected} == expected
