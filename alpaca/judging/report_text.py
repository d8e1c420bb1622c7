"""A report as text: the sentences and tables that the terminal and the page both show, and what the terminal gets.

A report is the dictionary that judge.py report writes as report.json; None stands for a figure that does not exist.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from alpaca.data.instruction_sets import Answers

METHOD = (
    "Win rate: wins and half of the ties, of all items with a verdict. A model is asked in both orders; where it "
    "contradicts itself the item is a tie, and where an ask failed the item is left out.",
    "Two equal answers are a tie; agreement between judges leaves them out.",
    "Where several people judged, their majority is the side that more of them chose, whatever number saw a tie.",
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
FEW = 30  # items: of fewer, a bootstrap interval is too narrow


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


def judge_table(report: dict) -> list[list[str]]:
    head = ["judge", "items", "wins", "ties", "losses", "failed", "win rate", "p", "at equal length", "first preferred"]
    rows = [head]
    for judge in report["judges"]:
        length, position = judge["length"], judge["position"]
        rows.append(
            [
                judge["judge"],
                *(f"{judge[key]:,}" for key in ("judged", "wins", "ties", "losses", "failed")),
                with_interval(judge["win_rate"], judge["interval"]),
                f"{judge['p']:.4f}" if judge["judged"] else "–",
                with_interval(length["length_controlled"], length["interval"]),
                percent(position["share_first"]) if position else "–",
            ]
        )
    return rows


def reference_table(report: dict) -> list[list[str]]:
    rows = [["answers of", "answered", "characters", "ROUGE-L", "over the first's", "reference loss", "perplexity"]]
    compared = any(each["loss_difference"] for each in report["answerers"])
    if compared:
        rows[0].append("loss over the first's")
    for each in report["answerers"]:
        rouge, difference, loss = each["rouge_l"], each["rouge_l_difference"], each["loss"]
        row = [each["name"], f"{each['answered']:,}", f"{each['characters']:,.0f}"]
        row += [_mean(rouge, 100), _mean(difference, 100), _mean(loss, 1)]
        row.append(f"{loss['perplexity']:.2f}" if loss else "–")
        rows.append(row + [_mean(each["loss_difference"], 1)] * compared)
    return rows


def _mean(figure: dict | None, scale: float) -> str:
    return with_interval(figure["mean"], figure["interval"], scale, "") if figure else "–"


def agreement_table(report: dict) -> list[list[str]]:
    rows = [["judges", "kinds", "items", "same verdict", "Cohen's kappa"]]
    for pair in report["agreement"]["pairs"]:
        kappa = "–" if pair["kappa"] is None else f"{pair['kappa']:.2f}"
        rows.append([" and ".join(pair["judges"]), pair["kinds"], f"{pair['items']:,}", percent(pair["raw"]), kappa])
    return rows


def agreement_words(report: dict) -> str:
    """Over all pairs of a kind, where there are several; and over all judges at once."""
    found = report["agreement"]
    parts = [
        f"{kind['kinds']}: the same verdict in {percent(kind['raw'])} of {kind['items']:,} comparisons by "
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


def words(judge: dict) -> list[str]:
    return [text for text in (judge["words"], judge["length_words"], judge["position_words"]) if text]


def asked_with(judge: dict) -> list[str]:
    """How a model was asked: who answered, the prompt, the settings. One line a way."""
    said = []
    for way in judge["asked_with"] if judge["kind"] == "model" else ():
        settings = way.get("settings")
        facts = [f"prompt {way['prompt_sha256'][:8]}"] if way.get("prompt_sha256") else []
        facts += [f"{name} {value}" for name, value in settings.items()] if isinstance(settings, dict) else []
        by = f"; its server names {way['answered_by']}" if way.get("answered_by") else ""
        said.append(f"Asked with {', '.join(facts) or 'nothing that is known'}{by}.")
    return said


def overlap_words(overlap: dict) -> str:
    shared = "; ".join(
        f"{g['n']} words in a row with a record: {g['shared']} of the {g['long_enough']} that are so long"
        for g in overlap["ngrams"]
    )
    return (
        f"Searched in {overlap['file']} ({overlap['records']:,} records). Instructions with their input that share "
        f"{shared}. Whose instruction has a record's words: {len(overlap['same_instruction'])}, and its input too: "
        f"{len(overlap['same_task'])}. Highest ROUGE-L to a record's instruction: {overlap['rouge_l']['highest']:.2f} "
        f"(median over the set {overlap['rouge_l']['median']:.2f}); above 0.7, where the generator drops a candidate "
        f"as a duplicate: {overlap['above_duplicate']}."
    )


# ---------------------------------------------------------------------------------------------------------------------
# The terminal.


def terminal(report: dict) -> str:
    """The figures as text, 100 columns or so wide."""
    lines = [f"{report['set']['file']}: {report['set']['items']:,} instructions{the_252(report)}"]
    for judge in report["judges"]:
        lines += ["", f"{judge['judge']}:"]
        for said in words(judge):
            lines += _wrap(said, "  ", "  ")
    if report["judges"]:
        lines += ["", f"wins, losses and rates of {report['answerers'][0]['name']}", *_columns(judge_table(report))]
    lines += ["", *_columns(reference_table(report))]
    if report["agreement"] and report["agreement"]["pairs"]:
        lines += ["", *_columns(agreement_table(report))]
        lines += _wrap(agreement_words(report))
    if report["overlap"]:
        lines += ["", *_wrap(overlap_words(report["overlap"]))]
    notes = [line for note in report["notes"] for line in _wrap(f"note: {note}", "", "  ")]
    return "\n".join(lines + ([""] if notes else []) + notes)


def _wrap(text: str, first: str = "", later: str = "") -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=first, subsequent_indent=later, break_on_hyphens=False)


def _short(name: str, most: int = 60) -> str:
    """A name without its middle if it is long: the end may be what tells two judges of one name apart."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[1 - most // 2 :]}"


