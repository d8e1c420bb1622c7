"""The classes of faults that lint looks for, and the search for all of them.

A rule is a pure function: a record in, evidence or None out. Of a conversation it sees the first question and answer.
The classes are the ten that AlpacaDataCleaned lists for the released 52,002 records, as far as a program can see them,
and the marks that a teacher, its prompt and its stop string leave behind. Precision comes before recall: a rule in
doubt reports nothing. Its findings on released records were read and judged one by one; docs/LOG.md has the figures.
"""

from __future__ import annotations

from collections.abc import Callable

from tqdm import tqdm

from alpaca.common.shapes import task_key, whole_text, without_system
from alpaca.data.dedup import MAX_SIMILARITY
from alpaca.data.lint import answers, arithmetic, marks, questions
from alpaca.data.lint.fields import around, input_of, symbols
from alpaca.data.rouge import RougePool

# ---------------------------------------------------------------------------------------------------------------------
# Rules for the set as a whole.

FROM_1 = range(1, 1 << 40)  # records' numbers, unless their places in the file are given


def duplicates(records: list[dict], numbers=FROM_1) -> dict[int, str]:
    """Return {index of a later copy: evidence}: a record with the same task as an earlier one."""
    first: dict[tuple, int] = {}
    copies = {i: n for i, record in enumerate(records) if (n := first.setdefault(task_key(record), i)) != i}
    return {i: f"same instruction and input as record {numbers[n]}" for i, n in copies.items()}


def near_duplicates(records: list[dict], threshold: float = MAX_SIMILARITY, numbers=FROM_1) -> dict[int, str]:
    """Return {index: evidence} of each record whose instruction and input have ROUGE-L F > threshold with a kept one.

    The instruction of a conversation is all its questions. Records are taken in order, as in dedup; those that
    ``duplicates`` finds are left out. ROUGE-L sees the words of any script, but no symbols: only records with the same
    symbols are compared. If both have an input, those must be near too: one long instruction may come with many inputs.
    """
    copies, found = duplicates(records), {}
    texts = {i: f"{whole_text(r)} {input_of(r)}" for i, r in enumerate(records) if i not in copies}
    groups: dict[str, list[int]] = {}
    for i, text in texts.items():
        groups.setdefault(symbols(text), []).append(i)
    for group in groups.values():
        pool, kept = RougePool(tokenizer="unicode"), []

        def is_new(n: int, nearest: int | None, group: list[int] = group, kept: list[int] = kept) -> bool:
            i, other = group[n], None if nearest is None else kept[nearest]
            inputs = [input_of(records[n]) for n in (i, other) if n is not None]
            if new := other is None or (all(inputs) and _rouge_l(*inputs) <= threshold):
                kept.append(i)
            else:
                start = around(whole_text(records[other]), 0, 60)
                found[i] = f"ROUGE-L {_rouge_l(texts[i], texts[other]):.2f} with record {numbers[other]}: {start}"
            return new

        pool.learn(texts[i] for i in group)
        pool.admit([texts[i] for i in group], threshold, is_new)
    return found


def _rouge_l(a: str, b: str) -> float:
    return RougePool([b], "unicode").scores(a)[0]


# ---------------------------------------------------------------------------------------------------------------------
# All classes, in the order of the report: why such a record is bad, and the rule that finds it.

RECORD_CLASSES: dict[str, tuple[str, Callable[[dict], str | None]]] = {
    "empty-output": ("the output is empty", answers.empty_output),
    "na-output": ("the output says N/A where an answer should be", answers.na_output),
    "input-field": ('the input says "no input" or similar: it should be ""', answers.input_field),
    "link": ("asks about the page of a link: the answer is made up", questions.link),
    "missing-input": ("refers to missing text: the answer is made up", questions.missing_input),
    "empty-code": ("refers to missing code", questions.empty_code),
    "needs-media": ("asks to make or look at a picture", questions.needs_media),
    "nonsense": ("the instruction makes no sense", questions.nonsense),
    "merged": ("contains the next task or the teacher's prompt", answers.merged),
    "chat-token": ("contains a chat template's token or a model's thoughts", marks.chat_token),
    "as-an-ai": ("the output mentions being an AI model, unasked", marks.as_an_ai),
    "error-text": ("a server's error message instead of an answer", marks.error_text),
    "label": ('the output starts with "Output:" or similar', marks.label),
    "chatter": ("the output ends with an offer to the user", marks.chatter),
    "echo": ("the output starts with a copy of the instruction", marks.echo),
    "repetition": ("the output repeats one sentence", marks.repetition),
    "cut-off": ("the output is cut off", answers.cut_off),
    "no-full-stop": ("the last sentence has no end", answers.no_full_stop),
    "wrong-arithmetic": ("a calculation is wrong", arithmetic.wrong_arithmetic),
    "mojibake": ("text decoded with the wrong encoding", answers.mojibake),
    "stray-escape": ("escape sequences or control characters outside code", answers.stray_escape),
}
SET_CLASSES: dict[str, tuple[str, Callable[..., dict[int, str]]]] = {
    "duplicate": ("same instruction and input as an earlier record", duplicates),
    "near-duplicate": ("almost the same instruction and input as an earlier record", near_duplicates),
}
CLASSES = {name: reason for name, (reason, _) in (RECORD_CLASSES | SET_CLASSES).items()}
OPT_IN = {"no-full-stop"}  # under 80% precision: docs/LOG.md


def find(records: list[dict], classes: set[str], numbers=FROM_1) -> list[dict]:
    """Return all findings of these classes, by record: {"record": its number, "class", "reason", "evidence"}."""
    found = []
    rules = [(name, rule) for name, (_, rule) in RECORD_CLASSES.items() if name in classes]
    for i, record in enumerate(tqdm(records, desc="lint", unit="record", disable=None)):
        seen = without_system(record)
        found += [(i, name, text) for name, rule in rules if (text := rule(seen))]
    for name in sorted(SET_CLASSES.keys() & classes):
        found += [(i, name, text) for i, text in SET_CLASSES[name][1](records, numbers=numbers).items()]
    found.sort(key=lambda finding: finding[0])
    return [{"record": numbers[i], "class": name, "reason": CLASSES[name], "evidence": text} for i, name, text in found]
