#!/usr/bin/env bash
# Train a job: CONFIG_FILE=train_configs/debug.toml NGPU=1 ./run_train.sh [--table.key value ...]
#   CONFIG_FILE  the job file                                          NGPU      processes on this machine
#   LOG_RANK     ranks whose console is shown (comma-separated)        PYTHON    the interpreter
set -euo pipefail

CONFIG_FILE=${CONFIG_FILE:-train_configs/debug.toml}
NGPU=${NGPU:-1}
LOG_RANK=${LOG_RANK:-0}
if [ -z "${PYTHON:-}" ]; then
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    if [ -x "$here/.venv/bin/python" ]; then PYTHON=$here/.venv/bin/python; else PYTHON=python3; fi
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

# A bad job is told here, in a second, before any process is launched.
"$PYTHON" -m nitp_titan.cli check "$CONFIG_FILE" --ngpu "$NGPU" "$@"

if [ "$NGPU" = 1 ]; then
    exec "$PYTHON" -m nitp_titan.train --job.config_file "$CONFIG_FILE" "$@"
fi
exec "$PYTHON" -m torch.distributed.run --nproc-per-node "$NGPU" --rdzv-backend c10d --rdzv-endpoint localhost:0 \
    --local-ranks-filter "$LOG_RANK" --role rank --tee 3 \
    -m nitp_titan.train --job.config_file "$CONFIG_FILE" "$@"
