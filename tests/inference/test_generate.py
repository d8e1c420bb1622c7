"""generate.py: a row of a batch says what it says alone, and stops where an answer ends."""

from __future__ import annotations

import itertools
import json
from copy import deepcopy
from pathlib import Path

import oracles_inference
import pytest
import torch
from made_models import chain, count_fed, edit_json, family, stream_text
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import utils
from alpaca import UserError
from alpaca.inference import generate
from alpaca.inference.chat import Conversation
from alpaca.inference.generate import STOP, Answer, Settings, answer_batch, batches, choose
from alpaca.inference.load import load, load_tokenizer
from alpaca.prompts import prompt_ids


@pytest.fixture(scope="module")
def paris(tmp_path_factory) -> Path:
    """Says " Paris is." after a line break, as models that were trained on "### Response:\\n" do."""
    return chain(tmp_path_factory.mktemp("models") / "paris", "\n", " Paris", " is", ".")


@pytest.fixture(scope="module")
def loaded(tiny_llama):
    """Model and tokenizer of tiny_llama on the CPU."""
    return load(tiny_llama, "cpu")


def answer(folder: Path, **kwargs) -> str:
    return "".join(stream_text(*load(folder, "cpu"), "x", **kwargs))


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


def pieces_of(tokenizer, ids) -> list[str]:
    """What is shown with each token, and at the end."""
    text = Answer(tokenizer, frozenset(), 10**6)
    return [*map(text.add, ids), text.rest()]


@pytest.mark.parametrize("make", [spaces_are_in_front, bytes_for_letters])
def test_streamed_text_keeps_every_space_and_shows_no_half_character(make):
    text = "def f(x):\n    return 'é 好' , x\n\n  # end ."
    tokenizer = make(text)
    ids = tokenizer(text).input_ids
    assert len(ids) > len(text)  # é and 好 are bytes
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert [piece for piece in pieces if piece][:3] == ["d", "e", "f"]  # as soon as it is known
    assert {"é", " 好"} <= set(pieces)


def test_what_is_no_text_at_the_end_is_shown_all_the_same():
    tokenizer = bytes_for_letters("")
    ids = tokenizer("a好").input_ids
    assert pieces_of(tokenizer, ids[:-1]) == ["a", "", "", "\ufffd"]
    assert pieces_of(tokenizer, []) == [""]


class Pieces:
    """A tokenizer whose tokens are pieces of text."""

    def decode(self, tokens, **_) -> str:
        return "".join(tokens)


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
        ("\n a  b \n\n", "a  b"),
        ("#", "#"),
        ("  ", ""),
        ("", ""),
    ],
)
def test_text_is_stripped_and_cut_at_the_stop_however_the_pieces_split_it(text, shown):
    for pieces in splits(text):
        assert "".join(pieces_of(Pieces(), pieces)) == shown, pieces


def test_only_what_may_begin_the_stop_is_held_back():
    text = Answer(Pieces(), frozenset(), 10**6)
    given = ["\n", "a", " b", "c ##", "x ", "#", "## Instr", "uctive", "\n", "### Instruction", ":"]
    seen = [(piece, text.add(piece)) for piece in given]
    shown = [("a", "a"), (" b", " b"), ("c ##", "c"), ("x ", " ##x"), ("uctive", " ### Instructive")]
    assert [(piece, new) for piece, new in seen if new] == shown
    assert text.ended and text.text == "a bc ##x ### Instructive"


# ---------------------------------------------------------------------------------------------------------------------
# stream.


