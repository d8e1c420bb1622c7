"""What a finished run writes next to the model: training_receipt.json, model_card.md and loss.png.

The receipt says what the model was made from, how, on what hardware, and at what cost. The card
(templates/model_card.md) is filled from the receipt, and the plot drawn from its losses. They contain no secrets.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import psutil
import torch
from huggingface_hub import CommitOperationAdd, HfApi

from alpaca import UserError
from alpaca.chat_template import go_template
from alpaca.common.files import replace_file
from alpaca.common.records import files_of, json_text, restricted_parts, title
from alpaca.common.text import first_line, public_name, published_receipt, templates, utc_now
from alpaca.inference.generate import STOP
from alpaca.training.distributed import say
from alpaca.training.meter import clock
from alpaca.weights.checkpoint import CHAT_TEMPLATES, SIDE_FILES, read_json

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("python", "cuda", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "datasets", "peft")
PACKAGES += ("bitsandbytes", "deepspeed", "liger-kernel")
SECRET = re.compile(r"(_token|secret|password|api_?key)$", re.I)


def data_facts(path: str | os.PathLike, records: Sequence[dict]) -> dict:
    """Return hash and size of data (of several files, the hash of all in order; for hub data, none), and its license.

    ``parts`` says how many of the records are from known data, and ``licence`` is the strictest of its licenses: None
    if no record is known.
    """
    files, digest = files_of(path), hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    facts = {"path": str(path), "sha256": digest.hexdigest() if files else None, "records": len(records)}
    facts |= {"bytes": sum(file.stat().st_size for file in files), "parts": restricted_parts(records, files)}
    return facts | {"licence": "CC BY-NC 4.0" if facts["parts"] else None}


def git_state(root: Path = ROOT) -> dict | None:
    """Return the commit, and whether tracked files differ from it; None if ``root`` is not a checkout."""
    if not (root / ".git").exists():  # installed, maybe somewhere inside another project's checkout
        return None
    words = ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": found.removesuffix("-dirty"), "dirty": found.endswith("-dirty")}


def versions() -> dict[str, str]:
    """Return the versions of the installed ``PACKAGES``."""
    installed = {package.name: package.version for package in metadata.distributions()}
    found = {"python": platform.python_version(), "cuda": torch.version.cuda}
    return {name: version for name, version in (found | installed).items() if version and name in PACKAGES}


def hardware(device: torch.device, devices: int) -> dict:
    """Describe the first rank's machine; ``gpus`` is the number over all machines (``devices``), 0 on a CPU."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"^model name\s*: (.*)", info.read_text() if info.exists() else "", re.M)
    return {
        **({"gpus": 0, "gpu": None} if gpu == "cpu" else {"gpus": devices, "gpu": gpu}),
        "cpu": cpu[1] if cpu else platform.machine(),
        "cpu_cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "platform": platform.platform(terse=True),
    }


