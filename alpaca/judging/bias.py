"""A judge's biases: the position in which an answer is shown, and its length.

Figures are plain dictionaries, as in report.json.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from alpaca.judging import statistics
from alpaca.judging.verdicts import Ask, Verdict, counts, fold, grouped

SMALL = 10  # items; for fewer no rate is given: for 9, evenly split, the interval is 55 points wide
NONE = (math.nan, math.nan)


def rate_of(outcomes: Sequence[float]) -> dict:
    """Return the counts, win rate and Wilson interval of a bin or a category, which has few items."""
    rate = sum(outcomes) / len(outcomes)
    return counts(outcomes) | {"win_rate": rate, "interval": statistics.wilson_interval(rate, len(outcomes))}


def position_bias(asks: Sequence[Ask], seed: int = 0) -> dict:
    """Return how often one judge preferred what it saw first, among the asks that it decided.

    Asked in both orders, a judge without bias prefers the first in half of them by construction. So items are what
    varies, and the test is a sign test over items: those where more firsts than seconds were preferred, against the
    reverse. A model's ask without its other order (failed, or not asked yet) says who is better rather than which
    position is preferred, and is left out; a person's sides were drawn at random.

    Returns:
        decided asks, of decided_items; share_first of them with a bootstrap interval over items and p; both_orders,
        the number of items with unequal answers that were asked in both orders without a failure, and agreed, the
        share of them with the same verdict in both.
    """
    answered = Counter(ask.id for ask in asks if ask.preferred is not None)
    counting = [ask for ask in asks if ask.kind == "person" or answered[ask.id] == 2]
    decided = grouped((ask.id, ask.preferred == "first") for ask in counting if ask.preferred in ("first", "second"))
    firsts, weights = [sum(each) for each in decided.values()], [len(each) for each in decided.values()]
    shares = [first / weight for first, weight in zip(firsts, weights, strict=True)]
    both = [v.agreed for v in fold(ask for ask in asks if not ask.equal) if v.agreed is not None]
    return {
        "decided": sum(weights),
        "decided_items": len(decided),
        "share_first": sum(firsts) / sum(weights) if decided else math.nan,
        "interval": statistics.bootstrap_interval(statistics.weighted_mean, shares, weights, seed=seed),
        "p": statistics.sign_test(sum(share > 0.5 for share in shares), sum(share < 0.5 for share in shares)),
        "both_orders": len(both),
        "agreed": sum(both) / len(both) if both else math.nan,
    }


def length_bias(verdicts: Sequence[Verdict], lengths: Mapping[str, tuple[int, int]], seed: int = 0) -> dict:
    """Return whether the longer answer wins.

    Args:
        verdicts: of one judge.
        lengths: item id → characters of a's answer and of b's.
        seed: of the bootstrap.

    Returns:
        longer: mean difference a - b in characters; correlation of outcome and difference; bins by difference, with
        counts, win rate and Wilson interval; length_controlled win rate with its bootstrap interval, NaN for fewer
        than statistics.FEWEST items, too few for a regression.
    """
    judged = [verdict for verdict in verdicts if verdict.outcome is not None]
    outcomes = np.array([verdict.outcome for verdict in judged], np.float64)
    differences = np.array([lengths[v.id][0] - lengths[v.id][1] for v in judged], np.float64)
    bins = []
    for places in statistics.equal_bins(differences, min(5, len(judged) // SMALL)):
        ends = {"from": int(differences[places].min()), "to": int(differences[places].max())}
        bins.append(ends | rate_of(outcomes[places].tolist()))
    controlled, enough = statistics.length_controlled, len(judged) >= statistics.FEWEST
    return {
        "longer": float(differences.mean()) if judged else math.nan,
        "correlation": statistics.correlation(outcomes, differences),
        "bins": bins,
        "length_controlled": float(controlled(outcomes, differences)) if enough else math.nan,
        "interval": statistics.bootstrap_interval(controlled, outcomes, differences, seed=seed) if enough else NONE,
    }
