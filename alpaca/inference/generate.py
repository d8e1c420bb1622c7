"""Generate answers, one prompt or a batch of them: tokens from the model, and text from the tokens as they come.

A row's tokens depend on the model, its prompt and the settings, not on the rest of the batch: each row draws from its
own generator, seeded from the seed and the prompt. Rounding remains: matrix products of 1 row and of 32 rows add in
different orders (1e-7 of a logit in float32, 1e-2 in bfloat16), so where two tokens are nearly as likely, a row alone
and in a batch may differ.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from alpaca import UserError

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
        weights = weights * (weights >= _least_of_nucleus(weights, top_p))
    # In the order of the vocabulary: in that of the probabilities, rounding makes neighbors change places.
    cumulative = weights.cumsum(dim=-1)
    places = (cumulative <= draws.to(logits.device)[:, None] * cumulative[:, -1:]).sum(dim=-1)
    return torch.where(places < logits.shape[1], places, likeliest)  # a draw next to 1 may be rounded to it


def _least_of_nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return (rows, 1): the least probability among the fewest tokens that add up to ``top_p``."""

    def least(descending: torch.Tensor) -> torch.Tensor:
        count = (descending.cumsum(dim=-1) - descending < top_p).sum(dim=-1, keepdim=True)
        return descending.gather(1, count - 1)

    some = probabilities.topk(min(NUCLEUS, probabilities.shape[1]), dim=-1).values
    found = least(some)
    for row in (some.sum(dim=-1) < top_p).nonzero()[:, 0].tolist():  # flat: its nucleus is larger
        found[row] = least(probabilities[row : row + 1].sort(dim=-1, descending=True).values)[0]
    return found


def named_ends(model) -> list[int]:
    """Return the tokens that the folder's generation config says end an answer."""
    named = getattr(model.generation_config, "eos_token_id", None)
    return [] if named is None else [named] if isinstance(named, int) else list(named)


def end_ids(model, tokenizer) -> frozenset[int]:
    """Return all tokens that end an answer: the tokenizer's EOS, and those of the generation config."""
    return frozenset(named_ends(model) + ([tokenizer.eos_token_id] if tokenizer.eos_token else []))


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


def _generator(seed: int, ids: list[int]) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {ids}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _lay_out(prompts: Sequence[list[int]], room: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Pad prompts on the left to the longest; mask and positions have ``room`` more columns.

        prompts    [[5, 6, 7], [8]], room 1
        ids        [[5, 6, 7], [8, 8, 8]]
        mask       [[1, 1, 1, 1], [0, 0, 1, 1]]
        positions  [[0, 1, 2, 3], [0, 0, 0, 1]]

    All are int64. The mask is None where there is no padding, so that attention need not look at it.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[ids[0]] * (longest - len(ids)) + ids for ids in prompts])
    padding = torch.tensor([longest - len(ids) for ids in prompts])[:, None]
    columns = torch.arange(longest + room)
    mask = (columns >= padding).long() if padding.any() else None
    return ids, mask, (columns - padding).clamp(min=0)


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
        UserError: a prompt is empty or fills the context.
    """
    limits = [longest_answer(model, ids, settings.max_new_tokens) for ids in prompts]
    known = memory.begin(prompts[0]) if memory else 0
    memory = memory or Memory()
    cache = DynamicCache(config=model.config) if memory.cache is None else memory.cache
    ids, mask, positions = (t if t is None else t.to(model.device) for t in _lay_out(prompts, max(limits)))
    ids, longest, draws = ids[:, known:], ids.shape[1], None
    if settings.temperature > 0:
        seed = random.SystemRandom().getrandbits(48) if settings.seed is None else settings.seed
        generators = [_generator(seed, ids) for ids in prompts]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft hands on what the base accepts
    accepted = inspect.signature(base.forward).parameters
    rows, read = list(range(len(prompts))), known
    while rows and not stopped():
        end = read + ids.shape[1]
        inputs = {"attention_mask": mask if mask is None else mask[:, :end], "position_ids": positions[:, read:end]}
        inputs |= {"logits_to_keep": 1}
        memory.cache = None  # until all layers have these tokens: Ctrl-C may come between two
        with torch.inference_mode():
            output = model(
                input_ids=ids,
                past_key_values=cache,
                use_cache=True,
                **{name: value for name, value in inputs.items() if name in accepted},
            )
            if settings.temperature > 0:
                draws = torch.stack([torch.rand((), generator=generators[row]) for row in rows])
            chosen = choose(output.logits[:, -1].float(), settings.temperature, settings.top_p, draws)
        memory.ids += ids[0].tolist()
        memory.cache = cache  # last: from here on it holds what memory.ids says
        read, tokens = end, chosen.tolist()
        yield [(row, token) for row, token in zip(rows, tokens, strict=True) if token not in ends]
        written = read - longest + 1
        stay = [
            i
            for i, (row, token) in enumerate(zip(rows, tokens, strict=True))
            if token not in ends and row not in done and written < limits[row]
        ]
        ids = chosen[:, None]
        if 0 < len(stay) < len(rows):
            kept = torch.tensor(stay, device=model.device)
            with torch.inference_mode():
                cache.batch_select_indices(kept)
            ids, positions, mask = ids[kept], positions[kept], mask if mask is None else mask[kept]
        rows = [rows[i] for i in stay]


# ---------------------------------------------------------------------------------------------------------------------
# Text.


def decode_pieces(tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of ``ids`` as it grows.

    All ids are decoded each time: one by one, or line by line as in transformers' TextIteratorStreamer, a LLaMA
    tokenizer drops a space at each beginning, and so the first of every indentation.
    """
    seen, text, shown = [], "", 0
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen, skip_special_tokens=True)
        if len(text) > shown and not text.endswith("\ufffd"):  # it marks a character that lacks some of its bytes
            yield text[shown:]
            shown = len(text)
    if len(text) > shown:
        yield text[shown:]


def cut_at(pieces: Iterable[str], stop: str) -> Iterator[str]:
    """Yield the text before the first ``stop`` and the white space in front of it, however the pieces split them."""
    held = ""  # the end of the text so far, while it may be the beginning of those
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
        written = None
    if written is None:  # outside the handler, which keeps the tensors of the failed call alive
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        half = len(prompts) // 2
        parts = prompts[:half], prompts[half:]
        return [answer for part in parts for answer in answer_batch(model, tokenizer, part, settings, on_tokens)]
    limits = [longest_answer(model, ids, settings.max_new_tokens) for ids in prompts]
    return [
        # Not tokenizer.decode(ids): it may change the text before broken bytes, which a stream cannot take back.
        ("".join(cut_at(decode_pieces(tokenizer, ids), STOP)), len(ids), len(ids) == limit and row not in done)
        for row, (ids, limit) in enumerate(zip(written, limits, strict=True))
    ]


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
