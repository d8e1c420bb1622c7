"""alpaca/training/samples.py: what chat would answer, at each evaluation; training does not notice."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_records
from safetensors.torch import load_file

import train
from alpaca.inference.chat import Conversation
from alpaca.inference.generate import Settings
from alpaca.inference.load import load
from alpaca.training import samples


def run(model, data, out, *extra) -> dict:
    """3 steps of 4 examples, each evaluated; return the receipt."""
    argv = ["--model_name_or_path", model, "--data_path", data, "--output_dir", out, "--max_steps", 3]
    argv += ["--per_device_train_batch_size", 4, "--learning_rate", 1e-2, "--logging_steps", 1, "--report_to", "none"]
    argv += ["--eval_fraction", 0.2, "--eval_strategy", "steps", "--eval_steps", 1, "--save_strategy", "no"]
    argv += ["--skip_save_rehearsal", "True", "--disable_tqdm", "True", *extra]
    train.train(*train.parse_args([str(word) for word in argv]))
    return json.loads((out / "training_receipt.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.json"
    path.write_text(json.dumps(make_records(24)))
    return path


@pytest.mark.parametrize("extra", [(), ("--lora_r", 4)], ids=["full", "lora"])
def test_training_is_the_same_bit_for_bit_without_them(extra, tiny_llama, data, tmp_path, monkeypatch):
    """LoRA's dropout draws at each step: a random number that an answer took would change all losses after it."""
    shown = run(tiny_llama, data, tmp_path / "with", *extra)
    monkeypatch.setattr(samples.Samples, "on_evaluate", lambda *args, **kwargs: None)
    bare = run(tiny_llama, data, tmp_path / "without", *extra)
    assert [[answer["step"] for answer in one["answers"]] for one in shown["samples"]] == [[0, 1, 2, 3]] * 3
    assert bare["samples"] == [] and "Before and after" not in (tmp_path / "without" / "model_card.md").read_text()
    assert shown["losses"] == bare["losses"] and shown["eval_losses"] == bare["eval_losses"]
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_last_answers_are_those_of_chat_with_the_result(tiny_llama, data, tmp_path, capsys):
    shown = run(tiny_llama, data, tmp_path / "out", "--learning_rate", 1e-3)["samples"]
    assert all(answer["answer"] for sample in shown for answer in sample["answers"])
    model, tokenizer = load(tmp_path / "out", dtype="float32", device="cpu")
    printed = capsys.readouterr().out
    for sample in shown:
        instruction, _, input = sample["prompt"].partition("\n\n### Input:\n")
        chat = Conversation(model, tokenizer, Settings(max_new_tokens=60, temperature=0))
        assert "".join(chat.ask(instruction, input)) == sample["answers"][-1]["answer"].strip()
        assert sum(line.startswith(f"    {instruction}") for line in printed.split("\n")) == 4
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    texts = [entry["eval_sample_0"] for entry in history if "eval_sample_0" in entry]  # reporters get these texts
    assert len(texts) == 4 and all(text.startswith(shown[0]["prompt"] + samples.ANSWER) for text in texts)


def test_a_model_that_cannot_answer_is_reported_once_and_trained(tiny_llama, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(samples, "decode", lambda *args: 1 / 0)
    paper = run(tiny_llama, data, tmp_path / "out")
    assert paper["samples"] == [] and len(paper["losses"]) == 3
    assert capsys.readouterr().out.count("note: no sample answers") == 1
