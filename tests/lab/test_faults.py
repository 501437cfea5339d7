"""Nothing is lost: a run killed at any moment ends in the same numbers, a full disk and a lack of
memory are told and survived.

The batch layer is killed, too: the whole of it, and its kernel alone.
"""

import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from made import dies, in_process
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from reid_repro.learning.checkpoints import read_metadata, read_state
from reid_repro.ide import ide_objective
from reid_repro.lab.ledger import read_ledger, write_entry
from reid_repro.evaluation.protocols import score_features
from reid_repro.learning.recipe import Recipe
from reid_repro.lab.runs import load_pixels, open_data, record, run_key, sampler
from reid_repro.learning.training import embed, train

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 2


class Small(nn.Module):
    """Ten thousand weights, with what makes a resumed run go astray: batch statistics, dropout, an
    optimiser's memory.
    """

    def __init__(self, identities: int):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 5, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d((4, 2)),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.3), nn.Linear(64, identities))

    def forward(self, x):
        f = self.backbone(x)
        return (f, self.classifier(f)) if self.training else f


@pytest.fixture(scope="module")
def town(tmp_path_factory) -> Path:
    from reid_repro.toytown import render

    return render(
        tmp_path_factory.mktemp("data") / "town", identities=12, images_per_identity=4, junk=2,
        distractors=2, seed=3,
    )


def run(out: Path, town: Path, kill: int = 0, **change) -> None:
    """One small run from data to entry, that dies at touch `kill` of its folder, counted from the
    beginning of its training.
    """
    torch.set_num_threads(1)
    config = SimpleNamespace(
        row="ide", title="IDE", dataset="toytown", data_root=str(town), profile="smoke", seed=0,
        epochs=EPOCHS, conditions=[], height=32, width=16, batch_size=8, instances=0, device="cpu",
        pictures="none", backbone="tiny", weights="",
    )
    benchmark = open_data(config)
    images, *tested = load_pixels(benchmark, config)
    torch.manual_seed(config.seed)
    model = Small(benchmark.train.num_identities)
    objective, touch = ide_objective(torch.from_numpy(benchmark.train.labels)), lambda: None
    if kill:
        touch = dies(kill, out)
    history = train(
        model, lambda *given: touch() or objective(*given), images,
        sampler(config, benchmark.train),
        Recipe(**{"epochs": EPOCHS, "batch_size": 8, "lr": 0.01, "pad": 2, "erase": 0.5} | change),
        out=out, device="cpu", identity=run_key(config, benchmark),
    )
    scores = score_features(
        benchmark, *(embed(model, part, device="cpu") for part in tested)
    ).scores
    record("ide", config, benchmark, scores, history, out, time.perf_counter())


def numbers(out: Path) -> dict:
    "What a finished run came to, without times and places."
    entry = json.loads((out / "ledger.json").read_text())
    losses = {
        name: values
        for name, values in entry["history"].items()
        if name not in ("seconds", "cpu_seconds", "images_per_second")
    }
    return {
        key: entry[key]
        for key in ("metrics", "counts", "epochs", "fingerprint", "parameters", "conditions")
    } | {"history": losses}


@pytest.fixture(scope="module")
def whole_run(town, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert in_process(run, out, town) == 0
    return out


def same(out: Path, whole_run: Path) -> None:
    "A finished run like the uninterrupted one, to the bit, and nothing else in its folder."
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, whole_run))
    assert ours.keys() == theirs.keys() and all(
        torch.equal(ours[key], theirs[key]) for key in theirs
    )
    assert numbers(out) | {"parameters": 0} == numbers(whole_run) | {"parameters": 0}
    assert sorted(path.name for path in out.iterdir()) == [
        "ledger.json", "model.safetensors", "tensorboard",
    ]
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    # every epoch is drawn, and once
    assert [event.step for event in events.Scalars("loss")] == list(range(1, EPOCHS + 1))
    assert (
        len(read_ledger(out)) == 1
        and read_metadata(out / "model.safetensors")["metrics"] == numbers(out)["metrics"]
    )


@pytest.mark.parametrize(
    "every", [pytest.param(1, marks=pytest.mark.slow("a hundred and twenty runs")), 8]
)
def test_a_run_killed_at_any_touch_of_the_file_system_goes_on_to_the_same_numbers(
    town, whole_run, tmp_path, every
):
    for kill in count(1, every):
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
    assert kill > 60  # twice four steps, two checkpoints, weights, entry


