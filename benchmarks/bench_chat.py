"""Answers a second: chat.py's decoding against transformers' generate() on the same model, in one run.

    python benchmarks/bench_chat.py --model_path DIR --prompts 24 --rounds 4
    python benchmarks/bench_chat.py --model_path DIR --previous_path CHECKOUT    also an earlier checkout's decoding

The prompts are records of alpaca_data.json in a shuffled order, at most 32 new tokens; DIR is made from the embedded
model (135 M parameters) when it is not there. In each round each way has its turn, one round forwards and the next
backwards. Three questions are kept apart:

    one stream   decode() and stream() against generate(), one prompt after the other (the first 4)
    decoder      decode() and answer_batch() against generate(), on the same batches, by length and in the file's order
    batching     batches by length against batches in the file's order, with the same decoder

each greedy and sampled. stream() and answer_batch() are what chat.py calls: decode() with its text. "seeded" is
generate() with a logits processor that makes the draws of decode(), and so its answers: what could replace it. On one
thread (OMP_NUM_THREADS=1) seconds are of the processor, so that a busy machine does not count.
Writes benchmarks/results/chat.json.
"""

from __future__ import annotations

import importlib.util
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from provenance import provenance  # noqa: E402
from transformers import LogitsProcessor, LogitsProcessorList  # noqa: E402

import utils  # noqa: E402
from alpaca import embedded_model  # noqa: E402
from alpaca.common.cli import run_cli  # noqa: E402
from alpaca.inference.chat import request_ids, stream  # noqa: E402
from alpaca.inference.generate import Settings, _draws, answer_batch, batches, choose, decode, end_ids  # noqa: E402
from alpaca.inference.load import load  # noqa: E402

ALONE = 4  # prompts that are answered one after the other
GENERATE, SEEDED, PREVIOUS, DECODE, TEXT = "generate()", "seeded", "previous", "decode()", "with text"
KINDS = {"greedy": (0.0, 1.0), "sampled": (0.7, 0.9)}  # temperature, top_p

# Each takes prompts (token ids) that are one batch, and returns the answers: token ids, or how many tokens they have.


def by_decode(model, tokenizer, prompts: list[list[int]], settings: Settings, decode=decode) -> list[list[int]]:
    written = [[] for _ in prompts]
    for step in decode(model, prompts, end_ids(model, tokenizer), settings):
        for row, token in step:
            written[row].append(token)
    return written


class Seeded(LogitsProcessor):
    """Leaves each row the token that it draws from its own numbers, which generate() takes as the likeliest."""

    def __init__(self, settings: Settings, prompts: list[list[int]]):
        self.settings, self.width = settings, max(map(len, prompts))
        self.draws = torch.stack([_draws(settings.seed, ids, settings.max_new_tokens) for ids in prompts])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        draws = self.draws[:, input_ids.shape[1] - self.width]
        chosen = choose(scores, self.settings.temperature, self.settings.top_p, draws)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0)


def by_generate(
    model, tokenizer, prompts: list[list[int]], settings: Settings, seeded: bool = False
) -> list[list[int]]:
    tokenizer.padding_side, ends = "left", end_ids(model, tokenizer)
    inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
    sampling = {"do_sample": settings.temperature > 0}
    if seeded:
        sampling = {"do_sample": False, "logits_processor": LogitsProcessorList([Seeded(settings, prompts)])}
    elif settings.temperature > 0:
        sampling |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    made = model.generate(
        **inputs, **sampling, max_new_tokens=settings.max_new_tokens, pad_token_id=tokenizer.pad_token_id
    )
    answers = made[:, inputs["input_ids"].shape[1] :].tolist()
    return [tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))] for tokens in answers]


def by_stream(model, tokenizer, prompts: list[list[int]], settings: Settings) -> list[int]:
    """One prompt; its tokens are counted as the model is given them: all but the last, and EOS does not count."""
    (prompt,), given = prompts, []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs["input_ids"][0, -1]), with_kwargs=True
    )
    try:
        for _ in stream(model, tokenizer, prompt, settings):
            pass
    finally:
        handle.remove()
    # Each call is for one token more; the last call's was EOS if the answer is shorter than it might be.
    return [len(given) - (len(given) < settings.max_new_tokens)]


def by_answer_batch(model, tokenizer, prompts: list[list[int]], settings: Settings) -> list[int]:
    return [tokens for _, tokens, _ in answer_batch(model, tokenizer, prompts, settings)]


