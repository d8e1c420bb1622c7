"""How likely a model finds the answers that are known to be good: training's held-out loss, item by item."""

from __future__ import annotations

import torch

from alpaca.data.instruction_sets import Item
from alpaca.inference.generate import context_length
from alpaca.inference.load import batches
from alpaca.training.evaluate import sums_by_example
from alpaca.training.examples import IGNORE_INDEX, preprocess
from alpaca.training.packing import pad

BATCH_TOKENS = 2048  # padding included: their logits over 128,256 tokens are 1 GB in float32


@torch.no_grad()
def reference_losses(model, tokenizer, records: list[dict]) -> list[tuple[float, int] | None]:
    """The loss of each record's output after its prompt, with EOS, as training counts it (tokens.preprocess).

    Args:
        model: a causal model; its own type is computed in.
        tokenizer: its own.
        records: {"instruction", "input", "output"}; what does not fit the model's context is cut off, as in training.

    Returns:
        Mean negative log-likelihood in nats a token, and the number of tokens; None where no token of the output fits.
    """
    examples = preprocess(records, tokenizer, context_length(model) or 10**9)
    losses: list[tuple[float, int] | None] = [None] * len(examples)
    scored = [i for i, example in enumerate(examples) if any(label != IGNORE_INDEX for label in example["labels"][1:])]
    for batch in batches([len(examples[i]["input_ids"]) for i in scored], 0, BATCH_TOKENS):
        rows = [scored[place] for place in batch]
        inputs = {key: value.to(model.device) for key, value in pad([examples[i] for i in rows], 0).items()}
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
        for row, (total, count) in zip(rows, sums_by_example(logits, inputs).tolist(), strict=True):
            losses[row] = (total / count, int(count))
    return losses


def reference_fields(model, tokenizer, items: list[Item]) -> list[dict]:
    """{"reference_loss", "reference_tokens"} of each item, or {} for one without a reference that could be scored."""
    known = [item for item in items if item.reference]
    records = [{"instruction": item.instruction, "input": item.input, "output": item.reference} for item in known]
    scores = reference_losses(model, tokenizer, records)
    scored = {item.id: score for item, score in zip(known, scores, strict=True) if score}
    return [
        dict(zip(("reference_loss", "reference_tokens"), scored[item.id], strict=True)) if item.id in scored else {}
        for item in items
    ]
