"""weight_diff.py against the original's whole-model way, and against everything that a download can get wrong."""

from __future__ import annotations

import json
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_one_line_error, run_script
from made_models import (
    assert_same_bits,
    edit_json,
    fine_tuned,
    left_in,
    load_tensors,
    refused,
    rewrite,
    write_model,
)
from oracles_weights import original_diff, original_recover
from transformers import AutoModelForCausalLM, AutoTokenizer

import weight_diff
from alpaca import UserError
from alpaca.common import cli
from alpaca.weights.writer import ShardWriter
from weight_diff import compare, make_diff

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
NAN, INF = float("nan"), float("inf")


def recover(*args, **kwargs) -> None:
    weight_diff.recover(*args, test_inference=False, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# subtract: the original's values, bit for bit.


@pytest.mark.parametrize(
    ("layout", "dtype", "rows", "chunk"),
    [
        ("safetensors", F32, 1, 1 << 22),
        ("safetensors", F16, 1, 1 << 22),
        ("safetensors", BF16, 1, 1000),
        ("safetensors", F16, 0, 1000),
        ("safetensors-sharded", F16, 1, 1000),
        ("bin", F16, 1, 1 << 22),
        ("bin", F32, 1, 1000),
        ("bin", BF16, 1, 64),
        ("bin-sharded", F16, 1, 19_199),  # the embeddings have 19,200 elements, and 64 more in the new row
        ("bin-sharded", F16, 0, 19_200),
    ],
)
def test_subtract_and_recover_equal_the_whole_model_way_bit_for_bit(
    tiny_llama, tmp_path, monkeypatch, layout, dtype, rows, chunk
):
    monkeypatch.setattr("alpaca.weights.checkpoint.BLOCK", chunk)
    base = load_tensors(tiny_llama)
    raw = write_model(tmp_path / "raw", {n: t.to(dtype) for n, t in base.items()}, layout, tiny_llama)
    tuned = write_model(tmp_path / "tuned", fine_tuned(base, rows), like=tiny_llama, vocab_size=300 + rows)

    make_diff(raw, tuned, tmp_path / "diff")
    recover(raw, tmp_path / "diff", tmp_path / "recovered")
    (tmp_path / "diff" / "weight_diff.json").unlink()  # a diff as it was released, whose mean row recover computes
    recover(raw, tmp_path / "diff", tmp_path / "again", check_integrity_naively=False)

    assert_same_bits(load_tensors(tmp_path / "again"), load_tensors(tmp_path / "recovered"))
    diff = load_tensors(tmp_path / "diff")
    assert diff["model.embed_tokens.weight"].shape == diff["lm_head.weight"].shape == (300 + rows, 64)
    assert_same_bits(diff, original_diff(raw, tuned))
    assert_same_bits(load_tensors(tmp_path / "recovered"), original_recover(raw, tmp_path / "diff"))


def test_rotary_buffers_of_an_old_bin_are_neither_needed_nor_written(tiny_llama, tmp_path):
    base = load_tensors(tiny_llama)
    rotary = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    raw = write_model(tmp_path / "raw", {n: t.half() for n, t in (base | rotary).items()}, "bin-sharded", tiny_llama)
    tuned = write_model(tmp_path / "tuned", fine_tuned(base, 1), like=tiny_llama, vocab_size=301)
    make_diff(raw, tuned, tmp_path / "diff")
    assert_same_bits(load_tensors(tmp_path / "diff"), original_diff(raw, tuned))

    # and a diff of 2023 has them, the raw of today has not
    old_diff = write_model(
        tmp_path / "old", load_tensors(tmp_path / "diff") | rotary, "bin-sharded", tiny_llama, vocab_size=301
    )
    recover(tiny_llama, old_diff, tmp_path / "recovered", max_shard_size="100KB")
    recovered = load_tensors(tmp_path / "recovered")
    assert sorted(recovered) == sorted(base)
    assert_same_bits(recovered, original_recover(tiny_llama, old_diff))


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_tied_embedding_is_subtracted_once_and_written_once(tiny_llama, tiny_opt, tmp_path, family, layout):
    like = {"opt": tiny_opt, "llama": tiny_llama}[family]
    base = load_tensors(like)
    base.pop("lm_head.weight", None)
    embeddings = {"opt": "model.decoder.embed_tokens.weight", "llama": "model.embed_tokens.weight"}[family]
    raw_tensors = {name: tensor.half() for name, tensor in base.items()}
    if layout == "bin":  # old checkpoints hold the tied matrix under both names
        raw_tensors["lm_head.weight"] = raw_tensors[embeddings]
    # OPT's config.json, as published, does not say that it ties: it is the default of that family
    ties = {"opt": "drop" if layout == "bin" else True, "llama": True}[family]
    raw = write_model(tmp_path / "raw", raw_tensors, layout, like, tie_word_embeddings=ties)
    tuned = write_model(tmp_path / "tuned", fine_tuned(base, 1), like=like, vocab_size=301, tie_word_embeddings=True)

    make_diff(raw, tuned, tmp_path / "diff")
    recover(raw, tmp_path / "diff", tmp_path / "recovered")

    diff, recovered = load_tensors(tmp_path / "diff"), load_tensors(tmp_path / "recovered")
    oracle = original_diff(raw, tuned)
    assert torch.equal(oracle.pop("lm_head.weight"), diff[embeddings])
    assert_same_bits(diff, oracle)
    oracle = original_recover(raw, tmp_path / "diff")
    assert torch.equal(oracle.pop("lm_head.weight"), recovered[embeddings])
    assert_same_bits(recovered, oracle)


def test_subtract_recovers_to_within_a_rounding_of_the_change_not_bit_for_bit(tiny_llama, tmp_path):
    """Of t, only t' = fl(r + fl(t - r)) comes back.

    t - r is exact when r/2 <= t <= 2r, and then r + (t - r) is t. Otherwise |t| <= 2|t - r|, so the two roundings are
    off by at most 2^-24 of |t - r| and of |t'|: 3 · 2^-24 of the change in all. A change of at most 0.01, which is
    large for fine-tuning, costs at most 2e-9.
    """
    base = load_tensors(tiny_llama)
    tuned_tensors = fine_tuned(base)
    tuned = write_model(tmp_path / "tuned", tuned_tensors, like=tiny_llama)
    make_diff(tiny_llama, tuned, tmp_path / "diff")
    recover(tiny_llama, tmp_path / "diff", tmp_path / "recovered")
    inexact = 0
    for name, tensor in load_tensors(tmp_path / "recovered").items():
        wanted = tuned_tensors[name].double()
        change = (wanted - base[name].double()).abs()
        error = (tensor.double() - wanted).abs()
        assert change.max() < 0.01
        assert (error <= 3.000001 * 2**-24 * change).all()
        assert error.max() <= 2e-9
        inexact += (error > 0).sum().item()
    assert inexact > 1000  # of 113,088: so there is a need for --method exact


# ---------------------------------------------------------------------------------------------------------------------
# exact: every bit.


def every_pattern(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """(256, 256): all 65,536 patterns of a 16-bit float, or as many random ones of float32 and the special ones."""
    generator = torch.Generator().manual_seed(seed)
    if dtype != F32:
        return (torch.randperm(65536, generator=generator) - 32768).to(torch.int16).view(dtype).view(256, 256)
    patterns = torch.randint(-(2**31), 2**31, (65536,), generator=generator).to(torch.int32)
    patterns[:9] = torch.tensor(
        [0x7FC01234, 0x7F800001, -0x400000, -0x7FFFFF, 0x7F800000, -0x800000, -(2**31), 1, 0], dtype=torch.int32
    )  # NaNs with payloads, one of them signalling; both infinities; -0.0; a subnormal; 0.0
    return patterns[torch.randperm(65536, generator=generator)].view(F32).view(256, 256)


@pytest.mark.parametrize("raw_dtype", [F32, F16])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_exact_recovers_every_bit_pattern_nan_payloads_and_minus_zero_included(tmp_path, dtype, raw_dtype):
    tuned = {
        "embed": torch.cat([every_pattern(dtype, 1), torch.full((3, 256), -0.0, dtype=dtype)]),
        "scalar": torch.tensor(NAN, dtype=dtype),
        "weight": every_pattern(dtype, 2),
    }
    raw = {
        "embed": every_pattern(raw_dtype, 3),
        "scalar": torch.tensor(INF, dtype=raw_dtype),
        "weight": every_pattern(raw_dtype, 4),
    }
    write_model(tmp_path / "raw", raw, "bin", vocab_size=256)
    write_model(tmp_path / "tuned", tuned, vocab_size=259)
    make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "diff", method="exact")
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "recovered")
    assert_same_bits(load_tensors(tmp_path / "recovered"), tuned)
    integers = {F32: torch.int32, BF16: torch.int16, F16: torch.int16}[dtype]
    assert {tensor.dtype for tensor in load_tensors(tmp_path / "diff").values()} == {integers}  # no larger than tuned
    compare(tmp_path / "tuned", tmp_path / "recovered")


