"""What must be true before training starts: all checks in order, one report, and a rehearsal of saving and resuming.

The checks are functions that return findings (alpaca.findings); those of tokens are in alpaca.check_tokens. Errors stop
the run, warnings do not.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from alpaca import UserError, launch, memory
from alpaca.check_tokens import IGNORE_INDEX, check_examples, columns, show_example
from alpaca.findings import Finding, colour_wanted, format_report, gather, lowest, paint, raise_errors
from alpaca.memory import Plan, Shape, as_text
from alpaca.packing_check import SelfCheck
from alpaca.rehearsal import Rehearsal, folder_bytes, rehearse


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


def check_memory(shape: Shape, plan: Plan, available: int, advice: memory.Advice) -> list[Finding]:
    """Compares the estimate with what the device has; advice is computed by trying flags in the estimate."""
    parts = memory.estimate(shape, plan)
    text = ", ".join(f"{name} {as_text(size)}" for name, size in parts.items() if name != "total" and size)
    what = f"memory a device: {text}; peak {as_text(parts['total'])} of {as_text(available)}"
    if parts["total"] <= available:
        return [Finding("note", what)]
    flags = memory.advise(shape, plan, available, advice)
    cure = "one of: " + "; ".join(flags) if flags else "a larger device, or a smaller model: no set of flags is enough"
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


def check_packing(self_check: SelfCheck) -> list[Finding]:
    """What alpaca.packing_check.SelfCheck has measured: a warning where packed examples differ from the same alone."""
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
            ``left_out``, as for check_examples.
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
    rows = launch.rows(trainer.model.get_input_embeddings().weight)
    examples = getattr(trainer.train_dataset, "dataset", trainer.train_dataset)
    found = list(earlier) + check_trainer(trainer)
    left_out = getattr(examples, "left_out", ())
    found += check_examples(examples, tokenizer.eos_token_id, rows, tokenizer.model_max_length, left_out=left_out)
    if any(finding.level == "error" for finding in gather(found)):
        _finish(gather(found))
    shape, plan = Shape.of(trainer.model), _plan(trainer, examples)
    advice = memory.Advice(
        "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing",
        args.gradient_accumulation_steps,
    )
    available = lowest(memory.available_bytes(device))
    found = gather(found + check_memory(shape, plan, available, advice) + _disk(trainer, shape, plan))
    _finish(found)
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
            flags = "; ".join(memory.advise(shape, plan, available, advice))
            cure = flags or "a smaller --per_device_train_batch_size or --model_max_length"
            raise UserError(f"preflight: the first step ran out of memory: one of {cure}; nothing was trained") from e
        except RuntimeError as e:  # among them torch.save on a full disk
            first = (str(e).strip() or type(e).__name__).splitlines()[0]
            cure = "is the disk full? --skip_save_rehearsal goes on without"
            raise UserError(f"preflight: saving and resuming failed: {first} ({cure})") from e
        later += _told(result)
    later = gather(later)
    _finish(later)
    return found + later


def _plan(trainer, examples: Sequence[dict]) -> Plan:
    args = trainer.args
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    zero3 = trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    _, lengths, labels, _ = columns(examples)
    packed = examples is not trainer.train_dataset  # each row is filled up
    longest_answer = None  # padding-free, logits are computed where there is a label
    if not packed and getattr(args, "padding", "longest") == "free":
        longest_answer = int(np.add.reduceat(labels != IGNORE_INDEX, np.cumsum(lengths) - lengths).max())
    optim = str(getattr(args.optim, "value", args.optim))
    return Plan(
        batch=args.per_device_train_batch_size,
        length=trainer.processing_class.model_max_length if packed else int(lengths.max()),
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
