"""Fine-tunes a LLaMA- or OPT-family model on instruction data.

One GPU (or a CPU, slowly):

    python train.py --model_name_or_path MODEL --data_path ./alpaca_data.json --output_dir OUT

Four GPUs, the published recipe for 7B (global batch 4 x 4 x 8 = 128):

    torchrun --nproc_per_node=4 train.py --model_name_or_path MODEL --data_path ./alpaca_data.json --output_dir OUT \\
        --bf16 True --tf32 True --num_train_epochs 3 --per_device_train_batch_size 4 --gradient_accumulation_steps 8 \\
        --save_strategy steps --save_steps 2000 --save_total_limit 1 --learning_rate 2e-5 --weight_decay 0. \\
        --warmup_steps 0.03 --lr_scheduler_type cosine --logging_steps 1 --fsdp --fsdp_config configs/fsdp.json

Two processes on a CPU, as in `make demo`:

    torchrun --nproc_per_node=2 train.py --model_name_or_path MODEL --data_path ./alpaca_data.json --output_dir OUT \\
        --eval_fraction 0.1 --fsdp --fsdp_config configs/fsdp.json

--help_all also shows the flags of transformers.TrainingArguments. --config FILE reads flags from YAML or JSON (the
command line wins); a finished run's training_receipt.json repeats that run, into another --output_dir.
To resume a run that was killed, add --resume_from_checkpoint auto to its command; the number of GPUs may differ.
SIGTERM and SIGUSR1 save a checkpoint (unless --save_strategy no) and exit with 75, "try again"; Ctrl-C exits with 130.
"""

from __future__ import annotations

import alpaca.common.environment  # noqa: F401  # isort: skip
import importlib.util
import json
import os
import sys
from collections.abc import Sized
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Literal

from alpaca import UserError
from alpaca.common import cli
from alpaca.training import flags

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported, which takes seconds
    try:
        flags.read(sys.argv[1:], __file__, __doc__, ("model_name_or_path", "data_path", "output_dir"))
    except UserError as e:
        cli.fail(e)

import torch
import transformers
from huggingface_hub import HfApi
from transformers.integrations import get_reporting_integration_callbacks

from alpaca.chat_template import Unanswerable, before_template, chat_template, end_token, mark_trained, without_system
from alpaca.common.files import check_writable
from alpaca.common.records import load_records
from alpaca.common.shapes import has_several_turns
from alpaca.common.text import counted, first_line
from alpaca.inference.adapters import add_mean_rows, embedding_rows
from alpaca.inference.generate import context_length
from alpaca.inference.load import load_model, load_tokenizer
from alpaca.training import checkpoints, distributed, lora, packing, receipt, sharding
from alpaca.training.checkpoints import choose_checkpoint, run_facts
from alpaca.training.distributed import say
from alpaca.training.evaluate import Samples
from alpaca.training.examples import (  # noqa: F401  (some for importers)
    IGNORE_INDEX,
    SupervisedDataset,
    asked_in_both,
    check_template,
    hold_out,
    preprocess,
)
from alpaca.training.preflight import examples_and_tokenizer, memory, merges
from alpaca.training.preflight import packing as packing_check
from alpaca.training.preflight.checks import disk, preflight
from alpaca.training.preflight.findings import Finding, raise_errors
from alpaca.training.preflight.rehearsal import rehearsal
from alpaca.training.stop import Stopped, train_until_stopped
from alpaca.training.trainer import Trainer, trainer_maker
from alpaca.weights.checkpoint import check_model_folder, is_hub_name

# What a LLaMA tokenizer calls them. A missing one may be None or "" (some conversions of LLaMA have "").
DEFAULT_PAD_TOKEN, DEFAULT_EOS_TOKEN, DEFAULT_BOS_TOKEN, DEFAULT_UNK_TOKEN = "[PAD]", "</s>", "<s>", "<unk>"


