"""alpaca/training/checkpoints.py: a run that was killed, stopped or out of disk goes on as if nothing had happened."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import ROOT, assert_user_error, make_records, torchrun
from safetensors.torch import load_file

import train
from alpaca import RankError, UserError
from alpaca.training import checkpoints, stop, trainer

REHEARSED = ("--skip_save_rehearsal", "False")  # after it the model is sharded already
STEPS = 5  # 3 steps an epoch: the last one is inside the second


def arguments(model, data, out, *extra):
    return [
        *("--model_name_or_path", model, "--data_path", data, "--output_dir", out, "--max_steps", STEPS),
        *("--per_device_train_batch_size", 8, "--learning_rate", 1e-2, "--logging_steps", 1, "--disable_tqdm", "True"),
        *("--save_strategy", "steps", "--save_steps", 1, "--report_to", "none"),
        *("--skip_save_rehearsal", "True", *extra),  # which has steps of its own; tests/training/test_preflight.py
    ]


def run(*argv) -> None:
    train.train(*train.parse_args([str(word) for word in arguments(*argv)]))


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"][:STEPS]]


def assert_same_result(a: Path, b: Path) -> None:
    x, y = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
    assert losses(a) == losses(b) and len(losses(a)) == STEPS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.json"
    path.write_text(json.dumps(make_records(24)))
    return path


@pytest.fixture(scope="module")
def model(tiny_llama, tmp_path_factory):
    """The tiny LLaMA with dropout, so that a resumed run is equal only if the random states are restored."""
    path = tmp_path_factory.mktemp("model") / "dropping"
    shutil.copytree(tiny_llama, path)
    config = json.loads((path / "config.json").read_text()) | {"attention_dropout": 0.2}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """The folder of an uninterrupted run, with a checkpoint of each step."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(model, data, out)
    return out


@pytest.fixture
def interrupted(whole, tmp_path):
    """What an interrupted run leaves: checkpoints 1 and 2, no model."""
    for step in (1, 2):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / "out" / f"checkpoint-{step}")
    return tmp_path / "out"


class Killed(BaseException):
    """Stands for a SIGKILL: nothing in the code under test catches it or cleans up after it."""


# ---------------------------------------------------------------------------------------------------------------------
# Killed.


def test_a_run_killed_at_a_random_step_equals_an_uninterrupted_one(model, data, whole, tmp_path):
    out, step = tmp_path / "out", random.randint(1, STEPS - 2)
    argv = [sys.executable, "train.py", *map(str, arguments(model, data, out))]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / f"checkpoint-{step}").exists():
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(random.random() / 20)
    process.kill()
    process.wait()
    run(model, data, out, "--resume_from_checkpoint", "auto")
    assert_same_result(out, whole)


KILL_IN_SAVE = """
import os, signal, sys, train
inner = train.Trainer._save_rng_state
def _save_rng_state(self, folder):
    if self.state.global_step == 3:  # weights, optimizer and scheduler are written, the state is not
        os.kill(os.getpid(), signal.SIGKILL)
    inner(self, folder)
train.Trainer._save_rng_state = _save_rng_state
train.main()
"""


