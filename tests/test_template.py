"""The chat template: a server's prompt is training's, in text and in tokens."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import utils
from alpaca.template import chat_template

HOSTILE = "Say 'x' or \"y\"\\n {{ bos }} {% raw %} – ### Input: ünïcode\n  `code`\ttab "


@pytest.fixture(params=["bos", "none", "eos behind", "sentencepiece"])
def templated(request, tokenizer):
    """Tokenizers that put <s> in front, put nothing there, append </s> as well, or put <s> and a space in front."""
    if request.param == "sentencepiece":
        made = AutoTokenizer.from_pretrained(request.getfixturevalue("sentencepiece_folder"))
    else:
        core = deepcopy(tokenizer.backend_tokenizer)
        form = {"bos": "<s> $A", "none": "$A", "eos behind": "<s> $A </s>"}[request.param]
        core.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<s>", 1), ("</s>", 2)])
        made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = chat_template(made)
    return made


def ids(tokenizer, *messages) -> list[int]:
    turns = [dict(zip(("role", "content"), message, strict=True)) for message in messages]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]


def training_ids(tokenizer, prompt: str) -> list[int]:
    return [token for token in tokenizer(prompt)["input_ids"] if token != tokenizer.eos_token_id]


@pytest.mark.parametrize("input", ["", "Good morning", HOSTILE])
@pytest.mark.parametrize("instruction", ["Translate.", HOSTILE])
def test_one_turn_has_the_tokens_of_the_prompt_that_training_saw(templated, instruction, input):
    content = f"{instruction}\n\n### Input:\n{input}" if input else instruction
    expected = training_ids(templated, utils.format_prompt(instruction, input))
    assert ids(templated, ("user", content)) == expected
    assert ids(templated, ("user", [{"type": "text", "text": content}])) == expected


def test_the_text_is_the_prompts_behind_a_bos_that_the_tokenizer_would_add(tokenizer):
    made = deepcopy(tokenizer)
    made.chat_template = chat_template(made)
    text = made.apply_chat_template([{"role": "user", "content": "Sing."}], tokenize=False, add_generation_prompt=True)
    assert text == "<s>" + utils.format_prompt("Sing.")


def test_an_earlier_turn_is_an_example_of_its_own(templated):
    prompts = [training_ids(templated, utils.format_prompt(text)) for text in ("Sing.", "Louder.")]
    answer = templated(" La la.", add_special_tokens=False)["input_ids"]
    turns = ids(templated, ("user", "Sing."), ("assistant", " La la."), ("user", "Louder."))
    assert turns == prompts[0] + answer + [templated.eos_token_id] + prompts[1]


def test_a_system_message_is_refused_and_not_dropped(templated):
    with pytest.raises(Exception, match="without messages of this role, put their text into the instruction: system"):
        ids(templated, ("system", "Be brief."), ("user", "Sing."))


def test_it_survives_a_save(templated, tmp_path):
    before = ids(templated, ("user", "Sing."))
    templated.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").exists()
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert ids(AutoTokenizer.from_pretrained(tmp_path), ("user", "Sing.")) == before
