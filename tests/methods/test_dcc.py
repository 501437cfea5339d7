"""DCC: co-attention and windows against loops, the folded comparator against single pairs, losses
by hand, the ranking pair by pair.
"""

import itertools
import math
import os
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made import Killed, fragile, pixels, random
from torch import nn

from reid_repro.lab.configuration import declared
from reid_repro import dcc
from reid_repro.dcc import (
    DCC, Comparator, affinity, coattention, dcc_objective, episode_loss, filter_bank, glimpse,
    compare_lean, pair_metric, prepared, pulse, dcc_distances,
)
from reid_repro.evaluation import evaluate
from reid_repro.evaluation.metric_learning import kissme, pair_covariances
from reid_repro.lab.provenance import project_root
from reid_repro.learning.recipe import Recipe, lr_factor
from reid_repro.lab.results import reported
from reid_repro.lab.rows import plan, read_rows
from reid_repro.learning.augmentation import normalise
from reid_repro.learning.batches import IdentityBatches, PairBatches
from reid_repro.learning.checkpoints import load_checkpoint
from reid_repro.learning.training import train

FUSIONS = ("glimpse", "irnn", "irnn2", "spp", "gp")
CASES = [
    *({"fusion": f} for f in FUSIONS), {"literal": True}, {"literal": True, "fusion": "spp"},
    {"concat_features": True}, {"concat_features": True, "literal": True}, {"scaled": False},
    {"window": 1}, {"window": 3, "kernel": "gaussian"}, {"centre": "divide"}, {"stride": "printed"},
    {"start": "identity", "glimpses": 1}, {"affinity": "cosine"},
    {"affinity": "cosine", "literal": True, "concat_features": True},
    {"affinity": "cosine", "fusion": "gp", "start": "identity"},
]


def network(seed=0, **options):
    """A tiny DCC whose windows move and whose scores differ, and batch norms that are not the
    identity.
    """
    torch.manual_seed(seed)
    model = DCC(backbone="tiny", **{"hidden": 12, "glimpses": 3, "dropout": 0.0, **options})
    with torch.no_grad():
        if isinstance(model.fusion, Comparator):
            model.fusion.window_head.weight.normal_(std=2)
        model.affinity.add_(0.3 * torch.randn_like(model.affinity))
        model.head.weight.normal_()
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 1.5), norm.bias.uniform_(-0.3, 0.3)
            norm.running_mean.uniform_(-0.2, 0.2), norm.running_var.uniform_(0.5, 1.5)
    return model


def bank(params, size, K, centre="multiply", stride="arc", kernel="cauchy"):
    "Eq. 8 to 10 number by number: F_Y, F_X as lists of rows."
    gx, gy, d = (float(v) for v in params)
    gamma, out = math.exp(1 - 2 * abs(d)), []
    for g, n in ((gy, size[0]), (gx, size[1])):
        delta = n / K * (1 - abs(d)) if stride == "arc" else max(size) / (K - 1) * abs(d)
        rows = []
        for i in range(1, K + 1):
            off = i - K / 2 - 0.5
            mu = (n - 1) * (g + 1) / 2 + (off * delta if centre == "multiply" else off / delta)
            if kernel == "cauchy":
                row = [1 / (math.pi * gamma * (1 + ((p - mu) / gamma) ** 2)) for p in range(n)]
            else:
                row = [math.exp(-((p - mu) ** 2) / (2 * gamma**2)) for p in range(n)]
            rows.append([v / sum(row) for v in row])
        out.append(rows)
    return out


def one_pair(model, A, B, masks=None):
    """u of one pair of maps (C, H, W), from the equations alone, in loops; the rivals from their
    modules on Z.

    `masks`: what dropout leaves of the units, for each step and for the score."""
    C, H, W = A.shape
    Qa, Qb = A.flatten(1), B.flatten(1)
    L = torch.zeros(H * W, H * W, dtype=A.dtype)
    for i, j in itertools.product(range(H * W), repeat=2):
        if model.temperature is None:
            L[i, j] = Qb[:, i] @ (model.affinity @ Qa[:, j]) / (C**0.5 if model.scaled else 1)
        else:
            one = Qb[:, i] - Qb.sum(1) / (H * W)
            two = model.affinity @ (Qa[:, j] - Qa.sum(1) / (H * W))
            L[i, j] = model.temperature * (one @ two) / (one.norm() * two.norm())
    rows = lambda m: torch.stack([row.exp() / row.exp().sum() for row in m])
    Aa, Ab = rows(L), rows(L.T)
    Za, Zb = torch.zeros_like(Qa), torch.zeros_like(Qb)
    for p, r in itertools.product(range(H * W), repeat=2):
        Za[:, p] += Qb[:, r] * (Aa[r, p] if model.literal else Ab[p, r])
        Zb[:, p] += Qa[:, r] * (Ab[r, p] if model.literal else Aa[p, r])
    Za, Zb = (torch.cat([Z, Q]) if model.concat_features else Z for Z, Q in ((Za, Qa), (Zb, Qb)))
    Za, Zb = (Z.unflatten(1, (H, W)) for Z in (Za, Zb))
    if not isinstance(model.fusion, Comparator):
        e = model.fusion(Za[None], Zb[None])[0]
        return e @ model.head.weight[0] + model.head.bias[0]
    net = model.fusion
    masks = masks or [torch.ones(net.width)] * (net.steps + 1)
    h = c = torch.zeros(net.width)
    for t in range(net.steps):
        FY, FX = bank(
            (net.window_head.weight @ (h * masks[t])).tanh(), (H, W), net.window, **net.readings
        )
        Z, x = (Zb if t % 2 else Za), []
        for k, n in itertools.product(range(net.window), repeat=2):
            weights = torch.tensor(FY[k])[:, None] * torch.tensor(FX[n])
            x.append((Z * weights).sum((1, 2)))
        gates = (
            net.cell.weight_ih @ torch.cat(x)
            + net.cell.bias_ih
            + net.cell.weight_hh @ h
            + net.cell.bias_hh
        )
        i, f, g, o = gates.chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return (h * masks[-1]) @ model.head.weight[0] + model.head.bias[0]


# ---------------------------------------------------------------- equations


def test_affinity_entry_by_entry_and_its_gradient():
    Qa, Qb, W = random(3, 5), random(3, 4, seed=1), random(3, 3, seed=2)
    L = affinity(Qa, Qb, W, scaled=False)
    for i, j in itertools.product(range(4), range(5)):
        assert L[i, j].item() == pytest.approx(
            sum((Qb[k, i] * W[k, n] * Qa[n, j]).item() for k in range(3) for n in range(3))
        )
    torch.testing.assert_close(affinity(Qa, Qb, W) * 3**0.5, L)
    assert torch.autograd.gradcheck(affinity, tuple(x.requires_grad_() for x in (Qa, Qb, W)))


def test_cosines_do_not_see_what_all_positions_share():
    Qa, Qb, W = random(3, 5), random(3, 4, seed=1), random(3, 3, seed=2)
    L = affinity(Qa, Qb, W, temperature=7.0)
    one, two = Qb - Qb.mean(1, keepdim=True), W @ (Qa - Qa.mean(1, keepdim=True))
    torch.testing.assert_close(
        L, 7 * F.cosine_similarity(one[:, :, None], two[:, None], dim=0), rtol=1e-4, atol=1e-4
    )
    assert L.abs().max() <= 7
    shared = random(3, 1, seed=4)
    torch.testing.assert_close(
        affinity(9 * Qa + 50 * shared, 4 * Qb - 20 * shared, W, temperature=7.0), L, rtol=1e-4,
        atol=1e-4,
    )
    still = affinity(torch.ones(3, 5), Qb.float(), W.float(), temperature=7.0)
    assert torch.equal(
        still, torch.zeros(4, 5)
    ), "an image without any contrast attends to all alike"
    slopes = lambda a, b, w, t: affinity(a, b, w, temperature=t)
    temperature = torch.tensor(3.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        slopes, tuple(x.requires_grad_() for x in (Qa, Qb, W, temperature))
    )


@pytest.mark.parametrize("shape", [(5, 5), (3, 4), (4, 4)])
def test_affinity_refuses_weights_between_positions(shape):
    with pytest.raises(ValueError, match="maps of 3 channels need 3×3"):
        affinity(random(3, 5), random(3, 5), torch.zeros(shape))


