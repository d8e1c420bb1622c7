"""Blind votes of people between two answers: what is shown on which side to whom, and what they chose.

OUT.journal holds each vote, on disk before the voter sees the next pair. OUT gets a row for each vote, so that a report
can be made at any time; it is written from the journal at the start, and again after an undo. A server that was killed
continues from the journal.

All see the pairs in one order, shuffled by the seed. Those who stop early have then judged a random sample of the set,
which is what an interval over instructions assumes (the sets themselves are sorted by application). And they have
judged the same pairs, which their agreement is measured on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import threading
import time
import unicodedata

from alpaca import UserError
from alpaca.common.journal import Journal, check_output
from alpaca.common.records import json_text, write_records
from alpaca.data.instruction_sets import Answers, Item
from alpaca.judging.prompt import sha256

CHOICES = ("first", "second", "tie", "skip")
MAX_NAME_CHARS = 60


class Ballots:
    """The votes on pairs of answers, of any number of annotators.

    Args:
        items: the instruction set.
        a, b: two models' answers to it; an item that one of them has not answered is left out.
        output_path: the judgments' file; its journal is beside it, locked against a second server.
        seed: of the order of the pairs and of the sides. Without one it is taken from the journal, or drawn: a voter
            who can guess it could tell whether left is the same generator as the last time.

    Raises:
        UserError: no item has two answers, the output exists without a journal, or the journal is of other answers, of
            another seed, or in use.
    """

    def __init__(
        self, items: list[Item], a: Answers, b: Answers, output_path: str | os.PathLike, seed: int | None = None
    ):
        # Named in the other order on the command line, they are the same pairs.
        self._answers = sorted((a, b), key=lambda answers: answers.generator)
        self.items = [item for item in items if all(item.id in answers.outputs for answers in self._answers)]
        if not self.items:
            raise UserError(
                f"no instruction has answers by both {a.generator} and {b.generator}: give answers to the same set"
            )
        self.path, journal = check_output(output_path)
        if self.path.suffix != ".jsonl":
            raise UserError(f"output_path {self.path} must end in .jsonl: votes are JSON Lines")
        self._journal = Journal(journal)
        self.seed = self._begin(seed)
        self._votes: dict[str, dict[str, dict]] = {}  # annotator → item id → row, in the order of voting
        for entry in self._journal.entries[1:]:
            self._count(entry)
        self._written = False  # whether OUT has all rows; then the next one is appended
        self._write()
        self.items.sort(key=lambda item: self._draw("order", item.id))
        self._lock = threading.Lock()
        self._shown: dict[tuple[str, int], float] = {}

    def _begin(self, seed: int | None) -> int:
        """Record what the journal's votes are about, or check it; return the seed."""
        pairs = sorted(
            [item.id, item.instruction, item.input, *(answers.outputs[item.id] for answers in self._answers)]
            for item in self.items
        )
        generators = [answers.generator for answers in self._answers]
        if seed is None and self._journal.entries:
            seed = self._journal.entries[0].get("run", {}).get("seed")
        elif seed is None:
            seed = random.SystemRandom().getrandbits(48)
        about = {"task": "people", "generators": generators, "pairs": sha256(json.dumps(pairs)), "seed": seed}
        self._journal.begin(about)
        return seed

    def _draw(self, *what: str) -> bytes:
        return hashlib.sha256(json.dumps([self.seed, *what]).encode()).digest()

    def _sides(self, annotator: str, id: str):
        """Return the answers shown first and second; the same for all spellings that annotator() takes for one name."""
        return self._answers[:: -1 if self._draw("sides", annotator.casefold(), id)[0] & 1 else 1]

    def annotator(self, name) -> str:
        """Return the name as the rows have it; another spelling of a known annotator's name becomes the known one.

        Raises:
            UserError: it is empty, too long, or not text.
        """
        if not isinstance(name, str) or not name.isprintable() or len(name) > MAX_NAME_CHARS or not name.strip():
            raise UserError(f"Enter a name of 1 to {MAX_NAME_CHARS} characters, in one line.")
        name = " ".join(unicodedata.normalize("NFC", name).split())
        with self._lock:
            return next((known for known in self._votes if known.casefold() == name.casefold()), name)

    def done(self, annotator: str) -> int:
        """Return how many pairs this annotator has voted on, or skipped."""
        return len(self._votes.get(annotator, {}))

    def next(self, annotator: str) -> int | None:
        """Return the place of the first pair without a vote and start its clock; None when all have one."""
        with self._lock:
            voted = self._votes.get(annotator, {})
            place = next((place for place, item in enumerate(self.items) if item.id not in voted), None)
            if place is not None:
                self._shown[annotator, place] = time.monotonic()
            return place

    def pair(self, annotator: str, place: int) -> tuple[str, str, str, str]:
        """Return instruction, input, first and second answer."""
        item = self.items[place]
        return item.instruction, item.input, *(answers.outputs[item.id] for answers in self._sides(annotator, item.id))

    def cut_off(self, annotator: str, place: int) -> list[bool]:
        """Return whether the first and the second answer ended at the longest that their models were allowed."""
        id = self.items[place].id
        return [one.rows.get(id, {}).get("finish_reason") == "length" for one in self._sides(annotator, id)]

    def vote(self, annotator: str, place: int, choice: str) -> bool:
        """Keep a vote; return False if the pair already has one (a second press, another window), which stays.

        Args:
            place: the pair's, from next().
            choice: one of CHOICES.

        Raises:
            OSError: it could not be saved, and no further vote can be until the server is restarted.
        """
        item = self.items[place]
        with self._lock:
            if item.id in self._votes.get(annotator, {}):
                return False
            shown = self._shown.pop((annotator, place), None)
            sides = self._sides(annotator, item.id)
            by = {"kind": "person", "name": annotator, "prompt_sha256": None, "settings": {"seed": self.seed}}
            self._keep(
                {
                    "id": item.id,
                    "first": sides[0].generator,
                    "second": sides[1].generator,
                    "preferred": None if choice == "skip" else choice,
                    "judge": by,
                    "error": "skipped" if choice == "skip" else None,
                    "reply": None,
                    "seconds": None if shown is None else round(time.monotonic() - shown, 1),
                    "answers_sha256": [sha256(answers.outputs[item.id]) for answers in sides],
                }
            )
            return True

    def undo(self, annotator: str, place: int) -> bool:
        """Take back this annotator's vote on a pair; return False if it is not their last one."""
        with self._lock:
            if next(reversed(self._votes.get(annotator, {})), None) != self.items[place].id:
                return False
            self._written = False
            self._keep({"undo": annotator})
            return True

    def close(self) -> None:
        with self._lock:
            self._journal.close()

    def _keep(self, entry: dict) -> None:
        self._journal.append([entry])
        self._count(entry)
        try:
            if self._written:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json_text(entry) + "\n")
            else:
                self._write()
        except OSError as e:  # the vote is safe in the journal: the next one, or the next start, writes it again
            self._written = False
            logging.error("%s: %s", self.path, e)

    def _count(self, entry: dict) -> None:
        if "undo" in entry:
            self._votes[entry["undo"]].popitem()
        else:
            self._votes.setdefault(entry["judge"]["name"], {})[entry["id"]] = entry

    def _write(self) -> None:
        write_records([row for rows in self._votes.values() for row in rows.values()], self.path)
        self._written = True
