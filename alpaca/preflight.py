"""What must be true before training starts: all checks in order, one report, and a rehearsal of saving and resuming.

The checks are functions that return findings (alpaca.findings); those of tokens are in alpaca.check_tokens. Errors stop
the run, warnings do not.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from alpaca import UserError, memory
from alpaca.check_tokens import IGNORE_INDEX, check_examples, columns, show_example
from alpaca.findings import Finding, colour_wanted, format_report, gather, lowest, paint, raise_errors
from alpaca.memory import GIB, Plan, Shape
from alpaca.rehearsal import folder_bytes, rehearse


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
    named = list(trainer.model.named_parameters())
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    if not trained:
        why, cure = "nothing would be learnt", "look at --lora_r and what freezes the model"
        return [*found, Finding("error", "no parameter is trained", why, cure)]
    low = [f"{name} ({str(parameter.dtype)[6:]})" for name, parameter in trained if parameter.dtype != torch.float32]
    if low:
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


def check_checkpoint(checkpoint: str | os.PathLike | None, config) -> list[Finding]:
    """Whether the checkpoint to resume from is of this model, by its config.json where it has one."""
    path = Path(checkpoint) / "config.json" if checkpoint else None
    if not path or not path.exists():
        return []
    saved, ours = json.loads(path.read_text()), config.to_dict()
    names = ("model_type", "hidden_size", "intermediate_size", "ffn_dim", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "vocab_size", "tie_word_embeddings")
    other = [f"{n} {saved[n]}, not {ours[n]}" for n in names if n in saved and n in ours and saved[n] != ours[n]]
    if not other:
        return []
    return [
        Finding(
            "error",
            f"--resume_from_checkpoint {checkpoint} is of another model: {'; '.join(other)}",
            "its weights and optimizer states do not fit",
            "resume with the --model_name_or_path that it was started with",
        )
    ]


def check_memory(shape: Shape, plan: Plan, available: int, checkpointing_flag: str, accumulation: int) -> list[Finding]:
    """Compares the estimate with what the device has; advice is computed by trying flags in the estimate."""
    parts = memory.estimate(shape, plan)
    text = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if name != "total" and size)
    what = f"memory a device, in GiB: {text}; peak {parts['total'] / GIB:.1f} of {available / GIB:.1f}"
    if parts["total"] <= available:
        return [Finding("note", what)]
    advice = memory.advise(shape, plan, available, checkpointing_flag, accumulation)
    cure = (
        "one of: " + "; ".join(advice) if advice else "a larger device, or a smaller model: no set of flags is enough"
    )
    exact = 0 if plan.offloaded else parts["parameters"] + parts["gradients"] + parts["optimizer"]
    if exact > available:
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
        f"disk in {output_dir}, in GiB: {checkpoints} checkpoints of {checkpoint / GIB:.1f} at a time, "
        f"the model {final / GIB:.1f}; {needed / GIB:.1f} of {free / GIB:.1f} free"
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


def check_packing(deviation: float, reduced_precision: bool) -> tuple[list[Finding], bool]:
    """(findings, whether packed examples are as good as alone), from the largest difference of their logits.

    What mixes examples is off by 0.5 and more; float32 rounding is 1e-6, bf16's (8 bits, logits of some ten) 0.1.
    """
    if deviation <= (0.2 if reduced_precision else 1e-3):
        return [
            Finding("note", f"examples packed together have the logits of examples alone, to {deviation:.1e}")
        ], True
    return [
        Finding(
            "warning",
            f"packed examples have other logits than alone (by {deviation:.1e}): training falls back to padding",
            "the attention in use lets examples see each other, or this model ignores their positions",
            "nothing to do; --padding longest says the same without this warning",
        )
    ], False


# ---------------------------------------------------------------------------------------------------------------------
# All of it.


def preflight(
    trainer,
    earlier: Sequence[Finding] = (),
    record_numbers: Sequence[int] | None = None,
    left_out: Sequence[int] = (),
    deviation: Callable[[], float] | None = None,
    fall_back: Callable[[], None] | None = None,
    with_rehearsal: bool = True,
) -> list[Finding]:
    """Runs all checks in order, prints the report on rank 0, and rehearses a save and a resumed step.

    Args:
        trainer: before its ``train()``; its train_dataset is a sequence of {"input_ids", "labels"}, its
            processing_class the tokenizer.
        earlier: what was found before there was a trainer (check_precision, mend_merges, check_tokenizer).
        record_numbers: of the examples, as for check_examples.
        left_out: likewise.
        deviation: gives the largest difference of logits between packed examples and the same alone; None where
            examples are padded.
        fall_back: called on every rank when packing is not safe; makes the trainer pad.
        with_rehearsal: whether to do the rehearsal.

    Returns:
        All findings, none of them an error.

    Raises:
        UserError: there are errors; they stand in the report.
    """
    args, tokenizer = trainer.args, trainer.processing_class
    rows = trainer.model.get_input_embeddings().weight.shape[0]
    found = list(earlier) + check_trainer(trainer) + check_checkpoint(args.resume_from_checkpoint, trainer.model.config)
    dataset = trainer.train_dataset
    found += check_examples(dataset, tokenizer.eos_token_id, rows, tokenizer.model_max_length, record_numbers, left_out)
    if any(finding.level == "error" for finding in gather(found)):
        _finish(gather(found))
    shape, plan = Shape.of(trainer.model), _plan(trainer)
    available = lowest(memory.available_bytes(trainer.accelerator.device))
    checkpointing = (
        "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"
    )
    found += check_memory(shape, plan, available, checkpointing, args.gradient_accumulation_steps)
    found += _disk(trainer, shape, plan)
    if deviation is not None:
        more, safe = check_packing(-lowest(-deviation()), args.bf16 or args.fp16)
        found += more
        if not safe and fall_back is not None:
            fall_back()
    found = gather(found)
    _finish(found)
    _show(dataset[0], tokenizer)

    if with_rehearsal and trainer.is_deepspeed_enabled:
        what = "saving and resuming were not rehearsed: an engine of DeepSpeed cannot be taken back to before its step"
        cure = "a short run with --max_steps 2 --save_steps 1, resumed once, shows the same"
        found += [Finding("warning", what, "a failing save shows itself late", cure)]
        _print(format_report(found[-1:], colour_wanted()))
    elif with_rehearsal:
        more = gather(_rehearsal(trainer, shape, plan, available, checkpointing))
        found += more
        _finish(more)
    return found


def _plan(trainer) -> Plan:
    args = trainer.args
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    zero3 = trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    _, lengths, labels, _ = columns(trainer.train_dataset)
    supervised_only = getattr(args, "padding", "longest") == "free" or bool(getattr(args, "packing", False))
    longest_answer = None
    if supervised_only:
        longest_answer = int(np.add.reduceat(labels != IGNORE_INDEX, np.cumsum(lengths) - lengths).max())
    optim = str(getattr(args.optim, "value", args.optim))
    return Plan(
        batch=args.per_device_train_batch_size,
        length=int(lengths.max()),
        logit_tokens=longest_answer,
        ranks=args.world_size,
        sharded=trainer.is_fsdp_enabled or zero3,
        offloaded=bool(plugin and plugin.cpu_offload and type(plugin.cpu_offload).__name__ != "OffloadPolicy"),
        bf16=bool(args.bf16 or args.fp16),
        checkpointing=bool(
            getattr(args, "activation_checkpointing", False)
            or args.gradient_checkpointing
            or (plugin and plugin.activation_checkpointing)
        ),
        optimizer_bytes=memory.optimizer_bytes(optim),
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
    earlier = sum(folder_bytes(folder) for folder in output_dir.glob("checkpoint-*"))
    output_dir.mkdir(parents=True, exist_ok=True)
    free = lowest(shutil.disk_usage(output_dir).free + earlier)
    return check_disk(output_dir, checkpoint, final, saves, free)


def _rehearsal(trainer, shape: Shape, plan: Plan, available: int, checkpointing: str) -> list[Finding]:
    args = trainer.args
    try:
        result = rehearse(trainer, args.output_dir)
    except torch.OutOfMemoryError as e:
        advice = memory.advise(shape, plan, available, checkpointing, args.gradient_accumulation_steps)
        cure = "; ".join(advice) if advice else "a smaller --per_device_train_batch_size or --model_max_length"
        raise UserError(f"preflight: the first step ran out of memory; one of: {cure}; nothing was trained") from e
    except RuntimeError as e:  # among them torch.save on a full disk
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(
            f"preflight: saving and resuming failed: {first} (is the disk full? --skip_save_rehearsal goes on without)"
        ) from e
    found = [Finding("error", *fault) for fault in result.faults]
    if not found:
        peak = f", peak memory {result.peak_bytes / GIB:.1f} GiB" if result.peak_bytes else ""
        found.append(
            Finding(
                "note",
                f"saved, reloaded and resumed: weights and optimizer equal, loss {result.resumed_loss:.4f} as without; "
                f"checkpoint {result.checkpoint_bytes / GIB:.2f} GiB, model {result.final_bytes / GIB:.2f} GiB, "
                f"{result.seconds:.0f} s{peak}",
            )
        )
    return found


def _print(text: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


def _finish(findings: list[Finding]) -> None:
    _print(format_report(findings, colour_wanted()))
    raise_errors(findings)


def _show(example: dict, tokenizer) -> None:
    colour = colour_wanted()
    how = "dim: masked, green: learnt" if colour else "learnt is what stands between « and »"
    _print(f"{paint('example ', '36', colour)} the first one ({how}):\n{show_example(example, tokenizer, colour)}")
