"""generate.py and inference.py: a row of a batch says what it says alone, and stops where an answer ends."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
from conftest import assert_user_error
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

import utils
from alpaca import UserError
from alpaca import prompts as template
from alpaca.inference import generate
from alpaca.inference import load as inference
from alpaca.inference.generate import STOP, Memory, Settings, choose, cut_at, decode, decode_pieces, stripped
from alpaca.inference.load import stream


def chain(path: Path, *pieces: str, loop: bool = False) -> Path:
    """A folder with a model that says the pieces, in their order, whatever it is asked, and then EOS, or them again.

    Its vocabulary is <unk> <s> </s> and the pieces, so that any prompt is <unk>. A token's embedding is its unit
    vector, the one layer adds nothing, and the output embedding points from each token to the next.
    """
    words = ["<unk>", "<s>", "</s>", *pieces]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=10**6,
    )
    model = LlamaForCausalLM(config)
    follows = {0: 3} | {i: i + 1 for i in range(3, len(words) - 1)} | {len(words) - 1: 3 if loop else 2}
    with torch.no_grad():
        for parameter in model.model.layers[0].parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(words), 32))
        model.lm_head.weight.zero_()
        for token, next_token in follows.items():
            model.lm_head.weight[next_token, token] = 10.0
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def paris(tmp_path_factory) -> Path:
    """Says " Paris is." after a line break, as models that were trained on "### Response:\\n" do."""
    return chain(tmp_path_factory.mktemp("models") / "paris", "\n", " Paris", " is", ".")


@pytest.fixture(scope="module")
def loaded(tiny_llama):
    """Model and tokenizer of tiny_llama on the CPU."""
    return inference.load(tiny_llama, "cpu")


def count_fed(model) -> list[int]:
    """How many tokens the model is given, call by call, from now on."""
    fed = []
    model.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True)
    return fed


def answer(folder: Path, **kwargs) -> str:
    return "".join(stream(*inference.load(folder, "cpu"), "x", **kwargs))


# ---------------------------------------------------------------------------------------------------------------------
# Tokens to text.


def spaces_are_in_front(text: str) -> PreTrainedTokenizerFast:
    """A tokenizer like LLaMA's: ▁ for a space, bytes for what is not in the vocabulary, the first space dropped."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *sorted(set(text.replace(" ", "▁")) - set("é好\n"))]
    core = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def bytes_for_letters(text: str) -> PreTrainedTokenizerFast:
    """A tokenizer like OPT's, with one token for each byte."""
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize("make", [spaces_are_in_front, bytes_for_letters])
def test_streamed_text_keeps_every_space_and_shows_no_half_character(make):
    text = "def f(x):\n    return 'é 好' , x\n\n  # end ."
    tokenizer = make(text)
    ids = tokenizer(text).input_ids
    assert len(ids) > len(text)  # é and 好 are bytes
    pieces = list(decode_pieces(tokenizer, ids))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece or piece == "" for piece in pieces)
    assert pieces[:3] == ["d", "e", "f"]  # as soon as it is known
    assert {"é", "好"} <= set(pieces)


def test_what_is_no_text_at_the_end_is_shown_all_the_same():
    tokenizer = bytes_for_letters("")
    ids = tokenizer("a好").input_ids
    assert list(decode_pieces(tokenizer, ids[:-1])) == ["a", "\ufffd"]
    assert list(decode_pieces(tokenizer, [])) == []


def splits(text: str):
    """Every way to cut a text into three pieces, some of them empty, and the one into letters."""
    for i, j in itertools.combinations_with_replacement(range(len(text) + 1), 2):
        yield [text[:i], text[i:j], text[j:]]
    yield list(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"Yes.\n\n{STOP}\nNext", "Yes."),
        (f"{STOP} x", ""),
        (f" \n{STOP}", ""),
        (f"# One\n## Two\n### Three\n### Instruct\n### {STOP}\n{STOP}", "# One\n## Two\n### Three\n### Instruct\n###"),
        ("ends with ### Instruction", "ends with ### Instruction"),
        ("keeps its end \n", "keeps its end \n"),
        ("#", "#"),
        ("", ""),
    ],
)
def test_text_is_cut_at_the_stop_however_the_pieces_split_it(text, shown):
    for pieces in splits(text):
        assert "".join(cut_at(pieces, STOP)) == shown, pieces


