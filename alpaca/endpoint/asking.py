"""A list of prompts, each asked once: what an endpoint has replied is on disk at once, and a killed run goes on."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from alpaca import UserError
from alpaca.common.journal import Journal
from alpaca.endpoint.budget import Budget, in_words
from alpaca.endpoint.client import Completion, Teacher
from alpaca.endpoint.parallel import ask_all


class Answerer:
    """A teacher who is being judged: ending without a word, each time, is its answer, as it is a local model's.

    A refused, cut off or unreadable reply stays a failure: only an empty one has no text and the finish reason "stop".
    """

    def __init__(self, teacher: Teacher):
        self.teacher, self.close = teacher, teacher.close

    async def ask(self, prompt: str, seed: int | None = None) -> Completion:
        reply = await self.teacher.ask(prompt, seed)
        empty = reply.text is None and reply.finish_reason == "stop"
        return dataclasses.replace(reply, text="", error=None) if empty else reply


def ask_each(
    teacher,
    prompts: list[str],
    seed: int | None,
    journal: Journal,
    budget: Budget,
    max_tokens: int,
    max_concurrency: int,
    unit: str,
) -> list[Completion | None]:
    """Asks for a reply to each prompt that the journal has no text for, with a forecast, a bar and a budget.

    Args:
        teacher: a Teacher, or what has its ``ask`` and ``close``.
        prompts: the same, in the same order, each time that the run goes on.
        seed: given with each request.
        journal: as in ask_all(); a request that failed in an earlier run is sent again.
        budget: when it is spent, or too much fails, nothing more is sent.
        max_tokens: of a reply, for the forecast.
        max_concurrency: requests in flight at most.
        unit: what a reply is called in the bar.

    Returns:
        For each prompt the reply, or the failure, or None where the run ended before it was asked.
    """
    there = sum("i" in entry and entry["text"] is not None for entry in journal.entries)
    left = len(prompts) - there
    if left and not budget.exhausted():
        tokens = sum(map(len, prompts)) / len(prompts) / 4  # English has about 4 characters a token
        print(
            f"forecast: at most {budget.forecast(left, tokens, max_tokens)} (about {tokens:,.0f} of them in each "
            "prompt); told anew, with the time, after the first replies"
        )
    told_after, interval = max(8, max_concurrency), 0.5 if sys.stderr.isatty() else 30  # a file would fill with it
    with tqdm(total=len(prompts), initial=there, unit=unit, mininterval=interval, disable=not prompts) as bar:

        def arrived(reply: Completion, new: bool) -> None:
            # One that failed in an earlier run is asked again: what it cost counts, that it failed does not.
            budget.arrived(reply if new or reply.text is not None else dataclasses.replace(reply, error=None), new)
            if not new:
                return
            failed = f", {sum(budget.failures.values())} failed" if budget.failures else ""
            bar.set_postfix_str(f"tokens {budget.used()}{failed}", refresh=False)
            bar.update()
            more = left - budget.new_replies
            if budget.new_replies == told_after and more > 0:
                each = budget.prompt_tokens / budget.replies, budget.completion_tokens / budget.replies
                minutes = more * budget.seconds() / budget.new_replies / 60
                rest = budget.forecast(more, *each)
                bar.write(f"forecast, after {budget.replies} replies: about {rest}, {minutes:,.1f} min more")

        def want(number: int, in_flight: int) -> bool:
            return number < len(prompts) and not budget.exhausted() and not budget.failing()

        try:
            asyncio.run(
                ask_all(
                    teacher,
                    lambda number: (prompts[number], seed),
                    journal,
                    arrived,
                    lambda reply: None,
                    want,
                    max_concurrency,
                    retry_failed=True,
                )
            )
        except KeyboardInterrupt:
            print(f"\nthe same command goes on: the replies are in {journal.path}", file=sys.stderr)
            raise
    replies: list[Completion | None] = [None] * len(prompts)
    for entry in journal.entries:
        if "i" in entry:
            replies[entry["i"]] = Completion(**{key: value for key, value in entry.items() if key != "i"})
    return replies


def wind_up(
    journal_path: Path, made: str, replies: list[Completion | None], budget: Budget, notes: list[tuple[int, str]]
) -> None:
    """Says what a run came to. The journal stays as long as the same command has something left to ask.

    Args:
        journal_path: of the journal, closed.
        made: what the run has made, "504 judgments in J.jsonl".
        replies: from ask_each().
        budget: that of the run.
        notes: counts and what they count.

    Raises:
        UserError: too much of it failed, or all that was asked: fewer than the budget judges a share of may be all.
    """
    unasked = sum(reply is None for reply in replies)
    errors = Counter(reply.error for reply in replies if reply and reply.error)
    lost = sum(reply is not None and reply.text is None for reply in replies)
    if not unasked and not lost:
        journal_path.unlink()
    notes = [*notes, (sum(errors.values()), f"failed: {in_words(errors)}"), (unasked, "not asked")]
    said = f"{made}{in_brackets(notes)}; tokens {budget.used()}"
    if unasked or lost:
        said += "; the same command goes on with what is missing"
    if why := budget.failing():
        raise UserError(f"{why}: the run ended; {said}")
    if errors and all(reply is None or reply.error for reply in replies):
        raise UserError(f"not one request succeeded: {said}")
    if unasked:
        print(f"{budget.exhausted()} ended the run")
    print(said)


def in_brackets(notes: list[tuple[int, str]]) -> str:
    """ " (3 of this; 1 of that)", without what there is none of; "" if there is nothing."""
    said = "; ".join(f"{count:,} {what}" for count, what in notes if count)
    return f" ({said})" if said else ""
