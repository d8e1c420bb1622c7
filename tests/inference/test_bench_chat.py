"""benchmarks/bench_chat.py on a tiny model: that its ways are given the same prompts and count alike, not how fast."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from conftest import ROOT, make_records
from made_models import chain

from alpaca.inference.generate import Settings
from alpaca.inference.load import load

sys.path.append(str(ROOT / "benchmarks"))

import bench_chat  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    """A model this small is faster so, and many times faster on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_all_ways_answer_the_same_prompts_and_each_ratio_has_its_two_rates(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_chat.embedded_model, "prepare", lambda path: None)
    (tmp_path / "data.json").write_text(json.dumps(make_records(8)))
    given = {"data_path": str(tmp_path / "data.json"), "output_path": str(tmp_path / "chat.json"), "device": "cpu"}
    bench_chat.main(str(tiny_llama), prompts=5, rows=2, rounds=2, max_new_tokens=2, previous_path=str(ROOT), **given)
    result = json.loads((tmp_path / "chat.json").read_text())
    assert len(result["tokens_per_s"]) == 3 * 2 * 3  # batchings × greedy, sampled × ways
    assert all(len(rates) == 2 for rates in result["tokens_per_s"].values())
    whole = {"by length": 5, "in file order": 5, "one by one": 4}
    assert result["answers_equal_to_generate"] == whole
    assert result["answers_equal_to_previous"] == {"greedy": whole, "sampled": whole}
    assert len(result["against_generate"]) == len(result["against_previous"]) == 6
    assert len(result["batches_by_length_against_file_order"]) == 4
    medians = {name: sum(rates) / 2 for name, rates in result["tokens_per_s"].items()}
    for name, ratio in result["against_generate"].items():
        expected = medians[f"{name}, answer_batch()"] / medians[f"{name}, generate()"]
        assert ratio["median"] == pytest.approx(expected, abs=6e-3)
    assert "by length, greedy, answer_batch()" in capsys.readouterr().out


@pytest.mark.parametrize("longest", [1, 3, 30])
def test_both_ways_count_the_tokens_before_eos(tmp_path, longest):
    """A made model that writes four tokens and EOS."""
    model, tokenizer = load(chain(tmp_path / "model", "a", "b", "c", "d"), "cpu")
    for temperature in (0, 1):
        args = (model, tokenizer, [[1, 0]], Settings(longest, temperature, 1e-9, seed=0))
        assert (
            bench_chat.by_generate(*args) == bench_chat.by_answer_batch(*args) == [(min(4, longest), "abcd"[:longest])]
        )
