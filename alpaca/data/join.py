"""Which texts may be near-duplicates, by NumPy for many texts at once: the bounds of rouge.py, and positions (PPJoin).

Texts of m and n tokens with F > t share s > t·(m + n)/2 tokens. One of these is among the m - floor(m·r) rarest of the
first and the n - floor(n·r) rarest of the second, r = t/(2 - t). cluster.py sends texts to the cells of these tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from alpaca.data.rouge import pruning

PAIRS_AT_ONCE = 1 << 21  # compared at a time: 40 MB
DENSE = 4096  # a block of so many pairs is compared as a matrix, in a tenth of the time that a list takes


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the numbers start, …, start + length - 1 of each span, one after the other."""
    return np.repeat(starts - offsets_of(lengths)[:-1], lengths) + np.arange(lengths.sum())


def rarest(numbers: np.ndarray, offsets: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the keys that may be the rarest in common with another text, the number of the text, and the position."""
    lengths = np.diff(offsets)
    text = np.repeat(np.arange(len(lengths)), lengths)
    ordered = numbers[np.lexsort((numbers, text))]
    position = np.arange(len(ordered)) - offsets[text]
    rare = position < (lengths - (lengths * pruning(threshold)[1]).astype(np.int64))[text]
    return ordered[rare], text[rare], position[rare]


def slices(sizes: np.ndarray, most: int) -> Iterator[slice]:
    """Yield consecutive slices with at most ``most`` in all, or of one item."""
    ends, start = np.cumsum(sizes), 0
    while start < len(sizes):
        stop = max(start + 1, int(np.searchsorted(ends, (ends[start - 1] if start else 0) + most, "right")))
        yield slice(start, stop)
        start = stop


def candidates(cell, text, position, side, number, lengths, bits, threshold) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs of texts that meet in a cell and may have F > threshold; a pair may come more than once.

    Entries are compared in blocks: rows of one cell and length m with columns of the same cell and length n. The rarest
    common token of a pair that shares s tokens has at least s - 1 behind it in both texts, so a block has only the rows
    at positions up to m - s, and columns up to n - s (PPJoin). Texts differ in m + n - 2s tokens, and so in at most as
    many of their 64 bits.
    """
    cut, ratio = pruning(threshold)
    top = int(lengths.max(initial=0)) + 2
    runs = []
    for bit in (1, 2):
        (mine,) = (side & bit).nonzero()
        mine = mine[np.lexsort((position[mine], lengths[mine], cell[mine]))]
        run = cell[mine] * top + lengths[mine]  # of one cell and length
        names, starts = np.unique(run, return_index=True)
        at = np.searchsorted(names, run) * top + position[mine]
        runs.append((mine, names, starts, at))
    (rows, row_run, row_start, row_at), (columns, column_run, column_start, column_at) = runs
    m, own = row_run % top, row_run - row_run % top
    within = side[rows[row_start]] == 3  # rows and columns are the same texts, so longer columns are enough
    least = np.where(within, m, (m * ratio).astype(np.int64))
    longest = np.full_like(m, top - 1) if ratio == 0 else np.minimum((m / ratio).astype(np.int64) + 1, top - 1)
    first = np.searchsorted(column_run, own + least)
    many = np.searchsorted(column_run, own + longest, "right") - first
    for part in slices(many, PAIRS_AT_ONCE):
        a = np.repeat(np.arange(part.start, part.stop), many[part])
        b = spans(first[part], many[part])
        n, common = column_run[b] % top, (cut * (m[a] + column_run[b] % top) / 2).astype(np.int64) + 1
        r0, c0 = row_start[a], column_start[b]
        height = np.searchsorted(row_at, a * top + np.maximum(m[a] - common, -1), "right") - r0
        width = np.searchsorted(column_at, b * top + np.maximum(n - common, -1), "right") - c0
        (some,) = ((common <= np.minimum(m[a], n)) & (height > 0) & (width > 0)).nonzero()
        r0, c0, height, width = r0[some], c0[some], height[some], width[some]
        limit, half = (m[a] + n - 2 * common)[some], (within[a] & (m[a] == n))[some]
        for i, j, once in _near_in_bits(bits[rows], bits[columns], r0, c0, height, width, limit, half):
            i, j = text[rows[i]], text[columns[j]]
            (kept,) = (~once | (number[i] < number[j])).nonzero()
            yield i[kept], j[kept]


def _near_in_bits(row_bits, column_bits, r0, c0, height, width, limit, half) -> Iterator[tuple]:
    """Yield the pairs of each block whose bits differ in at most ``limit`` places, and the block's ``half``."""
    area = height * width
    for k in (area >= DENSE).nonzero()[0]:
        high = column_bits[c0[k] : c0[k] + width[k]]
        for i in range(0, height[k], max(1, PAIRS_AT_ONCE // width[k])):
            low = row_bits[r0[k] + i : r0[k] + min(height[k], i + max(1, PAIRS_AT_ONCE // width[k]))]
            near = (np.bitwise_count(low[:, None] ^ high) <= min(limit[k], 64)).ravel().nonzero()[0]
            row, column = np.divmod(near, width[k])
            yield r0[k] + i + row, c0[k] + column, half[k]
    (small,) = (area < DENSE).nonzero()
    for part in slices(area[small], PAIRS_AT_ONCE):
        k = small[part]
        block = np.repeat(k, area[k])
        row, column = np.divmod(spans(np.zeros_like(k), area[k]), width[block])
        i, j = r0[block] + row, c0[block] + column
        (near,) = (np.bitwise_count(row_bits[i] ^ column_bits[j]) <= limit[block]).nonzero()
        yield i[near], j[near], half[block[near]]
