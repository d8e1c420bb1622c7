"""What weight_diff.json says, and what recover and verify say when a folder does not agree with it."""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from made_models import assert_same_bits, edit_json, left_in, load_tensors, made_pair, refused, rewrite, write_model

import weight_diff
from alpaca import UserError
from alpaca.weights import manifest
from weight_diff import compare, make_diff, verify

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def recover(*args, **kwargs) -> None:
    weight_diff.recover(*args, test_inference=False, **kwargs)


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "weight_diff.json").read_text())


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def files_in(*folders: Path) -> dict[Path, str]:
    """SHA-256 and time of change of every file."""
    files = [file for folder in folders for file in sorted(folder.rglob("*"))]
    return {file: (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns) for file in files}


# ---------------------------------------------------------------------------------------------------------------------
# What it says.


@pytest.mark.parametrize("method", ["subtract", "exact"])
def test_the_manifest_has_shape_type_and_hash_of_every_tensor_of_every_model(tmp_path, method):
    made_pair(tmp_path)
    tensors = {name: tensor.half() for name, tensor in load_tensors(tmp_path / "raw").items()}
    raw = write_model(tmp_path / "half", tensors, "bin-sharded", vocab_size=4)
    make_diff(raw, tmp_path / "tuned", tmp_path / "diff", method, license="CC BY-NC 4.0")
    recover(raw, tmp_path / "diff", tmp_path / "recovered")
    manifest = manifest_of(tmp_path / "diff")
    assert (manifest["format"], manifest["method"], manifest["license"]) == (2, method, "CC BY-NC 4.0")
    assert manifest["versions"]["torch"] == version("torch")
    tuned, diff, recovered = (load_tensors(tmp_path / name) for name in ("tuned", "diff", "recovered"))
    assert list(manifest["tensors"]) == sorted(tuned)
    errors = {}
    for name, entry in manifest["tensors"].items():
        hashes = {"raw": tensors[name], "diff": diff[name], "tuned": tuned[name]}
        if method == "subtract":
            hashes["recovered"] = recovered[name]
            errors[name] = (recovered[name] - tuned[name]).abs().max().item()
            assert entry.pop("largest_error") == errors[name]
        assert entry == {
            "shape": list(tuned[name].shape),
            "raw_shape": list(tensors[name].shape),
            "dtype": {"raw": "F16", "diff": "F32" if method == "subtract" else "I32", "tuned": "F32"},
            "sha256": {role: sha256(tensor) for role, tensor in hashes.items()},
        }
    if method == "subtract":
        assert manifest["largest_error"] == max(errors.values()) > 0
    else:
        assert "largest_error" not in manifest
        assert_same_bits(recovered, tuned)


def test_no_licence_is_made_up(folders):
    said = "not stated: see those of the base model and of the data that it was tuned on"
    assert manifest_of(folders / "diff")["license"] == said


def receipt(folder: Path, **data) -> None:
    (folder / "training_receipt.json").write_text(json.dumps({"model": {"started_from": "a/base"}, "data": data}))


@pytest.mark.parametrize(
    ("given", "wanted", "warned"),
    [
        (None, "CC BY-NC 4.0", False),
        ("cc-by-nc-4.0", "cc-by-nc-4.0", False),
        ("Apache-2.0", "Apache-2.0", True),
    ],
)
def test_the_license_is_that_of_the_receipt_and_another_one_is_warned_of(folders, capsys, given, wanted, warned):
    receipt(folders / "tuned", train={"licence": "CC BY-NC 4.0"})
    capsys.readouterr()
    make_diff(folders / "raw", folders / "tuned", folders / "new", license=given)
    assert manifest_of(folders / "new")["license"] == wanted
    said = "warning: --license Apache-2.0, but the data that the model learned from is CC BY-NC 4.0 ("
    assert (said in capsys.readouterr().out) == warned


@pytest.mark.parametrize("data", [{}, {"train": None}, {"train": {"licence": None}}])
def test_a_receipt_without_a_license_leaves_it_to_the_user(folders, data):
    receipt(folders / "tuned", **data)
    make_diff(folders / "raw", folders / "tuned", folders / "new")
    assert manifest_of(folders / "new")["license"].startswith("not stated")
    make_diff(folders / "raw", folders / "tuned", folders / "new", license="MIT", overwrite=True)
    assert manifest_of(folders / "new")["license"] == "MIT"


# ---------------------------------------------------------------------------------------------------------------------
# The card.