def generated(model, tokenizer, prompt: str, **kwargs) -> str:
    """What generate() says without a stream."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, **kwargs, pad_token_id=2)[0, inputs.input_ids.shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("prompt", ["", "Hello", "日本 é\n    x", utils.format_prompt("Name a colour.")])
def test_a_greedy_stream_is_the_text_that_generate_gives(loaded, prompt):
    expected = generated(*loaded, prompt, do_sample=False, max_new_tokens=24)
    assert len(expected) > 10
    assert "".join(stream_text(*loaded, prompt, max_new_tokens=24, temperature=0)) == expected


def test_a_seed_fixes_a_sampled_stream_and_another_changes_it(loaded):
    torch.manual_seed(0)
    texts = ["".join(stream_text(*loaded, "Hello", 24, 1.5, 0.8, seed)) for seed in (7, 8, 7)]
    assert texts[0] == texts[2] != texts[1]
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(0))  # and nobody else's numbers
    assert len({"".join(stream_text(*loaded, "Hello", 24, 1.5)) for _ in range(3)}) == 3  # no seed: one is drawn


def test_a_stream_ends_at_eos_which_is_not_shown(paris):
    assert answer(paris, temperature=0) == answer(paris) == "Paris is."


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


def test_a_stream_of_held_back_white_space_stops_when_it_is_told_to(tmp_path):
    """It yields nothing until its end; and one that is stopped before it begins reads no prompt."""
    model, tokenizer = load(chain(tmp_path / "model", "\n", loop=True), "cpu")
    fed, calls = count_fed(model), []

    def stopped() -> bool:
        calls.append(len(fed))
        return len(fed) == 3

    list(stream_text(model, tokenizer, "x", 200, stopped=stopped))
    assert fed == [1, 1, 1] and calls[:4] == [0, 1, 2, 3]
    fed.clear()
    assert list(stream_text(model, tokenizer, "x", 200, stopped=lambda: True)) == fed == []


def test_an_answer_tells_that_it_was_cut_off(tmp_path, paris, loaded):
    looping = load(chain(tmp_path / "model", "a ", "### Instruction:", loop=True), "cpu")
    for (model, tokenizer), longest, cut in (
        (load(paris, "cpu"), 5, False),  # ends at EOS
        (load(paris, "cpu"), 4, True),  # has a token less than that
        (looping, 2, False),  # ends at STOP in its last token
        (looping, 1, True),
    ):
        (answer,) = answer_batch(model, tokenizer, [[0]], Settings(longest, 0))
        assert (answer.cut, answer.limit) == (cut, longest)
    (answer,) = answer_batch(*loaded, [[40] * 1020], Settings(50, 0))
    assert answer.cut and answer.limit == 4  # the context


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

    list(stream_text(model, Spy(), "Q" * 1022, max_new_tokens=5))
    assert len(ids) == 1
    with pytest.raises(UserError, match="the prompt has 1024 tokens, but the model reads at most 1024: shorten it"):
        list(stream_text(model, tokenizer, "Q" * 1023))


@pytest.mark.parametrize(
    "setting",
    [{"max_new_tokens": 0}, {"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}],
)
def test_a_setting_out_of_range_is_refused_and_named(loaded, setting):
    with pytest.raises(UserError, match=f"{next(iter(setting))} "):
        list(stream_text(*loaded, "x", **setting))


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a batch.

PROMPTS = ["Hello", "Name a colour of the rainbow, and say why you chose it.", "", "日本 é\n    x", "Hello there"]
ENDS = frozenset(range(3, 60))  # a random model hardly says EOS: end a row at a fifth of the vocabulary


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_opt"])
def any_model(request):
    """Rotary positions, and learnt ones that begin at 2."""
    return load(request.getfixturevalue(request.param), "cpu")


def rows_of(given, prompts, settings, ends=ENDS) -> list[list[int]]:
    """The tokens of each row, ended by ``ends``, with model and tokenizer ``given``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "end_ids", lambda *_: ends)
        return [answer.tokens for answer in answer_batch(*given, prompts, settings)]


def test_an_empty_prompt_is_refused(loaded):
    with pytest.raises(UserError, match="the prompt is empty"):
        rows_of(loaded, [[1], []], Settings(3))


@pytest.mark.parametrize(("temperature", "top_p"), [(0, 1.0), (1.2, 0.9)])
def test_rows_are_the_tokens_of_a_plain_loop_alone_and_in_a_batch(any_model, temperature, top_p):
    """The loop reads the whole text again for each token, one prompt after the other."""
    model, tokenizer = any_model
    prompts = prompt_ids(tokenizer, PROMPTS)
    expected = [oracles_inference.answer(model, ids, ENDS, 30, temperature, top_p, 3) for ids in prompts]
    assert len({len(tokens) for tokens in expected}) > 2  # they end at different steps
    settings = Settings(30, temperature, top_p, seed=3)
    assert rows_of(any_model, prompts, settings) == expected
    assert [rows_of(any_model, [ids], settings)[0] for ids in prompts] == expected


