"""Evaluation against its definitions, on the cases where such code goes wrong, and on hostile
input.
"""

import json
import re
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.metrics import average_precision_score

from reid_repro.evaluation import (
    Scores, SingleShot, distance_matrix, evaluate, evaluate_features, expand_queries, rerank,
    single_shot,
)

ROOT = Path(__file__).resolve().parents[2]


def reference(dist, q_pids, q_camids, g_pids, g_camids, ap="mean"):
    """(first, ap, inp) of each query from an explicit list; nan without a match. Wrong images first
    among equal distances.
    """
    out = []
    for d, pid, camid in zip(np.asarray(dist, dtype=np.float64).tolist(), q_pids, q_camids):
        listed = [
            (x, p == pid)
            for x, p, c in zip(d, g_pids, g_camids)
            if p != -1 and not (p == pid and c == camid)
        ]
        hits = [hit for _, hit in sorted(listed)]
        if True not in hits:
            out.append((np.nan,) * 3)
            continue
        area, seen, last = 0.0, 0, 1.0
        for rank, hit in enumerate(hits, start=1):  # walk the precision-recall curve image by image
            seen += hit
            if hit:
                area += seen / rank if ap == "mean" else (last + seen / rank) / 2
            last = seen / rank
        out.append((hits.index(True) + 1, area / seen, seen / (len(hits) - hits[::-1].index(True))))
    return np.array(out).T


def case(seed, q=25, g=70, people=7, cameras=3):
    rng = np.random.default_rng(seed)
    ids = (
        rng.integers(1, people, q), rng.integers(1, cameras + 1, q), rng.integers(-1, people, g),
        rng.integers(1, cameras + 1, g),
    )
    return rng.random((q, g), dtype=np.float32), *ids


def agrees(dist, *ids):
    for ap in ("mean", "trapezoid"):
        first, precision, inp = reference(dist, *ids, ap)
        valid = ~np.isnan(first)
        s = evaluate(dist, *ids, ap=ap)
        np.testing.assert_array_equal(s.valid, valid)
        np.testing.assert_array_equal(s.first, np.where(valid, first, 0))
        np.testing.assert_allclose(s.ap, precision, rtol=1e-12)
        np.testing.assert_allclose(s.inp, inp, rtol=1e-12)
        np.testing.assert_allclose((s.mAP, s.mINP), (precision[valid].mean(), inp[valid].mean()))
        np.testing.assert_allclose(
            s.cmc, [(first[valid] <= k).mean() for k in range(1, len(s.cmc) + 1)]
        )
        np.testing.assert_allclose([s.rank(k) for k in range(1, len(s.cmc) + 1)], s.cmc)
        assert (s.queries, s.dropped, s.junk) == (
            len(valid), (~valid).sum(), (np.asarray(ids[2]) == -1).sum(),
        )
    return s


# --- agreement with the definitions
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize(
    "change",
    [
        "random", "rounded", "all equal", "negative", "float64", "float16", "tensor", "bfloat16",
        "integers",
    ],
)
def test_agrees_with_the_definitions(seed, change):
    dist, *ids = case(seed)
    dist = {
        "random": lambda d: d, "rounded": lambda d: np.round(d, 1), "all equal": np.zeros_like,
        "negative": lambda d: -d,
        # differences that float32 would make ties
        "float64": lambda d: 1 + d.astype(np.float64) * 1e-12,
        "float16": lambda d: d.astype(np.float16), "tensor": torch.tensor,
        "bfloat16": lambda d: torch.tensor(d).bfloat16(),
        "integers": lambda d: (d * 8).astype(np.int64),
    }[change](dist)
    agrees(dist.float().numpy() if change == "bfloat16" else dist, *ids)
    if change == "bfloat16":
        assert evaluate(dist, *ids).mAP == evaluate(dist.double(), *ids).mAP


def test_float64_distances_are_not_rounded_into_ties():
    assert evaluate(np.array([[1.0, 1.0 + 1e-12]]), [1], [1], [1, 2], [2, 2]).rank(1) == 1


def test_more_rows_than_one_block():
    dist, *ids = case(3, q=700, g=4000, people=300)       # 2**20 numbers a block: three blocks
    assert agrees(dist, *ids).queries == 700


