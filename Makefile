# Gristmill on Debian or Ubuntu: `make run` sets up and materializes the whole graph on the embedded sample; `make help` lists the rest.
#
#   make run RECIPE=tiny              another recipe of recipes/
#   make setup PYTHON=python3.12      another interpreter, 3.11 to 3.13 (after `make clean`)
#   make setup EXTRAS=test,ray        more extras of pyproject.toml
#   make setup TORCH_INDEX=URL        a package index that holds the torch build wanted, CPU or CUDA; without it pip takes its default

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.SILENT:
.DEFAULT_GOAL := help
.PHONY: help setup run test lint ui clean

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?=
RECIPE ?= code-critical
EXTRAS ?= test,bench,postgres,s3
TORCH_INDEX ?=
comma := ,
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
LOG := $(VENV)/install.log

help:
	echo "make run     set up, materialize the whole graph for one recipe (RECIPE=$(RECIPE)) and print the results"
	echo "make test    set up and run the tests"
	echo "make ui      set up and start Dagster and MLflow on 127.0.0.1"
	echo "make setup   set up only: the versions of constraints.txt in $(VENV)"
	echo "make lint    set up and check the style"
	echo "make clean   remove $(VENV) and caches; results (.gristmill, .dagster) stay"

setup: $(STAMP)

run: $(STAMP)
	$(BIN)/gristmill run --recipe $(RECIPE)

test: $(STAMP)
	$(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .

ui: $(STAMP)
	$(BIN)/gristmill ui

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find pipelines assets_defs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The first interpreter of the list that is in range; python3.12 and python3.11 first, since submodlib has no wheel for 3.13.
# Debian and Ubuntu split venv's ensurepip off into a package of its own.
$(BIN)/pip:
	fail() { echo "make: $$*" >&2; exit 1; }
	probe() { "$$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1; }
	python=
	for candidate in $(or $(PYTHON),python3.12 python3.11 python3 python3.13); do
		if probe "$$candidate"; then python=$$candidate; break; fi
	done
	if [ -z "$$python" ] && [ -n "$(PYTHON)" ]; then
		fail "$(PYTHON) is not Python 3.11, 3.12 or 3.13"
	elif [ -z "$$python" ] && ! command -v python3 >/dev/null; then
		fail "python3 is missing: apt-get install python3 python3-venv"
	elif [ -z "$$python" ]; then
		fail "$$(python3 --version) is here and 3.11, 3.12 or 3.13 is needed: apt-get install python3.12 python3.12-venv, or another of them that the release has"
	fi
	"$$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || fail "$$python has no venv: apt-get install $${python##*/}-venv"
	rm -rf $(VENV)
	"$$python" -m venv $(VENV)

# pip's own words go to the log; a line for each twentieth package and each large download goes to the terminal.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/pip
	started=$$SECONDS
	ls $(VENV)/.installed-* >/dev/null 2>&1 || echo "Setting up $(VENV) with $$($(BIN)/python --version): 2 to 5 minutes the first time, seconds from then on."
	large='Downloading ([^ ]+) \(([0-9]{2,}(\.[0-9]+)? MB|[0-9.]+ GB)\)'
	progress() {
		local line count=0
		while IFS= read -r line; do
			if [[ $$line == "Collecting "* ]]; then count=$$((count + 1)); [ $$((count % 20)) -ne 0 ] || echo "  $$count packages resolved"; fi
			if [[ $$line =~ $$large ]]; then echo "  $${BASH_REMATCH[1]}, $${BASH_REMATCH[2]}"; fi
			if [[ $$line == "Installing collected packages:"* && $$count -gt 0 ]]; then echo "  installing $$count packages; about a minute"; fi
		done
	}
	$(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar off $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		--constraint constraints.txt --editable '.[$(EXTRAS)]' 2>&1 | tee $(LOG) | progress || {
		tail -n 15 $(LOG) >&2; echo "make: set-up failed; all that pip said is in $(LOG)" >&2; exit 1; }
	touch $@
	echo "Set up in $$((SECONDS - started)) s."
