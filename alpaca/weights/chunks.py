"""Tensors in chunks: read ahead in one thread, combined in another, hashed and written behind in more.

The memory that a run takes is that of a few sets of buffers, whatever the size of a tensor.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from tqdm import tqdm

from alpaca import UserError
from alpaca.weights.checkpoint import CheckpointReader
from alpaca.weights.tensor_files import crc32_of

CHUNK = 1 << 20  # elements: 4 MB of float32, which stay in the processor's cache
SETS = 12  # of buffers: enough that a hash, the arithmetic or the disk may lag behind for a while
Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Chunk:
    """A piece of a tensor, ``[start, start + count)`` of its elements, and buffers that are used again and again."""

    def __init__(self):
        self.name, self.start, self.count, self.last = "", 0, 0, False
        self.raw = self.other = torch.empty(0)  # what was read of two models, in the stored types
        self._buffers: dict[str, torch.Tensor] = {}
        self._busy: list[Future] = []

    def buffer(self, role: str, dtype: torch.dtype, count: int | None = None) -> torch.Tensor:
        """1-D, of ``count`` elements (by default the chunk's), with whatever was in it."""
        size = (self.count if count is None else count) * dtype.itemsize
        if role not in self._buffers or self._buffers[role].numel() < size:
            self._buffers[role] = torch.empty(size, dtype=torch.uint8)
        return self._buffers[role][:size].view(dtype)


def numel(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def size_of(specs: Specs) -> int:
    """Bytes of all tensors."""
    return sum(dtype.itemsize * numel(shape) for dtype, shape in specs.values())


def run(
    specs: Specs, read: Callable[[Chunk], None], work: Callable[[Chunk], None], after: list[Callable[[Chunk], None]]
) -> None:
    """Goes through all chunks of all tensors, in order; an empty tensor has one chunk of no elements.

    Args:
        specs: name → (dtype, shape) of the tensors to go through.
        read: fills a chunk's buffers, in a thread of its own, ahead of the work.
        work: computes, in the calling thread.
        after: what is done with the results, each in a thread of its own that sees the chunks in order.

    Raises:
        whatever one of them raised; then no more of any is begun.
    """

    def pieces() -> Iterator[tuple]:
        for name, (_, shape) in specs.items():
            total = numel(shape)
            for start in range(0, max(total, 1), CHUNK):
                yield name, start, min(CHUNK, total - start), start + CHUNK >= total

    def fill(chunk: Chunk, piece: tuple) -> None:
        for future in chunk._busy:
            future.result()
        chunk.name, chunk.start, chunk.count, chunk.last = piece
        read(chunk)

    left, ahead, sets = pieces(), deque(), [Chunk() for _ in range(SETS)]
    reader, *behind = lanes = [ThreadPoolExecutor(1) for _ in range(1 + len(after))]
    # Threads that torch adds wait for work by turning in circles: 29 s of processor time instead of 20 at 1.1 B.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        free = deque(sets)
        while True:
            while free and (piece := next(left, None)):
                chunk = free.popleft()
                ahead.append((chunk, reader.submit(fill, chunk, piece)))
            if not ahead:
                break
            chunk, filled = ahead.popleft()
            filled.result()
            work(chunk)
            chunk._busy = [lane.submit(task, chunk) for lane, task in zip(behind, after, strict=True)]
            free.append(chunk)
        for chunk in sets:
            for future in chunk._busy:
                future.result()
    finally:
        torch.set_num_threads(threads)
        for lane in lanes:
            lane.shutdown(cancel_futures=True)


class Hashes:
    """SHA-256 of each tensor's bytes, little-endian in its stored type, whatever the shards and file format."""

    def __init__(self):
        self.hex: dict[str, str] = {}
        self._digest = hashlib.sha256()

    def update(self, chunk: Chunk, data: torch.Tensor) -> None:
        self._digest.update(data.view(torch.uint8).numpy())
        if chunk.last:
            self.hex[chunk.name] = self._digest.hexdigest()
            self._digest = hashlib.sha256()


def progress(total: int, what: str) -> tqdm:
    """A bar in bytes, with the time left; in a file it is renewed twice a minute, which would fill with it."""
    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, mininterval=interval, maxinterval=interval)


def in_threads(task: Callable, items: list[tuple], sizes: list[int], what: str) -> list:
    """``task(*item, tick)`` for each item, on as many threads as there are cores; ``tick(bytes)`` moves the bar."""
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
    """SHA-256 of a tensor as it would be in another type, and whether that type holds all its values."""
    stored, shape = reader.spec(name)
    digest, exact, total = hashlib.sha256(), True, numel(shape)
    buffer = torch.empty(min(CHUNK, total), dtype=stored)
    for start in range(0, total, CHUNK):
        data = cast = reader.read(name, start, buffer[: total - start])
        if dtype not in (None, stored):
            cast = data.to(dtype)
            exact = exact and torch.equal(cast.to(stored), data)
        digest.update(cast.view(torch.uint8).numpy())
        tick(data.numel() * data.itemsize)
    return digest.hexdigest(), exact


def check_checksums(*readers: CheckpointReader) -> None:
    """Raises UserError when a record of a ``.bin`` shard does not have its CRC-32, which torch never looks at."""
    records = [record for reader in readers for record in reader.checksums()][::-1]  # as check_inputs() does

    def damaged(path: Path, name: str, offset: int, size: int, crc: int, tick: Callable) -> str | None:
        return None if crc32_of(path, offset, size, tick) == crc else f"{path} is damaged at {name}"

    if records:
        found = in_threads(damaged, records, [record[3] for record in records], "checksums")[::-1]
        found = [line for line in found if line]
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise UserError(f"{found[0]}{more}: its bytes do not have the file's own checksum, download it again")
