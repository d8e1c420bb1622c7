"""FSDP: weights are read by one process and sent to the others, and any checkpoint is read under any sharding.

Only rank 0 reads a model. The others get its modules on the meta device, where they take no memory. Once FSDP has
sharded these, rank 0 sends each rank its part, tensor by tensor, and frees it: together the ranks of a node hold little
more than one model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint import load as load_shards
from torch.distributed.checkpoint import state_dict as by_name
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCHEDULER_NAME

from alpaca import UserError
from alpaca.inference.adapters import ADAPTER
from alpaca.inference.load import load_model
from alpaca.training.checkpoints import SHARDED_MODEL, SHARDED_OPTIMIZER


def load_on_rank_0(load: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Return the model that ``load`` returns, with its values on rank 0 only, and on the meta device elsewhere.

    Raises:
        UserError: on every rank, what ``load`` raises on rank 0.
    """
    found, values = [None], {}
    if dist.get_rank() == 0:
        try:
            found[0] = load()
            values = take_values(found[0])
        except UserError as e:
            found[0] = e
    dist.broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    _put(found[0], values)
    return found[0]


def take_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers of a model by name, tied ones once, and leave it on the meta device."""
    values = tensors(model)
    _put(model, {name: torch.empty_like(tensor, device="meta") for name, tensor in values.items()})
    return values


def fill(trainer, values: dict[str, torch.Tensor]) -> None:
    """Send values of rank 0, by name, into the trainer's sharded model; each is removed, and so freed, once sent.

    Every rank calls it with the same names. Tensors on the meta device are replaced, the others overwritten.
    """
    here, new = tensors(trainer.model), {}
    for name in [name for name in values if name in here]:  # not the second name of a tied tensor
        place, value = here[name].detach(), values.pop(name).detach()
        sharded = isinstance(place, DTensor)
        device = place.device_mesh.device_type if sharded else trainer.args.device
        if dist.get_rank() == 0:
            value = value.to(device, place.dtype).contiguous()
        else:
            value = torch.empty(place.shape, dtype=place.dtype, device=device)
        if sharded:
            value = distribute_tensor(value, place.device_mesh, place.placements)
        else:
            dist.broadcast(value, 0)
        if place.is_meta:
            new[name] = value.cpu() if sharded and trainer.args.fsdp_config.get("cpu_offload") else value
        else:
            place.copy_(value)
    _put(trainer.model, new)


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by their names without activation checkpointing and compilation."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): x for name, x in named}


def _put(model: torch.nn.Module, new: dict[str, torch.Tensor]) -> None:
    """Replace tensors of a model, by name; a shared one in each of its modules."""
    by_old = {}
    for name, old in tensors(model).items():
        if name in new:
            parameter = isinstance(old, torch.nn.Parameter)
            by_old[old] = torch.nn.Parameter(new[name], old.requires_grad) if parameter else new[name]
    for module in model.modules():
        for name, old in [*module.named_parameters("", False, False), *module.named_buffers("", False, False)]:
            if old in by_old:
                setattr(module, name, by_old[old])


def load_weights(trainer, checkpoint: Path) -> None:
    """Load a checkpoint's weights into the trainer's model, whatever wrote them."""
    model, states = trainer.model, trainer.model.state_dict()
    if adapter := hasattr(model, "peft_config"):  # a checkpoint has only the adapter, without its name
        names = {name.replace(f".{model.active_adapter}.", "."): name for name in states if ".lora_" in name}
        states = {saved: states[name] for saved, name in names.items()}
    if (checkpoint / SHARDED_MODEL).is_dir():
        load_shards({"model": states}, checkpoint_id=checkpoint / SHARDED_MODEL)  # in place
        return
    if adapter:
        values = {names[saved]: tensor for saved, tensor in load_file(checkpoint / ADAPTER).items()}
    else:
        read = partial(load_model, checkpoint, model.dtype)
        values = (load_on_rank_0(read) if trainer.is_fsdp_enabled else read()).state_dict()
    if trainer.is_fsdp_enabled:
        fill(trainer, values)
    else:
        model.load_state_dict(values, strict=not adapter)


def load_optimizer(trainer, checkpoint: Path, library: Callable[[str], None]) -> None:
    """Load the states of optimizer and scheduler; ``library`` is Trainer's own function, used if nothing is sharded."""
    shards, gathered, plain = (checkpoint / name for name in (SHARDED_OPTIMIZER, OPTIMIZER_NAME_BIN, OPTIMIZER_NAME))
    if trainer.is_deepspeed_enabled or (plain.exists() and not trainer.is_fsdp_enabled):
        return library(str(checkpoint))
    model, optimizer = trainer.model, trainer.optimizer
    trainer.lr_scheduler.load_state_dict(torch.load(checkpoint / SCHEDULER_NAME, weights_only=True))
    states = by_name.get_optimizer_state_dict(model, optimizer)
    if shards.is_dir():
        load_shards({"optimizer": states}, checkpoint_id=shards)
        return by_name.set_optimizer_state_dict(model, optimizer, states)
    whole = torch.load(gathered if gathered.exists() else plain, map_location="cpu", weights_only=True, mmap=True)
    if plain.exists():  # it numbers the parameters in the order of the groups, which is the same here
        named = {}
        for here, stored in zip(states["param_groups"], whole["param_groups"], strict=True):
            named |= zip(stored["params"], here["params"], strict=True)
            stored["params"] = here["params"]
        whole["state"] = {named[number]: entry for number, entry in whole["state"].items()}
    options = by_name.StateDictOptions(full_state_dict=trainer.is_fsdp_enabled)
    by_name.set_optimizer_state_dict(model, optimizer, whole, options=options)
    for group in optimizer.param_groups:  # torch (2.13) has made lists of tuples, such as betas
        group |= {key: tuple(value) for key, value in group.items() if isinstance(value, list) and key != "params"}
