# Everything sets itself up: the first target that needs it makes .venv from the hashed pins.
# PYTHON may name another interpreter; it has to be 3.11 or later.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.stamp

.DEFAULT_GOAL := help
.PHONY: help setup run test test-first test-second fuzz conformance bench lint format pins clean

help:
	@echo "make run     run examples/quickstart.toml: a table, a figure, and runs/<name>/"
	@echo "make test    lint, types, tests"
	@echo "make fuzz    10,000 random programs of the engine against its reference (FUZZ=n for another number)"
	@echo "make conformance  every policy alone in a 16 GiB guest, and with every workload (half an hour on 2 cores)"
	@echo "make bench   engine speed, start-up time and memory per guest"
	@echo "make pins    resolve requirements.txt again (needs pip-tools)"
	@echo "make clean   remove .venv and caches; runs/ stays"

setup: $(STAMP)

$(STAMP): requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "no python3.11 or python3 on PATH; name one: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than 3.11; name another: make PYTHON=/path/to/python3" >&2; exit 2; }
	@echo "setting up .venv (first time only)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

run: $(STAMP)
	@$(BIN)/fleet run examples/quickstart.toml

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Two halves of about the same length beside each other; their output comes half by half.
test: lint
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target test-first test-second

FIRST := tests/guestd tests/hostd tests/proto tests/fleet/sweep tests/fleet/report tests/fleet/validate

test-first: $(STAMP)
	$(BIN)/pytest -q $(FIRST)

test-second: $(STAMP)
	$(BIN)/pytest -q $(FIRST:%=--ignore %)

FUZZ ?= 10000
fuzz: $(STAMP)
	FUZZ_EXAMPLES=$(FUZZ) $(BIN)/pytest -q --timeout 0 tests/guestd/test_engine.py -k reference

conformance: $(STAMP)
	@$(BIN)/fleet conformance

bench: $(STAMP)
	@$(BIN)/python -m benchmarks

# One file for running, testing and checking, so that everybody has the same versions of all of it.
pins:
	$(BIN)/pip-compile --quiet --upgrade --extra dev --generate-hashes --allow-unsafe --strip-extras \
		--no-emit-index-url --no-emit-find-links --output-file requirements.txt pyproject.toml

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find fleet guestd hostd proto tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +
