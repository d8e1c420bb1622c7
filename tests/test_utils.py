"""Prompts, JSON in and out, the command line, and completions from a real local server."""

from __future__ import annotations

import asyncio
import json
import os
import random
import stat
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from conftest import ROOT, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

import utils
from alpaca import UserError
from alpaca.cli import _typed_argv, run_cli
from alpaca.inflight import ask_all
from alpaca.journal import Journal

quick = settings(deadline=None, database=None, max_examples=60)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts.


def test_the_prompt_with_an_input_has_the_bytes_that_published_models_were_trained_on():
    assert utils.format_prompt("Add the numbers.", "2, 3") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd the numbers.\n\n### Input:\n"
        "2, 3\n\n### Response:"
    )


def test_the_prompt_without_an_input_has_the_bytes_that_published_models_were_trained_on():
    expected = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a tree.\n\n### Response:"
    )
    assert utils.format_prompt("Name a tree.") == expected
    assert utils.format_prompt("Name a tree.", "") == expected


def test_braces_in_a_record_are_text():
    assert "\n{input} {0} {{}}\n\n### Response:" in utils.format_prompt("{input} {0} {{}}")
    assert "\n### Input:\n{instruction}\n" in utils.format_prompt("x", "{instruction}")


# ---------------------------------------------------------------------------------------------------------------------
# JSON in and out.


