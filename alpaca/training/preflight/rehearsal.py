"""Save → reload → one resumed step, and the final save, with the real Trainer, before step 1.

Two optimizer steps are taken at learning rate 0, with a checkpoint between them by the Trainer's own code. Then the
weights are set to zero, the optimizer is discarded, and the second step is repeated from the checkpoint. The weights
and the optimizer's states must come back bit for bit, and the repeated step must have the same loss: that holds only
if weights, random state and position in the data were restored. If the run saves no checkpoints, the two steps and the
final save are rehearsed.

At learning rate 0 no copy of the weights is needed to leave them as they were: the steps do not move them, and the
reload must restore them exactly. Fingerprints verify both, so a rehearsal that returns without faults has left the
model as it found it; after one with faults the run must end.
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
from alpaca.training.preflight.findings import Finding, gather
from alpaca.weights.checkpoint import CheckpointReader

CHUNK = 2**22  # elements hashed at a time: 64 MB of int64
REPORT = "report it with this output; until then use skip_save_rehearsal=True"


@dataclasses.dataclass
class Rehearsal:
    """The outcome: ``faults`` are errors, the figures are for the report.

    Without a checkpoint ``resumed_loss`` is NaN and ``checkpoint_bytes`` 0.
    """

    faults: list[Finding] = dataclasses.field(default_factory=list)
    loss: float = math.nan  # of step 2, uninterrupted
    resumed_loss: float = math.nan  # of step 2, from the checkpoint
    seconds: float = 0.0
    step_seconds: float = 0.0  # of step 2, of at most two accumulated batches
    save_seconds: float = 0.0  # of the checkpoint
    checkpoint_bytes: int = 0
    final_bytes: int = 0
    peak_bytes: int = 0  # on this rank's CUDA device; 0 without one

    def fault(self, what: str, why: str, cure: str = REPORT) -> None:
        self.faults.append(Finding("error", what, why, cure))


class _Observer(TrainerCallback):
    """Take fingerprints before step 1 and after each step, ask for the save, and note each step's loss."""

    def __init__(self, trainer, before: Callable[[], None] | None):
        self.trainer, self.before, self.losses = trainer, before, {}
        self.at_start: tuple[dict, dict] = ({}, {})
        self.after_step: dict[int, tuple[dict, dict]] = {}
        self.save_at = 0
        self.step_seconds = self.save_seconds = self._since = 0.0

    def _fingerprints(self) -> tuple[dict, dict]:
        return _weights(self.trainer.model), _states(self.trainer.optimizer)

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

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.losses[state.global_step] = logs["loss"]


def rehearse(trainer, output_dir: str | os.PathLike, at_start: Callable[[], None] | None = None) -> Rehearsal:
    """Rehearse saving and resuming; the trainer is left as it was, except that its model is on its device and mesh.

    It takes three optimizer steps (of at most two accumulated batches), and writes and reloads a checkpoint and then a
    whole model. The steps are on the longest examples, to show the most memory that a step needs; from the second one
    on that includes the optimizer's states.

    Args:
        trainer: a ResumableTrainer before its train(). Of an adapter only the library's save is rehearsed: merged into
            its base it would still equal the base, which lora.save refuses.
        output_dir: where the run will write; the rehearsal makes and removes a folder ``.save-rehearsal`` in it.
        at_start: called on every rank before step 1, with the model on its device and mesh.

    Returns:
        A Rehearsal; if it has ``faults`` the weights may be lost, and the run must end.
    """
    begin = time.perf_counter()
    folder = Path(output_dir) / REHEARSAL
    checkpoint, result = folder / "checkpoint-1", Rehearsal()
    saves = trainer.args.save_strategy != "no"
    _remove(folder)
    barrier()
    try:
        with _undisturbed(trainer, folder), _quiet():
            observer = _first_steps(trainer, result, at_start, saves)
            if saves and not result.faults:
                _resume(trainer, checkpoint, observer, result)
            result.checkpoint_bytes = folder_bytes(checkpoint)
            barrier()
            _remove(checkpoint)  # so that the rehearsal never needs more disk than a checkpoint or a whole model
            if not result.faults:
                _save_whole(trainer, folder / "whole", result)
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


