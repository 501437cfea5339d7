"""The scripts of `data_scripts`: interrupted at every single change of the disk, two at once, on a
full disk; and on real archives.
"""

import builtins
import errno
import io
import mmap
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from made import (
    GALLERY, QUERY, TRAIN, cuhk_images, cuhk_mat, cuhk_np, duke, forked, market, module, msmt, photograph, pretend, refused, tarred, tree,
    truncate, viper, zipped,
)  # fmt: skip

from reid_repro.datasets import Published, open_benchmark
from reid_repro.datasets.preparation import Layout, main, prepare

SCRIPTS = Path(__file__).resolve().parents[2] / "data_scripts"
REAL = os.environ.get("REID_REPRO_REALDATA", "")


def mat_zip(archive: Path, folder: Path, **few) -> Path:
    cuhk_mat(folder / "cuhk03_release" / "cuhk-03.mat", **few)
    (folder / "cuhk03_release" / "README.md").write_text("as released")
    return zipped(archive, folder / "cuhk03_release")


# case → (script, its other words, how the archive is made in a folder, the benchmark's folder)
FLOWS: dict[str, tuple[str, tuple[str, ...], Callable[[Path], Path], str]] = {
    "market1501": ("market1501", (), lambda t: zipped(t / "a.zip", market(t / "Market-1501-v15.09.15")), "Market-1501-v15.09.15"),
    "market1501 train-only": (
        "market1501", ("--split", "train-only"), lambda t: zipped(t / "a.zip", market(t / "m", (TRAIN,))), "Market-1501-v15.09.15",
    ),
    "cuhk03 np": ("cuhk03", (), lambda t: zipped(t / "a.zip", cuhk_np(t / "cuhk03-np")), "cuhk03-np"),
    "cuhk03 release": ("cuhk03", (), lambda t: mat_zip(t / "a.zip", t), "cuhk03"),
    "cuhk03 mat": ("cuhk03", (), lambda t: cuhk_mat(t / "cuhk-03.mat"), "cuhk03"),
    "dukemtmc folder": ("dukemtmc", (), lambda t: duke(t / "in" / "DukeMTMC-reID").parent, "DukeMTMC-reID"),
    "msmt17": ("msmt17", (), lambda t: tarred(t / "a.tar.gz", msmt(t / "MSMT17_V1")), "MSMT17_V1"),
    "msmt17 V2": ("msmt17", (), lambda t: tarred(t / "a.tar", msmt(t / "MSMT17_V2", 2), "w"), "MSMT17_V2"),
    "viper": ("viper", (), lambda t: zipped(t / "a.zip", viper(t / "VIPeR")), "VIPeR"),
}  # fmt: skip
FEW = dict(people={1: 2, 2: 1}, numbers=(1, 6), tests=([[1, 1]], [[2, 1]]))
# as few files as there can be: every change of the disk is struck once
STRUCK: dict[str, Callable[[Path], Path]] = {
    "market1501": lambda t: zipped(
        t / "a.zip", market(t / "Market-1501-v15.09.15", (TRAIN, QUERY, GALLERY))
    ),
    "cuhk03 np": FLOWS["cuhk03 np"][2],
    "cuhk03 release": lambda t: mat_zip(t / "a.zip", t, **FEW),
    "cuhk03 mat": lambda t: cuhk_mat(t / "cuhk-03.mat", **FEW),
    "dukemtmc folder": FLOWS["dukemtmc folder"][2],
    "msmt17": FLOWS["msmt17"][2],
    "viper": FLOWS["viper"][2],
}


@pytest.fixture(autouse=True)
def released(monkeypatch):
    pretend(monkeypatch)


def script(name: str, *words: str) -> int:
    "The script as it stands, in this process; its exit status."
    given = sys.argv
    try:
        sys.argv = [f"{name}.py", *map(str, words)]
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    except SystemExit as left:
        return left.code
    finally:
        sys.argv = given
    raise AssertionError("the script did not end by itself")