def front_matter(folder: Path) -> dict:
    text = (folder / "README.md").read_text()
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize("method", ["subtract", "exact"])
def test_the_card_of_a_diff_says_that_it_is_none_of_a_model(folders, method):
    receipt(folders / "tuned", train={"licence": "CC BY-NC 4.0"})
    (folders / "tuned" / "model_card.md").write_text("---\npipeline_tag: text-generation\n---\n")
    make_diff(folders / "raw", folders / "tuned", folders / "new", method)
    head = front_matter(folders / "new")
    assert head == {"license": "cc-by-nc-4.0", "base_model": "a/base", "tags": ["weight-diff"]}
    card = (folders / "new" / "README.md").read_text()
    assert "# Weight diff of raw\n" in card and "not a model" in card and str(folders) not in card
    assert "weight_diff.py recover --path_raw RAW --path_diff DIFF" in card
    assert f"- Method: {method}, every" in card and "- License: CC BY-NC 4.0." in card
    assert "`model_card.md` beside" in card and "a folder with raw (a/base) in Hugging Face format" in card
    recover(folders / "raw", folders / "new", folders / "recovered")
    assert (folders / "recovered" / "model_card.md").exists() and not (folders / "recovered" / "README.md").exists()
    make_diff(folders / "raw", folders / "tuned", folders / "new", method, overwrite=True)  # its card is its own


@pytest.mark.parametrize(("license", "head"), [(None, None), ("as you like", "other"), ("MIT", "mit")])
def test_the_card_states_no_base_and_no_license_that_are_not_known(folders, license, head):
    make_diff(folders / "raw", folders / "tuned", folders / "new", license=license)
    assert front_matter(folders / "new") == ({"license": head} if head else {}) | {"tags": ["weight-diff"]}
    assert "model_card.md" not in (folders / "new" / "README.md").read_text()


def test_the_manifest_is_the_same_whatever_the_layout_and_the_chunks(tmp_path, monkeypatch):
    made_pair(tmp_path)
    make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "diff")
    for name in ("raw", "tuned"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        write_model(tmp_path / f"{name}-bin", load_tensors(tmp_path / name), "bin-sharded", **config)
    monkeypatch.setattr("alpaca.weights.checkpoint.BLOCK", 3)
    make_diff(tmp_path / "raw-bin", tmp_path / "tuned-bin", tmp_path / "again", max_shard_size="0.06KB")
    assert manifest_of(tmp_path / "again") == manifest_of(tmp_path / "diff")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) == 3
    recover(tmp_path / "raw", tmp_path / "again", tmp_path / "recovered", max_shard_size="0.06KB")
    assert len(list((tmp_path / "recovered").glob("*.safetensors"))) == 3


def test_the_mean_row_of_a_manifest_is_used_on_a_processor_that_would_add_otherwise(folders, monkeypatch):
    recover(folders / "raw", folders / "diff", folders / "recovered")

    def other(*_):
        raise AssertionError("the mean was taken again")

    monkeypatch.setattr(weight_diff, "mean_row", other)
    recover(folders / "raw", folders / "diff", folders / "again")
    assert_same_bits(load_tensors(folders / "again"), load_tensors(folders / "recovered"))


def test_a_diff_of_format_1_is_still_recovered(folders):
    """It has neither hashes nor mean rows; of an exact one, the types."""
    recover(folders / "raw", folders / "diff", folders / "recovered")
    (folders / "diff" / "weight_diff.json").write_text('{"format": 1, "license": "x", "method": "subtract"}')
    recover(folders / "raw", folders / "diff", folders / "again")
    assert_same_bits(load_tensors(folders / "again"), load_tensors(folders / "recovered"))
    make_diff(folders / "raw", folders / "tuned", folders / "exact", method="exact")
    dtypes = dict.fromkeys(load_tensors(folders / "tuned"), "F32")
    manifest = {"format": 1, "license": "x", "method": "exact", "dtypes": dtypes}
    (folders / "exact" / "weight_diff.json").write_text(json.dumps(manifest))
    recover(folders / "raw", folders / "exact", folders / "tuned again")
    compare(folders / "tuned", folders / "tuned again")
    with pytest.raises(UserError, match="has no hashes"):
        verify(folders / "raw", folders / "exact")


