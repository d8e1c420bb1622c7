"""Loads a checkpoint and streams an answer."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer
from transformers.generation import StoppingCriteria

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
    """AutoModelForCausalLM with a one-line UserError for what cannot be read."""
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **kwargs)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as e:
        raise UserError(f"{path}: the model cannot be loaded: {str(e).strip().splitlines()[0]}") from None


def load(path: str | os.PathLike, device: str | None = None):
    """A model for inference and its tokenizer, from a local folder or a hub name.

    Args:
        path: what to load.
        device: "cpu", "cuda", "mps", …; by default the accelerator if there is one. On it weights keep the type they
            were saved in, except that float32 becomes bfloat16; on the CPU they are float32, which is faster there.
    """
    if Path(path).exists() or str(path).startswith((".", "/")):
        check_model_folder(path, "--model_path")
    device = torch.device(device or (torch.accelerator.current_accelerator() or "cpu"))
    tokenizer = load_tokenizer(path)
    model = load_model(path, torch.float32 if device.type == "cpu" else "auto")
    if device.type != "cpu" and model.dtype == torch.float32:
        model = model.to(torch.bfloat16)
    return model.to(device).eval(), tokenizer


class _Cancelled(StoppingCriteria):
    def __init__(self):
        self.event = threading.Event()

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


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
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    length = inputs["input_ids"].shape[1]
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and length >= longest:
        raise UserError(f"the prompt has {length} tokens, but the model reads at most {longest}: shorten it")
    if longest:
        max_new_tokens = min(max_new_tokens, longest - length)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    cancelled, errors = _Cancelled(), []
    sampling = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p}
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
                    stop_strings=[STOP],
                    tokenizer=tokenizer,
                    stopping_criteria=[cancelled],
                    streamer=streamer,
                )
        except Exception as e:  # raised again in the reader's thread
            errors.append(e)
            streamer.end()

    worker = threading.Thread(target=generate, daemon=True)
    worker.start()
    try:
        held = ""  # the end of the text so far, while it may be the beginning of STOP
        for piece in streamer:
            held += piece
            if STOP in held:
                held = held[: held.index(STOP)].rstrip()
                break
            safe = len(held) - next((n for n in range(len(STOP), 0, -1) if STOP.startswith(held[-n:])), 0)
            if safe:
                yield held[:safe]
                held = held[safe:]
        if held:
            yield held
    finally:
        cancelled.event.set()
        worker.join()
    if errors:
        raise errors[0]
