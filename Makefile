# make demo | test | test-all | lint | gpu. PYTHON=python3.12 chooses the interpreter that .venv is made with.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
# The output of pip is kept in a log, which is shown if pip fails.
install = @echo "installing $< into .venv"; \
	$(BIN)/python -m pip install --quiet $(1) -r $< > $(@:.done=.log) 2>&1 || { cat $(@:.done=.log); exit 1; }; \
	touch $@

.PHONY: demo test test-all lint gpu
demo: .venv/demo.done
	$(BIN)/python -m demo.digits

test: .venv/dev.done .venv/demo.done
	$(PYTEST) -m "not slow"

test-all: .venv/dev.done .venv/demo.done
	FUZZ=40 $(PYTEST)

gpu: .venv/dev.done .venv/demo.done
	$(BIN)/python -m benchmarks.gpu

lint: .venv/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pylint --recursive=y .

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/run.done: requirements.txt | $(BIN)/python
	$(call install)

.venv/dev.done: requirements-dev.txt .venv/run.done
	$(call install)

.venv/demo.done: requirements-demo.txt .venv/run.done
	$(call install,--no-deps)
