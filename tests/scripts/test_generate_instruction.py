"""Self-instruct: the filters, and runs against a real local teacher that can misbehave."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import oracles
import pytest
from conftest import ROOT, assert_one_line_error, call, run_script

import generate_instruction
import utils
from alpaca import UserError
from alpaca.common import cli
from alpaca.common.journal import Journal
from alpaca.data.replies import parse_json
from alpaca.data.requests import JSON_SCHEMA, Draw, encode_json_prompt
from alpaca.endpoint import parallel
from alpaca.endpoint.budget import Budget, RequestSettings
from alpaca.endpoint.client import Completion
from generate_instruction import Filters, encode_prompt, filter_reason, parse_response

TASK = "generate_instruction_following_data"
TREE = {"instruction": "Name a tree.", "input": "", "output": "Oak."}


def seed_task(instruction: str, input: str = "", output: str = "Oak.") -> dict:
    return {"instruction": instruction, "instances": [{"input": input, "output": output}]}


# ---------------------------------------------------------------------------------------------------------------------
# filter_reason.


@pytest.mark.parametrize(
    ("reason", "dropped", "kept"),
    [
        ("too short", "Name three trees", "Name three tall trees"),
        ("too long", "Say " + "a " * 150, "Say " + "a " * 149),
        ("not doable in text", "Describe this Picture in detail.", "Describe a picturesque village in detail."),
        ("not doable in text", "Plot the data of 2020.", "Sum up the subplot of Hamlet."),
        ("not doable in text", "Then go to the shop.", "Is a cargo today a good load?"),
        ("asks for a program", "Write a program that sorts.", "Explain what a program is."),
        ("starts with punctuation", "(a) Name three trees.", "Compare (a) with (b) briefly."),
        ("starts with non-ASCII", "Écris une phrase courte.", "Translate the word café here."),
    ],
)
def test_a_filter_takes_what_it_names_and_leaves_its_neighbour(reason, dropped, kept):
    assert filter_reason(TREE | {"instruction": dropped}) == reason
    assert filter_reason(TREE | {"instruction": kept}) is None


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        ("请用一句话解释天空为什么是蓝色的", None),  # 16 words, no space and no ASCII letter
        ("Écris une phrase courte.", None),
        ("列出树名", None),
        ("写诗吧", "too short"),
        ("「春」について短い詩を書いて", "starts with punctuation"),
        ("字" * 151, "too long"),
    ],
)
def test_with_the_unicode_tokenizer_the_words_of_any_script_count_and_any_letter_may_come_first(instruction, reason):
    assert filter_reason(TREE | {"instruction": instruction}, Filters(tokenizer="unicode")) == reason


NOT_TEXT = (
    "image images graph graphs picture pictures file files map maps draw plot video audio music flowchart diagram"
)


def test_a_malformed_item_and_an_empty_output_are_dropped_and_an_empty_input_is_not():
    good = {"instruction": "Name three tall trees.", "input": "", "output": "Oak, ash, elm."}
    assert filter_reason("4. Instruction: Name three tall trees.") == "malformed"
    assert filter_reason(good | {"output": ""}) == "empty output"
    assert filter_reason(good) is None


@pytest.mark.parametrize("word", NOT_TEXT.split())
def test_each_word_that_text_alone_cannot_do_counts_only_as_a_whole_word(word):
    assert filter_reason(TREE | {"instruction": f"Tell us about {word}, please."}) == "not doable in text"
    assert filter_reason(TREE | {"instruction": f"Tell us about {word.upper()}!"}) == "not doable in text"
    assert filter_reason(TREE | {"instruction": f"Tell us about x{word}x please."}) is None


# ---------------------------------------------------------------------------------------------------------------------
# The run.

SEEDS = [
    "Name a tree that grows near water.",
    "one two three four five six seven eight nine ten",
    "Sort the following words by length.",
    "Explain why the sky is blue.",
]
DRAW = Draw("", [], 0)


def item(instruction: str, output: str = "An answer from 2020. It is short.", number: int = 4) -> str:
    return f" {instruction}\n{number}. Input:\n<noinput>\n{number}. Output:\n{output}\n"


def reply(*instructions: str) -> str:
    """A well-formed continuation of a prompt with 3 examples."""
    return "".join(item(text, number=i) + f"###\n{i + 1}. Instruction:" for i, text in enumerate(instructions, 4))


def fresh(number: int) -> str:
    """An instruction that shares one word of six with any other one."""
    return " ".join(["Compare"] + [f"{name}{number}" for name in ("red", "blue", "green", "gold", "grey")])


def always_fresh(per_reply: int = 1):
    """An answer function: every reply has new instructions."""
    counter, lock = itertools.count(), threading.Lock()

    def answer(n, body):
        with lock:
            return reply(*(fresh(next(counter)) for _ in range(per_reply)))

    return answer


@pytest.fixture
def seeds(tmp_path):
    path = tmp_path / "seeds.jsonl"
    path.write_text("".join(json.dumps(seed_task(text)) + "\n" for text in SEEDS))
    return path


@pytest.fixture
def run(tmp_path, seeds):
    """``run(server, …)`` makes instructions in tmp_path/out and returns regen.json's records."""

    def generated(server, **flags) -> list[dict]:
        settings = {"base_url": getattr(server, "base_url", server), "model_name": "m", "max_concurrency": 1}
        settings |= {"seed_tasks_path": str(seeds), "prompt_path": str(ROOT / "prompt.txt")}
        flags = settings | flags
        call(generate_instruction.generate_instruction_following_data, str(tmp_path / "out"), **flags)
        return json.loads((tmp_path / "out" / "regen.json").read_text())

    return generated


