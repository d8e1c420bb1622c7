"""Short, safe text for messages: one line of an error, no control characters, nothing that UTF-8 cannot encode."""

from __future__ import annotations

import re

from alpaca import UserError

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a terminal obeys; tab and line feed are left


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or its class's name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shorten(text: str, most: int = 60) -> str:
    """Return text in one line of at most ``most`` characters; one that was cut ends in "…"."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def counted(number: int, noun: str) -> str:
    """Return "1 item" or "2,000 items"."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def printable(text: str) -> str:
    """Return text with its control characters spelled out (ESC as \\x1b), so that a terminal does not obey them."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def check_utf8(text: str, what: str) -> None:
    """Raise UserError if UTF-8 cannot encode the text. JSON can spell half of a surrogate pair, as in "\\ud83d".

    Args:
        text: to check.
        what: the text's name, which begins the message: "training record 3".
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        half = ascii(e.object[e.start])
        raise UserError(f"{what} contains {half}, half of a surrogate pair, which is not text: remove it") from None
