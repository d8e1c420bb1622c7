"""weight_diff.py against the original's approach and against the disk, on made-up models of LLaMA's shapes.

    python benchmarks/bench_weight_diff.py --sizes 0.13,1.1,7 --work_dir DIR

DIR is on the disk that is to be measured, by default where temporary files go; what is made there is removed again.
A size that its free space cannot hold is left out, and so is the original where memory cannot hold two models in
float32; the result says so with the numbers. For each size, in turn, --rounds times, each in a process of its own:

    ours       python weight_diff.py make_diff, then recover (without its smoke test), then verify: as they are by
               default, with all their hashes
    original   benchmarks/original_weight_diff.py: two whole models through from_pretrained, add, save_pretrained
    floor      a plain read of the same input files from first to last byte, then a write of as many bytes as ours
               writes, and fsync: what the disk itself takes

raw is float16 in .bin shards with 32,000 rows, tuned and diff are float32 with 32,001. Before each run the inputs are
written out and dropped from the page cache (fsync, posix_fadvise DONTNEED), so all begin cold. Seconds run
from the start of Python until the output is on the disk: what a process left in the page cache is synced, and counts.
Peak memory is the kernel's own high-water mark of the process's resident pages (VmHWM, read every 10 ms until the
end), which counts pages of files that it maps; the anonymous ones alone (RssAnon) stand beside it. Bytes read and
written are those that went to the disk (wait4's ru_inblock and ru_oublock). At the last round the tensors of ours and
of the original are compared bit by bit. Medians over the rounds; every run is in benchmarks/results/weight_diff.json.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from made_up_models import SHAPES, make_pair  # noqa: E402
from provenance import provenance  # noqa: E402
from safetensors import safe_open  # noqa: E402

import utils  # noqa: E402
from alpaca import UserError  # noqa: E402
from alpaca.common.cli import run_cli  # noqa: E402
from alpaca.training.receipt import hardware  # noqa: E402

ROUNDS = {"0.001": 1, "0.13": 5, "1.1": 3, "7": 2}  # by default, for each of SHAPES
BLOCK = 8 * 2**20
# Bytes a parameter: on the disk raw, tuned or recovered, diff; the original's result beside ours; two models in memory
# and what loading takes on top (10.8 GB were seen at 1.26 B).
DISK, DISK_WITH_ORIGINAL, MEMORY_OF_ORIGINAL = 2 + 4 + 4, 2 + 4 + 4 + 4, 8.9


def available_memory() -> int:
    """Bytes that a new process can have without swapping."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def filesystem(folder: Path) -> str:
    """The type of the file system that holds ``folder``: a tmpfs is no disk."""
    with open("/proc/mounts") as file:
        mounts = {words[1]: words[2] for words in map(str.split, file)}
    return next(mounts[str(parent)] for parent in (folder, *folder.parents) if str(parent) in mounts)


def weight_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in (".bin", ".safetensors"))


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(folder))


def begin_cold(folders: list[Path]) -> None:
    """Writes out what is dirty of the folders' weights, and drops them from the page cache."""
    for file in (file for folder in folders for file in weight_files(folder)):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def run(command: list, inputs: list[Path], output: Path | None) -> dict:
    """One command in a process of its own, from cold until its output is on the disk."""
    begin_cold(inputs)
    peaks = {"VmHWM": 0, "RssAnon": 0}
    with tempfile.TemporaryFile("w+") as log:
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        while True:
            # First the memory, then whether it has ended: what has ended has no memory to look at.
            with open(f"/proc/{process.pid}/status") as file:
                for line in file:
                    name, _, value = line.partition(":")
                    if name in peaks:
                        peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                break
            time.sleep(0.01)
        ended = time.monotonic()
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"error: {' '.join(map(str, command))} failed:\n{log.read()[-4000:]}")
    for file in weight_files(output) if output else []:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    done = time.monotonic()
    return {
        "seconds": round(done - started, 3),
        "of_these_sync_after_its_end": round(done - ended, 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_rss_bytes": peaks["VmHWM"],
        "peak_anonymous_bytes": peaks["RssAnon"],
        "bytes_read": usage.ru_inblock * 512,
        "bytes_written": usage.ru_oublock * 512,
    }


def floor(inputs: list[Path], size: int, scratch: Path) -> dict:
    """Reads the inputs' weights from first to last byte, then writes ``size`` bytes to ``scratch`` and syncs them."""
    begin_cold(inputs)
    block = bytearray(os.urandom(BLOCK))  # not zeros, which a disk may store as a hole
    view, bytes_read = memoryview(bytearray(BLOCK)), 0
    started = time.monotonic()
    for file in (file for folder in inputs for file in weight_files(folder)):
        with open(file, "rb", buffering=0) as handle:
            while count := handle.readinto(view):
                bytes_read += count
    read = time.monotonic()
    if size:
        with open(scratch, "wb", buffering=0) as handle:
            for start in range(0, size, BLOCK):
                handle.write(memoryview(block)[: min(BLOCK, size - start)])
            os.fsync(handle.fileno())
    done = time.monotonic()
    scratch.unlink(missing_ok=True)
    return {
        "seconds": round(done - started, 3),
        "read_seconds": round(read - started, 3),
        "write_seconds": round(done - read, 3),
        "bytes_read": bytes_read,
        "bytes_written": size,
    }


def unequal(a: Path, b: Path) -> list[str]:
    """Names of the tensors of two folders of safetensors that are not in both with the same type, shape and bits."""

    def opened(folder: Path) -> dict:
        return {name: file for file in (safe_open(f, "pt") for f in weight_files(folder)) for name in file.keys()}

    left, right = opened(a), opened(b)
    names = set(left) ^ set(right)
    for name in set(left) & set(right):
        x, y = left[name].get_tensor(name), right[name].get_tensor(name)
        same = x.dtype == y.dtype and x.shape == y.shape
        if not same or not torch.equal(x.reshape(-1).view(torch.int32), y.reshape(-1).view(torch.int32)):
            names.add(name)
    return sorted(names)


def compete(
    task: str, command: list, inputs: list[Path], output: Path | None, size: int, rounds: int, original: bool
) -> dict:
    """All contenders in turn, ``rounds`` times. Ours is last in the last round, and its output stays.

    Args:
        task: of weight_diff.py.
        command: ours.
        inputs: folders whose weights it reads.
        output: the folder that it makes, if any; the original's goes beside it.
        size: bytes of the weights that it writes.
        rounds: runs of each contender.
        original: whether the original takes part.
    """
    runs: dict[str, list[dict]] = {"ours": [], "original": [], "floor": []}
    differ = None
    for rounds_left in reversed(range(rounds)):
        for name in ("ours", "original", "floor") if rounds_left % 2 else ("floor", "original", "ours"):
            if name == "floor":
                runs[name].append(floor(inputs, size, inputs[0].parent / "floor"))
            elif name == "ours":
                runs[name].append(run(command, inputs, output))
                if output and rounds_left:
                    shutil.rmtree(output)
            elif original:
                beside = output.with_name(output.name + "_by_the_original")
                theirs = [ROOT / "benchmarks" / "original_weight_diff.py", task, *inputs, beside]
                runs[name].append(run(theirs, inputs, beside))
                if rounds_left:
                    shutil.rmtree(beside)
    if original:
        differ = unequal(output, beside)
        shutil.rmtree(beside)
    if output and weight_bytes(output) - size > 2**20:
        raise SystemExit(f"error: {task} wrote {weight_bytes(output)} bytes, the floor {size}")
    return summary(runs) | ({"tensors_that_differ_from_the_original": differ} if original else {}) | {"runs": runs}


def summary(runs: dict[str, list[dict]]) -> dict:
    """Medians over the rounds, and what they say: the floor's share of our time, the original's multiple of it."""
    rows: dict = {}
    for name, results in runs.items():
        keys = [key for key in ("seconds", "cpu_seconds", "peak_rss_bytes", "peak_anonymous_bytes") if results]
        rows[name] = {key: round(statistics.median(r[key] for r in results), 3) for key in keys if key in results[0]}
    ours = rows["ours"]["seconds"]
    rows["floor_share"] = round(rows["floor"]["seconds"] / ours, 3)
    if rows["original"]:
        rows["times_faster"] = round(rows["original"]["seconds"] / ours, 2)
        rows["times_less_memory"] = round(rows["original"]["peak_rss_bytes"] / rows["ours"]["peak_rss_bytes"], 1)
    return rows


def bench_size(name: str, rounds: int | None, folder: Path) -> dict:
    """Makes the models of one size in ``folder``, lets all compete, and removes what it made."""
    shape, default_rounds = SHAPES[name], ROUNDS[name]
    rounds = rounds or default_rounds
    parameters, free, memory = shape.parameters(), shutil.disk_usage(folder).free, available_memory()
    spare = 10**9
    result: dict = {"parameters": parameters, "layers": shape.layers, "hidden": shape.hidden, "rounds": rounds}
    if (need := DISK * parameters + spare) > free:
        return result | {"left_out": f"needs {need / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free"}
    original = True
    if (need := MEMORY_OF_ORIGINAL * parameters) > memory:
        why = f"needs {need / 1e9:.1f} GB of memory, {memory / 1e9:.1f} GB are free"
        original, result["original_left_out"] = False, why
    elif (need := DISK_WITH_ORIGINAL * parameters + spare) > free:
        why = f"needs {need / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free"
        original, result["original_left_out"] = False, why
    raw, tuned, diff, recovered = (folder / part for part in ("raw", "tuned", "diff", "recovered"))
    try:
        started = time.monotonic()
        make_pair(folder, shape)
        print(f"{name} B: models made in {time.monotonic() - started:.0f} s", flush=True)
        size = weight_bytes(tuned)  # the diff and the recovered model have as many
        result["bytes"] = {"raw": weight_bytes(raw), "tuned": size}
        result["seconds_to_start"] = run(["weight_diff.py", "--help"], [], None)["seconds"]
        ours = ["weight_diff.py", "make_diff", "--path_raw", raw, "--path_tuned", tuned, "--path_diff", diff]
        result["make_diff"] = compete("make_diff", ours, [raw, tuned], diff, size, rounds, original)
        result["bytes"]["diff"] = weight_bytes(diff)
        shutil.rmtree(tuned)  # room for the recovered model
        ours = ["weight_diff.py", "recover", "--path_raw", raw, "--path_diff", diff, "--path_tuned", recovered]
        ours += ["--test_inference", "False"]
        result["recover"] = compete("recover", ours, [raw, diff], recovered, size, rounds, original)
        ours = ["weight_diff.py", "verify", "--path", recovered, "--path_diff", diff]
        result["verify"] = compete("verify", ours, [recovered], None, 0, rounds, False)
    finally:
        for part in folder.iterdir():
            shutil.rmtree(part) if part.is_dir() else part.unlink()
    return result


def print_table(sizes: dict[str, dict]) -> None:
    print(f"{'':<17}{'ours':>9}{'original':>10}{'times':>7}{'floor':>9}{'share':>7}{'peak ours':>11}{'original':>10}")
    for name, size in sizes.items():
        if "left_out" in size:
            print(f"{name} B: left out, {size['left_out']}")
            continue
        for task in ("make_diff", "recover", "verify"):
            if task not in size:
                continue
            row = size[task]
            theirs = row["original"]
            print(
                f"{name + ' B ' + task:<17}{row['ours']['seconds']:>7.1f} s"
                + (f"{theirs['seconds']:>8.1f} s{row['times_faster']:>6.1f}×" if theirs else f"{'–':>10}{'–':>7}")
                + f"{row['floor']['seconds']:>7.1f} s{row['floor_share']:>7.0%}"
                + f"{row['ours']['peak_rss_bytes'] / 1e9:>8.2f} GB"
                + (f"{theirs['peak_rss_bytes'] / 1e9:>7.2f} GB" if theirs else f"{'–':>10}")
            )


def main(
    sizes: str = "0.13,1.1,7",
    rounds: int | None = None,
    work_dir: str | None = None,
    output_path: str = str(ROOT / "benchmarks" / "results" / "weight_diff.json"),
) -> None:
    """Measures make_diff, recover and verify.

    Args:
        sizes: billions of parameters, separated by commas: 0.001 (for a test), 0.13, 1.1, 7.
        rounds: runs of each contender; by default 5, 3 at 1.1, 2 at 7.
        work_dir: where the models are made, on the disk that is to be measured; default: where temporary files go.
        output_path: the JSON file to write.
    """
    names = sizes.split(",")
    if unknown := [name for name in names if name not in SHAPES]:
        raise UserError(f"--sizes {unknown[0]!r} is not there: choose from {', '.join(SHAPES)}")
    report = provenance("torch", "transformers", "safetensors") | {"hardware": hardware(torch.device("cpu"), 0)}
    with tempfile.TemporaryDirectory(prefix="bench_weight_diff.", dir=work_dir) as folder:
        report["file_system"] = filesystem(Path(folder).resolve())
        report["sizes"] = {}
        for name in names:
            report["sizes"][name] = bench_size(name, rounds, Path(folder))
            utils.jdump(report, output_path, indent=2)  # after each: the large ones take long
    print_table(report["sizes"])
    print(f"wrote {output_path}")


if __name__ == "__main__":
    run_cli(main)
