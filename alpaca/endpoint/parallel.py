"""Many requests at once: each reply is on disk before it counts, and replies are handed on in the order of requests.

Also what a run prints: a forecast, a progress bar and a summary.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager

from tqdm import tqdm

from alpaca import UserError
from alpaca.common.journal import Journal
from alpaca.common.text import counted, in_brackets, printable
from alpaca.endpoint.batch_api import Batches, refuse_open_batch
from alpaca.endpoint.budget import Budget, in_words, spread
from alpaca.endpoint.client import Completion, Teacher
from alpaca.endpoint.run import Run, recorded

SAVE_EVERY = 30.0  # seconds between two calls of at_intervals()


@dataclasses.dataclass
class Direct(Run):
    """Send requests with many in flight, at the pace that the server allows.

    Args:
        at_intervals: called every half minute in the thread of in_order(), also while that waits for a reply.
    """

    at_intervals: Callable[[], None] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.news, self.sent = asyncio.Event(), 0
        self.new: dict[int, Completion] = {}  # replies that are not journaled yet
        self.asking: set[asyncio.Task] = set()
        self.keeping: set[asyncio.Task] = set()
        # A thread for each: replies are on disk soon, however long in_order() takes for those before.
        self.journaling, self.handing = asyncio.Lock(), asyncio.Lock()

    async def run(self) -> None:
        """Send requests until ``want`` returns False and all replies are handed on.

        Raises:
            UserError: from Teacher.ask. It and Ctrl-C cancel the requests in flight; replies that have arrived are
                journaled.
        """
        self.replay()
        ticking = asyncio.create_task(self._tick())
        try:
            await self._in_turn(self.hand_on, {})  # what the journal holds
            while True:
                while len(self.asking) < self.teacher.pace.window and (i := self._next()) is not None:
                    self._start(self.asking, self._keep_asking(i))
                if not self.asking | self.keeping:
                    return
                await self.news.wait()
                self.news.clear()
                for tasks in (self.asking, self.keeping):
                    for task in [task for task in tasks if task.done()]:
                        tasks.remove(task)
                        task.result()  # raises what it raised
        finally:
            for task in (*self.asking, ticking):
                task.cancel()
            await asyncio.gather(*self.asking, *self.keeping, return_exceptions=True)
            await self.teacher.close()
            for task in self.keeping:
                task.result()

    def _start(self, tasks: set[asyncio.Task], work: Coroutine) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self.news.set())
        tasks.add(task)

    async def _tick(self) -> None:
        while self.at_intervals:
            await asyncio.sleep(SAVE_EVERY)
            self._start(self.keeping, self._in_turn(self.at_intervals))

    def _next(self) -> int | None:
        """Return the number of the next request to send, or None if it has to wait."""
        # While one request hangs, only so many others may be sent: their replies wait for it.
        most = 8 * self.teacher.pace.max_concurrency
        while (ahead := self.sent - self.handed_on) < most and self.want(self.sent, ahead):
            self.sent += 1
            if self.sent - 1 not in self.known:
                return self.sent - 1
        return None

    async def _keep_asking(self, i: int | None) -> None:
        # Send the next request in the same step as a reply arrives. With one task per request, replies that arrive
        # together would all be read before the first request is sent, and would stay together: 88% instead of 93% of
        # the ideal rate at 64 in flight.
        while i is not None:
            if not (reply := await self.teacher.ask(*self.request(i))):
                return  # out of time
            self.budget.arrived(reply, True)
            self.new[i] = reply
            self._start(self.keeping, self._keep())
            i = self._next() if len(self.asking) <= self.teacher.pace.window else None

    async def _keep(self) -> None:
        """Journal all new replies with one fsync, then hand them on."""
        async with self.journaling:
            batch, self.new = self.new, {}
            if not batch:
                return  # another call has written them
            await asyncio.to_thread(self.write, batch)
        await self._in_turn(self.hand_on, batch)

    async def _in_turn(self, work: Callable, *arguments) -> None:
        """Run work that must not overlap with other such work."""
        async with self.handing:
            await asyncio.to_thread(work, *arguments)


def print_forecast(budget: Budget, requests: tuple[float, float], characters: float, max_tokens: int) -> None:
    """Print an estimate for prompts of so many characters. Few replies are shorter than a tenth of ``max_tokens``."""
    text = budget.forecast(requests, characters / 4, (max_tokens / 10, max_tokens))  # English: 4 characters a token
    print(f"forecast: about {text}" + "; updated as replies arrive" * (not budget.settings.batched))


@asynccontextmanager
async def progress_bar(
    budget: Budget, pace, total: int, done: Callable[[], int], left: Callable[[], float], exact: bool
) -> AsyncIterator[None]:
    """Show a bar with what a run has used and the server's pace, and a forecast after 8, 16, 32, … replies.

    It is redrawn twice a second on a terminal, and twice a minute in a log file, to keep that short.

    Args:
        budget: counts the replies.
        pace: the teacher's.
        total: how many results are wanted.
        done: how many there are.
        left: how many more requests that should take, given the replies so far.
        exact: whether ``left`` is a count, not an estimate.
    """

    def redraw() -> None:
        bar.total = max(bar.total, done())  # a reply may hold more than was asked for
        failed = f"{budget.failures.total():,} failed, " if budget.failures else ""
        cost = f"${budget.cost:,.2f}, " if budget.cost else ""
        tokens = budget.prompt_tokens + budget.completion_tokens
        postfix = f"{failed}{counted(budget.replies, 'reply')}, {tokens:,} tokens, {cost}{pace}"
        bar.set_postfix_str(postfix, refresh=False)
        bar.update(done() - bar.n)

    def forecast() -> str:
        sure = 1 + 2 / budget.new_replies**0.5  # two standard errors, if replies differ as much as their mean
        requests = (left(), left()) if exact else (left() / sure, left() * sure)
        prompt, reply = budget.prompt_tokens / budget.replies, budget.completion_tokens / budget.replies
        minutes = [n * budget.seconds() / budget.new_replies / 60 for n in requests]
        rest = budget.forecast(requests, prompt, (reply / sure, reply * sure) if exact else (reply, reply))
        return f"forecast after {budget.replies:,} replies: {rest}, {spread(*minutes, '{:,.1f}')} min more"

    async def keep_redrawing() -> None:
        forecast_due = 8  # replies
        while True:
            redraw()
            if budget.new_replies >= forecast_due and left() >= 1 and budget.prompt_tokens:
                forecast_due = 2 * budget.new_replies
                bar.write(forecast())  # also redraws the bar
            await asyncio.sleep(0.5)

    often = 0.5 if sys.stderr.isatty() else 30  # s
    # Without the rate: in 80 columns it would leave no room for failures and cost.
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    # The time left is by the mean so far: tqdm's moving average leaves out the time in which nothing was added.
    how = {"disable": not total, "mininterval": often, "miniters": 0, "smoothing": 0}
    bar = tqdm(total=total, initial=done(), bar_format=form, **how)
    with bar:
        redrawing = asyncio.create_task(keep_redrawing())
        try:
            yield
        finally:
            redrawing.cancel()
            redraw()


def ask_each(
    teacher: Teacher, prompts: list[str], seed: int | None, journal: Journal, budget: Budget
) -> list[Completion | None]:
    """Request a reply to each prompt that has none with a text in the journal, within a budget.

    Args:
        teacher: as in Run; a request that failed in an earlier run is sent again.
        prompts: the same, in the same order, each time that the run continues.
        seed: sent with each request.
        journal: as in Run.
        budget: when it is spent, or too many requests fail, nothing more is sent.

    Returns:
        For each prompt the reply, the failure, or None if the run ended before it was sent.
    """
    earlier = sum(reply.text is not None for _, reply in recorded(journal))
    missing, before = len(prompts) - earlier, budget.new_replies  # of another model, where two share a budget
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
        new = lambda: budget.new_replies - before  # noqa: E731
        counts = (lambda: earlier + new()), (lambda: missing - new())
        async with progress_bar(budget, teacher.pace, len(prompts), *counts, exact=True):
            await Direct(*what).run()

    try:
        if more := asyncio.run(run()):
            print(printable(more))
    except KeyboardInterrupt:
        if not budget.settings.batched:
            print(f"\nreplies so far are in {journal.path}: the same command continues", file=sys.stderr)
        raise
    found = dict(recorded(journal))
    return [found.get(number) for number in range(len(prompts))]


def summarize(
    made: str, replies: list[Completion | None], budget: Budget, journal: Journal, notes: list[tuple[int, str]]
) -> None:
    """Print what a run of ask_each() made. Its journal is kept while the same command has something left to send.

    Args:
        made: the result so far, "504 judgments in J.jsonl".
        replies: from ask_each().
        budget: the run's.
        journal: the run's, closed.
        notes: counts and what they count.

    Raises:
        UserError: too many requests failed, or all of them (there may be too few for max_failure_rate).
    """
    errors = Counter(reply.error for reply in replies if reply and reply.error)
    unasked = sum(reply is None for reply in replies)
    why = budget.failing()  # it says why they failed
    notes = [*notes, (errors.total(), "failed" if why else f"failed: {in_words(errors)}"), (unasked, "not asked")]
    made += f"{in_brackets(notes)}; tokens {budget.used()}"
    if unasked or any(reply.text is None for reply in replies if reply):
        made += "; run the same command for the rest"
    else:
        journal.path.unlink()
    if why:
        raise UserError(f"{why}: the run ended; {made}")
    why = unasked and budget.exhausted()
    if (errors or why) and all(reply is None or reply.error for reply in replies):
        said = ["all requests failed"] * bool(errors) + [f"{why} ended the run"] * bool(why)
        raise UserError(f"{'; '.join(said)}: {made}")
    if why:
        print(f"{why} ended the run")
    print(made)
