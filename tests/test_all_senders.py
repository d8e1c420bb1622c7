"""Trained tokens ≡ asked tokens, for all that asks a model: compared where they arrive, in its forward pass.

The models say " yes" to everything. One was trained with Alpaca's prompt, one with Alpaca's over several turns, and one
with ChatML.
"""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import call
from forward_spy import spied
from openai import OpenAI
from transformers import LlamaConfig, LlamaForCausalLM

import chat
import judge
import weight_diff
from alpaca import embedded_model
from alpaca.chat_template import chat_template, mark_trained, messages_of
from alpaca.common import cli
from alpaca.inference.chat import Conversation
from alpaca.inference.generate import Settings
from alpaca.inference.load import load, load_tokenizer
from alpaca.inference.web import page as web_page
from alpaca.training.examples import IGNORE_INDEX, tokenize

ROOT = Path(__file__).parent.parent
SAID = " yes"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUICK = {"max_new_tokens": 1, "temperature": 0, "device": "cpu"}
PLAIN = [("Say it.", ""), ("Translate into French.", "Good morning\n\nto you"), ("日本語 é 🙂?", "naïve ‘quotes’")]
TYPED = [("</s> ends what?", ""), ("<|im_end|>\n<|im_start|>system", "<s> and </s>"), ("Say </s>", "<|im_end|>")]
TALK = [
    {"role": "user", "content": "Is </s> a token?\n\n### Input:\n<|im_end|> é"},
    {"role": "assistant", "content": SAID.strip()},
    {"role": "user", "content": "And this: <|im_start|>?"},
    {"role": "assistant", "content": "No."},
]


def single(instruction: str, input: str) -> dict:
    return {"instruction": instruction, "input": input, "output": "An answer."}


SINGLE = [single(*texts) for texts in PLAIN + TYPED]
TURNS = single("Is </s> a token?", "<|im_end|> é") | {"output": SAID.strip(), "messages": TALK}


def make_model(folder: Path, tokenizer) -> Path:
    """A LLaMA whose layers add nothing and whose likeliest token is always SAID."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model, (said,) = LlamaForCausalLM(config), tokenizer(SAID, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.fill_(1)
        model.lm_head.weight[said] = 1
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Models as train.py leaves them, by how they were trained."""
    root, made = tmp_path_factory.mktemp("trained"), {}
    for kind in ("alpaca", "alpaca, several turns", "chat"):
        made[kind] = deepcopy(tokenizer)
        made[kind].add_tokens([SAID])
        made[kind].add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made["alpaca"].chat_template = chat_template(made["alpaca"])
    made["alpaca, several turns"].chat_template = mark_trained(chat_template(made["alpaca, several turns"]))
    made["chat"].chat_template = mark_trained(CHATML)
    made["chat"].eos_token = "<|im_end|>"
    return {kind: make_model(root / kind.replace(", ", "-").replace(" ", "-"), one) for kind, one in made.items()}


@pytest.fixture
def fed(monkeypatch) -> list[list[int]]:
    """All rows that models in this process are given, in order."""
    rows: list[list[int]] = []
    monkeypatch.setattr(LlamaForCausalLM, "forward", spied(rows.append))
    return rows


def trained(folder: Path, record: dict) -> tuple[list[int], list[int]]:
    """The tokens before a record's last answer, and all, in the row that training learns."""
    [*_, row] = tokenize([record], load_tokenizer(folder), 10**6)[0]
    ids, labels = row["input_ids"], row["labels"]
    border = max(i for i, label in enumerate(labels) if label == IGNORE_INDEX) + 1
    assert labels[border:] == ids[border:]
    return ids[:border], ids


def in_the_terminal(folder, questions, monkeypatch, capsys) -> None:
    lines = [f'/input """{input}"""\n"""{instruction}"""\n' for instruction, input in questions]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(lines)))
    chat.chat(str(folder), **QUICK)
    assert capsys.readouterr().out.split() == [SAID.strip()] * len(questions)


def on_the_page(folder, questions) -> None:
    """As the page does it: the exchange that it keeps goes along with the next question."""

    async def ask() -> None:
        demo, exchange = web_page.Demo([web_page.Model("m", *load(folder, "cpu"))], Settings()), None
        demo.page.server = SimpleNamespace(force_exit=False)  # it is asked past its server
        visitor = SimpleNamespace(client=SimpleNamespace(host="127.0.0.1"))
        for question in questions:
            async for shown in demo.answer(visitor, exchange, *question, 1, 0, 1, "0"):
                exchange = shown.get(demo.exchange, exchange)
            assert [record["answer"] for record in exchange] == [SAID.strip()]

    asyncio.run(ask())


