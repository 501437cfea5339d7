"""Every loader on a made folder in its benchmark's exact layout, where users keep it, and with each
kind of damage.
"""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from made import (
    DUKE, GALLERY, MARKET, PEOPLE, QUERY, TRAIN, cuhk_images, cuhk_np, duke, encoded, market, module, msmt, own, photograph, pretend,
    refused, truncate, viper,
)  # fmt: skip
from PIL import Image

from reid_repro.datasets import (
    Benchmark, DatasetError, Published, Split, benchmark_names, cross_domain, find_benchmarks, load_images, unsupported_reason, open_benchmark,
    why_missing,
)  # fmt: skip
from reid_repro.datasets.core import list_images
from reid_repro.lab import runs


# full name → (how it is made, usual places: torchreid's root, fast-reid's root, …)
WHERE: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "market1501": (
        market, ("Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15", "market1501"),
    ),
    "market1501-train-only-single-shot": (
        lambda top: market(top, (TRAIN,)), ("Market-1501-v15.09.15",),
    ),
    "market1501-train-only": (
        lambda top: market(top, (TRAIN,)),
        ("Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15"),
    ),
    "market1501-multi-query": (
        market, ("Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15", "market1501"),
    ),
    "cuhk03-np-detected": (
        lambda top: cuhk_np(top, ("detected",)), ("cuhk03-np", "cuhk03/cuhk03-np"),
    ),
    "cuhk03-np-labelled": (cuhk_np, ("cuhk03-np", "cuhk03/cuhk03-np")),
    "cuhk03-classic-detected": (cuhk_images, ("cuhk03", "cuhk03_release")),
    "cuhk03-classic-labelled": (lambda top: cuhk_images(top, tests="json"), ("cuhk03",)),
    "dukemtmc": (duke, ("DukeMTMC-reID", "dukemtmc-reid/DukeMTMC-reID", "dukemtmc-reid")),
    "msmt17": (msmt, ("MSMT17_V1", "msmt17/MSMT17_V1")),
    "msmt17 V2": (lambda top: msmt(top, 2), ("MSMT17_V2", "msmt17/MSMT17_V2")),
    "viper": (viper, ("VIPeR", "viper/VIPeR", "viper")),
    "photographs": (own, ()),
    "photographs-without-cameras": (own, ()),
}


def opened(case: str, root, **options) -> Benchmark:
    return open_benchmark(case.split()[0], root, **options)


def ids(split: Split) -> list[tuple[int, int]]:
    return list(zip(split.pids.tolist(), split.camids.tolist()))


@pytest.fixture(autouse=True)
def released(monkeypatch):
    pretend(monkeypatch)


@pytest.fixture
def unreleased(monkeypatch):
    "The true counts again."
    monkeypatch.undo()


@pytest.mark.parametrize("case", WHERE)
def test_a_folder_is_found_by_itself_and_from_every_usual_root(case, tmp_path):
    make, places = WHERE[case]
    alone = opened(case, make(tmp_path / "alone"))
    assert alone.name == case.split()[0]
    for number, place in enumerate(places):
        root = tmp_path / str(number)
        make(root / place)
        found = opened(case, str(root))
        assert found.root.is_relative_to(root / place)
        for part in ("train", "query", "gallery"):
            assert ids(getattr(found, part)) == ids(getattr(alone, part))
            assert all(
                path.is_file() and path.is_relative_to(root) for path in getattr(found, part).paths
            )
        assert found.name in find_benchmarks(root) and why_missing(found.name, root) == ""


def test_market_standard_train_only_and_multi_query(tmp_path):
    top = market(tmp_path)
    single = open_benchmark("market1501", top)
    assert (
        ids(single.query) == [(4, 1), (5, 2)]
        and single.protocol == "single-query"
        and not single.conditions
    )
    # Thumbs.db and gt_bbox stay out
    assert ids(single.gallery) == [(-1, 3), (0, 1), (4, 2), (5, 1)]
    assert (len(single.train), single.train.num_identities, single.train.labels.max()) == (9, 3, 2)
    several = open_benchmark("market1501-multi-query", top)
    assert ids(several.query) == [(4, 1)] * 2 + [(5, 2)] * 2 and several.protocol == "multi-query"
    assert {path.parent.name for path in several.query.paths} == {
        "gt_bbox"
    } and several.gallery.paths == single.gallery.paths
    assert several.fingerprint != single.fingerprint
    alone = open_benchmark("market1501-train-only", top, seed=3)
    shown = [path for split in (alone.train, alone.gallery) for path in split.paths]
    assert (
        sorted(shown) == sorted(single.train.paths)
        and alone.conditions[0] == "551/200 of the training people"
    )
    assert (alone.train.num_identities, alone.query.paths, alone.division) == (
        2, alone.gallery.paths, "seeded split 3",
    )
    shot = open_benchmark("market1501-train-only-single-shot", top, seed=3)
    assert shot.train.paths == alone.train.paths and set(ids(shot.query)) == set(ids(alone.query))
    assert (
        len(ids(shot.query)) == len(set(ids(shot.query))) and shot.query.paths == shot.gallery.paths
    )
    assert (
        len(
            {
                open_benchmark("market1501-train-only", top, seed=seed).query.pids[0]
                for seed in range(9)
            }
        )
        == 3
    )


