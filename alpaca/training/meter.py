"""What a run shows while it trains: real tokens per second, padding, MFU, peak memory, ETA; log lines and bars.

A Trainer calls ``count`` with each batch, ``gather`` before it logs or saves, and logs ``figures`` with the loss. Real
tokens are those that are not padding.
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import asdict, astuple, dataclass, replace
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import ProgressCallback

from alpaca.training.examples import IGNORE_INDEX

# FLOP/s of one GPU at bf16 (V100, T4: fp16) without sparsity, from NVIDIA's data sheets; half the figure if a sheet
# states it only with sparsity. A card matches the first entry whose words all occur in its name.
PEAK_FLOPS = {"GB200": 2500e12, "B200": 2250e12}
PEAK_FLOPS |= {"H100 PCIe": 756e12, "H100 NVL": 835e12} | dict.fromkeys(("GH200", "H200", "H100", "H800"), 989e12)
PEAK_FLOPS |= {"L40S": 362e12, "RTX 4090": 165e12}
PEAK_FLOPS |= dict.fromkeys(("A100", "A800"), 312e12) | {"A10": 125e12, "RTX 3090": 71e12}
PEAK_FLOPS |= {"V100": 125e12, "T4": 65e12}


def peak_flops(name: str) -> float | None:
    """Return FLOP/s of the GPU with that name (``torch.cuda.get_device_name``); None if unknown, or a slice of one."""
    words = set(re.split(r"[^A-Za-z0-9]+", name))
    known = (flops for card, flops in PEAK_FLOPS.items() if words.issuperset(card.split()))
    return None if "MIG" in words else next(known, None)


def model_flops(model: nn.Module) -> tuple[int, int]:
    """Return FLOPs of a training step for one token, and for one token per token of its example.

    As in appendix B of PaLM (Chowdhery et al., 2022), which nanoGPT's ``estimate_mfu`` follows: a weight of a matrix
    product costs 6 FLOPs a token (a multiplication and an addition in the forward pass, in the gradient of the input
    and in the gradient of the weight), and attention 12·L·H·Q·T, with L layers, H heads of size Q and T tokens in the
    example; the causal half that need not be computed is not subtracted. So an example of T tokens costs
    ``first·T + second·T²``. Recomputation under activation checkpointing does not count.

    The input embedding is a look-up and does not count; the output embedding does, tied or not, for each real token.
    (A run that computes only the logits of supervised tokens does less than is counted: at most 2% at 7B.) A frozen
    matrix, as under LoRA, has no weight gradient: 4 FLOPs a token. Of a mixture's experts, those that a token passes
    through count (all of them if the config does not say how many). Convolutions and scans do not count.
    """
    per_token, config = 0, model.config.get_text_config()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            share = 1.0 if name == "weight" and isinstance(module, (nn.Linear, Conv1D)) else 0.0  # Conv1D: GPT-2's
            if weight.ndim == 3 and not isinstance(module, nn.Conv1d):  # (experts, rows, columns)
                share = (getattr(config, "num_experts_per_tok", None) or len(weight)) / len(weight)
            per_token += int(share * elements(weight)) * (6 if weight.requires_grad else 4)
    heads = getattr(config, "num_attention_heads", None)
    if not heads:  # no attention
        return per_token, 0
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return per_token, 12 * config.num_hidden_layers * heads * head_size


def elements(parameter: torch.Tensor) -> int:
    """Count the whole parameter: ZeRO-3's partitions have numel() 0, and bitsandbytes packs two elements in a byte."""
    if (packed := getattr(parameter, "quant_state", None)) is not None:
        return packed.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def count_tokens(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Count a batch without waiting for the device.

    Args:
        inputs: one of
            padded: ``attention_mask`` (rows, columns), 1 for real tokens and 0 for padding;
            padding-free: ``position_ids`` (rows, columns) that restart at 0 with each example. All tokens are real.

            and ``labels`` or ``shift_labels``: IGNORE_INDEX where nothing is learned (or no entry at all).

    Returns:
        int64 (5,) on the device of the inputs: real tokens; supervised ones; the sum of the squares of the examples'
        lengths; examples; tokens with padding.
    """
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and mask.dim() == 2:
        lengths = mask.sum(dim=1)
        real, squares, examples = lengths.sum(), (lengths * lengths).sum(), (lengths > 0).sum()
    else:
        real = torch.ones_like(positions).sum()
        squares = (2 * positions + 1).sum()  # 1 + 3 + … + (2n − 1) = n²
        examples = (positions == 0).sum()
    labels = inputs["shift_labels"] if inputs.get("shift_labels") is not None else inputs["labels"]
    slots = torch.ones_like(inputs["input_ids"]).sum()
    return torch.stack([real, (labels != IGNORE_INDEX).sum(), squares, examples, slots]).long()


@dataclass
class Totals:
    """Counts over all ranks and the whole run: a resumed run continues from those of its checkpoint."""

    tokens: int = 0  # real ones
    padding: int = 0
    supervised: int = 0
    examples: int = 0
    flops: int = 0  # for real tokens
    train_seconds: float = 0.0  # without evaluation and saving
    wall_seconds: float = 0.0  # with them, from the making of the trainer
    peak_memory: int = 0  # bytes on the fullest rank

    def rates(self, peak: float | None) -> dict[str, float]:
        """Return rates of these counts, as logged.

        "mfu" is the FLOPs for real tokens as a share of ``peak``, the FLOP/s of all GPUs; left out if that is None.
        """
        seconds = max(self.train_seconds, 1e-9)
        return {
            "tokens_per_second": round(self.tokens / seconds, 1),
            "supervised_tokens_per_second": round(self.supervised / seconds, 1),
            "padding_share": round(self.padding / max(self.tokens + self.padding, 1), 4),
            "peak_memory_gib": round(self.peak_memory / 2**30, 2),
        } | ({"mfu": round(self.flops / (seconds * peak), 4)} if peak else {})


def peak_memory(device: torch.device) -> int:
    """Return this process's peak memory in bytes: allocated by torch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # getrusage's figure would start with that of the parent process
    peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(peak[1]) * 1024 if peak else psutil.Process().memory_info().rss  # now; a Meter keeps the highest


class Meter(TrainerCallback):
    """Count tokens and time, and print a line each logging step.

    Attributes:
        totals: what was counted until the last ``gather``, over all ranks.
        earlier_seconds: of the sessions before this one, as far as the checkpoint knows them.
        peak: FLOP/s of all GPUs at bf16; None if unknown.
    """

    KEY = "meter_totals"  # in trainer_state.json's stateful_callbacks, from which a resumed run continues

    def __init__(self, model: nn.Module, device: torch.device, devices: int):
        self.per_token, self.per_square = model_flops(model)
        self.parameters = sum(elements(p) for p in model.parameters())
        self.trainable = sum(elements(p) for p in model.parameters() if p.requires_grad)
        self.device, self.devices = device, devices
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = peak * devices if (peak := peak_flops(name)) else None
        self.totals, self._logged = Totals(), Totals()
        self._counts = torch.zeros(5, dtype=torch.int64, device=device)
        self._started = self._since = time.monotonic()
        self._seconds = self.earlier_seconds = 0.0

    def count(self, inputs: dict[str, torch.Tensor]) -> None:
        """Count a batch that this rank trains on."""
        self._counts += count_tokens(inputs).to(self.device, non_blocking=True)

    def gather(self, gather, state) -> None:
        """Add what all ranks have counted since the last call to ``totals``. Every rank must call it.

        Args:
            gather: (1, 6) int64 of each rank → (ranks, 6), as ``accelerator.gather``.
            state: the trainer's, which takes the totals into the next checkpoint.
        """
        peak = self._counts.new_tensor([peak_memory(self.device)])
        rows = gather(torch.cat([self._counts, peak])[None]).tolist()
        self._counts.zero_()
        tokens, supervised, squares, examples, slots, _ = (sum(column) for column in zip(*rows, strict=True))
        totals = self.totals
        totals.tokens += tokens
        totals.supervised += supervised
        totals.examples += examples
        totals.padding += slots - tokens
        totals.flops += self.per_token * tokens + self.per_square * squares
        totals.peak_memory = max(totals.peak_memory, *(row[-1] for row in rows))
        totals.train_seconds = self._seconds
        totals.wall_seconds = self.earlier_seconds + time.monotonic() - self._started
        state.stateful_callbacks[self.KEY] = {"args": {}, "attributes": asdict(totals)}

    def figures(self, state) -> dict[str, float]:
        """Return what is logged with the loss: rates since the last call, over all ranks, and the run's ETA."""
        now, last, self._logged = self.totals, self._logged, replace(self.totals)
        since = Totals(*(b - a for a, b in zip(astuple(last), astuple(now), strict=True)))
        since.peak_memory = now.peak_memory
        eta = now.train_seconds * (state.max_steps / max(state.global_step, 1) - 1)
        return {"tokens": now.tokens, **since.rates(self.peak), "eta_seconds": round(eta)}

    def pause(self) -> None:
        """Leave the time since the last step out of the training time."""
        self._since = time.monotonic()

    # Callbacks.

    def on_train_begin(self, args, state, control, **kwargs):
        # Counts before this point are discarded; those of a checkpoint are kept.
        saved = (state.stateful_callbacks or {}).get(self.KEY, {"attributes": {}})["attributes"]
        self.totals, self._logged = Totals(**saved), Totals(**saved)
        self._seconds, self.earlier_seconds = self.totals.train_seconds, self.totals.wall_seconds
        self._counts.zero_()
        self.pause()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = True  # otherwise the last steps are not logged if logging_steps does not divide them
        if self.device.type == "cuda" and (control.should_log or control.should_evaluate or control.should_save):
            torch.cuda.synchronize(self.device)  # otherwise queued work would count as evaluation or saving
        self._seconds += time.monotonic() - self._since
        self.pause()

    def on_evaluate(self, args, state, control, **kwargs):
        self.pause()

    on_save = on_evaluate

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            line = log_line(logs, state.global_step, state.max_steps)
        elif "eval_loss" in logs:
            loss, seconds = logs["eval_loss"], logs["eval_runtime"]
            line = f"step {state.global_step}/{state.max_steps} | eval_loss {loss:.4f} ({seconds:.1f} s)"
        elif "train_runtime" in logs:
            spent = f"{clock(self.totals.train_seconds)} | {self.totals.tokens:,} tokens"
            line = f"{state.global_step} steps in {spent} | {rates_text(self.totals.rates(self.peak))}"
        else:
            return
        if state.is_world_process_zero:
            tqdm.write(line)  # to stdout; a bar on the same terminal is moved out of the way
            sys.stdout.flush()


class Bars(ProgressCallback):
    """The library's bars of steps and of evaluation, with the loss; a Meter prints the lines."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4f}", refresh=False)


def log_line(logs: dict[str, float], step: int, steps: int) -> str:
    """Return one logging step, for people and grep: ``step 10/1218 | epoch 0.02 | loss 1.2345 | … | ETA 0:31:12``."""
    grad = f"grad {logs['grad_norm']:.2f} | " if "grad_norm" in logs else ""
    return (
        f"step {step:>{len(str(steps))}}/{steps} | epoch {logs.get('epoch', 0):.2f} | loss {logs['loss']:.4f} | "
        f"lr {logs['learning_rate']:.2e} | {grad}{rates_text(logs)} | ETA {clock(logs['eta_seconds'])}"
    )


def rates_text(rates: dict[str, float]) -> str:
    """Return Totals.rates() for people."""
    mfu = f"MFU {rates['mfu']:.1%} | " if "mfu" in rates else ""
    return (
        f"{rates['tokens_per_second']:,.0f} tokens/s ({rates['supervised_tokens_per_second']:,.0f} supervised) | "
        f"padding {rates['padding_share']:.1%} | {mfu}peak {rates['peak_memory_gib']:.1f} GiB"
    )


def clock(seconds: float) -> str:
    """Return seconds as ``h:mm:ss``, or ``1 day, h:mm:ss``."""
    return str(timedelta(seconds=round(seconds)))
