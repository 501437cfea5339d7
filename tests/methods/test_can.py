"""CAN: windows and pooling against torch's own, the network head by head, every loss term by loops,
centres that move only while training.
"""

import copy
import math
import re
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made import Killed, fragile, pixels, random
from torch import nn

from reid_repro.can import (
    CAN, LOSSES, NECKS, WINDOWS, CANLoss, can_objective, collaborate, gradient_shares,
    head_distances,
)
from reid_repro.can import pool_windows, pulse, max_mean_pool, winners
from reid_repro.lab.configuration import declared
from reid_repro.learning.losses import CenterLoss
from reid_repro.lab.provenance import project_root
from reid_repro.learning.recipe import Recipe, build_optimizer
from reid_repro.lab.results import reported
from reid_repro.lab.rows import plan, read_rows
from reid_repro.learning.augmentation import normalise
from reid_repro.learning.batches import IdentityBatches
from reid_repro.learning.checkpoints import load_checkpoint
from reid_repro.learning.training import embed, train

JOINED = [
    ("printed", True), ("printed", False), ("adaptive", True), ("adaptive", False),
    ("pairs", False),
]
SIZES = [(height, parts) for height in range(1, 31) for parts in range(1, height + 1)]


def network(people=5, parts=(1, 3), dim=12, seed=0, **options):
    "A tiny CAN, batch norms that differ from the identity."
    torch.manual_seed(seed)
    model = CAN(people, parts=parts, dim=dim, backbone="tiny", **options)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            if norm.affine:
                norm.weight.uniform_(0.5, 1.5), norm.bias.uniform_(-0.3, 0.3)
            norm.running_mean.uniform_(-0.2, 0.2), norm.running_var.uniform_(0.5, 1.5)
    return model


def with_loss(model, **options):
    people, dim = model.classifier.shape[1:]
    model.loss = CANLoss(people, model.heads, dim=dim, **options)
    return model


def seen(height, parts, windows):
    """(strips, height) of True where a strip sees a row: by torch's pooling of the rows'
    indicators; pairs are unions of neighbours.
    """
    rows = torch.eye(height)[None]
    if windows == "adaptive":
        return F.adaptive_max_pool1d(rows, parts)[0].T > 0
    stride = height // parts
    found = F.max_pool1d(rows, height - (parts - 1) * stride, stride)[0].T > 0  # Eq. 1
    return found[:-1] | found[1:] if windows == "pairs" else found


def pooled_loop(x, parts, windows):
    "max_mean_pool, one strip after the other."
    strips = [x[:, :, rows] for rows in seen(x.shape[2], parts, windows)]
    return torch.stack([torch.cat([s.amax((2, 3)), s.mean((2, 3))], 1) for s in strips], 2)


@pytest.mark.parametrize("windows", WINDOWS)
def test_windows_are_torchs_cover_all_rows_and_are_as_many_as_promised(windows):
    for height, parts in SIZES:
        if windows == "pairs" and parts == 1:
            continue
        places = pool_windows(height, parts, windows)
        expected = seen(height, parts, windows)
        assert torch.equal(
            torch.tensor([[a <= r < b for r in range(height)] for a, b in places]), expected
        ), (height, parts)
        assert (
            len(places) == parts - (windows == "pairs")
            and places[0][0] == 0
            and places[-1][1] == height
        )
        assert expected.any(0).all(), "every row is in a strip"
        assert places == sorted(places) and all(b > a for a, b in places)
        if windows == "printed":
            stride = height // parts
            assert places == [
                (k * stride, k * stride + height - (parts - 1) * stride) for k in range(parts)
            ]


def test_windows_by_hand():
    assert pool_windows(24, 5) == [(0, 8), (4, 12), (8, 16), (12, 20), (16, 24)]
    assert pool_windows(24, 7) == [(0, 6), (3, 9), (6, 12), (9, 15), (12, 18), (15, 21), (18, 24)]
    assert pool_windows(24, 3) == pool_windows(24, 3, "adaptive") == [(0, 8), (8, 16), (16, 24)]
    assert pool_windows(24, 5, "adaptive") == [(0, 5), (4, 10), (9, 15), (14, 20), (19, 24)]
    assert pool_windows(24, 5, "pairs") == [(0, 12), (4, 16), (8, 20), (12, 24)] and pool_windows(
        24, 2, "pairs"
    ) == [(0, 24)]


@pytest.mark.parametrize("windows", WINDOWS)
def test_parts_that_divide_the_height_need_no_overlap(windows):
    for height, parts in SIZES:
        if height % parts == 0 and parts > 1:
            size = height // parts
            joined = windows == "pairs"
            assert pool_windows(height, parts, windows) == [
                (k * size, (k + 1 + joined) * size) for k in range(parts - joined)
            ]


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize(
    "shape", [(2, 3, 24, 8), (1, 1, 7, 1), (3, 2, 11, 5), (2, 4, 9, 3), (1, 2, 5, 2)]
)
def test_max_mean_pool_is_the_loop(shape, windows):
    x = random(*shape)
    for parts in range(2, shape[2] + 1):
        torch.testing.assert_close(max_mean_pool(x, parts, windows), pooled_loop(x, parts, windows))
    assert max_mean_pool(x.float(), 2, windows).dtype == torch.float32
    x[:, :, shape[2] // 2] -= 100  # strips below zero: nothing is padded
    torch.testing.assert_close(max_mean_pool(x, 3, windows), pooled_loop(x, 3, windows))


@pytest.mark.parametrize("windows", WINDOWS)
def test_max_mean_pool_gradient(windows):
    x = random(2, 2, 7, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: max_mean_pool(m, 3, windows), x)
    for ties in (torch.zeros(2, 3, 7, 4), torch.ones(1, 2, 9, 2)):
        ties.requires_grad_()
        max_mean_pool(ties, 3, windows).sum().backward()
        assert ties.grad.isfinite().all()
        strips = max_mean_pool(ties, 3, windows).shape[2]
        assert ties.grad.sum().item() == pytest.approx(
            2 * ties.shape[0] * ties.shape[1] * strips, rel=1e-5
        )


@pytest.mark.parametrize("shape", [(2, 3, 24, 8), (1, 2, 1, 1), (2, 2, 7, 3)])
def test_one_part_is_the_whole_map_in_every_kind_but_pairs(shape):
    x = random(*shape)
    whole = torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1)[..., None]
    for windows in ("printed", "adaptive"):
        torch.testing.assert_close(max_mean_pool(x, 1, windows), whole)
    with pytest.raises(ValueError, match="parts is 1; pairs of windows need at least 2"):
        max_mean_pool(x, 1, "pairs")