def texts(records: list[dict]) -> list[str]:
    return [record["instruction"] for record in records]


def test_a_run_ends_when_enough_are_kept_and_counts_every_parsed_item(teacher, run, capsys):
    """4 items: one kept, one too short, one malformed (only its number), one not doable in text."""

    def answer(n, body):
        return reply(fresh(n), "Too short", "Draw a big red house")

    records = run(teacher(answer), num_instructions_to_generate=2)
    assert texts(records) == [fresh(0), fresh(1)]
    assert {key: records[0][key] for key in ("input", "output")} == {
        "input": "",
        "output": "An answer from 2020. It is short.",
    }
    printed = capsys.readouterr().out
    table = {line.rpartition("  ")[0].strip(): line.split()[-1] for line in printed.splitlines() if "  " in line}
    assert {name: number for name, number in table.items() if number.isdigit()} == {
        "requests": "2",
        "unused replies": "0",
        "parsed": "8",
        "dropped: too short": "2",
        "dropped: not doable in text": "2",
        "dropped: malformed": "2",
        "kept": "2",
        "kept before": "0",
        "prompt tokens": "14",
        "completion tokens": "10",
    }
    assert re.search(r"2 instructions in \S+regen.json$", printed, re.M)


def test_near_duplicates_of_a_seed_or_a_kept_instruction_are_dropped_above_7_tenths(teacher, run, capsys):
    """Against the second seed, of ten words: 7 common words of 10 are exactly 0.7 and stay, 8 of 10 are dropped."""
    exactly = "one two three four five six seven x1 y1 z1"
    answers = [
        reply("Name a tree that grows near the water.", exactly, "one two three four five six seven eight x2 y2"),
        reply(fresh(1), fresh(1), fresh(1) + " again"),
    ]
    assert texts(run(teacher(lambda n, body: answers[n]), num_instructions_to_generate=2)) == [exactly, fresh(1)]
    assert re.search(r"dropped: near-duplicate +4\n", capsys.readouterr().out)


def test_similarities_are_those_of_the_oracle_against_seeds_and_what_was_kept_before(teacher, run):
    """30 instructions, each 6 of these 14 words in this order: near one another in every degree, some too near."""
    rng, words = random.Random(0), "explain why the sky is blue name a tree that grows near water now".split()
    answer = reply(*(" ".join(words[i] for i in sorted(rng.sample(range(14), 6))) for _ in range(30)))
    records = run(teacher(lambda n, body: answer), num_instructions_to_generate=12)
    assert 12 <= len(records) < 30
    pool = list(SEEDS)
    for record in records:
        scores = oracles.rouge_l(record["instruction"], pool)
        similar = record["most_similar_instructions"]
        assert record["avg_similarity_score"] == pytest.approx(sum(scores) / len(scores), abs=1e-12)
        assert list(similar.values()) == sorted(scores, reverse=True)[:10]
        assert all(scores[pool.index(text)] == score for text, score in similar.items())
        pool.append(record["instruction"])
    assert len(records[-1]["most_similar_instructions"]) == 10


