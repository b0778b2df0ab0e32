# every target installs what it needs into .venv by itself; PYTHON picks the interpreter that makes it (3.11 or newer)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLI := $(VENV)/.installed-cli
RUN_DIR ?= runs/quickstart
WORKERS ?= 2
LAWS_COUNT ?= 2000
BUDGET ?= 480
LAWS_SEED := $(or $(LAWS_SEED),$(shell date +%s))

# one thread per process: two test workers with two threads each wait for each other most of the time
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: help install train test test-deep check format examples bench gpu atlas recipes evidence docs site clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=... picks another")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ $(CLI)

# for those who only train: less to fetch, and what is fetched is shown
$(CLI): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=... picks another")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing PyTorch and the command line into $(VENV), once; PyTorch is large'
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[cli]'
	touch $@

install: $(STAMP)  ## make .venv with the package (editable) and its tools

train: $(CLI)  ## train a byte-level GPT on the standard library's source: runs/quickstart; goes on where it was stopped
	$(BIN)/x-transformers train --run-dir $(RUN_DIR) $(if $(wildcard $(RUN_DIR)/config.json),--resume)

test: $(STAMP)  ## all tests but the deep ones
	$(TEST) -n $(WORKERS) --dist worksteal -m 'not deep'

test-deep: $(STAMP)  ## more random combinations of flags, and every recorded case under CONFORMANCE=path
	@echo 'LAWS_SEED=$(LAWS_SEED) LAWS_COUNT=$(LAWS_COUNT)'
	$(if $(CONFORMANCE),CONFORMANCE='$(abspath $(CONFORMANCE))') LAWS_COUNT=$(LAWS_COUNT) LAWS_SEED=$(LAWS_SEED) LAWS_EVERYWHERE=1 $(TEST) -n $(WORKERS) --dist worksteal

check: $(STAMP)  ## format, lint, types, fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(TEST) -n $(WORKERS) --dist worksteal -m 'not slow and not deep'

format: $(STAMP)  ## rewrite the sources as `make check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

examples: $(STAMP)  ## train every example (about a minute each); fails if one misses its figure
	@missed=; for example in $(filter-out examples/common.py,$(wildcard examples/*.py)); do \
		$(BIN)/python $$example || missed="$$missed $$example"; done; \
		test -z "$$missed" || { echo "missed:$$missed"; exit 1; }

bench: $(STAMP)  ## speed against a minimal hand-written GPT
	$(BIN)/python benchmarks/bench.py

atlas: $(STAMP)  ## run what is missing of the atlas of ideas (hours; BUDGET=minutes stops earlier), then write its pages
	$(BIN)/python tools/kept.py atlas --workers $(WORKERS) $(if $(BUDGET),--budget $(BUDGET))
	$(BIN)/python tools/generate_atlas.py
	$(BIN)/python tools/generate_features.py

recipes: $(STAMP)  ## the same for the tables of docs/recipes.md
evidence: $(STAMP)  ## the same for the published suites: docs/evidence.md
recipes evidence:
	$(BIN)/python tools/kept.py $@ --workers $(WORKERS) $(if $(BUDGET),--budget $(BUDGET))
	$(BIN)/python tools/generate_recipes.py

gpu: $(STAMP)  ## what only a GPU can show, within BUDGET seconds: build/gpu/gpu.md; goes on where it was stopped
	$(BIN)/python benchmarks/gpu.py --budget $(BUDGET)

docs: $(STAMP)  ## write what is generated from the flags
	@for script in tools/generate_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

site: $(STAMP)  ## build the documentation site: build/site/index.html; fails on a warning or a broken link
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo 'open build/site/index.html'

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
