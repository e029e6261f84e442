PYTHON ?= python3
RUN_ID := $(or $(RUN_ID),demo_$(shell date +%Y%m%d_%H%M%S))
TRAIN_SHARDS ?= 80
BENCH_PRESET ?= demo
JOBS ?= 2
ARTIFACT ?= logs/demo/final_model.ptz
GPU_NAME ?= $(shell date +%Y%m%d)
BIN = .venv/bin
QUICK = tests/test_structure.py tests/test_packing.py tests/test_settings.py tests/test_matrix.py

.PHONY: help demo demo-data fineweb ladder check test soak bench gpu clean

help:  ## Show this list.
	@echo 'make PYTHON=python3.12 TARGET takes another Python (3.11 or newer) for .venv, which is made when it is needed.'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: demo-data  ## Train a small model on a CPU, export it, run all evaluators, draw the figure: about three minutes. SEED=42 for another seed.
	PRESET=demo RUN_ID=$(RUN_ID) $(BIN)/torchrun --standalone --nproc_per_node=1 train_gpt.py
	$(BIN)/python -m tools.report logs/$(RUN_ID) --scale --plot logs/$(RUN_ID)/figure
	@echo
	@echo 'This run:'
	@echo '  logs/$(RUN_ID).txt           all it said, after its source and settings'
	@echo '  logs/$(RUN_ID)/figure.png    training, score along the text, what each stage changes'
	@echo '  logs/$(RUN_ID)/              final_model.ptz (the artifact), train_gpt.py (packed), checkpoints, metrics.jsonl'
	@echo 'Next, perhaps:'
	@echo '  How much of what SLOT gains is leak?'
	@echo '    PRESET=demo $(BIN)/python -m tools.ablate --artifact logs/$(RUN_ID)/final_model.ptz --run-id $(RUN_ID)_slot sliding_window slot "slot SLOT_LOSS=past"'
	@echo '  Is each evaluator what it says?'
	@echo '    PRESET=demo $(BIN)/python -m tools.audit --artifact logs/$(RUN_ID)/final_model.ptz --targets 512 --sums 0 EVALS=sliding_window,slot'
	@echo '  Another seed, and both in one table:'
	@echo '    make demo SEED=42 RUN_ID=$(RUN_ID)_seed42 && $(BIN)/python -m tools.report logs/$(RUN_ID) logs/$(RUN_ID)_seed42'

demo-data: .venv/installed  ## Make the demo's data from Python's own standard library; no network.
	$(BIN)/python data/prepare.py demo

fineweb: .venv/installed  ## Fetch the record's data; TRAIN_SHARDS=1 for less than all 80 shards.
	$(BIN)/python data/prepare.py fineweb --train-shards $(TRAIN_SHARDS)

TUNE = $$(find .venv/lib -path '*/numpy/*.py' -not -path '*tests*' -size +6 -size -36 | sort)
ladder: demo-data  ## What adapting while scoring gains on a demo run's ARTIFACT, and its seconds; rates chosen on numpy's source: ten minutes.
	$(BIN)/python data/prepare.py text $(TUNE) --name tune --tokenizer data/tokenizers/demo_1024_bpe.model --val-fraction 0.9
	PRESET=demo TTT_CHUNK_TOKENS=2048 $(BIN)/python -m tools.ladder --artifact $(ARTIFACT) --tune data/datasets/tune --run-id ladder/$(RUN_ID)

check: .venv/installed  ## Format, lint, types and the quick tests, in under a minute.
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m "not slow" -k "not changes_the_figures" $(QUICK)

test: .venv/installed  ## Run all tests, JOBS=2 at a time; then those that compare times, alone.
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not alone"
	$(BIN)/python -m pytest -q -m alone

soak: .venv/installed  ## Kill runs 200 times at random moments and compare with runs that nobody disturbed.
	PYTHONPATH=. $(BIN)/python tests/soak.py --kills 200

bench: demo-data  ## Time the script beside plain PyTorch and write docs/benchmarks.md: about fifteen minutes. BENCH_PRESET=pr1084 on a GPU.
	PRESET=$(BENCH_PRESET) $(BIN)/python -m tools.bench
	$(BIN)/python -m tools.bench --render

gpu: .venv/installed  ## Measure all that there is to measure on one GPU, on what DATA_PATH holds: 25 minutes at most. Begun again, it goes on.
	$(BIN)/python -m tools.gpu --name $(GPU_NAME)
	$(BIN)/python -m tools.bench --render

clean:  ## Remove .venv, caches and the demo's data; logs stay.
	rm -rf .venv .pytest_cache .hypothesis .mypy_cache .ruff_cache data/datasets/demo_sp1024 data/tokenizers/demo_1024_bpe.model
