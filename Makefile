# Installs, tests and runs bnbench in an environment of its own. `make help` lists what there is.
#
# make itself ends with 2 after any failure; its last line ("Error N") tells the exit code of bnbench:
# 1 incomplete or failed cells, 2 bad input, 130 and 143 interrupted.

PRESET ?= auto
STUDY ?=
GPUS ?= all
WORKERS ?=
DEVICES ?=
BUDGET ?=
FLEET ?=
SMOKE ?=
RUNS ?= runs
STORAGE ?=
RAY ?=
ONLY ?=
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help study plan report ui data doctor selfcheck install test test-slow lint smoke bench resolve constraints clean check-python

# An installation is remembered by a stamp file, so that later calls start at once and without a network.
# VENV=none takes the Python that is there (conda, a module, a container) and installs nothing.
ifeq ($(VENV),none)
python := $(PYTHON)
for_study := check-python
for_dev := check-python
else
python := $(VENV)/bin/python
for_study := $(VENV)/.installed-$(if $(RAY),ray,study)
for_dev := $(VENV)/.installed-dev
endif
bnbench := $(python) -m bnbench.cli

# On small networks several threads a process mostly wait for each other.
test lint smoke bench test-slow: export OMP_NUM_THREADS := 1
test lint smoke bench test-slow: export MKL_NUM_THREADS := 1

help:
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 20
	@echo '  variables         PRESET=auto|smoke|quick|full  STUDY="name file.py"  GPUS=all|none|0,2  WORKERS=n'
	@echo '                    DEVICES=n  BUDGET=2h  FLEET=auto|off|eager|compiled  RUNS=folder  STORAGE=url'
	@echo '                    RAY=auto|host:port'
	@echo '                    PYTHON=python3.12  VENV=folder|none  PIP_ARGS=...  SMOKE=1  ONLY=parts'

study: $(for_study) ## run the studies: all, or those named by STUDY
	@$(bnbench) run $(STUDY) --preset $(PRESET) --gpus $(GPUS) --runs "$(RUNS)" \
	  $(if $(WORKERS),--workers $(WORKERS)) $(if $(DEVICES),--devices $(DEVICES)) \
	  $(if $(BUDGET),--budget $(BUDGET)) $(if $(FLEET),--fleet $(FLEET)) $(if $(RAY),--ray $(RAY)) $(if $(STORAGE),--storage "$(STORAGE)")

plan: $(for_study) ## say what a study would train and how long that takes
	@$(bnbench) plan $(STUDY) --preset $(PRESET) --gpus $(GPUS) --runs "$(RUNS)" \
	  $(if $(WORKERS),--workers $(WORKERS)) $(if $(FLEET),--fleet $(FLEET))

report: $(for_study) ## write the report from what is recorded in RUNS
	@$(bnbench) report $(STUDY) --runs "$(RUNS)"

ui: $(for_study) ## open the MLflow UI over RUNS on this machine's loopback address
	@$(bnbench) ui --runs "$(RUNS)"

data: $(for_study) ## download the data sets (compute nodes have no internet: do it on the login node)
	@$(bnbench) data

doctor: $(for_study) ## say whether this machine can run the studies, and what to mend (SMOKE=1: try it)
	@$(bnbench) doctor --gpus $(GPUS) --runs "$(RUNS)" $(if $(SMOKE),--smoke --preset $(PRESET) $(STUDY))

selfcheck: $(for_study) ## measure how often verdicts err: on random tables, and on trainings of known answer
	@$(bnbench) selfcheck --gpus $(GPUS) $(if $(WORKERS),--workers $(WORKERS))

install: $(for_study) ## install bnbench into VENV (the only other step that needs the internet)

test: $(for_dev) ## run the tests
	@$(python) -m pytest -n auto --dist loadfile --no-loadscope-reorder -q

test-slow: $(for_dev) ## run the slow tests
	@$(python) -m pytest -q -m slow

lint: $(for_dev) ## check style, types and import layers
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@$(python) -m mypy
	@$(python) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'

smoke: $(for_study) ## run every study at its smallest size, in a temporary folder
	@runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && \
	  $(bnbench) run --preset smoke --gpus $(GPUS) --runs "$$runs"

bench: $(for_study) ## measure how fast bnbench is, as a table of ratios (ONLY="steps studies": parts of it)
	@$(python) -m benchmarks $(ONLY)

# Resolving reads the descriptions of the packages and downloads none.
resolution := build/resolution.json
resolve_as := -m pip install -q --dry-run --ignore-installed --only-binary :all: --report $(resolution) $(PIP_ARGS)

resolve: $(for_dev) ## check that constraints.txt fits the packages of the index
	@mkdir -p build
	@$(python) $(resolve_as) -c constraints.txt '.[dev,gpu,ray]'

constraints: $(for_dev) ## write constraints.txt anew, with the newest versions that fit each other
	@mkdir -p build
	@$(python) $(resolve_as) '.[dev,gpu,ray]'
	@$(python) -c 'import json, pathlib; \
	  rows = json.loads(pathlib.Path("$(resolution)").read_text())["install"]; \
	  found = {row["metadata"]["name"].lower(): row["metadata"]["version"].split("+")[0] for row in rows}; \
	  lines = [f"{name}=={found[name]}\n" for name in sorted(found) if name != "bnbench"]; \
	  head = "# Written by `make constraints`: the newest versions that fit each other, with all extras.\n"; \
	  pathlib.Path("constraints.txt").write_text(head + "".join(lines))'

clean: ## remove VENV and caches, but no results
	@rm -rf "$(VENV)" .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# Python 3.11 or newer, or one line that names the remedy.
define require_python
version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); \
case "$$version" in \
  3.1[1-9] | 3.[2-9][0-9]) ;; \
  *) echo "bnbench needs Python 3.11 or newer, and $(PYTHON) is $${version:-not there};" \
     "name another one: make $(or $(MAKECMDGOALS),study) PYTHON=python3.12" >&2; exit 2 ;; \
esac
endef

check-python:
	@$(require_python)

$(VENV)/bin/python:
	@$(require_python)
	@$(PYTHON) -m venv "$(VENV)"

# An installation with the tools of development is one for studies too.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing bnbench[$*] into $(VENV); the first time this takes some minutes."
	@$(VENV)/bin/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[$*]'
	@touch $(VENV)/.installed-study $@
