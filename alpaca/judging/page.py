"""The blind page: people choose between two answers without knowing whose they are (``judge.py people``).

What would unblind stays on the server: the page gets the texts of one pair at a time, in the order that is drawn for
this annotator, and sends back a place and a choice. Names of generators, the seed and the ids of the set are in nothing
that it receives. Both answers are rendered alike; what one says about itself is part of it and is left there.
"""

from __future__ import annotations

import html
import logging
from functools import partial

from alpaca import UserError
from alpaca.common.cli import free_port
from alpaca.data.instruction_sets import Answers, Item
from alpaca.inference.web.server import check_exposure, gr, page_error, render_answer, render_status, run
from alpaca.judging.votes import CHOICES, MAX_NAME_CHARS, Ballots

TITLE = "Which answer is better?"
GUIDE = (
    "Read the instruction, then both answers. The better one does what was asked, is right, and is clear; a longer one "
    "is not better for its length. If neither is, it is a tie; skip what you cannot judge. The two change sides at "
    "random, so that neither place says anything."
)
BUTTONS = {  # id: label, key that is shown. The arrows up and down are left to scrolling.
    "first": ("1 is better", "← or 1"),
    "second": ("2 is better", "→ or 2"),
    "tie": ("Tie", "3"),
    "skip": ("Skip", "4"),
    "undo": ("Undo", "U"),
}
# A key is a click on its button. A key that is held down, and a second press within 0.3 s of the next pair's coming, in
# which nobody has read it, are slips. The name is kept in the browser, for a reload.
KEYS = """() => {
  const keys = {ArrowLeft: "first", 1: "first", ArrowRight: "second", 2: "second", 3: "tie", 4: "skip", u: "undo"};
  document.addEventListener("keydown", (event) => {
    const choice = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!choice || event.repeat || event.ctrlKey || event.altKey || event.metaKey || event.isComposing) return;
    if (event.target.closest?.("input, textarea, select, [contenteditable]")) return;
    const button = document.getElementById("choose-" + choice);
    if (!button?.checkVisibility() || performance.now() - (window.pairShown ?? 0) < 300) return;
    event.preventDefault();
    button.click();
  });
}"""
SHOWN = "() => { window.pairShown = performance.now(); scrollTo(0, 0); document.activeElement?.blur(); }"
KEEP_NAME = "(name) => { localStorage.setItem('annotator', name); }"
KEPT_NAME = "() => localStorage.getItem('annotator') ?? ''"
FORGET_NAME = "() => { localStorage.removeItem('annotator'); }"
CSS = """
.gradio-container, .gradio-container main { width: 100% !important; box-sizing: border-box; }
.gradio-container main { padding-bottom: 7em !important; }
.status { min-height: 0; padding: 0; }
.task { border-left: 4px solid var(--color-accent); padding: .1em 0 .1em 1em; margin: .6em 0 1em; }
.task h2 { font-size: .85em !important; opacity: .7; margin: 0 0 .2em !important; }
.task p { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .6em; font-size: 1.05em; line-height: 1.5; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: 1em; }
.answers .answer { min-width: 0; }
.answers .answer pre { white-space: pre-wrap; overflow-wrap: anywhere; }
#choices { position: fixed; left: 0; right: 0; bottom: 0; z-index: 10; justify-content: center; gap: .5em;
           padding: .6em; background: var(--background-fill-primary);
           border-top: 1px solid var(--border-color-primary); flex-wrap: wrap; }
#choices button { flex: 0 1 11em; min-width: 5.5em !important; }
@media (max-width: 600px) {
  #choices button { flex: 1 1 26%; } #choose-first, #choose-second { flex-basis: 40% !important; }
}
.progress { display: flex; align-items: center; gap: .8em; font-size: .9em; }
.progress progress { flex: 1; height: .5em; appearance: none; border: 0; background: var(--border-color-primary); }
.progress progress::-webkit-progress-bar { background: var(--border-color-primary); border-radius: 1em; }
.progress progress::-webkit-progress-value { background: var(--color-accent); border-radius: 1em; }
.progress progress::-moz-progress-bar { background: var(--color-accent); }
"""


def render_pair(instruction: str, input: str, first: str, second: str) -> str:
    """The HTML of an instruction over two answers. White space around an answer would tell generators apart."""

    def part(name: str, text: str) -> str:
        return f"<h2>{name}</h2><p>{html.escape(text.strip())}</p>"

    task = part("Instruction", instruction) + (part("Input", input) if input.strip() else "")
    shown = [
        render_answer(f"Answer {number}", text.strip() or "*(empty)*") for number, text in ((1, first), (2, second))
    ]
    return f'<div class="task" dir="auto">{task}</div><div class="answers">{"".join(shown)}</div>'


