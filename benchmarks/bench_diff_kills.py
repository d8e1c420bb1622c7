"""SIGKILL of weight_diff.py at random moments, and before each of its file operations: what is left behind?

    python benchmarks/bench_diff_kills.py --kills 100

The command runs in a fork of a process that has imported torch, so its start takes no time and the kills fall into its
work: one in five at any moment of a run, the others after something new is there beside the target. Every fourth run
has --overwrite and finds another model at the target. Then come runs that end themselves before the k-th operation on
files (open for writing, fsync, rename, remove, …), for each k, also of make_diff: the moments that are too short for
chance. After each kill:

- the inputs have the bytes that they had;
- the target is not there, or it is whole: the files of an undisturbed run, byte for byte, or the old ones;
- with --overwrite the old model or the new one is whole, at the target or beside it, and at the target before the next
  run begins to write weights;
- what lies beside the target has no config.json, so it does not load as a model; or it is whole, but for its name; or
  it is what is left of the old model while that is removed;
- the same command again ends well, leaves nothing beside the target, and the target is as after an undisturbed run.

Writes benchmarks/results/diff_kills.json: how many kills landed where, and each complaint.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import importlib
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from provenance import provenance  # noqa: E402

import utils  # noqa: E402
from alpaca.common.cli import run_cli  # noqa: E402

# Audit events of operations that change what is on the disk; ctypes.dlsym is how a system call without a function in
# os is reached.
CHANGES = {f"os.{name}" for name in ("mkdir", "rename", "remove", "rmdir", "chmod", "link", "symlink", "truncate")}
CHANGES |= {"ctypes.dlsym", "shutil.move"}


@dataclass
class Command:
    """A command that makes the folder ``target``, alone in its parent but for what the command itself puts there."""

    name: str
    script: Path
    argv: list[str]
    inputs: list[Path]
    target: Path
    old: Path | None = None  # a model that is at the target before: the command overwrites it

    def clear(self) -> None:
        """Leaves nothing in the target's parent but a copy of the old model, if there is one."""
        shutil.rmtree(self.target.parent, ignore_errors=True)
        self.target.parent.mkdir()
        if self.old:
            shutil.copytree(self.old, self.target)

    def siblings(self) -> list[Path]:
        return sorted(path for path in self.target.parent.iterdir() if path != self.target)


def digest(folder: Path) -> dict[str, str] | None:
    """Relative path → SHA-256 of each file, a folder's own "" for one that is empty; None without the folder."""
    if not folder.is_dir():
        return None
    found = {}
    for file in sorted(folder.rglob("*")):
        found[str(file.relative_to(folder))] = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
    return found


def model_in(found: dict[str, str] | None) -> dict[str, str] | None:
    """A digest without hidden empty files, such as a lock."""
    nothing = hashlib.sha256(b"").hexdigest()
    return found and {name: value for name, value in found.items() if name[0] != "." or value != nothing}


