"""What verdicts add up to: who wins and whether by chance, and whether judges agree.

Figures are plain dictionaries, as in report.json. Every share is of the items that have a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations

import numpy as np

from alpaca.data.instruction_sets import Answers, Item
from alpaca.judging import report_text, statistics
from alpaca.judging.bias import NONE, SMALL, length_bias, position_bias, rate_of
from alpaca.judging.verdicts import PEOPLE, Ask, Verdict, counts, fold, grouped, majority


def judge_figures(
    asks: Sequence[Ask], items: Sequence[Item], a: Answers, b: Answers, seed: int = 0
) -> tuple[list[dict], dict, list[Verdict]]:
    """Return the figures of each judge: the majority of people if there are several, each person, then models.

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
    groups = [(PEOPLE, together)] * bool(together)  # not by name: a person may have the same one
    groups += grouped((verdict.judge, verdict) for verdict in verdicts).items()
    figures = []
    for judge, own in groups:
        rate = win_rate(own, seed)
        length = length_bias(own, lengths, seed)
        position = position_bias([ask for ask in asks if ask.judge == judge], seed) if own is not together else None
        figures.append(
            {
                "judge": judge,
                "kind": own[0].kind,
                **rate,
                "not_judged": len(lengths) - len(own),
                "words": report_text.win_words(rate, a.generator, b.generator),
                "position": position,
                "position_words": report_text.position_words(position) if position else None,
                "length": length,
                "length_words": report_text.length_words(rate, length, a.generator, b.generator),
                "categories": by_category(own, categories),
            }
        )
    return figures, agreement(verdicts), verdicts


def examples(
    verdicts: Sequence[Verdict], items: Sequence[Item], a: Answers, b: Answers, witness: Mapping[str, float], most: int
) -> list[dict]:
    """Return the clearest wins of a and then of b, ``most`` of each, with all their texts (see ``clearest``)."""
    by_id = {item.id: item for item in items}
    found = []
    for side, winner in ((1.0, a), (0.0, b)):
        for id in clearest(verdicts, side, witness, most):
            names = {side: "won", 0.5: "tie", 1.0 - side: "lost"}
            found.append(
                {
                    "winner": winner.generator,
                    **asdict(by_id[id]),
                    "answers": {one.generator: one.outputs[id] for one in (a, b)},
                    "verdicts": {v.judge: names[v.outcome] for v in verdicts if v.id == id and v.outcome is not None},
                }
            )
    return found


def win_rate(verdicts: Sequence[Verdict], seed: int = 0) -> dict:
    """Return wins, ties and losses of a, its win rate (a tie is half a win) with its interval, and a sign test.

    Returns:
        judged, wins, ties, losses, failed, skipped: counts; win_rate and interval in [0, 1]; p of the sign test;
        detectable: the smallest win rate that this many items would show (statistics.detectable_win_rate).
    """
    outcomes = [verdict.outcome for verdict in verdicts if verdict.outcome is not None]
    counted = counts(outcomes)
    skipped = sum(verdict.failure == "skipped" for verdict in verdicts)
    rate = float(np.mean(outcomes)) if outcomes else math.nan
    if len(set(outcomes)) == 1:  # resamples of equal outcomes are equal too, however few they are
        interval = statistics.wilson_interval(rate, len(outcomes))
    else:
        interval = statistics.bootstrap_interval(np.mean, outcomes, seed=seed)
    return {
        "judged": len(outcomes),
        **counted,
        "failed": len(verdicts) - len(outcomes) - skipped,
        "skipped": skipped,
        "win_rate": rate,
        "interval": interval,
        "p": statistics.sign_test(counted["wins"], counted["losses"]),
        "detectable": statistics.detectable_win_rate(len(outcomes), counted["wins"] + counted["losses"]),
    }


def by_category(verdicts: Sequence[Verdict], categories: Mapping[str, str]) -> list[dict]:
    """Return counts for each category, largest first; a rate and its Wilson interval only from SMALL items on."""
    groups = grouped((categories[verdict.id], verdict.outcome) for verdict in verdicts if verdict.outcome is not None)
    none = {"win_rate": math.nan, "interval": NONE}
    return [
        {"category": category} | rate_of(outcomes) | (none if len(outcomes) < SMALL else {})
        for category, outcomes in sorted(groups.items(), key=lambda group: (-len(group[1]), group[0].casefold()))
    ]


def agreement(verdicts: Sequence[Verdict]) -> dict:
    """Return how far judges agree: raw share and Cohen's kappa of each pair, Krippendorff's alpha of more than two.

    Items with equal answers are left out: models are not asked about them, and agreement on such a tie means nothing.

    Returns:
        pairs of judges with their kinds ("person–model"), common items, raw agreement and kappa; by_kinds: raw
        agreement over all pairs of two kinds, each weighted by its items; alpha of all judges and alpha_people of the
        people among them, NaN for two or fewer.
    """
    verdicts = [verdict for verdict in verdicts if not verdict.equal]
    kinds = {verdict.judge: verdict.kind for verdict in verdicts}
    outcomes = {(verdict.judge, verdict.id): verdict.outcome for verdict in verdicts}
    ids = list(dict.fromkeys(verdict.id for verdict in verdicts))
    names = sorted(kinds, key=lambda judge: kinds[judge] != "person")
    columns = {judge: [outcomes.get((judge, id)) for id in ids] for judge in names}
    pairs = []
    for both in combinations(names, 2):
        said = [columns[judge] for judge in both]
        found = {"judges": list(both), "kinds": "–".join(kinds[judge] for judge in both)}
        found |= {"items": len(statistics.in_common(*said)), "raw": statistics.raw_agreement(*said)}
        pairs.append(found | {"kappa": statistics.cohens_kappa(*said)})
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
    """Return the ids of the items that were won most clearly.

    First those that every judge gave to that side, a model in both orders; then by the share of judges that did. More
    judges come before fewer, then the larger margin of an independent witness.

    Args:
        verdicts: of all judges.
        side: 1.0 for a's wins, 0.0 for b's.
        witness: item id → a margin of a over b that does not come from a judge (such as ROUGE-L to the reference).
        most: how many ids.
    """
    shares = grouped((v.id, 1 - abs(v.outcome - side)) for v in verdicts if v.outcome is not None)
    won = [id for id, each in shares.items() if sum(each) > len(each) / 2]
    margin = {id: (2 * side - 1) * witness.get(id, 0) for id in won}
    return sorted(won, key=lambda id: (-sum(shares[id]) / len(shares[id]), -len(shares[id]), -margin[id]))[:most]
