"""An append-only log that survives ``kill -9``: what was appended is there again, whole, or it is not there.

A line is eight hexadecimal digits of CRC-32, a space, and one JSON object. A line is on disk (fsync) before append()
returns. A process that dies while writing leaves at most a torn last batch; the next one to open the log cuts it off.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

from alpaca import UserError


class Journal:
    """The entries of a log, and the only right to add to it.

    Args:
        path: the file; made when it is not there.

    Raises:
        UserError: another process has it open, or a line that is not the last is damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._failure: BaseException | None = None
        self.repaired_bytes = 0  # what a torn end was, if there was one
        created = not self.path.exists()
        self._file = open(self.path, "a+b")
        try:
            _lock(self._file, self.path)
            self.entries = self._read()
        except BaseException:
            self._file.close()
            raise
        if created:
            _sync_folder(self.path.parent)

    def begin(self, run: dict) -> None:
        """Writes down what a run depends on, or checks that this log was begun for the same.

        Raises:
            UserError: it was begun for another run; the message names what differs.
        """
        if not self.entries:
            self.append([{"run": run}])
        begun = self.entries[0].get("run", {})
        if different := sorted(key for key in run.keys() | begun.keys() if run.get(key) != begun.get(key)):
            raise UserError(
                f"{self.path} is of a run that differs in {', '.join(different)}: give the same again, or take another "
                "--output_path"
            )

    def append(self, entries: Iterable[dict]) -> None:
        """Adds entries and waits until they are on disk; one fsync for all of them.

        Raises:
            OSError: they could not be written; each later call raises the same.
        """
        entries = list(entries)
        if self._failure:  # whole lines behind half a line would be taken for damage
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
        self._file.close()  # and with it goes the lock

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
                # A torn batch has no whole line after the tear; anything else is damage, which must not be hidden.
                if any(_decode(later + b"\n") is not None for later in rest.split(b"\n")):
                    raise UserError(f"{self.path}, line {number}: damaged; take that line out to go on without it")
                self.repaired_bytes = len(line) + len(rest)
                self._file.truncate(good)
                os.fsync(self._file.fileno())
                break
            entries.append(entry)
            good += len(line)
        self._file.seek(0, os.SEEK_END)
        return entries


def check_output(path: str | os.PathLike) -> tuple[Path, Path]:
    """The file that a run makes and its journal, which is there as long as the run has something to go on with.

    Raises:
        UserError: the file is there already and no journal is, or there is no folder to write to.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():  # first: "." and "/" have no name to append to
        raise UserError(f"--output_path {path} must be a file in a folder that exists")
    journal = path.with_name(path.name + ".journal")
    if path.exists() and not journal.exists():
        raise UserError(f"--output_path {path} exists: move it away, or give another name")
    return path, journal


def _encode(entry: dict) -> bytes:
    text = json.dumps(entry, ensure_ascii=True, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _decode(line: bytes) -> dict | None:
    """The entry of a whole line with the right checksum, else None."""
    if len(line) < 11 or line[8:9] != b" " or not line.endswith(b"\n"):
        return None
    text = line[9:-1]
    if line[:8] != b"%08x" % zlib.crc32(text):
        return None
    return json.loads(text)


def _lock(file, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: nobody keeps a second process away there
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{path} is in use by another process: wait for it, or take another --output_dir (--output_path)"
        ) from None


def _sync_folder(folder: Path) -> None:
    """Puts the file's name on disk, not only its content."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
