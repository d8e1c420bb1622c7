"""checkpoint.py: safetensors and .bin shards in, piece by piece; what does not fit its file is refused."""

from __future__ import annotations

import json
import os
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from made_models import at_most_more, bin_folder, folder_with, repacked, whole
from safetensors.torch import save_file

from alpaca import UserError
from alpaca.weights.checkpoint import CheckpointReader, check_model_folder, read_json

TENSORS = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3, 4]], dtype=torch.float16)}


def index(**weight_map) -> dict:
    return {"metadata": {}, "weight_map": {name: file.replace("__", ".") for name, file in weight_map.items()}}


def read_all(folder: Path) -> dict:
    reader = CheckpointReader(folder)
    return {name: (reader.spec(name), whole(reader, name).tolist()) for name in reader.names()}


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
            "y__bin": {"b": TENSORS["b"], "l.0.rotary_emb.inv_freq": torch.ones(1)},  # not in the index
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
    assert CheckpointReader(folder).bare_pickles() == [folder / "pytorch_model.bin"]
    for name, tensors in (("zip", {"pytorch_model__bin": TENSORS}), ("data", {"model__safetensors": TENSORS})):
        assert CheckpointReader(folder_with(tmp_path / name, **tensors)).bare_pickles() == []


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
    words = {"opt": "model.decoder.embed_tokens.weight"}.get(config.get("model_type"), "model.embed_tokens.weight")
    tensors = {name: torch.ones(1) for name in ("x", "lm_head.weight", words, "l.0.rotary_emb.inv_freq")}
    reader = CheckpointReader(folder_with(tmp_path / "model", config, pytorch_model__bin=tensors))
    assert [name for name in reader.names() if name != words] == names


def test_causal_masks_of_old_checkpoints_are_left_out_and_biases_are_not(tmp_path):
    """As gpt2 has them on the hub: bias is a (1, 1, n, n) triangle beside the bias of a layer."""
    tensors = {
        "h.0.attn.bias": torch.ones(3, 3, dtype=torch.uint8).tril().view(1, 1, 3, 3),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
        "h.0.attn.c_attn.bias": torch.ones(3),
    }
    assert CheckpointReader(folder_with(tmp_path / "model", pytorch_model__bin=tensors)).names() == [
        "h.0.attn.c_attn.bias"
    ]


