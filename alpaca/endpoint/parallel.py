"""Many requests at once: each reply is on disk before it counts, and replies are handed on in the order of requests.

With what such a run shows: a forecast, a progress bar and a summary.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from tqdm import tqdm

from alpaca import UserError
from alpaca.common.journal import Journal
from alpaca.common.text import counted, in_brackets
from alpaca.endpoint.batch_api import Batches, refuse_open_batch
from alpaca.endpoint.budget import Budget, in_words, spread
from alpaca.endpoint.client import Completion, OutOfTime, Teacher
from alpaca.endpoint.run import Run, recorded

SAVE_EVERY = 30.0  # seconds between two calls of at_intervals()


@dataclasses.dataclass
class Direct(Run):
    """Send requests with many in flight, at the pace that the server allows.

    Args:
        at_intervals: called every half minute in the thread of in_order(), while that waits for a reply as well.
    """

    at_intervals: Callable[[], None] | None = None

    def __post_init__(self):
        self.news = asyncio.Event()
        self.new: list[tuple[int, Completion]] = []  # replies that are not journaled yet
        self.handed_on = self.sent = 0
        self.pending: set[asyncio.Future] = set()
        self.handing: deque[asyncio.Future] = deque()
        # Two threads beside the event loop: replies are on disk soon, however long in_order() takes for those before.
        self.scribe, self.clerk = ThreadPoolExecutor(max_workers=1), ThreadPoolExecutor(max_workers=1)

    async def run(self) -> None:
        """Ask until ``want`` declines and all replies are handed on.

        Raises:
            UserError: from Teacher.ask. It and Ctrl-C end the requests in flight; replies that have arrived are
                journaled.
        """
        self.loop, self.known = asyncio.get_running_loop(), self.replay()
        self.waiting = dict(self.known)  # replies whose turn to be handed on has not come
        filing, replayed = self._watched(asyncio.ensure_future(self._file_new())), False
        ticking = asyncio.create_task(self._tick())
        try:
            while True:
                await self.news.wait()
                self.news.clear()
                for task in [task for task in self.pending if task.done()]:
                    self.pending.remove(task)
                    task.result()  # raises what it raised
                while self.handing and self.handing[0].done():
                    self.handing.popleft().result()
                    replayed = True  # what the journal held is handed on first
                if filing.done():
                    filing.result()
                    if self.new:
                        filing = self._watched(asyncio.ensure_future(self._file_new()))
                while replayed and len(self.pending) < self.teacher.pace.window and (i := self._next()) is not None:
                    self.pending.add(self._watched(asyncio.create_task(self._keep_asking(i))))
                if replayed and not (self.pending or self.handing or self.new) and filing.done():
                    return
        finally:
            for task in (*self.pending, ticking):
                task.cancel()
            await asyncio.gather(*self.pending, ticking, filing, return_exceptions=True)
            try:
                if self.new:
                    await self._file_new()
            finally:
                await asyncio.gather(*self.handing, return_exceptions=True)
                await self.teacher.close()
                self.scribe.shutdown()
                self.clerk.shutdown()

    def _watched(self, future: asyncio.Future) -> asyncio.Future:
        future.add_done_callback(lambda _: self.news.set())
        return future

    async def _tick(self) -> None:
        while self.at_intervals:
            await asyncio.sleep(SAVE_EVERY)
            await self.loop.run_in_executor(self.clerk, self.at_intervals)

    def _next(self) -> int | None:
        """Return the number of the next request to send, or None if it has to wait."""
        # While one request hangs, only so many others may be sent: their replies wait for its turn.
        most = 8 * self.teacher.pace.max_concurrency
        while (ahead := self.sent - self.handed_on) < most and self.want(self.sent, ahead):
            self.sent += 1
            if self.sent - 1 not in self.known:
                return self.sent - 1
        return None

    async def _keep_asking(self, i: int | None) -> None:
        # The next request is sent in the same step as a reply arrives. With a task for each, replies that arrive
        # together would all be read before the first request is sent, and would stay together: 88% instead of 93% of
        # the ideal rate at 64 in flight.
        while i is not None:
            try:
                reply = await self.teacher.ask(*self.request(i))
            except OutOfTime:
                return
            self.budget.arrived(reply, True)
            self.new.append((i, reply))
            self.news.set()
            i = self._next() if len(self.pending) <= self.teacher.pace.window else None

    async def _file_new(self) -> None:
        """Journal all new replies with one fsync, then hand them to the clerk."""
        batch, self.new = self.new, []
        if batch:
            entries = [{"i": i, **dataclasses.asdict(reply)} for i, reply in batch]
            await self.loop.run_in_executor(self.scribe, self.journal.append, entries)
        self.handing.append(self._watched(self.loop.run_in_executor(self.clerk, self._hand_on, batch)))

    def _hand_on(self, batch: list[tuple[int, Completion]]) -> None:
        self.waiting.update(batch)
        while self.handed_on in self.waiting:
            self.in_order(self.waiting.pop(self.handed_on))
            self.handed_on += 1


def print_forecast(budget: Budget, requests: tuple[float, float], characters: float, max_tokens: int) -> None:
    """Print an estimate for prompts of so many characters. Few replies are shorter than a tenth of ``max_tokens``."""
    text = budget.forecast(requests, characters / 4, (max_tokens / 10, max_tokens))  # English: 4 characters a token
    print(f"forecast: about {text}" + "; updated as replies arrive" * (not budget.settings.batched))


@asynccontextmanager
async def progress_bar(
    budget: Budget, pace, total: int, done: Callable[[], int], left: Callable[[], float], exact: bool
) -> AsyncIterator[None]:
    """Show a bar with what a run has used and the server's pace, and a forecast after 8, 16, 32, … replies.

    It is redrawn twice a second on a terminal, and twice a minute in a file, which would fill with it.

    Args:
        budget: counts the replies.
        pace: the teacher's.
        total: how many are wanted.
        done: how many there are.
        left: how many more requests that should take, judged by the replies so far.
        exact: whether ``left`` is a count, not an estimate.
    """
    forecast_due = 8  # replies

    def redraw() -> None:
        bar.n, bar.total = done(), max(bar.total, done())  # a reply may hold more than was asked for
        failed = f"{budget.failures.total():,} failed, " if budget.failures else ""
        cost = f"${budget.cost:,.2f}, " if budget.cost else ""
        tokens = budget.prompt_tokens + budget.completion_tokens
        bar.set_postfix_str(f"{failed}{counted(budget.replies, 'reply')}, {tokens:,} tokens, {cost}{pace}")

    def forecast() -> str:
        sure = 1 + 2 / budget.new_replies**0.5  # two standard errors, if replies differ as much as their mean
        requests = (left(), left()) if exact else (left() / sure, left() * sure)
        prompt, reply = budget.prompt_tokens / budget.replies, budget.completion_tokens / budget.replies
        minutes = [n * budget.seconds() / budget.new_replies / 60 for n in requests]
        rest = budget.forecast(requests, prompt, (reply / sure, reply * sure) if exact else (reply, reply))
        return f"forecast after {budget.replies:,} replies: {rest}, {spread(*minutes, '{:,.1f}')} min more"

    async def keep_redrawing() -> None:
        nonlocal forecast_due
        due = 0.0
        while True:
            if budget.new_replies >= forecast_due and left() >= 1 and budget.prompt_tokens:
                forecast_due = 2 * budget.new_replies
                redraw()  # write() shows the bar again
                bar.write(forecast())
            if budget.seconds() >= due:
                due = budget.seconds() + (0.5 if sys.stderr.isatty() else 30)
                redraw()
            await asyncio.sleep(0.5)

    # Without the rate: of 80 columns, it leaves too few for what has failed and what it costs.
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    with tqdm(total=total, initial=done(), bar_format=form, disable=not total) as bar:
        redrawing = asyncio.create_task(keep_redrawing())
        try:
            yield
        finally:
            redrawing.cancel()
            redraw()


def ask_each(
    teacher: Teacher, prompts: list[str], seed: int | None, journal: Journal, budget: Budget
) -> list[Completion | None]:
    """Ask for a reply to each prompt that has none with a text in the journal, within a budget.

    Args:
        teacher: as in Run; a request that failed in an earlier run is sent again.
        prompts: the same, in the same order, each time that the run continues.
        seed: sent with each request.
        journal: as in Run.
        budget: when it is spent, or too much fails, nothing more is sent.

    Returns:
        For each prompt the reply, or the failure, or None where the run ended before it was asked.
    """
    earlier = sum(reply.text is not None for _, reply in recorded(journal))
    missing = len(prompts) - earlier
    if missing and not budget.exhausted():
        characters = sum(map(len, prompts)) / len(prompts)
        print_forecast(budget, (missing, missing), characters, teacher.decoding.max_tokens)

    def want(number: int, in_flight: int) -> bool:
        return number < len(prompts) and not budget.exhausted() and not budget.failing()

    what = teacher, (lambda number: (prompts[number], seed)), journal, budget, (lambda reply: None), want, True

    async def run() -> str | None:
        if budget.settings.batched:
            return await Batches(*what).run()
        refuse_open_batch(journal)
        counts = (lambda: earlier + budget.new_replies), (lambda: missing - budget.new_replies)
        async with progress_bar(budget, teacher.pace, len(prompts), *counts, exact=True):
            await Direct(*what).run()

    try:
        if more := asyncio.run(run()):
            print(more)
    except KeyboardInterrupt:
        if not budget.settings.batched:
            print(f"\nthe same command continues: the replies are in {journal.path}", file=sys.stderr)
        raise
    found = dict(recorded(journal))
    return [found.get(number) for number in range(len(prompts))]


def summarize(
    made: str, replies: list[Completion | None], budget: Budget, journal: Journal, notes: list[tuple[int, str]]
) -> None:
    """Print what a run of ask_each() made. Its journal is kept while the same command has something left to ask.

    Args:
        made: what there is now, "504 judgments in J.jsonl".
        replies: from ask_each().
        budget: the run's.
        journal: the run's, closed.
        notes: counts and what they count.

    Raises:
        UserError: too many requests failed, or all of them: there may be too few for the budget to judge their share.
    """
    errors = Counter(reply.error for reply in replies if reply and reply.error)
    unasked = sum(reply is None for reply in replies)
    why = budget.failing()  # which says why they failed
    notes = [*notes, (errors.total(), "failed" if why else f"failed: {in_words(errors)}"), (unasked, "not asked")]
    made += f"{in_brackets(notes)}; tokens {budget.used()}"
    if unasked or any(reply.text is None for reply in replies if reply):
        made += "; the same command continues with what is missing"
    else:
        journal.path.unlink()
    if why:
        raise UserError(f"{why}: the run ended; {made}")
    why = unasked and budget.exhausted()
    if (errors or why) and all(reply is None or reply.error for reply in replies):
        raise UserError(f"{'not one request succeeded' if errors else f'{why} ended the run'}: {made}")
    if why:
        print(f"{why} ended the run")
    print(made)
