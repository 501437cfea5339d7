"""CASN: attention in closed form against automatic differentiation, profiles against loops, the
loss by hand, the ranking pair by pair.
"""

import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made import Killed, fragile, pixels, random
from torch import nn

from reid_repro.lab import methods
from reid_repro.casn import (
    CASN, PairHead, attention_map, casn_objective, consistency_loss, frozen_statistics,
    join_distances, pair_distances, pooled_weights, covered_share, pulse, casn_distances,
    row_profile, siamese_indicator, soft_mask,
)
from reid_repro.evaluation import evaluate
from reid_repro.lab.configuration import declared
from reid_repro.ide import IDE
from reid_repro.pcb import PCB, strip_pool
from reid_repro.lab.provenance import project_root
from reid_repro.learning.recipe import Recipe, build_optimizer
from reid_repro.lab.results import reported
from reid_repro.lab.rows import plan, read_rows
from reid_repro.learning.augmentation import normalise
from reid_repro.learning.batches import PairBatches
from reid_repro.learning.training import embed, train

NETWORKS = [("ide", "none"), ("ide", "bn"), ("pcb", "none")]
OPTIONS = {  # what stands behind the base's name
    "": {"dropout": 0.0},
    "shared": {"dropout": 0.0, "shared": True}, "g": {"dropout": 0.0, "feature": "g"},
    "dropout": {"dropout": 0.5}, "raw": {"dropout": 0.0, "shared": True, "feature": "raw"},
    "fc": {"identity_head": "fc"},
}
MORE = [
    *NETWORKS,
    ("ide fc", "none"), ("pcb shared", "none"), ("pcb dropout", "none"), ("pcb raw", "none"),
]
MODULES = [(False, False), (True, False), (False, True), (True, True)]


def last_layer(model):
    "Of the identity classifier."
    return (
        model.net.classifier[-1]
        if isinstance(model.net.classifier, nn.Sequential)
        else model.net.classifier
    )


def network(base, neck="none", ia=True, sa=True, people=5, hidden=16, last_stride=1, seed=0):
    """A tiny CASN of its own weights, a classifier that says something, batch norms that differ
    from the identity.
    """
    torch.manual_seed(seed)
    base, _, option = base.partition(" ")
    own = {
        "parts": 4, "hidden": hidden, "identification_attention": ia, "siamese_attention": sa,
        **OPTIONS[option],
    }
    model = CASN(people, base=base, backbone="tiny", last_stride=last_stride, neck=neck, **own)
    with torch.no_grad():
        nn.init.normal_(last_layer(model).weight, std=0.5)
        for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            norm.weight.uniform_(0.5, 1.5), norm.bias.uniform_(-0.3, 0.3)
            norm.running_mean.uniform_(-0.2, 0.2), norm.running_var.uniform_(0.5, 1.5)
    return model


def outputs(model, images):
    "maps, f and scores of a batch, put together from the network's parts."
    maps = model.net.backbone(images)
    f = model.pool(maps)
    return maps, f, model.classify(f)


def grad_cam(score, maps):
    """M as the paper prints it: the gradient of a scalar by the whole map, its mean over positions,
    the weighted sum of channels.
    """
    gradient = torch.autograd.grad(score, maps, create_graph=True)[0]
    weights = gradient.mean(dim=(2, 3))
    return sum(weights[:, k, None, None] * maps[:, k] for k in range(maps.shape[1])).clamp(min=0)


def literal_maps(model, maps, f, scores, people, i, j):
    """Identification maps and both maps of the pairs (i, j), all by `grad_cam`, the indicator by
    automatic differentiation, too.
    """
    own = sum(
        scores[n, p, person]
        for n, person in enumerate(people.tolist())
        for p in range(scores.shape[1])
    )
    found = [grad_cam(own, maps)]
    firsts, seconds = [], []
    for a, b in zip(i.tolist(), j.tolist()):
        difference = (f[a] - f[b]).flatten().detach().requires_grad_()
        iota = (torch.autograd.grad(model.head(difference)[1], difference)[0] > 0).to(f.dtype)
        for rows, n in ((firsts, a), (seconds, b)):
            rows.append(grad_cam((iota * f[n].flatten()).sum(), maps)[n])
    none = maps[:0, 0]
    return [
        *found,
        torch.stack(firsts) if firsts else none, torch.stack(seconds) if seconds else none,
    ]


def profile_loop(attention, threshold):
    "M_m* of one map (h, w), row by row."
    rows = [
        max(attention[r, c] for c in range(attention.shape[1])) for r in range(attention.shape[0])
    ]
    passing = [r for r, value in enumerate(rows) if value > threshold * max(rows)] or list(
        range(len(rows))
    )
    first, last, steps = passing[0], passing[-1], len(rows) - 1
    stretched = []
    for n in range(len(rows)):
        whole, rest = divmod((last - first) * n, steps) if steps else (0, 0)
        low = rows[first + whole]
        stretched.append(low + rest / steps * (rows[first + whole + 1] - low) if rest else low)
    return torch.stack(stretched)


@pytest.mark.parametrize("height,parts", [(6, 1), (6, 3), (6, 4), (7, 3), (9, 6), (5, 5), (1, 1)])
def test_closed_form_is_grad_cam(height, parts):
    maps = random(3, 5, height, 4).requires_grad_()
    one, two = random(5 * parts, 6, seed=1).requires_grad_(), random(6, 1, seed=2).requires_grad_()
    f = strip_pool(maps, parts)
    score = (torch.tanh(f.flatten(1) @ one) @ two).sum()
    closed = attention_map(
        maps, pooled_weights(torch.autograd.grad(score, f, create_graph=True)[0], height * 4)
    )
    literal = grad_cam(score, maps)
    torch.testing.assert_close(closed, literal)
    assert (literal > 0).any() and closed.shape == (3, height, 4)
    weight = random(3, height, 4, seed=3)
    for ours, theirs in zip(
        *(
            torch.autograd.grad((m * weight).sum(), (maps, one, two), retain_graph=True)
            for m in (closed, literal)
        )
    ):
        torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(
        attention_map, (random(2, 3, 4, 2).requires_grad_(), random(2, 3, seed=1).requires_grad_())
    )


def test_attention_map_by_hand():
    maps = torch.tensor([[[[1.0, 2], [3, 4]], [[4, 3], [2, 1]]]])
    assert attention_map(maps, torch.tensor([[1.0, -1]])).tolist() == [[[0, 0], [1, 3]]]
    assert pooled_weights(torch.tensor([[[2.0, 4], [6, 8]]]), 4).tolist() == [
        [2, 3]
    ], "strips are added, positions divide"


def test_attention_keeps_the_precision_of_the_maps():
    maps, weights = (random(*shape, dtype=torch.float32) for shape in ((2, 300, 4, 2), (2, 300)))
    exact = attention_map(maps, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_map(maps, weights), exact)


