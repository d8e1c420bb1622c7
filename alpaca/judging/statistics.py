"""What a comparison of two answerers can claim: intervals, tests and agreement, on numpy and scipy.

An outcome is 1.0 if a wins, 0.5 for a tie, 0.0 if b wins. Failed verdicts are left out before.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

RESAMPLES = 10_000  # the ends of a 95% interval then move by about a twentieth of its width with the seed
AT_ONCE = 1_000_000  # numbers in a block of resamples: 8 MB each
Z_LEVEL, Z_POWER = stats.norm.ppf([0.975, 0.8])
FEWEST = 6  # decided items: with five, even a clean sweep has p = 2/2^5 = 0.06 in a sign test


def without_nan(value):
    """Return figures with None for NaN, which JSON does not have; tuples become lists."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def bootstrap_interval(
    statistic: Callable[..., np.ndarray], *columns: Sequence[float], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Return the 95% percentile interval of a statistic over resampled items (Efron, 1979), by scipy.stats.bootstrap.

    It says how much the figure would vary with other instructions of the same kind. It knows only these items: with
    fewer than about 30 it is too narrow, and with identical items it has no width.

    Args:
        statistic: takes arrays of shape (…, items), one for each column, and the axis to reduce.
        columns: numbers of each item, float64, all of one length; an item keeps its columns together.
        resamples: number of resamples.
        seed: the same seed gives the same interval.

    Returns:
        The 2.5% and 97.5% percentiles; NaN for fewer than two items.
    """
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    count = len(arrays[0])
    if count < 2:
        return math.nan, math.nan
    low, high = stats.bootstrap(
        arrays,
        statistic,
        n_resamples=resamples,
        batch=max(1, AT_ONCE // count),
        vectorized=True,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(low), float(high)


def weighted_mean(values: np.ndarray, weights: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.average(values, axis=axis, weights=weights)


def wilson_interval(mean: float, count: int) -> tuple[float, float]:
    """Return the 95% score interval of a share (Wilson, 1927), for a few items, where a bootstrap fails.

    With ties as halves it is too wide rather than too narrow: a tie varies less than a win or a loss. scipy's
    ``proportion_ci`` equals it to 1e-12, but takes only whole wins.
    """
    if count == 0:
        return math.nan, math.nan
    z2 = Z_LEVEL**2 / count
    middle = (mean + z2 / 2) / (1 + z2)
    half = Z_LEVEL / (1 + z2) * math.sqrt(mean * (1 - mean) / count + z2 / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def sign_test(wins: int, losses: int) -> float:
    """Return the exact two-sided p-value of wins against losses, ties dropped: the sign test (Dixon and Mood, 1946).

    It is the probability that a fair coin is at least as uneven; 1 without a decided item.
    """
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def detectable_win_rate(items: int, decided: int) -> float:
    """Return the smallest win rate above 1/2 that a sign test at 5% finds with 80% power, by a normal approximation.

    1/2 + (z_0.975 + z_0.8)·sqrt(d/4/N) for N items, a share d of them decided. Ties do not vary, so with many ties a
    smaller difference is detected (Lachin, 1981, "Introduction to sample size determination").
    """
    if items == 0 or decided == 0:
        return math.nan
    return float(min(1.0, 0.5 + (Z_LEVEL + Z_POWER) * math.sqrt(decided / items / 4 / items)))


def length_controlled(outcomes: np.ndarray, differences: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the win rate that a would have if its answers were as long as b's, by logistic regression.

    P(a preferred) = σ(θ + φ·tanh(Δ/s)), with Δ the difference of lengths and s its standard deviation; the result is
    σ(θ). This is the length-controlled win rate of AlpacaEval 2 (Dubois et al., 2024, arXiv 2404.04475) without its
    leaderboard's difficulty of instructions, estimated from many models' answers to 805 instructions. A ridge of 1e-3,
    which only keeps the fit finite if everything is won or lost, replaces its cross-validated L1 penalty.

    Args:
        outcomes: in [0, 1], shape (items,) or (rows, items); each row is fitted separately.
        differences: length of a's answer less that of b's in characters, same shape.
        axis: the items', which must be the last one.

    Returns:
        float64, shape () or (rows,).
    """
    spread = differences.std(axis=-1, ddof=1, keepdims=True) if differences.shape[-1] > 1 else np.zeros(1)
    x = np.tanh(np.divide(differences, spread, out=np.zeros_like(differences), where=spread > 0))
    fitted = _fit_logistic(np.atleast_2d(outcomes), np.atleast_2d(x))
    return _sigmoid(fitted[:, 0]).reshape(outcomes.shape[:-1])


