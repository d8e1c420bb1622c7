"""A reviewer's rubric: what is asked about a record, and the scores, reason and corrected answer in a reply.

A rubric is a text whose lines "NAME: <1-5>" are its criteria. A score is never guessed: a reply that does not have one
whole number for each criterion has no marks.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass

from alpaca import UserError
from alpaca.chat_template import messages_of
from alpaca.common.text import shorten, without_thoughts
from alpaca.data.instruction_sets import as_text
from alpaca.endpoint.client import Completion
from alpaca.judging.prompt import Judge, fill_in, read_prompt

PLACES = ("{task}", "{answer}", "{fence}")
ASKED = re.compile(r"^(\w[\w -]*): <1-5>$", re.MULTILINE)
UNREADABLE = 10  # replies, and not one with marks before them: the reviewer does not keep to the form
DECORATION = re.compile(r"[*_`#|>\"'{}\[\]$\\]|<(?=\d)|(?<=\d)>")  # around a name or a score: bold, a table, JSON, <4>
BULLET = r"(?:(?:\d{1,2}[.)]|[-•+])\s)?"
# "4", "4/5", "4 (the sum is right)", but not "4.5", "4-5", "4 or 5": a reason behind a score has no other number.
SCORE = r"(?:\sscore)?\s?[:：=–—-]?\s?([1-5])(?!\d)(?:\s?/\s?5|\sout of 5)?(?:\s?[(–—.。,;:-][^\d]*)?"
CORRECTED = re.compile(r"^[^\w\n]*corrected\b(?:\sanswer)?[^\w\n]*$", re.IGNORECASE | re.MULTILINE)
FENCE = re.compile(r"[ \t]*(~{3,}|`{3,})[ \t]*(\w*)[ \t]*")
NO_ANSWER = re.compile(r"\W*|<[^<>\n]*>|\W*(?:none|n/?a|unchanged|no correction(?: needed)?)\W*", re.IGNORECASE)
REMINDER = (
    "\n\nA reply that is not in the form asked for cannot be counted. It must have each of these lines once, with one "
    "whole number from 1 to 5 and nothing behind it:\n"
)


@dataclass(frozen=True)
class Marks:
    """What a reviewer says about a record.

    Attributes:
        scores: criterion → 1 to 5, in the rubric's order.
        reason: in its own words; may be "".
        corrected: the whole answer that it would give instead, or None.
    """

    scores: dict[str, int]
    reason: str
    corrected: str | None


class Rubric:
    """A rubric from a file.

    Raises:
        UserError: it does not say where the task, the answer and the line of tildes go, or asks for no score.
    """

    def __init__(self, path: str | os.PathLike):
        self.text, self.sha256 = read_prompt(path, PLACES)
        self.criteria = list(dict.fromkeys(ASKED.findall(self.text)))
        if not self.criteria:
            raise UserError(f'{path} asks for no score: give each criterion a line such as "True: <1-5>"')
        names = "|".join(re.escape(name) for name in sorted(self.criteria, key=len, reverse=True))
        self._mark = re.compile(rf"{BULLET}({names}){SCORE}", re.IGNORECASE)
        self._names = {name.casefold(): name for name in self.criteria}
        self.reminder = REMINDER + "\n".join(f"{name}: <1-5>" for name in self.criteria)

    def prompt(self, record: dict) -> str:
        """Return what is asked about a record; of a conversation its last answer is reviewed."""
        *asked, answer = messages_of(record)
        task = asked[0]["content"] if len(asked) == 1 else as_text(asked)
        return fill_in(self.text, {"{task}": task, "{answer}": answer["content"]})

    def read(self, reply: str) -> Marks | None:
        """Return the marks in a reply, or None unless each criterion has exactly one score.

        Order, case, Markdown and what else is said do not matter. Thoughts are no part of a reply, and neither is the
        corrected answer, which is taken only from between two fences that leave no doubt where it ends.
        """
        said, corrected = _split((without_thoughts(reply) or "").replace("\r\n", "\n"))
        scores: dict[str, set[int]] = {name: set() for name in self.criteria}
        reason = []
        for line in said.split("\n"):
            if mark := self._mark.fullmatch(" ".join(DECORATION.sub(" ", line).split())):
                scores[self._names[mark[1].casefold()]].add(int(mark[2]))
            elif not FENCE.fullmatch(line) and not re.match(r"\W*corrected\b", line, re.IGNORECASE):
                reason.append(line)
        if any(len(found) != 1 for found in scores.values()):
            return None
        words = re.sub(r"^\W*reason\b\W*", "", "\n".join(reason).strip(), flags=re.IGNORECASE)
        return Marks({name: found.pop() for name, found in scores.items()}, words, corrected)


def _split(text: str) -> tuple[str, str | None]:
    """Return a reply without the part under "Corrected:", and the answer between the fences there, or None."""
    if not (heading := CORRECTED.search(text)):
        return text, None
    before, lines = text[: heading.start()], text[heading.end() :].strip("\n").split("\n")
    if not (opening := FENCE.fullmatch(lines[0])):
        return before, None  # where an answer without a fence ends, nobody can tell
    fences = [(i, found) for i, line in enumerate(lines) if i and (found := FENCE.fullmatch(line))]
    same = [(i, found) for i, found in fences if found[1].startswith(opening[1])]  # not shorter, as in Markdown
    if len(same) != 1 or same[0][1][2]:
        return before, None  # none closes it, or which one does is a guess
    end = same[0][0]
    answer = "\n".join(lines[1:end]).strip()
    return "\n".join([before, *lines[end + 1 :]]), None if NO_ANSWER.fullmatch(answer) else answer


class Reviewer(Judge):
    """A teacher that is asked for marks, again with a reminder where a reply has none.

    Raises:
        UserError: from ask(), when the first UNREADABLE replies have none. In a batch all are paid for by then.
    """

    def __init__(self, rubric: Rubric, *arguments):
        super().__init__(*arguments)
        self.rubric, self.reminder = rubric, rubric.reminder
        self.unreadable = -math.inf if arguments[-1].batched else 0

    def readable(self, text: str) -> bool:
        return self.rubric.read(text) is not None

    def settle(self, reply: Completion, tries: int) -> Completion | None:
        settled = super().settle(reply, tries)
        if settled and settled.text is not None and not settled.error:
            self.unreadable = -math.inf
        elif reply.text is not None:
            self.unreadable += 1
        if self.unreadable >= UNREADABLE:
            cure = "allow longer replies" if reply.finish_reason == "length" else "take another model or rubric"
            raise UserError(f"{UNREADABLE} replies and no scores, the last begins {shorten(reply.text)!r}: {cure}")
        return settled
