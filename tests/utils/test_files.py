"File systems that know no locks, and homes that cannot be written."

import errno
import os
import subprocess
import sys
import warnings

import pytest

from reid_repro.datasets.preparation import _staging
from reid_repro.learning.backbones import fetch_published
from reid_repro.toytown import toytown_root
from reid_repro.utils import files
from reid_repro.utils.files import atomic_write, remove_stale

fcntl = pytest.importorskip("fcntl")
NO_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF]


def raising(kind):
    def refuse(*_):
        raise OSError(kind, os.strerror(kind))

    return refuse


@pytest.mark.parametrize("kind", NO_LOCKS)
def test_without_locks_files_are_as_whole_and_one_warning_says_so(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(files, "_warned", [])
    monkeypatch.setattr(fcntl, "flock", raising(kind))
    path = tmp_path / "record.json"
    left = tmp_path / ".record.json.abc.writing"  # of a live writer or a dead one: nobody can know
    left.mkdir()
    with pytest.warns(UserWarning, match="has no locks") as told:
        for text in ("one", "two"):
            with atomic_write(path) as part:
                part.write_text(text)
            assert path.read_text() == text
        with _staging(tmp_path, "a") as folder:
            assert folder.is_dir()
        remove_stale(path)
    assert len(told) == 1 and "make room" not in str(told[0].message)
    assert left.is_dir() and sorted(os.listdir(tmp_path)) == [left.name, path.name]


def test_other_faults_of_locks_stay_faults(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", raising(errno.EIO))
    with pytest.raises(OSError, match="give another folder") as told:
        with atomic_write(tmp_path / "record.json") as part:
            part.write_text("new")
    assert "make room" not in str(told.value) and not os.listdir(tmp_path)


@pytest.mark.parametrize("kind", [errno.EINVAL, errno.ENOSYS, errno.EPERM])
def test_rights_and_folders_that_cannot_be_forced_out_do_not_matter(tmp_path, monkeypatch, kind):
    real = os.fsync
    folder = os.stat(tmp_path).st_ino
    monkeypatch.setattr(os, "chmod", raising(kind))
    monkeypatch.setattr(
        os, "fsync", lambda file: raising(kind)() if os.fstat(file).st_ino == folder else real(file)
    )
    with atomic_write(tmp_path / "record.json") as part:
        part.write_text("new")
    assert (tmp_path / "record.json").read_text() == "new"


def test_a_full_disk_is_still_told_to_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", raising(errno.ENOSPC))
    with pytest.raises(OSError, match="make room or give another folder"):
        with atomic_write(tmp_path / "record.json") as part:
            part.write_text("new")


@pytest.mark.parametrize("kind", NO_LOCKS[:2])
def test_toytown_needs_no_locks(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fcntl, "flock", raising(kind))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert toytown_root(identities=3, images_per_identity=2, junk=0, distractors=0).is_dir()


@pytest.mark.parametrize("home", ["/dev/null", "/proc/nowhere", "~"])
def test_homes_that_cannot_be_written_are_told_with_the_remedy(monkeypatch, home):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("TORCH_HOME", raising=False)
    monkeypatch.setenv("HOME", home)
    with pytest.raises(ValueError, match="set XDG_CACHE_HOME to a folder that can be written"):
        toytown_root(identities=3, images_per_identity=2, junk=0, distractors=0)
    if home != "~":
        with pytest.raises(ValueError, match="set TORCH_HOME to a folder that can be written, or"):
            fetch_published("resnet18", timeout=1)


def test_a_home_that_cannot_be_written_is_no_fault_of_imports(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "XDG_CACHE_HOME"} | {"HOME": "/dev/null"}
    code = "from reid_repro import evaluate; import reid_repro.viewing.pictures"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
