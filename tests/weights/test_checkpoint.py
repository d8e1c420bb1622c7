"""checkpoint.py: safetensors and .bin shards in, row by row; what does not fit its file is refused."""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from made_models import assert_same_bits, at_most_more, bin_folder, folder_with, repacked, whole, write_model
from safetensors.torch import load_file, save_file

from alpaca import UserError
from alpaca.weights.checkpoint import FLOATS, CheckpointReader, check_model_folder, read_json
from alpaca.weights.pair import check_floats

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
    CheckpointReader(folder).check_checksums()  # it has none


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
        [r"points outside its folder ('x\nall is well.bin')"],
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
    "index without a map": ({"model__safetensors__index__json": {"metadata": {}}}, ["no weight_map"]),
    "index with a map to numbers": ({"model__safetensors__index__json": {"weight_map": {"a": 1}}}, ["no weight_map"]),
    "malformed index": ({"model__safetensors__index__json": "{"}, ["index.json is malformed"]),
    "index that is a list": ({"model__safetensors__index__json": []}, ["index.json is malformed", "list"]),
    "no weights": ({"training_args__bin": b"x"}, ["has no weights"]),
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


def test_a_bin_of_the_other_byte_order_is_read_in_this_one(tmp_path):
    torch.save({"a": torch.arange(4.0)}, tmp_path / "little.bin")
    folder = folder_with(tmp_path / "model", pytorch_model__bin={"a": torch.arange(4.0)})
    swapped = torch.arange(4.0).numpy().byteswap().tobytes()
    with (
        zipfile.ZipFile(tmp_path / "little.bin") as little,
        zipfile.ZipFile(folder / "pytorch_model.bin", "w") as big,
    ):
        for record in little.infolist():
            name = record.filename
            data = b"big" if name.endswith("byteorder") else swapped if name.endswith("data/0") else little.read(record)
            big.writestr(name, data)
    assert whole(CheckpointReader(folder), "a").tolist() == [0, 1, 2, 3]


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
    with pytest.raises(UserError, match="cannot be read .truncated") as error:
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


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_types_that_are_no_plain_floats_are_named(tmp_path, layout):
    eight = torch.ones(2).to(torch.float8_e4m3fn)
    odd = (
        {"a": eight}
        if layout == "safetensors"
        else {"a": torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)}
    )
    write_model(tmp_path / "model", odd, layout)
    kind = {"safetensors": "float8_e4m3fn", "bin": "qint8"}[layout]
    with pytest.raises(
        UserError, match=f"model seems quantized: a is {kind}, not floating point; give the unquantized"
    ):
        check_floats(CheckpointReader(tmp_path / "model"))


SHAPES = [(), (0,), (1,), (7,), (5, 3), (3, 0, 2), (4, 2, 3), (1, 1), (6, 1)]


