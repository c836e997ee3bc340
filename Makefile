# make demo   environment, quickstart training, report         make test   the whole suite
# make lint   ruff and mypy                                     make clean  remove what the others made

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test lint clean

# The environment. A range that admits a newer torch would pull gigabytes of CUDA packages on a machine
# without a GPU; pyproject.toml bounds it.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)

# Again after an interruption it goes on where it stood.
demo: $(READY) data/scenes/train/index.json
	$(BIN)/weft train quickstart
	$(BIN)/weft report runs/quickstart

data/scenes/train/index.json: | $(READY)
	$(BIN)/weft data synth data/scenes

test: $(READY)
	$(BIN)/python -m pytest -q

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build runs data *.egg-info