def test_exact_keeps_the_type_of_each_tensor(tmp_path):
    """Three halves before a float: in the file the float then starts at byte 6."""
    tuned = {"a": torch.tensor([1, 2, 3], dtype=F16), "b": torch.tensor([0.1]), "c": torch.tensor([5.0], dtype=BF16)}
    write_model(tmp_path / "raw", {name: torch.zeros(tensor.shape) for name, tensor in tuned.items()})
    write_model(tmp_path / "tuned", tuned)
    make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "diff", method="exact")
    tensors = json.loads((tmp_path / "diff" / "weight_diff.json").read_text())["tensors"]
    assert {name: entry["dtype"]["tuned"] for name, entry in tensors.items()} == {"a": "F16", "b": "F32", "c": "BF16"}
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "recovered")
    assert_same_bits(load_tensors(tmp_path / "recovered"), tuned)


# ---------------------------------------------------------------------------------------------------------------------
# The folders that come out.


@pytest.mark.parametrize(("method", "dtype"), [("subtract", "float32"), ("exact", "bfloat16")])
def test_a_recovered_folder_is_a_model_with_the_tuned_models_tokenizer(tiny_llama, tmp_path, method, dtype):
    """The configs of two transformers versions are met: one says torch_dtype, the other dtype."""
    tuned_tensors = {name: tensor.bfloat16() for name, tensor in fine_tuned(load_tensors(tiny_llama), 1).items()}
    key = "torch_dtype" if method == "subtract" else "dtype"
    other = {"torch_dtype": "dtype", "dtype": "torch_dtype"}[key]
    names = {"_name_or_path": "/home/me/secret", other: "drop", key: "bfloat16", "vocab_size": 301}
    tuned = write_model(tmp_path / "tuned", tuned_tensors, like=tiny_llama, **names)
    tokenizer_files = {
        "tokenizer.model": b"\x00\xffbytes",
        "added_tokens.json": b'{"[PAD]": 300}\r\n',
        "special_tokens_map.json": '{ "pad_token":"[PAD]", "é": 1}'.encode(),
    }
    for name, data in tokenizer_files.items():
        (tuned / name).write_bytes(data)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        tokenizer_files[name] = (tuned / name).read_bytes()
    (tuned / "training_args.bin").write_bytes(b"a pickle")

    make_diff(tiny_llama, tuned, tmp_path / "diff", method)
    recover(tiny_llama, tmp_path / "diff", tmp_path / "recovered")

    for folder in (tmp_path / "diff", tmp_path / "recovered"):
        assert {name: (folder / name).read_bytes() for name in tokenizer_files} == tokenizer_files
        assert not (folder / "training_args.bin").exists()
        assert "secret" not in (folder / "config.json").read_text()
    recovered = tmp_path / "recovered"
    assert not (recovered / "weight_diff.json").exists()
    config = json.loads((recovered / "config.json").read_text())
    assert (config["vocab_size"], config["dtype"], config.get("torch_dtype")) == (301, dtype, None)
    mask = os.umask(0)
    os.umask(mask)
    assert {f.stat().st_mode & 0o777 for f in recovered.glob("*.safetensors")} == {0o666 & ~mask}  # others may read it

    for name in ("tokenizer.model", "added_tokens.json", "special_tokens_map.json"):
        (recovered / name).unlink()  # they are not real
    model, report = AutoModelForCausalLM.from_pretrained(recovered, dtype="auto", output_loading_info=True)
    assert model.dtype == getattr(torch, dtype)
    assert not any(report.values())
    assert_same_bits(model.state_dict(), load_tensors(recovered))
    assert (
        AutoTokenizer.from_pretrained(recovered)("a b").input_ids
        == AutoTokenizer.from_pretrained(tiny_llama)("a b").input_ids
    )


