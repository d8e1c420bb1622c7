"""Publish a fine-tuned model as the difference from its base model, and recover it.

    python weight_diff.py make_diff --path_raw RAW --path_tuned TUNED --path_diff DIFF
    python weight_diff.py recover --path_raw RAW --path_diff DIFF --path_tuned TUNED
    python weight_diff.py verify --path TUNED --path_diff DIFF
    python weight_diff.py compare --path_a TUNED --path_b RECOVERED

RAW is the base model in Hugging Face format. Tensors are read row by row: 7B takes about half a gigabyte of memory.
"""

from __future__ import annotations

import alpaca.common.environment  # noqa: F401  # isort: skip
import math
from contextlib import nullcontext
from pathlib import Path

import torch

from alpaca import UserError
from alpaca.common import cli, memory
from alpaca.common.text import first_line
from alpaca.weights.checkpoint import FLOATS, MANIFEST, CheckpointReader, Specs, as_bytes, check_model_folder, size_of
from alpaca.weights.diff import NotFinite, add_difference, is_finite, mean_row, precise_sum, take_difference
from alpaca.weights.folder import check_links, copy_side_files, license_of, model_folder, write_diff_card
from alpaca.weights.manifest import InputCheck, check_is_a_difference, read_manifest, verify_folder, write_manifest
from alpaca.weights.names import fit_names, some
from alpaca.weights.pair import BITS, Hashes, check_floats, matching_specs, pairs
from alpaca.weights.writer import ShardWriter, described

# Alpaca-7B as released: the sum of all values of the recovered model, with its rotary buffers, which were part of the
# state dict until transformers 4.31.
RELEASED_SUM, RELEASED_TOLERANCE = 50637.1836, 0.05
SMOKE_TEST = "List three technologies that make life easier."


def make_diff(
    path_raw: str,
    path_tuned: str,
    path_diff: str,
    method: str = "subtract",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    license: str | None = None,
    device: str = "cpu",
) -> None:
    """Write the difference tuned - raw to a new folder.

    Args:
        path_raw: the base model.
        path_tuned: the model that was trained from it.
        path_diff: the folder to make.
        method: subtract is the original's float32 tuned - raw, which recovers a float32 model to within rounding
            (about 2e-9); exact subtracts the bits, and recovers every tensor bit for bit.
        max_shard_size: size of a file of weights, such as 5GB or 500MB.
        overwrite: replace an existing diff.
        license: of the diff, such as "CC BY-NC 4.0"; by default that of the data, if the tuned model's receipt has it.
        device: of the original's command line. Without effect: the disk is slower than a processor's subtraction.
    """
    if method not in ("subtract", "exact"):
        raise UserError(f"--method must be subtract or exact, not {method!r}")
    exact = method == "exact"
    raw = CheckpointReader(_folder(path_raw, "--path_raw", tokenizer=False))
    tuned = CheckpointReader(_folder(path_tuned, "--path_tuned"))
    check_floats(tuned, "--path_tuned")
    license = license_of(tuned.folder, license)
    specs = matching_specs(raw, tuned, ("--path_raw", "--path_tuned"))
    written = {name: (BITS[dtype] if exact else torch.float32, shape) for name, (dtype, shape) in specs.items()}
    hashes = {role: Hashes() for role in ("raw", "tuned", "diff") + (() if exact else ("recovered",))}
    errors, not_finite = dict.fromkeys(specs, 0.0), NotFinite()

    def work(name: str, raw_rows: torch.Tensor, tuned_rows: torch.Tensor) -> tuple:
        hashes["raw"].update(name, raw_rows)
        hashes["tuned"].update(name, tuned_rows)
        diff, recovered, error = take_difference(raw_rows, tuned_rows, exact, means.get(name))
        errors[name] = max(errors[name], error)
        if exact or not is_finite(diff):  # a difference of bits does not show it
            not_finite.look(name, {"the base model": raw_rows, "the tuned model": tuned_rows})
        return name, diff, recovered

    with model_folder(path_diff, "--path_diff", overwrite, [raw.folder, tuned.folder]) as folder:
        with ShardWriter(folder, written, max_shard_size) as writer:
            for reader in (raw, tuned):
                reader.check_checksums()
            means = {} if exact else _mean_rows(raw, specs, {})
            for name, diff, recovered in pairs(specs, raw, tuned, "make_diff", work):
                hashes["diff"].update(name, diff)
                if not exact:
                    hashes["recovered"].update(name, recovered)
                writer.write(name, diff)
        copy_side_files(tuned.folder, folder, tuned.config)
        digests = {role: found.hex() for role, found in hashes.items()}
        models = {"raw": raw.specs(), "diff": written, "tuned": specs}
        write_manifest(folder, method, license, models, digests, errors, means)
        write_diff_card(folder, raw.folder)
    not_finite.warn()
    within = "bit for bit" if exact else f"to within {max(errors.values(), default=0.0):.2g}"
    said = f"{len(specs)} tensors ({method}) in {path_diff}: {size_of(written) / 1e9:.3f} GB"
    print(f"{said}; recover gives the tuned model {within}")


