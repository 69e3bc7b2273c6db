PYTHON ?= python3
BIN := .venv/bin

# Image sets: from data/ if it is there, else downloaded into the cache.
DATA := $(if $(wildcard data),--data-dir data)
BENCHMARKS := accuracy latency serve inverse embed train engine ablation map
# Behind `latency`, whose rows it repeats.
BENCHMARKS += validation

# What README's first table shows, a file each: one that is there is kept, whatever it depends on.
BUNDLES := mnist fashion cifar10
SEED := 2
BUNDLE_FILES := $(BUNDLES:%=docs/results/%.json)
PIXEL_FILES := $(foreach k,2 4 10,$(BUNDLES:%=docs/results/pixels-%-k$(k).json))
SEED_FILES := $(BUNDLES:%=docs/results/seed-%.json)

.PHONY: help setup demo test pytest lint nightly triton mlserver format wheel clean bench bench-quick
.PHONY: bench-bundles bench-pixels bench-seeds bench-page quick-page $(BENCHMARKS:%=bench-%) $(BENCHMARKS:%=quick-%)

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

setup: .venv/.installed-dev  ## create .venv with everything a developer needs

demo: .venv/.installed  ## run the demonstration (writes demo-out/)
	$(BIN)/codedinvnet demo

test: lint pytest  ## every check: lint, types, tests

# Several files at once, each on one thread: threads of two tests would wait for each other. Three, since a third
# of the time is spent waiting for what runs elsewhere. In their order: otherwise the files with few and long tests
# come last, and one process does them alone.
pytest: .venv/.installed-dev  ## the tests alone
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: .venv/.installed-dev  ## style and types, changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

nightly: .venv/.installed  ## what takes longer than `make test`: a service is harmed and overloaded from outside
	$(BIN)/python -m benchmarks outside

triton: .venv/.installed  ## install Triton into .triton/, for the tests that run it (no GPU)
	PYTHON=$(BIN)/python tools/get_triton.sh

mlserver: .venv/.installed  ## install MLServer and KServe's client into .mlserver/, for the tests that run them
	PYTHON=$(BIN)/python tools/get_mlserver.sh

format: .venv/.installed-dev  ## repair the style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# A benchmark that fails does not keep the others from running (-k); they run one after another.
# The quick version starts from nothing: rows that were kept would check nothing.
bench-quick: .venv/.installed-bench  ## every benchmark in short and anew, into results/quick
	rm -rf results/quick runs/quick
	@$(MAKE) --no-print-directory -j1 -k $(BENCHMARKS:%=quick-%) quick-page

bench: .venv/.installed-bench  ## every benchmark in full, into docs/results: many hours; goes on where it stopped
	@$(MAKE) --no-print-directory -j1 -k $(BENCHMARKS:%=bench-%) bench-page

bench-bundles: .venv/.installed  ## the bundles' accuracy and costs where they are missing: half an hour
	@$(MAKE) --no-print-directory -j1 -k $(BUNDLE_FILES)

bench-pixels: .venv/.installed  ## train the bundles by the paper's objective: many hours; goes on where it stopped
	@$(MAKE) --no-print-directory -j1 -k $(PIXEL_FILES) bench-page

bench-seeds: .venv/.installed  ## train the bundles from another seed: many hours; goes on where it stopped
	@$(MAKE) --no-print-directory -j1 -k $(SEED_FILES) bench-page

# Each may be asked for by itself. What is there is kept, however old (|).
$(BENCHMARKS:%=bench-%) $(BENCHMARKS:%=quick-%): | .venv/.installed-bench
bench-page quick-page: | .venv/.installed
$(BUNDLE_FILES) $(PIXEL_FILES) $(SEED_FILES): | .venv/.installed

$(BUNDLE_FILES): docs/results/%.json:
	$(BIN)/python -m benchmarks.figures --measure $(DATA) $*

# A training that is cut off must not leave a file that would be kept.
define reproduce
	@mkdir -p runs
	$(BIN)/codedinvnet reproduce $(1) $(DATA) --json > runs/$(@F)
	mv runs/$(@F) $@
