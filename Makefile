# Every target needs Python 3.11 or newer and make; each creates .venv itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A fixed torch: what the tests were run with, and no newer download behind the reader's back.
TORCH ?= torch==2.13.0
# How many processes run the tests; each takes about a gigabyte and a half of memory.
WORKERS ?= auto
# A sample of N mutations; PART is a folder or module of gradscope/, or several.
N ?= 30
SEED ?= 1
PART ?=

.PHONY: demo test mutants check bench fixtures docs format clean

demo: $(VENV)/.demo
	$(BIN)/python fixtures/make.py demo
	@echo; echo '$$ gradscope weights fixtures/fetched/mobilenet_v2.pth'
	$(BIN)/gradscope weights fixtures/fetched/mobilenet_v2.pth
	@echo; echo '$$ gradscope weights fixtures/fetched/damaged.safetensors    # the digits model, spoiled'
	$(BIN)/gradscope weights fixtures/fetched/damaged.safetensors --fail-on never
	@echo; echo '$$ gradscope flow fixtures/sigmoid    # twelve sigmoid layers, as recorded in training'
	$(BIN)/gradscope flow fixtures/sigmoid --fail-on never
	@echo; echo '$$ gradscope explain fixtures/fetched/mobilenet_v2.pth fixtures/fetched/pictures/chelsea.png …'
	$(BIN)/gradscope explain fixtures/fetched/mobilenet_v2.pth fixtures/fetched/pictures/chelsea.png \
	  --arch fixtures/architectures.py:mobilenet_v2 --preprocess imagenet --output demo-output \
	  --method gradcam,layercam,integrated-gradients,smoothgrad,occlusion,guided-backprop \
	  --fail-on never
	@echo 'The pictures are in demo-output; chelsea.285.sheet.png has them side by side.'

test: $(VENV)/.test
	$(BIN)/python fixtures/make.py corpus
	$(BIN)/python fixtures/make.py holdout
	$(BIN)/python fixtures/make.py pictures
	$(BIN)/python fixtures/make.py damaged
	$(BIN)/python fixtures/make.py histories
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

# Small mistakes made in a copy of the code, to see which of them no test notices.
mutants: $(VENV)/.test
	$(BIN)/python tests/mutants.py --number $(N) --seed $(SEED) $(PART)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

bench: $(VENV)/.test
	$(BIN)/python benchmarks/weights.py
	$(BIN)/python benchmarks/drift.py
	$(BIN)/python benchmarks/recorder.py
	$(BIN)/python benchmarks/flow.py
	$(BIN)/python benchmarks/explain.py
	$(BIN)/python benchmarks/spectra.py

fixtures: $(VENV)/.test
	$(BIN)/python fixtures/make.py all

# The pages of reference, from what the program registers; a test compares them.
docs: $(VENV)/.demo
	$(BIN)/python docs/reference.py

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Each stamp is newer than pyproject.toml once its extra is installed.
$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet '$(TORCH)' --editable .
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet '$(TORCH)' --editable '.[test]'
	touch $@ $(VENV)/.demo

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet '$(TORCH)' --editable '.[dev]'
	touch $@ $(VENV)/.demo $(VENV)/.test

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("gradscope needs Python 3.11 or newer (make PYTHON=…)" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
