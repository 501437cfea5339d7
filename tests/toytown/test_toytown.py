"""Toytown from outside: whole renderings, interrupted ones, the cache, the command line."""

import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import reid_repro.toytown.town as toytown
from reid_repro.datasets import open_benchmark
from reid_repro.lab.ledger import read_ledger
from reid_repro.toytown import SEED, plan_shots, render, toytown_root
from reid_repro.toytown.people import (
    FINE_CUES, Look, altered, differing_cues, legible, look_alikes, random_look,
)
from reid_repro.toytown.drawing import draw_pedestrian
from reid_repro.toytown.cameras import CAMERAS, expose, occlude, photograph, scene

# the fingerprint of the usual Toytown, in every ledger entry of the smoke profile
TOWN = "efffac0eace24c08"
# 6 train, 3 are searched for: 37 images
SMALL = dict(identities=9, images_per_identity=3, junk=2, distractors=2)
NAME = re.compile(r"(-1|\d{4})_c([1-6])s1_\d{6}_\d{2}\.jpg$")


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_rendering_is_deterministic_to_the_byte_and_ignores_global_state(tmp_path):
    first = contents(render(tmp_path / "a", **SMALL))
    np.random.seed(1)  # noqa: NPY002 - the point: global state must not matter
    scene.cache_clear()
    assert contents(render(tmp_path / "b", **SMALL)) == first
    other = contents(render(tmp_path / "c", **SMALL, seed=SEED + 1))
    assert not set(first.values()) & set(other.values())


def test_pixels_do_not_depend_on_order_or_on_the_other_pictures():
    shots = plan_shots(**SMALL)
    forward = [shot.take().tobytes() for shot in shots]
    assert [shot.take().tobytes() for shot in reversed(shots)] == forward[::-1]
    assert plan_shots(**{**SMALL, "junk": 0, "distractors": 0}) == shots[:-4]


def test_layout_names_and_sizes(tmp_path):
    root = render(tmp_path / "town", **SMALL)
    assert {p.name for p in root.iterdir()} == {
        "bounding_box_train", "query", "bounding_box_test", "toytown.json",
    }
    pids = {}
    for path in root.glob("*/*"):
        pid, camid = NAME.match(path.name).groups()
        pids.setdefault(path.parent.name, []).append((int(pid), int(camid)))
        with Image.open(path) as image:
            assert image.size == (64, 128) and image.mode == "RGB"
    train, query, gallery = (pids[f] for f in ("bounding_box_train", "query", "bounding_box_test"))
    assert {p for p, _ in train} == {1, 2, 3, 4, 5, 6} and len(train) == 18
    assert {p for p, _ in query} == {7, 8, 9} and len(query) == 6
    assert {p for p, _ in gallery} == {-1, 0, 7, 8, 9} and len(gallery) == 13
    for pid, camid in query:
        assert any(p == pid and c != camid for p, c in gallery)


def test_default_plan_and_odd_sizes():
    count = Counter(
        (s.folder, s.name[:4] if s.name[:4] in ("0000", "-1_c") else "person") for s in plan_shots()
    )
    assert count == {("bounding_box_train", "person"): 2000, ("query", "person"): 200, ("bounding_box_test", "person"): 1000,
                     ("bounding_box_test", "-1_c"): 40, ("bounding_box_test", "0000"): 80}
    # a third of them, rounded down, at least one
    for people, test in ((2, 1), (3, 1), (5, 1), (6, 2), (7, 2), (300, 100)):
        shots = plan_shots(
            identities=people, images_per_identity=2, queries=3, junk=0, distractors=0, family=3
        )
        pids = {s.folder: {int(t.name[:4]) for t in shots if t.folder == s.folder} for s in shots}
        assert pids["bounding_box_train"] == set(range(1, people - test + 1))
        assert (
            pids["query"] == pids["bounding_box_test"] == set(range(people - test + 1, people + 1))
        )
        assert len(shots) == 2 * (people - test) + (2 + 3) * test


def test_every_person_passes_three_to_five_cameras():
    cameras = {}
    for shot in plan_shots(junk=0, distractors=0):
        cameras.setdefault(shot.name[:4], []).append(shot.camera.number)
    assert {len(set(numbers)) for numbers in cameras.values()} == {3, 4, 5}
    assert {len(numbers) for numbers in cameras.values()} == {10, 12}


def test_families_differ_in_few_cues_and_never_cross_to_the_test_side():
    rng = np.random.default_rng(3)
    for _ in range(40):
        family = look_alikes(random_look(rng), 4, rng)
        assert len(set(family)) == 4 and all(map(legible, family))
        for member in family[1:]:
            cues = differing_cues(family[0], member)
            assert 1 <= len(cues) <= 2 and set(cues) <= set(FINE_CUES)
    coarse = {True: set(), False: set()}
    for shot in plan_shots(identities=22, junk=0, distractors=0):  # 15 and 7: families of four cut short
        coarse[shot.folder == "bounding_box_train"].add((shot.look.build, shot.look.height))
    assert not coarse[True] & coarse[False]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError, MemoryError])
def test_an_interrupted_rendering_leaves_nothing(tmp_path, monkeypatch, failure):
    taken = []

    def take(*args):
        taken.append(args)
        if len(taken) == 5:
            raise failure("in the middle")
        return Image.new("RGB", (64, 128))

    monkeypatch.setattr(toytown, "photograph", take)
    with pytest.raises(failure):
        render(tmp_path / "town", **SMALL)
    assert len(taken) == 5 and not list(tmp_path.iterdir())


