"""Make instruction data by self-instruct: teacher → parse → filter → dedup → regen.json.

A hosted teacher (its key in OPENAI_API_KEY):

    python generate_instruction.py generate_instruction_following_data --output_dir ./ --num_instructions_to_generate 100 --model_name MODEL

A teacher on any OpenAI-compatible server:

    python generate_instruction.py generate_instruction_following_data --base_url http://127.0.0.1:8000/v1 --model_name MODEL --output_dir ./


Remove near-duplicates from existing data:

    python generate_instruction.py dedup --input_path IN.json --output_path OUT.json

Each reply is saved in OUTPUT_DIR/regen.journal before it counts, and regen.json is built from it. After Ctrl-C, a crash
or kill -9, run the same command to continue: nothing is requested twice, and the result is that of an unbroken run.
"""  # noqa: E501

from __future__ import annotations

import alpaca.common.environment  # noqa: F401  # isort: skip
import asyncio
import math
import random
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

import utils
from alpaca import UserError
from alpaca.common.cli import end_on_signals, run_cli
from alpaca.common.journal import Journal
from alpaca.common.text import counted, printable, shorten, utc_now
from alpaca.data.dedup import MAX_SIMILARITY, DistinctPool, dedup
from alpaca.data.replies import CutOff, parse_json, parse_response
from alpaca.data.requests import JSON_SCHEMA, Draw, encode_prompt  # noqa: F401  encode_prompt: the original's name
from alpaca.data.rouge import is_mostly_unseen, tokenize_unicode, tokenizer_named, unseen_warning
from alpaca.data.topics import Topic, TopicCounts, in_turn, label_balance, read_topics
from alpaca.endpoint.batch_api import Batches, refuse_open_batch
from alpaca.endpoint.budget import Budget, RequestSettings, spread
from alpaca.endpoint.client import Completion, OpenAIDecodingArguments, Teacher
from alpaca.endpoint.parallel import Direct, print_forecast, progress_bar

# An instruction with one of these words asks for what text alone cannot do.
KEYWORDS = (
    "image,images,graph,graphs,picture,pictures,file,files,map,maps,draw,plot,go to,video,audio,music,flowchart,diagram"
)

PATIENCE = 100  # replies in a row with nothing new: the teacher repeats itself
UNREADABLE = 10  # replies in a row without a complete item: the teacher does not follow the format
ENOUGH_UNSEEN = 10  # instructions that the tokenizer mostly drops, before the run warns about it
MOST_NEW, FEW_NEW = 17, 0.5  # new instructions a reply: the prompt asks for 17; small teachers bring one in two
SPREAD = ("topics", "dry_topics", "classification")  # of the report; see print_spread()
FIRST_BATCH = 100  # requests in the first round, at most: a teacher with nothing new should not cost more


@dataclass(frozen=True)
class Variety:
    """What requests show and ask for besides seed tasks. All of it is off by default, as in Alpaca.

    Args:
        generated_in_prompt: number of examples per request that come from this run's kept instructions, once it has
            that many (Self-Instruct: 2 of 8).
        topics_path: file of topics, one per line; requests take them in turn. "cooking | 3 | for beginners" comes up
            three times as often as weight 1, and adds "for beginners" to the request.
        output_first: ask for classification tasks in separate requests, the label before the input, to balance the
            labels; their examples are the seed tasks with "is_classification": true.
    """

    generated_in_prompt: int = 0
    topics_path: str | None = None
    output_first: bool = False


@dataclass(frozen=True)
class Filters:
    """Which parsed instructions are dropped.

    Args:
        filter_keywords: drop an instruction with one of these words, separated by commas ("" for none).
        min_words: drop shorter instructions.
        max_words: drop longer ones.
        tokenizer: rouge compares a-z and 0-9 only, like the original; unicode compares and counts words in any script,
            and lets an instruction start with any letter.
    """

    filter_keywords: str = KEYWORDS
    min_words: int = 4  # three say too little
    max_words: int = 150  # more are a document
    tokenizer: str = "rouge"

    @cached_property
    def keyword(self) -> re.Pattern:
        """Finds any of the keywords, as a whole word in upper or lower case."""
        words = "|".join(re.escape(word.strip()) for word in self.filter_keywords.split(",") if word.strip())
        return re.compile(rf"\b({words})\b" if words else r"(?!)", re.IGNORECASE)


