"""Model folders as output: what may be replaced, the files beside the weights, and a diff's license and card."""

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
from alpaca.common.text import printable, public_name, published_receipt, templates
from alpaca.weights.checkpoint import CHAT_TEMPLATES, MANIFEST, SIDE_FILES, WEIGHTS, read_json

RECEIPT, CARD = "training_receipt.json", "model_card.md"  # by which a model can be repeated, judged and credited
DIFF_CARD = "README.md"  # what the hub shows
PRIVATE = {"name_or_path", "_name_or_path", "special_tokens_map_file"}  # paths that transformers wrote until version 5
LICENSE = "not stated: see those of the base model and of the data that it was tuned on"
SHARD = re.compile(r"(model|pytorch_model)-[0-9]+-of-[0-9]+\.(safetensors|bin)")


def model_folder(
    path: str | os.PathLike, flag: str = "", overwrite: bool = False, inputs: Iterable[Path] = ()
) -> AbstractContextManager[Path]:
    """Return common.files.new_folder, which with ``overwrite`` replaces a model or a diff."""
    return new_folder(path, flag, inputs, partial(_check_may_replace, flag=flag, overwrite=overwrite))


def _check_may_replace(path: Path, flag: str, overwrite: bool) -> None:
    """Raise UserError unless a folder is to be overwritten and has config.json, weights, and only a model's files."""
    what, cure = f"{flag} {path}".strip(), "so it is not overwritten: choose another path"
    if not overwrite:
        cures = "remove it, choose another path, or overwrite it" if flag else "remove it, or choose another path"
        raise UserError(f"{what} already exists: {cures}")
    if not (path / "config.json").exists() or not any((path / name).exists() for name in WEIGHTS):
        raise UserError(f"{what} is not a model, {cure}")
    own = {"config.json", MANIFEST, RECEIPT, CARD, *WEIGHTS, *SIDE_FILES}
    own |= {DIFF_CARD} if (path / MANIFEST).exists() else set()
    for entry in sorted(path.iterdir()):
        known = entry.name in own or SHARD.fullmatch(entry.name)
        if entry.is_dir():
            known = entry.name == CHAT_TEMPLATES and all(file.suffix == ".jinja" for file in entry.iterdir())
        if not known:
            raise UserError(f"{what} has more than a model in it ({entry.name}), {cure}")


def check_links(source: Path) -> None:
    """Raise UserError if a file that copy_side_files() copies is a link out of its folder.

    A downloaded folder could otherwise have a private file of this machine copied into what is published next. Links
    inside the folder are accepted, and so are those of the hub's cache, from snapshots/REVISION to ../../blobs.
    """
    roots = [source.resolve(), source.resolve().parent.parent / "blobs"]
    templates = (source / CHAT_TEMPLATES).glob("*.jinja")
    for path in [*(source / name for name in (*SIDE_FILES, RECEIPT, CARD, "config.json")), *templates]:
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise UserError(f"{path} is a link out of its folder: remove it, or copy the file there if you trust it")


def copy_side_files(source: Path, target: Path, config: dict) -> None:
    """Copy a model's files beside its weights, and write ``config`` as config.json, which gets its name last.

    They stay as they are, but for private paths: those of PRIVATE, and the folders of the receipt's.
    """
    for name in (*SIDE_FILES, CARD):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    if (copied := target / "tokenizer_config.json").exists() and PRIVATE & (old := read_json(copied)).keys():
        public = {key: value for key, value in old.items() if key not in PRIVATE}
        copied.write_text(json.dumps(public, indent=2) + "\n", encoding="utf-8")
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
    config = {key: value for key, value in config.items() if key not in PRIVATE | {"quantization_config"}}
    (target / f"config.json{UNFINISHED}").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def license_of(tuned: Path, given: str | None) -> str:
    """Return a diff's license: ``given``, with a warning if the tuned model's receipt has another, or the receipt's."""
    try:
        found = str(read_json(tuned / RECEIPT)["data"]["train"]["licence"] or "")
    except (UserError, KeyError, TypeError):  # no receipt, or not train.py's
        found = ""
    if given and found and given.lower().replace(" ", "-") != found.lower().replace(" ", "-"):
        print(printable(f"warning: --license {given}, but the data that the model learned from is {found} ({RECEIPT})"))
    return given or found or LICENSE


def write_diff_card(folder: Path, base: Path) -> None:
    """Write a diff's README.md, from its manifest and receipt, which are there already."""
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    receipt = read_json(folder / RECEIPT) if RECEIPT in files else {}
    card = templates(Path(__file__).with_name("templates")).get_template("diff_card.md")
    text = card.render(read_json(folder / MANIFEST), base=public_name(str(base)), files=files, receipt=receipt)
    (folder / DIFF_CARD).write_text(text, encoding="utf-8")