def test_cuhk03_new_protocol(tmp_path):
    top = cuhk_np(tmp_path)
    for spelling, boxes in (("detected", "detected"), ("labelled", "labeled")):
        found = open_benchmark(f"cuhk03-np-{spelling}", top)
        assert (
            ids(found.train) == [(1, 1), (1, 2), (3, 1)]
            and ids(found.query) == [(2, 1)]
            and ids(found.gallery) == [(2, 2)]
        )
        assert found.root == top / boxes and not found.conditions
    refused(
        lambda: open_benchmark("cuhk03-np-labelled", top / "detected"), "detected boxes", "labeled"
    )
    for path in (top / "detected").rglob("*.png"):
        photograph(path)
    assert "source images all 16×8" in open_benchmark("cuhk03-np-detected", top).conditions[0]


@pytest.mark.parametrize("tests", ["csv", "json"])
def test_cuhk03_classic_from_the_release(tmp_path, tests):
    top = cuhk_images(tmp_path, tests=tests)
    first, second = (
        open_benchmark("cuhk03-classic-detected", top, split=split) for split in (0, 1)
    )
    assert ids(first.query) == [(1, 1), (1, 1), (844, 1), (844, 1)] and ids(first.gallery) == [
        (1, 2), (844, 2),
    ]
    assert ids(second.query) == [(1284, 1)] * 2 and set(second.train.pids) == {
        1, 2, 3, 844, 845, 1361, 1419,
    }
    assert (
        set(first.train.pids) == {2, 3, 845, 1284, 1361, 1419} and first.protocol == "single-shot"
    )
    assert (first.division, second.division, first.conditions) == (
        "published split 0", "published split 1", (),
    )
    refused(
        lambda: open_benchmark("cuhk03-classic-detected", top, split=2), "split 2", "2 splits",
        error=ValueError,
    )


@pytest.fixture(scope="module")
def everybody(tmp_path_factory) -> tuple[Path, Path]:
    """All 1,467 people with an image of each view: as the NP folder (ids 1 to 767 train here), and
    as the release's photographs.
    """
    top, sizes = tmp_path_factory.mktemp("everybody"), (843, 440, 77, 58, 49)
    picture, pid = encoded(".png"), 0
    for folder in (TRAIN, QUERY, GALLERY):
        (top / "cuhk03-np" / "detected" / folder).mkdir(parents=True)
    (top / "cuhk03" / "images_detected").mkdir(parents=True)
    for pair, people in enumerate(sizes, start=1):
        for person in range(1, people + 1):
            pid += 1
            for view, number in ((1, 1), (2, 6)):
                folder = TRAIN if pid <= 767 else QUERY if view == 1 else GALLERY
                (
                    top / "cuhk03-np" / "detected" / folder / f"{pid:04d}_c{view}_{number}.png"
                ).write_bytes(picture)
                (
                    top
                    / "cuhk03"
                    / "images_detected"
                    / f"{pair}_{person:03d}_{view}_{number:02d}.png"
                ).write_bytes(picture)
    return top / "cuhk03-np", top / "cuhk03"


@pytest.mark.parametrize(
    ("protocol", "people", "train"), [("classic", 1467, 1367), ("1160", 1360, 1160)]
)
def test_cuhk03_seeded_splits_are_the_same_from_both_folders(
    unreleased, everybody, protocol, people, train
):
    seen = []
    for top in everybody:
        for split in (0, 7):
            found = open_benchmark("cuhk03", top, protocol=protocol, split=split, check=False)
            tested = set(found.query.pids.tolist())
            assert (
                found.train.num_identities, len(tested), len(found.query), len(found.gallery),
            ) == (train, 100, 100, 100)
            assert (
                tested == set(found.gallery.pids.tolist())
                and max(tested | set(found.train.pids.tolist())) <= people
            )
            assert found.division == f"seeded split {split}" and any(
                "of 14,097 images" in c for c in found.conditions
            )
            assert any("seeded splits" in c for c in found.conditions) == (protocol == "classic")
            assert set(found.query.camids) == {1} and set(found.gallery.camids) == {2}
            seen.append((split, tested, set(found.train.pids.tolist())))
    assert seen[0] == seen[2] and seen[1] == seen[3] and seen[0][1] != seen[1][1]


def test_cuhk03_1160_has_validation_people_of_its_own(unreleased, everybody):
    test, validation = (
        open_benchmark("cuhk03-1160-detected", everybody[0], part=part, check=False)
        for part in ("test", "validation")
    )
    tested, validated = set(test.query.pids.tolist()), set(validation.query.pids.tolist())
    assert (
        len(tested) == len(validated) == 100
        and not tested & validated
        and "validation" in validation.division
    )
    assert test.train.paths == validation.train.paths and not set(test.train.pids) & (
        tested | validated
    )
    assert test.fingerprint != validation.fingerprint


