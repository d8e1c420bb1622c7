"""How much memory weights, gradients and optimizer need on each device, exactly, and which arguments would reduce it.

This is known before anything is loaded. The rehearsal measures what a step needs besides (activations, logits).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments
from transformers.pytorch_utils import Conv1D

from alpaca.common import memory as host_memory
from alpaca.common.memory import as_text
from alpaca.training.distributed import read_config
from alpaca.training.lora import freeze_other_senses, matrices
from alpaca.training.preflight.findings import Finding, lowest

# transformers 5.23 renamed the argument; 5.17 has the old name only.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
SYNC = """accelerator_config='{"gradient_accumulation_kwargs": {"sync_each_batch": true}}'"""
# Bytes of a weight in 4 bits: itself, a byte for 64 of them, 4 bytes for 256 of those (Dettmers et al., 2023).
FOUR_BITS = 1 / 2 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Sizes:
    """A model's sizes, in elements."""

    parameters: int
    trained: int  # without LoRA: all that reads text
    linear: int  # in linear layers, which QLoRA keeps in 4 bits; not the output embedding
    rank_one: int  # of LoRA with r = 1: in + out for each adapted matrix (Hu et al., 2021)

    @classmethod
    def of(cls, model) -> Sizes:
        output, weights = model.get_output_embeddings(), dict(model.named_parameters())
        linear = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not output]
        layers, parameters = matrices(model)
        adapted = [weights[name].shape for name in (*(f"{layer}.weight" for layer in layers), *parameters)]
        return cls(
            sum(weight.numel() for weight in weights.values()),
            sum(weight.numel() for weight in weights.values() if weight.requires_grad),
            sum(layer.weight.numel() for layer in linear),
            sum(math.prod(shape[:-2]) * sum(shape[-2:]) for shape in adapted),  # (experts, in, out) has one an expert
        )


