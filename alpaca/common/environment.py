"""Imported by each script before any library: where one is not installed, a line says what to activate or install."""

import sys
from importlib.util import find_spec

missing = [name for name in ("numpy", "openai", "torch", "transformers") if find_spec(name) is None]
if missing:
    sys.exit(
        f"error: {sys.executable} has no {', '.join(missing)}: run `source .venv/bin/activate` after `make`, "
        "or install with `pip install -r requirements.txt`"
    )
