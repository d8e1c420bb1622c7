"""benchmarks/gpu.sh and its steps: time limits, what is kept of a step, and what is run again. No GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
from conftest import ROOT, run_script


def step(folder: Path, seconds: float, code: str, *arguments: str) -> tuple[subprocess.CompletedProcess, dict]:
    """Runs a step that is a piece of Python, and gives what it wrote."""
    run = run_script("benchmarks/gpu_step.py", "run", folder, "a", seconds, "-c", code, *arguments)
    return run, json.loads((folder / "a.json").read_text())


def test_a_step_keeps_its_result_its_output_and_what_produced_them(tmp_path):
    code = "import sys; print('said'); open(sys.argv[1], 'w').write('[1, 2]')"
    run, kept = step(tmp_path / "out", 60, code, "RESULT")
    assert run.returncode == 0, run.stderr
    assert kept["ok"] and kept["exit"] == 0 and kept["result"] == [1, 2] and kept["output_tail"] == "said\n"
    assert kept["commit"] and kept["command"].endswith("RESULT")
    assert kept["versions"].keys() == {"torch", "transformers"}
    assert os.listdir(tmp_path / "out") == ["a.json"]


def test_a_step_that_fails_is_kept_with_its_last_words(tmp_path):
    run, kept = step(tmp_path, 60, "import sys; print('x' * 9000); sys.exit('out of memory')")
    assert run.returncode == 1
    assert not kept["ok"] and kept["exit"] == 1 and kept["result"] is None
    assert kept["output_tail"].endswith("x\nout of memory\n") and len(kept["output_tail"]) == 4000


def test_a_step_that_hangs_ends_at_its_limit_with_all_that_it_started(tmp_path):
    """torchrun's workers are in sessions of their own, which a signal to a group does not reach."""
    code = (
        "import os, sys, time\n"
        "if not (child := os.fork()): os.setsid(); time.sleep(600)\n"
        "open(sys.argv[1], 'w').write(str(child)); time.sleep(600)"
    )
    run, kept = step(tmp_path, 5, code, "RESULT")
    assert run.returncode == 1
    assert not kept["ok"] and kept["exit"] == "time-out" and kept["seconds"] < 60
    assert not psutil.pid_exists(kept["result"]) or psutil.Process(kept["result"]).status() == psutil.STATUS_ZOMBIE


def gpu(*flags) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable}
    command = ["bash", "benchmarks/gpu.sh", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_what_ended_well_is_skipped_and_what_did_not_is_run_again_while_time_is_left(tmp_path):
    (tmp_path / "original.json").write_text('{\n  "ok": true\n}\n')
    (tmp_path / "whole.json").write_text('{\n  "ok": false\n}\n')
    (tmp_path / "work" / "0.001").mkdir(parents=True)  # the model, which would be made first
    run = gpu("--dry_run", "--only", "original whole", "--output_dir", tmp_path, "--budget", 5)
    assert "original: ended well before" in run.stdout
    assert "whole: no time left, run this again to continue" in run.stdout
    assert run.returncode == 1


def test_a_flag_that_is_not_known_is_refused():
    run = gpu("--dry")
    assert run.returncode == 2 and "unknown flag --dry: use --dry_run" in run.stderr
