"""What is made of Slurm's words, without any Slurm: why a job waits, why it ended, whether it is tried
again. (Slurm itself: test_slurm.)
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ci"))
import batch
import slurm
from slurm import Job

NOTE = "slurmstepd: error: *** STEP 7.0 ON n1 {} ***"
LIMIT = NOTE.format("CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT")


@pytest.fixture
def ended(tmp_path, monkeypatch):
    "A notebook and its job's log: `ended(words, error)`; None for no log."
    monkeypatch.setattr(slurm, "LOGS", tmp_path / "logs")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("REID_REPRO_CALL", raising=False)

    def make(words: str | None, error: str = "") -> Path:
        cell = nbformat.v4.new_code_cell("1")
        if error:
            told = nbformat.v4.new_output("error", ename=error, evalue="told", traceback=[])
            cell.outputs.append(told)
        file = tmp_path / "runs/smoke/ide/ide/toytown-s0/notebook.ipynb"
        file.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), file)
        file.with_name("failed.ipynb").unlink(missing_ok=True)
        if error:
            shutil.copyfile(file, file.with_name("failed.ipynb"))
        log = tmp_path / "logs/ide_ide_toytown-s0/7.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        if words is not None:
            log.write_text(f"epoch 1/3\n{words}\n")
        return file

    return make


def again(notebook: Path) -> bool:
    try:
        batch.refuse_second_attempt(notebook)
    except SystemExit as refusal:
        assert "it is not repeated" in str(refusal)
        return False
    return True


@pytest.mark.parametrize(
    ("words", "error", "told", "repeated"),
    [
        (LIMIT, "", "it reached its time limit", True),
        (LIMIT, "DeadKernelError", "it reached its time limit", True),
        (LIMIT.replace("slurmstepd", "slurmstepd-n1"), "DeadKernelError", "its time limit", True),
        ("slurmstepd-room: error: *** JOB 7 ON room CANCELLED AT x ***", "", "was cancelled", False),
        (NOTE.format("CANCELLED AT x DUE TO PREEMPTION"), "", "it was preempted", True),
        (NOTE.format("CANCELLED AT x DUE TO NODE FAILURE"), "", "its node was lost", True),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.", "", "want of memory", False),
        ("slurmstepd: error: Exceeded job memory limit", "", "(memory_mb of its profile)", False),
        ("srun: error: n1: task 0: Out Of Memory", "DeadKernelError", "DeadKernelError", False),
        (NOTE.format("CANCELLED AT 2026-01-01T00:00:00"), "", "it was cancelled", False),
        ("", "ValueError", "ValueError: told", False),
        (None, "ValueError", "ValueError: told", False),
        (None, "", "it was stopped; the same call continues it", True),
        ("ValueError: no room in memory limit", "", "it was stopped", True),  # a run's own words
    ],
)
def test_what_ended_a_job_is_told_and_decides_on_a_second_attempt(
    ended, words, error, told, repeated
):
    notebook = ended(words, error)
    assert told in batch.failure(notebook)
    notebook.write_text("")  # by Snakemake, before the second attempt
    assert again(notebook) == repeated
    if error and not repeated:
        assert error in batch.failure(notebook), "the traceback is back"


def test_an_old_log_and_that_of_this_very_job_say_nothing(ended, monkeypatch):
    notebook = ended(LIMIT)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert slurm.ending(notebook) is None
    monkeypatch.delenv("SLURM_JOB_ID")
    assert slurm.ending(notebook)
    monkeypatch.setenv("REID_REPRO_CALL", str(time.time() + 60))  # a later call of make
    assert slurm.ending(notebook) is None
    monkeypatch.delenv("REID_REPRO_CALL")
    os.utime(slurm.LOGS / "ide_ide_toytown-s0/7.log", (1, 1))
    assert slurm.ending(notebook, time.time()) is None and "was stopped" in batch.failure(notebook)
    assert slurm.ending(notebook.with_name("none") / "x.ipynb") is None


def test_odd_reasons_stand_alone_and_usual_ones_are_counted():
    jobs = [
        Job("1", "PENDING", "Priority", "a"), Job("2", "PENDING", "Priority", "b"),
        Job("3", "PENDING", "Resources", "c"), Job("4", "RUNNING", "None", "d"),
        Job("5", "PENDING", "PartitionConfig", "e"),
        Job("6", "PENDING", "ReqNodeNotAvail, UnavailableNodes:n1", "f"),
        Job("7", "PENDING", "QOSMaxGRESPerUser", "g"), Job("8", "PREEMPTED", "None", "h"),
    ]
    stuck, usual = slurm.waiting(jobs)
    assert usual == ["waiting in Slurm's queue: 2 for Priority, 1 for Resources"]
    assert [line.split()[1] for line in stuck] == ["5", "6", "7", "8"]
    assert "no node of its partition has the cores, memory or GPUs" in stuck[0]
    assert "down, drained or reserved" in stuck[1] and "man squeue" in stuck[2]


def queue_says(folder: Path, monkeypatch, script: str) -> None:
    (folder / "squeue").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("REID_REPRO_CALL", "0")  # is set by the call, and goes with the test
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_only_this_folders_jobs_of_snakemake_stop_a_call(tmp_path, monkeypatch):
    mine, name = "1|RUNNING|None|", "rule_run_wildcards_ide_ide_toytown-s0"
    others = f"2|RUNNING|None|{name}|/elsewhere\n3|RUNNING|None|(null)|{ROOT}"
    queue_says(tmp_path, monkeypatch, f"printf '%s\n' '{others}'")
    slurm.before(["snakemake"])
    queue_says(tmp_path, monkeypatch, f"printf '%s\n' '{mine}{name}|{ROOT}' '{others}'")
    with pytest.raises(SystemExit, match=r"1 \(ide_ide_toytown-s0\) running.*scancel 1$"):
        slurm.before(["snakemake"])


def test_a_queue_that_cannot_be_read_stops_a_call_for_slurm_alone(tmp_path, monkeypatch):
    queue_says(tmp_path, monkeypatch, "echo 'Unable to contact slurm controller' >&2; exit 1")
    slurm.before(["snakemake", "--cores", "2"])
    with pytest.raises(SystemExit, match="Unable to contact slurm controller"):
        slurm.before(["snakemake", "--workflow-profile", "ci/cluster/slurm"])
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    slurm.before(["snakemake"])
    with pytest.raises(SystemExit, match="no command squeue"):
        slurm.before(["snakemake", "--workflow-profile", "ci/cluster/slurm"])


def test_the_watch_ends_with_its_parent(tmp_path):
    parent = subprocess.Popen(["sleep", "0"])
    parent.wait()
    subprocess.run([sys.executable, "ci/slurm.py", str(parent.pid)], cwd=ROOT, timeout=60, check=True)


@pytest.mark.parametrize("folder", ["a b", "it's", "a$b", "a(b)"])
def test_a_python_whose_path_a_shell_would_cut_is_refused(folder, monkeypatch):
    monkeypatch.setenv("REID_REPRO_CALL", "0")  # is set by the call, and goes with the test
    monkeypatch.setattr(slurm.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(slurm, "refuse_second_call", lambda needed: None)
    monkeypatch.setattr(slurm.sys, "executable", f"/srv/{folder}/python")
    with pytest.raises(SystemExit, match=r"without quotes; move this folder"):
        slurm.before(["snakemake", "--workflow-profile", "ci/cluster/slurm"])


def test_letters_of_any_language_may_be_in_the_path(monkeypatch):
    monkeypatch.setenv("REID_REPRO_CALL", "0")
    monkeypatch.setattr(slurm.sys, "executable", "/srv/Ärzte-1_x+y@z/python")
    monkeypatch.setattr(slurm.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(slurm, "refuse_second_call", lambda needed: None)
    started = []
    monkeypatch.setattr(slurm.subprocess, "Popen", lambda words, **_: started.append(words))
    slurm.before(["snakemake", "--workflow-profile", "ci/cluster/slurm"])
    assert len(started) == 1
