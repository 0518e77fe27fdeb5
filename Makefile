# `make train` and `make test` each do everything on a fresh machine.
PYTHON ?= python3
# Every GPU there is, or two processes on the CPU.
GPUS := $(shell nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU')
PROCESSES ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),2)
# Two files at a time, in order: the long ones come first, and the tests of a file share the runs that it has started.
WORKERS ?= -n 2 --dist loadfile --no-loadscope-reorder
# Two tests at a time, for those that share nothing that is dear.
QUICK_WORKERS ?= -n 2 --dist worksteal
ARGS ?=
BIN := .venv/bin
PYTEST = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest

# The tests of `make test`, without those marked slow.
QUICK := tests/unit tests/parity tests/smoke
# The torch of each end of `make test-versions`: the lowest that pyproject.toml allows, since it is what it promises, and the
# newest. A registry may have either as a CUDA build only, some 6 GB with its libraries; where disk or time is short, name
# others: `make test-versions TORCH_LOWEST=2.13.0 TORCH_HIGHEST=2.13.0`. `make install` takes the one in constraints.txt.
TORCH_LOWEST ?= 2.11.0
TORCH_HIGHEST ?= 2.15.0

.PHONY: install train test quick test-all test-faults test-browser test-versions support lint docs clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

train: install
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --num_gpus $(PROCESSES) launchers/train.py --ds_config ds_configs/zero2.json $(ARGS)

# What to run before every commit: at most 5 minutes on two cores.
test: install
	$(MAKE) --no-print-directory --jobs=2 lint quick

quick: install
	$(PYTEST) $(QUICK_WORKERS) -m 'not slow and not faults' --hypothesis-profile quick $(QUICK) $(ARGS)

# Everything but the long faults.
test-all: install lint
	$(PYTEST) $(WORKERS) -m 'not faults' $(ARGS)

# Every fault under every engine, one after the other: long.
test-faults: install
	$(PYTEST) -m faults $(ARGS)

# A report in headless Chromium, of which Debian's packages are chromium and chromium-driver. Fails where there is none.
test-browser: install
	COLM_SCALE_TEST_BROWSER=required $(PYTEST) -m browser tests/browser $(ARGS)

# Unit, parity and distributed tests with the lowest and the highest versions allowed, in environments of their own.
test-versions: .venv-lowest/installed .venv-highest/installed
	for end in lowest highest; do \
		PATH="$(CURDIR)/.venv-$$end/bin:$$PATH" python -m pytest $(WORKERS) tests/unit tests/parity tests/distributed $(ARGS) || exit; \
	done

.venv-lowest/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet --constraint constraints-lowest.txt torch==$(TORCH_LOWEST) setuptools wheel packaging
	.venv-lowest/bin/pip install --quiet --constraint constraints-lowest.txt --no-build-isolation --editable '.[dev]'
	touch $@

# Whatever is newest today.
.venv-highest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-highest
	.venv-highest/bin/pip install --quiet torch==$(TORCH_HIGHEST) setuptools wheel packaging
	.venv-highest/bin/pip install --quiet --upgrade --no-build-isolation --editable '.[dev]'
	touch $@

# The cells of docs/support.md that have no row, and the page; all of them, some 40 minutes, if versions have changed.
# `make support ARGS='llama phi'` runs these families again.
support: install
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=.:tests $(BIN)/python -m support.matrix $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

# Of the docstrings, into build/docs.
docs: install
	PYTHONPATH=. $(BIN)/pdoc --docformat google --output-directory build/docs colm_scale

clean:
	rm -rf .venv .venv-lowest .venv-highest build dist *.egg-info
