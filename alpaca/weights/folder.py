"""Output folders that are whole or not there, whatever happens while they are made."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from alpaca import UserError
from alpaca.weights.checkpoint import CHAT_TEMPLATES, MANIFEST, SIDE_FILES, WEIGHTS, check_writable

UNFINISHED = ".unfinished"
SHARD = re.compile(r"(model|pytorch_model)-[0-9]+-of-[0-9]+\.(safetensors|bin)")


@contextmanager
def new_folder(
    path: str | os.PathLike, flag: str = "", overwrite: bool = False, inputs: Iterable[Path] = ()
) -> Iterator[Path]:
    """Yields ``.NAME.unfinished`` beside ``path``, which becomes ``path`` by one rename on success, all of it on disk.

    After an exception it is gone. A kill leaves it; the next call for the same ``path`` removes it. A file in it that
    is called ``….unfinished`` gets its name last, so that a model's config.json is not there before all else is.

    Args:
        path: the folder to make; an empty one may be there.
        flag: the command line's name for it, for messages.
        overwrite: replace a model or a diff that is there: moved aside, and removed when the new one has its place.
        inputs: folders that are read meanwhile, and so neither replaced nor added to.

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
            if _is_free(path):
                os.rename(replaced, path)
            elif (path / "config.json").exists():
                shutil.rmtree(replaced)
            else:
                raise UserError(
                    f"{path} is there, but {replaced} holds the model that was there before an interrupted "
                    "--overwrite: move one of them away"
                )
        check_free(path, flag, overwrite)
        for entry in unfinished.iterdir():  # of a process that was killed
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        yield unfinished
        fsync_tree(unfinished)
        for entry in unfinished.glob(
            "*" + UNFINISHED
        ):  # a kill after it leaves a whole model, but for the folder's name
            os.rename(entry, entry.with_suffix(""))
        fsync(unfinished)  # or the folder's own name could be on the disk and config.json's not
        if not _is_free(path):
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


def check_free(path: Path, flag: str = "", overwrite: bool = False) -> None:
    """Raises UserError when something is at ``path`` that a new folder must not replace.

    ``overwrite`` replaces a folder with config.json, weights, and nothing but what a model or a diff consists of.
    """
    if _is_free(path):
        return
    what = f"{flag} {path}".strip()
    if not overwrite:
        cure = "; --overwrite replaces it" if flag else ""
        raise UserError(f"{what} is there already: remove it, or choose another path{cure}")
    if not (path / "config.json").exists() or not any((path / name).exists() for name in WEIGHTS):
        raise UserError(f"{what} is no model, so --overwrite leaves it: remove it, or choose another path")
    own = {"config.json", MANIFEST, *WEIGHTS, *SIDE_FILES}
    for entry in sorted(path.iterdir()):
        if entry.is_dir():
            known = entry.name == CHAT_TEMPLATES and all(file.suffix == ".jinja" for file in entry.iterdir())
        else:
            known = entry.name in own or SHARD.fullmatch(entry.name)
        if not known:
            raise UserError(
                f"{what} holds more than a model ({entry.name}), so --overwrite leaves it: move that elsewhere, or "
                "choose another path"
            )


def _is_free(path: Path) -> bool:
    """Whether nothing is there, or an empty folder, whose place a rename takes."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def check_space(folder: Path, size: int) -> None:
    """Raises UserError unless ``size`` bytes are free on the disk of ``folder``."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{folder.parent} has {free / 1e9:.2f} GB free, {size / 1e9:.2f} GB are needed: free some, or choose "
            "another folder"
        )


def check_links(source: Path) -> None:
    """Raises UserError when a tokenizer or generation file is a link to somewhere else.

    A stranger's folder could have a private file of this machine copied into what is published next. Links inside the
    folder are welcome, and so are those of the hub's cache, from snapshots/REVISION to ../../blobs.
    """
    roots = [source.resolve(), source.resolve().parent.parent / "blobs"]
    templates = (source / CHAT_TEMPLATES).glob("*.jinja")
    for path in [*(source / name for name in (*SIDE_FILES, "config.json")), *templates]:
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise UserError(f"{path} is a link out of its folder: do not trust it, or copy the file there yourself")


def copy_side_files(source: Path, target: Path, config: dict) -> None:
    """Copies tokenizer and generation files as they are, and writes ``config`` as config.json, to be named last."""
    for name in SIDE_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    for template in sorted((source / CHAT_TEMPLATES).glob("*.jinja")):
        (target / CHAT_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(template, target / CHAT_TEMPLATES / template.name)
    config = {key: value for key, value in config.items() if key != "_name_or_path"}
    (target / f"config.json{UNFINISHED}").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