def test_soft_mask_by_hand_and_at_its_limits():
    attention = torch.tensor([[[0.0, 2], [4, 1]], [[0, 0], [0, 0]], [[0, 0.02], [0.04, 0.01]]])
    mask = soft_mask(attention, (2, 2), slope=4, centre=0.25)
    sigma = lambda m: 1 / (1 + math.exp(-4 * (m - 0.25)))
    torch.testing.assert_close(
        mask[0, 0], torch.tensor([[sigma(0), sigma(0.5)], [sigma(1), sigma(0.25)]])
    )
    torch.testing.assert_close(mask[2], mask[0])  # each map is measured by its own maximum
    torch.testing.assert_close(mask[1], torch.full((1, 2, 2), sigma(0)))
    large = soft_mask(attention, (12, 6))
    assert (
        large.shape == (3, 1, 12, 6)
        and (large > 0).all()
        and (large < 1).all()
        and large[1].max() < 0.007
    )
    assert (
        large[0, 0, -1, 0] > 0.99 and large[0, 0, 0, 0] < 0.01
    ), "where the map is, there the picture is covered"
    expected = torch.sigmoid(
        10 * (F.interpolate((attention / 4)[:1, None], (12, 6), mode="bilinear") - 0.5)
    )
    torch.testing.assert_close(large[:1], expected)
    silent = torch.zeros(2, 3, 2, requires_grad=True)
    soft_mask(silent, (6, 4)).sum().backward()
    assert silent.grad.isfinite().all()
    check = lambda m: soft_mask(m, (6, 4), slope=2)
    assert torch.autograd.gradcheck(
        check, (random(2, 3, 2) ** 2 + 0.1).requires_grad_()
    ), "also through the maximum"


@pytest.mark.parametrize(
    "options,words",
    [
        *(({"slope": v}, f"slope {v}") for v in (0, -1.0, math.nan, math.inf)),
        *(({"centre": v}, f"centre {v}") for v in (-0.1, 1.1, math.nan)),
    ],
)
def test_soft_mask_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        soft_mask(torch.ones(1, 2, 2), (4, 4), **options)


def test_frozen_statistics():
    norms = nn.BatchNorm2d(3), nn.BatchNorm2d(4, momentum=None), nn.BatchNorm1d(16, momentum=0.3)
    net = nn.Sequential(norms[0], nn.Conv2d(3, 4, 1), norms[1], nn.Flatten(), norms[2])
    x = 5 + 3 * random(6, 3, 2, 2, dtype=torch.float32)
    record = lambda: [t for name, t in net.named_buffers() if "running" in name]
    net(x)
    before = [t.clone() for t in record()]
    with frozen_statistics(net):
        out = net(x + 7)
        first = net[0](x + 7)
    torch.testing.assert_close(record(), before, rtol=0, atol=0)
    assert [net[k].momentum for k in (0, 2, 4)] == [0.1, None, 0.3]
    # by the batch, not by the record
    torch.testing.assert_close(first.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(0, unbiased=False), torch.ones(16), atol=1e-2, rtol=0)
    with pytest.raises(KeyError), frozen_statistics(net):
        raise KeyError
    assert [net[k].momentum for k in (0, 2, 4)] == [0.1, None, 0.3], "also after an error"
    net(x + 7)
    assert not torch.equal(record()[0], before[0]), "afterwards they record again"


@pytest.mark.parametrize("width,hidden", [(1, 1), (6, 16), (40, 3)])
def test_pair_head_is_written_out_and_its_gradient_is_autograds(width, hidden):
    torch.manual_seed(0)
    head, d = PairHead(width, hidden).double(), random(50, width).requires_grad_()
    a = (d @ head.first.weight.T + head.first.bias).clamp(min=0)
    torch.testing.assert_close(head(d), a @ head.second.weight.T + head.second.bias)
    exact = torch.autograd.grad(head(d)[:, 1].sum(), d)[0]
    torch.testing.assert_close(head.gradient(d), exact)
    step = 1e-6 * F.one_hot(torch.tensor(0), width)
    slope = (head(d + step)[:, 1] - head(d - step)[:, 1]) / 2e-6
    torch.testing.assert_close(slope, exact[:, 0], atol=1e-6, rtol=1e-6)
    assert sum(p.numel() for p in head.parameters()) == width * hidden + hidden + 2 * hidden + 2


@pytest.mark.parametrize("width,hidden", [(0, 4), (4, 0)])
def test_pair_head_refuses(width, hidden):
    with pytest.raises(ValueError, match=f"width {width} and hidden {hidden}"):
        PairHead(width, hidden)


@pytest.mark.parametrize("parts", [1, 3])
def test_siamese_indicator_pair_by_pair(parts):
    torch.manual_seed(0)
    head = PairHead(4 * parts, 16).double()
    f1 = random(20, parts, 4).requires_grad_()
    f2 = random(20, parts, 4, seed=1).requires_grad_()
    indicator = siamese_indicator(head, f1, f2)
    for b in range(20):
        d = (f1[b] - f2[b]).flatten().detach().requires_grad_()
        expected = torch.autograd.grad(head(d)[1], d)[0] > 0
        assert indicator[b].flatten().tolist() == expected.tolist()
    assert (
        indicator.shape == f1.shape and indicator.dtype == f1.dtype and not indicator.requires_grad
    )
    assert (
        len({tuple(row) for row in indicator.flatten(1).tolist()}) > 2
    ), "another one for another pair"
    assert not torch.equal(siamese_indicator(head, f2, f1), indicator), "the order of a pair counts"
    head.second.bias.data += 9
    assert torch.equal(siamese_indicator(head, f1, f2), indicator), "a constant has no derivative"
    head.second.weight.data[0] += 9
    assert torch.equal(siamese_indicator(head, f1, f2), indicator), "z_1, not z_1 − z_0"
    head.first.weight.data.zero_()
    assert siamese_indicator(head, f1, f2).eq(0).all(), "a derivative of 0 is not above 0"


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9, 1.0])
def test_row_profile_is_the_loop(threshold):
    for height, width in [(1, 1), (1, 5), (2, 3), (5, 4), (9, 5), (24, 8)]:
        generator = torch.Generator().manual_seed(height)
        maps = torch.rand(30, height, width, generator=generator, dtype=torch.float64)
        maps *= torch.rand(30, height, 1, generator=generator) > 0.5  # silent rows
        maps[0] = 0
        maps[1:4] = torch.round(maps[1:4] * 10) / 10
        profile = row_profile(maps, threshold)
        torch.testing.assert_close(profile, torch.stack([profile_loop(m, threshold) for m in maps]))
        torch.testing.assert_close(
            row_profile(maps.view(5, 6, height, width), threshold), profile.view(5, 6, height)
        )
        torch.testing.assert_close(row_profile(maps.flip(-1), threshold), profile, rtol=0, atol=0)
        # upside down
        torch.testing.assert_close(row_profile(maps.flip(-2), threshold), profile.flip(-1))
        # a power of two is exact, and no row is at the threshold otherwise
        for scale in (1e-6, 4.0, 1e6):
            torch.testing.assert_close(
                row_profile(scale * maps[4:], threshold), scale * profile[4:]
            )


