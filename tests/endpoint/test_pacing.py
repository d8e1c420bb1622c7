"""The pace of a run, against simulated servers on a simulated clock, and turn() on a real event loop."""

from __future__ import annotations

import asyncio
import email.utils
import heapq
import itertools
import math
import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca import UserError
from alpaca.endpoint.pacing import Pace


class Bucket:
    """A token bucket. ``changes`` are (second, new requests/min)."""

    error = "HTTP 429"

    def __init__(self, rpm, burst=5, latency=2.0, retry_after=False, changes=()):
        self.rate, self.burst, self.level, self.last = rpm / 60, burst, burst, 0.0
        self.latency, self.retry_after, self.changes = latency, retry_after, list(changes)
        self.random, self.in_flight = random.Random(1), 0

    def ask(self, now):
        """Return the seconds until the reply, or None and the headers of a refusal, and its error."""
        while self.changes and now >= self.changes[0][0]:
            self.rate = self.changes.pop(0)[1] / 60
        self.level, self.last = min(self.burst, self.level + (now - self.last) * self.rate), now
        if self.level < 1:
            wait = max(1, int((1 - self.level) / self.rate) + 1)
            return None, {"Retry-After": str(wait)} if self.retry_after else {}, self.error
        self.level -= 1
        return self.latency * self.random.uniform(0.98, 1.02), {}, ""


class AtOnce(Bucket):
    """Takes ``burst`` requests at once."""

    def ask(self, now):
        return (None, {}, "HTTP 429") if self.in_flight >= self.burst else (self.latency, {}, "")


