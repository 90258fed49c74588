# make demo    set up, segment the bundled sample images, print where the results are
# make test    set up, run the tests
# make test-slurm  the longer tests on a real SLURM (minutes)
# make test-gpu  the tests that need a CUDA device, better two
# make check   ruff, mypy, tests
# make bench   the benchmarks of benchmarks/ (minutes; writes benchmarks/results)
# make wheel   build the wheel and try it in a clean environment
# make clean   remove what the above made

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One more than two cores: the tests on SLURM mostly wait.
JOBS ?= 3

.PHONY: demo test test-slurm test-gpu check check-style bench wheel clean

demo: $(VENV)/.base
	$(BIN)/dinocell demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-slurm: $(VENV)/.test
	$(BIN)/python -m pytest -m "slurm and slow" -n $(JOBS) --dist worksteal

test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu -rs

check: check-style test

check-style: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# ssl_small_run.py trains for half an hour and is run by hand.
bench: $(VENV)/.test
	for script in $(filter-out benchmarks/ssl_small_run.py,$(wildcard benchmarks/*.py)); do \
	  $(BIN)/python $$script || exit 1; done

wheel: $(VENV)/.dev
	PYTHON="$(BIN)/python" sh tests/packaging/try_wheel.sh

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: setup.py constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.test: setup.py constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e ".[test]"
	@touch $(VENV)/.base $@

$(VENV)/.dev: setup.py constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e ".[test,dev]"
	@touch $(VENV)/.base $(VENV)/.test $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo_out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