def test_summaries_are_means_of_the_other_image():
    Qa, Qb, W = random(4, 3, 6), random(4, 3, 5, seed=1), random(3, 3, seed=2)
    Za, Zb = coattention(Qa, Qb, W)
    assert Za.shape == Qa.shape and Zb.shape == Qb.shape
    for Z, Q in ((Za, Qb), (Zb, Qa)):  # within the other's range
        assert (Z <= Q.amax(2, keepdim=True) + 1e-12).all() and (
            Z >= Q.amin(2, keepdim=True) - 1e-12
        ).all()
    L = affinity(Qa, Qb, W)
    # over gallery positions
    torch.testing.assert_close(Za, torch.einsum("nci,nij->ncj", Qb, L.softmax(1)))
    torch.testing.assert_close(Zb, torch.einsum("ncj,nij->nci", Qa, L.softmax(2)))
    literal = coattention(Qa, Qb, W, literal=True)
    torch.testing.assert_close(literal[0], Qb @ L.softmax(2))  # Q_b A_a, as printed
    torch.testing.assert_close(literal[1], Qa @ L.transpose(1, 2).softmax(2))
    assert not torch.allclose(literal[0], Za)


def test_a_sharp_affinity_permutes():
    Qa = 60 * torch.eye(4)
    order = torch.tensor([2, 0, 3, 1])
    Za, Zb = coattention(Qa, Qa[:, order], torch.eye(4))
    # what belongs together finds itself
    torch.testing.assert_close(Za, Qa), torch.testing.assert_close(Zb, Qa[:, order])


@pytest.mark.parametrize(
    "centre,stride,kernel",
    [
        ("multiply", "arc", "cauchy"), ("divide", "arc", "cauchy"),
        ("multiply", "printed", "cauchy"), ("multiply", "arc", "gaussian"),
    ],
)
@pytest.mark.parametrize("size,K", [((14, 14), 2), ((8, 4), 3), ((5, 9), 4), ((14, 14), 12)])
def test_filters_number_by_number(centre, stride, kernel, size, K):
    readings = {"centre": centre, "stride": stride, "kernel": kernel}
    params = random(40, 3).tanh()
    FY, FX = filter_bank(params, size, K, **readings)
    assert FY.shape == (40, K, size[0]) and FX.shape == (40, K, size[1])
    for n in range(40):
        for ours, theirs in zip((FY[n], FX[n]), bank(params[n], size, K, **readings)):
            torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64))


def test_the_first_window_covers_the_map_in_our_reading_alone():
    start = torch.zeros(3)
    FY, FX = filter_bank(start, (14, 14), 2)
    assert FY.argmax(1).tolist() == FX.argmax(1).tolist() == [3, 10]
    for readings in ({"centre": "divide"}, {"stride": "printed"}):
        FY, _ = filter_bank(start, (14, 14), 2, **readings)
        assert FY.argmax(1).sub(6.5).abs().max() <= 0.5, readings  # in the middle
    FY, FX = filter_bank(start, (8, 4), 2)
    assert FY.argmax(1).tolist() in ([1, 5], [2, 6], [1, 6], [2, 5]) and set(
        FX.argmax(1).tolist()
    ) <= {0, 1, 2, 3}


def test_filters_are_defined_everywhere():
    corners = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=3)))
    readings = ("multiply", "arc"), ("divide", "arc"), ("multiply", "printed")
    for kernel, reading in itertools.product(("cauchy", "gaussian"), readings):
        for f in filter_bank(corners, (14, 14), 2, *reading, kernel):
            torch.testing.assert_close(f.sum(-1), torch.ones(27, 2))


def test_windows_move_with_their_parameters():
    rows, columns = torch.arange(14.0), torch.arange(14.0)
    at = lambda *p: [
        (b * m).sum(1) for b, m in zip(filter_bank(torch.tensor(p), (14, 14), 2), (rows, columns))
    ]
    (y, x), (y2, x2) = at(0.0, 0.0, 0.9), at(0.6, 0.0, 0.9)
    assert torch.allclose(y, y2) and (x2 > x + 2).all(), "ĝ_X moves along columns"
    (y3, x3) = at(0.0, -0.6, 0.9)
    assert torch.allclose(x, x3) and (y3 < y - 2).all(), "a negative ĝ_Y moves up"
    spread = [
        v[1] - v[0]
        for v in (
            at(0.0, 0.0, 0.0)[0], at(0.0, 0.0, 0.5)[0], at(0.0, 0.0, -0.5)[0],
            at(0.0, 0.0, 0.99)[0],
        )
    ]
    assert spread[0] > spread[1] == spread[2] > spread[3] >= 0


@pytest.mark.parametrize(
    "readings", [{}, {"centre": "divide"}, {"stride": "printed"}, {"kernel": "gaussian"}], ids=str
)
def test_filters_and_glimpses_have_their_slopes(readings):
    params, Z = random(3, 3).tanh().requires_grad_(), random(3, 2, 5, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: filter_bank(p, (5, 4), 3, **readings), params)
    assert torch.autograd.gradcheck(
        lambda p, z: glimpse(z, *filter_bank(p, (5, 4), 2, **readings)), (params, Z)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_filters_are_computed_in_single_precision(dtype):
    params = (
        torch.tensor([[0.0, 1, 0], [-1, 0, 1]]).to(dtype)
        if dtype == torch.int64
        else random(9, 3).tanh().to(dtype)
    )
    for ours, exact in zip(
        filter_bank(params, (14, 14), 2), filter_bank(params.double(), (14, 14), 2)
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, exact.float())


@pytest.mark.parametrize(
    "options,words",
    [
        ({"centre": "add"}, "centre 'add' is unknown; take multiply or divide"),
        ({"stride": "draw"}, "stride 'draw' is unknown"),
        ({"kernel": "box"}, "kernel 'box' is unknown; take cauchy or gaussian"),
        ({"window": 0}, "window 0"), ({"window": 1, "stride": "printed"}, "window 1"),
        ({"centre": "divide", "stride": "printed"}, "are not defined together"),
    ],
)
def test_filters_refuse(options, words):
    with pytest.raises(ValueError, match=words):
        filter_bank(torch.zeros(3), (8, 4), **{"window": 2, **options})


def test_glimpse_by_hand_and_in_batches():
    Z = torch.arange(6.0).view(1, 2, 3)
    # row 0, column 2
    assert glimpse(Z, torch.tensor([[1.0, 0]]), torch.tensor([[0, 0, 1.0]])).item() == 2
    Z, FY, FX = random(5, 3, 8, 4), random(5, 2, 8, seed=1), random(5, 2, 4, seed=2)
    torch.testing.assert_close(glimpse(Z, FY, FX), torch.einsum("nky,ncyx,nlx->nckl", FY, Z, FX))


# ---------------------------------------------------------------- the fold


@pytest.mark.parametrize("options", CASES, ids=str)
def test_one_pair_all_pairs_and_the_equations_agree(options):
    model, maps = network(**options).double().eval(), random(5, 64, 4, 2).relu()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            slow = torch.stack(
                [torch.stack([one_pair(model, a, b) for b in maps[2:]]) for a in maps[:2]]
            )
            i, j = torch.arange(2).repeat_interleave(3), torch.arange(2, 5).repeat(2)
            singles = model.head(model.compare(maps[i], maps[j]))[:, 0].view(2, 3)
            together = model.head(
                model.compare_all(model.prepare(maps[:2]), model.prepare(maps[2:]))
            )[..., 0]
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(singles, slow, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(together, slow, rtol=1e-6, atol=1e-8)
    assert slow.std() > 1e-3, "pairs differ"


@pytest.mark.parametrize("options", CASES, ids=str)
def test_gradients_of_both_forms_agree_and_reach_every_parameter(options):
    model, images = network(**options).double().train(), random(4, 3, 64, 32)
    weight, found = random(2, 2, seed=5), []
    for folded in (False, True):
        model.zero_grad()
        maps = model(images)
        if folded:
            e = model.compare_all(model.prepare(maps[:2]), model.prepare(maps[2:]))
        else:
            e = model.compare(maps[[0, 0, 1, 1]], maps[[2, 3, 2, 3]]).view(2, 2, -1)
        (model.scale * (model.head(e)[..., 0].tanh() * weight).sum()).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-7, msg=name)
        assert gradient.abs().sum() > 0, name


def test_swapping_the_pair_changes_the_score():
    model, images = network().eval(), pixels(6)
    with torch.no_grad():
        ready = model.prepare(model(normalise(images)))
        u = model.score(model.compare_all(ready, ready))
    assert (u - u.T).abs().max() > 1e-3


def test_the_first_window_is_the_same_for_every_pair():
    model, images = network().eval(), pixels(4)
    path = []
    with torch.no_grad():
        maps = model(normalise(images))
        model.compare(maps[:2], maps[2:], path)
    assert len(path) == 6
    for banks in path[0]:
        torch.testing.assert_close(banks[0], banks[1])
    assert any(not torch.allclose(FY[0], FY[1], atol=1e-4) for FY, _ in path[1:])


def test_the_start_is_as_stated():
    torch.manual_seed(0)
    model = DCC(backbone="tiny", hidden=40)
    cell, bound = model.fusion.cell, lambda rows, columns: (6 / (rows + columns)) ** 0.5
    for matrix in cell.weight_ih.chunk(4):
        assert 0.9 * bound(40, 256) < matrix.abs().max() <= bound(40, 256)
    for matrix in cell.weight_hh.chunk(4):
        assert 0.9 * bound(40, 40) < matrix.abs().max() <= bound(40, 40)
    assert (
        0.85 * bound(40, 3) < model.fusion.window_head.weight.abs().max() <= bound(40, 3)
        and model.fusion.window_head.bias is None
    )
    assert model.scale.item() == 10
    assert 0.7 * bound(40, 1) < model.head.weight.abs().max() <= bound(40, 1)
    remedy = DCC(backbone="tiny", affinity="cosine").temperature
    assert model.temperature is None and remedy.item() == 10 and isinstance(remedy, nn.Parameter)
    assert 0.9 * bound(64, 64) < model.affinity.abs().max() <= bound(64, 64)
    assert not any(bias.any() for bias in (cell.bias_ih, cell.bias_hh, model.head.bias))
    assert torch.equal(DCC(backbone="tiny", start="identity").affinity, torch.eye(64))
    assert len(model.backbone.stages) == 3 and model(torch.zeros(1, 3, 128, 64)).shape == (
        1, 64, 8, 4,
    )
    assert (
        DCC(backbone="tiny").fusion.width == 400
        and DCC(backbone="tiny").fusion.steps == 16
        and DCC(backbone="tiny").fusion.window == 2
    )


def test_dropout_acts_in_training_on_outputs_alone():
    model, maps = network(dropout=0.5), random(2, 64, 4, 2, dtype=torch.float32).relu()
    ready = model.eval().prepare(maps)
    e = model.compare_all(ready, ready)
    torch.testing.assert_close(e, model.compare_all(ready, ready))
    model.train()
    torch.manual_seed(1)
    dropped = torch.stack([model.compare_all(ready, ready) for _ in range(40)])
    assert 0.35 < (dropped == 0).float().mean() < 0.65
    assert torch.equal(
        dropped == 0, (dropped == 0)[:, :1, :1].expand_as(dropped)
    ), "all pairs lose the same units"
    # windows stay: then the memory does not know of the dropout, only what is read from it
    model.fusion.window_head.weight.data.zero_()
    dropped, whole = model.compare_all(ready, ready), model.eval().compare_all(ready, ready)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])


