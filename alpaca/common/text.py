"""Short, safe text for messages (one line, no control characters, valid UTF-8), and replies without their thoughts."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from alpaca import UserError

# Characters that a terminal obeys, including bidirectional overrides, but not tab and line feed.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

# Where thoughts begin or end. No part can match the same characters in two ways, so a search takes linear time.
THOUGHTS = re.compile(
    # <think> and </think>, [THINK] and [/THINK], …, but not in a sentence that begins "<think> and </think> are".
    r"(?P<first>^[ \t]*)?(?:<|\[(?=/?think\]))(?P<slash>/)?(?P<tag>think\]|(?:think|thinking|thought|reasoning)>)"
    r"(?(slash)(?P<last>[ \t\r]*(?=$|<\|(?:end|return)\|>))?|(?! (?:and|or) ))"
    # The harmony format of gpt-oss, and what remains of it where special tokens are left out.
    r"|(?P<channel>(?P<ended><\|end\|>)?(?:<\|start\|>assistant)?<\|channel\|>)"
    r"(?P<final>final\b[^<\n]*(?:<\|constrain\|>[^<\n]*)?<\|message\|>)?"
    r"|(?-i:(?P<answer>assistantfinal)|analysis(?P<glued>(?=[\"“']?[A-Z][\w'’]{0,20},? [\w\"“']))?)",
    re.IGNORECASE | re.MULTILINE,
)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or its class's name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shorten(text: str, most: int = 60) -> str:
    """Return text in one line of at most ``most`` characters; a cut text ends in "…"."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def utc_now() -> str:
    """Return the time in UTC, as in 2026-11-22T09:30:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def counted(number: int, noun: str) -> str:
    """Return "1 item" or "2,000 items", "1 reply" or "2 replies"."""
    return f"{number:,} " + (noun if number == 1 else re.sub("(?<=[^aeiou])y$", "ie", noun) + "s")


def in_brackets(notes: Iterable[tuple[int, str]]) -> str:
    """Return " (3 of this; 1 of that)" without counts of 0, or "" if none remain."""
    text = "; ".join(f"{count:,} {what}" for count, what in notes if count)
    return f" ({text})" if text else ""


def printable(text: str) -> str:
    """Return text with its control characters spelled out (ESC as \\x1b), so that a terminal does not obey them."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def plain_markdown(value):
    """Turn untrusted text into one line that Markdown shows literally. Markup and numbers stay."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return re.sub(r"[\\`*<>\[\]|]", r"\\\g<0>", " ".join(printable(value).split()))


def templates(*folders: Path, html: bool = False):
    """Return a jinja2 environment for folders of templates. Values are escaped, for HTML or as plain_markdown."""
    import jinja2

    way = {"autoescape": True} if html else {"finalize": plain_markdown, "lstrip_blocks": True}
    loader = jinja2.FileSystemLoader(folders)
    way |= {"loader": loader, "undefined": jinja2.StrictUndefined, "trim_blocks": True}
    return jinja2.Environment(keep_trailing_newline=not html, **way)


def public_name(path: str) -> str:
    """Return a model's name for publication: only the last part of a local folder, since a path is private."""
    local = os.path.exists(path) or path.startswith((".", "/", "~"))
    return Path(path).resolve().name if local else path


# What of a run may be on the hub, and there has the form OWNER/NAME.
ON_THE_HUB = ("started_from", "model_name_or_path", "hub_model_id", "path", "data_path", "eval_data_path")


def without_folders(value, key: str = ""):
    """Return a JSON value to publish: each path in it, at any depth, is reduced to its last part.

    A path names users, projects and machines. Models and data on the hub keep their names, which give credit.
    """
    if isinstance(value, dict):
        return {name: without_folders(entry, name) for name, entry in value.items()}
    if isinstance(value, list):
        return [without_folders(entry, key) for entry in value]
    if not isinstance(value, str) or not re.search(r"[/\\]", value):
        return value

    def last(path: str) -> str:
        owned = key in ON_THE_HUB and re.fullmatch(r"\w[\w.-]*/[\w.-]+(?<!\.gz)(?<!\.jsonl)(?<!\.json)(?<!\.csv)", path)
        return path if owned and not os.path.exists(path) else re.split(r"[/\\]", path.rstrip("/\\"))[-1]

    return ",".join(map(last, value.split(",")))


def published_receipt(receipt: dict) -> dict:
    """Return a training_receipt.json to publish, without the folders of paths; answers, which are texts, stay."""
    paths = {key: without_folders(receipt[key]) for key in ("model", "data", "arguments") if key in receipt}
    return receipt | paths | {"note": "of each path, only the last part is published"}


def check_utf8(text: str, what: str) -> None:
    """Raise UserError if UTF-8 cannot encode the text. JSON allows half of a surrogate pair, as in "\\ud83d".

    Args:
        text: to check.
        what: the text's name for the message: "training record 3".
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        half = ascii(e.object[e.start])
        raise UserError(f"{what} contains {half}, half of a surrogate pair: remove it") from None


def without_thoughts(text: str) -> str | None:
    """Return a model's reply without the thoughts before it; the same object if it has no thoughts.

    Thoughts are blocks at the beginning (<think>, <thinking>, <thought>, <reasoning>, [THINK], in any case), harmony's
    channels other than the final one, and what precedes a closing tag whose opening tag was in the prompt. Such a tag
    must begin or end a line, so that text about tags remains.

    Returns:
        The answer, "" if nothing follows the thoughts. None if the thoughts do not end (no closing tag or channel).
    """
    start, inside, opened, leading, harmony = 0, None, 0, True, False
    for mark in THOUGHTS.finditer(text):
        tag, channel = (mark["tag"] or "").lower(), mark["channel"]
        kind = tag or ("channel" if channel else "analysis")
        closes = mark["slash"] or mark["final"] or mark["answer"]
        leading = leading and not inside and not text[start : mark.start()].strip()
        at_edge = mark["first"] is not None or mark["last"] is not None or leading
        unopened = at_edge and not opened if tag else channel and (leading or mark["ended"])
        if closes and (kind == inside if inside else unopened):
            start, inside, opened, leading, harmony = mark.end(), None, 0, True, harmony or bool(channel)
        elif not inside:
            begins = tag or channel or mark["glued"] is not None
            if leading and not closes and (begins or text.find("assistantfinal", start) >= 0):
                inside = kind
            elif tag:
                opened = max(0, opened - 1) if closes else opened + 1
            leading = False
    answer = text[start:].lstrip() if start else text
    if harmony:
        answer = re.split(r"<\|(?:end|return)\|>", answer, maxsplit=1)[0]
    return None if inside else answer
