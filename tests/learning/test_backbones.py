"""Weights by torchvision's names: what belongs to a backbone is loaded, and a stray name is told,
whatever it looks like.
"""

import unicodedata

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import densenet121

from reid_repro.learning.backbones import build_backbone, load_strictly, pick_weights


@pytest.fixture(scope="module")
def published():
    return densenet121(weights=None).state_dict()


def test_every_tensor_of_a_densenet_finds_its_place(published, tmp_path):
    save_file(published, tmp_path / "densenet121.safetensors")
    ours = build_backbone("densenet121", 1, tmp_path).state_dict()
    for our_name, name in (
        ("stages.1.0.conv.weight", "transition1.conv.weight"),
        ("stages.3.1.denselayer16.conv2.weight", "denseblock4.denselayer16.conv2.weight"),
        ("stages.3.2.running_var", "norm5.running_var"),
    ):
        assert torch.equal(ours[our_name], published[f"features.{name}"])


@pytest.mark.parametrize(
    "stray",
    [
        "features.head.weight", "features.denseblock9.conv.weight", "features.0.weight",
        "features.norm.x",
    ],
)
def test_a_stray_name_is_told_and_nothing_is_loaded(published, stray):
    net = densenet121(weights=None)
    before = net.features.conv0.weight.clone()
    with pytest.raises(ValueError, match=r"do not fit this backbone: .*1 unknown"):
        load_strictly(net, {**published, stray: torch.zeros(1)}, "a file")
    assert torch.equal(net.features.conv0.weight, before)


@pytest.mark.parametrize("prefix", ["module.", "base.", "a.b."])
def test_a_prefix_is_told_with_the_command_that_takes_it_off(published, prefix):
    state = {prefix + key: value for key, value in published.items()}
    with pytest.raises(ValueError, match=rf"begin with '{prefix}', which .*reid_repro convert"):
        load_strictly(densenet121(weights=None), state, "a file")


def test_a_lost_tensor_is_no_prefix(published):
    state = {key: value for key, value in published.items() if key != "features.conv0.weight"}
    with pytest.raises(ValueError, match=r"1 missing .*take an undamaged file"):
        load_strictly(densenet121(weights=None), state, "a file")


def test_a_file_of_torch_is_told_how_it_is_converted(published, tmp_path):
    torch.save(published, tmp_path / "densenet121.pth")
    with pytest.raises(ValueError, match="python -m reid_repro convert"):
        build_backbone("densenet121", 1, tmp_path / "densenet121.pth")


@pytest.mark.parametrize("name", ["resnet50.pth", "model.pth.tar", "resnet50_x.pt"])
def test_a_folder_of_torchs_files_is_told_how_they_are_converted(name, tmp_path):
    (tmp_path / name).touch(), (tmp_path / "a.pth").touch()
    for others in ("no safetensors file", "vgg16.safetensors"):
        with pytest.raises(ValueError, match=f"there is {others}, and .*reid_repro convert '") as told:
            pick_weights(tmp_path, "resnet50")
        chosen = name if name.startswith("resnet50") else "a.pth"
        assert f"convert '{tmp_path / chosen}' '{tmp_path / 'resnet50.safetensors'}'" in str(told.value)
        (tmp_path / "vgg16.safetensors").touch()


@pytest.mark.parametrize(("there", "asked"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_weights_are_found_in_either_unicode_form(there, asked, tmp_path):
    top = tmp_path / unicodedata.normalize(there, "Ü")
    top.mkdir()
    names = ("conv1.weight", "layer1.0.conv1.weight", "layer3.0.conv1.weight", "layer3.1.conv1.weight")
    save_file({name: torch.zeros(2) for name in names}, top / "resnet18.safetensors")
    name = unicodedata.normalize(asked, str(top))
    assert name != str(top)
    for text in (name, f"{name}/resnet18.safetensors", f"{name}/resnet18.safetensors, {top}/resnet18b"):
        (top / "resnet18b").touch()
        if "," in text:
            with pytest.raises(ValueError, match="need one file"):  # both were found
                pick_weights(text, "resnet18")
        else:
            assert pick_weights(text, "resnet18") == str(top / "resnet18.safetensors")
