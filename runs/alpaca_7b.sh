#!/usr/bin/env bash
# The published recipe, on one GPU, one node or many. The same command continues a run that was stopped.
#
#   MODEL=~/llama-7b OUT=~/alpaca-7b bash runs/alpaca_7b.sh                        all GPUs of this machine
#   MODEL_SIZE=13b MODEL=~/llama-13b OUT=~/alpaca-13b bash runs/alpaca_7b.sh       13B: half the rate, 5 epochs
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=first-host MODEL=… OUT=… bash runs/alpaca_7b.sh    and NODE_RANK=1 on the other
#   sbatch --export=ALL,MODEL=…,OUT=… runs/slurm.sh                                the same under Slurm
#
# MODEL and OUT are folders that every node sees. More flags for train.py may follow. You can also set:
#   GPUS=8         of one node (default: all)             PER_DEVICE=4   examples a GPU computes at once
#   OFFLOAD=1      weights and optimizer in CPU memory: slower, for GPUs that are too small
#   DATA=file      instead of ./alpaca_data.json          MASTER_PORT=29500   MAX_RESTARTS=3   after a process dies
#   DRY_RUN=1      prints the command and ends
set -euo pipefail
for name in MODEL DATA; do # relative paths are the caller's
  [ ! -e "${!name:-}" ] || printf -v "$name" '%s' "$(realpath -s "${!name}")"
done
[ -z "${OUT:-}" ] || OUT="$(realpath -m -s "$OUT")"
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 1
}

BATCH=128 # examples per optimizer step, for both sizes
case "${MODEL_SIZE:-7b}" in
  7b) EPOCHS=3 RATE=2e-5 ;;
  13b) EPOCHS=5 RATE=1e-5 ;;
  *) fail "MODEL_SIZE=$MODEL_SIZE is unknown: use 7b or 13b" ;;
esac
[ -n "${MODEL:-}" ] && [ -n "${OUT:-}" ] || fail "set MODEL to the base model's folder and OUT to one for the result"

# Under Slurm, with one task per node as in runs/slurm.sh, all of this is known.
NNODES="${NNODES:-${SLURM_NNODES:-1}}"
NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-}}"
GPUS="${GPUS:-${SLURM_GPUS_ON_NODE:-}}"
if [ -z "${MASTER_ADDR:-}" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
  MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
fi
if [ -z "$GPUS" ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
  GPUS="$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l)"
elif [ -z "$GPUS" ]; then
  GPUS="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"
  [ "$GPUS" != 0 ] || fail "no GPU was found (nvidia-smi -L): set GPUS, or run make demo, which needs none"
fi

PER_DEVICE="${PER_DEVICE:-4}"
for name in NNODES GPUS PER_DEVICE; do
  [[ "${!name}" =~ ^[1-9][0-9]{0,4}$ ]] || fail "$name=${!name} must be a whole number from 1 to 99999"
done
at_once=$((PER_DEVICE * GPUS * NNODES))
[ $((BATCH % at_once)) = 0 ] || fail "the recipe's $BATCH examples per step are not a multiple of \
PER_DEVICE x GPUS x NNODES = $PER_DEVICE x $GPUS x $NNODES = $at_once: change PER_DEVICE or GPUS"

flags=(
  --model_name_or_path "$MODEL" --data_path "${DATA:-./alpaca_data.json}" --output_dir "$OUT"
  --num_train_epochs "$EPOCHS" --learning_rate "$RATE" --lr_scheduler_type cosine --warmup_steps 0.03 --weight_decay 0.
  --per_device_train_batch_size "$PER_DEVICE" --gradient_accumulation_steps $((BATCH / at_once))
  --model_max_length 512 --bf16 True --tf32 True --logging_steps 1
  --save_strategy steps --save_steps 200 --save_total_limit 1 --resume_from_checkpoint auto
)
processes=$((GPUS * NNODES))
if [ "$processes" = 1 ] && [ -z "${OFFLOAD:-}" ]; then
  command=(python train.py "${flags[@]}" "$@")
else
  if [ "$processes" = 1 ]; then
    flags+=(--deepspeed configs/deepspeed_zero3_offload.json) # FSDP needs two
  else
    flags+=(--fsdp --fsdp_config "configs/fsdp${OFFLOAD:+_offload}.json")
    # While gradients accumulate, each GPU would otherwise hold all of them: 27 GB of float32 for 7B, 52 GB for 13B.
    [ "${MODEL_SIZE:-7b}" = 7b ] || flags+=(--accelerator_config '{"gradient_accumulation_kwargs": {"sync_each_batch": true}}')
  fi
  if [ "$NNODES" = 1 ]; then
    # Without the address torchrun asks for that of the host name, which a container or a laptop may not know.
    nodes=(--standalone --local-addr 127.0.0.1)
  else
    [ -n "${MASTER_ADDR:-}" ] || fail "NNODES=$NNODES needs MASTER_ADDR, the name or address of the first node"
    [[ "$NODE_RANK" =~ ^[0-9]+$ && "$NODE_RANK" -lt "$NNODES" ]] ||
      fail "NNODES=$NNODES needs NODE_RANK on each node: 0 on the one that MASTER_ADDR names, up to $((NNODES - 1)) on the others"
    # torchrun cannot always tell whether MASTER_ADDR is this node: a node does not know all its names and addresses.
    first=false
    [ "$NODE_RANK" != 0 ] || first=true
    nodes=(--nnodes "$NNODES" --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}"
      --rdzv_id "${SLURM_JOB_ID:-alpaca}" --rdzv_conf "is_host=$first")
  fi
  command=(torchrun "${nodes[@]}" --nproc_per_node "$GPUS" --max_restarts "${MAX_RESTARTS:-3}" train.py "${flags[@]}" "$@")
fi

if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${command[@]}"
  printf '\n'
  exit
fi
# torchrun passes SIGTERM on, and by default kills after 30 s what is still saving its checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
# Otherwise restarted processes find each other's old addresses in torchrun's own store, and hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
exec "${command[@]}"
