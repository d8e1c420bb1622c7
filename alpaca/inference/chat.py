"""Ask a model: one instruction, or the turns of a conversation. The terminal and the page both ask through it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import chain

import torch

from alpaca.chat_template import asked_of, chat_ids, chat_template, saved_template, without_system
from alpaca.common.shapes import has_several_turns, user_message
from alpaca.inference.generate import Memory, Settings, Text, decode, end_ids, longest_answer, too_large
from alpaca.prompts import format_prompt, prompt_ids


def request_ids(tokenizer, template: str, records: Sequence[dict]) -> list[list[int]]:
    """Return the tokens with which a model is asked each record: those before the answer in training.

    Args:
        tokenizer: the model's.
        template: "alpaca", or "chat" for the tokenizer's own.
        records: with "instruction", "input" and, where these cannot hold the conversation, "messages". In Alpaca's
            template, earlier turns become examples before the question.

    Raises:
        UserError: see prompt_ids() and chat_ids().
    """
    if template == "chat":
        return [chat_ids(tokenizer, asked_of(record)) for record in records]
    ids = prompt_ids(tokenizer, [format_prompt(record["instruction"], record["input"]) for record in records])
    if several := [place for place, record in enumerate(records) if has_several_turns(record)]:
        templated = copy.copy(tokenizer)
        templated.chat_template = chat_template(tokenizer)
        for place in several:
            ids[place] = chat_ids(templated, without_system(asked_of(records[place])))
    return ids


def stream(
    model,
    tokenizer,
    ids: list[int],
    settings: Settings,
    memory: Memory | None = None,
    stopped: Callable[[], bool] = lambda: False,
    on_cut: Callable[[str], None] = lambda limit: None,
) -> Iterator[str]:
    """Yield the answer to a prompt piece by piece, without white space around it.

    It ends at a token of end_ids(), at STOP, at max_new_tokens, or at the end of the context.

    Closing the iterator stops the model.

    Args:
        model, tokenizer, ids, settings: the ids are the prompt's.
        memory: of the conversation that the prompt continues.
        stopped: called before each token, also where it shows no text; True ends the answer.
        on_cut: called with "max_new_tokens" or "context" if the answer reached that limit.

    Raises:
        UserError: the prompt is empty, fills the context, or does not fit the memory.
    """
    limit, ends, text = longest_answer(model, ids, settings.max_new_tokens), end_ids(model, tokenizer), Text(tokenizer)
    try:
        with closing(decode(model, [ids], ends, settings, (), memory, stopped)) as steps:
            for _, token in chain.from_iterable(steps):
                if piece := text.add(token):
                    yield piece
                if text.ended:
                    return
    except torch.OutOfMemoryError:
        raise too_large(ids) from None
    if piece := text.rest():
        yield piece
    if len(text.tokens) == limit:
        on_cut("context" if limit < settings.max_new_tokens else "max_new_tokens")


class Conversation:
    """Turns with a model. Where the prompts of two turns begin alike, the second reuses what the first computed.

    Alpaca's template asks each instruction alone, as in training; a chat template repeats the turns so far. By default
    it is the one with which the model was trained.
    """

    def __init__(self, model, tokenizer, settings: Settings, template: str | None = None):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.template = template or saved_template(tokenizer)
        self.memory = Memory()
        self.cut = ""  # "max_new_tokens" or "context" if the last answer reached that limit
        self.turns: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget the turns."""
        self.turns = []

    def ask(self, instruction: str, input: str = "", stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Yield the answer piece by piece; ``stopped`` is that of stream().

        An answer that the reader stops becomes a turn as far as it got; one that fails does not.
        """
        said, (ids,) = [], request_ids(self.tokenizer, self.template, [next_turn(self.turns, instruction, input)])
        self.cut = ""
        options = {"memory": self.memory, "stopped": stopped, "on_cut": lambda limit: setattr(self, "cut", limit)}
        try:
            with closing(stream(self.model, self.tokenizer, ids, self.settings, **options)) as pieces:
                for piece in pieces:
                    said.append(piece)
                    yield piece
        except Exception:  # not Ctrl-C, nor the end of an iterator that is closed
            said.clear()
            raise
        finally:
            if self.template == "chat" and said:
                answer = {"role": "assistant", "content": "".join(said)}
                self.turns = [*self.turns, user_message(instruction, input), answer]


def next_turn(turns: list[dict], instruction: str, input: str) -> dict:
    """Return a question that follows ``turns`` as a record for request_ids()."""
    asked = {"instruction": instruction, "input": input}
    return asked | {"messages": [*turns, user_message(instruction, input)]} if turns else asked
