"""alpaca/checkpoint.py: safetensors and .bin shards in, safetensors shards out, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from alpaca import UserError
from alpaca.checkpoint import DTYPES, CheckpointReader, check_model_folder, read_json
from alpaca.folders import copy_side_files, new_folder
from alpaca.shards import ShardWriter

TENSORS = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3, 4]], dtype=torch.float16)}


def folder_with(path: Path, config: dict | None = None, **files) -> Path:
    """A folder with config.json and files by name (``__`` for a dot): tensors to save, JSON, text or bytes."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config or {}))
    for name, content in files.items():
        file = path / name.replace("__", ".")
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif file.suffix == ".safetensors":
            save_file(content, file)
        elif file.suffix == ".bin":
            torch.save(content, file)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def index(**weight_map) -> dict:
    return {"metadata": {}, "weight_map": {name: file.replace("__", ".") for name, file in weight_map.items()}}


def read_all(folder: Path) -> dict:
    reader = CheckpointReader(folder)
    return {name: (reader.spec(name), reader.get(name).tolist()) for name in reader.names()}


READ = {"a": ((torch.float32, (2,)), [1.0, 2.0]), "b": ((torch.float16, (1, 2)), [[3.0, 4.0]])}


# ---------------------------------------------------------------------------------------------------------------------
# In.


@pytest.mark.parametrize(
    "files",
    [
        {"model__safetensors": TENSORS},
        {"pytorch_model__bin": TENSORS},
        {
            "x__safetensors": {"a": TENSORS["a"]},
            "y__safetensors": {"b": TENSORS["b"]},
            "model__safetensors__index__json": index(a="x__safetensors", b="y__safetensors"),
        },
        {
            "x__bin": {"a": TENSORS["a"]},
            "y__bin": {"b": TENSORS["b"], "not in the index": torch.ones(1)},
            "pytorch_model__bin__index__json": index(a="x__bin", b="y__bin"),
        },
    ],
    ids=["safetensors", "bin", "safetensors-sharded", "bin-sharded"],
)
def test_every_layout_reads_the_same(tmp_path, files):
    assert read_all(folder_with(tmp_path / "model", **files)) == READ


def test_a_bin_from_before_the_zip_format_is_read(tmp_path):
    folder = folder_with(tmp_path / "model")
    torch.save(TENSORS, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert read_all(folder) == READ


def test_safetensors_come_before_a_bin_of_the_same_folder(tmp_path):
    other = {"a": torch.zeros(1)}
    folder = folder_with(
        tmp_path / "model", model__safetensors=TENSORS, pytorch_model__bin=other, training_args__bin=b"x"
    )
    assert read_all(folder) == READ


def test_a_link_into_the_cache_of_a_hub_is_followed(tmp_path):
    save_file(TENSORS, tmp_path / "blob")
    folder = folder_with(tmp_path / "model")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    assert read_all(folder) == READ


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({}, ["lm_head.weight", "x"]),
        ({"tie_word_embeddings": False}, ["lm_head.weight", "x"]),
        ({"tie_word_embeddings": True}, ["x"]),
        ({"model_type": "opt"}, ["x"]),  # its default, which its published config.json leaves out
        ({"model_type": "opt", "tie_word_embeddings": False}, ["lm_head.weight", "x"]),
        ({"model_type": "llama"}, ["lm_head.weight", "x"]),
    ],
)
def test_names_leave_out_rotary_buffers_and_a_tied_output_embedding(tmp_path, config, names):
    tensors = {name: torch.ones(1) for name in ("x", "lm_head.weight", "l.0.rotary_emb.inv_freq")}
    assert CheckpointReader(folder_with(tmp_path / "model", config, pytorch_model__bin=tensors)).names() == names


