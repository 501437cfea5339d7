#!/usr/bin/env bash
# What CI checks, in the order of what breaks most often: `test.sh` the fast set, `test.sh all` everything.
# Needs the environment of `make env` on PATH; no network. Prints what each stage took beside its budget on two idle cores.
set -euo pipefail
cd "$(dirname "$0")/.."
what="${1:-fast}"
case "$what" in fast|all) ;; *) echo "test.sh $what: take fast or all"; exit 2;; esac
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export OMP_NUM_THREADS=1

stage="" began=0 times=""
step() {  # the stage that begins, and its budget in seconds; without a name the last one ends
  [ -z "$stage" ] || times+="$(printf '%5d s of %4d  %s' $((SECONDS - began)) "$budget" "$stage")"$'\n'
  stage="${1:-}" began=$SECONDS budget="${2:-0}"
  [ -z "$stage" ] || printf '\n== %s (%s s)\n' "$stage" "$SECONDS"
}

step "export in sync" 10
cp -r reid_repro "$scratch/before"
nbdev-export
python ci/export.py
diff -r -x __pycache__ "$scratch/before" reid_repro || { echo "reid_repro/ was not what the notebooks export; it is now: commit it"; exit 1; }

step "notebooks clean" 5
cp -r nbs "$scratch/nbs"
nbdev-clean
diff -rq -x .ipynb_checkpoints "$scratch/nbs" nbs || { echo "notebooks were not clean; they are now: commit them"; exit 1; }

step "reproduction notebooks keep the contract" 5
python ci/batch.py check

step "ruff" 5
ruff check .

step "types" 30
mypy

step "derivations and foundations (nbdev-test, two workers)" 300
nbdev-test --n-workers 2 --timing --skip-file-re '^[_.]|^2_reproduce'

rows=all rows_named="every smoke row" rows_budget=240
if [ "$what" = fast ]; then
  rows="ide/ide_plus,pcb/pcb,minet/minet,dcc/dcc,casn/casn_ide,ianet/sia_cia,can/can"
  rows_named="each method's headline row" rows_budget=60
fi
step "two steps of $rows_named, through the batch layer" "$rows_budget"
snakemake -s ci/Snakefile --cores 2 --nolock --keep-going --quiet rules host progress \
  --config profile=smoke only="$rows" steps=2 pictures=none runs="$scratch/runs"

if [ "$what" = all ]; then
  step "pytest (two workers)" 1200
  python -m pytest -n 2 --dist loadfile --durations 40 --durations-min 10
else
  step "pytest (two workers) but for what takes more than twenty seconds" 480
  python -m pytest -n 2 --dist loadfile -m "not slow"
fi

step "site" 90
python ci/docs.py --jobs 2

step
if [ "$what" = fast ]; then
  printf '\n== left to `make test-all`: more than twenty seconds each\n'
  python ci/slow_tests.py
fi
printf '\n== done (%s s)\n%s' "$SECONDS" "$times"
