"""PCB: strips against loops and torch, classifiers against linear layers, where gradients go, and
what the embedding is.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reid_repro.lab import methods
from reid_repro.ide import IDE
from reid_repro.learning.losses import id_loss
from reid_repro.pcb import (
    PCB, PartClassifiers, PartReductions, SharedReduction, _correlation, pcb_objective, pulse,
    strip_pool, strip_windows,
)

SIZES = [(24, 6), (8, 6), (8, 3), (8, 1), (8, 8), (9, 6), (13, 5), (7, 4), (1, 1)]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def awake(model, seed=1):
    "Classifier weights and biases large enough that every strip says something of its own."
    with torch.no_grad():
        model.classifier.weight.copy_(random(*model.classifier.weight.shape, seed=seed))
        model.classifier.bias.copy_(random(*model.classifier.bias.shape, seed=seed + 1))
    return model


def test_classifiers_start_small_and_without_a_bias():
    layer = PartClassifiers(2, 100, 500)
    assert layer.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert not layer.bias.any()


def test_windows_by_hand():
    assert strip_windows(24, 6) == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20), (20, 24)]
    assert strip_windows(8, 6) == [
        (0, 2), (1, 3), (2, 4), (4, 6), (5, 7), (6, 8),
    ], "rows 1, 2, 5, 6 belong to two strips"
    assert strip_windows(8, 3) == [(0, 3), (2, 6), (5, 8)]


@pytest.mark.parametrize("height,parts", SIZES)
def test_windows_cover_every_row(height, parts):
    windows = strip_windows(height, parts)
    assert len(windows) == parts and windows[0][0] == 0 and windows[-1][1] == height
    assert set().union(*(range(a, b) for a, b in windows)) == set(range(height))
    for (a, b), (c, d) in pairwise(windows):
        assert (
            a < c and b < d and 0 <= b - c <= (height % parts > 0)
        ), "neighbours meet, and share one row at most"


@pytest.mark.parametrize("height,parts", SIZES)
def test_strip_pool_is_the_loop_and_torch(height, parts):
    maps = random(3, 5, height, 4, dtype=torch.float64)
    loop = torch.zeros(3, parts, 5, dtype=torch.float64)
    for p in range(parts):
        first, last = math.floor(p * height / parts), math.ceil((p + 1) * height / parts)
        for i in range(first, last):
            for j in range(4):
                loop[:, p] += maps[:, :, i, j] / ((last - first) * 4)
    torch.testing.assert_close(strip_pool(maps, parts), loop)
    torch.testing.assert_close(
        strip_pool(maps, parts), F.adaptive_avg_pool2d(maps, (parts, 1))[..., 0].transpose(1, 2)
    )
    torch.testing.assert_close(strip_pool(maps.to(memory_format=torch.channels_last), parts), loop)


@pytest.mark.parametrize("height,parts", SIZES)
def test_a_strip_feels_its_own_rows_only_and_all_alike(height, parts):
    maps = random(2, 3, height, 4).requires_grad_()
    g = strip_pool(maps, parts)
    for p, (a, b) in enumerate(strip_windows(height, parts)):
        (gradient,) = torch.autograd.grad(g[:, p].sum(), maps, retain_graph=True)
        expected = torch.zeros_like(maps)
        expected[:, :, a:b] = 1 / ((b - a) * 4)
        torch.testing.assert_close(gradient, expected)


def test_where_is_kept():
    red_shirt = torch.zeros(1, 2, 8, 4)
    red_shirt[:, 0, :4] = red_shirt[:, 1, 4:] = 1
    upside_down = red_shirt.flip(2)
    assert torch.equal(strip_pool(red_shirt, 1), strip_pool(upside_down, 1))
    assert torch.equal(strip_pool(red_shirt, 2), strip_pool(upside_down, 2).flip(1))
    assert torch.dist(strip_pool(red_shirt, 2), strip_pool(upside_down, 2)) == 2


def test_classifiers_are_one_linear_layer_per_strip():
    torch.manual_seed(0)
    batched = PartClassifiers(6, 8, 5)
    layers = [nn.Linear(8, 5) for _ in range(6)]
    with torch.no_grad():
        batched.weight.copy_(torch.stack([layer.weight for layer in layers]))
        batched.bias.copy_(torch.stack([layer.bias for layer in layers]))
    h, weight = random(4, 6, 8), random(4, 6, 5, seed=1)
    loop = torch.stack([layer(h[:, p]) for p, layer in enumerate(layers)], dim=1)
    torch.testing.assert_close(batched(h), loop)
    (batched(h) * weight).sum().backward()
    (loop * weight).sum().backward()
    torch.testing.assert_close(
        batched.weight.grad, torch.stack([layer.weight.grad for layer in layers])
    )
    torch.testing.assert_close(
        batched.bias.grad, torch.stack([layer.bias.grad for layer in layers])
    )


def test_reductions_are_one_linear_layer_and_norm_per_strip():
    torch.manual_seed(0)
    batched = PartReductions(6, 8, 5).train()
    nn.init.uniform_(batched.norm.weight), nn.init.normal_(batched.norm.bias)
    layers = [
        nn.Sequential(nn.Linear(8, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU()) for _ in range(6)
    ]
    strips, weight = random(7, 6, 8) + 3, random(7, 6, 5, seed=1)
    with torch.no_grad():
        for p, (linear, norm, _) in enumerate(layers):
            linear.weight.copy_(batched.weight[p])
            norm.weight.copy_(batched.norm.weight[5 * p : 5 * p + 5]), norm.bias.copy_(
                batched.norm.bias[5 * p : 5 * p + 5]
            )
    for training in (True, True, False):  # the statistics recorded in training are used afterwards
        batched.train(training)
        loop = torch.stack(
            [layer.train(training)(strips[:, p]) for p, layer in enumerate(layers)], dim=1
        )
        torch.testing.assert_close(batched(strips), loop)
        batched.zero_grad(), [layer.zero_grad() for layer in layers]
        (batched(strips) * weight).sum().backward()
        torch.stack([layer(strips[:, p]) for p, layer in enumerate(layers)], dim=1).mul(
            weight
        ).sum().backward()
        torch.testing.assert_close(
            batched.weight.grad, torch.stack([layer[0].weight.grad for layer in layers])
        )
    assert batched.weight.std().item() == pytest.approx((2 / 5) ** 0.5, rel=0.15)


@pytest.mark.parametrize(
    "call",
    [
        lambda: PartReductions(0, 4, 2), lambda: PartReductions(2, 0, 2),
        lambda: PartReductions(2, 4, 0),
    ],
)
def test_reductions_refuse(call):
    with pytest.raises(ValueError, match="0"):
        call()


@pytest.mark.parametrize("shared", [False, True])
def test_training_mode_is_the_chain_written_out(shared):
    model = awake(PCB(5, backbone="tiny", shared=shared, dropout=0.0)).train()
    images = random(4, 3, 128, 64)
    kept = []
    model.backbone.register_forward_hook(lambda *call: kept.append(call[2]))
    features, scores = model(images)
    assert features.shape == (4, 6, 64) and scores.shape == (4, 6, 5)
    g = F.adaptive_avg_pool2d(kept[0], (6, 1))[..., 0].transpose(1, 2)
    if shared:
        assert isinstance(model.reduce, SharedReduction)
        z = g @ model.reduce[0].weight[:, :, 0].T  # the same map for every strip
        # over images and strips
        mean, variance = z.mean(dim=(0, 1)), z.var(dim=(0, 1), unbiased=False)
    else:
        # a map of its own
        z = torch.stack([g[:, p] @ model.reduce.weight[p].T for p in range(6)], dim=1)
        mean, variance = z.mean(dim=0), z.var(dim=0, unbiased=False)  # over images, for each strip
    h = ((z - mean) / (variance + 1e-5).sqrt()).clamp(min=0)
    torch.testing.assert_close(features, h, atol=1e-4, rtol=1e-4)
    for p in range(6):
        expected = F.linear(h[:, p], model.classifier.weight[p], model.classifier.bias[p])
        torch.testing.assert_close(scores[:, p], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("shared", [False, True])
def test_the_loss_of_a_strip_reaches_its_own_rows_of_the_map(shared):
    model = awake(PCB(5, backbone="tiny", shared=shared))
    maps = random(4, 128, 8, 4).requires_grad_()
    # with the batch's statistics strips with one reduction would feel one another
    model.reduce.train(not shared)
    scores = model.classifier(model.reduce(strip_pool(maps, 6)))
    for p, (a, b) in enumerate(strip_windows(8, 6)):
        (gradient,) = torch.autograd.grad(
            id_loss(scores[:, p], torch.arange(4)), maps, retain_graph=True
        )
        assert (gradient[:, :, a:b] != 0).any(dim=1).any(dim=2).all()
        assert (gradient[:, :, :a] == 0).all() and (gradient[:, :, b:] == 0).all()


@pytest.mark.parametrize("feature,width", [("h", 64), ("g", 128), ("raw", 128)])
def test_embedding_is_the_strips_from_the_top(feature, width):
    model, images = PCB(5, backbone="tiny", feature=feature).eval(), random(2, 3, 128, 64)
    with torch.no_grad():
        embedding, maps = model(images), model.backbone(images)
        assert embedding.shape == (2, 6 * width)
        for p, (a, b) in enumerate(strip_windows(8, 6)):
            strip = maps[:, :, a:b].mean(dim=(2, 3))
            if feature == "h":  # fresh norms change nothing
                strip = (strip @ model.reduce.weight[p].T / (1 + 1e-5) ** 0.5).clamp(min=0)
            if feature != "raw":
                strip = strip / strip.norm(dim=1, keepdim=True)
            torch.testing.assert_close(embedding[:, width * p : width * (p + 1)], strip)


def test_dropout_hides_strips_before_the_reductions_and_only_in_training():
    model = PCB(5, backbone="tiny", dropout=0.5)
    g, seen = torch.ones(64, 6, 128), []
    model.reduce.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    model.train().reduced(g)
    assert set(seen[0].unique().tolist()) == {0.0, 2.0} and seen[0].mean().item() == pytest.approx(
        1, abs=0.02
    )
    model.eval().reduced(g)
    assert torch.equal(seen[1], g)


def test_entries_of_before_keep_their_meaning():
    """One reduction, no dropout, strips before it as they are: what `ledger.LATER` says of weights
    without these parameters.
    """
    model = methods.build(
        "pcb", {"backbone": "tiny", "last_stride": 1, "parts": 6, "weights": ""}, 5
    ).eval()
    assert set(model.state_dict()) >= {
        "reduce.0.weight", "reduce.1.weight", "reduce.1.running_mean", "classifier.weight",
    }
    images = random(2, 3, 128, 64)
    with torch.no_grad():
        assert torch.equal(model(images), strip_pool(model.backbone(images), 6).flatten(1))
    assert model.dropout.p == 0


class Pass(nn.Module):
    "A backbone whose map is the picture's first two channels."

    channels = (2,)

    def forward(self, images):
        return images[:, :2]


def asked(feature="raw", parts=2, people=6):
    """A network that sees pictures as they are, and a block of them: one bright half or the other,
    in red or green.
    """
    model = PCB(5, backbone="tiny", parts=parts, reduced=1, feature=feature)
    model.backbone = Pass()
    images = torch.full((people, 3, 4, 2), 124, dtype=torch.uint8)
    pids, camids = np.arange(1, people + 1), np.zeros(people, dtype=np.int64)
    ids = pids, camids, pids, camids + 1
    return model, images, ids


def test_pulse_of_strips_that_are_alike_says_that_they_do_nothing():
    model, images, ids = asked()
    images = (
        images
        + torch.arange(6, dtype=torch.uint8)[:, None, None, None]
        * torch.tensor([9, 20, 0], dtype=torch.uint8)[:, None, None]
    )
    beats = pulse(model, images, images, *ids, device="cpu")
    assert beats == pytest.approx(
        {"strip_deviation": 0, "mean_strip_correlation": 1, "mean_strip_loss": 0}, abs=1e-5
    )
    one = pulse(asked(parts=1)[0], images.flip(2), images, *ids, device="cpu")
    assert one == pytest.approx(
        {"strip_deviation": 0, "mean_strip_correlation": 1, "mean_strip_loss": 0}, abs=1e-5
    )


def test_pulse_of_strips_that_say_it_all():
    """Who is who stands in the order of the strips alone, (a, −a) and (−a, a): the mean knows
    nobody.
    """
    model, images, ids = asked(people=2)
    # red is far above and below the mean
    images[0, 0, :2], images[0, 0, 2:], images[1, 0, :2], images[1, 0, 2:] = 224, 24, 24, 224
    images[:, 1] = 116  # green at its mean
    beats = pulse(model, images, images, *ids, device="cpu")
    assert beats["strip_deviation"] == pytest.approx(1, abs=0.01)
    # ties count against: the right one comes second of two
    assert beats["mean_strip_loss"] == pytest.approx(50)
    assert beats["mean_strip_correlation"] == 0, "the means' distances are all the same"


def test_correlation_by_hand():
    same = np.array([[1.0, 2], [3, 4]])
    assert _correlation(same, 3 - 2 * same) == pytest.approx(-1) and _correlation(
        same, same + 1
    ) == pytest.approx(1)
    flat = np.ones((2, 2))
    assert (
        _correlation(flat, flat) == 1
        and _correlation(flat, 2 * flat) == 0
        and _correlation(flat, same) == 0
    )


def test_pulse_leaves_the_network_as_it_was():
    model = PCB(5, backbone="tiny").train()
    images = torch.randint(0, 256, (6, 3, 128, 64), dtype=torch.uint8)
    model.reduce.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    beats = pulse(
        model, images[:3], images,
        *asked(people=3)[2][:2],
        np.arange(6) % 3 + 1, np.ones(6, dtype=np.int64),
        device="cpu"
    )
    assert all(math.isfinite(value) for value in beats.values()) and 0 < beats[
        "strip_deviation"
    ] < math.sqrt(5 / 6)
    assert model.training and model.backbone.training and not model.reduce.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_one_part_embeds_like_ide():
    one, ide = (
        PCB(5, backbone="tiny", parts=1, feature="raw").eval(), IDE(5, backbone="tiny").eval(),
    )
    ide.backbone.load_state_dict(one.backbone.state_dict())
    images = random(3, 3, 128, 64)
    with torch.no_grad():
        torch.testing.assert_close(one(images), ide(images))


@pytest.mark.parametrize(
    "backbone,reduced,width",
    [("tiny", 256, 64), ("tiny", 16, 16), ("resnet18", 256, 256), ("resnet50", 256, 256)],
)
def test_the_reduction_reduces(backbone, reduced, width):
    model = PCB(5, backbone=backbone, reduced=reduced)
    assert (
        model.reduce.weight.shape[1]
        == width
        == model.classifier.weight.shape[2]
        < model.backbone.channels[-1]
    )


@pytest.mark.parametrize("parts", [1, 6])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_objective_sums_over_strips_and_averages_over_images(parts, smoothing):
    model = awake(PCB(5, backbone="tiny", parts=parts, dropout=0.0)).train()
    images = random(10, 3, 128, 64)
    labels, batch = torch.tensor([0, 1, 2, 3, 4, 4, 3, 2, 1, 0]), torch.tensor([7, 2, 9, 0])
    terms = pcb_objective(labels, smoothing=smoothing)(model, batch, lambda rows: images[rows])
    _, scores = model(images[batch])
    expected = sum(
        F.cross_entropy(scores[:, p], labels[batch], label_smoothing=smoothing)
        for p in range(parts)
    )
    assert list(terms) == ["id"]
    torch.testing.assert_close(terms["id"], expected, atol=1e-4, rtol=1e-4)


def test_untrained_classifiers_guess():
    model = PCB(50, backbone="tiny").train()
    loss = pcb_objective(torch.arange(8))(
        model, torch.arange(8), lambda rows: random(8, 3, 128, 64)[rows]
    )["id"]
    assert loss.item() == pytest.approx(6 * math.log(50), rel=0.01)


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: strip_windows(8, 9), "parts is 9.*height is 8 rows"),
        (lambda: strip_windows(8, 0), "parts is 0.*height is 8 rows"),
        (lambda: strip_pool(torch.zeros(1, 2, 4, 3), 5), "parts is 5.*height is 4 rows"),
        (
            lambda: PCB(5, backbone="tiny", parts=9).eval()(torch.zeros(1, 3, 128, 64)),
            "parts is 9.*height is 8 rows",
        ),
        (
            lambda: PCB(5, backbone="tiny", parts=6, last_stride=2)(torch.zeros(2, 3, 128, 64)),
            "parts is 6.*height is 4 rows",
        ),
        (lambda: PCB(5, backbone="tiny", parts=0), "parts is 0; it must be at least 1"),
        (lambda: PCB(5, backbone="tiny", reduced=0), "reduced is 0"),
        (lambda: PCB(1, backbone="tiny"), "num_classes is 1"),
        (lambda: PCB(5, backbone="vgg"), "backbone 'vgg' is unknown"),
        (lambda: PCB(5, backbone="tiny", feature="f"), "feature 'f' is unknown; take h, g, raw"),
        (lambda: PCB(5, backbone="tiny", dropout=1.0), "dropout is 1.0"),
    ],
)
def test_errors_name_the_culprit(call, words):
    with pytest.raises(ValueError, match=words):
        call()
