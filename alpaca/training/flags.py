"""A script's flags: --help, --config, and the flags of the original and of 2023, translated to today's.

Names, defaults and explanations are read from sources without importing them: a script that reads its command line here
before it imports torch answers --help and mistakes in a fifth of a second.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import yaml

from alpaca import UserError
from alpaca.common.cli import say, unknown_flag
from alpaca.common.files import read_text

# What transformers 4.28 to 4.46 accepted and today's refuses.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # below 1 it is a ratio
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "include_tokens_per_second": "include_num_input_tokens_seen",
}
# Flags that switched something on: True becomes this flag and value, False becomes nothing.
SWITCHES = {"group_by_length": ("train_sampling_strategy", "group_by_length"), "adafactor": ("optim", "adafactor")}
# Flags without a successor that takes the same value: they are dropped with this warning.
REMOVED = {
    "fsdp_transformer_layer_cls_to_wrap": "the layer class is found automatically",
    "fsdp_min_num_params": "each decoder layer is sharded on its own",
    "overwrite_output_dir": "a trained model is never overwritten; remove the folder, or choose another",
    "save_safetensors": "weights are always saved as safetensors",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "use_mps_device": "an Apple GPU is used if there is one",
}
INSTEAD = dict.fromkeys(("half_precision_backend", "fp16_backend", "fp16_opt_level"), "bf16")
INSTEAD |= dict.fromkeys(("dispatch_batches", "split_batches"), "accelerator_config")
INSTEAD |= {"sharded_ddp": "fsdp", "torchdynamo": "torch_compile", "xpu_backend": "ddp_backend"}
INSTEAD["push_to_hub_organization"] = "hub_model_id"
REMOVED |= {old: f"use --{new}" for old, new in INSTEAD.items()}
REMOVED |= dict.fromkeys(
    ("jit_mode_eval", "use_ipex", "tpu_num_cores", "tpu_metrics_debug", "past_index", "use_legacy_prediction_loop")
    + ("include_inputs_for_metrics", "mp_parameters", "ray_scope"),
    "transformers has dropped it",
)
ALL = {*RENAMED, *SWITCHES, *REMOVED}
NUMBER = r'"(-?\d+(?:\.\d+)?(?:e-?\d+)?|true|false)"'  # in JSON made from YAML, where all is text


Flags = dict[str, tuple[str, str, str]]  # name → (type, default, explanation), as they are written in the source


def own_flags(script: str | os.PathLike) -> dict[str, Flags]:
    """Return the flags of each class of a script whose name ends in "Arguments": its annotated fields."""
    found = {}
    for node in ast.parse(Path(script).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments"):
            fields = (part for part in node.body if isinstance(getattr(part, "value", None), ast.Call))
            found[node.name] = {part.target.id: _flag(part) for part in fields if isinstance(part, ast.AnnAssign)}
    return found


def _flag(field: ast.AnnAssign) -> tuple[str, str, str]:
    """Read ``name: type = call(default, help)``, or the library's ``field(default=…, metadata={"help": …, …})``."""
    default, *_, about = [*field.value.args, *(keyword.value for keyword in field.value.keywords)]
    about = ast.literal_eval(about.values[0] if isinstance(about, ast.Dict) else about)
    return ast.unparse(field.annotation), ast.unparse(default), about.replace("%%", "%")


def library_flags() -> Flags:
    """Return the fields of transformers' TrainingArguments."""
    if not (library := importlib.util.find_spec("transformers")):
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
    return own_flags(Path(library.origin).with_name("training_args.py"))["TrainingArguments"]


