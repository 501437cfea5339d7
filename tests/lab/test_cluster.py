"""The cluster profiles: they parse, plan jobs with GPU, memory and time, and Slurm is asked for
just that (a stand-in listens).
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROFILES = sorted(path.parent.name for path in ROOT.glob("ci/cluster/*/config.yaml"))
STANDINS = {
    "sbatch": 'printf "%s " "$@" >> "$STANDIN/asked"; echo >> "$STANDIN/asked"; echo 77',
    "squeue": "echo '77|FAILED'",
    "sacct": "echo '77|FAILED'",
    "scontrol": "echo 'MinJobAge = 300 sec'; echo 'MaxArraySize = 1001'",
    "sinfo": 'printf "%s\\n" "main*"',
    "sshare": "true", "sacctmgr": "true", "scancel": "true", "srun": "true",
}


def snakemake(*words, **environment) -> subprocess.CompletedProcess:
    path = os.pathsep.join(
        [
            *filter(None, [environment.get("STANDIN")]),
            str(Path(sys.executable).parent), os.environ["PATH"],
        ]
    )
    environment = {**os.environ, **environment, "PATH": path}
    command = ["snakemake", "-s", "ci/Snakefile", "--nolock", *map(str, words)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


def plugin(name: str) -> None:
    pytest.importorskip(
        f"snakemake_executor_plugin_{name}",
        reason=f"needs Snakemake's {name} executor: pip install '.[cluster]'",
    )


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_sets_what_its_executor_knows_and_no_more(name):
    from dataclasses import fields
    from importlib import import_module

    from snakemake.cli import get_argument_parser

    plugin(name)
    content = yaml.safe_load(
        (ROOT / "ci" / "cluster" / name / "config.yaml").read_text(encoding="utf-8")
    )
    settings = {
        f"{name}-{f.name.replace('_', '-')}"
        for f in fields(import_module(f"snakemake_executor_plugin_{name}").ExecutorSettings)
    }
    options = {
        option.lstrip("-")
        for action in get_argument_parser()._actions
        for option in action.option_strings
    }
    assert content["executor"] == name and not set(content) - settings - options
    assert content["jobs"] > 0 and content["cores"] > 0


def test_the_makefile_takes_a_cluster_instead_of_cores():
    if not shutil.which("make"):
        pytest.skip("needs make")
    ready = ["-n", "-o", "env", "-o", ".venv/.ready", "reproduce"]
    plan = lambda *words: subprocess.run(
        ["make", *ready, *words], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert '--workflow-profile "ci/cluster/$CLUSTER"' in plan(
        "CLUSTER=slurm"
    ) and "--cores" not in plan("CLUSTER=slurm")
    assert "--cores" in plan() and "--workflow-profile" not in plan()
    assert set(PROFILES) == {"kubernetes", "slurm"}


def test_kubernetes_plans_jobs_whose_results_go_to_the_storage(tmp_path):
    plugin("kubernetes")
    pytest.importorskip(
        "snakemake_storage_plugin_fs",
        reason="needs a storage provider: pip install snakemake-storage-plugin-fs",
    )
    words = [
        "--workflow-profile", "ci/cluster/kubernetes", "--default-storage-prefix", tmp_path, "-n",
        "-p",
    ]
    done = snakemake(*words, "--config", "profile=paper", "only=ide/ide", "dataset=toytown")
    assert done.returncode == 0, done.stderr
    text = done.stdout + done.stderr
    inside = f".snakemake/storage/fs{tmp_path}/runs/paper/ide/ide/toytown-s0"
    assert re.search(r"resources: .*mem_mb=24000.*gpu_manufacturer=nvidia.*gpu=1", text)
    assert (
        f'"out": "{inside}"' in text
        and f"{tmp_path}/runs/paper/ide/ide/toytown-s0/ledger.json (send to storage)" in text
    )
    # the sources are not taken from the storage
    assert "batch.py run nbs/4_baselines/ide/2_reproduce.ipynb" in text


def test_slurm_is_asked_for_the_gpu_memory_time_and_cores_of_every_job(tmp_path):
    plugin("slurm")
    for name, body in STANDINS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    words = [
        "--workflow-profile", "ci/cluster/slurm", "--retries", 0, "--keep-going",
        "--slurm-init-seconds-before-status-checks", 1, "--slurm-logdir", tmp_path / "logs",
        "--seconds-between-status-checks", 1,
    ]
    asked = {}
    for profile in ("paper", "smoke"):
        config = [
            f"profile={profile}", "only=ide/ide", "dataset=toytown", f"runs={tmp_path / 'runs'}",
        ]
        done = snakemake(*words, "--config", *config, STANDIN=str(tmp_path))
        assert (tmp_path / "asked").exists(), done.stderr
        asked[profile] = (tmp_path / "asked").read_text()
        (tmp_path / "asked").unlink()
        assert done.returncode != 0  # the stand-in says that the job failed
    recipe = {
        profile: yaml.safe_load((ROOT / "ci" / "profiles" / f"{profile}.yaml").read_text())
        for profile in asked
    }
    ours = yaml.safe_load((ROOT / "ci" / "cluster" / "slurm" / "config.yaml").read_text())
    for profile, line in asked.items():
        told = dict(re.findall(r"--(mem|gpus|cpus-per-task|ntasks)[= ](\S+)", line))
        cores = recipe[profile]["threads"]
        assert told["mem"] == str(recipe[profile]["memory_mb"])
        assert told["cpus-per-task"] == str(ours["cores"] if cores == "all" else cores)
        assert told.get("gpus") == (
            str(recipe[profile]["gpu"]) if "gpu" in recipe[profile] else None
        )
        assert (
            re.search(rf" -t {ours['default-resources']['runtime']} ", line)
            and line.count("\n") == 1
        )
    assert "--gpus=1" in asked["paper"] and "--gpus" not in asked["smoke"]
