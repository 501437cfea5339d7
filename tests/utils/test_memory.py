"""Bounds in bytes: scoring and re-ranking in a process whose peak is measured, equal results within
the bound, errors that say the least.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reid_repro.evaluation import protocols
from reid_repro.evaluation import distance_matrix, evaluate, single_shot
from reid_repro.evaluation.large_galleries import evaluate_features
from reid_repro.evaluation.metric_learning import Metric
from reid_repro.learning.pairs import shortlist_distances
from reid_repro.evaluation.reranking import expand_queries, rerank

MIB = 2**20
SLACK = 12 * MIB  # what products of a library need inside, and what an allocator keeps

CHILD = """
import ctypes, sys
import numpy as np, torch
from reid_repro.evaluation import distance_matrix, evaluate, single_shot
from reid_repro.evaluation.large_galleries import evaluate_features
from reid_repro.evaluation.metric_learning import Metric
from reid_repro.evaluation.reranking import expand_queries, rerank

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)      # PR_SET_THP_DISABLE: no block is rounded up to 2 MiB
torch.set_num_threads(1)
rng = np.random.default_rng(0)
q, g, D = {shape}
features = lambda n: torch.from_numpy(rng.standard_normal((n, D), dtype=np.float32))
query, gallery, few = features(q), features(g), slice(0, 60)
ids = rng.integers(1, {people}, q), rng.integers(1, 7, q), rng.integers(-1, {people}, g), rng.integers(1, 7, g)
w = Metric(torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0][:, :16], torch.rand(16).double(), torch.ones(16).double())
dist = {dist}
small = {small}

def job(query, gallery, ids, dist, **options):
    return {job}

# what is imported and set up at a first call is not the call's, nor the pages of the libraries'
# code for matrices of this size, which count as well
job(*small)
job(query, gallery, ids, dist, memory={memory})


def field(name):
    text = open("/proc/self/status").read()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(name))


found = []
for memory in ({memory}, None):     # the bounded call first: what the other leaves would hide what this one takes
    open("/proc/self/clear_refs", "w").write("5")
    before = field("VmRSS")
    result = job(query, gallery, ids, dist, memory=memory)
    print(field("VmHWM") - before)
    found.append(torch.as_tensor(result))
