"""Checks of the tokenizer and of every tokenized example, before training starts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from alpaca.common.text import counted, printable
from alpaca.training.examples import IGNORE_INDEX, SupervisedDataset, columns
from alpaca.training.preflight.findings import Finding, colour_wanted, paint


def check_tokenizer(tokenizer, rows: int, config=None) -> Iterator[Finding]:
    """Check special tokens and whether the ids fit the model; call it before missing tokens are added.

    Args:
        tokenizer: a fast tokenizer, as loaded.
        rows: number of rows of the model's input embedding.
        config: the model's, as loaded; None skips the comparison with it.
    """
    added = set(tokenizer.get_added_vocab().values())
    beyond = sorted(id_ for id_ in tokenizer.get_vocab().values() if id_ >= rows)
    if words := [id_ for id_ in beyond if id_ not in added]:
        count = counted(len(words), "token")
        what = f"the tokenizer has {count} beyond the model's {rows} rows (ids {words[0]} to {words[-1]})"
        why = "it belongs to another model: its ids mean other words to this one"
        yield Finding("error", what, why, "use the tokenizer files of the base model")
    elif beyond:
        name, count = tokenizer.convert_ids_to_tokens(beyond[0]), counted(len(beyond), "added token")
        what = f"{count} without a row in the model ({name!r})"
        cure = "none needed if they were added on purpose, without resizing the model"
        yield Finding("warning", what, "they get rows that start as the mean of all rows", cure)
    for role in ("bos", "eos", "pad", "unk"):
        if getattr(tokenizer, f"{role}_token") == "":
            why = "early LLaMA conversions have this fault; an empty EOS is never trained, and answers never end"
            cure = f"it was replaced for this run; set {role}_token in tokenizer_config.json"
            yield Finding("warning", f"the tokenizer's {role} token is empty ('')", why, cure)
    if tokenizer.bos_token and tokenizer("a")["input_ids"][:2] == [tokenizer.bos_token_id] * 2:
        cure = "remove one: add_bos_token, or the post-processor in tokenizer.json"
        yield Finding("warning", "the tokenizer adds BOS twice", "the base model was not trained on that", cure)
    if not (eos := tokenizer.eos_token):
        return
    eos_id, as_text = tokenizer.convert_tokens_to_ids(eos), tokenizer(eos, add_special_tokens=False)["input_ids"]
    if as_text != [eos_id]:
        what = f"the EOS token {eos!r} is not one id: as text it becomes {as_text}"
        cure = "mark it as special (added_tokens) in tokenizer.json, or use the base model's own tokenizer"
        yield Finding("error", what, "the model would never see it as one token", cure)
    named = getattr(config, "eos_token_id", None)
    if named is not None and eos_id not in (named if isinstance(named, list) else [named]):
        what = f"EOS is id {named} in the model's config and {eos_id} in the tokenizer"
        why = "answers will end with the tokenizer's EOS, which the base model may use for something else"
        cure = "check which is right for this model; old LLaMA conversions have a wrong config"
        yield Finding("warning", what, why, cure)


def check_examples(dataset: SupervisedDataset, eos_id: int, max_length: int) -> list[Finding]:
    """Report records that teach something unwanted, or nothing. 52,000 examples take about a second.

    Args:
        dataset: the training data.
        eos_id: the token at the end of each answer.
        max_length: where examples were cut, in tokens.
    """
    _, lengths, labels, _ = columns(dataset)
    record = np.repeat(np.asarray(dataset.numbers), lengths)  # of each token
    after_prompt = np.roll(labels, 1) == IGNORE_INDEX  # an example begins with its prompt
    longer = "raise model_max_length, or remove these records"
    every, findings = len({*dataset.numbers, *dataset.left_out}), []

    def warn(numbers, what: str, why: str, cure: str) -> None:
        if numbers := sorted(set(map(int, numbers))):  # of tokens; several examples may come from one record, too
            listed = ", ".join(map(str, numbers[:10])) + (", …" if len(numbers) > 10 else "")
            what = f"{len(numbers)} of {every} records {what} (record{'s' * (len(numbers) > 1)} {listed})"
            findings.append(Finding("warning", what, why, cure))

    cure = "remove these records (python analyze_data.py lint finds more)"
    warn(record[(labels == eos_id) & after_prompt], "with an empty answer", "the model learns to say nothing", cure)
    why = "the model learns neither what was cut nor where these answers end"
    warn(dataset.cut, f"cut to {max_length} tokens", why, longer)
    what = f"left out, as the prompt alone fills {max_length} tokens"
    warn(dataset.left_out, what, "they teach nothing", longer)
    return findings


def _marked(text: str, learned: bool) -> str:
    """Return text in green if it is learned, dim if not; without colour, in «…» or as it is."""
    return paint(text, "32" if learned else "2") if colour_wanted() else f"«{text}»" if learned else text


def show_example(example: dict, tokenizer) -> str:
    """Return the text of an example, with what is learned marked."""
    ids, parts, before = example["input_ids"], [], ""
    for learned, places in itertools.groupby(range(len(ids)), lambda i: example["labels"][i] != IGNORE_INDEX):
        # Decode everything up to here: decoded alone, the answer of a LLaMA tokenizer would lose its first space.
        text = printable(tokenizer.decode(ids[: max(places) + 1]))
        parts.append(_marked(text[len(before) :], learned))
        before = text
    return "".join(parts)


def show_border(example: dict, tokenizer) -> str:
    """Return the tokens at the first border, the prompt's last two and the answer's first three, marked as above."""
    ids, first = example["input_ids"], [label != IGNORE_INDEX for label in example["labels"]].index(True)
    begin = max(0, first - 3)  # one more: some decoders remove the space in front of their first token
    texts = [tokenizer.decode(ids[begin:end]) for end in range(begin, min(first + 3, len(ids)) + 1)]
    tokens = [repr(after[len(before) :]) for before, after in itertools.pairwise(texts)]  # no control character is left
    return f"{_marked(' '.join(tokens[1 : first - begin]), False)} {_marked(' '.join(tokens[first - begin :]), True)}"