def test_row_profile_by_hand():
    rows = torch.tensor([0.0, 1, 4, 2, 0.1])
    profile = lambda t: row_profile(rows[:, None].expand(5, 3), t).tolist()
    assert profile(0.3) == [4, 3.5, 3, 2.5, 2]  # rows 2 and 3
    assert profile(0.25) == profile(0.3), "1 is not above 0.25·4"
    assert profile(0.2) == [1, 2.5, 4, 3, 2] and profile(0.9) == [4] * 5
    assert profile(0.0) == pytest.approx([1, 3.25, 3, 1.525, 0.1]) and profile(1.0) == rows.tolist()
    moved = torch.tensor([0.0, 0, 1, 4, 2])
    # where the person stands is gone
    torch.testing.assert_close(row_profile(moved[:, None], 0.2), row_profile(rows[:, None], 0.2))


def test_row_profile_gradient():
    maps = (random(6, 7, 3) ** 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: row_profile(m, 0.3), maps)
    for special in (
        torch.zeros(2, 5, 3), torch.ones(2, 5, 3), torch.eye(5).repeat(2, 1, 1),
        torch.ones(2, 1, 1),
    ):
        special = special.clone().requires_grad_()
        row_profile(special).sum().backward()
        assert special.grad.isfinite().all()


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan, math.inf])
def test_a_threshold_is_a_share(threshold):
    for call in (
        lambda: row_profile(torch.ones(2, 2), threshold),
        lambda: consistency_loss(torch.ones(1, 2, 2), torch.ones(1, 2, 2), threshold),
    ):
        with pytest.raises(ValueError, match=rf"threshold {threshold} must lie in \[0, 1\]"):
            call()


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_consistency_loss_is_the_loop(threshold):
    # no ties within a row
    first, second = (random(6, 9, 5, seed=s).abs().requires_grad_() for s in (0, 1))
    gaps = [
        sum((x - y) ** 2 for x, y in zip(profile_loop(a, threshold), profile_loop(b, threshold)))
        ** 0.5
        for a, b in zip(first, second)
    ]
    loss = consistency_loss(first, second, threshold)
    torch.testing.assert_close(loss, sum(gaps) / 6)
    torch.testing.assert_close(consistency_loss(second, first, threshold), loss)
    torch.testing.assert_close(
        torch.autograd.grad(loss, first), torch.autograd.grad(sum(gaps) / 6, first)
    )


@pytest.mark.parametrize("number", [0, 1, 4])
@pytest.mark.parametrize("kind", ["equal", "silent", "one silent", "both"])
def test_consistency_loss_is_never_nan(kind, number):
    a, b = (
        (random(number, 6, 3, seed=s, dtype=torch.float32).abs()).requires_grad_() for s in (0, 1)
    )
    pair = {"equal": (a, a), "silent": (0 * a, 0 * b), "one silent": (a, 0 * b), "both": (a, b)}[
        kind
    ]
    loss = consistency_loss(*pair)
    assert (
        loss.ndim == 0
        and loss.isfinite()
        and (loss < 1e-5 or (number and kind in ("one silent", "both")))
    )
    gradients = torch.autograd.grad(loss, (a, b), allow_unused=True)
    assert gradients[0] is not None and all(g is None or g.isfinite().all() for g in gradients)
    assert gradients[0].eq(0).all() or kind in ("one silent", "both")


@pytest.mark.parametrize("ia,sa", MODULES)
@pytest.mark.parametrize("base,neck", NETWORKS)
def test_casn_is_its_base_network_and_a_head(base, neck, ia, sa):
    model, images = network(base, neck, ia, sa), random(4, 3, 64, 48, dtype=torch.float32)
    plain = (
        IDE(5, backbone="tiny", last_stride=1, neck=neck)
        if base == "ide"
        else PCB(5, backbone="tiny", last_stride=1, parts=4, dropout=0.0)
    )
    plain.load_state_dict(model.net.state_dict())
    parts, width = (1, 128) if base == "ide" else (4, 4 * 64)
    extra = (128 * parts * 16 + 16 + 2 * 16 + 2) if sa else 0
    assert (
        sum(p.numel() for p in model.parameters())
        == sum(p.numel() for p in plain.parameters()) + extra
    )
    assert (
        model.identification_attention is ia
        and (model.head is not None) is sa
        and model.parts == parts
    )
    assert torch.equal(model.eval()(images), plain.eval()(images)) and model(images).shape == (
        4, width,
    )
    model.train(), plain.train()
    maps, f = model(images)[:2]
    assert maps.shape == (4, 128, 4, 3) and f.shape == (4, parts, 128)
    for rows, mean in zip(maps.tensor_split(parts, dim=2), f.unbind(1)):
        torch.testing.assert_close(mean, rows.mean((2, 3)))
    plain.load_state_dict(model.net.state_dict())
    scores = plain(images)[1].view(4, parts, 5)
    torch.testing.assert_close(model.classify(f), scores)
    assert not torch.allclose(scores[:, 0], scores[:, -1]) or parts == 1


@pytest.mark.parametrize(
    "options,words",
    [
        ({"base": "mgn"}, "base 'mgn' is unknown; take ide or pcb"),
        ({"base": "pcb", "neck": "bn"}, "neck 'bn' .* belong to base 'ide'"),
        ({"base": "pcb", "identity_head": "fc"}, "identity_head 'fc' belong to base 'ide'"),
        ({"identity_head": "two"}, "identity_head 'two' is unknown"),
        ({"neck": "bn", "identity_head": "fc"}, "both put a batch norm"),
        ({"base": "pcb", "feature": "f"}, "feature 'f' is unknown"),
        ({"base": "pcb", "dropout": 1.0}, "dropout is 1.0"), ({"neck": "ln"}, "neck 'ln'"),
        ({"base": "pcb", "parts": 0}, "parts is 0"), ({"hidden": 0}, "hidden 0"),
        ({"num_classes": 1}, "num_classes is 1"), ({"backbone": "huge"}, "huge"),
        ({"last_stride": 3}, "last_stride"),
    ],
)
def test_casn_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        CASN(**{"num_classes": 5, "backbone": "tiny", **options})


