"""Which checkpoint a run resumes from: the newest complete one, if its model, data and recipe are the same.

trainer.py writes checkpoints so that every checkpoint-N is complete, with a checkpoint.json that lists its files. This
module handles what happens to them later: a copy without some file, another command, a return to an older one.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers.trainer import TRAINER_STATE_NAME

from alpaca import UserError
from alpaca.common.files import only_process
from alpaca.training.distributed import say
from alpaca.training.examples import columns
from alpaca.weights.checkpoint import WEIGHTS, read_json

RESUME = "--resume_from_checkpoint auto"  # messages advise to add this to the same command
STAGING = ".saving"  # in the output folder: incomplete saves
REHEARSAL = ".save-rehearsal"  # in the output folder: what the rehearsal saves, on the file system of the run
MANIFEST = "checkpoint.json"  # each file of a checkpoint with its size, and the run that wrote it
# Folders of torch.distributed.checkpoint under FSDP, as accelerate names them: each rank writes its own shard.
SHARDED_MODEL, SHARDED_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
# Arguments that a checkpoint's optimizer and schedule states override (torch 2.13), or that change the model; then
# those that may differ.
FIXED = {"learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args"}
FIXED |= {"optim_target_modules", "lr_scheduler_type", "lr_scheduler_kwargs", "lora_r", "tensors"}
OF_A_SESSION = {"output_dir", "resume_from_checkpoint", "preflight_only", "skip_save_rehearsal", "gpu_hour_price"}
# Facts that must stay the same (see run_facts), and the arguments that decide them. With other data, a record that is
# held out now may have been trained on; in another order, some examples come twice in an epoch.
MUST_STAY = {
    "examples": "data_path, eval_fraction, data_seed or seed, packing, model_max_length, template and tokenizer",
    "examples_per_step": "batch size x gradient_accumulation_steps x processes",
}


def choose_checkpoint(resume: str | None, output_dir: Path) -> Path | None:
    """Return the checkpoint that a run starts from, or None for the beginning. Every rank must call it.

    Args:
        resume: a folder, "auto" for the newest complete one of output_dir if there is one, or None.
        output_dir: exists.

    Raises:
        UserError: the run would overwrite a finished model or an interrupted run, ``resume`` is not complete, or the
            ranks see different ones.
    """
    chosen = Path(resume) if resume else None
    if any((output_dir / name).exists() for name in WEIGHTS):
        raise UserError(f"{output_dir} has a trained model, the run is finished: choose another folder, or remove it")
    if resume == "auto":
        chosen = newest_complete_checkpoint(output_dir)
        say(f"resuming from {chosen}" if chosen else f"no complete checkpoint in {output_dir}: starting from scratch")
    elif chosen and (chosen / TRAINER_STATE_NAME).exists() and not (chosen / MANIFEST).exists():
        say(f"note: {chosen} has no {MANIFEST}: it may be incomplete, or from another model")
    elif chosen and (missing := what_is_missing(chosen)):
        raise UserError(f"{chosen} is not a complete checkpoint ({missing}): use the newest complete one with {RESUME}")
    elif not chosen and (there := newest_first(output_dir)):
        raise UserError(f"{there[0]} is from an interrupted run: resume it with {RESUME}, or choose another folder")
    if torch.distributed.is_initialized():
        seen = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(seen, chosen and chosen.name)
        if len(set(seen)) > 1:
            raise UserError(f"the nodes see different checkpoints: put {output_dir} on a shared file system")
    return chosen


def newest_complete_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """Return the newest complete checkpoint in a folder; print which newer ones are skipped, and why."""
    for path in newest_first(Path(output_dir)):
        if (missing := what_is_missing(path)) is None:
            return path
        say(f"note: skipped {path}, which is incomplete ({missing})")
    return None


def newest_first(output_dir: Path) -> list[Path]:
    """Return the folders named checkpoint-N, newest first."""
    found = {path.name.removeprefix("checkpoint-"): path for path in output_dir.glob("checkpoint-*") if path.is_dir()}
    return [found[step] for step in sorted(filter(str.isdecimal, found), key=int, reverse=True)]


def what_is_missing(folder: Path) -> str | None:
    """Return why a folder is not known to be a complete checkpoint, in a few words; None if it is one.

    All files listed in its checkpoint.json must exist with their sizes. A plain Trainer's checkpoint has no such file:
    one left half-written by a kill looks like a complete one.
    """
    try:
        files = read_json(folder / MANIFEST)["files"]
    except UserError as e:
        return str(e).removeprefix(f"{folder}/")
    for name, size in files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            return f"{name} is missing or does not have its {size:,} bytes"
    return None if any(name.startswith("rng_state") for name in files) else "save_only_model omitted its optimizer"


def run_facts(model: torch.nn.Module, dataset: Sequence, args) -> dict[str, str | int | bool]:
    """Describe a run for checkpoint.json: what must stay the same on resume, and the number of processes.

    The model must not be sharded yet. The dataset may be bins or a subset, with the examples as its ``dataset``.
    """
    trained = sorted((name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad)
    shapes = hashlib.sha256(str(trained).encode())
    packed, tokens, order = "", hashlib.sha256(), args.seed if args.data_seed is None else args.data_seed
    while hasattr(dataset, "dataset"):
        packed, dataset = "packed " if hasattr(dataset, "bins") else packed, dataset.dataset
    for column in columns(dataset):
        tokens.update(column.astype("<i4").tobytes())
    return {
        "tensors": f"{len(trained)} trained, sha256 {shapes.hexdigest()[:16]}",
        "examples": f"{len(dataset)} {packed}in order {order}, sha256 {tokens.hexdigest()[:16]}",
        "examples_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "world_size": args.world_size,
    }


def compare(checkpoint: Path, here: dict) -> None:
    """Compare a run's arguments, or its facts, with those in a checkpoint.json, and print the changes.

    Raises:
        UserError: a change that is not allowed.
    """
    file = checkpoint / MANIFEST
    manifest = read_json(file) if file.exists() else {}
    there, here = manifest | (manifest.get("arguments") or {}), json.loads(json.dumps(here))
    names = sorted(name for name in there.keys() & here.keys() - OF_A_SESSION if there[name] != here[name])
    changes = {name: f"{name} {there[name]} (now {here[name]})" for name in names}
    if fixed := [changes[name] for name in names if name in FIXED]:
        cure = "use the same, or start a new run in another folder"
        raise UserError(f"{checkpoint} was trained with {', '.join(fixed)}, which cannot change midway: {cure}")
    for name in [name for name in names if name in MUST_STAY]:
        cure = f'use the same {MUST_STAY[name]}, or, to continue anyway, remove "{name}" from {file}'
        raise UserError(f"{checkpoint} was trained with {changes[name]}: {cure}")
    if changes:
        say(f"note: {checkpoint.name} was trained with {', '.join(changes.values())}: the new values apply from here")


@contextlib.contextmanager
def only_run(output_dir: str | os.PathLike) -> Iterator[None]:
    """Lock a folder against other runs, and remove what a killed one left half-written in it.

    Every rank must call it; each gets a UserError if another run holds the lock.
    """
    refused = [None]
    with contextlib.ExitStack() as held:
        if int(os.environ.get("RANK", 0)) == 0:
            try:
                held.enter_context(only_process(output_dir))
                for name in (STAGING, REHEARSAL):
                    shutil.rmtree(Path(output_dir) / name, ignore_errors=True)
            except UserError as e:
                refused[0] = e
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(refused)
        if refused[0]:
            raise refused[0]
        yield


def set_aside_newer(output_dir: Path, checkpoint: Path | None) -> None:
    """Move checkpoints newer than the one a run resumes from (all, if that is elsewhere) into OUT/abandoned-1 (2, …).

    They are incomplete or from an abandoned branch: they must not be chosen later, nor count in save_total_limit.
    Nothing is deleted: a later run can resume that branch by name. Only rank 0 does it.
    """
    if int(os.environ.get("RANK", 0)) != 0:
        return
    there = newest_first(output_dir)
    if newer := list(itertools.takewhile(lambda path: not (checkpoint and path.samefile(checkpoint)), there)):
        left = next(path for n in itertools.count(1) if not (path := output_dir / f"abandoned-{n}").exists())
        left.mkdir()
        for path in newer:
            os.rename(path, left / path.name)
        names, begin = ", ".join(path.name for path in newer), checkpoint or "the beginning"
        say(f"note: moved {names} to {left}, as this run continues from {begin}; delete them if not needed")
