"""Save → reload → one resumed step, and the final save, with the real Trainer, before step 1.

Two optimizer steps are taken at learning rate 0, with a checkpoint between them by the Trainer's own code. Then the
weights are set to zero, the optimizer is thrown away, and the second step is done again from the checkpoint. The
weights and the optimizer's states must come back bit for bit, and the loss of the repeated step must be the same: that
holds only if weights, random state and place in the data were restored. With --save_strategy no there is no checkpoint:
the two steps and the final save are rehearsed.

At learning rate 0 no copy of the weights is needed to leave them as they were: the steps do not move them, and the
reload must restore them exactly. Both are verified by fingerprints, so a rehearsal that returns without faults has
left the model as it found it; one with faults must be followed by an error.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch.utils.data import Subset
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from alpaca import UserError
from alpaca.inference.adapters import ADAPTER
from alpaca.training.checkpoints import REHEARSAL, barrier, saved_names
from alpaca.training.examples import columns
from alpaca.training.preflight.findings import gather
from alpaca.training.preflight.fingerprint import differences, plain_name, states_of, weights_of
from alpaca.weights.checkpoint import WEIGHTS, CheckpointReader


@dataclasses.dataclass
class Rehearsal:
    """What came of it. ``faults`` are (what, why, cure); the figures are for the report.

    Without a checkpoint ``resumed_loss`` is NaN and ``checkpoint_bytes`` 0.
    """

    faults: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    loss: float = math.nan  # of step 2, uninterrupted
    resumed_loss: float = math.nan  # of step 2, from the checkpoint
    seconds: float = 0.0
    step_seconds: float = 0.0  # of step 2, of at most two accumulated batches
    save_seconds: float = 0.0  # of the checkpoint
    checkpoint_bytes: int = 0
    final_bytes: int = 0
    peak_bytes: int = 0  # on this rank's CUDA device; 0 without one


class _Observer(TrainerCallback):
    """Takes fingerprints before step 1 and after step 1, asks for the save there, and notes each step's loss."""

    def __init__(self, trainer, before: Callable[[], None] | None):
        self.trainer, self.before, self.losses = trainer, before, {}
        self.at_start: tuple[dict, dict] = ({}, {})
        self.after_step: dict[int, tuple[dict, dict]] = {}
        self.save_at = 0
        self.step_seconds = self.save_seconds = self._since = 0.0

    def _fingerprints(self) -> tuple[dict, dict]:
        return weights_of(self.trainer.model), states_of(self.trainer.optimizer)

    def on_train_begin(self, args, state, control, **kwargs):
        if self.before is not None:
            self.before()
            self.before = None
        self.at_start = self._fingerprints()

    def on_step_begin(self, args, state, control, **kwargs):
        self._since = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        self.save_seconds = time.perf_counter() - self._since

    def on_step_end(self, args, state, control, **kwargs):
        self.step_seconds = time.perf_counter() - self._since
        self.after_step[state.global_step] = self._fingerprints()
        control.should_log = True
        control.should_save = state.global_step == self.save_at
        self._since = time.perf_counter()
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.losses[state.global_step] = logs["loss"]


def rehearse(
    trainer,
    output_dir: str | os.PathLike,
    save_whole_model: Callable[[Path], None] | None = None,
    at_start: Callable[[], None] | None = None,
) -> Rehearsal:
    """Rehearses saving and resuming; the trainer is left as it was, except that its model is on its device and mesh.

    Costs three optimizer steps (of at most two accumulated batches), a checkpoint and a whole model on disk, one after
    the other, and their reload. The steps are on the longest examples, so that they show the most memory that a step
    needs; in the second one the optimizer's states are there too.

    Args:
        trainer: a transformers.Trainer before its train().
        output_dir: where the run will write; a folder ``.save-rehearsal`` comes and goes in it.
        save_whole_model: the run's last save, into a folder; by default the trainer's own. Of an adapter only the
            library's save is rehearsed: merged into its base it would be the base, which a careful save refuses.
        at_start: called on every rank before step 1, with the model on its device and mesh.

    Returns:
        A Rehearsal; where its ``faults`` are not empty the weights may be lost, and the run must end.
    """
    begin = time.perf_counter()
    folder = Path(output_dir) / REHEARSAL
    result = Rehearsal()
    saves = trainer.args.save_strategy != "no"
    _remove(folder)
    barrier()
    try:
        with _undisturbed(trainer, folder), _quiet():
            checkpoint = _save_and_resume(trainer, folder, result, at_start, saves)
            result.checkpoint_bytes = folder_bytes(checkpoint)
            barrier()
            _remove(checkpoint)  # so that the rehearsal never needs more disk than a checkpoint or a whole model
            if not result.faults:
                _save_whole(trainer, folder / "whole", save_whole_model, result)
                result.faults = gather(result.faults)
            if trainer.accelerator.device.type == "cuda":
                result.peak_bytes = torch.cuda.max_memory_reserved()
    finally:
        _remove(folder)
    barrier()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    result.seconds = time.perf_counter() - begin
    return result


