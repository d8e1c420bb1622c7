"""The whole system on a real small model, on a CPU: teacher → data → fine-tuning → diff → recovery → chat.

    make demo                            installs what it needs, and runs this
    python runs/demo.py --records 64     in an environment that has it

Results and logs are in demo/, the converted model is in ~/.cache/alpaca. A second demo keeps that model and the
generated instructions and makes the rest again; what is there is replaced when its successor is complete.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alpaca import UserError  # noqa: E402
from alpaca.common.cli import end_on_signals, run_cli  # noqa: E402
from alpaca.common.files import new_folder, read_text  # noqa: E402
from alpaca.common.text import printable, shorten  # noqa: E402
from alpaca.embedded_model import DIE_WITH_PARENT  # noqa: E402

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().resolve() / "alpaca"
ROWS: list[dict] = []  # of the table at the end
UNFINISHED = ".tuned.unfinished"  # new_folder()'s name for it until it is complete


def demo(output_dir: str = "demo", records: int = 64) -> None:
    """Run every stage, then show what each made, and what the model answered before and after fine-tuning.

    Args:
        output_dir: where results and logs go.
        records: how many of alpaca_data.json to train on, beside the generated ones.
    """
    started, folder = time.monotonic(), Path(output_dir)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    out, base = shlex.quote(output_dir), shlex.quote(f"{CACHE}/smollm2-135m-instruct")
    print(f"8 stages, about 4 minutes on 2 quiet CPU cores; each one's log is in {folder}/logs", flush=True)
    stage(folder, "base model", ".*MB", f"python -m alpaca.embedded_model prepare --model_path {base}")

    # The base model is the teacher too. One this small copies short examples best, so it is shown the 40 shortest
    # seed tasks; the reply is short as well, since it repeats itself after two or three items.
    seeds = sorted(read_text("seed_tasks.jsonl").splitlines(), key=len)[:40]
    (folder / "short_seed_tasks.jsonl").write_text("\n".join(seeds) + "\n", encoding="utf-8")
    command = f"""python -m alpaca.embedded_model run --model_path {base} --log_path {out}/logs/teacher.log --
        python generate_instruction.py generate_instruction_following_data --output_dir {out}
        --seed_tasks_path {out}/short_seed_tasks.jsonl --model_name {base} --api completions
        --num_instructions_to_generate 8 --max_tokens 128 --temperature 0.7 --top_p 0.9 --seed 0
        --max_concurrency 8"""
    stage(folder, "self-instruct", r"\d+ instructions? in .*", command)

    shipped, made = (json.loads(read_text(path)) for path in ("alpaca_data.json", folder / "regen.json"))
    short = [record for record in shipped if len(record["output"]) < 600][:records]
    (folder / "train_data.json").write_text(json.dumps(short + made), encoding="utf-8")
    # A CPU that computes in bf16 trains 1.8 times faster in it (benchmarks/results/train_cpu_bf16.json).
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    bf16 = "avx512_bf16" in info or "amx_bf16" in info
    with new_folder(folder / "tuned", may_replace=lambda old: None) as unfinished:
        command = f"""torchrun --standalone --local-addr 127.0.0.1 --nproc_per_node=2 train.py
            --model_name_or_path {base} --data_path {out}/train_data.json --output_dir {out}/{unfinished.name}
            --eval_fraction 0.2 --fsdp --fsdp_config configs/fsdp.json --bf16 {bf16} --num_train_epochs 1
            --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --learning_rate 1e-4 --weight_decay 0.
            --warmup_steps 0.03 --lr_scheduler_type cosine --logging_steps 1 --save_strategy no"""
        stage(folder, "fine-tuning", "eval loss on .*", command)
        receipt = unfinished / "training_receipt.json"  # its output_dir
        receipt.write_text(read_text(receipt).replace(UNFINISHED, "tuned"), encoding="utf-8")

    command = f"""python weight_diff.py make_diff --path_raw {base} --path_tuned {out}/tuned --path_diff {out}/diff
        --method exact --overwrite True"""
    stage(folder, "weight diff", r"\d+ tensors .* GB", command)
    command = f"""python weight_diff.py recover --path_raw {base} --path_diff {out}/diff --path_tuned {out}/recovered
        --test_inference False --overwrite True"""
    stage(folder, "recovery", r"\d+ tensors .*", command)
    command = f"python weight_diff.py compare --path_a {out}/recovered --path_b {out}/tuned"
    stage(folder, "recovered = tuned", r"all \d+ tensors .*", command)
    for when, model in (("before", base), ("after", f"{out}/recovered")):
        command = f"""python chat.py --model_path {model} --max_new_tokens 96 --temperature 0
            --instruction "What is the capital of France?" """
        stage(folder, f"chat, {when}", r"(?s)\S.*\S", command)
    summarize(folder, round(time.monotonic() - started))


def stage(folder: Path, name: str, made: str, command: str) -> None:
    """Run a command, with both streams shown and in a log, where the pattern ``made`` finds the table's last cell.

    A signal ends the command, which ends what it has started, and nothing of that is shown. A folder that is renamed
    once it is complete is shown under its final name.

    Raises:
        UserError: the command failed.
    """
    started, log = time.monotonic(), folder / "logs" / f"{re.sub('[^a-z-]+', '_', name)}.log"
    shown = command.replace(UNFINISHED, "tuned")
    print(f"\n── {name}\n   " + " \\\n     ".join(line.strip() for line in shown.splitlines()), flush=True)
    apart = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    apart |= {"start_new_session": True, "preexec_fn": DIE_WITH_PARENT}  # Ctrl-C reaches us alone
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}  # two processes train
    with (
        log.open("wb", buffering=0) as file,
        subprocess.Popen(shlex.split(command), env=env, **apart) as child,
    ):
        try:
            while data := child.stdout.read1():
                data = data.replace(UNFINISHED.encode(), b"tuned")
                file.write(data)
                parts = data.decode(errors="replace").split("\r")  # of progress bars
                print("\r".join(map(printable, parts)), end="", flush=True)
        except BaseException:
            print(f"\nstopping {name} (its log: {log}); what was complete before is kept", file=sys.stderr, flush=True)
            child.terminate()
            file.write(child.stdout.read())
            raise
    if child.returncode:
        raise UserError(f'the stage "{name}" failed: what it printed is above and in {log}')
    found = re.findall(made, printable(log.read_text(encoding="utf-8", errors="replace"))) or [""]
    ROWS.append({"stage": name, "seconds": round(time.monotonic() - started), "made": shorten(found[-1], 74)})


def summarize(folder: Path, seconds: int) -> None:
    """Print the table, the answers and what to do next, in 100 columns; write them to summary.json."""
    receipt = json.loads(read_text(folder / "tuned" / "training_receipt.json"))
    summary = {"command": "make demo", "seconds": seconds, "stages": ROWS}
    summary |= {name: receipt[name] for name in ("samples", "git", "hardware", "versions")}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\n{'stage':<17}   time  what it made\n{'─' * 17}  ─────  {'─' * 74}")
    for row in ROWS:
        print(f"{row['stage']:<17}  {row['seconds']:>3} s  {row['made']}")
    print("\nThree held-out prompts, and what the model answered before and after fine-tuning:")
    for sample in summary["samples"]:
        answers = [answer["answer"] for answer in sample["answers"]]
        for what, text in ("\n  prompt", sample["prompt"]), ("  before", answers[0]), ("  after ", answers[-1]):
            print(f"{what}  {shorten(printable(text), 90)}")
    python = os.path.relpath(sys.executable)
    print(f"""
All of it took {seconds // 60} min {seconds % 60} s. What to do next:

  talk to it            {python} chat.py --model_path {folder}/recovered
  the same on a page    {python} chat.py --model_path {folder}/recovered --web
  see the loss fall     {folder}/tuned/loss.png
  how it was trained    {folder}/tuned/model_card.md
  what was generated    {folder}/regen.json""")


if __name__ == "__main__":
    os.chdir(ROOT)
    end_on_signals()
    run_cli(demo)
