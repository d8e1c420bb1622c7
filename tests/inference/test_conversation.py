"""chat.Conversation: a turn computes only what the one before did not read, and what fails is not a turn."""

from __future__ import annotations

import pytest
import torch
from made_models import count_fed, stream_text

import utils
from alpaca import UserError
from alpaca.chat_template import chat_ids
from alpaca.inference.chat import Conversation, stream
from alpaca.inference.generate import Memory, Settings, decode
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


def alone(model, ids) -> list[int]:
    """The answer's tokens, without a memory."""
    return [token for step in decode(model, [ids], frozenset(), Settings(3, 0)) for _, token in step]


@pytest.fixture
def talking(tiny_llama):
    """Model, tokenizer with a chat template, and the tokens that the model is fed."""
    model, tokenizer = load(tiny_llama, "cpu")
    tokenizer.chat_template = TURNS
    return model, tokenizer, count_fed(model)


def test_a_turn_computes_only_what_the_one_before_did_not_read(talking):
    model, tokenizer, fed = talking
    conversation = Conversation(model, tokenizer, Settings(8, 0), "chat")
    first = "".join(conversation.ask("Say something about rivers."))
    ids = chat_ids(tokenizer, [{"role": "user", "content": "Say something about rivers."}])
    assert fed == [len(ids)] + [1] * 7
    raw = conversation.turns[1]["content"]
    assert raw.strip() == first
    fed.clear()
    read = list(conversation.memory.ids)
    second = "".join(conversation.ask("More."))
    whole = chat_ids(tokenizer, [*conversation.turns[:2], {"role": "user", "content": "More."}])
    common = next(i for i, (a, b) in enumerate(zip(read, whole, strict=False)) if a != b)
    assert common >= len(ids)
    assert fed == [len(whole) - common] + [1] * 7
    fresh = "".join(stream(model, tokenizer, whole, Settings(8, 0)))
    assert second == fresh  # and it is what the whole prompt gives


def test_memory_keeps_the_common_beginning_and_never_the_last_token(loaded):
    model, _ = loaded
    memory, fed_before = Memory(), []

    def ask(ids):
        known = memory.begin(ids)
        tokens = [t for step in decode(model, [ids], frozenset(), Settings(3, 0), set(), memory) for _, t in step]
        fed_before.append(known)
        return tokens

    prompt = [1, 50, 60, 70, 80]
    for ids in (prompt, prompt, [1, 50, 99], [1, 50, 99, 3, 4, 5, 6], [7], prompt):
        assert ask(ids) == alone(model, ids)
    assert fed_before == [0, 4, 2, 3, 0, 0]


def test_memory_is_empty_after_a_step_that_did_not_end(talking):
    model, tokenizer, _ = talking
    conversation = Conversation(model, tokenizer, Settings(8, 0), "chat")
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # between the first layer and the second
        list(conversation.ask("Hi"))
    handle.remove()
    assert conversation.memory.cache is None and conversation.turns == []
    assert "".join(conversation.ask("Hi")) == "".join(Conversation(model, tokenizer, Settings(8, 0), "chat").ask("Hi"))


@pytest.mark.parametrize("place", ["crop", "tolist"])
def test_ctrl_c_anywhere_leaves_no_memory_that_its_tokens_do_not_tell(loaded, place, monkeypatch):
    """While the cache is cut to what two prompts share, and between a step and the note of its tokens."""
    model, _ = loaded
    memory, first, second = Memory(), [1, 50, 60, 70], [1, 50, 99, 98]

    def ask(ids):
        return [t for step in decode(model, [ids], frozenset(), Settings(3, 0), set(), memory) for _, t in step]

    ask(first)
    with monkeypatch.context() as patch:
        if place == "crop":
            inner = memory.cache.crop
            memory.cache.crop = lambda length: (inner(length), (_ for _ in ()).throw(KeyboardInterrupt))
        else:
            patch.setattr(torch.Tensor, "tolist", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ask(second)
    assert memory.cache is None
    assert ask(second) == alone(model, second)


def test_an_answer_that_fails_is_no_turn(talking):
    model, tokenizer, fed = talking
    conversation = Conversation(model, tokenizer, Settings(8, 0), "chat")

    def fail(*_):
        if len(fed) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.register_forward_pre_hook(fail)
    said = []
    with pytest.raises(UserError, match="its answer do not fit the memory: lower max_new_tokens, or use dtype"):
        said.extend(conversation.ask("Hi"))
    handle.remove()
    assert len(fed) == 5 and conversation.turns == []


def test_a_stopped_answer_is_a_turn_and_a_refused_one_is_none(talking):
    model, tokenizer, _ = talking
    conversation = Conversation(model, tokenizer, Settings(50, 0), "chat")
    pieces = conversation.ask("Hi")
    shown = next(pieces)
    pieces.close()
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"]
    assert conversation.turns[1]["content"].strip().startswith(shown.strip())
    turns = conversation.turns
    with pytest.raises(UserError, match="reads at most 1024: shorten it$"):
        list(conversation.ask("Q" * 2000))
    assert conversation.turns is turns
    conversation.reset()
    assert conversation.turns == []


def test_alpacas_template_asks_each_instruction_alone_and_reads_its_preface_once(talking):
    model, tokenizer, fed = talking
    conversation = Conversation(model, tokenizer, Settings(8, 0))
    for text in ("Sing.", "Dance."):
        prompt = utils.format_prompt(text)
        assert "".join(conversation.ask(text)) == "".join(stream_text(model, tokenizer, prompt, 8, 0))
    whole, preface = [len(prompt_ids(tokenizer, [text])[0]) for text in (prompt, prompt.split("Dance")[0])]
    _, _, asked, streamed = (tokens for tokens in fed if tokens > 1)
    assert streamed == whole and asked <= whole - preface + 1


def test_a_tokenizer_without_a_chat_template_is_told(loaded):
    with pytest.raises(UserError, match="no chat template: use the alpaca template"):
        list(Conversation(*loaded, Settings(8, 0), "chat").ask("Hi"))
