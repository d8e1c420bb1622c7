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
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from alpaca import RankError, UserError
from alpaca.common import memory as host_memory
from alpaca.common.memory import as_text
from alpaca.common.text import first_line
from alpaca.inference.adapters import embedding_rows
from alpaca.inference.checks import near_zero
from alpaca.training.checkpoints import is_failed_write
from alpaca.training.distributed import read_config, say
from alpaca.training.examples import IGNORE_INDEX, columns
from alpaca.training.preflight import memory
from alpaca.training.preflight.examples_and_tokenizer import check_examples, show_example
from alpaca.training.preflight.findings import Finding, colour_wanted, finish, gather, lowest, paint
from alpaca.training.preflight.memory import Plan, Sizes
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


def check_loading(sizes: Sizes, plan: Plan, device: torch.device) -> list[Finding]:
    """Check, before the model is loaded, whether machine and device hold it. Every rank must call it.

    Args:
        sizes: of the model.
        plan: how it is to be trained.
        device: of this rank.
    """
    one = sizes.parameters * plan.dtype_bytes
    processes = 1 if plan.sharded else int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # FSDP: rank 0 alone loads it
    free = lowest(host_memory.host_free(swap=True))  # of all ranks before any of them loads
    if one * processes > free and not plan.four_bit:  # which is loaded a layer at a time
        loaded = f"{processes} processes each load the whole model" if processes > 1 else "the model is loaded"
        left = as_text(max(0, free))
        what = f"{loaded} into the machine's memory: {as_text(one * processes)}, but only {left} is free"
        fitting = int(free // one)
        fewer = f"torchrun --nproc_per_node={fitting}, or " if fitting else ""
        cure = f"{fewer}a machine (or a memory limit of the scheduler's job) with more memory"
        return [Finding("error", what, "the kernel kills a process that takes more, without a message", cure)]
    available = lowest(host_memory.available_bytes(device))
    return check_memory(sizes, plan, available)


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


def check_training(model, args) -> list[Finding]:
    """Check that what is trained can be: some parameters, in float32, by an optimizer that handles them."""
    found = check_optimizer(args.optim.value, bool(args.fsdp))
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        cure = "check lora_r and what freezes the model"
        return [*found, Finding("error", "no parameter is trained", "nothing would be learned", cure)]
    low = [f"{name} ({str(parameter.dtype)[6:]})" for name, parameter in trained if parameter.dtype != torch.float32]
    if low and not args.deepspeed:  # under bf16 its optimizer holds the float32 weights
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


# ---------------------------------------------------------------------------------------------------------------------
# All of it.


def preflight(model, tokenizer, rows: Sequence, args, findings: Sequence[Finding] = ()) -> None:
    """Make all checks of model and examples, and print the report and the first example on rank 0.

    Args:
        model: that will be trained.
        tokenizer: its own.
        rows: a sequence of {"input_ids", "labels"}, or of lists of them with that sequence as ``dataset``. The sequence
            may have ``numbers`` and ``left_out``, as for check_examples (record_numbers, left_out).
        args: train.py's TrainingArguments.
        findings: what was found before (check_tokenizer, check_loading, check_disk).

    Raises:
        UserError: there are errors, which the report lists.
    """
    examples = getattr(rows, "dataset", rows)
    found = list(findings) + check_difference(model) + check_training(model, args)
    numbers, left_out = getattr(examples, "numbers", None), getattr(examples, "left_out", ())
    max_length = tokenizer.model_max_length
    found += check_examples(examples, tokenizer.eos_token_id, embedding_rows(model), max_length, numbers, left_out)
    found += check_positions(model, int(columns(examples)[1].max(initial=0)))
    finish(gather(found))
    _show(examples[0], tokenizer)


def planned_steps(args, rows: Sequence) -> tuple[int, int]:
    """Return (steps of the run, steps of an epoch), as the library will count them."""
    batches = math.ceil(len(rows) / (args.train_batch_size * args.world_size))
    an_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * an_epoch), an_epoch


def disk(args, rows: Sequence, sizes: Sizes, plan: Plan) -> list[Finding]:
    """Check whether the disk holds what the run will write; first remove what an interrupted one left."""
    output_dir, (steps, an_epoch) = Path(args.output_dir), planned_steps(args, rows)
    saves = {"no": 0, "epoch": math.ceil(steps / an_epoch)}.get(args.save_strategy.value)
    if saves is None:
        every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * steps))
        saves = math.ceil(steps / every)
    if args.save_total_limit:
        saves = min(saves, args.save_total_limit + 1)
    full = bool(args.fsdp) and "FULL" in str(read_config(args.fsdp_config).get("state_dict_type"))
    checkpoint, final = memory.checkpoint_bytes(sizes, plan, full)
    remove_leftovers(output_dir)
    earlier = sum(folder_bytes(folder) for folder in output_dir.glob("checkpoint-*"))
    output_dir.mkdir(parents=True, exist_ok=True)
    free = lowest(shutil.disk_usage(output_dir).free + earlier)
    return check_disk(output_dir, checkpoint, final, saves, free)


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
        what = (
            "saving and resuming were not rehearsed: that takes three DeepSpeed engines a process, which is not tested"
        )
        cure = "a short run with max_steps=2 and save_steps=1, resumed once, shows the same"
        return finish([Finding("warning", what, "a failing save would show late", cure)])
    say("rehearsal: two steps on the longest examples, a save, a resume and the final save; it loads the model twice")
    hint = "skip_save_rehearsal=True trains without it"
    try:
        result = rehearse(make, args, rows, held_out, save, planned_steps(args, rows)[0])
    except torch.OutOfMemoryError as e:
        cure = memory.smaller_step(Plan.of(args, torch.float32))
        raise RankError(f"preflight: a step ran out of memory: one of {cure}; nothing was trained") from e
    except (UserError, OSError):
        raise
    except Exception as e:  # a check must not end in a traceback, whatever a model's code does
        if is_failed_write(e, traceback.extract_tb(e.__traceback__)):
            hint = f"is the disk full? {hint}"
        elif re.search(r"connection (closed|reset)|remote process", str(e), re.IGNORECASE):
            hint = "another process of the run has ended: its own message says why"
        raise RankError(f"preflight: saving and resuming failed: {first_line(e)} ({hint})") from e
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
