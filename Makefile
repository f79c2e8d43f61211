# make test: install into .venv, check format and lint, run the tests.    make demo: adapt a real model to LANGUAGE.
PYTHON ?= python3
LANGUAGE ?= cy
VENV := .venv
BIN := $(VENV)/bin
NATIVE_SOURCES := $(shell find csrc -type f)

.PHONY: test demo clean

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE_SOURCES) $(wildcard tests/cuda_emulator/*.[ch]*)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2

demo: $(VENV)/installed-demo
	$(BIN)/python -m fastprompt.demo --language $(LANGUAGE)

clean:
	rm -rf $(VENV) build *.egg-info fastprompt/_C_*

# torch first: the build takes its headers from where it will run.
$(VENV)/installed-%: pyproject.toml setup.py constraints.txt $(NATIVE_SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@
