"""Data sets that break the rules of the task, odd files and folders, weights that are no weights:
each refused by name.
"""

import os
import re
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from made import GALLERY, QUERY, TRAIN, photograph, refused

from reid_repro.learning.backbones import load_strictly
from reid_repro.datasets import find_benchmarks, open_benchmark, why_missing
from reid_repro.datasets.core import Benchmark, Split, list_images, load_images, locate
from reid_repro.datasets.cuhk03 import read_cuhk03
from reid_repro.datasets.market1501 import read_market1501
from reid_repro.toytown import toytown_root

NAMES = {
    TRAIN: [
        "0002_c1s1_000001_01", "0002_c2s1_000001_01", "0007_c1s1_000001_01", "0009_c1s1_000001_01",
    ],
    QUERY: ["0004_c1s1_000001_01", "0005_c1s1_000001_01"],
    GALLERY: [
        "-1_c3s1_000001_01", "0000_c1s1_000001_01", "0004_c2s1_000001_01", "0005_c1s1_000002_01",
    ],
}


@pytest.fixture
def town(tmp_path) -> Path:
    "Three people to learn from, two to search for: the whole of a benchmark in Market's layout."
    for folder, names in NAMES.items():
        for name in names:
            photograph(tmp_path / "town" / folder / f"{name}.jpg")
    return tmp_path / "town"


def test_junk_and_distractors_may_wait_in_the_gallery(town):
    assert open_benchmark("toytown", town).gallery.pids.tolist() == [-1, 0, 4, 5]


@pytest.mark.parametrize(
    ("folder", "name", "words"),
    [
        (TRAIN, "-1_c1s1_000003_01", ["split 'train'", "gallery alone"]),
        (TRAIN, "0000_c1s1_000003_01", ["split 'train'", "gallery alone"]),
        (QUERY, "-1_c1s1_000003_01", ["split 'query'", "gallery alone"]),
        (QUERY, "0000_c1s1_000003_01", ["split 'query'", "gallery alone"]),
        (QUERY, "0002_c1s1_000003_01", ["person 2", "split 'query'", "remove"]),
        (GALLERY, "0007_c2s1_000003_01", ["person 7", "split 'gallery'", "remove"]),
        (QUERY, "9999999999_c1s1_000003_01", ["9 digits", "Rename or remove"]),
        (GALLERY, "0004_c99999999999999999999s1_000003_01", ["9 digits", "Rename or remove"]),
    ],
)
def test_a_file_that_breaks_the_rules_is_named(town, folder, name, words):
    photograph(town / folder / f"{name}.jpg")
    for opened in (
        lambda: open_benchmark("toytown", town), lambda: read_market1501(town, check=False),
    ):
        refused(opened, f"{name}.jpg", *words)


def test_one_person_cannot_be_told_from_others(town):
    for path in [*(town / TRAIN).glob("0007*"), *(town / TRAIN).glob("0009*")]:
        path.unlink()
    refused(
        lambda: open_benchmark("toytown", town), "split 'train'", "one person", "0002_c1s1",
        "two people",
    )
    refused(lambda: read_market1501(town, split="train-only", check=False), "three are the least")


def test_some_query_must_have_an_answer_under_another_camera(town):
    # person 5 waits under the query's own camera only
    (town / GALLERY / "0004_c2s1_000001_01.jpg").unlink()
    refused(
        lambda: open_benchmark("toytown", town), "0004_c1s1_000001_01.jpg", "another camera",
        "split 'gallery'",
    )
    photograph(town / GALLERY / "0005_c2s1_000001_01.jpg")
    assert len(open_benchmark("toytown", town).query) == 2  # a single answerable query will do


def test_the_rules_hold_for_lists_made_by_hand_and_for_cuhk03(tmp_path):
    train, query = (
        Split(n, ["a", "b"], p, [1, 2]) for n, p in (("train", [1, 2]), ("query", [3, 4]))
    )
    refused(
        lambda: Benchmark(
            "mine", tmp_path, "single-query", train, query, Split("gallery", ["c"], [2], [1])
        ),
        "person 2", "'c'",
    )
    for folder, names in {
        TRAIN: ["0001_c1_1", "0003_c1_1"], QUERY: ["0002_c1_1"], GALLERY: ["0002_c2_1"],
    }.items():
        for name in names:
            photograph(tmp_path / "cuhk03-np" / "detected" / folder / f"{name}.png")
    assert read_cuhk03(tmp_path, check=False).train.num_identities == 2
    shared = photograph(tmp_path / "cuhk03-np" / "detected" / GALLERY / "0003_c2_1.png")
    refused(lambda: read_cuhk03(tmp_path, check=False), "person 3", str(shared))


