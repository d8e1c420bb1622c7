"""alpaca/weights/folder.py: output that is whole or not there."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from pathlib import Path

import pytest
from made_models import folder_with, left_in

from alpaca import UserError
from alpaca.common import files
from alpaca.weights.folder import check_links, copy_side_files, model_folder


def test_a_new_folder_appears_whole(tmp_path):
    target = tmp_path / "not" / "yet" / "there"
    with model_folder(target) as folder:
        (folder / "file").write_text("whole")
        assert not target.exists()
    assert (target / "file").read_text() == "whole"
    assert target.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in target.parent.iterdir()] == ["there"]


@pytest.mark.parametrize("error", [ValueError, UserError, KeyboardInterrupt, SystemExit])
def test_a_new_folder_is_gone_whatever_fails(tmp_path, error):
    with pytest.raises(error), model_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("half")
        raise error("in the middle")
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_takes_the_place_of_an_empty_one_only(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    with model_folder(target) as folder:
        (folder / "file").write_text("first")
    with pytest.raises(UserError, match="target already exists: remove it"), model_folder(target):
        raise AssertionError("not reached")
    with pytest.raises(UserError, match="file already exists"), model_folder(target / "file"):
        raise AssertionError("not reached")
    assert (target / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_side_files_are_copied_byte_for_byte_and_nothing_else_is(tmp_path):
    source = folder_with(
        tmp_path / "source",
        tokenizer__model=b"\x00\xff",
        vocab__txt="[PAD]",
        spiece__model=b"\x01",
        tekken__json={},
        tokenizer__json='{"é" :1}\r\n',
        chat_template__jinja="{{ x }}",
        generation_config__json={},
        training_args__bin=b"pickle",
        optimizer__pt=b"x",
        weight_diff__json={},
    )
    for name in ("rag.jinja", "notes.md"):
        (source / "additional_chat_templates").mkdir(exist_ok=True)
        (source / "additional_chat_templates" / name).write_text("{{ y }}")
    target = tmp_path / "target"
    with model_folder(target) as unfinished:
        copy_side_files(source, unfinished, {"_name_or_path": "/home/me", "vocab_size": 5})
        assert "config.json" not in left_in(unfinished)  # so that it does not load
        (unfinished / "model.safetensors").touch()
    assert left_in(target) == [
        "additional_chat_templates",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "spiece.model",
        "tekken.json",
        "tokenizer.json",
        "tokenizer.model",
        "vocab.txt",
    ]
    assert left_in(target / "additional_chat_templates") == ["rag.jinja"]
    assert (target / "additional_chat_templates" / "rag.jinja").read_text() == "{{ y }}"
    assert (target / "tokenizer.model").read_bytes() == b"\x00\xff"
    assert (target / "tokenizer.json").read_bytes() == '{"é" :1}\r\n'.encode()
    assert (target / "config.json").read_text() == '{\n  "vocab_size": 5\n}\n'
    with model_folder(target, "--out", overwrite=True) as folder:  # which knows all of these as a model's
        (folder / "config.json").write_text("new")
    assert left_in(target) == ["config.json"]


# ---------------------------------------------------------------------------------------------------------------------
# Overwriting, kills, other processes.


def test_a_receipt_is_copied_without_folders_and_a_card_as_it_is(tmp_path):
    receipt = {
        "model": {"started_from": "huggyllama/llama-7b", "parameters": 6738415616},
        "data": {
            "train": {"path": "/home/ann/secret/a.json,../b.jsonl", "sha256": "ab12", "parts": {"tatsu-lab/alpaca": 2}},
            "eval": {"path": "tatsu-lab/alpaca_eval"},
        },
        "arguments": {
            "model_name_or_path": "/home/ann/models/llama-7b/",
            "data_path": "secret/a.json",
            "output_dir": "ann/run",
            "logging_dir": "C:\\Users\\ann\\logs",
            "deepspeed": {"nvme_path": "/scratch/ann/nvme"},
            "report_to": ["file:///home/ann/wandb"],
            "learning_rate": 2e-05,
        },
        "samples": [{"prompt": "km/h and /etc?"}],
        "losses": [{"step": 1, "loss": 1.5}],
    }
    source, diff, recovered = (tmp_path / name for name in ("tuned", "diff", "recovered"))
    source.mkdir()
    (source / "training_receipt.json").write_text(json.dumps(receipt))
    (source / "model_card.md").write_bytes(b"# A card\r\n")
    for before, after in ((source, diff), (diff, recovered)):  # make_diff, and recover from what it made
        with model_folder(after) as unfinished:
            copy_side_files(before, unfinished, {})
        assert (after / "model_card.md").read_bytes() == b"# A card\r\n"
        assert json.loads((after / "training_receipt.json").read_text()) == {
            "model": {"started_from": "huggyllama/llama-7b", "parameters": 6738415616},
            "data": {
                "train": {"path": "a.json,b.jsonl", "sha256": "ab12", "parts": {"tatsu-lab/alpaca": 2}},
                "eval": {"path": "tatsu-lab/alpaca_eval"},
            },
            "arguments": {
                "model_name_or_path": "llama-7b",
                "data_path": "a.json",
                "output_dir": "run",
                "logging_dir": "logs",
                "deepspeed": {"nvme_path": "nvme"},
                "report_to": ["wandb"],
                "learning_rate": 2e-05,
            },
            "samples": [{"prompt": "km/h and /etc?"}],
            "losses": [{"step": 1, "loss": 1.5}],
            "note": "of each path, only the last part is published",
        }


def test_a_path_that_old_transformers_wrote_is_left_out_of_the_tokenizers_config(tmp_path):
    paths = {key: "/home/ann/x" for key in ("name_or_path", "_name_or_path", "special_tokens_map_file")}
    source = folder_with(tmp_path / "source", tokenizer_config__json=paths | {"pad_token": "[PAD]"})
    with model_folder(tmp_path / "target") as unfinished:
        copy_side_files(source, unfinished, {})
    assert json.loads((tmp_path / "target" / "tokenizer_config.json").read_text()) == {"pad_token": "[PAD]"}


def model(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "config.json").write_text(text)
    (path / "model.safetensors").write_text(text)
    return path


def test_overwrite_replaces_a_model_when_the_new_one_is_whole(tmp_path):
    target = model(tmp_path / "target", "old")
    (target / "weight_diff.json").touch()  # only in the old one
    with model_folder(target, "--out", overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        assert (target / "config.json").read_text() == "old"
    assert left_in(target) == ["config.json"] and (target / "config.json").read_text() == "new"
    assert left_in(tmp_path) == ["target"]


def test_an_overwrite_that_fails_leaves_the_old_model(tmp_path):
    target = model(tmp_path / "target", "old")
    with pytest.raises(KeyboardInterrupt), model_folder(target, "--out", overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        raise KeyboardInterrupt
    assert (target / "config.json").read_text() == "old" and left_in(tmp_path) == ["target"]


def test_overwrite_leaves_what_is_no_model_and_what_is_an_input(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis").touch()
    with pytest.raises(UserError, match="is not a model, so it is not overwritten"), model_folder(home, "--out", True):
        raise AssertionError("not reached")
    raw = model(home / "raw", "raw")
    for path, overwrite in itertools.product((raw, home, home / "x" / ".." / "raw"), (True, False)):
        with (
            pytest.raises(UserError, match="is, contains or lies in"),
            model_folder(path, "--out", overwrite, [raw]),
        ):
            raise AssertionError("not reached: without overwrite too, or the message would say to remove the input")
    assert left_in(tmp_path) == ["home"] and left_in(home) == ["raw", "thesis"]


@pytest.mark.parametrize(
    "more",
    [
        ".git/",
        "README.md",
        "checkpoint-20/",
        "training_args.bin",
        "optimizer.pt",
        "vocab.json/",
        "model.py",
        "additional_chat_templates/x",
    ],
)
def test_overwrite_leaves_a_model_that_has_something_beside_it_and_names_that(tmp_path, more):
    target = model(tmp_path / "target", "old")
    (target / more).parent.mkdir(exist_ok=True)
    (target / more).mkdir() if more.endswith("/") else (target / more).touch()
    with pytest.raises(
        UserError, match=rf"has more than a model in it \({more.split('/')[0]}\), so it is not overwritten"
    ):
        with model_folder(target, "--out", overwrite=True):
            raise AssertionError("not reached")
    assert (target / "config.json").read_text() == "old" and left_in(tmp_path) == ["target"]


def test_overwrite_leaves_a_folder_that_has_a_config_and_no_weights(tmp_path):
    target = model(tmp_path / "target", "of a project")
    (target / "model.safetensors").unlink()
    with (
        pytest.raises(UserError, match="is not a model, so it is not overwritten"),
        model_folder(target, "--out", True),
    ):
        raise AssertionError("not reached")
    assert left_in(target) == ["config.json"]


def test_overwrite_replaces_a_sharded_model_with_all_that_one_has(tmp_path):
    target = folder_with(
        tmp_path / "target",
        model__safetensors__index__json={},
        tokenizer__model="x",
        tokenizer_config__json={},
        generation_config__json={},
        weight_diff__json={},
    )
    for name in ("model-00001-of-00002.safetensors", "pytorch_model-00002-of-00033.bin"):
        (target / name).touch()
    with model_folder(target, "--out", overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert left_in(target) == ["config.json"]


def test_a_target_in_an_input_is_refused(tmp_path):
    raw = model(tmp_path / "raw", "raw")
    (tmp_path / "link").symlink_to(raw)
    for path in (raw / "out", raw / "a" / "b", tmp_path / "link" / "out"):
        with (
            pytest.raises(UserError, match="or lies in the input .*raw"),
            model_folder(path, "--out", inputs=[raw]),
        ):
            raise AssertionError("not reached")
    assert left_in(raw) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("state", ["model", "empty", "missing"])
def test_a_link_as_target_stays_and_what_it_points_to_is_made(tmp_path, state):
    disk, link = tmp_path / "disk", tmp_path / "link"
    disk.mkdir()
    if state == "model":
        model(disk / "target", "old")
    elif state == "empty":
        (disk / "target").mkdir()
    link.symlink_to(disk / "target")
    with model_folder(link, "--out", overwrite=True) as folder:
        assert folder.parent == disk  # the new one is written on the disk where it is to be
        (folder / "config.json").write_text("new")
    assert link.is_symlink() and (disk / "target" / "config.json").read_text() == "new"
    assert left_in(disk) == ["target"] and left_in(tmp_path) == ["disk", "link"]


def test_a_mount_point_as_target_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == target)
    with pytest.raises(UserError, match="--out .*target is a mount point: choose a folder inside it"):
        with model_folder(target, "--out"):
            raise AssertionError("not reached")
    assert left_in(tmp_path) == ["target"]


def test_the_only_copy_is_put_back_although_an_empty_folder_is_in_its_place(tmp_path):
    target = tmp_path / "target"
    model(tmp_path / ".target.replaced", "old")
    target.mkdir()
    with pytest.raises(KeyboardInterrupt), model_folder(target, "--out", overwrite=True):
        assert (target / "config.json").read_text() == "old"
        raise KeyboardInterrupt
    assert (target / "config.json").read_text() == "old" and left_in(tmp_path) == ["target"]


def test_the_only_copy_stays_when_something_else_has_come_to_its_place(tmp_path):
    target = tmp_path / "target"
    model(tmp_path / ".target.replaced", "old")
    target.mkdir()
    (target / "thesis").touch()
    with (
        pytest.raises(UserError, match="exists, and .*replaced has what it replaced"),
        model_folder(target, "--out", True),
    ):
        raise AssertionError("not reached")
    assert left_in(tmp_path) == [".target.replaced", "target"] and left_in(target) == ["thesis"]


@pytest.mark.parametrize("what", ["link to a folder", "link to nothing", "file"])
def test_a_link_in_the_place_of_the_unfinished_folder_is_not_followed(tmp_path, what):
    other, unfinished = tmp_path / "other", tmp_path / ".target.unfinished"
    other.mkdir()
    (other / "thesis").touch()
    unfinished.touch() if what == "file" else unfinished.symlink_to(other if "folder" in what else tmp_path / "none")
    with pytest.raises(OSError), model_folder(tmp_path / "target"):
        raise AssertionError("not reached")
    assert left_in(other) == ["thesis"] and left_in(tmp_path) == [".target.unfinished", "other"]


def test_links_in_what_a_kill_left_are_removed_and_not_followed(tmp_path):
    other, unfinished = tmp_path / "other", tmp_path / ".target.unfinished"
    other.mkdir()
    (other / "thesis").touch()
    unfinished.mkdir()
    (unfinished / "link").symlink_to(other)
    with model_folder(tmp_path / "target") as folder:
        assert left_in(folder) == []
    assert left_in(other) == ["thesis"]


def test_the_names_in_a_folder_are_on_the_disk_before_the_folder_has_its_own(tmp_path, monkeypatch):
    seen, rename, fsync = [], os.rename, files.fsync
    monkeypatch.setattr(os, "rename", lambda a, b: (seen.append(f"rename to {Path(b).name}"), rename(a, b)))
    monkeypatch.setattr(files, "fsync", lambda path: (seen.append(f"fsync {path.name}"), fsync(path)))
    with model_folder(tmp_path / "target") as folder:
        (folder / "config.json.unfinished").touch()
    assert seen == [
        "fsync config.json.unfinished",
        "fsync .target.unfinished",
        "rename to config.json",
        "fsync .target.unfinished",
        "rename to target",
        f"fsync {tmp_path.name}",
    ]


def in_a_child(task) -> int:
    """Runs ``task`` in a forked process; what a shell would say of its end: 0, or minus a signal's number."""
    pid = os.fork()
    if pid == 0:
        try:
            task()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("call", ["yield", "fsync_tree", "rename 1", "rename 2", "rename 3", "rmtree"])
