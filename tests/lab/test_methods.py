"""One interface to seven networks: the same construction and the same distances as the reproduction
notebooks, weights that are refused for what they say, pictures that leave nothing behind."""

import ast
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from reid_repro import casn, dcc, minet
from reid_repro.lab import methods
from reid_repro.learning.checkpoints import (
    open_weights, read_metadata, read_catalogue, save_weights,
)
from reid_repro.lab.configuration import declared, resolve
from reid_repro.datasets import load_images, open_benchmark
from reid_repro.datasets.core import decode_image
from reid_repro.evaluation import distance_matrix
from reid_repro.lab.ledger import PAPERS
from reid_repro.lab.methods import METHODS, build, checkpoint_names, from_checkpoint, slim, views
from reid_repro.evaluation.protocols import score_distances
from reid_repro.lab.rows import read_profile, read_rows
from reid_repro.learning.training import embed
from reid_repro.learning.vgg import FCCNN

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "results" / "checkpoints"
NAMES = list(json.loads((KEPT / "weights.json").read_text()))
CHEAP = ("ide-ide_plus-toytown-smoke-s0", "pcb-pcb-toytown-smoke-s0")


@pytest.fixture(autouse=True)
def no_figure_of_another_test():
    plt.close("all")


@pytest.fixture(scope="module")
def loaded() -> dict:
    return {name: from_checkpoint(name, KEPT, device="cpu") for name in NAMES}


@pytest.fixture(scope="module")
def town():
    return open_benchmark("toytown")


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(9, 3, 8, 4, generator=generator) * 255
    pictures = torch.nn.functional.interpolate(smooth, (128, 64), mode="bilinear").to(torch.uint8)
    return pictures[:3], pictures[3:]


def config_of(paper: str, row: str) -> SimpleNamespace:
    "The configuration of a row under the smoke profile."
    defaults = {
        name: value
        for name, (_, value) in declared(ROOT / read_rows(paper, ROOT)[0].notebook).items()
    }
    begins = next(r.start for r in read_rows(paper, ROOT) if r.name == row)
    start = {"start_from": "none"} if begins else {}  # without the run that it begins with
    return resolve(
        paper, {**defaults, **read_profile("smoke", ROOT).of(paper, row), "row": row, **start}, ROOT
    )


def notebook_network(paper: str, config: SimpleNamespace, people: int) -> torch.nn.Module:
    """The network that the reproduction notebook itself builds: the statements of its model cell,
    without the training.
    """
    cells = json.loads((ROOT / read_rows(paper, ROOT)[0].notebook).read_text())["cells"]
    trees = [ast.parse("".join(c["source"])) for c in cells if c["cell_type"] == "code"]
    pids = np.repeat(np.arange(1, people + 1), 4)
    space = {
        "config": config,
        "benchmark": SimpleNamespace(
            train=SimpleNamespace(num_identities=people, pids=pids, labels=pids - 1)
        ),
    }
    for statement in [
        s for tree in trees for s in tree.body if isinstance(s, (ast.Import, ast.ImportFrom))
    ]:
        exec(compile(ast.Module([statement], []), paper, "exec"), space)
    seeds = [
        t
        for t in trees
        if any(ast.unparse(s).startswith("torch.manual_seed(config.seed)") for s in t.body)
    ]
    assert len(seeds) == 1
    for statement in seeds[0].body:
        if not any(
            isinstance(n, ast.Call) and ast.unparse(n.func) == "train" for n in ast.walk(statement)
        ):
            exec(compile(ast.Module([statement], []), paper, "exec"), space)
    return space["model"]


def test_every_paper_has_an_adapter():
    "A method begun by `make new-paper` may get its own later; nothing else may lack one."
    ours = {"ide", "pcb", "minet", "dcc", "casn", "ianet", "can"}
    assert ours <= set(METHODS) <= set(PAPERS)


