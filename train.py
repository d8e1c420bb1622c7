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

A run that was killed goes on with the same command and --resume_from_checkpoint auto, on another number of GPUs too.
SIGTERM and SIGUSR1 make it save (not with --save_strategy no) and exit with 75, "try again", Ctrl-C with 130.
"""

from __future__ import annotations

import alpaca.common.environment  # noqa: F401  # isort: skip
import importlib.util
import math
import os
import random
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import transformers

import utils
from alpaca import RankError, UserError
from alpaca.common import cli
from alpaca.common.files import check_writable
from alpaca.inference.load import load_model, load_tokenizer
from alpaca.prompts import chat_template
from alpaca.training import distributed, lora, packing, receipt
from alpaca.training.checkpoints import check_fits, choose_checkpoint
from alpaca.training.distributed import say as _say
from alpaca.training.evaluate import HeldOutLoss
from alpaca.training.examples import IGNORE_INDEX, Records, SupervisedDataset, preprocess  # noqa: F401  (the original has them here)
from alpaca.training.meter import Metered
from alpaca.training.preflight import examples_and_tokenizer
from alpaca.training.preflight import packing as packing_check
from alpaca.training.preflight.findings import raise_errors
from alpaca.training.preflight.run import check_loading, check_precision, preflight
from alpaca.training.stop import Stopped
from alpaca.training.trainer import ResumableTrainer
from alpaca.weights.checkpoint import check_model_folder

# What a LLaMA tokenizer calls them. A missing one may be None or "" (some conversions of LLaMA have "").
DEFAULT_PAD_TOKEN, DEFAULT_EOS_TOKEN, DEFAULT_BOS_TOKEN, DEFAULT_UNK_TOKEN = "[PAD]", "</s>", "<s>", "<unk>"


# ---------------------------------------------------------------------------------------------------------------------
# Arguments.


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or hub name of the base model."})


@dataclass
class DataArguments:
    data_path: str | None = field(default=None, metadata={"help": "Instruction data: a JSON list, or .jsonl."})
    eval_data_path: str | None = field(default=None, metadata={"help": "Held-out data, in the same format."})
    eval_fraction: float = field(
        default=0.0, metadata={"help": "Hold out this share of --data_path instead (drawn with --data_seed or --seed)."}
    )
    padding: Literal["free", "longest"] = field(
        default="free",
        metadata={
            "help": "free: the examples of a batch in one row, without pad tokens; same examples a step and same loss. "
            "longest: the original's way, each example padded to the longest of its batch."
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Fill bins of model_max_length tokens with examples; a batch size then counts bins. Faster, but "
            "another recipe: several times more examples a step, so fewer steps (scale the batch size down to make "
            "up for it)."
        },
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloaded models are kept."})
    optim: str = field(default="adamw_torch_fused", metadata={"help": "The optimizer."})
    model_max_length: int = field(
        default=512, metadata={"help": "Longest example in tokens, prompt and answer; longer ones are cut."}
    )
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA matrices, 16 is usual; 0 trains all weights."})
    lora_alpha: float = field(default=32.0, metadata={"help": "LoRA's update is scaled by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the LoRA matrices."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Keep the frozen weights in 4 bits (QLoRA)."})
    logging_steps: float = field(
        default=10, metadata={"help": "Steps from one line to the next; the last step always has one."}
    )
    report_to: None | str | list[str] = field(
        default=None, metadata={"help": "tensorboard, wandb, trackio, …; by default tensorboard where it is installed."}
    )
    gpu_hour_price: float = field(
        default=0.0, metadata={"help": "US dollars for an hour of one GPU, for the cost in training_receipt.json."}
    )
    preflight_only: bool = field(default=False, metadata={"help": "Check everything, train nothing."})
    skip_save_rehearsal: bool = field(
        default=False, metadata={"help": "Do not save, reload and resume a step before the first one."}
    )

    def __post_init__(self):
        if not 0 <= self.gpu_hour_price < math.inf:  # NaN fails too
            raise UserError(f"--gpu_hour_price {self.gpu_hour_price} is no price: give dollars, as in 2.5")
        if self.report_to is None:
            self.report_to = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
        distributed.before_init(self)
        super().__post_init__()
        distributed.after_init(self)


# ---------------------------------------------------------------------------------------------------------------------
# Special tokens.


def add_special_tokens(tokenizer, model) -> int:
    """Gives the tokenizer the special tokens that it lacks, and the model a row for each new one.

    A new row is the float32 mean of the old ones, input and output embeddings apart, so that it starts no different
    from any token; the library's own mean_resizing adds noise to it.

    Returns:
        The number of tokens added to the vocabulary.
    """
    rows = distributed.rows(model.get_input_embeddings().weight)
    missing = {}
    if not tokenizer.pad_token:
        missing["pad_token"] = DEFAULT_PAD_TOKEN
    if not tokenizer.eos_token:
        missing["eos_token"] = DEFAULT_EOS_TOKEN
    # Models that have no bos or unk by design do not need a row for one that would never be trained.
    vocabulary = tokenizer.get_vocab()
    if not tokenizer.bos_token and DEFAULT_BOS_TOKEN in vocabulary:
        missing["bos_token"] = DEFAULT_BOS_TOKEN
    if not tokenizer.unk_token and DEFAULT_UNK_TOKEN in vocabulary:
        missing["unk_token"] = DEFAULT_UNK_TOKEN
    before = len(tokenizer)
    if missing:
        tokenizer.add_special_tokens(missing)
        _say(f"note: the tokenizer lacked {', '.join(missing)}; added {', '.join(missing.values())}")

    if (new := len(tokenizer) - rows) > 0:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        weights = [model.get_input_embeddings().weight]
        if not model.config.tie_word_embeddings and model.get_output_embeddings() is not None:
            weights.append(model.get_output_embeddings().weight)
        with torch.no_grad(), distributed.gathered(weights):
            for weight in weights:
                weight[-new:] = weight[:-new].mean(dim=0, keepdim=True)
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.bos_token_id = tokenizer.bos_token_id
    return len(tokenizer) - before


# ---------------------------------------------------------------------------------------------------------------------
# Records → batches (tokens: alpaca/training/examples.py, packing: alpaca/training/packing.py).


@dataclass
class DataCollatorForSupervisedDataset:
    """Examples → a batch: padded to the longest of them, or one after the other in one row."""

    pad_token_id: int
    padding_free: bool = False

    def __call__(self, examples: list) -> dict[str, torch.Tensor]:
        return packing.flatten(examples) if self.padding_free else packing.pad(examples, self.pad_token_id)


def load_data(data_args: DataArguments, seed: int) -> tuple[list[dict], list[dict]]:
    """The records to train on and those held out (maybe none)."""
    records = utils.load_records(data_args.data_path)
    if data_args.eval_data_path and data_args.eval_fraction:
        raise UserError("--eval_data_path and --eval_fraction both give held-out data: drop one of them")
    if data_args.eval_data_path:
        return records, utils.load_records(data_args.eval_data_path)
    share = data_args.eval_fraction if 0 <= data_args.eval_fraction < 1 else 1  # NaN is none either
    held_out = round(len(records) * share)
    if held_out == len(records):
        raise UserError(f"--eval_fraction {data_args.eval_fraction} must leave records to train on: take 0 to 0.5")
    if data_args.eval_fraction and not held_out:
        raise UserError(f"--eval_fraction {data_args.eval_fraction} of {len(records)} records is none: raise it")
    chosen = set(random.Random(seed).sample(range(len(records)), held_out))
    numbers = [[i for i in range(len(records)) if (i in chosen) == out] for out in (False, True)]
    return tuple(Records([records[i] for i in part], [i + 1 for i in part]) for part in numbers)


def make_batches(model, dataset, pad_token_id: int, data_args: DataArguments, training_args: TrainingArguments):
    """What Trainer gets for --padding and --packing: the rows to draw from, a collator, and a self-check or None.

    Whether a model can do without padding is measured before the first step, not looked up in a list.
    """
    collator = DataCollatorForSupervisedDataset(pad_token_id, padding_free=data_args.padding == "free")
    if not collator.padding_free:
        if data_args.packing:
            raise UserError("--packing puts examples into one row, and --padding longest does not: drop one of them")
        return dataset, collator, None

    def fall_back(reason: str) -> None:
        if data_args.packing:
            raise UserError(f"--packing cannot be had here ({reason}): leave it out")
        collator.padding_free = False
        packing.set_attention(model, packing.library_attention(model))

    reason = ""
    if training_args.label_smoothing_factor:
        reason = "--label_smoothing_factor needs the logits of prompts"
    elif getattr(model, "_is_stateful", False):
        reason = f"{type(model).__name__} is recurrent, and would carry its state from one example into the next"
    elif not packing.set_attention(model, packing.SEGMENTS):
        reason = f"the attention of {type(model).__name__} cannot be chosen"
    if reason:
        _say(f"warning: examples are padded, as with --padding longest: {reason}")
        fall_back(reason)
    if not collator.padding_free:
        return dataset, collator, None
    self_check = packing_check.SelfCheck(packing_check.examples_to_check(dataset), fall_back)
    if not data_args.packing:
        return dataset, collator, self_check
    if training_args.train_sampling_strategy == "group_by_length":
        raise UserError("--packing makes rows of one length: leave --train_sampling_strategy group_by_length out")
    bins = packing.PackedDataset(dataset, training_args.model_max_length)
    _say(
        f"packing: {len(dataset)} examples in {len(bins)} bins of {training_args.model_max_length} tokens, "
        f"{sum(dataset.lengths) / (len(bins) * training_args.model_max_length):.1%} full; a batch size counts bins, "
        f"of {len(dataset) / len(bins):.1f} examples each"
    )
    return bins, collator, self_check


# ---------------------------------------------------------------------------------------------------------------------
# The run.


class Trainer(Metered, ResumableTrainer, HeldOutLoss):
    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """The number of supervised tokens, as a whole number.

        The library's is a float, FSDP casts floats to the type that it computes in, and bf16 makes 268 of 267: with
        --bf16 every loss and gradient was off by up to 0.4%.
        """
        count = super()._get_num_items_in_batch(batch_samples, device)
        return count.long() if torch.is_tensor(count) else count


def train(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    output_dir = Path(training_args.output_dir or "")
    if not training_args.output_dir or not model_args.model_name_or_path or not data_args.data_path:
        raise UserError("--model_name_or_path, --data_path and --output_dir are needed (--help shows an example)")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(training_args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if training_args.model_max_length < 8:
        raise UserError("--model_max_length must leave room for a prompt and an answer: 512 is the recipe's")
    if training_args.eval_strategy != "no" and not (data_args.eval_data_path or data_args.eval_fraction):
        raise UserError("--eval_strategy needs held-out data: --eval_data_path or --eval_fraction")
    lora.check_arguments(training_args)
    distributed.check_packages(training_args)
    check_writable(output_dir, "--output_dir")
    checkpoint = choose_checkpoint(training_args.resume_from_checkpoint, output_dir)
    if os.path.exists(model_args.model_name_or_path) or model_args.model_name_or_path.startswith((".", "/")):
        check_model_folder(model_args.model_name_or_path, "--model_name_or_path")
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    train_records, eval_records = load_data(data_args, seed)
    begun = receipt.begin(data_args.data_path, data_args.eval_data_path)

    tokenizer = load_tokenizer(
        model_args.model_name_or_path,
        cache_dir=training_args.cache_dir,
        model_max_length=training_args.model_max_length,
        padding_side="right",
    )

    texts = [record["instruction"] + "\n" + record["output"] for record in train_records[:500]]
    findings = check_precision(training_args.bf16 and not training_args.use_cpu)
    findings += examples_and_tokenizer.mend_merges(tokenizer, texts)

    def load_base(dtype: torch.dtype = torch.float32, **options):
        model = load_model(model_args.model_name_or_path, dtype, cache_dir=training_args.cache_dir, **options)
        rows = distributed.rows(model.get_input_embeddings().weight)
        findings.extend(examples_and_tokenizer.check_tokenizer(tokenizer, rows, model.config))
        raise_errors(findings)  # before rows are added that would hide them
        if training_args.lora_r:
            lora.check_eos(tokenizer)
        add_special_tokens(tokenizer, model)
        tokenizer.chat_template = chat_template(tokenizer)  # in place of the base model's
        return model

    # float32 whatever the checkpoint's type: at a learning rate of 2e-5 most updates are lost in bf16's 8 bits.
    # --bf16 computes in bf16 over float32 weights. LoRA leaves these weights as they are.
    options = lora.base_options(training_args) if training_args.lora_r else {"dtype": torch.float32}
    if "quantization_config" not in options and not training_args.deepspeed:  # those load a layer at a time
        findings += check_loading(Path(model_args.model_name_or_path), options["dtype"])
        raise_errors(findings)
    model = load_base(**options)
    if training_args.lora_r:
        model = lora.add_adapter(model, training_args)
    if checkpoint:
        check_fits(checkpoint, model)

    max_length = training_args.model_max_length
    train_dataset = SupervisedDataset(train_records, tokenizer, max_length, "training")
    eval_dataset = SupervisedDataset(eval_records, tokenizer, max_length, "held-out") if eval_records else None
    _say("\n".join(dataset.summary for dataset in (train_dataset, eval_dataset) if dataset))
    rows, collator, self_check = make_batches(model, train_dataset, tokenizer.pad_token_id, data_args, training_args)
    training_args.remove_unused_columns = False
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=rows,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[self_check] if self_check else None,
    )
    trainer.check_resumed(checkpoint)
    preflight(trainer, findings, self_check, with_rehearsal=not training_args.skip_save_rehearsal)
    if training_args.preflight_only:
        return

    training_args.eval_on_start = eval_dataset is not None  # "before", to compare with
    trainer.train(resume_from_checkpoint=checkpoint)
    after = trainer.evaluate()["eval_loss"] if eval_dataset else None
    packing.set_attention(model, packing.library_attention(model))  # from here on it takes any batch again
    write = partial(lora.save, trainer, load_base=load_base) if training_args.lora_r else None
    trainer.save_whole_model(output_dir, write)
    trainer.save_state()
    if trainer.is_world_process_zero():
        arguments = {**vars(model_args), **vars(data_args), **training_args.to_dict()}
        counts = (len(train_dataset), len(eval_dataset) if eval_dataset else 0)
        written = receipt.write(receipt.collect(begun, trainer, arguments, counts), output_dir)
        _say(f"{', '.join(written)} in {output_dir}")
    _say(f"{trainer.state.global_step} steps on {len(train_dataset)} examples; model in {output_dir}")
    trainer.upload(output_dir)
    if eval_dataset:
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        _say(f"eval loss on {len(eval_dataset)} held-out examples: {losses[0]:.4f} before, {after:.4f} after")


class ArgumentParser(transformers.HfArgumentParser):
    """HfArgumentParser with errors of one line: without this, an unknown flag prints all 300 known ones."""

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def parse_args(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    parser = ArgumentParser((ModelArguments, DataArguments, TrainingArguments), description=__doc__, allow_abbrev=False)
    known = {name for action in parser._actions for name in action.option_strings}
    argv = distributed.translate_flags(sys.argv[1:] if argv is None else argv, known)
    for token in argv:
        flag = token.split("=")[0]
        if flag.startswith("--") and flag not in known:
            raise cli.unknown_flag(flag[2:], sorted(name[2:] for name in known))
    try:
        return parser.parse_args_into_dataclasses(args=argv)
    except (ValueError, ImportError) as e:  # TrainingArguments' own checks
        raise UserError(" ".join(str(e).split())) from None


def main() -> None:
    code = 0
    try:
        train(*parse_args())
    except Stopped as e:
        code = e.code
        _say(str(e))
    except UserError as e:
        # Under torchrun each process finds the same error, and one on each node says it, unless one alone may know.
        here = int(os.environ.get("LOCAL_RANK", 0)) == 0 or isinstance(e, RankError)
        sys.exit(f"error: {e}" if here else 1)
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