@pytest.mark.parametrize("extra", [[-1, -1, -1], [0, 0, 0], [9, 9]])
def test_junk_distractors_and_others_only_as_company(extra):
    """One match at distance 2; the extra images are nearer. Junk does not count, distractors and
    others do.
    """
    n = len(extra)
    s = agrees(
        np.array([[1.0] * n + [2.0]]), [4], [1], np.array([*extra, 4]), np.array([2] * n + [2])
    )
    assert s.first.tolist() == [1 if extra[0] == -1 else n + 1] and s.junk == (
        n if extra[0] == -1 else 0
    )


def test_same_camera_images_of_the_same_person_take_no_rank():
    # own camera; another person there; a match
    s = evaluate([[0.1, 0.2, 0.3]], [7], [1], [7, 3, 7], [1, 1, 2])
    assert s.first.tolist() == [2] and s.mAP == 0.5


def test_hand_values_of_the_notebook():
    ids = [7], [1], [7, 3, 7, -1, 7], [1, 2, 2, 3, 3]
    dist = np.array([[0.1, 0.2, 0.3, 0.4, 0.5]])
    s = evaluate(dist, *ids)
    assert (s.mAP, s.mINP) == (pytest.approx(7 / 12), pytest.approx(2 / 3)) and s.cmc.tolist() == [
        0, 1, 1, 1,
    ]
    assert evaluate(dist, *ids, ap="trapezoid").mAP == pytest.approx(5 / 12)


def test_ties_count_against_the_model_and_matches_tie_freely():
    s = evaluate([[0.5, 0.5, 0.5, 0.5]], [1], [1], [1, 2, 1, 3], [2, 2, 2, 2])
    assert s.first.tolist() == [3] and s.mAP == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert evaluate([[0.5, 0.5, 0.9]], [1], [1], [1, 1, 2], [2, 2, 2]).mAP == 1
    # the two zeros are equal
    assert evaluate([[0.0, -0.0]], [1], [1], [1, 2], [2, 2]).first.tolist() == [2]


def test_the_order_in_which_images_are_stored_does_not_matter():
    dist, qp, qc, gp, gc = case(5)
    dist = np.round(dist, 1)
    order = np.random.default_rng(0).permutation(len(gp))
    a, b = evaluate(dist, qp, qc, gp, gc), evaluate(dist[:, order], qp, qc, gp[order], gc[order])
    np.testing.assert_array_equal(a.ap, b.ap)


def test_average_precision_is_scikit_learns_without_ties():
    dist, qp, qc, gp, gc = case(2)
    s = evaluate(dist, qp, qc, gp, gc)
    for i in np.flatnonzero(s.valid):
        keep = (gp != -1) & ~((gp == qp[i]) & (gc == qc[i]))
        assert s.ap[i] == pytest.approx(average_precision_score(gp[keep] == qp[i], -dist[i, keep]))


@pytest.mark.parametrize("junk", [0, 5])
def test_the_input_is_left_as_it_was(junk):
    dist, *ids = case(1)
    ids[2][ids[2] == -1] = 1
    ids[2][:junk] = -1
    before = dist.copy(), [i.copy() for i in ids]
    for run in (evaluate, single_shot):
        run(dist, *ids), run(torch.from_numpy(dist), *ids)
    np.testing.assert_array_equal(dist, before[0])
    for now, then in zip(ids, before[1]):
        np.testing.assert_array_equal(now, then)
    for metric in ("cosine", "euclidean"):
        x = torch.randn(4, 3, dtype=torch.float64)
        kept = x.clone()
        distance_matrix(x, x, metric)
        torch.testing.assert_close(x, kept, rtol=0, atol=0)


def test_accepts_tensors_lists_and_gradients():
    dist, *ids = case(0)
    want = evaluate(dist, *ids).mAP
    assert evaluate(torch.tensor(dist, requires_grad=True), *map(torch.tensor, ids)).mAP == want
    assert evaluate(dist.tolist(), *(i.tolist() for i in ids)).mAP == want
    assert evaluate(dist, *(i.astype(np.int32) for i in ids)).mAP == want


# --- the report
# --------------------------------------------------------------------------------------------------

