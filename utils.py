"""What the scripts share: prompt templates, JSON in and out, completions from a teacher.

Light on purpose: importing this loads neither torch nor an API client.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import logging
import os
import random
import tempfile
import urllib.parse
from contextlib import contextmanager
from pathlib import Path

from alpaca import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Prompt templates. Models in the wild were trained on these bytes: they do not change.

PROMPT_DICT = {
    "prompt_input": (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    ),
    "prompt_no_input": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    ),
}


def format_prompt(instruction: str, input: str = "") -> str:
    """The one place where a prompt is written: training, chat, judge and the recover smoke test all call it.

    The template without an input is taken when ``input`` is empty, as the original does.
    """
    if input:
        return PROMPT_DICT["prompt_input"].format_map({"instruction": instruction, "input": input})
    return PROMPT_DICT["prompt_no_input"].format_map({"instruction": instruction})


# ---------------------------------------------------------------------------------------------------------------------
# JSON in and out.


def read_text(path: str | os.PathLike) -> str:
    """A UTF-8 file's text, without a byte order mark; UserError when it is missing, unreadable or not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}): convert it to UTF-8") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None


def jload(path: str | os.PathLike) -> list:
    """Reads a JSON list, or JSON Lines when the name ends in ``.jsonl``.

    Raises:
        UserError: missing or unreadable file, or malformed JSON (with the line).
    """
    path, text = Path(path), read_text(path)
    if path.suffix == ".jsonl":
        return [_parse_json(line, path, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    data = _parse_json(text, path)
    if not isinstance(data, list):
        raise UserError(f"{path} holds a JSON {type(data).__name__}, not a list of records: wrap the records in [ ]")
    return data


def _parse_json(text: str, path: Path, line: int | None = None):
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        hint = "" if line or "Extra data" not in e.msg else " (one object a line? name it .jsonl)"
        raise UserError(f"{path}, line {line or e.lineno}: malformed JSON, {e.msg} at column {e.colno}{hint}") from None
    except (RecursionError, ValueError) as e:  # the second: a number of more than 4,300 digits
        why = "nested too deeply" if isinstance(e, RecursionError) else "a number with too many digits"
        raise UserError(f"{path}{f', line {line}' if line else ''}: malformed JSON, {why}") from None


def jdump(obj, path: str | os.PathLike, indent: int = 4) -> None:
    """Writes JSON through a temporary file and a rename, so that readers see the old file or the new one, whole."""
    with replace_file(path) as file:
        file.write(json_text(obj, indent) + "\n")


def json_text(obj, indent: int | None = None) -> str:
    """JSON that UTF-8 can hold: half of a surrogate pair, which JSON can spell and UTF-8 cannot, makes it all ASCII."""
    text = json.dumps(obj, indent=indent, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(obj, indent=indent)
    return text


@contextmanager
def replace_file(path: str | os.PathLike, mode: str = "w"):
    """Opens a temporary file beside ``path``; on success it is fsynced and renamed to ``path``, else removed.

    ``mode`` is "w" for UTF-8 text or "wb" for bytes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(fd, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes 0600 files; others may read what we publish
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_records(path: str | os.PathLike) -> list[dict]:
    """Reads Alpaca-format records: ``{"instruction": str, "input": str, "output": str}`` (other fields are kept).

    Raises:
        UserError: see jload; also an empty data set, or a record without the three text fields (with its number).
    """
    records = jload(path)
    if not records:
        raise UserError(f"{path} holds no records: give a file with at least one")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UserError(f"{path}, record {number}: a {type(record).__name__} where an object was expected")
        for field in ("instruction", "input", "output"):
            if not isinstance(record.get(field), str):
                has = "no" if field not in record else "a non-text"
                raise UserError(
                    f'{path}, record {number}: {has} "{field}" field; each record needs the texts '
                    '"instruction", "input" (may be "") and "output"'
                )
    return records


def load_seed_tasks(path: str) -> list[dict]:
    """Reads seed tasks, one JSON object a line: ``{"instruction": str, "instances": [{"input": str, "output": str}]}``.

    Raises:
        UserError: see jload; also no task at all, or one without these texts (with its number).
    """
    tasks = jload(path)
    if not tasks:
        raise UserError(f"{path} holds no seed tasks: give a file with at least one")
    for number, task in enumerate(tasks, 1):
        try:
            instance = task["instances"][0]
            texts = (task["instruction"], instance["input"], instance["output"])
        except (KeyError, IndexError, TypeError):
            texts = (None,)
        if not all(isinstance(text, str) for text in texts):
            raise UserError(
                f'{path}, task {number}: needs an "instruction" and "instances": [{{"input": …, "output": …}}]'
            )
    return tasks


# ---------------------------------------------------------------------------------------------------------------------
# Completions from any OpenAI-compatible teacher.


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
        max_retries: for 408, 409, 429 (Retry-After honoured up to two minutes), 5xx, timeouts and resets, with
            exponential backoff and jitter between 0.5 and 8 s.
        empty_retries: for a reply without a text. Each is paid for.
        max_concurrency: requests that will be in flight at once, so that as many connections are kept.

    Raises:
        UserError: neither a key nor a base URL, or both a key and user:password@ in the URL.
    """

    MIN_TOKENS = 64  # below this a shorter reply is no cure for a context that is too long

    def __init__(
        self,
        model_name: str,
        decoding: OpenAIDecodingArguments,
        api: str = "chat",
        base_url: str | None = None,
        request_timeout: float = 600.0,
        max_retries: int = 5,
        empty_retries: int = 2,
        max_concurrency: int = 32,
    ):
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
        self._patience = (max_retries + 1) * request_timeout + 120
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
        except asyncio.TimeoutError:
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
        text = (choice.get("message") or {}).get("content") if self.api == "chat" else choice.get("text")
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