def filter_reason(record: dict | str, filters: Filters = Filters()) -> str | None:  # noqa: B008  never changed
    """Return why a parsed record is dropped, or None. The order is the original's; "empty output" is ours."""
    if isinstance(record, str):
        return "cut off" if isinstance(record, CutOff) else "malformed"
    instruction, any_script = record["instruction"], filters.tokenizer == "unicode"
    words = len(tokenize_unicode(instruction) if any_script else instruction.split())
    if words < filters.min_words or not instruction:
        return "too short"
    if words > filters.max_words:
        return "too long"
    if filters.keyword.search(instruction):
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


@dataclass
class Selection:
    """Takes replies one by one and keeps what passes the filters and is new: kept + Σ dropped = parsed, always.

    The result depends only on the replies and their order.
    """

    seed_tasks: list[dict]  # count as kept, but are not written
    start: list[dict]  # records from before the run
    target: int  # how many to keep in all
    draw: Draw  # what each request asked for
    filters: Filters
    stats: bool  # whether kept records get the two similarity fields; it changes no decision
    rejected: TextIO  # gets a JSON line for each dropped record: the reason and, for a near-duplicate, the nearest

    def __post_init__(self):
        self.kept, self.fed, self.parsed, self.dropped = list(self.start), 0, 0, Counter()
        self.sizes = [len(self.start)]  # how many were kept after 0, 1, 2, … replies
        self.topics = TopicCounts(self.draw.topics)
        self.unseen = 0  # kept, but the tokenizer "rouge" drops most of it, so near-duplicates get through
        self.barren = self.unused = 0  # replies in a row with nothing new; replies after the end
        self.unreadable = 0  # replies in a row without a complete item
        self.shown = ""  # the last reply with nothing new
        self.known = [one["instruction"] for one in self.seed_tasks + self.start]  # and then all that is kept
        self.pool = DistinctPool(self.known, MAX_SIMILARITY, self.stats, self.filters.tokenizer)

    def is_over(self) -> bool:
        """Whether enough is kept, or the teacher repeats itself or cannot be read. Later replies change nothing."""
        return len(self.kept) >= self.target or self.barren >= PATIENCE or self.unreadable >= UNREADABLE

    def new(self) -> int:
        return len(self.kept) - len(self.start)

    def counts(self) -> dict:
        """Return the selection's part of report.json, including earlier runs in the same folder."""
        counts = {"unused_replies": self.unused, "parsed": self.parsed, "dropped": dict(self.dropped.most_common())}
        counts |= {"kept": self.new(), "kept_before": len(self.start)}
        if self.draw.topics:
            counts |= {"topics": self.topics.counts, "dry_topics": self.topics.dry()}
        if self.draw.output_first:
            labeled = [record for record in self.kept[len(self.start) :] if record.get("is_classification")]
            counts |= {"classification": label_balance(labeled)}
        return counts

    def kept_by(self, replies: int) -> list[dict]:
        """Return what was kept after the first ``replies`` replies, which have all arrived."""
        return self.kept[: self.sizes[max(0, replies)]]

    def replies_left(self, others: float) -> float:
        """Estimate as if there had been other replies too, with 2 new instructions each: the first few say little."""
        each = (self.new() + 2 * others) / (self.fed - self.unused + others)
        return (self.target - len(self.kept)) / each

    def round_left(self) -> float:
        """Estimate for a round, whose requests are all sent at once: low by two standard errors."""
        left, replies = self.target - len(self.kept), self.fed - self.unused
        if not self.new():
            return min(left / MOST_NEW, FIRST_BATCH)
        return left / min(self.new() * (1 + 2 / replies**0.5) / replies, MOST_NEW)

    def feed(self, reply: Completion) -> None:
        """Take the next reply."""
        if self.is_over():
            self.unused += 1
        elif not reply.error:  # not a sign that the teacher repeats itself
            self._take(reply, self.draw.topic(self.fed), self.draw.asks_labels(self.fed))
        self.sizes.append(len(self.kept))  # before fed, which another thread reads
        self.fed += 1

    def _take(self, reply: Completion, topic: Topic | None, labels: bool) -> None:
        before, dropped, near = len(self.kept), self.dropped.total(), self.dropped["near-duplicate"]
        if self.draw.as_json:
            records = parse_json(reply.text, reply.finish_reason)
        else:
            records = parse_response(reply.text, reply.finish_reason, self.draw.examples)
        about = {"topic": topic.name} if topic else {}
        about |= {"is_classification": True} if labels else {}
        self.unreadable = self.unreadable + 1 if all(isinstance(record, str) for record in records) else 0
        reasons = [filter_reason(record, self.filters) for record in records]
        passed = [record["instruction"] for record, reason in zip(records, reasons, strict=True) if reason is None]
        verdicts = iter(self.pool.take(passed))
        for record, reason in zip(records, reasons, strict=True):
            self.parsed += 1
            if reason:
                self._drop(reason, record)
                continue
            nearest, similarity = next(verdicts)
            if nearest is None:
                self.kept.append(record | about | similarity)
                self.known.append(record["instruction"])
                self.unseen += self.filters.tokenizer == "rouge" and is_mostly_unseen(record["instruction"])
            else:
                self._drop("near-duplicate", record, nearest=self.known[nearest])
        kept = len(self.kept) - before
        if topic:
            dropped, near = self.dropped.total() - dropped, self.dropped["near-duplicate"] - near
            self.topics.add(topic, kept, dropped, near)
        self.barren = 0 if kept else self.barren + 1
        if self.barren:
            self.shown = reply.text

    def _drop(self, reason: str, record: dict | str, **more: str) -> None:
        self.dropped[reason] += 1
        self.rejected.write(utils.json_text({"reason": reason, "record": record} | more) + "\n")


