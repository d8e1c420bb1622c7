"""Checks of the model, its rows and the disk, and one report of all checks; rehearsal.py comes next."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from alpaca.common.memory import as_text
from alpaca.common.text import counted
from alpaca.inference.load import near_zero
from alpaca.training.distributed import read_config, say
from alpaca.training.examples import SupervisedDataset
from alpaca.training.preflight import memory
from alpaca.training.preflight.examples_and_tokenizer import check_examples, show_border, show_example
from alpaca.training.preflight.findings import Finding, colour_wanted, finish, gather, lowest, paint
from alpaca.training.preflight.memory import Plan, Sizes
from alpaca.training.preflight.rehearsal import folder_bytes, planned_steps


def check_difference(model) -> list[Finding]:
    """Check whether the weights look like the difference of two models."""
    why, cure = "it looks like a weight diff", "recover the model first, with weight_diff.py recover"
    return [Finding("error", what, why, cure)] if (what := near_zero(model)) else []


def check_positions(model, longest: int) -> list[Finding]:
    """Check whether the longest example, in tokens, is within the model's positions.

    Learned ones (OPT, GPT-2) are rows of an embedding; rotary ones are computed, also beyond those seen in training.
    """
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not known or longest <= known:
        return []
    level, why = "warning", "the model was not trained beyond them, and is worse there"
    tables = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)]
    if any(re.search(r"pos[^.]*$|wpe$", name) for name in tables):
        level, why = "error", "beyond the last row the lookup fails (on a GPU with an unclear device-side assert)"
    what = f"the longest example has {longest} tokens, but the model only {known} positions"
    return [Finding(level, what, why, f"model_max_length={known}")]


def check_repeats(rows: Sequence, args) -> list[Finding]:
    """Report how many examples an epoch repeats so that each process gets full batches.

    accelerate fills up the last ones with the epoch's first examples (data_loader.BatchSamplerShard, ``even_batches``).
    """
    config, (steps, an_epoch) = args.accelerator_config, planned_steps(args, rows)
    batch = args.train_batch_size * (1 if config.split_batches else args.world_size)
    again = -len(rows) % batch
    if args.world_size == 1 or args.dataloader_drop_last or not config.even_batches or steps < an_epoch or not again:
        return []
    noun = "bins" if hasattr(rows, "bins") else "examples"
    what = f"each epoch has {len(rows) + again} {noun}, {again} of them repeated"
    why = f"{args.world_size} processes of {args.train_batch_size} each fill up the last batch with the first {noun}"
    return [Finding("note", f"{what}: {why}")]


def check_bf16(args) -> list[Finding]:
    """Suggest bf16 on a CPU that supports it (python benchmarks/bench_train.py --contenders ours ours_bf16)."""
    can = getattr(torch.cpu, "get_capabilities", dict)()  # not in every release of torch
    if args.bf16 or args.fp16 or args.device.type != "cpu" or not (can.get("avx512_bf16") or can.get("amx_bf16")):
        return []
    return [Finding("note", "this CPU supports bf16: bf16=True may train faster")]


def disk(args, rows: Sequence, sizes: Sizes, plan: Plan) -> list[Finding]:
    """Check whether the disk holds what the run will write."""
    output_dir, (steps, an_epoch) = Path(args.output_dir), planned_steps(args, rows)
    every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * steps))
    checkpoints = math.ceil(steps / {"no": math.inf, "epoch": an_epoch}.get(args.save_strategy.value, every))
    if args.save_total_limit:
        checkpoints = min(checkpoints, args.save_total_limit + 1)  # including the one being written
    full = bool(args.fsdp) and "FULL" in str(read_config(args.fsdp_config).get("state_dict_type"))
    checkpoint, final = memory.checkpoint_bytes(sizes, plan, full)
    needed = checkpoints * checkpoint + final
    output_dir.mkdir(parents=True, exist_ok=True)
    earlier = sum(folder_bytes(folder) for folder in output_dir.glob("checkpoint-*"))  # which will be deleted
    free = lowest(shutil.disk_usage(output_dir).free + earlier)
    what = (
        f"disk space in {output_dir}: {as_text(needed)} needed ({counted(checkpoints, 'checkpoint')} of "
        f"{as_text(checkpoint)}, the model {as_text(final)}), {as_text(free)} free"
    )
    if needed <= free:
        return [Finding("note", what)]
    fitting = int((free - final) // checkpoint) - 1  # one more is being written
    fewer = f"save_total_limit={fitting}, " if fitting > 0 else ""
    cure = f"{fewer}a larger disk for output_dir, or save_strategy=no (then the run cannot be resumed)"
    return [Finding("error", what, "a save would fail during the run", cure)]


def preflight(model, tokenizer, rows: Sequence, args, findings: Sequence[Finding] = ()) -> None:
    """Check model and examples, and print the report and the first example on rank 0.

    Args:
        model: to be trained.
        tokenizer: the model's.
        rows: a SupervisedDataset, or a PackedDataset of one.
        args: train.py's TrainingArguments.
        findings: earlier findings; errors among them stop the run too.

    Raises:
        UserError: there are errors, which the report lists.
    """
    dataset: SupervisedDataset = getattr(rows, "dataset", rows)
    found = [*findings, *check_difference(model), *check_repeats(rows, args), *check_bf16(args)]
    found += check_examples(dataset, tokenizer.eos_token_id, tokenizer.model_max_length)
    found += check_positions(model, max(dataset.lengths))
    finish(gather(found))
    how = "dim: masked, green: learned" if colour_wanted() else "learned: between « and »"
    say(f"{paint('example ', '36')} the first one ({how}):\n{show_example(dataset[0], tokenizer)}")
    say(f"{paint('border  ', '36')} where its answer begins: {show_border(dataset[0], tokenizer)}")
