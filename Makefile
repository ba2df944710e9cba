# make demo | test | lint. PYTHON=python3.12 chooses the interpreter that .venv is made with.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint
demo: .venv/demo.done
	$(BIN)/python -m demo.digits

test: .venv/dev.done .venv/demo.done
	$(BIN)/python -m pytest

lint: .venv/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pylint --recursive=y .

.venv/run.done: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev.done: requirements-dev.txt .venv/run.done
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

.venv/demo.done: requirements-demo.txt .venv/run.done
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-demo.txt
	touch $@
