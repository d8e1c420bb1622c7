"""Throughput of the client against a local teacher of fixed latency, as a share of the ideal.

    python benchmarks/bench_client.py --latency 0.5 --seconds 6

The ideal is in_flight / latency replies a second. Each reply is journalled (fsync) and handed on, as in a real run.
Writes benchmarks/results/client.json.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from local_server import local_server  # noqa: E402
from provenance import provenance  # noqa: E402

import utils  # noqa: E402
from alpaca.common.cli import run_cli  # noqa: E402
from alpaca.common.journal import Journal  # noqa: E402
from alpaca.endpoint.budget import Budget, RequestSettings  # noqa: E402
from alpaca.endpoint.client import OpenAIDecodingArguments, Teacher  # noqa: E402
from alpaca.endpoint.parallel import Direct  # noqa: E402


def measure(base_url: str, in_flight: int, seconds: float) -> float:
    """Replies a second that were journalled and handed on."""
    import aiohttp  # noqa: F401  its import is start-up, not throughput

    count = 0

    def handed_on(reply):
        nonlocal count
        count += 1

    settings = RequestSettings(base_url, max_concurrency=in_flight)
    teacher = Teacher("m", OpenAIDecodingArguments(), settings=settings, max_retries=0)
    with tempfile.TemporaryDirectory() as folder, Journal(Path(folder) / "journal") as journal:
        started = time.monotonic()
        budget = Budget(settings)

        async def run():
            await Direct(
                teacher,
                lambda i: ("word " * 700, i),
                journal,
                budget,
                handed_on,
                lambda number, flying: time.monotonic() - started < seconds,
            ).run()

        asyncio.run(run())
        return count / (time.monotonic() - started)


def main(latency: float = 0.5, seconds: float = 6.0, repeat: int = 3) -> None:
    """Measures at 1 to 128 requests in flight and prints the share of the ideal.

    Args:
        latency: of the teacher, in seconds.
        seconds: how long requests are sent, for each measurement.
        repeat: measurements of each; the median counts.
    """
    rows = []
    with local_server(latency, ["answer " * 300]) as base_url:
        for in_flight in (1, 8, 32, 64, 128):
            rates = [measure(base_url, in_flight, seconds) for _ in range(repeat)]
            ideal = in_flight / latency
            rows.append({"in_flight": in_flight, "replies_per_s": rates, "ideal_per_s": ideal})
            rows[-1]["share_of_ideal"] = round(statistics.median(rates) / ideal, 3)
            print(
                f"{in_flight:>4} in flight: {statistics.median(rates):7.1f} replies/s, {rows[-1]['share_of_ideal']:.1%}"
            )
    result = provenance("aiohttp") | {"latency_s": latency, "rows": rows}
    utils.jdump(result, ROOT / "benchmarks" / "results" / "client.json", indent=2)


if __name__ == "__main__":
    run_cli(main)
