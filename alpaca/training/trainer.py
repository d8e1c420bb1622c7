"""The one Trainer: it counts tokens, weighs each the same, and saves so that no kill or full disk spoils a model.

A checkpoint is written into ``OUT/.saving`` and renamed to ``OUT/checkpoint-N`` once every process has written its part
and everything is on disk; only then are older ones deleted. So every checkpoint-N is complete at any moment. The final
model is moved into place file by file, the weights (or their index) last.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from alpaca import RankError
from alpaca.common.files import fsync, fsync_tree
from alpaca.common.text import first_line
from alpaca.training import checkpoints, packing, sharding
from alpaca.training.distributed import say
from alpaca.training.evaluate import sums_by_example
from alpaca.training.meter import Bars, Meter
from alpaca.weights.checkpoint import WEIGHTS


class Trainer(transformers.Trainer):
    """The library's Trainer, with losses as means over supervised tokens, a meter, and complete checkpoints.

    Three of the overridden methods are private, with the same signatures in transformers 5.17 and 5.23:

    - ``_save_checkpoint``: the library writes a checkpoint in place, file by file; a kill leaves half of one. Not
      needed once it writes into another folder and renames that.
    - ``_load_from_checkpoint`` and ``_load_optimizer_and_scheduler``: the library reads a checkpoint only with the kind
      of sharding that wrote it. Not needed once it reads any of them by name.
    """

    def __init__(self, model, args, *rest, **kwargs):
        self._use_cache = getattr(model.config, "use_cache", True)  # the library turns it off for training
        args = copy.copy(args)
        # The library would copy each checkpoint's model into the output folder, which marks a run as finished;
        # receipt.upload uploads the result once, at the end.
        args.push_to_hub = False
        super().__init__(model, args, *rest, **kwargs)
        self.meter = Meter(self.model, self.args.device, self.args.world_size)
        self._saved_step = -1
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(self.meter)
        if sys.stderr.isatty() and not args.disable_tqdm:
            self.add_callback(Bars)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Return a stand-in under FSDP: the real one is made of sharded parameters, which come later.

        accelerate (1.15) requires an optimizer with the model, and finds a shard by the address of its whole parameter:
        on the meta device all addresses are equal.
        """
        if not self.is_fsdp_enabled:
            return super().create_optimizer(model)
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.transformer_cls_names_to_wrap is None:  # the library names some classes that a composite model lacks
            present = {type(module).__name__ for module in self.model.modules()}
            plugin.transformer_cls_names_to_wrap = sorted(present.intersection(self.model._no_split_modules or ()))
        self._values = sharding.take_values(self.model)
        self.optimizer = torch.optim.SGD([next(self.model.parameters())])
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Under FSDP, first send what rank 0 has read, and make the optimizer: this is called once all is sharded."""
        if self.is_fsdp_enabled:
            sharding.fill(self, self._values)
            self.optimizer.param_groups[0]["params"] = []  # accelerate keeps the stand-in, and would scale gradients
            self.optimizer = None
            self.optimizer = self.accelerator.prepare_optimizer(super().create_optimizer())
        return super().create_scheduler(num_training_steps, optimizer)

    def get_batch_samples(self, *args, **kwargs) -> tuple[list, torch.Tensor | int | None]:
        """Return the batches of a step and their number of supervised tokens, as an integer.

        The library's is in floating point, which FSDP rounds to the type that it computes in: 267 becomes 268 in bf16,
        and every loss and gradient was off by up to 0.4%.
        """
        if self.state.global_step >= self.state.max_steps:
            # Resumed after its last step, the library (5.23) would train one more unless an epoch ends there.
            say(f"all {self.state.max_steps} steps are already done: nothing to train")
            self._saved_step, self.control.should_training_stop = self.state.global_step, True
            return [], None
        batches, count = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            self.meter.count(batch)
        return batches, count.long() if torch.is_tensor(count) else count

    def store_flos(self) -> None:
        """Gather counts: the library calls this on every rank before it logs, saves or loads the best checkpoint."""
        self.meter.gather(self.accelerator.gather, self.state)
        super().store_flos()
        if (best := Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}").is_dir():
            self.state.best_model_checkpoint = str(best)  # the library stores its path, and the folder may move

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs.update(self.meter.figures(self.state))
        super().log(logs, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        loss, logits, _ = super().prediction_step(model, inputs, False, ignore_keys)
        # With several ranks, examples are repeated to fill the last batch: gathering leaves them out.
        self._held_out.append(self.accelerator.gather_for_metrics(sums_by_example(logits, inputs)))
        return loss, None, None

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Make the loss a mean over all supervised tokens.

        The library's is a mean of batch means, in which a token of a batch with few labels counts more: 5.06 in one
        batch of 10 unequal examples is 5.50 in batches of 8, and 4.74 on two ranks of 4.
        """
        self._held_out: list[torch.Tensor] = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, count = torch.cat(self._held_out).sum(dim=0).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / count
        return output

    def _save_checkpoint(self, model, trial) -> None:
        """Let the library save into the staging folder, and rename the checkpoint once it is on disk."""
        step, output_dir = self.state.global_step, Path(self.args.output_dir)
        if step == self._saved_step:  # a stop at the end of an epoch asks twice
            return
        if hasattr(self.model, "peft_config"):
            # peft restores the base's name in each save. With it, peft sees that the vocabulary grew by [PAD], and
            # stores the embeddings too: 1 GB at 7B for rows that are not trained.
            self.model.active_peft_config.base_model_name_or_path = None
        unfinished, target = output_dir / checkpoints.STAGING / f"checkpoint-{step}", output_dir / f"checkpoint-{step}"
        self.args.output_dir = str(unfinished.parent)
        with _one_line_if_it_fails(target.name, output_dir):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.local_process_index == 0:
                fsync_tree(unfinished)  # on each node, what its ranks have written
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self._publish(unfinished, target)
        self.args.output_dir, self._saved_step = str(output_dir), step

    def _publish(self, unfinished: Path, target: Path) -> None:
        """List a checkpoint's files, rename it to its place, and delete those beyond save_total_limit."""
        if self.state.best_model_checkpoint == str(unfinished):
            self.state.best_model_checkpoint = str(target)
            self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
        if not self.args.save_only_model and len(list(unfinished.glob("rng_state*.pth"))) < self.args.world_size:
            raise RankError(f"{target.name} lacks files of some ranks: put output_dir on a file system of all nodes")
        files = {str(p.relative_to(unfinished)): p.stat().st_size for p in unfinished.rglob("*") if p.is_file()}
        facts, given = (getattr(self.args, name, {}) for name in ("facts", "given"))  # train.py's
        manifest = {"step": self.state.global_step, **facts, "arguments": given, "files": dict(sorted(files.items()))}
        (unfinished / checkpoints.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        fsync_tree(unfinished)
        os.rename(unfinished, target)
        fsync(target.parent)
        if (limit := self.args.save_total_limit or 0) > 0:
            kept = {target.name, Path(self.state.best_model_checkpoint or target).name}
            others = [path for path in checkpoints.newest_first(target.parent) if path.name not in kept]
            for path in others[max(0, limit - len(kept)) :]:
                os.rename(path, unfinished.parent / path.name)  # a half-deleted one must not be called checkpoint-N
        shutil.rmtree(unfinished.parent, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        sharding.load_weights(self, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint:
            sharding.load_optimizer(self, Path(checkpoint), super()._load_optimizer_and_scheduler)

    def save_whole_model(self, output_dir: Path, write: Callable[[Path], None] | None = None) -> None:
        """Write a folder that ``from_pretrained`` reads, gathered tensor by tensor in CPU memory on rank 0.

        Its weights (or their index) are renamed into place last: a folder that has them is complete. ``write``, if
        given, is called on every rank with the folder to write to, instead of saving this trainer's own model.
        """
        staging = output_dir / checkpoints.STAGING / "model"
        self.model.config.use_cache = self._use_cache
        with _one_line_if_it_fails("the model", output_dir):
            if write:
                write(staging)
            else:  # save_model writes nothing under FSDP with SHARDED_STATE_DICT, and a pickle of hub_token otherwise
                state = self.accelerator.get_state_dict(self.deepspeed or self.model)
                if self.is_world_process_zero():
                    model = self.accelerator.unwrap_model(self.model)
                    for name in model.all_tied_weights_keys:  # which FSDP gathers as tensors of their own
                        state.pop(name, None)
                    model.save_pretrained(staging, state_dict=state)
                    self.processing_class.save_pretrained(staging)
            if self.is_world_process_zero():
                _move_files(staging, output_dir)
        self.accelerator.wait_for_everyone()


def trainer_maker(load: Callable, model, **options) -> Callable[..., Trainer]:
    """Return a function that makes the trainers of a run: the first takes ``model``, the others load one."""
    checked = [model]

    def make(args, rows, held_out) -> Trainer:
        model = checked.pop() if checked else load()
        if options["data_collator"].padding_free:
            packing.use_segments(model)
        return Trainer(model, args, train_dataset=rows, eval_dataset=held_out, **options)

    return make


@contextmanager
def _one_line_if_it_fails(what: str, output_dir: Path):
    """Turn a failed save into one line with its cause, and free its space.

    A full disk is an OSError, safetensors' own error, a RuntimeError of torch.save, or, under FSDP, a
    CheckpointException, which has the causes of all ranks.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as e:
        cause = next(iter(e.failures.values()))[0] if isinstance(e, CheckpointException) else e
        free = f"{shutil.disk_usage(output_dir).free / 1e9:.1f} GB free"
        shutil.rmtree(output_dir / checkpoints.STAGING, ignore_errors=True)
        what = f"{what} could not be saved in {output_dir} ({first_line(cause)}), which had {free}"
        raise RankError(f"{what}: fix the cause, then resume with {checkpoints.RESUME}") from e


def _move_files(source: Path, target: Path) -> None:
    """Move the files of a folder into another, those that make it a model last."""
    for path in source.rglob("*.safetensors"):  # safetensors writes files that only the owner can read
        shutil.copymode(source / "config.json", path)
    fsync_tree(source)
    for path in sorted(source.iterdir(), key=lambda path: (path.name in WEIGHTS, path.name)):
        if path.is_dir():
            shutil.rmtree(target / path.name, ignore_errors=True)
        os.rename(path, target / path.name)
    fsync(target)
    shutil.rmtree(target / checkpoints.STAGING, ignore_errors=True)