def test_only_what_may_begin_the_stop_is_held_back():
    def pieces():
        for piece in ["a", " b", "c ##", "x ", "#", "## Instr", "uctive", "\n", "### Instruction", ":", "never"]:
            given.append(piece)
            yield piece

    given, seen = [], []
    for piece in cut_at(pieces(), STOP):
        seen.append((given[-1], piece))
    assert seen == [("a", "a"), (" b", " b"), ("c ##", "c"), ("x ", " ##x"), ("uctive", " ### Instructive")]
    assert given[-1] == ":"  # what comes after the stop is not even asked for


# ---------------------------------------------------------------------------------------------------------------------
# stream.


def generated(model, tokenizer, prompt: str, **kwargs) -> str:
    """What generate() says without a stream."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, **kwargs, pad_token_id=2)[0, inputs.input_ids.shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("prompt", ["", "Hello", "日本 é\n    x", utils.format_prompt("Name a colour.")])
def test_a_greedy_stream_is_the_text_that_generate_gives(loaded, prompt):
    expected = generated(*loaded, prompt, do_sample=False, max_new_tokens=24)
    assert len(expected) > 10
    assert "".join(stream(*loaded, prompt, max_new_tokens=24, temperature=0)) == expected


def test_a_seed_fixes_a_sampled_stream_and_another_changes_it(loaded):
    torch.manual_seed(0)
    texts = ["".join(stream(*loaded, "Hello", 24, 1.5, 0.8, seed)) for seed in (7, 8, 7)]
    assert texts[0] == texts[2] != texts[1]
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(0))  # and nobody else's numbers
    assert len({"".join(stream(*loaded, "Hello", 24, 1.5)) for _ in range(3)}) == 3  # no seed: one is drawn


def test_a_stream_ends_at_eos_which_is_not_shown(paris):
    assert answer(paris, temperature=0) == answer(paris) == "\n Paris is."


@pytest.mark.parametrize(
    "pieces",
    [
        ["Hi", " there", ".\n\n", "###", " Instr", "uction:", "\nMore"],
        ["Hi", " there.", "\n", "\n### Instruction:\nMore"],
        ["Hi there.", " ### Instruction", ":", " More"],
    ],
)
def test_a_stream_ends_at_the_next_instruction_and_the_model_with_it(tmp_path, pieces):
    """The model would go on for a million tokens."""
    assert answer(chain(tmp_path / "model", *pieces, loop=True), max_new_tokens=10**6) == "Hi there."


def test_a_stream_ends_at_max_new_tokens(tmp_path):
    folder = chain(tmp_path / "model", "a", "b", loop=True)
    assert [answer(folder, max_new_tokens=n) for n in (1, 2, 5)] == ["a", "ab", "ababa"]


def test_closing_a_stream_early_stops_the_model(tmp_path):
    model, tokenizer = inference.load(chain(tmp_path / "model", "a", "b", loop=True), "cpu")
    fed = count_fed(model)
    pieces = stream(model, tokenizer, "x", max_new_tokens=10**6)
    assert [next(pieces), next(pieces)] == ["a", "b"]
    pieces.close()
    assert fed == [1, 1]  # the prompt, and "a"


def test_a_stream_of_held_back_white_space_stops_when_it_is_told_to(tmp_path):
    """It yields nothing until its end; and one that is stopped before it begins reads no prompt."""
    model, tokenizer = inference.load(chain(tmp_path / "model", "\n", loop=True), "cpu")
    fed, calls = count_fed(model), []

    def stopped() -> bool:
        calls.append(len(fed))
        return len(fed) == 3

    list(stream(model, tokenizer, "x", 200, stopped=stopped))
    assert fed == [1, 1, 1] and calls == [0, 1, 2, 3]
    fed.clear()
    assert list(stream(model, tokenizer, "x", 200, stopped=lambda: True)) == fed == []


def test_a_stream_tells_that_it_was_cut_off(tmp_path, paris, loaded):
    looping = inference.load(chain(tmp_path / "model", "a ", "### Instruction:", loop=True), "cpu")
    model, tokenizer = loaded
    cut = []
    for which, given, longest in (
        ("ends at EOS", inference.load(paris, "cpu"), 5),
        ("has a token less than that", inference.load(paris, "cpu"), 4),
        ("ends at STOP in its last token", looping, 2),
        ("is in the middle", looping, 1),
    ):
        list(stream(*given, "x", longest, 0, on_cut=lambda limit, which=which: cut.append((limit, which))))
    list(stream(model, tokenizer, "Q" * 1020, 50, 0, on_cut=lambda limit: cut.append(limit)))
    limit = "max_new_tokens"
    assert cut == [(limit, "has a token less than that"), (limit, "is in the middle"), "context"]


def test_a_prompt_that_fills_the_context_is_refused_and_one_that_leaves_a_token_is_answered(loaded):
    """tiny_llama reads 1,024 tokens, BOS among them; each letter here is one."""
    model, tokenizer = loaded
    assert len(tokenizer("Q" * 1022).input_ids) == 1023
    ids = []
    assert model.generation_config.max_length != 1024  # so the limit is ours

    class Spy:
        """The tokenizer, but it notes what is decoded."""

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, *args, **kwargs):
            return tokenizer(*args, **kwargs)

        def decode(self, tokens, **kwargs):
            ids[:] = tokens
            return tokenizer.decode(tokens, **kwargs)

    list(stream(model, Spy(), "Q" * 1022, max_new_tokens=5))
    assert len(ids) == 1
    with pytest.raises(UserError, match="the prompt has 1024 tokens, but the model reads at most 1024: shorten it"):
        list(stream(model, tokenizer, "Q" * 1023))


@pytest.mark.parametrize(
    "setting",
    [{"max_new_tokens": 0}, {"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}],
)
def test_a_setting_out_of_range_is_refused_and_named(loaded, setting):
    with pytest.raises(UserError, match=f"{next(iter(setting))} "):
        list(stream(*loaded, "x", **setting))


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a batch.

PROMPTS = ["Hello", "Name a colour of the rainbow, and say why you chose it.", "", "日本 é\n    x", "Hello there"]
ENDS = frozenset(range(3, 60))  # a random model hardly says EOS: end a row at a fifth of the vocabulary


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_opt"])
def any_model(request):
    """Rotary positions, and learnt ones that begin at 2."""
    return inference.load(request.getfixturevalue(request.param), "cpu")


def rows_of(model, prompts, settings, ends=ENDS, done=()) -> list[list[int]]:
    written = [[] for _ in prompts]
    for step in decode(model, prompts, ends, settings, set(done), None):
        for row, token in step:
            written[row].append(token)
    return written


def test_prompts_are_padded_on_the_left():
    ids, mask, positions = generate._lay_out([[5, 6, 7], [8]], 1)
    assert ids.tolist() == [[5, 6, 7], [8, 8, 8]]
    assert mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert positions.tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert generate._lay_out([[5, 6], [8, 9]], 1)[1] is None


def test_an_empty_prompt_is_refused(loaded):
    with pytest.raises(UserError, match="the prompt is empty"):
        rows_of(loaded[0], [[1], []], Settings(3))


def test_greedy_rows_are_the_tokens_that_generate_gives_each_prompt_alone(any_model):
    model, tokenizer = any_model
    prompts = inference.prompt_ids(tokenizer, PROMPTS)
    expected = []
    for ids in prompts:
        tokens = model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=30, eos_token_id=sorted(ENDS), pad_token_id=0
        )[0, len(ids) :].tolist()
        expected.append(tokens[:-1] if tokens[-1] in ENDS else tokens)
    assert len({len(tokens) for tokens in expected}) > 2  # they end at different steps
    assert rows_of(model, prompts, Settings(30, 0)) == expected
    assert [rows_of(model, [ids], Settings(30, 0))[0] for ids in prompts] == expected


def test_a_sampled_row_is_the_same_alone_and_in_any_batch(any_model):
    model, tokenizer = any_model
    prompts, settings = inference.prompt_ids(tokenizer, PROMPTS), Settings(30, 1.2, 0.9, seed=3)
    together = rows_of(model, prompts, settings)
    assert len({tuple(tokens) for tokens in together}) > 3
    assert rows_of(model, prompts[::-1], settings) == together[::-1]
    assert rows_of(model, prompts[1:3], settings) == together[1:3]
    assert [rows_of(model, [ids], settings)[0] for ids in prompts] == together
    assert rows_of(model, prompts, Settings(30, 1.2, 0.9, seed=4)) != together


def test_a_stream_is_the_answer_in_a_batch(any_model):
    model, tokenizer = any_model
    settings = Settings(20, 1.0, 0.9, seed=5)
    answers = inference.answer_batch(model, tokenizer, inference.prompt_ids(tokenizer, PROMPTS), settings)
    assert [text for text, _, _ in answers] == ["".join(stream(model, tokenizer, p, 20, 1.0, 0.9, 5)) for p in PROMPTS]
    assert [cut for _, _, cut in answers] == [tokens == 20 for _, tokens, _ in answers]
    assert any(tokens == 20 for _, tokens, _ in answers)


def test_a_row_that_has_ended_is_computed_no_further(any_model):
    model, tokenizer = inference.load(any_model[0].config._name_or_path, "cpu")
    prompts, fed = inference.prompt_ids(tokenizer, PROMPTS), count_fed(model)
    written = rows_of(model, prompts, Settings(30, 0))
    alive = [sum(len(tokens) >= step for tokens in written) for step in range(1, 30)]
    assert alive[0] > alive[-1]
    assert fed == [5 * max(map(len, prompts)), *(rows for rows in alive if rows)]


def test_a_row_that_the_caller_has_enough_of_leaves_and_the_others_go_on(loaded):
    model, tokenizer = loaded
    prompts = inference.prompt_ids(tokenizer, PROMPTS[:3])
    whole = rows_of(model, prompts, Settings(6, 0), frozenset())
    assert rows_of(model, prompts, Settings(6, 0), frozenset(), done=[1]) == [whole[0], whole[1][:1], whole[2]]


def test_each_row_may_fill_the_context_to_its_last_token(loaded):
    """tiny_llama reads 1,024 tokens."""
    model, tokenizer = loaded
    prompts = inference.prompt_ids(tokenizer, ["Q" * 1020, "Q" * 1018, "Q"])
    assert [len(ids) for ids in prompts] == [1021, 1019, 2]
    assert [len(tokens) for tokens in rows_of(model, prompts, Settings(8, 0), frozenset())] == [3, 5, 8]


@pytest.mark.parametrize("eos", [4, [2, 4]])
def test_every_token_that_the_generation_config_calls_eos_ends_an_answer(tmp_path, eos):
    folder = chain(tmp_path / "model", "a", "b", "c", loop=True)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": eos}))
    assert answer(folder) == "a"


def test_a_batch_ends_a_row_at_the_next_instruction_with_the_text_of_a_stream(tmp_path):
    """The model would go on for ten thousand tokens."""
    pieces = [f"word{i} " for i in range(20)] + [".\n\n", "###", " Instr", "uction:", "\nMore"]
    model, tokenizer = inference.load(chain(tmp_path / "model", *pieces[-9:], loop=True), "cpu")
    fed = count_fed(model)
    made = inference.answer_batch(model, tokenizer, [[0], [0, 0]], Settings(10**4, 0))
    assert made == [("word16 word17 word18 word19 .", 8, False)] * 2
    assert len(fed) == 8 and made[0][0] == "".join(stream(model, tokenizer, "x", 10**4, 0))


def test_a_batch_that_is_too_large_for_the_memory_is_halved(loaded, monkeypatch):
    model, tokenizer = loaded
    prompts, sizes = inference.prompt_ids(tokenizer, PROMPTS), []
    expected = inference.answer_batch(model, tokenizer, prompts, Settings(5, 0))

    def small(model, prompts, *args):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(model, prompts, *args)

    monkeypatch.setattr(inference, "decode", small)
    assert inference.answer_batch(model, tokenizer, prompts, Settings(5, 0)) == expected
    assert sizes == [5, 2, 3, 1, 2]


def test_a_single_prompt_that_is_too_large_for_the_memory_is_told(loaded, monkeypatch):
    def none(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(inference, "decode", none)
    with pytest.raises(UserError, match="a prompt of 2 tokens and its answer do not fit the memory"):
        inference.answer_batch(*loaded, [[1, 5]], Settings(5, 0))


def test_a_batch_says_of_broken_bytes_what_a_stream_says(sentencepiece_folder, loaded, monkeypatch):
    """LLaMA's decoder makes a replacement of each byte of a run that is not UTF-8, also of what was whole before."""
    tokenizer = inference.load_tokenizer(sentencepiece_folder)
    byte = {value: tokenizer.convert_tokens_to_ids(f"<0x{value:02X}>") for value in (0xE5, 0xA5, 0xBD, 0xFF)}
    ids = [byte[value] for value in (0xE5, 0xA5, 0xBD, 0xFF)] + tokenizer(" x", add_special_tokens=False)["input_ids"]
    pieces = list(decode_pieces(tokenizer, ids))
    assert pieces[0] == "好" != tokenizer.decode(ids)[0]  # shown before it is known that it would be taken back

    def steps(model, prompts, *_):
        yield from ([(0, token)] for token in ids)

    monkeypatch.setattr(inference, "decode", steps)
    model = loaded[0]
    ((text, _, _),) = inference.answer_batch(model, tokenizer, [[1]], Settings(50, 0))
    assert text == "".join(pieces) == "".join(inference.stream_ids(model, tokenizer, [1], Settings(50, 0)))


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "expected"),
    [
        ([3, 9, 5, 9], 100, [[1, 3, 2, 0]]),
        ([3, 9, 5, 9], 22, [[1, 3], [2, 0]]),  # 2 · (9 + 2)
        ([3, 9, 5, 9], 21, [[1], [3], [2, 0]]),
        ([3, 9], 1, [[1], [0]]),  # one that is too long has a batch of its own
        ([], 10, []),
    ],
)
def test_batches_are_of_similar_length_and_bounded(lengths, max_tokens, expected):
    assert inference.batches(lengths, 2, max_tokens) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Sampling.