@pytest.mark.parametrize(
    "height,parts,windows,words",
    [
        (5, 6, "printed", "parts is 6.*height is 5"), (5, 6, "adaptive", "parts is 6"),
        (5, 6, "pairs", "parts is 6"), (5, 0, "printed", "parts is 0"),
        (5, -1, "adaptive", "parts is -1"),
        (5, 2, "even", "windows 'even' is unknown; take one of printed, adaptive, pairs"),
    ],
)
def test_windows_refuse(height, parts, windows, words):
    for call in (
        lambda: pool_windows(height, parts, windows),
        lambda: max_mean_pool(torch.zeros(1, 2, height, 3), parts, windows),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("n", [2, 3, 7])
def test_collaborate_is_the_loop(n):
    strips = random(4, 6, n)
    joined = collaborate(strips)
    expected = [
        [
            [max(strips[b, c, k].item(), strips[b, c, k + 1].item()) for k in range(n - 1)]
            for c in range(6)
        ]
        for b in range(4)
    ]
    assert joined.tolist() == expected
    order = [2, 0, 3, 1]
    assert torch.equal(collaborate(strips[order]), joined[order])
    assert torch.equal(collaborate(strips.flip(2)), joined.flip(2)), "upside down"
    assert torch.autograd.gradcheck(collaborate, strips.requires_grad_())


def test_joining_pooled_strips_is_pooling_joined_strips_only_for_the_maxima():
    for height, parts in [(24, 2), (24, 3), (24, 5), (24, 7), (11, 4), (9, 9)]:
        x = random(2, 3, height, 4)
        joined, pairs = collaborate(max_mean_pool(x, parts)), max_mean_pool(x, parts, "pairs")
        assert torch.equal(joined[:, :3], pairs[:, :3]) and joined.shape == pairs.shape
        assert not torch.isclose(joined[:, 3:], pairs[:, 3:]).any()
        if height % parts == 0:
            assert (
                joined[:, 3:] > pairs[:, 3:]
            ).all(), "the larger of two means is above the mean of both"


@pytest.mark.parametrize("shape", [(2, 4, 1), (2, 4, 0), (4, 3), (2, 4, 3, 1)])
def test_collaborate_refuses(shape):
    with pytest.raises(
        ValueError,
        match=re.escape(f"strips must be of shape (B, 2C, n) with n of at least 2, not {shape}"),
    ):
        collaborate(torch.zeros(shape))


HEADS = {  # parts: features without, and with collaboration
    (1,): (1, 1),
    (1, 2, 3): (8, 6), (1, 2, 3, 4): (13, 10), (1, 3, 5): (11, 9), (1, 3, 5, 7): (19, 16),
    (1, 3, 5, 7, 9): (29, 25),
}


@pytest.mark.parametrize("parts", HEADS)
def test_heads_of_every_row_of_tables_2_and_3(parts):
    for together, count in zip((False, True), HEADS[parts]):
        model = network(parts=parts, collaborative=together, dim=4)
        assert len(model.heads) == count and len(set(model.heads)) == count
        assert [h for h in model.heads if h[1] == 0] == [(n, 0) for n in parts]
        for n in parts:
            assert [k for m, k in model.heads if m == n] == list(
                range(1 + (n - together if n > 1 else 0))
            )
        assert len(model.backbone.stages[3]) == len(parts) and model.classifier.shape == (
            count, 5, 4,
        )
    paired = network(parts=parts, collaborative=False, windows="pairs", dim=4)
    assert paired.heads == model.heads, "as many as with collaboration"


def test_sixteen_heads_are_four_global_and_twelve_local():
    model = CAN(3, backbone="tiny")  # the defaults are the paper's
    assert model.heads == (
        (1, 0), (3, 0), (3, 1), (3, 2), (5, 0), (5, 1), (5, 2), (5, 3), (5, 4), (7, 0), (7, 1),
        (7, 2), (7, 3), (7, 4), (7, 5), (7, 6),
    )
    assert CAN(3, parts=(3, 1), backbone="tiny").heads == (
        (3, 0), (3, 1), (3, 2), (1, 0),
    ), "in the order of parts"


@pytest.mark.parametrize("windows,together", JOINED)
def test_shapes_and_unit_length(windows, together):
    model = network(parts=(1, 2, 5), windows=windows, collaborative=together)
    heads, images = len(model.heads), normalise(pixels(3, height=112))
    features, scores = model.train()(images)
    assert features.shape == (3, heads, 12) and scores.shape == (3, heads, 5)
    assert [m.shape for m in model.maps(images)] == [(3, 128, 7, 2)] * 3
    embedding = model.eval()(images)
    assert embedding.shape == (3, heads * 12)
    torch.testing.assert_close(embedding.view(3, heads, 12).norm(dim=2), torch.ones(3, heads))
    assert torch.allclose(
        model(images[[2, 0, 1]]), embedding[[2, 0, 1]], atol=1e-5
    ), "an image does not see its batch"


@pytest.mark.parametrize("neck", NECKS)
@pytest.mark.parametrize("windows,together", JOINED)
def test_forward_is_written_out_head_by_head(windows, together, neck):
    model = network(parts=(1, 3, 2), windows=windows, collaborative=together, neck=neck, scale=5.0)
    images, W = normalise(pixels(4)), model.embedding.weight[:, :, 0]
    for training in (True, False):
        model.train(training)
        out, maps = model(images), model.maps(images)  # batch norms of a batch: the same twice
        pooled = []
        for n, k in model.heads:
            strips = pooled_loop(
                maps[model.parts.index(n)], n if k else 1, windows if k else "printed"
            )
            at = k - 1 if k else 0
            pooled.append(
                torch.maximum(strips[..., at], strips[..., at + 1])
                if k and together
                else strips[..., at]
            )
        f = torch.stack([p @ W.T for p in pooled], 1)  # (B, F, D)
        if neck != "none":
            norm = model.neck
            mean, var = (
                (f.mean((0, 1)), f.var((0, 1), correction=0))
                if training
                else (norm.running_mean, norm.running_var)
            )
            f = (f - mean) / (var + norm.eps).sqrt()
            f = f * norm.weight + norm.bias if neck == "bn" else f
        unit = f / f.norm(dim=2, keepdim=True)
        if not training:
            torch.testing.assert_close(out, unit.flatten(1), atol=1e-5, rtol=1e-4)
            continue
        torch.testing.assert_close(out[0], f, atol=1e-4, rtol=1e-4)
        for h in range(len(model.heads)):
            people = model.classifier[h]
            cosines = unit[:, h] @ (people / people.norm(dim=1, keepdim=True)).T
            torch.testing.assert_close(out[1][:, h], 5 * cosines, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("windows,together", JOINED)
@pytest.mark.parametrize("height", [7, 9, 24])
def test_a_head_sees_the_rows_it_names(height, windows, together):
    model = network(parts=(1, 2, 3, 7), windows=windows, collaborative=together)
    maps = [random(2, 6, height, 3, seed=s) for s in range(4)]
    before, rows = model.pool(maps), model.rows(height)
    assert before.shape == (2, 12, len(model.heads)) and len(rows) == len(model.heads)
    for r in range(height):
        changed = [m.clone() for m in maps]
        for m in changed:
            m[:, :, r] += 100
        moved = (model.pool(changed) != before).any(1).all(0)
        assert moved.tolist() == [a <= r < b for a, b in rows], r
    for branch, n in enumerate(model.parts):  # every branch looks at its own map
        changed = [m + 100 * (k == branch) for k, m in enumerate(maps)]
        assert (model.pool(changed) != before).any(1).all(0).tolist() == [
            m == n for m, _ in model.heads
        ]
    count = {n: sum(m == n for m, _ in model.heads) for n in model.parts}
    mirror = [model.heads.index((n, count[n] - k if k else 0)) for n, k in model.heads]
    # upside down, heads of a branch change places
    torch.testing.assert_close(model.pool([m.flip(2) for m in maps]), before[..., mirror])


def test_branches_start_equal_and_train_apart():
    model = with_loss(CAN(5, parts=(1, 3, 2), dim=12, backbone="tiny"))
    stages = model.backbone.stages[3]
    for other in stages[1:]:
        for (name, a), b in zip(
            stages[0].state_dict().items(), other.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr(), name
    states = lambda: [torch.cat([p.detach().flatten() for p in s.parameters()]) for s in stages]
    first = states()
    labels, optimiser = torch.arange(4) // 2, torch.optim.SGD(model.parameters(), 0.1)
    terms = model.loss(*model.train()(normalise(pixels(4))), labels)
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    optimiser.step()
    moved = states()
    assert all(not torch.equal(a, b) for a, b in zip(first, moved))
    steps = [b - a for a, b in zip(first, moved)]
    assert all(not torch.allclose(steps[i], steps[j]) for i, j in [(0, 1), (0, 2), (1, 2)])


def test_embedding_and_neck_are_shared_by_all_heads():
    model = network(parts=(1, 3)).train()
    assert (
        model.embedding.weight.shape == (12, 256, 1)
        and model.embedding.bias is None
        and len(model.heads) == 4
    )
    pooled = model.pool(model.maps(normalise(pixels(4)))).detach()
    embedded = model.embedding(pooled)
    weight = random(*embedded.shape, dtype=torch.float32)
    (whole,) = torch.autograd.grad(
        (embedded * weight).sum(), model.embedding.weight, retain_graph=True
    )
    single = [
        torch.autograd.grad(
            (embedded * weight)[..., h].sum(), model.embedding.weight, retain_graph=True
        )[0]
        for h in range(4)
    ]
    torch.testing.assert_close(whole, sum(single), atol=1e-3, rtol=1e-4)
    assert all(s.any() for s in single)
    assert torch.equal(model.embedding(pooled[..., [3, 1, 0, 2]]), embedded[..., [3, 1, 0, 2]])


@pytest.mark.parametrize("neck", NECKS)
@pytest.mark.parametrize("parts,heads", [((1,), 1), ((1, 3), 4), ((1, 3, 5, 7), 16)])
def test_parameters_by_hand(parts, heads, neck):
    model = network(people=7, parts=parts, dim=10, neck=neck)
    norm = lambda width: 2 * width
    block = lambda a, b: 9 * a * b + 9 * b * b + 2 * norm(b) + (a * b + norm(b) if a != b else 0)
    trunk = 3 * 16 * 25 + norm(16) + block(16, 16) + block(16, 32) + block(32, 64)
    wanted = (
        trunk
        + len(parts) * block(64, 128)
        + 2 * 128 * 10
        + (norm(10) if neck == "bn" else 0)
        + heads * 7 * 10
    )
    assert sum(p.numel() for p in model.parameters()) == wanted
    assert (
        sum(p.numel() for p in with_loss(model).parameters()) == wanted
    ), "centres are no parameters"
    assert model.loss.center.centers.shape == (heads * 7, 10)


@pytest.mark.parametrize("scale", [0.5, 14.0])
def test_the_classifier_sees_directions_only(scale):
    model, images = network(scale=scale).train(), normalise(pixels(4))
    features, scores = model(images)
    assert scores.abs().max() <= scale * (1 + 1e-6) and scores.abs().max() > 0.1 * scale
    with torch.no_grad():
        model.classifier *= torch.linspace(0.1, 9, 5)[:, None]
    torch.testing.assert_close(model(images)[1], scores)
    with torch.no_grad():
        model.neck.weight *= 3
        model.neck.bias *= 3
    longer, again = model(images)
    torch.testing.assert_close(longer, 3 * features, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again, scores, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        model.classifier[0, 2] = features[1, 0]
    assert model(images)[1][1, 0, 2].item() == pytest.approx(scale, rel=1e-5)
    model.classifier.data[0, 2].neg_()
    assert model(images)[1][1, 0, 2].item() == pytest.approx(-scale, rel=1e-5)


@pytest.mark.parametrize(
    "options,words",
    [
        *(
            (
                {"parts": parts},
                (
                    rf"parts are {re.escape(str(list(parts)))}; give different whole numbers of at"
                    r" least 1"
                ),
            )
            for parts in ((), (1, 3, 3), (1, 2.0), (0, 1), (-1, 2), (1, True), (None,))
        ),
        ({"num_classes": 1}, "num_classes 1 must be at least 2"), ({"dim": 0}, "dim 0 at least 1"),
        *(({"scale": v}, f"scale {v} finite and above 0") for v in (0, -1.0, math.nan, math.inf)),
        ({"neck": "ln"}, "neck 'ln' is unknown"),
        ({"windows": "even"}, "windows 'even'.*take printed, adaptive, pairs"),
        (
            {"windows": "pairs", "collaborative": True},
            "windows 'pairs', collaborative True.*pairs are joined already",
        ),
        ({"backbone": "huge"}, "backbone 'huge'"), ({"last_stride": 3}, "last_stride"),
        ({"weights": "none.safetensors"}, "weights"),
    ],
)
def test_can_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        CAN(**{"num_classes": 5, "backbone": "tiny", **options})


@pytest.mark.parametrize("windows,together", JOINED)
def test_more_parts_than_rows_are_refused(windows, together):
    model = network(parts=(1, 5), windows=windows, collaborative=together)
    for mode in (True, False):
        with pytest.raises(ValueError, match="parts is 5, but the map's height is 4 rows"):
            model.train(mode)(torch.zeros(2, 3, 64, 32))
    with pytest.raises(ValueError, match="parts is 5"):
        model.rows(4)


def test_head_distances():
    model = network(parts=(1, 3, 2), dim=5)
    images = embed(model, pixels(7), device="cpu")
    count, query, gallery = len(model.heads), images[:3, None], images[None, 3:]
    distances = head_distances(query, gallery, count)
    assert distances.shape == (3, 4, count)
    torch.testing.assert_close(distances.mean(2), 1 - F.cosine_similarity(query, gallery, dim=2))
    for a in range(3):
        for b in range(4):
            for h in range(count):
                one, two = (images[i, 5 * h : 5 * h + 5] for i in (a, 3 + b))
                assert distances[a, b, h].item() == pytest.approx(
                    (one - two).square().sum().item() / 2, abs=1e-5
                )
    torch.testing.assert_close(
        head_distances(images, images, count), torch.zeros(7, count), atol=1e-5, rtol=0
    )
    assert head_distances(
        torch.tensor([1.0, 0, 0, 0, 1, 0]), torch.tensor([0.0, 1, 0, 0, -1, 0]), 2
    ).tolist() == [1, 2]


@pytest.mark.parametrize("first,second,heads", [(7, 7, 2), (6, 6, 0), (6, 6, -2), (6, 12, 2)])
def test_head_distances_refuse(first, second, heads):
    with pytest.raises(
        ValueError, match=f"embeddings of {first} and {second} numbers are not {heads} heads"
    ):
        head_distances(torch.zeros(first), torch.zeros(second), heads)


CHOSEN = ((1, 0), (3, 0), (3, 1), (3, 2))  # heads of parts 1, 3
TERMS = [("id",), ("id", "triplet"), ("id", "center"), LOSSES]


# 0 is the seed of the centres
def case(people=3, each=2, heads=CHOSEN, dim=5, classes=4, seed=7, dtype=torch.float32):
    features = random(people * each, len(heads), dim, seed=seed, dtype=dtype)
    scores = 3 * random(people * each, len(heads), classes, seed=seed + 1, dtype=dtype)
    return (
        features.requires_grad_(), scores.requires_grad_(),
        torch.arange(people).repeat_interleave(each) + classes - people,
    )


def naive_loss(
    features, scores, labels, centres, heads, losses, clustered, margin, unit, weight, squared,
    smoothing, plain=False,
):
    """The terms of Eq. 5 in loops over heads and images, in float64; centres: (chosen heads,
    people, D).
    """
    features, scores, centres, people = (
        features.double(), scores.double(), centres.double(), scores.shape[2],
    )
    images = range(len(labels))
    chosen = [h for h, (_, k) in enumerate(heads) if k == 0 or clustered == "all"]
    surprise = []
    for h in range(len(heads)):
        for i in images:
            q = scores[i, h].exp() / scores[i, h].exp().sum()
            p = [smoothing / people + (1 - smoothing) * (c == labels[i]) for c in range(people)]
            surprise.append(-sum(p[c] * q[c].log() for c in range(people)))
    terms, triplets, centers = {"id": sum(surprise) / len(surprise)}, [], []
    for place, h in enumerate(chosen):
        f = [features[i, h] / features[i, h].norm() if unit else features[i, h] for i in images]
        for a in images:
            far = max(((f[a] - f[b]) ** 2).sum() for b in images if labels[b] == labels[a])
            near = min(((f[a] - f[b]) ** 2).sum() for b in images if labels[b] != labels[a])
            if plain:
                far, near = far.sqrt(), near.sqrt()
            triplets.append((margin + far - near).clamp(min=0))
            gap = ((f[a] - centres[place, labels[a]]) ** 2).sum()
            centers.append((gap if squared else gap.sqrt()) / 2)
    if "triplet" in losses:
        terms["triplet"] = sum(triplets) / len(triplets)
    if "center" in losses:
        terms["center"] = weight * sum(centers) / len(centers)
    return terms


@pytest.mark.parametrize(
    "unit,squared,smoothing,margin,plain",
    [
        (True, True, 0.0, 0.3, False), (False, False, 0.1, 1.3, True),
        (True, False, 0.3, -0.2, True), (False, True, 0.0, 4.0, False),
    ],
)
@pytest.mark.parametrize("clustered", ["all", "global"])
@pytest.mark.parametrize("losses", TERMS)
def test_every_term_and_gradient_is_the_loops(
    losses, clustered, unit, squared, smoothing, margin, plain
):
    options = {"smoothing": smoothing, "triplet_squared": not plain}
    loss = CANLoss(
        4, CHOSEN, dim=5, losses=losses, clustered=clustered, margin=margin, unit=unit, center=0.2,
        squared=squared, **options,
    )
    features, scores, labels = case()
    heads = 4 if clustered == "all" else 2
    assert loss.clustered_heads == ([0, 1, 2, 3] if clustered == "all" else [0, 1]) and (
        loss.center is not None
    ) == ("center" in losses)
    centres = (
        loss.center.centers.clone().view(heads, 4, 5) if loss.center else torch.zeros(heads, 4, 5)
    )
    assert (
        not loss.center or len(centres.flatten(0, 1).unique(dim=0)) == 4 * heads
    ), "every head has centres of its own"
    ours = loss(features, scores, labels)
    naive = naive_loss(
        features, scores, labels, centres, CHOSEN, losses, clustered, margin, unit, 0.2, squared,
        smoothing, plain,
    )
    assert list(ours) == list(losses) and all(
        t.dtype == torch.float32 and t.shape == () for t in ours.values()
    )
    for name, value in ours.items():
        torch.testing.assert_close(value.double(), naive[name], rtol=1e-5, atol=1e-6, msg=name)
        wrt = scores if name == "id" else features
        got, wanted = (
            torch.autograd.grad(t[name], wrt, retain_graph=True)[0] for t in (ours, naive)
        )
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
        assert wanted.any(), name
        if name != "id":
            assert (got.flatten(2).abs().sum((0, 2)) > 0).tolist() == [
                h in loss.clustered_heads for h in range(4)
            ], name


def test_a_term_against_finite_differences():
    loss = CANLoss(4, CHOSEN, dim=5, center=1.0).eval()
    features, scores, labels = case(seed=3)
    loss.center.centers.mul_(0.5)
    total = lambda f: sum(loss(f, scores, labels).values())
    (gradient,) = torch.autograd.grad(total(features), features)
    generator, step = torch.Generator().manual_seed(0), 1e-2
    for _ in range(10):
        way = torch.randn(features.shape, generator=generator)
        slope = (total(features.detach() + step * way) - total(features.detach() - step * way)) / (
            2 * step
        )
        assert slope.item() == pytest.approx((gradient * way).sum().item(), rel=0.05, abs=0.02)


def test_terms_by_hand():
    heads = ((1, 0),)
    # unit: east, north, west, west
    features = torch.tensor([[[3.0, 0]], [[0, 2.0]], [[-5.0, 0]], [[-1.0, 0]]])
    scores, labels = torch.zeros(4, 1, 2), torch.tensor([0, 0, 1, 1])
    loss = CANLoss(2, heads, dim=2, margin=1.0, center=0.5).eval()
    loss.center.centers.copy_(torch.tensor([[0.0, 0], [1, 0]]))
    terms = {name: value.item() for name, value in loss(features, scores, labels).items()}
    # east: own at √2, others at 2: 1 + 2 − 4; north: own 2, other 2: 1; west: own 0, north at 2: 1
    # − 2, twice
    assert terms == pytest.approx(
        {"id": math.log(2), "triplet": 1 / 4, "center": 0.5 * (1 + 1 + 4 + 4) / 2 / 4}
    )
    plain = CANLoss(2, heads, dim=2, margin=1.0, center=0.5, unit=False, squared=False).eval()
    plain.center.centers.copy_(torch.tensor([[0.0, 0], [1, 0]]))
    terms = {name: value.item() for name, value in plain(features, scores, labels).items()}
    # 9 + 4 = 13 to one's own; (3, 0): nearest other at 16; (0, 2): at 5; (−5, 0): own 16, other 29;
    # (−1, 0): own 16, other 5
    triplet = (0 + (1 + 13 - 5) + 0 + (1 + 16 - 5)) / 4
    assert terms == pytest.approx(
        {"id": math.log(2), "triplet": triplet, "center": 0.5 * (3 + 2 + 6 + 2) / 2 / 4}
    )


@pytest.mark.parametrize("unit", [True, False])
def test_the_length_of_features_counts_only_where_it_should(unit):
    loss = CANLoss(4, CHOSEN, dim=5, unit=unit, center=1.0).eval()
    (features, scores, labels) = case()
    short, long = loss(features, scores, labels), loss(7 * features, scores, labels)
    assert torch.equal(short["id"], long["id"])
    for name in ("triplet", "center"):
        assert torch.isclose(short[name], long[name]).item() is unit, name


@pytest.mark.parametrize("clustered", ["all", "global"])
@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_centres_follow_head_by_head_in_training_mode_only(rate, clustered):
    loss = CANLoss(4, CHOSEN, dim=5, clustered=clustered, rate=rate)
    features, scores, labels = case()
    labels = torch.tensor([1, 1, 1, 3, 3, 3])
    before = loss.center.centers.clone()
    still = loss.eval()(features, scores, labels)
    assert torch.equal(loss.center.centers, before), "no centre moves in evaluation mode"
    moving = loss.train()(features, scores, labels)
    for name, value in still.items():
        assert torch.equal(value, moving[name]), f"{name} is the value before the centres move"
    for place, h in enumerate(loss.clustered_heads):
        f = F.normalize(features[:, h].detach(), dim=1)
        for person in range(4):
            at = 4 * place + person
            mine = f[labels == person]
            away = sum((before[at] - one for one in mine), torch.zeros(5)) / (1 + len(mine))
            torch.testing.assert_close(loss.center.centers[at], before[at] - rate * away)
            assert torch.equal(loss.center.centers[at], before[at]) == (
                person in (0, 2)
            ), "others stay"
    gradients = [torch.autograd.grad(sum(t.values()), features)[0] for t in (still, moving)]
    assert torch.equal(*gradients), "nor does their moving change a gradient"
    assert not loss.center.centers.requires_grad and not list(loss.parameters())
    assert CANLoss(4, CHOSEN, dim=5).rate == 0.5


def test_centres_reach_the_mean_of_their_head():
    loss, (features, scores, labels) = CANLoss(4, CHOSEN, dim=5, unit=False), case()
    for _ in range(40):
        loss(features, scores, labels)
    # (heads, people, D)
    means = torch.stack([features.detach()[labels == p].mean(0) for p in (1, 2, 3)], 1)
    torch.testing.assert_close(
        loss.center.centers.view(4, 4, 5)[:, 1:], means, atol=1e-5, rtol=1e-5
    )


def test_follow_by_hand_and_whatever_the_order_of_the_batch():
    loss = CenterLoss(3, 2)
    loss.centers.copy_(torch.tensor([[0.0, 0], [2, 2], [5, 5]]))
    features, labels = torch.tensor([[3.0, 0], [2, 4], [0, 3]]), torch.tensor([0, 1, 0])
    loss.update_centers(features, labels, 1)
    assert loss.centers.tolist() == [[1, 1], [2, 3], [5, 5]]  # (0 + 3)/3 in both, (2 + 4)/2
    again = CenterLoss(3, 2)
    again.centers.copy_(torch.tensor([[0.0, 0], [2, 2], [5, 5]]))
    again.update_centers(features[[2, 0, 1]].bfloat16(), labels[[2, 0, 1]], 1.0)
    assert torch.equal(again.centers, loss.centers) and again.centers.dtype == torch.float32


@pytest.mark.parametrize("rate", [0, -0.5, 1.5, math.inf, math.nan, "fast", None])
def test_a_refused_follow_moves_nothing(rate):
    loss = CenterLoss(3, 2)
    before = loss.centers.clone()
    with pytest.raises(ValueError, match="rate must lie in"):
        loss.update_centers(torch.ones(2, 2), torch.tensor([0, 1]), rate)
    with pytest.raises(ValueError, match="labels must lie in"):
        loss.update_centers(torch.ones(2, 2), torch.tensor([0, 3]))
    assert torch.equal(loss.centers, before)


@pytest.mark.parametrize(
    "options,words",
    [
        *(
            ({"losses": losses}, "losses are .*; take id, and with it triplet and center")
            for losses in ((), ("triplet",), ("id", "softmax"), "id", ("triplet", "center"))
        ),
        ({"clustered": "local"}, "clustered 'local' is unknown; take all or global"),
        ({"num_classes": 1}, "num_classes 1 is below 2"), ({"heads": ()}, "name no all feature"),
        ({"heads": CHOSEN[2:], "clustered": "global"}, "name no global feature"),
        *(({"margin": v}, f"margin {v}") for v in (math.nan, math.inf, None, "wide")),
        *(({"center": v}, f"center {v}") for v in (-1, math.nan, math.inf)),
        *(({"smoothing": v}, f"smoothing {v}") for v in (1, -0.1, math.nan)),
        *(({"rate": v}, f"rate {v}") for v in (0, -1, 1.5, math.nan)),
    ],
)
def test_loss_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        CANLoss(**{"num_classes": 4, "heads": CHOSEN, "dim": 5, **options})


@pytest.mark.parametrize("losses", TERMS)
@pytest.mark.parametrize(
    "heads,classes", [(CHOSEN[:3], 4), ((*CHOSEN, (3, 3)), 4), (CHOSEN, 5), (CHOSEN, 3)]
)
def test_features_of_another_network_are_refused(heads, classes, losses):
    loss, (features, scores, labels) = CANLoss(classes, heads, dim=5, losses=losses), case()
    before = loss.center and loss.center.centers.clone()
    with pytest.raises(
        ValueError,
        match=f"features .* and scores .* do not belong to {len(heads)} heads and {classes} people",
    ):
        loss(features, scores, labels)
    assert before is None or torch.equal(loss.center.centers, before)
    right = CANLoss(4, CHOSEN, dim=5, losses=losses)
    for wrong in (features[:, :3], features[:4]):
        with pytest.raises(ValueError, match=r"features .* and scores"):
            right(wrong, scores, labels)
    if "center" in losses:
        with pytest.raises(ValueError, match="features must have 6 columns"):
            CANLoss(4, CHOSEN, dim=6, losses=losses)(features, scores, labels)


@pytest.mark.parametrize(
    "labels,words",
    [
        ([1, 1, 1, 1, 1, 1], "single identity"), ([0, 0, 1, 1, 2, 3], "identity 2 only once"),
        ([0, 0, 1, 1, 4, 4], "labels must lie in 0 … 3"),
        ([-1, -1, 0, 0, 1, 1], "labels must lie in 0 … 3"), ([0, 0, 1, 1], "labels must be int64"),
    ],
)
@pytest.mark.parametrize("clustered", ["all", "global"])
def test_batches_that_do_not_fit_are_refused_and_move_no_centre(labels, words, clustered):
    loss, (features, scores, _) = CANLoss(4, CHOSEN, dim=5, clustered=clustered), case()
    before = loss.center.centers.clone()
    with pytest.raises(ValueError, match=words):
        loss(features, scores, torch.tensor(labels))
    assert torch.equal(loss.center.centers, before)
    if "identity" in words:  # without a triplet they are fine
        assert CANLoss(4, CHOSEN, dim=5, losses=("id", "center"))(
            features, scores, torch.tensor(labels)
        )["center"].isfinite()


@pytest.mark.parametrize("losses", TERMS)
def test_bf16_keeps_the_terms_in_float32(losses):
    images, labels = normalise(pixels(6)), torch.arange(6) // 2
    found = {}
    for mixed in (False, True):
        model = with_loss(network(), losses=losses, center=0.1).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            features, scores = model(images)
            terms = model.loss(features, scores, labels)
        sum(terms.values()).backward()
        assert features.dtype == scores.dtype == torch.float32 and all(
            t.dtype == torch.float32 and t.isfinite() for t in terms.values()
        )
        assert all(
            p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters()
        )
        assert scores.abs().max() <= 14 * (1 + 1e-6), "unit length, not that of bfloat16"
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            unit = model.eval()(images).view(6, 4, 12).norm(dim=2)
        torch.testing.assert_close(unit, torch.ones(6, 4))
        found[mixed] = {name: t.item() for name, t in terms.items()}
    assert found[True] == pytest.approx(found[False], rel=0.1, abs=0.05)


@cache
def made(people=6, each=4):
    "Pictures of people who differ in their colours, and their labels."
    coarse = pixels(people, seed=3, width=16).float()[:, None] + 25 * random(
        people, each, 3, 64, 16, dtype=torch.float32
    )
    return coarse.clamp(0, 255).to(torch.uint8).flatten(0, 1), torch.arange(
        people
    ).repeat_interleave(each)


def trained(seed=0, batches=IdentityBatches, out=None, loss=None, **recipe):
    images, labels = made()
    build = lambda seed: with_loss(network(6, seed=seed), **{"center": 0.01, **(loss or {})})
    model, sampler = build(seed), batches(labels.numpy(), 4, 2, seed=seed)
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    options = {"epochs": 2, "batch_size": 8, "lr": 1e-3, "steps": 2} | recipe
    run = lambda: train(
        model, can_objective(labels), images, sampler, Recipe(**options), seed, out=out,
        device="cpu",
    )
    try:
        history = run()
    except Killed:
        model = build(seed + 1)  # whatever was in memory is lost
        model.loss.center.centers.zero_()
        history = run()
    return model, history, before


NAMES = ["loss", "id", "triplet", "center"]


def test_two_steps_move_everything_and_depend_on_the_seed_alone(capsys):
    model, history, before = trained()
    assert not model.training and not model.loss.training and history["step"].tolist() == [2]
    assert np.isfinite(history.to_numpy()).all() and list(history.columns[3:7]) == NAMES
    moved = {name: (p != before[name]).flatten() for name, p in model.state_dict().items()}
    assert all(m.any() for m in moved.values()), [name for name, m in moved.items() if not m.any()]
    assert {"loss.center.centers", "classifier", "embedding.weight"} < set(moved)
    assert all(
        any(name.startswith(f"backbone.stages.3.{branch}.") for name in moved) for branch in (0, 1)
    )
    again, same, _ = trained()
    assert history[NAMES].equals(same[NAMES])
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())
    )
    assert not history[NAMES].equals(trained(seed=1)[1][NAMES])


def test_a_killed_run_continues_to_the_same_numbers_and_centres(tmp_path, capsys):
    options = dict(epochs=2, steps=0, flip=0.5, pad=2)
    (model, history, _) = trained(**options)
    (other, resumed, _) = trained(batches=fragile(IdentityBatches), out=tmp_path, **options)
    terms = ["epoch", "step", "lr", *NAMES]
    assert len(history) == 2 and history[terms].equals(resumed[terms])
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(a, b), name
    fresh = with_loss(network(6, seed=9))
    load_checkpoint(tmp_path / "checkpoint.safetensors", fresh)
    assert torch.equal(fresh.loss.center.centers, model.loss.center.centers)
    images = made()[0][:4]
    assert torch.equal(embed(fresh, images, device="cpu"), embed(model, images, device="cpu"))


@pytest.mark.parametrize("losses", TERMS)
def test_the_objective_is_the_loss_of_the_batch(losses):
    images, labels = made()
    model, batch = with_loss(network(6), losses=losses).train(), torch.tensor([3, 2, 9, 8, 20, 22])
    view = lambda indices: normalise(images[indices])
    terms = can_objective(labels)(model, batch, view)
    other = with_loss(network(6), losses=losses).train()
    wanted = other.loss(*other(view(batch)), torch.tensor([0, 0, 2, 2, 5, 5]))
    assert list(terms) == list(wanted) == list(losses) and all(
        torch.equal(terms[k], wanted[k]) for k in losses
    )

    class Wrapped(nn.Module):  # as distributed training does
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, pixels):
            return self.module(pixels)

    again = can_objective(labels)(
        Wrapped(with_loss(network(6), losses=losses)).train(), batch, view
    )
    assert all(torch.equal(again[k], wanted[k]) for k in losses)


def test_mixed_precision_trains(capsys):
    _, exact, _ = trained(steps=1)
    _, mixed, _ = trained(steps=1, precision="bf16")
    assert mixed[NAMES].iloc[0].to_dict() == pytest.approx(
        exact[NAMES].iloc[0].to_dict(), rel=0.05, abs=0.02
    )


def test_branches_have_the_rate_of_the_backbone():
    model, recipe = with_loss(network(parts=(1, 3, 2))), Recipe(lr=0.1, head_lr=10.0)
    rates = {
        id(p): group["lr"]
        for group in build_optimizer(model, recipe).param_groups
        for p in group["params"]
    }
    for name, p in model.named_parameters():
        assert rates[id(p)] == (0.1 if name.startswith("backbone.") else 1.0), name
    assert len(rates) == len(list(model.parameters()))


def constant(*strips):
    "(B, C, n) of six images and four channels that have the given value in each strip."
    return torch.tensor(strips).expand(6, 4, -1)


@pytest.mark.parametrize(
    "strips,expected",
    [
        (constant(2.0, 2.0, 2.0), (0, 1, 0)),  # equal: nothing to choose
        (constant(3.0, 2.0), (0, 0, 1 / 3)),  # the upper one always
        (constant(0.0, 5.0), (0, 0, 1)),  # the lower one always, beside nothing
        (constant(0.0, 0.0), (0, 1, 0)),  # a dead channel
        # half and half: gaps of 1, larger values 3 and 2
        (torch.cat([constant(3.0, 2.0)[:3], constant(1.0, 2.0)[3:]]), (1, 0, 2 / 5)),
        # the lower one in 2 of 6
        (torch.cat([constant(3.0, 2.0)[:4], constant(1.0, 2.0)[4:]]), (2 / 3, 0, 6 / 16)),
        # upper pair: 1 and 5 ties
        (
            torch.cat([constant(1.0, 0.0, 2.0)[:1], constant(1.0, 1.0, 0.0)[1:]]),
            (2 / 7, 5 / 12, 8 / 13),
        ),
    ],
)
def test_winners_by_hand(strips, expected):
    other = constant(*range(1, strips.shape[2] + 1)).float()  # the lower one always
    for swapped in (False, True):
        found = winners([torch.cat([other, strips] if swapped else [strips, other], 1)])
        mine, its = ("mean", "max") if swapped else ("max", "mean")
        assert [
            found[f"{what}_{mine}"] for what in ("winner_change", "tied", "gap")
        ] == pytest.approx(expected)
        assert found[f"winner_change_{its}"] == found[f"tied_{its}"] == 0
    assert winners([torch.cat([strips, strips], 1)] * 2) == winners(
        [torch.cat([strips, strips], 1)]
    ), "over all branches"


def test_winners_against_a_loop():
    branches = [torch.round(2 * random(7, 6, n, dtype=torch.float32)).abs() for n in (2, 5)]
    rarer = decided = ties = apart = larger = 0
    for x in branches:
        for c in range(3, 6):  # the means
            for k in range(x.shape[2] - 1):
                up = sum(a > b for a, b in zip(x[:, c, k].tolist(), x[:, c, k + 1].tolist()))
                down = sum(a < b for a, b in zip(x[:, c, k].tolist(), x[:, c, k + 1].tolist()))
                rarer = rarer + min(up, down)
                decided = decided + up + down
                ties = ties + 7 - up - down
                apart += (x[:, c, k] - x[:, c, k + 1]).abs().sum().item()
                larger += sum(
                    max(a, b) for a, b in zip(x[:, c, k].tolist(), x[:, c, k + 1].tolist())
                )
    wanted = {
        "winner_change_mean": 2 * rarer / decided, "tied_mean": ties / (decided + ties),
        "gap_mean": apart / larger,
    }
    found = winners(branches)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    for wrong in ([], [branches[0], torch.ones(2, 4, 1)], [torch.ones(2, 4)]):
        with pytest.raises(ValueError, match=r"give \(B, 2C, n\) with n of at least 2"):
            winners(wrong)


def test_gradient_shares_by_hand():
    # one head, two people at right angles, both weights on the first axis: the identity term moves
    # nobody along his own direction
    loss = CANLoss(2, ((1, 0),), dim=2, losses=("id", "center"), unit=False, center=0.5).eval()
    loss.center.centers.copy_(torch.tensor([[0.0, 0], [0, 0]]))
    features = torch.tensor([[[2.0, 0]], [[2, 0]], [[0, 2]], [[0, 2]]])
    slope = torch.tensor([[1.0, 0], [0, 1]])
    found = gradient_shares(loss, features, lambda f: f @ slope, torch.tensor([0, 0, 1, 1]))
    # probability of the other person; the gradient is (−s, s), a quarter of it each
    surprise = 1 / (1 + math.exp(2))
    center = 0.5 * 2  # λ (f − c), a quarter of it each
    assert found == pytest.approx(
        {
            "share_id": (norm := surprise * 2**0.5) / (norm + center), "share_triplet": 0,
            "share_center": center / (norm + center),
        }
    )
    assert not features.requires_grad


@pytest.mark.parametrize("losses", TERMS)
def test_shares_sum_to_one_and_id_alone_has_all(losses):
    model, (images, labels) = with_loss(network(6), losses=losses), made()
    found = pulse(model, images, labels, "cpu")
    shares = {name: found[f"share_{name}"] for name in LOSSES}
    assert sum(shares.values()) == pytest.approx(1) and all(
        (shares[name] > 0) is (name in losses) for name in LOSSES
    )
    assert losses != ("id",) or shares == {"id": 1, "triplet": 0, "center": 0}


@pytest.mark.parametrize("windows,together", JOINED)
def test_pulse_is_of_the_strips_that_are_joined_and_changes_nothing(windows, together):
    model = with_loss(network(6, (1, 2, 3), windows=windows, collaborative=together)).train()
    model.backbone.eval()  # a mode for each module
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    images, labels = made()
    # a map of five rows, where torch's strips are not those of Eq. 1
    images = F.interpolate(images, (80, 16))
    found = pulse(model, images[:12], labels[:12], "cpu")
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert modes == [module.training for module in model.modules()] and all(
        p.grad is None for p in model.parameters()
    )
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    maps = model.eval().maps(normalise(images[:12]))
    kind = "adaptive" if windows == "adaptive" else "printed"
    wanted = winners([max_mean_pool(maps[place], n, kind) for place, n in ((1, 2), (2, 3))])
    assert {name: found[name] for name in wanted} == pytest.approx(wanted) and 0 < found[
        "winner_change_mean"
    ] < 1
    assert set(found) == {*wanted, "share_id", "share_triplet", "share_center"}
    assert pulse(model, images[:12], device="cpu") == wanted, "no labels, no shares"


def test_a_map_without_stripes_has_no_pulse():
    model, (images, labels) = with_loss(network(6, (1, 3))), made()
    with torch.no_grad():
        for branch in model.backbone.stages[3]:
            for p in branch.parameters():
                p.zero_()  # nothing but zeros behind the last stage
    found = pulse(model, images, labels, "cpu")
    assert [
        found[f"{what}_{half}"]
        for what in ("winner_change", "tied", "gap")
        for half in ("max", "mean")
    ] == [0, 0, 1, 1, 0, 0]
    single = with_loss(network(6, (1,), collaborative=False))
    assert set(pulse(single, images, labels, "cpu")) == {
        "share_id", "share_triplet", "share_center",
    }, "no strips, no joins"
    single.loss = None  # as in weights without the parts that only training uses
    with pytest.raises(ValueError, match=r"loss of the model was taken off.*leave labels out"):
        pulse(single, images, labels, "cpu")
    with pytest.raises(ValueError, match="only once"):
        pulse(model, images[:5], labels[:5], "cpu")


def test_an_unscaled_neck_keeps_the_size_of_features():
    # a learned scale is the way out of a triplet loss on plain features; without it they keep a
    # deviation of one
    images, _ = made()
    model = network(6, neck="bn_unscaled")
    assert not list(model.neck.parameters())
    for factor in (1, 100):
        with torch.no_grad():
            model.embedding.weight *= factor
            features, _ = model.train()(normalise(images))
        torch.testing.assert_close(
            features.std((0, 1), correction=0), torch.ones(12), atol=1e-2, rtol=0
        )


def test_it_learns(capsys):
    model, history, _ = trained(epochs=8, steps=0, lr=3e-3, flip=0.0, loss={"center": 0.05})
    first, last = history[NAMES].iloc[0], history[NAMES].iloc[-1]
    assert (
        last["id"] < 0.3 * first["id"]
        and last["triplet"] < first["triplet"]
        and last["center"] < 0.5 * first["center"]
    )
    images, labels = made()
    features = embed(model, images, device="cpu")
    near = (features @ features.T).fill_diagonal_(-torch.inf).argmax(1)
    assert (labels[near] == labels).float().mean() > 0.8


def notebook_defaults():
    return {
        name: value
        for name, (_, value) in declared(project_root() / read_rows("can")[0].notebook).items()
    }


def test_every_row_of_tables_2_to_6_is_there():
    rows, own = {row.name: row for row in read_rows("can")}, reported("can").query("own")
    named = {(key["table"], key["row"]) for row in rows.values() for key in row.reported}
    # table 5 prints another number than table 4 for the same run on Market-1501; a row can be held
    # against one of them
    assert named | {("5", "CAN")} == set(zip(own["table"], own["row"])) and {
        table for table, _ in named
    } == {"2", "3", "4", "6"}
    assert [sum(table == t for table, _ in named) for t in "2346"] == [5, 6, 4, 1]
    for row in rows.values():
        for key in row.reported:
            printed = own[(own["table"] == key["table"]) & (own["row"] == key["row"])]
            assert set(printed["dataset"]) <= set(row.datasets), (row.name, key)
    third = {
        "CAN + L_CE": (["id"], None), "CAN + L_CE + L_Trip": (["id", "triplet"], "global"),
        "CAN + L_CE + L_Trip + L_C": (list(LOSSES), "global"),
        "global & local to L_c": (list(LOSSES), "all"),
    }
    defaults = notebook_defaults()
    for row in rows.values():
        chosen = {**defaults, **row.set}
        for key in row.reported:
            if key["table"] in "23":
                assert chosen["parts"] == [int(n) for n in re.findall(r"\d", key["row"])], key
                assert (
                    chosen["collaborative"] is ("with CA" in key["row"])
                    and chosen["windows"] == "printed"
                )
                assert chosen["losses"] == ["id", "triplet"] and chosen["clustered"] == "global"
                assert tuple(chosen["parts"]) in HEADS
            else:
                losses, where = third.get(key["row"], third["global & local to L_c"])
                assert (
                    chosen["parts"] == [1, 3, 5, 7]
                    and chosen["collaborative"]
                    and chosen["losses"] == losses
                ), key
                assert where in (None, chosen["clustered"])
            assert (
                chosen["unit"]
                and chosen["center"] == 0.0005
                and chosen["triplet_squared"]
                and chosen["neck"] == "bn"
            )
    later = {**defaults, **rows["can_later"].set}
    assert (later["neck"], later["unit"], later["triplet_squared"], later["margin"]) == (
        "bn_unscaled", False, False, 1.3,
    )
    once = [str(row.set) for row in rows.values() if not row.name.endswith("_longer")]
    assert len(set(once)) == len(once), "no run stands there twice"
    in_table_3 = {
        row.name for row in rows.values() if "3" in {key["table"] for key in row.reported}
    }
    assert {job.row.name for job in plan("paper", "can/table3")} == in_table_3


@pytest.mark.parametrize("profile", ["smoke", "study", "photographs", "short", "paper"])
def test_every_job_builds(profile):
    defaults = notebook_defaults()
    jobs = {job.row.name: job for job in plan(profile, "can")}
    # without and with collaboration, and the losses that can act
    few = {"part_1357", "can", "can_later"}
    assert set(jobs) == few if profile == "smoke" else {"part_1357", "part_1357_ca"} <= set(jobs)
    assert profile != "paper" or set(jobs) == {row.name for row in read_rows("can")} - {
        "can_global_longer"
    }
    for name, job in jobs.items():
        assert set(job.row.set) <= set(defaults), name
        c = {**defaults, **job.parameters, **job.row.set}
        names = (
            "parts", "collaborative", "dim", "scale", "neck", "windows", "last_stride", "losses",
            "clustered", "margin", "unit", "center", "smoothing", "triplet_squared",
        )
        model = CAN(7, backbone="tiny", **{key: c[key] for key in names})
        images, people = torch.zeros(4, 3, c["height"], 16), torch.tensor([0, 0, 6, 6])
        assert (
            c["height"] // 16 == (8 if profile == "short" else 24)
            and c["batch_size"] % c["instances"] == 0
        ), name
        with torch.no_grad():
            terms = model.loss(*model.train()(images), people)
            assert list(terms) == c["losses"] and all(t.isfinite() for t in terms.values()), name
            assert profile == "paper" or model.eval()(images[:1]).shape == (
                1, c["dim"] * len(model.heads),
            ), name


def test_the_papers_run_is_the_papers():
    parameters = next(job.parameters for job in plan("paper", "can/can"))
    recipe = {
        "optimizer": "adam", "lr": 3e-4, "schedule": "step", "epochs": 600,
        "milestones": [250, 350, 450], "gamma": 0.1, "batch_size": 32, "backbone": "resnet50",
        "height": 384, "width": 128, "last_stride": 1,
    }
    assert {key: parameters[key] for key in recipe} == recipe  # §4.6
    later = next(job.parameters for job in plan("paper", "can/can_later"))
    assert later == parameters | {"weight_decay": 5e-4, "warmup": 5.0}
    defaults = notebook_defaults()
    assert defaults["instances"] == 4 and defaults["center"] == 0.0005 and defaults["dim"] == 256


def test_rivals_on_cuhk03_stand_where_casns_table_has_them():
    mine, theirs = (
        reported(paper).query("dataset.str.startswith('cuhk03')") for paper in ("can", "casn")
    )
    rivals = mine.query("not own").set_index(["row", "metric"])
    known = theirs.query("table == '1' and not own").set_index(["row", "metric"])
    found = {}
    for (row, metric), line in rivals.iterrows():
        if row in known.index.get_level_values(0):
            same = known.loc[[(row, metric)]]
            same = same[same["value"] == line["value"]]
            assert line["dataset"] in set(same["dataset"]), (row, metric)
            found.setdefault(row, set()).add(line["dataset"])
    assert found == {
        "HA-CNN": {"cuhk03-np-labelled"}, "PCB+RPP": {"cuhk03-np-detected"},
        "MGN": {"cuhk03-np-labelled"},
    }
    assert set(mine.query("own")["dataset"]) == {
        "cuhk03-mixed"
    }, "neither labelled nor detected alone"
