"""A trainer as train.py makes it, on a tiny model, and short forms of what preflight finds."""

from __future__ import annotations

import torch
from conftest import make_records

import train


def make_trainer(folder, out, trainer_class=train.Trainer, records=24, dropout=0.0, **arguments):
    """Return a trainer of three steps on the model in ``folder``; ``arguments`` are TrainingArguments."""
    tokenizer = train.load_tokenizer(folder, model_max_length=512, padding_side="right")
    model = train.load_model(folder, torch.float32)
    model.config.dropout = dropout
    for module in model.modules():
        if dropout and isinstance(getattr(module, "dropout", None), float):
            module.dropout = dropout
    train.add_special_tokens(tokenizer, model)
    dataset = train.SupervisedDataset(make_records(records), tokenizer, 512, "training")
    defaults = {"max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "logging_steps": 1}
    defaults |= {"save_strategy": "steps", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    args = train.TrainingArguments(output_dir=str(out), **(defaults | arguments))
    args.remove_unused_columns = False
    collator = train.DataCollatorForSupervisedDataset(tokenizer.pad_token_id)
    return trainer_class(
        model=model, args=args, train_dataset=dataset, data_collator=collator, processing_class=tokenizer
    )


def whats(findings, level=None) -> str:
    return " | ".join(finding.what for finding in findings if level in (None, finding.level))


def levels(findings) -> list[str]:
    return [finding.level for finding in findings]
