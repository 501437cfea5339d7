"""What users of other projects ran into while data came in: pictures, tables, names, layouts."""

import json
import struct
import unicodedata
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from made import (
    cuhk_images, duke, encoded, market, msmt, own, photograph, pretend, refused, viper, zipped,
)
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.io import savemat

from reid_repro.datasets import (
    Benchmark, DatasetError, Split, cross_domain, load_images, open_benchmark,
)
from reid_repro.datasets.core import ImageFiles, decode_image
from reid_repro.datasets.preparation import Layout, compare_sums, main, prepare
from reid_repro.evaluation import evaluate

HEADER = "path,identity,camera"
T = Image.Transpose
STORED = {  # orientation → how an upright picture is stored
    2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90,
    7: T.TRANSVERSE, 8: T.ROTATE_270,
}


@pytest.fixture(autouse=True)
def released(monkeypatch):
    pretend(monkeypatch)


def upright() -> Image.Image:
    "Red over blue, with a green corner."
    image = Image.new("RGB", (64, 128), (255, 0, 0))
    image.paste((0, 0, 255), (0, 64, 64, 128))
    image.paste((0, 255, 0), (0, 0, 16, 16))
    return image


def rows_of(top: Path) -> list[str]:
    return (top / "photographs.csv").read_text(encoding="utf-8").splitlines()[1:]


def write(top: Path, rows: list[str], header: str = HEADER, end: str = "\n", **options) -> Path:
    text = end.join([header, *rows]) + end
    (top / "photographs.csv").write_bytes(text.encode(options.get("encoding", "utf-8")))
    return top


@pytest.mark.parametrize("ending", ["jpg", "png"])
@pytest.mark.parametrize("turn", STORED)
def test_a_picture_stored_turned_is_upright_through_every_door(turn, ending, tmp_path):
    exif, path = Image.Exif(), tmp_path / "door" / f"a.{ending}"
    exif[0x0112] = turn
    path.parent.mkdir()
    upright().transpose(STORED[turn]).save(path, exif=exif, quality=95)
    wanted = np.asarray(upright()).astype(int)
    with Image.open(path) as image:
        seen = [decode_image(image, 128, 64)]
    seen.append(decode_image(path, 128, 64))
    seen.append(ImageFiles([path], 128, 64)[:][0].permute(1, 2, 0).numpy())
    assert all(np.abs(s - wanted).mean() < 3 for s in seen)


@pytest.mark.parametrize("turn", (3, 6, 8))
def test_a_turned_picture_is_upright_in_a_benchmark_and_by_its_xmp_data(turn, tmp_path):
    exif, stored = Image.Exif(), upright().transpose(STORED[turn])
    exif[0x0112] = turn
    own(tmp_path, True)
    stored.save(tmp_path / "door" / "ann1.jpg", exif=exif, quality=95)
    part = open_benchmark("photographs", tmp_path).train
    row = [path.name for path in part.paths].index("ann1.jpg")
    seen = load_images(part, 128, 64)[row].permute(1, 2, 0).numpy()
    assert np.abs(seen - np.asarray(upright()).astype(int)).mean() < 3
    notes = PngInfo()
    notes.add_itxt("XML:com.adobe.xmp", f'<x tiff:Orientation="{turn}"/>')
    stored.save(tmp_path / "a.png", pnginfo=notes)
    assert (decode_image(tmp_path / "a.png", 128, 64) == np.asarray(upright())).all()


def test_damaged_or_odd_orientation_leaves_the_picture_as_it_is(tmp_path):
    for number, exif in enumerate((b"Exif\0\0MM\0*\0\0\0\x08\0\x05", b"Exif\0\0", b"junk")):
        upright().save(tmp_path / f"{number}.jpg", exif=exif, quality=95)
    odd = Image.Exif()
    odd[0x0112] = 9
    upright().save(tmp_path / "odd.jpg", exif=odd, quality=95)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's about the EXIF data
        for path in tmp_path.glob("*.jpg"):
            seen = decode_image(path, 128, 64).astype(int)
            assert np.abs(seen - np.asarray(upright())).mean() < 3


def png(depth: int, colour: int, row: bytes, key: bytes = b"") -> bytes:
    "A PNG of 8 × 16 equal rows, stored with that depth and colour type."
    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 16, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress((b"\0" + row) * 16))
    transparent = chunk(b"tRNS", key) if key else b""
    return b"\x89PNG\r\n\x1a\n" + header + transparent + body + chunk(b"IEND", b"")


PIXELS = {  # a PNG of one colour → what is seen
    "grey of 16 bits": (png(16, 0, struct.pack(">8H", *[20000] * 8)), 78),
    "bright grey of 16 bits": (png(16, 0, struct.pack(">8H", *[40000] * 8)), 156),
    "grey of 16 bits, its key": (png(16, 0, bytes(16), struct.pack(">H", 0)), 255),
    "grey and alpha of 16 bits": (png(16, 4, struct.pack(">16H", *[20000, 65535] * 8)), 78),
    "RGB of 16 bits": (png(16, 2, struct.pack(">24H", *[20000] * 24)), 78),
    "RGBA of 16 bits": (png(16, 6, struct.pack(">32H", *[20000, 0, 0, 0] * 8)), 255),
    "RGBA": (png(8, 6, bytes([0, 255, 0, 0] * 8)), 255),
    "half RGBA": (png(8, 6, bytes([0, 0, 0, 127] * 8)), 128),
    "LA": (png(8, 4, bytes([9, 0] * 8)), 255),
    "L, its key": (png(8, 0, bytes([77] * 8), struct.pack(">H", 77)), 255),
    "2 bits": (png(2, 0, bytes([0b01010101] * 2)), 85),
    "2 bits, its key": (png(2, 0, bytes([0b01010101] * 2), struct.pack(">H", 1)), 255),
    "RGB, its key": (png(8, 2, bytes([1, 2, 3] * 8), struct.pack(">3H", 1, 2, 3)), 255),
}


