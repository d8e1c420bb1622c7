"""The HTML page with a data set's pictures inside, and the style sheet that a judging report shares with it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).with_name("templates")
STYLE = (TEMPLATES / "style.css").read_text(encoding="utf-8")


class Figure(NamedTuple):
    """A picture and what the page says about it."""

    name: str
    png: bytes
    title: str
    caption: str
    alt: str
    table: list[tuple[str, ...]]  # the numbers behind it; the first row is the head

    @property
    def width(self) -> int:
        return int.from_bytes(self.png[16:20], "big")  # the PNG's header, in pixels

    @property
    def height(self) -> int:
        return int.from_bytes(self.png[20:24], "big")

    @property
    def src(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def page(name: str, records: int, figures: Sequence[Figure]) -> str:
    """Return one HTML page with the pictures inside: it can be mailed, or opened from a disk without a network."""
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return templates.get_template("plots.html").render(name=name, records=records, figures=figures)