# Flags of the library without effect: the loss alone is evaluated, and the finished model is uploaded once.
NO_EFFECT = {"do_train", "do_predict", "eval_on_start", "prediction_loss_only", "label_names", "include_for_metrics"}
NO_EFFECT |= {"batch_eval_metrics", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"}
NO_EFFECT |= {"remove_unused_columns", "length_column_name", "hub_strategy", "hub_always_push"}


# ---------------------------------------------------------------------------------------------------------------------
# Arguments.


def _flag(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    model_name_or_path: str | None = _flag(None, "Folder or hub name of the base model.")


@dataclass
class DataArguments:
    data_path: str | None = _flag(
        None,
        "Instruction data: JSON, JSON Lines, CSV or Parquet, a folder, several separated by commas, or a hub dataset.",
    )
    eval_data_path: str | None = _flag(None, "Held-out data.")
    fields: str | None = _flag(None, "Field names of other formats: instruction=question,input=context,output=answer.")
    template: Literal["alpaca", "chat"] | None = _flag(
        None,
        "alpaca: Alpaca's prompt. chat: the base model's chat template. Default: chat for data with several turns if "
        "the base model has a chat template, else alpaca. Chat and judge later use the same.",
    )
    eval_fraction: float = _flag(0.0, "Hold out this share of --data_path instead (drawn with --data_seed or --seed).")
    padding: Literal["free", "longest"] = _flag(
        "free",
        "free: all examples of a batch in one row, without pad tokens; the loss is the same. longest: pad each example "
        "to the longest of its batch, like the original.",
    )
    packing: bool = _flag(
        False,
        "Pack examples into bins of model_max_length tokens; the batch size then counts bins. Faster, but another "
        "recipe: several times more examples per step, so fewer steps (reduce the batch size to compensate).",
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    cache_dir: str | None = _flag(None, "Folder for downloaded models.")
    optim: str = _flag("adamw_torch_fused", "The optimizer.")
    model_max_length: int = _flag(512, "Longest example in tokens, prompt and answer; longer ones are cut.")
    lora_r: int = _flag(0, "LoRA rank; 16 is usual, 0 trains all weights.")
    lora_alpha: float = _flag(32.0, "The LoRA update is scaled by alpha / r.")
    lora_dropout: float = _flag(0.05, "Dropout before the LoRA matrices.")
    load_in_4bit: bool = _flag(False, "Keep the frozen weights in 4 bits (QLoRA).")
    logging_steps: float = _flag(10, "Steps between log lines; the last step is always logged.")
    report_to: None | str | list[str] = _flag(
        None, "tensorboard, wandb, trackio, …; default: tensorboard if installed."
    )
    gpu_hour_price: float = _flag(0.0, "Price of a GPU hour in US dollars, for the cost in training_receipt.json.")
    preflight_only: bool = _flag(False, "Check everything, train nothing.")
    skip_save_rehearsal: bool = _flag(False, "Skip the rehearsal, which saves, reloads and resumes before training.")

    def __post_init__(self):
        # As given: what follows, here and in the library, depends on the machine.
        self.given = receipt.without_secrets({field.name: getattr(self, field.name) for field in fields(self)})
        if self.report_to is None:
            self.report_to = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
        self.remove_unused_columns = False  # a batch without padding has columns that no model names
        distributed.before_init(self)
        super().__post_init__()
        distributed.after_init(self)


def check_arguments(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> None:
    """Raise UserError for arguments that cannot work, before anything is read or loaded."""
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if args.model_max_length < 8:
        raise UserError("--model_max_length must leave room for a prompt and an answer: use 512")
    if not (args.max_steps > 0 or (args.max_steps == -1 and args.num_train_epochs > 0)):  # NaN fails too
        raise UserError("--max_steps or --num_train_epochs must be above 0; to train nothing, use --preflight_only")
    if data_args.eval_data_path and data_args.eval_fraction:
        raise UserError("--eval_data_path and --eval_fraction both set held-out data: drop one of them")
    if args.eval_strategy != "no" and not (data_args.eval_data_path or data_args.eval_fraction):
        raise UserError("--eval_strategy needs held-out data: --eval_data_path or --eval_fraction")
    if args.metric_for_best_model not in (None, "loss", "eval_loss"):
        raise UserError(f"--metric_for_best_model {args.metric_for_best_model} is not available: use loss")
    if args.save_strategy == "best" and (args.eval_strategy == "no" or not args.metric_for_best_model):
        raise UserError("--save_strategy best needs --metric_for_best_model loss and an --eval_strategy")
    if data_args.packing and data_args.padding == "longest":
        raise UserError("--packing does not work with --padding longest: drop one of them")
    if data_args.packing and args.train_sampling_strategy == "group_by_length":
        raise UserError("--packing makes all rows equally long: drop --train_sampling_strategy group_by_length")
    if args.load_in_4bit and not args.lora_r:
        raise UserError("--load_in_4bit trains a LoRA adapter: add --lora_r 16")
    if args.load_in_4bit and args.fsdp:
        raise UserError("--load_in_4bit cannot be sharded: drop --fsdp (each GPU then holds the whole 4-bit model)")
    if args.lora_r and args.deepspeed:
        raise UserError("--lora_r does not work with --deepspeed: use --fsdp, which also shards the frozen weights")
    if args.lora_r:
        lora.need_peft("--lora_r")
    if args.use_liger_kernel and not importlib.util.find_spec("liger_kernel"):
        raise UserError("--use_liger_kernel needs the package: pip install liger-kernel (and a GPU)")
    try:  # otherwise what --report_to and --optim need is found missing only after the model is loaded
        for reporter in get_reporting_integration_callbacks(args.report_to):
            reporter()
        if not any(name in str(args.optim) for name in ("galore", "apollo", "lomo")):  # those need the model
            transformers.Trainer.get_optimizer_cls_and_kwargs(args)
        anything = torch.optim.SGD([torch.zeros(1, requires_grad=True)], args.learning_rate)
        warmup, schedule = args.get_warmup_steps(1000), args.lr_scheduler_type
        transformers.get_scheduler(schedule, anything, warmup, 1000, args.lr_scheduler_kwargs)
    except (ImportError, RuntimeError, ValueError, TypeError, AssertionError, ArithmeticError) as e:
        raise UserError(" ".join(str(e).split())) from None
    check_writable(args.output_dir, "--output_dir")
    model = model_args.model_name_or_path
    if os.path.exists(model) or "/" in model and not is_hub_name(model):
        check_model_folder(model, "--model_name_or_path")
    check_not_quantized(model, args.cache_dir)
    if args.push_to_hub and args.process_index == 0:
        try:
            HfApi(token=args.hub_token).whoami()
        except Exception as e:  # whatever the network does
            cure = "check the network, or run hf auth login"
            raise UserError(f"--push_to_hub cannot log in to the hub ({first_line(e)}): {cure}") from None
    for entry in fields(args):
        if entry.name in NO_EFFECT and args.given[entry.name] not in (entry.default, []):
            say(f"warning: --{entry.name} has no effect here")


def check_not_quantized(model: str, cache_dir: str | None) -> None:
    """Raise UserError if the config of a model, in a folder or on the hub, says that its weights are quantized."""
    try:
        config, _ = transformers.PretrainedConfig.get_config_dict(model, cache_dir=cache_dir)
    except Exception:  # whatever is wrong with it is reported when it is loaded
        return
    if quantization := config.get("quantization_config"):
        method = str(dict(quantization).get("quant_method", "an unknown method"))
        cure = "use the unquantized model (with --lora_r, --load_in_4bit quantizes it as it loads)"
        raise UserError(f"--model_name_or_path {model} is quantized ({method}): {cure}")


def check_batch_count(rows: Sized, args: TrainingArguments) -> None:
    """Raise UserError if --dataloader_drop_last leaves no batch."""
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and len(rows) < batch:
        what = f"{counted(len(rows), 'example')} of {batch} in a batch"
        raise UserError(f"--dataloader_drop_last leaves no batch ({what}): drop the flag")


# ---------------------------------------------------------------------------------------------------------------------
# Special tokens, and records → batches (tokens: alpaca/training/examples.py, packing: alpaca/training/packing.py).


def add_special_tokens(tokenizer, model) -> int:
    """Add the special tokens that the tokenizer lacks, with a mean row in the embeddings. Return how many are new."""
    wanted = {"pad_token": DEFAULT_PAD_TOKEN, "eos_token": DEFAULT_EOS_TOKEN}
    # Models that have no bos or unk by design do not need a row for one that would never be trained.
    by_design = {"bos_token": DEFAULT_BOS_TOKEN, "unk_token": DEFAULT_UNK_TOKEN}
    wanted |= {name: token for name, token in by_design.items() if token in tokenizer.get_vocab()}
    missing = {name: token for name, token in wanted.items() if not getattr(tokenizer, name)}
    before = len(tokenizer)
    if missing:
        tokenizer.add_special_tokens(missing)
        say(f"note: the tokenizer lacked {', '.join(missing)}; added {', '.join(missing.values())}")
    add_mean_rows(model, len(tokenizer))
    for config in (model.config, model.config.get_text_config(), model.generation_config):
        for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
            setattr(config, name, getattr(tokenizer, name))
    return len(tokenizer) - before


def choose_template(wanted: str | None, tokenizer, records: list[dict]) -> tuple[str, bool]:
    """Return "alpaca" or "chat" for --template, and whether any of the records (also held-out ones) has several turns.

    If Alpaca's prompt is to be used over several turns, it has no place for a system text: that is then put before the
    first instruction, in ``records``.

    Raises:
        UserError: the base model has no chat template to use.
    """
    several = sum(map(has_several_turns, records))
    if isinstance(tokenizer.chat_template, dict):  # by name, as for tools
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if wanted == "chat" and not tokenizer.chat_template:
        raise UserError("--template chat: this base model has no chat template; drop the flag, or use a chat model")
    template = wanted or ("chat" if several and tokenizer.chat_template else "alpaca")
    if several and not wanted:
        which = "the base model's own chat template" if template == "chat" else "Alpaca's, the base model has none"
        say(f"template: {which}; conversations of several turns: {several:,} of {counted(len(records), 'record')}")
    for record in records if several and template == "alpaca" else ():
        if record.get("messages"):
            record["messages"] = without_system(record["messages"])
    return template, bool(several)


def use_end_token(tokenizer) -> None:
    """Make the token that ends answers in the chat template the tokenizer's EOS. What the template writes stays."""
    end, eos = end_token(tokenizer), tokenizer.eos_token
    if not end or end == eos:
        return
    say(f"note: answers end with {end!r}, as in the chat template, instead of the tokenizer's EOS {eos!r}")
    if eos and "eos_token" in tokenizer.chat_template:
        tokenizer.chat_template = before_template(f"{{% set eos_token = {json.dumps(eos)} %}}", tokenizer.chat_template)
    tokenizer.add_special_tokens({"eos_token": end})


@dataclass
class DataCollatorForSupervisedDataset:
    """Examples → a batch: padded to the longest of them, or one after the other in one row."""

    pad_token_id: int
    padding_free: bool = False

    def __call__(self, examples: list) -> dict[str, torch.Tensor]:
        return packing.flatten(examples) if self.padding_free else packing.pad(examples, self.pad_token_id)


def load_data(data_args: DataArguments, seed: int) -> tuple[list[dict], list[dict]]:
    """Return the records to train on and those held out (maybe none)."""
    records, share = load_records(data_args.data_path, data_args.fields, say), data_args.eval_fraction
    if data_args.eval_data_path:
        held_out = load_records(data_args.eval_data_path, data_args.fields, say)
        if both := asked_in_both(records, held_out):
            what = f"{len(both)} of {len(held_out)} held-out records {'are' if both[1:] else 'is'} in the training data"
            why = "the eval loss will be too low"
            say(f"warning: {what} too (the first: record {both[0]}): {why}; remove them from --eval_data_path")
        return records, held_out
    count = round(len(records) * share) if 0 <= share < 1 else 0  # NaN is refused too
    parts = hold_out(records, count, seed)
    if share and not all(parts):
        raise UserError(f"--eval_fraction {share} of {counted(len(records), 'record')} leaves one side empty: try 0.1")
    return parts


def make_batches(model, dataset, pad_token_id: int, data_args: DataArguments, training_args: TrainingArguments):
    """Return what Trainer needs for --padding and --packing: the rows to draw from, a collator, a self-check or None.

    Whether a model can do without padding is measured before the first step, not looked up in a list.
    """
    collator = DataCollatorForSupervisedDataset(pad_token_id, padding_free=data_args.padding == "free")
    if not collator.padding_free:
        return dataset, collator, None

    def fall_back(model, reason: str) -> None:
        if data_args.packing:
            raise UserError(f"--packing is not possible here ({reason}): drop it")
        collator.padding_free = False
        packing.set_attention(model, packing.library_attention(model))

    needs = {"label_smoothing_factor": "needs the logits of prompts", "neftune_noise_alpha": "depends on row length"}
    reasons = [f"--{name} {need}" for name, need in needs.items() if getattr(training_args, name)]
    if reason := reasons[0] if reasons else packing.use_segments(model):
        say(f"warning: examples are padded, as with --padding longest: {reason}")
        fall_back(model, reason)
        return dataset, collator, None
    self_check = packing_check.SelfCheck(packing_check.examples_to_check(dataset), fall_back)
    if data_args.packing:
        dataset = packing.PackedDataset(dataset, training_args.model_max_length)
        say(dataset.summary)
    return dataset, collator, self_check


# ---------------------------------------------------------------------------------------------------------------------
# The run.


def make_tokenizer(base: str, data_args, args, records: list[dict], held_out: list[dict]):
    """Return (tokenizer, (template, whether there are several turns), findings) for a run on these records."""
    options = {"model_max_length": args.model_max_length, "padding_side": "right"}
    tokenizer = load_tokenizer(base, cache_dir=args.cache_dir, **options)
    findings = merges.mend_merges(
        tokenizer, [f"{record['instruction']}\n{record['output']}" for record in records[:500]]
    )
    template = choose_template(data_args.template, tokenizer, [*records, *held_out])
    data_args.template = template[0]  # for the receipt
    for part, name in ((records, "training"), (held_out, "held-out")) if template[0] == "chat" else ():
        try:
            check_template(part, tokenizer, name)
        except Unanswerable as e:
            raise UserError(f"{e}: remove such records, or use --template alpaca") from None
    return tokenizer, template, findings


def load_base(
    model_args,
    args,
    tokenizer,
    template: tuple[str, bool],
    findings: list[Finding] | None = None,
    once: bool = False,
    **options,
):
    """Load the model to fine-tune, and add what it lacks; the first time, with ``findings``, fix the tokenizer too.

    With ``once``, every rank must call it, and rank 0 alone reads the weights: see sharding.load_on_rank_0.
    """
    dropped: list[str] = []
    options = {"dtype": torch.float32, "cache_dir": args.cache_dir, **options}
    read = partial(load_model, model_args.model_name_or_path, dropped=dropped, **options)
    model = sharding.load_on_rank_0(read) if once else read()
    packing.weigh_router_loss(model)
    if share := lora.freeze_other_senses(model):
        what = f"the parts for images or sound are not trained ({share:.1%} of the parameters)"
        dropped.append(f"{what}: to use them, copy the processor's files from the base model")
    if findings is None:
        add_special_tokens(tokenizer, model)
        return model
    findings += [Finding("note", what) for what in dropped]
    findings += examples_and_tokenizer.check_tokenizer(tokenizer, embedding_rows(model), model.config)
    raise_errors(findings)  # before rows are added that would hide them
    name, several = template
    if name == "chat":
        use_end_token(tokenizer)
    if args.lora_r:
        lora.check_eos(tokenizer)
    add_special_tokens(tokenizer, model)
    made = tokenizer.chat_template if name == "chat" else chat_template(tokenizer)  # in place of the base model's
    tokenizer.chat_template = mark_trained(made) if name == "chat" or several else made
    return model


def load_trained(load, args, findings: list[Finding] | None = None):
    """Load the model as it is trained: with its adapter, and in the type that it is kept in.

    float32 whatever the checkpoint's type: at a learning rate of 2e-5 most updates are lost in bf16's 8 bits. --bf16
    computes in bf16 over float32 weights. LoRA leaves these weights as they are.
    """
    options = lora.base_options(args) if args.lora_r else {}
    model = load(findings=findings, once=bool(args.fsdp), **options)
    if not args.lora_r:
        return model
    if findings is not None:
        findings += lora.check_coverage(model, args)
    return lora.add_adapter(model, args)


def check_before_loading(base: str, args) -> tuple[memory.Sizes | None, memory.Plan, list[Finding]]:
    """Return the model's sizes, how it will be trained, and findings on both; raise UserError if it cannot fit."""
    plan = memory.Plan.of(args, lora.base_options(args)["dtype"] if args.lora_r else torch.float32)
    sizes = memory.sizes_of(base, args.cache_dir)
    findings = memory.check_loading(sizes, plan, args.device) if sizes and not args.deepspeed else []
    raise_errors(findings)
    return sizes, plan, findings


def train(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Check the arguments, and fine-tune if no other run is at work in the output folder."""
    check_arguments(model_args, data_args, training_args)
    with checkpoints.only_run(training_args.output_dir):
        fine_tune(model_args, data_args, training_args)


def fine_tune(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> None:
    """Records → model → checks → rehearsal → fit → finish."""
    base, output_dir = model_args.model_name_or_path, Path(args.output_dir)
    checkpoint = choose_checkpoint(args.resume_from_checkpoint, output_dir)
    if checkpoint:
        checkpoints.compare(checkpoint, args.given)
    train_records, eval_records = load_data(data_args, args.seed if args.data_seed is None else args.data_seed)
    check_batch_count(train_records, args)
    begun = receipt.begin(data_args.data_path, train_records, data_args.eval_data_path, eval_records)

    tokenizer, template, findings = make_tokenizer(base, data_args, args, train_records, eval_records)
    sizes, plan, more = check_before_loading(base, args)
    repository = receipt.open_repository(args)
    load = partial(load_base, model_args, args, tokenizer, template)
    model = load_trained(load, args, findings)

    examples = SupervisedDataset(train_records, tokenizer, args.model_max_length, "training")
    held_out = SupervisedDataset(eval_records, tokenizer, args.model_max_length, "held-out") if eval_records else None
    say("\n".join(dataset.summary for dataset in (examples, held_out) if dataset))
    rows, collator, self_check = make_batches(model, examples, tokenizer.pad_token_id, data_args, args)

    check_batch_count(rows, args)
    args.facts = run_facts(model, rows, args)
    if checkpoint:
        checkpoints.compare(checkpoint, args.facts)
    findings += more + (disk(args, rows, sizes, plan) if sizes else [])
    preflight(model, tokenizer, rows, args, findings)
    again, callbacks = partial(load_trained, load, args), [self_check] if self_check else []
    make = trainer_maker(again, model, data_collator=collator, processing_class=tokenizer, callbacks=callbacks)
    del model  # so that the rehearsal can free it
    save = partial(save_result, load_base=load)
    if not args.skip_save_rehearsal:
        rehearsal(make, args, rows, held_out, save)
    if args.preflight_only:
        return

    args.eval_on_start = held_out is not None  # "before", to compare with
    trainer = make(args, rows, held_out)
    samples = Samples(trainer, eval_records, args.model_max_length)
    trainer.add_callback(samples)
    checkpoints.set_aside_newer(output_dir, checkpoint)
    train_until_stopped(trainer, checkpoint)
    finish(trainer, save, samples, begun, {**vars(model_args), **vars(data_args), **args.given})
    receipt.upload(repository, output_dir, args)


def save_result(trainer: Trainer, folder: Path, load_base) -> None:
    """Write the trained model into a folder, merged if it is an adapter (and the adapter too); every rank calls it."""
    packing.set_attention(trainer.model, packing.library_attention(trainer.model))  # for any batch
    trainer.save_whole_model(folder, partial(lora.save, trainer, load_base=load_base) if trainer.args.lora_r else None)


def finish(trainer: Trainer, save, samples: Samples, begun: dict, arguments: dict) -> None:
    """Save the whole model with its receipt, card and plot; print how the run went."""
    output_dir, held_out = Path(trainer.args.output_dir), trainer.eval_dataset
    examples = getattr(trainer.train_dataset, "dataset", trainer.train_dataset)  # of --packing: not the bins
    last = [e["step"] for e in trainer.state.log_history if "eval_loss" in e][-1:]
    if held_out and (last != [trainer.state.global_step] or trainer.args.load_best_model_at_end):
        trainer.evaluate()
    save(trainer, output_dir)
    trainer.save_state()
    if trainer.is_world_process_zero():
        facts = receipt.collect(begun, trainer, arguments, (len(examples), len(held_out or ())))
        facts["samples"] = samples.shown()
        ollama = receipt.modelfile(trainer.processing_class, context_length(trainer.model))
        say(f"{', '.join(receipt.write(facts, output_dir, Modelfile=ollama))} in {output_dir}")
    steps, count = counted(trainer.state.global_step, "step"), counted(len(examples), "example")
    say(f"{steps} on {count}; model in {output_dir}")
    if held_out:
        losses, count = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e], len(held_out)
        say(f"eval loss on {counted(count, 'held-out example')}: {losses[0]:.4f} before, {losses[-1]:.4f} after")


class ArgumentParser(transformers.HfArgumentParser):
    """HfArgumentParser with errors of one line."""

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def parse_args(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    parser = ArgumentParser((ModelArguments, DataArguments, TrainingArguments), allow_abbrev=False)
    known = {name for action in parser._actions for name in action.option_strings}  # argparse has no public list
    argv = flags.read(sys.argv[1:] if argv is None else argv, __file__, __doc__)
    try:
        return parser.parse_args_into_dataclasses(flags.translate_flags(argv, known), look_for_args_file=False)
    except (ValueError, ImportError) as e:  # TrainingArguments' own checks
        raise UserError(" ".join(str(e).split())) from None


def main() -> None:
    code = 0
    try:
        train(*parse_args())
    except Stopped as e:
        code = e.code
        say(str(e))
    except UserError as e:
        cli.fail(e)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as e:
        sys.exit(f"error: {cli.os_error_message(e)}")
    if torch.distributed.is_initialized():
        # Leave together: a rank that exits while another still writes tears down connections under it.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
