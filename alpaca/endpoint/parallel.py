"""Many requests at once; each reply is on disk before it counts, and all are handed on in the order of requests."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from alpaca.common.journal import Journal
from alpaca.endpoint.client import Completion, Teacher


async def ask_all(
    teacher: Teacher,
    request: Callable[[int], tuple[str, int | None]],
    journal: Journal,
    arrived: Callable[[Completion, bool], None],
    in_order: Callable[[Completion], None],
    want: Callable[[int, int], bool],
    max_concurrency: int,
    retry_failed: bool = False,
) -> None:
    """Sends requests 0, 1, 2, … with many in flight, journals each reply, and hands the replies on in their order.

    What comes out so depends on the replies alone, not on when they came. Replies that the journal holds already are
    handed on first and not asked for again.

    Args:
        teacher: whom to ask.
        request: number → (prompt, seed).
        journal: gets an entry ``{"i": number, …Completion}`` for each reply, before the reply counts.
        arrived: called for each reply at once, in the event loop (to count what it cost), with False for one that the
            journal held.
        in_order: called for each reply in the order of the numbers, once it is journalled, in a thread beside the
            event loop; it may take its time.
        want: given the number of the next request, and how many before it have replies that were not handed on, whether
            to send it now. All is done when it declines with none of them left.
        max_concurrency: requests in flight at most.
        retry_failed: ask again what the journal holds without a text; what that cost still counts.

    Raises:
        UserError: from Teacher.ask. It and Ctrl-C end the requests in flight; replies that were there are journalled.
    """
    replies: dict[int, Completion] = {}
    for entry in journal.entries:
        if "i" in entry:
            reply = Completion(**{key: value for key, value in entry.items() if key != "i"})
            if not retry_failed or reply.text is not None:
                replies[entry["i"]] = reply
            arrived(reply, False)
    known = set(replies)
    handed_on = sent = 0
    new: list[tuple[int, Completion]] = []  # replies that the clerk has not got yet
    pending: set[asyncio.Task] = set()
    news = asyncio.Event()

    def hand_on(batch: list[tuple[int, Completion]]) -> None:
        nonlocal handed_on
        replies.update(batch)
        while handed_on in replies:
            in_order(replies.pop(handed_on))
            handed_on += 1

    def next_number() -> int | None:
        nonlocal sent
        # A request that hangs must not let the others run away from it: their replies wait for its turn.
        while sent < handed_on + 8 * max_concurrency and want(sent, sent - handed_on):
            sent += 1
            if sent - 1 not in known:
                return sent - 1
        return None

    async def keep_asking(i: int | None) -> None:
        # The next request goes out in the same breath as a reply comes in. With a task for each, replies that come
        # together would all be read before the first request is sent, and they would stay together: 88% instead of 93%
        # of the ideal rate at 64 in flight.
        while i is not None:
            reply = await teacher.ask(*request(i))
            arrived(reply, True)
            new.append((i, reply))
            news.set()
            i = next_number()

    # Two threads beside the event loop: replies are on disk soon, however long those before them take to be handed on.
    with ThreadPoolExecutor(max_workers=1) as scribe, ThreadPoolExecutor(max_workers=1) as clerk:
        loop = asyncio.get_running_loop()

        def watched(future: asyncio.Future) -> asyncio.Future:
            future.add_done_callback(lambda _: news.set())
            return future

        async def file_new() -> None:
            """Journals all that is new with one fsync, then hands it to the clerk."""
            batch = new.copy()
            new.clear()
            if batch:
                entries = [{"i": i, **dataclasses.asdict(reply)} for i, reply in batch]
                await loop.run_in_executor(scribe, journal.append, entries)
            handing.append(watched(loop.run_in_executor(clerk, hand_on, batch)))

        handing: deque[asyncio.Future] = deque()
        filing = watched(asyncio.ensure_future(file_new()))  # what the journal held is handed on
        replayed = False
        try:
            while True:
                await news.wait()
                news.clear()
                for task in [task for task in pending if task.done()]:
                    pending.remove(task)
                    task.result()  # raises what it raised
                while handing and handing[0].done():
                    handing.popleft().result()
                    replayed = True
                if filing.done():
                    filing.result()
                    if new:
                        filing = watched(asyncio.ensure_future(file_new()))
                while replayed and len(pending) < max_concurrency and (i := next_number()) is not None:
                    pending.add(watched(asyncio.create_task(keep_asking(i))))
                if replayed and not (pending or handing or new) and filing.done():
                    return
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, filing, return_exceptions=True)
            try:
                if new:
                    await file_new()
            finally:
                await asyncio.gather(*handing, return_exceptions=True)
                await teacher.close()
