"""What servers refuse and how they say it: one row for each dialect that was seen in public."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import json
import os
import re
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter

import pytest
from conftest import assert_user_error
from hypothesis import given, settings
from hypothesis import strategies as st
from test_client import ask
from tqdm import tqdm

from alpaca import UserError
from alpaca.endpoint import client, transport
from alpaca.endpoint.client import Answerer, OpenAIDecodingArguments, Teacher
from alpaca.endpoint.dialects import Fault, Settings, finish_reason, masked, read_fault, read_reply

quick = settings(deadline=None, database=None, max_examples=200)


def in_turn(asked: Teacher, prompts, seed: int | None = None) -> list:
    """Return the replies to prompts of which each is sent after the reply to the last one."""

    async def each():
        try:
            return [await asked.ask(prompt, seed) for prompt in prompts]
        finally:
            await asked.close()

    return asyncio.run(each())


def openai_error(message, param=None, code=None) -> dict:
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


# ---------------------------------------------------------------------------------------------------------------------
# Sending: what a server refuses is left out, renamed or halved, once and for good.

BOTH = "`temperature` and `top_p` cannot both be specified for this model."
EXTRA = {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}
RENAME = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
SHORT = "This model's maximum context length is 2048 tokens. However, you requested 3072 tokens."
SHORTER = (
    "'max_tokens' or 'max_completion_tokens' is too large: 3072. This model's maximum context length is 1024 tokens."
)
TGI = "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 2048. Given: 99 `inputs` tokens"
GROQ = "Request too large for model `m` on tokens per minute (TPM): Limit 1200, Requested 3072"
BEDROCK = "The maximum tokens you requested exceeds the model limit of 1000."
VERTEX = "it has a maxOutputTokens value of 3072 but the supported range is from 1 (inclusive) to 1001 (exclusive)."


def too_many(body) -> bool:
    return body.get("max_tokens", 0) > 1000


@pytest.mark.parametrize(
    ("refuses", "status", "error", "changed"),
    [
        (lambda b: {"temperature", "top_p"} <= b.keys(), 400, openai_error(BOTH), ["top_p left out"]),
        (lambda b: "seed" in b, 422, {"object": "error", "message": EXTRA, "param": None}, ["seed left out"]),
        (lambda b: "seed" in b, 422, EXTRA, ["seed left out"]),
        (lambda b: "seed" in b, 400, [openai_error('Unknown name "seed": Cannot find field.')], ["seed left out"]),
        (lambda b: b.get("temperature") == 0.5, 422, {"error": "`temperature` is odd"}, ["temperature left out"]),
        (
            lambda b: b.get("temperature") == 0.5,
            400,
            openai_error("Not that.", "temperature"),
            ["temperature left out"],
        ),
        (lambda b: "stop" in b, 400, b"Setting stop: not implemented", ["stop left out"]),
        (
            lambda b: "response_format" in b,
            400,
            {"detail": "response_format is unsupported"},
            ["response_format left out"],
        ),
        (lambda b: "max_tokens" in b, 400, openai_error(RENAME), ["max_tokens sent as max_completion_tokens"]),
        (
            lambda b: "max_tokens" in b,
            400,
            openai_error("no", "max_tokens", "unsupported_parameter"),
            ["max_tokens sent as max_completion_tokens"],
        ),
        (too_many, 400, openai_error("max_tokens is too large: 3072", "max_tokens"), ["max_tokens halved to 768"]),
        (too_many, 400, openai_error("the valid range of max_tokens is [1, 1000]"), ["max_tokens halved to 768"]),
        (
            too_many,
            400,
            {"message": SHORT, "code": 400},
            ["max_tokens lowered to 768 after prompts of 1 characters or more"],
        ),
        (too_many, 400, {"error": SHORTER}, ["max_tokens lowered to 768 after prompts of 1 characters or more"]),
        (too_many, 422, {"error": TGI}, ["max_tokens lowered to 768 after prompts of 1 characters or more"]),
        (too_many, 413, openai_error(GROQ), ["max_tokens lowered to 768 after prompts of 1 characters or more"]),
        (too_many, 400, {"message": BEDROCK}, ["max_tokens halved to 768"]),
        (too_many, 400, [openai_error(VERTEX)], ["max_tokens halved to 768"]),
        (
            lambda b: b.get("temperature") == 0.5,
            400,
            openai_error("temperature is not supported in this context"),
            ["temperature left out"],
        ),
    ],
)
def test_a_refused_setting_is_found_in_the_param_the_loc_or_the_words(teacher, refuses, status, error, changed):
    server = teacher(lambda n, body: (status, error) if refuses(body) else "ok")
    way = {"temperature": 0.5, "top_p": 0.9, "stop": ["x"], "response_format": {"type": "json_object"}}
    replies = ask(server, "abc", seed=1, **way)
    assert [reply.text for reply in replies] == ["ok"] * 3
    assert replies[-1].changed == changed
    before = len(server.requests)
    assert sum(refuses(body) for body in server.requests) <= 3 * len(changed) * 2 and before <= 9


def test_what_was_learned_holds_for_the_next_request(teacher):
    server = teacher(lambda n, body: (422, EXTRA) if "seed" in body else "ok")
    asked = Teacher("m", OpenAIDecodingArguments(), settings=client.RequestSettings(server.base_url))
    assert [reply.text for reply in in_turn(asked, "ppp", 1)] == ["ok"] * 3
    assert ["seed" in body for body in server.requests] == [True, False, False, False]


def test_a_prompt_that_needs_more_tokens_leaves_those_of_the_others(teacher):
    words = "Could not finish the message: try again with higher max_tokens."
    server = teacher(lambda n, body: (400, openai_error(words)) if "sea" in str(body["messages"]) else "ok")
    asked = Teacher("m", OpenAIDecodingArguments(800), settings=client.RequestSettings(server.base_url))
    assert [reply.text or reply.error for reply in in_turn(asked, ("sea", "land"))] == [f"HTTP 400: {words}", "ok"]
    assert [body["max_tokens"] for body in server.requests] == [800, 400, 200, 100, 50, 800]


@pytest.mark.parametrize("words", ["Your prompt 'the temperature at sea' was flagged", "Please stop asking for that."])
def test_a_word_in_the_refusal_of_one_prompt_costs_the_others_no_setting(teacher, words):
    server = teacher(lambda n, body: (400, openai_error(words)) if "sea" in str(body["messages"]) else "ok")
    wanted = client.RequestSettings(server.base_url)
    asked = Teacher("m", OpenAIDecodingArguments(temperature=0.5, stop=["x"]), settings=wanted)
    assert [reply.text or reply.error for reply in in_turn(asked, ("sea", "land"))] == [f"HTTP 400: {words}", "ok"]
    assert [("temperature" in body, "stop" in body) for body in server.requests][-1] == (True, True)


def test_extra_body_is_sent_as_it_is_and_never_left_out(teacher):
    server = teacher(lambda n, body: (400, openai_error("no top_k here", "top_k")))
    wanted = client.RequestSettings(server.base_url, extra_body='{"top_k": 40, "temperature": 0.1}')
    asked = Teacher("m", OpenAIDecodingArguments(temperature=0.5), settings=wanted)
    assert in_turn(asked, "p")[0].error == "HTTP 400: no top_k here"
    assert [(body["top_k"], body["temperature"]) for body in server.requests] == [(40, 0.1)]
    for wrong in ("{", "[1]", "top_k"):
        assert_user_error(
            lambda wrong=wrong: client.RequestSettings(extra_body=wrong), "extra_body is not a JSON object"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Errors: the server's own words, whatever the shape of the body.

WORDS = "the region is not supported"


@pytest.mark.parametrize(
    "body",
    [
        {"error": WORDS},
        {"error": {"message": WORDS, "code": "x"}},
        {"detail": WORDS},
        {"detail": [{"loc": ["body"], "msg": WORDS}]},
        [{"error": {"code": 400, "message": WORDS, "status": "INVALID_ARGUMENT"}}],
        {"object": "error", "message": {"detail": [{"loc": ["body", "x"], "msg": WORDS}]}},
        {"type": "error", "error": {"type": "invalid_request_error", "message": WORDS}},
        {"errors": [{"code": 1000, "message": WORDS}], "success": False},
        {"message": WORDS},
        WORDS,
        WORDS.encode(),
        f"<!DOCTYPE html><html><head><style>p {{}}</style></head><body><p>{WORDS}</p></body></html>".encode(),
    ],
)
@pytest.mark.parametrize("status", [400, 418, 500])
def test_the_servers_words_are_shown_from_every_shape_of_body(teacher, body, status):
    [reply] = ask(teacher(lambda n, _: (status, body)))
    page = "a web page: " if isinstance(body, bytes) and b"html" in body else ""
    assert reply.error == f"HTTP {status}: {page}{WORDS}"


def test_a_status_without_words_has_http_own_name(teacher):
    assert ask(teacher(lambda n, body: (500, b"")))[0].error == "HTTP 500: Internal Server Error"


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, {"error": "expired"}, "refused the key: check OPENAI_API_KEY (HTTP 401: expired)"),
        (402, {"error": "pay first"}, "has no credit left: add some, or use another key (HTTP 402: pay first)"),
        (400, openai_error("Your credit balance is too low"), "has no credit left"),  # Anthropic
        (
            429,
            openai_error("You exceeded", code="insufficient_quota"),
            "or use another key (HTTP 429: You exceeded)",
        ),
        (403, {"error": WORDS}, f"does not let you use 'm': use another key or model (HTTP 403: {WORDS})"),
        (451, {"detail": WORDS}, f"does not let you use 'm': use another key or model (HTTP 451: {WORDS})"),
        (404, b"<html>nginx</html>", "has no model 'm', or no chat endpoint"),
        (400, {"detail": "Server is pinned to 'a'; requested 'm'."}, "has no model 'm', or no chat endpoint"),
        (400, openai_error("The model x does not exist"), "has no model 'm', or no chat endpoint"),
    ],
)
def test_what_all_requests_would_meet_ends_the_run_in_the_servers_words(teacher, status, body, said):
    server = teacher(lambda n, _: (status, body))
    assert_user_error(lambda: ask(server, max_retries=5), server.base_url, said)
    assert len(server.requests) == 1


def test_a_prompt_that_was_flagged_first_does_not_end_the_run(teacher):
    words = "m requires moderation and your input was flagged"
    assert ask(teacher(lambda n, _: (403, {"error": {"message": words}})))[0].error == f"HTTP 403: {words}"


def test_a_refusal_after_a_success_may_be_of_one_prompt_alone(teacher):
    server = teacher(lambda n, body: (403, {"error": "flagged"}) if "b" in str(body["messages"]) else "ok")
    asked = Teacher("m", OpenAIDecodingArguments(), settings=client.RequestSettings(server.base_url))
    assert [reply.text or reply.error for reply in in_turn(asked, "abc")] == ["ok", "HTTP 403: flagged", "ok"]


@pytest.mark.parametrize(
    "said",
    [
        "Incorrect API key provided: sk-proj-Abc123456789xyz.",
        "Incorrect API key provided: sk-proj-********9xyz.",
        "key=sk-proj-Abc123456789xyz&x",
        "bad token Abc1234",
        'the header was "Bearer sk-proj-Abc123456789xyz"',
        *("sk-p...9xyz", "sk-p…9xyz", "sk-pxxxxxxxxx9xyz", "sk**9xyz"),
    ],
)
def test_no_part_of_the_key_is_shown(said):
    shown = masked(said, "sk-proj-Abc123456789xyz")
    assert not any(part in shown for part in ("Abc12", "9xyz", "sk-pr")) and "…" in shown


@pytest.mark.parametrize(
    ("url", "key", "hidden"),
    [
        ("//user:hunter%402@", "", ["hunter@2", "hunter%402", base64.b64encode(b"user:hunter@2").decode()]),
        ("//", "sk-Abc/12+34=9", ["sk-Abc/12+34=9", "sk-Abc%2F12%2B34", base64.b64encode(b"sk-Abc/12+34=9").decode()]),
        ("//?key=AIzaSecret7&api-version=2024-06-01", "", ["AIzaSecret7"]),
    ],
)
def test_no_secret_of_the_address_or_the_header_is_shown(teacher, monkeypatch, url, key, hidden):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server = teacher(lambda n, _: (422, {"error": f"for api-version 2024-06-01: {' '.join(hidden)}"}))
    before, _, query = url.partition("?")
    [reply] = ask(server.base_url.replace("//", before) + f"?{query}" * bool(query))
    assert reply.error == "HTTP 422: for api-version 2024-06-01: " + " ".join("…" for _ in hidden)


def test_half_of_a_surrogate_pair_in_an_error_or_a_name_becomes_a_question_mark(teacher):
    assert ask(teacher(lambda n, _: (418, b'{"error": "half \\ud83d"}')))[0].error == "HTTP 418: half ?"
    named = {**reply_of({"content": "ok"}), "model": "m\ud83d"}
    assert ask(teacher(lambda n, _: (200, named)))[0].model == "m?"


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"error": {"message": "overloaded", "code": 502}}, "HTTP 502: overloaded"),
        ({"error": "out of memory"}, "error with HTTP 200: out of memory"),
        (b"<!DOCTYPE html><title>Sign in</title>", "unreadable reply (a web page: Sign in)"),
        (b'data: {"choices": []}\n\ndata: [DONE]\n\n', 'unreadable reply (data: {"choices": []} data: [DONE])'),
        (b"[1, 2]", "error with HTTP 200: no choices"),
        ({"detail": "loading"}, "error with HTTP 200: loading"),
        ({"success": False, "errors": [{"code": 7, "message": "no"}]}, "error with HTTP 200: no"),
        (b"", "unreadable reply (empty body)"),
    ],
)
def test_an_error_with_status_200_is_that_error_and_costs_nothing(teacher, body, error):
    [reply] = ask(teacher(lambda n, _: (200, body)))
    assert reply.error.startswith(error) and (reply.prompt_tokens, reply.completion_tokens) == (0, 0)


@quick
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from(["error", "message", "detail", "loc", "code", "param", "msg", "status", "x"]), x)))  # fmt: skip
def test_any_error_body_is_read(body):
    fault = read_fault(json.dumps(body).encode())
    assert isinstance(fault.words, str) and (fault.status is None or 400 <= fault.status < 600)
    masked(fault.words, "sk-1234567")


@quick
@given(st.binary(max_size=200))
def test_any_bytes_are_read_as_an_error(data):
    assert isinstance(masked(read_fault(data).words), str)


# ---------------------------------------------------------------------------------------------------------------------
# Reading.


@pytest.mark.parametrize(
    ("spelled", "ours"),
    [
        *[(reason, "stop") for reason in ("stop", "STOP", "eos", "end_turn", "completed", "normal", "something new")],
        *[
            (reason, "length")
            for reason in ("length", "MAX_TOKENS", "max_tokens", "model_length", "FINISH_REASON_LENGTH")
            + ("model_context_window_exceeded", "max_completion_tokens")
        ],
        *[(reason, "content_filter") for reason in ("content_filter", "SAFETY", "RECITATION", "guardrail_intervened")],
        *[(reason, "error") for reason in ("error", "abort", "cancelled")],
        *[(reason, None) for reason in (None, "", " ", 3, ["stop"])],
    ],
)
def test_a_finish_reason_has_one_spelling(spelled, ours):
    assert finish_reason(spelled) == ours


def reply_of(message, reason="stop", usage=None) -> dict:
    return {"choices": [{"message": message, "finish_reason": reason}], "usage": usage}


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab"),
        (
            {
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                    {"type": "text", "text": "a"},
                ]
            },
            "a",
        ),
        ({"content": ["a", {"type": "output_text", "text": "b"}, {"type": "image_url"}, None]}, "ab"),
        ({"content": None, "refusal": "I will not."}, "I will not."),
        ({"content": "<think>\ndraft\n</think>\n\nanswer"}, "answer"),
        ({"content": "answer", "reasoning_content": "hm"}, "answer"),
        ({"content": "answer<|im_end|>"}, "answer"),
        ({"content": "answer </s>\n<|eot_id|>\n"}, "answer"),
        ({"content": "the tag </s> ends it"}, "the tag </s> ends it"),
        ({"content": {"text": "a"}}, "a"),
        ({"content": functools.reduce(lambda inner, _: [{"text": inner}], range(480), "deep")}, ""),
        ({}, ""),
        (None, ""),
    ],
)
def test_a_text_is_read_from_parts_fields_and_thoughts(message, text):
    assert read_reply(reply_of(message)).text == text


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 4}, (3, 4)),
        ({"prompt_tokens": 3.0, "completion_tokens": 4.0}, (3, 4)),
        ({"input_tokens": 3, "output_tokens": 4}, (3, 4)),
        ({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}, (3, 4)),
        ({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 99}, (3, 96)),  # thoughts in the total alone
        ({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": float("nan")}, (3, 4)),
        ([{"prompt_tokens": 3, "completion_tokens": 4}], (3, 4)),
        ([{"prompt_tokens": 3}], None),
        ({"prompt_tokens": None, "completion_tokens": None}, None),
        ({"prompt_tokens": 0, "completion_tokens": 0}, None),
        ({"prompt_tokens": float("inf"), "completion_tokens": 1}, None),
        ("many", None),
        (None, None),
    ],
)
def test_usage_of_any_shape_never_costs_a_text(usage, counts):
    reply = read_reply(reply_of({"content": "a"}, usage=usage))
    assert (reply.text, reply.usage) == ("a", counts)


@quick
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from(["choices", "message", "content", "refusal", "usage", "text", "type"]), x)))  # fmt: skip
def test_any_object_is_read_as_a_reply(body):
    reply = read_reply(body if isinstance(body, dict) else {"choices": [{"message": body}], "usage": body})
    assert isinstance(reply.text, str)


@pytest.mark.parametrize(
    ("message", "reason", "error"),
    [
        (
            {"content": None, "reasoning_content": "hm"},
            "stop",
            "no answer: the server returned all of the text as thoughts",
        ),
        (
            {"content": None, "reasoning": "hm"},
            "length",
            "no answer: all 5 tokens went into thoughts; allow more tokens",
        ),
        ({"content": "<think>\nhm"}, "MAX_TOKENS", "no answer: all 5 tokens went into thoughts; allow more tokens"),
        ({"content": "<think>\nhm"}, "stop", "no answer: the server returned all of the text as thoughts"),
        ({"content": None, "tool_calls": [{}]}, "tool_calls", "empty reply (finish_reason stop)"),
    ],
)
def test_thoughts_without_an_answer_are_a_failure_that_says_so(teacher, message, reason, error):
    usage = {"prompt_tokens": 7, "completion_tokens": 5}
    server = teacher(lambda n, body: (200, reply_of(message, reason, usage)))
    assert ask(server)[0].error == error and len(server.requests) == 1


def test_an_answer_that_is_empty_counts_only_if_it_ended(teacher):
    async def answer(server):
        asked = Answerer(
            "m", OpenAIDecodingArguments(), settings=client.RequestSettings(server.base_url), max_retries=0
        )
        reply = await asked.ask("p")
        await asked.close()
        return reply

    said = {
        reason: asyncio.run(answer(teacher(lambda n, body, r=reason: ("", r)))) for reason in ("eos", "length", None)
    }
    assert {reason: (reply.text, reply.error) for reason, reply in said.items()} == {
        "eos": ("", None),
        "length": (None, "empty reply (finish_reason length)"),
        None: (None, "empty reply (finish_reason None)"),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The transport: each fault by its true name, and one of many costs one request.


class Raw:
    """A server of raw bytes: ``answers`` in turn, then the last one for ever; None resets the connection.

    An answer is bytes, which end in "stall" if the connection is to stay open, or bytes and pauses in seconds.
    """

    def __init__(self, *answers):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        self.answers, self.connections = list(answers), []
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.connections.append(connection)
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection):
        connection.recv(100_000)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        with contextlib.suppress(OSError):  # the test may be over
            for part in [answer] if isinstance(answer, bytes) else answer or ():
                time.sleep(part) if isinstance(part, float) else connection.sendall(part)
        if not (isinstance(answer, bytes) and answer.endswith(b"stall")):
            connection.close()

    def close(self):
        for one in (self.socket, *self.connections):
            one.close()


@pytest.fixture
def raw():
    running = []

    def start(*answers) -> Raw:
        running.append(Raw(*answers))
        return running[-1]

    yield start
    for server in running:
        server.close()


GOOD = json.dumps(reply_of({"content": "ok"})).encode()
GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(GOOD) + GOOD


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"upstream connect error\r\n\r\n", "the response is not HTTP"),
        (b"HTTP/1.1 200 OK\r\nX-Upstream: caf\0e\r\nContent-Length: 2\r\n\r\n{}", "the response is not HTTP"),
        (b"", "connection closed"),
        (None, "connection reset by peer"),
        (GOOD[:-5], "connection closed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nstall", "timeout: the reply stalled for 0.3 s"),
    ],
)
def test_a_fault_of_the_transport_has_its_true_name_and_is_tried_again(raw, monkeypatch, answer, error):
    monkeypatch.setattr(transport, "IDLE", 0.3)
    assert ask(raw(answer).url)[0].error == error
    assert ask(raw(answer, GOOD).url, max_retries=1)[0].text == "ok"


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_white_space_before_a_reply_keeps_it_alive_and_a_slow_reply_is_no_stalled_one(raw, monkeypatch):
    """Proxies send it while the model thinks; and a reply that drips until the time is up has not stalled."""
    monkeypatch.setattr(transport, "IDLE", 0.2)
    body = json.dumps(reply_of({"content": "ok"})).encode()
    kept_alive = CHUNKED + b"1\r\n\n\r\n", 0.6, b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    assert ask(raw(kept_alive).url)[0].text == "ok"
    dripping = [CHUNKED, *[b"1\r\nx\r\n", 0.1] * 9]
    assert ask(raw(dripping).url, timeout=0.5)[0].error == "timeout"


@pytest.mark.parametrize("status", [301, 302, 307])
def test_a_redirect_that_loses_the_request_or_its_key_is_named(raw, status):
    second = b"405 Method Not Allowed" if status < 307 else b"401 Unauthorized"
    first = b"HTTP/1.1 %d Moved\r\nLocation: /v2/chat?key=SECRET\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    server = raw(first % status, b"HTTP/1.1 %s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % second)
    there = server.url.replace("/v1", "/v2/chat")
    assert_user_error(lambda: ask(server.url), f"{server.url} redirects to {there}: change base_url")
    kept = raw(first % 307, GOOD)
    assert ask(kept.url)[0].text == "ok"


def test_a_reply_that_takes_long_to_begin_is_not_stalled(teacher, monkeypatch):
    monkeypatch.setattr(transport, "IDLE", 0.1)
    assert ask(teacher(lambda n, body: time.sleep(0.5) or "late"))[0].text == "late"


def test_https_on_a_plain_port_and_an_unknown_certificate_are_named(raw, tmp_path):
    url = raw(b"HTTP/1.1 400 Bad Request\r\n\r\n").url.replace("http:", "https:")
    assert_user_error(lambda: ask(url), "no answer from", "TLS failed: if the server has none, use http://")
    name = tmp_path / "cert.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=x"]
    subprocess.run([*made, "-keyout", name, "-out", name], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(name)
    with socket.create_server(("127.0.0.1", 0)) as plain, context.wrap_socket(plain, server_side=True) as secure:

        def accept():
            try:
                secure.accept()
            except OSError:
                pass  # the client refuses the certificate

        threading.Thread(target=accept, daemon=True).start()
        url = f"https://127.0.0.1:{plain.getsockname()[1] if plain.fileno() > 0 else secure.getsockname()[1]}/v1"
        assert_user_error(lambda: ask(url), "certificate refused", "self-signed")


def test_a_host_that_does_not_exist_is_named():
    assert_user_error(lambda: ask("http://nowhere.invalid/v1"), "no answer from", "no such host")


def test_a_server_that_goes_away_in_mid_run_is_waited_for(teacher):
    """It may be starting again: only a run that has never been answered ends at once."""
    from alpaca.common.cli import free_port

    server, port = teacher(lambda n, body: "ok"), free_port()
    asked = Teacher("m", OpenAIDecodingArguments(), settings=client.RequestSettings(server.base_url, give_up_after=1.0))

    async def run():
        first = await asked.ask("p")
        asked.where = f"http://127.0.0.1:{port}/v1"  # nothing listens there
        try:
            await asked.ask("p")
        finally:
            await asked.close()
        return first

    with pytest.raises(UserError, match=r"no request has succeeded for \d s \(last error: connection refused\)"):
        asyncio.run(run())


def test_a_proxy_is_not_asked_for_this_machine_and_is_named_for_others(teacher, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = teacher(lambda n, body: "ok")
    assert ask(server)[0].text == "ok"
    assert ask(server.base_url.replace("127.0.0.1", "localhost"))[0].text == "ok"
    said = "no answer from", "connection refused, through the proxy of http_proxy"
    assert_user_error(lambda: ask("http://10.0.0.1/v1"), *said)


@pytest.mark.parametrize(
    ("key", "sent"),
    [("sk-1\n", "sk-1"), (" sk-1 ", "sk-1"), ("“sk-1”", None), ("sk—1", None), ("a\x00b", None), ("a b", None)],
)
def test_a_key_that_no_header_can_carry_is_refused_before_the_first_request(teacher, monkeypatch, key, sent):
    server = teacher(lambda n, body: "ok")
    if "\0" in key:
        monkeypatch.setattr(os, "environ", {**os.environ, "OPENAI_API_KEY": key})
    else:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    if sent:
        assert ask(server)[0].text == "ok"
        assert Counter(dict(server.headers[0]))["Authorization"] == f"Bearer {sent}"
    else:
        assert_user_error(lambda: ask(server), "OPENAI_API_KEY has ", "copy it again")
        assert not server.requests


def test_what_was_learned_survives_as_json():
    old, new = (Settings("m", OpenAIDecodingArguments(1000, top_p=0.5), {}) for _ in range(2))
    for words in ("no top_p", "max_tokens: use max_completion_tokens", "max_completion_tokens is too large"):
        assert old.learn("short", old.of("short", 1), Fault(words))
    assert old.learn("a long prompt", old.of("a long prompt", 1), Fault("context length"))
    old.succeeded("a long prompt")
    new.learned = json.loads(json.dumps(old.learned))
    for it in (old, new):
        assert it.of("short", 1) == {"seed": 1, "max_completion_tokens": 500}
        assert it.of("as long a prompt", 1) == {"seed": 1, "max_completion_tokens": 250}
    assert list(new.changed.values()) == [
        "top_p left out",
        "max_tokens sent as max_completion_tokens",
        "max_tokens halved to 500",
        "max_tokens lowered to 250 after prompts of 13 characters or more",
    ]


def test_a_warning_goes_above_a_progress_bar(teacher, capsys):
    with tqdm(total=2):
        assert ask(teacher(lambda n, body: (422, EXTRA) if "seed" in body else "ok"), seed=1)[0].text == "ok"
    assert "warning: m refused a setting: seed left out" in re.split("[\\r\\n]", capsys.readouterr().err)


def test_a_refusal_that_quotes_a_prompt_about_money_does_not_end_the_run(teacher):
    prompt = "Explain insufficient funds to a child."
    server = teacher(lambda n, body: (400, {"error": f"blocked: {prompt}"}))
    assert ask(server, [prompt])[0].error == f"HTTP 400: blocked: {prompt}"