def begin(journal: Journal, regen_path: Path, seed: int | None, given: dict, lag: int) -> tuple[dict, list]:
    """Return the run's first entry in the journal, written now if it is new, and the records from before the run.

    Args:
        given: what requests depend on, by flag; a run can only be continued with the same.
        lag: see request_lag(); kept with the run.
    """
    records = utils.load_records(regen_path) if regen_path.exists() else []
    if not journal.entries:
        run = {"seed": random.randrange(2**31) if seed is None else seed, "seeded": seed is not None}
        journal.append([run | {"start": len(records), "lag": lag, **given, "started": utc_now()}])
    older = {"format": "text", "generated_in_prompt": 0, "output_first": False, "topics_path": [], "lag": lag}
    run, replies = older | journal.entries[0], sum("i" in entry for entry in journal.entries)
    for name, value in ({"seed": seed} | given).items():
        if value is not None and value != run[name]:
            started = f"this run was started with --{name} {shorten(str(run[name]), 100)}"
            raise UserError(f"{started}: use that, or choose another --output_dir")
    if len(records) < run["start"]:
        raise UserError(
            f"{regen_path} had {run['start']} records when this run started and has {len(records)} now: "
            "restore it, or choose another --output_dir"
        )
    if journal.repaired_bytes:
        print(f"note: {journal.path} ended in an incomplete entry ({journal.repaired_bytes} bytes), which was removed")
    if run["start"] or replies:
        begun = f", started with {counted(run['start'], 'record')}" if run["start"] else ""
        print(f"continuing {regen_path.parent}{begun}: {counted(replies, 'reply')} so far")
    return run, records[: run["start"]]


