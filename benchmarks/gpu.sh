#!/usr/bin/env bash
# Every open check that needs a GPU, in under 9 minutes; JSON and PNG go to benchmarks/results/ (and to $1).
# Not yet run on a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p benchmarks/results
# backend="xquant" is an entry point: it needs an installed package. Needs no network.
python -c "import importlib.metadata as m; m.version('xquant-fx')" 2>/dev/null ||
    python -m pip install --quiet --no-deps --no-build-isolation -e . || exit 1
status=0
# Numbers first: a wrong kernel needs no timing. Most of the time goes into compiling kernels, so in parallel.
parallel=$(python -c "import xdist" 2>/dev/null && echo "-n 8")
# shellcheck disable=SC2086
timeout 140 python -m pytest -q -m gpu $parallel --import-mode=importlib tests/test_gpu.py 2>&1 |
    tee benchmarks/results/gpu-tests.txt || status=1
timeout 50 python benchmarks/attention.py --device cuda --batch 8 --gqa 4 --contexts 4096 131072 \
    --name attention-cuda-bar || status=1
# Every row is written as soon as it is measured, so that a time-out costs only the rest.
timeout 140 python benchmarks/attention.py --device cuda --batch 1 8 --gqa 1 4 8 --contexts 512 8192 131072 \
    --only "xquant-2.2" "xquant-1.7" "xquant 2 bits" || status=1
model="--layers 4 --kv-heads 8 --head-dim 128 --hidden 4096 --intermediate 8192 --steps 20"
# shellcheck disable=SC2086
timeout 60 python benchmarks/decode.py --device cuda $model --contexts 4096 131072 || status=1
# shellcheck disable=SC2086
timeout 40 python benchmarks/decode.py --device cuda $model --batch 8 --contexts 32768 --name decode-cuda-batch-8 || status=1
# shellcheck disable=SC2086
timeout 50 python benchmarks/decode.py --device cuda $model --contexts 4096 --mode reduce-overhead \
    --name decode-cuda-reduce-overhead || status=1
timeout 40 python benchmarks/store.py --device cuda || status=1
[ $# -eq 0 ] || cp benchmarks/results/*cuda* benchmarks/results/gpu-tests.txt "$1"/
exit $status
