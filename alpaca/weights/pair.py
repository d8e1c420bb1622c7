"""Two models side by side: whether names, types and shapes fit; their rows, block by block, and their hashes."""

from __future__ import annotations

import hashlib
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

from alpaca import UserError
from alpaca.weights.checkpoint import CheckpointReader, Specs, as_bytes, size_of
from alpaca.weights.names import cause, fit_names, vocab_size

BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
AHEAD = 4  # blocks that are read while others are worked on


def matching_specs(raw: CheckpointReader, other: CheckpointReader, flags: tuple[str, str]) -> Specs:
    """Give raw's tensors the other's names, and return the other's name → (dtype, shape); UserError if they differ."""
    check_floats(raw, flags[0])
    fit_names(raw, flags[0], other.names(), flags[1], other.config)
    specs, vocabularies = other.specs(), (vocab_size(raw.config), vocab_size(other.config))
    for name, (_, shape) in specs.items():
        before, why = raw.spec(name)[1], None
        if shape != before:
            # An embedding, or the output's bias, which Phi and GPT-J have, may have more rows.
            if before and shape and len(shape) < 3 and before[1:] == shape[1:]:
                if (before[0], shape[0]) == vocabularies and before[0] < shape[0]:
                    continue
                why = _vocabulary_cause((before[0], shape[0]), vocabularies, flags)
            why = why or cause([name], raw.config, other.config)
            said = f"{name} is {list(before)} in {flags[0]} but {list(shape)} in {flags[1]}"
            raise UserError(f"{said}: {why}; or are {flags[0]} and {flags[1]} swapped?")
    return specs


def _vocabulary_cause(rows: tuple[int, int], vocabularies: tuple, flags: tuple[str, str]) -> str | None:
    """Return what is wrong with the rows of raw's and the other's embedding; None if they are not embeddings."""
    wrong = [i for i in (0, 1) if rows[i] != vocabularies[i]]
    if len(wrong) == 1:
        flag, said, are = (found[wrong[0]] for found in (flags, vocabularies, rows))
        return f"the config.json of {flag} has vocab_size {said}, its embeddings have {are} rows"
    padded = ", perhaps padded," if rows[0] % 8 == 0 else ""
    cure = f"the larger vocabulary{padded} is that of {flags[0]}, resize_token_embeddings({rows[1]}) makes it fit"
    return None if wrong else cure


def check_floats(reader: CheckpointReader, what: str = "") -> None:
    """Raise UserError unless all tensors are floating-point numbers of 16, 32 or 64 bits."""
    for name, (kind, _) in reader.specs().items():
        if kind not in BITS:
            config = reader.config.get("quantization_config")
            how = f"is quantized ({config.get('quant_method')})" if isinstance(config, dict) else "seems quantized"
            why = f"{name} is {str(kind).removeprefix('torch.')}, not floating point"
            raise UserError(f"{what} {reader.folder} {how}: {why}; give the unquantized model".strip())


def pairs(
    names: Collection[str], raw: CheckpointReader, other: CheckpointReader, what: str, work: Callable | None = None
) -> Iterator:
    """Yield (name, raw's rows, the other's rows) of all blocks of the named tensors, behind a progress bar ``what``.

    raw has fewer rows in a block that reaches into rows that training added. ``work`` makes of a triple what is yielded
    in its place. It runs in a thread of its own, ahead of the caller, and so keeps a second processor busy.
    """

    def read() -> Iterator[tuple]:
        for name in names:
            for block in other.blocks(name):
                triple = name, raw.rows(name, *block), other.rows(name, *block)
                yield work(*triple) if work else triple, triple[2].nbytes

    left, threads = read(), torch.get_num_threads()
    # torch's own threads wait for work in a busy loop: 29 s of processor time instead of 20 at 1.1 B.
    torch.set_num_threads(1)
    try:
        with progress(other, names, what) as bar, ThreadPoolExecutor(1) as pool:
            due = deque(pool.submit(next, left, None) for _ in range(AHEAD))
            while (found := due.popleft().result()) is not None:
                due.append(pool.submit(next, left, None))
                yield found[0]
                bar.update(found[1])
    finally:
        torch.set_num_threads(threads)


def progress(reader: CheckpointReader, names: Collection[str], what: str) -> tqdm:
    """Return a bar in the tensors' bytes. Into a file it prints twice a minute, or it would fill the file."""
    size, every = size_of({name: reader.spec(name) for name in names}), 0.2 if sys.stderr.isatty() else 30
    return tqdm(total=size, desc=what, unit="B", unit_scale=True, mininterval=every, maxinterval=every)


class Hashes:
    """SHA-256 of each tensor's bytes, little-endian in their type, whatever the shards and file format.

    A thread hashes a block while its caller continues: hashing, 2 GB/s, takes longer than all of the arithmetic.
    """

    def __init__(self):
        self._digests, self._pool = defaultdict(hashlib.sha256), ThreadPoolExecutor(1)
        self._due = self._pool.submit(bool)

    def update(self, name: str, rows: torch.Tensor) -> None:
        """Leave the next rows, whose values must stay as they are, to the thread, once it is done with those before."""
        self._due.result()
        self._due = self._pool.submit(self._digests[name].update, as_bytes(rows).numpy())

    def hex(self) -> dict[str, str]:
        self._due.result()
        return {name: digest.hexdigest() for name, digest in self._digests.items()}


def sha256_of_all(reader: CheckpointReader, names: Collection[str], what: str) -> dict[str, str]:
    """Return name → SHA-256 of the tensors as they are stored; ``what`` is the bar's name."""

    def sha256(name: str) -> str:
        digest = hashlib.sha256()
        for block in reader.blocks(name):
            digest.update(as_bytes(reader.rows(name, *block)).numpy())
        bar.update(size_of({name: reader.spec(name)}))
        return digest.hexdigest()

    with progress(reader, names, what) as bar, ThreadPoolExecutor(4) as pool:  # some wait for the disk
        return dict(zip(names, pool.map(sha256, names), strict=True))
