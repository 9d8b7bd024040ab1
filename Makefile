# Everything runs in a virtual environment of its own, .venv. PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
JOBS ?= 2
OPS ?=
BIN := .venv/bin

.PHONY: demo docs test test-slow test-all check format bench gpu gpu-kernels aot clean

# The package with an extra of pyproject.toml. Also when a C++ file is newer than the last build; ninja compiles only what changed.
.venv/with-%: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the package with its extra $*; the first time this fetches PyTorch and compiles for some minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$*]"
	touch $@

## Track points in a video of moving photographs; ends with the path of the overlay.
demo: .venv/with-eval
	$(BIN)/python examples/demo.py

## The documentation as a site, build/site/index.html. It needs neither the package nor PyTorch.
docs: .venv-docs/bin/mkdocs
	.venv-docs/bin/mkdocs build --strict

.venv-docs/bin/mkdocs: pyproject.toml
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check "mkdocs>=1.6,<2" "mkdocs-material>=9"
	touch $@

# Idle OpenMP threads sleep: two test processes of two threads each share two cores.
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --quiet
# Longest files first (tests/conftest.py orders them), so that no core waits for the last one.
SLOW_PYTEST = $(PYTEST) --no-loadscope-reorder -m slow

# Of one operation: its files, and what all operations have in common.
TESTS = $(if $(OPS),-k $(OPS) $(wildcard tests/test_$(OPS)*.py) tests/test_contracts.py,tests)

## Run the quick tests, in at most five minutes on two cores; OPS=name runs those of one operation.
test: .venv/with-test
	$(PYTEST) -m "not slow" $(TESTS)

## Run the slow tests: Triton's interpreter, ahead-of-time compilation, inductor, sanitizers, long clips.
test-slow: .venv/with-test build/triton-3.6
	$(SLOW_PYTEST) $(TESTS)

test-all: test test-slow

## Lint, formatting and types; whether every benchmark can be collected.
check: .venv/with-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest benchmarks --collect-only -qq > /dev/null
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*/*.cpp csrc/*/*.h tests/*.cpp

format: .venv/with-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.cpp csrc/*/*.cpp csrc/*/*.h tests/*.cpp

## Benchmarks on this machine, with peers, under the default allocator and under one that keeps large blocks; OPS=name
## chooses an operation. RECORD=--record appends the rows to benchmarks/results/.
ROWS := build/benchmark-rows.jsonl
TUNED := GLIBC_TUNABLES=glibc.malloc.mmap_threshold=2147483647:glibc.malloc.trim_threshold=8589934592
bench: .venv/with-test
	mkdir -p build && rm -f $(ROWS)
	$(BIN)/python -m pytest benchmarks --benchmark-only --rows $(ROWS) $(RECORD) $(if $(OPS),-k "$(OPS)")
	$(TUNED) $(BIN)/python -m pytest benchmarks --benchmark-only --rows $(ROWS) $(RECORD) $(if $(OPS),-k "$(OPS)")
	$(BIN)/python benchmarks/table.py $(ROWS)

## On a machine with a GPU, with the Python that has its PyTorch: correctness, times, tests, a table; see benchmarks/README.md.
## PARTS="correct times" runs some of it. Without a GPU it is a rehearsal on small shapes.
gpu:
	$(PYTHON) benchmarks/gpu $(PARTS)

## On a machine without one: compile the kernels for an H100 or H200 with Triton 3.6 and Python 3.12, to travel with the tree.
gpu-kernels: .venv/with-test build/triton-3.6 build/triton-3.6-cp312
	PYTHONPATH=build/triton-3.6 $(BIN)/python benchmarks/gpu/compiled.py build/triton-3.6-cp312

# The oldest Triton that the kernels are compiled with, beside the one that is installed.
OLDER = 'triton==3.6.*'
build/triton-3.6: | .venv/with-test
	$(BIN)/python -m pip install --quiet --no-deps --target $@ $(OLDER)

build/triton-3.6-cp312: | .venv/with-test
	$(BIN)/python -m pip download --quiet --no-deps --dest $@ --python-version 3.12 --only-binary=:all: \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 $(OLDER)
	cd $@ && python3 -m zipfile -e *.whl . && rm *.whl

## Compile every Triton kernel for every target and every tile, and run the sanitizers on every instruction set that this machine has
## (the tests do a part of both).
aot: .venv/with-test build/triton-3.6
	TRITONKERN_AOT=all $(BIN)/python -m pytest --quiet tests/test_triton_aot.py tests/test_*_triton.py \
		tests/test_cpp_build.py::test_sanitizers_find_nothing tests/test_cpp_build.py::test_exp_and_log_keep_their_bounds

clean:
	rm -rf .venv .venv-docs build demo tritonkern/_cpp*.so
