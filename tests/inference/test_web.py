"""page.py: the live demo, in a real browser and called past it; what a model writes there is text."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent import futures
from types import SimpleNamespace

import browser
import peft
import pytest
import torch
import transformers
from browser import needs_browser, wait_until
from conftest import ROOT

import utils
from alpaca import UserError
from alpaca.chat_template import mark_trained, saved_template
from alpaca.inference.chat import next_turn, request_ids
from alpaca.inference.generate import answer_batch
from alpaca.inference.load import load
from alpaca.inference.web import asking
from alpaca.inference.web import page as web_page
from alpaca.inference.web import server as web_server

HOSTILE = (
    "<script>window.hit = 1</script> <img src=x onerror='window.hit = 1'> ${window.hit = 1} {{value}} "
    "[click](javascript:window.hit=1) ![far](http://192.0.2.1/far.png) & <b>not bold</b>"
)


TASKS = [("Give three tips.", "For sleep."), ("Count to ten.", "")]


class Model:
    """Writes by a script: "count" counts every 10 ms until ``stop``, all else says the input again."""

    def __init__(self):
        self.config = SimpleNamespace(max_position_embeddings=2_000, get_text_config=lambda: self.config)
        self.calls, self.running, self.all_stopped = [], 0, threading.Event()
        self.may_go_on, self.stop = threading.Event(), threading.Event()
        self.lock = threading.Lock()

    def write(self, ids, settings, stopped, on_cut):
        prompt = "".join(ids)
        with self.lock:
            self.calls.append((prompt, dataclasses.asdict(settings)))
            self.running += 1
            self.all_stopped.clear()
        try:
            if "\ncount" in prompt:
                for number in itertools.takewhile(lambda _: not (stopped() or self.stop.is_set()), itertools.count()):
                    yield f" {number}" if number else "0"
                    time.sleep(0.01)
            elif "\nmute" in prompt:  # only white space, which is held back
                while not stopped():
                    time.sleep(0.01)
            elif limit := re.search(r"\n(long|full)\n", prompt):
                yield limit[1]
                on_cut({"long": "max_new_tokens", "full": "context"}[limit[1]])
            elif "\nread" in prompt:  # a prompt, in a step that cannot be left
                self.may_go_on.wait(20)
            elif "\nfail" in prompt:
                raise RuntimeError("secret of the server")
            elif prompt.startswith("user: "):
                yield f"heard {prompt.count('user: ')}"
            else:
                said = re.search(r"### Input:\n(.*)\n\n### Resp", prompt, re.S)[1].strip()
                yield from re.findall(r"\s*\S+", said)
        finally:
            with self.lock:
                self.running -= 1
                if not self.running:
                    self.all_stopped.set()


class Scripted:
    """Stands in for Conversation, with a Model."""

    def __init__(self, model, tokenizer, settings):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.turns, self.cut = [], ""

    def ask(self, instruction, input, say, stopped):
        record = next_turn(self.turns, instruction, input)
        (ids,) = request_ids(self.tokenizer, saved_template(self.tokenizer), [record])
        held = ""  # white space, which is written only if more follows
        for piece in self.model.write(ids, self.settings, stopped, lambda limit: setattr(self, "cut", limit)):
            held += piece
            if text := held.rstrip():
                say(text)
                held = held[len(text) :]


class Words:
    """A tokenizer of words, each with the white space behind it."""

    eos_token_id = chat_template = None

    def __call__(self, texts, split_special_tokens, verbose):
        return {"input_ids": [re.findall(r"\S+\s*", text) for text in texts]}


class ChatWords(Words):
    """The same of a model that was trained with its own template: "user: … assistant: …"."""

    chat_template = mark_trained("roles")

    def apply_chat_template(self, conversations, add_generation_prompt, tokenize):
        lines = ((f"{message['role']}: {message['content']}\n" for message in one) for one in conversations)
        return ["".join(one) + "assistant:" for one in lines]

    def __call__(self, text, add_special_tokens):
        return {"input_ids": re.findall(r"\S+\s*", text)}


class Site:
    """A running page with a scripted model, and what it takes to ask it by HTTP."""

    def __init__(self, models=1, auth=None, tokenizers=(Words, Words)):
        self.model = Model()
        names = ["tiny <i>&</i> co", "other"][:models]
        models = [web_page.Model(name, self.model, kind()) for name, kind in zip(names, tokenizers, strict=False)]
        self.page = web_page.Demo(models, web_page.Settings()).page
        self.url = web_server.launch(self.page, "127.0.0.1", web_page.free_port(0), auth)

    def http(self, path, data=None, headers=None, method=None):
        """(status, body) of a request, JSON when there is data; nothing is followed or retried."""
        body = data if data is None or isinstance(data, bytes) else json.dumps(data).encode()
        host = urllib.parse.urlsplit(self.url).netloc
        connection = http.client.HTTPConnection(host, timeout=20)
        kind = {} if body is None else {"Content-Type": "application/json"}
        connection.request(method or ("GET" if body is None else "POST"), path, body, kind | (headers or {}))
        reply = connection.getresponse()
        return reply.status, reply.read().decode()

    def log_in(self, password="right"):
        """(status, headers for who is let in)"""
        request = f"username=ann&password={password}".encode()
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(self.url).netloc, timeout=20)
        connection.request("POST", "/login", request, {"Content-Type": "application/x-www-form-urlencoded"})
        reply = connection.getresponse()
        cookies = [value.partition(";")[0] for name, value in reply.getheaders() if name.lower() == "set-cookie"]
        return reply.status, {"Cookie": "; ".join(cookies)}

    def call(self, *data, headers=None):
        """What a program that calls the page's endpoint gets: (event, data) of the last message."""
        status, body = self.http("/gradio_api/call/answer", {"data": list(data)}, headers)
        assert status == 200, body
        _, stream = self.http(f"/gradio_api/call/answer/{json.loads(body)['event_id']}", headers=headers)
        return re.findall(r"event: (\w+)\ndata: (.*)\n", stream)[-1]


