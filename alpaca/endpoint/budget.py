"""How requests are sent and when they end: the flags of every task that uses a server, and what a run has used."""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from dataclasses import dataclass

from alpaca import UserError


@dataclass(frozen=True)
class RequestSettings:
    """Where requests go, how many at once, and when to stop.

    Args:
        base_url: the server, e.g. http://127.0.0.1:8000/v1 (default: OPENAI_BASE_URL, then api.openai.com).
        max_concurrency: the most requests in flight.
        request_timeout: seconds until a request is retried (at most 5 times, with exponential backoff).
        time_limit: stop sending after this many seconds.
        max_total_tokens: stop sending when prompts and replies have used this many tokens, including earlier runs;
            requests in flight are still answered.
        max_cost_usd: the same for their cost in dollars; needs the two prices.
        prompt_price: dollars per million prompt tokens.
        completion_price: dollars per million reply tokens.
        max_failure_rate: end the run when more than this share of the last 100 requests (at least 10) failed for good.
        requests_per_minute: the most requests to send (default: adapted to the server's 429s and headers).
        tokens_per_minute: the same for tokens of prompts and replies.
        give_up_after: end the run when the server has refused everything for this many seconds, or asks to wait longer.
        extra_body: JSON with more fields for each request, such as {"reasoning_effort": "low"}.
        batch: send requests through the server's Batch API, which answers within a day, often at half price. After
            Ctrl-C or a kill, the same command finds its batch.
        batch_cancel: cancel this run's batch and keep the replies so far.
        batch_discount: the share of the price that a batch saves; 0.5 is half price.
        batch_write: write the requests to this file and stop; vllm run-batch and other tools answer them offline.
        batch_read: read the replies to those requests from this file.

    Raises:
        UserError: max_cost_usd without a price, a batch_discount that is not a share, or an extra_body that is not an
            object.
    """

    base_url: str | None = None
    max_concurrency: int = 32
    request_timeout: float = 600.0
    time_limit: float | None = None
    max_total_tokens: int | None = None
    max_cost_usd: float | None = None
    prompt_price: float = 0.0
    completion_price: float = 0.0
    max_failure_rate: float = 0.5
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    give_up_after: float = 600.0
    extra_body: str | None = None
    batch: bool = False
    batch_cancel: bool = False
    batch_discount: float = 0.5
    batch_write: str | None = None
    batch_read: str | None = None

    def __post_init__(self):
        if not 0 <= self.batch_discount <= 1:
            raise UserError("batch_discount must be from 0 to 1: 0.5 is half price")
        try:
            if not isinstance(self.extra, dict):
                raise ValueError("not an object")
        except ValueError as e:
            raise UserError(f'extra_body is not a JSON object ({e}): use one such as {{"top_k": 40}}') from None
        if self.max_cost_usd and not self.prompt_price + self.completion_price:
            raise UserError("max_cost_usd needs prompt_price and completion_price, in dollars per million tokens")

    @property
    def extra(self) -> dict:
        """The fields of extra_body."""
        return json.loads(self.extra_body or "{}")

    @property
    def offline(self) -> bool:
        """Whether requests and replies are files, so that no server is needed."""
        return bool(self.batch_write or self.batch_read)

    @property
    def batched(self) -> bool:
        """Whether requests go in batches."""
        return self.batch or self.batch_cancel or self.offline

    @property
    def price(self) -> float:
        """What new requests cost, relative to direct ones."""
        return 1 - self.batch_discount if self.batched else 1.0


