"""How fast requests may go out, learned from what the server refuses."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import math
import random
import re
import time
from collections.abc import Callable, Mapping

from alpaca import UserError


class Limit:
    """What the server accepted when it last refused, and more later: twice as much after ``patience`` seconds."""

    FIRST = 0.5  # seconds of patience at first; each refusal makes it four times as long, up to a minute
    value, since, patience = math.inf, 0.0, FIRST

    def at(self, now: float) -> float:
        x = max(0.0, now - self.since) / self.patience  # like TCP CUBIC: slowly first, then faster and faster
        return self.value * (1 + x / 6 + x**3)

    def learn(self, value: float, since: float, longest: float) -> None:
        self.value, self.since, self.patience = value, since, min(longest, 4 * self.patience)


class Pace:
    """The pace of all requests of a run.

    A token bucket is empty whenever it refuses. What it accepts between two refusals, divided by the time, is therefore
    the server's rate: it is measured, not found by halving. So is the number of requests that it takes at once.
    aiolimiter needs to know the rate; tenacity lets each request back off on its own. Times are in seconds.

    Args:
        max_concurrency: requests in flight at once, at most.
        requests_per_minute: spaces requests evenly, at most so many per minute.
        tokens_per_minute: the same for tokens, prompts and replies together.
        give_up_after: seconds of refusals without one success until stuck() says so.
        clock: read by turn(), window and str().
    """

    def __init__(
        self,
        max_concurrency: int,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        give_up_after: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.max_concurrency, self.give_up_after, self.clock = max_concurrency, give_up_after, clock
        self._request_gap, self._token_gap = (60 / n if n else 0.0 for n in (requests_per_minute, tokens_per_minute))
        self._rate, self._at_once = Limit(), Limit()  # requests/s, requests in flight
        self._next = self._next_by_tokens = -math.inf  # nothing may be sent earlier
        self._open: dict[int, tuple[float, int, float]] = {}  # ticket → when sent, others in flight, estimated tokens
        self._sent = self._refused = self._in_a_row = 0  # what is not refused counts as accepted: refusals come fast
        self._last_refusal, self._accepted = -math.inf, -1  # when, and how many were accepted until then
        self._ramp_end = max_concurrency  # requests sent
        self._marks: list[tuple[float, int]] = []  # the same for the last two that measure the rate
        self._failing_since, self._asked_until, self._last_error = math.inf, -math.inf, ""
        self._newcomers, self._line, self._news = asyncio.Lock(), asyncio.Lock(), asyncio.Event()

    @property
    def in_flight(self) -> int:
        """Return the number of requests that are sent and not answered."""
        return len(self._open)

    @property
    def window(self) -> int:
        """Return how many requests may be in flight now."""
        return int(min(self._at_once.at(self.clock()), self.max_concurrency))

    def __str__(self) -> str:
        limit, flying = self._rate, f"{self.in_flight} in flight"
        if limit.patience == Limit.FIRST or limit.at(self.clock()) > 2 * limit.value:  # not measured, or long ago
            return flying
        return f"{flying}, limit {float(f'{60 * limit.value:.2g}'):,.6g}/min"

    def wait(self, now: float) -> float:
        """Return the seconds until the next request may be sent, or until it is worth checking again."""
        full = self.in_flight + 1 > min(self._at_once.at(now), self.max_concurrency)
        return max(Limit.FIRST if full else 0.0, self._next - now, self._next_by_tokens - now)

    def sent(self, now: float, tokens: float = 0) -> int:
        """Count a request with an estimate of its tokens. Return its ticket."""
        self._sent += 1
        self._open[self._sent] = now, self.in_flight, tokens
        # At first and after a refusal, send one at a time: a refusal then stops the rest. Later, replies set the pace.
        left = self._ramp_end - self._sent
        ramp_gap = 0.008 if left >= self.max_concurrency - 8 else 0.002 if left >= 0 else 0.0
        self._next = max(self._next, now) + max(ramp_gap, self._request_gap, 1 / self._rate.at(now))
        self._next_by_tokens = max(self._next_by_tokens, now) + tokens * self._token_gap
        return self._sent

    def accepted(self, now: float, ticket: int, headers: Mapping[str, str], tokens: int | None = None) -> None:
        """Count a reply that is not a refusal, and the tokens that it used."""
        at, _, estimate = self._end(ticket)
        self._failing_since = math.inf
        self._next_by_tokens += ((tokens or estimate) - estimate) * self._token_gap
        self._pause(now, at + _asked(headers))  # the server's seconds count from the request, not from its reply

    def failed(self, now: float, ticket: int) -> None:
        """Count a request that ended without a reply, which says nothing about the pace."""
        self._end(ticket)

    def refused(self, now: float, ticket: int, headers: Mapping[str, str], error: str = "HTTP 429") -> None:
        """Count a refusal. Only a 429 says something about the rate; others are an overload or an outage."""
        at, others, estimate = self._end(ticket)
        self._refused, self._last_error = self._refused + 1, error
        self._next_by_tokens -= estimate * self._token_gap
        self._failing_since = min(self._failing_since, at)
        self._asked_until = max(self._asked_until, now + _asked(headers))
        self._pause(now, self._asked_until)
        if at <= self._last_refusal:
            return  # sent before the last refusal, which has already slowed the pace
        accepted = ticket - self._refused
        self._in_a_row = self._in_a_row + 1 if accepted <= self._accepted else 0
        self._last_refusal, self._accepted, self._ramp_end = now, accepted, self._sent + self.max_concurrency
        rate, patience = self._measured(at, accepted) if "429" in error else (self._rate.value, 60.0)
        self._pause(now, now + max(1 / rate, 0.5 * (2 ** min(self._in_a_row, 5) - 1)))  # up to 15.5 s
        since = max(now, self._next)
        if "429" in error:
            self._rate.learn(rate, since, patience)
            if not self._in_a_row:
                self._marks = [*self._marks[-1:], (at, accepted)]
        # More than it takes at once: a limit, and a lasting one if it is no higher than last time.
        most = max((others + 1 for _, others, _ in self._open.values()), default=0)
        if others >= most:
            self._at_once.learn(most or 1, since, max(60, patience) if 0 < most <= self._at_once.value else Limit.FIRST)
        if self._in_a_row > 4 or since - at > 30:
            self._marks = []  # an outage or a quota would be measured as a low rate

    def _end(self, ticket: int) -> tuple[float, int, float]:
        self._news.set()
        return self._open.pop(ticket)

    def _pause(self, now: float, until: float) -> None:
        """Hold all requests until then, and up to 10% longer: other programs may wait for the same moment."""
        if until > now:
            self._next = max(self._next, until + (until - now) * random.uniform(0, 0.1))

    def _measured(self, now: float, accepted: int) -> tuple[float, float]:
        """Return the server's rate (requests/s) since the last mark but one, and the patience to use with it."""
        start, before = self._marks[0] if self._marks else (now, accepted)
        if accepted <= before:
            return 2.0, Limit.FIRST  # after the first refusal: the bucket was full at first, which measures nothing
        rate, last = (accepted - before) / (now - start), self._rate.at(now)
        if last > 1.3 * rate:  # far more than was accepted: the bucket was full for a while, the truth lies between
            rate = min(2 * rate, math.sqrt(rate * last))
        return rate, max(60, 30 / rate)

    def stuck(self, now: float) -> str | None:
        """Return why the run should give up, or None."""
        since, until = min(now, self._failing_since), max(now, self._asked_until)
        if self.in_flight or until - since < self.give_up_after:
            return None
        asked = f"the server asks to wait {until - now:,.0f} s"
        why = asked if until > now else f"no request has succeeded for {now - since:,.0f} s"
        return f"{why} (last error: {self._last_error}): try later, or raise give_up_after"

    async def turn(self, tokens: float = 0, again: bool = False) -> int:
        """Wait in line until a request may be sent, count it, and return its ticket. Raise UserError if stuck().

        A retry (``again``) goes before new requests: the replies after it wait for its own.
        """
        async with contextlib.nullcontext() if again else self._newcomers, self._line:
            while not (why := self.stuck(self.clock())):
                if not (seconds := self.wait(self.clock())):
                    return self.sent(self.clock(), tokens)
                self._news.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), min(seconds, 60))
            raise UserError(why)


def _asked(headers: Mapping[str, str]) -> float:
    """Return the seconds that a server asks to wait, or 0. At most 120 until a reset: a refusal would say if longer."""
    headers = {name.lower(): value for name, value in headers.items()}
    used_up = [name for name, left in headers.items() if "ratelimit-remaining" in name and left == "0"]
    resets = [_seconds(headers.get(name.replace("remaining", "reset"), "")) for name in used_up]
    named = _seconds(headers.get("retry-after-ms", "") + "ms") or _seconds(headers.get("retry-after", ""))
    return named or min(120.0, max(resets, default=0.0))


def _seconds(text: str) -> float:
    """Return the seconds of "1.5", "20ms" or "1h2m3.5s", or until a date; 0 for anything else."""
    if re.fullmatch(r"(\d{1,7}(\.\d+)?(ms|[hms]|$))+", text):
        units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001, "": 1}
        return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)(ms|[hms]|)", text))
    with contextlib.suppress(ValueError, OverflowError):
        return email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    return 0.0