@pytest.mark.parametrize(
    ("method", "manifest"),
    [
        ("exact", {"format": 1, "method": "exact", "dtypes": ["F32"]}),
        ("exact", {"format": 1, "method": "exact", "dtypes": dict.fromkeys(("lm_head.weight", "x"), ["F32"])}),
        ("exact", {"format": 1, "method": "exact", "dtypes": None}),
        ("exact", {"format": 1, "method": "exact"}),
        ("subtract", {"tensors": {"lm_head.weight": {}}}),
        ("subtract", {"format": 1, "tensors": []}),
        ("subtract", {"format": 1, "tensors": {"lm_head.weight": {"sha256": {}}}}),
        ("subtract", {"format": 2}),
        ("subtract", {"format": 2, "method": "subtract", "tensors": {}}),
    ],
)
def test_a_malformed_manifest_is_refused_in_one_line_whatever_format_it_claims(folders, method, manifest):
    make_diff(folders / "raw", folders / "tuned", folders / "diff", method, overwrite=True)
    (folders / "diff" / "weight_diff.json").write_text(json.dumps(manifest))
    message = refused(folders, recover, folders / "raw", folders / "diff", folders / "new")
    assert "weight_diff.json does not fit the weights beside it" in message and "download both" in message


def test_a_manifest_without_a_format_is_checked_for_the_hashes_that_it_has(folders):
    manifest = manifest_of(folders / "diff")
    del manifest["format"]
    (folders / "diff" / "weight_diff.json").write_text(json.dumps(manifest))
    recover(folders / "raw", folders / "diff", folders / "recovered")
    verify(folders / "recovered", folders / "diff")
    flip(folders / "diff" / "model.safetensors")
    assert "1 of 3 compared tensors differ from the manifest" in refused(
        folders, recover, folders / "raw", folders / "diff", folders / "new"
    )


@pytest.mark.parametrize("manifest", ["{}", '{"license": "x"}', '{"format": 1, "method": "subtract"}'])
def test_a_diff_whose_manifest_has_no_hashes_is_still_held_to_look_like_one(folders, capsys, manifest):
    five = write_model(folders / "five", load_tensors(folders / "tuned"), vocab_size=5)
    (five / "weight_diff.json").write_text(manifest)
    message = refused(folders, recover, folders / "tuned", five, folders / "new")
    assert "1 times as large" in message and "the diff seems to be a whole model" in message
    (folders / "diff" / "weight_diff.json").write_text(manifest)
    capsys.readouterr()
    recover(folders / "raw", folders / "diff", folders / "recovered")
    assert ("nothing proves that it is a diff" in capsys.readouterr().out) == ("method" not in manifest)


@pytest.mark.parametrize("manifest", [None, "{}"])
def test_an_exact_diff_without_its_manifest_is_told_that_it_needs_it(folders, manifest):
    make_diff(folders / "raw", folders / "tuned", folders / "exact", method="exact")
    (folders / "exact" / "weight_diff.json").unlink()
    if manifest:
        (folders / "exact" / "weight_diff.json").write_text(manifest)
    message = refused(folders, recover, folders / "raw", folders / "exact", folders / "new")
    assert message == (
        f"{folders / 'exact'} has whole numbers, like a diff made with the method exact, but no weight_diff.json "
        "that names a method: download that file too"
    )


def test_a_manifest_of_a_later_format_is_refused(folders):
    edit_json(folders / "diff" / "weight_diff.json", format=3)
    message = refused(folders, recover, folders / "raw", folders / "diff", folders / "new")
    assert "format 3, not known here: use a later version" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("raw_shape", 4),
        ("raw_shape", ["4", 8]),
        ("raw_shape", None),
        ("shape", [8, 5]),
        ("dtype", "F32"),
        ("dtype", {"raw": "F32", "diff": "F32", "tuned": ["F32"]}),
        ("dtype", {"raw": "F32", "diff": "F32"}),
        ("sha256", {"raw": 1, "diff": "", "tuned": "", "recovered": ""}),
        ("sha256", {}),
    ],
)
def test_a_malformed_entry_of_a_tensor_is_refused_in_one_line(folders, key, value):
    manifest = manifest_of(folders / "diff")
    manifest["tensors"][HEAD][key] = value
    (folders / "diff" / "weight_diff.json").write_text(json.dumps(manifest))
    message = refused(folders, recover, folders / "raw", folders / "diff", folders / "new")
    assert "weight_diff.json" in message and "download both again" in message, message


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": {"lm_head.weight": {}}},
        {"tensors": []},
        {"tensors": {"lm_head.weight": 1}},
        {"mean_rows": {"lm_head.weight": "AAAA"}},
        {"mean_rows": {"lm_head.weight": "AAAAAA=="}},
        {"mean_rows": {"lm_head.weight": "?"}},
        {"mean_rows": {"other": ""}},
        {"mean_rows": 3},
    ],
)
def test_a_manifest_that_was_changed_is_refused_in_one_line(folders, change):
    edit_json(folders / "diff" / "weight_diff.json", **change)
    message = refused(folders, recover, folders / "raw", folders / "diff", folders / "new")
    assert "weight_diff.json" in message and "download both again" in message, message


