# `make quickstart` and `make test` are all a newcomer needs; both make .venv and install into it first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart does-masking-pay expected test lint docs gpu clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "msmdiff needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[test,docs]'
	touch $@

quickstart: install
	$(BIN)/msmdiff quickstart

# All of docs/does-masking-pay.md: some 36 hours on two CPU cores; after a kill it goes on. The emoji are for a GPU.
SPECS ?= $(wildcard docs/does-masking-pay/mnist-*.yaml)

does-masking-pay: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[mnist]'
	$(BIN)/msmdiff compare $(SPECS) --out runs/does-masking-pay
	for spec in $(basename $(notdir $(SPECS))); do \
	  cp runs/does-masking-pay/$$spec/compare.json docs/does-masking-pay/$$spec.json; done
	$(BIN)/msmdiff compare docs/does-masking-pay/*.json --out docs/does-masking-pay

# The curves that `msmdiff report` draws behind runs with the settings of these presets: half an hour on two quiet cores.
FAMILIES ?= uvit dit mdt mdtv2 edt maskdwt flow tread pretrain

expected: .venv/installed
	for name in $(FAMILIES); do \
	  verb=train; [ $$name != pretrain ] || verb=pretrain; \
	  $(BIN)/msmdiff $$verb --config digits-$$name --data digits:train --run runs/expected/digits-$$name \
	    --set eval.every=400 --set eval.n=250 --set eval.features=pixel --set eval.heldout_every=200 \
	    --set train.preview_every=0 --set train.log_every=20 && \
	  $(BIN)/msmdiff report runs/expected/digits-$$name --store configs/expected/digits-$$name.json || exit; done

lint: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint docker/*; fi

# The site, in site/. A link that leads nowhere is an error.
docs: .venv/tested
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: lint docs
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

# What needs a CUDA device: its tests, then the papers' networks timed into the page.
gpu: .venv/tested
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 8 -m gpu tests/gpu
	$(BIN)/msmdiff bench tables --into docs/benchmarks.md

clean:
	rm -rf .venv build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
