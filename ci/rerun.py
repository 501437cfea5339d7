"""Runs a ledger entry again from itself: its row, data set, seed and every parameter; says what
differs from then, and compares the scores.

    make rerun ENTRY=results/ide-pixels-toytown-smoke-s0.json
    make rerun ENTRY=results/ide-ide-cuhk03-np-detected-short-s0.json DATA=~/data
    WEIGHTS=resnet50_imagenet.safetensors

The run lies in runs/rerun/<entry>/: notebook.ipynb, notebook.html, and rerun.json with the scores
then and now. results/ stays as it is.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
# where a run took place, not what it computed
PLACE = ("out", "data_root", "device", "resume", "pictures")
OFF = (0, False, "", "none", [])  # values that switch a parameter off


def parameters_now(entry: dict, known: dict, row: dict) -> tuple[dict, list[str]]:
    """Parameters of an entry for the notebook as it is now, and a line on each that came or went
    since.

    `known`: name → (type, default) of the notebook, `row`: what the row sets now. ValueError names
    what would make it another run.
    """
    from reid_repro.lab.ledger import FORMER

    then = entry["parameters"]
    words = []
    remedy = f"check out the entry's commit, {entry['commit']}, and run it there"
    gone = {name: value for name, value in then.items() if name not in known}
    lost = [
        f"{name} = {value!r}"
        for name, value in gone.items()
        if value not in OFF and name not in PLACE and FORMER.get(name) != value
    ]
    if lost:
        raise ValueError(f"the notebook no longer takes {', '.join(lost)}; {remedy}")
    words += [
        f"parameter gone since, {'off' if value in OFF else 'as it is always now'} then:"
        f" {name} = {value!r}"
        for name, value in gone.items()
        if name not in PLACE
    ]
    new = {name: default for name, (_, default) in known.items() if name not in then}
    words += [
        f"parameter new since, at its default: {name} = {value!r}" for name, value in new.items()
    ]
    values = new | {name: value for name, value in then.items() if name in known}
    other = [
        f"{name} = {value!r} (then {values[name]!r})"
        for name, value in row.items()
        if values.get(name) != value
    ]
    if other:
        raise ValueError(f"row '{entry['row']}' sets {', '.join(other)} now; {remedy}")
    return values, words


def git(*arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def code_changed(then: str | None, now: str | None, notebook: str, paper: str) -> str:
    "What differs in the code between two commits, in words; empty when nothing does."
    if then == now and then and not then.endswith("-dirty"):
        return ""
    message = f"commit {then} → {now}"
    if (
        not then
        or not now
        or git("cat-file", "-e", f"{then.removesuffix('-dirty')}^{{commit}}") is None
    ):
        return f"{message}; what changed between them cannot be told"
    changed = git(
        "diff", "--name-only", then.removesuffix("-dirty"), "--", "reid_repro", notebook,
        f"ci/rows/{paper}.yaml", "ci/profiles",
    )
    files = [name for name in (changed or "").splitlines() if not name.endswith("_modidx.py")]
    unsaved = "; the run had changes that no commit holds" if then.endswith("-dirty") else ""
    files = [*files[:8], f"and {len(files) - 8} more"] if len(files) > 9 else files
    return f"{message}; changed: {', '.join(files) or 'nothing that a run uses'}{unsaved}"


def differences(entry: dict, now: dict, notebook: str) -> dict[str, str]:
    "What → how, of code, data, versions and device, then and now; only what differs."
    found = {"code": code_changed(entry["commit"], now["commit"], notebook, entry["paper"])}
    if entry["fingerprint"] != now["fingerprint"]:
        found["data"] = f"fingerprint {entry['fingerprint']} → {now['fingerprint']}"
    versions = {
        name: (entry["versions"].get(name), now["versions"].get(name))
        for name in {**entry["versions"], **now["versions"]}
    }
    found["versions"] = ", ".join(
        f"{name} {a} → {b}" for name, (a, b) in versions.items() if a != b
    )
    found["device"] = (
        f"{entry['device']} → {now['device']}" if entry["device"] != now["device"] else ""
    )
    return {what: how for what, how in found.items() if how}


def compare(then: dict, now: dict) -> list[tuple[str, float, float, float]]:
    "(metric, then, now, now − then) of every metric that both entries have, in percent."
    return [
        (name, then[name], now[name], round(now[name] - then[name], 4))
        for name in then
        if name in now
    ]


def verdict(scores: list, found: dict) -> str:
    "Whether the scores agree, and if not, whether anything that was compared could be the reason."
    apart = [score for score in scores if score[3]]
    if not apart:
        return "agrees exactly"
    name, *_, difference = max(apart, key=lambda score: abs(score[3]))
    most = f"differs by up to {abs(difference):.4g} points ({name})"
    if found:
        return (
            f"{most}; {', '.join(found)}"
            f" {'is not what it was' if len(found) == 1 else 'are not what they were'}"
        )
    return (
        f"{most}, though code, data, versions and device are the same: the run is not"
        " deterministic, or something was not recorded"
    )


def check_needs(entry: dict, data: str, weights: str, start: str = "") -> None:
    """ValueError for a folder or file that the entry needs and that was not given, and for another
    start than the entry's.
    """
    from reid_repro.lab.configuration import finished_run
    from reid_repro.utils.files import spelt_on_disk

    then = entry["parameters"]
    real = [
        name for name in (entry["dataset"], then.get("source", "")) if name not in ("", "toytown")
    ] or then.get("data_root")
    if real and not data:
        raise ValueError(
            "the entry ran on"
            f" {entry['dataset']}{' out of a folder' * (real == then.get('data_root'))}; give"
            " DATA=<folder>"
        )
    lender = then.get("start_from", "")
    if lender not in ("", "none"):
        if not start:
            raise ValueError(
                f"the entry began with the backbone of {lender}; give START=<the folder of that"
                " run>"
            )
        if finished_run(start, ROOT)[2] != lender:
            raise ValueError(
                f"START={start} is {finished_run(start, ROOT)[2]}; the entry began with {lender}"
            )
    elif then.get("weights", "") not in ("", "imagenet", "random"):
        if not weights:
            raise ValueError(f"the entry started from {then['weights']}; give WEIGHTS=<that file>")
        if not spelt_on_disk(Path(weights).expanduser()).exists():
            raise ValueError(f"WEIGHTS={weights} is no file; give the entry's {then['weights']}")


def then_weights(then: dict, weights: str) -> str:
    """What a rerun is told to load: the words of the entry, a random start by its name, or the file
    that was given in place of its own.
    """
    if then.get("start_from", "") not in ("", "none"):
        return ""
    if then.get("weights", "") in ("imagenet", "random"):
        return then["weights"]
    if not then.get("weights"):
        # once an empty word began at random
        return "random" if then.get("backbone", "tiny") != "tiny" else ""
    return str(Path(weights).expanduser().absolute())


def row_of(entry: dict) -> object:
    "The row of an entry as it is today."
    from reid_repro.lab.rows import read_rows

    rows = {row.name: row for row in read_rows(entry["paper"])}
    if entry["row"] not in rows:
        raise ValueError(
            f"row '{entry['row']}' is not in ci/rows/{entry['paper']}.yaml any more; check out"
            f" commit {entry['commit']}"
        )
    return rows[entry["row"]]


def folder_of(path: Path, entry: dict) -> Path:
    "Where the rerun of an entry is written."
    name = path.stem
    if name == "ledger":
        parts = [entry[key] for key in ("paper", "row", "dataset", "profile")]
        name = "-".join([*parts, f"s{entry['seed']}"])
    return Path("runs") / "rerun" / name


def set_places(
    values: dict, then: dict, out: Path, data: str, weights: str, device: str, start: str
) -> None:
    "Puts into parameters what depends on this machine."
    values["out"] = str(out)
    values["data_root"] = str(Path(data).expanduser().absolute()) if data else ""
    values["pictures"] = "toytown"
    values["device"] = device or then.get("device", "auto")
    values["resume"] = True
    values["weights"] = then_weights(then, weights)
    if then.get("start_from", "") not in ("", "none"):
        values["start_from"] = str(Path(start).expanduser().absolute())


def changes(entry: dict, values: dict, notebook: str) -> dict[str, str]:
    "What differs between then and now: code, data, versions, device, weights."
    from reid_repro.lab.provenance import run_provenance
    from reid_repro.lab.runs import open_data
    from reid_repro.learning.recipe import pick_device

    benchmark = open_data(SimpleNamespace(**values))
    today = run_provenance(pick_device(values["device"]))
    found = differences(entry, today | {"fingerprint": benchmark.fingerprint}, notebook)
    before, weights = entry["parameters"].get("weights", ""), Path(values["weights"])
    if values.get("start_from", "") in ("", "none") and weights.is_file():
        if weights.name != before:
            found["weights"] = f"{before} → {weights.name}"
    return found


def show_scores(scores: list, then: dict, today: dict) -> None:
    "Prints the metrics of both runs."
    print(f"\n{'metric':8s} {'then':>9s} {'now':>9s} {'now-then':>9s}")
    for metric, before, after, difference in scores:
        print(f"{metric:8s} {before:9.4f} {after:9.4f} {difference:+9.4f}")
    for metric in [*then, *today]:
        if metric not in then or metric not in today:
            print(f"{metric:8s} {'then' if metric in then else 'now'} only")


def rerun(path: Path, data: str, weights: str, device: str, start: str = "") -> int:
    """Reports what differs, runs, compares; returns 0 unless the scores differ and nothing that was
    compared can be the reason.
    """
    from reid_repro.lab.configuration import declared
    from reid_repro.lab.ledger import read_entry

    entry = read_entry(path)
    row, then = row_of(entry), entry["parameters"]
    check_needs(entry, data, weights, start)
    values, words = parameters_now(entry, declared(ROOT / row.notebook), row.set)
    out = folder_of(path, entry)
    set_places(values, then, out, data, weights, device, start)
    found = changes(entry, values, row.notebook)
    print(
        f"{row.title} on {entry['dataset']}, seed {entry['seed']}, {entry['profile']} profile,"
        f" finished {entry['finished']}"
    )
    print(*words, *(f"{what}: {how}" for what, how in found.items()), sep="\n")
    if not found:
        print("code, data, versions and device are what they were")
    ledger = ROOT / out / "ledger.json"
    ledger.unlink(missing_ok=True)
    files = [row.notebook, str(out / "notebook.ipynb"), str(out / "notebook.html")]
    command = [sys.executable, "ci/batch.py", "run", *files, json.dumps(values)]
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        return done.returncode
    fresh = read_entry(ledger)
    scores = compare(entry["metrics"], fresh["metrics"])
    record = {
        "entry": path.name, "differences": found, "parameters": words,
        "verdict": verdict(scores, found), "now": fresh,
        "scores": [dict(zip(("metric", "then", "now", "difference"), score)) for score in scores],
    }
    (ROOT / out / "rerun.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    ledger.unlink()  # so that neither a table nor `make publish` takes it for the entry itself
    show_scores(scores, entry["metrics"], fresh["metrics"])
    print(f"\n{record['verdict']}; {out / 'rerun.json'}")
    return int(any(score[3] for score in scores) and not found)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("entry", help="a ledger entry, of results/ or of a run")
    for option in ("data", "weights", "device", "start"):
        parser.add_argument(f"--{option}", default="")
    given = parser.parse_args()
    path = Path(given.entry).expanduser().absolute()
    if not path.is_file():
        print(
            f"ENTRY={given.entry} is no file; give a ledger entry such as"
            " results/ide-pixels-toytown-smoke-s0.json",
            file=sys.stderr,
        )
        return 2
    threads = re.search(
        r'"device": "[^"]*, (\d+) threads"', path.read_text(encoding="utf-8", errors="ignore")
    )
    if threads:  # the number decides the order of sums; read before torch starts
        os.environ["OMP_NUM_THREADS"] = threads[1]
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    try:
        return rerun(path, given.data, given.weights, given.device, given.start)
    except (ValueError, OSError) as error:
        print(f"{path.name}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
