"""Uploads a finished model to the hub, once, in one commit."""

from __future__ import annotations

import os
from pathlib import Path

from alpaca import UserError
from alpaca.common.text import first_line
from alpaca.training.distributed import say
from alpaca.weights.checkpoint import CHAT_TEMPLATES, SIDE_FILES

# Files of an output folder that are uploaded: the model, what it needs to be used, and the run's record.
PUBLISHED = ("*.safetensors", "*.safetensors.index.json", "config.json", *SIDE_FILES, f"{CHAT_TEMPLATES}/*.jinja")
PUBLISHED += ("model_card.md", "training_receipt.json", "loss.png")


def open_repository(args) -> str | None:
    """Make the repository that push_to_hub asks for, or find it. Return its name; None without push_to_hub."""
    if not args.push_to_hub:
        return None
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    if int(os.environ.get("RANK", 0)) != 0:
        return name
    from huggingface_hub import HfApi

    return HfApi(token=args.hub_token).create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id


def upload(repository: str | None, output_dir: Path, args) -> None:
    """Upload what PUBLISHED names; every rank may call it, after the last save.

    Args:
        repository: from open_repository.
        output_dir: with the finished model, its tokenizer, card and receipt.
        args: hub_token and hub_revision are used.

    Raises:
        UserError: the upload failed; the model in the folder is still complete.
    """
    if repository is None or int(os.environ.get("RANK", 0)) != 0:
        return
    from huggingface_hub import CommitOperationAdd, HfApi

    files = sorted(path for pattern in PUBLISHED for path in output_dir.glob(pattern))
    names = {"model_card.md": "README.md"}  # what the hub shows
    commit = [CommitOperationAdd(names.get(path.name, str(path.relative_to(output_dir))), path) for path in files]
    where = {"token": args.hub_token, "revision": getattr(args, "hub_revision", None)}
    try:
        HfApi().create_commit(repository, commit, commit_message="The trained model", **where)
    except Exception as e:  # whatever the network does, the run is done
        raise UserError(
            f"the upload to {repository} failed ({first_line(e)}); the model in {output_dir} is complete: "
            f"hf upload {repository} {output_dir} . --exclude '*/*' --exclude trainer_state.json"
        ) from e
    say(f"uploaded {len(files)} files to {repository}")