@pytest.mark.parametrize("options", [{}, {"concat_features": True}, {"glimpses": 1}], ids=str)
def test_dropout_unit_by_unit_in_both_forms(options):
    """Windows and score read what is left of the state, the LSTM the whole of it; a mask per step,
    the same for all pairs.
    """
    model = network(**{"dropout": 0.4, **options}).double().train()
    maps = random(4, 64, 4, 2).relu()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(7)
        masks = [F.dropout(torch.ones(12), 0.4, True) for _ in range(model.fusion.steps + 1)]
        assert len({tuple(mask.tolist()) for mask in masks}) > 1
        with torch.no_grad():
            slow = torch.stack(
                [torch.stack([one_pair(model, a, b, masks) for b in maps[2:]]) for a in maps[:2]]
            )
            torch.manual_seed(7)
            singles = model.score(model.compare(maps[[0, 0, 1, 1]], maps[[2, 3, 2, 3]])).view(2, 2)
            torch.manual_seed(7)
            together = model.score(
                model.compare_all(model.prepare(maps[:2]), model.prepare(maps[2:]))
            )
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(singles.double(), slow, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(together.double(), slow, rtol=1e-4, atol=1e-6)


def test_scores_are_linear_in_the_vector_and_float32():
    model, e = network(), random(3, 4, 12, dtype=torch.float32)
    u = model.score(50 * e)
    torch.testing.assert_close(
        u, 50 * torch.einsum("abd,d->ab", e, model.head.weight[0]) + model.head.bias
    )
    assert u.abs().max() > 5, "not squashed"
    ended = network(squash="tanh")
    ended.load_state_dict(model.state_dict())
    torch.testing.assert_close(ended.score(50 * e), u.tanh())
    with torch.autocast("cpu", torch.bfloat16):
        assert model.score(e).dtype == torch.float32


@pytest.mark.parametrize(
    "options,words",
    [
        ({"fusion": "mean"}, "fusion 'mean'"), ({"start": "zeros"}, "start 'zeros'"),
        ({"squash": "relu"}, "squash 'relu'"),
        ({"concat_features": True, "fusion": "gp"}, "concat_features True .* not to 'gp'"),
        ({"affinity": "l2"}, "affinity 'l2' is unknown; take dot or cosine"),
        ({"affinity": "cosine", "scaled": False}, "scaled False belongs to affinity 'dot'"),
        ({"centre": "divide", "fusion": "gp"}, "belong to fusion 'glimpse'"),
        ({"glimpses": 0}, "glimpses 0"), ({"hidden": 0}, "hidden 0"),
        ({"dropout": 1.0}, "dropout 1.0"), ({"window": 0}, "window 0"),
        ({"kernel": "box"}, "kernel 'box'"), ({"backbone": "vgg"}, "backbone 'vgg'"),
        ({"fusion": "spp", "hidden": 2}, "rank is 2"),
    ],
)
def test_network_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        DCC(**{"backbone": "tiny", **options})


# ---------------------------------------------------------------- losses and training


def test_losses_by_hand():
    u = torch.tensor([[0.2, -0.4, 1.5], [3.0, 0.0, 0.1]])
    s = (4 * u.double()).tolist()
    wanted = [math.log(sum(math.exp(v) for v in row)) - row[t] for row, t in zip(s, (1, 0))]
    assert episode_loss(u, torch.tensor([1, 0]), 4.0).item() == pytest.approx(
        sum(wanted) / 2, rel=1e-5
    )
    assert episode_loss(torch.full((2, 5), 90.0), torch.tensor([0, 1]), 10.0).isfinite()


def made(people=6, each=4):
    "Images of a few people, alike within a person."
    base = pixels(people, seed=3).repeat_interleave(each, 0).int()
    noise = torch.randint(-25, 26, base.shape, generator=torch.Generator().manual_seed(1))
    return (base + noise).clamp(0, 255).to(torch.uint8), torch.arange(people).repeat_interleave(
        each
    )


def test_episodes_compare_first_images_with_second_ones():
    images, labels = made()
    model = network().eval()  # batch norms by their record: the batch does not matter
    batch = next(IdentityBatches(labels.numpy(), 4, 2).epoch(0))
    terms = dcc_objective()(model, batch, lambda rows: normalise(images[rows]))
    with torch.no_grad():
        maps = model(normalise(images[batch]))
        losses = []
        for n in range(4):
            u = torch.stack(
                [
                    model.score(
                        model.compare(maps[2 * n : 2 * n + 1], maps[2 * m + 1 : 2 * m + 2])
                    )[0]
                    for m in range(4)
                ]
            )
            losses.append(-torch.log_softmax(model.scale * u, 0)[n])
    assert list(terms) == ["episode"]
    torch.testing.assert_close(
        terms["episode"].detach(), torch.stack(losses).mean(), rtol=1e-4, atol=1e-5
    )


def test_pairs_are_judged_for_themselves():
    images, labels = made()
    model = network().eval()
    i, j, same = batch = next(PairBatches(labels.numpy(), 6).epoch(0))
    terms = dcc_objective(training="pairs")(model, batch, lambda rows: normalise(images[rows]))
    with torch.no_grad():
        maps = model(normalise(images))
        u = torch.cat(
            [model.score(model.compare(maps[a : a + 1], maps[b : b + 1])) for a, b in zip(i, j)]
        )
        wanted = F.binary_cross_entropy((model.scale * u).sigmoid(), same.float())
    torch.testing.assert_close(terms["pair"].detach(), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="training 'triplets' is unknown; take episodes or pairs"):
        dcc_objective(training="triplets")


def trained(training="episodes", seed=0, **recipe):
    images, labels = made()
    batches = (
        IdentityBatches(labels.numpy(), 4, 2, seed)
        if training == "episodes"
        else PairBatches(labels.numpy(), 4, seed=seed)
    )
    model = network(seed, start="identity", dropout=0.1)
    options = {"epochs": 2, "batch_size": 8, "lr": 3e-3, "steps": 2, **recipe}
    return model, train(
        model, dcc_objective(training=training), images, batches, Recipe(**options), seed,
        device="cpu",
    )


@pytest.mark.parametrize("training", ["episodes", "pairs"])
def test_two_steps_depend_on_the_seed_alone(training, capsys):
    model, history = trained(training)
    again, same = trained(training)
    assert history["loss"].equals(same["loss"]) and np.isfinite(history["loss"]).all()
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())
    )
    assert not history["loss"].equals(trained(training, seed=1)[1]["loss"])


