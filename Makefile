# make test      install into .venv and run the test suite
# make demo      meta-train on handwritten digits and sinusoids; prints a table, writes a figure
# make serve-demo    train a small adapter, start the service (pymeta serve), make five calls with curl
# make bench     time every case against its rivals; writes bench/results/latest.{json,md}
# make docs      build the documentation, warnings as errors; it ends up in build/site
# make lint / format    check / rewrite the style of Python and C++
# make typing    mypy --strict over pymeta/, and the stub of the native module against the module
# make wheel     build the sdist and from it the wheel, repair and test both; they end up in dist/
# make test-postgres    the service's store against a PostgreSQL server, installed where there is none (Debian, root)
# make test-integrations    the blocks of docs/integrations.md, with TensorBoard, MLflow, Lightning, Accelerate and the Hub
# make test-torch TORCH=2.8.0    the tests on another torch, in an environment of their own (slow: a large download)
# make sanitize  native and Python tests under Address- and UndefinedBehaviorSanitizer; pool and blocks under ThreadSanitizer
# make guard     native tests and kernel tests with working memory between pages that nobody may touch
# make fuzz      coverage-guided fuzzing of the file reader and of the native module's arguments, SECONDS=600 each
# make soak      random cases and recipes against the reference, other ones each time, for SECONDS=3600
# make arrangements    the tests as other machines run them: other instruction sets, threads, cores, roundings, order
# make cuda      the CUDA kernels for all architectures (needs nvcc, no GPU): a report of each kernel, and their checks
# make block-report    what a block of the CUDA executor does for a task, counted on the emulated device, beside the goals
# make arm64     cross compile for 64-bit ARM and run the native tests in an emulator, where there is one
# make changelog     move the fragments of changelog.d/ into CHANGELOG.md
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
.PHONY: test demo bench docs lint format typing wheel test-wheel test-torch cuda block-report arm64 clean distclean \
  sanitize sanitize-native sanitize-python guard fuzz soak arrangements serve-demo test-postgres test-integrations changelog
.DELETE_ON_ERROR:

# A process a core; SPREAD= is one process. Tests are handed out in their order, so that files stay together.
SPREAD ?= -n auto --maxprocesses 8 --dist worksteal
test: $(STAMP)/pymeta $(STAMP)/test $(STAMP)/examples $(STAMP)/docs $(STAMP)/serve $(STAMP)/postgres
	$(BIN)/python -m pytest $(SPREAD)

demo: $(STAMP)/pymeta $(STAMP)/examples
	$(BIN)/python examples/demo.py

bench: $(STAMP)/pymeta $(STAMP)/bench
	$(BIN)/python -m pymeta.bench --out bench/results/latest.json

docs: $(STAMP)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(STAMP)/test
	$(BIN)/python -m pytest tests/project/test_style.py

format: $(STAMP)/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

typing: $(STAMP)/pymeta $(STAMP)/test $(STAMP)/serve
	$(BIN)/python -m pytest tests/project/test_typing.py

