#!/usr/bin/env bash
# What is worth knowing on one GPU, most important first, as much of it as fits into nine minutes:
#   PYTHON=python3 PYTHONPATH=/path/to/wheels benchmarks/gpu_suite.sh [FOLDER]
# Each step writes its JSON to FOLDER (benchmarks/results/gpu) as it goes and has a time limit of its own; one that fails
# does not stop the others. FOLDER/suite.jsonl says how each ended, FOLDER/STEP.log what it said,
# FOLDER/runs has the training runs.
#   PYTHON         the interpreter              COMMIT   the commit, where there is no git
#   SECONDS_LEFT   the limit of all together    DRY_RUN  if set, the commands are printed and not run
#   ONLY           a pattern (bash's =~) of the steps to run, to go on where another call had no time left
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:-benchmarks/results/gpu}
if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
limit=${SECONDS_LEFT:-530}
failed=0
SECONDS=0 # bash counts on from here
if [ -z "${DRY_RUN:-}" ]; then
    mkdir -p "$out" && out=$(cd "$out" && pwd) || exit
    [ -n "${ONLY:-}" ] || : > "$out/suite.jsonl"
fi

# step NAME LIMIT MODULE ARGUMENT...: run it, keep its log, note how it ended.
step() {
    local name=$1 own=$2 left=$((limit - SECONDS)) begin=$SECONDS code=0
    [[ $name =~ ${ONLY:-} ]] || return
    shift 2
    if [ -n "${DRY_RUN:-}" ]; then
        echo "$name: -m $*"
        return
    fi
    if [ "$left" -lt 20 ]; then
        echo "== $name: skipped, $left s are left"
        echo "{\"step\": \"$name\", \"exit\": null, \"seconds\": 0}" >> "$out/suite.jsonl"
        failed=1
        return
    fi
    [ "$own" -lt "$left" ] || own=$left
    echo "== $name (at most $own s of $left)"
    timeout --kill-after=5 "$own" "$PYTHON" -m "$@" > "$out/$name.log" 2>&1 || code=$?
    [ "$code" = 0 ] || failed=1
    tail -n 40 "$out/$name.log"
    echo "== $name: exit $code after $((SECONDS - begin)) s"
    echo "{\"step\": \"$name\", \"exit\": $code, \"seconds\": $((SECONDS - begin))}" >> "$out/suite.jsonl"
}

if [ -z "${DRY_RUN:-}" ] && ! "$PYTHON" -m benchmarks.needs; then
    echo "Nothing was run: $PYTHON lacks the above"
    exit 1
fi

small=train_configs/nitp_0.5b.toml
large=train_configs/nitp_9b-a1b.toml
four="--training.local_batch_size=4" # sequences: with whole logits, as plain cross-entropy has them, more do not fit

# 1. Does it train at all: both debug jobs, eager and compiled.
step smoke 120 tests.smoke --steps 20 --at-once 4 --out "$out/runs/smoke"
[ ! -e "$out/runs/smoke/smoke.json" ] || cp "$out/runs/smoke/smoke.json" "$out/smoke.json"

# 2. The bars of the 0.5B model: NITP, NTP, stock TorchTitan, MTP-1.
step throughput-0.5b 200 benchmarks.throughput --config $small --variants ntp,nitp,stock,mtp,ntp_joint \
    --steps 4 --repeats 5 --out "$out/throughput-0.5b.json" $four

# 3. The loss alone.
step loss 120 benchmarks.loss --tokens 8192 --out "$out/loss.json"

# 4. 9B-A1B from slices.
step throughput-9b-a1b 150 benchmarks.throughput --config $large --variants ntp,nitp --depths 4,2 \
    --steps 4 --repeats 4 --out "$out/throughput-9b-a1b.json" --training.local_batch_size=2

# 5. float8.
step throughput-0.5b-float8 150 benchmarks.throughput --config $small --variants nitp \
    --variant nitp_float8:float8.recipe=tensorwise --variant nitp_float8_rowwise:float8.recipe=rowwise \
    --steps 4 --repeats 4 --out "$out/throughput-0.5b-float8.json" $four

# 6. What is on or off by measurement: the fused optimizer, recomputation, CUDA graphs (torch >= 2.13; a graph keeps its
# memory to itself: with fewer sequences all variants fit).
step throughput-0.5b-foreach 90 benchmarks.throughput --config $small --variants ntp,nitp \
    --variant nitp_foreach:optimizer.implementation=foreach \
    --steps 4 --repeats 3 --out "$out/throughput-0.5b-foreach.json" $four
step throughput-0.5b-no-recomputation 70 benchmarks.throughput --config $small --variants ntp,nitp \
    --steps 4 --repeats 3 --out "$out/throughput-0.5b-no-recomputation.json" $four --activation_checkpoint.mode=none

step throughput-0.5b-graphs 110 benchmarks.throughput --config $small --variants ntp,nitp \
    --variant ntp_graphs:like=ntp,training.disable_cuda_graphs=false \
    --variant nitp_graphs:training.disable_cuda_graphs=false \
    --steps 4 --repeats 3 --out "$out/throughput-0.5b-graphs.json" --training.local_batch_size=2
step loss-32k 90 benchmarks.loss --tokens 32768 --width 896 --out "$out/loss-32k.json"

# 7. What only a GPU can test: attention, experts and losses against a CPU's.
step gpu-tests 150 pytest -q -m gpu -p no:cacheprovider tests/test_devices.py tests/test_weight_gradient.py \
    tests/test_linear_cross_entropy.py tests/float8/test_float8_experts.py

# 8. With what time is left: does NITP do what it says, on a small model.
evidence=(--job.config_file train_configs/debug.toml --training.steps=300 --checkpoint.no-enable --nitp.geometry_freq=20
    --model.shape.dim=512 --model.shape.n_layers=8 --model.shape.n_heads=8 --model.shape.head_dim=64
    --model.shape.hidden_dim=1536)
step evidence-nitp 90 nitp_titan.train "${evidence[@]}" "--job.dump_folder=$out/runs/nitp"
step evidence-ntp 90 nitp_titan.train "${evidence[@]}" --nitp.no-enable "--job.dump_folder=$out/runs/ntp"
step evidence-curves 20 nitp_titan.cli plot "$out/runs/nitp" "$out/runs/ntp" --out "$out/runs/curves.png"

[ -n "${DRY_RUN:-}" ] || echo "Results in $out after $SECONDS s; python -m benchmarks.page puts them on a page"
exit $failed