# ---------------------------------------------------------------------------------------------------------------------
# What a difference means.


def halved(folder: Path, dtype: torch.dtype) -> None:
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: tensor.to(dtype) for name, tensor in load_tensors(folder).items()}
    shutil.rmtree(folder)
    write_model(folder, tensors, **config)


def off(tensors: dict, *names: str) -> dict:
    return {name.replace(".", "__"): tensors[name] + 0.5 for name in names or tensors}


def replaced_by(other: str):
    def change(folders: Path, folder: Path) -> None:
        shutil.rmtree(folder)
        shutil.copytree(folders / other, folder)

    return change


NORM, HEAD, EMBED = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"
WRONG_RAWS = {
    "another model": (
        lambda folders, raw: rewrite(raw, **off(load_tensors(raw))),
        ["3 of 3 compared tensors", "another base model"],
    ),
    "another conversion": (
        lambda folders, raw: rewrite(raw, **off(load_tensors(raw), NORM)),
        [f"1 of 3 compared tensors differ from the manifest ({NORM})", "another conversion", "model.safetensors"],
    ),
    "most tensors": (
        lambda folders, raw: rewrite(raw, **off(load_tensors(raw), HEAD, EMBED)),
        ["2 of 3 compared tensors", HEAD, "another base model, or another size, version or conversion"],
    ),
    "the output embedding alone": (
        lambda folders, raw: rewrite(raw, **off(load_tensors(raw), HEAD)),
        [
            f"1 of 3 compared tensors differ from the manifest ({HEAD})",
            "damaged or changed",
            "get model.safetensors again",
        ],
    ),
    "rounded to another type": (
        lambda folders, raw: halved(raw, BF16),
        ["2 of 3 compared tensors", "another conversion", "use the one stored as F32 (this is BF16)"],
    ),
    "the tuned model": (
        replaced_by("tuned"),
        ["2 of 3", "they are the tuned model's, recovered already; choose the base model"],
    ),
    "the recovered model": (replaced_by("recovered"), ["2 of 3", "tuned model's, recovered already"]),
    "one bit": (
        lambda folders, raw: flip(raw / "model.safetensors"),
        ["1 of 3 compared tensors", NORM, "damaged or changed", "get model.safetensors again"],
    ),
}


def flip(file: Path, position: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("case", WRONG_RAWS)
def test_a_wrong_base_model_is_refused_with_what_it_is(folders, case):
    change, words = WRONG_RAWS[case]
    recover(folders / "raw", folders / "diff", folders / "recovered")
    change(folders, folders / "raw")
    message = refused(folders, recover, folders / "raw", folders / "diff", folders / "new")
    assert [word for word in ["the base model ", *words] if word not in message] == [], message


@pytest.mark.parametrize("wrong", [range(40), range(4, 9), range(4, 40)])
def test_a_base_model_of_which_most_of_the_first_tensors_are_wrong_is_not_read_to_its_end(tmp_path, monkeypatch, wrong):
    tensors = {f"model.layers.{i}.weight": torch.full((2, 2), i + 1.0) for i in range(40)}
    raw = write_model(tmp_path / "raw", tensors)
    write_model(tmp_path / "tuned", {name: tensor + 0.1 for name, tensor in tensors.items()})
    make_diff(raw, tmp_path / "tuned", tmp_path / "diff")
    rewrite(raw, **off(tensors, *(f"model.layers.{i}.weight" for i in wrong)))
    read, look = [], manifest.InputCheck.look
    monkeypatch.setattr(
        manifest.InputCheck, "look", lambda check, name, *rows: look(check, read.append(name) or name, *rows)
    )
    message = refused(tmp_path, recover, raw, tmp_path / "diff", tmp_path / "new")
    if wrong == range(40):
        assert len(read) == 9 and "8 of 8 compared tensors differ" in message and "another base model" in message
    else:  # half of the first eight may be damaged: only the rest tells
        assert len(read) == 40 and f"{len(wrong)} of 40 compared tensors differ from the manifest" in message
        assert ("another base model" in message) == (len(wrong) > 20)


def test_a_base_model_with_more_digits_than_the_diffs_is_told_which_type_is_wanted(tmp_path):
    made_pair(tmp_path)
    shutil.copytree(tmp_path / "raw", tmp_path / "finer")
    halved(tmp_path / "raw", F16)
    make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "diff")
    message = refused(tmp_path, recover, tmp_path / "finer", tmp_path / "diff", tmp_path / "new")
    assert "another conversion, or another base model; use the one stored as F16 (this is F32)" in message


