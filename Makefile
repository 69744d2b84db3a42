# make test      install into .venv and run the test suite
# make demo      meta-train on handwritten digits and sinusoids; prints a table, writes a figure
# make bench     time every case against its rivals; writes bench/results/latest.{json,md}
# make lint / format    check / rewrite the style of Python and C++
# make sanitize  native tests under Address- and UndefinedBehaviorSanitizer, the pool under ThreadSanitizer
# make arm64     cross compile for 64-bit ARM and run the native tests in an emulator, where there is one
# make clean     remove what was built (make distclean: .venv too)
#
# Everything lives in .venv, with the versions of constraints.txt. A machine needs Python >= 3.11 with its
# venv module and headers, and g++ or clang++; CMake and Ninja come from pip.

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CMAKE := $(BIN)/cmake
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)

# One recipe for each purpose; a target's stamp says that its packages are in .venv.
.PHONY: test demo bench lint format sanitize arm64 clean distclean
.DELETE_ON_ERROR:

test: $(STAMP)/pymeta $(STAMP)/test $(STAMP)/examples
	$(BIN)/python -m pytest

demo: $(STAMP)/pymeta $(STAMP)/examples
	$(BIN)/python examples/demo.py

bench: $(STAMP)/pymeta $(STAMP)/bench
	$(BIN)/python -m bench

lint: $(STAMP)/test
	$(BIN)/python -m pytest tests/test_style.py

format: $(STAMP)/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

NATIVE := -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPYMETA_BUILD_PYTHON=OFF -DPYMETA_BUILD_TESTS=ON

sanitize: $(STAMP)/build
	$(CMAKE) -S . -B build/address $(NATIVE) -DPYMETA_SANITIZE=address
	$(CMAKE) --build build/address
	ASAN_OPTIONS=detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1 build/address/native_test
	$(CMAKE) -S . -B build/thread $(NATIVE) -DPYMETA_SANITIZE=thread
	$(CMAKE) --build build/thread
	TSAN_OPTIONS=halt_on_error=1 build/thread/native_test pool

arm64: $(STAMP)/build
	@command -v aarch64-linux-gnu-g++ >/dev/null || { \
	  echo "make arm64: no aarch64-linux-gnu-g++. On Debian: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }
	$(CMAKE) -S . -B build/arm64 $(NATIVE) -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake
	$(CMAKE) --build build/arm64
	@qemu=$$(command -v qemu-aarch64 || command -v qemu-aarch64-static || true); \
	if [ -n "$$qemu" ]; then echo "$$qemu build/arm64/native_test no-fork"; "$$qemu" build/arm64/native_test no-fork; \
	else echo "make arm64: compiled, NOT run: no qemu-aarch64 (on Debian: apt-get install qemu-user)"; fi

clean:
	rm -rf build dist $(STAMP)/pymeta .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# ---- what lies in .venv ---------------------------------------------------------------------------

$(STAMP)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: development needs Python >= 3.11 (found: $$($(PYTHON) --version 2>&1)); name another one by PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: this Python cannot make a virtual environment. On Debian: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig as s; raise SystemExit(not os.path.exists(os.path.join(s.get_path("include"), "Python.h")))' || { \
	  echo "make: no Python.h, which building the extension needs. On Debian: apt-get install python3-dev"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { \
	  echo "make: no C++ compiler. On Debian: apt-get install g++"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMP) && touch $@

# torch first and by itself, so that nothing below ever pulls another one in.
$(STAMP)/torch: $(STAMP)/venv constraints.txt
	$(PIP) install -c constraints.txt torch
	$(call needed,["dependencies"])
	@touch $@

$(STAMP)/build: $(STAMP)/venv constraints.txt
	$(PIP) install -c constraints.txt cmake ninja pybind11 scikit-build-core
	@touch $@

# The lists of packages stand in pyproject.toml alone; $(1) says where.
needed = $(PIP) install -c constraints.txt $(shell $(PYTHON) -c 'import tomllib; \
  print(*(repr(r) for r in tomllib.load(open("pyproject.toml", "rb"))["project"]$(1)))')

$(STAMP)/test $(STAMP)/bench $(STAMP)/examples: $(STAMP)/torch pyproject.toml
	$(call needed,["optional-dependencies"]["$(notdir $@)"])
	@touch $@

# An editable install: Python files are used where they lie, and a changed C++ file is compiled again
# (only that one: the object files stay in build/).
SOURCES := $(shell find csrc -type f -name '*.h' -o -name '*.cpp' 2>/dev/null)
$(STAMP)/pymeta: $(STAMP)/torch $(STAMP)/build CMakeLists.txt pyproject.toml $(SOURCES)
	$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@
