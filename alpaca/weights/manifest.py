"""What a weight diff says of itself in weight_diff.json, and what it means when a folder does not agree.

Format 2 has for each tensor its shape, its types and the SHA-256 of raw, diff and tuned (and for subtract of what
recover gives, which differs from tuned by rounding). Format 1, of earlier versions, has the method and no hashes (for
exact, tuned's types).
"""

from __future__ import annotations

import base64
import json
import math
import statistics
import sys
from importlib import metadata
from pathlib import Path

import torch

from alpaca import UserError
from alpaca.weights.checkpoint import MANIFEST, CheckpointReader, read_json
from alpaca.weights.chunks import Hashes, in_threads, numel, sha256_of
from alpaca.weights.names import match_prefix
from alpaca.weights.tensor_files import DTYPE_NAMES, DTYPES

METHODS = ("subtract", "exact")
ROLES = {"raw": "the base model", "diff": "the diff", "tuned": "the tuned model", "recovered": "the recovered model"}
TUNED_AS_RAW = "they are the tuned model's; it is recovered already, or give the base model"
SAMPLE = 1 << 18  # elements of a tensor that are looked at where no manifest says what a folder is


def write_manifest(
    folder: Path,
    method: str,
    raw: CheckpointReader,
    tuned: CheckpointReader,
    written: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    hashes: dict[str, Hashes],
    errors: dict[str, float],
    mean_rows: dict[str, torch.Tensor],
    license: str,
) -> None:
    """Writes weight_diff.json.

    Args:
        folder: of the diff.
        method: subtract or exact.
        raw: the base model.
        tuned: the model that was trained from it.
        written: the diff's (dtype, shape) by name.
        hashes: by role.
        errors: largest difference between recovered and tuned by tensor; empty for exact.
        mean_rows: float32 means that were subtracted from new rows. Their bits depend on the processor (a machine
            without AVX2 adds in another order), so that they are kept here.
        license: of the diff.
    """
    tensors = {}
    for name, (dtype, shape) in written.items():
        dtypes = {"raw": raw.spec(name)[0], "diff": dtype, "tuned": tuned.spec(name)[0]}
        tensors[name] = {
            "shape": list(shape),
            "raw_shape": list(raw.spec(name)[1]),
            "dtype": {role: DTYPE_NAMES[kind] for role, kind in dtypes.items()},
            "sha256": {role: found.hex[name] for role, found in hashes.items()},
        }
        if method == "subtract":
            tensors[name]["largest_error"] = errors[name]
    manifest = {
        "format": 2,
        "license": license,
        "method": method,
        "versions": {"python": sys.version.split()[0]}
        | {package: metadata.version(package) for package in ("torch", "transformers", "safetensors")},
    }
    if method == "subtract":
        manifest["largest_error"] = max(errors.values(), default=0.0)
        manifest["mean_rows"] = {
            name: base64.b64encode(row.numpy().tobytes()).decode() for name, row in mean_rows.items()
        }
    (folder / MANIFEST).write_text(json.dumps(manifest | {"tensors": tensors}, indent=1) + "\n")


