"""diff.py and hashes.py: chunks in order, threads that end, the arithmetic of the whole."""

from __future__ import annotations

import hashlib
import math
import threading
import time

import pytest
import torch
from made_models import folder_with

from alpaca import UserError
from alpaca.weights import diff, hashes
from alpaca.weights.checkpoint import CheckpointReader
from alpaca.weights.diff import Hashes, NotFinite, add_difference, mean_row, read_pair, run, take_difference
from alpaca.weights.hashes import check_checksums, in_threads
from alpaca.weights.tensor_files import crc32_of

F32 = torch.float32


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(diff, "CHUNK", 4)


SPECS = {"a": (F32, (3, 3)), "empty": (F32, (0,)), "scalar": (F32, ()), "b": (F32, (4,)), "c": (F32, (20,))}
PIECES = [("a", 0, 4), ("a", 4, 4), ("a", 8, 1), ("empty", 0, 0), ("scalar", 0, 1), ("b", 0, 4)]
PIECES += [("c", start, 4) for start in range(0, 20, 4)]


def test_every_step_sees_all_chunks_in_order_and_its_own_buffers():
    seen = {"read": [], "work": [], "after": [], "slow": []}

    def note(step: str, chunk) -> None:
        seen[step].append((chunk.name, chunk.start, chunk.count))

    def read(chunk) -> None:
        note("read", chunk)
        chunk.buffer("in", F32).fill_(len(seen["read"]))

    def work(chunk) -> None:
        note("work", chunk)
        torch.mul(chunk.buffer("in", F32), 2, out=chunk.buffer("out", F32))

    def slow(chunk) -> None:
        time.sleep(0.01)  # the buffers must not be filled again meanwhile
        note("slow", chunk)
        assert chunk.buffer("out", F32).tolist() == [2.0 * len(seen["slow"])] * chunk.count

    run(SPECS, read, work, [lambda chunk: note("after", chunk), slow])
    assert seen == dict.fromkeys(seen, PIECES)


