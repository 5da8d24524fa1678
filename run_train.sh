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
NGPU=${NGPU:-1}
LOG_RANK=${LOG_RANK:-0}
if [ -z "${PYTHON:-}" ]; then
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    if [ -x "$here/.venv/bin/python" ]; then PYTHON=$here/.venv/bin/python; else PYTHON=python3; fi
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

refuse() {
    echo "run_train.sh: $1" >&2
    exit 2
}
for name in NGPU NNODES; do
    [[ ${!name:-1} =~ ^[1-9][0-9]*$ ]] || refuse "$name: found \"${!name}\", expected a whole number of at least 1"
done
if [ -z "${NNODES:-}" ] && [ -n "${RDZV_ENDPOINT:-}${NODE_RANK:-}" ]; then
    refuse "RDZV_ENDPOINT or NODE_RANK is set without NNODES; set NNODES to the number of nodes, or unset them"
fi
NNODES=${NNODES:-1}
rendezvous=(--rdzv-backend c10d --rdzv-endpoint localhost:0)
if [ "$NNODES" -gt 1 ]; then
    [ -n "${RDZV_ENDPOINT:-}" ] || refuse "NNODES=$NNODES needs RDZV_ENDPOINT=HOST[:PORT], the same on every node"
    [[ $RDZV_ENDPOINT == *:* ]] || RDZV_ENDPOINT=$RDZV_ENDPOINT:29500
    rendezvous=(--rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-nitp_titan}")
    if [ -n "${NODE_RANK:-}" ]; then
        [[ $NODE_RANK =~ ^[0-9]+$ ]] && [ "$NODE_RANK" -lt "$NNODES" ] ||
            refuse "NODE_RANK: found \"$NODE_RANK\", expected 0 to $((NNODES - 1)) for NNODES=$NNODES"
        # The c10d rendezvous gives out the ranks itself.
        rendezvous[1]=static
        rendezvous+=(--node-rank "$NODE_RANK")
    fi
fi

# A bad job is told here, in a second, before any process is launched: on every node, since the others would wait for
# one that is missing.
NITP_TITAN_DEVICE=here "$PYTHON" -m nitp_titan.cli check "$CONFIG_FILE" --ngpu "$((NNODES * NGPU))" "$@"

if [ "$((NNODES * NGPU))" = 1 ]; then
    exec "$PYTHON" -m nitp_titan.train --job.config_file "$CONFIG_FILE" "$@"
fi
exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$NGPU" "${rendezvous[@]}" \
    --local-ranks-filter "$LOG_RANK" --role rank --tee 3 \
    -m nitp_titan.train --job.config_file "$CONFIG_FILE" "$@"
