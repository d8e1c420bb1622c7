"""Makes instruction data by self-instruct: teacher → parse → filter → dedup → regen.json.

A hosted teacher (its key in OPENAI_API_KEY):

    python generate_instruction.py generate_instruction_following_data --output_dir ./ --num_instructions_to_generate 100 --model_name MODEL

A teacher of your own, behind any OpenAI-compatible server:

    python generate_instruction.py generate_instruction_following_data --base_url http://127.0.0.1:8000/v1 --model_name MODEL --output_dir ./

Use --api completions for a base model, which continues a text, and --api chat (the default) for everything else. A run
goes on from the regen.json that it finds in --output_dir.
"""  # noqa: E501

from __future__ import annotations

import random
import re
import string
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

import utils
from alpaca import UserError
from alpaca.rouge import RougePool

# A reply whose task cannot be done in text alone, judged by a word of its instruction.
KEYWORDS = (
    "image images graph graphs picture pictures file files map maps draw plot video audio music flowchart diagram"
).split() + ["go to"]
KEYWORD = re.compile(rf"\b({'|'.join(KEYWORDS)})\b", re.IGNORECASE)
MIN_WORDS, MAX_WORDS = 4, 150  # of an instruction: three words say too little, 150 are a document
MAX_SIMILARITY = 0.7  # ROUGE-L F to any seed or kept instruction, as in Self-Instruct

PATIENCE = 20  # batches in a row that bring nothing new: the teacher repeats itself, and would for ever

ITEM = re.compile(r"^\s*(?:###\s*)?(\d+)\.\s*Instruction:", re.MULTILINE)
BOUNDARY = re.compile(r"###\s*(?=\d+\.\s*Instruction:|$)")  # not the ### of a Markdown heading inside an answer
FIELD = re.compile(r"(\d+)\.\s*(Instruction|Input|Output):")


# ---------------------------------------------------------------------------------------------------------------------
# Pure functions: text in, text or records out.


def encode_prompt(seed_tasks: list[dict], prompt: str) -> str:
    """The request: the prompt, the seed tasks as numbered examples, and the number that the teacher goes on with."""
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


def parse_response(text: str, finish_reason: str | None, num_prompt_instructions: int) -> list[dict | None]:
    """Cuts a reply into records; an item that is not exactly instruction, input and output comes back as None.

    The last item is left out when the reply stopped for its length: it is cut off, however whole it looks.
    """
    first = ITEM.search(text)
    if first and (first.start() == 0 or int(first[1]) == num_prompt_instructions + 1):
        text = text[first.start() :]  # a chat model may say something before its first item
    else:  # the reply goes on where the prompt ended
        text = f"{num_prompt_instructions + 1}. Instruction:{text}"
    items = [item for item in BOUNDARY.split(text) if item.strip()]
    if finish_reason == "length":
        items = items[:-1]
    return [_parse_item(item) for item in items]


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


def filter_reason(record: dict | None) -> str | None:
    """Why a parsed record is dropped, or None when it is kept. The order is the original's; empty output is ours."""
    if record is None:
        return "malformed"
    instruction = record["instruction"]
    words = len(instruction.split())
    if words < MIN_WORDS:
        return "too short"
    if words > MAX_WORDS:
        return "too long"
    if KEYWORD.search(instruction):
        return "not doable in text"
    if instruction.startswith("Write a program"):  # ambiguous: is the answer the program or what it prints?
        return "asks for a program"
    if instruction[0] in string.punctuation:
        return "starts with punctuation"
    if not instruction[0].isascii():
        return "starts with non-ASCII"
    if not record["output"]:
        return "empty output"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The run.


def load_seed_tasks(path: str) -> list[dict]:
    """Reads seed tasks, one JSON object a line, each with an instruction and at least one instance."""
    tasks = utils.jload(path)
    if not tasks:
        raise UserError(f"{path} holds no seed tasks: give a file with at least one")
    for number, task in enumerate(tasks, 1):
        try:
            instance = task["instances"][0]
            texts = (task["instruction"], instance["input"], instance["output"])
        except (KeyError, IndexError, TypeError):
            texts = (None,)
        if not all(isinstance(text, str) for text in texts):
            raise UserError(
                f'{path}, task {number}: needs an "instruction" and "instances": [{{"input": …, "output": …}}]'
            )
    return tasks


