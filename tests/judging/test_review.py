"""alpaca/judging/review: which marks a reply contains, and what reviews come to, by literal values."""

from __future__ import annotations

import math

import pytest
from conftest import ROOT, assert_user_error

from alpaca.endpoint.client import Completion
from alpaca.judging import statistics
from alpaca.judging.review import outcome
from alpaca.judging.review.marks import Rubric

RUBRIC = Rubric(ROOT / "configs" / "review" / "rubric.txt")
CRITERIA = ["True", "Complete", "Follows", "Self-contained", "Safe"]
BARE = "Reason: Fine.\nTrue: 4\nComplete: 5\nFollows: 3\nSelf-contained: 5\nSafe: 2"
SCORES = dict(zip(CRITERIA, (4, 5, 3, 5, 2), strict=True))
FENCE = "~" * 8


def with_true(line: str) -> str:
    return BARE.replace("True: 4", line)


@pytest.mark.parametrize(
    "reply",
    [
        BARE,
        BARE.upper(),
        BARE.replace("\n", "\r\n"),
        BARE.replace("\n", "\n\n"),
        "\n".join(reversed(BARE.split("\n"))),
        f"```\n{BARE}\n```",
        f"<think>\n{BARE.replace('4', '1')}\n</think>\n{BARE}",
        with_true("**True:** 4"),
        with_true("**True**: 4"),
        with_true("- True: **4**"),
        with_true("1. True: 4/5"),
        with_true("### True: [4]"),
        with_true("| True | 4 |"),
        with_true("True – 4"),
        with_true("True：4。"),
        with_true("True score: 4 out of 5"),
        with_true("True: <4>"),
        with_true("True: 4 (one date is off)"),
        with_true("True: 4 - one date is off"),
        with_true('  "True": 4,'),
        with_true("True: 4\nTrue: 4"),
        f"{BARE}\n\nCorrected:\n{FENCE}\nTrue: 1\n{FENCE}",
        f"Corrected:\n{FENCE}\nTrue: 1\n{FENCE}\n{BARE}",
        f"{BARE}\nCorrected answer:\nTrue: 1",
    ],
)
def test_marks_are_read_however_a_reviewer_writes_them(reply):
    assert RUBRIC.read(reply).scores == SCORES


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "The record is fine.",
        BARE.replace("Safe: 2", ""),
        f"<think>\n{BARE}",
        f"Corrected:\nParis\n{BARE}",  # nobody knows where the answer ends
        *map(
            with_true,
            ["True: <1-5>", "True: 4-5", "True: 4 or 5", "True: 4.5", "True: 0", "True: 6", "True: 45", "True: four"],
        ),
        *map(with_true, ["True: 4 (or 5)", "True: 4\nTrue: 5", "True: 4/10", "True:", "It is true: 4", "True: -4"]),
        with_true("True: 4, Complete: 5"),
    ],
)
def test_a_score_is_never_guessed(reply):
    assert RUBRIC.read(reply) is None


def test_a_long_degenerate_reply_ends():
    """In quadratic time this would take hours."""
    for text in ("*" * 300_000, "True: " * 60_000, "Corrected:\n~~~\n" * 20_000, "- 1. " * 60_000, "<" * 300_000):
        assert RUBRIC.read(text) is None


@pytest.mark.parametrize(
    ("tail", "corrected"),
    [
        (f"Corrected:\n{FENCE}\nParis.\n\nTrue: 1\n{FENCE}", "Paris.\n\nTrue: 1"),
        (f"**Corrected answer:**\n\n{FENCE}\nParis.\n{FENCE}\nI hope this helps.", "Paris."),
        (f"Corrected:\n{FENCE}\n```python\nx = 1\n```\n{FENCE}", "```python\nx = 1\n```"),
        ("Corrected:\n```text\nParis.\n```", "Paris."),
        ("Corrected: None", None),
        (f"Corrected:\n{FENCE}\nNone.\n{FENCE}", None),
        (f"Corrected:\n{FENCE}\n<the whole corrected answer>\n{FENCE}", None),
        (f"Corrected:\n{FENCE}\n\n{FENCE}", None),
        ("Corrected:\nParis.\nI hope this helps.", None),  # without a fence
        (f"Corrected:\n{FENCE}\nParis.", None),  # without its end
        ("Corrected:\n```\na\n```python\nx = 1\n```\nb\n```", None),  # with several ends
        ("", None),
    ],
)
def test_a_corrected_answer_is_taken_only_where_its_end_is_certain(tail, corrected):
    marks = RUBRIC.read(f"{BARE}\n\n{tail}")
    assert (marks.scores, marks.corrected) == (SCORES, corrected)