def test_a_sampled_row_is_the_same_in_any_batch_and_another_seed_changes_it(any_model):
    model, tokenizer = any_model
    prompts, settings = prompt_ids(tokenizer, PROMPTS), Settings(30, 1.2, 0.9, seed=3)
    together = rows_of(any_model, prompts, settings)
    assert len({tuple(tokens) for tokens in together}) > 3
    assert rows_of(any_model, prompts[::-1], settings) == together[::-1]
    assert rows_of(any_model, prompts[1:3], settings) == together[1:3]
    assert rows_of(any_model, prompts, Settings(30, 1.2, 0.9, seed=4)) != together


def test_a_stream_is_the_answer_in_a_batch(any_model):
    model, tokenizer = any_model
    settings = Settings(20, 1.0, 0.9, seed=5)
    answers = answer_batch(model, tokenizer, prompt_ids(tokenizer, PROMPTS), settings)
    assert [answer.text for answer in answers] == [
        "".join(stream_text(model, tokenizer, p, 20, 1.0, 0.9, 5)) for p in PROMPTS
    ]
    assert [answer.cut for answer in answers] == [len(answer.tokens) == 20 for answer in answers]
    assert any(len(answer.tokens) == 20 for answer in answers)


def test_a_row_that_has_ended_is_computed_no_further(any_model):
    model, tokenizer = load(any_model[0].config._name_or_path, "cpu")
    prompts, fed = prompt_ids(tokenizer, PROMPTS), count_fed(model)
    written = rows_of((model, tokenizer), prompts, Settings(30, 0))
    alive = [sum(len(tokens) >= step for tokens in written) for step in range(1, 30)]
    assert alive[0] > alive[-1]
    assert fed == [5 * max(map(len, prompts)), *(rows for rows in alive if rows)]


@pytest.mark.parametrize("name", ["Mistral", "Gemma 3, text", "Gemma 3, text and images", "Falcon-H1", "Mamba"])
def test_a_model_of_any_kind_says_in_a_batch_what_a_plain_loop_says(name, tokenizer, tmp_path):
    """With sliding windows, shorter than the text; with states in place of keys and values, or beside them."""
    small = {"sliding_window": 6} if name in ("Mistral", "Gemma 3, text") else {}
    given = load(family(tmp_path / "model", name, tokenizer, **small), "cpu")
    prompts = prompt_ids(given[1], PROMPTS[:3])
    expected = [oracles_inference.answer(given[0], ids, ENDS, 12, 1.2, 0.9, 3) for ids in prompts]
    assert len({len(tokens) for tokens in expected}) > 1  # some leave
    assert rows_of(given, prompts, Settings(12, 1.2, 0.9, 3)) == expected
    talk = Conversation(*given, Settings(12, 1.2, 0.9, 3), "alpaca")
    texts = ["Sing.", "Sing a song."]
    alone = [Conversation(*given, talk.settings, "alpaca").ask(text) for text in texts]
    assert [talk.ask(text) for text in texts] == alone


def test_what_a_generation_config_asks_for_changes_no_answer(tmp_path, capfd):
    folder = chain(tmp_path / "model", "a", "b", loop=True)
    asked = {"max_length": 3, "max_new_tokens": 2, "do_sample": True, "temperature": 0.5, "repetition_penalty": 10.0}
    asked |= {"num_beams": 4, "suppress_tokens": [3], "num_return_sequences": 2, "min_length": 9, "own": "x"}
    for name in ("generation_config.json", "config.json"):
        edit_json(folder / name, **asked)
    assert answer(folder, max_new_tokens=5) == "ababa"
    said = capfd.readouterr().err.splitlines()
    assert [line for line in said if line and "Loading" not in line and "Writing" not in line] == []


def test_each_row_may_fill_the_context_to_its_last_token(loaded):
    """tiny_llama reads 1,024 tokens."""
    model, tokenizer = loaded
    prompts = prompt_ids(tokenizer, ["Q" * 1020, "Q" * 1018, "Q"])
    assert [len(ids) for ids in prompts] == [1021, 1019, 2]
    assert [len(tokens) for tokens in rows_of(loaded, prompts, Settings(8, 0), frozenset())] == [3, 5, 8]


@pytest.mark.parametrize("eos", [4, [2, 4]])
def test_every_token_that_the_generation_config_calls_eos_ends_an_answer(tmp_path, eos):
    folder = chain(tmp_path / "model", "a", "b", "c", loop=True)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": eos}))
    assert answer(folder) == "a"


