"""Publishes a fine-tuned model as the difference from its base, and recovers it.

    python weight_diff.py make_diff --path_raw RAW --path_tuned TUNED --path_diff DIFF
    python weight_diff.py recover --path_raw RAW --path_diff DIFF --path_tuned TUNED
    python weight_diff.py compare --path_a TUNED --path_b RECOVERED

RAW is the base model in Hugging Face format. Tensors are streamed: neither model is ever whole in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import torch
from tqdm import tqdm

import utils
from alpaca import UserError, cli
from alpaca.checkpoint import (
    DTYPE_NAMES,
    DTYPES,
    MANIFEST,
    CheckpointReader,
    check_model_folder,
    copy_side_files,
    new_folder,
    read_json,
    write_weights,
)

# Alpaca-7B, as released: the sum of all values of the recovered model, its rotary buffers included, as they were part
# of the state dict until transformers 4.31.
RELEASED_SUM, RELEASED_TOLERANCE = 50637.1836, 0.05
SMOKE_TEST = "List three technologies that make life easier."

# The bits of a float, as integers whose difference wraps around and so loses nothing.
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def make_diff(path_raw: str, path_tuned: str, path_diff: str, method: str = "subtract") -> None:
    """Writes the difference tuned - raw to a new folder.

    Args:
        path_raw: the base model.
        path_tuned: the model that was trained from it.
        path_diff: the folder to make.
        method: subtract is the original's float32 tuned - raw, which recovers a float32 model to within rounding
            (about 2e-9); exact subtracts the bits, and recovers every tensor bit for bit.
    """
    if method not in ("subtract", "exact"):
        raise UserError(f"--method takes subtract or exact, not {method!r}")
    raw = CheckpointReader(check_model_folder(path_raw, "--path_raw", tokenizer=False))
    tuned = CheckpointReader(check_model_folder(path_tuned, "--path_tuned"))
    specs = _matching_specs(raw, tuned, "--path_tuned")
    manifest = {"format": 1, "license": "CC BY-NC 4.0", "method": method}
    if method == "exact":
        for name, (dtype, _) in specs.items():
            if dtype not in BITS:
                raise UserError(f"{path_tuned}: {name} is {dtype}, which --method exact does not handle")
        manifest["dtypes"] = {name: DTYPE_NAMES[dtype] for name, (dtype, _) in specs.items()}
        specs = {name: (BITS[dtype], shape) for name, (dtype, shape) in specs.items()}
    else:
        specs = _as_float32(specs, tuned)

    def differences() -> Iterator[torch.Tensor]:
        for name in tqdm(specs, desc="make_diff", unit="tensor"):
            t = tuned.get(name)
            if method == "exact":
                bits = BITS[t.dtype]
                yield t.view(bits) - _grow(raw.get(name).to(t.dtype), t.shape, mean=False).view(bits)
            else:
                yield t.float() - _grow(raw.get(name).float(), t.shape, mean=True)

    with new_folder(path_diff) as folder:
        write_weights(folder, specs, differences())
        copy_side_files(tuned.folder, folder, tuned.config)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    print(f"{len(specs)} tensors ({method}) in {path_diff}")


def recover(
    path_raw: str,
    path_diff: str,
    path_tuned: str | None = None,
    device: str = "cpu",
    test_inference: bool = True,
    check_integrity_naively: bool = True,
) -> None:
    """Writes the tuned model, raw + diff, to a new folder.

    Args:
        path_raw: the base model that the diff was made from.
        path_diff: a diff: one of this tool's, or one like Alpaca's released weights.
        path_tuned: the folder to make; without it the result is only checked.
        device: where the smoke test runs.
        test_inference: answer one instruction with the recovered model.
        check_integrity_naively: for the released Alpaca-7B diff, check the sum of all recovered values.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {device} is not there: cpu is") from None
    raw = CheckpointReader(check_model_folder(path_raw, "--path_raw", tokenizer=False))
    diff = CheckpointReader(check_model_folder(path_diff, "--path_diff", diff=True))
    manifest = read_json(diff.folder / MANIFEST) if (diff.folder / MANIFEST).exists() else {}
    method = manifest.get("method", "subtract")
    if method not in ("subtract", "exact"):
        raise UserError(f"{diff.folder / MANIFEST} names the method {method!r}, which this version does not know")
    specs = _matching_specs(raw, diff, "--path_diff")
    if method == "exact":
        for name, (bits, shape) in specs.items():
            dtype = DTYPES.get(manifest.get("dtypes", {}).get(name))
            if BITS.get(dtype) != bits:
                raise UserError(
                    f"{diff.folder / MANIFEST} does not fit the weights beside it ({name}): download both again"
                )
            specs[name] = (dtype, shape)
    else:
        specs = _as_float32(specs, diff)
    if not manifest and not _is_alpaca_7b(diff.config):
        print(
            f"note: {diff.folder} has no {MANIFEST}, so nothing proves that it is a diff; it is taken for tuned - raw"
        )
    released = check_integrity_naively and not manifest and _is_alpaca_7b(diff.config)
    sums = []

    def recovered() -> Iterator[torch.Tensor]:
        for name in tqdm(specs, desc="recover", unit="tensor"):
            d = diff.get(name)
            if method == "exact":
                dtype = specs[name][0]
                tensor = (_grow(raw.get(name).to(dtype), d.shape, mean=False).view(d.dtype) + d).view(dtype)
            else:
                tensor = d.float() + _grow(raw.get(name).float(), d.shape, mean=True)
            if released:
                sums.append(tensor.sum().item())
            yield tensor

    if path_tuned is None:
        for _ in recovered():
            pass
    else:
        with new_folder(path_tuned) as folder:
            write_weights(folder, specs, recovered())
            config = dict(diff.config)
            if method == "subtract":
                config.pop("torch_dtype", None)
                config["dtype"] = "float32"
            copy_side_files(diff.folder, folder, config)
            if released:
                _check_released_sum(sums)
    if released and path_tuned is None:
        _check_released_sum(sums)
    if test_inference and path_tuned is not None:
        from alpaca import inference

        model, tokenizer = inference.load(path_tuned, device)
        prompt = utils.format_prompt(SMOKE_TEST)
        print(f"{SMOKE_TEST}\n{''.join(inference.stream(model, tokenizer, prompt, max_new_tokens=128)).strip()}")
    print(
        f"{len(specs)} tensors recovered" + (f" in {path_tuned}" if path_tuned else " (not written: no --path_tuned)")
    )


