#!/usr/bin/env bash
# What CI checks, in the order of what breaks most often. Needs the environment of `make env` on PATH; no network.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
step() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

step "export in sync"
cp -r reid_repro "$scratch/before"
nbdev-export
python ci/export.py
diff -r -x __pycache__ "$scratch/before" reid_repro || { echo "reid_repro/ was not what the notebooks export; it is now: commit it"; exit 1; }

step "notebooks clean"
cp -r nbs "$scratch/nbs"
nbdev-clean
diff -rq -x .ipynb_checkpoints "$scratch/nbs" nbs || { echo "notebooks were not clean; they are now: commit them"; exit 1; }

step "reproduction notebooks keep the contract"
python ci/batch.py check

step "ruff"
ruff check .

step "types"
mypy

step "derivations and foundations (nbdev-test, two workers)"
OMP_NUM_THREADS=1 nbdev-test --n-workers 2 --timing --skip-file-re '^[_.]|^2_reproduce'

step "two steps of every smoke row, through the batch layer"
OMP_NUM_THREADS=1 snakemake -s ci/Snakefile --cores 2 --nolock --keep-going --quiet rules host progress \
  --config profile=smoke steps=2 pictures=none runs="$scratch/runs"

step "pytest (two workers)"
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile
step "site"
python ci/docs.py --jobs 2
step "done"