ORIGINALS = [
    {
        "instruction": "Describe how a lock on a canal works.",
        "input": "",
        "output": "Gates.",
        "most_similar_instructions": {"Describe a canal.": 0.4},
        "avg_similarity_score": 0.04,
    },
    {
        "instruction": "Give two reasons to learn Latin.",
        "input": "one",
        "output": "Roots.",
        "most_similar_instructions": {},
        "avg_similarity_score": 0.1,
    },
]


def test_a_run_goes_on_from_a_regen_json_of_the_original(teacher, run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "regen.json").write_text(json.dumps(ORIGINALS))
    answers = [reply("Describe how a lock on a canal works, please.", fresh(0))]
    records = run(teacher(lambda n, body: answers[n]), num_instructions_to_generate=3)
    assert records[:2] == ORIGINALS  # the first answer is near the first of them, and dropped
    assert texts(records[2:]) == [fresh(0)]
    assert ORIGINALS[0]["instruction"] in records[2]["most_similar_instructions"]
    printed = capsys.readouterr().out
    assert "started with 2 records: 0 replies so far" in printed and "(1 new)" in printed


def test_a_run_that_has_enough_asks_nothing_and_writes_nothing(teacher, run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "regen.json").write_text(json.dumps(ORIGINALS))
    before = (tmp_path / "out" / "regen.json").stat().st_mtime_ns
    server = teacher(always_fresh())
    assert run(server, num_instructions_to_generate=2) == ORIGINALS
    assert server.requests == []
    assert (tmp_path / "out" / "regen.json").stat().st_mtime_ns == before
    assert "(0 new)" in capsys.readouterr().out


def test_num_cpus_is_accepted_with_a_note(teacher, run, capsys):
    run(teacher(always_fresh()), num_instructions_to_generate=1, num_cpus=16)
    assert "note: --request_batch_size and --num_cpus are ignored" in capsys.readouterr().out


def test_the_same_seed_and_the_same_replies_give_the_same_bytes_and_another_seed_other_prompts(teacher, run, tmp_path):
    """The teacher answers as one that samples by the request's seed would."""

    def answer(n, body):
        return reply(fresh(body["seed"]))

    path, bytes_, prompts = tmp_path / "out" / "regen.json", [], []
    for seed, concurrency in ((7, 1), (7, 5), (8, 5)):
        server = teacher(answer)
        run(server, num_instructions_to_generate=6, max_concurrency=concurrency, seed=seed)
        bytes_.append(path.read_bytes())
        prompts.append({body["messages"][0]["content"] for body in server.requests})
        shutil.rmtree(path.parent)
    assert bytes_[0] == bytes_[1] != bytes_[2]
    assert prompts[0] <= prompts[1]  # with many in flight some more may have been asked
    assert prompts[0] != prompts[2]


def test_a_continued_run_with_the_same_seed_does_not_ask_the_same_again(teacher, run):
    server = teacher(lambda n, body: reply(fresh(body["seed"])))
    for number in (2, 4):
        run(server, num_instructions_to_generate=number, seed=7)
    asked = [body["seed"] for body in server.requests]
    assert len(set(asked)) == len(asked) == 4


def test_without_a_seed_none_is_sent(teacher, run):
    server = teacher(always_fresh())
    run(server, num_instructions_to_generate=1)
    assert "seed" not in server.requests[0]


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_request_asks_for_a_continuation_and_its_stop_string_is_in_no_good_answer(teacher, run, seeds, api):
    server = teacher(always_fresh())
    run(server, num_instructions_to_generate=1, api=api, temperature=0.5, max_tokens=99, top_p=0.9)
    (body,) = server.requests
    text = body.pop("messages")[0]["content"] if api == "chat" else body.pop("prompt")
    assert body == {"model": "m", "max_tokens": 99, "temperature": 0.5, "top_p": 0.9, "stop": ["\n21. Instruction:"]}
    shown = re.findall(r"Instruction: (.*)\n", text)
    assert len(set(shown)) == 3 and set(shown) <= set(SEEDS)
    tasks = [task for name in shown for task in utils.jload(seeds) if task["instruction"] == name]
    assert text == encode_prompt(tasks, (ROOT / "prompt.txt").read_text())
    for answer in ("It opened in 2020.", "19. s\n20. t\n21. u\n", "x\n20. Instruction: y", "Scored 20.\n"):
        assert body["stop"][0] not in answer