def test_a_run_validates_on_people_whom_it_neither_trains_on_nor_is_tested_on(
    unreleased, everybody, monkeypatch
):
    opened = partial(open_benchmark, check=False)
    monkeypatch.setattr(runs, "open_benchmark", opened)
    config = SimpleNamespace(
        dataset="cuhk03-1160-detected", data_root=str(everybody[0]), source="", seed=3,
    )
    run, others = runs.open_data(config), runs.validation_people(config)
    assert others.train.paths == run.train.paths and others.protocol == run.protocol
    known = {*run.train.pids.tolist(), *run.query.pids.tolist(), *run.gallery.pids.tolist()}
    assert len(set(others.query.pids.tolist())) == 100 and not known & set(others.query.pids)
    for other in (dict(dataset="viper"), dict(source="market1501")):
        with pytest.raises(ValueError, match=r"'stop' is 'validation', but '(viper|market1501)'"):
            runs.validation_people(SimpleNamespace(**{**vars(config), **other}))


def test_duke_has_names_and_distractors_of_its_own(tmp_path):
    found = open_benchmark("dukemtmc", duke(tmp_path))
    assert (
        ids(found.query) == [(6, 2)]
        and ids(found.gallery) == [(6, 3), (8, 2)]
        and found.gallery.num_identities == 2
    )
    assert set(found.train.camids) == {1, 8} and not found.conditions
    refused(
        lambda: open_benchmark("market1501", tmp_path, check=False), "_f0046182.jpg",
        "0002_c1s1_000451_03.jpg",
    )
    market(tmp_path / "other")
    refused(
        lambda: open_benchmark("dukemtmc", tmp_path / "other", check=False), "s1_",
        "0005_c2_f0046985.jpg",
    )


@pytest.mark.parametrize("version", [1, 2])
def test_msmt17_joins_train_and_val_and_shifts_test_people(tmp_path, version):
    found = open_benchmark("msmt17", msmt(tmp_path, version))
    assert ids(found.train) == [(1, 1), (1, 15), (2, 4), (1, 2), (2, 5)]
    shift = found.query.pids[0]
    assert (
        ids(found.query) == [(shift, 1), (shift + 1, 2)]
        and ids(found.gallery) == [(shift, 2), (shift + 1, 3)]
        and shift == 3
    )
    assert [c[:9] for c in found.conditions] == [[], ["MSMT17_V2"]][version - 1]
    assert {path.relative_to(tmp_path).parts[0] for path in found.query.paths} == {
        ["test", "mask_test_v2"][version - 1]
    }


def test_msmt17_takes_version_1_where_both_are(tmp_path):
    msmt(tmp_path / "MSMT17_V1"), msmt(tmp_path / "MSMT17_V2", 2)
    assert open_benchmark("msmt17", tmp_path).root.name == "MSMT17_V1"


def test_viper_pairs_by_number_and_halves_by_split(tmp_path):
    splits = [open_benchmark("viper", viper(tmp_path), split=split) for split in range(10)]
    for split, found in enumerate(splits):
        assert (len(found.train), len(found.query), len(found.gallery), found.division) == (
            4, 2, 2, f"random half {split}",
        )
        assert (
            set(found.query.camids) == {1}
            and set(found.gallery.camids) == {2}
            and set(found.query.pids) == set(found.gallery.pids)
        )
        assert {1, 4, 873, 874} == set(found.train.pids) | set(
            found.query.pids
        ) and found.protocol == "single-shot"
    assert len({tuple(found.query.pids) for found in splits}) > 2 and splits[0].conditions == ()


@pytest.mark.parametrize("split", [False, True])
def test_photographs_with_and_without_a_split(tmp_path, split):
    found = open_benchmark("photographs", own(tmp_path, split))
    assert (len(found.train), len(found.query), len(found.gallery)) == (8, 4, 4)
    assert found.division == ("as the table says" if split else "seeded split 0")
    if split:
        assert set(found.train.pids) == {1, 2} and ids(found.query) == [
            (3, 1), (3, 2), (4, 1), (4, 2),
        ]
    else:
        assert (
            len(
                {
                    tuple(open_benchmark("photographs", tmp_path, seed=seed).train.pids)
                    for seed in range(9)
                }
            )
            > 2
        )
        assert open_benchmark("photographs", tmp_path, share=0.75).train.num_identities == 3


def test_toytown_as_it_is():
    found = open_benchmark("toytown", identities=6, images_per_identity=3, junk=2, distractors=1)
    assert (
        found.train.num_identities == 4
        and found.query.num_identities == 2
        and (found.gallery.pids == -1).sum() == 2
    )
    assert open_benchmark("toytown", found.root).fingerprint == found.fingerprint
    assert load_images(found.query, 16, 8).shape[1:] == (3, 16, 8)
    refused(
        lambda: open_benchmark("toytown", found.root, seed=1), "seed", str(found.root),
        error=ValueError,
    )


# ---- damage