def test_queries_without_a_match_are_counted_and_named():
    dist, qp, qc, gp, gc = case(0, q=6)
    qp[:] = [1, 1, 50, 60, 50, 2]                          # 50 and 60 are nowhere in the gallery
    s = agrees(dist, qp, qc, gp, gc)
    assert (
        (s.queries, s.dropped, s.unmatched) == (6, 3, (50, 60))
        and np.isnan(s.ap[2])
        and s.first[2] == 0
    )
    for text in (str(s), repr(s), s._repr_markdown_()):
        assert "6 queries, 3 without a match: ids 50, 60" in text and f"{s.mAP:.1%}" in text


def test_rank_beyond_the_gallery_and_length_of_the_cmc():
    dist, *ids = case(0, g=20, people=3)
    s = evaluate(dist, *ids)
    assert (
        s.cmc.dtype == np.float64 and len(s.cmc) == 20 - s.junk and s.rank(1000) == s.cmc[-1] == 1
    )
    assert [s.rank(k) for k in range(1, len(s.cmc) + 1)] == pytest.approx(s.cmc.tolist())
    assert len(evaluate(*case(0)).cmc) == 50
    late = evaluate(np.arange(80.0)[None], [1], [1], [2] * 79 + [1], [2] * 80)
    assert late.cmc[-1] == 0 and late.rank(79) == 0 and late.rank(80) == 1
    for k in (0, -1, 1.5):
        with pytest.raises(ValueError, match="k must be"):
            s.rank(k)


def test_scores_are_frozen():
    with pytest.raises(AttributeError):
        evaluate(*case(0)).mAP = 1.0


# --- faults name the culprit
# -------------------------------------------------------------------------------------

GOOD = np.arange(6.0).reshape(2, 3) + 1, [1, 2], [1, 1], [1, 2, 0], [2, 2, 2]


def bad(**change):
    names = ("dist", "q_pids", "q_camids", "g_pids", "g_camids")
    return [change.get(n, v) for n, v in zip(names, GOOD)]


def hole(value):
    dist = GOOD[0].copy()
    dist[1, 2] = value
    return dist


FAULTS = {
    "nan": (bad(dist=hole(np.nan)), r"dist\[1, 2\] is nan"),
    "inf": (bad(dist=hole(np.inf)), r"dist\[1, 2\] is inf"),
    "minus inf in a tensor": (bad(dist=torch.tensor(hole(-np.inf))), r"dist\[1, 2\] is -inf"),
    "nan in a junk column": (bad(dist=hole(np.nan), g_pids=[1, 2, -1]), r"dist\[1, 2\] is nan"),
    "one dimension": (bad(dist=np.ones(3)), r"dist must have shape .*got \(3,\)"),
    "no queries": (
        bad(dist=np.ones((0, 3)), q_pids=[], q_camids=[]), r"dist must have .*got \(0, 3\)",
    ),
    "no gallery": (
        bad(dist=np.ones((2, 0)), g_pids=[], g_camids=[]), r"dist must have .*got \(2, 0\)",
    ),
    "q_pids short": (bad(q_pids=[1]), "q_pids has 1 entries but dist has 2 rows"),
    "q_camids long": (bad(q_camids=[1, 1, 1]), "q_camids has 3 entries but dist has 2 rows"),
    "g_pids short": (bad(g_pids=[1, 2]), "g_pids has 2 entries but dist has 3 columns"),
    "g_camids short": (bad(g_camids=[1]), "g_camids has 1 entries but dist has 3 columns"),
    "float ids": (bad(g_pids=[1.0, 2.0, 0.0]), "g_pids must be a list of whole numbers"),
    "nested ids": (bad(q_pids=[[1], [2]]), "q_pids must be a list of whole numbers"),
    "distractor as query": (bad(q_pids=[1, 0]), r"q_pids\[1\] = 0: .*distractor"),
    "junk as query": (bad(q_pids=[-1, 1]), r"q_pids\[0\] = -1"),
    "unknown negative id": (bad(g_pids=[1, -2, 2]), r"g_pids\[1\] = -2"),
    "ids missing from the gallery": (
        bad(q_pids=[8, 9]), r"none of the 2 queries.*q_pids\[0\] = 8 is not in the gallery",
    ),
    "own camera only": (
        bad(g_camids=[1, 1, 1]),
        r"q_pids\[0\] = 1 is there only under its own camera \(images: 1\)",
    ),
    "ragged": (bad(dist=[[1.0, 2.0, 3.0], [1.0]]), "dist must be a matrix"),
    "words": (bad(dist=[["a", "b", "c"]] * 2), "dist must hold real numbers"),
    "complex": (bad(dist=GOOD[0] + 0j), "dist must hold real numbers"),
    "complex tensor": (bad(dist=torch.tensor(GOOD[0]) + 0j), "dist must hold real numbers"),
    "ids beyond int64": (
        bad(g_pids=np.array([1, 2, 2**63], np.uint64)), "g_pids holds 9223372036854775808",
    ),
    "cameras beyond int64": (bad(q_camids=np.array([1, 2**64 - 1], np.uint64)), "q_camids holds"),
    "ragged ids": (bad(q_pids=[[1], [2, 3]]), "q_pids must be a list"),
    "junk only": (
        bad(g_pids=[-1, -1, -1]), r"none of the 2 queries.*q_pids\[0\] = 1 is not in the gallery",
    ),
}


