"""How requests are sent and when they end: the flags of every task that asks a server, and what a run has used."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass

from alpaca import UserError


@dataclass(frozen=True)
class RequestSettings:
    """Where requests go, how many at once, and when to stop.

    Args:
        base_url: the server, e.g. http://127.0.0.1:8000/v1 (default: OPENAI_BASE_URL, then api.openai.com).
        max_concurrency: requests in flight at once.
        request_timeout: seconds until a request is retried (at most 5 times, with exponential backoff).
        time_limit: stop sending after this many seconds.
        max_total_tokens: stop sending when prompts and replies, earlier runs included, have used this many tokens.
        max_cost_usd: stop sending when they have cost this many dollars; needs the two prices.
        prompt_price: dollars for a million prompt tokens.
        completion_price: dollars for a million reply tokens.
        max_failure_rate: end the run when more than this share of its last 100 requests (at least 10) failed for good.

    Raises:
        UserError: a limit in dollars without a price.
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

    def __post_init__(self):
        if self.max_cost_usd and not self.prompt_price + self.completion_price:
            raise UserError("max_cost_usd needs prompt_price and completion_price, in dollars for a million tokens")


class Budget:
    """Counts replies, tokens, dollars and failures against limits. Earlier runs' replies count, but not their time."""

    def __init__(self, settings: RequestSettings):
        self.settings, self.started = settings, time.monotonic()
        self.replies = self.new_replies = self.prompt_tokens = self.completion_tokens = 0
        self.recent: deque[str | None] = deque(maxlen=100)  # this run's: the kind of failure, or None
        self.failures: Counter[str] = Counter()
        self._first: dict[str, str] = {}  # "HTTP 400" → the first message of that kind: others differ in numbers

    def arrived(self, reply, new: bool) -> None:
        """Count a Completion; ``new`` is False for one that an earlier run paid for."""
        self.replies += 1
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
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
        """Return what these tokens cost."""
        return (prompt_tokens * self.settings.prompt_price + completion_tokens * self.settings.completion_price) / 1e6

    def exhausted(self) -> str | None:
        """Name the limit that is reached, or return None. Asked before each request; those in flight overshoot it."""
        limits, tokens = self.settings, (self.prompt_tokens, self.completion_tokens)
        if limits.time_limit is not None and self.seconds() > limits.time_limit:
            return f"the time limit of {limits.time_limit:g} s"
        if limits.max_total_tokens is not None and sum(tokens) >= limits.max_total_tokens:
            return f"the budget of {limits.max_total_tokens:,} tokens"
        if limits.max_cost_usd is not None and self.dollars(*tokens) >= limits.max_cost_usd:
            return f"the budget of ${limits.max_cost_usd:g}"
        return None

    def failing(self) -> str | None:
        """Return a message if too many of this run's last 100 requests failed for good, else None."""
        failed = Counter(kind for kind in self.recent if kind)
        if len(self.recent) >= 10 and failed.total() > self.settings.max_failure_rate * len(self.recent):
            return f"{failed.total()} of the last {len(self.recent)} requests failed ({in_words(failed)})"
        return None

    def forecast(self, requests: float, prompt_tokens: float, completion_tokens: float) -> str:
        """Describe what so many requests of so many tokens each will use, with dollars if prices are known."""
        used = f"{requests:,.0f} requests, {requests * (prompt_tokens + completion_tokens):,.0f} tokens"
        return used + self._price(requests * prompt_tokens, requests * completion_tokens)

    def used(self) -> str:
        """Describe the tokens and dollars so far."""
        tokens = f"{self.prompt_tokens:,} prompt + {self.completion_tokens:,} reply"
        return tokens + self._price(self.prompt_tokens, self.completion_tokens)

    def _price(self, *tokens: float) -> str:
        return f", ${cost:,.2f}" if (cost := self.dollars(*tokens)) else ""

    def counts(self) -> dict:
        """Return the figures of a report: replies of earlier runs included, but this run's seconds alone."""
        return {
            "requests": self.replies,
            "failed": dict(self.failures.most_common()),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cost_usd": round(self.dollars(self.prompt_tokens, self.completion_tokens), 4),
            "seconds": round(self.seconds(), 1),
        }


def in_words(counts: Counter) -> str:
    """Return counts in words, "malformed 3, too short 1", the most frequent first, or "none"."""
    return ", ".join(f"{name} {count}" for name, count in counts.most_common()) or "none"