def _first_steps(trainer, result: Rehearsal, at_start: Callable[[], None] | None, saves: bool) -> _Observer:
    """Take two steps, with a checkpoint after the first if the run saves any."""
    observer, handler = _Observer(trainer, at_start), trainer.callback_handler
    callbacks = [DefaultFlowCallback, observer]
    trainer.callback_handler = CallbackHandler(callbacks, handler.model, handler.processing_class, None, None)
    observer.save_at = 1 if saves else 0
    set_seed(trainer.args.seed)  # as in a new process
    trainer.train()
    if trainer.is_fsdp_enabled:
        # The layers are wrapped for recomputing by now, if they are to be. accelerate would wrap them again each time
        # it prepares the model, and not find them under their new names.
        trainer.accelerator.state.fsdp_plugin.activation_checkpointing = False
    result.loss = observer.losses[2]
    result.step_seconds, result.save_seconds = observer.step_seconds, observer.save_seconds
    if not all(math.isfinite(loss) for loss in observer.losses.values()):
        result.fault(
            f"the loss of the first steps is not finite: {list(observer.losses.values())}",
            "training would continue with it and end in a model of NaN",
            "check the base model (does chat.py answer?) and use bf16 or float32 instead of fp16",
        )
    if names := _differences(observer.at_start[0], observer.after_step[1 if saves else 2][0]):
        result.fault(
            f"optim={trainer.args.optim} moves weights at learning rate 0 ({names})",
            "saving and resuming cannot be rehearsed without changing the model",
            "skip_save_rehearsal=True, or optim=adamw_torch",
        )
    result.faults = gather(result.faults)  # a rank that stopped alone would leave the others waiting
    return observer


def _resume(trainer, checkpoint: Path, observer: _Observer, result: Rehearsal) -> None:
    """Discard weights and optimizer, repeat step 2 from the checkpoint, and compare."""
    weights, states = observer.at_start[0], observer.after_step[1][1]
    trainer.optimizer = trainer.lr_scheduler = None
    with torch.no_grad():  # so that whatever the reload does not restore shows
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    observer.save_at, observer.losses = 0, {}
    set_seed(trainer.args.seed)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    result.resumed_loss = observer.losses.get(2, math.nan)
    cure = f"{REPORT}, and train in one go with save_strategy=no"
    parts = ("the weights", "the optimizer's states")
    for what, saved, loaded in zip(parts, (weights, states), observer.at_start, strict=True):
        if names := _differences(saved, loaded):
            what = f"{what} do not come back from a checkpoint as they were saved ({names})"
            result.fault(what, "an interrupted run could not be resumed", cure)
    if not math.isclose(result.loss, result.resumed_loss, rel_tol=1e-4):
        what = f"the resumed step has loss {result.resumed_loss:.6f}, the uninterrupted one {result.loss:.6f}"
        why = "a resumed run would not continue the interrupted one: other data, random state or weights"
        result.fault(what, why, cure)
    if not result.faults and (names := _differences(weights, observer.after_step[2][0])):
        result.fault(f"the rehearsal changed the weights ({names})", "another model would be trained", cure)
    result.faults = gather(result.faults)