def without_secrets(value):
    """Return arguments without those named like a token, secret, password or API key, at any depth."""
    if isinstance(value, dict):
        return {key: without_secrets(entry) for key, entry in value.items() if not SECRET.search(str(key))}
    if isinstance(value, (list, tuple)):
        return [without_secrets(entry) for entry in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def begin(data_path: str, records: Sequence[dict], eval_data_path: str | None, held_out: Sequence[dict]) -> dict:
    """Return facts that may have changed by the time a run ends: the data files, the commit, the time."""
    evaluated = data_facts(eval_data_path, held_out) if eval_data_path else None
    return {
        "clock": time.monotonic(),
        "started": utc_now(),
        "data": {"train": data_facts(data_path, records), "eval": evaluated},
        "git": git_state(),
    }


def collect(begun: dict, trainer, arguments: dict, examples: tuple[int, int]) -> dict:
    """Return the receipt of a run that has just ended: what ``begin`` returned, and what was done since.

    For a resumed run, what led to the model counts: not what an earlier session did after its last checkpoint.
    ``arguments`` are all of the run's, by name; ``examples`` the numbers of training and held-out examples.
    """
    meter, state, config = trainer.meter, trainer.state, trainer.model.config
    totals, machine = meter.totals, hardware(meter.device, meter.devices)
    rates = totals.rates(meter.peak)
    wall = meter.earlier_seconds + time.monotonic() - begun["clock"]
    gpu_hours, price = machine["gpus"] * wall / 3600, arguments.get("gpu_hour_price")
    trained, held_out = begun["data"]["train"], begun["data"]["eval"] or {"path": None}
    losses = [{key: e[key] for key in ("step", "loss", "learning_rate")} for e in state.log_history if "loss" in e]
    return {
        "model": {
            "started_from": str(arguments["model_name_or_path"]),
            "commit": getattr(config, "_commit_hash", None),  # of a hub's repository; private in 5.23
            "type": config.model_type,
            "parameters": meter.parameters,
            "trainable_parameters": meter.trainable,
        },
        "data": {
            "train": trained | {"examples": examples[0]},
            "eval": held_out | {"examples": examples[1]} if examples[1] else None,
        },
        "git": begun["git"],
        "arguments": without_secrets(arguments),
        "world_size": trainer.args.world_size,
        "steps": state.global_step,
        "epochs": round(state.epoch or 0, 4),
        "examples_per_step": round(totals.examples / max(state.global_step, 1), 2),
        "losses": losses,
        "eval_losses": [{"step": e["step"], "loss": e["eval_loss"]} for e in state.log_history if "eval_loss" in e],
        "tokens": {
            "real": totals.tokens,
            "supervised": totals.supervised,
            "padding": totals.padding,
            "real_per_second": rates["tokens_per_second"],
        },
        "mfu": rates.get("mfu"),
        "peak_memory_gib": rates["peak_memory_gib"],
        "started": begun["started"],
        "ended": utc_now(),
        "train_seconds": round(totals.train_seconds, 1),
        "wall_seconds": round(wall, 1),
        "cost": {
            "gpu_hours": round(gpu_hours, 3),
            "gpu_hour_price_usd": price or None,
            "usd": round(gpu_hours * price, 2) if price and gpu_hours else None,
        },
        "hardware": machine,
        "versions": versions(),
    }


def modelfile(tokenizer, context: int | None) -> str:
    """Return the file for ``ollama create``, without a template if the tokenizer's cannot be translated."""
    try:
        template = f'TEMPLATE """{go_template(tokenizer)}"""\n'
    except UserError:
        template = ""
    stops = "".join(f"PARAMETER stop {json_text(text)}\n" for text in (tokenizer.eos_token, STOP))
    return f"FROM .\n{template}{stops}PARAMETER num_ctx {min(context or 4096, 4096)}\n"  # 4096 is Ollama's default


def write(receipt: dict, output_dir: str | os.PathLike, **others: str) -> list[str]:
    """Write the receipt, the card, the plot if matplotlib is installed, and others by name. Return all names."""
    files = {"training_receipt.json": json_text(receipt, 2) + "\n", "model_card.md": model_card(receipt), **others}
    if png := loss_plot(receipt):
        files["loss.png"] = png
    else:
        print("note: loss.png was not drawn, matplotlib is not installed: pip install -e '.[plots]'")
    for name, content in files.items():
        with replace_file(Path(output_dir) / name, "wb" if isinstance(content, bytes) else "w") as file:
            file.write(content)
    return list(files)


# ---------------------------------------------------------------------------------------------------------------------
# The card and the plot.


def model_card(receipt: dict) -> str:
    """Return a short card in Markdown, with the front matter that the hub reads in a README.md.

    A local model or data file appears by its last name only: a card is published, and a path is private.
    """
    environment = templates(Path(__file__).with_name("templates"))
    environment.filters |= {"clock": clock, "human_count": human_count, "number": format}
    tokens, data = receipt["tokens"], receipt["data"]["train"]
    return environment.get_template("model_card.md").render(
        receipt,
        base=public_name(receipt["model"]["started_from"]),
        data_name=title(data["path"]),
        licence=data["licence"],
        warmup=receipt["arguments"].get("warmup_steps") or 0,  # below 1 a share of all steps
        schedule=str(receipt["arguments"]["lr_scheduler_type"]).rpartition(".")[2].lower(),
        padded=tokens["padding"] / max(tokens["real"] + tokens["padding"], 1),
    )


def human_count(count: int) -> str:
    """Return a count for people: "6.74 B", "112.6 M", "7,000"."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def loss_plot(receipt: dict) -> bytes | None:
    """Draw training loss, light and smoothed, and held-out loss over steps. Return a PNG, None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    steps, losses = [e["step"] for e in receipt["losses"]], [e["loss"] for e in receipt["losses"]]
    axes.plot(steps, losses, "o-"[len(losses) > 1], color="#88ccee", linewidth=1, label="training, each logging step")
    window = max(3, len(losses) // 20) | 1
    values = torch.tensor([losses], dtype=torch.float64)
    mean = torch.nn.functional.avg_pool1d(values, window, 1, window // 2, count_include_pad=False)[0].tolist()
    axes.plot(steps, mean, color="#332288", linewidth=2, label=f"training, moving average of {window}")
    if evals := receipt["eval_losses"]:
        x, y = [e["step"] for e in evals], [e["loss"] for e in evals]
        axes.plot(x, y, "o:", color="#cc6677", linewidth=1, label=f"held out: {y[0]:.3f} → {y[-1]:.3f}")
    base, data = public_name(receipt["model"]["started_from"]), title(receipt["data"]["train"]["path"])
    axes.set_title(f"{base} on {data}", loc="left")
    axes.set_xlabel(f"optimizer step ({receipt['examples_per_step']:g} examples on average)")
    axes.set_ylabel("cross entropy (nats per supervised token)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#e5e7eb")
    axes.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# The hub.

# Files of an output folder that are uploaded: the model, what is needed to use it, and the run's record.
PUBLISHED = ("*.safetensors", "*.safetensors.index.json", "config.json", *SIDE_FILES, f"{CHAT_TEMPLATES}/*.jinja")
PUBLISHED += ("model_card.md", "training_receipt.json", "loss.png", "Modelfile")


def open_repository(args) -> str | None:
    """Create the repository for push_to_hub, if needed, on the first rank; return its name there."""
    if not args.push_to_hub or args.process_index != 0:
        return None
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    return HfApi(token=args.hub_token).create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id


def upload(repository: str | None, output_dir: Path, args) -> None:
    """Upload what PUBLISHED names in one commit, after the last save; nothing if open_repository returned None.

    Raises:
        UserError: the upload failed; the model in the folder is still complete.
    """
    if repository is None:
        return
    files = sorted(path for pattern in PUBLISHED for path in output_dir.glob(pattern))
    names = {"model_card.md": "README.md"}  # what the hub shows
    commit = []
    for path in files:
        receipt = path.name == "training_receipt.json"
        content = json_text(published_receipt(read_json(path)), 2).encode() if receipt else path
        commit.append(CommitOperationAdd(names.get(path.name, str(path.relative_to(output_dir))), content))
    where = {"token": args.hub_token, "revision": getattr(args, "hub_revision", None)}
    try:
        HfApi().create_commit(repository, commit, commit_message="The trained model", **where)
    except Exception as e:  # whatever the network does, the run is finished
        raise UserError(
            f"the upload to {repository} failed ({first_line(e)}); the model in {output_dir} is complete: "
            f"hf upload {repository} {output_dir} . --exclude '*/*' --exclude trainer_state.json"
        ) from e
    say(f"uploaded {len(files)} files to {repository}")
