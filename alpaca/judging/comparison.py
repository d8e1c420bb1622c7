"""What verdicts come to: who wins and whether by chance, what a judge is biased by, whether judges agree.

Figures are plain dictionaries, as report.json holds them. Every share is of the items that have a verdict.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from alpaca.data.instruction_sets import Answers, Item
from alpaca.judging import statistics
from alpaca.judging.verdicts import PEOPLE, Ask, Verdict, fold, majority

SMALL = 10  # items; of fewer no rate is told: that of 9, evenly split, has an interval 55 points wide


def judge_figures(
    asks: Sequence[Ask], items: Sequence[Item], a: Answers, b: Answers, seed: int = 0
) -> tuple[list[dict], dict, list[Verdict]]:
    """The figures of each judge, people first, and before them of their majority, if there are several.

    Returns:
        A dict for each judge: judge, kind, the figures of win_rate, not_judged, words, position and position_words
        (None for a majority, which sees nothing first), length and length_words, categories. Then the judges'
        agreement. Then the verdicts, without the majority's.
    """
    verdicts = sorted(fold(asks), key=lambda verdict: verdict.kind != "person")
    people = [verdict for verdict in verdicts if verdict.kind == "person"]
    together = majority(people) if len({verdict.judge for verdict in people}) > 1 else []
    lengths = {id: (len(a.outputs[id]), len(b.outputs[id])) for id in a.outputs if id in b.outputs}
    categories = {item.id: item.category for item in items}
    groups: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault(verdict.judge, []).append(verdict)
    figures = []
    # Not one more group: a person may have taken that very name.
    for judge, own in [*([(PEOPLE, together)] if together else []), *groups.items()]:
        rate = win_rate(own, seed)
        length = length_bias(own, lengths, seed)
        position = position_bias([ask for ask in asks if ask.judge == judge], seed) if own is not together else None
        figures.append(
            {
                "judge": judge,
                "kind": own[0].kind,
                **rate,
                "not_judged": len(lengths) - len(own),
                "words": in_words(rate, a.generator, b.generator),
                "position": position,
                "position_words": position_in_words(position) if position else None,
                "length": length,
                "length_words": length_in_words(rate, length, a.generator, b.generator),
                "categories": by_category(own, categories),
            }
        )
    return figures, agreement(verdicts), verdicts


def examples(
    verdicts: Sequence[Verdict], items: Sequence[Item], a: Answers, b: Answers, witness: Mapping[str, float], most: int
) -> list[dict]:
    """The clearest wins of a and then of b, ``most`` of each, with all their texts (see ``clearest``)."""
    by_id = {item.id: item for item in items}
    found = []
    for side, winner in ((1.0, a), (0.0, b)):
        for id in clearest(verdicts, side, witness, most):
            item, names = by_id[id], {side: "won", 0.5: "tie", 1.0 - side: "lost"}
            found.append(
                {
                    "winner": winner.generator,
                    "id": id,
                    "category": item.category,
                    "instruction": item.instruction,
                    "input": item.input,
                    "reference": item.reference,
                    "answers": {one.generator: one.outputs[id] for one in (a, b)},
                    "verdicts": {v.judge: names[v.outcome] for v in verdicts if v.id == id and v.outcome is not None},
                }
            )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Of one judge.


def _outcomes(verdicts: Iterable[Verdict]) -> list[float]:
    return [verdict.outcome for verdict in verdicts if verdict.outcome is not None]


def count(outcomes: Sequence[float]) -> dict:
    return {"wins": outcomes.count(1.0), "ties": outcomes.count(0.5), "losses": outcomes.count(0.0)}


def win_rate(verdicts: Sequence[Verdict], seed: int = 0) -> dict:
    """Wins, ties and losses of a, its win rate (a tie is half a win) with a bootstrap interval, and a sign test.

    Returns:
        judged, wins, ties, losses, failed, skipped: counts; win_rate and interval in [0, 1]; p of the sign test;
        detectable: the smallest win rate that so many items would have shown (statistics.detectable_win_rate).
    """
    outcomes = _outcomes(verdicts)
    counts = count(outcomes)
    skipped = sum(verdict.failure == "skipped" for verdict in verdicts)
    return {
        "judged": len(outcomes),
        **counts,
        "failed": len(verdicts) - len(outcomes) - skipped,
        "skipped": skipped,
        "win_rate": float(np.mean(outcomes)) if outcomes else math.nan,
        "interval": statistics.bootstrap_interval(statistics.mean_of_rows, outcomes, seed=seed),
        "p": statistics.sign_test(counts["wins"], counts["losses"]),
        "detectable": statistics.detectable_win_rate(len(outcomes), counts["wins"] + counts["losses"]),
    }


def position_bias(asks: Sequence[Ask], seed: int = 0) -> dict:
    """How often one judge preferred what it saw first, among the asks that it decided.

    Asked in both orders, a judge without bias prefers the first in half of them by construction; so the items are what
    varies, and the test is a sign test over items: where more firsts than seconds were preferred against the reverse.
    An ask of a model whose other order failed, or was not asked yet, says who is better rather than which place is
    preferred, and is left out; a person's sides were drawn at random.

    Returns:
        decided asks; share_first of them with a bootstrap interval over items and p; of the items with unequal answers
        that were asked in both orders without a failure their number (both_orders) and the share with the same verdict
        in both (agreed).
    """
    firsts: Counter = Counter()
    decided: Counter = Counter()
    answered = Counter(ask.id for ask in asks if ask.preferred is not None)
    for ask in asks:
        if ask.preferred in ("first", "second") and (ask.kind == "person" or answered[ask.id] == 2):
            firsts[ask.id] += ask.preferred == "first"
            decided[ask.id] += 1
    net = [2 * firsts[id] - decided[id] for id in decided]
    both = [v.agreed for v in fold(ask for ask in asks if not ask.equal) if v.agreed is not None]
    ratio = statistics.weighted_mean_of_rows
    shares, weights = [firsts[id] / decided[id] for id in decided], list(decided.values())
    return {
        "decided": decided.total(),
        "share_first": firsts.total() / decided.total() if decided else math.nan,
        "interval": statistics.bootstrap_interval(ratio, shares, weights, seed=seed),
        "p": statistics.sign_test(sum(n > 0 for n in net), sum(n < 0 for n in net)),
        "both_orders": len(both),
        "agreed": sum(both) / len(both) if both else math.nan,
    }


def length_bias(verdicts: Sequence[Verdict], lengths: Mapping[str, tuple[int, int]], seed: int = 0) -> dict:
    """Whether the longer answer wins.

    Args:
        verdicts: of one judge.
        lengths: item id → characters of a's answer and of b's.
        seed: of the bootstrap.

    Returns:
        longer: mean difference a - b in characters; correlation of outcome and difference; bins by difference, with
        counts, win rate and Wilson interval; length_controlled win rate with its bootstrap interval.
    """
    judged = [verdict for verdict in verdicts if verdict.outcome is not None]
    outcomes = np.array([verdict.outcome for verdict in judged], np.float64)
    differences = np.array([lengths[v.id][0] - lengths[v.id][1] for v in judged], np.float64)
    bins = []
    for places in statistics.equal_bins(differences, min(5, len(judged) // SMALL)):
        inside = outcomes[places]
        bins.append(
            {
                "from": int(differences[places].min()),
                "to": int(differences[places].max()),
                **count(inside.tolist()),
                "win_rate": float(inside.mean()),
                "interval": statistics.wilson_interval(float(inside.mean()), len(inside)),
            }
        )
    controlled = statistics.length_controlled
    return {
        "longer": float(differences.mean()) if judged else math.nan,
        "correlation": statistics.correlation(outcomes, differences),
        "bins": bins,
        "length_controlled": float(controlled(outcomes[None], differences[None])[0]) if judged else math.nan,
        "interval": statistics.bootstrap_interval(controlled, outcomes, differences, seed=seed),
    }


def by_category(verdicts: Sequence[Verdict], categories: Mapping[str, str]) -> list[dict]:
    """Counts for each category, largest first; a rate and its Wilson interval only from SMALL items on."""
    groups: dict[str, list[float]] = {}
    for verdict in verdicts:
        if verdict.outcome is not None:
            groups.setdefault(categories[verdict.id], []).append(verdict.outcome)
    rows = []
    for category, outcomes in sorted(groups.items(), key=lambda group: (-len(group[1]), group[0].casefold())):
        rate = sum(outcomes) / len(outcomes) if len(outcomes) >= SMALL else math.nan
        interval = statistics.wilson_interval(rate, len(outcomes)) if len(outcomes) >= SMALL else (math.nan, math.nan)
        rows.append({"category": category, **count(outcomes), "win_rate": rate, "interval": interval})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Of several judges.


def agreement(verdicts: Sequence[Verdict]) -> dict:
    """How far judges agree: of each two the raw share and Cohen's kappa, of more than two Krippendorff's alpha.

    Items with equal answers are left out: a model's tie there was never asked for, and to agree on it is no merit.

    Returns:
        pairs of judges with their kinds ("person–model"), common items, raw agreement and kappa; by_kinds: raw
        agreement over all pairs of two kinds, each weighted by its items; alpha of all judges and alpha_people of the
        people among them, NaN where there are not more than two.
    """
    table: dict[str, dict[str, float | None]] = {}
    kinds: dict[str, str] = {}
    verdicts = [verdict for verdict in verdicts if not verdict.equal]
    for verdict in verdicts:
        table.setdefault(verdict.judge, {})[verdict.id] = verdict.outcome
        kinds[verdict.judge] = verdict.kind
    ids = list(dict.fromkeys(verdict.id for verdict in verdicts))
    columns = {judge: [outcomes.get(id) for id in ids] for judge, outcomes in table.items()}
    names = sorted(columns, key=lambda judge: kinds[judge] != "person")
    pairs = []
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            x, y = columns[one], columns[other]
            common = sum(p is not None and q is not None for p, q in zip(x, y, strict=True))
            pairs.append(
                {
                    "judges": [one, other],
                    "kinds": f"{kinds[one]}–{kinds[other]}",
                    "items": common,
                    "raw": statistics.raw_agreement(x, y),
                    "kappa": statistics.cohens_kappa(x, y),
                }
            )
    by_kinds = []
    for both in dict.fromkeys(pair["kinds"] for pair in pairs):
        of_these = [pair for pair in pairs if pair["kinds"] == both and pair["items"]]
        items = sum(pair["items"] for pair in of_these)
        raw = sum(pair["raw"] * pair["items"] for pair in of_these) / items if items else math.nan
        by_kinds.append({"kinds": both, "pairs": len(of_these), "items": items, "raw": raw})
    people = [columns[name] for name in names if kinds[name] == "person"]
    alpha = statistics.krippendorffs_alpha
    return {
        "pairs": pairs,
        "by_kinds": by_kinds,
        "alpha": alpha(list(columns.values())) if len(columns) > 2 else math.nan,
        "alpha_people": alpha(people) if len(people) > 2 else math.nan,
    }


def clearest(verdicts: Sequence[Verdict], side: float, witness: Mapping[str, float], most: int) -> list[str]:
    """Ids of the items that were won most clearly.

    First those that every judge gave to that side, a model in both orders; then by the share of it that they gave.
    More judges go before fewer, and then the larger margin of an independent witness.

    Args:
        verdicts: of all judges.
        side: 1.0 for a's wins, 0.0 for b's.
        witness: item id → a margin of a over b that is no judge's (ROUGE-L to the reference, say).
        most: how many ids.
    """
    shares: dict[str, list[float]] = {}
    for verdict in verdicts:
        if verdict.outcome is not None:
            shares.setdefault(verdict.id, []).append(1 - abs(verdict.outcome - side))
    won = [id for id, each in shares.items() if sum(each) > len(each) / 2]
    sign = 2 * side - 1
    clear = sorted(
        won, key=lambda id: (-sum(shares[id]) / len(shares[id]), -len(shares[id]), -sign * witness.get(id, 0))
    )
    return clear[:most]


# ---------------------------------------------------------------------------------------------------------------------
# In words.


def in_words(rate: dict, a: str, b: str) -> str:
    """Whether the difference is larger than chance, in a sentence or two."""
    if not rate["judged"]:
        return "There is no verdict to count."
    low, high = rate["interval"]
    ties = f"{rate['ties']} tie{'s' * (rate['ties'] != 1)}"
    text = (
        f"{a} wins {rate['wins']}, {b} {rate['losses']}, {ties}: a win rate of {rate['win_rate']:.1%} for {a} (95% "
        f"interval {low:.1%} to {high:.1%}). "
    )
    if rate["wins"] + rate["losses"] == 0:
        return text + "Nothing was decided, so nothing can be said about a difference."
    p = f"sign test, p {p_value(rate['p'])}"
    if rate["p"] < 0.05:
        return text + f"{a if rate['wins'] > rate['losses'] else b} wins more often than chance explains ({p})."
    decided = rate["wins"] + rate["losses"]
    if rate["detectable"] >= 0.5 + decided / rate["judged"] / 2:  # more than if one side had won them all
        few = f"{decided} decided instruction{'s are' if decided > 1 else ' is'} too few to show any but the largest."
        return text + f"No difference can be seen ({p}). {few}"
    given = f"With {rate['judged']} instructions{' and so many ties' if rate['ties'] else ''}"
    return text + (
        f"No difference can be seen ({p}). {given}, only a win rate beyond {rate['detectable']:.1%}, or below "
        f"{1 - rate['detectable']:.1%}, would have been, four times in five."
    )


def position_in_words(position: dict) -> str:
    """Whether a judge prefers a place rather than an answer, in a sentence or two."""
    if not position["decided"]:
        return "No ask was decided, so nothing can be said about a preference for a place."
    share, p = position["share_first"], p_value(position["p"])
    text = f"What was shown first was preferred in {share:.1%} of {position['decided']} decided asks (p {p}"
    if position["p"] < 0.05:
        text += "): more than chance explains. " if share > 0.5 else "): less than chance explains. "
    else:
        text += "): no preference for a place can be seen. "
    if position["both_orders"]:
        text += f"Asked in both orders, the verdict was the same for {position['agreed']:.1%} of the items."
    return text.strip()


def length_in_words(rate: dict, length: dict, a: str, b: str) -> str | None:
    """Whether the verdict would be another one at equal length; None where there is none that could be.

    Larger than chance is here: the interval of the length-controlled win rate leaves out one half.
    """
    # Of five even a clean sweep is no more than chance (p = 0.06), and a regression on them is sure of anything.
    if statistics.sign_test(rate["wins"] + rate["losses"], 0) >= 0.05:
        return None
    controlled, (low, high) = length["length_controlled"], length["interval"]
    figures = f"a win rate of {controlled:.1%} for {a} (95% interval {low:.1%} to {high:.1%})"
    if low <= 0.5 <= high:
        return f"At equal length no difference can be seen any more: {figures}." if rate["p"] < 0.05 else None
    if rate["p"] < 0.05 and (controlled > 0.5) == (rate["wins"] > rate["losses"]):
        return f"At equal length it stays: {figures}."
    return f"At equal length {a if controlled > 0.5 else b} would win more often: {figures}."


def p_value(p: float) -> str:
    """A p-value behind "p ": never 0, and told apart from 0.05."""
    return "< 0.0001" if p < 0.0001 else f"= {p:.4f}" if p < 0.1 else f"= {p:.2f}"


def without_nan(value):
    """A report with None where a figure does not exist, since JSON has no NaN; tuples become lists."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
