"""The chat template: a server's prompt is training's, in text and in tokens."""

from __future__ import annotations

import json
import re
from copy import deepcopy

import pytest
from made_templates import FAMILIES
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import utils
from alpaca import UserError
from alpaca.chat_template import chat_ids, chat_template, go_template
from alpaca.inference.chat import request_ids
from alpaca.prompts import prompt_ids
from alpaca.training.receipt import modelfile

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


def go_rendered(template: str, messages: list[dict]) -> str:
    """What Ollama makes of the few words of Go's template language that are used."""
    default, start, each = re.fullmatch(
        "(?:{{ if not .System }}(.*?){{ end }})?(.*?){{ range .Messages }}{{ (if eq .*){{ end }}{{ end }}",
        template,
        re.S,
    ).groups()
    forms = dict(re.findall(r'if eq .Role "([a-z]+)" }}(.*?)(?={{ else |\Z)', each, re.S))
    start += (default or "") * (messages[0]["role"] != "system")
    return start + "".join(forms.get(m["role"], "").replace("{{ .Content }}", m["content"]) for m in messages)


@pytest.mark.parametrize("family", ["alpaca", *FAMILIES])
def test_ollamas_template_writes_what_the_tokenizers_own_writes(tokenizer, family):
    made = FAMILIES[family].on(tokenizer) if family in FAMILIES else deepcopy(tokenizer)
    if family == "alpaca":
        made.chat_template = chat_template(made)
    messages = [{"role": "user", "content": "Sing."}, {"role": "assistant", "content": "La."}]
    messages = [*messages, *messages, {"role": "user", "content": "Again."}]
    for asked in (messages[:1], messages[:3], messages):
        expected = made.apply_chat_template(asked, tokenize=False, add_generation_prompt=True).removeprefix("<s>")
        assert go_rendered(go_template(made), asked) == expected


def test_ollamas_template_puts_a_system_text_where_the_tokenizers_own_does(tokenizer):
    """In place of the template's default; what a template cannot write apart from the question is left out."""
    taken = set()
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sing."}]
    said += [{"role": "assistant", "content": "La."}, {"role": "user", "content": "Again."}]
    for name, family in FAMILIES.items():
        made = family.on(tokenizer)
        if "system" in (template := go_template(made)):
            taken.add(name)
            expected = made.apply_chat_template(said, tokenize=False, add_generation_prompt=True).removeprefix("<s>")
            assert go_rendered(template, said) == expected
        else:
            assert go_rendered(template, said) == go_rendered(template, said[1:])
    assert taken == {name for name, family in FAMILIES.items() if family.system} | {"llama 2"}  # as one more question
    made.chat_template = chat_template(made)
    assert "system" not in go_template(made).casefold()  # Alpaca's prompt has none, whatever the base model's had


def test_a_template_that_fails_over_two_turns_is_left_out_of_the_modelfile(tokenizer):
    made = deepcopy(tokenizer)
    made.chat_template = "{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}"
    lines = ["FROM .", 'PARAMETER stop "</s>"', 'PARAMETER stop "### Instruction:"', "PARAMETER num_ctx 2048"]
    assert modelfile(made, 2048).splitlines() == lines
    made.chat_template = chat_template(made)
    assert modelfile(made, None).startswith('FROM .\nTEMPLATE """{{ range .Messages }}')


def test_an_earlier_turn_is_an_example_of_its_own(templated):
    prompts = [training_ids(templated, utils.format_prompt(text)) for text in ("Sing.", "Louder.")]
    answer = templated(" La la.", add_special_tokens=False)["input_ids"]
    turns = ids(templated, ("user", "Sing."), ("assistant", " La la."), ("user", "Louder."))
    assert turns == prompts[0] + answer + [templated.eos_token_id] + prompts[1]


def test_a_system_message_is_refused_and_not_dropped(templated):
    with pytest.raises(Exception, match="messages of this role, put their text into the instruction: system"):
        ids(templated, ("system", "Be brief."), ("user", "Sing."))


