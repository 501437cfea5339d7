"""Benchmarks of a dozen coloured rectangles in the exact layout of the real ones, and what is
needed to damage them.
"""

import io
import json
import multiprocessing
import os
import signal
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from functools import cache
from importlib import import_module
from itertools import product
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

from reid_repro.datasets import DatasetError, Published

TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"
MARKET = {  # every folder of the release, without the ending
    TRAIN: [
        f"{p:04d}_c{c}s1_{f:06d}_01"
        for p, (c, f) in product((2, 7, 9), ((1, 51), (1, 76), (6, 51)))
    ],
    QUERY: ["0004_c1s1_000101_00", "0005_c2s1_000101_00"],
    GALLERY: [
        "-1_c3s1_000201_01", "0000_c1s1_000201_01", "0004_c2s1_000151_01", "0005_c1s1_000151_01",
    ],
    "gt_bbox": [
        f"{p:04d}_c{c}s1_{f:06d}_00"
        for p, c, f in [(4, 1, 101), (4, 1, 126), (5, 2, 101), (5, 2, 126), (2, 1, 51), (4, 3, 9)]
    ],
}
DUKE = {
    TRAIN: [f"{p:04d}_c{c}_f0046{f:03d}" for p, c, f in product((1, 5), (1, 8), (182, 302))],
    QUERY: ["0006_c2_f0046985"],
    GALLERY: ["0006_c3_f0047105", "0008_c2_f0046985"],  # 8 is a distractor with an ordinary id
}
PEOPLE = {1: 3, 2: 2, 3: 1, 4: 1, 5: 1}  # CUHK03: pair of cameras → people in the made release


@cache
def encoded(ending: str, size: tuple[int, int] = (8, 16)) -> bytes:
    "A rectangle as a JPEG, PNG or BMP file."
    file = io.BytesIO()
    Image.new("RGB", size, (90, 120, 60)).save(
        file, {".jpg": "JPEG", ".jpeg": "JPEG"}.get(ending.lower(), ending[1:].upper())
    )
    return file.getvalue()


def photograph(path: Path, size: tuple[int, int] = (8, 16)) -> Path:
    "A file of its own bytes: the name follows the picture, where decoders do not look."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(path.suffix, size) + path.as_posix()[-60:].encode(errors="replace"))
    return path


