"""Generation under fire: SIGKILL at random moments, faults of every kind, budgets, two processes on one folder."""

from __future__ import annotations

import hashlib
import json
import random
import re
import signal
import subprocess
import sys
import time
import zlib

import pytest
from conftest import ROOT, assert_one_line_error, run_script

from alpaca.common.journal import Journal
from alpaca.data.requests import LABELS

WORDS = (ROOT / "prompt.txt").read_text().split()


def items(seed: int) -> str:
    """A reply that depends on the request's seed alone: some new items, some near-duplicates, some malformed."""
    rng = random.Random(seed)
    text = ""
    for number in range(4, 4 + rng.randint(1, 4)):
        instruction = " ".join(rng.choices(WORDS, k=6)) if rng.random() < 0.8 else "Name two long rivers in Asia."
        text += f"{number}. Instruction: Explain {instruction}\n{number}. Input:\n<noinput>\n"
        text += f"{number}. Output:\nanswer {rng.random()}\n###\n" if rng.random() < 0.9 else "###\n"
    return text


def steady(number, body):
    time.sleep(0.005 + (body["seed"] % 7) / 200)
    return items(body["seed"])


def suggestible(number, body):
    """As steady(), but what it says depends on all that it was shown; labels come first where the prompt wants that."""
    prompt = body["messages"][0]["content"]
    time.sleep(0.005 + (body["seed"] % 7) / 200)
    text = items(zlib.crc32(prompt.encode()) ^ body["seed"])
    if LABELS in prompt:
        text = re.sub(r"(\d+\. Input:\n.*\n)(\d+\. Output:\n.*\n)", r"\2\1", text)
    return text


def arms(folder) -> dict[str, tuple]:
    """The flags of each way to vary requests, whose topics are in a file in ``folder``."""
    topics = folder / "topics.txt"
    topics.write_text("tea | 2\nchess\ntax law | 1 | for beginners\n")
    pool, topics, labels = ("--generated_in_prompt", 2), ("--topics_path", topics), ("--output_first", "True")
    return {"pool": pool, "topics": topics, "output_first": labels, "all": (*pool, *topics, *labels)}


def command(server, folder, *flags) -> list[str]:
    argv = ["generate_instruction.py", "generate_instruction_following_data", "--base_url", server.base_url]
    argv += ["--model_name", "m", "--output_dir", folder, "--seed", 3, "--max_concurrency", 4, *flags]
    return [str(word) for word in argv]


def digest(folder) -> list[str]:
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("regen.json", "rejected.jsonl")]


def killed(argv, after: float) -> bool:
    """Runs a command and kills it; False when it was done before."""
    process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return process.returncode == -signal.SIGKILL


def journalled(folder) -> list[dict]:
    lines = (folder / "regen.journal").read_bytes().splitlines()
    return [json.loads(line[9:]) for line in lines[1:]]


@pytest.mark.parametrize("arm", ["", "pool", "all"])
def test_killed_again_and_again_a_run_ends_where_an_uninterrupted_one_does(teacher, tmp_path, arm):
    server = teacher(suggestible if arm else steady)
    target = ("--num_instructions_to_generate", 60, *arms(tmp_path).get(arm, ()))
    whole = run_script(*command(server, tmp_path / "whole", *target))
    assert whole.returncode == 0, whole.stderr

    argv, rng, kills = command(server, tmp_path / "killed", *target), random.Random(5), 0
    finished: set[int] = set()
    while kills < 6 and killed(argv, 0.4 + rng.random() / 2):
        kills += 1
        if (tmp_path / "killed" / "regen.journal").exists():
            now = {entry["i"] for entry in journalled(tmp_path / "killed")[:-1]}  # the last line may be torn
            assert finished <= now  # no finished response is lost
            finished = now
    assert kills > 0
    last = run_script(*argv)
    assert last.returncode == 0, last.stderr
    numbers = [entry["i"] for entry in journalled(tmp_path / "killed")]
    assert len(numbers) == len(set(numbers))  # nothing twice
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")
    records = json.loads((tmp_path / "whole" / "regen.json").read_text())
    assert len(records) >= 60 and "near-duplicate" in (tmp_path / "whole" / "rejected.jsonl").read_text()


def test_a_torn_last_line_is_cut_off_told_and_asked_again(teacher, tmp_path):
    server = teacher(steady)
    argv = command(server, tmp_path, "--num_instructions_to_generate", 10)
    assert run_script(*argv).returncode == 0
    expected = digest(tmp_path)
    data = (tmp_path / "regen.journal").read_bytes()
    (tmp_path / "regen.journal").write_bytes(data[:-20])
    (tmp_path / "regen.json").unlink()
    again = run_script(*argv)
    assert again.returncode == 0, again.stderr
    assert "ended in an incomplete entry" in again.stdout
    assert digest(tmp_path) == expected


