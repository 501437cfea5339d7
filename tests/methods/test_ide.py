"""The network and its objective layer by layer and pair by pair; the floors (colour histograms,
pixels and chance) by hand and within a bounded memory.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from reid_repro.ide import IDE, colour_histograms, ide_objective, random_features, raw_pixels

IMAGES = torch.randint(
    0, 256, (150, 3, 24, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def normed(f, neck, training):
    "f̂: batch norm as its formula, with the batch's own moments or the running ones."
    if isinstance(neck, nn.Identity):
        return f
    mean, var = neck.running_mean, neck.running_var
    if training:
        mean, var = f.mean(0), f.var(0, unbiased=False)
    return (f - mean) / (var + neck.eps).sqrt() * neck.weight + neck.bias


@pytest.mark.parametrize("neck", ["none", "bn", "after"])
def test_the_network_written_out(neck):
    model = IDE(5, backbone="tiny", neck=neck)
    with torch.no_grad():
        for number, values in enumerate(model.classifier.parameters()):
            values.copy_(random(*values.shape, seed=number))
        if neck != "none":  # a norm that has seen something
            model.neck.running_mean.normal_()
            model.neck.weight.uniform_(0.5, 2)
            if neck == "after":
                model.neck.bias.normal_()
    images = random(6, 3, 64, 32)
    model.eval()
    with torch.no_grad():
        f = model.backbone(images).flatten(2).mean(2)
        torch.testing.assert_close(model(images), normed(f, model.neck, training=False))
        model.neck.train()
        model.training = True  # the backbone's own norms stay as they are, so f is the same
        f_hat = normed(f, model.neck, training=True)
        features, scores = model(images)
    torch.testing.assert_close(features, f_hat if neck == "after" else f)
    bias = 0 if neck == "bn" else model.classifier.bias
    torch.testing.assert_close(scores, f_hat @ model.classifier.weight.T + bias)


def test_how_the_network_starts():
    for neck in ("none", "bn", "after"):
        model = IDE(500, backbone="tiny", neck=neck)
        assert model.classifier.weight.std().item() == pytest.approx(0.001, rel=0.02)
        assert (model.classifier.bias is None) == (neck == "bn")
        assert neck == "bn" or not model.classifier.bias.any()
    assert not IDE(5, backbone="tiny", neck="bn").neck.bias.requires_grad, "β stays 0"
    assert IDE(5, backbone="tiny", neck="after").neck.bias.requires_grad


@pytest.mark.parametrize("distance,spread", [("euclidean", 0.02), ("cosine", 0.1)])
def test_the_objective_pair_by_pair(distance, spread):
    """Features so near each other that all hinges are open: a margin, a weight or a factor that is
    off shows.
    """
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    features = 3 * (random(1, 8, seed=1) + spread * random(6, 8, seed=2))
    scores = random(6, 3, seed=3)
    objective = ide_objective(labels, smoothing=0.2, triplet=0.7, triplet_distance=distance)
    batch = torch.tensor([5, 4, 3, 2, 1, 0])
    terms = objective(lambda images: (features, scores), batch, lambda indices: indices)

    people = labels[batch]
    hinges = []
    for one, person in zip(features, people):
        if distance == "euclidean":
            d = torch.stack([(one - other).norm() for other in features])
        else:
            d = torch.stack([1 - F.cosine_similarity(one, other, dim=0) for other in features])
        hinges.append(0.3 + d[people == person].max() - d[people != person].min())
    assert min(hinges) > 0
    torch.testing.assert_close(terms["triplet"], 0.7 * sum(hinges) / 6)

    wanted = torch.full((6, 3), 0.2 / 3)
    wanted[range(6), people] += 0.8
    torch.testing.assert_close(terms["id"], -(wanted * scores.log_softmax(1)).sum(1).mean())


class Largest(TorchDispatchMode):
    "Inside, `bytes` is the size of the largest tensor that an operation gave."

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.bytes = max(self.bytes, out.numel() * out.element_size())
        return out


@pytest.mark.parametrize("describe", [colour_histograms, raw_pixels, random_features])
def test_a_large_gallery_is_described_in_chunks(describe):
    gallery = torch.zeros(1000, 3, 128, 64, dtype=torch.uint8)
    with Largest() as seen:
        assert len(describe(gallery)) == 1000
    assert seen.bytes < gallery.numel(), "less than one byte for each number of the photographs"
    assert describe(gallery[:0]).shape[0] == 0


def test_chunks_change_nothing():
    for describe in (colour_histograms, raw_pixels):
        one_by_one = torch.cat([describe(image[None]) for image in IMAGES])
        assert torch.equal(describe(IMAGES), one_by_one)
    seed = int(IMAGES.long().sum())
    drawn = torch.randn(150, 64, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(random_features(IMAGES), drawn)


def test_histograms_by_counting():
    found = colour_histograms(IMAGES[:2], strips=3, bins=2).view(2, 3, 8)
    for n in range(2):
        for strip in range(3):
            pixels = IMAGES[n, :, 8 * strip : 8 * strip + 8].flatten(1).T.tolist()
            colours = [4 * (r > 127) + 2 * (g > 127) + (b > 127) for r, g, b in pixels]
            share = torch.tensor([colours.count(c) / len(colours) for c in range(8)])
            torch.testing.assert_close(found[n, strip], share.sqrt())


def test_pixels_are_means_of_blocks():
    image = IMAGES[:1].repeat_interleave(4, 2).repeat_interleave(4, 3)  # 96×48
    blocks = image.float().view(1, 3, 32, 3, 16, 3).mean(dim=(3, 5))
    expected = blocks - blocks.flatten(2).mean(2)[..., None, None]
    torch.testing.assert_close(raw_pixels(image), expected.flatten(1), atol=1e-3, rtol=0)
