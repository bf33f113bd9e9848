# worldloom: the same targets for people and for .ci/run. `make` alone lists them.

PYTHON ?= python3
PIP_FLAGS ?=
# Processes that share the test files out, each with one thread.
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/installed
PROJECTS := pyproject.toml $(wildcard packages/*/pyproject.toml)

.DEFAULT_GOAL := help
.PHONY: help setup demo play browser test lint check clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(STAMP)  ## install everything into .venv (some minutes, about 7 GB)

# The stamp is written last, so an installation that was cut short is done again.
$(STAMP): $(PROJECTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'error: $(PYTHON) is missing or older than 3.11; name another: make setup PYTHON=python3.12' >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo 'error: $(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv' >&2; exit 1; }
	@echo 'installing worldloom and what it needs into .venv' >&2
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input $(PIP_FLAGS) \
	  -e packages/common -e packages/tokenizer -e packages/dynamics -e '.[envs,ingest,play,ray,test]'
	@touch $@

demo: setup  ## play, learn, imagine: the whole chain, then runs/demo/report.html
	$(BIN)/worldloom demo --output runs/demo

play: setup  ## walk through the learned world in a browser (learns it first, if there is none)
	@test -e runs/demo/report.json || \
	  echo 'there is no world yet: learning the demo first, about ten minutes' >&2
	@test -e runs/demo/report.json || $(MAKE) --no-print-directory demo
	$(BIN)/worldloom play runs/demo

# Debian's where that can be had, else playwright's own; tests say loudly what they cannot test.
browser: setup  ## install a Chromium for the tests of the page, where there is none
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
	  command -v $$name >/dev/null && exit 0; done; \
	echo 'installing Chromium: the page is tested in it' >&2; \
	{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get -qq update && \
	  DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 install -y \
	    --no-install-recommends chromium fonts-liberation >/dev/null; } || \
	$(BIN)/playwright install chromium || \
	echo 'no Chromium can be installed: the page will not be tested' >&2

test: setup browser  ## run the tests, the page in a Chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: setup  ## format, lint, types, import contracts; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test  ## lint, then test: what a change must pass

clean:  ## remove .venv and caches; runs/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist
	find packages pipelines tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
