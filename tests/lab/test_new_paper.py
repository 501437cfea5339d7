"""`make new-paper`: what it writes passes every check as it comes, and a name that cannot be leaves
nothing behind.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ci"))
import new_paper

IGNORED = shutil.ignore_patterns(".git", ".venv", "runs", "checkpoints", "_build", "__pycache__",
                                 ".pytest_cache", ".ruff_cache", ".snakemake")
NAME, PLACE = "two_words", "nbs/5_papers/6_two_words"


def run(root: Path, *command: str) -> str:
    """Runs a command of the environment inside the copy, with the copy's library; returns what it
    printed.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(root), "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def files(root: Path) -> dict[str, bytes]:
    every = (
        path
        for path in root.rglob("*")
        if path.is_file() and not {".git", "__pycache__", "runs"} & set(path.parts)
    )
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in every}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    "A copy of the project after `make new-paper NAME=two_words`, and its files before."
    root = tmp_path_factory.mktemp("copy") / "project"
    shutil.copytree(ROOT, root, ignore=IGNORED)
    before = files(root)
    run(root, sys.executable, "ci/new_paper.py", NAME)
    return root, before


def test_nothing_is_written_but_what_a_paper_needs(project):
    root, before = project
    after = files(root)
    assert set(before) <= set(after)
    assert set(after) - set(before) == {
        f"{PLACE}/1_derive.ipynb", f"{PLACE}/2_reproduce.ipynb", f"reid_repro/{NAME}.py",
        f"reid_repro/reported/{NAME}.csv", f"ci/rows/{NAME}.yaml", f"tests/methods/test_{NAME}.py",
    }
    assert {name for name in before if before[name] != after[name]} == {
        new_paper.LEDGER, "reid_repro/lab/ledger.py", "reid_repro/_modidx.py", "nbs/index.ipynb",
        "docs/rooms.svg",
        *(f"ci/profiles/{p}.yaml" for p in ("smoke", "short", "paper")),
    }
    for file in sorted(set(after) - set(before)):
        assert b"newpaper" not in after[file].lower(), f"{file} still has the template's name"


def test_it_is_in_sync_clean_and_in_order(project):
    root, _ = project
    before = files(root)
    run(root, "nbdev-export")
    run(root, sys.executable, "ci/export.py")
    run(root, "nbdev-clean")
    assert {name for name, content in files(root).items() if before.get(name) != content} == set()
    assert "keep the contract" in run(root, sys.executable, "ci/batch.py", "check")
    run(root, "ruff", "check", ".")
    for number in (1, 2):
        notebook = nbformat.read(
            root / PLACE / ("1_derive.ipynb", "2_reproduce.ipynb")[number - 1], 4
        )
        shown = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
        assert any(
            "image/png" in output.get("data", {}) for output in shown
        ), "executed, with pictures"


@pytest.mark.slow("the project's own checks over a copy of it")
def test_the_project_accepts_it(project):
    "Its own tests, and those of the whole repository."
    root, _ = project
    run(root, "git", "init", "-q")
    tests = [f"tests/methods/test_{NAME}.py", "tests/project/test_repository.py"]
    assert "SKIPPED" not in run(
        root, sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", *tests
    )


@pytest.mark.slow("a batch")
def test_a_row_trains_two_steps_through_the_batch_layer(project):
    "(The derivation ran when it was made, by nbdev-test.)"
    root, _ = project
    plan = run(root, sys.executable, "ci/batch.py", "plan", "--only", NAME)
    assert (
        f"{NAME}/base/toytown-s0" in plan
        and f"{NAME}/{NAME}/toytown-s0" in plan
        and "2 of 2 jobs can run" in plan
    )
    smoke = yaml.safe_load((root / "ci/profiles/smoke.yaml").read_text())
    given = dict(
        smoke["parameters"], **smoke["papers"][NAME], row=NAME, steps=2, pictures="none",
        out="runs/row",
    )
    run(
        root, sys.executable, "ci/batch.py", "run", f"{PLACE}/2_reproduce.ipynb",
        "runs/row/notebook.ipynb", "runs/row/page.html", json.dumps(given),
    )
    entry = json.loads((root / "runs/row/ledger.json").read_text())
    assert (entry["paper"], entry["row"], entry["parameters"]["pool"]) == (NAME, NAME, "power")


