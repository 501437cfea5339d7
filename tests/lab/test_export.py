"""Networks that leave the project give the same features, or do not leave; published weights come in."""

import json

import pytest
import torch
from reid_repro.__main__ import main
from reid_repro.lab import export
from reid_repro.lab.export import export_network
from reid_repro.lab.methods import from_checkpoint
from reid_repro.learning.augmentation import normalise
from reid_repro.learning.conversion import convert_weights, prefix_of, tensors_of
from safetensors.torch import load_file, save_file

IDE, MINET = "ide-ide_plus-toytown-smoke-s0", "minet-minet-toytown-smoke-s0"


def pixels(n: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)


def test_onnx_of_a_trained_network_takes_any_number_of_images(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install '.[export]'")
    pytest.importorskip("onnxscript")
    main(["export", IDE, "--to", str(tmp_path), "--format", "onnx"])
    card = json.loads((tmp_path / f"{IDE}.json").read_text())
    method = from_checkpoint(IDE, device="cpu")
    session = onnxruntime.InferenceSession(tmp_path / card["file"])
    for n in (1, 5):
        images = normalise(pixels(n, card["input"]["height"], card["input"]["width"]))
        found = session.run(None, {"images": images.numpy()})[0]
        assert found.shape == (n, card["output"]["features"])
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(found), method.model(images), atol=1e-4)
    assert card["ledger"]["row"] == "ide_plus" and len(card["sha256"]) == 64


@pytest.mark.parametrize("kind", ["torchscript", "export"])
def test_a_file_that_gives_other_features_never_exists(kind, tmp_path, monkeypatch):
    "The exported copy has one weight changed."
    method = from_checkpoint(IDE, device="cpu")
    writer = {"torchscript": "_torchscript", "export": "_exported"}[kind]
    real = getattr(export, writer)

    def spoilt(model, images, path):
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1
            real(model, images, path)
            next(model.parameters()).view(-1)[0] -= 1

    monkeypatch.setattr(export, writer, spoilt)
    with pytest.raises(ValueError, match=r"differ by .* nothing was written"):
        export_network(method, tmp_path, kind)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_named(tmp_path):
    with pytest.raises(SystemExit, match="describes pairs of images"):
        main(["export", MINET, "--to", str(tmp_path)])
    with pytest.raises(SystemExit, match="format 'pt' is unknown; known are torchscript"):
        main(["export", IDE, "--to", str(tmp_path), "--format", "pt"])
    assert not list(tmp_path.iterdir())


NAMES = ["conv1.weight", "layer1.0.conv1.weight", "layer3.0.conv1.weight", "layer3.1.conv1.weight"]


@pytest.mark.parametrize("prefix", ["", "module.", "base.", "backbone.", "module.base.", "a.b.c."])
@pytest.mark.parametrize("ending", ["pth", "pth.tar", "safetensors"])
def test_prefixes_are_found_and_taken_off(prefix, ending, tmp_path):
    state = {prefix + name: torch.rand(2) for name in NAMES}
    others = {"classifier.weight": torch.rand(3)} if prefix else {}
    path = tmp_path / f"weights.{ending}"
    if ending == "safetensors":
        save_file(state | others, path)
    else:
        torch.save({"epoch": 3, "state_dict": state | others}, path)
    assert prefix_of(list(state | others)) == prefix
    target = tmp_path / "out.safetensors"
    main(["convert", str(path), str(target)])
    kept = load_file(target)
    assert set(kept) == {*NAMES}
    assert all(torch.equal(kept[name], state[prefix + name]) for name in NAMES)


def test_nothing_is_unpickled(tmp_path):
    class Runs:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"state_dict": {"conv1.weight": Runs()}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="without running code"):
        tensors_of(tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ({"epoch": 3}, "holds no tensors by name"), ([torch.zeros(2)], "holds no tensors by name"),
        ({"x.weight": torch.zeros(2)}, "holds no backbone of this project"),
    ],
)
def test_what_does_not_fit_is_said(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        convert_weights(tmp_path / "x.pth", tmp_path / "out.safetensors")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:-40])
    with pytest.raises(ValueError, match="is damaged, or cannot be read"):
        convert_weights(tmp_path / "cut.pth", tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match=r"must end in .safetensors"):
        convert_weights(tmp_path / "x.pth", tmp_path / "out.pth")
    with pytest.raises(ValueError, match="is no file"):
        convert_weights(tmp_path / "gone.pth", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