def assert_user_error(call, *words: str) -> None:
    """The message is one line and has each of the words."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.json", b'[\n  {"a": 1},\n  {"a": }\n]', ["data.json, line 3: malformed JSON", "column 9"]),
        ("data.json", b"", ["data.json, line 1: malformed JSON"]),
        ("data.json", b'{"a": 1}\n{"a": 2}\n', ["line 2", "name it .jsonl"]),
        ("data.jsonl", b'{"a": 1}\n\n{"a": 2}\n{"a": \n', ["data.jsonl, line 4: malformed JSON"]),
        ("data.jsonl", b"{}\n" + b"[" * 200_000, ["data.jsonl, line 2: malformed JSON, nested too deeply"]),
        ("data.json", b"[" + b"1" * 5_000 + b"]", ["data.json: malformed JSON, a number with too many digits"]),
        ("data.json", b'{"a": 1}', ["a JSON dict, not a list", "[ ]"]),
        ("data.json", b'"text"', ["a JSON str, not a list"]),
        ("data.json", '["é"]'.encode("latin-1"), ["not UTF-8", "byte 2"]),
    ],
)
def test_a_file_that_is_no_json_list_is_refused_with_the_place(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert_user_error(lambda: utils.jload(tmp_path / name), *words)


def test_a_file_that_cannot_be_read_is_refused_with_its_path(tmp_path):
    assert_user_error(lambda: utils.jload(tmp_path / "no.json"), str(tmp_path / "no.json"), "does not exist")
    assert_user_error(lambda: utils.jload(tmp_path), str(tmp_path), "cannot be read")


def test_json_and_json_lines_are_read_with_or_without_a_byte_order_mark(tmp_path):
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "a.json").write_bytes(mark + '[{"a": "é"}]'.encode())
        (tmp_path / "a.jsonl").write_bytes(mark + '{"a": "é"}\r\n\n{"a": "x\u2028y"}'.encode())
        assert utils.jload(tmp_path / "a.json") == [{"a": "é"}]
        assert utils.jload(str(tmp_path / "a.jsonl")) == [{"a": "é"}, {"a": "x\u2028y"}]  # U+2028 ends no line


RECORD = {"instruction": "Name a tree.", "input": "", "output": "Oak."}


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], ["holds no records"]),
        ([RECORD, {"instruction": "x", "output": "y"}], ["record 2", 'no "input" field']),
        ([RECORD, RECORD, RECORD | {"output": 3}], ["record 3", 'a non-text "output" field']),
        ([RECORD | {"instruction": None}], ["record 1", 'a non-text "instruction" field']),
        ([RECORD, "text"], ["record 2", "a str where an object was expected"]),
    ],
)
def test_records_without_the_three_texts_are_refused_with_their_number(tmp_path, records, words):
    (tmp_path / "data.json").write_text(json.dumps(records))
    assert_user_error(lambda: utils.load_records(tmp_path / "data.json"), "data.json", *words)


def test_other_fields_of_a_record_are_kept(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([RECORD | {"avg_similarity_score": 0.1}]))
    assert utils.load_records(tmp_path / "data.json") == [RECORD | {"avg_similarity_score": 0.1}]


def test_what_is_written_is_indented_utf_8_that_reads_back(tmp_path):
    utils.jdump([{"a": "é"}], tmp_path / "new" / "a.json")
    assert (tmp_path / "new" / "a.json").read_bytes() == '[\n    {\n        "a": "é"\n    }\n]\n'.encode()
    assert utils.jload(tmp_path / "new" / "a.json") == [{"a": "é"}]


def test_half_of_a_surrogate_pair_is_written_as_ascii_and_reads_back(tmp_path):
    utils.jdump(["\ud800 é"], tmp_path / "a.json")
    assert (tmp_path / "a.json").read_bytes() == b'[\n    "\\ud800 \\u00e9"\n]\n'
    assert utils.jload(tmp_path / "a.json") == ["\ud800 é"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[1]")
    with pytest.raises(TypeError):
        utils.jdump(["x" * 100_000, object()], path)
    assert path.read_text() == "[1]"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_written_file_has_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        utils.jdump([], tmp_path / "a.json")
        assert os.umask(umask) == umask  # asking for the mask did not change it
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == mode


# ---------------------------------------------------------------------------------------------------------------------
# Command line.


@pytest.fixture
def cli(monkeypatch):
    """``cli(*argv)`` runs a command line; returns the values that the command got, or None when it did not run."""

    def call(*argv: str, task: str | None = None):
        got = []

        def show(
            text: str = "none",
            count: int = 1,
            rate: float = 0.5,
            web: bool = False,
            path: str | None = None,
            limit: float | None = None,
            node: bool = True,
        ) -> None:
            """Shows what it got."""
            got.append(dict(text=text, count=count, rate=rate, web=web, path=path, limit=limit, node=node))

        monkeypatch.setattr(sys, "argv", ["show.py", *([task] if task else []), *argv])
        run_cli({"show": show, "other": print} if task else show)
        return got[0] if got else None

    return call


@pytest.mark.parametrize("task", [None, "show"])
def test_without_flags_the_defaults_hold(cli, task):
    got = cli(task=task)
    assert got == dict(text="none", count=1, rate=0.5, web=False, path=None, limit=None, node=True)


@pytest.mark.parametrize(
    "text", ["1, 2", "True", "[1]", "None", "{'a': 1}", "1e3", "0x10", "'q'", '"', "a\\nb\n", "-", ""]
)
def test_text_stays_text(cli, text):
    assert cli("--text", text)["text"] == text
    assert cli(f"--text={text}")["text"] == text


@quick
@given(text=st.text())
def test_any_text_stays_text(text):
    import fire

    def echo(text: str, more: str | None = None) -> str:
        return text

    argv = _typed_argv(echo, [f"--text={text}"])
    assert fire.Fire(echo, command=argv, serialize=lambda _: None) == text


def test_text_that_looks_like_a_flag_needs_the_equals_sign(cli):
    assert cli("--text=--count")["text"] == "--count"
    with pytest.raises(SystemExit, match="^error: --text needs a value$"):
        cli("--text", "--count", "3")


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--count", "-3"], "count", -3),
        (["--count=12"], "count", 12),
        (["--rate", "1"], "rate", 1.0),
        (["--rate", "1e-3"], "rate", 0.001),
        (["--limit", "None"], "limit", None),
        (["--limit", "2"], "limit", 2.0),
        (["--path", "None"], "path", None),
        (["--path", "7"], "path", "7"),
        (["--web"], "web", True),
        (["--web", "True"], "web", True),
        (["--web=yes"], "web", True),
        (["--web", "false"], "web", False),
        (["--web", "0"], "web", False),
        (["--noweb"], "web", False),
        (["--nonode"], "node", False),
        (["--node"], "node", True),  # not "no" + "de"
        (["--web", "--count", "2"], "web", True),
    ],
)
def test_a_value_has_the_type_of_its_parameter(cli, argv, name, value):
    got = cli(*argv)[name]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--count", "1.5"], "--count takes a whole number, not '1.5'"),
        (["--count", "many"], "--count takes a whole number, not 'many'"),
        (["--count", "None"], "--count takes a whole number, not 'None'"),
        (["--rate", "1,5"], "--rate takes a number, not '1,5'"),
        (["--limit", "inf"], "--limit takes a number, not 'inf'"),
        (["--rate", "nan"], "--rate takes a number, not 'nan'"),
        (["--web", "maybe"], "--web takes True or False, not 'maybe'"),
        (["--count"], "--count needs a value"),
        (["--rat", "1"], "unknown flag --rat: did you mean --rate?"),
        (["--zzz", "1"], "unknown flag --zzz; --help lists them"),
        (["stray"], "unexpected argument 'stray': values follow a flag, as in --text …"),
        (["--text", "a", "b"], "unexpected argument 'b': values follow a flag, as in --text …"),
    ],
)
def test_a_wrong_flag_or_value_is_one_line(cli, argv, message):
    with pytest.raises(SystemExit) as exit:
        cli(*argv)
    assert exit.value.code == f"error: {message}"  # Python prints it to stderr and exits with 1


def test_a_missing_value_without_a_default_is_one_line(monkeypatch):
    def copy(source: str, target: str) -> None:
        raise AssertionError("must not run")

    monkeypatch.setattr(sys, "argv", ["copy.py", "--target", "b"])
    with pytest.raises(SystemExit) as exit:
        run_cli(copy)
    assert exit.value.code == "error: --source is missing: it has no default (--help explains it)"


def test_an_unknown_task_is_one_line_with_the_tasks(cli):
    with pytest.raises(SystemExit) as exit:
        cli(task="shw")
    assert exit.value.code == "error: no task named 'shw': choose from show, other"


@pytest.mark.parametrize(
    ("argv", "task"), [(["--help"], None), (["-h"], None), (["--count", "2", "--help"], "show"), ([], "--help")]
)
def test_help_is_printed_with_exit_code_0_and_nothing_runs(cli, capfd, argv, task):
    with pytest.raises(SystemExit) as exit:
        assert cli(*argv, task=task) is None
    assert exit.value.code == 0
    printed = "".join(capfd.readouterr())
    assert "SYNOPSIS" in printed and "Shows what it got" in printed


def test_help_tells_each_flag_as_it_is_taken_and_no_other_way(monkeypatch, capsys):
    """Fire's tells of -c and of positional values, which are refused."""

    def copy(source: str, count: int = 2, fast: bool = False, note: str | None = None, mark: str = "") -> None:
        """Copies.

        Into the same folder.

        Args:
            source: what to copy,
                a file (yes: a file).
            count: how often.

        Raises:
            UserError: never.
        """

    monkeypatch.setattr(sys, "argv", ["do.py", "copy", "--help"])
    with pytest.raises(SystemExit):
        run_cli({"copy": copy})
    assert capsys.readouterr().out == (
        "SYNOPSIS\n    do.py copy --source TEXT --FLAG VALUE …\n\nDESCRIPTION\n    Copies.\n\n"
        "    Into the same folder.\n\n"
        "FLAGS\n    --source (text, required)\n        what to copy, a file (yes: a file).\n"
        "    --count (whole number, default: 2)\n        how often.\n    --fast (True or False, default: False)\n"
        "    --note (text)\n    --mark (text)\n"
    )


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (UserError("the cause: the cure"), "error: the cause: the cure"),
        (KeyboardInterrupt(), 130),
        (FileExistsError(17, "File exists", "out"), "error: out: File exists"),
        (OSError(28, "No space", "x.bin"), "error: x.bin: No space: free some, or choose another folder"),
    ],
)
def test_an_error_of_the_users_ends_in_one_line(monkeypatch, raised, code):
    def fail() -> None:
        raise raised

    monkeypatch.setattr(sys, "argv", ["fail.py"])
    with pytest.raises(SystemExit) as exit:
        run_cli(fail)
    assert exit.value.code == code


