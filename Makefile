# Each target sets up what it needs, once: an environment of its own, made again only when pyproject.toml, setup.py or
# constraints.txt change. Needs git, make and Python 3.11 or newer; nothing is installed outside this folder.

PYTHON ?= python3
PYTEST_ARGS ?=
WORKERS ?= 2
# A file's tests share what they set up: checkpoints, and processes that have imported Megatron-Core.
PYTEST = bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Where this is set, hundreds of processes would compile torch and Megatron-Core anew, each for itself.
unexport PYTHONDONTWRITEBYTECODE
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# A Python of some release, which may be there under several names.
find_python = $(shell for python in python$(1) $$HOME/.pyenv/versions/$(1)*/bin/python$(1) \
    $$HOME/.local/share/uv/python/cpython-$(1)*/bin/python$(1); \
    do "$$python" -c '' 2>/dev/null && echo "$$python" && break; done)
# Megatron-Core's newest release needs it.
PYTHON312 ?= $(call find_python,3.12)
# The newest Python: everything that does without torch is tested there.
PYTHON313 ?= $(call find_python,3.13)

INPUTS := pyproject.toml setup.py constraints.txt
# What is never imported need not be compiled; the rest is when it is first imported.
PIP_INSTALL = bin/python -m pip install -qq --no-compile --disable-pip-version-check
# The oldest transformers that is supported, with what it needs older than constraints.txt says. It needs requests too.
OLDEST := transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2

say = @echo "==> $(1)"

.PHONY: help demo test test-newest test-oldest-transformers test-light test-3.13 lint format docs docs-check bench
.PHONY: bench-inference gpu-check gpu-rehearsal clean
.PHONY: setup setup-newest setup-oldest-transformers setup-light setup-3.13

help:  ## this list
	@grep -hE '^[a-z0-9.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9.-]+):.*## */  make \1|/' | column -t -s '|'

