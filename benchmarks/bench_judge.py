"""How long judging 252 pairs in both orders takes against a judge of fixed latency, as a share of the ideal.

    python benchmarks/bench_judge.py --latency 0.5 --in_flight 32

The ideal is as many rounds of the latency as it takes to ask 504 times with so many in flight: 16 rounds of 32, of
which the last is not full. What is measured is the whole run of `judge.py judge` in this process, from reading the
files to the written judgments: prompts, journal (fsync), verdicts, rows. Writes benchmarks/results/judge.json.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from local_server import local_server  # noqa: E402
from provenance import provenance  # noqa: E402

import judge  # noqa: E402
import utils  # noqa: E402
from alpaca.common.cli import run_cli  # noqa: E402
from alpaca.endpoint.budget import RequestSettings  # noqa: E402

PAIRS = 252
REASONS = "The first is complete, the second is not. " * 8
REPLIES = [f"{REASONS}\n\nVerdict: {verdict}" for verdict in ("A", "B", "tie")]
WORDS = (60, 90, 90)  # in an instruction, and in the two answers: about what the 252 have with text-davinci-003


def write_files(folder: Path) -> dict[str, str]:
    """A set of made-up instructions and two files of answers."""
    rng = random.Random(0)
    vocabulary = utils.read_text(ROOT / "prompt.txt").split()
    records = [
        {"instruction": f"{i} " + " ".join(rng.choices(vocabulary, k=WORDS[0])), "input": "", "output": ""}
        for i in range(PAIRS)
    ]
    utils.jdump(records, folder / "set.json")
    for name, words in zip("ab", WORDS[1:], strict=True):
        rows = [r | {"output": " ".join(rng.choices(vocabulary, k=words)), "generator": name} for r in records]
        utils.jdump(rows, folder / f"{name}.json")
    return {"instructions": f"{folder}/set.json", "answers": f"{folder}/a.json,{folder}/b.json"}


def main(latency: float = 0.5, in_flight: int = 32, repeat: int = 5) -> None:
    """Judges the same pairs several times and prints the share of the ideal.

    Args:
        latency: of the judge, in seconds.
        in_flight: requests at once.
        repeat: runs; the median counts.
    """
    import aiohttp  # noqa: F401  its import is start-up, not throughput

    seconds = []
    with local_server(latency, REPLIES) as url:
        requests = RequestSettings(url, max_concurrency=in_flight)
        for _ in range(repeat):
            with tempfile.TemporaryDirectory() as folder:
                files = write_files(Path(folder))
                output = Path(folder) / "judged.jsonl"
                started = time.monotonic()
                judge.judge(**files, output_path=str(output), model_name="m", requests=requests)
                seconds.append(time.monotonic() - started)
                assert len(utils.jload(output)) == 2 * PAIRS
    ideal = math.ceil(2 * PAIRS / in_flight) * latency
    share = ideal / statistics.median(seconds)
    print(f"{2 * PAIRS} judgments in {statistics.median(seconds):.2f} s, {share:.1%} of the ideal ({ideal:.2f} s)")
    result = provenance("aiohttp") | {"latency_s": latency, "in_flight": in_flight, "pairs": PAIRS}
    result |= {"seconds": [round(s, 3) for s in seconds], "ideal_s": ideal, "share_of_ideal": round(share, 3)}
    utils.jdump(result, ROOT / "benchmarks" / "results" / "judge.json", indent=2)


if __name__ == "__main__":
    run_cli(main)
