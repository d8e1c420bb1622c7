"""How a run is distributed: process groups, and FSDP or DeepSpeed set up so that they are really used.

``before_init`` and ``after_init`` work on train.py's TrainingArguments, around the library's own ``__post_init__``.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.utils import is_torch_tf32_available

from alpaca import UserError
from alpaca.common.cli import say
from alpaca.weights.checkpoint import read_json


def before_init(args) -> None:
    """Set on ``args`` what the library would refuse, ignore, or do only in part.

    Raises:
        UserError: bf16, FSDP or DeepSpeed is not available, or not as requested.
    """
    gpu = torch.accelerator.is_available() and not args.use_cpu
    if args.tf32 and not (gpu and is_torch_tf32_available()):
        say("warning: tf32 is ignored: it needs an NVIDIA GPU, Ampere or newer")
        args.tf32 = None
    if (args.bf16 or args.bf16_full_eval) and gpu and torch.cuda.is_available():
        if not torch.cuda.is_bf16_supported(including_emulation=False):  # the library lets emulation pass
            raise UserError("this GPU has no bf16 (emulation is many times slower): use fp16, or neither")
    _translate_fsdp(args)
    if args.fsdp and args.deepspeed:
        raise UserError("fsdp and deepspeed both shard the model: drop one of them")
    if args.fsdp:
        _set_up_fsdp(args, gpu)
    elif args.deepspeed:
        _set_up_deepspeed(args, gpu)
    elif not gpu:
        # Otherwise each of several processes would train alone, and all of them would write the result.
        args.use_cpu = True


def after_init(args) -> None:
    """Set what needs the library's finished arguments: one GPU per process, and FSDP's types under bf16."""
    if (gpus := getattr(args, "_n_gpu", 1)) > 1:
        # The library would split each batch over all of them by nn.DataParallel, and multiply the batch size. Private,
        # as there is no argument for the number of GPUs (5.23).
        say(f"note: using one of {gpus} GPUs; to use all, run torchrun --nproc_per_node={gpus} train.py …")
        args._n_gpu = 1
    if args.fsdp and args.bf16:
        # The default output type is also bf16, which rounds the loss itself to 8 bits of mantissa.
        args.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
        )


def _translate_fsdp(args) -> None:
    """Make ``args.fsdp`` True or None; put "offload" of the original's words into ``args.fsdp_config``."""
    words = str(args.fsdp or False).lower().split()
    args.fsdp = None if words == ["false"] else True
    if words in (["false"], ["true"]):
        return
    if unknown := set(words) - {"full_shard", "auto_wrap", "offload"}:
        raise UserError(f"--fsdp {' '.join(sorted(unknown))} is unknown: use --fsdp with configs/fsdp.json")
    offload = "offload" in words
    file = "fsdp_offload.json" if offload else "fsdp.json"
    say(f'warning: --fsdp "{" ".join(words)}" is now --fsdp --fsdp_config configs/{file}')
    args.fsdp_config = {"cpu_offload": offload} | read_config(args.fsdp_config)


def _set_up_fsdp(args, gpu: bool) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        raise UserError("fsdp shards over processes, and there is only one: start more with torchrun, or drop fsdp")
    config = args.fsdp_config = read_config(args.fsdp_config)
    if config.get("version", 2) != 2:
        raise UserError(f"fsdp_config has version {config['version']}: remove it (FSDP2 is used)")
    config.setdefault("state_dict_type", "SHARDED_STATE_DICT")  # the library's default gathers each save
    if config.get("cpu_offload"):
        # While gradients accumulate, each GPU would hold all of them, unsharded: 27 GB for 7B in float32.
        sync = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
        args.accelerator_config = sync | read_config(args.accelerator_config)
        # The norm of gradients in the CPU's memory is summed over the processes there: NCCL alone cannot.
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"} if gpu else {}
    if not gpu:
        config.pop("cpu_offload", None)  # everything is in the CPU's memory already
        # Without an accelerator the library would silently train with DDP: it enables FSDP only for a process group of
        # type MULTI_GPU. So the group is made here with that type.
        _configure_cpu_state(args, "MULTI_GPU")


def _set_up_deepspeed(args, gpu: bool) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        install = "DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.19.8"
        raise UserError(f"DeepSpeed is not installed: {install}; or use FSDP with configs/fsdp_offload.json")
    if "LOCAL_RANK" not in os.environ:
        raise UserError("DeepSpeed needs torchrun, even with one GPU: torchrun --nproc_per_node=1 train.py …")
    config = args.deepspeed = read_config(args.deepspeed)
    if "scheduler" in config:
        say("warning: the scheduler in the DeepSpeed file overrides lr_scheduler_type: remove it there")
    zero = config.get("zero_optimization", {})
    if zero.get("stage") == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True  # the original's file has False: no model is saved
    if not gpu:
        for part in ("offload_optimizer", "offload_param"):  # both need a GPU: pinned memory, and a GPU to offload
            zero.pop(part, None)
        _configure_cpu_state(args, "DEEPSPEED")


def _configure_cpu_state(args, distributed_type: str) -> None:
    """Make the process group of CPUs, with the type from which the library infers what it may do with it."""
    if distributed_type == "DEEPSPEED":
        os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
        import deepspeed

        deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False)
    state = PartialState(cpu=True, backend="gloo")
    state.device, state.distributed_type = torch.device("cpu"), DistributedType(distributed_type)
    args.use_cpu = True
    args.accelerator_config = read_config(args.accelerator_config) | {"use_configured_state": True}


def read_config(config: str | dict | None) -> dict:
    """Return a copy of a configuration given as a file, JSON text, a dictionary, or None (empty)."""
    if not isinstance(config, str):
        return copy.deepcopy(config or {})
    if not config.lstrip().startswith("{"):
        return read_json(Path(config))
    try:
        return json.loads(config)
    except ValueError as e:
        raise UserError(f"the configuration {config} is malformed: {e}") from None
