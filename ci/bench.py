#!/usr/bin/env python
"""Measurements of the parts whose cost matters. Each subcommand prints a table and, with --out, writes it as JSON.

    python ci/bench.py evaluation
    python ci/bench.py evaluation --out results/bench/evaluation.json

To add one: a function decorated with @bench, whose keyword-only arguments with defaults become options. It returns
(rows, notes): rows, a list of dictionaries with the same keys, makes the table; notes is a list of sentences.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")       # CPU-seconds of one thread; before NumPy and torch are imported
import argparse
import inspect
import json
import platform
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import torch

BENCHES = {}


def bench(function):
    "Register `function` as the subcommand of its name."
    BENCHES[function.__name__.replace("_", "-")] = function
    return function


def cpu_seconds(call, repeat=3):
    "(least CPU-seconds of `repeat` calls, result of the last). The least, since other work on the machine only adds."
    times = []
    for _ in range(repeat):
        start = time.process_time()
        result = call()
        times.append(time.process_time() - start)
    return min(times), result


def peak_mib(call):
    "Largest memory that NumPy and Python hold during `call`, in MiB, beyond what they held before."
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def hardware():
    "What the numbers were measured on."
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
    }


def market_like(queries, gallery, dim, seed):
    "Features and ids in Market-1501's proportions: 750 people, six cameras, of the gallery 14 % distractors and 19 % junk."
    rng = np.random.default_rng(seed)
    g_pids = rng.integers(1, 751, gallery)
    kind = rng.random(gallery)
    g_pids[kind < 2798 / 19732] = 0
    g_pids[kind > 1 - 3819 / 19732] = -1
    q_pids = rng.integers(1, 751, queries)
    ids = q_pids, rng.integers(1, 7, queries), g_pids, rng.integers(1, 7, gallery)
    centre = rng.normal(size=(751, dim)).astype(np.float32)

    def features(pids):
        noise = rng.standard_normal((len(pids), dim), dtype=np.float32)
        return torch.from_numpy(np.where(pids[:, None] > 0, centre[pids], 0) + 2 * noise)

    return features(q_pids), features(g_pids), ids


def argsort_reference(dist, q_pids, q_camids, g_pids, g_camids):
    "mAP, mINP and rank-1 in the common form: for each query one argsort and a few masks. Needs distances without ties."
    ap, inp, first = [], [], []
    for d, pid, camid in zip(dist, q_pids, q_camids):
        order = np.argsort(d)
        keep = ~((g_pids[order] == -1) | ((g_pids[order] == pid) & (g_camids[order] == camid)))
        hit = (g_pids[order] == pid)[keep]
        if not hit.any():
            continue
        precision = hit.cumsum() / np.arange(1, len(hit) + 1)
        ranks = np.flatnonzero(hit) + 1
        ap.append((precision * hit).sum() / hit.sum())
        inp.append(len(ranks) / ranks[-1])
        first.append(ranks[0] == 1)
    return np.mean(ap), np.mean(inp), np.mean(first)


@bench
def evaluation(*, queries=3368, gallery=19732, dim=512, subset=200, seed=0):
    "distance_matrix and evaluate at the size of Market-1501, beside a plain per-query argsort."
    from reid_repro.evaluation import distance_matrix, evaluate

    subset = min(subset, queries)
    query, features, ids = market_like(queries, gallery, dim, seed)
    distance_s, dist = cpu_seconds(lambda: distance_matrix(query, features), repeat=1)
    dist = dist.numpy()
    part = dist[:subset], ids[0][:subset], ids[1][:subset], ids[2], ids[3]

    evaluate(*part)                                                                     # warm up
    fast_s, _ = cpu_seconds(lambda: evaluate(dist, *ids))
    part_s, scores = cpu_seconds(lambda: evaluate(*part))
    plain_s, plain = cpu_seconds(lambda: argsort_reference(*part))
    np.testing.assert_allclose((scores.mAP, scores.mINP, scores.rank(1)), plain, rtol=1e-4)      # same job; chance ties aside
    memory = peak_mib(lambda: evaluate(dist, *ids))
    plain_memory = peak_mib(lambda: argsort_reference(*part))
    scaled = plain_s * queries / subset

    row = lambda what, n, seconds, mib: {
        "what": what,
        "queries": n,
        "CPU-s": round(seconds, 3),
        "x evaluate": round(seconds / (part_s if n == subset < queries else fast_s), 2),
        "MiB beyond dist": mib if mib is None else round(mib, 1),
    }
    rows = [
        row("distance_matrix, cosine", queries, distance_s, None),
        row("evaluate", queries, fast_s, memory),
        row("evaluate, same part", subset, part_s, None),
        row("argsort per query", subset, plain_s, plain_memory),
        {**row("argsort per query, scaled up", queries, scaled, None), "x evaluate": round(scaled / fast_s, 2)},
    ]
    within = "within" if fast_s <= 1 and memory <= 100 else "BEYOND"
    notes = [
        f"{queries} queries x {gallery} gallery images x {dim} features; the matrix itself takes {dist.nbytes / 2**20:.0f} MiB.",
        f"evaluate: {within} the limit of 1 CPU-second and 100 MiB, which holds for 3368 x 19732.",
        f"The last row is the time of {subset} queries times {queries / subset:.1f}: an extrapolation, not a measurement.",
    ]
    return rows, notes


def table(rows):
    "`rows` as aligned text."
    cells = [list(rows[0])] + [["" if v is None else str(v) for v in row.values()] for row in rows]
    width = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, width))) for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in BENCHES.items():
        sub = commands.add_parser(name, help=function.__doc__, description=function.__doc__,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for option, spec in inspect.signature(function).parameters.items():
            sub.add_argument(f"--{option.replace('_', '-')}", type=type(spec.default), default=spec.default, help=" ")
        sub.add_argument("--out", type=Path, help="JSON file to write")
    args = vars(parser.parse_args(argv))
    command, out = args.pop("command"), args.pop("out")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    rows, notes = BENCHES[command](**args)
    machine = hardware()
    print(table(rows), *notes, "Measured on: " + ", ".join(f"{k} {v}" for k, v in machine.items() if v is not None), sep="\n")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        record = {"bench": command, "options": args, "rows": rows, "notes": notes, "hardware": machine}
        out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {out}")


if __name__ == "__main__":
    sys.exit(main())
