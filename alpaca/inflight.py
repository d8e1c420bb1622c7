"""Many requests at once; each reply is on disk before it counts, and all are handed on in the order of requests."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from alpaca.journal import Journal
from utils import Completion, Teacher


async def ask_all(
    teacher: Teacher,
    request: Callable[[int], tuple[str, int | None]],
    journal: Journal,
    arrived: Callable[[Completion, bool], None],
    in_order: Callable[[Completion], None],
    want: Callable[[int], bool],
    max_concurrency: int,
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
        want: given the number in flight, whether to send one more now. All is done when it declines with none in
            flight.
        max_concurrency: requests in flight at most.

    Raises:
        UserError: from Teacher.ask. It and Ctrl-C end the requests in flight; replies that were there are journalled.
    """
    replies: dict[int, Completion] = {}
    for entry in journal.entries:
        if "i" in entry:
            replies[entry["i"]] = Completion(**{key: value for key, value in entry.items() if key != "i"})
            arrived(replies[entry["i"]], False)
    known = set(replies)
    handed_on = sent = 0

    def hand_on(new: list[tuple[int, Completion]]) -> None:
        nonlocal handed_on
        if new:
            journal.append({"i": i, **dataclasses.asdict(reply)} for i, reply in new)
        replies.update(new)
        while handed_on in replies:
            in_order(replies.pop(handed_on))
            handed_on += 1

    async def ask(i: int) -> tuple[int, Completion]:
        return i, await teacher.ask(*request(i))

    def finished(tasks) -> list[tuple[int, Completion]]:
        return [task.result() for task in tasks if not task.cancelled() and not task.exception()]

    pending: set[asyncio.Task] = set()
    filed: deque[asyncio.Future] = deque()  # batches of replies that the clerk has not finished with
    loop = asyncio.get_running_loop()
    # One thread, so that replies are journalled and handed on one batch after the other, while requests go on.
    with ThreadPoolExecutor(max_workers=1) as clerk:
        try:
            filed.append(loop.run_in_executor(clerk, hand_on, []))
            while True:
                # Far behind, or nothing else to do: wait for the clerk. Its errors come out here.
                while filed and (filed[0].done() or len(filed) > 4 or not pending):
                    await asyncio.shield(filed[0])
                    filed.popleft()
                # A request that hangs must not let the others run away from it: their replies wait for its turn.
                while len(pending) < max_concurrency and sent < handed_on + 8 * max_concurrency and want(len(pending)):
                    if sent not in known:
                        pending.add(asyncio.create_task(ask(sent)))
                    sent += 1
                if not pending:
                    if filed:
                        continue
                    return
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                new = finished(done)
                for _, reply in new:
                    arrived(reply, True)
                filed.append(loop.run_in_executor(clerk, hand_on, new))
                for task in done:
                    task.result()  # raises what it raised
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
            if new := finished(pending):
                for _, reply in new:
                    arrived(reply, True)
                await loop.run_in_executor(clerk, hand_on, new)
            await teacher.close()
