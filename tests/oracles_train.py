"""The slow way to tokens and labels: each record alone, the prompt tokenised twice, as the original does."""

from __future__ import annotations

import utils


def tokenize_one_by_one(record: dict, tokenizer, max_length: int) -> dict:
    prompt = utils.format_prompt(record["instruction"], record["input"])
    text = prompt + record["output"] + tokenizer.eos_token
    ids = tokenizer(text, max_length=max_length, truncation=True)["input_ids"]
    masked = len(tokenizer(prompt, max_length=max_length, truncation=True)["input_ids"])
    return {"input_ids": ids, "labels": [-100] * masked + ids[masked:]}


def rows_one_by_one(messages: list[dict], tokenizer, generated, end_id: int, max_length: int) -> list[dict]:
    """The slow way to the rows of a conversation without typed special tokens: each answer on its own, all rendered.

    ``generated(content)`` is what the template makes a model write for an answer.
    """
    rows: list[dict] = []
    for k, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        text = tokenizer.apply_chat_template(messages[:k], add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(prompt) >= max_length:
            if rows:
                rows[-1]["cut"] = True
            break
        answer = [*_behind([text, "\n", "a"], generated(message["content"]), tokenizer), end_id]
        if rows and prompt[: len(rows[-1]["input_ids"])] == rows[-1]["input_ids"]:
            labels = rows.pop()["labels"]
        else:
            labels = []
        labels = labels + [-100] * (len(prompt) - len(labels)) + answer
        rows.append({"input_ids": prompt + answer, "labels": labels, "cut": False})
    for row in rows:
        row["cut"] = row["cut"] or len(row["input_ids"]) > max_length
        row["input_ids"], row["labels"] = row["input_ids"][:max_length], row["labels"][:max_length]
    return rows


def _behind(befores: list[str], text: str, tokenizer) -> list[int]:
    """The tokens of a text behind the first other text with which it shares no token."""
    for before in befores:
        encoded = tokenizer(before + text, add_special_tokens=False, return_offsets_mapping=True)
        spans = encoded["offset_mapping"]
        if not any(start < len(before) < end for start, end in spans):
            return [id_ for id_, (start, _) in zip(encoded["input_ids"], spans, strict=True) if start >= len(before)]
    raise AssertionError(f"no token may span the border before {text!r}")


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
