"""The live demo: a page on this machine that asks a model, or two side by side. ``chat.py`` serves it.

Whoever can reach the page can also call what is behind it without a browser, so every bound is checked here and not in
the page. What a model writes is untrusted: its Markdown is rendered, its HTML and images stay text.
"""

from __future__ import annotations

import asyncio
import dataclasses
import html
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from alpaca import UserError
from alpaca.chat_template import saved_template
from alpaca.common.cli import free_port
from alpaca.common.shapes import user_message
from alpaca.inference.adapters import is_adapter
from alpaca.inference.answer_file import name_of
from alpaca.inference.chat import Conversation, next_turn, request_ids
from alpaca.inference.generate import Settings, context_length
from alpaca.inference.load import load
from alpaca.inference.web.line import MAX_WAITING, STREAMS, Line, Turn
from alpaca.inference.web.reports import FLAGGED, MAX_REASON_CHARS, NOTE, flag
from alpaca.inference.web.server import COPY, WORKER, check_exposure, gr, page_error, render_answer, render_status, run

MAX_CHARS = 8_000  # of an instruction, and of an input
MAX_PROMPT_TOKENS = 2_048  # training read 512; never more than half of what the model can read
MAX_SEED = 2**31 - 1
LIMITS = {"max_new_tokens": "the longest answer", "context": "the end of what the model can read"}
EXAMPLES = [
    ["Give three tips for sleeping better.", ""],
    ["Explain to a ten-year-old why the sky is blue.", ""],
    ["Write a Python function that tells whether a word is a palindrome.", ""],
    ["Rewrite this sentence so that it is polite.", "Send me the report now."],
    ["Sort these animals by their weight.", "cat, elephant, mouse, horse"],
]
HEADING = """<h1>{}</h1><p class="notice"><b>{}</b> was fine-tuned to follow instructions. It has had no safety training
and may be wrong, biased or harmful: check what it says before you use it. If it was trained on Alpaca data (CC BY-NC
4.0) or on LLaMA, their licenses allow research only, no commercial use. {}</p>"""
TITLE = "Ask an Alpaca model"
SAY = "() => ['" + render_status("{}") + "', {{__type__: 'update', interactive: {}}}]"
REMEMBERS = "remembers the conversation until you start a new one"
ALONE = "answers each instruction on its own and remembers nothing"


