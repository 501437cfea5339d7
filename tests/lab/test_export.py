"""Networks that leave the project give the same features, or do not leave; published weights come in."""

import json
from shutil import copyfile
from unicodedata import normalize

import pytest
import torch
from reid_repro.__main__ import main
from reid_repro.lab import export
from reid_repro.lab.configuration import finished_run
from reid_repro.lab.export import export_network
from reid_repro.lab.methods import METHODS, checkpoint_names, from_checkpoint
from reid_repro.lab.provenance import project_root
from reid_repro.learning.augmentation import normalise
from reid_repro.learning.backbones import build_backbone
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
    card = json.loads((tmp_path / f"{IDE}.onnx.json").read_text())
    method = from_checkpoint(IDE, device="cpu")
    session = onnxruntime.InferenceSession(tmp_path / card["file"])
    for n in (1, 5):
        images = normalise(pixels(n, card["input"]["height"], card["input"]["width"]))
        found = session.run(None, {"images": images.numpy()})[0]
        assert found.shape == (n, card["output"]["features"])
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(found), method.model(images), atol=1e-4)
    assert card["ledger"]["row"] == "ide_plus" and len(card["sha256"]) == 64


OTHERS = [
    name for name in checkpoint_names()
    if name != IDE and METHODS[name.partition("-")[0]].embeds
]


SLOW = pytest.mark.slow("a quarter of a minute each; the notebook does all of them, too")


@pytest.mark.parametrize("kind", [
    "torchscript", pytest.param("export", marks=SLOW), pytest.param("onnx", marks=SLOW),
])
@pytest.mark.parametrize("name", OTHERS, ids=lambda name: name.partition("-")[0])
def test_every_method_that_embeds_an_image_leaves(name, kind, tmp_path):
    "Read back and compared before the file exists."
    if kind == "onnx":
        pytest.importorskip("onnxruntime", reason="needs pip install '.[export]'")
        pytest.importorskip("onnxscript")
    path = export_network(from_checkpoint(name, device="cpu"), tmp_path, kind)
    card = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert path.is_file() and card["difference"] <= 1e-4 and card["input"]["resize"]


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
    with pytest.raises(ValueError, match=r"the name 'ide-x'; give from_checkpoint\('ide-x'\)"):
        export_network("ide-x", tmp_path)
    with pytest.raises(SystemExit, match="describes pairs of images"):
        main(["export", MINET, "--to", str(tmp_path)])
    with pytest.raises(SystemExit, match="format 'pt' is unknown; known are torchscript"):
        main(["export", IDE, "--to", str(tmp_path), "--format", "pt"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_of_another_precision_and_a_folder_that_is_a_file_are_named(kind, tmp_path):
    method, file = from_checkpoint(IDE, device="cpu"), tmp_path / "file"
    file.touch()
    for folder in (file, file / "below"):
        with pytest.raises(ValueError, match="a file stands in its place; give another folder"):
            export_network(method, folder, "torchscript")
    method.model.to(kind)
    with pytest.raises(ValueError, match=rf"{kind}; this needs float32: take model.float\(\)"):
        export_network(method, tmp_path, "torchscript")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


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


def small(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(2, generator=generator) for name in NAMES}


def behind(prefix: str, seed: int = 0) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in small(seed).items()}


def saved(folder, content):
    torch.save(content, folder / "x.pth")
    return folder / "x.pth"


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"state_dict": small()}}, {"state_dict": {"model": behind("module.")}},
        {"network": small(), "epoch": 3}, {"params": behind("net.")},
        {"state_dict_ema": small(), "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}},
        {"model_ema": small(1), "model": small()}, {"a": {"b": {"net": small()}}},
    ],
)
def test_tensors_are_found_however_deep(content, tmp_path):
    path, target = saved(tmp_path, content), tmp_path / "o.safetensors"
    assert convert_weights(path, target) == "resnet18"
    assert all(torch.equal(value, small()[name]) for name, value in load_file(target).items())


