"""Prompts, and records: each format and shape that people have, as one reader gives it to every script."""

from __future__ import annotations

import datetime
import gzip
import io
import json
import os
import stat

import pyarrow
import pyarrow.parquet
import pytest
from conftest import assert_one_line_error, assert_user_error, make_records, run_script

import analyze_data
import generate_instruction
import train
import utils
from alpaca.common import records as reader
from alpaca.common.shapes import task_key
from alpaca.data.instruction_sets import read_set
from alpaca.inference.answer_file import read_requests

# ---------------------------------------------------------------------------------------------------------------------
# Prompts.


def test_the_prompt_with_an_input_has_the_bytes_that_published_models_were_trained_on():
    assert utils.format_prompt("Add the numbers.", "2, 3") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd the numbers.\n\n### Input:\n"
        "2, 3\n\n### Response:"
    )


def test_the_prompt_without_an_input_has_the_bytes_that_published_models_were_trained_on():
    expected = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a tree.\n\n### Response:"
    )
    assert utils.format_prompt("Name a tree.") == expected
    assert utils.format_prompt("Name a tree.", "") == expected


def test_braces_in_a_record_are_text():
    assert "\n{input} {0} {{}}\n\n### Response:" in utils.format_prompt("{input} {0} {{}}")
    assert "\n### Input:\n{instruction}\n" in utils.format_prompt("x", "{instruction}")


# ---------------------------------------------------------------------------------------------------------------------
# JSON in and out.


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.json", b'[\n  {"a": 1},\n  {"a": }\n]', ["data.json, line 3: malformed JSON", "column 9"]),
        ("data.json", b"", ["data.json, line 1: malformed JSON"]),
        ("data.json", b'{"a": 1}\n{"a": \n', ["data.json, line 2: malformed JSON"]),
        ("data.jsonl", b'{"a": \n{"a": 2}\n', ["data.jsonl, line 1: malformed JSON"]),
        ("data.jsonl", b'[{"a": 1}]\n{"a": 2}\n{', ["data.jsonl, line 3: malformed JSON"]),
        ("data.jsonl", b'{"a": 1}\n\n{"a": 2}\n{"a": \n', ["data.jsonl, line 4: malformed JSON"]),
        ("data.jsonl", b"{}\n" + b"[" * 200_000, ["data.jsonl, line 2: malformed JSON, nested too deeply"]),
        ("data.json", b"[" + b"1" * 5_000 + b"]", ["data.json: malformed JSON, a number with too many digits"]),
        ("data.json", b'{\n"a": 1}', ["a JSON dict, not a list", "[ ]"]),
        ("data.json", b'"text"', ["a JSON str, not a list"]),
        ("data.json", '["é"]'.encode("latin-1"), ["not UTF-8", "is not UTF-8 (line 1: "]),
        ("data.jsonl", '{}\n"é"\n'.encode("latin-1"), ["is not UTF-8 (line 2: "]),
    ],
)
def test_a_file_that_is_no_json_list_is_refused_with_the_place(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert_user_error(lambda: utils.jload(tmp_path / name), *words)


def test_a_file_that_cannot_be_read_is_refused_with_its_path(tmp_path):
    assert_user_error(lambda: utils.jload(tmp_path / "no.json"), str(tmp_path / "no.json"), "does not exist")
    assert_user_error(lambda: utils.jload(tmp_path), str(tmp_path), "is a folder without data files")
    assert_user_error(lambda: utils.read_text(tmp_path), str(tmp_path), "cannot be read")


def test_json_and_json_lines_are_read_with_or_without_a_byte_order_mark(tmp_path):
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "a.json").write_bytes(mark + '[{"a": "é"}]'.encode())
        (tmp_path / "a.jsonl").write_bytes(mark + '{"a": "é"}\r\n\n{"a": "x\u2028y"}'.encode())
        assert utils.jload(tmp_path / "a.json") == [{"a": "é"}]
        assert utils.jload(str(tmp_path / "a.jsonl")) == [{"a": "é"}, {"a": "x\u2028y"}]  # U+2028 ends no line


