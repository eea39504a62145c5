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
# Numbers first: a wrong kernel needs no timing.
timeout 200 python -m pytest -q -m gpu --import-mode=importlib tests/test_gpu.py 2>&1 | tee benchmarks/results/gpu-tests.txt || status=1
timeout 60 python benchmarks/attention.py --device cuda --batch 8 --gqa 4 --contexts 4096 131072 \
    --name attention-cuda-bar || status=1
timeout 90 python benchmarks/attention.py --device cuda --batch 1 8 --gqa 1 4 8 --contexts 512 8192 32768 131072 || status=1
timeout 100 python benchmarks/decode.py --device cuda --layers 4 --kv-heads 8 --head-dim 128 --hidden 4096 \
    --intermediate 8192 --contexts 512 4096 32768 131072 --steps 20 || status=1
timeout 60 python benchmarks/decode.py --device cuda --layers 4 --kv-heads 8 --head-dim 128 --hidden 4096 \
    --intermediate 8192 --contexts 4096 --steps 20 --mode reduce-overhead --name decode-cuda-reduce-overhead || status=1
[ $# -eq 0 ] || cp benchmarks/results/*cuda* benchmarks/results/gpu-tests.txt "$1"/
exit $status
