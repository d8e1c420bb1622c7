"""Records → tokens, once for each content: the label rule, and an Arrow cache that all processes of a node map."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import tokenizers

from alpaca import UserError
from alpaca.chat_template import Unanswerable, chat_turns, messages_of, saved_template
from alpaca.common.shapes import task_key
from alpaca.common.text import check_utf8, counted
from alpaca.prompts import answer_ids, format_prompt, prompt_ids

IGNORE_INDEX = -100  # torch's cross entropy skips it

# In the cache's key: raise it when the same record gives other tokens or labels, or the cache's files change.
RULE_VERSION = 4


def make_example(prompt: list[int], answer: list[int], max_length: int) -> dict[str, list[int]]:
    """Return the row for an answer: ``input_ids``, and ``labels`` that are IGNORE_INDEX for the prompt."""
    labels = [IGNORE_INDEX] * len(prompt) + answer
    return {"input_ids": [*prompt, *answer][:max_length], "labels": labels[:max_length]}


def preprocess(records: list[dict], tokenizer, max_length: int) -> list[dict]:
    """Return the example of each record in Alpaca's prompt, cut to max_length tokens.

    The tokens are those of the prompt, exactly as chat sends it, then those of the answer, then EOS. The original
    tokenized prompt and answer together: the tokens are the same except where one token would span both. A special
    token in the data, such as "</s>", stays text.
    """
    prompts = prompt_ids(tokenizer, [format_prompt(record["instruction"], record["input"]) for record in records])
    answers = answer_ids(tokenizer, [record["output"] for record in records])
    eos = [tokenizer.eos_token_id]
    return [make_example(prompt, answer + eos, max_length) for prompt, answer in zip(prompts, answers, strict=True)]


def tokenize(records: Sequence[dict], tokenizer, max_length: int) -> list[list[dict]]:
    """Return the rows of each record, and for each row whether it was "cut".

    A tokenizer whose chat template is marked as trained writes conversations (preprocess_chat). With any other, the
    fields of a record are one row in Alpaca's prompt (preprocess).
    """
    if saved_template(tokenizer) == "chat":
        return preprocess_chat(records, tokenizer, max_length)
    examples, eos = preprocess(records, tokenizer, max_length), tokenizer.eos_token_id
    return [[row | {"cut": row["input_ids"][-1] != eos}] for row in examples]


def preprocess_chat(records: Sequence[dict], tokenizer, max_length: int) -> list[list[dict]]:
    """Return the rows of each record by the tokenizer's own chat template: as preprocess's, and whether each was "cut".

    Each answer follows the tokens that chat sends for it. Those of the second answer begin with the first one's row in
    most templates: then both are learned in that row. If a template writes earlier turns differently (Qwen3's leaves
    out thoughts), or a token spans an answer's end and what follows, the second answer gets its own row. Answers of
    weight 0 are not learned. Answers whose prompt alone fills max_length are left out.

    Raises:
        Unanswerable: the template cannot write a record; ``place`` is its index.
    """
    conversations = [messages_of(record) for record in records]
    rows: list[list[dict]] = [[] for _ in records]
    left = {i: _learned(messages) for i, messages in enumerate(conversations)}
    while left := {i: ends for i, ends in left.items() if ends}:  # the next answer of each, all in one batch
        try:
            turns = chat_turns(tokenizer, [conversations[i][: ends[0]] for i, ends in left.items()])
        except Unanswerable as e:
            raise Unanswerable(list(left)[e.place], str(e)) from None
        for (i, ends), (prompt, answer) in zip(left.items(), turns, strict=True):
            if len(prompt) < max_length:
                _add_turn(rows[i], prompt, answer)
                left[i] = ends[1:]
            else:
                left[i] = []
                rows[i][-1:] = [row | {"cut": True} for row in rows[i][-1:]]
    return [[_cut(row, max_length) for row in its_rows] for its_rows in rows]


def _learned(messages: Sequence[dict]) -> list[int]:
    """Return the number of messages up to and including each answer that is learned."""
    return [n for n, one in enumerate(messages, 1) if one["role"] == "assistant" and one.get("weight") != 0]


def _add_turn(rows: list[dict], prompt: list[int], answer: list[int]) -> None:
    """Add a turn to the last row if its prompt begins with that row, and as a new row otherwise."""
    if not rows or prompt[: len(rows[-1]["input_ids"])] != rows[-1]["input_ids"]:
        rows.append({"input_ids": [], "labels": [], "cut": False})
    row = rows[-1]
    row["labels"] += [IGNORE_INDEX] * (len(prompt) - len(row["labels"])) + answer
    row["input_ids"] = prompt + answer


def _cut(row: dict, max_length: int) -> dict:
    ids, labels = row["input_ids"], row["labels"]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length], "cut": row["cut"] or len(ids) > max_length}


class Records(list):
    """Some of a file's records, with the number of each in the file (from 1) in ``numbers``."""

    def __init__(self, records: list[dict], numbers: list[int]):
        super().__init__(records)
        self.numbers = numbers


