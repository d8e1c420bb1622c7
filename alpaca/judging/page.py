"""The blind page: people choose between two answers without knowing whose they are (``judge.py people``).

What would unblind stays on the server: the page gets the texts of one pair at a time, in the order drawn for this
annotator, and sends back a place and a choice. It never receives names of generators, the seed or the ids of the set.
Both answers are rendered alike; what an answer says about itself stays in it. The server holds the name of each visit,
and a visit can undo only its own votes.
"""

from __future__ import annotations

import html
import logging
from functools import partial
from pathlib import Path

from alpaca import UserError
from alpaca.common.cli import free_port
from alpaca.common.text import counted
from alpaca.data.instruction_sets import Answers, Item
from alpaca.inference.web.server import check_exposure, gr, page_error, render_answer, render_status, run
from alpaca.judging.votes import CHOICES, MAX_NAME_CHARS, Ballots

TITLE = "Which answer is better?"
GUIDE = (
    "Read the instruction, then both answers. The better one does what was asked, is correct, and is clear; longer is "
    "not better. If neither is better, choose Tie. Skip what you cannot judge. The two models switch sides at random."
)
BUTTONS = {  # id: label, keys shown on it. The arrows up and down are for scrolling.
    "first": ("1 is better", "← or 1"),
    "second": ("2 is better", "→ or 2"),
    "tie": ("Tie", "3"),
    "skip": ("Skip", "4"),
    "undo": ("Undo", "U"),
}
KEYS_SAID = "Keys: " + ", ".join(f"{label} ({key})" for label, key in BUTTONS.values()) + "."
CUT = "This answer was cut off here."
TEMPLATES = Path(__file__).parent / "templates"
CSS, KEYS = ((TEMPLATES / name).read_text() for name in ("page.css", "page.js"))
SHOWN = "() => { pairShown = performance.now(); scrollTo(0, 0); document.activeElement?.closest('button')?.blur(); }"
KEEP_NAME = "(name) => { localStorage.setItem('annotator', name); }"
KEPT_NAME = "() => localStorage.getItem('annotator') ?? ''"
FORGET_NAME = "() => { localStorage.removeItem('annotator'); }"


def render_pair(instruction: str, input: str, first: str, second: str, cut_off=(False, False)) -> str:
    """Return the HTML of an instruction over two answers, without the white space that could unblind an answer."""

    def part(name: str, text: str) -> str:
        return f"<h2>{name}</h2><p>{html.escape(text.strip())}</p>"

    task = part("Instruction", instruction) + (part("Input", input) if input.strip() else "")
    shown = [
        render_answer(f"Answer {number}", text.strip() or "*(empty)*", note=CUT if cut else "")
        for number, text, cut in zip((1, 2), (first, second), cut_off, strict=True)
    ]
    return f'<div class="task" dir="auto">{task}</div><div class="answers">{"".join(shown)}</div>'