@pytest.mark.parametrize(
    ("top_p", "draw", "token"),
    [
        # probabilities 0.2, 0.5, 0.3
        (1.0, 0.0, 0),
        (1.0, 0.19, 0),
        (1.0, 0.21, 1),
        (1.0, 0.69, 1),
        (1.0, 0.71, 2),
        (1.0, 1 - 2**-24, 2),
        (0.9, 0.19, 0),
        (0.9, 0.71, 2),
        (0.7, 0.0, 1),
        (0.7, 0.62, 1),  # 0.5 and 0.3 are left, 0.625 of them is the first
        (0.7, 0.63, 2),
        (0.7, 1 - 2**-24, 2),
        (0.45, 0.0, 1),
        (0.45, 1 - 2**-24, 1),
        (1e-9, 1 - 2**-24, 1),
    ],
)
@pytest.mark.parametrize("nucleus", [1, 2, 1024])
def test_a_token_is_drawn_from_the_fewest_that_add_up_to_top_p(top_p, draw, token, nucleus, monkeypatch):
    monkeypatch.setattr(generate, "NUCLEUS", nucleus)  # where it is looked for first makes no difference
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3], [0.2, 0.5, 0.3]])) + 5
    draws = torch.tensor([draw, 0.0])
    first = 0 if top_p > 0.8 else 1
    assert choose(logits, 1.0, top_p, draws).tolist() == [token, first]


