"""Which checkpoint a run resumes from: the newest that is complete, and of this model.

trainer.py writes checkpoints so that every checkpoint-N is complete. This module handles what happens to them later (a
copy that lost a file), and those that a plain Trainer left half-written when it was killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from alpaca import UserError
from alpaca.common.files import only_process
from alpaca.inference.adapters import ADAPTER
from alpaca.training.distributed import say
from alpaca.training.examples import columns
from alpaca.weights.checkpoint import WEIGHTS, CheckpointReader, read_json

RESUME = "--resume_from_checkpoint auto"  # what messages advise to add to the same command
STAGING = ".saving"  # in the output folder: what is not complete yet
REHEARSAL = ".save-rehearsal"  # in the output folder: what the rehearsal saves, on the file system of the run
MANIFEST = "checkpoint.json"  # each file of a checkpoint with its size, and what wrote it
ABANDONED = "abandoned-"  # prefix of checkpoints of a branch that was left
# Arguments that the states of optimizer and schedule in a checkpoint override (torch 2.13), and some that may differ.
RESTORED = {"learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args"}
RESTORED |= {"optim_target_modules", "lr_scheduler_type", "lr_scheduler_kwargs"}
OF_A_SESSION = {"output_dir", "resume_from_checkpoint", "preflight_only", "skip_save_rehearsal", "gpu_hour_price"}
# Folders of torch.distributed.checkpoint under FSDP, as accelerate names them: each rank writes its own shard.
SHARDED_MODEL, SHARDED_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"


def what_is_missing(folder: Path) -> str | None:
    """Return why a folder is not a complete checkpoint, in a few words; None if it is one.

    It needs all parts that resuming reads (save_only_model leaves some out) and a state that parses, which the library
    writes last. If it has a checkpoint.json, every file listed must exist in its size; a plain Trainer writes none.
    """
    try:
        read_json(folder / TRAINER_STATE_NAME)["global_step"]
        if (folder / MANIFEST).exists():
            for name, size in read_json(folder / MANIFEST)["files"].items():
                if not (folder / name).is_file():
                    return f"{name} is missing"
                if (found := (folder / name).stat().st_size) != size:
                    return f"{name} has {found} bytes, not {size}"
    except UserError as e:
        return str(e).removeprefix(f"{folder}/")
    except (KeyError, AttributeError):
        return f"{TRAINER_STATE_NAME} or {MANIFEST} is malformed"
    if (folder / "latest").exists():  # it names the folder in which DeepSpeed keeps model and optimizer
        return None if (folder / (folder / "latest").read_text().strip()).is_dir() else "what `latest` names is missing"
    weights = (*WEIGHTS, ADAPTER, "pytorch_model_fsdp.bin", f"{SHARDED_MODEL}/.metadata")
    optimizer = (OPTIMIZER_NAME, "optimizer.bin", f"{SHARDED_OPTIMIZER}/.metadata")
    for index in (name for name in WEIGHTS if name.endswith(".index.json") and (folder / name).is_file()):
        try:
            shards = sorted(set(read_json(folder / index)["weight_map"].values()))
        except (UserError, KeyError, TypeError, AttributeError):
            return f"{index} is malformed"
        if absent := [name for name in shards if not (folder / name).is_file()]:
            return f"{absent[0]} is missing"
    for what, names in (("weights", weights), ("optimizer", optimizer), ("scheduler", (SCHEDULER_NAME,))):
        if not any((folder / name).is_file() for name in names):
            return f"the {what} {'are' if what == 'weights' else 'is'} missing"
    ranks = sorted(int(file.stem.split("_")[2]) for file in folder.glob("rng_state_*.pth"))
    if not (folder / "rng_state.pth").exists() and (not ranks or ranks != list(range(len(ranks)))):
        return "random states (rng_state*.pth) are missing"
    return None


def newest_first(output_dir: Path) -> list[Path]:
    """Return the folders named checkpoint-N, newest first."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := numbered(path))]
    return [path for _, path in sorted(found, reverse=True)]


