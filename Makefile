# reid_repro: `make help` lists what there is. Everything runs in .venv, which `make env` sets up once.
SHELL := /bin/bash
PYTHON ?= python3
# recipes read it from the environment: the folder's name may hold any sign
export BIN := $(CURDIR)/.venv/bin

# what `make reproduce` runs; recipes read the values from the environment, so no quote, blank or $ in them reaches a shell
DATA ?=
ONLY ?=
DATASET ?=
SEEDS ?= 0
WEIGHTS ?=
START ?=
PICTURES ?=
DEVICE ?=
PROCESSES ?= 1
RUNS ?= runs
BUDGET ?=
CORES ?=
override export DATA := $(value DATA)
override export ONLY := $(value ONLY)
override export DATASET := $(value DATASET)
override export SEEDS := $(value SEEDS)
override export WEIGHTS := $(value WEIGHTS)
override export START := $(value START)
override export PICTURES := $(value PICTURES)
override export DEVICE := $(value DEVICE)
override export PROCESSES := $(value PROCESSES)
override export RUNS := $(value RUNS)
override export BUDGET := $(value BUDGET)
# GNU's nproc counts OMP_NUM_THREADS instead of cores where it is set
override export CORES := $(or $(value CORES),$(shell env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || sysctl -n hw.ncpu))
PAPER ?=
override export PAPER := $(value PAPER)
# from the command line alone: some systems keep the computer's name in this variable
override export NAME := $(if $(findstring command,$(origin NAME)),$(value NAME))
# a cluster's profile in ci/cluster instead of this machine's cores; what `make bundle` and `make rerun` take
override export CLUSTER := $(value CLUSTER)
override export NODE_PYTHON := $(filter-out python3,$(value PYTHON))
override export MACHINE := $(value MACHINE)
override export PART := $(value PART)
override export HAVE := $(value HAVE)
override export OUT := $(value OUT)
override export ENTRY := $(value ENTRY)
override export PROFILE := $(or $(value PROFILE),$(if $(value DATA),short,smoke))

# a misspelt option would be ignored: what the command line sets must be one of ours, or one that tools read
options = DATA PROFILE ONLY DATASET SEEDS WEIGHTS START PICTURES DEVICE PROCESSES CORES BUDGET CLUSTER RUNS PAPER NAME \
  PYTHON MACHINE PART HAVE OUT ENTRY
tools = BIN SHELL MAKE MAKEFLAGS MFLAGS GNUMAKEFLAGS MAKEFILES MAKELEVEL CURDIR VPATH PATH HOME USER TMPDIR DISPLAY TERM LANG TZ CI \
  PYTHONPATH PYTHONHASHSEED PYTHONWARNINGS PYTHONUNBUFFERED PYTHONDONTWRITEBYTECODE LD_% LC_% XDG_% OMP_% MKL_% CUDA_% NCCL_% \
  TORCH_% PYTORCH_% HF_% ACCELERATE_% JUPYTER_% PIP_% UV_% SLURM_% SNAKEMAKE_% GIT_% SSL_% REID_REPRO_% %_PROXY %_proxy %FLAGS CC CXX
given := $(foreach name,$(.VARIABLES),$(if $(findstring command,$(origin $(name))),$(name)))
unknown := $(firstword $(filter-out $(options) $(tools),$(given)))
ifneq ($(unknown),)
near := $(shell python3 -c 'import difflib as d, sys; print(*d.get_close_matches(sys.argv[1].upper(), sys.argv[2:], 1, 0.5))' \
  '$(subst ','"'"',$(unknown))' $(options) 2>/dev/null)
$(error $(unknown)= is no option$(if $(near),; did you mean $(near)=?,.) The options are $(options))
endif

packages = -c ci/constraints.txt -e ".[dev]"
choice = --profile "$$PROFILE" --only "$$ONLY" --data "$$DATA" --dataset "$$DATASET" --seeds "$$SEEDS"
starts = --weights "$$WEIGHTS" --start "$$START"
told = $(starts) --pictures "$$PICTURES" --device "$$DEVICE" --runs "$$RUNS"
# a name in ci/cluster, or a folder of one's own that holds a config.yaml
where = $(if $(value CLUSTER),--workflow-profile "$$(test -d "ci/cluster/$$CLUSTER" && echo ci/cluster/)$$CLUSTER",--cores "$$CORES")
# a job prints its own failure here; on a cluster Snakemake tells it, with the scheduler's words
quiet = $(if $(value CLUSTER),,rules) host progress
snakemake = PATH="$$BIN:$$PATH" "$$BIN"/python ci/batch.py unlocked "$$BIN"/snakemake -s ci/Snakefile $(where) --keep-going --rerun-incomplete --quiet $(quiet)

.DEFAULT_GOAL := help
.PHONY: help env lab reproduce study plan missing rehearsal test test-all test-browser publish readme report checkpoints bundle rerun export hooks docs new-paper clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "make %-13s %s\n", $$1, $$2}'
	@echo "options of reproduce, plan and missing:"
	@echo "  DATA=folder PROFILE=smoke|study|pilot|photographs|short|paper ONLY=all|baselines|paper|paper/row|paper/table4e|paper/claims DATASET=name SEEDS=n"
	@echo "  WEIGHTS=imagenet|file|folder|random START=run PICTURES=toytown|data|none DEVICE=auto|cpu|cuda PROCESSES=n CORES=n BUDGET=25m CLUSTER=slurm|kubernetes"

