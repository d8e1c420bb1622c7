"""Prompts, and JSON in and out."""

from __future__ import annotations

import json
import os
import stat

import pytest
from conftest import assert_user_error, run_script

import utils

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
        ("data.json", b'{"a": 1}\n{"a": 2}\n', ["line 2", "let its name end in .jsonl"]),
        ("data.jsonl", b'{"a": 1}\n\n{"a": 2}\n{"a": \n', ["data.jsonl, line 4: malformed JSON"]),
        ("data.jsonl", b'[\n  {"a": 1}\n]', ["data.jsonl, line 1", "let its name end in .json"]),
        ("data.jsonl", b"{}\n" + b"[" * 200_000, ["data.jsonl, line 2: malformed JSON, nested too deeply"]),
        ("data.json", b"[" + b"1" * 5_000 + b"]", ["data.json: malformed JSON, a number with too many digits"]),
        ("data.json", b'{"a": 1}', ["a JSON dict, not a list", "[ ]"]),
        ("data.json", b'"text"', ["a JSON str, not a list"]),
        ("data.json", '["é"]'.encode("latin-1"), ["not UTF-8", "is not UTF-8 text (line 1: "]),
        ("data.jsonl", '{}\n"é"\n'.encode("latin-1"), ["is not UTF-8 text (line 2: "]),
    ],
)
def test_a_file_that_is_no_json_list_is_refused_with_the_place(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert_user_error(lambda: utils.jload(tmp_path / name), *words)


def test_a_file_that_cannot_be_read_is_refused_with_its_path(tmp_path):
    assert_user_error(lambda: utils.jload(tmp_path / "no.json"), str(tmp_path / "no.json"), "does not exist")
    assert_user_error(lambda: utils.jload(tmp_path), str(tmp_path), "cannot be read")


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
        ([], ["holds no records"]),
        ([RECORD, {"instruction": "x", "output": "y"}], ["record 2", 'no "input" field']),
        ([RECORD, RECORD, RECORD | {"output": 3}], ["record 3", 'a non-text "output" field']),
        ([RECORD | {"instruction": None}], ["record 1", 'a non-text "instruction" field']),
        ([RECORD, "text"], ["record 2", "a str where an object was expected"]),
    ],
)
def test_records_without_the_three_texts_are_refused_with_their_number(tmp_path, records, words):
    (tmp_path / "data.json").write_text(json.dumps(records))
    assert_user_error(lambda: utils.load_records(tmp_path / "data.json"), "data.json", *words)


def test_other_fields_of_a_record_are_kept(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([RECORD | {"avg_similarity_score": 0.1}]))
    assert utils.load_records(tmp_path / "data.json") == [RECORD | {"avg_similarity_score": 0.1}]


def test_what_is_written_is_indented_utf_8_that_reads_back(tmp_path):
    utils.jdump([{"a": "é"}], tmp_path / "new" / "a.json")
    assert (tmp_path / "new" / "a.json").read_bytes() == '[\n    {\n        "a": "é"\n    }\n]\n'.encode()
    assert utils.jload(tmp_path / "new" / "a.json") == [{"a": "é"}]


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