def test_a_run_that_goes_on_with_other_code_says_so_in_its_entry(
    town, whole_run, tmp_path, monkeypatch, capsys
):
    import reid_repro.lab.runs
    import reid_repro.learning.training

    def by(code: str, end: str = "") -> None:
        "The run on a library of this state; where `end` is named, killed by that part of a run."
        for module in (reid_repro.learning.training, reid_repro.lab.runs):
            monkeypatch.setattr(module, "code_state", lambda: code)
        if not end:
            run(tmp_path, town)
            return
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if end == "scores":
                patch.setattr("reid_repro.lab.runs.write_entry", interrupted)
            else:
                patch.setattr(
                    reid_repro.learning.training, "_check_weights",
                    lambda model, step, epoch: epoch and interrupted(),
                )
            run(tmp_path, town)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    assert json.loads((whole_run / "ledger.json").read_text())["conditions"] == []
    by("old", "epoch 2")
    by("old", "scores")
    assert "other code" not in capsys.readouterr().out
    by("old", "scores")  # nothing is left to train
    by("new")
    told = json.loads((tmp_path / "ledger.json").read_text())["conditions"]
    assert told == ["the code changed on the way: from epoch 1 old; scores new"]
    shutil.rmtree(tmp_path)
    by("old", "epoch 2")
    by("new")
    assert "goes on with other code than before: new" in capsys.readouterr().out
    told = json.loads((tmp_path / "ledger.json").read_text())["conditions"]
    assert told == ["the code changed on the way: from epoch 1 old; from epoch 2 new; scores new"]


# a full disk


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    "A disk of one megabyte, where one can be mounted."
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False
    ).returncode == 0
    if not mounted:
        pytest.skip("mounting a small disk needs rights that are not here")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(place: Path) -> None:
    with open(place / "filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass


def short_of_room(out: Path, town: Path, name: str, how: str) -> None:
    """A run for which the disk is full, or a file may not be large, when it writes the file `name`;
    a checkpoint when it writes the second.
    """
    times = [2 if name == "checkpoint.safetensors" else 1]

    def hook(event: str, arguments: tuple) -> None:
        if event == "tempfile.mkdtemp" and f".{name}." in str(arguments[0]):
            times[0] -= 1
            if times[0] == 0 and how == "full":
                fill(out.parent)
            elif times[0] == 0:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    sys.addaudithook(hook)
    try:
        run(out, town)
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        (town.parent / f"told-{name}").write_text(str(error))
        os._exit(3)


def check_short_of_room(
    out: Path, town: Path, whole_run: Path, name: str, how: str, words: tuple[str, ...]
) -> None:
    assert in_process(short_of_room, out, town, name, how) == 3
    told = (town.parent / f"told-{name}").read_text()
    assert all(word in told for word in (name, "MiB free", "make room", *words)), told
    assert len(read_state(out / "checkpoint.safetensors")["history"]) == (
        1 if name == "checkpoint.safetensors" else EPOCHS
    )
    assert not (out / "ledger.json").exists() and not list(out.glob(".*"))
    (out.parent / "filler").unlink(missing_ok=True)
    assert in_process(run, out, town) == 0
    same(out, whole_run)


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "model.safetensors", "ledger.json"])
def test_a_file_that_may_not_be_so_large_is_told_by_name_and_the_run_goes_on_later(
    town, whole_run, tmp_path, name
):
    check_short_of_room(tmp_path / "run", town, whole_run, name, "limit", ("File too large",))


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "ledger.json"])
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(town, whole_run, disk, name):
    check_short_of_room(
        disk / "run", town, whole_run, name, "full", ("No space left", " 0.0 MiB free")
    )


# numbers and memory


def test_a_run_that_diverges_says_where_and_leaves_no_entry(town, tmp_path):
    with pytest.raises(FloatingPointError, match=r"not finite at step \d+ .*lower lr"):
        run(tmp_path / "run", town, lr=1e30)
    assert not list(tmp_path.rglob("ledger.json")) and not list(tmp_path.rglob("*.writing"))


@pytest.fixture(scope="module")
def batch():
    "ci/batch.py as a module."
    spec = importlib.util.spec_from_file_location("batch", ROOT / "ci" / "batch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def want_of_memory() -> Iterator[BaseException]:
    for wanted in (lambda: torch.empty(1 << 50), lambda: bytearray(1 << 62)):
        try:
            wanted()
        except (RuntimeError, MemoryError) as error:
            yield error
    yield torch.cuda.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has a total capacity of 79.10 GiB"
    )


def test_want_of_memory_is_told_in_one_line_with_a_remedy(batch):
    errors = list(want_of_memory())
    assert len(errors) == 3
    for error in errors:
        told = batch.one_line(type(error).__name__, str(error))
        assert "\n" not in told and "smaller batch_size" in told and "memory_mb" in told, told
    assert "batch_size" not in batch.one_line("ValueError", "rows\nare missing")


# the ledger


ENTRY = dict(
    paper="ide", row="ide", title="IDE", dataset="toytown", protocol="single-query",
    split="standard", profile="smoke", conditions=[], seed=0, parameters={}, metrics={"rank1": 1.0},
    counts={}, epochs=1, wall_seconds=1.0, peak_memory_mib=1.0, fingerprint="f", device="cpu",
)