def test_recover_without_path_tuned_checks_and_writes_nothing(folders, capsys):
    before = left_in(folders)
    weight_diff.recover(folders / "raw", folders / "diff")
    said = "3 tensors recovered (neither written nor tested: no --path_tuned), each with the manifest's hash\n"
    assert said in capsys.readouterr().out
    assert left_in(folders) == before


def test_a_model_that_is_too_large_for_the_memory_is_recovered_and_not_loaded(folders, monkeypatch, capsys):
    """The tensors have 4 · (2 · 5 · 8 + 8) bytes."""
    monkeypatch.setattr("alpaca.common.memory.host_free", lambda: 351)
    weight_diff.recover(folders / "raw", folders / "diff", folders / "recovered")
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.startswith(f"3 tensors recovered in {folders / 'recovered'}")
    assert second.startswith("not tested: loading it whole needs 0.0 MiB of memory, 0.0 MiB are free; ")
    assert second.endswith(f"python chat.py --model_path {folders / 'recovered'}")
    assert (folders / "recovered" / "config.json").exists()


@pytest.mark.parametrize(
    "fault",
    [UserError("no such family"), torch.OutOfMemoryError("CUDA out of memory.\nTried"), MemoryError(), KeyError("x")],
)
def test_a_model_that_does_not_load_is_said_to_be_recovered_all_the_same(folders, monkeypatch, capsys, fault):
    def load(path, device):
        raise fault

    monkeypatch.setattr("alpaca.common.memory.host_free", lambda: 352)
    monkeypatch.setattr("alpaca.inference.load.load", load)
    with pytest.raises(UserError, match=r"recovered is recovered and complete, but did not answer on cpu: [^\n]+$"):
        weight_diff.recover(folders / "raw", folders / "diff", folders / "recovered")
    assert "3 tensors recovered in" in capsys.readouterr().out
    weight_diff.verify(folders / "recovered", folders / "diff")