def flow(case: str, source: Path, to: Path) -> int:
    name, words, _, _ = FLOWS[case]
    return script(name, "--from", source, "--to", to, *words)


# ---- blows


class Struck(io.BufferedWriter):
    """A file whose first write counts as a change; where the blow falls, half of what was to be
    written is on the disk.
    """

    beat: Callable = None
    untouched = True

    def write(self, data):
        if self.untouched:
            self.untouched, half = False, bytes(data)[: len(data) // 2]
            Struck.beat(lambda: (io.BufferedWriter.write(self, half), self.flush()))
        return super().write(data)


def beaten(below: Path, blow: Callable[[], None], at: int, fell: mmap.mmap) -> None:
    """From now on, `blow` falls at the `at`-th change of the disk below a folder, counted from 1,
    and `fell` tells that it did.

    There is no way back: use it in a child.
    """
    seen, top, real = [0], os.path.abspath(below), io.open
    changes = {
        "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate",
        "shutil.rmtree", "shutil.copyfile",
    }

    def inside(place) -> bool:
        return isinstance(place, str | bytes | os.PathLike) and os.path.abspath(
            os.fsdecode(place)
        ).startswith(top)

    def beat(before: Callable[[], object] = lambda: None) -> None:
        seen[0] += 1
        if seen[0] == at:
            before()
            fell[0] = 1
            blow()

    def hook(event: str, args: tuple) -> None:
        if event in changes and any(map(inside, args[:2])):
            beat()

    def opening(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **rest):
        if not (set(mode) & set("wxa+") and inside(file)):
            return real(file, mode, buffering, encoding, errors, newline, **rest)
        beat()  # before it is there
        struck = Struck(io.FileIO(file, mode.replace("b", "").replace("t", "")))
        beat()  # it is there, and empty
        return struck if "b" in mode else io.TextIOWrapper(struck, encoding, errors, newline)

    Struck.beat, io.open, builtins.open = staticmethod(beat), opening, opening
    sys.addaudithook(hook)


def child(action: Callable[[], int]) -> tuple[int, str]:
    "Exit status (negative: the signal) of `action` in a process of its own, and what it said."
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        forked()
        # ignored where the tests run in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            for stream in (1, 2):
                os.dup2(writing, stream)
            sys.stdout = sys.stderr = os.fdopen(writing, "w")
            status = action()
            sys.stdout.flush()
            os._exit(status)
        except BaseException as error:
            os.write(2, f"\nTRACEBACK {error!r}".encode())
        os._exit(99)
    os.close(writing)
    with os.fdopen(reading, "rb") as said:
        words = said.read().decode(errors="replace")
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), words


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupted() -> None:
    raise KeyboardInterrupt


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only() -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def every_blow(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blow: Callable[[], None]
):
    """The flow struck at its 1st, 2nd, … change of the disk until none is left: yields target
    folder, exit status and words.

    After each: the benchmark's folder is complete or not there, and running again ends as if
    nothing had happened.
    """
    everyone = dict.fromkeys(("detected", "labelled"), Published(6, 3, 2))
    monkeypatch.setattr(module("cuhk03"), "_EVERYONE", everyone)
    (tmp_path / "in").mkdir()
    source, folder, to = STRUCK[case](tmp_path / "in"), FLOWS[case][3], tmp_path / "to"
    assert flow(case, source, tmp_path / "whole") == 0
    whole = tree(tmp_path / "whole")
    assert os.listdir(tmp_path / "whole") == [folder] and f"{folder}/SHA256SUMS" in whole
    for at in count(1):
        fell = mmap.mmap(-1, 1)

        def struck(at=at, fell=fell) -> int:
            beaten(to, blow, at, fell)
            return flow(case, source, to)

        status, words = child(struck)
        visible = (
            [name for name in os.listdir(to) if not name.startswith(".unpacking-")]
            if to.exists()
            else []
        )
        assert visible in ([], [folder]), (at, visible)
        assert not visible or tree(to / folder) == tree(tmp_path / "whole" / folder), at
        if fell[0]:
            yield at, to, status, words
        assert flow(case, source, to) == 0, (at, words)
        assert tree(to) == whole, at
        shutil.rmtree(to)
        if not fell[0]:
            assert status == 0 and at > 20, words
            return


