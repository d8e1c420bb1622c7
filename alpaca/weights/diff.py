"""The arithmetic of a weight diff, a chunk at a time.

subtract is the original's float32 ``tuned - raw``. exact subtracts the bits, as integers, whose difference wraps around
and so loses nothing.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict

import torch

from alpaca import UserError
from alpaca.weights import chunks
from alpaca.weights.checkpoint import MANIFEST, CheckpointReader
from alpaca.weights.chunks import Chunk, Specs, numel
from alpaca.weights.manifest import some
from alpaca.weights.tensor_files import DTYPES

BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
SAMPLE = 1 << 15  # elements of each chunk that are compressed, to say what a diff compresses to
MEAN_BYTES = 1 << 28  # of an embedding's columns in float32 while their mean is taken


def take_difference(chunk: Chunk, exact: bool, row: torch.Tensor | None, not_finite: NotFinite) -> float:
    """Fills the buffers "diff" and, for subtract, "recovered" (both float32) from ``chunk.raw`` and ``chunk.other``.

    Args:
        chunk: ``raw`` and ``other`` (tuned) are read.
        exact: the difference of the bits, as integers.
        row: what is subtracted from rows that training added. (columns,) float32; None for zeros.
        not_finite: is told.

    Returns:
        The largest difference between recovered and tuned, where both are finite; 0 for exact.
    """
    tuned, largest = chunk.other, 0.0
    if exact:
        bits = BITS[tuned.dtype]
        base = _grown(chunk, tuned.dtype, None)
        torch.sub(tuned.view(bits), base.view(bits), out=chunk.buffer("diff", bits))
        suspicious = True  # bits do not say it
    else:
        base, values = _grown(chunk, torch.float32, row), _converted(chunk, tuned, torch.float32)
        diff = torch.sub(values, base, out=chunk.buffer("diff", torch.float32))
        recovered = torch.add(diff, base, out=chunk.buffer("recovered", torch.float32))
        error = torch.sub(recovered, values, out=chunk.buffer("error", torch.float32))
        suspicious = not _finite(diff)
        if suspicious:
            error.nan_to_num_(0.0, 0.0, 0.0)
        largest = error.abs_().max().item() if chunk.count else 0.0
    if suspicious:
        not_finite.look(chunk.name, {"--path_raw": chunk.raw, "--path_tuned": tuned})
    return largest


def add_difference(chunk: Chunk, dtype: torch.dtype, row: torch.Tensor | None, not_finite: NotFinite) -> float:
    """Fills the buffer "recovered" from ``chunk.raw`` and ``chunk.other``.

    Args:
        chunk: ``raw`` and ``other`` (diff) are read; an integer diff is one of bits.
        dtype: of what comes out.
        row: as in ``take_difference``.
        not_finite: is told.

    Returns:
        The sum of all values.
    """
    diff, recovered = chunk.other, chunk.buffer("recovered", dtype)
    base = _grown(chunk, dtype, row)
    looked_at = {"--path_raw": chunk.raw, "the recovered model": recovered}
    if exact := not diff.dtype.is_floating_point:
        torch.add(diff, base.view(diff.dtype), out=recovered.view(diff.dtype))
    else:
        torch.add(_converted(chunk, diff, dtype), base, out=recovered)
        looked_at["--path_diff"] = diff
    total = _sum(recovered)
    if not math.isfinite(total):
        not_finite.look(chunk.name, looked_at)
    elif exact:  # whose bits may make a finite number of a NaN
        not_finite.look(chunk.name, {"--path_raw": chunk.raw})
    return total


def check_floats(reader: CheckpointReader) -> None:
    """Raises UserError unless all tensors are of the types that there are differences of."""
    for name, (kind, _) in reader.specs().items():
        if kind not in BITS:
            raise UserError(f"{reader.folder}: {name} is {kind}: weights are floating point; a quantized model?")


def recovered_specs(manifest: dict, diff: CheckpointReader, specs: Specs) -> Specs:
    """name → (dtype, shape) of what comes out: float32 of values, tuned's type of bits.

    Args:
        manifest: the diff's.
        diff: whose types are checked.
        specs: the diff's.

    Raises:
        UserError: the diff holds other types than its method's.
    """
    if manifest.get("method") == "exact":
        recovered = {name: (DTYPES.get(manifest["dtypes"].get(name)), shape) for name, (_, shape) in specs.items()}
        if odd := [name for name, (kind, _) in recovered.items() if BITS.get(kind) != specs[name][0]]:
            raise UserError(f"{diff.folder / MANIFEST} does not fit the weights beside it ({some(odd)}): download both")
        return recovered
    if not manifest and all(kind in BITS.values() for kind, _ in specs.values()):
        raise UserError(
            f"--path_diff {diff.folder} holds whole numbers, as a diff of the method exact does, and no method in a "
            f"{MANIFEST}: download that file too"
        )
    check_floats(diff)
    return {name: (torch.float32, shape) for name, (_, shape) in specs.items()}


class NotFinite:
    """Which tensors of which model have NaN or infinite values."""

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
    """The float32 ``.mean(dim=0)`` of a matrix, which the original gives the row of a new token. (columns,)

    ATen adds up each column on its own, in vectors of at most 64 columns; so blocks of 64 columns have the bits of the
    whole, and a large matrix is never in memory (but for a width that 64 does not divide: columns that are left over
    are added up in another order). The bits depend on the processor, not on the number of threads.
    """
    dtype, (rows, width) = raw.spec(name)
    block = max(64, MEAN_BYTES // 4 // max(rows, 1) // 64 * 64) if width % 64 == 0 else width
    step = max(1, chunks.CHUNK // max(width, 1))  # rows that are read at once
    buffer, means = torch.empty(min(step, rows) * width, dtype=dtype), []
    for left in range(0, width, block):
        columns = torch.empty(rows, min(block, width - left))
        for top in range(0, rows, step):
            count = min(step, rows - top)
            values = raw.read(name, top * width, buffer[: count * width]).view(count, width)
            columns[top : top + count] = values[:, left : left + block]
        means.append(columns.mean(dim=0))
    return torch.cat(means)


def read_pair(chunk: Chunk, raw: CheckpointReader, other: CheckpointReader) -> None:
    """Fills ``chunk.raw``, which is shorter where the chunk reaches into rows that training added, and ``other``."""
    dtype, shape = raw.spec(chunk.name)
    chunk.raw = chunk.buffer("raw", dtype, max(0, min(chunk.count, numel(shape) - chunk.start)))
    if len(chunk.raw):
        raw.read(chunk.name, chunk.start, chunk.raw)
    chunk.other = other.read(chunk.name, chunk.start, chunk.buffer("other", other.spec(chunk.name)[0]))


def _grown(chunk: Chunk, dtype: torch.dtype, row: torch.Tensor | None) -> torch.Tensor:
    """raw's elements in another type, followed by those of new rows: ``row`` again and again, or zeros.

    Mean rows are good for the original's difference; for an exact one zeros do, which are the same on all machines.
    """
    count = len(chunk.raw)
    if count == chunk.count and chunk.raw.dtype == dtype:
        return chunk.raw
    values = chunk.buffer("grown", dtype)
    values[:count] = chunk.raw
    if count < chunk.count:  # a row begins at each multiple of its length, in the file and after it
        places = torch.arange(chunk.start + count, chunk.start + chunk.count)
        values[count:] = 0 if row is None else row[places % len(row)]
    return values


def _converted(chunk: Chunk, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values themselves where they are of that type already."""
    return values if values.dtype == dtype else chunk.buffer("as", dtype).copy_(values)


def _sum(values: torch.Tensor) -> float:
    """float32 sums of 4,096 values, added up in float64: twice as precise as one float32 sum."""
    whole = len(values) // 4096 * 4096
    parts = values[:whole].view(-1, 4096).sum(dim=1, dtype=torch.float32)
    return (parts.double().sum() + values[whole:].double().sum()).item()


def _finite(values: torch.Tensor) -> bool:
    """One pass: a sum is finite only if all its terms are; where it is not, it may have been too large."""
    return math.isfinite(values.sum(dtype=torch.float32).item()) or bool(values.isfinite().all())


def compressed_size(data: torch.Tensor) -> float:
    """Bytes after zlib, judged by those in the middle."""
    middle = data[max(0, len(data) - SAMPLE) // 2 :][:SAMPLE]
    return len(zlib.compress(middle.view(torch.uint8).numpy(), 1)) * len(data) / max(len(middle), 1)