def test_temperature_divides_the_logits_and_0_takes_the_likeliest():
    logits = torch.log(torch.tensor([[0.8, 0.2]]))  # squared and normed: 0.941, 0.059
    at = [choose(logits, t, 1.0, torch.tensor([0.9])).item() for t in (1.0, 0.5, 1e-30, 0)]
    assert at == [1, 0, 0, 0]


def test_sampled_tokens_are_as_frequent_as_they_are_likely():
    torch.manual_seed(0)
    likely = torch.tensor([0.1, 0.05, 0.5, 0.15, 0.2])
    draws = torch.rand(20_000)
    drawn = choose(likely.log().expand(20_000, 5), 1.0, 0.85, draws)
    share = torch.bincount(drawn, minlength=5) / 20_000
    nucleus = torch.tensor([0.0, 0.0, 0.5, 0.15, 0.2]) / 0.85
    assert torch.allclose(share, nucleus, atol=0.012), share  # three standard deviations are 0.010


def test_nan_is_told_and_is_no_token():
    with pytest.raises(UserError, match="computes NaN.*--dtype float32"):
        choose(torch.tensor([[0.0, float("nan")]]), 0, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Turns.

TURNS = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)


@pytest.fixture
def talking(tiny_llama):
    """Model, tokenizer with a chat template, and the tokens that the model is fed."""
    model, tokenizer = inference.load(tiny_llama, "cpu")
    tokenizer.chat_template = TURNS
    return model, tokenizer, count_fed(model)