def write_lines(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


KINDS = ("alpaca", "alpaca, several turns", "chat")


@pytest.mark.parametrize("kind", KINDS)
def test_single_turns_are_asked_with_the_tokens_before_their_answers_in_training(
    folders, kind, fed, tmp_path, monkeypatch, capsys
):
    folder, asked = folders[kind], [(record["instruction"], record["input"]) for record in SINGLE]
    expected, rows = zip(*(trained(folder, record) for record in SINGLE), strict=True)

    def sent() -> list[list[int]]:
        rows, fed[:] = list(fed), []
        return rows

    for question in asked:
        list(Conversation(*load(folder, "cpu"), Settings(1, 0)).ask(*question))
    assert sent() == list(expected)
    for question in asked:
        in_the_terminal(folder, [question], monkeypatch, capsys)
    assert sent() == list(expected)
    for instruction, input in asked:
        chat.chat(str(folder), instruction=instruction, input=input, **QUICK)
    assert sent() == list(expected)
    for question in asked:
        on_the_page(folder, [question])
    assert sent() == list(expected)
    data = write_lines(tmp_path / "in.jsonl", SINGLE)
    chat.chat(str(folder), batch_path=data, output_path=str(tmp_path / "batch.jsonl"), **QUICK)
    assert sorted(sent()) == sorted(expected)
    call(judge.answer, data, str(tmp_path / "judge.jsonl"), model_path=str(folder), reference_loss=True, **QUICK)
    assert sorted(sent()) == sorted([*expected, *rows])  # and the prompts with their references


@pytest.mark.parametrize("kind", KINDS[1:])
def test_two_turns_are_asked_with_the_tokens_before_the_second_answer_in_training(
    folders, kind, fed, tmp_path, monkeypatch, capsys
):
    folder = folders[kind]
    expected, row = trained(folder, TURNS)
    first, _ = trained(folder, TURNS | {"messages": TALK[:2]})
    assert expected[: len(first)] == first
    questions = [("Is </s> a token?", "<|im_end|> é"), (TALK[2]["content"], "")]
    in_the_terminal(folder, questions, monkeypatch, capsys)
    assert fed == [first, expected]
    on_the_page(folder, questions)
    assert fed[2:] == [first, expected]
    data = write_lines(tmp_path / "in.jsonl", [{"messages": TALK}])
    chat.chat(str(folder), batch_path=data, output_path=str(tmp_path / "batch.jsonl"), **QUICK)
    assert fed[4:] == [expected]
    call(judge.answer, data, str(tmp_path / "judge.jsonl"), model_path=str(folder), reference_loss=True, **QUICK)
    assert fed[5:] == [expected, row]
    answered = json.loads((tmp_path / "batch.jsonl").read_text())
    assert answered["messages"] == [*TALK[:3], {"role": "assistant", "content": SAID.strip()}]


def test_alpacas_prompt_has_earlier_turns_as_examples_where_a_file_has_them_and_says_so(
    folders, fed, tmp_path, capsys, monkeypatch
):
    """As the model that was trained so; typed turns are asked alone."""
    expected, _ = trained(folders["alpaca, several turns"], TURNS)
    data = write_lines(tmp_path / "in.jsonl", [{"messages": TALK}])
    chat.chat(str(folders["alpaca"]), batch_path=data, output_path=str(tmp_path / "batch.jsonl"), **QUICK)
    assert fed == [expected]
    assert "1 of several turns: in Alpaca's template the earlier ones are examples" in capsys.readouterr().err
    in_the_terminal(folders["alpaca"], [("One.", ""), ("Two.", "")], monkeypatch, capsys)
    assert fed[1:] == [trained(folders["alpaca"], single(text, ""))[0] for text in ("One.", "Two.")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_recovered_model_is_tested_in_the_template_that_it_was_trained_with(folders, kind, fed, capsys):
    weight_diff._smoke_test(str(folders[kind]), "cpu", 0)
    assert fed[0] == trained(folders[kind], single(weight_diff.SMOKE_TEST, ""))[0]


@pytest.fixture(scope="module")
def serve(folders, tmp_path_factory):
    """``serve(kind, messages)``: the tokens that the model behind ``transformers serve`` is given."""
    port, root = cli.free_port(0), tmp_path_factory.mktemp("served")
    command = [sys.executable, str(ROOT / "tests" / "forward_spy.py"), str(root / "fed"), "serve"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(root / "log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        embedded_model._wait_until_healthy(server, f"http://127.0.0.1:{port}", root / "log", 300)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

        def ask(kind: str, messages: list[dict]) -> list[int]:
            (root / "fed").write_text("")
            client.chat.completions.create(model=str(folders[kind]), messages=messages, max_tokens=1, temperature=0)
            [ids] = (root / "fed").read_text().splitlines()
            return json.loads(ids)

        yield ask
    finally:
        embedded_model._end(server)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_asks_with_the_tokens_of_training(folders, serve, kind):
    for record in [single(*texts) for texts in PLAIN]:
        assert serve(kind, messages_of(record)[:-1]) == trained(folders[kind], record)[0]
    if kind != "alpaca":
        talk = [one | {"content": f"Turn {number}, é"} for number, one in enumerate(TALK)]
        assert serve(kind, talk[:-1]) == trained(folders[kind], TURNS | {"messages": talk})[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_known_limit_a_server_takes_the_typed_name_of_a_special_token_for_that_token(folders, serve, kind):
    """It tokenizes the rendered text in one piece. docs/chat.md says so."""
    tokenizer = load_tokenizer(folders[kind])
    for record in [single(*texts) for texts in TYPED]:
        asked = messages_of(record)[:-1]
        ids = serve(kind, asked)
        text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        assert ids == tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        assert ids != trained(folders[kind], record)[0]
        assert tokenizer.decode(ids) == tokenizer.decode(trained(folders[kind], record)[0])  # the same text
