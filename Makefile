# `make demo` and `make test` set everything up in .venv on a machine that has only Python (3.10 or newer).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.installed
TORCH_CPU := https://download.pytorch.org/whl/cpu

.PHONY: install demo test lint clean

install: $(READY)

# Without an NVIDIA GPU torch's CPU build saves gigabytes of CUDA libraries; where its index is out of reach, what pip
# is configured with serves. medusa-llm and fschat are oracles and prompt templates for the tests: the modules we import
# need nothing but torch, while their declared dependencies (web servers, tokenizers, a package without a wheel) are two
# dozen more downloads.
$(READY): setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	command -v nvidia-smi >/dev/null 2>&1 || $(BIN)/python -m pip install --disable-pip-version-check --quiet \
		--retries 0 --no-deps --constraint constraints.txt --index-url $(TORCH_CPU) torch 2>/dev/null || true
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev,train]'
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --no-deps medusa-llm fschat
	touch $(READY)

demo: install
	$(BIN)/medusa-apar demo $(ARGS)

test: install
	$(BIN)/python -m pytest $(ARGS)

# mypy cannot follow the editable install's import hook to heads/, triton_kernels/ and eval/: it checks a built copy.
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lib
	$(BIN)/python setup.py -q build_py --build-lib build/lib
	$(BIN)/mypy build/lib/medusa_apar

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