RECORD = {"instruction": "Name a tree.", "input": "", "output": "Oak."}


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], ["has no records"]),
        ([RECORD, RECORD | {"input": 4}], ["record 2", '"input" must be text']),
        ([RECORD, RECORD, RECORD | {"output": 3}], ["record 3", '"output" must be text']),
        ([RECORD | {"instruction": None}], ["record 1", 'no text "instruction"']),
        ([RECORD, {"instruction": "x"}], ["record 2", 'no text "output"']),
        ([RECORD | {"output": None}], ["record 1", 'no text "output"']),
        ([{"instruction": "x", "context": "y"}] * 2, ["2 records in Dolly's", "2 without an answer dropped: 1, 2"]),
        ([RECORD, {"question": "x", "answer": "y"}], ["record 2", "(question, answer)", "instruction=question"]),
        ([RECORD, "text"], ["record 2", "a JSON str, not an object"]),
    ],
)
def test_records_without_the_three_texts_are_refused_with_their_number(tmp_path, records, words):
    (tmp_path / "data.json").write_text(json.dumps(records))
    assert_user_error(lambda: utils.load_records(tmp_path / "data.json"), "data.json", *words)


def test_other_fields_of_a_record_are_kept(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([RECORD | {"avg_similarity_score": 0.1}]))
    assert utils.load_records(tmp_path / "data.json") == [RECORD | {"avg_similarity_score": 0.1}]


# ---------------------------------------------------------------------------------------------------------------------
# Formats.

RECORDS = [RECORD, {"instruction": "Add, please.", "input": "40\n2", "output": "42"}]


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows) -> bytes:
    rows = [dict.fromkeys(key for one in rows for key in one) | row for row in rows]  # a table has the first row's
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file := io.BytesIO())
    return file.getvalue()


TABLE = 'instruction,input,output\r\nName a tree.,,Oak.\r\n"Add, please.","40\n2",42\r\n'
FORMATS = [
    ("a.json", json.dumps(RECORDS).encode()),
    ("a.json", json.dumps(RECORDS, indent=2).replace("\n", "\r").encode()),
    ("a.json", json.dumps({"version": "1.0", "data": RECORDS, "tags": ["x"]}).encode()),
    ("a.jsonl", json.dumps({"train": RECORDS}, indent=1).encode()),
    ("a.jsonl", json.dumps(RECORDS).encode()),
    ("a.json", lines(RECORDS)),
    ("a", lines(RECORDS)),
    ("a.jsonl", b"\n" + lines(RECORDS).replace(b"\n", b"\r\n\r\n")),
    ("a.ndjson", lines(RECORDS).replace(b"\n", b"\r")),
    ("a.jsonl.gz", gzip.compress(lines(RECORDS))),
    ("a.json.gz", gzip.compress(json.dumps(RECORDS).encode())),
    ("a.csv", b"\xef\xbb\xbf" + TABLE.encode()),
    ("a.csv", TABLE.replace("\r\n", "\r").encode()),
    ("a.tsv.gz", gzip.compress(TABLE.replace("Add, please.", "Add\tplease.").replace(",", "\t").encode())),
    ("a.parquet", parquet(RECORDS)),
]


@pytest.mark.parametrize(("name", "content"), FORMATS, ids=range(len(FORMATS)))
def test_each_format_is_read_and_nothing_is_said_of_alpacas_records(tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content)
    expected = json.loads(json.dumps(RECORDS).replace("Add, please", r"Add\tplease")) if ".tsv" in name else RECORDS
    assert utils.load_records(tmp_path / name) == expected
    assert capsys.readouterr().out == ""


