"""Archives, .mat files and servers that want something else than to hand over photographs."""

import bz2
import gzip
import hashlib
import http.server
import io
import lzma
import os
import random
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from made import cuhk_mat, forked, module, refused, tree
from PIL import Image

from reid_repro.datasets import DatasetError, open_benchmark
from reid_repro.datasets.archives import copy_folder, unpack
from reid_repro.datasets.cuhk03_release import unpack_mat
from reid_repro.datasets.downloads import download, file_digest

FILES = {"set/a.jpg": b"one" * 30, "set/deep/b.jpg": bytes(range(256))}


def as_zip(
    members: dict[str, bytes], packing: int = zipfile.ZIP_DEFLATED,
    modes: dict[str, int] | None = None,
) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type, info.external_attr = packing, (modes or {}).get(name, 0o644) << 16
            archive.writestr(info, content)
    return file.getvalue()


def as_tar(members: dict[str, bytes], form: int = tarfile.GNU_FORMAT, **changes: dict) -> bytes:
    '`changes`: attributes of the member that is called "set/x".'
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in changes.items() if name == "set/x" else ():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def signed(tar: bytes, at: int, header: bytes) -> bytes:
    "Bytes of the first header exchanged and its checksum made right."
    block = bytearray(tar[:512])
    block[at : at + len(header)] = header
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + tar[512:]


def swapped(data: bytes, old: bytes, new: bytes, last: bool = False) -> bytes:
    assert old in data
    return new.join(data.rsplit(old, 1)) if last else data.replace(old, new, 1)


