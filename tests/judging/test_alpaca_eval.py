"""The bridge to alpaca_eval: the real package reads what judge.py answer has written, offline."""

from __future__ import annotations

import json

from conftest import call

import judge
from alpaca.data.instruction_sets import read_set

CONFIG = """\
brief:
  prompt_template: {prompt}
  fn_completions: test_completions
  completions_kwargs: {{value: "Output (a)"}}
  completion_parser_kwargs:
    outputs_to_match: {{1: "Output .a.", 2: "Output .b."}}
  batch_size: 1
"""


def test_alpaca_eval_compares_two_models_answers(teacher, tmp_path, monkeypatch):
    """Its own annotator, with a judge that says the same each time; answers that are equal are a draw to it."""
    records = [{"instruction": f"Say {i}.", "input": "twice" if i % 2 else "", "output": f"{i}"} for i in range(6)]
    (tmp_path / "set.json").write_text(json.dumps(records))
    server = teacher(lambda number, body: f"{body['model']} answers" if "Say 3." not in str(body) else "three")
    for model in ("ours", "theirs"):
        path = str(tmp_path / f"{model}.json")
        call(judge.answer, str(tmp_path / "set.json"), path, model_name=model, base_url=server.base_url)

    (tmp_path / "prompt.txt").write_text("{instruction}|{output_1}|{output_2}")
    (tmp_path / "configs.yaml").write_text(CONFIG.format(prompt=tmp_path / "prompt.txt"))
    monkeypatch.chdir(tmp_path)  # it reads .env there
    import alpaca_eval

    leaderboard, rows = alpaca_eval.evaluate(
        model_outputs=str(tmp_path / "ours.json"),
        reference_outputs=str(tmp_path / "theirs.json"),
        annotators_config=str(tmp_path),
        precomputed_leaderboard=None,
        is_return_instead_of_print=True,
        output_path=None,
        caching_path=None,
        fn_metric="get_winrate",
        sort_by="win_rate",
    )
    assert leaderboard.loc["ours", "n_total"] == 6 and leaderboard.loc["ours", "n_draws"] == 1
    tasks = {item.task for item in read_set(tmp_path / "set.json")}
    assert {row["instruction"] for row in rows} == tasks and "Say 1.\n\n### Input:\ntwice" in tasks
    assert {(row["generator_1"], row["output_1"]) for row in rows} == {
        ("theirs", "theirs answers"),
        ("theirs", "three"),
    }
    assert {(row["generator_2"], row["output_2"]) for row in rows} == {("ours", "ours answers"), ("ours", "three")}
    assert {row["preference"] for row in rows} <= {1, 1.5, 2}
