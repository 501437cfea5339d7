"""Spatial pooling: sweeps position by position, pyramids cell by cell, the low-rank product against
the full one.
"""

import itertools

import pytest
import torch

from reid_repro.learning.pooling import (
    BilinearFusion, FourWayIRNN, signed_sqrt_normalize, pyramid_pool,
)

def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def swept(net, maps):
    "The four hidden maps, one position after the other."
    conv, out = net.inward, []
    x = torch.einsum("oc,bchw->bohw", conv.weight[..., 0, 0], maps) + conv.bias[:, None, None]
    H, W = x.shape[2:]
    for matrix, (di, dj) in zip(net.recurrent, ((1, 0), (-1, 0), (0, 1), (0, -1))):
        h = {}
        for i, j in sorted(
            itertools.product(range(H), range(W)), key=lambda p: p[0] * di + p[1] * dj
        ):
            before = h.get((i - di, j - dj), torch.zeros_like(x[:, :, 0, 0]))
            h[i, j] = (x[:, :, i, j] + before @ matrix.T).relu()
        out.append(
            torch.stack([torch.stack([h[i, j] for j in range(W)], -1) for i in range(H)], -2)
        )
    return torch.cat(out, 1)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (3, 6), (14, 14)])
def test_sweeps_position_by_position(size):
    torch.manual_seed(0)
    net, maps = FourWayIRNN(3, 4).double(), random(2, 3, *size)
    assert torch.equal(net.recurrent, torch.eye(4, dtype=torch.float64).repeat(4, 1, 1))
    with torch.no_grad():
        net.recurrent.add_(0.3 * random(4, 4, 4, seed=1))
        torch.testing.assert_close(net(maps), swept(net, maps))
    assert torch.autograd.gradcheck(net, random(1, 3, 2, 3).requires_grad_())


@pytest.mark.parametrize(
    "size,levels", [((4, 4), (2, 1)), ((5, 7), (2, 1)), ((8, 4), (3, 1)), ((1, 1), (2, 1))]
)
def test_pyramid_cell_by_cell(size, levels):
    maps = random(2, 3, *size)
    H, W = size
    wanted = []
    for n in levels:
        rows, columns = (
            [slice(k * side // n, -(-(k + 1) * side // n)) for k in range(n)] for side in (H, W)
        )
        cells = [maps[:, :, i, j].amax((2, 3)) for i in rows for j in columns]
        wanted.append(torch.stack(cells, 2).flatten(1))
    assert torch.equal(pyramid_pool(maps, levels), torch.cat(wanted, 1))


def test_pyramid_by_hand():
    maps = torch.arange(16.0).view(1, 1, 4, 4)
    assert pyramid_pool(maps)[0].tolist() == [5, 7, 13, 15, 15]  # 2×2 first, then all
    assert pyramid_pool(-maps)[0].tolist() == [0, -2, -8, -10, 0]  # nothing is padded with zeros


@pytest.mark.parametrize("pooling", ["gp", "spp", "irnn", "irnn2"])
def test_the_product_is_a_bilinear_form_of_rank_one(pooling):
    torch.manual_seed(0)
    fusion = BilinearFusion(5, 8, pooling).double()
    a = random(2, 5, 4, 6)
    b = random(2, 5, 4, 6, seed=1)
    joint = torch.einsum("rc,rd,nchw,ndhw->nrhw", fusion.first.weight, fusion.second.weight, a, b)
    if pooling == "gp":
        pooled = joint.mean((2, 3))
    elif pooling == "spp":
        pooled = pyramid_pool(joint)
    else:
        layers = [fusion.sweep] if pooling == "irnn" else fusion.sweep
        assert [net.inward.out_channels for net in layers] == ([2] if pooling == "irnn" else [8, 8])
        maps = joint
        for net in layers:
            maps = swept(net, maps)
        pooled = maps.mean((2, 3))
    roots = pooled.sign() * pooled.abs().sqrt()
    torch.testing.assert_close(fusion(a, b), roots / roots.square().sum(1, keepdim=True).sqrt())
    assert fusion(a, b).shape == (2, fusion.width)
    assert not torch.allclose(fusion(b, a), fusion(a, b)), "two projections"


def test_projections_start_as_xavier():
    torch.manual_seed(0)
    fusion = BilinearFusion(64, 40, "gp")
    for layer in (fusion.first, fusion.second):
        bound = (6 / (64 + 40)) ** 0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound and layer.bias is None
    assert not torch.equal(fusion.first.weight, fusion.second.weight)


@pytest.mark.parametrize(
    "rank,widths", [(4, (4, 20, 4, 16)), (5, (5, 25, 4, 20)), (11, (11, 55, 8, 44))]
)
def test_widths(rank, widths):
    for pooling, width in zip(("gp", "spp", "irnn", "irnn2"), widths):
        fusion = BilinearFusion(3, rank, pooling).double()
        e = fusion(random(2, 3, 4, 2), random(2, 3, 4, 2, seed=1))
        assert fusion.width == width and e.shape == (2, width)
        length = e.square().sum(1)
        # one; zero where no unit of an IRNN fires
        torch.testing.assert_close(length, (length > 0).double())


def test_roots_keep_signs_forget_sizes_and_have_finite_slopes():
    x = random(3, 7)
    torch.testing.assert_close(
        signed_sqrt_normalize(torch.tensor([[9.0, -16.0]])), torch.tensor([[0.6, -0.8]])
    )
    torch.testing.assert_close(signed_sqrt_normalize(1e4 * x), signed_sqrt_normalize(x))
    torch.testing.assert_close(signed_sqrt_normalize(-x), -signed_sqrt_normalize(x))
    assert torch.autograd.gradcheck(signed_sqrt_normalize, x.requires_grad_())
    zero = torch.zeros(2, 5, requires_grad=True)
    (signed_sqrt_normalize(zero) * random(2, 5)).sum().backward()
    assert not signed_sqrt_normalize(zero).any() and zero.grad.isfinite().all()


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: FourWayIRNN(0, 4), "channels 0"), (lambda: FourWayIRNN(4, 0), "hidden 0"),
        (lambda: BilinearFusion(4, 3, "gp"), "rank is 3"),
        (
            lambda: BilinearFusion(4, 8, "max"),
            "pooling 'max' is unknown; take gp, spp, irnn, irnn2",
        ),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: pyramid_pool(torch.zeros(3, 4, 4)), "maps"),
        (lambda: pyramid_pool(torch.zeros(1, 3, 4, 4), ()), "levels"),
        (lambda: pyramid_pool(torch.zeros(1, 3, 4, 4), (0,)), "levels"),
        (
            lambda: BilinearFusion(3, 8, "gp")(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4)),
            "first.* second",
        ),
        (
            lambda: BilinearFusion(3, 8, "gp")(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 1, 1)),
            "first.* second",
        ),
        (lambda: BilinearFusion(0, 8, "gp"), "channels"),
    ],
    ids=["3-d", "no levels", "level 0", "2 and 1 maps", "sizes", "no channels"],
)
def test_bad_inputs_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