@pytest.mark.parametrize("method", ["subtract", "exact"])
def test_a_base_model_with_the_same_values_in_another_type_gives_the_same_bits(tmp_path, capsys, method):
    """fp16 values stored as float32, as a conversion that upcasts has them, and the other way round."""
    made_pair(tmp_path)
    halved(tmp_path / "raw", F16)
    shutil.copytree(tmp_path / "raw", tmp_path / "upcast")
    halved(tmp_path / "upcast", F32)
    for ours, theirs in (("raw", "upcast"), ("upcast", "raw")):
        make_diff(tmp_path / ours, tmp_path / "tuned", tmp_path / f"diff-{ours}", method)
        recover(tmp_path / ours, tmp_path / f"diff-{ours}", tmp_path / f"same-{ours}")
        assert "another type" not in capsys.readouterr().out
        recover(tmp_path / theirs, tmp_path / f"diff-{ours}", tmp_path / f"other-{ours}")
        assert "has the right values, though stored as another type" in capsys.readouterr().out
        assert_same_bits(load_tensors(tmp_path / f"other-{ours}"), load_tensors(tmp_path / f"same-{ours}"))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (
            "one tensor",
            ["1 of 3 compared tensors differ from the manifest (model.norm.weight)", "get model.safetensors again"],
        ),
        ("recovered", ["3 of 3", "they are the tuned model's, recovered already"]),
        ("tuned", ["3 of 3", "they are the tuned model's, recovered already"]),
    ],
)
def test_a_wrong_diff_is_refused_with_what_it_is(folders, case, words):
    recover(folders / "raw", folders / "diff", folders / "recovered")
    if case == "one tensor":
        flip(folders / "diff" / "model.safetensors")
    else:
        shutil.copy(folders / case / "model.safetensors", folders / "diff")
    message = refused(folders, recover, folders / "raw", folders / "diff", folders / "new")
    assert [word for word in ["the diff ", *words] if word not in message] == [], message


def lora_merged(tmp_path: Path) -> None:
    """``raw`` and ``tuned``, which an adapter on the matrices made: the norms are as they were."""
    norms = {f"model.layers.{i}.norm.weight": torch.full((8,), i + 1.0) for i in range(5)}
    raw = norms | {"a.weight": torch.ones(16, 8), "b.weight": torch.ones(16, 8)}
    write_model(tmp_path / "raw", raw)
    write_model(tmp_path / "tuned", raw | {"a.weight": torch.full((16, 8), 1.1), "b.weight": torch.full((16, 8), 0.9)})


@pytest.mark.parametrize("given", ["tuned", "recovered"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_model_with_the_norms_of_its_base_is_still_known(tmp_path, given, dtype):
    lora_merged(tmp_path)
    for name in ("raw", "tuned"):
        halved(tmp_path / name, dtype)
    make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "diff")
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "recovered")
    message = refused(tmp_path, recover, tmp_path / given, tmp_path / "diff", tmp_path / "new")
    assert "they are the tuned model's, recovered already; choose the base model" in message
    shutil.copy(tmp_path / given / "model.safetensors", tmp_path / "diff")
    message = refused(tmp_path, recover, tmp_path / "raw", tmp_path / "diff", tmp_path / "new")
    assert "7 of 7 compared tensors differ from the manifest: they are the tuned model's, recovered already" in message
    flip(tmp_path / "diff" / "model.safetensors")  # and is damaged
    message = refused(tmp_path, recover, tmp_path / "raw", tmp_path / "diff", tmp_path / "new")
    assert "they are the tuned model's, recovered already" in message
    shutil.copy(tmp_path / "raw" / "model.safetensors", tmp_path / "diff")
    message = refused(tmp_path, recover, tmp_path / "raw", tmp_path / "diff", tmp_path / "new")
    assert "they are those of the base model; are the base model and the diff swapped?" in message


def test_a_base_model_of_more_or_fewer_rows_than_the_diffs_is_told_both_shapes(tmp_path):
    made_pair(tmp_path)
    grown = load_tensors(tmp_path / "raw")
    for name in (HEAD, EMBED):
        grown[name] = torch.cat([grown[name], torch.ones(1, 8)])
    write_model(tmp_path / "grown", grown, vocab_size=5)
    for raw, other in (("raw", "grown"), ("grown", "raw")):
        make_diff(tmp_path / raw, tmp_path / "tuned", tmp_path / f"diff of {raw}")
        message = refused(tmp_path, recover, tmp_path / other, tmp_path / f"diff of {raw}", tmp_path / "new")
        shapes = {"raw": "[4, 8]", "grown": "[5, 8]"}
        assert (
            f"{other}: 2 of 3 compared tensors" in message
            and f": {HEAD} is {shapes[other]}, the diff was made from {shapes[raw]}: " in message
        )
        cure = {"raw": "as published, without added tokens", "grown": "with the tokens added before"}
        assert cure[raw] in message


