"""Tokenizers as LLaMA, Mistral, OPT, SmolLM2, GPT-4, Llama 3 and Qwen have them; conftest.py imports the fixtures."""

from __future__ import annotations

import importlib.metadata
import io
import json
import sys
from pathlib import Path

import pytest

from alpaca.embedded_model import gguf_path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))


def shipped() -> list[dict]:
    return json.loads((ROOT / "alpaca_data.json").read_text())


def sentencepiece_in(folder: Path, texts: list[str], **options) -> Path:
    """Put a sentencepiece model as LLaMA's (BPE, bytes for what is rare, digits alone), 800 tokens, into a folder."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([record["output"] for record in shipped()[:400]] + texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=800,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        **options,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="session")
def llama_tokenizer(tmp_path_factory):
    """LLaMA's kind as transformers builds it from a tokenizer.model: a space in front of a text's first word."""
    from transformers import LlamaTokenizerFast

    folder = sentencepiece_in(tmp_path_factory.mktemp("sentencepiece"), [(ROOT / "prompt.txt").read_text()])
    return LlamaTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="session")
def mistral_tokenizer(llama_tokenizer):
    """The same as the tokenizer.json of Mistral 7B and of LLaMA's first conversions: a normalizer puts the space."""
    from tokenizers import Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer.from_str(llama_tokenizer.backend_tokenizer.to_str())
    core.pre_tokenizer = None
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_level(words, special: list[str], **more):
    """A byte-level BPE of 4,000 tokens; ``words`` splits a text before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE(**more))
    core.pre_tokenizer = words
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([":" + record["output"] for record in shipped()], trainer)
    return core


def words_of_gpt4():
    """GPT-4's and Llama 3's way to split a text: a colon and the word after it can be one token."""
    from tokenizers import Regex, pre_tokenizers

    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    rest = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(f"{words}|{rest}"), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.fixture(scope="session")
def gpt4_tokenizer():
    from transformers import PreTrainedTokenizerFast

    core = byte_level(words_of_gpt4(), ["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def llama3_tokenizer():
    """BOS in front, whole words without merges, and offsets that leave out a token's white space."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    core = byte_level(words_of_gpt4(), ["<|begin_of_text|>", "<|end_of_text|>"], ignore_merges=True)
    bos = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), bos])
    specials = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **specials)


@pytest.fixture(scope="session")
def opt_tokenizer():
    """GPT-2's way to split a text, and </s>, which is EOS as well, in front."""
    from tokenizers import pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<s>", "<pad>", "</s>", "<unk>"])
    bos = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), bos])
    specials = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **specials)


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gguf_path().parent, gguf_file=gguf_path().name)


@pytest.fixture(scope="session")
def qwen_tokenizer():
    """Qwen's own 151,643 tokens: a tiktoken file in the wheel dashscope, of which no code is run."""
    from border import qwen_tokenizer

    files = importlib.metadata.distribution("dashscope").files or []
    return qwen_tokenizer(next(Path(file.locate()) for file in files if file.suffix == ".tiktoken"))
