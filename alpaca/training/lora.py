"""LoRA and QLoRA through ``peft``: the base stays as it is, small matrices beside its linear layers are trained.

W x becomes W x + (alpha / r) · B A x, with A (r, in) random and B (out, r) zero at first (Hu et al., 2021,
arXiv:2106.09685). The result is two folders: the adapter alone, and the model with B A added to its weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from alpaca import UserError
from alpaca.inference.adapters import check_adapter, need_peft

FOLDER = "adapter"  # in the output folder; beside it stands the merged model


def check_arguments(args) -> None:
    """Raises UserError for flags that do not go together; ``args`` has lora_r, lora_alpha, …, as in train.py."""
    if args.lora_r < 0 or args.lora_alpha <= 0 or not 0 <= args.lora_dropout < 1:
        raise UserError("--lora_r must be at least 0, --lora_alpha above 0 and --lora_dropout from 0 to below 1")
    if args.load_in_4bit and not args.lora_r:
        raise UserError("--load_in_4bit trains an adapter beside frozen weights: give --lora_r too (16 is usual)")
    if args.load_in_4bit and args.fsdp:
        raise UserError("--load_in_4bit does not shard: drop --fsdp (each GPU then holds the 4-bit model)")
    if args.lora_r and args.deepspeed:
        raise UserError("--lora_r does not go with --deepspeed: use --fsdp, which shards the frozen weights as well")
    if args.lora_r:
        need_peft()


def base_options(args) -> dict:
    """What ``from_pretrained`` needs to load the base: its ``dtype``, and how it is quantised.

    A frozen base needs no float32: nothing is added to it. Where the run computes in 16 bits it is kept in 16 bits,
    which is what makes 7B fit 24 GB. Under FSDP it stays float32, as the parameters of one shard group share a type.
    """
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    if not args.load_in_4bit:
        return {"dtype": torch.float32 if args.fsdp else half}
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError("--load_in_4bit needs bitsandbytes: pip install 'alpaca-reproduced[qlora]'") from None
    # nf4, twice quantised: Dettmers et al., 2023, arXiv:2305.14314
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=half
    )
    return {"dtype": half, "quantization_config": quantization, "device_map": {"": args.device}}


def add_adapter(model, args):
    """A PeftModel in which only LoRA matrices (float32) are trained, on every linear layer but the output embedding."""
    peft = need_peft()
    if args.load_in_4bit:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = peft.LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear",  # found by their class; peft leaves the output embedding out
        task_type="CAUSAL_LM",
    )
    transformers.set_seed(args.seed)  # A is random: the same on each rank, and in each run with this seed
    model = peft.get_peft_model(model, config)
    # Where peft knows the base it finds that the vocabulary grew by [PAD], and stores the embeddings in each checkpoint
    # too: 1 GB at 7B for rows that are not trained. save() puts the name back.
    model.active_peft_config.base_model_name_or_path = None
    if args.gradient_checkpointing or getattr(args, "activation_checkpointing", False):
        model.enable_input_require_grads()  # else it cuts the graph at the frozen embedding
    return model


def check_eos(tokenizer) -> None:
    """Raises UserError if the tokenizer lacks an EOS, which would be a new token: no linear layer trains its row."""
    if not tokenizer.eos_token:
        raise UserError(
            "--lora_r trains no embeddings, and this tokenizer's EOS is a new token: its answers would never end. "
            "Take a base whose tokenizer has an EOS, or train without --lora_r"
        )


def save(trainer, output_dir: Path, load_base: Callable[[], torch.nn.Module]) -> None:
    """Writes the merged model into a folder, and the adapter into ``adapter`` in it. Every rank calls it.

    The adapter has no embedding rows: those that --lora_r adds for [PAD] are the mean of the others, and stay so. It
    loads on the base as it is.

    Args:
        trainer: of a PeftModel.
        output_dir: where to.
        load_base: gives the base in float32 on the CPU, with a row for each token; called by rank 0.

    Raises:
        UserError: the adapter is empty, or changes nothing.
    """
    state = None
    if trainer.is_fsdp_enabled:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        state = get_model_state_dict(trainer.model, options=options)
    if not trainer.is_world_process_zero():
        return
    adapter, tokenizer = output_dir / FOLDER, trainer.processing_class
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.active_peft_config.base_model_name_or_path = model.get_base_model().config._name_or_path
    model.save_pretrained(adapter, state_dict=state, save_embedding_layers=False)
    model.active_peft_config.base_model_name_or_path = None
    tokenizer.save_pretrained(adapter)
    check_adapter(adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the vocabulary grew
        merged = need_peft().PeftModel.from_pretrained(load_base(), adapter).merge_and_unload()
    merged.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