def generate_instruction_following_data(
    output_dir: str = "./",
    seed_tasks_path: str = "./seed_tasks.jsonl",
    prompt_path: str = "./prompt.txt",
    num_instructions_to_generate: int = 100,
    model_name: str | None = None,
    num_prompt_instructions: int = 3,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_tokens: int = 3072,
    api: str = "chat",
    format: str = "text",
    seed: int | None = None,
    similarity_stats: bool = True,
    variety: Variety = Variety(),  # noqa: B008  never changed
    filters: Filters = Filters(),  # noqa: B008
    requests: RequestSettings = RequestSettings(),  # noqa: B008
    request_batch_size: int | None = None,
    num_cpus: int | None = None,
) -> None:
    """Ask a teacher for new instructions until enough are kept, and write them to OUTPUT_DIR/regen.json.

    Each record has its 10 nearest instructions with their ROUGE-L (most_similar_instructions) and its mean ROUGE-L to
    all seeds and kept instructions (avg_similarity_score). OUTPUT_DIR also gets regen.journal (every reply),
    rejected.jsonl (what was dropped, and why) and report.json (counts). Stop at any time: the same command continues.

    Args:
        output_dir: folder for the results; an existing run, or a regen.json alone, is continued.
        seed_tasks_path: JSON Lines of seed tasks; each request shows a random few of them.
        prompt_path: the text at the start of each request.
        num_instructions_to_generate: stop when this many are kept, including those of earlier runs.
        model_name: the teacher's name on its server.
        num_prompt_instructions: seed tasks shown in each request.
        temperature: sampling temperature; 0 is greedy.
        top_p: nucleus sampling: the share of probability to sample from.
        max_tokens: the longest reply, in tokens.
        api: chat, or completions for a base model.
        format: of replies: text (numbered items), or json (a JSON schema is sent with each request).
        seed: makes a run repeatable: the same examples, and a seed sent with each request.
        similarity_stats: False omits the two similarity fields and is faster; the same records are kept.
        request_batch_size: a flag of the original, ignored; use --max_concurrency.
        num_cpus: a flag of the original, ignored; similarity takes microseconds in one process.
    """
    tokenizer_named(filters.tokenizer)
    if request_batch_size is not None or num_cpus is not None:
        print("note: --request_batch_size and --num_cpus are ignored: use --max_concurrency")
    if format == "json" and api == "completions":
        raise UserError("--format json needs --api chat: for a base model use --format text")
    seed_tasks, prompt = utils.load_seed_tasks(seed_tasks_path), utils.read_text(prompt_path)
    draw, given = what_to_ask(prompt, seed_tasks, num_prompt_instructions, format, variety)
    # The prompt asks for 20 tasks; a base model would not stop there.
    way = {"response_format": JSON_SCHEMA} if format == "json" else {"stop": ["\n21. Instruction:"]}
    decoding = OpenAIDecodingArguments(max_tokens, temperature, top_p, **way)
    teacher, budget = Teacher(model_name, decoding, api, requests), Budget(requests)
    about = {"model_name": model_name, "api": api, "temperature": temperature, "top_p": top_p}
    about |= {"prompt": Path(prompt_path).name, "seed_tasks": Path(seed_tasks_path).name}

    output, target = Path(output_dir), num_instructions_to_generate
    output.mkdir(parents=True, exist_ok=True)
    with Journal(output / "regen.journal") as journal:
        run, start = begin(journal, output / "regen.json", seed, given, request_lag(target, requests))
        with open(output / "rejected.jsonl", "w", encoding="utf-8") as rejected:
            what = draw(run["seed"]), filters, similarity_stats, rejected
            selection = Selection(seed_tasks, start, target, *what)
            more = ask(teacher, run, journal, budget, selection, about)
    conclude(selection, budget, output / "regen.json", more)


