#!/usr/bin/env bash
# What is worth knowing on one GPU, most important first, as much of it as fits into nine minutes:
#   PYTHON=python3 PYTHONPATH=/path/to/wheels benchmarks/gpu_suite.sh [FOLDER]
# Each step writes its JSON to FOLDER (benchmarks/results/gpu) as it goes and has a time limit of its own; one that fails
# does not stop the others. FOLDER/suite.jsonl says how each ended, with the end of a failed one's log; FOLDER/STEP.log is
# all that it said.
#   PYTHON         the interpreter              COMMIT   the commit, where there is no git
#   SECONDS_LEFT   the limit of all together    DRY_RUN  if set, the commands are printed and not run
#   ONLY           a pattern (bash's =~) of the steps to run
# Steps named second-*, third-* and more-* are for further calls: ONLY=second SECONDS_LEFT=270. On one H200 machine, with
# nothing compiled before, the first call took 520 s; a cache that is kept (TORCHINDUCTOR_CACHE_DIR) saves a third.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:-benchmarks/results/gpu}
if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# What one step compiles, the next finds.
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/nitp_titan-inductor-$UID}
limit=${SECONDS_LEFT:-530}
failed=0
SECONDS=0 # bash counts on from here
if [ -z "${DRY_RUN:-}" ]; then
    mkdir -p "$out" && out=$(cd "$out" && pwd) || exit
    [ -n "${ONLY:-}" ] || : > "$out/suite.jsonl"
fi

# note NAME EXIT SECONDS: a line of suite.jsonl; of a failure with the end of its log, in JSON's escapes.
note() {
    local end=""
    if [ "$2" != 0 ] && [ "$2" != null ]; then
        end=$(tail -n 30 "$out/$1.log" | tr -d '\000-\010\013-\037' | sed 's/\\/\\\\/g; s/"/\\"/g; s/\t/ /g' |
            awk '{printf "%s\\n", $0}')
    fi
    echo "{\"step\": \"$1\", \"exit\": $2, \"seconds\": $3${end:+, \"log_end\": \"$end\"}}" >> "$out/suite.jsonl"
}

# step NAME LIMIT MODULE ARGUMENT...: run it, keep its log, note how it ended.
step() {
    local name=$1 own=$2 left=$((limit - SECONDS)) begin=$SECONDS code=0
    if [ -n "${ONLY:-}" ]; then
        [[ $name =~ $ONLY ]] || return
    elif [[ $name =~ ^(second|third|more)- ]] && [ -z "${DRY_RUN:-}" ]; then
        return
    fi
    shift 2
    if [ -n "${DRY_RUN:-}" ]; then
        echo "$name: $own: -m $*"
        return
    fi
    if [ "$left" -lt 15 ]; then
        echo "== $name: skipped, $left s are left"
        note "$name" null 0
        failed=1
        return
    fi
    [ "$own" -lt "$left" ] || own=$left
    echo "== $name (at most $own s of $left)"
    timeout --kill-after=5 "$own" "$PYTHON" -m "$@" > "$out/$name.log" 2>&1 || code=$?
    [ "$code" = 0 ] || failed=1
    tail -n 40 "$out/$name.log"
    echo "== $name: exit $code after $((SECONDS - begin)) s"
    note "$name" "$code" $((SECONDS - begin))
}

if [ -z "${DRY_RUN:-}" ] && ! "$PYTHON" -m benchmarks.needs; then
    echo "Nothing was run: $PYTHON lacks the above"
    exit 1
fi

small=train_configs/nitp_0.5b.toml
sparse=train_configs/nitp_1.9b-a0.3b.toml
large=train_configs/nitp_9b-a1b.toml
four="--training.local_batch_size=4" # sequences: with whole logits, as plain cross-entropy has them, more do not fit
selective="--activation_checkpoint.mode=selective"
none="--activation_checkpoint.mode=none"
gpu_tests=(-q -m gpu -p no:cacheprovider --tb=short)
steps() { echo --steps 5 --warmup 3 --repeats "$1"; }

# as_measured FLAVOR: the option of benchmarks.throughput that adds NITP with the fastest tiles of flex attention.
as_measured() {
    local overrides
    [ -f "$out/attention.json" ] || return 0
    overrides=$("$PYTHON" -m benchmarks.attention --fastest "$out/attention.json" --flavors "$1" 2> /dev/null) || return 0
    [ -z "$overrides" ] || echo "--variant=nitp_tiles:$overrides"
}

