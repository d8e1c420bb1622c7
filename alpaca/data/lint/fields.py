"""The fields of a record as lint's rules see them: the input, whether a text is code, evidence for what was found."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

# How a teacher writes "there is no input" into the field that should be empty.
NO_INPUT = re.compile(
    r"(?:\W|&[lg]t;)*(no[ _-]?inputs?( (is |was )?(required|needed|necessary|provided|given|available))?|none|null|nil|"
    r"nan|n/a|n\.a\.?|not applicable|(none|not) (required|needed|provided))(?:\W|&[lg]t;)*",
    re.IGNORECASE,
)
CODE = re.compile(
    r"```|^[ \t]*(def|class|import|from|#include|public|private|function|var|let|const|for|while|if|return|print|"
    r"SELECT|INSERT|UPDATE|CREATE|DELETE|ALTER|echo)\b.*[\w\])'\"][;:{)][ \t]*$|"
    r"^[ \t]*(SELECT|INSERT INTO|CREATE TABLE)\b|"
    r"^[ \t]*(import|from) [\w.]+( import .*)?$|</\w+>|<(html|div|p|a|br|img|head|body|\?php|!DOCTYPE)\b|[;{][ \t]*$|"
    r"\w\([^()]*\)\s*(;|\{|=>)|=>|[!=]==?\s|:=|\+=|\bdef \w+\(|\bprint\(|console\.log|"
    r"\\(begin|frac|text|sqrt|times)\b",
    re.MULTILINE,
)
CODE_TASK = re.compile(
    r"\b(code|coding|program(s|ming)?|script|function|algorithm|python|java|javascript|typescript|c\+\+|c#|php|ruby|"
    r"rust|sql|html|css|xml|json|yaml|csv|regex|regular expression|api|bash|shell|command[ -]line|latex|markdown|class|"
    r"method|query|pseudo-?code|debug|compile|string literal|escape|encod\w+|unicode|url)\b",
    re.IGNORECASE,
)


@lru_cache(maxsize=8)  # several rules check the same output one after another
def is_code(text: str) -> bool:
    return bool(CODE.search(text))


def input_of(record: dict) -> str:
    """Return the input, or "" if it only says that there is no input."""
    text = record["input"].strip()
    return "" if NO_INPUT.fullmatch(text) else text


MINUS = r"(?<=[\d)\]] ?)-(?= ?[\d(\[])|(?<=\b\p{L} ?)-(?= ?\p{L}\b)|(?<![\p{L}\p{N}])-(?=[\d(.]|\p{L}\b)"
SYMBOL = rf"(?V1)[[\p{{Sm}}\p{{Sc}}\p{{So}}^&#%*/\\@()\[\]{{}}]--[°©®]]|!(?==)|(?<=\d)!|{MINUS}"


def symbols(text: str) -> str:
    """Return what two texts with the same words may differ in and mean different things: the "++" of C++, a minus.

    Sentence punctuation, quotation marks, hyphens and dashes are left out.
    """
    import regex  # 30 ms, for what only near-duplicates need: \p{…}

    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate({ord("−"): "-", ord("–"): "-"})
    return "".join(regex.findall(SYMBOL, text))


CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u2028\u2029\ufeff\u00ad]")


def around(text: str, start: int, end: int, margin: int = 30) -> str:
    """Return what was found, with its surroundings, in one line: control characters spelled out, "…" where cut."""
    piece = CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text[max(0, start - margin) : end + margin])
    piece = re.sub(r"\s+", " ", piece)
    return ("…" if start > margin else "") + piece.strip() + ("…" if end + margin < len(text) else "")


def found(pattern: re.Pattern, record: dict, fields=("instruction", "input", "output")) -> str | None:
    """Return evidence from the first of the fields in which the pattern is found, or None."""
    for field in fields:
        if match := pattern.search(record[field]):
            return f"{field}: {around(record[field], *match.span())}"
    return None
