"""Writes safetensors shards piece by piece; their layout is planned before the first byte."""

from __future__ import annotations

import json
import math
import os
import re
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from alpaca import UserError
from alpaca.common.files import check_space
from alpaca.weights.checkpoint import Specs, size_of
from alpaca.weights.tensor_files import DTYPE_NAMES


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``5GB`` (powers of 1000, as in transformers) or ``5GiB`` (powers of 1024)."""
    match = re.fullmatch(r"([0-9]{0,15}\.?[0-9]{1,15}) ?([KMGT]?)(i?)B", str(text).strip(), re.I)
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise UserError(f"max_shard_size takes a size such as 5GB or 500MB, not {text!r}")
    return size


class ShardWriter:
    """Writes tensors piece by piece, in a fixed order.

    Args:
        folder: an existing folder; gets ``model.safetensors``, or numbered shards and an index.
        specs: name → (dtype, shape), in the order in which the tensors will be written.
        max_shard_bytes: a shard is closed before it would grow beyond this; a single tensor may be larger.

    Raises:
        UserError: the disk has too little free space.
    """

    def __init__(self, folder: Path, specs: Specs, max_shard_bytes: int):
        shards: list[list[str]] = [[]]
        size = 0
        for name, (dtype, shape) in specs.items():
            more = dtype.itemsize * math.prod(shape)
            if shards[-1] and size + more > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += more
        self._folder = folder
        self._specs, self._pieces = specs, deque((name, math.prod(shape)) for name, (_, shape) in specs.items())
        self._files, self._out, self._left, self._sync = deque(), None, 0, ThreadPoolExecutor(1)
        self._synced: list[Future] = []
        weight_map = {}
        for number, names in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            header, offset = {"__metadata__": {"format": "pt"}}, 0  # required by transformers
            for name in names:
                dtype, shape = specs[name]
                end = offset + dtype.itemsize * math.prod(shape)
                header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
                offset = end
                weight_map[name] = file
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)  # so that tensor data starts at a multiple of 8 bytes
            self._files.append((folder / file, len(text).to_bytes(8, "little") + text, offset))
        check_space(folder, size_of(specs) + sum(len(header) for _, header, _ in self._files))
        index = {"metadata": {"total_size": size_of(specs)}, "weight_map": weight_map}
        self._index = index if len(shards) > 1 else None

    def write(self, name: str, data: torch.Tensor) -> None:
        """Write the next piece (1-D, contiguous) of the tensor that is due."""
        due, left = self._pieces[0]
        if name != due or data.dtype != self._specs[name][0] or len(data) > left:
            raise ValueError(f"{name}: {len(data)} elements of {data.dtype} are not what was planned ({due})")
        self._pieces[0] = (due, left - len(data))
        if left == len(data):
            self._pieces.popleft()
        view = memoryview(data.view(torch.uint8).numpy())
        while not self._left and self._files and (self._out is None or len(view)):
            self._next()
        self._left -= len(view)
        self._put(view)

    def close(self) -> None:
        """Finish the last shard, and wait until all are on the disk; raise ValueError if a tensor is missing."""
        while self._files and not self._left:
            self._next()
        if self._pieces or self._left:
            raise ValueError(f"{self._pieces[0][0]} was planned but not written")
        self._end()
        for future in self._synced:
            future.result()
        if self._index:
            text = json.dumps(self._index, indent=2, sort_keys=True) + "\n"
            (self._folder / "model.safetensors.index.json").write_text(text)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error) -> None:
        try:
            if error[0] is None:
                self.close()
        finally:
            self._sync.shutdown(cancel_futures=True)
            if self._out:
                self._out.close()

    def _next(self) -> None:
        self._end()
        path, header, self._left = self._files.popleft()
        self._out = open(path, "wb", buffering=0)
        self._put(memoryview(header))

    def _end(self) -> None:
        if self._out:
            self._synced.append(self._sync.submit(_to_disk, self._out))  # while the next shard is written
            self._out = None

    def _put(self, view: memoryview) -> None:
        try:
            while len(view):
                position, count = self._out.tell(), self._out.write(view)
                view = view[count:]
                # The advice makes Linux write dirty pages at once. Otherwise the kernel gathers gigabytes first: 4.4 GB
                # took 9.5 s and 7 s of processor time without it, 6 s and 3.2 s with it.
                if hasattr(os, "posix_fadvise"):
                    with suppress(OSError):  # some file systems take no advice
                        os.posix_fadvise(self._out.fileno(), position, count, os.POSIX_FADV_DONTNEED)
        except OSError as e:
            e.filename = self._out.name
            raise


def _to_disk(file) -> None:
    with file:
        os.fsync(file.fileno())
