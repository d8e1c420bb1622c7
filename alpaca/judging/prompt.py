"""Two answers before a judge: the prompt, the verdict in its reply, and the row that is kept of it.

Light: importing this loads neither torch nor an API client.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re

from alpaca import UserError
from alpaca.common.files import read_text
from alpaca.data.instruction_sets import Item
from alpaca.endpoint.client import Completion, Teacher

Shown = list[tuple[str, str | None]]  # generator and answer, the first and the second; None: it has no answer

PLACEHOLDERS = ("{task}", "{answer_a}", "{answer_b}", "{fence}")
ASKS = 3  # for a verdict, before a reply without one is a failure
SEED_STEP = 10  # between the seeds of these: Teacher.ask counts up from each when a reply is empty
REMINDER = (
    "\n\nA reply that does not end in the line asked for cannot be counted. Its last line must be one of these three, "
    "with nothing behind it:\nVerdict: A\nVerdict: B\nVerdict: tie"
)


def read_prompt(path: str | os.PathLike) -> tuple[str, str]:
    """Return a judge's prompt and its SHA-256; UserError if one of PLACEHOLDERS is not in it."""
    text = read_text(path)
    if missing := [name for name in PLACEHOLDERS if name not in text]:
        raise UserError(f"{path} does not say where {', '.join(missing)} goes: put it in")
    return text, sha256(text)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def to_ask(shown: Shown) -> bool:
    """Return whether somebody has to judge two answers: both exist, and they differ."""
    (_, first), (_, second) = shown
    return first is not None and second is not None and first != second


def fill(prompt: str, item: Item, shown: Shown) -> str:
    """Return the prompt with the task and two answers, quoted as data.

    {fence} becomes a line of tildes that is longer than any in the texts, so none of them can end its own quotation.
    """
    (_, answer_a), (_, answer_b) = shown
    longest = max(map(len, re.findall("~+", f"{item.task}\n{answer_a}\n{answer_b}")), default=0)
    texts = {"{task}": item.task, "{answer_a}": answer_a, "{answer_b}": answer_b, "{fence}": "~" * max(8, longest + 1)}
    # In one pass, so that a placeholder in an answer is not filled in.
    return re.sub("|".join(map(re.escape, PLACEHOLDERS)), lambda match: texts[match[0]], prompt)


def verdict(reply: str) -> str | None:
    """Return "first", "second" or "tie", as the reply's last line says ("Verdict: A", "B" or "tie"), else None.

    Case and Markdown do not matter. A reply with two different verdicts has none. Thoughts before the reply (up to
    "</think>") are not part of it; a reply that was cut off in them has none.
    """
    if reply.lstrip().startswith("<think>") and "</think>" not in reply:
        return None
    lines = [re.sub(r"[*_`#>\[\]()\"']", "", line).strip() for line in reply.rpartition("</think>")[2].splitlines()]
    lines = [line for line in lines if line]
    found = [re.fullmatch(r"(?:final )?verdict\s*[:：]\s*(?:answer )?(a|b|tie)\.?", line, re.I) for line in lines]
    said = {match[1].lower() for match in found if match}
    if len(said) != 1 or not found[-1]:
        return None
    return {"a": "first", "b": "second", "tie": "tie"}[said.pop()]


class Judge:
    """A teacher that is asked for a verdict; after a reply without one it is asked again, with a reminder."""

    def __init__(self, teacher: Teacher):
        self.teacher, self.close = teacher, teacher.close

    async def ask(self, prompt: str, seed: int) -> Completion:
        """Ask as Teacher.ask does; ASKS replies without a verdict are a failure, with the last one's text."""
        prompt_tokens = completion_tokens = 0
        for number in range(ASKS):
            reply = await self.teacher.ask(prompt + REMINDER * bool(number), seed + SEED_STEP * number)
            prompt_tokens += reply.prompt_tokens
            completion_tokens += reply.completion_tokens
            if reply.text is None or verdict(reply.text):
                break
        else:
            reply.error = f"no verdict in {ASKS} replies"
        return dataclasses.replace(reply, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)


def judgment(item: Item, shown: Shown, judge: dict, reply: Completion | None = None) -> dict:
    """Return a row of judgments.

    Args:
        item: what was answered.
        shown: the two answers.
        judge: who judged, and how.
        reply: the judge's, or a failure; None for two equal answers, a tie that nobody was asked about.
    """
    row = {"id": item.id, "first": shown[0][0], "second": shown[1][0], "preferred": None, "judge": judge, "error": None}
    if missing := [generator for generator, answer in shown if answer is None]:
        row["error"] = f"no answer by {' and '.join(missing)}"
    elif reply is None:
        row |= {"preferred": "tie", "note": "equal answers, not asked"}
    else:
        row |= {"preferred": None if reply.error else verdict(reply.text), "error": reply.error}
    row |= {"reply": reply.text if reply else None, "answered_by": reply.model if reply else None, "seconds": None}
    hashes = [None if answer is None else sha256(answer) for _, answer in shown]
    return row | {"answers_sha256": hashes}
