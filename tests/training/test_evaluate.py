"""The held-out loss is a mean over all supervised tokens, whatever the batches; samples are what chat would answer."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_records
from made_examples import Examples, make_examples, tiny
from safetensors.torch import load_file
from torch.nn import functional
from transformers import TrainerCallback

import train
from alpaca.inference.chat import Conversation
from alpaca.inference.generate import Settings
from alpaca.inference.load import load
from alpaca.training import evaluate


@pytest.mark.parametrize("padding", ["free", "longest"])
def test_it_does_not_depend_on_how_examples_are_batched(padding, tmp_path):
    model, examples = tiny("llama"), make_examples(11)
    losses = []
    with torch.no_grad():
        for example in examples:
            ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"][1:])
            losses += functional.cross_entropy(model(ids).logits[0, :-1], labels, reduction="none")[labels >= 0]
    expected = torch.stack(losses).mean().item()

    measured = []
    for size in (1, 4, 11):
        args = train.TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, per_device_eval_batch_size=size, report_to="none", max_steps=1
        )
        args.remove_unused_columns = False
        rows, collator, check = train.make_batches(
            model, Examples(examples), 0, train.DataArguments(padding=padding), args
        )
        trainer = train.Trainer(
            model=model, args=args, train_dataset=rows, eval_dataset=Examples(examples), data_collator=collator
        )
        measured.append(trainer.evaluate()["eval_loss"])
    assert measured == pytest.approx([expected] * 3, abs=1e-5)


def test_callbacks_get_the_same_figure(tmp_path):
    seen = []

    class Note(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen.append(metrics["eval_loss"])

    args = train.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    args.remove_unused_columns = False
    collator = train.DataCollatorForSupervisedDataset(0)
    trainer = train.Trainer(
        model=tiny("opt"),
        args=args,
        eval_dataset=Examples(make_examples(9)),
        data_collator=collator,
        callbacks=[Note()],
    )
    result = trainer.evaluate()["eval_loss"]
    assert seen == [result] and [e["eval_loss"] for e in trainer.state.log_history] == [result]


# ---------------------------------------------------------------------------------------------------------------------
# Sample answers.


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
    monkeypatch.setattr(evaluate.Samples, "on_evaluate", lambda *args, **kwargs: None)
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
    assert len(texts) == 4 and all(text.startswith(shown[0]["prompt"] + evaluate.ANSWER) for text in texts)


def test_a_model_that_cannot_answer_is_reported_once_and_trained(tiny_llama, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "greedily", lambda *args: 1 / 0)
    paper = run(tiny_llama, data, tmp_path / "out")
    assert paper["samples"] == [] and len(paper["losses"]) == 3
    assert capsys.readouterr().out.count("note: no sample answers") == 1
