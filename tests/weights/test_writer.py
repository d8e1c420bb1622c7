"""alpaca/weights/writer.py: safetensors shards, planned first and written in sequence."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from made_models import whole
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from alpaca import UserError
from alpaca.common import files
from alpaca.weights.checkpoint import CheckpointReader, read_json
from alpaca.weights.folder import copy_side_files, model_folder
from alpaca.weights.writer import DTYPES, ShardWriter


def write_weights(folder: Path, specs: dict, tensors, max_shard_bytes: int = 5 * 10**9) -> None:
    with ShardWriter(folder, specs, f"{max_shard_bytes / 1000}KB") as writer:
        for name, tensor in zip(specs, tensors, strict=True):
            writer.write(name, tensor)


def specs_of(tensors: dict) -> dict:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def test_what_is_written_is_read_by_safetensors_whatever_the_type_and_shape(tmp_path):
    tensors = {
        f"{name} {shape}": (torch.arange(9)[: torch.Size(shape).numel()] % 2).to(dtype).reshape(shape)
        for name, dtype in DTYPES.items()
        for shape in [(), (0,), (3,), (2, 0, 4), (3, 1)]
    }
    tensors["a view"] = torch.arange(6.0).reshape(2, 3).T  # not contiguous
    write_weights(tmp_path, specs_of(tensors), tensors.values())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    read = load_file(tmp_path / "model.safetensors")
    assert specs_of(read) == specs_of(tensors)
    assert {name: tensor.tolist() for name, tensor in read.items()} == {n: t.tolist() for n, t in tensors.items()}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers wants it


@pytest.mark.parametrize("name", ["x" * length for length in range(1, 9)] + ["ключ"])
def test_data_starts_at_a_multiple_of_eight_bytes(tmp_path, name):
    write_weights(tmp_path, {name: (torch.float32, (1,))}, [torch.tensor([7.0])])
    data = (tmp_path / "model.safetensors").read_bytes()
    header = int.from_bytes(data[:8], "little")
    assert header % 8 == 0
    assert len(data) == 8 + header + 4
    assert json.loads(data[8 : 8 + header])[name] == {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    assert load_file(tmp_path / "model.safetensors")[name].tolist() == [7.0]


@pytest.mark.parametrize(
    ("max_shard_bytes", "shards"),
    [
        (100, [["a", "b", "c", "d"]]),
        (24, [["a", "b", "c", "d"]]),  # 8 + 8 + 0 + 8 just fit
        (23, [["a", "b", "c"], ["d"]]),
        (16, [["a", "b", "c"], ["d"]]),
        (15, [["a"], ["b", "c"], ["d"]]),
        (8, [["a"], ["b", "c"], ["d"]]),
        (1, [["a"], ["b"], ["d"], ["c"]]),  # one tensor may be larger; the library puts small ones behind
    ],
)
def test_a_shard_is_closed_before_it_would_grow_beyond_the_limit(tmp_path, max_shard_bytes, shards):
    """a and b take 8 bytes, c none, d 8."""
    tensors = {
        "a": torch.tensor([1.0, 2.0]),
        "b": torch.tensor([3, 4, 5, 6], dtype=torch.int16),
        "c": torch.ones(0),
        "d": torch.tensor(7.0, dtype=torch.float64),
    }
    write_weights(tmp_path, specs_of(tensors), iter(tensors.values()), max_shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [sorted(load_file(file)) for file in files] == shards
    assert {n: t.tolist() for file in files for n, t in load_file(file).items()} == {
        n: t.tolist() for n, t in tensors.items()
    }
    if len(shards) == 1:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]
        return
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    assert [file.name for file in files] == names
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 24},
        "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    (tmp_path / "config.json").write_text("{}")
    assert whole(CheckpointReader(tmp_path), "d").item() == 7.0


def test_a_tensor_that_has_not_come_makes_a_file_that_does_not_load(tmp_path):
    with ShardWriter(tmp_path, {"a": (torch.float32, (2,)), "b": (torch.float32, (1,))}, "1KB") as writer:
        writer.write("a", torch.ones(2))
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "model.safetensors")


def test_pieces_of_a_tensor_make_the_file_of_the_whole(tmp_path):
    tensors = {"a": torch.arange(10.0), "b": torch.arange(7), "c": torch.ones(0), "d": torch.tensor(2.0)}
    (tmp_path / "whole").mkdir()
    (tmp_path / "pieces").mkdir()
    write_weights(tmp_path / "whole", specs_of(tensors), tensors.values(), 60)
    with ShardWriter(tmp_path / "pieces", specs_of(tensors), "0.06KB") as writer:
        pieces = {name: list(tensor.reshape(-1).split(3)) for name, tensor in tensors.items()}
        for number in range(4):  # a piece of each in turn
            for name, left in pieces.items():
                if number < len(left):
                    writer.write(name, left[number])
    files = sorted((tmp_path / "whole").iterdir())
    assert [file.name for file in files] == sorted(path.name for path in (tmp_path / "pieces").iterdir())
    assert len(files) == 3  # two shards and an index
    assert all(file.read_bytes() == (tmp_path / "pieces" / file.name).read_bytes() for file in files)


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(UserError, match="has 0.00 GB free, and 0.07 GB are needed: free some"):
        ShardWriter(tmp_path, {"a": (torch.float32, (2**24,))}, "1GB")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "5", "GB", "5GBs", "5PB", "five", "9" * 400 + "B", "infGB", "nanMB"])
def test_what_is_no_size_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="max_shard_size must be a size such as 5GB or 500MB, not '"):
        ShardWriter(tmp_path, {"a": (torch.float32, (2,))}, text)


def test_a_sharded_model_of_ours_loads_with_from_pretrained(tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    tensors = load_file(tiny_llama / "model.safetensors")
    folder = tmp_path / "model"
    with model_folder(folder) as unfinished:
        write_weights(unfinished, specs_of(tensors), tensors.values(), max_shard_bytes=100_000)
        copy_side_files(tiny_llama, unfinished, read_json(tiny_llama / "config.json"))
    tmp_path = folder
    assert [len(load_file(file)) for file in sorted(tmp_path.glob("model-*.safetensors"))] == [1, 2, 4, 6, 5, 3]
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def test_a_disk_that_takes_no_advice_is_written_to_all_the_same(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    write_weights(tmp_path, {"a": (torch.float32, (2,))}, [torch.tensor([1.0, 2.0])])
    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == [1.0, 2.0]
