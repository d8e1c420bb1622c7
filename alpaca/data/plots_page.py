"""The page that holds a data set's pictures, and the style that it shares with a report's."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import NamedTuple

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; }
@media (prefers-color-scheme: dark) {
  :root { --back: #0d1117; --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 46rem; padding: 2rem 1rem 4rem; background: var(--back); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 1rem; font-size: 1.25rem; }
p, figcaption { color: var(--soft); }
figure { margin: 0; }
figcaption { margin-top: .75rem; }
img { display: block; width: 100%; height: auto; border: 1px solid var(--line); border-radius: 8px; }
details { margin-top: .75rem; }
summary { cursor: pointer; }
.scroll { overflow-x: auto; }
#verb_noun img { min-width: 34rem; } /* its letters are small: on a phone, push it aside */
table { margin-top: .5rem; border-collapse: collapse; font-size: .875rem; }
th, td { padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { white-space: nowrap; }
"""


class Figure(NamedTuple):
    """A picture and what the page says about it."""

    name: str
    png: bytes
    title: str
    caption: str
    alt: str
    table: list[tuple[str, ...]]  # the numbers behind it; the first row is the head


def page(name: str, records: int, figures: Sequence[Figure]) -> str:
    """One HTML page with the pictures inside: it can be mailed, or opened from a disk without a network."""
    name = html.escape(name)
    sections = "\n".join(_section(figure) for figure in figures)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} in pictures</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{name} in pictures</h1>
<p>{records:,} records. Drawn by <code>analyze_data.py plot</code>.</p>
</header>
<main>
{sections}
</main>
</body>
</html>
"""


def _section(figure: Figure) -> str:
    head, *body = [[html.escape(cell) for cell in row] for row in figure.table]
    rows = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
    picture = base64.b64encode(figure.png).decode()
    width, height = (int.from_bytes(figure.png[at : at + 4], "big") for at in (16, 20))  # of the PNG's header
    return f"""<section id="{figure.name.removesuffix(".png")}">
<h2>{html.escape(figure.title)}</h2>
<figure>
<div class="scroll">
<img alt="{html.escape(figure.alt)}" width="{width}" height="{height}" src="data:image/png;base64,{picture}">
</div>
<figcaption>{html.escape(figure.caption)}</figcaption>
</figure>
<details>
<summary>The numbers</summary>
<div class="scroll">
<table>
<thead><tr>{"".join(f'<th scope="col">{cell}</th>' for cell in head)}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
</details>
</section>"""