def read_manifest(diff: CheckpointReader) -> dict:
    """The manifest beside a diff; ``dtypes`` (tuned's) and ``mean_rows`` (tensors) are in it. {} when none is there, or
    none that says how the diff was made.

    Raises:
        UserError: it is malformed, of a later version, or not of the weights beside it.
    """
    path = diff.folder / MANIFEST
    if not path.exists():
        return {}
    manifest = read_json(path)
    if manifest.keys().isdisjoint(("format", "method", "tensors")):
        return {}
    method, version = manifest.get("method", "subtract"), manifest.get("format", 1)
    if method not in METHODS or version not in (1, 2):
        raise UserError(
            f"{path} names the method {method!r}, format {version}, which this version does not know: take a later one"
        )
    misfit = UserError(f"{path} does not fit the weights beside it: download both again")
    specs = diff.specs()
    try:
        if version == 2 or "tensors" in manifest:
            tensors = manifest["tensors"]
            manifest["dtypes"] = {name: entry["dtype"]["tuned"] for name, entry in tensors.items()}
            shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
            if wrong := {n for n in shapes.keys() | specs.keys() if shapes.get(n) != specs.get(n, (None, None))[1]}:
                raise UserError(
                    f"{path} does not fit the weights beside it ({some(wrong)} missing, added or of another shape): "
                    "download both again"
                )
            roles = list(ROLES)[: 4 if method == "subtract" else 3]
            if any(not isinstance(entry["sha256"][role], str) for entry in tensors.values() for role in roles):
                raise misfit
            if not all(isinstance(size, int) for entry in tensors.values() for size in entry["raw_shape"]):
                raise misfit
            if any(entry["dtype"][role] not in DTYPES for entry in tensors.values() for role in roles[:3]):
                raise misfit
        if not all(isinstance(dtype, str) for dtype in manifest.setdefault("dtypes", {}).values()):
            raise misfit
        rows = manifest.get("mean_rows", {})
        manifest["mean_rows"] = {
            name: torch.frombuffer(bytearray(base64.b64decode(row)), dtype=torch.float32) for name, row in rows.items()
        }
        if any(specs[name][1][1:] != row.shape for name, row in manifest["mean_rows"].items()):
            raise misfit
    except (KeyError, TypeError, ValueError, AttributeError):
        raise misfit from None
    return manifest


def check_inputs(manifest: dict, raw: CheckpointReader, diff: CheckpointReader) -> None:
    """Raises UserError, with what it means, unless all of raw and diff have the hashes that the manifest gives them.

    A base model that holds the same values in another type is welcome: the result is the same.
    """
    tensors = manifest["tensors"]
    if odd := [name for name, entry in tensors.items() if raw.spec(name)[1] != tuple(entry["raw_shape"])]:
        raise UserError(_what_rows_are(tensors, odd, raw))
    # From the last tensor to the first: of models that memory cannot hold, the system then still has the part that is
    # read again first.
    items = [
        (reader, name, DTYPES[entry["dtype"][role]], role)
        for name, entry in reversed(tensors.items())
        for role, reader in (("raw", raw), ("diff", diff))
    ]
    found = in_threads(
        lambda reader, name, dtype, role, tick: sha256_of(reader, name, dtype, tick),
        items,
        [reader.spec(name)[0].itemsize * numel(reader.spec(name)[1]) for reader, name, *_ in items],
        "checking raw and diff",
    )
    bad: dict[str, list[str]] = {"raw": [], "diff": []}
    rounded, known = set(), {"raw": {}, "diff": {}}
    for (reader, name, dtype, role), (sha256, exact) in reversed(list(zip(items, found, strict=True))):
        if reader.spec(name)[0] == dtype:
            known[role][name] = sha256
        if sha256 != tensors[name]["sha256"][role] or not exact:
            bad[role].append(name)
            if sha256 == tensors[name]["sha256"][role]:
                rounded.add(name)
        elif role == "diff" and reader.spec(name)[0] != dtype:
            bad[role].append(name)
    if bad["diff"]:
        raise UserError(_what_diff_is(tensors, bad["diff"], diff, known["diff"]))
    if bad["raw"]:
        raise UserError(_what_raw_is(tensors, bad["raw"], rounded, raw, known["raw"]))
    if other := [name for name, entry in tensors.items() if DTYPE_NAMES[raw.spec(name)[0]] != entry["dtype"]["raw"]]:
        print(f"note: --path_raw has the right values, though stored as another type ({some(other)})")


def _what_diff_is(tensors: dict, bad: list[str], diff: CheckpointReader, known: dict[str, str]) -> str:
    what = f"--path_diff {diff.folder}: {len(bad)} of {len(tensors)} tensors are not the diff's"
    role = identify(diff, bad, tensors, known)
    if role in ("tuned", "recovered"):
        return f"{what}: they are the tuned model's, recovered already; give the folder of the diff"
    if role == "raw":
        return f"{what}: they are the base model's; are --path_raw and --path_diff swapped?"
    shards = sorted({diff.path_of(name).name for name in bad})
    return f"{what} ({some(bad)}): damaged or cut off in the download, get {', '.join(shards)} again"


