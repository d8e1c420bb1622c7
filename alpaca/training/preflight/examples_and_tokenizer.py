"""What must be true of a tokenizer, and of every tokenized example, before training starts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from alpaca.common.text import printable
from alpaca.training.examples import IGNORE_INDEX, columns
from alpaca.training.preflight.findings import Finding, paint

ROLES = ("bos", "eos", "pad", "unk")
LISTED = 10  # record numbers that a finding names


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer.


def check_tokenizer(tokenizer, rows: int, config=None) -> list[Finding]:
    """Check special tokens, BOS and whether the ids fit the model; call it before missing tokens are added.

    Args:
        tokenizer: a fast tokenizer as it was loaded.
        rows: number of rows of the model's input embedding.
        config: the model's, as it was loaded; None skips the comparison with it.
    """
    found = [*_special_tokens(tokenizer), *_bos(tokenizer), *_rows(tokenizer, rows)]
    eos = getattr(config, "eos_token_id", None)
    known = eos if isinstance(eos, list) else [eos]
    if eos is not None and tokenizer.eos_token and tokenizer.eos_token_id not in known:
        what = f"the model's config ends text with id {eos}, the tokenizer with {tokenizer.eos_token_id}"
        why = "answers will end with the tokenizer's EOS, which the base model may have used for something else"
        cure = "check which of the two is right for this model; old conversions of LLaMA have a wrong config"
        found.append(Finding("warning", what, why, cure))
    return found


def _special_tokens(tokenizer) -> Iterator[Finding]:
    ids = {}
    for role in ROLES:
        token = getattr(tokenizer, f"{role}_token")
        if token is None:
            continue
        if token == "":
            why = "conversions of LLaMA made this mistake; an empty EOS is never trained, and answers never end"
            cure = f"another token takes its place; better set {role}_token in tokenizer_config.json"
            yield Finding("warning", f"the tokenizer's {role} token is empty ('')", why, cure)
            continue
        token_id = tokenizer.convert_tokens_to_ids(token)
        as_text = tokenizer(token, add_special_tokens=False)["input_ids"]
        if token_id is None or as_text != [token_id]:
            what = f"the {role} token {token!r} is not one id: as text it becomes {as_text}"
            cure = "mark it as special (added_tokens) in tokenizer.json, or use the tokenizer made with the model"
            level = "error" if role == "eos" else "warning"
            yield Finding(level, what, "the model would never see it as one token", cure)
            continue
        ids[role] = token_id
    for a, b in itertools.combinations(ROLES, 2):
        if a not in ids or ids[a] != ids.get(b):
            continue
        what = f"{a} and {b} are the same token ({getattr(tokenizer, f'{a}_token')!r}, id {ids[a]})"
        if (a, b) == ("eos", "unk"):
            cure = "give eos a token of its own in tokenizer_config.json"
            yield Finding("warning", what, "what the tokenizer cannot read would end an answer", cure)
        else:
            yield Finding("note", what, "masks and labels come from lengths, not from this id: EOS is still trained")


def _bos(tokenizer) -> Iterator[Finding]:
    ids, bos = tokenizer("a")["input_ids"], tokenizer.bos_token_id
    begins = bool(ids) and bool(tokenizer.bos_token) and ids[0] == bos
    if getattr(tokenizer, "add_bos_token", None) and not begins:
        what = f"the tokenizer says add_bos_token, but puts no BOS in front ({ids[:2]} for 'a')"
        cure = "set bos_token in tokenizer_config.json, or add_bos_token false if the model was trained without"
        yield Finding("warning", what, "a base model that was trained with BOS answers worse without it", cure)
    elif len(ids) > 1 and begins and ids[1] == bos:
        cure = "remove one: add_bos_token, or the post processor in tokenizer.json"
        yield Finding("warning", "the tokenizer puts BOS in front twice", "the model has never seen that", cure)
    elif begins:
        yield Finding("note", f"BOS ({tokenizer.bos_token!r}) is put in front of each example")
    else:
        first = f"{tokenizer.convert_ids_to_tokens(ids[0])!r}" if len(ids) > 1 else "nothing"
        yield Finding("note", f"no BOS: {first} is put in front of an example")


def _rows(tokenizer, rows: int) -> Iterator[Finding]:
    added = set(tokenizer.get_added_vocab().values())
    beyond = sorted(id_ for id_ in tokenizer.get_vocab().values() if id_ >= rows)
    if words := [id_ for id_ in beyond if id_ not in added]:
        what = f"the tokenizer has {len(words)} tokens beyond the model's {rows} rows (ids {words[0]} to {words[-1]})"
        why = "it belongs to another model: its ids mean other words to this one"
        yield Finding("error", what, why, "use the tokenizer files of the model that is trained")
    elif beyond:
        what = f"{len(beyond)} added tokens have no row in the model ({tokenizer.convert_ids_to_tokens(beyond[0])!r})"
        cure = "nothing, if the folder's maker added them without resizing the model"
        yield Finding("warning", what, "they get rows that start as the mean of all rows", cure)
    elif len(tokenizer) < 0.9 * rows:
        what = f"the tokenizer has {len(tokenizer)} tokens, the model {rows} rows"
        why = "models pad their rows by a few percent; a larger gap suggests another model's tokenizer"
        yield Finding("warning", what, why, "compare with the tokenizer files of the model that is trained")


# ---------------------------------------------------------------------------------------------------------------------
# The examples.

DEFECT = "this is a defect in how the data was tokenized: report it with one of these records"
# By the name of a mask (check_examples, _measured): what the finding says about the examples in it.
CHECKS = {
    "lengths differ": Finding("error", "have another number of labels than tokens", "the loss is wrong", DEFECT),
    "short": Finding("error", "have less than two tokens", "there is nothing to predict", "remove these records"),
    "outside": Finding(
        "error",
        "have token ids outside the model's {rows} rows",
        "the lookup fails (on a GPU as a device-side assert that names no cause)",
        "use the tokenizer of the model that is trained",
    ),
    "no label": Finding("error", "have no label", "a batch of them has the loss 0/0", "raise model_max_length"),
    "no mask": Finding("error", "are not masked at the start", "the model would learn the prompt", DEFECT),
    "wrong": Finding("error", "have labels that are not their answer", "the model would learn noise", DEFECT),
    "no eos": Finding(
        "error",
        "do not end with a supervised EOS (id {eos_id}) though they were not cut",
        "the model would not learn to stop: answers that never end",
        "check eos_token in tokenizer_config.json",
    ),
    "early eos": Finding(
        "warning",
        "have EOS inside the answer",
        "the model learns to stop there",
        "the data contains a special token: remove it from these records",
    ),
    "empty": Finding(
        "warning",
        "have an empty answer",
        "the model learns to say nothing",
        "remove these records (python analyze_data.py lint names more)",
    ),
    "cut": Finding(
        "warning",
        "do not fit in {max_length} tokens and were cut",
        "the model learns neither what was cut nor where these answers end",
        "raise model_max_length, or remove these records",
    ),
}


def check_examples(
    examples: Sequence[dict],
    eos_id: int,
    rows: int,
    max_length: int,
    record_numbers: Sequence[int] | None = None,
    left_out: Sequence[int] = (),
) -> list[Finding]:
    """Check what is masked, supervised and cut in every example. 52,000 examples take about a second.

    Args:
        examples: see ``columns``.
        eos_id: the token that must be learned at the end of each answer.
        rows: number of rows of the model's input embedding.
        max_length: where examples were cut, in tokens.
        record_numbers: the number of each example's record, from 1; None: its position, records left out included.
        left_out: numbers of the records that were left out because their prompt alone fills max_length.
    """
    if not len(examples):
        cure = "check the data, and raise model_max_length"
        return [Finding("error", "no example is left after filtering", "there is nothing to learn from", cure)]
    ids, lengths, labels, label_lengths = columns(examples)
    if record_numbers is None:
        record_numbers = np.setdiff1d(np.arange(1, len(lengths) + len(left_out) + 1), left_out)
    masks = {"lengths differ": lengths != label_lengths, "short": lengths < 2}
    if not any(bad.any() for bad in masks.values()):
        masks = _measured(ids, lengths, labels, eos_id, rows, max_length)
    found = []
    for name, bad in masks.items():
        if bad.any():
            check, numbers = CHECKS[name], np.asarray(record_numbers)[bad]
            what = check.what.format(eos_id=eos_id, rows=rows, max_length=max_length)
            what = f"{len(numbers)} of {len(bad)} examples {what} ({_listed(numbers)})"
            found.append(Finding(check.level, what, check.why, check.cure))
    if len(left_out):
        why = f"their prompt alone fills {max_length} tokens"
        what = f"{len(left_out)} records were left out: {why} ({_listed(left_out)})"
        found.append(Finding("warning", what, "they teach nothing", CHECKS["cut"].cure))
    return found


def _measured(ids, lengths, labels, eos_id: int, rows: int, max_length: int) -> dict[str, np.ndarray]:
    """Return which examples have each defect in CHECKS, as bool arrays; every example has at least two tokens."""
    starts, last = np.cumsum(lengths) - lengths, np.cumsum(lengths) - 1
    supervised = labels != IGNORE_INDEX
    begins, ends = supervised.copy(), supervised.copy()  # of each answer
    begins[1:] &= ~supervised[:-1]
    begins[starts] = supervised[starts]
    ends[:-1] &= ~supervised[1:]
    ends[last] = supervised[last]
    is_eos, unended = labels == eos_id, ends & (labels != eos_id)
    unended[last] = False  # see "no eos"
    cut = ~is_eos[last] & (lengths >= max_length)
    return {
        "outside": np.logical_or.reduceat((ids < 0) | (ids >= rows), starts),
        "no label": ~np.logical_or.reduceat(supervised, starts),
        "no mask": supervised[starts],
        "wrong": np.logical_or.reduceat(unended | (supervised & (labels != ids)), starts),
        "no eos": np.logical_or.reduceat(supervised, starts) & ~is_eos[last] & ~cut,
        "early eos": np.logical_or.reduceat(supervised & is_eos & ~ends, starts),
        "empty": np.logical_or.reduceat(begins & ends & is_eos, starts),
        "cut": cut,
    }


def _listed(numbers: Sequence[int]) -> str:
    numbers = np.unique(numbers)  # several examples may come from one record
    return f"record {', '.join(map(str, numbers[:LISTED]))}" + (", …" if len(numbers) > LISTED else "")


def show_example(example: dict, tokenizer, colour: bool) -> str:
    """Return the text of an example: masked text dim, supervised text green; without colour between «…»."""
    ids, labels = list(example["input_ids"]), list(example["labels"])
    learned = [label != IGNORE_INDEX for label in labels]
    borders = [i for i in range(1, len(ids)) if learned[i] != learned[i - 1]]
    parts, before = [], ""
    for begin, end in itertools.pairwise([0, *borders, len(ids)]):
        # Decoded alone, the answer of a LLaMA tokenizer would lose its first space.
        text = printable(tokenizer.decode(ids[:end]))
        part = text[len(before) :] if text.startswith(before) else printable(tokenizer.decode(ids[begin:end]))
        before = text
        if colour:
            parts.append(paint(part, "32" if learned[begin] else "2", True))
        else:
            parts.append(f"«{part}»" if learned[begin] else part)
    return "".join(parts)


def show_border(example: dict, tokenizer, colour: bool) -> str:
    """Return the last two tokens of an example's prompt and the first three of its answer, marked as in its text."""
    ids, labels = list(example["input_ids"]), list(example["labels"])
    first = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    begin = max(0, first - 3)  # one more: some decoders remove the space in front of their first token
    texts = [tokenizer.decode(ids[begin:end]) for end in range(begin, min(first + 3, len(ids)) + 1)]
    tokens = [repr(after[len(before) :]) for before, after in itertools.pairwise(texts)]  # no control character is left
    prompt, answer = " ".join(tokens[1 : first - begin]), " ".join(tokens[first - begin :])
    return f"{paint(prompt, '2', True)} {paint(answer, '32', True)}" if colour else f"{prompt} «{answer}»"