def test_a_table_holds_texts_whatever_they_look_like(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,input,output\nx,007,NA\ny,1e5,null\n" + "z,," + "w" * 200_000)
    found = [(record["input"], record["output"]) for record in utils.load_records(tmp_path / "a.csv")]
    assert found == [("007", "NA"), ("1e5", "null"), ("", "w" * 200_000)]


def test_a_column_that_json_has_no_type_for_becomes_a_text(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet([RECORD | {"day": datetime.date(2023, 3, 13), "more": None}]))
    assert utils.load_records(tmp_path / "a.parquet") == [RECORD | {"day": "2023-03-13", "more": None}]


def test_several_files_and_folders_are_read_in_order(tmp_path, capsys):
    for name in ("b/2.jsonl", "b/deep/1.json", "b/.hidden/0.json", "b/.x.json", "c/test-0.jsonl", "c/train-0.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(lines([RECORD | {"output": name}]))
    (tmp_path / "b" / "README.md").write_text("no data")
    (tmp_path / "a,b.json").write_bytes(lines([RECORD, {"prompt": "x"}]))
    assert [record["output"] for record in utils.load_records(tmp_path / "b")] == ["b/2.jsonl", "b/deep/1.json"]
    assert [record["output"] for record in utils.load_records(tmp_path / "c")] == ["c/train-0.jsonl"]
    assert utils.load_records(tmp_path / "a,b.json") == [RECORD]  # not two files
    said = (
        "a,b.json: 1 record in Alpaca's format, 1 record in prompt/completion format; 1 without an answer dropped: 2\n"
    )
    assert capsys.readouterr().out.endswith(said)
    both = f"{tmp_path / 'c'}, {tmp_path / 'b' / '2.jsonl'}"
    assert [record["output"] for record in utils.load_records(both)] == ["c/train-0.jsonl", "b/2.jsonl"]
    assert reader.files_of(both) == [tmp_path / "c" / "train-0.jsonl", tmp_path / "b" / "2.jsonl"]


def test_dropped_records_of_several_files_are_named_with_their_file(tmp_path):
    said = []
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(lines([RECORD] + [{"prompt": "x"}] * 6))
    utils.load_records(tmp_path, say=said.append)
    numbers = ", ".join([f"a.jsonl {n}" for n in range(2, 8)] + [f"b.jsonl {n}" for n in range(2, 6)])
    shapes = "2 records in Alpaca's format, 12 records in prompt/completion format"
    assert said == [f"{tmp_path}: {shapes}; 12 without an answer dropped: {numbers}, …"]


def test_a_name_on_the_hub_is_tried_only_if_it_looks_like_one(monkeypatch):
    """No test reaches the hub: what the library would give stands in for it."""
    assert_user_error(lambda: utils.load_records("nobody/nothing"), "nobody/nothing is not a file", "hub dataset")
    for name in ("./nobody/nothing", "nobody/nothing.json", "nothing", "a/b/c"):
        assert_user_error(lambda name=name: utils.load_records(name), f"{name} does not exist")
    monkeypatch.setattr(
        "datasets.load_dataset", lambda name, split: {("nobody/nothing", "train"): RECORDS}[name, split]
    )
    assert utils.load_records("nobody/nothing") == RECORDS and reader.files_of("nobody/nothing") == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
            ["LFS pointer", "git lfs"],
        ),
        ("a.json", b"\n<!DOCTYPE html>\n<html lang=en>", ["a web page (HTML)"]),
        ("a.json", json.dumps(RECORDS).encode("utf-16"), ["UTF-16", "convert it to UTF-8"]),
        ("a.csv", TABLE.encode("utf-16-le"), ["UTF-16", "convert it to UTF-8"]),
        ("a.jsonl", lines(RECORDS) + '"é"\n'.encode("latin-1"), ["line 3: ", "convert it to UTF-8"]),
        (
            "a.jsonl.gz",
            gzip.compress(lines(RECORDS * 99) + '"é"\n'.encode("latin-1")),
            ["line 199: ", "to UTF-8"],
        ),
        ("a.jsonl.gz", gzip.compress(lines(RECORDS * 99))[:-9], ["cannot be read", "ended before"]),
        ("a.parquet", parquet(RECORDS)[:-9], ["not a complete Parquet file"]),
        ("a.csv", b"instruction,output\na,b,c\n", ["record 1: more columns than the header"]),
        ("a.csv", b'instruction,output\na,b\n"a,b\n', ["malformed table"]),
        ("a.csv", b"instruction;output\na;b\n", ["record 1", "(instruction;output)"]),
        ("a.json", json.dumps({"train": RECORDS, "test": RECORDS}, indent=1).encode(), ["one such list"]),
        ("a.csv", b"instruction,input,output\n", ["has no records"]),
        ("a.json", b"[]", ["has no records"]),
    ],
)
def test_a_file_that_is_not_what_it_seems_is_named_in_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert_user_error(lambda: utils.load_records(tmp_path / name), name, *words)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes.