@pytest.mark.parametrize("case", STRUCK)
def test_killed_at_any_change_of_the_disk_and_run_again(case, tmp_path, monkeypatch):
    assert {status for _, _, status, _ in every_blow(case, tmp_path, monkeypatch, killed)} == {
        -signal.SIGKILL
    }


def test_control_c_at_any_change_of_the_disk(tmp_path, monkeypatch):
    left = 0
    for at, to, status, words in every_blow("viper", tmp_path, monkeypatch, interrupted):
        assert status == 130 and "run it again" in words and "raceback" not in words.casefold(), (
            at, words,
        )
        left += any(to.rglob("*.bmp")) and not (to / "VIPeR").exists()
    assert left <= 6  # it cleans up after itself, unless the blow falls while it cleans


@pytest.mark.parametrize(
    ("case", "blow", "told"),
    [
        ("viper", full, "No space left"), ("cuhk03 mat", full, "No space left"),
        ("dukemtmc folder", read_only, "Read-only"),
    ],
)
def test_a_disk_that_is_full_or_read_only_at_any_change(case, blow, told, tmp_path, monkeypatch):
    statuses = []
    for at, _, status, words in every_blow(case, tmp_path, monkeypatch, blow):
        statuses.append(status)
        assert status in (0, 1) and "raceback" not in words.casefold(), (at, words)
        assert status == 0 or (
            told in words and "get it again" not in words and "cut off" not in words
        ), (at, words)
    # 0: a folder that was there already, or cleaning that can wait
    assert statuses.count(1) > len(statuses) / 2


def test_a_target_that_cannot_be_written(tmp_path, capsys):
    source = zipped(tmp_path / "a.zip", viper(tmp_path / "VIPeR"))
    (tmp_path / "file").write_text("mine")
    assert flow("viper", source, tmp_path / "file") == 1 and "is a file" in capsys.readouterr().err
    assert (
        flow("viper", source, tmp_path / "file" / "below") == 1
        and "viper.py: " in capsys.readouterr().err
    )
    assert (tmp_path / "file").read_text() == "mine"
    assert script("viper", "--from", source, "--to", "~nobody-of-that-name/x") == 1
    assert script("viper", "--from", "~nobody-of-that-name/x", "--to", tmp_path / "to") == 1
    assert script("viper", "--from", tmp_path / "away.zip", "--to", tmp_path / "to") == 1
    assert "Traceback" not in capsys.readouterr().err and not (tmp_path / "to").exists()
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        assert (
            flow("viper", source, tmp_path / "locked") == 1
            and "Permission" in capsys.readouterr().err
        )


# ---- two at once