def test_every_documented_command_runs(tiny_llama, tmp_path, monkeypatch, capsys):
    tuned = fine_tuned(load_tensors(tiny_llama), 1)
    paths = {"RAW": tiny_llama, "DIFF": tmp_path / "diff", "TUNED": tmp_path / "recovered"}
    trained = write_model(tmp_path / "tuned", tuned, like=tiny_llama, vocab_size=301)
    commands = [line.split() for line in weight_diff.__doc__.splitlines() if line.strip().startswith("python ")]
    assert [command[2] for command in commands] == ["make_diff", "recover", "verify", "compare"]
    paths["RECOVERED"] = paths["TUNED"]
    printed = []
    monkeypatch.setattr(cli, "end_on_signals", lambda: None)  # or this process would obey them so
    for command, places in zip(commands, [paths | {"TUNED": trained}, paths, paths, paths], strict=True):
        monkeypatch.setattr("sys.argv", [str(places.get(word, word)) for word in command[1:]])
        runpy.run_path(weight_diff.__file__, run_name="__main__")
        printed.append(capsys.readouterr().out)
    said = f"21 tensors recovered in {tmp_path / 'recovered'}, each with the manifest's hash\n"
    said += f"{tmp_path / 'recovered'} is complete, and now answers one instruction, which takes minutes for a large "
    said += "model; Ctrl-C is safe (--test_inference False skips this)\n"
    assert printed[1].startswith(said + "List three technologies that make life easier.\n")
    assert "is the recovered model" in printed[2]
    assert printed[3] == "all 21 tensors are equal, bit for bit\n"
    assert_same_bits(load_tensors(tmp_path / "diff"), original_diff(tiny_llama, trained))
    assert_same_bits(load_tensors(tmp_path / "recovered"), original_recover(tiny_llama, tmp_path / "diff"))


# ---------------------------------------------------------------------------------------------------------------------
# compare.

NORMAL = ", normal after subtract: --dtype of recover gives the type, --method exact the bits"


