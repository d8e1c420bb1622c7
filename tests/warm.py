"""Launches of scripts that share one import of the libraries.

torch, transformers and what they import take 6 seconds of CPU. A fork server, one for each process of pytest, has
imported them, and forks for each launch: the script runs from its first line, as ``__main__``, in a process of its own.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["bitsandbytes", "datasets", "peft", "torch.distributed.launcher.api", "transformers.trainer"]
)


def launch(argv: list[str], env: dict, cwd, timeout: float, input=None, ranks=0) -> subprocess.CompletedProcess:
    """Run ``python argv…``, or for ranks ``torchrun --nproc_per_node=ranks argv…``, as subprocess.run does."""
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        files = [Path(folder) / name for name in ("in", "out", "err")]
        for file in files:
            file.write_text((input or "") if file.name == "in" else "")
        process = FORKS.Process(target=_run, args=(argv, env, cwd, files, ranks))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(argv, timeout, *(file.read_bytes() for file in files[1:]))
        return subprocess.CompletedProcess(argv, process.exitcode, *(file.read_text() for file in files[1:]))


def _run(argv: list[str], env: dict[str, str], cwd, files: list[Path], ranks: int) -> None:
    gc.freeze()  # as quick_collections in conftest.py
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, file in enumerate(files):
        os.dup2(os.open(file, os.O_APPEND | (os.O_WRONLY if number else os.O_RDONLY)), number)
    sys.stdin = open(0, closefd=False)
    if not ranks:
        return _script(argv)
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    alone = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": str(uuid.uuid4())}  # as --standalone
    config = LaunchConfig(1, 1, nproc_per_node=ranks, max_restarts=0, start_method="fork", **alone)
    elastic_launch(config, _script)(argv)


def _script(argv: list[str]) -> None:
    installed = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]  # not what pytest added
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [str(Path(argv[0]).resolve().parent), *given, *installed]
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
