#!/usr/bin/env python
"""Measurements of the parts whose cost matters. Each subcommand prints a table and, with --out,
writes it as JSON.

    python ci/bench.py evaluation
    python ci/bench.py evaluation --out results/bench/evaluation.json
    python ci/bench.py ianet
    python ci/bench.py casn
    python ci/bench.py can --device cpu
    python ci/bench.py minet
    python ci/bench.py dcc
    python ci/bench.py dcc --device cuda --full-block 256 --memory-mb 64000
    python ci/bench.py training
    python ci/bench.py training --device cuda --images 36000 --batch 64 --steps 100 --precision bf16

To add one: a function decorated with @bench, whose keyword-only arguments with defaults become
options. It returns (rows, notes): rows, a list of dictionaries with the same keys, makes the table;
notes is a list of sentences.
"""

import os

# CPU-seconds of one thread; before NumPy and torch are imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
import argparse
import contextlib
import copy
import inspect
import io
import json
import multiprocessing
import platform
import shutil
import sys
import tempfile
import time
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import torch

BENCHES = {}


def bench(function):
    "Register `function` as the subcommand of its name."
    BENCHES[function.__name__.replace("_", "-")] = function
    return function


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
        try:
            text = Path("/proc/self/status").read_text()
        except OSError:
            return float("nan")
        return next(
            (int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith(name)),
            float("nan"),
        )

    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return call(), float("nan"), float("nan")
    before = field("VmRSS")
    result = call()
    return result, field("VmHWM"), field("VmHWM") - before


def hardware():
    "What the numbers were measured on."
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu
        )
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
    """Features and ids in Market-1501's proportions: 750 people, six cameras, of the gallery 14 %
    distractors and 19 % junk.
    """
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
    """mAP, mINP and rank-1 in the common form: for each query one argsort and a few masks. Needs
    distances without ties.
    """
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


def with_distractors(features, ids, number, seed):
    "`features` and `ids` of `market_like`, its gallery followed by `number` strangers."
    rng = np.random.default_rng([seed, 1])
    gallery = torch.empty(len(features) + number, features.shape[1])
    gallery[: len(features)] = features
    for part in gallery[len(features):].split(2**14):
        part.copy_(2 * torch.from_numpy(rng.standard_normal(part.shape, dtype=np.float32)))
    return gallery, (
        *ids[:2],
        np.r_[ids[2], np.zeros(number, int)], np.r_[ids[3], rng.integers(1, 7, number)],
    )


def square_rerank(query, gallery, k1=20, k2=6, lam=0.3):
    """k-reciprocal re-ranking in the common form: square float32 matrices, a full sort, one image
    after the other.
    """
    x = torch.cat([query, gallery])
    x = x / x.norm(dim=1, keepdim=True)
    d = (2 - 2 * x @ x.T).clamp(min=0).numpy()
    d = (d / d.max(axis=0)).T
    order, q, n = np.argsort(d).astype(np.int32), len(query), len(x)
    def back(i, k):
        return order[i, : k + 1][(order[order[i, : k + 1], : k + 1] == i).any(axis=1)]
    V = np.zeros_like(d)
    for i in range(n):
        first = back(i, k1)
        friends = (back(j, round(k1 / 2)) for j in first)
        members = np.unique(
            np.concatenate(
                [first, *(f for f in friends if len(np.intersect1d(f, first)) > 2 / 3 * len(f))]
            )
        )
        weight = np.exp(-d[i, members])
        V[i, members] = weight / weight.sum()
    V = np.stack([V[order[i, :k2]].mean(axis=0) for i in range(n)])
    lists = [np.flatnonzero(column) for column in V.T]
    out = np.empty_like(d[:q])
    for i in range(q):
        shared = np.zeros(n, np.float32)
        for j in np.flatnonzero(V[i]):
            shared[lists[j]] += np.minimum(V[i, j], V[lists[j], j])
        out[i] = (1 - lam) * (1 - shared / (2 - shared)) + lam * d[i]
    return out[:, q:]


def matrix_costs(query, gallery, ids, subset):
    "CPU-seconds and MiB of distance_matrix, evaluate and a plain argsort, and the scores."
    from reid_repro.evaluation import distance_matrix, evaluate

    cost = {}
    cost["distances"], dist = cpu_seconds(lambda: distance_matrix(query, gallery), repeat=1)
    dist = dist.numpy()
    part = dist[:subset], ids[0][:subset], ids[1][:subset], ids[2], ids[3]
    evaluate(*part)  # warm up
    cost["evaluate"], whole = cpu_seconds(lambda: evaluate(dist, *ids))
    cost["part"], scores = cpu_seconds(lambda: evaluate(*part))
    cost["argsort"], plain = cpu_seconds(lambda: argsort_reference(*part))
    # same job; chance ties aside
    np.testing.assert_allclose((scores.mAP, scores.mINP, scores.rank(1)), plain, rtol=1e-4)
    cost["evaluate MiB"] = peak_mib(lambda: evaluate(dist, *ids))
    cost["argsort MiB"] = peak_mib(lambda: argsort_reference(*part))
    return cost, whole


