"""De-duplication on many workers against one process: the same bytes, seconds, and memory.

    python benchmarks/bench_scale.py --kinds natural skewed near --records 100000 --workers 1 2 --local
    python benchmarks/bench_scale.py --kinds natural --records 1000000 10000000 --workers 2 --worker_gb 2

Results are added to benchmarks/results/scale.json, a section a kind and size. Three kinds of texts, in 8 shards:

- natural: as in bench_rouge.py, pieces of real instructions; one in ten is a copy with a tenth of its words changed;
- skewed: every text has one of five words, which is among its rarest, and a tenth of the texts come again and again;
- near: 10 or 20 words of which 6 to 9 in 10 are those of a family of about 20, so that F lies around 0.7.

Memory is the highest sum of the private and shared bytes (PSS) of all processes of the run, looked at each second.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
from bench_rouge import synthesize  # noqa: E402
from provenance import provenance  # noqa: E402

import utils  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "scale.json"
SHARDS = 8


def make(kind: str, count: int, path: Path) -> None:
    """Write ``count`` texts of a kind as JSON Lines; how is said at the top."""
    if kind == "natural":
        synthesize(utils.load_records(ROOT / "alpaca_data.json"), count, path)
        return
    rng = random.Random(0)
    with open(path, "w") as file:
        for _ in range(count):
            if kind == "skewed":
                words = [f"heavy{rng.randrange(5)}"]
                if rng.random() < 0.9:
                    words += [f"w{int(rng.paretovariate(0.5)) % 20_000}" for _ in range(rng.randrange(8, 14))]
                else:
                    words += f"the same text comes again {rng.randrange(3)}".split()
            else:
                family, size = rng.randrange(max(1, count // 20)), rng.choice((10, 20))
                words = [f"f{family}x{k}" for k in range(size)]
                for place in rng.sample(range(size), size * rng.randrange(1, 5) // 10):
                    words[place] = f"w{rng.randrange(20_000)}"
            file.write(json.dumps({"instruction": " ".join(words), "input": "", "output": "x"}) + "\n")


def split(path: Path, folder: Path, count: int) -> None:
    folder.mkdir()
    with open(path, "rb") as file:
        for shard in range(SHARDS):
            with open(folder / f"{shard:02}.jsonl", "wb") as out:
                out.writelines(next(file) for _ in range(count * shard // SHARDS, count * (shard + 1) // SHARDS))


def timed(source: Path, target: Path, *flags: str) -> dict:
    """Run one de-duplication in a process of its own."""
    command = ["dedup", "--input_path", source, "--output_path", target, "--similarity_stats", "False", *flags]
    start, peak = time.perf_counter(), 0
    command = [sys.executable, ROOT / "generate_instruction.py", *map(str, command)]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)  # a few lines: no pipe is filled
    while run.poll() is None:
        size, root = 0, psutil.Process(run.pid)
        with suppress(psutil.Error):
            for process in [root, *root.children(recursive=True)]:
                with suppress(psutil.Error):
                    size += process.memory_full_info().pss
        peak = max(peak, size)
        with suppress(subprocess.TimeoutExpired):
            run.wait(1)
    seconds = time.perf_counter() - start
    if run.returncode:
        sys.exit(run.returncode)
    kept, digest = 0, hashlib.sha256()
    for file in [target] if target.is_file() else sorted(target.iterdir()):
        with open(file, "rb") as lines:
            for line in lines:
                kept += 1
                digest.update(line)
    result = {"seconds": round(seconds, 1), "peak_mb": round(peak / 2**20), "kept": kept, "sha256": digest.hexdigest()}
    if stages := re.search("^seconds: (.*)", run.stdout.read(), re.M):
        result["stages"] = {name: float(value) for name, value in map(str.split, stages[1].split(", "))}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["natural"], choices=["natural", "skewed", "near"])
    parser.add_argument("--records", type=int, nargs="+", required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--worker_gb", type=float, default=2.0)
    parser.add_argument("--local", action="store_true", help="run one process as well, and compare the bytes")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for kind in arguments.kinds:
        for count in arguments.records:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                make(kind, count, folder / "all.jsonl")
                split(folder / "all.jsonl", folder / "in", count)
                result = provenance("ray", "rapidfuzz", "numpy", "pyarrow") | {"worker_gb": arguments.worker_gb}
                runs = {}
                for workers in arguments.workers:
                    flags = ("--engine", "ray", "--workers", str(workers), "--worker_gb", str(arguments.worker_gb))
                    runs[f"ray, {workers} workers"] = timed(folder / "in", folder / f"ray{workers}", *flags)
                if arguments.local:
                    runs["one process"] = timed(folder / "in", folder / "local.jsonl")
            result["runs"] = runs
            result["same_bytes"] = len({run["sha256"] for run in runs.values()}) == 1
            results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
            utils.jdump(results | {f"{kind} {count}": result}, arguments.results, indent=2)
            print(json.dumps({f"{kind} {count}": result}, indent=2))
            if not result["same_bytes"]:
                sys.exit("the engines kept different records")


if __name__ == "__main__":
    main()