def test_a_result_that_is_not_the_tuned_model_is_refused_before_it_has_its_name(folders):
    manifest = manifest_of(folders / "diff")
    manifest["tensors"][NORM]["sha256"]["recovered"] = "0" * 64
    edit_json(folders / "diff" / "weight_diff.json", **manifest)
    assert f"{NORM} came out wrong" in refused(folders, recover, folders / "raw", folders / "diff", folders / "new")


# ---------------------------------------------------------------------------------------------------------------------
# Without a manifest.


def test_swapped_folders_and_whole_models_are_refused_and_the_flag_lets_them_pass(folders):
    message = refused(folders, recover, folders / "diff", folders / "raw", folders / "new")
    assert message.startswith("--path_raw") and "is a weight diff: recover it first" in message
    (folders / "diff" / "weight_diff.json").unlink()
    # without new rows the shapes fit both ways
    five = write_model(folders / "five", load_tensors(folders / "tuned"), vocab_size=5)
    message = refused(folders, recover, folders / "diff", five, folders / "new")
    assert "seem swapped (check_integrity_naively False skips this check)" in message
    message = refused(folders, recover, five, folders / "tuned", folders / "new")
    assert "1 times as large" in message and "the diff seems to be a whole model" in message
    message = refused(folders, recover, folders / "diff", folders / "raw", folders / "new")
    assert "or are --path_raw and --path_diff swapped?" in message  # 5 rows in raw, 4 in diff
    recover(five, folders / "tuned", folders / "new", check_integrity_naively=False)
    assert_same_bits(load_tensors(folders / "new"), {n: 2 * t for n, t in load_tensors(five).items()})


@pytest.mark.parametrize("zipped", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "bare pickle"])
def test_a_flipped_bit_in_a_bin_is_found_by_its_checksum_where_there_is_one(folders, zipped):
    tensors = load_tensors(folders / "diff")
    (folders / "diff" / "weight_diff.json").unlink()
    (folders / "diff" / "model.safetensors").unlink()
    file = folders / "diff" / "pytorch_model.bin"
    torch.save(tensors, file, **zipped)
    flip(file, file.read_bytes().index(tensors[NORM].numpy().tobytes()) + 3)
    if zipped:  # an old file has no checksum
        recover(folders / "raw", folders / "diff", folders / "new")
        return
    message = refused(folders, recover, folders / "raw", folders / "diff", folders / "new")
    assert message == (f"{file} is damaged: Bad CRC-32 for file 'pytorch_model/data/2'; download it again")


def test_make_diff_does_not_take_a_damaged_bin(folders):
    tensors = load_tensors(folders / "tuned")
    (folders / "tuned" / "model.safetensors").unlink()
    file = folders / "tuned" / "pytorch_model.bin"
    torch.save(tensors, file)
    flip(file, file.read_bytes().index(tensors[NORM].numpy().tobytes()))
    message = refused(folders, make_diff, folders / "raw", folders / "tuned", folders / "new")
    assert f"{file} is damaged: Bad CRC-32 for file 'pytorch_model/data/2'" in message