def read(argv: Sequence[str], script: str | os.PathLike, about: str, required: Sequence[str] = ()) -> list[str]:
    """Return a command line with the flags of --config FILE before its own, which win. --help is printed here.

    Args:
        argv: the words after the script's name.
        script: has the classes of its flags, one of them derived from the library's.
        about: the text at the top of --help.
        required: flags that must be given.

    Raises:
        UserError: an unknown flag, or one that is missing; a configuration that cannot be read.
    """
    own, library = own_flags(script), library_flags()
    if wanted := {"-h", "--help", "--help_all"} & set(argv):
        print(_help(about, own | {"transformers": library} if "--help_all" in wanted else own))
        sys.exit(0)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?", const="--config FILE")
    config, words = parser.parse_known_args(argv)
    words = (config_words(config.config) if config.config else []) + words
    every = library | {name: flag for flags in own.values() for name, flag in flags.items()}
    known = {*every, *(f"no_{name}" for name, (_, default, _) in every.items() if default == "True")}
    given = {word.split("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    for name in sorted(given - known - ALL):
        raise unknown_flag(name, sorted(known | {"config"}))
    if missing := [name for name in required if name not in given]:
        raise UserError(f"--{', --'.join(missing)} {'are' if missing[1:] else 'is'} missing (--help shows an example)")
    return words


def config_words(path: str | os.PathLike) -> list[str]:
    """Return the flags in a YAML or JSON file as words of a command line; for a receipt, those that repeat its run."""
    text = read_text(path)
    try:  # in YAML, "save_strategy: no" means text, as on a command line, and not false
        config = json.loads(text) if str(path).endswith(".json") else yaml.load(text, yaml.BaseLoader)
    except (ValueError, yaml.YAMLError) as e:
        raise UserError(f"--config {path} is malformed: {' '.join(str(e).split())}") from None
    if isinstance(config, dict) and isinstance(config.get("arguments"), dict):
        config = config["arguments"] | {"resume_from_checkpoint": None}
    if not isinstance(config, dict):
        raise UserError(f"--config {path} has no flags: write one per line, as in learning_rate: 2e-5")
    words = []
    for name, value in config.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)] if value else []
        elif isinstance(value, dict):
            words.append(f"--{name}=" + re.sub(NUMBER, r"\1", json.dumps(value)))
        elif value not in (None, "", "null", "~"):
            words.append(f"--{name}={value}")
    return words


def _help(about: str, groups: dict[str, Flags]) -> str:
    lines, shown = [about], {}
    for group, flags in groups.items():
        lines.append(f"\n{group.removesuffix('Arguments').upper()}")
        for name, (kind, default, text) in flags.items():
            if shown.setdefault(name, group) == group:
                note = "" if default in ("None", "''") else f", default: {default}"
                lines.append(f"    --{name} ({kind.removesuffix(' | None').removeprefix('None | ')}{note})")
                lines += textwrap.wrap(text, 120, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The flags of 2023.


def translate_flags(argv: list[str], known: set[str]) -> list[str]:
    """Return a command line of 2023 with today's flags; print one warning for each flag that changed.

    Args:
        argv: the arguments; a value follows its flag, or an equals sign in the same word.
        known: flags (with their dashes) of the parser: what the installed library still accepts is left alone.

    Raises:
        UserError: a warm-up ratio that is not from 0 to below 1.
    """
    out, words = [], list(argv)
    given = {word.split("=")[0] for word in argv}
    while words:
        word = words.pop(0)
        flag, has_value, value = word.partition("=")
        name = flag[2:]
        if flag in known or name not in ALL:
            out.append(word)
            continue
        if not has_value and words and not words[0].startswith("--"):
            has_value, value = " ", words.pop(0)
        if name in REMOVED:
            say(f"warning: {flag} is ignored: {REMOVED[name]}")
        elif name in SWITCHES:
            new, wanted = f"--{SWITCHES[name][0]}", SWITCHES[name][1]
            say(f"warning: {flag} is now {new} {wanted}")
            out += (new, wanted) if value.lower() in ("", "true", "1", "yes") else ()
        elif (new := f"--{RENAMED[name]}") in given:
            say(f"warning: {flag} is now {new}, which is also given: {flag} is ignored")
        else:
            ratio = f" {_ratio(value)} (below 1 it is a ratio)" if name == "warmup_ratio" else ""
            say(f"warning: {flag} is now {new}{ratio}")
            out += [new, value] if has_value else [new]
    return out


def _ratio(text: str) -> str:
    try:
        if 0 <= float(text) < 1:
            return text
    except ValueError:
        pass
    raise UserError(f"--warmup_ratio {text} is not a share of the steps: use 0 to 0.99, or --warmup_steps")