@pytest.mark.parametrize("old", [True, False])
def test_after_a_kill_at_any_step_the_target_is_old_or_new_and_the_next_run_goes_through(
    tmp_path, monkeypatch, call, old
):
    """Renames: config.json gets its name, the old model goes aside, the new one gets its place."""
    target = tmp_path / "target"
    if old:
        model(target, "old")

    def make(text: str) -> None:
        with model_folder(target, "--out", overwrite=True) as folder:
            (folder / "model.safetensors").write_text(text)
            if call == "yield" and text == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            (folder / "config.json.unfinished").write_text(text)

    def killed() -> None:
        name, _, number = call.partition(" ")
        if name != "yield":
            module = {
                "fsync_tree": "alpaca.common.files.fsync_tree",
                "rename": "os.rename",
                "rmtree": "shutil.rmtree",
            }[name]
            calls = []
            monkeypatch.setattr(
                module,
                lambda *_, **__: (
                    os.kill(os.getpid(), signal.SIGKILL)
                    if len(calls) + 1 == int(number or 1)
                    else calls.append(real(*_, **__))
                ),
            )
        make("killed")

    real = os.rename
    expected = 1 if call == "rename 3" and not old else -signal.SIGKILL  # without an old one there are two
    assert in_a_child(killed) == expected
    state = (target / "config.json").read_text() if target.exists() else None
    unfinished = tmp_path / ".target.unfinished"
    if state is None and call == "rename 3":  # the moment between the two renames: all of the old model is aside
        assert (tmp_path / ".target.replaced" / "config.json").read_text() == "old"
    else:
        assert state == ("killed" if call == "rmtree" or expected == 1 else "old" if old else None)
    if unfinished.exists() and call in ("yield", "fsync_tree", "rename 1"):
        assert "config.json" not in left_in(unfinished)
    make("next")
    assert (target / "config.json").read_text() == (target / "model.safetensors").read_text() == "next"
    assert left_in(tmp_path) == ["target"]


