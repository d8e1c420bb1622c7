"""What a result was made with, for the JSON files in benchmarks/results."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def provenance(*packages: str) -> dict:
    """Date, commit, whether the tree differs from it, command, processor, load, Python, and versions of packages.

    "changed_since_commit" leaves out benchmarks/results, which a benchmark itself writes. On a machine that has
    the files without git, the commit is what COMMIT says.
    """

    def git(*words: str) -> str | None:
        try:
            run = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return None if run.returncode else run.stdout.strip()

    names = []
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": git("rev-parse", "--short", "HEAD") or os.environ.get("COMMIT"),
        "changed_since_commit": None if changed is None else bool(changed),
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
    }
