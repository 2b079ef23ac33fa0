#!/usr/bin/env bash
# One stage of progressive RL under Slurm: rollouts in sandboxes on the first node, engine and trainer as job steps.
#   sbatch slurm/rl_stage.sh examples/quickstart/rl.toml --stage 1 [--key value ...]
# Submit from the root of the repository. Size it with sbatch's own options; they win over the ones below:
#   sbatch --nodes 8 --ntasks-per-node 8 --gpus-per-node 8 slurm/rl_stage.sh rl.toml --stage 1
# The trainer has one process a task. A job that is stopped and submitted again goes on: finished episodes are in the
# bank, and what was trained is in the newest whole checkpoint. One stage after the other:
#   sbatch --dependency=afterok:JOB slurm/rl_stage.sh rl.toml --stage 2
#SBATCH --job-name=klong-rl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.txt
#
# Environment, with its defaults:
#   KLONG_PYTHON   .venv/bin/python   the interpreter, the same path on every node
set -euo pipefail

if [[ $# -eq 0 || -z ${SLURM_JOB_ID:-} ]]; then
    echo "usage: sbatch slurm/rl_stage.sh CONFIG.toml --stage NUMBER [--key value ...]" >&2
    exit 2
fi
cd "$SLURM_SUBMIT_DIR"
python=${KLONG_PYTHON:-.venv/bin/python}
if [[ ! -x $python ]]; then
    echo "$SLURM_SUBMIT_DIR/$python: not found; run make setup, or set KLONG_PYTHON" >&2
    exit 2
fi

# Trainer processes meet on the first node, at a port that follows from the job; the engine listens there too.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
KLONG_FIRST_ADDRESS=$(scontrol show node -o "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
KLONG_PORT=$((20000 + SLURM_JOB_ID % 10000))
export KLONG_FIRST_ADDRESS KLONG_PORT
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} # a process a core must not start a thread on every core

echo "[rl] $(date -u +%FT%TZ) job $SLURM_JOB_ID: $SLURM_NTASKS tasks on $SLURM_JOB_NODELIST"
status=0
"$python" -m megatron_klong.rl "$@" --launcher slurm --trainer.processes "$SLURM_NTASKS" || status=$?
echo "[rl] $(date -u +%FT%TZ) job $SLURM_JOB_ID: exit status $status after $SECONDS s"
exit "$status"
