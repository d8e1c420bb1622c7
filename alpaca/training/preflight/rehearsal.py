"""Two short runs before the real one: a step, a save, another step; then load, resume and repeat that step.

Both are set up like the run itself, with its optimizer, schedule, learning rate, metric, types and mesh, and use the
longest examples, which need the most memory. The second begins with a freshly loaded model: whatever a checkpoint does
not restore shows in its weights, its loss or its second step. At its end the model is saved as the run will save it,
and read back. The run uses nothing from either, and loads the model again.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.data import Subset
from transformers import IntervalStrategy, TrainerCallback

from alpaca import RankError, UserError
from alpaca.common.memory import as_text
from alpaca.common.text import counted, first_line
from alpaca.inference.adapters import ADAPTER
from alpaca.inference.load import load_model
from alpaca.training.checkpoints import REHEARSAL
from alpaca.training.distributed import say
from alpaca.training.meter import peak_memory
from alpaca.training.preflight import memory
from alpaca.training.preflight.findings import Finding, finish, gather
from alpaca.training.sharding import tensors

CHUNK = 2**22  # elements hashed at a time: 64 MB of int64
CURE = "report it with this output; meanwhile use skip_save_rehearsal=True, and train in one go with save_strategy=no"


def planned_steps(args, rows: Sequence) -> tuple[int, int]:
    """Return (steps of the run, steps of an epoch), as the library will count them."""
    batches = math.ceil(len(rows) / (args.train_batch_size * args.world_size))
    an_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * an_epoch), an_epoch


def rehearsal(make: Callable, args, rows: Sequence, held_out: Sequence | None, save: Callable) -> None:
    """Rehearse a run (see ``rehearse`` for the arguments), and report how it went.

    Raises:
        UserError: the run would fail, or could not be resumed.
    """
    if args.deepspeed:
        what = "saving and resuming were not rehearsed: this is not supported with DeepSpeed"
        cure = "try a short run with max_steps=2 and save_steps=1, and resume it once"
        return finish([Finding("warning", what, "a failing save would show only late in the run", cure)])
    resume = "" if args.save_strategy == "no" else ", a save, a resume"
    say(f"rehearsal: two steps on the longest examples{resume} and the final save")
    try:
        finish(rehearse(make, args, rows, held_out, save))
    except torch.OutOfMemoryError as e:
        cure = memory.smaller_step(args)
        raise RankError(f"preflight: a step ran out of memory: use one of {cure}; nothing was trained") from e
    except (UserError, OSError):
        raise
    except Exception as e:  # a check must not end in a traceback, whatever a model's code does
        hint = "see the other ranks' messages, or skip it with skip_save_rehearsal=True"
        raise RankError(f"preflight: the rehearsal failed ({first_line(e)}): {hint}") from e


class _Observer(TrainerCallback):
    """End a run after step 2, save and evaluate after step 1 if asked to, and record the state after each step."""

    def __init__(self, saves: bool, evaluates: bool):
        self.saves, self.evaluates = saves, evaluates
        self.states: dict[int, tuple[dict, dict]] = {}  # fingerprints of weights and optimizer, by step
        self.seconds = 0.0  # of the last step

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step:  # resumed: as it was loaded
            self.states[state.global_step] = _weights(model), _states(optimizer)

    def on_step_begin(self, args, state, control, **kwargs):
        self.seconds = -time.perf_counter()

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter()
        say(f"rehearsal: step {state.global_step} took {self.seconds:.1f} s")
        self.states[state.global_step] = _weights(model), _states(optimizer)
        first = state.global_step == 1
        control.should_log, control.should_training_stop = True, not first
        control.should_save, control.should_evaluate = first and self.saves, first and self.evaluates


def rehearse(make: Callable, args, rows: Sequence, held_out: Sequence | None, save: Callable) -> list[Finding]:
    """Rehearse saving and resuming: three optimizer steps (of at most two accumulated batches each), and every save.

    Args:
        make: (arguments, rows, held-out rows) → a Trainer with a freshly loaded model, as the run will be made.
        args: of the run. Its output folder gets a folder ``.save-rehearsal``, which is removed at the end.
        rows: the run's training data; the rehearsal takes as few as its steps need, the longest.
        held_out: the run's evaluation data, or None.
        save: (trainer, folder) → None, writes the trained model as the run will at its end; every rank calls it.

    Returns:
        What is wrong, as errors; or one note with losses, sizes, step time and peak memory (on rank 0).
    """
    folder, short = Path(args.output_dir) / REHEARSAL, copy.copy(args)  # what shapes a step stays the same
    short.output_dir, short.max_steps = str(folder), max(2, planned_steps(args, rows)[0])  # max_steps: the schedule's
    short.gradient_accumulation_steps = min(2, args.gradient_accumulation_steps)
    short.report_to, short.disable_tqdm = [], True
    short.logging_nan_inf_filter = short.save_only_model = short.ignore_data_skip = False
    short.eval_on_start = short.load_best_model_at_end = False
    short.save_strategy = short.eval_strategy = IntervalStrategy.NO  # _Observer asks for what is rehearsed
    subset = longest(rows, 2 * short.gradient_accumulation_steps * args.train_batch_size * args.world_size)
    evaluated = longest(held_out, args.eval_batch_size * args.world_size) if held_out else None
    try:
        return _runs(lambda: make(short, subset, evaluated), save, folder, args.save_strategy != "no")
    finally:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # one on each node, in case they do not share the file system
            shutil.rmtree(folder, ignore_errors=True)


def _runs(new_trainer: Callable, save: Callable, folder: Path, saves: bool) -> list[Finding]:
    begin, checkpoint, whole = time.perf_counter(), folder / "checkpoint-1", folder / "whole"

    def run(resume: Path | None):
        """Return a trainer after step 2, its observer, and the losses of its steps."""
        trainer = new_trainer()
        observer = _Observer(saves, evaluates=trainer.eval_dataset is not None)
        trainer.remove_callback(trainer.meter)  # it would print lines
        trainer.add_callback(observer)
        trainer.train(resume)
        return trainer, observer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    trainer, first, losses = run(None)
    if not all(map(math.isfinite, losses)):
        what, why = f"the loss of the first steps is not finite: {losses}", "the trained weights would be NaN"
        cure = "check the base model (does chat.py answer?) and use bf16 or float32 instead of fp16"
        return [Finding("error", what, why, cure)]
    outcome = f"two steps and the final save succeeded: loss {losses[-1]:.4f}"
    if saves:
        say(f"rehearsal: the first run took {time.perf_counter() - begin:.0f} s; the second takes about as long")
        uninterrupted, trainer = losses[-1], _freed(trainer)
        trainer, second, losses = run(checkpoint)
        cpu = trainer.args.device.type == "cpu"
        if faults := gather(_compare(first.states, second.states, uninterrupted, losses[-1], deterministic=cpu)):
            return faults
        exact = first.states[2] == second.states[2]
        equal = "bit for bit" if exact else "up to rounding, as this device adds in any order"
        outcome = (
            f"saved, reloaded and resumed: weights and optimizer equal, the next step equal {equal} (loss "
            f"{losses[-1]:.4f}); checkpoint {as_text(folder_bytes(checkpoint))}"
        )
    whole.mkdir(parents=True, exist_ok=True)
    save(trainer, whole)
    expected = _weights(trainer.model, whole=True)  # a collective
    size, peak = folder_bytes(whole), peak_memory(trainer.args.device)
    trainer = _freed(trainer)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # the run measures its own
    faults = gather(_read_back(whole, expected))
    step = f"{first.seconds:.1f} s per step of the longest examples, peak memory {as_text(peak)}"
    seconds = time.perf_counter() - begin
    return faults or [Finding("note", f"{outcome}; model {as_text(size)}; {step}; {seconds:.0f} s in total")]


def _freed(trainer) -> None:
    """Free the memory of a trainer; the caller must drop its own reference."""
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = trainer.callback_handler = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _compare(first: dict, second: dict, loss: float, resumed_loss: float, deterministic: bool) -> list[Finding]:
    """Compare two runs: what was saved after step 1 and what was loaded, and what step 2 left (_Observer's states).

    What was loaded must be equal bit for bit on every device. The second step's weights may differ if kernels add in
    any order; then the loss shows whether data and random state were restored too.
    """
    what = []
    for kind, saved, loaded in zip(("weights", "optimizer's states"), first[1], second[1], strict=True):
        if names := _differences(saved, loaded):
            what.append(f"a checkpoint does not restore the {kind} ({names})")
    if not math.isclose(loss, resumed_loss, rel_tol=1e-4):
        what.append(f"the resumed step has loss {resumed_loss:.6f}, the uninterrupted one {loss:.6f}")
    elif deterministic and (names := _differences(first[2][0], second[2][0])):
        what.append(f"the resumed step gives other weights than the uninterrupted one ({names})")
    return [Finding("error", one, "a resumed run would not continue the interrupted one", CURE) for one in what]


def _read_back(folder: Path, expected: dict[str, int]) -> list[Finding]:
    """Read the final save on rank 0, as its users will, and compare it with what was trained."""
    if int(os.environ.get("RANK", 0)) != 0:
        return []
    try:
        found = _weights(load_model(folder, "auto"))
        if (adapter := folder / "adapter" / ADAPTER).exists():
            found = {name: fingerprint(tensor) for name, tensor in load_file(adapter).items()}
            expected = {name.replace(".default.", "."): value for name, value in expected.items()}
        if not (names := _differences(expected, {name: found.get(name) for name in expected})):
            return []
        what = f"the final save has other values than were trained ({names})"
    except UserError as e:
        what = f"the final save cannot be read: {e}"
    return [Finding("error", what, "the trained model would be lost at the end", CURE)]


def longest(dataset: Sequence, count: int) -> Subset:
    """Return the ``count`` items with the most tokens of a SupervisedDataset or PackedDataset, or all."""
    sizes = getattr(dataset, "dataset", dataset).lengths
    sizes = [sum(sizes[i] for i in numbers) for numbers in dataset.bins] if hasattr(dataset, "bins") else sizes
    return Subset(dataset, sorted(range(len(sizes)), key=lambda i: -sizes[i])[:count])


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# ---------------------------------------------------------------------------------------------------------------------
# Fingerprints: whether weights and optimizer states are equal bit for bit, without a copy of them.


def fingerprint(tensor: torch.Tensor) -> int:
    """Return a hash of a tensor's local bits: Σ bits·(position in its chunk), chunks joined by a factor, mod 2^64.

    Any single changed bit changes it (of elements of up to 4 bytes), and so does their order. torch.hash_tensor (2.13)
    is not enough: it is the XOR of all elements, so it is 0 for an even number of ones as for zeros, and equal for a
    transposed matrix. This one takes 64 MB; a copy of the weights would double their memory.
    """
    local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[local.element_size()]
    total = 0
    for chunk in local.contiguous().reshape(-1).view(integer).split(CHUNK):
        places = torch.arange(1, chunk.numel() + 1, device=chunk.device)
        total = (total * 1_000_003 + int((chunk.long() * places).sum())) % 2**64
    return total


def _weights(model, whole: bool = False) -> dict[str, int]:
    """Return the fingerprint of each trained tensor; ``whole``: gathered, one after the other, on every rank."""
    return {
        name: fingerprint(tensor.full_tensor() if whole and hasattr(tensor, "full_tensor") else tensor)
        for name, tensor in tensors(model).items()
        if tensor.requires_grad
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
    """Return how many values differ and the first one's name; empty if they are equal."""
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    return f"{counted(len(names), 'value')}: {names[0]}" + (", …" if len(names) > 1 else "") if names else ""
