"""Finds each tensor in one file of weights, safetensors or PyTorch's ``.bin``, without reading its values.

What a file claims is checked against the file's size before memory is taken. No pickle is executed: ours is a list of
the names that plain tensors need, checked before ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import functools
import io
import json
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from alpaca import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 32 * 10**6  # bytes of an index or a pickle: a hundred times what a 7B model needs

# What torch.save writes for state dicts of plain tensors, in either format, since 0.4. torch's own list for
# weights_only is longer: it has bytearray, to which a pickle of thirty bytes can give a length of 64 GB.
ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_parameter_with_state"),
    ("torch.nn.parameter", "Parameter"),
}
ALLOWED |= {
    ("torch", f"{kind}Storage")
    for kind in "Double Float Half BFloat16 Long Int Short Char Byte Bool ComplexDouble ComplexFloat".split()
}
MEMO = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")  # these leave the stack as it is


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: contiguous bytes from ``offset`` on, or else ``whole``, which loads it."""

    dtype: torch.dtype | str  # the file's name for it, where DTYPES lacks the type
    shape: tuple[int, ...]
    path: Path
    offset: int = 0
    whole: Callable[[], torch.Tensor] | None = None


def open_safetensors(path: Path) -> dict[str, Stored]:
    """Return name → place of the tensors of a safetensors file.

    The file is the header's length in 8 bytes, little-endian, the header as JSON (name → dtype, shape, begin and end),
    and the tensors. The library checks that the offsets leave no holes and that the sizes fit shapes and file.
    """
    with safe_open(path, framework="pt"):
        pass
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length), object_pairs_hook=unique)
    header.pop("__metadata__", None)
    start = 8 + length
    return {
        name: Stored(DTYPES.get(it["dtype"], it["dtype"]), tuple(it["shape"]), path, start + it["data_offsets"][0])
        for name, it in header.items()
    }


def open_bin(path: Path) -> dict[str, Stored]:
    """Return name → place of the tensors of a ``.bin``.

    It is a zip of storages and a pickle that makes tensors of them, or, from before PyTorch 1.6, a bare pickle.
    """
    zipped, size = is_zip(path), path.stat().st_size
    records = zip_records(path) if zipped else {}
    _check_pickle(path, records)
    orders = [offset for offset, record in records.items() if record.filename.lower().endswith("/byteorder")]
    # torch would swap the bytes of storages that it has not read, which ends Python
    with open(path, "rb") as file:
        big = any(file.seek(offset) and file.read(3) == b"big" for offset in orders)
    if big:
        raise UserError(f"{path} was saved on a big-endian machine, which this tool does not handle: convert it there")
    tensors = _load_bin(path, fake=True)
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise UserError(f"{path} is not a model's state dict: it holds something other than tensors by name")
    # For tensors that cannot be read in pieces: mapped if the format allows it, else in memory.
    shard = functools.lru_cache(maxsize=1)(lambda: _load_bin(path))
    stored, storages = {}, {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        start = getattr(storage, "_checkpoint_offset", None)  # None for a bare pickle
        storages[storage._cdata if start is None else start] = storage.nbytes()  # two tensors may share one
        reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        room = storage.nbytes()
        if tensor.numel() and max(tensor.storage_offset() + reach + 1, tensor.numel()) * tensor.itemsize > room:
            claim = f"{name} claims {tensor.nbytes:,} bytes of a storage of {room:,}"
            raise UserError(f"{path}: {claim}: do not trust it")
        dtype = tensor.dtype if tensor.dtype in DTYPE_NAMES else str(tensor.dtype)
        place = {"whole": lambda name=name: shard()[name]}
        if start is not None and tensor.is_contiguous():
            if start not in records or records[start].file_size < storage.nbytes():
                raise ValueError(f"{name} does not fit the file")
            place = {"offset": start + tensor.storage_offset() * tensor.itemsize}
        stored[name] = Stored(dtype, tuple(tensor.shape), path, **place)
    if sum(storages.values()) > size:
        raise ValueError(f"its tensors take {sum(storages.values()):,} bytes, the file has {size:,}")
    if not zipped:
        shard()
    return stored


def _load_bin(path: Path, fake: bool = False) -> dict:
    """Load the state dict; with ``fake``, only shapes, types and places, without memory for the values."""
    try:
        if not fake:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip(path))
        if is_zip(path) and hasattr(torch.serialization, "_is_meta_location"):  # then torch reads no values
            return torch.load(path, map_location="meta", weights_only=True)
        from torch._subclasses.fake_tensor import FakeTensorMode  # importing takes 1.4 s

        with FakeTensorMode():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own message suggests loading it with weights_only=False
        raise ValueError("its pickle is malformed, or does not hold plain tensors") from None


