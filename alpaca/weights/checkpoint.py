"""Reads checkpoint folders: finds every tensor at once, and reads its values piece by piece when asked.

safetensors and PyTorch ``.bin`` shards are read alike, as bytes at an offset of a file (tensor_files.py).
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from pathlib import Path

import torch

from alpaca import UserError
from alpaca.common.text import first_line
from alpaca.weights.names import same_but_for_a_prefix, tied_names
from alpaca.weights.tensor_files import (
    DTYPE_NAMES,
    MAX_HEADER,
    Stored,
    is_zip,
    open_bin,
    open_safetensors,
    unique,
    zip_records,
)

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


def size_of(specs: Specs) -> int:
    """Return the bytes of all tensors."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs.values())


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


class CheckpointReader:
    """The tensors of a checkpoint folder by name. No file stays open; several threads may read at once.

    Raises:
        UserError: the folder has no weights, or its index and shards are damaged, hostile or do not fit together.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.config = read_json(self.folder / "config.json")
        self._shards: dict[str, dict[str, Stored]] = {}
        self._last = threading.local()  # each thread's last tensor that is not contiguous: copied once, not per chunk
        # safetensors first: a folder with both has the same weights twice, and safetensors cannot hold code
        files = [name for name in WEIGHTS if (self.folder / name).exists()]
        if not files:
            raise UserError(f"{self.folder} holds no weights")
        if files[0].endswith(".index.json"):
            self.shard_of = read_json(self.folder / files[0]).get("weight_map")
            if not isinstance(self.shard_of, dict) or not all(isinstance(file, str) for file in self.shard_of.values()):
                raise UserError(f"{self.folder / files[0]} has no weight_map from names to files: download it again")
        else:
            self.shard_of = {name: files[0] for name in self._open(files[0])}
        listed = set(self.shard_of)
        for name, shard in self.shard_of.items():
            self._check_name(name)
            self._check_name(shard)
            if Path(shard).name != shard or "\\" in shard:
                raise UserError(f"{self.folder / files[0]} points outside its folder ({shard!r}): do not trust it")
            if name not in self._open(shard):
                raise UserError(
                    f"{self.folder / shard} lacks the tensor {name} that the index puts there: download both again"
                )
        for shard, tensors in self._shards.items():
            for name in tensors:
                self._check_name(name)
                if self.shard_of.setdefault(name, shard) != shard:
                    raise UserError(
                        f"{self.folder}: {name} is in two shards, {shard} and {self.shard_of[name]}: download it again"
                    )
        self._left_out = self._buffers() | self._tied()
        for name in self.shard_of.keys() - listed - self._left_out:
            raise UserError(f"{self.path_of(name)} holds {name}, which {files[0]} does not list: download both again")

    def names(self) -> list[str]:
        """Return the names of the model's own tensors; layer 2 comes before layer 10, as in most files.

        Left out: buffers that old checkpoints hold and today's models compute (rotary ``inv_freq``, causal masks), and
        an output embedding that is tied to the input embedding and has its values.
        """

        def key(name: str) -> list:  # numbers by their length first: int() refuses one of more than 4,300 digits
            return [(len(part), part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]

        return sorted(self.shard_of.keys() - self._left_out, key=key)

    def _check_name(self, name: str) -> None:
        """Refuse control characters: messages show names, which could then rewrite what a terminal says."""
        if not name.isprintable():
            raise UserError(f"{self.folder}: the name {name[:99]!r} has control characters: do not trust it")

    def _buffers(self) -> set[str]:
        """Return names of buffers. GPT-2's and GPT-J's causal mask is attn.bias, of four dimensions; a bias has one."""
        return {
            name
            for name, shard in self.shard_of.items()
            if name.endswith(("rotary_emb.inv_freq", ".masked_bias"))
            or (name.endswith(".bias") and len(self._shards[shard][name].shape) == 4)
        }

    def _tied(self) -> set[str]:
        # With other values from_pretrained does not tie it, whatever config.json says.
        tied, names = tied_names(self.config), list(self.shard_of)
        return {
            name
            for output, input in tied.items()
            for name in names
            if same_but_for_a_prefix(name, output)
            and any(same_but_for_a_prefix(other, input) and self._equal(name, other) for other in names)
        }

    def _equal(self, a: str, b: str) -> bool:
        """Return whether two tensors have the same bits."""
        one, other = (self._shards[self.shard_of[name]][name] for name in (a, b))
        if (one.dtype, one.shape) != (other.dtype, other.shape) or one.dtype not in DTYPE_NAMES:
            return False
        if (one.path, one.offset) == (other.path, other.offset) and not one.whole:  # one storage in a .bin
            return True
        step, count = 1 << 22, math.prod(one.shape)
        x, y = (torch.empty(min(step, count), dtype=one.dtype) for _ in "ab")
        return all(
            torch.equal(
                self.read(a, start, x[: count - start]).view(torch.uint8),
                self.read(b, start, y[: count - start]).view(torch.uint8),
            )
            for start in range(0, count, step)
        )

    def rename(self, names: dict[str, str]) -> None:
        """Give tensors new names, which no other tensor has."""
        for name, new in names.items():
            shard = self.shard_of[new] = self.shard_of.pop(name)
            self._shards[shard][new] = self._shards[shard].pop(name)

    def specs(self) -> Specs:
        """Return name → (dtype, shape) of ``names()``, in that order."""
        return {name: self.spec(name) for name in self.names()}

    def spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return (dtype, shape)."""
        stored = self._shards[self.shard_of[name]][name]
        if stored.dtype not in DTYPE_NAMES:
            raise UserError(f"{self.folder}: {name} has the type {stored.dtype}, which this tool does not handle")
        return stored.dtype, stored.shape

    def read(self, name: str, start: int, out: torch.Tensor) -> torch.Tensor:
        """Fill ``out`` (1-D, contiguous, of the stored dtype) with the elements from ``start`` on, and return it."""
        stored = self._shards[self.shard_of[name]][name]
        if stored.whole:
            if getattr(self._last, "stored", None) is not stored:
                self._last.stored, self._last.values = stored, stored.whole().reshape(-1)
            return out.copy_(self._last.values[start : start + len(out)])
        view = memoryview(out.view(torch.uint8).numpy())
        with open(stored.path, "rb", buffering=0) as file:
            file.seek(stored.offset + start * out.itemsize)
            while len(view):
                count = file.readinto(view)
                if count == 0:
                    raise UserError(f"{stored.path} became shorter while it was read ({name}): start again")
                view = view[count:]
        return out

    def path_of(self, name: str) -> Path:
        return self.folder / self.shard_of[name]

    def checksums(self) -> list[tuple[Path, str, int, int, int]]:
        """Return (file, tensor, offset, bytes, CRC-32) of each record in ``.bin`` shards that has a checksum."""
        found = []
        for shard, tensors in self._shards.items():
            path = self.folder / shard
            if shard.endswith(".bin") and is_zip(path):
                names = {stored.offset: name for name, stored in tensors.items()}
                for offset, member in zip_records(path).items():
                    if member.CRC and member.file_size:  # 0: not computed
                        found.append((path, names.get(offset, member.filename), offset, member.file_size, member.CRC))
        return found

    def bare_pickles(self) -> list[Path]:
        """Return ``.bin`` shards from before PyTorch 1.6, which have no checksums and are loaded whole."""
        return [self.folder / s for s in self._shards if s.endswith(".bin") and not is_zip(self.folder / s)]

    def _open(self, shard: str) -> dict[str, Stored]:
        if shard not in self._shards:
            path = self.folder / shard
            if not path.exists():
                raise UserError(f"{path} is missing, but the index names it: download it again")
            try:
                self._shards[shard] = (open_safetensors if shard.endswith(".safetensors") else open_bin)(path)
            except UserError:
                raise
            except Exception as e:  # a hostile file can make a parser raise anything
                raise UserError(
                    f"{path} cannot be read (truncated, or a Git LFS pointer?): {first_line(e)}; download it again"
                ) from None
        return self._shards[shard]


def read_json(path: Path) -> dict:
    """Return the object in a JSON file of a checkpoint; raise UserError if it is missing or malformed."""
    try:
        if path.stat().st_size > MAX_HEADER:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is malformed: {e}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is malformed: it holds a {type(data).__name__}, not an object")
    return data