def _save_and_resume(
    trainer, folder: Path, result: Rehearsal, at_start: Callable[[], None] | None, saves: bool
) -> Path:
    observer = _Observer(trainer, at_start)
    handler = trainer.callback_handler
    trainer.callback_handler = CallbackHandler(
        [DefaultFlowCallback, observer], handler.model, handler.processing_class, None, None
    )
    observer.save_at = 1 if saves else 0
    set_seed(trainer.args.seed)  # as in a new process
    trainer.train()
    if trainer.is_fsdp_enabled:
        # The layers are wrapped for recomputing now, if they are to be. accelerate would wrap them again whenever it
        # prepares the model, and does not find them under their new names.
        trainer.accelerator.state.fsdp_plugin.activation_checkpointing = False
    before, (moved, states) = observer.at_start[0], observer.after_step[1 if saves else 2]
    result.loss = observer.losses[2]
    result.step_seconds, result.save_seconds = observer.step_seconds, observer.save_seconds
    checkpoint = folder / "checkpoint-1"
    if not all(math.isfinite(loss) for loss in observer.losses.values()):
        result.faults.append(
            (
                f"the loss of the first steps is not finite: {list(observer.losses.values())}",
                "training would go on with it and end in a model of NaN",
                "look at the base model (does chat.py answer?) and use bf16 or float32 instead of fp16",
            )
        )
    if names := differences(before, moved):
        result.faults.append(
            (
                f"--optim {trainer.args.optim} moves weights at learning rate 0 ({names})",
                "saving and resuming cannot be rehearsed without changing the model",
                "--skip_save_rehearsal, or --optim adamw_torch",
            )
        )
    result.faults = gather(result.faults)  # a rank that stopped alone would leave the others waiting
    if result.faults or not saves:
        return checkpoint
    trainer.optimizer = trainer.lr_scheduler = None
    with torch.no_grad():  # what the reload does not bring back shall be missed
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.zero_()

    observer.save_at, observer.losses = 0, {}
    set_seed(trainer.args.seed)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    result.resumed_loss = observer.losses.get(2, math.nan)
    cure = "report it with this output; until then --skip_save_rehearsal, and train in one go with --save_strategy no"
    for what, saved, loaded in (
        ("the weights", before, observer.at_start[0]),
        ("the optimizer's states", states, observer.at_start[1]),
    ):
        if names := differences(saved, loaded):
            result.faults.append(
                (
                    f"{what} do not come back from a checkpoint as they were saved ({names})",
                    "a run that is interrupted could not be resumed",
                    cure,
                )
            )
    if not math.isclose(result.loss, result.resumed_loss, rel_tol=1e-4):
        result.faults.append(
            (
                f"the resumed step has loss {result.resumed_loss:.6f}, the uninterrupted one {result.loss:.6f}",
                "a resumed run would not continue the interrupted one: other data, random state or weights",
                cure,
            )
        )
    if not result.faults and (names := differences(before, observer.after_step[2][0])):
        result.faults.append((f"the rehearsal changed the weights ({names})", "the run would not be yours", cure))
    result.faults = gather(result.faults)
    return checkpoint


def _save_whole(trainer, folder: Path, save: Callable[[Path], None] | None, result: Rehearsal) -> None:
    """The save at the end of training, read back: every name and shape, and some tensors through from_pretrained."""
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True)
    barrier()
    model = trainer.accelerator.unwrap_model(trainer.model)
    trained = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    adapter = hasattr(model, "peft_config")
    if adapter:
        if trainer.is_fsdp_enabled:
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")  # taken back at the end
        trainer.save_model(str(folder))
    else:
        (save or getattr(trainer, "save_whole_model", trainer.save_model))(folder)
    gathered = {} if adapter else {name: _whole(trained[name]) for name in _some(trained)}  # a collective
    barrier()
    result.final_bytes = folder_bytes(folder)
    if not trainer.is_world_process_zero():
        return
    try:
        what = _wrong_adapter(folder, trained) if adapter else _wrong_model(folder, model, gathered)
    except UserError as e:
        what = f"the final save cannot be read: {e}"
    if what:
        why = "the trained model would be lost at the very end"
        cure = "report it with this output; the checkpoints are whole (--skip_save_rehearsal goes on regardless)"
        result.faults.append((what, why, cure))


