"""runs/demo.py: how it is stopped, and what a stage that fails leaves. test_end_to_end.py runs all of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT
from test_embedded_model import HEALTHY, assert_gone

from runs import demo


@pytest.fixture
def start(tmp_path):
    """A started demo: its model is a config.json, and in place of transformers there is a server without answers."""
    base = tmp_path / "cache" / "alpaca" / "smollm2-135m-instruct" / "config.json"
    server = tmp_path / "site" / "transformers" / "cli" / "transformers.py"
    for path, text in (base, '{"num_hidden_layers": 2}'), (server, HEALTHY), (server.parents[1] / "__init__.py", ""):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "runs/demo.py", "--output_dir", str(tmp_path / "demo")]
    started = []

    def start_once() -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes))
        return started[0]

    yield start_once
    started[0].kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_demo_ends_all_that_it_started_says_so_in_few_lines_and_its_logs_have_both_streams(
    start, tmp_path, number
):
    log, process = tmp_path / "demo" / "logs" / "self-instruct.log", start()
    deadline = time.monotonic() + 60
    while not (log.exists() and "0/8" in log.read_text()):  # the progress bar, on stderr
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 3  # the teacher's wrapper, its server and the script
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert_gone(*children)
    _, stopping, after = printed.partition("\nstopping self-instruct")
    assert stopping and len(after.splitlines()) <= 3 and "Traceback" not in printed, printed
    assert "teacher at http" in log.read_text()  # on stdout


def test_a_stage_that_fails_names_its_log_and_leaves_the_results_of_an_earlier_demo(start, tmp_path):
    """Fine-tuning fails for want of transformers; what it says on stderr is in the log."""
    (tmp_path / "demo").mkdir()
    records = [{"instruction": f"Name {n} towns.", "input": "", "output": "Bath."} for n in range(8)]
    (tmp_path / "demo" / "regen.json").write_text(json.dumps(records))
    earlier = [tmp_path / "demo" / name / "config.json" for name in ("tuned", "diff", "recovered")]
    for path in earlier:
        path.parent.mkdir()
        path.write_text("earlier")
    process = start()
    printed, _ = process.communicate(timeout=120)
    log = tmp_path / "demo" / "logs" / "fine-tuning.log"
    last = f'error: the stage "fine-tuning" failed: what it printed is above and in {log}'
    assert (process.returncode, printed.splitlines()[-1]) == (1, last)
    assert "ChildFailedError" in log.read_text()  # torchrun's, on stderr
    assert [path.read_text() for path in earlier] == ["earlier"] * 3
    assert not list((tmp_path / "demo").glob(".*"))


def test_what_a_model_writes_does_not_reach_the_terminal_as_control_characters(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    demo.stage(tmp_path, "chat, after", "clear.*", r"""python -c 'print("1%\r100%\nclear \x1b[2J\x9b2J")'""")
    assert capsys.readouterr().out.endswith("1%\r100%\nclear \\x1b[2J\\x9b2J\n")
    assert "\x1b[2J" in (tmp_path / "logs" / "chat_after.log").read_text()
    assert demo.ROWS.pop()["made"] == "clear \\x1b[2J\\x9b2J"


def test_the_model_is_named_as_it_is_found_later(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    demo.stage(tmp_path, "fine-tuning", "saved in .*", "echo saved in demo/.tuned.unfinished")
    log = (tmp_path / "logs" / "fine-tuning.log").read_text()
    assert log == "saved in demo/tuned\n" and capsys.readouterr().out.endswith("echo saved in demo/tuned\n" + log)
    assert demo.ROWS.pop()["made"] == "saved in demo/tuned"