def _numbers(records: Sequence[dict]) -> Sequence[int]:
    return getattr(records, "numbers", range(1, len(records) + 1))


def hold_out(records: list[dict], count: int, seed: int) -> tuple[Records, Records]:
    """Return (rest, held out): ``count`` records drawn at random are held out.

    Records with the same task (task_key) go to the same side. If there are any, the number may differ a little from
    ``count``; it is 0 only if ``count`` is, or if all records have the same task.
    """
    groups: dict[tuple, list[int]] = {}
    for i, record in enumerate(records if count else ()):
        groups.setdefault(task_key(record), []).append(i)
    every, draw, chosen = list(groups.values()), random.Random(seed), set()
    first = draw.sample(every, min(count, len(every)))  # all of these, where no record has a copy
    every = draw.sample(every, len(every))
    for group in [*first, *every]:
        if len(chosen) + len(group) <= count and chosen.isdisjoint(group):
            chosen.update(group)
    left, larger = count - len(chosen), [group for group in every if chosen.isdisjoint(group)]
    smallest = min(larger, key=len, default=[])
    if len(chosen) + len(smallest) < len(records) and (not chosen or len(smallest) - left < left):
        chosen.update(smallest)
    parts = [[i for i in range(len(records)) if (i in chosen) == out] for out in (False, True)]
    return tuple(Records([records[i] for i in part], [i + 1 for i in part]) for part in parts)


def asked_in_both(records: list[dict], held_out: list[dict]) -> list[int]:
    """Return the numbers, from 1, of the held-out records that ask what one of ``records`` asks."""
    asked = set(map(task_key, records))
    return [number for number, record in enumerate(held_out, 1) if task_key(record) in asked]