@pytest.fixture(scope="module", autouse=True)
def scripted():
    """The page talks with a Model here; real models are asked in other processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asking, "Conversation", Scripted)
        yield


@pytest.fixture(scope="module")
def sites():
    """``sites(models, auth)`` is a running page; made once for each."""
    made = {}

    def site(models=1, auth=None, fresh=False, tokenizers=(Words, Words)) -> Site:
        key = (models, auth, len(made) if fresh else None, tokenizers)
        made[key] = made.get(key) or Site(models, auth, tokenizers)
        return made[key]

    yield site
    for each in made.values():
        web_server.close(each.page)


class Visit(browser.Visit):
    """A page of the demo."""

    def ask(self, instruction, input=""):
        self.page.get_by_label("Input (optional)").fill(input)
        self.page.get_by_label("Instruction", exact=True).fill(instruction)
        self.page.get_by_label("Instruction", exact=True).press("Enter")


@pytest.fixture
def visit(chromium, sites):
    """``visit(url)`` opens a page."""
    visits = []

    def open_page(url=None, **kwargs) -> Visit:
        visits.append(Visit(chromium.new_page(), url or sites().url, **kwargs))
        return visits[-1]

    yield open_page
    for each in visits:
        each.close()


# ---------------------------------------------------------------------------------------------------------------------
# In the browser.


@needs_browser
def test_an_answer_grows_while_it_is_written_and_stop_ends_it(visit, sites):
    page, model = visit(), sites().model
    page.ask("count")
    page.see(re.compile(r" 20 "))
    assert model.running == 1 and "Answering" in page.page.locator(".status").first.inner_text()
    page.button("Stop").click()
    page.see("Stopped.", ".status")
    assert model.all_stopped.wait(10)
    before = page.text()
    page.ask("say", "A new one.")
    page.see("A new one.")
    assert " 20 " in before and page.text().endswith("A new one.")


@needs_browser
def test_an_answer_that_is_cut_off_says_at_what(visit, sites):
    page = visit()
    page.ask("full")
    page.see("Cut off at the end of what the model can read.", ".status")
    page.ask("long")
    page.see("Cut off at the longest answer.", ".status")
    page.ask("say", "whole")
    page.see("whole")
    page.see("Answered in", ".status")
    assert "Cut off" not in page.page.locator(".status").first.inner_text()


@needs_browser
def test_after_a_refusal_there_is_nothing_to_stop(visit, sites):
    page, refused = visit(), "button:has-text('Stop')[disabled]"
    page.ask("  ")
    page.page.get_by_text("Type an instruction first.").wait_for()
    page.page.locator(refused).wait_for()
    page.ask("count")
    page.see(re.compile(r" 5 "))
    page.button("Stop").click()
    page.see("Stopped.", ".status")
    assert sites().model.all_stopped.wait(10)


@needs_browser
def test_who_comes_to_a_full_line_is_told_and_has_nothing_to_stop(visit, sites):
    site = sites(fresh=True)
    page = visit(site.url)
    for _ in range(web_page.MAX_OF_ADDRESS):
        site.http("/gradio_api/call/answer", {"data": ["count", "", 512, 1, 1, 0]})
    page.ask("say", "too late")
    page.page.get_by_text("Requests of your address not answered yet: 20, no more at once.").wait_for()
    page.see("Stopped.", ".status")
    page.page.locator("button:has-text('Stop')[disabled]").wait_for()
    web_server.close(site.page)
    assert site.model.all_stopped.wait(10)


@needs_browser
def test_an_answer_has_to_be_stopped_before_the_next_question(visit, sites):
    page, model = visit(), sites().model
    page.ask("count")
    page.see(re.compile(r" 5 "))
    asked = len(model.calls)
    page.ask("say", "too early")
    page.page.wait_for_timeout(300)
    assert len(model.calls) == asked and model.running == 1
    page.see("Answering", ".status")
    page.button("Stop").click()
    page.see("Stopped.", ".status")
    page.ask("say", "the last word")
    page.see("the last word")
    page.see("Answered in", ".status")
    assert model.all_stopped.wait(10) and page.text().endswith("the last word")


@needs_browser
def test_a_request_that_waits_can_be_stopped(visit, sites):
    busy, waiting, model = [visit(), visit()], visit(), sites().model
    for page in busy:
        page.ask("count")
        page.see(re.compile(r" 5 "))
    before = len(model.calls)
    waiting.ask("say", "too late")
    waiting.see("Waiting: number 1 in line.", ".status")
    waiting.button("Stop").click()
    waiting.see("Stopped.", ".status")
    for page in busy:
        page.button("Stop").click()
    assert model.all_stopped.wait(10)
    waiting.page.wait_for_timeout(300)
    assert len(model.calls) == before


@needs_browser
def test_an_answer_can_be_reported_as_far_as_it_is_written(visit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = visit()
    page.ask("count")
    page.see(re.compile(r" 5 "))
    page.page.get_by_role("button", name="Report a harmful answer").click()
    page.button("Report").click()
    page.page.get_by_text("Saved in flagged.jsonl").wait_for()
    page.button("Stop").click()
    page.see("Stopped.", ".status")
    (record,) = utils.jload(tmp_path / "flagged.jsonl")
    assert record["answer"].startswith("0 1 2 3 4 5")


@needs_browser
def test_leaving_the_page_stops_its_answer(visit, sites):
    page, model = visit(), sites().model
    page.ask("count")
    page.see(re.compile(r" 5 "))
    page.page.goto("about:blank")
    assert model.all_stopped.wait(20)


@needs_browser
def test_what_a_model_or_a_visitor_writes_is_shown_as_text_and_runs_nowhere(visit):
    page = visit()
    page.ask(HOSTILE, HOSTILE)
    page.see("not bold")
    page.see("Answered in", ".status")
    for text in ("<script>window.hit = 1</script>", "onerror='window.hit = 1'>", "${window.hit = 1}", "{{value}}"):
        assert text in page.text()
    assert "[click](javascript:window.hit=1)" in page.text() and "& <b>not bold</b>" in page.text()
    assert page.page.locator(".answer :is(script, img, b, iframe, [href^=javascript])").count() == 0
    assert page.page.evaluate("window.hit") is None
    assert page.page.locator(".notice").first.inner_text().startswith("tiny <i>&</i> co was fine-tuned")


@needs_browser
def test_markdown_is_rendered(visit):
    page = visit()
    page.ask("say", "1. **one**\n2. two\n\n```python\nif a < b:\n    pass\n```\n[there](https://example.org)")
    page.see("there")
    page.see("Answered in", ".status")
    assert page.page.locator(".answer ol li").count() == 2
    assert page.page.locator(".answer pre code").inner_text() == "if a < b:\n    pass\n"
    assert page.page.locator(".answer li strong").inner_text() == "one"
    assert page.page.locator(".answer a").get_attribute("rel") == "noopener noreferrer nofollow"


@needs_browser
def test_a_long_answer_keeps_the_next_page_waiting_no_longer_than_its_turn(visit, sites):
    long, other, third = visit(), visit(), visit()
    long.ask("count")
    long.see(re.compile(r" 5 "))
    other.ask("say", "for the other")
    other.see("for the other")
    assert "other" not in long.text() and not re.search(r"\d", other.text())
    other.ask("count")
    other.see(re.compile(r" 5 "))
    third.ask("say", "for the third")
    third.see("Waiting: number 1 in line.", ".status")
    assert sites().model.running == 2
    long.button("Stop").click()
    third.see("for the third")
    other.button("Stop").click()
    assert sites().model.all_stopped.wait(10)


@needs_browser
def test_enter_asks_and_shift_enter_makes_a_line(visit, sites):
    page = visit()
    field = page.page.get_by_label("Instruction", exact=True)
    page.see("Enter asks, Shift+Enter makes a new line.", ".status")
    page.page.get_by_label("Input (optional)").fill("echo")
    field.fill("one")
    field.press("Shift+Enter")
    field.press_sequentially("two")
    field.press("Enter")
    page.see("echo")
    assert sites().model.calls[-1][0] == utils.format_prompt("one\ntwo", "echo")


@needs_browser
def test_an_example_fills_the_fields_and_asking_again_takes_another_seed(visit, sites):
    page, calls = visit(), sites().model.calls
    page.page.get_by_role("button", name="Sampling").click()
    assert page.page.get_by_label("Seed").input_value() == ""
    page.page.get_by_text("Sort these animals").first.click()
    page.page.wait_for_function("document.querySelectorAll('textarea')[1].value.startsWith('cat')")
    page.button("Answer").click()
    page.see("cat, elephant, mouse, horse")
    page.see("Answered in", ".status")
    before = len(calls)
    page.button("Answer").click()
    wait_until(lambda: len(calls) == before + 1)
    page.see("Answered in", ".status")
    assert calls[-1][0] == calls[-2][0] == utils.format_prompt(*web_page.EXAMPLES[-1])
    assert calls[-1][1]["seed"] != calls[-2][1]["seed"]


@needs_browser
def test_two_models_answer_side_by_side_with_one_seed(visit, sites):
    site = sites(models=2)
    page = visit(site.url)
    page.ask("say", "both of us")
    page.see("Answered in", ".status")
    assert [page.text(i).splitlines()[0] for i in range(2)] == ["A: tiny <i>&</i> co", "B: other"]
    assert all("both of us" in page.text(i) for i in range(2))
    assert site.model.calls[0] == site.model.calls[1]


@needs_browser
@pytest.mark.parametrize("models", [1, 2])
def test_a_phone_shows_the_page_without_scrolling_sideways(visit, sites, models):
    page = visit(sites(models=models).url, width=360)
    page.ask("say", "```\n" + "wide " * 60 + "\n```\n" + "x" * 200 + "\n\n|a|b|\n|-|-|\n|" + "y" * 90 + "|2|")
    page.see("Answered in", ".status")
    for section in ("Sampling", "Report a harmful answer"):
        page.page.get_by_role("button", name=section).click()
    page.page.get_by_label("What is wrong with it?").wait_for()
    assert page.is_as_wide_as_its_window()


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground_light_and_dark(visit, scheme):
    page = visit()
    page.page.emulate_media(color_scheme=scheme)
    page.page.reload()
    page.ask("say", "A `word` and\n```\ncode\n```\n> quoted\n\n[there](https://example.org)")
    page.see("there")
    page.see("Answered in", ".status")
    page.stands_out(scheme, "h1", ".notice", "textarea", "button.primary", ".status", ".answer :is(h2, code, a)", "pre")


def asked(site) -> list[str]:
    """What the model was asked last, a line for each message, without the answer that is to come."""
    return site.model.calls[-1][0].removesuffix("assistant:").splitlines()


@needs_browser
def test_a_model_that_was_trained_with_turns_is_asked_with_those_that_the_page_shows(visit, sites):
    site = sites(tokenizers=(ChatWords,))
    page = visit(site.url)
    assert "It remembers the conversation until you start a new one." in page.page.locator(".notice").first.inner_text()
    page.ask("First?", "about <b>it</b>")
    page.see("heard 1")
    first = ["user: First?", "", "### Input:", "about <b>it</b>"]
    assert asked(site) == first
    page.see("Answered in", ".status")
    fields = [page.page.get_by_label("Instruction", exact=True), page.page.get_by_label("Input (optional)")]
    assert [field.input_value() for field in fields] == ["", ""]
    page.ask("And?")
    page.see("heard 2")
    second = [*first, "assistant: heard 1", "user: And?"]
    assert asked(site) == second
    shown = page.text()
    places = [shown.index(text) for text in ("First?", "about <b>it</b>", "heard 1", "And?", "heard 2")]
    assert places == sorted(places)
    page.see("Answered in", ".status")
    page.button("New conversation").click()
    page.page.wait_for_function("!document.querySelector('.answer').innerText.includes('heard')")
    page.ask("Anew.")
    page.see("heard 1")
    assert asked(site) == ["user: Anew."] and "First?" not in page.text()


@needs_browser
def test_a_stopped_answer_and_a_refused_question_leave_the_conversation_as_the_page_shows_it(visit, sites):
    site = sites(tokenizers=(ChatWords,))
    page = visit(site.url)
    page.ask("all numbers,\ncount")
    page.see(re.compile(r" 5 "))
    page.button("Stop").click()
    page.see("Stopped.", ".status")
    assert site.model.all_stopped.wait(10)
    page.ask("w " * 1_000)
    page.page.get_by_text("reads at most 1,000 here: start a new conversation.").wait_for()
    field = page.page.get_by_label("Instruction", exact=True)
    assert field.input_value() == "w " * 1_000  # it can be shortened
    page.ask("Why did you stop?")
    wait_until(lambda: "Why" in site.model.calls[-1][0])
    question, count, said, why = asked(site)
    assert (question, count, why) == ("user: all numbers,", "count", "user: Why did you stop?")
    assert said.startswith("assistant: 0 1 2 3 4 5")
    page.see(said.removeprefix("assistant: "))  # it may have written more than was shown when it was stopped
    page.button("Stop").click()
    assert site.model.all_stopped.wait(10)


@needs_browser
def test_of_two_models_each_is_asked_in_its_own_way(visit, sites, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    site = sites(models=2, tokenizers=(ChatWords, Words))
    page = visit(site.url)
    notice = page.page.locator(".notice").first.inner_text()
    assert notice.endswith(
        "A remembers the conversation until you start a new one; B answers each instruction on its "
        "own and remembers nothing."
    )
    for text in ("one", "two"):
        page.ask(text, "said")
        page.see(f"heard {1 + (text == 'two')}")
        page.see("Answered in", ".status")
    prompts = {prompt for prompt, _ in site.model.calls[-2:]}
    assert utils.format_prompt("two", "said") in prompts
    assert any(prompt.startswith("user: one") and "assistant: heard 1\nuser: two" in prompt for prompt in prompts)
    assert "one" in page.text(0) and "one" not in page.text(1) and "heard" not in page.text(1)
    page.page.get_by_role("button", name="Report a harmful answer").click()
    page.button("Report").click()
    page.page.get_by_text("Saved in flagged.jsonl").wait_for()
    record, other = utils.jload(tmp_path / "flagged.jsonl")
    assert (record["instruction"], record["answer"]) == ("two", "heard 2")
    assert (other["model"], other["asked"]) == ("other", [])
    contents = [turn["content"] for turn in record["asked"]]
    assert contents == ["one\n\n### Input:\nsaid", "heard 1", "two\n\n### Input:\nsaid"]


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_a_long_conversation_stays_in_its_place_with_its_end_in_view(visit, sites, width, scheme):
    page = visit(sites(tokenizers=(ChatWords,)).url, width=width)
    page.page.emulate_media(color_scheme=scheme)
    page.page.reload()
    for number in range(1, 4):
        page.ask(f"Question {number}. " + "It has many words. " * 60)
        page.see(f"heard {number}")
        page.see("Answered in", ".status")
    box, last = page.page.locator(".prose.talk"), page.page.locator(".answer p").last
    assert box.evaluate("e => e.scrollHeight > e.clientHeight && e.clientHeight <= 0.6 * innerHeight + 1")
    inside = "([p, e]) => p.getBoundingClientRect().bottom <= e.getBoundingClientRect().bottom + 1"
    assert page.page.evaluate(inside, [last.element_handle(), box.element_handle()])
    assert page.is_as_wide_as_its_window()
    page.stands_out(scheme, ".asked", ".answer p")


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_holds_still_while_it_is_typed_in_and_says_at_once_that_it_asks(visit, sites, width):
    page = visit(width=width)
    page.page.locator("h1").wait_for()
    assert page.page.title() == page.page.locator("h1").inner_text() == "Ask an Alpaca model"
    places = "[...document.querySelectorAll('button')].map(e => e.getBoundingClientRect().y)"
    field = page.page.get_by_label("Instruction", exact=True)
    field.focus()
    before = page.page.evaluate(places)
    field.press_sequentially("c")
    assert page.page.evaluate(places) == before
    page.page.get_by_role("button", name="Sampling").click()
    page.page.get_by_label("Seed").wait_for()
    ys = page.page.locator("input[type=range]").evaluate_all("all => all.map(e => e.getBoundingClientRect().y)")
    assert len(ys) == 3 and (width == 390 or len(set(ys)) == 1)
    page.page.route("**/gradio_api/**", lambda route: None)  # the server says nothing more
    page.ask("count")
    page.see("Asking …", ".status")
    assert page.button("Stop").is_enabled()


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_buttons_can_be_read_when_they_are_off_and_when_they_are_on(visit, sites, scheme):
    page = visit()
    page.page.emulate_media(color_scheme=scheme)
    page.page.reload()
    page.page.locator("button:has-text('Stop')[disabled]").wait_for()
    page.stands_out(scheme, "button:disabled", "button.secondary:enabled")
    page.ask("count")
    page.see(re.compile(r" 5 "))
    page.stands_out(scheme, "button.stop:enabled", ".status")
    page.button("Stop").click()
    page.see("Stopped.", ".status")
    assert sites().model.all_stopped.wait(10)


@needs_browser
def test_every_field_and_button_has_a_name(visit):
    page = visit()
    for section in ("Sampling", "Report a harmful answer"):
        page.page.get_by_role("button", name=section).click()
    page.page.get_by_label("What is wrong with it?").wait_for()
    nameless = """() => [...document.querySelectorAll("button, input, textarea")].filter(
        e => e.checkVisibility() && !(e.innerText || e.ariaLabel || e.title || e.labels?.[0]?.innerText)
    ).map(e => e.outerHTML)"""
    assert page.page.evaluate(nameless) == []


@needs_browser
def test_copy_takes_the_answer_as_the_model_wrote_it(visit):
    page = visit()
    page.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.ask("say", "**bold** <i>")
    page.see("Answered in", ".status")
    page.button("Copy").click()
    wait_until(lambda: page.page.evaluate("navigator.clipboard.readText()") == "**bold** <i>")


@needs_browser
def test_an_error_is_told_and_keeps_the_servers_secrets(visit, caplog):
    page = visit()
    page.ask("fail")
    page.page.get_by_text("failed; the terminal of the server says why").wait_for()
    page.see("Stopped.", ".status")
    assert "secret" not in page.page.content() and "secret of the server" in caplog.text
    page.ask("  ")
    page.page.get_by_text("Type an instruction first.").wait_for()
    page.ask("many words", "w " * 1_000)
    page.page.get_by_text(re.compile("has 1,0.. tokens.*at most 1,000 here: shorten it")).wait_for()


@needs_browser
def test_a_report_is_a_line_of_json_on_this_machine(visit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = visit()
    page.ask("say", "something bad")
    page.see("Answered in", ".status")
    page.page.get_by_role("button", name="Report a harmful answer").click()
    page.page.get_by_label("What is wrong with it?").fill("rude <b>")
    page.button("Report").click()
    page.page.get_by_text("Saved in flagged.jsonl").wait_for()
    (record,) = utils.jload(tmp_path / "flagged.jsonl")
    settings = record.pop("settings")
    assert settings.keys() == {"max_new_tokens", "temperature", "top_p", "seed"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record.pop("time"))
    assert record == {
        "instruction": "say",
        "input": "something bad",
        "answer": "something bad",
        "model": "tiny <i>&</i> co",
        "model_path": "",
        "asked": [],
        "reason": "rude <b>",
    }


@needs_browser
def test_a_password_is_asked_for_and_needed(visit, sites):
    site = sites(auth=("ann", "right"))
    page = visit(site.url)
    assert site.http("/gradio_api/call/answer", {"data": []})[0] == 401
    assert site.http("/gradio_api/queue/join", {"data": [], "fn_index": 0, "session_hash": "x"})[0] == 401
    assert "tiny" not in site.http("/")[1]
    page.button("Login").wait_for()
    page.stands_out("light", "button.primary")
    for password in ("wrong", "right"):
        page.page.locator("input").nth(0).fill("ann")
        page.page.locator("input[type=password]").fill(password)
        page.page.get_by_role("button", name="Login").click()
        if password == "wrong":
            page.page.get_by_text("Incorrect Credentials").wait_for()
    page.ask("say", "come in")
    page.see("come in")


@needs_browser
def test_an_adapter_answers_on_two_pages_at_once_and_ctrl_c_ends_it(visit, tiny_llama, tmp_path):
    """A real model in its threads: each page gets what the adapter over its base says to it alone."""
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    torch.manual_seed(1)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2) if "lora_B" in name else None
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/gone"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    transformers.AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "adapter")

    def said(path, *given):
        model, tokenizer = load(path, "cpu", None, *given)
        ids = request_ids(tokenizer, "alpaca", [{"instruction": task, "input": input} for task, input in TASKS])
        beginnings = answer_batch(model, tokenizer, ids, web_page.Settings(40, 0))
        return [answer.text.strip().rstrip("\ufffd") for answer in beginnings]  # the last may be half a character

    server = subprocess.Popen(
        [sys.executable, str(ROOT / "chat.py"), "--model_path", "adapter", "--base_path", str(tiny_llama), "--web"]
        + "--port 0 --device cpu --temperature 0 --max_new_tokens 120".split(),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the server needs the others
    try:
        expected = said(tmp_path / "adapter", tiny_llama)
        assert len(set(expected)) == 2 and all(expected) and not set(expected) & set(said(tiny_llama))
        line, note = server.stdout.readline(), server.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert url and line.startswith("adapter at "), line + server.stderr.read()
        pages = [visit(url[0]) for _ in TASKS]
        for page, task in zip(pages, TASKS, strict=True):
            page.ask(*task)
        for page, text in zip(pages, expected, strict=True):
            page.see("Answered in", ".status")
            page.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
            page.page.bring_to_front()
            page.button("Copy").click()
            wait_until(lambda page=page: page.page.evaluate("navigator.clipboard.readText()"))
            assert page.page.evaluate("navigator.clipboard.readText()").strip().startswith(text)
        server.send_signal(signal.SIGINT)
        output, errors = server.communicate(timeout=30)
    finally:
        torch.set_num_threads(threads)
        server.kill()
    assert (server.returncode, output.splitlines()[-1]) == (0, "stopped"), errors
    assert str(tmp_path / "flagged.jsonl") in note and "Traceback" not in errors


# ---------------------------------------------------------------------------------------------------------------------
# Past the browser.

GOOD = ["say", "hello", 16, 0.5, 0.9, 3]


def test_a_program_that_asks_a_model_with_turns_begins_a_conversation_each_time(sites):
    site = sites(tokenizers=(ChatWords,))
    for _ in range(2):
        event, data = site.call(*GOOD)
        assert event == "complete" and "heard 1" in json.loads(data)[0]


def test_a_program_that_asks_gets_the_answer(sites):
    event, data = sites().call(*GOOD)
    assert event == "complete" and "hello" in json.loads(data)[0]
    expected = {"max_new_tokens": 16, "temperature": 0.5, "top_p": 0.9, "seed": 3}
    assert sites().model.calls[-1] == (utils.format_prompt("say", "hello"), expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({2: 10**6}, "greater than maximum value 512"),
        ({2: 0}, "less than minimum value 1"),
        ({2: "many"}, None),
        ({2: None}, None),
        ({2: [1]}, None),
        ({3: 1e300}, "greater than maximum value 2"),
        ({4: -1}, "less than minimum value 0.01"),
        ({5: -1}, "Seed must be a number from 0 to 2147483647."),
        ({5: "three"}, "Seed must be a number from 0 to 2147483647."),
        ({5: "3" * 5_000}, "Seed must be a number from 0 to 2147483647."),
        ({5: 2**80}, "Seed must be a number from 0 to 2147483647."),
        ({1: "w " * 2_000}, "tokens; tiny &lt;i&gt;&amp;&lt;/i&gt; co reads at most 1,000 here"),
        ({0: "half \ud83d"}, "half of a surrogate pair"),
        ({0: ""}, "Type an instruction first."),
        ({0: None}, "Type an instruction first."),
    ],
)
def test_a_program_is_bounded_as_a_visitor_is(sites, changed, message):
    before = len(sites().model.calls)
    event, data = sites().call(*(changed.get(i, value) for i, value in enumerate(GOOD)))
    assert event == "error" and (message is None or message in json.loads(data)["error"])
    assert len(sites().model.calls) == before


def test_without_a_seed_each_answer_gets_one():
    models = [asking.Model("m", Model(), Words())]
    seeds = [asking.check(models, [[]], "say", "hello", seed, 16, 0.5, 0.9) for seed in ("", "", "3")]
    assert seeds[0].seed != seeds[1].seed and seeds[2] == web_page.Settings(16, 0.5, 0.9, 3)


@pytest.mark.parametrize(
    ("path", "data", "status"),
    [
        ("/gradio_api/call/answer", b"x" * 300_000, 413),
        ("/gradio_api/queue/join", b"x" * 300_000, 413),
        ("/gradio_api/run/answer", {"data": GOOD}, 404),
        ("/wp-login.php", None, 404),
        ("/gradio_api/api/answer", {"data": GOOD}, 404),
        ("/gradio_api/upload", b"", 404),
        ("/gradio_api/component_server", {}, 404),
        ("/gradio_api/vibe-code", {}, 404),
        ("/gradio_api/file=/etc/passwd", None, 404),
        ("/gradio_api/proxy=http://192.0.2.1/", None, 404),
        ("/gradio_api/deep_link?session_hash=x", None, 404),
        ("/monitoring", None, 404),
        ("/logout", None, 404),  # which ends the logins of all who came in with the same name
        ("/static/../../../../../../../../etc/passwd", None, 403),
    ],
)
def test_what_the_page_does_not_need_is_not_there(sites, path, data, status):
    assert sites().http(path, data)[0] == status


def test_a_page_without_a_password_answers_to_the_names_of_this_machine_alone(sites):
    assert sites().http("/", headers={"Host": "attacker.example:80"})[0] == 400
    assert sites().http("/", headers={"Host": "localhost:1"})[0] == 200


@pytest.mark.parametrize(
    ("path", "data", "line"),
    [
        ("/gradio_api/queue/join", {"data": [], "fn_index": 999, "session_hash": "x"}, "failed: KeyError: 999"),
        ("/gradio_api/call/nothing", {"data": []}, "failed: FnIndexInferError: Could not infer function index for API"),
        ("/a%1b%5b2Jb", None, "GET /a\\x1b[2Jb: 404 Not here."),
    ],
)
def test_an_unknown_function_or_route_is_one_line_in_the_log(sites, caplog, capfd, path, data, line):
    status, body = sites().http(path, data)
    assert status in (404, 500) and len(body) < 60
    (record,) = caplog.records
    message = record.getMessage()
    assert line in message and "\n" not in message and "\x1b" not in message and record.exc_info is None
    assert "Traceback" not in capfd.readouterr().err


def test_what_a_page_loads_comes_from_this_server_alone(sites):
    def policy():
        return urllib.request.urlopen(sites().url).headers.get("Content-Security-Policy", "")

    wait_until(lambda: policy().startswith("default-src 'self'"))  # uvicorn takes it over within a second


def connect(site) -> socket.socket:
    address = urllib.parse.urlsplit(site.url)
    return socket.create_connection((address.hostname, address.port), timeout=20)


@pytest.mark.parametrize("length", ["", "Content-Length: 5\r\n"])
def test_a_body_is_counted_as_it_arrives_whatever_its_headers_say_and_leaves_no_memory_taken(length):
    """300 MB in chunks to the page's login, by somebody who has not logged in."""
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}, {str(ROOT / "tests" / "inference")!r}]
import test_web
print(test_web.Site(auth=("ann", "right")).url, flush=True); sys.stdin.read()
"""
    server = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True)
    try:
        site = SimpleNamespace(url=server.stdout.readline().strip())
        urllib.request.urlopen(site.url).read()
        head = f"POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\n{length}Transfer-Encoding: chunked\r\n"
        head += "Content-Type: application/x-www-form-urlencoded\r\n\r\n"
        before, chunk = memory_of(server.pid), b"10000\r\n" + b"x" * 65_536 + b"\r\n"
        with connect(site) as sender:
            sender.sendall(head.encode() + 5 * chunk)
            assert sender.recv(100).startswith(b"HTTP/1.1 413 "), "it is told before the end of what it sends"
            with contextlib.suppress(ConnectionError):  # it is closed when its time is over
                for _ in range(300_000_000 // len(chunk)):
                    sender.sendall(chunk)
            assert memory_of(server.pid) - before < 20e6
        assert urllib.request.urlopen(site.url).status == 200
    finally:
        server.kill()
        server.wait()


def memory_of(pid: int) -> int:
    """Bytes of a process that are in memory."""
    return int(re.search(r"VmRSS:\s+(\d+)", open(f"/proc/{pid}/status").read())[1]) * 1024


def test_requests_that_do_not_end_are_closed_and_whole_ones_are_answered(sites, monkeypatch):
    monkeypatch.setattr(web_server, "REQUEST_SECONDS", 1.0)
    halves = [
        b"GET / HT",
        b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
        b"",
    ]
    senders = [connect(sites()) for _ in range(40)]
    for sender, half in zip(senders, itertools.cycle(halves), strict=False):
        sender.sendall(half)
    event, data = sites().call(*GOOD)
    assert event == "complete" and "hello" in json.loads(data)[0]
    for sender in senders:
        with sender, contextlib.suppress(ConnectionResetError):
            assert sender.recv(1) == b""


def test_an_answer_may_take_longer_than_its_request(sites, monkeypatch):
    monkeypatch.setattr(web_server, "REQUEST_SECONDS", 0.2)
    site = sites()
    stopped = threading.Timer(1.0, site.model.may_go_on.set)
    stopped.start()
    assert site.call("read", "", 16, 0, 1, 0)[0] in ("complete", "error") and site.model.may_go_on.is_set()
    site.model.may_go_on.clear()


def test_connections_are_bounded(sites, monkeypatch):
    site = sites(fresh=True)
    monkeypatch.setattr(web_server, "MAX_CONNECTIONS", 5)
    senders = [connect(site) for _ in range(5)]
    with connect(site) as refused, contextlib.suppress(ConnectionResetError):
        assert refused.recv(1) == b""
    senders.pop().close()
    wait_until(lambda: answers_to_a_request(site))
    for sender in senders:
        sender.close()


def answers_to_a_request(site) -> bool:
    try:
        return site.http("/config")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://attacker.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "http://attacker.example", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "http://{host}"}, 200),
        ({"Origin": "https://demo.example", "X-Forwarded-Host": "demo.example"}, 200),
        ({"Origin": "https://demo.example", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 200),  # a link to this page
    ],
)
def test_a_page_of_another_site_is_not_answered(sites, headers, status):
    host = urllib.parse.urlsplit(sites().url).netloc
    headers = {name: value.replace("{host}", host) for name, value in headers.items()}
    assert sites().http("/config", headers=headers)[0] == status
    assert sites().http("/gradio_api/call/answer", {"data": GOOD}, headers)[0] == status


def test_attempts_and_questions_of_one_address_come_one_after_another_and_keep_nobody_else_waiting(monkeypatch):
    begun, ended = [], []

    async def app(scope, receive, send):
        begun.append(scope["client"][0])
        await asyncio.sleep(0.1)
        ended.append(scope["client"][0])

    async def attempts():
        guard = web_server.Guard(app)
        paths = ["/login", "/gradio_api/queue/join", "/gradio_api/call/answer", "/login/"]
        scopes = [{"path": path, "client": ("a", 1)} for path in paths]
        scopes += [{"path": "/login", "client": ("b", 1)}, {"path": "/gradio_api/run/predict", "client": ("a", 1)}]
        each = [{"type": "http", "method": "POST", "headers": []} | scope for scope in scopes]
        tasks = [asyncio.create_task(guard(scope, None, None)) for scope in each]
        await asyncio.sleep(0.05)
        assert begun == ["a", "b", "a"]  # the second of a is one that does not wait
        await asyncio.gather(*tasks)
        return dict(guard.busy)

    monkeypatch.setattr(web_server, "PAUSE", 0.1)
    with futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(asyncio.run, attempts()).result() == {}
    assert begun == ["a", "b", "a", "a", "a", "a"] and len(ended) == 6


def test_a_second_request_of_a_login_is_refused_until_the_first_is_answered(sites):
    site = sites(auth=("ann", "right"))
    mine, other = site.log_in()[1], site.log_in()[1]
    with futures.ThreadPoolExecutor(1) as pool:
        counting = pool.submit(site.call, "count", "", 512, 1, 1, 0, headers=mine)
        wait_until(lambda: site.model.running == 1)
        event, data = site.call(*GOOD, headers=mine)
        assert event == "error" and "Requests of your login not answered yet: 1, no more at once." in data
        assert site.call(*GOOD, headers=other)[0] == "complete" and site.model.running == 1
        site.model.stop.set()
        assert counting.result()[0] == "complete"
    site.model.stop.clear()
    assert site.call(*GOOD, headers=mine)[0] == "complete"


def drive(models, word, use):
    """Runs ``use(stream of answers)`` in a loop of its own."""

    async def run():
        left = threading.Event()
        try:
            return await use(asking.answers(models, [[]], (word, ""), web_page.Settings(seed=0), left.is_set))
        finally:
            left.set()

    with futures.ThreadPoolExecutor(1) as pool:  # the browser's loop runs in this one
        return pool.submit(asyncio.run, run()).result()


async def leave_soon(stream):
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(use_up(stream), 0.3)


async def use_up(stream):
    async for _ in stream:
        pass


def test_leaving_stops_a_model_whose_text_is_held_back():
    model = Model()
    drive([asking.Model("m", model, Words())], "mute", leave_soon)
    assert model.all_stopped.wait(10) and model.running == 0


def test_asking_and_stopping_in_turn_never_has_more_models_at_work_than_streams():
    model = Model()
    models = [asking.Model("m", model, Words())]
    for _ in range(asking.STREAMS + 1):  # the last one waits: the models are still reading
        drive(models, "read", leave_soon)
    assert len(model.calls) == model.running == asking.STREAMS
    model.may_go_on.set()
    assert model.all_stopped.wait(10)
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == web_server.WORKER])
    assert len(model.calls) <= asking.STREAMS + 1 and model.running == 0
    drive(models, "full", use_up)
    assert model.calls[-1][0].startswith(utils.format_prompt("full", "")[:20])


def test_who_asked_first_is_answered_first():
    model, ended = Model(), []

    async def ask(name, models):
        async for _ in asking.answers(models, [[]], ("read", name), web_page.Settings(seed=0), lambda: False):
            pass
        ended.append(name)

    async def scenario():
        models = [asking.Model("m", model, Words())]
        tasks, line = [], models[0].streams._cond
        for name in "abcdef":
            tasks.append(asyncio.create_task(ask(name, models)))
            while model.running + len(line._waiters) < len(tasks):
                await asyncio.sleep(0.01)
        model.may_go_on.set()
        await asyncio.gather(*tasks)

    with futures.ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, scenario()).result()
    order = [re.search(r"Input:\n(\w)", prompt)[1] for prompt, _ in model.calls]
    assert sorted(order) == list("abcdef")
    assert all(abs(place - "abcdef".index(name)) <= 1 for place, name in enumerate(order)), order  # two begin at once


def test_thirty_requests_of_one_login_keep_no_other_waiting(sites, monkeypatch):
    monkeypatch.setattr(web_server, "PAUSE", 0.0)
    site = sites(auth=("ann", "right"), fresh=True)
    greedy, other = site.log_in()[1], site.log_in()[1]
    for _ in range(30):
        assert site.http("/gradio_api/call/answer", {"data": ["count", "", 512, 1, 1, 0]}, greedy)[0] == 200
    for _ in range(3):
        assert site.call(*GOOD, headers=other)[0] == "complete"
    assert sum("\ncount" in prompt for prompt, _ in site.model.calls) == 1
    web_server.close(site.page)
    assert site.model.all_stopped.wait(10) and site.model.running == 0


def test_the_requests_of_one_address_are_bounded_and_end_with_the_server(sites, monkeypatch):
    monkeypatch.setattr(web_server, "PAUSE", 0.0)
    site = sites(fresh=True)
    for _ in range(web_page.MAX_OF_ADDRESS):
        site.http("/gradio_api/call/answer", {"data": ["count", "", 512, 1, 1, 0]})
    wait_until(lambda: [one.name for one in threading.enumerate()].count(web_server.WORKER) == web_page.MAX_OF_ADDRESS)
    event, data = site.call("count", "", 512, 1, 1, 0)
    assert event == "error" and "Requests of your address not answered yet: 20, no more at once." in data
    close = site.page.close

    def close_late(**kwargs):  # the two end while the others have still to be let go
        site.model.stop.set()
        assert site.model.all_stopped.wait(10)
        close(**kwargs)

    monkeypatch.setattr(site.page, "close", close_late)
    web_server.close(site.page)
    assert site.model.all_stopped.wait(10) and site.model.running == 0
    assert len(site.model.calls) == asking.STREAMS


def test_a_report_needs_an_answer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exchange = [{"answer": "", "model_path": path} for path in ("a/m", "b/m")]
    for bad in (None, [], exchange):
        with pytest.raises(web_page.gr.Error):
            web_page.flag(bad, "")
    assert not os.listdir(tmp_path)
    exchange[1]["answer"] = "half \ud83d"
    web_page.flag(exchange, None)
    exchange[0]["answer"] = "a"
    web_page.flag(exchange, "both")
    records = utils.jload("flagged.jsonl")
    assert [(record["reason"], record["model_path"]) for record in records] == [
        ("", "b/m"),
        ("both", "a/m"),
        ("both", "b/m"),
    ]
    assert os.stat("flagged.jsonl").st_mode & 0o777 == 0o600


def test_reports_from_many_threads_stay_whole_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exchange = [{"answer": "x" * 5_000}]
    threads = [threading.Thread(target=web_page.flag, args=(exchange, str(n))) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = utils.jload("flagged.jsonl")
    assert sorted(int(record["reason"]) for record in records) == list(range(20))
    assert {record["answer"] for record in records} == {"x" * 5_000}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"host": "0.0.0.0"}, "host 0.0.0.0 lets other machines in: set auth, or ALPACA_AUTH in the"),
        ({"host": "0.0.0.0", "auth": "user:"}, "auth, or ALPACA_AUTH in the environment, must be user:password"),
        ({"auth": ":password"}, "auth, or ALPACA_AUTH in the environment, must be user:password"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"port": 70_000}, "port 70000 cannot be used"),
    ],
)
def test_a_bad_flag_is_told_before_a_model_is_loaded(flags, words):
    with pytest.raises(UserError) as error:
        web_page.serve("no-such-folder", **flags)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_password_may_stand_in_the_environment_and_a_flag_comes_first(monkeypatch):
    monkeypatch.setenv("ALPACA_AUTH", "ann:right:er")
    assert web_server.check_exposure("0.0.0.0", None) == ("ann", "right:er")
    assert web_server.check_exposure("127.0.0.1", "bob:other") == ("bob", "other")
    monkeypatch.setenv("ALPACA_AUTH", "ann")
    with pytest.raises(UserError, match="ALPACA_AUTH in the environment, must be user:password"):
        web_server.check_exposure("127.0.0.1", None)
    monkeypatch.setenv("ALPACA_AUTH", "")
    assert web_server.check_exposure("127.0.0.1", None) is None


def test_a_port_in_use_is_one_line(sites):
    port = urllib.parse.urlsplit(sites().url).port
    with pytest.raises(UserError, match=f"port {port} cannot be used .*choose another"):
        web_page.serve("no-such-folder", port=port)


@pytest.mark.parametrize("page", ["inference.web.page", "judging.page"])
def test_without_gradio_one_line_says_how_to_get_it(monkeypatch, page):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for module in (page, "inference.web.server"):
        monkeypatch.delitem(sys.modules, f"alpaca.{module}", raising=False)
    with pytest.raises(UserError, match=r"a page in the browser needs Gradio: pip install -e '\.\[web\]'"):
        __import__(f"alpaca.{page}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_and_its_answers(monkeypatch, capsys, tmp_path, number):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(web_page, "load", lambda path, *_: (model, Words()))
    model, done = Model(), []

    def visitor():
        deadline = time.monotonic() + 20
        while not re.search("http://127.0.0.1:(\\d+)/", capsys_text := "".join(said)) and time.monotonic() < deadline:
            time.sleep(0.05)
        port = re.search("http://127.0.0.1:(\\d+)/", capsys_text)[1]
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/gradio_api/call/answer",
            json.dumps({"data": ["count", "", 512, 1, 1, 0]}).encode(),
            {"Content-Type": "application/json"},
        )
        done.append(urllib.request.urlopen(request).status)
        wait_until(lambda: model.running == 1)
        os.kill(os.getpid(), number)

    said = []
    monkeypatch.setattr("builtins.print", lambda *text, **_: said.append(" ".join(map(str, text))))
    previous = [(each, signal.getsignal(each)) for each in (signal.SIGINT, signal.SIGTERM)]
    thread = threading.Thread(target=visitor)
    thread.start()
    try:
        web_page.serve("a-model", port=0)
    finally:
        for each, handler in previous:
            signal.signal(each, handler)
    thread.join()
    assert done == [200] and said[-1] == "stopped" and model.all_stopped.wait(5)