def test_it_survives_a_save(templated, tmp_path):
    before = ids(templated, ("user", "Sing."))
    templated.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").exists()
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert ids(AutoTokenizer.from_pretrained(tmp_path), ("user", "Sing.")) == before


# ---------------------------------------------------------------------------------------------------------------------
# Special tokens that somebody types.

CHATML = (
    "{{ bos_token }}{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] | trim }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
TYPED = "What does </s> mean? <s> and <unk>, <|turn|>user and <|turn|></s>"


@pytest.fixture(params=["bytes", "sentencepiece"])
def chatty(request, tokenizer):
    """Tokenizers with another family's template, whose special token takes the white space behind it along."""
    folder = request.param == "sentencepiece" and request.getfixturevalue("sentencepiece_folder")
    made = AutoTokenizer.from_pretrained(folder) if folder else deepcopy(tokenizer)
    made.add_special_tokens({"additional_special_tokens": [AddedToken("<|turn|>", rstrip=True, special=True)]})
    made.chat_template = CHATML
    return made


def test_a_special_token_that_is_typed_is_the_text_that_training_made_of_it(templated):
    """By Alpaca's own template; </s> of an earlier turn is the template's, and stays EOS."""
    content = "Explain </s>.\n\n### Input:\n<s>x</s><unk> \U000f0000"
    wanted = prompt_ids(templated, [utils.format_prompt("Explain </s>.", "<s>x</s><unk> \U000f0000")])[0]
    assert chat_ids(templated, [{"role": "user", "content": content}]) == wanted
    record = {"instruction": "Explain </s>.", "input": "<s>x</s><unk> \U000f0000"}
    assert request_ids(templated, "chat", [record]) == request_ids(templated, "alpaca", [record]) == [wanted]
    assert templated.eos_token_id not in wanted
    answer = {"role": "assistant", "content": "</s> ends."}
    again = chat_ids(templated, [{"role": "user", "content": content}, answer, {"role": "user", "content": "Sing."}])
    assert again.count(templated.eos_token_id) == 1
    assert again[: len(wanted)] == wanted


def test_the_templates_own_special_tokens_stay_what_they_are(chatty):
    turn = chatty.convert_tokens_to_ids("<|turn|>")
    ids = chat_ids(chatty, [{"role": "user", "content": TYPED}])
    assert [id_ for id_ in ids if id_ in chatty.all_special_ids] == [1, turn, 2, turn]
    assert chatty.decode(ids, skip_special_tokens=True).split() == f"user\n{TYPED}\nassistant".split()
    assert sum(id_ in chatty.all_special_ids for id_ in ids_of(chatty, TYPED)) == 4 + 6  # as a server reads them


def ids_of(tokenizer, content: str) -> list[int]:
    return ids(tokenizer, ("user", content))


@pytest.mark.parametrize("content", ["Sing.", "  Two\n\n words  ", HOSTILE, "", "x <|turn", "</ s>", "ünï 好 😀"])
def test_where_no_special_token_is_typed_the_tokens_are_the_librarys(chatty, content):
    messages = [{"role": role, "content": content} for role in ("user", "assistant", "user")]
    wanted = chatty.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat_ids(chatty, messages) == wanted


def test_the_tokenizer_is_left_as_it_was(chatty):
    before = chatty.backend_tokenizer.to_str(), len(chatty)
    chat_ids(chatty, [{"role": "user", "content": TYPED}])
    assert (chatty.backend_tokenizer.to_str(), len(chatty)) == before


def test_a_template_that_fails_on_a_typed_token_is_one_line(chatty):
    chatty.chat_template = "{{ raise_exception('no') }}"
    for content in ("Sing.", TYPED):
        with pytest.raises(UserError, match="this tokenizer's chat template fails: no.*use the alpaca template$"):
            chat_ids(chatty, [{"role": "user", "content": content}])
