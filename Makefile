# make demo   raw text -> shards -> training (killed and resumed) -> Hugging Face folder -> fill-mask, in one command
# make test   what needs neither a GPU nor a cluster, without the tests marked matrix and slow
# make test-matrix   the same in the other combinations
# make test-newest   the same under the newest release of everything that is used, in .venv-newest (6 GB more)
# make test-cluster  job scripts on a real Slurm of several nodes on this machine; needs root and Debian's Slurm, says what is missing
# make check  style, import contract, types and the tests that take seconds

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo test test-matrix test-newest test-cluster check clean

help:
	@sed -n 's/^# \(make.*\)/\1/p' Makefile

install: $(STAMP)

$(STAMP): pyproject.toml configs/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); needed: Python 3.10 to 3.13. Use make PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about 6 GB, 3 to 12 minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c configs/constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: install
	@$(BIN)/python launch/demo.py

# files of tests side by side, one a core, each file's tests in one process and in their order; the longest are among the first;
# some hundred processes compile our modules once, not each (0.3 s), whatever the environment says
test: install
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# what a plain run shows in one combination, in the others
test-matrix: install
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --matrix -m matrix

# what users have whose pip does not know our constraints
NEWEST := torch torchvision deepspeed transformers tokenizers huggingface_hub safetensors datasets pyarrow fastokens orjson numpy scipy \
          scikit-learn sentence-transformers gradio onnx onnxscript onnxruntime wandb
# mosaicml-streaming asks for transformers below 5 and numpy below 2.2, and works with later ones: pip says so, and goes on
test-newest:
	@test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	@.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -c configs/constraints.txt -e '.[dev]'
	@.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade $(NEWEST)
	@PATH="$(CURDIR)/.venv-newest/bin:$$PATH" PYTHONDONTWRITEBYTECODE= .venv-newest/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-cluster: install
	@$(BIN)/python tests/cluster/side_by_side.py

check: install
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/unit tests/house

clean:
	rm -rf demo runs
