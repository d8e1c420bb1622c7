"""What a teacher is asked for: a prompt with examples, as numbered text or as JSON."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from alpaca import UserError
from alpaca.common.records import json_text
from alpaca.data.topics import Topic

FIELDS = ("instruction", "input", "output")
LABEL_FIRST = ("instruction", "output", "input")
ABOUT = "From task {number} on, each task is about this topic: {topic}."
LABELS = (
    "Each task here is a classification, and its instruction names the possible labels. Write the output first: one "
    "label, and each label about as often as the others. Then write an input to which that label applies."
)


def _object(properties: dict) -> dict:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


TASK = _object({name: {"type": "string"} for name in FIELDS})
TASKS = _object({"tasks": {"type": "array", "items": TASK}})
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "tasks", "strict": True, "schema": TASKS}}


@dataclass(frozen=True)
class Draw:
    """What request i asks: a function of the run's seed, of i, and of the records that it may show.

    Args:
        prompt: opens each request.
        seed_tasks: as from load_seed_tasks().
        seed: the run's.
        examples: tasks that a request shows.
        generated: how many of them are records that the run has kept, once there are that many (Self-Instruct shows 2
            of 8: Wang et al., 2022, arXiv:2212.10560).
        topics: a cycle of topics, one for each request; empty for none.
        output_first: ask for classification tasks apart from the others, their label before their input. A label that
            follows its input is mostly the same one (Self-Instruct, section 2.2). The share of such requests is that of
            ``is_classification`` among the seed tasks.
        as_json: ask for JSON; else for numbered text.

    Raises:
        UserError: there are too few seed tasks of a kind.
    """

    prompt: str
    seed_tasks: list[dict]
    seed: int
    examples: int = 3
    generated: int = 0
    topics: Sequence[Topic] = ()
    output_first: bool = False
    as_json: bool = False

    def __post_init__(self):
        if not 0 <= self.generated <= self.examples:
            raise UserError(f"generated_in_prompt must be 0 to {self.examples}, the examples in a request")
        for kind, name in ((True, "are"), (False, "are not")) if self.output_first else ():
            if (count := len(self._seed_tasks(kind))) < self.examples:
                need = f"output_first needs {self.examples} seed tasks that {name} classification"
                raise UserError(f'{need} ("is_classification"), and there are {count}')

    def topic(self, i: int) -> Topic | None:
        """Return the topic of request i."""
        return self.topics[i % len(self.topics)] if self.topics else None

    def asks_labels(self, i: int) -> bool:
        """Return whether request i asks for classification tasks."""
        share = len(self._seed_tasks(True)) / len(self.seed_tasks) if self.output_first else 0.0
        return random.Random(f"{self.seed}/{i}/labels").random() < share

    def request(self, i: int, kept: list[dict]) -> tuple[str, int]:
        """Return request i and the seed for its server.

        Args:
            i: its number.
            kept: records that it may show.
        """
        labels, rng = self.asks_labels(i), random.Random(f"{self.seed}/{i}")
        pool = self.seed_tasks
        if self.output_first:
            pool = self._seed_tasks(labels)
            kept = [record for record in kept if bool(record.get("is_classification")) == labels]
        count = min(self.generated, len(kept))
        tasks = rng.sample(pool, self.examples - count)
        if count:
            tasks += [{**record, "instances": [record]} for record in rng.sample(kept, count)]
            rng.shuffle(tasks)
        more = [LABELS] if labels else []
        if topic := self.topic(i):
            more.append(f"{ABOUT.format(number=self.examples + 1, topic=topic.name)} {topic.note}".rstrip())
        opening, _, last = self.prompt.rstrip().rpartition("\n")
        prompt = "\n\n".join([opening.rstrip(), *more, last]).lstrip() if more else self.prompt
        text = encode_json_prompt(tasks, prompt) if self.as_json else encode_prompt(tasks, prompt, labels)
        return text, rng.randrange(2**31)

    def _seed_tasks(self, classification: bool) -> list[dict]:
        return [task for task in self.seed_tasks if bool(task.get("is_classification")) == classification]


def encode_prompt(seed_tasks: list[dict], prompt: str, output_first: bool = False) -> str:
    """Return a request: the prompt, the seed tasks as numbered examples, and the number of the next one."""
    text = prompt.rstrip("\n") + "\n"
    for number, task in enumerate(map(_example, seed_tasks), 1):
        text += f"###\n{number}. Instruction: {task['instruction']}\n"
        for name in (LABEL_FIRST if output_first else FIELDS)[1:]:
            text += f"{number}. {name.capitalize()}:\n{task[name]}\n"
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
