"""Throughput of the client against a local teacher of fixed latency, as a share of the ideal.

    python benchmarks/bench_client.py --latency 0.5 --seconds 6

The ideal is in_flight / latency replies a second. Each reply is journalled (fsync) and handed on, as in a real run.
Writes benchmarks/results/client.json.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from provenance import provenance  # noqa: E402

import utils  # noqa: E402
from alpaca.cli import run_cli  # noqa: E402
from alpaca.inflight import ask_all  # noqa: E402
from alpaca.journal import Journal  # noqa: E402

REPLY = json.dumps(
    {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "answer " * 300}}
        ],
        "usage": {"prompt_tokens": 900, "completion_tokens": 300, "total_tokens": 1200},
    }
).encode()


def serve(latency: float) -> None:
    """A teacher that answers every request after ``latency`` seconds; prints its port."""

    async def answer(reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(next(line for line in head.lower().split(b"\r\n") if b"content-length" in line).split()[1])
                await reader.readexactly(length)
                await asyncio.sleep(latency)
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(REPLY)
                )
                writer.write(REPLY)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def main():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    asyncio.run(main())


def measure(port: int, in_flight: int, seconds: float) -> float:
    """Replies a second that were journalled and handed on."""
    import openai  # noqa: F401  its 0.7 s are start-up, not throughput

    count = 0

    def handed_on(reply):
        nonlocal count
        count += 1

    settings = utils.OpenAIDecodingArguments()
    teacher = utils.Teacher(
        "m", settings, base_url=f"http://127.0.0.1:{port}/v1", max_retries=0, max_concurrency=in_flight
    )
    with tempfile.TemporaryDirectory() as folder, Journal(Path(folder) / "journal") as journal:
        started = time.monotonic()
        asyncio.run(
            ask_all(
                teacher,
                lambda i: ("word " * 700, i),
                journal,
                lambda reply, new: None,
                handed_on,
                lambda number, flying: time.monotonic() - started < seconds,
                in_flight,
            )
        )
        return count / (time.monotonic() - started)


def main(latency: float = 0.5, seconds: float = 6.0, repeat: int = 3) -> None:
    """Measures at 1 to 128 requests in flight and prints the share of the ideal.

    Args:
        latency: of the teacher, in seconds.
        seconds: how long requests are sent, for each measurement.
        repeat: measurements of each; the median counts.
    """
    server = subprocess.Popen([sys.executable, __file__, "serve", str(latency)], stdout=subprocess.PIPE, text=True)
    try:
        port, rows = int(server.stdout.readline()), []
        for in_flight in (1, 8, 32, 64, 128):
            rates = [measure(port, in_flight, seconds) for _ in range(repeat)]
            ideal = in_flight / latency
            rows.append({"in_flight": in_flight, "replies_per_s": rates, "ideal_per_s": ideal})
            rows[-1]["share_of_ideal"] = round(statistics.median(rates) / ideal, 3)
            print(
                f"{in_flight:>4} in flight: {statistics.median(rates):7.1f} replies/s, {rows[-1]['share_of_ideal']:.1%}"
            )
    finally:
        server.kill()
        server.wait()
    result = provenance("openai") | {"latency_s": latency, "rows": rows}
    utils.jdump(result, ROOT / "benchmarks" / "results" / "client.json", indent=2)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(float(sys.argv[2]))
    else:
        run_cli(main)