def test_an_error_that_quotes_a_strangers_file_moves_no_cursor(monkeypatch):
    def fail():
        raise UserError("a\x1b[2J, \x9b1A\rb\nc é")

    monkeypatch.setattr("sys.argv", ["script.py"])
    with pytest.raises(SystemExit) as exit:
        run_cli(fail)
    assert exit.value.code == "error: a\\x1b[2J, \\x9b1A\\rb\nc é"


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["fail.py"])
    with pytest.raises(ZeroDivisionError):
        run_cli(fail)


def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    script = tmp_path / "long.py"
    script.write_text(
        "from alpaca.cli import run_cli\n"
        "def long():\n    for _ in range(99999):\n        print('x' * 99)\nrun_cli(long)\n"
    )
    process = subprocess.Popen(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"x" * 99 + b"\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(30) == 141


def test_importing_utils_loads_neither_torch_nor_an_api_client():
    loaded = run_script("-c", "import sys, utils; print(*sys.modules)").stdout.split()
    assert "utils" in loaded and not {"torch", "transformers", "openai", "fire", "numpy"} & set(loaded)


# ---------------------------------------------------------------------------------------------------------------------
# Completions.


def ask(
    teacher, prompts=("p",), api="chat", max_retries=0, timeout=30.0, seed=None, **decoding
) -> list[utils.Completion]:
    """All prompts at once; ``teacher`` is a server or a base URL. Prompt i is sent with seed + i."""
    settings = utils.OpenAIDecodingArguments(**decoding)
    asked = utils.Teacher("m", settings, api, getattr(teacher, "base_url", teacher), timeout, max_retries)

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
    assert ask(server, max_tokens=9, seed=5) == [utils.Completion("hi", "stop", 7, 5)]
    assert server.requests == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "p"}],
            "max_tokens": 9,
            "temperature": 1.0,
            "top_p": 1.0,
            "seed": 5,
        }
    ]


