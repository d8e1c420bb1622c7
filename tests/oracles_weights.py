"""The slow oracle of weight_diff.py: the original's way, two whole models in float32 and one subtraction a key.

Only what the original gets wrong is left out: it works in place, and so subtracts a tied embedding twice.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


def _add_pad(model: PreTrainedModel) -> None:
    """Grows both embeddings by the row of a new [PAD]: the mean of the rows before it."""
    model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + 1, mean_resizing=False)
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = embeddings.weight.data
        weight[-1:] = weight[:-1].mean(dim=0, keepdim=True)


def _load_pair(path_raw: Path, path_other: Path) -> tuple[dict, dict]:
    raw, other = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (path_raw, path_other))
    rows = [model.get_input_embeddings().weight.shape[0] for model in (raw, other)]
    if rows[1] == rows[0] + 1:
        _add_pad(raw)
    return raw.state_dict(), other.state_dict()


def original_diff(path_raw: Path, path_tuned: Path) -> dict[str, torch.Tensor]:
    """tuned - raw for each key of the state dict, a tied output embedding's included."""
    raw, tuned = _load_pair(path_raw, path_tuned)
    return {name: tuned[name] - raw[name] for name in tuned}


def original_recover(path_raw: Path, path_diff: Path) -> dict[str, torch.Tensor]:
    """diff + raw for each key of the state dict, a tied output embedding's included."""
    raw, diff = _load_pair(path_raw, path_diff)
    return {name: diff[name] + raw[name] for name in diff}