# torch goes first, so that no other package's range picks another build of it.
.venv/ready: $(INPUTS)
	$(call say,Setting up .venv: the program and what its tests need)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; say which with make PYTHON=...") if sys.version_info < (3, 11) else None'
	@$(PYTHON) -m venv .venv
	@.venv/$(PIP_INSTALL) -c constraints.txt torch
	@.venv/$(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@

.venv-3.12/ready: $(INPUTS)
	$(call say,Setting up .venv-3.12: the same for Python 3.12 with the newest megatron-core)
	@$(PYTHON312) -m venv .venv-3.12
	@.venv-3.12/$(PIP_INSTALL) -c constraints.txt torch
	@.venv-3.12/$(PIP_INSTALL) -c constraints.txt -e '.[test,all]'
	@touch $@

# What a plain install brings, and pytest: no torch.
.venv-3.13/ready: $(INPUTS)
	$(call say,Setting up .venv-3.13: the program without torch on Python 3.13)
	@$(PYTHON313) -m venv .venv-3.13
	@.venv-3.13/$(PIP_INSTALL) -c constraints.txt -e '.[test]'
	@touch $@

.venv-3.13-torch/ready: $(INPUTS)
	$(call say,Setting up .venv-3.13-torch: the program and what its tests need on Python 3.13)
	@$(PYTHON313) -m venv .venv-3.13-torch
	@.venv-3.13-torch/$(PIP_INSTALL) -c constraints.txt torch
	@.venv-3.13-torch/$(PIP_INSTALL) -c constraints.txt -e '.[test,all]'
	@touch $@

# Its own transformers, and from .venv all that it has not got itself.
.venv-tf4/ready: .venv/ready Makefile
	$(call say,Setting up .venv-tf4: .venv with the oldest transformers that is supported)
	@$(PYTHON) -m venv .venv-tf4
	@.venv-tf4/$(PIP_INSTALL) -c constraints.txt requests
	@.venv-tf4/$(PIP_INSTALL) --no-deps $(OLDEST)
	@packages=$$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	own=$$(.venv-tf4/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	echo "import site; site.addsitedir('$$packages')" > "$$own/rest.pth"
	@.venv-tf4/bin/python -c 'import importlib.metadata as m; assert m.version("transformers") == "$(word 2,$(subst ==, ,$(firstword $(OLDEST))))"'
	@touch $@

setup: .venv/ready  ## the environment of all targets but the other tests'

setup-newest: $(if $(PYTHON312),.venv-3.12/ready)

setup-oldest-transformers: .venv-tf4/ready

setup-light: $(if $(PYTHON313),.venv-3.13/ready)

setup-3.13: $(if $(PYTHON313),.venv-3.13-torch/ready)

demo: setup  ## a tiny model there and back, dense and MoE, each command shown
	$(call say,Converting a tiny dense and a tiny MoE model to Megatron and back in a temporary folder)
	@export PATH="$(CURDIR)/.venv/bin:$$PATH"; \
	work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; cd "$$work"; \
	run() { echo; echo "\$$ qwen3vl-convert $$*"; qwen3vl-convert "$$@"; }; \
	there_and_back() { \
	    run make-checkpoint "$$1/hf" --size "$$1"; \
	    run hf-to-megatron "$$1/hf" "$$1/megatron" "$${@:2}"; \
	    run verify "$$1/hf" "$$1/megatron"; \
	    run megatron-to-hf "$$1/megatron" "$$1/back" --config "$$1/hf"; \
	    run verify "$$1/back" "$$1/megatron"; \
	}; \
	there_and_back tiny --tp 2 --pp 2; \
	there_and_back tiny-moe --tp 2 --pp 2 --ep 2

test: setup  ## all tests, on Python 3.11+ with the megatron-core that it takes
	$(call say,Testing with $$(.venv/bin/python -V) and everything in constraints.txt)
	@.venv/$(PYTEST) $(PYTEST_ARGS)

test-newest: setup-newest  ## the tests marked `megatron` or `torchvision`, on Python 3.12 with the newest of both
ifeq ($(strip $(PYTHON312)),)
	$(call say,Skipped: no Python 3.12 here and megatron-core 0.19 needs it; say where with make PYTHON312=...)
else
	$(call say,Testing what is marked megatron or torchvision with $$(.venv-3.12/bin/python -V) and the newest of both)
	@.venv-3.12/$(PYTEST) -m "(megatron or torchvision) and not slow" $(PYTEST_ARGS)
endif

test-oldest-transformers: setup-oldest-transformers  ## the tests marked `transformers`, on its oldest supported release
	$(call say,Testing what is marked transformers with $(firstword $(OLDEST)))
	@.venv-tf4/$(PYTEST) -m "transformers and not slow" $(PYTEST_ARGS)

test-light: setup-light  ## what does without torch, on Python 3.13 in an environment that has none
ifeq ($(strip $(PYTHON313)),)
	$(call say,Skipped: no Python 3.13 here; say where with make PYTHON313=...)
else
	$(call say,Testing what does without torch with $$(.venv-3.13/bin/python -V))
	@.venv-3.13/bin/python -c 'import importlib.util as u, sys; sys.exit("torch is in .venv-3.13") if u.find_spec("torch") else None'
	@.venv-3.13/$(PYTEST) -m "not slow" $(PYTEST_ARGS)
endif

test-3.13: setup-3.13  ## all tests on Python 3.13 with the newest torch, which takes 5 GB; not in .ci/run
ifeq ($(strip $(PYTHON313)),)
	$(call say,Skipped: no Python 3.13 here; say where with make PYTHON313=...)
else
	$(call say,Testing with $$(.venv-3.13-torch/bin/python -V) and everything in constraints.txt)
	@.venv-3.13-torch/$(PYTEST) $(PYTEST_ARGS)
endif

lint: setup  ## ruff, mypy strict; pyright where it is installed
	$(call say,Checking style and types)
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy
	@if command -v pyright >/dev/null; then pyright --pythonpath .venv/bin/python qwen3vl_convert; fi

format: setup  ## rewrite the files as `make lint` wants them
	@.venv/bin/ruff check --fix
	@.venv/bin/ruff format

docs: setup  ## write the generated pages of docs/ again; FIGURE=1 also draws docs/images/demo.svg
	$(call say,Generating the pages of docs/ that come from code)
	@.venv/bin/python docs/generate.py $(if $(FIGURE),--figure)

docs-check: setup  ## fail if a generated page is not current
	$(call say,Checking that the generated pages are current)
	@.venv/bin/python docs/generate.py --check

bench: setup  ## speed and memory, each with its ratio to cp
	$(call say,Measuring; every figure is printed beside cp on the same bytes)
	@.venv/bin/python benchmarks/convert.py --write

bench-inference: setup  ## prefill and decoding, each with its ratio to transformers
	$(call say,Measuring the inference engine beside the generate of transformers on the CPU; --device cuda for a GPU)
	@.venv/bin/python benchmarks/inference.py

gpu-check: setup  ## all that only a GPU can show, in parts; results go to gpu-results/ (see docs/gpu-results.md)
	$(call say,Checking kernels and models and speed on this GPU; results go to gpu-results as they come)
	@.venv/bin/python benchmarks/gpu_check.py

gpu-rehearsal: setup  ## the same with tiny models on the CPU: shows that the script works, and nothing of a GPU
	$(call say,Rehearsing gpu-check on the CPU)
	@DEVICE=cpu SLACK=$(or $(SLACK),4) .venv/bin/python benchmarks/gpu_check.py

clean:  ## remove environments, caches and builds
	$(call say,Removing environments, caches and builds)
	@rm -rf .venv .venv-3.12 .venv-3.13 .venv-3.13-torch .venv-tf4 build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
