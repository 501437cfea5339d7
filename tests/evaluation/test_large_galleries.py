"""Scores from features in blocks: equal to those of the whole matrix, to the bit, whatever the ids,
ties, blocks and kinds of array.
"""

import warnings

import numpy as np
import pytest
import torch

from reid_repro.evaluation import large_galleries
from reid_repro.evaluation import Scores, distance_matrix, evaluate
from reid_repro.evaluation.large_galleries import evaluate_features


def case(seed, q=25, g=140, people=7, cameras=3, dim=8, levels=None):
    """Random features and ids, with junk and distractors; `levels`: features of so many values, so
    that most distances are tied.
    """
    rng = np.random.default_rng(seed)
    x = (
        rng.standard_normal((q + g, dim))
        if levels is None
        else rng.integers(0, levels, (q + g, dim)) + 0.5
    )
    x = torch.tensor(x, dtype=torch.float32)
    draw = lambda low, high, n: rng.integers(low, high, n)
    return (
        x[:q], x[q:], draw(1, people, q), draw(1, cameras + 1, q), draw(-1, people, g),
        draw(1, cameras + 1, g),
    )


def same(a: Scores, b: Scores):
    for field in Scores.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field), err_msg=field)


@pytest.fixture
def strips(monkeypatch):
    """Passes over the gallery in strips of a single block, as a large gallery would; a list of the
    number of passes.
    """
    passes, count = [], large_galleries._count

    def spy(*args, **options):
        passes.append(1)
        return count(*args, **options, strip=1)

    monkeypatch.setattr(large_galleries, "_count", spy)
    return passes