def damaged(case: str, top: Path) -> list[Path]:
    "The made benchmark's images, those of its train split first."
    found = opened(case, WHERE[case][0](top))
    return [*found.train.paths, *found.query.paths, *found.gallery.paths]


def test_a_table_without_rows_is_told(tmp_path):
    (tmp_path / "photographs.csv").write_text("path,identity,camera\n")
    with pytest.raises(DatasetError, match=r"photographs\.csv' has no rows"):
        open_benchmark("photographs", tmp_path)


MISSING = {
    "msmt17": "that are not there", "photographs": "is not there",
    "cuhk03-classic": "holds 23 images, 24 expected",
}


@pytest.mark.parametrize("case", WHERE)
def test_a_missing_image_is_missed(case, tmp_path):
    victim = damaged(case, tmp_path / "set")[0]
    victim.unlink()
    words = next((words for name, words in MISSING.items() if case.startswith(name)), "images,")
    refused(lambda: opened(case, tmp_path / "set"), words)
    if case.startswith(("market", "cuhk03", "duke")):  # a subset is a condition, never silent
        assert any(
            re.search(r"\d", condition)
            for condition in opened(case, tmp_path / "set", check=False).conditions
        )


@pytest.mark.parametrize("case", WHERE)
def test_a_truncated_image_is_named_when_it_is_decoded(case, tmp_path):
    victim = truncate(damaged(case, tmp_path / "set")[0])
    refused(
        lambda: load_images(opened(case, tmp_path / "set").train, 16, 8), str(victim),
        "restore it",
    )


@pytest.mark.parametrize(
    "case", [case for case in WHERE if not case.startswith(("msmt", "photographs"))]
)
def test_one_image_under_two_endings(case, tmp_path):
    victim = damaged(case, tmp_path / "set")[0]
    photograph(victim.with_suffix(".jpeg" if victim.suffix == ".jpg" else ".jpg"))
    refused(lambda: opened(case, tmp_path / "set", check=False), victim.stem, "two endings")


@pytest.mark.parametrize("case", [case for case in WHERE if "photographs" not in case])
def test_an_empty_split_and_an_absent_folder(case, tmp_path):
    victim = damaged(case, tmp_path / "set")[0]
    if case.startswith("msmt"):
        (tmp_path / "set" / "list_query.txt").write_text("\n\n")
        refused(lambda: opened(case, tmp_path / "set", check=False), "split 'query' is empty")
        (tmp_path / "set" / "list_query.txt").unlink()
        refused(lambda: opened(case, tmp_path / "set"), "list_query.txt", "is missing")
        return
    for path in victim.parent.iterdir():
        path.unlink()
    refused(lambda: opened(case, tmp_path / "set"), str(victim.parent), "holds no images")
    victim.parent.rmdir()
    refused(
        lambda: opened(case, tmp_path / "set"), victim.parent.name,
        "give the folder that holds the benchmark",
    )
    refused(lambda: opened(case, tmp_path / "away"), "away", "does not exist")
    refused(lambda: opened(case, None), "needs data_root")


@pytest.mark.parametrize(
    ("case", "old", "new", "words"),
    [
        (
            "market1501", f"{TRAIN}/0002_c1s1_000051_01.jpg", "0002_c7s1_000051_01.jpg",
            "camera 7, but the release has cameras 1 to 6",
        ),
        (
            "market1501-train-only", f"{TRAIN}/0002_c1s1_000051_01.jpg", "0002_c12s1_000051_01.jpg",
            "camera 12",
        ),
        (
            "market1501", f"{QUERY}/0004_c1s1_000101_00.jpg", "0004_c0s1_000101_00.jpg",
            "does not tell person and camera",
        ),
        (
            "dukemtmc", f"{GALLERY}/0008_c2_f0046985.jpg", "0008_c9_f0046985.jpg",
            "camera 9, but the release has cameras 1 to 8",
        ),
        (
            "cuhk03-np-detected", f"detected/{TRAIN}/0001_c2_6.png", "0001_c3_6.png",
            "camera 3, but the release has cameras 1 to 2",
        ),
        (
            "cuhk03-classic-detected", "images_detected/1_001_2_06.png", "1_001_3_06.png",
            "camera 3, but the release has cameras 1 to 2",
        ),
        (
            "cuhk03-classic-detected", "images_detected/5_001_2_06.png", "6_001_2_06.png",
            "does not tell person and camera",
        ),
        (
            "cuhk03-classic-detected", "images_detected/5_001_2_06.png", "5_050_2_06.png",
            "pair 5 has people 1 to 49, not 50",
        ),
        ("viper", "cam_a/003_45.bmp", "003_x.bmp", "does not tell person and camera"),
        ("viper", "cam_a/003_45.bmp", "004_45.bmp", "has no partner"),
    ],
)
def test_a_wrong_name_is_named(case, old, new, words, tmp_path):
    damaged(case, tmp_path)
    (tmp_path / old).rename((tmp_path / old).with_name(new))
    refused(lambda: opened(case, tmp_path), new, words)