def chat(*turns, names=("role", "content")) -> list[dict]:
    return [dict(zip(names, turn, strict=True)) for turn in turns]


DOLLY = [
    {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada.", "category": "closed_qa"},
    {"instruction": "Why?", "context": None, "response": None, "category": "open_qa"},
    {"instruction": "When?", "context": "", "response": " ", "category": "open_qa"},
    {"instruction": "Where?", "response": "Here."},
]
SHAPES = [
    (
        DOLLY,
        "4 records in Dolly's format; 2 without an answer dropped: 2, 3",
        [
            {"instruction": "Who?", "input": "Ada wrote it.", "output": "Ada.", "category": "closed_qa"},
            {"instruction": "Where?", "input": "", "output": "Here."},
        ],
    ),
    (
        [{"prompt": "Hi", "completion": "Hello", "id": 4}],
        "1 record in prompt/completion format",
        [{"instruction": "Hi", "input": "", "output": "Hello", "id": 4}],
    ),
    (
        [
            {"id": "x", "conversations": chat(("human", "Hi"), ("gpt", "Hello"), names=("from", "value"))},
            {"system": "Be brief.", "conversations": chat(("human", "Hi"), ("gpt", "Ho"), names=("from", "value"))},
            {"conversations": chat(("gpt", "Hi"), ("human", "Hello"), names=("from", "value"))},
            {"conversations": chat(("human", "a"), ("gpt", "b"), ("human", "c"), names=("from", "value"))},
            {"conversations": chat(("human", "a"), ("function_call", "b"), names=("from", "value"))},
            {"conversations": chat(("robot", "a"), names=("from", "value"))},
            {"conversations": []},
        ],
        "7 records in ShareGPT's format; 1 starting with the assistant dropped: 3; "
        "1 with tool calls dropped: 5; 1 with the unknown role 'robot' dropped: 6; 1 without a question dropped: 7",
        [
            {"instruction": "Hi", "input": "", "output": "Hello", "id": "x"},
            {"instruction": "Be brief.\n\nHi", "input": "", "output": "Ho"}
            | {"messages": chat(("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"))},
            {"instruction": "a", "input": "", "output": "b"},  # nothing answers the second question
        ],
    ),
    (
        [
            {"messages": chat(("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho")), "prompt": "Hi"},
            {
                "messages": chat(
                    ("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), ("assistant", "c")
                )
            },
            {"messages": chat(("user", [{"type": "image_url", "image_url": "x"}]), ("assistant", "c"))},
            {"messages": chat(("user", "a"))},
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": None, "tool_calls": [{}]},
                ]
            },
            {"messages": ["a"]},
            {"messages": chat(("user", "a"), ("system", "b"), ("assistant", "c"))},
        ],
        "7 records in OpenAI's messages; 1 with images or other parts that are not text dropped: 3; "
        "1 without an answer dropped: 4; 1 with tool calls dropped: 5; 1 with a malformed turn dropped: 6; "
        "1 with turns out of order dropped: 7",
        [
            {"instruction": "Be brief.\n\nHi", "input": "", "output": "Ho", "prompt": "Hi"}
            | {"messages": chat(("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"))},
            {"instruction": "ab", "input": "", "output": "c"},
        ],
    ),
    (
        [{"instruction": "a", "output": "b"}, RECORD | {"input": None}, RECORD | {"output": ""}, *DOLLY[:1]],
        "3 records in Alpaca's format, 1 record in Dolly's format",
        [
            {"instruction": "a", "output": "b", "input": ""},
            RECORD,
            RECORD | {"output": ""},
            {"instruction": "Who?", "input": "Ada wrote it.", "output": "Ada.", "category": "closed_qa"},
        ],
    ),
]