def test_a_run_killed_in_a_save_equals_an_uninterrupted_one(model, data, whole, tmp_path, capsys):
    out = tmp_path / "out"
    argv = [sys.executable, "-c", KILL_IN_SAVE, *map(str, arguments(model, data, out, "--save_total_limit", 1))]
    assert subprocess.run(argv, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
    assert sorted(path.name for path in out.iterdir()) == [".lock", ".saving", "checkpoint-2"]
    assert (out / ".saving" / "checkpoint-3" / "optimizer.pt").exists()
    run(model, data, out, "--resume_from_checkpoint", "auto")
    assert f"resuming from {out}/checkpoint-2" in capsys.readouterr().out
    assert not (out / ".saving").exists()
    assert_same_result(out, whole)


@pytest.mark.parametrize(
    "owner, name, newest",
    [
        (trainer.Trainer, "_save_optimizer_and_scheduler", 2),  # the weights are there
        (trainer, "fsync_tree", 2),  # all is written, nothing is on the disk for sure
        (trainer.os, "rename", 2),  # … and checkpoint.json too
        (trainer, "fsync", 3),  # renamed, the older one not yet deleted
        (trainer.shutil, "rmtree", 3),  # which is half deleted
    ],
)
def test_whenever_a_save_is_killed_a_whole_checkpoint_is_chosen(
    model, data, interrupted, monkeypatch, owner, name, newest
):
    before = {path: path.read_bytes() for path in (interrupted / "checkpoint-2").iterdir()}
    inner = getattr(owner, name)

    def kill(*args, **kwargs):
        if newest == 3 and not (interrupted / "checkpoint-3").exists():
            return inner(*args, **kwargs)
        if name == "rmtree":
            next(path for path in args[0].rglob("*") if path.is_file()).unlink()
        raise Killed

    monkeypatch.setattr(owner, name, kill)
    with pytest.raises(Killed):
        run(model, data, interrupted, "--resume_from_checkpoint", "auto", "--save_total_limit", 1)
    there = checkpoints.newest_first(interrupted)
    assert there[0].name == f"checkpoint-{newest}" and not any(map(checkpoints.what_is_missing, there))
    if name != "rmtree":
        assert {path: path.read_bytes() for path in (interrupted / "checkpoint-2").iterdir()} == before


def test_leftovers_of_a_save_and_of_a_rehearsal_are_removed_and_what_is_whole_is_kept(interrupted):
    shutil.copytree(interrupted / "checkpoint-2", interrupted / ".save-rehearsal" / "checkpoint-1")
    (interrupted / "checkpoint-2").rename(interrupted / ".saving")
    with checkpoints.only_run(interrupted):
        assert {path.name for path in interrupted.iterdir()} == {"checkpoint-1", ".lock"}


def test_a_finished_run_leaves_no_scraps_and_is_readable_by_others(whole):
    assert not (whole / ".saving").exists()
    assert (whole / "model.safetensors").stat().st_mode == (whole / "config.json").stat().st_mode
    names = {path.name for path in whole.iterdir()}
    assert {"tokenizer.json", "generation_config.json"} < names
    assert "training_args.bin" not in names  # a pickle that would hold --hub_token
    assert json.loads((whole / "config.json").read_text())["use_cache"]  # off in training, on in the base model


def test_the_limit_keeps_the_newest_and_the_best(model, data, tmp_path):
    keep = ("--save_total_limit", 2, "--max_steps", 4, "--eval_fraction", 0.3, "--load_best_model_at_end", "True")
    evaluate = ("--eval_strategy", "steps", "--eval_steps", 1, "--learning_rate", 1.0)  # diverges
    run(model, data, tmp_path, *keep, *evaluate)
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    evals = [(entry["eval_loss"], entry["step"]) for entry in state["log_history"] if "eval_loss" in entry]
    best = min(evals[1:])[1]  # the first was before training
    assert best < 3
    assert [path.name for path in checkpoints.newest_first(tmp_path)] == ["checkpoint-4", f"checkpoint-{best}"]
    assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_a_stopped_run_keeps_its_newest_checkpoint_beside_the_best_and_finds_both_in_a_folder_that_has_moved(
    model, data, tmp_path, monkeypatch, strategy
):
    keep = ("--save_total_limit", 1, "--max_steps", 4, "--eval_fraction", 0.3, "--load_best_model_at_end", "True")
    keep += ("--eval_strategy", "steps", "--eval_steps", 1, "--learning_rate", 1.0, "--save_strategy", strategy)
    keep += ("--metric_for_best_model", "loss")
    with monkeypatch.context() as patch:
        send_at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(stop.Stopped, match="after step 3 of 4, checkpoint saved"):
            run(model, data, tmp_path / "here", *keep)
    state = json.loads((tmp_path / "here" / "checkpoint-3" / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"]).name
    assert best != "checkpoint-3"  # the loss diverges
    assert [path.name for path in checkpoints.newest_first(tmp_path / "here")] == ["checkpoint-3", best]
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    chosen = []
    inner = train.Trainer._load_best_model
    monkeypatch.setattr(
        train.Trainer,
        "_load_best_model",
        lambda self: chosen.append(self.state.best_model_checkpoint) or inner(self),
    )
    run(model, data, tmp_path / "there", *keep, "--resume_from_checkpoint", "auto")
    assert chosen == [str(tmp_path / "there" / best)]
    assert (tmp_path / "here" / "checkpoint-3").exists()


# ---------------------------------------------------------------------------------------------------------------------
# --push_to_hub.


@pytest.fixture
def hub(monkeypatch):
    """A hub that takes everything: a list of commits, each a dictionary from the path there to the file here, or to
    the bytes."""
    commits = []

    def create_commit(self, repo_id, operations, **kwargs):
        sent = {operation.path_in_repo: operation.path_or_fileobj for operation in operations}
        files = {name: Path(path) for name, path in sent.items() if isinstance(path, str)}
        root = min((path.parent for path in files.values()), key=lambda path: len(path.parts))
        commits.append(sent | {name: str(path.relative_to(root)) for name, path in files.items()})

    def upload_folder(self, *, folder_path, **kwargs):
        commits.append({"folder": str(folder_path)})

    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda self: {"name": "me"})
    made = SimpleNamespace(repo_id="me/model")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **kwargs: made)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    return commits


def test_the_finished_model_is_uploaded_once_and_an_interrupted_run_can_be_resumed(
    model, data, whole, tmp_path, monkeypatch, hub
):
    push = ("--push_to_hub", "True", "--resume_from_checkpoint", "auto")
    with monkeypatch.context() as patch:
        send_at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(stop.Stopped):
            run(model, data, tmp_path, *push)
    assert hub == [] and not list(tmp_path.glob("*.safetensors"))
    (tmp_path / "additional_chat_templates").mkdir()  # as a tokenizer with several templates is saved
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    run(model, data, tmp_path, *push)
    assert_same_result(tmp_path, whole)
    assert len(hub) == 1
    uploaded = hub[0]
    receipt = json.loads(uploaded.pop("training_receipt.json"))
    assert receipt["arguments"]["output_dir"] == tmp_path.name
    assert str(tmp_path) not in json.dumps(receipt) and str(model) not in json.dumps(receipt)
    assert uploaded.pop("README.md") == "model_card.md" and all(there == here for there, here in uploaded.items())
    named = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    templates = {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"}
    assert set(uploaded) - {"loss.png"} == named | templates | {"Modelfile"}


def test_an_upload_that_fails_says_that_the_model_is_whole(model, data, tmp_path, monkeypatch, hub):
    def create_commit(self, *args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    with pytest.raises(UserError, match="no route to host.*is complete: hf upload me/model .* --exclude '[*]/[*]'"):
        run(model, data, tmp_path, "--push_to_hub", "True", "--max_steps", 1, "--save_strategy", "no")
    assert (tmp_path / "model.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Resumed with other arguments.


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--learning_rate", "1e-3"), "learning_rate 0.01 (now 0.001)"),
        (("--weight_decay", "0.1", "--adam_beta2", "0.9"), "adam_beta2 0.999 (now 0.9), weight_decay 0.0 (now 0.1)"),
        (("--adam_epsilon", "1e-6"), "adam_epsilon 1e-08 (now 1e-06)"),
        (("--optim", "sgd"), "optim adamw_torch_fused (now sgd)"),
        (("--lr_scheduler_type", "cosine"), "lr_scheduler_type linear (now cosine)"),
        (("--lora_r", "2"), "lora_r 0 (now 2)"),
    ],
)
def test_arguments_that_a_checkpoint_overrides_are_refused_with_both_values(
    model, data, interrupted, monkeypatch, flags, words
):
    monkeypatch.delattr(train, "load_model")  # before it is needed
    resume = ("--resume_from_checkpoint", "auto", *flags)
    assert_user_error(lambda: run(model, data, interrupted, *resume), "checkpoint-2 was trained with", words)
    assert [path.name for path in checkpoints.newest_first(interrupted)] == ["checkpoint-2", "checkpoint-1"]


def test_a_longer_run_is_reported_and_follows_the_new_schedule(model, data, whole, interrupted, capsys):
    run(model, data, interrupted, "--resume_from_checkpoint", "auto", "--max_steps", 10)
    out = capsys.readouterr().out
    assert "note: checkpoint-2 was trained with max_steps 5 (now 10): the new values apply from here" in out
    log = json.loads((interrupted / "trainer_state.json").read_text())["log_history"]
    rates = {entry["step"]: entry["learning_rate"] for entry in log if "learning_rate" in entry}
    assert [rates[step] for step in (1, 4, 10)] == pytest.approx([1e-2, 7e-3, 1e-3])  # 4: 1e-2 * (10 - 3) / 10


def test_a_checkpoint_of_the_same_arguments_or_of_none_is_resumed_without_a_word(whole, interrupted, capsys):
    manifest = json.loads((interrupted / "checkpoint-2" / "checkpoint.json").read_text())
    given = manifest["arguments"]
    assert given["learning_rate"] == 1e-2 and not any(name.endswith("token") for name in given)
    checkpoints.compare(interrupted / "checkpoint-2", given | {"resume_from_checkpoint": "auto"})
    del manifest["arguments"]
    (interrupted / "checkpoint-2" / "checkpoint.json").write_text(json.dumps(manifest))
    checkpoints.compare(interrupted / "checkpoint-2", given | {"learning_rate": 1.0})
    assert capsys.readouterr().out == ""


def test_a_tied_model_is_resumed_without_a_warning(tiny_opt, data, tmp_path, caplog, monkeypatch):
    run(tiny_opt, data, tmp_path / "a", "--max_steps", 2)
    shutil.copytree(tmp_path / "a" / "checkpoint-1", tmp_path / "b" / "checkpoint-1")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level("WARNING", logger="transformers")
    run(tiny_opt, data, tmp_path / "b", "--max_steps", 2, "--resume_from_checkpoint", "auto")
    assert "missing keys" not in caplog.text
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert "lm_head.weight" not in a and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------------------------------
# Two runs, one folder.


def test_a_second_run_ends_at_once_until_the_first_is_killed(model, data, interrupted):
    code = f"""
from alpaca.common.files import only_process
with only_process({str(interrupted)!r}):
    print("locked", flush=True)
    input()
"""
    resume = (model, data, interrupted, "--resume_from_checkpoint", "auto")
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline() == b"locked\n"
        before = sorted(interrupted.rglob("*"))
        for second in (partial(run, *resume), partial(run, *resume, "--preflight_only", "True")):
            assert_user_error(second, "another run is writing to", f"process {first.pid} on ")
        assert sorted(interrupted.rglob("*")) == before
    finally:
        first.kill()
        first.communicate()
    run(*resume, "--preflight_only", "True")
    run(*resume)
    assert not (interrupted / ".lock").exists() and (interrupted / "model.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Which checkpoint.


def test_a_branch_that_was_left_is_never_chosen_again_and_never_deleted(
    model, data, whole, tmp_path, monkeypatch, capsys
):
    for step in (1, 3, 4):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    limit = ("--save_total_limit", 1)

    def kill(*args, **kwargs):
        raise Killed

    def names(folder):
        return {path.name for path in folder.iterdir()}

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "fsync_tree", kill)
        with pytest.raises(Killed):
            run(model, data, tmp_path, "--resume_from_checkpoint", tmp_path / "checkpoint-1", *limit)
    printed = capsys.readouterr().out
    assert (
        f"checkpoint-4, checkpoint-3 to {tmp_path}/abandoned-1, as this run continues from {tmp_path}/checkpoint-1"
        in printed
    )
    assert names(tmp_path) == {".saving", "checkpoint-1", "abandoned-1"}
    assert checkpoints.newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    with monkeypatch.context() as patch:
        send_at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(stop.Stopped):
            run(model, data, tmp_path, "--resume_from_checkpoint", "auto", *limit)
    assert names(tmp_path) == {"checkpoint-2", "abandoned-1"}
    assert names(tmp_path / "abandoned-1") == {"checkpoint-3", "checkpoint-4"}


def test_one_may_return_to_a_branch_that_was_left(whole, interrupted):
    """The one that is left for it gets a folder of its own, though they have checkpoints of the same step."""
    checkpoints.set_aside_newer(interrupted, interrupted / "checkpoint-1")
    shutil.copytree(whole / "checkpoint-2", interrupted / "checkpoint-2")
    (interrupted / "checkpoint-2" / "second").touch()
    left = interrupted / "abandoned-1" / "checkpoint-2"
    assert checkpoints.choose_checkpoint(str(left), interrupted) == left
    checkpoints.set_aside_newer(interrupted, left)
    assert checkpoints.newest_first(interrupted) == [] and left.exists()
    assert {path.name for path in (interrupted / "abandoned-2").iterdir()} == {"checkpoint-1", "checkpoint-2"}
    assert (interrupted / "abandoned-2" / "checkpoint-2" / "second").exists()


def test_a_checkpoint_that_lacks_any_file_is_passed_over(interrupted):
    newest, previous = interrupted / "checkpoint-2", interrupted / "checkpoint-1"
    needed = list(json.loads((newest / "checkpoint.json").read_text())["files"])
    assert {"trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"} < set(needed)
    for name in [*needed, "checkpoint.json"]:
        assert checkpoints.newest_complete_checkpoint(interrupted) == newest
        (newest / name).rename(interrupted / "aside")
        assert checkpoints.newest_complete_checkpoint(interrupted) == previous, name
        (interrupted / "aside").rename(newest / name)


def test_a_checkpoint_of_a_plain_trainer_is_resumed_only_by_name_and_with_a_note(
    model, data, whole, interrupted, capsys
):
    """Nobody knows whether it is complete."""
    plain = interrupted / "checkpoint-2"
    (plain / "checkpoint.json").unlink()
    assert checkpoints.choose_checkpoint("auto", interrupted) == interrupted / "checkpoint-1"
    assert "checkpoint-2, which is incomplete (checkpoint.json does not exist)" in capsys.readouterr().out
    shutil.rmtree(interrupted / "checkpoint-1")
    with pytest.raises(UserError, match="checkpoint-2 is from an interrupted run"):
        checkpoints.choose_checkpoint(None, interrupted)
    run(model, data, interrupted, "--resume_from_checkpoint", plain)
    assert f"note: {plain} has no checkpoint.json" in capsys.readouterr().out
    assert_same_result(interrupted, whole)


@pytest.mark.parametrize("name, size", [("optimizer.pt", 1000), ("trainer_state.json", 100)])
def test_a_checkpoint_with_a_truncated_file_is_passed_over(interrupted, capsys, name, size):
    os.truncate(interrupted / "checkpoint-2" / name, size)
    assert checkpoints.newest_complete_checkpoint(interrupted) == interrupted / "checkpoint-1"
    assert re.search(f"skipped .*checkpoint-2, which is incomplete .*{name}", capsys.readouterr().out)


def test_a_checkpoint_of_the_weights_alone_is_no_place_to_go_on_from(model, data, tmp_path):
    run(model, data, tmp_path, "--max_steps", 1, "--save_only_model", "True")
    assert checkpoints.what_is_missing(tmp_path / "checkpoint-1") == "save_only_model omitted its optimizer"


def test_a_folder_with_an_interrupted_run_is_not_overwritten(interrupted):
    with pytest.raises(UserError, match="checkpoint-2 is from an interrupted run.*--resume_from_checkpoint auto"):
        checkpoints.choose_checkpoint(None, interrupted)
    assert checkpoints.choose_checkpoint("auto", interrupted) == interrupted / "checkpoint-2"
    assert checkpoints.choose_checkpoint(str(interrupted / "checkpoint-1"), interrupted) == interrupted / "checkpoint-1"


def test_auto_begins_where_there_is_no_checkpoint(tmp_path, capsys):
    assert checkpoints.choose_checkpoint("auto", tmp_path) is None
    assert "starting from scratch" in capsys.readouterr().out


def test_an_incomplete_checkpoint_that_is_named_is_refused(interrupted):
    (interrupted / "checkpoint-2" / "scheduler.pt").unlink()
    with pytest.raises(
        UserError, match=r"not a complete checkpoint .scheduler.pt is missing.*: use the newest complete one"
    ):
        checkpoints.choose_checkpoint(str(interrupted / "checkpoint-2"), interrupted)
    with pytest.raises(UserError, match="checkpoint-7 is not a complete checkpoint .checkpoint.json does not exist"):
        checkpoints.choose_checkpoint(str(interrupted / "checkpoint-7"), interrupted)


def test_a_finished_run_is_told(whole):
    for resume in ("auto", str(whole / "checkpoint-2"), None):
        with pytest.raises(UserError, match="has a trained model, the run is finished: choose another folder"):
            checkpoints.choose_checkpoint(resume, whole)


def test_a_run_that_was_killed_before_its_final_save_only_saves(model, data, whole, tmp_path, capsys):
    shutil.copytree(whole / f"checkpoint-{STEPS}", tmp_path / f"checkpoint-{STEPS}")
    run(model, data, tmp_path, "--resume_from_checkpoint", "auto")
    assert f"all {STEPS} steps are already done" in capsys.readouterr().out
    assert_same_result(tmp_path, whole)


def test_a_checkpoint_of_another_model_is_refused(tiny_opt, tiny_llama, data, interrupted, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny_llama, intermediate_size=96)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "narrow")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_llama / name, tmp_path / "narrow" / name)
    other = r"with tensors 21 trained, .* .now {} trained.*cannot change midway"
    for base, tensors in ((tiny_opt, 36), (tmp_path / "narrow", 21)):
        with pytest.raises(UserError, match=other.format(tensors)):
            run(base, data, interrupted, "--resume_from_checkpoint", "auto")