@pytest.mark.parametrize("training", ["episodes", "pairs"])
def test_the_state_of_other_generators_does_not_matter(training, capsys):
    images, labels = made()
    found = []
    for noise in (1, 2):
        batches = (
            IdentityBatches(labels.numpy(), 4, 2)
            if training == "episodes"
            else PairBatches(labels.numpy(), 4)
        )
        model = network(dropout=0.4)
        torch.manual_seed(noise), torch.rand(noise)
        train(
            model, dcc_objective(training=training), images, batches,
            Recipe(epochs=1, batch_size=8, steps=2, pad=2), 5, device="cpu",
        )
        found.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values()))


@pytest.mark.parametrize("training", ["episodes", "pairs"])
@pytest.mark.parametrize(
    "options",
    [
        *({"fusion": f} for f in FUSIONS), {"concat_features": True, "literal": True},
        {"stride": "printed"}, {"affinity": "cosine"},
    ],
    ids=str,
)
def test_two_steps_move_every_parameter(options, training, capsys):
    images, labels = made()
    model = network(dropout=0.3, **options)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batches = (
        IdentityBatches(labels.numpy(), 4, 2)
        if training == "episodes"
        else PairBatches(labels.numpy(), 4)
    )
    # no step without a slope
    recipe = Recipe(
        epochs=1, batch_size=8, lr=1e-3, steps=2, weight_decay=0.0, optimizer="sgd", clip=100.0
    )
    history = train(model, dcc_objective(training=training), images, batches, recipe, device="cpu")
    assert history["step"].tolist() == [2] and {"episode", "pair"} & set(history) == {
        training.removesuffix("s")
    }
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    # a softmax over scores does not see what is added to all of them: no slope but rounding
    if training == "episodes":
        still = [name for name in still if name != "head.bias"]
    assert not still and all(p.isfinite().all() for p in model.parameters()) and not model.training


def test_a_frozen_backbone_stays_as_it_was(capsys):
    images, labels = made()
    model = network(frozen=True, start="identity")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = Recipe(epochs=1, batch_size=8, lr=1e-2, steps=2, optimizer="sgd", weight_decay=0.1)
    train(
        model.train(), dcc_objective(), images, IdentityBatches(labels.numpy(), 4, 2), recipe,
        device="cpu",
    )
    moved = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert not [
        name for name in moved if name.startswith("backbone.")
    ], "weights, or statistics of batch norms"
    assert {"affinity", "fusion.cell.weight_ih", "head.weight", "scale"} <= moved
    model.train()
    assert (
        model.training
        and model.fusion.training
        and not any(m.training for m in model.backbone.modules())
    )
    assert all(m.training for m in network().train().backbone.modules())


@pytest.mark.parametrize("training", ["episodes", "pairs"])
def test_a_killed_run_continues_to_the_same_numbers(training, tmp_path, capsys):
    images, labels = made()
    recipe = Recipe(
        epochs=3, batch_size=8, lr=3e-3, schedule="exponential", gamma=0.5, pad=2, clip=100.0
    )
    kind, numbers = (IdentityBatches, (4, 2)) if training == "episodes" else (PairBatches, (4,))
    run = lambda model, batches, **where: train(
        model, dcc_objective(training=training), images, batches, recipe, 3, device="cpu", **where
    )
    whole, history = network(dropout=0.3), None
    history = run(whole, kind(labels.numpy(), *numbers))
    batches = fragile(kind)(labels.numpy(), *numbers)
    with pytest.raises(Killed):
        run(network(dropout=0.3), batches, out=tmp_path)
    resumed = network(seed=8, dropout=0.3)  # what the checkpoint does not hold would show
    again = run(resumed, batches, out=tmp_path)
    columns = ["epoch", "step", "lr", "loss", training.removesuffix("s")]
    assert len(history) == 3 and history[columns].equals(again[columns])
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), resumed.state_dict().values())
    )
    fresh = network(seed=9)
    load_checkpoint(tmp_path / "checkpoint.safetensors", fresh)
    assert torch.equal(
        dcc_distances(fresh, images[:2], images[2:5], device="cpu"),
        dcc_distances(whole, images[:2], images[2:5], device="cpu"),
    )


@pytest.mark.parametrize("training", ["episodes", "pairs"])
@pytest.mark.parametrize(
    "options",
    [
        *({"fusion": f} for f in FUSIONS), {"scaled": False, "kernel": "gaussian"},
        {"concat_features": True},
    ],
    ids=str,
)
def test_autocast_is_finite(options, training):
    images, labels = made()
    batches = (
        IdentityBatches(labels.numpy(), 4, 2)
        if training == "episodes"
        else PairBatches(labels.numpy(), 4)
    )
    found = []
    for mixed in (False, True):
        model = network(**options).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            (loss,) = dcc_objective(training=training)(
                model, next(batches.epoch(0)), lambda rows: normalise(images[rows])
            ).values()
        loss.backward()
        assert (
            loss.dtype == torch.float32
            and loss.isfinite()
            and all(p.grad.isfinite().all() for p in model.parameters())
        )
        found.append(loss.item())
    assert found[0] == pytest.approx(found[1], rel=0.3, abs=0.3)


@pytest.mark.parametrize("training", ["episodes", "pairs"])
def test_mixed_precision_trains(training, capsys):
    exact, mixed = (
        trained(training, steps=1, precision=precision)[1]["loss"].item()
        for precision in ("float32", "bf16")
    )
    assert mixed == pytest.approx(exact, rel=0.15, abs=0.1)


def test_it_learns(capsys):
    _, history = trained(epochs=30, steps=0, flip=0.0)
    assert history["loss"].iloc[-5:].mean() < 0.6 * history["loss"].iloc[:3].mean()


def test_the_stated_schedule():
    recipe = Recipe(epochs=50, lr=1e-3, schedule="exponential", gamma=0.88)
    for m, N in ((0, 100), (50, 100), (1234, 100)):
        assert recipe.lr * lr_factor(recipe, m / N) == pytest.approx(0.001 * 0.88 ** (m / N))
    assert lr_factor(
        Recipe(epochs=9, schedule="exponential", gamma=0.5, warmup=2.0), 1.0
    ) == pytest.approx((0.01 + 0.99 / 2) * 0.5)
    assert lr_factor(Recipe(epochs=9, schedule="exponential", gamma=0.0), 0.0) == 1
    step = Recipe(epochs=9, schedule="step", milestones=(2, 4), gamma=0.5)
    assert [lr_factor(step, e) for e in (1.9, 2.0, 3.99, 4.0)] == [1, 0.5, 0.5, 0.25]


def test_training_follows_the_stated_schedule(capsys):
    _, history = trained(epochs=2, steps=0, lr=1e-3, schedule="exponential", gamma=0.88)
    assert history["step"].tolist() == [3, 6]  # N = 3; the last step of an epoch is m = 2, 5
    np.testing.assert_allclose(
        history["lr"], [1e-3 * 0.88 ** (2 / 3), 1e-3 * 0.88 ** (5 / 3)], rtol=1e-9
    )


