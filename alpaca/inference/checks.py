"""Check that a loaded model is not a weight diff and belongs to its tokenizer, before it is trained or asked."""

from __future__ import annotations

import os
import sys

import torch
from transformers import DynamicCache

from alpaca import UserError
from alpaca.inference.generate import context_length, end_ids


def near_zero(model) -> str:
    """Say why the weights look like the difference of two models, as Alpaca's were released; "" if they do not.

    A model's norms are of order 0.1 to 10 (SmolLM2: 0.3 to 3.3; 1 before training), or 0 and more where they are added
    to 1 (Gemma); its embeddings are of order 0.01 to 0.1. Fine-tuning at a learning rate of 2e-5 moves either by 1e-3
    at most.
    """
    weights = [
        module.weight
        for module in model.modules()
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None
    ]
    words = model.get_input_embeddings().weight
    # None, or ZeRO-3 has them apart, or another process has read them.
    if not weights or words.is_meta or 0 in (words.numel(), *(weight.numel() for weight in weights)):
        return ""
    with torch.no_grad():
        norm = max(float(weight.abs().max()) for weight in weights)
        if norm > 0.1 or (word := float(words.float().abs().mean())) > 2e-3:
            return ""
    return f"all weights are near 0 (norms below {norm:.1g}, embeddings {word:.1g} on average)"


def check_model(model, tokenizer, path: str | os.PathLike) -> None:
    """Raise UserError for a model that cannot answer, and print a warning for one whose answers do not end.

    The first is a weight diff (also one that lost its weight_diff.json), and one whose rows are too few for the
    tokenizer's vocabulary, added tokens left out, or for its BOS.
    """
    end_ids(model, tokenizer)  # before the first question: the configs may have odd values
    DynamicCache(config=model.config)
    if (context := context_length(model)) is not None and context < 2:
        raise UserError(f"{path}: config.json has max_position_embeddings {context}: copy it from its base")
    if what := near_zero(model):
        raise UserError(f"{path}: {what}, as in a weight diff: recover the model first (python weight_diff.py recover)")
    rows, bos = model.get_input_embeddings().weight.shape[0], tokenizer.bos_token_id
    if tokenizer.vocab_size > rows or (bos is not None and bos >= rows):
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, BOS is token {bos} ({tokenizer.bos_token!r}), "
            f"and the model has {rows} rows: copy the tokenizer of the model that was trained"
        )
    eos, id_ = tokenizer.eos_token, tokenizer.eos_token_id
    if not eos or id_ is None or id_ >= rows:
        why = f"token {id_}, and the model has {rows} rows" if eos else "none"
        print(
            f"warning: the tokenizer's EOS is {eos!r}, {why}: the model never learned to end an answer, which runs to "
            "a new '### Instruction:' or to max_new_tokens; set eos_token in tokenizer_config.json and train again",
            file=sys.stderr,
        )
