"""Generate answers, one prompt or a batch of them: tokens from the model, and text from the tokens as they come.

A row's tokens depend on the model, its prompt and the settings, not on the rest of the batch: each row draws from its
own generator, seeded from the seed and the prompt. Rounding remains: matrix products of 1 row and of 32 rows add in
different orders (1e-7 of a logit in float32, 1e-2 in bfloat16), so where two tokens are nearly as likely, a row alone
and in a batch may differ.

The loop is ours. transformers' generate() with a logits processor that makes the same draws gives the same answers
("seeded" in benchmarks/bench_chat.py), but it calls its caller: to stream from it, to stop it and to let rows leave
took a thread, a stopping criterion and a call for each row that ends, which is more code than the loop has.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from alpaca import UserError
from alpaca.chat_template import end_token

STOP = "### Instruction:"  # a model that missed its EOS continues with the next example of its training data
STOP_TOKENS = 32  # more than STOP can have: it has 16 characters, and each token has at least one of their bytes
NUCLEUS = 1024  # the likeliest tokens, searched first: sorting 49,152 takes 27 ms, choosing these 0.3 ms


@dataclass(frozen=True)
class Settings:
    """How answers are sampled.

    Args:
        max_new_tokens: the longest answer, EOS included.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_p: sample from the fewest tokens whose probabilities add up to it (nucleus: Holtzman et al., 2020,
            arXiv:1904.09751).
        seed: the same seed gives the same prompt the same answer; None draws one.

    Raises:
        UserError: one of them is out of range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int | None = None

    def __post_init__(self):
        if self.max_new_tokens < 1 or not self.temperature >= 0 or not 0 < self.top_p <= 1:  # NaN fails too
            raise UserError(
                "max_new_tokens must be at least 1, temperature at least 0, and top_p above 0 and at most 1"
            )


class Memory:
    """What the model has read of a conversation: the tokens, with their keys and values."""

    def __init__(self):
        self.ids: list[int] = []
        self.cache = None

    def begin(self, ids: list[int]) -> int:
        """Keep the beginning that it shares with ``ids``, drop the rest, and return the number of tokens kept.

        The last token of ``ids`` is never kept: its logits are needed for the next token.
        """
        same = next((i for i, (a, b) in enumerate(zip(self.ids, ids, strict=False)) if a != b), len(self.ids))
        same = min(same, len(ids) - 1)
        # A sliding window has dropped what a shorter prompt needs.
        if self.cache is None or any(type(layer) is not DynamicLayer for layer in self.cache.layers):
            same, self.cache = 0, None
        cache, self.cache = self.cache, None  # until it fits the tokens: Ctrl-C may come anywhere
        if cache is not None and same < len(self.ids):
            cache.crop(same - len(self.ids))
        self.ids = self.ids[:same]
        self.cache = cache
        return same


# ---------------------------------------------------------------------------------------------------------------------
# Tokens.


def choose(logits: torch.Tensor, temperature: float, top_p: float, draws: torch.Tensor | None = None) -> torch.Tensor:
    """Return the next token of each row.

    Args:
        logits: (rows, vocabulary), float32.
        temperature, top_p: as in Settings.
        draws: (rows,), float32, uniform in [0, 1); unused when ``temperature`` is 0.

    Returns:
        (rows,), int64.

    Raises:
        UserError: a row holds NaN.
    """
    highest, likeliest = logits.max(dim=-1)
    if highest.isnan().any():
        raise UserError("the model computes NaN: try dtype float32; if that does not help, its weights are damaged")
    if temperature == 0:
        return likeliest
    weights = ((logits - highest[:, None]) / temperature).softmax(dim=-1)
    if top_p < 1:
        likely = weights.topk(min(NUCLEUS, weights.shape[1]), dim=-1).values
        if (likely.sum(dim=-1) < top_p).any():  # flat: the nucleus is larger
            likely = weights.sort(dim=-1, descending=True).values
        last = (likely.cumsum(dim=-1) - likely < top_p).sum(dim=-1, keepdim=True) - 1
        weights = weights * (weights >= likely.gather(1, last))
    # In the order of the vocabulary: in that of the probabilities, rounding makes neighbors change places.
    cumulative = weights.cumsum(dim=-1)
    places = (cumulative <= draws.to(logits.device)[:, None] * cumulative[:, -1:]).sum(dim=-1)
    return torch.where(places < logits.shape[1], places, likeliest)  # a draw next to 1 may be rounded to it