def test_a_bin_without_checksums_is_read(folders):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(load_tensors(folders / "tuned"), folders / "tuned" / "pytorch_model.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    (folders / "tuned" / "model.safetensors").unlink()
    make_diff(folders / "raw", folders / "tuned", folders / "new")
    assert_same_bits(load_tensors(folders / "new"), load_tensors(folders / "diff"))


# ---------------------------------------------------------------------------------------------------------------------
# verify.


def test_verify_says_which_folder_it_is(folders, capsys):
    recover(folders / "raw", folders / "diff", folders / "recovered", max_shard_size="0.06KB")
    config = json.loads((folders / "tuned" / "config.json").read_text())
    write_model(folders / "tuned-bin", load_tensors(folders / "tuned"), "bin-sharded", **config)
    capsys.readouterr()
    for name, what in (("raw", "base"), ("tuned", "tuned"), ("tuned-bin", "tuned"), ("recovered", "recovered")):
        verify(folders / name, folders / "diff")
        said = capsys.readouterr().out
        assert f"{name} is the {what} model" in said and "all 3 tensors are right\n" in said
    verify(folders / "diff", folders / "diff")
    assert "diff is the diff: all 3 tensors are right\n" in capsys.readouterr().out


def test_verify_says_what_differs(folders):
    flip(folders / "tuned" / "model.safetensors")
    message = refused(folders, verify, folders / "tuned", folders / "diff")
    assert f"is nearest to the tuned model, but 1 of 3 tensors differ ({NORM}), in model.safetensors" in message
    rewrite(folders / "tuned", **off(load_tensors(folders / "tuned")))
    assert "is not raw, diff, tuned or recovered" in refused(folders, verify, folders / "tuned", folders / "diff")
    rewrite(folders / "tuned", model__norm__weight=None)
    assert "lacks tensors that the manifest has" in refused(folders, verify, folders / "tuned", folders / "diff")
    rewrite(folders / "tuned", model__norm__weight=torch.ones(8), more=torch.ones(1))
    message = refused(folders, verify, folders / "tuned", folders / "diff")
    assert f"the manifest lacks tensors that --path {folders / 'tuned'} has: more;" in message
    assert "has no hashes" in refused(folders, verify, folders / "tuned", folders / "raw")


def relabelled(folder: Path, dtype: torch.dtype | None = None, shape: tuple | None = None, name: str = EMBED) -> None:
    """The same bytes under another type or shape."""
    tensor = load_tensors(folder)[name]
    tensor = tensor.view(dtype) if dtype else tensor.reshape(shape)
    rewrite(folder, **{name.replace(".", "__"): tensor})


@pytest.mark.parametrize("role", ["raw", "tuned", "recovered"])
def test_verify_wants_the_type_and_the_shape_beside_the_bytes(tmp_path, role):
    """A header that says F16 over the bytes of BF16 gives other values, of the same hash."""
    made_pair(tmp_path)
    for name in ("raw", "tuned"):
        halved(tmp_path / name, BF16)
    make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "diff")
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "recovered")
    verify(tmp_path / role, tmp_path / "diff")
    for change in ({"dtype": torch.int32} if role == "recovered" else {"dtype": F16}, {"shape": (8, -1)}):
        folder = tmp_path / str(*change)
        shutil.copytree(tmp_path / role, folder)
        relabelled(folder, **change)
        message = refused(tmp_path, verify, folder, tmp_path / "diff")
        what = {"raw": "the base model", "tuned": "the tuned model", "recovered": "the recovered model"}[role]
        assert f"is nearest to {what}, but 1 of 3 tensors differ ({EMBED} is " in message
        shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------------------------------------
# What else the commands do.


@pytest.mark.parametrize("method", ["subtract", "exact"])
def test_not_a_number_is_warned_of_by_name_and_goes_through(folders, capsys, method):
    norm = torch.ones(8)
    norm[3] = float("nan")
    rewrite(folders / "raw", model__norm__weight=norm)
    head = load_tensors(folders / "tuned")[HEAD]
    head[0, 0] = float("inf")
    rewrite(folders / "tuned", lm_head__weight=head)
    capsys.readouterr()
    make_diff(folders / "raw", folders / "tuned", folders / "new", method)
    said = capsys.readouterr().out
    assert f"warning: NaN or infinite values in 1 tensor of the base model: {NORM}\n" in said
    assert f"warning: NaN or infinite values in 1 tensor of the tuned model: {HEAD}\n" in said
    json.loads((folders / "new" / "weight_diff.json").read_text(), parse_constant=None)
    assert "NaN" not in (folders / "new" / "weight_diff.json").read_text()
    recover(folders / "raw", folders / "new", folders / "recovered")
    said = capsys.readouterr().out
    assert HEAD in said and "of the recovered model: " in said
    if method == "subtract":
        assert f"1 tensor of the diff: {HEAD}" not in said  # of both
        assert f"2 tensors of the diff: {HEAD}, {NORM}\n" in said
    else:
        compare(folders / "tuned", folders / "recovered")


def test_not_a_number_in_the_base_is_warned_of_where_an_exact_diff_takes_it_away(folders, capsys):
    norm = torch.ones(8)
    norm[3] = float("nan")
    rewrite(folders / "raw", model__norm__weight=norm)
    make_diff(folders / "raw", folders / "tuned", folders / "new", "exact")
    capsys.readouterr()
    recover(folders / "raw", folders / "new", folders / "recovered")
    said = capsys.readouterr().out
    assert f"warning: NaN or infinite values in 1 tensor of the base model: {NORM}\n" in said
    assert said.count("warning") == 1


