# `make` lists the targets. Everything runs in .venv, which the first target makes.

PYTHON ?= python3
# Installed when the machine's Python has no torch >= 2.11: without an NVIDIA driver from PyTorch's index of CPU builds,
# which spares the machine gigabytes of CUDA libraries, and from the default index where that one cannot be reached.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)
# For a torch that brings no Triton, as CPU builds do: the one whose interpreter and machine code the tests know.
TRITON ?= triton==3.6.0
RUN_DIR ?= runs/demo
COUNT ?= 100000
# As many processes as there are cores.
PYTEST_ARGS ?= -n auto --dist worksteal

VENV := .venv
BIN := $(VENV)/bin
CHECK_PYTHON := import sys; sys.exit(sys.version_info < (3, 11))
CHECK_TORCH := import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))

# One thread a process: the tests' tensors are small, and some tests start several processes.
TEST_ENV := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}

.PHONY: help demo test fuzz kills lint clean
help:
	@echo "make demo    install into $(VENV), then the whole pipeline on a small model (some 5 minutes on 2 cores)"
	@echo "make test    install, then the whole test suite"
	@echo "make fuzz    install, then COUNT damaged artifacts and a tenth of that of every other file (8 to 17 minutes on 2 cores)"
	@echo "make kills   install, then runs that are killed at every write and at moments, and go on (about 20 minutes)"
	@echo "make lint    install, then ruff check, ruff format --check and mypy"
	@echo "make clean   remove $(VENV), caches and build products; runs/ and data/ stay"
	@echo "Variables: COUNT=$(COUNT)  PYTHON=$(PYTHON)  TORCH=$(TORCH)  TORCH_INDEX=$(TORCH_INDEX)  TRITON=$(TRITON)  RUN_DIR=$(RUN_DIR)"

demo: $(VENV)/.installed
	$(BIN)/python -m pgolf run --preset demo --run-dir $(RUN_DIR) --fresh

test: $(VENV)/.installed
	$(TEST_ENV) $(BIN)/python -m pytest $(PYTEST_ARGS)
	@$(BIN)/python -m bench.prove --check

fuzz: $(VENV)/.installed
	$(TEST_ENV) $(BIN)/python -m tests.fuzz --count $(COUNT)

kills: $(VENV)/.installed
	$(TEST_ENV) $(BIN)/python -m tests.kills

lint: $(VENV)/.installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Reuses a torch >= 2.11 of $(PYTHON); the packages of that Python are visible in .venv only in this case.
$(VENV)/.torch:
	@$(PYTHON) -c '$(CHECK_PYTHON)' 2>/dev/null || { \
	  echo "pgolf needs Python 3.11 or newer, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -m venv --clear --system-site-packages $(VENV)
	@if $(BIN)/python -c '$(CHECK_TORCH)' 2>/dev/null; then \
	  echo "$(VENV): uses the torch of $(PYTHON)"; \
	else \
	  echo "$(VENV): installing $(TORCH)"; \
	  $(PYTHON) -m venv --clear $(VENV) && \
	  { test -n "$(TORCH_INDEX)" && \
	    $(BIN)/python -m pip install --quiet --retries 0 --timeout 10 --index-url "$(TORCH_INDEX)" "$(TORCH)" || \
	    $(BIN)/python -m pip install --quiet "$(TORCH)"; }; \
	fi
	@if ! $(BIN)/python -c 'import triton' 2>/dev/null; then \
	  if test "$$(uname -s)" = Linux; then $(BIN)/python -m pip install --quiet "$(TRITON)"; \
	  else echo "$(VENV): there is no Triton for $$(uname -s): the kernels' references run"; fi; \
	fi
	@touch $@

$(VENV)/.installed: $(VENV)/.torch setup.py pyproject.toml
	@echo "$(VENV): installing pgolf"
	@$(BIN)/python -m pip install --quiet -e '.[report,progress,data,convert,test]'
	@touch $@
