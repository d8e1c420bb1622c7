"""How much memory weights, gradients and optimizer need on each device, exactly, and which arguments would reduce it.

It is known before anything is loaded. What a step needs beside it (activations, logits) the rehearsal measures.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments
from transformers.pytorch_utils import Conv1D

from alpaca.common.memory import as_text
from alpaca.training.distributed import read_config

# transformers 5.23 renamed the argument; 5.17 has the old name only.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
# Bytes of a weight in 4 bits: itself, a byte for 64 of them, 4 bytes for 256 of those (Dettmers et al., 2023).
FOUR_BITS = 1 / 2 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Sizes:
    """Of a model, in elements."""

    parameters: int
    linear: int  # in the matrices of its layers, which LoRA adapts and QLoRA keeps in 4 bits
    rank_one: int  # of LoRA with r = 1: in + out for each of these matrices (Hu et al., 2021)

    @classmethod
    def of(cls, model) -> Sizes:
        output = model.get_output_embeddings()
        linear = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not output]
        return cls(
            sum(p.numel() for p in model.parameters()),
            sum(m.weight.numel() for m in linear),
            sum(sum(m.weight.shape) for m in linear),
        )


def sizes_of(path: str, cache_dir: str | None = None) -> Sizes | None:
    """Return the sizes of a model in a folder or on the hub, without its weights; None if its config says too little.

    (What is wrong with it, loading it says.)
    """
    try:
        config = AutoConfig.from_pretrained(path, cache_dir=cache_dir, trust_remote_code=False)
        with torch.device("meta"):
            return Sizes.of(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    except Exception:  # whatever a library says to a strange config.json
        return None


@dataclass(frozen=True)
class Plan:
    """How a model is to be trained."""

    ranks: int = 1
    batch: int = 1  # examples a device and forward pass
    accumulation: int = 1  # batches a step
    sharded: bool = False  # over the ranks: FSDP, ZeRO-3
    sync_each_batch: bool = False  # gradients are reduced after each batch: accelerate's option, and what ZeRO-3 does
    offloaded: bool = False  # parameters, gradients and optimizer states are in CPU memory
    dtype_bytes: int = 4  # of a weight as it is loaded
    lora_r: int = 0
    four_bit: bool = False
    optimizer_bytes: float = 8  # a trainable parameter: AdamW keeps two float32 moments (Loshchilov & Hutter 2019)
    checkpointing: bool = False

    @classmethod
    def of(cls, args, dtype: torch.dtype) -> Plan:
        """Read it from train.py's arguments; ``dtype`` is the one that the weights are loaded as."""
        zero3 = bool(args.deepspeed) and read_config(args.deepspeed).get("zero_optimization", {}).get("stage") == 3
        master = 4 if args.deepspeed and (args.bf16 or args.fp16) else 0  # DeepSpeed's float32 weights
        fsdp = read_config(args.fsdp_config) if args.fsdp else {}
        sync = (args.accelerator_config.gradient_accumulation_kwargs or {}).get("sync_each_batch", False)
        return cls(
            ranks=args.world_size,
            batch=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            sharded=bool(args.fsdp) or zero3,
            sync_each_batch=zero3 or sync,
            offloaded=bool(fsdp.get("cpu_offload")),
            dtype_bytes=dtype.itemsize,
            lora_r=args.lora_r,
            four_bit=args.load_in_4bit,
            optimizer_bytes=optimizer_bytes(args.optim.value) + master,
            checkpointing=bool(getattr(args, CHECKPOINTING) or fsdp.get("activation_checkpointing")),
        )

    def trainable(self, sizes: Sizes) -> int:
        return self.lora_r * sizes.rank_one if self.lora_r else sizes.parameters


def optimizer_bytes(optim: str) -> float:
    """Return the bytes of state per trainable parameter for one of transformers' optimizer names."""
    if "8bit" in optim:
        return 2  # two moments of one byte, and their scales, 4 bytes for 256 values (Dettmers et al. 2022)
    if "4bit" in optim:
        return 1
    if "adafactor" in optim:
        return 0.01  # a row and a column for a matrix (Shazeer & Stern 2018)
    if "sgd" in optim or "lion" in optim:
        return 4
    return 8


