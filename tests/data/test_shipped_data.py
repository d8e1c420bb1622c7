"""The data that ships: schema, the project's own filters and de-duplication, calculations recomputed, code run."""

from __future__ import annotations

import calendar
import collections
import datetime
import fractions
import itertools
import json
import math
import re
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT

import generate_instruction
import utils
from alpaca.data.rouge import RougePool

RECORDS = json.loads((ROOT / "alpaca_data.json").read_text())
SEEDS = utils.jload(ROOT / "seed_tasks.jsonl")
CHECKS = utils.jload(ROOT / "tests" / "data_checks.jsonl")


def seed_records() -> list[dict]:
    return [{"instruction": seed["instruction"], **seed["instances"][0]} for seed in SEEDS]


def test_seeds_have_the_originals_schema_and_consecutive_ids():
    assert len(SEEDS) == 175
    for number, seed in enumerate(SEEDS):
        assert list(seed) == ["id", "name", "instruction", "instances", "is_classification"]
        assert seed["id"] == f"seed_task_{number}"
        assert isinstance(seed["is_classification"], bool)
        assert len(seed["instances"]) == 1 and set(seed["instances"][0]) == {"input", "output"}
    assert len({seed["name"] for seed in SEEDS}) == 175


def test_seeds_are_varied():
    assert sum(seed["is_classification"] for seed in SEEDS) >= 25
    with_input = sum(bool(seed["instances"][0]["input"]) for seed in SEEDS)
    assert 0.4 <= with_input / len(SEEDS) <= 0.6


def test_records_have_three_clean_fields_and_nothing_else():
    assert len(RECORDS) >= 1000
    for record in RECORDS:
        assert list(record) == ["instruction", "input", "output"]
        assert all(text == text.strip() for text in record.values())
        assert record["instruction"] and record["output"]


def test_about_two_in_five_records_have_an_input():
    assert 0.35 <= sum(bool(record["input"]) for record in RECORDS) / len(RECORDS) <= 0.50


def test_output_lengths_are_spread():
    words = sorted(len(record["output"].split()) for record in RECORDS)
    assert words[0] == 1 and words[-1] <= 400
    assert words[len(words) // 10] <= 12 and words[len(words) * 9 // 10] >= 120


@pytest.mark.parametrize("records", [RECORDS, seed_records()], ids=["records", "seeds"])
def test_every_instruction_passes_the_generators_own_filters(records):
    reasons = {record["instruction"]: generate_instruction.filter_reason(record) for record in records}
    assert {text: reason for text, reason in reasons.items() if reason} == {}


def test_no_two_instructions_are_near_duplicates_seeds_included():
    pool = RougePool(record["instruction"] for record in RECORDS + seed_records())
    assert pool.nearest().max() <= generate_instruction.MAX_SIMILARITY


def test_every_calculation_is_right():
    """Each check recomputes a value by a Python expression; the record's output must show it."""
    names = {
        module.__name__: module for module in (calendar, collections, datetime, fractions, itertools, math, statistics)
    }
    outputs = {record["instruction"]: record["output"] for record in RECORDS}
    assert len(CHECKS) > 400
    for check in CHECKS:
        value = eval(check["expr"], dict(names))  # our own file, and the expressions are arithmetic
        assert str(value) == check["value"], check
        assert check["shown"] in outputs[check["instruction"]], check


def python_answers():
    for number, record in enumerate(RECORDS):
        for code in re.findall(r"```python\n(.*?)```", record["output"], re.S):
            yield pytest.param(code, id=f"record {number}")


NO_NETWORK = (
    "import socket\n"
    "def refuse(*_, **__): raise OSError('no network here')\n"
    "socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse\n"
)


@pytest.mark.parametrize("code", list(python_answers()))
def test_a_python_answer_runs(code, tmp_path):
    result = subprocess.run(
        [sys.executable, "-I", "-c", NO_NETWORK + code],
        capture_output=True,
        text=True,
        timeout=20,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []
