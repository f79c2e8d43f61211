# make test: install into .venv, check format and lint, run the tests.    make demo: adapt a real model to LANGUAGE.
# make fuzz: fresh inputs for every operator, for SECONDS.
# make sanitize: the CPU library under ASan and UBSan, with the operators' tests and the fuzzer. (Minutes to build.)
PYTHON ?= python3
LANGUAGE ?= cy
SECONDS ?= 600
VENV := .venv
BIN := $(VENV)/bin
NATIVE_SOURCES := $(shell find csrc -type f)

.PHONY: test demo fuzz sanitize clean

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE_SOURCES) $(wildcard tests/cuda_emulator/*.[ch]*)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2

demo: $(VENV)/installed-demo
	$(BIN)/python -m fastprompt.demo --language $(LANGUAGE)

fuzz: $(VENV)/installed-test
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 tests/fuzz --seed fresh --fuzz-seconds $(SECONDS)

# A package of its own in build/sanitize, which PYTHONSAFEPATH keeps the one beside this file from hiding. The runtimes
# come first in the process; libstdc++ with them, or they do not find its exceptions.
# Left out are the checks of UBSan that would take the kernels' templates half an hour to compile; ASan has the first.
SANITIZE := -fsanitize=address,undefined -fno-sanitize=null,alignment,object-size -fno-sanitize-recover=all
RUNTIMES = $(foreach name,asan ubsan stdc++,$(shell $(or $(CXX),c++) -print-file-name=lib$(name).so))
sanitize: $(VENV)/installed-test
	CXX="$(or $(CXX),c++) $(SANITIZE) -O1 -g1" FASTPROMPT_CUDA=0 \
	    $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize
	OMP_NUM_THREADS=2 PYTHONSAFEPATH=1 PYTHONPATH=build/sanitize LD_PRELOAD="$(RUNTIMES)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    $(BIN)/pytest -q -n 2 tests/ops tests/fuzz -k "not triton and not cuda and not compile" \
	    --fuzz-seconds $(SECONDS)

clean:
	rm -rf $(VENV) build *.egg-info fastprompt/_C_*

# torch first: the build takes its headers from where it will run.
$(VENV)/installed-%: pyproject.toml setup.py constraints.txt $(NATIVE_SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@
