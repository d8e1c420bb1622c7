"""How fast requests may go out, learned from what the server refuses."""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import math
import random
import re
import time
from collections import deque
from collections.abc import Callable, Mapping

from alpaca import UserError
HALF, POW = 0.0, 0.5

# aiolimiter and tenacity do not fit: the first needs to know the rate, the second paces each request on its own.


class Pace:
    """The pace of all requests of a run.

    Between two refusals a token bucket, empty at both, let through exactly what its rate allows: the server's rate is
    measured, not guessed by halving. Sending then speeds up slowly at first, faster later in case the limit was lifted.
    A limit on requests in flight shows as refusals that only a reply ends; it is learned separately, as ``window``.

    Args:
        max_concurrency: requests in flight at once.
        requests_per_minute: never send more; they are spaced evenly.
        tokens_per_minute: never use more, prompts and replies together.
        give_up_after: seconds of nothing but refusals until ``turn`` raises.
        clock: monotonic, in seconds, as every ``now`` below.
    """

    RAMP_GAP = 0.003  # s between sends before the first reply: 64 take 0.2 s, and a refusal from nearby stops the rest
    FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # s after a refusal that names no time
    ENOUGH = 15  # accepted requests that measure a rate: one more or less is 7%
    LONGEST_PROBE = 60.0  # s between two tries of one request more in flight than the server took last time

    def __init__(
        self,
        max_concurrency: int,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        give_up_after: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.max_concurrency, self.give_up_after, self.clock = max_concurrency, give_up_after, clock
        self.window = float(max_concurrency)
        self._request_gap = 60 / requests_per_minute if requests_per_minute else 0.0
        self._token_gap = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._open: dict[float, tuple[int, float]] = {}  # ticket → its number, estimated tokens
        self._number, self._answered = 0, False
        self._next = self._next_by_tokens = self._resume = -math.inf  # no request goes out before
        self._rate: float | None = None  # requests/s at the last refusal; None: no limit known
        self._searching = False
        self._slowed = self._asked_until = self._last_refusal = -math.inf
        self._ceiling = math.inf
        self._epoch: tuple[float, int] | None = None
        self._refused = self._empty = 0
        self._epochs: deque[tuple[int, float]] = deque(maxlen=self.ENOUGH)  # accepted, seconds
        self._probed, self._probe_gap = -math.inf, self.FIRST_PAUSE
        self._failing_since: float | None = None
        self._last_error, self._stated_limit = "", None
        self._random = random.Random(0)
        self._turn, self._news = asyncio.Lock(), asyncio.Event()

    @property
    def in_flight(self) -> int:
        """Return how many requests were sent and have not ended."""
        return len(self._open)

    def wait(self, now: float) -> float:
        """Return the seconds until the next request may be sent; inf: not before one in flight ends."""
        if self.in_flight >= self.max_concurrency:
            return math.inf
        at = max(self._resume, self._next, self._next_by_tokens)
        if self.in_flight >= int(self.window):
            at = max(at, self._probed + self._probe_gap)
        return max(0.0, at - now)

    def sent(self, now: float, tokens: float = 0) -> float:
        """Count a request with an estimate of its tokens, and return its ticket, the time."""
        while now in self._open:
            now = math.nextafter(now, math.inf)
        if self.in_flight >= int(self.window):
            self._probed, self._probe_gap = now, max(self._probe_gap / 2, self.RAMP_GAP)
            self.window = self.in_flight + 1.0
        self._number += 1
        self._open[now] = self._number, tokens, self.in_flight
        gap = 0.0 if self._answered else self.RAMP_GAP
        if self._rate:
            gap = 1 / self._rate_at(now)
            if self._searching:
                self._rate *= 1.5
                if self._rate > 1 / self.RAMP_GAP:
                    self._rate, self._searching = None, False
        # What a full window held up may follow at once.
        self._next = max(self._next, now - 2 * gap) + gap
        self._next = max(self._next, now + self._request_gap)
        self._next_by_tokens = max(self._next_by_tokens, now) + tokens * self._token_gap
        return now

    def _rate_at(self, now):
        s = (now - self._slowed) * min(1.0, self._rate) ** POW
        return self._rate * (1 + 0.002 * s + (s / 60) ** 3)

    def accepted(self, now: float, ticket: float, headers: Mapping[str, str], tokens: int | None = None) -> None:
        """Count a reply that is not a refusal."""
        _, estimate, others = self._end(ticket)
        if others >= self._ceiling:
            self._ceiling, self.window = math.inf, min(2 * self.window, float(self.max_concurrency))
        self._answered, self._failing_since = True, None
        if tokens is not None:
            self._next_by_tokens += (tokens - estimate) * self._token_gap
        known = {name.lower(): value for name, value in headers.items()}
        self._stated_limit = known.get("x-ratelimit-limit-requests", self._stated_limit)
        self._pause(ticket + min(_reset(known), 120.0))

    def refused(self, now: float, ticket: float, headers: Mapping[str, str], error: str = "HTTP 429") -> None:
        """Count a refusal."""
        number, estimate, _ = self._end(ticket)
        self._next_by_tokens -= estimate * self._token_gap
        self._last_error = error
        if self._failing_since is None:
            self._failing_since = ticket
        known = {name.lower(): value for name, value in headers.items()}
        asked = _retry_after(known) or min(_reset(known), 120.0)
        if asked > 0:
            self._asked_until = max(self._asked_until, now + asked)
            self._pause(now + asked)
        edge = 0 < self.in_flight >= int(self.window) - 1
        if ticket <= self._last_refusal:  # sent before the last refusal came
            self._refused += 1
            if edge:
                self.window = self._ceiling = float(self.in_flight)
            return
        first = self._epoch is None
        accepted = 0 if first else number - self._epoch[1] - 1 - self._refused
        self._empty = 0 if accepted > 0 or first else self._empty + 1
        confirmed = edge and self.in_flight == self._ceiling
        if first or edge or self._empty:
            self.window = max(1.0, min(self.window, float(self.in_flight)))
        if first or edge:
            self._ceiling, self._probed, self._probe_gap = self.in_flight, now, min(4 * self._probe_gap, self.LONGEST_PROBE)
        if first:
            self._rate, self._searching = 1 / self.FIRST_PAUSE, True
        elif accepted > 0 and not confirmed:
            self._searching = False
            self._epochs.append((accepted, ticket - self._epoch[0]))
            self._rate = self._measured()
        if first or accepted > 0 or self._empty > 3:
            self._epoch, self._refused = (ticket, number), 0
        else:
            self._refused += 1
        self._last_refusal = now
        if not confirmed:
            self._slowed = now
        base = self.FIRST_PAUSE if self._searching or not self._rate else 1 / self._rate
        self._pause(now + min(base * 2**self._empty, max(base, self.LONGEST_PAUSE)))

    def failed(self, now: float, ticket: float) -> None:
        self._end(ticket)

    def _end(self, ticket):
        self._news.set()
        return self._open.pop(ticket)

    def _pause(self, until):
        now = self.clock()
        if until > now:
            self._resume = max(self._resume, until + (until - now) * self._random.uniform(0, 0.1))

    def _measured(self):
        n, seconds, bound = 0, 0.0, math.inf
        for accepted, lasted in reversed(self._epochs):
            n, seconds = n + accepted, seconds + lasted
            bound = min(bound, (n + 1) / seconds)
            if n >= self.ENOUGH:
                break
        return min((n + HALF) / seconds, bound)

    def stuck(self, now: float) -> str | None:
        if self._failing_since is None or self.in_flight:
            return None
        if now - self._failing_since >= self.give_up_after:
            return f"no request has succeeded for {now - self._failing_since:,.0f} s (last: {self._last_error})"
        if self._asked_until > self._failing_since + self.give_up_after:
            return f"the server asks to wait {self._asked_until - now:,.0f} s (last: {self._last_error})"
        return None



def _retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds that a refusal asks to wait, or 0."""
    return _seconds(headers.get("retry-after-ms", "") + "ms") or _seconds(headers.get("retry-after", ""))


def _reset(headers: Mapping[str, str]) -> float:
    """Return the seconds until a limit that is used up is reset, or 0: its ``…remaining…`` is 0, ``…reset…`` says when."""
    used_up = (name for name, value in headers.items() if "ratelimit" in name and "remaining" in name and value == "0")
    return max((_seconds(headers.get(name.replace("remaining", "reset"), "")) for name in used_up), default=0.0)


def _seconds(text: str) -> float:
    """Return the seconds of "1.5", "20ms" or "1h2m3.5s", or from now until a date or a Unix time; 0 if it is none."""
    text = text.strip()
    if re.fullmatch(r"([\d.]+(ms|[hms]))+", text):
        units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001}
        return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)(ms|[hms])", text))
    try:
        seconds = float(text)
        return seconds - time.time() if seconds > 1e9 else max(seconds, 0)
    except ValueError:
        pass
    for parse in (email.utils.parsedate_to_datetime, datetime.datetime.fromisoformat):
        try:
            return max(0.0, parse(text).timestamp() - time.time())
        except ValueError:
            pass
    return 0.0
