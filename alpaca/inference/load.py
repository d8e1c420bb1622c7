"""Load a model and its tokenizer for inference, and refuse or report what would make it answer with garbage."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaTokenizer
from transformers.utils import cached_file

from alpaca import UserError
from alpaca.common.memory import as_text, available_bytes
from alpaca.common.text import printable, shorten
from alpaca.inference.adapters import base_of, is_adapter, merge_adapter
from alpaca.inference.generate import end_ids
from alpaca.prompts import prompt_ids
from alpaca.weights.checkpoint import FLOATS, TOKENIZER, CheckpointReader, check_model_folder, is_hub_name


@contextmanager
def reading(path: str | os.PathLike, what: str = "the model") -> Iterator[None]:
    """Turn any exception over a folder's files into a UserError: one line with the folder and the library's words."""
    try:
        yield
    except UserError:
        raise
    except pickle.UnpicklingError:  # whose words explain how to run the code
        raise UserError(f"{path} holds more than tensors (its pickle asks to run code) and was not loaded") from None
    except torch.OutOfMemoryError:
        raise UserError(f"{path} does not fit the memory: use dtype bfloat16, device cpu, or a smaller model") from None
    except Exception as e:
        hub = "" if os.path.exists(path) else "this folder does not exist, and from the hub "
        words = printable(shorten(f"{type(e).__name__}: {e}", 300))
        raise UserError(f"{path}: {hub}{what} cannot be loaded: {words}") from None


def load_tokenizer(path: str | os.PathLike, **kwargs):
    """Return AutoTokenizer's tokenizer, which takes "</s>" in a text as text; raise UserError if it cannot be read."""
    with reading(path, "the tokenizer"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **kwargs)
        except RecursionError:  # a LLaMA of the first days: its class has an old name, its special tokens are all ""
            names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            tokenizer = LlamaTokenizer.from_pretrained(path, **names, add_bos_token=True, **kwargs)
        prompt_ids(tokenizer, [""])  # its settings work; and special tokens are text, before threads share it
        _keep_special_tokens_text(tokenizer)
    return tokenizer


def _keep_special_tokens_text(tokenizer) -> None:
    """Remove the merges that make EOS of the characters "</s>", whatever split_special_tokens says.

    transformers makes merges for every piece of a tokenizer.model: "</" and "s>" become EOS. sentencepiece itself never
    makes a control piece out of text.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if isinstance(model, BPE) and any(token.value in special for name in special for token in model.tokenize(name)):
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        set_merges(tokenizer, [(left, right) for left, right in merges if left + right not in special])


def set_merges(tokenizer, merges: list[tuple[str, str]]) -> None:
    """Give a fast tokenizer of type BPE other merges."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["model"]["merges"] = merges
    tokenizer.backend_tokenizer.model = Tokenizer.from_str(json.dumps(core)).model
    if hasattr(tokenizer, "_merges"):  # transformers' LlamaTokenizer keeps a copy (5.17 to 5.23): keep it the same
        tokenizer._merges = merges


def load_model(path: str | os.PathLike, dtype: torch.dtype | str, dropped: list[str] | None = None, **kwargs):
    """Return AutoModelForCausalLM's model, with every weight read from the folder; raise UserError if that cannot be.

    Left to itself, from_pretrained fills missing tensors with random numbers, and drops layers beyond config.json's
    number. What a text model leaves out of the checkpoint is added to ``dropped``, in a line.
    """
    with reading(path):
        # trust_remote_code: by default the library asks on stdin, where a piped instruction may say "y"
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False} | kwargs
        model, report = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
        _check_report(path, model, report)
        if dropped is not None:
            config = cached_file(path, "config.json", cache_dir=kwargs.get("cache_dir"))
            dropped += _left_out(model, Path(config).parent)
    return model


def _check_report(path: str | os.PathLike, model, report: dict) -> None:
    """Raise UserError for tensors that from_pretrained made up or left out."""
    for name, found, made in sorted(report["mismatched_keys"]):
        sizes = f"{name} is {tuple(found)}, but config.json makes it {tuple(made)}"
        raise UserError(f"{path}: {sizes}: weights and config.json are of different models, copy both from one")
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{path} lacks {len(missing)} of the model's tensors ({missing[0]}, …): copy it again")
    kinds = {re.sub(r"\d+", "N", name) for name, _ in model.named_parameters()}
    if beyond := sorted(name for name in report["unexpected_keys"] if re.sub(r"\d+", "N", name) in kinds):
        raise UserError(f"{path} has layers that config.json does not count ({beyond[0]}, …): copy both from one model")
    classes = model.config.architectures or ()
    if masked := [name for name in classes if name.endswith(("ForMaskedLM", "ForPreTraining"))]:
        raise UserError(f"{path} is a {masked[0]}, which reads the words to come: choose a causal model")


def _left_out(model, folder: Path) -> list[str]:
    """Say which parts of the checkpoint are no part of the model, such as one that reads images, and their share."""
    ours = {part for name, _ in model.named_modules() for part in name.split(".")}
    silent = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()  # private: no report has them (5.23)
    sizes, left = {name: math.prod(shape) for name, (_, shape) in CheckpointReader(folder).specs().items()}, Counter()
    for name, size in sizes.items():
        other = [part for part in name.split(".")[:-1] if part not in ours]
        if other and any(re.search(pattern, name) for pattern in silent):
            left[name[: name.index(other[0]) + len(other[0])]] += size
    parts = [f"{name} ({size / sum(sizes.values()):.1%})" for name, size in left.items()]
    return [f"not in the result, of the checkpoint's values: {', '.join(parts)}"] if parts else []


