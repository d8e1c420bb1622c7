"""The held-out loss is the mean over all supervised tokens, whatever the batches are."""

from __future__ import annotations

import pytest
import torch
from made_examples import Examples, make_examples, tiny
from torch.nn import functional
from transformers import TrainerCallback

import train


@pytest.mark.parametrize("padding", ["free", "longest"])
def test_it_does_not_depend_on_how_examples_are_batched(padding, tmp_path):
    model, examples = tiny("llama"), make_examples(11)
    losses = []
    with torch.no_grad():
        for example in examples:
            ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"][1:])
            losses += functional.cross_entropy(model(ids).logits[0, :-1], labels, reduction="none")[labels >= 0]
    expected = torch.stack(losses).mean().item()

    measured = []
    for size in (1, 4, 11):
        args = train.TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, per_device_eval_batch_size=size, report_to="none", max_steps=1
        )
        args.remove_unused_columns = False
        rows, collator, check = train.make_batches(
            model, Examples(examples), 0, train.DataArguments(padding=padding), args
        )
        trainer = train.Trainer(
            model=model, args=args, train_dataset=rows, eval_dataset=Examples(examples), data_collator=collator
        )
        measured.append(trainer.evaluate()["eval_loss"])
    assert measured == pytest.approx([expected] * 3, abs=1e-5)


def test_callbacks_get_the_same_figure(tmp_path):
    seen = []

    class Note(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen.append(metrics["eval_loss"])

    args = train.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    args.remove_unused_columns = False
    collator = train.DataCollatorForSupervisedDataset(0)
    trainer = train.Trainer(
        model=tiny("opt"),
        args=args,
        eval_dataset=Examples(make_examples(9)),
        data_collator=collator,
        callbacks=[Note()],
    )
    result = trainer.evaluate()["eval_loss"]
    assert seen == [result] and [e["eval_loss"] for e in trainer.state.log_history] == [result]
