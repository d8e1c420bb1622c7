"""Answers a second: chat.py's decoding against transformers' generate() on the same model, in one run.

    python benchmarks/bench_chat.py --model_path DIR --prompts 24 --rounds 4

The prompts are records of alpaca_data.json in a shuffled order, at most 32 new tokens; DIR is made from the embedded
model (135 M parameters) when it is not there. In each round each way has its turn, one round forwards and the next
backwards: one prompt after the other (the first 4), greedy and sampled, and all in batches, greedy, generate()'s in the
order of the file and ours by length, both of as many rows.
Writes benchmarks/results/chat.json.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from provenance import provenance  # noqa: E402

import utils  # noqa: E402
from alpaca import inference, teacher  # noqa: E402
from alpaca.cli import run_cli  # noqa: E402
from alpaca.decoding import Settings, decode, end_ids  # noqa: E402

ALONE = 4  # prompts that are answered one after the other


def ours_alone(model, tokenizer, prompts: list[list[int]], settings: Settings, rows: int) -> list[list[int]]:
    ends = end_ids(model, tokenizer)
    return [
        [token for step in decode(model, [ids], ends, settings, set(), None) for _, token in step] for ids in prompts
    ]


def ours_batched(model, tokenizer, prompts: list[list[int]], settings: Settings, rows: int) -> list[list[int]]:
    written = [[] for _ in prompts]
    order = [place for batch in inference.batches(list(map(len, prompts)), 0, 10**9) for place in batch]
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        for step in decode(model, [prompts[i] for i in batch], end_ids(model, tokenizer), settings, set(), None):
            for row, token in step:
                written[batch[row]].append(token)
    return written


def generate_alone(model, tokenizer, prompts: list[list[int]], settings: Settings, rows: int) -> list[list[int]]:
    return generate_batched(model, tokenizer, prompts, settings, 1)


def generate_batched(model, tokenizer, prompts: list[list[int]], settings: Settings, rows: int) -> list[list[int]]:
    tokenizer.padding_side, written, ends = "left", [], end_ids(model, tokenizer)
    for start in range(0, len(prompts), rows):
        inputs = tokenizer.pad({"input_ids": prompts[start : start + rows]}, return_tensors="pt").to(model.device)
        sampling = {"do_sample": settings.temperature > 0}
        if settings.temperature > 0:
            sampling |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        made = model.generate(
            **inputs, **sampling, max_new_tokens=settings.max_new_tokens, pad_token_id=tokenizer.pad_token_id
        )
        for tokens in made[:, inputs["input_ids"].shape[1] :].tolist():
            written.append(tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))])
    return written


def main(
    model_path: str = "smollm2",
    data_path: str = str(ROOT / "alpaca_data.json"),
    prompts: int = 24,
    rows: int = 16,
    rounds: int = 4,
    max_new_tokens: int = 32,
    device: str | None = None,
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
    """
    teacher.prepare(model_path)
    model, tokenizer = inference.load(model_path, device)
    records = utils.load_records(data_path)
    random.Random(0).shuffle(records)
    pairs = [(record["instruction"], record["input"]) for record in records[:prompts]]
    ids = inference.request_ids(tokenizer, "alpaca", pairs)
    greedy, sampled = Settings(max_new_tokens, 0), Settings(max_new_tokens, 0.7, 0.9, seed=0)
    ways: dict[str, tuple[Callable, list[list[int]], Settings]] = {
        "generate, one by one": (generate_alone, ids[:ALONE], greedy),
        "ours, one by one": (ours_alone, ids[:ALONE], greedy),
        "generate, one by one, sampled": (generate_alone, ids[:ALONE], sampled),
        "ours, one by one, sampled": (ours_alone, ids[:ALONE], sampled),
        "generate, batches in file order": (generate_batched, ids, greedy),
        "ours, batches by length": (ours_batched, ids, greedy),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    said: dict[str, list[list[int]]] = {}
    for number in range(-1, rounds):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            way, wanted, settings = ways[name]
            if number < 0:  # warm up
                way(model, tokenizer, wanted[:2], Settings(4, settings.temperature, settings.top_p, 0), rows)
                continue
            started = time.perf_counter()
            said[name] = way(model, tokenizer, wanted, settings, rows)
            rates[name].append(round(sum(map(len, said[name])) / (time.perf_counter() - started), 2))
            print(f"round {number + 1}: {name:<32} {rates[name][-1]:8.1f} tokens/s", flush=True)

    medians = {name: statistics.median(values) for name, values in rates.items()}

    def ratio(ours: str, theirs: str) -> dict:
        """Of the medians, and the least and the greatest of a round's."""
        each = [a / b for a, b in zip(rates[ours], rates[theirs], strict=True)]
        return {
            "median": round(medians[ours] / medians[theirs], 3),
            "rounds": [round(r, 3) for r in (min(each), max(each))],
        }

    def same(ours: str, theirs: str) -> int:
        return sum(a == b for a, b in zip(said[ours], said[theirs], strict=True))

    ratios = {
        "one by one": ratio("ours, one by one", "generate, one by one"),
        "one by one, sampled": ratio("ours, one by one, sampled", "generate, one by one, sampled"),
        "batches": ratio("ours, batches by length", "generate, batches in file order"),
        "batches by length against one by one": ratio("ours, batches by length", "generate, one by one"),
    }
    lengths = sorted(map(len, ids))
    result = provenance("torch", "transformers") | {
        "device": str(model.device),
        "prompts": {"count": len(ids), "tokens_min_median_max": [lengths[0], statistics.median(lengths), lengths[-1]]},
        "answers": {"tokens_each": sorted(map(len, said["ours, batches by length"])), "max_new_tokens": max_new_tokens},
        "rows_of_a_batch": rows,
        "tokens_per_s": rates,
        "ratios": ratios,
        "answers_equal_to_generate": {
            "one by one": same("ours, one by one", "generate, one by one"),
            "batches": same("ours, batches by length", "generate, batches in file order"),
        },
    }
    for name, value in ratios.items():
        print(f"{name}: {value['median']:.2f}× ({value['rounds'][0]:.2f} to {value['rounds'][1]:.2f})")
    print(json.dumps(result["answers_equal_to_generate"]))
    utils.jdump(result, ROOT / "benchmarks" / "results" / "chat.json", indent=2)


if __name__ == "__main__":
    run_cli(main)
