"""How much memory this machine has left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

GIB = 2**30


def as_text(size: float) -> str:
    """Return bytes in words: "12.6 GiB", "0.4 MiB"."""
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"


def available_bytes(device: torch.device) -> int:
    """Return the bytes that this process can use on the device, including those that it holds.

    On a CPU: what the machine (or its control group) has left, divided among the processes on it.
    """
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    held, processes = psutil.Process().memory_info().rss, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return held + max(0, host_free()) // processes


def host_free(swap: bool = False) -> int:
    """Return the bytes that this machine's processes can still take, within its memory and control groups' limits.

    Args:
        swap: whether to count free swap space.
    """
    free = psutil.virtual_memory().available + (psutil.swap_memory().free if swap else 0)
    return min([free, *_control_groups_free()])


def _control_groups_free(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Return the free bytes of each control group of this process (v1 or v2), and of each above it.

    Cached files count as free: the kernel drops them first.
    """
    found = []
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, used, prefix = root, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top, limit, used, prefix = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        steps = path.strip("/").split("/")
        for i in range(len(steps) + 1):  # in a container the path may be the host's, and the top the group itself
            folder = top.joinpath(*steps[:i])
            try:
                most, taken = int((folder / limit).read_text()), int((folder / used).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such group, or "max"
                continue
            cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            found.append(most - taken + cached)
    return found