def promising(kind: bytes, size: int = 80 * 2**20) -> bytes:
    """A tar.gz whose header of `kind` is as large as a disk and as small as its packing: nothing of
    it is a file.
    """
    head = tarfile.TarInfo("x")
    head.type, head.size = kind, size
    file = io.BytesIO()
    with gzip.open(file, "wb", 9) as out:
        out.write(head.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(size // 2**20):
            out.write(bytes(2**20))
        out.write(as_tar(FILES))
    return file.getvalue()


def lying_zip64(size: int) -> bytes:
    "A zip whose directory says that `set/a.jpg` is of `size` bytes."
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("set/a.jpg", b"one")
        archive.infolist()[0].file_size = size  # written to the directory when it is closed
    return file.getvalue()


def overlapping() -> bytes:
    "Two names in the directory for one place in the file."
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("set/a.jpg", "set/b.jpg"):
            archive.writestr(name, b"one" * 50)
        archive.infolist()[1].header_offset = archive.infolist()[0].header_offset
    return file.getvalue()


X = {**FILES, "set/x": b""}
LONG, DEEP = "n" * 300, "d/" * 1500
NAMES = {  # what → the name of one more file
    "climbing": "../x.jpg",
    "climbing in the middle": "set/../../x.jpg",
    "climbing and back": "set/../set/x.jpg",
    "absolute": "/x.jpg",
    "two slashes": "//server/x.jpg",
    "drive": "C:/x.jpg",
    "drive without a slash": "c:x.jpg",
    "drive later": "set/C:/x.jpg",
    "UNC": "\\\\server\\share\\x.jpg",
    "backslashes": "..\\x.jpg",
    "backslashes later": "set\\..\\..\\x.jpg",
    "stream": "set/a.jpg:x",
    "dot": "set/./x.jpg",
    "empty part": "set//x.jpg",
    "bell": "set/\x07.jpg",
    "line break": "set/a\nb.jpg",
    "escape": "set/\x1b[2J.jpg",
    "right to left": "set/\u202egpj.exe",
    "zero width": "set/a\u200b.jpg",
    "long": f"set/{LONG}.jpg",
    "long in bytes": f"set/{'é' * 130}.jpg",
    "deep": f"{DEEP}x.jpg",
    "long altogether": f"{'p' * 200}/" * 30 + "x.jpg",
    "dot at the end": "set/a.jpg.",
    "space at the end": "set/a.jpg ",
    "capitals": "set/A.jpg",
    "capitals of a folder": "set/A.JPG/x.jpg",
    "file under file": "set/a.jpg/x.jpg",
    "folder as file": "set/deep",
    "wildcard": "set/*.jpg",
}
SPARSE = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "9", "GNU.sparse.numblocks": "1"}
HOSTILE = {
    f"{kind}, {what}": (lambda make=make, name=name: make({**FILES, name: b"x"}))
    for what, name in NAMES.items()
    for kind, make in (("zip", as_zip), ("tar", as_tar))
}
HOSTILE |= {
    "zip, a Unix link": lambda: as_zip(X, modes={"set/x": 0o120777}),
    "zip, a pipe": lambda: as_zip(X, modes={"set/x": 0o010644}),
    "zip, a device": lambda: as_zip(X, modes={"set/x": 0o020644}),
    "zip, composed and decomposed": lambda: as_zip(
        {"set/\u00e9.jpg": b"1", "set/e\u0301.jpg": b"2"}
    ),
    "tar, composed and decomposed": lambda: as_tar(
        {"set/\u00e9.jpg": b"1", "set/e\u0301.jpg": b"2"}
    ),
    "zip, a name of other bytes": (
        lambda: as_zip({"set/é.jpg": b"1"}).replace("é".encode(), b"\xff\xfe")
    ),
    "tar, a name of other bytes": lambda: as_tar({"set/\udcff.jpg": b"1"}),
    "zip, encrypted": lambda: swapped(
        as_zip(FILES, 0), b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0"
    ),
    "zip, zip64 of 2^62 bytes": lambda: lying_zip64(2**62),
    "zip, sizes that add up": lambda: as_zip({f"set/{n}.bmp": bytes(2**24) for n in range(6)}),
    "zip, one large file": lambda: as_zip({"set/zeros.bmp": bytes(2**27)}),
    "tar.xz, one large file": lambda: lzma.compress(
        as_tar({"set/zeros.bmp": bytes(2**27)}), preset=0
    ),
    "tar.gz, a pax header": lambda: promising(tarfile.XHDTYPE),
    "tar.gz, a global pax header": lambda: promising(tarfile.XGLTYPE),
    "tar.gz, a GNU long name": lambda: promising(tarfile.GNUTYPE_LONGNAME),
    "tar.gz, a GNU long link": lambda: promising(tarfile.GNUTYPE_LONGLINK),
    "tar, a link": lambda: as_tar(X, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "tar, a hard link": lambda: as_tar(X, type=tarfile.LNKTYPE, linkname="set/a.jpg"),
    "tar, a hard link outside": lambda: as_tar(X, type=tarfile.LNKTYPE, linkname="../../x"),
    "tar, a pipe": lambda: as_tar(X, type=tarfile.FIFOTYPE),
    "tar, a device": lambda: as_tar(X, type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "tar, a kind unknown": lambda: as_tar(X, type=b"Z"),
    "tar, sparse": lambda: as_tar(X, tarfile.PAX_FORMAT, pax_headers=SPARSE),
    "tar, renamed by a pax header": lambda: as_tar(
        X, tarfile.PAX_FORMAT, pax_headers={"path": "../../x.jpg"}
    ),
    "tar, renamed onto another": lambda: as_tar(
        X, tarfile.PAX_FORMAT, pax_headers={"path": "set/a.jpg"}
    ),
    "tar, a negative size": lambda: signed(as_tar({"set/a.jpg": b""}), 124, b"\xff" * 11 + b"\xfb"),
    "tar, a negative size by pax": lambda: as_tar(
        X, tarfile.PAX_FORMAT, pax_headers={"size": "-5"}
    ),
    "tar, a size of 2^80": lambda: signed(
        as_tar({"set/a.jpg": b""}), 124, b"\x80" + b"\0" + b"\xff" * 10
    ),
    "zip, twice": (
        lambda: as_zip({"set/a.jpg": b"1", "set/b.jpg": b"2"}).replace(b"set/b", b"set/a")
    ),
    "tar, twice": lambda: as_tar({"set/a.jpg": b"1"})[:1024] + as_tar({"set/a.jpg": b"3"}),
    "zip, no members": lambda: as_zip({}),
    "zip, folders only": lambda: as_zip({"set/": b""}),
    "zip, notes of browsers only": lambda: as_zip(
        {"__MACOSX/set/._a.jpg": b"1", "set/Thumbs.db": b"2", "set/.DS_Store": b"3"}
    ),
    "tar, no members": lambda: as_tar({}),
    "zeros": lambda: bytes(10240),
    "a page": lambda: b"<!DOCTYPE html><html><title>404</title></html>" * 40,
    "a page that begins as a zip": lambda: b"PK\3\4<html>404</html>" * 40,
    "a page, gzipped": lambda: gzip.compress(b"<html>404</html>" * 99),
    "RAR": lambda: b"Rar!\x1a\x07\x01\0" * 9,
    "7z": lambda: b"7z\xbc\xaf\x27\x1c" * 9,
    "one byte": lambda: b"P",
    "nothing": lambda: b"",
}
DAMAGED = {  # found while writing: what has been written lies in the folder
    "zip, a name that differs in place": lambda: swapped(as_zip(FILES), b"set/a.jpg", b"set/c.jpg"),
    "zip, a packing unknown": lambda: swapped(
        as_zip(FILES, 0), b"PK\1\2\x14\3\x14\0\0\0\0\0", b"PK\1\2\x14\3\x14\0\0\0\x63\0"
    ),
    "zip, overlapping": overlapping,
    "zip, more than it says": lambda: lying_zip64(2),
    "zip, less than it says": lambda: lying_zip64(2000),
    "zip, changed bytes": lambda: swapped(as_zip(FILES, 0), b"oneone", b"twotwo"),
    "tar.gz, changed bytes": lambda: swapped(gzip.compress(as_tar(FILES), 0), b"oneone", b"twotwo"),
    "tar.bz2, changed bytes": lambda: (
        lambda data: data[:60] + bytes([data[60] ^ 255]) + data[61:]
    )(bz2.compress(as_tar(FILES))),
    "tar.gz, garbage behind": lambda: gzip.compress(as_tar(FILES)) + b"garbage",
}


def bare(to: Path, root: Path, archive: Path) -> bool:
    "Nothing was written but below `to`."
    return all(
        path == archive or path.is_relative_to(to) or to.is_relative_to(path)
        for path in root.rglob("*")
    )


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_archive_writes_nothing(what, tmp_path):
    archive, to = tmp_path / "in" / "set.zip", tmp_path / "in" / "a" / "to"
    archive.parent.mkdir()
    archive.write_bytes(HOSTILE[what]())
    refused(lambda: unpack(archive, to), "set.zip")
    assert bare(to, tmp_path, archive) and not any(path.is_file() for path in to.rglob("*"))


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_archive_is_named_and_stays_inside(what, tmp_path):
    archive, to = tmp_path / "set.zip", tmp_path / "a" / "to"
    archive.write_bytes(DAMAGED[what]())
    refused(lambda: unpack(archive, to), "set.zip", "download")
    assert bare(to, tmp_path, archive)


@pytest.mark.parametrize(
    "kind", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz", "pax", "zip as on Windows", "PK", "dots"]
)
def test_good_archives_come_out_alike(kind, tmp_path):
    data = {
        "zip": lambda: as_zip(
            {**FILES, "__MACOSX/../../x": b"", "set/Thumbs.db": b"", "set/empty/": b""}
        ),
        "tar": lambda: as_tar(FILES),
        "tar.gz": lambda: gzip.compress(as_tar(FILES)),
        "tar.bz2": lambda: bz2.compress(as_tar(FILES)),
        "tar.xz": lambda: lzma.compress(as_tar(FILES)),
        "pax": lambda: as_tar(FILES, tarfile.PAX_FORMAT),
        "zip as on Windows": lambda: as_zip(
            {"set\\": b"", **{name.replace("/", "\\"): content for name, content in FILES.items()}}
        ),
        "PK": lambda: as_tar(
            {name.replace("set", "PKset"): content for name, content in FILES.items()}
        ),
        "dots": lambda: as_tar({f"./{name}": content for name, content in FILES.items()}),
    }[kind]()
    (tmp_path / "set").write_bytes(data)
    assert unpack(tmp_path / "set", tmp_path / "to") == 2
    found = {
        path.replace("PK", ""): content
        for path, content in tree(tmp_path / "to").items()
        if content is not None
    }
    assert found == FILES
    refused(lambda: unpack(tmp_path / "set", tmp_path / "to"), "not empty")
    refused(lambda: unpack(tmp_path / "away", tmp_path / "new"), "away", "not there")


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.xz", "tar.bz2"])
def test_a_download_cut_off_anywhere_is_no_archive(kind, tmp_path):
    pack = {"tar.gz": gzip.compress, "tar.xz": lzma.compress, "tar.bz2": bz2.compress}.get(kind)
    whole = pack(as_tar(FILES)) if pack else as_zip(FILES)
    for length in range(0, len(whole), 1 if len(whole) < 300 else 7):
        (tmp_path / "cut").write_bytes(whole[:length])
        refused(lambda: unpack(tmp_path / "cut", tmp_path / "to"), "cut")
        for path in sorted((tmp_path / "to").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("kind", ["zip", "stored", "lzma", "tar", "pax", "tar.gz"])
def test_changed_bytes_never_end_in_another_error(kind, tmp_path):
    chance = random.Random(kind)
    data = {
        "zip": as_zip(FILES), "stored": as_zip(FILES, 0), "lzma": as_zip(FILES, zipfile.ZIP_LZMA), "tar": as_tar(FILES),
        "pax": as_tar({**FILES, "set/x": b""}, tarfile.PAX_FORMAT, pax_headers={"comment": "é", "mtime": "1.5"}),
        "tar.gz": gzip.compress(as_tar(FILES), 0),
    }[kind]  # fmt: skip
    archive, to, told = tmp_path / "set", tmp_path / "in" / "to", 0
    for _ in range(120):
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 5))):
            changed[chance.randrange(min(len(changed), 3000))] = chance.choice(
                (0, 255, chance.randrange(256))
            )
        if kind in ("tar", "pax") and chance.random() < 0.6:
            changed = bytearray(signed(bytes(changed), 0, b""))
        archive.write_bytes(changed)
        try:
            unpack(archive, to)
        except DatasetError as error:
            told += str(archive) in str(error)
        assert bare(to, tmp_path, archive)
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
    assert told > 10


def test_a_pax_header_of_terabytes_does_not_fill_the_memory(tmp_path):
    (tmp_path / "set.tgz").write_bytes(promising(tarfile.XHDTYPE, 300 * 2**20))
    pid = os.fork()
    if pid == 0:  # a process of its own: the most memory it ever had is counted
        forked()
        import resource

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            unpack(tmp_path / "set.tgz", tmp_path / "to")
        except DatasetError:
            os._exit(
                0 if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000 else 3
            )
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_too_little_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "set.zip").write_bytes(as_zip(FILES))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jpg").write_bytes(b"one")
    monkeypatch.setattr(
        module("archives").shutil, "disk_usage", lambda where: type("usage", (), {"free": 2})
    )
    refused(
        lambda: unpack(tmp_path / "set.zip", tmp_path / "to"), "346 bytes", "2 are free",
        "make room",
    )
    refused(lambda: copy_folder(tmp_path / "folder", tmp_path / "to"), "3 bytes", "2 are free")
    assert not any((tmp_path / "to").iterdir())