def test_a_reply_lost_behind_the_one_that_was_enough_is_not_asked_for_and_the_result_is_written(teacher, tmp_path):
    argv = command(teacher(steady), tmp_path, "--num_instructions_to_generate", 10)
    assert run_script(*argv).returncode == 0
    expected = digest(tmp_path)
    with Journal(tmp_path / "regen.journal") as journal:  # of two that were in flight, the second alone arrived
        last = max((entry for entry in journal.entries if "i" in entry), key=lambda entry: entry["i"])
        journal.append([last | {"i": last["i"] + 2}])
    (tmp_path / "regen.json").unlink()
    again = run_script(*argv)
    assert again.returncode == 0, again.stderr
    assert digest(tmp_path) == expected
    assert last["i"] + 1 not in {entry["i"] for entry in journalled(tmp_path)}


def test_a_larger_target_goes_on_with_the_replies_that_are_there(teacher, tmp_path):
    server = teacher(steady)
    assert run_script(*command(server, tmp_path / "a", "--num_instructions_to_generate", 10)).returncode == 0
    assert run_script(*command(server, tmp_path / "a", "--num_instructions_to_generate", 25)).returncode == 0
    assert run_script(*command(server, tmp_path / "b", "--num_instructions_to_generate", 25)).returncode == 0
    assert digest(tmp_path / "a")[0] == digest(tmp_path / "b")[0]


def test_three_in_ten_requests_with_a_fault_of_any_kind_end_with_enough_and_nothing_twice(teacher, tmp_path):
    """Most faults pass when tried again. One prompt in ten never gets a text: those requests fail for good."""
    faults = [429, ("wait", 0.1), 500, 503, "reset", "half", "hang", "null", "empty", "garbage"]
    faults += [("", "content_filter"), ("\ud83d half an emoji", "stop"), ("context", 400)]
    rng, answered = random.Random(1), {}

    def answer(number, body):
        if zlib.crc32(json.dumps(body["messages"]).encode()) % 10 == 0:
            return "null"
        if rng.random() < 0.3 and body["max_tokens"] > 100:
            return rng.choice(faults)
        return answered.setdefault(body["seed"], items(body["seed"]))

    server = teacher(answer)
    flags = ("--num_instructions_to_generate", 40, "--max_concurrency", 16, "--request_timeout", 1)
    result = run_script(*command(server, tmp_path, *flags))
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kept"] + sum(report["dropped"].values()) == report["parsed"]
    entries = journalled(tmp_path)
    numbers = [entry["i"] for entry in entries]
    assert sorted(numbers) == list(range(len(numbers))) and len(numbers) == report["requests"]
    assert sum(report["failed"].values()) == sum(entry["text"] is None for entry in entries) > 0
    assert all((entry["text"] is None) == bool(entry["error"]) and entry["text"] != "" for entry in entries)
    assert len(server.requests) > 1.2 * len(numbers)  # there were faults
    # What the journal holds is what the teacher said, each reply once.
    said = {text: seed for seed, text in answered.items()}
    seeds = [said[entry["text"]] for entry in entries if entry["text"] in said]
    assert len(seeds) == len(set(seeds)) >= len(entries) / 2
    instructions = [record["instruction"] for record in json.loads((tmp_path / "regen.json").read_text())]
    assert len(instructions) == len(set(instructions)) >= 40


def test_too_many_failures_end_the_run_with_what_was_learned(teacher, tmp_path):
    server = teacher(lambda number, body: items(body["seed"]) if number < 3 else 400)
    result = run_script(*command(server, tmp_path, "--num_instructions_to_generate", 500))
    assert_one_line_error(result, "requests failed (HTTP 400: fault 400", "instructions in")
    assert json.loads((tmp_path / "regen.json").read_text())
    assert len(server.requests) < 20


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--max_total_tokens", 120), "the budget of 120 tokens"),
        (
            ("--max_cost_usd", 0.0012, "--prompt_price", 10, "--completion_price", 10),
            "the budget of $0.0012",
        ),
    ],
)
def test_a_budget_is_overshot_by_no_more_than_the_requests_in_flight(teacher, tmp_path, flags, said):
    """Each reply says 7 + 5 tokens: the tenth reaches 120, and 4 may be in flight."""
    server = teacher(lambda number, body: time.sleep(0.02) or items(body["seed"]))
    result = run_script(*command(server, tmp_path, "--num_instructions_to_generate", 500, *flags))
    assert result.returncode == 0, result.stderr
    assert f"{said} ended the run short of 500 instructions" in result.stdout
    assert 10 <= len(server.requests) <= 10 + 4
    tokens = json.loads((tmp_path / "report.json").read_text())
    assert tokens["prompt_tokens"] + tokens["completion_tokens"] == 12 * len(server.requests)


def test_what_an_earlier_run_used_counts_against_the_budget(teacher, tmp_path):
    server = teacher(steady)
    flags = ("--num_instructions_to_generate", 500, "--max_total_tokens", 120)
    assert run_script(*command(server, tmp_path, *flags)).returncode == 0
    asked = len(server.requests)
    assert run_script(*command(server, tmp_path, *flags)).returncode == 0
    assert len(server.requests) == asked