def sizes_of(path: str, cache_dir: str | None = None) -> Sizes | None:
    """Return the sizes of a model in a folder or on the hub, from its config; None if that is not enough."""
    try:
        config = AutoConfig.from_pretrained(path, cache_dir=cache_dir, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        freeze_other_senses(model)
        return Sizes.of(model)
    except Exception:  # a library's error on a strange config.json: loading the model reports the same
        return None


@dataclass(frozen=True)
class Plan:
    """How a model will be trained."""

    ranks: int = 1
    sharded: bool = False  # by FSDP, over the ranks
    accumulates: bool = False  # gradients of several batches, each device all of them
    offloaded: bool = False  # parameters, gradients and optimizer states are in CPU memory
    dtype_bytes: int = 4  # of a weight as it is loaded
    lora_r: int = 0
    four_bit: bool = False
    optimizer_bytes: float = 8  # a trainable parameter: AdamW keeps two float32 moments (Loshchilov & Hutter 2019)

    @classmethod
    def of(cls, args, dtype: torch.dtype) -> Plan:
        """Read it from train.py's arguments; the weights are loaded as ``dtype``."""
        master = 4 if args.deepspeed and (args.bf16 or args.fp16) else 0  # DeepSpeed's float32 weights
        sync = (args.accelerator_config.gradient_accumulation_kwargs or {}).get("sync_each_batch", False)
        return cls(
            ranks=args.world_size,
            sharded=bool(args.fsdp),
            accumulates=args.gradient_accumulation_steps > 1 and not sync,
            offloaded=bool(args.fsdp and read_config(args.fsdp_config).get("cpu_offload")),
            dtype_bytes=dtype.itemsize,
            lora_r=args.lora_r,
            four_bit=args.load_in_4bit,
            optimizer_bytes=optimizer_bytes(args.optim.value) + master,
        )

    def trainable(self, sizes: Sizes) -> int:
        return self.lora_r * sizes.rank_one if self.lora_r else sizes.trained


def optimizer_bytes(optim: str) -> float:
    """Return the bytes of state per trainable parameter for one of transformers' optimizer names.

    With 8 bits: two moments of a byte, with scales of 4 bytes for 256 values (Dettmers et al. 2022). Adafactor: a row
    and a column for a matrix (Shazeer & Stern 2018).
    """
    sizes = {"8bit": 2, "4bit": 1, "adafactor": 0.01, "sgd": 4, "lion": 4}
    return next((size for name, size in sizes.items() if name in optim), 8)


def parts(sizes: Sizes, plan: Plan) -> dict[str, int]:
    """Return the bytes on each device, by what holds them.

    Parameters as stored, gradients 4 bytes and optimizer states a trainable parameter, divided by the ranks when
    sharded (Rajbhandari et al., "ZeRO", 2020, section 5). While FSDP accumulates gradients over several batches, each
    device holds all of them, whole (torch's unsharded_accumulated_grad). DistributedDataParallel keeps a second copy
    of the gradients, in which it reduces them (gradient_as_bucket_view is off in accelerate and transformers).
    """
    trainable, share = plan.trainable(sizes), plan.ranks if plan.sharded else 1
    weights = plan.dtype_bytes * sizes.parameters
    if plan.four_bit:  # the embeddings become float32
        weights = FOUR_BITS * sizes.linear + 4 * (sizes.parameters - sizes.linear)
    accumulated_whole = plan.sharded and plan.accumulates
    found = {
        "parameters": (weights + (4 * trainable if plan.lora_r else 0)) / share,
        "gradients": 4 * trainable if accumulated_whole else 4 * trainable / share,
        "gradient buckets": 4 * trainable if plan.ranks > 1 and not plan.sharded else 0,
        "optimizer": plan.optimizer_bytes * trainable / share,
    }
    if plan.offloaded:
        found = {"gradients": found["gradients"] if accumulated_whole else 0}
    return {name: int(size) for name, size in found.items() if size}


def advise(sizes: Sizes, plan: Plan, available: int) -> list[str]:
    """Return up to three sets of arguments with which the exact part fits ``available`` bytes, the mildest first.

    Each is a text such as ``lora_r=16 (12.6 GiB)``, with the memory then needed.
    """

    def needed(plan: Plan) -> int:
        return sum(parts(sizes, plan).values())

    sync, alone = f" {SYNC}" if plan.accumulates else "", " without fsdp" if plan.sharded else ""
    lora, adapter = ("", {}) if plan.lora_r else ("lora_r=16 ", {"lora_r": 16})
    half, half_bytes = ("", 4) if plan.sharded else ("bf16=True", 2)  # of a frozen base: FSDP loads float32
    # FSDP divides all of it, but can shard neither weights nor optimizer of bitsandbytes.
    whole = {"ranks": 1, "sharded": False, "accumulates": False, "offloaded": False, "dtype_bytes": 4}
    devices, large = max(2, math.ceil(needed(replace(plan, **whole)) / available)), plan.optimizer_bytes >= 4
    shardable = large and not plan.four_bit and (devices > plan.ranks or not plan.sharded)
    ladder = [
        (SYNC, plan.sharded, {"accumulates": False}),
        ("optim=adamw_8bit", large and not plan.sharded and not plan.lora_r, {"optimizer_bytes": 2}),
        (f"fsdp over {devices} devices{sync}", shardable, {**whole, "ranks": devices, "sharded": True}),
        (f"{lora}{half}", True, {"dtype_bytes": half_bytes, **adapter}),
        (f"{lora}load_in_4bit=True{alone}", True, {"sharded": False, "four_bit": True, **adapter}),
    ]
    plans = [(text.strip(), replace(plan, **changes)) for text, possible, changes in ladder if possible]
    fitting = [(text, needed(new)) for text, new in plans if new != plan and needed(new) <= available]
    return [f"{text} ({as_text(total)})" for text, total in fitting[:3]]


def smaller_step(args) -> str:
    """Return the arguments that make a step's activations smaller, for a step that ran out of memory."""
    checkpoints = getattr(args, CHECKPOINTING) or read_config(args.fsdp_config).get("activation_checkpointing")
    batch = args.per_device_train_batch_size
    one = f"per_device_train_batch_size=1 gradient_accumulation_steps={batch * args.gradient_accumulation_steps}"
    ways = {f"{CHECKPOINTING}=True": not checkpoints, one: batch > 1, "lora_r=16": not args.lora_r}
    return "; ".join([*(way for way, is_new in ways.items() if is_new), "a smaller model_max_length"])


def checkpoint_bytes(sizes: Sizes, plan: Plan, full_fsdp: bool = False) -> tuple[int, int]:
    """Return the bytes on disk of (one checkpoint, the final model).

    A checkpoint holds the model or its adapter, its optimizer states, and under FSDP's FULL_STATE_DICT a second copy
    of the weights (pytorch_model_fsdp.bin). With an adapter, the result is the adapter and the merged model.
    """
    trainable, model = plan.trainable(sizes), 4 * sizes.parameters
    weights = 4 * trainable if plan.lora_r else model
    checkpoint = weights * (2 if full_fsdp else 1) + int(plan.optimizer_bytes * trainable)
    return checkpoint, weights + model if plan.lora_r else model


def check_loading(sizes: Sizes, plan: Plan, device: torch.device) -> list[Finding]:
    """Check, before the model is loaded, whether it fits machine and device. Every rank must call it."""
    one = sizes.parameters * plan.dtype_bytes
    processes = 1 if plan.sharded else int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # FSDP: rank 0 alone loads it
    free = lowest(host_memory.host_free(swap=True))  # of all ranks before any of them loads
    if plan.four_bit or one * processes <= free:  # 4 bits are loaded a layer at a time
        return check_memory(sizes, plan, lowest(host_memory.available_bytes(device)))
    loaded = f"{processes} processes each load the whole model" if processes > 1 else "the model is loaded"
    left, fitting = as_text(max(0, free)), int(free // one)
    what = f"{loaded} into the machine's memory: {as_text(one * processes)} needed, {left} free"
    fewer = f"torchrun --nproc_per_node={fitting}, or " if fitting > 0 else ""
    cure = f"{fewer}more memory for the machine or the scheduler's job"
    return [Finding("error", what, "the kernel kills a process that takes more, without a message", cure)]


def check_memory(sizes: Sizes, plan: Plan, available: int) -> list[Finding]:
    """Compare what weights, gradients and optimizer need on each device with the available bytes."""
    needed = parts(sizes, plan)
    text = ", ".join(f"{name} {as_text(size)}" for name, size in needed.items())
    what = f"memory per device without activations: {text or 'none'}; available: {as_text(available)}"
    if sum(needed.values()) <= available:
        return [Finding("note", what)]
    advice = advise(sizes, plan, available)
    cure = f"use one of {'; '.join(advice)}" if advice else "use a larger device or a smaller model"
    return [Finding("error", what, "this is exact, and more than is available", cure)]
