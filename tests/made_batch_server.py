"""A server with files and batches, as OpenAI's and its imitators are, on 127.0.0.1."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class BatchServer:
    """Answers the lines of each uploaded file once a batch of it has been looked at ``looks`` times.

    Args:
        answer: a request's JSON → its text, (status, JSON), or ... for a line that is left out.
        looks: at a batch, until it is over.
        ends: status in which the batches end, one after the other, and then "completed". "expired" and "cancelled"
            leave every other line without an answer, "failed" all of them.
        after: called with the name of each step ("upload", "create", "list", "poll", "content", "cancel") once its
            work is done, before it is answered. It may return "drop", for a closed connection, or a status and JSON.
        lists: whether it lists its batches, two on a page.

    Attributes:
        answered: how often each line (by its custom_id) was answered, and so paid for.
        lines: all lines that were uploaded, in batches, in order.
    """

    def __init__(self, answer, looks=1, ends=(), after=lambda step: None, lists=True):
        self.answer, self.looks, self.ends, self.after, self.lists = answer, looks, list(ends), after, lists
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}
        self.answered: Counter[str] = Counter()
        self.lines: list[list[dict]] = []
        self.steps: list[str] = []
        self.lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

            def log_message(self, *_):
                pass

            def do_GET(self):
                path = self.path.partition("?")[0].removeprefix("/v1").split("/")[1:]
                with server.lock:
                    if path == ["batches"]:
                        self.reply("list", *server.page(self.path))
                    elif path[0] == "batches":
                        self.reply("poll", *server.look(path[1]))
                    else:
                        self.reply("content", 200, server.files[path[1]])

            def do_POST(self):
                path = self.path.partition("?")[0].removeprefix("/v1").split("/")[1:]
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    while size := int(self.rfile.readline(), 16):
                        data += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                with server.lock:
                    if path == ["files"]:
                        self.reply("upload", 200, server.upload(self.headers["Content-Type"], data))
                    elif path == ["batches"]:
                        self.reply("create", 200, server.create(json.loads(data)))
                    else:
                        self.reply("cancel", *server.cancel(path[1]))

            def reply(self, step, status, data):
                server.steps.append(step)
                if instead := server.after(step):
                    if instead == "drop":
                        self.close_connection = True
                        self.connection.close()
                        return
                    status, data = instead
                data = data if isinstance(data, bytes) else json.dumps(data).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a client that was killed
        self.base_url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def store(self, data: bytes) -> str:
        name = f"file-{len(self.files)}"
        self.files[name] = data
        return name

    def upload(self, kind: str, data: bytes) -> dict:
        form = BytesParser().parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + data)
        parts = {part.get_param("name", header="Content-Disposition"): part for part in form.get_payload()}
        assert parts["purpose"].get_payload() == "batch" and parts["file"].get_filename()
        return {"id": self.store(parts["file"].get_payload(decode=True)), "object": "file", "purpose": "batch"}

    def create(self, order: dict) -> dict:
        lines = [json.loads(line) for line in self.files[order["input_file_id"]].splitlines()]
        assert order["completion_window"] == "24h" and {line["url"] for line in lines} == {order["endpoint"]}
        assert len({line["custom_id"] for line in lines}) == len(lines)
        self.lines.append(lines)
        batch = {"id": f"batch-{len(self.batches)}", "status": "validating", "looks": 0, "lines": lines}
        batch |= {"input_file_id": order["input_file_id"], "request_counts": {"total": len(lines)}}
        self.batches[batch["id"]] = batch
        return batch

    def page(self, path: str) -> tuple[int, dict]:
        if not self.lists:
            return 404, {"error": {"message": "no listing here"}}
        newest = list(self.batches.values())[::-1]
        after = parse_qs(urlsplit(path).query).get("after", [""])[0]
        start = next((place for place, batch in enumerate(newest, 1) if batch["id"] == after), 0)
        return 200, {"data": newest[start : start + 2], "has_more": len(newest) > start + 2}

    def look(self, name: str) -> tuple[int, dict]:
        if name not in self.batches:
            return 404, {"error": {"message": f"no batch {name}"}}
        batch = self.batches[name]
        batch["looks"] += 1
        if batch["status"] in ("validating", "in_progress", "cancelling"):
            ended = "cancelled" if batch["status"] == "cancelling" else "in_progress"
            batch["status"] = ended
            if batch["looks"] >= self.looks or ended == "cancelled":
                batch["status"] = ended if ended == "cancelled" else self.ends.pop(0) if self.ends else "completed"
                self.finish(batch)
        return 200, {key: value for key, value in batch.items() if key != "lines"}

    def bill(self) -> Counter[str]:
        """Let all batches end, those too that nobody waits for, and return ``answered``."""
        with self.lock:
            for name, batch in self.batches.items():
                while batch["status"] in ("validating", "in_progress", "cancelling"):
                    self.look(name)
        return self.answered

    def cancel(self, name: str) -> tuple[int, dict]:
        if name not in self.batches:
            return 404, {"error": {"message": f"no batch {name}"}}
        if self.batches[name]["status"] not in ("validating", "in_progress"):
            return 409, {"error": {"message": "it is over"}}
        self.batches[name]["status"] = "cancelling"
        return 200, self.batches[name]

    def finish(self, batch: dict) -> None:
        """Write the two files: lines in random order, a line of another run, a line twice."""
        if batch["status"] == "failed":
            batch["errors"] = {"data": [{"message": "line 1: no such model", "code": "model_not_found", "line": 1}]}
            return
        good, bad = [], []
        for place, line in enumerate(batch["lines"]):
            if batch["status"] in ("expired", "cancelled") and place % 2:
                error = {"code": f"batch_{batch['status']}", "message": f"the batch {batch['status']}"}
                bad.append({"custom_id": line["custom_id"], "response": None, "error": error})
                continue
            self.answered[line["custom_id"].partition("-")[2]] += 1  # without what tells one run from another
            if (answer := self.answer(line["body"])) is ...:
                continue
            status, body = answer if isinstance(answer, tuple) else (200, said(answer))
            row = {"custom_id": line["custom_id"], "response": {"status_code": status, "body": body}, "error": None}
            (good if status == 200 else bad).append(row)
        batch["request_counts"] |= {"completed": len(good), "failed": len(bad)}
        for key, rows in (("output_file_id", good), ("error_file_id", bad)):
            if rows:
                random.Random(len(rows)).shuffle(rows)
                rows += [rows[0], rows[0] | {"custom_id": "00000000-0-0"}]
                batch[key] = self.store(b"".join(json.dumps(row).encode() + b"\n" for row in rows) + b"half a li")


def said(text: str | None) -> dict:
    """A reply's JSON, with 7 + 5 tokens."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return {"model": "m", "choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}