def what_to_ask(
    prompt: str, seed_tasks: list[dict], examples: int, format: str, variety: Variety
) -> tuple[Callable[[int], Draw], dict]:
    """Return the requests of a run, given its seed, and by flag what else they depend on.

    Raises:
        UserError: flags that do not go together, or a malformed file of topics.
    """
    if format not in ("text", "json"):
        raise UserError(f"--format must be text or json, not {format!r}")
    if format == "json" and variety.output_first:
        raise UserError("--output_first needs --format text: a JSON schema fixes the order of the fields")
    if not 1 <= examples <= len(seed_tasks):
        raise UserError(f"--num_prompt_instructions must be 1 to {len(seed_tasks)}, the number of seed tasks")
    topics = read_topics(variety.topics_path) if variety.topics_path else []
    draw = partial(Draw, prompt, seed_tasks, examples=examples, generated=variety.generated_in_prompt)
    draw = partial(draw, topics=in_turn(topics), output_first=variety.output_first, as_json=format == "json")
    draw(0)  # finds what is wrong before there is a journal
    given = {"num_prompt_instructions": examples, "format": format} | asdict(variety)
    return draw, given | {"topics_path": [list(asdict(topic).values()) for topic in topics]}


def ask(teacher: Teacher, run: dict, journal: Journal, budget: Budget, selection: Selection, about: dict) -> str | None:
    """Send requests and write the results, after Ctrl-C and errors too; return why a batch is not finished, or None."""
    earlier = sum("i" in entry for entry in journal.entries)
    about |= {name: run.get(name) for name in ("num_prompt_instructions", "format", "seed", "started")}
    about |= {name: run[name] for name in ("generated_in_prompt", "output_first") if run[name]}
    save = partial(write_results, journal.path.parent, about, earlier, budget, selection)
    try:
        return asyncio.run(collect(teacher, run, journal, budget, selection, save))
    except KeyboardInterrupt:
        if not budget.settings.batched:  # a batch says how to continue
            print(f"\nreplies so far are in {journal.path}: the same command continues", file=sys.stderr)
        raise
    finally:
        counts = save()
        if counts["requests"]:
            print_counts({name: n for name, n in counts.items() if name not in SPREAD})
            print_spread(counts)


def write_results(output: Path, about: dict, earlier: int, budget: Budget, selection: Selection) -> dict:
    """Write report.json, and regen.json unless it would hold less than after the ``earlier`` replies.

    Return the counts; the report also describes the run (``about``).
    """
    if selection.new() and (selection.fed >= earlier or selection.is_over()):
        utils.jdump(selection.kept, output / "regen.json")
    counts = budget.counts() | selection.counts()
    changed = {"changed_settings": sorted(budget.changed)} if budget.changed else {}
    utils.jdump(counts | about | {"ended": utc_now()} | changed, output / "report.json")
    return counts


def request_lag(target: int, requests: RequestSettings) -> int:
    """Return the number of replies between a request and the last one whose records it may show as examples.

    It exceeds the number of requests in flight, so that requests seldom wait. A short run has a smaller one, or no
    record would ever be shown. In batch mode it is the size of a round.
    """
    quarter = max(4, math.ceil(target / MOST_NEW / 4))
    return quarter if requests.batched else min(quarter, 2 * requests.max_concurrency)


async def collect(teacher, run, journal, budget, selection, save) -> str | None:
    """Send requests until the selection is over or a limit is reached; ``save`` keeps regen.json up to date.

    Return why a batch is not finished, or None.
    """
    last, warned = max(entry.get("i", -1) for entry in journal.entries), False

    def request(i: int) -> tuple[str, int | None]:
        text, seed = selection.draw.request(i, selection.kept_by(i - run["lag"]) if selection.draw.generated else [])
        return text, seed if run["seeded"] else None

    def in_order(reply: Completion) -> None:
        nonlocal warned
        selection.feed(reply)
        if not warned and selection.unseen >= ENOUGH_UNSEEN:  # now, while stopping still saves requests
            warned = True
            tqdm.write(unseen_warning(selection.unseen, counted(selection.new(), "kept instruction")))

    def want(number: int, in_flight: int) -> bool:
        if selection.is_over() or budget.failing():
            return False
        if selection.draw.generated and number - run["lag"] > selection.fed:  # what it shows is not known yet
            return False
        if number < last:  # was in flight when an earlier run was killed: later replies wait for it
            return True
        # Near the end, send no more requests than needed: each is paid for.
        left = selection.round_left() if budget.settings.batched else selection.replies_left(others=4)
        return not budget.exhausted() and in_flight < left

    if last < 0 and not selection.is_over():
        left = selection.target - len(selection.kept)
        requests = math.ceil(left / MOST_NEW), math.ceil(left / FEW_NEW)
        print_forecast(budget, requests, len(request(0)[0]), teacher.decoding.max_tokens)
    what = teacher, request, journal, budget, in_order, want
    if budget.settings.batched:
        return await Batches(*what).run()
    refuse_open_batch(journal)
    counts = (lambda: len(selection.kept)), (lambda: selection.replies_left(others=0.5))
    async with progress_bar(budget, teacher.pace, selection.target, *counts, exact=False):
        await Direct(*what, at_intervals=save).run()