def test_another_number_of_examples_a_step_is_refused_with_the_cure(model, data, interrupted):
    with pytest.raises(UserError, match="examples_per_step 8 .now 4.: use the same batch size x gradient_accumulation"):
        run(model, data, interrupted, "--resume_from_checkpoint", "auto", "--per_device_train_batch_size", 4)


@pytest.mark.parametrize(
    "flags",
    [
        ("--eval_fraction", 0.25),
        ("--model_max_length", 175),
        ("--data_path", "others"),
    ],
)
def test_other_data_than_a_checkpoint_was_trained_on_is_refused_with_the_cure(model, data, interrupted, flags, capsys):
    if flags[1] == "others":
        records = make_records(24)
        records[7]["output"] += "!"
        (interrupted / "others.json").write_text(json.dumps(records))
        flags = (flags[0], interrupted / "others.json")
    with pytest.raises(UserError, match='with examples 24 in order 42, .*remove "examples" from .*point.json'):
        run(model, data, interrupted, "--resume_from_checkpoint", "auto", *flags, *REHEARSED)
    assert "saved, reloaded and resumed" not in capsys.readouterr().out  # refused before the rehearsal


def test_another_order_of_the_data_is_refused(model, data, interrupted):
    with pytest.raises(UserError, match="in order 42, .* .now 24 in order 7, .* use the same .* data_seed or seed"):
        run(model, data, interrupted, "--resume_from_checkpoint", "auto", "--data_seed", 7)


