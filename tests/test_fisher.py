"Fisher vectors against loops and automatic differentiation, mixtures against scikit-learn, SIFT on a grid pixel by pixel."

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from reid_repro.fisher import FisherEncoder, Mixture, dense_sift, fisher_vectors, fit_mixture


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pixels(number, height=40, width=36, seed=0):
    return torch.randint(0, 256, (number, 3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def mixture(K=3, D=4, seed=0):
    weights = random(K, seed=seed).softmax(0)
    return Mixture(weights, random(K, D, seed=seed + 1), random(K, D, seed=seed + 2).square() + 0.2)


def sift(image, top, left, size):
    "One descriptor of a float grey image (H, W), from its padded neighbours on."
    wide = np.pad(image, 1, mode="edge")
    cells = np.zeros((4, 4, 8))
    for i in range(top, top + size):
        for j in range(left, left + size):
            dx, dy = (wide[i + 1, j + 2] - wide[i + 1, j]) / 2, (wide[i + 2, j + 1] - wide[i, j + 1]) / 2
            away = (i - top - (size - 1) / 2) ** 2 + (j - left - (size - 1) / 2) ** 2
            strength = math.hypot(dx, dy) * math.exp(-2 * away / size**2)
            turn = (math.atan2(dy, dx) / (2 * math.pi) % 1) * 8
            y, x = ((n + 0.5) * 4 / size - 0.5 for n in (i - top, j - left))
            for r, c in ((r, c) for r in range(4) for c in range(4) if abs(y - r) < 1 and abs(x - c) < 1):
                low = int(turn) % 8
                cells[r, c, low] += strength * (1 - abs(y - r)) * (1 - abs(x - c)) * (1 - turn % 1)
                cells[r, c, (low + 1) % 8] += strength * (1 - abs(y - r)) * (1 - abs(x - c)) * (turn % 1)
    v = cells.ravel()
    v = np.minimum(v / max(np.linalg.norm(v), 1e-6), 0.2)
    return v / max(np.linalg.norm(v), 1e-6)


@pytest.mark.parametrize("size,step", [(8, 4), (16, 8), (16, 20), (12, 5)])
def test_dense_sift(size, step):
    images = pixels(2)
    found = dense_sift(images, size, step)
    tops, lefts = range(0, 40 - size + 1, step), range(0, 36 - size + 1, step)
    assert found.shape == (2, len(tops) * len(lefts), 128)
    grey = np.einsum("nchw,c->nhw", images.numpy().astype(float), [0.299, 0.587, 0.114]) / 255
    for n, k in ((0, 0), (1, found.shape[1] - 1), (0, found.shape[1] // 2)):
        row, column = divmod(k, len(lefts))
        np.testing.assert_allclose(found[n, k], sift(grey[n], tops[row], lefts[column], size), atol=2e-4)


def test_dense_sift_turns_with_the_picture():
    images = pixels(1, 32, 32)
    one = dense_sift(images)[0, 0].view(4, 4, 8)
    mirrored = dense_sift(images.flip(3))[0, 0].view(4, 4, 8)
    torch.testing.assert_close(mirrored.flip(1)[..., [4, 3, 2, 1, 0, 7, 6, 5]], one, atol=1e-4, rtol=1e-3)
    upside = dense_sift(images.flip(2))[0, 0].view(4, 4, 8)
    torch.testing.assert_close(upside.flip(0)[..., [0, 7, 6, 5, 4, 3, 2, 1]], one, atol=1e-4, rtol=1e-3)
    assert one.norm().item() == pytest.approx(1, abs=1e-5)
    brighter = (images // 2 + 100).to(torch.uint8)
    assert torch.nn.functional.cosine_similarity(dense_sift(brighter)[0, 0], dense_sift(images)[0, 0], dim=0) > 0.99


@pytest.mark.parametrize("size,step,height", [(2, 1, 40), (8, 0, 40), (64, 8, 40)])
def test_dense_sift_refuses(size, step, height):
    with pytest.raises(ValueError, match=f"size {size} must be 4 or more"):
        dense_sift(pixels(1, height), size, step)


def test_shares_are_scikit_learns():
    m, x = mixture(), random(50, 4, seed=9)
    oracle = GaussianMixture(3, covariance_type="diag")
    oracle.weights_, oracle.means_, oracle.covariances_ = m.weights.numpy(), m.means.numpy(), m.variances.numpy()
    oracle.precisions_cholesky_ = 1 / np.sqrt(oracle.covariances_)
    shares, log = m.shares(x)
    np.testing.assert_allclose(shares, oracle.predict_proba(x.numpy()), rtol=1e-8)
    np.testing.assert_allclose(log, oracle.score_samples(x.numpy()), rtol=1e-8)
    torch.testing.assert_close(m.shares(x.view(5, 10, 4))[0].flatten(0, 1), shares)


def test_fitting_climbs_and_finds_what_is_there():
    truth = Mixture(*(torch.tensor(t).double() for t in ([0.3, 0.7], [[-4.0, 0], [3, 2]], [[1.0, 0.2], [0.5, 2]])))
    which = torch.rand(4000, generator=torch.Generator().manual_seed(0)) < 0.7
    x = truth.means[which.long()] + truth.variances[which.long()].sqrt() * random(4000, 2)
    climb = [fit_mixture(x, 2, steps).shares(x)[1].mean().item() for steps in range(6)]
    assert all(b >= a - 1e-9 for a, b in pairwise(climb))
    found = fit_mixture(x, 2, 50)
    order = found.means[:, 0].argsort()
    for name, within in (("weights", 0.03), ("means", 0.1), ("variances", 0.15)):
        torch.testing.assert_close(getattr(found, name)[order], getattr(truth, name), atol=within, rtol=0.05)
    with pytest.raises(ValueError, match="components 9 must be at least 1 and at most the 5 descriptors"):
        fit_mixture(x[:5], 9)
    constant = fit_mixture(torch.ones(20, 3), 4)
    assert all(t.isfinite().all() for t in (constant.weights, constant.means, constant.variances)) and (constant.variances > 0).all()


def test_fisher_vectors_are_the_scaled_gradient():
    m, x = mixture(), random(6, 9, 4, seed=5)
    found = fisher_vectors(x, m, improved=False)
    assert found.shape == (6, 24)
    for n in range(6):
        mean, deviation = m.means.clone().requires_grad_(), m.variances.sqrt().requires_grad_()
        log = Mixture(m.weights, mean, deviation.square()).shares(x[n])[1].mean()
        by_mean, by_deviation = torch.autograd.grad(log, (mean, deviation))
        scale = m.variances.sqrt() / m.weights.sqrt()[:, None]
        torch.testing.assert_close(found[n], torch.cat([(by_mean * scale).flatten(), (by_deviation * scale / math.sqrt(2)).flatten()]))
    improved = fisher_vectors(x, m)
    torch.testing.assert_close(improved.norm(dim=1), torch.ones(6).double())
    torch.testing.assert_close(improved.sign(), found.sign())
    torch.testing.assert_close(fisher_vectors(x[:, torch.randperm(9)], m), improved)  # no order among descriptors
    torch.testing.assert_close(fisher_vectors(x.repeat(1, 2, 1), m), improved)  # nor their number


def test_a_number_that_never_changes_keeps_some_variance():
    x = random(60, 3)
    x[:, 1] = 4.0
    m = fit_mixture(x, 2, 10)
    floor = 1e-4 * x.var(0, correction=0).mean()
    torch.testing.assert_close(m.variances[:, 1], floor.expand(2))
    assert m.shares(x)[0].isfinite().all() and fisher_vectors(x[None], m).isfinite().all()


def test_fisher_vectors_are_scikit_images():
    feature = pytest.importorskip("skimage.feature", reason="scikit-image is not installed")
    m, x = mixture(4, 5), random(3, 30, 5, seed=2)
    gmm = feature.learn_gmm(x[0].numpy(), n_modes=4, gm_args={"n_init": 1, "max_iter": 1, "covariance_type": "diag", "random_state": 0})
    gmm.weights_, gmm.means_, gmm.covariances_ = m.weights.numpy(), m.means.numpy(), m.variances.numpy()
    gmm.precisions_cholesky_ = 1 / np.sqrt(gmm.covariances_)
    for improved in (False, True):
        ours = fisher_vectors(x, m, improved)
        theirs = np.stack([feature.fisher_vector(one.numpy(), gmm, improved=improved) for one in x])[:, 4:]  # theirs begins with weights
        theirs[:, 20:] *= -1  # and gives σ's part with the other sign
        theirs = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
        np.testing.assert_allclose(ours / ours.norm(dim=1, keepdim=True), theirs, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 4), (3, 0, 4), (3, 5, 2)])
def test_fisher_vectors_refuse(shape):
    with pytest.raises(ValueError, match="as the mixture was fitted"):
        fisher_vectors(torch.zeros(*shape).double(), mixture())


def test_encoder():
    images = pixels(12)
    encoder = FisherEncoder(lambda part: dense_sift(part, 16, 8), components=3, pca=5)
    with pytest.raises(ValueError, match="call fit with training images first"):
        encoder(images)
    code = encoder.fit(images)(images)
    assert code.shape == (12, 2 * 3 * 5) and code.dtype == torch.float32
    torch.testing.assert_close(code.norm(dim=1), torch.ones(12))
    again = FisherEncoder(lambda part: dense_sift(part, 16, 8), components=3, pca=5).fit(images)(images)
    torch.testing.assert_close(again, code)
    x = dense_sift(images, 16, 8).flatten(0, 1)
    values = torch.linalg.svdvals(x - x.mean(0)).square()[:5] / len(x)
    torch.testing.assert_close((encoder._project(x)).var(0, correction=0), values, rtol=1e-3, atol=1e-6)
    fewer = FisherEncoder(lambda part: dense_sift(part, 16, 8), components=3, samples=50).fit(images)
    assert fewer.axes is None and fewer(images).shape == (12, 2 * 3 * 128)
