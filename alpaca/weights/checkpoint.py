"""Reads checkpoint folders: finds every tensor at once, and hands out its rows when asked.

The libraries read the files: safetensors' slices, and torch.load with mmap. Both map a file into memory, so rows are
read from the disk when they are used, and the pages can be dropped again: a tensor never needs memory as a whole.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from alpaca import UserError
from alpaca.common.text import first_line
from alpaca.weights.names import same_but_for_a_prefix, tied_names

Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # name → (dtype, shape)
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # what users may ask for
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
MANIFEST = "weight_diff.json"  # marks a folder as a diff
# Files of a model beside its weights and config.json; anything else (training_args.bin, …) is not copied.
SIDE_FILES = TOKENIZER + (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
CHAT_TEMPLATES = "additional_chat_templates"  # a folder of .jinja files, for a tokenizer that has more than one
# Buffers that old checkpoints hold and today's models compute. GPT-2's and GPT-J's masks too: see _is_buffer.
BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", ".masked_bias")
BLOCK = 1 << 20  # elements that are worked on at once, rounded to rows: 4 MB of float32, for the processor's cache


def size_of(specs: Specs) -> int:
    """Return the bytes of all tensors."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs.values())


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of blocks of rows with about BLOCK elements; a scalar is a row, no rows are one block."""
    rows = shape[0] if shape else 1
    step = max(1, BLOCK // max(1, math.prod(shape[1:])))
    for start in range(0, max(rows, 1), step):
        yield start, min(start + step, rows)


def check_model_folder(path: str | os.PathLike, flag: str, tokenizer: bool = True, diff: bool = False) -> Path:
    """Raise UserError unless ``path`` is a folder with a config, weights and, if needed, a tokenizer.

    ``flag`` is the script's flag, for messages; ``diff`` says whether a weight diff is accepted.
    """
    path = Path(path)
    if not path.is_dir():
        kind = "is a file, not a folder" if path.exists() else "does not exist"
        raise UserError(f"{flag} {path} {kind}: choose the folder of a model")
    if not (path / "config.json").exists():
        if (path / "adapter_config.json").exists():
            raise UserError(f"{flag} {path} is a LoRA adapter, not a model: merge it into its base model first")
        raise UserError(f"{flag} {path} is not a model: it has no config.json")
    if not any((path / name).exists() for name in WEIGHTS):
        raise UserError(f"{flag} {path} holds no weights: none of {', '.join(WEIGHTS)} is there")
    if tokenizer and not any((path / name).exists() for name in TOKENIZER):
        raise UserError(
            f"{flag} {path} holds no tokenizer: copy {', '.join(TOKENIZER[:-1])} or {TOKENIZER[-1]} there "
            "from the model it was trained from"
        )
    if not diff and (path / MANIFEST).exists():
        raise UserError(f"{flag} {path} is a weight diff: recover it first, with weight_diff.py")
    return path


class Stored(NamedTuple):
    """Where a tensor is, by the name that the file has for it."""

    shard: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class CheckpointReader:
    """The tensors of a checkpoint folder by name. One shard is mapped at a time: the last one that was asked for.

    Left out are buffers that today's models compute, and an output embedding that is tied to the input embedding and
    has its values.

    Raises:
        UserError: the folder has no weights, or its index and shards are damaged or do not fit together.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.config = read_json(self.folder / "config.json")
        self._mapped: tuple[str, dict] = ("", {})
        self._stored: dict[str, Stored] = {}
        listed, self.shards = self._index()
        for shard in self.shards:
            for name, tensor in self._open(shard).items():
                if not name.isprintable():  # messages show names, which could then rewrite what a terminal says
                    raise UserError(f"{self.folder}: the name {name[:99]!r} has control characters: do not trust it")
                if listed.get(name, shard) == shard:
                    self._stored[name] = Stored(shard, name, *_spec(tensor))
        for name in listed.keys() - self._stored.keys():
            raise UserError(
                f"{self.folder / listed[name]} lacks the tensor {name[:99]!r} that the index puts there: download both "
                "again"
            )
        left_out = {name for name, stored in self._stored.items() if _is_buffer(name, stored.shape)} | self._tied()
        self._stored = {name: self._stored[name] for name in sorted(self._stored.keys() - left_out, key=_in_order)}

    def _index(self) -> tuple[dict[str, str], list[str]]:
        """Return the index's name → shard, {} without one, and the files of weights.

        safetensors first: a folder with both has the same weights twice, and safetensors cannot hold code. An index
        may call one of its shards model.safetensors; an index that does not is another model's than such a file.
        """
        for name in WEIGHTS[::2]:
            whole, index = self.folder / name, self.folder / f"{name}.index.json"
            shard_of = read_json(index).get("weight_map") if index.exists() else {}
            if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
                raise UserError(f"{index} has no weight_map from names to files: download it again")
            if whole.exists() and name not in shard_of.values():
                return {}, [name]
            for shard in shard_of.values():
                if Path(shard).name != shard or "\\" in shard:
                    raise UserError(f"{index} points outside its folder ({shard!r}): do not trust it")
            if shard_of:
                return shard_of, sorted(set(shard_of.values()))
        raise UserError(f"{self.folder} holds no weights")

    def _open(self, shard: str) -> dict:
        """Return name → tensor or safetensors slice of one file. No code in a pickle runs."""
        if self._mapped[0] == shard:
            return self._mapped[1]
        path = self.folder / shard
        if not path.exists():
            raise UserError(f"{str(path)!r} is missing, but the index names it: download it again")
        try:
            tensors = _open_safetensors(path) if shard.endswith(".safetensors") else _open_bin(path)
        except pickle.UnpicklingError as e:  # torch's own message suggests loading it with weights_only=False
            why = re.search("WeightsUnpickler error: (.*)", str(e))
            raise UserError(
                f"{path} holds more than tensors (its pickle asks to run code) or is damaged, and was not loaded: "
                f"{why[1][:200] if why else 'its pickle is malformed'}; do not trust it"
            ) from None
        except Exception as e:  # a damaged or hostile file can make a parser raise anything
            raise UserError(
                f"{path} cannot be read (truncated, or a Git LFS pointer?): {first_line(e)}; download it again"
            ) from None
        if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
            raise UserError(f"{path} is not a model's state dict: it holds something other than tensors by name")
        for name, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor) and (tensor.is_quantized or tensor.layout != torch.strided):
                raise UserError(f"{path}: {name} is a sparse or quantized tensor, which this tool does not handle")
            if not isinstance(tensor, torch.Tensor) and not hasattr(tensor, "get_shape"):
                raise UserError(f"{path} is not a model's state dict: {name} is a {type(tensor).__name__}")
        self._mapped = (shard, tensors)
        return tensors

    def _tied(self) -> set[str]:
        # With other values from_pretrained does not tie it, whatever config.json says.
        tied, names = tied_names(self.config), list(self._stored)
        return {
            name
            for output, input in tied.items()
            for name in names
            if same_but_for_a_prefix(name, output)
            and any(same_but_for_a_prefix(other, input) and self._equal(name, other) for other in names)
        }

    def _equal(self, a: str, b: str) -> bool:
        """Return whether two tensors have the same bits."""
        dtype, shape = self.spec(a)
        return (dtype, shape) == self.spec(b) and all(
            torch.equal(as_bytes(self.rows(a, *block)), as_bytes(self.rows(b, *block))) for block in row_blocks(shape)
        )

    def names(self) -> list[str]:
        """Return the names; layer 2 comes before layer 10, as in most files."""
        return sorted(self._stored, key=_in_order)

    def specs(self) -> Specs:
        """Return name → (dtype, shape) of ``names()``, in that order."""
        return {name: self.spec(name) for name in self.names()}

    def spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return (dtype, shape)."""
        return self._stored[name].dtype, self._stored[name].shape

    def rename(self, names: dict[str, str], keep: bool = False) -> None:
        """Give tensors new names, which no other tensor has; with ``keep`` they have the old ones too."""
        for name, new in names.items():
            self._stored[new] = self._stored[name] if keep else self._stored.pop(name)

    def lazy(self, name: str):
        """Return what reads the parts of a tensor that it is indexed with: a mapped tensor, or a safetensors slice."""
        stored = self._stored[name]
        return self._open(stored.shard)[stored.name]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return the rows from ``start`` to before ``stop``, as far as there are any; a scalar as its only row."""
        shape = self.spec(name)[1]
        if not shape:
            return self.lazy(name).reshape(1)
        return self.lazy(name)[min(start, shape[0]) : min(stop, shape[0])]

    def path_of(self, name: str) -> Path:
        return self.folder / self._stored[name].shard

    def bare_pickles(self) -> list[Path]:
        """Return ``.bin`` shards from before PyTorch 1.6, which have no checksums and are loaded whole."""
        paths = [self.folder / shard for shard in self.shards if shard.endswith(".bin")]
        return [path for path in paths if not zipfile.is_zipfile(path)]

    def check_checksums(self) -> None:
        """Raise UserError if a record of a ``.bin`` shard does not match its CRC-32, which torch never checks."""
        for path in (self.folder / shard for shard in self.shards if shard.endswith(".bin")):
            if path not in self.bare_pickles():
                with zipfile.ZipFile(path) as archive:
                    for record in archive.infolist():
                        if record.compress_type != zipfile.ZIP_STORED:
                            raise UserError(f"{path} is compressed, and torch would read it as it is: save it again")
                        if record.CRC:  # 0: not computed
                            _check_record(path, archive, record)