def test_a_completions_request_has_the_bare_prompt(teacher):
    server = teacher(lambda n, body: ("hi", "length"))
    assert ask(server, api="completions", stop=["\n\n"]) == [utils.Completion("hi", "length", 7, 5)]
    assert server.requests == [
        {"model": "m", "prompt": "p", "max_tokens": 3072, "temperature": 1.0, "top_p": 1.0, "stop": ["\n\n"]}
    ]


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
    with pytest.raises(UserError, match="has user:password@ and OPENAI_API_KEY is set") as caught:
        ask(url)
    assert "ss@" not in str(caught.value) and "secret" not in str(caught.value) and len(server.requests) == 1


def test_the_base_url_of_the_environment_is_taken_when_none_is_given(teacher, monkeypatch):
    server = teacher(lambda n, body: "hi")
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    assert ask(None)[0].text == "hi"


def test_without_a_key_and_without_a_base_url_there_is_no_teacher():
    assert_user_error(
        lambda: utils.Teacher("m", utils.OpenAIDecodingArguments()), "no server to ask", "OPENAI_API_KEY", "--base_url"
    )


@pytest.mark.parametrize(
    "url",
    [
        *("localhost:8000", "127.0.0.1/v1", "ftp://x/v1", "http://", "http:///v1", "http://[::1", "http://x:99999/v1"),
        *("http://x:80:81/v1", "http://a b/v1", "http://x/v1\n"),
    ],
)
def test_what_is_no_url_is_refused_before_any_request(url):
    assert_user_error(
        lambda: utils.Teacher("m", utils.OpenAIDecodingArguments(), base_url=url),
        "is not a URL",
        "http://127.0.0.1:8000/v1",
    )


@pytest.mark.parametrize(("status", "word"), [(401, "OPENAI_API_KEY"), (403, "'m'"), (404, "--model_name")])
def test_what_no_retry_can_mend_ends_after_one_request_without_the_key(teacher, monkeypatch, status, word):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-7261")
    server = teacher(lambda n, body: status)
    with pytest.raises(UserError) as caught:
        ask(server, max_retries=5)
    assert f"({status})" in str(caught.value) and word in str(caught.value) and server.base_url in str(caught.value)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert "--api" not in str(caught.value) and "teacher" not in str(caught.value)  # judge.py judge has no such flag
    assert len(server.requests) == 1


