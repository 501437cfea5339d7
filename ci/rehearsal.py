"""Rehearses every row before a GPU hour is spent: each on a Toytown of two dozen people with the
tiny backbone, and at its paper's size.

    python ci/rehearsal.py  # `make rehearsal`: all rows; half an hour on two cores
    python ci/rehearsal.py --only ide,can/table4

Three passes, through the row's own notebook, cell by cell, in one IPython for all rows of it:

small   the smoke profile with batches of 8 and three steps, evaluation, pictures, record; timed,
        its memory measured
count   profile paper's network and image size, the loss of the smallest batch forward, its
        multiply-adds and stored activations counted; what convolutions give is drawn, not computed
step    instead of the count, for one row of each paper: a whole training step and evaluation at
        that size, timed

The report lies in runs/rehearsal and grows with each call; without a failure in it,
results/costs/rows.json is written, from which `make plan` estimates. Rows that the report knows
nothing about keep the costs that stand there, where they are of the same device.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).resolve().parents[1]
COSTS = ROOT / "results" / "costs" / "rows.json"
# 16 people train: the largest batch of a row
TOWN = {"identities": 24, "images_per_identity": 4, "junk": 2, "distractors": 2, "seed": 11}
SMALL = {"batch_size": 8, "epochs": 1, "steps": 3}
OF_PAPER = {
    "casn": {"batch_size": 4},  # pairs
    "minet": {"fc_batch": 8, "pretrain": 1, "components": 4, "sift_components": 4, "sift_pca": 16},
}
# the smallest image whose maps hold 5×5 patches
OF_ROW = {row: {"width": 96} for row in ("ianet/k5", "ianet/k5_cosine")}
COUNTED = 4  # images at full size; twice as many where a batch needs two people of four
STEPPED = (
    "ide/ide_plus", "pcb/pcb", "minet/minet", "dcc/dcc", "casn/casn_ide", "ianet/ianet", "can/can",
)
# an estimate holds for these
SETTINGS = ("backbone", "height", "width", "epochs", "pretrain", "batch_size", "fc_batch")


class Enough(Exception):
    "Ends a training whose numbers are known."


# ---------------------------------------------------------------- in one notebook's process


def _images(batch) -> int:
    return len(batch) if hasattr(batch, "shape") else 2 * len(batch[0])


def drawn_convolutions():
    """A mode in which convolutions give numbers drawn at random in the right shape: what is counted
    stays, nine tenths of the time go.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Drawn(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function is not torch.ops.aten.convolution.default:
                return function(*arguments, **(options or {}))
            x, weight, bias, *rest = arguments
            there = function(
                x.to("meta"), weight.to("meta"), None if bias is None else bias.to("meta"), *rest
            )
            return torch.rand_like(there, device=x.device)

    return Drawn()


def counted(call: Callable, drawn: bool = False) -> tuple[object, float, float]:
    """(result, multiply-adds of convolutions and matrix products, MiB of activations stored for the
    gradient) of a call.

    `drawn`: without the arithmetic of convolutions."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    stored = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if not tensor.is_leaf or not tensor.requires_grad:  # parameters are counted elsewhere
            stored[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with drawn_convolutions() if drawn else nullcontext(), hooks, FlopCounterMode(
        display=False
    ) as counter:
        result = call()
    return result, counter.get_total_flops() / 2, sum(stored.values()) / 2**20


class Probe:
    """Stands in for `train` and `open_data` among the names of a notebook that runs, and keeps what
    it saw; `names`: what to call instead.
    """

    def __init__(self, town: str):
        self.town = town
        self.names = {"train": self.train, "open_data": self.open_data}

    def begin(self, mode: str, paper: str, settings: dict) -> None:
        "`mode`: small, count or step; `settings`: of the row, with its full batch sizes."
        self.mode, self.paper, self.settings = mode, paper, settings
        self.stages, self.pair_macs = [], 0.0

    def open_data(self, config):
        "Whatever benchmark a row trains on, it is the town under another name."
        from dataclasses import replace
        from types import SimpleNamespace

        from reid_repro.datasets import cross_domain
        from reid_repro.lab.runs import open_data

        target = open_data(SimpleNamespace(**{**vars(config), "source": ""}))
        source = getattr(config, "source", "")
        return cross_domain(replace(target, name=source), target) if source else target

    def _pair_macs(self, model, size: tuple[int, int]) -> float:
        "What ranking one more pair costs, by the paper's own way of ranking images."
        from types import SimpleNamespace

        from reid_repro.lab.compare import search_cost
        from reid_repro.lab.methods import METHODS

        rank = METHODS[self.paper].rank
        if rank is None:
            return 0.0
        config = SimpleNamespace(**{**self.settings, "shortlist": 0})
        options = {"device": "cpu", "memory": 2**30}
        with drawn_convolutions() if self.mode == "count" else nullcontext():
            cost = search_cost(lambda *sides: rank(model, config, *sides, options), size)
        return float(cost.pair)

    def _count(self, objective: Callable, network, batch, get_images: Callable) -> tuple:
        "Terms of a batch's loss, and per image multiply-adds and MiB stored."
        from reid_repro.dcc import DCC

        def count(batch):
            return counted(partial(objective, network, batch, get_images), self.mode == "count")

        n = _images(batch)
        terms, macs, stored = count(batch)
        # every unknown meets every reference: per image in a batch of full size
        if isinstance(network, DCC) and hasattr(batch, "shape") and self.mode != "small":
            square = max(0.0, (macs - 2 * count(batch[: n // 2])[1]) / (n * n / 2))
            macs = n * (macs / n + square * (self.settings["batch_size"] - n))
        return terms, {"images": n, "macs_per_image": macs / n, "stored_mib_per_image": stored / n}

    def train(self, model, objective, images, batches, *arguments, **options):
        "Trains as `training.train` does; the first step is counted, and in the pass `count` alone."
        from reid_repro.learning.training import train
        from reid_repro.learning.vgg import FCCNN

        first = isinstance(model, FCCNN)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        stage = {"what": "pretrain" if first else "epochs", "parameters": parameters}
        self.stages.append(stage)
        times = []

        def measured(network, batch, get_images):
            # of this process's one thread: other work on the machine adds nothing
            times.append(time.process_time())
            if len(times) > 1:
                return objective(network, batch, get_images)
            terms, counts = self._count(objective, network, batch, get_images)
            stage.update(counts)
            if self.mode == "small":
                stage["passes"] = len(batches) * stage["images"] / len(images)
            if self.mode == "count":
                raise Enough
            return terms

        if self.mode != "small":
            options["out"] = None  # a checkpoint of this size is written on no step
        history = []
        with suppress(Enough):
            history = train(model, measured, images, batches, *arguments, **options)
            times.append(time.process_time())
            # the first carries the counting, the last a checkpoint
            middle = times[2] - times[1] if len(times) > 3 else times[1] - times[0]
            stage["step_seconds"] = middle
        if not first:
            self.pair_macs = self._pair_macs(model, images.shape[2:])
        return history


def _memory(reset: bool = False) -> float:
    """Largest resident memory of this process in MiB, since the last reset where the system can
    forget it.
    """
    import resource

    if reset:
        gc.collect()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )


def _shell():
    "An IPython that keeps its history to itself: `resolve` looks into `In` for what was injected."
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    import matplotlib

    matplotlib.use("agg")
    return InteractiveShell.instance(config=Config(HistoryManager={"hist_file": ":memory:"}))


def execute(shell, notebook, parameters: dict, names: dict, whole: bool = True) -> None:
    """Code cells of a notebook in a fresh namespace, as papermill would; raises what a cell raises.

    `names`: what stands there for names that the notebook imports. Not `whole`: up to the last cell
    that trains.
    """
    from IPython.utils.capture import capture_output
    from matplotlib import pyplot
    from papermill.parameterize import parameterize_notebook

    cells = parameterize_notebook(notebook, parameters).cells
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    if not whole:
        last = max(n for n, source in enumerate(sources) if re.search(r"\btrain\(", source))
        sources = sources[: last + 1]
    try:
        for source in sources:
            with capture_output():
                shell.run_cell(source, store_history=True).raise_error()
            shell.user_ns.update({name: names[name] for name in names if name in shell.user_ns})
            pyplot.close("all")
    finally:
        shell.reset()
        # they hold the notebook's tensors
        sys.last_exc = sys.last_value = sys.last_traceback = None


def fewest_images(parameters: dict) -> int:
    "The smallest batch at full size: two people where several photographs of each belong together."
    return max(COUNTED, 2 * parameters.get("instances", 0))


def settings(paper: str, row, profile: str) -> dict:
    "What the notebook's defaults, a profile and a row make of the parameters."
    from reid_repro.lab.configuration import declared
    from reid_repro.lab.rows import read_profile

    defaults = {name: default for name, (_, default) in declared(ROOT / row.notebook).items()}
    larger = OF_ROW.get(f"{paper}/{row.name}", {}) if profile == "smoke" else {}
    return {**defaults, **read_profile(profile).of(paper, row.name), **larger, **row.set}


def passes(row) -> list[str]:
    trained = row.set.get("epochs", 1) or (row.paper == "minet" and row.set.get("pretrain", 1))
    return (
        ["small", "step" if f"{row.paper}/{row.name}" in STEPPED else "count"]
        if trained
        else ["small"]
    )


def injected(row, mode: str, town: str, out: str) -> dict:
    "The parameters that a pass injects; what the row itself sets stays out."
    from reid_repro.lab.rows import read_profile

    profile = "smoke" if mode == "small" else "paper"
    given = dict(
        read_profile(profile).of(row.paper, row.name), row=row.name, dataset="toytown",
        data_root=town, profile=profile, out=out, resume=False, device="cpu", weights="random",
        start_from="none" if row.start else "", pictures="toytown" if mode == "small" else "none",
    )
    if mode == "small":
        given |= SMALL | OF_PAPER.get(row.paper, {}) | OF_ROW.get(f"{row.paper}/{row.name}", {})
    else:
        fewest = fewest_images(settings(row.paper, row, profile))
        given |= {
            "batch_size": fewest // 2 if row.paper == "casn" else fewest, "precision": "float32",
        }
        given |= {"steps": 1} if mode == "step" else {}
        given |= {"fc_batch": 4} if row.paper == "minet" else {}
    return {key: value for key, value in given.items() if key not in row.set}


def rehearse(paper: str, names: list[str], town: str, out: str) -> None:
    "All passes of some rows of a notebook; one line of JSON for each on the standard output."
    import torch
    from papermill.iorw import load_notebook_node
    from reid_repro.lab import runs
    from reid_repro.lab.rows import read_rows

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    # Toytown sets no people aside to stop by: the test people stand in for them
    runs.validation_people = runs.open_data
    rows = {row.name: row for row in read_rows(paper)}
    notebook = load_notebook_node(str(ROOT / rows[names[0]].notebook))
    shell, probe, line = _shell(), Probe(town), sys.stdout
    for row in map(rows.get, names):
        for mode in passes(row):
            wanted = settings(paper, row, "smoke" if mode == "small" else "paper")
            probe.begin(mode, paper, wanted)
            error, started, worked = "", time.perf_counter(), time.process_time()
            _memory(reset=True)
            try:
                given = injected(row, mode, town, f"{out}/{paper}/{row.name}/{mode}")
                execute(shell, notebook, given, probe.names, whole=mode != "count")
            except BaseException as fault:
                if isinstance(fault, KeyboardInterrupt):
                    raise
                error = (
                    f"{type(fault).__name__}:"
                    f" {str(fault).strip().splitlines()[-1] if str(fault).strip() else ''}"
                )
            found = {
                "paper": paper, "row": row.name, "pass": mode, "error": error,
                "seconds": round(time.perf_counter() - started, 1),
                "cpu_seconds": round(time.process_time() - worked, 1),
                "memory_mib": round(_memory()), "stages": probe.stages,
                "pair_macs": probe.pair_macs,
                "settings": {key: wanted[key] for key in SETTINGS if key in wanted},
            }
            print(json.dumps(found), file=line, flush=True)
            probe.stages = []


# ---------------------------------------------------------------- the whole


def _process(paper: str, names: list[str], town: str, out: str, say: Callable) -> None:
    """Rehearses rows of one notebook in a process of its own; rows that it did not reach are
    failures, too.
    """
    from reid_repro.lab.rows import read_rows

    command = [
        sys.executable, str(Path(__file__)), "--paper", paper, "--only", ",".join(names), "--town",
        town, "--out", out,
    ]
    environment, reached = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}, set()
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
    ) as process:
        for line in process.stdout:
            found = json.loads(line)
            reached.add((found["row"], found["pass"]))
            say(found)
        process.wait()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [""])[-1]
    rows = {row.name: row for row in read_rows(paper)}
    expected = [(name, mode) for name in names for mode in passes(rows[name])]
    for name, mode in expected:
        if (name, mode) not in reached:
            error = f"its process ended with {process.returncode}: {last}"
            say(
                {
                    "paper": paper, "row": name, "pass": mode, "error": error, "seconds": 0.0,
                    "memory_mib": 0, "stages": [],
                }
            )


def _line(found: dict) -> str:
    name = f"{found['paper']}/{found['row']}"
    steps = [s["step_seconds"] for s in found["stages"] if "step_seconds" in s]
    macs = sum(s.get("macs_per_image", 0.0) for s in found["stages"])
    step = f"{sum(steps):8.3f} s/step" if steps else " " * 15
    result = (
        f"FAILED {found['error']}"
        if found["error"]
        else f"{found['memory_mib']:6,} MiB  {step}  {macs / 1e9:7.3f} G/image"
    )
    return f"{name:32s} {found['pass']:6s} {found['seconds']:6.1f} s  {result}"


def costs(lines: list[dict]) -> dict:
    """{paper/row: what the passes measured and counted} of rows with all their passes, for the
    estimates of `make plan`.
    """
    from reid_repro.lab.rows import chosen_rows

    table, wanted = {}, {f"{row.paper}/{row.name}": len(passes(row)) for row in chosen_rows()}
    for line in lines:
        place = table.setdefault(f"{line['paper']}/{line['row']}", {})
        keys = ("memory_mib", "settings", "pair_macs")
        def short(value):
            return float(f"{value:.4g}") if isinstance(value, float) else value
        stages = [
            {k: short(v) for k, v in stage.items() if v is not None} for stage in line["stages"]
        ]
        place["small" if line["pass"] == "small" else "full"] = {
            k: short(line[k]) for k in keys
        } | {
            "seconds": line.get("cpu_seconds", line["seconds"]), "stages": stages,
            "pass": line["pass"],
        }
    return {name: places for name, places in sorted(table.items()) if len(places) == wanted[name]}


def kept_costs(lines: list[dict], device: str) -> dict:
    """{paper/row: …} of the committed costs that this report says nothing about: rows that still
    exist, measured on the same device.
    """
    from reid_repro.lab.rows import chosen_rows

    if not COSTS.is_file():
        return {}
    earlier = json.loads(COSTS.read_text(encoding="utf-8"))
    if earlier["device"] != device:
        return {}
    told = {f"{line['paper']}/{line['row']}" for line in lines}
    names = {f"{row.paper}/{row.name}" for row in chosen_rows()} - told
    return {name: row for name, row in earlier["rows"].items() if name in names}


def _report(folder: Path, rows: set[tuple[str, str]]) -> dict[tuple[str, str, str], dict]:
    """Lines of an earlier report, without those of `rows`, which are rehearsed now, and of rows
    that are gone.
    """
    from reid_repro.lab.rows import chosen_rows

    path, there = folder / "report.json", {(row.paper, row.name) for row in chosen_rows()}
    lines = json.loads(path.read_text(encoding="utf-8"))["lines"] if path.is_file() else []
    keys = [(line["paper"], line["row"], line["pass"]) for line in lines]
    return {key: line for key, line in zip(keys, lines) if key[:2] in there - rows}


def rehearsal(only: str, out: str, cores: int) -> int:
    """Rehearses rows, prints and writes the report, to which earlier rows belong too; the number of
    failures in it.
    """
    from reid_repro.lab.provenance import run_provenance
    from reid_repro.lab.rows import chosen_rows
    from reid_repro.toytown import toytown_root

    started, rows, provenance = time.perf_counter(), chosen_rows(only), run_provenance("cpu")
    town, folder = str(toytown_root(**TOWN)), ROOT / out
    folder.mkdir(parents=True, exist_ok=True)
    lines, writing = _report(folder, {(row.paper, row.name) for row in rows}), Lock()
    papers = {}
    for row in rows:
        papers.setdefault(row.paper, []).append(row.name)

    def say(found: dict) -> None:
        "Prints a line and writes it down at once: what is done survives whatever happens later."
        with writing:
            print(_line(found), flush=True)
            key = found["paper"], found["row"], found["pass"]
            lines[key] = found | {"commit": provenance["commit"]}
            content = {
                "device": provenance["device"], "versions": provenance["versions"],
                "lines": list(lines.values()),
            }
            (folder / "report.json.new").write_text(json.dumps(content, indent=1) + "\n")
            (folder / "report.json.new").replace(folder / "report.json")

    # the longest first
    order = sorted(
        papers,
        key=lambda paper: -len(papers[paper]) * (2 if paper in ("minet", "dcc", "can") else 1),
    )
    with ThreadPoolExecutor(max(1, cores)) as pool:
        list(pool.map(lambda paper: _process(paper, papers[paper], town, out, say), order))
    every = [lines[key] for key in sorted(lines)]
    failed = [line for line in every if line["error"]]
    absent = len(chosen_rows()) - len({key[:2] for key in lines})
    minutes = (time.perf_counter() - started) / 60
    summary = (
        f"{len(rows)} rows in {minutes:.0f} minutes; of all rows {len(failed)} passes failed,"
        f" {absent} rows were not rehearsed yet"
    )
    (folder / "report.md").write_text(
        f"# Rehearsal\n\n{summary}. {provenance['device']}.\n\n```\n"
        + "\n".join(map(_line, every))
        + "\n```\n"
    )
    print(f"\n{summary}; the report is {out}/report.md and report.json")
    for line in failed:
        print(f"FAILED {line['paper']}/{line['row']} ({line['pass']}): {line['error']}")
    if not failed:
        COSTS.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "device": provenance["device"], "commit": provenance["commit"],
            "town_images": sum(1 for _ in Path(town).rglob("*.jpg")),
        }
        table = kept_costs(every, provenance["device"]) | costs(every)
        content["rows"] = dict(sorted(table.items()))
        COSTS.write_text(json.dumps(content, indent=1) + "\n")
        print(
            "costs are written to"
            f" {COSTS.relative_to(ROOT) if COSTS.is_relative_to(ROOT) else COSTS}: commit them"
        )
    return len(failed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="")
    parser.add_argument("--out", default="runs/rehearsal")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    for inner in ("--paper", "--town"):
        parser.add_argument(inner, default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    try:
        if given.paper:
            rehearse(given.paper, given.only.split(","), given.town, given.out)
        else:
            sys.exit(rehearsal(given.only, given.out, given.cores) > 0)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


if __name__ == "__main__":
    main()
