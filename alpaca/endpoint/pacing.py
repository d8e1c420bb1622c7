"""How fast requests may go out, learned from what the server refuses."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import math
import random
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime

from alpaca import UserError


class Pace:
    """The pace of all requests of a run.

    A token bucket is empty whenever it refuses. What it accepts between two refusals, divided by the time, is therefore
    the server's rate: it is measured, not guessed by halving. Sending then speeds up, slowly at first, and fast later
    in case the limit was lifted. aiolimiter must be given the rate; tenacity lets each request back off on its own.

    A limit on requests in flight refuses at the same number in flight each time. That number is kept, and one more is
    tried now and then.

    All times are in seconds on the caller's monotonic clock.

    Args:
        max_concurrency: requests in flight at once, at most.
        requests_per_minute: spaces requests evenly, at most so many a minute.
        tokens_per_minute: the same for tokens, prompts and replies together.
        give_up_after: seconds of refusals without one success until stuck() says so.
        clock: read by turn() and str().
    """

    FASTEST = 500.0  # requests/s, after a refusal
    FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0  # after refusals that name no time
    LONGEST_PROBE = 60.0  # between two tries of one more request in flight than the server took
    ENOUGH = 15  # accepted requests that measure a rate: one more or less is 7%

    def __init__(
        self,
        max_concurrency: int,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        give_up_after: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.max_concurrency, self.give_up_after, self.clock = max_concurrency, give_up_after, clock
        self._request_gap = 60 / requests_per_minute if requests_per_minute else 0.0
        self._token_gap = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._open: dict[float, tuple[int, int, float]] = {}  # ticket → its number, others in flight, estimated tokens
        self._sent, self._replied = 0, False
        self._next = self._next_by_tokens = -math.inf  # nothing may be sent earlier
        self._rate: float | None = None  # the server's, in requests/s, as measured at the last refusal
        self._search = 0.0  # requests/s after a refusal, growing with each, until one more allows to measure
        self._last_refusal = self._last_cut = -math.inf
        self._epoch: tuple[float, int] | None = None  # ticket and number of the refused request that began it
        self._refused = self._empty = 0  # in this epoch; pauses in a row that ended in a refusal
        self._patience = 60.0  # until a measured rate is doubled, if nothing is refused: less while little is known
        self._epochs: deque[tuple[int, float]] = deque(maxlen=self.ENOUGH)  # accepted, seconds
        # What the server takes at once, and where it refused more, unless a request beyond that was accepted since.
        self._limit, self._ceiling = max_concurrency, math.inf
        self._probed, self._probe_gap = -math.inf, self.FIRST_PAUSE
        self._failing_since: float | None = None
        self._asked_until, self._last_error, self._stated = -math.inf, "", ""
        self._random = random.Random(0)
        self._line, self._news = asyncio.Lock(), asyncio.Event()

    @property
    def in_flight(self) -> int:
        """Return the number of requests that were sent and have not ended."""
        return len(self._open)

    @property
    def window(self) -> int:
        """Return how many requests are worth having ready: what the server takes at once, and one more to try."""
        return min(self._limit + 1, self.max_concurrency)

    def __str__(self) -> str:
        flying = f"{self.in_flight} in flight"
        if not self._rate or self._rate_at(self.clock()) > 2 * self._rate:
            return flying
        measured, stated = 60 * self._rate, 0.0
        with contextlib.suppress(ValueError):
            stated = float(self._stated)
        # Some servers state their limit for a day or a second.
        rate = stated if measured / 2 < stated < measured * 2 else float(f"{measured:.2g}")
        return f"{rate:,.6g} requests/min allowed by the server, {flying}"

    def wait(self, now: float) -> float:
        """Return the seconds until the next request may be sent, inf if one in flight has to end first."""
        if self.in_flight >= self.max_concurrency:
            return math.inf
        due = max(self._next, self._next_by_tokens)
        if self.in_flight >= self._limit:
            due = max(due, self._probed + self._probe_gap)
        return max(0.0, due - now)

    def sent(self, now: float, tokens: float = 0) -> float:
        """Count a request with an estimate of its tokens. Return its ticket: the time, made unique."""
        while now in self._open:
            now = math.nextafter(now, math.inf)
        if self.in_flight >= self._limit:  # halved: unless this one is refused, the limit is elsewhere
            self._probed, self._probe_gap, self._limit = now, self._probe_gap / 2, self.in_flight + 1
        self._sent += 1
        self._open[now] = self._sent, self.in_flight, tokens
        # At first a refusal must be able to stop the rest: 8 in 64 ms, 64 in 0.2 s. After a reply nothing is held back.
        gap = 0.0 if self._replied else 0.008 if self._sent <= 8 else 0.002
        if self._rate or self._search:
            gap = 1 / min(self._rate_at(now) if self._rate else self._search, self.FASTEST)
            self._search *= 1.5
        self._next = max(self._next, now) + max(gap, self._request_gap)
        self._next_by_tokens = max(self._next_by_tokens, now) + tokens * self._token_gap
        return now

    def accepted(self, now: float, ticket: float, headers: Mapping[str, str], tokens: int | None = None) -> None:
        """Count any reply that is not a refusal, and the tokens that it used."""
        _, others, estimate = self._end(ticket)
        self._replied, self._failing_since = True, None
        if tokens is not None:
            self._next_by_tokens += (tokens - estimate) * self._token_gap
        if others >= self._ceiling:
            self._ceiling, self._limit = math.inf, min(2 * self._limit, self.max_concurrency)
        headers = {name.lower(): value for name, value in headers.items()}
        self._stated = headers.get("x-ratelimit-limit-requests", self._stated)
        if not self._rate:  # the server's seconds count from the request, not from its reply
            self._pause(now, ticket + _reset(headers))

    def refused(self, now: float, ticket: float, headers: Mapping[str, str], error: str = "HTTP 429") -> None:
        """Count a refusal. Only a 429 says something about the rate; others are an overload or an outage."""
        number, _, estimate = self._end(ticket)
        self._next_by_tokens -= estimate * self._token_gap
        self._last_error = error
        if self._failing_since is None:
            self._failing_since = ticket
        headers = {name.lower(): value for name, value in headers.items()}
        # Some resets name the time when a whole minute's requests are back: not believed before a second refusal.
        asked = _retry_after(headers) or (_reset(headers) if not self._rate or self._empty else 0.0)
        self._asked_until = max(self._asked_until, now + asked)
        self._pause(now, now + asked)
        full = 0 < self.in_flight >= self._limit - 1
        if ticket <= self._last_refusal:  # sent before the last refusal came, which has slowed us down already
            self._refused += number > self._epoch[1]
            if full:
                self._limit = self._ceiling = self.in_flight
            return
        self._last_refusal = now
        first, full_again = self._epoch is None, full and self.in_flight == self._ceiling
        accepted = 0 if first else number - self._epoch[1] - 1 - self._refused
        self._empty = 0 if first or accepted else self._empty + 1
        if first or full or self._empty:
            self._limit = max(1, min(self._limit, self.in_flight))
        if first or full:
            self._ceiling, self._probed = self.in_flight, now
        if full and not first:  # with the halving in sent() twice the last gap; at random, lest replies come in step
            self._probe_gap = min(4 * self._probe_gap, self.LONGEST_PROBE) * self._random.uniform(0.75, 1)
        pause = self.FIRST_PAUSE * (self._empty > 0)
        if "429" in error:
            if not (self._rate or self._search):
                self._search = 1 / self.FIRST_PAUSE
            elif accepted and not full_again:
                self._epochs.append((accepted, ticket - self._epoch[0]))
                self._rate, self._search = self._measured(ticket), 0.0
            if not full_again:
                self._last_cut = now
            pause = 1 / self._rate if self._rate else self.FIRST_PAUSE
        self._pause(now, now + min(pause * 2**self._empty, max(pause, self.LONGEST_PAUSE)))
        # Without a success the epoch continues: the bucket is as empty as before. After four it is an outage.
        if first or accepted or self._empty > 3:
            # A bucket that ran over during a pause loses part of it: half that time is not counted.
            self._epoch, self._refused = (ticket + asked / 2, number), 0
        else:
            self._refused += 1

    def failed(self, now: float, ticket: float) -> None:
        """Count a request that ended without any reply, which says nothing about the pace."""
        self._end(ticket)

    def stuck(self, now: float) -> str | None:
        """Return why the run should give up, or None."""
        if self.in_flight:
            return None
        since = now if self._failing_since is None else self._failing_since
        if now - since >= self.give_up_after:
            return f"no request has succeeded for {now - since:,.0f} s (last: {self._last_error})"
        if self._asked_until > since + self.give_up_after:
            return f"the server asks to wait {self._asked_until - now:,.0f} s (last: {self._last_error})"
        return None

    async def turn(self, tokens: float = 0) -> float:
        """Wait in line until a request may be sent, count it, and return its ticket.

        Raises:
            UserError: stuck().
        """
        async with self._line:
            while True:
                now = self.clock()
                if why := self.stuck(now):
                    raise UserError(why)
                if not (seconds := self.wait(now)):
                    return self.sent(now, tokens)
                self._news.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), min(seconds, 60))

    def _end(self, ticket: float) -> tuple[int, int, float]:
        self._news.set()
        return self._open.pop(ticket)

    def _pause(self, now: float, until: float) -> None:
        """Hold all requests until then, and up to 10% longer: other programs may wait for the same moment."""
        if until > now:
            self._next = max(self._next, until + (until - now) * self._random.uniform(0, 0.1))

    def _rate_at(self, now: float) -> float:
        # As TCP CUBIC does: 7% more after 20 s, twice after a minute. Slow servers count time by requests instead.
        seconds = (now - self._last_cut) * min(1.0, self._rate) ** 0.5
        return self._rate * (1 + 0.002 * seconds + (seconds / self._patience) ** 3)

    def _measured(self, now: float) -> float:
        """Return the rate, in requests/s, over the last epochs that hold enough accepted requests."""
        last = self._rate_at(now) if self._rate else 0.0
        total, seconds, most = 0, 0.0, math.inf
        for accepted, lasted in reversed(self._epochs):
            total, seconds = total + accepted, seconds + lasted
            most = min(most, (total + 1) / seconds)  # a bucket that was empty at both ends allows one more at most
            if total >= self.ENOUGH:
                break
        self._patience = min(60.0, 8 * seconds)
        # At least one try a minute: refusals at random, at any pace, would slow it further and further.
        rate = max(1 / 60, min(total / seconds, most))
        # Refused at far more than was accepted: the bucket was full for a while, and the truth lies between.
        return rate if last < 1.3 * rate else math.sqrt(rate * min(last, 4 * rate))


def _retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds that a refusal asks to wait, or 0."""
    return _seconds(headers.get("retry-after-ms", "") + "ms") or _seconds(headers.get("retry-after", ""))


def _reset(headers: Mapping[str, str]) -> float:
    """Return the seconds until a used-up limit is reset, or 0. At most 120: the next refusal would say more."""
    names = [name for name, left in headers.items() if "ratelimit" in name and "remaining" in name and left == "0"]
    return min(120.0, max([_seconds(headers.get(name.replace("remaining", "reset"), "")) for name in names], default=0))


def _seconds(text: str) -> float:
    """Return the seconds of "1.5", "20ms" or "1h2m3.5s", or until a date or a Unix time; 0 for anything else."""
    if re.fullmatch(r"(\d+(\.\d+)?(ms|[hms]))+", text):
        units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001}
        return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)(ms|[hms])", text))
    for parse in (float, _mail_date, _iso_date):
        with contextlib.suppress(ValueError):
            seconds = parse(text)
            seconds -= time.time() if seconds > 1e9 else 0
            return seconds if 0 < seconds < math.inf else 0.0
    return 0.0


def _mail_date(text: str) -> float:
    return email.utils.parsedate_to_datetime(text).timestamp()


def _iso_date(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
