"""How fast train.py trains, beside the original's recipe and TRL, on one device. One command, everyone in the same run.

    python benchmarks/bench_train.py                    # a CPU: SmolLM2-135M, about 20 minutes on 2 cores
    python benchmarks/bench_train.py --rounds 3         # a GPU of 120 GB or more: random weights of LLaMA-7B's shape

Contenders, each run in a process of its own, in turn, --rounds times; the median counts:

    original      the recipe of Stanford Alpaca as today's library runs it: batches padded to their longest example,
                  SDPA with a mask, AdamW not fused, logits of all tokens
    ours          train.py as it is by default: no padding
    ours_packed   train.py --packing: rows of the maximal length, filled; as many as hold a step's examples
    trl           TRL's SFTTrainer, padded as by default
    trl_flat      the same with padding_free=True

All begin with the same weights in float32 and, but for ours_packed, see the same examples in the same order. On a GPU
all compute in bf16 with tf32. TRL's gradient checkpointing, on by default, is off as it is for the others; so is its
bf16 on a CPU, where that is slower. The first steps are a warm-up and do not count; saving and evaluation are no part
of it. TRL comes with ``pip install '.[bench]'``; without it its rows are left out. Two things to know of its rows: on a
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
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from provenance import provenance  # noqa: E402
from released_mix import EPOCH_TOKENS, MAX_LENGTH, MEAN_TOKENS, encode, make_data  # noqa: E402

import utils  # noqa: E402
from alpaca.training.meter import IGNORE_INDEX, Metered, Totals  # noqa: E402
from alpaca.training.receipt import hardware  # noqa: E402

CONTENDERS = ("original", "ours", "ours_packed", "trl", "trl_flat")
EPOCHS = 3
SMOLLM2 = Path.home() / ".cache" / "alpaca" / "smollm2-135m-instruct"


# ---------------------------------------------------------------------------------------------------------------------
# The model of a large GPU, and the original's batches.


def random_llama_7b(folder: Path, records: list[dict]) -> Path:
    """LLaMA-7B's shape with random bf16 weights, and a byte-level BPE of up to 32,000 tokens made from ``records``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>", "[PAD]"]
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    texts = (utils.format_prompt(r["instruction"], r["input"]) + r["output"] for r in records)
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())  # its defaults are the 7B model
    model.save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    del model
    torch.cuda.empty_cache()
    return folder


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
    """Notes a trainer's totals and losses at each step."""

    newest: Stopwatch

    def __init__(self, trainer):
        self.trainer, self.noted, self.losses = trainer, [], []
        trainer.add_callback(self)
        Stopwatch.newest = self

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.noted.append(dataclasses.replace(self.trainer.meter.totals))
            self.losses.append(round(logs["loss"], 5))

    def on_train_end(self, args, state, control, **kwargs):
        raise Finished


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
    if contender.startswith("ours"):
        start = ours(contender, s, shared)
    else:
        micro = s["micro_batch"]
        shared |= {"per_device_train_batch_size": micro, "gradient_accumulation_steps": s["batch"] // micro}
        start = (original if contender == "original" else trl)(contender, s, shared)
    try:
        start()
    except Finished:
        pass
    watch = Stopwatch.newest
    first, last = watch.noted[s["warmup"] - 1] if s["warmup"] else Totals(), watch.noted[-1]
    meter = watch.trainer.meter
    since = Totals(*(b - a for a, b in zip(dataclasses.astuple(first), dataclasses.astuple(last), strict=True)))
    mfu = meter.mfu(since)
    return {
        "tokens_per_second": round(since.tokens / since.train_seconds, 2),
        "supervised_tokens_per_second": round(since.supervised / since.train_seconds, 2),
        "padding_share": round(since.padding / (since.padding + since.tokens), 4),
        "mfu": None if mfu is None else round(mfu, 4),
        "peak_memory_gib": round(last.peak_memory / 2**30, 2),
        "seconds": round(since.train_seconds, 3),
        "tokens": since.tokens,
        "examples": since.examples,
        "losses": watch.losses,
    }


def load(s: dict):
    tokenizer = transformers.AutoTokenizer.from_pretrained(s["model"])
    return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(s["model"], dtype=torch.float32)


def original(contender: str, s: dict, shared: dict):
    class Original(Metered, transformers.Trainer):
        pass

    tokenizer, model = load(s)
    args = transformers.TrainingArguments(optim="adamw_torch", remove_unused_columns=False, **shared)
    dataset = encode(utils.load_records(s["data"]), tokenizer)
    trainer = Original(model=model, args=args, train_dataset=dataset, data_collator=pad)
    Stopwatch(trainer)
    return trainer.train


def trl(contender: str, s: dict, shared: dict):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class TRL(Metered, SFTTrainer):
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
    trainer = TRL(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    Stopwatch(trainer)
    return trainer.train


def ours(contender: str, s: dict, shared: dict):
    import train

    micro, batch = s["our_micro_batch"], s["batch"]
    flags = ["--model_name_or_path", s["model"], "--data_path", s["data"], "--model_max_length", MAX_LENGTH]
    if contender == "ours_packed":
        # A row of MAX_LENGTH tokens holds about 4 examples: as many rows as have the tokens of a step.
        per_row = MAX_LENGTH / MEAN_TOKENS
        micro, batch = max(round(micro / per_row), 1), max(round(batch / per_row), 1)
        flags += ["--packing", "True"]
    shared |= {"per_device_train_batch_size": micro, "gradient_accumulation_steps": max(batch // micro, 1)}
    known = {
        field.name for group in (train.DataArguments, train.TrainingArguments) for field in dataclasses.fields(group)
    }
    if "skip_save_rehearsal" in known:
        shared["skip_save_rehearsal"] = True
    for name, value in shared.items():
        flags += [f"--{name}", value]

    class Timed(train.Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            Stopwatch(self)

    train.Trainer = Timed
    arguments = train.parse_args([str(flag) for flag in [*flags, *s["our_flags"].split()]])
    return lambda: train.train(*arguments)


# ---------------------------------------------------------------------------------------------------------------------
# All runs.


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(ROOT / "alpaca_data.json"), help="texts that the data is made from")
    parser.add_argument(
        "--model_path", help=f"default: {SMOLLM2} (made if need be), or LLaMA-7B's shape on a large GPU"
    )
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
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


def main() -> None:
    a = parse()
    if a.once:
        settings = json.loads(a.settings)
        utils.jdump(run_once(a.once, settings), settings["result"])
        return
    gpu = torch.cuda.is_available()
    device = torch.device("cuda:0" if gpu else "cpu")
    batch = a.batch or (128 if gpu else 8)
    records = utils.load_records(a.data)
    contenders = [name for name in a.contenders if find_spec("trl") or not name.startswith("trl")]
    if len(contenders) < len(a.contenders):
        print("trl is not installed (pip install '.[bench]'): left out")
    with tempfile.TemporaryDirectory(prefix="bench_train.") as folder:
        if a.model_path:
            model = a.model_path
        elif gpu and torch.cuda.get_device_properties(0).total_memory >= 120e9:
            print("making random weights of LLaMA-7B's shape", flush=True)
            model = str(random_llama_7b(Path(folder) / "llama-7b-random", records))
        else:
            model = str(SMOLLM2)
            if not SMOLLM2.exists():
                command = [sys.executable, "-m", "alpaca.embedded_model", "prepare", "--model_path", model]
                subprocess.run(command, check=True, cwd=ROOT)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        made = make_data(records, tokenizer, batch * (a.warmup + a.steps))
        data = Path(folder) / "data.json"
        utils.jdump(made, data)
        examples = encode(made, tokenizer)
        lengths = sorted(len(example["input_ids"]) for example in examples)
        learnt = sum(label != IGNORE_INDEX for example in examples for label in example["labels"])
        mix = {
            "texts": os.path.relpath(a.data, ROOT),
            "examples": len(made),
            "tokens_mean": round(statistics.mean(lengths), 1),
            "tokens_median": statistics.median(lengths),
            "tokens_p98": lengths[math.ceil(0.98 * len(lengths)) - 1],
            "tokens_longest": lengths[-1],
            "supervised_share": round(learnt / sum(lengths), 3),
        }
        print(f"{Path(model).name}; data: {mix}", flush=True)
        settings = {"gpu": gpu, "model": model, "data": str(data), "batch": batch, "micro_batch": a.micro_batch}
        settings |= {"our_micro_batch": a.our_micro_batch or a.micro_batch, "our_flags": a.our_flags}
        settings |= {"warmup": a.warmup, "steps": a.steps}
        runs: dict[str, list[dict]] = {name: [] for name in contenders}
        for round_ in range(a.rounds):
            for name in contenders:
                result = measure(name, settings, Path(folder))
                runs[name].append(result)
                print(f"round {round_ + 1}  {name:<12}{result['tokens_per_second']:>10,.1f} tokens/s", flush=True)
        rows = summary(runs)
        for name, row in rows.items():
            mfu = "" if row["mfu"] is None else f"MFU {row['mfu']:.1%}  "
            print(
                f"{name:<12}{row['tokens_per_second']:>10,.1f} tokens/s  ×{row.get('times_original', 1):<5}  "
                f"padding {row['padding_share']:.1%}  {mfu}{row['peak_memory_gib']:.1f} GiB  "
                f"52 K × 3 epochs: {row['projected_hours']:.2f} h"
            )
        packages = ["torch", "transformers", "accelerate", *(["trl"] if find_spec("trl") else [])]
        report = provenance(*packages) | {"hardware": hardware(device, 1 if gpu else 0), "model": Path(model).name}
        report |= {"data": mix, "examples_per_step": batch, "warmup_steps": a.warmup, "measured_steps": a.steps}
        report |= {"micro_batch": a.micro_batch, "our_micro_batch": settings["our_micro_batch"]}
        report |= {"our_flags": a.our_flags, "contenders": rows}
        target = a.output or ROOT / "benchmarks" / "results" / f"train_{'gpu' if gpu else 'cpu'}.json"
        utils.jdump(report, target, indent=2)
        print(f"wrote {target}")


def measure(name: str, settings: dict, folder: Path) -> dict:
    """One run in a process of its own."""
    settings = settings | {"result": str(folder / "result.json"), "output_dir": str(folder / "out")}
    command = [sys.executable, __file__, "--once", name, "--settings", json.dumps(settings)]
    env = {"CUDA_VISIBLE_DEVICES": "0"} | os.environ | {"HF_HUB_OFFLINE": "1"}  # one device, whatever is there
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    if child.returncode:
        raise SystemExit(f"error: {name} failed:\n{child.stdout[-2000:]}\n{child.stderr[-4000:]}")
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").unlink()
    return result


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
