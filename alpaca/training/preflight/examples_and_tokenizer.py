"""What must be true of a tokenizer, and of every tokenised example, before training starts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from alpaca.training.examples import IGNORE_INDEX, columns
from alpaca.training.preflight.findings import Finding, paint

ROLES = ("bos", "eos", "pad", "unk")
LISTED = 10  # record numbers a finding names

# Where merges in another order show themselves: runs of spaces, as in code, and what is rare.
SAMPLES = (
    "def f(x):\n    if x:\n        return  x\n            # done",
    "a  b   c    d     e      f       g        h",
    "|  name   |   value |\n|---------|----------|",
    "\t\tnested\n\n\n    \t mixed",
    "Grüße, 東京! naïve café — 3.14159e-10",
    "aaaaaaaaaaaaaaaa ................ ================",
)


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer.


def check_tokenizer(tokenizer, rows: int, config=None) -> list[Finding]:
    """Special tokens, BOS convention, and whether the ids fit the model; before missing tokens are added.

    Args:
        tokenizer: a fast tokenizer as it was loaded.
        rows: of the model's input embedding.
        config: the model's, as it was loaded; None leaves out what it says.
    """
    return _special_tokens(tokenizer) + _bos(tokenizer) + _rows(tokenizer, rows) + _config_ids(tokenizer, config)


def _special_tokens(tokenizer) -> list[Finding]:
    found, ids = [], {}
    for role in ROLES:
        token = getattr(tokenizer, f"{role}_token")
        if token is None:
            continue
        if token == "":
            found.append(
                Finding(
                    "warning",
                    f"the tokenizer's {role} token is empty ('')",
                    "conversions of LLaMA made this mistake; an empty EOS is never trained, and answers never end",
                    f"a token for it is put in its place; better set {role}_token in tokenizer_config.json",
                )
            )
            continue
        token_id = tokenizer.convert_tokens_to_ids(token)
        as_text = tokenizer(token, add_special_tokens=False)["input_ids"]
        if token_id is None or as_text != [token_id]:
            found.append(
                Finding(
                    "error" if role == "eos" else "warning",
                    f"the {role} token {token!r} is not one id: as text it becomes {as_text}",
                    "the model would never see it as a token of its own",
                    "mark it as special in tokenizer.json and tokenizer_config.json (added_tokens), or use the "
                    "tokenizer that the model was made with",
                )
            )
            continue
        ids[role] = token_id
    for a, b in (("eos", "pad"), ("bos", "eos"), ("eos", "unk"), ("bos", "pad"), ("pad", "unk"), ("bos", "unk")):
        if a not in ids or ids[a] != ids.get(b):
            continue
        what = f"{a} and {b} are the same token ({getattr(tokenizer, f'{a}_token')!r}, id {ids[a]})"
        if (a, b) == ("eos", "unk"):
            why = "what the tokenizer cannot read would end an answer"
            found.append(Finding("warning", what, why, "give eos a token of its own in tokenizer_config.json"))
        else:
            why = "attention masks and labels are made from lengths, not from this id, so EOS is trained all the same"
            found.append(Finding("note", what, why))
    return found


def _bos(tokenizer) -> list[Finding]:
    ids = tokenizer("a")["input_ids"]
    bos, wants = tokenizer.bos_token_id, getattr(tokenizer, "add_bos_token", None)
    begins = bool(ids) and bool(tokenizer.bos_token) and ids[0] == bos
    if wants and not begins:
        return [
            Finding(
                "warning",
                f"the tokenizer says add_bos_token, but puts no BOS in front ({ids[:2]} for 'a')",
                "a base model that was trained with BOS answers worse without it",
                "set bos_token in tokenizer_config.json, or add_bos_token false if the model was trained without",
            )
        ]
    if len(ids) > 1 and begins and ids[1] == bos:
        cure = "leave one: add_bos_token or the post processor of tokenizer.json"
        return [Finding("warning", "the tokenizer puts BOS in front twice", "the model has never seen that", cure)]
    if begins:
        return [Finding("note", f"BOS ({tokenizer.bos_token!r}) is put in front of each example")]
    first = f"{tokenizer.convert_ids_to_tokens(ids[0])!r}" if len(ids) > 1 else "nothing"
    return [Finding("note", f"no BOS: {first} is put in front of an example")]


def _rows(tokenizer, rows: int) -> list[Finding]:
    added = set(tokenizer.get_added_vocab().values())
    beyond = sorted(id_ for id_ in tokenizer.get_vocab().values() if id_ >= rows)
    if words := [id_ for id_ in beyond if id_ not in added]:
        return [
            Finding(
                "error",
                f"the tokenizer has {len(words)} tokens beyond the model's {rows} rows (ids {words[0]} to {words[-1]})",
                "it is another model's: its ids mean other words to this one",
                "use the tokenizer files of the model that is trained",
            )
        ]
    if beyond:
        return [
            Finding(
                "warning",
                f"{len(beyond)} added tokens have no row in the model ({tokenizer.convert_ids_to_tokens(beyond[0])!r})",
                "they get the mean of all rows and are learnt from there",
                "nothing, if the folder's maker added them without resizing the model",
            )
        ]
    if len(tokenizer) < 0.9 * rows:
        return [
            Finding(
                "warning",
                f"the tokenizer has {len(tokenizer)} tokens, the model {rows} rows",
                "models pad their rows by a few percent; more looks like another model's tokenizer",
                "compare with the tokenizer files of the model that is trained",
            )
        ]
    return []


def _config_ids(tokenizer, config) -> list[Finding]:
    eos = getattr(config, "eos_token_id", None)
    known = eos if isinstance(eos, list) else [eos]
    if eos is None or not tokenizer.eos_token or tokenizer.eos_token_id in known:
        return []
    return [
        Finding(
            "warning",
            f"the model's config ends text with id {eos}, the tokenizer with {tokenizer.eos_token_id}",
            "answers will end with the tokenizer's EOS, which the base model may have used for something else",
            "look which of the two is right for this model; old conversions of LLaMA have a wrong config",
        )
    ]


def mend_merges(tokenizer, texts: Iterable[str] = ()) -> list[Finding]:
    """Compares a BPE tokenizer with the sentencepiece model beside it; puts its merges in that model's order if needed.

    transformers converts a tokenizer.model with merges in the order of ids. sentencepiece joins the pair whose piece
    has the best score; where a piece can be made of several pairs ("▁▁" + "▁▁" or "▁" + "▁▁▁"), the order among them
    decides too. Nothing is done where there is no sentencepiece model of type BPE.

    Args:
        tokenizer: a fast tokenizer; changed in place.
        texts: what to compare them on, beside a few built-in samples.
    """
    path = Path(getattr(tokenizer, "vocab_file", None) or Path(tokenizer.name_or_path) / "tokenizer.model")
    if path.name != "tokenizer.model" or not path.is_file() or not tokenizer.is_fast:
        return []
    backend = tokenizer.backend_tokenizer
    if json.loads(backend.to_str())["model"]["type"] != "BPE":
        return []
    import sentencepiece

    try:
        spm = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError:  # a tokenizer.model of another kind (tiktoken's)
        return []
    # sentencepiece puts a space in front of any text, tokenizers only where there is none: not what is looked at here
    texts = [*SAMPLES, *(text.lstrip(" ") for text in texts)]
    why = "the base model was trained on sentencepiece's tokens; other ones are a language it has not seen"
    pieces = [spm.id_to_piece(i) for i in range(spm.get_piece_size())]
    vocabulary = tokenizer.get_vocab()
    if any(vocabulary.get(piece, i) != i for i, piece in enumerate(pieces)):
        cure = "take both files from the model that is trained"
        return [Finding("error", f"{path.name} and the tokenizer number their tokens differently", why, cure)]
    before = _different(tokenizer, spm, texts)
    if not before:
        return []

    from tokenizers.models import BPE

    old = backend.model
    merges = [pair for pair in _merges(spm, pieces) if pair[0] in vocabulary and pair[1] in vocabulary]
    model = json.loads(backend.to_str())["model"]
    options = {name: model[name] for name in ("unk_token", "fuse_unk", "byte_fallback") if model.get(name) is not None}
    backend.model = BPE(vocab=model["vocab"], merges=merges, **options)
    after = _different(tokenizer, spm, texts)
    if after >= before:
        backend.model = old
        what = f"{before} of {len(texts)} sample texts are tokenised differently from {path.name}"
        cure = "use a tokenizer.json from the model's maker"
        return [Finding("warning", what, why, cure)]
    if hasattr(tokenizer, "_merges"):
        tokenizer._merges = merges
    what = (
        f"merges put in sentencepiece's order: {before} of {len(texts)} sample texts were tokenised differently from "
        f"{path.name}, now {after}"
    )
    return [
        Finding("note" if not after else "warning", what, why, "done; the trained model is saved with these merges")
    ]


def _merges(spm, pieces: list[str]) -> list[tuple[str, str]]:
    """All pairs that make a piece, in the order in which sentencepiece would join them: by score, best first; among
    the pairs of one piece the longer left part first, which is how it grows a run from the left."""
    ordinary = {
        piece: i
        for i, piece in enumerate(pieces)
        if not (spm.is_control(i) or spm.is_unknown(i) or spm.is_byte(i) or spm.is_unused(i))
    }
    found = []
    for piece, i in ordinary.items():
        score = spm.get_score(i)
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ordinary and right in ordinary:
                found.append((-score, -len(left), -len(right), i, left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _different(tokenizer, spm, texts: Sequence[str]) -> int:
    ours = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return sum(a != b for a, b in zip(ours, spm.encode(list(texts)), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# The examples.


def check_examples(
    examples: Sequence[dict],
    eos_id: int,
    rows: int,
    max_length: int,
    record_numbers: Sequence[int] | None = None,
    left_out: Sequence[int] = (),
) -> list[Finding]:
    """Looks at every example: what is masked, what is supervised, what was cut. 52,000 take about a second.

    Args:
        examples: see ``columns``.
        eos_id: the token that must be learnt at the end of each answer.
        rows: of the model's embedding.
        max_length: where examples were cut, in tokens.
        record_numbers: the number of each example's record, from 1; None: its place, not counting those left out.
        left_out: numbers of the records that were left out since their prompt alone fills max_length.
    """
    if not len(examples):
        why, cure = "there is nothing to learn from", "look at the data, and raise --model_max_length"
        return [Finding("error", "no example is left after filtering", why, cure)]
    ids, lengths, labels, label_lengths = columns(examples)
    if record_numbers is None:
        record_numbers = np.setdiff1d(np.arange(1, len(lengths) + len(left_out) + 1), left_out)
    numbers = np.asarray(record_numbers)
    found: list[Finding] = []

    def add(level: str, bad: np.ndarray, what: str, why: str, cure: str) -> None:
        if bad.any():
            listed = ", ".join(map(str, numbers[bad][:LISTED])) + (", …" if bad.sum() > LISTED else "")
            found.append(Finding(level, f"{bad.sum()} of {len(bad)} examples {what} (record {listed})", why, cure))

    data_error = "this is a defect in how the data was tokenised: report it with one of these records"
    add("error", lengths != label_lengths, "have another number of labels than tokens", "the loss is wrong", data_error)
    add("error", lengths < 2, "have less than two tokens", "there is nothing to predict", "remove these records")
    if found:
        return found

    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    supervised = labels != IGNORE_INDEX
    count = np.add.reduceat(supervised, starts)
    run_begins = supervised.copy()  # a supervised token after a masked one, or at the start of an example
    run_begins[1:] &= ~supervised[:-1]
    run_begins[starts] = supervised[starts]
    runs = np.add.reduceat(run_begins, starts)
    last = starts + lengths - 1
    cut = (labels[last] != eos_id) & (lengths >= max_length)
    wrong = supervised & (labels != ids)
    outside = (ids < 0) | (ids >= rows)
    early_eos = supervised & (labels == eos_id)
    early_eos[last] = False

    def per_example(flags: np.ndarray) -> np.ndarray:
        return np.add.reduceat(flags, starts) > 0

    add(
        "error",
        per_example(outside),
        f"have token ids outside the model's {rows} rows",
        "the lookup fails (on a GPU as a device-side assert without a cause)",
        "use the tokenizer of the model that is trained",
    )
    add("error", count == 0, "have no label", "a batch of them has the loss 0/0", "raise --model_max_length")
    add("error", supervised[starts], "are not masked at the start", "the model would learn the prompt", data_error)
    add(
        "error", (runs > 1) | per_example(wrong), "have labels that are not their answer", "it learns noise", data_error
    )
    add(
        "error",
        (count > 0) & (labels[last] != eos_id) & ~cut,
        f"do not end with a supervised EOS (id {eos_id}) though they were not cut",
        "the model would not learn to stop: answers that never end",
        "look at eos_token in tokenizer_config.json",
    )
    add(
        "warning",
        per_example(early_eos),
        "have EOS inside the answer",
        "the model learns to stop there",
        "a special token stands in the data: remove it from these records",
    )
    add(
        "warning",
        (count == 1) & (labels[last] == eos_id),
        "have an empty answer",
        "the model learns to say nothing",
        "remove these records (python analyze_data.py lint names more)",
    )
    longest = f"--model_max_length {max_length}"
    add(
        "warning",
        cut,
        f"do not fit in {max_length} tokens and were cut",
        "what was cut is not learnt, nor where these answers end",
        f"raise {longest}, or remove these records",
    )
    if len(left_out):
        listed = ", ".join(map(str, left_out[:LISTED])) + (", …" if len(left_out) > LISTED else "")
        what = f"{len(left_out)} records were left out, since their prompt alone fills {longest} (record {listed})"
        found.append(Finding("warning", what, "they teach nothing", f"raise {longest}, or remove these records"))
    return found


def show_example(example: dict, tokenizer, colour: bool) -> str:
    """The text of one example: what is masked dim, what is supervised green; without colour between «…»."""
    ids, labels = list(example["input_ids"]), list(example["labels"])
    first = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    whole, prompt = tokenizer.decode(ids), tokenizer.decode(ids[:first])
    # Decoded alone, the answer of a LLaMA tokenizer would lose its first space.
    answer = whole[len(prompt) :] if whole.startswith(prompt) else tokenizer.decode(ids[first:])
    if colour:
        return paint(prompt, "2", True) + paint(answer, "32", True)
    return f"{prompt}«{answer}»"
