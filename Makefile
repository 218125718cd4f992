# make merge  merge the workload of merge_workloads.py (the first time it installs, draws and trains the embedded default)
#             for two minutes after preparing; the next time it resumes there
# make merge ARGS="--workload mine.py --datasets DIR"   with other arguments; ARGS= without a limit of time
# make test   the tests; make check: format, lint, types

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
merge: ARGS ?= --time-budget 2m

.PHONY: merge test check clean

merge: $(VENV)/installed
	$(BIN)/python merge_workloads.py $(ARGS)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build *.egg-info