@pytest.mark.parametrize(
    "name,why",
    [
        ("", "give the paper a name"), ("Foo", "a letter first"), ("../foo", "a letter first"),
        ("foo/bar", "a letter first"), ("foo bar", "a letter first"), ("2foo", "a letter first"),
        ("_foo", "a letter first"), ("foo_", "a letter first"), ("a__b", "a letter first"),
        ("f" * 21, "at most 20"), ("foo\nbar", "a letter first"), ("foo\n", "a letter first"),
        ("fóo", "a letter first"), ("$(touch x)", "a letter first"), ("class", "Python's own"),
        ("match", "Python's own"), ("baselines", "a group"), ("ide", "taken"), ("casn", "taken"),
        ("datasets", "taken"), ("reported", "taken"),
    ],
)
def test_names_that_cannot_be_are_refused(name, why):
    with pytest.raises(ValueError, match=why):
        new_paper.check(name, ROOT)


def test_a_second_time_is_refused_and_changes_nothing(project, monkeypatch):
    root, _ = project
    before = files(root)
    monkeypatch.setattr(new_paper, "ROOT", root)
    monkeypatch.setattr(sys, "argv", ["new_paper.py", NAME])
    with pytest.raises(SystemExit, match="taken"):
        new_paper.main()
    assert files(root) == before


def test_a_failing_notebook_is_told(monkeypatch, tmp_path):
    done = subprocess.CompletedProcess([], 0)
    failed = subprocess.CompletedProcess([], 1, "", "AssertionError: loop and block differ")
    monkeypatch.setattr(
        new_paper.subprocess, "run",
        lambda command, **_: failed if "--save" in command else done,
    )
    with pytest.raises(RuntimeError, match=r"1_derive\.ipynb failed:\n.*loop and block differ"):
        new_paper.execute("nbs/5_papers/7_broken", tmp_path)


def test_the_next_number(tmp_path):
    def after(*folders: str) -> str:
        shutil.rmtree(tmp_path, ignore_errors=True)
        for name in folders:
            (tmp_path / "nbs/5_papers" / name).mkdir(parents=True)
        return new_paper.folder("foo", tmp_path)

    assert after() == "nbs/5_papers/1_foo"
    assert (
        after("1_a", "2_b") == "nbs/5_papers/3_foo"
        and after("2_b", "notes") == "nbs/5_papers/3_foo"
    )
    assert after("9_i", "10_j") == "nbs/5_papers/11_foo"


def test_papers_gets_a_line_of_its_own(tmp_path):
    (tmp_path / new_paper.LEDGER).parent.mkdir(parents=True)
    shutil.copyfile(ROOT / new_paper.LEDGER, tmp_path / new_paper.LEDGER)
    for name in ("paper_a", "paper_b"):
        new_paper.add_to_ledger(name, name.upper(), tmp_path)
    before, after = (
        [line for cell in nbformat.read(root / new_paper.LEDGER, 4).cells
         for line in cell.source.splitlines()]
        for root in (ROOT, tmp_path)
    )
    added = ['    "paper_a": "PAPER_A",', '    "paper_b": "PAPER_B",']
    assert [line for line in after if line not in added] == before
    assert after[after.index(added[1]) + 1] == "}" and after.index(added[0]) > 0


def test_a_profile_keeps_what_it_says(tmp_path):
    (tmp_path / "ci/profiles").mkdir(parents=True)
    for profile in ("smoke", "short", "paper"):
        path = tmp_path / f"ci/profiles/{profile}.yaml"
        shutil.copyfile(ROOT / f"ci/profiles/{profile}.yaml", path)
        before = yaml.safe_load(path.read_text())
        text = path.read_text()
        new_paper.add_to_profile(profile, "# why\nfoo: {epochs: 3}\n", tmp_path)
        before["papers"]["foo"] = {"epochs": 3}
        assert yaml.safe_load(path.read_text()) == before
        assert [
            line
            for line in path.read_text().splitlines()
            if line.strip() not in ("# why", "foo: {epochs: 3}")
        ] == text.splitlines()
