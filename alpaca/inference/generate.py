"""Generate answers with transformers' generate(), one prompt or a batch of them, and show their text as it comes.

A row's tokens depend on the model, its prompt and the settings, not on the rest of the batch: each row draws from its
own generator, seeded from the seed and the prompt. Rounding remains: matrix products of 1 row and of 32 rows add in
different orders (1e-7 of a logit in float32, 1e-2 in bfloat16), so where two tokens are nearly as likely, a row alone
and in a batch may differ.
"""

from __future__ import annotations

import hashlib
import inspect
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch.nn import functional
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from alpaca import UserError
from alpaca.chat_template import end_token

STOP = "### Instruction:"  # a model that missed its EOS continues with the next example of its training data
NUCLEUS = 1024  # the likeliest tokens, searched first: sorting 49,152 takes 27 ms, choosing these 0.3 ms


@dataclass(frozen=True)
class Settings:
    """How answers are sampled; UserError if a value is out of range.

    Args:
        max_new_tokens: the longest answer, EOS included.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_p: sample from the fewest tokens whose probabilities add up to it (nucleus: Holtzman et al., 2020,
            arXiv:1904.09751).
        seed: the same seed gives the same prompt the same answer; None draws one.
    """

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int | None = None

    def __post_init__(self):
        if self.max_new_tokens < 1 or not self.temperature >= 0 or not 0 < self.top_p <= 1:  # NaN fails too
            raise UserError("max_new_tokens must be at least 1, temperature at least 0, top_p above 0 and at most 1")


@dataclass
class Memory:
    """What the model has read of a conversation: the tokens, with their keys and values."""

    ids: list[int] = field(default_factory=list)
    cache: Cache | None = None

    def take(self, ids: list[int]):
        """Take out the cache of the beginning that it shares with ``ids``, the last of them left out; None if empty.

        It stays out until new tokens are kept: what Ctrl-C interrupts before that has lost it, and reads all again.
        """
        cache, self.cache = self.cache, None
        same = next((i for i, (a, b) in enumerate(zip(self.ids, ids, strict=False)) if a != b), len(self.ids))
        same = min(same, len(ids) - 1)  # the last one's logits are needed for the next token
        # Only such layers can go back: a sliding window has dropped what a shorter prompt needs, a state has no parts.
        if not same or not cache or any(type(layer) is not DynamicLayer for layer in cache.layers):
            return None
        if same < len(self.ids):
            cache.crop(same - len(self.ids))
        return cache


def choose(logits: torch.Tensor, temperature: float, top_p: float, draws: torch.Tensor | None = None) -> torch.Tensor:
    """Return the next token of each row: (rows,), int64; raise UserError if a row holds NaN.

    Args:
        logits: (rows, vocabulary), float32.
        temperature, top_p: as in Settings.
        draws: (rows,), float32, uniform in [0, 1); unused when ``temperature`` is 0.
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

    A prompt that is empty, or leaves no room in the context, raises UserError: it is never cut silently.
    """
    if not ids:
        raise UserError("the prompt is empty: there is nothing to answer")
    context = context_length(model)
    if context and len(ids) >= context:
        raise UserError(f"the prompt has {len(ids)} tokens, but the model reads at most {context}: shorten it")
    return min(max_new_tokens, context - len(ids)) if context else max_new_tokens


class Answer:
    """A row's answer as its tokens come: at most ``limit``, before one of ``ends``.

    Its text has no white space around it, and ends at STOP.
    """

    def __init__(self, tokenizer, ends: frozenset[int], limit: int):
        self.tokenizer, self.ends, self.limit = tokenizer, ends, limit
        self.tokens: list[int] = []
        self.text = ""
        self.ended = self.cut = False  # cut: at the limit

    def add(self, token: int) -> str:
        """Take a token, and return the text to show now: without half a character, and what may begin STOP."""
        if not self.ended and token not in self.ends:
            self.tokens.append(token)
            self.cut = len(self.tokens) == self.limit
        self.ended = self.ended or token in self.ends or self.cut
        return self.rest(more=not self.ended)

    def rest(self, more: bool = False) -> str:
        """Return the text that has not been shown; ``more``: tokens may follow.

        All tokens are decoded each time: one by one, or line by line as in transformers' TextStreamer, a LLaMA
        tokenizer drops a space at each beginning, and so the first of every indentation.
        """
        text, stop, _ = self.tokenizer.decode(self.tokens, skip_special_tokens=True).lstrip().partition(STOP)
        if stop:
            self.ended, self.cut = True, False
        elif more:
            text = text.rstrip("\ufffd")  # it marks a character that lacks some of its bytes
            begun = next((n for n in range(min(len(STOP), len(text)), 0, -1) if STOP.startswith(text[-n:])), 0)
            text = text[: len(text) - begun]
        new = text.rstrip()[len(self.text) :]
        self.text += new
        return new