def test_viper_wants_one_image_of_a_person_and_both_cameras(tmp_path):
    photograph(viper(tmp_path / "twice") / "cam_b" / "872_90.bmp")
    refused(
        lambda: open_benchmark("viper", tmp_path / "twice", check=False), "2 images of person 872",
        "cam_b",
    )
    for lost, alone in (("cam_b", "cam_a"), ("cam_a", "cam_b")):
        (viper(tmp_path / lost) / lost / "000_0.bmp").unlink()
        refused(
            lambda lost=lost: open_benchmark("viper", tmp_path / lost, check=False),
            f"{alone}/000_0.bmp", "no partner", lost,
        )
    assert open_benchmark(
        "viper", viper(tmp_path / "few", (5, 6, 7, 9, 11)), check=False
    ).conditions == ("5 of 632 people",)


LINE = "0000/0000_000_01_0303morning_0008_0.jpg 0"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (LINE, ["listed 2 times"]),
        (LINE.replace("0000/", "0000/./", 1), ["listed 2 times"]),
        (
            "0000/0000_009_01_0303morning_0099_0.jpg 0",
            ["names 1 of 4 files that are not there", "0000_009_01"],
        ),
        (LINE.replace(" 0", " -1"), ["line 4", "mend the line"]),
        (LINE.replace(" 0", " 1.0"), ["line 4", "mend the line"]),
        (LINE.replace(" 0", " ²"), ["line 4", "mend the line"]),
        (LINE.replace(" 0", " 99999999999999999999"), ["line 4", "mend the line"]),
        (LINE.replace(" 0", " 1041"), ["person", "but training people are 0 to", "mend the list"]),
        (LINE.replace(" ", "  "), ["line 4", "mend the line"]),
        (LINE.replace("_01_", "_1_"), ["line 4", "mend the line"]),
        (LINE.replace("/", "\\"), ["line 4", "mend the line"]),
        ("../test/" + LINE, ["line 4", "leaves"]),
        ("/" + LINE, ["line 4", "leaves"]),
        ("x" + LINE[1:], ["names 1 of 4 files"]),
        ("0000/0000_000_01_" + "x" * 150 + ".jpg 0", ["names 1 of 4"]),
        ("just words", ["line 4", "just words"]),
    ],
)
def test_a_line_of_msmt17s_lists_that_is_wrong_is_named(tmp_path, line, words):
    with (msmt(tmp_path) / "list_train.txt").open("a") as file:
        file.write(line + "\n")
    refused(lambda: open_benchmark("msmt17", tmp_path, check=False), *words)


@pytest.mark.parametrize("pattern", ["0000/0000_000_01_{}.jpg 0", "{}/0000_000_01_x.jpg 0"])
def test_a_line_too_long_for_any_disk_is_no_crash(tmp_path, pattern):
    with (msmt(tmp_path) / "list_train.txt").open("a") as file:
        file.write(pattern.format("x" * 300) + "\n")
    refused(lambda: open_benchmark("msmt17", tmp_path, check=False), "list_train.txt")
    assert find_benchmarks(tmp_path) == []


def test_msmt17_lists_of_other_counts_cameras_or_no_text(tmp_path):
    top = msmt(tmp_path)
    lines = (top / "list_query.txt").read_text()
    (top / "list_query.txt").write_text(lines.splitlines()[0])
    refused(lambda: open_benchmark("msmt17", top), "list_query.txt' holds 1 images, 2 expected")
    assert "query 1" in open_benchmark("msmt17", top, check=False).conditions[-1]
    shutil.copy(
        top / "test" / lines.split()[0],
        top / "test" / "0000" / "0000_000_16_0303morning_0015_0.jpg",
    )
    (top / "list_query.txt").write_text(lines.replace("0000_000_01", "0000_000_16"))
    refused(lambda: open_benchmark("msmt17", top), "camera 16, but the release has cameras 1 to 15")
    (top / "list_query.txt").write_bytes(b"\xff\xfe\0")
    refused(lambda: open_benchmark("msmt17", top), "list_query.txt", "no text file")


def test_hand_drawn_boxes_that_do_not_cover_the_queries(tmp_path):
    top = market(tmp_path)
    for path in (top / "gt_bbox").glob("0005_c2*"):
        path.unlink()
    refused(
        lambda: open_benchmark("market1501-multi-query", top, check=False),
        "person 5 under camera 2",
    )
    shutil.rmtree(top / "gt_bbox")
    refused(lambda: open_benchmark("market1501-multi-query", top), "lacks 'gt_bbox'", "multi-query")


def test_a_missing_hand_drawn_box_is_missed(tmp_path):
    # the query keeps another box
    (market(tmp_path) / "gt_bbox" / "0004_c1s1_000126_00.jpg").unlink()
    refused(lambda: open_benchmark("market1501-multi-query", tmp_path), "gt_bbox", "images")
    assert len(open_benchmark("market1501-multi-query", tmp_path, check=False).query) == 3


