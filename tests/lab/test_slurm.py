"""A real Slurm on one node, private and on the loopback address: what our jobs ask it for, and a job
that waits, is cancelled, is submitted again and finishes.

Needs Debian's `slurm-wlm` and `munge`; CI installs them. Elsewhere these tests are skipped.
"""

import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "sinfo")
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
BOUND = 300  # seconds for whatever is waited for, on the slowest machine
# as `ci/batch.py unlocked`, whose lock would keep other tests waiting; Ctrl-C is heard even where
# the tests themselves run in the background of a shell that ignores it
CALL = """import os, signal, sys; sys.path.insert(0, "ci"); import slurm
signal.signal(signal.SIGINT, signal.SIG_DFL)
slurm.before(sys.argv[1:]); os.execvp(sys.argv[1], sys.argv[1:])"""
CONF = """ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={port}
SlurmdPort={next_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SwitchType=switch/none
MpiDefault=none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SchedulerParameters=batch_sched_delay=1,sched_interval=2
KillWait=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=30000 Gres=gpu:1
PartitionName=main Nodes={host} Default=YES
"""


class Slurm:
    "The daemons in a folder, and a user's commands."

    def __init__(self, folder: Path):
        self.folder = folder
        self.host = os.uname().nodename.partition(".")[0]
        self.daemons = []
        user = pwd.getpwuid(os.getuid()).pw_name
        for name in ("state", "spool", "bin"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        folder.chmod(0o755)
        port = 20000 + os.getpid() % 20000
        conf = folder / "slurm.conf"
        conf.write_text(
            CONF.format(host=self.host, user=user, folder=folder, port=port, next_port=port + 1)
        )
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        # Snakemake's step executor drops SLURM_CONF for the srun inside a job (docs/cluster.md)
        srun = folder / "bin" / "srun"
        srun.write_text(
            f'#!/bin/sh\nSLURM_CONF={conf} exec {shutil.which("srun", path=PATH)} "$@"\n'
        )
        srun.chmod(0o755)
        self.environment = {
            **os.environ, "SLURM_CONF": str(conf), "PATH": f"{folder}/bin:{PATH}",
        }

    def said(self, *command: str) -> str:
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True
        ).stdout.strip()

    def jobs(self, columns: str) -> str:
        "Lines of the queue, such as `%i %T`: waiting and running jobs."
        return self.said("squeue", "-h", "-o", columns)

    def node(self, state: str) -> None:
        words = [f"nodename={self.host}", f"state={state}"]
        self.said("scontrol", "update", *words, *["reason=test"] * (state == "drain"))

    def start(self) -> None:
        at = self.folder
        munged = [
            "munged", "--foreground", "--force", f"--key-file={at}/munge.key",
            f"--socket={at}/munge.socket", f"--pid-file={at}/munge.pid",
            f"--log-file={at}/munge.log", f"--seed-file={at}/munge.seed",
        ]
        self._daemon(munged, (at / "munge.socket").exists)
        self._daemon(["slurmctld", "-D", "-i", "-c"], lambda: "main" in self.said("sinfo", "-h"))
        self._daemon(
            ["slurmd", "-D", "-N", self.host],
            lambda: "idle" in self.said("sinfo", "-h", "-o", "%T"),
        )

    def _daemon(self, command: list[str], ready) -> None:
        log = self.folder / f"{command[0]}.log"
        with open(log, "w") as out:
            process = subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=out, start_new_session=True
            )
        self.daemons.append(process)
        deadline = time.monotonic() + BOUND
        while not ready():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

    def stop(self) -> None:
        self.said("scancel", "-u", pwd.getpwuid(os.getuid()).pw_name)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if missing := [name for name in NEEDED if not shutil.which(name, path=PATH)]:
        pytest.skip(f"needs Slurm: {', '.join(missing)} missing; apt-get install slurm-wlm munge")
    if " " in sys.executable:
        pytest.skip(f"{sys.executable} holds a blank: refused, docs/cluster.md")
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="needs pip install '.[cluster]'")
    found = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        found.start()
        yield found
    finally:
        found.stop()


class Call:
    "A call of Snakemake with our profile, as make does it; ended by Ctrl-C if it still runs."

    def __init__(self, slurm: Slurm, folder: Path, *config: str, options: tuple = ()):
        self.slurm, self.log = slurm, folder / "log"
        words = [
            sys.executable, "-c", CALL, "snakemake", "-s", "ci/Snakefile", "--nolock",
            "--workflow-profile", "ci/cluster/slurm", "--quiet", "host", "progress",
            "--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "5",
            "--slurm-logdir", str(folder / "logs"), *options, "--config", *config,
        ]
        with open(self.log, "w") as out:
            self.process = subprocess.Popen(
                words, cwd=ROOT, env=slurm.environment, stdout=out, stderr=out
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(BOUND)

    def says(self, words: str) -> None:
        "Waits until it has printed this."
        deadline = time.monotonic() + BOUND
        while words not in self.log.read_text():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.5)

    def until(self, state: str, other_than: str = "") -> str:
        "Waits until a job is in this state; its number."
        deadline = time.monotonic() + BOUND
        while True:
            for line in self.slurm.jobs("%i %T").splitlines():
                number, found = line.split()
                if found == state and number != other_than:
                    return number
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)


