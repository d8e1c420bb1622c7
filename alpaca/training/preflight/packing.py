"""Whether a model can train without padding: measured before the first step, not looked up in a list."""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch
import transformers
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional

from alpaca.common.text import first_line
from alpaca.training import packing
from alpaca.training.distributed import say

# How far packed examples may be from the same ones alone: in float32 (tf32 keeps 10 bits of mantissa) and in half
# precision (bfloat16 keeps 7).
MAX_DEVIATION, MAX_DEVIATION_HALF = 0.03, 0.3
# How far they may move when another example of the row changes. Exactly 0 without leaks; but a mixture of experts
# rounds differently when other tokens change.
MAX_DEPENDENCE = 0.01


def measure(model, examples: list[dict]) -> tuple[float, float]:
    """Return how far examples in one row, under the model's current attention, are from the correct result.

    On a sharded model every process must call it, with the same examples.

    Args:
        model: of any type, on any device and mesh; dropout is off during the measurement.
        examples: at least two ``{"input_ids": [int], "labels": [int]}``, short ones.

    Returns:
        The deviation from each example alone, by the library's attention: the largest difference of a supervised logit
        in standard deviations of the logits, or of the mean loss in nats. Rounding gives 1e-6 to 0.1, depending on the
        type; attention over the whole row gave 0.8 to 1.8 in the models we tried. NaN if a logit is NaN.

        The dependence: how far later examples' logits move, in the same unit, when the first one's tokens are reversed.
        Rounding cannot hide it, as their own arithmetic is the same: it finds a recurrent layer that forgets quickly.
    """
    first = examples[0]["input_ids"]
    batch = packing.flatten(examples)
    other = packing.flatten([{**examples[0], "input_ids": first[::-1]}, *examples[1:]])
    with _measuring(model):
        try:
            together, moved = _outputs(model, batch), _outputs(model, other)
        finally:  # also if it fails: FSDP is then interrupted with parameters half gathered, and this recovers it
            alone = _alone(model, examples)
    keep, targets = batch["logits_to_keep"].to(alone.device), batch["shift_labels"][0].to(alone.device)
    alone, logits = alone[keep], together.logits[0].float()
    by_logit = (logits - alone).abs().max() / alone.std()
    by_loss = (together.loss.float() - functional.cross_entropy(alone, targets)).abs()
    dependence = (logits - moved.logits[0].float())[keep >= len(first)].abs().max() / logits.std()
    return torch.stack([by_logit, by_loss]).max().item(), dependence.item()


def _alone(model, examples: list[dict]) -> torch.Tensor:
    """Return the logits of each example alone, by the library's attention, end to end: (tokens, vocabulary)."""
    before = model.config._attn_implementation  # private, as in packing.set_attention
    packing.set_attention(model, packing.library_attention(model))
    rows = [{"input_ids": torch.tensor([example["input_ids"]]), "use_cache": False} for example in examples]
    try:
        return torch.cat([_outputs(model, row).logits[0] for row in rows]).float()
    finally:
        packing.set_attention(model, before)


def _outputs(model, batch: dict):
    device = next(model.parameters()).device
    return model(**{name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()})


@contextmanager
def _measuring(model):
    """Evaluate without gradients. FSDP reshards in the backward pass, which is missing here: reshard at the end."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class SelfCheck(transformers.TrainerCallback):
    """Check before the first step, with the run's kernels, type and mesh, that packing is correct; if not, fall back.

    Args:
        examples: see measure.
        fall_back: called on each process if packing is not correct, with the model and the reason.

    Attributes:
        deviation: the largest of all processes; None until it was measured.
        reason: why packing is not correct here; empty if it is.
    """

    def __init__(self, examples: list[dict], fall_back):
        self.examples, self.fall_back = examples, fall_back
        self.deviation: float | None = None
        self.reason = ""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.deviation is not None:  # the rehearsal has measured it
            return
        try:
            measured = measure(model, self.examples)
        except (NotImplementedError, TypeError, ValueError) as e:  # the model's code cannot handle such batches
            measured, self.reason = (math.inf, math.inf), first_line(e)
        # If some ranks packed and others padded, their losses would differ: if one rank cannot pack, none does.
        worst = torch.tensor([x if x == x else math.inf for x in measured], device=args.device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
        half = args.bf16 or args.fp16 or next(model.parameters()).dtype != torch.float32
        self.deviation, moved = worst.tolist()
        if not self.deviation <= (MAX_DEVIATION_HALF if half else MAX_DEVIATION):
            self.reason = self.reason or f"examples in one row differ from single ones by {self.deviation:.2g}"
        elif moved > MAX_DEPENDENCE:
            self.reason = f"an example changes by {moved:.2g} when another in its row changes"
        if self.reason:
            self.fall_back(model, self.reason)
            say(f"warning: examples are padded, as with padding=longest: {self.reason}")
        else:
            say(f"note: packed examples equal single ones, to {self.deviation:.1e} of their logits' deviation")


def examples_to_check(dataset, count: int = 3) -> list[dict]:
    """Return the ``count`` shortest of the first hundred examples, repeated if there are fewer."""
    shortest = sorted(range(min(len(dataset), 100)), key=lambda i: len(dataset[i]["input_ids"]))
    return [dataset[shortest[i % len(shortest)]] for i in range(count)]
