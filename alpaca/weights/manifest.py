"""weight_diff.json, a weight diff's manifest, and what it means if a folder does not match it.

Format 2 has each tensor's shape, types and SHA-256 in raw, diff and tuned, and for subtract in the recovered model,
which differs from tuned by rounding. Format 1, of earlier versions, has the method, no hashes, and for exact tuned's
types.
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
from alpaca.weights.checkpoint import MANIFEST, CheckpointReader, Specs, read_json
from alpaca.weights.diff import Hashes, sha256_of_all
from alpaca.weights.names import some, vocab_size
from alpaca.weights.writer import DTYPE_NAMES, DTYPES

METHODS = ("subtract", "exact")
ROLES = {"raw": "the base model", "diff": "the diff", "tuned": "the tuned model", "recovered": "the recovered model"}
TUNED = ("tuned", "recovered")
SAMPLE = 1 << 18  # elements of a tensor that show its size without a manifest


def write_manifest(
    folder: Path,
    method: str,
    raw: CheckpointReader,
    tuned: CheckpointReader,
    written: Specs,
    hashes: dict[str, dict[str, str]],
    errors: dict[str, float],
    mean_rows: dict[str, torch.Tensor],
    license: str,
) -> None:
    """Write weight_diff.json.

    Args:
        written: the diff's (dtype, shape) by name.
        hashes: role → name → SHA-256.
        errors: name → largest difference between recovered and tuned; unused for exact.
        mean_rows: float32 means that were subtracted from new rows. They are kept because their bits depend on the
            processor: one without AVX2 adds in another order.
    """
    tensors = {}
    for name, (dtype, shape) in written.items():
        dtypes = {"raw": raw.spec(name)[0], "diff": dtype, "tuned": tuned.spec(name)[0]}
        tensors[name] = {
            "shape": list(shape),
            "raw_shape": list(raw.spec(name)[1]),
            "dtype": {role: DTYPE_NAMES[kind] for role, kind in dtypes.items()},
            "sha256": {role: found[name] for role, found in hashes.items()},
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
    """Return a diff's manifest with ``dtypes`` (tuned's, by name) and ``mean_rows`` as tensors.

    It is {} if there is no manifest, or one that does not say how the diff was made.

    Raises:
        UserError: it is malformed, of a later version, or of other weights.
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
            f"{path} has the method {method!r}, format {version}, which this version does not know: use a later one"
        )
    specs, wrong = diff.specs(), set()
    try:
        if version == 2 or "tensors" in manifest:
            tensors = manifest["tensors"]
            manifest["dtypes"] = {name: entry["dtype"]["tuned"] for name, entry in tensors.items()}
            shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
            wrong = {n for n in shapes.keys() | specs.keys() if shapes.get(n) != specs.get(n, (None, None))[1]}
            roles = list(ROLES)[: 4 if method == "subtract" else 3]
            sound = not wrong and all(
                all(isinstance(entry["sha256"][role], str) for role in roles)
                and all(isinstance(size, int) for size in entry["raw_shape"])
                and all(entry["dtype"][role] in DTYPES for role in roles[:3])
                for entry in tensors.values()
            )
        else:
            sound = all(isinstance(dtype, str) for dtype in manifest.setdefault("dtypes", {}).values())
        rows = manifest.get("mean_rows", {})
        manifest["mean_rows"] = {
            name: torch.frombuffer(bytearray(base64.b64decode(row)), dtype=torch.float32) for name, row in rows.items()
        }
        sound = sound and all(specs[name][1][1:] == row.shape for name, row in manifest["mean_rows"].items())
    except (KeyError, TypeError, ValueError, AttributeError):
        sound = False
    if not sound:
        which = f" ({some(wrong)} missing, added or of another shape)" if wrong else ""
        raise UserError(f"{path} does not fit the weights beside it{which}: download both again")
    return manifest


