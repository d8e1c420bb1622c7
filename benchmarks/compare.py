"""Two checkouts of this project side by side, in one run: what a change did to its speed.

    git worktree add ../before COMMIT
    python benchmarks/compare.py --before ../before --after . --output_path benchmarks/results/compare.json

Runs bench_client.py, bench_judge.py and `bench_rouge.py pairs` of each checkout in turn, for several rounds, with this
interpreter. A ratio is the speed after over the speed before, of the medians over all rounds. Each benchmark also
writes its own results file into its checkout.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from provenance import provenance  # noqa: E402

from alpaca.common.cli import run_cli  # noqa: E402
from alpaca.common.records import jdump  # noqa: E402


def speeds(checkout: Path) -> dict[str, list[float]]:
    """Run the benchmarks of one checkout once and return their speeds, by what was measured; higher is faster."""

    def results(name: str, *arguments: str) -> dict:
        command = [sys.executable, f"benchmarks/bench_{name}.py", *arguments]
        subprocess.run(command, cwd=checkout, check=True, stdout=subprocess.DEVNULL)
        return json.loads((checkout / "benchmarks" / "results" / f"{name}.json").read_text())

    found = {
        f"client, {row['in_flight']} in flight (replies/s)": row["replies_per_s"]
        for row in results("client", "--repeat", "1")["rows"]
    }
    found["judge, 32 in flight (runs/s)"] = [1 / seconds for seconds in results("judge", "--repeat", "2")["seconds"]]
    for name, contender in results("rouge", "pairs", "--runs", "15")["pairs"]["result"]["contenders"].items():
        if name.startswith("RougePool"):
            found[f"{name} (runs/s)"] = [1 / seconds for seconds in contender["seconds_of_each_run"]]
    return found


def main(before: str, after: str, output_path: str, rounds: int = 3) -> None:
    """Compare two checkouts.

    Args:
        before: folder of the older one.
        after: folder of the newer one.
        output_path: the JSON file to write.
        rounds: of both in turn.
    """
    measured: dict[str, dict[str, list[float]]] = {"before": defaultdict(list), "after": defaultdict(list)}
    made_with = provenance("aiohttp", "rapidfuzz", "numpy")
    for number in range(rounds):
        for side in ("before", "after") if number % 2 == 0 else ("after", "before"):
            for name, values in speeds(Path(before if side == "before" else after)).items():
                measured[side][name] += values
    rows = {}
    for name, old in measured["before"].items():
        medians = statistics.median(old), statistics.median(measured["after"][name])
        rows[name] = {"before": medians[0], "after": medians[1], "ratio": round(medians[1] / medians[0], 3)}
        print(f"{rows[name]['ratio']:6.3f}  {name}")
    commits = {
        side: subprocess.run(["git", "-C", folder, "describe", "--always", "--dirty"], capture_output=True, text=True)
        for side, folder in (("before", before), ("after", after))
    }
    jdump(made_with | {side: run.stdout.strip() for side, run in commits.items()} | {"rows": rows}, output_path, 2)


if __name__ == "__main__":
    run_cli(main)
