"""The original's flags, and others of 2023, in today's words. The one module of the package that names flags."""

from __future__ import annotations

from alpaca import UserError
from alpaca.common.cli import say

# What transformers 4.28 to 4.46 accepted and today's refuses.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # below 1 it is a ratio
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "include_tokens_per_second": "include_num_input_tokens_seen",
}
# Flags that switched something on: True becomes this flag and value, False becomes nothing.
SWITCHES = {
    "group_by_length": ("train_sampling_strategy", "group_by_length"),
    "adafactor": ("optim", "adafactor"),
}
# Flags without a successor that takes the same value: they are dropped, and the warning says this.
REMOVED = {
    "fsdp_transformer_layer_cls_to_wrap": "the layer class is found automatically",
    "fsdp_min_num_params": "each decoder layer is sharded on its own",
    "overwrite_output_dir": "a trained model is never overwritten; remove the folder, or choose another",
    "save_safetensors": "weights are always saved as safetensors",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "use_mps_device": "an Apple GPU is used if there is one",
}
INSTEAD = {
    "sharded_ddp": "fsdp",
    "half_precision_backend": "bf16",
    "fp16_backend": "bf16",
    "fp16_opt_level": "bf16",
    "torchdynamo": "torch_compile",
    "xpu_backend": "ddp_backend",
    "dispatch_batches": "accelerator_config",
    "split_batches": "accelerator_config",
    "push_to_hub_organization": "hub_model_id",
}
REMOVED |= {old: f"use --{new}" for old, new in INSTEAD.items()}
REMOVED |= dict.fromkeys(
    ("jit_mode_eval", "use_ipex", "tpu_num_cores", "tpu_metrics_debug", "past_index", "use_legacy_prediction_loop")
    + ("include_inputs_for_metrics", "mp_parameters", "ray_scope"),
    "transformers has dropped it",
)
ALL = {*RENAMED, *SWITCHES, *REMOVED}


def translate_flags(argv: list[str], known: set[str]) -> list[str]:
    """Return a command line of 2023 in today's words; print one warning for each flag that changed.

    Args:
        argv: the arguments; a value follows its flag, or an equals sign in the same word.
        known: flags (with their dashes) that the parser has: what the library in use still accepts is left alone.

    Raises:
        UserError: a warm-up ratio that is not from 0 to below 1.
    """
    out, words = [], list(argv)
    given = {word.split("=")[0] for word in argv}
    while words:
        word = words.pop(0)
        flag, has_value, value = word.partition("=")
        name = flag[2:]
        if flag in known or name not in ALL:
            out.append(word)
            continue
        if not has_value and words and not words[0].startswith("--"):
            has_value, value = " ", words.pop(0)
        if name in REMOVED:
            say(f"warning: {flag} is ignored: {REMOVED[name]}")
        elif name in SWITCHES:
            new, wanted = f"--{SWITCHES[name][0]}", SWITCHES[name][1]
            say(f"warning: {flag} is now {new} {wanted}")
            out += (new, wanted) if value.lower() in ("", "true", "1", "yes") else ()
        elif (new := f"--{RENAMED[name]}") in given:
            say(f"warning: {flag} is now {new}, which is given as well: {flag} is ignored")
        else:
            ratio = f" {_ratio(value)} (below 1 it is a ratio)" if name == "warmup_ratio" else ""
            say(f"warning: {flag} is now {new}{ratio}")
            out += [new, value] if has_value else [new]
    return out


def _ratio(text: str) -> str:
    try:
        if 0 <= float(text) < 1:
            return text
    except ValueError:
        pass
    raise UserError(f"--warmup_ratio {text} is not a share of the steps: use 0 to 0.99, or --warmup_steps")
