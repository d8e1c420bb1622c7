"""The tasks of cluster.py, and which texts may be near-duplicates: the bounds of rouge.py, and positions (PPJoin).

All is done for many texts at once, by NumPy and Arrow. A second "the" in a text is a token of its own, as in rouge.py,
so the tokens that two texts share are an intersection.

Texts of m and n tokens with F > t share s > t·(m + n)/2 tokens. One of these is among the m - floor(m·r) rarest of the
first and the n - floor(n·r) rarest of the second, r = t/(2 - t). cluster.py sends texts to the cells of these tokens.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cpdist

from alpaca.common.files import replace_file
from alpaca.common.records import read_entries, read_records
from alpaca.common.shapes import whole_text
from alpaca.data.rouge import CHARACTERS, _f_measure, is_mostly_unseen, pruning, tokenizer_named

UNIT = 50_000  # texts of a task: about 100 MB of Python objects
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


# ---------------------------------------------------------------------------------------------------------------------
# Tasks: from a file to a file.


def _save(path: Path, table: pa.Table) -> None:
    with replace_file(path, "wb") as file:
        pq.write_table(table, file)


def records_of(shard: str, fields: str | None, said: list[str]) -> Iterator[dict]:
    """Yield the records of a shard, which may be empty."""
    if next(read_entries(shard), None) is not None:
        yield from (record for _, record in read_records(shard, fields, said.append))


def write_words(path: Path, shard: str, tokenizer: str, fields: str | None) -> None:
    """Write the tokens of each text to NAME.texts, in row groups of UNIT, and the shard's counts of tokens to NAME."""
    tokenize, counts, said, unseen, records = tokenizer_named(tokenizer), Counter(), [], 0, 0
    schema = pa.schema({"keys": pa.list_(pa.string()), "high": pa.uint64(), "low": pa.uint64()})
    with (
        replace_file(path.with_suffix(".texts"), "wb") as file,
        pq.ParquetWriter(file, schema) as writer,
    ):
        found = (whole_text(record) for record in records_of(shard, fields, said))
        while texts := list(islice(found, UNIT)):
            keys = [_keys(tokenize(text)) for text in texts]
            for text in keys:
                counts.update(text)
            digests = b"".join(hashlib.blake2b(" ".join(text).encode(), digest_size=16).digest() for text in keys)
            high, low = np.frombuffer(digests, np.uint64).reshape(-1, 2).T
            writer.write_table(pa.table([keys, high, low], schema=schema), row_group_size=UNIT)
            unseen += tokenizer == "rouge" and sum(map(is_mostly_unseen, texts))
            records += len(texts)
    table = pa.table({"key": pa.array(counts.keys(), pa.string()), "count": pa.array(counts.values(), pa.int64())})
    about = {"records": str(records), "unseen": str(unseen), "said": "\n".join(said)}
    _save(path, table.replace_schema_metadata(about))


def _keys(tokens: list[str]) -> list[str]:
    """Return tokens with a number after each repeat: "the", "the 1", "the 2"."""
    if len(set(tokens)) == len(tokens):
        return tokens
    seen: dict[str, Iterator[int]] = defaultdict(count)
    return [f"{token} {repeat}" if (repeat := next(seen[token])) else token for token in tokens]


def write_ids(
    path: Path, texts: Path, group: int, repeats: np.ndarray, threshold: float, keys: pa.Array, token_of: np.ndarray
) -> None:
    """Write a unit's texts as numbers of keys and of tokens to NAME.ids, and how many texts hold a key to NAME.

    A text that repeats an earlier one is left empty: it is dropped without a comparison.
    """
    column = pq.ParquetFile(texts).read_row_group(group, ["keys"])["keys"].combine_chunks()
    lengths = np.diff(column.offsets.to_numpy())
    numbers = pc.index_in(column.flatten(), value_set=keys).to_numpy(zero_copy_only=False).astype(np.int32)
    numbers = numbers[np.repeat(~repeats, lengths)]
    offsets = offsets_of(np.where(repeats, 0, lengths)).astype(np.int32)
    columns = {name: pa.ListArray.from_arrays(offsets, one) for name, one in [("k", numbers), ("t", token_of[numbers])]}
    _save(path.with_suffix(".ids"), pa.table(columns))
    held, count = np.unique(rarest(numbers, offsets, threshold)[0], return_counts=True)
    _save(path, pa.table({"key": held, "count": count}))


