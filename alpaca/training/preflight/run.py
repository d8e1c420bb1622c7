"""What must be true before training starts: all checks in order, one report, and a rehearsal of saving and resuming.

Checks are functions that return findings (findings.py); those of tokens are in examples_and_tokenizer.py. Errors stop
the run, warnings do not.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import traceback
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from alpaca import RankError
from alpaca.common import memory as host_memory
from alpaca.common.memory import as_text
from alpaca.common.text import first_line
from alpaca.inference.adapters import embedding_rows
from alpaca.inference.checks import near_zero
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
    words = model.get_input_embeddings()
    learned = any(
        isinstance(module, torch.nn.Embedding) and module is not words and re.search(r"pos|wpe$", name)
        for name, module in model.named_modules()
    )
    what = f"the longest example has {longest} tokens, and the model has {known} positions"
    cure = f"model_max_length={known}"
    if learned:
        why = "each is a row of an embedding: the lookup fails (on a GPU as a device-side assert that names no cause)"
        return [Finding("error", what, why, cure)]
    return [Finding("warning", what, "it was not trained beyond them, and answers worse there", cure)]


def check_loading(folder: Path, dtype: torch.dtype) -> list[Finding]:
    """Check whether the machine's memory holds the whole model once per process. Every rank must call it.

    Args:
        folder: of the checkpoint.
        dtype: that it is loaded as.
    """
    one, processes = memory.weights_bytes(folder, dtype), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = lowest(host_memory.host_free(swap=True))  # of all ranks before any of them loads
    if one * processes <= free:
        return []
    loaded = f"{processes} processes each load the whole model" if processes > 1 else "the model is loaded"
    what = f"{loaded} into the machine's memory: {as_text(one * processes)}, but only {as_text(max(0, free))} is free"
    fitting = int(free // one)
    fewer = f"torchrun --nproc_per_node={fitting}, or " if fitting else ""
    cure = f"{fewer}a machine (or a memory limit of the scheduler's job) with more memory"
    return [Finding("error", what, "the kernel kills a process that takes more, without a message", cure)]


def check_trainer(trainer) -> list[Finding]:
    """Check that the library does what was asked for: FSDP is enabled, full fine-tuning is in float32."""
    found = []
    if trainer.args.fsdp and not trainer.is_fsdp_enabled:
        what, why = "fsdp was asked for, but the library did not enable it", "each process would hold the whole model"
        found.append(Finding("error", what, why, "start with torchrun --nproc_per_node=N (N > 1), or drop fsdp"))
    found += check_optimizer(trainer.args.optim.value, trainer.is_fsdp_enabled)
    trained = [(name, parameter) for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    if not trained:
        cure = "check lora_r and what freezes the model"
        return [*found, Finding("error", "no parameter is trained", "nothing would be learned", cure)]
    low = [f"{name} ({str(parameter.dtype)[6:]})" for name, parameter in trained if parameter.dtype != torch.float32]
    if low and not trainer.is_deepspeed_enabled:  # under bf16 its optimizer holds the float32 weights
        more = f" and {len(low) - 3} more" if len(low) > 3 else ""
        what = f"{len(low)} trained parameters are not float32: {', '.join(low[:3])}{more}"
        why = "at a learning rate of 2e-5 most updates are lost in 8 bits of mantissa: 3% of the weights move"
        cure = "load the model with dtype=torch.float32; bf16=True computes in bf16 over float32 weights"
        found.append(Finding("error", what, why, cure))
    return found


def check_optimizer(optim: str, sharded: bool) -> list[Finding]:
    """Refuse an optimizer of bitsandbytes under FSDP: it cannot step over sharded parameters."""
    bitsandbytes = any(word in optim for word in ("8bit", "bnb", "paged")) and "torch" not in optim  # adamw_torch_8bit
    if not (sharded and bitsandbytes):
        return []
    what = f"optim={optim} comes from bitsandbytes, which cannot step over parameters that FSDP has sharded"
    return [Finding("error", what, "the first step would fail", "leave out optim: AdamW, whose states FSDP shards")]


def check_memory(shape: Shape, plan: Plan, available: int, advice: list[str]) -> list[Finding]:
    """Compare the estimate with what the device has.

    Args:
        shape: of the model.
        plan: how it is to be trained.
        available: bytes on each device.
        advice: memory.advise's sets of arguments, each of them enough.
    """
    if not shape.known:
        return [Finding("note", "memory was not estimated: the model has no attention heads, as a transformer has")]
    parts = memory.estimate(shape, plan)
    text = ", ".join(f"{name} {as_text(size)}" for name, size in parts.items() if name != "total" and size)
    what = f"memory per device: {text}; peak {as_text(parts['total'])} of {as_text(available)}"
    if parts["total"] <= available:
        return [Finding("note", what)]
    cure = f"one of: {'; '.join(advice)}" if advice else "a larger device or a smaller model: no argument is enough"
    if memory.certain_bytes(parts, plan) > available:
        why = "parameters, gradients and optimizer states alone (exact, not estimated) are more than there is"
        return [Finding("error", what, why, cure)]
    return [Finding("warning", what, "by the estimate (good to a factor of 1.5) it runs out of memory", cure)]


def check_disk(output_dir: Path, checkpoint: int, final: int, checkpoints: int, free: int) -> list[Finding]:
    """Check whether what the run will write fits on the disk.

    Args:
        output_dir: for the message.
        checkpoint: bytes of one.
        final: bytes of the model at the end.
        checkpoints: how many are on the disk at once, including the one being written.
        free: bytes, including checkpoints of an earlier run that will be deleted.
    """
    needed = checkpoints * checkpoint + final
    what = (
        f"disk in {output_dir}: {checkpoints} checkpoints of {as_text(checkpoint)} at a time, the model "
        f"{as_text(final)}; {as_text(needed)} of {as_text(free)} free"
    )
    if needed <= free:
        return [Finding("note", what)]
    fitting = int((free - final) // max(1, checkpoint))
    cure = "free some, or choose an output_dir on a larger disk"
    if fitting >= 2:  # the limit counts those that stay; one more is being written
        cure = f"save_total_limit={fitting - 1}, or {cure}"
    elif final <= free:
        cure = f"save_strategy=no (then the run cannot be resumed), or {cure}"
    return [Finding("error", what, "a save would fail in the middle of the run", cure)]


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


def check_packing(self_check: SelfCheck) -> list[Finding]:
    """Report what preflight/packing.py has measured: a warning if packed examples differ from the same ones alone."""
    if self_check.reason:
        what = f"examples are padded, as with padding=longest: {self_check.reason}"
        why = "in one row they would disturb each other, and the model would learn that"
        return [Finding("warning", what, why, "nothing to do; padding=longest trains the same without this warning")]
    what = f"packed examples equal the same alone, to {self_check.deviation:.1e} of their logits' deviation"
    return [Finding("note", what)]


# ---------------------------------------------------------------------------------------------------------------------
# All of it.


def preflight(
    trainer, earlier: Sequence[Finding] = (), self_check: SelfCheck | None = None, with_rehearsal: bool = True
) -> list[Finding]:
    """Run all checks in order, print the report on rank 0, and rehearse a save and a resumed step.

    Args:
        trainer: before its ``train()``; its processing_class is the tokenizer, its train_dataset a sequence of
            {"input_ids", "labels"}, or of lists of them with that sequence as ``dataset``. The sequence may have
            ``numbers`` and ``left_out``, as for check_examples (record_numbers, left_out).
        earlier: what was found before there was a trainer (mend_merges, check_tokenizer).
        self_check: compares packed examples with the same alone, as the rehearsal begins. None: they are padded.
        with_rehearsal: whether to do the rehearsal.

    Returns:
        All findings; none of them is an error.

    Raises:
        UserError: there are errors, which the report lists, or the rehearsal failed.
    """
    tokenizer = trainer.processing_class
    rows = embedding_rows(trainer.model)
    examples = getattr(trainer.train_dataset, "dataset", trainer.train_dataset)
    found = list(earlier) + check_difference(trainer.model) + check_trainer(trainer)
    numbers, left_out = getattr(examples, "numbers", None), getattr(examples, "left_out", ())
    found += check_examples(examples, tokenizer.eos_token_id, rows, tokenizer.model_max_length, numbers, left_out)
    found += check_positions(trainer.model, int(columns(examples)[1].max(initial=0)))
    raise_errors(gather(found))
    shape, plan = Shape.of(trainer.model), _plan(trainer, examples)
    available = lowest(host_memory.available_bytes(trainer.accelerator.device))
    advice = memory.advise(shape, plan, available)
    found = gather(found + check_memory(shape, plan, available, advice) + _disk(trainer, shape, plan))
    finish(found)
    _show(examples[0], tokenizer)
    if with_rehearsal:
        later = gather(_rehearsed(trainer, self_check, advice))
        finish(later)
        found += later
    return found


def _rehearsed(trainer, self_check: SelfCheck | None, advice: list[str]) -> list[Finding]:
    if trainer.is_deepspeed_enabled:
        what = "saving and resuming were not rehearsed: DeepSpeed's engine cannot be taken back to before its step"
        cure = "a short run with max_steps=2 and save_steps=1, resumed once, shows the same"
        return [Finding("warning", what, "a failing save would show late", cure)]
    args, found = trainer.args, []

    def check_attention() -> None:
        self_check(trainer.model, args)
        found.extend(check_packing(self_check))

    try:
        result = rehearse(trainer, args.output_dir, check_attention if self_check else None)
    except torch.OutOfMemoryError as e:
        cure = "; ".join(advice) or "a smaller per_device_train_batch_size or model_max_length"
        raise RankError(f"preflight: the first step ran out of memory: one of {cure}; nothing was trained") from e
    except RuntimeError as e:
        hint = "skip_save_rehearsal=True trains without it"
        if is_failed_write(e, traceback.extract_tb(e.__traceback__)):
            hint = f"is the disk full? {hint}"
        elif re.search(r"connection (closed|reset)|remote process", str(e), re.IGNORECASE):
            hint = "another process of the run has ended: its own message says why"
        raise RankError(f"preflight: saving and resuming failed: {first_line(e)} ({hint})") from e
    batches = args.gradient_accumulation_steps / min(2, args.gradient_accumulation_steps)
    # of the slowest rank, so that each reports the same
    step, save = -lowest(-result.step_seconds * batches), -lowest(-result.save_seconds)
    return found + _outcome(result) + check_stop(step, save)


def _outcome(result: Rehearsal) -> list[Finding]:
    if result.faults or int(os.environ.get("RANK", 0)) != 0:  # the figures differ a little from rank to rank
        return result.faults
    model = f"model {as_text(result.final_bytes)}"
    what = f"two steps and the final save are as they should be: loss {result.loss:.4f}, {model}"
    if result.checkpoint_bytes:
        what = (
            f"saved, reloaded and resumed: weights and optimizer equal, loss {result.resumed_loss:.4f} as without; "
            f"checkpoint {as_text(result.checkpoint_bytes)}, {model}"
        )
    peak = f", peak memory {as_text(result.peak_bytes)}" if result.peak_bytes else ""
    return [Finding("note", f"{what}, {result.seconds:.0f} s{peak}")]


def _plan(trainer, examples: Sequence[dict]) -> Plan:
    args = trainer.args
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    zero3 = trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    _, lengths, labels, _ = columns(examples)
    bins = getattr(trainer.train_dataset, "bins", None)  # when packing: each is filled up
    logit_tokens = None
    if getattr(trainer.data_collator, "padding_free", False):  # logits are computed where there is a label
        supervised = np.add.reduceat(labels != IGNORE_INDEX, np.cumsum(lengths) - lengths)
        logit_tokens = int(max(supervised[numbers].sum() for numbers in bins) if bins else supervised.max())
    optim = args.optim.value
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
    saves = {"no": 0, "epoch": math.ceil(steps / steps_an_epoch)}.get(args.save_strategy.value)
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


def _show(example: dict, tokenizer) -> None:
    colour = colour_wanted()
    how = "dim: masked, green: learned" if colour else "learned: what is between « and »"
    say(f"{paint('example ', '36', colour)} the first one ({how}):\n{show_example(example, tokenizer, colour)}")
    say(f"{paint('border  ', '36', colour)} where its answer begins: {show_border(example, tokenizer, colour)}")


def show_border(example: dict, tokenizer, colour: bool) -> str:
    """Return the last two tokens of an example's prompt and the first three of its answer, marked as in its text."""
    ids, labels = list(example["input_ids"]), list(example["labels"])
    first = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    begin = max(0, first - 3)  # one more: some decoders remove the space in front of their first token
    texts = [tokenizer.decode(ids[begin:end]) for end in range(begin, min(first + 3, len(ids)) + 1)]
    tokens = [repr(after[len(before) :]) for before, after in itertools.pairwise(texts)]  # no control character is left
    prompt, answer = " ".join(tokens[1 : first - begin]), " ".join(tokens[first - begin :])
    return f"{paint(prompt, '2', True)} {paint(answer, '32', True)}" if colour else f"{prompt} «{answer}»"