def test_the_facts_of_a_run_tell_its_tokens_labels_packing_and_order_and_not_how_they_are_stored():
    linear = torch.nn.Linear(2, 3)
    args = SimpleNamespace(seed=42, data_seed=None, train_batch_size=4, gradient_accumulation_steps=2, world_size=3)
    examples = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}]
    facts = checkpoints.run_facts(linear, examples, args)
    assert facts["examples"].startswith("2 in order 42, ") and facts["tensors"].startswith("2 trained, ")
    assert facts["examples_per_step"] == 24
    packed = type("Bins", (), {"dataset": examples, "bins": [[0, 1]]})()
    assert checkpoints.run_facts(linear, packed, args)["examples"] == facts["examples"].replace("2 in", "2 packed in")
    assert checkpoints.run_facts(linear, torch.utils.data.Subset(examples, [1]), args) == facts
    args.data_seed = 7
    assert checkpoints.run_facts(linear, examples, args)["examples"] == facts["examples"].replace("42", "7")
    examples[0]["labels"][1] = -100
    changed = checkpoints.run_facts(torch.nn.Linear(3, 2), examples, args)
    assert {key for key in facts if changed[key] != facts[key]} == {"tensors", "examples"}
    assert changed["examples"].split("sha256")[1] != facts["examples"].split("sha256")[1]


