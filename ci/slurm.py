"""What Slurm says of this folder's jobs: those that live, why some wait, why one ended.

Snakemake's executor submits and follows them. It does not look whether a call that was cut off left
jobs behind, nor tell why jobs wait. Used by batch.py; `python ci/slurm.py <process>` is the watch
beside a running Snakemake.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / ".snakemake" / "slurm_logs" / "rule_run"  # the executor's own place
POLL, REPEAT = 10, 60  # seconds between looks at the queue, and between lines about the same
# reasons that pass by themselves, as `man squeue` has them; with any other a job may wait for ever
USUAL = {
    "None", "Priority", "Resources", "BeginTime", "Cleaning", "Prolog", "Dependency",
    "JobArrayTaskLimit", "NodeDown", "RequeueDelay",
}
REMEDIES = {
    "PartitionConfig": "no node of its partition has the cores, memory or GPUs that it asks for",
    "PartitionNodeLimit": "it asks for more nodes or cores than its partition allows",
    "PartitionTimeLimit": "its time limit, runtime, is longer than its partition allows",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition takes no jobs now",
    "BadConstraints": "no node fulfils what it asks for (constraint, cores, memory, GPUs)",
    "ReqNodeNotAvail": "the nodes that could run it are down, drained or reserved",
    "JobHeldUser": "it is held; scontrol release lets it go",
    "JobHeldAdmin": "an administrator holds it",
}
# words in a job's log → (whether a second attempt makes sense, what happened)
ENDS = (
    ("DUE TO TIME LIMIT", True, "it reached its time limit (runtime of the cluster's profile)"),
    ("DUE TO PREEMPTION", True, "it was preempted"),
    ("DUE TO NODE FAILURE", True, "its node was lost"),
    ("DUE TO JOB REQUEUE", True, "it was put back into the queue"),
    ("oom_kill", False, "Slurm killed it for want of memory"),
    ("oom-kill", False, "Slurm killed it for want of memory"),
    ("Out Of Memory", False, "Slurm killed it for want of memory"),
    ("memory limit", False, "Slurm killed it for want of memory"),
    ("CANCELLED AT", False, "it was cancelled"),
)


@dataclass(frozen=True)
class Job:
    "A line of the queue."

    number: str
    state: str
    reason: str
    name: str

    def __str__(self) -> str:
        return f"{self.number} ({self.name})"


def queue() -> list[Job]:
    "This user's waiting and running jobs of this folder; OSError in squeue's words."
    columns = "%i|%T|%r|%k|%Z"  # the last is the working directory
    command = ["squeue", "--noheader", "--user", str(os.getuid()), "--format", columns]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise OSError(f"squeue: {done.stderr.strip()}")
    lines = [line.split("|", 4) for line in done.stdout.splitlines()]
    return [
        Job(number, state, reason, comment.removeprefix("rule_run_wildcards_"))
        for number, state, reason, comment, folder in lines
        if comment.startswith("rule_run") and Path(folder).resolve() == ROOT
    ]


def refuse_second_call(needed: bool) -> None:
    """SystemExit where jobs of an earlier call live: both would write the same folders.

    Args:
        needed: the call is for Slurm, so a queue that cannot be read is an error too.
    """
    try:
        jobs = queue()
        for _ in range(REPEAT):  # what was just cancelled is still being cleaned up
            if {job.state for job in jobs} == {"COMPLETING"}:
                time.sleep(1)
                jobs = queue()
    except (OSError, subprocess.TimeoutExpired) as error:
        if needed:
            raise SystemExit(f"Slurm's queue cannot be read: {error}") from None
        return
    if jobs:
        told = ", ".join(f"{job} {job.state.lower()}" for job in jobs[:20])
        more = f" and {len(jobs) - 20} more" if len(jobs) > 20 else ""
        numbers = " ".join(job.number for job in jobs)
        raise SystemExit(
            f"jobs of this folder are in Slurm's queue: {told}{more}. Another call submitted them,"
            " and a second one would run the same again beside them. Wait until they are done, or"
            f" cancel them: scancel {numbers}"
        )


def before(words: list[str]) -> None:
    """What `batch.py unlocked` does before Snakemake: notes the time of the call, looks for living
    jobs, starts the watch.
    """
    os.environ["REID_REPRO_CALL"] = str(time.time())
    profile = words[words.index("--workflow-profile") + 1] if "--workflow-profile" in words else ""
    ours = bool(profile) and _executor(ROOT / Path(profile).expanduser()) == "slurm"
    if ours and not shutil.which("squeue"):
        raise SystemExit("CLUSTER: there is no command squeue; call this on a login node of Slurm")
    if not shutil.which("squeue"):
        return
    refuse_second_call(ours)
    if ours and any(character in " \t\"'`$&;|<>()*?[]#~\\" for character in sys.executable):
        raise SystemExit(
            f"CLUSTER: Slurm's jobs begin with {sys.executable}, which Snakemake's executor writes"
            " into them without quotes; move this folder to a path without blanks, quotes or"
            " other signs that a shell reads, and call again"
        )
    if ours:
        subprocess.Popen([sys.executable, __file__, str(os.getpid())], stdin=subprocess.DEVNULL)


def _executor(profile: Path) -> str:
    import yaml

    file = profile / "config.yaml"
    content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content.get("executor", "") if isinstance(content, dict) else ""


def waiting(jobs: list[Job]) -> tuple[list[str], list[str]]:
    "(lines on jobs that may wait for ever, lines on the others) of those that wait."
    stuck, usual = [], Counter()
    for job in jobs:
        reason = job.reason.partition(",")[0].strip("()")
        if job.state == "PREEMPTED":
            stuck.append(f"job {job} was preempted, and Slurm did not put it back: call again")
        elif job.state == "PENDING" and reason in USUAL:
            usual[reason] += 1
        elif job.state == "PENDING":
            what = REMEDIES.get(reason, "see man squeue, JOB REASON CODES")
            stuck.append(
                f"job {job} waits: {job.reason}: {what}. If it stays so, end this call by Ctrl-C,"
                " change what it asks for (docs/cluster.md) and call again"
            )
    counts = ", ".join(f"{count} for {reason}" for reason, count in usual.items())
    return stuck, [f"waiting in Slurm's queue: {counts}"] if counts else []


def watch(parent: int) -> None:
    "Why jobs wait, while Snakemake lives: odd reasons at once, others by the minute."
    last: dict[str, float] = {}
    minute = time.monotonic()
    while os.getppid() == parent:
        try:
            stuck, usual = waiting(queue())
        except (OSError, subprocess.TimeoutExpired):  # a busy controller; the executor tells
            stuck, usual = [], []
        now = time.monotonic()
        due = now - minute >= REPEAT
        lines = [line for line in stuck if now - last.get(line, -REPEAT) >= REPEAT]
        last |= dict.fromkeys(lines, now)
        if due:
            lines, minute = [*lines, *usual], now
        if lines:
            print("\n".join(lines), file=sys.stderr, flush=True)
        for _ in range(POLL):
            if os.getppid() == parent:
                time.sleep(1)


def ending(notebook: Path, since: float = 0) -> tuple[bool, str] | None:
    """(a second attempt makes sense, what happened) to the last job of this notebook, from what
    Slurm wrote into its log; None where it wrote nothing.

    Args:
        notebook: that the job wrote.
        since: a time; logs that are older, or older than this call of make, are of other jobs.
    """
    name = "_".join(notebook.parent.parts[-3:])
    since = max(since, float(os.environ.get("REID_REPRO_CALL", 0)))
    logs = [(log.stat().st_mtime, log) for log in (LOGS / name).glob("*.log")]
    here = os.environ.get("SLURM_JOB_ID")
    logs = sorted(log for log in logs if log[0] >= since - 5 and log[1].stem != here)
    if not logs:
        return None
    text = logs[-1][1].read_text(encoding="utf-8", errors="replace")
    # some nodes put their name behind a hyphen
    lines = [line for line in text.splitlines() if re.match(r"(slurmstepd(-\S+)?|srun): ", line)]
    found = [(again, told) for words, again, told in ENDS if words in "\n".join(lines)]
    return found[0] if found else None


if __name__ == "__main__":
    try:
        watch(int(sys.argv[1]))
    except KeyboardInterrupt:
        pass