def start(
    command: Command, log: Path, dies: Callable[[int, str], bool] | None = None, notes: Path | None = None
) -> int:
    """Runs the command in a fork; its process id.

    Args:
        command: what to run.
        log: gets its output.
        dies: whether it kills itself before the operation on files of this number, from 0, and name.
        notes: gets the names of its operations on files and of the modules that it has loaded.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = sys.stderr = open(1, "w", closefd=False)
        seen: list[str] = []
        if dies or notes:
            _watch(seen, dies or (lambda number, name: False))
        sys.argv = [str(command.script), *command.argv]
        try:
            runpy.run_path(str(command.script), run_name="__main__")
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
            if isinstance(e.code, str):
                print(e.code, file=sys.stderr)
        if notes:
            utils.jdump({"operations": seen.copy(), "modules": list(sys.modules)}, notes)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _watch(seen: list[str], dies: Callable[[int, str], bool]) -> None:
    """Notes each operation on files in ``seen``, such as ``mkdir out``, and ends this process before one of them."""

    def operation(what: str, path) -> None:
        if isinstance(path, int) and path >= 0:
            path = os.readlink(f"/proc/self/fd/{path}")
        name = f"{what} {os.path.basename(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else '?'}"
        if dies(len(seen), name):
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(name)

    def hook(event: str, args: tuple) -> None:
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        if event == "open" and isinstance(args[2], int) and args[2] & writes:
            operation(event, args[0])
        elif event in CHANGES:
            operation(event.removeprefix("os."), args[-1] if event == "ctypes.dlsym" else args[0])

    def noted(function):
        def call(descriptor):
            operation(function.__name__, descriptor)  # it has no audit event
            return function(descriptor)

        return call

    os.fsync, os.fdatasync = noted(os.fsync), noted(os.fdatasync)
    sys.addaudithook(hook)


def finish(pid: int) -> int:
    """Waits; the exit code, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after(pid: int, seconds: float) -> bool:
    """Kills a process after a time; False when it was done before."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.01))
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
    os.kill(pid, signal.SIGKILL)  # it is not waited for yet: the number is still its own
    return finish(pid) == -signal.SIGKILL


def wait_for_change(command: Command, pid: int) -> None:
    """Returns when something new is beside the target, or the target is, or the process has ended."""
    before = set(os.listdir(command.target.parent))
    while set(os.listdir(command.target.parent)) == before:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.0005)


class Bench:
    """One command, what an undisturbed run of it makes, and how long it takes."""

    def __init__(self, command: Command, folder: Path):
        self.command, self.log, self.notes = command, folder / "log", folder / "notes"
        self.inputs = [digest(path) for path in command.inputs]
        self.old = digest(command.old) if command.old else None
        for name in self._undisturbed()["modules"]:
            with contextlib.suppress(Exception):
                importlib.import_module(name)  # so that no fork has to
        self.operations = self._undisturbed()["operations"]  # and takes the time
        self.new = digest(command.target)
        self.bytes = sum(file.stat().st_size for file in command.target.iterdir())
        self.beside = [path.name for path in command.siblings()]

    def _undisturbed(self) -> dict:
        self.command.clear()
        started = time.monotonic()
        pid = start(self.command, self.log, notes=self.notes)
        wait_for_change(self.command, pid)
        changed = time.monotonic()
        if code := finish(pid):
            raise SystemExit(f"error: {self.command.name} ended with {code}:\n{self.log.read_text()[-3000:]}")
        self.seconds, self.seconds_writing = time.monotonic() - started, time.monotonic() - changed
        return json.loads(self.notes.read_text())

    def kill(self, rng: random.Random, anywhere: bool) -> dict | None:
        """One run, killed at a random moment; None when it was done before."""
        self.command.clear()
        pid = start(self.command, self.log)
        if anywhere:
            landed = kill_after(pid, rng.uniform(0, self.seconds))
        else:
            wait_for_change(self.command, pid)
            landed = kill_after(pid, rng.uniform(0, self.seconds_writing))
        return self.look("anywhere" if anywhere else "writing") if landed else None

    def kill_before(self, number: int) -> dict | None:
        """One run that ends itself before an operation on files; None when it had fewer."""
        self.command.clear()
        landed = finish(start(self.command, self.log, lambda n, name: n == number)) == -signal.SIGKILL
        name = self.operations[number] if number < len(self.operations) else "?"
        return self.look(f"before {number} {name}") if landed else None

    def look(self, moment: str) -> dict:
        """What a kill left behind, and what the next run makes of it."""
        command, complaints = self.command, []
        left, target = command.siblings(), digest(command.target)
        beside = [model_in(digest(path)) for path in left if path.is_dir()]
        if [digest(path) for path in command.inputs] != self.inputs:
            complaints.append("an input was changed")
        states = [("not there", None), ("new", self.new), ("old", self.old)]
        state = next((state for state, model in states if model_in(target) == model), "broken")
        if state == "broken":
            complaints.append("the target is neither the new model nor the old one")
        elif target != model_in(target):
            complaints.append("the target is whole but holds a lock")
        if self.old and target is None and self.new not in beside and self.old not in beside:
            complaints.append("neither the old model nor the new one is there")
        whole = 0
        for found in beside:
            if "config.json" in found and found in (self.new, self.old):
                whole += 1
            elif "config.json" in found and not (state == "new" and self.old and found.items() <= self.old.items()):
                complaints.append("a leftover loads as a model")
        if self.old and target is None:  # a run that is killed when it begins to write has put a model back before
            finish(start(command, self.log, lambda n, name: name.startswith("open ") and ".safetensors" in name))
            if digest(command.target) is None:
                complaints.append("the next run put no model back")
        if target is not None and not self.old:
            shutil.rmtree(command.target)  # it was killed when its work was done; without it the command goes on
        if code := finish(start(command, self.log)):
            complaints.append(f"the next run ended with {code}: {self.log.read_text().splitlines()[-1:]}")
        if digest(command.target) != self.new:
            complaints.append("the next run made other bytes")
        if [path.name for path in command.siblings()] != self.beside:
            complaints.append("the next run left something beside the target")
        return {
            "command": command.name,
            "moment": moment,
            "target": state,
            "beside_the_target": len(left),
            "whole_beside_the_target": whole,
            "complaints": complaints,
        }


def make_commands(folder: Path, megabytes: float, script: Path) -> list[Command]:
    """A made-up raw model and one tuned from it, their diff, and the commands that are to be killed.

    Args:
        folder: gets the models.
        megabytes: about the size of the recovered model.
        script: weight_diff.py.
    """
    pid = os.fork()
    if not pid:  # in a fork, as torch's threads would not live on in the forks of a process that used them
        try:
            from made_up_models import Shape, make_pair

            layers = max(round((megabytes * 1e6 / 4 - 1.5e6) / 2.1e6), 1)  # 2.1 M parameters each, 1.5 M beside them
            shape = Shape(hidden=384, intermediate=1280, layers=layers, heads=6, key_value_heads=6, rows=2_000)
            make_pair(folder, shape, shard_bytes=int(megabytes * 1e6 / 3))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    if finish(pid):
        raise SystemExit("error: the models could not be made")
    raw, tuned, diff = folder / "raw", folder / "tuned", folder / "diff"
    make = ["make_diff", "--path_raw", str(raw), "--path_tuned", str(tuned), "--path_diff"]
    log = folder / "log"
    if finish(start(Command("", script, [*make, str(diff)], [], diff), log)):
        raise SystemExit(f"error: make_diff failed:\n{log.read_text()[-3000:]}")
    old = folder / "old"  # small, as it is copied for each run
    old.mkdir()
    for file in raw.iterdir():
        if "model" not in file.name:
            shutil.copy(file, old)
    (old / "model.safetensors").write_bytes(b"the old weights")
    target = folder / "out" / "model"
    recover = ["recover", "--path_raw", str(raw), "--path_diff", str(diff), "--path_tuned", str(target)]
    recover += ["--test_inference", "False"]
    return [
        Command("recover", script, recover, [raw, diff], target),
        Command("recover --overwrite", script, [*recover, "--overwrite"], [raw, diff], target, old),
        Command("make_diff", script, [*make, str(target)], [raw, tuned], target),
    ]


def main(
    kills: int = 100,
    operations: str = "",
    megabytes: float = 150,
    seed: int = 0,
    output_path: str = str(ROOT / "benchmarks" / "results" / "diff_kills.json"),
) -> None:
    """Kills weight_diff.py until enough kills have landed, and counts what went wrong.

    Args:
        kills: of recover, at random moments.
        operations: a part of the names of the operations on files to kill before, such as rename; default: all.
        megabytes: about the size of the recovered model.
        seed: of the random moments.
        output_path: the JSON file to write.
    """
    import torch  # noqa: F401, for the forks: the import takes seconds
    from tqdm import tqdm

    result, rng, started, runs, done = provenance("torch", "safetensors"), random.Random(seed), time.monotonic(), [], 0
    with tempfile.TemporaryDirectory(prefix="bench_diff_kills.") as folder:
        commands = make_commands(Path(folder), megabytes, ROOT / "weight_diff.py")
        benches = [Bench(command, Path(folder)) for command in commands]
        recover, overwrite, _ = benches
        with tqdm(total=kills, unit="kill") as bar:
            while bar.n < kills:
                bench = overwrite if bar.n % 4 == 3 else recover
                if run := bench.kill(rng, anywhere=bar.n % 5 == 4):
                    runs.append(run)
                    bar.update()
                else:
                    done += 1
        for bench in benches:
            for number in (i for i, name in enumerate(bench.operations) if operations in name):
                if run := bench.kill_before(number):
                    runs.append(run)
                else:
                    done += 1
        random_runs = [run for run in runs if not run["moment"].startswith("before")]
        result |= {
            "seconds": round(time.monotonic() - started),
            "recovered_bytes": recover.bytes,
            "seconds_of_an_undisturbed_run": {b.command.name: round(b.seconds, 3) for b in benches},
            "of_these_after_the_first_file": {b.command.name: round(b.seconds_writing, 3) for b in benches},
            "operations_on_files": {b.command.name: b.operations for b in benches},
        }
    result |= {
        "kills_at_random_moments": len(random_runs),
        "kills_before_an_operation": len(runs) - len(random_runs),
        "runs_done_before_their_kill": done,
        "target_after_a_kill": dict(collections.Counter(f"{run['command']}: {run['target']}" for run in runs)),
        "whole_under_another_name": sum(run["whole_beside_the_target"] > 0 for run in runs),
        "kills_with_a_complaint": sum(bool(run["complaints"]) for run in runs),
        "complaints": dict(collections.Counter(text for run in runs for text in run["complaints"])),
        "every_kill": [
            f"{run['command']}, {run['moment']}: target {run['target']}, {run['beside_the_target']} beside it"
            + f" ({run['whole_beside_the_target']} whole)" * bool(run["whole_beside_the_target"])
            + "".join(f"; {text}" for text in run["complaints"])
            for run in runs
        ],
    }
    utils.jdump(result, output_path, indent=2)
    print({key: value for key, value in result.items() if key not in ("every_kill", "operations_on_files")})


if __name__ == "__main__":
    run_cli(main)
