"""What reviews come to: kept, corrected, dropped or not reviewed; and the figures of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from alpaca.chat_template import messages_of
from alpaca.common.records import json_text
from alpaca.common.shapes import has_several_turns
from alpaca.common.text import shorten
from alpaca.endpoint.client import Completion
from alpaca.judging.prompt import sha256
from alpaca.judging.review.marks import Rubric

FROM_1 = range(1, 1 << 40)  # records' numbers, unless their places in the file are given
ACTIONS = ("kept", "corrected", "dropped", "failed", "not asked")


def outcomes(
    records: Sequence[dict],
    replies: dict[str, Sequence[Completion | None]],
    rubric: Rubric,
    min_score: int,
    numbers: Sequence[int] = FROM_1,
) -> list[dict]:
    """Return what becomes of each record, with what led to it: the rows of reviews.jsonl.

    The lowest score counts, of any reviewer and criterion. A record that has one below ``min_score`` is dropped, or
    corrected where a reviewer that gave it such a score wrote another answer, of several the first one's. A record that
    not all reviewers have marked is neither kept nor dropped.

    Args:
        records: that were reviewed.
        replies: reviewer → its reply to each record, or a failure, or None: not asked.
        rubric: that reads them.
        min_score: the lowest score to keep.
        numbers: of the records, as in lint: their places in the file, from 1.
    """
    rows = []
    for place, record in enumerate(records):
        reviews = [_review(model, each[place], rubric) for model, each in replies.items()]
        row = {"record": numbers[place], "record_sha256": sha256(json_text(record)), "scores": None}
        marked = [review["scores"] for review in reviews if review["scores"]]
        if len(marked) == len(reviews):
            lowest = {name: min(scores[name] for scores in marked) for name in rubric.criteria}
            answer = messages_of(record)[-1]["content"].strip()
            low = [review for review in reviews if min(review["scores"].values()) < min_score]
            better = next((one["corrected"] for one in low if one["corrected"] not in (None, answer)), None)
            row |= {"scores": lowest, "action": "corrected" if better else "dropped" if low else "kept"}
            row |= {"corrected": better} if better else {}
        else:
            failed = any(review["error"] not in (None, "not asked") for review in reviews)
            row["action"] = "failed" if failed else "not asked"
        rows.append(row | {"rubric_sha256": rubric.sha256, "min_score": min_score, "reviews": reviews})
    return rows


def _review(model: str, reply: Completion | None, rubric: Rubric) -> dict:
    marks = rubric.read(reply.text) if reply and not reply.error else None
    error = None if marks else (reply.error or "no scores") if reply else "not asked"
    found = vars(marks) if marks else {"scores": None, "reason": reply and reply.text, "corrected": None}
    return {"model": model, "answered_by": reply and reply.model, **found, "error": error}


def split(records: Sequence[dict], rows: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """Return the records to keep and those that are dropped, in order.

    One that is kept is as it was. A corrected or dropped one has its row as "review", with the answer that it had as
    "original_output", and what an earlier review has left there as "earlier".
    """
    keep, drop = [], []
    for record, row in zip(records, rows, strict=True):
        *asked, answer = messages_of(record)
        why = {"review": row | ({"earlier": record["review"]} if "review" in record else {})}
        if row["action"] == "kept":
            keep.append(record)
        elif row["action"] == "dropped":
            drop.append(record | why)
        elif row["action"] == "corrected":
            why["review"]["original_output"], better = answer["content"], row["corrected"]
            # Alpaca's fields hold the first exchange of a conversation, and its last answer is the corrected one.
            new = {} if has_several_turns(record) else {"output": better}
            new |= {"messages": [*asked, answer | {"content": better}]} if "messages" in record else {}
            keep.append(record | new | why)
    return keep, drop


def figures(rows: Sequence[dict], criteria: Sequence[str], min_score: int) -> dict:
    """Return the figures of report.json.

    Returns:
        actions: counts of ACTIONS. reviewers: of each its model, reviewed (records with marks), scores (criterion →
        score → count), low (criterion → how many are below ``min_score``), failed (errors with counts). agreement of
        the first two reviewers, None with one: of each criterion, and of what each would keep ("kept"), the records
        that both marked, the share with the same mark ("same"), and kappa, of scores with quadratic weights.
    """
    from alpaca.judging import statistics  # which loads scipy

    counts = Counter(row["action"] for row in rows)
    found: dict = {"actions": {action: counts[action] for action in ACTIONS}, "reviewers": [], "agreement": None}
    columns: list[list[dict | None]] = []
    for reviews in zip(*(row["reviews"] for row in rows), strict=True):
        columns.append([review["scores"] for review in reviews])
        given = [scores for scores in columns[-1] if scores]
        by_score = {name: Counter(scores[name] for scores in given) for name in criteria}
        errors = Counter(review["error"] for review in reviews if review["error"] not in (None, "not asked"))
        found["reviewers"].append(
            {
                "model": reviews[0]["model"],
                "reviewed": len(given),
                "scores": {name: {str(n): by[n] for n in range(1, 6)} for name, by in by_score.items()},
                "low": {name: sum(by[n] for n in range(1, min_score)) for name, by in by_score.items()},
                "failed": {shorten(error, 200): count for error, count in errors.most_common()},
            }
        )
    if len(columns) > 1:
        pairs = {name: [[one and one[name] for one in column] for column in columns[:2]] for name in criteria}
        keeps = [[one and min(one.values()) >= min_score for one in column] for column in columns[:2]]
        found["agreement"] = {
            name: {
                "records": len(statistics.in_common(*pair)),
                "same": statistics.raw_agreement(*pair),
                "kappa": statistics.weighted_kappa(*pair),
            }
            for name, pair in (pairs | {"kept": keeps}).items()
        }
    return statistics.without_nan(found)


def as_lines(found: dict, min_score: int) -> list[str]:
    """Return the figures as lines for a terminal."""
    head, lines = "".join(f"{score:>8}" for score in range(1, 6)), []
    for reviewer in found["reviewers"]:
        lines += ["", f"{reviewer['model']}: {reviewer['reviewed']:,} reviewed"]
        lines += [f"{'score':<20}{head}   below {min_score}"] if reviewer["reviewed"] else []
        for name, by_score in reviewer["scores"].items() if reviewer["reviewed"] else ():
            numbers = "".join(f"{count:>8,}" for count in by_score.values())
            lines.append(f"{shorten(name, 20):<20}{numbers}{reviewer['low'][name]:>10,}")
    if found["agreement"] and found["agreement"]["kept"]["records"]:
        lines += ["", f"{'agreement':<20}{'records':>8}{'same':>8}{'kappa':>8}"]
        for name, of in found["agreement"].items():
            shares = "".join(f"{'–' if of[key] is None else format(of[key], '.2f'):>8}" for key in ("same", "kappa"))
            lines.append(f"{shorten(name, 20):<20}{of['records']:>8,}{shares}")
    return lines
