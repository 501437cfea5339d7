"""Nothing is lost: a run killed at any moment ends in the same numbers, a full disk and a lack of memory are told and survived."""

import json
import shutil
import signal
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from made import dies, in_process
from safetensors.torch import load_file
from torch import nn

from reid_repro.checkpoints import read_metadata, read_state
from reid_repro.ide import ide_objective
from reid_repro.ledger import read_ledger
from reid_repro.protocols import answer
from reid_repro.recipe import Recipe
from reid_repro.runs import decode, identity, open_data, record, sampler
from reid_repro.training import embed, train

EPOCHS = 2


class Small(nn.Module):
    "Ten thousand weights, with what makes a resumed run go astray: batch statistics, dropout, an optimiser's memory."

    def __init__(self, identities: int):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d((4, 2)), nn.Flatten())
        self.classifier = nn.Sequential(nn.Dropout(0.3), nn.Linear(64, identities))

    def forward(self, x):
        f = self.backbone(x)
        return (f, self.classifier(f)) if self.training else f


@pytest.fixture(scope="module")
def town(tmp_path_factory) -> Path:
    from reid_repro.toytown import render

    return render(tmp_path_factory.mktemp("data") / "town", identities=12, images_per_identity=4, junk=2, distractors=2, seed=3)


def run(out: Path, town: Path, kill: int = 0, recording: bool = False, **change) -> None:
    "One small run from data to entry. `kill`: dies at this touch of the file system; `recording`: counted from when training is over."
    torch.set_num_threads(1)
    config = SimpleNamespace(
        row="ide", title="IDE", dataset="toytown", data_root=str(town), profile="smoke", seed=0, epochs=EPOCHS, conditions=[], height=32,
        width=16, batch_size=8, instances=0, device="cpu", pictures="none",
    )
    benchmark = open_data(config)
    images, *tested = decode(benchmark, config)
    torch.manual_seed(config.seed)
    model = Small(benchmark.train.num_identities)
    objective, touch = ide_objective(torch.from_numpy(benchmark.train.labels)), lambda: None
    if kill and not recording:
        touch = dies(kill, out)
    history = train(
        model, lambda *given: touch() or objective(*given), images, sampler(config, benchmark.train),
        Recipe(**{"epochs": EPOCHS, "batch_size": 8, "lr": 0.01, "pad": 2, "erase": 0.5} | change), out=out, device="cpu",
        identity=identity(config, benchmark),
    )
    scores = answer(benchmark, *(embed(model, part, device="cpu") for part in tested)).scores
    if kill and recording:
        dies(kill, out)
    record("ide", config, benchmark, scores, history, out, time.perf_counter())


def numbers(out: Path) -> dict:
    "What a finished run came to, without times and places."
    entry = json.loads((out / "ledger.json").read_text())
    losses = {name: values for name, values in entry["history"].items() if name not in ("seconds", "images_per_second")}
    return {key: entry[key] for key in ("metrics", "counts", "epochs", "fingerprint", "parameters")} | {"history": losses}


@pytest.fixture(scope="module")
def whole_run(town, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert in_process(run, out, town) == 0
    return out


def same(out: Path, whole_run: Path) -> None:
    "A finished run like the uninterrupted one, to the bit, and nothing else in its folder."
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, whole_run))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert numbers(out) | {"parameters": 0} == numbers(whole_run) | {"parameters": 0}
    assert sorted(path.name for path in out.iterdir()) == ["ledger.json", "model.safetensors", "tensorboard"]
    assert len(read_ledger(out)) == 1 and read_metadata(out / "model.safetensors")["metrics"] == numbers(out)["metrics"]


def test_a_run_killed_at_any_touch_of_the_file_system_goes_on_to_the_same_numbers(town, whole_run, tmp_path):
    for kill in count(1):
        out = tmp_path / f"killed{kill}"
        status = in_process(run, out, town, kill)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        for checkpoint in out.glob("checkpoint.safetensors"):  # if there is one, it is whole
            assert 1 <= len(read_state(checkpoint)["history"]) <= EPOCHS
        assert len(read_ledger(out)) <= 1 if out.exists() else True
        assert in_process(run, out, town) == 0
        same(out, whole_run)
        shutil.rmtree(out)
    print(kill)
    assert kill > 20
