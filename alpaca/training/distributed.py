"""How a run starts: 2023's flags in today's words, and FSDP or DeepSpeed set up so that it is really on.

``translate_flags`` works on the command line, before it is parsed; ``before_init`` and ``after_init`` on train.py's
TrainingArguments, around the library's own ``__post_init__``.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import transformers
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import is_liger_kernel_available, is_torch_bf16_gpu_available, is_torch_tf32_available

from alpaca import UserError
from alpaca.weights.checkpoint import read_json

# 2023's flags that the library refuses today, as its 4.28 to 4.46 had them → (today's flag or None, what to say).
# A flag without a successor is dropped: None here means that its value does not matter either.
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
# Flags that switched something on: True becomes these words, False becomes none.
SWITCHES = {
    "group_by_length": ("--train_sampling_strategy", "group_by_length"),
    "adafactor": ("--optim", "adafactor"),
}
REMOVED = {
    "fsdp_transformer_layer_cls_to_wrap": "the layer class is found by itself",
    "fsdp_min_num_params": "each decoder layer is sharded by itself",
    "overwrite_output_dir": "a trained model is never overwritten: remove the folder, or choose another",
    "save_safetensors": "weights are always saved as safetensors",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "sharded_ddp": "use --fsdp --fsdp_config configs/fsdp.json",
    "half_precision_backend": "--bf16 is enough",
    "fp16_backend": "--bf16 is enough",
    "fp16_opt_level": "--bf16 is enough",
    "torchdynamo": "use --torch_compile",
    "use_mps_device": "an Apple GPU is used when there is one",
    "xpu_backend": "use --ddp_backend",
    "dispatch_batches": "put it into --accelerator_config",
    "split_batches": "put it into --accelerator_config",
    "push_to_hub_organization": "put it into --hub_model_id",
} | dict.fromkeys(
    ("jit_mode_eval", "use_ipex", "tpu_num_cores", "tpu_metrics_debug", "past_index", "use_legacy_prediction_loop")
    + ("include_inputs_for_metrics", "mp_parameters", "ray_scope"),
    "the library has dropped it",
)


def say(message: str) -> None:
    """Prints on the first process alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, flush=True)