def test_a_second_run_is_refused_and_leaves_the_first_alone(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    source, to = zipped(tmp_path / "a.zip", viper(tmp_path / "VIPeR")), tmp_path / "to"
    work = to / ".unpacking-VIPeR"
    (work / "content" / "VIPeR").mkdir(parents=True)
    photograph(work / "content" / "VIPeR" / "half.bmp")
    before, handle = tree(to), os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        refused(
            lambda: prepare(source, to, (Layout("viper", "VIPeR", "cam_a"),)), "another run",
            str(work),
        )
        assert tree(to) == before
    finally:
        os.close(handle)
    # what a run that died has left is no obstacle
    assert flow("viper", source, to) == 0 and os.listdir(to) == ["VIPeR"]


def test_a_run_that_ends_while_another_begins_does_not_lend_it_its_folder(tmp_path, monkeypatch):
    "The folder that was locked is gone, and another of its name is there."
    fcntl = pytest.importorskip("fcntl")
    source = zipped(tmp_path / "a.zip", viper(tmp_path / "VIPeR"))
    to = tmp_path / "to"
    real = fcntl.flock

    def late(handle, how):
        shutil.rmtree(to / ".unpacking-VIPeR")
        photograph(to / ".unpacking-VIPeR" / "content" / "work of a third.bmp")
        return real(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    refused(lambda: prepare(source, to, (Layout("viper", "VIPeR", "cam_a"),)), "another run")
    assert (to / ".unpacking-VIPeR" / "content" / "work of a third.bmp").exists()


def test_several_at_once_end_in_one_whole_folder(tmp_path):
    source, to = zipped(tmp_path / "a.zip", viper(tmp_path / "VIPeR")), tmp_path / "to"
    assert flow("viper", source, tmp_path / "whole") == 0
    children = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            forked()
            sys.stdout = sys.stderr = io.StringIO()
            try:
                os._exit(flow("viper", source, to))
            finally:
                os._exit(99)
        children.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert set(statuses) <= {0, 1} and 0 in statuses
    assert tree(to / "VIPeR") == tree(tmp_path / "whole" / "VIPeR")
    assert flow("viper", source, to) == 0 and tree(to) == tree(tmp_path / "whole")


# ---- a process that is really killed

PRETENDING = """
import runpy, sys
sys.path.insert(0, {tests!r})
import made, pytest
made.pretend(pytest.MonkeyPatch())
print("ready", flush=True)
sys.argv = {argv!r}
runpy.run_path({path!r}, run_name="__main__")
"""


@pytest.mark.parametrize("case", STRUCK)
def test_kill_minus_nine_from_outside_at_some_time(case, tmp_path):
    source, folder, chance = FLOWS[case][2](tmp_path), FLOWS[case][3], random.Random(case)
    began = time.perf_counter()
    assert flow(case, source, tmp_path / "whole") == 0
    took = time.perf_counter() - began
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            forked()
            sys.stdout = sys.stderr = io.StringIO()
            os._exit(flow(case, source, tmp_path / "to"))
        time.sleep(chance.random() * took)
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) in (0, -signal.SIGKILL)
        if (tmp_path / "to" / folder).exists():
            assert tree(tmp_path / "to" / folder) == tree(tmp_path / "whole" / folder)
    assert flow(case, source, tmp_path / "to") == 0 and tree(tmp_path / "to") == tree(
        tmp_path / "whole"
    )


def test_a_script_of_its_own_process_killed_and_run_again(tmp_path):
    source = FLOWS["cuhk03 release"][2](tmp_path)
    argv = ["cuhk03.py", "--from", str(source), "--to", str(tmp_path / "to")]
    text = PRETENDING.format(
        tests=str(Path(__file__).parents[1]), argv=argv, path=str(SCRIPTS / "cuhk03.py")
    )
    command, environment = [sys.executable, "-c", text], {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, cwd=SCRIPTS.parent, env=environment, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        while not any((tmp_path / "to").rglob("*.png")):
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL and [
        name[:11] for name in os.listdir(tmp_path / "to")
    ] == [".unpacking-"]
    assert (
        flow("cuhk03 release", source, tmp_path / "to")
        == 0
        == flow("cuhk03 release", source, tmp_path / "whole")
    )
    assert tree(tmp_path / "to") == tree(tmp_path / "whole")


def test_a_real_control_c(tmp_path):
    source = zipped(tmp_path / "a.zip", viper(tmp_path / "VIPeR"))

    def signalled() -> int:
        beaten(tmp_path / "to", lambda: os.kill(os.getpid(), signal.SIGINT), 12, mmap.mmap(-1, 1))
        return flow("viper", source, tmp_path / "to")

    assert child(signalled)[0] == 130 and tree(tmp_path / "to") == {}
    assert flow("viper", source, tmp_path / "to") == 0


# ---- what the scripts find, and say


@pytest.mark.parametrize("case", FLOWS)
def test_a_script_from_archive_or_folder_gives_the_same(case, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    source = FLOWS[case][2](tmp_path / "in")
    assert flow(case, source, tmp_path / "to") == 0
    said = capsys.readouterr().out
    target = tmp_path / "to" / FLOWS[case][3]
    assert f"ready in '{target}'" in said and re.search(r"fingerprint [0-9a-f]{16}", said)
    whole = tree(tmp_path / "to")
    listed = dict(
        reversed(line.split("  ")) for line in (target / "SHA256SUMS").read_text().splitlines()
    )
    assert set(listed) == {path for path, data in tree(target).items() if data is not None} - {
        "SHA256SUMS"
    }
    assert flow(case, source, tmp_path / "to") == 0 and tree(tmp_path / "to") == whole  # again
    # from itself
    assert flow(case, target, tmp_path / "to") == 0 and tree(tmp_path / "to") == whole
    # from a folder, moved
    assert flow(case, target, tmp_path / "other") == 0 and tree(tmp_path / "other") == whole
    assert (
        script(
            FLOWS[case][0], "--from", source, "--to", tmp_path / "o", "--checksums",
            target / "SHA256SUMS",
            *FLOWS[case][1],
        )
        == 0
    )
    (target / ".DS_Store").write_bytes(b"somebody looked")
    assert flow(case, source, tmp_path / "to") == 0
    victim = max(target.rglob("*.[jpb][pnm][gp]"))
    victim.write_bytes(victim.read_bytes() + b"!")
    assert (
        flow(case, source, tmp_path / "to") == 1 and "holds other files" in capsys.readouterr().err
    )
    assert victim.read_bytes().endswith(b"!")  # looked at, never changed
    # its SHA256SUMS tells
    assert flow(case, target, tmp_path / "third") == 1 and "1 changed" in capsys.readouterr().err
    assert not (tmp_path / "third" / FLOWS[case][3]).exists()


@pytest.mark.parametrize("number", [0, -1, 5])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("market1501", market), ("cuhk03", cuhk_np), ("dukemtmc", duke), ("msmt17", msmt),
        ("viper", viper), ("cuhk03", cuhk_images),
    ],
)
def test_a_truncated_image_is_found_wherever_it_lies(name, make, number, tmp_path, capsys):
    top = make(tmp_path / "in" / "top")
    victim = sorted(path for path in top.rglob("*") if path.suffix in (".jpg", ".png", ".bmp"))[
        number
    ]
    truncate(victim)
    assert script(name, "--from", zipped(tmp_path / "a.zip", top), "--to", tmp_path / "to") == 1
    assert victim.name in capsys.readouterr().err and tree(tmp_path / "to") == {}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda top: next((top / QUERY).glob("*.jpg")).unlink(), "holds 1 images, 2 expected"),
        (lambda top: shutil.rmtree(top / GALLERY), "take split='train-only'"),
        (lambda top: photograph(top / QUERY / "0004_c1s1_000101_00.png"), "two endings"),
        (
            lambda top: next((top / QUERY).glob("0005*")).rename(
                top / QUERY / "0005_c9s1_000101_00.jpg"
            ),
            "camera 9",
        ),
        (lambda top: shutil.rmtree(top / TRAIN), f"no '{TRAIN}' in"),
        (lambda top: (top / "link").symlink_to("/etc"), "is a link"),
        (lambda top: (top / "SHA256SUMS").write_text("0" * 64 + "  query/x.jpg\n"), "differ from"),
        (lambda top: (top / "SHA256SUMS").write_text("nonsense\n"), "line 1"),
        (
            lambda top: Path(os.fsdecode(os.fsencode(top) + b"/\xff.txt")).write_text("x"),
            "rename it",
        ),
        (
            lambda top: [truncate(path) for path in (top / QUERY).glob("*.jpg")],
            "2 of 15 images are damaged",
        ),
    ],
)
def test_damage_is_told_and_nothing_stays(damage, words, tmp_path, capsys):
    top = market(tmp_path / "in" / "Market-1501-v15.09.15")
    damage(top)
    assert flow("market1501", top.parent, tmp_path / "to") == 1
    said = capsys.readouterr().err
    assert words in said and said.startswith("market1501.py: ") and tree(tmp_path / "to") == {}
    assert ".unpacking-" not in said, said  # no path that is gone when it is read


