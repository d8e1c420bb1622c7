"""Requests in batches: the server gets a file of them and answers within a day, often at half price.

A round: upload a file of requests, create a batch from it, wait, read the results. Each step is journaled before the
next begins, so a killed run finds its batch and pays for nothing twice:

    {"batch": {"file": ID, "requests": [0, 1, …]}}        uploaded: from here on the batch is open
    {"batch": {"id": ID}}                                 created
    {"batch": {"done": …, "asked": {…}, "learned": {…}}}  its replies are on disk (see run.py); the state after that
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import sys
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import aiohttp
from tqdm import tqdm

from alpaca import UserError
from alpaca.common.files import replace_file
from alpaca.common.journal import Journal
from alpaca.common.text import counted, in_brackets, printable, shorten
from alpaca.endpoint.budget import in_words
from alpaca.endpoint.client import Completion
from alpaca.endpoint.run import Run
from alpaca.endpoint.transport import Lost

MOST_REQUESTS, MOST_BYTES = 50_000, 190_000_000  # of a file; OpenAI takes 200 MB
ENOUGH = 8  # replies, to estimate how many tokens the others will have
MOST_FAULTS = 3  # times that a request may expire or meet a transient fault before it has failed
POLL = 1.0, 60.0  # seconds between two polls of a batch: a tenth of the wait so far, within these
MOST_TRIES = 20  # in about half a minute, until a batch exists; after that any fault is waited out
QUEUE_FULL = re.compile(r"token_limit_exceeded|queued[ _]token", re.I)  # a smaller batch may fit


def open_batch(journal: Journal) -> dict:
    """Return "file", "requests" and, once created, "id" of the batch that a journal waits for; {} without one."""
    batch: dict = {}
    for entry in journal.entries:
        if "batch" in entry:
            batch = {} if "done" in entry["batch"] else batch | entry["batch"]
    return batch


def refuse_open_batch(journal: Journal) -> None:
    """Raise UserError if a batch is open: its requests must not be sent a second time."""
    if batch := open_batch(journal):
        name = batch.get("id", batch["file"])
        raise UserError(f"batch {name} is still open: continue with batch, or end it with batch_cancel")


@dataclass
class Batches(Run):
    """Send requests in batches, one at a time: ``want`` fills them. A time limit ends the waiting, not the batch."""

    def __post_init__(self):
        super().__post_init__()
        self.settings = self.budget.settings
        # Another run's results have the same numbers: the journal's first entry identifies the run.
        self.token = hashlib.sha256(json.dumps(self.journal.entries[0], sort_keys=True).encode()).hexdigest()[:8]
        self.open, self.most = open_batch(self.journal), MOST_REQUESTS
        # For each request: "times" it was sent, "tries" without a good reply, transient "faults", and all tokens.
        self.asked: dict[int, Counter] = defaultdict(Counter)

    async def run(self) -> str | None:
        """Return why there is more to send, or None if all is done.

        Raises:
            UserError: the server refused a call or the batch, or it was cancelled. What it answered is journaled.
        """
        for entry in self.journal.entries:
            if "asked" in (batch := entry.get("batch", {})):
                self.asked |= {int(number): Counter(state) for number, state in batch["asked"].items()}
                self.teacher.settings.learned = batch["learned"]
        try:
            self.replay()
            self.hand_on({})
            if self.settings.offline:
                return self._use_files()
            if (cancel := self.settings.batch_cancel) and not self.open:
                raise UserError(f"{self.journal.path} has no open batch: drop batch_cancel")
            lines: dict[int, bytes] = {}
            while self.open or (lines := self._next_round()):
                if (became := await self._round(lines)) is None:
                    return f"{self.budget.exhausted()} ended the waiting"
                if cancel:
                    return became
                print(printable(became))
            return None
        finally:
            await self.teacher.close()
            if self.open:
                name = self.open.get("id", self.open["file"])
                print(f"batch {name} continues on the server; the same command finds it", file=sys.stderr)

    def _use_files(self) -> str | None:
        refuse_open_batch(self.journal)
        source, target = self.settings.batch_read, self.settings.batch_write
        if source:
            print(f"{source}: {self._take(source, Path(source).read_bytes())}")
        lines = self._next_round()
        if not (lines and target):
            return f"{counted(len(lines), 'request')} left: write them to a file with batch_write" if lines else None
        with replace_file(target, "wb") as file:
            file.writelines(lines.values())
        return f"{target} has {counted(len(lines), 'request')}: have them answered, then use batch_read"

    def _next_round(self) -> dict[int, bytes]:
        """Return the lines of a file, by the numbers of their requests."""
        lines, size, number, budget = {}, 0, self.handed_on, self.budget
        while len(lines) < self.most and self.want(number, number - self.handed_on):
            if number not in self.known:
                line = {"custom_id": f"{self.token}-{number}-{self.asked[number]['times']}", "method": "POST"}
                line |= {"url": "/v1" + self.teacher.path, "body": self._question(number)[1]}
                data = json.dumps(line).encode() + b"\n"
                size, count = size + len(data), len(lines) + 1
                tokens = size / 4, count * self.teacher.decoding.max_tokens  # at worst
                if budget.replies >= ENOUGH:
                    tokens = [count / budget.replies * n for n in (budget.prompt_tokens, budget.completion_tokens)]
                if lines and (size > MOST_BYTES or budget.exhausted(*tokens)):
                    break
                lines[number] = data
            number += 1
        return lines

    def _question(self, number: int) -> tuple[str, dict]:
        """Return a request's prompt and JSON body for this try."""
        prompt, seed = self.teacher.variant(*self.request(number), self.asked[number]["tries"])
        return prompt, self.teacher.body(prompt, seed)

    async def _submit(self, lines: dict[int, bytes]) -> None:
        """Upload a file, unless one is open, and create its batch, unless there is one that was not journaled."""
        try:
            if not self.open:
                form, file = aiohttp.FormData({"purpose": "batch"}), BytesIO(b"".join(lines.values()))
                form.add_field("file", file, filename=f"alpaca-{self.token}.jsonl", content_type="application/jsonl")
                uploaded = await self._call("POST", "/files", "id", data=form)
                self._note({"file": uploaded["id"], "requests": [*lines]})
            order = {"input_file_id": self.open["file"], "endpoint": "/v1" + self.teacher.path}
            order["completion_window"] = "24h"
            batch = await self._find() or await self._call("POST", "/batches", "id", json=order)
        except UserError as e:
            self._note({"done": None})  # the same command begins with another file
            raise UserError(f"{e}: if the server has no Batch API, use batch_write") from None
        self._note({"id": batch["id"]})

    async def _find(self) -> dict | None:
        """Return the batch of the open file, if the server has one and can list its batches."""
        page, after = {"data": [None], "has_more": True}, ""
        with suppress(UserError):
            while page["data"] and page.get("has_more"):
                page = await self._call("GET", f"/batches?limit=100{after}", "data")
                for batch in page["data"]:
                    if batch.get("input_file_id") == self.open["file"]:
                        return batch
                    after = f"&after={batch['id']}"
        return None

    async def _round(self, lines: dict[int, bytes]) -> str | None:
        """Finish a round; return what became of its batch, or None when the time limit has passed."""
        began, faults, limit = time.monotonic(), 0, self.settings.time_limit
        total, form = len(lines or self.open["requests"]), "{desc}: {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        with tqdm(total=total, desc="batch", bar_format=form) as bar:
            while True:
                try:  # each step begins where the journal says, and so can be repeated
                    if "id" not in self.open:
                        await self._submit(lines)
                    where = f"/batches/{self.open['id']}"
                    bar.set_description_str(f"batch {shorten(self.open['id'], 16)}", refresh=False)  # OpenAI's have 38
                    batch = await self._call("GET", where, "status")
                    state, counts = batch["status"].lower(), batch.get("request_counts") or {}
                    bar.n = (counts.get("completed") or 0) + (counts.get("failed") or 0)
                    if state in ("completed", "expired", "failed", "cancelled"):
                        return await self._finish(batch)
                    if self.settings.batch_cancel and state != "cancelling":
                        with suppress(UserError):  # it may just have ended: the next look says
                            await self._call("POST", where + "/cancel", "id")
                except Lost as e:
                    state, faults = str(e), faults + 1
                    if faults == MOST_TRIES and "id" not in self.open:
                        raise UserError(f"{self.teacher.where}: {e}") from None
                except UserError as e:
                    if self.settings.batch_cancel and self.open and "HTTP 404" in str(e):  # the run must not be stuck
                        self._note({"done": None})
                        raise UserError(f"{e}: the batch is gone; run without batch_cancel to send it again") from None
                    raise
                if limit is not None and self.budget.seconds() > limit:
                    return None
                pause = min(POLL[1], max(POLL[0], (time.monotonic() - began) / 10))
                then = time.strftime("%H:%M:%S", time.localtime(time.time() + pause))
                bar.set_postfix_str(f"{state}, next check at {then}")
                await asyncio.sleep(pause)

    async def _finish(self, batch: dict) -> str:
        """Read the results of a finished batch; return what became of it."""
        status, name, numbers = batch["status"].lower(), f"batch {self.open['id']}", self.open["requests"]
        cancel, files = self.settings.batch_cancel, [batch.get("output_file_id"), batch.get("error_file_id")]
        data = b"\n".join([await self._call("GET", f"/files/{file}/content") for file in files if file])
        # What a cancelled or failed batch does not mention was not tried.
        missing = numbers if status in ("completed", "expired") and not cancel else []
        became = f"{name} {status}: {self._take(name, data, missing)}"
        if status == "failed":
            errors = json.dumps(batch.get("errors"))
            became = f"the server refused {name}: {self.teacher.words(errors.encode()) or 'no reason given'}"
            if len(numbers) == 1 or not QUEUE_FULL.search(errors):
                raise UserError(became)
            self.most = len(numbers) // 2
            return f"{became}; the next one has {counted(self.most, 'request')}"
        if status == "cancelled" and not cancel:
            raise UserError(f"{became}: run the same command for the rest")
        return f"{became}; tokens {self.budget.used()}"

    def _take(self, where: str, data: bytes, missing: list[int] | None = None) -> str:
        """Journal the results in the lines of a file or batch, count them, hand them on, and say how many there were.

        A line may be incomplete, repeated, or another run's. The requests in ``missing`` should have one.
        UserError if all are another run's, or one says that retrying is useless (key, credit).
        """
        found, foreign = {}, 0
        for line in data.splitlines():
            try:
                row = json.loads(line)
                token, number, times = row["custom_id"].split("-")
                key, response = (int(number), int(times)), row.get("response") or {}
                status = int(response.get("status_code") or 0)
                text = json.dumps(response.get("body") or {"error": row.get("error")}).encode()
            except Exception:
                token = None
            if token != self.token:
                foreign += 1
            elif status or b"batch_cancelled" not in text:  # those were not tried
                found.setdefault(key, (status, text))
        if foreign and not found and missing != []:  # a proxy's page, or a file of another run
            raise UserError(f"{where} has no results of this run: read the file that answers its requests")
        found = {(number, self.asked[number]["times"]): (0, b"no result") for number in missing or ()} | found
        due = {n: found[n, times] for n, times in found if n not in self.known and times == self.asked[n]["times"]}
        sent = {number: self._question(number) for number in due}  # before read() learns what the server refuses
        replies, again, end = {}, Counter(), None
        # Those that succeeded first: where others did, a refusal is of one request, and not of the model.
        for number, (status, text) in sorted(due.items(), key=lambda item: (item[1][0] != 200, item[0])):
            asked, reply, follows = self.asked[number], Completion(None, error=self.teacher.words(text)), "retry"
            try:
                if status:
                    reply, follows = self.teacher.read(*sent[number], status, text)
            except UserError as e:
                end = e
                continue
            settled = self.teacher.settle(reply, asked["tries"]) if follows == "done" else None
            asked.update(times=1, tries=follows == "done", faults=follows in ("retry", "throttled"))
            asked.update(prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens)
            if settled or asked["faults"] == MOST_FAULTS:
                total = {key: asked.pop(key) for key in ("prompt_tokens", "completion_tokens")}
                replies[number] = replace(settled or reply, price=self.settings.price, **total)
                self.asked[number] = Counter(times=asked["times"])
            else:
                again[reply.error] += 1
        over = {"done": where, "asked": {n: self.asked[n] for n in due}, "learned": self.teacher.settings.learned}
        self._note(over, replies)
        for reply in replies.values():
            self.budget.arrived(reply, True)
        self.hand_on(replies)
        if end:
            raise end
        notes = [(again.total(), f"to retry: {in_words(again)}"), (len(found) - len(due), "read before")]
        return counted(len(replies), "result") + in_brackets([*notes, (foreign, "not from this run")])

    def _note(self, batch: dict, replies: dict[int, Completion] | None = None) -> None:
        self.write(replies or {}, {"batch": batch})
        self.open = open_batch(self.journal)

    async def _call(self, method: str, path: str, key: str = "", **payload):
        """Return the server's answer: bytes, or an object with ``key``. UserError: refused. Lost: may be transient."""
        status, _, data = await self.teacher.http(method, path, **payload)
        what = f"{method} {path.partition('?')[0]}"
        if status // 100 != 2:
            passing = status in (408, 429) or status >= 500 and status != 501
            raise (Lost if passing else UserError)(f"{what}: HTTP {status}: {self.teacher.words(data)}")
        try:
            return {**answer, key: answer[key]} if key and (answer := json.loads(data)) else data
        except (ValueError, TypeError, LookupError, RecursionError):
            raise Lost(f"{what}: not a Batch API answer") from None  # a proxy's page
