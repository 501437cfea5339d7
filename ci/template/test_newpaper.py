"NewPaper: the block against its loop, at its limits, and in the network."

from itertools import pairwise

import pytest
import torch

from reid_repro.ide import IDE
from reid_repro.newpaper import NewPaperNet, NewPaperPool


def random_maps(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.5, 30.0])
def test_the_block_is_its_loop(p):
    maps = random_maps(2, 3, 5, 4)
    loop = torch.zeros(2, 3, dtype=torch.float64)
    for b in range(2):
        for k in range(3):
            loop[b, k] = (sum(value.item() ** p for value in maps[b, k].flatten()) / 20) ** (
                1 / p
            )
    torch.testing.assert_close(NewPaperPool(p)(maps), loop)


def test_the_block_stands_between_mean_and_maximum():
    maps = random_maps(4, 8, 6, 3)
    torch.testing.assert_close(NewPaperPool(1.0)(maps), maps.mean(dim=(2, 3)))
    pooled = [NewPaperPool(p)(maps) for p in (1.0, 2.0, 8.0, 64.0)]
    assert all((low < high).all() for low, high in pairwise(pooled))
    assert (pooled[-1] < maps.amax(dim=(2, 3))).all()


def test_a_map_of_zeros_and_a_huge_one_stay_finite():
    for maps in (
        torch.zeros(1, 2, 4, 2), torch.full((1, 2, 4, 2), 1e30),
        torch.full((1, 2, 4, 2), 6e4, dtype=torch.half),
    ):
        block = NewPaperPool(3.0)
        pooled = block(maps.requires_grad_())
        pooled.log().sum().backward()
        assert (
            pooled.isfinite().all() and maps.grad.isfinite().all() and block.p.grad.isfinite()
        )


def test_the_baseline_is_ide_itself():
    images = torch.rand(3, 3, 64, 32, generator=torch.Generator().manual_seed(1))
    network = NewPaperNet(5, backbone="tiny", neck="bn", pool="mean").train()
    ide = IDE(5, backbone="tiny", neck="bn").train()
    ide.load_state_dict(network.state_dict())
    for ours, theirs in zip(network(images), ide(images)):
        torch.testing.assert_close(ours, theirs)


def test_shapes_and_the_gradient_of_the_power():
    network = NewPaperNet(5, backbone="tiny")
    features, scores = network(torch.rand(4, 3, 64, 32))
    assert features.shape == (4, network.backbone.channels[-1]) and scores.shape == (4, 5)
    assert network.eval()(torch.rand(4, 3, 64, 32)).shape == features.shape
    features.square().sum().backward()
    assert network.pool.p.grad.abs() > 0


@pytest.mark.parametrize(
    "wrong",
    [
        dict(pool="middle"), dict(p=0.0), dict(p=-1.0), dict(p=float("inf")),
        dict(p=float("nan")),
    ],
)
def test_wrong_options_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        NewPaperNet(5, backbone="tiny", **wrong)
