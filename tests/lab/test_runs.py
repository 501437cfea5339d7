"""Whole runs and their faults: plain papermill, the batch layer, damaged data, a killed process."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
IDE = ROOT / "nbs/4_baselines/ide/2_reproduce.ipynb"
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


def call(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(c) for c in command], cwd=ROOT, capture_output=True, text=True, timeout=600,
        **{"env": ENVIRONMENT, **options},
    )


def papermill(notebook: Path, output: Path, **parameters) -> subprocess.CompletedProcess:
    given = [word for name, value in parameters.items() for word in ("-p", name, value)]
    return call(
        sys.executable, "-m", "papermill", notebook, output, "--no-progress-bar", "--cwd", ROOT,
        "--inject-paths", *given,
    )


def batch(*command, **options) -> subprocess.CompletedProcess:
    return call(sys.executable, "ci/batch.py", *command, **options)


def snakemake(runs: Path, **config) -> subprocess.CompletedProcess:
    given = [
        f"{key}={value}" for key, value in {"profile": "smoke", "runs": runs, **config}.items()
    ]
    return call(
        "snakemake", "-s", "ci/Snakefile", "--cores", "1", "--nolock", "--keep-going", "--config",
        *given,
    )


@pytest.fixture(scope="module")
def town(tmp_path_factory) -> Path:
    "A very small Toytown, whole."
    from reid_repro.toytown import render

    return render(
        tmp_path_factory.mktemp("data") / "town", identities=12, images_per_identity=4, junk=2,
        distractors=2, seed=3,
    )


@pytest.fixture
def broken(town, tmp_path) -> Path:
    "A copy to damage."
    return Path(shutil.copytree(town, tmp_path / "town"))


# plain papermill, as the README has it


def test_plain_papermill_runs_a_row_and_writes_its_record(town, tmp_path):
    done = papermill(
        IDE, tmp_path / "out.ipynb", row="ide_plus", data_root=town, epochs=1, batch_size=8,
        out=tmp_path / "run",
    )
    assert done.returncode == 0, done.stderr
    entry = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert entry["row"] == "ide_plus" and entry["dataset"] == "toytown" and entry["epochs"] == 1
    # the row's own settings were applied
    assert entry["parameters"]["neck"] == "bn" and entry["parameters"]["triplet"] == 1.0
    assert (tmp_path / "run" / "model.safetensors").exists() and not (
        tmp_path / "run" / "checkpoint.safetensors"
    ).exists()
    shown = nbformat.read(tmp_path / "out.ipynb", 4)
    assert any("image/png" in o.get("data", {}) for c in shown.cells for o in c.get("outputs", []))


@pytest.mark.slow("a run with a kernel")
def test_no_picture_when_pictures_is_none(town, tmp_path):
    done = papermill(
        IDE, tmp_path / "out.ipynb", row="pixels", data_root=town, pictures="none",
        out=tmp_path / "run",
    )
    assert done.returncode == 0, done.stderr
    answers = [
        c
        for c in nbformat.read(tmp_path / "out.ipynb", 4).cells
        if "show_answers(config" in c.source
    ]
    assert len(answers) == 1 and not any(
        "image/png" in o.get("data", {}) for o in answers[0].outputs
    )


# data faults: one clear error naming the file, before any training


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda t: next((t / "bounding_box_test").glob("0009_*")).write_bytes(b"\xff\xd8"),
            ["bounding_box_test", "0009_", "restore"],
        ),
        (lambda t: shutil.rmtree(t / "query"), ["lacks", "query", "unpack"]),
        (
            lambda t: (t / "query" / "img 5.jpg").write_bytes(b""),
            ["img 5.jpg", "person and camera", "Rename or remove"],
        ),
        (
            lambda t: [p.unlink() for p in (t / "bounding_box_train").iterdir()],
            ["bounding_box_train", "no images"],
        ),
    ],
    ids=["truncated image", "missing folder", "strange name", "empty split"],
)
def test_damaged_data_is_named_before_training(broken, damage, words):
    from types import SimpleNamespace

    from reid_repro.datasets import DatasetError, open_benchmark
    from reid_repro.lab.runs import load_pixels

    damage(broken)
    with pytest.raises(DatasetError) as told:
        load_pixels(
            open_benchmark("toytown", broken),
            SimpleNamespace(height=32, width=16, device="cpu", epochs=1),
        )
    assert all(word in str(told.value) for word in words), told.value


def test_a_truncated_image_stops_a_run_before_training_and_stays_in_the_notebook(broken, tmp_path):
    victim = sorted((broken / "query").iterdir())[1]
    victim.write_bytes(victim.read_bytes()[:300])
    parameters = {"row": "ide", "data_root": str(broken), "epochs": 1, "out": str(tmp_path / "run")}
    done = batch(
        "run", IDE.relative_to(ROOT), tmp_path / "failed.ipynb", tmp_path / "failed.html",
        json.dumps(parameters),
    )
    assert done.returncode != 0 and victim.name in done.stderr and "DatasetError" in done.stderr
    assert not (tmp_path / "run").exists() and not (tmp_path / "failed.html").exists()
    outputs = [
        o for c in nbformat.read(tmp_path / "failed.ipynb", 4).cells for o in c.get("outputs", [])
    ]
    assert any(o.output_type == "error" and victim.name in o.evalue for o in outputs)


# the batch layer


def test_the_notebooks_keep_the_contract():
    done = batch("check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"lerning_rate": 1.0}, "'lerning_rate' is unknown"),
        ({"epochs": "3"}, "'epochs' is '3'; it must be of type int"),
        ({"seed": True}, "'seed'"),
    ],
)
def test_wrong_parameters_fail_before_a_kernel_starts(tmp_path, parameters, words):
    (tmp_path / "ipykernel_launcher.py").write_text("raise SystemExit('a kernel was started')")
    places = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = batch(
        "run", IDE.relative_to(ROOT), tmp_path / "x.ipynb", tmp_path / "x.html",
        json.dumps(parameters), env=ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(places)},
    )
    assert done.returncode != 0 and words in done.stderr and "kernel was started" not in done.stderr
    assert not (tmp_path / "x.ipynb").exists()


def test_a_notebook_without_the_tag_is_refused(tmp_path):
    stripped = nbformat.read(IDE, 4)
    for cell in stripped.cells:
        cell.metadata.pop("tags", None)
    nbformat.write(stripped, tmp_path / "untagged.ipynb")
    done = batch(
        "run", tmp_path / "untagged.ipynb", tmp_path / "x.ipynb", tmp_path / "x.html", '{"seed": 1}'
    )
    assert done.returncode != 0 and "tagged 'parameters'" in done.stderr


@pytest.mark.slow("three batches")
def test_one_failed_job_does_not_stop_the_batch_and_nothing_done_is_redone(tmp_path):
    runs = tmp_path / "runs"
    first = snakemake(runs, only="ide/pixels,ide/histogram")
    assert first.returncode == 0, first.stderr
    ledgers = sorted(runs.rglob("ledger.json"))
    assert len(ledgers) == 2 and len(list(runs.rglob("notebook.html"))) == 2
    before = [p.stat().st_mtime_ns for p in ledgers]
    second = snakemake(runs, only="ide/pixels,ide/histogram")
    assert second.returncode == 0 and "Nothing to be done" in second.stdout + second.stderr
    assert [p.stat().st_mtime_ns for p in ledgers] == before
    ledgers[0].unlink()  # one must be done again, and fails: the other one stays
    third = snakemake(runs, only="ide/pixels,ide/histogram", pictures="everything")
    assert third.returncode != 0 and "pictures" in third.stdout + third.stderr


def test_rows_that_cannot_run_are_listed_with_their_reason():
    done = batch("plan", "--profile", "paper", "--only", "baselines")
    assert done.returncode == 0
    assert (
        "dukemtmc needs DATA=<folder>" in done.stdout
        and "market1501 needs DATA=<folder>" in done.stdout
    )
    nothing = batch("skipped", "--profile", "paper", "--only", "ide")
    assert nothing.returncode != 0 and "nothing to run" in nothing.stderr
    unknown = batch("plan", "--only", "idee")
    assert (
        unknown.returncode != 0
        and "known are" in unknown.stderr
        and "Traceback" not in unknown.stderr
    )


# a killed process


SCRIPT = """
import sys, torch
from reid_repro.ide import IDE, ide_objective
from reid_repro.learning.recipe import Recipe
from reid_repro.learning.batches import ShuffledBatches
from reid_repro.learning.training import train
torch.set_num_threads(1); torch.manual_seed(0)
images = torch.randint(0, 256, (48, 3, 32, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
labels = torch.arange(48) % 6
recipe = Recipe(epochs=12, batch_size=8, lr=1e-3, pad=2, erase=0.5)
model = IDE(6, backbone="tiny", neck="bn")
train(model, ide_objective(labels), images, ShuffledBatches(48, 8, 0), recipe, out=sys.argv[1], device="cpu", name="kill")
torch.save([p.detach() for p in model.state_dict().values()], sys.argv[2])
"""


@pytest.mark.slow("many processes, each killed")
def test_a_run_killed_at_any_moment_ends_in_the_same_weights(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = lambda out, result: subprocess.Popen(
        [sys.executable, script, out, result], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE,
        text=True,
    )
    whole = run(tmp_path / "whole", tmp_path / "whole.pt")
    assert whole.communicate()[0].count("epoch") == 12
    # killed twice, each time in the middle of an epoch or of writing its checkpoint
    for after in (2, 5):
        process = run(tmp_path / "cut", tmp_path / "cut.pt")
        for _ in range(after):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = run(tmp_path / "cut", tmp_path / "cut.pt")
    lines = last.communicate()[0]
    assert last.returncode == 0 and lines.count("epoch") < 12  # it did resume
    for a, b in zip(torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "cut.pt")):
        assert torch.equal(a, b)


@pytest.mark.slow("two runs with kernels")
def test_a_checkpoint_of_another_row_is_refused(town, tmp_path, monkeypatch):
    parameters = {
        "data_root": str(town), "epochs": 2, "batch_size": 8, "steps": 0,
        "out": str(tmp_path / "run"), "seed": 4,
    }
    # the checkpoint stays, as in a batch that is killed before the page
    monkeypatch.setitem(ENVIRONMENT, "REID_REPRO_BATCH", "1")
    first = papermill(IDE, tmp_path / "a.ipynb", row="ide", **parameters)
    assert first.returncode == 0, first.stderr
    other = papermill(IDE, tmp_path / "b.ipynb", row="ide_plus", **parameters)
    assert other.returncode != 0 and "of another run" in other.stderr and "row ide" in other.stderr


# hostile words on the command line


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_no_value_reaches_a_shell(tmp_path):
    ready = ["-o", "env", "-o", ".venv/.ready", f"BIN={Path(sys.executable).parent}"]
    mark = tmp_path / "mark"
    for name, value in (
        ("DATA", "`touch {}`"), ("SEEDS", "1; touch {}"), ("ONLY", '" ; touch {} ; echo "'),
        ("RUNS", "$$(touch {})"),
    ):
        call(
            "make", *ready, "plan" if name != "RUNS" else "publish", f"{name}={value.format(mark)}"
        )
        assert not mark.exists(), (name, value)


@pytest.mark.slow("a batch")
def test_a_folder_name_with_a_blank_works(tmp_path):
    done = snakemake(tmp_path / "my runs", only="ide/histogram")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "my runs").rglob("ledger.json"))) == 1


def test_plain_papermill_refuses_a_misspelt_parameter(town, tmp_path):
    done = papermill(
        IDE, tmp_path / "x.ipynb", row="pixels", data_root=town, lern=3, out=tmp_path / "run"
    )
    assert done.returncode != 0 and "'lern' is unknown" in done.stderr


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("rerank = 'true'", "`-y 'rerank: True'` passes the value"),
        ("parts = '[1, 2]'", "`-y 'parts: [1, 2]'` passes the value"),
        ("epochs = '{'", "`-y 'epochs: …'` passes values of any type"),
        ("epochs = None", "epochs is None; it should be a valid integer; leave 'epochs' out"),
        ("row = None", "papermill's `-r row None` passes it as text"),
        ("row = 12", "papermill's `-r row 12` passes it as text"),
        ("row = True", "papermill's `-r row True` passes it as text"),
    ],
)
def test_a_value_of_another_type_is_told_with_papermills_own_option_for_it(cell, words):
    from reid_repro.lab.configuration import _check_types, _injected

    known = {
        "row": ("str", "ide"), "epochs": ("int", 1), "rerank": ("bool", False),
        "parts": ("int or list", 6),
    }
    values = {name: default for name, (_, default) in known.items()}
    _check_types(values, known, set())
    name, _, value = cell.partition(" = ")
    values[name] = eval(value)
    injected = _injected([f"# Parameters\n{cell}\nPAPERMILL_INPUT_PATH = 'a'", "x = 1"])
    assert injected == {name}
    with pytest.raises(ValueError) as told:
        _check_types(values, known, injected)
    assert f"parameters: {name} is {values[name]!r}; " in str(told.value)
    assert words in str(told.value)
    with pytest.raises(ValueError) as told:
        _check_types(values, known, set())  # set in the notebook itself: nothing about papermill
    assert "papermill" not in str(told.value)
