# make demo   build the data, train, evaluate, write the report
# make test   run every test
# make format bring the code into its form
# All of them make .venv first where it is missing or older than pyproject.toml and constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test format
.DEFAULT_GOAL := test

demo: $(READY)
	@$(BIN)/mmpt demo

# Ranks wait for one another: waiting threads that spin would take the cores from those that compute.
test: $(READY)
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest

format: $(READY)
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed, '$(PYTHON)' is not: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "installing mmpt and what it needs into .venv: about a minute and a half, more on a slow network"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[emoji,s3,dev]'
	@touch $@