def truncate(path: Path) -> Path:
    path.write_bytes(encoded(path.suffix)[: 2 * len(encoded(path.suffix)) // 3])
    return path


def market(top: Path, folders: tuple[str, ...] = tuple(MARKET)) -> Path:
    for folder in folders:
        for name in MARKET[folder]:
            photograph(top / folder / f"{name}.jpg")
        (top / folder / "Thumbs.db").write_bytes(b"notes")
    (top / "readme.txt").write_text("as released")
    return top


def duke(top: Path) -> Path:
    for folder, names in DUKE.items():
        for name in names:
            photograph(top / folder / f"{name}.jpg")
    (top / "LICENSE_DukeMTMC-reID.txt").write_text("research")
    return top


def msmt(top: Path, version: int = 1) -> Path:
    "Train people 0 and 1 (one image of each in list_val), test people 0 and 1: ids begin anew."
    train, test = ("train", "test") if version == 1 else ("mask_train_v2", "mask_test_v2")
    for part, folder, rows in (
        ("train", train, [(0, 1, 8), (0, 15, 9), (1, 4, 8)]),
        ("val", train, [(0, 2, 15), (1, 5, 15)]),
        ("query", test, [(0, 1, 15), (1, 2, 15)]),
        ("gallery", test, [(0, 2, 3), (1, 3, 3)]),
    ):
        lines = []
        for number, (pid, camid, frame) in enumerate(rows):
            path = f"{pid:04d}/{pid:04d}_{number:03d}_{camid:02d}_0303morning_{frame:04d}_0.jpg"
            photograph(top / folder / path)
            lines.append(f"{path} {pid}\n")
        (top / f"list_{part}.txt").write_text("".join(lines))
    return top


def viper(top: Path, people: tuple[int, ...] = (0, 3, 872, 873)) -> Path:
    for camera, angle in (("cam_a", 45), ("cam_b", 180)):
        for person in people:
            photograph(top / camera / f"{person:03d}_{angle if person else 0}.bmp")
    (top / "README.txt").write_text("as released")
    return top


def cuhk_np(
    top: Path, boxes: tuple[str, ...] = ("detected", "labeled"), ending: str = ".png"
) -> Path:
    for spelt in boxes:
        for folder, names in {
            TRAIN: ["0001_c1_1", "0001_c2_6", "0003_c1_1"], QUERY: ["0002_c1_1"],
            GALLERY: ["0002_c2_6"],
        }.items():
            for number, name in enumerate(names):
                photograph(top / spelt / folder / f"{name}{ending}", (8 + number, 16))
    return top


def cuhk_images(
    top: Path, boxes: tuple[str, ...] = ("detected", "labeled"), tests: str = "csv"
) -> Path:
    """The release as photographs: view 1 with images 1 and 3, view 2 with image 6; test sets in our
    table or in torchreid's list.
    """
    names = [
        f"{pair}_{p:03d}_{v}_{i:02d}.png"
        for pair, n in PEOPLE.items()
        for p in range(1, n + 1)
        for v, i in ((1, 1), (1, 3), (2, 6))
    ]
    for spelt in boxes:
        for number, name in enumerate(names):
            photograph(top / f"images_{spelt}" / name, (8 + number % 3, 16))
        if tests == "json":
            parts = []
            for tested in (("1_001", "2_001"), ("3_001",)):
                entries = [[f"images_{spelt}/{name}", 0, 0] for name in names if name[:5] in tested]
                parts.append(dict(train=[], query=entries, gallery=entries, num_train_pids=1367))
            (top / f"splits_classic_{spelt}.json").write_text(json.dumps(parts))
    if tests == "csv":
        (top / "testsets.csv").write_text("split,pair,person\n0,1,1\n0,2,1\n1,3,1\n")
    return top


def cuhk_mat(
    path: Path, change=None, people=None, numbers=(1, 3, 6), tests=([[1, 1], [2, 1]], [[3, 1]])
) -> Path:
    """cuhk-03.mat as MATLAB writes it: cells are references, axes reversed, an empty cell is two
    zeros with a mark.

    `people` of each pair: `PEOPLE` if not given. `numbers`: the images that everybody has; 2, 4 and
    5 are empty between and behind them. `tests`: pair and person of those who are tested, for each
    split. `change(file, cell)` may damage it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", userblock_size=512) as file:
        store = file.create_group("#refs#")

        def cell(array, empty=False):
            dataset = store.create_dataset(f"r{len(store)}", data=array)
            dataset.attrs["MATLAB_class"] = np.bytes_(
                "cell" if h5py.check_dtype(ref=dataset.dtype) else "uint8"
            )
            if empty:
                dataset.attrs["MATLAB_empty"] = np.uint8(1)
            return dataset.ref

        def image(pair, person, number):
            if number not in numbers:
                return cell(np.zeros(2, np.uint64), empty=True)
            pixels = np.empty((12 + number, 6, 3), np.uint8)  # rows, columns, colours
            pixels[:] = 40 * pair, 40 * person, 20 * number
            pixels[0] = 255  # the head is up
            return cell(pixels.transpose(2, 1, 0))

        for name in ("labeled", "detected"):
            pairs = [
                [[image(pair, p, n) for n in range(1, 11)] for p in range(1, size + 1)]
                for pair, size in (people or PEOPLE).items()
            ]
            refs = [cell(np.array(pair, dtype=h5py.ref_dtype).T) for pair in pairs]
            file.create_dataset(name, data=np.array([refs], dtype=h5py.ref_dtype))
        sets = [cell(np.array(tested, float).T) for tested in tests]
        file.create_dataset("testsets", data=np.array([sets], dtype=h5py.ref_dtype))
        if change:
            change(file, cell)
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512))
    return path


def own(top: Path, split: bool = False) -> Path:
    "Four people's photographs with a table."
    rows = []
    for person, camera, shot in product(("ann", "bob", "cy", "di"), ("door", "yard"), (1, 2)):
        part = "train" if person in ("ann", "bob") else "query" if shot == 1 else "gallery"
        path = photograph(top / camera / f"{person}{shot}.jpg").relative_to(top)
        rows.append(f"{path.as_posix()},{person},{camera}{f',{part}' if split else ''}")
    header = "path,identity,camera" + ",split" * split
    (top / "photographs.csv").write_text("\n".join([header, *rows]) + "\n")
    return top


def module(name: str):
    # the package offers functions under some of these names
    return import_module(f"reid_repro.datasets.{name}")


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    "The made folders are what was published."
    for name, train, query, gallery in (
        ("market1501", (9, 3, 6), (2, 2, 6), (4, 2, 6)),
        ("dukemtmc", (8, 2, 8), (1, 1, 8), (2, 2, 8)),
        ("msmt17", (5, 2, 15), (2, 2, 15), (2, 2, 15)),
    ):
        monkeypatch.setattr(
            module(name), "_RELEASE",
            dict(train=Published(*train), query=Published(*query), gallery=Published(*gallery)),
        )
    monkeypatch.setattr(module("viper"), "_RELEASE", Published(4, 4, 1))
    monkeypatch.setattr(module("market1501"), "_HAND_DRAWN", 6)
    small = dict(train=Published(3, 2, 2), query=Published(1, 1, 2), gallery=Published(1, 1, 2))
    monkeypatch.setattr(
        module("cuhk03"), "_RELEASE", dict.fromkeys(("detected", "labelled"), small)
    )
    monkeypatch.setattr(
        module("cuhk03"), "_EVERYONE", dict.fromkeys(("detected", "labelled"), Published(24, 8, 2))
    )


def refused(action, *words: str, error: type = DatasetError) -> None:
    "`action` raises `error` with all `words` in its message."
    with pytest.raises(error) as told:
        action()
    assert all(word in str(told.value) for word in words), told.value


def tree(folder: Path) -> dict[str, bytes | None]:
    "Every path below `folder` with its bytes (None: a folder)."
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def zipped(archive: Path, folder: Path) -> Path:
    "A folder as a zip archive, its own name first."
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder.parent))
    return archive


def tarred(archive: Path, folder: Path, mode: str = "w:gz") -> Path:
    "A folder as a tar archive, its own name first."
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, mode) as file:
        file.add(folder, folder.name)
    return archive


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    "Normal numbers that depend on the seed alone."
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pixels(number: int, seed: int = 0, height: int = 64, width: int = 32) -> torch.Tensor:
    "Photographs of smooth blots of colour, uint8 (number, 3, height, width)."
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(
        0, 256, (number, 3, height // 8, width // 8), generator=generator
    ).float()
    return F.interpolate(coarse, (height, width), mode="bilinear").to(torch.uint8)


class Killed(Exception):
    "What a process that dies in the middle of an epoch leaves behind, in place of its death."


def fragile(batches: type) -> type:
    "The same batches, from a sampler that dies once, at the second step of its second epoch."

    class Fragile(batches):
        whole = False

        def epoch(self, e):
            for number, batch in enumerate(super().epoch(e)):
                if e == 1 and number == 1 and not self.whole:
                    self.whole = True
                    raise Killed
                yield batch

    return Fragile


def forked() -> None:
    """To be called first in a forked child: progress bars get a lock of its own.

    Theirs is shared between processes. A child killed while it holds the lock would leave it locked
    for all others, for good.
    """
    for bar in tqdm.__mro__:
        if hasattr(bar, "set_lock"):
            bar.set_lock(threading.RLock())


TOUCHES = {
    "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.scandir",
    "tempfile.mkdtemp", "fcntl.flock", "os.fsync",
}


def dies(at: int, out: Path) -> Callable[[], None]:
    """This process kills itself before its `at`-th touch of the folder `out` from now on. What is
    returned counts as a touch, too.

    Touches are what Python reports before it asks the system, every `fsync`, and the middle of
    writing tensors.
    """
    from reid_repro.learning import checkpoints

    left, fsync, save_file = [at], os.fsync, checkpoints.save_file

    def touch() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        path = str(arguments[0]) if arguments else ""
        if (
            event in TOUCHES
            and (str(out) in path or "/" not in path)
            and threading.current_thread() is threading.main_thread()
        ):
            touch()

    def save_half_first(tensors: dict, path: Path, metadata: dict) -> None:
        save_file(tensors, path, metadata)
        half = path.with_name(".tmpA1b2C3")  # safetensors, too, writes to another name first
        half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        path.unlink()
        touch()
        half.unlink()
        save_file(tensors, path, metadata)

    def told(descriptor: int) -> None:
        sys.audit("os.fsync", descriptor)
        fsync(descriptor)

    checkpoints.save_file, os.fsync = save_half_first, told
    sys.addaudithook(hook)
    return touch


def in_process(action: Callable, *arguments) -> int:
    """Runs `action` in a process of its own that has loaded the library, and returns its exit
    status: minus the signal that ended it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([action.__module__])
    process = context.Process(target=action, args=arguments)
    # for the server, which starts with the first process and loads the module once
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("the process hangs")
    return process.exitcode
