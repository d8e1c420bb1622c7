"""What a run shows while it trains: real tokens a second, padding, MFU, peak memory, ETA; log lines and a bar.

A Trainer calls ``count`` with each batch, ``gather`` before it logs or saves, and logs ``figures`` beside the loss. A
real token is one that is not padding.
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import asdict, dataclass

import psutil
import torch
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from alpaca.training.examples import IGNORE_INDEX

# FLOP/s of one GPU at bf16 (V100, T4: fp16) without sparsity, from NVIDIA's data sheets; half the figure if a sheet has
# only that with sparsity. A card matches the first line whose words all occur in its name.
PEAK_FLOPS = {
    ("GB200",): 2500e12,
    ("B200",): 2250e12,
    ("GH200",): 989e12,
    ("H200",): 989e12,
    ("H100", "PCIe"): 756e12,
    ("H100", "NVL"): 835e12,
    ("H100",): 989e12,
    ("H800",): 989e12,
    ("A100",): 312e12,
    ("A800",): 312e12,
    ("L40S",): 362e12,
    ("A10",): 125e12,
    ("V100",): 125e12,
    ("T4",): 65e12,
    ("RTX", "4090"): 165e12,
    ("RTX", "3090"): 71e12,
}


def peak_flops(name: str) -> float | None:
    """Return FLOP/s of the GPU of that name (``torch.cuda.get_device_name``); None if unknown, or a slice of a GPU."""
    words = set(re.split(r"[^A-Za-z0-9]+", name))
    if "MIG" in words:
        return None
    return next((flops for known, flops in PEAK_FLOPS.items() if words.issuperset(known)), None)


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs and tokens.


def model_flops(model: nn.Module) -> tuple[int, int]:
    """Return FLOPs of a training step for one token, and for one token per token of its example.

    As in appendix B of PaLM (Chowdhery et al., 2022), which nanoGPT's ``estimate_mfu`` follows: a weight of a matrix
    product costs 6 FLOPs a token (a multiplication and an addition in the forward pass, in the gradient of the input
    and in the gradient of the weight), and attention 12·L·H·Q·T, with L layers, H heads of size Q and T tokens in the
    example; the causal half that need not be computed is not subtracted. So an example of T tokens costs
    ``first·T + second·T²``. Recomputation under activation checkpointing does not count.

    The input embedding is a look-up and does not count; the output embedding does, tied or not, for each real token.
    (A run that computes only the logits of supervised tokens spends less than it is credited with: at most 2% at 7B.)
    A frozen matrix, as under LoRA, has no weight gradient: 4 FLOPs a token.
    """
    per_token = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):  # not weight.numel(): 4-bit weights are packed, ZeRO-3 leaves 0 elements
            per_token += module.in_features * module.out_features * (6 if module.weight.requires_grad else 4)
        elif isinstance(module, Conv1D):  # GPT-2's matrices
            per_token += module.weight.numel() * (6 if module.weight.requires_grad else 4)
    config = model.config.get_text_config()
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
    """Count a batch without waiting for the device: int64 (4,), on the device of the inputs.

    Args:
        inputs: one of
            padded: ``attention_mask`` (rows, columns), 1 for real tokens and 0 for padding;
            padding-free: ``position_ids`` (rows, columns) that restart at 0 with each example. All tokens are real.

            and ``labels`` or ``shift_labels``: IGNORE_INDEX where nothing is learned (or no entry at all).

    Returns:
        Real tokens; supervised ones; the sum of the squares of the examples' lengths; examples.
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
    return torch.stack([real, (labels != IGNORE_INDEX).sum(), squares, examples]).long()


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


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held: allocated by torch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as file:  # getrusage's figure would start with that of the parent process
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):  # not Linux: what it holds now; a Meter keeps the highest
        return psutil.Process().memory_info().rss


# ---------------------------------------------------------------------------------------------------------------------
# The meter.


