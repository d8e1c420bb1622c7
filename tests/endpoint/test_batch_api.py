"""The Batch API against a local server: delays, partial results, expiry, cancelled and failed batches, kills."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from conftest import ROOT, assert_user_error, call
from made_batch_server import BatchServer, said

from alpaca import UserError
from alpaca.common.journal import Journal
from alpaca.endpoint import batch_api
from alpaca.endpoint.batch_api import Batches, open_batch, refuse_open_batch
from alpaca.endpoint.budget import Budget, RequestSettings
from alpaca.endpoint.client import Completion, OpenAIDecodingArguments, Teacher

BATCH = RequestSettings(batch=True)


class Asker(Teacher):
    """Sends a setting that a server may refuse, top_p."""

    def __init__(self, base_url):
        super().__init__("m", OpenAIDecodingArguments(50, top_p=0.9), settings=RequestSettings(base_url=base_url))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(batch_api, "POLL", (0.002, 0.002))
    monkeypatch.setattr(batch_api, "MOST_TRIES", 3)


@pytest.fixture
def batch_server():
    running = []

    def start(*answer, **how) -> BatchServer:
        running.append(BatchServer(*answer, **how))
        return running[-1]

    yield start
    for server in running:
        server.server.shutdown()
        server.server.server_close()


def echo(body) -> str:
    return f"{body['messages'][0]['content']}, seed {body['seed']}"


def drive(server, folder, requests=6, settings=BATCH, limits=None, retry_failed=False, make=Asker):
    """Ask for ``requests`` replies; return why it ended, the replies in order, and the budget."""
    batch = {field: value for field, value in asdict(settings).items() if field.startswith("batch")}
    replies, budget = [], Budget(replace(limits or settings, **batch))
    with Journal(folder / "journal") as journal:
        journal.begin({"requests": "these"})
        ways = (lambda i: (f"request {i}", 100 * i)), journal, budget, replies.append
        ways += (lambda i, ahead: i < requests and not budget.exhausted()), retry_failed
        why = asyncio.run(Batches(make(server.base_url), *ways).run())
    return why, replies, budget


def entries(folder) -> list[dict]:
    with Journal(folder / "journal") as journal:
        return journal.entries


def expected(requests) -> list[str]:
    return [f"request {i}, seed {100 * i}" for i in range(requests)]


def test_replies_arrive_in_order_from_one_batch_and_a_second_run_asks_nothing(batch_server, tmp_path, capsys):
    server = batch_server(echo, looks=3)
    why, replies, budget = drive(server, tmp_path)
    assert why is None and [reply.text for reply in replies] == expected(6)
    assert (budget.replies, budget.prompt_tokens, budget.completion_tokens) == (6, 42, 30)
    assert server.steps == ["upload", "list", "create", "poll", "poll", "poll", "content"]
    assert "batch batch-0 completed: 6 results (2 not from this run)" in capsys.readouterr().out
    assert drive(server, tmp_path)[1] == replies and len(server.steps) == 7
    assert [line["custom_id"].split("-")[1:] for line in server.lines[0]] == [[str(i), "0"] for i in range(6)]
    assert server.lines[0][2]["body"] == {
        "model": "m",
        "messages": [{"role": "user", "content": "request 2"}],
        "seed": 200,
        "max_tokens": 50,
        "top_p": 0.9,
    }


def test_a_larger_target_asks_for_the_rest_alone(batch_server, tmp_path):
    server = batch_server(echo)
    drive(server, tmp_path, 2)
    assert [reply.text for reply in drive(server, tmp_path, 5)[1]] == expected(5)
    assert [len(lines) for lines in server.lines] == [2, 3]


def test_what_expired_is_asked_again_and_three_times_is_a_failure(batch_server, tmp_path):
    server = batch_server(echo, ends=["expired"])
    assert [reply.text for reply in drive(server, tmp_path)[1]] == expected(6)
    assert [len(lines) for lines in server.lines] == [6, 3]
    assert set(server.answered.values()) == {1} and len(server.answered) == 6
    never = batch_server(lambda body: (503, {"error": {"message": "busy"}}) if body["seed"] == 100 else echo(body))
    (tmp_path / "b").mkdir()
    _, replies, budget = drive(never, tmp_path / "b", 3)
    assert replies[1] == Completion(None, error="HTTP 503: busy") and replies[2].text == "request 2, seed 200"
    assert [len(lines) for lines in never.lines] == [3, 1, 1] and budget.failures == {"HTTP 503: busy": 1}
    (tmp_path / "c").mkdir()
    silent = batch_server(lambda body: ... if body["seed"] == 100 else echo(body))
    assert drive(silent, tmp_path / "c", 3)[1][1] == Completion(None, error="no result")
    assert [len(lines) for lines in silent.lines] == [3, 1, 1]
    # As when asking directly, another run asks again where one failed, and only there.
    assert drive(never, tmp_path / "b", 3)[1] == replies and len(never.lines) == 3
    never.answer = echo
    again = drive(never, tmp_path / "b", 3, retry_failed=True)
    assert [reply.text for reply in again[1]] == expected(3) and len(never.lines[3:]) == len(never.lines[3]) == 1
    assert never.lines[3][0]["custom_id"].endswith("-1-3")  # the fourth time
    assert again[2].failures == {} and again[2].prompt_tokens == 21


def test_an_empty_reply_is_asked_again_with_another_seed_and_its_tokens_count(batch_server, tmp_path):
    server = batch_server(lambda body: None if body["seed"] in (100, 200, 201, 202) else echo(body))
    _, replies, budget = drive(server, tmp_path, 3)
    assert replies[1] == Completion("request 1, seed 101", "stop", 14, 10)
    assert replies[2] == Completion(None, "stop", 21, 15, "empty reply (finish_reason stop)")
    assert [len(lines) for lines in server.lines] == [3, 2, 1] and budget.prompt_tokens == 42


def test_a_refused_setting_is_left_out_of_the_next_round(batch_server, tmp_path):
    def answer(body):
        return (400, {"error": {"message": "no top_p here"}}) if "top_p" in body else echo(body)

    server = batch_server(answer, looks=2)
    interrupted(server, tmp_path, count=4, requests=3)
    replies = drive(server, tmp_path, 3)[1]
    assert [reply.text for reply in replies] == expected(3)
    assert [reply.changed for reply in replies] == [["top_p left out"]] * 3  # known though another run learned it
    assert drive(server, tmp_path, 4)[1][3].text and [len(lines) for lines in server.lines] == [3, 3, 1]


def test_a_refusal_among_replies_is_of_one_request_and_alone_of_the_model(batch_server, tmp_path):
    gone, file = (403, {"error": {"message": "gone"}}), tmp_path / "file"
    server = batch_server(lambda body: gone)
    assert_user_error(lambda: drive(server, tmp_path, 3), "does not let you use 'm'", "HTTP 403: gone")
    drive(server, tmp_path, 3, RequestSettings(batch_write=str(file)))
    rows = [json.loads(line) for line in file.read_text().splitlines()]  # in a file of a tool, refusals may come first
    bodies = [gone, (200, said("request 1, seed 100")), (200, said("request 2, seed 200"))]
    for row, (status, body) in zip(rows, bodies, strict=True):
        row["response"] = {"status_code": status, "body": body}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    replies = drive(server, tmp_path, 3, RequestSettings(batch_read=str(file)))[1]
    assert replies[0].error == "HTTP 403: gone" and [reply.text for reply in replies[1:]] == expected(3)[1:]


def test_a_batch_costs_its_share_of_the_price_and_direct_replies_all_of_it(batch_server, tmp_path):
    server, prices = batch_server(echo), {"prompt_price": 2000.0, "completion_price": 10000.0}
    with Journal(tmp_path / "journal") as journal:
        journal.begin({"requests": "these"})
        journal.append([{"i": 0, "text": "direct", "prompt_tokens": 7, "completion_tokens": 5}])
    settings, limits = RequestSettings(batch=True, batch_discount=0.4), RequestSettings(**prices)
    budget = drive(server, tmp_path, 3, settings, limits)[2]
    assert budget.cost == pytest.approx(0.064 + 2 * 0.6 * 0.064) == budget.counts()["cost_usd"]
    assert (
        budget.forecast((1000, 2000), 7, (5, 5)) == "1,000 to 2,000 requests, 12,000 to 24,000 tokens, $38.40 to $76.80"
    )
    assert drive(server, tmp_path, 3, limits=limits)[2].cost == pytest.approx(budget.cost)  # as it was paid
    assert_user_error(lambda: RequestSettings(batch_discount=50), "batch_discount must be from 0 to 1")


def test_a_round_holds_no_more_than_the_budget_allows(batch_server, tmp_path):
    """At worst a request has 50 reply tokens and a quarter of its characters; then as many as those before, 7 + 5."""
    server = batch_server(echo)
    _, replies, budget = drive(server, tmp_path, 100, limits=RequestSettings(max_total_tokens=1200))
    rounds = [len(lines) for lines in server.lines]
    assert 8 <= rounds[0] <= 12 and rounds[1:] == [99 - rounds[0], 1]
    assert len(replies) == 100 and budget.prompt_tokens + budget.completion_tokens == 1200


def test_a_refused_key_ends_the_run_with_what_arrived_and_is_not_read_again(batch_server, tmp_path):
    server = batch_server(lambda body: (401, {"error": {"message": "no"}}) if body["seed"] == 100 else echo(body))
    assert_user_error(lambda: drive(server, tmp_path, 3), "refused the key")
    server.answer = echo
    assert [reply.text for reply in drive(server, tmp_path, 3)[1]] == expected(3)
    assert [len(lines) for lines in server.lines] == [3, 1]


def test_a_failed_batch_ends_the_run_with_the_servers_words_and_is_forgotten(batch_server, tmp_path):
    server = batch_server(echo, ends=["failed"])
    assert_user_error(lambda: drive(server, tmp_path), "refused batch batch-0", "line 1: no such model")
    assert [reply.text for reply in drive(server, tmp_path)[1]] == expected(6)


@pytest.mark.parametrize(
    "error",
    [
        {"code": "token_limit_exceeded", "message": "Enqueued token limit reached for m in organization o."},
        {"code": None, "message": "This model's limit is 90,000 enqueued tokens."},
    ],
)
def test_a_batch_that_does_not_fit_the_servers_queue_is_halved_and_sent_again_at_once(
    batch_server, tmp_path, capsys, error
):
    def finish(batch):
        if len(batch["lines"]) > 2:
            batch |= {"status": "failed", "errors": {"object": "list", "data": [error]}}
        else:
            BatchServer.finish(server, batch)

    server = batch_server(echo)
    server.finish = finish
    assert [reply.text for reply in drive(server, tmp_path, 9)[1]] == expected(9)
    assert [len(lines) for lines in server.lines] == [9, 4, 2, 2, 2, 2, 1]
    said = f"the server refused batch batch-0: {error['message']}; the next one has 4 requests\n"
    assert said in capsys.readouterr().out
    server.finish = lambda batch: batch.update(status="failed", errors=[error])
    assert_user_error(lambda: drive(server, tmp_path, 11), "refused batch batch-8", error["message"])
    assert [len(lines) for lines in server.lines[7:]] == [2, 1]  # one alone does not fit


def test_a_batch_cancelled_by_someone_keeps_what_arrived_and_the_same_command_asks_for_the_rest(batch_server, tmp_path):
    server = batch_server(echo, ends=["cancelled"])
    assert_user_error(
        lambda: drive(server, tmp_path), "batch batch-0 cancelled: 3 results (", "same command for the rest"
    )
    *_, over = entries(tmp_path)
    assert over["batch"]["asked"] == {number: {"times": 1} for number in "024"}  # what was not tried has not failed
    assert [reply.text for reply in drive(server, tmp_path)[1]] == expected(6)
    assert [len(lines) for lines in server.lines] == [6, 3] and set(server.answered.values()) == {1}


def interrupted(server, folder, step="poll", count=2, **how) -> None:
    """Run until the server has answered so often to a step, then end as by Ctrl-C."""
    seen = []

    class Interrupted(Asker):
        async def http(self, *call, **payload):
            answer = await super().http(*call, **payload)
            seen.append(server.steps[-1])
            if seen.count(step) == count:
                asyncio.current_task().cancel()
            return answer

    with pytest.raises(asyncio.CancelledError):
        drive(server, folder, make=Interrupted, **how)


def test_after_ctrl_c_the_batch_goes_on_and_is_found(batch_server, tmp_path, capsys):
    server = batch_server(echo, looks=5)
    interrupted(server, tmp_path)
    assert "batch batch-0 continues on the server; the same command finds it" in capsys.readouterr().err
    with Journal(tmp_path / "journal") as journal:
        assert open_batch(journal) == {"file": "file-0", "requests": [0, 1, 2, 3, 4, 5], "id": "batch-0"}
        assert_user_error(lambda: refuse_open_batch(journal), "batch batch-0 is still open", "batch_cancel")
    write = RequestSettings(batch_write=str(tmp_path / "file"))
    assert_user_error(lambda: drive(server, tmp_path, settings=write), "batch batch-0 is still open")
    assert [reply.text for reply in drive(server, tmp_path)[1]] == expected(6)
    assert server.steps.count("upload") == server.steps.count("create") == 1
    with Journal(tmp_path / "journal") as journal:
        refuse_open_batch(journal)


def test_a_time_limit_ends_the_waiting_and_not_the_batch(batch_server, tmp_path, capsys):
    server = batch_server(echo, looks=10**9)
    interrupted(server, tmp_path)  # a batch is open, even if making one takes longer than the limit
    capsys.readouterr()
    why, replies, _ = drive(server, tmp_path, limits=RequestSettings(time_limit=0.05))
    assert why == "the time limit of 0.05 s ended the waiting" and not replies
    assert "batch batch-0 continues on the server" in capsys.readouterr().err
    server.looks = 1
    assert [reply.text for reply in drive(server, tmp_path)[1]] == expected(6)


def test_cancelling_keeps_what_was_answered(batch_server, tmp_path):
    server = batch_server(echo, looks=9)
    cancel = RequestSettings(batch_cancel=True)
    assert_user_error(lambda: drive(server, tmp_path, settings=cancel), "no open batch")
    interrupted(server, tmp_path)
    server.after = lambda step: (
        (409, {"error": {"message": "it is over"}}) if step == "cancel" else None
    )  # or nearly so
    why, replies, _ = drive(server, tmp_path, settings=cancel)
    assert why.startswith("batch batch-0 cancelled: 3 results") and [reply.text for reply in replies] == expected(1)
    assert [reply.text for reply in drive(server, tmp_path)[1]] == expected(6)
    assert [len(lines) for lines in server.lines] == [6, 3] and set(server.answered.values()) == {1}


def test_cancelling_what_is_over_reads_it_and_what_is_gone_is_forgotten(batch_server, tmp_path):
    server, cancel = batch_server(echo, looks=3), RequestSettings(batch_cancel=True)
    interrupted(server, tmp_path)
    server.look("batch-0")
    assert "batch-0 completed: 6 results" in drive(server, tmp_path, settings=cancel)[0]
    interrupted(server, tmp_path, requests=9)
    del server.batches["batch-1"]
    assert_user_error(lambda: drive(server, tmp_path, 9), "HTTP 404: no batch batch-1")
    assert_user_error(lambda: drive(server, tmp_path, settings=cancel), "no batch batch-1: the batch is gone")
    interrupted(server, tmp_path, "upload", 1, requests=9)
    server.after = lambda step: (404, {"error": {"message": "no such file"}}) if step == "create" else None
    assert_user_error(lambda: drive(server, tmp_path, settings=cancel), "POST /batches: HTTP 404: no such file")
    server.after = lambda step: None
    assert server.steps.count("upload") == 3
    assert [reply.text for reply in drive(server, tmp_path, 9)[1]] == expected(9)
    assert server.steps.count("upload") == 4


@pytest.mark.parametrize("step", ["upload", "list", "create", "poll", "content"])
@pytest.mark.parametrize("fault", ["drop", (503, {"error": {"message": "busy"}}), (200, b"<html>")], ids=str)
def test_a_call_that_is_not_answered_is_repeated_and_nothing_is_asked_twice(batch_server, tmp_path, step, fault):
    def after(done):
        return fault if done == step and server.steps.count(step) == 1 else None

    server = batch_server(echo, looks=2, after=after)
    if step == "content" and fault == (200, b"<html>"):
        assert_user_error(lambda: drive(server, tmp_path), "batch batch-0 has no results of this run")
    assert [reply.text for reply in drive(server, tmp_path)[1]] == expected(6)
    assert set(server.bill().values()) == {1} and len(server.answered) == 6 and len(server.batches) == 1


def test_a_server_without_listing(batch_server, tmp_path):
    assert [reply.text for reply in drive(batch_server(echo, lists=False), tmp_path)[1]] == expected(6)


def test_a_batch_is_found_on_the_third_page_of_a_server_whose_address_has_a_query(batch_server, tmp_path):
    server = batch_server(echo)
    server.base_url += "?api-version=1"
    interrupted(server, tmp_path, "create", 1)
    lines = (tmp_path / "journal").read_bytes().splitlines(keepends=True)
    (tmp_path / "journal").write_bytes(b"".join(lines[:2]))  # killed before the batch's id was on disk
    server.batches |= {f"other-{n}": {"id": f"other-{n}", "input_file_id": "other"} for n in range(4)}
    assert [reply.text for reply in drive(server, tmp_path)[1]] == expected(6)
    assert server.steps.count("create") == 1 and server.steps.count("list") == 1 + 3


def test_a_server_without_batches_says_so(batch_server, tmp_path):
    server = batch_server(echo, after=lambda step: (404, {"error": {"message": "no such path"}}))
    assert_user_error(lambda: drive(server, tmp_path), "POST /files: HTTP 404: no such path", "use batch_write")


def test_large_rounds_are_split(batch_server, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_api, "MOST_REQUESTS", 4)
    server = batch_server(echo)
    assert [reply.text for reply in drive(server, tmp_path, 6)[1]] == expected(6)
    monkeypatch.setattr(batch_api, "MOST_BYTES", 420)
    assert [reply.text for reply in drive(server, tmp_path, 12)[1]] == expected(12)
    assert [len(lines) for lines in server.lines] == [4, 2, 2, 2, 2]


def test_files_are_written_and_read_without_a_server(batch_server, tmp_path, capsys):
    asked, replies = tmp_path / "asked.jsonl", tmp_path / "replies.jsonl"
    server = batch_server(echo)
    server.server.server_close()
    write, read = RequestSettings(batch_write=str(asked)), RequestSettings(batch_read=str(replies))
    assert drive(server, tmp_path, 3, write)[0] == f"{asked} has 3 requests: have them answered, then use batch_read"
    lines = [json.loads(line) for line in asked.read_text().splitlines()]
    assert lines[1]["url"] == "/v1/chat/completions" and lines[1]["body"]["messages"][0]["content"] == "request 1"

    def row(line, status=200, text=None):
        """As vllm run-batch writes them: a failed request has no body."""
        response = {"status_code": status, "request_id": "x", "body": said(text) if status == 200 else None}
        error = None if status == 200 else {"error": {"message": "out of memory", "code": status}}
        return json.dumps({"id": "y", "custom_id": line["custom_id"], "response": response, "error": error}) + "\n"

    replies.write_text(row(lines[2], text="two") + row(lines[1], 500) + row(lines[0], text="zero"))
    why, found, _ = drive(server, tmp_path, 3, read)
    assert f"{replies}: 2 results (1 to retry: HTTP 500: out of memory)" in capsys.readouterr().out
    assert why == "1 request left: write them to a file with batch_write" and [reply.text for reply in found] == [
        "zero"
    ]
    drive(server, tmp_path, 3, read)  # again: nothing counts twice
    assert drive(server, tmp_path, 3, write)[1] == found
    (line,) = [json.loads(line) for line in asked.read_text().splitlines()]
    assert line["custom_id"] == lines[1]["custom_id"][:-1] + "1"
    replies.write_text(row(line, text="one"))
    assert [reply.text for reply in drive(server, tmp_path, 3, read)[1]] == ["zero", "one", "two"]
    drive(server, tmp_path, 4, write)
    replies.write_text(row(json.loads(asked.read_text()), 400))
    assert drive(server, tmp_path, 4, read)[1][3].error == "HTTP 400: out of memory"
    replies.write_text(row({"custom_id": "0badc0de-1-0"}, text="?"))
    assert_user_error(lambda: drive(server, tmp_path, 4, read), str(replies), "has no results of this run")


def test_replies_of_an_unknown_server_are_not_taken_for_openais(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    teacher = Teacher("m", OpenAIDecodingArguments(), settings=RequestSettings(batch_read="replies.jsonl"))
    with pytest.raises(UserError, match="^the server has no model 'm'"):
        teacher.read("", {}, 404, b'{"error": {"error": {"message": "The model `m` does not exist."}}}')


class Killed(BaseException):
    pass


def kill_at(step, when, monkeypatch, server):
    """A teacher and a journal that end the process, as it were, at a step: before the call, after it, or when what it
    brought is half, or wholly, on disk."""
    rng, append, reached = random.Random(f"{step}/{when}"), Journal.append, []

    class Mortal(Asker):
        async def http(self, method, path, **payload):
            here = re.match(
                {"upload": "/files$", "create": "/batches($|[?])", "poll": "/batches/", "content": "/files/"}[step],
                path,
            )
            if here and when == "before":
                raise Killed
            answer = await super().http(method, path, **payload)
            if here and when == "after":
                raise Killed
            reached.extend([step] if here else [])
            return answer

    def write(self, new):
        if when not in ("torn", "written") or not reached:
            return append(self, new)
        size = self._file.tell()
        append(self, new)
        if when == "torn":
            self._file.truncate(size + rng.randrange(self._file.tell() - size))
        raise Killed

    monkeypatch.setattr(Journal, "append", write)
    return Mortal


def test_a_kill_while_results_are_written_counts_no_fault_twice(batch_server, tmp_path, monkeypatch):
    server = batch_server(lambda body: ... if body["seed"] == 100 else echo(body))

    def torn(self, new):
        if not any("i" in entry for entry in new):
            return append(self, new)
        append(self, new[:1])
        raise Killed

    append = Journal.append
    for _ in range(2):  # in the second, one of two replies was on disk before
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Journal, "append", torn)
            drive(server, tmp_path, 3)
    assert [reply.error for reply in drive(server, tmp_path, 3)[1]] == [None, "no result", None]
    assert [len(lines) for lines in server.lines] == [3, 1, 1]


@pytest.mark.parametrize("step", ["upload", "create", "poll", "content"])
def test_killed_at_each_step_twenty_times_nothing_is_asked_twice_and_the_result_is_the_same(
    batch_server, tmp_path, monkeypatch, step
):
    def answer(body):
        return None if body["seed"] % 500 == 200 else echo(body)

    (tmp_path / "whole").mkdir()
    whole = batch_server(answer, looks=2, ends=["expired"])
    undisturbed = drive(whole, tmp_path / "whole", 10)[1]
    server = batch_server(answer, looks=2, ends=["expired"])
    kills = 0
    while kills < 20:
        folder = tmp_path / str(kills)
        folder.mkdir()
        server.ends, server.answered = ["expired"], type(server.answered)()
        for when in random.Random(kills).sample(["before", "after", "torn", "written"], 4):
            with monkeypatch.context() as patch, pytest.raises(Killed):
                drive(server, folder, 10, make=kill_at(step, when, patch, server))
            kills += 1
        assert drive(server, folder, 10)[1] == undisturbed
        assert server.bill() == whole.answered and set(server.answered.values()) == {1}


def items(body) -> str:
    """Some new instructions, by the request's seed."""
    rng, text = random.Random(body["seed"]), ""
    for n in range(4, 4 + rng.randint(2, 12)):
        text += f"{n}. Instruction: Explain {' '.join(rng.choices(WORDS, k=6))}\n{n}. Input:\n<noinput>\n"
        text += f"{n}. Output:\nyes\n###\n"
    return text


