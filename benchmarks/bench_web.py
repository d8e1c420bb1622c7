"""Both web pages under load: what one greedy login does to others who ask, and how long a vote of 50 voters takes.

    python benchmarks/bench_web.py
    python benchmarks/bench_web.py --before PATH      the same with another checkout first, in one run

The demo has a scripted model: an answer takes one second, two are written at once. A greedy login keeps 30 requests
pending; 50 visitors of other addresses, each with a login, ask in turn, at most one at a time, so that the page could
answer them all. The blind page has 50 voters and 2,000 votes; each voter votes again, with a pause to read before
each vote. On a busy machine, look at the processor's time for a vote. Addresses are those that a proxy on this
machine would name. Writes benchmarks/results/web.json.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from provenance import provenance  # noqa: E402

ANSWER_SECONDS = 1.0
PENDING, VISITORS = 30, 50
VOTERS, PAIRS, ROWS, VOTES, PAUSE = 50, 200, 2_000, 4, 4.0

SERVER = f"""
import os, sys, threading, time
root, kind, folder = sys.argv[1:]
os.chdir(folder)
sys.path.insert(0, root)
from types import SimpleNamespace
from alpaca.common.cli import free_port
from alpaca.data.instruction_sets import Answers, Item
from alpaca.inference.generate import Settings
from alpaca.inference.web import page as demo, server
from alpaca.judging import page as blind
from alpaca.judging.votes import Ballots
try:
    from alpaca.inference.web import asking
except ImportError:  # before: in page.py
    asking = demo

class Scripted:
    def __init__(self, *_):
        self.turns, self.cut = [], ""

    def ask(self, instruction, input, say, stopped):
        end = time.monotonic() + {ANSWER_SECONDS}
        while time.monotonic() < end and not stopped():
            time.sleep(0.05)
            say("word ")

if kind == "demo":
    asking.Conversation, asking.request_ids = Scripted, lambda *_: [[1]]
    asking.context_length, asking.saved_template = lambda model: 2048, lambda tokenizer: "alpaca"
    page = demo.Demo([demo.Model("model", None, None)], Settings()).page
    print(server.launch(page, "127.0.0.1", free_port(0), ("ann", "right")), flush=True)