def test_the_last_item_of_a_reply_cut_for_its_length_is_counted_not_kept_and_the_end_names_the_cure(
    teacher, run, tmp_path, capsys
):
    """However whole it looks: without the cut, fresh(1) would be kept."""
    whole = item(fresh(0)) + "###\n5. Instruction:" + item(fresh(1), number=5)
    answers = [(whole, "length"), (item(fresh(2)), "stop")]
    assert texts(run(teacher(lambda n, body: answers[n]), num_instructions_to_generate=2)) == [fresh(0), fresh(2)]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["parsed"], report["kept"], report["dropped"]) == (3, 2, {"cut off": 1})
    (rejected,) = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert rejected == {"reason": "cut off", "record": "5. Instruction:" + item(fresh(1), number=5)}
    assert "\n1 item cut off at the end of a reply: raise --max_tokens\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("I am\n\x1b[2Jsorry. " + "No. " * 60, ["(dropped, most often malformed)", "try another --model_name or"]),
        ((item(fresh(0)), "length"), ["(dropped, most often cut off)", "raise --max_tokens, in another --output_dir"]),
    ],
)
def test_ten_replies_in_a_row_without_a_whole_item_end_the_run_and_one_is_shown(teacher, run, tmp_path, answer, words):
    """The row starts again with each whole item, even one that is dropped; a failed request does not count."""
    server = teacher(lambda n, body: {0: reply(fresh(0)), 5: item("Too short"), 6: "empty"}.get(n, answer))
    with pytest.raises(UserError) as caught:
        run(server, max_total_tokens=10**9)
    message = str(caught.value)
    assert message.startswith("10 replies in a row without a complete item ") and "\n" not in message
    assert all(word in message for word in [*words, "; 1 instruction in "]), message
    shown = message.partition("; a reply begins: ")[2]
    assert shown.startswith(("I am \\x1b[2Jsorry. No.", "Compare red0")) and 50 < len(shown) <= 203
    assert texts(json.loads((tmp_path / "out" / "regen.json").read_text())) == [fresh(0)]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["requests"] - report["unused_replies"] == 1 + 4 + 1 + 1 + 10
    assert report["kept"] + sum(report["dropped"].values()) == report["parsed"] == 2 + 4 + 1 + 10


def test_a_run_that_kept_nothing_is_an_error_that_shows_a_reply(teacher, run, tmp_path):
    server = teacher(lambda n, body: item("Too short"))
    with pytest.raises(UserError) as caught:
        run(server, max_total_tokens=20)
    assert "ended the run; 0 instructions in" in str(caught.value)
    assert str(caught.value).endswith("a reply begins: " + " ".join(item("Too short").split()))
    assert json.loads((tmp_path / "out" / "report.json").read_text())["dropped"] == {"too short": 2}


# ---------------------------------------------------------------------------------------------------------------------
# Replies in JSON.


def as_json(*instructions: str, **more) -> str:
    return json.dumps({"tasks": [{"instruction": text, "input": "", "output": "Yes."} | more for text in instructions]})


def test_with_format_json_the_request_has_a_schema_and_no_stop_string_and_the_reply_is_read(
    teacher, run, seeds, tmp_path
):
    cut = as_json(fresh(2), fresh(3))
    answers = [f"```json\n{as_json(fresh(0), 'Too short')}\n```", (cut[: cut.rindex(":")], "length"), as_json(fresh(4))]
    server = teacher(lambda n, body: answers[n])
    records = run(server, format="json", num_instructions_to_generate=3)
    assert [(record["instruction"], record["output"]) for record in records] == [
        (fresh(number), "Yes.") for number in (0, 2, 4)
    ]
    body = server.requests[0]
    assert body["response_format"] == JSON_SCHEMA and "stop" not in body
    shown = re.findall(r'"instruction": "(.*)"', body["messages"][0]["content"])
    tasks = [task for name in shown for task in utils.jload(seeds) if task["instruction"] == name]
    assert len(tasks) == 3
    assert body["messages"][0]["content"] == encode_json_prompt(tasks, (ROOT / "prompt.txt").read_text())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["dropped"] == {"too short": 1, "cut off": 1}