def test_a_folder_that_a_live_process_makes_is_left_to_it(tmp_path):
    target, begun = tmp_path / "target", tmp_path / "begun"

    def make() -> None:
        with model_folder(target) as folder:
            (folder / "file").write_text("the first one's")
            begun.touch()
            time.sleep(60)

    pid = os.fork()
    if pid == 0:
        try:
            make()
        finally:
            os._exit(1)
    try:
        while not begun.exists():
            time.sleep(0.01)
        with pytest.raises(UserError, match="is being written by another process"), model_folder(target):
            raise AssertionError("not reached")
        assert (tmp_path / ".target.unfinished" / "file").read_text() == "the first one's"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with model_folder(target) as folder:  # and once it is dead
        assert left_in(folder) == []
    assert left_in(tmp_path) == ["begun", "target"] and left_in(target) == []


@pytest.mark.parametrize("place", ["file/target", "file/deeper/target"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written, .*file is a file or read-only"):
        with model_folder(tmp_path / place, "--out"):
            raise AssertionError("not reached")


def test_a_read_only_parent_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UserError, match="--out .* cannot be written"), model_folder(tmp_path / "target", "--out"):
        raise AssertionError("not reached")
    assert left_in(tmp_path) == []


def test_a_link_out_of_a_diff_is_refused_and_those_of_the_hubs_cache_are_not(tmp_path):
    """models--x/snapshots/r/tokenizer.json -> ../../blobs/1, as the hub's cache has it."""
    folder, blobs = tmp_path / "models--x" / "snapshots" / "r", tmp_path / "models--x" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("{}")
    (folder / "tokenizer.json").symlink_to("../../blobs/1")
    (folder / "config.json").write_text("{}")
    (folder / "merges.txt").symlink_to("config.json")
    check_links(folder)
    (tmp_path / "private").write_text("key")
    (folder / "tokenizer.model").symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match="tokenizer.model is a link out of its folder"):
        check_links(folder)
    (folder / "tokenizer.model").rename(folder / "model_card.md")
    with pytest.raises(UserError, match="model_card.md is a link"):
        check_links(folder)
    (folder / "model_card.md").unlink()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "a.jinja").symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match="a.jinja is a link"):
        check_links(folder)