torch.testing.assert_close(*found, rtol=0, atol=1e-5, equal_nan=True)
"""

FEW = (
    "query[few], gallery[:900], (ids[0][few], ids[1][few], ids[2][:900], ids[3][:900]), None if"
    " dist is None else dist[few, :900]"
)
MATRIX = "torch.rand(q, g)"
# name: (queries, gallery, D), the call, whether it takes distances, MiB of the bound, MiB that its
# result has
JOBS = {
    "distance_matrix": (
        (1500, 1500, 2048), "distance_matrix(query, gallery, **options)", "None", 24, 9,
    ),
    "evaluate_features": (
        (1200, 6000, 256), "evaluate_features(query, gallery, *ids, **options).ap", "None", 16, 0,
    ),
    "evaluate": (
        (400, 40_000, 4), "evaluate(dist, *ids, **options).ap", f"{MATRIX}.double()", 6, 0,
    ),
    "single_shot": (
        (5000, 8000, 4), "single_shot(dist, *ids, trials=1, **options).trials[0].ap", MATRIX, 2, 0,
    ),
    "rerank": ((300, 4700, 128), "rerank(query, gallery, k1=8, k2=2, **options)", "None", 28, 6),
    "expand_queries": (
        (2500, 6000, 256), "expand_queries(query, gallery, **options)", "None", 20, 6,
    ),
    "learnt metric": ((1500, 8000, 64), "w.distances(query, gallery, **options)", "None", 12, 46),
}


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="the peak of a process's memory is measured on Linux alone",
)
@pytest.mark.parametrize("name", JOBS)
def test_a_process_keeps_to_the_bound_and_finds_the_same(name):
    shape, job, dist, *mib = JOBS[name]
    (bound, result), g = (n * MIB for n in mib), shape[1]
    code = CHILD.format(
        shape=shape, job=job, dist=dist, memory=bound, small=FEW,
        people=g if name == "single_shot" else 200,
    )
    # blocks of 64 KiB and more go back when they are freed: what one call leaves doesn't help the next
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env
    )
    assert not done.returncode, done.stderr[-2000:]
    grown, free = map(int, done.stdout.split())
    told = (
        f"MiB beyond the result of {mib[1]}: {grown / MIB - mib[1]:.1f} with a bound of {mib[0]},"
        f" {free / MIB - mib[1]:.1f} without"
    )
    assert grown <= bound + result + SLACK < free, told
    print(told)


torch.manual_seed(0)
QUERY, GALLERY = torch.randn(25, 8), torch.randn(150, 8)
IDS = np.arange(25) % 9 + 1, np.ones(25, int), np.arange(150) % 9 + 1, np.full(150, 2)
DIST = distance_matrix(QUERY, GALLERY)
METRIC = Metric(torch.randn(8, 3).double(), torch.rand(3).double(), torch.ones(3).double())
CALLS = {
    "distance_matrix": lambda memory: distance_matrix(QUERY, GALLERY, memory=memory),
    "evaluate_features": lambda memory: evaluate_features(QUERY, GALLERY, *IDS, memory=memory).ap,
    "evaluate": lambda memory: evaluate(DIST, *IDS, memory=memory).ap,
    "single_shot": lambda memory: single_shot(DIST, *IDS, memory=memory).cmc,
    "rerank": lambda memory: rerank(QUERY, GALLERY, memory=memory),
    "expand_queries": lambda memory: expand_queries(QUERY, GALLERY, memory=memory),
    "learnt metric": lambda memory: METRIC.distances(QUERY, GALLERY, memory),
}


def least(call):
    "The bound that the errors say, asked for until the call is content."
    bound = 1
    for _ in range(3):
        try:
            call(bound)
            return bound
        except ValueError as error:
            assert str(error).startswith("memory is "), error
            bound = int(re.search(r"takes (\d+); give at least that", str(error))[1])
    raise AssertionError(f"{bound} bytes, the least by its own words, are not enough")


@pytest.mark.parametrize("name", CALLS)
def test_a_bound_too_small_says_the_least_and_the_least_is_enough(name):
    call = CALLS[name]
    enough, expected = least(call), torch.as_tensor(call(None))
    with pytest.raises(ValueError, match=r"memory is \d+ bytes, but .* takes"):
        call(enough - 1)
    for memory in (enough, 2 * enough, 10 * enough, 2**30):
        torch.testing.assert_close(torch.as_tensor(call(memory)), expected, rtol=0, atol=1e-6)
    for wrong in (0, -5, 1000.5, True, "1000"):
        with pytest.raises(ValueError, match="memory must be a whole number"):
            call(wrong)


class Ids:
    "What scoring looks at in a list of images."

    def __init__(self, pids, camids):
        self.pids, self.camids = pids, camids

    def __len__(self):
        return len(self.pids)


def lists():
    "What protocols look at in a benchmark."
    return SimpleNamespace(name="market1501", query=Ids(*IDS[:2]), gallery=Ids(*IDS[2:]))


@pytest.mark.parametrize(
    "expand,reranked,steps",
    [(0, False, ["distance_matrix"]), (3, True, ["expand_queries", "rerank"])],
)
def test_an_answer_hands_its_bound_to_every_step(expand, reranked, steps, monkeypatch):
    seen = []
    for name in ("distance_matrix", "rerank", "expand_queries", "evaluate"):
        plain = getattr(protocols, name)
        monkeypatch.setattr(
            protocols, name,
            lambda *a, plain=plain, name=name, **o: seen.append((name, o["memory"]))
            or plain(*a, **o),
        )
    answers = protocols.score_features(lists(), QUERY, GALLERY, expand, reranked, memory=10**6)
    assert seen == [(step, 10**6) for step in (*steps, "evaluate")]
    assert (
        answers.scores.mAP == protocols.score_distances(
            lists(), answers.dist, memory=10**5
        ).scores.mAP
    )
    with pytest.raises(ValueError, match="memory is 9 bytes"):
        protocols.score_distances(lists(), answers.dist, memory=9)


def test_mistakes_and_shortlists_of_many_rows_are_those_of_few():
    "Both work through some rows at a time: 2²⁰ numbers, fewer than these have."
    rng = np.random.default_rng(0)
    gallery = Ids(rng.integers(-1, 40, 30_000), rng.integers(1, 4, 30_000))
    near = torch.from_numpy(rng.standard_normal((80, 30_000), dtype=np.float32))
    rows = np.arange(80)

    def wrong(rows):
        asked = Ids(rows % 39 + 1, rows % 3 + 1)
        return protocols.mistakes(
            SimpleNamespace(gallery=gallery),
            SimpleNamespace(query=asked, rows=rows, dist=near[rows]),
        )

    found = wrong(rows)
    assert 10 < len(found) <= 80
    np.testing.assert_array_equal(found, np.concatenate([wrong(rows[i : i + 1]) for i in rows]))

    score = lambda i, j: near[i, j].cos() + 2
    dist = shortlist_distances(near, 5, score)
    order = near.argsort(dim=1, stable=True)
    expected = score(torch.arange(80)[:, None], order[:, :5])
    assert torch.equal(dist.gather(1, order[:, :5]), expected)
    rest = dist.gather(1, order)[:, 5:]
    assert (rest.diff(dim=1) > 0).all() and rest.min() > expected.max()
