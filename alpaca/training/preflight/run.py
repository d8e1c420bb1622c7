"""What must be true before training starts: all checks in order, one report, and a rehearsal of saving and resuming.

Checks are functions that return findings (findings.py); those of tokens are in examples_and_tokenizer.py. Errors stop
the run, warnings do not.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from alpaca import RankError, UserError
from alpaca.common import memory as host_memory
from alpaca.common.memory import as_text
from alpaca.common.text import counted, first_line
from alpaca.inference.adapters import embedding_rows
from alpaca.inference.checks import near_zero
from alpaca.training.distributed import read_config, say
from alpaca.training.examples import SupervisedDataset
from alpaca.training.preflight import memory
from alpaca.training.preflight.examples_and_tokenizer import check_examples, show_border, show_example
from alpaca.training.preflight.findings import Finding, colour_wanted, finish, gather, lowest, paint
from alpaca.training.preflight.memory import Plan, Sizes
from alpaca.training.preflight.packing import SelfCheck
from alpaca.training.preflight.rehearsal import Rehearsal, folder_bytes, rehearse


def check_difference(model) -> list[Finding]:
    """Check whether the weights look like the difference of two models: see inference.checks.near_zero."""
    if not (what := near_zero(model)):
        return []
    cure = "recover the model first, with weight_diff.py recover"
    return [Finding("error", what, "it looks like a weight diff, from which nothing can be learned", cure)]


def check_positions(model, longest: int) -> list[Finding]:
    """Check whether the longest example, in tokens, is within the positions that the model knows.

    Learned positions (OPT, GPT-2) are rows of an embedding: beyond the last one the lookup fails. Rotary ones are
    computed; beyond the known ones they are only unlike what the model has seen.
    """
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not known or longest <= known:
        return []
    rows = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)]
    what = f"the longest example has {longest} tokens, and the model has {known} positions"
    if any(re.search(r"pos[^.]*$|wpe$", name) for name in rows):
        why = "each is a row of an embedding: the lookup fails (on a GPU as a device-side assert that names no cause)"
        return [Finding("error", what, why, f"model_max_length={known}")]
    why = "it was not trained beyond them, and answers worse there"
    return [Finding("warning", what, why, f"model_max_length={known}")]


def check_repeats(rows: Sequence, args) -> list[Finding]:
    """Report how many examples an epoch repeats, so that each process gets whole batches.

    accelerate fills up the last ones with the epoch's first examples (data_loader.BatchSamplerShard, ``even_batches``).
    """
    config, (steps, an_epoch) = args.accelerator_config, planned_steps(args, rows)
    batch = args.train_batch_size * (1 if config.split_batches else args.world_size)
    again = -len(rows) % batch
    if args.world_size == 1 or args.dataloader_drop_last or not config.even_batches or steps < an_epoch or not again:
        return []
    noun = "bins" if hasattr(rows, "bins") else "examples"
    what = f"{again} of {len(rows)} {noun} are trained twice in each epoch"
    if again > len(rows):
        what = f"each epoch trains {len(rows) + again} {noun}: these {len(rows)}, several times each"
    why = f"{args.world_size} processes of {args.train_batch_size} each fill up the last batch with the first {noun}"
    return [Finding("note", f"{what}: {why}")]


def check_bf16(args) -> list[Finding]:
    """Suggest bf16 on a CPU that computes in it (python benchmarks/bench_train.py --contenders ours ours_bf16)."""
    can = getattr(torch.cpu, "get_capabilities", dict)()  # not in every release of torch
    if args.bf16 or args.fp16 or args.device.type != "cpu" or not (can.get("avx512_bf16") or can.get("amx_bf16")):
        return []
    return [Finding("note", "this CPU computes in bf16: bf16=True may train faster")]


def check_loading(sizes: Sizes, plan: Plan, device: torch.device) -> list[Finding]:
    """Check, before the model is loaded, whether machine and device hold it. Every rank must call it."""
    one = sizes.parameters * plan.dtype_bytes
    processes = 1 if plan.sharded else int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # FSDP: rank 0 alone loads it
    free = lowest(host_memory.host_free(swap=True))  # of all ranks before any of them loads
    if plan.four_bit or one * processes <= free:  # 4 bits are loaded a layer at a time
        return check_memory(sizes, plan, lowest(host_memory.available_bytes(device)))
    loaded = f"{processes} processes each load the whole model" if processes > 1 else "the model is loaded"
    left, fitting = as_text(max(0, free)), int(free // one)
    what = f"{loaded} into the machine's memory: {as_text(one * processes)}, but only {left} is free"
    fewer = f"torchrun --nproc_per_node={fitting}, or " if fitting > 0 else ""
    cure = f"{fewer}a machine (or a memory limit of the scheduler's job) with more memory"
    return [Finding("error", what, "the kernel kills a process that takes more, without a message", cure)]


def check_memory(sizes: Sizes, plan: Plan, available: int) -> list[Finding]:
    """Compare what weights, gradients and optimizer need on each device with the bytes that it has."""
    parts = memory.parts(sizes, plan)
    text = ", ".join(f"{name} {as_text(size)}" for name, size in parts.items())
    what = f"memory per device without activations: {text or 'none'}, of {as_text(available)}"
    if sum(parts.values()) <= available:
        return [Finding("note", what)]
    advice = memory.advise(sizes, plan, available)
    cure = f"one of: {'; '.join(advice)}" if advice else "a larger device or a smaller model: no argument is enough"
    return [Finding("error", what, "this is exact, and more than there is", cure)]


def check_stop(step: float, save: float) -> list[Finding]:
    """Check whether torchrun, when it stops, waits for a step and a save (seconds): by default it kills after 30 s."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not save:
        return []
    name = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # torch.distributed.launcher.api.LaunchConfig
    limit, needed = float(os.environ.get(name) or 30), 2 * (step + save)  # twice: disks are slower when busy
    if limit >= needed:
        return []
    what = f"a step and a save take {step + save:.0f} s; torchrun kills its processes {limit:.0f} s after a SIGTERM"
    why = "the checkpoint that a stopped run writes would be lost"
    return [Finding("warning", what, why, f"start with {name}={max(600, math.ceil(needed))} in the environment")]


