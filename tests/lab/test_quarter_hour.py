"""A quarter of an hour on a GPU: order, clock, what is stopped and what comes home; with made-up
runs, the real one is rehearsed by hand.
"""

import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import quarter_hour
from quarter_hour import Log, Run, Scheduler, Speeds

ROOT = Path(__file__).resolve().parents[2]


def job(name: str, paper: str = "ide") -> SimpleNamespace:
    return SimpleNamespace(name=name, row=SimpleNamespace(paper=paper))


def runs(folder: Path, *names: str) -> list[Run]:
    return [Run(job(name), "short", 0.0, folder / name) for name in names]


def sleeper(seconds: dict[str, float], status: int = 0):
    "Runs that take so long."

    def begin(run: Run) -> subprocess.Popen:
        code = f"import time; time.sleep({seconds[run.job.name]}); raise SystemExit({status})"
        return subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True)

    return begin


@pytest.fixture
def no_reserve(monkeypatch):
    monkeypatch.setattr(quarter_hour, "RESERVE", 0.0)


def test_nothing_is_begun_that_would_outlive_the_budget_and_smaller_ones_take_its_place(
    tmp_path, no_reserve
):
    log = Log(tmp_path / "log.txt", budget=30)
    times = {"long": 1000.0, "short": 1.0, "tiny": 1.0}
    begin = sleeper({"long": 0, "short": 0, "tiny": 0})
    scheduler = Scheduler(log, Speeds(1.0), 1, begin, wait=0.01)
    rest = scheduler.run(
        runs(tmp_path, "long", "short", "tiny"), lambda run: times[run.job.name]
    )
    assert [run.job.name for run in rest] == ["long"]
    assert [run.job.name for run in scheduler.done] == ["short", "tiny"]
    assert log.left() > 10  # it did not wait for what cannot fit
    told = (tmp_path / "log.txt").read_text()
    assert "begun  short" in told and "long" not in told


def test_what_still_runs_when_the_budget_ends_is_stopped_and_is_no_result(tmp_path, no_reserve):
    log = Log(tmp_path / "log.txt", budget=1.0)
    begin = sleeper({"hangs": 600})
    scheduler = Scheduler(log, Speeds(1.0), 2, begin, wait=0.01)
    (run,) = runs(tmp_path, "hangs")
    assert scheduler.run([run], lambda run: 0.5) == []
    assert scheduler.stopped == [run] and not scheduler.done
    assert run.process.poll() is not None  # nothing is left behind
    assert "cut    hangs" in (tmp_path / "log.txt").read_text()


def test_several_run_side_by_side_and_never_more(tmp_path, no_reserve):
    log, most = Log(tmp_path / "log.txt", budget=60), []
    begin = sleeper(dict.fromkeys("abcde", 0.2))

    def counted(run: Run) -> subprocess.Popen:
        process = begin(run)
        most.append(1 + len(scheduler.running))
        return process

    scheduler = Scheduler(log, Speeds(1.0), 2, counted, wait=0.01)
    assert not scheduler.run(runs(tmp_path, *"abcde"), lambda run: 1.0)
    assert max(most) == 2 and len(scheduler.done) == 5


def test_a_failed_run_is_told_and_the_others_go_on(tmp_path, no_reserve):
    log = Log(tmp_path / "log.txt", budget=60)
    scheduler = Scheduler(log, Speeds(1.0), 1, sleeper({"a": 0, "b": 0}, 3), wait=0.01)
    scheduler.run(runs(tmp_path, "a", "b"), lambda run: 1.0)
    assert [run.job.name for run in scheduler.failed] == ["a", "b"] and not scheduler.done
    assert (tmp_path / "log.txt").read_text().count("FAILED") == 2


def test_estimates_follow_what_is_measured_and_what_runs_took():
    speeds = Speeds(1000.0)
    first = speeds.seconds("ide", 8000, 0, 0)
    assert first == pytest.approx(quarter_hour.START + 8)
    speeds.measured["ide"] = 4000.0
    assert speeds.seconds("ide", 8000, 0, 0) == pytest.approx(quarter_hour.START + 2)
    speeds.learn("ide", 14.0, 28.0)
    assert speeds.seconds("ide", 8000, 0, 0) == pytest.approx(2 * (quarter_hour.START + 2))
    assert speeds.seconds("dcc", 0, 0, 2_000_000) > speeds.seconds("pcb", 0, 0, 2_000_000)


def test_every_method_comes_before_a_second_seed_and_what_the_ledger_holds_is_left_out(
    tmp_path, monkeypatch
):
    stages = (("smoke", "toytown", ("ide/ide", "pcb/pcb"), 2),)
    wanted = [job.name for _, job in quarter_hour.planned(stages, "", tmp_path)]
    assert wanted == [
        f"{row}/toytown-s{seed}" for seed in (0, 1) for row in ("ide/ide", "pcb/pcb")
    ]
    entry = ROOT / "results" / "ide-ide-toytown-smoke-s0.json"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ledger.json").write_bytes(entry.read_bytes())
    left = [job.name for _, job in quarter_hour.planned(stages, "", tmp_path)]
    assert left == wanted[1:]


def test_all_stages_name_rows_that_are_there_and_two_data_sets_are_the_pair_methods_own():
    from reid_repro.lab.rows import plan

    for profile, dataset, rows, seeds in (*quarter_hour.STAGES, *quarter_hour.REHEARSED):
        jobs = plan(profile, ",".join(rows), dataset=dataset, seeds=seeds)
        assert len(jobs) == seeds * len(rows) and {job.dataset for job in jobs} == {dataset}


def test_home_come_entry_notebook_and_page_of_what_is_done_and_a_failures_traceback(tmp_path):
    done, failed = runs(tmp_path, "good", "bad")
    for run in (done, failed):
        run.folder.mkdir()
        for name in ("ledger.json", "notebook.ipynb", "notebook.html", "log.txt"):
            (run.folder / name).write_text(name)
    with tarfile.open(quarter_hour.pack([done], tmp_path, [failed])) as tar:
        names = set(tar.getnames())
    assert names == {
        *(f"short/good/{name}" for name in ("ledger.json", "notebook.ipynb", "notebook.html")),
        *(f"short/bad/{name}" for name in ("notebook.ipynb", "log.txt")),
    }


@pytest.mark.parametrize("headline", quarter_hour.HEADLINES)
def test_every_method_takes_a_step_on_made_up_photographs(headline):
    "What checks and throughput are measured on: finite terms, a batch of the size that is told."
    model, objective, batches, images, settings = quarter_hour._task(headline, "smoke", (128, 64))
    batch = next(iter(batches.epoch(0)))
    terms = objective(
        model.train(), batch, lambda rows: (images[rows].float() / 255 - 0.45) / 0.22
    )
    assert all(torch.isfinite(term) for term in terms.values())
    shown = 2 * len(batch[0]) if isinstance(batch, tuple) else len(batch)
    assert shown == quarter_hour.BATCH and images.shape[2:] == (128, 64)
    assert settings["batch_size"] == (shown // 2 if headline.startswith("casn") else shown)