def parts(sizes: Sizes, plan: Plan) -> dict[str, int]:
    """Return the bytes on each device, by what holds them.

    Parameters as stored, gradients 4 bytes and optimizer states a trainable parameter, divided by the ranks when
    sharded (Rajbhandari et al., "ZeRO", 2020, section 5). While FSDP accumulates gradients over several batches, each
    device holds all of them, whole (torch's unsharded_accumulated_grad). DistributedDataParallel keeps a second copy
    of the gradients, in which it reduces them (its gradient_as_bucket_view is off, and neither accelerate nor
    transformers turns it on).
    """
    trainable, share = plan.trainable(sizes), plan.ranks if plan.sharded else 1
    weights = plan.dtype_bytes * sizes.parameters
    if plan.four_bit:  # the embeddings become float32
        weights = FOUR_BITS * sizes.linear + 4 * (sizes.parameters - sizes.linear)
    accumulated_whole = plan.sharded and plan.accumulation > 1 and not plan.sync_each_batch
    found = {
        "parameters": (weights + (4 * trainable if plan.lora_r else 0)) / share,
        "gradients": 4 * trainable if accumulated_whole else 4 * trainable / share,
        "gradient buckets": 4 * trainable if plan.ranks > 1 and not plan.sharded else 0,
        "optimizer": plan.optimizer_bytes * trainable / share,
    }
    if plan.offloaded:
        found = {"gradients": found["gradients"] if accumulated_whole else 0}
    return {name: int(size) for name, size in found.items() if size}


class Option(NamedTuple):
    """Arguments that save memory, as a user would set them, and what they change in the plan."""

    kind: str
    text: str
    changes: dict


def _options(plan: Plan) -> Iterator[Option]:
    if not plan.sync_each_batch and plan.accumulation > 1:
        text = """accelerator_config='{"gradient_accumulation_kwargs": {"sync_each_batch": true}}'"""
        yield Option("sync", text, {"sync_each_batch": True})
    if plan.optimizer_bytes > 2 and not plan.sharded:
        yield Option("optim", "optim=adamw_8bit", {"optimizer_bytes": 2})
    for ranks in (2, 4, 8, 16, 32, 64):
        if ranks > (plan.ranks if plan.sharded else 1):
            yield Option("fsdp", f"fsdp over {ranks} devices", {"sharded": True, "ranks": ranks})
    if not plan.lora_r:
        yield Option("adapter", "lora_r=8", {"lora_r": 8})
        yield Option("adapter", "lora_r=8 load_in_4bit=True", {"lora_r": 8, "four_bit": True})


def advise(sizes: Sizes, plan: Plan, available: int) -> list[str]:
    """Return up to three sets of arguments with which the exact part fits ``available`` bytes; the smallest first.

    Each is a text such as ``lora_r=8 (12.6 GiB)``, with what is needed then.
    """
    chosen: list[tuple[set[str], str]] = []
    options = list(_options(plan))
    for combination in itertools.chain(*(itertools.combinations(options, size) for size in (1, 2, 3))):
        kinds, new = {option.kind for option in combination}, plan
        for option in combination:
            new = replace(new, **option.changes)
        useless = (
            len(kinds) < len(combination)
            or any(smaller <= kinds for smaller, _ in chosen)  # a smaller set is enough
            or ("fsdp" in kinds and (new.four_bit or "optim" in kinds))  # bitsandbytes' weights and optimizer: neither
            or ("optim" in kinds and "adapter" in kinds)  # whose optimizer is small already
            or ("sync" in kinds and not new.sharded)  # it would change nothing
        )
        if not useless and (total := sum(parts(sizes, new).values())) <= available:
            chosen.append((kinds, f"{' '.join(option.text for option in combination)} ({as_text(total)})"))
    return [text for _, text in chosen[:3]]


def smaller_step(plan: Plan) -> str:
    """Return the arguments that make the activations of a step smaller, for a run whose step ran out of memory."""
    found = [] if plan.checkpointing else [f"{CHECKPOINTING}=True"]
    if plan.batch > 1:
        more = plan.batch * plan.accumulation
        found.append(f"per_device_train_batch_size=1 gradient_accumulation_steps={more}")
    return "; ".join([*found, *(option.text for option in _options(plan)), "a smaller model_max_length"])


def checkpoint_bytes(sizes: Sizes, plan: Plan, full_fsdp: bool = False) -> tuple[int, int]:
    """Return the bytes on disk of (one checkpoint, the final model).

    A checkpoint holds what is trained (4 bytes), its optimizer states, and under FSDP's FULL_STATE_DICT a second copy
    of the weights (pytorch_model_fsdp.bin).
    """
    weights = 4 * plan.trainable(sizes)
    checkpoint = weights * (2 if full_fsdp else 1) + int(plan.optimizer_bytes * plan.trainable(sizes))
    return checkpoint, weights + 4 * sizes.parameters if plan.lora_r else weights  # adapter and merged, or the model