def test_a_folder_with_links_pipes_or_odd_names_is_refused(tmp_path):
    def folder(name: str) -> Path:
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "a.jpg").write_bytes(b"one")
        return tmp_path / name

    (folder("link") / "deep" / "l.jpg").symlink_to("/etc/hostname")
    (folder("folder link") / "deep" / "l").symlink_to("/etc")
    os.mkfifo(folder("pipe") / "p.jpg")
    Path(os.fsdecode(os.fsencode(folder("bytes")) + b"/\xff.jpg")).write_bytes(b"x")
    (folder("line") / "a\nb.jpg").write_bytes(b"x")
    for name, words in {
        "link": "is a link", "folder link": "is a link", "pipe": "pipe", "bytes": "rename",
        "line": "rename",
    }.items():
        refused(lambda name=name: copy_folder(tmp_path / name, tmp_path / "to" / name), words)
        assert not any(path.is_file() for path in (tmp_path / "to").rglob("*"))
    (folder("good") / "Thumbs.db").write_bytes(b"x")
    assert copy_folder(tmp_path / "good", tmp_path / "out") == 1 and tree(tmp_path / "out") == {
        "a.jpg": b"one"
    }
    refused(lambda: copy_folder(tmp_path / "good", tmp_path / "out"), "not empty")


