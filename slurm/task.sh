#!/usr/bin/env bash
# One process of a training job, as slurm/sft.sh has srun start it: rank from Slurm, and its end on record.
#   srun ... bash slurm/task.sh COMMAND...
# Who ends first with a status other than 0 is written to $KLONG_FIRST_END. What Python can say itself it has written
# there before (megatron_klong/train/failure.py); a killed or crashed process is written down here.
set -euo pipefail

readonly stopped=75 # on request, checkpoint written (megatron_klong/train/stopping.py)
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
trap : TERM USR1 # Slurm signals all processes of a step: COMMAND decides what it means

status=0
"$@" || status=$?
if ((status != 0)); then
    set -o noclobber # only the first can create it
    { echo "rank $RANK on $SLURMD_NODENAME: exit status $status" >"$KLONG_FIRST_END"; } 2>/dev/null || true
fi
# srun kills the others behind a bad end; behind an agreed one they may close in peace
((status != stopped)) || status=0
exit "$status"