def test_a_reply_behind_one_that_was_in_flight_when_the_run_was_killed_counts_though_the_budget_is_spent(
    teacher, tmp_path
):
    server = teacher(steady)
    flags = ("--num_instructions_to_generate", 500, "--max_total_tokens", 120)
    assert run_script(*command(server, tmp_path, *flags)).returncode == 0
    expected, journal = digest(tmp_path), tmp_path / "regen.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    gap = next(line for line in lines[1:] if json.loads(line[9:])["i"] == 2)
    journal.write_bytes(b"".join(line for line in lines if line != gap))
    asked = len(server.requests)
    assert run_script(*command(server, tmp_path, *flags)).returncode == 0
    assert len(server.requests) == asked + 1 and digest(tmp_path) == expected


def test_a_refused_start_leaves_what_was_rejected(teacher, tmp_path):
    server = teacher(steady)
    assert run_script(*command(server, tmp_path, "--num_instructions_to_generate", 20)).returncode == 0
    before = digest(tmp_path)
    other = run_script(*command(server, tmp_path, "--num_instructions_to_generate", 30, "--seed", 4))
    assert other.returncode == 1 and digest(tmp_path) == before


def test_a_second_process_on_the_same_folder_is_refused(teacher, tmp_path):
    server = teacher(lambda number, body: time.sleep(30) or "late")
    argv = command(server, tmp_path, "--num_instructions_to_generate", 5)
    first = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not server.requests:
            time.sleep(0.05)
        before = (tmp_path / "regen.journal").read_bytes()
        assert_one_line_error(run_script(*argv), "regen.journal is in use by another process")
        assert (tmp_path / "regen.journal").read_bytes() == before
    finally:
        first.kill()
        first.wait()


def test_another_seed_on_a_run_that_was_begun_is_refused(teacher, tmp_path):
    server = teacher(steady)
    assert run_script(*command(server, tmp_path, "--num_instructions_to_generate", 3)).returncode == 0
    other = run_script(*command(server, tmp_path, "--num_instructions_to_generate", 9, "--seed", 4))
    assert_one_line_error(other, "was started with --seed 3", "another --output_dir")


def test_filters_are_flags_and_the_rejected_name_their_reason_and_neighbour(teacher, tmp_path):
    text = (
        " Name two long rivers.\n4. Input:\n<noinput>\n4. Output:\nNile, Po\n"
        "###\n5. Instruction: Name two very long rivers.\n5. Input:\n<noinput>\n5. Output:\nNile, Po\n"
        "###\n6. Instruction: Plot a map of it.\n6. Input:\n<noinput>\n6. Output:\nx\n"
        "###\n7. Instruction: Sing about a turnip now.\n7. Input:\n<noinput>\n7. Output:\nla\n"
    )
    server = teacher(lambda number, body: text)
    flags = ("--num_instructions_to_generate", 2, "--filter_keywords", "turnip", "--max_words", 5, "--min_words", 2)
    result = run_script(*command(server, tmp_path, *flags, "--similarity_stats", "False"))
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "regen.json").read_text()) == [
        {"instruction": "Name two long rivers.", "input": "", "output": "Nile, Po"},
        {"instruction": "Plot a map of it.", "input": "", "output": "x"},
    ]
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [(note["reason"], note.get("nearest")) for note in rejected] == [
        ("near-duplicate", "Name two long rivers."),
        ("not doable in text", None),
    ]


def test_near_duplicates_in_another_script_are_warned_of_and_found_with_the_unicode_tokenizer(teacher, tmp_path):
    def answer(number, body):
        return (
            f" Translate: 请用一句话解释天空为什么是蓝色的 {number}\n4. Input:\n<noinput>\n4. Output:\nx\n"
            f"###\n5. Instruction: Define 请用一句话解释天空为什么是蓝色的呢 {number}\n5. Input:\n<noinput>\n"
            "5. Output:\nx\n"
        )

    flags = ("--num_instructions_to_generate", 2, "--min_words", 1)
    blind = run_script(*command(teacher(answer), tmp_path / "a", *flags))
    assert blind.returncode == 0, blind.stderr
    assert "warning: 2 of 2 kept instructions are mostly non-ASCII" in blind.stdout
    seeing = run_script(
        *command(teacher(answer), tmp_path / "b", *flags, "--tokenizer", "unicode", "--max_total_tokens", 24)
    )
    assert "warning" not in seeing.stdout
    assert '"near-duplicate"' in (tmp_path / "b" / "rejected.jsonl").read_text()


def test_the_warning_of_another_script_comes_while_the_run_can_still_be_stopped(teacher, tmp_path):
    def answer(number, body):
        return f" T{number} {'春' * 30}\n4. Input:\n<noinput>\n4. Output:\nx\n"

    flags = ("--num_instructions_to_generate", 12, "--min_words", 1, "--max_concurrency", 1)
    result = run_script(*command(teacher(answer), tmp_path, *flags))
    assert result.returncode == 0, result.stderr
    assert "warning: 10 of 10 kept instructions are mostly non-ASCII" in result.stdout
    assert "warning: 12 of 12 kept instructions are mostly non-ASCII" in result.stdout