def build(ballots: Ballots) -> gr.Blocks:
    """The page. It holds the annotator's name and the pair's place itself: a server that is started anew goes on."""
    total = len(ballots.items)

    def show(annotator: str, note: str = ""):
        """What all outputs become: the annotator's next pair, or thanks."""
        place, done = ballots.next(annotator), ballots.done(annotator)
        name = html.escape(annotator)
        bar = f'<progress max="{total}" value="{done}" aria-label="Judged"></progress>'
        progress = f'<div class="progress"><span>{done:,} of {total:,}</span>{bar}<span dir="auto">{name}</span></div>'
        if place is None:
            shown = f'<div class="task"><p>Thank you, {name}. You have judged all {total:,} pairs.</p></div>'
        else:
            shown = render_pair(*ballots.pair(annotator, place))
        choices = [gr.Button(visible=place is not None)] * len(CHOICES)
        undo = gr.Button(interactive=done > 0)
        column = gr.Column(visible=False), gr.Column(visible=True)
        return *column, annotator, place, progress, shown, render_status(note), *choices, undo

    def annotator_of(name) -> str:
        try:
            return ballots.annotator(name)
        except UserError as e:
            raise page_error(str(e), "No name") from None

    def keep(change, *args):
        try:
            return change(*args)
        except OSError as e:
            logging.error("%s", e)
            raise page_error("It could not be saved; the terminal of the server says why.", "Not saved") from None

    def begin(name):
        annotator = annotator_of(name)
        done = ballots.done(annotator)
        return show(annotator, f"Going on after {done:,}." if done else "")

    def resume(name):
        return begin(name) if name else [gr.skip()] * len(outputs)

    def leave():
        return gr.Column(visible=True), gr.Column(visible=False), "", None, ""

    def vote(choice: str, name, place):
        annotator = annotator_of(name)
        if not isinstance(place, int) or not 0 <= place < total:
            raise page_error("There is no such pair: reload the page.", "Not saved")
        kept = keep(ballots.vote, annotator, place, choice)
        return show(annotator, "" if kept else "You had judged that pair already: the first choice stands.")

    def undo(name):
        annotator = annotator_of(name)
        taken_back = keep(ballots.undo, annotator)
        return show(annotator, "Taken back: choose again." if taken_back else "")

    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.HTML(f"<h1>{TITLE}</h1>", js_on_load=None)
        with gr.Column() as entry:
            gr.HTML(f"<p>{GUIDE}</p>", js_on_load=None)
            name = gr.Textbox(label="Your name", max_length=MAX_NAME_CHARS, max_lines=1)
            start = gr.Button("Begin", variant="primary", size="md")
        with gr.Column(visible=False) as judging:
            progress = gr.HTML(js_on_load=None)
            status = gr.HTML(render_status(""), js_on_load=None)
            pair = gr.HTML(js_on_load=None)
            with gr.Row(elem_id="choices"):
                buttons = {
                    id: gr.Button(f"{label} ({key})", size="md", elem_id=f"choose-{id}")
                    for id, (label, key) in BUTTONS.items()
                }
            other = gr.Button("Another name", size="sm", elem_classes="copy")
        annotator, place = gr.Textbox(visible=False), gr.Number(visible=False, precision=0)

        outputs = [entry, judging, annotator, place, progress, pair, status, *buttons.values()]
        # Not queued: a vote is a file's line, and one page's wait for another's would only be felt.
        options = {"outputs": outputs, "queue": False, "api_visibility": "private", "show_progress": "hidden"}
        shown = [
            page.load(resume, name, js=KEPT_NAME, **options),
            gr.on([start.click, name.submit], begin, name, **options),
            buttons["undo"].click(undo, annotator, **options),
        ]
        for choice in CHOICES:
            shown.append(buttons[choice].click(partial(vote, choice), [annotator, place], **options))
        for event in shown:
            event.success(None, js=SHOWN)
        shown[1].success(None, annotator, js=KEEP_NAME)
        other.click(leave, js=FORGET_NAME, **options | {"outputs": [entry, judging, annotator, place, name]})
        page.load(None, js=KEYS)
    page.queue(api_open=False)
    return page


def serve(
    items: list[Item],
    a: Answers,
    b: Answers,
    output_path: str,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: str | None = None,
    seed: int | None = None,
) -> None:
    """Serves the page until Ctrl-C or SIGTERM. Several people can judge at once, each under a name of their own.

    Args:
        items: the instruction set.
        a, b: two models' answers to it.
        output_path: the judgments, a row a vote; the same command goes on with it.
        host: the address to listen at; any but this machine's own needs ``auth``.
        port: 0 takes a free one.
        auth: "user:password", one for all.
        seed: see Ballots.

    Raises:
        UserError: a flag is wrong, the port is taken, or see Ballots.
    """
    login, port = check_exposure(host, auth), free_port(port)
    ballots = Ballots(items, a, b, output_path, seed)
    notes = [f"votes go to {ballots.path.resolve()}"]
    if left_out := len(items) - len(ballots.items):
        notes.append(f"{left_out:,} of {len(items):,} instructions lack an answer and are not shown")
    try:
        run(build(ballots), host, port, login, f"{len(ballots.items):,} pairs to judge", notes, CSS)
    finally:
        ballots.close()
