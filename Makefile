# make run    the whole pipeline on the sample, from nothing but Python 3.11 or newer, git and make
# make test   the tests; make soak, make lint, make clean, make sample, make help

PYTHON ?= $(shell command -v python3.11 || command -v python3 || command -v python)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# DVC runs `python` from PATH: it must find the environment's.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Nothing here reports to anybody.
export DO_NOT_TRACK := 1
export MLFLOW_DISABLE_TELEMETRY := true
export DVC_NO_ANALYTICS := 1

.DEFAULT_GOAL := help
.PHONY: help run test soak lint clean sample environment

help:  ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Another interpreter: make run PYTHON=/path/to/python3.11"

environment: $(STAMP)  ## .venv with the pinned requirements

# The stamp is newer than what it was made from, so that a second call installs nothing. The package is installed
# in place and without its dependencies, for the command `earthprior`; torch brought setuptools, so that nothing is
# downloaded to build it. Sources of packages (a mirror, a folder of wheels) are pip's own configuration.
$(STAMP): requirements.txt constraints.txt pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, found: '$(PYTHON)'. Name it: make run PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/pip || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	@touch $@

# Chips that are there are never touched: other ones than data.dvc says are the user's, and `dvc repro` versions them.
# The sample's remote is asked only where no other one is set.
# A pull that fails or is interrupted leaves no half of the chips, which `dvc repro` would take for a new version.
data: | $(STAMP)
	@trap 'rm -rf data; exit 1' INT TERM; \
	if $(BIN)/dvc remote default >/dev/null 2>&1; then $(BIN)/dvc pull data; \
	  else $(BIN)/dvc pull -r sample data; fi || { rm -rf data; exit 1; }

run: $(STAMP) | data  ## stats, pretrain and evaluate; what is up to date is not run again
	$(BIN)/dvc repro
	@echo
	@echo "Report: results/evaluate/report.html (open it in a browser)"
	@echo "Runs:   $(BIN)/mlflow ui, then http://127.0.0.1:5000"
	@echo "Next:   . $(BIN)/activate && dvc exp run -S lr=3e-4 && dvc exp show"

# Files in their order: by number of tests, the few that last minutes would come last, on one core.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses=8 --dist loadfile --no-loadscope-reorder

test: $(STAMP)  ## the tests, on all cores
	$(PYTEST)

soak: $(STAMP)  ## what takes too long for the tests: all of them, a hundred kills, ten thousand malformed inputs
	$(PYTEST) -m "soak or not soak"
	env PYTHONPATH=src OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak_kills.py
	env PYTHONPATH=src OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak_inputs.py

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# 64 train and 16 validate chips. The remote ignores itself in git, so that later pushes to it never get there by
# accident; the sample's objects are added by force, once.
sample: $(STAMP)  ## make the embedded sample again (replaces data/ and sample_remote/)
	rm -rf data sample_remote
	env PYTHONPATH=src $(BIN)/python -m earthprior synth data --n 80 --seed 0 --validate-fraction 0.2
	$(BIN)/dvc add data
	$(BIN)/dvc push -r sample data
	echo '*' > sample_remote/.gitignore
	@du -sh sample_remote
	@echo "Commit it: git add -f sample_remote && git add data.dvc && git commit"

clean:  ## caches and the environment; never chips, results or runs
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis dvc_plots
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