@pytest.mark.parametrize("base", ["ide", "pcb"])
def test_the_bases_own_arguments_reach_it(base):
    made = lambda **options: CASN(5, base=base, backbone="tiny", parts=2, hidden=4, **options).net
    heights = [
        made(last_stride=s).backbone(torch.zeros(1, 3, 128, 32)).shape[2]
        for s in (1, 2)
    ]
    assert heights == [8, 4]
    with pytest.raises(ValueError, match=r"weights 'none.*' is no file"):
        made(weights="none.safetensors")
    for options in ({"shared": True}, {"feature": "raw"}) if base == "pcb" else ():
        ours, plain = made(**options), PCB(5, backbone="tiny", parts=2, **options)
        assert list(ours.state_dict()) == list(plain.state_dict())
        assert ours.feature == plain.feature


def test_pcb_with_more_strips_than_rows_is_refused():
    with pytest.raises(ValueError, match="parts is 6"):
        CASN(5, base="pcb", backbone="tiny").train()(torch.zeros(2, 3, 64, 32))


@pytest.mark.parametrize("last_stride", [1, 2])
@pytest.mark.parametrize("base,neck", MORE)
def test_maps_and_their_gradients_in_every_weight(base, neck, last_stride):
    height = 64 if last_stride == 1 else 160  # PCB: 4 rows in 4 strips, 5 rows in 4 strips
    model = network(base, neck, last_stride=last_stride).double().train()
    images = random(4, 3, height, 48)
    people = torch.tensor([3, 0, 0, 4])
    i = torch.tensor([0, 1, 1])
    j = torch.tensor([2, 3, 2])
    maps, f, scores = outputs(model, images)
    ours = [model.identification_map(maps, f, scores, people), *model.pair_maps(maps, f, i, j)]
    theirs = literal_maps(model, maps, f, scores, people, i, j)
    for name, a, b in zip(("identification", "first", "second"), ours, theirs):
        assert b.max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)
    weights = dict(model.net.named_parameters())
    trained = [p for p in weights.values() if p.requires_grad]
    reached = 0
    for number in range(3):  # the gradient of each map by itself
        back = [
            torch.autograd.grad(
                m[number].square().mean(), trained, retain_graph=True, allow_unused=True
            )
            for m in (ours, theirs)
        ]
        for name, a, b in zip(weights, *back):
            assert (a is None) == (b is None), name
            if a is not None:
                torch.testing.assert_close(
                    a, b, rtol=1e-5, atol=1e-9 * b.abs().max().item() + 1e-14, msg=name
                )
                reached += bool(b.any())
    assert reached > len(trained)
    (own,) = torch.autograd.grad(ours[0].sum(), last_layer(model).weight, retain_graph=True)
    assert own.any(), "the identification map also trains the classifier"
    head = torch.autograd.grad(ours[1].sum(), list(model.head.parameters()), allow_unused=True)
    assert all(g is None for g in head), "the indicator passes none"


class Pass(nn.Module):
    "A backbone whose map is the picture's first two channels."

    channels = (2,)

    def forward(self, images):
        return images[:, :2]


def by_hand():
    """A network of two channels, two people and one hidden unit, and a view on three pictures of
    two rows and one column.
    """
    model = CASN(2, base="ide", backbone="tiny")
    model.net.backbone = Pass()
    model.net.classifier = nn.Linear(2, 2, bias=False)
    model.head = PairHead(2, 1)
    with torch.no_grad():
        model.net.classifier.weight.copy_(torch.eye(2))
        model.head.first.weight.copy_(torch.tensor([[1.0, -1]])), model.head.first.bias.fill_(2)
        model.head.second.weight.copy_(torch.tensor([[0.0], [1]])), model.head.second.bias.zero_()
    pictures = torch.tensor(
        [[[4.0, 0], [0, 2], [9, 9]], [[0, 2], [2, 2], [9, 9]], [[2, 2], [0, 0], [9, 9]]]
    )[..., None]
    return model.train(), lambda indices: pictures[indices].clone().requires_grad_()


@pytest.mark.parametrize("score", ["probability", "logit"])
def test_objective_by_hand(score):
    model, view = by_hand()  # f: (2, 1), (1, 2), (2, 0); people 0, 1, 0
    batch = torch.tensor([0, 0]), torch.tensor([2, 1]), torch.tensor([True, False])
    terms = casn_objective(torch.tensor([0, 1, 0]), score=score)(model, batch, view)
    # of the true one of two scores, `gap` above the other
    surprise = lambda gap: math.log(1 + math.exp(-gap))
    # covered and uncovered share where M is at its maximum, slope 10, β 0.5
    lit, left = 1 / (1 + math.exp(-5)), 1 / (1 + math.exp(5))
    # own channel of each, divided by its maximum: (1, 0), (1, 0), (1, 1), (1, 1); covered f of own
    # and other person:
    own, other = (2 * left, 2 * left, 2 * left, 2 * left), (lit, lit, 0, left)
    chance = [1 / (1 + math.exp(b - a)) for a, b in zip(own, other)]
    wanted = {
        "id": (3 * surprise(1) + surprise(2)) / 4,
        "ia": 0.5 * (sum(chance) if score == "probability" else sum(own)) / 4,
        # z_1 = 0 − 1 + 2 for the person twice, 1 + 1 + 2 for two persons; z_0 = 0
        "bce": 0.05 * (surprise(1) + surprise(-4)) / 2,
        # ι = (1, 0): M = (2, 0) and (1, 1), stretched (2, 2) and (1, 1)
        "consistency": 0.05 * 0.2 * math.sqrt(2),
    }
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(wanted, rel=1e-5)
    weighted = casn_objective(
        torch.tensor([0, 1, 0]), ia=2.0, sa=3.0, consistency=5.0, score=score
    )(model, batch, view)
    assert weighted["ia"].item() == pytest.approx(4 * wanted["ia"], rel=1e-5)
    assert weighted["bce"].item() == pytest.approx(60 * wanted["bce"], rel=1e-5)
    assert weighted["consistency"].item() == pytest.approx(
        60 * 25 * wanted["consistency"], rel=1e-5
    )
    smooth = casn_objective(torch.tensor([0, 1, 0]), smoothing=0.2)(model, batch, view)["id"].item()
    other_way = (3 * surprise(-1) + surprise(-2)) / 4
    assert smooth == pytest.approx(0.9 * wanted["id"] + 0.1 * other_way, rel=1e-5)


@cache
def made(people=6, each=4):
    "Pictures of people who differ in their colours, and their labels."
    coarse = pixels(people, seed=3).float()[:, None] + 25 * random(
        people, each, 3, 64, 32, dtype=torch.float32
    )
    return coarse.clamp(0, 255).to(torch.uint8).flatten(0, 1), torch.arange(
        people
    ).repeat_interleave(each)


def seeing(images):
    return lambda indices: normalise(images[indices]).contiguous(memory_format=torch.channels_last)


