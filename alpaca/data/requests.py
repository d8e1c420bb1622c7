"""What a teacher is asked for: a prompt with examples, as numbered text or as JSON."""

from __future__ import annotations

import re

from alpaca.common.records import json_text


def _object(properties: dict) -> dict:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


TASK = _object({name: {"type": "string"} for name in ("instruction", "input", "output")})
TASKS = _object({"tasks": {"type": "array", "items": TASK}})
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "tasks", "strict": True, "schema": TASKS}}


def encode_prompt(seed_tasks: list[dict], prompt: str) -> str:
    """Return a request: the prompt, the seed tasks as numbered examples, and the number of the next one."""
    text = prompt.rstrip("\n") + "\n"
    for number, task in enumerate(map(_example, seed_tasks), 1):
        text += (
            f"###\n{number}. Instruction: {task['instruction']}\n"
            f"{number}. Input:\n{task['input']}\n"
            f"{number}. Output:\n{task['output']}\n"
        )
    return text + f"###\n{len(seed_tasks) + 1}. Instruction:"


def encode_json_prompt(seed_tasks: list[dict], prompt: str) -> str:
    """Return a request for JSON: the prompt, the seed tasks in the shape of JSON_SCHEMA, and what to reply with."""
    shown = json_text({"tasks": [_example(task) for task in seed_tasks]}, 2)
    rest = "Reply with the rest of the list, as one JSON object of the same shape, and with nothing else."
    return f"{prompt.rstrip()}\n{shown}\n\nThese are the first {len(seed_tasks)}. {rest}"


def _example(task: dict) -> dict:
    instance = task["instances"][0]
    instruction = re.sub(r"\s+", " ", task["instruction"]).strip().rstrip(":")
    return {"instruction": instruction, "input": instance["input"] or "<noinput>", "output": instance["output"]}