def test_the_reason_is_what_remains():
    assert RUBRIC.read("**Reason:** 3 + 4 is 7,\nnot 8.\n" + BARE.partition("\n")[2] + "\nCorrected: none").reason == (
        "3 + 4 is 7,\nnot 8."
    )


def test_the_committed_rubrics_ask_about_the_last_answer_and_quote_it():
    for name, criteria in (("short.txt", ["True"]), ("rubric.txt", CRITERIA)):
        rubric = Rubric(ROOT / "configs" / "review" / name)
        assert rubric.criteria == criteria
        text = "\n" + rubric.prompt({"instruction": "Name a river.", "input": "in Asia", "output": "~~~~~~~~~~ {task}"})
        fence = "~" * 11
        assert f"\n{fence}\nName a river.\n\n### Input:\nin Asia\n{fence}\n" in text
        assert f"\n{fence}\n~~~~~~~~~~ {{task}}\n{fence}\n" in text
    talk = [("user", "Hi."), ("assistant", "Hello."), ("user", "Bye."), ("assistant", "Ciao.")]
    messages = [{"role": role, "content": content} for role, content in talk]
    text = rubric.prompt({"instruction": "Hi.", "input": "", "output": "Hello.", "messages": messages})
    assert "\nUser: Hi.\n\nAssistant: Hello.\n\nUser: Bye.\n~~~~~~~~\n" in text and "\nCiao.\n" in text


def test_a_rubric_without_what_is_filled_in_or_read_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("{task} {fence}\nTrue: <1-5>\n")
    assert_user_error(lambda: Rubric(tmp_path / "a.txt"), "lacks {answer}: add it, as in the prompts in configs/")
    (tmp_path / "b.txt").write_text("{task} {answer} {fence}\nGive a score from 1 to 5.\n")
    assert_user_error(lambda: Rubric(tmp_path / "b.txt"), 'asks for no score: give each criterion a line such as "True')


# ---------------------------------------------------------------------------------------------------------------------
# What reviews come to.


def record(number: int) -> dict:
    return {"instruction": f"Say {number}.", "input": "", "output": f"{number}"}


def reply(*scores: int, corrected: str = "") -> Completion:
    lines = [f"{name}: {score}" for name, score in zip(CRITERIA, scores, strict=True)]
    tail = f"\nCorrected:\n{FENCE}\n{corrected}\n{FENCE}" if corrected else ""
    return Completion("Reason: So.\n" + "\n".join(lines) + tail, "stop", 7, 5, model="m-1")


GOOD, BAD = (5, 5, 5, 5, 5), (2, 5, 5, 5, 5)
FAILED = Completion("What?", "stop", 7, 5, error="no verdict in 3 replies")
FIRST = [
    reply(*GOOD),
    reply(*BAD),
    reply(*BAD, corrected="one"),
    reply(*BAD, corrected="3"),
    FAILED,
    None,
    reply(*GOOD),
]
SECOND = [reply(*GOOD), reply(3, 3, 3, 3, 3), reply(*BAD, corrected="two"), *[reply(*GOOD)] * 3, reply(*GOOD)]


def test_the_lowest_score_of_all_counts_and_the_first_correction():
    records = [record(i) for i in range(7)]
    rows = outcome.outcomes(records, {"a": FIRST, "b": SECOND}, RUBRIC, 3)
    actions = ["kept", "dropped", "corrected", "dropped", "failed", "not asked", "kept"]  # 3: corrected to what it was
    assert [row["action"] for row in rows] == actions
    assert rows[1]["scores"] == dict(zip(CRITERIA, (2, 3, 3, 3, 3), strict=True))
    assert rows[2]["reviews"][1] == {
        "model": "b",
        "answered_by": "m-1",
        "scores": dict(zip(CRITERIA, BAD, strict=True)),
        "reason": "So.",
        "corrected": "two",
        "error": None,
    }
    assert (rows[4]["scores"], rows[4]["reviews"][0]["reason"]) == (None, "What?")
    assert {row["rubric_sha256"] for row in rows} == {RUBRIC.sha256}
    keep, drop = outcome.split(records, rows)
    corrected = record(2) | {"output": "one", "review": rows[2] | {"original_output": "2"}}
    assert keep == [record(0), corrected, record(6)]
    assert drop == [record(1) | {"review": rows[1]}, record(3) | {"review": rows[3]}]


