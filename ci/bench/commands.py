"""What one waits for on a new machine: `make env`, `make reproduce`, `make test` in a fresh clone.

    python ci/bench/commands.py --out results/bench/commands.json

Commit first: the clone has what is committed. Takes half an hour; `make env` needs the network.
"""

# first: it sets the number of threads
from common import main
import os
import re
import resource
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = re.compile(r"^row +dataset · protocol")  # the head of a table of results


def waited(command, folder):
    """(minutes, CPU-minutes of all its processes, minutes until the first table or None) of a
    command, whose output goes on to the terminal. RuntimeError when it fails.
    """
    def used():
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        return spent.ru_utime + spent.ru_stime

    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    first, before, began = None, used(), time.perf_counter()
    with subprocess.Popen(
        command, cwd=folder, env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if first is None and TABLE.match(line):
                first = (time.perf_counter() - began) / 60
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed ({process.returncode}): no figure")
    return (time.perf_counter() - began) / 60, (used() - before) / 60, first


def commands(*, targets="env,reproduce,test"):
    "Minutes that `make TARGET` takes in a fresh clone of what is committed, one after the other."
    load, cores = os.getloadavg()[0], os.cpu_count()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch) / "reid_repro"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        for target in targets.split(","):
            wall, cpu, first = waited(["make", target], clone)
            rows.append(
                {
                    "command": f"make {target}", "minutes": round(wall, 1),
                    "CPU-minutes": round(cpu, 1),
                    "minutes to the first table": (
                        round(first, 1) if first and target == "reproduce" else None
                    ),
                }
            )
    return rows, [
        (
            f"One after the other in a fresh clone, {cores} cores, each once; a load of"
            f" {load:.1f} when they began is that of the minute before."
        ),
    ]


if __name__ == "__main__":
    main(commands)
