"""Benchmark data: texts of any file, with the lengths of the data that Stanford Alpaca released.

That has 52,002 records and about 6.6 M LLaMA tokens, 127 each, and 98% of the records have at most 256. The log-normal
distribution with that mean and that percentile has a median of 118 and a sigma of 0.376. Its quantiles are the lengths;
for each, the shortest unused record that is long enough is taken, and its output cut.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils  # noqa: E402

MAX_LENGTH = 512
MEAN_TOKENS, P98_TOKENS = 127, 256
EPOCH_TOKENS = 6_600_000
IGNORE_INDEX = -100


def length_mix(count: int) -> list[int]:
    """``count`` lengths in tokens: quantiles of the log-normal distribution with the released data's mean and P98.

    With x = ln(P98 / mean) and z the normal's 98% quantile, sigma solves sigma²/2 − z·sigma + x = 0.
    """
    normal = statistics.NormalDist()
    z, x = normal.inv_cdf(0.98), math.log(P98_TOKENS / MEAN_TOKENS)
    sigma = z - math.sqrt(z * z - 2 * x)
    mu = math.log(MEAN_TOKENS) - sigma * sigma / 2
    quantiles = (math.exp(mu + sigma * normal.inv_cdf((i + 0.5) / count)) for i in range(count))
    return [min(round(length), MAX_LENGTH) for length in quantiles]


def make_data(records: list[dict], tokenizer, count: int, seed: int = 0) -> list[dict]:
    """``count`` records of the lengths of ``length_mix``, in random order. A record is used again when all are used."""
    sizes = []
    for number, record in enumerate(records):
        prompt = len(tokenizer(utils.format_prompt(record["instruction"], record["input"]))["input_ids"])
        output = tokenizer(record["output"], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        sizes.append((prompt + len(output) + 1, prompt, number, output))
    sizes.sort(key=lambda size: size[0])
    unused, made = list(sizes), []
    shortest = min(size[1] for size in sizes) + 2  # with a token of output, and EOS
    for length in sorted((max(length, shortest) for length in length_mix(count)), reverse=True):

        def fits(size, length=length):
            return size[0] >= length and size[1] <= length - 2

        chosen = next(filter(fits, unused), None)
        if chosen is None:
            chosen = next(filter(fits, sizes), None)
            if chosen is None:
                raise SystemExit(f"error: no record of --data has {length} tokens: give longer data")
        else:
            unused.remove(chosen)
        _, prompt, number, offsets = chosen
        end = offsets[length - prompt - 2][1]
        made.append(records[number] | {"output": records[number]["output"][:end]})
    random.Random(seed).shuffle(made)
    return made


def encode(records: list[dict], tokenizer) -> list[dict]:
    """The original's way: each text tokenised whole, the labels of as many tokens as the prompt has masked."""
    examples = []
    for record in records:
        prompt = utils.format_prompt(record["instruction"], record["input"])
        ids = tokenizer(prompt + record["output"])["input_ids"] + [tokenizer.eos_token_id]
        masked = len(tokenizer(prompt)["input_ids"])
        examples.append(
            {"input_ids": ids[:MAX_LENGTH], "labels": ([IGNORE_INDEX] * masked + ids[masked:])[:MAX_LENGTH]}
        )
    return examples