@pytest.mark.parametrize("paper", METHODS)
def test_networks_are_those_of_the_reproduction_notebooks(paper):
    """Every row, tiny: the same tensors from the same seed as the notebook's own statements give,
    or a refusal that names the row.
    """
    built = 0
    for row in read_rows(paper, ROOT):
        config = config_of(paper, row.name)
        if config.backbone != "tiny":  # the same code with larger numbers
            continue
        try:
            torch.manual_seed(config.seed)
            mine = build(paper, vars(config), 40)
        except ValueError as error:
            assert row.name in str(error) and (
                row.set.keys() & {"features", "method", "metric", "kissme"}
            ), error
            continue
        theirs = notebook_network(paper, config, 40)
        # layers with kernels and strides
        assert repr(mine) == repr(theirs) and not isinstance(mine, FCCNN)
        expected, found = theirs.state_dict(), mine.state_dict()
        assert list(found) == list(expected) and all(
            torch.equal(found[k], expected[k]) for k in expected
        ), row.name
        plain = {
            k: v for k, v in vars(theirs).items() if isinstance(v, (int, float, str, tuple, bool))
        }
        assert plain == {k: vars(mine)[k] for k in plain}, row.name
        built += 1
    assert built >= 2


def test_parameters_that_are_missing_or_foreign_are_named():
    with pytest.raises(ValueError, match="method 'bot' is unknown; known are ide, pcb"):
        build("bot", {}, 10)
    with pytest.raises(ValueError, match="lack 'last_stride'"):
        build("pcb", {"backbone": "tiny"}, 10)
    with pytest.raises(ValueError, match="backbone 'huge'"):
        build("ide", {**vars(config_of("ide", "ide")), "backbone": "huge"}, 10)


# ---------------------------------------------------------------- what is committed


def test_each_method_has_weights_that_are_listed_and_whole():
    assert {read_catalogue(KEPT)[name]["paper"] for name in NAMES} == set(METHODS)
    assert {p.name for p in KEPT.iterdir()} == {
        "weights.json", *(read_catalogue(KEPT)[name]["file"] for name in NAMES),
    }
    assert checkpoint_names(KEPT)[0].startswith("ide-") and checkpoint_names() == checkpoint_names(
        KEPT
    )
    for name in NAMES:
        path = open_weights(KEPT, name)  # size and hash
        metadata = read_metadata(path)
        assert path.stat().st_size < 5e6 and not str(metadata["commit"]).endswith("-dirty")
        assert metadata["dataset"] == "toytown" and metadata["identities"] == 200
        assert metadata["left_out"] == ["classifier", "loss"]


@pytest.mark.parametrize("name", CHEAP)
def test_a_loaded_network_measures_what_its_run_wrote_down(name, loaded, town):
    """To the last digit on the pictures it was trained on; processors render Toytown with pixels
    that differ by a level here and there.
    """
    method = loaded[name]
    dist = method.distances(
        *(load_images(split, *method.size) for split in (town.query, town.gallery))
    )
    scores, told = score_distances(town, dist).scores, method.metadata["metrics"]
    found = {
        **{f"rank{k}": 100 * scores.rank(k) for k in (1, 5, 10, 20)}, "mAP": 100 * scores.mAP,
        "mINP": 100 * scores.mINP,
    }
    same = method.metadata["fingerprint"] == town.fingerprint
    assert found.keys() == told.keys() and all(
        abs(found[k] - told[k]) < (6e-5 if same else 2.1) for k in told
    )


# ---------------------------------------------------------------- distances, features, pictures


@pytest.mark.parametrize("name", NAMES)
def test_distances_are_those_of_the_reproduction_path(name, loaded, images):
    method, (query, gallery) = loaded[name], images
    query, gallery = (methods.resized(x, method.size) for x in (query, gallery))
    model = method.model
    c = SimpleNamespace(**method.metadata["parameters"])
    paper = method.metadata["paper"]
    if paper == "minet":
        expected = minet.minet_distances(
            model, query, gallery, None, memory=c.memory_mb * 2**20, device="cpu"
        )
    elif paper == "dcc":
        expected = dcc.dcc_distances(
            model, query, gallery, None, c.shortlist, memory=c.memory_mb * 2**20, device="cpu"
        )
    elif paper == "casn":
        expected = casn.casn_distances(model, query, gallery, device="cpu")
    else:
        features = [embed(model, x, device="cpu") for x in (query, gallery)]
        assert torch.equal(method.embed(query), features[0])
        expected = distance_matrix(*features)  # what `protocols.answer` ranks by
    assert torch.equal(method.distances(query, gallery), expected)
    torch.testing.assert_close(
        method.distances(query, gallery, memory=2**20), expected, rtol=1e-4, atol=1e-4
    )


