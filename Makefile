# Everything runs from a fresh clone with nothing but Python >= 3.11 (with venv) and make: each goal builds what it needs.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help rl learning supervised test test-slow bench throughput check venvs descriptors-env clean

# Compiling takes most of a first run; the cache outlives the checkout, and small programs are kept too.
export JAX_COMPILATION_CACHE_DIR ?= $(HOME)/.cache/omnisapiens_jax/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES ?= -1
# XLA on CPU takes its temporaries anew for every step: in huge pages, and from a heap that is kept. Linux; ignored elsewhere.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=67108864
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Whether the descriptors' environment has openSMILE.
OPENSMILE ?= yes

PY := .venv/bin/python
PYTEST := OMNISAPIENS_ORACLE_PYTHON=$(CURDIR)/.venv-oracle/bin/python $(PY) -m pytest -n 2 --dist loadfile
INSTALL := -m pip install --quiet --progress-bar off

help: ## list the goals
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

rl: .venv/.run ## warm start, on-device GRPO and report.html in runs/rl
	$(PY) -m omnisapiens_jax.main --config=configs/rl.py --workdir=runs/rl

learning: .venv/.run ## three seeds of warm start, GRPO and SFT in runs/learning, and their table in README (long)
	$(PY) benchmarks/learning.py --readme README.md

supervised: .venv/.run ## three seeds of SFT, BAM and transfer in runs/supervised, and their table in README (half an hour)
	$(PY) -m benchmarks.supervised --document README.md

test: venvs ## all tests but the slow ones
	$(PYTEST) -m "not slow"

test-slow: venvs .venv-beam/.made descriptors-env ## the slow tests: whole runs, long comparisons
	$(PYTEST) -m slow

bench: venvs ## speed and memory beside transformers on torch, as a table
	OMNISAPIENS_ORACLE_PYTHON=$(CURDIR)/.venv-oracle/bin/python $(PY) benchmarks/speed.py

throughput: .venv/.test .venv-throughput/.made ## feeding beside a torch DataLoader around transformers' processor, as a table
	$(PY) benchmarks/throughput.py

check: .venv/.test ## lint, formatting and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

venvs: .venv/.test .venv-oracle/.made ## the environments of the tests: ours, and that of the torch oracle

descriptors-env: .venv-descriptors/.made-$(OPENSMILE) ## MediaPipe and openSMILE in .venv-descriptors, for new descriptors (OPENSMILE=no leaves that out)

clean: ## remove environments, caches and build products (runs/ stays)
	rm -rf .venv .venv-oracle .venv-descriptors .venv-throughput .venv-beam .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The first interpreter that is new enough and can make environments; 3.11 leads because constraints.txt was resolved there.
FIND_PYTHON = for python in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then break; fi; python=; done; \
	if [ -z "$$python" ]; then echo "No Python >= 3.11 with the venv module found; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; fi

# Exact versions where they were resolved, ranges elsewhere.
CONSTRAINED = $$($(PY) -c 'import sys; print("--constraint=constraints.txt" if sys.version_info[:2] == (3, 11) else "")')

.venv/.made:
	@$(FIND_PYTHON); echo "Making .venv with $$($$python --version)"; $$python -m venv --clear .venv
	@touch $@

.venv/.run: .venv/.made pyproject.toml constraints.txt
	@echo "Installing omnisapiens-jax and its libraries into .venv (once; about 1.3 GB, a minute or two)"
	@$(PY) $(INSTALL) $(CONSTRAINED) --editable '.[atlas]'
	@touch $@

.venv/.test: .venv/.run
	@echo "Installing the test and lint tools into .venv"
	@$(PY) $(INSTALL) $(CONSTRAINED) --editable '.[atlas,test,dev,tfds,judge]'
	@touch $@

# Apache Beam asks for older libraries than the rest is tested with.
.venv-beam/.made: pyproject.toml
	@$(FIND_PYTHON); echo "Making .venv-beam: omnisapiens-jax with Apache Beam (once; about 1.5 GB, a minute or two)"; $$python -m venv --clear .venv-beam
	@.venv-beam/bin/python $(INSTALL) --editable '.[beam]'
	@touch $@

.venv-oracle/.made: tests/oracle-requirements.txt
	@$(FIND_PYTHON); echo "Making .venv-oracle: transformers on torch, for the comparisons (once; 1 GB or more)"; $$python -m venv --clear .venv-oracle
	@.venv-oracle/bin/python $(INSTALL) --requirement tests/oracle-requirements.txt
	@touch $@

# MediaPipe's last release with models inside has wheels for no later Python than 3.12.
DESCRIPTORS := omnisapiens_jax/processing/descriptors

.venv-descriptors/.made-$(OPENSMILE): $(DESCRIPTORS)/requirements.txt $(DESCRIPTORS)/requirements-opensmile.txt
	@for python in $(PYTHON) python3.11 python3.12 python3; do \
		if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1; then break; fi; python=; done; \
		if [ -z "$$python" ]; then echo "MediaPipe 0.10.21 needs Python 3.11 or 3.12; name one: make descriptors-env PYTHON=/path/to/python3.11" >&2; exit 1; fi; \
		echo "Making .venv-descriptors (once; about 0.8 GB, a minute)"; $$python -m venv --clear .venv-descriptors
	@.venv-descriptors/bin/python $(INSTALL) --no-deps --requirement $(DESCRIPTORS)/requirements.txt
	@if [ "$(OPENSMILE)" = yes ]; then \
		sed -n '/^#/s/^# //p' $(DESCRIPTORS)/requirements-opensmile.txt; \
		.venv-descriptors/bin/python $(INSTALL) --no-deps --requirement $(DESCRIPTORS)/requirements-opensmile.txt; fi
	@touch $@

.venv-throughput/.made: benchmarks/throughput-requirements.txt tests/oracle-requirements.txt
	@$(FIND_PYTHON); echo "Making .venv-throughput: transformers with torchvision and PyAV (once; 1 GB or more)"; $$python -m venv --clear .venv-throughput
	@.venv-throughput/bin/python $(INSTALL) --requirement benchmarks/throughput-requirements.txt
	@touch $@