# ---- cuhk-03.mat


def test_a_mat_file_as_released_comes_out_upright_and_whole(tmp_path):
    counts = unpack_mat(cuhk_mat(tmp_path / "cuhk-03.mat"), tmp_path / "out")
    assert counts == {"images_detected": 24, "images_labeled": 24, "testsets": 2}
    with Image.open(tmp_path / "out" / "images_labeled" / "2_002_1_03.png") as image:
        assert (
            image.size == (6, 15)
            and image.getpixel((2, 0)) == (255, 255, 255)
            and image.getpixel((5, 14)) == (80, 80, 60)
        )
    names = sorted(path.name for path in (tmp_path / "out" / "images_detected").iterdir())
    assert (
        names[:3] == ["1_001_1_01.png", "1_001_1_03.png", "1_001_2_06.png"]
        and names[-1] == "5_001_2_06.png"
    )
    assert (
        tmp_path / "out" / "testsets.csv"
    ).read_text() == "split,pair,person\n0,1,1\n0,2,1\n1,3,1\n"
    found = [
        open_benchmark("cuhk03", tmp_path / "out", protocol="classic", split=split, check=False)
        for split in (0, 1)
    ]
    assert [sorted(set(b.query.pids.tolist())) for b in found] == [[1, 844], [1284]]


