# The commands typed most. All run in .venv, which the first of them makes from requirements.txt.
#   PYTHON=python3.12   another interpreter to make .venv with (3.11 or newer)

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed
RUFF   := 0.17.5

.PHONY: help demo test lint

help:
	@echo "make demo             all four stages on the embedded signs, then the report (runs/signs-tiny)"
	@echo "make demo STEPS=50    a short run of 50 steps a stage, in a folder of its own"
	@echo "make test             the tests; ARGS='-m slow', ARGS=tests/test_masks.py, ..."
	@echo "make lint             ruff $(RUFF)"
	@echo "Each installs what it needs into $(VENV) first. Without make: see README.md."

demo: $(STAMP)
ifdef STEPS
	@echo "A short run of $(STEPS) steps a stage: not the run whose figures the README reports."
	$(BIN)/python train.py --steps $(STEPS) --out runs/signs-tiny-$(STEPS)steps $(ARGS)
else
	$(BIN)/python train.py $(ARGS)
endif

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

lint: | $(BIN)/python
	$(BIN)/python -m pip install --quiet ruff==$(RUFF)
	$(BIN)/ruff check .

$(STAMP): requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

# A half-made environment (Debian without python3-venv) is removed, so that the next try is a whole one.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