def _what_raw_is(tensors: dict, bad: list[str], rounded: set[str], raw: CheckpointReader, known: dict[str, str]) -> str:
    what = f"--path_raw {raw.folder}: {len(bad)} of {len(tensors)} tensors are not those the diff was made from"
    role = identify(raw, bad, tensors, known)
    if role in ("tuned", "recovered"):
        return f"{what}: {TUNED_AS_RAW}"
    if role == "diff":
        return f"{what}: they are the diff's; are --path_raw and --path_diff swapped?"
    what += f" ({some(bad)})"
    wanted, stored = tensors[bad[0]]["dtype"]["raw"], DTYPE_NAMES[raw.spec(bad[0])[0]]
    if rounded == set(bad):
        return f"{what}: another conversion, of more digits; convert it from {stored} to {wanted} first"
    if stored != wanted:
        return f"{what}: another conversion, or another base model; take the one stored as {wanted} (this is {stored})"
    rows = raw.vocab_size
    if all(len(raw.spec(name)[1]) == 2 and raw.spec(name)[1][0] == rows for name in bad):
        return f"{what}: another vocabulary; take the base model as published, without added tokens"
    if len(bad) == len(tensors):
        return f"{what}: another base model, or another size or version of it"
    shards = sorted({raw.path_of(name).name for name in bad})
    return (
        f"{what}, all others are: another conversion of the base model, or damage; convert it again with the "
        f"transformers of the diff's time, or get {', '.join(shards)} again"
    )


def _what_rows_are(tensors: dict, odd: list[str], raw: CheckpointReader) -> str:
    name = odd[0]
    found, wanted = raw.spec(name)[1], tuple(tensors[name]["raw_shape"])
    if identify(raw, odd, tensors, {}) in ("tuned", "recovered"):
        return f"--path_raw {raw.folder}: {len(odd)} of {len(tensors)} tensors have added rows: {TUNED_AS_RAW}"
    rows = "as published, without added tokens" if found > wanted else "that has the tokens which were added before"
    return (
        f"--path_raw {raw.folder}: {name} is {list(found)}, the diff was made from one of {list(wanted)}: take the "
        f"base model {rows}"
    )


def identify(reader: CheckpointReader, names: list[str], tensors: dict, known: dict[str, str]) -> str | None:
    """The role of which most of the named tensors are, bit for bit; None when not even half of them are of one.

    Some may be of several: what training left alone, as LoRA does the norms, is the same in base and tuned model.

    Args:
        reader: of the folder.
        names: of its tensors.
        tensors: of the manifest.
        known: SHA-256 by name, where it is known.
    """
    left = [name for name in names if name not in known]
    sizes = [reader.spec(name)[0].itemsize * numel(reader.spec(name)[1]) for name in left]
    found = in_threads(sha256_of, [(reader, name, None) for name in left], sizes, "what is it?") if left else []
    known = known | {name: sha256 for name, (sha256, _) in zip(left, found, strict=True)}
    counts = {role: sum(tensors[name]["sha256"].get(role) == known[name] for name in names) for role in ROLES}
    best = max(counts, key=counts.get)
    return best if 2 * counts[best] > len(names) else None


