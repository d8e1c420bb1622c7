"""benchmarks/bench_weight_diff.py on a model of a million parameters: that it measures, not what."""

from __future__ import annotations

import json

from conftest import ROOT, assert_one_line_error, run_script

BENCH = ROOT / "benchmarks" / "bench_weight_diff.py"


def test_the_benchmark_of_weight_diff_measures_all_contenders_on_equal_results_and_cleans_up(tmp_path):
    (tmp_path / "work").mkdir()
    flags = ("--sizes", "0.001", "--work_dir", tmp_path / "work", "--output_path", tmp_path / "result.json")
    run = run_script(BENCH, *flags)
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
    assert_one_line_error(run_script(BENCH, "--sizes", "0.13,13"), "'13' is not there", "0.13, 1.1, 7")