TWO = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
SHAPES += [
    (  # OpenAI's, with more than Alpaca's fields can hold
        [
            {"messages": chat(("developer", "S"), *(m.values() for m in TWO), ("user", "e")), "id": 1},
            {"messages": [*TWO[:1], TWO[1] | {"weight": 0}, TWO[2], TWO[3] | {"weight": 1, "name": "x"}]},
            {"messages": [TWO[0], TWO[1] | {"weight": 0}]},
            {"messages": [TWO[0], TWO[0], TWO[1]]},
            {"messages": [*TWO[:2], TWO[1]]},
            {"messages": chat(("system", " "), ("user", "a"), ("assistant", "b"))},
            {"messages": TWO[:2], "images": ["x.png"]},
        ],
        "7 records in OpenAI's messages, 2 of several turns; 1 without an answer dropped: 3; "
        "2 with turns out of order dropped: 4, 5; 1 with images or other parts that are not text dropped: 7",
        [
            {"instruction": "S\n\na", "input": "", "output": "b", "id": 1} | {"messages": chat(("system", "S")) + TWO},
            {"instruction": "a", "input": "", "output": "b"} | {"messages": [TWO[0], TWO[1] | {"weight": 0}, *TWO[2:]]},
            {"instruction": "a", "input": "", "output": "b"},
        ],
    ),
    (  # LLaMA-Factory's, whose fields are the last turn
        [
            {"instruction": "c", "input": "x", "output": "d", "system": "S", "history": [["a", "b"]], "id": 2},
            {"instruction": "c", "input": "x", "output": "d", "system": "S", "history": []},
            {"instruction": "c", "input": "x", "output": "d", "system": "", "history": []},
            {"instruction": "c", "input": "", "output": "d", "history": [["a"]]},
        ],
        "4 records in Alpaca's format, 1 of several turns; 1 with a malformed turn dropped: 4",
        [
            {"instruction": "c", "input": "x", "output": "d", "id": 2}
            | {
                "messages": chat(("system", "S"), ("user", "a"), ("assistant", "b"))
                + chat(("user", "c\n\n### Input:\nx"), ("assistant", "d"))
            },
            {"instruction": "S\n\nc", "input": "x", "output": "d"}
            | {"messages": chat(("system", "S"), ("user", "c\n\n### Input:\nx"), ("assistant", "d"))},
            {"instruction": "c", "input": "x", "output": "d", "system": "", "history": []},
        ],
    ),
    (  # TRL's, which learns the completion alone
        [
            {"prompt": TWO[:1], "completion": TWO[1:2], "id": 3},
            {"prompt": [*chat(("system", "S")), *TWO[:3]], "completion": TWO[3:]},
            {"prompt": TWO[:1], "completion": "b"},
            {"prompt": TWO[:1], "completion": []},
            {"prompt": [], "completion": TWO[1:2]},
            {"prompt": TWO[:1], "chosen": TWO[1:2]},
        ],
        "6 records in prompt/completion format, 1 of several turns; 2 without an answer dropped: 4, 6; "
        "1 starting with the assistant dropped: 5",
        [
            {"instruction": "a", "input": "", "output": "b", "id": 3},
            {"instruction": "S\n\na", "input": "", "output": "b"}
            | {"messages": [*chat(("system", "S")), TWO[0], TWO[1] | {"weight": 0}, *TWO[2:]]},
            {"instruction": "a", "input": "", "output": "b"},
        ],
    ),
    (  # with tools, which answers may have been chosen by
        [{"messages": TWO[:2], "tools": [{"type": "function"}]}, {"messages": TWO[:2], "tools": "[]"}],
        "2 records in OpenAI's messages; 1 with tools dropped: 1",
        [{"instruction": "a", "input": "", "output": "b", "tools": "[]"}],
    ),
    (  # as we write them ourselves
        [
            RECORD | {"messages": chat(("user", "Name a tree."), ("assistant", "Oak."))},
            {"instruction": "c", "input": "x", "output": "d"}
            | {"messages": chat(("user", "c\n\n### Input:\nx"), ("assistant", "d"))},
            {"instruction": "a", "input": "", "output": "b", "messages": TWO},
            {"instruction": "S\n\na", "input": "x", "output": "b"}
            | {"messages": chat(("system", "S"), ("user", "a\n\n### Input:\nx"), ("assistant", "b"))},
            RECORD | {"messages": [TWO[1]]},
        ],
        "5 records in Alpaca's format, 1 of several turns; 1 starting with the assistant dropped: 5",
        [
            RECORD,
            {"instruction": "c", "input": "x", "output": "d"},
            {"instruction": "a", "input": "", "output": "b", "messages": TWO},
            {"instruction": "S\n\na", "input": "x", "output": "b"}
            | {"messages": chat(("system", "S"), ("user", "a\n\n### Input:\nx"), ("assistant", "b"))},
        ],
    ),
]