def writes_often(folder: Path, title: str) -> None:
    for _ in range(8):
        write_entry(folder, **ENTRY | {"title": title * 2000})


def test_an_entry_written_by_two_processes_at_once_is_that_of_one_of_them_for_every_reader(
    tmp_path,
):
    write_entry(tmp_path, **ENTRY)
    pids = []
    for title in "ab":
        if (pid := os.fork()) == 0:
            writes_often(tmp_path, title)
            os._exit(0)
        pids.append(pid)
    seen, alive = set(), set(pids)
    while alive:
        seen |= {"".join(sorted(set(title))) for title in read_ledger(tmp_path)["title"]}
        alive -= {os.waitpid(pid, os.WNOHANG)[0] for pid in alive}
    assert seen <= {"DEI", "a", "b"} and len(read_ledger(tmp_path)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.json"]


def test_weights_are_not_written_for_an_entry_that_is_refused(tmp_path):
    called = []
    with pytest.raises(ValueError, match="rank1"):
        write_entry(tmp_path, **ENTRY | {"metrics": {"rank1": 101.0}}, before=called.append)
    assert not called and not list(tmp_path.iterdir())


# what is published


def test_a_list_of_weights_opens_nothing_outside_its_folder_and_nothing_that_changed(tmp_path):
    from reid_repro.learning.checkpoints import (
        list_weights, load_weights, open_weights, save_weights,
    )

    folder, secret = tmp_path / "published", tmp_path / "secret.safetensors"
    with pytest.raises(ValueError, match=r"there is no folder '.*published'"):
        list_weights(folder)
    assert not folder.exists()
    folder.mkdir()
    with pytest.raises(ValueError, match="holds no weights"):
        list_weights(folder)
    assert not list(folder.iterdir())
    about = {
        "paper": "ide", "row": "ide", "dataset": "toytown", "profile": "smoke", "seed": 0,
        "identities": 8,
    }
    model = nn.Linear(3, 2)
    for path in (folder / "sub" / "model.safetensors", secret):
        save_weights(path, model, about)
    name = "ide-ide-toytown-smoke-s0"
    listed = json.loads(list_weights(folder).read_text())
    assert (
        list(listed) == [name]
        and listed[name]["file"] == "sub/model.safetensors"
        and listed[name]["identities"] == 8
    )
    fresh = nn.Linear(3, 2)
    assert load_weights(open_weights(folder, name), fresh) == about and torch.equal(
        fresh.weight, model.weight
    )
    (folder / "link.safetensors").symlink_to(secret)
    with pytest.raises(ValueError, match="outside"):
        list_weights(folder)
    honest = listed[name]
    outside = (
        "../secret.safetensors", str(secret), "link.safetensors", "sub/../../secret.safetensors",
    )
    for file in (*outside, "a\0b.safetensors", "x" * 5000, ""):
        (folder / "weights.json").write_text(json.dumps({name: honest | {"file": file}}))
        with pytest.raises(ValueError, match="do not trust this list"):
            open_weights(folder, name)
    for text in (
        "[]", "{", '{"a": 1}', '{"a": {"file": 1, "sha256": "", "bytes": 1}}', "[" * 100_000,
    ):
        (folder / "weights.json").write_text(text)
        with pytest.raises(ValueError, match="no list of weights"):
            open_weights(folder, name)
    (folder / "weights.json").write_text(json.dumps({name: honest}))
    data = bytearray((folder / honest["file"]).read_bytes())
    data[-1] ^= 1
    (folder / honest["file"]).write_bytes(data)
    with pytest.raises(ValueError, match="not the file that was listed"):
        open_weights(folder, name)
    with pytest.raises(ValueError, match=f"'nobody'; it lists {name}"):
        open_weights(folder, "nobody")


# the batch layer


def notebook(path: Path, source: str) -> Path:
    "A notebook of two cells, parameters and `source`."
    cells = [
        nbformat.v4.new_code_cell("out: str = ''", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(source),
    ]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


def ended(batch, folder: Path, source: str) -> str:
    """Runs a notebook through the batch layer, which must fail with one message, which the notebook
    holds as well.
    """
    with pytest.raises(SystemExit) as told:
        batch.run(
            str(notebook(folder / "job.ipynb", source)), str(folder / "notebook.ipynb"),
            str(folder / "page.html"), "{}",
        )
    outputs = nbformat.read(folder / "notebook.ipynb", 4).cells[-1].outputs
    assert [output.output_type for output in outputs] == ["stream", "error"] and outputs[
        0
    ].text == "begun\n"
    assert not (folder / "page.html").exists() and not list(folder.glob(".*"))
    assert (
        str(told.value).startswith(f"{folder / 'job.ipynb'}: ") and str(told.value).count("\n") == 1
    )
    assert batch.failure(folder / "notebook.ipynb") in str(told.value).replace(
        "the kernel died", "DeadKernelError: the kernel died"
    )
    return str(told.value)


@pytest.mark.slow("kernels that die")
def test_a_kernel_that_dies_and_one_without_memory_leave_the_notebook_and_one_message(
    batch, tmp_path, monkeypatch
):
    monkeypatch.setenv("REID_REPRO_BATCH", "1")  # is set by the call, and goes with the test
    for name, source in (
        ("dead", "import os, signal, sys; os.kill(os.getpid(), signal.SIGKILL)"),
        ("memory", "bytearray(1 << 62)"),
    ):
        (tmp_path / name).mkdir()
        told = ended(
            batch, tmp_path / name,
            f"print('begun', flush=True); import time; time.sleep(1); {source}",
        )
        assert "smaller batch_size" in told and ("kernel died" in told) == (name == "dead"), told


@pytest.mark.parametrize("foreign", ["/bin/false", "/no/python", None])
def test_a_run_takes_the_interpreter_in_use_whatever_kernelspec_comes_first(
    batch, tmp_path, monkeypatch, foreign
):
    monkeypatch.setenv("REID_REPRO_BATCH", "1")
    monkeypatch.delenv("JUPYTER_PATH", raising=False)
    if foreign:
        spec = tmp_path / "jupyter/kernels/python3/kernel.json"
        spec.parent.mkdir(parents=True)
        told = {"argv": [foreign, "{connection_file}"], "display_name": "x", "language": "python"}
        spec.write_text(json.dumps(told))
        monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    before = os.environ.get("JUPYTER_PATH")
    source = f"import sys; assert sys.executable == {sys.executable!r}, sys.executable"
    batch.run(
        str(notebook(tmp_path / "job.ipynb", source)), str(tmp_path / "notebook.ipynb"),
        str(tmp_path / "page.html"), "{}",
    )
    assert (tmp_path / "page.html").exists() and os.environ.get("JUPYTER_PATH") == before


def test_a_kernel_that_never_answers_is_told_as_such(
    batch, tmp_path, monkeypatch
):
    "Here the kernel's own module is broken, as in a half-installed environment."
    monkeypatch.setenv("REID_REPRO_BATCH", "1")
    (tmp_path / "ipykernel_launcher.py").write_text("raise SystemExit('a broken environment')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SystemExit) as told:
        batch.run(
            str(notebook(tmp_path / "job.ipynb", "1")), str(tmp_path / "notebook.ipynb"),
            str(tmp_path / "page.html"), "{}",
        )
    words = str(told.value)
    assert "the kernel did not start" in words and "before replying" in words
    assert "whatever kernelspecs" in words and f"{sys.executable} -m ipykernel" in words
    assert "memory" not in words


def test_why_a_run_failed_is_told_also_of_a_damaged_notebook(batch, tmp_path):
    assert batch.failure(tmp_path / "none.ipynb") == "it did not start"
    (tmp_path / "empty.ipynb").touch()
    assert batch.failure(tmp_path / "empty.ipynb") == "it did not start"
    (tmp_path / "half.ipynb").write_text('{"cells": [')
    assert "cannot be read" in batch.failure(tmp_path / "half.ipynb")
    assert "was stopped" in batch.failure(notebook(tmp_path / "killed.ipynb", "1 + 1"))


@pytest.mark.slow("two batches")
def test_a_batch_killed_with_everything_goes_on_and_trains_nothing_twice(tmp_path):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = [
        sys.executable, "ci/batch.py", "unlocked", "snakemake", "-s", "ci/Snakefile", "--cores",
        "1", "--rerun-incomplete", "--config", "profile=smoke", "only=ide/ide", "steps=3",
        "pictures=none", f"runs={tmp_path / 'runs'}",
    ]
    folder = tmp_path / "runs/smoke/ide/ide/toytown-s0"
    with open(tmp_path / "log", "w") as log:
        batch = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        give_up = time.monotonic() + 300
        while (
            not (folder / "checkpoint.safetensors").exists()
            and batch.poll() is None
            and time.monotonic() < give_up
        ):
            time.sleep(0.02)
        os.killpg(batch.pid, signal.SIGKILL)
        batch.wait()
    assert (folder / "checkpoint.safetensors").exists(), (tmp_path / "log").read_text()
    assert not (folder / "notebook.html").exists()
    again = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stdout + again.stderr
    shown = nbformat.read(folder / "notebook.ipynb", 4)
    # it was trained before
    assert not any(
        "epoch 1/" in o.get("text", "") for c in shown.cells for o in c.get("outputs", [])
    )
    files = sorted(path.name for path in folder.iterdir())
    assert files == [
        "ledger.json", "model.safetensors", "notebook.html", "notebook.ipynb", "tensorboard",
    ]