@dataclasses.dataclass
class Model:
    """A model under the name that the page shows."""

    name: str
    model: object
    tokenizer: object
    path: str = ""

    @property
    def remembers(self) -> bool:
        """Whether it was trained with a chat template, and so is asked with the earlier turns as well."""
        return saved_template(self.tokenizer) == "chat"

    @property
    def max_prompt_tokens(self) -> int:
        return min(MAX_PROMPT_TOKENS, (context_length(self.model) or 2 * MAX_PROMPT_TOKENS) // 2)


def check(
    models: list[Model], most: int, instruction, input, max_new_tokens, temperature, top_p, seed, turns: Sequence = ()
) -> Settings:
    """Check a request from a page or a program, and return its settings; without a seed they get one.

    Args:
        models: all of them must be able to read it.
        most: tokens that an answer may have.
        instruction, input, max_new_tokens, temperature, top_p, seed: of any type, as they came.
        turns: before, with each of the models (default: none).

    Raises:
        gr.Error: a text or a setting is out of bounds; the message names the bounds.
    """
    instruction, input = instruction or "", input or ""
    for name, text in (("instruction", instruction), ("input", input)):
        if not isinstance(text, str):
            raise page_error(f"The {name} must be text.")
        if len(text) > MAX_CHARS:
            raise page_error(f"The {name} has {len(text):,} characters; at most {MAX_CHARS:,} are read: shorten it.")
    if not instruction.strip():
        raise page_error("Type an instruction first.")
    if isinstance(seed, str):
        seed = int(seed) if seed.strip().isdecimal() and len(seed) < 20 else seed.strip() or None
    seed = secrets.randbelow(MAX_SEED) if seed is None else seed
    bounds = {"Longest answer": (max_new_tokens, 1, most), "Temperature": (temperature, 0, 2)}
    bounds |= {"Top p": (top_p, 0.01, 1), "Seed": (seed, 0, MAX_SEED)}
    for name, (value, low, high) in bounds.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:  # NaN fails too
            raise page_error(f"{name} must be a number from {low} to {high}.")
    settings = Settings(int(max_new_tokens), float(temperature), float(top_p), int(seed))
    for model, before in zip(models, turns or [[]] * len(models), strict=True):
        try:
            record = next_turn(before, instruction, input)
            (ids,) = request_ids(model.tokenizer, saved_template(model.tokenizer), [record])
        except UserError as e:
            raise page_error(str(e)) from None
        if len(ids) > model.max_prompt_tokens:
            what = "The conversation and this instruction" if before else "Instruction and input"
            raise page_error(
                f"{what} have {len(ids):,} tokens; {model.name} reads at most {model.max_prompt_tokens:,} here: "
                + ("start a new conversation." if before else "shorten them.")
            )
    return settings


async def answers(
    models: list[Model], conversations: list[Conversation], instruction: str, input: str, turn: Turn
) -> AsyncIterator[list[str]]:
    """Yield what each model has said so far, at most some 20 times a second, until all have ended, or ``turn.left``.

    Each model has its own thread, so that neither a long prompt nor the end of an answer holds up other pages."""
    loop, news = asyncio.get_running_loop(), asyncio.Queue()

    def tell(*item) -> None:
        try:
            loop.call_soon_threadsafe(news.put_nowait, item)
        except RuntimeError:  # the server has ended
            turn.left.set()

    def work(index: int) -> None:
        try:
            conversations[index].ask(instruction, input, lambda piece: tell(index, piece), turn.left.is_set)
            tell(index, None)
        except Exception as e:
            tell(index, e)

    turn.threads = [threading.Thread(target=work, args=(i,), name=WORKER, daemon=True) for i in range(len(models))]
    for thread in turn.threads:
        thread.start()
    texts, running = [""] * len(models), len(models)
    while running:
        batch = [await news.get()]
        while not news.empty():
            batch.append(news.get_nowait())
        for index, piece in batch:
            if isinstance(piece, UserError):
                raise page_error(str(piece))
            if isinstance(piece, Exception):
                logging.error("%s failed", models[index].name, exc_info=piece)
                raise page_error(f"{models[index].name} failed; the terminal of the server says why.")
            if piece is None:
                running -= 1
            else:
                texts[index] += piece
        yield list(texts)
        if running:
            await asyncio.sleep(0.05)


class Demo:
    """The page for one model, or for two side by side; an answer has at most ``defaults.max_new_tokens``.

    What the models were asked and have said is an exchange: a dict that the page holds for flag() and for the next
    question. Its "asked" has for each model the conversation up to the question, empty for one that remembers nothing.
    """

    def __init__(self, models: list[Model], defaults: Settings):
        self.models, self.defaults = models, defaults
        self.names = [model.name for model in models]
        if len(models) == 2:
            self.names = [f"{letter}: {name}" for letter, name in zip("AB", self.names, strict=True)]
        self.remembers = any(model.remembers for model in models)
        self.line = Line()
        self.latest: dict[str | None, dict] = {}  # login → its last exchange
        with gr.Blocks(title=TITLE, analytics_enabled=False) as self.page:
            self._lay_out()
            self._connect()
        self.page.queue(max_size=MAX_WAITING, api_open=False, default_concurrency_limit=8)

    def _lay_out(self) -> None:
        names = html.escape(" and ".join(model.name for model in self.models))
        said = [REMEMBERS if model.remembers else ALONE for model in self.models]
        memory = f"It {said[0]}." if len(set(said)) == 1 else f"A {said[0]}; B {said[1]}."
        gr.HTML(HEADING.format(TITLE, names, memory), js_on_load=None)
        for lay_out in [self._lay_out_answers, self._lay_out_fields][:: 1 if self.remembers else -1]:
            lay_out()
        labels = [" ".join(pair).strip() for pair in EXAMPLES]
        gr.Examples(EXAMPLES, self.fields, example_labels=labels, cache_examples=False, api_visibility="private")
        with gr.Accordion("Sampling", open=False):
            self._lay_out_sampling()
        with gr.Accordion("Report a harmful answer", open=False):
            self.which = gr.Radio(
                self.names, value=self.names[0], label="Which answer", type="index", visible=len(self.names) > 1
            )
            self.reason = gr.Textbox(label="What is wrong with it? (optional)", max_length=MAX_REASON_CHARS, lines=1)
            self.report = gr.Button("Report", size="sm")
            self.reported = gr.HTML(render_status(NOTE), js_on_load=None)
        self.exchange = gr.State(None)

    def _lay_out_fields(self) -> None:
        limits = {"max_length": MAX_CHARS, "max_lines": 10}
        self.instruction = gr.Textbox(label="Instruction", placeholder="What should be done?", **limits)
        self.input = gr.Textbox(label="Input (optional)", placeholder="The text it is about", **limits)
        self.fields = [self.instruction, self.input]
        with gr.Row():
            self.ask = gr.Button("Answer", variant="primary", size="md", min_width=80)
            self.stop = gr.Button("Stop", variant="stop", interactive=False, size="md", min_width=80)
            self.again = gr.Button("Try again", size="md", min_width=80)
            self.new = gr.Button("New conversation", size="md", min_width=80, visible=self.remembers)
        self.status = gr.HTML(render_status("Enter asks, Shift+Enter makes a new line."), js_on_load=None)

    def _lay_out_answers(self) -> None:
        self.shown, self.texts = [], []
        with gr.Row():
            for name, model in zip(self.names, self.models, strict=True):
                with gr.Column(min_width=280):
                    kind = "talk" if model.remembers else None
                    self.shown.append(gr.HTML(render_answer(name, ""), elem_classes=kind, js_on_load=None))
                    self.texts.append(gr.Textbox(visible=False))
                    copy = gr.Button(f"Copy {name[0]}" if self.models[1:] else "Copy", size="sm", elem_classes="copy")
                    copy.click(None, self.texts[-1], None, js=COPY, api_visibility="private")

    def _lay_out_sampling(self) -> None:
        longest, seed = self.defaults.max_new_tokens, self.defaults.seed
        most, temperature = min(model.max_prompt_tokens for model in self.models), self.defaults.temperature
        with gr.Row():
            self.settings = [
                gr.Slider(1, longest, longest, step=1, label="Longest (tokens)", min_width=240),
                gr.Slider(0, 2, temperature, step=0.05, label="Temperature", min_width=240),
                gr.Slider(0.01, 1, self.defaults.top_p, step=0.01, label="Top p", min_width=240),
                # not a Number: an empty one turns into 0 as soon as it is shown
                gr.Textbox("" if seed is None else str(seed), label="Seed", placeholder="new each time", min_width=240),
            ]
        gr.HTML(
            f'<p class="notice">An instruction and an input may have {MAX_CHARS:,} characters each and {most:,} tokens '
            "together. Temperature 0 takes the likeliest token each time. The same seed gives the same answer; "
            f"<i>Try again</i> takes a new one. {STREAMS} answers are written at once; further ones wait in line.</p>",
            js_on_load=None,
        )

    def _connect(self) -> None:
        """Say what happens on a click: ask, ask again, stop, start a new conversation, report."""
        outputs = [*self.shown, *self.texts, self.exchange, self.status, self.stop, self.reported]
        outputs += self.fields if self.remembers else []
        # Line has them wait, and the status says so: not Gradio's queue.
        options = {"outputs": outputs, "show_progress": "hidden", "concurrency_limit": None, "concurrency_id": "answer"}
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        triggers = [self.ask.click, self.instruction.submit, self.input.submit]
        # The browser says at once that it asks. It runs the listeners of a click one after another, but does not wait
        # for what is in a then(). Stop is also for what waits.
        said = {"outputs": [self.status, self.stop], **quiet}
        inputs = [self.exchange, *self.fields, *self.settings]
        pressed = gr.on(triggers, None, js=SAY.format("Asking …", "true"), **said)
        asked = pressed.then(self.answer, inputs, api_name="answer", **options)
        pressed = self.again.click(None, js=SAY.format("Asking …", "true"), **said)
        asked_again = pressed.then(
            self.answer_again, [self.exchange, *self.settings], api_visibility="private", **options
        )
        for event in (asked, asked_again):
            event.failure(None, js="() => ({__type__: 'update', interactive: false})", outputs=self.stop, **quiet)
        # Both write into the same fields: the later one ends the other.
        gr.on(triggers, None, cancels=asked_again)
        self.again.click(None, cancels=asked)
        self.stop.click(None, cancels=[asked, asked_again])
        stopped = [*self.shown, *self.texts, *said["outputs"]]
        self.stop.click(self._stopped, self.exchange, stopped, queue=False, **quiet)
        names, texts = [render_answer(name, "") for name in self.names], [""] * len(self.names)
        empty = *names, *texts, None, render_status(""), gr.Button(interactive=False, render=False), render_status(NOTE)
        self.new.click(None, cancels=[asked, asked_again])
        self.new.click(lambda: empty, None, outputs[: len(empty)], queue=False, **quiet)
        self.report.click(flag, [self.exchange, self.which, self.reason], self.reported, **quiet)

    def _login_of(self, request: gr.Request) -> str | None:
        """Return what marks one login by password; None on a page without a password, which only this machine sees."""
        names = (f"access-token{kind}-{self.page.app.cookie_id}" for kind in ("", "-unsecure"))
        return next(filter(None, map(request.cookies.get, names)), None) if self.page.auth else None

    def _check_latest(self, login: str | None, exchange: dict) -> None:
        if login and self.latest.get(login) is not exchange:
            raise page_error("You have asked something else in another window: one at a time.")

    def _refused(self) -> tuple:
        """Return what all outputs of answer() become when there is none: they stay, and the status says it."""
        kept = [gr.skip()] * (2 * len(self.names) + 1)
        status = render_status("Not answered."), gr.Button(interactive=False)
        return *kept, *status, *[gr.skip()] * (1 + len(self.fields) * self.remembers)

    def _show(self, exchange: dict, status: str, empty_fields: bool = False):
        """Return what all outputs of answer() become."""
        running, said = exchange["running"], zip(self.names, exchange["answers"], exchange["asked"], strict=True)
        shown = [render_answer(name, text or "…" * running, asked) for name, text, asked in said]
        stop, fields = gr.Button(interactive=running), ["" if empty_fields else gr.skip() for _ in self.fields]
        shown += [*exchange["answers"], exchange, render_status(status), stop, render_status(NOTE)]
        return *shown, *fields * self.remembers

    def _stopped(self, exchange: dict | None) -> tuple:
        """Return the answers as far as they are kept: a model may have written more than the page had shown."""
        count = 2 * len(self.names)
        kept = self._show(exchange | {"running": False}, "")[:count] if exchange else [gr.skip()] * count
        return *kept, render_status("Stopped."), gr.Button(interactive=False)

    async def answer(self, request: gr.Request, exchange, instruction, input, *given):
        """Ask all models, after the turns that the page shows, and yield what it shows meanwhile."""
        turns = []
        for asked, text in zip(exchange["asked"], exchange["answers"], strict=True) if exchange else ():
            turns.append([*asked, {"role": "assistant", "content": text}] if asked and text else asked[:-1])
        async for shown in self._answer(request, turns, instruction, input, given, True):
            yield shown

    async def answer_again(self, request: gr.Request, exchange, *given):
        """Ask the last instruction again, with a new seed."""
        if not exchange:
            yield self._refused()
            raise page_error("There is no answer yet.")
        turns, texts = [asked[:-1] for asked in exchange["asked"]], (exchange["instruction"], exchange["input"])
        async for shown in self._answer(request, turns, *texts, [*given[:-1], None]):
            yield shown

    async def _answer(self, request: gr.Request, turns, instruction, input, given, empty_fields=False):
        try:
            settings = check(self.models, self.defaults.max_new_tokens, instruction, input, *given, turns)
        except gr.Error:
            yield self._refused()
            raise
        exchange = {"instruction": instruction, "input": input or "", "models": [model.name for model in self.models]}
        exchange |= {"paths": [model.path for model in self.models], "settings": dataclasses.asdict(settings)}
        turns = turns or [[] for _ in self.models]
        question, pairs = user_message(instruction, exchange["input"]), zip(self.models, turns, strict=True)
        exchange["asked"] = [[*before, question] if model.remembers else [] for model, before in pairs]
        exchange |= {"answers": [""] * len(self.models), "running": True, "flagged": []}
        conversations = [Conversation(model.model, model.tokenizer, settings) for model in self.models]
        for conversation, before in zip(conversations, turns, strict=True):
            conversation.turns = before
        login, turn = self._login_of(request), Turn(request.client.host)
        self.latest[login] = exchange
        try:
            async for place in (places := self.line.wait(turn)):
                yield self._show(exchange, f"Waiting: number {place} in line.", empty_fields)
                self._check_latest(login, exchange)
            started = time.monotonic()
            yield self._show(exchange, "Answering …", empty_fields)
            async for texts in answers(self.models, conversations, instruction, exchange["input"], turn):
                exchange["answers"] = texts
                self._check_latest(login, exchange)
                yield self._show(exchange, "Answering …")
        except gr.Error:
            exchange["running"] = False
            yield self._show(exchange, "Not answered to the end." if any(exchange["answers"]) else "Not answered.")
            raise
        finally:  # also if it is stopped
            await places.aclose()
            turn.left.set()
            exchange["running"] = False
            if self.latest.get(login) is exchange:
                del self.latest[login]
        notes = [f"Answered in {time.monotonic() - started:.1f} s, seed {settings.seed}."]
        for name, conversation in zip(self.names, conversations, strict=True):
            if conversation.cut:
                cut_off = "Cut" if len(self.models) == 1 else f"{name[0]} is cut"
                notes.append(f"{cut_off} off at {LIMITS[conversation.cut]}.")
        yield self._show(exchange, " ".join(notes))


def serve(
    model_path: str,
    compare_path: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    base_path: str | None = None,
    **defaults,
) -> None:
    """Load the models and serve the page until Ctrl-C or SIGTERM.

    Args:
        model_path, compare_path: folders; the second model answers the same prompts beside the first.
        host, port, auth: see check_exposure() and free_port().
        device, dtype, base_path: see load().
        defaults: fields of Settings; max_new_tokens is also the most that a visitor can ask for.

    Raises:
        UserError: an argument is wrong, the port is taken, or a model cannot be loaded.
    """
    login, settings = check_exposure(host, auth), Settings(**defaults)
    if settings.temperature > 2 or settings.top_p < 0.01 or not 0 <= (settings.seed or 0) <= MAX_SEED:
        raise UserError(
            f"temperature must be from 0 to 2, top_p from 0.01 to 1, and seed from 0 to {MAX_SEED} for the page"
        )
    port = free_port(port)
    models = []
    for path in filter(None, [model_path, compare_path]):
        base = base_path if is_adapter(path) else None
        models.append(Model(name_of(path), *load(path, device, dtype, base), str(path)))
    names = " and ".join(model.name for model in models)
    notes = [f"reports of harmful answers go to {Path(FLAGGED).resolve()}"]
    run(Demo(models, settings).page, host, port, login, names, notes)
