"""A report as text: each sentence and table, written once for the terminal, the page and report.json.

A report is the dictionary that judge.py report writes as report.json; None is a missing figure.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from alpaca.common.text import counted, printable
from alpaca.data.dedup import MAX_SIMILARITY
from alpaca.data.instruction_sets import Answers
from alpaca.judging.statistics import FEWEST

FEW = 30  # items; with fewer, a bootstrap interval is too narrow
COUNTS = ("wins", "ties", "losses")


# ---------------------------------------------------------------------------------------------------------------------
# Figures.


def signed(number: int) -> str:
    return f"{number:+,}".replace("-", "−") if number else "0"


def p_value(p: float) -> str:
    """Return a p-value to follow "p ": never 0, and never rounded to 0.05."""
    return "< 0.0001" if p < 0.0001 else f"= {p:.4f}" if p < 0.1 else f"= {p:.2f}"


def without_middle(name: str, most: int = 60) -> str:
    """Return a name without its middle if it is long: only its end may distinguish two judges with the same name."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[1 - most // 2 :]}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"


def with_interval(
    value: float | None, interval: Sequence[float | None], scale: float = 100.0, unit: str = "%", sign: str = ""
) -> str:
    """Return "50.2% (45.0 to 55.4)", or a dash for a missing figure. The sign "+" is for differences."""
    if value is None:
        return "–"
    places = 1 if scale == 100 else 3
    text, low, high = (
        "" if each is None else f"{scale * each:{sign}.{places}f}".replace("-", "−") for each in (value, *interval)
    )
    return f"{text}{unit} ({low} to {high})" if low else text + unit


# ---------------------------------------------------------------------------------------------------------------------
# Sentences.


def win_words(rate: dict, a: str, b: str) -> str:
    """Return whether a difference in comparison.win_rate's figures is larger than chance, in a sentence or two."""
    if not rate["judged"]:
        return "There are no verdicts."
    decided, ties = rate["wins"] + rate["losses"], counted(rate["ties"], "tie")
    text = f"{a} wins {rate['wins']}, {b} {rate['losses']}, {ties}: {_rate(rate['win_rate'], rate['interval'], a)}. "
    if not decided:
        return text + "All are ties, so this says nothing about a difference."
    p = f"sign test, p {p_value(rate['p'])}"
    if rate["p"] < 0.05:
        return text + f"{a if rate['wins'] > rate['losses'] else b} wins more often than by chance ({p})."
    text += f"The difference is not significant ({p}). "
    if decided < FEWEST:
        few = counted(decided, "decided instruction")
        return text + f"A sign test of {few} cannot show one: it takes at least {FEWEST}."
    if rate["detectable"] >= 0.5 + decided / rate["judged"] / 2:  # more than if one side had won them all
        return text + f"{decided} decided instructions are too few to show any but the largest difference."
    return text + (
        f"{rate['judged']} instructions{' with so many ties' if rate['ties'] else ''} detect, four times in five, only "
        f"win rates above {rate['detectable']:.1%} or below {1 - rate['detectable']:.1%}."
    )


def _rate(share: float, interval: Sequence[float], a: str) -> str:
    within = "" if math.isnan(interval[0]) else f" (95% interval {interval[0]:.1%} to {interval[1]:.1%})"
    return f"a win rate of {share:.1%} for {a}{within}"


def position_words(position: dict) -> str:
    """Return whether a judge prefers a position rather than an answer, in a sentence or two."""
    if not position["decided"]:
        return "No comparison was decided, so position bias cannot be measured."
    share, asks = position["share_first"], counted(position["decided"], "decided comparison")
    text = f"The answer shown first was preferred in {share:.1%} of {asks} (p {p_value(position['p'])}): "
    if position["p"] < 0.05:
        text += f"{'more' if share > 0.5 else 'less'} often than by chance."
    elif position["decided_items"] < FEWEST:
        text += "too few to show position bias."
    else:
        text += "no significant position bias."
    if position["both_orders"]:
        text += f" In both orders, the verdict was the same for {position['agreed']:.1%} of the items."
    return text


