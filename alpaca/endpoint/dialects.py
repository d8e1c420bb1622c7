"""What OpenAI-compatible servers refuse, and what their replies mean: one table for each.

A server with its own dialect needs a word in a table here, and a line in tests/endpoint/test_dialects.py.
"""

from __future__ import annotations

import dataclasses
import html
import json
import re
import sys
from collections.abc import Iterator
from http.client import responses

from tqdm import tqdm

from alpaca.common.text import printable, shorten, without_thoughts

# Spellings of a finish reason, in lower case. Any other on a text means that the text is whole.
FINISH_REASONS = {
    "length": "length max_tokens max_output_tokens max_completion_tokens model_length max_length token_limit "
    "model_context_window_exceeded".split(),
    "content_filter": "content_filter content_filtered guardrail_intervened error_toxic safety recitation blocklist "
    "prohibited_content spii refusal sensitive".split(),
    "error": "error abort aborted cancelled canceled insufficient_system_resource network_error".split(),
}
# Settings that may be left out if a server refuses them: of two that it does not take together, the first here.
OPTIONAL = ("response_format", "seed", "top_p", "stop", "temperature")
LENGTHS = ("max_tokens", "max_completion_tokens")  # the second is the name that reasoning models use
# Names for it in servers behind a proxy: TGI, Vertex, Bedrock.
OTHER_LENGTHS = re.compile(r"max_new_tokens|max_?output_?tokens|maximum tokens|generation length", re.I)
DEFAULTS = {"temperature": 1.0, "top_p": 1.0}  # of the API; a setting at its default is not sent
MIN_TOKENS = 64  # a context without room for these is too short for the prompt
SAID = ("message", "msg", "error", "errors", "detail", "title", "raw")  # the keys of messages, in a body of any shape
# End-of-turn tokens that a server left in the text.
END = re.compile(r"(\s*(</s>|<end_of_turn>|<\|(im_end|eot_id|end|endoftext|end_of_text)\|>))+\s*$")
# Prompt and reply are too long together, for the context or, at Groq, for a minute.
CONTEXT = re.compile(
    r"context.{0,3}(length|window|size|limit)|sequence length|`inputs` tokens|request too large for", re.I
)
NO_CREDIT = re.compile(r"insufficient[_ ](quota|balance|credits?|funds)|credit balance is too low", re.I)
NO_MODEL = re.compile(r"model\b.{0,200}\b(not exist|n.t exist|not found|not a valid|unknown|invalid|no such)|"
                      r"(unknown|invalid|no such|not a valid) model|model_not_found", re.I)  # fmt: skip


@dataclasses.dataclass
class Fault:
    """What an error body says: ``names`` are the settings that it points at, ``status`` the status that it states."""

    words: str = ""
    code: str = ""
    names: list[str] = dataclasses.field(default_factory=list)
    status: int | None = None


def read_fault(data: bytes) -> Fault:
    """Return what an error body says, whatever its shape: an object, a list, text, a web page."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        text = data.decode("utf-8", "replace")
        if "<html" in text[:500].lower() or text.lstrip()[:9].lower() == "<!doctype":
            text = "a web page: " + html.unescape(re.sub(r"(?s)<(script|style)\b.*?</\1>|<[^>]*>", " ", text[:20_000]))
        return Fault(text)
    fault, words = Fault(), []
    for key, value in _leaves(body):
        if key in SAID and isinstance(value, str) and value not in words:
            words.append(value)
        elif key in ("param", "loc") and isinstance(value, str):
            fault.names.append(value)
        elif key in ("code", "status") and isinstance(value, int | str):
            number = str(value)
            if re.fullmatch("[45][0-9][0-9]", number):
                fault.status = fault.status or int(number)
            elif isinstance(value, str):
                fault.code = fault.code or value
    fault.words = "; ".join(words) or (body if isinstance(body, str) else "")
    if fault.status is None and "rate_limit" in fault.code:
        fault.status = 429
    return fault


def _leaves(node, key: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    """Yield (key, value) for everything but objects and lists; members of a list have the list's key."""
    if depth > 20:
        return
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(value, name.lower(), depth + 1)
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, key, depth + 1)
    else:
        yield key, node


