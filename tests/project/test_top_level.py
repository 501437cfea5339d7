"""What `reid_repro` itself offers, what importing it costs, and that a bare checkout is enough."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import reid_repro

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "IDE PCB MINet DCC CASN IANet CAN IABlock Recipe train embed open_benchmark load_images "
    "distance_matrix evaluate rerank from_checkpoint"
).split()


def loaded(code: str, cwd: Path = ROOT, path: Path = ROOT) -> set[str]:
    "The modules that a fresh interpreter holds after `code`."
    code += "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(path), "PATH": "/usr/bin:/bin"},
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_every_name_is_there_and_defined_in_this_project():
    assert set(NAMES) <= set(reid_repro.__all__) and set(NAMES) <= set(dir(reid_repro))
    for name in NAMES:
        assert getattr(reid_repro, name).__module__.startswith("reid_repro.")
    with pytest.raises(AttributeError, match="nothing"):
        getattr(reid_repro, "nothing")  # noqa: B009
    with pytest.raises(ImportError, match="nothing"):
        from reid_repro import nothing  # noqa: F401


def test_importing_it_loads_nothing_heavy():
    assert not loaded("import reid_repro") & {"torch", "numpy", "pandas", "torchvision", "PIL"}


def test_scores_load_torch_and_no_more_of_its_kind():
    heavy = {"torchvision", "pandas", "matplotlib", "accelerate", "scipy.stats", "skimage"}
    assert not loaded("from reid_repro import evaluate") & heavy


@pytest.mark.parametrize("name", "IDE PCB MINet DCC CASN IANet CAN IABlock Recipe".split())
def test_a_method_loads_torch_and_little_more(name):
    "torchvision, which doubles the time, waits until a backbone is built."
    heavy = {"torchvision", "pandas", "matplotlib", "scipy.stats", "scipy.linalg", "skimage", "cv2"}
    assert not loaded(f"from reid_repro import {name}") & heavy


def test_a_checkout_that_is_not_installed_works(tmp_path):
    "Copied elsewhere, without metadata of an installed package in reach."
    shutil.copytree(
        ROOT / "reid_repro", tmp_path / "reid_repro", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copyfile(ROOT / "settings.ini", tmp_path / "settings.ini")
    code = (
        "import importlib.metadata as m\n"
        "def gone(name): raise m.PackageNotFoundError(name)\n"
        "m.version = gone\n"
        "import reid_repro\n"
        "from reid_repro import evaluate, open_benchmark\n"
        "assert reid_repro.__version__[0].isdigit(), reid_repro.__version__\n"
        f"assert reid_repro.__file__.startswith({str(tmp_path)!r})"
    )
    loaded(code, tmp_path, tmp_path)
