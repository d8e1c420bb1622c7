"""LoRA adapters: recognize one, find its base, and merge it into that; mean rows for added tokens."""

from __future__ import annotations

import os
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import safe_open

from alpaca import UserError
from alpaca.common.text import shorten
from alpaca.weights.checkpoint import check_model_folder, is_hub_name, read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = "adapter_model.safetensors"


def need_peft(what: str):
    """Return the peft module, or raise a UserError that says how to install it."""
    try:
        import peft
    except ImportError:
        raise UserError(f"{what} needs peft: pip install -e '.[lora]'") from None
    return peft


def is_adapter(path: str | os.PathLike) -> bool:
    """Return whether a folder holds a LoRA adapter and no model."""
    return (Path(path) / ADAPTER_CONFIG).exists() and not (Path(path) / "config.json").exists()


def base_of(folder: Path, base_path: str | os.PathLike | None) -> str:
    """Return the base of the adapter in ``folder``: a folder that holds a model, or a hub name."""
    base = base_path or read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{folder} is a LoRA adapter that does not name its base: set base_path to its folder")
    if not is_hub_name(base):
        check_model_folder(base, f"{folder} is a LoRA adapter, and its base (base_path)", tokenizer=False)
    return str(base)


def embedding_rows(model) -> int:
    """Return the number of rows of the input embedding, also of one that DeepSpeed's ZeRO-3 has partitioned."""
    weight = model.get_input_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[0]


def add_mean_rows(model, count: int) -> None:
    """Grow the embeddings to ``count`` rows, if they have fewer; a new row is the float32 mean of the old ones.

    Input and output embeddings have a mean each, so that a new token starts like any other; the library's own
    mean_resizing adds noise to it.
    """
    new = count - embedding_rows(model)
    if new <= 0:
        return
    model.resize_token_embeddings(count, mean_resizing=False)
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = list({layer.weight: None for layer in layers if layer is not None})  # one, if they are tied
    whole = nullcontext()
    if any(hasattr(weight, "ds_id") for weight in weights):  # ZeRO-3 has partitioned them
        import deepspeed

        whole = deepspeed.zero.GatheredParameters(weights, modifier_rank=0)  # the first process's changes are kept
    with torch.no_grad(), whole:
        for weight in weights:
            weight[-new:] = weight[:-new].mean(dim=0, keepdim=True, dtype=torch.float32)


def merge_adapter(base, folder: Path, tokens: int):
    """Return ``base`` with a saved adapter's B A added to its weights.

    Our adapters hold no embeddings; those of other trainers may, with rows for added tokens. The base grows to these,
    and to ``tokens``, the tokenizer's size, by mean rows, as in training. It is changed in place. An adapter that is
    damaged, another model's, or changes nothing raises UserError.
    """
    peft = need_peft(f"{folder} is a LoRA adapter, which")
    if (folder / ADAPTER).exists():
        with safe_open(folder / ADAPTER, framework="pt") as file:
            stored = [name for name in file.keys() if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
            tokens = max([tokens, *(file.get_slice(name).get_shape()[0] for name in stored)])
    add_mean_rows(base, tokens)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the vocabulary grew
            warnings.filterwarnings("error", message=".*missing adapter keys")  # else they stay zero
            model = peft.PeftModel.from_pretrained(base, folder)
    except Exception as e:
        why = shorten(str(e), 200)
        raise UserError(f"{folder}: the adapter does not fit its base, is it another's, or damaged? ({why})") from None
    b = [parameter for name, parameter in model.named_parameters() if ".lora_B." in name]
    if b and not any(parameter.any() for parameter in b):
        raise UserError(f"{folder}: the adapter changes nothing (each B is zero): is the learning rate 0?")
    return model.merge_and_unload()
