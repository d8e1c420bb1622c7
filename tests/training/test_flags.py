"""flags: names read from sources, help, mistakes answered before torch is imported, and runs from a file of flags."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers
import yaml
from conftest import ROOT, assert_one_line_error, assert_user_error, make_records, run_script
from safetensors.torch import load_file

import train
from alpaca.training import flags

TRAIN = ROOT / "train.py"


def run_and_list_heavy_modules(*argv: str):
    """Runs train.py as a script; the last line of its output names what has been imported that takes seconds."""
    code = f"""
import atexit, runpy, sys
atexit.register(lambda: print(sorted({{"torch", "transformers", "peft", "numpy"}} & sys.modules.keys())))
sys.argv = ["train.py", *{list(argv)!r}]
runpy.run_path("train.py", run_name="__main__")
"""
    return run_script("-c", code)


# ---------------------------------------------------------------------------------------------------------------------
# Names and help.


def test_the_names_read_from_sources_are_those_of_the_classes():
    of_library = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    assert len(of_library) > 100 and flags.library_flags().keys() == of_library
    own = flags.own_flags(TRAIN)
    classes = [train.ModelArguments, train.DataArguments, train.TrainingArguments]
    assert list(own) == [each.__name__ for each in classes]
    for each in classes:
        names = set(each.__annotations__) if each is train.TrainingArguments else set(each.__dataclass_fields__)
        assert own[each.__name__].keys() == names
    assert own["DataArguments"]["eval_fraction"][:2] == ("float", "0.0")
    assert own["ModelArguments"]["model_name_or_path"][2] == "Folder or hub name of the base model."


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--learning_rat", "1"], ["unknown flag --learning_rat", "did you mean --learning_rate"]),
        (["--output_dir=o", "--data-path", "d"], ["--model_name_or_path is missing"]),
        ([], ["--model_name_or_path, --data_path, --output_dir are missing"]),
        (["--config", "missing.yaml"], ["missing.yaml does not exist"]),
    ],
)
def test_mistakes_are_answered_before_torch_is_imported(argv, words):
    result = run_and_list_heavy_modules(*argv)
    assert_one_line_error(result, *words)
    assert result.stdout == "[]\n"


def test_help_shows_the_own_flags_alone_and_examples_that_can_be_pasted():
    result = run_and_list_heavy_modules("--help")
    assert result.returncode == 0 and result.stderr == "" and result.stdout.endswith("\n[]\n")
    assert train.__doc__ in result.stdout  # test_docs.py parses its commands
    shown = {line.split()[0][2:] for line in result.stdout.splitlines() if line.startswith("    --")}
    own = {name for group in flags.own_flags(TRAIN).values() for name in group}
    assert shown == own
    every = run_script("train.py", "--help_all").stdout
    assert every.startswith(result.stdout.removesuffix("[]\n"))
    shown = [line.split()[0][2:] for line in every.splitlines() if line.startswith("    --")]
    assert len(shown) == len(set(shown)) and set(shown) == own | flags.library_flags().keys()


def test_flags_of_2023_and_both_spellings_are_known():
    argv = ["--warmup-steps", "3", "--no_dataloader_pin_memory", "--evaluation_strategy=no", "--overwrite_output_dir"]
    assert flags.read(argv, TRAIN, "") == argv


# ---------------------------------------------------------------------------------------------------------------------
# --config.


def test_a_file_of_flags_reads_as_they_are_written_on_a_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "output_dir: o\nlearning_rate: 2e-5\nsave_strategy: no\nskip_save_rehearsal: yes\nmax_steps: -1\nhub_token:\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-6}\nwarmup_ratio: 0.03\n"
    )
    _, _, args = train.parse_args(["--seed", "7", "--config", str(path), "--learning_rate", "1e-4"])
    assert (args.learning_rate, args.save_strategy, args.skip_save_rehearsal) == (1e-4, "no", True)
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-6} and args.warmup_steps == 0.03
    assert args.seed == 7 and args.output_dir == "o"
    assert train.parse_args([f"--config={path}"])[2].learning_rate == 2e-5


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("run.yaml", "a: [", "run.yaml is malformed"),
        ("run.json", '{"a": ', "run.json is malformed"),
        ("run.yaml", "- learning_rate", "has no flags"),
        ("run.yaml", "learning_rat: 1", "did you mean --learning_rate"),
        ("run.yaml", "learning_rate: fast", "learning_rate"),
    ],
)
def test_a_file_that_holds_no_flags_is_refused_in_one_line(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    assert_user_error(lambda: train.parse_args(["--config", str(tmp_path / name)]), words)


def test_a_run_is_repeated_from_its_own_receipt(tiny_llama, tmp_path):
    """Also one that was resumed, and that has a schedule with arguments of its own."""
    (tmp_path / "data.json").write_text(json.dumps(make_records(24)))
    config = {
        "model_name_or_path": str(tiny_llama),
        "data_path": str(tmp_path / "data.json"),
        "eval_fraction": 0.25,
        "padding": "longest",
        "max_steps": 3,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-4},
        "seed": 5,
        "logging_steps": 1,
        "save_strategy": "no",
        "skip_save_rehearsal": True,
        "disable_tqdm": True,
        "report_to": "none",
        "resume_from_checkpoint": "auto",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))

    def run(config, out) -> dict:
        train.train(*train.parse_args(["--config", str(config), "--output_dir", str(out)]))
        return json.loads((out / "training_receipt.json").read_text())

    first = run(tmp_path / "run.yaml", tmp_path / "first")
    again = run(tmp_path / "first" / "training_receipt.json", tmp_path / "again")
    assert len(first["losses"]) == 3 and first["losses"] == again["losses"]
    assert first["eval_losses"] == again["eval_losses"] and len(first["eval_losses"]) == 2
    own = {"output_dir": None, "resume_from_checkpoint": None}
    assert first["arguments"] | own == again["arguments"] | own
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "again"))
    assert all(torch.equal(a[name], b[name]) for name in a)
