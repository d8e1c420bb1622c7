"""Completions from any OpenAI-compatible server, whatever it does wrong.

Importing this loads no HTTP client; creating a Teacher does.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import ipaddress
import json
import os
import random
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from itertools import count

from alpaca import UserError
from alpaca.endpoint.budget import RequestSettings
from alpaca.endpoint.dialects import NO_CREDIT, NO_MODEL, Settings, masked, named, read_fault, read_reply
from alpaca.endpoint.pacing import Pace

BUSY = (429, 503, 529)  # the server has too much to do, or we ask for too much: slower, and again
PASSING = (408, 409, 425)  # and all of 500 and above
IDLE = 30.0  # seconds without a byte, once a reply has begun, until it counts as stalled
THOUGHT = "went into thoughts"  # in the error of a reply that thought until its tokens were used up
ANOTHER_TRY = ("empty reply", "content filter", "cut off", "unreadable reply")  # errors that another seed may mend


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
    changed: list[str] | None = dataclasses.field(default=None, compare=False)  # settings that the server did not take
    max_tokens: int | None = dataclasses.field(default=None, compare=False)  # requested, if fewer than asked for
    price: float = dataclasses.field(default=1.0, compare=False)  # relative to a direct request's: batches cost less


class OutOfTime(Exception):
    """The time limit has passed while a request waited to be sent."""


class Lost(Exception):
    """A request that brought no HTTP response. ``unreachable``: not even a connection."""

    unreachable = False


class Teacher:
    """A model behind an OpenAI-compatible server.

    Args:
        model_name: the model, as its server calls it.
        decoding: how it samples.
        api: "chat" sends a prompt as one user message; "completions" lets a base model continue it.
        settings: the server, its timeout, and its limits. With a budget, a reply without a text is not requested again
            (else twice): each try is paid for.
        max_retries: for 408, 409, 5xx, timeouts and lost connections, with exponential backoff and jitter between 0.5
            and 8 s. Requests that are refused because there are too many (429, 503, 529) are sent again without limit,
            at the pace that the server allows.

    Raises:
        UserError: no model; neither a key nor a base URL; a key that no header can carry, or one beside
            user:password@ in the URL; an ``api`` that is neither of the two; no request in flight, or no token.
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
            raise UserError("no model to ask: model_name is the name that its server knows")
        for name, value in (("max_concurrency", settings.max_concurrency), ("max_tokens", decoding.max_tokens)):
            if value < 1:
                raise UserError(f"{name} must be at least 1")
        self.model_name, self.decoding, self.api, self.max_retries = model_name, decoding, api, max_retries
        self._names_model = re.compile(rf"(?<!\w){re.escape(model_name)}(?!\w)")
        self.path = "/chat/completions" if api == "chat" else "/completions"
        self.settings = Settings(model_name, decoding, settings.extra)
        self._key, self._session, self._timeout = _api_key(), None, settings.request_timeout
        self._address(settings.base_url or os.environ.get("OPENAI_BASE_URL") or None, settings.offline)
        self._empty_retries = 0 if settings.max_total_tokens or settings.max_cost_usd else min(max_retries, 2)
        self.pace = Pace(
            settings.max_concurrency,
            settings.requests_per_minute,
            settings.tokens_per_minute,
            settings.give_up_after,
        )
        self._ends = settings.time_limit and time.monotonic() + settings.time_limit
        self._answered, self._reply_tokens = 0, decoding.max_tokens / 4  # of this run; the mean, guessed at first

    def _address(self, base_url: str | None, offline: bool) -> None:
        if not self._key and not base_url and not offline:
            raise UserError(
                "no server to ask: set OPENAI_API_KEY, or base_url (or OPENAI_BASE_URL) for a server of your own"
            )
        if base_url and not _is_url(base_url):
            raise UserError("base_url is not a URL: it looks like http://127.0.0.1:8000/v1")
        parts = urllib.parse.urlsplit(base_url or "https://api.openai.com/v1")
        login, _, netloc = parts.netloc.rpartition("@")
        if login and self._key:
            raise UserError(
                "base_url has user:password@ and OPENAI_API_KEY is set; a request carries only one: remove the other"
            )
        secret = urllib.parse.unquote(login) or self._key or ""
        coded = base64.b64encode(secret.encode()).decode()
        # A local server asks for no key, but some refuse a request without any.
        self._headers = {"Authorization": f"Basic {coded}" if login else f"Bearer {secret or 'none'}"}
        in_query = [value for name, value in urllib.parse.parse_qsl(parts.query) if name != "api-version"]
        self._secrets = (secret, coded, login, *in_query)
        parts = parts._replace(netloc=netloc, fragment="")
        self._query, parts = parts.query, parts._replace(query="")
        self.where, self._tls = parts.geturl().rstrip("/"), parts.scheme == "https"  # without secrets
        self._proxy, self._proxied = _proxy_for(parts.scheme, parts.hostname)

    # -----------------------------------------------------------------------------------------------------------------
    # What a request says, and what its reply means. The Batch API uses the same.

    def variant(self, prompt: str, seed: int | None, tries: int) -> tuple[str, int | None]:
        """Return what to send at the tries-th time: another seed, since with the same a server would repeat itself."""
        return prompt, None if seed is None else seed + tries

    def settle(self, reply: Completion, tries: int) -> Completion | None:
        """Return the reply to keep after ``tries`` earlier ones, or None to ask again."""
        if reply.text is None and reply.error.startswith(ANOTHER_TRY) and reply.finish_reason != "length":
            return reply if tries >= self._empty_retries else None
        return reply

    def body(self, prompt: str, seed: int | None) -> dict:
        """Return the JSON of one request."""
        asked = {"messages": [{"role": "user", "content": prompt}]} if self.api == "chat" else {"prompt": prompt}
        return {"model": self.model_name, **self.settings.of(prompt, seed), **asked}

    def read(self, prompt: str, body: dict, status: int, data: bytes) -> tuple[Completion, str]:
        """Return what a response means, and what follows.

        "done": a text or a lasting failure. "retry": a passing fault. "throttled": too many requests. "changed": the
        server refused a setting; body() is another one now.

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
        said, status = masked(fault.words, *self._secrets), (fault.status or 200) if status == 200 else status
        failure = Completion(None, error=named(status, said))
        if NO_CREDIT.search(f"{fault.code} {fault.words}") or status == 402:
            raise UserError(f"the account at {self.where} has no credit left ({failure.error})")
        if status == 401:
            raise UserError(f"{self.where} refused the key: check OPENAI_API_KEY ({failure.error})")
        if status in BUSY:
            return failure, "throttled"
        if status in PASSING or status >= 500:
            return failure, "retry"
        if status in (400, 413, 422) and self.settings.learn(prompt, body, fault):
            return failure, "changed"
        first = not self._answered  # later, a refusal may be of this request's content
        unknown = NO_MODEL.search(f"{fault.code} {fault.words}") or self._names_model.search(fault.words)
        if first and (status == 404 or status in (400, 422) and unknown):
            what = f"has no model {self.model_name!r}, or no {self.api} endpoint: check model_name and base_url"
            raise UserError(f"{self.where} {what} ({failure.error})")
        if first and status in (403, 451) and "flagged" not in fault.words:
            raise UserError(f"{self.where} does not let you use {self.model_name!r} ({failure.error})")
        return failure, "done"

    def _completion(self, prompt: str, body: dict, data: dict) -> Completion:
        reply = read_reply(data)
        longest = body.get("max_tokens") or body.get("max_completion_tokens") or self.decoding.max_tokens
        # A refused or empty reply was paid for too. English has about 4 characters a token.
        tokens = reply.usage or (len(prompt) // 4, len(reply.text + reply.thoughts) // 4)
        completion = Completion(
            # no file can hold half of a surrogate pair
            reply.text.encode("utf-8", "replace").decode(),
            reply.finish_reason,
            *tokens,
            model=model.encode("utf-8", "replace").decode() if isinstance(model := data.get("model"), str) else None,
            max_tokens=longest if isinstance(longest, int) and longest < self.decoding.max_tokens else None,
        )
        if reply.finish_reason == "content_filter":
            completion.error = "content filter"
        elif reply.finish_reason == "error":
            completion.error = "cut off by the server"
        elif not reply.text.strip():
            completion.error = _nothing_said(reply, completion.completion_tokens)
        if completion.error:
            completion.text = None
        else:
            self._answered += 1
            self._reply_tokens += (completion.completion_tokens - self._reply_tokens) / self._answered
            self.settings.succeeded(prompt)
        completion.changed = sorted(self.settings.changed.values()) or None  # what this reply has taught as well
        return completion

    def words(self, data: bytes) -> str:
        """Return the server's own words in an error body, in one line, without the key."""
        return masked(read_fault(data).words, *self._secrets)

    # -----------------------------------------------------------------------------------------------------------------
    # Sending.

    async def ask(self, prompt: str, seed: int | None = None) -> Completion:
        """Return one reply, or what went wrong after all retries. Its tokens are those of all tries that were answered.

        Raises:
            UserError: no retry can help: wrong key, no permission, no credit, unknown model, no server there, or
                nothing but refusals for too long.
            OutOfTime: the time limit passed while it waited to be sent.
        """
        prompt_tokens = completion_tokens = 0
        for tries in count():
            reply = await self._deliver(*self.variant(prompt, seed, tries))
            prompt_tokens += reply.prompt_tokens
            completion_tokens += reply.completion_tokens
            if settled := self.settle(reply, tries):
                return dataclasses.replace(settled, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)

    async def _deliver(self, prompt: str, seed: int | None) -> Completion:
        """Send one request until it is answered, or has failed ``max_retries`` times."""
        faults, pause = 0, 0.0
        for tries in count():
            try:
                async with asyncio.timeout_at(self._ends):
                    if pause:
                        await asyncio.sleep(pause)
                    ticket = await self.pace.turn(len(prompt) / 4 + self._reply_tokens, again=tries > 0)
            except TimeoutError:
                raise OutOfTime from None
            body, headers = self.body(prompt, seed), {}
            try:
                status, headers, data = await self.http("POST", self.path, json=body)
                reply, follows = self.read(prompt, body, status, data)
            except Lost as e:
                if e.unreachable and not self._answered:
                    raise UserError(f"nothing answers at {self.where}: {e}; is the server running?") from None
                # One that has answered before may be starting again.
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

    async def http(self, method: str, path: str, json=None, data=None) -> tuple[int, Mapping[str, str], bytes]:
        """Send one request to a path below the base URL; return its status, headers and body.

        Raises:
            Lost: no response, or only a part of one; the message names what happened.
        """
        import aiohttp

        url = self.where + path + ("&?"["?" not in path] + self._query if self._query else "")
        session, received, idle = self._session or self._open(), bytearray(), asyncio.timeout(None)
        try:
            async with session.request(method, url, json=json, data=data, proxy=self._proxy) as response:
                received += await response.content.readany()  # the reply may take its time until it begins
                while not response.content.at_eof():
                    # Some proxies send white space until the reply begins.
                    async with asyncio.timeout(None if received[:999].isspace() else IDLE) as idle:
                        received += await response.content.readany()
                if response.history and (response.method != method or response.status == 401):
                    there = response.url.with_query(None)  # the key, or the body, was not sent there
                    raise UserError(f"{self.where} redirects to {there}: change base_url")
                return response.status, response.headers, bytes(received)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as e:
            lost = Lost(_transport_fault(e, stalled=idle.expired()) + self._proxied)
            lost.unreachable = isinstance(e, aiohttp.ClientConnectorError)
            raise lost from None

    def _open(self):
        import ssl

        import aiohttp
        import certifi

        # Some systems' Pythons have no root certificates of their own (macOS); SSL_CERT_FILE counts as well.
        context = ssl.create_default_context() if self._tls else None
        if context:
            context.load_verify_locations(certifi.where())
        # Servers close idle connections after 5 s (uvicorn) or more: a request on one that is being closed is lost.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4, ssl=context or True)
        timeout = aiohttp.ClientTimeout(total=self._timeout)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers)
        return self._session

    async def close(self) -> None:
        """Close the connections, which belong to the event loop that opened them."""
        if self._session:
            await self._session.close()
        self._session = None