def rename_back(output_dir: Path) -> None:
    """Do the last rename of a save that was killed before it. Every rank must call it."""
    if int(os.environ.get("RANK", 0)) == 0:
        for path in newest_first(output_dir / STAGING):
            place = output_dir / path.name
            if (path / MANIFEST).exists() and what_is_missing(path) is None and not place.exists():
                os.rename(path, place)
                say(f"note: {place} is complete: the interrupted save lacked only its rename")
    barrier()


@contextlib.contextmanager
def only_run(output_dir: str | os.PathLike) -> Iterator[None]:
    """Keep other runs away from a folder. Every rank must call it; UserError on each if another run is there."""
    refused = [""]
    with contextlib.ExitStack() as held:
        if int(os.environ.get("RANK", 0)) == 0:
            try:
                held.enter_context(only_process(output_dir))
            except UserError as e:
                refused = [str(e)]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(refused)
        if refused[0]:
            raise UserError(refused[0])
        yield


def barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a killed run left half-written in a folder; complete checkpoints stay. Every rank must call it."""
    rename_back(output_dir)
    if int(os.environ.get("RANK", 0)) == 0:
        for name, what in ((STAGING, "a save"), (REHEARSAL, "a rehearsal")):
            if (folder := output_dir / name).exists():
                shutil.rmtree(folder, ignore_errors=True)
                say(f"note: removed {folder}, left by {what} that was interrupted")
    barrier()


def set_aside(paths: Iterable[Path]) -> None:
    """Rename checkpoints so that none of them is ever chosen again."""
    for path in paths:
        names = itertools.chain([ABANDONED], (f"{ABANDONED}{n}-" for n in itertools.count(2)))  # none is overwritten
        os.rename(path, next(aside for name in names if not (aside := path.with_name(name + path.name)).exists()))


def set_aside_newer(output_dir: Path, checkpoint: Path | None) -> None:
    """Set aside checkpoints that are newer than the one a run resumes from.

    They are incomplete or belong to a branch that was left: they must not be chosen later, nor count in
    save_total_limit.

    Args:
        output_dir: of the run.
        checkpoint: complete; if it is in another folder, all in output_dir are set aside, as for None: from scratch.
    """
    here = checkpoint is not None and checkpoint.resolve().parent == output_dir.resolve()
    step = read_json(checkpoint / TRAINER_STATE_NAME)["global_step"] if here else -1
    # One of the same step is from another branch too: the user has returned to one that was left.
    others = [path for path in newest_first(output_dir) if not here or path.name != checkpoint.name]
    if newer := [path for path in others if int(numbered(path)[1]) >= step]:
        names = ", ".join(path.name for path in newer)
        since = f"newer than {checkpoint.name}, which this run resumes from" if here else "not from this run"
        say(f"note: renamed {names} in {output_dir} to {ABANDONED}…: {since}")
        set_aside(newer)


def numbered(path: Path) -> re.Match | None:
    return re.fullmatch(r"checkpoint-(\d+)", path.name) if path.is_dir() else None


def newest_complete_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """Return the complete checkpoint of the highest step in a folder; print which newer ones it skips, and why."""
    for path in newest_first(Path(output_dir)):
        if (missing := what_is_missing(path)) is None:
            return path
        say(f"note: {path} is not complete ({missing}): skipped")
    return None


def choose_checkpoint(resume: str | None, output_dir: Path) -> Path | None:
    """Return the checkpoint that a run starts from, or None for the beginning.

    Args:
        resume: a folder, "auto" for the newest complete one of output_dir if there is one, or None.
        output_dir: exists.

    Raises:
        UserError: the run would overwrite a finished model or an interrupted run, or ``resume`` is not complete.
    """
    rename_back(output_dir)
    if any((output_dir / name).exists() for name in WEIGHTS):
        done = "the run is finished" if resume == "auto" else "remove it"
        raise UserError(f"{output_dir} holds a trained model: {done}, or choose another folder")
    if not resume:
        if newest := newest_complete_checkpoint(output_dir):
            cure = f"resume it with {RESUME}, or choose another folder"
            raise UserError(f"{output_dir} holds {newest.name} of an interrupted run: {cure}")
        return None
    if resume == "auto":
        newest = newest_complete_checkpoint(output_dir)
        say(f"resuming from {newest}" if newest else f"no complete checkpoint in {output_dir}: from the beginning")
        return newest
    if missing := what_is_missing(Path(resume)):
        newest = newest_complete_checkpoint(Path(resume).parent)
        cure = f"resume from {newest}, which is complete" if newest else "the folder beside it has no complete one"
        raise UserError(f"{resume} is not a complete checkpoint ({missing}): {cure}")
    return Path(resume)


def check_arguments(checkpoint: Path, arguments: dict) -> None:
    """Compare a run's arguments with those that a checkpoint was trained with; print those that change.

    Raises:
        UserError: the states of optimizer and schedule, which the checkpoint brings back, would override some.
    """
    there = read_json(checkpoint / MANIFEST).get("arguments") if (checkpoint / MANIFEST).exists() else None
    if there is None:  # written by a plain Trainer, or an earlier version
        return
    here = json.loads(json.dumps(arguments))
    names = [name for name in there.keys() & here.keys() - OF_A_SESSION if there[name] != here[name]]
    changes = {name: f"{name} {there[name]} (now {here[name]})" for name in sorted(names)}
    if kept := [what for name, what in changes.items() if name in RESTORED]:
        raise UserError(
            f"{checkpoint} was trained with {', '.join(kept)}, which its optimizer and schedule keep: give the same "
            "again, or start a new run in another folder"
        )
    if changes:
        say(f"note: {checkpoint.name} was trained with {', '.join(changes.values())}: obeyed from here on")


def data_facts(dataset: Sequence, seed: int) -> dict:
    """Describe what a run trains on, for checkpoint.json.

    Args:
        dataset: of {"input_ids", "labels"}, or something that has one as its ``dataset`` (bins, a subset).
        seed: of the order of the data.

    Returns:
        ``sha256`` of all tokens and labels in order, ``examples``, ``packing`` and ``seed``.
    """
    packing = False
    while hasattr(dataset, "dataset"):
        packing, dataset = packing or hasattr(dataset, "bins"), dataset.dataset
    digest = hashlib.sha256()
    for column in columns(dataset):
        digest.update(column.astype("<i4").tobytes())
    return {"sha256": digest.hexdigest(), "examples": len(dataset), "packing": packing, "seed": seed}


def run_facts(dataset: Sequence, args) -> dict:
    """Describe a run for checkpoint.json: its processes, the examples of a step, and data_facts."""
    seed = args.seed if args.data_seed is None else args.data_seed
    examples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {"world_size": args.world_size, "examples_per_step": examples, "data": data_facts(dataset, seed)}


def check_resumed(checkpoint: Path | None, dataset: Sequence, args) -> None:
    """Raise UserError unless a run on this data, with these arguments, may resume from the checkpoint.

    Every rank must call it, before a rehearsal, which takes minutes.
    """
    if args.world_size > 1:
        match = checkpoint and numbered(checkpoint)
        step = int(match[1]) if match else -1
        seen = torch.tensor([step, -step], device=args.device)
        torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
        if seen[0] != -seen[1]:
            raise UserError(f"the nodes see different checkpoints: all must share {args.output_dir}")
    if not checkpoint or not (checkpoint / MANIFEST).exists():
        return
    manifest, facts = read_json(checkpoint / MANIFEST), run_facts(dataset, args)
    here, there = facts["examples_per_step"], manifest["examples_per_step"]
    if here != there:
        steps, left = divmod(there, here // args.gradient_accumulation_steps)
        cure = "change the batch size or the number of ranks" if left else f"set gradient_accumulation_steps to {steps}"
        raise UserError(f"{checkpoint} was trained with {there} examples a step, this run has {here}: {cure}")
    if "data" in manifest:
        check_data(checkpoint, manifest["data"], facts["data"])
    if manifest["world_size"] != args.world_size:
        say(
            f"note: {checkpoint.name} was written by {manifest['world_size']} processes, this run has "
            f"{args.world_size}: the data continues in order, random states (dropout) start afresh"
        )


def check_data(checkpoint: Path, there: dict, here: dict) -> None:
    """Compare the data of a checkpoint with this run's; both are from data_facts. Another order is only a warning.

    Raises:
        UserError: other examples (a record that is held out now may have been trained on), or other batches.
    """
    cure = f'or, to continue with this data anyway, remove "data" from {checkpoint / MANIFEST}'
    if there["packing"] != here["packing"]:
        how = "with" if there["packing"] else "without"
        raise UserError(f"{checkpoint} was trained {how} packing: do the same, {cure}")
    if there["sha256"] != here["sha256"]:
        raise UserError(
            f"{checkpoint} was trained on other data ({there['examples']} examples, {here['examples']} here): use the "
            f"same data_path, eval_fraction, seed, model_max_length, template and tokenizer, {cure}"
        )
    if there["seed"] != here["seed"]:
        say(
            f"warning: {checkpoint.name} was trained with the data in another order (seed {there['seed']}, here "
            f"{here['seed']}): in this epoch some examples come twice and some not at all; data_seed={there['seed']} "
            "keeps the order"
        )


def check_fits(checkpoint: Path, model: torch.nn.Module) -> None:
    """Raise UserError if the checkpoint's tensors are not those of the model: other names or other shapes."""
    there = _shapes(checkpoint)
    sharded = (checkpoint / SHARDED_MODEL).is_dir()
    tensors = state_dict(model) if sharded else saved_names(model)
    here = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if there is None:  # DeepSpeed's own format: the library checks it
        return
    if hasattr(model, "peft_config") != any(".lora_" in name for name in there):
        holds = "no" if hasattr(model, "peft_config") else "an"
        raise UserError(f"{checkpoint} holds {holds} adapter: lora_r must match")
    for name in sorted(there):
        if there[name] != here.get(name):
            what = f"has the shape {here[name]} here" if name in here else "is not in this model"
            raise UserError(f"{checkpoint} belongs to another model: {name}, there {there[name]}, {what}")
    # A tied output embedding is stored once, by either name.
    if missing := sorted(set(here) - set(there) - set(getattr(model, "all_tied_weights_keys", None) or {})):
        raise UserError(f"{checkpoint} belongs to another model: it lacks {missing[0]}")


