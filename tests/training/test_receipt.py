"""alpaca/training/receipt.py: the receipt, the card and the plot of a real run; no secret, nothing left to fill in."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, make_records

import train
from alpaca.common.files import git_blob_id
from alpaca.common.records import SHIPPED, load_records
from alpaca.training import receipt

SECRET = "hf_do-not-tell-0123456789"


def run(model, data, out, *extra):
    """6 steps of 4 examples, in this process; two held out of 24; checkpoints at 2 and 4."""
    argv = ["--model_name_or_path", model, "--data_path", data, "--output_dir", out, "--max_steps", 6]
    argv += ["--per_device_train_batch_size", 4, "--learning_rate", 1e-3, "--logging_steps", 1, "--save_steps", 2]
    argv += ["--eval_fraction", 0.1, "--disable_tqdm", "True", "--use_cpu", "True", "--report_to", "none", *extra]
    train.train(*train.parse_args([str(word) for word in argv]))
    return json.loads((out / "training_receipt.json").read_text())


@pytest.fixture(scope="module")
def finished(tiny_llama, tmp_path_factory):
    """(output folder, receipt) of a run with a hub token and a price."""
    folder = tmp_path_factory.mktemp("run")
    data = folder / "my_data.json"
    data.write_text(json.dumps(make_records(24)))
    return folder / "out", run(
        tiny_llama, data, folder / "out", "--hub_token", SECRET, "--gpu_hour_price", 2.5, "--seed", 7
    )


def test_the_receipt_says_from_what_how_and_at_what_cost(finished, tiny_llama):
    out, paper = finished
    data = out.parent / "my_data.json"
    assert paper["model"] == {
        "started_from": str(tiny_llama),
        "commit": None,
        "type": "llama",
        "parameters": 2 * 36_864 + 5 * 64 + 2 * 301 * 64,  # layers, norms, embeddings with a row for [PAD]
        "trainable_parameters": 112_576,
    }
    assert paper["data"]["train"] == {
        "path": str(data),
        "sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
        "bytes": data.stat().st_size,
        "records": 22,
        "parts": {},
        "licence": None,
        "examples": 22,
    }
    assert paper["data"]["eval"] == {"path": None, "examples": 2}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert paper["git"] is None or paper["git"]["commit"] == commit
    assert (paper["arguments"]["seed"], paper["world_size"], paper["steps"]) == (7, 1, 6)
    assert paper["examples_per_step"] == pytest.approx(22 / 6, abs=0.01)  # the sixth step has two
    assert [entry["step"] for entry in paper["losses"]] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in paper["eval_losses"]][:1] == [0]
    assert paper["tokens"]["real"] > paper["tokens"]["supervised"] > 0
    assert paper["mfu"] is None and paper["peak_memory_gib"] > 0.1
    assert paper["wall_seconds"] >= paper["train_seconds"] > 0
    assert paper["cost"] == {"gpu_hours": 0, "gpu_hour_price_usd": 2.5, "usd": None}
    assert paper["hardware"]["gpus"] == 0 and paper["hardware"]["cpu_cores"] > 0
    assert {"python", "torch", "transformers", "accelerate"} <= paper["versions"].keys()
    arguments = paper["arguments"]
    assert (arguments["learning_rate"], arguments["eval_fraction"], arguments["lr_scheduler_type"]) == (
        1e-3,
        0.1,
        "linear",
    )
    assert len(arguments) > 100


def test_no_secret_is_in_what_a_run_leaves(finished):
    out, paper = finished
    for name in ("training_receipt.json", "model_card.md"):
        assert SECRET not in (out / name).read_text()
    assert not [name for name in paper["arguments"] if name.endswith("_token")]
    assert "average_tokens_across_devices" in paper["arguments"]


def test_secrets_are_known_by_their_names_at_any_depth():
    arguments = {"hub_token": "a", "zero": {"api_key": "b", "stage": 3}, "list": [{"password": "c"}], "tokens": 5}
    assert receipt.without_secrets(arguments) == {"zero": {"stage": 3}, "list": [{}], "tokens": 5}


def test_the_card_is_filled_and_honest(finished):
    out, paper = finished
    card = (out / "model_card.md").read_text()
    assert card.startswith('---\nlicense: unknown\nbase_model: "tiny-llama"\n')
    start, samples, rest = re.split(r"(\*\*Before and after\.\*\*.*?)(?=\n\n\*\*)", card, flags=re.S)
    assert samples.count("\n| Count from ") == 2 and "| prompt | step 0 | step 6 |" in samples
    card = start + rest  # the tiny model may say anything
    for hole in ("…", "None", "{", "}", "nan", "TODO", "  ", str(out.parent)):
        assert hole not in card, hole
    for fact in (
        paper["data"]["train"]["sha256"],
        "22 examples to train on, 2 held out",
        "learning rate 0.001 (linear",
    ):
        assert fact in card
    assert f"{paper['losses'][-1]['loss']:.3f} at step 6" in card
    assert f"{paper['eval_losses'][0]['loss']:.3f} before, {paper['eval_losses'][-1]['loss']:.3f} after" in card
    assert "Its license is unknown" in card and "No GPU-hours." in card


def test_the_card_to_copy_in_docs_has_the_parts_and_the_fixed_words_of_a_runs(finished):
    written = (finished[0] / "model_card.md").read_text()
    copied = (ROOT / "docs" / "model_card.md").read_text().partition("```markdown\n")[2].partition("```")[0]
    parts = [re.findall(r"^(?:\*\*(.*?)\.\*\*|([a-z_]+):)", card, re.M) for card in (written, copied)]
    assert parts[0] == parts[1] and len(parts[0]) == 14
    words, plain = (" ".join(card.split()) for card in (written, copied))
    for part in ("Recipe", "Limits"):
        assert re.search(rf"\*\*{part}\.\*\* [^…;]*[.;]", plain)[0] in words


def test_one_epoch_and_warm_up_steps_read_as_english(finished):
    card = receipt.model_card(
        finished[1] | {"epochs": 1.0, "arguments": finished[1]["arguments"] | {"warmup_steps": 10}}
    )
    assert "1 epoch, " in card and "10 steps of warm-up)" in card


def test_the_shipped_data_makes_the_card_non_commercial(finished):
    _, paper = finished
    facts = receipt.data_facts(SHIPPED, load_records(SHIPPED))
    assert facts["licence"] == "CC BY-NC 4.0"
    card = receipt.model_card(paper | {"data": {"train": facts | {"examples": 1075}, "eval": None}})
    assert "license: cc-by-nc-4.0" in card
    assert "1,075 of the 1,075 records are from alpaca_data.json of alpaca-reproduced, under CC BY-NC 4.0: not" in card
    assert "none held out" in card and "The license of the others" not in card


def test_a_mix_states_its_parts_and_keeps_the_strictest_license(finished, tmp_path, monkeypatch):
    """Known by record, whatever the file; the released data by their file."""
    mix, theirs = [*make_records(3), *load_records(SHIPPED)[5:7]], [{"instruction": "A", "input": "", "output": "b"}]
    for name, records in (("mix.json", mix), ("theirs.json", theirs)):
        (tmp_path / name).write_text(json.dumps(records))
    monkeypatch.setattr("alpaca.common.records.RELEASED_BLOB", git_blob_id(tmp_path / "theirs.json"))
    facts = receipt.data_facts(tmp_path, mix + theirs)
    ours, released = "alpaca_data.json of alpaca-reproduced", "the data that Stanford Alpaca released"
    assert facts["parts"] == {ours: 2, released: 1} and facts["licence"] == "CC BY-NC 4.0"
    card = receipt.model_card(finished[1] | {"data": {"train": facts | {"examples": 6}, "eval": None}})
    assert card.startswith("---\nlicense: cc-by-nc-4.0\n")
    for name, count in ((ours, 2), (released, 1)):
        verb = "is" if count == 1 else "are"
        assert f"{count} of the 6 records {verb} from {name}, under CC BY-NC 4.0: not for commercial use." in card
    assert (
        "The license of the others is unknown" in card
        and "Not for commercial use, which the data's license forbids" in card
    )


def test_several_files_have_one_hash_and_a_data_set_of_the_hub_has_none(finished, tmp_path):
    for name, text in (("1.json", "ab"), ("2.json", "c")):
        (tmp_path / name).write_text(text)
    facts = receipt.data_facts(tmp_path, [])
    assert facts == receipt.data_facts(f"{tmp_path / '1.json'},{tmp_path / '2.json'}", []) | {"path": str(tmp_path)}
    assert (facts["sha256"], facts["bytes"]) == (hashlib.sha256(b"abc").hexdigest(), 3)
    hub = receipt.data_facts("nobody/nothing", [])
    assert (hub["sha256"], hub["bytes"], hub["licence"]) == (None, 0, None)
    card = receipt.model_card(finished[1] | {"data": {"train": hub | {"examples": 3}, "eval": None}})
    assert "fine-tuned on nothing" in card and "SHA-256" not in card


def test_the_card_of_a_gpu_run_has_its_price_and_mfu(finished):
    machine = {"gpus": 8, "gpu": "NVIDIA H200", "cpu": "x", "cpu_cores": 64}
    cost = {"gpu_hours": 8.0, "gpu_hour_price_usd": 2.5, "usd": 20.0}
    card = receipt.model_card(finished[1] | {"hardware": machine, "mfu": 0.4534, "cost": cost})
    assert "8 × NVIDIA H200" in card and "45.3% of the GPUs' peak used (MFU)" in card
    assert "8.00 GPU-hours at $2.5: $20.00." in card


def test_names_of_strangers_stay_plain_text_in_one_line_of_the_card(finished):
    named = receipt.model_card(
        finished[1] | {"model": finished[1]["model"] | {"started_from": "a/*b*<script>\n[c](d)"}}
    )
    assert "# a/\\*b\\*\\<script\\> \\[c\\](d), fine-tuned on my_data.json\n" in named
    assert 'base_model: "a/*b*\\u003cscript\\u003e\\n[c](d)"\n' in named


def test_the_plot_shows_light_and_smoothed_loss_and_the_held_out_points(finished):
    import numpy as np
    from PIL import Image

    out, paper = finished
    pixels = np.asarray(Image.open(out / "loss.png").convert("RGB"))
    assert pixels.shape == (675, 1200, 3)
    many = [{"step": i, "loss": 2 + (-1) ** i / i, "learning_rate": 0} for i in range(1, 60)]
    png = receipt.loss_plot(paper | {"losses": many})
    (out.parent / "many.png").write_bytes(png)
    pixels = np.asarray(Image.open(out.parent / "many.png").convert("RGB")).reshape(-1, 3)
    for colour in ((0x88, 0xCC, 0xEE), (0x33, 0x22, 0x88), (0xCC, 0x66, 0x77)):
        assert (pixels == colour).all(axis=1).sum() > 50, colour


def test_without_matplotlib_the_run_ends_well_and_says_how_to_get_it(finished, tmp_path, monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert receipt.write(finished[1], tmp_path) == ["training_receipt.json", "model_card.md"]
    assert "pip install -e '.[plots]'" in capsys.readouterr().out
    assert not (tmp_path / "loss.png").exists()


def test_the_receipt_of_a_resumed_run_covers_all_steps(finished, tiny_llama, tmp_path):
    whole, paper = finished
    resumed = run(
        tiny_llama, whole.parent / "my_data.json", tmp_path / "out", "--seed", 7,
        "--resume_from_checkpoint", whole / "checkpoint-4",
    )  # fmt: skip
    assert [entry["step"] for entry in resumed["losses"]] == [1, 2, 3, 4, 5, 6]
    assert resumed["losses"] == paper["losses"]
    for key in ("real", "supervised", "padding"):
        assert resumed["tokens"][key] == paper["tokens"][key]
    assert resumed["examples_per_step"] == paper["examples_per_step"]
    for before, after in zip(paper["samples"], resumed["samples"], strict=True):
        assert [answer for answer in after["answers"] if answer["step"] != 4] == before["answers"]
        assert [answer["step"] for answer in after["answers"]] == [0, 4, 6]


def test_a_folder_that_is_no_checkout_has_no_commit(tmp_path):
    assert receipt.git_state(tmp_path) is None
    for words in (["init", "-q"], ["config", "user.email", "a@b"], ["config", "user.name", "a"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run(["git", "add", "file"], cwd=tmp_path, check=True)
    subprocess.run(["git", "commit", "-qm", "x"], cwd=tmp_path, check=True)
    state = receipt.git_state(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", state["commit"]) and state["dirty"] is False
    (tmp_path / "file").write_text("2")
    assert receipt.git_state(tmp_path) == state | {"dirty": True}
    (tmp_path / "inside").mkdir()
    assert receipt.git_state(tmp_path / "inside") is None


@pytest.mark.parametrize("installed, expected", [(True, ["tensorboard"]), (False, [])])
def test_tensorboard_is_the_default_where_it_is_installed(installed, expected, tmp_path, monkeypatch):
    find_spec = train.importlib.util.find_spec
    monkeypatch.setattr(
        train.importlib.util,
        "find_spec",
        lambda name, *rest: installed if name == "tensorboard" else find_spec(name, *rest),
    )
    _, _, args = train.parse_args(["--output_dir", str(tmp_path)])
    assert args.report_to == expected
    _, _, args = train.parse_args(["--output_dir", str(tmp_path), "--report_to", "none"])
    assert args.report_to == []