class Meter(TrainerCallback):
    """Count tokens and time, and show them on rank 0: a line each logging step, and a bar if stderr is a terminal.

    Attributes:
        totals: what was counted until the last ``gather``, over all ranks.
    """

    KEY = "meter_totals"  # in trainer_state.json's stateful_callbacks, from which a resumed run continues

    def __init__(self, model: nn.Module, device: torch.device, devices: int):
        self.per_token, self.per_square = model_flops(model)
        self.parameters = sum(elements(p) for p in model.parameters())
        self.trainable = sum(elements(p) for p in model.parameters() if p.requires_grad)
        self.device, self.devices = device, devices
        self.peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.totals, self._logged = Totals(), Totals()
        self._slots, self._counts = 0, torch.zeros(4, dtype=torch.int64, device=device)
        self._started = self._begun = self._step_ended = time.monotonic()
        self.earlier_seconds = 0.0  # of the sessions before this one, as far as they are in the checkpoint
        self._paused = self._before = 0.0
        self._first_step = 0
        self._bar = self._eval_bar = None

    def count(self, inputs: dict[str, torch.Tensor]) -> None:
        """Count a batch that this rank trains on."""
        self._slots += inputs["input_ids"].numel()
        self._counts += count_tokens(inputs).to(self.device, non_blocking=True)

    def gather(self, gather, state) -> None:
        """Add what all ranks have counted since the last call to ``totals``. Every rank must call it.

        Args:
            gather: (1, 6) int64 of each rank → (ranks, 6), as ``accelerator.gather``.
            state: the trainer's, which takes the totals into the next checkpoint.
        """
        row = torch.tensor([self._slots, peak_memory(self.device)], dtype=torch.int64, device=self.device)
        rows = gather(torch.cat([self._counts, row])[None]).tolist()
        self._slots = 0
        self._counts.zero_()
        tokens, supervised, squares, examples, slots, _ = (sum(column) for column in zip(*rows, strict=True))
        totals = self.totals
        totals.tokens += tokens
        totals.supervised += supervised
        totals.examples += examples
        totals.padding += slots - tokens
        totals.flops += self.per_token * tokens + self.per_square * squares
        totals.peak_memory = max(totals.peak_memory, *(row[-1] for row in rows))
        totals.train_seconds = self._before + self._step_ended - self._begun - self._paused
        totals.wall_seconds = self.earlier_seconds + time.monotonic() - self._started
        state.stateful_callbacks[self.KEY] = {"args": {}, "attributes": asdict(totals)}

    def mfu(self, totals: Totals) -> float | None:
        """Return model FLOPs of real tokens as a share of what the GPUs could do at bf16; None if that is unknown."""
        if self.peak is None or not totals.train_seconds:
            return None
        return totals.flops / (totals.train_seconds * self.peak * self.devices)

    def figures(self, state) -> dict[str, float]:
        """Return what is logged beside the loss: rates since the last call, over all ranks."""
        now, last = self.totals, self._logged
        since = Totals(*(b - a for a, b in zip(asdict(last).values(), asdict(now).values(), strict=True)))
        self._logged = Totals(**asdict(now))
        seconds = max(since.train_seconds, 1e-9)
        a_step = (now.train_seconds - self._before) / max(state.global_step - self._first_step, 1)
        mfu = self.mfu(since)
        return {
            "tokens": now.tokens,
            "tokens_per_second": round(since.tokens / seconds, 1),
            "supervised_tokens_per_second": round(since.supervised / seconds, 1),
            "padding_share": round(since.padding / max(since.tokens + since.padding, 1), 4),
            "peak_memory_gib": round(now.peak_memory / 2**30, 2),
            "eta_seconds": round(a_step * (state.max_steps - state.global_step)),
        } | ({} if mfu is None else {"mfu": round(mfu, 4)})

    # Callbacks.

    def on_train_begin(self, args, state, control, **kwargs):
        # What came before, such as a rehearsal, does not count; what a checkpoint had counted does.
        saved = (state.stateful_callbacks or {}).get(self.KEY, {"attributes": {}})["attributes"]
        self.totals, self._logged = Totals(**saved), Totals(**saved)
        self._before, self.earlier_seconds = self.totals.train_seconds, self.totals.wall_seconds
        self._slots = 0
        self._counts.zero_()
        self._first_step = state.global_step
        self._begun = self._step_ended = time.monotonic()
        self._paused = 0.0
        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                disable=True if args.disable_tqdm else None,  # None: no bar unless stderr is a terminal
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {elapsed} gone{postfix}",
            )

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = True  # otherwise the last steps are not logged if logging_steps does not divide them
        if self.device.type == "cuda" and (control.should_log or control.should_evaluate or control.should_save):
            torch.cuda.synchronize(self.device)  # otherwise the queue's rest would count as evaluation or saving
        self._step_ended = time.monotonic()
        if self._bar is not None:
            self._bar.update(1)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if state.is_world_process_zero and self._eval_bar is None:
            self._eval_bar = tqdm(
                total=len(eval_dataloader),
                desc="evaluating",
                unit="batch",
                leave=False,
                disable=True if args.disable_tqdm else None,
            )
        if self._eval_bar is not None:
            self._eval_bar.update(1)

    def on_evaluate(self, args, state, control, **kwargs):
        if self._eval_bar is not None:
            self._eval_bar.close()
            self._eval_bar = None
        self.on_save(args, state, control)

    def on_save(self, args, state, control, **kwargs):
        now = time.monotonic()
        self._paused += now - self._step_ended
        self._step_ended = now

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            if self._bar is not None:
                self._bar.set_postfix_str(f"{clock(logs['eta_seconds'])} to go, loss {logs['loss']:.4f}", refresh=False)
            line = log_line(logs, state.global_step, state.max_steps)
        elif "eval_loss" in logs:
            seconds = f" ({logs['eval_runtime']:.1f} s)" if "eval_runtime" in logs else ""
            line = f"step {state.global_step}/{state.max_steps} | eval_loss {logs['eval_loss']:.4f}{seconds}"
        elif "train_runtime" in logs:
            line = self.summary(state)
        else:
            return
        tqdm.write(line)  # to stdout; a bar on the same terminal is moved out of the way
        sys.stdout.flush()

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.close()

    def summary(self, state) -> str:
        """Return the whole run in a line."""
        totals, mfu = self.totals, self.mfu(self.totals)
        padding = totals.padding / max(totals.tokens + totals.padding, 1)
        return (
            f"{state.global_step} steps in {clock(totals.train_seconds)} | {totals.tokens:,} tokens "
            f"({totals.supervised / max(totals.tokens, 1):.0%} supervised) | "
            f"{totals.tokens / max(totals.train_seconds, 1e-9):,.0f} tokens/s | padding {padding:.1%} | "
            f"{'' if mfu is None else f'MFU {mfu:.1%} | '}peak {totals.peak_memory / 2**30:.1f} GiB"
        )


def log_line(logs: dict[str, float], step: int, steps: int) -> str:
    """Return one logging step, for people and grep: ``step 10/1218 | epoch 0.02 | loss 1.2345 | … | ETA 0:31:12``."""
    grad = f"grad {logs['grad_norm']:.2f} | " if "grad_norm" in logs else ""
    mfu = f"MFU {logs['mfu']:.1%} | " if "mfu" in logs else ""
    return (
        f"step {step:>{len(str(steps))}}/{steps} | epoch {logs.get('epoch', 0):.2f} | loss {logs['loss']:.4f} | "
        f"lr {logs['learning_rate']:.2e} | {grad}{logs['tokens_per_second']:,.0f} tokens/s "
        f"({logs['supervised_tokens_per_second']:,.0f} supervised) | padding {logs['padding_share']:.1%} | "
        f"{mfu}peak {logs['peak_memory_gib']:.1f} GiB | ETA {clock(logs['eta_seconds'])}"
    )


def clock(seconds: float) -> str:
    """Return seconds as ``h:mm:ss``."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