def instead(name: str, make):
    """What `make(file, cell)` returns becomes the only cell of `name`; None: `make` has made, or
    left out, the whole array.
    """

    def change(file, cell):
        del file[name]
        made = make(file, cell)
        if made is not None:
            file.create_dataset(name, data=np.array([[made]], dtype=h5py.ref_dtype))

    return change


def who(array):
    return instead("testsets", lambda file, cell: cell(np.array(array, float)))


def photo(array):
    def change(file, cell):
        file[file["detected"][0, 0]][0, 0] = cell(array)

    return change


def whole(name: str, **how):
    return instead(name, lambda file, cell: file.create_dataset(name, **how) and None)


def aside(**how):
    return lambda file, cell: file.create_dataset("aside", **how).ref


def twelve(file, cell):
    return cell(np.array([[cell(np.zeros((3, 4, 4), np.uint8))] * 12], dtype=h5py.ref_dtype).T)


CELLS = dict(dtype=h5py.ref_dtype)
MATS = {
    "no cells": instead("labeled", lambda file, cell: None),
    "numbers instead of cells": whole("labeled", data=np.zeros(3)),
    "numbers instead of people": instead("detected", lambda file, cell: cell(np.ones((10, 2)))),
    "a group instead of people": instead("detected", lambda file, cell: file.create_group("g").ref),
    "a single cell": whole("detected", shape=(), **CELLS),
    "null references": instead("detected", aside(shape=(10, 1), **CELLS)),
    "twelve images of a person": instead("detected", twelve),
    "pairs without end": whole("detected", shape=(10**10, 5), chunks=(1000, 5), **CELLS),
    "people without end": instead(
        "detected", aside(shape=(10, 10**10), chunks=(10, 1000), **CELLS)
    ),
    "three columns of tested": who(np.ones((3, 4))),
    "one row of tested": who(np.ones(3)),
    "nobody tested": who(np.ones((2, 0))),
    "tested without a number": who([[np.nan], [1]]),
    "tested counted from 0": who([[1], [0]]),
    "tested of pair 6": who([[6], [1]]),
    "half a person tested": who([[1], [1.5]]),
    "tested without end": instead(
        "testsets", aside(shape=(2, 10**11), dtype="f8", chunks=(2, 1000))
    ),
    "a photograph of other numbers": photo(np.zeros((3, 4, 4), np.float32)),
    "a photograph of two colours": photo(np.zeros((2, 4, 4), np.uint8)),
    "a photograph with four axes": photo(np.zeros((3, 4, 4, 1), np.uint8)),
    "a photograph too large": photo(np.zeros((3, 4000, 4), np.uint8)),
}


@pytest.mark.parametrize("what", MATS)
def test_another_mat_file_is_refused_by_name(what, tmp_path):
    mat = cuhk_mat(tmp_path / "cuhk-03.mat", MATS[what])
    refused(lambda: unpack_mat(mat, tmp_path / "out"), "cuhk-03.mat", "get ")


def test_a_mat_file_points_into_no_other_file(tmp_path):
    cuhk_mat(tmp_path / "other.mat")
    with h5py.File(tmp_path / "raw", "w") as file:
        file["secret"] = np.zeros((3, 4, 4), np.uint8)

    def elsewhere(file, cell):
        del file["detected"]
        file["detected"] = h5py.ExternalLink("other.mat", "detected")

    def outside(file, cell):
        data = file.create_dataset(
            "outside", (3, 4, 4), np.uint8, external=[(str(tmp_path / "raw"), 0, 48)]
        )
        file[file["detected"][0, 0]][0, 0] = data.ref

    def virtual(file, cell):
        layout = h5py.VirtualLayout((3, 4, 4), np.uint8)
        layout[:] = h5py.VirtualSource(str(tmp_path / "raw"), "secret", (3, 4, 4))
        file[file["detected"][0, 0]][0, 0] = file.create_virtual_dataset("virtual", layout).ref

    for number, change in enumerate((elsewhere, outside, virtual)):
        mat = cuhk_mat(tmp_path / f"{number}.mat", change)
        refused(
            lambda mat=mat, number=number: unpack_mat(mat, tmp_path / str(number)), f"{number}.mat"
        )


