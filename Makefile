# make demo: set up, then train a baseline and a regularized encoder on the embedded digits, attack and compare them,
# and write the model card.
# make zoo: train, attack and describe the encoders of recipes/zoo.yaml; goes on where it was stopped.
# make test: set up, then lint, the import contract and the test suite.
VENV := .venv
PYTHON := $(VENV)/bin/python
BASE_PYTHON ?= python3

.PHONY: demo zoo test lint coverage test-slow sweep bench docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/ready
	$(PYTHON) -m recipes.demo

# MNIST and CIFAR10: folders or Hub ids of these sets; without them the zoo is of the digits alone.
zoo: $(VENV)/ready
	$(PYTHON) -m recipes.zoo $(if $(MNIST),--data.mnist $(MNIST)) $(if $(CIFAR10),--data.cifar10 $(CIFAR10))

SUITE := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m "not slow" -n auto --dist loadscope --no-loadscope-reorder

test: lint
	$(SUITE) --durations=15

# The suite with the lines that it does not reach, whose tracing takes a third more processor time.
coverage: $(VENV)/ready
	$(SUITE) --cov --cov-report=term:skip-covered

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

test-slow: $(VENV)/ready
	$(PYTHON) -m pytest -m slow

sweep: $(VENV)/ready
	$(PYTHON) benchmarks/architectures.py

bench: $(VENV)/ready
	$(PYTHON) benchmarks/penalty_cost.py --all
	$(PYTHON) benchmarks/against.py
	$(PYTHON) benchmarks/growth.py
	$(PYTHON) benchmarks/optimizers.py
	$(PYTHON) benchmarks/recipe_cost.py
	$(PYTHON) benchmarks/tracking.py
	$(PYTHON) benchmarks/attack_cost.py
	$(PYTHON) benchmarks/coverage.py
	$(PYTHON) benchmarks/launches.py

# README.md and docs/ as a site in site/; stops at a link that leads nowhere.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

clean:
	rm -rf $(VENV)

# Installed again only when the dependencies change; a broken install leaves no mark, so the next run repeats it.
$(VENV)/ready: pyproject.toml
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet -e '.[dev]'
	touch $@

$(VENV)/docs: $(VENV)/ready
	$(PYTHON) -m pip install --quiet -e '.[docs]'
	touch $@