def length_words(rate: dict, length: dict, a: str, b: str) -> str | None:
    """Return whether the verdict would change at equal length; None if it could not, or would not.

    A difference is larger than chance if the interval of the length-controlled win rate excludes one half.
    """
    if rate["wins"] + rate["losses"] < FEWEST:
        return None
    controlled, (low, high) = length["length_controlled"], length["interval"]
    figures = _rate(controlled, (low, high), a)
    if low <= 0.5 <= high:
        return f"At equal length the difference is no longer significant: {figures}." if rate["p"] < 0.05 else None
    if rate["p"] < 0.05 and (controlled > 0.5) == (rate["wins"] > rate["losses"]):
        return f"At equal length the difference remains: {figures}."
    return f"At equal length {a if controlled > 0.5 else b} would win more often: {figures}."


def words(judge: dict) -> list[str]:
    return [text for text in (judge["words"], judge["length_words"], judge["position_words"]) if text]


def set_words(report: dict) -> str:
    published = ", Self-Instruct's published set" if report["set"]["is_the_252"] else ""
    return f"{counted(report['set']['items'], 'instruction')} from {report['set']['file']}{published}"


def agreement_words(report: dict) -> str:
    """Return the agreement over all pairs of a kind, if there are several, and over all judges at once."""
    found = report["agreement"]
    parts = [
        f"{kind['kinds']}: the same verdict in {percent(kind['raw'])} of {counted(kind['items'], 'comparison')} by "
        f"{kind['pairs']} pairs."
        for kind in found["by_kinds"]
        if kind["pairs"] > 1
    ]
    parts += [
        f"Krippendorff's alpha of {who}: {found[key]:.2f}."
        for key, who in (("alpha_people", "the people"), ("alpha", "all judges"))
        if found[key] is not None
    ]
    return " ".join(parts)


def overlap_words(overlap: dict) -> str:
    each = "{n} consecutive words with a record: {shared} of the {long_enough} that are long enough"
    shared = "; ".join(each.format(**ngrams) for ngrams in overlap["ngrams"])
    return (
        f"Compared with {overlap['file']} ({counted(overlap['records'], 'record')}). Instructions (with input) that "
        f"share {shared}. Instructions with the same words as a record's: {len(overlap['same_instruction'])}, with the "
        f"same input too: {len(overlap['same_task'])}. Highest ROUGE-L to a record's instruction: "
        f"{overlap['rouge_l']['highest']:.2f} (median over the set {overlap['rouge_l']['median']:.2f}); above the "
        f"generator's threshold for near-duplicates, {MAX_SIMILARITY}: {overlap['above_duplicate']}."
    )


def notes(found: dict, answerers: list[Answers]) -> list[str]:
    """Return what a reader must know before trusting the figures."""
    said = []
    if unseen := found["set"]["unseen_by_rouge"]:
        said.append(f"ROUGE-L reads only a to z and 0 to 9, which omits most of {counted(unseen, 'reference')}.")
    for one in answerers:
        if one.unanswered:
            few = ", ".join(one.unanswered[:3]) + (", …" if len(one.unanswered) > 3 else "")
            missing = counted(len(one.unanswered), "instruction")
            said.append(f"{one.generator} has no answer to {missing}, which are left out: {few}")
    for one in found["answerers"]:
        if one["cut"]:
            answers = counted(one["answered"], "answer")
            said.append(f"{one['name']} was cut off in {one['cut']} of {answers}: raise max_new_tokens.")
        if not_finite := one["loss_not_finite"]:
            said.append(f"{one['name']}'s loss is not finite on {counted(not_finite, 'reference')}: left out.")
    for judge in found["judges"]:
        name = judge["judge"]
        if judge["failed"]:
            said.append(f"{name} gave no verdict on {counted(judge['failed'], 'item')}: left out, not counted as ties.")
        if judge["kind"] == "model" and (ways := len(judge["asked_with"])) > 1:
            said.append(
                f"{name} was asked in {ways} ways, or answered by {ways} models: of repeated judgments the last counts."
            )
        elif judge["repeated"]:
            said.append(f"{name} has {counted(judge['repeated'], 'row')} replaced by a later one on the same pair.")
        if judge["not_judged"]:
            said.append(f"{name} has not judged {judge['not_judged']} of the answered instructions.")
        if 1 < judge["judged"] < FEW:
            said.append(f"{name} judged only {judge['judged']} items: its intervals are too narrow.")
    return said


# ---------------------------------------------------------------------------------------------------------------------
# Tables: rows of cells, the header first.


def judge_table(report: dict) -> list[list[str]]:
    rows = [["judge", "items", *COUNTS, "failed", "win rate", "p", "at equal length", "first preferred"]]
    for judge in report["judges"]:
        length, position = judge["length"], judge["position"]
        row = [judge["judge"], *(f"{judge[key]:,}" for key in ("judged", *COUNTS, "failed"))]
        row += [with_interval(judge["win_rate"], judge["interval"]), f"{judge['p']:.4f}" if judge["judged"] else "–"]
        row.append(with_interval(length["length_controlled"], length["interval"]))
        rows.append([*row, percent(position["share_first"] if position else None)])
    return rows


def rate_table(what: str, groups: list[dict]) -> list[list[str]]:
    """Return counts and win rate of each bin of lengths, or of each category."""
    rows = [[what, *COUNTS, "win rate"]]
    for group in groups:
        name = f"{signed(group['from'])} to {signed(group['to'])}" if "from" in group else group["category"]
        figures = (f"{group[key]:,}" for key in COUNTS)
        rows.append([name or "(none)", *figures, with_interval(group["win_rate"], group["interval"])])
    return rows


def reference_table(report: dict) -> list[list[str]]:
    head = ["answers of", "answered", "characters", "ROUGE-L", "difference from the first", "reference loss"]
    compared = any(each["loss_difference"] for each in report["answerers"])
    rows = [[*head, "perplexity"] + ["loss difference"] * compared]
    for each in report["answerers"]:
        row = [each["name"], f"{each['answered']:,}", f"{each['characters']:,.0f}"]
        row += [_mean(each["rouge_l"], 100), _mean(each["rouge_l_difference"], 100, "+"), _mean(each["loss"], 1)]
        row.append(f"{each['loss']['perplexity']:.2f}" if each["loss"] else "–")
        rows.append(row + [_mean(each["loss_difference"], 1, "+")] * compared)
    return rows


def _mean(figure: dict | None, scale: float, sign: str = "") -> str:
    return with_interval(figure["mean"], figure["interval"], scale, "", sign) if figure else "–"


def agreement_table(report: dict) -> list[list[str]]:
    rows = [["judges", "kinds", "items", "same verdict", "Cohen's kappa"]]
    for pair in report["agreement"]["pairs"]:
        kappa = "–" if pair["kappa"] is None else f"{pair['kappa']:.2f}"
        rows.append([" and ".join(pair["judges"]), pair["kinds"], f"{pair['items']:,}", percent(pair["raw"]), kappa])
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The terminal.


def terminal(report: dict) -> str:
    """Return the figures as text, about 100 columns wide."""
    lines = [set_words(report)]
    for judge in report["judges"]:
        lines += ["", f"{judge['judge']}:"]
        for said in words(judge):
            lines += _wrap(said, "  ", "  ")
    if report["judges"]:
        lines += ["", f"wins, losses and rates of {report['answerers'][0]['name']}", *_columns(judge_table(report))]
    lines += ["", *_columns(reference_table(report))]
    if report["agreement"] and report["agreement"]["pairs"]:
        lines += ["", *_columns(agreement_table(report)), *_wrap(agreement_words(report))]
    if report["overlap"]:
        lines += ["", *_wrap(overlap_words(report["overlap"]))]
    said = [line for note in report["notes"] for line in _wrap(f"note: {note}", "", "  ")]
    return printable("\n".join(lines + ([""] if said else []) + said))


def _wrap(text: str, first: str = "", later: str = "") -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=first, subsequent_indent=later, break_on_hyphens=False)


def _columns(rows: list[list[str]]) -> list[str]:
    rows = [[without_middle(name), *figures] for name, *figures in rows]
    name_width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        "  ".join([name.ljust(name_width), *(cell.rjust(w) for cell, w in zip(figures, widths, strict=True))])
        for name, *figures in rows
    ]
