# Every target sets up what it needs: python3 (3.11 or newer) and make are enough to start.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check install -c constraints.txt
MODEL ?= gpt2

.PHONY: help venv demo test test-gpu lint format verify clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: .venv/.stamp ## Make .venv with everything that the other targets need

.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "autopar needs Python 3.11 or newer (make PYTHON=python3.12 ...)")'
	@echo "Installing autopar and its dependencies into .venv (torch is large; a few minutes)"
	@$(PYTHON) -m venv .venv
	@$(PIP) torch==2.13.0
	@$(PIP) -e '.[test,lint]'
	@touch $@

demo: venv ## Train GPT-2 124M on 4 local CPU processes and compare with one process
	@$(BIN)/python -m benchmarks.demo

test: venv ## Run the tests (CPU only)
	@$(BIN)/python -m pytest -q -n 2 -m "not gpu"

test-gpu: venv ## Run the tests that need CUDA devices
	@$(BIN)/python -m pytest -q -m gpu

lint: venv ## Check format, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: venv ## Format, and fix what ruff can fix
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

verify: venv ## Compare the parallel step with the single-device one (MODEL=name or file.py:factory)
	@$(BIN)/autopar verify $(MODEL)

clean: ## Remove .venv, caches and build output
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
