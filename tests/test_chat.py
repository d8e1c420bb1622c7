"""alpaca/inference.py and chat.py: what a model says is what the user reads, and it stops where an answer ends."""

from __future__ import annotations

import io
import itertools
import json
import os
import shlex
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import run_script
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import chat
import utils
from alpaca import UserError, cli, inference
from alpaca.inference import cut_at, decode_pieces, stream

STOP = "### Instruction:"


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


def test_a_sampled_stream_is_the_text_that_generate_gives_for_the_same_seed(loaded):
    kwargs = {"temperature": 1.5, "top_p": 0.8}  # and no top_k, which generate() sets to 50 by itself
    torch.manual_seed(7)
    expected = generated(*loaded, "Hello", do_sample=True, max_new_tokens=24, top_k=0, **kwargs)
    texts = ["".join(stream(*loaded, "Hello", max_new_tokens=24, seed=seed, **kwargs)) for seed in (7, 8, 7)]
    assert texts[0] == texts[2] == expected
    assert texts[1] != expected


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
    before = threading.enumerate()
    assert answer(chain(tmp_path / "model", *pieces, loop=True), max_new_tokens=10**6) == "Hi there."
    assert threading.enumerate() == before


def test_a_stream_ends_at_max_new_tokens(tmp_path):
    folder = chain(tmp_path / "model", "a", "b", loop=True)
    assert [answer(folder, max_new_tokens=n) for n in (1, 2, 5)] == ["a", "ab", "ababa"]


def test_closing_a_stream_early_stops_the_model(tmp_path):
    before = threading.enumerate()
    pieces = stream(*inference.load(chain(tmp_path / "model", "a", "b", loop=True), "cpu"), "x", max_new_tokens=10**6)
    assert [next(pieces), next(pieces)] == ["a", "b"]
    assert len(threading.enumerate()) == len(before) + 1
    pieces.close()
    assert threading.enumerate() == before


def test_an_error_in_the_model_reaches_the_reader(loaded, paris):
    """The tokenizer's 300 tokens are too many for the model's 7."""
    before = threading.enumerate()
    with pytest.raises(IndexError):
        list(stream(inference.load(paris, "cpu")[0], loaded[1], "Hello"))
    assert threading.enumerate() == before


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


def test_a_tied_output_embedding_is_not_missing(tiny_opt):
    model, _ = inference.load(tiny_opt, "cpu")
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight


@pytest.mark.parametrize("device", ["hip:99", "nonsense"])
def test_a_device_that_is_not_there_is_refused(tiny_llama, device):
    with pytest.raises(UserError, match=f"--device {device} is not there"):
        inference.load(tiny_llama, device)


# ---------------------------------------------------------------------------------------------------------------------
# chat.py.


def run_chat(monkeypatch, *argv, stdin: str = "") -> None:
    """``python chat.py argv…`` in this process."""
    monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, argv)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    cli.run_cli(chat.chat)


def test_an_instruction_on_the_command_line_is_answered_on_stdout(paris):
    result = run_script("chat.py", "--model_path", paris, "--instruction", "What is the capital of France?")
    assert (result.returncode, result.stdout) == (0, "Paris is.\n"), result.stderr


def test_a_conversation_can_be_piped(paris):
    lines = "What is it?\n/input France\n\n  And this?  \n/help\n/quit\nnever asked\n"
    result = run_script("chat.py", "--model_path", paris, input=lines)
    assert (result.returncode, result.stdout) == (0, f"{chat.HELP}\nParis is.\nParis is.\n{chat.HELP}\n"), result.stderr


def test_every_documented_command_runs(tiny_llama, monkeypatch, capsys):
    commands = [line.strip() for line in chat.__doc__.splitlines() if line.strip().startswith("python ")]
    assert len(commands) == 3
    for command in commands:
        _, script, *argv = shlex.split(command.replace("DIR", str(tiny_llama)))
        assert script == "chat.py"
        run_chat(monkeypatch, *argv, "--max_new_tokens", "8", "--device", "cpu", stdin="Hi\n")
        output = capsys.readouterr().out
        assert output.startswith(chat.HELP) == ("--instruction" not in argv)
        text = output.removeprefix(chat.HELP + "\n")
        assert text.endswith("\n") and text.strip()


@pytest.fixture
def prompts(monkeypatch) -> list[str]:
    """What inference.stream is given, in their order; it goes on to answer."""
    seen = []

    def note(model, tokenizer, prompt, *args):
        seen.append(prompt)
        return stream(model, tokenizer, prompt, *args)

    monkeypatch.setattr(inference, "stream", note)
    return seen


def test_prompts_are_the_bytes_that_training_formats(paris, monkeypatch, prompts):
    run_chat(monkeypatch, "--model_path", paris, "--instruction", "1, 2", "--input", "[3]")
    run_chat(monkeypatch, "--model_path", paris, "--instruction", " spaces stay ")
    assert prompts == [utils.format_prompt("1, 2", "[3]"), utils.format_prompt(" spaces stay ")]
    assert prompts[0] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n1, 2\n\n### Input:\n[3]\n\n### Response:"
    )


@pytest.mark.parametrize("end", ["/quit\nnever\n", "/exit\nnever\n", ""])
def test_an_input_holds_for_one_instruction_and_quit_or_the_end_leaves(paris, monkeypatch, prompts, end):
    run_chat(monkeypatch, "--model_path", paris, stdin=f"one\n/input a b\ntwo\nthree\n/input c\n/input\nfour\n{end}")
    expected = [("one", ""), ("two", "a b"), ("three", ""), ("four", "")]
    assert prompts == [utils.format_prompt(*pair) for pair in expected]


def test_an_instruction_that_is_too_long_does_not_end_a_conversation(tiny_llama, monkeypatch, capsys):
    run_chat(
        monkeypatch, "--model_path", tiny_llama, "--device", "cpu", "--max_new_tokens", "4", stdin="Q" * 2000 + "\nHi\n"
    )
    lines = capsys.readouterr().out.removeprefix(chat.HELP + "\n").split("\n", 1)
    assert lines[0].startswith("error: the prompt has ") and lines[0].endswith("shorten it")
    assert lines[1].strip()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--instruction", "  "], "--instruction is empty"),
        (["--instruction", "x", "--top_p", "2"], "top_p above 0 and at most 1"),
        (["--instruction", "x", "--max_new_tokens", "0"], "max_new_tokens must be at least 1"),
        (["--instruction", "x", "--device", "nonsense"], "--device nonsense is not there"),
        (["--instruction", "x", "--max_tokens", "3"], "unknown flag --max_tokens: did you mean --max_new_tokens?"),
    ],
)
def test_a_bad_flag_is_one_line(paris, monkeypatch, capsys, flags, words):
    with pytest.raises(SystemExit) as exit:
        run_chat(monkeypatch, "--model_path", paris, *flags)
    assert exit.value.code.startswith("error: ") and words in exit.value.code
    assert "\n" not in exit.value.code
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("breakage", "words"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer"),
        (lambda folder: (folder / "weight_diff.json").write_text("{}"), "is a weight diff: recover it first"),
    ],
)
def test_a_folder_without_a_tokenizer_or_with_a_diff_is_one_line(paris, tmp_path, monkeypatch, breakage, words):
    folder = shutil.copytree(paris, tmp_path / "model")
    breakage(folder)
    with pytest.raises(SystemExit) as exit:
        run_chat(monkeypatch, "--model_path", folder)
    assert exit.value.code.startswith(f"error: --model_path {folder} {words}")
    assert "\n" not in exit.value.code