def test_compare_says_that_all_are_equal_whatever_the_layout(tmp_path, capsys):
    tensors = {"a": torch.tensor([1.0, NAN, -0.0]), "b": torch.ones(2, dtype=F16), "c": torch.ones(0)}
    write_model(tmp_path / "a", tensors)
    write_model(tmp_path / "b", tensors, "bin-sharded")
    compare(tmp_path / "a", tmp_path / "b")
    assert capsys.readouterr().out == "all 3 tensors are equal, bit for bit\n"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"b": torch.tensor([1.0, 2.0 + 2**-22])},
            "1 of 3 tensors differ: 1 in values, by up to 2.4e-07 (b)",
        ),
        ({"b": torch.tensor([1.0, 2.5])}, "1 of 3 tensors differ: 1 in values, by up to 0.5 (b)"),
        ({"a": torch.tensor([2e-9])}, "1 of 3 tensors differ: 1 in values, by up to 2e-09 (a)" + NORMAL),
        ({"a": torch.tensor([-0.0])}, "1 of 3 tensors differ: 1 in values, by up to 0 (a)" + NORMAL),
        ({"b": torch.tensor([1.0, NAN])}, "1 of 3 tensors differ: 1 in values, by up to nan (b)"),
        (
            {"c": torch.ones(0, dtype=F16)},
            "1 of 3 tensors differ: 1 in type or shape (c: F32 [0] and F16 [0])" + NORMAL,
        ),
        (
            {"b": torch.tensor([1.0, 2.0], dtype=BF16)},
            "1 of 3 tensors differ: 1 in type or shape (b: F32 [2] and BF16 [2])" + NORMAL,
        ),
        (
            {"b": torch.tensor([1.0]), "a": torch.tensor([9.0])},
            "2 of 3 tensors differ: 1 in type or shape (b: F32 [2] and F32 [1]), 1 in values, by up to 9 (a)",
        ),
        (
            {"b": torch.tensor([1.0, 2.5], dtype=F16), "a": torch.tensor([0.25])},
            "2 of 3 tensors differ: 1 in type or shape (b: F32 [2] and F16 [2]), 2 in values, by up to 0.5 (a, b)",
        ),
        (
            {"d": torch.ones(1)},
            "--path_a lacks tensors that --path_b has: d; another base model? Their config.json do not say",
        ),
    ],
)
def test_compare_names_what_differs(tmp_path, other, message):
    tensors = {"a": torch.tensor([0.0]), "b": torch.tensor([1.0, 2.0]), "c": torch.ones(0)}
    write_model(tmp_path / "a", tensors)
    write_model(tmp_path / "b", tensors | other)
    with pytest.raises(UserError) as error:
        compare(tmp_path / "a", tmp_path / "b")
    assert str(error.value) == message


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong is said in one line, and nothing half-written stays.


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def in_place_of(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file")


def reshard(folder: Path, layout: str) -> None:
    tensors, manifest = load_tensors(folder), (folder / "weight_diff.json").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    shutil.rmtree(folder)
    write_model(folder, tensors, layout, **config)
    (folder / "weight_diff.json").write_bytes(manifest)


def broken_shard(layout: str, breakage):
    def make(folder: Path) -> None:
        reshard(folder, layout)
        suffix = layout.removesuffix("-sharded")
        stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
        breakage(folder / f"{stem}-00002-of-00002.{suffix}")

    return make


def index_of(**weight_map):
    def make(folder: Path) -> None:
        reshard(folder, "bin-sharded")
        index = folder / "pytorch_model.bin.index.json"
        names = json.loads(index.read_text())["weight_map"]
        edit_json(index, weight_map=names | {name.replace("__", "."): file for name, file in weight_map.items()})

    return make


DAMAGED_DIFFS = {
    "a tensor missing": (lambda d: rewrite(d, model__norm__weight=None), ["lacks", "model.norm.weight", "base model"]),
    "a tensor too many": (
        lambda d: rewrite(d, extra=torch.ones(1)),
        ["--path_raw lacks tensors that --path_diff has", "extra"],
    ),
    "another shape": (lambda d: rewrite(d, model__norm__weight=torch.ones(9)), ["model.norm.weight", "[8]", "[9]"]),
    "another rank": (lambda d: rewrite(d, model__norm__weight=torch.ones(8, 1)), ["model.norm.weight", "[8, 1]"]),
    "a scalar": (lambda d: rewrite(d, model__norm__weight=torch.tensor(1.0)), ["model.norm.weight", "[8]", "[]"]),
    "wider embeddings": (lambda d: rewrite(d, lm_head__weight=torch.ones(5, 9)), ["lm_head.weight", "[4, 8]"]),
    "rows without the config's word": (lambda d: edit_json(d / "config.json", vocab_size=6), ["[4, 8]", "[5, 8]"]),
    "fewer rows than raw": (lambda d: rewrite(d, lm_head__weight=torch.ones(3, 8)), ["lm_head.weight", "[3, 8]"]),
    "fewer rows, in the config too": (
        lambda d: (rewrite(d, lm_head__weight=torch.ones(3, 8)), edit_json(d / "config.json", vocab_size=3)),
        ["lm_head.weight", "[4, 8]", "[3, 8]"],
    ),
    "int8": (
        lambda d: rewrite(d, model__norm__weight=torch.ones(8, dtype=torch.int8)),
        ["model.norm.weight", "int8", "quantized"],
    ),
    "cut off": (lambda d: cut(d / "model.safetensors"), ["model.safetensors", "truncated"]),
    "second shard cut off": (broken_shard("safetensors-sharded", cut), ["00002-of-00002.safetensors", "truncated"]),
    "second bin shard cut off": (broken_shard("bin-sharded", cut), ["00002-of-00002.bin", "truncated"]),
    "shard missing": (broken_shard("bin-sharded", os.unlink), ["00002-of-00002.bin", "missing", "download"]),
    "shard empty": (
        broken_shard("bin-sharded", lambda f: f.write_bytes(b"")),
        ["00002-of-00002.bin", "cannot be read"],
    ),
    "Git LFS pointer": (
        lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
        ["model.safetensors", "Git LFS"],
    ),
    "index out of its folder": (index_of(model__norm__weight="../x.bin"), ["points outside its folder", "../x.bin"]),
    "index to nowhere": (index_of(model__norm__weight="x.bin"), ["x.bin", "missing", "index names it"]),
    "index to the wrong shard": (
        index_of(lm_head__weight="pytorch_model-00002-of-00002.bin"),
        ["00002-of-00002.bin", "lacks the tensor lm_head.weight"],
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["--path_diff", "has no weights"]),
    "no config": (lambda d: (d / "config.json").unlink(), ["--path_diff", "no config.json"]),
    "malformed config": (lambda d: (d / "config.json").write_text("{"), ["config.json", "malformed"]),
    "config of another kind": (lambda d: (d / "config.json").write_text("[]"), ["config.json", "a JSON list"]),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), ["--path_diff", "no tokenizer", "copy"]),
    "a file": (in_place_of, ["--path_diff", "is a file, not a folder"]),
    "nothing": (shutil.rmtree, ["--path_diff", "does not exist"]),
    "unknown method": (lambda d: edit_json(d / "weight_diff.json", method="xor"), ["weight_diff.json", "'xor'"]),
    "malformed manifest": (lambda d: (d / "weight_diff.json").write_text("x"), ["weight_diff.json", "malformed"]),
    "exact without types": (lambda d: edit_json(d / "weight_diff.json", method="exact"), ["does not fit", "download"]),
    "exact with the type of another": (
        lambda d: edit_json(d / "weight_diff.json", method="exact", dtypes={"lm_head.weight": "BF16"}),
        ["does not fit the weights", "lm_head.weight"],
    ),
}