def test_several_networks_are_not_chosen_between(tmp_path):
    target = tmp_path / "o.safetensors"
    path = saved(tmp_path, {"teacher": small(), "student": small(1)})
    with pytest.raises(ValueError, match="holds several networks \\(teacher, student\\)"):
        convert_weights(path, target)
    for names in (("student.", "teacher."), ("rgb.", "ir.base."), ("", "momentum.")):
        path = saved(tmp_path, {**behind(names[0]), **behind(names[1], 1)})
        with pytest.raises(ValueError, match=r"several backbones, behind .*--strip"):
            convert_weights(path, target)
        assert not target.exists()
        convert_weights(path, target, strip=names[1])
        assert load_file(target)[NAMES[0]].equal(small(1)[NAMES[0]])
        target.unlink()
    path = saved(tmp_path, {**behind("a."), **behind("b.")})  # two names of one network
    assert convert_weights(path, target) == "resnet18"


def test_heads_stay_away_and_other_networks_are_named(tmp_path):
    target = tmp_path / "o.safetensors"
    heads = {"bottleneck.weight": torch.ones(2), "fc.0.weight": torch.ones(2)}
    convert_weights(saved(tmp_path, {**small(), **heads}), target)
    assert set(load_file(target)) == {*NAMES, "fc.0.weight"}
    for strange in ("layer1.0.se.fc1.weight", "layer1.0.bn1.IN.weight", "layer3.0.nl.g.weight"):
        path = saved(tmp_path, {**small(), strange: torch.ones(2)})
        with pytest.raises(ValueError, match=f"another network than resnet18.*{strange}"):
            convert_weights(path, tmp_path / "p.safetensors")


@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "conv1.weight is quantized"),
        (lambda x: x.to("meta"), "conv1.weight holds no plain numbers"),
        (lambda x: x.to_sparse(), "conv1.weight holds no plain numbers"),
    ],
)
def test_tensors_without_plain_numbers_are_named(change, words, tmp_path):
    path = saved(tmp_path, small() | {"conv1.weight": change(torch.rand(2))})
    with pytest.raises(ValueError, match=words):
        convert_weights(path, tmp_path / "o.safetensors")


def test_a_home_is_a_home_in_what_is_written(tmp_path, monkeypatch):
    method = from_checkpoint(IDE, device="cpu")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    convert_weights(saved(tmp_path, small()), "~/a/o.safetensors")
    export_network(method, "~/b", "torchscript")
    assert (tmp_path / "home/a/o.safetensors").is_file() and any((tmp_path / "home/b").iterdir())
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("size", [(1, 128, 64), (3, 136, 64), (3, 64, 128), (0, 128, 64)])
def test_images_of_another_size_export_nothing(size, tmp_path):
    method = from_checkpoint(IDE, device="cpu")
    with pytest.raises(ValueError, match="two or more of 128×64"):
        export_network(method, tmp_path, "torchscript", images=pixels(*size))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("weights", [{"conv1.weight": 1}, True, 3, b"x"])
def test_weights_of_another_type_are_named(weights):
    with pytest.raises(ValueError, match=f"weights is a {type(weights).__name__}"):
        build_backbone("resnet18", weights=weights)
    for stride in ("1", True, 3):
        with pytest.raises(ValueError, match=f"last_stride is 1 or 2, not {stride!r}"):
            build_backbone("resnet18", last_stride=stride)


@pytest.mark.parametrize(("there", "asked"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_files_are_found_in_either_unicode_form(there, asked, tmp_path):
    saved(tmp_path, {"model": small()}).rename(tmp_path / normalize(there, "é.pth"))
    given = tmp_path / normalize(asked, "é.pth")
    assert convert_weights(given, tmp_path / "o.safetensors") == "resnet18"
    kept = project_root() / "results" / "checkpoints"
    copyfile(kept / f"{IDE}.safetensors", tmp_path / normalize(there, "ü.safetensors"))
    assert from_checkpoint(tmp_path / normalize(asked, "ü.safetensors")).metadata["row"] == "ide_plus"
    run = tmp_path / normalize(there, "Läufe")
    run.mkdir()
    copyfile(kept / f"{IDE}.safetensors", run / "model.safetensors")
    assert finished_run(normalize(asked, str(run)))[0] == run / "model.safetensors"
