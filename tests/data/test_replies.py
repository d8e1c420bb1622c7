"""Replies: what the prompt shows, and what is read from any text that a teacher sends back."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca.data.replies import CutOff, parse_json, parse_response
from alpaca.data.requests import JSON_SCHEMA, encode_json_prompt, encode_prompt
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


TWO = " Name a tree.\n4. Input:\n<noinput>\n4. Output:\nOak.\n###\n5. Instruction: Add the numbers.\n5. Input:\n2, 3\n"
TWO += "5. Output:\n5"


def test_the_last_item_of_a_reply_cut_for_its_length_is_not_a_record_however_whole_it_looks():
    tree, cut = parse_response(TWO, "length", 3)
    assert tree == TREE and type(cut) is CutOff
    assert cut == "5. Instruction: Add the numbers.\n5. Input:\n2, 3\n5. Output:\n5"


@pytest.mark.parametrize("reason", ["stop", None, "", "eos", "content_filter", "banana"])
def test_a_reply_with_any_other_finish_reason_is_whole(reason):
    assert parse_response(TWO, reason, 3) == [TREE, SUM]


@pytest.mark.parametrize("end", ["\n#", "\n##", "\n###", "\n###\n", "\n###\n\n"])
def test_a_reply_cut_in_the_separator_keeps_its_last_whole_record(end):
    assert parse_response(TWO + end, "length", 3) == [TREE, SUM]


def test_a_reply_cut_in_the_next_header_keeps_its_last_whole_record_and_the_rest_is_cut_off():
    assert parse_response(TWO + "\n###\n6. Instr", "length", 3) == [TREE, SUM, CutOff("6. Instr")]


@pytest.mark.parametrize("end", ["\n### Steps\n\n1. Mix.\n\n#", "\n```\nx = 1\n#", "\n### 3 ways", "\n# ", "\n### "])
def test_a_reply_cut_in_a_heading_or_a_comment_of_an_answer_does_not_keep_that_answer(end):
    assert [item for item in parse_response(TWO + end, "length", 3) if isinstance(item, dict)] == [TREE]


@pytest.mark.parametrize("text", ["", "4. Instruction: Name a tree.\n4. Input:\n\n4. Output:\n#"])
def test_a_cut_reply_without_a_whole_record_has_none(text):
    assert [type(item) for item in parse_response(text, "length", 3)] == [CutOff]


# The layouts of models that do not keep to the prompt's; {n} is an item's number.
LAYOUTS = {
    "bold": ("**{n}. Instruction:** {i}\n**{n}. Input:** {x}\n**{n}. Output:** {o}\n", "\n---\n\n"),
    "bold words": ("{n}. **Instruction:** {i}\n{n}. **Input:** {x}\n{n}. **Output:** {o}\n", "\n"),
    "bold without the colon": ("**{n}. Instruction**: {i}\n**{n}. Input**: {x}\n**{n}. Output**: {o}\n", "\n"),
    "bold number": ("**{n}.** Instruction: {i}\n**{n}.** Input: {x}\n**{n}.** Output: {o}\n", "\n***\n"),
    "bold line": ("**{n}. Instruction: {i}**\n{n}. Input: {x}\n{n}. Output: {o}\n", "\n"),
    "heading": ("### {n}. Instruction: {i}\n{n}. Input:\n{x}\n{n}. Output:\n{o}\n", "\n"),
    "headings": ("## {n}. Instruction: {i}\n### {n}. Input:\n{x}\n### {n}. Output:\n{o}\n", "\n"),
    "no separator": ("{n}. Instruction: {i}\n{n}. Input:\n{x}\n{n}. Output:\n{o}\n", "\n"),
    "dashes": ("{n}. Instruction: {i}\n{n}. Input:\n{x}\n{n}. Output:\n{o}\n", "---\n"),
    "lower case": ("{n}. instruction: {i}\n{n}. input:\n{x}\n{n}. output:\n{o}\n", "###\n"),
    "parentheses": ("{n}) Instruction: {i}\n{n}) Input:\n{x}\n{n}) Output:\n{o}\n", "\n"),
    "full-width colon": ("{n}. Instruction：{i}\n{n}. Input：{x}\n{n}. Output：{o}\n", "###\n"),
    "underscores": ("{n}. Instruction: {i}\n{n}. Input:\n{x}\n{n}. Output:\n{o}\n", "________\n\n"),
    "in the line": ("{n}. Instruction: {i}\n{n}. Input: {x}\n{n}. Output: {o}\n", "###\n"),
    "one line": ("{n}. Instruction: {i} {n}. Input: {x} {n}. Output: {o}\n", ""),
}
WAVES = {"instruction": "Describe the sea.", "input": "", "output": "Blue.\n\n## Waves\n1. High **ones**\n2. Low ones"}


@pytest.mark.parametrize("first", [1, 4])
@pytest.mark.parametrize("before", ["", "Sure, here are the tasks:\n\n", "###\n"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(layout, before, first):
    item, separator = LAYOUTS[layout]
    wanted = [TREE, SUM, WAVES, TREE]
    items = [
        item.format(n=n, i=one["instruction"], x=one["input"] or "<noinput>", o=one["output"])
        for n, one in enumerate(wanted, first)
    ]
    assert parse_response(before + separator.join(items), "stop", 3) == wanted


def test_line_ends_are_line_feeds():
    text = TWO.replace("Oak.", "Oak.\n\nAsh.").replace("\n", "\r\n")
    assert parse_response(text, "stop", 3) == [TREE | {"output": "Oak.\n\nAsh."}, SUM]


def test_items_that_restart_at_1_need_a_separator():
    again = TWO.replace("5. ", "1. ")
    assert parse_response(again, "stop", 3) == [TREE, SUM]
    assert parse_response(again.replace("###\n", ""), "stop", 3) == ["4. Instruction:" + again.replace("###\n", "")]


@pytest.mark.parametrize(
    "tail",
    [
        "\n```",
        "\n```\n\nLet me know if you would like more!",
        "\n\nLet me know if you would like more tasks!",
        "\n\nI hope these help! Feel free to ask for more examples.",
        "\n\nHope this helps!",
        "\n\nWould you like more?",
        "\n\n*Would you like me to continue with the list?* 😊",
        "\n\nIf you’d like more of these, just ask!",
        "\n\nI hope these tasks are useful.\n\nLet me know if you need any other instructions.",
        "\n---",
        "\n\n---\n\nLet me know if you would like more tasks!",
        "\n###\nLet me know if you would like more tasks!\n",
    ],
)
def test_what_follows_the_last_item_is_not_part_of_its_answer(tail):
    assert parse_response("```text\n4. Instruction:" + TWO + tail, "stop", 3) == [TREE, SUM]


@pytest.mark.parametrize(
    "output",
    [
        "Dear Ann,\n\nthe report is done.\n\nLet me know if you have any questions.\n\nBest,\nTom",
        "Dear Ann,\n\nthe report is done.\n\nLet me know if you have any questions.",
        "We met.\n\nLet me know if you need more information.",
        "He came in.\n\n“Would you like more tea?”",
        "Would you like more?",
        "He wrote:\n\nI hope these are the last of my letters. " + "The sea is calm. " * 20,
        "Plan ahead.\n\nFeel free to take a break.",
        "```python\nprint(1)\n```",
        "Run this:\n\n```\nls\n```\n\nor that:\n\n```\nls -l\n```",
        "```\nls",
        "Sincerely,\n___",
        "| May |\n---------",
    ],
)
def test_a_last_answer_keeps_its_own_ending(output):
    text = TWO.replace("5. Output:\n5", "5. Output:\n" + output)
    assert parse_response(text, "stop", 3) == [TREE, SUM | {"output": output.strip()}]


def test_chatter_is_looked_for_in_the_last_item_alone():
    output = "Hello.\n\nLet me know if you would like more tasks!"
    text = TWO.replace("Oak.", output) + "\n\nLet me know if you would like more tasks!"
    assert parse_response(text, "stop", 3) == [TREE | {"output": output}, SUM]


@pytest.mark.parametrize(
    "text",
    [
        *("x\n" + "1" * 5000 + ". Instruction: a", "###\n" * 50_000, "###\n" * 50_000 + "x", "4. " * 50_000),
        *(character * 200_000 for character in '\n1*#-_ `:[{}"\\'),
        *('[{"' * 50_000, '{"instruction":' * 20_000, '{"instruction": "},' * 5000, "}" + " " * 100_000 + "x"),
        *("```\n" * 50_000, "a\n\n" * 50_000, "**1.**\n" * 30_000, "let me know " * 20_000, "[" + "\n{" * 50_000),
    ],
    ids=lambda text: repr(text[:20]),
)
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_degenerate_reply_is_read_at_once(text, reason):
    """Patterns without bounds took minutes here, or raised on a number of 5,000 digits."""
    assert all(isinstance(item, str) for item in parse_response(text, reason, 3))
    assert all(isinstance(item, str) for item in parse_json(text, reason))
    assert len(parse_response(TWO + "\n\n" + text, "stop", 3)) >= 1


@pytest.mark.parametrize(
    "noinput",
    [
        "<noinput>",
        "<NoInput>",
        " <NOINPUT> ",
        "",
        "<noinput>.",
        '"<noinput>"',
        "`<noinput>`",
        "< no input >",
        "&lt;noinput&gt;",
        "No input.",
        "{\\noinput}",
    ],
)
def test_no_input_is_read_in_any_spelling(noinput):
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
        "(4) Output: f(4) output: 16",
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
            assert filter_reason(record) == ("cut off" if type(record) is CutOff else "malformed")
        else:
            assert [type(value) for value in record.values()] == [str, str, str]
            assert list(record) == ["instruction", "input", "output"]
            assert filter_reason(record) is None or isinstance(filter_reason(record), str)
            assert filter_reason(record, Filters(tokenizer="unicode")) != "malformed"


# Numbers, dots and hashes, as in "2020." and "###", but no colon: no field.
words = st.lists(st.text("Axé#019.,", min_size=1, max_size=6), min_size=1, max_size=6).map(" ".join)
tasks = st.lists(st.builds(seed_task, words, words | st.just(""), words), min_size=1, max_size=5)


def records_of(tasks: list[dict]) -> list[dict]:
    return [{"instruction": task["instruction"]} | task["instances"][0] for task in tasks]


@quick
@given(tasks)
def test_what_encode_prompt_writes_parse_response_reads(tasks):
    last = f"{len(tasks) + 1}. Instruction:"  # which has only its number
    assert parse_response(encode_prompt(tasks, ""), "stop", 3) == [*records_of(tasks), last]
    assert parse_response(encode_prompt(tasks, ""), "length", 3) == [*records_of(tasks), CutOff(last)]


@quick
@given(tasks, st.sampled_from(["text", *LAYOUTS]))
def test_a_text_cut_anywhere_has_only_records_that_the_whole_has(tasks, layout):
    """But for an answer that begins a line with "#": that is where the separator is."""
    if layout == "text":
        text = encode_prompt(tasks, "").rpartition("###")[0]
    else:
        item, separator = LAYOUTS[layout]
        fields = enumerate(records_of(tasks), 4)
        text = separator.join(item.format(n=n, i=r["instruction"], x=r["input"], o=r["output"]) for n, r in fields)
    whole = parse_response(text, "stop", 3)
    for end in range(len(text) + 1):
        *records, last = parse_response(text[:end], "length", 3)
        assert records + [last] * isinstance(last, dict) == whole[: len(records) + isinstance(last, dict)]


def test_what_a_chat_model_says_before_its_first_item_is_left_out():
    text = (
        "Sure, here are some tasks:\n\n4. Instruction: Name two rivers.\n4. Input:\n<noinput>\n4. Output:\nNile, Po\n"
    )
    assert parse_response(text, "stop", 3) == [{"instruction": "Name two rivers.", "input": "", "output": "Nile, Po"}]


# ---------------------------------------------------------------------------------------------------------------------
# JSON.

ANY = [TREE, SUM, {"instruction": "Say it.", "input": "a", "output": 'f(x, {"a": [1]}), "}, {" \n{"instruction": "'}]


def test_a_request_for_json_is_the_prompt_then_the_examples_in_the_shape_of_the_schema():
    text = encode_json_prompt(
        [seed_task(" Name\n a  tree:"), seed_task("Add.", "2, 3", "5 €")], "List of 20 tasks:\n\n"
    )
    opening, _, rest = text.partition("\n{")
    shown, _, request = ("{" + rest).rpartition("\n\n")
    assert opening == "List of 20 tasks:" and request.startswith("These are the first 2. ") and "€" in text
    assert json.loads(shown) == {
        "tasks": [
            {"instruction": "Name a tree", "input": "<noinput>", "output": "Oak."},
            {"instruction": "Add.", "input": "2, 3", "output": "5 €"},
        ]
    }
    schema = JSON_SCHEMA["json_schema"]["schema"]["properties"]["tasks"]["items"]
    assert list(schema["properties"]) == schema["required"] == ["instruction", "input", "output"]


@pytest.mark.parametrize(
    "around",
    [
        *("{}", "```json\n{}\n```", "```\n{}\n```\n\nLet me know if you would like more tasks!"),
        *("Here are 17 tasks [as JSON]:\n\n{}", "\n\n{}\nDone."),
    ],
)
@pytest.mark.parametrize("name", ["tasks", "instructions", None])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_is_read_wherever_it_stands(around, name, indent):
    text = json.dumps({name: ANY} if name else ANY, indent=indent)
    assert parse_json(around.replace("{}", text), "stop") == ANY


def test_one_object_a_line_trailing_commas_and_line_breaks_in_strings_are_read():
    lines = "\n".join(json.dumps(record) for record in ANY)
    assert parse_json(lines, "stop") == ANY
    assert parse_json(f"[{json.dumps(TREE)}, {json.dumps(SUM)},]", "stop") == [TREE, SUM]
    assert parse_json('[{"instruction": "Sort.", "output": "a\nb"}]', "stop") == [
        {"instruction": "Sort.", "input": "", "output": "a\nb"}
    ]


@pytest.mark.parametrize("input", [None, "", "<noinput>", "<noinput>."])
def test_a_null_or_missing_input_is_empty(input):
    assert parse_json(json.dumps({"tasks": [TREE | {"input": input}]}), "stop") == [TREE]
    assert parse_json('{"tasks": [{"output": "Oak.", "instruction": "Name a tree."}]}', None) == [TREE]


@pytest.mark.parametrize(
    "bad",
    [
        *('{"instruction": "x", "input": "y"}', '{"instruction": "x", "input": "y", "output": null}', "{}"),
        *('{"instruction": "x", "input": 0, "output": "z"}', '{"instruction": ["x"], "input": "", "output": "z"}'),
        *('{"instruction": "say "hi"", "input": "", "output": "z"}', '{"instruction": "x" "output": "z"}'),
    ],
)
def test_an_object_without_the_three_texts_or_that_is_not_json_stays_text_and_leaves_its_neighbours(bad):
    text = f'{{"tasks": [{json.dumps(TREE)}, {bad}, {json.dumps(SUM)}]}}'
    first, malformed, last = parse_json(text, "length")
    assert (first, last) == (TREE, SUM) and type(malformed) is str and malformed.startswith(bad)


@pytest.mark.parametrize("text", ["I am sorry.", '{"tasks": []}', '{"tasks": ["a"]}', "[]", "null", '{"tasks": '])
def test_a_reply_without_an_object_stays_text(text):
    (item,) = parse_json(text, "stop")
    assert type(item) is str and item == text
    assert type(parse_json(text, "length")[0]) is CutOff


def test_half_of_a_surrogate_pair_is_replaced():
    text = json.dumps([TREE]).replace("Oak.", "\\ud83d!")
    assert parse_json(text, "stop") == [TREE | {"output": "?!"}]


@quick
@given(st.text() | st.lists(pieces | st.sampled_from('{}[]",:\\'), max_size=40).map("".join), reasons)
def test_any_reply_is_read_as_json_or_stays_text(text, reason):
    for record in parse_json(text, reason):
        assert isinstance(record, str) or list(record) == ["instruction", "input", "output"]


json_texts = st.text(st.sampled_from('{}[]",:\\\n é#') | st.characters(codec="utf-8"), max_size=12).map(str.strip)


@settings(quick, max_examples=50)
@given(
    st.lists(st.builds(seed_task, json_texts, json_texts, json_texts), min_size=1, max_size=4),
    st.sampled_from([None, 1]),
)
def test_json_comes_back_and_cut_anywhere_has_only_whole_records(tasks, indent):
    records = records_of(tasks)
    text = json.dumps({"tasks": records}, indent=indent, ensure_ascii=False)
    assert parse_json(text, "stop") == records
    for end in range(len(text)):
        *whole, last = parse_json(text[:end], "length")
        whole += [last] * isinstance(last, dict)
        assert whole == records[: len(whole)]
        assert isinstance(last, dict) or type(last) is CutOff


def test_the_output_may_come_before_the_input_and_the_reply_may_end_in_chatter():
    text = " Is it a fruit or a nut?\n4. Output:\nnut\n4. Input:\nacorn\n\nLet me know if you would like more tasks!"
    record = {"instruction": "Is it a fruit or a nut?", "input": "acorn", "output": "nut"}
    assert parse_response(text, "stop", 3) == [record]
    cut = " Is it a fruit or a nut?\n4. Output:\nnut\n4. Input:\nacorn\n###\n5. Instr"
    assert parse_response(cut, "length", 3) == [record, CutOff("5. Instr")]
    assert parse_response(text.partition("\n4. Input")[0], "stop", 3) == [
        "4. Instruction: Is it a fruit or a nut?\n4. Output:\nnut"
    ]
