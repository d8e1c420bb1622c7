"""Judgments, folded into one verdict of each judge on each item.

A judgment is one ask: two answers in an order, and which was preferred. A model is asked in both orders: if it
contradicts itself the verdict is a tie, and if one of the two asks failed the item has none. A person is asked once, in
a random order.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from alpaca import UserError
from alpaca.common.records import jload
from alpaca.data.instruction_sets import Answers, is_name
from alpaca.judging.prompt import sha256

PREFERRED = ("first", "second", "tie", None)
PEOPLE = "people, by majority"


@dataclass(frozen=True)
class Ask:
    """One judgment, with a and b in place of first and second.

    Attributes:
        id: of the item.
        judge: its name, with what distinguishes it from others with that name.
        kind: "model" or "person".
        a_first: whether a's answer was shown first.
        preferred: "first", "second", "tie", or None.
        error: why there is no preference.
        equal: the two answers were the same text, so no one was asked.
    """

    id: str
    judge: str
    kind: str
    a_first: bool
    preferred: str | None
    error: str | None = None
    equal: bool = False


@dataclass(frozen=True)
class Verdict:
    """What one judge thinks of one item.

    Attributes:
        outcome: 1.0 if a wins, 0.5 for a tie, 0.0 if b wins; None: no verdict.
        agreed: whether both orders gave the same verdict; None if only one was asked.
        failure: why there is no verdict: "skipped", or what went wrong.
        equal: the two answers were the same text.
    """

    id: str
    judge: str
    kind: str
    outcome: float | None
    agreed: bool | None = None
    failure: str | None = None
    equal: bool = False


def read_judgments(paths: Iterable[str | os.PathLike]) -> list[dict]:
    """Return the rows of files that judge.py judge and judge.py people wrote.

    Raises:
        UserError: a file that cannot be read or has no rows, or a row that is not a judgment.
    """
    rows: list[dict] = []
    for path in paths:
        if not (found := jload(path)):
            raise UserError(f"{path} has no judgments: choose another file")
        if odd := next((number for number, row in enumerate(found, 1) if not _is_judgment(row)), None):
            raise UserError(f"{path}, row {odd} is not a judgment: give files that judge.py judge or people wrote")
        rows += found
    return rows


def _is_judgment(row) -> bool:
    try:
        judge, hashes = row["judge"], row["answers_sha256"]
        texts = [row["id"], row["first"], row["second"], *filter(None, [judge.get("prompt_sha256"), *hashes])]
        known = row["preferred"] in PREFERRED and judge["kind"] in ("model", "person") and is_name(judge["name"])
        known = known and len(hashes) == 2 and isinstance(judge.get("settings"), dict | None)
        return known and all(isinstance(text, str) for text in texts)
    except (AttributeError, KeyError, TypeError):
        return False


def read_asks(rows: Sequence[dict], a: Answers, b: Answers) -> list[Ask]:
    """Return judgment rows in terms of a and b; of a repeated ask (retried, or undone) the last one counts.

    Args:
        rows: from ``read_judgments``.
        a: the answers to count wins for.
        b: the other answers.

    Raises:
        UserError: rows about other generators, or about other answers of them.
    """
    hashes = {(id, one.generator): sha256(text) for one in (a, b) for id, text in one.outputs.items()}
    asks: dict[tuple, Ask] = {}
    for row, judge in zip(rows, judge_names(rows), strict=True):
        id, shown = row["id"], (row["first"], row["second"])
        if set(shown) != {a.generator, b.generator}:
            raise UserError(
                f"item {id} was judged between {shown[0]} and {shown[1]}, but the answers are from {a.generator} and "
                f"{b.generator}: give the judgments of these two"
            )
        for generator, judged in zip(shown, row["answers_sha256"], strict=True):
            if hashes.get((id, generator)) != judged:
                raise UserError(
                    f"item {id} was judged with another answer of {generator}: judge it again, or give the answers "
                    "that were judged"
                )
        if None in row["answers_sha256"]:
            continue  # one of the two had no answer: no one was asked
        kind, a_first, equal = row["judge"]["kind"], row["first"] == a.generator, len(set(row["answers_sha256"])) == 1
        asks.pop((judge, id, a_first), None)
        asks[judge, id, a_first] = Ask(id, judge, kind, a_first, row["preferred"], row.get("error"), equal)
    return list(asks.values())


def repeated(rows: Sequence[dict], asks: Sequence[Ask]) -> Counter[str]:
    """Return how many rows of each judge are replaced by a later row on the same ask."""
    counting = [name for name, row in zip(judge_names(rows), rows, strict=True) if None not in row["answers_sha256"]]
    return Counter(counting) - Counter(ask.judge for ask in asks)


def judge_names(rows: Sequence[dict]) -> list[str]:
    """Return each row's judge by name, with its kind, prompt or seed if the name alone would mix two judges.

    A person's seed is the page's: on two pages, which draw their sides separately, one name may be two people.
    """
    judges = [(row["judge"]["name"], _facts(row["judge"])) for row in rows]
    different = Counter(name for name, _ in set(judges))
    return [name + (f" ({', '.join(facts)})" if different[name] > 1 else "") for name, facts in judges]


def _facts(judge: dict) -> tuple[str, ...]:
    prompt, settings = judge.get("prompt_sha256"), judge.get("settings") or {}
    facts = [judge["kind"]] + ([f"prompt {prompt[:8]}"] if prompt else [])
    if judge["kind"] == "person" and "seed" in settings:
        facts.append(f"votes of seed {settings['seed']}")
    return tuple(facts)


def settings_of(rows: Sequence[dict], judge: str) -> list[dict]:
    """Return the different ways in which a judge was asked, with the model that its server names; [] for a majority.

    Rows without a reply (failed, or equal answers) lack the server's model name: they count as a separate way only if
    no row with a reply was asked that way.
    """
    own = [row for row, name in zip(rows, judge_names(rows), strict=True) if name == judge]
    ways = [row["judge"] | ({"answered_by": by} if (by := row.get("answered_by")) else {}) for row in own]
    found: list[dict] = []
    for way in sorted(ways, key=lambda way: "answered_by" not in way):
        if all(other | way != other for other in found):
            found.append(way)
    return found


def fold(asks: Iterable[Ask]) -> list[Verdict]:
    """Return one verdict of each judge on each item, in order of appearance.

    An item that a model has seen in one order only, because its run has not finished, has none yet.
    """
    groups = grouped(((ask.judge, ask.id), ask) for ask in asks)
    return [verdict for group in groups.values() if (verdict := _verdict(group)) is not None]


def _verdict(asks: list[Ask]) -> Verdict | None:
    who, equal = (asks[0].id, asks[0].judge, asks[0].kind), asks[0].equal
    failed = next((ask for ask in asks if ask.preferred is None), None)
    if failed is not None:
        return Verdict(*who, None, failure=failed.error or "failed", equal=equal)
    outcomes = [0.5 if ask.preferred == "tie" else float((ask.preferred == "first") == ask.a_first) for ask in asks]
    if len(asks) == 1:
        return Verdict(*who, outcomes[0], equal=equal) if asks[0].kind == "person" else None
    agreed = outcomes[0] == outcomes[1]
    return Verdict(*who, outcomes[0] if agreed else 0.5, agreed, equal=equal)


def majority(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Return one verdict of all judges together on each item: the side with more votes, else a tie."""
    votes = grouped((verdict.id, verdict.outcome) for verdict in verdicts if verdict.outcome is not None)
    leads = {id: sum(outcome - 0.5 for outcome in each) for id, each in votes.items()}
    return [Verdict(id, PEOPLE, "person", 0.5 + 0.5 * ((lead > 0) - (lead < 0))) for id, lead in leads.items()]


def grouped(pairs: Iterable[tuple[Hashable, Any]]) -> dict[Any, list]:
    """Return the values of each key, in order of appearance."""
    groups: dict[Any, list] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def counts(outcomes: Sequence[float]) -> dict[str, int]:
    """Return the numbers of wins, ties and losses of a among outcomes."""
    return {"wins": outcomes.count(1.0), "ties": outcomes.count(0.5), "losses": outcomes.count(0.0)}