def test_a_run_is_continued_in_the_format_that_it_was_begun_with(teacher, run):
    run(teacher(lambda n, body: as_json(fresh(0))), format="json", num_instructions_to_generate=1)
    with pytest.raises(UserError, match="was started with --format json: use that"):
        run("http://127.0.0.1:1/v1", num_instructions_to_generate=2)


def test_a_journal_from_before_there_were_formats_is_of_text(teacher, run, tmp_path):
    (tmp_path / "out").mkdir()
    with Journal(tmp_path / "out" / "regen.journal") as journal:
        journal.append([{"seed": 1, "seeded": False, "start": 0, "num_prompt_instructions": 3}])
    with pytest.raises(UserError, match="was started with --format text: use that"):
        run("http://127.0.0.1:1/v1", format="json")
    assert texts(run(teacher(always_fresh()), num_instructions_to_generate=1)) == [fresh(0)]


def test_the_time_limit_ends_a_run_with_a_plain_statement(teacher, run, capsys):
    def answer(n, body):
        time.sleep(0.2)
        return reply(fresh(0))

    assert texts(run(teacher(answer), time_limit=0.5)) == [fresh(0)]
    assert "limit of 0.5 s ended the run short of 100 instructions\n1 instruction in" in capsys.readouterr().out


def test_the_run_goes_on_through_faults_and_ends_with_enough(teacher, run, tmp_path):
    """Seven requests at once, each with its fault: four pass when tried again; for three no try brings a text."""
    faults = iter([429, 500, "reset", "half", "null", "empty", "garbage"])
    asked, textless, lock = set(), {}, threading.Lock()

    def answer(n, body):
        seed = body["seed"]
        with lock:
            again = textless.get(seed - 1) or textless.get(seed - 2)  # a try for a text has the next seed
            fault = again or (None if seed in asked else next(faults, None))
            asked.add(seed)
            if fault in ("null", "empty", "garbage") and not again:
                textless[seed] = fault
        return fault or reply(fresh(seed))

    server = teacher(answer)
    records = run(server, num_instructions_to_generate=5, max_concurrency=7, seed=1)
    assert len(records) == 5
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["failed"] == {
        "empty reply (finish_reason stop)": 1,
        "empty reply (finish_reason None)": 1,
        "unreadable reply (UnicodeDecodeError)": 1,
    }
    assert report["kept"] + sum(report["dropped"].values()) == report["parsed"] >= 5
    assert len(server.requests) == report["requests"] + 4 + 3 * 2  # tries


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"api": "responses"}, ["api must be chat or completions"]),
        ({"model_name": None}, ["no model to ask: set model_name"]),
        ({"max_concurrency": 0}, ["max_concurrency must be at least 1"]),
        ({"num_prompt_instructions": 0}, ["--num_prompt_instructions must be 1 to 4, the number of seed tasks"]),
        ({"num_prompt_instructions": 5}, ["--num_prompt_instructions must be 1 to 4, the number of seed tasks"]),
        ({"format": "xml"}, ["--format must be text or json, not 'xml'"]),
        ({"format": "json", "api": "completions"}, ["--format json needs --api chat"]),
        ({"max_tokens": 0}, ["max_tokens must be at least 1"]),
        ({"seed_tasks_path": "no.jsonl"}, ["no.jsonl does not exist"]),
        ({"prompt_path": "no.txt"}, ["no.txt does not exist"]),
        ({"prompt_path": sys.executable}, ["is not UTF-8"]),
        ({"base_url": "127.0.0.1:8000"}, ["base_url is not a URL"]),
        ({"base_url": None}, ["no server to ask: set OPENAI_API_KEY"]),
    ],
)
def test_bad_input_is_told_before_any_request_and_nothing_is_written(run, tmp_path, flags, words):
    with pytest.raises(UserError) as caught:
        run("http://127.0.0.1:1/v1", **flags)  # a request would end in "no answer from"
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "task",
    [
        {"instruction": "x"},
        {"instruction": "x", "instances": []},
        {"instruction": "x", "instances": [{"input": ""}]},
        {"instruction": "x", "instances": [{"input": None, "output": "y"}]},
        {"instances": [{"input": "", "output": "y"}]},
        ["x"],
        {"instruction": "x", "instances": 3},
    ],
)
def test_a_bad_seed_task_is_told_with_its_number(tmp_path, task):
    path = tmp_path / "seeds.jsonl"
    path.write_text(json.dumps(seed_task("Name a tree.")) + "\n" + json.dumps(task))
    with pytest.raises(UserError, match=r"seeds\.jsonl, task 2: needs an \"instruction\" and \"instances\""):
        utils.load_seed_tasks(str(path))


