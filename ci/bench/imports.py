"""What imports cost, and the explorer's first list, each in a process of its own.

    python ci/bench/imports.py --out results/bench/imports.json
"""

# first: it sets the number of threads
from common import main
import subprocess
import sys

METHODS = ("ide", "pcb", "minet", "dcc", "casn", "ianet", "can")
CHILD = """
import resource
start = resource.getrusage(resource.RUSAGE_SELF)
{statement}
end = resource.getrusage(resource.RUSAGE_SELF)
print(end.ru_utime - start.ru_utime + end.ru_stime - start.ru_stime)
"""


def imported(statement, repeats):
    "Least CPU-seconds of a statement over `repeats` fresh processes."
    command = [sys.executable, "-c", CHILD.format(statement=statement)]
    return min(
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(repeats)
    )


def imports(*, repeats=1):
    "CPU-seconds of importing torch, the project, its evaluation, each method; of the explorer."
    statements = [
        "import torch", "import reid_repro", "from reid_repro import evaluate",
        *(f"import reid_repro.{name}" for name in METHODS),
        "from reid_repro import lab; lab.explore()",  # Toytown has been drawn before
    ]
    seconds = {statement: imported(statement, repeats) for statement in statements}
    torch = seconds["import torch"]
    rows = [
        {
            "statement": statement, "CPU-s": round(spent, 3),
            "beyond torch": round(spent - torch, 3) if spent > torch else None,
        }
        for statement, spent in seconds.items()
    ]
    return rows, [f"Each in a process of its own, the least of {repeats}."]


if __name__ == "__main__":
    main(imports)
