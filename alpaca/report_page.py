"""What a report looks like: a table in the terminal, one picture, one HTML page that needs nothing else.

All three show the same dictionary (judge.py report makes it), in which None stands for a figure that does not exist.
"""

from __future__ import annotations

import base64
import html
import os
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import utils
from alpaca import report_plot
from alpaca.plots import STYLE

METHOD = (
    "Win rate: wins and half of the ties, of all items with a verdict. A model is asked in both orders; where it "
    "contradicts itself the item is a tie, and where an ask failed the item is left out.",
    "Intervals of win rates, ROUGE-L and losses: 95% percentile bootstrap over instructions, 10,000 resamples. Of bins "
    "and categories: Wilson's 95% interval.",
    "p: exact two-sided sign test, ties dropped; of a preference for the first place, over items.",
    "At equal length: win rate predicted by a logistic regression on tanh of the standardised difference of lengths in "
    "characters, at no difference, as in AlpacaEval 2 without its term for an instruction's difficulty "
    "(arXiv 2404.04475).",
    "ROUGE-L: F with Porter's stemmer, times 100, as Tk-Instruct's compute_metrics.py and Self-Instruct report it.",
    "Overlap: words are runs of letters and digits, case aside. 13 and 8 are the longest and the shortest n-grams by "
    "which GPT-3's authors called an example contaminated (arXiv 2005.14165, appendix C).",
)


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
    utils.jdump(report, folder / "report.json", indent=2)
    if png is not None:
        with utils.replace_file(folder / "report.png", "wb") as file:
            file.write(png)
    with utils.replace_file(folder / "report.html") as file:
        file.write(page(report, png))
    return ["report.json", *(["report.png"] if png else []), "report.html"]


# ---------------------------------------------------------------------------------------------------------------------
# Figures as text.


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"


def with_interval(value: float | None, interval: Sequence[float | None], scale: float = 100.0, unit: str = "%") -> str:
    """ "50.2% (45.0–55.4)"; a dash where there is no figure."""
    if value is None:
        return "–"
    text = f"{scale * value:.{1 if scale == 100 else 3}f}{unit}"
    if interval[0] is None:
        return text
    low, high = (f"{scale * end:.{1 if scale == 100 else 3}f}" for end in interval)
    return f"{text} ({low} to {high})"


def _judge_table(report: dict) -> list[list[str]]:
    head = ["judge", "items", "wins", "ties", "losses", "failed", "win rate", "p", "at equal length", "first preferred"]
    rows = [head]
    for judge in report["judges"]:
        length, position = judge["length"], judge["position"]
        rows.append(
            [
                judge["judge"],
                *(f"{judge[key]:,}" for key in ("judged", "wins", "ties", "losses", "failed")),
                with_interval(judge["win_rate"], judge["interval"]),
                f"{judge['p']:.4f}",
                with_interval(length["length_controlled"], length["interval"]),
                percent(position["share_first"]) if position else "–",
            ]
        )
    return rows


def _reference_table(report: dict) -> list[list[str]]:
    head = ["answers of", "answered", "characters", "ROUGE-L", "over the first's", "reference loss", "perplexity"]
    rows = [head]
    for each in report["answerers"]:
        rouge, difference, loss = each["rouge_l"], each["rouge_l_difference"], each["loss"]
        rows.append(
            [
                each["name"],
                f"{each['answered']:,}",
                f"{each['characters']:,.0f}",
                with_interval(rouge["mean"], rouge["interval"], unit="") if rouge else "–",
                with_interval(difference["mean"], difference["interval"], unit="") if difference else "–",
                with_interval(loss["mean"], loss["interval"], 1, "") if loss else "–",
                f"{loss['perplexity']:.2f}" if loss else "–",
            ]
        )
    return rows


def _agreement_table(report: dict) -> list[list[str]]:
    rows = [["judges", "kinds", "items", "same verdict", "Cohen's kappa"]]
    for pair in report["agreement"]["pairs"]:
        kappa = "–" if pair["kappa"] is None else f"{pair['kappa']:.2f}"
        rows.append([" and ".join(pair["judges"]), pair["kinds"], f"{pair['items']:,}", percent(pair["raw"]), kappa])
    return rows


def _alpha(report: dict) -> str:
    parts = [
        f"Krippendorff's alpha of {who}: {report['agreement'][key]:.2f}."
        for key, who in (("alpha_people", "the people"), ("alpha", "all judges"))
        if report["agreement"][key] is not None
    ]
    return " ".join(parts)


def _overlap_words(overlap: dict) -> str:
    parts = [
        f"{g['shared']} of the {g['long_enough']} instructions of {g['n']} words or more share {g['n']} words in a row"
        for g in overlap["ngrams"]
    ]
    same, both, above = len(overlap["same_instruction"]), len(overlap["same_task"]), overlap["above_duplicate"]
    return (
        f"Of {overlap['file']} ({overlap['records']:,} records): {'; '.join(parts)}. {same} have the words of a "
        f"record's instruction, {both} those of its input too. The nearest instruction has a ROUGE-L of "
        f"{overlap['rouge_l']['highest']:.2f} (median over the set {overlap['rouge_l']['median']:.2f}); {above} are "
        "above 0.7, where the generator would have taken them for duplicates."
    )