WORDS = (ROOT / "prompt.txt").read_text().split()
GENERATE = {"model_name": "m", "seed": 3, "similarity_stats": False, "batch": True}


def test_generation_goes_in_rounds_of_which_the_last_does_not_overshoot(batch_server, tmp_path):
    from generate_instruction import generate_instruction_following_data as generate

    server = batch_server(items, ends=["expired"])  # of the first round few replies are in order
    call(generate, str(tmp_path), num_instructions_to_generate=2000, base_url=server.base_url, **GENERATE)
    report = json.loads((tmp_path / "report.json").read_text())
    rounds = [len(lines) for lines in server.lines]
    assert report["kept"] >= 2000 and report["unused_replies"] <= 1 and report["requests"] == len(server.answered)
    assert rounds[0] == 100 and rounds[1] <= 100 + 50 and len(rounds) <= 7
    with pytest.raises(UserError, match="no open batch"):
        call(generate, str(tmp_path), base_url=server.base_url, **GENERATE | {"batch_cancel": True})


def test_a_process_that_is_killed_at_each_step_finds_its_batch_and_makes_the_same_files(batch_server, tmp_path):
    def command(server, folder):
        argv = [sys.executable, "generate_instruction.py", "generate_instruction_following_data", "--batch"]
        argv += ["--base_url", server.base_url, "--model_name", "m", "--seed", "3", "--output_dir", folder]
        return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    whole = batch_server(items)
    assert command(whole, tmp_path / "whole").wait() == 0
    steps = ["upload", "create", "poll", "content"]

    def after(step):
        if steps and step == steps[0]:  # its work is done, and the answer is lost with the process
            steps.pop(0)
            os.kill(running[-1].pid, signal.SIGKILL)

    server, running = batch_server(items, after=after), []
    while not running or running[-1].wait() == -signal.SIGKILL:
        running.append(command(server, tmp_path / "killed"))
    assert running[-1].returncode == 0 and len(running) == 5
    for name in ("regen.json", "rejected.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert server.bill() == whole.answered and set(server.answered.values()) == {1}


def test_answers_and_judgments_in_batches_are_those_of_direct_requests(batch_server, tmp_path, teacher, capsys):
    import judge

    def reply(body):
        said = body["messages"][0]["content"]
        return "Well.\n\nVerdict: A" if "Verdict" in said else f"{body['model']} says: {said}"

    paths = {name: str(tmp_path / name) for name in ("set.json", "a.jsonl", "b.jsonl", "j.jsonl", "f.jsonl", "asked")}
    items = [{"instruction": f"Say {word}.", "input": "", "output": ""} for word in ("yes", "no", "why")]
    (tmp_path / "set.json").write_text(json.dumps(items))
    server, direct = batch_server(reply, ends=["expired"]), teacher(lambda number, body: reply(body))
    to = {"instructions": paths["set.json"], "batch": True, "base_url": server.base_url}
    call(judge.answer, model_name="a", output_path=paths["a.jsonl"], **to)
    call(
        judge.answer, model_name="b", output_path=paths["b.jsonl"], **to | {"batch": False, "base_url": direct.base_url}
    )
    to["answers"] = f"{paths['a.jsonl']},{paths['b.jsonl']}"
    call(judge.judge, model_name="j", output_path=paths["j.jsonl"], **to)
    answers = [json.loads(line)["output"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert answers == [f"a says: Say {word}." for word in ("yes", "no", "why")]

    to |= {"model_name": "j", "output_path": paths["f.jsonl"], "batch": False, "base_url": None}
    call(judge.judge, batch_write=paths["asked"], **to)
    assert "asked has 6 requests: have them answered" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "asked").read_text().splitlines()]
    rows = [line | {"response": {"status_code": 200, "body": said(reply(line["body"]))}} for line in lines]
    (tmp_path / "asked").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(judge.judge, batch_read=paths["asked"], **to)
    judged = [(tmp_path / name).read_text() for name in ("j.jsonl", "f.jsonl")]
    assert judged[0] == judged[1] and judged[0].count('"preferred": "first"') == 6
    assert not list(tmp_path.glob("*.journal"))