@pytest.mark.parametrize("case", PIXELS)
def test_no_mode_is_clipped_or_invented(case, tmp_path):
    data, level = PIXELS[case]
    (tmp_path / "a.png").write_bytes(data)
    seen = decode_image(tmp_path / "a.png", 16, 8)
    assert (seen == level).all(), seen[0, 0]


def test_a_palette_with_a_transparent_colour_lies_on_white(tmp_path):
    Image.new("RGBA", (8, 16), (0, 255, 0, 0)).quantize().save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P" and "transparency" in image.info
    assert (decode_image(tmp_path / "a.png", 16, 8) == 255).all()


ALPHA = Image.new("RGBA", (8, 16), (0, 255, 0, 0))
WORDS = struct.pack(">128H", *[20000] * 128)


@pytest.mark.parametrize(
    ("image", "level"),
    [(ALPHA.convert("RGBa"), 255), (Image.new("LA", (8, 16), (9, 0)).convert("La"), 255),
     (ALPHA.convert("LA"), 255), (Image.new("PA", (8, 16), (0, 0)), 255),
     (Image.frombytes("I;16B", (8, 16), WORDS), 78)],
    ids=lambda value: getattr(value, "mode", ""),
)
def test_modes_that_no_file_has(image, level):
    assert (decode_image(image, 16, 8) == level).all()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_white_are_refused_by_name(mode):
    refused(lambda: ImageFiles([Image.new(mode, (8, 16))], 16, 8)[:], f"mode {mode}", "8 or 16")


def test_a_16_bit_key_colour_is_refused_by_name(tmp_path):
    row = struct.pack(">24H", *[20000] * 24)
    (tmp_path / "a.png").write_bytes(png(16, 2, row, struct.pack(">3H", 1, 2, 3)))
    refused(lambda: decode_image(tmp_path / "a.png", 16, 8), "a.png", "alpha channel")


def test_one_path_or_something_else_is_no_list_of_photographs(tmp_path):
    for given, words in ((str(tmp_path), "give a list"), ([3], r"paths\[0\] is int")):
        with pytest.raises(ValueError, match=words):
            ImageFiles(given, 16, 8)
    for given in (np.zeros((16, 8, 3), np.uint8), 3, None):
        with pytest.raises(ValueError, match="give paths or images of Pillow"):
            decode_image(given, 16, 8)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("TIFF", ["TIFF", "JPEG, PNG or BMP"]), ("GIF", ["GIF", "JPEG, PNG or BMP"]),
        ("WEBP", ["WEBP", "save it"]), (b"", ["empty", "restore"]),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", ["it is heic", "save it as JPEG or PNG"]),
        (b"\0\0\0\x1cftypavif\0\0\0\0mif1avif", ["it is avif", "save it as JPEG or PNG"]),
        (b"<html>404</html>", ["is text", "<html>404"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["is text", "git-lfs"]),
        (b"\x07\xff\xee" * 99, ["restore it from an undamaged copy"]),
    ],
)
def test_what_is_no_photograph_is_named(data, words, tmp_path):
    path = tmp_path / "a.jpg"
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        Image.new("RGB", (8, 16)).save(path, data)
    refused(lambda: decode_image(path, 16, 8), "a.jpg", *words)


@pytest.mark.parametrize(("side", "most"), [(8200, 2**30), (30_000, 2**26)])
def test_a_photograph_that_is_too_large_is_to_be_saved_smaller(side, most, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    Image.new("1", (side, 8200)).save(tmp_path / "large.png")
    with pytest.raises(DatasetError, match=r"large.png.* are the most: save it smaller, or"):
        decode_image(tmp_path / "large.png", 16, 8)


def test_a_path_may_begin_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(photograph(tmp_path / "a.jpg").parent))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    wanted = decode_image(tmp_path / "a.jpg", 16, 8)
    seen = ImageFiles(["~/a.jpg"], 16, 8)[:][0].permute(1, 2, 0).numpy()
    assert (decode_image("~/a.jpg", 16, 8) == wanted).all() and (seen == wanted).all()


