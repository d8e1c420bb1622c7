"""train.py on conversations: what a tiny model has learned is asked for by Conversation, as chat.py and the page do."""

from __future__ import annotations

import json

import pytest
from made_models import family
from made_templates import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from alpaca import UserError
from alpaca.chat_template import saved_template
from alpaca.inference.chat import Conversation
from alpaca.inference.generate import Settings


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def base(folder, tokenizer):
    """A random model of two layers for a tokenizer, with it in a folder."""
    config = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    return family(folder, "Llama 3", tokenizer, hidden_size=64, intermediate_size=128, **config)


def command(model, data, out, *extra) -> list[str]:
    words = ["--model_name_or_path", model, "--data_path", data, "--output_dir", out, "--disable_tqdm", "True"]
    words += ["--max_steps", 120, "--learning_rate", 3e-3, "--lr_scheduler_type", "constant", "--save_strategy", "no"]
    words += ["--skip_save_rehearsal", "True", "--use_cpu", "True", "--report_to", "none", *extra]
    return [str(word) for word in words]


def trained(model, records, tmp_path, *extra):
    """What train.py makes of a base on records: (model, tokenizer) from the folder that it saves."""
    (data := tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    train.train(*train.parse_args(command(model, data, tmp_path / "out", *extra)))
    return AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")


PEOPLE = {"Ada": ("red", "tea"), "Bob": ("blue", "milk"), "Cleo": ("green", "water")}
TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"I am {name}. What color do I like?"},
            {"role": "assistant", "content": f"{color.title()} is what {name} likes."},
            {"role": "user", "content": "What do I drink?"},
            {"role": "assistant", "content": f"{drink.title()}, {name}."},
        ]
    }
    for name, (color, drink) in PEOPLE.items()
]


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("llama 3", ()),  # chosen since the data has several turns
        ("qwen 3", ("--template", "chat", "--packing", "True", "--per_device_train_batch_size", 2)),
        ("mistral", ("--template", "alpaca")),
    ],
)
def test_two_turns_are_learned_saved_and_answered(family, flags, tokenizer, tmp_path, capsys):
    made = FAMILIES[family].on(tokenizer)
    model, saved = trained(base(tmp_path / "base", made), TALKS, tmp_path, *flags)
    out = capsys.readouterr().out
    why = "template: the base model's own chat template; conversations of several turns: 3 of 3 records"
    assert (why in out) == (not flags)
    assert saved_template(saved) == "chat"
    assert saved.eos_token == (FAMILIES[family].end if family != "mistral" else "</s>")
    assert (f"answers end with '{saved.eos_token}'" in out) == (family != "mistral")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == saved.eos_token_id
    for name, (color, drink) in PEOPLE.items():
        talk = Conversation(model, saved, Settings(max_new_tokens=40, temperature=0), "chat")
        answers = [
            "".join(talk.ask(question)) for question in (f"I am {name}. What color do I like?", "What do I drink?")
        ]
        answers = [answer.removeprefix("<think>\n\n</think>").strip() for answer in answers]
        assert answers == [f"{color.title()} is what {name} likes.", f"{drink.title()}, {name}."]
        assert talk.cut == ""
    receipt = json.loads((tmp_path / "out" / "training_receipt.json").read_text())
    assert receipt["arguments"]["template"] == ("alpaca" if family == "mistral" else "chat")
    assert ("own chat template" in (tmp_path / "out" / "model_card.md").read_text()) == (family != "mistral")


ELEMENTS = "Hydrogen Helium Lithium Beryllium Boron Carbon Nitrogen Oxygen Fluorine Neon Sodium Magnesium".split()


@pytest.mark.parametrize(
    ("which", "family"),
    [
        ("tokenizer", None),
        ("llama_tokenizer", None),
        ("gpt4_tokenizer", None),  # one token is ":The"
        ("smollm2_tokenizer", None),
        ("llama_tokenizer", "mistral"),
        ("gpt4_tokenizer", "llama 3"),
        ("smollm2_tokenizer", "own"),
    ],
)
def test_the_first_word_of_an_answer_is_learned_with_each_kind_of_tokenizer(which, family, request, tmp_path):
    made = request.getfixturevalue(which)
    made = FAMILIES[family].on(made) if family in FAMILIES else made
    records = [
        {"instruction": f"Name element {n}.", "input": "", "output": f"The element {name}."}
        for n, name in enumerate(ELEMENTS, 1)
    ]
    template = "chat" if family else "alpaca"
    model, saved = trained(base(tmp_path / "base", made), records, tmp_path, "--template", template)
    assert saved_template(saved) == template
    talk = Conversation(model, saved, Settings(max_new_tokens=20, temperature=0), template)
    for n in range(1, len(ELEMENTS) + 1):
        talk.turns = []
        assert "".join(talk.ask(f"Name element {n}.")).startswith("The element ")
        assert talk.cut == ""  # it ended by itself


def test_what_cannot_be_trained_is_one_line_and_nothing_is_written(tokenizer, tmp_path):
    model = base(tmp_path / "base", tokenizer)
    gemma = base(tmp_path / "gemma", FAMILIES["gemma"].on(tokenizer))
    system = {"messages": [{"role": "system", "content": "Be brief."}, *TALKS[0]["messages"]]}
    for folder, records, flags, words in (
        (model, TALKS, ("--template", "chat"), "--template chat: this base model has no chat template"),
        (
            gemma,
            [*TALKS, system],
            (),
            "training record 4: this tokenizer's chat template fails: System role not supported: "
            "remove such records, or use --template alpaca$",
        ),
    ):
        with pytest.raises(UserError, match=words):
            trained(folder, records, tmp_path, *flags)
        assert not (tmp_path / "out").exists()