def test_a_checkpoint_that_does_not_tell_its_data_goes_on_with_any(model, data, interrupted):
    manifest = json.loads((interrupted / "checkpoint-2" / "checkpoint.json").read_text())
    del manifest["examples"]
    (interrupted / "checkpoint-2" / "checkpoint.json").write_text(json.dumps(manifest))
    run(model, data, interrupted, "--resume_from_checkpoint", "auto", "--eval_fraction", 0.25, "--max_steps", 3)
    assert (interrupted / "model.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Stopped.


def send_at_step(monkeypatch, step, action):
    """Calls ``action`` in the middle of a step, as a signal would arrive."""
    inner = train.Trainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            action()
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(train.Trainer, "training_step", training_step)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits_and_the_resumed_run_equals_an_uninterrupted_one(
    model, data, whole, tmp_path, monkeypatch, capsys, number, code
):
    before = signal.getsignal(number)
    saves = ("--save_steps", 100)  # none of its own
    argv = [str(word) for word in arguments(model, data, tmp_path, *saves)]
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    with monkeypatch.context() as patch:
        send_at_step(patch, 2, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as exit_:
            train.main()
    assert exit_.value.code == code
    assert f"stopped by {number.name} after step 2 of 5, checkpoint saved" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]
    assert signal.getsignal(number) == before
    if number == signal.SIGTERM:
        run(model, data, tmp_path, "--resume_from_checkpoint", "auto", *saves)
        assert_same_result(tmp_path, whole)


def test_a_second_signal_ends_the_process_at_once_and_its_echo_does_not(monkeypatch):
    """torchrun passes a Ctrl-C on to workers that the terminal has sent it to already."""
    killed, clock = [], [100.0]
    monkeypatch.setattr(stop.os, "kill", lambda pid, number: killed.append((pid, number)))
    monkeypatch.setattr(stop.signal, "signal", lambda number, handler: killed.append(handler))
    monkeypatch.setattr(stop.time, "monotonic", lambda: clock[0])
    listener = stop.StopOnSignal()
    listener.handle(signal.SIGINT, None)
    clock[0] += 0.2
    listener.handle(signal.SIGINT, None)
    assert listener.received == signal.SIGINT and not killed
    clock[0] += 3
    listener.handle(signal.SIGINT, None)
    assert killed == [signal.SIG_DFL, (os.getpid(), signal.SIGINT)]


def test_a_signal_that_arrives_while_the_ranks_agree_counts_at_the_next_step(monkeypatch):
    """The first rank waits in that step's all_reduce for the others."""
    listener, state = stop.StopOnSignal(), SimpleNamespace(global_step=1, max_steps=9)
    args = SimpleNamespace(world_size=2, device="cpu")
    monkeypatch.setattr(stop.torch.distributed, "all_reduce", lambda *args: listener.handle(signal.SIGTERM, None))
    for stopped_by in (0, signal.SIGTERM):
        control = SimpleNamespace(should_training_stop=False)
        listener.on_step_end(args, state, control)
        assert (listener.stopped_by, control.should_training_stop) == (stopped_by, bool(stopped_by))


def test_a_rank_that_stops_for_another_ones_signal_is_not_killed_by_torchruns_own(monkeypatch):
    """torchrun ends the other processes when the first one has left."""
    killed = []
    monkeypatch.setattr(stop.os, "kill", lambda *args: killed.append(args))
    monkeypatch.setattr(stop.torch.distributed, "all_reduce", lambda tensor, op: tensor.fill_(signal.SIGINT))
    listener, state = stop.StopOnSignal(), SimpleNamespace(global_step=1, max_steps=9)
    listener.on_step_end(SimpleNamespace(world_size=2, device="cpu"), state, SimpleNamespace())
    assert listener.stopped_by == signal.SIGINT
    listener.handle(signal.SIGTERM, None)
    assert not killed


# ---------------------------------------------------------------------------------------------------------------------
# Out of disk. A limit on the size of a file stands for it: writes fail in the same places, in the kernel.


@pytest.fixture
def file_size_limit():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("full_in", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_leaves_the_previous_checkpoint(model, data, interrupted, monkeypatch, file_size_limit, full_in):
    size = (interrupted / "checkpoint-2" / full_in).stat().st_size
    send_at_step(monkeypatch, 3, lambda: file_size_limit(size - 1000))
    with pytest.raises(RankError) as failure:
        run(model, data, interrupted, "--resume_from_checkpoint", "auto", "--save_total_limit", 1)
    assert "checkpoint-3 could not be saved" in str(failure.value) and "\n" not in str(failure.value)
    assert "fix the cause, then resume with --resume_from" in str(failure.value)
    assert [path.name for path in checkpoints.newest_first(interrupted)] == ["checkpoint-2", "checkpoint-1"]
    assert not (interrupted / ".saving").exists()


def test_a_full_disk_in_the_final_save_leaves_no_model(model, data, whole, tmp_path, monkeypatch, file_size_limit):
    shutil.copytree(whole / f"checkpoint-{STEPS}", tmp_path / f"checkpoint-{STEPS}")
    inner = train.Trainer.save_whole_model

    def save_whole_model(*args, **kwargs):
        file_size_limit(100_000)
        inner(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "save_whole_model", save_whole_model)
        with pytest.raises(RankError, match="the model could not be saved"):
            run(model, data, tmp_path, "--resume_from_checkpoint", "auto")
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{STEPS}"]


# ---------------------------------------------------------------------------------------------------------------------
# Another number of ranks.

SIGNAL_ONE_RANK = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import train
inner = train.Trainer.training_step
def training_step(self, *args, **kwargs):
    if self.state.global_step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return inner(self, *args, **kwargs)
train.Trainer.training_step = training_step
train.main()
"""
FSDP = ("--fsdp", "--fsdp_config", "configs/fsdp.json", "--per_device_train_batch_size", 4)


@pytest.fixture(scope="module")
def one_rank(tiny_llama, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out"
    run(tiny_llama, data, out)
    return out


def assert_close(a: Path, b: Path) -> None:
    x, y = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert x.keys() == y.keys()
    deviations = torch.cat([(x[name] - y[name]).abs().flatten() for name in x])
    assert deviations.max() < 1e-4 and deviations.mean() < 1e-6
    assert losses(a) == pytest.approx(losses(b), abs=1e-5)


@pytest.fixture(scope="module")
def stopped(tiny_llama, data, one_rank, tmp_path_factory):
    """Two ranks under FSDP go on from the first checkpoint of one process; a signal to one of them stops both."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    shutil.copytree(one_rank / "checkpoint-1", out / "checkpoint-1")
    script = out.parent / "stop_one_rank.py"
    script.write_text(SIGNAL_ONE_RANK)
    auto = ("--resume_from_checkpoint", "auto", "--save_steps", 100, *REHEARSED)
    result = torchrun(2, script, ROOT, *arguments(tiny_llama, data, out, *FSDP, *auto))
    assert re.search(r"exitcode *: 75", result.stderr), result.stderr  # of the rank that left first
    assert "checkpoint-1 was trained with world_size 1 (now 2): the new values apply from here" in result.stdout
    assert "stopped by SIGTERM after step 3 of 5, checkpoint saved" in result.stdout
    return out


def test_two_ranks_write_a_shard_each_and_all_of_it_is_needed(stopped, tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(stopped / "checkpoint-3", checkpoint)
    files = {path.name for path in checkpoint.rglob("*") if path.is_file()}
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "rng_state_0.pth", "rng_state_1.pth"} < files
    assert not list(checkpoint.glob("*.safetensors")) and not list(checkpoint.glob("*.bin"))  # no second copy
    for path in [path for path in checkpoint.rglob("*") if path.is_file() and path.name != checkpoints.MANIFEST]:
        path.rename(tmp_path / "aside")
        assert checkpoints.newest_complete_checkpoint(tmp_path) is None, path
        (tmp_path / "aside").rename(path)
    assert checkpoints.newest_complete_checkpoint(tmp_path) == checkpoint


def test_one_rank_goes_on_from_a_checkpoint_of_two(tiny_llama, data, one_rank, stopped, tmp_path, capsys):
    shutil.copytree(stopped / "checkpoint-3", tmp_path / "checkpoint-3")
    run(tiny_llama, data, tmp_path, "--resume_from_checkpoint", "auto", *REHEARSED)
    assert "world_size 2 (now 1)" in capsys.readouterr().out
    assert_close(tmp_path, one_rank)


KILL_ONE_RANK_IN_SAVE = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import train
inner = train.Trainer._save_rng_state
def _save_rng_state(self, folder):
    if self.state.global_step == 5 and os.environ["RANK"] == "1":  # weights and optimizer are written
        os.kill(os.getpid(), signal.SIGKILL)
    inner(self, folder)
train.Trainer._save_rng_state = _save_rng_state
train.main()
"""


def test_two_ranks_whose_configuration_gathers_read_shards_and_one_killed_in_a_save_leaves_the_previous_to_one_rank(
    tiny_llama, data, one_rank, stopped, tmp_path
):
    """checkpoint-3 is in shards, checkpoint-4 gathered; one rank ends the run."""
    out, script = tmp_path / "out", tmp_path / "kill_one_rank.py"
    shutil.copytree(stopped / "checkpoint-3", out / "checkpoint-3")
    script.write_text(KILL_ONE_RANK_IN_SAVE)
    config = json.loads((ROOT / "configs" / "fsdp.json").read_text()) | {"state_dict_type": "FULL_STATE_DICT"}
    (tmp_path / "fsdp.json").write_text(json.dumps(config))
    flags = ("--fsdp", "--fsdp_config", tmp_path / "fsdp.json", "--per_device_train_batch_size", 4)
    auto = ("--resume_from_checkpoint", "auto", "--save_total_limit", 1)
    result = torchrun(2, script, ROOT, *arguments(tiny_llama, data, out, *flags, *auto, *REHEARSED))
    assert "saved, reloaded and resumed: weights and optimizer equal" in result.stdout
    assert result.returncode != 0  # -9 of the killed rank, or 1 of the other, which misses it
    assert {path.name for path in out.iterdir()} - {".lock", ".saving"} == {"checkpoint-4"}
    assert (out / "checkpoint-4" / "optimizer.bin").exists()
    run(tiny_llama, data, out, *auto)
    assert_close(out, one_rank)
