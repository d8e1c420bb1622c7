"""One file of weights, safetensors or PyTorch's ``.bin``: where in it each tensor lies.

Nothing that a file says is believed before it fits the file, and a pickle is never executed (``weights_only=True``).
"""

from __future__ import annotations

import functools
import json
import math
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from alpaca import UserError
from alpaca.weights.pickles import foreign_global

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
MAX_HEADER = 32 * 10**6  # bytes of a header, index or pickle: a hundred times what a 7B model needs


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its bytes from ``offset`` on, or, for what is not one piece there, the shard read whole."""

    dtype: torch.dtype | str  # the file's name for a type that this tool does not handle
    shape: tuple[int, ...]
    path: Path
    offset: int = 0
    whole: Callable[[], dict[str, torch.Tensor]] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def open_safetensors(path: Path) -> dict[str, Stored]:
    """Header: its length in 8 bytes, little-endian, then JSON: name → dtype, shape, begin and end in what follows."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, MAX_HEADER):
            raise ValueError(f"its header claims {length:,} bytes, the file has {size:,}")
        header = json.loads(file.read(length), object_pairs_hook=unique)
    with safe_open(path, framework="pt"):  # the library's own checks: offsets without holes, sizes that fit the shapes
        pass
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        dtype, (begin, end) = DTYPES.get(entry["dtype"], entry["dtype"]), entry["data_offsets"]
        tensors[name] = Stored(dtype, tuple(entry["shape"]), path, 8 + length + begin)
        if not 0 <= begin <= end <= size - 8 - length or (
            dtype in DTYPE_NAMES and tensors[name].numel * dtype.itemsize != end - begin
        ):
            raise ValueError(f"{name} does not fit the file")
    return tensors


def open_bin(path: Path) -> dict[str, Stored]:
    """torch's zip of storages and a pickle that cuts tensors out of them; a bare pickle before PyTorch 1.6."""
    zipped, size = is_zip(path), path.stat().st_size
    with open(path, "rb") as file:
        if not zipped and file.read(1) != pickle.PROTO:
            raise ValueError("not a PyTorch file")
    records = zip_records(path) if zipped else {}
    _check_pickle(path, records)
    orders = [offset for offset, record in records.items() if record.filename.lower().endswith("/byteorder")]
    # torch would swap the bytes of what it has not read
    if any(_bytes(path, offset, 3) == b"big" for offset in orders):
        raise UserError(f"{path} was saved on a big-endian machine, which this tool does not handle: convert it there")
    tensors = _load_bin(path, fake=True)
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise UserError(f"{path} is not a model's state dict: it holds something else than tensors by name")
    # What cannot be read in pieces: mapped where the format can be, else in memory.
    whole = functools.lru_cache(maxsize=1)(lambda: _load_bin(path))
    stored, storages = {}, {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise UserError(f"{path}: {name} is sparse or quantized, which this tool does not handle")
        storage = tensor.untyped_storage()
        start = getattr(storage, "_checkpoint_offset", None)  # where torch says it: 2.7 and later
        storages[storage._cdata if start is None else start] = storage.nbytes()  # tensors may share one
        reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        room = storage.nbytes()
        if tensor.numel() and max(tensor.storage_offset() + reach + 1, tensor.numel()) * tensor.itemsize > room:
            raise UserError(
                f"{path}: {name} claims {tensor.numel() * tensor.itemsize:,} bytes of a storage of {room:,}: "
                "do not trust it"
            )
        dtype = tensor.dtype if tensor.dtype in DTYPE_NAMES else str(tensor.dtype)
        place = {"whole": whole}
        if start is not None and tensor.is_contiguous():
            if start not in records or records[start].file_size < storage.nbytes():
                raise ValueError(f"{name} does not fit the file")
            place = {"offset": start + tensor.storage_offset() * tensor.itemsize}
        stored[name] = Stored(dtype, tuple(tensor.shape), path, **place)
    if sum(storages.values()) > size:
        raise ValueError(f"its tensors take {sum(storages.values()):,} bytes, the file has {size:,}")
    if not zipped:
        whole()
    return stored


def _load_bin(path: Path, fake: bool = False) -> dict:
    """The state dict; ``fake``: shapes, types and places alone, without memory for the values."""
    try:
        if not fake:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip(path))
        if is_zip(path) and hasattr(torch.serialization, "_is_meta_location"):  # a torch that then reads no values
            return torch.load(path, map_location="meta", weights_only=True)
        from torch._subclasses.fake_tensor import FakeTensorMode  # as torch's serialization notes have it; 1.4 s

        with FakeTensorMode():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        if not re.search(r"[Uu]nsupported|Trying to|Can only", str(e)):
            raise
        wanted = re.search(r"(?:function|class|type) (\S+)", str(e))
        raise _more_than_tensors(path, wanted[1] if wanted else "something") from None


def _check_pickle(path: Path, records: dict[int, zipfile.ZipInfo]) -> None:
    """Raises UserError when the pickle is damaged, or looks up what plain tensors do not need."""
    if records:
        members = [member for member in records.values() if member.filename.lower().endswith("/data.pkl")]
        if len(members) != 1:
            raise ValueError(f"it has {len(members)} records that are called data.pkl")
        data = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")  # the one that torch.load will read
        if members[0].CRC not in (0, zlib.crc32(data)):  # 0: not computed
            raise UserError(f"{path} is damaged (data.pkl does not have its checksum): download it again")
        name = foreign_global(data, 1)
    else:
        # a number that marks the format, its version, the machine, tensors, storages; then their bytes
        name = foreign_global(_bytes(path, 0, MAX_HEADER), 5)
    if name and name.startswith(("torch._utils._rebuild_", "torch._tensor._rebuild_")):
        raise UserError(
            f"{path} holds a sparse, quantized or otherwise special tensor ({name}), which this tool does not handle"
        )
    if name:
        raise _more_than_tensors(path, name)


def _more_than_tensors(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} holds more than tensors (its pickle asks to run code: {what}) and was not loaded: do not trust it"
    )


def is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\3\4"


def zip_records(path: Path) -> dict[int, zipfile.ZipInfo]:
    """Where the data of each record begins → the record; none is compressed: a few bytes could claim gigabytes."""
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


def _bytes(path: Path, offset: int, count: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(count)


def crc32_of(path: Path, offset: int, count: int, tick: Callable[[int], None]) -> int:
    """CRC-32 of ``count`` bytes of a file; ``tick`` hears of each 4 MB."""
    crc, buffer = 0, memoryview(bytearray(min(count, 1 << 22)))
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while count and (read := file.readinto(buffer[: min(count, len(buffer))])):
            crc, count = zlib.crc32(buffer[:read], crc), count - read
            tick(read)
    return crc


def unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object, unless it has a name twice: which of the two would be meant?"""
    values = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name} is there twice")
        values[name] = value
    return values