BAD_WEIGHTS = {
    "index that climbs out": (
        {"pytorch_model__bin__index__json": index(a="../x__bin")},
        ["pytorch_model.bin.index.json points outside its folder ('../x.bin')"],
    ),
    "index with an absolute path": (
        {"pytorch_model__bin__index__json": index(a="/etc/passwd")},
        ["points outside its folder ('/etc/passwd')"],
    ),
    "index that names a folder": ({"pytorch_model__bin__index__json": index(a="..")}, ["cannot be read"]),
    "index that names a missing file": (
        {"pytorch_model__bin__index__json": index(a="x__bin")},
        ["x.bin is missing", "download it again"],
    ),
    "index that names the wrong shard": (
        {"x__bin": {"b": TENSORS["b"]}, "pytorch_model__bin__index__json": index(a="x__bin")},
        ["x.bin lacks the tensor a"],
    ),
    "index without a map": ({"model__safetensors__index__json": {"metadata": {}}}, ["no weight_map"]),
    "index with a map to numbers": ({"model__safetensors__index__json": {"weight_map": {"a": 1}}}, ["no weight_map"]),
    "malformed index": ({"model__safetensors__index__json": "{"}, ["index.json is malformed"]),
    "index that is a list": ({"model__safetensors__index__json": []}, ["index.json is malformed", "list"]),
    "no weights": ({"training_args__bin": b"x"}, ["holds no weights"]),
    "text as safetensors": ({"model__safetensors": b"version https://git-lfs"}, ["model.safetensors", "Git LFS"]),
    "text as bin": ({"pytorch_model__bin": b"version https://git-lfs"}, ["pytorch_model.bin", "Git LFS"]),
    "empty bin": ({"pytorch_model__bin": b""}, ["pytorch_model.bin", "truncated"]),
    "two bytes of a bin": ({"pytorch_model__bin": b"\x80\x02"}, ["pytorch_model.bin", "truncated"]),
    "bin with a list": ({"pytorch_model__bin": [torch.ones(1)]}, ["not a model's state dict"]),
    "bin of a training state": ({"pytorch_model__bin": {"model": {"a": torch.ones(1)}, "step": 3}}, ["state dict"]),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_weights_that_cannot_be_trusted_or_read_are_refused_in_one_line(tmp_path, case):
    files, words = BAD_WEIGHTS[case]
    torch.save({"a": torch.ones(1)}, tmp_path / "x.bin")  # what "../x.bin" would reach
    folder = folder_with(tmp_path / "model", **files)
    with pytest.raises(UserError) as error:
        CheckpointReader(folder)
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "bare pickle"])
def test_a_truncated_file_is_refused_in_one_line(tmp_path, kind, share):
    file = tmp_path / "weights"
    tensors = {"a": torch.ones(5000)}
    if kind == "safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=kind == "bin")
    data = file.read_bytes()
    name = "model__safetensors" if kind == "safetensors" else "pytorch_model__bin"
    folder = folder_with(tmp_path / "model", **{name: data[: int(share * len(data))]})
    with pytest.raises(UserError, match="cannot be read .truncated.*") as error:
        CheckpointReader(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_never_runs(tmp_path, zipped):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "marker"),))

    folder = folder_with(tmp_path / "model")
    torch.save({"a": TENSORS["a"], "b": Evil()}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="asks to run code"):
        CheckpointReader(folder)
    assert not (tmp_path / "marker").exists()


def test_a_type_that_the_tool_does_not_handle_is_named(tmp_path):
    folder = folder_with(tmp_path / "model", model__safetensors={"a": torch.ones(2).to(torch.float8_e4m3fn)})
    with pytest.raises(UserError, match="a has the type F8_E4M3"):
        CheckpointReader(folder).spec("a")


def test_read_json_says_what_is_wrong_in_one_line(tmp_path):
    (tmp_path / "bytes.json").write_bytes(b"\xff")
    for name, content, message in (
        ("missing.json", None, "does not exist"),
        ("half.json", '{"a": ', "is malformed"),
        ("bytes.json", None, "is malformed"),
        ("list.json", "[1]", "it holds a list, not an object"),
    ):
        if content:
            (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=f"{name} .*{message}"):
            read_json(tmp_path / name)
    (tmp_path / "good.json").write_text('{"a": "é"}', encoding="utf-8")
    assert read_json(tmp_path / "good.json") == {"a": "é"}


# ---------------------------------------------------------------------------------------------------------------------
# Folders.


