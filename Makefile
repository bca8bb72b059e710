# Every target sets up what it needs: a virtual environment in .venv with the package and its test tools.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
LINT = $(VENV)/.lint

.PHONY: setup demo test test-slow test-floor style check dubai clean

setup: $(READY)
$(READY): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $(READY)

# The style needs ruff alone, seconds instead of the gigabytes of torch.
$(LINT): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'ruff>=0.15'
	touch $(LINT)

demo: $(READY)  ## teacher, student alone, distilled student on generated scenes; table, pictures and card in demo/
	$(BIN)/python scripts/demo.py --output demo

test: $(READY)  ## the whole offline suite
	$(BIN)/python -m pytest

test-slow: $(READY)  ## also the tests that take minutes
	$(BIN)/python -m pytest -m "slow or not slow"

test-floor:  ## the suite on the oldest supported versions
	$(PYTHON) -m venv $(VENV)-floor
	$(VENV)-floor/bin/python -m pip install --quiet --disable-pip-version-check --constraint tests/floor.txt --editable '.[test]'
	$(VENV)-floor/bin/python -m pytest

dubai: $(READY)  ## the comparison on aerial_dubai (needs ../shared/data, hours on CPU)
	$(BIN)/python benchmarks/dubai.py

style: $(LINT)  ## format and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: $(LINT)  ## what CI demands of the style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(VENV)-floor demo
