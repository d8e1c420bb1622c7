"""SIGKILL at random moments: does each resumed run end with the bytes of an uninterrupted one?

    python benchmarks/bench_kills.py --kills 200                # about 5 minutes

A local teacher answers by the request alone, after 5 to 35 ms. A run is killed after a random time, started
again, killed again, …, up to 6 times, then left to end; its regen.json and rejected.jsonl are compared with those of a
run that nobody killed, and its journal is searched for replies that are lost or there twice. Then the next run begins,
with another seed and the next arm: a plain run, one that shows what it has made, one with topics, one with labels
first, and one with all three. Writes benchmarks/results/kills.json.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "endpoint")]

from conftest import Teacher, run_script  # noqa: E402
from provenance import provenance  # noqa: E402
from test_crash import arms, command, digest, journalled, killed, suggestible  # noqa: E402
from tqdm import tqdm  # noqa: E402

import utils  # noqa: E402
from alpaca.common.cli import run_cli  # noqa: E402


def one_run(server: Teacher, folder: Path, seed: int, target: int, rng: random.Random, arm: str) -> dict:
    """Kills a run again and again, lets it end, and compares it with one that was not killed."""
    flags = ("--num_instructions_to_generate", target, "--seed", seed, *arms(folder).get(arm, ()))
    whole = run_script(*command(server, folder / "whole", *flags))
    argv, kills, lost = command(server, folder / "killed", *flags), 0, 0
    finished: set[int] = set()
    while kills < 6 and killed(argv, rng.uniform(0.4, 2.0)):
        kills += 1
        if (folder / "killed" / "regen.journal").exists():
            now = {entry["i"] for entry in journalled(folder / "killed")[:-1]}  # the last line may be torn
            lost += len(finished - now)
            finished = now
    last = run_script(*argv)
    numbers = [entry["i"] for entry in journalled(folder / "killed")]
    return {
        "arm": arm,
        "seed": seed,
        "kills": kills,
        "ended": whole.returncode == last.returncode == 0,
        "equal": digest(folder / "whole") == digest(folder / "killed"),
        "lost": lost,
        "twice": len(numbers) - len(set(numbers)),
    }


def main(kills: int = 200, target: int = 60, seed: int = 0) -> None:
    """Kills runs until there were so many kills, and counts what went wrong.

    Args:
        kills: at least so many.
        target: instructions that each run is to keep.
        seed: of the random moments.
    """
    server, rng, runs, started = Teacher(suggestible), random.Random(seed), [], time.monotonic()
    order = ["plain", "pool", "topics", "output_first", "all"]
    with tqdm(total=kills, unit="kill") as bar:
        while bar.n < kills:
            with tempfile.TemporaryDirectory() as folder:
                runs.append(one_run(server, Path(folder), len(runs), target, rng, order[len(runs) % len(order)]))
            bar.update(runs[-1]["kills"])
    server.server.shutdown()
    result = provenance() | {
        "seconds": round(time.monotonic() - started),
        "runs": len(runs),
        "kills": sum(run["kills"] for run in runs),
        "runs_that_did_not_end": sum(not run["ended"] for run in runs),
        "runs_that_differ": sum(not run["equal"] for run in runs),
        "replies_lost": sum(run["lost"] for run in runs),
        "replies_twice": sum(run["twice"] for run in runs),
        "runs_with_a_kill": sum(run["kills"] > 0 for run in runs),
        "kills_by_arm": {arm: sum(run["kills"] for run in runs if run["arm"] == arm) for arm in order},
        "every_run": [f"{run['arm']}, seed {run['seed']}: {run['kills']} kills" for run in runs],
    }
    utils.jdump(result, ROOT / "benchmarks" / "results" / "kills.json", indent=2)
    print({key: value for key, value in result.items() if key != "every_run"})


if __name__ == "__main__":
    run_cli(main)