def test_dropout_is_seen_as_it_was_drawn():
    """What the mask hid has no say in the map: a strip whose numbers were all dropped gives none of
    its channels a weight.
    """
    model = network("pcb dropout").train()
    images, people = random(2, 3, 64, 48, dtype=torch.float32), torch.tensor([3, 0])
    maps, f, scores = outputs(model, images)
    own = scores.gather(2, people[:, None, None].expand(-1, 4, 1)).sum()
    hidden = torch.autograd.grad(own, f, retain_graph=True)[0] == 0
    assert 0.3 < hidden.float().mean() < 0.7, "half of the numbers were hidden"
    torch.testing.assert_close(
        model.identification_map(maps, f, scores, people), grad_cam(own, maps)
    )
    again = model.classify(f)
    assert not torch.allclose(again, scores), "another draw"
    assert torch.equal(model.eval().classify(f), model.classify(f)), "none when it is tested"


def test_two_layers_for_the_identity():
    model = network("ide fc").eval()
    first, norm, dropout, second = model.net.classifier
    assert (first.out_features, second.out_features, dropout.p) == (64, 5, 0.5) and isinstance(
        norm, nn.BatchNorm1d
    )
    f = random(3, 1, 128, dtype=torch.float32)
    z = f[:, 0] @ first.weight.T + first.bias
    z = (z - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(model.classify(f)[:, 0], z @ second.weight.T + second.bias)
    images = random(3, 3, 64, 48, dtype=torch.float32)
    start = CASN(300, backbone="tiny", identity_head="fc").net.classifier[3]
    assert 0.0009 < start.weight.std() < 0.0011 and start.bias.eq(0).all()
    # what is compared stays f
    torch.testing.assert_close(model(images), model.net.backbone(images).mean((2, 3)))
    assert CASN(5, backbone="resnet50", identity_head="fc").net.classifier[0].out_features == 512


@pytest.mark.parametrize("positive", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("base,neck", [*NETWORKS, ("ide fc", "none"), ("pcb dropout", "none")])
def test_objective_is_the_paper_written_out(base, neck, positive):
    images, labels = made()
    model = network(base, neck, people=6).train()
    batch = next(PairBatches(labels.numpy(), 4, positive).epoch(0))
    both = torch.cat(batch[:2])
    torch.manual_seed(7)  # dropout: for the images, then for the masked ones
    objective = casn_objective(labels, ia=0.7, sa=0.3, consistency=0.4)
    terms = objective(model, batch, seeing(images))
    torch.manual_seed(7)
    view, people, same = seeing(images)(both), labels[both], batch[2]
    maps, f, scores = outputs(model, view)
    pairs = same.nonzero()[:, 0]
    attention, first, second = literal_maps(model, maps, f, scores, people, pairs, pairs + 4)
    relative = attention / attention.amax((1, 2), keepdim=True).clamp(min=1e-12)
    large = F.interpolate(relative[:, None], view.shape[2:], mode="bilinear")
    cover = 1 / (1 + (-10 * (large - 0.5)).exp())
    _, _, masked = outputs(model, view * (1 - cover))
    strips = range(model.parts)
    wanted = {
        "id": sum(F.cross_entropy(scores[:, p], people) for p in strips),
        "ia": (
            0.7
            * torch.stack([masked[:, p].softmax(1)[torch.arange(8), people] for p in strips]).mean()
        ),
        "bce": 0.3 * F.cross_entropy(model.head((f[:4] - f[4:]).flatten(1)), same.long()),
        "consistency": (
            0.3
            * 0.4
            * sum(
                (profile_loop(a, 0.3) - profile_loop(b, 0.3)).norm() for a, b in zip(first, second)
            )
            / max(len(first), 1)
        ),
    }
    assert list(terms) == list(wanted)
    for name in wanted:
        torch.testing.assert_close(
            terms[name], torch.as_tensor(wanted[name]), rtol=1e-4, atol=2e-6, msg=name
        )
    weights = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(
        *(torch.autograd.grad(sum(t.values()), weights, allow_unused=True) for t in (terms, wanted))
    ):
        assert (a is None) == (b is None) and (a is None or a.isfinite().all())
        if a is not None:
            assert (a - b).norm() <= 1e-3 * b.norm() + 1e-5
    assert (terms["consistency"] == 0) == (positive == 0)


@pytest.mark.parametrize("ia,sa", MODULES)
def test_terms_follow_the_modules(ia, sa):
    images, labels = made()
    batch = next(PairBatches(labels.numpy(), 4).epoch(0))
    terms = {}
    for weights in ({}, {"ia": 0.0, "sa": 0.0}):
        model = network("ide", ia=ia, sa=sa, people=6).train()
        terms[len(weights)] = casn_objective(labels, **weights)(model, batch, seeing(images))
    assert list(terms[0]) == list(terms[2]) == ["id", *["ia"] * ia, *["bce", "consistency"] * sa]
    for name, term in terms[2].items():
        assert term == (terms[0]["id"] if name == "id" else 0)


@pytest.mark.parametrize("base,neck", NETWORKS)
def test_masked_images_are_covered_and_leave_no_record(base, neck):
    images, labels = made()
    model, plain = (network(base, neck, ia=ia, people=6).train() for ia in (True, False))
    seen, batch = [], next(PairBatches(labels.numpy(), 4).epoch(0))
    handles = [
        m.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].detach()))
        for m in (model, plain)
    ]
    for m in (model, plain):
        casn_objective(labels)(m, batch, seeing(images))
    assert len(seen) == 3, "with identification attention twice, without once"
    whole, covered, again = seen
    assert torch.equal(whole, again) and covered.shape == whole.shape
    with frozen_statistics(model):
        maps, f, scores = outputs(model, whole)
    attention = model.identification_map(maps, f, scores, labels[torch.cat(batch[:2])])
    kept = (1 - soft_mask(attention, whole.shape[2:])).detach()
    torch.testing.assert_close(covered, whole * kept)
    assert (covered.abs() <= whole.abs()).all() and kept.amin(
        (1, 2, 3)
    ).median() < 0.02, "most maps have a maximum, which is covered"
    for name, buffer in model.named_buffers():
        assert "running" not in name or torch.equal(buffer, dict(plain.named_buffers())[name]), name
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    "options,words",
    [
        *(
            ({name: v}, f"{name} {v}")
            for name in ("ia", "sa", "consistency")
            for v in (-0.1, math.nan, math.inf)
        ),
        *(({"smoothing": v}, f"smoothing {v}") for v in (1, 1.5, -0.1, math.nan)),
        ({"score": "odds"}, "score 'odds' is unknown; take prob"),
    ],
)
def test_objective_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        casn_objective(torch.zeros(3, dtype=torch.int64), **options)


def trained(base="ide", neck="none", seed=0, batches=PairBatches, out=None, **recipe):
    images, labels = made()
    model, pairs = network(base, neck, people=6, seed=seed), batches(labels.numpy(), 4, seed=seed)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {"epochs": 2, "batch_size": 4, "lr": 1e-3, "steps": 2} | recipe
    run = lambda: train(
        model, casn_objective(labels), images, pairs, Recipe(**options), seed, out=out, device="cpu"
    )
    try:
        history = run()
    except Killed:
        model = network(base, neck, people=6, seed=seed + 1)  # whatever was in memory is lost
        history = run()
    return model, history, before


