"""Whether weights and optimizer states came back bit for bit, told without a copy of them."""

from __future__ import annotations

import torch

CHUNK = 2**22  # elements hashed at a time: 64 MB of int64


def fingerprint(tensor: torch.Tensor) -> int:
    """A hash of the bits of a tensor's local part: Σ bits·(place in its chunk), chunks joined by a factor, mod 2^64.

    Any single changed bit changes it. It needs 64 MB, where a copy of the weights would need as much as they do.
    """
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[local.element_size()]
    bits = local.detach().contiguous().reshape(-1).view(integer)
    places = torch.arange(1, min(CHUNK, max(1, bits.numel())) + 1, device=bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for chunk in bits.split(CHUNK) if bits.numel() else ():
        total = total * 1_000_003 + (chunk.long() * places[: chunk.numel()]).sum()
    return int(total)


def weights_of(model) -> dict[str, int]:
    return {plain_name(name): fingerprint(p) for name, p in model.named_parameters() if p.requires_grad}


def states_of(optimizer) -> dict[str, int]:
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in sorted(optimizer.state.get(parameter, {}).items()):
                if isinstance(value, torch.Tensor):
                    found[f"{len(found)} {key}"] = fingerprint(value)
    return found


def differences(a: dict, b: dict) -> str:
    """The names whose values differ, shortened; empty when there are none."""
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    return f"{len(names)} tensors: {names[0]}" + (", …" if len(names) > 1 else "") if names else ""


def plain_name(name: str) -> str:
    """A parameter's name without what DDP, torch.compile and activation checkpointing put into it."""
    for wrapper in ("module.", "_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.removeprefix(wrapper) if wrapper == "module." else name.replace(wrapper, "")
    return name
