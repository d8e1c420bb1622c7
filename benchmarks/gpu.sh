#!/usr/bin/env bash
# What only a GPU can show, the most valuable first: 12 minutes on one card of 140 GB.
#
#     bash benchmarks/gpu.sh                      # writes benchmarks/results/gpu/STEP.json, and ends with a table
#     bash benchmarks/gpu.sh --dry_run            # the same steps with a tiny model on a CPU: whether they run
#     bash benchmarks/gpu.sh --only "tests chat"  # some of them
#
# Run it again to continue: a step that has ended well is skipped. Each step has a time limit, and --budget (seconds,
# 720) is for all of them. Packages that are missing are listed. PYTHON names the interpreter. On a machine that has the
# files without git, say which they are: COMMIT=abc1234 bash benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3} budget=720 output=benchmarks/results/gpu only='' failed=0 patience=1
size=7 small_size=1.1 micro=8 large=32 select='cuda or bf16' compiler=inductor
bench=(--batch 128 --warmup 2 --steps 4) chat=(--prompts 16 --rows 16 --rounds 1) precision=(--bf16 True --tf32 True)
all_tests=(-n 12 tests/training tests/inference tests/weights tests/scripts)
while (($#)); do
  case $1 in
    --dry_run)
      export CUDA_VISIBLE_DEVICES=''
      size=0.001 small_size=0.001 patience=5 compiler=eager micro=4 large=4
      select=flattened_batch all_tests=(tests/training/test_evaluate.py)
      bench=(--batch 4 --warmup 0 --steps 1) chat=(--prompts 2 --rows 2 --rounds 1 --max_new_tokens 2)
      precision=(--use_cpu True) ;;
    --budget) budget=$2 && shift ;;
    --output_dir) output=$2 && shift ;;
    --only) only=$2 && shift ;;
    *) echo "error: unknown flag $1: use --dry_run, --budget SECONDS, --output_dir DIR, --only \"STEP…\"" >&2; exit 2 ;;
  esac
  shift
done
work=$output/work model=$work/$size small=$work/$small_size
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

step() { # NAME SECONDS WORDS…: python WORDS, for so long at most; first it makes the model $needs, if that is not there
  local left limit=$(($2 * patience))
  [[ -z $only || " $only " == *" $1 "* ]] || return
  grep -qs '^  "ok": true' "$output/$1.json" && echo "$1: ended well before" && return
  [[ -z ${needs-} || -d $needs ]] || timeout $((100 * patience)) "$python" benchmarks/made_up_models.py \
    --size "${needs##*/}" --model_path "$needs"
  left=$((budget - SECONDS))
  if [[ ${needs-} && ! -d $needs ]]; then
    failed=1 && echo "$1: no model to run it with"
  elif ((left < 10)); then
    failed=1 && echo "$1: no time left, run this again to continue"
  else
    "$python" benchmarks/gpu_step.py run "$output" "$1" $((limit < left ? limit : left)) "${@:3}" || failed=1
  fi
}
bench() { # NAME SECONDS CONTENDER FLAGS…: steps of 128 examples
  needs=$model step "$1" "$2" benchmarks/bench_train.py --model_path "$model" --rounds 1 "${bench[@]}" --output RESULT \
    --contenders "${@:3}"
}
train() { # NAME SECONDS FLAGS…: train.py as a user runs it, with its rehearsal, checkpoints and the final save
  needs=$small step "$1" "$2" train.py --model_name_or_path "$small" --data_path alpaca_data.json \
    --output_dir "$work/$1-$$" --max_steps 6 --per_device_train_batch_size 8 --save_strategy steps --save_steps 4 \
    --logging_steps 1 "${precision[@]}" "${@:3}"
}

"$python" benchmarks/gpu_step.py missing
mkdir -p "$work" || exit # for 16 GB of models
step tests 100 -m pytest -rf --tb=short -k "$select" tests/training/test_packing.py tests/inference/test_generate.py
bench original 120 original # micro-batches of 4, as in the recipe
bench ours 100 ours --our_micro_batch $micro
bench checkpointed 100 ours --our_micro_batch $large --our_flags '--gradient_checkpointing True'
bench packed 100 ours_packed --our_micro_batch $micro
bench liger 100 ours --our_micro_batch $micro --our_flags '--use_liger_kernel True'
needs=$model step chat 100 benchmarks/bench_chat.py --model_path "$model" "${chat[@]}" --output_path RESULT
train whole 100
bench compiled 200 ours --our_micro_batch $micro --our_flags "--torch_compile_backend $compiler"
bench trl 100 trl_flat
train lora 90 --lora_r 16
step all_tests 300 -m pytest -rf --tb=short "${all_tests[@]}"
"$python" benchmarks/gpu_step.py table "$output"
((failed)) || [[ $only ]] || rm -r "$work"
exit $failed
