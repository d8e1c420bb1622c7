"""Checkpoints and models that a kill or a full disk cannot spoil.

A checkpoint is written into ``OUT/.saving`` and becomes ``OUT/checkpoint-N`` by one rename once every process has
written its part and all of it is on the disk; only then are older ones deleted. So every checkpoint-N is complete, at
any moment. The final model is moved into place file by file, the weights (or their index) last.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME

from alpaca import RankError, UserError
from alpaca.common.files import fsync, fsync_tree
from alpaca.common.text import first_line
from alpaca.training import checkpoints
from alpaca.training.distributed import say
from alpaca.training.sharding import LoadingTrainer
from alpaca.training.stop import EXIT_INTERRUPTED, EXIT_REQUEUE, StopOnSignal, Stopped
from alpaca.weights.checkpoint import CHAT_TEMPLATES, SIDE_FILES, WEIGHTS, read_json

# Files of an output folder that are uploaded to the hub: the model, what it needs to be used, and the run's record.
PUBLISHED = ("*.safetensors", "*.safetensors.index.json", "config.json", *SIDE_FILES, f"{CHAT_TEMPLATES}/*.jinja")
PUBLISHED += ("model_card.md", "training_receipt.json", "loss.png")


class SaveFailed(RankError):
    """This rank, perhaps alone, could not write a checkpoint or the model; earlier ones are complete."""


class ResumableTrainer(LoadingTrainer):
    """Trainer whose checkpoints are complete or absent, and resume on another number of ranks.

    The methods that it overrides exist in transformers 5.17 to 5.23.
    """

    def __init__(self, model, *args, **kwargs):
        self._use_cache = getattr(model.config, "use_cache", True)  # the library turns it off for training
        if tied := getattr(model, "all_tied_weights_keys", None):
            # Private (5.17 to 5.23): what need not be in a checkpoint. Without this, FSDP, which gathers a tied output
            # embedding as a tensor of its own, stores it twice, and a resumed run warns that it is missing.
            model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *tied}
        super().__init__(model, *args, **kwargs)
        self._staging: Path | None = None
        self._saved_step = -1
        self._data: dict = {}
        self._checked: Path | None = None

    def train(self, resume_from_checkpoint: str | os.PathLike | None = None, **kwargs):
        """Train as the library does; raise Stopped if a signal ended it early."""
        checkpoint = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        kwargs["resume_from_checkpoint"] = str(checkpoint) if checkpoint else None
        self._saved_step = -1
        self.check_resumed(checkpoint)
        remove_leftovers(Path(self.args.output_dir))
        if self.is_world_process_zero():
            checkpoints.set_aside_newer(Path(self.args.output_dir), checkpoint)
        self.accelerator.wait_for_everyone()
        self._stop = stop = StopOnSignal()
        if self.args.save_strategy == "no":  # then a signal ends the process, as usual
            return super().train(**kwargs)
        self.add_callback(stop)
        try:
            with stop.listening():
                result = super().train(**kwargs)
        finally:
            self.remove_callback(stop)
        if stop.ends_early(self.state):
            raise Stopped(
                f"stopped by {signal.Signals(stop.received).name} with checkpoint-{self.state.global_step} of "
                f"{self.state.max_steps} steps saved; to resume, run the same command with {checkpoints.RESUME}",
                EXIT_INTERRUPTED if stop.received == signal.SIGINT else EXIT_REQUEUE,
            )
        return result

    def _init_training_state(self, *args, **kwargs):
        """The library knows the best checkpoint by its path only: if the folder has moved since, find it there."""
        started = super()._init_training_state(*args, **kwargs)
        if self._checked and (best := read_json(self._checked / TRAINER_STATE_NAME).get("best_model_checkpoint")):
            if (here := self._checked.parent / Path(best).name).is_dir():
                self.state.best_model_checkpoint = str(here)
        return started

    def _finalize_training(self, *args, **kwargs):
        """After a stopped run the library would load the best checkpoint and, with a limit of 1, delete the newest."""
        best, limit = self.args.load_best_model_at_end, self.args.save_total_limit
        if self._stop.ends_early(self.state):
            self.args.load_best_model_at_end, self.args.save_total_limit = False, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.load_best_model_at_end, self.args.save_total_limit = best, limit

    def _run_epoch(self, **kwargs):
        """Resumed after its last step, the library would train one more if that was not the last of its epoch."""
        if self.state.global_step >= self.state.max_steps:
            say(f"all {self.state.max_steps} steps were done already: nothing is trained")
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _examples_per_step(self) -> int:
        return self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def check_resumed(self, checkpoint: Path | None) -> None:
        """Raise UserError unless this run may resume from the checkpoint. Every rank must call it.

        train() calls it; call it before a rehearsal, which takes minutes.
        """
        if self._data and checkpoint == self._checked:
            return  # checked and reported already
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._data = checkpoints.data_facts(self.train_dataset, seed)
        self._compare(checkpoint)
        self._checked = checkpoint

    def _compare(self, checkpoint: Path | None) -> None:
        if self.args.world_size > 1:
            match = checkpoint and checkpoints.numbered(checkpoint)
            step = int(match[1]) if match else -1
            seen = torch.tensor([step, -step], device=self.args.device)
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
            if seen[0] != -seen[1]:
                raise UserError(f"the nodes see different checkpoints: all must share {self.args.output_dir}")
        if not checkpoint or not (checkpoint / checkpoints.MANIFEST).exists():
            return
        manifest = read_json(checkpoint / checkpoints.MANIFEST)
        here, there = self._examples_per_step(), manifest["examples_per_step"]
        if here != there:
            steps, left = divmod(there, here // self.args.gradient_accumulation_steps)
            cure = f"set gradient_accumulation_steps to {steps}"
            if left:
                cure = "change the batch size or the number of ranks"
            raise UserError(f"{checkpoint} was trained with {there} examples a step, this run has {here}: {cure}")
        if "data" in manifest:
            checkpoints.check_data(checkpoint, manifest["data"], self._data)
        if manifest["world_size"] != self.args.world_size:
            say(
                f"note: {checkpoint.name} was written by {manifest['world_size']} processes, this run has "
                f"{self.args.world_size}: the data continues in order, random states (dropout) start afresh"
            )

    # Uploads to the hub.

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: the library would copy a model into the output folder, which marks a run as finished."""

    def upload(self, output_dir: Path) -> None:
        """With push_to_hub, upload what PUBLISHED names in one commit; every rank may call it, after the last save.

        Args:
            output_dir: with the finished model, its tokenizer, card and receipt.

        Raises:
            UserError: the upload failed; the model in the folder is still complete.
        """
        if not self.args.push_to_hub or not self.is_world_process_zero():
            return
        from huggingface_hub import CommitOperationAdd, HfApi

        files = sorted(path for pattern in PUBLISHED for path in output_dir.glob(pattern))
        names = {"model_card.md": "README.md"}  # what the hub shows
        commit = [CommitOperationAdd(names.get(path.name, str(path.relative_to(output_dir))), path) for path in files]
        where = {"token": self.args.hub_token, "revision": getattr(self.args, "hub_revision", None)}
        try:
            HfApi().create_commit(self.hub_model_id, commit, commit_message="The trained model", **where)
        except Exception as e:  # whatever the network does, the run is done
            raise UserError(
                f"the upload to {self.hub_model_id} failed ({first_line(e)}); the model in {output_dir} is complete: "
                f"hf upload {self.hub_model_id} {output_dir} . --exclude '*/*' --exclude trainer_state.json"
            ) from e
        say(f"uploaded {len(files)} files to {self.hub_model_id}")

    # A checkpoint, complete or absent.

    def _get_output_dir(self, trial) -> str:
        """The library saves a checkpoint in place, file by file: within a save, make that the staging folder."""
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        """Let the library save into the staging folder, and rename the checkpoint once all of it is on the disk."""
        step, output_dir = self.state.global_step, Path(super()._get_output_dir(trial))
        if step == self._saved_step:  # a stop at the end of an epoch asks twice
            return
        if hasattr(self.model, "peft_config"):  # each save puts it back; lora.add_adapter says why it goes
            self.model.active_peft_config.base_model_name_or_path = None
        self._staging = output_dir / checkpoints.STAGING
        unfinished = self._staging / f"checkpoint-{step}"
        try:
            with _failed_write(f"checkpoint-{step}", output_dir):
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
        ranks = self.args.world_size
        states = [f"rng_state_{rank}.pth" for rank in range(ranks)]
        several = ranks > 1 and not self.args.save_only_model
        if several and (missing := [name for name in states if not (unfinished / name).exists()]):
            raise SaveFailed(f"{missing[0]} is missing in {unfinished}: all nodes must share output_dir")
        files = [path for path in sorted(unfinished.rglob("*")) if path.is_file()]
        manifest = {
            "step": self.state.global_step,
            "world_size": ranks,
            "examples_per_step": self._examples_per_step(),
            "data": self._data,
            "arguments": getattr(self.args, "given", None),  # train.py's
            "files": {str(path.relative_to(unfinished)): path.stat().st_size for path in files},
        }
        (unfinished / checkpoints.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        fsync_tree(unfinished / checkpoints.MANIFEST)
        if target.exists():
            checkpoints.set_aside([target])
        os.rename(unfinished, target)
        fsync(target.parent)
        shutil.rmtree(target.parent / checkpoints.STAGING, ignore_errors=True)
        keep = {target.name, Path(self.state.best_model_checkpoint or "").name}
        others = [path for path in checkpoints.newest_first(target.parent) if path.name not in keep]
        limit = self.args.save_total_limit
        if limit and limit > 0:
            left = target.parent.glob(f"{checkpoints.ABANDONED}*")  # until now they were the run's newest
            for path in [*others[max(0, limit - len(keep - {""})) :], *left]:
                shutil.rmtree(path, ignore_errors=True)

    # The result.

    def save_whole_model(self, output_dir: Path, write: Callable[[Path], None] | None = None) -> None:
        """Write a folder that ``from_pretrained`` reads, gathered tensor by tensor in CPU memory on rank 0.

        Its weights (or their index) are renamed into place last: a folder that has them is complete.

        Args:
            output_dir: exists.
            write: called on every rank with the folder to write into; by default the library's save_model.
        """
        staging, config = output_dir / checkpoints.STAGING / "model", self.model.config
        in_training = getattr(config, "use_cache", None)
        with _failed_write("the model", output_dir):
            if self.is_world_process_zero():
                shutil.rmtree(staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            # With SHARDED_STATE_DICT save_model silently writes nothing.
            config.use_cache = self._use_cache
            try:
                with self.state_dict_type("FULL_STATE_DICT"):
                    if write:
                        write(staging)
                    else:
                        self.save_model(str(staging), _internal_call=True)  # else push_to_hub uploads the folder
            finally:
                config.use_cache = in_training
            if self.is_world_process_zero():
                if not any((staging / name).exists() for name in WEIGHTS):
                    raise RuntimeError(f"the library saved no weights in {staging}; the checkpoints are complete")
                # A pickle with every argument, including hub_token, in a folder that will be published.
                (staging / "training_args.bin").unlink(missing_ok=True)
                _move_files(staging, output_dir)
        self.accelerator.wait_for_everyone()


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a killed run left half-written in a folder; complete checkpoints stay. Every rank must call it."""
    checkpoints.rename_back(output_dir)
    if int(os.environ.get("RANK", 0)) == 0:
        for name, what in ((checkpoints.STAGING, "a save"), (checkpoints.REHEARSAL, "a rehearsal")):
            if (folder := output_dir / name).exists():
                shutil.rmtree(folder, ignore_errors=True)
                say(f"note: removed {folder}, left by {what} that was interrupted")
    checkpoints.barrier()


@contextmanager
def _failed_write(what: str, output_dir: Path):
    """Turn a failed write into one line, and free the space that it took."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (OSError, SafetensorError, CheckpointException, RuntimeError) as e:
        everywhere = isinstance(e, CheckpointException)  # raised on all ranks, with the cause of each failure
        causes = list(e.failures.values()) if everywhere else [(e, traceback.extract_tb(e.__traceback__))]
        if not all(checkpoints.is_failed_write(*cause) for cause in causes):
            raise
        free = shutil.disk_usage(output_dir).free
        shutil.rmtree(output_dir / checkpoints.STAGING, ignore_errors=True)
        newest = checkpoints.newest_complete_checkpoint(output_dir)
        resume = f"; {newest.name} is complete: resume with {checkpoints.RESUME}" if newest else ""
        raise (UserError if everywhere else SaveFailed)(
            f"{what} could not be saved in {output_dir}, which had {free / 1e9:.1f} GB free "
            f"({first_line(causes[0][0])}): free some{resume}"
        ) from None


def _move_files(source: Path, target: Path) -> None:
    """Move the files of a folder into another, those that make it a model last."""
    os.umask(umask := os.umask(0))
    for path in source.rglob("*.safetensors"):
        path.chmod(0o666 & ~umask)  # safetensors makes files that only the owner can read
    fsync_tree(source)
    for name in WEIGHTS:
        (target / name).unlink(missing_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: (path.name in WEIGHTS, path.name)):
        if path.is_dir():
            shutil.rmtree(target / path.name, ignore_errors=True)
        os.rename(path, target / path.name)
    fsync(target)
    shutil.rmtree(target / checkpoints.STAGING, ignore_errors=True)