# ---------------------------------------------------------------------------------------------------------------------
# All of it.


def preflight(model, tokenizer, rows: Sequence, args, findings: Sequence[Finding] = ()) -> None:
    """Make all checks of model and examples, and print the report and the first example on rank 0.

    Args:
        model: that will be trained.
        tokenizer: its own.
        rows: a SupervisedDataset, or a PackedDataset of one.
        args: train.py's TrainingArguments.
        findings: what was found before (check_tokenizer, check_loading, check_disk).

    Raises:
        UserError: there are errors, which the report lists.
    """
    dataset: SupervisedDataset = getattr(rows, "dataset", rows)
    found = [*findings, *check_difference(model), *check_repeats(rows, args), *check_bf16(args)]
    found += check_examples(dataset, tokenizer.eos_token_id, embedding_rows(model), tokenizer.model_max_length)
    found += check_positions(model, max(dataset.lengths))
    finish(gather(found))
    how = "dim: masked, green: learned" if colour_wanted() else "learned: what is between « and »"
    say(f"{paint('example ', '36')} the first one ({how}):\n{show_example(dataset[0], tokenizer)}")
    say(f"{paint('border  ', '36')} where its answer begins: {show_border(dataset[0], tokenizer)}")


def planned_steps(args, rows: Sequence) -> tuple[int, int]:
    """Return (steps of the run, steps of an epoch), as the library will count them."""
    batches = math.ceil(len(rows) / (args.train_batch_size * args.world_size))
    an_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * an_epoch), an_epoch


def disk(args, rows: Sequence, sizes: Sizes, plan: Plan) -> list[Finding]:
    """Check whether the disk holds what the run will write."""
    output_dir, (steps, an_epoch) = Path(args.output_dir), planned_steps(args, rows)
    every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * steps))
    checkpoints = math.ceil(steps / {"no": math.inf, "epoch": an_epoch}.get(args.save_strategy.value, every))
    if args.save_total_limit:
        checkpoints = min(checkpoints, args.save_total_limit + 1)  # with the one that is being written
    full = bool(args.fsdp) and "FULL" in str(read_config(args.fsdp_config).get("state_dict_type"))
    checkpoint, final = memory.checkpoint_bytes(sizes, plan, full)
    earlier = sum(folder_bytes(folder) for folder in output_dir.glob("checkpoint-*"))  # which will be deleted
    output_dir.mkdir(parents=True, exist_ok=True)
    return check_disk(output_dir, checkpoint, final, checkpoints, lowest(shutil.disk_usage(output_dir).free + earlier))


