"""The arithmetic of a weight diff, on some rows of a tensor at a time.

subtract is the original's float32 ``tuned - raw``. exact subtracts the bits as integers; their difference wraps around,
so nothing is lost. The memory of a run is that of a few blocks, whatever the size of a tensor.
"""

from __future__ import annotations

import math

import torch

from alpaca.common.text import counted
from alpaca.weights.checkpoint import CheckpointReader
from alpaca.weights.names import some
from alpaca.weights.pair import BITS

MEAN_BYTES = 1 << 24  # of an embedding's columns in float32 while their mean is taken


def take_difference(
    raw: torch.Tensor, tuned: torch.Tensor, exact: bool, row: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return rows of the diff, those that recover() makes of them, and the largest error of these (0 for exact).

    ``raw`` and ``tuned`` are the same rows in the stored types; tuned may have some more, that training added. From
    these ``row`` is subtracted, (columns,) float32; None for zeros. ``exact`` takes the difference of the bits.
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


class NotFinite(dict[str, set[str]]):
    """Collects which tensors have NaN or infinite values, by model."""

    def look(self, name: str, rows: dict[str, torch.Tensor]) -> None:
        """Look at rows of a tensor, by model."""
        for where, tensor in rows.items():
            if tensor.is_floating_point() and not is_finite(tensor):
                self.setdefault(where, set()).add(name)

    def warn(self) -> None:
        for where, names in self.items():
            print(f"warning: NaN or infinite values in {counted(len(names), 'tensor')} of {where}: {some(names)}")


def mean_row(raw: CheckpointReader, name: str) -> torch.Tensor:
    """Return the float32 ``.mean(dim=0)`` of a matrix, the original's row of a new token. (columns,)

    ATen adds up columns on their own, in vectors of at most 64: blocks of 64 columns give the bits of the whole. If 64
    does not divide the width, the last ones are added up in another order: then the matrix is taken whole. The bits
    depend on the processor, not on the number of threads.
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
