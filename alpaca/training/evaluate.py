"""Losses summed over the supervised tokens of each example, however they are batched; and the loss of each record."""

from __future__ import annotations

import torch
from torch.nn import functional

from alpaca.chat_template import chat_turns, messages_of, saved_template
from alpaca.inference.chat import request_ids
from alpaca.inference.generate import batches, context_length
from alpaca.prompts import answer_ids
from alpaca.training.examples import IGNORE_INDEX, make_example
from alpaca.training.packing import pad

BATCH_TOKENS = 2048  # padding included: their logits over 128,256 tokens are 1 GB in float32


def sums_by_example(logits: torch.Tensor, batch: dict) -> torch.Tensor:
    """Return the summed loss of each example and the number of its labels.

    Args:
        logits: (examples, length, vocabulary) of a padded batch, or (1, labels, vocabulary) of a flattened one.
        batch: from packing.pad or packing.flatten.

    Returns:
        float64 (examples, 2).
    """
    if "shift_labels" in batch:
        targets, ends = batch["shift_labels"][0], batch["cu_seq_lens_q"]
        example = torch.searchsorted(ends[1:], batch["logits_to_keep"].to(ends), right=True)
        logits, examples = logits[0], len(ends) - 1
    else:
        learned = batch["labels"][:, 1:] != IGNORE_INDEX
        targets, examples = batch["labels"][:, 1:][learned], len(learned)
        example, logits = learned.nonzero()[:, 0], logits[:, :-1][learned]
    losses = functional.cross_entropy(logits.float(), targets, reduction="none").double()
    sums = torch.zeros(examples, 2, dtype=torch.float64, device=logits.device)
    return sums.index_add_(0, example, torch.stack([losses, torch.ones_like(losses)], dim=1))


@torch.no_grad()
def reference_losses(
    model, tokenizer, records: list[dict], template: str | None = None
) -> list[tuple[float, int] | None]:
    """Return the loss of each record's last answer after the tokens with which a model is asked it, as in training.

    Args:
        model: a causal model, which computes in its own type.
        tokenizer: the model's.
        records: as load_records() returns them; what does not fit the model's context is cut off, as in training.
        template: as for inference.chat.request_ids(); by default the one that the model was trained with.

    Returns:
        Mean negative log-likelihood in nats a token, and the number of tokens; None where no token of the output fits.
    """
    if not records:
        return []
    template, talks = template or saved_template(tokenizer), [messages_of(record) for record in records]
    if template == "chat":
        pairs = chat_turns(tokenizer, talks)
    else:
        answers = answer_ids(tokenizer, [messages[-1]["content"] for messages in talks])
        answers = [[*ids, tokenizer.eos_token_id] for ids in answers]
        pairs = zip(request_ids(tokenizer, template, records), answers, strict=True)
    examples = [make_example(prompt, answer, context_length(model)) for prompt, answer in pairs]
    losses: list[tuple[float, int] | None] = [None] * len(examples)
    scored = [i for i, one in enumerate(examples) if any(label != IGNORE_INDEX for label in one["labels"][1:])]
    for batch in batches([len(examples[i]["input_ids"]) for i in scored], 0, BATCH_TOKENS):
        rows = [scored[place] for place in batch]
        inputs = {key: value.to(model.device) for key, value in pad([examples[i] for i in rows], 0).items()}
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
        for row, (total, count) in zip(rows, sums_by_example(logits, inputs).tolist(), strict=True):
            losses[row] = (total / count, int(count))
    return losses