@pytest.mark.parametrize("step", ["read", "work", "after 0", "after 1"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_an_error_in_any_thread_ends_the_run_and_the_threads(step, error):
    diff.progress(0, "").close()  # starts tqdm's own thread, which stays
    before, done = threading.active_count(), []

    def fails(name: str):
        def task(chunk) -> None:
            done.append(name)
            if name == step and chunk.name == "b":
                raise error("from " + name)

        return task

    many = SPECS | {f"more {i}": (F32, (100,)) for i in range(100)}
    with pytest.raises(error, match=f"from {step}"):
        run(many, fails("read"), fails("work"), [fails("after 0"), fails("after 1")])
    assert threading.active_count() == before
    assert done.count("work") <= 6 + diff.SETS  # what was under way, no more


def test_hashes_are_those_of_the_bytes_whatever_the_chunks():
    tensor = torch.arange(20, dtype=torch.float16)
    found = Hashes("x")

    def work(chunk) -> None:
        chunk.values["x"] = tensor[chunk.start : chunk.start + chunk.count]
        found.update(chunk)

    run(
        {"x": (torch.float16, (20,)), "y": (torch.float16, (5, 2)), "z": (torch.float16, (0,))},
        lambda _: None,
        work,
        [],
    )
    expected = {"x": tensor, "y": tensor[:10], "z": tensor[:0]}
    assert found.hex == {n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in expected.items()}


def test_threads_give_results_in_order_and_stop_at_the_first_error():
    def task(number: int, tick) -> int:
        time.sleep(0.01 * (5 - number))
        tick(1)
        if number == 3:
            raise ValueError("third")
        return number

    assert in_threads(task, [(0,), (1,), (2,)], [1, 1, 1], "test") == [0, 1, 2]
    before = threading.active_count()
    with pytest.raises(ValueError, match="third"):
        in_threads(task, [(0,), (3,), (2,)], [1, 1, 1], "test")
    assert threading.active_count() == before


def test_checksums_move_the_bar_as_they_go_and_hear_of_a_stop(tmp_path, monkeypatch):
    """A record of 9 MB: 4, 4 and 1; the tick that moves the bar may end the reading."""
    tensors = {"a": torch.zeros(9 << 18)}
    reader = CheckpointReader(folder_with(tmp_path / "model", pytorch_model__bin=tensors))
    [record] = [record for record in reader.checksums() if record[1] == "a"]
    ticks = []
    assert crc32_of(*record[:1], *record[2:4], ticks.append) == record[4]
    assert ticks == [4 << 20, 4 << 20, 1 << 20]

    def stopped(count: int) -> None:
        raise UserError("stopped")

    with pytest.raises(UserError, match="stopped"):
        crc32_of(*record[:1], *record[2:4], stopped)
    moved = []
    monkeypatch.setattr(hashes.tqdm, "update", lambda bar, count: moved.append(count))
    check_checksums(reader)
    assert max(moved) == 4 << 20 and sum(moved) == sum(size for *_, size, _ in reader.checksums())


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic.


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32])
def test_a_mean_in_blocks_of_columns_has_the_bits_of_the_whole(tmp_path, monkeypatch, threads, dtype):
    """Without AVX2 (ATEN_CPU_CAPABILITY=default) it has too, though other bits than with it."""
    monkeypatch.setattr(diff, "MEAN_BYTES", 1)  # blocks of 64 columns, the least
    monkeypatch.setattr(diff, "CHUNK", 1000)
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
    reader = CheckpointReader(folder_with(tmp_path / "model", model__safetensors=tensors))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name, tensor in tensors.items():
            assert torch.equal(mean_row(reader, name), tensor.float().mean(dim=0)), name
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("chunk", range(1, 17))
def test_new_rows_are_compared_with_the_mean_row_wherever_a_chunk_begins(tmp_path, monkeypatch, chunk):
    """[[1, 2, 0], [3, 6, 0]] grows by two times [2, 4, 0]; for the exact method by zeros."""
    monkeypatch.setattr(diff, "CHUNK", chunk)
    raw = CheckpointReader(
        folder_with(tmp_path / "raw", model__safetensors={"x": torch.tensor([[1.0, 2, 0], [3, 6, 0]]).half()})
    )
    values = torch.arange(12.0).reshape(4, 3) / 4
    tuned = CheckpointReader(folder_with(tmp_path / "tuned", model__safetensors={"x": values}))
    for exact in (False, True):
        row = None if exact else mean_row(raw, "x")
        assert exact or row.tolist() == [2, 4, 0]
        grown = torch.tensor([[1.0, 2, 0], [3, 6, 0], *([[0, 0, 0]] * 2 if exact else [[2, 4, 0]] * 2)])
        diffs, again = [], []

        def work(chunk, exact=exact, row=row, diffs=diffs, again=again):
            assert take_difference(chunk, exact, row, NotFinite()) == 0
            diffs.append(chunk.values["diff"].clone())
            add_difference(chunk, F32, row, NotFinite())
            again.append(chunk.values["recovered"].clone())

        run(tuned.specs(), lambda chunk: read_pair(chunk, raw, tuned, "tuned"), work, [])
        wanted = values.view(torch.int32) - grown.view(torch.int32) if exact else values - grown
        assert torch.equal(torch.cat(diffs), wanted.reshape(-1))
        assert torch.equal(torch.cat(again), values.reshape(-1))


def test_sums_of_chunks_are_precise_enough_for_the_released_sum():
    """7B is 1,607 chunks of 4 M, whose roundings add up like a random walk: sqrt(1607) of one must be below 0.0007."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for scale, shift in ((0.02, 0.0), (0.02, 1e-5), (0.01, 0.0), (0.04, -1e-5)):
        values = torch.randn(1 << 22, generator=generator).mul_(scale).add_(shift)
        chunk = diff.Chunk()
        chunk.count, chunk.values = len(values), {"raw": values, "diff": torch.zeros_like(values)}
        errors.append(add_difference(chunk, F32, None, NotFinite()) - values.double().sum().item())
    assert math.sqrt(1607 * sum(error**2 for error in errors) / len(errors)) < 0.0007
    assert max(map(abs, errors)) < 5e-5