def test_a_batch_ends_a_row_at_the_next_instruction_with_the_text_of_a_stream(tmp_path):
    """The model would go on for ten thousand tokens."""
    pieces = [f"word{i} " for i in range(20)] + [".\n\n", "###", " Instr", "uction:", "\nMore"]
    model, tokenizer = load(chain(tmp_path / "model", *pieces[-9:], loop=True), "cpu")
    fed = count_fed(model)
    made = answer_batch(model, tokenizer, [[0], [0, 0]], Settings(10**4, 0))
    said = [(answer.text, len(answer.tokens), answer.cut) for answer in made]
    assert said == [("word16 word17 word18 word19 .", 8, False)] * 2
    assert len(fed) == 8 and made[0].text == "".join(stream_text(model, tokenizer, "x", 10**4, 0))


def texts_of(answers) -> list[str]:
    return [answer.text for answer in answers]


def limited(sizes: list[int], most: int):
    """A model's pre-hook that notes how many rows it is given, when these change, and has memory for ``most``."""

    def check(_, args, kwargs):
        rows = len(kwargs["input_ids"])
        if [rows] != sizes[-1:]:
            sizes.append(rows)
        if rows > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return check


def test_a_batch_that_is_too_large_for_the_memory_is_halved(tiny_llama):
    model, tokenizer = load(tiny_llama, "cpu")
    prompts, sizes = prompt_ids(tokenizer, PROMPTS), []
    expected = texts_of(answer_batch(model, tokenizer, prompts, Settings(5, 0)))
    model.register_forward_pre_hook(limited(sizes, 2), with_kwargs=True)
    assert texts_of(answer_batch(model, tokenizer, prompts, Settings(5, 0))) == expected
    assert sizes == [5, 2, 3, 1, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's memory is limited here, a CPU's cannot be")
def test_on_cuda_a_batch_that_runs_out_of_memory_is_halved(tiny_llama):
    """With three quarters of the memory that it took."""
    model, tokenizer = load(tiny_llama, "cuda", "float32")
    prompts, sizes = [[1, 5 + row % 200] * 200 for row in range(256)], []
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    expected = texts_of(answer_batch(model, tokenizer, prompts, Settings(5, 0)))
    took = torch.cuda.max_memory_reserved() - before
    torch.cuda.empty_cache()

    model.register_forward_pre_hook(limited(sizes, 256), with_kwargs=True)
    limit = before + 0.75 * took
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        assert texts_of(answer_batch(model, tokenizer, prompts, Settings(5, 0))) == expected
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert sizes[:2] == [256, 128]


def test_a_single_prompt_that_is_too_large_for_the_memory_is_told(tiny_llama):
    model, tokenizer = load(tiny_llama, "cpu")
    model.register_forward_pre_hook(limited([], 0), with_kwargs=True)
    with pytest.raises(UserError, match="a prompt of 2 tokens and its answer do not fit the memory"):
        answer_batch(model, tokenizer, [[1, 5]], Settings(5, 0))


def test_what_was_shown_of_broken_bytes_is_not_taken_back(sentencepiece_folder):
    """LLaMA's decoder makes a replacement of each byte of a run that is not UTF-8, also of what was whole before."""
    tokenizer = load_tokenizer(sentencepiece_folder)
    byte = {value: tokenizer.convert_tokens_to_ids(f"<0x{value:02X}>") for value in (0xE5, 0xA5, 0xBD, 0xFF)}
    ids = [byte[value] for value in (0xE5, 0xA5, 0xBD, 0xFF)] + tokenizer(" x", add_special_tokens=False)["input_ids"]
    pieces = [piece for piece in pieces_of(tokenizer, ids) if piece]
    assert pieces[0] == "好" != tokenizer.decode(ids)[0]  # shown before it is known that it would be taken back
    written = Answer(tokenizer, frozenset(), 50)
    assert "".join([*map(written.add, ids), written.rest()]) == written.text == "".join(pieces)


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
    assert batches(lengths, 2, max_tokens) == expected


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
    with pytest.raises(UserError, match="computes NaN.*dtype float32"):
        choose(torch.tensor([[0.0, float("nan")]]), 0, 1.0)


def test_a_prompts_tokens_are_trainings(tokenizer):
    made = deepcopy(tokenizer)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    (ids,) = prompt_ids(made, ["Say </s>"])
    assert ids[0] == 1 and 2 not in ids  # no EOS behind, and what somebody types is text
    assert made.decode(ids[1:]) == "Say </s>"
    with pytest.raises(UserError, match="half of a surrogate pair"):
        prompt_ids(made, ["a\ud800"])
