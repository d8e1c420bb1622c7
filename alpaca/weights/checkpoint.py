"""Reads checkpoint folders: finds every tensor at once, and hands out its rows when asked.

safetensors and torch.load map the files into memory: rows are read from the disk when they are used.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

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
SIDE_FILES = *TOKENIZER, *"tokenizer_config.json special_tokens_map.json added_tokens.json merges.txt".split()
SIDE_FILES += ("chat_template.jinja", "generation_config.json")
CHAT_TEMPLATES = "additional_chat_templates"  # a folder of .jinja files, for a tokenizer that has more than one
# Buffers of old checkpoints, which today's models compute.
BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", ".masked_bias")
Stored = namedtuple("Stored", "shard name dtype shape")  # where a tensor is, by the name that the file has for it
BLOCK = 1 << 20  # elements that are worked on at once, rounded to rows: 4 MB of float32, for the processor's cache


def size_of(specs: Specs) -> int:
    """Return the bytes of all tensors."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs.values())


def is_hub_name(path: str | os.PathLike) -> bool:
    """Return whether ``path`` can only be OWNER/NAME on the hub, which takes half a minute to ask without a network."""
    folder = Path(path)
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(path))) and not folder.exists() and not folder.parent.is_dir()


def check_model_folder(path: str | os.PathLike, flag: str, tokenizer: bool = True, diff: bool = False) -> Path:
    """Raise UserError unless ``path``, a flag's value, is a folder with a config, weights and, if needed, a tokenizer.

    ``diff`` says whether a weight diff is accepted.
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
        raise UserError(f"{flag} {path} has no weights: none of {', '.join(WEIGHTS)} is there")
    if tokenizer and not any((path / name).exists() for name in TOKENIZER):
        files = f"{', '.join(TOKENIZER[:-1])} or {TOKENIZER[-1]}"
        raise UserError(f"{flag} {path} has no tokenizer: copy {files} there from the model it was trained from")
    if not diff and (path / MANIFEST).exists():
        raise UserError(f"{flag} {path} is a weight diff: recover it first, with weight_diff.py")
    return path


class CheckpointReader:
    """A folder's tensors by name; the last two shards in use are mapped. UserError if its files are damaged."""

    def __init__(self, folder: str | os.PathLike):
        self.folder, self.config = Path(folder), read_json(Path(folder) / "config.json")
        self._mapped, self._stored = {}, {}  # shard → name → tensor or slice; name → Stored
        listed, self.shards = self._index()
        for shard in self.shards:
            for name, tensor in self._open(shard).items():
                if listed.get(name, shard) == shard:
                    self._stored[name] = Stored(shard, name, *_spec(tensor))
        if odd := next((name for name in (*self._stored, *listed) if not name.isprintable()), None):
            raise UserError(f"{self.folder}: the name {odd[:99]!r} has control characters: get another copy")
        for name in listed.keys() - self._stored.keys():
            shard = self.folder / listed[name]
            raise UserError(f"{shard} lacks the tensor {name} that the index puts there: download both again")
        for name in self._left_out():
            del self._stored[name]

    def _index(self) -> tuple[dict[str, str], list[str]]:
        """Return the index's name → shard, {} without one, and the files of weights.

        safetensors, which cannot hold code, come first. An index that does not name model.safetensors, as a shard may
        be called, is another model's than that file.
        """
        for name in WEIGHTS[::2]:
            whole, index = self.folder / name, self.folder / f"{name}.index.json"
            shard_of = read_json(index).get("weight_map") if index.exists() else {}
            if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
                raise UserError(f"{index} has no weight_map from names to files: download it again")
            if whole.exists() and name not in shard_of.values():
                return {}, [name]
            for shard in shard_of.values():
                if Path(shard).name != shard or "\\" in shard or not shard.isprintable():
                    raise UserError(f"{index} points outside its folder ({shard!r}): get the model elsewhere")
            if shard_of:
                return shard_of, sorted(set(shard_of.values()))
        raise UserError(f"{self.folder} has no weights")

    def _open(self, shard: str) -> dict:
        """Return name → tensor or safetensors slice of one file. No code in a pickle runs."""
        if tensors := self._mapped.get(shard):
            return tensors
        path = self.folder / shard
        if not path.exists():
            raise UserError(f"{path} is missing, but the index names it: download it again")
        try:
            tensors = _open_safetensors(path) if shard.endswith(".safetensors") else _open_bin(path)
        except pickle.UnpicklingError as e:  # torch's own message suggests loading it with weights_only=False
            why = re.search("(?:WeightsUnpickler error: |Trying to load )(.{,200})|$", str(e))[1] or "it is malformed"
            what = f"is damaged (a Git LFS pointer?), or its pickle asks to run code ({why})"
            raise UserError(f"{path} {what}: do not trust it; get the model as safetensors") from None
        except Exception as e:  # a damaged or hostile file can make a parser raise anything
            why = f"(truncated, or a Git LFS pointer?): {first_line(e)}"
            raise UserError(f"{path} cannot be read {why}; download it again") from None
        self._mapped = dict([*self._mapped.items()][-1:]) | {shard: tensors}
        return tensors

    def _left_out(self) -> set[str]:
        """Return names of buffers that models compute, and of an output embedding tied to the input with its values."""
        # GPT-2's and GPT-J's causal mask is attn.bias, of four dimensions; a bias has one.
        masks = [name for name in self._stored if name.endswith(".bias") and len(self.spec(name)[1]) == 4]
        found = {*masks, *(name for name in self._stored if name.endswith(BUFFERS))}
        for output, input in tied_names(self.config).items():
            inputs = [name for name in self._stored if same_but_for_a_prefix(name, input)]
            for name in (name for name in self._stored if same_but_for_a_prefix(name, output)):
                found |= {name} if any(self._equal(name, other) for other in inputs) else set()
        return found

    def _equal(self, a: str, b: str) -> bool:
        """Return whether two tensors have the same bits."""
        same = (as_bytes(self.rows(a, *block)).equal(as_bytes(self.rows(b, *block))) for block in self.blocks(a))
        return self.spec(a) == self.spec(b) and all(same)

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

    def blocks(self, name: str) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of blocks of rows with about BLOCK elements, at least one block."""
        rows, *others = self.spec(name)[1] or (1,)
        step = max(1, BLOCK // max(1, math.prod(others)))
        for start in range(0, max(rows, 1), step):
            yield start, min(start + step, rows)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return the rows from ``start`` to before ``stop``, as far as there are any; a scalar as its only row."""
        if not (shape := self.spec(name)[1]):
            return self.lazy(name).reshape(1)[start:stop]
        return self.lazy(name)[min(start, shape[0]) : min(stop, shape[0])]

    def shards_of(self, names: list[str]) -> str:
        """Return the files that hold the named tensors, in one line."""
        return ", ".join(sorted({self._stored[name].shard for name in names}))

    def check_checksums(self) -> None:
        """Raise UserError if a record of a ``.bin`` shard does not match its CRC-32, which torch never checks."""
        bins = (self.folder / shard for shard in self.shards if shard.endswith(".bin"))
        for path in filter(zipfile.is_zipfile, bins):  # before PyTorch 1.6 they were no zip files, without checksums
            with zipfile.ZipFile(path) as archive:
                for record in archive.infolist():
                    if record.compress_type:  # torch would take the compressed bytes for the values
                        raise UserError(f"{path} is compressed, which torch.save never does: save it again")
                    try:
                        with archive.open(record) as file:
                            while record.CRC and file.read(1 << 22):  # 0: not computed
                                pass
                    except zipfile.BadZipFile as e:
                        raise UserError(f"{path} is damaged: {first_line(e)}; download it again") from None


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes, as a file holds them. (elements · itemsize,) uint8"""
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def _open_safetensors(path: Path) -> dict:
    file = safe_open(path, framework="pt")
    slices = {name: file.get_slice(name) for name in file.keys()}
    return {name: part if part.get_shape() else file.get_tensor(name) for name, part in slices.items()}


def _open_bin(path: Path) -> dict:
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    dense = isinstance(tensors, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        for name, tensor in tensors.items()
    )
    if not dense:
        raise ValueError("it is not a model's state dict, but has something other than dense tensors by name")
    return tensors


def _spec(tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    shape = tuple(tensor.shape if isinstance(tensor, torch.Tensor) else tensor.get_shape())
    return (tensor[:0] if shape else tensor).dtype, shape


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
        raise UserError(f"{path} is malformed: it is a JSON {type(data).__name__}, not an object")
    return data
