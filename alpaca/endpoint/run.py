"""A run of many requests: numbered, journaled before they count, and handed on in order.

parallel.Direct sends them one by one, many at once; batch_api.Batches sends them as files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from alpaca.common.journal import Journal
from alpaca.endpoint.budget import Budget
from alpaca.endpoint.client import Completion, Teacher

FIELDS = [field.name for field in dataclasses.fields(Completion)]


def recorded(journal: Journal) -> Iterator[tuple[int, Completion]]:
    """Yield the number and the reply of each request in a journal; a retried one appears again."""
    for entry in journal.entries:
        if "i" in entry:
            # An older version's entries may have other fields, or lack some.
            yield entry["i"], Completion(**{name: entry[name] for name in FIELDS if name in entry})


@dataclasses.dataclass
class Run:
    """Requests 0, 1, 2, …, whose result depends only on the replies, not on when they arrive.

    Args:
        teacher: writes the requests and reads the replies; closed at the end.
        request: number → (prompt, seed).
        journal: gets an entry ``{"i": number, …Completion}`` for each reply, before the reply counts.
        budget: counts the replies, those of the journal first.
        in_order: called for each reply in the order of the numbers, once it is journaled.
        want: whether to send the next request now, given its number and how many before it have not been handed on.
            The run is done when it returns False and all replies have been handed on.
        retry_failed: retry requests whose reply in the journal has no text; their cost still counts, the failure not.
    """

    teacher: Teacher
    request: Callable[[int], tuple[str, int | None]]
    journal: Journal
    budget: Budget
    in_order: Callable[[Completion], None]
    want: Callable[[int, int], bool]
    retry_failed: bool = False

    def __post_init__(self):
        self.known: dict[int, Completion] = {}  # all that are not requested again, by number
        self.handed_on = 0

    def replay(self) -> None:
        """Count the journal's replies, and note those that are not requested again."""
        for number, reply in recorded(self.journal):
            again = self.retry_failed and reply.text is None
            self.budget.arrived(dataclasses.replace(reply, error=None) if again else reply, False)
            if not again:
                self.known[number] = reply

    def write(self, replies: dict[int, Completion], *more: dict) -> None:
        """Journal replies, and ``more`` entries, with one fsync."""
        self.journal.append([{"i": i, **dataclasses.asdict(reply)} for i, reply in replies.items()] + [*more])

    def hand_on(self, replies: dict[int, Completion]) -> None:
        """Note replies, and hand on those whose turn it is."""
        self.known.update(replies)
        while self.handed_on in self.known:
            self.in_order(self.known[self.handed_on])
            self.handed_on += 1
