"""The bridge to AlpacaEval: what judge.py answer writes to a .json file has the format that alpaca_eval 0.6.6 reads.

The format was read from its source: ``utils.load_or_convert_to_dataframe`` and ``get_generator_name``,
``main.evaluate``, ``PairwiseAnnotator.annotate_head2head``. Until November 2026 a test here ran the package itself on
these files, and it passed; but alpaca_eval needs a setuptools from before version 82, with pkg_resources.
"""

from __future__ import annotations

import json

from conftest import call

import judge
from alpaca.data.instruction_sets import read_set

# Columns that it writes itself, over what a file has there.
TAKEN = {"annotator", "preference", "preference_raw_completion", "output_1", "output_2", "generator_1", "generator_2"}


def checked(path) -> dict[str, str]:
    """The outputs of a file in AlpacaEval's format by instruction; fails where it would misread or refuse the file."""
    rows = json.loads(path.read_text())
    assert path.suffix == ".json" and isinstance(rows, list) and rows
    for row in rows:
        assert isinstance(row["instruction"], str) and row["instruction"]
        assert isinstance(row["output"], str)  # null would be compared as "nan"
        assert not any(isinstance(value, (list, dict)) for value in row.values())  # drop_duplicates() hashes all
        assert not TAKEN & row.keys()
    assert len({row["generator"] for row in rows}) == 1  # else the leaderboard calls it "Current model"
    outputs = {row["instruction"]: row["output"] for row in rows}
    assert len(outputs) == len(rows)  # files are joined on it: a repeated one would be paired with each of its kind
    return outputs


def test_alpaca_eval_can_compare_two_models_answers(teacher, tmp_path):
    records = [{"instruction": f"Say {i}.", "input": "twice" if i % 2 else "", "output": f"{i}"} for i in range(6)]
    (tmp_path / "set.json").write_text(json.dumps(records))
    server = teacher(lambda number, body: f"{body['model']} answers" if "Say 3." not in str(body) else "three")
    for model in ("ours", "theirs"):
        path = str(tmp_path / f"{model}.json")
        call(judge.answer, str(tmp_path / "set.json"), path, model_name=model, base_url=server.base_url)

    ours, theirs = checked(tmp_path / "ours.json"), checked(tmp_path / "theirs.json")
    tasks = [item.task for item in read_set(tmp_path / "set.json")]  # in the order of the set: max_instances cuts it
    assert list(ours) == list(theirs) == tasks and "Say 1.\n\n### Input:\ntwice" in tasks
    assert set(ours.values()) == {"ours answers", "three"} and set(theirs.values()) == {"theirs answers", "three"}
