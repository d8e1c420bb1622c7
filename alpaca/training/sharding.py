"""FSDP: weights are read by one process and sent to the others, and any checkpoint is read under any sharding.

Rank 0 alone reads a model. The others get its modules, on the meta device, where they take no memory. Once FSDP has
sharded these, rank 0 sends each rank its part of one tensor after the other, and frees it: together the ranks of a node
hold little more than one model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCHEDULER_NAME

from alpaca import UserError
from alpaca.inference.adapters import ADAPTER
from alpaca.inference.load import load_model
from alpaca.training.checkpoints import SHARDED_MODEL, SHARDED_OPTIMIZER, saved_names, state_dict


def on_rank_0(make: Callable):
    """Return what ``make`` returns on rank 0, and None on the others. Its UserError is raised on every rank."""
    made, error = None, [None]
    if dist.get_rank() == 0:
        try:
            made = make()
        except UserError as e:
            error = [e]
    dist.broadcast_object_list(error)
    if error[0]:
        raise error[0]
    return made


def load_on_rank_0(load: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Return the model that ``load`` returns, with its values on rank 0 alone: on the meta device elsewhere."""
    model = on_rank_0(load)
    values = take_values(model) if model else {}
    found = [model]
    dist.broadcast_object_list(found)
    _put(found[0], values)
    return found[0]


def take_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers of a model by name, tied ones once, and leave it on the meta device."""
    values = _tensors(model)
    _put(model, {name: _like(tensor, torch.empty_like(tensor, device="meta")) for name, tensor in values.items()})
    return values


def fill(trainer, values: dict[str, torch.Tensor]) -> None:
    """Send values of rank 0 into the trainer's sharded model, a tensor at a time; each is freed once it is sent.

    Args:
        trainer: on each rank. What its model has on the meta device is replaced, the rest is overwritten.
        values: by name, on rank 0; it is empty afterwards.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    here, new = _tensors(trainer.model), {}
    names = [[name for name in values if name in here]]  # not the second name of a tied tensor
    dist.broadcast_object_list(names)
    for name in names[0]:
        place = here[name].detach()
        sharded = isinstance(place, DTensor)
        device = place.device_mesh.device_type if sharded else trainer.args.device
        if dist.get_rank() == 0:
            whole = values.pop(name).detach().to(device, place.dtype).contiguous()
        else:
            whole = torch.empty(place.shape, dtype=place.dtype, device=device)
        if sharded:
            part = distribute_tensor(whole, place.device_mesh, place.placements)
        else:
            dist.broadcast(part := whole, 0)
        if not place.is_meta:
            place.copy_(part)
            continue
        offloaded = sharded and trainer.args.fsdp_config.get("cpu_offload")
        new[name] = _like(here[name], part.cpu() if offloaded else part)
    _put(trainer.model, new)


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by the names that they have without activation checkpointing and compilation."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): x for name, x in named}


def _put(model: torch.nn.Module, new: dict[str, torch.Tensor]) -> None:
    """Replace tensors of a model, by name; one that several modules share, in each."""
    old = _tensors(model)
    new = {id(old[name]): tensor for name, tensor in new.items()}
    for module in model.modules():
        own = [*module.named_parameters("", False, False), *module.named_buffers("", False, False)]
        for name, tensor in own:
            if id(tensor) in new:
                setattr(module, name, new[id(tensor)])


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return the new tensor as a parameter if the old one is."""
    return torch.nn.Parameter(new, old.requires_grad) if isinstance(old, torch.nn.Parameter) else new


def load_weights(trainer, checkpoint: Path, library: Callable[[str], None]) -> None:
    """Load a checkpoint's weights into the trainer's model; ``library`` is Trainer's own way, used where it works."""
    model = trainer.model
    if trainer.is_fsdp_enabled and _of_fsdp(checkpoint):
        with state_dict_format(trainer, _format(checkpoint)):
            library(str(checkpoint), trainer.model_wrapped)
    elif trainer.is_fsdp_enabled:
        fill(trainer, on_rank_0(lambda: _whole(model, checkpoint)) or {})
    elif (checkpoint / SHARDED_MODEL).is_dir():
        state = {"model": state_dict(model)}
        torch.distributed.checkpoint.load(state, checkpoint_id=checkpoint / SHARDED_MODEL, no_dist=True)
        _load(model, state["model"])
    elif set(saved_names(model)) == set(state_dict(model)) and not _of_fsdp(checkpoint):
        library(str(checkpoint))
    else:
        # The library would skip tensors that are saved under another name, with only a warning; and without FSDP it
        # refuses a whole checkpoint of FSDP.
        _load(model, _whole(model, checkpoint))


def _whole(model, checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint that is not sharded, under the model's names."""
    if not hasattr(model, "peft_config"):
        return load_model(checkpoint, model.dtype).state_dict()
    names = {name.replace(f".{model.active_adapter}.", "."): name for name in _tensors(model)}  # saved without it
    return {names[name]: tensor for name, tensor in load_file(checkpoint / ADAPTER).items()}


def _load(model, state: dict[str, torch.Tensor]) -> None:
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
