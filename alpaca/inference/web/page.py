"""The live demo: a page on this machine that asks a model, or two side by side (``chat.py --web``).

Whoever can reach the page can also call what is behind it without a browser, so every bound is checked here and not in
the page. What a model writes is a stranger's text: its Markdown is rendered, its HTML and images stay text.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import html
import logging
import math
import secrets
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

from alpaca import UserError
from alpaca.common.cli import free_port
from alpaca.inference.generate import Settings
from alpaca.inference.web.reports import FLAGGED, MAX_REASON_CHARS, NOTE, flag
from alpaca.inference.web.server import COPY, WORKER, check_exposure, gr, page_error, render_answer, render_status, run
from alpaca.prompts import format_prompt

MAX_CHARS = 8_000  # of an instruction, and of an input
MAX_PROMPT_TOKENS = 2_048  # training read 512; never more than half of what the model can read
MAX_WAITING = 20  # requests in the queue; whoever comes after them is told to come back
MAX_SEED = 2**31 - 1
LIMITS = {"max_new_tokens": "the longest answer", "context": "the end of what the model can read"}
STREAMS = 2  # answers of a model at once: a long one does not keep the next page waiting
EXAMPLES = [
    ["Give three tips for sleeping better.", ""],
    ["Explain to a ten-year-old why the sky is blue.", ""],
    ["Write a Python function that tells whether a word is a palindrome.", ""],
    ["Rewrite this sentence so that it is polite.", "Send me the report now."],
    ["Sort these animals by their weight.", "cat, elephant, mouse, horse"],
]


# ---------------------------------------------------------------------------------------------------------------------
# What is asked.


@dataclasses.dataclass
class Model:
    """A model under the name that the page shows."""

    name: str
    model: object
    tokenizer: object
    path: str = ""
    # Gradio takes an answer that was stopped for ended, while its model may still read the prompt. These are held until
    # it has ended, so that Answer and Stop in turn do not set more to work than STREAMS.
    slots: threading.Semaphore = dataclasses.field(default_factory=lambda: threading.Semaphore(STREAMS))

    @property
    def max_prompt_tokens(self) -> int:
        longest = getattr(self.model.config, "max_position_embeddings", None) or 2 * MAX_PROMPT_TOKENS
        return min(MAX_PROMPT_TOKENS, longest // 2)


def check(models: list[Model], most: int, instruction, input, max_new_tokens, temperature, top_p, seed):
    """The prompt and the settings of a request, from a page or from a program.

    Args:
        models: all of them must be able to read it.
        most: tokens that an answer may have.

    Raises:
        gr.Error: a text or a setting is not what it may be; the message says what may.
    """
    instruction, input = instruction or "", input or ""
    for name, text in (("instruction", instruction), ("input", input)):
        if not isinstance(text, str):
            raise page_error(f"The {name} must be text.")
        if len(text) > MAX_CHARS:
            raise page_error(f"The {name} has {len(text):,} characters; at most {MAX_CHARS:,} are read: shorten it.")
    try:
        (instruction + input).encode()
    except UnicodeEncodeError:
        raise page_error("The text holds half of a surrogate pair, which is no character: type it anew.") from None
    if not instruction.strip():
        raise page_error("Type an instruction first.")

    def number(name: str, value, low: float, high: float):
        right = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not right or not low <= value <= high:
            raise page_error(f"{name} must be a number from {low} to {high}.")
        return value

    if isinstance(seed, str):
        seed = int(seed) if seed.strip().isdecimal() and len(seed) < 20 else seed.strip() or None
    settings = Settings(
        int(number("Longest answer", max_new_tokens, 1, most)),
        float(number("Temperature", temperature, 0, 2)),
        float(number("Top p", top_p, 0.01, 1)),
        secrets.randbelow(MAX_SEED) if seed is None else int(number("Seed", seed, 0, MAX_SEED)),
    )
    from alpaca.inference import load as inference

    prompt = format_prompt(instruction, input)
    for model in models:
        if (tokens := len(inference.prompt_ids(model.tokenizer, [prompt])[0])) > model.max_prompt_tokens:
            raise page_error(
                f"Instruction and input have {tokens:,} tokens; {model.name} reads at most "
                f"{model.max_prompt_tokens:,} here: shorten them."
            )
    return prompt, settings


async def answers(
    models: list[Model], prompt: str, settings: Settings, cut: dict[int, str]
) -> AsyncIterator[list[str]]:
    """Yields what each model has said so far, some 20 times a second at most. Closing it stops the models.

    The limit that an answer reached (see inference.stream) is put into ``cut`` under its model's place.

    Each model has a thread of its own, so that neither a long prompt nor the end of an answer holds up other pages.
    """
    from alpaca.inference import load as inference

    loop, news, left = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()

    def tell(*item) -> None:
        try:
            loop.call_soon_threadsafe(news.put_nowait, item)
        except RuntimeError:  # the server has ended
            left.set()

    def work(index: int, model: Model) -> None:
        while not model.slots.acquire(timeout=0.1):
            if left.is_set():
                return
        given = {"stopped": left.is_set, "on_cut": lambda limit: cut.update({index: limit})}
        try:
            if left.is_set():
                return
            stream = inference.stream(model.model, model.tokenizer, prompt, **dataclasses.asdict(settings), **given)
            with contextlib.closing(stream):
                for piece in stream:
                    if left.is_set():
                        return
                    tell(index, piece)
            tell(index, None)
        except Exception as e:
            tell(index, e)
        finally:
            model.slots.release()

    for index, model in enumerate(models):
        threading.Thread(target=work, args=(index, model), name=WORKER, daemon=True).start()
    texts, running = [""] * len(models), len(models)
    try:
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
    finally:
        left.set()


# ---------------------------------------------------------------------------------------------------------------------
# The page.


def build(models: list[Model], defaults: Settings) -> gr.Blocks:
    """The page for one model, or for two side by side; an answer has at most ``defaults.max_new_tokens``."""
    names = [model.name for model in models]
    if len(models) == 2:
        names = [f"{letter}: {name}" for letter, name in zip("AB", names, strict=True)]
    most = min(model.max_prompt_tokens for model in models)
    latest: dict[str | None, dict] = {}  # login → its last request

    def login_of(request: gr.Request) -> str | None:
        """Whoever came in by one password at one time; None on a page without one, which this machine alone sees."""
        names = (f"access-token{kind}-{page.app.cookie_id}" for kind in ("", "-unsecure"))
        return next(filter(None, map(request.cookies.get, names)), None) if page.auth else None

    async def answer(request: gr.Request, instruction, input, *given):
        prompt, settings = check(models, defaults.max_new_tokens, instruction, input, *given)
        exchange = {"instruction": instruction, "input": input or "", "models": [model.name for model in models]}
        exchange |= {"paths": [model.path for model in models], "settings": dataclasses.asdict(settings)}
        exchange |= {"answers": [""] * len(models), "running": True, "flagged": []}
        login = login_of(request)
        latest[login] = exchange
        cut: dict[int, str] = {}

        def show(status: str, running: bool):
            texts = exchange["answers"]
            shown = [render_answer(name, text or "…" * running) for name, text in zip(names, texts, strict=True)]
            return *shown, *texts, exchange, render_status(status), gr.Button(interactive=running), render_status(NOTE)

        started = time.monotonic()
        yield show("Answering …", True)
        try:
            async for texts in answers(models, prompt, settings, cut):
                exchange["answers"] = texts
                if login and latest.get(login) is not exchange:
                    raise page_error("You have asked something else meanwhile, in another window: one at a time.")
                yield show("Answering …", True)
        except gr.Error:
            exchange["running"] = False
            yield show("Not answered to the end.", False)
            raise
        finally:  # also of one that is stopped
            exchange["running"] = False
            if latest.get(login) is exchange:
                del latest[login]
        notes = [f"Answered in {time.monotonic() - started:.1f} s, seed {settings.seed}."]
        for index, limit in sorted(cut.items()):
            notes.append(f"{'Cut' if len(models) == 1 else names[index][0] + ' is cut'} off at {LIMITS[limit]}.")
        yield show(" ".join(notes), False)

    async def answer_again(request: gr.Request, exchange, *given):
        if not exchange:
            raise page_error("There is no answer yet.")
        async for shown in answer(request, exchange["instruction"], exchange["input"], *given[:-1], None):
            yield shown

    with gr.Blocks(title=f"{names[0]} · Alpaca", analytics_enabled=False) as page:
        gr.HTML(
            f"<h1>{html.escape(' and '.join(model.name for model in models))}</h1>"
            '<p class="notice">A small language model that was fine-tuned to follow instructions. What it says may be '
            "wrong, made up or offensive: check it before you use it. If it was trained on Alpaca data (CC BY-NC 4.0) "
            "or on LLaMA, their licences allow research only, no commercial use. It answers each instruction on its "
            "own and remembers nothing.</p>",
            js_on_load=None,
        )
        keys = "Enter asks, Shift+Enter makes a new line."
        instruction = gr.Textbox(
            label="Instruction", placeholder=f"What should be done? {keys}", max_lines=10, max_length=MAX_CHARS
        )
        input = gr.Textbox(
            label="Input (optional)", placeholder=f"The text it is about. {keys}", max_lines=12, max_length=MAX_CHARS
        )
        with gr.Row():
            ask = gr.Button("Answer", variant="primary", size="md", min_width=80)
            stop = gr.Button("Stop", variant="stop", interactive=False, size="md", min_width=80)
            again = gr.Button("Try again", size="md", min_width=80)
        status = gr.HTML(render_status(""), js_on_load=None)
        shown, texts = [], []
        with gr.Row():
            for name in names:
                with gr.Column(min_width=280):
                    shown.append(gr.HTML(render_answer(name, ""), js_on_load=None))
                    texts.append(gr.Textbox(visible=False))
                    copy = gr.Button("Copy" if len(names) == 1 else f"Copy {name[0]}", size="sm", elem_classes="copy")
                    copy.click(None, texts[-1], None, js=COPY, api_visibility="private")
        labels = [" ".join(pair).strip() for pair in EXAMPLES]
        fields = [instruction, input]
        gr.Examples(EXAMPLES, fields, example_labels=labels, cache_examples=False, api_visibility="private")
        with gr.Accordion("Sampling", open=False):
            longest, seed = defaults.max_new_tokens, "" if defaults.seed is None else str(defaults.seed)
            with gr.Row():
                settings = [
                    gr.Slider(1, longest, longest, step=1, label="Longest answer (tokens)", min_width=240),
                    gr.Slider(0, 2, defaults.temperature, step=0.05, label="Temperature (0: likeliest)", min_width=240),
                    gr.Slider(0.01, 1, defaults.top_p, step=0.01, label="Top p", min_width=240),
                    # not a Number: an empty one turns into 0 as soon as it is seen
                    gr.Textbox(seed, label="Seed (empty: a new one each time)", min_width=240),
                ]
            gr.HTML(
                f'<p class="notice">An instruction and an input may have {MAX_CHARS:,} characters each and {most:,} '
                f"tokens together. The same seed gives the same answer; <i>Try again</i> takes a new one. {STREAMS} "
                f"answers are written at once, {MAX_WAITING} more may wait.</p>",
                js_on_load=None,
            )
        with gr.Accordion("Report a harmful answer", open=False):
            which = gr.Radio(names, value=names[0], label="Which answer", type="index", visible=len(names) > 1)
            reason = gr.Textbox(label="What is wrong with it? (optional)", max_length=MAX_REASON_CHARS, lines=1)
            report = gr.Button("Report", size="sm")
            reported = gr.HTML(render_status(NOTE), js_on_load=None)

        exchange = gr.State(None)
        options = {"outputs": [*shown, *texts, exchange, status, stop, reported], "show_progress_on": status}
        options |= {"concurrency_limit": STREAMS, "concurrency_id": "answer"}
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        triggers, waiting = [ask.click, instruction.submit, input.submit], gr.Button(interactive=True, render=False)
        # The page goes through the listeners of a click in turn and waits for each, but not for what is in a then().
        # Stop is for what waits in the queue as well.
        pressed = gr.on(triggers, lambda: waiting, None, stop, queue=False, **quiet)
        asked = pressed.then(answer, [*fields, *settings], api_name="answer", **options)
        pressed_again = again.click(lambda: waiting, None, stop, queue=False, **quiet)
        asked_again = pressed_again.then(answer_again, [exchange, *settings], api_visibility="private", **options)
        for event in (asked, asked_again):  # also of one that was refused, in which nothing has set the button back
            event.failure(lambda: gr.Button(interactive=False, render=False), None, stop, queue=False, **quiet)
        # Both write into the same fields: whichever comes later ends the other.
        gr.on(triggers, None, cancels=asked_again)
        again.click(None, cancels=asked)
        stop.click(None, cancels=[asked, asked_again])
        shown_stopped = render_status("Stopped."), gr.Button(interactive=False, render=False)
        stop.click(lambda: shown_stopped, None, [status, stop], queue=False, **quiet)
        report.click(flag, [exchange, which, reason], reported, **quiet)
    page.queue(max_size=MAX_WAITING, api_open=False, default_concurrency_limit=8)
    return page


# ---------------------------------------------------------------------------------------------------------------------
# The server.


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
    """Loads the models and serves the page until Ctrl-C or SIGTERM.

    Args:
        model_path: the folder of the model.
        compare_path: the folder of a second one, for the same prompts.
        host: the address to listen at; any but this machine's own needs ``auth``.
        port: 0 takes a free one.
        auth: "user:password".
        device, dtype, base_path: as for inference.load.
        defaults: fields of Settings; max_new_tokens is also the most that a visitor can ask for.

    Raises:
        UserError: a flag is wrong, the port is taken, or a model cannot be loaded.
    """
    login = check_exposure(host, auth)
    settings = Settings(**defaults)
    if settings.max_new_tokens < 1 or not 0 <= settings.temperature <= 2 or not 0.01 <= settings.top_p <= 1:
        raise UserError("--max_new_tokens must be at least 1, --temperature from 0 to 2, and --top_p from 0.01 to 1")
    if not 0 <= (settings.seed or 0) <= MAX_SEED:
        raise UserError(f"--seed must be from 0 to {MAX_SEED}")
    port = free_port(port)
    from alpaca.inference import load as inference

    models = []
    for path in filter(None, [model_path, compare_path]):
        base = base_path if (Path(path) / "adapter_config.json").exists() else None
        name = Path(path).resolve().name or str(path)
        models.append(Model(name, *inference.load(path, device, dtype, base), str(path)))
    page = build(models, settings)
    names = " and ".join(model.name for model in models)
    run(page, host, port, login, names, [f"reports of harmful answers go to {Path(FLAGGED).resolve()}"])
