"""What all measurements share: clocks, memory, the machine, a table, options and a JSON file.

To add a measurement: a file beside this one with a function whose keyword-only arguments with
defaults become options; it returns (rows, notes). Rows, a list of dictionaries with the same keys,
make the table; notes is a list of sentences. `main(function)` does the rest.
"""

import os

# CPU-seconds of one thread; before NumPy and torch are imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
import argparse
import inspect
import json
import platform
import time
import tracemalloc
from pathlib import Path

import numpy as np
import torch


def cpu_seconds(call, repeat=3):
    """(least CPU-seconds of `repeat` calls, result of the last). The least, since other work on the
    machine only adds.
    """
    times = []
    for _ in range(repeat):
        start = time.process_time()
        result = call()
        times.append(time.process_time() - start)
    return min(times), result


def wall_seconds(call, repeat=3):
    "The same in wall seconds of a GPU, whose queue is empty before and after."
    times = []
    for _ in range(repeat):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times), result


def peak_mib(call):
    "Largest memory that NumPy and Python hold during `call`, in MiB, beyond what they held before."
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def resident_mib(call):
    """(result, peak, beyond) of `call`: largest resident memory of this process during it, and what
    of it is beyond that before, MiB.

    From Linux's VmHWM, which is set back to the present size first; nan elsewhere."""
    def field(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return call(), float("nan"), float("nan")
    before = field("VmRSS")
    result = call()
    return result, field("VmHWM"), field("VmHWM") - before


def interleaved(jobs, repeats, measure=cpu_seconds):
    """Least seconds of each of `jobs` (a dictionary of calls): one warm-up each, then A, B, A, B,
    so that other load cancels.
    """
    for call in jobs.values():
        call()
    rounds = [
        {name: measure(call, repeat=1)[0] for name, call in jobs.items()} for _ in range(repeats)
    ]
    return {name: min(times[name] for times in rounds) for name in jobs}


def training_step(model, batch, classes):
    "A call that trains `model` by one step of Adam on the same random photographs, channels last."
    model = model.to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-4)
    images = torch.randn(batch, 3, 256, 128).to(memory_format=torch.channels_last)
    people = torch.randint(classes, (batch,))

    def step():
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(images)[1], people).backward()
        optimiser.step()

    return step


def hardware():
    "What the numbers were measured on."
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else cpu, "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__,
    }


def table(rows):
    "`rows` as aligned text."
    cells = [list(rows[0])] + [["" if v is None else str(v) for v in row.values()] for row in rows]
    width = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, width)))
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def options_of(function, argv=None):
    "The options given on the command line: those of `function`, and `out`."
    parser = argparse.ArgumentParser(
        description=function.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for option, spec in inspect.signature(function).parameters.items():
        name = f"--{option.replace('_', '-')}"
        parser.add_argument(name, type=type(spec.default), default=spec.default, help=" ")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return vars(parser.parse_args(argv))


def main(function, argv=None):
    "Measures, prints a table and, with --out, writes it."
    options = options_of(function, argv)
    out = options.pop("out")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rows, notes = function(**options)
    machine = hardware()
    measured_on = ", ".join(f"{k} {v}" for k, v in machine.items() if v is not None)
    print(table(rows), *notes, f"Measured on: {measured_on}", sep="\n")
    if out:
        # no folders of yours
        shown = {k: Path(v).name if isinstance(v, str) else v for k, v in options.items()}
        record = {
            "bench": function.__name__.replace("_", "-"), "options": shown, "rows": rows,
            "notes": notes, "hardware": machine,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {out}")
