# make demo      set up, segment the bundled sample images, print where the results are
# make test      set up, run the tests that take minutes and change nothing outside this folder
# make test-all  the same, then in one go the slow tests and those on a real SLURM and in Chromium, Groovy
#                and Jython (root on Debian: installs them), then test-napari
# make test-napari  the plugin in the oldest and the newest napari (NAPARI="0.6.0 0.9.2"), each in an
#                environment of its own, with Xvfb in a window too; not where the index has no napari
# make test-gpu  the tests that need a CUDA device, better two
# make gpu-run   everything that waits for a CUDA device, in calls of at most ten minutes: repeat it
# make mutants   FILES="dinocell/evaluation/matching.py ..." [SAMPLE=50] [SEED=0]: do the tests notice
#                small faults?  A seeded sample of SAMPLE faults per file, or SAMPLE=all
# make fuzz      TARGET=image SECONDS=600: damaged files (Linux; brings atheris; see tests/fuzz)
# make check     ruff, mypy, tests
# make bench     the benchmarks of benchmarks/ (minutes; writes benchmarks/results)
# make docs      the documentation as a site in build/site; a broken link is an error
# make wheel     build the wheel and try it in a clean environment
# make clean     remove what the above made

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Functions are compiled once, not in each test process.
COMPILE = $(BIN)/dinocell demo -o $(VENV)/demo >$(VENV)/demo.log
JOBS ?= 2
# Tests on SLURM mostly wait for the cluster: beside them there is room for slow tests.
SLOW_JOBS ?= 4
NAPARI ?= 0.6.0 0.9.2
SAMPLE ?= 50
SEED ?= 0

# Tests start the program many times: Python must keep the byte code that it has compiled.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all test-napari test-gpu gpu-run mutants fuzz check check-style bench docs wheel clean

demo: $(VENV)/.base
	$(BIN)/dinocell demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations=25

test-all: test
	[ "$$(id -u)" != 0 ] || { command -v chromium && command -v jython && command -v xvfb-run; } >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium groovy jython imagej \
	  xvfb xauth qt6-qpa-plugins; } >/dev/null || true
	$(BIN)/python -m pytest -m "(slow or slurm) and not gpu and not network" \
	  -n $(SLOW_JOBS) --dist worksteal --durations=25
	$(MAKE) --no-print-directory test-napari

# Not among the other tests: a package of theirs needs a pydantic that the newest napari refuses.
test-napari: $(VENV)/.test
	PYTHON=$(BIN)/python JOBS=$(JOBS) sh tests/packaging/try_napari.sh $(NAPARI)

test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu -rs

gpu-run: $(VENV)/.test
	$(BIN)/python benchmarks/gpu_run.py

mutants: $(VENV)/.dev
	$(BIN)/python tests/mutants.py --sample $(SAMPLE) --seed $(SEED) $(FILES)

fuzz: $(VENV)/.test
	$(PIP) install -q atheris
	$(BIN)/python tests/fuzz/run.py $(TARGET) $(SECONDS)

check: check-style test

check-style: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# few_shot.py and ssl_proof/run.py train for half an hour or more, gpu_run.py waits for a GPU: by hand.
bench: $(VENV)/.test
	for script in $(filter-out benchmarks/soak_images.py benchmarks/gpu_run.py benchmarks/few_shot.py benchmarks/runtimes.py benchmarks/pictures.py benchmarks/tensorrt_engine.py,$(wildcard benchmarks/*.py)); do \
	  $(BIN)/python $$script || exit 1; done

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "the site is in build/site: $$(du -sk build/site | cut -f1) KiB"

wheel: $(VENV)/.dev
	PYTHON="$(BIN)/python" sh tests/packaging/try_wheel.sh

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: setup.py constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.test: setup.py constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e ".[test]"
	$(COMPILE)
	@touch $(VENV)/.base $@

$(VENV)/.dev: setup.py constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e ".[test,dev]"
	$(COMPILE)
	@touch $(VENV)/.base $(VENV)/.test $@

$(VENV)/.docs: setup.py constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e ".[docs]"
	@touch $(VENV)/.base $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo_out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
