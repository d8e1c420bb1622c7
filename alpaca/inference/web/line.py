"""The line of those who wait for an answer: fair to every address, and bounded."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator

from alpaca.inference.web.server import page_error

MAX_WAITING = 20  # requests of one address that wait for their turn; further ones are refused
STREAMS = 2  # answers of a model at once: a long one does not keep the next page waiting


class Turn:
    """A request's turn: from when it is granted until its visitor has left and its models have ended.

    For Gradio a stopped answer has ended, while its model may still be reading the prompt.
    """

    def __init__(self, address: str):
        self.address, self.left, self.threads = address, threading.Event(), []

    @property
    def ended(self) -> bool:
        return self.left.is_set() and not any(thread.is_alive() for thread in self.threads)


class Line:
    """Who is answered next: STREAMS at once, and of those who wait, the address whose last turn was longest ago."""

    def __init__(self):
        self.waiting: list[Turn] = []  # in order of arrival
        self.granted: list[Turn] = []
        self.served: dict[str, float] = {}  # address → its last turn; forgotten when nobody waits or is answered

    async def wait(self, turn: Turn) -> AsyncIterator[int]:
        """Yield a request's place, from 1, when it changes and each second, until it has its turn.

        Raises:
            gr.Error: too many others of its address wait.
        """
        if sum(other.address == turn.address for other in self.waiting) >= MAX_WAITING:
            raise page_error(f"{MAX_WAITING} requests from your address wait already: try again later.")
        if not self.waiting and all(other.ended for other in self.granted):
            self.served.clear()
        self.waiting.append(turn)
        shown, at = 0, 0.0
        try:
            while True:
                self.granted = [other for other in self.granted if not other.ended]
                order = sorted(self.waiting, key=lambda other: self.served.get(other.address, 0.0))
                place = 1 + order.index(turn)
                if place == 1 and len(self.granted) < STREAMS:
                    break
                if place != shown or time.monotonic() - at > 1:  # a yield also tells Gradio whether its visitor is gone
                    shown, at = place, time.monotonic()
                    yield place
                await asyncio.sleep(0.05)
            self.granted.append(turn)
            self.served[turn.address] = time.monotonic()
        finally:
            self.waiting.remove(turn)
