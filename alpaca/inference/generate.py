"""Tokens out of a model, one prompt or many at once, and text out of tokens as they come.

A row's tokens depend on the model, its prompt and the settings, not on what else is in the batch: each row draws from a
generator of its own, seeded from the seed and the prompt. What is left is rounding, since a matrix product of one row
and of 32 add in another order (1e-7 of a logit in float32, 1e-2 in bfloat16): where two tokens are nearly as likely, a
row alone and a row in a batch may part.
"""

from __future__ import annotations

import hashlib
import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from alpaca import UserError

# A model that missed its EOS goes on with the next example of its training data.
STOP = "### Instruction:"
NUCLEUS = 1024  # tokens among which the nucleus is looked for first: sorting 49,152 takes 27 ms, choosing these 0.3 ms


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
                "--max_new_tokens must be at least 1, --temperature at least 0, and --top_p above 0 and at most 1"
            )


class Memory:
    """What the model has read of a conversation: its tokens, with their keys and values."""

    def __init__(self):
        self.ids: list[int] = []
        self.cache = None

    def begin(self, ids: list[int]) -> int:
        """Keeps what ``ids`` has in common with it, and drops the rest; the number of tokens that are kept.

        The last token of ``ids`` is never kept: its logits are what comes next.
        """
        same = next((i for i, (a, b) in enumerate(zip(self.ids, ids, strict=False)) if a != b), len(self.ids))
        same = min(same, len(ids) - 1)
        # A sliding window has forgotten what a shorter prompt needs.
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
    """The next token of each row.

    Args:
        logits: (rows, vocabulary), float32.
        temperature: as in Settings.
        top_p: as in Settings.
        draws: (rows,), float32, uniform in [0, 1); not looked at when ``temperature`` is 0.

    Returns:
        (rows,), int64.

    Raises:
        UserError: a row holds NaN.
    """
    highest, likeliest = logits.max(dim=-1)
    if highest.isnan().any():
        raise UserError("the model computes NaN, which is no token: try --dtype float32; else its weights are damaged")
    if temperature == 0:
        return likeliest
    weights = ((logits - highest[:, None]) / temperature).softmax(dim=-1)
    if top_p < 1:
        weights = weights * (weights >= _least_of_nucleus(weights, top_p))
    # In the order of the vocabulary, not of the probabilities, in which rounding makes neighbours change places.
    cumulative = weights.cumsum(dim=-1)
    places = (cumulative <= draws.to(logits.device)[:, None] * cumulative[:, -1:]).sum(dim=-1)
    return torch.where(places < logits.shape[1], places, likeliest)  # a draw next to 1 may be rounded to it


def _least_of_nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """(rows, 1): the least probability among the fewest tokens that add up to ``top_p``."""

    def least(descending: torch.Tensor) -> torch.Tensor:
        count = (descending.cumsum(dim=-1) - descending < top_p).sum(dim=-1, keepdim=True)
        return descending.gather(1, count - 1)

    some = probabilities.topk(min(NUCLEUS, probabilities.shape[1]), dim=-1).values
    found = least(some)
    for row in (some.sum(dim=-1) < top_p).nonzero()[:, 0].tolist():  # flat: its nucleus is larger
        found[row] = least(probabilities[row : row + 1].sort(dim=-1, descending=True).values)[0]
    return found


def end_ids(model, tokenizer) -> frozenset[int]:
    """All tokens that end an answer: the tokenizer's EOS, and those that the folder's generation config names."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = list(named) if isinstance(named, (list, tuple)) else [named]
    eos = tokenizer.eos_token_id if tokenizer.eos_token else None
    return frozenset(id_ for id_ in [eos, *named] if id_ is not None)


def context_length(model) -> int | None:
    """Tokens that the model can read and write together, where it says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def longest_answer(model, ids: list[int], max_new_tokens: int) -> int:
    """Tokens that the answer to a prompt can have.

    Raises:
        UserError: the prompt is empty, or leaves nothing of the context to answer in; it is never cut silently.
    """
    if not ids:
        raise UserError("the prompt is empty: there is nothing to go on from")
    context = context_length(model)
    if context and len(ids) >= context:
        raise UserError(f"the prompt has {len(ids)} tokens, but the model reads at most {context}: shorten it")
    return min(max_new_tokens, context - len(ids)) if context else max_new_tokens


def _generator(seed: int, ids: list[int]) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {ids}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _lay_out(prompts: Sequence[list[int]], room: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Prompts padded on the left to the longest, with mask and positions for ``room`` more columns.

        prompts    [[5, 6, 7], [8]], room 1
        ids        [[5, 6, 7], [8, 8, 8]]
        mask       [[1, 1, 1, 1], [0, 0, 1, 1]]
        positions  [[0, 1, 2, 3], [0, 0, 0, 1]]

    The mask is None where there is no padding: attention then need not look into it.
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
    done: set[int],
    memory: Memory | None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[list[tuple[int, int]]]:
    """Yields (row, token) of each row that goes on, step by step; a row that has ended leaves the batch.

    Args:
        model: a causal model.
        prompts: token ids.
        ends: tokens that end a row; they are not yielded.
        settings: a row ends at ``max_new_tokens`` and at the end of the context as well.
        done: rows that the caller wants no more of; read after each step.
        memory: of a conversation whose next prompt ``prompts[0]`` is; tokens that it holds are not computed again.
        stopped: asked before each step, the first included; all rows end where it says yes.

    Raises:
        UserError: a prompt is empty or fills the context.
    """
    limits = [longest_answer(model, ids, settings.max_new_tokens) for ids in prompts]
    known = memory.begin(prompts[0]) if memory else 0
    memory = memory or Memory()
    cache = memory.cache if memory.cache is not None else DynamicCache(config=model.config)
    ids, mask, positions = (t if t is None else t.to(model.device) for t in _lay_out(prompts, max(limits)))
    ids, longest, draws = ids[:, known:], ids.shape[1], None
    if settings.temperature > 0:
        seed = random.SystemRandom().getrandbits(48) if settings.seed is None else settings.seed
        generators = [_generator(seed, ids) for ids in prompts]
    accepted = inspect.signature(model.forward).parameters
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
        memory.cache = cache  # last: there, it has what ids says
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


def stripped(pieces: Iterable[str]) -> Iterator[str]:
    """Yields the text without white space at its beginning and its end."""
    held, begun = "", False
    for piece in pieces:
        held = held + piece if begun else (held + piece).lstrip()
        if shown := held.rstrip():
            yield shown
            held, begun = held[len(shown) :], True


class StopWatch:
    """Tells which rows of a batch have just written STOP, without decoding every row at every step."""

    TAIL = 32  # tokens that are decoded: STOP has 16 characters, a token one of their bytes at least

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.may_end: dict[int, bool] = {}  # whether a token's text has the last character of STOP

    def sees(self, ids: list[int]) -> bool:
        """Whether the text of ``ids`` has STOP near its end, where its last token may have completed it."""
        last = ids[-1]
        if last not in self.may_end:
            self.may_end[last] = STOP[-1] in self.tokenizer.decode([last])
        return self.may_end[last] and STOP in self.tokenizer.decode(ids[-self.TAIL :], skip_special_tokens=True)
