# make train   set up .venv, then train the debug model on the text of Python's standard library
# make test    set up .venv, then ruff, pyrefly and the tests, but for
# make test-distributed   those of tests/distributed: runs on several gloo ranks against one process
# make test-faults        runs that are killed at random, against undisturbed ones (KILLS=200: adds to tests/kills.jsonl)
# make check   ruff and pyrefly alone          make format   let ruff rewrite
# make smoke   what a CI runs on one GPU (or CPU): both debug jobs, eager and compiled
SHELL := bash
VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= python3
RUN ?= outputs/debug
PYTEST_WORKERS ?= 2
export OMP_NUM_THREADS ?= 1

.PHONY: setup train test test-distributed test-faults check format smoke
.DELETE_ON_ERROR:

setup: $(VENV)/.installed

# Installed again only when what is installed changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PY) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

train: setup
	@if [ -e $(RUN) ]; then mv -v $(RUN) $(RUN)-$$(date +%Y%m%d-%H%M%S); fi
	CONFIG_FILE=train_configs/debug.toml ./run_train.sh --job.dump_folder $(RUN)
	@$(VENV)/bin/nitp-titan plot $(RUN) --out $(RUN)/curves.png > /dev/null
	@echo "Run folder $(RUN): $$(cd $(RUN) && echo config.toml metrics.jsonl tb checkpoint/* curves.png)"

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyrefly check --summarize-errors

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

test: check
	$(PY) -m pytest -n $(PYTEST_WORKERS) --dist worksteal --ignore tests/distributed

test-distributed: setup
	$(PY) -m pytest -n $(PYTEST_WORKERS) --dist worksteal tests/distributed

test-faults: setup
	$(PY) -m tests.kills $(if $(KILLS),--kills $(KILLS) --rows tests/kills.jsonl)

smoke: setup
	$(PY) -m tests.smoke