@pytest.mark.parametrize("method", ["subtract", "exact"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_output_is_rounded_to_the_type_that_is_asked_for(folders, capsys, method, dtype):
    make_diff(folders / "raw", folders / "tuned", folders / "new", method)
    recover(folders / "raw", folders / "new", folders / "recovered")
    recover(folders / "raw", folders / "new", folders / dtype, dtype=dtype)
    wanted = {n: t.to(getattr(torch, dtype)) for n, t in load_tensors(folders / "recovered").items()}
    assert_same_bits(load_tensors(folders / dtype), wanted)
    said = f", each with the manifest's hash{f' before rounding to {dtype}' if dtype != 'float32' else ''}\n"
    assert capsys.readouterr().out.endswith(said)
    assert json.loads((folders / dtype / "config.json").read_text())["dtype"] == dtype


def test_a_diff_in_another_type_gives_a_model_of_that_type(folders):
    """The original computes in float32; so do we, and round once."""
    (folders / "diff" / "weight_diff.json").unlink()
    halved(folders / "diff", BF16)
    recover(folders / "raw", folders / "diff", folders / "recovered")
    recover(folders / "raw", folders / "diff", folders / "in full", dtype="float32")
    wanted = {name: tensor.bfloat16() for name, tensor in load_tensors(folders / "in full").items()}
    assert_same_bits(load_tensors(folders / "recovered"), wanted)


def test_values_too_large_for_the_type_are_warned_of(folders, capsys):
    rewrite(folders / "tuned", model__norm__weight=torch.full((8,), 1e6))
    make_diff(folders / "raw", folders / "tuned", folders / "new")
    capsys.readouterr()
    recover(folders / "raw", folders / "new", folders / "recovered", dtype="float16")
    assert f"in 1 tensor of what is written as torch.float16: {NORM}\n" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["fp16", "int8", ""])
def test_a_type_that_is_none_is_refused(folders, value):
    message = refused(folders, recover, folders / "raw", folders / "diff", folders / "new", dtype=value)
    assert message == f"--dtype must be float32 or bfloat16 or float16, not {value!r}"


@pytest.mark.parametrize("method", ["subtract", "exact"])
def test_inputs_are_never_changed_nor_overwritten(folders, method):
    before = files_in(folders / "raw", folders / "tuned")
    make_diff(folders / "raw", folders / "tuned", folders / "new", method)
    diff = files_in(folders / "new")
    recover(folders / "raw", folders / "new", folders / "recovered")
    compare(folders / "raw", folders / "raw")
    verify(folders / "raw", folders / "new")
    for target in (folders / "raw", folders / "new", folders):
        message = refused(folders, recover, folders / "raw", folders / "new", target, overwrite=True)
        assert "is, contains or lies in the input" in message
    assert "is, contains or lies in" in refused(
        folders, make_diff, folders / "raw", folders / "tuned", folders / "tuned", overwrite=True
    )
    assert files_in(folders / "raw", folders / "tuned") == before
    assert files_in(folders / "new") == diff


def test_a_target_that_is_there_is_replaced_with_overwrite_alone(folders):
    recover(folders / "raw", folders / "diff", folders / "recovered")
    message = refused(folders, recover, folders / "raw", folders / "diff", folders / "recovered")
    assert message.endswith("already exists: remove it, choose another path, or overwrite it")
    recover(folders / "raw", folders / "diff", folders / "recovered", overwrite=True, dtype="bfloat16")
    assert {tensor.dtype for tensor in load_tensors(folders / "recovered").values()} == {BF16}
    make_diff(folders / "raw", folders / "tuned", folders / "diff", method="exact", overwrite=True)
    assert manifest_of(folders / "diff")["method"] == "exact"
    assert left_in(folders) == ["diff", "raw", "recovered", "tuned"]


def test_what_recover_gives_is_said(folders, capsys):
    make_diff(folders / "raw", folders / "tuned", folders / "bits", method="exact")
    assert "bits: 0.000 GB; recover gives the tuned model bit for bit\n" in capsys.readouterr().out
    make_diff(folders / "raw", folders / "tuned", folders / "new")
    largest = manifest_of(folders / "new")["largest_error"]
    assert f"new: 0.000 GB; recover gives the tuned model to within {largest:.2g}\n" in capsys.readouterr().out


def test_a_disk_that_is_too_full_is_told_before_anything_is_read(folders, monkeypatch):
    usage = shutil.disk_usage(folders)
    monkeypatch.setattr("alpaca.common.files.shutil.disk_usage", lambda path: usage._replace(free=100))
    for task, other in ((make_diff, "tuned"), (recover, "diff")):
        message = refused(folders, task, folders / "raw", folders / other, folders / "new")
        assert "free some, or choose another folder" in message
