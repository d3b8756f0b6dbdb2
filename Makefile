# Everything works from a fresh clone with Python >= 3.11, make and a package index.
#   make demo    train the quickstart recipe and show what it learned
#   make demo-on-device    a larger model pruned, distilled, quantised and shipped, beside one from scratch
#   make test    all tests, with the coverage of src
#   make test-kill    kills and requests to stop at random moments and in every phase, of one process and of four (minutes)
#   make test-slurm   the printed SLURM script on a real SLURM (root, Debian's slurm-wlm and munge)
#   make test-compile    the compilers of absent TPUs and GPUs, gigabytes of them (Linux on x86-64; most of an hour)
#   make test-gguf    GGUF files in the real llama.cpp, which is built from source (a C++ compiler; half an hour)
#   make setup   .venv with everything that tests and checks need
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
# The newest Python that really starts: version managers leave names on the path that only print an error.
PYTHON := $(shell for python in python3.13 python3.12 python3.11 python3 python; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1 \
	&& { command -v $$python; break; }; done)
# One compilation cache for all tests and the demo of this clone.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

.PHONY: demo demo-on-device test test-kill test-slurm test-compile test-gguf setup check format benchmark-memory benchmark-startup clean
.DEFAULT_GOAL := test

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python from 3.11 to 3.13 with venv found; install one, or name it: make PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Stamps make a second call instant. The demo needs less than the tests do, so it has its own.
$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.all: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[data,hf,dev]'
	@touch $@

setup: $(VENV)/.all

demo: $(VENV)/.core
	$(BIN)/python benchmarks/demo.py

# Beside what the demo needs, the package that writes the models' files.
$(VENV)/.gguf: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[gguf]'
	@touch $@

demo-on-device: $(VENV)/.gguf
	$(BIN)/python benchmarks/on_device.py

test: setup
	$(BIN)/python -m pytest --cov --cov-report=term --durations=10

test-kill: setup
	$(BIN)/python -m pytest -s --durations=0 tests/launch/on_stops.py tests/launch/on_kills.py

test-slurm: setup
	@for program in slurmctld slurmd munged; do command -v $$program >/dev/null || \
		{ echo "error: $$program is missing; install Debian's packages slurm-wlm and munge" >&2; exit 2; }; done
	$(BIN)/python -m pytest --durations=0 tests/launch/on_slurm.py

# Apart from the other environment: what is installed here claims accelerators that are not there.
$(VENV)-compile/.all: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python from 3.11 to 3.13 with venv found; install one, or name it: make PYTHON=/path/to/python" >&2; exit 2; }
	test -e $(VENV)-compile/bin/python || $(PYTHON) -m venv $(VENV)-compile
	$(VENV)-compile/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,compile]'
	@touch $@

test-compile: $(VENV)-compile/.all
	$(VENV)-compile/bin/python -m pytest --durations=0 -s tests/plan/on_compilers.py

# Apart from the other environment: building llama.cpp takes a C++ compiler and most of the half hour. From source, since
# the package has no wheels in the index, and for this processor.
$(VENV)-gguf/.all: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python from 3.11 to 3.13 with venv found; install one, or name it: make PYTHON=/path/to/python" >&2; exit 2; }
	@command -v c++ >/dev/null || { echo "error: c++ is missing; install a C++ compiler, as Debian's package g++" >&2; exit 2; }
	test -e $(VENV)-gguf/bin/python || $(PYTHON) -m venv $(VENV)-gguf
	$(VENV)-gguf/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(VENV)-gguf/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--no-binary llama-cpp-python llama-cpp-python
	@touch $@

test-gguf: $(VENV)-gguf/.all
	$(VENV)-gguf/bin/python -m pytest --durations=0 -s tests/interop/on_llama_cpp.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark-memory: $(VENV)/.core
	$(BIN)/python benchmarks/loss_memory.py

benchmark-startup: $(VENV)/.core
	$(BIN)/python benchmarks/startup.py

clean:
	rm -rf $(VENV) $(VENV)-compile $(VENV)-gguf .cache .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis
