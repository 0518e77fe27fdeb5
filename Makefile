# Two commands do everything on a fresh machine: `make train` and `make test`.
PYTHON ?= python3
# Every GPU there is, or two processes on the CPU.
GPUS := $(shell nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU')
PROCESSES ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),2)
# Two files of tests at a time; the tests of one file share the runs that it has started.
WORKERS ?= -n 2 --dist loadfile
ARGS ?=
BIN := .venv/bin

.PHONY: install train test test-faults test-browser lint docs clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

train: install
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --num_gpus $(PROCESSES) launchers/train.py --ds_config ds_configs/zero2.json $(ARGS)

test: install lint
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest $(WORKERS) $(ARGS)

# Every fault under every engine, one after the other: long.
test-faults: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m faults $(ARGS)

# A report in headless Chromium, of which Debian's packages are chromium and chromium-driver. Fails where there is none.
test-browser: install
	COLM_SCALE_TEST_BROWSER=required PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m browser tests/browser $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

# Of the docstrings, into build/docs.
docs: install
	PYTHONPATH=. $(BIN)/pdoc --docformat google --output-directory build/docs colm_scale

clean:
	rm -rf .venv build dist *.egg-info
