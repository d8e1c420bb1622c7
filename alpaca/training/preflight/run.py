"""What must be true before training starts: all checks in order, one report, and a rehearsal of saving and resuming.

The checks are functions that return findings (findings.py); those of tokens are in examples_and_tokenizer.py. Errors
stop the run, warnings do not.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from alpaca import RankError
from alpaca.common import memory as host_memory
from alpaca.common.memory import as_text
from alpaca.inference.checks import near_zero
from alpaca.training import distributed
from alpaca.training.checkpoints import is_failed_write
from alpaca.training.distributed import say
from alpaca.training.examples import IGNORE_INDEX, columns
from alpaca.training.preflight import memory
from alpaca.training.preflight.examples_and_tokenizer import check_examples, show_example
from alpaca.training.preflight.findings import Finding, colour_wanted, finish, gather, lowest, paint, raise_errors
from alpaca.training.preflight.memory import Plan, Shape
from alpaca.training.preflight.packing import SelfCheck
from alpaca.training.preflight.rehearsal import Rehearsal, folder_bytes, rehearse
from alpaca.training.trainer import remove_leftovers


def check_precision(bf16: bool) -> list[Finding]:
    """bf16 on a GPU that only emulates it: torch says yes there, and runs many times slower."""
    if not bf16 or not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False):
        return []
    return [
        Finding(
            "error",
            f"--bf16: {torch.cuda.get_device_name()} has no bf16",
            "it is emulated, many times slower than float32",
            "--fp16 True, or neither",
        )
    ]


def check_difference(model) -> list[Finding]:
    """Whether the weights look like the difference of two models: see check_model.near_zero."""
    if not (what := near_zero(model)):
        return []
    cure = "recover the model first (python weight_diff.py recover --help)"
    return [Finding("error", what, "it looks like a weight diff, from which nothing can be learnt", cure)]


def check_positions(model, longest: int) -> list[Finding]:
    """Whether the longest example, in tokens, is within the positions that the model knows.

    Learnt positions (OPT, GPT-2) are rows of an embedding: beyond the last one the lookup fails. Rotary ones are
    computed, and only unlike what the model has seen.
    """
    known = getattr(model.config, "max_position_embeddings", None)
    if not known or longest <= known:
        return []
    words = model.get_input_embeddings()
    learnt = any(
        isinstance(module, torch.nn.Embedding) and module is not words and re.search(r"pos|wpe$", name)
        for name, module in model.named_modules()
    )
    what = f"the longest example has {longest} tokens, and the model has {known} positions"
    cure = f"--model_max_length {known}"
    if learnt:
        why = "each is a row of an embedding: the lookup fails (on a GPU as a device-side assert without a cause)"
        return [Finding("error", what, why, cure)]
    return [Finding("warning", what, "it was not trained beyond them, and answers worse there", cure)]


def check_loading(folder: Path, dtype: torch.dtype) -> list[Finding]:
    """Whether the whole model fits into the machine's memory once for each process on it. Every rank calls it.

    Args:
        folder: of the checkpoint.
        dtype: that it is loaded as.
    """
    one, processes = memory.weights_bytes(folder, dtype), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = lowest(host_memory.host_free(swap=True))  # of all ranks before any of them loads
    if one * processes <= free:
        return []
    of = f"{processes} processes each load the whole model" if processes > 1 else "the model is loaded"
    fitting = int(free // one)
    fewer = f"torchrun --nproc_per_node={fitting}, or " if fitting else ""
    return [
        Finding(
            "error",
            f"{of} into the machine's memory: {as_text(one * processes)}, of which {as_text(max(0, free))} is free",
            "the kernel kills a process that takes more, without a word",
            f"{fewer}a machine (or of its scheduler's job, as by Slurm's --mem) with more memory",
        )
    ]


def check_trainer(trainer) -> list[Finding]:
    """What was asked for is what the library does: FSDP enabled, full fine-tuning in float32."""
    found = []
    if trainer.args.fsdp and not trainer.is_fsdp_enabled:
        found.append(
            Finding(
                "error",
                "--fsdp was asked for, but the library did not enable it",
                "each process would hold the whole model",
                "start with torchrun --nproc_per_node=N (N > 1), or drop --fsdp",
            )
        )
    found += check_optimizer(_optim(trainer.args), trainer.is_fsdp_enabled)
    named = list(trainer.model.named_parameters())
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    if not trained:
        why, cure = "nothing would be learnt", "look at --lora_r and what freezes the model"
        return [*found, Finding("error", "no parameter is trained", why, cure)]
    low = [f"{name} ({str(parameter.dtype)[6:]})" for name, parameter in trained if parameter.dtype != torch.float32]
    if low and not trainer.is_deepspeed_enabled:  # under --bf16 its optimizer holds the float32 weights
        more = f" and {len(low) - 3} more" if len(low) > 3 else ""
        found.append(
            Finding(
                "error",
                f"{len(low)} trained parameters are not float32: {', '.join(low[:3])}{more}",
                "at a learning rate of 2e-5 most updates are lost in 8 bits of mantissa: 3% of the weights move",
                "load the model with dtype=torch.float32; --bf16 computes in bf16 over float32 weights",
            )
        )
    return found


def check_optimizer(optim: str, sharded: bool) -> list[Finding]:
    """An optimizer of bitsandbytes needs that package, and works on whole parameters alone: not under FSDP."""
    if not any(word in optim for word in ("8bit", "bnb", "paged")) or "torch" in optim:  # adamw_torch_8bit is torchao's
        return []
    found = []
    if importlib.util.find_spec("bitsandbytes") is None:
        found.append(("needs bitsandbytes, which is not installed", "pip install 'alpaca-reproduced[qlora]'"))
    if sharded:
        what = "is of bitsandbytes, which cannot step over parameters that FSDP has sharded"
        found.append((what, "drop --optim: AdamW, whose states FSDP shards"))
    return [Finding("error", f"--optim {optim} {what}", "the first step would fail", cure) for what, cure in found]


def check_memory(shape: Shape, plan: Plan, available: int, flags: list[str]) -> list[Finding]:
    """Compares the estimate with what the device has; any one of ``flags`` (memory.advise's sets) would be enough."""
    if not shape.known:
        return [Finding("note", "memory was not estimated: the model has no attention heads, as a transformer has")]
    parts = memory.estimate(shape, plan)
    text = ", ".join(f"{name} {as_text(size)}" for name, size in parts.items() if name != "total" and size)
    what = f"memory a device: {text}; peak {as_text(parts['total'])} of {as_text(available)}"
    if parts["total"] <= available:
        return [Finding("note", what)]
    cure = "one of: " + "; ".join(flags) if flags else "a larger device, or a smaller model: no set of flags is enough"
    if memory.certain_bytes(parts, plan) > available:
        why = "parameters, gradients and optimizer states alone (no estimate) are more than there is"
        return [Finding("error", what, why, cure)]
    return [Finding("warning", what, "by the estimate (good to a factor of 1.5) it runs out of memory", cure)]


def check_disk(output_dir: Path, checkpoint: int, final: int, checkpoints: int, free: int) -> list[Finding]:
    """Whether what the run will write fits beside what is there.

    Args:
        output_dir: for the message.
        checkpoint: bytes of one.
        final: bytes of the model at the end.
        checkpoints: how many are on the disk at once, the one being written included.
        free: bytes, those of checkpoints of an earlier run that will be deleted included.
    """
    needed = checkpoints * checkpoint + final
    what = (
        f"disk in {output_dir}: {checkpoints} checkpoints of {as_text(checkpoint)} at a time, the model "
        f"{as_text(final)}; {as_text(needed)} of {as_text(free)} free"
    )
    if needed <= free:
        return [Finding("note", what)]
    fitting = int((free - final) // max(1, checkpoint))
    cure = "free some, or choose an --output_dir on a larger disk"
    if fitting >= 2:  # the limit counts those that stay; one more is being written
        cure = f"--save_total_limit {fitting - 1}, or {cure}"
    elif final <= free:
        cure = f"--save_strategy no (no way to resume), or {cure}"
    return [Finding("error", what, "a save would fail in the middle of the run", cure)]


def check_stop(step: float, save: float) -> list[Finding]:
    """Whether torchrun, asked to stop, lets a step and a save (seconds) end: after 30 s it kills its processes."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not save:
        return []
    name = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # torch.distributed.launcher.api.LaunchConfig
    limit, needed = float(os.environ.get(name) or 30), 2 * (step + save)  # twice: disks are slower when busy
    if limit >= needed:
        return []
    what = f"a step and a save take {step + save:.0f} s; torchrun kills its processes {limit:.0f} s after a SIGTERM"
    why = "the checkpoint that a stopped run writes would be lost"
    return [Finding("warning", what, why, f"start with {name}={max(600, math.ceil(needed))} in the environment")]


def check_packing(self_check: SelfCheck) -> list[Finding]:
    """What preflight/packing.py has measured: a warning where packed examples differ from the same alone."""
    if self_check.reason:
        what = f"examples are padded, as with --padding longest: {self_check.reason}"
        why = "in one row they would disturb each other, and the model would learn that"
        return [Finding("warning", what, why, "nothing to do; --padding longest says the same without this warning")]
    what = f"packed examples equal the same alone, to {self_check.deviation:.1e} of their logits' deviation"
    return [Finding("note", what)]


# ---------------------------------------------------------------------------------------------------------------------
# All of it.


def preflight(
    trainer,
    earlier: Sequence[Finding] = (),
    self_check: SelfCheck | None = None,
    save_whole_model: Callable[[Path], None] | None = None,
    with_rehearsal: bool = True,
) -> list[Finding]:
    """Runs all checks in order, prints the report on rank 0, and rehearses a save and a resumed step.

    Args:
        trainer: before its ``train()``; its processing_class is the tokenizer, its train_dataset a sequence of
            {"input_ids", "labels"}, or of lists of them with that sequence as ``dataset``. The sequence may have
            ``numbers`` and ``left_out``, as for check_examples (record_numbers, left_out).
        earlier: what was found before there was a trainer (check_precision, mend_merges, check_tokenizer).
        self_check: of packed examples against the same alone; called as the rehearsal begins. None: they are padded.
        save_whole_model: the last save, as for rehearse.
        with_rehearsal: whether to do the rehearsal.

    Returns:
        All findings, none of them an error.

    Raises:
        UserError: there are errors; they stand in the report.
    """
    args, tokenizer, device = trainer.args, trainer.processing_class, trainer.accelerator.device
    rows = distributed.rows(trainer.model.get_input_embeddings().weight)
    examples = getattr(trainer.train_dataset, "dataset", trainer.train_dataset)
    found = list(earlier) + check_difference(trainer.model) + check_trainer(trainer)
    numbers, left_out = getattr(examples, "numbers", None), getattr(examples, "left_out", ())
    found += check_examples(examples, tokenizer.eos_token_id, rows, tokenizer.model_max_length, numbers, left_out)
    found += check_positions(trainer.model, int(columns(examples)[1].max(initial=0)))
    raise_errors(gather(found))
    shape, plan = Shape.of(trainer.model), _plan(trainer, examples)
    available = lowest(host_memory.available_bytes(device))
    newer = "activation_checkpointing"  # what newer libraries call it
    flags = memory.advise(shape, plan, available, newer if hasattr(args, newer) else "gradient_checkpointing")
    found = gather(found + check_memory(shape, plan, available, flags) + _disk(trainer, shape, plan))
    finish(found)
    _show(examples[0], tokenizer)
    if not with_rehearsal:
        return found

    later: list[Finding] = []

    def check_attention() -> None:
        self_check(trainer.model, args)
        later.extend(check_packing(self_check))

    if trainer.is_deepspeed_enabled:
        what = "saving and resuming were not rehearsed: an engine of DeepSpeed cannot be taken back to before its step"
        cure = "a short run with --max_steps 2 --save_steps 1, resumed once, shows the same"
        later.append(Finding("warning", what, "a failing save shows itself late", cure))
    else:
        try:
            result = rehearse(trainer, args.output_dir, save_whole_model, check_attention if self_check else None)
        except torch.OutOfMemoryError as e:
            cure = "; ".join(flags) or "a smaller --per_device_train_batch_size or --model_max_length"
            raise RankError(f"preflight: the first step ran out of memory: one of {cure}; nothing was trained") from e
        except RuntimeError as e:
            first = (str(e).strip() or type(e).__name__).splitlines()[0]
            hint = "--skip_save_rehearsal goes on without"
            if is_failed_write(e, traceback.extract_tb(e.__traceback__)):
                hint = f"is the disk full? {hint}"
            elif re.search(r"connection (closed|reset)|remote process", str(e), re.IGNORECASE):
                hint = "another process of the run has ended: its own message says why"
            raise RankError(f"preflight: saving and resuming failed: {first} ({hint})") from e
        batches = args.gradient_accumulation_steps / min(2, args.gradient_accumulation_steps)
        # of the slowest rank, so that each says the same
        step, save = -lowest(-result.step_seconds * batches), -lowest(-result.save_seconds)
        later += _told(result) + check_stop(step, save)
    later = gather(later)
    finish(later)
    return found + later


def _optim(args) -> str:
    return str(getattr(args.optim, "value", args.optim))


def _plan(trainer, examples: Sequence[dict]) -> Plan:
    args = trainer.args
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    zero3 = trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    _, lengths, labels, _ = columns(examples)
    bins = getattr(trainer.train_dataset, "bins", None)  # of --packing: each is filled up
    logit_tokens = None
    if getattr(trainer.data_collator, "padding_free", False):  # logits are computed where there is a label
        supervised = np.add.reduceat(labels != IGNORE_INDEX, np.cumsum(lengths) - lengths)
        logit_tokens = int(max(supervised[numbers].sum() for numbers in bins) if bins else supervised.max())
    optim = _optim(args)
    master = 4 if trainer.is_deepspeed_enabled and (args.bf16 or args.fp16) else 0  # its float32 weights
    return Plan(
        batch=args.per_device_train_batch_size,
        length=trainer.processing_class.model_max_length if bins else int(lengths.max()),
        logit_tokens=logit_tokens,
        ranks=args.world_size,
        accumulation=args.gradient_accumulation_steps,
        sharded=trainer.is_fsdp_enabled or zero3,
        sync_each_batch=zero3 or bool(trainer.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch")),
        offloaded=bool(plugin and plugin.cpu_offload and type(plugin.cpu_offload).__name__ != "OffloadPolicy"),
        bf16=bool(args.bf16 or args.fp16),
        checkpointing=bool(
            getattr(args, "activation_checkpointing", False)
            or args.gradient_checkpointing
            or (plugin and plugin.activation_checkpointing)
        ),
        optimizer_bytes=memory.optimizer_bytes(optim) + master,
        foreach=optim == "adamw_torch" and trainer.accelerator.device.type == "cuda",
    )


def _disk(trainer, shape: Shape, plan: Plan) -> list[Finding]:
    args, output_dir = trainer.args, Path(trainer.args.output_dir)
    batches = math.ceil(len(trainer.train_dataset) / (args.per_device_train_batch_size * args.world_size))
    steps_an_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_an_epoch)
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    saves = {"no": 0, "epoch": math.ceil(steps / steps_an_epoch)}.get(strategy)
    if saves is None:
        every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * steps))
        saves = math.ceil(steps / every)
    if args.save_total_limit:
        saves = min(saves, args.save_total_limit + 1)
    full = trainer.is_fsdp_enabled and "FULL" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
    checkpoint, final = memory.checkpoint_bytes(shape, plan, full)
    remove_leftovers(output_dir)
    earlier = sum(folder_bytes(folder) for folder in output_dir.glob("checkpoint-*"))
    output_dir.mkdir(parents=True, exist_ok=True)
    free = lowest(shutil.disk_usage(output_dir).free + earlier)
    return check_disk(output_dir, checkpoint, final, saves, free)


def _told(result: Rehearsal) -> list[Finding]:
    if result.faults:
        return [Finding("error", *fault) for fault in result.faults]
    if int(os.environ.get("RANK", 0)) != 0:  # the figures differ a little from rank to rank
        return []
    peak = f", peak memory {as_text(result.peak_bytes)}" if result.peak_bytes else ""
    what = (
        f"saved, reloaded and resumed: weights and optimizer equal, loss {result.resumed_loss:.4f} as without; "
        f"checkpoint {as_text(result.checkpoint_bytes)}, model {as_text(result.final_bytes)}"
    )
    if not result.checkpoint_bytes:
        what = f"two steps and the final save are as they should be: loss {result.loss:.4f}, model "
        what += as_text(result.final_bytes)
    return [Finding("note", f"{what}, {result.seconds:.0f} s{peak}")]


def _show(example: dict, tokenizer) -> None:
    colour = colour_wanted()
    how = "dim: masked, green: learnt" if colour else "learnt is what stands between « and »"
    say(f"{paint('example ', '36', colour)} the first one ({how}):\n{show_example(example, tokenizer, colour)}")
