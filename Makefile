# make demo   environment, quickstart training, report      make test      the suite
# make lint   ruff and mypy                                 make test-all  with the slow tests, as CI does
# make fuzz   2,000 random damages to all that a run reads  make clean  remove what the others made

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-all test-pretrain test-data test-kernels test-triton test-slow-pretrain test-slow-data fuzz lint clean

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

# Two at a time: most tests wait as much as they work. Output comes when a part has ended.
PARTS := $(MAKE) --jobs 2 --keep-going --output-sync=target
QUICK := test-pretrain test-data test-kernels test-triton

test: $(READY)
	$(PARTS) $(QUICK)

test-all: $(READY)
	$(PARTS) $(QUICK) test-slow-pretrain test-slow-data

# An hour or more; `--damages 1 --first-damage N` tries one of them once more.
fuzz: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/pretrain/fuzz --damages 2000 --fuzz-workers 2

$(QUICK) test-slow-pretrain test-slow-data: export OMP_NUM_THREADS = 1

test-pretrain: $(READY)
	$(BIN)/python -m pytest -q -m "not slow" tests/pretrain

test-data: $(READY)
	$(BIN)/python -m pytest -q -m "not slow" tests --ignore tests/kernels --ignore tests/pretrain

test-slow-pretrain: $(READY)
	$(BIN)/python -m pytest -q -m slow tests/pretrain

test-slow-data: $(READY)
	$(BIN)/python -m pytest -q -m slow tests --ignore tests/kernels --ignore tests/pretrain

test-kernels: $(READY)
	$(BIN)/python -m pytest -q tests/kernels --ignore tests/kernels/interpreter --ignore tests/kernels/ahead_of_time

# Triton is an interpreter or a compiler from its import on: a process for each. Kernels are compiled by two of its
# versions, since GPU builds of torch bring their own; the older one, a package without others, lies beside the environment's.
OLDER := 3.6.0
OLDER_TRITON := $(VENV)/triton-$(OLDER)

test-triton: $(READY) $(OLDER_TRITON)/.ready
	$(BIN)/python -m pytest -q tests/kernels/interpreter
	$(BIN)/python -m pytest -q tests/kernels/ahead_of_time
	! test -d $(OLDER_TRITON)/triton || PYTHONPATH=$(OLDER_TRITON) $(BIN)/python -m pytest -q tests/kernels/ahead_of_time

$(OLDER_TRITON)/.ready: | $(READY)
	mkdir -p $(OLDER_TRITON)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLDER_TRITON) triton==$(OLDER) && touch $@ \
		|| echo "triton $(OLDER) cannot be installed here: the tests that compile by it are skipped"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build runs data *.egg-info
