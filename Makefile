# `make demo` and `make test` need Python 3.10 or later with venv, and make. Everything else goes into .venv.

PYTHON ?= python3
VENV ?= .venv

# torch is installed first and alone. This release is the one that the tests are developed with; any from 2.10 on is supported.
# pip picks the build: the CPU's where an index or folder that pip is configured with offers it, on most Linux machines the CUDA one.
# Another choice: make clean, then make test TORCH='torch==2.12.0', or any other arguments of pip install.
TORCH ?= torch==2.13.0

# Passed on: to `pab demo` by make demo, to pytest by make test.
ARGS ?=

# In CI every transformer class of diffusers is run, elsewhere a few unlike ones: make test ARGS="-m ''" runs them all, too.
MODELS := $(if $(CI),-m '')

# In CI a warning of the C++ and CUDA compilers is an error; elsewhere another compiler may warn of other things.
export PAB_WERROR ?= $(if $(CI),1,0)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test lint style format extension wheel clean

help:  ## show this
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/demo.stamp  ## sample a small video model with and without PAB and compare: make demo ARGS='--help'
	$(BIN)/pab demo $(ARGS)

# Types are checked while the tests run: mypy is one process, beside which the other cores would be idle.
test: style extension  ## lint and run the tests: make test ARGS='-k plan'
	@$(BIN)/mypy & types=$$!; \
		$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder $(MODELS) $(ARGS); tests=$$?; \
		wait $$types || { echo "mypy found the errors above" >&2; exit 1; }; \
		exit $$tests

lint: style  ## check style, format and types
	$(BIN)/mypy

style: $(VENV)/test.stamp $(VENV)/oldest-triton.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/test.stamp  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Where there is no nvcc this compiles the planners alone, and says so; where there is no C++ compiler, nothing.
extension: $(VENV)/extension.stamp  ## compile the CUDA kernels into the source tree: docs/building.md

wheel: $(VENV)/test.stamp  ## a wheel in dist/, with the CUDA kernels where nvcc is found
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

clean:  ## remove .venv, build outputs and caches
	rm -rf $(VENV) build dist *.egg-info pab_kernels/*.so pab_kernels/_build_info.json .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/torch.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "pab_kernels needs Python 3.10 or later; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo not there)." \
			"Name another: make PYTHON=python3.12" >&2; \
		exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: sudo apt install python3-venv" >&2; \
		exit 1; }
	@echo "== $(VENV): virtual environment with $(TORCH)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	@touch $@

# Installed in editable form: `make test` tests the sources as they are. What users install is built, and looked into, by tests/test_package.py.
$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml setup.py
	@echo "== $(VENV): the package and what its demo needs"
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/test.stamp: $(VENV)/torch.stamp pyproject.toml setup.py
	@echo "== $(VENV): the package and what its tests need"
	$(PIP) --editable '.[test]'
	@touch $(VENV)/demo.stamp $@

# The kernels are compiled with the oldest supported Triton too, which lies beside the environment's own: tests/kernels.
$(VENV)/oldest-triton.stamp: $(VENV)/torch.stamp
	$(PIP) --no-deps --target $(VENV)/triton-3.6.0 'triton==3.6.0'
	@touch $@

$(VENV)/extension.stamp: $(VENV)/test.stamp CMakeLists.txt $(wildcard cmake/* csrc/* csrc/tests/* csrc/tests/*/* python/*)
	@echo "== pab_kernels: the CUDA kernels"
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@
