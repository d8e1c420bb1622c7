"""Loads a checkpoint and streams an answer."""

from __future__ import annotations

import os
import pickle
import queue
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation import BaseStreamer, StoppingCriteria

from alpaca import UserError
from alpaca.checkpoint import check_model_folder

# A model that missed its EOS goes on with the next example of its training data.
STOP = "### Instruction:"


def load_tokenizer(path: str | os.PathLike, **kwargs):
    """AutoTokenizer with a one-line UserError for what cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(path, **kwargs)
    except (OSError, ValueError, ImportError, KeyError) as e:
        raise UserError(f"{path}: the tokenizer cannot be loaded: {str(e).strip().splitlines()[0]}") from None


def load_model(path: str | os.PathLike, dtype: torch.dtype | str, **kwargs):
    """AutoModelForCausalLM with a one-line UserError for what cannot be read, or is another model's.

    Left to itself, from_pretrained fills a tensor that is not there with random numbers, leaves out layers that
    config.json does not count, makes a BERT a causal model, and goes on.
    """
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than tensors (its pickle asks to run code) and was not loaded") from None
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as e:
        raise UserError(f"{path}: the model cannot be loaded: {str(e).strip().splitlines()[0]}") from None
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise UserError(
            f"{path}: {name} is {tuple(found)}, but config.json makes it {tuple(expected)}: weights and config.json "
            "are of different models, copy both from one"
        )
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{path} lacks {len(missing)} of the model's tensors ({missing[0]}, …): copy it again")
    kinds = {re.sub(r"\d+", "N", name) for name, _ in model.named_parameters()}
    if beyond := sorted(name for name in report["unexpected_keys"] if re.sub(r"\d+", "N", name) in kinds):
        raise UserError(f"{path} has layers that config.json does not count ({beyond[0]}, …): copy both from one model")
    if any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in model.config.architectures or ()):
        raise UserError(
            f"{path} is a {model.config.architectures[0]}, which sees the words to come: take a causal model"
        )
    return model


def load(path: str | os.PathLike, device: str | None = None):
    """A model for inference and its tokenizer, from a local folder or a hub name.

    Args:
        path: what to load.
        device: "cpu", "cuda", "mps", …; by default the accelerator if there is one. On it weights keep the type they
            were saved in, except that float32 becomes bfloat16; on the CPU they are float32, which is faster there.
    """
    if Path(path).exists() or str(path).startswith((".", "/")):
        check_model_folder(path, "--model_path")
    try:
        device = torch.device(device or (torch.accelerator.current_accelerator() or "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {device} is not there: cpu is, and without --device the best is taken") from None
    tokenizer = load_tokenizer(path)
    model = load_model(path, torch.float32 if device.type == "cpu" else "auto")
    if device.type != "cpu" and model.dtype == torch.float32:
        model = model.to(torch.bfloat16)
    return model.to(device).eval(), tokenizer


class _TokenQueue(BaseStreamer):
    """Hands the tokens that generate() samples to another thread."""

    def __init__(self):
        self.queue = queue.SimpleQueue()
        self.prompt_seen = False

    def put(self, ids: torch.Tensor) -> None:
        if self.prompt_seen:
            self.queue.put(ids.item())
        self.prompt_seen = True

    def end(self) -> None:
        self.queue.put(None)

    def __iter__(self) -> Iterator[int]:
        return iter(self.queue.get, None)


class _Cancelled(StoppingCriteria):
    def __init__(self):
        self.event = threading.Event()

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def decode_pieces(tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yields the text of ``ids`` as it grows.

    All ids are decoded each time: one by one, or line by line as transformers' TextIteratorStreamer does it, a LLaMA
    tokenizer drops a space at each beginning, and so the first of every indentation.
    """
    seen, text, shown = [], "", 0
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen, skip_special_tokens=True)
        if len(text) > shown and not text.endswith("\ufffd"):  # it stands for a character that lacks some of its bytes
            yield text[shown:]
            shown = len(text)
    if len(text) > shown:
        yield text[shown:]


def cut_at(pieces: Iterable[str], stop: str) -> Iterator[str]:
    """Yields what is before the first ``stop`` and the white space in front of it, however the pieces split them."""
    held = ""  # the end of the text so far, while it may be the beginning of that
    for piece in pieces:
        held += piece
        if stop in held:
            held = held[: held.index(stop)].rstrip()
            break
        begun = next((n for n in range(min(len(stop), len(held)), 0, -1) if stop.startswith(held[-n:])), 0)
        if safe := len(held[: len(held) - begun].rstrip()):
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held


def stream(
    model,
    tokenizer,
    prompt: str,
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int | None = None,
) -> Iterator[str]:
    """Yields the answer to ``prompt`` piece by piece; ends at EOS, at a new "### Instruction:" or at max_new_tokens.

    ``temperature`` 0 takes the likeliest token each time. Closing the iterator stops the model.
    """
    if max_new_tokens < 1 or not temperature >= 0 or not 0 < top_p <= 1:  # NaN fails too
        raise UserError("max_new_tokens must be at least 1, temperature at least 0, and top_p above 0 and at most 1")
    # As in training, a special token that somebody types stays text.
    inputs = tokenizer(prompt, return_tensors="pt", split_special_tokens=True).to(model.device)
    length = inputs["input_ids"].shape[1]
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and length >= longest:
        raise UserError(f"the prompt has {length} tokens, but the model reads at most {longest}: shorten it")
    if longest:
        max_new_tokens = min(max_new_tokens, longest - length)
    tokens, cancelled, errors = _TokenQueue(), _Cancelled(), []
    sampling = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p, "top_k": 0}  # by default generate() adds top_k 50
    if seed is not None:
        torch.manual_seed(seed)

    def generate() -> None:
        try:
            with torch.inference_mode():
                model.generate(
                    **inputs,
                    **sampling,
                    max_new_tokens=max_new_tokens,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id
                    if tokenizer.pad_token_id is not None
                    else tokenizer.eos_token_id,
                    stopping_criteria=[cancelled],
                    streamer=tokens,
                )
        except Exception as e:  # raised again in the reader's thread
            errors.append(e)
            tokens.end()

    worker = threading.Thread(target=generate, daemon=True)
    worker.start()
    try:  # not generate's stop_strings: it reads the whole vocabulary for each answer, 0.3 s at 32,000 tokens
        yield from cut_at(decode_pieces(tokenizer, tokens), STOP)
    finally:
        cancelled.event.set()
        worker.join()
    if errors:
        raise errors[0]