class InputCheck:
    """Checks raw and diff against a manifest's hashes in the pass that uses them.

    A base model that holds the same values in another type is accepted: the result is the same.

    Raises:
        UserError: raw has other shapes than the manifest's; or, by ``finish()``, other values, with the probable cause.
    """

    def __init__(self, manifest: dict, raw: CheckpointReader, diff: CheckpointReader):
        self.tensors, self._readers = manifest["tensors"], {"raw": raw, "diff": diff}
        self._hashes, self._rounded = {"raw": Hashes(), "diff": Hashes()}, set()
        if odd := [name for name, entry in self.tensors.items() if raw.spec(name)[1] != tuple(entry["raw_shape"])]:
            raise UserError(_other_tensors("raw", raw, odd, self.tensors, {}, set()))

    def look(self, name: str, raw: torch.Tensor, diff: torch.Tensor) -> None:
        """Take the next rows of raw and diff."""
        for role, rows in (("raw", raw), ("diff", diff)):
            cast = rows.to(DTYPES[self.tensors[name]["dtype"][role]])
            if cast.dtype != rows.dtype and not torch.equal(cast.to(rows.dtype), rows):
                self._rounded.add((role, name))
            self._hashes[role].update(name, cast)

    def finish(self, recovered: dict[str, str]) -> None:
        """Raise UserError unless all tensors were right, those of the result too: name → SHA-256."""
        for role in ("diff", "raw"):
            reader, hashes, bad, known, rounded = self._readers[role], self._hashes[role].hex(), [], {}, set()
            for name, entry in self.tensors.items():
                same_hash = hashes[name] == entry["sha256"][role]
                if same_type := reader.spec(name)[0] == DTYPES[entry["dtype"][role]]:
                    known[name] = hashes[name]
                if not same_hash or (role, name) in self._rounded or not (same_type or role == "raw"):
                    bad.append(name)
                    rounded |= {name} if same_hash else set()
            if bad:
                raise UserError(_other_tensors(role, reader, bad, self.tensors, known, rounded))
        if other := [n for n, entry in self.tensors.items() if reader.spec(n)[0] != DTYPES[entry["dtype"]["raw"]]]:
            print(f"note: the base model has the right values, though stored as another type ({some(other)})")
        for name, entry in self.tensors.items():
            if recovered[name] != entry["sha256"].get("recovered", entry["sha256"]["tuned"]):
                raise UserError(f"{name} came out wrong, though raw and diff are right: try another machine")


def _other_tensors(
    role: str, reader: CheckpointReader, bad: list[str], tensors: dict, known: dict[str, str], rounded: set[str]
) -> str:
    """Return why the tensors ``bad`` of raw or diff may differ from the manifest.

    ``known`` is for ``identify``; ``rounded`` are names of raw with the manifest's hash after rounding to its type.
    """
    what = f"{ROLES[role]} {reader.folder}: {len(bad)} of {len(tensors)} tensors differ from the manifest"
    found = identify(reader, bad, tensors, known)
    if found in TUNED:
        return f"{what}: they are the tuned model's, recovered already; choose {ROLES[role]}"
    if found not in (None, role):
        return f"{what}: they are those of {ROLES[found]}; are the base model and the diff swapped?"
    what += f" ({some(bad)})"
    if role == "diff":
        return f"{what}: damaged or cut off in the download, get {_shards(reader, bad)} again"
    first, (kind, shape) = tensors[bad[0]], reader.spec(bad[0])
    if (published := first["raw_shape"]) != list(shape):
        rows = "as published, without added tokens" if list(shape) > published else "with the tokens added before"
        return f"{what}: {bad[0]} is {list(shape)}, the diff was made from {published}: use the base model {rows}"
    wanted, stored = first["dtype"]["raw"], DTYPE_NAMES[kind]
    if rounded == set(bad):
        return f"{what}: another conversion, of more digits; convert it from {stored} to {wanted} first"
    if stored != wanted:
        return f"{what}: another conversion, or another base model; use the one stored as {wanted} (this is {stored})"
    rows = vocab_size(reader.config)
    if all(len(reader.spec(name)[1]) == 2 and reader.spec(name)[1][0] == rows for name in bad):
        return f"{what}: another vocabulary; use the base model as published, without added tokens"
    if len(bad) == len(tensors):
        return f"{what}: another base model, or another size or version of it"
    return (
        f"{what}, all others are right: another conversion of the base model, or damage; convert it again with the "
        f"transformers of the diff's time, or get {_shards(reader, bad)} again"
    )