def recover(
    path_raw: str,
    path_diff: str,
    path_tuned: str | None = None,
    device: str = "cpu",
    test_inference: bool = True,
    check_integrity_naively: bool = True,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Write the tuned model, raw + diff, to a new folder.

    Args:
        path_raw: the base model that the diff was made from.
        path_diff: a diff made by this tool, or one like Alpaca's released weights.
        path_tuned: the folder to make; without it the result is only checked.
        device: where the smoke test runs.
        test_inference: answer one instruction with the recovered model, if there is memory to load it whole.
        check_integrity_naively: for a diff without hashes in a manifest, check that it looks like a difference; for the
            released Alpaca-7B diff, which has no manifest, also the sum of all recovered values. Hashes are always
            checked.
        dtype: of the written weights: float32, bfloat16 or float16; by default the diff's, or for exact tuned's.
        max_shard_size: size of a file of weights, such as 5GB or 500MB.
        overwrite: replace an existing model.
    """
    if dtype is not None and dtype not in FLOATS:
        raise UserError(f"--dtype must be {' or '.join(FLOATS)}, not {dtype!r}")
    raw = CheckpointReader(_folder(path_raw, "--path_raw", tokenizer=False))
    diff = CheckpointReader(_folder(path_diff, "--path_diff", diff=True))
    check_links(diff.folder)
    manifest = read_manifest(diff)
    exact = manifest.get("method") == "exact"
    specs = matching_specs(raw, diff, ("--path_raw", "--path_diff"))
    if not exact:
        check_floats(diff, "--path_diff")
    # subtract is computed in float32, whatever the type of the diff and of what is written
    computed = manifest["dtypes"] if exact else dict.fromkeys(specs, torch.float32)
    written = {name: (computed[name] if exact else kind, shape) for name, (kind, shape) in specs.items()}
    if dtype:
        written = {name: (FLOATS[dtype], shape) for name, (_, shape) in written.items()}
    target = model_folder(path_tuned, "--path_tuned", overwrite, [raw.folder, diff.folder]) if path_tuned else None
    with target or nullcontext() as folder:
        with ShardWriter(folder, written, max_shard_size) if folder else nullcontext() as writer:
            _add_up(raw, diff, manifest, computed, written, writer, check_integrity_naively)
        if folder:
            config = diff.config
            if dtype or not exact:  # then it is not tuned's type
                kind, _ = max(written.values(), key=lambda spec: math.prod(spec[1]))
                config = {key: value for key, value in config.items() if key != "torch_dtype"}
                config["dtype"] = str(kind).removeprefix("torch.")
            copy_side_files(diff.folder, folder, config)
    where = f" in {path_tuned}" if path_tuned else " (neither written nor tested: no --path_tuned)"
    proved = ", each with the manifest's hash" if manifest.get("tensors") else ""
    if proved and dtype and any(kind != computed[name] for name, (kind, _) in written.items()):
        proved += f" before rounding to {dtype}"
    print(f"{len(specs)} tensors recovered{where}{proved}")
    if test_inference and path_tuned:
        _smoke_test(path_tuned, device, size_of(written))


def _add_up(
    raw: CheckpointReader, diff: CheckpointReader, manifest: dict, computed: dict, written: Specs, writer, naively: bool
) -> None:
    """Write raw + diff, computed in one type and written in perhaps another; UserError if a check of them fails."""
    exact, hashes, sums, not_finite = manifest.get("method") == "exact", Hashes(), [], NotFinite()
    check = InputCheck(manifest, raw, diff) if manifest.get("tensors") else None
    if not check:
        _check_without_hashes(manifest, raw, diff, naively)
    means = {} if exact else _mean_rows(raw, written, manifest.get("mean_rows", {}))

    def work(name: str, raw_rows: torch.Tensor, rows: torch.Tensor) -> tuple:
        if check:
            check.look(name, raw_rows, rows)
        recovered = add_difference(raw_rows, rows, computed[name], means.get(name))
        sums.append(precise_sum(recovered))
        if exact or not math.isfinite(sums[-1]):  # the bits of exact can turn a NaN into a finite number
            not_finite.look(name, {"the base model": raw_rows, "the diff": rows, "the recovered model": recovered})
        return name, recovered

    for name, recovered in pairs(written, raw, diff, "recover", work):
        hashes.update(name, recovered)
        out = recovered.to(written[name][0])
        if out.dtype != recovered.dtype:
            not_finite.look(name, {f"what is written as {out.dtype}": out})
        if writer:
            writer.write(name, out)
    if check:
        check.finish(hashes.hex())
    elif naively and not manifest and _is_alpaca_7b(diff.config):
        _check_released_sum(sums)
    not_finite.warn()


def verify(path: str, path_diff: str) -> None:
    """Print which of raw, diff, tuned and recovered a folder is, by the hashes in a diff's manifest.

    For any other folder, end with an error that names what differs.

    Args:
        path: a folder with weights.
        path_diff: the diff.
    """
    reader = CheckpointReader(_folder(path, "--path", tokenizer=False, diff=True))
    diff = CheckpointReader(_folder(path_diff, "--path_diff", tokenizer=False, diff=True))
    manifest = read_manifest(diff)
    if not manifest.get("tensors"):
        raise UserError(f"--path_diff {path_diff} has no hashes in a {MANIFEST}: make it again with this version")
    fit_names(reader, f"--path {path}", manifest["tensors"], "the manifest", diff.config)
    print(verify_folder(manifest, reader))


def compare(path_a: str, path_b: str) -> None:
    """Compare two model folders tensor by tensor, bit by bit; end with an error if they differ.

    Args:
        path_a: a model.
        path_b: another.
    """
    a = CheckpointReader(_folder(path_a, "--path_a", tokenizer=False))
    b = CheckpointReader(_folder(path_b, "--path_b", tokenizer=False))
    fit_names(b, "--path_b", a.names(), "--path_a", a.config)
    kinds, other = a.specs(), b.specs()
    unlike, unequal = [name for name in kinds if kinds[name] != other[name]], set()
    largest = torch.zeros((), dtype=torch.float64)
    alike = {name: spec for name, spec in kinds.items() if spec[1] == other[name][1]}

    for name, x, y in pairs(alike, a, b, "compare"):
        if x.dtype == y.dtype:
            same = torch.equal(as_bytes(x), as_bytes(y))
        else:  # of another type, but perhaps with the same values
            same = torch.equal(x.double(), y.double())
        if not same:
            unequal.add(name)
            largest = torch.maximum(largest, (x.double() - y.double()).abs().max())  # NaN stays NaN
    differences = []
    if unlike:
        first = f"{unlike[0]}: {described(kinds[unlike[0]])} and {described(other[unlike[0]])}"
        differences.append(f"{len(unlike)} in type or shape ({first})")
    if unequal:
        differences.append(f"{len(unequal)} in values, by up to {largest:.2g} ({some(unequal)})")
    if count := len(unequal.union(unlike)):
        if len(alike) == len(kinds) and largest <= 1e-8:
            differences.append("normal after subtract: --dtype of recover gives the type, --method exact the bits")
        raise UserError(f"{count} of {len(kinds)} tensors differ: {', '.join(differences)}")
    print(f"all {len(kinds)} tensors are equal, bit for bit")


def _folder(path: str, flag: str, **kinds: bool) -> Path:
    """Return ``check_model_folder(path)``; for what looks like a name on the hub, say how to download it."""
    path = Path(path)
    if len(path.parts) == 2 and not path.is_absolute() and not path.parent.exists():
        cure = f"to download one from the hub: hf download {path} --local-dir {path.name}"
        raise UserError(f"{flag} {path} does not exist: choose the folder of a model; {cure}")
    return check_model_folder(path, flag, **kinds)


def _check_without_hashes(manifest: dict, raw: CheckpointReader, diff: CheckpointReader, naively: bool) -> None:
    """Check raw and diff by .bin checksums and by the size of the values."""
    for reader in (raw, diff):
        reader.check_checksums()
    if naively and manifest.get("method") != "exact":
        check_is_a_difference(raw, diff)
    if not manifest and not _is_alpaca_7b(diff.config):
        print(f"note: {diff.folder} has no {MANIFEST}, so nothing proves that it is a diff")


def _mean_rows(raw: CheckpointReader, specs: Specs, known: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what the original has in the new rows of each matrix that training extended: ``known``, or the mean row.

    An extended bias has 0 there, as in transformers.
    """
    names = [name for name, (_, shape) in specs.items() if len(shape) == 2 and raw.spec(name)[1] != shape]
    return {name: known[name] if name in known else mean_row(raw, name) for name in names}


def _smoke_test(path: str, device: str, size: int) -> None:
    """Answer one instruction with a model of ``size`` bytes, if there is memory to load it whole."""
    from alpaca.inference.chat import Conversation
    from alpaca.inference.generate import Settings
    from alpaca.inference.load import load

    if size > (free := memory.host_free()):
        need = f"loading it whole needs {memory.as_text(size)} of memory, {memory.as_text(free)} are free"
        return print(f"not tested: {need}; on a machine with more: python chat.py --model_path {path}")
    said = "is complete, and now answers one instruction, which takes minutes for a large model"
    print(f"{path} {said}; Ctrl-C is safe (--test_inference False skips this)", flush=True)
    try:
        answer = Conversation(*load(path, device), Settings(max_new_tokens=128)).ask(SMOKE_TEST)
    except Exception as e:  # the recovery has succeeded, which a traceback would hide
        why = f"did not answer on {device}: {first_line(e)} (--test_inference False skips this)"
        raise UserError(f"{path} is recovered and complete, but {why}") from None
    print(f"{SMOKE_TEST}\n{answer}")


# ---------------------------------------------------------------------------------------------------------------------
# Alpaca-7B as it was released.


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
            f"integrity check failed: the sum {total:.4f} is not {RELEASED_SUM}; another base model, a damaged "
            "shard, or not Alpaca's released diff (--check_integrity_naively False skips this)"
        )


if __name__ == "__main__":
    cli.end_on_signals()
    cli.run_cli({"make_diff": make_diff, "recover": recover, "verify": verify, "compare": compare})
