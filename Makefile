# TVG Companion: two commands for a newcomer are `make reproduce` and `make lab`.
#
#   SCALE=smoke|cpu|full|gpu   how much to run (default: cpu)
#   ONLY=05,90                 these notebooks only
#   FORCE=1                    run what is unchanged, too
#   PYTHON=python3.12          interpreter for the environments (3.11 to 3.13)
#   JOBS=2                     notebooks and tests side by side (at the gpu scale always one)
#   MAMBA_SSM=                 leave mamba-ssm, and the comparison with it, out of `make test`

PYTHON ?= python3
SCALE ?= cpu
ONLY ?=
FORCE ?=
JOBS ?= 2
# Its Triton kernels run interpreted on the CPU; Triton itself exists for Linux only.
MAMBA_SSM ?= $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),mamba-ssm)

VENV := .venv
TEST_VENV := .venv-test
RUN := $(VENV)/bin/python -m tvg_lib.reproduce
# At the gpu scale one notebook at a time has the GPU.
NARROW := $(if $(ONLY),--only $(ONLY)) $(if $(FORCE),--force) $(if $(filter-out gpu,$(SCALE)),--jobs $(JOBS))
TEST_PIP := $(TEST_VENV)/bin/python -m pip install -q --retries 2 -c constraints.txt
NBVAL := --nbval --nbval-sanitize-with tests/nbval_sanitize.cfg --nbval-cell-timeout 600

.DEFAULT_GOAL := help
.PHONY: help reproduce figures data lab test unit check notebooks publish lint clean

help:
	@sed -n 's/^#   \(.*\)/  \1/p' Makefile
	@echo
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1@\2/p' Makefile | awk -F@ '{printf "%-18s %s\n", $$1, $$2}'

# The environment is made anew when its inputs change; otherwise this costs nothing.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "Python 3.11 to 3.13 is needed, found %d.%d: try make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[test]'
	@touch $@

reproduce: $(VENV)/installed ## run the notebooks at SCALE, write records, tables and figures
	$(RUN) --scale $(SCALE) $(NARROW)

figures: $(VENV)/installed ## only the tables and figures, from the records there are
	$(RUN) --scale $(SCALE) --only 90,91 $(if $(FORCE),--force)

data: $(VENV)/installed ## download QVH-captions (checked) and embed it: some minutes, once
	$(VENV)/bin/python -m tvg_lib.data.qvh_captions

lab: $(VENV)/installed ## open JupyterLab on the notebooks
	$(VENV)/bin/python -m jupyter lab --notebook-dir=notebooks

test: ## fresh environment, unit tests, notebook rules, all notebooks compared cell by cell
	$(PYTHON) -m venv --clear $(TEST_VENV)
	$(TEST_PIP) -e '.[test]'
	@$(if $(MAMBA_SSM),{ $(TEST_PIP) setuptools wheel packaging ninja einops triton && MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(TEST_PIP) --no-build-isolation --no-deps '$(MAMBA_SSM)'; } > $(TEST_VENV)/mamba-ssm.log 2>&1 || echo 'mamba-ssm could not be installed ($(TEST_VENV)/mamba-ssm.log): the tests skip the comparison with it',echo 'without mamba-ssm: the tests skip the comparison with it')
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(TEST_VENV)/bin/python -m pytest notebooks tests $(NBVAL) -rs -n $(JOBS) --dist loadscope

unit: $(VENV)/installed ## unit tests and notebook rules in the everyday environment
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests -rs -n $(JOBS) --dist loadscope

check: $(VENV)/installed ## compare the outputs of notebooks with a new run (ONLY=05 for one)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(if $(ONLY),$(wildcard notebooks/$(ONLY)*.ipynb notebooks/solutions/$(ONLY)*.ipynb),notebooks) $(NBVAL) -n $(JOBS) --dist loadscope

notebooks: $(VENV)/installed ## maintainers: execute ONLY=05 in place at the smoke scale, scrub and check
	@test -n "$(ONLY)" || { echo "say which: make notebooks ONLY=05"; exit 2; }
	$(RUN) --commit $(ONLY)

publish: $(VENV)/installed ## maintainers: commit-ready records, tables and figures of SCALE=full or gpu
	$(RUN) --scale $(SCALE) --publish

lint: $(VENV)/installed ## ruff on code and notebooks
	$(VENV)/bin/python -m ruff check .

clean: ## remove environments and caches; runs/ stays
	rm -rf $(VENV) $(TEST_VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks .mypy_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