# ---------------------------------------------------------------- ranking


def pair_by_pair(model, images, queries):
    with torch.no_grad():
        maps = model(normalise(images))
        one = lambda i, j: model.compare(maps[i : i + 1], maps[j : j + 1])
        e = torch.stack(
            [torch.cat([one(i, j) for j in range(queries, len(images))]) for i in range(queries)]
        )
        return e, -model.score(e)


@pytest.mark.parametrize(
    "options", [{"fusion": f} for f in FUSIONS] + [{"literal": True}, {"concat_features": True}],
    ids=str,
)
def test_ranking_is_pair_by_pair(options):
    model, images = network(**options).eval(), pixels(12)
    _, wanted = pair_by_pair(model, images, 5)
    with pytest.raises(ValueError, match="memory is 1 bytes, but one pair takes") as told:
        dcc_distances(model, images[:5], images[5:], memory=1, device="cpu")
    least = int(re.search(r"takes (\d+)", str(told.value))[1])
    for memory in (least, 2 * least, 300_000, 2**29):
        dist = dcc_distances(
            model, images[:5], images[5:], batch_size=4, memory=memory, device="cpu"
        )
        assert dist.shape == (5, 7) and dist.dtype == torch.float32
        torch.testing.assert_close(dist, wanted, rtol=1e-4, atol=1e-4)
    order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
    dist = dcc_distances(model, images[:5], images[5:][order], memory=2 * least, device="cpu")
    torch.testing.assert_close(dist, wanted[:, order], rtol=1e-4, atol=1e-4)


def test_weights_with_an_earlier_name_still_load():
    model, other = network(), network(seed=1)
    state = {
        name.replace("window_head", "where"): value for name, value in model.state_dict().items()
    }
    assert "fusion.where.weight" in state
    other.load_state_dict(state)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(a, b), name


def test_a_gallery_block_is_prepared_once(monkeypatch):
    model, images, seen = network().eval(), pixels(12), []
    prepare, alive, most = dcc._prepare, weakref.WeakSet(), []

    def watched(model, maps, *how):
        seen.append(len(maps))
        most.append(len(alive))
        found = prepare(model, maps, *how)
        alive.add(found.tables)
        return found

    monkeypatch.setattr(dcc, "_prepare", watched)
    dcc_distances(model, images[:6], images[6:], memory=80_000, device="cpu")
    # one image of either side at a time; each gallery image once, queries for every tile of four
    assert seen == [1] * len(seen) and len(seen) == 6 + 2 * 6
    seen.clear(), most.clear()
    dcc_distances(model, images[:2], images[2:], memory=80_000, device="cpu")
    assert len(seen) == 10 + 3 * 2 and max(most) == 4 + 1, "a block's tables and a query's, no more"


def test_memory_bounds_the_tile(monkeypatch):
    model, images, sides, seen = network(hidden=16).eval(), pixels(40), {}, []
    compare = dcc.compare_lean
    monkeypatch.setattr(
        dcc, "compare_lean",
        lambda model, a, b: seen.append(len(a.maps) * len(b.maps)) or compare(model, a, b),
    )
    for memory in (10**6, 4 * 10**6, 16 * 10**6):
        seen.clear()
        dcc_distances(model, images[:20], images[20:], memory=memory, device="cpu")
        sides[memory] = max(seen)
    assert sides[10**6] < sides[4 * 10**6] <= sides[16 * 10**6]


@pytest.mark.parametrize(
    "options,kind",
    [
        ({}, torch.float32), ({}, torch.bfloat16), ({"concat_features": True}, torch.float32),
        ({"fusion": "gp"}, torch.float32),
    ],
    ids=str,
)
def test_a_tile_with_its_tables_keeps_to_the_memory(options, kind):
    """Of any memory: the gallery's tables, the queries', those that are being made, and of the
    pairs that meet E, twice where affinities lie far apart, eight of four numbers for each unit and
    two windows' weights; most of it is used.
    """
    model = network(hidden=64, **options).eval()
    maps = random(2, 64, 8, 4, dtype=torch.float32)
    M, width = 32, model.fusion.width
    one = dcc._prepare(model, maps[:1], kind)
    held = {t.data_ptr(): t for t in one}
    image = sum(t.numel() * t.itemsize for t in held.values()) - maps[0].numel() * 4
    if options.get("fusion"):
        pair = 4 * (3 * M * M + 2 * 64 * M)
    else:
        pair = 2 * kind.itemsize * M * M + 4 * (8 * width + 8 * M)
    for memory in (2 * 10**6, 8 * 10**6, 10**8):
        images, side = dcc._tile_sides(model, maps, memory, "pair", kind)
        assert images >= side and side <= 64
        taken = image * (images + 3 * side) + pair * side**2
        assert 0.3 * memory < taken <= memory
    # both orders of every pair: their vectors are held, too
    both = dcc._tile_sides(model, maps, memory, "difference", kind)
    assert both[1] == side and both[0] < images
    with pytest.raises(ValueError, match="memory is 1000 bytes, but one pair takes"):
        dcc._tile_sides(model, maps, 1000, "pair", kind)


# ---------------------------------------------------------------- without gradients


@pytest.mark.parametrize("stretch", [1, 300], ids=["near", "far apart"])
@pytest.mark.parametrize(
    "options", [o for o in CASES if o.get("fusion", "glimpse") == "glimpse"], ids=str
)
def test_the_lean_form_is_pair_by_pair(options, stretch):
    """Nine queries and ten gallery images: blocks of eight and what is left; stretched affinities
    reach too far for one exponential in some blocks.
    """
    model, maps = network(**options).eval(), random(19, 64, 4, 2, dtype=torch.float32).relu()
    with torch.no_grad():
        model.affinity.mul_(stretch)
        maps[12:].mul_(0.001)  # these blocks never do
        i, j = torch.arange(9).repeat_interleave(10), torch.arange(9, 19).repeat(9)
        singles = model.compare(maps[i], maps[j]).view(9, 10, -1)
        together = compare_lean(model, prepared(model, maps[:9]), prepared(model, maps[9:]))
        halves = compare_lean(
            model, *(prepared(model, part, torch.bfloat16) for part in (maps[:9], maps[9:]))
        )
    torch.testing.assert_close(together, singles, rtol=0, atol=1e-5)
    assert singles.std(1).min() > 1e-4 and halves.dtype == torch.float32
    assert 0 < (halves - singles).abs().max() < 0.1


def test_two_bytes_are_for_glimpses():
    with pytest.raises(ValueError, match=r"half is 0.1; it must be 0 or, with fusion 'glimpse'"):
        dcc_distances(network(fusion="gp"), pixels(2), pixels(2), device="cpu", half=0.1)


def test_affinities_that_one_exponential_would_lose():
    "A query position that no gallery position comes near still has weights that sum to one."
    model = network(start="identity", scaled=False).eval()
    with torch.no_grad():
        model.affinity.copy_(torch.eye(64))
    maps = torch.zeros(2, 64, 2, 1)
    maps[0, 0, 0], maps[0, 1, 1], maps[1, 0], maps[1, 1] = 10.0, -10.0, 10.0, 20.0
    a, b = (prepared(model, m[None]) for m in maps)
    found = dcc._exponentials(model, a, b)
    for E, scale, axis in (
        (found.rows, found.per_row, -1), (found.columns.mT, found.per_column, -1),
    ):
        weights = E * scale.mT
        torch.testing.assert_close(weights.sum(axis), torch.ones(1, 1, 2))
    assert found.columns is not found.rows


@pytest.mark.parametrize("able", [True, False])
def test_two_bytes_only_where_allowed(able, monkeypatch):
    model, images, kinds = network().eval(), pixels(12), []
    lean = dcc.compare_lean

    def watched(model, a, b):
        kinds.append(a.tables.dtype)
        return lean(model, a, b)

    monkeypatch.setattr(dcc, "compare_lean", watched)
    monkeypatch.setattr(dcc, "_can_halve", lambda device: able)
    given = {"device": "cpu", "query": images[:5], "gallery": images[5:]}
    whole = dcc_distances(model, **given)
    assert set(kinds) == {torch.float32}
    kinds.clear()
    halved = dcc_distances(model, half=0.5, **given)
    if not able:  # nothing but float32, and not a sample
        assert set(kinds) == {torch.float32} and torch.equal(whole, halved)
        return
    assert kinds[:2] == [torch.float32, torch.bfloat16] and set(kinds[1:]) == {torch.bfloat16}
    assert 0 < (whole - halved).abs().max() < 0.5
    with pytest.warns(UserWarning, match=r"half is 1e-09, but bfloat16 changes scores .* float32"):
        strict = dcc_distances(model, half=1e-9, **given)
    assert torch.equal(strict, whole)


