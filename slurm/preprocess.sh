#!/usr/bin/env bash
# Transcripts to a shard under Slurm: a job array makes the parts, a job that depends on it the shard.
#   arguments=(--input transcripts/ --output-prefix data/sft --tokenizer path/to/tokenizer --max-tokens 131072)
#   parts=$(sbatch --parsable --array=0-15 slurm/preprocess.sh "${arguments[@]}")
#   sbatch --dependency=afterok:"$parts" --kill-on-invalid-dep=yes slurm/preprocess.sh "${arguments[@]}"
# Submit from the root of the repository. Both are given the same arguments, those of tools/preprocess_trajectories.py;
# each task of the array does its share of the parts, with one worker a CPU (--cpus-per-task). The job without --array
# makes what is missing, so that a task that was killed costs time and nothing else, and lays all parts end to end:
# the shard is the same byte for byte as that of one run on one machine. --output-prefix lies on a file system that all
# nodes share; until the shard stands, its parts lie beside it in PREFIX.parts.
#SBATCH --job-name=klong-preprocess
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.txt
#
# Environment, with its defaults:
#   KLONG_PYTHON   .venv/bin/python   the interpreter, the same path on every node
set -euo pipefail

if [[ $# -eq 0 || -z ${SLURM_JOB_ID:-} ]]; then
    echo "usage: sbatch [--array=0-15] slurm/preprocess.sh --input FOLDER --output-prefix PREFIX --tokenizer PATH ..." >&2
    exit 2
fi
cd "$SLURM_SUBMIT_DIR"
python=${KLONG_PYTHON:-.venv/bin/python}
if [[ ! -x $python ]]; then
    echo "$SLURM_SUBMIT_DIR/$python: not found; run make setup, or set KLONG_PYTHON" >&2
    exit 2
fi
export PYTHONPATH=$SLURM_SUBMIT_DIR${PYTHONPATH:+:$PYTHONPATH}

options=(--workers "${SLURM_CPUS_PER_TASK:-1}")
what="the shard"
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    # The tasks of --array=3,7 would be shares 0 and 4 of 2: ids must be consecutive.
    # shellcheck disable=SC2153  # Slurm sets all of these
    if ((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN + 1 != SLURM_ARRAY_TASK_COUNT)); then
        echo "--array: ids must follow each other, as in --array=0-15; submit again" >&2
        exit 2
    fi
    share=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT
    options+=(--part "$share")
    what="part $share"
fi

echo "[preprocess] $(date -u +%FT%TZ) job $SLURM_JOB_ID: $what on $SLURM_JOB_NODELIST"
status=0
"$python" tools/preprocess_trajectories.py "$@" "${options[@]}" || status=$?
echo "[preprocess] $(date -u +%FT%TZ) job $SLURM_JOB_ID: exit status $status after $SECONDS s"
exit "$status"