def test_an_image_that_was_closed_is_named(tmp_path):
    Image.new("RGB", (8, 16)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pass
    refused(lambda: decode_image(image, 16, 8), "closed", "load()")


@pytest.mark.parametrize("size", [True, "16", 0, -3, 2.5, None])
def test_a_size_is_a_whole_number_of_pixels(size):
    image = Image.new("RGB", (8, 16))
    for action in (
        lambda: decode_image(image, size, 8), lambda: decode_image(image, 8, size),
        lambda: ImageFiles([image], size, 8), lambda: ImageFiles([image], 8, size),
    ):
        refused(action, "must be a whole number from 1", repr(size), error=ValueError)


def test_a_bitmap_whose_alpha_is_nowhere_set_is_opaque(tmp_path):
    for alpha, level in ((0, 77), (255, 77)):
        pixels = bytes([77, 77, 77, alpha]) * 128
        head = struct.pack("<IiiHHIIiiII", 108, 8, 16, 1, 32, 3, len(pixels), 0, 0, 0, 0)
        masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
        rest = masks + b"BGRs" + bytes(48) + pixels
        file = struct.pack("<IHHI", 122 + len(pixels), 0, 0, 122)
        (tmp_path / "a.bmp").write_bytes(b"BM" + file + head + rest)
        assert (decode_image(tmp_path / "a.bmp", 16, 8) == level).all()


@pytest.mark.parametrize("device", ["gpu", "CPU", "meta", 0, None, b"cpu"])
def test_load_images_takes_devices_as_everything_else(device, tmp_path):
    part = open_benchmark("photographs", own(tmp_path)).query
    refused(lambda: load_images(part, 8, 4, device), "is unknown", "auto", error=ValueError)
    assert load_images(part, 8, 4, "auto").shape == (len(part), 3, 8, 4)


# reserved identities


@pytest.mark.parametrize(
    "junk",
    [
        "-1", "-01", "−1", "-1.0", "–1", "‐1", "－１", "'-1", "-1,0", "➖1", "﹣1", "-1E+00",
        "-1.00E+00", "-1,00e0", "-1.", "- 1", "-10E-1", "−\u00a01", "\u200e-1", "-1\ufeff", "'-1'",
        '=""-1""', "-١",
    ],
)
@pytest.mark.parametrize("split", [True, False])
def test_junk_and_distractors_wait_in_the_gallery(junk, split, tmp_path):
    rows = rows_of(own(tmp_path, split))
    part = ",gallery" if split else ""
    for name, identity in (("junk", junk), ("other", "0.00E+00"), ("third", "0000")):
        photograph(tmp_path / "door" / f"{name}.jpg")
        rows.append(f'door/{name}.jpg,"{identity}",door{part}')
    write(tmp_path, rows, HEADER + ",split" * split)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = open_benchmark("photographs", tmp_path)
    assert sorted(found.gallery.pids)[:3] == [-1, 0, 0]
    assert min(found.train.pids) >= 1 and min(found.query.pids) >= 1
    assert found.train.num_identities == 2 and len(found.query) == 4
    assert set(found.train.pids) | set(found.query.pids) == {1, 2, 3, 4}
    assert any("2 images wait in the gallery" in str(w.message) for w in told) != split


@pytest.mark.parametrize(
    ("identity", "part", "words"),
    [
        ("-1", "train", ["row 18", "junk", "gallery alone"]),
        ("-1", "query", ["row 18", "junk"]),
        ("0", "train", ["row 18", "a distractor", "number people from 1"]),
        ("0", "query", ["row 18", "a distractor"]),
        ("-2", "gallery", ["row 18", "'-2' is reserved"]),
        ("－２", "gallery", ["row 18", "is reserved"]),
        ("-7.0", "gallery", ["row 18", "is reserved"]),
        *((text, "train", ["row 18", "is reserved", "write -1 for junk"]) for text in (
            "-1.5", "-0,5", "-2E+00", "-1.2E+05", "(1)", "( 2.0 )", "(1,50)", "1-", "３ -", "-2.",
            "\u200b-2",
        )),
        *((text, "gallery", ["row 18", f"write {meant} for"]) for text, meant in (
            ("unknown", -1), ("Unidentified", -1), ("background", 0), ("NOBODY", 0),
            ("ju\u00adnk", -1),
        )),
        *((text, "train", ["row 18", "missing value"]) for text in (
            "nil", "n.a.", "N. A.", "NIL", "NAN", "NONE", "undefined", "\\N", "–", "—", "−", ".",
            "…", "#####", "''", "=", "- -", "\u200b?", "#NAME?", "#NULL!",
        )),
        *((text, "query", ["row 18", "'identity' is empty", "nobody sees"]) for text in (
            "\u200b", "\u00ad", "\ufeff", "\u2060\u200d", "\u3164", "\u180e \u200b",
        )),
        ("nan", "train", ["row 18", "'nan'", "missing value"]),
        ("None", "gallery", ["row 18", "missing value"]),
        ("NA", "train", ["row 18", "missing value"]), ("?", "train", ["row 18", "missing value"]),
        ("none", "train", ["row 18", "missing value"]), ("-", "train", ["row 18", "missing"]),
        ("zo\ufffd", "train", ["row 18", "'identity'", "\\ufffd"]),
        ("#N/A", "train", ["row 18", "missing value"]),
        ("#REF!", "train", ["row 18", "missing value"]),
        ("junk", "gallery", ["row 18", "'junk'", "-1"]),
        ("Distractor", "gallery", ["row 18", "0"]),
        ("1.23457E+11", "train", ["row 18", "shortened", "as text"]),
        ("4,5E+15", "train", ["row 18", "shortened"]),
    ],
)
def test_a_reserved_identity_elsewhere_is_refused_with_a_hint(identity, part, words, tmp_path):
    rows = rows_of(own(tmp_path, True))
    photograph(tmp_path / "x.jpg")
    write(tmp_path, [*rows, f'x.jpg,"{identity}",door,{part}'], HEADER + ",split")
    refused(lambda: open_benchmark("photographs", tmp_path), *words)


@pytest.mark.parametrize("name", [
    "1.5", "-anna", "Nil", "na", "(anna)", "1-2", "e-1", "+3", "#1", "☺", "李", "Null", "a.",
])
def test_words_and_numbers_from_1_stay_names(name, tmp_path):
    rows = rows_of(own(tmp_path, True))
    photograph(tmp_path / "x.jpg")
    write(tmp_path, [*rows, f'x.jpg,"{name}",door,train'], HEADER + ",split")
    assert open_benchmark("photographs", tmp_path).train.num_identities == 3


@pytest.mark.parametrize("cell", ["\u200b", "\ufeff", "\u00ad"])
def test_a_path_or_camera_that_nobody_sees_is_empty(cell, tmp_path):
    for row, words in ((f"{cell},ann,door", "'path' is empty"), (f"x.jpg,ann,{cell}", "'camera'")):
        write(tmp_path, [*rows_of(own(tmp_path)), row])
        refused(lambda: open_benchmark("photographs", tmp_path), "row 18", words, "nobody sees")


def test_junk_changes_no_score(tmp_path):
    rows = rows_of(own(tmp_path, True))
    before = open_benchmark("photographs", tmp_path)
    photograph(tmp_path / "x.jpg")
    write(tmp_path, [*rows, "x.jpg,-1,yard,gallery"], HEADER + ",split")
    after = open_benchmark("photographs", tmp_path)
    dist = np.random.default_rng(0).random((len(before.query), len(before.gallery)))
    more = np.concatenate([dist, np.zeros((len(dist), 1))], 1)
    scores = [
        evaluate(d, b.query.pids, b.query.camids, b.gallery.pids, b.gallery.camids)
        for d, b in ((dist, before), (more, after))
    ]
    assert scores[0].mAP == scores[1].mAP and scores[1].junk == 1


# text


def form(text: str, name: str) -> str:
    return unicodedata.normalize(name, text)


def test_one_letter_in_two_forms_is_one_person_one_camera_one_file(tmp_path):
    rows, top = rows_of(own(tmp_path)), tmp_path
    for number, (person, camera, path) in enumerate(
        [("NFC", "NFC", "NFC"), ("NFD", "NFD", "NFD"), ("NFC", "NFD", "NFC"), ("NFD", "NFC", "NFD")]
    ):
        place = form("öst" if number % 2 else "door", "NFC" if number == 3 else "NFD")
        name = f"{place}/{form('zoé', 'NFC')}{number}.jpg"
        photograph(top / name)  # a folder in one form, a file in the other
        rows.append(f"{form(name, path)},{form('zoé', person)},{form('öst', camera)}")
    found = open_benchmark("photographs", write(top, rows))
    everybody = [found.train, found.query, found.gallery]
    assert sum(part.num_identities for part in (found.train, found.gallery)) == 5
    assert len({int(c) for part in everybody for c in part.camids}) == 3
    assert sum(len(load_images(part, 4, 4)) for part in everybody) == 20
    rows.append(rows[-1].replace(form("é", "NFD"), form("é", "NFC")))
    refused(lambda: open_benchmark("photographs", write(top, rows)), "row 22", "earlier row")


def test_a_root_and_a_table_are_found_in_either_form(tmp_path):
    top = own(tmp_path / form("Übung", "NFD"))
    (top / "photographs.csv").rename(top / form("fotos é.csv", "NFD"))
    root = tmp_path / form("Übung", "NFC")
    assert len(open_benchmark("photographs", root, table=form("fotos é.csv", "NFC")).train) == 8


@pytest.mark.parametrize(("there", "asked"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_one_photograph_and_an_archive_are_found_in_either_form(there, asked, tmp_path, capsys):
    path = photograph(tmp_path / form("Übung", there) / form("é.jpg", there))
    name = tmp_path / form("Übung", asked) / form("é.jpg", asked)
    wanted = decode_image(path, 16, 8)
    assert (decode_image(str(name), 16, 8) == wanted).all()
    assert ImageFiles([name], 16, 8)[:].shape == (1, 3, 16, 8)
    refused(lambda: decode_image(name.with_name("ü.jpg"), 16, 8), "No such file")
    found = open_benchmark("photographs", own(tmp_path / "own"))
    train = Split("train", (name, *found.train.paths[1:]), found.train.pids, found.train.camids)
    assert Benchmark("x", tmp_path, "", train, found.query, found.gallery).fingerprint
    archive = zipped(tmp_path / form("é.zip", there), viper(tmp_path / "in" / "VIPeR"))
    sums = tmp_path / form("é.txt", there)
    prepare(archive, tmp_path / "to", (Layout("viper", "VIPeR", "cam_a"),))
    (tmp_path / "to" / "VIPeR" / "SHA256SUMS").rename(sums)
    words = [archive, tmp_path / "to 2", "--checksums", sums]
    words = [form(str(word), asked) for word in words]
    assert main("", {"x": (Layout("viper", "VIPeR", "cam_a"),)}, argv=["--from", words[0], "--to",
                *words[1:]]) == 0, capsys.readouterr()  # fmt: skip


def test_msmt17_lists_find_files_in_either_form(tmp_path):
    top = msmt(tmp_path)
    (top / "train" / "0000").rename(top / "train" / form("é", "NFD"))
    text = (top / "list_train.txt").read_text().replace("0000/", form("é/", "NFC"))
    (top / "list_train.txt").write_text(text, encoding="utf-8-sig")
    (top / "list_val.txt").write_text(
        (top / "list_val.txt").read_text().replace("0000/", form("é/", "NFD")), encoding="utf-8"
    )
    assert len(open_benchmark("msmt17", top).train) == 5


@pytest.mark.parametrize("other", ["Ann", "a\u200bnn", "ａnn", "a nn", "аnn", "αnn", "'ann", "ɑnn"])
def test_names_that_look_alike_are_told_apart(other, tmp_path):
    rows = rows_of(own(tmp_path))
    photograph(tmp_path / "x.jpg"), photograph(tmp_path / "y.jpg")
    write(tmp_path, [*rows, f"x.jpg,{other},door", f"y.jpg,{other},yard"])
    with pytest.warns(UserWarning, match="row 18: identity") as told:
        open_benchmark("photographs", tmp_path)
    assert any(ascii(other) in str(w.message) for w in told)


@pytest.mark.parametrize("other", ["01", "1.0", "1,00", "'1", "１", "+1", "1."])
@pytest.mark.parametrize("column", ["identity", "camera"])
def test_one_number_written_in_two_ways_is_told(other, column, tmp_path):
    rows = [row.replace("ann,", "1,").replace(",door", ",1") for row in rows_of(own(tmp_path))]
    place = ('x.jpg,"{}",yard', 'x.jpg,bob,"{}"')[column == "camera"]
    photograph(tmp_path / "x.jpg")
    write(tmp_path, [*rows, place.format(other)])
    with pytest.warns(UserWarning, match=f"row 18: {column}"):
        open_benchmark("photographs", tmp_path)


# equal photographs


def copied(top: Path, source: str, target: str) -> Path:
    (top / target).write_bytes((top / source).read_bytes())
    return top


@pytest.mark.parametrize(
    ("one", "other", "part"),
    [("door/ann2", "door/bob2", "train"), ("yard/cy2", "door/di2", "gallery"),
     ("yard/cy1", "door/di1", "query")],
)
def test_one_photograph_of_two_people_is_told(one, other, part, tmp_path):
    top = copied(own(tmp_path, True), f"{one}.jpg", f"{other}.jpg")
    with pytest.warns(UserWarning, match=f"split '{part}' .* two people") as told:
        open_benchmark("photographs", top)
    assert len(told) == 1


def test_one_photograph_twice_of_one_person_is_no_fault(tmp_path):
    top = copied(own(tmp_path, True), "door/ann2.jpg", "door/ann1.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_benchmark("photographs", top)


def test_equal_photographs_in_two_lists_are_counted(tmp_path):
    top = copied(own(tmp_path, True), "door/ann1.jpg", "door/cy2.jpg")
    copied(top, "door/di1.jpg", "yard/di2.jpg")
    with pytest.warns(UserWarning) as told:
        found = open_benchmark("photographs", top)
    assert found.repeated == {("train", "gallery"): 1, ("query", "gallery"): 1}
    words = [str(w.message) for w in told]
    assert len(words) == 2 and "1 of 4 photographs of split 'gallery'" in words[0]
    assert "ann1.jpg" in words[0] and "cy2.jpg" in words[0] and "di1.jpg" in words[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _ = found.fingerprint  # told once


def test_the_same_person_under_two_names_is_refused(tmp_path):
    top = own(tmp_path, True)
    for shot in ("door/{}1", "door/{}2", "yard/{}1", "yard/{}2"):
        copied(top, shot.format("ann") + ".jpg", shot.format("cy") + ".jpg")
    refused(lambda: open_benchmark("photographs", top), "all 4 photographs", "train")


def test_released_sets_are_looked_at_with_their_fingerprint(tmp_path):
    top = market(tmp_path)
    copied(top, "query/0004_c1s1_000101_00.jpg", "bounding_box_test/0004_c2s1_000151_01.jpg")
    copied(top, "query/0004_c1s1_000101_00.jpg", "bounding_box_test/-1_c3s1_000201_01.jpg")
    found = open_benchmark("market1501", top)
    with pytest.warns(UserWarning, match="1 of 4 photographs of split 'gallery'"):
        _ = found.fingerprint
    viper(tmp_path / "VIPeR")
    copied(tmp_path / "VIPeR", "cam_a/872_45.bmp", "cam_b/872_180.bmp")
    found = open_benchmark("viper", tmp_path)
    people = found.train if 873 in found.train.pids else found.query
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _ = found.fingerprint
    assert bool(told) == (people is found.query)
    source = open_benchmark("market1501", top)
    own(tmp_path / "own", True)
    copied(tmp_path, "bounding_box_train/0002_c1s1_000051_01.jpg", "own/yard/cy2.jpg")
    crossed = cross_domain(source, open_benchmark("photographs", tmp_path / "own"))
    with pytest.warns(UserWarning, match="'gallery' are in split 'train' too"):
        _ = crossed.repeated


@pytest.mark.parametrize("name", ["-1_c3s1_000201_01.jpg", "0000_c1s1_000201_01.jpg"])
@pytest.mark.parametrize("benchmark", ["market1501", "market1501-train-only"])
def test_nobody_trains_on_junk_of_a_release(name, benchmark, tmp_path):
    photograph(market(tmp_path) / "bounding_box_train" / name)
    refused(lambda: open_benchmark(benchmark, tmp_path, check=False), name, "junk")


# tables

TABLES = {
    "a comma at the end": lambda rows: (HEADER, [row + "," for row in rows]),
    "a comma at the end of all": lambda rows: (HEADER + ",", [row + "," for row in rows]),
    "semicolons": lambda rows: (HEADER.replace(",", ";"), [r.replace(",", ";") for r in rows]),
    "tabs": lambda rows: (HEADER.replace(",", "\t"), [r.replace(",", "\t") for r in rows]),
    "sep=;": lambda rows: (
        "sep=;\n" + HEADER.replace(",", ";"), [r.replace(",", ";") for r in rows],
    ),
    "bars": lambda rows: (HEADER.replace(",", "|"), [r.replace(",", "|") for r in rows]),
    "blank lines": lambda rows: ("\n" + HEADER, ["", rows[0], " ", ",,", *rows[1:], "", ""]),
    "backslashes": lambda rows: (HEADER, [row.replace("/", "\\") for row in rows]),
    "a leading dot": lambda rows: (HEADER, [f".\\{row}".replace("/", "\\") for row in rows]),
    "a mark at the beginning": lambda rows: ("\ufeff" + HEADER, rows),
    "two marks at the beginning": lambda rows: ("\ufeff\ufeff" + HEADER, rows),
    "notes over lines": lambda rows: (HEADER + ",note", [r + ',"two\nlines, ""x"""' for r in rows]),
    "quotes": lambda rows: ('"path", "identity", "camera"', [
        ", ".join(f'"{cell}"' for cell in row.split(",")) for row in rows
    ]),
    "capitals and blanks": lambda rows: (" Path , Identity , CAMERA ", rows),
}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("case", TABLES)
def test_tables_as_people_write_them(case, end, tmp_path):
    rows = rows_of(own(tmp_path))
    wanted = open_benchmark("photographs", tmp_path)
    header, rows = TABLES[case](rows)
    found = open_benchmark("photographs", write(tmp_path, rows, header, end))
    assert found.fingerprint == wanted.fingerprint


@pytest.mark.parametrize("case", ["a comma at the end", "semicolons", "a mark at the beginning"])
def test_rows_may_end_as_an_old_mac_wrote_them(case, tmp_path):
    wanted = open_benchmark("photographs", own(tmp_path)).fingerprint
    header, rows = TABLES[case](rows_of(tmp_path))
    assert open_benchmark("photographs", write(tmp_path, rows, header, "\r")).fingerprint == wanted
    write(tmp_path, [*rows_of(own(tmp_path)), "door/lost.jpg,ann,door"], HEADER, "\r")
    refused(lambda: open_benchmark("photographs", tmp_path), "row 18", "lost.jpg")


@pytest.mark.parametrize(
    ("before", "row", "words"),
    [
        (["", " ", ""], "door/lost.jpg,ann,door", ["row 21", "lost.jpg", "is not there"]),
        ([",,"], "door/ann1.jpg,,door", ["row 19", "'identity' is empty"]),
        ([], "door/ann1.jpg,ann,door,extra", ["row 18", "4 cells", "in quotes"]),
        ([], '"door/ann1.jpg,ann,door', ["row 18", "close its quotes"]),
        ([], "..\\ann1.jpg,ann,door", ["row 18", "leaves"]),
        ([], "C:\\data\\ann1.jpg,ann,door", ["row 18", "leaves"]),
        ([], "door/zoé.jpg,ann,door", ["row 18", "zo\\xe9", "is not there"]),
        ([], "door/ann1.jpg,a\0nn,door", ["row 18", "'identity'", "\\x00"]),
        ([], "door/ann1.jpg,ann,do\x07or", ["row 18", "'camera'", "\\x07"]),
        ([], "door/ann1.jpg,ann,door\x1a", ["row 18", "\\x1a"]),
        ([], "door/ann1.jpg,ann,nan", ["row 18", "camera", "missing value"]),
    ],
)
def test_a_fault_is_named_by_the_row_of_the_spreadsheet(before, row, words, tmp_path):
    rows = rows_of(own(tmp_path))
    write(tmp_path, [*rows, *before, row])
    refused(lambda: open_benchmark("photographs", tmp_path), *words)


def test_a_row_after_a_note_over_lines_has_row_and_line(tmp_path):
    rows = rows_of(own(tmp_path))
    rows = [rows[0] + ',"a\nb"', *rows[1:], "x.jpg,ann,door,"]
    write(tmp_path, rows, HEADER + ",note")
    refused(lambda: open_benchmark("photographs", tmp_path), "row 18 (line 19)", "x.jpg")


def test_a_table_of_another_encoding_names_the_line(tmp_path):
    rows = rows_of(own(tmp_path))
    write(tmp_path, [*rows, "door/zoé.jpg,zoé,door"], encoding="cp1252")
    refused(lambda: open_benchmark("photographs", tmp_path), "line 18", "UTF-8")


def test_a_column_that_stands_twice_is_named(tmp_path):
    write(own(tmp_path), ["a.jpg,a,b,c"], HEADER + ",Camera")
    refused(lambda: open_benchmark("photographs", tmp_path), "2 columns 'camera'")


@pytest.mark.parametrize("name", ["splits", "set", "Part", "location"])
@pytest.mark.parametrize("test", ["gallery", "test", ""])
def test_a_division_under_another_name_is_not_passed_over(name, test, tmp_path):
    rows = [
        row.removesuffix("gallery") + test * ("gallery" in row)
        for row in rows_of(own(tmp_path, True))
    ]
    write(tmp_path, rows, f"{HEADER},{name}")
    refused(
        lambda: open_benchmark("photographs", tmp_path), f"column '{name.lower()}'", "call it split"
    )


def test_further_columns_of_any_name_are_left_alone(tmp_path):
    wanted = open_benchmark("photographs", own(tmp_path)).fingerprint
    rows = [f"{row},{note},train {note}" for note, row in enumerate(rows_of(tmp_path))]
    write(tmp_path, rows, HEADER + ",location,remark")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_benchmark("photographs", tmp_path).fingerprint == wanted
    write(tmp_path, [*rows, "door/lost.jpg,ann,door,here,x"], HEADER + ",location,remark")
    refused(lambda: open_benchmark("photographs", tmp_path), "row 18", "lost.jpg")


@pytest.mark.parametrize(("header", "cells"), [(";", ","), (",", ";"), (",", "\t"), ("\t", ",")])
def test_another_sign_between_cells_than_in_the_header_is_named(header, cells, tmp_path):
    rows = [row.replace(",", cells) for row in rows_of(own(tmp_path))]
    write(tmp_path, rows, HEADER.replace(",", header))
    words = f"row 2 has {cells!r} between its cells, the header has {header!r}"
    refused(lambda: open_benchmark("photographs", tmp_path), words)


def test_a_whole_path_to_a_photograph_of_the_folder_is_one_below_it(tmp_path):
    top, link = own(tmp_path / "photographs"), tmp_path / "link"
    wanted, rows = open_benchmark("photographs", top), rows_of(top)
    link.symlink_to(top)
    for whole in (top, link):
        found = open_benchmark("photographs", write(top, [f"{whole}/{row}" for row in rows]))
        assert found.fingerprint == wanted.fingerprint and found.train.paths == wanted.train.paths
    write(top, [*rows, f"{top}/door/lost.jpg,ann,door"])
    refused(lambda: open_benchmark("photographs", top), "row 18", "is not there")
    write(top, [*rows, f"{photograph(tmp_path / 'outside.jpg')},ann,door"])
    refused(lambda: open_benchmark("photographs", top), "row 18", "leaves the folder")
    write(top, [*rows, f"{top}/door/ann1.jpg,ann,door"])
    refused(lambda: open_benchmark("photographs", top), "row 18", "listed 2 times")


@pytest.mark.parametrize("part", ["train", "query", "gallery"])
def test_a_column_split_without_rows_of_a_part_is_named(part, tmp_path):
    other = {"train": "gallery", "query": "gallery", "gallery": "query"}[part]
    rows = [row.replace(part, other) for row in rows_of(own(tmp_path, True))]
    write(tmp_path, rows, HEADER + ",split")
    words = "photographs.csv", f"no row with {part} in its column split"
    refused(lambda: open_benchmark("photographs", tmp_path), *words)


def test_people_are_told_by_their_names_in_the_table(tmp_path):
    top, numbers = own(tmp_path, True), {"ann": "2", "bob": "10", "cy": "11", "di": "100"}
    rows = [row.split(",") for row in rows_of(top)]
    rows = [",".join([path, numbers[name], *rest]) for path, name, *rest in rows]
    header = HEADER + ",split"
    write(top, [row.replace("gallery", "train") if "di2" in row else row for row in rows], header)
    with pytest.raises(DatasetError) as told:
        open_benchmark("photographs", top)
    words = "person '100' of split 'train'", "di2.jpg", "di1.jpg", "remove one of the two"
    assert all(word in str(told.value) for word in words) and "archive" not in str(told.value)
    write(top, rows, header)
    for shot in ("door/{}1", "door/{}2", "yard/{}1", "yard/{}2"):
        copied(top, shot.format("bob") + ".jpg", shot.format("cy") + ".jpg")
    words = "photographs of person '11'", "are of person '10'", "cy1.jpg", "bob1.jpg"
    refused(lambda: open_benchmark("photographs", top), *words)


# no cameras

CAMERAS = {
    "one": lambda n: "door", "one per image": lambda n: f"c{n}", "empty": lambda n: "",
}


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("case", CAMERAS)
def test_photographs_without_cameras(case, split, tmp_path):
    rows = [row.split(",") for row in rows_of(own(tmp_path, split))]
    rows = [
        ",".join([path, person, CAMERAS[case](n), *rest])
        for n, (path, person, _, *rest) in enumerate(rows)
    ]
    write(tmp_path, rows, HEADER + ",split" * split)
    if (case, split) != ("one per image", True):  # then every other image is of another camera
        refused(lambda: open_benchmark("photographs", tmp_path), "cameras=False")
    found = open_benchmark("photographs", tmp_path, cameras=False)
    assert set(found.query.camids) == {1} and set(found.gallery.camids) == {2}
    assert found.conditions == ("scored without cameras",)
    again = open_benchmark("photographs-without-cameras", tmp_path)
    assert again.query.paths == found.query.paths and again.name == found.name
    dist = np.random.default_rng(1).random((len(found.query), len(found.gallery)))
    ids = found.query.pids, found.query.camids, found.gallery.pids, found.gallery.camids
    alone = evaluate(dist, found.query.pids, None, found.gallery.pids, None)
    assert alone.mAP == evaluate(dist, *ids).mAP and alone.dropped == 0
    with pytest.raises(ValueError, match="g_camids is None but q_camids is not"):
        evaluate(dist, *ids[:3], None)


def test_no_column_camera_is_needed_and_the_flag_is_checked(tmp_path):
    rows = [",".join(row.split(",")[:2]) for row in rows_of(own(tmp_path))]
    write(tmp_path, rows, "path,identity")
    refused(lambda: open_benchmark("photographs", tmp_path), "no column 'camera'", "cameras=False")
    assert len(open_benchmark("photographs", tmp_path, cameras=False).query) == 2
    with pytest.raises(ValueError, match="cameras must be True or False"):
        open_benchmark("photographs", tmp_path, cameras=0)


# layouts


def new_lists(top: Path, kind: str) -> None:
    "Lists of the new protocol beside the release's images: people 1, 2, 3 of pair 1."
    names = [p.name for p in sorted((top / "images_detected").iterdir())]
    parts = dict(
        train=["1_001_1_01.png", "1_001_2_06.png", "1_002_1_01.png"],
        query=[n for n in names if n.startswith("1_003_1_01")],
        gallery=[n for n in names if n.startswith("1_003_2")],
    )
    if kind != "mat":
        split = {
            name: [[f"D:\\data\\images_detected\\{n}", 7, 0] for n in part]
            for name, part in parts.items()
        }
        (top / "splits_new_detected.json").write_text(
            json.dumps([split | {"num_train_pids": 2}]), encoding=kind
        )
        return
    rows = {
        f"{name}_idx": np.array([[names.index(n) + 1] for n in part])
        for name, part in parts.items()
    }
    filelist = np.array([[n] for n in names], dtype=object)
    savemat(
        top / "cuhk03_new_protocol_config_detected.mat",
        dict(filelist=filelist, labels=np.arange(len(names)), **rows),
    )


@pytest.mark.parametrize("kind", ["utf-8", "utf-8-sig", "mat"])
def test_torchreids_cuhk03_serves_the_new_protocol(kind, tmp_path):
    top = cuhk_images(tmp_path / "cuhk03", ("detected",), "json")
    new_lists(top, kind)
    found = open_benchmark("cuhk03-np-detected", tmp_path)
    assert found.train.pids.tolist() == [1, 1, 2]
    assert found.query.pids.tolist() == [3] and found.gallery.pids.tolist() == [3]
    assert (found.query.camids[0], found.gallery.camids[0]) == (1, 2)
    assert not [path for path in found.train.paths if path.parent.name != "images_detected"]
    found.query.paths[0].unlink()
    refused(lambda: open_benchmark("cuhk03-np-detected", tmp_path), "1 of 1 images are not there")
    refused(
        lambda: open_benchmark("cuhk03-np-labelled", tmp_path), "'images_labeled'",
        "splits_new_labeled.json",
    )


@pytest.mark.parametrize("text", ["[]", "{}", "\0", "7", '[{"train": [[1]]}]', "[" * 100_000])
def test_lists_of_the_new_protocol_that_are_none_are_named(text, tmp_path):
    top = cuhk_images(tmp_path / "cuhk03", ("detected",), "json")
    refused(lambda: open_benchmark("cuhk03-np-detected", tmp_path), "has the images, but no list")
    for name in ("splits_new_detected.json", "cuhk03_new_protocol_config_detected.mat"):
        (top / name).write_text(text)
        refused(lambda: open_benchmark("cuhk03-np-detected", tmp_path), name, "cannot be read")
        (top / name).unlink()


FOLDERS = {
    "market1501": (market, ("data/Market-1501-v15.09.15", "data/market1501", "Market1501",
                            "x/Market-1501", "MARKET_1501")),
    "dukemtmc": (duke, ("dukemtmcreid", "data/DukeMTMC-reID", "data/dukemtmc", "DUKEMTMC-REID")),
    "msmt17": (msmt, ("MSMT17", "data/MSMT17_V1", "data/MSMT17/MSMT17_V1", "msmt17_v1")),
    "photographs": (own, (".",)),
}  # fmt: skip


@pytest.mark.parametrize(("name", "place"), [(n, p) for n, (_, ps) in FOLDERS.items() for p in ps])
def test_a_root_one_level_too_high_and_other_projects_names(name, place, tmp_path):
    FOLDERS[name][0](tmp_path / place)
    assert open_benchmark(name, tmp_path).root == tmp_path / place


def test_own_photographs_one_level_below_are_named(tmp_path):
    for folder in ("mine", "yours"):
        own(tmp_path / "data" / folder)
        words = [f"{tmp_path / 'data' / name}" for name in ("mine", folder)]
        refused(lambda: open_benchmark("photographs", tmp_path / "data"), "is missing", *words)
    (tmp_path / "data" / "mine" / "photographs.csv").rename(
        tmp_path / "data" / "mine" / "a [1].csv"
    )
    refused(
        lambda: open_benchmark("photographs", tmp_path / "data", table="a [1].csv"), "mine' has one"
    )
    refused(lambda: open_benchmark("photographs", tmp_path), "is missing: write a CSV")


def test_two_folders_of_one_benchmark_are_not_chosen_between(tmp_path):
    market(tmp_path / "a" / "market1501"), market(tmp_path / "b" / "Market1501")
    refused(lambda: open_benchmark("market1501", tmp_path), "several folders", "/a/", "/b/")


def test_a_foreign_folder_is_not_taken_for_another(tmp_path):
    market(tmp_path / "data" / "Market-1501-v15.09.15")
    refused(lambda: open_benchmark("dukemtmc", tmp_path), "no 'bounding_box_train'")


def test_good_pictures_are_as_before(tmp_path):
    for mode in ("L", "RGB", "P", "1", "CMYK"):
        ending = "jpg" if mode == "CMYK" else "png"
        upright().convert(mode).save(tmp_path / f"a.{ending}")
        with Image.open(tmp_path / f"a.{ending}") as image:
            wanted = image.convert("RGB").resize((8, 16), Image.Resampling.BILINEAR)
        assert (decode_image(tmp_path / f"a.{ending}", 16, 8) == np.asarray(wanted)).all()
    (tmp_path / "b.jpg").write_bytes(encoded(".jpg"))
    assert decode_image(tmp_path / "b.jpg", 16, 8).shape == (16, 8, 3)
    assert issubclass(DatasetError, ValueError) and Benchmark


def test_checksums_know_a_path_in_either_form_behind_a_mark(tmp_path):
    sums, listed = {form("é.jpg", "NFD"): "0" * 64}, tmp_path / "SHA256SUMS"
    listed.write_text(f"{'0' * 64}  {form('é.jpg', 'NFC')}\n", encoding="utf-8-sig")
    compare_sums(sums, listed)
    refused(lambda: compare_sums({"e.jpg": "0" * 64}, listed), "1 missing", "1 not listed")


@pytest.mark.parametrize("check", ["False", 0, None, 1])
@pytest.mark.parametrize("name", ["market1501", "msmt17", "dukemtmc", "viper", "cuhk03"])
def test_check_is_true_or_false(name, check, tmp_path):
    refused(
        lambda: open_benchmark(name, tmp_path, check=check), "check must be True or False",
        error=ValueError,
    )
