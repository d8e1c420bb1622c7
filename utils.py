"""What the scripts share: prompt templates, JSON in and out, a command line without traps, completions from a teacher.

Light on purpose: importing this loads neither torch nor an API client.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import inspect
import json
import math
import os
import sys
import tempfile
import threading
import typing
import urllib.parse
from collections.abc import Callable
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


def jload(path: str | os.PathLike) -> list:
    """Reads a JSON list, or JSON Lines when the name ends in ``.jsonl``.

    Raises:
        UserError: missing or unreadable file, or malformed JSON (with the line).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}): convert it to UTF-8") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None
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


def jdump(obj, path: str | os.PathLike, indent: int = 4) -> None:
    """Writes JSON through a temporary file and a rename, so that readers see the old file or the new one, whole."""
    with replace_file(path) as file:
        json.dump(obj, file, indent=indent, ensure_ascii=False)
        file.write("\n")


@contextmanager
def replace_file(path: str | os.PathLike):
    """Opens a temporary text file beside ``path``; on success it is fsynced and renamed to ``path``, else removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
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


# ---------------------------------------------------------------------------------------------------------------------
# Command line.


def run_cli(commands: Callable | dict[str, Callable]) -> None:
    """``fire.Fire`` without its traps: flags are checked and typed before anything runs, errors are one line.

    Fire alone calls the function first and complains about an unknown flag afterwards, and it turns
    ``--instruction "1, 2"`` into a tuple. Here a parameter annotated str stays text.
    """
    import fire

    try:
        argv = _typed_argv(commands, sys.argv[1:])
        fire.Fire(commands, command=argv, name=Path(sys.argv[0]).name)
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader (head, less) went away
        sys.stdout = None
        sys.exit(141)
    except OSError as e:
        sys.exit(f"error: {os_error_message(e)}")


def os_error_message(e: OSError) -> str:
    """One line for a failed file operation: which file, why, and for a full disk the cure."""
    cure = ": free some, or choose another folder" if e.errno == errno.ENOSPC else ""
    return f"{e.filename or 'writing'}: {e.strerror or e}{cure}"


def unknown_flag(name: str, known: typing.Iterable[str]) -> UserError:
    """The error for a flag that is not there, with the nearest one that is."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return UserError(f"unknown flag --{name}" + (f": did you mean --{near[0]}?" if near else "; --help lists them"))


def _typed_argv(commands, argv: list[str]) -> list[str]:
    """Checks the flags in argv against the command's signature and quotes text, so that Fire leaves it alone."""
    head, rest = [], list(argv)
    if isinstance(commands, dict):
        if not rest or rest[0] in ("-h", "--help"):
            return rest
        if rest[0] not in commands:
            raise UserError(f"no task named {rest[0]!r}: choose from {', '.join(commands)}")
        head, function = [rest[0]], commands[rest.pop(0)]
    else:
        function = commands
    parameters = inspect.signature(function, eval_str=True).parameters
    out, given = [], set()
    while rest:
        token = rest.pop(0)
        if token in ("-h", "--help"):
            return [*head, "--help"]
        if not token.startswith("--"):
            raise UserError(f"unexpected argument {token!r}: values follow a flag, as in --{next(iter(parameters))} …")
        name, has_value, value = token[2:].partition("=")
        name = name.replace("-", "_")
        if name.startswith("no") and name[2:] in parameters and not has_value:
            name, has_value, value = name[2:], "=", "False"
        if name not in parameters:
            raise unknown_flag(name, parameters)
        annotation = parameters[name].annotation
        kinds = typing.get_args(annotation) or (annotation,)
        if not has_value:
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif bool in kinds:
                value = "True"
            else:
                raise UserError(f"--{name} needs a value")
        given.add(name)
        out.append(f"--{name}={_typed(name, value, kinds)!r}")
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in given:
            raise UserError(f"--{name} is missing: it has no default (--help explains it)")
    return head + out


def _typed(name: str, text: str, kinds: tuple):
    if type(None) in kinds and text == "None":
        return None
    if bool in kinds:
        if text.lower() in ("true", "1", "yes"):
            return True
        if text.lower() in ("false", "0", "no"):
            return False
        raise UserError(f"--{name} takes True or False, not {text!r}")
    for kind, what in ((int, "a whole number"), (float, "a number")):
        if kind in kinds:
            try:
                value = kind(text)
                if math.isfinite(value):  # Fire would hand on inf and nan as text
                    return value
            except (ValueError, OverflowError):
                pass
            raise UserError(f"--{name} takes {what}, not {text!r}")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Completions from any OpenAI-compatible teacher.


@dataclasses.dataclass
class OpenAIDecodingArguments:
    """How the teacher samples. ``stop`` strings must not occur inside a good answer."""

    max_tokens: int = 3072
    temperature: float = 1.0
    top_p: float = 1.0
    stop: list[str] | None = None
    seed: int | None = None  # the i-th prompt of a call is sent with seed + i


