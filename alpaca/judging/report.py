"""A report as files: report.json, report.png, and one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import os
import platform
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from alpaca import UserError
from alpaca.common.files import replace_file
from alpaca.common.records import jdump
from alpaca.data.plots_page import STYLE
from alpaca.judging import plot as report_plot
from alpaca.judging import report_text

COUNTED_WITH = ("numpy", "rapidfuzz", "nltk")  # draws and means; ROUGE-L's common subsequences, and its stemmer


def made_from(files: Mapping[str, Iterable[str]]) -> dict:
    """What a report's figures depend on besides its seed.

    Args:
        files: "set", "answers", "judgments", "data" → paths of files that have been read.

    Returns:
        files: under the same names lists of {"file": its name, "sha256"}; versions of Python and of COUNTED_WITH, None
        for what is not installed.
    """
    found = {
        name: [
            {"file": Path(path).name, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()} for path in each
        ]
        for name, each in files.items()
    }
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in COUNTED_WITH:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {"files": found, "versions": versions}


def check_output_dir(path: str | os.PathLike) -> None:
    """Raises UserError if write() could not make that folder; told before the work rather than after it."""
    there = next(folder for folder in (Path(path), *Path(path).parents) if folder.exists())
    if not there.is_dir():
        raise UserError(f"--output_dir {path}: {there} is a file; give a folder, or a name for a new one")


def write(report: dict, output_dir: str | os.PathLike) -> list[str]:
    """Writes report.json, report.png (where matplotlib is installed and there is something to draw) and report.html.

    Returns:
        The names of the files written.
    """
    folder = Path(output_dir)
    try:
        png = report_plot.picture(report)
    except ImportError:
        png = None
        note = "report.png was not drawn: matplotlib is not installed (pip install '.[judge]')."
        report = report | {"notes": [*report["notes"], note]}
        print(f"note: {note}")
    jdump(report, folder / "report.json", indent=2)
    if png is not None:
        with replace_file(folder / "report.png", "wb") as file:
            file.write(png)
    with replace_file(folder / "report.html") as file:
        file.write(page(report, png))
    return ["report.json", *(["report.png"] if png else []), "report.html"]


# ---------------------------------------------------------------------------------------------------------------------
# The page.

MORE_STYLE = """
body { max-width: 60rem; }
.lead { margin: 1rem 0 0; color: var(--ink); font-size: 1.125rem; overflow-wrap: anywhere; }
h3 { margin: 2rem 0 .5rem; font-size: 1rem; overflow-wrap: anywhere; }
td, th { font-variant-numeric: tabular-nums; }
td:first-child { min-width: 9rem; }
img { max-width: 36rem; } /* its letters are as large as the text's then */
td:not(:first-child), th:not(:first-child) { text-align: right; white-space: normal; }
article { margin: 1.5rem 0; padding: 1rem; border: 1px solid var(--line); border-radius: 8px; }
article h3 { margin: 0 0 .5rem; }
.label { margin: .75rem 0 .25rem; font-size: .8125rem; }
.said { margin: 0; color: var(--ink); white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem;
  overflow-y: auto; }
.pair { display: grid; gap: 0 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.pair > div { min-width: 0; }
"""


def page(report: dict, png: bytes | None) -> str:
    """One HTML page with everything inside: no script, no request; what models and people wrote is text in it."""
    names = [each["name"] for each in report["answerers"]]
    title = " against ".join(names) if report["judges"] else ", ".join(names)
    lead = "".join(
        f'<p class="lead">{esc(words)}</p>\n'
        for judge in report["judges"][:1]
        for words in filter(None, (judge["words"], judge["length_words"]))
    )
    sections = [
        _picture(report, png),
        _judges(report),
        _lengths(report),
        _categories(report),
        _agreement(report),
        _section("Against the references", _table(report_text.reference_table(report)) + _reference_words(report)),
        _overlap(report),
        _examples(report),
        _section("How this was computed", _list([*report["notes"], *report_text.METHOD])),
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{esc(title)}</title>
<style>{STYLE}{MORE_STYLE}</style>
</head>
<body>
<header>
<h1>{esc(title)}</h1>
<p>{report["set"]["items"]:,} instructions of {esc(report["set"]["file"])}{report_text.the_252(report)}. Made by
<code>judge.py report</code>.</p>
{lead}
</header>
<main>
{"".join(sections)}
</main>
</body>
</html>
"""


def esc(text: object) -> str:
    return html.escape(str(text))


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{esc(title)}</h2>\n{body}\n</section>\n"


def _table(rows: list[list[str]]) -> str:
    def shown(cell: str) -> str:
        return re.sub(r"\(\S+ to \S+\)", lambda interval: interval[0].replace(" ", "\u00a0"), esc(cell))  # in one line

    head, *body = [[shown(cell) for cell in row] for row in rows]
    lines = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    return (
        f'<div class="scroll" tabindex="0">\n<table>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n'
        "</table>\n</div>\n"
    )


def _list(texts: Iterable[str]) -> str:
    return "".join(f"<p>{esc(text)}</p>\n" for text in texts)


def _details(summary: str, body: str) -> str:
    return f"<details>\n<summary>{esc(summary)}</summary>\n{body}</details>\n"


def _picture(report: dict, png: bytes | None) -> str:
    if png is None:
        return ""
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))  # of the PNG's header
    alt = " ".join(judge["words"] for judge in report["judges"][:1]) or "ROUGE-L of each answerer, in the table below."
    source = base64.b64encode(png).decode()
    return (
        f'<section>\n<h2>In a picture</h2>\n<img alt="{esc(alt)}" width="{width}" height="{height}" '
        f'src="data:image/png;base64,{source}">\n</section>\n'
    )


