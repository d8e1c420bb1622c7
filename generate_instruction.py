"""Makes instruction data by self-instruct: teacher → parse → filter → dedup → regen.json.

A hosted teacher (its key in OPENAI_API_KEY):

    python generate_instruction.py generate_instruction_following_data --output_dir ./ --num_instructions_to_generate 100 --model_name MODEL

A teacher of your own, behind any OpenAI-compatible server:

    python generate_instruction.py generate_instruction_following_data --base_url http://127.0.0.1:8000/v1 --model_name MODEL --output_dir ./

Use --api completions for a base model, which continues a text, and --api chat (the default) for everything else.

Data that is there already, without its near-duplicates:

    python generate_instruction.py dedup --input_path IN.json --output_path OUT.json

Every reply is in OUTPUT_DIR/regen.journal, on disk, before it counts, and regen.json is made from it: after Ctrl-C,
a crash or kill -9 the same command goes on, asks for nothing twice, and ends where an uninterrupted run would have.
"""  # noqa: E501

from __future__ import annotations

import alpaca.common.environment  # noqa: F401  # isort: skip
import asyncio
import contextlib
import random
import re
import string
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import utils
from alpaca import UserError
from alpaca.common.cli import run_cli
from alpaca.common.journal import Journal
from alpaca.data.dedup import DistinctPool, dedup
from alpaca.data.rouge import is_mostly_unseen, tokenize_unicode, tokenizer_named
from alpaca.endpoint.budget import Budget
from alpaca.endpoint.client import Completion, OpenAIDecodingArguments, Teacher
from alpaca.endpoint.parallel import ask_all
from alpaca.endpoint.progress import counts, print_forecast, print_report, progress_bar

# Tasks that cannot be done in text alone, judged by a word of their instruction.
KEYWORDS = (
    "image,images,graph,graphs,picture,pictures,file,files,map,maps,draw,plot,go to,video,audio,music,flowchart,diagram"
)
MIN_WORDS, MAX_WORDS = 4, 150  # of an instruction: three words say too little, 150 are a document
MAX_SIMILARITY = 0.7  # ROUGE-L F to any seed or kept instruction, as in Self-Instruct
PATIENCE = 100  # replies in a row that bring nothing new: the teacher repeats itself, and would for ever
SAVE_EVERY = 30.0  # seconds between two regen.json: the journal is what nothing is lost from
# Bounded, so that a reply of ten thousand newlines or digits takes no time.
ITEM = re.compile(r"^[ \t]{0,9}(?:###\s{0,9})?(\d{1,4})\.\s{0,9}Instruction:", re.MULTILINE)
BOUNDARY = re.compile(r"###\s*(?=\d+\.\s*Instruction:|$)")  # not the ### of a Markdown heading inside an answer
FIELD = re.compile(r"(\d{1,4})\.\s{0,9}(Instruction|Input|Output):")
COMPLETE = (None, "stop", "eos", "eos_token", "end_turn", "stop_sequence")  # finish reasons of a reply that is whole


# ---------------------------------------------------------------------------------------------------------------------
# Pure functions: text in, text or records out.


def keyword_pattern(words: str) -> re.Pattern:
    """Finds any of the words, separated by commas, as whole words in upper or lower case."""
    alternatives = "|".join(re.escape(word.strip()) for word in words.split(",") if word.strip())
    return re.compile(rf"\b({alternatives})\b" if alternatives else r"(?!)", re.IGNORECASE)


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


def parse_response(text: str, finish_reason: str | None, num_prompt_instructions: int) -> list[dict | str]:
    """Cuts a reply into records; an item that is not exactly instruction, input and output stays text.

    The last item is left out when the reply stopped for its length, or anything but its end: it may look whole.
    """
    first = ITEM.search(text)
    if first and (not text[: first.start()].strip() or int(first[1]) == num_prompt_instructions + 1):
        text = text[first.start() :]  # a chat model may say something before its first item
    else:  # the reply goes on where the prompt ended
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


@dataclass
class Rules:
    """What is dropped. The tokenizer "unicode" also counts the words of any script, and any letter may come first."""

    keyword: re.Pattern = keyword_pattern(KEYWORDS)
    min_words: int = MIN_WORDS
    max_words: int = MAX_WORDS
    tokenizer: str = "rouge"


