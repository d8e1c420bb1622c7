"""SIGKILL at each step of a batch: is anything asked twice, and do resumed runs end with the same bytes?

    python benchmarks/bench_batch_kills.py --kills 20           # at each of the four steps; about 90 seconds

A local Batch server answers by the request's seed alone. Its first batch expires half answered, so that each run has at
least two rounds. A run of generate_instruction.py --batch is killed when the server has done a step: half of the times
before the answer leaves, half of the times up to 20 ms later. The same command is started until it ends. What it wrote
and what the server answered are compared with a run that nobody killed. Then the next run begins, with another seed.
Writes benchmarks/results/batch_kills.json.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "endpoint")]

from made_batch_server import BatchServer  # noqa: E402
from provenance import provenance  # noqa: E402
from test_batch_api import items  # noqa: E402
from test_crash import command, digest  # noqa: E402
from tqdm import tqdm  # noqa: E402

import utils  # noqa: E402
from alpaca.common.cli import run_cli  # noqa: E402

STEPS = {
    "upload": "after the upload",
    "create": "after the create",
    "poll": "while waiting",
    "content": "while reading",
}
MOST_KILLS = 5  # of one run


def start(server: BatchServer, folder: Path, seed: int) -> subprocess.Popen:
    argv = command(server, folder, "--batch", "--num_instructions_to_generate", 60, "--seed", seed)
    return subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def one_run(step: str, folder: Path, seed: int, rng: random.Random) -> dict:
    """Kills a run at a step again and again until it ends, and compares it with one that was not killed."""
    whole, server = (BatchServer(items, ends=["expired"]) for _ in range(2))
    if step == "poll":
        server.looks = 3  # at each batch, until it is over
    ended, kills, running = [start(whole, folder / "whole", seed).wait()], 0, []

    def after(done: str) -> None:
        if done == step and kills < MOST_KILLS and rng.random() < 0.7:
            if rng.random() < 0.5:
                running[-1].kill()
            else:
                threading.Timer(rng.uniform(0, 0.02), running[-1].kill).start()

    server.after = after
    while not ended[1:]:
        running.append(start(server, folder / "killed", seed))
        if running[-1].wait() == -signal.SIGKILL:
            kills += 1
        else:
            ended.append(running[-1].returncode)
    for one in (whole, server):
        one.server.shutdown()
        one.server.server_close()
    return {
        "kills": kills,
        "batches": len(server.batches),
        "asked": len(server.answered),
        "asked_twice": sum(times > 1 for times in server.bill().values()),
        "differs": server.answered != whole.answered or digest(folder / "whole") != digest(folder / "killed"),
        "did_not_end": ended != [0, 0],
    }


def main(kills: int = 20, seed: int = 0) -> None:
    """Kills runs at each step until there were so many kills, and counts what went wrong.

    Args:
        kills: at each step, at least so many.
        seed: of the moments.
    """
    rng, started, results = random.Random(seed), time.monotonic(), {}
    for step, name in STEPS.items():
        runs: list[dict] = []
        with tqdm(total=kills, unit="kill", desc=name) as bar:
            while bar.n < kills:
                with tempfile.TemporaryDirectory() as folder:
                    runs.append(one_run(step, Path(folder), len(runs), rng))
                bar.update(runs[-1]["kills"])
        results[name] = {"runs": len(runs)} | {key: sum(run[key] for run in runs) for key in runs[0]}
    result = provenance() | {"seconds": round(time.monotonic() - started), "steps": results}
    utils.jdump(result, ROOT / "benchmarks" / "results" / "batch_kills.json", indent=2)
    print(results)


if __name__ == "__main__":
    run_cli(main)