def world_size() -> int:
    """The number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


# ---------------------------------------------------------------------------------------------------------------------
# Flags.


def translate_flags(argv: list[str], known: set[str]) -> list[str]:
    """Writes a command line of 2023 in today's words, with one warning for each flag that changed.

    Args:
        argv: the arguments, as ``--flag value`` or ``--flag=value``.
        known: flags (with their dashes) that the parser has: what the library in use still accepts is left alone.

    Raises:
        UserError: a warm-up ratio that is none.
    """
    out, words = [], list(argv)
    given = {word.split("=")[0] for word in argv}
    while words:
        word = words.pop(0)
        flag, has_value, value = word.partition("=")
        name = flag[2:]
        if flag in known or name not in RENAMED | SWITCHES | REMOVED:
            out.append(word)
            continue
        if not has_value and words and not words[0].startswith("--"):
            has_value, value = " ", words.pop(0)
        if name in REMOVED:
            say(f"warning: {flag} is not needed any more: {REMOVED[name]}")
        elif name in SWITCHES:
            say(f"warning: {flag} is now {' '.join(SWITCHES[name])}")
            out += SWITCHES[name] if value.lower() in ("", "true", "1", "yes") else ()
        elif f"--{RENAMED[name]}" in given:
            say(f"warning: {flag} is now --{RENAMED[name]}, which is given as well: {flag} is ignored")
        else:
            ratio = f" {_ratio(value)} (below 1 it is a ratio)" if name == "warmup_ratio" else ""
            say(f"warning: {flag} is now --{RENAMED[name]}{ratio}")
            out += [f"--{RENAMED[name]}", value] if has_value else [f"--{RENAMED[name]}"]
    return out


def _ratio(text: str) -> str:
    try:
        if 0 <= float(text) < 1:
            return text
    except ValueError:
        pass
    raise UserError(f"--warmup_ratio {text} is no share of the steps: take 0 to 0.99, or --warmup_steps")


# ---------------------------------------------------------------------------------------------------------------------
# Hardware, FSDP, DeepSpeed.


def before_init(args) -> None:
    """Settles on ``args`` (train.py's TrainingArguments) what the library would refuse, ignore, or do by halves.

    Raises:
        UserError: bf16 where the GPU has none; --fsdp with one process, or --deepspeed without torchrun or the package.
    """
    gpu = torch.accelerator.is_available() and not args.use_cpu
    if args.tf32 and not (gpu and is_torch_tf32_available()):
        say("warning: --tf32 needs an NVIDIA GPU from Ampere on, and here is none: ignored")
        args.tf32 = None
    if args.bf16 or args.bf16_full_eval:
        if gpu and not is_torch_bf16_gpu_available():
            raise UserError("--bf16 is not supported by this GPU: drop it to train in float32, or take --fp16 True")
    if args.fsdp in ("False", "false"):
        args.fsdp = None
    if args.fsdp and args.deepspeed:
        raise UserError("--fsdp and --deepspeed both shard the model: drop one of them")
    if args.fsdp:
        _set_up_fsdp(args, gpu)
    elif args.deepspeed:
        _set_up_deepspeed(args, gpu)
    elif not gpu:
        # With more than one process, each would else train alone, and all of them write the result.
        args.use_cpu = True


def after_init(args) -> None:
    """What needs the library's finished arguments: one GPU a process, and FSDP's types under --bf16."""
    if (gpus := getattr(args, "_n_gpu", 1)) > 1:
        # The library would split each batch over all of them by nn.DataParallel, and multiply the batch size.
        say(f"note: one GPU of {gpus} is used; torchrun --nproc_per_node={gpus} train.py … uses them all")
        args._n_gpu = 1
    if args.fsdp and args.bf16:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # The default output type is bf16 as well, and that rounds the loss itself to 8 bits of mantissa.
        args.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
        )


def _set_up_fsdp(args, gpu: bool) -> None:
    if world_size() < 2:
        raise UserError(
            "--fsdp shards over processes, and there is one: start with torchrun --nproc_per_node=N, or drop --fsdp"
        )
    args.fsdp_config = _config(args.fsdp_config)
    if args.fsdp_config.get("version", 2) != 2:
        raise UserError(f"--fsdp_config has version {args.fsdp_config['version']}: leave it out, FSDP2 is what is used")
    words = [] if args.fsdp is True or args.fsdp in ("True", "true") else str(args.fsdp).split()
    if unknown := set(words) - {"full_shard", "shard_grad_op", "auto_wrap", "offload"}:
        raise UserError(f"--fsdp {' '.join(sorted(unknown))} is not known: use --fsdp --fsdp_config configs/fsdp.json")
    if words:
        if "shard_grad_op" in words:
            args.fsdp_config.setdefault("reshard_after_forward", False)
        if "offload" in words:
            args.fsdp_config.setdefault("cpu_offload", True)
        file = "fsdp_offload.json" if "offload" in words else "fsdp.json"
        say(f'warning: --fsdp "{args.fsdp}" is now --fsdp --fsdp_config configs/{file}')
    args.fsdp = True
    args.fsdp_config.setdefault("state_dict_type", "SHARDED_STATE_DICT")  # the library's default gathers each save
    if args.fsdp_config.get("cpu_offload"):
        # While gradients accumulate, each GPU would hold all of them, unsharded: 27 GB for 7B in float32.
        config = _config(args.accelerator_config)
        more = config.get("gradient_accumulation_kwargs") or {}
        args.accelerator_config = config | {"gradient_accumulation_kwargs": {"sync_each_batch": True} | more}
    if gpu and args.fsdp_config.get("cpu_offload"):
        # The norm of gradients that are in the CPU's memory is summed over the processes there: NCCL alone cannot.
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}
    if not gpu:
        if args.fsdp_config.pop("cpu_offload", False):
            say("note: cpu_offload is ignored: without a GPU everything is in the CPU's memory already")
        # Without an accelerator the library would quietly train with DDP instead: FSDP is enabled only for a process
        # group that calls itself MULTI_GPU. The group is made here, so that it does.
        from accelerate.utils import DistributedType

        _configure_cpu_state(args, DistributedType.MULTI_GPU)


def _set_up_deepspeed(args, gpu: bool) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "--deepspeed needs the package: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.19.8; "
            "or use --fsdp --fsdp_config configs/fsdp_offload.json, which does the same without it"
        )
    if "LOCAL_RANK" not in os.environ:
        raise UserError("--deepspeed starts under torchrun, with one GPU too: torchrun --nproc_per_node=1 train.py …")
    config = args.deepspeed = _config(args.deepspeed)
    if "scheduler" in config:
        say(
            f"warning: the scheduler of the --deepspeed file takes the place of --lr_scheduler_type "
            f"{getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}: remove it from the file"
        )
    zero = config.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        say("warning: stage3_gather_16bit_weights_on_model_save is set: without it no model.safetensors is written")
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if not gpu:
        for part in ("offload_optimizer", "offload_param"):  # pinned memory and a second home are a GPU's
            zero.pop(part, None)
        from accelerate.utils import DistributedType

        _configure_cpu_state(args, DistributedType.DEEPSPEED)


def _configure_cpu_state(args, distributed_type) -> None:
    """Makes the process group of CPUs, under the name by which the library tells what it may do with it."""
    if distributed_type == "DEEPSPEED":
        os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
        import deepspeed

        deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False)
    from accelerate import PartialState

    state = PartialState(cpu=True, backend="gloo")
    state.device, state.distributed_type = torch.device("cpu"), distributed_type
    args.use_cpu = True
    args.accelerator_config = _config(args.accelerator_config) | {"use_configured_state": True}


def _config(config) -> dict:
    """A configuration given as a file, as JSON text, as a dictionary or not at all."""
    if config is None:
        return {}
    if not isinstance(config, (str, os.PathLike)):
        return copy.deepcopy(config if isinstance(config, dict) else config.to_dict())
    if str(config).lstrip().startswith("{"):
        try:
            return json.loads(config)
        except ValueError as e:
            raise UserError(f"the configuration {config} is malformed: {e}") from None
    return read_json(Path(config))


def check_packages(args) -> None:
    """Asks for what --optim, --report_to and --use_liger_kernel need, before a model is loaded.

    Raises:
        UserError: a package is missing, or the optimizer refuses its arguments.
    """
    if not 0 <= args.learning_rate < math.inf:  # NaN fails too
        raise UserError(f"--learning_rate {args.learning_rate} is no rate: 2e-5 is the recipe's for 7B")
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise UserError("--use_liger_kernel needs the package: pip install liger-kernel (and a GPU)")
    needs_model = ("galore", "apollo", "lomo")  # these are asked for their package when the optimizer is made
    try:
        for reporter in get_reporting_integration_callbacks(args.report_to):
            reporter()
        if not any(name in str(args.optim) for name in needs_model):
            transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, RuntimeError, ValueError, AssertionError) as e:
        raise UserError(" ".join(str(e).split())) from None


# ---------------------------------------------------------------------------------------------------------------------
# DeepSpeed's ZeRO-3 holds a share of each parameter on each process, from from_pretrained on.


def rows(weight: torch.Tensor) -> int:
    """The first dimension of a parameter, also of one that is partitioned."""
    return getattr(weight, "ds_shape", weight.shape)[0]


def gathered(weights: list[torch.Tensor]) -> AbstractContextManager:
    """Within it, partitioned parameters are whole; what the first process changes is kept. Else it does nothing."""
    if not any(hasattr(weight, "ds_id") for weight in weights):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(weights, modifier_rank=0)
