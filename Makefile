# Everything works on a machine with Python 3.11+ alone: the environment is made on first use and kept in .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint bench clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/trivit shards synth demo/train --samples 20000
	$(BIN)/trivit shards synth demo/test --samples 2000 --seed 1
	$(BIN)/trivit pretrain --config mae_demo --data.train demo/train --output demo/mae
	$(BIN)/trivit evaluate demo/mae --train demo/train --test demo/test
	$(BIN)/trivit report demo/mae

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