@pytest.mark.parametrize("run", [evaluate, single_shot])
@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_the_culprit(name, run):
    arguments, message = FAULTS[name]
    with pytest.raises(ValueError, match=message):
        run(*arguments)


def test_the_place_of_a_fault_in_a_later_block():
    dist = np.ones((600, 4000), dtype=np.float32)
    dist[555, 1234] = np.nan
    with pytest.raises(ValueError, match=r"dist\[555, 1234\]"):
        evaluate(dist, [1] * 600, [1] * 600, [1] * 4000, [2] * 4000)


def test_unknown_options():
    with pytest.raises(ValueError, match="'area'"):
        evaluate(*GOOD, ap="area")
    with pytest.raises(ValueError, match="trials must be a whole number from 1, got 0"):
        single_shot(*GOOD, trials=0)


@pytest.mark.parametrize("value", ["a", None, 1.5, float("nan"), float("inf"), -1, True])
def test_whole_numbers_are_named(value):
    for call, word in (
        (lambda: single_shot(*GOOD, trials=value), "trials"),
        (lambda: single_shot(*GOOD, seed=value), "seed"),
        (lambda: evaluate(*GOOD).rank(value), "k"),
        (lambda: distance_matrix(GOOD[0], GOOD[0], block=value), "block"),
        (lambda: distance_matrix(GOOD[0], GOOD[0], block=0), "block"),
    ):
        with pytest.raises(ValueError, match=f"^{word} must be a whole number"):
            call()


# --- distances
# ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("block", [1, 3, 4, 1024])
def test_distances_equal_their_definitions(block):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 5)), rng.normal(size=(9, 5))
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)
    wants = {
        "cosine": 1 - unit(x) @ unit(y).T,
        "euclidean": np.linalg.norm(x[:, None] - y[None], axis=2),
    }
    for metric, want in wants.items():
        dist = distance_matrix(x, y, metric, block=block)
        assert dist.dtype == torch.float32 and dist.shape == (7, 9)
        np.testing.assert_allclose(dist, want, rtol=1e-6)


def test_distances_keep_the_digits_between_near_duplicates():
    x, y = torch.tensor([[1000.0, 1.0]]), torch.tensor([[1000.0, 1.001]])
    assert distance_matrix(x, y, "euclidean").item() == pytest.approx(0.001, rel=1e-3)
    assert distance_matrix(x, x, "euclidean").item() == 0 and distance_matrix(x, x).min() >= 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
        lowered = distance_matrix(a, a + 0.01, "euclidean")
    torch.testing.assert_close(lowered, distance_matrix(a, a + 0.01, "euclidean"), rtol=0, atol=0)


def test_distances_that_no_float32_holds_are_refused():
    big = torch.tensor([[1.0, 1.0], [1e200, 1.0]], dtype=torch.float64)
    for metric in ("cosine", "euclidean"):
        with pytest.raises(ValueError, match=r"query\[1\] is too large"):
            distance_matrix(big, big[:1], metric)
    with pytest.raises(ValueError, match=r"gallery\[0\] is too large or too small"):
        distance_matrix(big[:1], torch.full((1, 2), 1e-200, dtype=torch.float64))
    for size in (1e100, 1.3e154):
        with pytest.raises(ValueError, match=r"query\[1\] and gallery\[0\] exceeds float32"):
            distance_matrix(
                torch.tensor([[1e3], [size]], dtype=torch.float64),
                -big[:1, :1],
                "euclidean", block=1,
            )
    for x in (big + 0j, (big + 0j).numpy()):
        with pytest.raises(ValueError, match="query must hold real numbers"):
            distance_matrix(x, big)


def test_distances_carry_no_gradient():
    assert not distance_matrix(torch.ones(2, 3, requires_grad=True), torch.ones(2, 3)).requires_grad


ONES = torch.ones(3, 4)
ROW = ONES.clone()
ROW[2, 1] = float("nan")
INF = ONES.clone()
INF[1, 0] = float("inf")
ZERO = ONES.clone()
ZERO[1] = 0


@pytest.mark.parametrize(
    ("query", "gallery", "message"),
    [
        (ROW, ONES, r"query\[2\] holds NaN or infinity"),
        (ONES, ROW, r"gallery\[2\] holds NaN or infinity"),
        (INF, ONES, r"query\[1\] holds NaN or infinity"),
        (ONES[0], ONES, r"query must have shape .*got \(4,\)"),
        (ONES, ONES[:0], r"gallery must have shape .*got \(0, 4\)"),
        (ONES, torch.ones(3, 5), "query has D = 4 but gallery has D = 5"),
    ],
)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_wrong_features_are_named(query, gallery, message, metric):
    with pytest.raises(ValueError, match=message):
        distance_matrix(query, gallery, metric, block=2)


def test_zero_vectors_and_unknown_metrics():
    with pytest.raises(ValueError, match=r"gallery\[1\] is the zero vector"):
        distance_matrix(ONES, ZERO)
    assert distance_matrix(ONES, ZERO, "euclidean")[0, 1] == 2
    with pytest.raises(ValueError, match="'manhattan'"):
        distance_matrix(ONES, ONES, "manhattan")


HIDDEN = np.ma.masked_array(np.ones((3, 4)), mask=[[0] * 4, [0, 1, 0, 0], [0] * 4])
NO_NUMBERS = {  # something that holds other numbers than it shows → the words of its refusal
    "masked": (HIDDEN, "1 of its entries are masked"),
    "masked rows": (list(HIDDEN), "1 of its entries are masked"),
    "sparse": (torch.ones(3, 4).to_sparse(), r"is sparse.*to_dense\(\)"),
    "scipy": (csr_matrix(np.ones((3, 4))), r"is sparse.*toarray\(\)"),
    "quantized": (
        torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8), r"is quantized.*dequantize\(\)",
    ),
    "meta": (torch.ones(3, 4, device="meta"), "holds no numbers"),
}


@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.parametrize("case", NO_NUMBERS)
def test_what_hides_its_numbers_is_refused(case):
    given, words = NO_NUMBERS[case]
    for name, action in (
        ("query", lambda: distance_matrix(given, ONES)),
        ("gallery", lambda: distance_matrix(ONES, given, "euclidean")),
        ("query", lambda: rerank(given, ONES, k1=2, k2=1)),
        ("gallery", lambda: expand_queries(ONES, given, k=1)),
        ("query", lambda: evaluate_features(given, ONES, *(np.arange(3) + 1, None) * 2)),
        ("dist", lambda: evaluate(given, *(np.arange(3) + 1, None, np.arange(4) + 1, None))),
    ):
        with pytest.raises(ValueError, match=f"{name}.* {words}"):
            action()


def test_masked_ids_are_refused():
    hidden = np.ma.masked_array([1, 2, 0], mask=[0, 1, 0])
    for name in ("g_pids", "g_camids"):
        with pytest.raises(ValueError, match=f"{name}: 1 of its entries are masked"):
            evaluate(*bad(**{name: hidden}))
    whole = np.ma.masked_array([1, 2, 0], mask=False)
    assert evaluate(*bad(g_pids=whole)).mAP == evaluate(*GOOD).mAP


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32])
def test_junk_in_an_unsigned_type_is_told(kind):
    ids = np.array([1, 2, -1]).astype(kind)
    with pytest.warns(UserWarning, match=f"g_pids holds {ids[2]}, which is what -1 becomes"):
        evaluate(*bad(g_pids=ids))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(*bad(g_pids=np.array([1, 2, 0], kind)))


@pytest.mark.parametrize(
    "change",
    [lambda x: x[::-1][::-1], lambda x: x.astype(">f8"),
     lambda x: x.astype(np.longdouble), lambda x: x[:, ::-1][:, ::-1], lambda x: x.astype(">f4")],
)
def test_arrays_however_they_lie_in_memory(change):
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32).astype(float)
    y = np.ascontiguousarray(x[::-1])
    for metric in ("cosine", "euclidean"):
        expected = distance_matrix(x, y, metric)
        assert distance_matrix(change(x), change(y), metric).equal(expected)
        assert distance_matrix(x, x[::-1], metric).equal(expected)
    ids = np.arange(5) + 1, None, np.arange(5) + 1, None
    dist = expected.numpy().astype(float)
    assert evaluate(change(dist), *ids).mAP == evaluate(dist, *ids).mAP


@pytest.mark.parametrize("size", [1e-200, 1e-120, 1e-50])
def test_distances_that_float32_makes_zero_are_refused(size):
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * size
    ids = np.arange(4) + 1, None, np.arange(4) + 1, None
    for action in (
        lambda: distance_matrix(x, x.flip(0), "euclidean"),
        lambda: evaluate_features(x, x.flip(0), *ids, metric="euclidean"),
    ):
        with pytest.raises(ValueError, match="too small"):
            action()
    zero = torch.zeros(2, 3, dtype=torch.float64)
    assert distance_matrix(zero, zero, "euclidean").max() == 0
    assert distance_matrix(x[:, :1].sign(), x[:, :1].sign(), "euclidean").min() == 0


def test_no_match_for_want_of_cameras_names_the_way_to_score_without():
    with pytest.raises(ValueError, match="None for both"):
        evaluate(*bad(g_camids=[1, 1, 1]))
    for nothing in ([None] * 3, [np.nan] * 3, []):
        with pytest.raises(ValueError, match=r"g_camids must be .*None for both"):
            evaluate(*bad(g_camids=nothing))


# --- single-shot
# -------------------------------------------------------------------------------------------------

def two_cameras(people=30, shots=4, seed=0):
    rng = np.random.default_rng(seed)
    pids = np.arange(1, people + 1)
    dist = rng.random((people, people * shots), dtype=np.float32)
    dist[np.repeat(np.eye(people, dtype=bool), shots, axis=1)] -= 0.4
    return dist, pids, np.ones(people, int), np.repeat(pids, shots), np.full(people * shots, 2)


def test_single_shot_ranks_one_image_per_person():
    s = single_shot(*two_cameras(), trials=6)
    assert (
        isinstance(s, SingleShot)
        and len(s.trials) == 6
        and all(isinstance(t, Scores) for t in s.trials)
    )
    for t in s.trials:
        assert len(t.cmc) == 30 and t.first.max() <= 30 and t.dropped == 0
        np.testing.assert_allclose(t.ap, 1 / t.first)                # a single match each
    values = np.array([t.mAP for t in s.trials])
    assert (
        s.mAP == pytest.approx(values.mean())
        and s.mAP_std == pytest.approx(values.std(ddof=1))
        and s.mAP_std > 0
    )
    np.testing.assert_allclose(s.cmc, np.mean([t.cmc for t in s.trials], axis=0))
    np.testing.assert_allclose(s.cmc_std, np.std([t.cmc for t in s.trials], axis=0, ddof=1))
    assert (
        s.rank(1) == pytest.approx(s.cmc[0])
        and s.rank(99) == 1
        and "6 trials" in str(s)
        and "±" in str(s)
    )


