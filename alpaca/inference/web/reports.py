"""Reports of harmful answers: lines of JSON on the machine that serves the live demo."""

from __future__ import annotations

import datetime
import logging
import os
import threading

from alpaca.common.records import json_text
from alpaca.inference.web.server import page_error, render_status

FLAGGED = "flagged.jsonl"
MAX_REASON_CHARS = 500
NOTE = f"A report adds question, answer and settings to {FLAGGED} on the server; nothing is sent elsewhere."
_flagging = threading.Lock()


def append_line(path: str | os.PathLike, record: dict) -> None:
    """Add a JSON line and wait until it is on disk. A line that a crash has torn spoils no other."""
    with _flagging, open(path, "a+b", opener=lambda *args: os.open(*args, 0o600)) as file:  # private: people typed it
        torn = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write(b"\n" * torn + json_text(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def flag(exchange: dict | None, which: int | None, reason: str | None) -> str:
    """Save a report of the answer of model ``which`` (its place); return what the page then shows."""
    which, reason = which or 0, reason or ""
    if not exchange or not exchange["answers"][which]:
        raise page_error("There is no answer to report yet.", "Not reported")
    if exchange["running"]:
        raise page_error("The answer is still being written: wait for its end, or stop it.", "Not reported")
    if len(reason) > MAX_REASON_CHARS:
        raise page_error(f"The reason may have {MAX_REASON_CHARS} characters.", "Not reported")
    if which in exchange["flagged"]:
        return render_status(f"This answer is already reported, in {FLAGGED}.")
    record = {name: exchange[name] for name in ("instruction", "input")}
    record |= {"turns": turns} if (turns := exchange["asked"][which][:-1]) else {}
    record |= {"answer": exchange["answers"][which], "model": exchange["models"][which]}
    record["model_path"] = exchange["paths"][which]  # two checkpoints may have the same name
    record |= {"settings": exchange["settings"], "reason": reason}
    record["time"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        append_line(FLAGGED, record)
    except OSError as e:
        logging.error("%s: %s", FLAGGED, e)
        raise page_error("It could not be saved; the terminal of the server says why.", "Not reported") from None
    exchange["flagged"].append(which)
    return render_status(f"Saved in {FLAGGED} on the machine that runs this page. Thank you.")
