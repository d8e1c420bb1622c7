"""A BPE tokenizer must split text like the sentencepiece model next to it; if not, its merges are reordered."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from transformers.convert_slow_tokenizer import generate_merges

from alpaca.inference.load import set_merges
from alpaca.training.preflight.findings import Finding

# Texts that reveal another order of merges: runs of spaces, as in code, and rare characters.
SAMPLES = (
    "def f(x):\n    if x:\n        return  x\n            # done",
    "a  b   c    d     e      f       g        h",
    "|  name   |   value |\n|---------|----------|",
    "\t\tnested\n\n\n    \t mixed",
    "Grüße, 東京! naïve café — 3.14159e-10",
    "aaaaaaaaaaaaaaaa ................ ================",
)
WHY = "the base model was trained on sentencepiece's tokens, and has not seen text that is split differently"


def mend_merges(tokenizer, texts: Iterable[str] = ()) -> list[Finding]:
    """Compare a BPE tokenizer with the sentencepiece model next to it, if any; if they differ, reorder its merges.

    transformers converts a tokenizer.model with merges in the order of ids. sentencepiece joins the pair whose piece
    has the best score. If several pairs make the same piece ("▁▁" + "▁▁" or "▁" + "▁▁▁"), their order matters too.

    Args:
        tokenizer: a fast tokenizer; changed in place.
        texts: to compare on, besides a few built-in samples.
    """
    path = Path(getattr(tokenizer, "vocab_file", None) or Path(tokenizer.name_or_path) / "tokenizer.model")
    if path.name != "tokenizer.model" or not path.is_file() or not tokenizer.is_fast:
        return []
    if json.loads(tokenizer.backend_tokenizer.to_str())["model"]["type"] != "BPE":
        return []
    import sentencepiece

    try:
        spm = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError:  # a tokenizer.model of another kind (tiktoken's)
        return []
    # sentencepiece puts a space before any text, tokenizers only if it has no space: not compared here.
    texts = [*SAMPLES, *(text.lstrip(" ") for text in texts)]
    pieces = [spm.id_to_piece(i) for i in range(spm.get_piece_size())]
    vocabulary = tokenizer.get_vocab()
    if any(vocabulary.get(piece, i) != i for i, piece in enumerate(pieces)):
        what = f"{path.name} and the tokenizer number their tokens differently"
        return [Finding("error", what, WHY, "take both files from the base model")]
    if not (before := _different(tokenizer, spm, texts)):
        return []
    special = (spm.is_control, spm.is_unknown, spm.is_byte, spm.is_unused)
    scores = {
        piece: spm.get_score(i)
        for i, piece in enumerate(pieces)
        if piece in vocabulary and not any(kind(i) for kind in special)
    }
    set_merges(tokenizer, generate_merges({piece: vocabulary[piece] for piece in scores}, scores))
    after = _different(tokenizer, spm, texts)
    what = f"merges reordered as in {path.name}: {before} of {len(texts)} sample texts were tokenized differently"
    cure = "none needed; the trained model is saved with these merges"
    return [Finding("warning" if after else "note", f"{what}, now {after}", WHY, cure)]


def _different(tokenizer, spm, texts: list[str]) -> int:
    ours = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return sum(a != b for a, b in zip(ours, spm.encode(texts), strict=True))
