#!/usr/bin/env bash
# Everything that needs a GPU, in one run of 9 minutes: bash benchmarks/gpu.sh [folder for the results [archive of it]]
# What matters most comes first, and each result is a line of gpu.jsonl as soon as it is there, so that a run that is cut
# short loses only the rest. `DRY=1 bash benchmarks/gpu.sh` goes through it without a GPU. Not yet run on one.
# Nothing is installed, and no network is needed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$(command -v python || command -v python3)}
out=${1:-benchmarks/results/gpu}
archive=${2:-$out.tar.gz}
dry=${DRY:+--dry-run}
mkdir -p "$out" benchmarks/results
begin=$SECONDS
status=0

# backend="xquant" is an entry point, which this stands for where the package is not installed.
site=$(mktemp -d)
trap 'rm -r "$site"' EXIT
mkdir "$site/xquant_fx-0.dist-info"
printf 'Metadata-Version: 2.1\nName: xquant-fx\nVersion: 0\n' >"$site/xquant_fx-0.dist-info/METADATA"
grep -A1 '^\[project.entry-points.torch_dynamo_backends' pyproject.toml | sed 's/project.entry-points.//; s/"//g' \
    >"$site/xquant_fx-0.dist-info/entry_points.txt"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PWD/tests:$site${PYTHONPATH:+:$PYTHONPATH}"
# A profiler that detaches is known to crash CUDA graphs after it (torch/profiler/profiler.py).
export TEARDOWN_CUPTI=0 DISABLE_CUPTI_LAZY_REINIT=1

# job NAME SECONDS COMMAND...: its output goes to NAME.txt, how it ended to gpu.jsonl, all that is there to the archive.
# Status 75: what ran broke the device for its process; another goes on behind it.
job() {
    local name=$1 until=$((SECONDS + $2)) code=75
    shift 2
    [ -z "$dry" ] || until=$((SECONDS + 600)) # of a machine without a GPU, and busy perhaps
    : >"$out/$name.txt"
    while [ "$code" -eq 75 ] && [ "$SECONDS" -lt "$until" ]; do
        code=0
        timeout -k 5 $((until - SECONDS)) "$@" >>"$out/$name.txt" 2>&1 || code=$?
        set -- "$@" --resume
    done
    cp benchmarks/results/*cuda*.json "$out"/ 2>/dev/null
    echo "{\"what\": \"job\", \"name\": \"$name\", \"status\": $code, \"ended_s\": $((SECONDS - begin))}" >>"$out/gpu.jsonl"
    [ "$code" -eq 0 ] || { status=1; echo "$name ended with $code:"; tail -5 "$out/$name.txt"; }
    tar -czf "$archive" -C "$out" .
}

# shellcheck disable=SC2086
kernels() { job "$1" "$2" "$python" benchmarks/gpu_kernels.py "${@:3}" --out "$out/gpu.jsonl" $dry; }

workers=$($python -c "import xdist" 2>/dev/null && echo "-n 12")
[ -z "$dry" ] || workers=--collect-only
# A worker has about a core.
pytest="env OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=2 $python -m pytest -m gpu -v -rf --tb=short"
pytest="$pytest --import-mode=importlib -p no:cacheprovider tests/test_gpu.py"

kernels bar 65 facts bar profile
# A wrong kernel needs no timing: the kernel of whole groups; then appends, and whether a step is one CUDA graph.
# shellcheck disable=SC2086
job tests-first 50 $pytest $workers --junitxml "$out/tests-first.xml" -k "whole and test_attention"
# shellcheck disable=SC2086
job tests-steps 75 $pytest $workers --junitxml "$out/tests-steps.xml" -k "not test_attention"
kernels compile 85 compile rows
kernels all 70 all
if [ -z "$dry" ]; then
    model="--layers 4 --kv-heads 8 --head-dim 128 --hidden 4096 --intermediate 8192 --steps 20"
    # shellcheck disable=SC2086
    job steps 75 $python benchmarks/decode.py --device cuda $model --contexts 131072 4096 --mode reduce-overhead
    job store 25 $python benchmarks/store.py --device cuda
    # Random tokens, and a model of few channels: what is timed is launches.
    job prompts 25 $python benchmarks/compiled_prompts.py examples/model --device cuda --tokens 512 --rounds 3
fi
kernels sweep 30 sweep
rest=$((begin + 540 - SECONDS))
# shellcheck disable=SC2086
job tests "$rest" $pytest $workers --junitxml "$out/tests.xml" -k "test_attention and not whole"
echo "$archive, $((SECONDS - begin)) s"
exit $status
