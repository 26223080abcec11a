# The most common commands. They run in .venv, which is made from requirements.txt when it is missing.
#   PYTHON=python3.12   makes .venv with another interpreter (3.11 or newer)

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed
RUFF   := 0.17.5
BUILD  := jupytext==1.19.6 nbclient==0.11.0 ipykernel==7.4.0 matplotlib-inline==0.2.2
DIR    := slides

.PHONY: help demo test lint notebooks figures

help:
	@echo "make demo             all four stages on drawn signs, then the report (runs/signs-tiny)"
	@echo "make demo STEPS=50    a short run of 50 steps per stage (runs/signs-tiny-50steps)"
	@echo "make test             the tests; ARGS='-m slow', ARGS=tests/test_masks.py, ..."
	@echo "make lint             ruff $(RUFF)"
	@echo "make notebooks        notebooks/*.ipynb from their sources, run (ARGS='2 5': only these)"
	@echo "make figures DIR=slides   every figure of the notebooks at 200 dpi, with captions"
	@echo "Each installs what it needs into $(VENV) first. Without make: see README.md."

demo: $(STAMP)
ifdef STEPS
	@echo "A short run of $(STEPS) steps per stage. The figures in the README are from the full run."
	$(BIN)/python train.py --steps $(STEPS) --out runs/signs-tiny-$(STEPS)steps $(ARGS)
else
	$(BIN)/python train.py $(ARGS)
endif

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

lint: | $(BIN)/python
	$(BIN)/python -m pip install --quiet ruff==$(RUFF)
	$(BIN)/ruff check .

notebooks: $(STAMP)
	$(BIN)/python -m pip install --quiet $(BUILD)
	$(BIN)/python notebooks/build.py $(ARGS)

figures: $(STAMP)
	$(BIN)/python -m pip install --quiet $(BUILD)
	$(BIN)/python notebooks/build.py --figures $(abspath $(DIR)) $(ARGS)

$(STAMP): requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

# An incomplete environment (Debian without python3-venv) is removed, so that the next call makes it again.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