class Draw(LogitsProcessor):
    """Leave each row the token that it draws from its own numbers, which depend on the seed and its prompt alone."""

    def __init__(self, settings: Settings, prompts: Sequence[list[int]], longest: int):
        self.settings, self.width, draws = settings, max(map(len, prompts)), []
        seed = random.SystemRandom().getrandbits(48) if settings.seed is None else settings.seed
        for ids in prompts:
            digest = hashlib.sha256(f"{seed} {ids}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            draws.append(torch.rand(longest, generator=generator))
        self.draws = torch.stack(draws)  # (rows, longest), the same whatever longest is

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        draws = self.draws[:, input_ids.shape[1] - self.width]
        chosen = choose(scores, self.settings.temperature, self.settings.top_p, draws)
        return scores.scatter(1, chosen[:, None], torch.inf)


class Watch(StoppingCriteria):
    """Give each row's tokens to its answer, and end generate() when a row has ended: it leaves, the others go on."""

    def __init__(self, answers: list[Answer], on_step: Callable[[list[str]], object], stopped: Callable[[], bool]):
        self.answers, self.on_step, self.stopped, self.ended = answers, on_step, stopped, False

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        if not self.ended:  # on MPS, generate() takes one step more, and forgets it (5.23)
            pairs = zip(self.answers, input_ids[:, -1].tolist(), strict=True)
            self.on_step([answer.add(token) for answer, token in pairs])
            self.ended = any(answer.ended for answer in self.answers) or self.stopped()
        return torch.full((len(self.answers),), self.ended, device=input_ids.device)


def left_padded(prompts: Sequence[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts, padded on the left, and their attention mask, both int64 (rows, longest)."""
    width = max(map(len, prompts))
    ids = torch.tensor([[ids[0]] * (width - len(ids)) + ids for ids in prompts], device=device)
    return ids, torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)


def greedily(model, ids: torch.Tensor, mask: torch.Tensor, longest: int, **more):
    """Return what generate() makes of padded prompts, taking the likeliest token each time to the last of ``longest``.

    What the model's generation_config.json asks for, such as a repetition penalty, counts for nothing.
    """
    given = dict.fromkeys(model.generation_config.to_diff_dict())
    given |= {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True}
    return model.generate(input_ids=ids, attention_mask=mask, **given | {"max_length": ids.shape[1] + longest} | more)


@torch.inference_mode()
def _answer(model, tokenizer, prompts, settings: Settings, on_step, stopped, memory: Memory | None) -> list[Answer]:
    """Answer prompts as answer_batch() does, if they fit the memory."""
    ends = end_ids(model, tokenizer)
    answers = [Answer(tokenizer, ends, longest_answer(model, ids, settings.max_new_tokens)) for ids in prompts]
    draw, running = Draw(settings, prompts, max(answer.limit for answer in answers)), answers
    (ids, mask), cache = left_padded(prompts, model.device), memory.take(prompts[0]) if memory else None
    goes_on = "past_key_values" in inspect.signature(model.forward).parameters  # Mamba begins again from the text
    while running and not stopped():
        longest = max(answer.limit - len(answer.tokens) for answer in running)
        steps = {"logits_processor": LogitsProcessorList([draw]), "past_key_values": cache}
        steps |= {"stopping_criteria": StoppingCriteriaList([Watch(running, on_step, stopped)])}
        output = greedily(model, ids, mask, longest, return_dict_in_generate=True, **steps)
        ids, cache = output.sequences, output.past_key_values
        if not goes_on or type(cache) is not DynamicCache:  # MiniMax's own kind cannot lose a row
            cache = None
        if memory:
            memory.ids, memory.cache = ids[0, :-1].tolist(), cache
        mask = functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        stay = [place for place, answer in enumerate(running) if not answer.ended]
        if 0 < len(stay) < len(running):
            kept = torch.tensor(stay, device=model.device)
            ids, mask, draw.draws = ids[kept], mask[kept], draw.draws[stay]
            if cache:
                cache.reorder_cache(kept)
        running = [running[place] for place in stay]
    return answers


def answer_batch(
    model,
    tokenizer,
    prompts: Sequence[list[int]],
    settings: Settings,
    on_step: Callable[[list[str]], object] = lambda pieces: None,
    stopped: Callable[[], bool] = lambda: False,
    memory: Memory | None = None,
) -> list[Answer]:
    """Answer prompts, all at once; a batch that does not fit the memory is halved, one prompt that does not is refused.

    An answer ends at a token of end_ids(), at STOP, at max_new_tokens, or at the end of the context. A prompt without
    room in the context, and a model that computes NaN, raise UserError.

    Args:
        prompts: token ids.
        on_step: called after each step with the text to show now of each row that was still running.
        stopped: called before each token; True ends all answers where they are.
        memory: of the conversation that the only prompt continues; what it holds is not computed again.
    """
    try:
        return _answer(model, tokenizer, prompts, settings, on_step, stopped, memory)
    except torch.OutOfMemoryError:
        if len(prompts) == 1:
            what = f"a prompt of {len(prompts[0])} tokens and its answer do not fit the memory"
            raise UserError(f"{what}: lower max_new_tokens, or use dtype bfloat16 or device cpu") from None
    half = len(prompts) // 2  # outside the handler, which keeps the tensors of the failed call alive
    parts = prompts[:half], prompts[half:]
    return [answer for part in parts for answer in answer_batch(model, tokenizer, part, settings, on_step, stopped)]


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