class Minutes(Bucket):
    """Takes so many requests in each minute of the clock."""

    def ask(self, now):
        self.counts = getattr(self, "counts", {})
        minute = int((now + 20) // 60)
        self.counts[minute] = self.counts.get(minute, 0) + 1
        refused = self.counts[minute] > self.rate * 60
        self.counts[minute] -= refused
        return (None, {}, "HTTP 429") if refused else (self.latency, {}, "")


class Unavailable(Bucket):
    """Has another status for its rate limit, as nginx has by default."""

    error = "HTTP 503"


class Quota(Bucket):
    """Takes nothing from second 100 to 500, and says so, or not."""

    def ask(self, now):
        if not 100 <= now < 500:
            return super().ask(now)
        return None, {"Retry-After": str(int(501 - now))} if self.retry_after else {}, "HTTP 429"


class Overloaded(Bucket):
    """Answers 503 from second 20 to 50, and to one in ``burst`` requests later."""

    def ask(self, now):
        down = 20 <= now < 50 or (now > 50 and self.random.random() < 1 / self.burst)
        return (None, {}, "HTTP 503") if down else (self.latency, {}, "")


def simulate(server, seconds, concurrency=32, rtt=0.004):
    """Send as much as the pace allows. Return it, when each request was sent, and when each accepted one was."""
    random.seed(0)  # the pauses are
    clock, numbers, events, sent, accepted = [0.0], itertools.count(), [], [], []
    pace = Pace(concurrency, clock=lambda: clock[0])
    while clock[0] < seconds:
        now = clock[0]
        if not (wait := pace.wait(now)):
            ticket = pace.sent(now)
            sent.append(now)
            latency, headers, error = server.ask(now)
            server.in_flight += latency is not None
            accepted += [now] * (latency is not None)
            heapq.heappush(events, (now + rtt + (latency or 0), next(numbers), ticket, headers, error))
            assert pace.in_flight <= concurrency
        elif events and events[0][0] <= now + wait:
            clock[0], _, ticket, headers, error = heapq.heappop(events)
            if error:
                pace.refused(clock[0], ticket, headers, error)
            else:
                server.in_flight -= 1
                pace.accepted(clock[0], ticket, headers)
        else:
            clock[0] = now + wait + 1e-9
    return pace, sent, accepted


def share(times, start, end, per_minute):
    return sum(start <= t < end for t in times) / ((end - start) * per_minute / 60)


@pytest.mark.parametrize("retry_after", [False, True])
@pytest.mark.parametrize("rpm", [60, 600])
def test_a_rate_limit_costs_few_requests_and_little_time(rpm, retry_after):
    for rtt in (0.004, 0.016):
        pace, sent, accepted = simulate(Bucket(rpm, retry_after=retry_after), 180, rtt=rtt)
        assert sum(t <= accepted[74] for t in sent) <= 1.2 * 75
        assert share(accepted, 60, 120, rpm) >= 0.95 and share(accepted, 60, 180, rpm) >= 0.95
        assert len(sent) <= 1.1 * len(accepted)
        shown = re.search(r"in flight, limit ([\d.]+)/min$", str(pace))
        assert abs(float(shown[1]) / rpm - 1) < 0.07


def test_without_a_limit_nothing_is_held_back():
    pace, sent, accepted = simulate(Bucket(1e9, burst=1e9, latency=0.5), 6, concurrency=64)
    at_once = 64 * 6 / (0.5 + 0.004)
    assert len(sent) == len(accepted) and len(accepted) >= 0.97 * at_once
    assert str(pace) == f"{pace.in_flight} in flight" and pace.window == 64


@pytest.mark.parametrize(
    ("server", "per_minute", "start", "end", "at_least", "requests_per_answer"),
    [
        (Bucket(6), 6, 60, 600, 0.95, 1.25),
        (Bucket(3000, latency=0.2), 3000, 60, 180, 0.95, 1.05),
        (Bucket(60, burst=1), 60, 60, 600, 0.85, 1.1),
        (Bucket(60, burst=60), 60, 60, 300, 0.95, 1.1),
        (Bucket(60, latency=20), 60, 60, 300, 0.95, 1.1),
        (Bucket(120, changes=[(60, 60)]), 60, 80, 300, 0.95, 1.1),
        (Bucket(1200, changes=[(60, 60)]), 60, 80, 300, 0.95, 1.1),
        (Bucket(60, changes=[(60, 1e9)]), 32 * 30, 240, 300, 0.95, 1.01),  # lifted: full speed after three minutes
        (Minutes(60), 60, 40, 640, 0.9, 1.2),
        (AtOnce(0, burst=3), 90, 60, 300, 0.95, 1.1),
        (AtOnce(0, burst=3, latency=20), 9, 60, 600, 0.85, 1.25),
        (Unavailable(60), 60, 60, 300, 0.95, 1.25),
        (Unavailable(60, latency=10), 60, 60, 300, 0.95, 3),
        (Quota(600), 600, 560, 620, 0.9, 1.1),
        (Quota(600, retry_after=True), 600, 560, 620, 0.9, 1.1),
        (Overloaded(0, burst=1e9), 32 * 30, 55, 300, 0.93, 1.05),
        (Overloaded(0, burst=20), 32 * 30, 80, 300, 0.9, 1.1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Bucket) else None,
)
def test_other_limits(server, per_minute, start, end, at_least, requests_per_answer):
    _, sent, accepted = simulate(server, end)
    assert share(accepted, start, end, per_minute) >= at_least
    assert len(sent) <= requests_per_answer * len(accepted)


def test_a_limit_that_falls_to_a_twentieth_is_learned_from_few_refusals():
    _, sent, accepted = simulate(Bucket(1200, changes=[(60, 60)]), 120)
    assert sum(t > 60 for t in sent) - sum(t > 60 for t in accepted) <= 30


class AtRandom(Bucket):
    """Refuses half of all requests, at any pace."""

    def ask(self, now):
        return (None, {}, "HTTP 429") if self.random.random() < 0.5 else (self.latency, {}, "")


def test_refusals_without_a_cause_never_stop_a_run():
    _, _, accepted = simulate(AtRandom(0), 4 * 3600)
    assert sum(t > 3 * 3600 for t in accepted) >= 10


def test_the_window_is_what_the_server_takes_at_once():
    pace, _, _ = simulate(AtOnce(0, burst=3), 59)
    assert pace.window == 3


def test_refusals_that_come_late_and_out_of_order_measure_nothing():
    pace = Pace(4)
    tickets = [pace.sent(0.1 * i) for i in range(4)]
    pace.refused(0.5, tickets[3], {})
    pace.refused(1.0, pace.sent(0.8), {})
    for ticket in tickets[:3]:  # counted as accepted until now
        pace.refused(1.5, ticket, {})
    pace.refused(3.0, pace.sent(2.0), {})
    assert str(pace) == "0 in flight" and 0.5 <= pace.wait(3.0) <= 20


replies = st.sampled_from(["accepted", "accepted", "HTTP 429", "HTTP 503", "failed"])
some_headers = st.sampled_from([{}, {}, {"Retry-After": "3"}, {"x-ratelimit-remaining-requests": "0"}]) | st.just(
    {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "7s", "retry-after": "soon"}
)


@settings(max_examples=200, deadline=None)
@given(
    outcomes=st.lists(st.tuples(replies, some_headers, st.floats(0.001, 40)), max_size=120),
    concurrency=st.integers(1, 8),
    requests_per_minute=st.none() | st.just(30.0),
)
def test_any_order_of_refusals_and_successes_ends_with_all_answered(outcomes, concurrency, requests_per_minute):
    """Each request is refused or lost as drawn, then succeeds; at least one of 600 s does, as the breaker demands."""
    now, last_success, left, drawn, events = 0.0, 0.0, 30, iter(outcomes), []
    pace = Pace(concurrency, requests_per_minute)
    while left or events:
        wait = pace.wait(now)
        assert 0 <= wait < math.inf or pace.in_flight == concurrency
        assert 0 <= pace.in_flight == len(events) <= concurrency and 1 <= pace.window <= concurrency
        if left and not wait:
            assert pace.stuck(now) is None
            ticket, left = pace.sent(now, 10), left - 1
            outcome, headers, seconds = next(drawn, ("accepted", {}, 1.0))
            if now - last_success > 400:
                outcome = "accepted"
            heapq.heappush(events, (now + seconds, ticket, outcome, headers))
        elif events and (not left or events[0][0] <= now + wait):
            now, ticket, outcome, headers = heapq.heappop(events)
            if outcome == "accepted":
                pace.accepted(now, ticket, headers, 12)
                last_success = now
            else:
                left += 1
                pace.failed(now, ticket) if outcome == "failed" else pace.refused(now, ticket, headers, outcome)
        else:
            now += wait
    assert pace.in_flight == 0


def date(seconds):
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"RETRY-AFTER": "2.5"}, 2.5),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m0.5s"}, 60.5),
        ({"X-RateLimit-Remaining-Tokens": "0", "X-RateLimit-Reset-Tokens": "1500ms"}, 1.5),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "30"}, 30),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1h2m3s"}, 120),  # at most
        ({"x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": "30s"}, None),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": date(-100)}, None),
    ],
)
def test_headers_hold_all_requests(headers, seconds):
    pace = Pace(4)
    pace.refused(1.5, pace.sent(1), headers)
    low = seconds or 0.5  # the first pause of all
    assert low <= pace.wait(1.5) <= 1.1 * low + 0.01  # up to 10% more
    if seconds and "retry-after" not in str(headers).lower():  # in a reply too, where it counts from the request
        pace = Pace(4)
        pace.accepted(3, pace.sent(2.5), headers)
        assert low - 0.6 <= pace.wait(3) <= 1.1 * low


