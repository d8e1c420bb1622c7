"""diff.py and pair.py: blocks in order, a thread that ends, the arithmetic of the whole."""

from __future__ import annotations

import hashlib
import math
import threading

import pytest
import torch
from made_models import folder_with

from alpaca.weights import checkpoint, diff, pair
from alpaca.weights.checkpoint import CheckpointReader
from alpaca.weights.diff import add_difference, mean_row, precise_sum, take_difference
from alpaca.weights.pair import Hashes, pairs, sha256_of_all

F32 = torch.float32


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(checkpoint, "BLOCK", 4)


def reader_of(path, **tensors: torch.Tensor) -> CheckpointReader:
    return CheckpointReader(folder_with(path, model__safetensors=tensors))


def test_the_rows_of_both_come_in_order_and_the_thread_is_a_little_ahead(tmp_path):
    shapes = {"a": (3, 3), "b": (4,), "c": (20,), "empty": (0,), "scalar": (), "wide": (2, 9)}
    generator = torch.Generator().manual_seed(0)
    one, other = (
        reader_of(tmp_path / part, **{n: torch.randn(shape, generator=generator) for n, shape in shapes.items()})
        for part in ("one", "other")
    )
    worked, seen = [], []

    def work(name, x, y):
        worked.append(name)
        return name, x, y

    for name, x, y in pairs(shapes, one, other, "test", work):
        seen.append((name, x, y))
        assert len(seen) <= len(worked) <= len(seen) + pair.AHEAD
    assert worked == [name for name, *_ in seen]
    assert len(list(pairs(shapes, one, other, "test"))) == len(seen)
    assert [(name, len(x)) for name, x, _ in seen if name != "c"] == [
        *[("a", 1)] * 3,
        ("b", 4),
        ("empty", 0),
        ("scalar", 1),
        *[("wide", 1)] * 2,
    ]
    for name in shapes:
        for side, reader in ((1, one), (2, other)):
            rows = torch.cat([triple[side] for triple in seen if triple[0] == name])
            assert rows.tolist() == reader.rows(name, 0, 100).tolist()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("where", ["thread", "caller"])
def test_an_error_ends_the_run_and_the_thread(tmp_path, where, error):
    reader = reader_of(tmp_path / "model", **{f"{i:03}": torch.ones(8) for i in range(100)})
    list(pairs(["000"], reader, reader, "start"))  # starts tqdm's own thread, which stays
    before, threads, done = threading.active_count(), torch.get_num_threads(), []

    def fails(name: str, *rows: torch.Tensor) -> tuple:
        done.append(name)
        if name == "010":
            raise error("from " + where)
        return name, *rows

    run = pairs(reader.names(), reader, reader, "test", fails if where == "thread" else None)
    with pytest.raises(error, match=f"from {where}"):
        for name, *_ in run:
            if where == "caller":
                fails(name)
    run.close()
    assert threading.active_count() == before and torch.get_num_threads() == threads
    assert set(done) <= {f"{i:03}" for i in range(11 + pair.AHEAD)}


def test_hashes_are_those_of_the_bytes_whatever_the_blocks(tmp_path):
    tensors = {
        "x": torch.arange(20).half(),
        "y": torch.arange(10.0).view(5, 2),
        "z": torch.ones(0),
        "s": torch.tensor(2),
    }
    expected = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}
    assert sha256_of_all(reader_of(tmp_path / "model", **tensors), list(tensors), "test") == expected
    found = Hashes()
    for part in torch.arange(20).view(2, 10).T.split(3):  # not contiguous
        found.update("columns", part)
    wanted = torch.arange(20).view(2, 10).T.contiguous().numpy().tobytes()
    assert found.hex() == {"columns": hashlib.sha256(wanted).hexdigest()}


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic.


@pytest.mark.parametrize("layout", ["model__safetensors", "pytorch_model__bin"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32])
def test_a_mean_in_blocks_of_columns_has_the_bits_of_the_whole(tmp_path, monkeypatch, threads, dtype, layout):
    """Without AVX2 (ATEN_CPU_CAPABILITY=default) it has too, though other bits than with it."""
    monkeypatch.setattr(diff, "MEAN_BYTES", 1)  # blocks of 64 columns, the least
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (1, 1),
        (1, 100),
        (5, 33),
        (300, 64),
        (300, 65),
        (1000, 100),
        (777, 200),
        (3000, 257),
        (3000, 128),
        (400, 1024),
    ]
    tensors = {str(s): (torch.randn(s, generator=generator) * 0.02).to(dtype) for s in shapes}
    reader = CheckpointReader(folder_with(tmp_path / "model", **{layout: tensors}))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name, tensor in tensors.items():
            assert torch.equal(mean_row(reader, name), tensor.float().mean(dim=0)), name
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("block", range(1, 17))
def test_new_rows_are_compared_with_the_mean_row_wherever_a_block_begins(tmp_path, monkeypatch, block):
    """[[1, 2, 0], [3, 6, 0]] grows by two times [2, 4, 0]; for the exact method by zeros."""
    monkeypatch.setattr(checkpoint, "BLOCK", block)
    raw = reader_of(tmp_path / "raw", x=torch.tensor([[1.0, 2, 0], [3, 6, 0]]).half())
    values = torch.arange(12.0).reshape(4, 3) / 4
    tuned = reader_of(tmp_path / "tuned", x=values)
    for exact in (False, True):
        row = None if exact else mean_row(raw, "x")
        assert exact or row.tolist() == [2, 4, 0]
        grown = torch.tensor([[1.0, 2, 0], [3, 6, 0], *([[0, 0, 0]] * 2 if exact else [[2, 4, 0]] * 2)])
        diffs, again = [], []
        for _, raw_rows, tuned_rows in pairs(["x"], raw, tuned, "test"):
            found, recovered, error = take_difference(raw_rows, tuned_rows, exact, row)
            assert error == 0
            diffs.append(found)
            again.append(add_difference(raw_rows, found, F32, row))
            assert torch.equal(recovered, again[-1])
        wanted = values.view(torch.int32) - grown.view(torch.int32) if exact else values - grown
        assert torch.equal(torch.cat(diffs), wanted)
        assert torch.equal(torch.cat(again), values)


def test_sums_of_blocks_are_precise_enough_for_the_released_sum():
    """7B is 1,607 blocks of 4 M, whose roundings add up like a random walk: sqrt(1607) of one must be below 0.0007."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for scale, shift in ((0.02, 0.0), (0.02, 1e-5), (0.01, 0.0), (0.04, -1e-5)):
        values = torch.randn(1 << 22, generator=generator).mul_(scale).add_(shift)
        errors.append(precise_sum(values.view(1 << 11, -1)) - values.double().sum().item())
    assert math.sqrt(1607 * sum(error**2 for error in errors) / len(errors)) < 0.0007
    assert max(map(abs, errors)) < 5e-5
