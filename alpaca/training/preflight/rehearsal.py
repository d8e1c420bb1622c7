"""Two short runs before the real one: a step, a save, another step; then load, resume and repeat that step.

Both are made as the run itself is made, with its optimizer, schedule, learning rate, metric, types and mesh, and of the
longest examples, which need the most memory. The second begins with a freshly loaded model: whatever a checkpoint does
not restore shows in its weights, its loss or its second step. At its end the model is saved as the run will save it,
and read back. Nothing of the two is used by the run, which loads the model again.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch.utils.data import Subset
from tqdm import tqdm
from transformers import IntervalStrategy, TrainerCallback
from transformers.utils import logging

from alpaca import UserError
from alpaca.inference.adapters import ADAPTER
from alpaca.inference.load import load_model
from alpaca.training.checkpoints import REHEARSAL
from alpaca.training.distributed import say
from alpaca.training.meter import peak_memory
from alpaca.training.preflight.findings import Finding, gather

CHUNK = 2**22  # elements hashed at a time: 64 MB of int64
CURE = "report it with this output; until then use skip_save_rehearsal=True, and train in one go with save_strategy=no"


@dataclass
class Rehearsal:
    """The outcome: ``faults`` are errors, the figures are for the report.

    Without a checkpoint ``resumed_loss`` is NaN and ``checkpoint_bytes`` 0.
    """

    faults: list[Finding] = field(default_factory=list)
    loss: float = math.nan  # of step 2, uninterrupted
    resumed_loss: float = math.nan  # of step 2, from the checkpoint
    exact: bool = True  # whether the repeated step gave the same weights and optimizer states bit for bit
    seconds: float = 0.0
    step_seconds: float = 0.0  # of step 2, of at most two accumulated batches
    save_seconds: float = 0.0  # of the checkpoint, and of an evaluation before it
    checkpoint_bytes: int = 0
    final_bytes: int = 0
    peak_bytes: int = 0  # of this rank


class _Observer(TrainerCallback):
    """End a run after step 2, save and evaluate after step 1 if asked to, and note what each step leaves."""

    def __init__(self, bar, saves: bool, evaluates: bool):
        self.bar, self.saves, self.evaluates = bar, saves, evaluates
        self.states: dict[int, tuple[dict, dict]] = {}  # fingerprints of weights and optimizer, by step
        self.step_seconds = self.save_seconds = self._since = 0.0

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step:  # resumed: as it was loaded
            self.states[state.global_step] = _weights(model), _states(optimizer)

    def on_step_begin(self, args, state, control, **kwargs):
        self._since = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.step_seconds = time.perf_counter() - self._since
        self.states[state.global_step] = _weights(model), _states(optimizer)
        first = state.global_step == 1
        control.should_log, control.should_training_stop = True, not first
        control.should_save, control.should_evaluate = first and self.saves, first and self.evaluates
        self._since = time.perf_counter()
        self.bar.update()

    def on_save(self, args, state, control, **kwargs):
        self.save_seconds = time.perf_counter() - self._since
        self.bar.update()


def rehearse(make: Callable, args, rows: Sequence, held_out: Sequence | None, save: Callable, steps: int) -> Rehearsal:
    """Rehearse saving and resuming: three optimizer steps (of at most two accumulated batches each), and every save.

    Args:
        make: (arguments, rows, held-out rows) → a Trainer with a freshly loaded model, as the run will be made.
        args: of the run. Its output folder gets a folder ``.save-rehearsal``, which is removed again.
        rows: what the run trains on; the rehearsal takes the fewest that make its steps, the longest.
        held_out: what it is evaluated on, or None.
        save: (trainer, folder) → None, writes the trained model as the run will at its end; every rank calls it.
        steps: that the run will take, which its schedule depends on.
    """
    begin, folder, saves = time.perf_counter(), Path(args.output_dir) / REHEARSAL, args.save_strategy != "no"
    short = copy.copy(args)  # all that shapes a step stays as it is
    short.output_dir, short.max_steps = str(folder), max(2, steps)
    short.gradient_accumulation_steps = min(2, args.gradient_accumulation_steps)
    short.report_to, short.disable_tqdm = [], True
    short.logging_nan_inf_filter = short.save_only_model = short.ignore_data_skip = False
    short.eval_on_start = short.load_best_model_at_end = False
    short.save_strategy = short.eval_strategy = IntervalStrategy.NO  # _Observer asks for what is rehearsed
    short.save_total_limit = None
    count = 2 * short.gradient_accumulation_steps * args.train_batch_size * args.world_size
    subset = longest(rows, count)
    evaluated = longest(held_out, args.eval_batch_size * args.world_size) if held_out else None
    hidden = True if args.disable_tqdm or int(os.environ.get("RANK", 0)) else None  # None: unless it is a terminal
    form = "{desc} {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} to go"
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # the library's notes and bars are of the rehearsal, not of the run
    logging.disable_progress_bar()
    _remove(folder)
    PartialState().wait_for_everyone()
    try:
        with tqdm(total=7 if saves else 4, desc="rehearsal", disable=hidden, bar_format=form) as bar:
            result = _runs(lambda: make(short, subset, evaluated), save, folder, saves, bool(evaluated), bar)
    finally:
        _remove(folder)
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    PartialState().wait_for_everyone()
    result.seconds = time.perf_counter() - begin
    return result


def _runs(new_trainer: Callable, save: Callable, folder: Path, saves: bool, evaluates: bool, bar) -> Rehearsal:
    result, checkpoint, whole, begin = Rehearsal(), folder / "checkpoint-1", folder / "whole", time.perf_counter()

    def run(resume: Path | None):
        """Return a trainer after step 2, its observer, and the losses of its steps."""
        trainer, observer = new_trainer(), _Observer(bar, saves and not resume, evaluates and not resume)
        bar.update()
        trainer.remove_callback(trainer.meter)  # which shows a run
        trainer.add_callback(observer)
        trainer.train(resume)
        return trainer, observer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    trainer, first, losses = run(None)
    result.loss, result.step_seconds, result.save_seconds = losses[-1], first.step_seconds, first.save_seconds
    if not all(map(math.isfinite, losses)):
        what, why = f"the loss of the first steps is not finite: {losses}", "training would end in a model of NaN"
        cure = "check the base model (does chat.py answer?) and use bf16 or float32 instead of fp16"
        result.faults.append(Finding("error", what, why, cure))
    result.faults = gather(result.faults)  # a rank that stopped alone would leave the others waiting
    if saves and not result.faults:
        if bar.disable:
            say(f"rehearsal: the first run took {time.perf_counter() - begin:.0f} s; the second takes about as long")
        result.peak_bytes = peak_memory(trainer.args.device)
        trainer = _freed(trainer)
        trainer, second, losses = run(checkpoint)
        result.resumed_loss, result.exact = losses[-1], first.states[2] == second.states[2]
        result.faults = gather(_compare(first.states, second.states, result, trainer.args.device.type == "cpu"))
    result.checkpoint_bytes = folder_bytes(checkpoint)
    PartialState().wait_for_everyone()
    _remove(checkpoint)  # so that the rehearsal never needs more disk than a checkpoint or a whole model
    expected, adapter = {}, hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")
    if not result.faults:
        whole.mkdir(parents=True, exist_ok=True)
        save(trainer, whole)
        expected = _weights(trainer.model, whole=True)  # a collective
        result.final_bytes = folder_bytes(whole)
    result.peak_bytes = max(result.peak_bytes, peak_memory(trainer.args.device))
    trainer = _freed(trainer)
    if expected:
        result.faults = gather(_read_back(whole, adapter, expected))
        bar.update()
    return result


def _freed(trainer) -> None:
    """Free the memory of a trainer; the caller must drop its own reference."""
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = trainer.callback_handler = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _compare(first: dict, second: dict, result: Rehearsal, deterministic: bool) -> list[Finding]:
    """Compare what two runs left after step 1 (the second: what it loaded) and after step 2, as _Observer's states.

    What was loaded must be equal bit for bit on every device. The second step's weights are not where kernels add in
    any order; there the loss shows whether data and random state came back as well.
    """
    what = []
    for kind, saved, loaded in zip(("weights", "optimizer's states"), first[1], second.get(1, ({}, {})), strict=True):
        if names := _differences(saved, loaded):
            what.append(f"the {kind} do not come back from a checkpoint as they were saved ({names})")
    if not math.isclose(result.loss, result.resumed_loss, rel_tol=1e-4):
        what.append(f"the resumed step has loss {result.resumed_loss:.6f}, the uninterrupted one {result.loss:.6f}")
    elif deterministic and (names := _differences(first[2][0], second[2][0])):
        what.append(f"the resumed step gives other weights than the uninterrupted one ({names})")
    return [Finding("error", one, "a resumed run would not continue the interrupted one", CURE) for one in what]


def _read_back(folder: Path, adapter: bool, expected: dict[str, int]) -> list[Finding]:
    """Read the final save on rank 0, as its users will, and compare all that was trained with what was saved."""
    if int(os.environ.get("RANK", 0)) != 0:
        return []
    try:
        found = _weights(load_model(folder, "auto"))
        if adapter:
            found = {name: fingerprint(tensor) for name, tensor in load_file(folder / "adapter" / ADAPTER).items()}
            expected = {name.replace(".default.", "."): value for name, value in expected.items()}
        if not (names := _differences(expected, {name: found.get(name) for name in expected})):
            return []
        what = f"the final save, read back, holds other values than were trained ({names})"
    except UserError as e:
        what = f"the final save cannot be read: {e}"
    return [Finding("error", what, "the trained model would be lost at the end", CURE)]


def longest(dataset: Sequence, count: int) -> Subset:
    """Return the ``count`` items that have the most tokens of a SupervisedDataset or its PackedDataset, or all."""
    sizes = getattr(dataset, "dataset", dataset).lengths
    sizes = [sum(sizes[i] for i in numbers) for numbers in dataset.bins] if hasattr(dataset, "bins") else sizes
    return Subset(dataset, sorted(range(len(sizes)), key=lambda i: -sizes[i])[:count])


# ---------------------------------------------------------------------------------------------------------------------
# Fingerprints: whether weights and optimizer states came back bit for bit, without a copy of them.


def fingerprint(tensor: torch.Tensor) -> int:
    """Return a hash of a tensor's local bits: Σ bits·(position in its chunk), chunks joined by a factor, mod 2^64.

    Any single changed bit changes it (of elements of up to 4 bytes), and so does their order. torch.hash_tensor (2.13)
    is not enough: it is the XOR of all elements, so it is 0 for an even number of ones as well as of zeros, and equal
    for a transposed matrix. This one takes 64 MB, where a copy of the weights would take as much as they do.
    """
    local = _local(tensor)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[local.element_size()]
    total = 0
    for chunk in local.contiguous().reshape(-1).view(integer).split(CHUNK):
        places = torch.arange(1, chunk.numel() + 1, device=chunk.device)
        total = (total * 1_000_003 + int((chunk.long() * places).sum())) % 2**64
    return total


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def _weights(model, whole: bool = False) -> dict[str, int]:
    """Return the fingerprint of each trained tensor; ``whole``: gathered, one after the other, on every rank."""
    return {
        _plain_name(name): fingerprint(p.full_tensor() if whole and hasattr(p, "full_tensor") else p)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def _states(optimizer) -> dict[str, int | float | tuple]:
    """Return the fingerprints of an optimizer's tensors, and its numbers: learning rate, betas, …"""
    found = {}
    for g, group in enumerate(optimizer.param_groups):
        found |= {f"group {g} {key}": value for key, value in group.items() if isinstance(value, (int, float, tuple))}
        for n, parameter in enumerate(group["params"]):
            state = {key: value for key, value in optimizer.state.get(parameter, {}).items() if torch.is_tensor(value)}
            found |= {f"group {g} tensor {n} {key}": fingerprint(value) for key, value in state.items()}
    return found


def _differences(a: dict, b: dict) -> str:
    """Return how many values differ and the first one's name; empty if none does."""
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    return f"{len(names)} values: {names[0]}" + (", …" if len(names) > 1 else "") if names else ""


def _plain_name(name: str) -> str:
    """Return a parameter's name without what DDP, torch.compile and activation checkpointing put into it."""
    return name.removeprefix("module.").replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.exists() else 0


def _remove(folder: Path) -> None:
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # one on each node, in case they do not share the file system
        shutil.rmtree(folder, ignore_errors=True)
