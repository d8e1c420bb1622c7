"""A published folder: read by datasets and by our own reader, each record once and unchanged; and its card."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT

import analyze_data
from alpaca import UserError
from alpaca.common.records import jdump, load_records
from alpaca.data import publish

FIELDS = ("instruction", "input", "output")


def record(instruction: str, output: str = "Green.", **more) -> dict:
    return {"instruction": instruction, "input": "", "output": output} | more


def texts(rows) -> list[dict]:
    return [{field: row[field] for field in FIELDS} for row in rows]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def loaded(folder, cache) -> dict[str, list[dict]]:
    import datasets

    return {name: list(rows) for name, rows in datasets.load_dataset(str(folder), cache_dir=str(cache)).items()}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The shipped data, published with a test split."""
    folder = tmp_path_factory.mktemp("publish") / "shipped"
    analyze_data.publish(str(ROOT / "alpaca_data.json"), str(folder), "cc-by-nc-4.0", "en", eval_fraction=0.05)
    return folder


def test_datasets_and_our_reader_find_each_shipped_record_once_and_unchanged(shipped, tmp_path):
    source = json.loads((ROOT / "alpaca_data.json").read_text(encoding="utf-8"))
    splits = loaded(shipped, tmp_path)
    assert list(splits) == ["train", "test"] and 30 <= len(splits["test"]) <= 80  # 54 ± 3.6 standard deviations
    held_out = {row["instruction"] for row in splits["test"]}
    assert texts(splits["train"]) == [row for row in source if row["instruction"] not in held_out]
    assert texts(splits["test"]) == [row for row in source if row["instruction"] in held_out]
    assert texts(load_records(shipped)) == texts(splits["train"])
    assert lines(shipped / "jsonl" / "records.jsonl") == splits["train"]
    assert lines(shipped / "jsonl" / "test.jsonl") == splits["test"]
    with_input = next(row for row in splits["train"] if row["input"])
    assert with_input["messages"] == [
        {"role": "user", "content": f"{with_input['instruction']}\n\n### Input:\n{with_input['input']}"},
        {"role": "assistant", "content": with_input["output"]},
    ]
    assert len({row["id"] for rows in splits.values() for row in rows}) == len(source)


def test_the_card_states_license_counts_and_what_is_left_to_answer(shipped):
    from huggingface_hub import DatasetCard

    card = DatasetCard.load(shipped / "README.md")
    header = card.data.to_dict()
    assert (header["license"], header["language"], header["size_categories"]) == (
        "cc-by-nc-4.0",
        ["en"],
        ["1K<n<10K"],
    )
    assert header["configs"] == [
        {
            "config_name": "default",
            "data_files": [
                {"split": "train", "path": "data/train.parquet"},
                {"split": "test", "path": "data/test.parquet"},
            ],
        }
    ]
    assert "1,075 records are from alpaca_data.json" in card.text and "| with an input | 490 | 45.6% |" in card.text
    assert "0 findings in 0 of 1,075 records" in card.text and "Commercial use: the license forbids it." in card.text
    assert publish.OPEN in card.text and str(shipped.parent) not in card.content


def test_published_again_a_folder_is_the_same(shipped, tmp_path):
    analyze_data.publish(str(shipped), str(tmp_path / "again"), "cc-by-nc-4.0")
    again, first = ((folder / "jsonl" / "records.jsonl").read_text() for folder in (tmp_path / "again", shipped))
    assert again == first


def test_a_folder_is_not_made_inside_the_data_which_it_would_be_read_with(tmp_path):
    (data := tmp_path / "data").mkdir()
    jdump([record("a"), record("b")], data / "a.json")
    for output in (data / "out", data):
        with pytest.raises(UserError, match="choose another folder$"):
            analyze_data.publish(f"{data}, {data / 'a.json'}", str(output), "mit")
    assert [path.name for path in data.iterdir()] == ["a.json"]


