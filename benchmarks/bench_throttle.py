"""Generation against a server with a rate limit: requests for each answer, and the share of the server's rate.

    python benchmarks/bench_throttle.py --minutes 3

A local server has a token bucket: so many requests a minute, 5 at once, and HTTP 429 beyond, with or without a
Retry-After header. generate_instruction.py runs against it with its default flags until it has --minutes of the
server's rate. Writes benchmarks/results/throttle.json; with --checkout DIR, the script of another checkout runs too.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from provenance import provenance  # noqa: E402

import utils  # noqa: E402
from alpaca.common.cli import run_cli  # noqa: E402

BURST, LATENCY = 5, 2.0  # requests, seconds
KEPT = 2  # new instructions in each reply


class Limited(ThreadingHTTPServer):
    """Answers at most ``rpm`` requests a minute, each after LATENCY seconds; remembers when it did."""

    daemon_threads, request_queue_size = True, 256

    def __init__(self, rpm: float, retry_after: bool):
        super().__init__(("127.0.0.1", 0), Handler)
        self.rpm, self.retry_after = rpm, retry_after
        self.tokens, self.filled, self.lock = float(BURST), time.monotonic(), threading.Lock()
        self.answered: list[float] = []
        self.refused = 0
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def admit(self) -> float:
        """Return 0 and take a token, or the seconds until there is one."""
        with self.lock:
            now = time.monotonic()
            self.tokens = min(BURST, self.tokens + (now - self.filled) * self.rpm / 60)
            self.filled = now
            if self.tokens < 1:
                self.refused += 1
                return (1 - self.tokens) * 60 / self.rpm
            self.tokens -= 1
            self.answered.append(now)
            return 0.0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        status, headers = 200, {}
        if wait := self.server.admit():
            status, body = 429, {"error": {"message": "too many requests", "code": "rate_limit_exceeded"}}
            headers = {"Retry-After": str(int(wait) + 1)} if self.server.retry_after else {}
        else:
            time.sleep(LATENCY)
            items = [
                f"{number}. Instruction: Explain {' '.join(random_word() for _ in range(8))}\n"
                f"{number}. Input:\n<noinput>\n{number}. Output:\n{random_word()}\n"
                for number in range(4, 4 + KEPT)
            ]
            choice = {"finish_reason": "stop", "message": {"content": "###\n".join(items)}}
            body = {"model": "m", "choices": [choice], "usage": {"prompt_tokens": 600, "completion_tokens": 60}}
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def random_word() -> str:
    return "".join(random.choice("bcdfghjklmnprstv") + random.choice("aeiou") for _ in range(3))


def measure(checkout: Path, rpm: float, retry_after: bool, minutes: float) -> dict:
    """Run the generator of a checkout against a limited server; return what the server saw."""
    server = Limited(rpm, retry_after)
    with tempfile.TemporaryDirectory() as folder:
        argv = ["generate_instruction.py", "generate_instruction_following_data", "--output_dir", folder]
        argv += ["--base_url", f"http://127.0.0.1:{server.server_address[1]}/v1", "--model_name", "m", "--seed", "1"]
        argv += ["--num_instructions_to_generate", str(int(rpm * minutes * KEPT))]
        done = subprocess.run([sys.executable, *argv], cwd=checkout, capture_output=True, text=True)
    server.shutdown()
    server.server_close()
    late = [at - server.answered[0] - 60 for at in server.answered if at - server.answered[0] >= 60]
    share = None if len(late) < 2 else round((len(late) - 1) / (late[-1] - late[0]) / (rpm / 60), 3)
    return {
        "requests_per_minute": rpm,
        "retry_after": retry_after,
        "exit": done.returncode,
        "answered": len(server.answered),
        "requests_per_answer": round((len(server.answered) + server.refused) / len(server.answered), 3),
        "share_of_rate_after_first_minute": share,
        "seconds": round(server.answered[-1] - server.answered[0], 1),
    }


def main(minutes: float = 3.0, checkout: str | None = None) -> None:
    """Measure at 60 and 600 requests a minute, with and without Retry-After.

    Args:
        minutes: of the server's rate that each run needs.
        checkout: the folder of an earlier version of this project, to be measured as well.
    """
    rows = []
    for rpm in (60.0, 600.0):
        for retry_after in (True, False):
            for name, root in (("now", ROOT), ("before", checkout)):
                if root:
                    rows.append({"version": name} | measure(Path(root), rpm, retry_after, minutes))
                    print(json.dumps(rows[-1]), flush=True)
    result = provenance("aiohttp") | {"burst": BURST, "latency_s": LATENCY, "minutes": minutes, "rows": rows}
    utils.jdump(result, ROOT / "benchmarks" / "results" / "throttle.json", indent=2)


if __name__ == "__main__":
    run_cli(main)
