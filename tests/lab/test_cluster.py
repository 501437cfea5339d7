"""The cluster profiles: they parse, and plan jobs with GPU, memory and time. (Slurm itself: test_slurm.)"""

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

def snakemake(*words, **environment) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
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


def test_the_makefile_takes_a_cluster_instead_of_cores(tmp_path):
    "A name in ci/cluster, or a folder of one's own outside the checkout."
    if not shutil.which("make"):
        pytest.skip("needs make")
    ready = ["-n", "-o", "env", "-o", ".venv/.ready", "reproduce"]

    def recipe(*words: str) -> str:
        command = ["make", *ready, *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout

    for name, folder in (("slurm", "ci/cluster/slurm"), (str(tmp_path), str(tmp_path))):
        lines = recipe(f"CLUSTER={name}")
        assert "--cores" not in lines
        option = re.search(r'--workflow-profile (".*") --keep', lines)[1]
        echo = ["bash", "-c", f"printf %s {option}"]
        environment = {**os.environ, "CLUSTER": name}
        said = subprocess.run(echo, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert said.stdout == folder
    assert "--cores" in recipe() and "--workflow-profile" not in recipe()
    assert set(PROFILES) == {"kubernetes", "slurm"}


def test_planning_loads_neither_torch_nor_pandas(tmp_path):
    "Each job's own Snakemake plans too, inside the job's memory: what ci/Snakefile imports is light."
    imports = [
        line
        for line in (ROOT / "ci/Snakefile").read_text(encoding="utf-8").splitlines()
        if line.startswith(("import ", "from "))
    ]
    code = "\n".join(
        [
            *imports,
            "for name in ('smoke', 'paper'):",
            f"    read_profile(name), plan(name, data={str(tmp_path)!r} if name == 'paper' else '')",
            "import sys",
            "heavy = {'torch', 'torchvision', 'pandas', 'scipy', 'matplotlib'}",
            "print(sorted(heavy & set(sys.modules)))",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr


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