def test_a_server_that_is_not_there_is_one_line(teacher):
    from alpaca.teacher import free_port

    assert_user_error(
        lambda: ask(f"http://127.0.0.1:{free_port()}/v1", max_retries=1), "nothing answers at", "is the server running?"
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
        "HTTP 429": 429,
        "HTTP 500": 500,
        "HTTP 400: fault 400": 400,
        "connection: ReadError": "half",
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
    assert reply == utils.Completion("ok", "stop", 7 * paid, 5 * paid)
    assert [body["seed"] for body in server.requests] == [7, 8]


def test_a_reply_without_a_text_is_asked_for_twice_more_and_no_oftener(teacher):
    server = teacher(lambda n, body: "null")
    assert ask(server, max_retries=5)[0].error == "empty reply (finish_reason stop)"
    assert len(server.requests) == 3


def test_with_a_budget_a_reply_without_a_text_is_not_asked_for_again(teacher):
    server = teacher(lambda n, body: "null")
    settings = utils.OpenAIDecodingArguments()
    asked = utils.Teacher("m", settings, "chat", server.base_url, 30.0, 5, empty_retries=0)

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
        (("half a", "abort"), "cut off (finish_reason abort)"),
        (("half a", "error"), "cut off (finish_reason error)"),
    ],
)
def test_what_is_blank_or_was_cut_off_by_the_server_is_a_failure(teacher, answer, error):
    assert ask(teacher(lambda n, body: answer))[0].error == error


def test_a_key_in_the_address_is_not_repeated_in_an_error(teacher):
    url = teacher(lambda n, body: 401).base_url + "?key=SECRET"
    with pytest.raises(UserError) as caught:
        ask(url)
    assert "SECRET" not in str(caught.value) and "(401)" in str(caught.value)


def test_one_prompt_that_is_too_long_by_itself_does_not_shorten_the_replies_to_others(teacher):
    server = teacher(lambda n, body: ("context", 400) if prompt_of(body) == "long" else "ok")
    asked = utils.Teacher("m", utils.OpenAIDecodingArguments(max_tokens=800), "chat", server.base_url, 30.0, 0)

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


def test_a_setting_that_the_model_does_not_take_is_left_out_for_good_and_told_once(teacher, caplog):
    """As models that think before they answer: max_tokens has another name there, stop and temperature are fixed."""

    def answer(n, body):
        for name in ("max_tokens", "stop", "temperature"):
            if name in body:
                return "unsupported", name
        return "ok"

    server = teacher(answer)
    assert [reply.text for reply in ask(server, "abc", stop=["x"], max_tokens=9)] == ["ok"] * 3
    assert [body for body in server.requests if "temperature" not in body][-1] == {
        "model": "m",
        "messages": server.requests[-1]["messages"],
        "max_completion_tokens": 9,
        "top_p": 1.0,
    }
    told = sorted(record.getMessage() for record in caplog.records if record.name == "root")
    assert told == ["m does not take stop=['x']: left out", "m does not take temperature=1.0: left out"]


def test_a_setting_that_is_refused_even_when_it_is_left_out_is_a_failure(teacher):
    server = teacher(lambda n, body: ("unsupported", "temperature"))
    assert ask(server)[0].error == "HTTP 400: no temperature here"
    assert len(server.requests) == 2


def test_an_account_without_credit_ends_at_once(teacher):
    server = teacher(lambda n, body: ("quota", 429))
    assert_user_error(lambda: ask(server), "no credit left (429)")


def test_one_fault_leaves_the_other_replies(teacher):
    replies = ask(teacher(lambda n, body: 500 if prompt_of(body) == "b" else "ok"), "abc")
    assert [(reply.text, reply.error) for reply in replies] == [("ok", None), (None, "HTTP 500"), ("ok", None)]


def test_a_reply_that_does_not_come_is_a_timeout(teacher):
    assert ask(teacher(lambda n, body: time.sleep(2) or "late"), timeout=0.2) == [
        utils.Completion(None, error="timeout")
    ]


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
    asked = utils.Teacher("m", utils.OpenAIDecodingArguments(max_tokens=800), "chat", server.base_url, 30.0, 0)

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
        utils.Completion(None, "content_filter", 7, 5, error="content filter")
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Many requests.


def collect(server, journal, count, concurrency=4, max_retries=0):
    """Asks "0", "1", … until ``count`` replies have been handed on; returns their texts or errors, in that order."""
    asked = utils.Teacher("m", utils.OpenAIDecodingArguments(), "chat", server.base_url, 30.0, max_retries)
    handed, arrived = [], []
    asyncio.run(
        ask_all(
            asked,
            lambda i: (str(i), None),
            journal,
            lambda reply, new: arrived.append(new),
            lambda reply: handed.append(reply.text or reply.error),
            lambda number, in_flight: len(handed) + in_flight < count,
            concurrency,
        )
    )
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
