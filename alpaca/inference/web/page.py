"""The live demo: a page on this machine that asks a model, or two side by side. ``chat.py`` serves it.

Whoever can reach the page can also call what is behind it without a browser, so every bound is checked here and not in
the page. What a model writes is untrusted: its Markdown is rendered, its HTML and images stay text.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from pathlib import Path

from alpaca.common.cli import free_port
from alpaca.common.records import json_text
from alpaca.common.shapes import user_message
from alpaca.common.text import public_name, utc_now
from alpaca.inference.adapters import is_adapter
from alpaca.inference.generate import Settings
from alpaca.inference.load import load
from alpaca.inference.web.asking import STREAMS, Model, answers, check
from alpaca.inference.web.server import check_exposure, gr, page_error, render, render_answer, render_status, run

FLAGGED = "flagged.jsonl"  # reports of harmful answers, on the machine that serves the page
MAX_OF_LOGIN = 1  # requests of one login that wait or are answered: a stream is left to the others
MAX_OF_ADDRESS = 20  # the same of one address, behind which there may be a class
LIMITS = {"max_new_tokens": "the longest answer", "context": "the end of what the model can read"}
EXAMPLES = [
    ["Give three tips for sleeping better.", ""],
    ["Write a Python function that tells whether a word is a palindrome.", ""],
    ["Rewrite this sentence so that it is polite.", "Send me the report now."],
    ["Sort these animals by their weight.", "cat, elephant, mouse, horse"],
]
TITLE = "Ask an Alpaca model"
COPY = (Path(__file__).parent / "templates" / "copy.js").read_text()
# The browser says at once that it asks: new values of the status and of the button Stop.
SAY = "() => ['" + render_status("{}") + "', {{__type__: 'update', interactive: {}}}]"


class Demo:
    """The page for one model, or for two side by side; an answer has at most ``defaults.max_new_tokens``.

    What the models were asked and have said is an exchange: for each model the record that a report of it saves. The
    server holds it for flag() and for the next question.
    """

    def __init__(self, models: list[Model], defaults: Settings):
        self.models, self.defaults = models, defaults
        self.names = [model.name for model in models]
        if len(models) == 2:
            self.names = [f"{letter}: {name}" for letter, name in zip("AB", self.names, strict=True)]
        self.remembers = any(model.remembers for model in models)
        self.pending: list[tuple[str, str | None]] = []  # address and login of each request that waits or is answered
        with gr.Blocks(title=TITLE, analytics_enabled=False) as self.page:
            self._lay_out()
            self._connect()
        self.page.queue(max_size=MAX_OF_ADDRESS, api_open=False, default_concurrency_limit=8)

    def _lay_out(self) -> None:
        gr.HTML(render("heading.html", title=TITLE, models=self.models), js_on_load=None)
        for lay_out in [self._lay_out_answers, self._lay_out_fields][:: 1 if self.remembers else -1]:
            lay_out()
        labels = [" ".join(pair).strip() for pair in EXAMPLES]
        gr.Examples(EXAMPLES, self.fields, example_labels=labels, cache_examples=False, api_visibility="private")
        with gr.Accordion("Sampling", open=False):
            self._lay_out_sampling()
        with gr.Accordion("Report a harmful answer", open=False):
            note = f"A report adds question, answers and settings to {FLAGGED} on the server and nowhere else."
            gr.HTML(f'<p class="notice">{note}</p>', js_on_load=None)
            self.reason = gr.Textbox(label="What is wrong with it? (optional)", max_length=500, lines=1)
            self.report = gr.Button("Report", size="sm")
        self.exchange = gr.State(None)

    def _lay_out_fields(self) -> None:
        limits = {"max_length": 8_000, "max_lines": 10}  # of what is typed; asking.check() counts tokens
        self.instruction = gr.Textbox(label="Instruction", placeholder="What should be done?", **limits)
        self.input = gr.Textbox(label="Input (optional)", placeholder="The text it is about", **limits)
        self.fields = [self.instruction, self.input]
        with gr.Row():
            self.ask = gr.Button("Answer", variant="primary", size="md", min_width=80)
            self.stop = gr.Button("Stop", variant="stop", interactive=False, size="md", min_width=80)
            self.new = gr.Button("New conversation", size="md", min_width=80, visible=self.remembers)
        self.status = gr.HTML(render_status("Enter asks, Shift+Enter makes a new line."), js_on_load=None)

    def _lay_out_answers(self) -> None:
        self.shown = []
        with gr.Row():
            for name, model in zip(self.names, self.models, strict=True):
                with gr.Column(min_width=280):
                    kind = "talk" if model.remembers else None
                    self.shown.append(gr.HTML(render_answer(name, ""), elem_classes=kind, js_on_load=None))
                    copy = gr.Button(f"Copy {name[0]}" if self.models[1:] else "Copy", size="sm", elem_classes="copy")
                    copy.click(None, self.shown[-1], None, js=COPY, api_visibility="private")

    def _lay_out_sampling(self) -> None:
        given = self.defaults
        longest, heat, seed = given.max_new_tokens, given.temperature, "" if given.seed is None else str(given.seed)
        with gr.Row():
            self.settings = [
                gr.Slider(1, longest, longest, step=1, precision=0, label="Longest (tokens)", min_width=240),
                gr.Slider(0, max(2, heat), heat, step=0.05, label="Temperature", min_width=240),
                gr.Slider(min(0.01, given.top_p), 1, given.top_p, step=0.01, label="Top p", min_width=240),
                # not a Number: an empty one turns into 0 as soon as it is shown
                gr.Textbox(seed, label="Seed", placeholder="new each time", min_width=240),
            ]
        gr.HTML(render("sampling.html", streams=STREAMS), js_on_load=None)

    def _connect(self) -> None:
        """Say what happens on a click: ask, stop, start a new conversation, report."""
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        triggers = [self.ask.click, self.instruction.submit, self.input.submit]
        inputs, outputs = [self.exchange, *self.fields, *self.settings], [*self.shown, self.exchange, self.status]
        said = {"outputs": [self.status, self.stop], **quiet}
        pressed = gr.on(triggers, None, js=SAY.format("Asking …", "true"), **said)
        # The browser does not wait for what is in a then(). The models have their own line: not Gradio's queue.
        options = {"api_name": "answer", "show_progress": "hidden", "concurrency_limit": None}
        asked = pressed.then(self.answer, inputs, [*outputs, *self.fields], **options)
        # a refusal, an error or a press on Stop; the front end (6.31) runs then() after an answer and Stop alone
        asked.failure(None, js=SAY.format("Stopped.", "false"), **said)
        asked.then(None, js="() => ({__type__: 'update', interactive: false})", outputs=self.stop, **quiet)
        gr.on([self.stop.click, self.new.click], None, cancels=asked)
        empty = *(render_answer(name, "") for name in self.names), None, render_status("")
        self.new.click(lambda: empty, None, outputs, queue=False, **quiet)
        self.report.click(flag, [self.exchange, self.reason], **quiet)

    def _show(self, exchange: list[dict], status: str) -> dict:
        shown = [render_answer(name, r["answer"], r["asked"]) for name, r in zip(self.names, exchange, strict=True)]
        return dict(zip(self.shown, shown, strict=True)) | {self.exchange: exchange, self.status: render_status(status)}

    def _visitor(self, request: gr.Request) -> tuple[str, str | None]:
        """Return the address and the login that a request counts for; refuse it if one of them has too many."""
        names = (f"access-token{kind}-{self.page.app.cookie_id}" for kind in ("", "-unsecure"))
        login = next(filter(None, map(request.cookies.get, names)), None) if self.page.auth else None
        visitor = request.client.host, login
        for who, what, most in zip(visitor, ("address", "login"), (MAX_OF_ADDRESS, MAX_OF_LOGIN), strict=True):
            if who and sum(who in other for other in self.pending) >= most:
                raise page_error(f"Requests of your {what} not answered yet: {most}, no more at once. Try again later.")
        return visitor

    async def answer(self, request: gr.Request, exchange, instruction, input, *given):
        """Ask all models, after the turns that the page shows, and yield what it shows meanwhile."""
        *sliders, seed = given
        turns = [turns_after(record) for record in exchange or ()] or [[] for _ in self.models]
        instruction, input = instruction or "", input or ""
        settings = check(self.models, turns, instruction, input, (seed or "").strip(), *sliders)
        visitor, left, started = self._visitor(request), threading.Event(), time.monotonic()

        def stopped() -> bool:  # a server that ends lets visitors go one by one: without it, each who waits would begin
            return left.is_set() or self.page.server.force_exit

        question, exchange = user_message(instruction, input), []
        for model, before in zip(self.models, turns, strict=True):
            record = {"instruction": instruction, "input": input, "answer": "", "model": model.name}
            record |= {"model_path": model.path, "settings": dataclasses.asdict(settings)}  # names may be the same
            exchange.append(record | {"asked": [*before, question] if model.remembers else []})
        self.pending.append(visitor)
        try:
            place = len(self.pending) - STREAMS
            status = f"Waiting: number {place} in line." if place > 0 else "Asking …"
            yield self._show(exchange, status) | dict.fromkeys(self.fields if self.remembers else (), "")
            async for said in answers(self.models, turns, (instruction, input), settings, stopped):
                for record, (text, _) in zip(exchange, said, strict=True):
                    record["answer"] = text
                yield self._show(exchange, "Answering …" if any(text for text, _ in said) else status)
        finally:  # also if it is stopped
            left.set()
            self.pending.remove(visitor)
        notes = [f"Answered in {time.monotonic() - started:.1f} s, seed {settings.seed}."]
        for name, (_, cut) in zip(self.names, said, strict=True):
            if cut:
                notes.append(f"{f'{name[0]} is cut' if self.models[1:] else 'Cut'} off at {LIMITS[cut]}.")
        yield self._show(exchange, " ".join(notes))


def turns_after(record: dict) -> list[dict]:
    """Return the conversation with a model after what it was asked and has said; a word is needed to count."""
    said = {"role": "assistant", "content": record["answer"]}
    return [*record["asked"], said] if record["asked"] and record["answer"] else record["asked"][:-1]


def flag(exchange: list[dict] | None, reason: str | None) -> None:
    """Add to FLAGGED each model's answer, as far as it is written: a line of JSON."""
    records = [record for record in exchange or () if record["answer"]]
    if not records:
        raise page_error("There is no answer to report yet.", "Not reported")
    more = {"reason": reason or "", "time": utc_now()}
    # Unbuffered: reports at the same time stay whole lines. Private: people typed it.
    with open(FLAGGED, "ab", buffering=0, opener=lambda *args: os.open(*args, 0o600)) as file:
        file.write("".join(json_text(record | more) + "\n" for record in records).encode())
    gr.Info(f"Saved in {FLAGGED} on the machine that runs this page. Thank you.")


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
    """Load one model or two and serve the page until Ctrl-C or SIGTERM; raise UserError for an argument that is wrong.

    See check_exposure(), free_port() and load(). ``defaults`` are fields of Settings; max_new_tokens is also the most
    that a visitor can ask for.
    """
    login, settings, port, models = check_exposure(host, auth), Settings(**defaults), free_port(port), []
    for path in filter(None, [model_path, compare_path]):
        base = base_path if is_adapter(path) else None
        models.append(Model(public_name(path), *load(path, device, dtype, base), str(path)))
    notes = [f"reports of harmful answers go to {Path(FLAGGED).resolve()}"]
    run(Demo(models, settings).page, host, port, login, " and ".join(model.name for model in models), notes)
