"""A weight diff, a block of rows at a time: the blocks of two models side by side, and the arithmetic.

subtract is the original's float32 ``tuned - raw``. exact subtracts the bits as integers; their difference wraps around,
so nothing is lost. The memory of a run is that of a few blocks, whatever the size of a tensor.
"""

from __future__ import annotations

import hashlib
import math
import sys
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

from alpaca import UserError
from alpaca.weights.checkpoint import MANIFEST, CheckpointReader, Specs, as_bytes, row_blocks, size_of
from alpaca.weights.names import some
from alpaca.weights.writer import DTYPES

BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
AHEAD = 4  # blocks that are read while others are worked on
SAMPLE = 1 << 15  # elements of each block that are compressed, to estimate a diff's compressed size
MEAN_BYTES = 1 << 28  # of an embedding's columns in float32 while their mean is taken


def pairs(
    specs: Specs, raw: CheckpointReader, other: CheckpointReader, what: str, look: Callable | None = None
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield (name, raw's rows, the other's rows) of all blocks of all tensors, in order, behind a progress bar.

    raw has fewer rows in a block that reaches into rows that training added.

    Args:
        specs: name → (dtype, shape) of the tensors to go through.
        raw: the base model.
        other: a model with the same names.
        what: the progress bar's name.
        look: is called with each triple before it is yielded, in a thread of its own that is a few blocks ahead. To
            hash there both reads the files and keeps a second processor busy.
    """

    def read() -> Iterator[tuple]:
        for name, (_, shape) in specs.items():
            for block in row_blocks(shape):
                triple = name, raw.rows(name, *block), other.rows(name, *block)
                if look:
                    look(*triple)
                yield triple

    # torch's own threads wait for work in a busy loop: 29 s of processor time instead of 20 at 1.1 B.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with progress(size_of({name: other.spec(name) for name in specs}), what) as bar:
            for name, *rows in _ahead(read()):
                yield name, *rows
                bar.update(rows[1].nbytes)
    finally:
        torch.set_num_threads(threads)


def _ahead(items: Iterable) -> Iterator:
    """Yield the items, which a thread of its own takes a few ahead."""
    left = iter(items)
    with ThreadPoolExecutor(1) as pool:
        due = deque(pool.submit(next, left, None) for _ in range(AHEAD))
        while (item := due.popleft().result()) is not None:
            due.append(pool.submit(next, left, None))
            yield item


def progress(total: int, what: str) -> tqdm:
    """Return a bar in bytes with the time left. Into a file it prints twice a minute, or it would fill the file."""
    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, mininterval=interval, maxinterval=interval)


class Hashes:
    """SHA-256 of each tensor's bytes, little-endian in their type, whatever the shards and file format."""

    def __init__(self):
        self._digests = defaultdict(hashlib.sha256)

    def update(self, name: str, rows: torch.Tensor) -> None:
        self._digests[name].update(as_bytes(rows).numpy())

    def hex(self) -> dict[str, str]:
        return {name: digest.hexdigest() for name, digest in self._digests.items()}


def sha256_of_all(reader: CheckpointReader, names: Collection[str], what: str) -> dict[str, str]:
    """Return name → SHA-256 of the tensors as they are stored; ``what`` is the bar's name."""
    hashes, specs = Hashes(), {name: reader.spec(name) for name in names}
    with progress(size_of(specs), what) as bar:
        for name, (_, shape) in specs.items():
            for block in row_blocks(shape):
                hashes.update(name, rows := reader.rows(name, *block))
                bar.update(rows.nbytes)
    return hashes.hex()


def take_difference(
    raw: torch.Tensor, tuned: torch.Tensor, exact: bool, row: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return rows of the diff, those that recover() makes of them, and the largest error of these.

    Args:
        raw: rows of the base model, in the stored type.
        tuned: the same rows of the tuned model, in the stored type, and perhaps some that training added.
        exact: take the difference of the bits, as integers. There is no error then.
        row: subtracted from rows that training added. (columns,) float32; None for zeros.
    """
    if exact:
        bits = BITS[tuned.dtype]
        return tuned.view(bits) - _grown(raw, tuned, tuned.dtype, None).view(bits), tuned, 0.0
    base, values = _grown(raw, tuned, torch.float32, row), tuned.float()
    diff = values - base
    recovered = diff + base
    error = recovered - values
    if not is_finite(diff):
        error.nan_to_num_(0.0, 0.0, 0.0)
    return diff, recovered, error.abs_().max().item() if error.numel() else 0.0


def add_difference(raw: torch.Tensor, diff: torch.Tensor, dtype: torch.dtype, row: torch.Tensor | None) -> torch.Tensor:
    """Return rows of the recovered model in ``dtype``; a diff of integers is one of bits. See take_difference()."""
    base = _grown(raw, diff, dtype, row)
    if diff.dtype.is_floating_point:
        return diff.to(dtype) + base
    return (diff + base.view(diff.dtype)).view(dtype)


def _grown(raw: torch.Tensor, other: torch.Tensor, dtype: torch.dtype, row: torch.Tensor | None) -> torch.Tensor:
    """Return raw's rows in another type, followed by those that ``other`` has more: ``row`` repeated, or zeros.

    subtract uses the mean row, as the original does; exact uses zeros, which are the same on all machines.
    """
    raw, more = raw.to(dtype), len(other) - len(raw)
    if not more:
        return raw
    new = torch.zeros(other.shape[1:], dtype=dtype) if row is None else row.to(dtype)
    return torch.cat([raw, new.expand(more, *new.shape)])


def check_floats(reader: CheckpointReader, what: str = "") -> None:
    """Raise UserError unless all tensors are floating-point numbers of 16, 32 or 64 bits."""
    for name, (kind, _) in reader.specs().items():
        if kind not in BITS:
            quantized = reader.config.get("quantization_config")
            method = quantized.get("quant_method", "by no stated method") if isinstance(quantized, dict) else None
            raise UserError(
                f"{what} {reader.folder}".strip()
                + (f" is quantized ({method})" if method else " seems quantized")
                + f": {name} is {str(kind).removeprefix('torch.')}, not floating point; give the unquantized model"
            )


def recovered_specs(manifest: dict, diff: CheckpointReader) -> Specs:
    """Return name → (dtype, shape) of the recovered model: float32 for subtract, tuned's type for exact.

    Raises:
        UserError: the diff's types are not those of the manifest's method.
    """
    specs = diff.specs()
    if manifest.get("method") == "exact":
        recovered = {name: (DTYPES.get(manifest["dtypes"].get(name)), shape) for name, (_, shape) in specs.items()}
        if odd := [name for name, (kind, _) in recovered.items() if BITS.get(kind) != specs[name][0]]:
            raise UserError(
                f"{diff.folder / MANIFEST} does not fit the weights beside it ({some(odd)}): download both again"
            )
        return recovered
    if not manifest and all(kind in BITS.values() for kind, _ in specs.values()):
        raise UserError(
            f"{diff.folder} holds whole numbers, like a diff made with the method exact, but no {MANIFEST} that names "
            "a method: download that file too"
        )
    check_floats(diff)
    return {name: (torch.float32, shape) for name, (_, shape) in specs.items()}


class NotFinite:
    """Collects which tensors have NaN or infinite values, by model."""

    def __init__(self):
        self.found: dict[str, set[str]] = defaultdict(set)

    def look(self, name: str, **rows: torch.Tensor) -> None:
        """Look at rows of a tensor by model; an underscore in its name stands for a space."""
        for where, tensor in rows.items():
            if tensor.is_floating_point() and not is_finite(tensor):
                self.found[where.replace("_", " ")].add(name)

    def warn(self) -> None:
        for where, names in self.found.items():
            print(f"warning: NaN or infinite values in {len(names)} tensors of {where}: {some(names)}")


def mean_row(raw: CheckpointReader, name: str) -> torch.Tensor:
    """Return the float32 ``.mean(dim=0)`` of a matrix, the original's row of a new token. (columns,)

    ATen adds up each column on its own, in vectors of at most 64 columns, so blocks of 64 columns give the bits of the
    whole matrix, which need not be in memory. If 64 does not divide the width, the remaining columns would be added up
    in another order, so the matrix is taken whole. The bits depend on the processor, not on the number of threads.
    """
    _, (rows, width) = raw.spec(name)
    block = max(64, MEAN_BYTES // 4 // max(rows, 1) // 64 * 64) if width % 64 == 0 else width
    matrix = raw.lazy(name)
    columns = (matrix[:, left : left + block] for left in range(0, width, block))
    return torch.cat([torch.empty(part.shape).copy_(part).mean(dim=0) for part in columns])


def is_finite(values: torch.Tensor) -> bool:
    """Return whether all values are finite. A finite sum proves it in one pass; another may only be too large."""
    return math.isfinite(values.sum(dtype=torch.float32).item()) or bool(values.isfinite().all())


def precise_sum(values: torch.Tensor) -> float:
    """Add up float32 sums of 4,096 values in float64, twice as precise as one float32 sum."""
    values = values.reshape(-1)
    whole = len(values) // 4096 * 4096
    parts = values[:whole].view(-1, 4096).sum(dim=1, dtype=torch.float32)
    return (parts.double().sum() + values[whole:].double().sum()).item()


def compressed_size(data: torch.Tensor) -> float:
    """Estimate the bytes after zlib, from a sample in the middle."""
    data = data.reshape(-1)
    middle = data[max(0, len(data) - SAMPLE) // 2 :][:SAMPLE]
    return len(zlib.compress(middle.view(torch.uint8).numpy(), 1)) * len(data) / max(len(middle), 1)