class SupervisedDataset:
    """Tokenized records, memory-mapped. Those whose prompt alone fills max_length teach nothing and are left out.

    The tokenizer's chat template decides how: see tokenize.

    Attributes:
        examples: the rows, a ``datasets.Dataset`` of ``input_ids`` and ``labels`` (int32 lists of one length).
        lengths: tokens of each example.
        numbers: the number of each example's record, from 1, in its file (for ``Records``) or in ``records``. Several
            examples may come from one conversation.
        cut: numbers of the records that were cut to their first max_length tokens.
        left_out: numbers of the records that were left out.
        summary: one line about all of this.

    Raises:
        UserError: no example is left, a record is not text or the template fails on it, the cache cannot be written.
    """

    def __init__(self, records: list[dict], tokenizer, max_length: int, name: str):
        every = _numbers(records)
        for number, record in zip(every, records, strict=True):
            texts = [record["instruction"], record["input"], record["output"]]
            texts += [message["content"] for message in record.get("messages") or ()]
            check_utf8("".join(texts), f"{name} record {number}")
        try:
            table = load_tokens(records, tokenizer, max_length)
        except Unanswerable as e:
            raise Unanswerable(e.place, f"{name} record {every[e.place]}: {e}") from None
        self.numbers = [every[place - 1] for place in table["record"][:]]
        self.cut = sorted({number for number, cut in zip(self.numbers, table["cut"][:], strict=True) if cut})
        self.left_out = sorted(set(every).difference(self.numbers))
        self.lengths: list[int] = table["length"][:]
        self.examples = table.select_columns(["input_ids", "labels"])
        several = "" if (count := len(set(self.numbers))) == len(self) else f" of {counted(count, 'record')}"
        rows, tokens = counted(len(self), "example"), counted(sum(self.lengths), "token")
        self.summary = (
            f"{name}: {rows}{several}, {tokens}; {len(self.cut)} cut to "
            f"{max_length} tokens, {len(self.left_out)} left out (the prompt alone is longer)"
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> dict:
        return self.examples[i]


def check_template(records: Sequence[dict], tokenizer, name: str) -> None:
    """Raise Unanswerable if the chat template fails on a record: one per sequence of roles is tried."""
    tried: set[tuple[str, ...]] = set()
    for number, record in zip(_numbers(records), records, strict=True):
        roles = tuple(message["role"] for message in messages_of(record))
        if roles not in tried:
            tried.add(roles)
            try:
                preprocess_chat([record], tokenizer, 10**9)
            except Unanswerable as e:
                raise Unanswerable(e.place, f"{name} record {number}: {e}") from None


def columns(examples: Sequence[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return (ids, lengths, labels, lengths of labels): int64 arrays, all examples end to end.

    ``examples`` is a ``datasets.Dataset`` (read as Arrow, without a Python object per token), an object with one as its
    ``examples``, or any sequence of {"input_ids", "labels"}.
    """
    import datasets

    examples = getattr(examples, "examples", examples)
    if not isinstance(examples, datasets.Dataset):
        examples = datasets.Dataset.from_list([examples[i] for i in range(len(examples))])
    table, found = examples.with_format("arrow")[:], []
    for name in ("input_ids", "labels"):
        column = table.column(name).combine_chunks()
        found += [part.to_numpy(zero_copy_only=False) for part in (column.flatten(), column.value_lengths())]
    return tuple(array.astype(np.int64) for array in found)


# ---------------------------------------------------------------------------------------------------------------------
# The cache: one Arrow file per content, made by one process, mapped by all.


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alpaca" / "tokens"


def load_tokens(records: list[dict], tokenizer, max_length: int):
    """Return the rows of ``records`` that have a label, from the cache, which is filled first if needed.

    ``datasets`` makes a cache folder completely or not at all, and admits one process of a node at a time.

    Returns:
        A memory-mapped ``datasets.Dataset``, in the records' order: ``input_ids``, ``labels`` (lists of int32),
        ``record`` (its number, from 1), ``length`` (tokens), ``cut`` (whether the record is longer).
    """
    import datasets  # takes 1 s: only where something is tokenized
    from datasets.exceptions import DatasetGenerationError

    int32s = datasets.List(datasets.Value("int32"))
    numbers = {name: datasets.Value("int32") for name in ("record", "length")}
    features = datasets.Features({"input_ids": int32s, "labels": int32s, **numbers, "cut": datasets.Value("bool")})
    options = {"fingerprint": content_key(records, tokenizer, max_length), "cache_dir": str(cache_folder())}
    datasets.disable_progress_bars()
    try:
        return datasets.Dataset.from_generator(partial(_rows, records, tokenizer, max_length), features, **options)
    except (OSError, DatasetGenerationError) as e:
        cause = e.__cause__ or e
        if not isinstance(cause, OSError):
            raise cause from None
        where = f"{cause.filename or cache_folder()}: {cause.strerror or cause}"
        raise UserError(f"the token cache cannot be written, {where}: set XDG_CACHE_HOME to another folder") from None


def _rows(records: Sequence[dict], tokenizer, max_length: int) -> Iterator[dict]:
    """Yield the rows that have a label. One process: the tokenizer itself uses all cores."""
    count = 0
    for start in range(0, len(records), 1000):  # so that few Python lists are held at a time
        try:
            examples = tokenize(records[start : start + 1000], tokenizer, max_length)
        except Unanswerable as e:
            raise Unanswerable(start + e.place, str(e)) from None
        for number, rows in enumerate(examples, start + 1):
            for row in rows:
                if any(label != IGNORE_INDEX for label in row["labels"]):
                    count += 1
                    yield {**row, "record": number, "length": len(row["input_ids"])}
    if not count:  # datasets cannot read a table of none
        raise UserError(f"no example fits in {max_length} tokens: raise model_max_length")


def content_key(records: list[dict], tokenizer, max_length: int) -> str:
    """Return a hash of everything that decides the tokens: records, tokenizer, max_length, rule."""
    if not tokenizer.is_fast:
        raise UserError("this tokenizer is a slow one, without offsets: convert it to a tokenizer.json")
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["truncation"] = core["padding"] = None  # settings of its last call
    rule = [RULE_VERSION, tokenizers.__version__, max_length, core]
    rule += [tokenizer.chat_template, tokenizer.special_tokens_map]
    digest = hashlib.sha256(json.dumps(rule, sort_keys=True).encode())
    for record in records:
        digest.update(json.dumps(record, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:32]