@pytest.mark.parametrize("hashes", [True, False])
@pytest.mark.parametrize("damage", DAMAGED_DIFFS)
def test_a_damaged_diff_is_refused_in_one_line_and_nothing_is_written(folders, damage, hashes):
    """Without hashes, as earlier versions and others made diffs, the cause may as well be another base model."""
    breakage, words = DAMAGED_DIFFS[damage]
    if hashes:  # then the name is said, and that the diff is to blame
        words = [word for word in words if ".weight" in word or "file" in word]
    else:
        (folders / "diff" / "weight_diff.json").write_text('{"format": 1, "method": "subtract"}')
    breakage(folders / "diff")
    message = refused(folders, recover, folders / "raw", folders / "diff", folders / "recovered")
    assert [word for word in words if word not in message] == [], message


DAMAGED_PAIRS = {
    "raw is a file": ("raw", in_place_of, ["--path_raw", "is a file"]),
    "raw is missing": ("raw", shutil.rmtree, ["--path_raw", "does not exist"]),
    "raw lacks a tensor": ("raw", lambda d: rewrite(d, lm_head__weight=None), ["--path_tuned", "lacks", "lm_head"]),
    "raw is quantized": (
        "raw",
        lambda d: rewrite(d, model__norm__weight=torch.ones(8, dtype=torch.int8)),
        ["model.norm.weight", "int8", "quantized"],
    ),
    "raw is a scalar where tuned is a matrix": (
        "raw",
        lambda d: rewrite(d, lm_head__weight=torch.tensor(1.0)),
        ["lm_head.weight", "[]", "[5, 8]"],
    ),
    "tuned is quantized": (
        "tuned",
        lambda d: rewrite(d, model__norm__weight=torch.ones(8, dtype=torch.int8)),
        ["model.norm.weight", "int8"],
    ),
    "tuned has no tokenizer": ("tuned", lambda d: (d / "tokenizer.json").unlink(), ["--path_tuned", "no tokenizer"]),
    "tuned is a diff": (
        "tuned",
        lambda d: (d / "weight_diff.json").write_text("{}"),
        ["--path_tuned", "is a weight diff: recover it first"],
    ),
    "raw is a diff": ("raw", lambda d: (d / "weight_diff.json").write_text("{}"), ["--path_raw", "recover it first"]),
}


@pytest.mark.parametrize("method", ["subtract", "exact"])
@pytest.mark.parametrize("damage", DAMAGED_PAIRS)
def test_a_damaged_pair_is_refused_in_one_line_and_nothing_is_written(folders, damage, method):
    which, breakage, words = DAMAGED_PAIRS[damage]
    breakage(folders / which)
    message = refused(folders, make_diff, folders / "raw", folders / "tuned", folders / "new", method)
    assert [word for word in words if word not in message] == [], message


def test_a_name_on_the_hub_is_told_how_to_be_downloaded(folders, monkeypatch):
    monkeypatch.chdir(folders)
    for task, flag in ((make_diff, "--path_raw"), (recover, "--path_raw"), (weight_diff.verify, "--path")):
        rest = ["diff"] if task is weight_diff.verify else ["diff", "new"]
        message = refused(folders, task, "huggyllama/llama-7b", *rest)
        assert message == (
            f"{flag} huggyllama/llama-7b does not exist: choose the folder of a model; to download one from "
            "the hub: hf download huggyllama/llama-7b --local-dir llama-7b"
        )
    message = refused(folders, recover, "raw", "tatsu-lab/alpaca-7b-wdiff", "new")
    assert "hf download tatsu-lab/alpaca-7b-wdiff --local-dir alpaca-7b-wdiff" in message
    assert "hf download" not in refused(folders, recover, "./raw/none", "diff", "new")
    assert "hf download" not in refused(folders, recover, "raw/none", "diff", "new")  # the folder raw is there


