"""What request i asks, as a function of the seed, of i, and of what it may show."""

from __future__ import annotations

import random
import re

import pytest

from alpaca import UserError
from alpaca.data.requests import ABOUT, LABELS, Draw, encode_prompt
from alpaca.data.topics import Topic

PROMPT = "Come up with tasks.\n1. Be brief.\n\nList of 20 tasks:\n"


def task(name: str, classification: bool = False) -> dict:
    instance = {"input": f"in {name}", "output": f"out {name}"}
    return {"instruction": name, "instances": [instance], "is_classification": classification}


def record(name: str, **more) -> dict:
    return {"instruction": name, "input": "", "output": f"out {name}"} | more


SEEDS = [task(f"s{i}") for i in range(8)]
KEPT = [record(f"k{i}") for i in range(6)]

DRAWN = [
    "s5 s4 s7 k2 s2 s1 s0 k3".split(),
    "s6 s0 s1 s5 s4 k3 s2 k4".split(),
    "k1 s4 s7 s6 s2 s3 k3 s5".split(),
]


def shown(text: str) -> list[str]:
    return re.findall(r"^\d+\. Instruction: (\w+)$", text, re.M)


def test_without_more_a_request_is_the_one_that_it_always_was():
    for i in range(20):
        rng = random.Random(f"7/{i}")
        old = encode_prompt(rng.sample(SEEDS, 3), PROMPT), rng.randrange(2**31)
        assert Draw(PROMPT, SEEDS, 7).request(i, KEPT) == old


def test_two_of_the_eight_are_what_was_kept_and_the_draw_is_this_one():
    draw = Draw(PROMPT, SEEDS, 7, examples=8, generated=2)
    assert [shown(draw.request(i, KEPT)[0]) for i in range(3)] == DRAWN


def test_until_enough_is_kept_seed_tasks_take_the_place_and_the_numbers_stay():
    draw = Draw(PROMPT, SEEDS, 7, examples=4, generated=2)
    for kept in range(4):
        text = draw.request(1, KEPT[:kept])[0]
        names = shown(text)
        assert len(names) == 4 and sum(name.startswith("k") for name in names) == min(kept, 2)
        assert text.endswith("###\n5. Instruction:")


def test_a_request_depends_on_nothing_but_the_seed_its_number_and_what_it_may_show():
    draw = Draw(PROMPT, SEEDS, 7, generated=2)
    later = [draw.request(i, KEPT) for i in reversed(range(9))][::-1]
    assert later == [Draw(PROMPT, SEEDS, 7, generated=2).request(i, KEPT) for i in range(9)]
    assert draw.request(0, KEPT) != draw.request(0, KEPT[:2])


def test_the_topic_is_named_before_the_last_line_with_its_note():
    topics = [Topic("chess", note="Openings only."), Topic("tea")]
    draw = Draw(PROMPT, SEEDS, 7, topics=topics)
    about = ABOUT.format(number=4, topic="chess")
    opening = f"Come up with tasks.\n1. Be brief.\n\n{about} Openings only.\n\nList of 20 tasks:\n###\n1. Instruction: "
    assert draw.request(2, [])[0].startswith(opening)
    assert [draw.topic(i).name for i in range(4)] == ["chess", "tea", "chess", "tea"]
    assert (
        Draw("Tasks:", SEEDS, 7, topics=topics)
        .request(1, [])[0]
        .startswith("From task 4 on, each task is about this topic: tea.\n\nTasks:\n###\n1.")
    )


def test_classification_is_asked_for_apart_as_often_as_among_the_seed_tasks_and_label_first():
    seeds = SEEDS + [task(f"c{i}", True) for i in range(4)]
    draw = Draw(PROMPT, seeds, 7, generated=1, output_first=True)
    kept = [*KEPT, record("kc", is_classification=True)]
    asked = [draw.asks_labels(i) for i in range(3000)]
    assert 0.30 < sum(asked) / 3000 < 0.37  # 4 of 12
    for i in range(40):
        text = draw.request(i, kept)[0]
        names = shown(text)
        assert {name[:1] for name in names if name != "kc"} <= ({"c"} if asked[i] else {"s", "k"})
        assert ("kc" in names) == asked[i] == (LABELS in text)
        order = re.findall(r"^1\. (\w+):", text, re.M)
        assert order == (["Instruction", "Output", "Input"] if asked[i] else ["Instruction", "Input", "Output"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"generated": 4}, "generated_in_prompt must be 0 to 3, the examples in a request"),
        ({"generated": -1}, "generated_in_prompt must be 0 to 3"),
        (
            {"output_first": True},
            r'needs 3 seed tasks that are classification \("is_classification"\), and there are 0',
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        Draw(PROMPT, SEEDS, 7, **options)
