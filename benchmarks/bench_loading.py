"""Host memory and time to load and shard a model over two CPU ranks. One command, a minute on 2 cores.

    python benchmarks/bench_loading.py

Each rank notes its memory every few milliseconds, from the call that loads the model to the first training step; what
it had before that call is subtracted, and the ranks are added up at equal times. "anonymous" is what a kernel without
swap cannot take back; "resident" also counts pages of the mapped checkpoint, which it can. Model: the embedded SmolLM2
(or --model_path), once saved in float32, and once in bfloat16, as large models are. So that a freed tensor goes back to
the system at once, as a large model's do (above 32 MB), glibc's MALLOC_MMAP_THRESHOLD_ is 128 KB.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from provenance import provenance  # noqa: E402

SMOLLM2 = Path.home() / ".cache" / "alpaca" / "smollm2-135m-instruct"
KINDS = {"anonymous": "RssAnon", "resident": "VmRSS"}


def rank(argv: list[str], folder: Path) -> None:
    """Be one rank of a run of train.py that ends at its first step, and write down its memory."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import train

    samples, inner = [], train.load_trained

    def note() -> None:
        status = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text()))
        samples.append(
            [time.monotonic(), *(int(status[field]) * 1024 for field in KINDS.values()), time.process_time()]
        )

    def watch() -> None:
        while True:
            note()
            time.sleep(0.003)

    def load_trained(*args, **kwargs):
        note()
        threading.Thread(target=watch, daemon=True).start()
        return inner(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        note()
        (folder / f"rank-{self.args.process_index}.json").write_text(json.dumps(samples))
        self.accelerator.wait_for_everyone()
        os._exit(0)

    train.load_trained, train.Trainer.training_step = load_trained, training_step
    train.train(*train.parse_args(argv))


def measure(model: Path, size: int, *flags: str) -> dict:
    """Return peaks in models of ``size`` bytes over both ranks, the slower one's seconds, and their processor time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}."} for i in range(8)]
        (folder / "data.json").write_text(json.dumps(records))
        argv = ["--model_name_or_path", model, "--data_path", folder / "data.json", "--output_dir", folder / "out"]
        argv += ["--max_steps", 1, "--report_to", "none", "--skip_save_rehearsal", "True", "--save_strategy", "no"]
        argv += ["--per_device_train_batch_size", 1, "--padding", "longest", "--disable_tqdm", "True", *flags]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MALLOC_MMAP_THRESHOLD_": str(2**17)}
        argv = ["--fsdp", "--fsdp_config", ROOT / "configs" / "fsdp.json", *argv]
        subprocess.run([*launch, "--rank", folder, *map(str, argv)], check=True, env=env, stdout=subprocess.DEVNULL)
        ranks = [json.loads((folder / f"rank-{i}.json").read_text()) for i in (0, 1)]
    found = {"seconds": round(max(samples[-1][0] - samples[0][0] for samples in ranks), 2)}
    found["processor_seconds"] = round(sum(samples[-1][-1] - samples[0][-1] for samples in ranks), 2)
    times = sorted(sample[0] for samples in ranks for sample in samples)
    for column, kind in enumerate(KINDS, start=1):
        total, last, at = [], [samples[0][column] for samples in ranks], [0, 0]
        for now in times:
            for i, samples in enumerate(ranks):
                while at[i] < len(samples) and samples[at[i]][0] <= now:
                    last[i], at[i] = samples[at[i]][column], at[i] + 1
            total.append(sum(last))
        found[f"{kind}_peak_in_models"] = round((max(total) - total[0]) / size, 3)
        found[f"{kind}_end_in_models"] = round((total[-1] - total[0]) / size, 3)
    return found


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        return rank(sys.argv[3:], Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default=str(SMOLLM2))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "loading.json"))
    a = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = provenance("torch", "transformers", "accelerate")
    with tempfile.TemporaryDirectory() as half:
        model = AutoModelForCausalLM.from_pretrained(a.model_path, dtype=torch.bfloat16)
        size = result["float32_bytes"] = sum(parameter.numel() * 4 for parameter in model.parameters())
        model.save_pretrained(half)
        AutoTokenizer.from_pretrained(a.model_path).save_pretrained(half)
        del model
        cases = {
            "float32 file": (Path(a.model_path),),
            "bfloat16 file": (Path(half),),
            "bfloat16 file, LoRA, --bf16": (Path(half), "--lora_r", "8", "--bf16", "True"),
        }
        for name, (folder, *flags) in cases.items():
            rounds = [measure(folder, size, *flags) for _ in range(a.rounds)]
            result[name] = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
            print(name, result[name], flush=True)
    Path(a.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
