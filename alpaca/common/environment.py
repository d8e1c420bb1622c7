"""Imported by each script before any library: if one is missing, a line says what to activate or install."""

import logging
import sys
from pathlib import Path

# peft imports bitsandbytes, which warns on any CPU that it has not downloaded a faster kernel for 4-bit weights.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))


def _explain(kind, error, trace) -> None:
    if not issubclass(kind, ModuleNotFoundError):
        return sys.__excepthook__(kind, error, trace)
    print(
        f"error: {sys.executable} has no {error.name}: run `source .venv/bin/activate` after `make demo`, or install "
        "with `pip install -r requirements.txt`",
        file=sys.stderr,
    )


# Only when one of our scripts runs: a program that imports one keeps its own tracebacks.
if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parents[2]:
    sys.excepthook = _explain
