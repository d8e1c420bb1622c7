"""Judgments, read and folded into one verdict of each judge on each item, and what the verdicts come to.

A judgment is one ask: two answers in an order, and which was preferred. A model is asked in both orders; where it
contradicts itself its verdict is a tie, and where one of the two asks failed there is no verdict. A person is asked
once, in an order drawn at random.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

import utils
from alpaca import UserError, statistics

PREFERRED = ("first", "second", "tie", None)
SMALL = 10  # items; of fewer no rate is told, since the interval of 9 reaches over 30 points to each side
PEOPLE = "people, by majority"


@dataclass(frozen=True)
class Ask:
    """One judgment, with a and b in place of first and second.

    Attributes:
        id: of the item.
        judge: its name, told apart from others of that name.
        kind: "model" or "person".
        a_first: whether a's answer was shown first.
        preferred: "first", "second", "tie", or None: none was given.
        error: why none was given.
    """

    id: str
    judge: str
    kind: str
    a_first: bool
    preferred: str | None
    error: str | None


@dataclass(frozen=True)
class Verdict:
    """What one judge thinks of one item.

    Attributes:
        outcome: 1.0 where a wins, 0.5 a tie, 0.0 where b wins; None: no verdict.
        agreed: whether both orders led to the same; None where only one was asked.
        failure: why there is no verdict: "skipped", or what went wrong.
    """

    id: str
    judge: str
    kind: str
    outcome: float | None
    agreed: bool | None = None
    failure: str | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Reading and folding.


def read_judgments(paths: Iterable[str | os.PathLike]) -> list[dict]:
    """The rows of files that judge.py judge made.

    Raises:
        UserError: a file that cannot be read, or a row without a field that is needed.
    """
    rows = []
    for path in paths:
        for number, row in enumerate(utils.jload(path), 1):
            fault = _fault(row)
            if fault:
                raise UserError(f"{path}, row {number}: {fault}; give files that judge.py judge wrote")
            rows.append(row)
    return rows


def _fault(row) -> str | None:
    if not isinstance(row, dict):
        return f"a {type(row).__name__} where an object was expected"
    for field in ("id", "first", "second"):
        if not isinstance(row.get(field), str):
            return f'no text "{field}"'
    if "preferred" not in row or row["preferred"] not in PREFERRED:
        return '"preferred" must be "first", "second", "tie" or null'
    judge = row.get("judge")
    if not isinstance(judge, dict) or judge.get("kind") not in ("model", "person") or not judge.get("name"):
        return 'no "judge" with a "kind" (model, person) and a "name"'
    hashes = row.get("answers_sha256")
    if not isinstance(hashes, list) or len(hashes) != 2 or not all(isinstance(one, str) for one in hashes):
        return '"answers_sha256" must be the hashes of the two answers'
    return None


def read_asks(rows: Sequence[dict], a: str, b: str, answer_hashes: Mapping[tuple[str, str], str]) -> list[Ask]:
    """Judgment rows in terms of a and b; of the same ask made again, the last one counts (it was retried, or undone).

    Args:
        rows: from ``read_judgments``.
        a: generator whose wins are counted.
        b: the other generator.
        answer_hashes: (item id, generator) → SHA-256 of the answer that is reported on.

    Raises:
        UserError: rows of other generators, of an item that is not there, or that judged another answer.
    """
    asks: dict[tuple, Ask] = {}
    for row, judge in zip(rows, judge_names(rows), strict=True):
        id, shown = row["id"], (row["first"], row["second"])
        if set(shown) != {a, b} or a == b:
            raise UserError(
                f"a judgment of item {id} compares {shown[0]} with {shown[1]}, the answers are {a}'s and {b}'s: "
                "give the judgments of these two"
            )
        for generator, judged in zip(shown, row["answers_sha256"], strict=True):
            known = answer_hashes.get((id, generator))
            if known is None:
                raise UserError(f"item {id} was judged, but {generator} has no answer to it here: give the same files")
            if known != judged:
                raise UserError(
                    f"item {id} was judged with another answer of {generator} than the one given: judge it again, or "
                    "give the answers that were judged"
                )
        ask = Ask(id, judge, row["judge"]["kind"], row["first"] == a, row["preferred"], row.get("error"))
        asks.pop((judge, id, ask.a_first), None)
        asks[judge, id, ask.a_first] = ask
    return list(asks.values())


def judge_names(rows: Sequence[dict]) -> list[str]:
    """The judge of each row by name; with its kind and prompt where the name alone would mix two judges."""
    different: dict[str, set] = {}
    for judge in (row["judge"] for row in rows):
        different.setdefault(judge["name"], set()).add((judge["kind"], judge.get("prompt_sha256")))
    names = []
    for judge in (row["judge"] for row in rows):
        name, prompt = judge["name"], judge.get("prompt_sha256")
        if len(different[name]) > 1:
            name += f" ({judge['kind']}, prompt {prompt[:8]})" if prompt else f" ({judge['kind']})"
        names.append(name)
    return names


def fold(asks: Iterable[Ask]) -> list[Verdict]:
    """One verdict of each judge on each item, in the order of first meeting."""
    groups: dict[tuple[str, str], list[Ask]] = {}
    for ask in asks:
        groups.setdefault((ask.judge, ask.id), []).append(ask)
    return [_verdict(group) for group in groups.values()]


def _verdict(asks: list[Ask]) -> Verdict:
    who = (asks[0].id, asks[0].judge, asks[0].kind)
    failed = next((ask for ask in asks if ask.preferred is None), None)
    if failed is not None:
        return Verdict(*who, None, failure=failed.error or "failed")
    outcomes = [_outcome(ask) for ask in asks]
    if len(asks) == 1:
        if asks[0].kind == "model":
            return Verdict(*who, None, failure="asked in one order only")
        return Verdict(*who, outcomes[0])
    agreed = outcomes[0] == outcomes[1]
    return Verdict(*who, outcomes[0] if agreed else 0.5, agreed)


def _outcome(ask: Ask) -> float:
    if ask.preferred == "tie":
        return 0.5
    return float((ask.preferred == "first") == ask.a_first)


def majority(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """One verdict of all judges together on each item: which side more of them took, else a tie."""
    votes: dict[str, list[float]] = {}
    for verdict in verdicts:
        if verdict.outcome is not None:
            votes.setdefault(verdict.id, []).append(verdict.outcome)
    return [Verdict(id, PEOPLE, "person", 0.5 + 0.5 * _sign(sum(o - 0.5 for o in each))) for id, each in votes.items()]


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)


# ---------------------------------------------------------------------------------------------------------------------
# What they come to. Every share is of those that have a verdict.


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

    Returns:
        decided asks; share_first of them with a bootstrap interval over items and p; of the items that were asked in
        both orders without a failure their number (both_orders) and the share with the same verdict in both (agreed).
    """
    firsts: Counter = Counter()
    decided: Counter = Counter()
    for ask in asks:
        if ask.preferred in ("first", "second"):
            firsts[ask.id] += ask.preferred == "first"
            decided[ask.id] += 1
    net = [2 * firsts[id] - decided[id] for id in decided]
    both = [verdict.agreed for verdict in fold(asks) if verdict.agreed is not None]
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


def agreement(verdicts: Sequence[Verdict]) -> dict:
    """How far judges agree: of each two the raw share and Cohen's kappa, of more than two Krippendorff's alpha.

    Returns:
        pairs of judges with their kinds ("person–model"), common items, raw agreement and kappa; alpha of all judges
        and alpha_people of the people among them, NaN where there are not more than two.
    """
    table: dict[str, dict[str, float | None]] = {}
    kinds: dict[str, str] = {}
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
    people = [columns[name] for name in names if kinds[name] == "person"]
    alpha = statistics.krippendorffs_alpha
    return {
        "pairs": pairs,
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
    return text + (
        f"No difference can be seen ({p}). With {rate['judged']} instructions and so many ties, only a win rate beyond "
        f"{rate['detectable']:.1%}, or below {1 - rate['detectable']:.1%}, would have been, four times in five."
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


def p_value(p: float) -> str:
    """A p-value behind "p ": never 0, and two digits that count."""
    return "< 0.0001" if p < 0.0001 else f"= {p:.4f}" if p < 0.01 else f"= {p:.2f}"


def without_nan(value):
    """A report with None where a figure does not exist, since JSON has no NaN; tuples become lists."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