def test_no_seed_tasks_are_refused(tmp_path):
    (tmp_path / "seeds.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no records"):
        utils.load_seed_tasks(str(tmp_path / "seeds.jsonl"))


def test_the_seed_tasks_and_the_prompt_in_the_repository_are_fit_for_use():
    tasks = utils.load_seed_tasks(str(ROOT / "seed_tasks.jsonl"))
    assert len(tasks) == 175
    text = encode_prompt(tasks[:3], (ROOT / "prompt.txt").read_text())
    assert text.endswith("###\n4. Instruction:") and "List of 20 tasks:\n###\n1. Instruction: " in text
    # Every seed survives the way through a prompt and back, so that no seed teaches the teacher a malformed item.
    *records, cut = parse_response(encode_prompt(tasks, ""), "length", 3)
    assert [record["output"] for record in records] == [task["instances"][0]["output"].strip() for task in tasks]
    assert cut == "176. Instruction:"
    assert parse_json(encode_json_prompt(tasks, ""), "stop") == records


# ---------------------------------------------------------------------------------------------------------------------
# The command, as a user runs it.


def generate(server, out, *flags, env=None) -> subprocess.CompletedProcess:
    argv = ["generate_instruction.py", TASK, "--output_dir", out, "--model_name", "m", *flags]
    return run_script(*argv, *(["--base_url", server.base_url] if server else []), env=env)


@pytest.mark.parametrize(("status", "word"), [(401, "OPENAI_API_KEY"), (402, "credit")])
def test_a_refusal_ends_the_command_at_once_and_the_key_is_nowhere(teacher, tmp_path, status, word):
    server = teacher(lambda n, body: reply(fresh(0)) if n == 0 else status)
    env = {"OPENAI_API_KEY": "sk-secret-7261"}
    result = generate(server, tmp_path, "--max_concurrency", "1", env=env)
    assert_one_line_error(result, f"(HTTP {status}: fault {status})", word)
    assert len(server.requests) == 2
    assert any("sk-secret-7261" in value for value in server.headers[0].values())
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert fresh(0) in written  # what was kept before stays
    assert "secret" not in result.stdout + result.stderr + written


def test_when_every_request_of_a_batch_fails_the_command_ends_with_the_reasons(teacher, tmp_path):
    result = generate(teacher(lambda n, body: "empty" if n == 2 else "null"), tmp_path, "--max_concurrency", "3")
    assert_one_line_error(result, "requests failed", "(empty reply (finish_reason stop)): ", "0 instructions in")
    assert not (tmp_path / "regen.json").exists()
    assert json.loads((tmp_path / "report.json").read_text())["kept"] == 0


def test_an_unknown_flag_is_one_line_with_a_suggestion_and_contacts_no_teacher(teacher, tmp_path):
    server = teacher(always_fresh())
    result = generate(server, tmp_path / "out", "--num_instruction_to_generate", "1")
    assert_one_line_error(result, "--num_instruction_to_generate", "did you mean --num_instructions_to_generate?")
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert server.requests == [] and not (tmp_path / "out").exists()


