# make demo: train ten tasks and write a report.   make test: everything that CI checks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export PATH := $(CURDIR)/$(BIN):$(PATH)

BUILD := pyproject.toml setup.py constraints.txt _build/backend.py $(wildcard csrc/*.cpp csrc/cpu/*)

.PHONY: demo test lint types cpp reference pure bench readme clean
demo: $(VENV)/.demo
	fasthyper run demo --out runs/demo

test: lint types cpp reference pure

lint: $(VENV)/.dev
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror csrc/*.cpp csrc/cpu/*
	python bench/report.py --check

types: $(VENV)/.dev
	mypy

cpp: $(VENV)/.dev
	FASTHYPER_BACKEND=cpp pytest

reference: $(VENV)/.dev
	FASTHYPER_BACKEND=reference pytest

# what an install without a compiler gives: the package as it is copied, with no extension in it
pure: $(VENV)/.dev
	rm -rf build/pure
	FASTHYPER_BUILD=none $(PIP) install -q --no-build-isolation --no-deps --target build/pure .
	PYTHONPATH=build/pure FASTHYPER_BACKEND=auto pytest

bench: $(VENV)/.dev
	pytest bench -o python_files='bench_*.py' --benchmark-json=bench/results/cpu.json
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
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[plot]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(BUILD)
	FASTHYPER_BUILD=cpu $(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@