def test_a_turn_computes_only_what_the_one_before_did_not_read(talking):
    model, tokenizer, fed = talking
    conversation = inference.Conversation(model, tokenizer, Settings(8, 0), "chat")
    first = "".join(conversation.ask("Say something about rivers."))
    ids = template.chat_ids(tokenizer, [{"role": "user", "content": "Say something about rivers."}])
    assert fed == [len(ids)] + [1] * 7
    raw = conversation.turns[1]["content"]
    assert raw.strip() == first
    fed.clear()
    read = list(conversation.memory.ids)
    second = "".join(conversation.ask("More."))
    whole = template.chat_ids(tokenizer, [*conversation.turns[:2], {"role": "user", "content": "More."}])
    common = next(i for i, (a, b) in enumerate(zip(read, whole, strict=False)) if a != b)
    assert common >= len(ids)
    assert fed == [len(whole) - common] + [1] * 7
    fresh = "".join(stripped(inference.stream_ids(model, tokenizer, whole, Settings(8, 0))))
    assert second == fresh  # and it is what the whole prompt gives


def test_memory_keeps_the_common_beginning_and_never_the_last_token(loaded):
    model, _ = loaded
    memory, fed_before = Memory(), []

    def ask(ids):
        known = memory.begin(ids)
        tokens = [t for step in decode(model, [ids], frozenset(), Settings(3, 0), set(), memory) for _, t in step]
        fed_before.append(known)
        return tokens

    def alone(ids):
        return rows_of(model, [ids], Settings(3, 0), frozenset())[0]

    prompt = [1, 50, 60, 70, 80]
    for ids in (prompt, prompt, [1, 50, 99], [1, 50, 99, 3, 4, 5, 6], [7], prompt):
        assert ask(ids) == alone(ids)
    assert fed_before == [0, 4, 2, 3, 0, 0]


