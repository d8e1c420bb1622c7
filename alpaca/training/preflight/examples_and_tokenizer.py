"""What must be true of a tokenizer, and of every tokenized example, before training starts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from alpaca.common.text import printable
from alpaca.training.examples import IGNORE_INDEX, SupervisedDataset, columns
from alpaca.training.preflight.findings import Finding, colour_wanted, paint

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
    return [*_special_tokens(tokenizer, config), *_bos(tokenizer), *_rows(tokenizer, rows)]


def _special_tokens(tokenizer, config) -> Iterator[Finding]:
    for role in ("bos", "eos", "pad", "unk"):
        if getattr(tokenizer, f"{role}_token") == "":
            why = "conversions of LLaMA made this mistake; an empty EOS is never trained, and answers never end"
            cure = f"another token takes its place; better set {role}_token in tokenizer_config.json"
            yield Finding("warning", f"the tokenizer's {role} token is empty ('')", why, cure)
    eos = tokenizer.eos_token
    if not eos:
        return
    eos_id, as_text = tokenizer.convert_tokens_to_ids(eos), tokenizer(eos, add_special_tokens=False)["input_ids"]
    if as_text != [eos_id]:
        what = f"the eos token {eos!r} is not one id: as text it becomes {as_text}"
        cure = "mark it as special (added_tokens) in tokenizer.json, or use the tokenizer made with the model"
        yield Finding("error", what, "the model would never see it as one token", cure)
    if eos == tokenizer.unk_token:
        cure = "give eos a token of its own in tokenizer_config.json"
        what = f"eos and unk are the same token ({eos!r}, id {eos_id})"
        yield Finding("warning", what, "what the tokenizer cannot read would end an answer", cure)
    named = getattr(config, "eos_token_id", None)
    if named is not None and eos_id not in (named if isinstance(named, list) else [named]):
        what = f"the model's config ends text with id {named}, the tokenizer with {eos_id}"
        why = "answers will end with the tokenizer's EOS, which the base model may have used for something else"
        cure = "check which of the two is right for this model; old conversions of LLaMA have a wrong config"
        yield Finding("warning", what, why, cure)


def _bos(tokenizer) -> Iterator[Finding]:
    ids, bos = tokenizer("a")["input_ids"], tokenizer.bos_token_id
    begins = bool(tokenizer.bos_token) and ids[:1] == [bos]
    if getattr(tokenizer, "add_bos_token", None) and not begins:
        what = f"the tokenizer says add_bos_token, but puts no BOS in front ({ids[:2]} for 'a')"
        cure = "set bos_token in tokenizer_config.json, or add_bos_token false if the model was trained without"
        yield Finding("warning", what, "a base model that was trained with BOS answers worse without it", cure)
    elif begins and ids[1:2] == [bos]:
        cure = "remove one: add_bos_token, or the post processor in tokenizer.json"
        yield Finding("warning", "the tokenizer puts BOS in front twice", "the model has never seen that", cure)


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


def check_examples(dataset: SupervisedDataset, eos_id: int, rows: int, max_length: int) -> list[Finding]:
    """Report the records that teach something unwanted, or nothing. 52,000 examples take about a second.

    Examples are made of a prompt, an answer and EOS, so only what the data causes is looked for.

    Args:
        dataset: the training data.
        eos_id: the token at the end of each answer.
        rows: number of rows of the model's input embedding.
        max_length: where examples were cut, in tokens.
    """
    ids, lengths, labels, _ = columns(dataset)
    record = np.repeat(np.asarray(dataset.numbers), lengths)  # of each token
    learned, eos = labels != IGNORE_INDEX, labels == eos_id
    # An example begins with its prompt: the token after its last one is not learned either.
    after, before = np.roll(learned, -1), np.roll(learned, 1)
    longer = "raise model_max_length, or remove these records"
    every, findings = len({*dataset.numbers, *dataset.left_out}), []

    def report(level: str, numbers, what: str, why: str, cure: str) -> None:
        if numbers := sorted(set(map(int, numbers))):  # of tokens; several examples may come from one record, too
            listed = ", ".join(map(str, numbers[:LISTED])) + (", …" if len(numbers) > LISTED else "")
            what = f"{len(numbers)} of {every} records {what} (record {listed})"
            findings.append(Finding(level, what, why, cure))

    beyond, why = record[ids >= rows], "the lookup fails (on a GPU as a device-side assert that names no cause)"
    what, cure = f"have token ids outside the model's {rows} rows", "use the tokenizer of the model that is trained"
    report("error", beyond, what, why, cure)
    cure = "the data contains a special token: remove it from these records"
    report("warning", record[eos & after], "have EOS inside the answer", "the model learns to stop there", cure)
    cure = "remove these records (python analyze_data.py lint names more)"
    report("warning", record[eos & ~before], "have an empty answer", "the model learns to say nothing", cure)
    why = "the model learns neither what was cut nor where these answers end"
    report("warning", dataset.cut, f"do not fit in {max_length} tokens and were cut", why, longer)
    what = f"were left out, as their prompt alone fills {max_length} tokens"
    report("warning", dataset.left_out, what, "they teach nothing", longer)
    return findings


def show_example(example: dict, tokenizer) -> str:
    """Return the text of an example: what is learned green, the rest dim; without colour, the former between «…»."""
    ids, labels = list(example["input_ids"]), list(example["labels"])
    learned = [label != IGNORE_INDEX for label in labels]
    borders = [i for i in range(1, len(ids)) if learned[i] != learned[i - 1]]
    parts, before, plain = [], "", not colour_wanted()
    for begin, end in itertools.pairwise([0, *borders, len(ids)]):
        # Decoded alone, the answer of a LLaMA tokenizer would lose its first space.
        text = printable(tokenizer.decode(ids[:end]))
        part = text[len(before) :] if text.startswith(before) else printable(tokenizer.decode(ids[begin:end]))
        before = text
        parts.append(f"«{part}»" if learned[begin] and plain else paint(part, "32" if learned[begin] else "2"))
    return "".join(parts)


def show_border(example: dict, tokenizer) -> str:
    """Return the tokens at the first border, the prompt's last two and the answer's first three, marked as above."""
    ids, first = example["input_ids"], [label != IGNORE_INDEX for label in example["labels"]].index(True)
    begin = max(0, first - 3)  # one more: some decoders remove the space in front of their first token
    texts = [tokenizer.decode(ids[begin:end]) for end in range(begin, min(first + 3, len(ids)) + 1)]
    tokens = [repr(after[len(before) :]) for before, after in itertools.pairwise(texts)]  # no control character is left
    prompt, answer = " ".join(tokens[1 : first - begin]), " ".join(tokens[first - begin :])
    return f"{paint(prompt, '2')} {paint(answer, '32')}" if colour_wanted() else f"{prompt} «{answer}»"
