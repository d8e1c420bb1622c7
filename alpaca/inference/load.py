"""Loads a model with its tokenizer, and answers prompts: one as a stream, or many in batches."""

from __future__ import annotations

import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from alpaca import UserError
from alpaca.common.memory import as_text, available_bytes
from alpaca.inference.adapters import base_of, is_adapter, merge_adapter
from alpaca.inference.checks import check_cache, check_no_difference, odd_special_tokens, tokenizer_fits
from alpaca.inference.generate import (
    STOP,
    Memory,
    Settings,
    StopWatch,
    cut_at,
    decode,
    decode_pieces,
    end_ids,
    longest_answer,
    stripped,
)
from alpaca.prompts import INPUT_HEADING, chat_ids, format_prompt, prompt_ids
from alpaca.weights.checkpoint import FLOATS, TOKENIZER, check_model_folder, read_json


def load_tokenizer(path: str | os.PathLike, **kwargs):
    """AutoTokenizer with a one-line UserError for what cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **kwargs)
    except (OSError, ValueError, ImportError, KeyError) as e:
        hub = "" if os.path.exists(path) else "there is no such folder here, and from the hub "
        raise UserError(f"{path}: {hub}the tokenizer cannot be loaded: {str(e).strip().splitlines()[0]}") from None


def load_model(path: str | os.PathLike, dtype: torch.dtype | str, **kwargs):
    """AutoModelForCausalLM with a one-line UserError for what cannot be read, or is another model's.

    Left to itself, from_pretrained fills a tensor that is not there with random numbers, leaves out layers that
    config.json does not count, makes a BERT a causal model, and goes on.
    """
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,  # left out, it is asked for on stdin, where a piped instruction may begin with "y"
            **kwargs,
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


def load(
    path: str | os.PathLike,
    device: str | None = None,
    dtype: str | None = None,
    base_path: str | os.PathLike | None = None,
):
    """A model for inference and its tokenizer, from a local folder or a hub name; what is odd about them is told.

    Args:
        path: what to load: a model, or a LoRA adapter, which is merged into its base.
        device: "cpu", "cuda", "mps", …; by default the accelerator if there is one.
        dtype: "float32", "bfloat16" or "float16". By default weights keep on an accelerator the type they were saved
            in, except that float32 becomes bfloat16, and where the GPU has none of that, float16; on the CPU they are
            float32, which is faster there, if there is memory for that.
        base_path: the base of an adapter; by default what the adapter names.

    Raises:
        UserError: what cannot be loaded, and why.
    """
    if dtype is not None and dtype not in FLOATS:
        raise UserError(f"--dtype {dtype} is not known: choose from {', '.join(FLOATS)}")
    try:
        # A build of torch for GPUs names its accelerator on a machine without one, too.
        device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {device} is not there: cpu is, and without --device the best is taken") from None
    folder = Path(path)
    adapter = is_adapter(folder)
    if adapter:
        base = base_of(folder, base_path)
        has_tokenizer = any((folder / name).exists() for name in TOKENIZER)
    else:
        if base_path is not None:
            raise UserError(f"--base_path is the base of a LoRA adapter, and {path} is none: drop it")
        if folder.exists() or str(path).startswith((".", "/")):
            check_model_folder(path, "--model_path")
        base, has_tokenizer = path, True
    tokenizer = load_tokenizer(path if has_tokenizer else base)
    try:
        model = load_model(base, _dtype(base, device, dtype))
    except UserError as e:
        if not adapter or Path(base).exists():
            raise
        raise UserError(f"{path} is a LoRA adapter, and its base {e} (--base_path gives a folder)") from None
    if adapter:
        model = merge_adapter(model, folder, len(tokenizer))
    if dtype is None and device.type != "cpu" and (odd := _unfit(model.dtype, device)):
        model = model.to(odd)
    check_cache(model, path)
    check_no_difference(model, path)
    tokenizer_fits(model, tokenizer, path)
    prompt_ids(tokenizer, [""])  # switches it to typed special tokens as text: not while threads share it
    for warning in odd_special_tokens(model, tokenizer, path):
        print(f"warning: {warning}", file=sys.stderr)
    try:
        return model.to(device).eval(), tokenizer
    except torch.OutOfMemoryError:
        raise UserError(
            f"{path} does not fit the memory of {device}: take --dtype bfloat16, --device cpu, or a smaller model"
        ) from None


def _dtype(path: str | os.PathLike, device: torch.device, dtype: str | None) -> torch.dtype | str:
    if dtype is not None or device.type != "cpu":
        return FLOATS[dtype] if dtype else "auto"
    files = [file for file in Path(path).glob("*") if file.suffix in (".safetensors", ".bin")]
    files = [file for file in files if file.name.startswith(("model", "pytorch_model"))]
    saved = read_json(Path(path) / "config.json") if files else {}
    if (saved.get("dtype") or saved.get("torch_dtype")) not in ("bfloat16", "float16"):
        return torch.float32
    needed, free = 2 * sum(file.stat().st_size for file in files), available_bytes(device)
    if needed <= free:
        return torch.float32
    print(
        f"note: float32 would need {as_text(needed)} of the {as_text(free)} that are free: loaded as it was saved, "
        "which is slower on a CPU",
        file=sys.stderr,
    )
    return "auto"


def _unfit(dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """What to compute in where the device is slow, or many times slower, in the type of the weights."""
    emulated = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype in (torch.float32, torch.bfloat16) and emulated:
        return torch.float16
    return torch.bfloat16 if dtype == torch.float32 else None


# ---------------------------------------------------------------------------------------------------------------------
# Answers.


def stream(
    model,
    tokenizer,
    prompt: str,
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
    on_cut: Callable[[str], None] = lambda limit: None,
) -> Iterator[str]:
    """Yields the answer to ``prompt`` piece by piece; ends at EOS, at a new "### Instruction:" or at max_new_tokens.

    ``temperature`` 0 takes the likeliest token each time. Closing the iterator stops the model, and so does
    ``stopped``, which is asked before each token: also while nothing comes, as white space is held back. ``on_cut`` is
    called with "max_new_tokens", or "context" for its end, if the answer reached that.
    """
    settings = Settings(max_new_tokens, temperature, top_p, seed)
    ids = prompt_ids(tokenizer, [prompt])[0]
    yield from stream_ids(model, tokenizer, ids, settings, stopped=stopped, on_cut=on_cut)


def stream_ids(
    model,
    tokenizer,
    ids: list[int],
    settings: Settings,
    memory: Memory | None = None,
    stopped: Callable[[], bool] = lambda: False,
    on_cut: Callable[[str], None] = lambda limit: None,
) -> Iterator[str]:
    """As stream(), from tokens; ``memory`` is that of a conversation, whose tokens are not computed again."""
    limit = longest_answer(model, ids, settings.max_new_tokens)

    def tokens(steps: Iterator[list[tuple[int, int]]]) -> Iterator[int]:
        written = 0
        for step in steps:
            for _, token in step:
                written += 1
                yield token
        if written == limit:  # not reached where STOP has ended the text
            on_cut("context" if limit < settings.max_new_tokens else "max_new_tokens")

    try:
        with closing(decode(model, [ids], end_ids(model, tokenizer), settings, set(), memory, stopped)) as steps:
            yield from cut_at(decode_pieces(tokenizer, tokens(steps)), STOP)
    except torch.OutOfMemoryError:
        raise too_large(ids) from None


def too_large(ids: list[int]) -> UserError:
    """What to do about a single prompt that does not fit the memory."""
    return UserError(
        f"a prompt of {len(ids)} tokens and its answer do not fit the memory: lower --max_new_tokens, or take --dtype "
        "bfloat16 or --device cpu"
    )


def request_ids(tokenizer, template: str, requests: Sequence[tuple[str, str]]) -> list[list[int]]:
    """The tokens of the prompt of each (instruction, input), each on its own.

    Args:
        tokenizer: the model's.
        template: "alpaca", training's, or "chat", the tokenizer's own.
        requests: pairs of texts; the input may be empty.
    """
    if template == "alpaca":
        return prompt_ids(tokenizer, [format_prompt(*request) for request in requests])
    return [chat_ids(tokenizer, [_user(*request)]) for request in requests]


def _user(instruction: str, input: str) -> dict[str, str]:
    return {"role": "user", "content": instruction + (INPUT_HEADING + input if input else "")}


class Conversation:
    """Turns with a model. What it has read of one is not computed again for the next, where their prompts agree.

    Alpaca's template asks each instruction on its own, as in training; a chat template repeats the turns so far.
    """

    def __init__(self, model, tokenizer, settings: Settings, template: str = "alpaca"):
        self.model, self.tokenizer, self.settings, self.template = model, tokenizer, settings, template
        self.memory = Memory()
        self.cut = ""  # "max_new_tokens" or "context" if the last answer reached that limit
        self.reset()

    def reset(self) -> None:
        """Forgets the turns."""
        self.turns: list[dict[str, str]] = []

    def ask(self, instruction: str, input: str = "") -> Iterator[str]:
        """Yields the answer piece by piece, without white space around it.

        One that the reader stops is a turn as far as it got; one that fails is none.
        """
        turns = [*self.turns, _user(instruction, input)] if self.template == "chat" else []
        if turns:
            ids = chat_ids(self.tokenizer, turns)
        else:
            ids = request_ids(self.tokenizer, "alpaca", [(instruction, input)])[0]
        try:
            longest_answer(self.model, ids, self.settings.max_new_tokens)
        except UserError as e:
            raise UserError(f"{e}, or begin anew with /reset" if self.turns else str(e)) from None
        self.cut = ""
        said: list[str] = []

        def noted(pieces: Iterator[str]) -> Iterator[str]:
            for piece in pieces:
                said.append(piece)
                yield piece

        def keep() -> None:
            if turns and said:
                self.turns = [*turns, {"role": "assistant", "content": "".join(said)}]

        try:
            given = {"memory": self.memory, "on_cut": lambda limit: setattr(self, "cut", limit)}
            with closing(stream_ids(self.model, self.tokenizer, ids, self.settings, **given)) as pieces:
                yield from stripped(noted(pieces))
        except (GeneratorExit, KeyboardInterrupt):
            keep()
            raise
        keep()


def answer_batch(
    model, tokenizer, prompts: Sequence[list[int]], settings: Settings, on_tokens: Callable[[int], None] | None = None
) -> list[tuple[str, int, bool]]:
    """The answer to each prompt, as stream_ids() gives it, all prompts at once; halved if they do not fit the memory.

    Args:
        model: a causal model.
        tokenizer: its own.
        prompts: token ids.
        settings: how to sample.
        on_tokens: called after each step with the number of tokens that it brought.

    Returns:
        Text, number of tokens, and whether they are as many as there could be: the model may have had more to say.
    """
    watch, written, done = StopWatch(tokenizer), [[] for _ in prompts], set()
    try:
        for step in decode(model, prompts, end_ids(model, tokenizer), settings, done, None):
            for row, token in step:
                written[row].append(token)
                if watch.sees(written[row]):
                    done.add(row)
            if on_tokens:
                on_tokens(len(step))
    except torch.OutOfMemoryError:
        if len(prompts) == 1:
            raise too_large(prompts[0]) from None
        written = None
    if written is None:  # out of the handler, which keeps the tensors of the failed call alive
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        half = len(prompts) // 2
        parts = prompts[:half], prompts[half:]
        return [answer for part in parts for answer in answer_batch(model, tokenizer, part, settings, on_tokens)]
    limits = [longest_answer(model, ids, settings.max_new_tokens) for ids in prompts]
    return [
        # Not decode(ids), which may differ: a stream cannot take back what broken bytes make of the text before them.
        ("".join(cut_at(decode_pieces(tokenizer, ids), STOP)), len(ids), len(ids) == limit and row not in done)
        for row, (ids, limit) in enumerate(zip(written, limits, strict=True))
    ]


def batches(lengths: Sequence[int], max_new_tokens: int, max_tokens: int) -> list[list[int]]:
    """Places of prompts in batches of similar length, the longest first: there is little padding, and if the memory
    is too small, that shows at once.

    Args:
        lengths: of the prompts, in tokens.
        max_new_tokens: of an answer.
        max_tokens: of prompts and answers that a batch may come to, padding included.
    """
    made, order = [], sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        rows = max(1, max_tokens // (lengths[order[0]] + max_new_tokens))
        made.append(order[:rows])
        order = order[rows:]
    return made
