"""Model folders as output: what may be replaced, and the tokenizer and generation files copied into them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from alpaca import UserError
from alpaca.common.files import UNFINISHED, new_folder
from alpaca.common.text import published_receipt
from alpaca.weights.checkpoint import CHAT_TEMPLATES, MANIFEST, SIDE_FILES, WEIGHTS, read_json

RECEIPT, CARD = "training_receipt.json", "model_card.md"  # by which a model can be repeated, judged and credited

SHARD = re.compile(r"(model|pytorch_model)-[0-9]+-of-[0-9]+\.(safetensors|bin)")


def model_folder(
    path: str | os.PathLike, flag: str = "", overwrite: bool = False, inputs: Iterable[Path] = ()
) -> AbstractContextManager[Path]:
    """Return common.files.new_folder, which with ``overwrite`` replaces a model or a diff."""
    may_replace = check_is_model if overwrite else _refuse  # called after the inputs are known to be elsewhere
    return new_folder(path, flag, inputs, partial(may_replace, flag=flag))


def _refuse(path: Path, flag: str) -> None:
    cures = "remove it, choose another path, or overwrite it" if flag else "remove it, or choose another path"
    raise UserError(f"{flag} {path}".strip() + f" already exists: {cures}")


def check_is_model(path: Path, flag: str = "") -> None:
    """Raise UserError unless a folder has config.json, weights, and only files of a model or a diff."""
    what, cure = f"{flag} {path}".strip(), "so it is not overwritten: choose another path"
    if not (path / "config.json").exists() or not any((path / name).exists() for name in WEIGHTS):
        raise UserError(f"{what} is not a model, {cure}")
    own = {"config.json", MANIFEST, RECEIPT, CARD, *WEIGHTS, *SIDE_FILES}
    for entry in sorted(path.iterdir()):
        known = entry.name in own or SHARD.fullmatch(entry.name)
        if entry.is_dir():
            known = entry.name == CHAT_TEMPLATES and all(file.suffix == ".jinja" for file in entry.iterdir())
        if not known:
            raise UserError(f"{what} holds more than a model ({entry.name}), {cure}")


def check_links(source: Path) -> None:
    """Raise UserError if a file that copy_side_files() copies is a link out of its folder.

    A downloaded folder could otherwise have a private file of this machine copied into what is published next. Links
    inside the folder are accepted, and so are those of the hub's cache, from snapshots/REVISION to ../../blobs.
    """
    roots = [source.resolve(), source.resolve().parent.parent / "blobs"]
    templates = (source / CHAT_TEMPLATES).glob("*.jinja")
    for path in [*(source / name for name in (*SIDE_FILES, RECEIPT, CARD, "config.json")), *templates]:
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise UserError(f"{path} is a link out of its folder: do not trust it, or copy the file there yourself")


def copy_side_files(source: Path, target: Path, config: dict) -> None:
    """Copy a model's files beside its weights unchanged, and write ``config`` as config.json, which gets its name last.

    The receipt is copied without the folders in its paths, which are private.
    """
    for name in (*SIDE_FILES, CARD):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    for template in sorted((source / CHAT_TEMPLATES).glob("*.jinja")):
        (target / CHAT_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(template, target / CHAT_TEMPLATES / template.name)
    if (source / RECEIPT).exists():
        text = json.dumps(published_receipt(read_json(source / RECEIPT)), indent=2)
        (target / RECEIPT).write_text(text + "\n", encoding="utf-8")
    if "quantization_config" in config:  # stale: the weights are floating-point numbers
        print(f"note: {source / 'config.json'} has a quantization_config, but its weights are not quantized: left out")
    if config.get("auto_map"):
        print(f"note: {source / 'config.json'} names Python code (auto_map), which is not copied: publish it too")
    config = {key: value for key, value in config.items() if key not in ("_name_or_path", "quantization_config")}
    (target / f"config.json{UNFINISHED}").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