def masked(words: str, *secrets: str) -> str:
    """Return a server's words in one line for a terminal, without the words that show a part of a secret.

    Such a word has five characters of a secret, all of it, or the dots or stars that hide the middle of a key.
    """
    parts = {secret[at : at + 5] for secret in secrets for at in range(max(1, len(secret) - 4))} - {""}
    shows = re.compile("|".join([*map(re.escape, parts), r"\*{3}|\w(\*\*|\.{3}|…|x{4,})\w"]))
    words = re.sub(r"\S+", lambda word: "…" if shows.search(word[0]) else word[0], words)
    return printable(shorten(words, 200)).encode("utf-8", "replace").decode()


def named(status: int, words: str) -> str:
    """Return "HTTP 400: the server's words", or HTTP's own name of the status."""
    if status == 200:
        return f"error with HTTP 200: {words or 'no choices'}"
    return f"HTTP {status}" + (f": {text}" if (text := words or responses.get(status)) else "")


class Settings:
    """The settings of a model's requests, without those that its server refuses: learned once per run.

    Args:
        model_name: for the warnings.
        decoding: the wanted settings. If prompt and reply do not fit the context, ``max_tokens`` is halved; what fits
            then is the limit for all prompts of that length or longer.
        extra: more fields, sent unchanged.
    """

    def __init__(self, model_name: str, decoding, extra: dict):
        self.model_name, self.extra, self.max_tokens = model_name, extra, decoding.max_tokens
        asked = dataclasses.asdict(decoding)
        self.asked = {key: value for key, value in asked.items() if value is not None and value != DEFAULTS.get(key)}
        # JSON-serializable: setting → what was done with it; [characters of a prompt, tokens of a reply that fit].
        self.learned: dict = {"changed": {}, "fitting": []}
        self._trying: dict[str, int] = {}  # prompt → tokens of a reply that may fit
        self._doubtful: dict[str, list[str]] = {}  # prompt → settings left out because of its refusal

    @property
    def changed(self) -> dict[str, str]:
        """What was done with each setting that the server refuses."""
        return self.learned["changed"]

    def of(self, prompt: str, seed: int | None) -> dict:
        """Return the settings of one request."""
        settings = self.asked | ({} if seed is None else {"seed": seed})
        name = LENGTHS["max_tokens" in self.changed]
        settings[name] = self._trying.get(prompt) or self._longest(len(prompt))
        return {key: value for key, value in settings.items() if key not in self.changed} | self.extra

    def learn(self, prompt: str, body: dict, fault: Fault) -> bool:
        """Learn from a refusal of ``body`` what this server does not take; return whether there was anything to learn.

        Another request may have taught the same meanwhile.
        """
        said = f"{fault.code} {fault.words}"
        tokens = next((body[name] for name in LENGTHS if name in body), 0)
        found = [name for name in (*OPTIONAL, *LENGTHS) if name in fault.names]
        found += [name for name in (*OPTIONAL, *LENGTHS) if re.search(rf"\b{name}\b", said)]
        found += LENGTHS if OTHER_LENGTHS.search(said) else ()
        name = next((name for name in found if name in body and name not in self.extra), None)
        if CONTEXT.search(said) or name not in OPTIONAL and "context" in said.lower():
            self._trying[prompt] = max(tokens // 2, MIN_TOKENS)
            return tokens > MIN_TOKENS
        if name in OPTIONAL:
            self._doubtful.setdefault(prompt, []).append(name)
            self._change(name, f"{name} left out")
        elif name == "max_tokens" and ("max_completion_tokens" in said or "unsupported" in said.lower()):
            self._change("max_tokens", "max_tokens sent as max_completion_tokens")
        elif name and tokens > MIN_TOKENS:
            if tokens <= self._longest(0):
                self.learned["fitting"].append([0, tokens // 2])
                self._change("length", f"max_tokens halved to {tokens // 2}")
        else:  # refused without them too: the word may be part of a quoted prompt
            for doubtful in self._doubtful.pop(prompt, ()):
                self.changed.pop(doubtful, None)
            if name in LENGTHS:  # so few cannot be too many
                self.learned["fitting"] = [pair for pair in self.learned["fitting"] if pair[0]]
                self.changed.pop("length", None)
            return False
        return True

    def succeeded(self, prompt: str) -> None:
        """Keep a length that fitted for all prompts as long. Not earlier: a prompt may be too long by itself."""
        self._doubtful.pop(prompt, None)
        limit = self._trying.pop(prompt, None)
        if limit and limit < self._longest(len(prompt)):
            self.learned["fitting"].append([len(prompt), limit])
            prompts = f"prompts of {len(prompt):,} characters or more"
            self._change("context", f"max_tokens lowered to {limit} after {prompts}")

    def _longest(self, characters: int) -> int:
        """Return the most tokens to request after a prompt of so many characters; limits come from shorter prompts."""
        return min((n for length, n in self.learned["fitting"] if length <= characters), default=self.max_tokens)

    def _change(self, key: str, what: str) -> None:
        if self.changed.get(key) != what:
            # tqdm.write prints above a progress bar.
            tqdm.write(f"warning: {printable(self.model_name)} refused a setting: {what}", file=sys.stderr)
        self.changed[key] = what


@dataclasses.dataclass
class Reply:
    """A reply's choice, normalized. ``text`` may be ""; ``thoughts`` are what a server returns apart from the text."""

    text: str
    finish_reason: str | None  # "stop", "length", "content_filter", "error", or None: not given
    usage: tuple[int, int] | None
    thoughts: str
    model: str | None  # that answered, according to its server


def read_reply(reply: dict) -> Reply:
    """Read a chat or text completion of any dialect; thoughts before the answer are not part of its text."""
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    # Some models put refusals in a separate field; treat it as the reply.
    text = _joined(message.get("content")) or _joined(message.get("refusal")) or _joined(choice.get("text"))
    thoughts = _joined(message.get("reasoning_content")) or _joined(message.get("reasoning"))
    without = without_thoughts(text[:-200] + END.sub("", text[-200:]))  # the end alone: the search is quadratic
    if without is None:
        without, thoughts = "", thoughts or text
    reason, usage = finish_reason(choice.get("finish_reason")), _usage(reply.get("usage"))
    return Reply(without, reason, usage, thoughts, _joined(reply.get("model")) or None)


def finish_reason(spelled) -> str | None:
    """Return "stop", "length", "content_filter" or "error" for any spelling; None if missing."""
    if not isinstance(spelled, str) or not spelled.strip():
        return None
    spelled = spelled.strip().lower().removeprefix("finish_reason_")
    return next((ours for ours, theirs in FINISH_REASONS.items() if spelled in theirs), "stop")


def _joined(content) -> str:
    """Return a text, or the texts among its parts. Half of a surrogate pair, which no file can hold, becomes "?"."""
    parts = content if isinstance(content, list) else [content]
    parts = [part if isinstance(part, dict) else {"text": part} for part in parts]
    texts = [part.get("text") for part in parts if part.get("type", "text") in ("text", "output_text")]
    return "".join(text for text in texts if isinstance(text, str)).encode("utf-8", "replace").decode()


def _usage(usage) -> tuple[int, int] | None:
    """Return the tokens of prompt and reply; None if a server does not count them, or counts 0."""
    names = ("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"), ("total_tokens",) * 2
    for one in usage if isinstance(usage, list) else [usage]:
        if isinstance(one, dict):
            found = (one.get(a, one.get(b)) for a, b in names)
            prompt, reply, total = (n if isinstance(n, int | float) and 0 <= n < 1e9 else None for n in found)
            if None not in (prompt, reply) and prompt + reply:
                # xAI and Gemini count thoughts in the total only.
                return int(prompt), int(max(reply, (total or 0) - prompt))
    return None