def _judges(report: dict) -> str:
    if not report["judges"]:
        return ""
    a, b = (each["name"] for each in report["answerers"])
    body = _list([f"Wins and rates are {a}'s, losses its defeats by {b}."]) + _table(report_text.judge_table(report))
    biased = [judge for judge in report["judges"] if judge["position"] and judge["position"]["p"] < 0.05]
    body += _list(f"{judge['judge']}: {judge['position_words']}" for judge in biased)
    for judge in report["judges"]:
        body += _details(judge["judge"], _list(report_text.words(judge) + report_text.asked_with(judge)))
    return _section("The judges", body)


def _lengths(report: dict) -> str:
    body = ""
    for judge in report["judges"]:
        if judge["judged"]:
            body += _details(judge["judge"], _length(report, judge)) if body else _length(report, judge)
    return _section("Does the longer answer win?", body) if body else ""


def _length(report: dict, judge: dict) -> str:
    a, b = (each["name"] for each in report["answerers"])
    length = judge["length"]
    controlled = report_text.with_interval(length["length_controlled"], length["interval"])
    words = (
        f"{a}'s answers are {abs(length['longer']):,.0f} characters {'longer' if length['longer'] >= 0 else 'shorter'} "
        f"than {b}'s on average. At equal length its win rate would be {controlled}, against "
        f"{report_text.percent(judge['win_rate'])} as the answers are ({judge['judge']})"
    )
    if length["correlation"] is not None:
        words += f"; outcome and difference of length correlate by {length['correlation']:+.2f}".replace("-", "−")
    rows = [["characters longer", "wins", "ties", "losses", "win rate"]]
    for bin in length["bins"]:
        between = f"{report_plot.signed(bin['from'])} to {report_plot.signed(bin['to'])}"
        rows.append([between, *_counts(bin), report_text.with_interval(bin["win_rate"], bin["interval"])])
    return _list([words + "."]) + (_table(rows) if len(rows) > 1 else "")


def _counts(figures: dict) -> list[str]:
    return [f"{figures[key]:,}" for key in ("wins", "ties", "losses")]


def _categories(report: dict) -> str:
    if not report["judges"] or not any(c["category"] for c in report["judges"][0]["categories"]):
        return ""
    judge = report["judges"][0]
    rows = [["category", "wins", "ties", "losses", "win rate"]]
    for each in judge["categories"]:
        rate = report_text.with_interval(each["win_rate"], each["interval"])
        rows.append([each["category"] or "(none)", *_counts(each), rate])
    told = sum(each["win_rate"] is not None for each in judge["categories"])
    words = (
        f"{len(rows) - 1} categories, by {judge['judge']}; {told or 'none'} of them with ten verdicts or more. Of "
        "smaller ones no rate is told: nine items, evenly split, have an interval 55 points wide. One in twenty "
        "intervals misses its true value by chance alone."
    )
    return _section("By category", _list([words]) + _details("The counts", _table(rows)))


def _agreement(report: dict) -> str:
    if not report["agreement"] or not report["agreement"]["pairs"]:
        return ""
    return _section(
        "Do the judges agree?",
        _table(report_text.agreement_table(report)) + _list(filter(None, [report_text.agreement_words(report)])),
    )


def _reference_words(report: dict) -> str:
    missing = report["set"]["without_reference"]
    words = "Means over the instructions, with 95% intervals. "
    if missing:
        words += f"{missing:,} instructions have no reference answer. "
    if any(each["loss"] for each in report["answerers"]):
        words += "Losses, in nats per token, compare only between models with the same tokenizer. "
    return _list([words + "An answer may be good and unlike the reference."])


def _overlap(report: dict) -> str:
    overlap = report["overlap"]
    if not overlap:
        return ""
    near = "".join(
        f'<p class="label">{n["rouge_l"]:.2f} · {esc(n["id"])} and record {n["record"]:,}</p>\n'
        f"{_text('', n['instruction'])}{_text('', n['record_instruction'])}"
        for n in overlap["nearest"]
    )
    long = "".join(
        f'<p class="label">{n["words"]} words · {esc(n["id"])} and record {n["record"]:,}</p>\n{_text("", n["ngram"])}'
        for n in overlap["longest"]
        if n["words"]
    )
    body = _list([report_text.overlap_words(overlap)]) + _details("The nearest instructions", near)
    return _section("Is the set in the training data?", body + _details("The longest runs of shared words", long))


def _examples(report: dict) -> str:
    body = ""
    for example in report["examples"]:
        texts = _text("Instruction", example["instruction"])
        texts += _text("Input", example["input"]) if example["input"] else ""
        pair = "".join(f"<div>{_text(name, text or '(empty)')}</div>\n" for name, text in example["answers"].items())
        reference = _details("Reference answer", _text("", example["reference"])) if example["reference"] else ""
        verdicts = example["verdicts"]
        won = sum(verdict == "won" for verdict in verdicts.values())
        head = f"{example['winner']} wins, {won} of {len(verdicts)} judge{'s' * (len(verdicts) > 1)}"
        where = " · ".join(filter(None, (example["id"], example["category"])))
        head = f'<h3>{esc(head)}</h3>\n<p class="label">{esc(where)}</p>\n'
        body += f'<article>\n{head}{texts}<div class="pair">\n{pair}</div>\n{reference}</article>\n'
    return _section("The clearest wins", body) if body else ""


def _text(label: str, text: str) -> str:
    head = f'<p class="label">{esc(label)}</p>\n' if label else ""
    return f'{head}<p class="said" tabindex="0">{esc(text)}</p>\n'
