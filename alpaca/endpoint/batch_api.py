"""Requests in batches: a file of them goes to the server, which answers within a day, mostly at half price.

A round: upload a file of requests → create a batch of it → wait → read the results; what has none is asked again in the
next round. What the server named is journaled before the next step, so that a run that was killed finds its batch and
pays for nothing twice. The journal's entries besides the replies (see parallel.py):

    {"batch": {"file": ID, "requests": [0, 1, …]}}   uploaded: from here on the batch is open
    {"batch": {"id": ID}}                            created
    {"batch": {"done": ID}}                          read, and on disk together with its replies
    {"again": 7, "times": 1, …}                      request 7 was asked once, in all, and must be asked again
    {"learned": {…}}                                 what the server refuses, for the next round

The same lines can be written to a file, and results read from one, for tools that work without a server.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path

from tqdm import tqdm

from alpaca import UserError
from alpaca.common.files import replace_file
from alpaca.common.journal import Journal
from alpaca.common.text import counted, in_brackets
from alpaca.endpoint.budget import RequestSettings
from alpaca.endpoint.client import Completion, Lost
from alpaca.endpoint.run import Run

MOST_REQUESTS, MOST_BYTES = 50_000, 190_000_000  # of a file; OpenAI takes 200 MB
ENOUGH = 8  # replies, to tell how many tokens the others will have
MOST_FAULTS = 3  # times that a request expires or meets a passing fault, until it has failed
POLL = 1.0, 60.0  # seconds between two looks at a batch: a tenth of the wait so far, within these
PAUSES = 1.0, 2.0, 4.0, 8.0  # seconds between the tries of each other call


@dataclass(frozen=True)
class BatchSettings:
    """Whether requests go in batches.

    Args:
        batch: send requests through the server's Batch API: within a day, mostly at half price. After Ctrl-C or a kill
            the same command finds its batch.
        batch_cancel: cancel this run's batch and keep the replies that it already has.
        batch_discount: the share of the price that a batch saves; 0.5 is half price.
        batch_write: write the requests to this file and stop; vllm run-batch and other tools answer them offline.
        batch_read: read replies to those requests from this file.

    Raises:
        UserError: a discount that is not a share.
    """

    batch: bool = False
    batch_cancel: bool = False
    batch_discount: float = 0.5
    batch_write: str | None = None
    batch_read: str | None = None

    def __post_init__(self):
        if not 0 <= self.batch_discount <= 1:
            raise UserError("batch_discount must be 0 to 1: 0.5 is half price")

    def __bool__(self):
        return bool(self.batch or self.batch_cancel or self.batch_write or self.batch_read)

    @property
    def price(self) -> float:
        """What the requests cost, relative to direct ones."""
        return 1 - self.batch_discount if self else 1.0

    def addressed(self, requests: RequestSettings) -> RequestSettings:
        """Return the settings with an address, which a teacher wants even if all goes through files."""
        offline = (self.batch_write or self.batch_read) and not requests.base_url
        return replace(requests, base_url="http://127.0.0.1/v1") if offline else requests


class Refused(UserError):
    """The server refuses a call for good."""


class Passing(UserError):
    """A call failed that may succeed later."""


def open_batch(journal: Journal) -> dict | None:
    """Return "file", "requests" and, once created, "id" of the batch that a journal waits for; None without one."""
    batch: dict = {}
    for entry in journal.entries:
        if "batch" in entry:
            batch = {} if "done" in entry["batch"] else batch | entry["batch"]
    return batch or None


def refuse_open_batch(journal: Journal) -> None:
    """Raise UserError if a batch is open: its requests must not be sent a second time."""
    if batch := open_batch(journal):
        raise UserError(f"{_name(batch)} is open: continue it in batch mode, or cancel it first")


@dataclass
class Batches(Run):
    """Ask in batches, one at a time. ``want`` fills a round; the budget's time limit ends the waiting, not the batch.

    Args:
        settings: what to do.
    """

    settings: BatchSettings = BatchSettings(batch=True)  # noqa: RUF009  never changed

    def __post_init__(self):
        # Another run's results have the same numbers: the journal's first entry says what a run is.
        self.token = hashlib.sha256(json.dumps(self.journal.entries[0], sort_keys=True).encode()).hexdigest()[:8]
        self.known: set[int] = set()  # requests that have a reply
        self.waiting: dict[int, Completion] = {}  # replies whose turn to be handed on has not come
        # Of each request: how many times it was asked (a part of its custom_id, so that an old result is recognized),
        # the tries that brought a reply that was not accepted, with their tokens, and the passing faults.
        self.asked: dict[int, Counter] = defaultdict(Counter)
        self.handed_on, self.open = 0, open_batch(self.journal)

    async def run(self) -> str | None:
        """Return why there is more to ask, or None if all is done.

        Raises:
            UserError: the server refused a call or the batch, or somebody cancelled it. What it answered is journaled.
        """
        try:
            self._replay()
            return await self._run()
        except asyncio.CancelledError:
            if self.open:
                print(f"\n{_name(self.open)} goes on at the server; the same command finds it", file=sys.stderr)
            raise
        finally:
            await self.teacher.close()

    async def _run(self) -> str | None:
        source, target, cancel = self.settings.batch_read, self.settings.batch_write, self.settings.batch_cancel
        if cancel and not self.open:
            raise UserError(f"{self.journal.path} has no open batch: there is nothing to cancel")
        if source or target:
            refuse_open_batch(self.journal)
        if source:
            print(f"{source}: {self._take(source, Path(source).read_bytes().splitlines())}")
        while self.open or (lines := self._next_round()):
            if target:
                with replace_file(target, "wb") as file:
                    file.writelines(lines.values())
                return f"{target} holds {counted(len(lines), 'request')}: have them answered, then read the replies"
            if source:
                return f"{counted(len(lines), 'more request')} to be answered: write them to a file"
            if not self.open:
                await self._upload(lines)
            if "id" not in self.open:
                await self._create()
            if cancel:
                await self._cancel()
            if (batch := await self._wait()) is None:
                return f"{self.budget.exhausted()} ended the waiting: {_name(self.open)} goes on"
            became = await self._finish(batch)
            if cancel:
                return became
        return None

    def _replay(self) -> None:
        """Take over what the journal holds."""
        for entry in self.journal.entries:
            if "again" in entry:
                self.asked[entry["again"]] = Counter({key: entry[key] for key in entry if key != "again"})
            elif "i" in entry:
                self.asked[entry["i"]] = Counter(times=self.asked[entry["i"]]["times"] + 1)
            elif "learned" in entry:
                self.teacher.settings.remember(entry["learned"])
        self._add(self.replay())

    def _add(self, replies: dict[int, Completion]) -> None:
        self.known.update(replies)
        self.waiting.update(replies)
        self.handed_on = self.hand_on(self.handed_on, self.waiting)

    def _question(self, number: int) -> tuple[str, dict]:
        """Return a request's prompt and its JSON, as they are sent this time."""
        prompt, seed = self.teacher.variant(*self.request(number), self.asked[number]["tries"])
        return prompt, self.teacher.body(prompt, seed)

    def _next_round(self) -> dict[int, bytes]:
        """Return the lines of a file, by the numbers of their requests."""
        lines, size, number, tokens = {}, 0, self.handed_on, [0.0, 0.0]
        while len(lines) < MOST_REQUESTS and self.want(number, number - self.handed_on):
            if number not in self.known:
                line = {"custom_id": f"{self.token}-{number}-{self.asked[number]['times']}", "method": "POST"}
                line |= {"url": "/v1" + self.teacher.path, "body": self._question(number)[1]}
                data = json.dumps(line).encode() + b"\n"
                size += len(data)
                each = len(data) / 4, self.teacher.decoding.max_tokens  # at worst
                if (replies := self.budget.replies) >= ENOUGH:
                    each = self.budget.prompt_tokens / replies, self.budget.completion_tokens / replies
                tokens = [used + more for used, more in zip(tokens, each, strict=True)]
                if lines and (size > MOST_BYTES or self.budget.exhausted(*tokens)):
                    break
                lines[number] = data
            number += 1
        return lines

    async def _upload(self, lines: dict[int, bytes]) -> None:
        data = b"".join(lines.values())

        def form():  # one can be sent only once
            import aiohttp

            fields, name = aiohttp.FormData({"purpose": "batch"}), f"alpaca-{self.token}.jsonl"
            fields.add_field("file", BytesIO(data), filename=name, content_type="application/jsonl")
            return fields

        try:
            file = await self._call("POST", "/files", "id", form=form)
        except Refused as e:
            raise UserError(f"{e}; for a server without a Batch API, write the requests to a file") from None
        self._note({"file": file["id"], "requests": list(lines)})

    async def _create(self) -> None:
        """Create the batch, unless there is one of that file: an earlier try may have been heard but not answered."""
        order = {"input_file_id": self.open["file"], "endpoint": "/v1" + self.teacher.path, "completion_window": "24h"}
        for pause in (*PAUSES, None):
            try:
                batch = await self._find() or await self._call("POST", "/batches", "id", (), json=order)
                break
            except Refused:
                self._note({"done": None})  # the same command begins with another file
                raise
            except Passing:
                if pause is None:
                    raise
                await asyncio.sleep(pause)
        self._note({"id": batch["id"]})
        print(f"{_name(self.open)} holds {counted(len(self.open['requests']), 'request')}")

    async def _find(self) -> dict | None:
        """Return the batch of the open file; None if there is none, or the server does not list its batches."""
        after = ""
        while True:
            try:
                page = await self._call("GET", f"/batches?limit=100{after}", "data")
            except Refused:
                return None
            for batch in page["data"]:
                if batch.get("input_file_id") == self.open["file"]:
                    return batch
            if not page["data"] or not page.get("has_more"):
                return None
            after = f"&after={page['data'][-1]['id']}"

    async def _wait(self) -> dict | None:
        """Return the open batch once it is over, or None when the time limit has passed."""
        began, limit, batch, fault = time.monotonic(), self.budget.settings.time_limit, {}, ""
        with tqdm(total=len(self.open["requests"]), unit="request", desc=_name(self.open)) as bar:
            while True:
                try:
                    batch, fault = await self._call("GET", f"/batches/{self.open['id']}", "status", ()), ""
                except Passing as e:
                    fault = f" ({e})"
                counts, status = batch.get("request_counts") or {}, batch.get("status", "")
                bar.n = (counts.get("completed") or 0) + (counts.get("failed") or 0)
                if status.lower() in ("completed", "expired", "failed", "cancelled"):
                    return batch
                left = float("inf") if limit is None else limit - self.budget.seconds()
                if left < 0:
                    return None
                pause = min(POLL[1], max(POLL[0], (time.monotonic() - began) / 10), left + 0.01)
                then = time.strftime("%H:%M:%S", time.localtime(time.time() + pause))
                bar.set_postfix_str(f"{status}, next look at {then}{fault}")
                await asyncio.sleep(pause)

    async def _cancel(self) -> None:
        try:
            await self._call("POST", f"/batches/{self.open['id']}/cancel", "id")
        except Refused as e:
            if "HTTP 404" in str(e):  # deleted, or of another account: the run must be able to continue without it
                self._note({"done": self.open["id"]})
                raise UserError(f"{e}; it is forgotten, and the next command asks again") from None
            print(e, file=sys.stderr)  # it is over

    async def _finish(self, batch: dict) -> str:
        """Take the results of a batch that is over; return what became of it."""
        status, name, lines = batch["status"].lower(), _name(self.open), []
        for key in ("output_file_id", "error_file_id"):
            if batch.get(key):
                lines += (await self._call("GET", f"/files/{batch[key]}/content")).splitlines()
        # What a cancelled or failed batch does not mention was not tried.
        tried = status in ("completed", "expired") and not self.settings.batch_cancel
        missing = self.open["requests"] if tried else ()
        became = f"{name} {status}: {self._take(name, lines, missing, [{'batch': {'done': self.open['id']}}])}"
        if status == "failed":
            errors = (batch.get("errors") or {}).get("data") or []
            words = "; ".join(dict.fromkeys(str(error.get("message")) for error in errors[:3])) or "no reason given"
            raise UserError(f"the server refused {name}: {self.teacher.words(words.encode())}")
        if status == "cancelled" and not self.settings.batch_cancel:
            raise UserError(f"{became}; they are kept, and the same command asks for the rest")
        if not self.settings.batch_cancel:
            print(f"{became}; tokens {self.budget.used()}")
        return became

    def _take(self, where: str, lines: Iterable[bytes], missing: Iterable[int] = (), done: Iterable[dict] = ()) -> str:
        """Journal the results in the lines of ``where``, count them, hand them on, and say how many there were.

        ``missing`` are the requests that should have one. The entries of ``done`` are journaled with the results.

        Raises:
            UserError: there is none of this run, or one says that no more can be had (key, credit).
        """
        results: dict[int, tuple[int | None, bytes]] = {}
        foreign, old = 0, set()
        for line in lines:
            try:
                row = json.loads(line)
                token, *numbers = re.fullmatch(r"(\w+)-(\d{1,9})-(\d{1,9})", row["custom_id"]).groups()
                response, error = row.get("response") or {}, row.get("error")
                status, body = response.get("status_code"), response.get("body")
            except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
                token = None
            if token != self.token:
                foreign += 1
                continue
            number, times = map(int, numbers)
            if number in self.known or self.asked[number]["times"] != times:
                old.add(number)
            elif isinstance(error, dict) and error.get("code") == "batch_cancelled":
                pass  # it was not tried
            elif number not in results:
                if body is None:  # vLLM has it as the error
                    body = error if isinstance(error, dict) and "error" in error else {"error": error}
                results[number] = status, json.dumps(body).encode()
        if foreign and not (results or old) and (missing or not done):  # a proxy's page, or a file of another run
            raise UserError(f"{where} has no result of this run")
        for number in missing:
            if number not in self.known and number not in old:
                results.setdefault(number, (None, b"no result"))
        replies, again, end = self._read(results)
        learned = [{"learned": self.teacher.settings.learned()}]
        new = ({"i": number, **asdict(reply)} for number, reply in replies.items())
        self.journal.append([*new, *again, *done, *learned])
        self.open = open_batch(self.journal)
        for reply in replies.values():
            self.budget.arrived(reply, True)
        self._add(replies)
        if end:
            raise end
        notes = (len(again), "to ask again"), (len(old), "read before"), (foreign, "lines not of this run")
        return counted(len(replies), "result") + in_brackets(notes)

    def _read(self, results: dict) -> tuple[dict[int, Completion], list[dict], UserError | None]:
        """Return the replies by number, the entries of what must be asked again, and why no more can be had."""
        sent = {number: self._question(number) for number in results}  # before read() learns what the server refuses
        replies, again, end = {}, [], None
        # Those that succeeded first: where others did, a refusal is of one request, and not of the model.
        for number, (status, data) in sorted(results.items(), key=lambda result: result[1][0] != 200):
            state, settled = self.asked[number], None
            try:
                if status is None:
                    reply, outcome = Completion(None, error=self.teacher.words(data)), "retry"
                else:
                    reply, outcome = self.teacher.read(*sent[number], status, data)
            except UserError as e:
                end = e
                continue
            if outcome == "done":
                settled = self.teacher.settle(reply, state["tries"])
            # Counter.update() adds.
            tokens = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
            state.update(tokens, times=1, tries=outcome == "done", faults=outcome in ("retry", "throttled"))
            if settled or state["faults"] == MOST_FAULTS:
                total = {key: state[key] for key in tokens}
                replies[number] = replace(settled or reply, price=self.settings.price, **total)
            else:
                again.append({"again": number, **state})
        return dict(sorted(replies.items())), again, end

    def _note(self, what: dict) -> None:
        self.journal.append([{"batch": what}])
        self.open = open_batch(self.journal)

    async def _call(self, method: str, path: str, key: str = "", pauses: Iterable[float] | None = None, **payload):
        """Return what the server answers, after a few tries: bytes, or a JSON object that has ``key``.

        ``pauses`` are the seconds between the tries. ``payload`` is ``json``, or ``form``, which makes a form.

        Raises:
            Refused: the server's words.
            Passing: what went wrong the last time.
        """
        form, what = payload.pop("form", None), f"{method} {path.partition('?')[0]}"
        for pause in (*(PAUSES if pauses is None else pauses), None):
            try:
                status, _, data = await self.teacher.http(method, path, data=form and form(), **payload)
                if status // 100 == 2 and not key:
                    return data
                if status // 100 == 2 and key in (found := json.loads(data)):
                    return found
                fault = f"{what}: HTTP {status}: {self.teacher.words(data)}"
                if status // 100 == 4 and status not in (408, 429) or status == 501:
                    raise Refused(fault)
            except Lost as e:
                fault = f"{what}: {e}"
            except (ValueError, TypeError, RecursionError):  # a proxy's page
                fault = f"{what}: an answer that is not JSON"
            if pause is not None:
                await asyncio.sleep(pause)
        raise Passing(fault)


def _name(batch: dict) -> str:
    return f"batch {batch['id']}" if "id" in batch else f"the batch of file {batch['file']}"
