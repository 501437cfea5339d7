"""The importing user: a wheel, an environment without the notebooks' tools, the README's own
snippets, and a type checker's marker.

The environment is this one with every package blocked that the wheel's requirements do not bring (a
test may not need the network).
"""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from made import own

ROOT = Path(__file__).resolve().parents[2]
TOOLS = (
    "papermill", "snakemake", "jupyterlab", "nbdev", "sklearn", "skimage", "cv2", "h5py",
    "ipywidgets", "pytorch_metric_learning",
)
# whole modules; reid_repro.learning.fisher asks when it is used
NEED_AN_EXTRA = {"reid_repro.datasets.cuhk03_release"}
DENSE_SIFT = (
    "import torch, reid_repro.learning.fisher as f; f.dense_sift(torch.zeros(1, 3, 64, 48,"
    " dtype=torch.uint8))"
)
EXTRAS = [*(f"import {module}" for module in sorted(NEED_AN_EXTRA)), DENSE_SIFT]
BLOCK = """
import sys
class Without:
    "A finder that finds nothing of the packages that the wheel does not require."
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {blocked!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
sys.path.insert(0, {wheel!r})
"""

EACH = """
import contextlib, io, json, traceback
told = {}
for name, code in pieces.items():
    error, printed = "", io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            error = traceback.format_exc()
    told[name] = printed.getvalue(), error
print(json.dumps(told))
"""


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(requirements: list[str]) -> set[str]:
    "Names of all packages that these requirements bring, their own requirements included."
    found, waiting = set(), [Requirement(r) for r in requirements]
    while waiting:
        requirement = waiting.pop()
        marker, name = requirement.marker, plain(requirement.name)
        if name in found or not (
            marker is None
            or any(marker.evaluate({"extra": extra}) for extra in requirement.extras or {""})
        ):
            continue
        try:
            inside = importlib.metadata.distribution(name).requires or []
        except importlib.metadata.PackageNotFoundError:  # for another system
            continue
        found.add(name)
        for line in map(Requirement, inside):
            if line.marker is None or any(
                line.marker.evaluate({"extra": extra}) for extra in requirement.extras or {""}
            ):
                line.marker = None
                waiting.append(line)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "Built from a copy, so that no build/ of earlier days slips in."
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "reid_repro", source / "reid_repro", ignore=shutil.ignore_patterns("__pycache__")
    )
    command = [
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index",
        "-w", folder, source,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


@cache
def blocked(wheel: Path) -> set[str]:
    "Top-level modules of all installed packages that the wheel does not need."
    with zipfile.ZipFile(wheel) as file:
        name = next(n for n in file.namelist() if n.endswith(".dist-info/METADATA"))
        lines = re.findall(r"^Requires-Dist: (.+)$", file.read(name).decode(), re.MULTILINE)
    brought = needed([line for line in lines if "extra ==" not in line])
    return {
        top
        for top, owners in importlib.metadata.packages_distributions().items()
        if not {plain(o) for o in owners} & brought
    }


def snippets() -> list[str]:
    "The Python blocks of the README."
    return re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )


@pytest.fixture(scope="module")
def told(wheel, unpacked, tmp_path_factory) -> dict[str, tuple[str, str]]:
    """Name → (what it printed, its error or nothing) of every piece of code, run in one new
    process: importing torch takes seconds.
    """
    folder = tmp_path_factory.mktemp("user")
    own(folder / "my_photographs")
    modules = sorted(
        str(p.relative_to(unpacked).with_suffix("")).replace("/", ".")
        for p in (unpacked / "reid_repro").rglob("*.py")
    )
    modules = [
        m.removesuffix(".__init__")
        for m in modules
        if not m.endswith("_modidx") and m not in NEED_AN_EXTRA
    ]
    pieces = {"where": "import reid_repro; print(reid_repro.__file__, reid_repro.__version__)"}
    pieces |= {module: f"import {module}" for module in modules} | {
        code: code for code in (*EXTRAS, *snippets())
    }
    head = BLOCK.format(blocked=blocked(wheel) - {"reid_repro"}, wheel=str(unpacked))
    command = [sys.executable, "-I", "-c", head + f"pieces = {pieces!r}\n" + EACH]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "reid_repro").rglob("*.py")}
    assert modules <= set(names) and "reid_repro/py.typed" in names
    assert {
        f"reid_repro/reported/{p.name}" for p in (ROOT / "reid_repro" / "reported").iterdir()
    } <= set(names)
    assert {n.partition("/")[0].partition("-")[0] for n in names} == {"reid_repro"}


def test_the_tools_of_the_notebooks_are_extras(wheel):
    assert set(TOOLS) & {"papermill", "snakemake", "nbdev"} <= blocked(
        wheel
    ), "the library asks for what only the notebooks need"
    assert not {"torch", "torchvision", "numpy", "safetensors", "accelerate"} & blocked(wheel)


def test_every_module_imports_with_the_requirements_alone(told, wheel, unpacked):
    assert not {
        name: error for name, (_, error) in told.items() if name.startswith("reid_repro") and error
    }
    assert str(unpacked) in told["where"][0] and wheel.name.split("-")[1] in told["where"][0]


@pytest.mark.parametrize("code", EXTRAS)
def test_what_only_an_extra_brings_says_so(code, told):
    assert "pip install 'reid_repro[notebooks]'" in told[code][1], told[code]


def test_the_readme_shows_the_six_ways_in():
    text = snippets()
    assert len(text) >= 6
    ways = "IABlock", "randn(4, 128)", "strip_pool(", "glimpse(", "argsort", "recipe=recipe"
    for name in ways:
        assert sum(name in code for code in text) == 1, name


@pytest.mark.parametrize("code", snippets())
def test_a_snippet_of_the_readme_runs_as_it_stands(code, told):
    printed, error = told[code]
    assert not error, error
    # a comment behind print says what is printed
    for line in re.findall(r"print\(.*\)\s+# → (.+)$", code, re.MULTILINE):
        assert line.strip() in printed


def test_an_ia_block_in_a_foreign_network_changes_nothing_at_first():
    import torch
    import torchvision
    from reid_repro.ianet import IABlock

    torch.manual_seed(0)
    net, x = torchvision.models.resnet18().eval(), torch.randn(1, 3, 64, 32)
    before = net(x)
    net.layer2.append(IABlock(128).eval())
    assert torch.equal(net(x), before)
