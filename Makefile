# The interpreter and the torch build that the environment in .venv is made with.
PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test clean

demo: $(INSTALLED)
	$(BIN)/python -m benchmarks.demo

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# torchdyn depends on torchvision, whose published wheel needs a CUDA build of torch, and never imports it. So here it
# comes without its dependencies, and what it does import comes by name.
TORCHDYN := torchdyn==1.0.6
TORCHDYN_IMPORTS := attrs matplotlib pytorch-lightning scikit-learn scipy 'torchcde>=0.2.3,<0.3' torchsde

# torch goes first, so that one build of it is chosen here and the dependencies find it in place.
$(INSTALLED): pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,benchmarks,experiments,test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCHDYN_IMPORTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(TORCHDYN)
	touch $@