@pytest.mark.parametrize(("min_score", "action"), [(1, "kept"), (3, "kept"), (4, "dropped")])
def test_the_lowest_score_to_keep_is_kept(min_score, action):
    [row] = outcome.outcomes([record(0)], {"a": [reply(5, 4, 3, 4, 5)]}, RUBRIC, min_score)
    assert row["action"] == action


def test_a_correction_by_one_who_would_keep_the_record_is_not_taken():
    rows = outcome.outcomes([record(0)], {"a": [reply(*GOOD, corrected="x")], "b": [reply(*BAD)]}, RUBRIC, 3)
    assert rows[0]["action"] == "dropped"


def test_of_a_conversation_the_last_answer_is_corrected_and_an_earlier_review_stays():
    talk = [("user", "Hi."), ("assistant", "Hello."), ("user", "Bye."), ("assistant", "Hello.")]
    messages = [{"role": role, "content": content} for role, content in talk]
    records = [{"instruction": "Hi.", "input": "", "output": "Hello.", "messages": messages, "review": {"record": 9}}]
    rows = outcome.outcomes(records, {"a": [reply(*BAD, corrected="Ciao.")]}, RUBRIC, 3)
    [keep], _ = outcome.split(records, rows)
    assert keep["output"] == "Hello."
    assert [message["content"] for message in keep["messages"]] == ["Hi.", "Hello.", "Bye.", "Ciao."]
    assert (keep["review"]["original_output"], keep["review"]["earlier"]) == ("Hello.", {"record": 9})


def test_the_figures_by_literal_values():
    rows = outcome.outcomes([record(i) for i in range(7)], {"a": FIRST, "b": SECOND}, RUBRIC, 3)
    found = outcome.figures(rows, CRITERIA, 3)
    assert found["actions"] == {"kept": 2, "corrected": 1, "dropped": 2, "failed": 1, "not asked": 1}
    first, second = found["reviewers"]
    assert (first["reviewed"], second["reviewed"]) == (5, 7)
    assert first["failed"] == {"no verdict in 3 replies": 1} and second["failed"] == {}
    assert first["scores"]["True"] == {"1": 0, "2": 3, "3": 0, "4": 0, "5": 2}
    assert second["scores"]["Safe"] == {"1": 0, "2": 0, "3": 1, "4": 0, "5": 6}
    assert first["low"] == {"True": 3} | dict.fromkeys(CRITERIA[1:], 0) and second["low"]["True"] == 1
    agreement = found["agreement"]
    # Of both: True is 5, 2, 2, 2, 5 and 5, 3, 2, 5, 5. Squares 0, 1, 0, 9, 0, mean 2; variances 2.16 and 1.6, means
    # 3.2 and 4: 2 / (2.16 + 1.6 + 0.64) = 0.4545.
    assert agreement["True"] == {"records": 5, "same": 0.6, "kappa": pytest.approx(1 - 2 / 4.4)}
    # Kept: yes no no no yes, and yes yes no yes yes. p_o 0.6, p_e (2·4 + 3·1)/25 = 0.44, kappa 0.16/0.56.
    assert agreement["kept"] == {"records": 5, "same": 0.6, "kappa": pytest.approx(0.16 / 0.56)}
    assert agreement["Safe"]["kappa"] == pytest.approx(0)  # the first says 5 each time


def test_weighted_kappa_is_that_of_its_definition_and_cohens_of_two_values():
    a, b = [1, 2, 3, 4, 5, 5, 3, None, 2], [1, 3, 3, 2, 5, 4, 1, 2, None]
    both = [(x, y) for x, y in zip(a, b, strict=True) if x and y]
    chance = sum((x - y) ** 2 for x, _ in both for _, y in both) / len(both) ** 2
    expected = 1 - sum((x - y) ** 2 for x, y in both) / len(both) / chance
    assert statistics.weighted_kappa(a, b) == pytest.approx(expected) and 0 < expected < 1
    two = [0, 0, 1, 1, 1, 0, 1], [0, 1, 1, 1, 0, 0, 1]
    assert statistics.weighted_kappa(*two) == pytest.approx(statistics.cohens_kappa(*two))
    assert math.isnan(statistics.weighted_kappa([5, 5], [5, 5])) and math.isnan(statistics.weighted_kappa([], []))
