"""Re-ranking against a dense form of the authors' released algorithm, query expansion against
loops, ties, limits, hostile input.
"""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from reid_repro.evaluation import reranking
from reid_repro.evaluation.reranking import expand_queries, rerank


def features(seed=0, q=12, g=50, dim=6, people=8, noise=0.6):
    "Queries and gallery of a few people, float32."
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal((people, dim))
    draw = lambda n: torch.tensor(
        centre[rng.integers(0, people, n)] + noise * rng.standard_normal((n, dim)),
        dtype=torch.float32,
    )
    return draw(q), draw(g)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def released(query, gallery, k1, k2, lam):
    """The published algorithm on square float64 matrices, image by image, from features as they are
    (squared Euclidean).

    As released but for the precision, and for ties: an image is first in its own list, then the
    smaller number."""
    x = np.concatenate([query, gallery]).astype(np.float64)
    n = len(x)
    d = cdist(x, x, "sqeuclidean")
    d = (d / d.max(axis=0)).T  # columns by their maximum, then transposed
    order = np.argsort(d - 2 * np.eye(n), axis=1, kind="stable")
    returned = lambda i, k: np.array([j for j in order[i, : k + 1] if i in order[j, : k + 1]])
    V = np.zeros((n, n))
    for i in range(n):
        first = returned(i, k1)
        members = first
        for j in first:
            candidates = returned(j, int(np.around(k1 / 2)))
            if len(np.intersect1d(candidates, first)) > 2 / 3 * len(candidates):
                members = np.append(members, candidates)
        members = np.unique(members)
        V[i, members] = np.exp(-d[i, members])
        V[i] /= V[i].sum()
    if k2 != 1:
        V = np.stack([V[order[i, :k2]].mean(axis=0) for i in range(n)])
    q = len(query)
    shared = np.stack([np.minimum(V[i], V[q:]).sum(axis=1) for i in range(q)])
    return (1 - lam) * (1 - shared / (2 - shared)) + lam * d[:q, q:]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "k1, k2, lam",
    [(20, 6, 0.3), (1, 1, 0.3), (5, 2, 0.0), (6, 3, 0.5), (7, 9, 0.1), (11, 4, 1.0), (61, 62, 0.3)],
)
def test_released_behaviour(seed, k1, k2, lam):
    query, gallery = features(seed)
    plain = [x.double().numpy() for x in (query, gallery)]
    for metric, x in (("euclidean", plain), ("cosine", [unit(x) for x in plain])):
        found = rerank(query, gallery, k1, k2, lam, metric)
        assert found.dtype == torch.float32 and found.shape == (12, 50)
        np.testing.assert_allclose(found, released(*x, k1, k2, lam), rtol=0, atol=1e-6)
        assert found.min() >= 0 and found.max() <= 1 + 1e-6


@pytest.mark.parametrize("seed", range(6))
def test_ties_of_coarse_features(seed):
    """Features of three levels: most distances are shared, many images are equal, and the smaller
    number comes first.
    """
    rng = np.random.default_rng(seed)
    query, gallery = (
        torch.tensor(rng.integers(0, 3, (n, 4)), dtype=torch.float32) for n in (15, 90)
    )
    for k1, k2 in ((20, 6), (6, 3), (3, 1)):
        expected = released(query.numpy(), gallery.numpy(), k1, k2, 0.3)
        for block in (7, 512):
            np.testing.assert_allclose(
                rerank(query, gallery, k1, k2, metric="euclidean", block=block), expected, rtol=0,
                atol=1e-6,
            )


