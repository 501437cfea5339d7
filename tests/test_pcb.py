"PCB: strips against loops and torch, classifiers against linear layers, where gradients go, and what the embedding is."

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reid_repro.ide import IDE
from reid_repro.losses import id_loss
from reid_repro.pcb import PCB, PartClassifiers, pcb_objective, strip_pool, strip_windows

SIZES = [(24, 6), (8, 6), (8, 3), (8, 1), (8, 8), (9, 6), (13, 5), (7, 4), (1, 1)]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def awake(model, seed=1):
    "Classifier weights and biases large enough that every strip says something of its own."
    with torch.no_grad():
        model.classifier.weight.copy_(random(*model.classifier.weight.shape, seed=seed))
        model.classifier.bias.copy_(random(*model.classifier.bias.shape, seed=seed + 1))
    return model


def test_windows_by_hand():
    assert strip_windows(24, 6) == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20), (20, 24)]
    assert strip_windows(8, 6) == [(0, 2), (1, 3), (2, 4), (4, 6), (5, 7), (6, 8)], "rows 1, 2, 5, 6 belong to two strips"
    assert strip_windows(8, 3) == [(0, 3), (2, 6), (5, 8)]


@pytest.mark.parametrize("height,parts", SIZES)
def test_windows_cover_every_row(height, parts):
    windows = strip_windows(height, parts)
    assert len(windows) == parts and windows[0][0] == 0 and windows[-1][1] == height
    assert set().union(*(range(a, b) for a, b in windows)) == set(range(height))
    for (a, b), (c, d) in pairwise(windows):
        assert a < c and b < d and 0 <= b - c <= (height % parts > 0), "neighbours meet, and share one row at most"


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
    torch.testing.assert_close(strip_pool(maps, parts), F.adaptive_avg_pool2d(maps, (parts, 1))[..., 0].transpose(1, 2))
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
    torch.testing.assert_close(batched.weight.grad, torch.stack([layer.weight.grad for layer in layers]))
    torch.testing.assert_close(batched.bias.grad, torch.stack([layer.bias.grad for layer in layers]))


def test_training_mode_is_the_chain_written_out():
    model, images = awake(PCB(5, "tiny")).train(), random(4, 3, 128, 64)
    kept = []
    model.backbone.register_forward_hook(lambda *call: kept.append(call[2]))
    features, scores = model(images)
    assert features.shape == (4, 6, 64) and scores.shape == (4, 6, 5)
    g = F.adaptive_avg_pool2d(kept[0], (6, 1))[..., 0].transpose(1, 2)
    z = g @ model.reduce[0].weight[:, :, 0].T  # the same map for every strip
    mean, variance = z.mean(dim=(0, 1)), z.var(dim=(0, 1), unbiased=False)  # over images and strips
    h = ((z - mean) / (variance + 1e-5).sqrt()).clamp(min=0)
    torch.testing.assert_close(features, h, atol=1e-4, rtol=1e-4)
    for p in range(6):
        expected = F.linear(h[:, p], model.classifier.weight[p], model.classifier.bias[p])
        torch.testing.assert_close(scores[:, p], expected, atol=1e-3, rtol=1e-3)


def test_the_loss_of_a_strip_reaches_its_own_rows_of_the_map():
    model = awake(PCB(5, "tiny"))
    maps = random(4, 128, 8, 4).requires_grad_()
    model.reduce.eval()  # with the batch's statistics strips would feel one another
    g = strip_pool(maps, 6)
    scores = model.classifier(model.reduce(g.transpose(1, 2)).transpose(1, 2))
    for p, (a, b) in enumerate(strip_windows(8, 6)):
        (gradient,) = torch.autograd.grad(id_loss(scores[:, p], torch.arange(4)), maps, retain_graph=True)
        assert (gradient[:, :, a:b] != 0).any(dim=(1, 3)).all()
        assert (gradient[:, :, :a] == 0).all() and (gradient[:, :, b:] == 0).all()


def test_embedding_is_the_strips_before_the_reduction_from_the_top():
    model, images = PCB(5, "tiny").eval(), random(2, 3, 128, 64)
    with torch.no_grad():
        embedding, maps = model(images), model.backbone(images)
    assert embedding.shape == (2, 6 * 128)
    for p, (a, b) in enumerate(strip_windows(8, 6)):
        torch.testing.assert_close(embedding[:, 128 * p : 128 * (p + 1)], maps[:, :, a:b].mean(dim=(2, 3)))


def test_one_part_embeds_like_ide():
    one, ide = PCB(5, "tiny", parts=1).eval(), IDE(5, "tiny").eval()
    ide.backbone.load_state_dict(one.backbone.state_dict())
    images = random(3, 3, 128, 64)
    with torch.no_grad():
        torch.testing.assert_close(one(images), ide(images))


@pytest.mark.parametrize("backbone,reduced,width", [("tiny", 256, 64), ("tiny", 16, 16), ("resnet18", 256, 256), ("resnet50", 256, 256)])
def test_the_reduction_reduces(backbone, reduced, width):
    model = PCB(5, backbone, reduced=reduced)
    assert model.reduce[0].out_channels == width == model.classifier.weight.shape[2] < model.backbone.channels[-1]


@pytest.mark.parametrize("parts", [1, 6])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_objective_sums_over_strips_and_averages_over_images(parts, smoothing):
    model, images = awake(PCB(5, "tiny", parts=parts)).train(), random(10, 3, 128, 64)
    labels, batch = torch.tensor([0, 1, 2, 3, 4, 4, 3, 2, 1, 0]), torch.tensor([7, 2, 9, 0])
    terms = pcb_objective(labels, smoothing)(model, batch, lambda rows: images[rows])
    _, scores = model(images[batch])
    expected = sum(F.cross_entropy(scores[:, p], labels[batch], label_smoothing=smoothing) for p in range(parts))
    assert list(terms) == ["id"]
    torch.testing.assert_close(terms["id"], expected, atol=1e-4, rtol=1e-4)


def test_untrained_classifiers_guess():
    model = PCB(50, "tiny").train()
    loss = pcb_objective(torch.arange(8))(model, torch.arange(8), lambda rows: random(8, 3, 128, 64)[rows])["id"]
    assert loss.item() == pytest.approx(6 * math.log(50), rel=0.01)


@pytest.mark.parametrize("call,words", [
    (lambda: strip_windows(8, 9), "parts is 9.*height is 8 rows"),
    (lambda: strip_windows(8, 0), "parts is 0.*height is 8 rows"),
    (lambda: strip_pool(torch.zeros(1, 2, 4, 3), 5), "parts is 5.*height is 4 rows"),
    (lambda: PCB(5, "tiny", parts=9).eval()(torch.zeros(1, 3, 128, 64)), "parts is 9.*height is 8 rows"),
    (lambda: PCB(5, "tiny", parts=6, last_stride=2)(torch.zeros(2, 3, 128, 64)), "parts is 6.*height is 4 rows"),
    (lambda: PCB(5, "tiny", parts=0), "parts is 0; it must be at least 1"),
    (lambda: PCB(5, "tiny", reduced=0), "reduced is 0"),
    (lambda: PCB(1, "tiny"), "num_classes is 1"),
    (lambda: PCB(5, "vgg"), "backbone 'vgg' is unknown"),
])
def test_errors_name_the_culprit(call, words):
    with pytest.raises(ValueError, match=words):
        call()
