"""Imported by each script before any library: if one is missing, a line says what to activate or install."""

import sys


def _explain(kind, error, trace) -> None:
    if not issubclass(kind, ModuleNotFoundError):
        return sys.__excepthook__(kind, error, trace)
    print(
        f"error: {sys.executable} has no {error.name}: run `source .venv/bin/activate` after `make`, or install with "
        "`pip install -r requirements.txt`",
        file=sys.stderr,
    )


sys.excepthook = _explain