def test_memory_is_empty_after_a_step_that_did_not_end(talking):
    model, tokenizer, _ = talking
    conversation = inference.Conversation(model, tokenizer, Settings(8, 0), "chat")
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # between the first layer and the second
        list(conversation.ask("Hi"))
    handle.remove()
    assert conversation.memory.cache is None and conversation.turns == []
    assert "".join(conversation.ask("Hi")) == "".join(
        inference.Conversation(model, tokenizer, Settings(8, 0), "chat").ask("Hi")
    )


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
    assert ask(second) == rows_of(model, [second], Settings(3, 0), frozenset())[0]


def test_an_answer_that_fails_is_no_turn(talking):
    model, tokenizer, fed = talking
    conversation = inference.Conversation(model, tokenizer, Settings(8, 0), "chat")

    def fail(*_):
        if len(fed) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.register_forward_pre_hook(fail)
    said = []
    with pytest.raises(UserError, match="its answer do not fit the memory: lower --max_new_tokens, or take --dtype"):
        said.extend(conversation.ask("Hi"))
    handle.remove()
    assert len(fed) == 5 and conversation.turns == []


def test_a_stopped_answer_is_a_turn_and_a_refused_one_is_none(talking):
    model, tokenizer, _ = talking
    conversation = inference.Conversation(model, tokenizer, Settings(50, 0), "chat")
    pieces = conversation.ask("Hi")
    shown = next(pieces)
    pieces.close()
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"]
    assert conversation.turns[1]["content"].strip().startswith(shown.strip())
    turns = conversation.turns
    with pytest.raises(UserError, match="reads at most 1024: shorten it, or begin anew with /reset"):
        list(conversation.ask("Q" * 2000))
    assert conversation.turns is turns
    conversation.reset()
    assert conversation.turns == []


def test_alpacas_template_asks_each_instruction_alone_and_reads_its_preface_once(talking):
    model, tokenizer, fed = talking
    conversation = inference.Conversation(model, tokenizer, Settings(8, 0))
    for text in ("Sing.", "Dance."):
        prompt = utils.format_prompt(text)
        assert "".join(conversation.ask(text)) == "".join(stripped(stream(model, tokenizer, prompt, 8, 0)))
    whole, preface = [len(inference.prompt_ids(tokenizer, [text])[0]) for text in (prompt, prompt.split("Dance")[0])]
    _, _, asked, streamed = (tokens for tokens in fed if tokens > 1)
    assert streamed == whole and asked <= whole - preface + 1


def test_a_tokenizer_without_a_chat_template_is_told(loaded):
    with pytest.raises(UserError, match="this tokenizer has no chat template"):
        list(inference.Conversation(*loaded, Settings(8, 0), "chat").ask("Hi"))


def test_a_prompts_tokens_are_trainings(tokenizer):
    from copy import deepcopy

    from tokenizers import processors

    made = deepcopy(tokenizer)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    (ids,) = inference.prompt_ids(made, ["Say </s>"])
    assert ids[0] == 1 and 2 not in ids  # no EOS behind, and what somebody types is text
    assert made.decode(ids[1:]) == "Say </s>"
    with pytest.raises(UserError, match="half of a surrogate pair"):
        inference.prompt_ids(made, ["a\ud800"])


@pytest.mark.parametrize("text", ["", "  ", " a", "a ", "\n a  b \n\n", "a"])
def test_a_stripped_stream_is_the_text_stripped(text):
    for pieces in splits(text):
        assert "".join(stripped(pieces)) == text.strip()
        assert all(stripped(pieces))


# ---------------------------------------------------------------------------------------------------------------------
# load.


def test_on_a_cpu_weights_are_float32_whatever_they_were_saved_in(tiny_llama, tmp_path):
    LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    shutil.copy(tiny_llama / "tokenizer.json", tmp_path / "bf16")
    shutil.copy(tiny_llama / "tokenizer_config.json", tmp_path / "bf16")
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    model, tokenizer = inference.load(tmp_path / "bf16", "cpu")
    assert (model.dtype, model.training, len(tokenizer)) == (torch.float32, False, 300)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def with_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil(folder.parent / "marker")}, folder / "pytorch_model.bin")


def one_more_layer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