def test_an_existing_folder_is_never_touched(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    with pytest.raises(ValueError, match=r"root .*mine"):
        render(tmp_path / "mine", **SMALL)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "keep me"
    (tmp_path / "empty").mkdir()
    assert render(tmp_path / "empty", **SMALL) == tmp_path / "empty"


def test_the_cache_renders_once_says_so_and_mends_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = toytown_root(**SMALL)
    assert (
        root.parent == tmp_path / "reid_repro"
        and "rendering Toytown once: 37 images" in capsys.readouterr().out
    )
    whole = contents(root)
    # defaults are part of the key
    assert toytown_root(**SMALL) == toytown_root(seed=SEED, family=4, **SMALL) == root
    assert capsys.readouterr().out == ""
    others = [
        toytown_root(**{**SMALL, **change})
        for change in ({"seed": 7}, {"family": 2}, {"queries": 1}, {"junk": 1})
    ]
    monkeypatch.setattr(toytown, "FORMAT", toytown.FORMAT + 1)
    others.append(toytown_root(**SMALL))
    assert len({root, *others}) == 6  # every option and the format are part of the key
    monkeypatch.setattr(toytown, "FORMAT", toytown.FORMAT - 1)
    next(root.glob("query/*.jpg")).unlink()
    assert contents(toytown_root(**SMALL)) == whole


def test_a_faster_process_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    real = toytown.render

    def beaten(root, **options):
        real(root, **options)  # the other process is done first
        return real(root, **options)

    monkeypatch.setattr(toytown, "render", beaten)
    root = toytown_root(**SMALL)
    assert len(list(root.glob("*/*.jpg"))) == 37 and [p.name for p in root.parent.iterdir()] == [
        root.name
    ]


@pytest.mark.parametrize(
    ("argument", "value"),
    [("identities", 1), ("identities", 12.0), ("images_per_identity", 1), ("queries", 4), ("queries", True),
     ("junk", -1), ("distractors", "many"), ("family", 0), ("seed", -1)],
)  # fmt: skip
def test_bad_arguments_are_named(tmp_path, argument, value):
    for make in (
        lambda: render(tmp_path / "town", **{argument: value}),
        lambda: toytown_root(**{argument: value}),
    ):
        with pytest.raises(ValueError, match=argument):
            make()
    assert not list(tmp_path.iterdir())


def test_bad_building_blocks_are_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="above"):
        draw_pedestrian(Look(), "above", rng)
    with pytest.raises(ValueError, match="pattern_colour"):
        altered(Look(), "pattern_colour", rng)
    with pytest.raises(ValueError, match="count"):
        look_alikes(Look(), 0, rng)
    with pytest.raises(ValueError, match="cloud"):
        occlude(Image.new("RGB", (192, 320)), "cloud", rng)


def test_a_cue_shows_and_a_camera_shows():
    look, camera = Look(), CAMERAS[0]
    plain, red = (
        draw_pedestrian(who, "front", np.random.default_rng(1))
        for who in (look, replace(look, shoes="red"))
    )
    assert plain.tobytes() != red.tobytes()
    pictures = {photograph(look, c, np.random.default_rng(1)).tobytes() for c in CAMERAS}
    assert (
        len(pictures) == 6
        and photograph(look, camera, np.random.default_rng(1)).tobytes() in pictures
    )


def test_the_command_line(tmp_path):
    script = Path(__file__).resolve().parents[2] / "data_scripts" / "toytown.py"
    command = [
        sys.executable, str(script), "--to", str(tmp_path / "town"), "--identities", "4",
        "--images", "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (
        done.returncode == 0
        and done.stdout.count("\n") == 1
        and "130 images (6 train, 2 query, 122 gallery)" in done.stdout
    )
    again = subprocess.run(command, capture_output=True, text=True)
    assert (
        again.returncode == 2
        and "exists already" in again.stderr
        and "Traceback" not in again.stderr
    )


def test_the_town_is_the_same_on_every_machine_and_the_ledger_knows_it():
    """A film curve in single precision would depend on the processor; another Pillow may still
    write other JPEG bytes.
    """
    gains = np.float32([0.9, 1.0, 1.1])
    pixels = np.random.default_rng(0).random((40, 50, 3), dtype=np.float32)
    for camera in CAMERAS:
        gamma = np.float32(camera.gamma)
        bright = np.clip(pixels * gains, 0, 1)
        exact = (
            np.array([math.pow(float(b), float(gamma)) for b in bright.ravel()])
            .astype(np.float32)
            .reshape(bright.shape)
        )
        assert (expose(pixels, gains, camera.gamma, 1.0) == (exact - 0.5) + 0.5).all()
    assert (
        open_benchmark("toytown").fingerprint == TOWN
    ), "Toytown was drawn anew: count FORMAT up, and run the smoke profile again"
    entries = read_ledger(Path(__file__).resolve().parents[2] / "results").query(
        "dataset == 'toytown' and profile == 'smoke'"
    )
    assert len(entries) and set(entries["fingerprint"]) == {
        TOWN
    }, "smoke entries of another town: run the smoke profile again"