@dataclasses.dataclass
class Completion:
    """One reply. ``text`` is None when the request failed for good; ``error`` then says why."""

    text: str | None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


def openai_client(base_url: str | None = None, request_timeout: float = 600.0, max_retries: int = 5):
    """A client for ``base_url`` (default: OPENAI_BASE_URL, then api.openai.com) with the key in OPENAI_API_KEY.

    The client retries 408, 409, 429 (Retry-After honoured), 5xx, timeouts and resets, with exponential backoff and
    jitter, ``max_retries`` times at most. ``request_timeout`` is in seconds.

    Raises:
        UserError: neither a key nor a base URL.
    """
    import openai

    base_url = base_url or os.environ.get("OPENAI_BASE_URL") or None
    key = os.environ.get("OPENAI_API_KEY")
    if not key and not base_url:
        raise UserError("no teacher: set OPENAI_API_KEY, or --base_url (OPENAI_BASE_URL) for a server of your own")
    if base_url and not _is_url(base_url):
        raise UserError(f"--base_url {base_url!r} is not a URL: it looks like http://127.0.0.1:8000/v1")
    # A local server asks for no key, but the client refuses to start without one.
    return openai.OpenAI(base_url=base_url, api_key=key or "none", timeout=request_timeout, max_retries=max_retries)


def _is_url(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
        parts.port  # noqa: B018  raises ValueError when it is no port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and text.isprintable() and " " not in text


def openai_completion(
    client, prompts: list[str], model_name: str, decoding: OpenAIDecodingArguments, api: str = "chat"
) -> list[Completion]:
    """Sends every prompt at once and returns the replies in the order of the prompts.

    Args:
        client: from openai_client.
        prompts: one request each.
        api: "chat" sends a prompt as one user message; "completions" lets a base model continue it.

    Raises:
        UserError: what no retry can mend: wrong key, no permission, unknown model, or no server at that address.
    """
    replies: list = [None] * len(prompts)

    def send(i: int) -> None:
        seeded = decoding if decoding.seed is None else dataclasses.replace(decoding, seed=decoding.seed + i)
        try:
            replies[i] = _complete(client, prompts[i], model_name, seeded, api)
        except BaseException as e:
            replies[i] = e

    # Daemons, unlike the threads of a pool: Ctrl-C does not wait for their replies, which may take minutes.
    threads = [threading.Thread(target=send, args=(i,), daemon=True) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for reply in replies:
        if isinstance(reply, BaseException):
            raise reply
    return replies


def _complete(client, prompt: str, model_name: str, decoding: OpenAIDecodingArguments, api: str) -> Completion:
    import openai

    settings = {name: value for name, value in dataclasses.asdict(decoding).items() if value is not None}
    try:
        if api == "chat":
            messages = [{"role": "user", "content": prompt}]
            reply = client.chat.completions.create(model=model_name, messages=messages, **settings)
        else:
            reply = client.completions.create(model=model_name, prompt=prompt, **settings)
        choice = reply.choices[0]
        text = choice.message.content if api == "chat" else choice.text
        if not text:
            return Completion(None, error=f"empty reply (finish_reason {choice.finish_reason})")
        text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair could not be written to a file
        usage = reply.usage
        return Completion(
            text, choice.finish_reason, getattr(usage, "prompt_tokens", 0), getattr(usage, "completion_tokens", 0)
        )
    # The server's own words are left out of the next three: they may repeat a part of the key.
    except openai.AuthenticationError:
        raise UserError(f"{client.base_url} refused the key (401): check OPENAI_API_KEY") from None
    except openai.PermissionDeniedError:
        raise UserError(f"{client.base_url} does not let this key use {model_name!r} (403)") from None
    except openai.NotFoundError:
        raise UserError(
            f"{client.base_url} knows no model {model_name!r}, or has no {api} endpoint (404): "
            "check --model_name, --base_url and --api"
        ) from None
    except openai.APITimeoutError:
        return Completion(None, error="timeout")
    except openai.APIConnectionError as e:
        cause = e.__cause__ or e
        if "refused" in str(cause).lower():
            raise UserError(f"nothing answers at {client.base_url}: is the teacher running?") from None
        return Completion(None, error=f"connection: {type(cause).__name__}")
    except openai.APIStatusError as e:
        # Why a request is refused (a setting the model does not know, a prompt too long) only the server can say.
        if e.status_code not in (400, 422):
            return Completion(None, error=f"HTTP {e.status_code}")
        said = str(e.body["message"] if isinstance(e.body, dict) and "message" in e.body else e.message)
        if client.api_key != "none":
            said = said.replace(client.api_key, "…")
        return Completion(None, error=f"HTTP {e.status_code}: {' '.join(said.split())[:200]}")
    except (openai.OpenAIError, ValueError, TypeError, IndexError, AttributeError) as e:
        return Completion(None, error=f"unreadable reply ({type(e).__name__})")
