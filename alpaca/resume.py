"""Checkpoints that a kill or a full disk cannot spoil, and runs that go on from them.

A checkpoint is written into ``OUT/.saving`` and becomes ``OUT/checkpoint-N`` by one rename when every process has
written its part and all of it is on the disk; only then are older ones deleted. So whatever is called checkpoint-N is
whole, at any moment. Its ``checkpoint.json`` lists each file with its size, for copies that lost something on the way.

A run that is asked to stop (SIGTERM, SIGUSR1, Ctrl-C) finishes its step, saves a checkpoint and exits.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from alpaca import UserError
from alpaca.checkpoint import WEIGHTS, read_json

STAGING = ".saving"  # what is not whole yet; a run removes what an earlier one left there
MANIFEST = "checkpoint.json"
ADAPTER = "adapter_model.safetensors"
# Folders of torch.distributed.checkpoint under FSDP, as accelerate names them: each rank writes its own shard.
SHARDED_MODEL, SHARDED_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"

# sysexits.h: "temporary failure, try again". What a scheduler should start again; 1 is an error, 130 a Ctrl-C.
EXIT_REQUEUE = 75
EXIT_INTERRUPTED = 130


class SaveFailed(UserError):
    """A checkpoint or the model could not be written; the checkpoints before it are whole."""


class Stopped(Exception):
    """The run was asked to stop and has saved a checkpoint. ``code`` is the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def _say(message: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Which checkpoint.


def what_is_missing(folder: Path) -> str | None:
    """Why a folder is not a complete checkpoint, in a few words; None if it is one.

    With a checkpoint.json every file must be there in its size. A folder without one was written by a plain Trainer:
    the parts that each resume needs must be there, and the state must parse (the library writes it last).
    """
    try:
        read_json(folder / TRAINER_STATE_NAME)["global_step"]
        manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else None
        if manifest is not None:
            for name, size in manifest["files"].items():
                if not (folder / name).is_file():
                    return f"{name} is missing"
                if (folder / name).stat().st_size != size:
                    return f"{name} has {(folder / name).stat().st_size} bytes, not {size}"
            return None
    except UserError as e:
        return str(e).removeprefix(f"{folder}/")
    except (KeyError, AttributeError):
        return f"{TRAINER_STATE_NAME} or {MANIFEST} is malformed"
    if (folder / "latest").exists():  # DeepSpeed keeps model and optimizer in a folder that this file names
        return None if (folder / (folder / "latest").read_text().strip()).is_dir() else "what `latest` names is missing"
    weights = (*WEIGHTS, ADAPTER, "pytorch_model_fsdp.bin", f"{SHARDED_MODEL}/.metadata")
    optimizer = (OPTIMIZER_NAME, "optimizer.bin", f"{SHARDED_OPTIMIZER}/.metadata")
    for what, names in (("weights", weights), ("optimizer", optimizer), ("scheduler", (SCHEDULER_NAME,))):
        if not any((folder / name).is_file() for name in names):
            return f"the {what} are missing" if what == "weights" else f"the {what} is missing"
    ranks = sorted(int(file.stem.split("_")[2]) for file in folder.glob("rng_state_*.pth"))
    if not (folder / "rng_state.pth").exists() and (not ranks or ranks != list(range(len(ranks)))):
        return "random states (rng_state*.pth) are missing"
    return None


def _checkpoints(output_dir: Path) -> list[Path]:
    """Folders named checkpoint-N, newest first."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _numbered(path))]
    return [path for _, path in sorted(found, reverse=True)]


def _numbered(path: Path) -> re.Match | None:
    return re.fullmatch(r"checkpoint-(\d+)", path.name) if path.is_dir() else None


def newest_complete_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The complete checkpoint of the highest step in a folder; tells which newer ones it passes over, and why."""
    for path in _checkpoints(Path(output_dir)):
        if (missing := what_is_missing(path)) is None:
            return path
        _say(f"note: {path} is not complete ({missing}): passed over")
    return None


def choose_checkpoint(resume: str | None, output_dir: Path) -> Path | None:
    """Where a run starts: a checkpoint, or None for the beginning.

    Args:
        resume: --resume_from_checkpoint: a folder, "auto" for the newest complete one of output_dir if there is one,
            or None.
        output_dir: exists.

    Raises:
        UserError: the run would overwrite a finished model or an interrupted run, or what it names is not complete.
    """
    if resume in (None, "", "auto") and any((output_dir / name).exists() for name in WEIGHTS):
        done = "the run there is finished" if resume else "remove it"
        raise UserError(f"--output_dir {output_dir} holds a trained model: {done}, or choose another folder")
    if not resume:
        if newest := newest_complete_checkpoint(output_dir):
            raise UserError(
                f"--output_dir {output_dir} holds {newest.name} of an interrupted run: go on with "
                "--resume_from_checkpoint auto, or choose another folder"
            )
        return None
    if resume == "auto":
        newest = newest_complete_checkpoint(output_dir)
        _say(f"going on from {newest}" if newest else f"no complete checkpoint in {output_dir}: from the beginning")
        return newest
    if not (Path(resume) / TRAINER_STATE_NAME).exists():
        raise UserError(f"--resume_from_checkpoint {resume} is no checkpoint (no {TRAINER_STATE_NAME})")
    if missing := what_is_missing(Path(resume)):
        newest = newest_complete_checkpoint(Path(resume).parent)
        cure = f"{newest} is" if newest else "there is no complete one beside it"
        raise UserError(f"--resume_from_checkpoint {resume} is not complete ({missing}): {cure}")
    return Path(resume)


def check_fits(checkpoint: Path, model: torch.nn.Module) -> None:
    """Raises UserError if the checkpoint's tensors are not those of the model: other names or other shapes."""
    here = {name: tuple(tensor.shape) for name, tensor in _state_dict(model).items()}
    there = _shapes(checkpoint)
    flag = f"--resume_from_checkpoint {checkpoint}"
    if there is None:  # DeepSpeed's own format, or a pickle: the library finds out
        return
    if hasattr(model, "peft_config") != any(".lora_" in name for name in there):
        raise UserError(f"{flag} holds {'no' if hasattr(model, 'peft_config') else 'an'} adapter: --lora_r must match")
    for name in sorted(there):
        if there[name] != here.get(name):
            what = f"has the shape {here[name]} here" if name in here else "is not in this model"
            raise UserError(f"{flag} is of another model: {name}, there {there[name]}, {what}")
    # A tied output embedding is stored once, by either name.
    if missing := sorted(set(here) - set(there) - set(getattr(model, "all_tied_weights_keys", None) or {})):
        raise UserError(f"{flag} is of another model: it lacks {missing[0]}")


def _shapes(checkpoint: Path) -> dict[str, tuple[int, ...]] | None:
    """Tensor name → shape, from headers alone; None in a format that has no header."""
    if (checkpoint / SHARDED_MODEL / ".metadata").exists():
        from torch.distributed.checkpoint import FileSystemReader

        stored = FileSystemReader(checkpoint / SHARDED_MODEL).read_metadata().state_dict_metadata
        return {name.removeprefix("model."): tuple(entry.size) for name, entry in stored.items()}
    for name in (WEIGHTS[1], WEIGHTS[0], ADAPTER):
        if (checkpoint / name).exists():
            indexed = name.endswith(".index.json")
            files = set(read_json(checkpoint / name)["weight_map"].values()) if indexed else {name}
            shapes = {}
            for file in files:
                with safe_open(checkpoint / file, framework="pt") as shard:
                    shapes |= {key: tuple(shard.get_slice(key).get_shape()) for key in shard.keys()}
            return shapes
    return None


def _state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's tensors under the names in which a checkpoint has them: of an adapter, its own alone."""
    if not hasattr(model, "peft_config"):
        return model.state_dict()
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


# ---------------------------------------------------------------------------------------------------------------------
# Being asked to stop.


class StopOnSignal(transformers.TrainerCallback):
    """Ends training with a checkpoint after the step in which SIGTERM, SIGUSR1 or Ctrl-C arrived at any rank.

    A second signal ends the process at once. One within two seconds is the same request: a terminal and a scheduler
    send it to torchrun and to its workers, and torchrun passes it on to them once more.
    """

    SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)

    def __init__(self):
        self.received = 0  # the number of the signal: here first, from on_step_end on the same on every rank
        self._since = 0.0

    @contextmanager
    def listening(self):
        """Handles the signals while in it, in the main thread (only that one may)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._since = number, now
            if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # os.write: print may be what was interrupted
                os.write(2, f"\n{signal.Signals(number).name}: saving a checkpoint after this step\n".encode())
        elif now - self._since > 2:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:  # all ranks must leave after the same step
            received = torch.tensor(self.received, device=args.device)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            self.received = int(received)
        if self.received and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


# ---------------------------------------------------------------------------------------------------------------------
# Saving and loading.


class ResumableTrainer(transformers.Trainer):
    """Trainer whose checkpoints are whole or not there, and resume on another number of ranks."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._staging: Path | None = None
        self._saved_step = -1

    def train(self, resume_from_checkpoint: str | os.PathLike | None = None, **kwargs):
        """As the library's; raises Stopped when a signal ended it early."""
        checkpoint = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if checkpoint:
            self._check_resumed(checkpoint)
            if self.is_fsdp_enabled and not (checkpoint / SHARDED_MODEL).is_dir():
                self.is_fsdp_enabled = False  # each rank loads the whole model, as it loaded the base
                try:
                    super()._load_from_checkpoint(str(checkpoint))
                finally:
                    self.is_fsdp_enabled = True
        stop = StopOnSignal()
        if self.is_world_process_zero():
            shutil.rmtree(Path(self.args.output_dir) / STAGING, ignore_errors=True)
        if self.args.save_strategy == "no":  # then a signal ends the process, as it does everywhere
            return super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, **kwargs)
        self.add_callback(stop)
        try:
            with stop.listening():
                result = super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, **kwargs)
        finally:
            self.remove_callback(stop)
        if stop.received and self.state.global_step < self.state.max_steps:
            raise Stopped(
                f"stopped by {signal.Signals(stop.received).name} with checkpoint-{self.state.global_step} of "
                f"{self.state.max_steps} steps saved; to go on: the same command with --resume_from_checkpoint auto",
                EXIT_INTERRUPTED if stop.received == signal.SIGINT else EXIT_REQUEUE,
            )
        return result

    def _run_epoch(self, **kwargs):
        # The library would train one step more than asked for where the last one is not the last of its epoch.
        if self.state.global_step >= self.state.max_steps:
            _say(f"all {self.state.max_steps} steps were done already: nothing is trained")
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _examples_per_step(self) -> int:
        return self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _check_resumed(self, checkpoint: Path) -> None:
        if not (checkpoint / MANIFEST).exists():
            return
        manifest = read_json(checkpoint / MANIFEST)
        here, there = self._examples_per_step(), manifest["examples_per_step"]
        if here != there:
            steps, left = divmod(there, here // self.args.gradient_accumulation_steps)
            cure = f"--gradient_accumulation_steps {steps}" if not left else "the batch size and the number of ranks"
            raise UserError(
                f"{checkpoint} was trained with {there} examples a step, this run has {here}: {cure} makes them equal"
            )
        if manifest["world_size"] != self.args.world_size:
            _say(
                f"note: {checkpoint.name} was written by {manifest['world_size']} processes, this run has "
                f"{self.args.world_size}: the order of the data goes on, random states (dropout) start anew"
            )

    # A checkpoint, whole or not there.

    def _get_output_dir(self, trial) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        step, output_dir = self.state.global_step, Path(super()._get_output_dir(trial))
        if step == self._saved_step:  # a stop at the end of an epoch asks twice
            return
        self._staging = output_dir / STAGING
        unfinished = self._staging / f"checkpoint-{step}"
        try:
            with _told(f"checkpoint-{step}", output_dir):
                if self.is_world_process_zero():
                    shutil.rmtree(unfinished, ignore_errors=True)
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                if self.state.best_model_checkpoint == str(unfinished):
                    self.state.best_model_checkpoint = str(output_dir / unfinished.name)
                    if self.is_world_process_zero():
                        self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
                self.accelerator.wait_for_everyone()
                if self.args.local_process_index == 0:
                    fsync_tree(unfinished)  # on each node what its ranks have written
                self.accelerator.wait_for_everyone()
                if self.is_world_process_zero():
                    self._publish(unfinished, output_dir / unfinished.name)
        finally:
            self._staging = None
        self._saved_step = step

    def _publish(self, unfinished: Path, target: Path) -> None:
        missing = [
            f"rng_state_{rank}.pth"
            for rank in range(self.args.world_size)
            if self.args.world_size > 1 and not (unfinished / f"rng_state_{rank}.pth").exists()
        ]
        if missing and not self.args.save_only_model:
            raise SaveFailed(f"{missing[0]} is missing in {unfinished}: --output_dir must be shared by all nodes")
        files = {
            str(path.relative_to(unfinished)): path.stat().st_size
            for path in sorted(unfinished.rglob("*"))
            if path.is_file()
        }
        manifest = {
            "step": self.state.global_step,
            "world_size": self.args.world_size,
            "examples_per_step": self._examples_per_step(),
            "files": files,
        }
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        fsync_tree(unfinished / MANIFEST)
        if target.exists():  # of a branch that was left: somebody resumed from an older one
            os.rename(target, unfinished.with_suffix(".old"))
        os.rename(unfinished, target)
        _fsync(target.parent)
        shutil.rmtree(target.parent / STAGING, ignore_errors=True)
        keep = {target.name, Path(self.state.best_model_checkpoint or "").name}
        others = [path for path in _checkpoints(target.parent) if path.name not in keep]
        limit = self.args.save_total_limit
        if limit and limit > 0:
            for path in others[max(0, limit - len(keep - {""})) :]:
                shutil.rmtree(path, ignore_errors=True)

    # Loading on another number of ranks: sharded checkpoints without FSDP, whole ones with it.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        sharded = (Path(resume_from_checkpoint) / SHARDED_MODEL).is_dir()
        if sharded and not self.is_fsdp_enabled:
            self._load_sharded_weights(Path(resume_from_checkpoint))
        elif sharded or not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        # else train() has loaded it, before the model was sharded

    def _load_sharded_weights(self, checkpoint: Path) -> None:
        state = {"model": _state_dict(self.model)}
        torch.distributed.checkpoint.load(state, checkpoint_id=checkpoint / SHARDED_MODEL, no_dist=True)
        if hasattr(self.model, "peft_config"):
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(self.model, state["model"])
        else:
            self.model.load_state_dict(state["model"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        sharded = checkpoint is not None and (Path(checkpoint) / SHARDED_OPTIMIZER).is_dir()
        if checkpoint is None or self.is_deepspeed_enabled or sharded == self.is_fsdp_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        from torch.distributed.checkpoint import load
        from torch.distributed.checkpoint import state_dict as dcp

        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        if sharded:
            state = {"optimizer": dcp.get_optimizer_state_dict(self.model, self.optimizer)}
            load(state, checkpoint_id=Path(checkpoint) / SHARDED_OPTIMIZER, no_dist=True)
            dcp.set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
            return
        # optimizer.pt numbers the parameters in the order of the groups, which is the same here; shards go by name.
        whole = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        named = {}
        for group, stored in zip(self.optimizer.param_groups, whole["param_groups"], strict=True):
            for parameter, number in zip(group["params"], stored["params"], strict=True):
                named[number] = names[id(parameter)]
            stored["params"] = [named[number] for number in stored["params"]]
        whole["state"] = {named[number]: entry for number, entry in whole["state"].items()}
        dcp.set_optimizer_state_dict(
            self.model, self.optimizer, whole, options=dcp.StateDictOptions(full_state_dict=True)
        )

    # The result.

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Under FSDP a tied output embedding is gathered as a tensor of its own; saved, it would be stored twice."""
        for name in getattr(self.model, "all_tied_weights_keys", {}) if state_dict else ():
            state_dict.pop(name, None)
        super()._save(output_dir, state_dict)

    def save_whole_model(self, output_dir: Path, write: Callable[[Path], None] | None = None) -> None:
        """Writes a folder that ``from_pretrained`` reads, gathered tensor by tensor in CPU memory on rank 0.

        Its weights (or their index) take their place last, by a rename: a folder that has them is whole.

        Args:
            output_dir: exists.
            write: writes into the folder that it is given, on every rank; by default the library's save_model.
        """
        staging = output_dir / STAGING / "model"
        with _told("the model", output_dir):
            if self.is_world_process_zero():
                shutil.rmtree(staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            with self._gathered():
                (write or self.save_model)(staging)
            if self.is_world_process_zero():
                if not any((staging / name).exists() for name in WEIGHTS):
                    raise RuntimeError(f"the library saved no weights in {staging}; the checkpoints there are whole")
                _move_files(staging, output_dir)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _gathered(self):
        """With SHARDED_STATE_DICT save_model writes nothing, and says nothing."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        before = plugin.state_dict_type if plugin else None
        if plugin:
            plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            yield
        finally:
            if plugin:
                plugin.set_state_dict_type(before)


@contextmanager
def _told(what: str, output_dir: Path):
    """Turns a failed write into one line, and gives the room that it took back."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except UserError:
        raise
    except (OSError, SafetensorError, CheckpointException, RuntimeError) as e:
        if isinstance(e, CheckpointException):  # raised on every rank, with the cause of each that failed
            causes = [failure[0] for failure in e.failures.values()]
        else:
            causes = [e]
        # torch.save writes through C++, which forgets the errno
        stream = ("PytorchStreamWriter", "iostream error", "write failed")
        if not all(isinstance(c, (OSError, SafetensorError)) or any(s in str(c) for s in stream) for c in causes):
            raise
        free = shutil.disk_usage(output_dir).free
        shutil.rmtree(output_dir / STAGING, ignore_errors=True)
        newest = newest_complete_checkpoint(output_dir)
        go_on = f"; {newest.name} is whole: go on with --resume_from_checkpoint auto" if newest else ""
        raise SaveFailed(
            f"{what} could not be saved in {output_dir}, which had {free / 1e9:.1f} GB free "
            f"({str(causes[0]).strip().splitlines()[0]}): free some{go_on}"
        ) from None


def _move_files(source: Path, target: Path) -> None:
    """Moves what is in a folder into another, the names that make it a model last."""
    fsync_tree(source)
    for name in WEIGHTS:
        (target / name).unlink(missing_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: (path.name in WEIGHTS, path.name)):
        if path.is_dir():
            shutil.rmtree(target / path.name, ignore_errors=True)
        os.rename(path, target / path.name)
    _fsync(target)
    shutil.rmtree(target / STAGING, ignore_errors=True)


def fsync_tree(path: Path) -> None:
    """Puts a file, or a folder and all in it, on the disk."""
    for entry in path.iterdir() if path.is_dir() else ():
        fsync_tree(entry)
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
