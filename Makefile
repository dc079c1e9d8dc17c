# Every verb sets up what it needs: a virtual environment in .venv, made anew when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
DEMO ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: setup check test test-all test-isa test-oldest demo bench docs dist clean

setup: .venv/ready

.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Smalti needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

check: setup
	$(BIN)/ruff format --check src tests benchmarks docs examples
	$(BIN)/ruff check src tests benchmarks docs examples
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not gpu" tests src

test-all: setup
	$(BIN)/python -m pytest -n $(JOBS) -m "not gpu" tests src

# Tests that compute, as older processors do (three instruction sets), with one thread and with two.
ISAS := default:SSE41:SSE4_2 avx2:AVX2:AVX2 avx512:AVX512_CORE:AVX512
NUMERICAL := contracts methods training layers models functional evaluation ranking exporters runs comparison preflight

test-isa: setup
	for threads in 1 2; do for isa in $(ISAS); do \
		set -- $$(echo $$isa | tr : ' '); echo "$$1, $$threads threads"; \
		OMP_NUM_THREADS=$$threads OMP_WAIT_POLICY=passive \
		ATEN_CPU_CAPABILITY=$$1 ONEDNN_MAX_CPU_ISA=$$2 MKL_ENABLE_INSTRUCTIONS=$$3 \
		$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not gpu" $(NUMERICAL:%=tests/%) || exit 1; \
	done; done

# The tests with the oldest torch, torchvision and timm that pyproject.toml allows, in an environment of their own.
OLDEST := .venv-oldest

test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python -m pytest -n $(JOBS) -m "not slow and not gpu" tests src

$(OLDEST)/ready: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	sed -nE 's/^ *"(torch|torchvision|timm)>=([0-9.]+)",?$$/\1==\2/p' pyproject.toml > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt -e ".[test]"
	touch $@

demo: setup
	$(BIN)/smalti demo --out $(DEMO)

bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[bench]"
	for file in benchmarks/[a-z]*.py; do $(BIN)/python $$file || exit 1; done

# Into site/; warnings are errors. To look at it: python3 -m http.server -d site
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The packages for PyPI, into dist/.
dist: setup
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf .venv $(OLDEST) dist site .pytest_cache .mypy_cache .ruff_cache