def end_ids(model, tokenizer) -> frozenset[int]:
    """Return the tokens that end an answer: the tokenizer's EOS, the generation config's, and the chat template's.

    Llama 3's template ends answers with <|eot_id|>, which not every config names.
    """
    named = getattr(model.generation_config, "eos_token_id", None)
    found = [] if named is None else [int(id_) for id_ in (named if isinstance(named, list) else [named])]
    found += [tokenizer.eos_token_id] if tokenizer.eos_token else []
    with suppress(UserError):  # a template that fails is reported where it is used
        if tokenizer.chat_template and (end := end_token(tokenizer)):
            found.append(tokenizer.convert_tokens_to_ids(end))
    return frozenset(found)


def context_length(model) -> int | None:
    """Return the number of tokens that the model can read and write together, where its config says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def longest_answer(model, ids: list[int], max_new_tokens: int) -> int:
    """Return the number of tokens that the answer to a prompt can have.

    Raises:
        UserError: the prompt is empty, or leaves no room in the context for an answer; it is never cut silently.
    """
    if not ids:
        raise UserError("the prompt is empty: there is nothing to answer")
    context = context_length(model)
    if context and len(ids) >= context:
        raise UserError(f"the prompt has {len(ids)} tokens, but the model reads at most {context}: shorten it")
    return min(max_new_tokens, context - len(ids)) if context else max_new_tokens


def _draws(seed: int, ids: list[int], count: int) -> torch.Tensor:
    """Return (count,) uniform numbers that depend on the seed and the prompt alone."""
    digest = hashlib.sha256(f"{seed} {ids}".encode()).digest()
    return torch.rand(count, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))


@torch.inference_mode()
def decode(
    model,
    prompts: Sequence[list[int]],
    ends: frozenset[int],
    settings: Settings,
    done: Collection[int] = (),
    memory: Memory | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[list[tuple[int, int]]]:
    """Yield (row, token) of each row that continues, step by step; a row that has ended leaves the batch.

    Args:
        model, prompts: a causal model, and token ids.
        ends: tokens that end a row; they are not yielded.
        settings: a row also ends at ``max_new_tokens`` and at the end of the context.
        done: rows that the caller wants no more of; read after each step.
        memory: of the conversation whose next prompt is ``prompts[0]``; tokens that it holds are not computed again.
        stopped: called before each step, the first included; True ends all rows.

    Raises:
        UserError: a prompt is empty or fills the context, or the model computes NaN.
    """
    limits = [longest_answer(model, ids, settings.max_new_tokens) for ids in prompts]
    seed = random.SystemRandom().getrandbits(48) if settings.seed is None else settings.seed
    draws = torch.stack([_draws(seed, ids, max(limits)) for ids in prompts])
    known = memory.begin(prompts[0]) if memory else 0
    memory = memory or Memory()
    cache = memory.cache or DynamicCache(config=model.config)
    width = max(map(len, prompts))
    padded = [[ids[0]] * (width - len(ids)) + ids for ids in prompts]  # on the left
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, known:]
    ids = torch.tensor(padded, device=model.device)[:, known:]
    padding = min(map(len, prompts)) < width  # without, attention need not look at a mask
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft hands on what the base accepts
    accepted = inspect.signature(base.forward).parameters
    rows, written = list(range(len(prompts))), 0
    while rows and not stopped():
        inputs = {"attention_mask": mask if padding else None, "position_ids": positions, "logits_to_keep": 1}
        inputs = {name: value for name, value in inputs.items() if name in accepted}
        memory.cache = None  # until all layers have these tokens: Ctrl-C may come between two
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, **inputs)
        logits = output.logits[:, -1].float()
        chosen = choose(logits, settings.temperature, settings.top_p, draws[rows, written])
        tokens = chosen.tolist()
        memory.ids += ids[0].tolist()
        memory.cache = cache  # last: from here on it holds what memory.ids says
        written += 1
        step = [(row, token) for row, token in zip(rows, tokens, strict=True) if token not in ends]
        yield step
        going = {row for row, _ in step if row not in done and written < limits[row]}
        stay = [place for place, row in enumerate(rows) if row in going]
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        if 0 < len(stay) < len(rows):
            kept = torch.tensor(stay, device=model.device)
            cache.batch_select_indices(kept)
            ids, positions, mask = ids[kept], positions[kept], mask[kept]
        rows = [rows[place] for place in stay]


# ---------------------------------------------------------------------------------------------------------------------
# Text.


class Text:
    """An answer's text as its tokens come, without white space around it; it ends at STOP."""

    def __init__(self, tokenizer):
        self.tokenizer, self.tokens, self.shown, self.ended = tokenizer, [], "", False

    def add(self, token: int) -> str:
        """Take a token, and return the text to show now: without half a character, and what may begin STOP."""
        self.tokens.append(token)
        return self.rest(more=True)

    def rest(self, more: bool = False) -> str:
        """Return the text that has not been shown; ``more``: tokens may follow.

        All tokens are decoded each time: one by one, or line by line as in transformers' TextIteratorStreamer, a LLaMA
        tokenizer drops a space at each beginning, and so the first of every indentation.
        """
        text, stop, _ = self.tokenizer.decode(self.tokens, skip_special_tokens=True).lstrip().partition(STOP)
        self.ended = bool(stop)
        if more and not stop:
            text = text.rstrip("\ufffd")  # it marks a character that lacks some of its bytes
            begun = next((n for n in range(min(len(STOP), len(text)), 0, -1) if STOP.startswith(text[-n:])), 0)
            text = text[: len(text) - begun]
        new = text.rstrip()[len(self.shown) :]
        self.shown += new
        return new