# Both are built in environments that hold the build requirements alone, the wheel from the sdist: what the sdist lacks,
# or what is taken from the source tree, shows. The time in the archives is the commit's: the same source, the same bytes.
wheel: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 946684800)
wheel: $(STAMP)/wheel
	rm -rf dist build/dist
	PIP_CONSTRAINT=$(abspath constraints.txt) $(BIN)/pyproject-build --outdir build/dist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/dist/*.whl
	mv build/dist/*.tar.gz dist/
	$(MAKE) test-wheel

# In fresh environments outside the source tree: with torch the whole suite, without it the part that is deployed.
WHEEL ?= dist/*.whl
test-wheel: $(STAMP)/venv
	PYMETA_DIST=$(abspath dist) $(BIN)/python tests/installed.py $(WHEEL)
	PYMETA_DIST=$(abspath dist) $(BIN)/python tests/installed.py $(WHEEL) --torch $(shell sed -n 's/^torch==//p' constraints.txt)

test-torch: $(STAMP)/venv
	@test -n "$(TORCH)" || { echo "make test-torch: name a version, as in: make test-torch TORCH=2.8.0"; exit 1; }
	@ls $(WHEEL) >/dev/null 2>&1 || { echo "make test-torch: no wheel in dist/: run make wheel first"; exit 1; }
	$(BIN)/python tests/installed.py $(WHEEL) --torch $(TORCH)

NATIVE := -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPYMETA_BUILD_PYTHON=OFF -DPYMETA_BUILD_TESTS=ON \
  -DPYMETA_EMULATE=ON

sanitize: sanitize-native sanitize-python

# Where instruction sets make no difference to what is looked for, one will do: it saves most of the compiler's time.
ONE_ISA := -DPYMETA_ISAS=$(if $(filter x86_64,$(shell uname -m)),baseline)

# The native tests and the Python module are linked from the same objects. Threads know nothing of instruction sets. Last of
# all a race that was planted in the emulated block: a ThreadSanitizer that does not see it proves nothing.
SANITIZED = $(CMAKE) -S . -B build/sanitized-objects $(MODULE) -DCMAKE_CXX_COMPILER=g++ -DPYMETA_SANITIZE=address \
  -DPYMETA_BUILD_TESTS=ON && $(CMAKE) --build build/sanitized-objects --target
sanitize-native: $(STAMP)/build
	$(SANITIZED) native_test
	ASAN_OPTIONS=detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1 build/sanitized-objects/native_test
	$(CMAKE) -S . -B build/thread $(NATIVE) -DPYMETA_SANITIZE=thread $(ONE_ISA)
	$(CMAKE) --build build/thread
	TSAN_OPTIONS=halt_on_error=1 build/thread/native_test pool blocks
	! TSAN_OPTIONS=halt_on_error=1 build/thread/planted_test blocks >build/thread/planted.log 2>&1
	grep -q "data race" build/thread/planted.log

# The Python files once more, in build/$(1), beside the module of another build, with an interpreter that sees this copy
# and all of .venv but its pymeta.
define beside
	rm -rf build/$(1) && mkdir -p build/$(1)
	$(BIN)/python -m venv --without-pip build/$(1)/venv
	printf '%s\n' $(abspath build/$(1)) $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
	  > $$(build/$(1)/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth
	cp -r pymeta tests pyproject.toml build/$(1)/ && rm -f build/$(1)/pymeta/*.so
	cp build/$(1)-objects/_native*.so build/$(1)/pymeta/
endef
MODULE := -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) -DPYMETA_EMULATE=ON
ONE_THREAD := OMP_NUM_THREADS=1 PYMETA_NUM_THREADS=2

# A module with a sanitizer needs its runtime in the process before Python, and libstdc++ beside it, or its hook of
# throw finds nothing to call. Leaks are not looked for: Python and torch keep what they have until the process ends.
# SUITE= names tests/FILES to run; all of them take a quarter of an hour on one core.
SUITE ?= tests
sanitize-python: $(STAMP)/build $(STAMP)/torch $(STAMP)/test
	$(SANITIZED) _native
	$(call beside,sanitized)
	cd build/sanitized && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1:allocator_may_return_null=1 \
	  UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc PYTHONPATH=$(abspath build/sanitized) $(ONE_THREAD) \
	  venv/bin/python -m pytest -p no:cacheprovider $(SUITE)

guard: $(STAMP)/build $(STAMP)/torch $(STAMP)/test
	$(CMAKE) -S . -B build/guarded-objects $(MODULE) -DPYMETA_GUARD=ON -DPYMETA_BUILD_TESTS=ON
	$(CMAKE) --build build/guarded-objects --target _native native_test
	$(call beside,guarded)
	for at in end start; do \
	  export PYMETA_GUARD_AT=$$at; build/guarded-objects/native_test && (cd build/guarded && \
	  PYTHONPATH=$(abspath build/guarded) $(ONE_THREAD) venv/bin/python -m pytest -p no:cacheprovider \
	  tests/native/test_kernels.py tests/native/test_bits.py tests/native/test_recipes.py tests/models/test_adapter.py tests/models/test_adapter_arrays.py tests/native/test_faults.py) || exit 1; \
	done

# libFuzzer comes with atheris, the instrumentation from clang++. What is fuzzed is how arguments and files are read and
# checked; make sanitize has the kernels of all instruction sets.
SECONDS ?= 600
CLANGXX ?= $(firstword $(shell for n in '' -20 -19 -18 -17 -16 -15; do command -v clang++$$n || true; done))
fuzz: $(STAMP)/build $(STAMP)/torch $(STAMP)/fuzz
	@test -n "$(CLANGXX)" || { echo "make fuzz: no clang++. On Debian: apt-get install clang"; exit 1; }
	$(CMAKE) -S . -B build/fuzzed-objects $(MODULE) -DCMAKE_CXX_COMPILER=$(CLANGXX) -DPYMETA_SANITIZE=fuzzer $(ONE_ISA)
	$(CMAKE) --build build/fuzzed-objects --target _native
	$(call beside,fuzzed)
	for target in file binding; do \
	  LD_PRELOAD=$$($(BIN)/python -c 'import atheris; print(atheris.path())')/asan_with_fuzzer.so \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
	  PYTHONPATH=$(abspath build/fuzzed) PYMETA_FUZZ_FOUND=$(abspath build/fuzz) $(ONE_THREAD) \
	  build/fuzzed/venv/bin/python build/fuzzed/tests/fuzz/run.py $$target $(SECONDS) || exit 1; \
	done

serve-demo: $(STAMP)/pymeta $(STAMP)/serve
	deploy/demo.sh $(BIN)

# The store's tests against a server of their own, which Debian's package brings where there is none.
test-postgres: $(STAMP)/pymeta $(STAMP)/test $(STAMP)/serve $(STAMP)/postgres
	command -v initdb || ls /usr/lib/postgresql/*/bin/initdb || apt-get install -y --no-install-recommends postgresql
	PYMETA_TEST_POSTGRES=1 $(BIN)/python -m pytest tests/serve/test_serve_store.py tests/serve/test_serve_faults.py

