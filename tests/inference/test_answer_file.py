"""judge.py answer with a local model: as chat.py answers a file; and its loss on the references is training's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import call, make_records
from made_models import stream_text
from torch.nn import functional

import judge
import train
import utils
from alpaca.data.instruction_sets import read_answers, read_set
from alpaca.inference import answer_file
from alpaca.inference.generate import Answer, Settings
from alpaca.inference.load import load
from alpaca.training.evaluate import reference_losses


def answered(text: str, tokens: int, cut: bool) -> Answer:
    answer = Answer(None, frozenset(), tokens)
    answer.text, answer.tokens, answer.cut = text.strip(), [0] * tokens, cut
    return answer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def loaded(tiny_llama):
    return load(tiny_llama, "cpu")


def test_a_rows_loss_is_that_of_the_reference_and_eos_after_the_prompt(loaded):
    """Against one forward pass over prompt + reference + EOS, tokenised in two pieces."""
    model, tokenizer = loaded
    records = make_records(5)
    for record, scored in zip(records, reference_losses(model, tokenizer, records), strict=True):
        prompt = tokenizer(utils.format_prompt(record["instruction"], record["input"]))["input_ids"]
        answer = tokenizer(record["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        losses = functional.cross_entropy(logits, torch.tensor(answer), reduction="none")
        assert scored == (pytest.approx(losses.mean().item(), abs=1e-5), len(answer))


def test_the_token_weighted_mean_is_trainings_held_out_loss(loaded, tmp_path):
    model, tokenizer = loaded
    records = make_records(23)
    scores = reference_losses(model, tokenizer, records)
    args = train.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_eval_batch_size=4, report_to="none", max_steps=1
    )
    args.remove_unused_columns = False
    dataset = train.SupervisedDataset(records, tokenizer, 1024, "evaluation")
    collator = train.DataCollatorForSupervisedDataset(0)
    trainer = train.Trainer(model=model, args=args, eval_dataset=dataset, data_collator=collator)
    held_out = trainer.evaluate()["eval_loss"]
    assert sum(loss * count for loss, count in scores) / sum(count for _, count in scores) == pytest.approx(held_out)


def test_batches_do_not_change_a_loss_and_what_is_longer_than_the_context_is_cut(loaded):
    model, tokenizer = loaded
    records = [*make_records(8), {"instruction": "x", "input": "", "output": "long " * 600}]
    records += [{"instruction": "long " * 600, "input": "", "output": "y"}]
    together = reference_losses(model, tokenizer, records)
    alone = [reference_losses(model, tokenizer, [record])[0] for record in records]
    assert [score and score[1] for score in together] == [score and score[1] for score in alone]
    assert [score[0] for score in together[:-1]] == pytest.approx([score[0] for score in alone[:-1]], abs=1e-5)
    assert together[-1] is None and 500 < together[-2][1] < 1024  # no EOS


def test_a_local_models_answers_are_greedy_in_the_sets_order_with_their_losses(tiny_llama, loaded, tmp_path, capsys):
    records = [*make_records(6), {"instruction": "Rest.", "input": "", "output": ""}]
    instructions, output = write(tmp_path / "set.jsonl", records), tmp_path / "out.jsonl"
    flags = {"model_path": str(tiny_llama), "max_new_tokens": 6, "device": "cpu", "reference_loss": True}
    call(judge.answer, instructions, str(output), **flags)
    rows = read(output)
    assert [row["id"] for row in rows] == ["1", "2", "3", "4", "5", "6", "7"]
    assert {row["generator"] for row in rows} == {"tiny-llama"}
    assert {row["finish_reason"] for row in rows} == {"length"}  # it is untrained, and never ends by itself
    scores = reference_losses(*loaded, records[:6])
    assert [(row["reference_loss"], row["reference_tokens"]) for row in rows[:6]] == scores
    assert "reference_loss" not in rows[6]  # it has no reference
    prompt = utils.format_prompt(records[0]["instruction"], records[0]["input"])
    alone = "".join(stream_text(*loaded, prompt, max_new_tokens=6, temperature=0))
    assert rows[0]["output"] == alone.strip()
    assert read_answers(output, read_set(instructions)).rows["1"]["reference_tokens"] == scores[0][1]
    assert "7 answers in" in capsys.readouterr().out and not list(tmp_path.glob("*.journal"))


def test_an_instruction_that_does_not_fit_is_told_and_has_an_error(tiny_llama, tmp_path, capsys):
    records = [{"instruction": "long " * 600, "input": "", "output": "y"}, {"instruction": "x", "output": "y"}]
    instructions, output = write(tmp_path / "set.jsonl", records), tmp_path / "out.json"
    call(
        judge.answer,
        instructions,
        str(output),
        model_path=str(tiny_llama),
        max_new_tokens=3,
        device="cpu",
        generator="me",
    )
    rows = json.loads(output.read_text())
    assert "the model reads at most 1024" in rows[0]["error"] and "output" not in rows[0]
    assert rows[1]["generator"] == "me" and rows[1]["finish_reason"] == "length" and "finish_reason" not in rows[0]
    assert "1 answer in" in (said := capsys.readouterr().out) and "1 too long for the context" in said
    assert read_answers(output, read_set(instructions)).unanswered == ["1"]


def test_an_answer_that_ended_by_itself_says_stop_and_one_that_was_cut_length(tiny_llama, tmp_path, monkeypatch):
    made = iter([answered("It ends.", 3, False), answered("It goes on and", 3, True)])
    monkeypatch.setattr(answer_file, "answer_batch", lambda model, tokenizer, ids, *_: [next(made) for _ in ids])
    instructions, output = write(tmp_path / "set.jsonl", make_records(2)), tmp_path / "out.jsonl"
    call(judge.answer, instructions, str(output), model_path=str(tiny_llama), max_new_tokens=3, device="cpu")
    ends = {row["output"]: row["finish_reason"] for row in read(output)}
    assert ends == {"It ends.": "stop", "It goes on and": "length"}


def test_thoughts_are_left_out_of_answers_and_without_an_end_they_are_an_error(tiny_llama, tmp_path, monkeypatch):
    raw = [" <think>\nhm\n</think>\n\nIt ends.", "<think>\nIt goes on", "<think>hm</think>", "hm\n</think>\nIt goes"]
    made = map(answered, raw, (3, 9, 3, 9), (False, True, False, True))
    monkeypatch.setattr(answer_file, "answer_batch", lambda model, tokenizer, ids, *_: [next(made) for _ in ids])
    removed = []
    monkeypatch.setattr(Path, "unlink", lambda path, **_: removed.append(path.read_text()))
    records = [{"instruction": "Say it.", "input": "", "output": "stale", "error": "stale"} for _ in raw]
    requests = [answer_file.Request("", record, record["instruction"], "") for record in records]
    run = (*load(tiny_llama, "cpu"), requests, tmp_path / "out.jsonl", "alpaca", Settings(9), 1 << 14, "me", {})
    counts = answer_file.answer_file(*run)
    assert [
        (row.get("output"), row.get("error"), row.get("finish_reason")) for row in read(tmp_path / "out.jsonl")
    ] == [
        ("It ends.", None, "stop"),
        (None, "no answer: thoughts without an end; allow more tokens", None),
        ("", None, "stop"),
        ("It goes", None, "length"),
    ]
    assert counts == {"answers": 3, "unended": 1, "cut": 1, "earlier": 0, "too_long": 0, "examples": 0}
    assert [json.dumps(text.strip()) in removed[-1] for text in raw] == [True] * 4  # the journal has what was said


def test_a_run_that_ends_before_its_losses_goes_on_without_answering_again(tiny_llama, tmp_path, monkeypatch):
    """test_chat.py kills runs between answers; this is the stage behind them."""
    instructions = write(tmp_path / "set.jsonl", make_records(9))
    flags = {"model_path": str(tiny_llama), "device": "cpu", "reference_loss": True, "max_new_tokens": 5}
    call(judge.answer, instructions, str(tmp_path / "whole.jsonl"), **flags)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("judge._reference_fields", killed)
        with pytest.raises(KeyboardInterrupt):
            call(judge.answer, instructions, str(tmp_path / "killed.jsonl"), **flags)
    assert not (tmp_path / "killed.jsonl").exists()
    monkeypatch.setattr(answer_file, "answer_batch", killed)
    call(judge.answer, instructions, str(tmp_path / "killed.jsonl"), **flags)
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
