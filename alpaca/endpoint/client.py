"""Completions from any OpenAI-compatible server, with what such servers do wrong.

Importing this loads no API client: only a Teacher does.
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


@dataclasses.dataclass
class OpenAIDecodingArguments:
    """How the teacher samples. ``stop`` strings must not occur inside a good answer."""

    max_tokens: int = 3072
    temperature: float = 1.0
    top_p: float = 1.0
    stop: list[str] | None = None


@dataclasses.dataclass
class Completion:
    """One reply. ``text`` is None when the request failed for good; ``error`` then says why."""

    text: str | None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None
    model: str | None = dataclasses.field(default=None, compare=False)  # that answered, by its server's word
    left_out: list[str] | None = dataclasses.field(default=None, compare=False)  # settings that the model does not take
    max_tokens: int | None = dataclasses.field(default=None, compare=False)  # asked for, where the context forced fewer


class Teacher:
    """A model behind an OpenAI-compatible server.

    Args:
        model_name: the model, as its server calls it.
        decoding: how it samples. ``max_tokens`` is halved when the server says that prompt and reply together do not
            fit its context; what fits then is asked for at once behind all prompts that are as long.
        api: "chat" sends a prompt as one user message; "completions" lets a base model continue it.
        base_url: default OPENAI_BASE_URL, then api.openai.com; the key is OPENAI_API_KEY.
        request_timeout: seconds until a request is tried again.
        max_concurrency: requests that will be in flight at once, so that as many connections are kept.
        empty_retries: for a reply without a text. Each is paid for.
        max_retries: for 408, 409, 429 (Retry-After honoured up to two minutes), 5xx, timeouts and resets, with
            exponential backoff and jitter between 0.5 and 8 s.

    Raises:
        UserError: neither a key nor a base URL, or both a key and user:password@ in the URL; an ``api`` that is
            neither of the two; no request in flight.
    """

    MIN_TOKENS = 64  # below this a shorter reply is no cure for a context that is too long

    def __init__(
        self,
        model_name: str,
        decoding: OpenAIDecodingArguments,
        api: str = "chat",
        base_url: str | None = None,
        request_timeout: float = 600.0,
        max_concurrency: int = 32,
        empty_retries: int = 2,
        max_retries: int = 5,
    ):
        if api not in ("chat", "completions"):
            raise UserError(f"--api takes chat or completions, not {api!r}")
        if max_concurrency < 1:
            raise UserError("--max_concurrency must be at least 1")
        import httpx2  # what openai sends through
        import openai

        base_url = base_url or os.environ.get("OPENAI_BASE_URL") or None
        key = os.environ.get("OPENAI_API_KEY")
        if not key and not base_url:
            raise UserError(
                "no server to ask: set OPENAI_API_KEY, or --base_url (OPENAI_BASE_URL) for a server of your own"
            )
        if base_url and not _is_url(base_url):
            raise UserError("--base_url is not a URL: it looks like http://127.0.0.1:8000/v1")
        self.model_name, self.decoding, self.api, self._key = model_name, dataclasses.replace(decoding), api, key
        parts = urllib.parse.urlsplit(base_url or "https://api.openai.com/v1")
        # aiohttp refuses an address with user:password@ beside an Authorization header, which openai always sets.
        login, _, netloc = parts.netloc.rpartition("@")
        if login and key:
            raise UserError(
                "--base_url has user:password@ and OPENAI_API_KEY is set, of which a request carries one: leave one out"
            )
        basic = base64.b64encode(urllib.parse.unquote(login).encode()).decode()
        parts = parts._replace(netloc=netloc)
        self._where = parts._replace(query="", fragment="").geturl()  # without user:password@ and ?key=…
        self._empty_retries, self._refused = min(max_retries, empty_retries), set()
        self._fitting: dict[int, int] = {}  # characters of a prompt → tokens of a reply, where max_tokens were too many
        # A server that drips a byte now and then never times out: its limit is that of all tries together.
        self._patience = (max_retries + 1) * request_timeout + max_retries * 120
        limits = httpx2.Limits(max_connections=max_concurrency, max_keepalive_connections=max_concurrency)
        self._client = openai.AsyncOpenAI(
            base_url=parts.geturl(),
            default_headers={"Authorization": f"Basic {basic}"} if login else None,
            api_key=key or "none",  # a local server asks for no key, but the client refuses to start without one
            timeout=request_timeout,
            max_retries=max_retries,
            # The default transport looks at all its connections for each request: with 64 of them a third of the time.
            http_client=openai.DefaultAioHttpClient(limits=limits),
        )

    async def ask(self, prompt: str, seed: int | None = None) -> Completion:
        """One reply, or what went wrong after all retries; never an empty text.

        Its tokens are those of all tries that were answered. Each try for a reply without a text has a seed of its own:
        with the same one a server could only say the same.

        Raises:
            UserError: what no retry can mend: wrong key, no permission, no credit, unknown model, or no server at that
                address.
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
        """A reply of at most ``limit`` tokens, and whether it has no text but another try may bring one."""
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
        # The server's own words are left out of the next four: they may repeat a part of the key.
        except openai.AuthenticationError:
            raise UserError(f"{where} refused the key (401): check OPENAI_API_KEY") from None
        except openai.PermissionDeniedError:
            raise UserError(f"{where} does not let this key use {model!r} (403)") from None
        except openai.NotFoundError:
            raise UserError(
                f"{where} knows no model {model!r}, or has no {self.api} endpoint (404): "
                "check --model_name and --base_url"
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
            # Why a request is refused (a setting that the model does not know, …) only the server can say.
            said = str(e.body["message"] if isinstance(e.body, dict) and "message" in e.body else e.message)
            if self._key:
                said = said.replace(self._key, "…")
            if self._adapt(settings, e.code, e.param):
                return await self._ask_once(prompt, seed, limit)
            tokens = settings.get("max_tokens") or settings.get("max_completion_tokens", 0)
            if "context" in f"{e.code} {said}".lower() and tokens > self.MIN_TOKENS:
                return await self._ask_once(prompt, seed, tokens // 2)
            return Completion(None, error=f"HTTP {e.status_code}: {' '.join(said.split())[:200]}"), False
        except (openai.OpenAIError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as e:
            return Completion(None, error=f"unreadable reply ({type(e).__name__})"), True

    def _longest(self, characters: int) -> int:
        """The most tokens to ask for behind a prompt of so many characters: a long one limits no shorter one."""
        fitting = (tokens for length, tokens in self._fitting.items() if length <= characters)
        return min(fitting, default=self.decoding.max_tokens)

    def _settings(self, characters: int, seed: int | None, limit: int | None) -> dict:
        settings = dataclasses.asdict(self.decoding) | {"seed": seed}
        settings["max_tokens"] = limit or self._longest(characters)
        if "max_tokens" in self._refused:  # what models that think before they answer call it
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
        """Closes the connections, which belong to the event loop that opened them."""
        await self._client.close()

    async def _send(self, prompt: str, settings: dict) -> tuple[Completion, bool]:
        # The client's bare post() leaves out its checks of what is sent and its models of what comes: half of its time.
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
        # A model that will not answer may say so in a field of its own: that is its reply.
        text = message.get("content") or message.get("refusal") if self.api == "chat" else choice.get("text")
        if text is not None and not isinstance(text, str):
            raise TypeError("a text that is none")
        finish_reason, usage = choice.get("finish_reason"), reply.get("usage") or {}
        # A refused or empty reply was paid for all the same.
        tokens = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
        if not all(isinstance(count, int) for count in tokens):  # a server that does not count: English has about
            tokens = (len(prompt) // 4, len(text or "") // 4)  # 4 characters a token
        model, left_out = reply.get("model"), sorted(self._refused - settings.keys() - {"max_tokens"})
        who = {"model": model if isinstance(model, str) else None, "left_out": left_out or None}
        longest = settings.get("max_tokens") or settings.get("max_completion_tokens")
        who["max_tokens"] = longest if longest and longest < self.decoding.max_tokens else None
        if finish_reason == "content_filter":
            return Completion(None, finish_reason, *tokens, error="content filter", **who), True
        if finish_reason in ("error", "abort"):  # by the server, in the middle
            return Completion(None, finish_reason, *tokens, f"cut off (finish_reason {finish_reason})", **who), True
        if not text or not text.strip():  # one that stopped for its length has thought for all of it, and would again
            error = f"empty reply (finish_reason {finish_reason})"
            return Completion(None, finish_reason, *tokens, error, **who), finish_reason != "length"
        text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair could not be written to a file
        return Completion(text, finish_reason, *tokens, **who), False


def _is_refused(e: BaseException | None) -> bool:
    """Whether nobody listens at the address; the client wraps that several times."""
    while e is not None and not isinstance(e, ConnectionRefusedError):
        e = e.__cause__ or e.__context__
    return e is not None


def _is_url(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
        parts.port  # noqa: B018  raises ValueError when it is no port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and text.isprintable() and " " not in text
