"""benchmarks/bench_weight_diff.py on a model of a million parameters: that it measures, not what."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import ROOT, run_script

from alpaca import UserError

sys.path.append(str(ROOT / "benchmarks"))

import bench_weight_diff  # noqa: E402


def test_the_benchmark_of_weight_diff_measures_all_contenders_on_equal_results_and_cleans_up(tmp_path):
    (tmp_path / "work").mkdir()
    flags = ("--sizes", "0.001", "--work_dir", tmp_path / "work", "--output_path", tmp_path / "result.json")
    run = run_script("benchmarks/bench_weight_diff.py", *flags)
    assert run.returncode == 0, run.stderr + run.stdout
    size = json.loads((tmp_path / "result.json").read_text())["sizes"]["0.001"]
    assert list((tmp_path / "work").iterdir()) == []
    raw, written = size["bytes"]["raw"], 4 * size["parameters"]
    for task, read in (("make_diff", raw + written), ("recover", raw + written), ("verify", written)):
        runs = size[task]["runs"]
        assert {name: len(results) for name, results in runs.items()} == {
            "ours": 1,
            "original": int(task != "verify"),
            "floor": 1,
        }
        # headers of the files beside the tensors
        assert read <= runs["floor"][0]["bytes_read"] < read + 50_000, task
        assert 50e6 < runs["ours"][0]["peak_anonymous_bytes"] < runs["ours"][0]["peak_rss_bytes"] < 2e9
        assert 0 < runs["floor"][0]["seconds"] < runs["ours"][0]["seconds"]
    assert size["make_diff"]["tensors_that_differ_from_the_original"] == []
    assert size["recover"]["tensors_that_differ_from_the_original"] == []


def test_a_size_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="'13' is not there: choose from 0.001, 0.13, 1.1, 7"):
        bench_weight_diff.main(sizes="0.13,13")


def test_a_size_that_the_disk_cannot_hold_is_left_out_with_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_weight_diff.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 60 * 10**9}))
    monkeypatch.setattr(bench_weight_diff, "make_pair", None)  # is not called
    size = bench_weight_diff.bench_size("7", None, tmp_path)
    assert size["left_out"] == "needs 68.4 GB of disk, 60.0 GB are free"
    assert size["parameters"] == 6_738_423_808  # LLaMA-7B's 6,738,415,616 and a row of both embeddings


def test_equal_bits_are_told_from_equal_values(tmp_path):
    import torch
    from safetensors.torch import save_file

    for name, value in (("a", 0.0), ("b", -0.0)):
        (tmp_path / name).mkdir()
        save_file({"x": torch.tensor([value]), "y": torch.ones(2)}, tmp_path / name / "model.safetensors")
    assert bench_weight_diff.unequal(tmp_path / "a", tmp_path / "a") == []
    assert bench_weight_diff.unequal(tmp_path / "a", tmp_path / "b") == ["x"]