def test_the_sample_of_two_bytes_is_from_everywhere_and_its_worst_pair_decides(monkeypatch):
    "Only the last image of either side is not empty: seven of eight change nothing."
    model, maps = network().eval(), torch.zeros(16, 64, 4, 2)
    maps[-1] = random(64, 4, 2, dtype=torch.float32).relu()
    monkeypatch.setattr(dcc, "_can_halve", lambda device: True)
    whole, halved = (
        model.score(compare_lean(model, *[prepared(model, maps[[0, -1]], kind)] * 2))
        for kind in (torch.float32, torch.bfloat16)
    )
    apart = (whole - halved).abs().max().item()
    assert apart > 1e-4
    given = model, maps, maps
    assert dcc._table_kind(*given, 2 * apart, torch.device("cpu")) == torch.bfloat16
    with pytest.warns(UserWarning, match="float32 is taken"):
        assert dcc._table_kind(*given, apart / 2, torch.device("cpu")) == torch.float32


def test_a_shortlist_puts_copies_of_the_query_that_it_leaves_out_behind():
    model, images = network().eval(), pixels(8)
    # five at a cosine distance of zero
    gallery = torch.cat([images[:1].repeat(5, 1, 1, 1), images[1:]])
    dist = dcc_distances(model, images[:1], gallery, shortlist=2, device="cpu")[0]
    assert (dist.sort().values[:2].max() < dist.sort().values[2:]).all()


def test_a_shortlist_keeps_the_rest_in_their_order():
    model, images = network().eval(), pixels(14)
    _, wanted = pair_by_pair(model, images, 4)
    with torch.no_grad():
        mean = F.normalize(model(normalise(images)).mean((2, 3)), dim=1)
    near = (1 - mean[:4] @ mean[4:].T).argsort(1)
    dist = dcc_distances(model, images[:4], images[4:], shortlist=3, batch_size=5, device="cpu")
    for row in range(4):
        chosen = near[row, :3]
        torch.testing.assert_close(dist[row, chosen], wanted[row, chosen], rtol=1e-4, atol=1e-4)
        assert dist[row, near[row, 3:]].min() > dist[:, :].gather(1, near[:, :3]).max()
        assert torch.equal(dist[row, near[row, 3:]].argsort(), torch.arange(7))
    one = dcc_distances(model, images[:4], images[4:], shortlist=1, device="cpu")
    first = near[:, :1]
    torch.testing.assert_close(one.gather(1, first), wanted.gather(1, first), rtol=1e-4, atol=1e-4)
    for row in range(4):  # all others by their means, whatever their scores
        assert torch.equal(one[row].scatter(0, first[row], -math.inf).argsort(), near[row])
    for enough in (10, 99):
        torch.testing.assert_close(
            dcc_distances(model, images[:4], images[4:], shortlist=enough, device="cpu"), wanted,
            rtol=1e-4, atol=1e-4,
        )


def test_kissme_draws_its_pairs_from_the_seed():
    images, labels = made()
    model, wanted = network().eval(), []
    for seed in (0, 3):
        i, j, same = next(PairBatches(labels.numpy(), 60, 0.5, seed).epoch(0))
        with torch.no_grad():
            maps = model(normalise(images))
            wanted.append(
                kissme(
                    pair_covariances(model.compare(maps[i], maps[j]), same), 0.1, clip=False
                ).ratios
            )
    for seed, ratios in zip((0, 3), wanted):
        found = pair_metric(
            model, images, labels.numpy(), pairs=60, ridge=0.1, seed=seed, device="cpu"
        ).ratios
        torch.testing.assert_close(found, ratios, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(*wanted, rtol=1e-2)


@pytest.mark.parametrize("shortlist", [0, 4])
def test_kissme_ranks_by_pair_vectors(shortlist):
    images, labels = made()
    model = network().eval()
    metric = pair_metric(
        model, images, labels.numpy(), pairs=60, ridge=0.1, batch_size=7, device="cpu"
    )
    i, j, same = next(PairBatches(labels.numpy(), 60, 0.5, 0).epoch(0))
    with torch.no_grad():
        maps = model(normalise(images))
        e = model.compare(maps[i], maps[j])
    by_hand = kissme(pair_covariances(e, same), 0.1, clip=False)
    some = random(5, 12, dtype=torch.float32)
    torch.testing.assert_close(metric.of_pairs(some), by_hand.of_pairs(some), rtol=1e-3, atol=1e-3)
    e, _ = pair_by_pair(model, images[:12], 4)
    dist = dcc_distances(model, images[:4], images[4:12], metric, shortlist, device="cpu")
    wanted = metric.of_pairs(e.flatten(0, 1)).view(4, 8).float()
    near = wanted.isfinite() if not shortlist else dist <= dist.sort(1).values[:, 3:4]
    torch.testing.assert_close(dist[near], wanted[near], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"fusion": "gp"}, {"affinity": "cosine"}], ids=str)
@pytest.mark.parametrize("shortlist", [0, 4])
def test_kissme_on_the_difference_of_both_orders(options, shortlist):
    images, labels = made()
    model = network(**options).eval()
    metric = pair_metric(
        model, images, labels.numpy(), pairs=60, ridge=0.1, batch_size=7, device="cpu",
        kissme_of="difference",
    )
    i, j, same = next(PairBatches(labels.numpy(), 60, 0.5, 0).epoch(0))
    with torch.no_grad():
        maps = model(normalise(images))
        e = model.compare(maps[i], maps[j]) - model.compare(maps[j], maps[i])
        a, b = (
            x.flatten() for x in torch.meshgrid(torch.arange(4), torch.arange(4, 12), indexing="ij")
        )
        pairs = model.compare(maps[a], maps[b]) - model.compare(maps[b], maps[a])
    by_hand = kissme(pair_covariances(e, same), 0.1, clip=False)
    wanted = by_hand.of_pairs(pairs).view(4, 8).float()
    rank = lambda one, two, **more: dcc_distances(
        model, one, two, metric, device="cpu", kissme_of="difference", **more
    )
    dist = rank(images[:4], images[4:12], shortlist=shortlist)
    near = wanted.isfinite() if not shortlist else dist <= dist.sort(1).values[:, 3:4]
    torch.testing.assert_close(dist[near], wanted[near], rtol=2e-3, atol=2e-3)
    if not shortlist:  # who is a and who is b no longer matters
        torch.testing.assert_close(
            rank(images[4:12], images[:4], memory=10**6).T, dist, rtol=2e-3, atol=2e-3
        )


def test_a_difference_needs_a_metric():
    images, labels = made()
    with pytest.raises(ValueError, match="kissme_of 'difference' says what a metric measures"):
        dcc_distances(network(), images[:2], images[2:4], device="cpu", kissme_of="difference")
    with pytest.raises(ValueError, match="kissme_of 'sum' is unknown; take pair or difference"):
        pair_metric(network(), images, labels.numpy(), pairs=60, device="cpu", kissme_of="sum")


@pytest.mark.parametrize(
    "options,words",
    [
        ({"shortlist": -1}, "shortlist -1"), ({"memory": 0}, "memory must be"),
        ({"device": "tpu"}, "device 'tpu'"), ({"half": -0.1}, "half is -0.1"),
    ],
)
def test_ranking_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        dcc_distances(network(), pixels(2), pixels(3), **{"device": "cpu", **options})


def test_a_shortlist_tells_which_pair_has_no_score():
    model = network().eval()
    with torch.no_grad():
        model.head.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="query 0 and gallery image"):
        dcc_distances(model, pixels(2), pixels(5), shortlist=2, device="cpu")


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-8])
def test_a_shortlist_keeps_the_order_behind_large_distances(size):
    model, images, eye = network().eval(), pixels(44), torch.eye(12, dtype=torch.float64)
    metric = kissme((size * eye, 2 * size * eye), 0.0, clip=False)  # distances grow with 1 / size
    with torch.no_grad():
        mean = F.normalize(model(normalise(images)).mean((2, 3)).double(), dim=1)
    near = (1 - mean[:4] @ mean[4:].T).argsort(1)
    dist = dcc_distances(model, images[:4], images[4:], metric, 3, device="cpu")
    assert (dist.gather(1, near[:, 3:]).diff(dim=1) > 0).all()


