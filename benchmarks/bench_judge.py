"""How long judging 252 pairs in both orders takes against a judge of fixed latency, as a share of the ideal.

    python benchmarks/bench_judge.py --latency 0.5 --in_flight 32

The ideal is as many rounds of the latency as it takes to ask 504 times with so many in flight: 16 rounds of 32, of
which the last is not full. What is measured is the whole run of `judge.py judge` in this process, from reading the
files to the written judgments: prompts, journal (fsync), verdicts, rows. Writes benchmarks/results/judge.json.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from provenance import provenance  # noqa: E402

import judge  # noqa: E402
import utils  # noqa: E402
from alpaca.cli import run_cli  # noqa: E402

PAIRS = 252
WORDS = (60, 90, 90)  # in an instruction, and in the two answers: about what the 252 have with text-davinci-003


def reply(verdict: str) -> bytes:
    message = {
        "role": "assistant",
        "content": "The first is complete, the second is not. " * 8 + f"\n\nVerdict: {verdict}",
    }
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
    body |= {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
    body |= {"usage": {"prompt_tokens": 900, "completion_tokens": 80, "total_tokens": 980}}
    return json.dumps(body).encode()


def serve(latency: float) -> None:
    """A judge that answers every request after ``latency`` seconds; prints its port."""
    replies, number = [reply(verdict) for verdict in ("A", "B", "tie")], 0

    async def answer(reader, writer):
        nonlocal number
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(next(line for line in head.lower().split(b"\r\n") if b"content-length" in line).split()[1])
                await reader.readexactly(length)
                number += 1
                body = replies[number % 3]
                await asyncio.sleep(latency)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
                writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def main():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    asyncio.run(main())


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
    import openai  # noqa: F401  its 0.7 s are start-up, not throughput

    server = subprocess.Popen([sys.executable, __file__, "serve", str(latency)], stdout=subprocess.PIPE, text=True)
    seconds = []
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        for _ in range(repeat):
            with tempfile.TemporaryDirectory() as folder:
                files = write_files(Path(folder))
                output = Path(folder) / "judged.jsonl"
                started = time.monotonic()
                judge.judge(**files, output_path=str(output), model_name="m", base_url=url, max_concurrency=in_flight)
                seconds.append(time.monotonic() - started)
                assert len(utils.jload(output)) == 2 * PAIRS
    finally:
        server.kill()
        server.wait()
    ideal = math.ceil(2 * PAIRS / in_flight) * latency
    share = ideal / statistics.median(seconds)
    print(f"{2 * PAIRS} judgments in {statistics.median(seconds):.2f} s, {share:.1%} of the ideal ({ideal:.2f} s)")
    result = provenance("openai") | {"latency_s": latency, "in_flight": in_flight, "pairs": PAIRS}
    result |= {"seconds": [round(s, 3) for s in seconds], "ideal_s": ideal, "share_of_ideal": round(share, 3)}
    utils.jdump(result, ROOT / "benchmarks" / "results" / "judge.json", indent=2)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(float(sys.argv[2]))
    else:
        run_cli(main)