def test_check_model_folder_says_what_a_folder_lacks(tmp_path):
    def message(path: Path, **kwargs) -> str:
        with pytest.raises(UserError) as error:
            check_model_folder(path, "--flag", **kwargs)
        assert str(error.value).startswith(f"--flag {path} ")
        return str(error.value)

    folder = tmp_path / "model"
    assert "does not exist" in message(folder)
    folder.mkdir()
    assert "no config.json" in message(folder)
    (folder / "config.json").write_text("{}")
    assert "is a file, not a folder" in message(folder / "config.json")
    assert "holds no weights" in message(folder)
    (folder / "model.safetensors").touch()
    assert "holds no tokenizer: copy tokenizer.json, tokenizer.model or vocab.json" in message(folder)
    assert check_model_folder(folder, "--flag", tokenizer=False) == folder
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json"):
        (folder / name).touch()
        assert check_model_folder(str(folder), "--flag") == folder
        (folder / name).unlink()
    (folder / "vocab.json").touch()
    (folder / "weight_diff.json").touch()
    assert "is a weight diff: recover it first" in message(folder)
    assert check_model_folder(folder, "--flag", diff=True) == folder


def test_a_new_folder_appears_whole(tmp_path):
    target = tmp_path / "not" / "yet" / "there"
    with new_folder(target) as folder:
        (folder / "file").write_text("whole")
        assert not target.exists()
    assert (target / "file").read_text() == "whole"
    assert target.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in target.parent.iterdir()] == ["there"]


@pytest.mark.parametrize("error", [ValueError, UserError, KeyboardInterrupt, SystemExit])
def test_a_new_folder_is_gone_whatever_fails(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("half")
        raise error("in the middle")
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_takes_the_place_of_an_empty_one_only(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    with new_folder(target) as folder:
        (folder / "file").write_text("first")
    with pytest.raises(UserError, match="target is there already: remove it"), new_folder(target):
        raise AssertionError("not reached")
    with pytest.raises(UserError, match="file is there already"), new_folder(target / "file"):
        raise AssertionError("not reached")
    assert (target / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_side_files_are_copied_byte_for_byte_and_nothing_else_is(tmp_path):
    source = folder_with(
        tmp_path / "source",
        tokenizer__model=b"\x00\xff",
        tokenizer__json='{"é" :1}\r\n',
        chat_template__jinja="{{ x }}",
        generation_config__json={},
        training_args__bin=b"pickle",
        optimizer__pt=b"x",
        weight_diff__json={},
    )
    target = tmp_path / "target"
    target.mkdir()
    copy_side_files(source, target, {"_name_or_path": "/home/me", "vocab_size": 5})
    assert sorted(path.name for path in target.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
    ]
    assert (target / "tokenizer.model").read_bytes() == b"\x00\xff"
    assert (target / "tokenizer.json").read_bytes() == '{"é" :1}\r\n'.encode()
    assert (target / "config.json").read_text() == '{\n  "vocab_size": 5\n}\n'


# ---------------------------------------------------------------------------------------------------------------------
# Out.


def write_weights(folder: Path, specs: dict, tensors, max_shard_bytes: int = 5 * 10**9) -> None:
    with ShardWriter(folder, specs, max_shard_bytes) as writer:
        for name, tensor in zip(specs, tensors, strict=True):
            writer.write(name, tensor.reshape(-1))


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
        (1, [["a"], ["b"], ["c"], ["d"]]),  # one tensor may be larger than a shard should be
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
    assert CheckpointReader(tmp_path).get("d").item() == 7.0


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, dtype=torch.float16), torch.ones(3), torch.ones(2, 1), torch.ones(2, dtype=torch.int32)]
)
def test_a_tensor_that_is_not_as_planned_is_refused(tmp_path, tensor):
    with pytest.raises(ValueError, match="a: .* is not what was planned"):
        write_weights(tmp_path, {"a": (torch.float32, (2,))}, [tensor])


def test_a_sharded_model_of_ours_loads_with_from_pretrained(tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    tensors = load_file(tiny_llama / "model.safetensors")
    write_weights(tmp_path, specs_of(tensors), tensors.values(), max_shard_bytes=100_000)
    copy_side_files(tiny_llama, tmp_path, read_json(tiny_llama / "config.json"))
    assert [len(load_file(file)) for file in sorted(tmp_path.glob("model-*.safetensors"))] == [1, 2, 4, 6, 5, 3]
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
