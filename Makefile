# Each target sets itself up from a fresh clone: `.venv`, the dependencies, the C++ extension.
#
#   make demo      build, verify every backend, run the sinusoid experiment, result table and plot in runs/
#   make test      the whole test suite, in two processes
#   make lint      ruff, mypy, clang-format
#   make sanitize  the extension under AddressSanitizer and UndefinedBehaviorSanitizer: tests of the cpu backend, fuzzed calls
#   make bench     the comparison with other libraries; CSV and chart in runs/
#   make gpu       on a machine with a GPU, in its own Python environment (PYTHON): tests, verification and benchmark of
#                  the GPU backends in eight minutes; results in OUT
#   make clean     remove what was built (not .venv and runs/)
#
# PYTHON is the interpreter of .venv, TORCH the requirement installed into it, TORCH_INDEX pip's options for it. Without
# an NVIDIA driver Linux asks for the CPU build by name, so that gigabytes of CUDA are never an answer; where pip does
# not find it, set TORCH_INDEX to the index of CPU builds that https://pytorch.org names for pip.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

ifeq ($(shell uname -s)$(shell command -v nvidia-smi),Linux)
TORCH ?= torch==2.13.0+cpu
else
TORCH ?= torch==2.13.0
endif
TORCH_INDEX ?=

.PHONY: demo test lint sanitize bench gpu extension clean

demo: $(VENV)/installed-demo extension
	$(BIN)/fastmeta verify
	$(BIN)/fastmeta train sinusoid --out runs/sinusoid --overwrite

test: $(VENV)/installed-test extension
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed-lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' | xargs $(BIN)/clang-format --dry-run -Werror

sanitize: $(VENV)/installed-test extension
	$(BIN)/python tests/sanitize/run.py

bench: $(VENV)/installed-bench extension
	$(BIN)/fastmeta bench --out runs/bench

# In the environment that holds PyTorch for this GPU: nothing is installed but this package itself, without its
# dependencies and the extension, which no GPU backend needs.
OUT ?= runs/gpu
gpu:
	FASTMETA_NO_EXT=1 $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(PYTHON) bench/gpu.py --out $(OUT)

# setup.py itself knows which sources changed.
extension: $(VENV)/installed-base
	$(BIN)/python setup.py -q build_ext --inplace

$(VENV)/installed-demo: EXTRAS := data,plot
$(VENV)/installed-test: EXTRAS := test
$(VENV)/installed-lint: EXTRAS := lint,plot,tensorboard
$(VENV)/installed-bench: EXTRAS := bench

$(VENV)/installed-demo $(VENV)/installed-test $(VENV)/installed-lint $(VENV)/installed-bench: $(VENV)/installed-base
	$(PIP) --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

# The editable install leaves the extension to `extension`: pip would build it a second time. PyTorch comes
# first and alone, so that its index is asked for nothing else.
$(VENV)/installed-%: export FASTMETA_NO_EXT := 1
$(VENV)/installed-base: pyproject.toml constraints.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) 'setuptools>=77' wheel pybind11
	$(PIP) --no-deps $(TORCH_INDEX) '$(TORCH)'
	$(PIP) --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf build dist *.egg-info fastmeta/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find fastmeta kernels tests bench examples -name __pycache__ -prune -exec rm -rf {} +
