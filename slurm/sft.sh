#!/usr/bin/env bash
# Supervised fine-tuning under Slurm, one process a task:
#   sbatch slurm/sft.sh examples/quickstart/sft.toml [--key value ...]
# Submit from the root of the repository. Size it with sbatch's own options; they win over the ones below:
#   sbatch --nodes 8 --ntasks-per-node 8 --gpus-per-node 8 --time 24:00:00 slurm/sft.sh examples/glm45_air_106b/sft.toml
#
# The seconds of --signal before the time limit, the run finishes its step, writes a checkpoint, and the job goes back to
# the queue. A step, a checkpoint and the half minute between two looks of Slurm must fit into them, and the time limit
# must be well above them. scancel ends a job for good; submitted again, a run goes on from its newest whole checkpoint.
# A second attempt may have other nodes, tasks and layout.* (with expert parallelism if, and only if, the first had it).
#
# JOBNAME-JOBID.txt has all attempts, with what rank 0 printed. JOBNAME-JOBID.attempt-N/ has rank-R.txt of every rank
# and, unless all ended with 0, first-end.txt: the rank that ended so first, its exit status, which becomes that of
# the job, and its traceback. Exit status: 0 done, 1 an error, 2 configuration, 3 diverged, 4 stalled, 75 stopped on
# request with a checkpoint written.
#SBATCH --job-name=klong-sft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.txt
#
# Environment, with its defaults:
#   KLONG_PYTHON             .venv/bin/python   the interpreter, the same path on every node; in a container: python3
#   KLONG_LOG_FOLDER         .                  where the attempt folders lie; all nodes share it
#   KLONG_CONTAINER          (none)             image to run in; the repository is mounted at its own path
#   KLONG_CONTAINER_ENGINE   pyxis              or apptainer
#   KLONG_CONTAINER_MOUNTS   (none)             more mounts, HOST:CONTAINER,...: shards, weights, run folder
set -euo pipefail

if [[ $# -eq 0 || -z ${SLURM_JOB_ID:-} ]]; then
    echo "usage: sbatch slurm/sft.sh CONFIG.toml [--key value ...]" >&2
    exit 2
fi
cd "$SLURM_SUBMIT_DIR"

say() {
    echo "[sft] $(date -u +%FT%TZ) job $SLURM_JOB_ID: $*"
}

mkdir -p "${KLONG_LOG_FOLDER:-.}"
logs=$(cd "${KLONG_LOG_FOLDER:-.}" && pwd)
attempt=$logs/$SLURM_JOB_NAME-$SLURM_JOB_ID.attempt-$((${SLURM_RESTART_COUNT:-0} + 1))
mkdir "$attempt" # an attempt never writes over another
export KLONG_STOP_FILE=$attempt/stop KLONG_FIRST_END=$attempt/first-end.txt

# What stands before the program: options of srun, or a program that enters the container.
image=${KLONG_CONTAINER:-}
mounts=$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR,$logs:$logs${KLONG_CONTAINER_MOUNTS:+,$KLONG_CONTAINER_MOUNTS}
srun_options=()
enter=()
case ${image:+${KLONG_CONTAINER_ENGINE:-pyxis}} in
    "")
        python=${KLONG_PYTHON:-.venv/bin/python}
        if [[ ! -x $python ]]; then
            echo "$SLURM_SUBMIT_DIR/$python: not found; run make setup, or set KLONG_PYTHON" >&2
            exit 2
        fi
        ;;
    pyxis)
        srun_options=("--container-image=$image" "--container-mounts=$mounts" "--container-workdir=$SLURM_SUBMIT_DIR")
        ;;
    apptainer)
        enter=(apptainer exec --nv --bind "$mounts" --pwd "$SLURM_SUBMIT_DIR" "$image")
        ;;
    *)
        echo "KLONG_CONTAINER_ENGINE=$KLONG_CONTAINER_ENGINE: unknown; set it to pyxis or apptainer" >&2
        exit 2
        ;;
esac
python=${python:-${KLONG_PYTHON:-python3}}

# All processes meet on the first node, at a port that follows from the job, so that jobs do not collide.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node -o "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
WORLD_SIZE=$SLURM_NTASKS
export MASTER_ADDR MASTER_PORT WORLD_SIZE
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} # a process a core must not start a thread on every core

requeue=
trap 'requeue=yes; touch "$KLONG_STOP_FILE"; say "the time limit is near, asked all processes to stop"' USR1
trap 'say "asked by Slurm to end"' TERM # the processes are asked by Slurm as well

say "attempt $((${SLURM_RESTART_COUNT:-0} + 1)), $WORLD_SIZE processes on $SLURM_JOB_NODELIST; all they print: $attempt"
srun --mpi=none --kill-on-bad-exit=1 "${srun_options[@]}" --output="$attempt/rank-%t.txt" \
    "${enter[@]}" bash slurm/task.sh "$python" -m megatron_klong.train.sft "$@" &
step=$!
tail --pid="$step" -n +1 -F "$attempt/rank-0.txt" 2>/dev/null & # it complains until the file is there
screen=$!

while kill -0 "$step" 2>/dev/null; do
    wait "$step" || true # a trap ends it early
done
status=0
wait "$step" || status=$?
wait "$screen" || true

first=$KLONG_FIRST_END
if [[ -s $first ]]; then
    status=$(sed -n '1s/.*: exit status //p' "$first")
fi
if ((status == 75)); then
    if [[ -n $requeue ]]; then
        say "checkpoint written after $SECONDS s, the job goes back to the queue"
        scontrol requeue "$SLURM_JOB_ID" || say "it may not be requeued; submit it again to go on"
    else
        say "stopped on request after $SECONDS s, checkpoint written; submit it again to go on"
    fi
elif [[ -s $first ]]; then
    say "the first to fail, as in $first:"
    cat "$first"
    if (($(wc -l <"$first") == 1)); then
        rank=$(sed -n '1s/^rank \([0-9]*\) .*/\1/p' "$first")
        echo "the last lines of $attempt/rank-$rank.txt:"
        tail -n 80 "$attempt/rank-$rank.txt"
    fi
    silent=$(grep -L " stalled: " "$attempt"/rank-*.txt || true) # its status differs between versions
    if ((status == 4)) && [[ -n $silent ]]; then
        printf "ranks that did not say where they are:\n%s\n" "$silent"
    fi
fi
say "exit status $status after $SECONDS s"
exit "$status"