def _save_whole(trainer, folder: Path, result: Rehearsal) -> None:
    """Save as at the end of training and read it back: every name and shape, some tensors through from_pretrained."""
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True)
    barrier()
    model = trainer.accelerator.unwrap_model(trainer.model)
    trained = {_plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    adapter, gathered = hasattr(model, "peft_config"), {}
    if adapter:
        with trainer.state_dict_type("FULL_STATE_DICT"):
            trainer.save_model(str(folder))
    else:
        trainer.save_whole_model(folder)
        gathered = {name: _whole(trained[name]) for name in _some(trained)}  # a collective
    barrier()
    result.final_bytes = folder_bytes(folder)
    if not trainer.is_world_process_zero():
        return
    try:
        what = _wrong_adapter(folder, trained) if adapter else _wrong_model(folder, model, gathered)
    except UserError as e:
        what = f"the final save cannot be read: {e}"
    if what:
        result.fault(what, "the trained model would be lost at the end", f"{REPORT}: the checkpoints are whole")


def _wrong_adapter(folder: Path, trained: dict) -> str | None:
    if not (folder / ADAPTER).exists():
        return "the final save wrote no adapter"
    with safe_open(folder / ADAPTER, framework="pt") as file:
        count = sum(".lora_" in name for name in file.keys())  # peft may add embeddings that are not trained
    return f"the saved adapter has {count} tensors, the model trains {len(trained)}" if count != len(trained) else None


def _wrong_model(folder: Path, model, gathered: dict[str, torch.Tensor]) -> str | None:
    saved = CheckpointReader(folder).specs()
    tied = set(model.all_tied_weights_keys or ())
    # Under other names than in memory: a mixture's experts are one tensor there, and one each in the file.
    expected = {name: tuple(tensor.shape) for name, tensor in saved_names(model).items() if name not in tied}
    if wrong := sorted(name for name in expected if name not in saved or saved[name][1] != expected[name]):
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
    """Return a few names that a model of one layer has: the first and last outside the layers, and of layer 0."""
    layer = {name: next((part for part in name.split(".") if part.isdigit()), "") for name in parameters}
    inside = [name for name in parameters if layer[name] == "0"]
    outside = [name for name in parameters if not layer[name]]
    return list(dict.fromkeys(outside[:1] + outside[-1:] + inside[:1] + inside[-1:]))


def longest(dataset: Sequence, count: int) -> Subset:
    """Return the items of a dataset that have the most tokens; all of them if there are fewer than ``count``.

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
    """Give the trainer arguments for a rehearsal, and undo all that train() changes, except to the weights."""
    kept = {name: value for name, value in vars(trainer).items() if name not in ("model", "model_wrapped")}
    args = trainer.args = copy.copy(trainer.args)
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
        "eval_strategy": type(args.eval_strategy)("no"),
        "save_strategy": type(args.save_strategy)("no"),  # the observer asks for the one save
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "restore_callback_states_from_checkpoint": False,
    }
    vars(args).update(changes)
    loaders = trainer.accelerator.gradient_state.dataloader_references
    references = list(loaders)
    numbers = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
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


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu()


# ---------------------------------------------------------------------------------------------------------------------
# Fingerprints: whether weights and optimizer states came back bit for bit, without a copy of them.


def fingerprint(tensor: torch.Tensor) -> int:
    """Return a hash of a tensor's local bits: Σ bits·(position in its chunk), chunks joined by a factor, mod 2^64.

    Any single changed bit changes it. It takes 64 MB, where a copy of the weights would take as much as they do.
    """
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[local.element_size()]
    bits = local.detach().contiguous().reshape(-1).view(integer)
    places = torch.arange(1, min(CHUNK, max(1, bits.numel())) + 1, device=bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for chunk in bits.split(CHUNK) if bits.numel() else ():
        total = total * 1_000_003 + (chunk.long() * places[: chunk.numel()]).sum()
    return int(total)


def _weights(model) -> dict[str, int]:
    return {_plain_name(name): fingerprint(p) for name, p in model.named_parameters() if p.requires_grad}


def _states(optimizer) -> dict[str, int]:
    states = (optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"])
    tensors = [(key, value) for state in states for key, value in sorted(state.items()) if torch.is_tensor(value)]
    return {f"{i} {key}": fingerprint(value) for i, (key, value) in enumerate(tensors)}


def _differences(a: dict, b: dict) -> str:
    """Return how many values differ and the first one's name; empty if none does."""
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    return f"{len(names)} tensors: {names[0]}" + (", …" if len(names) > 1 else "") if names else ""


def _plain_name(name: str) -> str:
    """Return a parameter's name without what DDP, torch.compile and activation checkpointing put into it."""
    return name.removeprefix("module.").replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.exists() else 0


def _remove(folder: Path) -> None:
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # one on each node, in case they do not share the file system
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the library's progress bars, and its table of the layers that a model of one layer leaves out."""
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
