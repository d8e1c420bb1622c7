#!/usr/bin/env bash
# The recipe under Slurm; runs/alpaca_7b.sh lists what to set:
#
#   sbatch --export=ALL,MODEL=/shared/llama-7b,OUT=/shared/alpaca-7b runs/slurm.sh
#
# Five minutes before its time is up, the job saves a checkpoint and requeues itself. After a preemption or a node's
# failure, Slurm requeues it. It continues from the newest complete checkpoint in OUT.
#SBATCH --job-name=alpaca
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

# srun passes SIGTERM on to its tasks, and torchrun to its processes: they finish their step, save and end.
stop="" step="" ending=""
end_step() {
  ending=yes
  [ -z "$step" ] || kill -TERM "$step"
}
trap 'stop=time; end_step' USR1
trap end_step TERM
srun --kill-on-bad-exit=1 bash runs/alpaca_7b.sh "$@" &
step=$!
[ -z "$ending" ] || kill -TERM "$step" # the signal came while srun was starting
while kill -0 "$step" 2>/dev/null; do
  wait "$step" # a signal ends it early
done
wait "$step" # its own exit code, which bash keeps
code=$?
if [ "$stop" = time ] && [ "$code" != 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
