"""The batch layer: rows against printed numbers, hours and memory of a plan, the choice under a
budget, the rehearsal.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ci"))

import batch
import estimates
import rehearsal
from estimates import Estimate, budget, by_priority, choose, estimated
from reid_repro.datasets import BENCHMARKS
from reid_repro.lab.claim_list import read_claims
from reid_repro.lab.results import reported
from reid_repro.lab.rows import Job, Variant, chosen_rows, plan, read_profile, read_rows
from reid_repro.utils import files

PAPERS = ("minet", "dcc", "casn", "ianet", "can")
# (paper, table, row) of a printed row that nothing runs → why
NO_ROW: dict[tuple[str, str, str], str] = {
    ("can", "5", "CAN"): (
        "the row `can` is the same run, and is held against table 4, which prints another number"
        " for it"
    )
}


# ---------------------------------------------------------------- rows against the printed tables


@pytest.mark.parametrize("paper", PAPERS)
def test_every_row_that_a_paper_prints_of_its_own_is_a_row_here_on_all_its_data_sets(paper):
    mine = {}
    for row in read_rows(paper):
        for key in row.reported:
            if key["paper"] == paper:
                mine.setdefault((str(key["table"]), key["row"]), set()).update(row.datasets)
    own = reported(paper).query("own")
    lacking = [
        f"table {table}, {row}, {dataset}"
        for table, row, dataset in own[["table", "row", "dataset"]].drop_duplicates().values
        if dataset not in mine.get((table, row), ()) and (paper, table, row) not in NO_ROW
    ]
    assert (
        not lacking
    ), f"{paper}: add rows to ci/rows/{paper}.yaml, or reasons to NO_ROW, for {lacking}"


def test_reasons_for_having_no_row_are_about_printed_rows():
    printed = {
        (paper, *key)
        for paper in PAPERS
        for key in reported(paper).query("own")[["table", "row"]].values
    }
    assert set(NO_ROW) <= printed and all(NO_ROW.values())


@pytest.mark.parametrize("paper", PAPERS)
def test_profile_paper_plans_every_row_on_every_data_set_of_its_table_without_any_data(paper):
    planned = {(job.row.name, job.dataset) for job in plan("paper", paper)}
    for row in read_rows(paper):
        keys = [key for key in row.reported if key["paper"] == paper]
        table = reported(paper)
        for key in keys:
            printed = table[(table["table"] == str(key["table"])) & (table["row"] == key["row"])]
            assert {(row.name, dataset) for dataset in printed["dataset"]} <= planned


def test_each_paper_and_baseline_has_headline_rows_and_few_of_them():
    for paper in (*PAPERS, "ide", "pcb"):
        rows = read_rows(paper)
        assert 1 <= sum(row.priority == 1 for row in rows) <= 5
        assert all(row.priority == (2 if row.reported else 3) for row in rows if row.priority != 1)


@pytest.mark.parametrize("priority", ["0", "4", "high", "true", "1.5"])
def test_a_strange_priority_is_refused(tmp_path, priority):
    folder = tmp_path / "ci" / "rows"
    folder.mkdir(parents=True)
    text = (ROOT / "ci" / "rows" / "pcb.yaml").read_text()
    (folder / "pcb.yaml").write_text(text.replace("priority: 1", f"priority: {priority}"))
    with pytest.raises(ValueError, match=r"pcb\.yaml row 1: priority is .*; it should be"):
        read_rows("pcb", tmp_path)


@pytest.mark.parametrize("only", [",", " ", " , ,", "ide/", "ide, ide/"])
def test_words_that_name_no_row_are_refused(only):
    with pytest.raises(ValueError, match="ONLY="):
        plan("smoke", only)


def test_the_rows_of_a_papers_claims_have_a_name():
    """ONLY=ianet/claims: every row that a claim of the paper compares, with the equally expensive
    baselines, and no other.
    """
    chosen = {row.name for row in chosen_rows("ianet/claims")}
    wanted = {
        row
        for claim in read_claims()
        if claim.paper == "ianet"
        for row in (*claim.contrast, *claim.equal.values())
    }
    assert chosen == wanted and wanted
    with pytest.raises(ValueError, match="ide has no row or table 'claims'"):
        chosen_rows("ide/claims")


def test_seeds_and_profiles_that_cannot_be_are_refused():
    for seeds in (-1, 1001, 10**9):
        with pytest.raises(ValueError, match=f"SEEDS={seeds}: give the number of seeds, 1 to 1000"):
            plan("smoke", "ide/ide", seeds=seeds)
    assert len(plan("smoke", "ide/ide", seeds=1000)) == 1000
    for name in ("../rows/ide", "../profiles/smoke", "/etc/hosts"):
        with pytest.raises(
            ValueError, match=f"profile '{name}' is unknown; take one of pilot, smoke, study"
        ):
            plan(name)


# ---------------------------------------------------------------- estimates


def job(name: str, priority: int = 2, seed: int = 0, dataset: str = "market1501", **settings) -> Job:
    row = Variant(
        paper="ide", name=name, title=name, notebook="nbs/4_baselines/ide/2_reproduce.ipynb",
        datasets=[dataset], set=settings, priority=priority,
    )
    return Job(row, dataset, seed, read_profile("paper").of("ide"))


def table(macs: float = 4e9, **full) -> dict:
    """Costs of a made row `one`: 4 G per image at 256×128, one GiB of activations for 64 images, 32
    Mi parameters.
    """
    small = {
        "seconds": 5.0, "memory_mib": 900,
        "settings": {"height": 128, "width": 64, "backbone": "tiny"}, "pair_macs": 0.0,
        "stages": [
            {
                "what": "epochs", "images": 8, "macs_per_image": 2e7, "stored_mib_per_image": 1.0,
                "passes": 1.0, "parameters": 2**20, "step_seconds": 0.24,
            }
        ],
    }
    stages = [
        {
            "what": "epochs", "images": 8, "macs_per_image": macs, "stored_mib_per_image": 16.0,
            "parameters": 2**25,
        }
    ]
    whole = {
        "seconds": 9.0, "memory_mib": 1500,
        "settings": {"height": 256, "width": 128, "backbone": "resnet50"}, "pair_macs": 0.0,
        "stages": stages, **full,
    }
    return {
        "device": "made", "town_images": 100, "rows": {"ide/one": {"small": small, "full": whole}},
    }


def test_gpu_hours_are_operations_over_the_assumed_share_of_the_rate():
    rate = 1e14
    told = estimated(job("one"), table(), rate)
    training = 3 * 4e9 * 12936 * 60  # three forward passes, photographs, epochs
    evaluation = 4e9 * (3368 + 19732)
    likely = (estimates.SHARE[0] * estimates.SHARE[1]) ** 0.5
    fixed = estimates.START + estimates.PER_IMAGE * (12936 + 3368 + 19732)
    assert told.source == "estimated" and told.seconds == pytest.approx(
        fixed + (training + evaluation) / (rate * likely), rel=1e-6
    )
    photographs = 12936 * 3 * 256 * 128 / 2**20
    # bf16: activations in half the bytes
    assert told.memory_mib == pytest.approx(500 + 64 * 16.0 * 0.5 + 16 * 32 + photographs)


def test_pairs_are_counted_where_a_method_scores_pairs():
    with_pairs, without = (
        estimated(job("one"), table(pair_macs=macs), 1e14).seconds for macs in (1e6, 0.0)
    )
    share = (estimates.SHARE[0] * estimates.SHARE[1]) ** 0.5
    assert with_pairs - without == pytest.approx(1e6 * 3368 * 19732 / (1e14 * share), rel=1e-6)


def test_on_a_cpu_the_rehearsals_own_speed_counts():
    toy = Job(job("one").row, "toytown", 0, read_profile("smoke").of("ide"))
    told = estimated(toy, table(), None)
    per_image = 0.24 / 8
    assert told.seconds == pytest.approx(
        estimates.START + 3.32 + per_image * (2000 * 24 + 1320 / 3), rel=1e-3
    )


def test_few_people_cost_less_than_all():
    pilot = Job(job("one").row, "cuhk03-np-detected", 900, read_profile("pilot").of("ide"))
    train, query, gallery = estimates._images(pilot, estimates.parameters(pilot))
    assert train == query == gallery == round(7365 / 767 * 100)
    assert estimates._images(pilot, {**estimates.parameters(pilot), "people": 0})[0] == 7365 - query
    assert estimates._images(pilot, {"held_out": 0}) == BENCHMARKS["cuhk03-np-detected"].images


def test_what_is_unknown_has_no_number_but_a_reason():
    assert (
        estimated(job("two"), table(), 1e14).seconds is None
        and "rehears" in estimated(job("two"), table(), 1e14).source
    )
    assert estimated(job("one", dataset="photographs"), table(), 1e14).seconds is None
    assert estimated(job("one", backbone="resnet101"), table(), 1e14).seconds is None
    # no full-size step was timed on a CPU
    assert estimated(job("one"), table(), None).seconds is None


def run_of(one: Job, **other) -> dict:
    own = {
        "paper": one.row.paper, "row": one.row.name, "dataset": one.dataset, "seed": one.seed,
        "profile": "paper", "rank1": 50.0, "mAP": 30.0, "wall_seconds": 100.0,
        "peak_memory_mib": 2048.0, "device": "NVIDIA A100",
        "parameters": {**one.parameters, **one.row.set, "steps": 0},
    }
    return own | other


def known_of(jobs: list[Job], *runs: dict, gpu: float | None = 1e14) -> dict[str, Estimate]:
    columns = list(run_of(jobs[0]))
    return estimates.estimates(
        jobs, pd.DataFrame(list(runs), columns=columns), read_profile("paper"), table(), gpu
    )


def test_the_ledger_wins_over_the_rehearsal_and_says_which_seed_it_measured():
    first, second = job("one"), job("one", seed=1)
    known = known_of([first, second], run_of(first))
    assert known[first.name] == Estimate(100.0, 2048.0, "measured, NVIDIA A100", "50.0 / 30.0")
    assert known[second.name] == Estimate(100.0, 2048.0, "measured, other seeds", "")


@pytest.mark.parametrize("other", [{"steps": 2}, {"epochs": 59}, {"lr": 1.0}])
def test_a_run_with_other_parameters_is_not_this_job(other):
    one = job("one")
    run = run_of(one)
    run["parameters"] |= other
    assert known_of([one], run)[one.name].source == "estimated"


def test_a_run_older_than_a_parameter_still_counts():
    one = job("one")
    run = run_of(one)
    del run["parameters"]["clip"]
    assert known_of([one], run)[one.name].score


def test_a_time_of_a_cpu_is_not_taken_for_a_gpu():
    first, second = job("one"), job("one", seed=1)
    run = run_of(first, device="Intel, 2 threads")
    assert known_of([second], run)[second.name].source == "estimated"
    assert known_of([second], run, gpu=None)[second.name].source == "measured, other seeds"


def test_a_plan_says_of_every_number_where_it_comes_from_and_names_the_assumption_once(
    monkeypatch, capsys
):
    monkeypatch.setattr(
        estimates, "read_costs",
        lambda: {**table(), "rows": {"ide/ide": table()["rows"]["ide/one"]}},
    )
    batch.show_plan("paper", "ide", "", "", 0)
    lines = capsys.readouterr().out.splitlines()
    assert sum(estimates.GPU in line for line in lines) == 1 and "5% to 20%" in lines[0]
    (ide,) = [line for line in lines if line.startswith("ide/ide/market1501-s0")]
    assert (
        "estimated" in ide
        and " min " in ide
        and "GiB" in ide
        and "skipped: market1501 needs DATA=<folder>" in ide
    )
    (neck,) = [line for line in lines if line.startswith("ide/ide_neck/market1501-s0")]
    assert "not rehearsed" in neck and "GiB" not in neck
    assert "GPU hours" in lines[-1] and "without an estimate" in lines[-1]


def test_the_plan_of_all_papers_builds_no_network(monkeypatch, capsys):
    def refuse(*args, **options):
        raise AssertionError("a plan has no need of a network")

    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)
    batch.show_plan("paper", "", "", "", 0)
    assert len(capsys.readouterr().out.splitlines()) > 230


def test_every_row_has_been_rehearsed():
    costs = estimates.read_costs()["rows"]
    waiting = [
        f"{row.paper}/{row.name}" for row in chosen_rows() if f"{row.paper}/{row.name}" not in costs
    ]
    if waiting:
        pytest.skip(f"{len(waiting)} rows wait for `make rehearsal ONLY={','.join(waiting)}`")


def test_committed_costs_belong_to_the_rows_and_profiles_of_today():
    costs = estimates.read_costs()["rows"]
    if not costs:
        pytest.skip("no rehearsal is committed; make rehearsal")
    rows = {f"{row.paper}/{row.name}": row for row in chosen_rows()}
    assert set(costs) <= set(rows), "rows are gone: make rehearsal"
    for name, told in costs.items():
        row = rows[name]
        assert ("full" in told) == (len(rehearsal.passes(row)) == 2)
        for place, profile in (("small", "smoke"), ("full", "paper")):
            if place in told:
                now = rehearsal.settings(row.paper, row, profile)
                here = {key: now[key] for key in rehearsal.SETTINGS if key in now}
                assert (
                    told[place]["settings"] == here
                ), f"{row.paper}/{row.name}: {profile} has changed; make rehearsal ONLY={row.paper}"


# ---------------------------------------------------------------- budget and choice


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("25m", 1500), ("2h", 7200), ("1h30m", 5400), ("1h5s", 3605), ("0.5h", 1800)],
)
def test_a_budget_reads_as_it_is_written(text, seconds):
    assert budget(text) == budget(f" {text} ") == seconds


NO_BUDGET = [
    "", " ", "0s", "0h0m", "25", "m", "-5m", "1d", "30m1h", "5m5m", "1e9s", "inf", "nan", "٣m",
    "2h; ls", "9" * 99 + "h",
]


@pytest.mark.parametrize("text", NO_BUDGET)
def test_what_is_no_budget_is_refused_and_named(text):
    with pytest.raises(ValueError, match="BUDGET="):
        budget(text)


def priced(**seconds: float | None) -> tuple[list[Job], dict[str, Estimate]]:
    jobs = [job(name) for name in seconds]
    return jobs, {j.name: Estimate(seconds[j.row.name], 1.0, "estimated") for j in jobs}


def test_worth_comes_first_then_the_seed_then_the_price():
    jobs = [
        job("ours", 3), job("ablation", 2), job("headline", 1, seed=1), job("headline", 1),
        job("baseline", 1), job("unknown", 2),
    ]
    cost = {"ours": 1.0, "ablation": 2.0, "headline": 9.0, "baseline": 5.0, "unknown": None}
    known = {j.name: Estimate(cost[j.row.name], 1.0, "estimated") for j in jobs}
    order = [(j.row.name, j.seed) for j in by_priority(jobs, known)]
    assert order == [
        ("baseline", 0), ("headline", 0), ("headline", 1), ("ablation", 0), ("unknown", 0),
        ("ours", 0),
    ]


def test_nothing_is_chosen_that_would_outlive_what_is_left():
    jobs, known = priced(a=100.0, b=40.0, c=None, d=60.0)
    names = lambda *arguments: [j.row.name for j in choose(jobs, known, *arguments)]
    assert names(100.0) == ["a"] and names(99.0) == ["b"] and names(39.0) == [] and names(0.0) == []
    assert names(100.0, 1.0, 3) == ["a", "b", "d"]
    assert names(100.0, 2.0, 3) == ["b"]  # runs take twice as long as thought


class Clock:
    """Stands for time and for Snakemake: a job takes `factor` times its estimate, and leaves its
    ledger entry unless it is to fail.
    """

    def __init__(self, monkeypatch, tmp_path, factor=1.0, fail=(), **seconds):
        self.now, self.factor, self.fail, self.started = 0.0, factor, fail, []
        self.seconds = {name.replace("__", "/"): value for name, value in seconds.items()}
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(batch, "_snakemake", self.snakemake)
        monkeypatch.setattr(batch, "ROOT", tmp_path)
        monkeypatch.setattr(batch, "skipped", lambda *arguments: None)
        monkeypatch.setattr(estimates, "estimates", self.estimates)
        (tmp_path / "results").mkdir()

    def estimates(self, jobs, *rest):
        price = lambda j: self.seconds.get(j.row.name, 10.0)
        return {
            j.name: Estimate(price(j), 1.0, "estimated", "held" if price(j) == 0 else "")
            for j in jobs
        }

    def snakemake(self, targets, configuration, cores):
        names = [target.split("/")[-3] for target in targets]
        self.started += names
        self.now += self.factor * max(self.seconds.get(name, 10.0) for name in names)
        for name, target in zip(names, targets):
            if name not in self.fail:
                (batch.ROOT / target).parent.mkdir(parents=True)
                (batch.ROOT / target).write_text("{}")

    def missing(self, text: str) -> None:
        batch.missing("smoke", "ide", "", "", 0, "", "", "cpu", "runs", text, 1)


def test_missing_runs_by_priority_and_stops_before_the_budget_ends(monkeypatch, tmp_path, capsys):
    clock = Clock(monkeypatch, tmp_path, ide=60, ide_plus=50, pixels=30, chance=200, histogram=5)
    clock.missing("150s")
    # chance would outlive it
    assert clock.started == ["ide_plus", "ide", "histogram", "pixels"] and clock.now <= 150
    out = capsys.readouterr().out
    assert (
        "none of these fits into what is left of 150s" in out
        and "ide/chance" in out
        and "3.3 min" in out
    )


def test_missing_learns_from_its_own_runs(monkeypatch, tmp_path):
    clock = Clock(
        monkeypatch, tmp_path, factor=2.0, ide=60, ide_plus=50, pixels=30, chance=30, histogram=30
    )
    # 50 s are left at the end: enough for 30 s as estimated, not for 60 s as learnt
    clock.missing("270s")
    assert clock.started == ["ide_plus", "ide"] and clock.now == 220


def test_missing_says_when_nothing_is_missing_and_when_nothing_fits(monkeypatch, tmp_path, capsys):
    clock = Clock(monkeypatch, tmp_path, ide=0, ide_plus=0, pixels=0, chance=0, histogram=0)
    clock.missing("1s")
    assert "nothing is missing" in capsys.readouterr().out and not clock.started
    clock.seconds |= {"pixels": 45, "ide": 90}
    clock.missing("30s")
    assert (
        "cheapest, ide/pixels/toytown-s0, takes about 45 s" in capsys.readouterr().out
        and not clock.started
    )


def test_missing_needs_a_process_even_where_nothing_is_missing(monkeypatch, tmp_path):
    Clock(monkeypatch, tmp_path, ide=0, ide_plus=0, pixels=0, chance=0, histogram=0)
    for processes in (0, -1):
        with pytest.raises(ValueError, match=f"PROCESSES={processes}: give at least 1"):
            batch.missing("smoke", "ide", "", "", 0, "", "", "cpu", "runs", "1s", 1, processes)


@pytest.mark.parametrize("damaged", ["runs/z/ledger.json", "results/z.json"])
def test_a_damaged_entry_stops_publishing_before_anything_is_written(
    monkeypatch, tmp_path, damaged
):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nname = reid_repro\n")
    for folder in ("runs/a", "runs/z", "results"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(
        ROOT / "results" / "ide-ide-toytown-smoke-s0.json", tmp_path / "runs" / "a" / "ledger.json"
    )
    (tmp_path / damaged).write_text("{")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batch, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"z.*\.json: damaged"):
        batch.publish("runs")
    assert [path.name for path in (tmp_path / "results").iterdir()] == (
        ["z.json"] if "results" in damaged else []
    )
    (tmp_path / damaged).unlink()
    batch.publish("runs")
    assert [path.name for path in (tmp_path / "results").iterdir()] == [
        "ide-ide-toytown-smoke-s0.json"
    ]


def test_a_failed_run_is_told_and_does_not_stop_the_others(monkeypatch, tmp_path):
    clock = Clock(monkeypatch, tmp_path, fail=("ide_plus",))
    with pytest.raises(SystemExit, match="FAILED ide/ide_plus/toytown-s0"):
        clock.missing("10m")
    assert set(clock.started) == {"ide", "ide_plus", "pixels", "chance", "histogram"}


@pytest.mark.slow("a batch")
def test_missing_makes_a_run_for_real(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(estimates, "read_costs", lambda: {"device": "made", "rows": {}})
    real = estimates.estimates
    monkeypatch.setattr(
        estimates, "estimates", lambda *a: {n: Estimate(1.0, 1.0, "estimated") for n in real(*a)}
    )
    batch.missing("smoke", "ide/chance", "", "", 0, "", "none", "cpu", str(tmp_path), "10m", 1)
    assert (tmp_path / "smoke" / "ide" / "chance" / "toytown-s0" / "ledger.json").is_file()
    assert "1 runs done" in capfd.readouterr().out


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_number_of_cores_is_not_that_of_a_library_s_threads():
    def cores(**environment: str) -> str:
        command = ["make", "-s", "--eval", "cores: ; @echo $$CORES", "cores"]
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
            check=True,
        ).stdout.strip()

    assert cores(OMP_NUM_THREADS="999") == cores(OMP_NUM_THREADS="1") != "999"
    assert cores(CORES="3") == "3"


def test_seeds_are_one_number():
    command = [sys.executable, "ci/batch.py", "plan", "--seeds", "0,1,2"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode and "SEEDS=0,1,2: give how many seeds" in told.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["missing", "rehearsal"])
def test_words_on_the_command_line_reach_python_as_they_are_and_no_shell(tmp_path, target):
    python, mark = tmp_path / "python", tmp_path / "mark"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    for name, option in (
        ("ONLY", "--only"), ("CORES", "--cores"),
        *([("BUDGET", "--budget")] if target == "missing" else []),
    ):
        value = f'`touch {mark}`"; touch {mark}; echo "'
        command = [
            "make", "-o", "env", "-o", ".venv/.ready", f"BIN={tmp_path}", target, f"{name}={value}",
        ]
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
        assert told[told.index(option) + 1] == value and not mark.exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("name", ["a$x", 'a"b', "a'b", "a b", "ü", "$(x)`y`", "#a;b&c"])
def test_a_checkout_may_lie_in_a_folder_of_any_name(name, tmp_path):
    python = tmp_path / name / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$0" "$@"\n')
    python.chmod(0o755)
    shutil.copyfile(ROOT / "Makefile", tmp_path / name / "Makefile")
    command = ["make", "-o", "env", "plan", "reproduce"]
    told = subprocess.run(command, cwd=tmp_path / name, capture_output=True, text=True)
    lines = told.stdout.splitlines()
    assert told.returncode == 0 and lines.count(str(python)) == 4, told
    assert str(python.with_name("snakemake")) in lines


@pytest.mark.parametrize("kind", [errno.ENOSYS, errno.ENOLCK, errno.EINVAL])
def test_snakemake_is_called_where_nothing_can_be_locked(kind, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    left = tmp_path / ".snakemake" / "locks" / "0.input.lock"  # of a living batch or a dead one
    left.parent.mkdir(parents=True)
    left.touch()
    called = []

    def refuse(*_):
        raise OSError(kind, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(batch, "ROOT", tmp_path)
    monkeypatch.setattr(batch.os, "execvp", lambda program, words: called.append(words))
    monkeypatch.setattr(files, "_warned", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")  # no Slurm
    monkeypatch.setenv("REID_REPRO_CALL", "")  # set anew, and taken back with this test
    with pytest.warns(UserWarning, match="has no locks"):
        batch.unlocked(["snakemake", "-n"])
    assert called == [["snakemake", "-n"]] and left.exists()


@pytest.mark.parametrize(("variable", "place"), [
    ("XDG_CACHE_HOME", "file/cache"), ("HOME", "/dev/null"), ("HOME", "/proc"), ("HOME", "file"),
])
def test_a_home_that_cannot_be_written_is_told_before_snakemake(variable, place, tmp_path):
    (tmp_path / "file").touch()
    kept = {key: value for key, value in os.environ.items() if key != "XDG_CACHE_HOME"}
    command = [sys.executable, "ci/batch.py", "unlocked", "snakemake"]
    told = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True,
        env=kept | {variable: str(tmp_path / place)},
    )
    assert told.returncode == 1 and "Traceback" not in told.stderr, told.stderr
    assert f"{place}" in told.stderr and "set XDG_CACHE_HOME to a folder" in told.stderr


# ---------------------------------------------------------------- the rehearsal

SPOILT = f"""
import sys
sys.path.insert(0, {str(ROOT / "ci")!r})
import rehearsal
injected = rehearsal.injected
rehearsal.injected = lambda row, *rest: injected(row, *rest) | ({{"pictures": "everything"}} if row.name == "chance" else {{}})
rehearsal.main()
"""


@pytest.mark.slow("a rehearsal")
def test_a_rehearsal_measures_and_counts_and_a_row_that_fails_stops_no_other(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "spoilt.py").write_text(SPOILT)
    # what the process of a notebook runs
    monkeypatch.setattr(rehearsal, "__file__", str(tmp_path / "spoilt.py"))
    monkeypatch.setattr(rehearsal, "COSTS", tmp_path / "costs.json")
    assert rehearsal.rehearsal("ide/chance,ide/ide", str(tmp_path / "out"), 1) == 1
    lines = {
        (e["row"], e["pass"]): e
        for e in json.loads((tmp_path / "out" / "report.json").read_text())["lines"]
    }
    assert set(lines) == {("chance", "small"), ("ide", "small"), ("ide", "count")}
    error = lines.pop(("chance", "small"))["error"]
    assert error.startswith("ValueError: ") and "'everything'" in error
    assert f"FAILED ide/chance (small): {error}" in capsys.readouterr().out and not any(
        line["error"] for line in lines.values()
    )
    (small,), (full,) = lines["ide", "small"]["stages"], lines["ide", "count"]["stages"]
    assert (
        small["step_seconds"] > 0
        and lines["ide", "small"]["memory_mib"] > 100
        and small["images"] == 8
    )
    # ResNet-50 at 256×128, last stride 2: 4.1 G at 224×224, times 0.65
    assert 2.6e9 < full["macs_per_image"] < 2.8e9
    assert 23e6 < full["parameters"] < 26e6 and full["stored_mib_per_image"] > 50
    assert not (tmp_path / "costs.json").exists()  # one failed


def test_a_rehearsal_of_some_rows_keeps_what_others_cost(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "COSTS", tmp_path / "costs.json")
    assert rehearsal.kept_costs([], "here") == {}
    rows = {"ide/ide": {"small": 1}, "ide/ide_plus": {"small": 2}, "ide/gone": {"small": 3}}
    rehearsal.COSTS.write_text(json.dumps({"device": "here", "rows": rows}))
    again = [{"paper": "ide", "row": "ide", "pass": "small"}]
    assert rehearsal.kept_costs(again, "here") == {"ide/ide_plus": {"small": 2}}
    assert rehearsal.kept_costs(again, "elsewhere") == {}, "seconds of two machines do not mix"


def test_rows_that_a_dead_process_did_not_reach_are_failures(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(rehearsal.sys, "executable", shutil.which("false"))
    rehearsal._process("ide", ["pixels", "ide"], "", "", said.append)
    assert [(line["row"], line["pass"]) for line in said] == [
        ("pixels", "small"), ("ide", "small"), ("ide", "count"),
    ]
    assert all("ended with 1" in line["error"] for line in said)


def test_drawn_convolutions_change_no_count():
    from reid_repro.ide import IDE, ide_objective

    model, pixels = IDE(4, backbone="tiny"), torch.rand(4, 3, 64, 32)
    loss = lambda: ide_objective(torch.arange(4))(model, torch.arange(4), lambda rows: pixels[rows])
    (_, drawn, stored) = rehearsal.counted(loss, drawn=True)
    (_, computed, held) = rehearsal.counted(loss)
    assert drawn == computed > 0 and stored == pytest.approx(held, rel=0.01)


def test_settings_that_only_a_notebook_knows_are_part_of_a_row():
    rows = {row.name: row for row in read_rows("can")}
    told = rehearsal.settings("can", rows["can"], "paper")
    # two people, or triplets have no negative
    assert told["instances"] == 4 and rehearsal.fewest_images(told) == 8


# ---------------------------------------------------------------- the tables behind a call


def test_tables_of_a_call_speak_of_its_rows_alone():
    def said(only: str) -> str:
        jobs = [job for job in plan("smoke", only) if not job.skip]
        return "\n".join(map(str, batch._tables_of(jobs, "smoke")))

    chosen = said("ide/pixels")
    assert "pixels" in chosen and len(chosen.splitlines()) == 3  # title, columns, the row
    assert "its pulse, toytown" in said("minet/mi_spp")
    # a call that names nothing asks for the profile's first rows
    usual = said("")
    assert "IDE+" in usual and "chance" not in usual and "not run yet" not in usual


def test_a_call_ends_with_the_number_of_rows_that_were_not_asked_for(capsys):
    told = {}
    for only in ("ide/pixels", "all"):
        batch.tables("smoke", only, "", "", 0, "", "", "", "runs")
        told[only] = [line for line in capsys.readouterr().out.splitlines() if "asked for" in line]
    (line,) = told["ide/pixels"]
    everything = [job for job in plan("smoke", "all") if not job.skip]
    assert line.startswith(f"{len(everything) - 1} other runs of profile 'smoke'")
    assert "chance" not in line and not told["all"]


def test_the_floor_and_the_baselines_run_first():
    "In the order of the notebooks, whatever the alphabet says."
    notebooks = [job.row.notebook for job in plan("smoke", "all")]
    assert notebooks == sorted(notebooks) and "/ide/" in notebooks[0]
    first = [job.name for job in plan("smoke")]
    assert first[:2] == ["ide/pixels/toytown-s0", "ide/ide/toytown-s0"]
    notebooks = [job.row.notebook for job in plan("smoke")]
    assert notebooks == sorted(notebooks)


def finished(folder: Path, row: str) -> Path:
    "A run of the committed ledger, as a call leaves it below `folder`."
    run = folder / "smoke" / "ide" / row / "toytown-s0"
    run.mkdir(parents=True)
    shutil.copy(ROOT / f"results/ide-{row}-toytown-smoke-s0.json", run / "ledger.json")
    (run / "notebook.html").touch()
    return run


def test_a_run_that_ends_prints_what_its_paper_has_reached_so_far(tmp_path, monkeypatch):
    monkeypatch.setenv("REID_REPRO_PLAN", json.dumps(["smoke", "", "", "", 0]))
    pixels = finished(tmp_path, "pixels")
    lines = batch.so_far(pixels).strip().splitlines()
    assert lines[0] == "IDE, 1 of 3 runs: Toytown (no paper number exists)" and len(lines) == 3
    assert "raw pixels" in lines[2] and "11.5 / 7.9" in lines[2] and "epochs" not in lines[1]
    finished(tmp_path, "histogram")  # of another call
    both = batch.so_far(finished(tmp_path, "ide"))
    assert "2 of 3 runs" in both and "raw pixels" in both and "histogram" not in both


def test_what_is_wrong_with_another_run_does_not_undo_this_one(tmp_path, monkeypatch):
    monkeypatch.setenv("REID_REPRO_PLAN", json.dumps(["smoke", "", "", "", 0]))
    pixels = finished(tmp_path, "pixels")
    (finished(tmp_path, "ide") / "ledger.json").write_text("{", encoding="utf-8")
    assert batch.so_far(pixels).startswith("no table yet: ValueError: ")
    monkeypatch.delenv("REID_REPRO_PLAN")  # called by hand: the run alone
    assert batch.so_far(pixels).strip().startswith("IDE: Toytown")
