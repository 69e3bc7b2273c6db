PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The versions that the tests passed with; `make CONSTRAINTS=` takes the newest that pyproject.toml allows.
CONSTRAINTS := constraints.txt
# The newest Python here, for `make nightly`.
NEWEST = $(firstword $(shell command -v python3.14 python3.13 python3.12 python3.11))

# Image sets: from data/ if it is there, else downloaded into the cache.
DATA := $(if $(wildcard data),--data-dir data)
BENCHMARKS := accuracy policies spread auto off-map two-losses few-workers members

# What README's first table shows, a file each: one that is there is kept, whatever it depends on.
BUNDLES := mnist fashion cifar10
BUNDLE_FILES := $(BUNDLES:%=docs/results/%.json)

.PHONY: help setup demo test pytest lint nightly nightly-tests nightly-newest constraints docs triton mlserver llama servers format release wheel clean bench bench-quick
.PHONY: bench-bundles bench-page $(BENCHMARKS:%=bench-%) $(BENCHMARKS:%=quick-%)

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/.installed-dev  ## create .venv with everything a developer needs

demo: $(VENV)/.installed  ## recover predictions of the shipped images
	$(BIN)/codedinvnet demo

test: lint pytest  ## every check: lint, types, tests

# Several files at once, each on one thread: threads of two tests would wait for each other. Three, since a third
# of the time is spent waiting for what runs elsewhere. In their order: otherwise the files with few and long tests
# come last, and one process does them alone. Bytecode is written whatever the environment says: hundreds of
# processes import PyTorch, and each would compile it anew.
pytest: $(VENV)/.installed-dev  ## the tests alone
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev  ## style and types, changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Every command that rows in docs/results are made by runs here in short, or with small settings in `make test`.
# What fails does not keep the rest from running.
nightly:  ## what takes longer than `make test`: harm from outside, mutants, every order of events, the newest Python and packages, and every benchmark in short
	@$(MAKE) --no-print-directory -j1 -k nightly-tests nightly-newest bench-quick

nightly-tests: $(VENV)/.installed-dev
	$(BIN)/pytest -m nightly -s

# Other people's releases show here first, and not in a change that has nothing to do with them.
nightly-newest:
	rm -rf .venv-newest
	$(MAKE) VENV=.venv-newest PYTHON=$(NEWEST) CONSTRAINTS= test

constraints:  ## write constraints.txt anew from the newest packages; run `make test` before you commit it
	rm -rf .venv-constraints
	$(MAKE) VENV=.venv-constraints CONSTRAINTS= setup
	{ sed '/^#/!d' constraints.txt; .venv-constraints/bin/pip freeze --exclude-editable | grep -v '^torch\(vision\)\?=='; } > constraints.new
	mv constraints.new constraints.txt
	rm -rf .venv-constraints

docs: $(VENV)/.installed-dev  ## build the documents' site into site/, and check its links
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs site

triton: $(VENV)/.installed  ## install Triton into .triton/, for the tests that run it (no GPU)
	PYTHON=$(BIN)/python tests/get_triton.sh

servers:  ## install LitServe and `transformers serve` into .servers/, for the nightly tests that run them
	PYTHON="$(PYTHON)" tests/get_servers.sh servers

llama:  ## compile llama.cpp's server into .llama/, for the nightly tests that run it
	PYTHON="$(PYTHON)" tests/get_servers.sh llama

mlserver:  ## install MLServer and KServe's client into .mlserver/, for the tests that run them
	PYTHON="$(PYTHON)" tests/get_servers.sh mlserver

format: $(VENV)/.installed-dev  ## repair the style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# A benchmark that fails does not keep the others from running (-k); they run one after another.
# The quick version starts from nothing: rows that were kept would check nothing.
bench-quick: $(VENV)/.installed-bench  ## every benchmark in short and anew, into results/quick
	rm -rf results/quick runs/quick
	@$(MAKE) --no-print-directory -j1 -k $(BENCHMARKS:%=quick-%)

bench: $(VENV)/.installed-bench  ## every benchmark in full, into docs/results: many hours; goes on where it stopped
	@$(MAKE) --no-print-directory -j1 -k $(BENCHMARKS:%=bench-%) bench-page

bench-bundles: $(VENV)/.installed  ## the bundles' accuracy and costs where they are missing: half an hour
	@$(MAKE) --no-print-directory -j1 -k $(BUNDLE_FILES)

# Each may be asked for by itself, in full or in short. What is there is kept, however old (|).
bench-%: TO := docs/results
quick-%: TO := results/quick
quick-%: QUICK := --quick
quick-%: SAVE := --save-dir runs/quick
RUN_accuracy = codedinvnet bench accuracy $(QUICK) $(DATA) $(SAVE) --out $(TO)/accuracy.jsonl
RUN_policies = python -m benchmarks sweep configs/bench/simulate-policies.json $(QUICK) --out $(TO)/policies.jsonl
RUN_spread = python -m benchmarks sweep configs/bench/simulate-spread.json $(QUICK) --out $(TO)/spread.jsonl
RUN_auto = python -m benchmarks sweep configs/bench/simulate-auto.json $(QUICK) --out $(TO)/auto.jsonl
RUN_off-map = python -m benchmarks sweep configs/bench/simulate-off-map.json $(QUICK) --out $(TO)/off-map.jsonl
RUN_two-losses = python -m benchmarks sweep configs/bench/simulate-two-losses.json $(QUICK) --out $(TO)/two-losses.jsonl
RUN_members = python -m benchmarks sweep configs/bench/simulate-members.json $(QUICK) --out $(TO)/members.jsonl
RUN_few-workers = python -m benchmarks sweep configs/bench/simulate-few-workers.json $(QUICK) --out $(TO)/few-workers.jsonl

define benchmark
bench-$(1) quick-$(1): | $(VENV)/.installed-bench
	$(BIN)/$$(RUN_$(1))
endef
$(foreach name,$(BENCHMARKS),$(eval $(call benchmark,$(name))))

bench-page: | $(VENV)/.installed
$(BUNDLE_FILES): | $(VENV)/.installed

$(BUNDLE_FILES): docs/results/%.json:
	$(BIN)/python -m benchmarks figures --measure $(DATA) $*

bench-page:
	$(BIN)/python -m benchmarks figures

# The tests, the site, then the distributions, built and installed into empty environments.
release: test docs  ## everything that a release needs, checked, but the upload; tags the commit
	$(BIN)/python tools/release.py

wheel: $(VENV)/.installed-dev  ## build and check dist/*, of whatever is here
	$(BIN)/python tools/release.py --draft

clean:  ## delete caches and build products; keeps .venv, data and runs
	rm -rf build dist site src/*.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src benchmarks examples tests tools -name __pycache__ -prune -exec rm -rf {} +

# The virtual environment in steps: what the demo needs, with what benchmarks need beside it, or with
# the developer's tools.
INSTALL = $(BIN)/python -m pip install $(CONSTRAINTS:%=-c %)
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e bundles -e ".[models]"
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(INSTALL) -e bundles -e ".[benchmarks]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -e bundles -e ".[dev]"
	@touch $@
