"""weight_diff.py under SIGKILL, by benchmarks/bench_diff_kills.py in short, and whether that sees what it looks for."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import ROOT, run_script

sys.path.append(str(ROOT / "benchmarks"))

from bench_diff_kills import Bench, Command  # noqa: E402

# Makes a folder as weight_diff.py is to make one, but for one fault.
SCRIPT = """
import os, shutil, sys

fault, raw, target = sys.argv[1:]
parent, name = os.path.split(target)
unfinished, replaced = f"{parent}/.{name}.unfinished", f"{parent}/.{name}.replaced"
if fault == "leaves what a kill left":
    unfinished += str(os.getpid())
if fault == "works in place":
    unfinished = target
if fault == "stumbles over what a kill left" and os.path.exists(unfinished):
    sys.exit("error: it is there already")
if os.path.exists(replaced) and fault != "forgets the old":
    shutil.rmtree(replaced) if os.path.exists(target) else os.rename(replaced, target)
shutil.rmtree(unfinished, ignore_errors=True)
if fault == "removes the old first":
    shutil.rmtree(target, ignore_errors=True)
os.mkdir(unfinished)
files = ["model-1.safetensors", "model-2.safetensors", "config.json"]
for file in reversed(files) if fault == "writes the config first" else files:
    with open(f"{unfinished}/{file}", "w") as out:
        out.write(str(os.getpid()) if fault == "makes other bytes" else file)
if fault == "changes an input":
    with open(f"{raw}/model.safetensors", "a") as out:
        out.write("more")
if fault != "works in place":
    if os.path.exists(target):
        os.rename(target, replaced)
    os.rename(unfinished, target)
    shutil.rmtree(replaced, ignore_errors=True)
"""


def test_a_killed_run_leaves_nothing_that_loads_and_the_next_one_ends_as_if_it_had_not_been(tmp_path):
    flags = ("--kills", 4, "--megabytes", 12, "--operations", "rename", "--output_path", tmp_path / "result.json")
    run = run_script("benchmarks/bench_diff_kills.py", *flags)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["complaints"] == {}, "\n".join(result["every_kill"])
    assert result["kills_at_random_moments"] == 4
    # make_diff and recover have at least one rename, recover --overwrite one more
    assert result["kills_before_an_operation"] >= 4


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        ("none", None),
        ("leaves what a kill left", "the next run left something beside the target"),
        ("works in place", "the target is neither the new model nor the old one"),
        ("stumbles over what a kill left", "the next run ended with 1: ['error: it is there already']"),
        ("forgets the old", "the next run put no model back"),
        ("removes the old first", "neither the old model nor the new one is there"),
        ("writes the config first", "a leftover loads as a model"),
        ("makes other bytes", "the next run made other bytes"),
        ("changes an input", "an input was changed"),
    ],
)
def test_each_fault_is_seen_and_a_sound_script_has_none(tmp_path, fault, seen):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for model, text in (("raw", "raw"), ("old", "the old one")):
        (tmp_path / model).mkdir()
        (tmp_path / model / "model.safetensors").write_text(text)
        (tmp_path / model / "config.json").write_text(text)
    old = tmp_path / "old" if fault in ("none", "forgets the old", "removes the old first") else None
    target = tmp_path / "out" / "model"
    command = Command("fake", script, [fault, str(tmp_path / "raw"), str(target)], [tmp_path / "raw"], target, old)
    bench = Bench(command, tmp_path)
    kills = [bench.kill_before(number) for number in range(len(bench.operations))]
    complaints = {text for kill in kills for text in kill["complaints"]}
    assert seen in complaints if seen else complaints == set(), [(kill["moment"], kill["complaints"]) for kill in kills]
    assert len(kills) >= 4
