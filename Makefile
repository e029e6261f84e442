# make demo: a small run on a CPU, all evaluators.  make check: format, lint, types, quick tests.  make test: all tests.
# make soak: 200 kills.  make bench: speed.  make fineweb: the record's data.
PYTHON ?= python3
RUN_ID ?= demo_$(shell date +%Y%m%d_%H%M%S)
TRAIN_SHARDS ?= 80
BENCH_PRESET ?= demo
BIN = .venv/bin

.PHONY: demo demo-data bench fineweb check test soak clean
QUICK = tests/test_structure.py tests/test_packing.py tests/test_settings.py tests/test_matrix.py

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

demo-data: .venv/installed
	$(BIN)/python data/prepare.py demo

demo: demo-data
	PRESET=demo RUN_ID=$(RUN_ID) $(BIN)/torchrun --standalone --nproc_per_node=1 train_gpt.py
	$(BIN)/python -m tools.report logs/$(RUN_ID) --scale

bench: demo-data
	PRESET=$(BENCH_PRESET) $(BIN)/python -m tools.bench
	$(BIN)/python -m tools.bench --render

fineweb: .venv/installed
	$(BIN)/python data/prepare.py fineweb --train-shards $(TRAIN_SHARDS)

check: .venv/installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m "not slow" -k "not changes_the_figures" $(QUICK)

test: .venv/installed
	$(BIN)/python -m pytest -q

soak: .venv/installed
	PYTHONPATH=. $(BIN)/python tests/soak.py --kills 200

clean:
	rm -rf .venv .pytest_cache .hypothesis data/datasets/demo_sp1024 data/tokenizers/demo_1024_bpe.model
