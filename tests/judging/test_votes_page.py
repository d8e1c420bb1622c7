"""alpaca/judging/page.py in a real browser: keys become votes, and nothing that it is sent says whose an answer is."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import urllib.parse

import browser
import pytest
from browser import needs_browser
from conftest import ROOT

import utils
from alpaca import UserError
from alpaca.common.cli import free_port
from alpaca.data.instruction_sets import Answers, Item
from alpaca.inference.web import server as web_server
from alpaca.judging import page as judge_page
from alpaca.judging.votes import Ballots

HOSTILE = "<script>window.hit = 1</script> <img src=x onerror='window.hit = 1'> <b>not bold</b>"
ITEMS = [
    Item("item-a", "Say <i>a</i>.", "", "reference-a", "category-a"),
    Item("item-b", "Say b.", "x" * 200, "reference-b", "category-b"),
    Item("item-c", "Say c.", "", "reference-c", "category-c"),
]
WIDE = "\n```\n" + "wide " * 60 + "\n```\n" + "x" * 200 + "\n\n|a|b|\n|-|-|\n|" + "y" * 90 + "|2|"
SPARROW = Answers("sparrow-7b", {item.id: f"**tweet** {item.id[-1]}{WIDE}" for item in ITEMS}, [], {})
RAVEN = Answers("raven-13b", {item.id: f"{HOSTILE} croak {item.id[-1]}" for item in ITEMS}, [], {})
SECRETS = ["sparrow", "raven", "item-", "reference-", "category-", "votes.jsonl", "1234567"]  # the last: the seed


class Site:
    """A running page, as judge_page.serve makes it."""

    def __init__(self, path, auth=None):
        self.path = path
        self.ballots = Ballots(ITEMS, SPARROW, RAVEN, path, seed=1234567)
        self.page = judge_page.build(self.ballots)
        self.url = web_server.launch(self.page, "127.0.0.1", free_port(0), auth, judge_page.CSS)

    def votes(self, name=None):
        return [row for row in utils.jload(self.path) if name in (None, row["judge"]["name"])]

    def begin(self, name):
        """(status, body) of a program's visit that begins under a name; votes and undo are then of that visit."""
        return self.call(None, [name], name)

    def call(self, endpoint, data, session="program"):
        """(status, body) of what a program that sends the page's own requests gets; None begins."""
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(self.url).netloc, timeout=20)
        index = next(
            dependency["id"]
            for dependency in self.page.config["dependencies"]
            if [endpoint, "click" if endpoint else "submit"]
            in ([self.id_of(target), event] for target, event in dependency["targets"])
            and dependency["backend_fn"]
        )
        body = json.dumps({"data": data, "fn_index": index, "session_hash": session})
        connection.request("POST", "/gradio_api/run/predict", body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return reply.status, reply.read().decode()

    def id_of(self, target):
        return getattr(self.page.blocks.get(target), "elem_id", None)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    made = Site(tmp_path_factory.mktemp("site") / "votes.jsonl")
    yield made
    web_server.close(made.page)
    made.ballots.close()


class Visit(browser.Visit):
    """A judge at the page."""

    def begin(self, name):
        self.page.wait_for_function("window.pairShown")  # it has been loaded: its events are heard
        self.page.get_by_label("Your name").fill(name)
        self.page.get_by_label("Your name").press("Enter")
        self.at(0)
        return self

    def at(self, done, of=3):
        """Waits for the pair after so many, and until its keys count."""
        self.see(f"{done} of {of}", ".progress")
        self.page.wait_for_function("performance.now() - window.pairShown > 300")

    def press(self, key, done):
        self.page.keyboard.press(key)
        self.at(done)

    def sides(self):
        """The generators of the two answers, told by what only the test knows."""
        return ["sparrow-7b" if "tweet" in self.text(which) else "raven-13b" for which in (0, 1)]


@pytest.fixture
def visit(chromium, site):
    visits = []

    def open_page(url=None, **kwargs) -> Visit:
        visits.append(Visit(chromium.new_page(), url or site.url, **kwargs))
        return visits[-1]

    yield open_page
    for each in visits:
        each.close()


@needs_browser
def test_keys_become_votes_for_what_was_on_that_side(visit, site):
    page = visit().begin("Kay")
    shown, width = [], page.page.locator(".progress").bounding_box()["width"]
    for done, key in enumerate(["ArrowLeft", "2", "3"]):
        shown.append(page.sides())
        page.press(key, done + 1)
    page.see("Thank you, Kay. You are done: 3 pairs judged.", ".task")
    assert page.page.locator(".progress").bounding_box()["width"] == width  # though there is less in it
    votes = site.votes("Kay")
    assert [[vote["first"], vote["second"]] for vote in votes] == shown
    assert [vote["preferred"] for vote in votes] == ["first", "second", "tie"]
    assert all(0.2 < vote["seconds"] < 20 for vote in votes)
    assert not page.button("Tie (3)").is_visible()


@needs_browser
def test_both_orders_come_and_the_vote_goes_to_what_was_seen(visit, site):
    page, seen = visit(), set()
    names = {site.ballots.pair(name, 0)[2]: name for name in ("Ada", "Bob", "Cy", "Dot", "Eli", "Fay", "Gus", "Ida")}
    for name in names.values():
        page.begin(name)
        side = page.sides().index("raven-13b")
        page.press("12"[side], 1)
        (vote,) = site.votes(name)
        assert vote[vote["preferred"]] == "raven-13b"
        seen.add(side)
        page.button("Another name").click()
    assert seen == {0, 1}


@needs_browser
def test_buttons_skip_and_undo_do_as_keys_do(visit, site):
    page = visit().begin("Bo")
    assert page.button("Undo (U)").is_disabled()
    first = page.text(0)
    page.button("2 is better (→ or 2)").click()
    page.at(1)
    page.press("4", 2)
    assert [(vote["preferred"], vote["error"]) for vote in site.votes("Bo")] == [("second", None), (None, "skipped")]
    page.press("u", 1)
    page.see("Undone: choose again.", ".status")
    assert page.button("Undo (U)").is_enabled()
    page.press("U", 0)
    assert page.text(0) == first and site.votes("Bo") == []
    page.button("1 is better (← or 1)").click()
    page.at(1)
    page.press("Enter", 1)  # the button that was clicked has no longer the focus
    assert [vote["preferred"] for vote in site.votes("Bo")] == ["first"]


@needs_browser
def test_keys_that_are_typed_held_or_meant_for_the_browser_are_no_votes(visit, site):
    page = visit()
    name = page.page.get_by_label("Your name")
    while name.input_value() != "u1 2 3 4":  # a page that is still being built loses what is typed
        name.fill("")
        name.press_sequentially("u1 2 3 4")
    name.press("ArrowLeft")
    page.button("Begin").click()
    page.at(0)
    for key in ("Control+1", "Alt+ArrowLeft", "Meta+2", "ArrowDown", "ArrowUp", "Space", "x"):
        page.page.keyboard.press(key)
    page.page.keyboard.down("x")
    page.page.evaluate("document.dispatchEvent(new KeyboardEvent('keydown', {key: '1', repeat: true}))")
    page.page.wait_for_timeout(300)
    assert site.votes("u1 2 3 4") == []
    page.page.keyboard.press("1")
    page.page.keyboard.press("1")  # a slip
    page.at(1)
    page.page.keyboard.press("1")
    page.at(2)
    assert len(site.votes("u1 2 3 4")) == 2


@needs_browser
def test_nothing_that_the_browser_gets_says_whose_an_answer_is(chromium, site):
    traffic = []

    def record(response):
        body = b"" if response.status in (301, 302, 304) else response.body()
        traffic.append((response.url, json.dumps(response.headers) + body.decode("utf-8", "replace")))

    page = chromium.new_page()
    page.on("requestfinished", lambda request: record(request.response()))
    page.on("request", lambda request: traffic.append((request.url, request.post_data or "")))
    judge = Visit(page, site.url).begin("Mel")
    orders, contents = [], []
    for done in range(3):
        orders.append(judge.sides())
        contents.append(page.content())
        judge.press("1", done + 1)
    judge.press("u", 2)
    page.reload()
    judge.at(2)
    for path in ("config", "gradio_api/info", "gradio_api/app_id", "gradio_api/startup-events", "theme.css"):
        traffic.append((path, page.evaluate(f"fetch('/{path}').then((reply) => reply.text())")))
    contents.append(page.content())
    contents.append(page.evaluate("JSON.stringify([document.cookie, {...localStorage}, {...sessionStorage}])"))
    contents.append(json.dumps(page.context.cookies()))
    judge.close()
    assert any("tweet" in body and "croak" in body for _, body in traffic)  # the pairs themselves were recorded
    assert len(traffic) > 40 and any(url.endswith(".js") for url, _ in traffic)
    own = [body for url, body in traffic if "/assets/" not in url and "/static/" not in url] + contents
    assert [secret for secret in SECRETS for text in own if secret in text.lower()] == []
    everything = "".join(url + body for url, body in traffic).lower()
    assert [secret for secret in SECRETS[:2] if secret in everything] == []
    votes = site.votes("Mel")
    assert [[vote["first"], vote["second"]] for vote in votes] == orders[:2]


@needs_browser
def test_what_an_answer_says_is_text_and_markdown_is_rendered_on_both_sides(visit):
    page = visit().begin("Hal")
    hostile = page.sides().index("raven-13b")
    for text in ("<script>window.hit = 1</script>", "onerror='window.hit = 1'>", "<b>not bold</b>"):
        assert text in page.text(hostile)
    assert page.page.locator(".answer").nth(1 - hostile).locator("strong").inner_text() == "tweet"
    assert page.page.locator(".answers :is(script, img, b, iframe)").count() == 0
    while "<i>a</i>" not in (task := page.page.locator(".task").inner_text()):
        page.press("3", int(page.page.locator(".progress").inner_text()[0]) + 1)
    assert "Say <i>a</i>." in task and page.page.evaluate("window.hit") is None


@needs_browser
def test_the_first_screen_names_the_keys_and_waits_for_a_name(visit):
    page = visit()
    page.page.wait_for_function("window.pairShown")
    said = page.page.locator("main").inner_text()
    assert "Keys: 1 is better (← or 1), 2 is better (→ or 2), Tie (3), Skip (4), Undo (U)." in said
    assert page.page.evaluate("document.activeElement === document.querySelector('input')")


def test_an_answer_that_was_cut_off_says_so_on_whichever_side_it_is(tmp_path):
    rows = {item.id: {"finish_reason": "length"} for item in ITEMS[:1]}
    cut = Answers("raven-13b", {item.id: f"croak {item.id}" for item in ITEMS}, [], rows)
    ballots = Ballots(ITEMS, SPARROW, cut, tmp_path / "cut.jsonl", seed=1)
    for place, item in enumerate(ballots.items):
        shown = judge_page.render_pair(*ballots.pair("Ann", place), ballots.cut_off("Ann", place))
        marked = [judge_page.CUT in half for half in shown.split("<section")[1:]]
        croaks = ["croak" in half for half in shown.split("<section")[1:]]
        assert marked == (croaks if item.id in rows else [False, False])
    ballots.close()


def test_white_space_and_emptiness_look_alike():
    pair = judge_page.render_pair("Do.", " ", "\n    indented\r\n", "")
    assert "<p>indented</p>" in pair and "<em>(empty)</em>" in pair
    assert 'aria-label="Answer 1"' in pair and 'aria-label="Answer 2"' in pair
    assert "Input" not in pair and "<code>" not in pair


@needs_browser
def test_two_judge_at_once_and_each_has_their_own_progress(visit, site):
    ann, bea = visit().begin("Ann"), visit().begin("Bea")
    ann.press("1", 1)
    bea.press("3", 1)
    ann.press("3", 2)
    assert [vote["preferred"] for vote in site.votes("Ann")] == ["first", "tie"]
    assert [vote["preferred"] for vote in site.votes("Bea")] == ["tie"]
    assert [vote["id"] for vote in site.votes("Ann")][0] == site.votes("Bea")[0]["id"]  # one order for all
    ann.button("Another name").click()
    ann.page.get_by_label("Your name").wait_for()
    assert ann.page.get_by_label("Your name").input_value() == ""
    ann.begin("Cleo")
    ann.page.reload()
    ann.at(0)
    ann.see("Cleo", ".progress")


@needs_browser
def test_a_second_window_does_not_judge_a_pair_twice(visit, site):
    page = visit().begin("Twin")
    other = visit().begin("twin")
    page.press("1", 1)
    other.page.keyboard.press("2")
    other.see("You have already judged that pair: your first choice counts.", ".status")
    other.at(1)
    assert [vote["preferred"] for vote in site.votes() if vote["judge"]["name"].casefold() == "twin"] == ["first"]


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_page_without_scrolling_sideways(visit, scheme):
    page = visit(width=360)
    page.page.emulate_media(color_scheme=scheme)
    page.page.reload()
    page.begin(f"Phone {scheme}")
    assert page.is_as_wide_as_its_window()
    box = page.page.locator("#choose-undo").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 800
    page.stands_out(scheme, "h1", ".task :is(h2, p)", ".answer :is(h2, p)", "#choices button:enabled", ".progress span")


@needs_browser
def test_a_kill_loses_no_vote_and_the_page_goes_on_by_itself(visit, tmp_path):
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}, {str(ROOT / "tests" / "judging")!r}]
from test_votes_page import ITEMS, RAVEN, SPARROW, judge_page
judge_page.serve(ITEMS, SPARROW, RAVEN, "votes.jsonl", port=int(sys.argv[1]))
"""

    def start(port):
        server = subprocess.Popen(
            [sys.executable, "-c", code, str(port)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        line = server.stdout.readline()
        assert line.startswith("3 pairs to judge at http://127.0.0.1:"), line
        return server

    port = free_port(0)
    server = start(port)
    try:
        page = visit(f"http://127.0.0.1:{port}/").begin("Rex")
        page.press("1", 1)
        page.press("2", 2)
        sides, journal = page.sides(), (tmp_path / "votes.jsonl.journal").read_bytes()
        server.kill()
        server.wait()
        page.page.keyboard.press("3")
        page.page.get_by_text("Connection to the server was lost").wait_for()
        server = start(port)
        page.see("Continuing after 2 pairs.", ".status")
        assert page.sides() == sides and (tmp_path / "votes.jsonl.journal").read_bytes() == journal
        page.at(2)
        page.press("3", 3)
        server.terminate()
        output, _ = server.communicate(timeout=30)
    finally:
        server.kill()
    assert [vote["preferred"] for vote in utils.jload(tmp_path / "votes.jsonl")] == ["first", "second", "tie"]
    assert (server.returncode, output.splitlines()[-1]) == (0, "stopped")


# ---------------------------------------------------------------------------------------------------------------------
# Past the browser.


@pytest.mark.parametrize("place", [-1, 3, 10**9, None, "two"])
def test_a_program_cannot_vote_on_a_pair_that_is_not_there(site, place):
    assert site.begin("Prog")[0] == 200
    before = site.votes()
    status, body = site.call("choose-first", [None, place], "Prog")
    assert (status, site.votes()) == (500, before)
    assert not [secret for secret in SECRETS if secret in body]


def test_a_programs_place_between_two_pairs_is_a_vote_on_the_pair_that_it_is_rounded_to(site):
    site.begin("Half")
    status, body = site.call("choose-first", [None, 0.5], "Half")
    assert (status, [vote["id"] for vote in site.votes("Half")]) == (200, [site.ballots.items[0].id])
    assert not [secret for secret in SECRETS if secret in body]


@pytest.mark.parametrize("name", ["", None, "x" * 61, "a\nb"])
def test_a_program_needs_a_name(site, name):
    before = site.votes()
    assert site.begin(name)[0] == 500
    status, body = site.call("choose-tie", [None, 0], "nobody")
    assert (status, site.votes()) == (500, before) and "no longer knows your name" in body


def test_a_vote_and_an_undo_belong_to_the_visit_that_voted(site):
    site.begin("Owner")
    assert site.call("choose-first", [None, 0], "Owner")[0] == 200
    kept = site.votes("Owner")
    forged = {"name": "Owner", "voted": [0]}
    assert site.call("choose-undo", [forged], "stranger")[0] == 500  # what it says of itself does not count
    assert site.call("choose-second", [forged, 1], "stranger")[0] == 500
    site.call(None, ["owner"], "another visit")  # under the same name
    status, body = site.call("choose-undo", [forged], "another visit")
    assert status == 200 and "There is nothing to undo." in body
    assert site.votes("Owner") == kept and len(kept) == 1
    assert "Undone" in site.call("choose-undo", [None], "Owner")[1] and site.votes("Owner") == []


def test_a_function_that_does_not_exist_is_one_line_in_the_log(site, caplog):
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(site.url).netloc, timeout=20)
    body = json.dumps({"data": [], "fn_index": 999, "session_hash": "x"})
    connection.request("POST", "/gradio_api/run/predict", body, {"Content-Type": "application/json"})
    assert connection.getresponse().status == 500
    assert [record.getMessage() for record in caplog.records] == ["POST /gradio_api/run/predict failed: KeyError: 999"]
    assert caplog.records[0].exc_info is None


def test_a_vote_that_cannot_be_saved_is_told_and_tells_no_path(site, monkeypatch, caplog):
    def full(entries):
        raise OSError(28, "No space left on device", str(site.path))

    site.begin("Full")
    monkeypatch.setattr(site.ballots._journal, "append", full)
    status, body = site.call("choose-first", [None, 0], "Full")
    assert status == 500 and "could not be saved: see the server" in body
    assert not [secret for secret in SECRETS if secret in body] and "No space left" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"host": "0.0.0.0"}, "host 0.0.0.0 lets other machines in: set auth, or ALPACA_AUTH in the"),
        ({"auth": "user"}, "auth, or ALPACA_AUTH in the environment, must be user:password"),
        ({"port": 70_000}, "port 70000 cannot be used"),
        ({"output_path": "no/votes.jsonl"}, "must be a file in an existing folder"),
    ],
)
def test_a_bad_flag_is_told_and_leaves_nothing(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        judge_page.serve(ITEMS, SPARROW, RAVEN, **{"output_path": "votes.jsonl"} | flags)
    assert message in str(error.value) and not os.listdir(tmp_path)