@pytest.mark.parametrize("base,neck", NETWORKS)
def test_two_steps_move_everything_and_depend_on_the_seed_alone(base, neck, capsys):
    model, history, before = trained(base, neck)
    assert (
        not model.training
        and np.isfinite(history.to_numpy()).all()
        and history["step"].tolist() == [2]
    )
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
    again, same, _ = trained(base, neck)
    terms = ["loss", "id", "ia", "bce", "consistency"]
    assert history[terms].equals(same[terms])
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())
    )
    assert not history[terms].equals(trained(base, neck, seed=1)[1][terms])


def test_a_killed_run_continues_to_the_same_numbers(tmp_path, capsys):
    options = dict(epochs=3, steps=0, flip=0.5, pad=2)
    (model, history, _) = trained(**options)
    (other, resumed, _) = trained(batches=fragile(PairBatches), out=tmp_path, **options)
    terms = ["epoch", "step", "lr", "loss", "id", "ia", "bce", "consistency"]
    assert len(history) == 3 and history[terms].equals(resumed[terms])
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("base,neck", NETWORKS)
def test_mixed_precision_trains(base, neck, capsys):
    _, exact, _ = trained(base, neck, steps=1)
    _, mixed, _ = trained(base, neck, steps=1, precision="bf16")
    for name, slack in {"id": 0.05, "ia": 0.02, "bce": 0.002, "consistency": 0.004}.items():
        assert mixed[name].item() == pytest.approx(exact[name].item(), rel=0.1, abs=slack), name


@pytest.mark.parametrize("base,neck", NETWORKS)
def test_every_term_is_computed_in_float32(base, neck, capsys):
    images, labels = made()
    kinds, plain = {}, casn_objective(labels)

    def objective(*call):
        terms = plain(*call)
        kinds.update({name: term.dtype for name, term in terms.items()})
        return terms

    recipe = Recipe(epochs=1, batch_size=4, steps=1, precision="bf16")
    train(
        network(base, neck, people=6), objective, images, PairBatches(labels.numpy(), 4), recipe,
        device="cpu",
    )
    assert kinds == dict.fromkeys(("id", "ia", "bce", "consistency"), torch.float32)


def test_the_head_has_a_rate_of_its_own():
    model, recipe = network("ide"), Recipe(lr=0.1, head_lr=10.0)
    rates = {
        id(p): group["lr"]
        for group in build_optimizer(model, recipe).param_groups
        for p in group["params"]
    }
    for name, p in model.named_parameters():
        assert rates[id(p)] == (0.1 if ".backbone." in name else 1.0), name


def test_it_learns(capsys):
    model, history, _ = trained(epochs=12, steps=0, lr=3e-3, flip=0.0)
    assert (
        history["id"].iloc[-1] < 0.5 * history["id"].iloc[0]
        and history["bce"].iloc[-1] < history["bce"].iloc[0]
    )
    images, labels = made()
    dist = casn_distances(model, images[::4], images, device="cpu")
    for query, gallery in ((images[:0], images), (images, images[:0]), (images[..., :-8], images)):
        with pytest.raises(ValueError, match="need an image at least, of one size"):
            casn_distances(model, query, gallery, device="cpu")
    dist[torch.arange(6), torch.arange(0, 24, 4)] = torch.inf
    assert (labels[dist.argmin(1)] == torch.arange(6)).float().mean() > 0.6


def normalised(d):
    return torch.stack([(row - row.min()) / (row.max() - row.min()) for row in d])


@cache
def pair_by_pair(base, neck, swapped=False, queries=5):
    """(network, queries, gallery, distance of unit features, distance of profiles) with one pair at
    a time.
    """
    model, images = network(base, neck).eval(), pixels(12, height=80)
    with torch.no_grad():
        maps, f, _ = outputs(model, normalise(images))
        features = F.normalize(model(normalise(images)), dim=1)
    near, gaps = torch.empty(queries, 12 - queries), torch.empty(queries, 12 - queries)
    for a in range(queries):
        for b in range(queries, 12):
            d = (f[b] - f[a] if swapped else f[a] - f[b]).flatten().requires_grad_()
            iota = (torch.autograd.grad(model.head(d)[1], d)[0] > 0).float().view_as(f[a])
            weights = iota.sum(0) / maps[0, 0].numel()
            first, second = (
                profile_loop(torch.einsum("k,khw->hw", weights, maps[n]).relu(), 0.3)
                for n in (a, b)
            )
            gaps[a, b - queries] = (first - second).norm()
            near[a, b - queries] = (features[a] - features[b]).norm()
    return model, images[:queries], images[queries:], near, gaps


