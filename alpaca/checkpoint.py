"""Streams tensors in and out of sharded checkpoints, one tensor in memory at a time.

Reads safetensors (memory-mapped) and PyTorch ``.bin`` shards (``weights_only=True``: a pickle is never executed);
writes safetensors shards with an index, as ``from_pretrained`` expects them.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

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

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")
MANIFEST = "weight_diff.json"  # marks a folder as a diff
# Beside the weights and config.json, what makes a folder a model; anything else (training_args.bin, …) stays behind.
SIDE_FILES = TOKENIZER + (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


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


class CheckpointReader:
    """The tensors of a checkpoint folder by name. Shards are opened once, tensors are read when asked for."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.config = read_json(self.folder / "config.json")
        self._shards: dict[str, Callable] = {}
        # safetensors first: a folder that has both has them for the same weights, and one of them is only data
        files = [name for name in WEIGHTS if (self.folder / name).exists()]
        if not files:
            raise UserError(f"{self.folder} holds no weights")
        if files[0].endswith(".index.json"):
            self.shard_of = read_json(self.folder / files[0]).get("weight_map")
            if not isinstance(self.shard_of, dict) or not all(isinstance(file, str) for file in self.shard_of.values()):
                raise UserError(f"{self.folder / files[0]} has no weight_map from names to files: download it again")
        else:
            self.shard_of = {name: files[0] for name in self._open(files[0]).keys()}
        for name, shard in self.shard_of.items():
            if Path(shard).name != shard:
                raise UserError(f"{self.folder / files[0]} points outside its folder ({shard!r}): do not trust it")
            if name not in self._open(shard).keys():
                raise UserError(f"{self.folder / shard} lacks the tensor {name} that the index puts there")

    def names(self) -> list[str]:
        """Sorted names of the model's own tensors.

        Left out: rotary ``inv_freq`` buffers, which old checkpoints hold and today's models compute, and an output
        embedding that is tied to the input's.
        """
        # OPT as published does not say that it is tied, and holds the output embedding all the same
        tied = self.config.get("tie_word_embeddings", self.config.get("model_type") == "opt")
        return sorted(
            name
            for name in self.shard_of
            if not name.endswith("rotary_emb.inv_freq") and not (tied and name == "lm_head.weight")
        )

    def spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Data type and shape, read from the header alone where the format has one."""
        shard = self._open(self.shard_of[name])
        if isinstance(shard, dict):
            return shard[name].dtype, tuple(shard[name].shape)
        view = shard.get_slice(name)
        if view.get_dtype() not in DTYPES:
            raise UserError(f"{self.folder}: {name} has the type {view.get_dtype()}, which this tool does not handle")
        return DTYPES[view.get_dtype()], tuple(view.get_shape())

    def get(self, name: str) -> torch.Tensor:
        shard = self._open(self.shard_of[name])
        return shard[name] if isinstance(shard, dict) else shard.get_tensor(name)

    def _open(self, file: str):
        if file not in self._shards:
            path = self.folder / file
            if not path.exists():
                raise UserError(f"{path} is missing, but the index names it: download it again")
            try:
                if file.endswith(".safetensors"):
                    self._shards[file] = safe_open(path, framework="pt")
                else:
                    self._shards[file] = _load_bin(path)
            except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as e:
                cause = (str(e) or type(e).__name__).splitlines()[0]
                raise UserError(f"{path} cannot be read (truncated, or a Git LFS pointer?): {cause}") from None
        return self._shards[file]


def _load_bin(path: Path) -> dict[str, torch.Tensor]:
    import pickle

    with open(path, "rb") as file:
        magic = file.read(4)
    zipped = magic == b"PK\3\4"  # since PyTorch 1.6; a bare pickle, as before it, cannot be memory-mapped
    if not zipped and magic[:1] != pickle.PROTO:
        raise ValueError("not a PyTorch file")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than tensors (its pickle asks to run code) and was not loaded") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f"{path} is not a model's state dict: it holds something else than tensors by name")
    return tensors


def read_json(path: Path) -> dict:
    """A small JSON file of a checkpoint, or a one-line UserError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except ValueError as e:
        raise UserError(f"{path} is malformed: {e}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is malformed: it holds a {type(data).__name__}, not an object")
    return data


@contextmanager
def new_folder(path: str | os.PathLike):
    """Yields a temporary folder beside ``path`` that becomes ``path`` by one rename on success, and is gone otherwise.

    Raises:
        UserError: ``path`` exists and is not an empty folder.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is there already: remove it, or choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        os.chmod(temporary, 0o755)  # mkdtemp makes 0700
        os.rename(temporary, path)  # takes the place of an empty folder
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_weights(
    folder: Path,
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[torch.Tensor],
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes tensors as they come to safetensors shards whose layout is planned beforehand from ``specs``.

    Args:
        folder: exists; gets ``model.safetensors``, or numbered shards and an index.
        specs: name → (dtype, shape), in the order in which ``tensors`` yields them.
        tensors: one tensor for each spec.
        max_shard_bytes: a shard is closed before it would grow beyond this (one tensor may be larger).
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, (dtype, shape) in specs.items():
        bytes_ = dtype.itemsize * torch.Size(shape).numel()
        if shards[-1] and size + bytes_ > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_

    stream = iter(tensors)
    weight_map, total = {}, 0
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            dtype, shape = specs[name]
            end = offset + dtype.itemsize * torch.Size(shape).numel()
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
            weight_map[name] = file
        total += offset
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that tensor data starts at a multiple of 8 bytes
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                tensor = next(stream)
                if (tensor.dtype, tuple(tensor.shape)) != specs[name]:
                    raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not what was planned")
                out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def copy_side_files(source: Path, target: Path, config: dict) -> None:
    """Copies tokenizer and generation files as they are, and writes ``config`` as config.json."""
    for name in SIDE_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    config = {key: value for key, value in config.items() if key != "_name_or_path"}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
