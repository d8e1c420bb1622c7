"""The slow way to tokens and labels: each record alone, the prompt tokenised twice, as the original does."""

from __future__ import annotations

import utils


def tokenize_one_by_one(record: dict, tokenizer, max_length: int) -> dict:
    prompt = utils.format_prompt(record["instruction"], record["input"])
    text = prompt + record["output"] + tokenizer.eos_token
    ids = tokenizer(text, max_length=max_length, truncation=True)["input_ids"]
    masked = len(tokenizer(prompt, max_length=max_length, truncation=True)["input_ids"])
    return {"input_ids": ids, "labels": [-100] * masked + ids[masked:]}
