"""A review as a run: one or two reviewers are asked about each record, and four files are written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from alpaca import UserError
from alpaca.common.journal import Journal
from alpaca.common.records import jdump, write_records
from alpaca.common.text import counted
from alpaca.endpoint.budget import Budget, RequestSettings
from alpaca.endpoint.client import OpenAIDecodingArguments
from alpaca.endpoint.parallel import ask_each, summarize
from alpaca.judging.prompt import CUT_OFF, sha256
from alpaca.judging.review import outcome
from alpaca.judging.review.marks import Reviewer, Rubric

FILES = ("kept.json", "dropped.jsonl", "reviews.jsonl", "report.json")


def review(
    numbered: Mapping[int, dict],
    models: Sequence[str],
    rubric: Rubric,
    output: Path,
    min_score: int,
    max_tokens: int,
    seed: int,
    requests: RequestSettings,
) -> None:
    """Have one or two models review records (by number), one after the other, and write FILES into a folder.

    Each has a journal of its own, so that what one was paid for remains when the other turns out to be useless.

    Raises:
        UserError: one of FILES exists and the run that made it has ended; also see ask_each() and summarize().
    """
    records = list(numbered.values())
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / f"{sha256(model)[:8]}.journal" for model in models]
    there = [output / name for name in FILES if (output / name).exists()]
    if there and not all(path.exists() for path in paths):
        raise UserError(f"{there[0]} exists: remove it, or choose another folder")
    decoding, budget = OpenAIDecodingArguments(max_tokens, temperature=0.0), Budget(requests)
    prompts, replies = [rubric.prompt(record) for record in records], {}
    settings = {"max_tokens": max_tokens, "temperature": 0.0, "seed": seed, "extra_body": requests.extra}
    digest = sha256(json.dumps(prompts))
    for model, path in zip(models, paths, strict=True):
        teacher = Reviewer(rubric, model, decoding, "chat", requests)
        with Journal(path) as journal:
            journal.begin({"task": "review", "model_name": model, "prompts": digest, "settings": settings})
            replies[model] = ask_each(teacher, prompts, seed, journal, budget)

    rows = outcome.outcomes(records, replies, rubric, min_score, list(numbered))
    figures = outcome.figures(rows, rubric.criteria, min_score)
    about = {"rubric_sha256": rubric.sha256, "prompts_sha256": digest, "min_score": min_score, "settings": settings}
    about |= {"changed_settings": sorted(budget.changed), "records": len(records)}
    keep, drop = outcome.split(records, rows)
    write_records(keep, output / FILES[0])
    write_records(drop, output / FILES[1])
    write_records(rows, output / FILES[2])
    jdump(about | figures | {"tokens": [budget.prompt_tokens, budget.completion_tokens]}, output / FILES[3], indent=2)
    print("\n".join(outcome.as_lines(figures, min_score)))
    actions = ", ".join(f"{count:,} {action}" for action, count in figures["actions"].items() if count)
    cut = sum(review["error"] == CUT_OFF for row in rows for review in row["reviews"])
    notes = [(cut, "reviews cut off: allow longer replies, in another folder")]
    every = [reply for each in replies.values() for reply in each]
    summarize(f"{counted(len(records), 'record')} in {output}: {actions}", every, budget, journal, notes)
    if not journal.path.exists():  # all is done
        for path in paths[:-1]:
            path.unlink()