def verify_folder(manifest: dict, reader: CheckpointReader) -> str:
    """Which of raw, diff, tuned and recovered a folder is, in a line; UserError when it is none, with what differs."""
    tensors = manifest["tensors"]
    match_prefix(reader, "--path", tensors, "the manifest")
    names = reader.names()
    if missing := tensors.keys() - set(names):
        raise UserError(f"{reader.folder} lacks tensors that the manifest has: {some(missing)}; another model?")
    if extra := set(names) - tensors.keys():
        raise UserError(f"{reader.folder} has tensors that the manifest lacks: {some(extra)}; another model?")
    sizes = [reader.spec(name)[0].itemsize * numel(reader.spec(name)[1]) for name in names]
    found = in_threads(sha256_of, [(reader, name, None) for name in names], sizes, "verify")
    same = {
        role: [n for n, (sha256, _) in zip(names, found, strict=True) if tensors[n]["sha256"].get(role) == sha256]
        for role in ("tuned", "raw", "diff", "recovered")
    }
    right = {role: [n for n in same[role] if _spec_of(tensors[n], role) == reader.spec(n)] for role in same}
    best = max(right, key=lambda role: (len(right[role]), len(same[role])))
    if len(right[best]) == len(names):
        also = ", to within rounding of the tuned one" if best == "recovered" else ""
        return f"{reader.folder} is {ROLES[best]}{also}: all {len(names)} tensors are right"
    if not same[best]:
        raise UserError(
            f"{reader.folder} is none of raw, diff, tuned and recovered: no hash of its {len(names)} tensors is in the "
            "manifest; another model, or one that was converted to another type"
        )
    if len(same[best]) == len(names):
        odd = [name for name in names if name not in set(right[best])]
        stored, wanted = described(reader.spec(odd[0])), described(_spec_of(tensors[odd[0]], best))
        raise UserError(
            f"{reader.folder} has the bytes of {ROLES[best]}, but {len(odd)} of {len(names)} tensors under another "
            f"type or shape ({odd[0]} is {stored}, not {wanted}): its values are others; get the files again"
        )
    bad = [name for name in names if name not in set(right[best])]
    shards = sorted({reader.path_of(name).name for name in bad})
    raise UserError(
        f"{reader.folder} is nearest to {ROLES[best]}, but {len(bad)} of {len(names)} tensors differ ({some(bad)}), in "
        f"{', '.join(shards)}: damaged, changed, or converted in another way; get those files again"
    )


def _spec_of(entry: dict, role: str) -> tuple[torch.dtype, tuple[int, ...]]:
    """(dtype, shape) that a manifest's entry gives a tensor of that role; what recover gives is float32."""
    shape = entry["raw_shape" if role == "raw" else "shape"]
    return DTYPES["F32" if role == "recovered" else entry["dtype"][role]], tuple(shape)


def check_is_a_difference(raw: CheckpointReader, diff: CheckpointReader) -> None:
    """For a diff without a manifest: raises UserError when its values are as large as a model's.

    What fine-tuning changes is a hundredth to a tenth of the weights in root mean square.
    """
    matrices = [name for name in diff.names() if len(diff.spec(name)[1]) == 2 and numel(diff.spec(name)[1])]
    ratios = []
    for name in matrices[:: max(1, len(matrices) // 16)]:
        count = min(SAMPLE, numel(raw.spec(name)[1]), numel(diff.spec(name)[1]))
        sizes = [
            reader.read(name, 0, torch.empty(count, dtype=reader.spec(name)[0])).float().norm().item()
            for reader in (raw, diff)
        ]
        if sizes[0] > 0 and math.isfinite(sum(sizes)):
            ratios.append(sizes[1] / sizes[0])
    ratio = statistics.median(ratios) if ratios else 0.0
    if ratio > 0.5:
        cause = "--path_raw and --path_diff seem swapped" if ratio > 2 else "--path_diff seems a whole model, no diff"
        raise UserError(
            f"{diff.folder}: its values are {ratio:.2g} times as large as those of {raw.folder}, where a diff has 0.01 "
            f"to 0.1: {cause} (--check_integrity_naively False skips this)"
        )


def described(spec: tuple[torch.dtype, tuple[int, ...]]) -> str:
    """A tensor's type and shape, as in "F16 [32000, 4096]"."""
    return f"{DTYPE_NAMES[spec[0]]} {list(spec[1])}"


def some(names, most: int = 3) -> str:
    """The first few of some names, in a line."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