# 1. The tiles of flex attention, whose backward pass is the largest kernel of a step.
step attention 90 benchmarks.attention --flavors 0.5B,9B-A1B --out "$out/attention.json"

# 2. The 0.5B model, without recomputation and with it: next-token prediction, NITP, MTP-1, stock TorchTitan, NITP with
# those tiles and with weights that stay gathered; and where a step's time goes.
# shellcheck disable=SC2046
step throughput-0.5b-none 175 benchmarks.throughput --config $small --variants ntp_joint,nitp,mtp $(steps 3) \
    --variant nitp_kept:parallelism.fsdp_reshard_after_forward=never $(as_measured 0.5B) \
    --profile nitp,ntp_joint --out "$out/throughput-0.5b-none.json" $four $none
# shellcheck disable=SC2046
step throughput-0.5b 105 benchmarks.throughput --config $small --variants ntp,nitp,stock $(steps 3) \
    --profile stock --out "$out/throughput-0.5b.json" $four $selective

# 3. The loss alone, its implementations side by side.
step loss 60 benchmarks.loss --tokens 8192 --width 896 --repeats 3 --out "$out/loss.json" \
    --implementations ours,ours+nitp,torchtitan_plain,torchtitan_chunked,torch_chunked,liger

# 4. A mixture of experts, whole.
# shellcheck disable=SC2046
step throughput-1.9b-a0.3b 90 benchmarks.throughput --config $sparse --variants ntp_joint,nitp $(steps 3) \
    --profile nitp --out "$out/throughput-1.9b-a0.3b.json" $four

# A second call: 9B-A1B from slices, routed experts alone, and whether a GPU computes what a CPU does: products added in
# fp32, a compiled step of each debug model.
# shellcheck disable=SC2046
step second-throughput-9b-a1b 130 benchmarks.throughput --config $large --variants ntp,nitp --depths 4,2 $(steps 3) \
    $(as_measured 9B-A1B) --profile nitp --out "$out/throughput-9b-a1b.json" --training.local_batch_size=2
step second-experts 40 benchmarks.experts --repeats 3 --out "$out/experts.json"
step second-first 100 pytest "${gpu_tests[@]}" -n 6 -k "in_fp32 or compiled_in_float32" \
    tests/nitp/test_weight_gradient.py tests/titan/test_loss_head.py tests/titan/test_devices.py

# A third: float8, documents that are whole sequences (attention at its most), and what else only a GPU can test.
# shellcheck disable=SC2046
step third-throughput-0.5b-float8 100 benchmarks.throughput --config $small --variants nitp $(steps 3) \
    --variant nitp_float8:float8.recipe=tensorwise --variant nitp_float8_rowwise:float8.recipe=rowwise \
    --out "$out/throughput-0.5b-float8.json" $four $none
# shellcheck disable=SC2046
step third-throughput-0.5b-whole 40 benchmarks.throughput --config $small --variants ntp_joint,nitp $(steps 2) \
    --mean-document 0 --out "$out/throughput-0.5b-whole.json" $four $none
step third-gpu-tests 100 pytest "${gpu_tests[@]}" -n 4 tests/titan/test_devices.py tests/nitp/test_weight_gradient.py \
    tests/titan/test_loss_head.py tests/float8/test_float8_experts.py tests/benchmarks/test_bench_kernels.py

# With time to spare: the other switches, the smoke job. CUDA graphs: torch >= 2.13; a graph keeps its memory to itself:
# with fewer sequences all variants fit.
# shellcheck disable=SC2046
step more-throughput-0.5b-switches 90 benchmarks.throughput --config $small --variants nitp $(steps 3) \
    --variant nitp_foreach:optimizer.implementation=foreach \
    --out "$out/throughput-0.5b-switches.json" $four $none
# shellcheck disable=SC2046
step more-throughput-0.5b-graphs 110 benchmarks.throughput --config $small --variants ntp,nitp $(steps 3) \
    --variant ntp_graphs:like=ntp,training.disable_cuda_graphs=false \
    --variant nitp_graphs:training.disable_cuda_graphs=false \
    --out "$out/throughput-0.5b-graphs.json" --training.local_batch_size=2
step more-smoke 150 tests.smoke --steps 20 --at-once 4 --out "$out/runs/smoke"

[ -n "${DRY_RUN:-}" ] || echo "Results in $out after $SECONDS s; python -m benchmarks.page puts them on a page"
exit $failed
