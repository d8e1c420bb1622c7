"""SHA-256 of tensors and CRC-32 of ``.bin`` records, computed in threads behind a progress bar."""

from __future__ import annotations

import hashlib
import math
import os
import sys
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch
from tqdm import tqdm

from alpaca import UserError
from alpaca.weights.checkpoint import CheckpointReader, size_of
from alpaca.weights.tensor_files import crc32_of

CHUNK = 1 << 20  # elements processed at once: 4 MB of float32, which stay in the processor's cache


def progress(total: int, what: str) -> tqdm:
    """Return a bar in bytes with the time left. Into a file it prints twice a minute, or it would fill the file."""
    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, mininterval=interval, maxinterval=interval)


def in_threads(task: Callable, items: list[tuple], sizes: list[int], what: str) -> list:
    """Return ``task(*item, tick)`` for each item, computed in threads; ``tick(bytes)`` moves the bar.

    Raises:
        the first error of a task; the other tasks end at their next tick.
    """
    stop, lock = threading.Event(), threading.Lock()
    with progress(sum(sizes), what) as bar:

        def tick(count: int) -> None:
            with lock:
                bar.update(count)
            if stop.is_set():
                raise UserError("stopped")

        pool = ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1)))  # while some hash, others wait for the disk
        try:
            futures = [pool.submit(task, *item, tick) for item in items]
            wait(futures, return_when="FIRST_EXCEPTION")
            return [future.result() for future in futures if future.done()]
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def sha256_of(reader: CheckpointReader, name: str, dtype: torch.dtype | None, tick: Callable) -> tuple[str, bool]:
    """Return a tensor's SHA-256 as if it were stored in another type, and whether that type holds all its values."""
    stored, shape = reader.spec(name)
    digest, exact, total = hashlib.sha256(), True, math.prod(shape)
    buffer = torch.empty(min(CHUNK, total), dtype=stored)
    for start in range(0, total, CHUNK):
        data = cast = reader.read(name, start, buffer[: total - start])
        if dtype not in (None, stored):
            cast = data.to(dtype)
            exact = exact and torch.equal(cast.to(stored), data)
        digest.update(cast.view(torch.uint8).numpy())
        tick(data.numel() * data.itemsize)
    return digest.hexdigest(), exact


def sha256_of_all(reader: CheckpointReader, names: Collection[str], what: str) -> dict[str, str]:
    """Return name → SHA-256 of the tensors as they are stored; ``what`` is the bar's name."""
    sizes = [size_of({name: reader.spec(name)}) for name in names]
    found = in_threads(sha256_of, [(reader, name, None) for name in names], sizes, what) if names else []
    return {name: sha256 for name, (sha256, _) in zip(names, found, strict=True)}


def check_checksums(*readers: CheckpointReader) -> None:
    """Raise UserError if a record of a ``.bin`` shard does not match its CRC-32, which torch never checks."""
    records = [record for reader in readers for record in reader.checksums()][::-1]  # as check_inputs() does

    def damaged(path: Path, name: str, offset: int, size: int, crc: int, tick: Callable) -> str | None:
        return None if crc32_of(path, offset, size, tick) == crc else f"{path} is damaged at {name}"

    if records:
        found = in_threads(damaged, records, [record[3] for record in records], "checksums")[::-1]
        if found := [line for line in found if line]:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise UserError(f"{found[0]}{more}: its bytes do not match the file's own checksum, download it again")