BAD_WEIGHTS = {
    "index that climbs out": (
        {"pytorch_model__bin__index__json": index(a="../x__bin")},
        ["pytorch_model.bin.index.json points outside its folder ('../x.bin')"],
    ),
    "index with an absolute path": (
        {"pytorch_model__bin__index__json": index(a="/etc/passwd")},
        ["points outside its folder ('/etc/passwd')"],
    ),
    "index with a name that clears the screen": (
        {"x__bin": {"a\x1b[2J": torch.ones(1)}, "pytorch_model__bin__index__json": index(**{"a\x1b[2J": "x__bin"})},
        [r"'a\x1b[2J' has control characters"],
    ),
    "index with a file of two lines": (
        {"pytorch_model__bin__index__json": index(a="x\nall is well__bin")},
        [r"'x\nall is well.bin' has control characters"],
    ),
    "safetensors with a name of two lines": (
        {"model__safetensors": {"a\nb": torch.ones(1)}},
        [r"'a\nb' has control characters"],
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
    "index that does not list a tensor": (
        {
            "x__safetensors": TENSORS,
            "model__safetensors__index__json": index(a="x__safetensors"),
        },
        ["x.safetensors holds b, which model.safetensors.index.json does not list", "download both again"],
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
    "bin with numbers for names": ({"pytorch_model__bin": {0: torch.ones(1)}}, ["not a model's state dict"]),
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


def test_a_bin_of_the_other_byte_order_is_refused_in_one_line(tmp_path):
    """torch swaps the bytes in place, which ends Python where only the places are read."""
    torch.save({"a": torch.arange(4.0)}, tmp_path / "little.bin")
    folder = folder_with(tmp_path / "model", pytorch_model__bin={"a": torch.arange(4.0)})
    with (
        zipfile.ZipFile(tmp_path / "little.bin") as little,
        zipfile.ZipFile(folder / "pytorch_model.bin", "w") as big,
    ):
        for record in little.infolist():
            big.writestr(record.filename, b"big" if record.filename.endswith("byteorder") else little.read(record))
    with pytest.raises(UserError, match="pytorch_model.bin was saved on a big-endian machine"):
        CheckpointReader(folder)


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


@pytest.mark.parametrize("layout", ["safetensors", "bin", "bin before the zip format", "bin of views"])
def test_any_part_of_a_tensor_is_read_as_the_whole_has_it(tmp_path, layout):
    """Views: b is rows 1 and 2 of a storage of 4, c is its transpose, which is not one piece in the file."""
    base = torch.arange(12.0).reshape(4, 3)
    tensors = {
        "a": torch.arange(7).to(torch.bfloat16),
        "b": base[1:3],
        "c": base.T,
        "d": torch.tensor(5),
        "e": base[:0],
    }
    folder = folder_with(tmp_path / "model")
    if layout == "safetensors":
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    else:
        copies = tensors if layout == "bin of views" else {n: t.contiguous().clone() for n, t in tensors.items()}
        torch.save(copies, folder / "pytorch_model.bin", _use_new_zipfile_serialization="before" not in layout)
    reader = CheckpointReader(folder)
    assert reader.specs() == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        assert torch.equal(whole(reader, name), tensor)
        for start in range(len(flat)):
            for count in range(len(flat) - start + 1):
                part = reader.read(name, start, torch.empty(count, dtype=tensor.dtype))
                assert part.tolist() == flat[start : start + count].tolist()


def test_a_tensor_that_is_not_one_piece_is_copied_once_and_not_for_each_chunk(tmp_path, monkeypatch):
    tensors = {"a": torch.arange(12.0).reshape(3, 4).T, "b": torch.arange(6.0).reshape(2, 3).T}
    reader = CheckpointReader(folder_with(tmp_path / "model", pytorch_model__bin=tensors))
    copied, reshape = [], torch.Tensor.reshape

    def noted(tensor, *shape):
        copied.append(tuple(tensor.shape))
        return reshape(tensor, *shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "reshape", noted)
        read = {
            name: [reader.read(name, i, torch.empty(1)).item() for i in range(t.numel())] for name, t in tensors.items()
        }
    assert read == {name: tensor.reshape(-1).tolist() for name, tensor in tensors.items()}
    assert copied == [(4, 3), (3, 2)]


def test_a_bin_is_read_where_torch_does_not_say_the_places(tmp_path, monkeypatch):
    """As before torch 2.7: the shard is mapped instead."""
    folder = folder_with(tmp_path / "model", pytorch_model__bin=TENSORS)
    monkeypatch.setattr(
        torch.UntypedStorage, "_checkpoint_offset", property(lambda self: None, lambda self, value: None)
    )
    assert read_all(folder) == READ


def test_layers_come_in_the_order_of_their_numbers(tmp_path):
    tensors = {f"layers.{i}.{part}": torch.ones(1) for i in (10, 2, 1) for part in ("b", "a")}
    names = ["layers.1.a", "layers.1.b", "layers.2.a", "layers.2.b", "layers.10.a", "layers.10.b"]
    assert CheckpointReader(folder_with(tmp_path / "model", model__safetensors=tensors)).names() == names


def test_a_name_may_have_any_number_in_any_digits(tmp_path):
    """int() refuses more than 4,300 digits, and takes an Arabic three for a three."""
    names = ["a.٣.x", "a.03.x", "a.3.x", "a.4.x", f"a.{'9' * 5000}.x"]
    folder = folder_with(tmp_path / "model", pytorch_model__bin={name: torch.ones(1) for name in names})
    assert set(CheckpointReader(folder).names()) == set(names)
    assert CheckpointReader(folder).names()[-2:] == [names[-1], names[0]]


# ---------------------------------------------------------------------------------------------------------------------
# Hostile files.


def safetensors_file(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (safetensors_file({}, length=2**63), "header too large"),
        (safetensors_file({}, length=3), "invalid header length"),
        (safetensors_file(b" " * (101 * 10**6)), "header too large"),
        (safetensors_file({"a": entry("F32", [1], 0, 4)}), "cannot be read"),
        (safetensors_file({"a": entry("F32", [2**40], 0, 4)}, b"1234"), "cannot be read"),
        (safetensors_file({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, b"1234"), "cannot be read"),
        (safetensors_file({"a": entry("F32", [-1], 0, 4)}, b"1234"), "cannot be read"),
        (safetensors_file({"a": entry("F32", [1], 4, 8)}, b"12345678"), "cannot be read"),
        (safetensors_file(TWICE, b"1234"), "a appears twice"),
        (safetensors_file(b"[" * 10**5), "cannot be read"),
    ],
)
def test_a_safetensors_header_that_does_not_fit_its_file_is_refused(tmp_path, data, word):
    folder = folder_with(tmp_path / "model", model__safetensors=data)
    with pytest.raises(UserError, match="model.safetensors cannot be read") as error:
        CheckpointReader(folder)
    assert word in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "bomb", [lambda: torch.ones(1).expand(10**12), lambda: torch.ones(4).as_strided((2, 10**9), (2, 0))]
)
def test_a_tensor_that_repeats_a_few_bytes_for_ever_is_refused_before_memory_is_taken(tmp_path, bomb, zipped):
    folder = bin_folder(tmp_path, {"a": bomb()}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="pytorch_model.bin: a claims .* bytes of a storage of .*: do not trust it"):
        with at_most_more(10**9):
            CheckpointReader(folder)


def test_a_compressed_record_is_refused(tmp_path):
    folder = bin_folder(tmp_path, {"a": torch.zeros(10**6)})
    repacked(folder / "pytorch_model.bin", lambda name, data: (data, zipfile.ZIP_DEFLATED))
    with pytest.raises(UserError, match="pytorch_model.bin cannot be read .*is compressed"):
        CheckpointReader(folder)


def test_a_storage_that_is_shorter_than_its_tensor_is_refused(tmp_path):
    folder = bin_folder(tmp_path, {"a": torch.zeros(1000)})
    shorter = lambda name, data: (data[:400] if name.endswith("data/0") else data, zipfile.ZIP_STORED)  # noqa: E731
    repacked(folder / "pytorch_model.bin", shorter)
    with pytest.raises(UserError, match="pytorch_model.bin cannot be read .*: a does not fit the file"):
        CheckpointReader(folder)


def test_sparse_quantized_and_8_bit_tensors_are_refused_by_name(tmp_path):
    quantized = torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)
    for number, tensor in enumerate((torch.eye(3).to_sparse(), quantized, torch.ones(2).to(torch.float8_e4m3fn))):
        (tmp_path / str(number)).mkdir()
        name = ("_rebuild_sparse_tensor", "_rebuild_qtensor", "_rebuild_tensor_v3")[number]
        with pytest.raises(
            UserError, match=rf"special tensor \(torch._utils.{name}\), which this tool does not handle"
        ):
            CheckpointReader(bin_folder(tmp_path / str(number), {"a": tensor}))


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = folder_with(
        tmp_path / "model",
        x__safetensors=TENSORS,
        y__safetensors={"b": TENSORS["b"]},
        model__safetensors__index__json=index(a="x__safetensors", b="y__safetensors"),
    )
    with pytest.raises(UserError, match="b is in two shards, x.safetensors and y.safetensors: download it again"):
        CheckpointReader(folder)


def test_the_name_that_is_there_twice_is_found_among_any_number(tmp_path):
    """To count each of 10^5 names would take minutes."""
    names = ", ".join(f'"{i}": "x.bin"' for i in [*range(10**5), 10**5 - 1])
    folder = folder_with(tmp_path / "model", pytorch_model__bin__index__json=f'{{"weight_map": {{{names}}}}}')
    with pytest.raises(UserError, match="index.json is malformed: 99999 appears twice"):
        CheckpointReader(folder)


def test_an_index_that_has_a_name_twice_is_refused(tmp_path):
    text = '{"weight_map": {"a": "x.bin", "a": "y.bin"}}'
    folder = folder_with(tmp_path / "model", pytorch_model__bin__index__json=text)
    with pytest.raises(UserError, match="index.json is malformed: a appears twice"):
        CheckpointReader(folder)


def test_no_pickle_opcode_resolves_a_name_outside_torchs_list(tmp_path):
    """Python's own unpickler raises an audit event for each name that it looks up; torch's has a list instead."""

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "marker"),))

    heard, listening = [], True

    def hook(event: str, arguments: tuple) -> None:
        if listening and event in ("pickle.find_class", "exec", "compile", "os.mkdir", "os.system", "subprocess.Popen"):
            heard.append((event, *arguments))

    good = bin_folder(tmp_path, TENSORS | {"c": torch.nn.Parameter(torch.ones(2))})
    CheckpointReader(good)  # what is imported at first is imported
    evil = folder_with(tmp_path / "evil")
    sys.addaudithook(hook)
    try:
        for zipped in (True, False):
            torch.save({"a": Evil()}, evil / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
            heard.clear()
            reader = CheckpointReader(good)
            assert [whole(reader, name).tolist() for name in reader.names()] == [[1, 2], [[3, 4]], [1, 1]]
            with pytest.raises(UserError, match=r"its pickle asks to run code: posix.mkdir\) and was not loaded"):
                CheckpointReader(evil)
            assert heard == []
        torch.load(evil / "pytorch_model.bin", weights_only=False)
        assert {event for event, *_ in heard} >= {"pickle.find_class", "os.mkdir"}  # so the hook hears what runs
    finally:
        listening = False


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
    assert (
        "holds no tokenizer: copy tokenizer.json, tokenizer.model, vocab.json, vocab.txt, spiece.model or tekken.json"
        in message(folder)
    )
    assert check_model_folder(folder, "--flag", tokenizer=False) == folder
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json"):
        (folder / name).touch()
        assert check_model_folder(str(folder), "--flag") == folder
        (folder / name).unlink()
    (folder / "vocab.json").touch()
    (folder / "weight_diff.json").touch()
    assert "is a weight diff: recover it first" in message(folder)
    assert check_model_folder(folder, "--flag", diff=True) == folder
