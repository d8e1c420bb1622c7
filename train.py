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
"""

from __future__ import annotations

import copy
import os
import random
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch.utils.data import Dataset

import utils
from alpaca import UserError, cli
from alpaca.check_tokens import check_tokenizer, mend_merges
from alpaca.checkpoint import WEIGHTS, check_model_folder, read_json
from alpaca.inference import load_model, load_tokenizer
from alpaca.preflight import check_precision, preflight

IGNORE_INDEX = -100  # torch's cross entropy passes over it

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


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloaded models are kept."})
    optim: str = field(default="adamw_torch", metadata={"help": "The optimizer."})
    model_max_length: int = field(
        default=512, metadata={"help": "Longest example in tokens, prompt and answer; longer ones are cut."}
    )
    preflight_only: bool = field(default=False, metadata={"help": "Check everything, train nothing."})
    skip_save_rehearsal: bool = field(
        default=False, metadata={"help": "Do not save, reload and resume a step before the first one."}
    )
    # The original's flags that the library has since renamed: accepted, translated, told.
    evaluation_strategy: str | None = field(default=None, metadata={"help": "Old name of --eval_strategy."})
    warmup_ratio: float | None = field(default=None, metadata={"help": "Old name of --warmup_steps below 1."})
    fsdp_transformer_layer_cls_to_wrap: str | None = field(
        default=None, metadata={"help": "Not needed any more: the layer class is found by itself."}
    )

    def __post_init__(self):
        if self.evaluation_strategy is not None:
            _renamed("evaluation_strategy", "eval_strategy")
            self.eval_strategy = self.evaluation_strategy
        if self.warmup_ratio is not None:
            _renamed("warmup_ratio", f"warmup_steps {self.warmup_ratio:g} (below 1 it is a ratio)")
            self.warmup_steps = self.warmup_ratio
        if self.fsdp_transformer_layer_cls_to_wrap is not None:
            _say("--fsdp_transformer_layer_cls_to_wrap is not needed any more: the layer class is found by itself")
        # Cleared, so that a copy of these arguments does not translate them again over newer values.
        self.evaluation_strategy = self.warmup_ratio = self.fsdp_transformer_layer_cls_to_wrap = None
        if self.fsdp:
            self._set_up_fsdp()
        elif int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # else each process would train alone, and all of them write the result
        super().__post_init__()
        if self.fsdp and self.bf16:
            from torch.distributed.fsdp import MixedPrecisionPolicy

            # The default output type is bf16 as well, and that rounds the loss itself to 8 bits of mantissa.
            self.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
            )

    def _set_up_fsdp(self) -> None:
        if int(os.environ.get("WORLD_SIZE", 1)) < 2:
            raise UserError(
                "--fsdp shards over processes, and there is one: start with torchrun --nproc_per_node=N, or drop --fsdp"
            )
        if isinstance(self.fsdp_config, (str, os.PathLike)) and not str(self.fsdp_config).lstrip().startswith("{"):
            self.fsdp_config = read_json(Path(self.fsdp_config))
        if isinstance(self.fsdp, str) and self.fsdp != "True":
            words = self.fsdp.split()
            if unknown := set(words) - {"full_shard", "shard_grad_op", "auto_wrap", "offload"}:
                raise UserError(
                    f"--fsdp {' '.join(sorted(unknown))} is not known: use --fsdp --fsdp_config configs/fsdp.json"
                )
            if self.fsdp_config is None:
                self.fsdp_config = {}
                if "shard_grad_op" in words:
                    self.fsdp_config["reshard_after_forward"] = False
                if "offload" in words:
                    self.fsdp_config["cpu_offload"] = True
            _renamed(f'fsdp "{self.fsdp}"', "fsdp --fsdp_config configs/fsdp.json")
        self.fsdp = True
        if self.use_cpu or not torch.accelerator.is_available():
            # Without an accelerator the library would quietly train with DDP instead: FSDP is enabled only for a
            # process group that calls itself MULTI_GPU. The group is made here, so that it does.
            from accelerate import PartialState
            from accelerate.utils import DistributedType

            state = PartialState(cpu=True, backend="gloo")
            state.device, state.distributed_type = torch.device("cpu"), DistributedType.MULTI_GPU
            self.use_cpu = True
            self.accelerator_config = {"use_configured_state": True}


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _say(message: str) -> None:
    if _rank() == 0:
        print(message, flush=True)


def _renamed(old: str, new: str) -> None:
    _say(f"warning: --{old} is now --{new}")


# ---------------------------------------------------------------------------------------------------------------------
# Special tokens.


def add_special_tokens(tokenizer, model) -> int:
    """Gives the tokenizer the special tokens that it lacks, and the model a row for each new one.

    A new row is the float32 mean of the old ones, input and output embeddings apart, so that it starts no different
    from any token; the library's own mean_resizing adds noise to it.

    Returns:
        The number of tokens added to the vocabulary.
    """
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

    rows = model.get_input_embeddings().weight.shape[0]
    if (new := len(tokenizer) - rows) > 0:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        weights = [model.get_input_embeddings().weight]
        if not model.config.tie_word_embeddings and model.get_output_embeddings() is not None:
            weights.append(model.get_output_embeddings().weight)
        with torch.no_grad():
            for weight in weights:
                weight[-new:] = weight[:-new].mean(dim=0, keepdim=True)
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.bos_token_id = tokenizer.bos_token_id
    return len(tokenizer) - before


# ---------------------------------------------------------------------------------------------------------------------
# Records → tokens → batches.


def preprocess(records: list[dict], tokenizer, max_length: int) -> list[dict]:
    """Tokenises records into ``{"input_ids": [int], "labels": [int]}``, cut to max_length tokens.

    The text is prompt + output + EOS, tokenised as a whole. Labels are IGNORE_INDEX for each token that starts inside
    the prompt; that is the original's rule (a prompt's own tokens need not be a prefix of the whole's), in one pass
    instead of two. A special token that is written out in the data, such as "</s>", stays text.
    """
    if not tokenizer.is_fast:
        raise UserError("this tokenizer has no offsets: convert it to a tokenizer.json (AutoTokenizer, use_fast)")
    prompts = [utils.format_prompt(record["instruction"], record["input"]) for record in records]
    texts = [prompt + record["output"] for prompt, record in zip(prompts, records, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "longer than the maximum": cut below, after EOS is in place
        encoded = tokenizer(
            texts, return_offsets_mapping=True, return_attention_mask=False, split_special_tokens=True, verbose=False
        )
    examples = []
    for prompt, ids, offsets in zip(prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        labels = [
            IGNORE_INDEX if start < len(prompt) else token for token, (start, _) in zip(ids, offsets, strict=True)
        ]
        if ids[-1] != tokenizer.eos_token_id:  # else the tokenizer itself appends it
            ids, labels = ids + [tokenizer.eos_token_id], labels + [tokenizer.eos_token_id]
        else:
            labels = labels[:-1] + [tokenizer.eos_token_id]
        examples.append({"input_ids": ids[:max_length], "labels": labels[:max_length]})
    return examples


class SupervisedDataset(Dataset):
    """Tokenised records. Those whose prompt alone fills max_length have nothing to learn from and are left out."""

    def __init__(self, records: list[dict], tokenizer, max_length: int, name: str):
        examples = preprocess(records, tokenizer, max_length)
        self.examples = [example for example in examples if set(example["labels"]) != {IGNORE_INDEX}]
        dropped = len(examples) - len(self.examples)
        cut = sum(example["input_ids"][-1] != tokenizer.eos_token_id for example in self.examples)
        tokens = sum(len(example["input_ids"]) for example in self.examples)
        _say(
            f"{name}: {len(self.examples)} examples, {tokens} tokens; {cut} cut to {max_length} tokens, "
            f"{dropped} left out (the prompt alone is longer)"
        )
        if not self.examples:
            raise UserError(f"no example of the {name} data fits in {max_length} tokens: raise --model_max_length")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> dict:
        return self.examples[i]


@dataclass
class DataCollatorForSupervisedDataset:
    """Pads on the right to the longest of the batch: int64 tensors of shape (batch, longest).

    The attention mask comes from the lengths: where pad and EOS are one token, comparing ids would hide EOS.
    """

    pad_token_id: int

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        longest = int(lengths.max())

        def padded(key: str, value: int) -> torch.Tensor:
            return torch.tensor([example[key] + [value] * (longest - len(example[key])) for example in examples])

        return {
            "input_ids": padded("input_ids", self.pad_token_id),
            "labels": padded("labels", IGNORE_INDEX),
            "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
        }


def load_data(data_args: DataArguments, seed: int) -> tuple[list[dict], list[dict]]:
    """The records to train on and those held out (maybe none)."""
    records = utils.load_records(data_args.data_path)
    if data_args.eval_data_path:
        return records, utils.load_records(data_args.eval_data_path)
    if not 0 <= data_args.eval_fraction < 1:  # NaN fails too
        raise UserError(f"--eval_fraction {data_args.eval_fraction} must leave records to train on: take 0 to 0.5")
    held_out = round(len(records) * data_args.eval_fraction)
    if held_out == len(records):
        raise UserError(f"--eval_fraction {data_args.eval_fraction} must leave records to train on: take 0 to 0.5")
    if data_args.eval_fraction and not held_out:
        raise UserError(f"--eval_fraction {data_args.eval_fraction} of {len(records)} records is none: raise it")
    chosen = set(random.Random(seed).sample(range(len(records)), held_out))
    return (
        [record for i, record in enumerate(records) if i not in chosen],
        [record for i, record in enumerate(records) if i in chosen],
    )


# ---------------------------------------------------------------------------------------------------------------------
# The run.


class Trainer(transformers.Trainer):
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Under FSDP a tied output embedding is gathered as a tensor of its own; saved, it would be stored twice."""
        for name in getattr(self.model, "all_tied_weights_keys", {}) if state_dict else ():
            state_dict.pop(name, None)
        super()._save(output_dir, state_dict)

    def save_whole_model(self, output_dir: Path) -> None:
        """Writes the model as safetensors, gathered tensor by tensor in CPU memory on rank 0."""
        if self.is_fsdp_enabled:
            # With SHARDED_STATE_DICT save_model writes nothing, and says nothing.
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        self.save_model(output_dir)
        if self.is_world_process_zero() and not any((output_dir / name).exists() for name in WEIGHTS):
            raise RuntimeError(f"the library saved no weights in {output_dir}; the checkpoints there are whole")


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
    resume = training_args.resume_from_checkpoint
    if resume and not (Path(resume) / "trainer_state.json").exists():
        raise UserError(f"--resume_from_checkpoint {resume} is no checkpoint (no trainer_state.json)")
    output_dir.mkdir(parents=True, exist_ok=True)  # what cannot be made is told before the model is loaded
    if not training_args.resume_from_checkpoint and any((output_dir / name).exists() for name in WEIGHTS):
        raise UserError(f"--output_dir {output_dir} holds a trained model: remove it, or choose another folder")
    if os.path.exists(model_args.model_name_or_path) or model_args.model_name_or_path.startswith((".", "/")):
        check_model_folder(model_args.model_name_or_path, "--model_name_or_path")
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    train_records, eval_records = load_data(data_args, seed)

    tokenizer = load_tokenizer(
        model_args.model_name_or_path,
        cache_dir=training_args.cache_dir,
        model_max_length=training_args.model_max_length,
        padding_side="right",
    )
    # float32 whatever the checkpoint's type: at a learning rate of 2e-5 most updates are lost in bf16's 8 bits.
    # --bf16 computes in bf16 over float32 weights.
    model = load_model(model_args.model_name_or_path, torch.float32, cache_dir=training_args.cache_dir)
    rows = model.get_input_embeddings().weight.shape[0]
    texts = [record["instruction"] + "\n" + record["output"] for record in train_records[:500]]
    findings = check_precision(training_args.bf16) + mend_merges(tokenizer, texts)
    findings += check_tokenizer(tokenizer, rows, model.config)
    add_special_tokens(tokenizer, model)

    max_length = training_args.model_max_length
    train_dataset = SupervisedDataset(train_records, tokenizer, max_length, "training")
    eval_dataset = SupervisedDataset(eval_records, tokenizer, max_length, "held-out") if eval_records else None
    training_args.remove_unused_columns = False
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=DataCollatorForSupervisedDataset(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    preflight(trainer, findings, with_rehearsal=not training_args.skip_save_rehearsal)
    if training_args.preflight_only:
        return

    training_args.eval_on_start = eval_dataset is not None  # "before", to compare with
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint or None)
    after = trainer.evaluate()["eval_loss"] if eval_dataset else None
    trainer.save_whole_model(output_dir)
    trainer.save_state()
    _say(f"{trainer.state.global_step} steps on {len(train_dataset)} examples; model in {output_dir}")
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
    for token in sys.argv[1:] if argv is None else argv:
        flag = token.split("=")[0]
        if flag.startswith("--") and flag not in known:
            raise cli.unknown_flag(flag[2:], sorted(name[2:] for name in known))
    try:
        return parser.parse_args_into_dataclasses(args=copy.copy(argv))
    except (ValueError, ImportError) as e:  # TrainingArguments' own checks
        raise UserError(" ".join(str(e).split())) from None


def main() -> None:
    try:
        train(*parse_args())
    except UserError as e:
        # Under torchrun each process finds the same error; one on each node says it.
        sys.exit(f"error: {e}" if int(os.environ.get("LOCAL_RANK", 0)) == 0 else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as e:
        sys.exit(f"error: {cli.os_error_message(e)}")
    except SafetensorError as e:  # how a full disk shows itself while weights are written
        sys.exit(f"error: the weights could not be written: {str(e).splitlines()[0]}")
    if torch.distributed.is_initialized():
        # Leave together: a rank that exits while another still writes tears down connections under it.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