def _check_record(path: Path, archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> None:
    try:
        with archive.open(record) as file:
            while file.read(1 << 22):
                pass
    except zipfile.BadZipFile as e:
        raise UserError(f"{path} is damaged: {first_line(e)}; download it again") from None


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes, 1-D, of a tensor as a file holds it. (elements · itemsize,) uint8"""
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def _open_safetensors(path: Path) -> dict:
    file = safe_open(path, framework="pt")
    slices = {name: file.get_slice(name) for name in file.keys()}
    return {name: part if part.get_shape() else file.get_tensor(name) for name, part in slices.items()}


def _open_bin(path: Path) -> dict:
    # Files from before PyTorch 1.6 cannot be mapped: they are loaded whole.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _spec(tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    if isinstance(tensor, torch.Tensor):
        return tensor.dtype, tuple(tensor.shape)
    return tensor[:0].dtype, tuple(tensor.get_shape())


def _is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    # GPT-2's and GPT-J's causal mask is attn.bias, of four dimensions; a bias has one.
    return name.endswith(BUFFERS) or (name.endswith(".bias") and len(shape) == 4)


def _in_order(name: str) -> list:
    # Numbers by their length first: int() refuses one of more than 4,300 digits.
    return [(len(part), part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]


def read_json(path: Path) -> dict:
    """Return the object in a JSON file of a checkpoint; raise UserError if it is missing or malformed."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is malformed: {e}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is malformed: it holds a {type(data).__name__}, not an object")
    return data
