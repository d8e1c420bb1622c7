"""Check that a loaded model is not a weight diff and belongs to its tokenizer, before it is trained or asked."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import torch

from alpaca import UserError
from alpaca.inference.generate import named_ends


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
    """Raise UserError for a model that cannot answer.

    That is one without a key/value cache (Mamba keeps what it has read in its own way, and would take each new token
    for the first of a text), a weight diff (also one that lost its weight_diff.json), and one whose rows are too few
    for the tokenizer's vocabulary, added tokens left out, or for its BOS.
    """
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise UserError(f"{path} is a {type(model).__name__}, which has no key/value cache: choose one that has it")
    if what := near_zero(model):
        raise UserError(f"{path}: {what}, as in a weight diff: recover the model first (python weight_diff.py recover)")
    rows, bos = model.get_input_embeddings().weight.shape[0], tokenizer.bos_token_id
    if tokenizer.vocab_size > rows or (bos is not None and bos >= rows):
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, BOS is token {bos} ({tokenizer.bos_token!r}), "
            f"and the model has {rows} rows: copy the tokenizer of the model that was trained"
        )


def odd_special_tokens(model, tokenizer, path: str | os.PathLike) -> list[str]:
    """Return a line for each mistake in EOS and pad: they make answers run on, or end too early."""
    eos, named, found = tokenizer.eos_token, named_ends(model), []
    if not eos:
        found.append(
            f"the tokenizer's EOS is {eos!r}: a model trained with it never learned to end an answer, which then runs "
            "to a new '### Instruction:' or to max_new_tokens; set eos_token in tokenizer_config.json and train again"
        )
    elif eos == tokenizer.unk_token:
        found.append(
            f"EOS and unk are the same token ({eos!r}): a character that the tokenizer does not know ends an answer"
        )
    # Our training makes labels and masks from lengths, not from the pad id, and leaves a receipt.
    if eos and eos == tokenizer.pad_token and not (Path(path) / "training_receipt.json").exists():
        found.append(
            f"EOS and pad are the same token ({eos!r}): where training masked padding by its id, it masked EOS too, "
            "and answers do not end by themselves"
        )
    if eos and named and tokenizer.eos_token_id not in named:
        found.append(
            f"generation_config.json ends answers with id {', '.join(map(str, named))}, the tokenizer with "
            f"{tokenizer.eos_token_id} ({eos!r}): here each of them does, elsewhere only one may"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    for role, id_ in (("EOS", tokenizer.eos_token_id), ("pad", tokenizer.pad_token_id)):
        if id_ is not None and id_ >= rows:
            effect = {"EOS": "it is never generated, and answers run on", "pad": "other programs that pad with it fail"}
            found.append(f"{role} is token {id_}, and the model has {rows} rows, up to {rows - 1}: {effect[role]}")
    if beyond := [id_ for id_ in named if id_ >= rows]:
        found.append(f"generation_config.json ends answers with id {beyond[0]}, and the model has {rows} rows")
    return found
