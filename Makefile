PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.setup-done
DEMO := $(if $(wildcard $(SETUP)),.venv,.venv-demo)

.PHONY: help setup demo test lint proof bench clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(SETUP)  ## build .venv with the dev extra, when stale

$(SETUP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	touch $@

# The demo needs no torch, so that it starts quickly on a fresh machine.
.venv-demo/.setup-done: pyproject.toml
	test -x .venv-demo/bin/python || $(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python -m pip install -qq -e '.[cpu]'
	touch $@

demo: $(DEMO)/.setup-done  ## the trained models draft, are checked and timed; no torch
	$(DEMO)/bin/python examples/demo.py

lint: $(SETUP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## lint, the fast tests from the checkout, a part of them from the wheel
	$(BIN)/pytest -n 2 -rs $(PYTEST_REPORT)
	bash tests/wheel.sh

proof: $(SETUP)  ## every proof at full size; writes proof.json
	$(BIN)/python tests/proof.py

bench: $(SETUP)  ## time the queries against other ways to run them
	$(BIN)/python benchmarks/queries.py

clean:  ## remove what the other targets made
	rm -rf .venv .venv-demo build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
