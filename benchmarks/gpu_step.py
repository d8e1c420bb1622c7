"""A step of gpu.sh: runs a command for at most so many seconds, and keeps what it gave in OUTPUT_DIR/NAME.json.

    python benchmarks/gpu_step.py run OUTPUT_DIR NAME SECONDS COMMAND…
    python benchmarks/gpu_step.py missing
    python benchmarks/gpu_step.py table OUTPUT_DIR

A word RESULT in COMMAND stands for a JSON file that it writes; that becomes "result" in the step's own.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import psutil
from provenance import ROOT, provenance

TAIL = 4_000  # characters of a step's output that are kept
# What the steps need beyond requirements.txt; the last two for one step each.
ALSO = ("pytest", "pytest-xdist", "hypothesis", "packaging", "peft", "trl", "liger-kernel")


def run(output_dir: Path, name: str, seconds: float, command: list[str]) -> None:
    """Runs the step. What it has started is gone afterwards, whatever sessions and groups it made."""
    print(f"{name}: at most {seconds:.0f} s", flush=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    report = provenance("torch", "transformers") | {"step": name, "limit_seconds": seconds}
    with tempfile.TemporaryDirectory() as folder:
        log, result = Path(folder) / "log", Path(folder) / "result.json"
        words = [str(result) if word == "RESULT" else word for word in command]
        begun = time.monotonic()
        with open(log, "wb") as file:
            process = psutil.Popen([sys.executable, *words], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(seconds)
        except psutil.TimeoutExpired:
            code = "time-out"
        finally:
            for started in [*process.children(recursive=True), process] if process.is_running() else []:
                with contextlib.suppress(psutil.NoSuchProcess):
                    started.kill()
        report |= {"ok": code == 0, "exit": code, "seconds": round(time.monotonic() - begun, 1)}
        texts = [path.read_text(errors="replace") if path.exists() else "null" for path in (result, log)]
    for place, word in ((str(result), "RESULT"), (str(ROOT), "."), (sys.prefix, "python")):  # to be committed
        texts = [text.replace(place, word) for text in texts]
    report |= {"result": json.loads(texts[0]), "output_tail": texts[1][-TAIL:]}
    target = output_dir / f"{name}.json"
    part = target.with_suffix(".part")
    part.write_text(json.dumps(report, indent=2) + "\n")
    part.replace(target)
    ending = "ended well" if report["ok"] else f"failed ({code})"
    print(f"{name}: {ending} after {report['seconds']:.0f} s", flush=True)
    sys.exit(code != 0)


def missing() -> None:
    """Lists packages that are not here, with the command that gets them where there is a network."""
    pinned = re.findall(r"^(\S+?)==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    absent = []
    for name, version in [*pinned, *((name, None) for name in ALSO)]:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            absent.append(f"{name}=={version}" if version else name)
    if absent:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        print(f"missing here, so steps may fail: {', '.join(absent)}; to bring them, with what they need themselves:")
        print(f"  pip download --only-binary=:all: --python-version {python} --no-deps -d wheels {' '.join(absent)}")


def table(output_dir: Path) -> None:
    """Shows all steps, in the order in which they ran, with the speed of training as a multiple of the original's."""
    files = sorted(output_dir.glob("*.json"), key=lambda path: path.stat().st_mtime)
    steps = [json.loads(path.read_text()) for path in files]
    rows = {s["step"]: [*s["result"]["contenders"].values()][0] for s in steps if "contenders" in (s["result"] or {})}
    original = rows.get("original", {}).get("tokens_per_second", float("nan"))
    for step in steps:
        text = f"{step['step']:<20}{'ok' if step['ok'] else 'exit ' + str(step['exit']):<14}{step['seconds']:6.0f} s"
        if row := rows.get(step["step"]):
            speed, mfu = row["tokens_per_second"], f"{row['mfu']:7.1%} MFU" if row["mfu"] else ""
            text += f"{speed:10,.0f} tokens/s {speed / original:5.2f}×{mfu}{row['peak_memory_gib'] * 1.0737:7.1f} GB"
        print(text)
    print("the bars, on real tokens: 10,000 tokens/s, 45% MFU, 3 times the original, below 130 GB")


if __name__ == "__main__":
    task, *words = sys.argv[1:]
    if task == "run":
        run(Path(words[0]), words[1], float(words[2]), words[3:])
    else:
        {"missing": missing, "table": table}[task](*map(Path, words))
