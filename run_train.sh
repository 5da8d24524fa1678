#!/usr/bin/env bash
# Train a job: CONFIG_FILE=train_configs/debug.toml NGPU=1 ./run_train.sh [--table.key value ...]
#   CONFIG_FILE  the job file                                          NGPU      processes on this machine
#   LOG_RANK     local ranks whose console is shown (comma-separated)  PYTHON    the interpreter
# On several nodes it is started once on each (docs/jobs.md; slurm/pretrain.sbatch does so), with the same
#   NNODES         number of nodes
#   RDZV_ENDPOINT  HOST[:PORT] where they meet, HOST one of them; port 29500 unless it says another
#   RDZV_ID        name of the run, for runs that meet at the same place
# and each with its own
#   NODE_RANK      0 on HOST, then 1, 2, ...; torchrun orders the nodes where it is not set
set -euo pipefail

CONFIG_FILE=${CONFIG_FILE:-train_configs/debug.toml}
if [ -z "${PYTHON:-}" ]; then
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    if [ -x "$here/.venv/bin/python" ]; then PYTHON=$here/.venv/bin/python; else PYTHON=python3; fi
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

# It checks the job first, and ends with the exit code of the ranks: 0 done, or interrupted by a signal and saved (the run
# folder's status.json says which); 2 bad input; 3 numbers that are not finite; anything else is a failure.
exec "$PYTHON" -m nitp_titan.launch "$CONFIG_FILE" "$@"