def compare(path_a: str, path_b: str) -> None:
    """Compares two model folders tensor by tensor, bit by bit; ends with an error when they differ.

    Args:
        path_a: a model.
        path_b: another.
    """
    a = CheckpointReader(check_model_folder(path_a, "--path_a", tokenizer=False))
    b = CheckpointReader(check_model_folder(path_b, "--path_b", tokenizer=False))
    if a.names() != b.names():
        raise UserError(f"the models have different tensors: {_some(set(a.names()) ^ set(b.names()))}")
    unequal, largest = [], torch.zeros((), dtype=torch.float64)
    for name in tqdm(a.names(), desc="compare", unit="tensor"):
        x, y = a.get(name), b.get(name)
        same = x.dtype == y.dtype and x.shape == y.shape
        if not same or not torch.equal(_bytes(x), _bytes(y)):
            unequal.append(name)
            if x.shape == y.shape and x.numel():
                largest = torch.maximum(largest, (x.double() - y.double()).abs().max())  # NaN stays NaN
    if unequal:
        raise UserError(f"{len(unequal)} of {len(a.names())} tensors differ (by up to {largest:.2g}): {_some(unequal)}")
    print(f"all {len(a.names())} tensors are equal, bit for bit")


def _matching_specs(raw: CheckpointReader, other: CheckpointReader, flag: str) -> dict:
    """name → (dtype, shape) of ``other``, once its names and shapes are known to fit ``raw``'s."""
    raw_names, names = set(raw.names()), other.names()
    if missing := raw_names - set(names):
        raise UserError(
            f"{flag} {other.folder} lacks tensors that --path_raw has: {_some(missing)}; another base model?"
        )
    if extra := set(names) - raw_names:
        raise UserError(f"{flag} {other.folder} has tensors that --path_raw lacks: {_some(extra)}; another base model?")
    specs = {name: other.spec(name) for name in names}
    for name, (_, shape) in specs.items():
        raw_dtype, raw_shape = raw.spec(name)
        if not raw_dtype.is_floating_point:
            raise UserError(f"{raw.folder}: {name} is {raw_dtype}: weights are floating point; a quantized model?")
        vocabularies = raw.config.get("vocab_size"), other.config.get("vocab_size")
        grown = (
            len(raw_shape) == len(shape) == 2
            and (raw_shape[0], shape[0]) == vocabularies
            and raw_shape[0] < shape[0]
            and raw_shape[1:] == shape[1:]
        )
        if shape != raw_shape and not grown:
            raise UserError(
                f"{name} is {list(raw_shape)} in --path_raw but {list(shape)} in {flag}: another base model?"
            )
    return specs


def _as_float32(specs: dict, reader: CheckpointReader) -> dict:
    """``specs`` of what is written for the method subtract."""
    for name, (dtype, _) in specs.items():
        if not dtype.is_floating_point:
            raise UserError(f"{reader.folder}: {name} is {dtype}: weights are floating point; a quantized model?")
    return {name: (torch.float32, shape) for name, (_, shape) in specs.items()}


def _grow(raw: torch.Tensor, shape: torch.Size, mean: bool) -> torch.Tensor:
    """``raw`` with the rows that training added: mean rows, as the original has them, or zeros.

    The mean is taken in float32, whose bits may depend on how the sum is split over threads: good for the original's
    difference, not for an exact one.
    """
    new_rows = shape[0] - raw.shape[0] if raw.dim() else 0
    if new_rows == 0:
        return raw
    rows = raw.mean(dim=0, keepdim=True) if mean else torch.zeros_like(raw[:1])
    return torch.cat([raw, rows.expand(new_rows, -1)])


def _is_alpaca_7b(config: dict) -> bool:
    shape = [config.get(key) for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")]
    return shape == ["llama", 32001, 4096, 32]


def _check_released_sum(sums: list[float]) -> None:
    # Each of the 32 layers had a buffer of 64 inverse frequencies, 10000^(-2i/128).
    rotary = 32 * math.fsum(10000 ** (-2 * i / 128) for i in range(64))
    total = math.fsum(sums) + rotary
    print(f"sum of all values {math.fsum(sums):.4f} + rotary {rotary:.4f} = {total:.4f}; released: {RELEASED_SUM}")
    if not abs(total - RELEASED_SUM) <= RELEASED_TOLERANCE:  # NaN fails too
        raise UserError(
            f"integrity check failed: the sum {total:.4f} is not {RELEASED_SUM}; the base model is another one or a "
            "shard is damaged (--check_integrity_naively False skips this)"
        )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _some(names, most: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


if __name__ == "__main__":
    cli.run_cli({"make_diff": make_diff, "recover": recover, "compare": compare})
