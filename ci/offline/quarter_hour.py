"""A quarter of an hour on a GPU: checks, throughput, then as many runs as fit, most worth first.

    python ci/offline/quarter_hour.py --budget 15m --data ~/data --weights ~/weights --out home
    python ci/offline/quarter_hour.py --budget 4m --pretend 8000   # a rehearsal, on a CPU

For a node that one gets for minutes. Needs torch, this project and papermill (a bundle's node has
them), neither Snakemake nor a network. Nothing is started that would outlive the budget by its
estimate; what still runs when it ends is stopped, and is no result. `--out` then holds runs.tar
(ledger entry, notebook and page of every finished run: unpack it, `make publish RUNS=…`),
checks.json, throughput.json, left_out.json, log.txt.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

RESERVE = 15.0  # seconds to pack what has run
START = 12.0  # seconds until a run's first step: a kernel, imports, photographs
EMBEDDING = 3.0  # images that are only embedded, in the time that one takes to train on
# images whose pairs with others are scored, in the time of one image trained on: dear for two
PAIRS = {"minet": 4000.0, "dcc": 2000.0}
HEADLINES = (
    "ide/ide", "ide/ide_plus", "pcb/pcb", "ianet/ianet", "casn/casn_ide", "can/can", "dcc/dcc",
    "minet/minet",
)
# profile, data set ("": the rows' own), rows, seeds: most worth first
STAGES = (
    ("short", "cuhk03-np-detected", HEADLINES[:6], 5),
    ("short", "cuhk03-1160-detected", HEADLINES[6:], 5),
    ("short", "market1501-train-only", HEADLINES[:6], 5),
)
REHEARSED = (("smoke", "toytown", ("ide/pixels", *HEADLINES[:3], "ianet/sia_cia"), 2),)
SIZES = ((256, 128), (128, 64))
PEOPLE, BATCH = 64, 64


class Log:
    "Prints lines with the time since the start, and keeps them in a file."

    def __init__(self, path: Path, budget: float, clock: Callable[[], float] = time.monotonic):
        self.path = path
        self.budget = budget
        self.clock = clock
        self.began = clock()
        path.write_text("", encoding="utf-8")

    def left(self) -> float:
        "Seconds of the budget that remain."
        return self.budget - (self.clock() - self.began)

    def __call__(self, text: str) -> None:
        line = f"{self.clock() - self.began:6.1f} s  {text}"
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


# ------------------------------------------------------------------------------ the networks


def _settings(paper: str, row: str, profile: str, **others) -> dict:
    "What a row's notebook would be given."
    from estimates import parameters

    from reid_repro.lab.rows import plan

    jobs = plan(profile, f"{paper}/{row}", dataset="toytown")
    return {**parameters(jobs[0]), "weights": "random", **others}


def _objective(paper: str, settings: dict, labels) -> tuple:
    "(objective, batches) of a method, on images of `labels`."
    from types import SimpleNamespace

    from reid_repro.can import can_objective
    from reid_repro.casn import casn_objective
    from reid_repro.dcc import dcc_objective
    from reid_repro.ide import ide_objective
    from reid_repro.lab.runs import sampler
    from reid_repro.learning.batches import IdentityBatches, PairBatches
    from reid_repro.minet import minet_objective
    from reid_repro.pcb import pcb_objective

    pids, batch = labels.numpy() + 1, settings["batch_size"]
    smoothing = settings.get("smoothing", 0.0)
    if paper == "casn":
        objective = casn_objective(labels, smoothing=smoothing)
        return objective, PairBatches(pids, batch, 0.5, 0)  # pairs
    if paper == "dcc":
        return dcc_objective(), IdentityBatches(pids, batch // 2, 2, 0)
    objectives = {
        "ide": lambda: ide_objective(labels, smoothing=smoothing),
        "ianet": lambda: ide_objective(labels, smoothing=smoothing),
        "pcb": lambda: pcb_objective(labels, smoothing=smoothing),
        "can": lambda: can_objective(labels),
        "minet": lambda: minet_objective(labels, chunk=settings.get("chunk", 256)),
    }
    config = SimpleNamespace(**{**settings, "batch_size": batch, "seed": 0})
    return objectives[paper](), sampler(config, _People(pids))


@dataclass
class _People:
    "As much of a `Split` as a sampler asks for."

    pids: object

    def __len__(self) -> int:
        return len(self.pids)


def _task(headline: str, profile: str, size: tuple[int, int], backbone: str = "") -> tuple:
    "(model, objective, batches, images, settings) of a headline row on made-up photographs."
    import torch

    from reid_repro.lab.methods import build

    paper, _, row = headline.partition("/")
    settings = _settings(paper, row, profile, height=size[0], width=size[1])
    settings["batch_size"] = BATCH // 2 if paper == "casn" else BATCH
    if backbone:
        settings["backbone"] = backbone
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(PEOPLE).repeat_interleave(4)
    shape = (len(labels), 3, *size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    torch.manual_seed(0)
    model = build(paper, settings, PEOPLE)
    objective, batches = _objective(paper, settings, labels)
    return model, objective, batches, images, settings


# -------------------------------------------------------------------------------- the checks


def precision_check(headline: str, profile: str, device: str) -> dict:
    """The loss of one batch in bfloat16 beside float32's, the same draws of dropout.

    Args:
        headline: paper/row.
        profile: whose network it is.
        device: "cuda" or "cpu".
    """
    import torch

    from reid_repro.learning.augmentation import normalise

    model, objective, batches, images, _ = _task(headline, profile, (128, 64))
    model.to(device).train()
    pixels, batch = images.to(device), next(iter(batches.epoch(0)))
    losses = {}
    for name in ("float32", "bfloat16"):
        torch.manual_seed(1)
        with torch.autocast(device, torch.bfloat16, enabled=name == "bfloat16"):
            terms = objective(model, batch, lambda rows: normalise(pixels[rows]))
        losses[name] = float(sum(term.float() for term in terms.values()).detach())
    apart = abs(losses["bfloat16"] - losses["float32"]) / abs(losses["float32"])
    return {"row": headline, **losses, "relative": apart, "agree": apart < 0.05}


def resume_check(device: str, folder: Path) -> bool:
    "Whether a training that is killed in its third epoch goes on to the weights of a whole one."
    import torch

    from reid_repro.learning.recipe import Recipe
    from reid_repro.learning.training import train

    recipe = Recipe(epochs=4, batch_size=BATCH, lr=0.01)
    ends = []
    for name, dies in (("whole", False), ("killed", True), ("killed", False)):
        model, objective, batches, images, _ = _task("ide/ide", "smoke", (128, 64))
        calls = iter(range(10_000))

        last = 2 * len(batches) + 1 if dies else -1

        def step(network, batch, get_images, objective=objective, calls=calls, last=last):
            if next(calls) == last:
                raise KeyboardInterrupt
            return objective(network, batch, get_images)

        try:
            train(
                model, step, images, batches, recipe, out=folder / name, device=device,
                name=f"resume check, {name}",
            )
        except KeyboardInterrupt:
            continue
        ends.append([value.cpu() for value in model.state_dict().values()])
    whole, resumed = ends
    return all(torch.equal(a, b) for a, b in zip(whole, resumed))


def throughput(headline: str, profile: str, size: tuple[int, int], compiled: bool, device: str):
    """Images a second of training, and the share of the measured matrix rate that this is.

    Args:
        headline: paper/row.
        profile: whose network it is.
        size: (height, width).
        compiled: by torch.compile.
        device: "cuda" or "cpu".
    """
    import torch

    from reid_repro.lab.costs import matrix_rate, step_multiply_adds
    from reid_repro.learning.recipe import Recipe
    from reid_repro.learning.training import train

    model, objective, batches, images, settings = _task(headline, profile, size)
    batch = next(iter(batches.epoch(0)))
    multiply_adds = step_multiply_adds(model.to(device), objective, batch, size)
    shown = 2 * len(batch[0]) if isinstance(batch, tuple) else len(batch)
    recipe = Recipe(epochs=3, batch_size=settings["batch_size"], lr=1e-5)
    history = train(
        model, objective, images, batches, recipe, device=device, compile=compiled,
        name=f"throughput {headline} {size[0]}×{size[1]}{' compiled' if compiled else ''}",
    )
    seconds = history.seconds.iloc[-1]
    speed = len(batches) * shown / seconds
    rate = matrix_rate(device) if device == "cpu" else matrix_rate(device, repeats=3)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return {
        "row": headline, "height": size[0], "width": size[1], "compiled": compiled,
        "images_per_second": round(speed, 1),
        "share_of_matrix_rate": round(multiply_adds * speed / rate, 4),
    }


# ---------------------------------------------------------------------------------- the runs


@dataclass
class Run:
    "A job on its way: what it was thought to take, its process, and when that began."

    job: Any
    profile: str
    seconds: float
    folder: Path
    process: subprocess.Popen | None = None
    began: float = 0.0


@dataclass
class Speeds:
    """Images a second of training by paper, and how much longer than estimated finished runs took.
    """

    assumed: float
    measured: dict[str, float] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)

    def seconds(self, paper: str, trained: float, embedded: int, pairs: int) -> float:
        "Estimate of a run that trains on so many images (all epochs), embeds and pairs others."
        speed = self.measured.get(paper, self.assumed)
        work = trained + embedded / EMBEDDING + pairs / PAIRS.get(paper, float("inf"))
        return (START + work / speed) * self.factors.get(paper, 1.0)

    def learn(self, paper: str, estimated: float, took: float) -> None:
        "A run of `paper` took so long."
        self.factors[paper] = self.factors.get(paper, 1.0) * took / max(estimated, 1.0)


def estimate(job, speeds: Speeds, steps: int = 0) -> float:
    "Seconds that a job of `rows.plan` takes."
    from estimates import parameters

    from reid_repro.datasets import BENCHMARKS

    settings, (train, query, gallery) = parameters(job), BENCHMARKS[job.dataset].images
    shown = 2 if job.row.paper == "casn" else 1
    epochs = settings["epochs"] + settings.get("pretrain", 0)
    trained = steps * settings["batch_size"] if steps else epochs * train
    if settings.get("features"):  # raw pixels and their like
        trained = 0
    return speeds.seconds(job.row.paper, shown * trained, query + gallery, query * gallery)


def planned(stages, data: str, results: Path) -> Iterator[tuple[str, Any]]:
    """(profile, job) of all stages: seed by seed, so that every method has a number first; without
    what cannot run and what the ledger holds.
    """
    from reid_repro.lab.ledger import read_ledger
    from reid_repro.lab.rows import plan

    ledger = read_ledger(results)
    known = set()
    if len(ledger):
        keys = ["paper", "row", "dataset", "profile", "seed"]
        known = set(ledger[keys].itertuples(index=False, name=None))
    for profile, dataset, rows, seeds in stages:
        jobs = plan(profile, ",".join(rows), data, dataset, seeds)
        for job in sorted(jobs, key=lambda job: job.seed):
            key = (job.row.paper, job.row.name, job.dataset, profile, job.seed)
            if job.skip is None and key not in known:
                yield profile, job


def start(run: Run, given: argparse.Namespace, data: str, weights: str) -> subprocess.Popen:
    "Begins a run in a process group of its own."
    from setup_node import parameters

    asked = parameters(run.job, given, data, weights, str(run.folder.relative_to(ROOT)))
    run.folder.mkdir(parents=True, exist_ok=True)
    pages = [str(run.folder / "notebook.ipynb"), str(run.folder / "notebook.html")]
    words = ["ci/batch.py", "run", run.job.row.notebook, *pages, json.dumps(asked)]
    with (run.folder / "log.txt").open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )


def stop(run: Run) -> None:
    "Ends a run with everything that it started."
    if run.process and run.process.poll() is None:
        os.killpg(run.process.pid, signal.SIGKILL)
        run.process.wait()


class Scheduler:
    """Runs jobs in order, several at once, and starts none that would outlive the budget.

    Args:
        log: with the clock.
        speeds: for estimates; learns from what has run.
        at_once: runs side by side.
        begin: starts a run's process.
        wait: seconds between two looks.
    """

    def __init__(
        self, log: Log, speeds: Speeds, at_once: int, begin: Callable[[Run], subprocess.Popen],
        wait: float = 0.5,
    ):
        self.log = log
        self.speeds = speeds
        self.at_once = at_once
        self.begin = begin
        self.wait = wait
        self.running: list[Run] = []
        self.done: list[Run] = []
        self.failed: list[Run] = []
        self.stopped: list[Run] = []

    def fits(self, run: Run) -> bool:
        "Whether a run would end before the budget does."
        return run.seconds <= self.log.left() - RESERVE

    def look(self) -> None:
        "Takes note of the runs that have ended."
        for run in list(self.running):
            code = run.process.poll() if run.process else 0
            if code is None:
                continue
            self.running.remove(run)
            took = self.log.clock() - run.began
            name, good = run.job.name, code == 0
            (self.done if good else self.failed).append(run)
            if good:
                self.speeds.learn(run.job.row.paper, run.seconds, took)
            self.log(f"{'done  ' if good else 'FAILED'} {name}  {took:.0f} s ({run.seconds:.0f})")

    def run(self, todo: list[Run], again: Callable[[Run], float]) -> list[Run]:
        "Runs what fits; returns what was never begun. `again` estimates anew."
        todo = list(todo)
        while self.log.left() > RESERVE and (self.running or todo):
            self.look()
            for run in todo:
                run.seconds = again(run)
            free = self.at_once - len(self.running)
            for run in [run for run in todo if self.fits(run)][: max(free, 0)]:
                todo.remove(run)
                run.began = self.log.clock()
                run.process = self.begin(run)
                self.running.append(run)
                self.log(f"begun  {run.job.name}  about {run.seconds:.0f} s")
            if not self.running and not any(self.fits(run) for run in todo):
                break
            time.sleep(self.wait)
        self.look()
        for run in self.running:
            stop(run)
            self.stopped.append(run)
            self.log(f"cut    {run.job.name}: the budget is over, it is no result")
        self.running = []
        return todo


def pack(done: list[Run], out: Path, failed: list[Run]) -> Path:
    "Entry, notebook and page of finished runs, and the notebooks of failed ones, in one tar file."
    path = out / "runs.tar"
    with tarfile.open(path, "w") as tar:
        for run in [*done, *failed]:
            shown = ("ledger.json", "notebook.html") if run in done else ("log.txt",)
            names = ("notebook.ipynb", *shown)
            for name in names:
                if (run.folder / name).is_file():
                    inside = f"{run.profile}/{run.job.name}/{name}"
                    tar.add(run.folder / name, inside)
    return path


# ---------------------------------------------------------------------------------- all of it


def check(given: argparse.Namespace, log: Log, out: Path) -> None:
    "Writes checks.json."
    import tempfile

    import torch

    profile = "smoke" if given.pretend else "short"
    found: dict = {"torch": torch.__version__, "device": given.device}
    if given.device == "cuda":
        found["name"] = torch.cuda.get_device_name()
        found["memory_mib"] = torch.cuda.get_device_properties(0).total_memory // 2**20
    found["precision"] = []
    for headline in HEADLINES:
        try:
            found["precision"].append(precision_check(headline, profile, given.device))
        except Exception as error:
            found["precision"].append({"row": headline, "error": f"{error}"})
    with tempfile.TemporaryDirectory() as folder:
        found["resumes"] = resume_check(given.device, Path(folder))
    agree = sum(bool(row.get("agree")) for row in found["precision"])
    log(f"checks: bfloat16 agrees for {agree} of {len(HEADLINES)}; resumes: {found['resumes']}")
    (out / "checks.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measure(given: argparse.Namespace, log: Log, out: Path, speeds: Speeds, share: float) -> None:
    "Writes throughput.json within a share of the budget; eager at the smaller size comes first."
    profile = "smoke" if given.pretend else "short"
    ends, rows = log.left() - share * log.budget, []
    kinds = [(size, compiled) for compiled in (False, True) for size in reversed(SIZES)]
    for size, compiled in kinds:
        for headline in HEADLINES:
            name = f"{headline} {size[0]}×{size[1]}{' compiled' if compiled else ''}"
            if log.left() < ends:
                rows.append({"row": name, "error": "not measured: no time"})
                continue
            try:
                row = throughput(headline, profile, size, compiled, given.device)
            except Exception as error:
                rows.append({"row": name, "error": f"{type(error).__name__}: {error}"})
                log(f"throughput of {name}: {error}")
                continue
            rows.append(row)
            log(f"throughput of {name}: {row['images_per_second']:.0f} images/s")
            paper = headline.partition("/")[0]
            if size == SIZES[1] and not compiled and not given.pretend:
                speeds.measured[paper] = row["images_per_second"]
    (out / "throughput.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def session(given: argparse.Namespace, log: Log, out: Path) -> Scheduler:
    "Checks, throughput and runs; writes what is carried home."
    speeds = Speeds(given.pretend or given.assume)
    check(given, log, out)
    measure(given, log, out, speeds, share=0.2)

    def begin(run: Run) -> subprocess.Popen:
        given.profile = run.profile
        return start(run, given, given.data, given.weights)

    place = ROOT / "runs" / "quarter_hour"
    stages = REHEARSED if given.pretend else STAGES
    todo = [
        Run(job, profile, 0.0, place / profile / job.name)
        for profile, job in planned(stages, given.data, ROOT / "results")
    ]
    log(f"{len(todo)} runs are wanted, {given.at_once} at once")
    scheduler = Scheduler(log, speeds, given.at_once, begin)
    rest = scheduler.run(todo, lambda run: estimate(run.job, speeds, given.steps))
    left_out = [
        {"run": f"{run.profile}/{run.job.name}", "why": why, "seconds": round(run.seconds)}
        for why, runs in (
            ("did not fit", rest), ("cut when the budget ended", scheduler.stopped),
            ("failed", scheduler.failed),
        )
        for run in runs
    ]
    (out / "left_out.json").write_text(json.dumps(left_out, indent=1) + "\n", encoding="utf-8")
    pack(scheduler.done, out, scheduler.failed)
    log(
        f"{len(scheduler.done)} of {len(todo)} runs are done, {len(scheduler.failed)} failed,"
        f" {len(rest) + len(scheduler.stopped)} did not fit; carry '{out}' home"
    )
    return scheduler


def main(arguments: list[str] | None = None) -> int:
    "The command line; the exit status."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", default="15m", help="90s, 15m, 1h")
    parser.add_argument("--data", default="", help="folder of benchmarks")
    parser.add_argument("--weights", default="", help="safetensors file or folder of them")
    parser.add_argument("--out", default="home", help="what is to be carried home")
    parser.add_argument("--at-once", type=int, default=4, help="runs side by side")
    parser.add_argument("--assume", type=float, default=8000.0, help="images a second, until known")
    parser.add_argument(
        "--pretend", type=float, default=0.0,
        help="a rehearsal on the CPU: two steps of smoke rows, as if at so many images a second",
    )
    given = parser.parse_args(arguments)
    import estimates
    from setup_node import environment

    if (ROOT.parent / "site").is_dir():  # a bundle's node
        os.environ.update(environment(ROOT.parent))
    sys.path.insert(0, str(ROOT))
    out = Path(given.out).expanduser().absolute()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("data", "weights"):
        if getattr(given, name):
            setattr(given, name, str(Path(getattr(given, name)).expanduser().absolute()))
    os.chdir(ROOT)
    log = Log(out / "log.txt", estimates.budget(given.budget))
    given.device = "cpu" if given.pretend else "cuda"
    given.steps = 2 if given.pretend else 0
    given.pictures = "none"
    scheduler = session(given, log, out)
    if given.pretend:
        log("a rehearsal: two steps of each run, nothing to publish")
    return int(bool(scheduler.failed))


if __name__ == "__main__":
    sys.exit(main())
