"""judge.py's task ``report``, to be merged into judge.py."""

from __future__ import annotations

from pathlib import Path

import utils
from alpaca import UserError
from alpaca.instruction_set import Answers, is_the_252, read_answers, read_set

EXAMPLES = 5  # of the clearest wins, and of the clearest losses
FEW = 30  # items: of fewer, a bootstrap interval is too narrow


# ---------------------------------------------------------------------------------------------------------------------
# report


def report(
    instructions: str,
    answers: str,
    output_dir: str,
    judgments: str | None = None,
    data_path: str | None = None,
    seed: int = 0,
) -> None:
    """Says who is better, and whether by more than chance: report.json, report.png and report.html in OUTPUT_DIR.

    Without judgments it holds what needs no judge: ROUGE-L and the models' loss on the set's reference answers, and
    the overlap with training data.

    Args:
        instructions: the instruction set that was answered.
        answers: files of answers to it, with commas between: A.jsonl,B.jsonl. Wins are A's.
        output_dir: folder for the three files.
        judgments: files that the task judge wrote about A and B, of one judge or several, with commas between.
        data_path: training data in Alpaca's format, to look for the instructions in it.
        seed: of the draws behind the bootstrap intervals.
    """
    # numpy, rapidfuzz and what draws: the other tasks do without
    from alpaca import comparison, overlap, reference, report_page, report_text, rouge, verdicts

    items = read_set(instructions)
    answerers = [read_answers(path, items) for path in _paths("answers", answers)]
    names = [one.generator for one in answerers]
    if len(set(names)) < len(names):
        raise UserError(f'--answers are by {", ".join(names)}: give each another name ("generator" in its rows)')
    if judgments is not None and len(answerers) != 2:
        raise UserError(
            f"--judgments compare two answerers, and --answers names {len(answerers)}: give A.jsonl,B.jsonl"
        )

    found: dict = {
        "set": {
            "file": Path(instructions).name,
            "items": len(items),
            "is_the_252": is_the_252(instructions),
            "without_reference": sum(item.reference is None for item in items),
            "unseen_by_rouge": sum(rouge.is_mostly_unseen(item.reference or "") for item in items),
        },
        "judges": [],
        "agreement": None,
        "examples": [],
        "overlap": None,
        "seed": seed,
    }
    found["answerers"], scores = reference.summary(items, answerers, seed)
    if judgments is not None:
        rows = verdicts.read_judgments(_paths("judgments", judgments))
        asks = verdicts.read_asks(rows, *answerers)
        found["judges"], found["agreement"], folded = comparison.judge_figures(asks, items, *answerers, seed)
        for figures in found["judges"]:
            figures["asked_with"] = verdicts.settings_of(rows, figures["judge"])
        # What a person or a model took for a clear win, ROUGE-L may bear out: it breaks ties between examples.
        margins = {id: scores[0][id] - scores[1][id] for id in scores[0] if id in scores[1]} if scores else {}
        found["examples"] = comparison.examples(folded, items, *answerers, margins, EXAMPLES)
    if data_path is not None:
        records = utils.load_records(data_path)
        found["overlap"] = {"file": Path(data_path).name} | overlap.summary(items, records)
    found["notes"] = _notes(found, answerers, scores is None)

    found = comparison.without_nan(found)
    print(report_text.terminal(found))
    for name in report_page.write(found, output_dir):
        print(f"wrote {Path(output_dir) / name}")


def _paths(flag: str, text: str) -> list[str]:
    paths = [path.strip() for path in text.split(",")]
    if not all(paths):
        raise UserError(f"--{flag} {text!r} names no file beside a comma: give A.jsonl,B.jsonl")
    return paths


def _notes(found: dict, answerers: list[Answers], no_rouge: bool) -> list[str]:
    """What a reader must know before taking the figures for what they look like."""
    notes = []
    if no_rouge:
        notes.append("ROUGE-L was left out: nltk, whose stemmer it needs, is not installed (pip install '.[judge]').")
    if unseen := found["set"]["unseen_by_rouge"]:
        notes.append(f"ROUGE-L knows no letters but a to z: {unseen} of the references are mostly of others.")
    for one in answerers:
        if one.unanswered:
            few = ", ".join(one.unanswered[:3]) + (", …" if len(one.unanswered) > 3 else "")
            notes.append(f"{one.generator} has no answer to {len(one.unanswered)} instructions, left out: {few}")
    for judge in found["judges"]:
        if judge["failed"]:
            notes.append(f"{judge['judge']} failed on some items ({judge['failed']}): left out, not counted as ties.")
        if judge["not_judged"]:
            notes.append(f"{judge['judge']} has not judged {judge['not_judged']} of the answered instructions.")
        if 0 < judge["judged"] < FEW:
            notes.append(f"{judge['judge']} judged {judge['judged']} items: of so few, intervals are too narrow.")
    return notes
