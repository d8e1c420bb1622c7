"""judge.py's task ``report``, to be merged into judge.py."""

from __future__ import annotations

import hashlib
from pathlib import Path

import utils
from alpaca import UserError
from alpaca.instruction_set import Answers, Item, is_the_252, read_answers, read_set

EXAMPLES = 5  # of the clearest wins, and of the clearest losses


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

    Without judgments it holds what needs no judge: ROUGE-L and a model's loss on the set's reference answers, the
    overlap with the training data.

    Args:
        instructions: the instruction set that was answered.
        answers: files of answers to it, with commas between: A.jsonl,B.jsonl. Wins are A's.
        output_dir: folder for the three files.
        judgments: files that the task judge wrote about A and B, with commas between, one or more a judge.
        data_path: training data in the Alpaca format, to look for the instructions in it.
        seed: of the draws behind the bootstrap intervals.
    """
    from alpaca import overlap, reference, report_page, verdicts  # numpy, rapidfuzz: the other tasks do without

    items = read_set(instructions)
    answerers = [read_answers(path, items) for path in _paths("answers", answers)]
    names = [each.generator for each in answerers]
    if len(set(names)) < len(names):
        raise UserError(f'--answers are of {", ".join(names)}: a name twice; give each a "generator" of its own')
    judges, agreement, examples = [], None, []
    if judgments is not None and len(answerers) != 2:
        raise UserError(f"--judgments compare two answerers, --answers names {len(answerers)}: give A.jsonl,B.jsonl")
    references, scores = reference.summary(items, answerers, seed)
    if judgments is not None:
        rows = verdicts.read_judgments(_paths("judgments", judgments))
        asks = verdicts.read_asks(rows, *names, _hashes(answerers))
        found = verdicts.fold(asks)
        found.sort(key=lambda verdict: verdict.kind != "person")  # people first: the first judge is the headline
        judges = [_judge(name, asks, found, items, answerers, seed) for name in dict.fromkeys(v.judge for v in found)]
        for entry in judges:
            entry["settings"] = next(
                row["judge"]
                for row, name in zip(rows, verdicts.judge_names(rows), strict=True)
                if name == entry["judge"]
            )
        people = [verdict for verdict in found if verdict.kind == "person"]
        if len({verdict.judge for verdict in people}) > 1:
            judges.insert(0, _judge(verdicts.PEOPLE, [], verdicts.majority(people), items, answerers, seed))
        agreement = verdicts.agreement(found)
        examples = _examples(found, items, answerers, scores)
    records = utils.load_records(data_path) if data_path else None
    result = {
        "set": {
            "file": Path(instructions).name,
            "items": len(items),
            "is_the_252": is_the_252(instructions),
            "without_reference": sum(item.reference is None for item in items),
        },
        "answerers": [_answerer(each) | metrics for each, metrics in zip(answerers, references, strict=True)],
        "judges": judges,
        "agreement": agreement,
        "examples": examples,
        "overlap": overlap.summary(items, records) | {"file": Path(data_path).name} if records else None,
        "seed": seed,
        "notes": _notes(scores, answerers, judges),
    }
    result = verdicts.without_nan(result)
    print(report_page.terminal(result))
    for name in report_page.write(result, output_dir):
        print(f"wrote {Path(output_dir) / name}")


def _paths(flag: str, text: str) -> list[str]:
    paths = [path.strip() for path in text.split(",")]
    if not all(paths):
        raise UserError(f"--{flag} {text!r} names no file between two commas: give A.jsonl,B.jsonl")
    return paths


def _hashes(answerers: list[Answers]) -> dict[tuple[str, str], str]:
    return {
        (id, each.generator): hashlib.sha256(text.encode()).hexdigest()
        for each in answerers
        for id, text in each.outputs.items()
    }


def _answerer(answers: Answers) -> dict:
    lengths = [len(text) for text in answers.outputs.values()]
    return {
        "name": answers.generator,
        "answered": len(lengths),
        "unanswered": len(answers.unanswered),
        "empty": lengths.count(0),
        "characters": sum(lengths) / len(lengths),
    }


def _judge(name: str, asks: list, found: list, items: list[Item], answerers: list[Answers], seed: int) -> dict:
    """All figures of one judge."""
    from alpaca import verdicts

    own, own_asks = [v for v in found if v.judge == name], [ask for ask in asks if ask.judge == name]
    a, b = (each.outputs for each in answerers)
    lengths = {id: (len(a[id]), len(b[id])) for id in a if id in b}
    rate = verdicts.win_rate(own, seed)
    position = verdicts.position_bias(own_asks, seed) if own_asks else None  # a majority has seen nothing first
    return {
        "judge": name,
        "kind": own[0].kind if own else "person",
        **rate,
        "not_asked": len(items) - len(own),
        "words": verdicts.in_words(rate, *(each.generator for each in answerers)),
        "position": position,
        "position_words": verdicts.position_in_words(position) if position else None,
        "length": verdicts.length_bias(own, lengths, seed),
        "categories": verdicts.by_category(own, {item.id: item.category for item in items}),
    }


def _examples(found: list, items: list[Item], answerers: list[Answers], scores: list[dict] | None) -> list[dict]:
    """The clearest wins of both sides, whole."""
    from alpaca import verdicts

    by_id = {item.id: item for item in items}
    witness = {id: scores[0][id] - scores[1][id] for id in scores[0] if id in scores[1]} if scores else {}
    examples = []
    for side, winner in zip((1.0, 0.0), answerers, strict=True):
        for id in verdicts.clearest(found, side, witness, EXAMPLES):
            item = by_id[id]
            examples.append(
                {
                    "winner": winner.generator,
                    "id": id,
                    "category": item.category,
                    "instruction": item.instruction,
                    "input": item.input,
                    "reference": item.reference,
                    "answers": {each.generator: each.outputs[id] for each in answerers},
                    "verdicts": {
                        v.judge: {1.0 - side: "lost", 0.5: "tie", side: "won"}[v.outcome]
                        for v in found
                        if v.id == id and v.outcome is not None
                    },
                }
            )
    return examples


def _notes(scores: list[dict] | None, answerers: list[Answers], judges: list[dict]) -> list[str]:
    """What a reader must know before taking the figures for what they look like."""
    notes = []
    if scores is None:
        notes.append("ROUGE-L was left out: nltk, whose stemmer it needs, is not installed (pip install '.[judge]').")
    for each in answerers:
        if each.unanswered:
            count = len(each.unanswered)
            notes.append(f"{each.generator} left {count} instruction{'s' * (count > 1)} unanswered, not counted here.")
    for judge in judges:
        if judge["failed"]:
            notes.append(f"{judge['judge']} failed on some items ({judge['failed']}): left out, not counted as ties.")
        if judge["not_asked"]:
            notes.append(f"{judge['judge']} has not judged {judge['not_asked']} of the instructions.")
        if 0 < judge["judged"] < 30:
            notes.append(
                f"{judge['judge']} judged {judge['judged']} items: of fewer than 30, intervals are too narrow."
            )
    return notes