def _check_pickle(path: Path, records: dict[int, zipfile.ZipInfo]) -> None:
    """Raise UserError if the pickle is damaged or looks up a name that plain tensors do not need."""
    if records:
        members = [member for member in records.values() if member.filename.lower().endswith("/data.pkl")]
        if len(members) != 1:
            raise ValueError(f"it has {len(members)} records called data.pkl")
        data = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")  # the one that torch.load will read
        if members[0].CRC not in (0, zlib.crc32(data)):  # 0: not computed
            raise UserError(f"{path} is damaged (data.pkl does not match its checksum): download it again")
        name = _foreign_global(data, 1)
    else:
        # five pickles: a number that marks the format, its version, the machine, tensors, storages; then their bytes
        with open(path, "rb") as file:
            name = _foreign_global(file.read(MAX_HEADER), 5)
    if name and name.startswith(("torch._utils._rebuild_", "torch._tensor._rebuild_")):
        raise UserError(
            f"{path} holds a sparse, quantized or otherwise special tensor ({name}), which this tool does not handle"
        )
    if name:
        raise UserError(
            f"{path} holds more than tensors (its pickle asks to run code: {name}) and was not loaded: do not trust it"
        )


def _foreign_global(data: bytes, pickles: int) -> str | None:
    """Return the first name that a state dict does not need, in so many consecutive pickles; None without one.

    A pickle has no jumps, so every opcode is seen, however deeply its objects are nested and whatever the memo holds.
    The time grows with the bytes (a second for a million opcodes), and a length that they claim takes no memory.

    Raises:
        ValueError: the data is not a pickle, or has no end.
    """
    file = io.BytesIO(data)
    for _ in range(pickles):
        top: list[str | None] = [None, None]  # of the stack: strings, as far as the last two opcodes pushed them
        for opcode, argument, _position in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST"):
                module, _, name = argument.partition(" ")
            elif opcode.name == "STACK_GLOBAL":
                module, name = top
            elif opcode.name.startswith("EXT"):  # a number for a name
                module = name = None
            else:
                if opcode.name not in MEMO:
                    top = [top[1], argument if isinstance(argument, str) and "UNICODE" in opcode.name else None]
                continue
            top = [top[1], None]
            if module is None or name is None:
                return "a name that it hides"
            if (module, name) not in ALLOWED:
                return ascii(f"{module}.{name}")[1:-1][:100]
    return None


def is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\3\4"


def zip_records(path: Path) -> dict[int, zipfile.ZipInfo]:
    """Return offset of its data → record. A compressed one is refused: a few bytes could claim gigabytes."""
    records = {}
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise ValueError(f"its record {member.filename} is compressed, which torch.save never does")
            if member.filename.lower().endswith("/data.pkl") and member.file_size > MAX_HEADER:
                raise ValueError(f"its pickle claims {member.file_size:,} bytes")
            file.seek(member.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            records[member.header_offset + 30 + name + extra] = member
    return records


def crc32_of(path: Path, offset: int, count: int, tick: Callable[[int], None]) -> int:
    """Return the CRC-32 of ``count`` bytes of a file; ``tick(bytes)`` is called after each 4 MB."""
    crc, buffer = 0, memoryview(bytearray(min(count, 1 << 22)))
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while count and (read := file.readinto(buffer[: min(count, len(buffer))])):
            crc, count = zlib.crc32(buffer[:read], crc), count - read
            tick(read)
    return crc


def unique(pairs: list[tuple[str, object]]) -> dict:
    """Return a JSON object; raise ValueError if it has a name twice, as parsers differ in which they take."""
    values = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name} appears twice")
        values[name] = value
    return values
