"""tensor_files.py: what a hostile pickle may not do, and what every honest one may."""

from __future__ import annotations

import zipfile
from collections import OrderedDict

import pytest
import torch
from made_models import at_most_more, bin_folder, folder_with, repacked, whole

from alpaca import UserError
from alpaca.weights.checkpoint import CheckpointReader
from alpaca.weights.tensor_files import DTYPES

TENSORS = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3, 4]], dtype=torch.float16)}


def pickle_of(value: bytes, name: bytes = b"a") -> bytes:
    """A pickle of protocol 2 with a dict that has one entry."""
    return b"\x80\x02}X" + len(name).to_bytes(4, "little") + name + value + b"s."


THOUSAND = b"M\xe8\x03\x85R"  # calls what is on the stack with it


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (b"cbuiltins\nbytearray\n" + THOUSAND, "builtins.bytearray"),
        (b"c__builtin__\nbytearray\n" + THOUSAND, "__builtin__.bytearray"),  # which torch takes for the same
        (b"ctorch\nTensor\n" + THOUSAND, "torch.Tensor"),
        (b"ctorch.storage\nUntypedStorage\n" + THOUSAND, "torch.storage.UntypedStorage"),
        (b"cbuiltins\nbytearray\nq\x070h\x07" + THOUSAND, "builtins.bytearray"),  # dropped, and called by the memo
        (b"\x85" * 10**5 + b"cbuiltins\nbytearray\n" + THOUSAND, "builtins.bytearray"),  # below many tuples
        (b"\x8c\x08builtins\x94\x8c\x09bytearray\x94\x93" + THOUSAND, "builtins.bytearray"),  # by protocol 4
        (b"\x8c\x08builtinsq\x01\x8c\x09bytearrayq\x02h\x01h\x02\x93" + THOUSAND, "a name that it hides"),
        (b"\x82\x01" + THOUSAND, "a name that it hides"),  # an extension's number
        (b"ccollections\nOrderedDict \n" + THOUSAND, "collections.OrderedDict "),
        (b"ccollections OrderedDict\n\n" + THOUSAND, "collections.OrderedDict "),
        (b"(ios\nsystem\n", "os.system"),
        (b"cos\n\x1b[2Jx\n)R", r"os.\x1b[2Jx"),
    ],
    ids=range(13),
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_name_that_plain_tensors_do_not_need_is_refused_before_the_pickle_is_loaded(
    tmp_path, monkeypatch, value, name, zipped
):
    """bytearray is in torch's own list for weights_only, and takes any length that the file gives it."""
    folder = bin_folder(tmp_path, {"a": 1}, _use_new_zipfile_serialization=zipped)
    file = folder / "pytorch_model.bin"
    if zipped:
        repacked(file, lambda n, data: (pickle_of(value) if n.endswith("data.pkl") else data, zipfile.ZIP_STORED))
    else:
        old = pickle_of(b"K\x01").replace(b"}", b"}q\x00").replace(b"aK", b"aq\x01K")
        assert file.read_bytes().count(old) == 1
        file.write_bytes(file.read_bytes().replace(old, pickle_of(value)))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(UserError) as error:
        CheckpointReader(folder)
    assert f"its pickle asks to run code: {name}) and was not loaded" in str(error.value)


HUGE = {
    "BINUNICODE": b"X\xf0\xff\xff\xff",
    "BINUNICODE8": b"\x8d" + (2**62).to_bytes(8, "little"),
    "BINSTRING": b"T\xf0\xff\xff\x7f",
    "BINBYTES": b"B\xf0\xff\xff\xff",
    "BINBYTES8": b"\x8e" + (2**62).to_bytes(8, "little"),
    "BYTEARRAY8": b"\x96" + (2**62).to_bytes(8, "little"),
    "LONG4": b"\x8b\xf0\xff\xff\x7f",
    "LONG4, negative": b"\x8b\xff\xff\xff\xff",
    "a name without an end": b"c" + b"x" * 10**6,
    "FRAME": b"\x95" + (2**62).to_bytes(8, "little"),
}


@pytest.mark.parametrize("opcode", HUGE)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_length_that_a_pickle_claims_takes_no_memory(tmp_path, monkeypatch, opcode, zipped):
    folder = bin_folder(tmp_path, {"a": 1}, _use_new_zipfile_serialization=zipped)
    file = folder / "pytorch_model.bin"
    if zipped:
        repacked(file, lambda n, data: (b"\x80\x02" + HUGE[opcode] if "pkl" in n else data, zipfile.ZIP_STORED))
    else:
        file.write_bytes(b"\x80\x02" + HUGE[opcode])
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match="pytorch_model.bin cannot be read") as error, at_most_more(2 * 10**8):
        CheckpointReader(folder)
    assert "\n" not in str(error.value) and "MemoryError" not in str(error.value)


def test_a_bare_pickle_that_is_longer_than_any_models_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("alpaca.weights.tensor_files.MAX_HEADER", 10**5)
    folder = folder_with(tmp_path / "model", pytorch_model__bin=b"\x80\x02" + b"N" * 10**5 + b"." + b"\x80\x02N." * 4)
    with pytest.raises(UserError, match="pytorch_model.bin cannot be read .*pickle exhausted before seeing STOP"):
        CheckpointReader(folder)


def test_a_second_pickle_in_a_zip_is_refused_however_it_is_spelled(tmp_path):
    folder = bin_folder(tmp_path, TENSORS)
    with zipfile.ZipFile(folder / "pytorch_model.bin", "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/DATA.pkl", pickle_of(b"K\x01"))
    with pytest.raises(UserError, match="2 records called data.pkl"):
        CheckpointReader(folder)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.complex64])
def test_a_state_dict_of_every_type_passes(tmp_path, dtype, zipped):
    with_state = torch.nn.Parameter(torch.ones(2).to(dtype), requires_grad=False)
    with_state.note = "an attribute"
    state = OrderedDict(
        a=torch.ones(2).to(dtype),
        b=torch.nn.Parameter(torch.ones(2).to(dtype), requires_grad=False),
        c=with_state,
    )
    state._metadata = OrderedDict({"": {"version": 1}})  # as Module.state_dict() has it
    folder = bin_folder(tmp_path, state, _use_new_zipfile_serialization=zipped)
    reader = CheckpointReader(folder)
    if dtype in DTYPES.values():
        assert [whole(reader, name).tolist() for name in reader.names()] == [[1, 1]] * 3


def test_a_flipped_bit_in_the_pickle_is_called_damage_and_not_code(tmp_path):
    folder = bin_folder(tmp_path, TENSORS)
    file = folder / "pytorch_model.bin"
    data = file.read_bytes()
    for place in (b"_rebuild_tensor_v2", b"OrderedDict", b"FloatStorage"):
        assert data.count(place) == 1
        flipped = bytes([place[0] ^ 1]) + place[1:]
        file.write_bytes(data.replace(place, flipped))
        with pytest.raises(UserError, match=r"pytorch_model.bin is damaged \(data.pkl .*checksum\): download it again"):
            CheckpointReader(folder)
