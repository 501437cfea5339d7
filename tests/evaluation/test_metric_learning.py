"""Metric learning: covariances against loops over pairs, metrics against inverses and SciPy,
invariances, and what wrong input says.
"""

import numpy as np
import pytest
import scipy.linalg
import torch

from reid_repro.evaluation.metric_learning import (
    Metric, image_covariances, kissme, pair_covariances, xqda,
)

def data(seed=0, people=6, dim=4, shots=5):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    pids = torch.randint(0, people, (people * shots,), generator=generator)
    other = torch.randint(0, people + 2, (people * shots + 3,), generator=generator)
    centre = 3 * draw(people + 2, dim)
    return centre[pids] + draw(len(pids), dim), pids, centre[other] + draw(len(other), dim), other


def pairs(a, a_pids, b, b_pids):
    e = torch.stack([x - y for x in a for y in b])
    return e, torch.tensor([bool(i == j) for i in a_pids for j in b_pids])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_covariances_of_images_are_those_of_all_their_pairs(seed):
    images = data(seed)
    for fast, slow in zip(image_covariances(*images), pair_covariances(*pairs(*images))):
        torch.testing.assert_close(fast, slow)
    for one, other in zip(image_covariances(*images), image_covariances(*images[2:], *images[:2])):
        torch.testing.assert_close(one, other)  # the order of the two sides does not matter


def test_kissme_is_the_difference_of_inverses():
    covariances = image_covariances(*data())
    metric = kissme(covariances, ridge=0, clip=False)
    M = metric.directions @ metric.weights.diag() @ metric.directions.T
    torch.testing.assert_close(M, covariances[0].inverse() - covariances[1].inverse())


def test_directions_are_scipys():
    intra, extra = image_covariances(*data())
    ratios, w = scipy.linalg.eigh(extra.numpy(), intra.numpy())
    metric = kissme((intra, extra), ridge=0)
    np.testing.assert_allclose(metric.ratios, ratios[::-1])
    np.testing.assert_allclose(metric.directions.abs(), np.abs(w[:, ::-1]), rtol=1e-6)


def test_xqda_is_kissme_where_people_differ():
    covariances = image_covariances(*data())
    e, _ = pairs(*data(3))
    clipped, kept = kissme(covariances), xqda(covariances)
    assert (kept.ratios > 1).all() and (kept.weights > 0).all()
    torch.testing.assert_close(clipped.of_pairs(e), kept.of_pairs(e))
    first = xqda(covariances, dimensions=1)
    assert first.directions.shape == (4, 1) and torch.equal(first.ratios, kept.ratios[:1])


@pytest.mark.parametrize("make", [xqda, kissme, lambda c: kissme(c, clip=False)])
def test_distances_are_those_of_pairs_and_bear_any_coordinates(make):
    a, a_pids, b, b_pids = data()
    e, _ = pairs(a, a_pids, b, b_pids)
    metric = make(image_covariances(a, a_pids, b, b_pids))
    torch.testing.assert_close(
        metric.distances(a, b).flatten(), metric.of_pairs(e).float(), rtol=1e-4, atol=1e-4
    )
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    mixed = [a @ mix, a_pids, b @ mix, b_pids]
    plain = lambda images: Metric.distances(
        xqda(image_covariances(*images), ridge=0), images[0], images[2]
    )
    # any invertible change of coordinates
    torch.testing.assert_close(plain(mixed), plain([a, a_pids, b, b_pids]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "change,words",
    [
        (dict(a=torch.full((30, 4), torch.nan)), "a holds NaN or infinity in row 0"),
        (dict(a=torch.ones(30, 5)), "must be"), (dict(a_pids=torch.arange(3)), "must be"),
        (dict(a=torch.ones(30, 4, dtype=torch.int64)), "a must be"),
        (dict(b_pids=torch.full((33,), 99)), "0 of 990 pairs"),
        (dict(a_pids=torch.arange(30) - 1), "a_pids holds -1: -1 means junk"),
        (dict(b_pids=torch.arange(33) - 2), "b_pids holds -2"),
        (dict(a_pids=torch.zeros(30), b_pids=torch.zeros(33)), "990 of 990 pairs"),
    ],
)
def test_wrong_images_are_named(change, words):
    images = dict(zip(("a", "a_pids", "b", "b_pids"), data())) | change
    with pytest.raises(ValueError, match=words):
        image_covariances(**images)


def test_wrong_settings_are_named():
    covariances = image_covariances(*data())
    flat = (torch.diag(torch.tensor([1.0, 1, 1, 0], dtype=torch.float64)), covariances[1])
    for call, words in (
        (lambda: kissme(flat, ridge=0), "ridge is 0"),
        (lambda: xqda(covariances, ridge=-1), "ridge is -1"),
        (lambda: xqda(covariances, dimensions=0), "dimensions is 0"),
        (lambda: xqda((covariances[1], covariances[0] / 100)), "no direction"),
        (lambda: kissme(covariances).of_pairs(torch.ones(3)), "e must be"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