else:
    items = [Item(str(n), "Say something. " * 20, "", None, "") for n in range({PAIRS})]
    a, b = (Answers(name, {{item.id: f"{{name}} says **this**. " * 60 for item in items}}, [], {{}}) for name in "ab")
    ballots = Ballots(items, a, b, "votes.jsonl", seed=1)
    write, ballots._write = ballots._write, lambda: None  # the rows that are there already
    for number in range({ROWS}):
        ballots.vote(f"voter {{number % {VOTERS}}}", number // {VOTERS}, "first")
    ballots._write = write
    ballots._write()
    page = blind.build(ballots)
    print(server.launch(page, "127.0.0.1", free_port(0), None, blind.CSS), flush=True)
    ids = {{getattr(block, "elem_id", None): id for id, block in page.blocks.items()}}
    for event in page.config["dependencies"]:
        if event["backend_fn"] and (ids["choose-first"], "click") in map(tuple, event["targets"]):
            vote = event["id"]
        if event["backend_fn"] and any(name == "submit" for _, name in event["targets"]):
            begin = event["id"]
    print(begin, vote, flush=True)
threading.Event().wait()
"""


class Server:
    """One of the pages, of the code in ``root``, in a process of its own."""

    def __init__(self, root: Path, kind: str, lines: int):
        self.folder = tempfile.TemporaryDirectory()
        self.log = open(Path(self.folder.name) / "log", "w")
        argv = [sys.executable, "-c", SERVER, str(root), kind, self.folder.name]
        env = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=self.log, text=True, env=env)
        self.said = [self.process.stdout.readline().strip() for _ in range(lines)]

    def cpu_seconds(self) -> float:
        user, system = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()
        self.folder.cleanup()


async def log_in(session, url: str, address: str) -> dict[str, str]:
    async with session.post(f"{url}login", data={"username": "ann", "password": "right"}) as reply:
        cookies = "; ".join(f"{name}={morsel.value}" for name, morsel in reply.cookies.items())
        return {"Cookie": cookies, "X-Forwarded-For": address}


async def ask(session, url: str, headers: dict[str, str]) -> bool:
    """Ask, and read to the end of the answer; return whether there was one."""
    body = {"data": ["Count.", "", 16, 1, 1, 0]}
    async with session.post(f"{url}gradio_api/call/answer", json=body, headers=headers) as reply:
        if reply.status != 200:
            return False
        event = (await reply.json())["event_id"]
    async with session.get(f"{url}gradio_api/call/answer/{event}", headers=headers) as reply:
        last = re.findall(r"event: (\w+)", await reply.text())[-1:]
    return last == ["complete"]


async def greedy_and_others(url: str) -> dict:
    """Return how many of the others were answered, and how long that took, in answer times."""
    import aiohttp

    found, answered = [], 0
    options = {"cookie_jar": aiohttp.DummyCookieJar(), "timeout": aiohttp.ClientTimeout(10 * ANSWER_SECONDS)}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), **options) as session:
        greedy = await log_in(session, url, "192.0.2.1")
        others = [await log_in(session, url, f"198.51.100.{number}") for number in range(VISITORS)]

        async def keep_asking() -> None:
            while True:
                try:
                    await ask(session, url, greedy)
                except (OSError, aiohttp.ClientError):  # a timeout is an OSError
                    pass
                await asyncio.sleep(0.05)

        tasks = [asyncio.create_task(keep_asking()) for _ in range(PENDING)]
        await asyncio.sleep(2 * ANSWER_SECONDS)
        for headers in others:
            started = time.monotonic()
            try:
                answered += await ask(session, url, headers)
                found.append((time.monotonic() - started) / ANSWER_SECONDS)
            except (OSError, aiohttp.ClientError):  # a timeout is an OSError
                found.append(10.0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "asked": len(others),
        "answered": answered,
        "answer_times_median": round(statistics.median(found), 2),
        "answer_times_max": round(max(found), 2),
    }


async def votes(server: Server, by_name: bool) -> dict:
    """Return how long the votes of all voters took; ``by_name``: the page still believes the name that it is sent."""
    import aiohttp

    url, functions = server.said
    begin, vote = map(int, functions.split())
    seconds: list[float] = []
    cpu_before = server.cpu_seconds()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def call(function: int, data: list, visit: str) -> None:
            body = {"data": data, "fn_index": function, "session_hash": visit}
            async with session.post(f"{url}gradio_api/run/predict", json=body) as reply:
                assert reply.status == 200, await reply.text()
                await reply.read()

        async def voter(number: int) -> None:
            name = f"voter {number}"
            await asyncio.sleep(PAUSE * number / VOTERS)
            await call(begin, [name], name)
            for place in range(ROWS // VOTERS, ROWS // VOTERS + VOTES):
                await asyncio.sleep(PAUSE)
                started = time.monotonic()
                await call(vote, [name if by_name else None, place], name)
                seconds.append(time.monotonic() - started)

        await asyncio.gather(*map(voter, range(VOTERS)))
    seconds.sort()
    return {
        "votes": len(seconds),
        "cpu_seconds_per_vote": round((server.cpu_seconds() - cpu_before) / len(seconds), 4),
        "seconds_median": round(statistics.median(seconds), 4),
        "seconds_p95": round(seconds[int(0.95 * len(seconds))], 4),
        "seconds_max": round(seconds[-1], 4),
    }


def measure(root: Path) -> dict:
    with Server(root, "demo", 1) as server:
        one = asyncio.run(greedy_and_others(server.said[0]))
    with Server(root, "blind", 2) as server:
        by_name = "session = gr.State" not in (root / "alpaca/judging/page.py").read_text()
        many = asyncio.run(votes(server, by_name))
    print(f"{root.name}: one greedy login: {one}; {VOTERS} voters: {many}", flush=True)
    return {"greedy_login": one, "voters": many}


def main(before: str | None = None) -> None:
    """Put both pages under load and write the figures.

    Args:
        before: another checkout of this project, which is measured first.
    """
    made_with = provenance("gradio", "uvicorn", "starlette", "aiohttp")
    result = made_with | {"answer_s": ANSWER_SECONDS, "pending": PENDING, "voters": VOTERS, "rows": ROWS}
    result |= {"pause_between_votes_s": PAUSE}
    if before:
        result["command"] = result["command"].replace(before, "PATH")
        result["before"] = measure(Path(before).resolve())
    result["now"] = measure(ROOT)
    path = ROOT / "benchmarks" / "results" / "web.json"
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    from alpaca.common.cli import run_cli

    run_cli(main)
