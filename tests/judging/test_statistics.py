"""statistics.py: literal values worked out by hand or printed in the literature, and scipy as the oracle."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import optimize, stats

from alpaca.judging import statistics

# ---------------------------------------------------------------------------------------------------------------------
# Intervals.


def test_a_bootstrap_interval_is_the_percentiles_of_resampled_means():
    """Of a 0 and a 1 a resample is 0, 0.5 or 1 with probabilities 1/4, 1/2, 1/4: both ends are reached."""
    assert statistics.bootstrap_interval(np.mean, [0.0, 1.0]) == (0.0, 1.0)


def test_a_bootstrap_interval_of_a_share_is_near_the_binomial_one():
    """90 wins, 89 losses: ±1.96·sqrt(p·q/n) = ±7.3 points, and the bootstrap's percentiles are a binomial's."""
    outcomes = [1.0] * 90 + [0.0] * 89
    low, high = statistics.bootstrap_interval(np.mean, outcomes)
    expected = stats.binom.ppf([0.025, 0.975], 179, 90 / 179) / 179
    assert [low, high] == pytest.approx(expected, abs=1.01 / 179)
    assert [low, high] == pytest.approx([0.5028 - 0.0732, 0.5028 + 0.0732], abs=0.008)


def test_a_bootstrap_interval_equals_a_loop_over_resamples():
    values, weights = np.arange(7.0), np.array([1.0, 5, 2, 2, 9, 1, 1])
    random = np.random.default_rng(3)
    means = []
    for _ in range(500):
        drawn = random.integers(0, 7, size=7)
        means.append(sum(values[i] * weights[i] for i in drawn) / sum(weights[i] for i in drawn))
    found = statistics.bootstrap_interval(statistics.weighted_mean, values, weights, resamples=500, seed=3)
    assert found == pytest.approx(np.percentile(means, [2.5, 97.5]))


def test_blocks_of_resamples_change_nothing(monkeypatch):
    values = np.random.default_rng(0).normal(size=30)
    whole = statistics.bootstrap_interval(np.mean, values, resamples=1000)
    monkeypatch.setattr(statistics, "AT_ONCE", 300)
    assert statistics.bootstrap_interval(np.mean, values, resamples=1000) == whole


def test_the_same_seed_gives_the_same_interval_and_fewer_than_two_items_give_none():
    values = np.random.default_rng(0).normal(size=50)
    first, again, other = (
        statistics.bootstrap_interval(np.mean, values, resamples=999, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    for few in ([], [1.0]):
        assert all(map(math.isnan, statistics.bootstrap_interval(np.mean, few)))


@pytest.mark.parametrize("wins, count", [(0, 10), (10, 10), (7, 10), (126, 252)])
def test_the_wilson_interval_is_scipys(wins, count):
    expected = stats.binomtest(wins, count).proportion_ci(0.95, method="wilson")
    assert statistics.wilson_interval(wins / count, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Chance.


@pytest.mark.parametrize(
    "wins, losses, p",
    [
        (90, 89, 1.0),
        (0, 0, 1.0),
        (5, 0, 2 / 32),
        (0, 6, 2 / 64),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (3, 2, 1.0),
    ],
)
def test_the_sign_test_by_hand(wins, losses, p):
    assert statistics.sign_test(wins, losses) == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize("wins, losses", [(30, 10), (100, 152), (499, 500), (480, 520), (2600, 2400), (900, 100)])
def test_the_sign_test_is_the_sum_over_all_that_a_fair_coin_does_at_least_as_unevenly(wins, losses):
    """p = min(1, 2·Σ_{i ≤ min(w, l)} C(w + l, i) / 2^(w + l)), in whole numbers."""
    tail = sum(math.comb(wins + losses, i) for i in range(min(wins, losses) + 1))
    expected = Fraction(2 * tail, 2 ** (wins + losses))
    assert statistics.sign_test(wins, losses) == pytest.approx(min(1.0, float(expected)), rel=1e-9)


def test_fewer_than_the_fewest_items_show_nothing_in_a_sign_test():
    assert statistics.sign_test(statistics.FEWEST - 1, 0) >= 0.05 > statistics.sign_test(statistics.FEWEST, 0)


def test_the_detectable_win_rate_by_hand():
    """0.5 + (1.96 + 0.8416)·sqrt(1/4/252) = 0.5882; with 73 ties the variance is 179/252 of that: 0.5744."""
    assert statistics.detectable_win_rate(252, 252) == pytest.approx(0.5882, abs=1e-4)
    assert statistics.detectable_win_rate(252, 179) == pytest.approx(0.5744, abs=1e-4)
    assert math.isnan(statistics.detectable_win_rate(0, 0))


def test_the_detectable_win_rate_is_found_four_times_in_five():
    random = np.random.default_rng(0)
    rate = statistics.detectable_win_rate(252, 252)
    wins = random.binomial(252, rate, size=4000)
    p = {w: statistics.sign_test(int(w), 252 - int(w)) for w in np.unique(wins)}
    assert np.mean([p[w] < 0.05 for w in wins]) == pytest.approx(0.8, abs=0.04)


# ---------------------------------------------------------------------------------------------------------------------
# Length.


def slow_length_controlled(outcomes, differences):
    """The same loss, written out and minimised by scipy."""
    x = np.tanh(differences / np.std(differences, ddof=1))

    def loss(b):
        total = 1e-3 / 2 * (b[0] ** 2 + b[1] ** 2)
        for y, z in zip(outcomes, x, strict=True):
            p = 1 / (1 + math.exp(-(b[0] + b[1] * z)))
            total -= y * math.log(max(p, 1e-300)) + (1 - y) * math.log(max(1 - p, 1e-300))
        return total

    intercept = optimize.minimize(loss, [0.0, 0.0], method="BFGS", options={"gtol": 1e-8}).x[0]
    return 1 / (1 + math.exp(-intercept))


@pytest.mark.parametrize("seed", range(4))
def test_the_length_controlled_win_rate_equals_scipys_minimum(seed):
    random = np.random.default_rng(seed)
    differences = random.normal(100, 300, size=(3, 40))
    chance = 1 / (1 + np.exp(-(0.4 + 0.004 * differences)))
    outcomes = random.choice([0.0, 0.5, 1.0], size=(3, 40)) * 0.2 + 0.8 * (random.random((3, 40)) < chance)
    outcomes[2] = (differences[2] > 50).astype(float)  # length decides all: the fit is finite all the same
    found = statistics.length_controlled(outcomes, differences)
    slow = [slow_length_controlled(y, d) for y, d in zip(outcomes, differences, strict=True)]
    assert found == pytest.approx(slow, abs=2e-4)


def test_wins_that_follow_length_alone_vanish_at_equal_length():
    """The longer answer wins 4 in 5, and a's are longer in 30 of 40: 65% of wins, half at equal length.

    Two lengths and two coefficients: the fit is exact, logits +log 4 and -log 4, and 0 in the middle.
    """
    differences = np.array([[200.0] * 30 + [-200.0] * 10])
    outcomes = np.array([[1.0] * 24 + [0.0] * 6 + [1.0] * 2 + [0.0] * 8])
    assert outcomes.mean() == 0.65
    assert statistics.length_controlled(outcomes, differences)[0] == pytest.approx(0.5, abs=1e-3)


def test_without_a_difference_of_length_the_win_rate_is_the_plain_one():
    outcomes, no_difference = np.array([[1.0, 1.0, 0.5, 0.0]]), np.zeros((1, 4))
    assert statistics.length_controlled(outcomes, no_difference)[0] == pytest.approx(0.625, abs=1e-3)
    assert statistics.length_controlled(np.ones((1, 1)), np.ones((1, 1)))[0] > 0.99
    assert statistics.length_controlled(np.ones((1, 50)), np.arange(50.0)[None])[0] > 0.99


def test_correlation_is_scipys_and_none_where_nothing_varies():
    a, b = [1.0, 0.5, 0.0, 1.0, 0.0], [10.0, 3.0, -4.0, 2.0, 1.0]
    assert statistics.correlation(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)
    assert math.isnan(statistics.correlation([0.5, 0.5], [1.0, 2.0]))
    assert math.isnan(statistics.correlation([], []))


@pytest.mark.parametrize(
    "values, bins, expected",
    [
        ([5, 1, 4, 2, 3, 6], 3, [[1, 3], [2, 4], [0, 5]]),
        ([0, 0, 0, 0, 9], 5, [[0, 1, 2, 3], [4]]),
        ([7, 7], 2, [[0, 1]]),
        ([1, 2], 0, []),
        ([], 3, []),
    ],
)
def test_bins_hold_each_value_once_and_keep_equals_together(values, bins, expected):
    assert [places.tolist() for places in statistics.equal_bins(values, bins)] == expected


# ---------------------------------------------------------------------------------------------------------------------
# Agreement.


def test_cohens_kappa_of_the_textbook():
    """Two readers of 50 proposals, yes-yes 20, yes-no 5, no-yes 10, no-no 15: p_o 0.7, p_e 0.5, kappa 0.4."""
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    a, b = zip(*pairs, strict=True)
    assert statistics.raw_agreement(a, b) == pytest.approx(0.7)
    assert statistics.cohens_kappa(a, b) == pytest.approx(0.4)
    assert statistics.cohens_kappa([*a, None, "y"], [*b, "n", None]) == pytest.approx(0.4)


def test_agreement_without_a_common_item_or_a_second_category_is_undefined():
    assert math.isnan(statistics.raw_agreement([1, None], [None, 1]))
    assert math.isnan(statistics.cohens_kappa([1, None], [None, 1]))
    assert math.isnan(statistics.cohens_kappa([1, 1], [1, 1]))
    assert math.isnan(statistics.krippendorffs_alpha([[1, 1], [1, 1]]))
    assert math.isnan(statistics.krippendorffs_alpha([[1, None], [None, 1]]))


def digits(text: str) -> list:
    return [None if sign == "*" else int(sign) for sign in text.split()]


def test_krippendorffs_alpha_of_his_own_examples():
    """Section C of "Computing Krippendorff's Alpha-Reliability" (2011): 4 observers, 12 units, gaps; alpha 0.743.

    And three observers of 15 units: 0.691.
    """
    observers = [
        digits("1 2 3 3 2 1 4 1 2 * * *"),
        digits("1 2 3 3 2 2 4 1 2 5 * 3"),
        digits("* 3 3 3 2 3 4 2 2 5 1 *"),
        digits("1 2 3 3 2 4 4 1 2 5 1 *"),
    ]
    assert statistics.krippendorffs_alpha(observers) == pytest.approx(0.743, abs=5e-4)
    observers = [
        digits("* * * * * 3 4 1 2 1 1 3 3 * 3"),
        digits("1 * 2 1 3 3 4 3 * * * * * * *"),
        digits("* * 2 1 3 4 4 * 2 1 1 3 3 * 4"),
    ]
    assert statistics.krippendorffs_alpha(observers) == pytest.approx(0.691, abs=5e-4)


def test_krippendorffs_alpha_of_two_without_gaps_is_scotts_pi_for_a_small_sample():
    """alpha = 1 - (1 - pi)·(N - 1)/N with N values: pi pools the two judges' habits."""
    a, b = [1, 1, 0, 0, 1, 0.5, 1, 0], [1, 0, 0, 0, 1, 0.5, 0.5, 1]
    values = a + b
    expected = sum((values.count(v) / 16) ** 2 for v in set(values))
    pi = (5 / 8 - expected) / (1 - expected)
    assert statistics.krippendorffs_alpha([a, b]) == pytest.approx(1 - (1 - pi) * 15 / 16)