# ---------------------------------------------------------------------------------------------------------------------
# Answers.


def too_large(ids: list[int]) -> UserError:
    """Return the error for a single prompt that does not fit the memory."""
    return UserError(
        f"a prompt of {len(ids)} tokens and its answer do not fit the memory: lower max_new_tokens, or use dtype "
        "bfloat16 or device cpu"
    )


def answer_batch(
    model, tokenizer, prompts: Sequence[list[int]], settings: Settings, on_tokens: Callable[[int], None] | None = None
) -> list[tuple[str, int, bool]]:
    """Answer each prompt as chat.stream() does, all at once; a batch that does not fit the memory is halved.

    Args:
        model, tokenizer, prompts, settings: the prompts are token ids.
        on_tokens: called after each step with the number of its tokens.

    Returns:
        Text, number of tokens, and whether that number is the limit, so that the answer may be cut off.
    """
    written, done = [[] for _ in prompts], set()
    may_end = functools.cache(lambda token: STOP[-1] in tokenizer.decode([token]))  # few rows are decoded at each step
    try:
        for step in decode(model, prompts, end_ids(model, tokenizer), settings, done):
            for row, token in step:
                written[row].append(token)
                if may_end(token) and STOP in tokenizer.decode(written[row][-STOP_TOKENS:], skip_special_tokens=True):
                    done.add(row)
            if on_tokens:
                on_tokens(len(step))
    except torch.OutOfMemoryError:
        if len(prompts) == 1:
            raise too_large(prompts[0]) from None
        written = []
    if prompts and not written:  # outside the handler, which keeps the tensors of the failed call alive
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        half = len(prompts) // 2
        parts = prompts[:half], prompts[half:]
        return [answer for part in parts for answer in answer_batch(model, tokenizer, part, settings, on_tokens)]
    answers = []
    for ids, tokens in zip(prompts, written, strict=True):
        text = Text(tokenizer)
        for token in tokens:  # as in a stream: decoding all at once may change the text before broken bytes
            text.add(token)
        text.rest()
        cut = len(tokens) == longest_answer(model, ids, settings.max_new_tokens) and not text.ended
        answers.append((text.shown, len(tokens), cut))
    return answers


def batches(lengths: Sequence[int], max_new_tokens: int, max_tokens: int) -> list[list[int]]:
    """Group the places of prompts into batches of similar length, for little padding.

    The longest come first, so that a lack of memory shows at once. All arguments count tokens; ``max_tokens`` is the
    most that a batch may have, prompts, answers and padding together.
    """
    made, order = [], sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        rows = max(1, max_tokens // (lengths[order[0]] + max_new_tokens))
        made.append(order[:rows])
        order = order[rows:]
    return made
