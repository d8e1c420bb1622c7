"""Trainers as train.py makes them, on a tiny model, and short forms of what preflight finds."""

from __future__ import annotations

import torch
from conftest import make_records

import train
from alpaca.training.preflight.rehearsal import rehearse


def make_run(folder, out, trainer_class=train.Trainer, records=24, dropout=0.0, **arguments):
    """Return (make, args, rows): make(args, rows, held_out) gives a trainer with the model freshly loaded.

    The run has three steps on the model in ``folder``; ``arguments`` are TrainingArguments.
    """
    tokenizer = train.load_tokenizer(folder, model_max_length=512, padding_side="right")

    def load():
        model = train.load_model(folder, torch.float32)
        model.config.dropout = dropout
        for module in model.modules():
            if dropout and isinstance(getattr(module, "dropout", None), float):
                module.dropout = dropout
        train.add_special_tokens(tokenizer, model)
        return model

    def make(args, rows, held_out=None):
        collator = train.DataCollatorForSupervisedDataset(tokenizer.pad_token_id)
        return trainer_class(
            model=load(),
            args=args,
            train_dataset=rows,
            eval_dataset=held_out,
            data_collator=collator,
            processing_class=tokenizer,
        )

    load()  # which adds what the tokenizer lacks
    rows = train.SupervisedDataset(make_records(records), tokenizer, 512, "training")
    defaults = {"max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "logging_steps": 1}
    defaults |= {"save_strategy": "steps", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    args = train.TrainingArguments(output_dir=str(out), **(defaults | arguments))
    args.remove_unused_columns = False
    return make, args, rows


def make_trainer(*made, **options):
    """Return the trainer of make_run."""
    make, args, rows = make_run(*made, **options)
    return make(args, rows)


def save_whole(trainer, folder) -> None:
    trainer.save_whole_model(folder)


def rehearsed(*made, save=save_whole, **options):
    """Rehearse the run that make_run makes, and return what was found."""
    make, args, rows = make_run(*made, **options)
    return rehearse(make, args, rows, None, save)


def whats(findings, level=None) -> str:
    return " | ".join(finding.what for finding in findings if level in (None, finding.level))


def levels(findings) -> list[str]:
    return [finding.level for finding in findings]
