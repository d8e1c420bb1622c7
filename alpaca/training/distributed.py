"""How a run is distributed: process groups, and FSDP or DeepSpeed set up so that they are really on.

``before_init`` and ``after_init`` work on train.py's TrainingArguments, around the library's own ``__post_init__``.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from pathlib import Path

import torch
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available

from alpaca import UserError
from alpaca.common.cli import say
from alpaca.weights.checkpoint import read_json


def before_init(args) -> None:
    """Settle on ``args`` what the library would refuse, ignore, or do by halves.

    Raises:
        UserError: bf16 on a GPU without it; FSDP with one process, or in words that FSDP2 does not know; DeepSpeed
            without torchrun or the package.
    """
    _translate_fsdp(args)
    gpu = torch.accelerator.is_available() and not args.use_cpu
    if args.tf32 and not (gpu and is_torch_tf32_available()):
        say("warning: tf32 is ignored: it needs an NVIDIA GPU, Ampere or newer")
        args.tf32 = None
    emulated = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    if (args.bf16 or args.bf16_full_eval) and gpu and (emulated or not is_torch_bf16_gpu_available()):
        raise UserError("this GPU has no bf16 (emulated, it is many times slower): use fp16, or neither")
    if args.fsdp and args.deepspeed:
        raise UserError("fsdp and deepspeed both shard the model: drop one of them")
    if args.fsdp:
        _set_up_fsdp(args, gpu)
    elif args.deepspeed:
        _set_up_deepspeed(args, gpu)
    elif not gpu:
        # Without this, each of several processes would train alone, and all of them would write the result.
        args.use_cpu = True


def after_init(args) -> None:
    """Set what needs the library's finished arguments: one GPU a process, and FSDP's types under bf16."""
    if (gpus := getattr(args, "_n_gpu", 1)) > 1:
        # The library would split each batch over all of them by nn.DataParallel, and multiply the batch size. Private,
        # as it has no argument for the number of GPUs (5.23).
        say(f"note: one GPU of {gpus} is used; torchrun --nproc_per_node={gpus} train.py … uses them all")
        args._n_gpu = 1
    if args.fsdp and args.bf16:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # The default output type is bf16 as well, and that rounds the loss itself to 8 bits of mantissa.
        args.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
        )


def _translate_fsdp(args) -> None:
    """Put what the words of ``args.fsdp`` mean, such as "full_shard auto_wrap", into ``args.fsdp_config``.

    ``args.fsdp`` becomes True, or None where it is off.

    Raises:
        UserError: a word that FSDP2 does not know.
    """
    if args.fsdp in (None, False, "", "False", "false"):
        args.fsdp = None
    words = set() if args.fsdp in (None, True, "True", "true") else set(args.fsdp.split())
    if unknown := words - {"full_shard", "shard_grad_op", "auto_wrap", "offload"}:
        raise UserError(f"--fsdp {' '.join(sorted(unknown))} is not known: use --fsdp with configs/fsdp.json")
    if words:
        file = "fsdp_offload.json" if "offload" in words else "fsdp.json"
        say(f'warning: --fsdp "{args.fsdp}" is now --fsdp --fsdp_config configs/{file}')
        meant = {"reshard_after_forward": False} if "shard_grad_op" in words else {}
        meant |= {"cpu_offload": True} if "offload" in words else {}
        args.fsdp_config = meant | read_config(args.fsdp_config)
    args.fsdp = args.fsdp and True


def _set_up_fsdp(args, gpu: bool) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        raise UserError("fsdp shards over processes, and there is only one: start more with torchrun, or leave it out")
    args.fsdp_config = read_config(args.fsdp_config)
    if args.fsdp_config.get("version", 2) != 2:
        raise UserError(f"fsdp_config has version {args.fsdp_config['version']}: leave it out, FSDP2 is used")
    args.fsdp_config.setdefault("state_dict_type", "SHARDED_STATE_DICT")  # the library's default gathers each save
    if args.fsdp_config.get("cpu_offload"):
        # While gradients accumulate, each GPU would hold all of them, unsharded: 27 GB for 7B in float32.
        config = read_config(args.accelerator_config)
        more = config.get("gradient_accumulation_kwargs") or {}
        args.accelerator_config = config | {"gradient_accumulation_kwargs": {"sync_each_batch": True} | more}
    if gpu and args.fsdp_config.get("cpu_offload"):
        # The norm of gradients in the CPU's memory is summed over the processes there: NCCL alone cannot.
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}
    if not gpu:
        if args.fsdp_config.pop("cpu_offload", False):
            say("note: cpu_offload is ignored: without a GPU everything is in the CPU's memory already")
        # Without an accelerator the library would quietly train with DDP instead: FSDP is enabled only for a process
        # group that calls itself MULTI_GPU. The group is made here, so that it does.
        _configure_cpu_state(args, "MULTI_GPU")


def _set_up_deepspeed(args, gpu: bool) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "DeepSpeed is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.19.8; "
            "or use FSDP with configs/fsdp_offload.json, which does the same without it"
        )
    if "LOCAL_RANK" not in os.environ:
        raise UserError("DeepSpeed needs torchrun, also with one GPU: torchrun --nproc_per_node=1 train.py …")
    config = args.deepspeed = read_config(args.deepspeed)
    if "scheduler" in config:
        schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        say(f"warning: the scheduler of the DeepSpeed file replaces lr_scheduler_type {schedule}: remove it there")
    zero = config.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        say("warning: stage3_gather_16bit_weights_on_model_save is set: without it no model.safetensors is written")
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if not gpu:
        for part in ("offload_optimizer", "offload_param"):  # both need a GPU: pinned memory, and a place to leave
            zero.pop(part, None)
        _configure_cpu_state(args, "DEEPSPEED")


def _configure_cpu_state(args, distributed_type: str) -> None:
    """Make the process group of CPUs, under the name from which the library infers what it may do with it."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if distributed_type == "DEEPSPEED":
        os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
        import deepspeed

        deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False)
    state = PartialState(cpu=True, backend="gloo")
    state.device, state.distributed_type = torch.device("cpu"), DistributedType(distributed_type)
    args.use_cpu = True
    args.accelerator_config = read_config(args.accelerator_config) | {"use_configured_state": True}


def read_config(config) -> dict:
    """Return a configuration that is a file, JSON text, a dictionary, the library's object, or None (empty)."""
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