@pytest.mark.parametrize(("rows", "said", "expected"), SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz"])
def test_each_shape_becomes_alpacas_and_is_said_in_one_line(tmp_path, capsys, rows, said, expected, name):
    (tmp_path / name).write_bytes(gzip.compress(lines(rows)) if ".gz" in name else json.dumps(rows).encode())
    assert utils.load_records(tmp_path / name) == expected
    assert capsys.readouterr().out == f"{tmp_path / name}: {said}\n"


@pytest.mark.parametrize(("rows", "said", "expected"), SHAPES[:3], ids=range(3))
def test_a_shape_is_the_same_in_parquet_where_absent_fields_are_null(tmp_path, capsys, rows, said, expected):
    (tmp_path / "a.parquet").write_bytes(parquet(rows))
    found = utils.load_records(tmp_path / "a.parquet")
    assert [{key: value for key, value in record.items() if value is not None} for record in found] == expected
    assert capsys.readouterr().out == f"{tmp_path / 'a.parquet'}: {said}\n"


@pytest.mark.parametrize("field", ["instruction", "input", "output"])
def test_messages_that_say_something_else_than_the_other_fields_are_not_used_in_silence(tmp_path, field):
    messages = chat(("system", "S"), ("user", "a"), ("assistant", "b"))
    record = {"instruction": "a", "input": "", "output": "b", "messages": messages}
    said: list[str] = []
    for rows in ([record], [record | {field: "edited"}]):
        (path := tmp_path / "a.json").write_text(json.dumps(rows))
        assert reader.load_records(path, say=said.append)[0]["messages"] == messages
    assert said == [f"{path}: 1 record in Alpaca's format with different messages, which are used"]
    path.write_text(json.dumps([record | {"output": "d", "messages": TWO}]))  # as chat.py writes its last answer
    assert reader.load_records(path, say=said.append)[0]["messages"] == TWO
    assert said[1:] == [f"{path}: 1 record in Alpaca's format, 1 of several turns"]


def test_where_no_record_is_left_the_cure_is_to_name_fields(tmp_path):
    (path := tmp_path / "a.json").write_text('[{"prompt": "Hi", "response": "Hello"}]')
    words = "1 record in prompt/completion format; 1 without an answer dropped: 1; no records left: set fields"
    assert_user_error(lambda: utils.load_records(path), words)
    assert utils.load_records(path, "instruction=prompt,output=response")[0]["output"] == "Hello"


def test_one_conversation_in_a_file_is_not_taken_for_a_list_of_records(tmp_path):
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_bytes(lines([{"messages": chat(("user", "a"), ("assistant", "b"))}]))
        assert utils.load_records(tmp_path / name) == [{"instruction": "a", "input": "", "output": "b"}]


def test_what_is_read_reads_back_as_itself(tmp_path):
    for rows, _, expected in SHAPES:
        (tmp_path / "a.jsonl").write_bytes(lines(rows))
        utils.jdump(found := utils.load_records(tmp_path / "a.jsonl"), tmp_path / "b.json")
        assert utils.load_records(tmp_path / "b.json") == found == expected


def test_questions_alone_are_read_where_no_answers_are_needed(tmp_path):
    conversations = [TWO[:1], TWO[:3], TWO[1:]]
    (path := tmp_path / "a.jsonl").write_bytes(lines([{"messages": messages} for messages in conversations]))
    said: list[str] = []
    found = [record for _, record in reader.read_records(path, say=said.append)]
    assert found == [
        {"instruction": "a", "input": ""},
        {"instruction": "a", "input": "", "output": "b", "messages": TWO[:3]},
    ]
    assert said[0].endswith(
        "3 records in OpenAI's messages, 1 of several turns; 1 starting with the assistant dropped: 3"
    )


def test_messages_that_no_shape_explains_are_not_taken_for_a_conversation(tmp_path):
    (path := tmp_path / "a.jsonl").write_bytes(lines([{"q": "a", "a": "b", "messages": TWO}, {"q": "a", "a": "b"}]))
    assert utils.load_records(path, "instruction=q,output=a") == [{"instruction": "a", "input": "", "output": "b"}] * 2


def test_fields_of_any_name_can_be_given(tmp_path, capsys):
    rows = [{"question": "a", "answer": "b", "text": "c", "level": 3}, {"question": "d", "answer": None}]
    (path := tmp_path / "a.jsonl").write_bytes(lines(rows))
    given = "instruction=question, input=text,output=answer"
    assert utils.load_records(path, given) == [{"instruction": "a", "input": "c", "output": "b", "level": 3}]
    assert capsys.readouterr().out == f"{path}: 2 records in the given fields; 1 without an answer dropped: 2\n"
    for fields, words in (
        ("instruction=question,output=anser", ["has no field anser", "question, answer, text, level"]),
        ("instruction=qestion", ['line 1: no text "qestion"', "(question, answer, text, level)"]),
        ("instruction=level,output=answer", ['line 1: no text "level"']),
        ("instruct=question", ["instruction=question,input=context,output=answer, not 'instruct=question'"]),
        ("question", ["not 'question'"]),
    ):
        assert_user_error(lambda fields=fields: utils.load_records(path, fields), *words)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_every_script_reads_the_same_records(tmp_path, capsys, name):
    rows = [
        {"instruction": record["instruction"], "context": record["input"] or None, "response": record["output"]}
        for record in make_records(6)
    ]
    (path := tmp_path / name).write_bytes(gzip.compress(lines(rows)) if ".gz" in name else parquet(rows))
    line, expected = f"{path}: 6 records in Dolly's format\n", make_records(6)
    assert train.load_data(train.DataArguments(str(path), eval_data_path=str(path)), 0) == (expected, expected)
    assert capsys.readouterr().out.startswith(line * 2)  # then it warns: these are the same records
    items = read_set(path)
    assert [(item.instruction, item.input, item.reference) for item in items] == [(*r.values(),) for r in expected]
    requests, faults = read_requests(path)
    assert [(request.instruction, request.input) for request in requests] == [(i.instruction, i.input) for i in items]
    assert faults == [] and capsys.readouterr().out == line * 2
    generate_instruction.dedup(str(path), str(tmp_path / "out.json"), threshold=1.0, similarity_stats=False)
    assert utils.jload(tmp_path / "out.json") == expected and capsys.readouterr().out.startswith(line)
    analyze_data.stats(str(path))
    analyze_data.lint(str(path), str(tmp_path / "clean.json"), only="duplicate")
    assert utils.jload(tmp_path / "clean.json") == expected and capsys.readouterr().out.count(line) == 2


@pytest.mark.parametrize(
    ("script", "task", "flag"),
    [
        ("analyze_data.py", "stats", "--data_path"),
        ("analyze_data.py", "lint", "--data_path"),
        ("analyze_data.py", "plot", "--data_path"),
        ("generate_instruction.py", "dedup", "--input_path"),
        ("judge.py", "answer", "--instructions"),
        ("judge.py", "judge", "--instructions"),
        ("judge.py", "people", "--instructions"),
        ("judge.py", "report", "--instructions"),
    ],
)
def test_every_task_takes_fields_and_says_which_there_are(tmp_path, script, task, flag):
    (path := tmp_path / "a.jsonl").write_bytes(lines([{"question": "a", "answer": "b"}]))
    more = {"lint": (), "stats": (), "plot": ("--output_dir", tmp_path), "report": ("--output_dir", tmp_path)}
    more = more.get(task, ("--output_path", tmp_path / "out.jsonl"))
    more += ("--answers", "a,b") if task in ("judge", "people", "report") else ()
    more += ("--model_name", "m", "--base_url", "http://127.0.0.1:9") if task in ("answer", "judge") else ()
    result = run_script(script, task, flag, path, "--fields", "instruction=quest", *more)
    assert_one_line_error(result, f'{path}, line 1: no text "quest" in its fields (question, answer)')


def test_what_is_written_is_indented_utf_8_that_reads_back(tmp_path):
    utils.jdump([{"a": "é"}], tmp_path / "new" / "a.json")
    assert (tmp_path / "new" / "a.json").read_bytes() == '[\n    {\n        "a": "é"\n    }\n]\n'.encode()
    assert utils.jload(tmp_path / "new" / "a.json") == [{"a": "é"}]


def test_records_that_ask_the_same_have_one_key():
    def asks(*contents):
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
        return task_key({"instruction": "Hi", "input": "", "output": "Hello", "messages": turns})

    first = task_key({"instruction": "Add  the\nNUMBERS.", "input": " 2, 3", "output": "5"})
    assert first == task_key({"instruction": "add the numbers.", "input": "2, 3", "output": "It is 5."})
    assert first != task_key({"instruction": "add the numbers. 2, 3", "input": "", "output": "5"})
    assert asks("Hi", "Hello", "And  now?", "Good") == asks("hi", "hello", "and now?", "Bad")
    assert asks("Hi", "Hello", "And now?", "Good") != asks("Hi", "Hello", "And then?", "Good")
    assert asks("Hi", "Hello", "And now?", "Good") != asks("Hi", "Hey", "And now?", "Good")


def test_half_of_a_surrogate_pair_is_written_as_ascii_and_reads_back(tmp_path):
    utils.jdump(["\ud800 é"], tmp_path / "a.json")
    assert (tmp_path / "a.json").read_bytes() == b'[\n    "\\ud800 \\u00e9"\n]\n'
    assert utils.jload(tmp_path / "a.json") == ["\ud800 é"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[1]")
    with pytest.raises(TypeError):
        utils.jdump(["x" * 100_000, object()], path)
    assert path.read_text() == "[1]"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_written_file_has_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        utils.jdump([], tmp_path / "a.json")
        assert os.umask(umask) == umask  # asking for the mask did not change it
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == mode


def test_importing_utils_loads_neither_torch_nor_an_api_client():
    loaded = run_script("-c", "import sys, utils; print(*sys.modules)").stdout.split()
    assert "utils" in loaded and not {"torch", "transformers", "openai", "numpy"} & set(loaded)
