"""SIFT on a grid pixel by pixel, Fisher vectors by loops and automatic differentiation, PCA by its
definition.
"""

import math
import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from reid_repro.learning.fisher import FisherEncoder, dense_sift


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pixels(number, height=40, width=36, seed=0):
    return torch.randint(
        0, 256, (number, 3, height, width), generator=torch.Generator().manual_seed(seed),
        dtype=torch.uint8,
    )


def sift(image, top, left, size):
    """One descriptor of a smoothed grey image (H, W), pixel by pixel, also of those half a cell
    outside of the patch.
    """
    cell, cells = size / 4, np.zeros((4, 4, 8))
    for i in range(1, len(image) - 1):
        for j in range(1, image.shape[1] - 1):
            # in cells, centres at 0, 1, 2, 3
            y, x = (i - top - size // 2) / cell + 1.5, (j - left - size // 2) / cell + 1.5
            if -1 < y < 4 and -1 < x < 4:
                dx, dy = image[i, j + 1] - image[i, j - 1], image[i - 1, j] - image[i + 1, j]
                strength = math.hypot(dx, dy) * math.exp(-((y - 1.5) ** 2 + (x - 1.5) ** 2) / 8)
                turn = (math.atan2(dy, dx) / (2 * math.pi) % 1) * 8
                low = int(turn) % 8
                for r, c in (
                    (r, c) for r in range(4) for c in range(4) if abs(y - r) < 1 and abs(x - c) < 1
                ):
                    cells[r, c, low] += (
                        strength * (1 - abs(y - r)) * (1 - abs(x - c)) * (1 - turn % 1)
                    )
                    cells[r, c, (low + 1) % 8] += (
                        strength * (1 - abs(y - r)) * (1 - abs(x - c)) * (turn % 1)
                    )
    v = cells.ravel()
    v = np.minimum(v / np.linalg.norm(v), 0.2)
    return v / np.linalg.norm(v)


@pytest.mark.parametrize("size,step", [(8, 4), (16, 8), (16, 20), (12, 5), (32, 3)])
def test_dense_sift(size, step):
    images = pixels(2)
    found = dense_sift(images, size, step)
    tops, lefts = range(0, 40 - size + 1, step), range(0, 36 - size + 1, step)
    assert found.shape == (2, len(tops) * len(lefts), 128) and found.dtype == torch.float32
    grey = np.einsum("nchw,c->nhw", images.numpy().astype(float), [0.299, 0.587, 0.114]).round()
    smooth = [gaussian_filter(one, math.sqrt(1.6**2 - 0.5**2), mode="mirror") for one in grey]
    for n, k in ((0, 0), (1, found.shape[1] - 1), (0, found.shape[1] // 2)):
        row, column = divmod(k, len(lefts))
        np.testing.assert_allclose(
            found[n, k], sift(smooth[n], tops[row], lefts[column], size), atol=3 / 512
        )


def test_dense_sift_turns_with_the_picture():
    images = pixels(1, 33, 33)  # its middle is a pixel
    one = dense_sift(images)[0, 0].view(4, 4, 8)
    mirrored = dense_sift(images.flip(3))[0, 0].view(4, 4, 8)
    torch.testing.assert_close(
        mirrored.flip(1)[..., [4, 3, 2, 1, 0, 7, 6, 5]], one, atol=2 / 512, rtol=0
    )
    upside = dense_sift(images.flip(2))[0, 0].view(4, 4, 8)
    torch.testing.assert_close(
        upside.flip(0)[..., [0, 7, 6, 5, 4, 3, 2, 1]], one, atol=2 / 512, rtol=0
    )
    assert one.norm().item() == pytest.approx(1, abs=1e-5)
    brighter = (images // 2 + 100).to(torch.uint8)
    assert (
        torch.nn.functional.cosine_similarity(
            dense_sift(brighter)[0, 0], dense_sift(images)[0, 0], dim=0
        )
        > 0.99
    )
    assert dense_sift(torch.full((2, 3, 32, 48), 7, dtype=torch.uint8)).eq(0).all()


@pytest.mark.parametrize("size,step,height", [(2, 1, 40), (8, 0, 40), (64, 8, 40)])
def test_dense_sift_refuses(size, step, height):
    with pytest.raises(ValueError, match=f"size {size} must be 4 or more"):
        dense_sift(pixels(1, height), size, step)


def given(x):
    "Describes images by rows of x (n, T, D): the n-th image is the one whose first pixel is n."
    return lambda images: x[images[:, 0, 0, 0].long()]


def numbered(number):
    return torch.arange(number, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 2, 2)


def log_likelihood(x, weights, means, deviations):
    z = (x[:, None] - means) / deviations
    return (
        (weights.log() - (z.square() / 2 + deviations.log() + math.log(2 * math.pi) / 2).sum(2))
        .logsumexp(1)
        .mean()
    )


def by_gradient(x, mixture):
    """The improved Fisher vector of descriptors (T, D), by automatic differentiation: μ's part and
    σ's.
    """
    weights = torch.from_numpy(mixture.weights_)
    means = torch.from_numpy(mixture.means_).requires_grad_()
    deviations = torch.from_numpy(mixture.covariances_).sqrt().requires_grad_()
    gradients = torch.autograd.grad(
        log_likelihood(x, weights, means, deviations), (means, deviations)
    )
    scale = deviations.detach() / weights.sqrt()[:, None]
    plain = torch.cat(
        [(gradients[0] * scale).flatten(), (gradients[1] * scale / math.sqrt(2)).flatten()]
    )
    return torch.nn.functional.normalize(plain.sign() * plain.abs().sqrt(), dim=0)


def test_codes_are_the_scaled_gradient():
    x = random(6, 9, 4, seed=5) * torch.tensor([1.0, 2, 0.5, 3])
    encoder = FisherEncoder(given(x), 3).fit(numbered(6))
    code = encoder(numbered(6))
    assert code.shape == (6, 24) and code.dtype == torch.float32
    for n in range(6):
        expected = by_gradient(x[n], encoder.mixture)
        torch.testing.assert_close(code[n, :12].double(), expected[:12], atol=1e-6, rtol=1e-4)
        # scikit-image's sign
        torch.testing.assert_close(-code[n, 12:].double(), expected[12:], atol=1e-6, rtol=1e-4)
    # neither order nor number of descriptors counts
    encoder.describe = given(x[:, torch.randperm(9)].repeat(1, 2, 1))
    torch.testing.assert_close(encoder(numbered(6)), code, atol=1e-5, rtol=1e-4)


def test_one_component_by_hand():
    """Of one Gaussian: z = (x − μ)/σ is ±1 and its mean 1/2 for an image of three right, one left;
    σ's part vanishes.
    """
    x = torch.tensor([[1.0, 1, 1, -1], [-1, -1, -1, 1]]).double()[..., None]
    code = FisherEncoder(given(x), 1).fit(numbered(2))(numbered(2))
    torch.testing.assert_close(code[:, 0], torch.tensor([1.0, -1]), atol=1e-3, rtol=0)
    assert code[:, 1].abs().max() < 0.02  # the floor under the variance


def test_the_mixture_is_what_is_there():
    weights, means, deviations = (
        torch.tensor(t).double()
        for t in ([0.3, 0.7], [[-4.0, 0], [3, 2]], [[1.0, 0.4], [0.7, 1.4]])
    )
    which = (torch.rand(4000, generator=torch.Generator().manual_seed(0)) < 0.7).long()
    x = means[which] + deviations[which] * random(4000, 2)
    mixture = FisherEncoder(given(x.view(40, 100, 2)), 2).fit(numbered(40)).mixture
    order = mixture.means_[:, 0].argsort()
    np.testing.assert_allclose(mixture.weights_[order], weights, atol=0.03)
    np.testing.assert_allclose(mixture.means_[order], means, atol=0.1)
    np.testing.assert_allclose(np.sqrt(mixture.covariances_[order]), deviations, atol=0.1)
    assert mixture.converged_


def test_a_number_that_never_changes_keeps_some_variance():
    x = random(6, 10, 3)
    x[..., 1] = 4.0
    encoder = FisherEncoder(given(x), 2).fit(numbered(6))
    np.testing.assert_allclose(
        encoder.mixture.covariances_[:, 1], 1e-4 * x.var((0, 1), correction=0).mean(), rtol=1e-3
    )
    assert encoder(numbered(6)).isfinite().all()
    # a descriptor's unit does not count
    tiny = FisherEncoder(given(x * 1e-4), 2).fit(numbered(6))(numbered(6))
    torch.testing.assert_close(tiny, encoder(numbered(6)), atol=2e-3, rtol=1e-2)


def test_encoder_of_photographs():
    images = pixels(12)
    describe = lambda part: dense_sift(part, 16, 8)
    encoder = FisherEncoder(describe, components=3, pca=5)
    with pytest.raises(ValueError, match="call fit with training images first"):
        encoder(images)
    code = encoder.fit(images)(images)
    assert code.shape == (12, 2 * 3 * 5) and code.dtype == torch.float32
    torch.testing.assert_close(code.norm(dim=1), torch.ones(12))
    torch.testing.assert_close(
        FisherEncoder(describe, components=3, pca=5).fit(images)(images), code
    )
    assert not torch.allclose(
        FisherEncoder(describe, components=3, pca=5, seed=1).fit(images)(images), code, atol=1e-3
    )
    x = dense_sift(images, 16, 8).flatten(0, 1).double()
    # PCA by its definition, up to signs
    axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:5]
    projected = torch.from_numpy(encoder._project(x.numpy()))
    torch.testing.assert_close(
        projected.abs(), ((x - x.mean(0)) @ axes.T).abs(), atol=1e-4, rtol=1e-3
    )
    parts = torch.cat([encoder(images[:5]), encoder(images[5:])])
    torch.testing.assert_close(parts, code)
    fewer = FisherEncoder(describe, components=3).fit(images)
    assert fewer.axes is None and fewer(images).shape == (12, 2 * 3 * 128)
    assert FisherEncoder(describe, components=2, pca=500).fit(images)(images).shape == (
        12, 2 * 2 * 128,
    )


def test_the_sample(monkeypatch):
    "About `samples` descriptors of all images reach the mixture, the same ones for a seed."
    import skimage.feature

    seen, fit = [], skimage.feature.learn_gmm
    monkeypatch.setattr(
        skimage.feature, "learn_gmm", lambda x, **options: (seen.append(x), fit(x, **options))[1]
    )
    x = random(200, 50, 2)
    for seed in (0, 0, 1):
        FisherEncoder(given(x), 2, samples=1000, seed=seed).fit(numbered(200))
    assert 900 < len(seen[0]) < 1100
    np.testing.assert_array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[0][:50], seen[2][:50])
    rows = {tuple(row): n for n, row in enumerate(x.flatten(0, 1).tolist())}
    images = {rows[tuple(row)] // 50 for row in seen[0].tolist()}
    assert len(images) > 190  # of all images, not of the first
    FisherEncoder(given(x), 2, samples=10**6).fit(numbered(200))
    assert len(seen[-1]) == 10_000


@pytest.mark.parametrize("shape", [(3, 4), (3, 0, 4)])
def test_encoder_refuses_descriptors(shape):
    with pytest.raises(ValueError, match=r"must give .n, T, D. with T at least 1"):
        FisherEncoder(lambda part: torch.zeros(*shape), 2).fit(numbered(3))


@pytest.mark.parametrize("components", [0, 9])
def test_encoder_refuses_components(components):
    x = random(1, 5, 2)
    with pytest.raises(
        ValueError,
        match=f"components {components} must be at least 1 and at most the 5 descriptors",
    ):
        FisherEncoder(given(x), components).fit(numbered(1))


@pytest.mark.parametrize("gone", ["cv2", "skimage.feature", "sklearn.decomposition"])
def test_a_missing_library_is_named(gone, monkeypatch):
    x = random(4, 5, 2)
    encoder = FisherEncoder(given(x), 2).fit(numbered(4))
    monkeypatch.setitem(sys.modules, gone, None)
    calls = {"cv2": [lambda: dense_sift(pixels(1))]}
    calls["skimage.feature"] = [lambda: encoder(numbered(4)), lambda: encoder.fit(numbered(4))]
    calls["sklearn.decomposition"] = [lambda: encoder.fit(numbered(4))]
    for call in calls[gone]:
        with pytest.raises(ImportError, match=rf"{gone}.*pip install 'reid_repro\[notebooks\]'"):
            call()