def _shapes(checkpoint: Path) -> dict[str, tuple[int, ...]] | None:
    """Return the shape of each tensor, read from headers only; None if the format has no header."""
    if (checkpoint / SHARDED_MODEL / ".metadata").exists():
        from torch.distributed.checkpoint import FileSystemReader

        stored = FileSystemReader(checkpoint / SHARDED_MODEL).read_metadata().state_dict_metadata
        return {name.removeprefix("model."): tuple(entry.size) for name, entry in stored.items()}
    if (checkpoint / ADAPTER).exists():
        with safe_open(checkpoint / ADAPTER, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    if any((checkpoint / name).exists() for name in WEIGHTS):
        return {name: shape for name, (_, shape) in CheckpointReader(checkpoint).specs().items()}
    return None


def saved_names(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's tensors (on the meta device) under the names that save_pretrained gives them.

    Some families are saved under names other than the library's: GPT-NeoX's lm_head as embed_out.
    """
    from transformers.core_model_loading import revert_weight_conversion

    # A tensor that FSDP has sharded has the shape of the whole.
    tensors = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state_dict(model).items()
    }
    return tensors if hasattr(model, "peft_config") else revert_weight_conversion(model, tensors)


def state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's tensors under a checkpoint's names; of a model with an adapter, only the adapter's."""
    if not hasattr(model, "peft_config"):
        return model.state_dict()
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False)


def is_failed_write(e: BaseException, frames: traceback.StackSummary) -> bool:
    """Return whether it is a failed write; torch.save reports a full disk as a RuntimeError without an errno."""
    serialization = any(frame.filename.endswith("torch/serialization.py") for frame in frames)
    return isinstance(e, (OSError, SafetensorError)) or (isinstance(e, RuntimeError) and serialization)
