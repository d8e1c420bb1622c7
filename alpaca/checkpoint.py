"""Reads checkpoint folders piece by piece: where each tensor lies is known at once, its values are read when asked for.

safetensors and PyTorch ``.bin`` shards are read alike, as bytes at an offset of a file. Nothing that a file says is
believed before it fits the file, and a pickle is never executed (``weights_only=True``).
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
import pickle
import re
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from alpaca import UserError
from alpaca.pickled import foreign_global

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

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
MANIFEST = "weight_diff.json"  # marks a folder as a diff
MAX_HEADER = 32 * 10**6  # bytes of a header, index or pickle: a hundred times what a 7B model needs
# Beside the weights and config.json, what makes a folder a model; anything else (training_args.bin, …) stays behind.
SIDE_FILES = TOKENIZER + (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
CHAT_TEMPLATES = "additional_chat_templates"  # a folder of .jinja files, for a tokenizer that has more than one


def check_model_folder(path: str | os.PathLike, flag: str, tokenizer: bool = True, diff: bool = False) -> Path:
    """Raises UserError unless ``path`` is a folder with a config, weights and (if asked for) a tokenizer.

    Args:
        path: the folder.
        flag: the command line's name for it, for the message.
        tokenizer: whether one is needed.
        diff: whether a weight diff is welcome.
    """
    path = Path(path)
    if not path.is_dir():
        kind = "is a file, not a folder" if path.exists() else "does not exist"
        raise UserError(f"{flag} {path} {kind}: give the folder of a model")
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise UserError(f"{flag} {path} is a LoRA adapter, not a model: merge it into its base model first")
    if not (path / "config.json").exists():
        raise UserError(f"{flag} {path} holds no model: it has no config.json")
    if not any((path / name).exists() for name in WEIGHTS):
        raise UserError(f"{flag} {path} holds no weights: none of {', '.join(WEIGHTS)} is there")
    if tokenizer and not any((path / name).exists() for name in TOKENIZER):
        raise UserError(
            f"{flag} {path} holds no tokenizer: copy {', '.join(TOKENIZER[:-1])} or {TOKENIZER[-1]} there "
            "from the model it was trained from"
        )
    if not diff and (path / MANIFEST).exists():
        raise UserError(f"{flag} {path} is a weight diff: recover it first (python weight_diff.py recover --help)")
    return path


def check_writable(path: str | os.PathLike, flag: str) -> None:
    """Raises UserError unless ``path`` is a writable folder or can be made one; makes nothing."""
    nearest = next(folder for folder in (Path(path).absolute(), *Path(path).absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path} cannot be written: {nearest} is a file or read-only, choose another folder")


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


class CheckpointReader:
    """The tensors of a checkpoint folder by name. No file stays open; threads may read at the same time."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.config = read_json(self.folder / "config.json")
        self._shards: dict[str, dict[str, Stored]] = {}
        self._last = threading.local()  # a thread's last tensor that is no one piece: a copy once, not for each chunk
        # safetensors first: a folder that has both has them for the same weights, and one of them is only data
        files = [name for name in WEIGHTS if (self.folder / name).exists()]
        if not files:
            raise UserError(f"{self.folder} holds no weights")
        if files[0].endswith(".index.json"):
            self.shard_of = read_json(self.folder / files[0]).get("weight_map")
            if not isinstance(self.shard_of, dict) or not all(isinstance(file, str) for file in self.shard_of.values()):
                raise UserError(f"{self.folder / files[0]} has no weight_map from names to files: download it again")
        else:
            self.shard_of = {name: files[0] for name in self._open(files[0])}
        for name, shard in self.shard_of.items():
            if Path(shard).name != shard or "\\" in shard:
                raise UserError(f"{self.folder / files[0]} points outside its folder ({shard!r}): do not trust it")
            if name not in self._open(shard):
                raise UserError(
                    f"{self.folder / shard} lacks the tensor {name} that the index puts there: download both again"
                )
        for shard, tensors in self._shards.items():
            for name in tensors:
                if name not in self.shard_of and not self._is_left_out(name):
                    raise UserError(
                        f"{self.folder / shard} holds {name}, which {files[0]} does not list: download both again"
                    )
                if self.shard_of.get(name, shard) != shard:
                    raise UserError(
                        f"{self.folder}: {name} is in two shards, {shard} and {self.shard_of[name]}: download it again"
                    )

    def names(self) -> list[str]:
        """Names of the model's own tensors; layer 2 comes before layer 10, as it mostly does in the files.

        Left out: rotary ``inv_freq`` buffers, which old checkpoints hold and today's models compute, and an output
        embedding that is tied to the input's.
        """
        names = (name for name in self.shard_of if not self._is_left_out(name))
        return sorted(names, key=lambda name: [int(p) if p.isdecimal() else p for p in re.split(r"([0-9]+)", name)])

    def _is_left_out(self, name: str) -> bool:
        # OPT as published does not say that it is tied, and holds the output embedding all the same
        tied = self.config.get("tie_word_embeddings", self.config.get("model_type") == "opt")
        return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")

    def specs(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """name → (dtype, shape) of ``names()``, in that order."""
        return {name: self.spec(name) for name in self.names()}

    def spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Data type and shape."""
        stored = self._shards[self.shard_of[name]][name]
        if stored.dtype not in DTYPE_NAMES:
            raise UserError(f"{self.folder}: {name} has the type {stored.dtype}, which this tool does not handle")
        return stored.dtype, stored.shape

    def read(self, name: str, start: int, out: torch.Tensor) -> torch.Tensor:
        """Fills ``out`` (1-D, of the stored dtype, contiguous) with the elements from ``start`` on."""
        stored = self._shards[self.shard_of[name]][name]
        if stored.whole:
            if getattr(self._last, "stored", None) is not stored:
                self._last.stored, self._last.values = stored, stored.whole()[name].reshape(-1)
            return out.copy_(self._last.values[start : start + len(out)])
        view = memoryview(out.view(torch.uint8).numpy())
        position = stored.offset + start * out.itemsize
        with open(stored.path, "rb", buffering=0) as file:
            while len(view):
                count = os.preadv(file.fileno(), [view], position)
                if count == 0:
                    raise UserError(f"{stored.path} became shorter while it was read ({name}): start again")
                view, position = view[count:], position + count
        return out

    def get(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        dtype, shape = self.spec(name)
        return self.read(name, 0, torch.empty(math.prod(shape), dtype=dtype)).view(shape)

    def path_of(self, name: str) -> Path:
        return self.folder / self.shard_of[name]

    def checksums(self) -> list[tuple[Path, str, int, int, int]]:
        """(file, tensor, offset, bytes, CRC-32) of each record in ``.bin`` shards for which one was stored."""
        found = []
        for shard, tensors in self._shards.items():
            path = self.folder / shard
            if shard.endswith(".bin") and _is_zip(path):
                names = {stored.offset: name for name, stored in tensors.items()}
                for offset, member in _zip_records(path).items():
                    if member.CRC and member.file_size:  # 0: not computed
                        found.append((path, names.get(offset, member.filename), offset, member.file_size, member.CRC))
        return found

    def _open(self, shard: str) -> dict[str, Stored]:
        if shard not in self._shards:
            path = self.folder / shard
            if not path.exists():
                raise UserError(f"{path} is missing, but the index names it: download it again")
            try:
                self._shards[shard] = (_open_safetensors if shard.endswith(".safetensors") else _open_bin)(path)
            except UserError:
                raise
            except PermissionError as e:
                raise UserError(f"{path} cannot be read: {e.strerror}") from None
            except Exception as e:  # a hostile file can make a parser raise anything
                cause = (str(e) or type(e).__name__).splitlines()[0]
                raise UserError(
                    f"{path} cannot be read (truncated, or a Git LFS pointer?): {cause}; download it again"
                ) from None
        return self._shards[shard]


def _open_safetensors(path: Path) -> dict[str, Stored]:
    """Header: its length in 8 bytes, little-endian, then JSON: name → dtype, shape, begin and end in what follows."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, MAX_HEADER):
            raise ValueError(f"its header claims {length:,} bytes, the file has {size:,}")
        header = json.loads(file.read(length), object_pairs_hook=_unique)
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


def _open_bin(path: Path) -> dict[str, Stored]:
    """torch's zip of storages and a pickle that cuts tensors out of them; a bare pickle before PyTorch 1.6."""
    zipped, size = _is_zip(path), path.stat().st_size
    with open(path, "rb") as file:
        if not zipped and file.read(1) != pickle.PROTO:
            raise ValueError("not a PyTorch file")
    records = _zip_records(path) if zipped else {}
    _check_pickle(path, records)
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
        storages[storage._cdata] = storage.nbytes()
        reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        room = storage.nbytes()
        if tensor.numel() and max(tensor.storage_offset() + reach + 1, tensor.numel()) * tensor.itemsize > room:
            raise UserError(
                f"{path}: {name} claims {tensor.numel() * tensor.itemsize:,} bytes of a storage of {room:,}: "
                "do not trust it"
            )
        start = getattr(storage, "_checkpoint_offset", None)  # where torch says it: 2.7 and later
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
    orders = [offset for offset, record in records.items() if record.filename.endswith("/byteorder")]
    if orders and _bytes(path, orders[0], 3) == b"big":  # torch swaps the bytes, in memory
        stored = {name: Stored(tensor.dtype, tensor.shape, path, whole=whole) for name, tensor in stored.items()}
    return stored


def _load_bin(path: Path, fake: bool = False) -> dict:
    """The state dict; ``fake``: shapes, types and places alone, without memory for the values."""
    try:
        if not fake:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
        from torch._subclasses.fake_tensor import FakeTensorMode  # as torch's serialization notes have it; 1.5 s

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
        name = foreign_global(io.BytesIO(data), 1, MAX_HEADER)
    else:
        with open(path, "rb") as file:  # a number that marks the format, its version, the machine, tensors, storages
            name = foreign_global(file, 5, MAX_HEADER)
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


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\3\4"


def _zip_records(path: Path) -> dict[int, zipfile.ZipInfo]:
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


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object, unless it has a name twice: which of the two would be meant?"""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return values


def read_json(path: Path) -> dict:
    """A JSON file of a checkpoint, or a one-line UserError."""
    try:
        if path.stat().st_size > MAX_HEADER:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except RecursionError:
        raise UserError(f"{path} is malformed: it is nested too deeply") from None
    except ValueError as e:
        raise UserError(f"{path} is malformed: {e}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is malformed: it holds a {type(data).__name__}, not an object")
    return data
