PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INTO = $(if $(RESULTS),--results-dir $(RESULTS))

.DEFAULT_GOAL := help

.PHONY: help
help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto

.PHONY: reproduce-all
reproduce-all: $(VENV)/installed  ## every run, table, figure and the report; PROFILE=smoke|cpu|paper SEEDS=3 BUDGET=20m ONLY=charlm RESULTS=dir
	$(BIN)/python -m scripts.reproduce $(if $(PROFILE),--profile $(PROFILE)) $(if $(SEEDS),--seeds $(SEEDS)) \
		$(if $(BUDGET),--budget $(BUDGET)) $(if $(WORKERS),--workers $(WORKERS)) $(if $(ONLY),--only "$(ONLY)") \
		$(INTO) $(ARGS)

.PHONY: tables figures report
tables: $(VENV)/installed  ## results/tables from the records, in seconds
	$(BIN)/python -m scripts.tables $(INTO)

figures: $(VENV)/installed  ## results/figures from the records, in seconds
	$(BIN)/python -m scripts.figures $(INTO)

report: $(VENV)/installed  ## results/REPORT.md from the records, in seconds
	$(BIN)/python -m scripts.report $(INTO)

.PHONY: docs
docs: $(VENV)/installed  ## the pages of docs/ as a site in site/, by mkdocs; a broken link is an error
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[docs]'
	$(BIN)/python -m mkdocs build --strict --quiet

.PHONY: bench
bench: $(VENV)/installed  ## scans, layers, training steps, a policy beside others' here; renews tables, figures, pages
	$(BIN)/python -m scripts.bench $(INTO) $(if $(PROFILE),profile=$(PROFILE)) $(ARGS)

.PHONY: gpu
gpu: $(VENV)/installed  ## for a borrowed GPU: kernel tests, benchmark, then the most wanted runs; BUDGET=8m OUT=dir
	$(BIN)/python -m scripts.gpu $(if $(BUDGET),--budget $(BUDGET)) $(if $(OUT),--out $(OUT)) $(ARGS)

.PHONY: clean
clean:  ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