def test_nine_digits_fit_and_ten_do_not(tmp_path):
    photograph(tmp_path / "123456789_c1.jpg")
    assert list_images(
        tmp_path, "train", re.compile(r"(\d+)_c(\d+)"), "1_c1.jpg"
    ).pids.tolist() == [123456789]
    photograph(tmp_path / f"{2**63}_c1.jpg")
    refused(
        lambda: list_images(tmp_path, "train", re.compile(r"(\d+)_c(\d+)"), "1_c1.jpg"),
        f"{2**63}_c1.jpg", "9 digits",
    )


@pytest.mark.parametrize(("width", "height"), [(8192, 8193), (9000, 10000), (20000, 20000)])
@pytest.mark.parametrize("filtered", ["ignore", "error"])
def test_a_picture_that_is_a_bomb_is_refused_before_decoding(tmp_path, width, height, filtered):
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(photograph(tmp_path / "small.png").read_bytes())
    with bomb.open("r+b") as file:  # a header that promises more than there is, with its checksum
        head = (
            b"IHDR"
            + width.to_bytes(4, "big")
            + height.to_bytes(4, "big")
            + bomb.read_bytes()[24:29]
        )
        file.seek(12)
        file.write(head + zlib.crc32(head).to_bytes(4, "big"))
    with warnings.catch_warnings():
        warnings.simplefilter(filtered)
        refused(
            lambda: load_images(Split("train", [bomb], [1], [1]), 16, 8), "bomb.png", "pixels",
            "restore",
        )


@pytest.mark.parametrize("name", ["toytown", "market1501", "cuhk03-np-detected"])
def test_a_root_that_is_no_benchmark_is_named(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "bare").mkdir()
    places = {
        tmp_path / "away": "does not exist", tmp_path / "file": "is a file",
        tmp_path / "bare": f"no '{TRAIN}' in",
    }
    places |= {
        "~nobody-of-that-name/town": "cannot be opened", tmp_path / ("x" * 300): "cannot be opened",
    }
    for root, words in places.items():
        refused(lambda root=root: open_benchmark(name, root), name, str(root), words)
        if words != f"no '{TRAIN}' in":
            refused(lambda root=root: locate(root, (), TRAIN, name), "data_root", str(root))
            refused(lambda root=root: find_benchmarks(root), str(root), words)


def test_a_benchmark_that_is_there_but_odd_says_why_it_is_not_found(town, tmp_path):
    assert find_benchmarks(town) == ["market1501"] and why_missing("market1501", town) == ""
    photograph(town / QUERY / "holiday.jpg")
    assert find_benchmarks(town) == []
    assert "holiday.jpg" in why_missing("market1501", town) and "Rename or remove" in why_missing(
        "market1501", town
    )
    refused(lambda: why_missing("toytown", town), "toytown", error=ValueError)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    small = dict(identities=4, images_per_identity=2, junk=0, distractors=0)
    (tmp_path / "file").write_text("mine")
    places = [tmp_path / "file"]
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        places.append(tmp_path / "locked")
    for place in places:
        monkeypatch.setenv("XDG_CACHE_HOME", str(place))
        refused(
            lambda: toytown_root(**small), str(place), "XDG_CACHE_HOME", "data_root",
            error=ValueError,
        )
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("bn1.bias", lambda t: t.index_fill(0, torch.tensor([3]), torch.nan), "not finite"),
        ("bn1.bias", lambda t: t - torch.inf, "not finite"),
        # finite in the file, not in float32
        ("bn1.bias", lambda t: t.double() + 1e300, "not finite"),
        ("bn1.bias", lambda t: t.to(torch.complex64), "complex64"),
        ("bn1.bias", lambda t: t.to(torch.int8), "int8"),
        ("bn1.bias", lambda t: t > 0, "bool"),
    ],
)
def test_weights_that_are_no_numbers_are_refused_whole(key, value, words):
    import torchvision

    net = torchvision.models.resnet18(weights=None)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torchvision.models.resnet18(weights=None).state_dict()
    refused(lambda: load_strictly(net, state | {key: value(state[key])}, "file.safetensors"),
            "file.safetensors", "bn1.bias", words, error=ValueError)  # fmt: skip
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    half = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    load_strictly(net, half, "half")
    np.testing.assert_array_equal(net.bn1.bias.detach(), state["bn1.bias"])