@pytest.mark.parametrize(
    "rows",
    [
        "", "0,1,x", "0,9,1", "0,0,1", "0,6,1", "0,2,441", "0,1,0", f"0,1,{10**20}", "0,1,\0",
        "0,1", None,
    ],
)
def test_test_sets_that_are_none_are_refused_by_name(tmp_path, rows):
    (cuhk_images(tmp_path) / "testsets.csv").write_text(
        "" if rows is None else f"split,pair,person\n{rows}\n"
    )
    refused(
        lambda: open_benchmark("cuhk03-classic-detected", tmp_path), "testsets.csv",
        "cannot be read as test sets",
    )
    assert find_benchmarks(tmp_path) == []  # told, not raised


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{}", "[" * 100_000, '[{"query": []}]', '[{"query": [["x.png", 0, 0]]}]', "\0",
        '[{"train": []}]', "7",
    ],
)
def test_torchreids_lists_that_are_none_are_refused_by_name(tmp_path, text):
    (cuhk_images(tmp_path, tests="json") / "splits_classic_detected.json").write_text(text)
    refused(
        lambda: open_benchmark("cuhk03-classic-detected", tmp_path), "splits_classic_detected.json",
        "cannot be read as test sets",
    )
    assert find_benchmarks(tmp_path) == ["cuhk03-classic-labelled"]


def test_torchreids_list_written_on_windows_and_our_table_first(tmp_path):
    top = cuhk_images(tmp_path, tests="json")
    file = top / "splits_classic_detected.json"
    file.write_text(json.dumps([{"query": [["D:\\data\\images_detected\\4_001_1_01.png", 0, 0]]}]))
    assert set(open_benchmark("cuhk03-classic-detected", top).query.pids) == {1361}
    (top / "testsets.csv").write_text("split,pair,person\n0,5,1\n")
    assert set(open_benchmark("cuhk03-classic-detected", top).query.pids) == {1419}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("door/ann1.jpg,zed,door", ["row 18", "an earlier row"]),
        ("./door/ann1.jpg,zed,door", ["2 times"]),
        ("door/../door/ann1.jpg,zed,door", ["row 18", "leaves"]),
        ("/etc/hostname,zed,door", ["row 18", "leaves"]),
        ("link.jpg,zed,door", ["row 18", "leaves"]),
        ("door/zed1.jpg,zed,door", ["row 18", "is not there"]),
        ("door,zed,door", ["row 18", "is not there"]),
        ("door/extra.jpg,,door", ["row 18", "'identity' is empty"]),
        ("door/extra.jpg,zed, ", ["row 18", "'camera' is empty"]),
        ("door/extra.jpg,zed", ["row 18", "'camera' is empty"]),
        ("door/extra.jpg,zed,door,more", ["cannot be read as CSV"]),
        ('"door/extra.jpg,zed,door', ["cannot be read as CSV"]),
        ("door/ex\0tra.jpg,zed,door", ["row 18"]),
        ("x" * 300 + ".jpg,zed,door", ["row 18"]),
    ],
)
def test_a_row_of_the_table_that_is_wrong_is_named(tmp_path, row, words):
    top = own(tmp_path)
    photograph(top / "door" / "extra.jpg")
    (top / "link.jpg").symlink_to("/etc/hostname")
    with (top / "photographs.csv").open("a") as file:
        file.write(row + "\n")
    refused(lambda: open_benchmark("photographs", top), *words)
    assert "photographs" not in find_benchmarks(top)


def test_the_table_as_a_whole(tmp_path):
    top = own(tmp_path, split=True)
    file, text = top / "photographs.csv", (top / "photographs.csv").read_text()
    for changed, words in (
        (text.replace("camera,", "cam,", 1), ["no column 'camera'", "cam"]),
        (text.replace(",", ":"), ["no column 'path'"]),
        (text.replace(",gallery", ",test"), ["row", "split 'test' is unknown"]),
        (text.replace(",gallery", ",query"), ["no row with gallery", "photographs.csv"]),
        (text.replace("cy,", "ann,"), ["person 'ann'", "'train'"]),
        ("", ["cannot be read as CSV"]),
    ):
        file.write_text(changed)
        refused(lambda: open_benchmark("photographs", top), *words)
    file.write_text(text, encoding="utf-16")
    refused(lambda: open_benchmark("photographs", top), "photographs.csv", "UTF-8")
    file.write_text(text, encoding="utf-8-sig")  # what spreadsheets write
    assert len(open_benchmark("photographs", top).train) == 8
    refused(
        lambda: open_benchmark("photographs", top, table="other.csv"), "other.csv", "is missing"
    )


def test_a_table_in_a_folder_of_its_own_means_the_files_beside_it(tmp_path):
    own(tmp_path / "lists"), own(tmp_path)
    found = open_benchmark("photographs", tmp_path, table="lists/photographs.csv")
    assert all(
        path.is_relative_to(tmp_path / "lists") and path.is_file() for path in found.train.paths
    )


