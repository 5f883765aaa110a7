# make repro: from data to a table of claims.   make test: lint, types, tests.   make test-clusters: those of clusters, groups
# of processes and servers, which take minutes of starting and killing.   Each makes .venv first.
PYTHON ?= python3.11
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1

# The scripts of an environment, and its link to this code, hold the path it was made for: moved or copied, it is made anew.
ifneq ($(shell cat .venv/installed 2>/dev/null),$(CURDIR))
.PHONY: .venv/installed
FROM_SCRATCH := --clear
endif

.PHONY: repro test test-clusters clean

repro: .venv/installed
	@test -e .git || dvc config --local core.no_scm true
	dvc repro
	@echo "The report: open reports/index.html; for a terminal reports/claims.md, tables.md and results.md"

test: .venv/installed
	ruff check .
	ruff format --check .
	mypy
	pytest

test-clusters: .venv/installed
	pytest -m clusters

clean:
	rm -rf .venv artifacts data mlruns mlruns.db

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(FROM_SCRATCH) .venv
	pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@pwd -P > $@
