"""Which model can do without padding: measured before the first step, as the run will be, not looked up in a list."""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch
import transformers
from torch.nn import functional

from alpaca.training import packing
from alpaca.training.distributed import say
from alpaca.training.examples import IGNORE_INDEX

# How far packed examples may be from the same ones alone (see deviation_from_solo), in float32 (tf32 keeps 10 bits of
# mantissa) and in half precision (bfloat16: 7 bits).
MAX_DEVIATION, MAX_DEVIATION_HALF = 0.03, 0.3
# How far they may move when another example of the row changes (see dependence). Exactly 0 where they do not see it; a
# mixture of experts rounds otherwise when others' tokens change.
MAX_DEPENDENCE = 0.01


def deviation_from_solo(model, examples: list[dict]) -> float:
    """How much it matters to examples to be in one row, under the attention that the model has now.

    Each example is computed alone, by the library's attention on plain input_ids, and all together in one row. On a
    sharded model every process must call it, with the same examples.

    Args:
        model: in whatever type, place and mesh; dropout is off meanwhile.
        examples: at least two ``{"input_ids": [int], "labels": [int]}``, short ones.

    Returns:
        The largest difference of a supervised logit, in standard deviations of the logits, or that of the mean loss
        in nats if it is larger. Rounding gives 1e-6 to 0.1, by the type; attention over the whole row 0.8 to 1.8 in
        the models that were tried. NaN when a logit is NaN.
    """
    with torch.no_grad(), _evaluating(model), _resharded(model):
        batch = packing.flatten(examples)
        together = _outputs(model, batch)
        with _attention(model, packing.library_attention(model)):
            alone = [
                _outputs(model, {"input_ids": torch.tensor([example["input_ids"]]), "use_cache": False}).logits[0]
                for example in examples
            ]
    keep, targets = batch["logits_to_keep"].to(together.loss.device), batch["shift_labels"][0].to(together.loss.device)
    alone = torch.cat(alone).float()[keep]
    by_logit = (together.logits[0].float() - alone).abs().max() / alone.std()
    by_loss = (together.loss.float() - functional.cross_entropy(alone, targets)).abs()
    return torch.stack([by_logit, by_loss]).max().item()


def dependence(model, examples: list[dict]) -> float:
    """How far the logits of a row's later examples move when the tokens of its first are put in reverse.

    Needs no bound for rounding: the later examples' own arithmetic is the same both times. It finds what
    deviation_from_solo may take for rounding in half precision, such as a recurrent layer that forgets quickly.

    Args:
        model: see deviation_from_solo.
        examples: see there.

    Returns:
        The largest difference of a supervised logit, in standard deviations of the logits.
    """
    first = {**examples[0], "input_ids": examples[0]["input_ids"][::-1]}
    later = sum(label != IGNORE_INDEX for example in examples[1:] for label in example["labels"][1:])
    with torch.no_grad(), _evaluating(model), _resharded(model):
        rows = [
            _outputs(model, packing.flatten([x, *examples[1:]])).logits[0, -later:].float()
            for x in (examples[0], first)
        ]
    return ((rows[0] - rows[1]).abs().max() / rows[0].std()).item()


def _outputs(model, batch: dict):
    device = next(model.parameters()).device
    return model(**{name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()})


@contextmanager
def _evaluating(model):
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _resharded(model):
    """FSDP gives shards back in the backward pass, and here is none: whoever looks next would see whole parameters."""
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            from torch.distributed.fsdp import FSDPModule

            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


@contextmanager
def _attention(model, name: str):
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = inner.config._attn_implementation
    packing.set_attention(model, name)
    try:
        yield
    finally:
        packing.set_attention(model, before)


class SelfCheck(transformers.TrainerCallback):
    """Before the first step, with the kernels, the type and the mesh of the run: packed is solo, or there is padding.

    Args:
        examples: see deviation_from_solo.
        fall_back: called with the reason, a piece of a sentence, on each process when packing is not right.

    Attributes:
        deviation: what deviation_from_solo gave, the largest of all processes; None until then.
        reason: why packing is not right here; empty when it is.
    """

    def __init__(self, examples: list[dict], fall_back):
        self.examples, self.fall_back = examples, fall_back
        self.deviation: float | None = None
        self.reason = ""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.deviation is None:  # else the preflight has called it, and told
            self(model, args)
            if self.reason:
                say(f"warning: examples are padded, as with --padding longest: {self.reason}")

    def __call__(self, model, args: transformers.TrainingArguments) -> None:
        """Measures, and falls back if that is needed; on every process, the model on its device and mesh."""
        try:
            measured = [deviation_from_solo(model, self.examples), dependence(model, self.examples)]
        except (NotImplementedError, TypeError, ValueError) as e:  # its code does not know such batches
            measured, self.reason = [math.inf, math.inf], (str(e).splitlines() or [type(e).__name__])[0]
            # FSDP stands in the middle of a forward pass now, parameters half gathered: a whole one puts it in order.
            with (
                torch.no_grad(),
                _evaluating(model),
                _resharded(model),
                _attention(model, packing.library_attention(model)),
            ):
                _outputs(model, {"input_ids": torch.tensor([self.examples[0]["input_ids"]]), "use_cache": False})
        # Packing here and padding there would count other losses: one process that cannot decides for all.
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
            self.fall_back(self.reason)


def examples_to_check(dataset, count: int = 3) -> list[dict]:
    """Some short ones of the first hundred; one twice where there is no other, so that one can see another."""
    shortest = sorted(range(min(len(dataset), 100)), key=lambda i: len(dataset[i]["input_ids"]))
    return [dataset[shortest[i % len(shortest)]] for i in range(count)]