def test_a_metric_and_a_ranking_refuse_by_name():
    images, labels = made()
    for options, words in (
        ({"ridge": -1}, "ridge is -1"), ({"seed": -1}, "seed must be"),
        ({"batch_size": 0}, "batch_size is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            pair_metric(
                network(), images, labels.numpy(), **{"pairs": 60, "device": "cpu", **options}
            )
    for people in (np.zeros(24, int), np.arange(24), labels.numpy() + 0.5, labels - 1):
        with pytest.raises(ValueError, match="pids"):
            pair_metric(network(), images, people, pairs=60, device="cpu")
    for query, options, words in (
        (images.float(), {}, "images must be uint8"), (images[0], {}, "query"),
        (images, {"batch_size": 0}, "batch_size is 0"), (images, {"memory": -5}, "memory must be"),
    ):
        with pytest.raises(ValueError, match=words):
            dcc_distances(network(), query, images, **{"device": "cpu", **options})
    assert dcc_distances(network(), images[:1], images[1:2], device="cpu").shape == (1, 1)


def stepped(training, batches):
    images, _ = made()
    train(
        network(), dcc_objective(training=training), images, batches,
        Recipe(epochs=1, steps=1, batch_size=8), device="cpu",
    )


def judged(training, batch):
    images, _ = made()
    dcc_objective(training=training)(network(), batch, lambda rows: normalise(images[rows]))


PEOPLE = np.arange(6).repeat(4)


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: judged("episodes", torch.arange(5)), "batch.*IdentityBatches"),
        (lambda: judged("episodes", torch.arange(0)), "batch"),
        (lambda: stepped("episodes", PairBatches(PEOPLE, 4)), "batch.*IdentityBatches"),
        (lambda: stepped("pairs", IdentityBatches(PEOPLE, 4, 2)), "batch.*PairBatches"),
        (
            lambda: dcc_distances(
                network(), pixels(2), pixels(2, height=32, width=64), device="cpu"
            ),
            "query.*gallery",
        ),
        (
            lambda: dcc_distances(network(), pixels(2), pixels(2, height=96), device="cpu"),
            "query.*gallery",
        ),
        (lambda: dcc_distances(network(), pixels(2)[:0], pixels(2), device="cpu"), "query"),
        (lambda: dcc_distances(network(), pixels(2), pixels(2)[:0], device="cpu"), "gallery"),
        (lambda: pair_metric(network(), made()[0], PEOPLE, pairs=0, device="cpu"), "pairs"),
        (
            lambda: pair_metric(
                network(), made()[0], np.arange(12).repeat(4), pairs=60, device="cpu"
            ),
            "pids",
        ),
        (lambda: pair_metric(network(), made()[0], PEOPLE[:12], pairs=60, device="cpu"), "pids"),
        (lambda: filter_bank(torch.zeros(5, 2), (8, 4), 2), "params"),
        (lambda: filter_bank(torch.zeros(3), (0, 4), 2), "size"),
        (lambda: Comparator(0, 8, glimpses=2, window=2, dropout=0.0), "channels 0"),
    ],
    ids=[
        "odd episode", "empty episode", "pairs for episodes", "episodes for pairs", "turned images",
        "taller images", "no query", "no gallery", "no pairs", "pids too many", "pids too few",
        "params of two", "no rows", "no channels",
    ],
)
def test_bad_inputs_are_named(call, words, capsys):
    with pytest.raises(ValueError, match=words):
        call()


def test_it_is_told_which_pair_has_no_score():
    model = network().eval()
    with torch.no_grad():
        model.head.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="query 0 and gallery image 0"):
        dcc_distances(model, pixels(2), pixels(3), device="cpu")


# ---------------------------------------------------------------- pulse


IDS = np.array([1, 2, 3]), np.zeros(3, int), np.array([1, 2, 3, 1, 2, 3]), np.ones(6, int)
WINDOWS = {"window_spread", "mean_window_correlation", "mean_window_loss"}
OTHERS = {"z_deviation", "effective_positions", "mean_z_correlation", "mean_z_loss", "block_map"}


def beating(model):
    return pulse(model, pixels(3), pixels(6, seed=5), *IDS, device="cpu")


@pytest.mark.parametrize(
    "options", [{}, {"literal": True}, {"fusion": "gp"}, {"affinity": "cosine"}], ids=str
)
def test_uniform_attention_has_no_pulse(options):
    model = network(**options)
    with torch.no_grad():
        model.affinity.zero_()
    found = beating(model)
    assert found["z_deviation"] < 1e-4 and found["effective_positions"] == pytest.approx(
        1, abs=1e-5
    )
    assert (
        found["mean_z_correlation"] == pytest.approx(1, abs=1e-5)
        and abs(found["mean_z_loss"]) < 1e-9
    )
    if "fusion" not in options:  # wherever a window looks, it sees the same
        assert (
            found["mean_window_correlation"] == pytest.approx(1, abs=1e-5)
            and abs(found["mean_window_loss"]) < 1e-9
        )


def test_a_permuting_attention_keeps_all_of_the_deviation(monkeypatch):
    model = network()
    shifts = iter(
        [
            torch.stack([60 * torch.eye(64)[torch.randperm(8)].T.view(64, 4, 2) for _ in range(n)])
            for n in (3, 6)
        ]
    )
    monkeypatch.setattr(model, "forward", lambda images: next(shifts), raising=False)
    with torch.no_grad():
        model.affinity.copy_(torch.eye(64))
    found = beating(model)
    assert found["z_deviation"] == pytest.approx(1, abs=1e-4)
    assert found["effective_positions"] == pytest.approx(1 / 8, abs=1e-4)


def test_effective_positions_are_of_the_normalised_weights():
    "Eq. 3 as printed takes the same weights along the other axis."
    model = network()
    positions = []
    for model.literal in (False, True):
        positions.append(beating(model)["effective_positions"])
    assert positions[0] == pytest.approx(positions[1], rel=1e-5) and positions[0] < 0.98


def test_a_still_window_has_no_pulse():
    model = network()
    with torch.no_grad():
        model.fusion.window_head.weight.zero_()
    found = beating(model)
    assert found["window_spread"] == 0 and found["mean_window_loss"] == 0
    assert found["mean_window_correlation"] == pytest.approx(1, abs=1e-6)
    assert beating(network(glimpses=1, affinity="cosine"))["window_spread"] > 0, "others move"


@pytest.mark.parametrize("options", [{}, {"concat_features": True, "affinity": "cosine"}], ids=str)
def test_the_pulse_pair_by_pair(options, monkeypatch):
    "Every number anew, one pair at a time, from `compare` alone."
    model, images = network(**options).eval(), torch.cat([pixels(3), pixels(6, seed=5)])
    found, asked, net = beating(model), [], model.fusion
    with torch.no_grad():
        maps = model(normalise(images))
    pairs = list(itertools.product(range(3), range(3, 9)))
    ask = net.window_params

    def scores():
        with torch.no_grad():
            return torch.stack(
                [model.score(model.compare(maps[i][None], maps[j][None]))[0] for i, j in pairs]
            )

    monkeypatch.setattr(
        net, "window_params", lambda h: asked.append(ask(h)) or asked[-1], raising=False
    )
    plain = scores()
    windows = torch.stack(asked).view(18, 6, 3)
    windows[..., 2] = windows[..., 2].abs()
    spread = windows.std(0, unbiased=False) / torch.tensor([2, 2, 1])
    assert found["window_spread"] == pytest.approx(spread[1:].mean().item(), rel=1e-3)
    steps = itertools.cycle(windows.mean(0))
    monkeypatch.setattr(net, "window_params", lambda h: next(steps)[None], raising=False)
    held = scores()
    monkeypatch.setattr(net, "window_params", ask, raising=False)
    spreads, module = [], __import__("reid_repro.dcc", fromlist=["dcc"])
    real = module.coattention

    def averaged(*arguments):
        spreads.extend(Z.var(-1, unbiased=False).mean() for Z in real(*arguments))
        return [Z.mean(-1, keepdim=True).expand_as(Z) for Z in real(*arguments)]

    monkeypatch.setattr(module, "coattention", averaged)
    flat = scores()
    of_q = [maps[n].flatten(1).var(-1, unbiased=False).mean() for pair in pairs for n in pair]
    assert found["z_deviation"] == pytest.approx((sum(spreads) / sum(of_q)).sqrt().item(), rel=1e-3)
    before = 100 * evaluate(-plain.view(3, 6), *IDS).mAP
    assert found["block_map"] == pytest.approx(before)
    for name, others in (("mean_window", held), ("mean_z", flat)):
        together = torch.corrcoef(torch.stack([plain, others]))[0, 1].item()
        assert (
            found[f"{name}_correlation"] == pytest.approx(together, abs=1e-3) and together < 0.999
        )
        assert found[f"{name}_loss"] == pytest.approx(
            before - 100 * evaluate(-others.view(3, 6), *IDS).mAP
        )