def test_images_of_another_size_are_resized(loaded, images):
    method = loaded[CHEAP[0]]
    large = torch.nn.functional.interpolate(images[0].float(), (256, 128), mode="nearest").to(
        torch.uint8
    )
    dist = method.distances(large, images[0])
    assert (dist.argmin(1) == torch.arange(3)).all()


@pytest.mark.parametrize("name", [CHEAP[0], next(n for n in NAMES if n.startswith("dcc-"))])
def test_anything_but_levels_in_a_tensor_is_refused_by_name(name, loaded, images):
    method, good = loaded[name], images[0]
    small = good[:, :, ::2, ::2]  # another size, the same size
    for bad in (
        small.float() / 255, small.long(), good.float(), good.numpy(), good[0], good[:, :1], None,
    ):
        with pytest.raises(
            ValueError, match=r"query_images must be uint8 of shape .*0\.\.1 times 255"
        ):
            method.distances(bad, good)
        with pytest.raises(ValueError, match="gallery_images must be uint8"):
            method.distances(good, bad)
        if method.adapter.embeds:
            with pytest.raises(ValueError, match="images must be uint8"):
                method.embed(bad)
    for bad in (good[0].float(), good[0].numpy(), good, good[0, :1], None):
        for pair, who in (((bad, good[0]), "query_image"), ((good[0], bad), "gallery_image")):
            with pytest.raises(ValueError, match=rf"{who}\[None\] must be uint8"):
                method.picture(*pair)
    for memory in (-1, "1M", 1.5, 0):
        with pytest.raises(ValueError, match="memory must be a whole number from 1"):
            method.distances(good, good, memory=memory)
    with pytest.raises(ValueError, match="axes has 0 entries; give four"):
        method.picture(good[0], good[0], [])


def test_files_and_pillow_images_have_the_features_of_their_pixels(loaded, tmp_path):
    method = loaded[CHEAP[0]]
    height, width = method.size
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (50, 20, 3), np.uint8)) for _ in range(3)]
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for picture, path in zip(pictures, paths):
        picture.save(path)
    pixels = torch.from_numpy(np.stack([decode_image(p, height, width) for p in paths]))
    wanted = method.embed(pixels.permute(0, 3, 1, 2).contiguous())
    for given in (paths, list(map(str, paths)), pictures, [paths[0], *pictures[1:]], iter(paths)):
        assert torch.equal(method.embed_files(given), wanted)
    turned = Image.Exif()
    turned[0x0112] = 6
    pictures[0].transpose(Image.Transpose.ROTATE_90).save(tmp_path / "t.png", exif=turned)
    assert torch.equal(method.embed_files([tmp_path / "t.png"]), method.embed_files(paths[:1]))
    for given, words in (
        ([], "paths is empty"), ("a.jpg", "give a list"), ([tmp_path / "no.jpg"], "no.jpg"),
        ([Image.new("F", (4, 4))], "mode F"),
    ):
        with pytest.raises(ValueError, match=words):
            method.embed_files(given)


def test_pair_methods_have_no_features_and_say_so(loaded, images):
    for name in NAMES:
        if name.split("-")[0] in ("minet", "dcc"):
            with pytest.raises(ValueError, match="describes pairs"):
                loaded[name].embed(images[0])
        else:
            assert loaded[name].embed(images[0]).shape[0] == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_has_four_panels_and_leaves_no_figure_open(name, loaded, images):
    before = plt.get_fignums()
    figure = loaded[name].picture(images[0][0], images[1][0])
    assert len(figure.axes) == 4 and all(ax.has_data() for ax in figure.axes)
    assert figure._repr_png_()[:4] == b"\x89PNG" and plt.get_fignums() == before
    assert figure.axes[0].get_ylabel().startswith(PAPERS[loaded[name].metadata["paper"]])
    # into given axes
    assert loaded[name].picture(images[1][1], images[1][2], figure.axes) is figure


