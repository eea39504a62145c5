#!/usr/bin/env bash
# Everything that needs a GPU, in one run of 9 minutes: bash benchmarks/gpu.sh [folder for the results]
# What matters most comes first, and each result is a line of gpu.jsonl as soon as it is there, so that a run that is cut
# short loses only the rest. `DRY=1 bash benchmarks/gpu.sh` goes through it without a GPU. Not yet run on one.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python}
out=${1:-benchmarks/results/gpu}
dry=${DRY:+--dry-run}
mkdir -p "$out" benchmarks/results
begin=$SECONDS
status=0

# job NAME SECONDS COMMAND...: its output goes to NAME.txt, how it ended to gpu.jsonl.
job() {
    local name=$1 limit=$2 code=0
    shift 2
    timeout "$limit" "$@" >"$out/$name.txt" 2>&1 || code=$?
    echo "{\"what\": \"job\", \"name\": \"$name\", \"status\": $code, \"ended_s\": $((SECONDS - begin))}" >>"$out/gpu.jsonl"
    [ "$code" -eq 0 ] || { status=1; echo "$name ended with $code:"; tail -5 "$out/$name.txt"; }
}

# shellcheck disable=SC2086
kernels() { job "$1" "$2" "$python" benchmarks/gpu_kernels.py "${@:3}" --out "$out/gpu.jsonl" $dry; }

# backend="xquant" is an entry point: it needs an installed package. Needs no network.
$python -c "import importlib.metadata as m; m.version('xquant-fx')" 2>/dev/null ||
    $python -m pip install --quiet --no-deps --no-build-isolation -e . || exit 1
workers=$($python -c "import xdist" 2>/dev/null && echo "-n 8")
[ -z "$dry" ] || workers=--collect-only
pytest="$python -m pytest -m gpu -v -rf --tb=short --import-mode=importlib tests/test_gpu.py"

kernels bar 70 facts bar
# A wrong kernel needs no timing: the kernel of whole groups, and whether a step is one CUDA graph.
# shellcheck disable=SC2086
job tests-first 60 $pytest $workers --junitxml "$out/tests-first.xml" -k "whole or default"
kernels compile 90 compile rows
kernels all 120 all
# shellcheck disable=SC2086
job tests 90 $pytest $workers --junitxml "$out/tests.xml" -k "not whole and not default"
kernels sweep 40 sweep
if [ -z "$dry" ]; then
    model="--layers 4 --kv-heads 8 --head-dim 128 --hidden 4096 --intermediate 8192 --steps 20"
    # shellcheck disable=SC2086
    job steps 50 $python benchmarks/decode.py --device cuda $model --contexts 131072 4096 --mode reduce-overhead
    job store 20 $python benchmarks/store.py --device cuda
    cp benchmarks/results/*cuda*.json "$out"/ 2>/dev/null
fi
tar -czf "$out.tar.gz" -C "$out" . && echo "$out.tar.gz, $((SECONDS - begin)) s"
exit $status