def spread_unit(ids: Path, start: int, threshold: float, wanted: list[int], plan: tuple) -> list[tuple] | tuple:
    """Return what a unit sends to each partition: entries (cell, text, position, side) and their texts."""
    table = pq.read_table(ids)
    columns = [table[name].combine_chunks() for name in ("k", "t")]
    numbers, tokens = (column.flatten().to_numpy() for column in columns)
    offsets = columns[0].offsets.to_numpy().astype(np.int64)
    bits = np.zeros(len(offsets) - 1, np.uint64)
    full = np.diff(offsets) > 0
    if full.any():
        one = np.uint64(1) << (numbers.astype(np.uint64) & np.uint64(63))
        bits[full] = np.bitwise_xor.reduceat(one, offsets[:-1][full])
    key, text, position = rarest(numbers, offsets, threshold)
    first, chunks, partition = plan
    times = chunks[key]  # a text of chunk a goes to the cells (a, ·) as a row and to (·, a) as a column
    entry = np.repeat(np.arange(len(key)), times)
    key, text, position, other = key[entry], text[entry], position[entry], spans(np.zeros_like(times), times)
    mine = (start + text) % chunks[key]
    low, high = np.minimum(mine, other), np.maximum(mine, other)
    side = ((mine <= other) + 2 * (mine >= other)).astype(np.uint8)  # 1: row, 2: column, 3: both
    cell = first[key] + low * chunks[key] + high
    place = partition[cell]
    sent = []
    for p in wanted:
        here = (place == p).nonzero()[0]
        texts, local = np.unique(text[here], return_inverse=True)
        lengths = np.diff(offsets)[texts]
        entries = cell[here], local.astype(np.int32), position[here].astype(np.int32), side[here]
        sent.append((entries, start + texts, lengths, bits[texts], tokens[spans(offsets[texts], lengths)]))
    return sent if len(wanted) > 1 else sent[0]


def write_pairs(path: Path, threshold: float, *sent: tuple) -> None:
    """Write the pairs of a partition's texts that have F > threshold: earlier and later number."""
    shift = offsets_of(np.array([len(texts) for _, texts, *_ in sent]))
    cell, text, position, side = (np.concatenate([entries[i] for entries, *_ in sent]) for i in range(4))
    text = text + np.repeat(shift[:-1], [len(entries[0]) for entries, *_ in sent])
    number, lengths, bits, tokens = (np.concatenate([one[i] for one in sent]) for i in range(1, 5))
    offsets, strings = offsets_of(lengths), _as_characters(tokens)
    found = [np.zeros((0, 2), np.int64)]
    for i, j in candidates(cell, text, position, side, number, lengths[text], bits[text], threshold):
        one, two = ([strings[offsets[k] : offsets[k + 1]] for k in which.tolist()] for which in (i, j))
        lcs = cpdist(one, two, scorer=LCSseq.similarity, dtype=np.int32)
        near = _f_measure(lcs, lengths[i].astype(np.float64), lengths[j].astype(np.float64)) > threshold
        found.append(np.sort(np.stack([number[i[near]], number[j[near]]], axis=1), axis=1))
    pairs = np.unique(np.concatenate(found), axis=0)
    _save(path, pa.table({"earlier": pairs[:, 0], "later": pairs[:, 1]}))


def _as_characters(tokens: np.ndarray) -> str | list[int]:
    """Return a character for each token, or its number where there are more tokens than characters."""
    known, numbers = np.unique(tokens, return_inverse=True)
    if len(known) > CHARACTERS:
        return numbers.tolist()
    return numbers.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