def test_views_lay_methods_side_by_side(loaded, images):
    figure = views(images[0][0], images[1][0], [loaded[name] for name in NAMES[:2]])
    assert len(figure.axes) == 8 and not plt.get_fignums()
    with pytest.raises(ValueError, match="at least one method"):
        views(images[0][0], images[1][0], [])
    with pytest.raises(ValueError, match=r"not a name; take \[from_checkpoint"):
        views(images[0][0], images[1][0], NAMES[:2])


# ---------------------------------------------------------------- files


def test_slim_leaves_out_what_only_training_needs_and_nothing_else(tmp_path, images):
    config = vars(config_of("can", "can"))
    metadata = {
        **read_metadata(open_weights(KEPT, next(n for n in NAMES if n.startswith("can-")))),
        "parameters": config, "identities": 40,
    }
    metadata.pop("left_out")
    torch.manual_seed(0)
    full = save_weights(tmp_path / "run" / "model.safetensors", build("can", config, 40), metadata)
    small = slim(full, tmp_path)
    assert (
        small.name == "can-can-toytown-smoke-s0.safetensors"
        and small.stat().st_size < 0.9 * full.stat().st_size
    )
    a, b = (from_checkpoint(path, device="cpu") for path in (full, small))
    assert (
        a.model.classifier is not None
        and b.model.classifier is None
        and b.metadata["left_out"] == ["classifier", "loss"]
    )
    assert torch.equal(a.distances(*images), b.distances(*images))
    # the same content; safetensors writes its header in any order
    again = slim(small, tmp_path / "again")
    assert (
        read_metadata(again) == read_metadata(small)
        and again.stat().st_size == small.stat().st_size
    )


@pytest.mark.parametrize("change, told", [
    ({"schema": 99}, "are of schema 99; this version reads schema 1"),
    ({"schema": None}, "are of schema None"),
    ({"paper": "bot"}, "method 'bot' is unknown"),
    ({"identities": "many"}, "identities is 'many'; it should be a valid integer; train"),
    ({"identities": True}, "identities is True; it should be a valid integer"),
    ({"parameters": {}}, "parameters: 'height' is missing"),
    ({"parameters": {"height": 0, "width": 64}}, "height is 0; it should be greater than or equal to 1"),
    ({"parameters": {"height": 128, "width": -4}}, "width is -4; it should be greater than or equal to 1"),
    ({"parameters": {"height": 128, "width": 64}}, "parameters of ide lack 'features'"),
    ({"identities": 1}, "num_classes is 1"),
])
def test_weights_that_describe_something_else_are_refused_by_name(change, told, tmp_path, loaded):
    method = loaded[CHEAP[0]]
    path = save_weights(tmp_path / "odd.safetensors", method.model, {**method.metadata, **change})
    with pytest.raises(ValueError, match=told) as error:
        from_checkpoint(path)
    assert "odd.safetensors" in str(error.value)


def test_other_tensors_than_described_are_refused(tmp_path, loaded):
    method = loaded[CHEAP[0]]
    path = save_weights(tmp_path / "odd.safetensors", torch.nn.Linear(2, 2), method.metadata)
    with pytest.raises(ValueError, match=r"odd\.safetensors' do not fit"):
        from_checkpoint(path)


