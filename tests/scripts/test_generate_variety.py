"""Self-instruct that shows what it has made, asks about topics, and writes labels first: whole runs."""

from __future__ import annotations

import io
import itertools
import json
import re
import threading

import pytest
from conftest import ROOT, assert_one_line_error, run_script

import utils
from alpaca.common.journal import Journal
from alpaca.data.requests import LABELS, Draw
from alpaca.data.topics import Topic, in_turn
from alpaca.endpoint.budget import RequestSettings
from alpaca.endpoint.run import recorded
from generate_instruction import Filters, Selection, request_lag

PROMPT = (ROOT / "prompt.txt").read_text()


def seed_task(number: int, classification: bool = False) -> dict:
    instance = {"input": "", "output": f"answer {number}"}
    name = f"seed number {number} has these words"
    return {"instruction": name, "instances": [instance], "is_classification": classification}


SEEDS = [seed_task(n) for n in range(6)] + [seed_task(n, True) for n in range(6, 10)]


def teach(count: int = 2, old: bool = False):
    """Replies of ``count`` instructions, numbered through; ``old``: the same ones each time."""
    numbers, lock = itertools.count(), threading.Lock()

    def answer(n, body):
        with lock:
            mine = [0 if old else next(numbers) for _ in range(count)]
        items = []
        for place, k in enumerate(mine, 4):
            words = " ".join(f"{word}{k}" for word in ("red", "blue", "green", "gold", "grey"))
            fields = ["Input:\n<noinput>\n", f"Output:\nlabel {k % 3}\n"]
            fields = reversed(fields) if LABELS in body["messages"][0]["content"] else fields
            items.append(f"{place}. Instruction: Compare {words}\n" + "".join(f"{place}. {field}" for field in fields))
        return "###\n".join(items)

    return answer


@pytest.fixture
def command(tmp_path):
    """``command(server, *flags)`` runs the script into tmp_path/out; the default is 24 instructions."""
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text("".join(json.dumps(task) + "\n" for task in SEEDS))

    def run(server, *flags):
        argv = ["generate_instruction.py", "generate_instruction_following_data", "--seed_tasks_path", seeds]
        argv += ["--base_url", getattr(server, "base_url", server), "--model_name", "m", "--seed", 5]
        argv += ["--output_dir", tmp_path / "out", "--num_instructions_to_generate", 24, *flags]
        return run_script(*argv)

    return run


@pytest.fixture
def report(tmp_path):
    return lambda: json.loads((tmp_path / "out" / "report.json").read_text())


def test_what_was_asked_with_many_in_flight_is_what_one_at_a_time_would_have_asked(teacher, command, tmp_path):
    """The oracle feeds the journal's replies one by one, and asks when it is a request's turn."""
    topics = tmp_path / "topics.txt"
    topics.write_text("tea|2\nchess\n")
    server = teacher(teach())
    flags = "--generated_in_prompt", 2, "--topics_path", topics, "--output_first", "True", "--max_concurrency", 16
    result = command(server, *flags)
    assert result.returncode == 0, result.stderr

    draw = Draw(PROMPT, SEEDS, 5, generated=2, topics=in_turn([Topic("tea", 2), Topic("chess")]), output_first=True)
    selection = Selection(SEEDS, [], 24, draw, Filters(), True, io.StringIO())
    with Journal(tmp_path / "out" / "regen.journal") as journal:
        replies, run = dict(recorded(journal)), journal.entries[0]
    assert run["lag"] == 4 and (run["generated_in_prompt"], run["output_first"]) == (2, True)
    asked, shown = [], 0
    for i in range(len(replies)):
        asked.append(draw.request(i, selection.kept_by(i - 4))[0])
        shown += "Instruction: Compare" in asked[-1]
        selection.feed(replies[i])
    assert sorted(body["messages"][0]["content"] for body in server.requests) == sorted(asked)
    assert shown > 4  # what the run made was shown
    assert selection.kept == utils.jload(tmp_path / "out" / "regen.json")


