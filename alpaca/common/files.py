"""Files and folders that are complete or absent, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import os
import re
import shutil
import socket
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from alpaca import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

UNFINISHED = ".unfinished"


@contextlib.contextmanager
def open_bytes(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a file, decompressed if it is gzip; UserError if it is missing, unreadable, or plainly not the data."""
    try:
        with open(path, "rb") as raw:
            file = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            if fault := _wrong_file(file.peek(512)[:512]):
                raise UserError(f"{path} is {fault}")
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path") from None
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path} cannot be read: {getattr(e, 'strerror', None) or e}") from None


def _wrong_file(head: bytes) -> str:
    """Return what a file really is, by its first bytes, if it is often mistaken for data, else ""."""
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: run git lfs pull"
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html|head|\?xml)\b", head, re.IGNORECASE):
        return "a web page (HTML), not data: download the file itself"
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head[:2]:
        return "UTF-16 or binary: convert it to UTF-8"
    return ""


@contextlib.contextmanager
def open_text(path: str | os.PathLike, newline: str | None = None) -> Iterator[TextIO]:
    """Open a UTF-8 file, without a byte order mark; see open_bytes. UserError if it is not UTF-8."""
    try:
        with open_bytes(path) as file:
            yield io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)
    except UnicodeDecodeError as e:
        fault = f"{_bad_line(path)}{e.reason}"
        raise UserError(f"{path} is not UTF-8 ({fault}): convert it to UTF-8") from None


def _bad_line(path: str | os.PathLike) -> str:
    """Return "line 3: " for the first line that is not UTF-8; "" for a pipe, which cannot be read again."""
    if not os.path.isfile(path):
        return ""
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f"line {number}: "
    return ""


def read_text(path: str | os.PathLike) -> str:
    """Return the whole text of a file; see open_text."""
    with open_text(path) as file:
        return file.read()


def git_blob_id(path: str | os.PathLike) -> str:
    """Return the id of ``git hash-object``: SHA-1 of "blob", the length in bytes and a NUL, then the bytes."""
    header = f"blob {os.path.getsize(path)}\0".encode()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha1(header)).hexdigest()


@contextlib.contextmanager
def replace_file(path: str | os.PathLike, mode: str = "w"):
    """Open a temporary file next to ``path``; on success it is fsynced and renamed to ``path``, else removed.

    ``mode`` is "w" for UTF-8 text or "wb" for bytes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(fd, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.umask(mask := os.umask(0))
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes 0600 files; others may read what we publish
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(
    path: str | os.PathLike,
    flag: str = "",
    inputs: Iterable[Path] = (),
    may_replace: Callable[[Path], None] | None = None,
) -> Iterator[Path]:
    """Yield ``.NAME.unfinished`` next to ``path``; on success it is fsynced and renamed to ``path``.

    After an exception it is removed. A kill leaves it; the next call for the same ``path`` removes it. A file in it
    named ``….unfinished`` is renamed last, so that a model's config.json does not exist before everything else.

    Args:
        path: the folder to make; it may exist if it is empty.
        flag: the command line's name for it, for messages.
        inputs: folders that are read meanwhile, so they are neither replaced nor added to.
        may_replace: gets an existing folder, and raises UserError unless it may be replaced. None: it never may.

    Raises:
        UserError: ``path`` exists, another process is making it, or its parent cannot be written.
    """
    path = Path(os.path.realpath(path))  # a link stays, and its target is made
    for folder in inputs:
        if (source := folder.resolve()) in (path, *path.parents) or path in source.parents:
            raise UserError(f"{flag} {path} is, contains or lies in the input {folder}: choose another folder")
    if os.path.ismount(path):  # no folder can be renamed to it
        raise UserError(f"{flag or 'folder'} {path} is a mount point: choose a folder inside it")
    check_writable(path.parent, flag or "folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished, replaced = (path.parent / f".{path.name}{suffix}" for suffix in (UNFINISHED, ".replaced"))
    lock = _locked_folder(unfinished, path)
    try:
        if replaced.exists():  # a kill came between two renames, or after them
            if is_free(path):
                os.rename(replaced, path)
            elif (path / "config.json").exists():
                shutil.rmtree(replaced)
            else:
                raise UserError(f"{path} exists, and {replaced} has what it replaced: remove one of them")
        if not is_free(path):
            if may_replace is None:
                raise UserError(f"{flag} {path}".strip() + " already exists: remove it, or choose another folder")
            may_replace(path)
        for entry in unfinished.iterdir():  # of a process that was killed
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        yield unfinished
        fsync_tree(unfinished)
        for entry in unfinished.glob("*" + UNFINISHED):
            os.rename(entry, entry.with_suffix(""))
        fsync(unfinished)  # or the folder's own name could be on disk and config.json's not
        if not is_free(path):
            os.rename(path, replaced)
        os.rename(unfinished, path)  # replaces an empty folder
        fsync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        if replaced.exists() and not path.exists():
            os.rename(replaced, path)
        raise
    finally:
        os.close(lock)


def is_free(path: Path) -> bool:
    """Whether nothing exists there, or an empty folder, which a rename replaces."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder for as long as it is open; return False if another process has locked it.

    Without such locks (Windows, some network file systems) nothing keeps a second process away.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        return e.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


@contextlib.contextmanager
def only_process(folder: str | os.PathLike) -> Iterator[None]:
    """Make a folder, and lock it against other callers until the block, or the process, ends.

    Raises:
        UserError: another process holds the lock; the message has its id.
    """
    path, made = Path(folder) / ".lock", not os.path.exists(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            if not try_lock(file.fileno()):
                file.seek(0)
                raise UserError(
                    f"another run is writing to {folder} ({file.read()}): wait for it, or choose another folder"
                )
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                continue  # the file of a process that has just ended and removed it
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                return (yield)
            finally:
                with contextlib.suppress(OSError):
                    path.unlink()
                    if made:
                        path.parent.rmdir()  # if nothing was written there


def _locked_folder(unfinished: Path, path: Path) -> int:
    """Make the folder and lock it; return its descriptor. The lock ends with the process."""
    while True:
        try:
            unfinished.mkdir(exist_ok=True)
            descriptor = os.open(unfinished, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # another process has just removed or renamed it
            continue
        if not try_lock(descriptor):
            os.close(descriptor)
            raise UserError(f"{path} is being written by another process ({unfinished} is locked): wait for it")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.lstat(unfinished)):
                return descriptor
        os.close(descriptor)  # the locked folder is another process's, which has just ended


def check_writable(path: str | os.PathLike, flag: str) -> None:
    """Raise UserError unless ``path`` is a writable folder or can be made one; make nothing."""
    nearest = next(folder for folder in (Path(path).absolute(), *Path(path).absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path} cannot be written, {nearest} is a file or read-only: choose another folder")


def check_space(folder: Path, size: int) -> None:
    """Raise UserError unless ``size`` bytes are free on the disk of ``folder``."""
    free = shutil.disk_usage(folder).free
    if size > free:
        need = f"{folder.parent} has {free / 1e9:.2f} GB free, and {size / 1e9:.2f} GB are needed"
        raise UserError(f"{need}: free some, or choose another folder")


def fsync_tree(path: Path) -> None:
    """Flush a file, or a folder and everything in it, to disk."""
    for entry in path.iterdir() if path.is_dir() else ():
        fsync_tree(entry)
    fsync(path)


def fsync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to disk."""
    if os.name != "posix" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
