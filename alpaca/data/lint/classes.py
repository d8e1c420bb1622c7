"""The classes of faults that lint looks for, and the search for all of them.

A rule is a pure function: a record in, evidence or None out. The classes are the ten that AlpacaDataCleaned lists for
the released 52,002 records, as far as a program can see them, and the marks that a teacher, its prompt and its stop
string leave behind. Precision comes before recall: a rule in doubt reports nothing. Its findings on released records
were read and judged one by one; docs/LOG.md has the figures.
"""

from __future__ import annotations

from collections.abc import Callable

from tqdm import tqdm

from alpaca.data.dedup import MAX_SIMILARITY, DistinctPool
from alpaca.data.lint import answers, questions
from alpaca.data.lint.fields import around, input_of
from alpaca.data.rouge import RougePool

# ---------------------------------------------------------------------------------------------------------------------
# Rules for the set as a whole.


def duplicates(records: list[dict]) -> dict[int, str]:
    """Return {index of a later copy: evidence}: same instruction and input, ignoring case and white space."""
    first: dict[tuple, int] = {}
    found = {}
    for i, record in enumerate(records):
        key = tuple(" ".join(record[field].split()).casefold() for field in ("instruction", "input"))
        if first.setdefault(key, i) != i:
            found[i] = f"same instruction and input as record {first[key]}"
    return found


def near_duplicates(records: list[dict], threshold: float = MAX_SIMILARITY) -> dict[int, str]:
    """Return {index: evidence} of each record whose instruction and input have ROUGE-L F > threshold with a kept one.

    Records are taken in order, as in dedup; those that ``duplicates`` finds are left out.
    """
    copies = duplicates(records)
    texts = {i: f"{r['instruction']} {input_of(r)}" for i, r in enumerate(records) if i not in copies}
    distinct, kept, found = DistinctPool(threshold=threshold, similarity_stats=False), [], {}
    distinct.pool.learn(texts.values())
    for i, (nearest, _) in zip(texts, distinct.take(list(texts.values())), strict=True):
        if nearest is None:
            kept.append(i)
            continue
        other = kept[nearest]
        (f,) = RougePool([texts[other]]).scores(texts[i])
        found[i] = f"ROUGE-L {f:.2f} with record {other}: {around(records[other]['instruction'], 0, 60)}"
    return found


# ---------------------------------------------------------------------------------------------------------------------
# All classes, in the order of the report: why such a record is bad, and the rule that finds it.

RECORD_CLASSES: dict[str, tuple[str, Callable[[dict], str | None]]] = {
    "empty-output": ("the output is empty", answers.empty_output),
    "na-output": ("the output says N/A where an answer should be", answers.na_output),
    "input-field": ('the input says "no input" or the like: it should be ""', answers.input_field),
    "link": ("asks about a page behind a link: the answer is made up", questions.link),
    "missing-input": ("refers to text that is not there: the answer is made up", questions.missing_input),
    "empty-code": ("the code that it refers to is not there", questions.empty_code),
    "needs-media": ("asks to make or to look at a picture", questions.needs_media),
    "nonsense": ("the instruction makes no sense", questions.nonsense),
    "merged": ("contains the next task or the teacher's prompt", answers.merged),
    "cut-off": ("the output is cut off", answers.cut_off),
    "no-full-stop": ("the last sentence has no end", answers.no_full_stop),
    "wrong-arithmetic": ("a calculation is wrong", answers.wrong_arithmetic),
    "mojibake": ("text that was decoded with the wrong encoding", answers.mojibake),
    "stray-escape": ("escape sequences or control characters outside code", answers.stray_escape),
}
SET_CLASSES: dict[str, tuple[str, Callable[[list[dict]], dict[int, str]]]] = {
    "duplicate": ("an earlier record asks the same in the same words", duplicates),
    "near-duplicate": ("an earlier record asks almost the same in almost the same words", near_duplicates),
}
CLASSES = {name: reason for name, (reason, _) in (RECORD_CLASSES | SET_CLASSES).items()}
OPT_IN = {"no-full-stop"}  # under 80% precision: docs/LOG.md


def find(records: list[dict], classes: set[str]) -> list[dict]:
    """Return all findings of these classes, by record: {"record": index from 0, "class", "reason", "evidence"}."""
    found = []
    rules = [(name, rule) for name, (_, rule) in RECORD_CLASSES.items() if name in classes]
    for i, record in enumerate(tqdm(records, desc="lint", unit="record", disable=None)):
        found += [(i, name, text) for name, rule in rules if (text := rule(record))]
    for name, (_, rule) in SET_CLASSES.items():
        if name in classes:
            found += [(i, name, text) for i, text in rule(records).items()]
    found.sort(key=lambda finding: finding[0])
    return [{"record": i, "class": name, "reason": CLASSES[name], "evidence": text} for i, name, text in found]
