"""How long 52,000 records take to become tokens, the first time and from the cache. One command, a minute on 2 cores.

    python benchmarks/bench_tokens.py

The records: texts of --data with the released data's lengths (released_mix.py), each instruction with a number of its
own, so that no two are alike. Each round has an empty cache; each run is a process of its own, timed from its call to
the data set's end, without the start of Python. The oracle, one record at a time and prompts tokenised twice as the
original did, is timed on one record in ten. Tokenizer: the embedded SmolLM2's, or that of --model_path.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from provenance import provenance  # noqa: E402
from released_mix import MAX_LENGTH, encode, make_data  # noqa: E402

import utils  # noqa: E402

SMOLLM2 = Path.home() / ".cache" / "alpaca" / "smollm2-135m-instruct"


def once(kind: str, data: str, model: str) -> dict:
    """Seconds of one way, in this process."""
    from transformers import AutoTokenizer

    from alpaca.training.examples import SupervisedDataset

    tokenizer, records = AutoTokenizer.from_pretrained(model), utils.load_records(data)
    began = time.perf_counter()
    if kind == "oracle":
        tokens = sum(len(example["input_ids"]) for example in encode(records[::10], tokenizer))
    else:
        tokens = sum(SupervisedDataset(records, tokenizer, MAX_LENGTH, "training").lengths)
    return {"seconds": round(time.perf_counter() - began, 3), "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(ROOT / "alpaca_data.json"), help="texts that the records are made from")
    parser.add_argument("--records", type=int, default=52_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model_path", default=str(SMOLLM2), help="whose tokenizer")
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "tokens.json"))
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)  # what, and the records; in a child process
    a = parser.parse_args()
    if a.once:
        print(json.dumps(once(*a.once, a.model_path)))
        return
    if not Path(a.model_path).exists():
        command = [sys.executable, "-m", "alpaca.embedded_model", "prepare", "--model_path", a.model_path]
        subprocess.run(command, check=True, cwd=ROOT)
    from transformers import AutoTokenizer

    report = provenance("tokenizers", "transformers", "datasets") | {"records": a.records, "max_length": MAX_LENGTH}
    tokenizer = AutoTokenizer.from_pretrained(a.model_path)
    made = make_data(utils.load_records(a.data), tokenizer, 100)
    records = [
        made[i % len(made)] | {"instruction": f"{made[i % len(made)]['instruction']} ({i})"} for i in range(a.records)
    ]
    rounds = []
    with tempfile.TemporaryDirectory(prefix="bench_tokens.") as folder:
        data = os.path.join(folder, "data.json")
        utils.jdump(records, data, indent=None)
        for number in range(a.rounds):
            env = os.environ | {"XDG_CACHE_HOME": os.path.join(folder, f"cache{number}"), "HF_HUB_OFFLINE": "1"}
            row = {}
            for name, kind in (("first", "ours"), ("again", "ours"), ("oracle_tenth", "oracle")):
                command = [sys.executable, __file__, "--model_path", a.model_path, "--once", kind, data]
                child = subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE, text=True)
                row[name] = json.loads(child.stdout.splitlines()[-1])
            rounds.append(row)
            print(f"round {number + 1}: " + ", ".join(f"{name} {run['seconds']:.1f} s" for name, run in row.items()))
    medians = {name: statistics.median(row[name]["seconds"] for row in rounds) for name in rounds[0]}
    report |= {"tokens": rounds[0]["first"]["tokens"], "seconds": medians, "rounds": rounds}
    report["times_oracle"] = round(10 * medians["oracle_tenth"] / medians["first"], 1)
    utils.jdump(report, a.output, indent=2)
    times = f"first {medians['first']:.1f} s, again {medians['again']:.1f} s, ×{report['times_oracle']} the oracle"
    print(f"{times}; {a.output}")


if __name__ == "__main__":
    main()