def conclude(selection: Selection, budget: Budget, regen_path: Path, more: str | None) -> None:
    """Print what was made, and why it is less than was asked for.

    Raises:
        UserError: too many requests failed, replies cannot be read, or nothing was kept.
    """
    new = f" ({selection.new():,} new)" if selection.start else ""
    made = f"{counted(len(selection.kept), 'instruction')} in {regen_path}{new}"
    if selection.unseen:
        print(unseen_warning(selection.unseen, counted(selection.new(), "kept instruction")))
    if cut := selection.dropped["cut off"]:
        print(f"{counted(cut, 'item')} cut off at the end of a reply: raise --max_tokens")
    if len(selection.kept) < selection.target:
        if why := budget.failing():
            raise UserError(f"{why}: the run ended; {made}")
        if more:
            return print(f"{more}\n{made}")
        most = "".join(f", most often {reason}" for reason, _ in selection.dropped.most_common(1))
        why = budget.exhausted() or f"{selection.barren} replies in a row without a new one (dropped{most})"
        if unreadable := selection.unreadable >= UNREADABLE:
            why = f"{selection.unreadable} replies in a row without a complete item (dropped{most})"
        if not (selection.new() or selection.shown):
            raise UserError(f"{why} ended the run; {made}")
        if unreadable or not selection.new():
            cure = "raise --max_tokens" if most.endswith("cut off") else "try another --model_name or --format"
            begins = f"a reply begins: {printable(shorten(selection.shown, 200))}"
            raise UserError(f"{why} ended the run; {made}; {cure}, in another --output_dir; {begins}")
        print(f"{why} ended the run short of {counted(selection.target, 'instruction')}")
    print(made)


def print_spread(counts: dict) -> None:
    """Print how the kept records are spread over topics and labels."""
    if topics := counts.get("topics"):
        kept = [found["kept"] for found in topics.values()]
        dry = f"; run dry: {', '.join(map(printable, counts['dry_topics']))}" if counts["dry_topics"] else ""
        print(f"{counted(len(topics), 'topic')}: {spread(min(kept), max(kept))} kept each (see report.json){dry}")
    if (labels := counts.get("classification")) and labels["records"]:
        first, share = printable(shorten(next(iter(labels["labels"])), 40)), labels["most_common_share"]
        print(f"{counted(labels['records'], 'classification record')}: {share:.0%} have the same label, {first!r}")


def print_counts(counts: dict) -> None:
    """Print a report's counts as a table; the counts in a dict are a row each. Without prices there is no cost."""
    rows = []
    for name, value in counts.items():
        if isinstance(value, dict):
            rows += [(shorten(f"{name}: {kind}"), n) for kind, n in value.items()]
        elif value or name != "cost_usd":
            rows.append((name, value))
    width = max(len(name) for name, _ in rows)
    for name, number in rows:
        print(f"{name.replace('_', ' ').ljust(width)}  {number:>12,}")


if __name__ == "__main__":
    end_on_signals()
    run_cli({"generate_instruction_following_data": generate_instruction_following_data, "dedup": dedup})
