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
from alpaca.training.examples import IGNORE_INDEX

# How far packed examples may be from the same ones alone (see deviation_from_solo): in float32 (tf32 keeps 10 bits of
# mantissa) and in half precision (bfloat16 keeps 7).
MAX_DEVIATION, MAX_DEVIATION_HALF = 0.03, 0.3
# How far they may move when another example of the row changes (see dependence). Exactly 0 if they do not see it; but a
# mixture of experts rounds differently when other tokens change.
MAX_DEPENDENCE = 0.01


def deviation_from_solo(model, examples: list[dict]) -> float:
    """Return how far examples in one row differ from the same ones alone, under the model's present attention.

    Each example is computed alone, by the library's attention on plain input_ids, and all together in one row. On a
    sharded model every process must call it, with the same examples.

    Args:
        model: of any type, on any device and mesh; dropout is off meanwhile.
        examples: at least two ``{"input_ids": [int], "labels": [int]}``, short ones.

    Returns:
        The largest difference of a supervised logit, in standard deviations of the logits, or that of the mean loss
        in nats if it is larger. Rounding gives 1e-6 to 0.1, depending on the type; attention over the whole row gave
        0.8 to 1.8 in the models we tried. NaN if a logit is NaN.
    """
    batch = packing.flatten(examples)
    with _measuring(model):
        together = _outputs(model, batch)
    alone = _alone(model, examples)
    keep, targets = batch["logits_to_keep"].to(together.loss.device), batch["shift_labels"][0].to(together.loss.device)
    alone = torch.cat(alone).float()[keep]
    by_logit = (together.logits[0].float() - alone).abs().max() / alone.std()
    by_loss = (together.loss.float() - functional.cross_entropy(alone, targets)).abs()
    return torch.stack([by_logit, by_loss]).max().item()


def dependence(model, examples: list[dict]) -> float:
    """Return how far the logits of a row's later examples move when the tokens of its first one are reversed.

    It needs no bound for rounding: the later examples' own arithmetic is the same both times. It finds what
    deviation_from_solo may take for rounding in half precision, such as a recurrent layer that forgets quickly.

    Args:
        model: see deviation_from_solo.
        examples: see deviation_from_solo.

    Returns:
        The largest difference of a supervised logit, in standard deviations of the logits.
    """
    first = {**examples[0], "input_ids": examples[0]["input_ids"][::-1]}
    later = sum(label != IGNORE_INDEX for example in examples[1:] for label in example["labels"][1:])
    with _measuring(model):
        rows = [
            _outputs(model, packing.flatten([x, *examples[1:]])).logits[0, -later:].float()
            for x in (examples[0], first)
        ]
    return ((rows[0] - rows[1]).abs().max() / rows[0].std()).item()


def _alone(model, examples: list[dict]) -> list[torch.Tensor]:
    """Return the logits, (tokens, vocabulary), of each example alone, by the library's attention."""
    before = model.config._attn_implementation  # private, as in packing.set_attention
    packing.set_attention(model, packing.library_attention(model))
    rows = [{"input_ids": torch.tensor([example["input_ids"]]), "use_cache": False} for example in examples]
    try:
        with _measuring(model):
            return [_outputs(model, row).logits[0] for row in rows]
    finally:
        packing.set_attention(model, before)


def _outputs(model, batch: dict):
    device = next(model.parameters()).device
    return model(**{name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()})


@contextmanager
def _measuring(model):
    """Evaluate without gradients. FSDP reshards in the backward pass, which never comes here: reshard at the end."""
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
    """Check before the first step, with the run's kernels, type and mesh, that packing is right; if not, fall back.

    Args:
        examples: see deviation_from_solo.
        fall_back: called on each process if packing is not right, with the model and the reason as part of a sentence.

    Attributes:
        deviation: the largest deviation_from_solo of all processes; None until it was measured.
        reason: why packing is not right here; empty if it is.
    """

    def __init__(self, examples: list[dict], fall_back):
        self.examples, self.fall_back = examples, fall_back
        self.deviation: float | None = None
        self.reason = ""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.deviation is not None:  # the rehearsal has measured it
            return
        try:
            measured = [deviation_from_solo(model, self.examples), dependence(model, self.examples)]
        except (NotImplementedError, TypeError, ValueError) as e:  # the model's code cannot handle such batches
            measured, self.reason = [math.inf, math.inf], first_line(e)
            _alone(model, self.examples[:1])  # FSDP was interrupted, with parameters half gathered: this restores order
        # If some ranks packed and others padded, their losses would differ: if one rank cannot pack, none does.
        worst = torch.tensor([x if x == x else math.inf for x in measured], device=args.device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
        half = args.bf16 or args.fp16 or next(model.parameters()).dtype != torch.float32
        self.deviation, moved = worst.tolist()
        if not self.deviation <= (MAX_DEVIATION_HALF if half else MAX_DEVIATION):
            self.reason = self.reason or f"examples in one row differ from the same alone by {self.deviation:.2g}"
        elif moved > MAX_DEPENDENCE:
            self.reason = f"an example moves by {moved:.2g} when another of its row changes"
        if self.reason:
            self.fall_back(model, self.reason)
            say(f"warning: examples are padded, as with padding=longest: {self.reason}")


def examples_to_check(dataset, count: int = 3) -> list[dict]:
    """Return the ``count`` shortest of the first hundred examples, repeated if there are fewer."""
    shortest = sorted(range(min(len(dataset), 100)), key=lambda i: len(dataset[i]["input_ids"]))
    return [dataset[shortest[i % len(shortest)]] for i in range(count)]