def test_digits_of_other_scripts_are_no_persons(tmp_path):
    photograph(tmp_path / "２_c1.jpg")  # a full-width 2
    market(tmp_path / "set")
    (tmp_path / "set" / TRAIN / "0002_c1s1_000051_01.jpg").rename(
        tmp_path / "set" / TRAIN / "０００２_c1s1_000051_01.jpg"
    )
    refused(
        lambda: open_benchmark("market1501", tmp_path / "set"), "does not tell person and camera"
    )


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PPM", "TGA"])
def test_other_formats_under_a_photographs_name_are_refused(tmp_path, kind):
    Image.new("RGB", (8, 16)).save(tmp_path / "a.bin", kind)
    (tmp_path / "a.bin").rename(tmp_path / "a.jpg")
    refused(
        lambda: load_images(Split("train", [tmp_path / "a.jpg"], [1], [1]), 16, 8), "a.jpg",
        "cannot be decoded",
    )


@pytest.mark.parametrize("ending", [".jpg", ".png", ".bmp"])
def test_no_prefix_of_a_picture_passes_for_the_picture(tmp_path, ending):
    whole, path = encoded(ending, (7, 9)), tmp_path / f"a{ending}"
    path.write_bytes(whole)
    pixels = load_images(Split("train", [path], [1], [1]), 9, 7)
    for length in range(0, len(whole), 1 if len(whole) < 200 else 3):
        path.write_bytes(whole[:length])
        try:
            # only an end mark may lack
            assert (load_images(Split("train", [path], [1], [1]), 9, 7) == pixels).all(), length
        except DatasetError as error:
            assert str(path) in str(error)


# ---- names, options, published counts