def _fit_logistic(y: np.ndarray, x: np.ndarray, ridge: float = 1e-3, tolerance: float = 1e-9) -> np.ndarray:
    """Return intercept and slope of each row, shape (rows, 2), by Newton's method with step halving.

    Minimizes Σ log(1 + e^η) - y·η + ridge/2·(θ² + φ²), η = θ + φ·x, which is strictly convex. scipy.optimize.minimize
    finds the same to 2e-4, a row at a time: 8.3 s for 10,000 resamples of 252 items; all rows at once take 1.3 s.
    """

    def losses(b, y, x):
        eta = b[:, :1] + b[:, 1:] * x
        return (np.logaddexp(0, eta) - y * eta).sum(axis=1) + ridge / 2 * (b**2).sum(axis=1)

    fitted = np.zeros((len(y), 2))
    moving = np.arange(len(y))  # rows that have not converged
    for _ in range(100):
        b, ys, xs = fitted[moving], y[moving], x[moving]
        p = _sigmoid(b[:, :1] + b[:, 1:] * xs)
        w = p * (1 - p)
        g0, g1 = (p - ys).sum(axis=1) + ridge * b[:, 0], ((p - ys) * xs).sum(axis=1) + ridge * b[:, 1]
        h00, h01, h11 = w.sum(axis=1) + ridge, (w * xs).sum(axis=1), (w * xs * xs).sum(axis=1) + ridge
        determinant = h00 * h11 - h01 * h01
        step = np.stack([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0], axis=1) / determinant[:, None]
        before = losses(b, ys, xs)
        for _ in range(30):
            worse = losses(b - step, ys, xs) > before + 1e-12 * np.abs(before)
            if not worse.any():
                break
            step[worse] /= 2
        fitted[moving] = b - step
        moving = moving[np.abs(step).max(axis=1) > tolerance]
        if not len(moving):
            break
    return fitted


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Pearson's r; NaN if one of the two is constant (scipy's pearsonr warns then, and fails below two)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def equal_bins(values: Sequence[float], bins: int) -> list[np.ndarray]:
    """Return the places of the values in at most ``bins`` bins of about equal size, lowest values first.

    Equal values stay together, so there may be fewer bins; each holds something.
    """
    values = np.asarray(values, np.float64)
    if not len(values) or bins < 1:
        return []
    edges = np.unique(np.quantile(values, np.arange(1, bins) / bins))
    number = np.digitize(values, edges, right=True)
    return [np.flatnonzero(number == n) for n in np.unique(number)]


def in_common(a: Sequence, b: Sequence) -> list[tuple]:
    """Return what two judges say of each item that both judged; None is missing."""
    return [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]


def raw_agreement(a: Sequence, b: Sequence) -> float:
    """Return the share of items on which two judges agree; None is missing. NaN where they share no item."""
    both = in_common(a, b)
    return sum(x == y for x, y in both) / len(both) if both else math.nan


def cohens_kappa(a: Sequence, b: Sequence, distance: Callable = operator.ne) -> float:
    """Return 1 - d_o/d_e: agreement of two judges beyond what their own habits give (Cohen, 1960).

    d_o is the mean distance of their values on an item, and d_e that of any two of their values. None is missing. NaN
    where they share no item, or where both always say the same thing. Neither numpy nor scipy has this or
    Krippendorff's alpha.
    """
    both = in_common(a, b)
    of_a, of_b = Counter(x for x, _ in both), Counter(y for _, y in both)
    by_chance = sum(distance(x, y) * n * m for x, n in of_a.items() for y, m in of_b.items())
    return float(1 - sum(distance(x, y) for x, y in both) * len(both) / by_chance) if by_chance else math.nan


def weighted_kappa(a: Sequence, b: Sequence) -> float:
    """Return Cohen's kappa with quadratic weights (1968), for scores: 4 and 5 differ less than 1 and 5."""
    return cohens_kappa(a, b, lambda x, y: (x - y) ** 2)


def krippendorffs_alpha(judges: Sequence[Sequence]) -> float:
    """Return 1 - D_o/D_e for nominal data, any number of judges and missing values.

    Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011). Each ordered pair of values within an item of m
    values counts 1/(m - 1), so that an item's values count m together, and those of items with one value nothing.

    Args:
        judges: for each the categories of all items, hashable; None is missing.

    Returns:
        1 is perfect agreement, 0 what chance would give; NaN where no two values meet or all are the same.
    """
    observed, totals = 0.0, Counter()
    for values in zip(*judges, strict=True):
        given = Counter(value for value in values if value is not None)
        if (m := given.total()) > 1:
            observed += (m**2 - sum(n**2 for n in given.values())) / (m - 1)
            totals += given
    expected = totals.total() ** 2 - sum(n**2 for n in totals.values())
    return 1 - (totals.total() - 1) * observed / expected if expected else math.nan