def previous(path: str):
    """Return the module alpaca.inference.generate of another checkout."""
    spec = importlib.util.spec_from_file_location("previous", Path(path) / "alpaca" / "inference" / "generate.py")
    sys.modules["previous"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answers(way: Callable, batches: list[list[int]], prompts: list[list[int]], *args) -> list:
    """What a way says to each prompt; ``batches`` are places of prompts."""
    said = {}
    for batch in batches:
        said |= zip(batch, way(*args[:2], [prompts[place] for place in batch], *args[2:]), strict=True)
    return [said[place] for place in sorted(said)]


def main(
    model_path: str = "smollm2",
    data_path: str = str(ROOT / "alpaca_data.json"),
    prompts: int = 24,
    rows: int = 16,
    rounds: int = 4,
    max_new_tokens: int = 32,
    device: str | None = None,
    previous_path: str | None = None,
    output_path: str = str(ROOT / "benchmarks" / "results" / "chat.json"),
) -> None:
    """Measures tokens a second.

    Args:
        model_path: the embedded model as a checkpoint; made when it is not there.
        data_path: records to take instructions from.
        prompts: how many are answered in batches.
        rows: prompts of a batch.
        rounds: turns of each way; the median counts.
        max_new_tokens: of an answer.
        device: as for chat.py.
        previous_path: an earlier checkout of this repository.
        output_path: of the result.
    """
    embedded_model.prepare(model_path)
    model, tokenizer = load(model_path, device)
    records = utils.load_records(data_path)
    random.Random(0).shuffle(records)
    ids = request_ids(tokenizer, "alpaca", records[:prompts])
    order = [place for batch in batches(list(map(len, ids)), 0, 10**9) for place in batch]
    in_order = {"by length": order, "in file order": list(range(len(ids)))}
    groups = {name: [o[i : i + rows] for i in range(0, len(o), rows)] for name, o in in_order.items()}
    groups["one by one"] = [[place] for place in range(min(ALONE, len(ids)))]

    ways: dict[tuple[str, str, str], Callable[[], list]] = {}
    for kind, (temperature, top_p) in KINDS.items():
        settings = Settings(max_new_tokens, temperature, top_p, seed=0)
        for name, batch in groups.items():
            text = by_stream if name == "one by one" else by_answer_batch
            steps = {GENERATE: by_generate, SEEDED: partial(by_generate, seeded=True), DECODE: by_decode, TEXT: text}
            steps |= {PREVIOUS: partial(by_decode, decode=previous(previous_path).decode)} if previous_path else {}
            for what, way in steps.items():
                ways[name, kind, what] = partial(answers, way, batch, ids, model, tokenizer, settings)
    rates: dict[tuple, list[float]] = {name: [] for name in ways}
    said: dict[tuple, list] = {}
    for way in (by_generate, by_decode, by_stream, by_answer_batch):  # warm up
        way(model, tokenizer, ids[:1], Settings(4, 0.7, 0.9, 0))
    clock = time.process_time if torch.get_num_threads() == 1 and model.device.type == "cpu" else time.perf_counter
    for number in range(rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            started = clock()
            said[name] = ways[name]()
            seconds = clock() - started
            tokens = sum(answer if isinstance(answer, int) else len(answer) for answer in said[name])
            rates[name].append(round(tokens / seconds, 2))
            print(f"round {number + 1}: {', '.join(name):<36} {rates[name][-1]:8.1f} tokens/s", flush=True)

    def ratio(ours: tuple, theirs: tuple) -> dict:
        """Of the medians, and the least and the greatest of a round's."""
        each = [a / b for a, b in zip(rates[ours], rates[theirs], strict=True)]
        medians = [statistics.median(rates[name]) for name in (ours, theirs)]
        return {"median": round(medians[0] / medians[1], 3), "rounds": [round(r, 3) for r in (min(each), max(each))]}

    against_generate = {
        f"{name}, {kind}, {what}": ratio((name, kind, what), (name, kind, GENERATE))
        for name, kind, what in ways
        if what != GENERATE
    }
    by_length = {
        f"{kind}, {what}": ratio(("by length", kind, what), ("in file order", kind, what))
        for kind in KINDS
        for what in (GENERATE, DECODE, TEXT)
    }
    lengths = sorted(map(len, ids))
    result = provenance("torch", "transformers") | {
        "device": str(model.device),
        "dtype": str(model.dtype),
        "prompts": {"count": len(ids), "tokens_min_median_max": [lengths[0], statistics.median(lengths), lengths[-1]]},
        "answers": {
            "tokens_each": sorted(map(len, said["by length", "greedy", DECODE])),
            "max_new_tokens": max_new_tokens,
        },
        "rows_of_a_batch": rows,
        "tokens_per_s": {", ".join(name): values for name, values in rates.items()},
        "against_generate": against_generate,
        "batches_by_length_against_file_order": by_length,
        "sampled_answers_equal_to_seeded_generate": {
            name: sum(a == b for a, b in zip(said[name, "sampled", DECODE], said[name, "sampled", SEEDED], strict=True))
            for name in groups
        },
        "against_previous": {
            f"{name}, {kind}, {what}": ratio((name, kind, what), (name, kind, PREVIOUS))
            for name, kind, what in ways
            if previous_path and what in (DECODE, SEEDED)
        },
        "clock": clock.__name__,
        "greedy_answers_equal_to_generate": {
            name: sum(a == b for a, b in zip(said[name, "greedy", DECODE], said[name, "greedy", GENERATE], strict=True))
            for name in groups
        },
    }
    for title in ("against_generate", "against_previous", "batches_by_length_against_file_order"):
        print(title.replace("_", " "))
        for name, value in result[title].items():
            print(f"  {name:<36} {value['median']:.2f}× ({value['rounds'][0]:.2f} to {value['rounds'][1]:.2f})")
    print(json.dumps(result["greedy_answers_equal_to_generate"]))
    utils.jdump(result, output_path, indent=2)


if __name__ == "__main__":
    run_cli(main)