endef

$(PIXEL_FILES): docs/results/pixels-%.json:
	$(call reproduce,configs/$(firstword $(subst -k, ,$*))-pixels.json --k $(lastword $(subst -k, ,$*)))

$(SEED_FILES): docs/results/seed-%.json:
	$(call reproduce,configs/$*-recovery.json --seed $(SEED))

quick-accuracy:
	$(BIN)/codedinvnet bench accuracy configs/bench/accuracy.json --quick $(DATA) \
	  --out results/quick/accuracy.jsonl --save-dir runs/quick

quick-latency:
	$(BIN)/codedinvnet bench latency configs/bench/latency.json --quick $(DATA) \
	  --out results/quick/latency.jsonl --save-dir runs/quick

quick-serve:
	$(BIN)/python -m benchmarks serve mnist --quick --out results/quick/serve.json

quick-inverse quick-embed quick-train: quick-%:
	$(BIN)/python -m benchmarks $* mnist --quick --out results/quick/speed.json

quick-engine:
	$(BIN)/python -m benchmarks engine mnist --quick --out results/quick/engine-mnist.json

quick-ablation:
	$(BIN)/python -m benchmarks ablation configs/bench/ablation.json --quick $(DATA) \
	  --out results/quick/ablation.jsonl --save-dir runs/quick/ablation

quick-map:
	$(BIN)/codedinvnet simulate configs/bench/simulate-map-quick.json \
	  --out results/quick/map.jsonl --picture results/quick/map.png

quick-validation:
	$(BIN)/codedinvnet simulate configs/bench/simulate-measured.json --queries 3000 \
	  --measured results/quick/latency.jsonl --out results/quick/validation.json

quick-page:
	$(BIN)/python -m benchmarks.figures --page results/quick

bench-accuracy:
	$(BIN)/codedinvnet bench accuracy configs/bench/accuracy.json $(DATA) \
	  --out docs/results/accuracy.jsonl

bench-latency:
	$(BIN)/codedinvnet bench latency configs/bench/latency.json $(DATA) \
	  --out docs/results/latency.jsonl

bench-serve:
	$(BIN)/python -m benchmarks serve mnist $(DATA) --out docs/results/serve.json

bench-inverse bench-embed bench-train: bench-%:
	$(BIN)/python -m benchmarks $* mnist --out docs/results/speed.json

bench-engine:
	for name in $(BUNDLES); do \
	  $(BIN)/python -m benchmarks engine $$name --out docs/results/engine-$$name.json || exit 1; done

bench-ablation:
	$(BIN)/python -m benchmarks ablation configs/bench/ablation.json $(DATA) \
	  --out docs/results/ablation.jsonl

bench-map:
	$(BIN)/codedinvnet simulate configs/bench/simulate-map.json \
	  --out docs/results/map.jsonl --picture docs/results/map.png

bench-auto:
	for name in auto off-map; do $(BIN)/codedinvnet simulate configs/bench/simulate-$$name.json \
	  --out docs/results/$$name.jsonl || exit 1; done

bench-validation:
	$(BIN)/codedinvnet simulate configs/bench/simulate-measured.json \
	  --measured docs/results/latency.jsonl --out docs/results/validation.json

bench-page:
	$(BIN)/python -m benchmarks.figures

wheel: .venv/.installed-dev  ## build dist/*.whl
	$(BIN)/python -m build --wheel

clean:  ## delete caches and build products; keeps .venv, data and runs
	rm -rf build dist src/*.egg-info demo-out .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src benchmarks tests tools -name __pycache__ -prune -exec rm -rf {} +

# The virtual environment in steps: what the demo needs, with what benchmarks need beside it, or with
# the developer's tools.
.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: Python 3.10 or newer is needed; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e .
	@touch $@

.venv/.installed-bench: .venv/.installed
	$(BIN)/python -m pip install -e ".[onnx]"
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install -e ".[dev]"
	@touch $@
