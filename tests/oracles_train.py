"""The slow way to tokens and labels: each record alone, the prompt tokenised twice, as the original does."""

from __future__ import annotations

import utils


def tokenize_one_by_one(record: dict, tokenizer, max_length: int) -> dict:
    prompt = utils.format_prompt(record["instruction"], record["input"])
    text = prompt + record["output"] + tokenizer.eos_token
    ids = tokenizer(text, max_length=max_length, truncation=True)["input_ids"]
    masked = len(tokenizer(prompt, max_length=max_length, truncation=True)["input_ids"])
    return {"input_ids": ids, "labels": [-100] * masked + ids[masked:]}


def attention_by_mask(query, key, value, lengths: list[int], scaling: float, sliding_window: int | None = None):
    """Softmax over the whole row under a (total, total) mask: same segment, not later, not before the window."""
    import torch

    total = query.shape[2]
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = torch.zeros(total, total, dtype=torch.bool)
    for i in range(total):
        for j in range(i + 1):
            allowed[i, j] = segment[i] == segment[j] and (sliding_window is None or i - j < sliding_window)
    heads_each = query.shape[1] // key.shape[1]
    outputs = []
    for head in range(query.shape[1]):
        scores = query[0, head] @ key[0, head // heads_each].T * scaling
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
        outputs.append(weights @ value[0, head // heads_each])
    return torch.stack(outputs, dim=1)[None]  # (1, total, heads, dim)


def fewest_bins(lengths: list[int], capacity: int) -> int:
    """The optimum, by trying every bin for every example."""

    def place(i: int, rooms: tuple[int, ...]) -> int:
        if i == len(lengths):
            return len(rooms)
        best = place(i + 1, (*rooms, capacity - lengths[i]))
        for j, room in enumerate(rooms):
            if room >= lengths[i]:
                best = min(best, place(i + 1, (*rooms[:j], room - lengths[i], *rooms[j + 1 :])))
        return best

    return place(0, ())
