"""A weight diff, a chunk at a time: the threads that chunks pass through, and the arithmetic.

subtract is the original's float32 ``tuned - raw``. exact subtracts the bits as integers; their difference wraps around,
so nothing is lost. The memory of a run is that of a few sets of buffers, whatever the size of a tensor.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from alpaca import UserError
from alpaca.weights.checkpoint import MANIFEST, CheckpointReader, Specs, size_of
from alpaca.weights.hashes import CHUNK, progress
from alpaca.weights.names import some
from alpaca.weights.tensor_files import DTYPES

SETS = 12  # of buffers: enough for a hash, the arithmetic or the disk to lag behind for a while
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
SAMPLE = 1 << 15  # elements of each chunk that are compressed, to estimate a diff's compressed size
MEAN_BYTES = 1 << 28  # of an embedding's columns in float32 while their mean is taken


class Chunk:
    """Elements ``[start, start + count)`` of a tensor, as ``values`` by role (raw, tuned, …) in reused buffers."""

    def __init__(self):
        self.name, self.start, self.count, self.last = "", 0, 0, False
        self.values: dict[str, torch.Tensor] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        self._busy: list[Future] = []

    def buffer(self, role: str, dtype: torch.dtype, count: int | None = None) -> torch.Tensor:
        """Return a 1-D buffer of ``count`` elements (by default the chunk's), with its previous content."""
        size = (self.count if count is None else count) * dtype.itemsize
        if role not in self._buffers or self._buffers[role].numel() < size:
            self._buffers[role] = torch.empty(size, dtype=torch.uint8)
        return self._buffers[role][:size].view(dtype)


def run(
    specs: Specs,
    read: Callable[[Chunk], None],
    work: Callable[[Chunk], None],
    after: list[Callable[[Chunk], None]],
    what: str = "",
) -> None:
    """Process all chunks of all tensors, in order; an empty tensor has one chunk without elements.

    Args:
        specs: name → (dtype, shape) of the tensors; the progress bar counts their bytes.
        read: fills a chunk's buffers, ahead of the work, in a thread of its own.
        work: computes, in the calling thread.
        after: use the results, each in a thread of its own that sees the chunks in order.
        what: the progress bar's name.

    Raises:
        whatever one of them raised; then no further step starts.
    """

    def pieces() -> Iterator[tuple]:
        for name, (_, shape) in specs.items():
            total = math.prod(shape)
            for start in range(0, max(total, 1), CHUNK):
                yield name, start, min(CHUNK, total - start), start + CHUNK >= total

    def fill(chunk: Chunk, piece: tuple) -> None:
        for future in chunk._busy:
            future.result()
        chunk.name, chunk.start, chunk.count, chunk.last = piece
        read(chunk)

    bar = progress(size_of(specs), what)
    left, ahead, sets = pieces(), deque(), [Chunk() for _ in range(SETS)]
    reader, *behind = lanes = [ThreadPoolExecutor(1) for _ in range(1 + len(after))]
    # torch's own threads wait for work in a busy loop: 29 s of processor time instead of 20 at 1.1 B.
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
            bar.update(chunk.count * specs[chunk.name][0].itemsize)
        for chunk in sets:
            for future in chunk._busy:
                future.result()
    finally:
        bar.close()
        torch.set_num_threads(threads)
        for lane in lanes:
            lane.shutdown(cancel_futures=True)


class Hashes:
    """SHA-256 of each tensor's bytes in one role, little-endian in their type, whatever the shards and file format."""

    def __init__(self, role: str):
        self.role, self.hex = role, {}
        self._digest = hashlib.sha256()

    def update(self, chunk: Chunk) -> None:
        self._digest.update(chunk.values[self.role].view(torch.uint8).numpy())
        if chunk.last:
            self.hex[chunk.name] = self._digest.hexdigest()
            self._digest = hashlib.sha256()


def take_difference(chunk: Chunk, exact: bool, row: torch.Tensor | None, not_finite: NotFinite) -> float:
    """Compute a chunk's "diff" and, for subtract, "recovered" (both float32) from its "raw" and "tuned".

    Args:
        chunk: has "raw" and "tuned" in the stored types.
        exact: take the difference of the bits, as integers.
        row: subtracted from rows that training added. (columns,) float32; None for zeros.
        not_finite: collects the tensors with NaN or infinite values.

    Returns:
        The largest difference between recovered and tuned among finite values; 0 for exact.
    """
    tuned, largest = chunk.values["tuned"], 0.0
    if exact:
        bits = BITS[tuned.dtype]
        base = _grown(chunk, tuned.dtype, None)
        chunk.values["diff"] = torch.sub(tuned.view(bits), base.view(bits), out=chunk.buffer("diff", bits))
        suspicious = True  # a difference of bits does not show it
    else:
        base, values = _grown(chunk, torch.float32, row), _converted(chunk, tuned, torch.float32)
        diff = chunk.values["diff"] = torch.sub(values, base, out=chunk.buffer("diff", torch.float32))
        recovered = torch.add(diff, base, out=chunk.buffer("recovered", torch.float32))
        chunk.values["recovered"] = recovered
        error = torch.sub(recovered, values, out=chunk.buffer("error", torch.float32))
        suspicious = not _finite(diff)
        if suspicious:
            error.nan_to_num_(0.0, 0.0, 0.0)
        largest = error.abs_().max().item() if chunk.count else 0.0
    if suspicious:
        not_finite.look(chunk.name, {"the base model": chunk.values["raw"], "the tuned model": tuned})
    return largest


def add_difference(chunk: Chunk, dtype: torch.dtype, row: torch.Tensor | None, not_finite: NotFinite) -> float:
    """Compute a chunk's "recovered" in ``dtype`` from its "raw" and "diff"; return the sum of its values.

    A diff of integers is one of bits. ``row`` and ``not_finite`` are those of ``take_difference``.
    """
    diff, recovered = chunk.values["diff"], chunk.buffer("recovered", dtype)
    chunk.values["recovered"] = recovered
    base = _grown(chunk, dtype, row)
    looked_at = {"the base model": chunk.values["raw"], "the recovered model": recovered}
    if exact := not diff.dtype.is_floating_point:
        torch.add(diff, base.view(diff.dtype), out=recovered.view(diff.dtype))
    else:
        torch.add(_converted(chunk, diff, dtype), base, out=recovered)
        looked_at["the diff"] = diff
    total = _sum(recovered)
    if not math.isfinite(total):
        not_finite.look(chunk.name, looked_at)
    elif exact:  # its bits can turn a NaN into a finite number
        not_finite.look(chunk.name, {"the base model": chunk.values["raw"]})
    return total


def check_floats(reader: CheckpointReader) -> None:
    """Raise UserError unless all tensors have floating-point types of 16, 32 or 64 bits."""
    for name, (kind, _) in reader.specs().items():
        if kind not in BITS:
            raise UserError(f"{reader.folder}: {name} is {kind}, not floating point: is it a quantized model?")


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

    def look(self, name: str, values: dict[str, torch.Tensor]) -> None:
        for where, tensor in values.items():
            if not _finite(tensor):
                self.found[where].add(name)

    def warn(self) -> None:
        for where, names in self.found.items():
            print(f"warning: NaN or infinite values in {len(names)} tensors of {where}: {some(names)}")


def mean_row(raw: CheckpointReader, name: str) -> torch.Tensor:
    """Return the float32 ``.mean(dim=0)`` of a matrix, the original's row of a new token. (columns,)

    ATen adds up each column on its own, in vectors of at most 64 columns, so blocks of 64 columns give the bits of the
    whole matrix, which need not be in memory. If 64 does not divide the width, the remaining columns would be added up
    in another order, so the matrix is taken whole. The bits depend on the processor, not on the number of threads.
    """
    dtype, (rows, width) = raw.spec(name)
    block = max(64, MEAN_BYTES // 4 // max(rows, 1) // 64 * 64) if width % 64 == 0 else width
    step = max(1, CHUNK // max(width, 1))  # rows that are read at once
    buffer, means = torch.empty(min(step, rows) * width, dtype=dtype), []
    for left in range(0, width, block):
        columns = torch.empty(rows, min(block, width - left))
        for top in range(0, rows, step):
            count = min(step, rows - top)
            values = raw.read(name, top * width, buffer[: count * width]).view(count, width)
            columns[top : top + count] = values[:, left : left + block]
        means.append(columns.mean(dim=0))
    return torch.cat(means)


def read_pair(chunk: Chunk, raw: CheckpointReader, other: CheckpointReader, role: str) -> None:
    """Read a chunk's "raw", which is shorter if the chunk reaches into rows that training added, and its ``role``."""
    dtype, shape = raw.spec(chunk.name)
    values = chunk.buffer("raw", dtype, max(0, min(chunk.count, math.prod(shape) - chunk.start)))
    chunk.values["raw"] = raw.read(chunk.name, chunk.start, values) if len(values) else values
    values = chunk.buffer("other", other.spec(chunk.name)[0])
    chunk.values[role] = other.read(chunk.name, chunk.start, values)


def _grown(chunk: Chunk, dtype: torch.dtype, row: torch.Tensor | None) -> torch.Tensor:
    """Return raw's elements in another type, followed by those of new rows: ``row`` repeated, or zeros.

    subtract uses the mean row, as the original does; exact uses zeros, which are the same on all machines.
    """
    raw = chunk.values["raw"]
    count = len(raw)
    if count == chunk.count and raw.dtype == dtype:
        return raw
    values = chunk.buffer("grown", dtype)
    values[:count] = raw
    if count < chunk.count:  # a row begins at each multiple of its length, in the file and after it
        places = torch.arange(chunk.start + count, chunk.start + chunk.count)
        values[count:] = 0 if row is None else row[places % len(row)]
    return values


def _converted(chunk: Chunk, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the values in another type, or themselves if they have it already."""
    return values if values.dtype == dtype else chunk.buffer("as", dtype).copy_(values)


def _sum(values: torch.Tensor) -> float:
    """Add up float32 sums of 4,096 values in float64, twice as precise as one float32 sum."""
    whole = len(values) // 4096 * 4096
    parts = values[:whole].view(-1, 4096).sum(dim=1, dtype=torch.float32)
    return (parts.double().sum() + values[whole:].double().sum()).item()


def _finite(values: torch.Tensor) -> bool:
    """Return whether all values are finite. A finite sum proves it in one pass; another may only be too large."""
    return math.isfinite(values.sum(dtype=torch.float32).item()) or bool(values.isfinite().all())


def compressed_size(data: torch.Tensor) -> float:
    """Estimate the bytes after zlib, from a sample in the middle."""
    middle = data[max(0, len(data) - SAMPLE) // 2 :][:SAMPLE]
    return len(zlib.compress(middle.view(torch.uint8).numpy(), 1)) * len(data) / max(len(middle), 1)