def _columns(rows: list[list[str]]) -> list[str]:
    rows = [[_short(name), *figures] for name, *figures in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def the_252(report: dict) -> str:
    return ", those that Self-Instruct published" if report["set"]["is_the_252"] else ""


def notes(found: dict, answerers: list[Answers], no_rouge: bool) -> list[str]:
    """What a reader must know before taking the figures for what they look like."""
    said = []
    if no_rouge:
        said.append("ROUGE-L was left out: nltk, whose stemmer it needs, is not installed (pip install '.[judge]').")
    if unseen := found["set"]["unseen_by_rouge"]:
        said.append(f"ROUGE-L knows no letters but a to z: {unseen} of the references are mostly of others.")
    for one in answerers:
        if one.unanswered:
            few = ", ".join(one.unanswered[:3]) + (", …" if len(one.unanswered) > 3 else "")
            said.append(f"{one.generator} has no answer to {len(one.unanswered)} instructions, left out: {few}")
    for one in found["answerers"]:
        if one["cut"]:
            said.append(f"{one['cut']} of {one['name']}'s {one['answered']} answers were cut off: it had more to say.")
        if one["loss_not_finite"]:
            said.append(f"{one['name']}'s loss is no finite number on {one['loss_not_finite']} references: left out.")
    for judge in found["judges"]:
        if judge["failed"]:
            said.append(f"{judge['judge']} failed on some items ({judge['failed']}): left out, not counted as ties.")
        if judge["kind"] == "model" and (ways := len(judge["asked_with"])) > 1:
            said.append(
                f"{judge['judge']} was asked in {ways} ways, or answered by {ways} models: where it judged the same "
                "twice, the last counts."
            )
        elif judge["repeated"]:
            said.append(
                f"{judge['judge']} judged again what it had judged ({judge['repeated']} of its rows): of each ask the "
                "last row counts."
            )
        if judge["not_judged"]:
            said.append(f"{judge['judge']} has not judged {judge['not_judged']} of the answered instructions.")
        if 0 < judge["judged"] < FEW:
            said.append(f"{judge['judge']} judged {judge['judged']} items: of so few, intervals are too narrow.")
    return said