@pytest.mark.parametrize(
    "base,neck",
    [("pcb shared", "none"), ("pcb g", "none"), ("pcb raw", "none"), ("ide fc", "none")],
)
def test_the_two_parts_of_the_ranking(base, neck):
    model, query, gallery, near, gaps = pair_by_pair(base, neck)
    features, attention = pair_distances(model, query, gallery, device="cpu")
    torch.testing.assert_close(features, near, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(attention, gaps, atol=1e-4, rtol=1e-4)
    both = casn_distances(model, query, gallery, device="cpu")
    assert (
        torch.equal(join_distances(features, attention), both)
        and join_distances(features, None) is features
    )


@pytest.mark.parametrize("base,neck", NETWORKS)
def test_ranking_is_pair_by_pair(base, neck):
    model, query, gallery, near, gaps = pair_by_pair(base, neck)
    assert len(gaps.unique()) > 20, "pairs differ"
    for memory in (3_200, 4_000, 30_000, 200_000, 2**29):
        dist = casn_distances(model, query, gallery, batch_size=3, memory=memory, device="cpu")
        assert dist.shape == (5, 7) and dist.dtype == torch.float32
        torch.testing.assert_close(
            dist, normalised(near) + normalised(gaps), atol=1e-4, rtol=1e-4
        )


def test_a_ranking_looks_at_so_many_images_at_a_time():
    model, seen = network("ide"), []
    model.net.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    casn_distances(model, pixels(5), pixels(4), batch_size=3, device="cpu")
    assert seen == [3, 2, 3, 1]


@pytest.mark.parametrize("base,neck", NETWORKS)
def test_queries_stand_first_in_a_pair(base, neck):
    model, query, gallery, _, gaps = pair_by_pair(base, neck)
    other = pair_by_pair(base, neck, swapped=True)[-1]
    assert not torch.allclose(gaps, other, atol=1e-3)
    back = pair_distances(model, gallery, query, device="cpu")[1].T
    torch.testing.assert_close(back, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("base,neck", NETWORKS)
def test_a_photograph_is_nearest_to_itself(base, neck):
    model, images = pair_by_pair(base, neck)[0], pixels(12, height=80)
    dist = casn_distances(model, images, images, device="cpu")
    assert (dist.diagonal() < dist.clone().fill_diagonal_(torch.inf).amin(1)).all()
    torch.testing.assert_close(dist.diagonal(), torch.zeros(12), atol=1e-3, rtol=0)
    assert dist.min() >= 0 and dist.max() <= 2


@pytest.mark.parametrize("base,neck", NETWORKS)
def test_without_a_head_the_order_is_that_of_cosines(base, neck):
    model, images = network(base, neck, sa=False), pixels(12, height=80)
    dist = casn_distances(model, images[:5], images[5:], device="cpu")
    features = F.normalize(embed(model, images, device="cpu"), dim=1).double()
    cosines = features[:5] @ features[5:].T
    torch.testing.assert_close(
        dist.double(), (2 - 2 * cosines).clamp(min=0).sqrt(), atol=1e-4, rtol=1e-4
    )
    assert torch.equal(dist.argsort(1), cosines.argsort(1, descending=True))


def test_equal_galleries_and_single_pairs_are_ranked():
    model, images = network("ide"), pixels(3)
    assert casn_distances(model, images[:1], images[1:2], device="cpu").tolist() == [[0]]
    same = casn_distances(model, images[:2], images[2:].expand(4, -1, -1, -1), device="cpu")
    assert same.isfinite().all()


@pytest.mark.parametrize(
    "options,words",
    [
        ({"memory": 0}, "memory must be a whole number"), ({"device": "tpu"}, "device 'tpu'"),
    ],
)
def test_ranking_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        casn_distances(network("ide"), pixels(2), pixels(3), **{"device": "cpu", **options})


def test_a_tenth_of_the_rate_is_the_backbones_alone():
    jobs = {job.row.name: job for job in plan("paper", "casn") if job.row.paper == "casn"}
    for name in ("ide", "casn_ide", "pcb", "casn_pcb"):
        literal, tenth = (
            {**jobs[row].parameters, **jobs[row].row.set} for row in (name, f"{name}_tenth")
        )
        assert (
            literal.pop("lr") == pytest.approx(10 * tenth.pop("lr"))
            and literal.pop("head_lr") == 1
            and tenth.pop("head_lr") == 10
        )
        assert literal == tenth


def test_longer_rows_train_longer():
    for profile, pairs in {
        "study": [("ide", "ide_longer")],
        "photographs": [("ide", "ide_longer"), ("pcb", "pcb_longer")],
    }.items():
        jobs = {job.row.name: {**job.parameters, **job.row.set} for job in plan(profile, "casn")}
        for short, long in pairs:
            assert jobs[long]["epochs"] >= 2.3 * jobs[short]["epochs"]
            assert {**jobs[short], "epochs": 0} == {**jobs[long], "epochs": 0}


def pulsed(positive, negative):
    """Pulse of `by_hand`'s network whose attention is one channel, on two people under two cameras,
    with profiles made to order.
    """
    model, _ = by_hand()
    # ι = (1, 0) wherever the hidden unit is active
    model.head.first.weight.data = torch.tensor([[1.0, 0.0]])
    model.head.first.bias.data.fill_(100.0)
    images = torch.full((4, 3, 2, 1), 116, dtype=torch.uint8)
    # a person's first and second photograph, then the other's
    for n, column in enumerate((*positive, *negative)):
        images[n, 0, :, 0] = torch.tensor(column, dtype=torch.uint8)
    ids = np.array([1, 2]), np.array([0, 0]), np.array([1, 2]), np.array([1, 1])
    rows = torch.tensor([0, 2]), torch.tensor([1, 3])
    return pulse(model, images[rows[0]], images[rows[1]], *ids, device="cpu")


def test_pulse_by_hand():
    same = pulsed(([184, 254], [184, 254]), ([254, 184], [254, 184]))
    assert same["agreement"] == pytest.approx(
        1, abs=1e-4
    ), "profiles of one person are the same, those of two are not"
    assert same["cosine_gap"] == pytest.approx(1 - 2 * 60 * 130 / (60**2 + 130**2), abs=0.01)
    assert same["block_attention"] == pytest.approx(100) and same["block_both"] == pytest.approx(
        100
    )
    alike = pulsed(([184, 254], [184, 254]), ([184, 254], [184, 254]))
    assert alike["cosine_gap"] == pytest.approx(0, abs=1e-5) and alike[
        "block_attention"
    ] == pytest.approx(50), "ties count against"
    crossed = pulsed(([184, 254], [254, 184]), ([254, 184], [184, 254]))
    assert (
        crossed["agreement"] < -1e6 and crossed["cosine_gap"] < -0.2
    ), "each agrees with the other person alone"


def test_pulse_leaves_out_what_takes_no_rank():
    "Junk makes neither positive nor negative pairs; distractors make negative ones."
    model, images = network("ide", "none", False, True), pixels(12, height=80)
    alone = pulse(
        model, images[:2], images[2:6], np.array([1, 2]), np.array([1, 1]),
        np.array([1, 2, 0, 0]), np.array([2, 2, 1, 2]), device="cpu",
    )
    joined = pulse(
        model, images[:2], images[2:8], np.array([1, 2]), np.array([1, 1]),
        np.array([1, 2, 0, 0, -1, -1]), np.array([2, 2, 1, 2, 2, 1]), device="cpu",
    )
    for beat in ("block_features", "block_attention", "agreement", "cosine_gap"):
        assert joined[beat] == pytest.approx(alone[beat], abs=1e-5), beat


def test_covered_share_by_hand():
    # two rows and one column; channels are red and green, the own score is that of the own channel
    model, _ = by_hand()
    images = torch.full((2, 3, 2, 1), 116, dtype=torch.uint8)
    # each lit at one place
    images[0, 0, :, 0], images[1, 1, :, 0] = torch.tensor([255, 124]), torch.tensor([116, 255])
    whole, left = [], []
    for n in range(2):
        a = normalise(images[n : n + 1])[0, :2, :, 0]
        own, other = a[n].relu(), a[1 - n]
        kept = torch.tensor(
            [1 - 1 / (1 + math.exp(-10 * (m / own.max().item() - 0.5))) for m in own.tolist()]
        )
        whole.append(1 / (1 + math.exp(other.mean() - a[n].mean())))
        left.append(1 / (1 + math.exp((kept * other).mean() - (kept * a[n]).mean())))
    found = covered_share(model, images, torch.tensor([0, 1]), device="cpu")
    assert found == pytest.approx(sum(left) / sum(whole), rel=1e-4) and found < 0.9
    model.net.classifier.weight.data.zero_()
    assert covered_share(model, images, torch.tensor([0, 1]), device="cpu") == pytest.approx(1)


def test_covered_share_counts_every_image_and_every_strip():
    model, (images, labels) = network("pcb", people=6).eval(), made()
    images, labels = images.repeat(3, 1, 1, 1)[:66], labels.repeat(3)[:66]  # more than a chunk
    view = normalise(images)
    maps, f, scores = outputs(model, view)
    attention = model.identification_map(maps, f, scores, labels).detach()
    masked = outputs(model, view * (1 - soft_mask(attention, view.shape[2:])))[2]
    left, whole = (z.softmax(2)[torch.arange(66), :, labels] for z in (masked, scores))
    assert covered_share(model, images, labels, device="cpu") == pytest.approx(
        (left.mean() / whole.mean()).item(), rel=1e-4
    )


@pytest.mark.parametrize(
    "base,neck,ia,sa",
    [
        ("ide", "bn", True, True), ("ide fc", "none", False, False),
        ("pcb dropout", "none", True, True),
    ],
)
def test_pulse_leaves_the_network_as_it_was(base, neck, ia, sa):
    model, images = network(base, neck, ia, sa).train(), pixels(12, height=80)
    model.net.backbone.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = (
        np.arange(4) + 1, np.zeros(4, dtype=np.int64), np.arange(8) % 4 + 1,
        np.ones(8, dtype=np.int64),
    )
    beats = pulse(
        model, images[:4], images[4:],
        *ids,
        images=images[:6], labels=torch.arange(6) % 5, device="cpu",
    )
    ranking = (
        {"block_features", "block_attention", "block_both", "agreement", "cosine_gap"}
        if sa
        else {"block_features"}
    )
    assert set(beats) == {*ranking, "covered_share"} and all(
        math.isfinite(value) for value in beats.values()
    )
    assert "covered_share" not in pulse(model, images[:4], images[4:], *ids, device="cpu")
    assert model.training and model.net.training and not model.net.backbone.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    parts = pair_distances(model, images[:4], images[4:], device="cpu")
    ranked = {"features": parts[0], "attention": parts[1], "both": join_distances(*parts)}
    for name, dist in ranked.items() if sa else [("features", parts[0])]:
        mAP = 100 * float(evaluate(dist, *ids).mAP)
        assert beats[f"block_{name}"] == pytest.approx(mAP, abs=1e-6) and mAP < 100
    if sa:  # pair by pair, in evaluation mode
        cosines = torch.empty(4, 8)
        with torch.no_grad():
            maps, f, _ = outputs(model, normalise(images))
            for a, b in np.ndindex(4, 8):
                pair = model.pair_maps(maps, f, torch.tensor([a]), torch.tensor([4 + b]))
                cosines[a, b] = F.cosine_similarity(*(m.flatten(1) for m in pair))
        same = torch.arange(8) % 4 == torch.arange(4)[:, None]
        assert beats["cosine_gap"] == pytest.approx(
            (cosines[same].mean() - cosines[~same].mean()).item(), abs=1e-4
        )


def test_every_row_of_table_3_is_there():
    rows = {row.name: row for row in read_rows("casn")}
    every = reported("casn")
    own = every.query("own")
    named = {(key["table"], key["row"]) for row in rows.values() for key in row.reported}
    quoted = {("3", "IDE"), ("3", "PCB")}  # the baselines, from the PCB paper
    assert named == set(zip(own["table"], own["row"])) | quoted and not quoted & set(
        zip(own["table"], own["row"])
    )
    third = {
        key["row"]: row for row in rows.values() for key in row.reported if key["table"] == "3"
    }
    assert set(third) == {
        f"{base}{module}" for base in ("IDE", "PCB") for module in ("", " + IA", " + SA")
    } | {"CASN(IDE)", "CASN(PCB)"}
    for row in rows.values():
        for key in row.reported:
            printed = every[(every["table"] == key["table"]) & (every["row"] == key["row"])]
            assert set(printed["dataset"]) <= set(row.datasets), (row.name, key)
    for name, row in third.items():
        assert (row.set.get("ia", 1) > 0) == ("IA" in name or "CASN" in name)
        assert (row.set.get("sa", 1) > 0) == ("SA" in name or "CASN" in name)
        assert (row.set.get("base", "ide") == "pcb") == ("PCB" in name)
    assert {job.row.name for job in plan("paper", "casn/table3")} == {
        row.name for row in third.values()
    }


@pytest.mark.parametrize("profile", ["smoke", "study", "short", "paper", "photographs"])
def test_every_job_builds(profile):
    defaults = declared(project_root() / read_rows("casn")[0].notebook)
    # a row may begin with another paper's
    jobs = {job.row.name: job for job in plan(profile, "casn") if job.row.paper == "casn"}
    assert {"ide", "ide_ia", "ide_sa", "casn_ide"} <= set(jobs)
    for name, job in jobs.items():
        assert set(job.row.set) <= set(defaults), name
        chosen = (
            {key: default for key, (_, default) in defaults.items()}
            | job.parameters
            | job.row.set
            | {"backbone": "tiny", "hidden": 8}
        )
        model = methods.build("casn", chosen, 7)
        size = (chosen["height"], chosen["width"]) if profile != "paper" else (chosen["height"], 64)
        with torch.no_grad():
            width = 64 if chosen["base"] == "pcb" and chosen["strip_feature"] == "h" else 128
            assert model.eval()(torch.zeros(1, 3, *size)).shape == (1, width * model.parts), name
        parameters = sum(p.numel() for p in model.head.parameters()) if model.head else 0
        assert (parameters > 0) == ("sa" in name or "casn" in name)
        assert model.identification_attention == ("ia" in name or "casn" in name)
        assert isinstance(model.net.classifier, nn.Sequential) == name.endswith("_fc")
        if chosen["base"] == "pcb":
            # what is pretrained bears it
            assert model.net.dropout.p == (0.0 if profile == "photographs" else 0.5), name
            assert model.net.feature == "h" and hasattr(model.net.reduce, "norm"), name


def test_the_smoke_run_is_small_and_the_papers_is_the_papers():
    (smoke,) = (job for job in plan("smoke", "casn/casn_ide") if job.dataset == "toytown")
    wanted = {
        "epochs": 8, "batch_size": 16, "backbone": "tiny", "last_stride": 1, "height": 128,
        "width": 64,
    }
    assert {key: smoke.parameters[key] for key in wanted} == wanted and smoke.seed == 0
    for name in ("casn_ide", "casn_pcb"):
        parameters = next(job.parameters for job in plan("paper", f"casn/{name}"))
        recipe = {
            "optimizer": "sgd", "lr": 0.03, "epochs": 40, "milestones": [30], "batch_size": 16,
            "backbone": "resnet50",
        }
        assert {key: parameters[key] for key in recipe} == recipe  # §4
        size = [parameters[key] for key in ("height", "width", "last_stride")]
        assert size == ([288, 144, 2] if name == "casn_ide" else [384, 128, 1])
