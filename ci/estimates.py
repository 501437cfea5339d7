"""What a job takes: measured where the ledger holds it, else estimated from the rehearsal's counts
in results/costs/rows.json.

On a GPU: multiply-adds · images · epochs over an assumed share of a named GPU's rate. On a CPU: the
rehearsal's own time per multiply-add.
Three forward passes make a training step. Convolutions and matrix products are counted; what else a
step does is in the share.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

import pandas as pd

from reid_repro.datasets import BENCHMARKS
from reid_repro.lab.configuration import declared
from reid_repro.lab.costs import training_hours
from reid_repro.lab.rows import Job, Profile
from reid_repro.learning.batches import passes_for

ROOT = Path(__file__).resolve().parents[1]
COSTS = ROOT / "results" / "costs" / "rows.json"
# multiply-adds per second in bf16 as published; shares that trainings reach
GPU, GPU_RATE, SHARE = "NVIDIA A100", 156e12, (0.05, 0.2)
START = 20.0  # seconds until a run's first step: imports, model, data set
PER_IMAGE = 0.001  # seconds to decode a photograph
ASSUMED = (
    f"estimates: counted multiply-adds · images · epochs, at {SHARE[0]:.0%} to {SHARE[1]:.0%} of"
    f" the {GPU_RATE / 1e12:.0f} T/s (bf16) of one {GPU}, the middle of both shown; memory: weights"
    " and Adam's state, stored activations, training photographs"
)

ASSUMED_CPU = (
    "estimates: counted multiply-adds, or photographs, at the speed of the rehearsal, on one core"
)


@dataclass(frozen=True)
class Estimate:
    """Seconds and MiB of a job with where they come from; None where nothing is known, and `source`
    says why.
    """

    seconds: float | None
    memory_mib: float | None
    source: str  # "measured …", "estimated" or the reason for no number
    score: str = ""  # rank-1 / mAP of the ledger entry of this very job


def read_costs(path: Path = COSTS) -> dict:
    """What the rehearsal wrote: {"device", "commit", "rows": {paper/row: …}}; no rows where there
    is no file.
    """
    return (
        json.loads(path.read_text(encoding="utf-8"))
        if path.is_file()
        else {"device": "", "rows": {}}
    )


def budget(text: str) -> float:
    "Seconds of \"90s\", \"25m\", \"2h\", \"1h30m\"; ValueError for anything else, and for nothing."
    match = re.fullmatch(
        r"(?:(\d{1,4}(?:\.\d+)?)h)?(?:(\d{1,5}(?:\.\d+)?)m)?(?:(\d{1,7}(?:\.\d+)?)s)?",
        text.strip(), re.ASCII,
    )
    seconds = (
        sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1)))
        if match
        else 0.0
    )
    if seconds <= 0:
        raise ValueError(
            f"BUDGET={text!r} is no length of time above zero; write it as 90s, 25m, 2h or 1h30m"
        )
    return seconds


def duration(seconds: float | None) -> str:
    "Short words for a length of time."
    if seconds is None:
        return "–"
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


@cache
def _defaults(notebook: str) -> dict:
    return {name: default for name, (_, default) in declared(ROOT / notebook).items()}


def parameters(job: Job) -> dict:
    "What a job runs with: the notebook's defaults, the profile's and the row's own."
    return {**_defaults(job.row.notebook), **job.parameters, **job.row.set}


def same(job: Job, run: dict) -> bool:
    """Whether a ledger entry's parameters are this job's; a parameter that did not exist then does
    not count.
    """
    wanted = {**job.parameters, **job.row.set, "steps": 0}
    return all(run[key] == value for key, value in wanted.items() if key in run)


def _images(job: Job, settings: dict) -> tuple[int, int, int]:
    """Train, query and gallery images of a job; fewer where settings are chosen among training
    people.
    """
    benchmark = BENCHMARKS[job.dataset]
    if not settings.get("held_out") or not benchmark.people:
        return benchmark.images
    train = benchmark.images[0]
    each = train / benchmark.people
    searched = round(each * settings["held_out"])
    learnt = round(each * settings["people"]) if settings["people"] else train - searched
    return learnt, searched, searched


def _multiply_adds(job: Job, costs: dict, place: str) -> tuple[float, float, float]:
    """Multiply-adds of all training, of evaluation, and MiB of the largest stage; `place`: the
    small or the full pass.
    """
    rehearsed, settings = costs[place], parameters(job)
    train, query, gallery = _images(job, settings)
    train = BENCHMARKS[settings["source"]].images[0] if settings.get("source") else train
    small = rehearsed["settings"]
    area = settings["height"] * settings["width"] / (small["height"] * small["width"])
    training, forward, memory = 0.0, 0.0, 0.0
    repeats = passes_for(train, settings["batch_size"], settings.get("epoch_steps", 0))
    for number, stage in enumerate(rehearsed["stages"]):
        # images seen per epoch, in parts of the data set
        passes = repeats * costs["small"]["stages"][number].get("passes", 1.0)
        training += 3 * stage["macs_per_image"] * area * train * passes * settings[stage["what"]]
        forward = stage["macs_per_image"] * area
        batch = settings["fc_batch" if stage["what"] == "pretrain" else "batch_size"] * (
            2 if job.row.paper == "casn" else 1
        )
        stored = (
            batch
            * stage["stored_mib_per_image"]
            * area
            * (0.5 if settings.get("precision") == "bf16" else 1.0)
        )
        memory = max(memory, stored + 16 * stage["parameters"] / 2**20)
    pairs = min(gallery, settings.get("shortlist") or gallery) * query
    evaluation = (query + gallery) * forward + pairs * rehearsed["pair_macs"] * area
    return training, evaluation, memory + train * 3 * settings["height"] * settings["width"] / 2**20


def _cpu_rate(costs: dict, place: str) -> float:
    "Multiply-adds per second that training reached in a row's rehearsal."
    stages = [stage for stage in costs[place]["stages"] if stage.get("step_seconds")]
    took = sum(stage["step_seconds"] for stage in stages)
    return (
        sum(3 * stage["macs_per_image"] * stage["images"] for stage in stages) / took
        if took
        else 0.0
    )


def estimated(job: Job, table: dict, gpu_rate: float | None) -> Estimate:
    """From the rehearsal alone; `gpu_rate`: multiply-adds per second of the GPU that runs it, None
    for a CPU.
    """
    costs = table["rows"].get(f"{job.row.paper}/{job.row.name}")
    if costs is None:
        return Estimate(None, None, "not rehearsed: make rehearsal")
    if not BENCHMARKS[job.dataset].images:
        return Estimate(None, None, "no estimate: number of images unknown")
    settings = parameters(job)
    images = sum(_images(job, settings))
    place = "small" if settings["backbone"] == "tiny" or "full" not in costs else "full"
    if not costs[place]["stages"]:  # nothing is trained: by the rehearsal's time per photograph
        small = costs[place]["settings"]
        area = settings["height"] * settings["width"] / (small["height"] * small["width"])
        seconds = images * max(1.0, area) * costs["small"]["seconds"] / table["town_images"]
        return Estimate(START + seconds, costs["small"]["memory_mib"], "estimated")
    if costs[place]["settings"]["backbone"] != settings["backbone"]:
        return Estimate(None, None, f"rehearsed with {costs[place]['settings']['backbone']} alone")
    training, evaluation, memory = _multiply_adds(job, costs, place)
    if gpu_rate is None:
        rates = [
            rate
            for row in table["rows"].values()
            if place in row and (rate := _cpu_rate(row, place))
        ]
        rate = _cpu_rate(costs, place) or (median(rates) if rates else 0.0)
        if not rate:
            return Estimate(None, None, "no estimate: no step of this size was rehearsed on a CPU")
        seconds, floor = (training + evaluation) / rate, costs["small"]["memory_mib"]
    else:
        seconds = 3600 * training_hours(int(training + evaluation), 1, 1, gpu_rate, SHARE).likely
        floor = 500.0
    return Estimate(START + PER_IMAGE * images + seconds, floor + memory, "estimated")


def estimates(
    jobs: Sequence[Job], runs: pd.DataFrame, profile: Profile, table: dict, gpu_rate: float | None
) -> dict[str, Estimate]:
    """{job's name: Estimate}: from the ledger's entry of this job, of the same row with another
    seed on such a device, or the rehearsal.

    `runs`: `read_ledger()`; `gpu_rate` as in `estimated`.
    """
    runs = runs[runs["profile"] == profile.name]
    known = (
        {
            place: list(group.to_dict("records"))
            for place, group in runs.groupby(["paper", "row", "dataset"])
        }
        if len(runs)
        else {}
    )
    found = {}
    for job in jobs:
        entries = [
            r
            for r in known.get((job.row.paper, job.row.name, job.dataset), [])
            if same(job, r["parameters"])
        ]
        same_seed = [r for r in entries if r["seed"] == job.seed]
        others = [r for r in entries if r["device"].endswith("threads") == (gpu_rate is None)]
        if same_seed:
            run = same_seed[-1]
            source, score = f"measured, {run['device']}", f"{run['rank1']:.1f} / {run['mAP']:.1f}"
            found[job.name] = Estimate(run["wall_seconds"], run["peak_memory_mib"], source, score)
        elif others:
            seconds, memory = (
                sum(r[key] for r in others) / len(others)
                for key in ("wall_seconds", "peak_memory_mib")
            )
            found[job.name] = Estimate(seconds, memory, "measured, other seeds")
        else:
            found[job.name] = estimated(job, table, gpu_rate)
    return found


def by_priority(jobs: Sequence[Job], known: dict[str, Estimate]) -> list[Job]:
    """Headline rows and baselines first, then other printed rows, then our own; first seeds before
    further ones; cheap before dear.
    """
    def key(job: Job):
        seconds = known[job.name].seconds
        return job.row.priority, job.seed, seconds is None, seconds or 0.0, job.name

    return sorted(jobs, key=key)


def choose(
    jobs: Sequence[Job], known: dict[str, Estimate], left: float, factor: float = 1.0,
    at_once: int = 1,
) -> list[Job]:
    """The first `at_once` of `jobs` that end within `left` seconds; `factor`: how much longer than
    estimated runs took so far.
    """
    return [
        job
        for job in jobs
        if known[job.name].seconds is not None and known[job.name].seconds * factor <= left
    ][:at_once]


def cheapest(
    jobs: Sequence[Job], known: dict[str, Estimate], factor: float = 1.0
) -> tuple[Job, float] | None:
    "The job that ends first and its seconds, None where nothing is known of any."
    priced = [
        (known[job.name].seconds * factor, job)
        for job in jobs
        if known[job.name].seconds is not None
    ]
    seconds, job = min(priced, key=lambda pair: pair[0], default=(0.0, None))
    return job and (job, seconds)


def totals(jobs: Sequence[Job], known: dict[str, Estimate], unit: str) -> list[str]:
    "Sums in words: what is measured, what is estimated, what is unknown."
    lines = []
    for start, what in (("measured", "measured"), ("estimated", "estimated")):
        some = [known[job.name] for job in jobs if known[job.name].source.startswith(start)]
        if some:
            hours = sum(e.seconds for e in some) / 3600
            most = max(e.memory_mib for e in some) / 1024
            lines.append(
                f"{len(some)} {what}: {hours:,.1f} {unit} hours, at most {most:.1f} GiB each"
            )
    unknown = sum(known[job.name].seconds is None for job in jobs)
    return lines + ([f"{unknown} without an estimate"] if unknown else [])
