"""What is wrong with a record of instruction data: one pure function a class, text in, evidence or None out.

The classes are the ten that AlpacaDataCleaned lists for the released 52,002 records, as far as a program can see them,
and the marks that a teacher, its prompt and its stop string leave behind. Precision comes before recall: a rule in
doubt says nothing. What they find on released records was read and judged one by one; docs/LOG.md has the figures.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

from rapidfuzz.distance import LCSseq
from tqdm import tqdm

from alpaca.data.lint import answers as lint_answers
from alpaca.data.lint import questions as lint_questions
from alpaca.data.lint.text import around, input_of
from alpaca.data.rouge import tokenize

NEAR_DUPLICATE = 0.7  # ROUGE-L F, as in the generator, but of instruction and input together


# ---------------------------------------------------------------------------------------------------------------------
# Records that are there twice.


def duplicates(records: list[dict]) -> dict[int, str]:
    """Index of each later copy → its original: same instruction and input, whatever the case and the white space."""
    first: dict[tuple, int] = {}
    found = {}
    for i, record in enumerate(records):
        key = tuple(" ".join(record[field].split()).casefold() for field in ("instruction", "input"))
        if first.setdefault(key, i) != i:
            found[i] = f"same instruction and input as record {first[key]}"
    return found


def near_duplicates(records: list[dict], threshold: float = NEAR_DUPLICATE) -> dict[int, str]:
    """Index of each record whose instruction and input have ROUGE-L F > threshold with an earlier kept one → evidence.

    Copies that duplicates() names are left out. The decisions are those of comparing with every kept record in order
    (tests/test_analyze_data.py has that oracle), but few pairs are compared. With t the threshold, F > t means
    2·lcs > t·(m + n). So n is between m·r and m/r with r = t/(2 - t), and more than m·r of the m tokens are shared.
    Of the m - floor(m·r) rarest tokens of one text at least one is then among as many rarest of the other: only texts
    that meet in such a token are verified.
    """
    tokens = [tokenize(f"{record['instruction']} {input_of(record)}") for record in records]
    frequency = Counter(token for text in tokens for token in text)
    # One character a token, the rarest first, and from behind the surrogates, which no encoder accepts.
    character = {token: chr(0xE000 + i) for i, token in enumerate(sorted(frequency, key=frequency.get))}
    texts = ["".join(character[token] for token in text) for text in tokens]
    cut = threshold - 1e-9  # the margin keeps rounding from pruning a pair at the threshold
    ratio = cut / (2 - cut)
    holders: dict[tuple[str, int], list[int]] = defaultdict(list)
    copies, found = duplicates(records), {}
    for i, text in enumerate(texts):
        if i in copies:
            continue
        length, seen, bag = len(text), Counter(), []
        for token in text:  # the second "the" of a text meets only the second "the" of another
            bag.append((token, seen[token]))
            seen[token] += 1
        rarest = sorted(bag)[: length - int(length * ratio)]
        for j in sorted({j for key in rarest for j in holders[key]}):
            other = texts[j]
            if not length * ratio < len(other) < length / ratio:
                continue
            lcs = LCSseq.similarity(text, other)
            if 2 * lcs <= cut * (length + len(other)):
                continue
            precision, recall = lcs / len(other), lcs / length
            f = 2 * precision * recall / (precision + recall)  # in this order: the floats of alpaca/data/rouge.py
            if f > threshold:
                found[i] = f"ROUGE-L {f:.2f} with record {j}: {around(records[j]['instruction'], 0, 60)}"
                break
        else:
            for key in rarest:
                holders[key].append(i)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# All classes, in the order of the report: why a record of it is bad, and who finds it.

RECORD_CLASSES: dict[str, tuple[str, Callable[[dict], str | None]]] = {
    "empty-output": ("the output is empty", lint_answers.empty_output),
    "na-output": ("the output says N/A where an answer should be", lint_answers.na_output),
    "input-field": ('the input says that there is none: it should be ""', lint_answers.input_field),
    "link": ("asks about a page behind a link: the answer is made up", lint_questions.link),
    "missing-input": ("refers to text that is not there: the answer is made up", lint_questions.missing_input),
    "empty-code": ("the code that it speaks of is not there", lint_questions.empty_code),
    "needs-media": ("asks to make or to look at a picture", lint_questions.needs_media),
    "nonsense": ("the instruction makes no sense", lint_questions.nonsense),
    "merged": ("the next task or the teacher's prompt runs on inside", lint_answers.merged),
    "cut-off": ("the output is cut off", lint_answers.cut_off),
    "no-full-stop": ("the last sentence has no end", lint_answers.no_full_stop),
    "wrong-arithmetic": ("a calculation is wrong", lint_answers.wrong_arithmetic),
    "mojibake": ("text that was decoded with the wrong encoding", lint_answers.mojibake),
    "stray-escape": ("escape or control characters that belong to no code", lint_answers.stray_escape),
}
SET_CLASSES: dict[str, tuple[str, Callable[[list[dict]], dict[int, str]]]] = {
    "duplicate": ("an earlier record asks the same in the same words", duplicates),
    "near-duplicate": ("an earlier record asks almost the same in almost the same words", near_duplicates),
}
CLASSES = {name: reason for name, (reason, _) in (RECORD_CLASSES | SET_CLASSES).items()}
OPT_IN = {"no-full-stop"}  # under 80% precision: docs/LOG.md


def find(records: list[dict], classes: set[str]) -> list[dict]:
    """All findings of these classes, by record: {"record": index from 0, "class", "reason", "evidence"}."""
    found = []
    rules = [(name, *rest) for name, rest in RECORD_CLASSES.items() if name in classes]
    for i, record in enumerate(tqdm(records, desc="lint", unit="record", disable=None)):
        found += [(i, name, reason, text) for name, reason, rule in rules if (text := rule(record))]
    for name, (reason, rule) in SET_CLASSES.items():
        if name in classes:
            found += [(i, name, reason, text) for i, text in rule(records).items()]
    keys = ("record", "class", "reason", "evidence")
    return [dict(zip(keys, finding, strict=True)) for finding in sorted(found, key=lambda finding: finding[0])]
