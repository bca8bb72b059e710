# Every target sets up what it needs: a virtual environment in .venv with the package and its test tools.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
# Files of tests are shared by as many processes as there are cores, four at most (each needs about 2 GB).
PYTEST = -m pytest -n logical --maxprocesses 4 --dist loadfile
LINT = $(VENV)/.lint
DOCS = $(VENV)/.docs

.PHONY: setup demo test test-slow test-floor style check dubai cards compare tables docs clean

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
	$(BIN)/python $(PYTEST)

test-slow: $(READY)  ## also the tests that take minutes
	$(BIN)/python $(PYTEST) -m "slow or not slow"

test-floor:  ## the suite on the oldest supported versions
	$(PYTHON) -m venv $(VENV)-floor
	$(VENV)-floor/bin/python -m pip install --quiet --disable-pip-version-check --constraint tests/floor.txt --editable '.[test]'
	$(VENV)-floor/bin/python $(PYTEST)

dubai: $(READY)  ## the comparison on aerial_dubai (needs ../shared/data, hours on CPU)
	$(BIN)/python benchmarks/dubai.py

tables: $(READY)  ## the numbers of README.md and docs/, and the comparison's tables and plots, from benchmarks/results/
	$(BIN)/python benchmarks/tables.py

# The site needs the packages of the extra alone: the sources are read, not imported.
$(DOCS): setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(PYTHON) -c "import configparser as c; f = c.ConfigParser(); f.read('setup.cfg'); print(f['options.extras_require']['docs'])" > $(VENV)/docs.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement $(VENV)/docs.txt
	touch $(DOCS)

docs: $(DOCS)  ## the documentation as a site in site/; a broken link is an error (an outdated number fails make test)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

STUDY ?= benchmarks/study/dubai.yaml
compare: $(READY)  ## DRD among all other methods: STUDY=FILE; days on CPU, start it again to go on
	$(BIN)/python benchmarks/compare.py $(STUDY)

cards: $(READY)  ## the cards of model_cards/ from the runs of make demo and make dubai
	$(BIN)/python scripts/make_card.py --run demo/student --output model_cards/scenes_upernet-mini_from_upernet-small \
		--name scenes_upernet-mini_from_upernet-small
	$(BIN)/python scripts/make_card.py --run runs/dubai/default_steps600_seed0 --dataset data/dubai \
		--teacher runs/dubai/upernet-lite2 --student_alone runs/dubai/none_steps600_seed0 \
		--output model_cards/dubai_segformer-b0-half_from_upernet-lite2 --name dubai_segformer-b0-half_from_upernet-lite2

style: $(LINT)  ## format and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: $(LINT)  ## what CI demands of the style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(VENV)-floor demo site