def test_a_source_that_would_swallow_its_target(tmp_path, capsys, monkeypatch):
    viper(tmp_path / "data" / "VIPeR")
    before = tree(tmp_path)
    for source, to in (
        (tmp_path / "data", tmp_path / "data"), (tmp_path, tmp_path / "data" / "new"),
        (tmp_path / "data" / "VIPeR",) * 2,
    ):
        assert (
            script("viper", "--from", source, "--to", to) == 1
            and "lies in" in capsys.readouterr().err
        )
    monkeypatch.chdir(tmp_path / "data")
    assert (
        script("viper", "--from", "", "--to", tmp_path / "to") == 1
        and "no archive or folder was given" in capsys.readouterr().err
    )
    assert tree(tmp_path) == before
    # what a stopped run left is no source
    rest = photograph(tmp_path / "data" / ".unpacking-VIPeR" / "content" / "rest.bmp")
    assert script("viper", "--from", rest.parent, "--to", tmp_path / "data") == 1 and rest.exists()


def test_lists_of_checksums_that_are_none(tmp_path, capsys):
    source = zipped(tmp_path / "a.zip", viper(tmp_path / "VIPeR"))
    for text in (b"\xff", b"abc  x\n", b"0" * 64 + b"\n", b"0" * 64 + b"  cam_a/000_0.bmp\n"):
        (tmp_path / "sums").write_bytes(text)
        assert (
            script(
                "viper", "--from", source, "--to", tmp_path / "to", "--checksums", tmp_path / "sums"
            )
            == 1
        )
        assert str(tmp_path / "sums") in capsys.readouterr().err and tree(tmp_path / "to") == {}
    assert (
        script("viper", "--from", source, "--to", tmp_path / "to", "--checksums", tmp_path / "away")
        == 1
    )