def test_equal_images_stay_equal_under_the_cosine():
    """Copies of a photograph have no distance from one another, though a matrix product says 1e-16;
    their order is that of storage.
    """
    query, gallery = features(3)
    gallery[10:40] = query[0]
    found, x = rerank(query, gallery, 8, 3), [unit(a.double().numpy()) for a in (query, gallery)]
    np.testing.assert_allclose(found, released(*x, 8, 3, 0.3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("k1", [3, 6, 9, 12])
def test_two_thirds_are_not_enough(k1):
    """Eq. 4 as released is strict: sets are found where exactly two thirds are shared, and they do
    not join.
    """
    met = 0
    for seed in range(4):
        query, gallery = features(seed, q=1, g=60)
        nearest = reranking._search(reranking._features(query, gallery, "cosine"), 1, k1 + 1, 512)[
            0
        ].numpy()
        full, half = (reranking._mutual(nearest, k + 1).toarray() > 0 for k in (k1, round(k1 / 2)))
        sets = reranking._expanded(nearest, k1).toarray() > 0
        for p in range(61):
            expected = full[p].copy()
            for q in np.flatnonzero(full[p]):
                shared, size = int((full[p] & half[q]).sum()), int(half[q].sum())
                # sizes are below 20: nothing lies between 2/3 and 0.67
                expected |= half[q] if shared / size > 0.67 else False
                met += 3 * shared == 2 * size
            assert (sets[p] == expected).all()
    assert met


def test_the_block_is_no_setting():
    query, gallery = features(1)
    whole = rerank(query, gallery)
    for block in (1, 5, 11, 12, 13, 61, 62, 63):
        torch.testing.assert_close(rerank(query, gallery, block=block), whole, rtol=0, atol=1e-6)
    for block in (1, 5, 12):
        torch.testing.assert_close(
            expand_queries(query, gallery, block=block), expand_queries(query, gallery), rtol=0,
            atol=1e-6,
        )


def test_no_square_matrix(monkeypatch):
    shapes, product = [], torch.addmm

    def spy(*args, **options):
        shapes.append(product(*args, **options).shape)
        return product(*args, **options)

    monkeypatch.setattr(torch, "addmm", spy)
    rerank(*features(q=100, g=400), block=32)
    assert max(rows for rows, _ in shapes) == 32 and sum(rows for rows, _ in shapes) == 500


def test_coordinates_do_not_matter():
    query, gallery = features(2)
    same = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    same(rerank(query, gallery[order]), rerank(query, gallery)[:, order])
    lengths = torch.rand(50, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    same(rerank(query, gallery * lengths), rerank(query, gallery))
    query, gallery = query.double(), gallery.double()
    plain = rerank(query, gallery, metric="euclidean")
    for scale, shift in ((1e-30, 0), (1e30, 0), (1, 1e6)):
        same(rerank(query * scale + shift, gallery * scale + shift, metric="euclidean"), plain)


def test_rounding_does_not_go_below_zero():
    "An image and its copy share everything, and a sum of shares may come out above one."
    below = 0
    for seed in range(10):
        _, gallery = features(seed)
        found = rerank(gallery, gallery, 9, 3, lam=0.0)
        assert 0 <= found.min() <= 1e-6 and found.max() <= 1
        x = reranking._features(gallery, gallery, "cosine")
        nearest, furthest, _ = reranking._search(x, 50, 10, 512)
        V = reranking._encoded(
            x, reranking._expanded(nearest.numpy(), 9), nearest.numpy(), furthest, 3
        )
        below += sum((shared > 1).any() for shared in reranking._shared(V, 50))
    assert below  # else this test sees nothing


def test_what_the_other_queries_do():
    "Re-ranking uses them; a query alone gets other distances. Expansion does not."
    query, gallery = features(5)
    alone = torch.cat([rerank(q[None], gallery, 10, 4) for q in query])
    assert (alone - rerank(query, gallery, 10, 4)).abs().max() > 0.01
    torch.testing.assert_close(
        torch.cat([expand_queries(q[None], gallery) for q in query]), expand_queries(query, gallery)
    )


def test_kinds_of_input():
    query, gallery = features(4)
    expected = rerank(query, gallery)
    for kind in (
        lambda x: x.numpy(), lambda x: x.double(), lambda x: x.numpy().tolist(),
        lambda x: x.clone().requires_grad_(),
    ):
        kept = query.clone()
        torch.testing.assert_close(rerank(kind(query), kind(gallery)), expected, rtol=0, atol=1e-6)
        found = expand_queries(kind(query), kind(gallery))
        assert found.dtype == torch.float32 and not found.requires_grad
        assert torch.equal(query, kept)


@pytest.mark.parametrize("k, alpha", [(1, 0), (4, 0.0), (4, 3), (50, 0.5)])
def test_expansion(k, alpha):
    query, gallery = features(6)
    q, g = unit(query.double().numpy()), unit(gallery.double().numpy())
    expected = []
    for row in q:
        s = g @ row
        best = np.argsort(-s)[:k]
        expected.append(
            row + sum((s[j] ** alpha * g[j] for j in best if s[j] > 0), np.zeros_like(row))
        )
    found = expand_queries(query, gallery, k, alpha)
    np.testing.assert_allclose(found, unit(np.array(expected)), atol=1e-6)
    assert (found.norm(dim=1) - 1).abs().max() < 1e-6


def test_expansion_never_vanishes():
    "The mean of a query and its opposite would have no direction; opposites do not join."
    query, gallery = torch.eye(3)[:1], torch.cat([-torch.eye(3)[:1], torch.eye(3)[1:]])
    torch.testing.assert_close(expand_queries(query, gallery, k=3, alpha=0), query)


NAN, ZERO = features()[0].clone(), features()[1].clone()
NAN[4, 1], ZERO[17] = torch.nan, 0
Q, G = features()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: rerank(Q, G, k1=0), "k1 must be a whole number from 1"),
        (lambda: rerank(Q, G, k1=2.5), "k1 must be"), (lambda: rerank(Q, G, k1=True), "k1 must be"),
        (lambda: rerank(Q, G, k1=62), "k1 = 62, but there are only 62 images.* give 61"),
        (lambda: rerank(Q, G, k2=0), "k2 must be"),
        (lambda: rerank(Q, G, k2=63), "k2 = 63, .* give 62"),
        (lambda: rerank(Q, G, lam=-0.1), "lam must be a number in 0…1"),
        (lambda: rerank(Q, G, lam=1.01), "lam must be"),
        (lambda: rerank(Q, G, lam=float("nan")), "lam must be"),
        (lambda: rerank(Q, G, lam="0.3"), "lam must be"),
        (lambda: rerank(Q, G, lam=True), "lam must be"),
        (lambda: rerank(Q, G, metric="l2"), "metric must be 'cosine' or 'euclidean', got 'l2'"),
        (lambda: rerank(Q, G, block=0), "block must be"),
        (lambda: rerank(NAN, G), r"query\[4\] holds NaN"),
        (lambda: rerank(Q, ZERO), r"gallery\[17\] is the zero vector"),
        (lambda: rerank(Q, G / 0, metric="euclidean"), r"gallery\[0\] holds NaN or infinity"),
        (lambda: rerank(Q[:, :3], G), "query has D = 3 but gallery has D = 6"),
        (lambda: rerank(Q[:0], G), "query must have shape"),
        (lambda: rerank(Q, G[:0]), "gallery must have shape"),
        (lambda: rerank(Q[0], G), "query must have shape"),
        (lambda: rerank(Q + 0j, G), "query must hold real numbers"),
        (lambda: rerank(torch.ones(3, 4), torch.ones(30, 4)), "all features are the same"),
        (
            lambda: rerank(torch.full((3, 4), 0.1), torch.full((30, 4), 0.3)),
            "all features are the same",
        ),
        (lambda: expand_queries(Q, G, k=0), "k must be"),
        (lambda: expand_queries(Q, G, k=51), "k = 51, but the gallery has 50 images"),
        (lambda: expand_queries(Q, G, alpha=-1), "alpha must be"),
        (lambda: expand_queries(Q, G, alpha=float("inf")), "alpha must be"),
        (lambda: expand_queries(Q, G, block=0), "block must be"),
        (lambda: expand_queries(NAN, G), r"query\[4\] holds NaN"),
        (lambda: expand_queries(Q, ZERO), r"gallery\[17\] is the zero vector"),
        (lambda: expand_queries(Q, G[:, :2]), "gallery has D = 2"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_zero_rows_are_points_like_others_for_the_euclidean_distance():
    assert rerank(Q, ZERO, metric="euclidean").isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    query, gallery = features(q=40, g=300)
    for found, expected in (
        (rerank(query.cuda(), gallery.cuda()), rerank(query, gallery)),
        (expand_queries(query.cuda(), gallery.cuda()), expand_queries(query, gallery)),
    ):
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-6)
