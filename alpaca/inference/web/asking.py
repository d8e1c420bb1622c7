"""Asking models for the page: what may be asked of them, and the threads in which they answer."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable

from alpaca import UserError
from alpaca.chat_template import saved_template
from alpaca.inference.chat import Conversation, next_turn, request_ids
from alpaca.inference.generate import Settings, context_length
from alpaca.inference.web.server import WORKER, page_error

MAX_PROMPT_TOKENS = 2_048  # training read 512; never more than half of what the model can read
MAX_SEED = 2**31 - 1
STREAMS = 2  # answers of a model at once; of those that wait, the one that asked first is next


@dataclasses.dataclass
class Model:
    """A model under the name that the page shows."""

    name: str
    model: object
    tokenizer: object
    path: str = ""
    streams: threading.Semaphore = dataclasses.field(default_factory=lambda: threading.Semaphore(STREAMS))

    @property
    def remembers(self) -> bool:
        """Whether it was trained with a chat template, and so is asked with the earlier turns as well."""
        return saved_template(self.tokenizer) == "chat"


def check(models: list[Model], turns: list[list[dict]], instruction: str, input: str, seed: str, *sliders) -> Settings:
    """Return the settings of a request from a page or a program; without a seed they get one.

    A text that is out of bounds, for one of the models after its turns, is a gr.Error. ``sliders`` are max_new_tokens,
    temperature and top_p: Gradio has kept them within their bounds.
    """
    if not instruction.strip():
        raise page_error("Type an instruction first.")
    if seed and not (seed.isdecimal() and len(seed) < 20 and int(seed) <= MAX_SEED):
        raise page_error(f"Seed must be a number from 0 to {MAX_SEED}.")
    try:
        settings = Settings(*sliders, seed=int(seed or secrets.randbelow(MAX_SEED)))
        for model, before in zip(models, turns, strict=True):
            record = next_turn(before, instruction, input)
            (ids,) = request_ids(model.tokenizer, saved_template(model.tokenizer), [record])
            most = min(MAX_PROMPT_TOKENS, (context_length(model.model) or 2 * MAX_PROMPT_TOKENS) // 2)
            if len(ids) > most:
                cure = "start a new conversation." if before else "shorten it."
                raise UserError(f"This has {len(ids):,} tokens; {model.name} reads at most {most:,} here: {cure}")
    except UserError as e:
        raise page_error(str(e)) from None
    return settings


async def answers(
    models: list[Model],
    turns: list[list[dict]],
    asked: tuple[str, str],
    settings: Settings,
    stopped: Callable[[], bool],
) -> AsyncIterator[list[tuple[str, str]]]:
    """Yield each model's answer so far and the limit that cut it off, if any: what is new, at most 20 times a second.

    Yield again after a second without news: then Gradio sees whether the visitor has left. Each model has its own
    thread, so that none holds up other pages. It keeps its stream until the model has ended, at the next token once
    ``stopped()``: for Gradio a stopped answer has ended, while the model may still be reading the prompt. A model that
    fails is a gr.Error.
    """
    conversations = [Conversation(model.model, model.tokenizer, settings) for model in models]
    pieces, failures = [[] for _ in models], []

    def work(index: int) -> None:
        try:
            conversations[index].turns = turns[index]
            with models[index].streams:
                if not stopped():
                    conversations[index].ask(*asked, pieces[index].append, stopped)
        except UserError as e:
            failures.append(str(e))
        except Exception:
            logging.exception("%s failed", models[index].name)
            failures.append(f"{models[index].name} failed; the terminal of the server says why.")

    threads = [threading.Thread(target=work, args=(i,), name=WORKER, daemon=True) for i in range(len(models))]
    for thread in threads:
        thread.start()
    running, shown, since = True, None, 0.0
    while running:
        await asyncio.sleep(0.05)
        running = any(thread.is_alive() for thread in threads)
        if failures:
            raise page_error(failures[0])
        said = [("".join(each), conversation.cut) for each, conversation in zip(pieces, conversations, strict=True)]
        if said != shown or time.monotonic() > since + 1:
            shown, since = said, time.monotonic()
            yield said