DAMAGED = {
    "missing": (shutil.rmtree, ["does not exist"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["holds no tokenizer", "copy tokenizer.json"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["holds no weights"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
    "a diff": (lambda f: (f / "weight_diff.json").write_text("{}"), ["is a weight diff: recover it first"]),
    "malformed tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), ["the tokenizer cannot be loaded"]),
    "malformed config": (lambda f: (f / "config.json").write_text("{"), ["cannot be loaded", "config.json"]),
    "unknown kind": (lambda f: (f / "config.json").write_text('{"model_type": "x"}'), ["cannot be loaded", "`x`"]),
    "weights cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        ["the model cannot be loaded"],
    ),
    "a layer missing": (one_more_layer, ["lacks 9 of the model's tensors (model.layers.2.input_layernorm.weight"]),
    "code in a pickle": (with_pickle, ["asks to run code"]),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_model_is_refused_in_one_line(tiny_llama, tmp_path, damage):
    breakage, words = DAMAGED[damage]
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    breakage(folder)
    with pytest.raises(UserError) as error:
        inference.load(folder, "cpu")
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_model_does_not_run_whatever_is_on_stdin(tiny_llama, tmp_path, monkeypatch, file):
    """transformers asks on stdin whether it may, and a piped instruction may well begin with a "y"."""
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass Own: pass\n")
    names = {"auto_map": {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", None]}, "model_type": "own"}
    names |= {"tokenizer_class": "Own"} if file == "tokenizer_config.json" else {}
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | names))
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(prompt) or "y")
    with pytest.raises(UserError, match=r"^[^\n]*custom code[^\n]*$"):
        inference.load(folder, "cpu")
    assert (asked, (tmp_path / "marker").exists()) == ([], False)


def test_a_tied_output_embedding_is_not_missing(tiny_opt):
    model, _ = inference.load(tiny_opt, "cpu")
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight


@pytest.mark.parametrize("device", ["hip:99", "nonsense"])
def test_a_device_that_is_not_there_is_refused(tiny_llama, device):
    with pytest.raises(UserError, match=f"--device {device} is not there"):
        inference.load(tiny_llama, device)


def test_a_build_of_torch_for_gpus_takes_the_cpu_where_there_is_none(tiny_llama, monkeypatch):
    def named(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", named)
    assert inference.load(tiny_llama)[0].device == torch.device("cpu")


def test_a_dtype_can_be_asked_for_and_is_named_when_it_is_none(tiny_llama):
    assert inference.load(tiny_llama, "cpu", "bfloat16")[0].dtype == torch.bfloat16
    with pytest.raises(UserError, match="--dtype int4 is not known: choose from float32, bfloat16, float16"):
        inference.load(tiny_llama, "cpu", "int4")


def test_a_16_bit_model_stays_so_on_a_cpu_that_has_no_memory_for_32(tiny_llama, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float16).save_pretrained(folder)
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(inference, "available_bytes", lambda device: 2 * size)
    assert inference.load(folder, "cpu")[0].dtype == torch.float32
    monkeypatch.setattr(inference, "available_bytes", lambda device: 2 * size - 1)
    assert inference.load(folder, "cpu")[0].dtype == torch.float16
    assert "loaded as it was saved" in capsys.readouterr().err


def test_a_diff_without_its_manifest_is_refused(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "diff")
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(1e-4 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="near 0 .*as in a weight diff: recover the model first") as error:
        inference.load(folder, "cpu")
    assert "\n" not in str(error.value)


def test_another_models_tokenizer_is_refused(tiny_llama, paris, tmp_path):
    folder = shutil.copytree(paris, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, folder)
    with pytest.raises(UserError, match="the tokenizer has 300 tokens, the model 7: it is another model's"):
        inference.load(folder, "cpu")


ODD = {
    "none": ({"eos_token": None}, {}, ["the tokenizer's EOS is None"]),
    "empty": ({"eos_token": ""}, {}, ["the tokenizer's EOS is ''"]),
    "unk": ({"eos_token": "<unk>"}, {"eos_token_id": 0}, ["EOS and unk are the same token ('<unk>')"]),
    "pad": ({"pad_token": "</s>"}, {}, ["EOS and pad are the same token ('</s>')"]),
    "disagree": ({}, {"eos_token_id": [5, 6]}, ["ends answers with id 5, 6, the tokenizer with 2 ('</s>')"]),
    "agree": ({}, {"eos_token_id": [5, 2]}, []),
    "EOS without a row": ({"eos_token": "<new>"}, {"eos_token_id": 300}, ["EOS is token 300, and", "with id 300, and"]),
    "pad without a row": ({"pad_token": "[PAD]"}, {}, ["pad is token 300, and the model has 300 rows, up to 299: "]),
    "right": ({}, {}, []),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_training_got_wrong_about_special_tokens_is_told_in_a_line(tiny_llama, tmp_path, capsys, odd):
    tokens, generation, expected = ODD[odd]
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    for name, changes in (("tokenizer_config.json", tokens), ("generation_config.json", generation)):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | changes))
    inference.load(folder, "cpu")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == len(expected)
    assert all(words in line for words, line in zip(expected, lines, strict=True)), lines


def test_a_bos_without_a_row_is_refused(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<new>"}))
    with pytest.raises(UserError, match=r"BOS is token 300 \('<new>'\), the model has 300 rows: copy the tokenizer"):
        inference.load(folder, "cpu")


def test_a_model_without_a_key_value_cache_is_refused(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    shape = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 300}
    MambaForCausalLM(MambaConfig(**shape)).save_pretrained(folder)
    with pytest.raises(UserError, match="is a MambaForCausalLM, which has no key/value cache: take a model that has"):
        inference.load(folder, "cpu")


def test_a_model_that_does_not_fit_the_device_is_told(tiny_llama, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LlamaForCausalLM, "to", full)
    with pytest.raises(UserError, match="does not fit the memory of cpu: take --dtype bfloat16, --device cpu, or"):
        inference.load(tiny_llama, "cpu")


def test_a_model_of_our_training_may_pad_with_eos(tiny_llama, tmp_path, capsys):
    """Its labels are made from lengths."""
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "</s>"}))
    (folder / "training_receipt.json").write_text("{}")
    inference.load(folder, "cpu")
    assert "warning" not in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# A LoRA adapter over its base.


@pytest.fixture(params=["as it is", "vocabulary grown"])
def adapted(request, tiny_llama, tmp_path):
    """(adapter folder, logits of the model that it was saved from); its matrices are random, its base tiny_llama."""
    model, tokenizer = inference.load(tiny_llama, "cpu")
    grown = request.param != "as it is"
    if grown:  # as other trainers do it: a token more, and the embeddings in the adapter
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=grown)
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model(torch.tensor([[1, 40, 50]])).logits