def test_without_a_teacher_the_command_is_one_line(tmp_path):
    result = generate(None, tmp_path / "out")
    assert_one_line_error(result, "no server to ask", "OPENAI_API_KEY", "base_url")
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_made_is_told_before_any_request(teacher, tmp_path):
    (tmp_path / "out").write_text("a file")
    server = teacher(always_fresh())
    assert_one_line_error(generate(server, tmp_path / "out"), str(tmp_path / "out"), "exists")
    assert server.requests == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_was_kept_without_a_traceback_and_without_waiting_for_the_teacher(teacher, tmp_path, number):
    """The teacher gives one reply and is then silent until the command has ended."""
    asked, ended = threading.Event(), threading.Event()

    def answer(n, body):
        if n == 0:
            return reply(fresh(0))
        asked.set()
        ended.wait(60)
        return "too late"

    argv = ["generate_instruction.py", TASK, "--output_dir", tmp_path, "--model_name", "m", "--max_concurrency", "1"]
    process = subprocess.Popen(
        [sys.executable, *argv, "--base_url", teacher(answer).base_url],
        cwd=ROOT,
        env=os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert asked.wait(60)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)  # the reply would come after 60 s
    finally:
        ended.set()
        process.kill()
    assert process.returncode == 128 + number and "the same command continues" in errors
    assert "Traceback" not in errors and errors.endswith("\ninterrupted\n")
    assert texts(json.loads((tmp_path / "regen.json").read_text())) == [fresh(0)]
    names = ["regen.journal", "regen.json", "rejected.jsonl", "report.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def documented_commands() -> list[list[str]]:
    lines = re.findall(r"^    python (.*)$", generate_instruction.__doc__.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(line) for line in lines]


def test_every_documented_command_is_one_that_the_script_takes():
    commands = documented_commands()
    assert len(commands) == 3
    for script, *argv in commands:
        assert script == "generate_instruction.py"
        tasks = {TASK: generate_instruction.generate_instruction_following_data, "dedup": generate_instruction.dedup}
        assert cli.parse(tasks, argv)[1]
        with pytest.raises(UserError, match="unknown flag"):  # a wrong name would be found
            cli.parse(tasks, [*argv, "--model_nam", "x"])


def test_the_flags_of_the_original_are_taken_with_their_values():
    """The command line in the original's README."""
    argv = (
        f"{TASK} --output_dir ./ --num_instructions_to_generate 10 --model_name text-davinci-003 "
        "--seed_tasks_path ./seed_tasks.jsonl --num_prompt_instructions 3 --request_batch_size 5 "
        "--temperature 1.0 --top_p 1.0 --num_cpus 16"
    )
    _, values = cli.parse({TASK: generate_instruction.generate_instruction_following_data}, argv.split())
    assert {name: value for name, value in values.items() if isinstance(value, str | int | float)} == {
        "output_dir": "./",
        "num_instructions_to_generate": 10,
        "model_name": "text-davinci-003",
        "seed_tasks_path": "./seed_tasks.jsonl",
        "num_prompt_instructions": 3,
        "request_batch_size": 5,
        "temperature": 1.0,
        "top_p": 1.0,
        "num_cpus": 16,
    }


def test_importing_the_script_loads_neither_torch_nor_an_api_client():
    loaded = run_script("-c", "import sys, generate_instruction; print(*sys.modules)").stdout.split()
    assert "generate_instruction" in loaded and not {"torch", "transformers", "openai"} & set(loaded)


def test_a_teacher_that_repeats_itself_ends_the_run(teacher, tmp_path):
    reply = " Name two long rivers.\n4. Input:\n<noinput>\n4. Output:\nNile, Po\n"
    server = teacher(lambda number, body: reply)
    result = run_script(
        *("generate_instruction.py", "generate_instruction_following_data", "--base_url", server.base_url),
        *("--model_name", "local", "--max_concurrency", 1, "--output_dir", tmp_path),
    )
    assert result.returncode == 0, result.stderr
    assert "replies in a row without a new one (dropped, most often near-duplicate) ended the run" in result.stdout
    assert 101 <= len(server.requests) <= 103
    assert [record["instruction"] for record in json.loads((tmp_path / "regen.json").read_text())] == [
        "Name two long rivers."
    ]


def test_after_a_run_is_over_a_late_reply_changes_nothing():
    """How many are still in flight then depends on the clock; what is kept may not."""
    rejected = io.StringIO()
    selection = generate_instruction.Selection([seed_task(SEEDS[0])], [], 2, DRAW, Filters(), True, rejected)
    for _ in range(generate_instruction.PATIENCE):
        selection.feed(Completion(None, error="timeout"))
    assert not selection.is_over()  # a failure says nothing about what the teacher still knows
    for _ in range(generate_instruction.PATIENCE):
        selection.feed(Completion(item("Too short"), "stop"))
    assert selection.is_over()
    selection.feed(Completion(item(fresh(0)), "stop"))
    assert (selection.kept, selection.parsed, selection.unused) == ([], generate_instruction.PATIENCE, 1)


def test_the_forecast_follows_what_a_teacher_brings_and_in_flight_requests_stay_few():
    """A teacher that brings one new instruction in two replies: 12 more take 24."""
    selection = generate_instruction.Selection([seed_task(SEEDS[0])], [], 20, DRAW, Filters(), True, io.StringIO())
    assert selection.replies_left(others=4) == 10
    for i in range(16):
        selection.feed(Completion(item(fresh(i)) if i % 2 else item("Too short"), "stop"))
    assert selection.new() == 8
    assert selection.replies_left(others=0.5) == 12 / (9 / 16.5) == 22
    assert selection.replies_left(others=4) == 12 / (16 / 20) == 15
    assert selection.round_left() == 12 / (8 * 1.5 / 16) == 16


def test_the_bars_time_left_counts_the_time_in_which_nothing_was_new(monkeypatch, capsys):
    """One of ten in 131 seconds, none of them in the first 100: nine take 1,179 seconds."""
    now, done = [0.0], [0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    budget = Budget(RequestSettings())

    async def ten() -> None:
        async with parallel.progress_bar(budget, "", 10, lambda: done[0], lambda: 9, exact=False):
            await asyncio.sleep(0.1)
            now[0] += 100
            await asyncio.sleep(0.6)
            now[0] += 31
            done[0] += 1

    asyncio.run(ten())
    drawn = capsys.readouterr().err
    assert re.findall(r"1/10 \[02:11<([\d:]+)", drawn) == ["19:39", "19:39"], drawn  # with the news, and at the end


def test_a_rejected_record_is_kept_with_its_reason_its_text_and_its_nearest():
    rejected = io.StringIO()
    selection = generate_instruction.Selection([seed_task(SEEDS[0])], [], 9, DRAW, Filters(), True, rejected)
    selection.feed(Completion(reply(fresh(0), SEEDS[0] + " Now", fresh(0) + " now"), "stop"))
    notes = [json.loads(line) for line in rejected.getvalue().splitlines()]
    assert [(note["reason"], note.get("nearest")) for note in notes] == [
        ("near-duplicate", SEEDS[0]),
        ("near-duplicate", fresh(0)),
        ("malformed", None),
    ]
    assert notes[0]["record"]["instruction"] == SEEDS[0] + " Now" and notes[2]["record"] == "7. Instruction:"
    assert texts(selection.kept) == [fresh(0)]


def test_a_refused_request_is_told_in_the_servers_words_but_not_with_the_key(teacher, tmp_path):
    server = teacher(lambda number, body: 400)
    key = "fault"  # what the server's message says, as a server that repeats the key would
    result = run_script(
        *("generate_instruction.py", "generate_instruction_following_data", "--base_url", server.base_url),
        *("--model_name", "local", "--max_concurrency", 1, "--output_dir", tmp_path),
        env={"OPENAI_API_KEY": key},
    )
    assert_one_line_error(result, "HTTP 400: ")
    assert key not in result.stdout + result.stderr


@pytest.mark.parametrize("argv", [["generate_instruction.py", TASK], ["judge.py", "answer"], ["judge.py", "judge"]])
def test_every_task_that_asks_a_server_has_the_flags_of_a_request_with_their_descriptions(argv):
    printed = run_script(*argv, "--help").stdout
    for name in ("base_url", "max_concurrency", "request_timeout", "time_limit", "max_total_tokens", "max_cost_usd"):
        assert re.search(rf"^    --{name} \(.*\)\n        \w", printed, re.M), name
    for name in ("prompt_price", "completion_price", "max_failure_rate"):
        assert re.search(rf"^    --{name} \(number, default: 0\.\d\)\n        \w", printed, re.M), name


def test_what_is_kept_is_written_while_one_request_holds_up_the_others(teacher, tmp_path, monkeypatch):
    """The third request waits for the files. What came before it is in regen.json and report.json meanwhile."""
    monkeypatch.setattr(parallel, "SAVE_EVERY", 0.2)
    meanwhile = []

    def answer(number, body):
        end = time.monotonic() + 10
        while number == 2 and time.monotonic() < end and (2, 2) not in meanwhile:
            time.sleep(0.05)
            if (tmp_path / "report.json").exists():
                report = json.loads((tmp_path / "report.json").read_text())
                meanwhile.append((len(json.loads((tmp_path / "regen.json").read_text())), report["kept"]))
        return reply(fresh(number))

    call(
        generate_instruction.generate_instruction_following_data,
        **{"output_dir": str(tmp_path), "model_name": "m", "base_url": teacher(answer).base_url},
        **{"num_instructions_to_generate": 6, "max_concurrency": 1, "similarity_stats": False},
    )
    assert (2, 2) in meanwhile
    assert len(json.loads((tmp_path / "regen.json").read_text())) == 6
