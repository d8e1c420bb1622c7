"""weight_diff.json, a weight diff's manifest, and what it means if a folder does not match it.

Format 1, of earlier versions, has the method, no hashes, and for exact tuned's types.
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
from alpaca.weights.names import some
from alpaca.weights.pair import BITS, Hashes, sha256_of_all
from alpaca.weights.writer import DTYPE_NAMES, DTYPES, described

METHODS = ("subtract", "exact")
ROLES = {"raw": "the base model", "diff": "the diff", "tuned": "the tuned model", "recovered": "the recovered model"}
SAMPLE = 1 << 18  # elements of a tensor that show its size without a manifest
EARLY = 8  # tensors: if most of the base model's first ones are wrong, the others are not read


def write_manifest(
    folder: Path, method: str, license: str, specs: dict[str, Specs], hashes: dict, errors: dict, mean_rows: dict
) -> None:
    """Write weight_diff.json: each tensor's type and SHA-256 by role, and for subtract the largest error by name.

    ``mean_rows``, the float32 means that were subtracted from new rows, are kept because their bits depend on the
    processor: one without AVX2 adds in another order.
    """
    tensors = {}
    for name, (_, shape) in specs["diff"].items():
        tensors[name] = {
            "shape": list(shape),
            "raw_shape": list(specs["raw"][name][1]),
            "dtype": {role: DTYPE_NAMES[found[name][0]] for role, found in specs.items()},
            "sha256": {role: found[name] for role, found in hashes.items()},
        } | ({"largest_error": errors[name]} if method == "subtract" else {})
    manifest = {"format": 2, "license": license, "method": method, "versions": {"python": sys.version.split()[0]}}
    manifest["versions"] |= {name: metadata.version(name) for name in ("torch", "transformers", "safetensors")}
    if method == "subtract":
        rows = {name: base64.b64encode(row.numpy().tobytes()).decode() for name, row in mean_rows.items()}
        manifest |= {"largest_error": max(errors.values(), default=0.0), "mean_rows": rows}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"tensors": tensors}, indent=1) + "\n")


def read_manifest(diff: CheckpointReader) -> dict:
    """Return a diff's manifest, or {} without one that says how the diff was made; UserError if it does not fit.

    Its ``dtypes`` are tuned's, by name, its ``mean_rows`` tensors; in ``tensors`` types and shapes are torch's.
    """
    path, specs, wrong = diff.folder / MANIFEST, diff.specs(), set()
    manifest = read_json(path) if path.exists() else {}
    if manifest.keys().isdisjoint(("format", "method", "tensors")):
        if all(kind in BITS.values() for kind, _ in specs.values()):
            why = f"has whole numbers, like a diff made with the method exact, but no {MANIFEST} that names a method"
            raise UserError(f"{diff.folder} {why}: download that file too")
        return {}
    method, version = manifest.setdefault("method", "subtract"), manifest.get("format", 1)
    if method not in METHODS or version not in (1, 2):
        raise UserError(f"{path} has the method {method!r}, format {version}, not known here: use a later version")
    try:
        if version == 2 or "tensors" in manifest:
            shapes = {name: tuple(entry["shape"]) for name, entry in manifest["tensors"].items()}
            wrong = {n for n in shapes.keys() | specs.keys() if shapes.get(n) != specs.get(n, (None, None))[1]}
            for entry in manifest["tensors"].values():
                entry["raw_shape"] = tuple(torch.Size(entry["raw_shape"]))  # refuses what is no whole number
                entry["dtype"] = {role: DTYPES[entry["dtype"][role]] for role in ("raw", "diff", "tuned")}
                roles = ("raw", "diff", "tuned", "recovered")[: 4 if method == "subtract" else 3]
                entry["sha256"] = {role: bytes.fromhex(entry["sha256"][role]).hex() for role in roles}
            manifest["dtypes"] = {name: entry["dtype"]["tuned"] for name, entry in manifest["tensors"].items()}
        else:
            manifest["dtypes"] = {name: DTYPES[kind] for name, kind in manifest.get("dtypes", {}).items()}
        rows = {name: bytearray(base64.b64decode(row)) for name, row in manifest.get("mean_rows", {}).items()}
        manifest["mean_rows"] = {name: torch.frombuffer(row, dtype=torch.float32) for name, row in rows.items()}
        if method == "exact":
            wrong |= {name for name, (kind, _) in specs.items() if BITS.get(manifest["dtypes"].get(name)) != kind}
        sound = not wrong and all(specs[name][1][1:] == row.shape for name, row in manifest["mean_rows"].items())
    except (KeyError, TypeError, ValueError, AttributeError):
        sound = False
    if not sound:
        which = f" ({some(wrong)} missing, added, or of another shape or type)" if wrong else ""
        raise UserError(f"{path} does not fit the weights beside it{which}: download both again")
    return manifest


class InputCheck:
    """Checks raw and diff against a manifest's hashes in the pass that uses them; UserError has the probable cause.

    A base model that holds the same values in another type is accepted: the result is the same.
    """

    def __init__(self, manifest: dict, raw: CheckpointReader, diff: CheckpointReader):
        self.tensors, self._seen, self._readers = manifest["tensors"], {}, {"raw": raw, "diff": diff}
        self._hashes, self._rounded = {"raw": Hashes(), "diff": Hashes()}, set()  # names whose values the type rounds
        if odd := [name for name, entry in self.tensors.items() if raw.spec(name)[1] != entry["raw_shape"]]:
            raise UserError(_other_tensors("raw", raw, odd, self.tensors, {}))

    def look(self, name: str, raw: torch.Tensor, diff: torch.Tensor) -> None:
        """Take the next rows of raw and diff."""
        if name not in self._seen and len(self._seen) == EARLY:
            self._compare("raw", self._seen, EARLY // 2)
        self._seen[name] = self.tensors[name]
        cast = raw.to(self.tensors[name]["dtype"]["raw"])
        if cast.dtype != raw.dtype and not torch.equal(cast.to(raw.dtype), raw):
            self._rounded.add(name)
        self._hashes["raw"].update(name, cast)
        self._hashes["diff"].update(name, diff)

    def finish(self, recovered: dict[str, str]) -> None:
        """Raise UserError unless all tensors were right, those of the result too: name → SHA-256."""
        self._compare("diff", self.tensors)
        if other := self._compare("raw", self.tensors):
            print(f"note: the base model has the right values, though stored as another type ({some(other)})")
        for name, entry in self.tensors.items():
            if recovered[name] != entry["sha256"].get("recovered", entry["sha256"]["tuned"]):
                raise UserError(f"{name} came out wrong, though raw and diff are right: try another machine")

    def _compare(self, role: str, tensors: dict, most: int = 0) -> set[str]:
        """Raise UserError if more than ``most`` of these tensors are wrong; return those stored as another type."""
        reader, known = self._readers[role], self._hashes[role].hex()
        other = {name for name, entry in tensors.items() if reader.spec(name)[0] != entry["dtype"][role]}
        wrong = {name for name, entry in tensors.items() if known[name] != entry["sha256"][role]}
        wrong |= self._rounded if role == "raw" else other
        if len(wrong) > most:
            known = {name: sha256 for name, sha256 in known.items() if name not in other}
            raise UserError(_other_tensors(role, reader, [n for n in tensors if n in wrong], tensors, known))
        return other


def _other_tensors(role: str, reader: CheckpointReader, bad: list[str], tensors: dict, known: dict[str, str]) -> str:
    """Return why ``bad``, of the compared tensors of raw or diff, differ from the manifest; see ``identify``."""
    what = f"{ROLES[role]} {reader.folder}: {len(bad)} of {len(tensors)} compared tensors differ from the manifest"
    found = identify(reader, bad, tensors, known)
    if found in ("tuned", "recovered"):
        return f"{what}: they are the tuned model's, recovered already; choose {ROLES[role]}"
    if found not in (None, role):
        return f"{what}: they are those of {ROLES[found]}; are the base model and the diff swapped?"
    what += f" ({some(bad)})"
    if role == "diff":
        return f"{what}: damaged or cut off in the download, get {reader.shards_of(bad)} again"
    (kind, shape), (wanted, published) = reader.spec(bad[0]), _spec_of(tensors[bad[0]], role)
    if published != shape:
        rows = "as published, without added tokens" if shape > published else "with the tokens added before"
        return f"{what}: {bad[0]} is {list(shape)}, the diff was made from {list(published)}: use the base model {rows}"
    if kind != wanted:
        this = f"use the one stored as {DTYPE_NAMES[wanted]} (this is {DTYPE_NAMES.get(kind, kind)})"
        return f"{what}: another conversion, or another base model; {this}"
    if 2 * len(bad) > len(tensors):
        return f"{what}: another base model, or another size, version or conversion of it"
    cure = f"get {reader.shards_of(bad)} again, or convert it with the transformers of the diff's time"
    return f"{what}, all others are right: damaged or changed, or another conversion; {cure}"


def identify(reader: CheckpointReader, names: list[str], tensors: dict, known: dict[str, str]) -> str | None:
    """Return the role that more than half of the named tensors have, bit for bit, or None.

    A tensor that training did not change has several: it is both raw and tuned. ``known`` are SHA-256 known already.
    """
    known = known | sha256_of_all(reader, [name for name in names if name not in known], "what is it?")
    counts = {role: sum(tensors[name]["sha256"].get(role) == known[name] for name in names) for role in ROLES}
    best = max(counts, key=counts.get)
    return best if 2 * counts[best] > len(names) else None


def verify_folder(manifest: dict, reader: CheckpointReader) -> str:
    """Return, as a line of text, which of raw, diff, tuned and recovered a folder is; UserError says what differs."""
    tensors, names = manifest["tensors"], reader.names()
    hashes = sha256_of_all(reader, names, "verify")
    wrong = {}
    for role in ("tuned", "raw", "diff", "recovered"):  # of those that fit equally well, the first counts
        wanted = {name: (entry["sha256"].get(role), _spec_of(entry, role)) for name, entry in tensors.items()}
        wrong[role] = sorted(name for name in names if wanted[name] != (hashes[name], reader.spec(name)))
    bad = wrong[best := min(wrong, key=lambda role: len(wrong[role]))]
    if not bad:
        also = ", to within rounding of the tuned one" if best == "recovered" else ""
        return f"{reader.folder} is {ROLES[best]}{also}: all {len(names)} tensors are right"
    kind, wanted = reader.spec(bad[0]), _spec_of(tensors[bad[0]], best)
    why = f"{bad[0]} is {described(kind)}, not {described(wanted)}" if kind != wanted else some(bad)
    if len(bad) == len(names):
        raise UserError(f"{reader.folder} is not raw, diff, tuned or recovered: all tensors differ ({why})")
    why = f"{len(bad)} of {len(names)} tensors differ ({why}), in {reader.shards_of(bad)}: damaged or changed"
    raise UserError(f"{reader.folder} is nearest to {ROLES[best]}, but {why}; get those files again")


def _spec_of(entry: dict, role: str) -> tuple[torch.dtype, tuple[int, ...]]:
    kind = torch.float32 if role == "recovered" else entry["dtype"][role]
    return kind, tuple(entry["raw_shape" if role == "raw" else "shape"])


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
        said = f"its values are {ratio:.2g} times as large as those of {raw.folder}, where a diff has 0.01 to 0.1"
        raise UserError(f"{diff.folder}: {said}: {cause} (check_integrity_naively False skips this check)")
