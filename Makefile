# Everything works on a machine with Python 3.11+ alone: the environment is made on first use and kept in .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint bench bench-check bench-gpu clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv, once: pip downloads about 5.5 GB of packages, which takes a while"
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]" -c constraints.txt
	touch $(STAMP)

# Smaller for its test: make demo DEMO=/tmp/d DEMO_TRAIN=300 DEMO_TEST=100 DEMO_MORE="--trainer.max_steps 3 ..."
# DEMO_MORE is for all three objectives; DEMO_MAE, DEMO_DINO and DEMO_CLIP are for one.
DEMO ?= demo
DEMO_TRAIN ?= 10000
DEMO_TEST ?= 2000
DEMO_MAE ?= $(DEMO_MORE)
DEMO_DINO ?= $(DEMO_MORE)
DEMO_CLIP ?= $(DEMO_MORE)
# smooth backgrounds: patterns are an easier invariant than shapes, and DINO has minutes
DRAWN := --only background=gradient
TRAIN_AND_TEST := --train $(DEMO)/train --test $(DEMO)/test
demo: $(STAMP)
	$(BIN)/trivit shards synth $(DEMO)/train --samples $(DEMO_TRAIN) --split train $(DRAWN)
	$(BIN)/trivit shards synth $(DEMO)/test --samples $(DEMO_TEST) --seed 1 --split test $(DRAWN)
	$(BIN)/trivit shards synth $(DEMO)/unseen --samples $(DEMO_TEST) --seed 1 --split test_unseen $(DRAWN)
	$(BIN)/trivit pretrain --config mae_demo --data.train $(DEMO)/train --output $(DEMO)/mae $(DEMO_MAE)
	$(BIN)/trivit evaluate $(DEMO)/mae $(TRAIN_AND_TEST)
	$(BIN)/trivit pretrain --config dino_demo --data.train $(DEMO)/train --output $(DEMO)/dino $(DEMO_DINO)
	$(BIN)/trivit evaluate $(DEMO)/dino $(TRAIN_AND_TEST) --probes knn,linear,attributes
	$(BIN)/trivit pretrain --config clip_demo --data.train $(DEMO)/train --output $(DEMO)/clip $(DEMO_CLIP)
	$(BIN)/trivit evaluate $(DEMO)/clip $(TRAIN_AND_TEST)
	printf 'a {}\na picture of a {}\n' > $(DEMO)/prompts.txt
	$(BIN)/trivit evaluate $(DEMO)/clip --test $(DEMO)/unseen --probes zeroshot,retrieval \
	  --class-fields colour,shape --templates $(DEMO)/prompts.txt
	$(BIN)/trivit report $(DEMO)/mae $(DEMO)/dino $(DEMO)/clip --output $(DEMO)/report.html

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=15

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python -m benchmarks

bench-check: $(STAMP)
	$(BIN)/python -m benchmarks.check benchmarks/latest.json benchmarks/committed.json

OBJECTIVE ?= mae
bench-gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu --objective $(OBJECTIVE)

clean:
	rm -rf .venv demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