def check_disk(output_dir: Path, checkpoint: int, final: int, checkpoints: int, free: int) -> list[Finding]:
    """Check whether so many checkpoints at a time, and the model at the end, fit into ``free`` bytes."""
    needed = checkpoints * checkpoint + final
    what = (
        f"disk in {output_dir}: {counted(checkpoints, 'checkpoint')} of {as_text(checkpoint)} at a time, the model "
        f"{as_text(final)}; {as_text(needed)} of {as_text(free)} free"
    )
    if needed <= free:
        return [Finding("note", what)]
    fitting = int((free - final) // max(1, checkpoint)) - 1  # one more is being written
    fewer = f"save_total_limit={fitting}, " if fitting > 0 else ""
    cure = f"{fewer}a larger disk for output_dir, or save_strategy=no (then the run cannot be resumed)"
    return [Finding("error", what, "a save would fail in the middle of the run", cure)]


def rehearsal(
    make: Callable, args, rows: Sequence, held_out: Sequence | None, save: Callable, self_check: SelfCheck | None
) -> None:
    """Rehearse a run (see rehearsal.rehearse for the arguments), and report how it went.

    Args:
        self_check: compares packed examples with the same alone, as the first run begins. None: they are padded.

    Raises:
        UserError: the run would fail, or could not be resumed.
    """
    if args.deepspeed:
        what = "saving and resuming were not rehearsed: the three DeepSpeed engines that it takes were never tested"
        cure = "a short run with max_steps=2 and save_steps=1, resumed once, shows the same"
        return finish([Finding("warning", what, "a failing save would show late", cure)])
    say("rehearsal: two steps on the longest examples, a save, a resume and the final save; it loads the model twice")
    hint = "skip_save_rehearsal=True leaves the rehearsal out, if the run itself would work"
    try:
        result = rehearse(make, args, rows, held_out, save, planned_steps(args, rows)[0])
    except torch.OutOfMemoryError as e:
        cure = memory.smaller_step(args)
        raise RankError(f"preflight: a step ran out of memory: one of {cure}; nothing was trained") from e
    except (UserError, OSError):
        raise
    except Exception as e:  # a check must not end in a traceback, whatever a model's code does
        if re.search(r"connection (closed|reset)|remote process", str(e), re.IGNORECASE):
            hint = "another process of the run has ended: its own message says why"
        raise RankError(f"preflight: the rehearsal failed: {first_line(e)} ({hint})") from e
    batches = args.gradient_accumulation_steps / min(2, args.gradient_accumulation_steps)
    # of the slowest rank, so that each reports the same
    step, save_time = -lowest(-result.step_seconds * batches), -lowest(-result.save_seconds)
    found = _outcome(result) + check_stop(step, save_time)
    if self_check and not self_check.reason:
        what = f"packed examples equal the same alone, to {self_check.deviation:.1e} of their logits' deviation"
        found.append(Finding("note", what))
    finish(gather(found))


def _outcome(result: Rehearsal) -> list[Finding]:
    if result.faults or int(os.environ.get("RANK", 0)) != 0:  # the figures differ a little from rank to rank
        return result.faults
    model = f"model {as_text(result.final_bytes)}"
    what = f"two steps and the final save are as they should be: loss {result.loss:.4f}, {model}"
    if result.checkpoint_bytes:
        equal = "bit for bit" if result.exact else "to rounding, as this device adds in any order"
        what = (
            f"saved, reloaded and resumed: weights and optimizer equal, the next step equal {equal}, loss "
            f"{result.resumed_loss:.4f} as without; checkpoint {as_text(result.checkpoint_bytes)}, {model}"
        )
    step = f"{result.step_seconds:.1f} s a step of the longest examples, peak memory {as_text(result.peak_bytes)}"
    return [Finding("note", f"{what}; {step}; {result.seconds:.0f} s in all")]
