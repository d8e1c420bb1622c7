"""Instruction sets and answers in the formats that people have: what is read, what is matched, what is refused."""

from __future__ import annotations

import json

import jinja2
import pytest
import yaml
from conftest import ROOT

from alpaca import UserError
from alpaca.common.files import git_blob_id
from alpaca.data.instruction_sets import THE_252, THE_252_BLOB, Item, is_the_252, read_answers, read_set

SELF_INSTRUCT = [
    {
        "id": "user_oriented_task_0",
        "motivation_app": "Gmail",
        "instruction": "Answer this mail.",
        "instances": [{"input": "Hi Jen", "output": "Hi"}],
    },
    {
        "id": "user_oriented_task_1",
        "motivation_app": "Tasty",
        "instruction": "Name a dish.",
        "instances": [{"input": "", "output": "Soup"}, {"input": "cold", "output": " "}],
    },
]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


def items_of(*texts) -> list[Item]:
    return [Item(str(number), *text, None, "") for number, text in enumerate(texts, 1)]


def test_self_instructs_tasks_are_an_item_for_each_instance(tmp_path, capsys):
    assert read_set(write(tmp_path / "set.jsonl", SELF_INSTRUCT)) == [
        Item("user_oriented_task_0", "Answer this mail.", "Hi Jen", "Hi", "Gmail"),
        Item("user_oriented_task_1", "Name a dish.", "", "Soup", "Tasty"),
        Item("user_oriented_task_1#2", "Name a dish.", "cold", None, "Tasty"),
    ]
    assert "is not Self-Instruct's published set of 252 (3 instructions" in capsys.readouterr().err


def test_alpaca_evals_records_are_numbered_and_their_data_set_is_the_category(tmp_path, capsys):
    rows = [{"dataset": "koala", "instruction": "Why?", "output": "Because.", "generator": "text_davinci_003"}]
    assert read_set(write(tmp_path / "alpaca_eval.json", rows)) == [Item("1", "Why?", "", "Because.", "koala")]
    assert capsys.readouterr().err == ""


def test_alpacas_records_have_no_category(tmp_path):
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Rest.", "input": "", "output": ""}]
    expected = [Item("1", "Add.", "1 2", "3", ""), Item("2", "Rest.", "", None, "")]
    assert read_set(write(tmp_path / "a.json", rows)) == read_set(write(tmp_path / "a.jsonl", rows)) == expected


def test_the_252_are_known_by_their_blob_id_alone(tmp_path, monkeypatch):
    path = write(tmp_path / "any.jsonl", SELF_INSTRUCT)
    assert not is_the_252(path)
    monkeypatch.setattr("alpaca.data.instruction_sets.THE_252_BLOB", git_blob_id(path))
    assert is_the_252(path)


def test_where_the_252_come_from_is_said_when_they_are_missing(tmp_path):
    with pytest.raises(UserError, match=f"analyze_data.py fetch --url https://.* --blob_id {THE_252_BLOB}"):
        read_set(tmp_path / THE_252)


@pytest.mark.parametrize(
    "rows, said",
    [
        ([], "has no records"),
        (["text"], "record 1: a JSON str, not an object"),
        ([{"instruction": "x"}, {"instruction": " "}], 'record 2: no text "instruction"'),
        ([{"instruction": "x", "input": 3}], 'record 1: "input" must be text'),
        ([{"instruction": "x", "output": 3}], 'record 1: "output" must be text'),
        ([{"instruction": "\ud83d"}], r"record 1 contains '\\ud83d', half of a surrogate pair"),
        ([{"instruction": "x", "instances": []}], "record 1: .*a list with at least one object"),
        ([{"instruction": "x", "id": "a"}, {"instruction": "y", "id": "a"}], "the id 'a' twice"),
        ([{"instruction": "x", "motivation_app": 3}], 'record 1: "motivation_app" must be text'),
        ([{"instruction": "x", "id": "\ud83d"}], r"record 1 contains '\\ud83d', half of a surrogate pair"),
        ([{"instruction": "x", "dataset": "\ud83d"}], r"record 1 contains '\\ud83d', half of a surrogate pair"),
    ],
)
def test_a_malformed_set_is_one_line(tmp_path, rows, said):
    with pytest.raises(UserError, match=said) as caught:
        read_set(write(tmp_path / "set.json", rows))
    assert "\n" not in str(caught.value) and "set.json" in str(caught.value)