def test_single_shot_draws_are_seeded_and_each_image_can_be_drawn():
    data = two_cameras()
    a, b = single_shot(*data, trials=3, seed=1), single_shot(*data, trials=5, seed=1)
    assert [t.mAP for t in a.trials] == [t.mAP for t in b.trials[:3]]
    assert len({t.mAP for t in b.trials}) > 1 and single_shot(*data, trials=3, seed=2).mAP != a.mAP
    # one query, three images of its person at ranks 1, 3 and 5 of four other people: all three must
    # turn up, about equally often
    dist = np.array([[1, 3, 5, 2, 2.5, 4, 4.5]])
    found = [
        int(t.first[0])
        for t in single_shot(dist, [1], [1], [1, 1, 1, 2, 3, 4, 5], [2] * 7, trials=300).trials
    ]
    counts = {rank: found.count(rank) for rank in set(found)}
    assert set(counts) == {1, 3, 5} and min(counts.values()) > 70


def test_single_shot_draws_from_other_cameras_than_the_querys():
    """Person 1 has near images under the query's own camera and one far match elsewhere: only that
    may be drawn.
    """
    g_pids, g_camids = [1, 1, 1, 2, 2, 1], [1, 1, 1, 1, 2, 2]
    dist = np.array([[1, 2, 3, 4, 7, 6.0]])  # person 2 has 4 under camera 1 and 7 under camera 2
    s = single_shot(dist, [1], [1], g_pids, g_camids, trials=20)
    assert {t.first[0] for t in s.trials} == {1} and s.mAP_std == 0 and len(s.trials[0].cmc) == 2
    # the second from camera 2
    both = single_shot(np.vstack([dist, dist]), [1, 1], [1, 2], g_pids, g_camids, trials=20)
    assert both.trials[0].first.tolist() == [1, 1] and both.trials[0].dropped == 0


def test_single_shot_drops_junk_keeps_distractors_and_counts_the_unmatched():
    dist = np.array([[5, 1, 2, 3, 4.0], [1, 2, 3, 4, 5.0]])
    s = single_shot(dist, [1, 9], [1, 1], [1, -1, 0, 0, 2], [2] * 5, trials=2)
    assert (
        s.trials[0].first.tolist() == [4, 0]
        and s.trials[0].unmatched == (9,)
        and s.trials[0].junk == 1
    )


def test_single_shot_without_choice_has_no_spread():
    data = two_cameras(shots=1)
    s = single_shot(*data, trials=4)
    assert (
        s.mAP_std == 0
        and s.mAP == pytest.approx(evaluate(*data).mAP)
        and single_shot(*data, trials=1).mAP_std == 0
    )


def test_single_shot_takes_tensors():
    dist, *ids = two_cameras()
    assert single_shot(torch.tensor(dist), *ids).mAP == single_shot(dist, *ids).mAP


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_matrix_on_a_gpu():
    dist, *ids = case(0)
    assert evaluate(torch.tensor(dist).cuda(), *ids).mAP == evaluate(dist, *ids).mAP
    assert single_shot(torch.tensor(dist).cuda(), *ids).mAP == single_shot(dist, *ids).mAP
    x = torch.randn(9, 5)
    torch.testing.assert_close(
        distance_matrix(x.cuda(), x.cuda()).cpu(), distance_matrix(x, x), rtol=1e-6, atol=1e-7
    )


# --- cost
# --------------------------------------------------------------------------------------------------------

def test_memory_does_not_grow_with_the_number_of_queries():
    def peak(q):
        dist, *ids = case(0, q=q, g=10_000, people=500)
        tracemalloc.start()
        evaluate(dist, *ids)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top / 2**20
    small, large = peak(300), peak(1200)
    assert small < 40 and large < small + 2


def test_the_bench_prints_and_writes(tmp_path):
    out = tmp_path / "deep" / "bench.json"
    run = subprocess.run(
        [
            sys.executable, ROOT / "ci/bench/evaluation.py", "--queries", "40", "--gallery",
            "500", "--subset", "10", "--out", out,
        ],
        capture_output=True, text=True, cwd=tmp_path, check=True,
    )
    assert (
        re.search(r"^evaluate +40 ", run.stdout, re.M)
        and "extrapolation" in run.stdout
        and "Measured on: cpu" in run.stdout
    )
    record = json.loads(out.read_text())
    assert (
        record["bench"] == "evaluation"
        and record["options"]["queries"] == 40
        and record["hardware"]["torch"] == torch.__version__
    )
    assert {row["what"] for row in record["rows"]} >= {"evaluate", "argsort per query"}
