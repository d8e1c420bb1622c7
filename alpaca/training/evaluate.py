"""Evaluation: losses summed over each example's supervised tokens, independent of batching; the loss of each record;
sample answers, to watch a model learn."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import islice

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import TrainerCallback

from alpaca.chat_template import asked_of, chat_turns, messages_of, saved_template
from alpaca.common.text import first_line, printable, shorten
from alpaca.inference.chat import request_ids
from alpaca.inference.generate import Answer, batches, context_length, end_ids, greedily, left_padded
from alpaca.prompts import answer_ids
from alpaca.training.distributed import say
from alpaca.training.examples import IGNORE_INDEX, make_example
from alpaca.training.packing import SEGMENTS, library_attention, pad, set_attention

BATCH_TOKENS = 2048  # padding included: their logits over 128,256 tokens are 1 GB in float32
LONGEST = 60  # tokens of a sample answer
KEY = "eval_sample_{}"  # in the Trainer's log, and so in TensorBoard, W&B, trackio and checkpoints
ANSWER = "\n\n→ "  # between prompt and answer in it


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
    """Return the loss of each record's last answer, given the prompt's tokens as in training and chat.

    Args:
        model: a causal model, which computes in its own type.
        tokenizer: the model's.
        records: as load_records() returns them; what does not fit the model's context is cut off, as in training.
        template: as for inference.chat.request_ids(); by default the one that the model was trained with.

    Returns:
        Mean negative log-likelihood in nats per token, and the number of tokens; None if no token of the output fits.
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


# ---------------------------------------------------------------------------------------------------------------------
# Sample answers.


class Samples(TrainerCallback):
    """Answer the first held-out prompts with chat's tokens and code, and log the answers.

    Training is not affected: nothing is sampled at temperature 0, the library has just evaluated, so the model is in
    eval mode, and the attention of flattened batches is restored. Under FSDP every forward pass gathers weights from
    all ranks, so each rank answers all prompts, always up to the last token: none may stop early. Under DeepSpeed
    there are no answers, since its engine has no whole weights for this. A model that cannot generate is reported once.

    Args:
        trainer: of the run.
        records: held out; the first three whose prompts are shorter than ``longest`` tokens are used.
    """

    def __init__(self, trainer, records: Sequence[dict], longest: int):
        self.trainer, self.tokenizer = trainer, trainer.processing_class
        template = saved_template(self.tokenizer)
        asked = ((record, request_ids(self.tokenizer, template, [record])[0]) for record in records)
        chosen = list(islice(((record, ids) for record, ids in asked if len(ids) < longest), 3))
        self.texts = [asked_of(record)[-1]["content"] for record, _ in chosen]
        self.prompts = [ids for _, ids in chosen]
        if trainer.is_deepspeed_enabled and self.prompts:
            self.prompts = []
            say("note: no sample answers under DeepSpeed")

    def on_evaluate(self, args, state, control, **kwargs):
        trainer = self.trainer
        if not self.prompts or not (trainer.is_fsdp_enabled or state.is_world_process_zero):
            return
        try:
            answers = self._answers(trainer.model)
        except Exception as e:  # from any architecture; training continues
            self.prompts = []
            say(f"note: no sample answers, as this model cannot generate here: {first_line(e)}")
            return
        pairs = list(zip(self.texts, answers, strict=True))
        trainer.log({KEY.format(n): text + ANSWER + answer for n, (text, answer) in enumerate(pairs)})
        for text, answer in pairs if state.is_world_process_zero else ():
            tqdm.write(f"    {shorten(printable(text), 50)} → {shorten(printable(answer), 100) or '(nothing)'}")
        sys.stdout.flush()
        trainer.meter.pause()

    def _answers(self, model) -> list[str]:
        attention, answers = model.config._attn_implementation, []  # private (5.23)
        ids, mask = left_padded(self.prompts, model.device)
        if attention == SEGMENTS:
            set_attention(model, library_attention(model))
        try:
            made = greedily(model, ids, mask, LONGEST)
        finally:
            if attention == SEGMENTS:
                set_attention(model, SEGMENTS)
        for tokens in made[:, ids.shape[1] :].tolist():
            answers.append(Answer(self.tokenizer, end_ids(model, self.tokenizer), LONGEST))
            for token in tokens:
                answers[-1].add(token)
        return [answer.text for answer in answers]

    def shown(self) -> list[dict]:
        """Return each prompt with its answers by step; those of earlier sessions come from a checkpoint's log."""
        found = []
        for n, text in enumerate(self.texts):
            log = [entry for entry in self.trainer.state.log_history if KEY.format(n) in entry]
            answers = {entry["step"]: entry[KEY.format(n)].removeprefix(text + ANSWER) for entry in log}
            found.append({"prompt": text, "answers": [{"step": s, "answer": answer} for s, answer in answers.items()]})
        return [sample for sample in found if sample["answers"]]
