"""How much memory a training step needs on each device, and which arguments would make it fit.

Parameters, gradients and optimizer states are exact. Activations and logits are an estimate: it counts what autograd
keeps for the backward pass of a decoder block, as Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models" (2022, section 4) do for GPT with 34·s·b·h bytes a layer, for today's blocks (RMSNorm in float32,
grouped-query attention without a score matrix, gated MLP). Measured on small LLaMA and OPT models it is within a
factor of 1.5 (tests/training/test_memory.py holds it to that).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import TrainingArguments

from alpaca import UserError
from alpaca.common.memory import as_text
from alpaca.training.meter import elements
from alpaca.weights.checkpoint import CheckpointReader

# transformers 5.23 renamed the argument; 5.17 has the old name only.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that decide its memory, in elements; parameter_bytes as the parameters are stored now."""

    parameters: int
    trainable: int
    parameter_bytes: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    gated: bool  # three matrices in the MLP (LLaMA, Mistral, Qwen), not two (OPT, GPT-NeoX)
    tied: bool

    @classmethod
    def of(cls, model) -> Shape:
        """Measure a model before FSDP shards it; ZeRO-3 may have partitioned it and bitsandbytes packed it already."""
        config, parameters = model.config.get_text_config(), list(model.parameters())
        heads = getattr(config, "num_attention_heads", None) or 0  # none: Mamba
        return cls(
            parameters=sum(elements(p) for p in parameters),
            trainable=sum(elements(p) for p in parameters if p.requires_grad),
            parameter_bytes=sum(_bytes(p) for p in parameters),
            layers=getattr(config, "num_hidden_layers", 0),
            hidden=config.hidden_size,
            intermediate=getattr(config, "intermediate_size", None)
            or getattr(config, "ffn_dim", 4 * config.hidden_size),
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // max(1, heads),
            vocabulary=config.vocab_size,
            gated=any(name.endswith("gate_proj") for name, _ in model.named_modules()),
            tied=bool(getattr(config, "tie_word_embeddings", False)),
        )

    @property
    def known(self) -> bool:
        """Whether it is a transformer, so that its activations can be estimated."""
        return bool(self.layers and self.heads)

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def layer(self) -> int:
        """Parameters of one decoder layer."""
        return (self.parameters - self.embedding * (1 if self.tied else 2)) // self.layers

    def lora(self, r: int) -> int:
        """Return the parameters of LoRA on all linear maps of the layers: r·(in + out) each (Hu et al. 2021)."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        maps = [(self.hidden, q), (self.hidden, kv), (self.hidden, kv), (q, self.hidden)]
        maps += [(self.hidden, self.intermediate)] * (3 if self.gated else 2)
        return self.layers * r * sum(a + b for a, b in maps)


def _bytes(parameter: torch.Tensor) -> int:
    """Return the bytes it takes, including the scales of 4-bit blocks (and their scales, if they are quantized too)."""
    if (packed := getattr(parameter, "quant_state", None)) is not None:
        scales = [packed.absmax, *([packed.state2.absmax] if packed.nested else [])]
        return parameter.nbytes + sum(tensor.nbytes for tensor in scales)
    return elements(parameter) * parameter.element_size()


@dataclass(frozen=True)
class Plan:
    """How the model is to be trained."""

    batch: int  # examples a device and forward pass
    length: int  # tokens of the longest example
    logit_tokens: int | None = None  # the most positions of an example whose logits are computed; None: all of them
    ranks: int = 1
    accumulation: int = 1  # batches a step
    sharded: bool = False  # over the ranks: FSDP full_shard, ZeRO-3
    sync_each_batch: bool = False  # gradients are reduced after each batch: accelerate's option, and what ZeRO-3 does
    offloaded: bool = False  # parameters, gradients and optimizer states are in CPU memory
    bf16: bool = False
    checkpointing: bool = False
    optimizer_bytes: float = 8  # a trainable parameter: AdamW keeps two float32 moments (Loshchilov & Hutter 2019)
    foreach: bool = False  # torch's foreach optimizers hold one more float32 copy while they step (torch.optim docs)


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


def activation_bytes(shape: Shape, plan: Plan) -> tuple[int, int, int]:
    """Return the bytes that autograd keeps per token: (in a layer, in a checkpointed layer, after the last layer).

    c is the size of the computing type; r that of the residual stream, which autocast leaves in float32 and FSDP's
    mixed precision does not. What is kept, in elements: by each norm its float32 input (not by LayerNorm, in models
    without a gate), the normalized value (r) and the input of the linear maps (c); by attention q, k, v (k and v
    repeated for each query head) and its output; by the MLP the gate, its activation, up and their product (without a
    gate: both sides of the activation).
    """
    c = 2 if plan.bf16 else 4
    r = 2 if plan.bf16 and plan.sharded else 4
    norm = shape.hidden * ((4 if shape.gated else 0) + r + c)
    attention = 4 * shape.heads * shape.head_dim * c
    mlp = (4 if shape.gated else 2) * shape.intermediate * c
    return 2 * norm + attention + mlp, r * shape.hidden, norm


def estimate(shape: Shape, plan: Plan) -> dict[str, int]:
    """Return the bytes on each device, by what holds them; "total" is the peak.

    - parameters as stored, gradients 4 bytes and optimizer states a trainable parameter, divided by the ranks when
      sharded (Rajbhandari et al., "ZeRO", 2020, section 5). While FSDP accumulates gradients over several batches,
      each device holds all of them, whole (torch's unsharded_accumulated_grad).
    - gradient buckets: DistributedDataParallel keeps a second copy of the gradients, in which it reduces them (its
      gradient_as_bucket_view is off, and neither accelerate nor transformers turns it on).
    - working copies: under autocast a bf16 copy of each weight lives until the backward pass; sharded, the output
      embedding, two layers (one is fetched ahead) and a layer's unreduced gradients are whole.
    - logits: float32 logits, their log-softmax and its gradient, 12 bytes a position and vocabulary entry, and the
      bf16 logits they came from.
    """
    share = plan.ranks if plan.sharded else 1
    c = 2 if plan.bf16 else 4
    parts = {
        "parameters": shape.parameter_bytes // share,
        "gradients": 4 * shape.trainable // share,
        "optimizer": int(plan.optimizer_bytes * shape.trainable) // share,
    }
    if plan.sharded and plan.accumulation > 1 and not plan.sync_each_batch:
        parts["gradients"] = 4 * shape.trainable
    if plan.ranks > 1 and not plan.sharded:
        parts["gradient buckets"] = 4 * shape.trainable
    if plan.sharded:
        parts["working copies"] = c * (shape.embedding + 2 * shape.layer) + 4 * shape.layer
    else:
        quantized = shape.parameter_bytes < 2 * shape.parameters
        parts["working copies"] = 2 * shape.parameters if plan.bf16 and not quantized else 0
    tokens = plan.batch * plan.length
    whole, kept, after = activation_bytes(shape, plan)
    layers = whole + kept * shape.layers if plan.checkpointing else whole * shape.layers
    parts["activations"] = tokens * (layers + after)
    positions = plan.batch * (plan.length if plan.logit_tokens is None else plan.logit_tokens)
    parts["logits"] = positions * shape.vocabulary * (12 + (2 if plan.bf16 else 0))
    stepping = 4 * shape.trainable // share if plan.foreach and not plan.offloaded else 0
    in_passing = max(parts["working copies"] + parts["activations"] + parts["logits"], stepping)
    parts["total"] = certain_bytes(parts, plan) + in_passing
    return parts


def certain_bytes(parts: dict[str, int], plan: Plan) -> int:
    """Return the part of an estimate that is exact: parameters, gradients and optimizer states on the device."""
    if plan.offloaded:  # all but the gradients that are accumulated whole
        return parts["gradients"] if plan.accumulation > 1 and not plan.sync_each_batch else 0
    return sum(parts.get(name, 0) for name in ("parameters", "gradients", "gradient buckets", "optimizer"))


def weights_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Return the bytes of a checkpoint's weights as that type; 0 if they cannot be counted (loading them says why)."""
    try:
        return sum(math.prod(shape) for _, shape in CheckpointReader(folder).specs().values()) * dtype.itemsize
    except (UserError, OSError):
        return 0


class Option(NamedTuple):
    """Arguments that save memory, as a user would set them, and what they change in the plan and the shape."""

    kind: str
    text: str
    plan: dict
    shape: dict = {}


def _options(shape: Shape, plan: Plan) -> Iterator[Option]:
    if not plan.checkpointing:
        yield Option("checkpointing", f"{CHECKPOINTING}=True", {"checkpointing": True})
    if plan.batch > 1:
        more = plan.batch * plan.accumulation
        text = f"per_device_train_batch_size=1 gradient_accumulation_steps={more}"
        yield Option("batch", text, {"batch": 1, "accumulation": more})
    if not plan.sync_each_batch:
        text = """accelerator_config='{"gradient_accumulation_kwargs": {"sync_each_batch": true}}'"""
        yield Option("sync", text, {"sync_each_batch": True})
    if plan.optimizer_bytes > 2 and not plan.sharded:
        yield Option("optim", "optim=adamw_8bit", {"optimizer_bytes": 2, "foreach": False})
    for ranks in (2, 4, 8, 16, 32, 64):
        if ranks > (plan.ranks if plan.sharded else 1):
            yield Option("fsdp", f"fsdp over {ranks} devices", {"sharded": True, "ranks": ranks})
    if shape.trainable == shape.parameters:
        lora = {"trainable": shape.lora(8)}
        yield Option("adapter", "lora_r=8", {}, lora)
        four_bit = (shape.parameters - 2 * shape.embedding) * 9 // 16 + 8 * shape.embedding  # embeddings stay float32
        yield Option("adapter", "lora_r=8 load_in_4bit=True", {}, lora | {"parameter_bytes": four_bit})


def advise(shape: Shape, plan: Plan, available: int) -> list[str]:
    """Return up to three sets of arguments that would make the plan fit, by the estimate; the smallest first.

    Each is a text such as ``lora_r=8 (12.6 GiB)``, with the estimated peak; ``available`` is in bytes a device.
    """
    if not shape.known:
        return []
    options = list(_options(shape, plan))
    chosen: list[tuple[set[str], str]] = []
    for combination in itertools.chain(*(itertools.combinations(options, size) for size in (1, 2, 3))):
        kinds, new_plan, new_shape = {option.kind for option in combination}, plan, shape
        for option in combination:
            new_plan, new_shape = replace(new_plan, **option.plan), replace(new_shape, **option.shape)
        useless = (
            len(kinds) < len(combination)
            or any(smaller <= kinds for smaller, _ in chosen)  # a smaller set is enough
            or ("fsdp" in kinds and new_shape.parameter_bytes < shape.parameter_bytes)  # 4 bits cannot be sharded
            or ("optim" in kinds and "fsdp" in kinds)  # nor can bitsandbytes' optimizer
            or ("optim" in kinds and "adapter" in kinds)  # whose optimizer is small already
            or ("sync" in kinds and not (new_plan.sharded and new_plan.accumulation > 1))  # it would change nothing
        )
        if not useless and (total := estimate(new_shape, new_plan)["total"]) <= available:
            chosen.append((kinds, f"{' '.join(option.text for option in combination)} ({as_text(total)})"))
    return [text for _, text in chosen[:3]]


def checkpoint_bytes(shape: Shape, plan: Plan, full_fsdp: bool = False) -> tuple[int, int]:
    """Return the bytes on disk of (one checkpoint, the final model).

    A checkpoint holds what is trained (4 bytes), its optimizer states, and under FSDP's FULL_STATE_DICT a second copy
    of the weights (pytorch_model_fsdp.bin).
    """
    weights = 4 * shape.trainable
    checkpoint = weights * (2 if full_fsdp else 1) + int(plan.optimizer_bytes * shape.trainable)
    final = weights if shape.trainable == shape.parameters else weights + 4 * shape.parameters  # adapter and merged
    return checkpoint, final
