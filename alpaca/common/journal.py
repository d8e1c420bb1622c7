"""An append-only log that survives ``kill -9``: each entry is complete or absent.

A line is eight hexadecimal digits of CRC-32, a space, and one JSON object. A line is on disk (fsync) before append()
returns. A process that dies while writing leaves at most an incomplete last batch, which is removed at the next open.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

from alpaca import UserError
from alpaca.common.files import fsync, try_lock


class Journal:
    """The entries of a log, locked for appending.

    Args:
        path: the file; created if it does not exist.

    Raises:
        UserError: another process has it open, or a line before the last is damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._failure: BaseException | None = None
        self.repaired_bytes = 0  # of an incomplete end that was removed
        created = not self.path.exists()
        self._file = open(self.path, "a+b")
        try:
            if not try_lock(self._file.fileno()):
                raise UserError(f"{self.path} is in use by another process: wait for it, or choose another output path")
            self.entries = self._read()
        except BaseException:
            self._file.close()
            raise
        if created:
            fsync(self.path.parent)  # the file's name must be on disk too

    def begin(self, run: dict) -> None:
        """Record what a run depends on, or check that this log was started with the same.

        Raises:
            UserError: it was started by another run; the message names what differs.
        """
        if not self.entries:
            self.append([{"run": run}])
        begun = self.entries[0].get("run", {})
        if different := sorted(key for key in run.keys() | begun.keys() if run.get(key) != begun.get(key)):
            what = f"{self.path} is from a run that differs in {', '.join(different)}"
            raise UserError(f"{what}: use the same again, or choose another output path")

    def append(self, entries: Iterable[dict]) -> None:
        """Add entries and wait until they are on disk; one fsync for all of them.

        Raises:
            OSError: they could not be written; each later call raises the same.
        """
        entries = list(entries)
        if self._failure:  # complete lines after half a line would be read as damage
            raise self._failure
        try:
            self._file.write(b"".join(map(_encode, entries)))
            self._file.flush()
            os.fsync(self._file.fileno())
        except BaseException as e:
            self._failure = e
            raise
        self.entries += entries

    def close(self) -> None:
        """Close the file, and so release its lock."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _read(self) -> list[dict]:
        self._file.seek(0)
        entries, good = [], 0
        for number, line in enumerate(self._file, 1):
            entry = _decode(line)
            if entry is None:
                rest = self._file.read()
                # After an interrupted write no complete line follows; anything else is damage, and must not be hidden.
                if any(_decode(later + b"\n") is not None for later in rest.split(b"\n")):
                    raise UserError(f"{self.path}, line {number} is damaged: remove that line to continue without it")
                self.repaired_bytes = len(line) + len(rest)
                self._file.truncate(good)
                os.fsync(self._file.fileno())
                break
            entries.append(entry)
            good += len(line)
        self._file.seek(0, os.SEEK_END)
        return entries


def check_output(path: str | os.PathLike) -> tuple[Path, Path]:
    """Return a run's output file and its journal, which exists as long as the run can be continued.

    Raises:
        UserError: the file exists and no journal does, or its folder does not exist.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():  # first: "." and "/" have no name to append to
        raise UserError(f"output_path {path} must be a file in an existing folder")
    journal = path.with_name(path.name + ".journal")
    if path.exists() and not journal.exists():
        raise UserError(f"output_path {path} already exists: remove it, or choose another name")
    return path, journal


def _encode(entry: dict) -> bytes:
    text = json.dumps(entry, ensure_ascii=True, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _decode(line: bytes) -> dict | None:
    """Return the entry of a complete line with the right checksum, else None."""
    checksum, space, text = line[:8], line[8:9], line[9:-1]
    if not line.endswith(b"\n") or space != b" " or checksum != b"%08x" % zlib.crc32(text):
        return None
    return json.loads(text)
