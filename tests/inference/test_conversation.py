"""chat.Conversation: a turn computes only what the one before did not read, and what fails is not a turn."""

from __future__ import annotations

import pytest
import torch
from made_models import count_fed, stream_text

import utils
from alpaca import UserError
from alpaca.chat_template import chat_ids
from alpaca.inference.chat import Conversation
from alpaca.inference.generate import Memory, Settings, answer_batch
from alpaca.inference.load import load
from alpaca.prompts import prompt_ids

TURNS = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def loaded(tiny_llama):
    """Model and tokenizer of tiny_llama on the CPU."""
    return load(tiny_llama, "cpu")


def written(given, ids, memory=None, on_step=lambda pieces: None) -> list[int]:
    """The answer's tokens, with model and tokenizer ``given``."""
    (answer,) = answer_batch(*given, [ids], Settings(3, 0), on_step, memory=memory)
    return answer.tokens


@pytest.fixture
def talking(tiny_llama):
    """Model, tokenizer with a chat template, and the tokens that the model is fed."""
    model, tokenizer = load(tiny_llama, "cpu")
    tokenizer.chat_template = TURNS
    return model, tokenizer, count_fed(model)


def test_a_turn_computes_only_what_the_one_before_did_not_read(talking):
    model, tokenizer, fed = talking
    conversation = Conversation(model, tokenizer, Settings(8, 0), "chat")
    pieces = []
    first = conversation.ask("Say something about rivers.", say=pieces.append)
    assert first == "".join(pieces) and len(pieces) > 1
    ids = chat_ids(tokenizer, [{"role": "user", "content": "Say something about rivers."}])
    assert fed == [len(ids)] + [1] * 7
    raw = conversation.turns[1]["content"]
    assert raw.strip() == first
    fed.clear()
    read = list(conversation.memory.ids)
    second = conversation.ask("More.")
    whole = chat_ids(tokenizer, [*conversation.turns[:2], {"role": "user", "content": "More."}])
    common = next(i for i, (a, b) in enumerate(zip(read, whole, strict=False)) if a != b)
    assert common >= len(ids)
    assert fed == [len(whole) - common] + [1] * 7
    (fresh,) = answer_batch(model, tokenizer, [whole], Settings(8, 0))
    assert second == fresh.text  # and it is what the whole prompt gives


def test_memory_keeps_the_common_beginning_and_never_the_last_token(talking):
    model, tokenizer, fed = talking
    memory, prompt, read = Memory(), [1, 50, 60, 70, 80], []
    for ids in (prompt, prompt, [1, 50, 99], [1, 50, 99, 3, 4, 5, 6], [7], prompt):
        fed.clear()
        tokens = written((model, tokenizer), ids, memory)
        read.append(fed[0])
        assert tokens == written((model, tokenizer), ids)
    assert read == [5, 1, 1, 4, 1, 5]


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["the first layer", "a later step", "crop", "the end"])
def test_ctrl_c_anywhere_leaves_a_conversation_that_answers_as_a_new_one(talking, place, monkeypatch):
    """Between the first layer and the second, and while the cache is cut to what two prompts share."""
    model, tokenizer, fed = talking
    conversation = Conversation(model, tokenizer, Settings(8, 0), "chat")
    conversation.ask("Hi")
    turns, memory, said = conversation.turns, conversation.memory, []
    with monkeypatch.context() as patch:
        if place == "crop":
            conversation.turns = []
            inner = memory.cache.crop
            memory.cache.crop = lambda length: (inner(length), interrupt())
        elif place == "the end":
            generate = model.generate
            patch.setattr(model, "generate", lambda **given: (generate(**given), interrupt()))
        else:
            fed.clear()
            step = 1 if place == "the first layer" else 4
            layer = model.model.layers[1]
            handle = layer.register_forward_pre_hook(lambda *_: interrupt() if len(fed) == step else None)
        with pytest.raises(KeyboardInterrupt):
            conversation.ask("Ho", say=said.append)
    if place in ("the first layer", "a later step"):
        handle.remove()
    assert memory.cache is None
    assert len(conversation.turns) == 2 * (place != "crop") + 2 * bool(said)  # a turn, as far as it got
    assert bool(said) == (place in ("a later step", "the end"))
    conversation.turns = turns
    new = Conversation(model, tokenizer, Settings(8, 0), "chat")
    new.turns = turns
    assert conversation.ask("Ho") == new.ask("Ho")


def test_an_answer_that_fails_is_no_turn(talking):
    model, tokenizer, fed = talking
    conversation = Conversation(model, tokenizer, Settings(8, 0), "chat")

    def fail(*_):
        if len(fed) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.register_forward_pre_hook(fail)
    with pytest.raises(UserError, match="its answer do not fit the memory: lower max_new_tokens, or use dtype"):
        conversation.ask("Hi")
    handle.remove()
    assert len(fed) == 5 and conversation.turns == []


def test_a_stopped_answer_is_a_turn_and_a_refused_one_is_none(talking):
    model, tokenizer, _ = talking
    conversation = Conversation(model, tokenizer, Settings(50, 0), "chat")
    pieces = []
    shown = conversation.ask("Hi", "", pieces.append, lambda: len(pieces) > 1)
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"]
    assert conversation.turns[1]["content"] == shown == "".join(pieces) and not conversation.cut
    turns = conversation.turns
    with pytest.raises(UserError, match="reads at most 1024: shorten it$"):
        conversation.ask("Q" * 2000)
    assert conversation.turns is turns
    conversation.turns = []
    assert conversation.turns == []


def test_alpacas_template_asks_each_instruction_alone_and_reads_its_preface_once(talking):
    model, tokenizer, fed = talking
    conversation = Conversation(model, tokenizer, Settings(8, 0))
    for text in ("Sing.", "Dance."):
        prompt = utils.format_prompt(text)
        assert conversation.ask(text) == "".join(stream_text(model, tokenizer, prompt, 8, 0))
    whole, preface = [len(prompt_ids(tokenizer, [text])[0]) for text in (prompt, prompt.split("Dance")[0])]
    _, _, asked, streamed = (tokens for tokens in fed if tokens > 1)
    assert streamed == whole and asked <= whole - preface + 1


def test_a_tokenizer_without_a_chat_template_is_told(loaded):
    with pytest.raises(UserError, match="no chat template: use the alpaca template"):
        Conversation(*loaded, Settings(8, 0), "chat").ask("Hi")
