"Spatial pooling: sweeps position by position, pyramids cell by cell, the low-rank product against the full one."

import itertools

import pytest
import torch

from reid_repro.spatial_pooling import BilinearFusion, FourWayIRNN, even_out, pyramid_pool


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def swept(net, maps):
    "The four hidden maps, one position after the other."
    x, out = net.inward(maps), []
    H, W = x.shape[2:]
    for matrix, (di, dj) in zip(net.recurrent, ((1, 0), (-1, 0), (0, 1), (0, -1))):
        h = {}
        for i, j in sorted(itertools.product(range(H), range(W)), key=lambda p: p[0] * di + p[1] * dj):
            before = h.get((i - di, j - dj), torch.zeros_like(x[:, :, 0, 0]))
            h[i, j] = (x[:, :, i, j] + before @ matrix.T).relu()
        out.append(torch.stack([torch.stack([h[i, j] for j in range(W)], -1) for i in range(H)], -2))
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


@pytest.mark.parametrize("size,levels", [((4, 4), (2, 1)), ((5, 7), (2, 1)), ((8, 4), (3, 1)), ((1, 1), (2, 1))])
def test_pyramid_cell_by_cell(size, levels):
    maps = random(2, 3, *size)
    H, W = size
    wanted = []
    for n in levels:
        rows, columns = ([slice(k * side // n, -(-(k + 1) * side // n)) for k in range(n)] for side in (H, W))
        cells = [maps[:, :, i, j].amax((2, 3)) for i in rows for j in columns]
        wanted.append(torch.stack(cells, 2).flatten(1))
    assert torch.equal(pyramid_pool(maps, levels), torch.cat(wanted, 1))


@pytest.mark.parametrize("pooling", ["gp", "spp", "irnn"])
def test_the_product_is_a_bilinear_form_of_rank_one(pooling):
    torch.manual_seed(0)
    fusion, a, b = BilinearFusion(5, 8, pooling).double(), random(2, 5, 4, 6), random(2, 5, 4, 6, seed=1)
    joint = torch.einsum("rc,rd,nchw,ndhw->nrhw", fusion.first.weight, fusion.second.weight, a, b)
    pooled = {"gp": lambda: joint.mean((2, 3)), "spp": lambda: pyramid_pool(joint), "irnn": lambda: swept(fusion.sweep, joint).mean((2, 3))}
    roots = pooled[pooling]().sign() * pooled[pooling]().abs().sqrt()
    torch.testing.assert_close(fusion(a, b), roots / roots.square().sum(1, keepdim=True).sqrt())
    assert fusion(a, b).shape == (2, fusion.width)
    assert not torch.allclose(fusion(b, a), fusion(a, b)), "two projections"


def test_roots_keep_signs_forget_sizes_and_have_finite_slopes():
    x = random(3, 7)
    torch.testing.assert_close(even_out(torch.tensor([[9.0, -16.0]])), torch.tensor([[0.6, -0.8]]))
    torch.testing.assert_close(even_out(1e4 * x), even_out(x))
    torch.testing.assert_close(even_out(-x), -even_out(x))
    assert torch.autograd.gradcheck(even_out, x.requires_grad_())
    zero = torch.zeros(2, 5, requires_grad=True)
    (even_out(zero) * random(2, 5)).sum().backward()
    assert not even_out(zero).any() and zero.grad.isfinite().all()


@pytest.mark.parametrize("make,words", [
    (lambda: FourWayIRNN(0, 4), "channels 0"), (lambda: FourWayIRNN(4, 0), "hidden 0"), (lambda: BilinearFusion(4, 3, "gp"), "rank is 3"),
    (lambda: BilinearFusion(4, 8, "max"), "pooling 'max' is unknown; take gp, spp, irnn"),
])
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words):
        make()