def test_a_mat_file_cut_off_or_of_another_kind(tmp_path):
    good = cuhk_mat(tmp_path / "good.mat").read_bytes()
    for number, data in enumerate(
        (b"", b"<html>404</html>", good[:600], good[: len(good) // 2], b"MATLAB 5.0".ljust(600))
    ):
        (tmp_path / f"{number}.mat").write_bytes(data)
        refused(
            lambda number=number: unpack_mat(tmp_path / f"{number}.mat", tmp_path / str(number)),
            f"{number}.mat", "get it again",
        )


# ---- servers

BODY = random.Random(0).randbytes(60_000)


class Server(http.server.BaseHTTPRequestHandler):
    "Answers as the first part of the path says; what was asked for is kept in `asked`."

    protocol_version = "HTTP/1.1"
    asked: list = []  # noqa: RUF012

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", length: int | None = None, **headers) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.close_connection, how = True, self.path.split("/")[1]
        span = self.headers.get("Range")
        self.asked.append((self.path, span))
        start = int(span[6:-1]) if span else 0
        place = {"Content_Range": f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"}
        if how == "plain" or (how == "cut" and span):
            if start >= len(BODY):
                return self.answer(416, Content_Range=f"bytes */{len(BODY)}")
            return self.answer(206 if span else 200, BODY[start:], **(place if span else {}))
        if how == "cut":
            return self.answer(200, BODY[:25_000], len(BODY))
        if how == "deaf":  # to ranges
            return self.answer(200, BODY)
        if how == "elsewhere":
            return self.answer(206, BODY, Content_Range=f"bytes 0-{len(BODY) - 1}/{len(BODY)}")
        if how in ("404", "500", "403"):
            return self.answer(int(how), b"<html>no</html>")
        if how == "to":
            return self.answer(302, Location=self.path.split("/", 2)[2])
        if how == "chunks":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            return self.wfile.write(b"2000\r\n" + BODY[:0x1000])
        if how == "many":
            return self.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 300 + b"\r\n")
        if how == "number":
            return self.answer(200, BODY, "many")
        if how == "slow":
            return threading.Event().wait(1.0)
        return self.wfile.write(b"no HTTP at all\r\n\r\n")


@pytest.fixture(scope="module")
def url():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(
        target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.05}
    ).start()
    os.environ["no_proxy"] = os.environ.get("no_proxy", "") + ",127.0.0.1"
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_download_whole_and_only_once(url, tmp_path):
    file = download(f"{url}/plain/a.zip", tmp_path / "new" / "a.zip", timeout=5)
    assert (
        file == tmp_path / "new" / "a.zip"
        and file.read_bytes() == BODY
        and list(file.parent.iterdir()) == [file]
    )
    assert file_digest(file, "md5") != file_digest(file) == hashlib.sha256(BODY).hexdigest()
    asked = len(Server.asked)
    assert download(f"{url}/plain/a.zip", file) == file and len(Server.asked) == asked


def test_a_download_that_was_cut_goes_on_where_it_was(url, tmp_path):
    refused(
        lambda: download(f"{url}/cut/a.zip", tmp_path / "a.zip", timeout=5),
        "25,000 of 60,000 bytes", "run this again",
    )
    assert not (tmp_path / "a.zip").exists() and (tmp_path / "a.zip.part").stat().st_size == 25_000
    assert download(f"{url}/cut/a.zip", tmp_path / "a.zip", timeout=5).read_bytes() == BODY
    assert (
        Server.asked[-1] == ("/cut/a.zip", "bytes=25000-")
        and not (tmp_path / "a.zip.part").exists()
    )


@pytest.mark.parametrize("how", ["plain", "deaf"])
@pytest.mark.parametrize("have", [0, 1, 59_999, 60_000])
def test_a_part_is_continued_or_begun_anew(url, tmp_path, how, have):
    (tmp_path / "a.zip.part").write_bytes(BODY[:have])
    assert download(f"{url}/{how}/a.zip", tmp_path / "a.zip", timeout=5).read_bytes() == BODY


def test_a_part_that_cannot_belong_to_the_file_is_not_made_the_file(url, tmp_path):
    for how, part in (("plain", BODY + b"more"), ("elsewhere", BODY[:100])):
        (tmp_path / "a.zip.part").write_bytes(part)
        refused(
            lambda how=how: download(f"{url}/{how}/a.zip", tmp_path / "a.zip", timeout=5),
            "a.zip.part", "remove",
        )
        assert not (tmp_path / "a.zip").exists()


@pytest.mark.parametrize(
    ("where", "words"),
    [("404/a", "404"), ("403/a", "403"), ("500/a", "500"), ("chunks/a", "run this again"), ("many/a", "cannot be downloaded"),
     ("number/a", "cannot be downloaded"), ("slow/a", "timed out"), ("nonsense/a", "cannot be downloaded"),
     ("to/file:///etc/hostname", "302"), ("to/ftp://127.0.0.1:1/x", "302"), ("to/data:text/plain,x", "302"), ("to//to/", "302"),
     ("to/gopher://x", "302"), ("a b", "cannot be downloaded")],
)  # fmt: skip
def test_an_answer_that_is_no_file_leaves_none(url, tmp_path, where, words):
    refused(lambda: download(f"{url}/{where}", tmp_path / "a.zip", timeout=0.3), url, words)
    assert not (tmp_path / "a.zip").exists()


def test_a_redirection_within_http_is_followed(url, tmp_path):
    assert (
        download(f"{url}/to/{url}/plain/b.zip", tmp_path / "a.zip", timeout=5).read_bytes() == BODY
    )


def test_addresses_that_are_none(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for address in (
        "file:///etc/hostname",
        "ftp://x/y",
        "/etc/hostname",
        "",
        "data:,x",
        "http://",
        "http://[::1",
        f"http://127.0.0.1:{port}/x",
    ):
        refused(lambda address=address: download(address, tmp_path / "a.zip", timeout=2), address)
    assert not (tmp_path / "a.zip").exists()


def test_no_picture_starts_a_program(tmp_path, monkeypatch):
    "PostScript under a photograph's name: Pillow would call Ghostscript."
    (tmp_path / "a.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 16\n%%EndComments\nshowpage\n"
    )
    started = []
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: started.append(a))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", sys.executable)
    refused(
        lambda: module("core").decode_image(tmp_path / "a.jpg", 16, 8), "a.jpg", "cannot be decoded"
    )
    assert not started