def filter_reason(record: dict | str, rules: Rules = Rules()) -> str | None:  # noqa: B008  never changed
    """Why a parsed record is dropped, or None when it is kept. The order is the original's; empty output is ours."""
    if isinstance(record, str):
        return "malformed"
    instruction, any_script = record["instruction"], rules.tokenizer == "unicode"
    words = len(tokenize_unicode(instruction) if any_script else instruction.split())
    if words < rules.min_words or not instruction:
        return "too short"
    if words > rules.max_words:
        return "too long"
    if rules.keyword.search(instruction):
        return "not doable in text"
    if instruction.startswith("Write a program"):  # ambiguous: is the answer the program or what it prints?
        return "asks for a program"
    if instruction[0] in string.punctuation or any_script and unicodedata.category(instruction[0])[0] == "P":
        return "starts with punctuation"
    if not instruction[0].isascii() and not any_script:
        return "starts with non-ASCII"
    if not record["output"]:
        return "empty output"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Replies → records. A fold: what is kept depends on the replies and their order alone.


class Selection:
    """Takes replies one by one and keeps what passes the filters and is new: kept + Σ dropped = parsed, always.

    Args:
        seed_tasks: instructions that count as kept, and are not written.
        start: records that were there before the run.
        target: how many to keep in all.
        num_prompt_instructions: examples in the prompt, after which a reply goes on counting.
        stats: whether kept records gain the two similarity fields; it changes no decision.
        rejected: gets a JSON line for each record that is dropped, with the reason and, of a near-duplicate, the
            instruction that is nearest.
    """

    def __init__(
        self,
        seed_tasks: list[dict],
        start: list[dict],
        target: int,
        num_prompt_instructions: int,
        rules: Rules,
        stats: bool,
        rejected: TextIO,
    ):
        self.kept, self.target, self.rules, self.rejected = list(start), target, rules, rejected
        self.start, self.num_prompt_instructions = len(start), num_prompt_instructions
        self.fed, self.parsed, self.dropped = 0, 0, Counter()
        self.unseen = 0  # kept, but the tokenizer "rouge" sees so little of it that near-duplicates get through
        self.barren = self.unused = 0  # replies in a row that brought nothing; replies after it was over
        self.seeds = [task["instruction"] for task in seed_tasks]
        instructions = self.seeds + [record["instruction"] for record in start]
        self.pool = DistinctPool(instructions, MAX_SIMILARITY, stats, rules.tokenizer)

    def is_over(self) -> bool:
        """Whether enough is kept, or the teacher only repeats itself. Later replies change nothing."""
        return len(self.kept) >= self.target or self.barren >= PATIENCE

    def feed(self, reply: Completion) -> None:
        self.fed += 1
        if self.is_over():
            self.unused += 1
            return
        if reply.error:  # says nothing about what the teacher still knows
            return
        before, records = len(self.kept), parse_response(reply.text, reply.finish_reason, self.num_prompt_instructions)
        reasons = [filter_reason(record, self.rules) for record in records]
        passed = [record["instruction"] for record, reason in zip(records, reasons, strict=True) if reason is None]
        verdicts = iter(self.pool.take(passed))
        for record, reason in zip(records, reasons, strict=True):
            self.parsed += 1
            if reason:
                self._drop(reason, record)
                continue
            nearest, similarity = next(verdicts)
            if nearest is None:
                self.kept.append(record | similarity)
                self.unseen += self.rules.tokenizer == "rouge" and is_mostly_unseen(record["instruction"])
            else:  # numbered as the pool is: seeds, then all that was kept
                kept = nearest - len(self.seeds)
                text = self.seeds[nearest] if kept < 0 else self.kept[kept]["instruction"]
                self._drop("near-duplicate", record, nearest=text)
        self.barren = 0 if len(self.kept) > before else self.barren + 1

    def _drop(self, reason: str, record: dict | str, **more: str) -> None:
        self.dropped[reason] += 1
        self.rejected.write(utils.json_text({"reason": reason, "record": record} | more) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# The run.


def begin(journal: Journal, regen_path: Path, seed: int | None, num_prompt_instructions: int) -> tuple[dict, list]:
    """The run's own entry in the journal, made when that is new, and the records that were there before the run."""
    there = utils.load_records(regen_path) if regen_path.exists() else []
    if not journal.entries:
        run = {"seed": random.randrange(2**31) if seed is None else seed, "seeded": seed is not None}
        journal.append([run | {"start": len(there), "num_prompt_instructions": num_prompt_instructions}])
    run = journal.entries[0]
    for name, given in (("num_prompt_instructions", num_prompt_instructions), ("seed", seed)):
        if given is not None and given != run[name]:
            raise UserError(f"this run was begun with --{name} {run[name]}: keep that, or take another --output_dir")
    if len(there) < run["start"]:
        raise UserError(
            f"{regen_path} held {run['start']} records when this run began and holds {len(there)} now: "
            "put it back, or take another --output_dir"
        )
    return run, there[: run["start"]]


def generate_instruction_following_data(
    output_dir: str = "./",
    seed_tasks_path: str = "./seed_tasks.jsonl",
    prompt_path: str = "./prompt.txt",
    num_instructions_to_generate: int = 100,
    model_name: str | None = None,
    num_prompt_instructions: int = 3,
    max_concurrency: int = 32,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_tokens: int = 3072,
    api: str = "chat",
    base_url: str | None = None,
    request_timeout: float = 600.0,
    seed: int | None = None,
    time_limit: float | None = None,
    max_total_tokens: int | None = None,
    max_cost_usd: float | None = None,
    prompt_price: float = 0.0,
    completion_price: float = 0.0,
    max_failure_rate: float = 0.5,
    filter_keywords: str = KEYWORDS,
    min_words: int = MIN_WORDS,
    max_words: int = MAX_WORDS,
    similarity_stats: bool = True,
    tokenizer: str = "rouge",
    request_batch_size: int | None = None,
    num_cpus: int | None = None,
) -> None:
    """Asks a teacher for new instructions until enough are kept, and writes them to OUTPUT_DIR/regen.json.

    Each kept record also has its 10 nearest instructions with their ROUGE-L (most_similar_instructions) and its mean
    ROUGE-L to all seeds and kept instructions (avg_similarity_score). Beside it: regen.journal (every reply),
    rejected.jsonl (what was dropped, and why), report.json (the counts). Stop it as you like: the same command goes on.

    Args:
        output_dir: where the results go; a run that is there is continued, and so is a regen.json alone.
        seed_tasks_path: JSON Lines of seed tasks; examples are drawn from it for each request.
        prompt_path: the text that opens each request.
        num_instructions_to_generate: stop when this many are kept, those of an earlier run included.
        model_name: the teacher, by the name that its server knows.
        num_prompt_instructions: seed tasks shown in each request.
        max_concurrency: requests in flight at once.
        temperature: sampling temperature; 0 asks for the likeliest text.
        top_p: nucleus sampling.
        max_tokens: the longest reply, in tokens.
        api: chat, or completions for a base model.
        base_url: the server, e.g. http://127.0.0.1:8000/v1 (default: OPENAI_BASE_URL, then api.openai.com).
        request_timeout: seconds until a request is tried again (5 times at most, with growing pauses).
        seed: draws the same examples, and asks the teacher to sample the same way, each time.
        time_limit: send nothing more after this many seconds.
        max_total_tokens: send nothing more when prompts and replies, earlier runs included, have used this many tokens.
        max_cost_usd: the same for a sum in dollars; needs the two prices.
        prompt_price: dollars for a million prompt tokens.
        completion_price: dollars for a million reply tokens.
        max_failure_rate: end the run when more than this share of its last 100 requests (10 at least) failed for good.
        filter_keywords: drop an instruction with one of these words, separated by commas ("" for none).
        min_words: drop shorter instructions.
        max_words: drop longer ones.
        similarity_stats: False leaves the two similarity fields out and is faster; what is kept stays the same.
        tokenizer: rouge compares as the original does, by a-z and 0-9 alone; unicode by the words of any script.
        request_batch_size: the original's; accepted and ignored, --max_concurrency takes its place.
        num_cpus: the original's; accepted and ignored, similarity takes microseconds in one process.
    """
    for wrong, message in (
        (num_prompt_instructions < 1, "--num_prompt_instructions must be at least 1"),
        (max_tokens < 1, "--max_tokens must be at least 1"),
        (not model_name, "no teacher named: --model_name takes the name that its server knows"),
    ):
        if wrong:
            raise UserError(message)
    tokenizer_named(tokenizer)
    if request_batch_size is not None or num_cpus is not None:
        print("note: --request_batch_size and --num_cpus have no effect: --max_concurrency is what takes their place")
    seed_tasks = utils.load_seed_tasks(seed_tasks_path)
    if num_prompt_instructions > len(seed_tasks):
        raise UserError(
            f"--num_prompt_instructions {num_prompt_instructions} is more than the {len(seed_tasks)} tasks "
            f"in {seed_tasks_path}"
        )
    prompt = utils.read_text(prompt_path)
    rules = Rules(keyword_pattern(filter_keywords), min_words, max_words, tokenizer)
    # The prompt asks for 20 tasks; a base model would go on for ever.
    decoding = OpenAIDecodingArguments(max_tokens, temperature, top_p, stop=["\n21. Instruction:"])
    budget = Budget(time_limit, max_total_tokens, max_cost_usd, prompt_price, completion_price, max_failure_rate)
    teacher = Teacher(model_name, decoding, api, base_url, request_timeout, max_concurrency, budget.empty_retries())

    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    with Journal(output / "regen.journal") as journal, contextlib.ExitStack() as stack:
        if journal.repaired_bytes:
            print(f"{journal.path}: the last {journal.repaired_bytes} bytes were torn by a crash and are cut off")
        run, start = begin(journal, output / "regen.json", seed, num_prompt_instructions)
        if start or len(journal.entries) > 1:
            print(f"continuing {output}: {len(start)} records at its start, {len(journal.entries) - 1} replies since")
        rejected = stack.enter_context(open(output / "rejected.jsonl", "w", encoding="utf-8"))
        target, shown = num_instructions_to_generate, num_prompt_instructions
        selection = Selection(seed_tasks, start, target, shown, rules, similarity_stats, rejected)

        def request(i: int) -> tuple[str, int | None]:
            rng = random.Random(f"{run['seed']}/{i}")
            text = encode_prompt(rng.sample(seed_tasks, num_prompt_instructions), prompt)
            return text, rng.randrange(2**31) if run["seeded"] else None

        try:
            there = sum("i" in entry for entry in journal.entries)
            asyncio.run(collect(teacher, request, journal, budget, selection, output, max_concurrency))
        finally:  # after Ctrl-C and errors too: what was learned is written
            whole = selection.fed >= there or selection.is_over()
            if len(selection.kept) > len(start) and whole:  # else regen.json holds more than this
                utils.jdump(selection.kept, output / "regen.json")
            utils.jdump(counts(selection, budget) | {"model_name": model_name}, output / "report.json")
            print_report(selection, budget)
    new = f"{len(selection.kept)} instructions in {output / 'regen.json'} ({len(selection.kept) - len(start)} new)"
    if len(selection.kept) < num_instructions_to_generate:
        if why := budget.failing():
            raise UserError(f"{why}: the run ended; {new}")
        most = "".join(f", most often {reason}" for reason, _ in selection.dropped.most_common(1))
        why = budget.exhausted() or f"{selection.barren} replies in a row without a new one (dropped{most})"
        print(f"{why} ended the run before {num_instructions_to_generate} were kept")
    print(new)


async def collect(teacher, request, journal, budget, selection, output, max_concurrency) -> None:
    """Asks until the selection has enough or may not go on; keeps regen.json and the progress bar up to date."""
    saved = time.monotonic()
    there = [entry["i"] for entry in journal.entries if "i" in entry]
    last = max(there, default=-1)

    def per_reply() -> float:
        """New instructions a reply: as if 4 replies with 2 each had been there, until there are enough to tell."""
        return (len(selection.kept) - selection.start + 8) / (budget.replies - selection.unused + 4)

    def in_order(reply: Completion) -> None:
        nonlocal saved
        selection.feed(reply)
        if time.monotonic() - saved > SAVE_EVERY and selection.fed > len(there):
            utils.jdump(selection.kept, output / "regen.json")
            saved = time.monotonic()

    def want(number: int, in_flight: int) -> bool:
        if selection.is_over() or budget.failing():
            return False
        if number < last:  # was in flight when an earlier run was killed: later replies wait for it
            return True
        # Near the end no more requests than it should take: each is paid for.
        return not budget.exhausted() and in_flight < (selection.target - len(selection.kept)) / per_reply()

    if not there:
        print_forecast(selection, budget, len(request(0)[0]), teacher.decoding.max_tokens)
    async with progress_bar(selection, budget, per_reply, told_after=max(8, max_concurrency)):
        await ask_all(teacher, request, journal, budget.arrived, in_order, want, max_concurrency)


if __name__ == "__main__":
    run_cli({"generate_instruction_following_data": generate_instruction_following_data, "dedup": dedup})