def test_nothing_is_unpickled_or_fetched(tmp_path, loaded, monkeypatch):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    (tmp_path / "bomb.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"bomb\.safetensors"):
        from_checkpoint(tmp_path / "bomb.safetensors")
    assert not (tmp_path / "exploded").exists()
    method = loaded[CHEAP[0]]
    parameters = {**method.metadata["parameters"], "weights": str(tmp_path / "bomb.safetensors")}
    path = save_weights(
        tmp_path / "fine.safetensors", method.model, {**method.metadata, "parameters": parameters}
    )
    # the start of that run is not read again
    assert from_checkpoint(path).metadata["parameters"]["weights"]


@pytest.mark.parametrize("device", ["cpu:0", torch.device("cpu"), torch.device("cpu", 0)])
def test_devices_are_objects_or_their_names(device, loaded, images):
    method = from_checkpoint(CHEAP[0], KEPT, device=device)
    assert method.distances(*images).equal(loaded[CHEAP[0]].distances(*images))
    with pytest.raises(ValueError, match="is unknown; take auto"):
        from_checkpoint(CHEAP[0], KEPT, device=torch.device("meta"))


def test_a_file_changed_behind_the_list_is_refused(tmp_path):
    for file in KEPT.iterdir():
        if file.name in ("weights.json", f"{CHEAP[0]}.safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert from_checkpoint(CHEAP[0], tmp_path).name == CHEAP[0]
    path = tmp_path / f"{CHEAP[0]}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match="is not the file that was listed"):
        from_checkpoint(CHEAP[0], tmp_path)
    with pytest.raises(ValueError, match="no weights 'ide_minus'"):
        from_checkpoint("ide_minus", tmp_path)
    for path in ("runs/x.pth", None, Path("x")):
        with pytest.raises(
            ValueError, match=r"is no path that ends in \.safetensors; give one, or a name"
        ):
            from_checkpoint(path, tmp_path)
    with pytest.raises(ValueError, match="device 'tpu' is unknown"):
        from_checkpoint(CHEAP[1], KEPT, device="tpu")


@pytest.mark.parametrize("keys", [("file", "sha256", "bytes"), None])
def test_a_list_that_gives_a_file_another_name_is_refused(keys, tmp_path):
    """Two entries exchanged, whole or what says which file it is: size and hash are right, the
    method is not.
    """
    for name in CHEAP:
        (tmp_path / f"{name}.safetensors").write_bytes((KEPT / f"{name}.safetensors").read_bytes())
    a, b = (read_catalogue(KEPT)[name] for name in CHEAP)
    listed = dict(
        zip(
            CHEAP,
            (
                (b, a)
                if keys is None
                else ({**a, **{k: b[k] for k in keys}}, {**b, **{k: a[k] for k in keys}})
            ),
        )
    )
    (tmp_path / "weights.json").write_text(json.dumps(listed))
    with pytest.raises(
        ValueError,
        match=f"weights '{CHEAP[0]}': .* says it is {CHEAP[1]}, .*do not trust this list",
    ):
        from_checkpoint(CHEAP[0], tmp_path)
    (tmp_path / "weights.json").write_text(
        json.dumps({CHEAP[0]: {**a, "metrics": {"rank1": 99.0}}})
    )
    with pytest.raises(ValueError, match="of another metrics than listed"):
        from_checkpoint(CHEAP[0], tmp_path)
    (tmp_path / "weights.json").write_text(json.dumps({CHEAP[0]: {**a, "paper": ["ide"]}}))
    with pytest.raises(ValueError, match=rf"entry '{CHEAP[0]}' has paper \['ide'\], expected str"):
        checkpoint_names(tmp_path)
    (tmp_path / "weights.json").write_text("{}")
    with pytest.raises(ValueError, match="it lists none: `make checkpoints` fills it"):
        from_checkpoint(CHEAP[0], tmp_path)


def test_the_script_packs_and_lists_finished_runs_and_names_missing_ones(tmp_path):
    config = vars(config_of("ide", "ide_plus"))
    metadata = {
        **read_metadata(open_weights(KEPT, CHEAP[0])), "parameters": config, "identities": 30,
    }
    save_weights(
        tmp_path / "runs/smoke/ide/ide_plus/toytown-s0/model.safetensors", build("ide", config, 30),
        metadata,
    )
    folders = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    script = [sys.executable, str(ROOT / "ci" / "checkpoints.py"), *folders, "--only"]
    done = subprocess.run([*script, "ide/ide_plus"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        list(read_catalogue(tmp_path / "out")) == [CHEAP[0]]
        and from_checkpoint(CHEAP[0], tmp_path / "out").model.classifier is None
    )
    done = subprocess.run(
        [*script, "ide/ide_plus,pcb/pcb"], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and "of smoke/pcb/pcb/toytown-s0; these runs have not finished" in done.stderr
    )


def test_a_network_is_shown_in_one_line():
    shown = repr(from_checkpoint("pcb-pcb-toytown-smoke-s0"))
    assert "\n" not in shown and len(shown) < 120
    assert re.fullmatch(r"<pcb-.*: PCB, 0\.36 million parameters, 128×64; rank1 .*, mAP .*>", shown)


def test_a_name_outside_a_checkout_says_what_to_give(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for asked in (checkpoint_names, lambda: from_checkpoint("ide-ide-toytown-smoke-s0")):
        with pytest.raises(ValueError, match=r"is in none; give folder=.* \.safetensors file"):
            asked()
