"""Reads a checkpoint on another number of processes, or with other sharding, than it was written with.

transformers (5.17 to 5.23) reads a checkpoint only with the kind of sharding that wrote it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCHEDULER_NAME

from alpaca.inference.adapters import ADAPTER
from alpaca.inference.load import load_model
from alpaca.training.checkpoints import SHARDED_MODEL, SHARDED_OPTIMIZER, saved_names, state_dict


def load_weights(trainer, checkpoint: Path, library: Callable[[str], None]) -> None:
    """Load a checkpoint's weights into the trainer's model; ``library`` is Trainer's own way, used where it works."""
    model = trainer.model
    if trainer.is_fsdp_enabled and _of_fsdp(checkpoint):
        with state_dict_format(trainer, _format(checkpoint)):
            library(str(checkpoint), trainer.model_wrapped)
    elif trainer.is_fsdp_enabled:
        _load_whole_into_shards(trainer, checkpoint)
    elif (checkpoint / SHARDED_MODEL).is_dir():
        state = {"model": state_dict(model)}
        torch.distributed.checkpoint.load(state, checkpoint_id=checkpoint / SHARDED_MODEL, no_dist=True)
        _put(model, state["model"])
    elif set(saved_names(model)) == set(state_dict(model)) and not _of_fsdp(checkpoint):
        library(str(checkpoint))
    else:
        # The library would skip tensors that are saved under another name, with only a warning; and without FSDP it
        # refuses a whole checkpoint of FSDP.
        _put(model, _read_whole(model, checkpoint))


def _load_whole_into_shards(trainer, checkpoint: Path) -> None:
    """Read it on rank 0 in CPU memory, and send each rank its part, a tensor at a time."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    model = trainer.model
    adapter = hasattr(model, "peft_config")
    state = _read_whole(model, checkpoint) if trainer.is_world_process_zero() else {}
    if adapter:  # saved without the adapter's name
        names = {name.replace(f".{model.active_adapter}.", "."): name for name in model.state_dict()}
        state = {names[name]: tensor for name, tensor in state.items()}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=not adapter)
    set_model_state_dict(model, state, options=options)


def _read_whole(model, checkpoint: Path) -> dict[str, torch.Tensor]:
    if hasattr(model, "peft_config"):
        return load_file(checkpoint / ADAPTER)
    return load_model(checkpoint, model.dtype).state_dict()


def _put(model, state: dict[str, torch.Tensor]) -> None:
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, state)
    else:
        model.load_state_dict(state)


def load_optimizer(trainer, checkpoint: str | None, library: Callable[[str | None], None]) -> None:
    """Load the states of optimizer and scheduler; ``library`` is Trainer's own way, used where it works."""
    of_fsdp = checkpoint is not None and _of_fsdp(Path(checkpoint))
    if checkpoint is None or trainer.is_deepspeed_enabled or of_fsdp == trainer.is_fsdp_enabled:
        with state_dict_format(trainer, _format(Path(checkpoint)) if of_fsdp else None):
            return library(checkpoint)
    from torch.distributed.checkpoint import load
    from torch.distributed.checkpoint import state_dict as dcp

    model, optimizer = trainer.model, trainer.optimizer
    trainer.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
    if (Path(checkpoint) / SHARDED_OPTIMIZER).is_dir():
        state = {"optimizer": dcp.get_optimizer_state_dict(model, optimizer)}
        load(state, checkpoint_id=Path(checkpoint) / SHARDED_OPTIMIZER, no_dist=True)
        dcp.set_optimizer_state_dict(model, optimizer, state["optimizer"])
        return
    if of_fsdp:  # whole, by name
        whole = torch.load(Path(checkpoint) / OPTIMIZER_NAME_BIN, map_location="cpu", weights_only=True, mmap=True)
        dcp.set_optimizer_state_dict(model, optimizer, whole)
        return
    # optimizer.pt numbers the parameters in the order of the groups, which is the same here; shards go by name.
    whole = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
    wrapper = "_checkpoint_wrapped_module."  # of activation_checkpointing in fsdp_config; not in a state dict
    names = {id(parameter): name.replace(wrapper, "") for name, parameter in model.named_parameters()}
    named = {}
    for group, stored in zip(optimizer.param_groups, whole["param_groups"], strict=True):
        here = [names[id(parameter)] for parameter in group["params"]]
        named |= zip(stored["params"], here, strict=True)
        stored["params"] = here
    whole["state"] = {named[number]: entry for number, entry in whole["state"].items()}
    dcp.set_optimizer_state_dict(model, optimizer, whole, options=dcp.StateDictOptions(full_state_dict=True))


@contextmanager
def state_dict_format(trainer, name: str | None):
    """Make FSDP save and load in that format within this context; None, or no FSDP, changes nothing."""
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled and name else None
    if plugin is None or plugin.state_dict_type.name == name:
        yield
        return
    attributes = ("state_dict_type", "state_dict_config", "optim_state_dict_config")
    before = {attribute: getattr(plugin, attribute) for attribute in attributes}
    plugin.state_dict_config = plugin.optim_state_dict_config = None  # each format has its own
    plugin.set_state_dict_type(name)
    try:
        yield
    finally:
        for attribute, value in before.items():
            setattr(plugin, attribute, value)


def _format(checkpoint: Path) -> str:
    """Return the state_dict_type in which FSDP wrote a checkpoint; this run's may be another."""
    return "SHARDED_STATE_DICT" if (checkpoint / SHARDED_MODEL).is_dir() else "FULL_STATE_DICT"


def _of_fsdp(checkpoint: Path) -> bool:
    """Return whether FSDP wrote it: in shards, or with state_dict_type FULL_STATE_DICT."""
    return (checkpoint / SHARDED_MODEL).is_dir() or (checkpoint / "pytorch_model_fsdp.bin").exists()
