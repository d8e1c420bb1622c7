"""Answers a second: chat.py's decoding against transformers' generate() on the same model, in one run.

    python benchmarks/bench_chat.py --model_path DIR --prompts 24 --rounds 4
    python benchmarks/bench_chat.py --model_path DIR --previous_path CHECKOUT    also an earlier checkout's decoding

The prompts are records of alpaca_data.json in a shuffled order, at most 32 new tokens; DIR is made from the embedded
model (135 M parameters) when it is not there. In each round each way has its turn, one round forwards and the next
backwards. Three questions are kept apart:

    one stream   answer_batch() against plain generate(), one prompt after the other (the first 4)
    decoder      the same on batches, by length and in the file's order
    batching     batches by length against batches in the file's order, with the same decoder

each greedy and sampled. answer_batch() is what chat.py calls: generate() with our draws and the text as it comes; a
row that has ended leaves the batch. On one
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

import utils  # noqa: E402
from alpaca import embedded_model  # noqa: E402
from alpaca.common.cli import run_cli  # noqa: E402
from alpaca.inference import generate  # noqa: E402
from alpaca.inference.chat import request_ids  # noqa: E402
from alpaca.inference.load import load  # noqa: E402

ALONE = 4  # prompts that are answered one after the other
GENERATE, PREVIOUS, OURS = "generate()", "previous", "answer_batch()"
KINDS = {"greedy": (0.0, 1.0), "sampled": (0.7, 0.9)}  # temperature, top_p

# Each takes prompts (token ids) that are one batch, and returns the number of tokens and the text of each answer.


def by_generate(model, tokenizer, prompts: list[list[int]], settings) -> list[tuple[int, str]]:
    ends, (ids, mask) = generate.end_ids(model, tokenizer), generate.left_padded(prompts, model.device)
    sampling = {"do_sample": settings.temperature > 0}
    if settings.temperature > 0:
        sampling |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    made = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=0,
        **sampling,
    )
    answers = made[:, ids.shape[1] :].tolist()
    answers = [tokens[: next((i for i, token in enumerate(tokens) if token in ends), None)] for tokens in answers]
    texts = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers)
    texts = (text.partition(generate.STOP)[0].strip() for text in texts)
    return [(len(tokens), text) for tokens, text in zip(answers, texts, strict=True)]


def by_answer_batch(model, tokenizer, prompts: list[list[int]], settings, ours=generate) -> list[tuple[int, str]]:
    """With this module generate, or an earlier checkout's."""
    made = ours.answer_batch(model, tokenizer, prompts, ours.Settings(**vars(settings)))
    made = [
        (answer[1], answer[0]) if isinstance(answer, tuple) else (len(answer.tokens), answer.text) for answer in made
    ]
    return made


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
    order = [place for batch in generate.batches(list(map(len, ids)), 0, 10**9) for place in batch]
    in_order = {"by length": order, "in file order": list(range(len(ids)))}
    groups = {name: [o[i : i + rows] for i in range(0, len(o), rows)] for name, o in in_order.items()}
    groups["one by one"] = [[place] for place in range(min(ALONE, len(ids)))]

    ways: dict[tuple[str, str, str], Callable[[], list]] = {}
    for kind, (temperature, top_p) in KINDS.items():
        settings = generate.Settings(max_new_tokens, temperature, top_p, seed=0)
        for name, batch in groups.items():
            steps = {GENERATE: by_generate, OURS: by_answer_batch}
            if previous_path:
                steps[PREVIOUS] = partial(by_answer_batch, ours=previous(previous_path))
            for what, way in steps.items():
                ways[name, kind, what] = partial(answers, way, batch, ids, model, tokenizer, settings)
    rates: dict[tuple, list[float]] = {name: [] for name in ways}
    said: dict[tuple, list] = {}
    for way in (by_generate, by_answer_batch):  # warm up
        way(model, tokenizer, ids[:1], generate.Settings(4, 0.7, 0.9, 0))
    clock = time.process_time if torch.get_num_threads() == 1 and model.device.type == "cpu" else time.perf_counter
    for number in range(rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            started = clock()
            said[name] = ways[name]()
            seconds = clock() - started
            tokens = sum(count for count, _ in said[name])
            rates[name].append(round(tokens / seconds, 2))
            print(f"round {number + 1}: {', '.join(name):<36} {rates[name][-1]:8.1f} tokens/s", flush=True)

    def ratio(ours: tuple, theirs: tuple) -> dict:
        """Of the medians, and the least and the greatest of a round's."""
        each = [a / b for a, b in zip(rates[ours], rates[theirs], strict=True)]
        medians = [statistics.median(rates[name]) for name in (ours, theirs)]
        return {"median": round(medians[0] / medians[1], 3), "rounds": [round(r, 3) for r in (min(each), max(each))]}

    def against(other: str) -> dict:
        pairs = {
            (name, kind): ratio((name, kind, OURS), (name, kind, other)) for name, kind, what in ways if what == other
        }
        return {f"{name}, {kind}": value for (name, kind), value in pairs.items()}

    def equal(other: str, kind: str) -> dict:
        """How many answers are the same text as another way's."""
        return {
            name: sum(a == b for a, b in zip(said[name, kind, OURS], said[name, kind, other], strict=True))
            for name in groups
        }

    by_length = {
        f"{kind}, {what}": ratio(("by length", kind, what), ("in file order", kind, what))
        for kind in KINDS
        for what in (GENERATE, OURS)
    }
    lengths = sorted(map(len, ids))
    result = provenance("torch", "transformers") | {
        "device": str(model.device),
        "dtype": str(model.dtype),
        "prompts": {"count": len(ids), "tokens_min_median_max": [lengths[0], statistics.median(lengths), lengths[-1]]},
        "answers": {
            "tokens_each": sorted(count for count, _ in said["by length", "greedy", OURS]),
            "max_new_tokens": max_new_tokens,
        },
        "rows_of_a_batch": rows,
        "tokens_per_s": {", ".join(name): values for name, values in rates.items()},
        "against_generate": against(GENERATE),
        "against_previous": against(PREVIOUS),
        "batches_by_length_against_file_order": by_length,
        "clock": clock.__name__,
        "answers_equal_to_generate": equal(GENERATE, "greedy"),
        "answers_equal_to_previous": {kind: equal(PREVIOUS, kind) for kind in KINDS} if previous_path else {},
    }
    for title in ("against_generate", "against_previous", "batches_by_length_against_file_order"):
        print(title.replace("_", " "))
        for name, value in result[title].items():
            print(f"  {name:<36} {value['median']:.2f}× ({value['rounds'][0]:.2f} to {value['rounds'][1]:.2f})")
    print(json.dumps([result["answers_equal_to_generate"], result["answers_equal_to_previous"]]))
    utils.jdump(result, output_path, indent=2)


if __name__ == "__main__":
    run_cli(main)