@pytest.mark.parametrize(
    "options", [{}, {"fusion": "irnn2"}, {"frozen": True, "affinity": "cosine"}], ids=str
)
def test_a_pulse_leaves_the_network_as_it_was(options):
    model = network(**options).train()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    found = beating(model)
    assert set(found) == OTHERS | (set() if "fusion" in options else WINDOWS)
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert modes == [m.training for m in model.modules()] and torch.equal(
        model.head.weight.grad, torch.ones(1, model.fusion.width)
    )


# ---------------------------------------------------------------- rows


def test_every_own_number_has_a_row():
    rows, own = {row.name: row for row in read_rows("dcc")}, reported("dcc").query("own")
    named = {(key["table"], key["row"]) for row in rows.values() for key in row.reported}
    assert named == set(zip(own["table"], own["row"]))
    for row in rows.values():
        for key in row.reported:
            printed = own[(own["table"] == key["table"]) & (own["row"] == key["row"])]
            assert set(printed["dataset"]) <= set(row.datasets), (row.name, key)
    assert {rows[f].set["fusion"] for f in FUSIONS[1:]} == set(FUSIONS[1:])


def built(values, **others):
    names = (
        "fusion", "hidden", "glimpses", "window", "dropout", "start", "scaled", "literal",
        "squash", "affinity", "frozen",
    )
    readings = ("centre", "stride", "kernel") if values["fusion"] == "glimpse" else ()
    chosen = {name: values[name] for name in (*names, *readings)}
    return DCC(backbone="tiny", concat_features=values["own"], **chosen | others)


@pytest.mark.parametrize("profile", ["smoke", "study", "photographs", "short", "paper"])
def test_every_job_builds(profile):
    defaults = declared(project_root() / read_rows("dcc")[0].notebook)
    # a row may begin with another paper's
    jobs = {job.row.name: job for job in plan(profile, "dcc") if job.row.paper == "dcc"}
    assert "dcc" in jobs
    for name, job in jobs.items():
        values = {key: value for key, (_, value) in defaults.items()} | job.parameters | job.row.set
        assert set(job.parameters) | set(job.row.set) <= set(defaults), name
        recipe = Recipe.of(type("Values", (), values))
        assert recipe.clip == 100
        built(values, hidden=16)
        dcc_objective(training=values["training"])


def test_the_paper_profile_is_as_stated():
    jobs = {job.row.name: job for job in plan("paper", "dcc") if job.row.paper == "dcc"}
    stated = dict(
        optimizer="adam", lr=0.001, schedule="exponential", gamma=0.88, epochs=50, batch_size=128,
        clip=100.0, hidden=400, height=224, width=224, backbone="resnet50", start="xavier",
        dropout=0.3,
    )
    defaults = {
        key: value
        for key, (_, value) in declared(project_root() / read_rows("dcc")[0].notebook).items()
    }
    values = defaults | jobs["dcc"].parameters
    assert {key: values[key] for key in stated} == stated
    assert (defaults["glimpses"], defaults["window"]) == (8, 2)


def test_the_rows_together():
    rows = {row.name: row for row in read_rows("dcc")}
    jobs = {
        (job.row.name, profile): {**job.parameters, **job.row.set}
        for profile in ("smoke", "study", "photographs", "short", "paper")
        for job in plan(profile, "dcc")
        if job.row.paper == "dcc"
    }
    assert {row for row, _ in jobs} == set(rows), "every row runs somewhere"
    for profile in ("study", "photographs"):
        for rival in ("spp", "gp"):
            longer, usual = jobs[f"{rival}_long", profile], jobs[rival, profile]
            assert longer["epochs"] >= 3 * usual["epochs"] and longer == {
                **usual, "epochs": longer["epochs"],
            }
    for profile in ("short", "paper"):
        assert jobs["dcc_tenth", profile] == {
            **(all := jobs["dcc", profile]), "lr": all["lr"] / 10, "head_lr": 10.0,
        }


@pytest.mark.parametrize("row", read_rows("dcc"), ids=lambda row: row.name)
def test_every_row_builds_trains_a_step_and_ranks(row, capsys):
    values = {
        k: v for k, (_, v) in declared(project_root() / read_rows("dcc")[0].notebook).items()
    } | row.set
    images, labels = made()
    torch.manual_seed(0)
    model = built(values, hidden=8, glimpses=2)
    assert torch.equal(model.affinity, torch.eye(64)) == (values["start"] == "identity")
    people = labels.numpy()
    batches = (
        IdentityBatches(people, 4, 2)
        if values["training"] == "episodes"
        else PairBatches(people, 4)
    )
    recipe = Recipe.of(type("Values", (), values | {"epochs": 1, "steps": 1, "batch_size": 8}))
    history = train(
        model, dcc_objective(training=values["training"]), images, batches, recipe, device="cpu"
    )
    of = values["kissme_of"]
    metric = (
        pair_metric(model, images, people, pairs=60, device="cpu", kissme_of=of)
        if values["kissme"]
        else None
    )
    dist = dcc_distances(
        model, images[:3], images[3:8], metric, values["shortlist"], device="cpu", kissme_of=of
    )
    assert np.isfinite(history["loss"]).all() and dist.shape == (3, 5) and dist.isfinite().all()


def test_the_tables_are_complete():
    "Numbers of tables I to IV, counted from the printed rows; DCC's own, read once more."
    table = reported("dcc")
    assert table.groupby("table").size().to_dict() == {"I": 40, "II": 39, "III": 68, "IV": 69}
    assert table.groupby("table")["row"].nunique().to_dict() == {
        "I": 5, "II": 11, "III": 17, "IV": 19,
    }
    assert not table.duplicated(["table", "row", "dataset", "metric"]).any()
    metrics = ["rank1", "rank5", "rank10", "rank20", "mAP"]
    cuhk = (89.7, 96.7, 98.9, 99.4)
    market = (86.7, 95.7, 97.1, 98.6)
    duke = (80.3, 92.0, 97.1, 98.6, 59.2)
    own = {
        ("I", "DCCs", "cuhk03-1160-labelled"): cuhk, ("I", "DCCs", "market1501"): market,
        ("II", "DCCs", "dukemtmc"): duke, ("III", "DCCs", "cuhk03-1160-labelled"): cuhk,
        ("IV", "DCCs", "market1501"): (*market, 69.4),
        ("IV", "DCCs + KISSME", "market1501"): (88.4, 96.1, 97.5, 99.0, 71.1),
    }
    printed = table[table["own"] == 1].groupby(["table", "row", "dataset"])
    found = {key: dict(zip(lines["metric"], lines["value"])) for key, lines in printed}
    assert found == {key: dict(zip(metrics, values)) for key, values in own.items()}


def test_every_printed_number_is_typed():
    folder = os.environ.get("REID_REPRO_PAPERS")
    if not folder or not (Path(folder) / "dcc.txt").is_file():
        pytest.skip("REID_REPRO_PAPERS does not name a folder with dcc.txt")
    text = (Path(folder) / "dcc.txt").read_text(encoding="utf-8").splitlines()
    for name, lines in reported("dcc").groupby("table"):
        start = next(n for n, line in enumerate(text) if line.strip().startswith(f"TABLE {name}:"))
        printed = []
        for line in text[start + 1 : start + 70]:
            if line.strip().startswith("TABLE"):
                break
            if found := re.search(r"((?: (?:\d+\.\d|-)){4,8})$", line):
                printed += [float(v) for v in found[1].split() if v != "-"]
        assert sorted(printed) == sorted(lines["value"]), name
