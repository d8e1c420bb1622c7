"""Completions from a real local server, with its faults, and many of them at once."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter

import pytest
from conftest import assert_user_error

from alpaca import UserError
from alpaca.common.journal import Journal
from alpaca.endpoint.budget import Budget, RequestSettings
from alpaca.endpoint.client import Completion, OpenAIDecodingArguments, Teacher
from alpaca.endpoint.parallel import Direct, ask_each, summarize
from alpaca.endpoint.run import recorded


def ask(teacher, prompts=("p",), api="chat", max_retries=0, timeout=30.0, seed=None, **decoding) -> list[Completion]:
    """All prompts at once; ``teacher`` is a server or a base URL. Prompt i is sent with seed + i."""
    settings = RequestSettings(getattr(teacher, "base_url", teacher), request_timeout=timeout)
    asked = Teacher("m", OpenAIDecodingArguments(**decoding), api, settings, max_retries)

    async def all_of_them():
        try:
            return await asyncio.gather(
                *(asked.ask(prompt, None if seed is None else seed + i) for i, prompt in enumerate(prompts))
            )
        finally:
            await asked.close()

    return asyncio.run(all_of_them())


def prompt_of(body: dict) -> str:
    return body["messages"][0]["content"] if "messages" in body else body["prompt"]


def test_a_chat_request_has_one_user_message_and_only_the_settings_that_are_set(teacher):
    server = teacher(lambda n, body: "hi")
    assert ask(server, max_tokens=9, seed=5) == [Completion("hi", "stop", 7, 5)]
    assert server.requests == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "p"}],
            "max_tokens": 9,
            "seed": 5,
        }
    ]


def test_a_completions_request_has_the_bare_prompt(teacher):
    server = teacher(lambda n, body: ("hi", "length"))
    assert ask(server, api="completions", stop=["\n\n"], temperature=0.5, top_p=1) == [Completion("hi", "length", 7, 5)]
    assert server.requests == [{"model": "m", "prompt": "p", "max_tokens": 3072, "temperature": 0.5, "stop": ["\n\n"]}]


def test_replies_come_in_the_order_of_the_prompts_and_prompt_i_has_seed_plus_i(teacher):
    def answer(n, body):
        time.sleep(0.3 * (prompt_of(body) == "a"))
        return f"{prompt_of(body)}{body['seed']}"

    server = teacher(answer)
    assert [reply.text for reply in ask(server, "abc", seed=7)] == ["a7", "b8", "c9"]


def test_no_prompts_give_no_replies(teacher):
    server = teacher(lambda n, body: "hi")
    assert ask(server, []) == [] and server.requests == []


def test_the_key_is_sent_and_a_server_of_ones_own_needs_none(teacher, monkeypatch):
    server = teacher(lambda n, body: "hi")
    assert ask(server)[0].text == "hi"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    ask(server)
    sent = [{name.lower(): value for name, value in headers.items()}.get("authorization") for headers in server.headers]
    assert sent == ["Bearer none", "Bearer sk-test"]


def test_a_login_in_the_address_is_sent_and_beside_a_key_refused_without_being_repeated(teacher, monkeypatch):
    server = teacher(lambda n, body: "hi")
    url = server.base_url.replace("//", "//user:p%40ss@")
    assert ask(url)[0].text == "hi"
    sent = {name.lower(): value for name, value in server.headers[0].items()}
    assert sent["authorization"] == "Basic dXNlcjpwQHNz"  # user:p@ss
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with pytest.raises(UserError, match="has user:password@, and OPENAI_API_KEY is set") as caught:
        ask(url)
    assert "ss@" not in str(caught.value) and "secret" not in str(caught.value) and len(server.requests) == 1


def test_the_base_url_of_the_environment_is_taken_when_none_is_given(teacher, monkeypatch):
    server = teacher(lambda n, body: "hi")
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    assert ask(None)[0].text == "hi"


def test_without_a_key_and_without_a_base_url_there_is_no_teacher():
    assert_user_error(lambda: Teacher("m", OpenAIDecodingArguments()), "no server to ask", "OPENAI_API_KEY", "base_url")


@pytest.mark.parametrize(
    "url",
    [
        *("localhost:8000", "127.0.0.1/v1", "ftp://x/v1", "http://", "http:///v1", "http://[::1", "http://x:99999/v1"),
        *("http://x:80:81/v1", "http://a b/v1", "http://x/v1\n"),
    ],
)
def test_what_is_no_url_is_refused_before_any_request(url):
    assert_user_error(
        lambda: Teacher("m", OpenAIDecodingArguments(), settings=RequestSettings(url)),
        "is not a URL",
        "http://127.0.0.1:8000/v1",
    )


@pytest.mark.parametrize(("status", "word"), [(401, "OPENAI_API_KEY"), (403, "'m'"), (404, "model_name")])
def test_what_no_retry_can_mend_ends_after_one_request_without_the_key(teacher, monkeypatch, status, word):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-7261")
    server = teacher(lambda n, body: status)
    with pytest.raises(UserError) as caught:
        ask(server, max_retries=5)
    assert (
        f"(HTTP {status}: fault {status})" in str(caught.value)
        and word in str(caught.value)
        and server.base_url in str(caught.value)
    )
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert "check api" not in str(caught.value) and "teacher" not in str(
        caught.value
    )  # judge.py judge has no such flag
    assert len(server.requests) == 1


def test_a_server_that_is_not_there_is_one_line(teacher):
    from alpaca.common.cli import free_port

    assert_user_error(
        lambda: ask(f"http://127.0.0.1:{free_port()}/v1", max_retries=1),
        "no answer from",
        "(connection refused): start the server",
    )


def test_faults_that_pass_are_tried_again(teacher):
    """Five prompts at once, each with its fault on the first try; then each gets its answer."""
    faults, tries = {"a": 429, "b": 500, "c": "reset", "d": "half", "e": 503}, Counter()

    def answer(n, body):
        prompt = prompt_of(body)
        tries[prompt] += 1
        return faults[prompt] if tries[prompt] == 1 else prompt.upper()

    replies = ask(teacher(answer), faults, max_retries=5)
    assert [reply.text for reply in replies] == ["A", "B", "C", "D", "E"]
    assert tries == {"a": 2, "b": 2, "c": 2, "d": 2, "e": 2}


def test_faults_that_stay_are_named_and_never_an_empty_answer(teacher):
    faults = {
        "HTTP 500: fault 500": 500,
        "HTTP 400: fault 400": 400,
        "connection closed": "half",
        "empty reply (finish_reason stop)": "null",
        "empty reply (finish_reason length)": ("", "length"),
        "empty reply (finish_reason None)": "empty",
        "unreadable reply (UnicodeDecodeError)": "garbage",
    }
    replies = ask(teacher(lambda n, body: faults[prompt_of(body)]), faults)
    assert [reply.error for reply in replies] == list(faults)
    assert {reply.text for reply in replies} == {None}


def test_retry_after_is_waited_for(teacher):
    """1.5 s; without it the first pause is at most 0.5 s."""
    server = teacher(lambda n, body: ("wait", 1.5) if n == 0 else "ok")
    assert ask(server, max_retries=1)[0].text == "ok"
    assert server.times[1] - server.times[0] >= 1.5


@pytest.mark.parametrize("fault", ["null", "empty", "garbage", ("", "content_filter")])
def test_a_reply_without_a_text_is_asked_for_again_with_another_seed_and_all_tries_are_paid_for(teacher, fault):
    server = teacher(lambda n, body: fault if n == 0 else "ok")
    [reply] = ask(server, max_retries=5, seed=7)
    paid = 1 if fault == "garbage" else 2  # nobody can read what that one cost
    assert reply == Completion("ok", "stop", 7 * paid, 5 * paid)
    assert [body["seed"] for body in server.requests] == [7, 8]


def test_a_reply_without_a_text_is_asked_for_twice_more_and_no_oftener(teacher):
    server = teacher(lambda n, body: "null")
    assert ask(server, max_retries=5)[0].error == "empty reply (finish_reason stop)"
    assert len(server.requests) == 3


def test_with_a_budget_a_reply_without_a_text_is_not_asked_for_again(teacher):
    server = teacher(lambda n, body: "null")
    settings = RequestSettings(server.base_url, request_timeout=30.0, max_total_tokens=10**9)
    asked = Teacher("m", OpenAIDecodingArguments(), "chat", settings)

    async def once():
        try:
            return await asked.ask("p")
        finally:
            await asked.close()

    assert asyncio.run(once()).error == "empty reply (finish_reason stop)"
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (" \n ", "empty reply (finish_reason stop)"),
        (("half a", "abort"), "cut off by the server"),
        (("half a", "error"), "cut off by the server"),
    ],
)
def test_what_is_blank_or_was_cut_off_by_the_server_is_a_failure(teacher, answer, error):
    assert ask(teacher(lambda n, body: answer))[0].error == error


def test_a_refusal_in_a_field_of_its_own_is_the_reply(teacher):
    server = teacher(lambda n, body: ("refusal", "I will not say."))
    assert ask(server) == [Completion("I will not say.", "stop", 7, 5)]
    assert len(server.requests) == 1


def test_a_key_in_the_address_is_not_repeated_in_an_error(teacher):
    url = teacher(lambda n, body: 401).base_url + "?key=SECRET"
    with pytest.raises(UserError) as caught:
        ask(url)
    assert "SECRET" not in str(caught.value) and "(HTTP 401" in str(caught.value)


def test_one_prompt_that_is_too_long_by_itself_does_not_shorten_the_replies_to_others(teacher):
    server = teacher(lambda n, body: ("context", 400) if prompt_of(body) == "long" else "ok")
    asked = Teacher(
        "m", OpenAIDecodingArguments(max_tokens=800), "chat", RequestSettings(server.base_url), max_retries=0
    )

    async def both():
        replies = [await asked.ask("long"), await asked.ask("short")]
        await asked.close()
        return replies

    assert [bool(reply.error) for reply in asyncio.run(both())] == [True, False]
    assert server.requests[-1]["max_tokens"] == 800


def test_a_reply_that_thought_until_its_length_was_over_is_not_asked_for_again(teacher):
    server = teacher(lambda n, body: ("", "length"))
    assert ask(server, max_retries=5)[0].error == "empty reply (finish_reason length)"
    assert len(server.requests) == 1


def test_a_setting_that_the_model_does_not_take_is_left_out_for_good_and_told_once(teacher, capsys):
    """As models that think before they answer: max_tokens has another name there, stop and temperature are fixed."""

    def answer(n, body):
        for name in ("max_tokens", "stop", "temperature"):
            if name in body:
                return "unsupported", name
        return "ok"

    server = teacher(answer)
    assert [reply.text for reply in ask(server, "abc", stop=["x"], max_tokens=9, temperature=0.0)] == ["ok"] * 3
    assert [body for body in server.requests if "temperature" not in body][-1] == {
        "model": "m",
        "messages": server.requests[-1]["messages"],
        "max_completion_tokens": 9,
    }
    told = sorted(line.partition("warning: ")[2] for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert told == [
        "m refused a setting: max_tokens sent as max_completion_tokens",
        "m refused a setting: stop left out",
        "m refused a setting: temperature left out",
    ]


def test_a_setting_that_is_refused_even_when_it_is_left_out_is_a_failure(teacher):
    server = teacher(lambda n, body: ("unsupported", "temperature"))
    assert ask(server, temperature=0.0)[0].error == "HTTP 400: no temperature here"
    assert len(server.requests) == 2


def test_a_servers_words_do_nothing_to_a_terminal(teacher):
    server = teacher(lambda n, body: ("unsupported", "x\x1b[2J"))
    assert ask(server)[0].error == "HTTP 400: no x\\x1b[2J here"


def test_an_account_without_credit_ends_at_once(teacher):
    server = teacher(lambda n, body: ("quota", 429))
    assert_user_error(lambda: ask(server), "has no credit left: add some, or use another key (HTTP 429: pay)")


def test_one_fault_leaves_the_other_replies(teacher):
    replies = ask(teacher(lambda n, body: 500 if prompt_of(body) == "b" else "ok"), "abc")
    assert [(reply.text, reply.error) for reply in replies] == [
        ("ok", None),
        (None, "HTTP 500: fault 500"),
        ("ok", None),
    ]


def test_a_reply_that_does_not_come_is_a_timeout(teacher):
    assert ask(teacher(lambda n, body: time.sleep(2) or "late"), timeout=0.2) == [Completion(None, error="timeout")]


def test_half_of_a_surrogate_pair_in_a_reply_becomes_a_question_mark(teacher):
    """A server that cuts a reply for its length can cut an emoji in two: no file could hold the half."""
    assert ask(teacher(lambda n, body: "tree \ud83c"))[0].text == "tree ?"
    assert ask(teacher(lambda n, body: "tree \U0001f333"))[0].text == "tree \U0001f333"


def test_a_context_that_is_too_long_halves_max_tokens_for_prompts_as_long(teacher):
    """Behind 4 characters 800 tokens do not fit, 400 neither, 200 do: the next starts there, a shorter one at 800.

    What is said to one prompt must not depend on which was asked before it: a run that is gone on with asks others.
    """

    def answer(n, body):
        return "fits" if body["max_tokens"] <= 250 or len(prompt_of(body)) < 4 else ("context", 400)

    server = teacher(answer)
    asked = Teacher(
        "m", OpenAIDecodingArguments(max_tokens=800), "chat", RequestSettings(server.base_url), max_retries=0
    )

    async def twice():
        replies = [await asked.ask(prompt) for prompt in ("long", "longer", "p")]
        await asked.close()
        return replies

    assert [reply.text for reply in asyncio.run(twice())] == ["fits"] * 3
    assert [body["max_tokens"] for body in server.requests] == [800, 400, 200, 200, 800]


def test_a_context_that_is_too_long_for_any_reply_is_a_failure(teacher):
    server = teacher(lambda n, body: ("context", 400))
    [reply] = ask(server, max_tokens=256)
    assert reply.error.startswith("HTTP 400: maximum context length")
    assert [body["max_tokens"] for body in server.requests] == [256, 128, 64]


def test_what_a_content_filter_took_is_a_failure_that_was_paid_for(teacher):
    assert ask(teacher(lambda n, body: ("", "content_filter"))) == [
        Completion(None, "content_filter", 7, 5, error="content filter")
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Many requests.


def collect(server, journal, count, concurrency=4, max_retries=0):
    """Asks "0", "1", … until ``count`` replies have been handed on; returns their texts or errors, in that order."""
    settings = RequestSettings(server.base_url, max_concurrency=concurrency)
    asked = Teacher("m", OpenAIDecodingArguments(), "chat", settings, max_retries=max_retries)
    budget, handed, arrived = Budget(settings), [], []
    count_it = budget.arrived
    budget.arrived = lambda reply, new: (arrived.append(new), count_it(reply, new))

    async def run():
        await Direct(
            asked,
            lambda i: (str(i), None),
            journal,
            budget,
            lambda reply: handed.append(reply.text or reply.error),
            lambda number, in_flight: len(handed) + in_flight < count,
        ).run()

    asyncio.run(run())
    return handed, arrived


def test_replies_are_handed_on_in_the_order_of_the_requests_whatever_the_order_of_arrival(teacher, tmp_path):
    def answer(n, body):
        time.sleep(random.random() / 20)
        return "r" + prompt_of(body)

    with Journal(tmp_path / "j") as journal:
        handed, arrived = collect(teacher(answer), journal, 40, concurrency=8)
        assert handed == [f"r{i}" for i in range(len(handed))] and len(handed) >= 40
        assert sorted(entry["i"] for entry in journal.entries) == list(range(len(handed)))
        assert arrived == [True] * len(handed)


def test_what_the_journal_holds_is_handed_on_and_not_asked_again(teacher, tmp_path):
    server = teacher(lambda n, body: "new" + prompt_of(body))
    with Journal(tmp_path / "j") as journal:
        journal.append({"i": i, "text": f"old{i}"} for i in (0, 1, 3))
        handed, arrived = collect(server, journal, 6, concurrency=1)
    assert handed == ["old0", "old1", "new2", "old3", "new4", "new5"]
    assert arrived == [False] * 3 + [True] * 3
    assert [prompt_of(body) for body in server.requests] == ["2", "4", "5"]


def test_requests_in_flight_are_as_many_as_allowed_and_no_more(teacher, tmp_path):
    now, most, lock = [0], [0], threading.Lock()

    def answer(n, body):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        return "x"

    with Journal(tmp_path / "j") as journal:
        collect(teacher(answer), journal, 24, concurrency=6)
    assert most[0] == 6


@pytest.mark.parametrize("answer", [429, ("wait", 60), 500])
def test_the_time_limit_ends_a_run_that_waits_to_send_again_and_keeps_what_it_has(teacher, tmp_path, answer):
    server = teacher(lambda n, body: "ok" if n == 0 else answer)
    settings = RequestSettings(server.base_url, time_limit=1.0, max_concurrency=1)
    with Journal(tmp_path / "j") as journal:
        asked, budget = Teacher("m", OpenAIDecodingArguments(), settings=settings), Budget(settings)
        replies = ask_each(asked, list("abc"), None, journal, budget)
        assert [reply and reply.text for reply in replies] == ["ok", None, None]
        assert budget.exhausted() == "the time limit of 1 s" and not budget.failures
        assert budget.seconds() < 5  # without the limit: 600 s, 60 s and 12 s


def test_the_bar_shows_on_80_columns_what_failed_and_what_it_costs(teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    server = teacher(lambda n, body: 400 if prompt_of(body) == "a" else "ok")
    settings = RequestSettings(server.base_url, prompt_price=1e4, completion_price=1e4)
    with Journal(tmp_path / "j") as journal:
        asked, budget = Teacher("m", OpenAIDecodingArguments(), settings=settings), Budget(settings)
        ask_each(asked, list("abc"), None, journal, budget)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "3/3 [" in last and last.endswith(", 1 failed, 3 replies, 24 tokens, $0.24, 0 in flight]")


def test_a_run_without_a_result_is_an_error(teacher, tmp_path):
    settings = RequestSettings(teacher(lambda n, body: 429).base_url, time_limit=0.5)
    with Journal(tmp_path / "j") as journal:
        asked, budget = Teacher("m", OpenAIDecodingArguments(), settings=settings), Budget(settings)
        replies = ask_each(asked, ["a"], None, journal, budget)
        assert_user_error(
            lambda: summarize("0 answers in x", replies, budget, journal, []),
            "the time limit of 0.5 s ended the run: 0 answers in x (1 not asked)",
        )


def test_an_error_that_no_retry_mends_leaves_the_other_replies_in_the_journal(teacher, tmp_path):
    def answer(n, body):
        if prompt_of(body) == "3":
            time.sleep(0.3)
            return 401
        return "ok"

    with Journal(tmp_path / "j") as journal:
        with pytest.raises(UserError, match="401"):
            collect(teacher(answer), journal, 10, concurrency=4)
        assert {0, 1, 2} <= {entry["i"] for entry in journal.entries} and all(
            entry["text"] == "ok" for entry in journal.entries
        )


def test_the_journal_of_an_older_version_is_read(tmp_path):
    """It named the settings that a server refuses "left_out"."""
    with Journal(tmp_path / "j") as journal:
        journal.append([{"i": 0, "text": "a", "finish_reason": "stop", "prompt_tokens": 7, "left_out": ["seed"]}])
        assert list(recorded(journal)) == [(0, Completion("a", "stop", 7))]