def test_archives_that_are_none_or_of_something_else(tmp_path, capsys):
    inner = zipped(tmp_path / "inner" / "VIPeR.v1.0.zip", viper(tmp_path / "VIPeR"))
    page = tmp_path / "page.zip"
    page.write_bytes(b"<html>404</html>" * 100)
    for source, words in (
        (zipped(tmp_path / "nested.zip", inner.parent), "no folder 'cam_a'"),
        (page, "cannot be read"),
        (zipped(tmp_path / "duke.zip", duke(tmp_path / "duke")), "no folder 'cam_a'"),
        (
            zipped(tmp_path / "deep.zip", viper(tmp_path / "1/2/3/4/5/6/VIPeR").parents[5]),
            "no folder 'cam_a'",
        ),
    ):
        assert script("viper", "--from", source, "--to", tmp_path / "to") == 1
        assert words in capsys.readouterr().err and tree(tmp_path / "to") == {}


def test_the_md5_is_told_and_the_words_are_checked(tmp_path, capsys, monkeypatch):
    source, names = zipped(tmp_path / "a.zip", viper(tmp_path / "VIPeR")), {}
    for name in ("market1501", "cuhk03", "dukemtmc", "msmt17", "viper"):
        names[name] = runpy.run_path(str(SCRIPTS / f"{name}.py"))
        assert script(name, "--help") == 0 and "--from ARCHIVE" in capsys.readouterr().out
    assert set(names["market1501"]["MD5"]) == {"65005ab7d12ec1c44de4eeafe813e68a"}
    assert set(names["cuhk03"]["MD5"]) == {"728939e58ad9f0ff53e521857dd8fb43"}
    assert set(names["viper"]["MD5"]) == {"1c2d9fc1cc800332567a0da25a1ce68c"}
    # every layout is of a benchmark that can be opened, no withdrawn set has an address
    for name, space in names.items():
        assert all(
            layout.benchmark.startswith(name)
            for layouts in space["LAYOUTS"].values()
            for layout in layouts
        )
        assert ("URL" in space) == (name == "viper")
    md5 = module("preparation").file_digest(source, "md5")
    layouts = names["viper"]["LAYOUTS"]
    assert (
        main(
            "", layouts, {md5: "the one"},
            argv=["--from", str(source), "--to", str(tmp_path / "to")],
        )
        == 0
    )
    assert "a.zip: the one, by its MD5" in capsys.readouterr().out
    assert (
        main(
            "", layouts, {"0": "the one"},
            argv=["--from", str(source), "--to", str(tmp_path / "to")],
        )
        == 0
    )
    assert "another MD5 than the release" in capsys.readouterr().out
    for words in (
        [],
        ["--to", "x"],
        ["--from", "x"],
        ["--from", "x", "--to", "y", "--split", "other"],
        ["--from", "x", "--download", "--to", "y"],
    ):
        assert script("market1501", *words) == 2 and "usage" in capsys.readouterr().err


