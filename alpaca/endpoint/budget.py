"""What a run of many requests has used, whether it may go on, and what it will have cost."""

from __future__ import annotations

import time
from collections import Counter, deque

from alpaca import UserError


class Budget:
    """Counts replies, tokens, dollars and failures against limits. Replies of an earlier run count, but not its time.

    Args:
        time_limit: seconds from now.
        max_total_tokens: prompts and replies together.
        max_cost_usd: dollars, at ``prompt_price`` and ``completion_price`` a million tokens.
        max_failure_rate: the share of this run's last 100 replies that may be failures, once there are 10.

    Raises:
        UserError: dollars without a price.
    """

    def __init__(
        self,
        time_limit: float | None = None,
        max_total_tokens: int | None = None,
        max_cost_usd: float | None = None,
        prompt_price: float = 0.0,
        completion_price: float = 0.0,
        max_failure_rate: float = 0.5,
    ):
        if max_cost_usd and not prompt_price + completion_price:
            raise UserError("--max_cost_usd needs --prompt_price and --completion_price, in dollars a million tokens")
        self.time_limit, self.max_total_tokens, self.max_cost_usd = time_limit, max_total_tokens, max_cost_usd
        self.prices, self.max_failure_rate = (prompt_price, completion_price), max_failure_rate
        self.started = time.monotonic()
        self.replies = self.prompt_tokens = self.completion_tokens = 0
        self.new_replies = 0
        self.recent: deque[str | None] = deque(maxlen=100)  # of this run: what failed, None for what did not
        self.failures: Counter[str] = Counter()
        self._first: dict[str, str] = {}  # "HTTP 400" → the first message of that kind: others differ in numbers

    def empty_retries(self) -> int:
        """How often to ask again for a reply without a text: with a budget it is not paid for twice."""
        return 0 if self.max_total_tokens or self.max_cost_usd else 2

    def arrived(self, reply, new: bool) -> None:
        """Counts a Completion; ``new`` is False for one that an earlier run has paid for."""
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
        return time.monotonic() - self.started

    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def dollars(self, prompt_tokens: float | None = None, completion_tokens: float | None = None) -> float:
        """The cost of these tokens; by default of all that have been used."""
        if prompt_tokens is None:
            prompt_tokens, completion_tokens = self.prompt_tokens, self.completion_tokens
        return (prompt_tokens * self.prices[0] + completion_tokens * self.prices[1]) / 1e6

    def exhausted(self) -> str | None:
        """Which limit is reached, in words, or None. Asked before each request, it overshoots by those in flight."""
        if self.time_limit is not None and self.seconds() > self.time_limit:
            return f"the time limit of {self.time_limit:g} s"
        if self.max_total_tokens is not None and self.tokens() >= self.max_total_tokens:
            return f"the budget of {self.max_total_tokens:,} tokens"
        if self.max_cost_usd is not None and self.dollars() >= self.max_cost_usd:
            return f"the budget of ${self.max_cost_usd:g}"
        return None

    def failing(self) -> str | None:
        """Says so when too many of this run's last 100 requests failed for good."""
        failed = Counter(kind for kind in self.recent if kind)
        if len(self.recent) >= 10 and sum(failed.values()) > self.max_failure_rate * len(self.recent):
            return f"{sum(failed.values())} of the last {len(self.recent)} requests failed ({in_words(failed)})"
        return None

    def forecast(self, requests: float, prompt_tokens: float, completion_tokens: float) -> str:
        """What so many requests of so many tokens each will use, in words; in dollars too where prices are known."""
        cost = self.dollars(requests * prompt_tokens, requests * completion_tokens)
        text = f"{requests:,.0f} requests, {requests * (prompt_tokens + completion_tokens):,.0f} tokens"
        return text + (f", ${cost:,.2f}" if any(self.prices) else "")

    def used(self) -> str:
        """What has been used, in words."""
        cost = f", ${self.dollars():,.2f}" if any(self.prices) else ""
        return f"{self.prompt_tokens:,} prompt + {self.completion_tokens:,} reply{cost}"


def in_words(counts: Counter) -> str:
    """ "malformed 3, too short 1", the most frequent first; "none" when there is nothing."""
    return ", ".join(f"{name} {count}" for name, count in counts.most_common()) or "none"
