"""What a finished run leaves beside the model: training_receipt.json, model_card.md and loss.png.

The receipt says what the model was made from, how, on what, and at what cost; the card is written from the receipt, and
the plot from its losses. No secret is in any of them.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

from alpaca.common.files import git_blob_id, replace_file
from alpaca.common.records import RELEASED_BLOB, jdump
from alpaca.training.meter import clock

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "alpaca_data.json"
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "datasets", "peft", "bitsandbytes")
PACKAGES += ("deepspeed", "liger-kernel")
SECRET = re.compile(r"(_token|secret|password|api_?key)$", re.I)


# ---------------------------------------------------------------------------------------------------------------------
# Facts.


def data_facts(path: str | os.PathLike) -> dict:
    """Hash, size and licence of a data file. ``licence`` is None for data that this project does not know."""
    content = Path(path).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    shipped = SHIPPED.exists() and hashlib.sha256(SHIPPED.read_bytes()).hexdigest() == sha256
    licence = "CC BY-NC 4.0" if shipped or git_blob_id(path) == RELEASED_BLOB else None
    what = "shipped with this project" if shipped else "released by Stanford Alpaca" if licence else "the user's"
    return {"path": str(path), "sha256": sha256, "bytes": len(content), "source": what, "licence": licence}


def git_state(root: Path = ROOT) -> dict | None:
    """Commit, and whether tracked files differ from it; None when ``root`` is no checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != Path(root).resolve():
            return None  # installed somewhere inside another project's checkout
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def hardware(device: torch.device, devices: int) -> dict:
    """Of the first rank's machine; ``gpus`` is the number on all of them together, 0 on a CPU."""
    facts = {"gpus": 0, "gpu": None, "gpu_memory_gib": None}
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        facts = {"gpus": devices, "gpu": torch.cuda.get_device_name(device), "gpu_memory_gib": round(memory / 2**30, 1)}
    elif device.type != "cpu":
        facts |= {"gpus": devices, "gpu": device.type}
    facts |= {"cpu": _cpu_name(), "cpu_cores": os.cpu_count(), "platform": platform.platform(terse=True)}
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return facts
    return facts | {"memory_gib": round(memory / 2**30, 1)}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def without_secrets(value):
    """Arguments without those named like a token, a secret, a password or an API key, however deep they lie."""
    if isinstance(value, dict):
        return {key: without_secrets(entry) for key, entry in value.items() if not SECRET.search(str(key))}
    if isinstance(value, (list, tuple)):
        return [without_secrets(entry) for entry in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def command_without_secrets(argv: list[str]) -> str:
    """The command line with the value of each secret flag as ``…``."""
    shown, hide = [], False
    for word in argv:
        flag, has_value, _ = word.partition("=")
        secret = flag.startswith("--") and bool(SECRET.search(flag))
        shown.append("…" if hide else f"{flag}=…" if secret and has_value else word)
        hide = secret and not has_value
    return " ".join(shown)


# ---------------------------------------------------------------------------------------------------------------------
# The receipt.


def begin(data_path: str, eval_data_path: str | None) -> dict:
    """Facts that may have changed by the time a run ends: the data files, the commit, the time."""
    return {
        "clock": time.monotonic(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "data": {"train": data_facts(data_path), "eval": data_facts(eval_data_path) if eval_data_path else None},
        "git": git_state(),
    }


def collect(begun: dict, trainer, arguments: dict, examples: tuple[int, int]) -> dict:
    """The receipt of a run that has just ended.

    Of a resumed run it counts what led to the model: not what an earlier session did after its last checkpoint.

    Args:
        begun: from ``begin``.
        trainer: a Metered trainer.
        arguments: every argument by name; those that are secret are left out. ``model_name_or_path`` is the model that
            the run began with, ``gpu_hour_price`` dollars for an hour of one GPU (0: not known).
        examples: number of examples to train on and held out.
    """
    meter, state, args = trainer.meter, trainer.state, trainer.args
    totals = meter.totals
    wall = meter.earlier_seconds + time.monotonic() - begun["clock"]
    machine = hardware(meter.device, meter.devices)
    gpu_hours = machine["gpus"] * wall / 3600
    price = arguments.get("gpu_hour_price")
    mfu = meter.mfu(totals)
    config = trainer.model.config
    name = str(arguments["model_name_or_path"])
    return {
        "model": {
            "started_from": name,
            "commit": getattr(config, "_commit_hash", None),
            "type": config.model_type,
            "parameters": meter.parameters,
            "trainable_parameters": meter.trainable,
        },
        "data": {
            "train": begun["data"]["train"] | {"examples": examples[0]},
            "eval": (begun["data"]["eval"] or {"path": None}) | {"examples": examples[1]} if examples[1] else None,
        },
        "git": begun["git"],
        "command": command_without_secrets(sys.argv),
        "arguments": without_secrets(arguments),
        "seed": args.seed,
        "world_size": args.world_size,
        "steps": state.global_step,
        "epochs": round(state.epoch or 0, 4),
        "examples_per_step": round(totals.examples / max(state.global_step, 1), 2),
        "losses": [
            {"step": entry["step"], "loss": entry["loss"], "learning_rate": entry["learning_rate"]}
            for entry in state.log_history
            if "loss" in entry
        ],
        "eval_losses": [
            {"step": entry["step"], "loss": entry["eval_loss"]} for entry in state.log_history if "eval_loss" in entry
        ],
        "tokens": {
            "real": totals.tokens,
            "supervised": totals.supervised,
            "padding": totals.padding,
            "real_per_second": round(totals.tokens / max(totals.train_seconds, 1e-9), 1),
        },
        "mfu": None if mfu is None else round(mfu, 4),
        "peak_memory_gib": round(totals.peak_memory / 2**30, 2),
        "started": begun["started"],
        "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "train_seconds": round(totals.train_seconds, 1),
        "wall_seconds": round(wall, 1),
        "cost": {
            "gpu_hours": round(gpu_hours, 3),
            "gpu_hour_price_usd": price or None,
            "usd": round(gpu_hours * price, 2) if price and machine["gpus"] else None,
        },
        "hardware": machine,
        "versions": versions(),
    }


def write(receipt: dict, output_dir: str | os.PathLike) -> list[str]:
    """Writes training_receipt.json, model_card.md and, where matplotlib is installed, loss.png.

    Returns:
        The names of the files written.
    """
    folder = Path(output_dir)
    jdump(receipt, folder / "training_receipt.json", indent=2)
    with replace_file(folder / "model_card.md") as file:
        file.write(model_card(receipt))
    written = ["training_receipt.json", "model_card.md"]
    png = loss_plot(receipt)
    if png is None:
        print("note: loss.png was not drawn, matplotlib is not installed: pip install '.[plots]'")
        return written
    with replace_file(folder / "loss.png", "wb") as file:
        file.write(png)
    return [*written, "loss.png"]


# ---------------------------------------------------------------------------------------------------------------------
# The card.


def model_card(receipt: dict) -> str:
    """A short card in Markdown, with the front matter that the hub reads in a README.md.

    A model or data file of this machine is called by its last name, since a card is published and a path is private.
    """
    model, data, arguments = receipt["model"], receipt["data"]["train"], receipt["arguments"]
    base, data_name = _public_name(model["started_from"]), Path(data["path"]).name
    licence = data["licence"]
    git = receipt["git"]
    code = f"commit {git['commit'][:12]}{' with local changes' if git['dirty'] else ''}" if git else "an unknown commit"
    held_out = receipt["data"]["eval"]
    front = [
        "---",
        f"license: {'cc-by-nc-4.0' if licence else 'unknown'}",
        f"base_model: {base}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [alpaca, instruction-following]",
        "---",
    ]
    paragraphs = [
        f"# {base}, fine-tuned on {data_name}",
        f"**Model.** {base} ({model['type']}, {_short(model['parameters'])} parameters"
        + (
            f", of which {_short(model['trainable_parameters'])} were trained"
            if model["trainable_parameters"] < model["parameters"]
            else ""
        )
        + f"), fine-tuned with `train.py` of alpaca-reproduced at {code}.",
        f"**Data.** {data_name}, {data['source']}: {data['examples']:,} examples to train on"
        + (f", {held_out['examples']:,} held out" if held_out else ", none held out")
        + f". SHA-256 `{data['sha256']}`. "
        + (
            f"It is under {licence}: not for commercial use."
            if licence
            else "Its licence is not known to the program that wrote this card: whoever publishes the model names it."
        ),
        f"**Recipe.** Instruction, input and answer in the Alpaca template; loss on the answer and its end-of-sequence "
        f"token only; {_recipe(receipt, arguments)}.",
        f"**Result.** {_result(receipt)}",
        f"**Hardware, time, cost.** {_effort(receipt)}",
        "**Intended use.** Research on instruction following. "
        + ("Not commercial use, which the data forbids; not " if licence else "Not ")
        + "advice on health, law or money; not anything where a wrong answer does harm.",
        "**Limits.** It states falsehoods fluently, more so the smaller it is. It has no alignment beyond its data: it "
        "may answer harmful requests, and repeat the biases of the base model and of the data's author. It answers one "
        "instruction at a time, in the language of its data.",
        "**Licence.** That of the base model for the weights"
        + (f", and {licence} of the data for what was learnt from it." if licence else ", and that of the data."),
        "Every argument, loss and version is in training_receipt.json.",
    ]
    return "\n".join(front) + "\n\n" + "\n\n".join(paragraphs) + "\n"


def _public_name(path: str) -> str:
    local = os.path.exists(path) or path.startswith((".", "/", "~"))
    return Path(path).resolve().name if local else path


def _recipe(receipt: dict, arguments: dict) -> str:
    warmup = arguments.get("warmup_steps") or 0
    warmup = f"{warmup:.0%} warm-up" if 0 < warmup < 1 else f"{warmup:.0f} steps of warm-up"
    schedule = str(arguments.get("lr_scheduler_type", "")).rpartition(".")[2].lower()
    numbers = "bfloat16" if arguments.get("bf16") else "float16" if arguments.get("fp16") else "float32"
    parts = [
        f"{receipt['epochs']:g} epoch{'s' * (receipt['epochs'] != 1)}",
        f"{receipt['examples_per_step']:g} examples a step",
        f"learning rate {arguments['learning_rate']:g} ({schedule}, {warmup})",
        f"weight decay {arguments.get('weight_decay', 0):g}",
        f"at most {arguments['model_max_length']:,} tokens" if "model_max_length" in arguments else "",
        f"LoRA of rank {arguments['lora_r']}" if arguments.get("lora_r") else "all weights trained in float32",
        f"computed in {numbers}",
        f"seed {receipt['seed']}",
    ]
    return ", ".join(part for part in parts if part)


def _result(receipt: dict) -> str:
    text = ""
    if receipt["losses"]:
        first, last = receipt["losses"][0], receipt["losses"][-1]
        text = f"Training loss {first['loss']:.3f} at step {first['step']}, {last['loss']:.3f} at step {last['step']}. "
    if evals := receipt["eval_losses"]:
        before = f"{evals[0]['loss']:.3f} before, " if evals[0]["step"] == 0 else ""
        text += f"Loss on held-out examples {before}{evals[-1]['loss']:.3f} after. "
    return text + "No benchmark or human evaluation was part of this run."


def _effort(receipt: dict) -> str:
    machine, tokens, cost = receipt["hardware"], receipt["tokens"], receipt["cost"]
    where = f"{machine['gpus']} × {machine['gpu']}" if machine["gpus"] else f"{machine['cpu']} (no GPU)"
    padded = tokens["padding"] / max(tokens["real"] + tokens["padding"], 1)
    text = (
        f"{where}; {clock(receipt['wall_seconds'])} (h:mm:ss) in all, {clock(receipt['train_seconds'])} of it "
        f"training; {tokens['real']:,} tokens at {tokens['real_per_second']:,.0f} a second, {padded:.1%} padding"
    )
    if receipt["mfu"] is not None:
        text += f"; {receipt['mfu']:.1%} of the GPUs' peak used (MFU)"
    text += f"; {receipt['peak_memory_gib']:.1f} GiB of memory at most. "
    if cost["usd"] is not None:
        return text + f"{cost['gpu_hours']:.2f} GPU-hours at ${cost['gpu_hour_price_usd']:g}: ${cost['usd']:.2f}."
    return text + (f"{cost['gpu_hours']:.2f} GPU-hours." if machine["gpus"] else "No GPU-hours were paid for.")


def _short(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


# ---------------------------------------------------------------------------------------------------------------------
# The plot.


def running_mean(values: list[float], window: int) -> list[float]:
    """The mean of ``window`` values around each (odd; near an end of as many as there are on both sides)."""
    half = window // 2
    means = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        means.append(sum(values[i - reach : i + reach + 1]) / (2 * reach + 1))
    return means


def loss_plot(receipt: dict) -> bytes | None:
    """Training loss, light and smoothed, and held-out loss over steps, as a PNG; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return None
    ink, light, strong, eval_colour = "#1f2328", "#88ccee", "#332288", "#cc6677"
    figure = Figure(figsize=(8, 4.5), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = [e["step"] for e in receipt["losses"]], [e["loss"] for e in receipt["losses"]]
    smooth = len(losses) >= 20
    marker = "" if len(losses) > 1 else "o"
    label = "training, each logging step" if smooth else "training"
    axes.plot(steps, losses, color=light if smooth else strong, linewidth=1, marker=marker, label=label)
    if smooth:
        window = max(3, len(losses) // 20) | 1
        label = f"training, mean of {window} around it"
        axes.plot(steps, running_mean(losses, window), color=strong, linewidth=2, label=label)
    if evals := receipt["eval_losses"]:
        x, y = [e["step"] for e in evals], [e["loss"] for e in evals]
        label = f"held out: {y[0]:.3f} → {y[-1]:.3f}" if len(y) > 1 else f"held out: {y[0]:.3f}"
        axes.plot(x, y, color=eval_colour, linewidth=1, linestyle=":", marker="o", markersize=6, label=label)
    axes.set_xlabel(f"optimizer step ({receipt['examples_per_step']:g} examples each)", color=ink)
    axes.set_ylabel("cross entropy (nats per supervised token)", color=ink)
    base, data = _public_name(receipt["model"]["started_from"]), Path(receipt["data"]["train"]["path"]).name
    axes.set_title(f"{base} on {data}", loc="left", color=ink)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e5e7eb")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