def set_base(adapter: Path, base) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))


def test_an_adapter_loads_over_its_base_and_says_what_it_said(adapted):
    adapter, logits = adapted
    model, tokenizer = inference.load(adapter, "cpu")
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0] == logits.shape[-1]
    assert torch.allclose(model(torch.tensor([[1, 40, 50]])).logits, logits, atol=1e-5)
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("base", ["/nowhere/base", "./base", "some/relative/base", None, ""])
def test_an_adapter_without_its_base_is_told_and_base_path_gives_it(adapted, tiny_llama, base):
    adapter, logits = adapted
    set_base(adapter, base)
    with pytest.raises(UserError, match="is a LoRA adapter.* with --base_path"):
        inference.load(adapter, "cpu")
    with pytest.raises(UserError, match="its base /gone is not there: give it with --base_path"):
        inference.load(adapter, "cpu", base_path="/gone")
    model, _ = inference.load(adapter, "cpu", base_path=tiny_llama)
    assert torch.allclose(model(torch.tensor([[1, 40, 50]])).logits, logits, atol=1e-5)


def test_a_hub_base_that_cannot_be_fetched_is_told_with_the_way_out(adapted):
    set_base(adapted[0], "nobody/nothing")
    with pytest.raises(UserError, match="its base nobody/nothing: the model cannot be loaded: .*--base_path"):
        inference.load(adapted[0], "cpu")


def test_an_adapter_of_another_model_is_refused(adapted, tiny_opt, paris):
    for base in (tiny_opt, paris):
        with pytest.raises(UserError, match="the adapter does not fit its base, is it another model's?") as error:
            inference.load(adapted[0], "cpu", base_path=base)
        assert "\n" not in str(error.value)


def test_an_adapter_without_peft_says_how_to_get_it(adapted, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        UserError, match="is a LoRA adapter, which needs peft: pip install 'alpaca-reproduced\\[lora\\]'"
    ):
        inference.load(adapted[0], "cpu")


def test_a_model_has_no_base(tiny_llama):
    with pytest.raises(UserError, match="is the base of a LoRA adapter, and .* is none: drop it"):
        inference.load(tiny_llama, "cpu", base_path=tiny_llama)


def test_a_name_that_is_no_folder_here_is_told_before_the_hub_is_blamed():
    assert_user_error(lambda: inference.load("typo", "cpu"), "typo: there is no such folder here, and from the hub the")