def asked_for(slurm: Slurm, folder: Path, profile: str) -> dict[str, str]:
    "What a waiting job of this profile asks for; it is then cancelled by Ctrl-C."
    config = (
        f"profile={profile}", "only=ide/ide", "dataset=toytown", "weights=random",
        f"runs={folder / 'runs'}",
    )
    with Call(slurm, folder, *config) as call:
        number = call.until("PENDING")
        memory, limit, cores = slurm.jobs("%m|%l|%C").split("|")
        shown = slurm.said("scontrol", "show", "job", number)
    assert not slurm.jobs("%i"), "Ctrl-C left a job in the queue"
    gpus = re.findall(r"TresPerJob=gres:gpu:(\d+)", shown)
    return {"memory": memory, "time": limit, "cores": cores, "gpus": gpus}


def test_jobs_ask_for_the_memory_time_cores_and_gpus_of_their_profile(slurm, tmp_path):
    ours = yaml.safe_load((ROOT / "ci/cluster/slurm/config.yaml").read_text())
    assert ours["default-resources"]["runtime"] == 24 * 60
    slurm.node("drain")
    try:
        for name in ("paper", "smoke"):
            recipe = yaml.safe_load((ROOT / f"ci/profiles/{name}.yaml").read_text())
            (tmp_path / name).mkdir()
            asked = asked_for(slurm, tmp_path / name, name)
            memory = {"G": 1024, "M": 1}[asked["memory"][-1]] * float(asked["memory"][:-1])
            assert round(memory) == recipe["memory_mb"]  # docs/cluster.md names both
            told = f"--mem {recipe['memory_mb']} -t 1440 --cpus-per-task={asked['cores']}"
            assert told in (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
            assert asked["time"] == "1-00:00:00"
            cores = recipe["threads"]
            assert asked["cores"] == str(ours["cores"] if cores == "all" else cores)
            assert asked["gpus"] == ([str(recipe["gpu"])] if "gpu" in recipe else [])
    finally:
        slurm.node("resume")


def test_a_job_waits_is_cancelled_is_submitted_again_and_finishes(slurm, tmp_path):
    "Under the profile as it is shipped, without any accounting."
    runs = tmp_path / "my runs"
    config = ("profile=smoke", "only=ide/chance", "pictures=none", f"runs={runs}")
    slurm.node("drain")
    with Call(slurm, tmp_path, *config) as call:
        first = call.until("PENDING")
        slurm.said("scancel", first)
        second = call.until("PENDING", other_than=first)
        slurm.node("resume")
        assert call.process.wait(BOUND) == 0, call.log.read_text()
    assert (runs / "smoke/ide/chance/toytown-s0/ledger.json").is_file()
    assert f"SLURM-job '{first}' failed, SLURM status is: 'CANCELLED'" in call.log.read_text()
    assert second != first and not slurm.jobs("%i")


@pytest.mark.slow("waits for a scheduler")
def test_why_jobs_wait_is_told_and_no_second_call_runs_beside_living_jobs(slurm, tmp_path):
    "Also after the first call was killed, which leaves its jobs in the queue."
    config = ("profile=smoke", "only=ide/chance", "pictures=none", f"runs={tmp_path / 'runs'}")
    slurm.node("drain")
    try:
        (tmp_path / "again").mkdir()
        with Call(slurm, tmp_path, *config) as call:
            number = call.until("PENDING")
            slurm.said("scontrol", "hold", number)
            said = call.log.read_text()
            assert "ide/chance/toytown-s0" in said and "reid_repro/can.py" not in said
            call.says(f"job {number} (ide_chance_toytown-s0) waits: JobHeld")  # by root: Admin
            call.process.kill()
            call.process.wait(BOUND)
        with Call(slurm, tmp_path / "again", *config) as again:
            assert again.process.wait(BOUND) == 1
        said = again.log.read_text()
        assert f"{number} (ide_chance_toytown-s0) pending" in said and f"scancel {number}" in said
        assert "Traceback" not in said and slurm.jobs("%i") == number
    finally:
        slurm.said("scancel", number)
        slurm.node("resume")


@pytest.mark.slow("waits for a scheduler")
def test_the_schedulers_own_words_are_shown_and_what_fails_by_itself_is_not_repeated(
    slurm, tmp_path
):
    config = ("profile=smoke", "only=ide/chance", f"runs={tmp_path / 'runs'}")
    for name in ("nowhere", "wrong"):
        (tmp_path / name).mkdir()
    nowhere = ("--default-resources", "slurm_partition=nowhere", "--retries", "0")
    with Call(slurm, tmp_path / "nowhere", *config, options=nowhere) as call:
        assert call.process.wait(BOUND) == 1
    assert "invalid partition specified: nowhere" in call.log.read_text()
    with Call(slurm, tmp_path / "wrong", *config, "pictures=everything") as call:
        assert call.process.wait(BOUND) == 1
    logs = sorted((tmp_path / "wrong/logs").rglob("*.log"), key=lambda log: int(log.stem))
    first, second = (log.read_text() for log in logs)
    assert "'pictures' is 'everything'" in first and "is not repeated" not in first
    assert "the attempt before failed" in second and "it is not repeated" in second
