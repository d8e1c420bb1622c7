"""How fast rouge.py and dedup.py are. Results go to benchmarks/results/rouge.json, a section a task.

    python benchmarks/bench_rouge.py pairs                      # a minute; against rouge_score in the same run
    python benchmarks/bench_rouge.py growth --sizes 1000 10000 52000 --stats
    python benchmarks/bench_rouge.py growth --sizes 1000 10000 52000 100000 1000000

Rivals are compared where they are installed (pip install rouge-score-rs==0.2.1 rapidrouge==0.2.0, or --rivals FOLDER
for one that pip's --target made).

The texts of ``growth`` are made from --data: a text has the length of a random instruction and is put together from
pieces of 1 to 4 neighbouring words of random instructions, so that words and pairs of words are as frequent as there.
One in ten is a copy of an earlier text in which a tenth of the words (at least one) are others. The vocabulary does not
grow with the number of texts as that of real data would: there are fewer rare words, which makes pruning harder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from provenance import provenance  # noqa: E402

import utils  # noqa: E402
from alpaca.data.dedup import dedup  # noqa: E402
from alpaca.data.rouge import RougePool, tokenize  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "rouge.json"
REFERENCE = "rouge_score _score_lcs"
REPLY = 16  # instructions that a reply brings, about: the prompt asks for 17


# ---------------------------------------------------------------------------------------------------------------------
# pairs: N candidates against a pool, everyone on the same pairs.


def pairs(arguments: argparse.Namespace) -> dict:
    """Seconds for all pairs, and per pair; who gives other floats than rouge_score is named.

    The pool is made before the clock starts, as a generator has it; a candidate comes as text. Of the rivals only
    rapidrouge can be given tokens; rouge-score-rs tokenizes both texts of each pair, in Rust.
    """
    from rouge_score import rouge_scorer  # here: its nltk takes 60 MB, which would count as dedup's

    texts = [record["instruction"] for record in utils.load_records(arguments.data)]
    random.Random(0).shuffle(texts)
    candidates, others = texts[: arguments.candidates], texts[arguments.candidates :][: arguments.pool]
    tokens, pool = [tokenize(text) for text in others], RougePool(others)

    def scored_by(score_lcs):
        return [
            score_lcs(mine, other).fmeasure for mine in map(tokenize, candidates) for other in tokens
        ]  # as in the original: _score_lcs(candidate, other)

    contenders = {
        REFERENCE: lambda: scored_by(rouge_scorer._score_lcs),
        "RougePool.scores": lambda: [f for text in candidates for f in pool.scores(text).tolist()],
        f"RougePool.scores_of_each, {REPLY} at a time": lambda: [
            f
            for i in range(0, len(candidates), REPLY)
            for row in pool.scores_of_each(candidates[i : i + REPLY])
            for f in row.tolist()
        ],
        "RougePool.scores_of_each": lambda: [f for row in pool.scores_of_each(candidates) for f in row.tolist()],
    }
    sys.path += [str(Path(folder).resolve()) for folder in arguments.rivals]
    left_out, versions = {}, {}
    try:
        rapid = import_module("rapidrouge.rouge_scorer")
        versions["rapidrouge"] = metadata.version("rapidrouge")
        contenders["rapidrouge _score_lcs"] = lambda: scored_by(rapid._score_lcs)
    except ImportError as e:
        left_out["rapidrouge"] = str(e)
    try:
        rust = import_module("rouge_score_rs.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
        versions["rouge-score-rs"] = metadata.version("rouge-score-rs")
        left, right = [a for a in candidates for _ in others], [b for _ in candidates for b in others]
        contenders["rouge-score-rs score_batch"] = lambda: [
            score["rougeL"].fmeasure for score in rust.score_batch(left, right)
        ]
    except ImportError as e:
        left_out["rouge-score-rs"] = str(e)

    count = len(candidates) * len(others)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    floats = {}
    for _ in range(arguments.runs):
        for name, run in contenders.items():  # in turn, so that a busy moment of the machine hits all of them
            times, until = [], time.perf_counter() + 1
            while not times or time.perf_counter() < until:
                start = time.perf_counter()
                floats[name] = run()
                times.append(time.perf_counter() - start)
            seconds[name].append(statistics.median(times))
    median = {name: statistics.median(runs) for name, runs in seconds.items()}
    return {
        "candidates": len(candidates),
        "pool": len(others),
        "pairs": count,
        "tokens_per_text": round(statistics.mean(map(len, tokens)), 1),
        "contenders": {
            name: {
                "us_per_pair": round(median[name] / count * 1e6, 5),
                "times_rouge_score": round(median[REFERENCE] / median[name], 1),
                "same_floats": floats[name] == floats[REFERENCE],
                "seconds_of_each_run": [round(value, 6) for value in seconds[name]],
            }
            for name in contenders
        },
        "rivals": versions,
        "not_installed": left_out,
    }


# ---------------------------------------------------------------------------------------------------------------------
# growth: a whole de-duplication, file to file, each in a process of its own.


def synthesize(records: list[dict], count: int, path: Path, seed: int = 0) -> None:
    """Writes ``count`` records as JSON Lines; how is said at the top."""
    rng = random.Random(seed)
    real = [record["instruction"].split() for record in records]
    words = [word for text in real for word in text]
    made: list[str] = []
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            if made and rng.random() < 0.1:
                text = rng.choice(made).split()
                for _ in range(max(1, len(text) // 10)):
                    text[rng.randrange(len(text))] = rng.choice(words)
            else:
                length, text = len(rng.choice(real)), []
                while len(text) < length:
                    piece, size = rng.choice(real), rng.randint(1, 4)
                    start = rng.randrange(max(1, len(piece) - size + 1))
                    text += piece[start : start + size]
                text = text[:length]
            made.append(" ".join(text))
            record = rng.choice(records)
            line = {"instruction": made[-1], "input": record["input"], "output": record["output"]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def growth(arguments: argparse.Namespace) -> list[dict]:
    out = []
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.sizes:
            source, target = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
            synthesize(utils.load_records(arguments.data), size, source)
            runs = []
            for _ in range(arguments.runs if size <= 100_000 else 1):
                command = [sys.executable, __file__, "one", str(source), str(target), str(arguments.stats)]
                runs.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.split()[-1]))
                print(size, "with stats" if arguments.stats else "decisions only", runs[-1], file=sys.stderr)
            out.append(
                {
                    "records": size,
                    "stats": arguments.stats,
                    "kept": runs[0]["kept"],
                    "seconds": statistics.median(run["seconds"] for run in runs),
                    "peak_rss_mb": max(run["peak_rss_mb"] for run in runs),
                    "every_run": runs,
                }
            )
    return out


def one(arguments: argparse.Namespace) -> None:
    start = time.perf_counter()
    dedup(arguments.input, arguments.output, similarity_stats=arguments.stats == "True")
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB on Linux
    with open(arguments.output, encoding="utf-8") as file:
        kept = sum(1 for _ in file)
    result = {"seconds": round(seconds, 2), "peak_rss_mb": round(peak / 1024), "kept": kept}
    print(json.dumps(result, separators=(",", ":")))


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--data", default=str(ROOT / "alpaca_data.json"), help="instructions to take or to recombine")
    common.add_argument("--runs", type=int, default=3, help="of which the median counts")
    common.add_argument("--results", type=Path, default=RESULTS)
    task = tasks.add_parser("pairs", parents=[common])
    task.add_argument("--candidates", type=int, default=75)
    task.add_argument("--pool", type=int, default=1000)
    task.add_argument("--rivals", nargs="*", default=[], metavar="FOLDER")
    task = tasks.add_parser("growth", parents=[common])
    task.add_argument("--sizes", type=int, nargs="+", required=True)
    task.add_argument("--stats", action="store_true", help="all pairs are scored; without it decisions only")
    task = tasks.add_parser("one")  # a process of growth
    for name in ("input", "output", "stats"):
        task.add_argument(name)
    arguments = parser.parse_args()
    if arguments.task == "one":
        one(arguments)
        return
    section = arguments.task
    if section == "growth":
        section += " with stats" if arguments.stats else " decisions only"
    result = provenance("rapidfuzz", "numpy", "rouge-score") | {"data": os.path.relpath(arguments.data, ROOT)}
    result["result"] = globals()[arguments.task](arguments)
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    utils.jdump(results | {section: result}, arguments.results, indent=2)
    print(json.dumps(result["result"], indent=2))


if __name__ == "__main__":
    main()