def test_a_download_that_is_no_archive_can_be_repeated(tmp_path, capsys, monkeypatch):
    good = zipped(tmp_path / "a.zip", viper(tmp_path / "VIPeR")).read_bytes()
    answers = iter((b"<html>busy</html>" * 99, good))

    def download(url, to, timeout=60):
        if not to.exists():
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(next(answers))
        return to

    monkeypatch.setattr(module("preparation"), "download", download)
    assert script("viper", "--download", "--to", tmp_path / "to") == 1
    said = capsys.readouterr().err
    assert "cannot be read" in said
    if (tmp_path / "to" / "VIPeR.v1.0.zip").exists():
        assert "remove" in said
        (tmp_path / "to" / "VIPeR.v1.0.zip").unlink()
    assert (
        script("viper", "--download", "--to", tmp_path / "to") == 0
        and (tmp_path / "to" / "VIPeR").is_dir()
    )


# ---- real archives

real = pytest.mark.skipif(
    not Path(REAL).is_dir() or not REAL,
    reason="REID_REPRO_REALDATA names no folder with the real archives",
)


@pytest.fixture
def archive(monkeypatch):
    monkeypatch.undo()  # the true counts

    def find(name: str) -> Path:
        if not (Path(REAL) / name).is_file():
            pytest.skip(f"{name} is not in the folder that REID_REPRO_REALDATA names")
        return Path(REAL) / name

    return find


@real
def test_cuhk03_np_as_it_is(tmp_path, archive, capsys):
    assert script("cuhk03", "--from", archive("cuhk03-np-detected.zip"), "--to", tmp_path) == 0
    assert (
        "7,365 train, 1,400 query, 5,332 gallery images · 767 + 700 people · 2 cameras"
        in capsys.readouterr().out
    )
    assert os.listdir(tmp_path) == ["cuhk03-np"]
    for name, people, query, gallery in (
        ("cuhk03-classic-detected", 1367, 100, 100), ("cuhk03-1160-detected", 1160, 100, 100),
    ):
        for split in (0, 19):
            found = open_benchmark(name, tmp_path, split=split)
            assert (
                found.train.num_identities, found.query.num_identities,
                found.gallery.num_identities,
            ) == (people, query, gallery)


@real
def test_market_training_images_alone(tmp_path, archive, capsys):
    source = archive("Market-1501-train-only.zip")
    assert script("market1501", "--from", source, "--to", tmp_path) == 1
    said = capsys.readouterr().err
    assert "3,368" in said and "19,732" in said and "train-only" in said and tree(tmp_path) == {}
    assert script("market1501", "--from", source, "--to", tmp_path, "--split", "train-only") == 0
    assert "551 + 200 people · 6 cameras" in capsys.readouterr().out and os.listdir(tmp_path) == [
        "Market-1501-v15.09.15"
    ]
