"""How fast train.py trains, beside the original's recipe and TRL, on one device. One command, everyone in the same run.

    python benchmarks/bench_train.py                    # a CPU: SmolLM2-135M, about 20 minutes on 2 cores
    bash benchmarks/gpu.sh                              # a GPU: random weights of LLaMA-7B's shape, and other steps

Contenders, each run in a process of its own, in turn, --rounds times; the median counts:

    original      the recipe of Stanford Alpaca as today's library runs it: batches padded to their longest example,
                  SDPA with a mask, AdamW not fused, logits of all tokens
    ours          train.py as it is by default: no padding
    ours_packed   train.py --packing: rows of the maximal length, filled; as many as hold a step's examples
    ours_bf16     train.py --bf16 True; only if named, as a GPU's contenders all are in bf16
    trl           TRL's SFTTrainer, padded as by default
    trl_flat      the same with padding_free=True

All begin with the same weights in float32 and, but for ours_packed, see the same examples in the same order. On a GPU
all compute in bf16 with tf32. TRL's gradient checkpointing, on by default, is off as it is for the others; so is its
bf16 on a CPU, where that is slower. The first steps are a warm-up and do not count; saving and evaluation are no part
of it. TRL comes with ``pip install -e '.[bench]'``; without it its rows are left out. Two things to know of them: on a
CPU its loss lacks the Triton kernels that it is written for; and where the last token of a prompt would merge with the
answer's first, it leaves the prompt's ":" out, so its losses are others than those of the original and ours.

The data: texts of --data, cut to the lengths of the data that Stanford Alpaca released (released_mix.py).

Results go to benchmarks/results/train_cpu.json or train_gpu.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# One device, whatever is there; LLaMA-7B leaves no room for fragments.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import transformers  # noqa: E402
from provenance import provenance  # noqa: E402
from released_mix import EPOCH_TOKENS, MAX_LENGTH, MEAN_TOKENS, encode, make_data  # noqa: E402

import utils  # noqa: E402
from alpaca import embedded_model  # noqa: E402
from alpaca.training.examples import IGNORE_INDEX  # noqa: E402
from alpaca.training.meter import Meter, Totals, peak_flops  # noqa: E402
from alpaca.training.receipt import hardware  # noqa: E402

CONTENDERS = ("original", "ours", "ours_packed", "trl", "trl_flat", "ours_bf16")
EPOCHS = 3
SMOLLM2 = Path.home() / ".cache" / "alpaca" / "smollm2-135m-instruct"


def pad(examples: list[dict]) -> dict[str, torch.Tensor]:
    """int64 (examples, longest)."""
    longest = max(len(example["input_ids"]) for example in examples)

    def rows(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([example[key] + [fill] * (longest - len(example[key])) for example in examples])

    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": rows("input_ids", 0), "labels": rows("labels", IGNORE_INDEX), "attention_mask": mask}


# ---------------------------------------------------------------------------------------------------------------------
# One run of one contender, in its own process.


class Finished(BaseException):
    """Ends a run after its last step, before the library or the script saves anything."""


class Stopwatch(transformers.TrainerCallback):
    """Notes totals, losses and CPU seconds at each step. DEFAULT_CALLBACKS gives it to every Trainer of the process."""

    totals: list[Totals] = []
    losses: list[float] = []
    cpu_seconds: list[float] = [0.0]

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.totals.append(Totals(**state.stateful_callbacks[Meter.KEY]["attributes"]))
            self.losses.append(round(logs["loss"], 5))
            self.cpu_seconds.append(time.process_time())

    def on_train_end(self, args, state, control, **kwargs):
        raise Finished


class Counted:
    """A first base class for the others' Trainers: counts as train.py does."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.meter = Meter(self.model, self.args.device, 1)
        self.add_callback(self.meter)

    def training_step(self, model, inputs, *args, **kwargs):
        self.meter.count(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def store_flos(self):
        self.meter.gather(self.accelerator.gather, self.state)
        super().store_flos()

    def log(self, logs, *args, **kwargs):
        super().log(logs | (self.meter.figures(self.state) if "loss" in logs else {}), *args, **kwargs)


def run_once(contender: str, s: dict) -> dict:
    """Trains for warm-up and measured steps; figures of the measured ones.

    Args:
        contender: one of CONTENDERS.
        s: settings, as ``main`` makes them.
    """
    shared = {
        "output_dir": s["output_dir"],
        "max_steps": s["warmup"] + s["steps"],
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    shared |= {"bf16": True, "tf32": True} if s["gpu"] else {"use_cpu": True}
    micro = s["our_micro_batch"] if contender.startswith("ours") else s["micro_batch"]
    shared |= {"per_device_train_batch_size": micro, "gradient_accumulation_steps": s["batch"] // micro}
    transformers.trainer.DEFAULT_CALLBACKS.append(Stopwatch)
    try:
        {"original": original, "trl": trl}.get(contender.partition("_")[0], ours)(contender, s, shared)
    except Finished:
        pass
    first, last = [Totals(), *Stopwatch.totals][s["warmup"]], Stopwatch.totals[-1]
    since = Totals(*(b - a for a, b in zip(dataclasses.astuple(first), dataclasses.astuple(last), strict=True)))
    peak = peak_flops(torch.cuda.get_device_name()) if s["gpu"] else None
    return {
        "tokens_per_second": round(since.tokens / since.train_seconds, 2),
        "supervised_tokens_per_second": round(since.supervised / since.train_seconds, 2),
        "padding_share": round(since.padding / (since.padding + since.tokens), 4),
        "mfu": round(since.flops / (since.train_seconds * peak), 4) if peak else None,
        "peak_memory_gib": round(last.peak_memory / 2**30, 2),
        "seconds": round(since.train_seconds, 3),
        "cpu_seconds": round(Stopwatch.cpu_seconds[-1] - Stopwatch.cpu_seconds[s["warmup"]], 3),  # of all cores
        "tokens": since.tokens,
        "examples": since.examples,
        "losses": Stopwatch.losses,
    }


def load(s: dict):
    tokenizer = transformers.AutoTokenizer.from_pretrained(s["model"])
    return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(s["model"], dtype=torch.float32)


def original(contender: str, s: dict, shared: dict) -> None:
    class Original(Counted, transformers.Trainer):
        pass

    tokenizer, model = load(s)
    args = transformers.TrainingArguments(optim="adamw_torch", remove_unused_columns=False, **shared)
    dataset = encode(utils.load_records(s["data"]), tokenizer)
    Original(model=model, args=args, train_dataset=dataset, data_collator=pad).train()


def trl(contender: str, s: dict, shared: dict) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class TRL(Counted, SFTTrainer):
        pass

    tokenizer, model = load(s)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = [
        {"prompt": utils.format_prompt(record["instruction"], record["input"]), "completion": record["output"]}
        for record in utils.load_records(s["data"])
    ]
    flat = contender == "trl_flat"
    args = SFTConfig(
        max_length=None if flat else MAX_LENGTH,  # with padding_free it is refused; no example is longer
        padding_free=flat,
        gradient_checkpointing=False,
        **{"bf16": False} | shared,
    )
    TRL(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()


def ours(contender: str, s: dict, shared: dict) -> None:
    import train

    shared |= {"model_name_or_path": s["model"], "data_path": s["data"], "model_max_length": MAX_LENGTH}
    shared["skip_save_rehearsal"] = True
    shared["bf16"] = s["gpu"] or contender == "ours_bf16"
    if contender == "ours_packed":
        # A row of MAX_LENGTH tokens holds about 4 examples: as many rows as have the tokens of a step.
        micro, batch = (max(round(n * MEAN_TOKENS / MAX_LENGTH), 1) for n in (s["our_micro_batch"], s["batch"]))
        shared |= {"packing": True, "per_device_train_batch_size": micro}
        shared["gradient_accumulation_steps"] = max(batch // micro, 1)
    flags = [word for name, value in shared.items() for word in (f"--{name}", str(value))]
    train.train(*train.parse_args([*flags, *s["our_flags"].split()]))


# ---------------------------------------------------------------------------------------------------------------------
# All runs.


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(ROOT / "alpaca_data.json"), help="texts that the data is made from")
    parser.add_argument("--model_path", default=str(SMOLLM2), help="default: SmolLM2-135M, made if need be")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS[:-1]), choices=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender")
    parser.add_argument("--batch", type=int, help="examples a step: 8 on a CPU, 128 on a GPU")
    parser.add_argument("--micro_batch", type=int, default=4, help="examples that are computed at once")
    parser.add_argument("--our_micro_batch", type=int, help="the same for ours; default --micro_batch")
    parser.add_argument("--our_flags", default="", help="more flags for train.py, in one string")
    parser.add_argument("--warmup", type=int, default=1, help="steps that do not count")
    parser.add_argument("--steps", type=int, default=4, help="steps that count")
    parser.add_argument("--output", help="default: benchmarks/results/train_cpu.json or train_gpu.json")
    parser.add_argument("--once", help=argparse.SUPPRESS)  # one contender, in a child process
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def make_mix(a: argparse.Namespace, batch: int, path: Path) -> dict:
    """Writes the data of a run, and returns what is in it."""
    records, tokenizer = utils.load_records(a.data), transformers.AutoTokenizer.from_pretrained(a.model_path)
    made = make_data(records, tokenizer, batch * (a.warmup + a.steps))
    utils.jdump(made, path)
    examples = encode(made, tokenizer)
    lengths = sorted(len(example["input_ids"]) for example in examples)
    learnt = sum(label != IGNORE_INDEX for example in examples for label in example["labels"])
    return {
        "texts": os.path.relpath(a.data, ROOT),
        "examples": len(made),
        "tokens_mean": round(statistics.mean(lengths), 1),
        "tokens_median": statistics.median(lengths),
        "tokens_p98": lengths[math.ceil(0.98 * len(lengths)) - 1],
        "tokens_longest": lengths[-1],
        "supervised_share": round(learnt / sum(lengths), 3),
    }


def main() -> None:
    a = parse()
    if a.once:
        settings = json.loads(a.settings)
        utils.jdump(run_once(a.once, settings), settings["result"])
        return
    packages = ["torch", "transformers", "accelerate", *(["trl"] if find_spec("trl") else [])]
    report, gpu = provenance(*packages), torch.cuda.is_available()
    batch = a.batch or (128 if gpu else 8)
    contenders = [name for name in a.contenders if find_spec("trl") or not name.startswith("trl")]
    if len(contenders) < len(a.contenders):
        print("trl is not installed (pip install -e '.[bench]'): left out")
    if not contenders:
        sys.exit(1)
    embedded_model.prepare(a.model_path)
    with tempfile.TemporaryDirectory(prefix="bench_train.") as folder:
        data = Path(folder) / "data.json"
        mix = make_mix(a, batch, data)
        print(f"{Path(a.model_path).name}; data: {mix}", flush=True)
        settings = {"gpu": gpu, "model": a.model_path, "data": str(data), "batch": batch, "micro_batch": a.micro_batch}
        settings |= {"our_micro_batch": a.our_micro_batch or a.micro_batch, "our_flags": a.our_flags}
        settings |= {"warmup": a.warmup, "steps": a.steps, "output_dir": str(Path(folder) / "out")}
        run = run_once if len(contenders) * a.rounds == 1 else measure
        runs: dict[str, list[dict]] = {name: [] for name in contenders}
        for round_ in range(a.rounds):
            for name in contenders:
                runs[name].append(run(name, settings))
                print(f"round {round_ + 1}  {line(name, runs[name][-1])}", flush=True)
    rows = summary(runs)
    for name, row in rows.items():
        print(f"{line(name, row)}  ×{row.get('times_original', 1):<5}  52 K × 3 epochs: {row['projected_hours']:.2f} h")
    report |= {"hardware": hardware(torch.device("cuda:0" if gpu else "cpu"), int(gpu))}
    report |= {"model": Path(a.model_path).name, "data": mix}
    report |= {"examples_per_step": batch, "warmup_steps": a.warmup, "measured_steps": a.steps}
    report |= {"micro_batch": a.micro_batch, "our_micro_batch": settings["our_micro_batch"]}
    report |= {"our_flags": a.our_flags, "contenders": rows}
    target = a.output or ROOT / "benchmarks" / "results" / f"train_{'gpu' if gpu else 'cpu'}.json"
    utils.jdump(report, target, indent=2)
    print(f"wrote {target}")


def line(name: str, figures: dict) -> str:
    mfu = "" if figures["mfu"] is None else f"MFU {figures['mfu']:.1%}  "
    return (
        f"{name:<12}{figures['tokens_per_second']:>10,.1f} tokens/s  padding {figures['padding_share']:.1%}  {mfu}"
        f"{figures['peak_memory_gib']:.1f} GiB"
    )


def measure(name: str, settings: dict) -> dict:
    """One run in a process of its own."""
    settings = settings | {"result": settings["output_dir"] + ".json"}
    command = [sys.executable, __file__, "--once", name, "--settings", json.dumps(settings)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if child.returncode:
        raise SystemExit(f"error: {name} failed:\n{child.stdout[-2000:]}\n{child.stderr[-4000:]}")
    return json.loads(Path(settings["result"]).read_text())


def summary(runs: dict[str, list[dict]]) -> dict[str, dict]:
    """Medians over the rounds, the speed as a multiple of the original's, and the time of the whole recipe."""
    rows = {}
    for name, results in runs.items():
        rows[name] = {
            key: None if results[0][key] is None else statistics.median(result[key] for result in results)
            for key in ("tokens_per_second", "supervised_tokens_per_second", "padding_share", "mfu", "peak_memory_gib")
        }
        rows[name]["projected_hours"] = round(EPOCH_TOKENS * EPOCHS / rows[name]["tokens_per_second"] / 3600, 3)
        rows[name]["runs"] = results
    if "original" in rows:
        for row in rows.values():
            row["times_original"] = round(row["tokens_per_second"] / rows["original"]["tokens_per_second"], 2)
    return rows


if __name__ == "__main__":
    main()