def test_a_base_in_the_format_from_before_torch_1_6_is_read(folders):
    torch.save(
        load_tensors(folders / "raw"), folders / "raw" / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    (folders / "raw" / "model.safetensors").unlink()
    make_diff(folders / "raw", folders / "tuned", folders / "new")
    recover(folders / "raw", folders / "new", folders / "recovered")
    assert_same_bits(load_tensors(folders / "new"), load_tensors(folders / "diff"))


def test_raw_needs_no_tokenizer(folders):
    (folders / "raw" / "tokenizer.json").unlink()
    make_diff(folders / "raw", folders / "tuned", folders / "new")
    recover(folders / "raw", folders / "new", folders / "recovered")


def test_make_diff_takes_the_originals_device(folders, monkeypatch):
    argv = ["--path_raw", folders / "raw", "--path_tuned", folders / "tuned", "--path_diff", folders / "new"]
    monkeypatch.setattr(cli, "end_on_signals", lambda: None)
    monkeypatch.setattr("sys.argv", ["weight_diff.py", "make_diff", *map(str, argv), "--device", "cuda"])
    runpy.run_path(weight_diff.__file__, run_name="__main__")
    assert_same_bits(load_tensors(folders / "new"), load_tensors(folders / "diff"))


def test_an_unknown_method_is_refused(folders):
    message = refused(folders, make_diff, folders / "raw", folders / "tuned", folders / "new", method="xor")
    assert message == "--method must be subtract or exact, not 'xor'"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_target_that_is_there_is_refused_and_left_as_it_is(folders, kind):
    target = folders / "target"
    kept = target
    if kind == "folder":
        target.mkdir()
        kept = target / "weights"
    kept.write_text("precious")
    assert "target already exists" in refused(folders, make_diff, folders / "raw", folders / "tuned", target)
    assert "target already exists" in refused(folders, recover, folders / "raw", folders / "diff", target)
    assert kept.read_text() == "precious"


def test_an_empty_target_folder_is_filled(folders):
    (folders / "target").mkdir()
    make_diff(folders / "raw", folders / "tuned", folders / "target")
    assert_same_bits(load_tensors(folders / "target"), load_tensors(folders / "diff"))


@contextmanager
def largest_file(size: int):
    """A disk that is full after so many bytes, as far as this process can tell."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("task", ["make_diff", "recover"])
def test_a_write_that_fails_in_the_middle_leaves_nothing(folders, task):
    before = left_in(folders)
    with pytest.raises(OSError), largest_file((folders / "diff" / "model.safetensors").stat().st_size - 4):
        if task == "make_diff":
            make_diff(folders / "raw", folders / "tuned", folders / "new")
        else:
            recover(folders / "raw", folders / "diff", folders / "new")
    assert left_in(folders) == before


@pytest.mark.parametrize("task", ["make_diff", "recover"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN], ids=["obeyed", "ignored"])
def test_a_signal_ends_it_as_ctrl_c_does_unless_it_is_ignored(folders, monkeypatch, task, number, before):
    """nohup has SIGHUP ignored, and it stays ignored. The signal comes when something has been written."""
    write, there = ShardWriter.write, left_in(folders)

    def signalled(writer, *args) -> None:
        write(writer, *args)
        assert ".new.unfinished" in left_in(folders)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(ShardWriter, "write", signalled)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(number, before)
            cli.end_on_signals()
            if task == "make_diff":
                make_diff(folders / "raw", folders / "tuned", folders / "new")
            else:
                recover(folders / "raw", folders / "diff", folders / "new")
            code = 0
        except KeyboardInterrupt:
            code = 128 + cli.ENDED_BY[0]
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if before == signal.SIG_IGN:
        assert (code, left_in(folders)) == (0, sorted([*there, "new"]))
    else:
        assert (code, left_in(folders)) == (128 + number, there)


def test_the_script_ends_at_a_signal_without_a_traceback(folders):
    code = "import os, runpy, signal, sys; from alpaca.weights.writer import ShardWriter; sys.argv.pop(0); "
    code += "ShardWriter.write = lambda *_: os.kill(os.getpid(), signal.SIGTERM); "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    flags = ["recover", f"--path_raw={folders / 'raw'}", f"--path_diff={folders / 'diff'}"]
    before, command = left_in(folders), [sys.executable, "-c", code, weight_diff.__file__, *flags]
    run = subprocess.run([*command, f"--path_tuned={folders / 'new'}"], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, left_in(folders)) == (128 + signal.SIGTERM, before), run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("zipped", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "bare pickle"])
def test_a_pickle_that_runs_code_is_refused_before_it_runs(folders, zipped):
    marker = folders / "marker"

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(marker),))

    for which in ("diff", "tuned"):
        (folders / which / "model.safetensors").unlink()
        torch.save({"lm_head.weight": Evil()}, folders / which / "pytorch_model.bin", **zipped)
    before = left_in(folders)
    flags = [f"--path_{name}={folders / name}" for name in ("raw", "diff")] + [f"--path_tuned={folders / 'new'}"]
    if zipped:
        assert "asks to run code" in refused(folders, recover, folders / "raw", folders / "diff", folders / "new")
    else:
        result = run_script("weight_diff.py", "recover", *flags)
        assert_one_line_error(result, "diff/pytorch_model.bin", "asks to run code")
    assert "asks to run code" in refused(folders, make_diff, folders / "raw", folders / "tuned", folders / "new")
    assert left_in(folders) == before
    torch.load(folders / "diff" / "pytorch_model.bin", weights_only=False)
    assert marker.exists()  # so the pickle does what this test is about


# ---------------------------------------------------------------------------------------------------------------------
# The sum of the released Alpaca-7B.

ROTARY = 238.7185323  # what 32 layers' rotary buffers, 10000^(-2i/128) for i < 64, added to it


@pytest.mark.parametrize("off", [0.0, 0.0499, -0.0499])
def test_the_released_sum_passes_with_the_rotary_share_added(off, capsys):
    sums = [20000.0, 30637.1836 - ROTARY, off]
    weight_diff._check_released_sum(sums)
    printed = capsys.readouterr().out
    assert f"+ rotary {ROTARY:.4f} = {50637.1836 + off:.4f}; released: 50637.1836\n" in printed


@pytest.mark.parametrize("off", [0.0, 0.06, -0.06])
def test_a_diff_without_a_manifest_passes_with_the_released_sum_alone(folders, monkeypatch, capsys, off):
    """A tiny pair in the place of LLaMA-7B and its released diff, the whole way; the sum is that of another adder."""
    recover(folders / "raw", folders / "diff", folders / "recovered")
    tensors = load_tensors(folders / "recovered").values()
    total = sum(value for tensor in tensors for value in tensor.double().flatten().tolist())
    assert (
        abs(sum(load_tensors(folders / "diff")[name].double().sum() for name in load_tensors(folders / "diff"))) > 0.1
    )
    monkeypatch.setattr(weight_diff, "RELEASED_SUM", total + ROTARY + off)
    monkeypatch.setattr(weight_diff, "_is_alpaca_7b", lambda config: True)
    (folders / "diff" / "weight_diff.json").unlink()
    if off:
        message = refused(folders, recover, folders / "raw", folders / "diff", folders / "new")
        assert "integrity check failed" in message
        assert "or not Alpaca's released diff (--check_integrity_naively False skips this)" in message
        return
    recover(folders / "raw", folders / "diff", folders / "new")
    assert_same_bits(load_tensors(folders / "new"), load_tensors(folders / "recovered"))
    assert f"+ rotary {ROTARY:.4f} = {total + ROTARY:.4f}; released: " in capsys.readouterr().out
    raw = load_tensors(folders / "raw")["lm_head.weight"]
    raw[2, 3] += 0.06  # another base model
    rewrite(folders / "raw", lm_head__weight=raw)
    shutil.rmtree(folders / "new")
    assert "integrity check failed" in refused(folders, recover, folders / "raw", folders / "diff", folders / "new")


@pytest.mark.parametrize(
    "sums", [[50637.1836 - ROTARY, 0.06], [50637.1836 - ROTARY, -0.06], [50637.1836], [50398.4651, NAN], [INF], []]
)
def test_any_other_sum_fails_nan_included(sums):
    with pytest.raises(UserError, match="integrity check failed: .*--check_integrity_naively False"):
        weight_diff._check_released_sum(sums)


def test_the_rotary_share_is_that_of_32_layers_with_64_frequencies(capsys):
    """Measured to within the 1e-6 that matters by the width of the window: rotary + 50398.4150677 is 0.05 short."""
    edge = 50637.1836 - 0.05 - ROTARY
    weight_diff._check_released_sum([edge, 1e-6])
    with pytest.raises(UserError):
        weight_diff._check_released_sum([edge, -1e-6])


def test_only_a_llama_7b_with_one_row_more_is_the_released_model():
    config = {"model_type": "llama", "vocab_size": 32001, "hidden_size": 4096, "num_hidden_layers": 32, "x": 1}
    assert weight_diff._is_alpaca_7b(config)
    for other in ({"model_type": "opt"}, {"vocab_size": 32000}, {"hidden_size": 5120}, {"num_hidden_layers": 40}):
        assert not weight_diff._is_alpaca_7b(config | other)
    assert not weight_diff._is_alpaca_7b({})


@pytest.mark.parametrize("path_tuned", [None, "recovered"])
def test_a_released_diff_whose_sum_is_wrong_leaves_nothing_unless_the_check_is_off(folders, path_tuned):
    """The config of Alpaca-7B and no manifest make a diff the released one. The failure comes after all is written."""
    released = {"model_type": "llama", "vocab_size": 32001, "hidden_size": 4096, "num_hidden_layers": 32}
    (folders / "diff" / "weight_diff.json").unlink()
    edit_json(folders / "diff" / "config.json", **released)
    edit_json(folders / "raw" / "config.json", vocab_size=32000)
    for folder, rows in (("raw", 4), ("diff", 4)):
        small = torch.full((rows, 8), 1.0 if folder == "raw" else 0.01)
        rewrite(folders / folder, lm_head__weight=small, model__embed_tokens__weight=small.clone())
    target = path_tuned and folders / path_tuned
    message = refused(folders, recover, folders / "raw", folders / "diff", target)
    assert "integrity check failed" in message
    recover(folders / "raw", folders / "diff", target, check_integrity_naively=False)