# ---------------------------------------------------------------------------------------------------------------------
# The terminal.


def terminal(report: dict) -> str:
    """The figures as text, 100 columns or so wide."""
    lines = [f"{report['set']['file']}: {report['set']['items']:,} instructions{_the_252(report)}"]
    for judge in report["judges"]:
        lines += ["", f"{judge['judge']}:"]
        for words in filter(None, (judge["words"], judge["position_words"])):
            lines += _wrap(words, "  ", "  ")
    if report["judges"]:
        lines += ["", f"wins, losses and rates of {report['answerers'][0]['name']}", *_columns(_judge_table(report))]
    lines += ["", *_columns(_reference_table(report))]
    if report["agreement"] and report["agreement"]["pairs"]:
        lines += ["", *_columns(_agreement_table(report))]
        lines += [_alpha(report)] if _alpha(report) else []
    if report["overlap"]:
        lines += ["", *_wrap(_overlap_words(report["overlap"]))]
    notes = [line for note in report["notes"] for line in _wrap(f"note: {note}", "", "  ")]
    return "\n".join(lines + ([""] if notes else []) + notes)


def _wrap(text: str, first: str = "", later: str = "") -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=first, subsequent_indent=later, break_on_hyphens=False)


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _the_252(report: dict) -> str:
    return ", those that Self-Instruct published" if report["set"]["is_the_252"] else ""


# ---------------------------------------------------------------------------------------------------------------------
# The page.

MORE_STYLE = """
body { max-width: 60rem; }
.lead { margin: 1rem 0 0; color: var(--ink); font-size: 1.125rem; overflow-wrap: anywhere; }
h3 { margin: 2rem 0 .5rem; font-size: 1rem; overflow-wrap: anywhere; }
td, th { font-variant-numeric: tabular-nums; }
td:first-child { min-width: 9rem; }
td:not(:first-child), th:not(:first-child) { padding-left: .75rem; text-align: right; white-space: nowrap; }
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
    lead = "".join(f'<p class="lead">{esc(judge["words"])}</p>' for judge in report["judges"][:1])
    sections = [
        _picture(report, png),
        _judges(report),
        _lengths(report),
        _categories(report),
        _agreement(report),
        _section("Against the references", _table(_reference_table(report)) + _reference_words(report)),
        _overlap(report),
        _examples(report),
        _section("How this was computed", _list([*report["notes"], *METHOD])),
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
<p>{report["set"]["items"]:,} instructions of {esc(report["set"]["file"])}{_the_252(report)}. Made by
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
    head, *body = [[esc(cell) for cell in row] for row in rows]
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
    body = _list([f"Wins and rates are {a}'s, losses its defeats by {b}."]) + _table(_judge_table(report))
    biased = [judge for judge in report["judges"] if judge["position"] and judge["position"]["p"] < 0.05]
    body += _list(f"{judge['judge']}: {judge['position_words']}" for judge in biased)
    for judge in report["judges"]:
        body += _details(judge["judge"], _list(filter(None, (judge["words"], judge["position_words"]))))
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
    controlled = with_interval(length["length_controlled"], length["interval"])
    words = (
        f"{a}'s answers are {abs(length['longer']):,.0f} characters {'longer' if length['longer'] >= 0 else 'shorter'} "
        f"than {b}'s on average. At equal length its win rate would be {controlled}, against "
        f"{percent(judge['win_rate'])} as the answers are ({judge['judge']})"
    )
    if length["correlation"] is not None:
        words += f"; outcome and difference of length correlate by {length['correlation']:+.2f}".replace("-", "−")
    rows = [["characters longer", "wins", "ties", "losses", "win rate"]]
    for bin in length["bins"]:
        between = f"{report_plot.signed(bin['from'])} to {report_plot.signed(bin['to'])}"
        rows.append([between, *_counts(bin), with_interval(bin["win_rate"], bin["interval"])])
    return _list([words + "."]) + (_table(rows) if len(rows) > 1 else "")


def _counts(figures: dict) -> list[str]:
    return [f"{figures[key]:,}" for key in ("wins", "ties", "losses")]


def _categories(report: dict) -> str:
    if not report["judges"] or not any(c["category"] for c in report["judges"][0]["categories"]):
        return ""
    judge = report["judges"][0]
    rows = [["category", "wins", "ties", "losses", "win rate"]]
    for each in judge["categories"]:
        rate = with_interval(each["win_rate"], each["interval"])
        rows.append([each["category"] or "(none)", *_counts(each), rate])
    told = sum(each["win_rate"] is not None for each in judge["categories"])
    words = (
        f"{len(rows) - 1} categories, by {judge['judge']}; {told or 'none'} of them with ten verdicts or more. Of "
        "smaller ones no rate is told: its interval would reach over 30 points to each side. One in twenty intervals "
        "misses its true value by chance alone."
    )
    return _section("By category", _list([words]) + _details("The counts", _table(rows)))


def _agreement(report: dict) -> str:
    if not report["agreement"] or not report["agreement"]["pairs"]:
        return ""
    return _section("Do the judges agree?", _table(_agreement_table(report)) + _list(filter(None, [_alpha(report)])))


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
    body = _list([_overlap_words(overlap)]) + _details("The nearest instructions", near)
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