.venv/.ready: settings.ini setup.py ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; give it as PYTHON=python3.x")'
	$(PYTHON) -m venv .venv
	@# uv installs in a fraction of pip's time; where it is not to be had, pip does the same
	@"$$BIN"/pip install --quiet --disable-pip-version-check uv 2>/dev/null || true
	"$$BIN"/uv pip install --quiet --python "$$BIN"/python $(packages) || "$$BIN"/pip install --quiet $(packages)
	@touch $@

env: .venv/.ready  ## set up .venv (the only step that needs the network)

lab: env  ## open JupyterLab on the start page of the notebooks
	@# our own kernel first, whatever JUPYTER_PATH says
	JUPYTER_PATH="$$BIN/../share/jupyter$${JUPYTER_PATH:+:$$JUPYTER_PATH}" "$$BIN"/jupyter lab nbs/index.ipynb

reproduce: env  ## run the reproduction notebooks of a profile and print the tables
	@"$$BIN"/python ci/batch.py skipped $(choice) $(told)
	@status=0; $(snakemake) --config profile="$$PROFILE" only="$$ONLY" data="$$DATA" dataset="$$DATASET" seeds="$$SEEDS" \
	  weights="$$WEIGHTS" start="$$START" pictures="$$PICTURES" device="$$DEVICE" processes="$$PROCESSES" runs="$$RUNS" || status=$$?; \
	  "$$BIN"/python ci/batch.py tables $(choice) $(told) || status=$$?; exit $$status

study: env  ## compare methods: the rows of PAPER=name that belong to profile study, five seeds on Toytowns of their own
	@test -n "$$PAPER" || { echo "make study PAPER=name: give the paper whose rows are compared, such as ianet"; exit 2; }
	@$(MAKE) --no-print-directory reproduce PROFILE=study ONLY="$$PAPER"

plan: env  ## list what `make reproduce` would run, its hours and memory, and what is skipped and why
	@"$$BIN"/python ci/batch.py plan $(choice) $(starts)

missing: env  ## run what the ledger lacks, the most worth first, within BUDGET=25m (90s, 2h, 1h30m)
	@"$$BIN"/python ci/batch.py missing $(choice) $(told) --budget "$$BUDGET" --cores "$$CORES" --processes "$$PROCESSES"

rehearsal: env  ## two or three steps of every row of all papers and a step at full size; writes the costs behind `make plan`
	@"$$BIN"/python ci/rehearsal.py --only "$$ONLY" --cores "$$CORES"

test-browser: env  ## a real browser on JupyterLab, the explorer and the site
	@PATH="$$BIN:$$PATH" bash ci/browser.sh

publish: env  ## copy the ledger entries of finished runs to results/ (committed)
	@"$$BIN"/python ci/batch.py publish --runs "$$RUNS"

bundle: override PYTHON := python3
bundle: env  ## collect what a node without a network needs, in parts: PYTHON=3.12 PART=60M HAVE=torch,… DATA=folder WEIGHTS=file
	@"$$BIN"/python ci/offline/bundle.py --python "$$NODE_PYTHON" --machine "$$MACHINE" --part "$$PART" --have "$$HAVE" \
	  --data "$$DATA" --weights "$$WEIGHTS" --out "$$OUT"

rerun: env  ## run a ledger entry again from itself and compare: ENTRY=results/x.json DATA=folder WEIGHTS=file START=run
	@"$$BIN"/python ci/rerun.py "$$ENTRY" --data "$$DATA" --weights "$$WEIGHTS" --start "$$START" --device "$$DEVICE"

readme: env  ## write the README's results from results/ (after make publish)
	@"$$BIN"/python ci/readme.py

report: env  ## the report as a PDF, OUT=report.pdf: does each mechanism act, does it help, what has not run
	@"$$BIN"/python ci/report.py "$${OUT:-report.pdf}"

# a network of each method: what the explorer and nbs/6_comparison show
networks = ide/ide_plus,pcb/pcb,minet/minet,dcc/dcc,casn/casn_ide,ianet/sia_cia,can/can

checkpoints: env  ## train a tiny network of each method on Toytown, keep its weights in results/checkpoints/ (committed)
	@$(MAKE) --no-print-directory reproduce PROFILE=smoke DATA= ONLY="$(networks)"
	@"$$BIN"/python ci/checkpoints.py --runs "$$RUNS" --only "$(networks)"

test: env  ## what CI checks on every change, in a quarter of an hour
	@PATH="$$BIN:$$PATH" bash ci/test.sh fast

test-all: env  ## everything: the tests that take long, too, and every smoke row
	@PATH="$$BIN:$$PATH" bash ci/test.sh all

export: env  ## export the notebooks to reid_repro/ and clean them
	@PATH="$$BIN:$$PATH"; export PATH; nbdev-export && python ci/export.py && nbdev-clean

hooks: env  ## hooks of Jupyter and git: notebooks are cleaned when saved and merged cell by cell
	@"$$BIN"/python ci/hooks.py

docs: env  ## build the site from notebooks and docstrings: docs/_build/html/index.html
	@"$$BIN"/python ci/docs.py

new-paper: env  ## begin the reproduction of another paper, NAME=name: notebooks, module, rows and tests that pass as they come
	@"$$BIN"/python ci/new_paper.py "$$NAME"

clean:  ## remove runs/, the site and caches (not .venv, not results/)
	rm -rf runs docs/_build .snakemake .pytest_cache .ruff_cache
