"""Files and folders that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from alpaca import UserError

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second process away there
    fcntl = None

UNFINISHED = ".unfinished"


def read_text(path: str | os.PathLike) -> str:
    """A UTF-8 file's text, without a byte order mark; UserError when it is missing, unreadable or not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}): convert it to UTF-8") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None


def git_blob_id(path: str | os.PathLike) -> str:
    """The id that ``git hash-object`` gives: SHA-1 of "blob", the length in bytes and a NUL, then the bytes."""
    digest = hashlib.sha1(f"blob {os.path.getsize(path)}\0".encode())
    with open(path, "rb") as file:
        while chunk := file.read(1 << 18):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def replace_file(path: str | os.PathLike, mode: str = "w"):
    """Opens a temporary file beside ``path``; on success it is fsynced and renamed to ``path``, else removed.

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
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes 0600 files; others may read what we publish
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def new_folder(
    path: str | os.PathLike,
    flag: str = "",
    inputs: Iterable[Path] = (),
    may_replace: Callable[[Path], None] | None = None,
) -> Iterator[Path]:
    """Yields ``.NAME.unfinished`` beside ``path``, which becomes ``path`` by one rename on success, all of it on disk.

    After an exception it is gone. A kill leaves it; the next call for the same ``path`` removes it. A file in it that
    is called ``….unfinished`` gets its name last, so that a model's config.json is not there before all else is.

    Args:
        path: the folder to make; an empty one may be there.
        flag: the command line's name for it, for messages.
        inputs: folders that are read meanwhile, and so neither replaced nor added to.
        may_replace: raises UserError unless the folder that it is given may be replaced. That one is moved aside, and
            removed when the new one has its place. None: nothing is replaced.

    Raises:
        UserError: ``path`` is there, another process is making it, or its place cannot be written.
    """
    path = Path(os.path.realpath(path))  # a link stays, and what it points to is made
    for folder in inputs:
        source = folder.resolve()
        if path in (source, *source.parents):
            raise UserError(f"{flag} {path} is, or holds, the input {folder}: choose another folder")
        if source in path.parents:
            raise UserError(f"{flag} {path} is inside the input {folder}: choose another folder")
    if os.path.ismount(path):  # no folder can be renamed to it
        raise UserError(f"{flag or 'folder'} {path} is where a disk is mounted: choose a folder inside it")
    check_writable(path.parent, flag or "folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / f".{path.name}{UNFINISHED}"
    replaced = path.parent / f".{path.name}.replaced"
    lock = _locked(unfinished, path)
    try:
        if replaced.exists():  # a kill came between two renames, or after them
            if is_free(path):
                os.rename(replaced, path)
            elif (path / "config.json").exists():
                shutil.rmtree(replaced)
            else:
                raise UserError(
                    f"{path} is there, but {replaced} holds the model that was there before an interrupted "
                    "overwrite: move one of them away"
                )
        if not is_free(path):
            if may_replace is None:
                raise UserError(f"{flag} {path}".strip() + " is there already: remove it, or choose another path")
            may_replace(path)
        for entry in unfinished.iterdir():  # of a process that was killed
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        yield unfinished
        fsync_tree(unfinished)
        for entry in unfinished.glob(
            "*" + UNFINISHED
        ):  # a kill after it leaves a whole model, but for the folder's name
            os.rename(entry, entry.with_suffix(""))
        fsync(unfinished)  # or the folder's own name could be on the disk and config.json's not
        if not is_free(path):
            os.rename(path, replaced)
        os.rename(unfinished, path)  # takes the place of an empty folder
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
    """Whether nothing is there, or an empty folder, whose place a rename takes."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _locked(unfinished: Path, path: Path) -> int:
    """Makes the folder and locks it; the lock goes with the process, however that ends. Returns the descriptor."""
    while True:
        try:
            unfinished.mkdir(exist_ok=True)
            descriptor = os.open(unfinished, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # another process has just removed or renamed it
            continue
        except OSError as e:
            if e.errno not in (errno.ENOTDIR, errno.ELOOP, errno.EEXIST):
                raise
            raise UserError(
                f"{unfinished} is a link or a file, not what an interrupted run leaves: remove it"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(descriptor)
                raise UserError(
                    f"{path} is being written by another process ({unfinished} is locked): wait for it"
                ) from None
            # a file system without locks: nothing to hold on to, and nothing that would be wrong without it
        try:
            if os.path.samestat(os.fstat(descriptor), os.lstat(unfinished)):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # what was locked is another process's, which has just ended


def check_writable(path: str | os.PathLike, flag: str) -> None:
    """Raises UserError unless ``path`` is a writable folder or can be made one; makes nothing."""
    nearest = next(folder for folder in (Path(path).absolute(), *Path(path).absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path} cannot be written: {nearest} is a file or read-only, choose another folder")


def check_space(folder: Path, size: int) -> None:
    """Raises UserError unless ``size`` bytes are free on the disk of ``folder``."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{folder.parent} has {free / 1e9:.2f} GB free, {size / 1e9:.2f} GB are needed: free some, or choose "
            "another folder"
        )


def fsync_tree(path: Path) -> None:
    """Puts a file, or a folder and all in it, on the disk."""
    for entry in path.iterdir() if path.is_dir() else ():
        fsync_tree(entry)
    fsync(path)


def fsync(path: Path) -> None:
    """Puts a file, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
