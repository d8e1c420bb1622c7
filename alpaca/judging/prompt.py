"""A judge's prompt for two answers, the verdict in its reply, and the row that records it.

Light: importing this does not load torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable

from alpaca import UserError
from alpaca.common.files import read_text
from alpaca.common.text import without_thoughts
from alpaca.data.instruction_sets import Item
from alpaca.endpoint.client import Completion, Teacher

Shown = list[tuple[str, str | None]]  # generator and answer, the first and the second; None: no answer

PLACEHOLDERS = ("{task}", "{answer_a}", "{answer_b}", "{fence}")
CUT_OFF = "cut off before a verdict"
ASKS = 3  # requests for a verdict, before a reply without one is a failure
REMINDER = (
    "\n\nA reply that does not end in the line asked for cannot be counted. Its last line must be one of these three, "
    "with nothing behind it:\nVerdict: A\nVerdict: B\nVerdict: tie"
)


# No two neighboring parts match the same run of characters, so a degenerate reply is also read fast.
MARKUP = re.compile(r"[*_`#$]|\\(?:boxed|text\w*|[()\[\]])|</\w+>|<answer>|<\|[^|<>\n]*\|>")  # "</s>", "<|im_end|>" too
# Two other spellings: a pair of a JSON object, and [[A]] or \boxed{A} on its own line.
SPELLED = re.compile(
    r"""["'](?:final)?verdict["']\s*:\s*["']([^"'\n]*)["']|^[^\w\n]*(?:\[\[|\{)(\w+)[\]}][^\w\n]*$""",
    re.IGNORECASE | re.MULTILINE,
)
SAID = (
    r"((?:(?:answer|assistant|response|option)\s)?[ab]|(?:it(?:['’]s|\sis)\s)?(?:a\s)?(?:tie|tied|draw|both|equal))\b"
)
GAP = r""" \t\r\xa0:：=–—"'“‘(\[{<>-"""  # characters that may stand between "Verdict" and "A"
END = r"[^\w\n?/❌]*$"  # of the line; "!" and emoji may precede it
VERDICT = re.compile(
    # "Verdict" begins a line or follows a sentence; in quotes within a line it is someone else's.
    r"(?:^[^\w\n]*|(?<=[.!?…]\s)|(?<=。))(?:(?:the|my)\s)?(?:(?:final|overall)\s)?verdict\b"
    # After "A" the line ends, or a sentence, or a reason follows: "A good answer", "A or B" and "A?" are no verdicts.
    rf"(?:(?:\sis\b)?[{GAP}]*{SAID}(?:{END}|[\"'”’)\]}}>]*(?:[.!。！](?=\s)(?!.*\?)|,?\s(?:because|since|as)\b"
    r"|(?=\s?[,;(–—]|\s-\s)(?!.*(?:\b(?:a|b|or|tie|not|no)\b|\?))))"
    # It may be alone on the next line, but not as the first of a list of the three.
    rf"|[{GAP}]*\n[\n{GAP}]*{SAID}{END}(?!\W*(?:a|b|tie)\W*$))?",
    re.IGNORECASE | re.MULTILINE,
)
RETRACTED = re.compile(
    r"\b(?:wait|actually|reconsider|correction|on second thought|on reflection|change my|no,)", re.IGNORECASE
)


def read_prompt(path: str | os.PathLike, places: Iterable[str] = PLACEHOLDERS) -> tuple[str, str]:
    """Return a judge's prompt and its SHA-256; UserError if it lacks one of ``places``, where texts go."""
    text = read_text(path)
    if missing := [name for name in places if name not in text]:
        raise UserError(f"{path} lacks {', '.join(missing)}: add it, as in the prompts in configs/")
    return text, sha256(text)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def to_ask(shown: Shown) -> bool:
    """Return whether two answers have to be judged: both exist, and they differ."""
    (_, first), (_, second) = shown
    return first is not None and second is not None and first != second


def fill(prompt: str, item: Item, shown: Shown) -> str:
    """Return the prompt with the task and two answers."""
    (_, answer_a), (_, answer_b) = shown
    return fill_in(prompt, {"{task}": item.task, "{answer_a}": answer_a, "{answer_b}": answer_b})


def fill_in(prompt: str, texts: dict[str, str]) -> str:
    """Return the prompt with texts, by the places where they go, quoted as data.

    {fence} becomes a line of tildes, longer than any in the texts, so that no text can end its own quotation.
    """
    longest = max((len(tildes) for text in texts.values() for tildes in re.findall("~+", text)), default=0)
    texts = texts | {"{fence}": "~" * max(8, longest + 1)}
    # In one pass, so that a placeholder in an answer is not filled in.
    return re.sub("|".join(map(re.escape, texts)), lambda match: texts[match[0]], prompt)


def verdict(reply: str) -> str | None:
    """Return "first", "second" or "tie" from the reply's last verdict ("Verdict: A", "B" or "tie"), else None.

    Case and Markdown do not matter, a reason may precede or follow, and thoughts are not part of a reply. None if the
    reply contains two different verdicts or retracts one, or if its last one is ambiguous.
    """
    text = SPELLED.sub(r"\nVerdict: \1\2\n", MARKUP.sub("", without_thoughts(reply) or ""))
    found = list(VERDICT.finditer(text))
    words = [(match[1] or match[2] or "?").split()[-1].lower() for match in found]
    said = {{"a": "first", "b": "second"}.get(word, "tie") for word in words if word != "?"}
    if len(said) != 1 or words[-1] == "?" or RETRACTED.search(text, found[-1].end()):
        return None
    return said.pop()


class Judge(Teacher):
    """A teacher that must give a verdict; after a reply without one it is asked again, with a reminder."""

    reminder = REMINDER

    def readable(self, text: str) -> bool:
        """Return whether a reply has what it was asked for."""
        return verdict(text) is not None

    def variant(self, prompt: str, seed: int, tries: int) -> tuple[str, int]:
        """Return the prompt and the seed of the request after ``tries`` earlier ones."""
        return prompt + self.reminder * bool(tries), seed + tries

    def settle(self, reply: Completion, tries: int) -> Completion | None:
        """Return the reply to keep after ``tries`` earlier ones, or None to ask again.

        ASKS replies without a verdict are a failure, with the last one's text. A reply cut off for length has no
        verdict: what looks like one may be part of unfinished thoughts.
        """
        cut = reply.finish_reason == "length"
        if reply.text is None or not cut and self.readable(reply.text):
            return super().settle(reply, tries)
        error = CUT_OFF if cut else f"no verdict in {ASKS} replies"
        return dataclasses.replace(reply, error=error) if tries + 1 == ASKS else None


def judgment(item: Item, shown: Shown, judge: dict, reply: Completion | None = None) -> dict:
    """Return a row of judgments.

    Args:
        item: what was answered.
        shown: the two answers.
        judge: who judged, and how.
        reply: the judge's, or a failure; None for two equal answers, a tie without a request.
    """
    row = {"id": item.id, "first": shown[0][0], "second": shown[1][0], "preferred": None, "judge": judge, "error": None}
    if missing := [generator for generator, answer in shown if answer is None]:
        row["error"] = f"no answer by {' and '.join(missing)}"
    elif reply is None:
        row |= {"preferred": "tie", "note": "equal answers, not asked"}
    else:
        row |= {"preferred": None if reply.error else verdict(reply.text), "error": reply.error}
    if reply and reply.changed:
        row["changed_settings"] = reply.changed
    row |= {"reply": reply.text if reply else None, "answered_by": reply.model if reply else None, "seconds": None}
    hashes = [None if answer is None else sha256(answer) for _, answer in shown]
    return row | {"answers_sha256": hashes}
