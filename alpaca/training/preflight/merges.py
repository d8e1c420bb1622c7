"""A BPE tokenizer must split text as the sentencepiece model beside it does; if not, its merges are put in order."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from alpaca.training.preflight.findings import Finding

# Where merges in another order show: runs of spaces, as in code, and rare characters.
SAMPLES = (
    "def f(x):\n    if x:\n        return  x\n            # done",
    "a  b   c    d     e      f       g        h",
    "|  name   |   value |\n|---------|----------|",
    "\t\tnested\n\n\n    \t mixed",
    "Grüße, 東京! naïve café — 3.14159e-10",
    "aaaaaaaaaaaaaaaa ................ ================",
)
WHY = "the base model was trained on sentencepiece's tokens; it has not seen text that is split in another way"


def mend_merges(tokenizer, texts: Iterable[str] = ()) -> list[Finding]:
    """Compare a BPE tokenizer with its tokenizer.model; if they differ, order its merges as sentencepiece does.

    transformers converts a tokenizer.model with merges in the order of ids. sentencepiece joins the pair whose piece
    has the best score. Where several pairs make the same piece ("▁▁" + "▁▁" or "▁" + "▁▁▁"), their order counts too.
    Without a sentencepiece model of type BPE nothing is compared.

    Args:
        tokenizer: a fast tokenizer; changed in place.
        texts: to compare on, besides a few built-in samples.
    """
    path = Path(getattr(tokenizer, "vocab_file", None) or Path(tokenizer.name_or_path) / "tokenizer.model")
    if path.name != "tokenizer.model" or not path.is_file() or not tokenizer.is_fast:
        return []
    backend = tokenizer.backend_tokenizer
    model = json.loads(backend.to_str())["model"]
    if model["type"] != "BPE":
        return []
    import sentencepiece

    try:
        spm = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError:  # a tokenizer.model of another kind (tiktoken's)
        return []
    # sentencepiece puts a space before any text, tokenizers only before one that has none: not compared here.
    texts = [*SAMPLES, *(text.lstrip(" ") for text in texts)]
    pieces = [spm.id_to_piece(i) for i in range(spm.get_piece_size())]
    vocabulary = tokenizer.get_vocab()
    if any(vocabulary.get(piece, i) != i for i, piece in enumerate(pieces)):
        what = f"{path.name} and the tokenizer number their tokens differently"
        return [Finding("error", what, WHY, "take both files from the model that is trained")]
    before = _different(tokenizer, spm, texts)
    if not before:
        return []

    from tokenizers.models import BPE

    old = backend.model
    merges = [pair for pair in _merges(spm, pieces) if pair[0] in vocabulary and pair[1] in vocabulary]
    options = {name: model[name] for name in ("unk_token", "fuse_unk", "byte_fallback") if model.get(name) is not None}
    backend.model = BPE(vocab=model["vocab"], merges=merges, **options)
    after = _different(tokenizer, spm, texts)
    what = f"{before} of {len(texts)} sample texts are tokenized differently from {path.name}"
    if after >= before:
        backend.model = old
        return [Finding("warning", what, WHY, "use a tokenizer.json from the model's maker")]
    if hasattr(tokenizer, "_merges"):  # transformers' LlamaTokenizer keeps a copy (5.17 to 5.23): keep it the same
        tokenizer._merges = merges
    what = f"merges put in sentencepiece's order: {what.replace(' are ', ' were ')}, now {after}"
    return [Finding("warning" if after else "note", what, WHY, "done; the trained model is saved with these merges")]


def _merges(spm, pieces: list[str]) -> list[tuple[str, str]]:
    """Return all pairs that make a piece, in the order in which sentencepiece would join them: by score, best first.

    Among the pairs of one piece, the one with the longer left part comes first: a run grows from the left.
    """
    ordinary = {
        piece: i
        for i, piece in enumerate(pieces)
        if not (spm.is_control(i) or spm.is_unknown(i) or spm.is_byte(i) or spm.is_unused(i))
    }
    found = []
    for piece, i in ordinary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ordinary and right in ordinary:
                found.append((-spm.get_score(i), -len(left), -len(right), i, left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _different(tokenizer, spm, texts: list[str]) -> int:
    ours = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return sum(a != b for a, b in zip(ours, spm.encode(texts), strict=True))
