"""Completions from any OpenAI-compatible server, whatever it does wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import re
import time
from itertools import count

from alpaca import UserError
from alpaca.endpoint.budget import RequestSettings
from alpaca.endpoint.dialects import NO_CREDIT, NO_MODEL, Reply, Settings, masked, named, read_fault, read_reply
from alpaca.endpoint.pacing import Pace
from alpaca.endpoint.transport import Lost, Server

BUSY = (429, 503, 529)  # overload or a rate limit: slow down and retry
PASSING = (408, 409, 425)  # transient, like 500 and above
THOUGHT = "went into thoughts"  # in the error of a reply that thought until its tokens were used up
ANOTHER_TRY = ("empty reply", "content filter", "cut off", "unreadable reply")  # errors that another seed may avoid


@dataclasses.dataclass
class OpenAIDecodingArguments:
    """How the teacher samples. No ``stop`` string may occur in a good answer."""

    max_tokens: int = 3072
    temperature: float = 1.0
    top_p: float = 1.0
    stop: list[str] | None = None
    response_format: dict | None = None  # a JSON schema


@dataclasses.dataclass
class Completion:
    """One reply. ``text`` is None when the request failed for good; ``error`` then says why."""

    text: str | None
    finish_reason: str | None = None  # "stop", "length" (cut off), "content_filter", "error", or None: not given
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None
    model: str | None = dataclasses.field(default=None, compare=False)  # that answered, according to its server
    changed: list[str] | None = dataclasses.field(default=None, compare=False)  # settings that the server refused
    max_tokens: int | None = dataclasses.field(default=None, compare=False)  # sent, if fewer than configured
    price: float = dataclasses.field(default=1.0, compare=False)  # relative to a direct request: batches cost less


class Talk(str):
    """A conversation as a prompt: its text, used for limits and estimates, and the messages that are sent."""

    def __new__(cls, text: str, messages: list[dict]):
        made = super().__new__(cls, text)
        made.messages = messages
        return made


class Teacher(Server):
    """A model on an OpenAI-compatible server.

    Args:
        model_name: the model's name on its server.
        decoding: how it samples.
        api: "chat" sends a prompt as one user message; "completions" lets a base model continue it.
        settings: the server, its timeout, and its limits. Replies without text are retried twice, but not with a
            budget: each try is paid for.
        max_retries: for 408, 409, 5xx, timeouts and lost connections, with exponential backoff and jitter between 0.5
            and 8 s. Rate-limited requests (429, 503, 529) are retried without limit, at the pace that the server
            allows.

    Raises:
        UserError: no model; neither a key nor a base URL; a key that no header can carry, or a key and user:password@
            in the URL; another ``api``; max_concurrency or max_tokens below 1.
    """

    def __init__(
        self,
        model_name: str,
        decoding: OpenAIDecodingArguments,
        api: str = "chat",
        settings: RequestSettings = RequestSettings(),  # noqa: B008  never changed
        max_retries: int = 5,
    ):
        if api not in ("chat", "completions"):
            raise UserError(f"api must be chat or completions, not {api!r}")
        if not model_name:
            raise UserError("no model to ask: set model_name, its name on the server")
        for name, value in (("max_concurrency", settings.max_concurrency), ("max_tokens", decoding.max_tokens)):
            if value < 1:
                raise UserError(f"{name} must be at least 1")
        self.model_name, self.decoding, self.api, self.max_retries = model_name, decoding, api, max_retries
        self.path = "/chat/completions" if api == "chat" else "/completions"
        self.settings = Settings(model_name, decoding, settings.extra)
        super().__init__(settings.base_url, settings.request_timeout, settings.offline)
        self._empty_retries = 0 if settings.max_total_tokens or settings.max_cost_usd else min(max_retries, 2)
        limits = settings.requests_per_minute, settings.tokens_per_minute, settings.give_up_after
        self.pace = Pace(settings.max_concurrency, *limits)
        self._ends = settings.time_limit and time.monotonic() + settings.time_limit
        self._answered, self._reply_tokens = 0, decoding.max_tokens / 4  # in this run; the mean, guessed at first

    def variant(self, prompt: str, seed: int | None, tries: int) -> tuple[str, int | None]:
        """Return what to send at the tries-th try: another seed, since with the same a server would repeat itself."""
        return prompt, None if seed is None else seed + tries

    def settle(self, reply: Completion, tries: int) -> Completion | None:
        """Return the reply to keep after ``tries`` earlier ones, or None to retry."""
        empty = reply.text is None and reply.error.startswith(ANOTHER_TRY) and reply.finish_reason != "length"
        return None if empty and tries < self._empty_retries else reply

    def body(self, prompt: str, seed: int | None) -> dict:
        """Return the JSON of one request."""
        messages = prompt.messages if isinstance(prompt, Talk) else [{"role": "user", "content": prompt}]
        asked = {"messages": messages} if self.api == "chat" else {"prompt": prompt}
        return {"model": self.model_name, **self.settings.of(prompt, seed), **asked}

    def read(self, prompt: str, body: dict, status: int, data: bytes) -> tuple[Completion, str]:
        """Return what a response means, and what to do next.

        "done": a text or a permanent failure. "retry": a transient fault. "throttled": too many requests. "changed":
        the server refused a setting; body() now leaves it out.

        Raises:
            UserError: no retry can help: wrong key, no credit, no permission, unknown model.
        """
        if status == 200:
            try:
                reply = json.loads(data)
            except (ValueError, RecursionError) as e:
                what = self.words(data) or "empty body" if data.lstrip()[:1] in b"<d:" else type(e).__name__
                return Completion(None, error=f"unreadable reply ({what})"), "done"
            if isinstance(reply, dict) and (reply.get("choices") or "choices" in reply and not reply.get("error")):
                return self._completion(prompt, body, reply), "done"
        fault = read_fault(data)
        said, status = masked(fault.words, *self.secrets), (fault.status or 200) if status == 200 else status
        failure = Completion(None, error=named(status, said))
        no_credit = NO_CREDIT.search(f"{fault.code} {fault.words}")
        if status == 402 or no_credit and no_credit[0] not in prompt:  # a refusal may quote the prompt
            raise UserError(f"{self.where} has no credit left: add some, or use another key ({failure.error})")
        if status == 401:
            raise UserError(f"{self.where} refused the key: check OPENAI_API_KEY ({failure.error})")
        if status in BUSY:
            return failure, "throttled"
        if status in PASSING or status >= 500:
            return failure, "retry"
        if status in (400, 413, 422) and self.settings.learn(prompt, body, fault):
            return failure, "changed"
        first = not self._answered  # later, a refusal may be due to this request's content
        unknown = NO_MODEL.search(f"{fault.code} {fault.words}")
        unknown = unknown or re.search(rf"(?<!\w){re.escape(self.model_name)}(?!\w)", fault.words)
        if first and (status == 404 or status in (400, 422) and unknown):
            what = f"has no model {self.model_name!r}, or no {self.api} endpoint: check model_name and base_url"
            raise UserError(f"{self.where} {what} ({failure.error})")
        if first and status in (403, 451) and "flagged" not in fault.words:
            cure = "use another key or model"
            raise UserError(f"{self.where} does not let you use {self.model_name!r}: {cure} ({failure.error})")
        return failure, "done"

    def _completion(self, prompt: str, body: dict, data: dict) -> Completion:
        reply = read_reply(data)
        # A refused or empty reply was paid for too. English has about 4 characters per token.
        tokens = reply.usage or (len(prompt) // 4, len(reply.text + reply.thoughts) // 4)
        error = _fault_of(reply, tokens[1])
        if not error:
            self._answered += 1
            self._reply_tokens += (tokens[1] - self._reply_tokens) / self._answered
            self.settings.succeeded(prompt)
        text, changed = None if error else reply.text, sorted(self.settings.changed.values()) or None
        longest = body.get("max_tokens") or body.get("max_completion_tokens")
        fewer = longest if isinstance(longest, int) and longest < self.decoding.max_tokens else None
        return Completion(text, reply.finish_reason, *tokens, error, reply.model, changed, fewer)

    def words(self, data: bytes) -> str:
        """Return the server's own words in an error body, in one line, without the key."""
        return masked(read_fault(data).words, *self.secrets)

    async def ask(self, prompt: str, seed: int | None = None) -> Completion | None:
        """Return one reply, or what went wrong after all retries, with the tokens of all tries that were answered.

        None if the time limit passed while it waited to be sent.

        Raises:
            UserError: no retry can help: wrong key, no permission, no credit, unknown model, no server, or only
                refusals for too long.
        """
        prompt_tokens = completion_tokens = 0
        for tries in count():
            if not (reply := await self._deliver(*self.variant(prompt, seed, tries))):
                return None
            prompt_tokens += reply.prompt_tokens
            completion_tokens += reply.completion_tokens
            if settled := self.settle(reply, tries):
                return dataclasses.replace(settled, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)

    async def _deliver(self, prompt: str, seed: int | None) -> Completion | None:
        """Send one request until it is answered, or has failed ``max_retries`` times."""
        faults, pause = 0, 0.0
        for tries in count():
            try:
                async with asyncio.timeout_at(self._ends):
                    if pause:
                        await asyncio.sleep(pause)
                    ticket = await self.pace.turn(len(prompt) / 4 + self._reply_tokens, again=tries > 0)
            except TimeoutError:
                return None
            body, headers = self.body(prompt, seed), {}
            try:
                status, headers, data = await self.http("POST", self.path, json=body)
                reply, follows = self.read(prompt, body, status, data)
            except Lost as e:
                if e.unreachable and not self._answered:
                    raise UserError(f"no answer from {self.where} ({e}): start the server, or check base_url") from None
                # A server that has answered before may be restarting.
                reply, follows = Completion(None, error=str(e)), "throttled" if e.unreachable else "retry"
            now = time.monotonic()
            if follows == "throttled":
                self.pace.refused(now, ticket, headers, reply.error)
            elif headers:
                self.pace.accepted(now, ticket, headers, reply.prompt_tokens + reply.completion_tokens or None)
            else:
                self.pace.failed(now, ticket)
            if follows == "done" or follows == "retry" and faults == self.max_retries:
                return reply
            pause = 0.0
            if follows == "retry":
                pause = min(0.5 * 2**faults, 8) * random.uniform(0.75, 1)
                faults += 1


class Answerer(Teacher):
    """A teacher that is being judged: an empty reply that ended normally is its answer, as for a local model.

    A refused, cut off or unreadable reply is still a failure.
    """

    def settle(self, reply: Completion, tries: int) -> Completion | None:
        """Return the reply to keep; an empty one with the finish reason "stop" has the text ""."""
        settled = super().settle(reply, tries)
        if settled and settled.text is None and settled.error == "empty reply (finish_reason stop)":
            return dataclasses.replace(settled, text="", error=None)
        return settled


def _fault_of(reply: Reply, tokens: int) -> str | None:
    if reply.finish_reason in ("content_filter", "error"):
        return "content filter" if reply.finish_reason == "content_filter" else "cut off by the server"
    if reply.text.strip():
        return None
    if reply.finish_reason == "length" and reply.thoughts:
        return f"no answer: all {tokens:,} tokens {THOUGHT}; allow more tokens"
    if reply.thoughts:
        return "no answer: the server returned all of the text as thoughts"
    return f"empty reply (finish_reason {reply.finish_reason})"
