"""A fresh clone of this checkout, in a folder whose name has a blank and an umlaut: commands of the
documentation, make, hooks and git do there what they say.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch

from reid_repro.learning import checkpoints

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# what a command may need that this test does not have; the others are run
NEEDS = {
    "photographs", "cluster", "network", "minutes", "hours", "a new paper", "a bundle",
    "a finished run", "a checkpoint", "gpus",
}
# a few seconds each: run on every change
QUICK = re.compile(r"make plan PROFILE=paper|source .venv/bin/activate\npython -m reid_repro convert .*")
MARK = re.compile(r"<!-- needs: ([a-z ]+) -->")
TOOLS = r"make [a-z-]+|papermill|python|snakemake|pip install|nbdev-\w+"
COMMAND = re.compile(rf"`((?:\.venv/bin/)?(?:{TOOLS}) [^`…]+)`")
# what is added to a command so that it takes seconds
SHORTER = {"papermill ": " -p steps 2 -p pictures none"}

pytestmark = pytest.mark.skipif(
    not (shutil.which("git") and shutil.which("make") and (ROOT / ".git").exists()),
    reason="needs git, make and a checkout",
)


def documented(text: str) -> list[tuple[str, str]]:
    """(commands, what they need) of a page: each block of bash, marked by a comment on the line
    before it, and each command with arguments between backticks, marked on its own line.
    """
    found, block, mark = [], None, ""
    for line in text.splitlines():
        if block is not None and line.startswith("```"):
            found.append(("\n".join(block), mark))
            block, mark = None, ""
        elif block is not None:
            block.append(line)
        elif line.startswith("```bash"):
            block = []
        else:
            said = MARK.search(line)
            mark = said[1] if said else ""
            found += [(command, mark) for command in COMMAND.findall(line)]
    return found


ALL = {
    f"{page.name}: {command.splitlines()[0][:60]} ({number})": (command, needs)
    for page in PAGES
    for number, (command, needs) in enumerate(documented(page.read_text(encoding="utf-8")))
}


def test_the_way_commands_are_found():
    page = "<!-- needs: hours -->\n```bash\nmake a\nmake b\n```\n```bash\nmake c\n```\n"
    page += "| `make d X=1` | <!-- needs: cluster --> |\n`make e X=…`, `make f`, `make g -n`\n"
    assert documented(page) == [
        ("make a\nmake b", "hours"), ("make c", ""), ("make d X=1", "cluster"), ("make g -n", ""),
    ]
    assert {needs for _, needs in ALL.values()} <= NEEDS | {""}
    assert sum(not needs for _, needs in ALL.values()) >= 4


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    "What git would commit now, in a repository of its own, beside this environment."
    folder = tmp_path_factory.mktemp("clone") / "mit Blank ü" / "reid_repro"
    told = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
        capture_output=True, check=True,
    )
    for name in filter(None, told.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    (folder / ".venv").mkdir()
    for child in Path(sys.prefix).iterdir():
        if child.name != ".ready":
            (folder / ".venv" / child.name).symlink_to(child)
    (folder / ".venv" / ".ready").touch()
    git(folder, "init", "-q", "-b", "main")
    commit(folder, "all")
    return folder


@pytest.fixture(scope="module")
def environment(clone) -> dict[str, str]:
    "A user's: a home of their own, nothing of this environment on PATH."
    home = clone.parent / "home"
    (home / "data").mkdir(parents=True)
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")  # where Toytown is
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    path = os.pathsep.join(
        part
        for part in os.environ["PATH"].split(os.pathsep)
        if Path(part).resolve() != Path(sys.executable).parent.resolve()
    )
    return kept | {
        "HOME": str(home), "XDG_CACHE_HOME": cache, "PATH": path, "PYTHONPATH": str(clone),
        "OMP_NUM_THREADS": "1",
    }


def git(folder: Path, *words: str, **options) -> str:
    "What git prints; a name for commits, and no settings of the machine."
    named = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *named, *words], cwd=folder, capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", message)


def bash(clone: Path, environment: dict, command: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=clone, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1200,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


@pytest.mark.slow("some thirty commands, some of them runs")
@pytest.mark.parametrize("name", [name for name, (_, needs) in ALL.items() if not needs])
def test_a_documented_command_runs_in_a_fresh_clone(clone, environment, name):
    lines = []
    for line in ALL[name][0].splitlines():
        extra = [more for begin, more in SHORTER.items() if line.startswith(begin)]
        lines.append(line.partition("  #")[0] + "".join(extra))
    bash(clone, environment, "\n".join(lines))


@pytest.mark.parametrize(
    "name", [name for name, (command, _) in ALL.items() if QUICK.fullmatch(command)]
)
def test_a_quick_documented_command_runs_in_a_fresh_clone(clone, environment, name):
    names = ("conv1", "layer1.0.conv1", "layer3.0.conv1", "layer3.1.conv1")
    torch.save({f"module.{name}.weight": torch.zeros(2) for name in names}, clone / "model.pth")
    bash(clone, environment, ALL[name][0])
    (clone / "model.pth").unlink()
    (clone / "resnet50.safetensors").unlink(missing_ok=True)


def test_every_documented_script_of_data_helps(clone, environment):
    text = (ROOT / "docs" / "photographs.md").read_text(encoding="utf-8")
    scripts = sorted(set(re.findall(r"python (data_scripts/\w+\.py) ", text)))
    assert len(scripts) >= 4
    for script in scripts:
        assert "--from" in bash(clone, environment, f".venv/bin/python {script} --help")


def test_every_documented_target_of_make_is_one(clone, environment):
    "Also of commands that are not run here, and of those without arguments."
    pages = [*PAGES, ROOT / "CONTRIBUTING.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    targets = {*re.findall(r"`make ([a-z-]+)", text), *re.findall(r"^make ([a-z-]+)", text, re.M)}
    assert {"reproduce", "env", "plan"} <= targets
    ready = "-o env -o .venv/.ready"
    bash(clone, environment, f"make -n {ready} {' '.join(sorted(targets))} PAPER=ianet NAME=foo")


@pytest.mark.slow("a plan, a run and tests")
def test_make_and_pytest_work_below_a_blank_and_an_umlaut(clone, environment):
    assert "jobs can run" in bash(clone, environment, "make plan ONLY=ide/pixels")
    said = bash(clone, environment, "make reproduce ONLY=ide/pixels PICTURES=none")
    assert "1 of 1 runs are done" in said
    entry = json.loads((clone / "runs/smoke/ide/pixels/toytown-s0/ledger.json").read_text())
    assert not entry["commit"].endswith("-dirty"), git(clone, "status", "--porcelain")
    bash(clone, environment, ".venv/bin/python ci/batch.py check")
    bash(clone, environment, ".venv/bin/python -m pytest -q tests/lab/test_slurm_words.py")


# ---------------------------------------------------------------- hooks


def notebook(file: Path, *sources: str) -> None:
    cells = [nbformat.v4.new_code_cell(source, id=f"cell{i}") for i, source in enumerate(sources)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), file)


def sources(file: Path) -> list[str]:
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells]


def branches(folder: Path, name: str, base: list[str], mine: list[str], yours: list[str]) -> Path:
    "A notebook changed on two branches, `main` checked out, `other` to be merged."
    file = folder / name
    notebook(file, *base)
    commit(folder, "base")
    git(folder, "checkout", "-q", "-B", "other")
    notebook(file, *yours)
    commit(folder, "yours")
    git(folder, "checkout", "-q", "main")
    notebook(file, *mine)
    commit(folder, "mine")
    return file


def test_after_make_hooks_no_merge_loses_a_side(clone, environment):
    "With the tools off PATH, as make leaves them, and with the tools gone."
    bash(clone, environment, "make hooks")
    assert not git(clone, "status", "--porcelain")
    assert "clean_jupyter" in (
        clone.parent / "home/.jupyter/jupyter_server_config.py"
    ).read_text(encoding="utf-8")
    base = [f"a{i} = {i}" for i in range(6)]
    first, last = ["a0 = 10", *base[1:]], [*base[:-1], "a5 = 15"]
    apart = branches(clone, "nbs/apart ü.ipynb", base, first, last)
    git(clone, "merge", "-q", "other", env=environment)
    assert sources(apart) == ["a0 = 10", *base[1:-1], "a5 = 15"]
    adjacent = branches(clone, "nbs/both.ipynb", base, first, ["a0 = 20", *base[1:]])
    merging = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "merge", "-q", "other"]
    done = subprocess.run(merging, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    # as cells: the notebook still opens, and shows both sides
    assert {"a0 = 10", "a0 = 20"} < set(sources(adjacent)) and "<<<<<<<" in adjacent.read_text()
    git(clone, "merge", "--abort")
    scripts = [
        Path(git(clone, "rev-parse", "--git-common-dir").strip()) / "merge-notebooks",
        Path(git(clone, "rev-parse", "--git-path", "hooks/post-merge").strip()),
    ]
    for script in (clone / script for script in scripts):
        text = script.read_text(encoding="utf-8")
        script.write_text(text.replace("nbdev-", "gone-"), encoding="utf-8")
    done = subprocess.run(merging, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "merged as text; run make env and make hooks" in done.stderr
    text = adjacent.read_text()
    assert "a0 = 10" in text and "a0 = 20" in text and "<<<<<<< ours" in text
    git(clone, "merge", "--abort")


def test_what_tools_leave_behind_is_no_change_of_the_code(clone):
    (clone / "nbs" / ".last_checked").touch()
    assert not git(clone, "status", "--porcelain")


# ---------------------------------------------------------------- line endings


@pytest.mark.parametrize("setting", ["core.autocrlf=true", "core.eol=crlf", "core.autocrlf=input"])
def test_a_clone_of_another_system_has_the_same_bytes(clone, tmp_path, setting, monkeypatch):
    git(tmp_path, "clone", "-q", "-c", setting, str(clone), "there")
    names = [name for name in git(clone, "ls-files", "-z").split("\0") if name]
    changed = [
        name for name in names if (tmp_path / "there" / name).read_bytes() != (clone / name).read_bytes()
    ]
    assert not changed
    done = subprocess.run(["bash", "-n", "ci/test.sh"], cwd=tmp_path / "there")
    assert done.returncode == 0
    states = set()  # what a run goes on from
    for place in (clone, tmp_path / "there"):
        spec = SimpleNamespace(origin=str(place / "reid_repro" / "__init__.py"))
        monkeypatch.setattr(checkpoints, "find_spec", lambda name, spec=spec: spec)
        states.add(checkpoints.code_state.__wrapped__())
    assert len(states) == 1
