"""What a run of generate_instruction.py shows: a forecast, a bar with its figures, and a report.

``selection`` is the script's Selection, ``budget`` a Budget.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from tqdm import tqdm

from alpaca.endpoint.budget import Budget

GUESS = 10  # new instructions a reply, before any reply is there; the prompt asks for 17
ENOUGH_UNSEEN = 10  # instructions that the tokenizer hardly sees, until the run is told


def print_forecast(selection, budget: Budget, prompt_characters: int, max_tokens: int) -> None:
    """Before the first request: an upper bound, since a reply rarely has ``max_tokens`` tokens."""
    requests = math.ceil((selection.target - len(selection.kept)) / GUESS)
    if requests > 0:
        prompt_tokens = prompt_characters // 4  # English has about 4 characters a token
        print(
            f"forecast, at {GUESS} new instructions a reply: at most "
            f"{budget.forecast(requests, prompt_tokens, max_tokens)} (about {prompt_tokens:,} of them in each prompt); "
            "told anew, with the time, after the first replies"
        )


@asynccontextmanager
async def progress_bar(
    selection, budget: Budget, per_reply: Callable[[], float], told_after: int
) -> AsyncIterator[None]:
    """Shows a bar of kept instructions with replies, tokens, dollars and failures.

    It is renewed twice a second on a terminal and twice a minute in a file, which would fill with it.

    Args:
        per_reply: new instructions that one more reply should bring.
        told_after: replies of this run after which the forecast is told anew.
    """

    async def renew() -> None:
        told = warned = False
        interval, due = 0.5 if sys.stderr.isatty() else 30, 0.0
        while True:
            kept = len(selection.kept)
            if time.monotonic() >= due:
                due = time.monotonic() + interval
                bar.n, bar.total = kept, max(bar.total, kept)  # a reply may hold more than was asked for
                each = (kept - selection.start) / max(budget.replies, 1)
                failed = f", {sum(budget.failures.values())} failed" if budget.failures else ""
                bar.set_postfix_str(f"{budget.replies} replies, {each:.1f} kept each, tokens {budget.used()}{failed}")
            if not told and budget.new_replies >= told_after and kept < selection.target:
                told = True
                more = (selection.target - kept) / per_reply()
                rest = budget.forecast(
                    more, budget.prompt_tokens / budget.replies, budget.completion_tokens / budget.replies
                )
                minutes = more * budget.seconds() / budget.new_replies / 60
                bar.write(f"forecast, after {budget.replies} replies: about {rest}, {minutes:,.1f} min more")
            if not warned and selection.unseen >= ENOUGH_UNSEEN:
                warned = True
                bar.write(_unseen_warning(selection))
            await asyncio.sleep(0.5)

    with tqdm(total=selection.target, initial=len(selection.kept), desc="kept", unit="instruction") as bar:
        renewing = asyncio.create_task(renew())
        try:
            yield
        finally:
            renewing.cancel()
            bar.n = len(selection.kept)
            bar.refresh()


def counts(selection, budget: Budget) -> dict:
    """What report.json says: earlier runs in the same folder included, but for the seconds, which are this run's."""
    return {
        "requests": budget.replies,
        "failed": dict(budget.failures.most_common()),
        "unused_replies": selection.unused,
        "parsed": selection.parsed,
        "dropped": dict(selection.dropped.most_common()),
        "kept": len(selection.kept) - selection.start,
        "kept_before": selection.start,
        "prompt_tokens": budget.prompt_tokens,
        "completion_tokens": budget.completion_tokens,
        "cost_usd": round(budget.dollars(), 4),
        "seconds": round(budget.seconds(), 1),
    }


def print_report(selection, budget: Budget) -> None:
    """The counts as a table."""
    rows = [("requests", budget.replies), *((f"  failed: {why}", n) for why, n in budget.failures.most_common())]
    rows += [("items parsed", selection.parsed)]
    rows += [(f"  dropped: {why}", n) for why, n in selection.dropped.most_common()]
    rows += [("  kept", len(selection.kept) - selection.start)]
    width = max(len(name) for name, _ in rows)
    for name, number in rows:
        print(f"{name.ljust(width)}  {number:>9,}")
    print(f"{'tokens'.ljust(width)}  {budget.used()}\n{'time'.ljust(width)}  {budget.seconds():,.0f} s")
    if selection.unseen:
        print(_unseen_warning(selection))


def _unseen_warning(selection) -> str:
    return (
        f"warning: {selection.unseen} of {len(selection.kept) - selection.start} kept instructions are mostly not "
        "ASCII, which is all that --tokenizer rouge sees: their near-duplicates are not found (--tokenizer unicode "
        "sees all scripts)"
    )