def generate_instruction_following_data(
    output_dir: str = "./",
    seed_tasks_path: str = "./seed_tasks.jsonl",
    prompt_path: str = "./prompt.txt",
    num_instructions_to_generate: int = 100,
    model_name: str | None = None,
    num_prompt_instructions: int = 3,
    request_batch_size: int = 5,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_tokens: int = 3072,
    api: str = "chat",
    base_url: str | None = None,
    request_timeout: float = 600.0,
    time_limit: float | None = None,
    seed: int | None = None,
    num_cpus: int | None = None,
) -> None:
    """Asks a teacher for new instructions until enough are kept, and writes them to OUTPUT_DIR/regen.json.

    Each kept record also has its 10 nearest instructions with their ROUGE-L (most_similar_instructions) and its mean
    ROUGE-L to all seeds and kept instructions (avg_similarity_score). Ctrl-C loses nothing that was kept.

    Args:
        output_dir: where regen.json is written; one that is there is continued.
        seed_tasks_path: JSON Lines of seed tasks; examples are drawn from it for each request.
        prompt_path: the text that opens each request.
        num_instructions_to_generate: stop when this many are kept, those of an earlier run included.
        model_name: the teacher, by the name that its server knows.
        num_prompt_instructions: seed tasks shown in each request.
        request_batch_size: requests in flight at once.
        temperature: sampling temperature; 0 asks for the likeliest text.
        top_p: nucleus sampling.
        max_tokens: the longest reply, in tokens.
        api: chat, or completions for a base model.
        base_url: the server, e.g. http://127.0.0.1:8000/v1 (default: OPENAI_BASE_URL, then api.openai.com).
        request_timeout: seconds until a request is tried again.
        time_limit: stop asking after this many seconds and keep what there is (default: no limit).
        seed: draws the same examples, and asks the teacher to sample the same way, each time.
        num_cpus: no longer needed (similarity takes microseconds in one process); accepted and ignored.
    """
    if api not in ("chat", "completions"):
        raise UserError(f"--api takes chat or completions, not {api!r}")
    for name, value in (
        ("num_prompt_instructions", num_prompt_instructions),
        ("request_batch_size", request_batch_size),
        ("max_tokens", max_tokens),
    ):
        if value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    if not model_name:
        raise UserError("no teacher named: --model_name takes the name that its server knows")
    if num_cpus is not None:
        print("note: --num_cpus has no effect any more: one process is enough")
    seed_tasks = load_seed_tasks(seed_tasks_path)
    if num_prompt_instructions > len(seed_tasks):
        raise UserError(
            f"--num_prompt_instructions {num_prompt_instructions} is more than the {len(seed_tasks)} tasks "
            f"in {seed_tasks_path}"
        )
    try:
        prompt = Path(prompt_path).read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"--prompt_path {prompt_path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompt_path {prompt_path} is not UTF-8 text: convert it to UTF-8") from None
    client = utils.openai_client(base_url, request_timeout)

    output_path = Path(output_dir) / "regen.json"
    output_path.parent.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is told before any request
    kept = utils.load_records(output_path) if output_path.exists() else []
    if kept:
        print(f"continuing {output_path}: {len(kept)} instructions are there")
    pool = RougePool()
    instructions = []  # the texts of the pool, in its order: seeds, then kept
    for record in seed_tasks + kept:
        pool.add(record["instruction"])
        instructions.append(record["instruction"])

    # A random state for each number of records at the start, so that a continued run does not ask the same again.
    rng = random.Random(None if seed is None else f"{seed}/{len(kept)}")
    # The prompt asks for 20 tasks; a base model would go on for ever.
    stop = ["\n21. Instruction:"]
    dropped, failures, requests, parsed = Counter(), Counter(), 0, 0
    started, already, barren = time.monotonic(), len(kept), 0
    ended = None  # why the run ended early

    with tqdm(total=num_instructions_to_generate, initial=len(kept), desc="kept", unit="instruction") as bar:
        while len(kept) < num_instructions_to_generate:
            if time_limit is not None and time.monotonic() - started > time_limit:
                ended = f"the time limit of {time_limit:g} s"
            elif barren == PATIENCE:
                ended = f"{PATIENCE} batches in a row without a new instruction (raise --temperature?)"
            if ended:
                break
            before = len(kept)
            prompts = [
                encode_prompt(rng.sample(seed_tasks, num_prompt_instructions), prompt)
                for _ in range(request_batch_size)
            ]
            request_seed = None if seed is None else rng.randrange(2**31 - request_batch_size)
            decoding = utils.OpenAIDecodingArguments(max_tokens, temperature, top_p, stop, request_seed)
            replies = utils.openai_completion(client, prompts, model_name, decoding, api)
            requests += len(replies)
            failures.update(reply.error for reply in replies if reply.error)
            if all(reply.error for reply in replies):
                raise UserError(f"all {len(replies)} requests of a batch failed: {_table(failures)}; {len(kept)} kept")

            for reply in replies:
                if reply.error:
                    continue
                for record in parse_response(reply.text, reply.finish_reason, num_prompt_instructions):
                    parsed += 1
                    reason = filter_reason(record)
                    if reason is None:
                        scores = pool.scores(record["instruction"])
                        if scores.max() > MAX_SIMILARITY:
                            reason = "near-duplicate"
                    if reason:
                        dropped[reason] += 1
                        continue
                    nearest = scores.argsort(kind="stable")[::-1][:10]
                    record["most_similar_instructions"] = {instructions[i]: float(scores[i]) for i in nearest}
                    record["avg_similarity_score"] = float(scores.mean())
                    kept.append(record)
                    pool.add(record["instruction"])
                    instructions.append(record["instruction"])
                    bar.total = max(bar.total, len(kept))  # a reply may hold more than was asked for
                    bar.update(1)
            barren = 0 if len(kept) > before else barren + 1
            if len(kept) > before:
                utils.jdump(kept, output_path)
            bar.set_postfix(requests=requests, parsed=parsed)

    if requests:
        print(f"{requests} requests gave {parsed} items; dropped: {_table(dropped) or 'none'}")
    if failures:
        print(f"failed requests: {_table(failures)}")
    if ended:
        print(f"{ended} ended the run before {num_instructions_to_generate} were kept")
    print(f"{len(kept)} instructions in {output_path} ({len(kept) - already} new)")


def _table(counts: Counter) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


if __name__ == "__main__":
    utils.run_cli({"generate_instruction_following_data": generate_instruction_following_data})