class _Events:
    """What happens at the page's buttons.

    A session is a visit's name and the places of its votes, which never leave the server. The browser holds the place
    of the pair that it shows.
    """

    def __init__(self, ballots: Ballots):
        self.ballots, self.total = ballots, len(ballots.items)

    def show(self, session: dict, note: str = "") -> tuple:
        """Return the new values of the page's outputs: the annotator's next pair, or thanks."""
        annotator, total = self._annotator(session), self.total
        place, done, name = self.ballots.next(annotator), self.ballots.done(annotator), html.escape(annotator)
        bar = f'<progress max="{total}" value="{done}" aria-label="Judged"></progress>'
        progress = f'<div class="progress"><span>{done:,} of {total:,}</span>{bar}<span dir="auto">{name}</span></div>'
        if place is None:
            shown = f'<div class="task"><p>Thank you, {name}. You are done: {counted(total, "pair")} judged.</p></div>'
        else:
            shown = render_pair(*self.ballots.pair(annotator, place), self.ballots.cut_off(annotator, place))
        column = gr.Column(visible=False), gr.Column(visible=True)
        choices = [gr.Button(visible=place is not None)] * len(CHOICES)
        undo = gr.Button(interactive=bool(session["voted"]))
        return *column, session, place, progress, shown, render_status(note), *choices, undo

    def begin(self, name) -> tuple:
        try:
            session = {"name": self.ballots.annotator(name), "voted": []}
        except UserError as e:
            raise page_error(str(e), "No name") from None
        done = self.ballots.done(session["name"])
        return self.show(session, f"Continuing after {counted(done, 'pair')}." if done else "")

    def vote(self, choice: str, session: dict | None, place) -> tuple:
        annotator = self._annotator(session)
        if not isinstance(place, int) or not 0 <= place < self.total:
            raise page_error("There is no such pair: reload the page.", "Not saved")
        kept = self._keep(self.ballots.vote, annotator, place, choice)
        session["voted"] += [place] * kept
        return self.show(session, "" if kept else "You have already judged that pair: your first choice counts.")

    def undo(self, session: dict | None) -> tuple:
        annotator = self._annotator(session)
        taken_back = session["voted"] and self._keep(self.ballots.undo, annotator, session["voted"].pop())
        return self.show(session, "Undone: choose again." if taken_back else "There is nothing to undo.")

    def _annotator(self, session: dict | None) -> str:
        if not session:
            raise page_error("The server no longer knows your name: reload the page.", "Not saved")
        return self.ballots.annotator(session["name"])  # again: another may have voted under it, spelled otherwise

    def _keep(self, change, *args) -> bool:
        try:
            return change(*args)
        except OSError as e:
            logging.error("%s", e)
            raise page_error("The vote could not be saved: see the server's terminal.", "Not saved") from None


def build(ballots: Ballots) -> gr.Blocks:
    """Return the page. Its browser keeps the annotator's name, so that it survives a server's restart."""
    events = _Events(ballots)
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.HTML(f"<h1>{TITLE}</h1>", js_on_load=None)
        with gr.Column() as entry:
            gr.HTML(f"<p>{GUIDE}</p><p>{KEYS_SAID}</p>", js_on_load=None)
            name = gr.Textbox(label="Your name", max_length=MAX_NAME_CHARS, max_lines=1, autofocus=True)
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
        session, place = gr.State(None), gr.Number(visible=False, precision=0)

        outputs = [entry, judging, session, place, progress, pair, status, *buttons.values()]
        # Not queued: a vote is a line in a file, and a queue would only make annotators wait for each other.
        options = {"outputs": outputs, "queue": False, "api_visibility": "private", "show_progress": "hidden"}
        resumed = page.load(
            lambda name: events.begin(name) if name else [gr.skip()] * len(outputs), name, js=KEPT_NAME, **options
        )
        begun = gr.on([start.click, name.submit], events.begin, name, **options)
        undone = buttons["undo"].click(events.undo, session, **options)
        voted = [buttons[each].click(partial(events.vote, each), [session, place], **options) for each in CHOICES]
        for event in (resumed, begun, undone, *voted):
            event.success(None, js=SHOWN)
        begun.success(None, name, js=KEEP_NAME)
        other.click(
            lambda: (gr.Column(visible=True), gr.Column(visible=False), None, None, ""),
            js=FORGET_NAME,
            **options | {"outputs": [entry, judging, session, place, name]},
        )
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
    """Serve the page until Ctrl-C or SIGTERM: several people can judge at once, each under their own name.

    Arguments and errors are those of Ballots, check_exposure() and free_port().
    """
    login, port = check_exposure(host, auth), free_port(port)
    ballots = Ballots(items, a, b, output_path, seed)
    notes = [f"votes go to {ballots.path.resolve()}"]
    if left_out := len(items) - len(ballots.items):
        notes.append(f"{left_out:,} of {counted(len(items), 'instruction')} without two answers are not shown")
    try:
        run(build(ballots), host, port, login, f"{counted(len(ballots.items), 'pair')} to judge", notes, CSS)
    finally:
        ballots.close()