@pytest.mark.parametrize("layout", ["safetensors", "safetensors-sharded", "bin", "bin-sharded", "bare pickle", "views"])
@pytest.mark.parametrize("block", [1, 4, 10**6])
def test_rows_and_blocks_are_those_of_the_library_that_loads_the_whole_file(tmp_path, monkeypatch, layout, block):
    """In "views" tensors are parts and transposes of one storage; three halves before a float leave it unaligned."""
    monkeypatch.setattr("alpaca.weights.checkpoint.BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.float16, torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool]
    tensors = {
        f"{i}.{kind}.{len(shape)}": (torch.randn(shape, generator=generator) * 9).to(kind)
        for i, shape in enumerate(SHAPES)
        for kind in kinds
    }
    tensors |= {"first": torch.ones(3).half(), "then": torch.tensor([0.1])}
    if layout in ("bare pickle", "views"):
        base = torch.arange(24.0).reshape(6, 4)
        views = {"rows": base[1:3], "columns": base.T, "every other": base[::2, 1:], "none": base[:0], "all": base}
        folder = folder_with(tmp_path / "model")
        zipped = layout == "views"
        torch.save(tensors | views, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        expected = torch.load(folder / "pytorch_model.bin", weights_only=True)
    else:
        folder = write_model(tmp_path / "model", tensors, layout)
        files = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")]
        loaded = [load_file(f) if f.suffix == ".safetensors" else torch.load(f, weights_only=True) for f in files]
        expected = {name: tensor for part in loaded for name, tensor in part.items()}
    reader = CheckpointReader(folder)
    assert reader.specs() == {name: (expected[name].dtype, tuple(expected[name].shape)) for name in reader.names()}
    assert set(reader.names()) == set(expected)
    for name, tensor in expected.items():
        assert_same_bits({name: whole(reader, name)}, {name: tensor})
        rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
        blocks = list(reader.blocks(name))
        assert all(stop - start <= max(1, block) for start, stop in blocks)
        assert [start for start, _ in blocks[1:]] == [stop for _, stop in blocks[:-1]]
        for start, stop in [(0, 1), (0, 100), (2, 5), (3, 3), (50, 60)]:
            assert_same_bits({name: reader.rows(name, start, stop)}, {name: rows[start:stop]})


def test_a_shard_may_be_called_like_a_whole_model(tmp_path):
    """Then the index counts; an index that does not name the file is another model's."""
    files = {"model__safetensors": {"a": TENSORS["a"]}, "y__safetensors": {"b": TENSORS["b"]}}
    both = index(a="model__safetensors", b="y__safetensors")
    assert read_all(folder_with(tmp_path / "model", model__safetensors__index__json=both, **files)) == READ
    stale = index(a="x__safetensors", b="y__safetensors")
    reader = CheckpointReader(folder_with(tmp_path / "other", model__safetensors__index__json=stale, **files))
    assert reader.names() == ["a"]


def test_what_the_index_does_not_list_is_there_all_the_same_as_for_from_pretrained(tmp_path):
    files = {"x__safetensors": TENSORS, "model__safetensors__index__json": index(a="x__safetensors")}
    assert read_all(folder_with(tmp_path / "model", **files)) == READ


def test_of_a_tensor_in_two_shards_the_index_says_which_counts(tmp_path):
    for number, shard in enumerate(("x", "y")):
        folder = folder_with(
            tmp_path / shard,
            x__safetensors={"a": TENSORS["a"], "b": torch.zeros(1)} if shard == "y" else TENSORS,
            y__safetensors={"b": TENSORS["b"] if number else torch.zeros(1)},
            model__safetensors__index__json=index(a="x__safetensors", b=f"{shard}__safetensors"),
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
def test_a_tensor_that_repeats_a_few_bytes_for_ever_takes_no_memory(tmp_path, bomb, zipped):
    folder = bin_folder(tmp_path, {"a": bomb()}, _use_new_zipfile_serialization=zipped)
    with at_most_more(10**9):
        reader = CheckpointReader(folder)
        if len(reader.spec("a")[1]) == 1:
            assert reader.rows("a", 5, 10).tolist() == [1.0] * 5


def test_a_compressed_record_is_refused_by_the_check_of_checksums(tmp_path):
    """torch would take the compressed bytes for the values."""
    folder = bin_folder(tmp_path, {"a": torch.rand(1000)})
    repacked(folder / "pytorch_model.bin", lambda name, data: (data, zipfile.ZIP_DEFLATED))
    with pytest.raises(UserError, match="pytorch_model.bin is compressed, which torch.save never does"):
        CheckpointReader(folder).check_checksums()


def test_a_storage_that_is_shorter_than_its_tensor_is_refused(tmp_path):
    folder = bin_folder(tmp_path, {"a": torch.zeros(1000)})
    shorter = lambda name, data: (data[:400] if name.endswith("data/0") else data, zipfile.ZIP_STORED)  # noqa: E731
    repacked(folder / "pytorch_model.bin", shorter)
    with pytest.raises(UserError, match="pytorch_model.bin cannot be read"):
        CheckpointReader(folder)


def test_a_sparse_tensor_is_refused(tmp_path):
    with pytest.raises(UserError, match="has something other than dense tensors by name"):
        CheckpointReader(bin_folder(tmp_path, {"a": torch.eye(3).to_sparse()}))


def pickle_of(value: bytes, name: bytes = b"a") -> bytes:
    """A pickle of protocol 2 with a dict that has one entry."""
    return b"\x80\x02}X" + len(name).to_bytes(4, "little") + name + value + b"s."


HUGE = {
    "BINUNICODE": b"X\xf0\xff\xff\xff",
    "LONG4": b"\x8b\xf0\xff\xff\x7f",
    "a name without an end": b"c" + b"x" * 1000,
    "bytearray": pickle_of(b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R"),  # 64 GB, in torch's list
    "a tensor": pickle_of(b"ctorch\nTensor\n\x8a\x05\x00\x00\x00\x00\x10\x85R"),
    "os.system": pickle_of(b"cos\nsystem\nX\x04\x00\x00\x00true\x85R"),
    "INST": pickle_of(b"(ios\nsystem\n"),
    "STACK_GLOBAL": pickle_of(b"\x8c\x02os\x94\x8c\x06system\x94\x93\x8c\x04true\x85R"),
    "EXT": pickle_of(b"\x82\x01\x85R"),
}


@pytest.mark.parametrize("pickled", HUGE)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_ends_in_one_line_without_code_or_memory(tmp_path, pickled, zipped):
    folder = bin_folder(tmp_path, {"a": 1}, _use_new_zipfile_serialization=zipped)
    file = folder / "pytorch_model.bin"
    data = HUGE[pickled] if HUGE[pickled].startswith(b"\x80") else b"\x80\x02" + HUGE[pickled]
    if zipped:
        repacked(file, lambda name, old: (data if name.endswith("data.pkl") else old, zipfile.ZIP_STORED))
    else:
        file.write_bytes(data)
    with pytest.raises(
        UserError, match=r"pytorch_model.bin (cannot be read|is damaged \(a Git LFS pointer\?\), or its pickle asks)"
    ) as error:
        with at_most_more(10**9):
            CheckpointReader(folder)
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "dtype", [*FLOATS.values(), torch.float64, torch.int64, torch.int8, torch.bool, torch.complex64]
)
def test_a_state_dict_of_every_type_passes(tmp_path, dtype, zipped):
    with_state = torch.nn.Parameter(torch.ones(2).to(dtype), requires_grad=False)
    with_state.note = "an attribute"
    state = OrderedDict(
        a=torch.ones(2).to(dtype),
        b=torch.nn.Parameter(torch.ones(2).to(dtype), requires_grad=False),
        c=with_state,
    )
    state._metadata = OrderedDict({"": {"version": 1}})  # as Module.state_dict() has it
    reader = CheckpointReader(bin_folder(tmp_path, state, _use_new_zipfile_serialization=zipped))
    assert [whole(reader, name).tolist() for name in reader.names()] == [[1, 1]] * 3


def test_a_flipped_bit_in_the_pickle_is_refused_in_one_line(tmp_path):
    folder = bin_folder(tmp_path, TENSORS)
    file = folder / "pytorch_model.bin"
    data = file.read_bytes()
    for place in (b"_rebuild_tensor_v2", b"OrderedDict", b"FloatStorage"):
        assert data.count(place) == 1
        file.write_bytes(data.replace(place, bytes([place[0] ^ 1]) + place[1:]))
        with pytest.raises(
            UserError, match="pytorch_model.bin is damaged .* or its pickle asks to run code .*do not trust it"
        ):
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
            with pytest.raises(UserError, match=r"its pickle asks to run code \(.*posix.mkdir"):
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
        ("list.json", "[1]", "it is a JSON list, not an object"),
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
    assert "has no weights" in message(folder)
    (folder / "model.safetensors").touch()
    assert (
        "has no tokenizer: copy tokenizer.json, tokenizer.model, vocab.json, vocab.txt, spiece.model or tekken.json"
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
