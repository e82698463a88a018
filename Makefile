# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# `make test TORCH=2.11.0` tests under that release of torch, in an environment beside .venv.
TESTED := .venv$(TORCH:%=-%)
FIT := $(BIN)/stem-fast fit --config bench/demo.yaml --overwrite

.PHONY: demo test sanitize bench lint format docs clean setup

demo: $(READY)  ## train STEM-Net, single-task and shared-bottom models on made data, and compare
	$(BIN)/stem-fast synth --seed 1 --out runs/demo/data --overwrite
	$(FIT) --model stem --num-shared-experts 2 --gate-hidden-units 32 --out runs/demo/stem
	$(FIT) --model single --out runs/demo/single
	$(FIT) --model shared_bottom --out runs/demo/shared_bottom
	$(BIN)/stem-fast compare runs/demo/stem runs/demo/single runs/demo/shared_bottom \
	  --json runs/demo/comparison.json

# Two tests at a time: threads that wait must not spin. pytest-benchmark, which these need only in
# processes of their own, warns beside pytest-xdist.
test: $(TESTED)/.ready  ## all tests
	OMP_WAIT_POLICY=passive $(TESTED)/bin/python -m pytest -n 2 --dist worksteal -p no:benchmark

# A library and a copy of the package of its own. The sanitizer's allocator must be there before
# Python's, and the C++ runtime whose exceptions it follows; its reports go to the real stderr.
sanitize: export STEM_FAST_SANITIZE := 1
sanitize: export OMP_WAIT_POLICY := passive
sanitize: export ASAN_OPTIONS := detect_leaks=0:allocator_may_return_null=1
sanitize: export UBSAN_OPTIONS := print_stacktrace=1
sanitize: $(READY)  ## nightly: tests of the ops under gcc's address and undefined behaviour sanitizers
	$(BIN)/python setup.py --quiet build --build-base build/sanitize --build-lib build/sanitize/lib
	PYTHONPATH=build/sanitize/lib \
	  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
	  $(BIN)/pytest -n 2 --dist worksteal -p no:benchmark --capture=sys tests/ops

bench: $(READY)  ## the ops against the official formulation and other libraries
	$(BIN)/python -m bench.run --json bench/results/kernels_cpu.json

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.docs  ## the site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# The package is there already: only what the extra adds is installed, and nothing is built again.
.venv/.docs: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt 'stem_fast[docs]'
	touch $@

setup: $(READY)

# torch first: the C++ library is built against the torch that it will run with.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.h csrc/*/*)
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch 'setuptools>=77' wheel
	@echo 'compiling the C++ library: a minute or two, with nvcc some more'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

# Another torch runs the library that was built with the one of constraints.txt: without a compiler
# nothing is built.
.venv-%/.ready: pyproject.toml | $(READY)
	.venv-$*/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --quiet torch==$* 'setuptools>=77' wheel
	CXX=none .venv-$*/bin/python -m pip install --quiet torch==$* --no-build-isolation -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-* build runs *.egg-info stem_fast/_cpp.* stem_fast/_cuda.*
