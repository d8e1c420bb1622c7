"""Completions from any OpenAI-compatible server, whatever it does wrong.

Importing this loads no API client; creating a Teacher does.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import logging
import os
import random
import urllib.parse

from alpaca import UserError
from alpaca.common.text import printable, shorten
from alpaca.endpoint.budget import RequestSettings


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
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None
    model: str | None = dataclasses.field(default=None, compare=False)  # that answered, according to its server
    left_out: list[str] | None = dataclasses.field(default=None, compare=False)  # settings that the model refuses
    max_tokens: int | None = dataclasses.field(default=None, compare=False)  # requested, if the context forced fewer


class Teacher:
    """A model behind an OpenAI-compatible server.

    Args:
        model_name: the model, as its server calls it.
        decoding: how it samples. ``max_tokens`` is halved when the server reports that prompt and reply together do not
            fit its context; what fits then is the limit for all prompts of that length or longer.
        api: "chat" sends a prompt as one user message; "completions" lets a base model continue it.
        settings: the server, its timeout, and how many connections to keep. With a budget, a reply without a text is
            not requested again (else twice): each try is paid for.
        max_retries: for 408, 409, 429 (Retry-After honoured up to two minutes), 5xx, timeouts and resets, with
            exponential backoff and jitter between 0.5 and 8 s.

    Raises:
        UserError: no model; neither a key nor a base URL, or both a key and user:password@ in the URL; an ``api`` that
            is neither of the two; no request in flight, or no token.
    """

    MIN_TOKENS = 64  # a context that has no room for these is too short for the prompt

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
        import httpx2  # what openai sends through
        import openai

        base_url = settings.base_url or os.environ.get("OPENAI_BASE_URL") or None
        key = os.environ.get("OPENAI_API_KEY")
        if not key and not base_url:
            raise UserError(
                "no server to ask: set OPENAI_API_KEY, or base_url (or OPENAI_BASE_URL) for a server of your own"
            )
        if base_url and not _is_url(base_url):
            raise UserError("base_url is not a URL: it looks like http://127.0.0.1:8000/v1")
        self.model_name, self.decoding, self.api, self._key = model_name, dataclasses.replace(decoding), api, key
        parts = urllib.parse.urlsplit(base_url or "https://api.openai.com/v1")
        # aiohttp refuses an address with user:password@ beside an Authorization header, which openai always sets.
        login, _, netloc = parts.netloc.rpartition("@")
        if login and key:
            raise UserError(
                "base_url has user:password@ and OPENAI_API_KEY is set; a request carries only one: remove the other"
            )
        basic = base64.b64encode(urllib.parse.unquote(login).encode()).decode()
        parts = parts._replace(netloc=netloc)
        self._where = parts._replace(query="", fragment="").geturl()  # without user:password@ and ?key=…
        budgeted = settings.max_total_tokens or settings.max_cost_usd
        self._empty_retries, self._refused = 0 if budgeted else min(max_retries, 2), set()
        self._fitting: dict[int, int] = {}  # characters of a prompt → tokens of a reply, where max_tokens were too many
        # A server that drips a byte now and then never times out: its limit is that of all tries together.
        self._patience = (max_retries + 1) * settings.request_timeout + max_retries * 120
        connections = settings.max_concurrency
        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._client = openai.AsyncOpenAI(
            base_url=parts.geturl(),
            default_headers={"Authorization": f"Basic {basic}"} if login else None,
            api_key=key or "none",  # a local server asks for no key, but the client refuses to start without one
            timeout=settings.request_timeout,
            max_retries=max_retries,
            # The default transport looks at all its connections for each request: with 64 of them a third of the time.
            http_client=openai.DefaultAioHttpClient(limits=limits),
        )

    async def ask(self, prompt: str, seed: int | None = None) -> Completion:
        """Return one reply, or what went wrong after all retries; never an empty text.

        Its tokens are those of all tries that were answered. Each try for a reply without a text has its own seed: with
        the same one a server would repeat itself.

        Raises:
            UserError: no retry can help: wrong key, no permission, no credit, unknown model, or no server there.
        """
        prompt_tokens = completion_tokens = 0
        for number in range(self._empty_retries + 1):
            if number:
                await asyncio.sleep(0.5 * 2**number * random.uniform(0.75, 1))
            reply, again = await self._ask_once(prompt, None if seed is None else seed + number)
            prompt_tokens += reply.prompt_tokens
            completion_tokens += reply.completion_tokens
            if not again:
                break
        return dataclasses.replace(reply, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)

    async def _ask_once(self, prompt: str, seed: int | None, limit: int | None = None) -> tuple[Completion, bool]:
        """Return a reply of at most ``limit`` tokens, and whether it has no text but another try may bring one."""
        import openai

        where, model, settings = self._where, self.model_name, self._settings(len(prompt), seed, limit)
        try:
            reply, again = await asyncio.wait_for(self._send(prompt, settings), self._patience)
            if limit and reply.text and limit < self._longest(len(prompt)):  # a prompt may be too long by itself
                logging.warning(
                    "the context of %s is too short for prompts of %d characters: replies of at most %d tokens to such",
                    *(model, len(prompt), limit),
                )
                self._fitting[len(prompt)] = limit
            return reply, again
        except TimeoutError:
            return Completion(None, error="timeout"), False
        # The next errors leave out the server's own words, which may repeat a part of the key.
        except openai.AuthenticationError:
            raise UserError(f"{where} refused the key (401): check OPENAI_API_KEY") from None
        except openai.PermissionDeniedError:
            raise UserError(f"{where} does not let this key use {model!r} (403)") from None
        except openai.NotFoundError:
            raise UserError(
                f"{where} has no model {model!r}, or no {self.api} endpoint (404): check model_name and base_url"
            ) from None
        except openai.APIConnectionError as e:
            if _is_refused(e):
                raise UserError(f"nothing answers at {where}: is the server running?") from None
            if isinstance(e, openai.APITimeoutError):
                return Completion(None, error="timeout"), False
            return Completion(None, error=f"connection: {type(e.__cause__ or e).__name__}"), False
        except openai.APIStatusError as e:
            if e.code == "insufficient_quota":
                raise UserError(f"the account at {where} has no credit left ({e.status_code})") from None
            if e.status_code not in (400, 413, 422):
                return Completion(None, error=f"HTTP {e.status_code}"), False
            # Only the server can say why it refuses a request (an unknown setting, …).
            said = str(e.body["message"] if isinstance(e.body, dict) and "message" in e.body else e.message)
            if self._key:
                said = said.replace(self._key, "…")
            if self._adapt(settings, e.code, e.param):
                return await self._ask_once(prompt, seed, limit)
            tokens = settings.get("max_tokens") or settings.get("max_completion_tokens", 0)
            if "context" in f"{e.code} {said}".lower() and tokens > self.MIN_TOKENS:
                return await self._ask_once(prompt, seed, tokens // 2)
            return Completion(None, error=f"HTTP {e.status_code}: {printable(shorten(said, 200))}"), False
        except (openai.OpenAIError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as e:
            return Completion(None, error=f"unreadable reply ({type(e).__name__})"), True

    def _longest(self, characters: int) -> int:
        """Return the most tokens to ask for after a prompt of so many characters: a long one limits no shorter one."""
        fitting = (tokens for length, tokens in self._fitting.items() if length <= characters)
        return min(fitting, default=self.decoding.max_tokens)

    def _settings(self, characters: int, seed: int | None, limit: int | None) -> dict:
        settings = dataclasses.asdict(self.decoding) | {"seed": seed}
        settings["max_tokens"] = limit or self._longest(characters)
        if "max_tokens" in self._refused:  # the name that reasoning models use
            settings["max_completion_tokens"] = settings["max_tokens"]
        return {key: value for key, value in settings.items() if value is not None and key not in self._refused}

    def _adapt(self, settings: dict, code: str | None, param: str | None) -> bool:
        """Learns from a refused request, for good, what this model does not take; whether there was anything to learn.

        Another request may have taught the same meanwhile: ``settings`` are those that were refused.
        """
        if code in ("unsupported_parameter", "unsupported_value") and param in settings:
            if param in ("max_tokens", "temperature", "top_p", "stop", "seed"):
                if param not in self._refused and param != "max_tokens":
                    logging.warning("%s does not take %s=%r: left out", self.model_name, param, settings[param])
                self._refused.add(param)
                return True
        return False

    async def close(self) -> None:
        """Close the connections, which belong to the event loop that opened them."""
        await self._client.close()

    async def _send(self, prompt: str, settings: dict) -> tuple[Completion, bool]:
        # The client's bare post() skips its checks of the request and its models of the reply: half of its time.
        import httpx2

        body = {"model": self.model_name, **settings}
        if self.api == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        path = "/chat/completions" if self.api == "chat" else "/completions"
        reply = (await self._client.post(path, cast_to=httpx2.Response, body=body)).json()
        choice = (reply.get("choices") or [{}])[0]
        message = choice.get("message") or {}
        # Some models put refusals in a separate field; treat it as the reply.
        text = message.get("content") or message.get("refusal") if self.api == "chat" else choice.get("text")
        if text is not None and not isinstance(text, str):
            raise TypeError("the text is not a string")
        finish_reason, usage = choice.get("finish_reason"), reply.get("usage") or {}
        # A refused or empty reply was paid for too.
        tokens = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
        if not all(isinstance(count, int) for count in tokens):  # some servers do not count
            tokens = (len(prompt) // 4, len(text or "") // 4)  # English has about 4 characters a token
        model, left_out = reply.get("model"), sorted(self._refused - settings.keys() - {"max_tokens"})
        who = {"model": model if isinstance(model, str) else None, "left_out": left_out or None}
        longest = settings.get("max_tokens") or settings.get("max_completion_tokens")
        who["max_tokens"] = longest if longest and longest < self.decoding.max_tokens else None
        if finish_reason == "content_filter":
            return Completion(None, finish_reason, *tokens, error="content filter", **who), True
        if finish_reason in ("error", "abort"):  # by the server
            return Completion(None, finish_reason, *tokens, f"cut off (finish_reason {finish_reason})", **who), True
        if not text or not text.strip():  # one that stopped for its length was all reasoning, and would be again
            error = f"empty reply (finish_reason {finish_reason})"
            return Completion(None, finish_reason, *tokens, error, **who), finish_reason != "length"
        text = text.encode("utf-8", "replace").decode()  # no file can hold half of a surrogate pair
        return Completion(text, finish_reason, *tokens, **who), False


class Answerer:
    """A teacher that is being judged: an empty reply that ended normally is its answer, as it is a local model's.

    A refused, cut off or unreadable reply stays a failure.
    """

    def __init__(self, teacher: Teacher):
        self.teacher, self.close = teacher, teacher.close

    async def ask(self, prompt: str, seed: int | None = None) -> Completion:
        """Return the teacher's reply; its text is "" where an empty one had the finish reason "stop"."""
        reply = await self.teacher.ask(prompt, seed)
        empty = reply.text is None and reply.finish_reason == "stop"
        return dataclasses.replace(reply, text="", error=None) if empty else reply


def _is_refused(e: BaseException | None) -> bool:
    """Whether nothing listens at the address; the client wraps this error several times."""
    while e is not None and not isinstance(e, ConnectionRefusedError):
        e = e.__cause__ or e.__context__
    return e is not None


def _is_url(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
        parts.port  # noqa: B018  raises ValueError for a bad port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and text.isprintable() and " " not in text