def test_a_date_holds_all_requests_until_then():
    pace = Pace(4)
    pace.refused(1.5, pace.sent(1), {"retry-after": date(100)})
    assert 90 <= pace.wait(1.5) <= 110


def test_a_flag_spaces_requests_evenly():
    pace, times, now = Pace(32, requests_per_minute=30), [], 0.0
    for _ in range(4):
        now += pace.wait(now)
        ticket = pace.sent(now)
        times.append(now)
    assert times == [0, 2, 4, 6]
    pace.refused(6.5, ticket, {})
    assert pace.wait(6.5) == 1.5  # longer than the first pause


def test_a_flag_spaces_tokens_by_what_was_really_used():
    pace = Pace(32, tokens_per_minute=6000)
    first = pace.sent(0, tokens=500)
    assert pace.wait(0) == 5
    pace.accepted(1, first, {}, tokens=700)
    assert pace.wait(1) == 6
    refused = pace.sent(7, tokens=1000)
    assert pace.wait(7) == 10
    pace.refused(7.5, refused, {})  # a refusal uses none
    assert pace.wait(7.5) < 0.6


def test_the_breaker_waits_for_what_is_in_flight():
    pace = Pace(4, give_up_after=600)
    assert pace.stuck(1e6) is None  # idle
    first, second = pace.sent(0), pace.sent(1)
    pace.refused(2, first, {}, "HTTP 503: overloaded")
    assert pace.stuck(700) is None  # the second may still succeed
    pace.refused(700, second, {}, "HTTP 429: slow down")
    assert pace.stuck(700).startswith("no request has succeeded for 700 s (last error: HTTP 429: slow down): try later")
    third = pace.sent(701)
    pace.accepted(702, third, {})
    assert pace.stuck(5000) is None
    pace.refused(5002, pace.sent(5001), {})
    assert pace.stuck(5600) is None and "for 600 s" in pace.stuck(5601)


