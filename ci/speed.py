"""The table of docs/speed.md, "How fast is it", from the records in results/bench.

`make readme` writes it; each line is a figure of a record beside its limit and its rivals.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from reid_repro.lab.results import Table

ROOT = Path(__file__).resolve().parents[1]
FORMATS = {  # column of a record → how its numbers are said
    "images/CPU-s": "{:.3g} images a CPU-second", "CPU-s": "{:.3g} CPU-seconds",
    "hours for Market-1501": "{:.0f} core-hours", "minutes": "{:.1f} minutes",
    "minutes to the first table": "{:.1f} minutes",
}


@dataclass(frozen=True)
class Figure:
    """A line of the table: a number of a record, its limit, what it is compared with.

    `row` and `rivals` are what a row of the record must hold. The limit is a number of the column
    (`most`), or holds against the rival `of`: at least `faster` times as fast, or at most `slower`
    times its time.
    """

    what: str
    bench: str
    row: dict
    column: str = "CPU-s"
    rivals: dict[str, dict] = field(default_factory=dict)
    most: float | None = None
    of: str = ""
    faster: float | None = None
    slower: float | None = None

    def value(self, record: dict, row: dict) -> float:
        "The number of the record's row that holds `row`; ValueError where it is not one row."
        found = [line for line in record["rows"] if row.items() <= line.items()]
        if len(found) != 1:
            raise ValueError(f"results/bench/{self.bench}.json: {len(found)} rows hold {row}")
        return found[0][self.column] or 0.0

    def line(self, record: dict) -> dict[str, str]:
        "The line, in words."
        said = FORMATS[self.column].format
        own = self.value(record, self.row)
        rivals = {name: self.value(record, row) for name, row in self.rivals.items()}
        return {
            "what": self.what, "measured": said(own), "limit": self.judged(own, rivals, said),
            "beside it": "; ".join(f"{name}: {said(value)}" for name, value in rivals.items()),
            "measured on": machine(record["hardware"]), "record": f"{self.bench}.json",
        }

    def judged(self, own: float, rivals: dict[str, float], said) -> str:
        "The limit and whether it is kept."
        if self.most is not None:
            return f"{said(self.most)}: {'kept' if own <= self.most else 'NOT kept'}"
        if not self.of:
            return "none set"
        speed = own / rivals[self.of]
        if not self.column.startswith("images"):
            speed = 1 / speed
        if self.faster is not None:
            kept = "kept" if speed >= self.faster else "NOT kept"
            return f"{self.faster:g} × as fast as {self.of}: {kept}, {speed:.2f} ×"
        kept = "kept" if 1 / speed <= self.slower else "NOT kept"
        return f"{self.slower:g} × the time of {self.of}: {kept}, {1 / speed:.2f} ×"


def _training(backbone: str, **limit) -> Figure:
    "Our training of IDE on one backbone beside other loops and its bare convolutions."
    names = {
        "the usual loop": "the usual loop", "like torchreid's": "a loop like torchreid's",
        "like layumi's": "a loop like layumi's", "its bare convolutions": "bare convolutions",
    }
    rows = {
        said: {"what": f"{name}, IDE", "backbone": backbone} for said, name in names.items()
    }
    own = {"what": "ours, IDE", "backbone": backbone}
    what = f"training IDE, {backbone}, 128×64, batches of 32"
    return Figure(what, "training", own, "images/CPU-s", rows, **limit)


def _statement(statement: str, what: str = "") -> Figure:
    "What a statement takes in a process of its own, beside torch's import."
    rival = {"import torch": {"statement": "import torch"}}
    return Figure(what or statement, "imports", {"statement": statement}, rivals=rival)


FIGURES = (
    Figure("make env, with the network", "commands", {"command": "make env"}, "minutes"),
    Figure(
        "make reproduce, every method and its baseline", "commands",
        {"command": "make reproduce"}, "minutes", most=15,
    ),
    Figure(
        "its first table", "commands", {"command": "make reproduce"},
        "minutes to the first table", most=3,
    ),
    Figure("make test", "commands", {"command": "make test"}, "minutes", most=15),
    _training("tiny", of="the usual loop", faster=2),
    _training("resnet50", of="its bare convolutions", slower=1.05),
    Figure(
        "training IANet, tiny", "training", {"what": "ours, IANet", "backbone": "tiny"},
        "images/CPU-s", {"IDE": {"what": "ours, IDE", "backbone": "tiny"}}, of="IDE", slower=1.3,
    ),
    Figure(
        "a step of CAN, ResNet-50", "can", {"what": "step, CAN 1, 3, 5, 7"},
        rivals={"IDE": {"what": "step, IDE"}},
    ),
    Figure(
        "a step of CASN, ResNet-50", "casn", {"what": "step, IDE CASN, closed form"},
        rivals={
            "literal form": {"what": "step, IDE CASN, literal form"},
            "IDE": {"what": "step, IDE plain"},
        },
    ),
    Figure(
        "IANet's relation at stage 2, three contexts", "ianet",
        {"what": "contexts 1, 2, 3: diagonal box", "size": "stage 2: 8x512x32x16"},
        rivals={
            "one context": {"what": "one context", "size": "stage 2: 8x512x32x16"},
            "unfolded": {"what": "contexts 1, 2, 3: unfold", "size": "stage 2: 8x512x32x16"},
        }, of="one context", slower=2,
    ),
    Figure(
        "MI-Net's sweep with gradient", "minet",
        {"what": "sweep with gradient, one axis at a time"},
        rivals={"four loops": {"what": "sweep with gradient, four loops"}},
        of="four loops", faster=10,
    ),
    Figure(
        "MI-Net: all pairs of Market-1501, full size", "minet", {"what": "pairs, in blocks"},
        "hours for Market-1501",
        {
            "blocks with every sweep kept": {"what": "pairs, in blocks, sweeps kept"},
            "one by one": {"what": "pairs, one by one"},
        }, of="blocks with every sweep kept", slower=0.5,
    ),
    Figure(
        "DCC: all pairs of Market-1501, full size", "dcc", {"what": "full size, lean, float32"},
        "hours for Market-1501",
        {
            "folded, as in training": {"what": "full size, folded"},
            "blocked": {"what": "full size, blocked"},
            "pair by pair": {"what": "full size, pair by pair"},
        }, most=20,
    ),
    Figure(
        "the same in bfloat16, where scores may change", "dcc",
        {"what": "full size, lean, bfloat16"}, "hours for Market-1501", most=20,
    ),
    Figure(
        "scores of 3,368 × 19,732 distances", "evaluation",
        {"what": "evaluate", "queries": 3368},
        rivals={"a sort for each query": {"what": "argsort per query, scaled up"}}, most=1,
    ),
    Figure(
        "re-ranking 3,368 × 19,732", "evaluation", {"what": "rerank", "queries": 3368}, most=25
    ),
    Figure(
        "scores against 519,732 images", "evaluation",
        {"what": "evaluate_features, distractors"},
    ),
    *(_statement(f"import reid_repro.{name}") for name in ("ide", "casn", "ianet")),
    _statement("from reid_repro import lab; lab.explore()", "the explorer's first list"),
)


def speed_table(folder: Path = ROOT / "results" / "bench") -> Table:
    "Every figure beside its limit and its rivals; ValueError naming a record that lacks one."
    records = {}
    for name in dict.fromkeys(figure.bench for figure in FIGURES):
        records[name] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    lines = [figure.line(records[figure.bench]) for figure in FIGURES]
    return Table({"How fast is it": pd.DataFrame(lines)})


def machine(hardware: dict) -> str:
    "What a record was measured on, in one line."
    threads = f"{hardware['threads']} thread" + "s" * (hardware["threads"] > 1)
    device = hardware["gpu"] or hardware["cpu"]
    return f"{device}, {hardware['cores']} cores, {threads}, torch {hardware['torch']}"
