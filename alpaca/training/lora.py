"""LoRA and QLoRA through ``peft``: the base is frozen, and small matrices at its linear layers are trained.

W x becomes W x + (alpha / r) · B A x, with A (r, in) random and B (out, r) zero at first (Hu et al., 2021,
arXiv:2106.09685). The result is two folders: the adapter, and the model with B A added to its weights.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers.pytorch_utils import Conv1D

from alpaca import UserError
from alpaca.inference.adapters import merge_adapter, need_peft
from alpaca.training.meter import elements
from alpaca.training.preflight.findings import Finding

# Leaf names by which peft finds the experts of a mixture in old checkpoints (0.21).
EXPERTS = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")


def base_options(args) -> dict:
    """Return what ``from_pretrained`` needs to load the base: its ``dtype``, and how it is quantized.

    A frozen base does not need float32, as nothing is added to it: in 16 bits, 7B fits into 24 GB.

    Raises:
        UserError: 4 bits without bitsandbytes.
    """
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    if not args.load_in_4bit:
        return {"dtype": half}
    if not importlib.util.find_spec("bitsandbytes"):
        raise UserError("load_in_4bit needs bitsandbytes: pip install -e '.[qlora]'")
    # nf4, quantized twice: Dettmers et al., 2023, arXiv:2305.14314
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=half
    )
    return {"dtype": half, "quantization_config": quantization, "device_map": {"": args.device}}


def _text(model) -> torch.nn.Module:
    """Return the part that reads text: the decoder of a model that also reads images or sound, or the whole model."""
    return model if model.config.get_text_config() is model.config else model.get_decoder()


def freeze_other_senses(model) -> float:
    """Freeze everything but the text part and the output embedding. Return its share of the parameters."""
    used = {*_text(model).parameters(), *model.get_output_embeddings().parameters()}
    others = [parameter.requires_grad_(False) for parameter in model.parameters() if parameter not in used]
    return sum(map(elements, others)) / sum(map(elements, model.parameters()))


def matrices(model) -> tuple[list[str], list[str]]:
    """Return the names of the linear layers, and of the parameters, that LoRA can adapt.

    These parameters hold one matrix per expert of a mixture. Left out are the output embedding, and the layers of a
    Mamba block whose weights its code reads without calling them: an adapter there would learn nothing.
    """
    read = [layer for block in model.modules() if hasattr(block, "D") for layer in block.named_children()]
    beside = {layer for name, layer in read if name != "in_proj"} | {model.get_output_embeddings()}
    own, layers, parameters = set(_text(model).modules()) - beside, [], []
    for name, module in model.named_modules():
        if module in own and isinstance(module, (torch.nn.Linear, Conv1D)):
            layers.append(name)
        elif module in own and not isinstance(module, torch.nn.Conv1d):
            here = module.named_parameters(recurse=False)
            parameters += [f"{name}.{key}" for key, weight in here if weight.ndim == 3]
    if parameters:  # peft would not find layers with these names
        dense = [name for name in layers if name.rpartition(".")[2] in EXPERTS]
        layers = [name for name in layers if name not in dense]
        parameters += [f"{name}.weight" for name in dense]
    return layers, parameters


def add_adapter(model, args):
    """Return a PeftModel that trains only LoRA matrices (float32), for everything that ``matrices`` names."""
    peft = need_peft("LoRA")
    layers, parameters = matrices(model)
    if args.load_in_4bit:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        for module in model.modules():
            # On a CPU with AVX-512 BF16, the first evaluation would pack the weights for a kernel that has no gradient
            # and rounds scales to bf16; training would go on with it (bitsandbytes 0.50).
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    config = peft.LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=0.0 if parameters else args.lora_dropout,  # peft has none for an expert's matrix
        target_modules=layers,
        target_parameters=parameters or None,
        task_type="CAUSAL_LM",
    )
    transformers.set_seed(args.seed)  # A is random: the same on each rank, and in each run with this seed
    model = peft.get_peft_model(model, config)
    if args.gradient_checkpointing or getattr(args, "activation_checkpointing", False):
        model.enable_input_require_grads()  # otherwise the graph ends at the frozen embedding
    return model


def check_coverage(model, args) -> list[Finding]:
    """Report which of a model's parameters LoRA does not adapt, and a dropout that is not possible."""
    layers, parameters = matrices(model)
    adapted, left, found = {*(f"{name}.weight" for name in layers), *parameters}, Counter(), []
    embeddings = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    text = {*_text(model).parameters()} - embeddings - {model.get_output_embeddings().weight}
    for name, weight in model.named_parameters():
        if weight in text and weight.ndim > 1 and name not in adapted:
            kind = [part for part in name.removesuffix(".weight").split(".") if not part.isdigit()]
            left[".".join(kind[-2:])] += elements(weight)
    if left:
        share, names = left.total() / sum(map(elements, model.parameters())), ", ".join(dict(left.most_common()))
        what = f"LoRA leaves {share:.1%} of the parameters unchanged, besides embeddings and vectors: {names}"
        found.append(Finding("note", what))
    if parameters and args.lora_dropout:
        found.append(Finding("note", "lora_dropout is 0 here: peft has none for the experts' matrices"))
    return found


def check_eos(tokenizer) -> None:
    """Raise UserError if the tokenizer lacks an EOS, which would be a new token: no linear layer trains its row."""
    if not tokenizer.eos_token:
        what = "this tokenizer has no EOS, and LoRA cannot train a new one: answers would never end"
        raise UserError(f"{what}; use a base model with an EOS, or drop lora_r")


def save(trainer, output_dir: Path, load_base: Callable[[], torch.nn.Module]) -> None:
    """Write the merged model into a folder, and the adapter into its sub-folder ``adapter``. Every rank calls it.

    The adapter fits the unchanged base: it has no embedding rows, as a row added for [PAD] is not trained. Rank 0 calls
    ``load_base``, which returns the base in float32 on the CPU, with a row for each token.

    Raises:
        UserError: the adapter is empty, or changes nothing.
    """
    state = None
    if trainer.is_fsdp_enabled:
        state = {name: x.full_tensor() for name, x in trainer.model.state_dict().items() if ".lora_" in name}
    if not trainer.is_world_process_zero():
        return
    adapter, tokenizer = output_dir / "adapter", trainer.processing_class
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.save_pretrained(adapter, state_dict=state, save_embedding_layers=False)
    tokenizer.save_pretrained(adapter)
    merge_adapter(load_base(), adapter, len(tokenizer)).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