def test_a_wait_beyond_the_breaker_is_reported_at_once():
    pace = Pace(4)
    first, second = pace.sent(0), pace.sent(0.1)
    assert first != second
    pace.refused(1, first, {"retry-after": "3601"}, "HTTP 429: quota of the day")
    assert pace.stuck(1) is None
    pace.accepted(2, second, {})
    assert pace.stuck(2).startswith("the server asks to wait 3,600 s (last error: HTTP 429: quota of the day): try")
    pace = Pace(4)
    pace.refused(1, pace.sent(0), {"retry-after": "500"})
    assert pace.stuck(1) is None


def test_the_rate_is_shown_while_it_limits():
    now = [0.0]
    pace = Pace(4, clock=lambda: now[0])
    pace.refused(0.0, pace.sent(0.0), {})
    for _ in range(3):
        now[0] += 1.0
        pace.accepted(now[0], pace.sent(now[0]), {})
    assert str(pace) == "0 in flight"  # nothing is measured yet
    now[0] += 1.0
    pace.refused(now[0], pace.sent(now[0]), {})  # 3 in 4 s, or up to twice as many if it was full
    assert str(pace) == "0 in flight, limit 90/min"
    now[0] += 600  # nothing refused for ten minutes, at a pace far beyond the limit
    assert str(pace) == "0 in flight"


def test_turns_are_taken_in_line():
    async def run():
        pace, order = Pace(2), []

        async def worker(number):
            ticket = await pace.turn()
            order.append(number)
            await asyncio.sleep(0.002)
            pace.accepted(time.monotonic(), ticket, {})

        await asyncio.gather(*(worker(number) for number in range(20)))
        return pace, order

    pace, order = asyncio.run(asyncio.wait_for(run(), 20))
    assert order == list(range(20)) and pace.in_flight == 0


def test_all_who_wait_are_released_when_it_is_stuck():
    async def run():
        pace = Pace(1)
        ticket = await pace.turn()
        waiting = [asyncio.create_task(pace.turn()) for _ in range(3)]
        await asyncio.sleep(0)
        pace.refused(time.monotonic(), ticket, {"retry-after": "7200"}, "HTTP 429: no more today")
        return await asyncio.gather(*waiting, return_exceptions=True)

    errors = asyncio.run(asyncio.wait_for(run(), 20))
    assert [type(error) for error in errors] == [UserError] * 3
    assert str(errors[0]).startswith("the server asks to wait 7,200 s (last error: HTTP 429: no more today): try later")


def test_a_refused_request_goes_before_those_that_were_never_sent():
    async def run():
        pace, order = Pace(1), []
        first = await pace.turn()

        async def ask(name, again):
            ticket = await pace.turn(again=again)
            order.append(name)
            pace.accepted(pace.clock(), ticket, {})

        tasks = [asyncio.create_task(ask(name, False)) for name in ("new 1", "new 2", "new 3")]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(ask("again", True)))
        await asyncio.sleep(0)
        pace.accepted(pace.clock(), first, {})
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(run()) == ["new 1", "again", "new 2", "new 3"]