def reranking_costs(query, gallery, ids, square):
    """The same of rerank and expand_queries, with the scores of both, and of re-ranking on square
    matrices for a part.
    """
    from reid_repro.evaluation import distance_matrix, evaluate
    from reid_repro.evaluation.reranking import expand_queries, rerank

    cost, once = {}, lambda call: cpu_seconds(call, repeat=1)
    cost["expand"], expanded = once(lambda: expand_queries(query, gallery))
    (cost["rerank"], dist), _, cost["rerank MiB"] = resident_mib(
        lambda: once(lambda: rerank(query, gallery))
    )
    scores = {
        "expanded": evaluate(distance_matrix(expanded, gallery), *ids),
        "re-ranked": evaluate(dist, *ids),
    }
    few = query[: len(query) // square], gallery[: len(gallery) // square]
    cost["part"], ours = once(lambda: rerank(*few))
    (cost["square"], theirs), _, cost["square MiB"] = resident_mib(
        lambda: once(lambda: square_rerank(*few))
    )
    cost["agree"] = np.isclose(ours.numpy(), theirs, rtol=0, atol=1e-4).mean()
    assert cost["agree"] > 0.995, cost      # same job; float32 may order near-ties otherwise
    return cost, scores


@bench
def evaluation(
    *, queries=3368, gallery=19732, dim=512, subset=200, distractors=500_000, square=4, seed=0
):
    """Distances, scores and re-ranking at the size of Market-1501, beside common forms of them;
    scores with `distractors` added.

    The common form of re-ranking runs on a `square`-th of the queries and of the gallery; 1: on
    all, which takes 12 GiB or more."""
    from reid_repro.evaluation.large_galleries import evaluate_features

    subset = min(subset, queries)
    query, features, ids = market_like(queries, gallery, dim, seed)
    cost, whole = matrix_costs(query, features, ids, subset)
    blocks_s, scores = cpu_seconds(lambda: evaluate_features(query, features, *ids), repeat=1)
    for field, value in vars(whole).items():
        np.testing.assert_array_equal(getattr(scores, field), value, err_msg=field)  # to the bit
    again, others = reranking_costs(query, features, ids, square)
    features, ids = with_distractors(features, ids, distractors, seed)
    (large_s, large), peak, large_mib = resident_mib(
        lambda: cpu_seconds(lambda: evaluate_features(query, features, *ids), repeat=1)
    )

    def row(what, n, g, seconds, mib=None, unit=cost["evaluate"]):
        return {
            "what": what, "queries": n, "gallery": g, "CPU-s": round(seconds, 3),
            "x evaluate": round(seconds / unit, 2) if g == gallery else None,
            "MiB": mib if mib is None else round(mib, 1),
        }
    unit = cost["part"] if subset < queries else cost["evaluate"]
    small = (queries // square, gallery // square)
    rows = [
        row("distance_matrix, cosine", queries, gallery, cost["distances"]),
        row("evaluate", queries, gallery, cost["evaluate"], cost["evaluate MiB"]),
        row("evaluate, same part", subset, gallery, cost["part"], unit=unit),
        row("argsort per query", subset, gallery, cost["argsort"], cost["argsort MiB"], unit=unit),
        row("argsort per query, scaled up", queries, gallery, cost["argsort"] * queries / subset),
        row("evaluate_features", queries, gallery, blocks_s),
        row("evaluate_features, distractors", queries, len(features), large_s, large_mib),
        row("expand_queries", queries, gallery, again["expand"]),
        row("rerank", queries, gallery, again["rerank"], again["rerank MiB"]),
        row("rerank, same part", *small, again["part"]),
        row("re-ranking on square matrices", *small, again["square"], again["square MiB"]),
    ]
    def verdict(good):
        return "within" if good else "BEYOND"
    mAP = {"as they are": whole, **others}
    notes = [
        (
            f"{queries} queries x {gallery} gallery images x {dim} features; the matrix itself"
            f" takes {queries * gallery / 2**18:.0f} MiB."
        ),
        (
            "MiB beyond the inputs: of evaluate and argsort as NumPy allocates it, of the others as"
            " the process's resident memory grows."
        ),
        (
            f"evaluate: {verdict(cost['evaluate'] <= 1 and cost['evaluate MiB'] <= 100)} the limit"
            " of 1 CPU-second and 100 MiB, which holds for 3368 x 19732."
        ),
        (
            f"Scaled up: the time of {subset} queries times {queries / subset:.1f}, an"
            " extrapolation, not a measurement."
        ),
        (
            "evaluate_features: every field of the scores equal to the matrix's, asserted on the"
            " gallery without distractors."
        ),
        (
            f"With {distractors} distractors the process peaks at {peak:.0f} MiB,"
            f" {features.nbytes / 2**20:.0f} MiB of them the gallery: {verdict(peak <= 2048)} the"
            f" limit of 2048 MiB. Rank-1 {large.rank(1):.1%}, mAP {large.mAP:.1%}."
        ),
        (
            f"rerank: {verdict(again['rerank'] <= 25 and again['rerank MiB'] <= 1536)} the limit of"
            " 25 CPU-seconds and 1536 MiB, its result included, which holds for 3368 x 19732."
        ),
        (
            f"Square matrices: {again['agree']:.2%} of the distances within 1e-4 of rerank's."
            " Memory grows with the square of all images."
        ),
        "mAP of these made features, no benchmark's: "
        + ", ".join(f"{name} {s.mAP:.1%}" for name, s in mAP.items())
        + ".",
    ]
    return rows, notes


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


def unfolded_relation(x, contexts):
    """appearance_relation in the direct form: patches padded with zeros and written out, their dot
    products, one softmax of the sum.
    """
    logits = 0
    for K in contexts:
        before, after = (K - 1) // 2, K // 2
        # (B, C·K², M)
        patches = torch.nn.functional.unfold(
            torch.nn.functional.pad(x, (before, after, before, after)), K
        )
        logits = logits + patches.transpose(1, 2) @ patches / (x.shape[1] ** 0.5 * K * K)
    return logits.softmax(-1)


def relation_jobs(batch, channels, height, width):
    """Forward and backward of S and of S Fᵀ in four forms, on features as after a ReLU; the first
    is the reference.
    """
    from reid_repro.ianet import appearance_relation

    x = torch.relu(torch.randn(batch, channels, height, width)).requires_grad_()
    weight = torch.randn(batch, height * width, channels)

    def job(relation, *args, **options):
        return lambda: torch.autograd.grad(
            relation(x, *args, **options) @ x.flatten(2).transpose(1, 2), x, weight
        )[0]

    jobs = {
        "one context": job(appearance_relation, (1,)),
        "contexts 1, 2, 3: diagonal box": job(appearance_relation, (1, 2, 3)),
        "contexts 1, 2, 3: literal fusion": job(appearance_relation, (1, 2, 3), fusion="literal"),
        "contexts 1, 2, 3: unfold": job(unfolded_relation, (1, 2, 3)),
    }
    # same job, entry by entry; S is peaked, so each entry is compared in proportion to itself
    with torch.no_grad():
        torch.testing.assert_close(
            appearance_relation(x, (1, 2, 3)), unfolded_relation(x, (1, 2, 3)), rtol=1e-4, atol=0
        )
    torch.testing.assert_close(
        jobs["contexts 1, 2, 3: diagonal box"](), jobs["contexts 1, 2, 3: unfold"](), rtol=1e-4,
        atol=1e-4,
    )
    return jobs


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


@bench
def ianet(*, batch=8, repeats=3, relation_repeats=5, classes=751, seed=0):
    """The spatial relation of IANet by diagonal box and by unfold, and the training step of
    ResNet-50 with and without IA blocks.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from reid_repro.learning.backbones import cost
    from reid_repro.ianet import IANet

    def counted(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    def compare(size, jobs, repeats, counts):
        seconds, first = interleaved(jobs, repeats), next(iter(jobs))
        def times(numbers, what):
            return round(numbers[what] / numbers[first], 3)
        return [
            {
                "what": what, "size": size, "CPU-s": round(seconds[what], 3),
                "x reference": times(seconds, what), "counted x": times(counts, what),
            }
            for what in jobs
        ]

    torch.manual_seed(seed)
    # a peaked softmax underflows to denormal numbers, on which a CPU is slow
    torch.set_flush_denormal(True)
    rows = []
    for stage, shape in {2: (8, 512, 32, 16), 3: (16, 1024, 16, 8)}.items():
        jobs = relation_jobs(*shape)
        counts = {what: counted(call) for what, call in jobs.items()}
        rows += compare(
            f"stage {stage}: {'x'.join(map(str, shape))}", jobs, relation_repeats, counts
        )
    _, box, literal, unfold = ([row["x reference"] for row in rows[i::4]] for i in range(4))

    options = {
        "step, baseline": {"stages": ()},
        "step, one SIA at stage 3": {"stages": (3,), "order": "sia"},
        "step, IANet": {"stages": (2, 3)},
    }
    models = {what: IANet(classes, **chosen) for what, chosen in options.items()}
    counts = {what: cost(model, 256, 128)[1] for what, model in models.items()}
    steps = {what: training_step(model, batch, classes) for what, model in models.items()}
    flushed = compare(f"{batch}x3x256x128", steps, repeats, counts)
    torch.set_flush_denormal(False)
    kept = compare(f"{batch}x3x256x128, denormals kept", steps, repeats, counts)

    def within(value, limit):
        return (
            f"{value:.3f}x, {'within' if value <= limit else 'BEYOND'} the limit of {limit}x"
        )
    notes = [
        (
            "Each group is interleaved after a warm-up, the least of its repeats counts; x"
            " reference is to the first row of the group."
        ),
        (
            "The relation is S and S Fᵀ, forward and backward; its counted x are the matrix"
            " products of both, that of a step is its forward's."
        ),
        (
            f"Diagonal box, contexts 1, 2, 3: stage 2 {within(box[0], 2.0)}; stage 3"
            f" {within(box[1], 2.0)}."
        ),
        (
            f"Unfold: same S and gradient, asserted to 1e-4, at {unfold[0] / box[0]:.1f}x and"
            f" {unfold[1] / box[1]:.1f}x the time of the box."
        ),
        (
            f"Literal fusion takes {literal[0] / box[0]:.2f}x the time of the box with renormalised"
            " fusion at stage 2."
        ),
        (
            f"One SIA, denormals flushed to zero: {within(flushed[1]['x reference'], 1.05)}; kept:"
            f" {within(kept[1]['x reference'], 1.05)}."
        ),
        (
            "Denormals are flushed except where the size says kept, torch's default; their number"
            " depends on the weights, here random."
        ),
    ]
    return rows + flushed + kept, notes


@bench
def ianet_relations(*, data="", weights="", images=24, seed=0):
    """What IANet's relations are on ImageNet features of photographs (CUHK03-NP detected at
    256x128), scale by scale, before training.
    """
    from reid_repro.learning.backbones import build_backbone
    from reid_repro.datasets import load_images, open_benchmark
    from reid_repro.ianet import CIA, SIA
    from reid_repro.learning.augmentation import normalise

    if not data or not weights:
        raise SystemExit(
            "give --data, the folder of CUHK03-NP, and --weights, a safetensors file of ImageNet's"
            " ResNet-50"
        )
    split = open_benchmark("cuhk03-np-detected", data).query
    chosen = np.random.default_rng(seed).choice(len(split), images, replace=False)
    pixels = normalise(load_images(split.subset(np.sort(chosen)), 256, 128))
    backbone = build_backbone("resnet50", 1, weights).eval()
    readings = {
        "S, products as printed": SIA(scale="printed"), "S, over √C·K²": SIA(),
        "S, cosines": SIA(scale="cosine"), "S, second softmax": SIA(fusion="literal"),
        "S, authors' code": SIA(fusion="released"), "R, products as printed": CIA("printed"),
        "R, over √M": CIA(), "R, cosines": CIA("cosine"),
    }
    rows = []
    with torch.no_grad():
        for stage in (2, 3):
            maps = torch.cat([backbone(part, stage) for part in pixels.split(8)])
            for what, reading in readings.items():
                relation = torch.cat([reading.relation_map(part) for part in maps.split(4)])
                givers = torch.special.entr(relation).sum(-1).exp()
                rows.append(
                    {
                        "stage": stage, "relation": what,
                        "givers in a row": round(givers.median().item(), 1),
                        "of": relation.shape[-1],
                        "kept for itself": f"{relation.diagonal(dim1=1, dim2=2).mean():.1%}",
                        "weight of the most popular": f"{relation.mean(1).amax(-1).mean():.1%}",
                    }
                )
    notes = [
        (
            "Givers: exp(entropy) of a row, its median over rows and photographs; 1 when one gives"
            " all, `of` when all give alike."
        ),
        (
            f"{images} photographs of CUHK03-NP detected (query), 64x128 enlarged to 256x128;"
            " ResNet-50 with ImageNet weights, untrained."
        ),
    ]
    return rows, notes


def literal_casn(*args, **options):
    """CASN whose maps are made as §3.1.2 and §3.2.2 print them: by gradients of scores with respect
    to the last convolution's map.
    """
    from reid_repro.casn import CASN, attention_map

    class Literal(CASN):
        def identification_map(self, maps, f, scores, people):
            own = scores.gather(2, people[:, None, None].expand(-1, scores.shape[1], 1)).sum()
            gradient = torch.autograd.grad(own, maps, create_graph=True)[0]
            return attention_map(maps, gradient.mean(dim=(2, 3)))

        def pair_maps(self, maps, f, i, j):
            difference = (f[i] - f[j]).flatten(1).detach().requires_grad_()
            indicator = (
                (torch.autograd.grad(self.head(difference)[:, 1].sum(), difference)[0] > 0)
                .to(f.dtype)
                .view_as(f[i])
            )
            weights = []
            for rows in (i, j):         # s_1 = <indicator, f_1>, then s_2
                gradient = torch.autograd.grad(
                    (indicator * f[rows]).sum(), maps, create_graph=True
                )[0]
                weights.append(gradient.mean(dim=(2, 3))[rows])
            return attention_map(maps[i], weights[0]), attention_map(maps[j], weights[1])

    return Literal(*args, **options)


def casn_steps(base, height, width, pairs, classes, repeats):
    """CPU-seconds of a training step on the same `pairs` pairs: plain, with one module, with both
    in closed and in literal form.
    """
    from reid_repro.casn import CASN, casn_objective

    half = torch.arange(pairs)
    labels = torch.cat([half, half.where(half < pairs // 2, half + pairs)])
    images = torch.randn(2 * pairs, 3, height, width)
    images = images.to(memory_format=torch.channels_last)
    batch = (half, half + pairs, half < pairs // 2)
    objective, stride, kinds = casn_objective(labels), 2 if base == "ide" else 1, {
        "plain": (CASN, False, False), "+ SA": (CASN, False, True), "+ IA": (CASN, True, False),
        "CASN, closed form": (CASN, True, True), "CASN, literal form": (literal_casn, True, True),
    }
    jobs, gradients = {}, {}
    for what, (make, ia, sa) in kinds.items():
        torch.manual_seed(0)
        model = make(
            classes, base, last_stride=stride, identification_attention=ia, siamese_attention=sa,
            dropout=0.0,
        )
        model = model.to(memory_format=torch.channels_last).train()
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

        def step(what=what, model=model, optimiser=optimiser):
            optimiser.zero_grad()
            sum(objective(model, batch, images.__getitem__).values()).backward()
            if what not in gradients:       # of the first step, from equal weights
                gradients[what] = torch.cat([p.grad.flatten() for p in model.parameters()])
            optimiser.step()

        jobs[f"{base.upper()} {what}"] = step
    seconds = interleaved(jobs, repeats)
    closed, literal = (gradients[what] for what in list(kinds)[3:])
    assert (
        closed - literal
    ).norm() <= 1e-3 * literal.norm(), "closed and literal form are not the same gradient"
    first = seconds[f"{base.upper()} plain"]
    size = f"{2 * pairs}x3x{height}x{width}"
    def row(what, s):
        return {
            "what": f"step, {what}", "size": size, "CPU-s": round(s, 3),
            "x reference": round(s / first, 3),
        }
    return [row(what, s) for what, s in seconds.items()]


def casn_maps(base, height, width, pairs, classes, repeats, calls=10):
    """CPU-seconds of a batch's attention maps, from map, feature and scores on; literal, then
    closed form, without and with backward.
    """
    from reid_repro.casn import CASN, consistency_loss

    channels, people, i = 2048, torch.randint(classes, (2 * pairs,)), torch.arange(pairs // 2)
    A = (
        torch.randn(2 * pairs, channels, height, width)
        .relu()
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
    )
    found, jobs = {}, {}
    for form, make in (("literal", literal_casn), ("closed", CASN)):
        torch.manual_seed(0)
        model = make(classes, base, dropout=0.0).train()
        f = model.pool(A)
        scores = model.classify(f)
        wanted = [A, *model.net.classifier.parameters()]

        def maps(model=model, f=f, scores=scores):
            return [
                model.identification_map(A, f, scores, people),
                *model.pair_maps(A, f, i, i + pairs),
            ]

        def back(maps=maps, wanted=wanted):
            own, first, second = maps()
            loss = own.square().mean() + consistency_loss(first, second)
            return torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)

        found[form] = [*maps(), *(g for g in back() if g is not None)]
        for what, call in (("maps", maps), ("maps and backward", back)):
            jobs[f"{base.upper()} {what}, {form} form"] = lambda call=call: [
                call() for _ in range(calls)
            ]
    for ours, theirs in zip(found["closed"], found["literal"], strict=True):
        assert (
            ours - theirs
        ).norm() <= 1e-3 * theirs.norm(), "closed and literal form are not the same"
    seconds, size = interleaved(jobs, repeats), f"{2 * pairs}x{channels}x{height}x{width}"
    rows = []
    for what in ("maps", "maps and backward"):
        literal, closed = (
            seconds[f"{base.upper()} {what}, {form} form"] / calls for form in ("literal", "closed")
        )
        rows += [
            {
                "what": f"{base.upper()} {what}, {form} form", "size": size, "CPU-s": round(s, 4),
                "x reference": round(s / literal, 3),
            }
            for form, s in (("literal", literal), ("closed", closed))
        ]
    return rows


def casn_ranking(base, height, width, block, loop, repeats, pairs=1400 * 5332):
    """Distances of attention profiles: block x block pairs in tiles, loop x loop of them one by
    one, and both scaled up to `pairs`.
    """
    from reid_repro.casn import (
        CASN, _attention_gaps, attention_map, pooled_weights, row_profile, siamese_indicator,
    )
    from reid_repro.learning.pairs import score_pairs

    channels, hidden, memory, name = 2048, 512, 2**29, base.upper()
    model = CASN(2, base=base, hidden=hidden).eval()
    A = torch.randn(2 * block, channels, height, width).relu()
    with torch.no_grad():
        f = model.pool(A)
        u = f.flatten(1) @ model.head.first.weight.T
    sides = [(A[part], u[part]) for part in (slice(block), slice(block, None))]
    pair_bytes = 4 * (model.head.first.in_features + 2 * hidden + 2 * channels)  # as casn_distances

    def tiles():
        return score_pairs(
            partial(_attention_gaps, model.head), *sides, pair_bytes, memory, "cpu"
        )

    @torch.no_grad()
    def one_by_one():
        gaps = torch.empty(loop, loop)
        for i in range(loop):
            for j in range(loop):
                rows = slice(i, i + 1), slice(block + j, block + j + 1)
                weights = pooled_weights(
                    siamese_indicator(model.head, *(f[r] for r in rows)), height * width
                )
                first, second = (row_profile(attention_map(A[r], weights), 0.3) for r in rows)
                gaps[i, j] = (first - second).norm()
        return gaps

    found, _, beyond = resident_mib(tiles)
    agree = (
        torch.isclose(found[:loop, :loop], one_by_one(), rtol=0, atol=1e-3 * found.max().item())
        .float()
        .mean()
        .item()
    )
    # same job; a hidden unit within rounding of its threshold may fall on either side
    assert agree > 0.95, agree
    seconds = interleaved({"tiles": tiles, "loop": one_by_one}, repeats)
    each = {"tiles": seconds["tiles"] / block**2, "loop": seconds["loop"] / loop**2}
    def row(what, size, s, kind):
        return {
            "what": what, "size": size, "CPU-s": round(s, 3),
            "x reference": round(each[kind] / each["tiles"], 2),
        }
    big = f"{pairs} pairs, scaled up"
    return (
        [
            row(f"{name} pairs in tiles", f"{block}x{block} pairs", seconds["tiles"], "tiles"),
            row(f"{name} pair by pair", f"{loop}x{loop} pairs", seconds["loop"], "loop"),
            row(f"{name} pairs in tiles", big, pairs * each["tiles"], "tiles"),
            row(f"{name} pair by pair", big, pairs * each["loop"], "loop"),
        ],
        (
            f"{name}, maps {channels}x{height}x{width}, {hidden} hidden units:"
            f" {1e6 * each['tiles']:.0f} CPU-seconds per million pairs in tiles,"
            f" {1e6 * each['loop']:.0f} one by one; tiles of at most {memory >> 20} MiB made the"
            f" process grow by {beyond:.0f} MiB. {agree:.1%} of the distances within 0.1 % of the"
            " largest, tiles against single pairs; indicators are steps."
        ),
    )


@bench
def casn(
    *, pairs=8, repeats=2, classes=751, map_pairs=16, map_repeats=3, block=200, loop=20, seed=0
):
    """CASN's training step and attention maps in closed and in literal form, and the ranking of all
    pairs in tiles and one by one.
    """
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)      # as training does
    sizes = {"ide": (288, 144, 9, 5), "pcb": (384, 128, 24, 8)}
    steps, maps, ranks, told = [], [], [], []
    # first, while the process is small: what it grows by is then the tiles'
    for base, (*_, h, w) in sizes.items():
        rows, note = casn_ranking(base, h, w, block, loop, repeats)
        ranks, told = ranks + rows, [*told, note]
    for base, (height, width, h, w) in sizes.items():
        steps += casn_steps(base, height, width, pairs, classes, repeats)
        maps += casn_maps(base, h, w, map_pairs, classes, map_repeats)
    share = [row["x reference"] for row in steps]
    def against(one, other):
        return f"{share[one] / share[other] - 1:+.1%}"
    def of_step(part, step):
        return (f"{maps[part]['CPU-s'] / map_pairs * pairs / steps[step]['CPU-s']:.1%}")
    notes = [
        (
            "Each group is interleaved after a warm-up, the least of its repeats counts; x"
            " reference is to the first row of the group."
        ),
        (
            f"Steps: ResNet-50, SGD, {pairs} pairs, half of them of one person; IDE with last"
            " stride 2, PCB with 6 strips and last stride 1. Gradients of closed and literal form"
            " equal to 1e-3 of their length in every run, asserted."
        ),
        (
            f"A step of CASN(IDE) takes {share[3]:.2f}x that of IDE, CASN(PCB) {share[8]:.2f}x that"
            " of PCB: covered images pass a second time."
        ),
        (
            f"Closed against literal form, whole step: {against(3, 4)} (IDE) and {against(8, 9)}"
            " (PCB). Next to nothing, since even the literal form's maps and their backward are"
            f" {of_step(2, 4)} and {of_step(6, 9)} of a step; the maps alone take"
            f" {maps[1]['x reference']:.2f}x and {maps[5]['x reference']:.2f}x of the literal"
            " form's time."
        ),
        (
            "Maps: all identification maps and those of the pairs of one person, of a batch whose"
            " maps, features and scores are there already."
        ),
        *told,
        (
            "Scaled up: the time per pair measured times their number, an extrapolation, not a"
            " measurement."
        ),
    ]
    return steps + maps + ranks, notes


def grouped_stage(stages):
    """Copies of a ResNet stage as one stage of as many times the channels; its output is theirs,
    side by side.

    Convolutions are grouped but the first and the shortcut's, since all copies share the stage's
    input."""
    joined = copy.deepcopy(stages[0])
    for name, part in list(joined.named_modules()):
        twins = [stage.get_submodule(name) for stage in stages]
        if isinstance(part, torch.nn.Conv2d):
            groups = 1 if name in ("0.conv1", "0.downsample.0") else len(stages)
            width = part.in_channels * groups, part.out_channels * len(stages)
            new = torch.nn.Conv2d(
                *width, part.kernel_size, part.stride, part.padding, groups=groups, bias=False
            )
        elif isinstance(part, torch.nn.BatchNorm2d):
            new = torch.nn.BatchNorm2d(part.num_features * len(stages))
        else:
            continue
        owner, _, attribute = name.rpartition(".")
        setattr(joined.get_submodule(owner), attribute, new)
        for key, value in new.state_dict().items():
            if value.ndim:
                value.copy_(torch.cat([twin.state_dict()[key] for twin in twins]))
    return joined


def can_stages(backbone, batch, height, width, copies, repeats, measure, device):
    """Seconds of `copies` unshared last stages on one map, forward and backward: in a loop as CAN
    does, as one grouped pass, under vmap.
    """
    from reid_repro.learning.backbones import build_backbone

    built = build_backbone(backbone, 1)
    stages = [copy.deepcopy(built.stages[3]) for _ in range(copies)]
    for parameter in (p for stage in stages for p in stage.parameters()):
        with torch.no_grad():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))       # copies that differ
    def layout(part):
        return part.to(device, memory_format=torch.channels_last).train()
    joined = layout(grouped_stage(stages))
    stages = [layout(stage) for stage in stages]
    stacked, buffers = torch.func.stack_module_state(stages)
    def one(p, b, maps):
        return torch.func.functional_call(stages[0], (p, b), (maps,))
    x = (
        torch.randn(batch, built.channels[2], height, width, device=device)
        .to(memory_format=torch.channels_last)
        .requires_grad_()
    )
    passes = {
        "loop over the copies": (
            lambda: torch.cat([stage(x) for stage in stages], 1),
            [p for s in stages for p in s.parameters()],
        ),
        "one grouped pass": (lambda: joined(x), list(joined.parameters())),
        "vmap over stacked weights": (
            lambda: torch.vmap(one, (0, 0, None))(stacked, buffers, x)
            .transpose(0, 1)
            .flatten(1, 2),
            list(stacked.values()),
        ),
    }
    with torch.no_grad():
        weight = torch.randn_like(passes["loop over the copies"][0]())
    found, jobs = {}, {}
    for what, (forward, parameters) in passes.items():
        def job(forward=forward, parameters=parameters):
            out = forward()
            return [out, *torch.autograd.grad(out, [x, *parameters], weight)]

        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            out, to_x, *rest = job()
        norm = torch.stack([g.square().sum() for g in rest]).sum().sqrt()
        found[what], jobs[f"{backbone}: {what}"] = (out, to_x, norm), job
    first, *others = found.values()
    for other in others:
        for ours, theirs in zip(other, first):
            # 1 %, since a ReLU whose input is within rounding of 0 may go either way
            assert (
                ours - theirs
            ).norm() <= 1e-2 * theirs.norm(), "the three are not the same stages"
    seconds = interleaved(jobs, repeats, measure)
    size = f"{batch}x{built.channels[2]}x{height}x{width}"
    return [(what, size, s, s / next(iter(seconds.values())), None) for what, s in seconds.items()]


def can_steps(backbone, batch, height, width, classes, repeats, measure, device):
    """Seconds of a whole training step (Adam) of IDE and of CAN on the same photographs, and their
    multiply-adds for one image.
    """
    from reid_repro.learning.backbones import cost
    from reid_repro.can import CAN, can_objective
    from reid_repro.ide import IDE, ide_objective

    labels = torch.arange(batch, device=device) // 2
    images = torch.randn(batch, 3, height, width, device=device).to(
        memory_format=torch.channels_last
    )
    network = CAN(classes, backbone=backbone)
    jobs, counts = {}, {}
    pair = ("IDE", IDE(classes, backbone=backbone), ide_objective(labels)), (
        "CAN 1, 3, 5, 7", network, can_objective(labels),
    )
    for what, model, objective in pair:
        counts[f"step, {what}"] = cost(model, height, width)[1]
        model = model.to(device, memory_format=torch.channels_last).train()
        optimiser = torch.optim.Adam(model.parameters(), lr=3e-4)

        def step(model=model, objective=objective, optimiser=optimiser):
            optimiser.zero_grad()
            sum(
                objective(model, torch.arange(batch, device=device), images.__getitem__).values()
            ).backward()
            optimiser.step()

        jobs[f"step, {what}"] = step
    seconds, size = interleaved(jobs, repeats, measure), f"{batch}x3x{height}x{width}"
    return [
        (what, size, s, s / seconds["step, IDE"], counts[what] / 1e9) for what, s in seconds.items()
    ]


def can_triplets(batch, heads, dim, repeats, measure, device, calls=20):
    """Seconds of the triplet loss of several heads, forward and backward: a loop over the heads,
    and all at once as CANLoss does.
    """
    from reid_repro.learning.losses import batch_hard_triplet

    labels = torch.arange(batch, device=device) // 4
    f = torch.nn.functional.normalize(
        torch.randn(batch, heads, dim, device=device), dim=2
    ).requires_grad_()
    def one(features):
        return batch_hard_triplet(features, labels, 0.3, squared=True)
    ways = {
        "triplet, loop over heads": (
            lambda: torch.stack([one(features) for features in f.unbind(1)]).mean()
        ),
        "triplet, vmap": lambda: torch.vmap(one, in_dims=1)(f).mean(),
    }
    loop, together = (torch.autograd.grad(way(), f)[0] for way in ways.values())
    torch.testing.assert_close(together, loop)
    jobs = {
        what: lambda way=way: [torch.autograd.grad(way(), f) for _ in range(calls)]
        for what, way in ways.items()
    }
    seconds = {what: s / calls for what, s in interleaved(jobs, repeats, measure).items()}
    return [
        (what, f"{batch}x{heads}x{dim}", s, s / seconds["triplet, loop over heads"], None)
        for what, s in seconds.items()
    ]


@bench
def can(*, device="auto", batch=8, repeats=3, step_repeats=2, classes=751, seed=0):
    """CAN's unshared last stages in a loop, grouped and under vmap; its training step beside IDE's;
    its triplets head by head and at once.
    """
    from reid_repro.learning.recipe import pick_device

    where = pick_device(device)
    unit, measure = ("CPU-s", cpu_seconds) if where.type == "cpu" else ("wall-s", wall_seconds)
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)      # as training does
    found = [
        *can_stages("resnet50", batch, 24, 8, 4, repeats, measure, where),
        *can_stages("tiny", 32, 24, 4, 4, repeats, measure, where),
        *can_triplets(32, 16, 256, repeats, measure, where),
        *can_steps("resnet50", batch, 384, 128, classes, step_repeats, measure, where),
    ]
    rows = [
        {
            "what": what, "size": size, unit: round(seconds, 4), "x reference": round(share, 3),
            "G multiply-adds": madds and round(madds, 2),
        }
        for what, size, seconds, share, madds in found
    ]
    times = [row["x reference"] for row in rows]
    counts = [row["G multiply-adds"] for row in rows[-2:]]
    notes = [
        (
            "Each group is interleaved after a warm-up, the least of its repeats counts; x"
            " reference is to the first row of the group."
        ),
        (
            "Stages: four copies of the last stage with weights of their own, training mode,"
            " forward and backward; outputs and the gradient of the map equal to 1 % of their"
            " length in all three forms, and so the length of the weights' gradient, asserted."
        ),
        (
            f"Grouped against loop: {times[1]:.2f}x with ResNet-50, {times[4]:.2f}x with tiny; vmap"
            f" {times[2]:.2f}x and {times[5]:.2f}x."
        ),
        (
            f"The triplet loss of 16 heads at once takes {times[7]:.2f}x of the loop's time, same"
            " gradient, asserted."
        ),
        (
            "Steps: ResNet-50, last stride 1, Adam, ID loss (IDE) or all three losses on all heads"
            f" (CAN). CAN takes {times[9]:.2f}x the time for {counts[1] / counts[0]:.2f}x the"
            " multiply-adds of an image's forward pass."
        ),
    ]
    return rows, notes


@torch.no_grad()
def dcc_size(name, model, shape, block, blocked, loop, where, memory, repeats, measure):
    """Pairs per second of the loop, the blocked and the folded form on random maps of `shape`;
    (rows, largest difference).
    """
    from torch.utils.flop_counter import FlopCounterMode

    from reid_repro.learning.pairs import score_pairs

    model = model.to(where).eval()
    maps = torch.randn(2 * block, *shape).relu()
    near, far = maps[:block], maps[block:]
    held = {}

    def tile(a, b):     # as dcc_distances
        if held.get("of") is not b[0]:
            held.update(of=b[0], block=model.prepare(*b))
        return -model.score(model.compare_all(model.prepare(*a), held["block"]))

    def folded():
        held.clear()
        return score_pairs(tile, (near,), (far,), -(-memory // block**2), memory, str(where.type))

    i, j = torch.arange(blocked).repeat_interleave(blocked), torch.arange(blocked).repeat(blocked)
    one, two = near[:blocked].to(where), far[:blocked].to(where)
    def in_blocks():
        return -model.score(model.compare(one[i], two[j]))
    def single():
        return torch.cat(
            [-model.score(model.compare(one[:1], two[n : n + 1])) for n in range(loop)]
        )
    found = folded()
    agree = (
        (found[:blocked, :blocked] - in_blocks().view(blocked, blocked).cpu()).abs().max().item()
    )
    # the same scores
    assert agree < 1e-3 and (found[0, :loop] - single().cpu()).abs().max() < 1e-3, agree
    numbers = {"pair by pair": loop, "blocked": blocked**2, "folded": block**2}
    seconds = interleaved(
        {"pair by pair": single, "blocked": in_blocks, "folded": folded}, repeats, measure
    )
    rates, counts = {form: numbers[form] / seconds[form] for form in numbers}, {}
    for form, number, call in (("blocked", blocked**2, in_blocks), ("folded", block**2, folded)):
        with FlopCounterMode(display=False) as counter:
            call()
        counts[form] = counter.get_total_flops() / number       # of the folded form with its tables
    counts["pair by pair"] = counts["blocked"]
    pairs = 3368 * 15913
    return [
        {
            "what": f"{name}, {form}", "pairs": numbers[form], "pairs/s": round(rate, 1),
            "x loop": round(rate / rates["pair by pair"], 2),
            "x blocked": round(rate / rates["blocked"], 2),
            "MFLOP/pair": round(counts[form] / 1e6, 2),
            "GFLOP/s": round(rate * counts[form] / 1e9, 1),
            "hours for Market-1501": round(pairs / rate / 3600, 2),
        }
        for form, rate in rates.items()
    ], agree


@bench
def dcc(*, block=256, full_block=32, loop=8, repeats=2, memory_mb=2048, device="cpu", seed=0):
    """Scoring all pairs with DCC: pair by pair, in blocks, and folded, at the size of the smoke
    profile and at full size.

    `block`, `full_block`: queries and gallery images of a folded tile; `device`: cpu or cuda."""
    from reid_repro.dcc import DCC
    from reid_repro.learning.recipe import pick_device

    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    where, memory = pick_device(device), memory_mb * 2**20
    measure, side = (cpu_seconds, 1024) if where.type == "cpu" else (wall_seconds, 8192)
    x = torch.randn(side, side, device=where)
    # of a float32 matrix product
    rate = 2 * side**3 / interleaved({"product": lambda: x @ x}, repeats, measure)["product"]
    with torch.device("meta"):
        full = DCC(backbone="resnet50")
    full = full.to_empty(device="cpu")  # random numbers of the right size; no backbone is run here
    for p in full.parameters():
        torch.nn.init.normal_(p, std=0.02)
    small, small_agree = dcc_size(
        "smoke", DCC(backbone="tiny", hidden=64), (64, 8, 4), block, 32, 4 * loop, where, memory,
        repeats, measure,
    )
    large, large_agree = dcc_size(
        "full size", full, (1024, 14, 14), full_block, min(8, full_block), loop, where, memory,
        repeats, measure,
    )
    def verdict(good):
        return "within" if good else "BEYOND"
    last, hours = large[2], large[2]["hours for Market-1501"]
    return small + large, [
        (
            "smoke: 64x8x4 maps, 64 units; full size: 1024x14x14 maps, 400 units; 16 steps, a 2x2"
            " window, random weights; maps are given."
        ),
        (
            f"Scores of the three forms equal: largest difference {small_agree:.0e} and"
            f" {large_agree:.0e}, asserted below 1e-3."
        ),
        (
            f"Folded: {small[2]['x loop']:.1f}x the loop at the smoke size,"
            f" {verdict(small[2]['x loop'] >= 20)} the aim of 20x; {last['x blocked']:.2f}x the"
            f" blocked form at full size, {verdict(last['x blocked'] >= 2)} the aim of 2x."
        ),
        (
            f"A float32 matrix product runs at {rate / 1e9:.0f} GFLOP/s here: full size reaches"
            f" {last['GFLOP/s'] * 1e9 / rate:.0%} of it folded,"
            f" {large[1]['GFLOP/s'] * 1e9 / rate:.0%} blocked. MFLOP of the folded form include the"
            f" tables of a tile of {full_block} x {full_block}."
        ),
        f"3368 x 15913 pairs at the folded rate: {hours} hours"
        + ("" if where.type == "cpu" else f", {verdict(hours <= 0.25)} the aim of 15 minutes")
        + "; an extrapolation.",
    ]


def four_loops(x, recurrent):
    """FourWayIRNN.sweep cell by cell: direction (down, up, right, left), image, row, column;
    autograd can follow.
    """
    ways = []
    for matrix, (di, dj) in zip(recurrent, ((1, 0), (-1, 0), (0, 1), (0, -1))):
        images = []
        for image in x:
            (_, H, W), states = image.shape, {}
            for i in range(H) if di >= 0 else reversed(range(H)):
                for j in range(W) if dj >= 0 else reversed(range(W)):
                    state, before = image[:, i, j], states.get((i - di, j - dj))
                    states[i, j] = (state if before is None else matrix @ before + state).relu()
            images.append(
                torch.stack([torch.stack([states[i, j] for j in range(W)], 1) for i in range(H)], 1)
            )
        ways.append(torch.stack(images))
    return torch.cat(ways, 1)


def torch_rnns(x, recurrent):
    """A call that does the same by two bidirectional layers of torch, whose input matrices are the
    identity.
    """
    B, h, H, W = x.shape
    layers = [
        torch.nn.RNN(h, h, nonlinearity="relu", bias=False, bidirectional=True) for _ in range(2)
    ]
    with torch.no_grad():
        for number in range(4):
            layer, suffix = layers[number // 2], ("", "_reverse")[number % 2]
            getattr(layer, f"weight_ih_l0{suffix}").copy_(torch.eye(h))
            getattr(layer, f"weight_hh_l0{suffix}").copy_(recurrent[number])

    def call():
        across = (
            layers[1](x.permute(3, 0, 2, 1).reshape(W, B * H, h))[0]
            .view(W, B, H, 2 * h)
            .permute(1, 3, 2, 0)
        )
        along = (
            layers[0](x.permute(2, 0, 3, 1).reshape(H, B * W, h))[0]
            .view(H, B, W, 2 * h)
            .permute(1, 3, 0, 2)
        )
        return torch.cat([along, across], 1)

    return call


class GivenMaps(torch.nn.Module):
    """A stream that answers with the same random maps whatever the images are: the pairs' cost
    without the stream's.
    """

    def __init__(self, channels, side):
        super().__init__()
        self.channels = (channels,)
        self.maps = torch.nn.Parameter(torch.rand(1, channels, side, side), requires_grad=False)

    def forward(self, images):
        return self.maps * (1 + images.float().mean((1, 2, 3), keepdim=True))


def minet_head(channels, side, hidden):
    "MINet at full size on given maps."
    from reid_repro import minet

    stream, build = GivenMaps(channels, side), minet.build_stream
    minet.build_stream = lambda name, weights=None: stream
    try:
        return minet.MINet((8, 8), embedding=hidden, hidden=hidden, width=hidden, dropout=0.0)
    finally:
        minet.build_stream = build


@bench
def minet(*, batch=4, side=14, hidden=512, images=4, pairs=64, chunk=8, repeats=2, seed=0):
    """MI-Net at full size: the sweep in three forms, a ranking's pairs against the rate of matrix
    products, a training step in chunks.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from reid_repro.minet import minet_distances, minet_objective
    from reid_repro.learning.augmentation import normalise
    from reid_repro.learning.pooling import FourWayIRNN

    torch.manual_seed(seed)
    torch.set_flush_denormal(True)      # as training does
    layer, x, rows = FourWayIRNN(hidden, hidden), torch.rand(batch, hidden, side, side) - 0.4, []
    with torch.no_grad():
        layer.recurrent.copy_(
            0.9 * layer.recurrent + 0.2 / hidden * torch.randn_like(layer.recurrent)
        )
        forms = {
            "four loops": lambda: four_loops(x, layer.recurrent),
            "one axis at a time": lambda: layer.sweep(x),
            "torch's RNN": torch_rnns(x, layer.recurrent),
        }
        reference = forms["four loops"]()
        for name, call in forms.items():
            torch.testing.assert_close(call(), reference, rtol=1e-4, atol=1e-4, msg=name)
        seconds = interleaved(forms, repeats)
    leaf = x.clone().requires_grad_()

    def slope(sweep):
        return lambda: torch.autograd.grad(sweep().sum(), (leaf, layer.recurrent))

    learning = {
        "four loops": slope(lambda: four_loops(leaf, layer.recurrent)),
        "one axis at a time": slope(lambda: layer.sweep(leaf)),
    }
    for one, other in zip(*(call() for call in learning.values())):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    learnt = interleaved(learning, 1)
    def row(what, size, s, first):
        return {
            "what": what, "size": size, "CPU-s": round(s, 4), "x reference": round(s / first, 3),
        }
    size = f"{batch}x{hidden}x{side}x{side}"
    rows += [row(f"sweep, {name}", size, s, seconds["four loops"]) for name, s in seconds.items()]
    rows += [
        row(f"sweep with gradient, {name}", size, s, learnt["four loops"])
        for name, s in learnt.items()
    ]
    faster, faster_learning = (
        kind["four loops"] / kind["one axis at a time"] for kind in (seconds, learnt)
    )

    model, square = minet_head(hidden, side, hidden), torch.randn(1024, 1024)
    rate = 1024**3 / cpu_seconds(lambda: square @ square)[0]  # multiply-adds a second
    query, gallery = (torch.randint(0, 256, (images, 3, 8, 8), dtype=torch.uint8) for _ in range(2))

    @torch.no_grad()
    def one_by_one():
        model.eval()
        out = torch.empty(images, images)
        for i in range(images):
            for j in range(images):
                fA, fB = model.represent(maps[0][i : i + 1], maps[1][j : j + 1])
                out[i, j] = 1 - torch.nn.functional.cosine_similarity(fA, fB).item()
        return out

    with torch.no_grad():
        maps = model.maps(normalise(query))[0], model.maps(normalise(gallery))[1]
    def blocks():
        return minet_distances(model, query, gallery, device="cpu")
    torch.testing.assert_close(blocks(), one_by_one(), rtol=1e-3, atol=1e-5)
    seconds = interleaved({"one by one": one_by_one, "in blocks": blocks}, repeats)
    counts = {}
    for name, call in (("one by one", one_by_one), ("in blocks", blocks)):
        with FlopCounterMode(display=False) as counter:
            call()
        counts[name] = counter.get_total_flops() // 2
    rows += [
        row(f"pairs, {name}", f"{images}x{images} pairs", s, seconds["one by one"])
        for name, s in seconds.items()
    ]
    share = counts["in blocks"] / seconds["in blocks"] / rate
    each = {name: n / images**2 / 1e9 for name, n in counts.items()}

    labels = torch.arange(pairs).remainder(pairs // 2)
    photographs = torch.randn(pairs, 3, 8, 8)
    memory, before = {}, resident_mib(lambda: None)[1]
    for size in (chunk, 10**6):  # the smaller one first: freed memory stays with the process
        objective = minet_objective(labels, negatives=1, chunk=size)

        def step(objective=objective):
            model.zero_grad()
            objective(model, torch.arange(pairs), photographs.__getitem__)["deviance"].backward()

        spent, peak, _ = resident_mib(lambda step=step: cpu_seconds(step, repeat=1)[0])
        memory[size] = peak - before
        rows.append(
            row(
                "training step, " + (f"chunks of {chunk}" if size == chunk else "at once"),
                f"{pairs} pairs", spent, spent,
            )
        )
    rows[-1]["x reference"] = round(rows[-1]["CPU-s"] / rows[-2]["CPU-s"], 3)
    notes = [
        (
            "Sweeps and pairs: interleaved after a warm-up, the least of the repeats counts; x"
            " reference is to the first row of each group."
        ),
        (
            f"One axis at a time is {faster:.1f}x as fast as four loops, {faster_learning:.0f}x"
            " with the gradient, against an aim of 10x. Without gradient the loops are 512x512"
            " matrix-vector products out of the cache; all forms are equal to 1e-4, asserted."
        ),
        (
            f"A pair takes {each['one by one']:.3f} G multiply-adds one by one,"
            f" {each['in blocks']:.3f} G in blocks, the images' own part included; blocks run at"
            f" {share:.0%} of the rate of a 1024x1024 product, {rate / 1e9:.0f} G a CPU-second."
        ),
        (
            f"A step on {pairs} pairs makes the process grow by {memory[chunk]:.0f} MiB in chunks"
            f" of {chunk}, {memory[10**6]:.0f} MiB at once."
        ),
    ]
    return rows, notes


class Steps:
    """The same `batches` (index tensors) in every epoch, as a sampler of notebook 18; clocks the
    last epoch from first draw to end.

    Own CPU time and that of live child processes count: the workers of a DataLoader."""

    def __init__(self, batches, cuda):
        self.batches, self.cuda = batches, cuda

    def __len__(self):
        return len(self.batches)

    def clock(self):
        "(wall seconds, CPU-seconds) by now, the GPU's queue empty."
        import psutil

        if self.cuda:
            torch.cuda.synchronize()
        workers = [
            psutil.Process(child.pid).cpu_times() for child in multiprocessing.active_children()
        ]
        return time.perf_counter(), time.process_time() + sum(t.user + t.system for t in workers)

    def epoch(self, e):
        start = self.clock()
        yield from self.batches
        self.stop(start)

    def stop(self, start):
        "Sets `spent`, (wall seconds, CPU-seconds) since the `clock()` that gave `start`."
        self.spent = [after - before for before, after in zip(start, self.clock())]


class Photographs(torch.utils.data.Dataset):
    """JPEGs decoded and augmented one by one, (pixels, class): flip, pad and crop, erase as
    `recipe` says, sized and normalised.
    """

    def __init__(self, paths, labels, size, recipe):
        from torchvision import transforms as T

        from reid_repro.learning.augmentation import IMAGENET_MEAN, IMAGENET_STD

        self.paths, self.labels = paths, labels
        self.transform = T.Compose(
            [
                T.Resize(size), T.RandomHorizontalFlip(recipe.flip), T.Pad(recipe.pad),
                T.RandomCrop(size), T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
                T.RandomErasing(recipe.erase, (0.02, 0.4)),
            ]
        )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        from PIL import Image

        return self.transform(Image.open(self.paths[i]).convert("RGB")), int(self.labels[i])


def usual_loop(model, data, steps, recipe, device, workers):
    """Trains as most code does: workers decode and augment image by image, each step asks for its
    loss. `steps` clocks the last epoch.
    """
    from reid_repro.learning.recipe import build_optimizer

    model.to(device).train()
    optimiser = build_optimizer(model, recipe)
    for group in optimiser.param_groups:
        group["fused"] = False  # as torch's own default
    # workers stay for both epochs, so that the second measures the loop and not their start
    batches = torch.utils.data.DataLoader(
        data, batch_sampler=[batch.tolist() for batch in steps.batches], num_workers=workers,
        pin_memory=device == "cuda", persistent_workers=workers > 0,
    )
    losses = []
    for _ in range(recipe.epochs):
        start = steps.clock()
        for images, people in batches:
            images = images.to(device, non_blocking=True)
            people = people.to(device, non_blocking=True)
            with torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = torch.nn.functional.cross_entropy(model(images)[1], people)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        steps.stop(start)
    return losses


def parts_of_training(run, objective, cuda):
    """Shares of the time of `run(objective)`, a call of `train`: augmentation, forward and loss,
    backward, optimiser, the rest.

    The GPU's queue is emptied around each part, so a part's time is its own and the whole is slower
    than when it is not watched."""
    from torch.optim.optimizer import (
        register_optimizer_step_post_hook, register_optimizer_step_pre_hook,
    )

    spent = dict.fromkeys(("augmentation", "forward and loss", "backward", "optimiser"), 0.0)
    since = []

    def now():
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() if cuda else time.process_time()

    def timed(part, call):
        def inner(*args, **options):
            start = now()
            result = call(*args, **options)
            spent[part] += now() - start
            return result
        return inner

    def watched(model, batch, view):
        start, before = now(), spent["augmentation"]
        terms = objective(model, batch, timed("augmentation", view))
        spent["forward and loss"] += now() - start - (spent["augmentation"] - before)
        return terms

    def opened(*_):
        since.append(now())

    def closed(*_):
        spent["optimiser"] += now() - since.pop()

    hooks = register_optimizer_step_pre_hook(opened), register_optimizer_step_post_hook(closed)
    backward, torch.Tensor.backward = torch.Tensor.backward, timed(
        "backward", torch.Tensor.backward
    )
    try:
        start = now()
        run(watched)
        whole = now() - start
    finally:
        torch.Tensor.backward = backward
        for hook in hooks:
            hook.remove()
    shares = {part: seconds / whole for part, seconds in spent.items()}
    return {**shares, "rest": 1 - sum(shares.values())}


def photographs(number, height, width, folder):
    """(uint8 tensor (number, 3, height, width), JPEG files, classes) of Toytown's training images,
    taken round and round.
    """
    from reid_repro.datasets import load_images, open_benchmark

    town = open_benchmark("toytown").train
    rows = np.arange(number) % len(town)
    paths = [
        shutil.copy(town.paths[row], Path(folder) / f"{i:06d}.jpg") for i, row in enumerate(rows)
    ]
    return load_images(town, height, width)[rows], paths, torch.from_numpy(town.labels[rows])


@bench
def training(
    *, device="auto", backbone="", height=0, width=0, batch=0, images=2000, steps=0,
    precision="float32", workers=0, repeats=3,
):
    """Images per second of our training loop beside the usual one, its parts, and its distance to
    the machine's matrix rate.

    Empty and 0 take, on a CPU, the tiny backbone at 128x64, batches of 32, 20 steps; on a GPU
    ResNet-50 at 256x128, 64, 100.
    `workers`: processes of the usual loop, 0 takes one per core, eight at most."""
    from reid_repro.lab.costs import matrix_rate, multiply_adds
    from reid_repro.ianet import IANet
    from reid_repro.ide import IDE, ide_objective
    from reid_repro.learning.recipe import Recipe, pick_device
    from reid_repro.learning.training import train

    device = pick_device(device).type
    cuda = device == "cuda"
    given = (backbone, height, width, batch, steps)
    otherwise = ("resnet50", 256, 128, 64, 100) if cuda else ("tiny", 128, 64, 32, 20)
    backbone, height, width, batch, steps = (
        value or default for value, default in zip(given, otherwise)
    )
    workers = workers or min(8, os.cpu_count())
    recipe = Recipe(epochs=2, batch_size=batch, precision=precision, pad=10, erase=0.5)
    generator = torch.Generator().manual_seed(0)
    order = torch.cat(
        [torch.randperm(images, generator=generator) for _ in range(-(-batch * steps // images))]
    )
    batches = order[: batch * steps].split(batch)
    torch.set_flush_denormal(True)  # as train does; for the usual loop too

    with tempfile.TemporaryDirectory() as folder:
        pixels, paths, labels = photographs(images, height, width, folder)
        pixels, objective, people = pixels.to(device), ide_objective(labels), int(labels.max()) + 1
        data, watch = Photographs(paths, labels, (height, width), recipe), Steps(batches, cuda)

        def ours(model, compile=False, objective=objective):
            chosen = (
                {"compile": compile} if "compile" in inspect.signature(train).parameters else {}
            )
            return lambda objective=objective: train(
                model, objective, pixels, watch, recipe, seed=0, device=device, name="", **chosen
            )

        models = {
            "IDE": IDE(people, backbone=backbone),
            "IANet": IANet(people, backbone=backbone, stages=(2, 3)),
        }
        counts = {name: multiply_adds(model, (height, width)) for name, model in models.items()}
        plain = copy.deepcopy(models["IDE"])
        jobs = {
            "the usual loop, IDE": lambda: usual_loop(plain, data, watch, recipe, device, workers)
        }
        for name, model in models.items():
            jobs[f"ours, {name}"] = ours(model)
            if "compile" in inspect.signature(train).parameters:
                jobs[f"ours, {name}, compiled"] = ours(copy.deepcopy(model), compile=True)
        rounds, rate = [], 0.0
        for _ in range(repeats):  # A, B, C, A, B, C: other load meets all
            rate = max(
                rate,
                matrix_rate(
                    device, precision, clock=time.perf_counter if cuda else time.process_time
                ),
            )
            times = {}
            for what, job in jobs.items():
                with contextlib.redirect_stdout(io.StringIO()):
                    job()
                times[what] = watch.spent
            rounds.append(times)
        with contextlib.redirect_stdout(io.StringIO()):
            shares = {
                what: parts_of_training(job, objective, cuda)
                for what, job in jobs.items()
                if what.startswith("ours")
            }

    seen, first = batch * steps, next(iter(jobs))
    wall, cpu = (
        {what: seen / min(times[what][k] for times in rounds) for what in jobs} for k in (0, 1)
    )
    speed = wall if cuda else cpu  # what other work on the machine disturbs least
    rows = []
    for what in jobs:
        count = counts["IANet" if "IANet" in what else "IDE"]
        parts = shares.get(what, dict.fromkeys(next(iter(shares.values()))))
        rows.append(
            {
                "what": what, "size": f"{batch}x3x{height}x{width}",
                "images/s": round(wall[what], 1), "images/CPU-s": round(cpu[what], 1),
                "x usual": round(speed[what] / speed[first], 3),
                "M multiply-adds forward": round(count.evaluation / 1e6, 1),
                "in training": round(count.training / 1e6, 1),
                "of the matrix rate": round(count.training * speed[what] / rate, 3),
                **{
                    part: share if share is None else round(share, 3)
                    for part, share in parts.items()
                },
            }
        )
    def verdict(good):
        return "reached" if good else "NOT reached"
    faster, slower = speed["ours, IDE"] / speed[first], speed["ours, IDE"] / speed["ours, IANet"]
    best = max(speed[what] for what in jobs if what.startswith("ours, IDE"))
    counted = counts["IANet"].training / counts["IDE"].training
    second = "second" if cuda else "CPU-second"
    notes = [
        (
            f"{backbone} at {height}x{width}, {precision}, on {device}; {images} photographs of"
            f" Toytown, {steps} steps of {batch} after as many to warm up, interleaved, the best of"
            f" {repeats} rounds. Ratios and share are of images per {second}."
        ),
        (
            f"The usual loop: a DataLoader whose {workers} worker processes decode 128x64 JPEGs,"
            " resize and augment them one by one, channels first, loss.item() at each step; same"
            " optimiser, batches, augmentation and precision. CPU-seconds include the workers'."
        ),
        (
            f"Ours is {faster:.2f}x the usual loop's speed, {best / speed[first]:.2f}x in its"
            f" faster form: the aim of 2x is {verdict(best >= 2 * speed[first])}."
        ),
        (
            f"IANet takes {slower:.3f}x the time of its baseline for {counted:.3f}x its"
            f" multiply-adds: the aim of 1.30x is {verdict(slower <= 1.3)}."
        ),
        (
            f"Matrix rate: {rate / 1e9:.1f} G multiply-adds a {second}, a square product in the"
            " same precision, the best of the rounds."
        ),
        (
            "Parts: from a run of their own in which each part is waited for, warm-up included;"
            " those of the usual loop are not measured."
        ),
    ]
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > os.cpu_count():
        notes.append(
            f"Other work shared the machine (load {load:.0f} on {os.cpu_count()} cores): images/s"
            " is too low, all else is noisy."
        )
    return rows, notes


def table(rows):
    "`rows` as aligned text."
    cells = [list(rows[0])] + [["" if v is None else str(v) for v in row.values()] for row in rows]
    width = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, width)))
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in BENCHES.items():
        sub = commands.add_parser(name, help=function.__doc__, description=function.__doc__,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for option, spec in inspect.signature(function).parameters.items():
            sub.add_argument(
                f"--{option.replace('_', '-')}", type=type(spec.default), default=spec.default,
                help=" ",
            )
        sub.add_argument("--out", type=Path, help="JSON file to write")
    args = vars(parser.parse_args(argv))
    command, out = args.pop("command"), args.pop("out")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    rows, notes = BENCHES[command](**args)
    machine = hardware()
    print(
        table(rows),
        *notes,
        "Measured on: " + ", ".join(f"{k} {v}" for k, v in machine.items() if v is not None),
        sep="\n",
    )
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        # no folders of yours
        told = {
            name: Path(value).name if isinstance(value, str) else value
            for name, value in args.items()
        }
        record = {
            "bench": command, "options": told, "rows": rows, "notes": notes, "hardware": machine,
        }
        out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {out}")


if __name__ == "__main__":
    sys.exit(main())