def test_json_that_is_nested_too_deeply_is_one_line(tmp_path):
    (tmp_path / "set.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="nested too deeply"):
        read_set(tmp_path / "set.json")


def test_self_instructs_predictions_are_an_answerer_named_by_the_file(tmp_path):
    items = read_set(write(tmp_path / "set.jsonl", SELF_INSTRUCT))
    row = {
        "prompt": "…",
        "instruction": "Answer this mail.\n",
        "input": "Hi Jen",
        "response": " Hello.",
        "target": "Hi",
    }
    answers = read_answers(write(tmp_path / "text-davinci-003_predictions.jsonl", [row]), items)
    assert (answers.generator, answers.outputs) == ("text-davinci-003", {"user_oriented_task_0": "Hello."})
    assert answers.unanswered == ["user_oriented_task_1", "user_oriented_task_1#2"]
    assert answers.rows == {"user_oriented_task_0": row}


def test_alpaca_evals_model_outputs_are_an_answerer_named_in_them(tmp_path):
    rows = [{"instruction": text, "output": text.upper(), "generator": "GPT", "dataset": "koala"} for text in "ba"]
    answers = read_answers(write(tmp_path / "model_outputs.json", rows), items_of(("a", ""), ("b", "")))
    assert (answers.generator, answers.outputs, answers.unanswered) == ("GPT", {"2": "B", "1": "A"}, [])


def test_what_chat_py_makes_of_self_instructs_tasks_is_an_answerer(tmp_path):
    items = read_set(write(tmp_path / "set.jsonl", SELF_INSTRUCT[:1]))
    row = SELF_INSTRUCT[0] | {"output": "Dear Jen", "generator": "mine"}
    assert read_answers(write(tmp_path / "out.jsonl", [row]), items).outputs == {"user_oriented_task_0": "Dear Jen"}


def test_equal_instructions_are_told_apart_by_id_and_else_by_order(tmp_path):
    items = items_of(("a", ""), ("a", ""))
    by_id = [{"instruction": "a", "output": "x", "id": 2}, {"instruction": "a", "output": "y", "id": "1"}]
    assert read_answers(write(tmp_path / "id.json", by_id), items).outputs == {"2": "x", "1": "y"}
    by_order = [{"instruction": "a ", "output": "x"}, {"instruction": "\na", "output": "y", "id": "none of the set"}]
    assert read_answers(write(tmp_path / "order.json", by_order), items).outputs == {"1": "x", "2": "y"}


def test_an_input_belongs_to_what_is_matched(tmp_path):
    rows = [{"instruction": "a", "input": "2", "output": "x"}]
    assert read_answers(write(tmp_path / "out.json", rows), items_of(("a", "1"), ("a", "2"))).outputs == {"2": "x"}


def test_an_answer_whose_input_stands_behind_its_instruction_belongs_to_the_same_item(tmp_path):
    items = items_of(("a", "1"), ("a", ""))
    rows = [item.row("x.json") | {"output": f"to {item.id}"} for item in items]
    assert [row["instruction"] for row in rows] == ["a\n\n### Input:\n1", "a"]
    assert read_answers(write(tmp_path / "out.json", rows), items).outputs == {"1": "to 1", "2": "to 2"}


def test_lm_evals_task_file_asks_what_a_chat_model_is_asked(tmp_path):
    task = yaml.safe_load((ROOT / "configs" / "judge" / "lm_eval_252.yaml").read_text())
    records = [SELF_INSTRUCT[0], SELF_INSTRUCT[0] | {"id": "x", "instances": [{"input": "", "output": "Soup"}]}]
    for record, item in zip(records, read_set(write(tmp_path / "set.jsonl", records)), strict=True):
        assert jinja2.Template(task["doc_to_text"]).render(record) == item.task
        assert jinja2.Template(task["doc_to_target"]).render(record) == item.reference


def test_an_error_is_unanswered_and_an_empty_answer_is_one(tmp_path):
    rows = [{"instruction": "a", "error": "timeout"}, {"instruction": "b", "output": None}]
    rows += [{"instruction": "c", "output": " "}]
    answers = read_answers(write(tmp_path / "out.json", rows), items_of(("a", ""), ("b", ""), ("c", "")))
    assert (answers.outputs, answers.unanswered) == ({"3": ""}, ["1", "2"])


@pytest.mark.parametrize(
    "rows, said",
    [
        ([], "has no answers"),
        ([{"instruction": "a", "error": "x"}], "has no answers"),
        ([{"instruction": "z" * 80, "output": "x"}], "record 1 answers another set, 'z{59}…'"),
        ([{"instruction": "a", "output": "x"}] * 2, "record 2 answers 'a' again"),
        ([{"instruction": "a", "output": "x", "id": 1}, {"instruction": "a", "id": "1"}], "record 2 answers 'a' again"),
        ([{"instruction": "a", "output": 3}], 'record 1: "output" must be text'),
        ([{"instruction": "a", "output": "\udc00"}], r"record 1 contains '\\udc00', half of a surrogate pair"),
        ([{"output": "x"}], 'record 1: no text "instruction"'),
        ([{"instruction": "a", "output": "x", "generator": "m\ud83d"}], 'record 1: "generator" must be a name'),
        ([{"instruction": "a", "output": "x", "generator": "\x1b[2Jm"}], 'record 1: "generator" must be a name'),
        (
            [
                {"instruction": "a", "output": "x", "generator": "m"},
                {"instruction": "b", "output": "", "generator": "n"},
            ],
            r"has answers of 2 models \(m, n\)",
        ),
    ],
)
def test_malformed_answers_are_one_line(tmp_path, rows, said):
    with pytest.raises(UserError, match=said) as caught:
        read_answers(write(tmp_path / "out.json", rows), items_of(("a", ""), ("b", "")))
    assert "\n" not in str(caught.value)