# The blocks of docs/integrations.md; in an environment of their own that sees .venv, which stays as it is.
test-integrations: $(STAMP)/pymeta $(STAMP)/test
	$(BIN)/python -m venv build/integrations
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$(build/integrations/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth
	build/integrations/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt $(call listed,integrations)
	PYMETA_TEST_INTEGRATIONS=1 build/integrations/bin/python -m pytest tests/project/test_docs.py -k integrations

soak: SECONDS = 3600
soak: $(STAMP)/pymeta $(STAMP)/test
	$(BIN)/python tests/soak.py $(SECONDS)

# NAMES="'isa avx2' 'one core'" runs these alone; the whole takes an hour.
arrangements: $(STAMP)/pymeta $(STAMP)/test $(STAMP)/examples $(STAMP)/docs $(STAMP)/serve
	$(BIN)/python tests/arrangements.py $(NAMES)

cuda: $(STAMP)/build $(STAMP)/test
	$(CMAKE) -S . -B build/cuda -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPYMETA_CUDA=ON \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DCMAKE_CUDA_FLAGS=-Xptxas=-v
	$(CMAKE) --build build/cuda --target _native >build/cuda/log.txt 2>&1 || { tail -50 build/cuda/log.txt; exit 1; }
	$(BIN)/python bench/kernel_report.py --log build/cuda/log.txt --json build/cuda/kernels.json
	$(MAKE) block-report
	PYMETA_TEST_MODULE=$$(ls build/cuda/_native*.so) PYMETA_TEST_CUDA="plain chains every tensor float double 80 90 100 120" \
	  $(BIN)/python -m pytest tests/native/test_cuda_build.py

# Families of calls (csrc/cuda/families.h) that cases of the benchmark belong to.
COUNTED := plain chains tensor
# Without nvcc, too: what a block does for a task, counted; the kernels where `make cuda` was run before.
block-report: $(STAMP)/build
	$(CMAKE) -S . -B build/counts $(NATIVE)
	$(CMAKE) --build build/counts --target \
	  $(foreach family,$(COUNTED),block_accesses_$(family) block_instructions_$(family))
	for counted in $(foreach family,$(COUNTED),accesses_$(family) instructions_$(family)); do \
	  build/counts/block_$$counted >build/counts/$$counted.json || exit; done
	$(BIN)/python bench/block_report.py $(COUNTED:%=build/counts/accesses_%.json) \
	  --instructions $(COUNTED:%=build/counts/instructions_%.json) $$(test -f build/cuda/kernels.json && echo --kernels build/cuda/kernels.json)
	$(BIN)/python bench/special_report.py build/counts/block_instructions_plain

arm64: $(STAMP)/build
	@command -v aarch64-linux-gnu-g++ >/dev/null || { \
	  echo "make arm64: no aarch64-linux-gnu-g++. On Debian: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }
	$(CMAKE) -S . -B build/arm64 $(NATIVE) -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake
	$(CMAKE) --build build/arm64
	@qemu=$$(command -v qemu-aarch64 || command -v qemu-aarch64-static || true); \
	if [ -n "$$qemu" ]; then echo "$$qemu build/arm64/native_test no-fork"; "$$qemu" build/arm64/native_test no-fork; \
	else echo "make arm64: compiled, NOT run: no qemu-aarch64 (on Debian: apt-get install qemu-user)"; fi

changelog:
	$(PYTHON) changelog.d/fold.py

clean:
	rm -rf build dist $(STAMP)/pymeta .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
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
	$(call needed,["project"]["dependencies"])
	$(call needed,["project"]["optional-dependencies"]["torch"])
	@touch $@

$(STAMP)/build: $(STAMP)/venv constraints.txt
	$(PIP) install -c constraints.txt cmake ninja pybind11 scikit-build-core
	@touch $@

# The lists of packages stand in pyproject.toml alone; $(1) says where.
listed = $(shell $(PYTHON) -c 'import tomllib; \
  print(*(repr(r) for r in tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$(1)"]))')
needed = $(PIP) install -c constraints.txt $(shell $(PYTHON) -c 'import tomllib; \
  print(*(repr(r) for r in tomllib.load(open("pyproject.toml", "rb"))$(1)))')

$(STAMP)/bench $(STAMP)/examples $(STAMP)/serve $(STAMP)/postgres: $(STAMP)/torch pyproject.toml
	$(call needed,["project"]["optional-dependencies"]["$(notdir $@)"])
	@touch $@

$(STAMP)/test $(STAMP)/docs: $(STAMP)/torch pyproject.toml
	$(call needed,["dependency-groups"]["$(notdir $@)"])
	@touch $@

$(STAMP)/fuzz: $(STAMP)/venv constraints.txt
	$(PIP) install -c constraints.txt atheris
	@touch $@

$(STAMP)/wheel: $(STAMP)/venv constraints.txt pyproject.toml
	$(call needed,["dependency-groups"]["wheel"])
	@touch $@

# An editable install: Python files are used where they lie, and a changed C++ file is compiled again
# (only that one: the object files stay in build/).
# PYMETA_EMULATE: with the CUDA executor's code on host threads, which the tests run.
# The install knows each Python file by its place, so it is made anew where one came, went or moved.
FOLDERS := $(shell find pymeta -type d -not -name __pycache__)
SOURCES := $(shell find csrc -type f -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
$(STAMP)/pymeta: $(STAMP)/torch $(STAMP)/build CMakeLists.txt pyproject.toml $(SOURCES) $(FOLDERS)
	@ls -d $(VENV)/lib/python*/site-packages/pymeta-*.dist-info >/dev/null 2>&1 && $(PIP) uninstall -y pymeta || true # its former name
	$(PIP) install --no-build-isolation --no-deps -C cmake.define.PYMETA_EMULATE=ON -e .
	@touch $@