def identify(reader: CheckpointReader, names: list[str], tensors: dict, known: dict[str, str]) -> str | None:
    """Return the role that most of the named tensors have, bit for bit; None if that is not more than half of them.

    A tensor may have several: what training did not change, as LoRA does not change the norms, is both raw and tuned.
    ``tensors`` are the manifest's, ``known`` the SHA-256 of names that were already hashed.
    """
    known = known | sha256_of_all(reader, [name for name in names if name not in known], "what is it?")
    counts = {role: sum(tensors[name]["sha256"].get(role) == known[name] for name in names) for role in ROLES}
    best = max(counts, key=counts.get)
    return best if 2 * counts[best] > len(names) else None


def verify_folder(manifest: dict, reader: CheckpointReader) -> str:
    """Return, as a line of text, which of raw, diff, tuned and recovered a folder is; its names are the manifest's.

    Raises:
        UserError: it is another model, or damaged; the message says what differs.
    """
    tensors, names = manifest["tensors"], reader.names()
    hashes = sha256_of_all(reader, names, "verify")
    roles = ("tuned", "raw", "diff", "recovered")
    same = {role: [name for name in names if tensors[name]["sha256"].get(role) == hashes[name]] for role in roles}
    right = {role: [n for n in same[role] if _spec_of(tensors[n], role) == reader.spec(n)] for role in roles}
    best = max(right, key=lambda role: (len(right[role]), len(same[role])))
    if len(right[best]) == len(names):
        also = ", to within rounding of the tuned one" if best == "recovered" else ""
        return f"{reader.folder} is {ROLES[best]}{also}: all {len(names)} tensors are right"
    if not same[best]:
        raise UserError(
            f"{reader.folder} is not raw, diff, tuned or recovered: no hash of its {len(names)} tensors is in the "
            "manifest; another model, or one converted to another type"
        )
    bad = [name for name in names if name not in set(right[best])]
    if len(same[best]) == len(names):
        stored, wanted = described(reader.spec(bad[0])), described(_spec_of(tensors[bad[0]], best))
        raise UserError(
            f"{reader.folder} has the bytes of {ROLES[best]}, but {len(bad)} of {len(names)} tensors under another "
            f"type or shape ({bad[0]} is {stored}, not {wanted}), which gives other values: get the files again"
        )
    raise UserError(
        f"{reader.folder} is nearest to {ROLES[best]}, but {len(bad)} of {len(names)} tensors differ ({some(bad)}), in "
        f"{_shards(reader, bad)}: damaged, changed, or converted in another way; get those files again"
    )


def _shards(reader: CheckpointReader, names: list[str]) -> str:
    return ", ".join(sorted({reader.path_of(name).name for name in names}))


def _spec_of(entry: dict, role: str) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return the (dtype, shape) of a tensor in that role, from its manifest entry; a recovered one is float32."""
    shape = entry["raw_shape" if role == "raw" else "shape"]
    return DTYPES["F32" if role == "recovered" else entry["dtype"][role]], tuple(shape)


def check_is_a_difference(raw: CheckpointReader, diff: CheckpointReader) -> None:
    """For a diff without a manifest: raise UserError if its values are as large as a model's.

    Fine-tuning changes weights by a hundredth to a tenth of their root mean square.
    """
    matrices = [name for name, (_, shape) in diff.specs().items() if len(shape) == 2 and math.prod(shape)]
    ratios = []
    for name in matrices[:: max(1, len(matrices) // 16)]:
        (rows, width), (raw_rows, _) = diff.spec(name)[1], raw.spec(name)[1]
        count = min(max(1, SAMPLE // width), rows, raw_rows)
        sizes = [reader.rows(name, 0, count).float().norm().item() for reader in (raw, diff)]
        if sizes[0] > 0 and math.isfinite(sum(sizes)):
            ratios.append(sizes[1] / sizes[0])
    ratio = statistics.median(ratios) if ratios else 0.0
    if ratio > 0.5:
        cause = "the base model and the diff seem swapped" if ratio > 2 else "the diff seems to be a whole model"
        raise UserError(
            f"{diff.folder}: its values are {ratio:.2g} times as large as those of {raw.folder}, where a diff has 0.01 "
            f"to 0.1: {cause} (check_integrity_naively False skips this check)"
        )


def described(spec: tuple[torch.dtype, tuple[int, ...]]) -> str:
    """Return a tensor's type and shape, as in "F16 [32000, 4096]"."""
    return f"{DTYPE_NAMES.get(spec[0], spec[0])} {list(spec[1])}"
