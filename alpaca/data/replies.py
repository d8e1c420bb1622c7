"""A teacher's replies: what the prompt shows, and the records that a reply holds."""

from __future__ import annotations

import re

# Bounded repetitions, so that a reply of ten thousand newlines or digits takes no time.
ITEM = re.compile(r"^[ \t]{0,9}(?:###\s{0,9})?(\d{1,4})\.\s{0,9}Instruction:", re.MULTILINE)
BOUNDARY = re.compile(r"###\s*(?=\d+\.\s*Instruction:|$)")  # not the ### of a Markdown heading inside an answer
FIELD = re.compile(r"(\d{1,4})\.\s{0,9}(Instruction|Input|Output):")
COMPLETE = (None, "stop", "eos", "eos_token", "end_turn", "stop_sequence")  # finish reasons of a reply that is whole


def encode_prompt(seed_tasks: list[dict], prompt: str) -> str:
    """Return a request: the prompt, the seed tasks as numbered examples, and the number of the next one."""
    text = prompt.rstrip("\n") + "\n"
    for number, task in enumerate(seed_tasks, 1):
        instance = task["instances"][0]
        instruction = re.sub(r"\s+", " ", task["instruction"]).strip().rstrip(":")
        text += (
            f"###\n{number}. Instruction: {instruction}\n"
            f"{number}. Input:\n{instance['input'] or '<noinput>'}\n"
            f"{number}. Output:\n{instance['output']}\n"
        )
    return text + f"###\n{len(seed_tasks) + 1}. Instruction:"


def parse_response(text: str, finish_reason: str | None, num_prompt_instructions: int) -> list[dict | str]:
    """Split a reply into records; an item that is not exactly instruction, input and output stays text.

    The last item of a reply that did not come to its own end is left out: it may be cut off and still look whole.
    """
    first = ITEM.search(text)
    if first and (not text[: first.start()].strip() or int(first[1]) == num_prompt_instructions + 1):
        text = text[first.start() :]  # a chat model may say something before its first item
    else:  # the reply continues the prompt
        text = f"{num_prompt_instructions + 1}. Instruction:{text}"
    items = [item for item in BOUNDARY.split(text) if item.strip()]
    if finish_reason not in COMPLETE:
        items = items[:-1]
    return [_parse_item(item) or item for item in items]


def _parse_item(item: str) -> dict | None:
    # split: [before, number, field, text, number, field, text, …]; two items run together give more than three fields
    parts = FIELD.split(item)
    numbers, fields, texts = set(parts[1::3]), parts[2::3], [text.strip() for text in parts[3::3]]
    if fields != ["Instruction", "Input", "Output"] or len(numbers) != 1:
        return None
    instruction, input_text, output = texts
    return {
        "instruction": instruction,
        "input": "" if input_text.lower() == "<noinput>" else input_text,
        "output": output,
    }
