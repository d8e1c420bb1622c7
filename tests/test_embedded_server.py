"""``transformers serve`` on a trained folder, as docs/chat.md has it, asked by the openai client."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_models import chain, stream_text
from openai import OpenAI
from transformers import AutoTokenizer

import utils
from alpaca import embedded_model
from alpaca.chat_template import chat_template
from alpaca.common import cli
from alpaca.inference.load import load
from alpaca.prompts import prompt_ids


def with_template(folder: Path) -> Path:
    """The folder with the chat template that train.py leaves in it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = chat_template(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tiny_llama, tmp_path_factory) -> dict[str, Path]:
    """A random model, and one that ends with EOS."""
    root = tmp_path_factory.mktemp("served")
    return {
        "random": with_template(Path(shutil.copytree(tiny_llama, root / "random"))),
        "ends": with_template(chain(root / "ends", "Hi", " there", ".")),
    }


@pytest.fixture(scope="module")
def ask(models, tmp_path_factory):
    """``ask(model, message, **settings)``: text, why it ended, tokens of the prompt; one server for all models."""
    port, log = cli.free_port(0), tmp_path_factory.mktemp("log") / "server.log"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1"]
    with open(log, "wb") as file:
        server = subprocess.Popen([*command, "--port", str(port), "--device", "cpu"], stdout=file, stderr=file)
    try:
        embedded_model._wait_until_healthy(server, f"http://127.0.0.1:{port}", log, 120)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

        def answer(model: str, message: str, **settings):
            messages = [{"role": "user", "content": message}]
            reply = client.chat.completions.create(
                model=str(models[model]), messages=messages, max_tokens=12, temperature=0, **settings
            )
            return reply.choices[0].message.content, reply.choices[0].finish_reason, reply.usage.prompt_tokens

        yield answer
    finally:
        embedded_model._end(server)


@pytest.mark.parametrize(
    ("instruction", "input"), [("Translate into French.", "Good morning"), ("Sing.", ""), ("Sum up:", "a\n\nb\n")]
)
def test_an_input_behind_its_heading_in_the_message_is_trainings_prompt(ask, models, instruction, input):
    message = f"{instruction}\n\n### Input:\n{input}" if input else instruction
    model, tokenizer = load(models["random"], "cpu")
    prompt = utils.format_prompt(instruction, input)
    said = "".join(stream_text(model, tokenizer, prompt, max_new_tokens=12, temperature=0))
    text, _, tokens = ask("random", message)
    assert text.strip() == said.strip() != ""
    assert tokens == len(prompt_ids(tokenizer, [prompt])[0])  # and not of the shorter preface without an input


def test_an_answer_ends_at_eos(ask):
    assert ask("ends", "Greet me.")[:2] == ("Hi there.", "stop")


def test_an_answer_ends_at_a_text_that_the_client_names_and_that_text_is_left_in_it(ask):
    """As at "### Instruction:", which docs/chat.md names; chat.py takes it away."""
    whole, reason, _ = ask("random", "Sing.")
    assert reason == "length"
    stop = whole.strip()[1]
    assert whole.index(stop) + 1 < len(whole)
    assert ask("random", "Sing.", stop=[stop])[:2] == (whole[: whole.index(stop) + 1], "stop")