@pytest.mark.parametrize("levels", [None, 2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_equal_to_the_whole_matrix(strips, seed, levels):
    query, gallery, *ids = case(seed, levels=levels)
    ids[0][:3] = 99  # not in the gallery
    for metric in ("cosine", "euclidean"):
        for block, ap in (
            (16, "mean"), (33, "trapezoid"), (1024, "mean"), (1 if seed == 0 else 25, "trapezoid"),
        ):
            expected = evaluate(distance_matrix(query, gallery, metric, block), *ids, ap=ap)
            same(evaluate_features(query, gallery, *ids, metric, block, ap), expected)


def test_one_strip_and_many(strips, monkeypatch):
    args = case(0)
    many = evaluate_features(*args, block=16)
    monkeypatch.undo()
    same(evaluate_features(*args, block=16), many)


@pytest.mark.parametrize("seed", range(20))
def test_random_cases(strips, seed):
    rng = np.random.default_rng(seed)
    q, g, people, cameras = (int(rng.integers(1, high)) for high in (20, 90, 12, 4))
    query, gallery, *ids = case(seed, q, g, people + 1, cameras, levels=rng.choice([None, 3]))
    ids[2][0], ids[3][0] = ids[0][0], ids[1][0] + 1  # at least one match
    same(
        evaluate_features(query, gallery, *ids, block=8),
        evaluate(distance_matrix(query, gallery, block=8), *ids),
    )


def test_a_collapsed_network_does_not_score():
    query, gallery, *ids = case(1)
    for value in (1.0, 0.1, 1 / 3):
        a, b = (torch.full_like(x, value) for x in (query, gallery))
        same(evaluate_features(a, b, *ids), evaluate(distance_matrix(a, b), *ids))
    assert evaluate_features(a, b, *ids, metric="euclidean").rank(1) == 0


def test_only_the_query_camera_has_the_person():
    query, gallery, *ids = case(2)
    ids[2][ids[2] == ids[0][0]] = 0
    ids[2][:4], ids[3][:4] = ids[0][0], ids[1][0]
    expected = evaluate(distance_matrix(query, gallery), *ids)
    assert not expected.valid[0]
    same(evaluate_features(query, gallery, *ids), expected)


@pytest.mark.parametrize("levels", [None, 3])
def test_a_wrong_guess_is_noticed(strips, monkeypatch, levels):
    """The guess may be off by the last bit, or by anything: the tiles decide, in a second pass. A
    right guess needs one.
    """
    query, gallery, *ids = case(3, levels=levels)
    expected = evaluate(distance_matrix(query, gallery, block=16), *ids)
    guess = large_galleries._guess
    monkeypatch.setattr(
        large_galleries, "_guess",
        lambda q, g, rows, cols, metric: distance_matrix(q, g, metric, 16).numpy()[rows, cols],
    )
    same(evaluate_features(query, gallery, *ids, block=16), expected)
    assert len(strips) == 1
    lower = lambda h: np.nextafter(h, np.float32(0))
    higher = lambda h: np.nextafter(h, np.float32(9))
    for wrong in (lower, higher, lambda h: h[::-1].copy(), np.zeros_like):
        monkeypatch.setattr(
            large_galleries, "_guess", lambda *args, wrong=wrong: wrong(guess(*args))
        )
        strips.clear()
        same(evaluate_features(query, gallery, *ids, block=16), expected)
        assert len(strips) == 2


def test_never_the_whole_matrix(strips, monkeypatch):
    sizes, blocks, whole = [], set(), large_galleries.distance_matrix

    def spy(query, gallery, metric, block=None):
        sizes.append((len(query), len(gallery)))
        blocks.update({block} if len(query) > 1 else {})
        return whole(query, gallery, metric, block or 1024)

    monkeypatch.setattr(large_galleries, "distance_matrix", spy)
    evaluate_features(*case(0, g=1000), block=50)
    assert max(rows * cols for rows, cols in sizes) <= max(25 * 50, 1000)
    assert sum(cols for rows, cols in sizes if rows == 25) == 1000 * len(strips)
    # the tiles that distance_matrix would make, on which the last bit may depend
    assert blocks == {50}


def test_kinds_of_array(tmp_path):
    query, gallery, *ids = case(4)
    expected = evaluate_features(query, gallery, *ids)
    same(evaluate_features(query.numpy(), gallery.numpy(), *ids), expected)
    same(evaluate_features(query, gallery, *[torch.tensor(x) for x in ids]), expected)
    same(evaluate_features(query.requires_grad_(), gallery, *[x.tolist() for x in ids]), expected)
    query = query.detach()
    for kind in (np.float16, np.float64):
        a, b = query.numpy().astype(kind), gallery.numpy().astype(kind)
        same(evaluate_features(a, b, *ids), evaluate(distance_matrix(a, b), *ids))
    np.save(tmp_path / "gallery.npy", gallery.numpy())
    mapped = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(
            evaluate_features(query, mapped, *ids, block=32),
            evaluate(distance_matrix(query, gallery, block=32), *ids),
        )


def test_the_inputs_stay():
    args = case(5)
    kept = [x.clone() if isinstance(x, torch.Tensor) else x.copy() for x in args]
    evaluate_features(*args)
    for x, y in zip(args, kept):
        np.testing.assert_array_equal(x, y)


def changed(place, value, metric="cosine"):
    query, gallery, *ids = case(0)
    {"query": query, "gallery": gallery}[place[0]][place[1]] = value
    return evaluate_features(query, gallery, *ids, metric, block=16)


CASE = case(0)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: changed(("gallery", 77), torch.nan), r"gallery\[77\] holds NaN"),
        (
            lambda: changed(("gallery", 139), torch.inf, "euclidean"),
            r"gallery\[139\] holds NaN or infinity",
        ),
        (lambda: changed(("query", 24), 0), r"query\[24\] is the zero vector"),
        (
            lambda: changed(("gallery", 100), 3e38, "euclidean"),
            r"gallery\[100\] is too long for distances in float32",
        ),
        (
            lambda: evaluate_features(CASE[0][:, :2], *CASE[1:]),
            "query has D = 2 but gallery has D = 8",
        ),
        (lambda: evaluate_features(CASE[0][:0], *CASE[1:]), "query must have shape"),
        (lambda: evaluate_features(CASE[0], CASE[1][0], *CASE[2:]), "gallery must have shape"),
        (lambda: evaluate_features(CASE[0] + 0j, *CASE[1:]), "query must hold real numbers"),
        (
            lambda: evaluate_features(*CASE[:2], CASE[2][1:], *CASE[3:]),
            "q_pids has 24 entries .* 25 rows, those of query",
        ),
        (
            lambda: evaluate_features(*CASE[:5], CASE[5][1:]),
            "g_camids has 139 entries .* 140 columns, the rows of gallery",
        ),
        (lambda: evaluate_features(*CASE[:2], CASE[2] * 0, *CASE[3:]), r"q_pids\[0\] = 0"),
        (
            lambda: evaluate_features(*CASE[:4], CASE[4] - 1.5, CASE[5]),
            "g_pids must be a list of whole numbers",
        ),
        (
            lambda: evaluate_features(*CASE[:2], CASE[2] + 500, *CASE[3:]),
            "none of the 25 queries has a match",
        ),
        (
            lambda: evaluate_features(*CASE, metric="l2"),
            "metric must be 'cosine' or 'euclidean', got 'l2'",
        ),
        (lambda: evaluate_features(*CASE, block=0), "block must be a whole number from 1"),
        (lambda: evaluate_features(*CASE, ap="area"), "ap must be 'mean' or 'trapezoid'"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_long_feature_is_no_fault_of_the_cosine():
    changed(("gallery", 100), 3e38)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    query, gallery, *ids = case(0)
    query, gallery = query.cuda(), gallery.cuda()
    same(
        evaluate_features(query, gallery, *ids, block=16),
        evaluate(distance_matrix(query, gallery, block=16), *ids),
    )


def test_pairs_of_one_person():
    for seed in range(5):
        _, _, q_pids, _, g_pids, _ = case(seed)
        rows, cols = large_galleries._person_pairs(q_pids, g_pids)
        assert sorted(zip(rows, cols)) == sorted(
            (i, j) for i, p in enumerate(q_pids) for j, r in enumerate(g_pids) if p == r
        )
        assert (np.diff(cols) >= 0).all()
