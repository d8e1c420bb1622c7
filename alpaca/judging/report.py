"""A report as files: report.json, report.png, and one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
import os
import platform
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from alpaca.common.files import replace_file
from alpaca.common.records import jdump
from alpaca.common.text import shorten, templates
from alpaca.judging import plot, report_text

COUNTED_WITH = ("numpy", "scipy", "rapidfuzz", "rouge-score", "nltk")  # the last: rouge-score's stemmer


def made_from(files: Mapping[str, Iterable[Path]]) -> dict:
    """Return what a report's figures depend on, besides its seed.

    Args:
        files: "set", "answers", "judgments", "data" → paths of files that have been read.

    Returns:
        files: under the same names lists of {"file": its name, "sha256"}; versions of Python and of COUNTED_WITH.
    """
    found = {
        kind: [{"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in of_kind]
        for kind, of_kind in files.items()
    }
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in COUNTED_WITH}
    return {"files": found, "versions": versions}


def write(report: dict, output_dir: str | os.PathLike) -> list[str]:
    """Write report.json, report.png (if matplotlib is installed and there is something to draw) and report.html.

    Returns:
        The names of the files.
    """
    folder = Path(output_dir)
    try:
        png = plot.picture(report)
    except ImportError:
        png = None
        note = "report.png was not drawn, matplotlib is not installed: pip install -e '.[judge]'"
        report = report | {"notes": [*report["notes"], note]}
        print(f"note: {note}")
    jdump(report, folder / "report.json", indent=2)
    if png is not None:
        with replace_file(folder / "report.png", "wb") as file:
            file.write(png)
    with replace_file(folder / "report.html") as file:
        file.write(page(report, png))
    return ["report.json", *(["report.png"] if png else []), "report.html"]


def page(report: dict, png: bytes | None) -> str:
    """Return one self-contained HTML page without scripts; what models and people wrote is escaped."""
    environment = templates(
        *(Path(__file__).parents[1] / room / "templates" for room in ("judging", "data")), html=True
    )
    environment.filters |= {"unbroken": _unbroken, "shorten": shorten}
    names = [each["name"] for each in report["answerers"]]
    return environment.get_template("report.html").render(
        report=report,
        say=report_text,
        title=(" vs. " if report["judges"] else ", ").join(names),
        picture=base64.b64encode(png).decode() if png else None,
    )


def _unbroken(cell: str) -> str:
    """Return a cell with its interval, "(45.0 to 55.4)", kept on one line."""
    return re.sub(r"\(\S+ to \S+\)", lambda interval: interval[0].replace(" ", "\u00a0"), cell)