class Budget:
    """Counts replies, tokens, dollars and failures against limits. Earlier runs' replies count, their time does not."""

    def __init__(self, settings: RequestSettings):
        self.settings, self.started = settings, time.monotonic()
        self.cost = 0.0  # dollars
        self.replies = self.new_replies = self.prompt_tokens = self.completion_tokens = 0
        self.recent: deque[str | None] = deque(maxlen=100)  # this run's: the kind of failure, or None
        self.failures: Counter[str] = Counter()
        self.changed: set[str] = set()  # settings that the server refused, and what was done
        self._first: dict[str, str] = {}  # "HTTP 400" → the first message of that kind: others differ in numbers

    def arrived(self, reply, new: bool) -> None:
        """Count a Completion; ``new`` is False for one from an earlier run."""
        self.replies += 1
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        self.cost += reply.price * self.dollars(reply.prompt_tokens, reply.completion_tokens)
        self.changed.update(reply.changed or ())
        kind = None
        if reply.error:
            kind = self._first.setdefault(reply.error.split(": ")[0], reply.error)
            self.failures[kind] += 1
        if new:
            self.new_replies += 1
            self.recent.append(kind)

    def seconds(self) -> float:
        """Return the seconds since this run began."""
        return time.monotonic() - self.started

    def dollars(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Return what these tokens cost in direct requests."""
        return (prompt_tokens * self.settings.prompt_price + completion_tokens * self.settings.completion_price) / 1e6

    def exhausted(self, prompt_tokens: float = 0, reply_tokens: float = 0) -> str | None:
        """Name the limit that is reached, or that these tokens would reach, or return None.

        Checked before each request; those in flight overshoot it.
        """
        limits = self.settings
        tokens = self.prompt_tokens + self.completion_tokens + prompt_tokens + reply_tokens
        cost = self.cost + limits.price * self.dollars(prompt_tokens, reply_tokens)
        if limits.time_limit is not None and self.seconds() > limits.time_limit:
            return f"the time limit of {limits.time_limit:g} s"
        if limits.max_total_tokens is not None and tokens >= limits.max_total_tokens:
            return f"the budget of {limits.max_total_tokens:,} tokens"
        if limits.max_cost_usd is not None and cost >= limits.max_cost_usd:
            return f"the budget of ${limits.max_cost_usd:g}"
        return None

    def failing(self) -> str | None:
        """Return a message if too many of this run's last 100 requests failed for good, else None."""
        failed = Counter(kind for kind in self.recent if kind)
        if len(self.recent) >= 10 and failed.total() > self.settings.max_failure_rate * len(self.recent):
            return f"{failed.total()} of the last {len(self.recent)} requests failed ({in_words(failed)})"
        return None

    def forecast(self, requests: tuple[float, float], prompt_tokens: float, reply_tokens: tuple[float, float]) -> str:
        """Describe what so many requests will use, at least and at most, with dollars if prices are known."""
        pairs = list(zip(requests, reply_tokens, strict=True))
        tokens = [n * (prompt_tokens + each) for n, each in pairs]
        dollars = [self.settings.price * n * self.dollars(prompt_tokens, each) for n, each in pairs]
        cost = f", {spread(*dollars, '${:,.2f}')}" if any(dollars) else ""
        return f"{spread(*requests)} request{'s' * (requests[1] > 1)}, {spread(*tokens)} tokens{cost}"

    def used(self) -> str:
        """Describe the tokens and dollars so far."""
        tokens = f"{self.prompt_tokens:,} prompt + {self.completion_tokens:,} reply"
        return tokens + (f", ${self.cost:,.2f}" if self.cost else "")

    def counts(self) -> dict:
        """Return the figures for a report: replies of all runs, but only this run's seconds."""
        return {
            "requests": self.replies,
            "failed": dict(self.failures.most_common()),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cost_usd": round(self.cost, 4),
            "session_seconds": round(self.seconds(), 1),
        }


def spread(low: float, high: float, form: str = "{:,.0f}") -> str:
    """Return "3 to 5" for a range, or "3" where both ends look alike."""
    ends = form.format(low), form.format(high)
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def in_words(counts: Counter) -> str:
    """Return the counted names, the most frequent first; with their counts if there are several."""
    return ", ".join(f"{count} × {name}" if len(counts) > 1 else name for name, count in counts.most_common())
