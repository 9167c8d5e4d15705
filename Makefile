PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help

.PHONY: help
help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

.PHONY: install
install: $(VENV)/installed  ## make .venv with the locked dependencies (done by every command that needs it)

.PHONY: test
test: $(VENV)/installed  ## run the tests, on the GPU too where there is one
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n auto

.PHONY: bench
bench: $(VENV)/installed  ## kernels and layers against peers on this machine; renews results/tables and README
	$(BIN)/python -m benchmarks.run

.PHONY: clean
clean:  ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