def test_topics_are_counted_and_kept_with_their_records(teacher, command, report, tmp_path):
    (tmp_path / "topics.txt").write_text("tea | 2\nchess | 1 | openings\n")
    server = teacher(teach())
    result = command(server, "--topics_path", tmp_path / "topics.txt", "--max_concurrency", 1)
    assert result.returncode == 0, result.stderr
    records = utils.jload(tmp_path / "out" / "regen.json")
    assert [record["topic"] for record in records] == ["tea", "tea", "chess", "chess", "tea", "tea"] * 4
    assert report()["topics"] == {
        "tea": {"replies": 8, "kept": 16, "dropped": 0, "near_duplicates": 0},
        "chess": {"replies": 4, "kept": 8, "dropped": 0, "near_duplicates": 0},
    }
    assert report()["dry_topics"] == []
    assert "2 topics: 8 to 16 kept each (see report.json)\n" in result.stdout
    about = re.findall(
        r"each task is about this topic: (.*)", "\n".join(b["messages"][0]["content"] for b in server.requests)
    )
    assert about == ["tea.", "chess. openings", "tea."] * 4


def test_a_topic_that_brings_nothing_new_is_called_dry(teacher, command, report, tmp_path):
    (tmp_path / "topics.txt").write_text("tea\nchess\n")
    new, old = teach(), teach(old=True)
    server = teacher(lambda n, body: (old if "topic: tea" in body["messages"][0]["content"] else new)(n, body))
    result = command(server, "--topics_path", tmp_path / "topics.txt", "--max_concurrency", 1)
    assert result.returncode == 0, result.stderr
    # One of the first two about tea is new, and so are all about chess but the first, which is the same.
    assert report()["topics"]["tea"] == {"replies": 12, "kept": 1, "dropped": 23, "near_duplicates": 23}
    assert report()["topics"]["chess"] == {"replies": 12, "kept": 23, "dropped": 1, "near_duplicates": 1}
    assert report()["dry_topics"] == ["tea"]
    assert "2 topics: 1 to 23 kept each (see report.json); run dry: tea\n" in result.stdout


def test_labels_come_first_and_their_balance_is_reported(teacher, command, report, tmp_path):
    result = command(teacher(teach(3)), "--output_first", "True", "--max_concurrency", 1)
    assert result.returncode == 0, result.stderr
    records = utils.jload(tmp_path / "out" / "regen.json")
    labeled = [record for record in records if record.get("is_classification")]
    assert 0 < len(labeled) < len(records) and len(labeled) % 3 == 0
    third = len(labeled) // 3
    assert report()["classification"] == {
        "records": len(labeled),
        "labels": {"label 0": third, "label 1": third, "label 2": third},
        "most_common_share": 0.3333,
    }
    assert f"{len(labeled)} classification records: 33% have the same label, 'label 0'\n" in result.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--generated_in_prompt", 4), "generated_in_prompt must be 0 to 3, the examples in a request"),
        (("--output_first", "True", "--format", "json"), "--output_first needs --format text"),
        (("--output_first", "True", "--num_prompt_instructions", 5), "needs 5 seed tasks that are classification"),
        (("--topics_path", "missing.txt"), "missing.txt"),
    ],
)
def test_what_cannot_be_asked_is_one_line_before_there_is_a_journal(command, tmp_path, flags, words):
    result = command("http://127.0.0.1:1/v1", *flags)
    assert_one_line_error(result, words)
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_with_what_it_was_begun_with(teacher, command, tmp_path):
    topics = tmp_path / "topics.txt"
    topics.write_text("tea\n")
    assert command(teacher(teach()), "--topics_path", topics).returncode == 0
    assert_one_line_error(command("http://127.0.0.1:1/v1"), "was started with --topics_path [['tea', 1, '']]")
    topics.write_text("tea | 2\n")
    assert_one_line_error(command("http://127.0.0.1:1/v1", "--topics_path", topics), "was started with --topics_path")


@pytest.mark.parametrize(
    ("target", "concurrency", "batch", "lag"),
    [
        (100, 32, False, 4),
        (1000, 32, False, 15),
        (52_000, 32, False, 64),
        (52_000, 128, False, 256),
        (52_000, 8, True, 765),
    ],
)
def test_the_lag_is_a_quarter_of_the_run_and_twice_what_is_in_flight_at_most(target, concurrency, batch, lag):
    assert request_lag(target, RequestSettings(max_concurrency=concurrency, batch=batch)) == lag
