# reid_repro: `make help` lists what there is. Everything runs in .venv, which `make env` sets up once.
SHELL := /bin/bash
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

# what `make reproduce` runs; recipes read the values from the environment, so no quote, blank or $ in them reaches a shell
DATA ?=
ONLY ?=
DATASET ?=
SEEDS ?= 0
WEIGHTS ?=
PICTURES ?=
DEVICE ?=
RUNS ?= runs
override export DATA := $(value DATA)
override export ONLY := $(value ONLY)
override export DATASET := $(value DATASET)
override export SEEDS := $(value SEEDS)
override export WEIGHTS := $(value WEIGHTS)
override export PICTURES := $(value PICTURES)
override export DEVICE := $(value DEVICE)
override export RUNS := $(value RUNS)
PAPER ?=
override export PAPER := $(value PAPER)
override export PROFILE := $(or $(value PROFILE),$(if $(value DATA),short,smoke))

packages = -c ci/constraints.txt -e ".[dev]"
choice = --profile "$$PROFILE" --only "$$ONLY" --data "$$DATA" --dataset "$$DATASET" --seeds "$$SEEDS"
told = --weights "$$WEIGHTS" --pictures "$$PICTURES" --device "$$DEVICE" --runs "$$RUNS"
snakemake = PATH="$(BIN):$$PATH" $(BIN)/snakemake -s ci/Snakefile --cores $(CORES) --keep-going --rerun-incomplete --quiet rules host progress

.DEFAULT_GOAL := help
.PHONY: help env lab reproduce study plan test publish readme checkpoints export clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "make %-11s %s\n", $$1, $$2}'
	@echo "options of reproduce and plan: DATA=folder PROFILE=smoke|study|short|paper ONLY=baselines|paper|paper/row|paper/table4e DATASET=name SEEDS=n"
	@echo "                               WEIGHTS=imagenet|file PICTURES=toytown|data|none DEVICE=auto|cpu|cuda CORES=n"

.venv/.ready: settings.ini setup.py ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; give it as PYTHON=python3.x")'
	$(PYTHON) -m venv .venv
	@# uv installs in a fraction of pip's time; where it is not to be had, pip does the same
	@$(BIN)/pip install --quiet --disable-pip-version-check uv 2>/dev/null || true
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(packages) || $(BIN)/pip install --quiet $(packages)
	@touch $@

env: .venv/.ready  ## set up .venv (the only step that needs the network)

lab: env  ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab nbs

reproduce: env  ## run the reproduction notebooks of a profile and print the tables
	@$(BIN)/python ci/batch.py skipped $(choice) $(told)
	@status=0; $(snakemake) --config profile="$$PROFILE" only="$$ONLY" data="$$DATA" dataset="$$DATASET" seeds="$$SEEDS" \
	  weights="$$WEIGHTS" pictures="$$PICTURES" device="$$DEVICE" runs="$$RUNS" || status=$$?; \
	  $(BIN)/python ci/batch.py tables $(choice) $(told) || status=$$?; exit $$status

study: env  ## compare methods: the rows of PAPER=name that belong to profile study, five seeds on Toytowns of their own
	@test -n "$$PAPER" || { echo "make study PAPER=name: give the paper whose rows are compared, such as ianet"; exit 2; }
	@$(MAKE) --no-print-directory reproduce PROFILE=study ONLY="$$PAPER"

plan: env  ## list what `make reproduce` would run, and what is skipped and why
	@$(BIN)/python ci/batch.py plan $(choice)

publish: env  ## copy the ledger entries of finished runs to results/ (committed)
	@$(BIN)/python ci/batch.py publish --runs "$$RUNS"

readme: env  ## write the README's results from results/ (after make publish)
	@$(BIN)/python ci/readme.py

# a network of each method: what the explorer and nbs/80_methods show
networks = ide/ide_plus,pcb/pcb,minet/minet,dcc/dcc,casn/casn_ide,ianet/sia_cia,can/can

checkpoints: env  ## train a tiny network of each method on Toytown, keep its weights in results/checkpoints/ (committed)
	@$(MAKE) --no-print-directory reproduce PROFILE=smoke DATA= ONLY="$(networks)"
	@$(BIN)/python ci/checkpoints.py --runs "$$RUNS" --only "$(networks)"

test: env  ## everything CI checks
	@PATH="$(BIN):$$PATH" bash ci/test.sh

export: env  ## export the notebooks to reid_repro/ and clean them
	@PATH="$(BIN):$$PATH" nbdev-export && PATH="$(BIN):$$PATH" nbdev-clean

clean:  ## remove runs/ and caches (not .venv, not results/)
	rm -rf runs .snakemake .pytest_cache .ruff_cache
