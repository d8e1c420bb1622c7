"""Ask a model: one instruction, or the turns of a conversation. The terminal and the page both ask through it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from alpaca.chat_template import asked_of, chat_ids, chat_template, saved_template, without_system
from alpaca.common.shapes import has_several_turns, user_message
from alpaca.inference.generate import Memory, Settings, answer_batch
from alpaca.prompts import format_prompt, prompt_ids


def request_ids(tokenizer, template: str, records: Sequence[dict]) -> list[list[int]]:
    """Return the tokens with which a model is asked each record: those before the answer in training.

    Args:
        template: "alpaca", or "chat" for the tokenizer's own.
        records: with "instruction", "input" and, where these cannot hold the conversation, "messages". In Alpaca's
            template, earlier turns become examples before the question.
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

    def ask(
        self,
        instruction: str,
        input: str = "",
        say: Callable[[str], object] = lambda piece: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> str:
        """Return the answer; ``say`` is called with each piece of it as it comes, ``stopped`` as in answer_batch().

        An answer that is stopped, by that or by Ctrl-C, becomes a turn as far as it got; one that fails does not.
        """
        said, (ids,) = [], request_ids(self.tokenizer, self.template, [next_turn(self.turns, instruction, input)])
        self.cut = ""

        def tell(pieces: list[str]) -> None:
            if pieces[0]:
                said.append(pieces[0])
                say(pieces[0])

        try:
            (answer,) = answer_batch(self.model, self.tokenizer, [ids], self.settings, tell, stopped, self.memory)
            tell([answer.rest()])  # of one that was stopped
        except Exception:  # not Ctrl-C
            said.clear()
            raise
        finally:
            if self.template == "chat" and said:
                turn = {"role": "assistant", "content": "".join(said)}
                self.turns = [*self.turns, user_message(instruction, input), turn]
        if answer.cut:
            self.cut = "context" if answer.limit < self.settings.max_new_tokens else "max_new_tokens"
        return answer.text


def next_turn(turns: list[dict], instruction: str, input: str) -> dict:
    """Return a question that follows ``turns`` as a record for request_ids()."""
    asked = {"instruction": instruction, "input": input}
    return asked | {"messages": [*turns, user_message(instruction, input)]} if turns else asked