def _wrong_adapter(folder: Path, trained: dict) -> str | None:
    if not (folder / ADAPTER).exists():
        return "the final save wrote no adapter"
    with safe_open(folder / ADAPTER, framework="pt") as file:
        count = sum(".lora_" in name for name in file.keys())  # peft may add embeddings that are not trained
    return f"the saved adapter has {count} tensors, the model trains {len(trained)}" if count != len(trained) else None


def _wrong_model(folder: Path, model, gathered: dict[str, torch.Tensor]) -> str | None:
    if not any((folder / name).exists() for name in WEIGHTS):
        return "the final save wrote no weights"
    reader = CheckpointReader(folder)
    saved = {name: reader.spec(name)[1] for name in reader.names()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    # Under other names than in memory: a mixture's experts are one tensor there, and one each in the file.
    expected = {name: tuple(tensor.shape) for name, tensor in saved_names(model).items() if name not in tied}
    if wrong := sorted(name for name in expected if saved.get(name) != expected[name]):
        return f"the final save lacks {len(wrong)} tensors of the model, or has other shapes ({wrong[0]}, …)"
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 1  # the embeddings and the first layer stand for the rest
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[:1]
    loaded = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype="auto").state_dict()
    for name, tensor in gathered.items():
        if not torch.equal(loaded[name].to(tensor.dtype), tensor):
            return f"from_pretrained gives other values than were trained ({name})"
    return None


def _some(parameters: dict) -> list[str]:
    """A few names of what a model of one layer has: the first and the last outside the layers, and of layer 0."""
    layer = {name: next((part for part in name.split(".") if part.isdigit()), "") for name in parameters}
    inside = [name for name in parameters if layer[name] == "0"]
    outside = [name for name in parameters if not layer[name]]
    return list(dict.fromkeys(outside[:1] + outside[-1:] + inside[:1] + inside[-1:]))


def longest(dataset: Sequence, count: int) -> Subset:
    """The items of a dataset that have the most tokens; all of them where there are fewer than ``count``.

    Args:
        dataset: of {"input_ids", "labels"}, or alpaca.training.packing's bins of them.
        count: how many.
    """
    if hasattr(dataset, "bins"):
        sizes = np.array([sum(dataset.dataset.lengths[i] for i in numbers) for numbers in dataset.bins])
    else:
        sizes = columns(dataset)[1]
    return Subset(dataset, np.argsort(-sizes, kind="stable")[:count].tolist())


@contextlib.contextmanager
def _undisturbed(trainer, folder: Path) -> Iterator[None]:
    """Gives the trainer arguments for a rehearsal, and takes back all that a train() changes outside of the weights."""
    kept = {name: value for name, value in vars(trainer).items() if name not in ("model", "model_wrapped")}
    args = copy.copy(trainer.args)
    changes = {
        "output_dir": str(folder),
        "max_steps": 2,
        "learning_rate": 0.0,
        "lr_scheduler_type": type(args.lr_scheduler_type)("constant"),
        "lr_scheduler_kwargs": None,
        "gradient_accumulation_steps": min(2, args.gradient_accumulation_steps),
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_total_limit": None,
        "save_only_model": False,
        "ignore_data_skip": False,
        "eval_on_start": False,
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "restore_callback_states_from_checkpoint": False,
    }
    for name, value in changes.items():
        setattr(args, name, value)
    for name in ("eval_strategy", "save_strategy"):  # the observer asks for the one save
        setattr(args, name, type(getattr(args, name))("no"))
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None) if trainer.is_fsdp_enabled else None
    state_dict_type = plugin.state_dict_type if plugin else None
    loaders = trainer.accelerator.gradient_state.dataloader_references
    references = list(loaders)
    numbers = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    trainer.args = args
    steps = args.gradient_accumulation_steps * changes["max_steps"]
    trainer.train_dataset = longest(trainer.train_dataset, args.train_batch_size * args.world_size * steps)
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])
        loaders[:] = references
        for name in set(vars(trainer)) - set(kept) - {"model", "model_wrapped"}:
            delattr(trainer, name)
        vars(trainer).update(kept)
        trainer.accelerator.free_memory()
        if plugin:
            if plugin.state_dict_type != state_dict_type:
                plugin.set_state_dict_type(state_dict_type.name)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu()


# ---------------------------------------------------------------------------------------------------------------------
# Files and ranks.


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.exists() else 0


def _remove(folder: Path) -> None:
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # one on each node, in case they do not share the file system
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bars, and its table of the layers that a model of one layer leaves out."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