def test_files_keep_their_names_and_fields_but_no_path_of_the_machine(tmp_path):
    (tmp_path / "secret" / "b").mkdir(parents=True)
    near = {"most_similar_instructions": {"Name a fruit.": 0.5}, "avg_similarity_score": 0.25}
    jdump([record("Name a color.", **near), record("Name a bird.", id=7, big=2**70)], tmp_path / "secret" / "a.json")
    jdump([record("Name a fruit.", avg_similarity_score=1, mixed=True), record("Name a fish.", mixed="no")],
          tmp_path / "secret" / "b" / "a.json")  # fmt: skip
    analyze_data.publish(str(tmp_path / "secret"), str(tmp_path / "out"), "mit")
    rows = loaded(tmp_path / "out", tmp_path / "cache")["train"]
    assert [row["source"] for row in rows] == ["a.json", "a.json", "b/a.json", "b/a.json"]
    assert [row["avg_similarity_score"] for row in rows] == [0.25, None, 1.0, None]
    assert json.loads(rows[0]["most_similar_instructions"]) == near["most_similar_instructions"]
    assert (rows[1]["original_id"], rows[1]["big"]) == (7, str(2**70))
    assert [row["mixed"] for row in rows] == [None, None, "true", "no"]
    assert lines(tmp_path / "out" / "jsonl" / "records.jsonl") == rows
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- b/a.json, SHA-256 `" in card and "secret" not in card and "| source | the file" in card


def test_a_conversation_is_published_with_all_its_turns(tmp_path):
    turns = ["Name a color.", "Green.", "Another?", "Blue."]
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, turns, strict=True)]
    brief = [{"role": "system", "content": "Be brief."}, *messages[:2]]  # three messages, one turn
    records = [record("Name a color.", messages=messages), record("Name a bird.", "Wren.")]
    records.append(record("Be brief.\n\nName a color.", messages=brief))
    publish.give_ids(records)
    publish.write(tmp_path, {"train": records}, schema := publish.columns(records))
    rows = lines(tmp_path / "jsonl" / "records.jsonl")
    assert rows[0]["messages"] == messages and rows[0]["output"] == "Green." and len(rows[1]["messages"]) == 2
    card = publish.card({"train": records}, schema, [], [], figures=analyze_data.figures(records), **FACTS)
    assert "1 of them is a conversation of several turns" in card


FACTS = {"license": "mit", "restricted": "", "generator": None, "drawn": False, "languages": [], "date": "2026-11-22"}
FACTS["address"] = "me/birds"


def test_ids_are_of_the_conversation_and_stay_when_records_come(tmp_path):
    few, more = [record("Name a color.")], [record("Name a bird."), record("Name a color."), record("Name a color.")]
    for records in (few, more):
        publish.give_ids(records)
    assert more[1]["id"] == few[0]["id"] and more[2]["id"] == few[0]["id"] + "-2" and more[0]["id"] != few[0]["id"]


def test_copies_of_a_task_are_on_one_side_and_stay_there_when_the_data_grows():
    records = [record(f"Name the number {i}.") for i in range(400)]
    copies = [record(f"name  the NUMBER {i}.", "Another answer.") for i in range(400)]
    train, test = publish.split(records + copies, 0.25)
    number = {
        "train": {r["instruction"].split()[-1] for r in train},
        "test": {r["instruction"].split()[-1] for r in test},
    }
    assert not number["train"] & number["test"] and 60 <= len(number["test"]) <= 140  # 100 ± 4.6 standard deviations
    assert publish.split(records[:100], 0.25)[1] == [r for r in test if r in records[:100]]


def test_a_given_test_is_a_split_and_its_overlap_is_stated(tmp_path):
    jdump([record("Name a color."), record("Name a bird.")], tmp_path / "a.json")
    jdump([record("name a  color.", "Red."), record("Name a fish.")], tmp_path / "b.json")
    analyze_data.publish(
        str(tmp_path / "a.json"), str(tmp_path / "out"), "mit", eval_data_path=str(tmp_path / "b.json")
    )
    splits = loaded(tmp_path / "out", tmp_path / "cache")
    assert [[row["instruction"] for row in rows] for rows in splits.values()] == [
        ["Name a color.", "Name a bird."],
        ["name a  color.", "Name a fish."],
    ]
    assert "1 of the test's tasks is in the training data too" in (tmp_path / "out" / "README.md").read_text()


def test_what_the_generator_reported_is_in_the_card(tmp_path):
    report = {"model_name": "/home/me/big-teacher", "parsed": 1200, "kept": 1075, "dropped": {"too short": 125}}
    report |= {"seed": 42, "cost_usd": 0.5, "failed": {"HTTP 500: http://10.0.0.7/v1": 2}}
    report |= {"started": "2026-11-22T09:00:00Z", "ended": "2026-11-22T10:30:00Z"}
    jdump(report, tmp_path / "report.json")
    jdump([record("Name a color.")], tmp_path / "a.json")
    analyze_data.publish(
        str(tmp_path / "a.json"), str(tmp_path / "out"), "mit", report_path=str(tmp_path / "report.json")
    )
    card = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "| teacher | big-teacher |",
        "| random seed | 42 |",
        "| cost in dollars | 0.5 |",
        "| parsed | 1,200 |",
    ):
        assert line in card
    assert "| dropped: too short | 125 |" in card and "From 2026-11-22T09:00:00Z to 2026-11-22T10:30:00Z." in card
    assert "10.0.0.7" not in card and "/home/me" not in card


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"items": 3}', '{"model_name": 3, "parsed": 1, "kept": 1, "dropped": []}']
)
def test_another_report_is_refused_before_anything_is_made(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError, match="is not a report.json of generate_instruction.py"):
        publish.read_report(str(tmp_path / "report.json"))


def test_a_strangers_names_break_neither_the_header_nor_the_tables(tmp_path):
    jdump([record("Name a color.", **{"a | b": 1})], tmp_path / "x`y|z.json")
    jdump([record("Name a bird.")], tmp_path / "w.json")
    folder = tmp_path / 'a "b": c # d'
    analyze_data.publish(f"{tmp_path / 'x`y|z.json'},{tmp_path / 'w.json'}", str(folder), "mit")
    assert len(loaded(folder, tmp_path / "cache")["train"]) == 2
    card = (folder / "README.md").read_text()
    assert r"- x\`y\|z.json, SHA-256" in card and r"| a \| b |" in card
