# Everything works on a machine with Python 3.11+ alone: the environment is made on first use and kept in .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint bench clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv, once: pip downloads about 5.5 GB of packages, which takes a while"
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]" -c constraints.txt
	touch $(STAMP)

# Smaller for its test: make demo DEMO=/tmp/d DEMO_TRAIN=300 DEMO_TEST=100 DEMO_MORE="--trainer.max_steps 3 ..."
DEMO ?= demo
DEMO_TRAIN ?= 10000
DEMO_TEST ?= 2000
demo: $(STAMP)
	$(BIN)/trivit shards synth $(DEMO)/train --samples $(DEMO_TRAIN)
	$(BIN)/trivit shards synth $(DEMO)/test --samples $(DEMO_TEST) --seed 1
	$(BIN)/trivit pretrain --config mae_demo --data.train $(DEMO)/train --output $(DEMO)/mae $(DEMO_MORE)
	$(BIN)/trivit evaluate $(DEMO)/mae --train $(DEMO)/train --test $(DEMO)/test
	$(BIN)/trivit report $(DEMO)/mae

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=15

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
