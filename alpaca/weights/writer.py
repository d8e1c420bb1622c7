"""Writes safetensors shards block by block; their layout is planned before the first byte.

safetensors' own save_file needs a whole shard in memory. huggingface_hub plans which tensor goes into which file.
"""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from alpaca import UserError
from alpaca.common.files import check_space
from alpaca.weights.checkpoint import Specs, as_bytes, size_of

# The names that safetensors has for the types of weights and of diffs.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def described(spec: tuple[torch.dtype, tuple[int, ...]]) -> str:
    """Return a tensor's type and shape, as in "F16 [32000, 4096]"."""
    return f"{DTYPE_NAMES.get(spec[0], spec[0])} {list(spec[1])}"


class ShardWriter(AbstractContextManager):
    """Writes tensors of known name → (dtype, shape) into ``folder``, in any order, the blocks of each in turn.

    A shard has at most ``max_shard_size``, such as 5GB (powers of 1000), or one tensor. UserError if that is no size.
    """

    def __init__(self, folder: Path, specs: Specs, max_shard_size: str):
        check_space(folder, size_of(specs))
        tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in specs.items()}
        try:
            plan = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
        except (ValueError, OverflowError):
            raise UserError(f"max_shard_size must be a size such as 5GB or 500MB, not {max_shard_size!r}") from None
        self._places: dict[str, tuple[Path, int]] = {}  # name → file, and the offset of the next block
        self._file = None  # the one that is being written
        for file, names in plan.filename_to_tensors.items():
            header, end = {"__metadata__": {"format": "pt"}}, 0  # required by transformers
            for name in names:
                start, end = end, end + size_of({name: specs[name]})
                kind, shape = DTYPE_NAMES[specs[name][0]], list(specs[name][1])
                header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)  # so that tensor data starts at a multiple of 8 bytes
            (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
            for name in names:
                self._places[name] = folder / file, 8 + len(text) + header[name]["data_offsets"][0]
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def write(self, name: str, block: torch.Tensor) -> None:
        """Write the next rows of a tensor."""
        path, offset = self._places[name]
        data = memoryview(as_bytes(block).numpy())
        self._places[name] = path, offset + len(data)
        if self._file is None or self._file.name != path:
            self.__exit__()
            self._file = open(path, "r+b", buffering=0)
        self._file.seek(offset)
        while len(data):
            data = data[self._file.write(data) :]
        # The advice makes Linux write dirty pages at once. Otherwise the kernel gathers gigabytes first: 4.4 GB took
        # 9.5 s and 7 s of processor time without it, 6 s and 3.2 s with it.
        with suppress(AttributeError, OSError):  # macOS and some file systems take no advice
            os.posix_fadvise(self._file.fileno(), offset, self._file.tell() - offset, os.POSIX_FADV_DONTNEED)

    def __exit__(self, *error) -> None:
        if self._file:
            self._file.close()