OPTIONS = {
    "toytown": dict(colour=1),
    "market1501": dict(split="test"),
    "market1501-train-only": dict(queries="multi"),
    "market1501-train-only-single-shot": dict(split="standard"),
    "market1501-multi-query": dict(split="train-only"),
    "cuhk03": dict(protocol="old"),
    "cuhk03-np-detected": dict(split=1),
    "cuhk03-np-labelled": dict(boxes="detected"),
    "cuhk03-classic-detected": dict(part="validation"),
    "cuhk03-classic-labelled": dict(split=True),
    "cuhk03-1160-detected": dict(split=-1),
    "cuhk03-1160-labelled": dict(part="train"),
    "dukemtmc": dict(split=0),
    "msmt17": dict(version=2),
    "viper": dict(split=0.5),
    "photographs": dict(share=1.0),
    "photographs-without-cameras": dict(cameras=True),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_does_not_fit_is_named(name, tmp_path):
    option = next(iter(OPTIONS[name]))
    refused(
        lambda: open_benchmark(name, None if name == "toytown" else tmp_path, **OPTIONS[name]),
        option, error=ValueError,
    )
    for wrong in ("checks", "seeds"):
        with pytest.raises(ValueError, match=wrong) as told:
            open_benchmark(name, None if name == "toytown" else tmp_path, **{wrong: 1})
        assert not isinstance(told.value, DatasetError)


@pytest.mark.parametrize("options", [dict(seed=-1), dict(seed="x"), dict(seed=0.5)])
@pytest.mark.parametrize("name", ["market1501-train-only", "photographs"])
def test_a_seed_that_is_none_is_named(name, options, tmp_path):
    refused(
        lambda: open_benchmark(name, WHERE[name][0](tmp_path), **options), "seed", error=ValueError
    )


def test_every_reader_and_every_name_is_tried_here():
    names = set(benchmark_names().index) - {"cuhk03-mixed", "toytown"}
    assert names <= {case.split()[0] for case in WHERE} | {
        "cuhk03-1160-detected", "cuhk03-1160-labelled",
    }
    assert set(benchmark_names().index) - {"cuhk03-mixed"} <= set(OPTIONS)
    assert module("viper").__all__ == ["read_viper"]


def test_unknown_names_and_what_nobody_can_open(tmp_path):
    for action in (open_benchmark, why_missing, lambda name, root: unsupported_reason(name)):
        refused(
            lambda action=action: action("market1502", tmp_path), "market1502", "viper",
            error=ValueError,
        )
    assert "does not define" in unsupported_reason(
        "cuhk03-mixed"
    ) and "does not define" in why_missing("cuhk03-mixed", tmp_path)
    refused(lambda: open_benchmark("cuhk03-mixed", tmp_path), "cuhk03-mixed")
    assert unsupported_reason("viper") is None
    # a reader, not a full name
    refused(lambda: why_missing("cuhk03", tmp_path), "unknown", error=ValueError)


def test_all_benchmarks_of_one_data_folder_are_found(tmp_path):
    for case, (make, places) in WHERE.items():
        if case not in (
            "photographs", "photographs-without-cameras", "msmt17 V2", "cuhk03-np-detected", "cuhk03-classic-labelled",
        ):
            make(tmp_path / places[0])
    own(tmp_path)
    found = find_benchmarks(tmp_path)
    everything = [
        name for name in benchmark_names().index if name not in ("toytown", "cuhk03-mixed")
    ]
    # those need the hundred that are drawn
    assert found == [name for name in everything if "1160" not in name]
    (tmp_path / "empty").mkdir()
    assert find_benchmarks(tmp_path / "empty") == []


def test_cross_domain_keeps_people_apart_and_says_what_it_is(tmp_path):
    source = open_benchmark("dukemtmc", duke(tmp_path / "d"))
    target = open_benchmark("market1501", market(tmp_path / "m"))
    both = cross_domain(source, target)
    assert (both.name, both.protocol, both.root) == (target.name, target.protocol, target.root)
    assert (
        both.train.paths == source.train.paths
        and both.query is target.query
        and both.gallery is target.gallery
    )
    assert (
        both.train.pids.min() > target.gallery.pids.max()
        and (both.train.labels == source.train.labels).all()
    )
    assert both.conditions == ("trained on dukemtmc",) and both.fingerprint != target.fingerprint
    (tmp_path / "d" / TRAIN / f"{DUKE[TRAIN][0]}.jpg").unlink()
    few = cross_domain(
        open_benchmark("dukemtmc", tmp_path / "d", check=False),
        open_benchmark("viper", viper(tmp_path / "v"), split=3),
    )
    assert few.division == "random half 3" and any(
        c.startswith("dukemtmc: other image counts") for c in few.conditions
    )


def test_cross_domain_within_one_data_set_is_refused(tmp_path):
    market(tmp_path / "m"), market(tmp_path / "copy")
    source = open_benchmark("market1501", tmp_path / "m")
    target = open_benchmark("market1501-train-only", tmp_path / "copy")
    # the same people, hidden by new numbers
    refused(lambda: cross_domain(source, target), "market1501", error=ValueError)


def test_the_published_counts_are_what_the_modules_hold(unreleased):
    def counts(release):
        return {name: (p.images, p.identities, p.cameras) for name, p in release.items()}

    assert counts(module("market1501")._RELEASE) == dict(
        train=(12936, 751, 6), query=(3368, 750, 6), gallery=(19732, 750, 6)
    )
    assert counts(module("dukemtmc")._RELEASE) == dict(
        train=(16522, 702, 8), query=(2228, 702, 8), gallery=(17661, 1110, 8)
    )
    assert counts(module("msmt17")._RELEASE) == dict(
        train=(32621, 1041, 15), query=(11659, 3060, 15), gallery=(82161, 3060, 15)
    )
    cuhk = module("cuhk03")
    assert counts(cuhk._RELEASE["detected"]) == dict(
        train=(7365, 767, 2), query=(1400, 700, 2), gallery=(5332, 700, 2)
    )
    assert counts(cuhk._RELEASE["labelled"]) == dict(
        train=(7368, 767, 2), query=(1400, 700, 2), gallery=(5328, 700, 2)
    )
    assert counts(cuhk._EVERYONE) == dict(detected=(14097, 1467, 2), labelled=(14096, 1467, 2))
    assert (
        cuhk._PAIRS == (843, 440, 77, 58, 49)
        and sum(cuhk._PAIRS) == 1467
        and sum(cuhk._PAIRS[:3]) == 1360
    )
    assert module("viper")._RELEASE == Published(632, 632, 1) and len(PEOPLE) == len(cuhk._PAIRS)
    for boxes in ("detected", "labelled"):
        assert sum(p.images for p in cuhk._RELEASE[boxes].values()) == cuhk._EVERYONE[boxes].images


def test_a_whole_viper_under_the_true_counts(unreleased, tmp_path):
    gaps = [*range(247, 300), *range(396, 500), *range(742, 800), 349, 352, 356, 363, 530, 559, 586, 602, 644, 663, 665, 668, 681, 688, 691,
            694, 695, 704, 710, 712, 718, 719, 727, 730, 739, 810, 857]  # fmt: skip
    people = tuple(number for number in range(874) if number not in gaps)
    found = open_benchmark("viper", viper(tmp_path, people), split=9)
    assert (
        len(people) == 632
        and (len(found.train), len(found.query), len(found.gallery)) == (632, 316, 316)
        and not found.conditions
    )
    refused(
        lambda: open_benchmark("viper", viper(tmp_path / "few")), "holds 4 images, 632 expected"
    )


@pytest.mark.parametrize(
    ("images", "people", "words"),
    [(3, 2, "holds 2 images, 3 expected"), (2, 3, "holds 2 people, 3 expected")],
)
def test_a_count_that_differs_is_named(tmp_path, images, people, words):
    for name in ("1_c1.jpg", "2_c2.jpg"):
        photograph(tmp_path / name)
    pattern = re.compile(r"(\d+)_c(\d+)")
    refused(
        lambda: list_images(tmp_path, "train", pattern, "1_c1.jpg", Published(images, people, 2)),
        words, str(tmp_path),
    )
    assert len(list_images(tmp_path, "train", pattern, "1_c1.jpg", Published(2, 2, 2))) == 2


def test_made_names_are_the_releases_own():
    name = r"\d{4}_c[1-6]s\d_\d{6}_0\d"
    for names, pattern in (
        (MARKET[TRAIN], name), (MARKET["gt_bbox"], name), (DUKE[TRAIN], r"\d{4}_c[1-8]_f\d{7}"),
    ):
        assert all(re.fullmatch(pattern, name) for name in names) and len(set(names)) == len(names)