class Answerer(Teacher):
    """A teacher that is being judged: an empty reply that ended normally is its answer, as it is a local model's.

    A refused, cut off or unreadable reply stays a failure.
    """

    def settle(self, reply: Completion, tries: int) -> Completion | None:
        """Return the reply to keep; its text is "" where an empty one had the finish reason "stop"."""
        settled = super().settle(reply, tries)
        if settled and settled.text is None and settled.error == "empty reply (finish_reason stop)":
            return dataclasses.replace(settled, text="", error=None)
        return settled


def _nothing_said(reply, tokens: int) -> str:
    if reply.finish_reason == "length" and reply.thoughts:
        return f"no answer: all {tokens:,} tokens {THOUGHT} (allow more)"
    if reply.thoughts:
        return "no answer: the server put all of the text into its thoughts"
    return f"empty reply (finish_reason {reply.finish_reason})"


def _transport_fault(e: BaseException, stalled: bool) -> str:
    """Name what happened to a request that brought no response."""
    import aiohttp

    if isinstance(e, TimeoutError):
        return f"timeout: the reply stalled for {IDLE:g} s" if stalled else "timeout"
    if isinstance(e, aiohttp.ClientConnectorCertificateError):
        return f"certificate refused: {e.certificate_error}"
    if isinstance(e, aiohttp.ClientConnectorSSLError):
        return "no TLS there: does the address begin with http://?"
    if isinstance(e, aiohttp.ClientConnectorDNSError):
        return "no such host"
    if isinstance(e, aiohttp.ClientHttpProxyError):
        return f"the proxy answered HTTP {e.status}"
    if isinstance(e, aiohttp.ClientResponseError):
        return "the response is not HTTP"
    if isinstance(e, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError):
        return "connection closed"
    number = getattr(e, "errno", None)
    return os.strerror(number).lower() if number else f"connection: {type(e).__name__}"


def _api_key() -> str | None:
    """Return OPENAI_API_KEY without white space around it; UserError if no header can carry it."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    for place, character in enumerate(key, 1):
        if not "!" <= character <= "~":
            raise UserError(f"OPENAI_API_KEY has {character!a} as character {place}, which no key has: copy it again")
    return key or None


def _proxy_for(scheme: str, host: str) -> tuple[str | None, str]:
    """Return the proxy that the environment names for a host, never for this machine itself, and a note for errors."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    proxy = None if local or urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(scheme)
    proxy = f"http://{proxy}" if proxy and "://" not in proxy else proxy  # as curl reads "proxy:3128"
    return proxy, f", through the proxy of {scheme}_proxy" if proxy else ""


def _is_url(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
        parts.port  # noqa: B018  raises ValueError for a bad port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and text.isprintable() and " " not in text
