"""What a comparison of two answerers can claim: intervals, tests and agreement, in numpy.

An outcome is 1.0 where a wins, 0.5 a tie, 0.0 where b wins; NaN is a verdict that failed, which every function here
leaves out. The oracles are scipy's and loops (tests/test_statistics.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 10_000  # the ends of a 95% interval then move by about a twentieth of its width with the seed
LEVEL = 0.95
AT_ONCE = 1_000_000  # numbers of a block of resamples: 8 MB each
Z_LEVEL, Z_POWER = 1.959964, 0.841621  # normal quantiles of 97.5% and of 80%


# ---------------------------------------------------------------------------------------------------------------------
# Intervals.


def bootstrap_interval(
    statistic: Callable[..., np.ndarray], *columns: Sequence[float], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The 95% percentile interval of a statistic over items drawn again, with replacement (Efron, 1979).

    It says how far the figure could lie elsewhere with other instructions of the same kind. It knows nothing beyond
    the items: of fewer than some 30 it is too narrow, and of items that are all alike it has no width.

    Args:
        statistic: of arrays of shape (rows, items), one for each column, to numbers of shape (rows,).
        columns: numbers of each item, float64, all of one length; an item keeps its columns together.
        resamples: how often all items are drawn.
        seed: of the draws: the same one gives the same interval.

    Returns:
        The 2.5% and 97.5% percentiles; NaN without items.
    """
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    count = len(arrays[0])
    if count == 0:
        return math.nan, math.nan
    random = np.random.default_rng(seed)
    block = max(1, AT_ONCE // count)
    values = []
    for start in range(0, resamples, block):
        drawn = random.integers(0, count, size=(min(block, resamples - start), count))
        values.append(statistic(*(array[drawn] for array in arrays)))
    low, high = np.percentile(np.concatenate(values), [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def mean_of_rows(values: np.ndarray) -> np.ndarray:
    return values.mean(axis=-1)


def weighted_mean_of_rows(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (values * weights).sum(axis=-1) / weights.sum(axis=-1)


def wilson_interval(mean: float, count: int) -> tuple[float, float]:
    """The 95% score interval of a share (Wilson, 1927), for a handful of items, where a bootstrap is blind.

    With ties as halves it is too wide rather than too narrow: a tie varies less than a win or a loss.
    """
    if count == 0:
        return math.nan, math.nan
    z2 = Z_LEVEL**2 / count
    middle = (mean + z2 / 2) / (1 + z2)
    half = Z_LEVEL / (1 + z2) * math.sqrt(mean * (1 - mean) / count + z2 / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


# ---------------------------------------------------------------------------------------------------------------------
# Is it chance?


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided p-value of wins against losses, ties dropped: the sign test (Dixon and Mood, 1946).

    p = min(1, 2·Σ_{i ≤ min(w, l)} C(w+l, i) / 2^(w+l)). It is what a fair coin would do at least as unevenly; 1 without
    a decided item.
    """
    count, tail, term = wins + losses, 0, 1
    for i in range(min(wins, losses) + 1):
        tail += term
        term = term * (count - i) // (i + 1)
    return min(1.0, 2 * tail / 2**count) if count < 1000 else min(1.0, _ratio(2 * tail, count))


def _ratio(number: int, power: int) -> float:
    """number / 2^power where either may be too large for a float."""
    shift = max(0, number.bit_length() - 64)
    return math.ldexp(float(number >> shift), shift - power)


def detectable_win_rate(items: int, decided: int) -> float:
    """The smallest win rate above 1/2 that a sign test at 5% finds with 80% power, to a normal approximation.

    1/2 + (z_0.975 + z_0.8)·sqrt(d/4/N) for N items of which a share d is decided; ties vary not at all, and so with
    many ties a smaller difference shows (Lachin, 1981, "Introduction to sample size determination").
    """
    if items == 0 or decided == 0:
        return math.nan
    return min(1.0, 0.5 + (Z_LEVEL + Z_POWER) * math.sqrt(decided / items / 4 / items))


# ---------------------------------------------------------------------------------------------------------------------
# Length.


def length_controlled(outcomes: np.ndarray, differences: np.ndarray) -> np.ndarray:
    """The win rate that a would have if its answers were as long as b's, by logistic regression.

    P(a preferred) = σ(θ + φ·tanh(Δ/s)), Δ the difference of lengths, s its standard deviation; the answer is σ(θ). That
    is the length-controlled win rate of AlpacaEval 2 (Dubois et al., 2024, arXiv 2404.04475) without what it knows from
    its leaderboard: an instruction's difficulty, estimated from many models' answers to its 805 instructions, and two
    answerers that only gamed length. Its lengths are in characters, as they should be here. In place of its L1 penalty,
    chosen by cross-validation, stands a ridge of 1e-3, which only keeps the fit finite where all is won or lost.

    Args:
        outcomes: in [0, 1], shape (rows, items); each row is fitted by itself.
        differences: length of a's answer less that of b's, same shape.

    Returns:
        float64, shape (rows,).
    """
    spread = differences.std(axis=-1, ddof=1, keepdims=True) if differences.shape[-1] > 1 else np.zeros((1, 1))
    x = np.tanh(np.divide(differences, spread, out=np.zeros_like(differences), where=spread > 0))
    return _sigmoid(_fit_logistic(outcomes, x)[:, 0])


def _fit_logistic(y: np.ndarray, x: np.ndarray, ridge: float = 1e-3, tolerance: float = 1e-9) -> np.ndarray:
    """Intercept and slope of each row, shape (rows, 2): Newton's method, halved where it would overshoot.

    Minimises Σ log(1 + e^η) - y·η + ridge/2·(θ² + φ²), η = θ + φ·x, which is strictly convex.
    """

    def losses(b, y, x):
        eta = b[:, :1] + b[:, 1:] * x
        return (np.logaddexp(0, eta) - y * eta).sum(axis=1) + ridge / 2 * (b**2).sum(axis=1)

    fitted = np.zeros((len(y), 2))
    todo = np.arange(len(y))  # rows that still move
    for _ in range(100):
        b, ys, xs = fitted[todo], y[todo], x[todo]
        p = _sigmoid(b[:, :1] + b[:, 1:] * xs)
        w = p * (1 - p)
        g0, g1 = (p - ys).sum(axis=1) + ridge * b[:, 0], ((p - ys) * xs).sum(axis=1) + ridge * b[:, 1]
        h00, h01, h11 = w.sum(axis=1) + ridge, (w * xs).sum(axis=1), (w * xs * xs).sum(axis=1) + ridge
        determinant = h00 * h11 - h01 * h01
        step = np.stack([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0], axis=1) / determinant[:, None]
        before, scale = losses(b, ys, xs), np.ones(len(todo))
        for _ in range(30):
            worse = losses(b - scale[:, None] * step, ys, xs) > before + 1e-12 * np.abs(before)
            if not worse.any():
                break
            scale[worse] /= 2
        step *= scale[:, None]
        fitted[todo] = b - step
        todo = todo[np.abs(step).max(axis=1) > tolerance]
        if not len(todo):
            break
    return fitted


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's r; NaN where one of the two never varies."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def equal_bins(values: Sequence[float], bins: int) -> list[np.ndarray]:
    """Places of the values, cut at quantiles into at most that many bins of about equal size, lowest first.

    Equal values stay together, so that there may be fewer bins; none is empty.
    """
    values = np.asarray(values, np.float64)
    if not len(values) or bins < 1:
        return []
    edges = np.unique(np.quantile(values, np.arange(1, bins) / bins))
    number = np.digitize(values, edges, right=True)
    return [np.flatnonzero(number == n) for n in np.unique(number)]


# ---------------------------------------------------------------------------------------------------------------------
# Agreement.


def raw_agreement(a: Sequence, b: Sequence) -> float:
    """The share of items that two judges decide alike; None is missing. NaN where they share no item."""
    both = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return sum(x == y for x, y in both) / len(both) if both else math.nan


def cohens_kappa(a: Sequence, b: Sequence) -> float:
    """(p_o - p_e)/(1 - p_e): agreement of two judges beyond what their own habits give (Cohen, 1960).

    Nominal; None is missing. NaN where they share no item, or where both say one same thing only.
    """
    both = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if not both:
        return math.nan
    observed = sum(x == y for x, y in both) / len(both)
    expected = (
        sum(
            sum(x == category for x, _ in both) * sum(y == category for _, y in both)
            for category in {category for pair in both for category in pair}
        )
        / len(both) ** 2
    )
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan


def krippendorffs_alpha(judges: Sequence[Sequence]) -> float:
    """1 - D_o/D_e for nominal data, any number of judges and missing values (Krippendorff, 2011).

    "Computing Krippendorff's Alpha-Reliability". From the matrix of coincidences: a pair of values within an item of m
    values counts 1/(m - 1), so that items with one value or none count nothing.

    Args:
        judges: for each the categories of all items, hashable; None is missing.

    Returns:
        1 is perfect agreement, 0 what chance would give; NaN where no two values meet or all are the same.
    """
    coincidences: dict[tuple, float] = {}
    for values in zip(*judges, strict=True):
        there = [value for value in values if value is not None]
        for i, first in enumerate(there):
            for j, second in enumerate(there):
                if i != j:
                    key = (first, second)
                    coincidences[key] = coincidences.get(key, 0.0) + 1 / (len(there) - 1)
    totals: dict = {}
    for (first, _), weight in coincidences.items():
        totals[first] = totals.get(first, 0.0) + weight
    count = sum(totals.values())
    expected = count**2 - sum(total**2 for total in totals.values())
    if count <= 1 or expected < 1e-9:
        return math.nan
    observed = sum(weight for (first, second), weight in coincidences.items() if first != second)
    return 1 - (count - 1) * observed / expected
