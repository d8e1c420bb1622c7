"""Replies: what the prompt shows, and what is read from any text that a teacher sends back."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from alpaca.data.replies import encode_prompt, parse_response
from generate_instruction import Filters, filter_reason

quick = settings(deadline=None, database=None, max_examples=100)

# ---------------------------------------------------------------------------------------------------------------------
# encode_prompt.


def seed_task(instruction: str, input: str = "", output: str = "Oak.") -> dict:
    return {"instruction": instruction, "instances": [{"input": input, "output": output}]}


def test_the_request_is_the_prompt_then_numbered_examples_then_the_number_to_go_on_with():
    tasks = [seed_task("Name a tree."), seed_task(" Sort\n the  words :", "b a\nc", "a b c")]
    assert encode_prompt(tasks, "List of 20 tasks:\n\n") == (
        "List of 20 tasks:\n"
        "###\n1. Instruction: Name a tree.\n1. Input:\n<noinput>\n1. Output:\nOak.\n"
        "###\n2. Instruction: Sort the words \n2. Input:\nb a\nc\n2. Output:\na b c\n"
        "###\n3. Instruction:"
    )


# ---------------------------------------------------------------------------------------------------------------------
# parse_response.

TREE = {"instruction": "Name a tree.", "input": "", "output": "Oak."}
SUM = {"instruction": "Add the numbers.", "input": "2, 3", "output": "5"}


def test_a_reply_that_goes_on_where_the_prompt_ended_is_read():
    text = (
        " Name a tree.\n4. Input:\n<noinput>\n4. Output:\nOak.\n"
        "###\n5. Instruction: Add the numbers.\n5. Input:\n2, 3\n5. Output:\n5\n###\n"
    )
    assert parse_response(text, "stop", 3) == [TREE, SUM]


@pytest.mark.parametrize(
    "opening", ["", "4. Instruction:", "###\n4. Instruction:", "\n ### 4. Instruction:", "1.Instruction:"]
)
def test_a_reply_may_repeat_the_number_or_the_separator(opening):
    number = re.search(r"\d|$", opening)[0] or "4"
    text = f"{opening} Name a tree.\n{number}. Input:\n<noinput>\n{number}. Output:\nOak.\n"
    assert parse_response(text, "stop", 3) == [TREE]


@pytest.mark.parametrize("reason", ["length", "max_tokens", "model_length", "abort"])
def test_a_reply_that_did_not_come_to_its_end_loses_its_last_item(reason):
    text = (
        " Name a tree.\n4. Input:\n<noinput>\n4. Output:\nOak.\n###\n5. Instruction: Add.\n5. Input:\n1\n5. Output:\n2"
    )
    assert parse_response(text, reason, 3) == [TREE]


@pytest.mark.parametrize(
    "text", ["\n" * 200_000, "1" * 200_000, "x\n" + "1" * 5000 + ". Instruction: a", "###\n" * 50_000]
)
def test_a_degenerate_reply_is_read_at_once(text):
    """Patterns without bounds took minutes here, or raised on a number of 5,000 digits."""
    assert all(isinstance(item, str) for item in parse_response(text, "stop", 3))


@pytest.mark.parametrize("noinput", ["<noinput>", "<NoInput>", " <NOINPUT> ", ""])
def test_no_input_is_read_in_any_case(noinput):
    assert parse_response(f"Name a tree.\n4. Input: {noinput}\n4. Output: Oak.", "stop", 3) == [TREE]


@pytest.mark.parametrize(
    "output",
    [
        "It opened in 2020.",
        "In 2020. Later it closed.",
        "20. Twenty\n21. Twenty-one",
        "### Steps\n\n1. Mix.\n2. Bake.\n\n### Notes\nServe.",
        "### 3 ways\n# one",
        "Instruction: none. Input: none. Output: none.",
        "a ## b #### c",
    ],
)
def test_an_answer_keeps_its_numbers_and_headings(output):
    text = f" Name a tree.\n4. Input:\n<noinput>\n4. Output:\n{output}\n"
    text += "###\n5. Instruction: Add the numbers.\n5. Input:\n2, 3\n5. Output:\n5"
    assert parse_response(text, "stop", 3) == [TREE | {"output": output}, SUM]


@pytest.mark.parametrize(
    "text",
    [
        " Name a tree.\n4. Input:\n<noinput>\n4. Output:\nOak.\n12. Instruction: Add.\n12. Input:\n1\n12. Output:\n2",
        " Name a tree.\n4. Input:\n<noinput>\n4. Output:\nSay 12. Instruction: like this",
        " Name a tree.\n4. Output:\nOak.",
        " Name a tree.\n4. Output:\nOak.\n4. Input:\n<noinput>",
        " Name a tree.\n4. Input:\n<noinput>\n5. Output:\nOak.",
        " Name a tree.\n4. Input:\n1\n4. Input:\n2\n4. Output:\nOak.",
        " Name a tree.",
        "I am sorry, but I cannot help with that.",
        "",
    ],
)
def test_an_item_that_is_not_one_instruction_one_input_one_output_stays_text(text):
    assert parse_response(text, "stop", 3) == ["4. Instruction:" + text]


def test_a_bad_item_leaves_its_neighbours():
    text = " Name a tree.\n4. Input:\n\n4. Output:\nOak.\n###\n5. Instruction: x\n"
    text += "###\n6. Instruction: Add the numbers.\n6. Input: 2, 3\n6. Output: 5"
    assert parse_response(text, "stop", 3) == [TREE, "5. Instruction: x\n", SUM]


# Texts with many separators and fields, so that chance meets the grammar.
pieces = st.one_of(
    st.sampled_from(
        ["###", "\n", " ", "4.", "5. ", "12", "Instruction:", "Input:", "Output:", "<noinput>", "in 2020."]
    ),
    st.text(max_size=5),
)
replies = st.one_of(st.text(), st.lists(pieces, max_size=40).map("".join))
reasons = st.sampled_from(["stop", "length", None, "content_filter", "tool_calls"])


@quick
@given(replies, reasons, st.integers(1, 30))
def test_any_reply_is_parsed_into_records_with_three_texts_or_stays_text_and_each_can_be_filtered(text, reason, number):
    for record in parse_response(text, reason, number):
        if isinstance(record, str):
            assert filter_reason(record) == "malformed"
        else:
            assert [type(value) for value in record.values()] == [str, str, str]
            assert list(record) == ["instruction", "input", "output"]
            assert filter_reason(record) is None or isinstance(filter_reason(record), str)
            assert filter_reason(record, Filters(tokenizer="unicode")) != "malformed"


@quick
@given(replies, st.integers(1, 30))
@example(" Name a tree.\n4. Input:\n<noinput>\n4. Output:\nOak.\n###", 3)
def test_a_reply_cut_for_its_length_loses_exactly_its_last_item(text, number):
    assert parse_response(text, "length", number) == parse_response(text, "stop", number)[:-1]


# Numbers, dots and hashes, as in "2020." and "###", but no colon: no field.
words = st.lists(st.text("Axé#019.,", min_size=1, max_size=6), min_size=1, max_size=6).map(" ".join)
tasks = st.lists(st.builds(seed_task, words, words | st.just(""), words), min_size=1, max_size=5)


@quick
@given(tasks)
def test_what_encode_prompt_writes_parse_response_reads(tasks):
    records = [task["instances"][0] | {"instruction": task["instruction"]} for task in tasks]
    last = f"{len(tasks) + 1}. Instruction:"  # which has only its number
    assert parse_response(encode_prompt(tasks, ""), "stop", 3) == [*records, last]
    assert parse_response(encode_prompt(tasks, ""), "length", 3) == records


def test_what_a_chat_model_says_before_its_first_item_is_left_out():
    text = (
        "Sure, here are some tasks:\n\n4. Instruction: Name two rivers.\n4. Input:\n<noinput>\n4. Output:\nNile, Po\n"
    )
    assert parse_response(text, "stop", 3) == [{"instruction": "Name two rivers.", "input": "", "output": "Nile, Po"}]