@torch.no_grad()
def near_zero(model) -> str:
    """Say why the weights look like the difference of two models, as Alpaca's were released; "" if they do not.

    A model's norms are of order 0.1 to 10 (SmolLM2: 0.3 to 3.3; 1 before training), or 0 and more where they are added
    to 1 (Gemma); its embeddings are of order 0.01 to 0.1. Fine-tuning at a learning rate of 2e-5 moves either by 1e-3
    at most.
    """
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    weights = [module.weight for module in norms if getattr(module, "weight", None) is not None]
    words = model.get_input_embeddings().weight
    if not weights or any(weight.is_meta or not weight.numel() for weight in (words, *weights)):
        return ""  # without norms, in another process than the one that read them, or under ZeRO-3
    norm = max(float(weight.abs().max()) for weight in weights)
    if norm > 0.1 or (word := float(words.float().abs().mean())) > 2e-3:
        return ""
    return f"all weights are near 0 (norms below {norm:.1g}, embeddings {word:.1g} on average)"


def check_model(model, tokenizer, path: str | os.PathLike) -> None:
    """Raise UserError for a model that cannot answer, and print a warning for one whose answers do not end.

    The first is a weight diff (also one that lost its weight_diff.json), and one whose rows are too few for the
    tokenizer's vocabulary, added tokens left out, or for its BOS.
    """
    end_ids(model, tokenizer)  # before the first question: the configs may have odd values
    DynamicCache(config=model.config)
    if what := near_zero(model):
        raise UserError(f"{path}: {what}, as in a weight diff: recover the model first (python weight_diff.py recover)")
    rows, bos = model.get_input_embeddings().weight.shape[0], tokenizer.bos_token_id
    if tokenizer.vocab_size > rows or (bos is not None and bos >= rows):
        tokens = f"the tokenizer has {tokenizer.vocab_size} tokens, BOS is token {bos} ({tokenizer.bos_token!r})"
        raise UserError(f"{path}: {tokens}, and the model has {rows} rows: copy the tokenizer of the trained model")
    eos, id_ = tokenizer.eos_token, tokenizer.eos_token_id
    if not eos or id_ is None or id_ >= rows:
        why = f"token {id_}, and the model has {rows} rows" if eos else "none"
        why += ": the model never learned to end an answer, which runs to a new '### Instruction:' or to max_new_tokens"
        cure = "set eos_token in tokenizer_config.json and train again"
        print(f"warning: the tokenizer's EOS is {eos!r}, {why}; {cure}", file=sys.stderr)


def load(path: str | Path, device: str | None = None, dtype: str | None = None, base_path: str | Path | None = None):
    """Return (model, tokenizer) for inference; print a warning about an odd EOS, raise UserError for all that is worse.

    Args:
        path: the folder or hub name of a model, or the folder of a LoRA adapter, which is merged into its base.
        device: "cpu", "cuda", "mps", …; by default the accelerator if there is one.
        dtype: "float32", "bfloat16" or "float16". By default, an accelerator keeps the type that was saved, except that
            float32 becomes bfloat16 (float16 on a GPU without bfloat16). A CPU takes float32, which is faster there,
            if the memory suffices.
        base_path: the base of an adapter; by default the one that the adapter names.
    """
    if dtype is not None and dtype not in FLOATS:
        raise UserError(f"dtype {dtype} is unknown: choose from {', '.join(FLOATS)}")
    with reading(path):
        try:  # a build of torch for GPUs names its accelerator on a machine without one, too
            place = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
            torch.empty(0, device=place)
        except (RuntimeError, AssertionError):
            raise UserError(f"device {device} is not available: choose cpu, or leave it out") from None
        model, tokenizer = _read(path, place, dtype, base_path)
        if dtype is None and place.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            model = model.half()
        elif dtype is None and place.type != "cpu" and model.dtype == torch.float32:
            model = model.bfloat16()
        check_model(model, tokenizer, path)
        return model.to(place).eval(), tokenizer


def _read(path: str | Path, device: torch.device, dtype: str | None, base_path: str | Path | None):
    """Return (model, tokenizer); an adapter is merged into its base."""
    folder = Path(path)
    if not is_adapter(folder):
        if base_path is not None:
            raise UserError(f"base_path is for LoRA adapters, and {path} is not one: leave it out")
        if not is_hub_name(path):
            check_model_folder(path, "model_path")
        tokenizer = load_tokenizer(path)
        return load_model(path, _dtype(path, device, dtype)), tokenizer
    base = base_of(folder, base_path)
    tokenizer = load_tokenizer(path if any((folder / name).exists() for name in TOKENIZER) else base)
    try:
        model = load_model(base, _dtype(base, device, dtype))
    except UserError as e:
        raise UserError(f"{path} is a LoRA adapter, and its base {e} (base_path can name another folder)") from None
    return merge_adapter(model, folder, len(tokenizer)), tokenizer


def _dtype(path: str | os.PathLike, device: torch.device, dtype: str | None) -> torch.dtype | str:
    """The type to load in: what was asked for, "auto" (as saved), or float32 on a CPU with the memory for it."""
    if dtype or device.type != "cpu":
        return FLOATS[dtype] if dtype else "auto"
    files = [file for name in ("model*.safetensors", "pytorch_model*.bin") for file in Path(path).glob(name)]
    needed, free = 2 * sum(file.stat().st_size for file in files), available_bytes(device)  # where 16 bits were saved
    if needed <= free:
        return torch.float32
    why = f"float32 may need {as_text(needed)}, and {as_text(free)} are free"
    print(f"note: {why}: loaded as it was saved, which is slower on a CPU", file=sys.stderr)
    return "auto"
