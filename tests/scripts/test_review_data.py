"""analyze_data.py review behind a real server: what is written, resumed and refused."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter

import pytest
from conftest import ROOT, assert_one_line_error, assert_user_error, call, run_script
from made_batch_server import BatchServer

import analyze_data

sys.path.append(str(ROOT / "benchmarks"))
import bench_review  # noqa: E402
import plant_faults  # noqa: E402

CRITERIA = ["True", "Complete", "Follows", "Self-contained", "Safe"]
FILES = ["dropped.jsonl", "kept.json", "report.json", "reviews.jsonl"]


def marks(true: int, corrected: str = "") -> str:
    lines = [f"True: {true}", *(f"{name}: 5" for name in CRITERIA[1:])]
    tail = f"\n\nCorrected:\n~~~~~~~~\n{corrected}\n~~~~~~~~" if corrected else ""
    return "Reason: So it is.\n" + "\n".join(lines) + tail


def number_in(body) -> int:
    """Which record a request is about."""
    return int(re.search(r"\nSay (\d+)\.", body["messages"][0]["content"])[1])


def reviewer(_, body) -> str:
    """Every fourth is wrong, and of these every second is corrected."""
    number = number_in(body)
    return marks(1, f"{number} it is" if number % 8 == 0 else "") if number % 4 == 0 else marks(5)


@pytest.fixture
def data(tmp_path):
    """``data(n)`` writes n records and returns flags."""

    def make(count: int) -> dict:
        records = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}"} for i in range(count)]
        (tmp_path / "data.json").write_text(json.dumps(records))
        return {"data_path": str(tmp_path / "data.json"), "output_dir": str(tmp_path / "out"), "model_name": "m"}

    return make


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def command(flags: dict, server, *more) -> list[str]:
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    return [str(ROOT / "analyze_data.py"), "review", *words, "--base_url", server.base_url, *map(str, more)]


def test_each_record_is_kept_corrected_or_dropped_and_the_data_stays(teacher, data, tmp_path, capsys):
    server, flags = teacher(reviewer), data(9)
    before = (tmp_path / "data.json").read_bytes()
    call(analyze_data.review, **flags, base_url=server.base_url)
    assert (tmp_path / "data.json").read_bytes() == before and sorted(contents(tmp_path / "out")) == FILES
    kept, dropped = json.loads((tmp_path / "out" / "kept.json").read_text()), lines(tmp_path / "out" / "dropped.jsonl")
    assert [record["output"] for record in kept] == ["0 it is", "1", "2", "3", "5", "6", "7", "8 it is"]
    assert [name for name in kept[1]] == ["instruction", "input", "output"]
    assert kept[0]["review"]["original_output"] == "0"
    assert [(r["output"], r["review"]["record"], r["review"]["action"]) for r in dropped] == [("4", 5, "dropped")]
    rows = lines(tmp_path / "out" / "reviews.jsonl")
    assert [row["action"] for row in rows] == ["corrected", *["kept"] * 3, "dropped", *["kept"] * 3, "corrected"]
    assert rows[4]["reviews"][0]["reason"] == "So it is."
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["actions"] == {"kept": 6, "corrected": 2, "dropped": 1, "failed": 0, "not asked": 0}
    assert report["reviewers"][0]["low"]["True"] == 3 and report["tokens"] == [63, 45]
    assert {(body["temperature"], body["seed"], body["max_tokens"]) for body in server.requests} == {(0.0, 0, 2048)}
    assert "9 records in" in (out := capsys.readouterr().out) and "6 kept, 2 corrected, 1 dropped" in out


def test_two_reviewers_and_how_far_they_agree(teacher, data, tmp_path, capsys):
    def answer(number, body):
        return marks(2) if number_in(body) % (2 if body["model"] == "n" else 4) == 0 else marks(5)

    call(analyze_data.review, **data(8) | {"model_name": "m, n"}, base_url=teacher(answer).base_url)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["actions"]["kept"] == 4 and report["actions"]["dropped"] == 4
    # 6 of 8 alike; by chance 1/4·1/2 + 3/4·1/2 = 1/2.
    assert report["agreement"]["kept"] == {"records": 8, "same": 0.75, "kappa": 0.5}
    assert report["agreement"]["Safe"] == {"records": 8, "same": 1.0, "kappa": None}
    assert sorted(contents(tmp_path / "out")) == FILES
    shown = capsys.readouterr()
    assert "agreement" in shown.out and shown.err.count("8/8") >= 2 and "16/16" not in shown.err  # a bar for each


def erratic(_, body) -> str:
    """Slow, and sometimes unreadable at first, by the request alone; who is asked matters too."""
    text = body["model"] + body["messages"][0]["content"]
    time.sleep(0.02 + zlib.crc32(text.encode()) % 30 / 1000)
    if zlib.crc32(f"{text}{body['seed']}".encode()) % 5 == 0:
        return "Well."
    return marks(1 + zlib.crc32(text.encode()) % 5)


def test_killed_again_and_again_a_review_ends_with_the_bytes_of_an_uninterrupted_one(teacher, data, tmp_path):
    server, flags = teacher(erratic), data(40) | {"model_name": "m,n"}
    call(analyze_data.review, **flags | {"output_dir": str(tmp_path / "whole")}, base_url=server.base_url)
    whole = len(server.requests)
    server.requests.clear()
    rng, kills, there = random.Random(5), 0, 0
    for _ in range(4):
        argv = command(flags, server, "--max_concurrency", 4)
        process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120  # killed while it asks, wherever its start-up ended
        while len(server.requests) < there + rng.randint(8, 25) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        there = len(server.requests)
    assert kills == 4 and not list((tmp_path / "out").glob("*.json*"))
    call(analyze_data.review, **flags, base_url=server.base_url)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    # What was in flight at a kill is lost, and its tries before: 4 requests of at most 3 tries each.
    assert whole <= len(server.requests) <= whole + kills * 4 * 3


def test_sigterm_loses_no_review_and_says_how_to_continue(teacher, data, tmp_path):
    server, flags = teacher(erratic), data(60)
    argv = [sys.executable, *command(flags, server, "--max_concurrency", 4)]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while len(server.requests) < 20 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in said
    assert ".journal: the same command continues" in said and said.endswith("\ninterrupted\n")
    [journal] = (tmp_path / "out").glob("*.journal")
    assert 20 - 1 - 4 * 3 <= len(journal.read_bytes().splitlines()) - 1  # all but the at most 4 that were in flight


def test_a_record_has_the_number_that_the_reader_gives(teacher, data, tmp_path):
    """As in lint: the first of three is without an answer, and dropped by the reader."""
    asked = [{"role": "user", "content": "Say 1."}]
    talks = [{"messages": asked + [{"role": "assistant", "content": text}]} for text in ("", "One.", "1")]
    flags = data(0) | {"data_path": str(tmp_path / "talks.json")}
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    call(analyze_data.review, **flags, base_url=teacher(lambda number, body: marks(5)).base_url)
    assert [row["record"] for row in lines(tmp_path / "out" / "reviews.jsonl")] == [2, 3]


def test_within_a_budget_the_rest_is_not_asked_and_the_same_command_asks_it(teacher, data, tmp_path):
    server, flags = teacher(reviewer), data(20)
    call(analyze_data.review, **flags, base_url=server.base_url, max_total_tokens=60, max_concurrency=1)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["actions"]["not asked"] == 15 and len(server.requests) == 5  # of 12 tokens each
    call(analyze_data.review, **flags, base_url=server.base_url)
    assert len(server.requests) == 20
    call(analyze_data.review, **flags | {"output_dir": str(tmp_path / "whole")}, base_url=server.base_url)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_batch_ends_with_what_requests_one_by_one_bring(teacher, data, tmp_path):
    flags, server = data(10), BatchServer(lambda body: reviewer(0, body))
    call(analyze_data.review, **flags, base_url=server.base_url, batch=True)
    call(analyze_data.review, **flags | {"output_dir": str(tmp_path / "direct")}, base_url=teacher(reviewer).base_url)
    batched, direct = contents(tmp_path / "out"), contents(tmp_path / "direct")
    assert batched["kept.json"] != b"[]\n"
    assert json.loads(batched.pop("report.json"))["actions"] == json.loads(direct.pop("report.json"))["actions"]
    assert [row["action"] for row in lines(tmp_path / "out" / "reviews.jsonl")] == [
        row["action"] for row in lines(tmp_path / "direct" / "reviews.jsonl")
    ]


def test_a_reviewer_that_never_gives_a_score_ends_the_run_early(teacher, data):
    server = teacher(lambda number, body: "\x1b[31mI like\nthis record.")
    result = run_script(*command(data(200), server, "--max_concurrency", 1))
    assert_one_line_error(result, "10 replies and no scores", "\\x1b[31mI like this record.", "another model or rubric")
    assert result.returncode == 1 and len(server.requests) == 10


def test_a_reviewer_whose_replies_are_all_cut_off_is_given_longer_ones(teacher, data):
    server = teacher(lambda number, body: (marks(5), "length"))
    assert_user_error(
        lambda: call(analyze_data.review, **data(200), base_url=server.base_url, max_concurrency=1),
        "10 replies and no scores",
        "allow longer replies",
    )


def test_when_the_second_is_useless_the_first_ones_reviews_remain(teacher, data, tmp_path):
    server = teacher(lambda number, body: reviewer(0, body) if body["model"] == "m" else "No.")
    flags = data(12)
    both = flags | {"model_name": "m,n"}
    assert_user_error(lambda: call(analyze_data.review, **both, base_url=server.base_url), "10 replies and no scores")
    server.answer = reviewer
    server.requests.clear()
    call(analyze_data.review, **flags | {"model_name": "m,o"}, base_url=server.base_url)
    assert {body["model"] for body in server.requests} == {"o"}


def test_a_journal_that_an_ended_run_left_does_not_let_its_files_be_overwritten(teacher, data, tmp_path):
    """It was killed after it had removed the first of two."""
    server, flags, kept = teacher(reviewer), data(4) | {"model_name": "m,n"}, tmp_path / "out" / "kept.json"
    call(analyze_data.review, **flags, base_url=server.base_url, max_total_tokens=12, max_concurrency=1)
    [_, second] = sorted((tmp_path / "out").glob("*.journal"))
    left = second.read_bytes()
    call(analyze_data.review, **flags, base_url=server.base_url)
    second.write_bytes(left)
    before = kept.read_bytes()
    assert_user_error(lambda: call(analyze_data.review, **flags, base_url=server.base_url), "kept.json exists: remove")
    assert kept.read_bytes() == before and json.loads(before)


def test_bad_input_is_refused_in_one_line(teacher, data, tmp_path):
    server, flags = teacher(reviewer), data(2)
    rubric, one = tmp_path / "rubric.txt", tmp_path / "one.json"
    rubric.write_text("{fence}{task}{answer} True or not?")
    one.write_text('[{"instruction": "Say 1.", "input": ""}]')
    for more, *words in (
        ({"model_name": None}, "--model_name must be a reviewer's name"),
        ({"model_name": "m,"}, "--model_name must be a reviewer's name"),
        ({"model_name": "m,n,o"}, "names 3 reviewers"),
        ({"model_name": "m, m"}, "names 'm' twice"),
        ({"model_name": "m,n", "batch_write": "b.jsonl"}, "are for one reviewer"),
        ({"min_score": 0}, "--min_score must be 1 to 5"),
        ({"rubric": str(rubric)}, "asks for no score"),
        ({"data_path": str(one)}, 'record 1: no text "output"'),
        ({"output_dir": str(tmp_path)}, "is the folder of the data"),
    ):
        assert_user_error(lambda more=more: call(analyze_data.review, **flags | more, base_url=server.base_url), *words)
    assert not server.requests and not (tmp_path / "out").exists()
    call(analyze_data.review, **flags, base_url=server.base_url)
    before = contents(tmp_path / "out")
    assert_user_error(lambda: call(analyze_data.review, **flags, base_url=server.base_url), "kept.json exists: remove")
    assert contents(tmp_path / "out") == before


# ---------------------------------------------------------------------------------------------------------------------
# The measurement: planted faults, and what a review finds of them.


def test_each_kind_is_planted_so_often_by_seed_and_the_key_restores_the_data():
    records = json.loads((ROOT / "alpaca_data.json").read_text())
    planted, key = plant_faults.plant(records, 20, 3)
    assert (planted, key) == plant_faults.plant(records, 20, 3) != plant_faults.plant(records, 20, 4)
    kinds = ["contradicted fact", "cut ending", "swapped answer", "wrong sum"]
    assert Counter(fault["kind"] for fault in key) == dict.fromkeys(kinds, 20)
    restored = list(planted)
    for fault in key:
        place = fault["record"]
        assert planted[place]["output"] != fault["original_output"]
        restored[place] = planted[place] | {"output": fault["original_output"]}
    assert restored == records


def test_a_fault_is_what_its_kind_says():
    rng = random.Random(0)
    assert re.fullmatch(r"2 \+ 2 = [1-35-9]\.", plant_faults.wrong_sum("2 + 2 = 4.", rng))
    assert plant_faults.wrong_sum("It is 4.", rng) is None
    text = "The sky is blue, and grass is green."
    assert plant_faults.contradicted(text, rng) == "The sky is not blue, and grass is green."
    assert [plant_faults.contradicted(t, rng) for t in ("Is it blue? It is.", "It is not.", "Run.")] == [None] * 3
    words = " ".join(f"w{i}" for i in range(30)) + "."
    assert 12 < len(plant_faults.cut_ending(words, rng).split()) <= 21
    assert plant_faults.cut_ending("Too short.", rng) is None


def test_planted_against_found_by_literal_values():
    """Of 10 records 9 are reviewed; of 4 faults among them 3 are found, with 2 others."""
    planted = {0: "wrong sum", 1: "wrong sum", 2: "cut ending", 3: "cut ending", 9: "cut ending"}
    found = bench_review.confusion(planted, [0, 1, 2, 4, 5], range(9))
    assert found == {
        "planted and found": 3,
        "planted, not found": 1,
        "found, not planted": 2,
        "neither": 3,
        "precision": 0.6,
        "precision_interval": [0.231, 0.882],  # Wilson's, of 3 in 5
        "recall": 0.75,
        "recall_interval": [0.301, 0.954],  # of 3 in 4
        "cut ending": "1 of 2",
        "wrong sum": "2 of 2",
    }


def test_a_review_of_planted_faults_is_counted_as_its_reviewer_said(teacher, data, tmp_path):
    call(analyze_data.review, **data(9), base_url=teacher(reviewer).base_url)  # finds 0, 4 and 8
    found = bench_review.measured(tmp_path / "out", {0: "a", 1: "a", 8: "b"})
    assert [found[name] for name in ("planted and found", "planted, not found", "found, not planted", "neither")] == [
        *(2, 1, 1, 5)
    ]
    assert (found["a"], found["b"]) == ("1 of 2", "1 of 1")
