# Everything runs in .venv, which the first target to need it sets up.
# `make compat` uses .venv-compat; COMPAT_PYTHON=python3.10 tries the oldest Python, too.

PYTHON ?= python3
COMPAT_PYTHON ?= $(PYTHON)
WORKERS ?= 2

READY := .venv/.ready
COMPAT_READY := .venv-compat/.ready
# The models of the demo and the tests are too small for more than one thread.
ONE_THREAD := OMP_NUM_THREADS=1
PYTEST_FLAGS := -n $(WORKERS) --dist worksteal --durations=15
FAST := -m "not slow and not gpu"
# A compiler that is killed leaves half a library in Inductor's cache, and every later process crashes on it. So the
# tests have a cache of their own, which a clean checkout starts without.
TESTS := $(ONE_THREAD) TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/.inductor

CPP := $(wildcard kernels/*/*.h kernels/*/*.cpp tests/*.h)

.PHONY: demo test test-all lint bench compat clean

demo: $(READY)
	$(ONE_THREAD) .venv/bin/python examples/generate.py

test: $(READY)
	$(TESTS) .venv/bin/pytest $(PYTEST_FLAGS) $(FAST)

test-all: $(READY)
	$(TESTS) .venv/bin/pytest $(PYTEST_FLAGS)

lint: $(READY)
	.venv/bin/ruff check .
	.venv/bin/clang-format --dry-run -Werror $(CPP)

bench: $(READY)
	.venv/bin/pip install --quiet -c requirements.txt -e '.[dev,bench]'
	.venv/bin/python benchmarks/attention.py
	.venv/bin/python benchmarks/attention.py --batch 8 --gqa 4 --contexts 512 2048 8192 32768 --name attention-cpu-batch-8
	.venv/bin/python benchmarks/decode.py --quanto
	.venv/bin/python benchmarks/decode.py --layers 2 --kv-heads 8 --head-dim 128 --hidden 256 --intermediate 512 \
		--contexts 32768 --steps 15 --name decode-cpu-2-layers-32k
	.venv/bin/python benchmarks/store.py

compat: $(COMPAT_READY)
	$(TESTS) .venv-compat/bin/pytest $(PYTEST_FLAGS) $(FAST)

$(READY): pyproject.toml requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	.venv/bin/pip install --quiet -c requirements.txt -e '.[dev]'
	touch $@

$(COMPAT_READY): pyproject.toml requirements-compat.txt
	$(COMPAT_PYTHON) -m venv .venv-compat
	.venv-compat/bin/pip install --quiet -r requirements-compat.txt
	.venv-compat/bin/pip install --quiet -c requirements-compat.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-compat build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .mypy_cache .inductor
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
