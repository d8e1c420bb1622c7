"""Topics that requests ask about in turn, and how what came of them is spread: by topic, and by label."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from alpaca import UserError
from alpaca.common.files import read_text

LONGEST = 200  # characters of a topic: it is named in every request, and in the report
DRY = 10  # replies in a row without a new record, until a topic has run dry
SHOWN_LABELS = 20


@dataclass(frozen=True)
class Topic:
    """A topic, how often it comes relative to others, and what a request says about it besides."""

    name: str
    weight: int = 1
    note: str = ""


def read_topics(path: str | os.PathLike) -> list[Topic]:
    """Read topics, one a line, as ``name``, ``name | weight`` or ``name | weight | note``; "#" begins a comment.

    Raises:
        UserError: the file holds no topic, a name twice, a name of more than 200 characters, or a weight that is not a
            whole number from 1 to 1000.
    """
    topics: dict[str, Topic] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, weight, note = (part.strip() for part in (line + "||").split("|", 2))
        note, where = note.strip("| "), f"{path}, line {number}"
        if not name or len(name) > LONGEST:
            raise UserError(f"{where}: a topic has 1 to {LONGEST} characters, not {len(name):,}: name | weight | note")
        if not (weight or "1").isascii() or not (weight or "1").isdigit() or not 1 <= int(weight or 1) <= 1000:
            raise UserError(f"{where}: the weight must be a whole number from 1 to 1000: name | weight | note")
        if name.casefold() in topics:
            raise UserError(f"{where}: a repeated topic: use a weight instead")
        topics[name.casefold()] = Topic(name, int(weight or 1), note)
    if not topics:
        raise UserError(f"{path} holds no topic: write one on each line")
    return list(topics.values())


def in_turn(topics: list[Topic]) -> list[Topic]:
    """Return a cycle of topics in which each comes as often as its weight, evenly spaced."""
    turns = [((k + 0.5) / topic.weight, topic) for topic in topics for k in range(topic.weight)]
    return [topic for _, topic in sorted(turns, key=lambda turn: turn[0])]


class TopicCounts:
    """What came of the requests on each topic."""

    def __init__(self, topics: Iterable[Topic]):
        self.counts = {topic.name: Counter(replies=0, kept=0, dropped=0, near_duplicates=0) for topic in topics}
        self.barren = Counter()  # replies in a row that brought nothing new, by topic

    def add(self, topic: Topic, kept: int, dropped: int, near_duplicates: int) -> None:
        """Count a reply; ``dropped`` includes its near-duplicates."""
        self.counts[topic.name].update(replies=1, kept=kept, dropped=dropped, near_duplicates=near_duplicates)
        self.barren[topic.name] = 0 if kept else self.barren[topic.name] + 1

    def dry(self) -> list[str]:
        """Return the topics that brought nothing new in their last DRY replies."""
        return [name for name in self.counts if self.barren[name] >= DRY]


def label_balance(records: list[dict]) -> dict:
    """Return how the answers of classification records are spread: their number, the labels, the share of the first.

    A label is an answer in lower case without punctuation at its ends.
    """
    labels = Counter(record["output"].strip().strip(".,;:!?\"'*` ").lower() for record in records)
    most = labels.most_common(SHOWN_LABELS)
    share = most[0][1] / len(records) if most else 0.0
    return {"records": len(records), "labels": dict(most), "most_common_share": round(share, 4)}
