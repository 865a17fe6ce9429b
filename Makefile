# One list of commands. Everything installs into .venv; set PYTHON to choose the interpreter.
PYTHON ?= python3
# Plain `torch` brings CUDA; the CPU build is enough for nano. On a GPU host: make setup TORCH='torch==2.13.0'
# with the index of your CUDA version in PIP_EXTRA_INDEX_URL.
TORCH ?= torch==2.13.0
BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --progress-bar off
STAMP := .venv/.stamp

.PHONY: setup lock demo test lint types contract unit fuzz bench nano clean

setup: $(STAMP)-dev

$(STAMP)-venv:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	touch $@

$(STAMP)-demo: pyproject.toml constraints.txt $(STAMP)-venv
	$(INSTALL) -c constraints.txt "$(TORCH)" -e ".[demo]"
	touch $@

$(STAMP)-dev: pyproject.toml constraints.txt $(STAMP)-venv
	$(INSTALL) -c constraints.txt "$(TORCH)" -e ".[dev]"
	touch $@ $(STAMP)-demo

# Newest versions that pyproject.toml allows, written to constraints.txt: run the tests before you commit it.
lock: $(STAMP)-venv
	$(INSTALL) --upgrade --upgrade-strategy eager "$(TORCH)" -e ".[dev]"
	$(BIN)/python -m pip freeze --exclude-editable | grep -viE '^(torch|nvidia|triton|setuptools)' > constraints.txt

# The main job: worker, gateway and a scripted upstream, and a tour through them with the openai SDK.
demo: $(STAMP)-demo
	$(BIN)/guard-gateway demo $(ARGS)

# Everything that must pass: lint, types, import contract, tests.
test: lint types contract unit

lint: $(STAMP)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)-dev
	$(BIN)/mypy

contract: $(STAMP)-dev
	$(BIN)/lint-imports

unit: $(STAMP)-dev
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered $(ARGS)

# The property tests with examples that were never drawn before.
fuzz: $(STAMP)-dev
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -m "not slow" $(ARGS)

bench: $(STAMP)-dev
	$(BIN)/python tests/bench/overhead.py
	$(BIN)/python tests/bench/verdict.py
	$(BIN)/python -m tests.bench.streams
	$(BIN)/python -m tests.bench.promotion

# Train the bundled guard again: make nano DATA=path/to/data
nano: $(STAMP)-dev
	$(BIN)/guard-train nano --data "$(DATA)" --output runs/nano

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache runs
