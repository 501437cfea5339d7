"""Weights by torchvision's names: what belongs to a backbone is loaded, and a stray name is told,
whatever it looks like.
"""

import pytest
import torch
from torchvision.models import densenet121

from reid_repro.learning.backbones import build_backbone, fill_backbone


@pytest.fixture(scope="module")
def published():
    return densenet121(weights=None).state_dict()


def test_every_tensor_of_a_densenet_finds_its_place(published):
    backbone = build_backbone("densenet121", last_stride=1)
    fill_backbone(backbone, published, "a file")
    ours = backbone.state_dict()
    assert torch.equal(
        ours["stages.1.0.conv.weight"], published["features.transition1.conv.weight"]
    )
    assert torch.equal(
        ours["stages.3.1.denselayer16.conv2.weight"],
        published["features.denseblock4.denselayer16.conv2.weight"],
    )
    assert torch.equal(ours["stages.3.2.running_var"], published["features.norm5.running_var"])


@pytest.mark.parametrize(
    "stray",
    [
        "features.head.weight", "features.denseblock9.conv.weight", "features.0.weight",
        "features.norm.x",
    ],
)
def test_a_stray_name_is_told_and_nothing_is_loaded(published, stray):
    backbone = build_backbone("densenet121")
    before = backbone.stem[0].weight.clone()
    with pytest.raises(ValueError, match=r"do not fit this backbone: .*1 unknown"):
        fill_backbone(backbone, {**published, stray: torch.zeros(1)}, "a file")
    assert torch.equal(backbone.stem[0].weight, before)
