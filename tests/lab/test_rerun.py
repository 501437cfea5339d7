"""A ledger entry run again from itself: which parameters it gets, what is said to differ, and what
the scores' agreement is called.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ci"))

import rerun

KNOWN = {
    "row": ("str", "ide"), "seed": ("int", 0), "lr": ("float", 0.003), "milestones": ("list", []),
    "rerank": ("bool", False), "out": ("str", "runs/notebook"),
}
VERSIONS = {"python": "3.11.7", "torch": "2.15.0"}


def entry(**values) -> dict:
    then = {"row": "ide", "seed": 3, "lr": 0.01, "milestones": [20], "out": "toytown-s3"}
    return {
        "row": "ide", "paper": "ide", "dataset": "toytown", "commit": "c" * 40, "fingerprint": "f",
        "device": "one, 1 threads", "versions": VERSIONS, "parameters": then, **values,
    }


def test_parameters_are_the_entry_s_and_new_ones_take_their_defaults_and_that_is_said():
    values, words = rerun.parameters_now(entry(), KNOWN, {"lr": 0.01})
    assert values == {
        "row": "ide", "seed": 3, "lr": 0.01, "milestones": [20], "out": "toytown-s3",
        "rerank": False,
    }
    assert words == ["parameter new since, at its default: rerank = False"]


def test_a_parameter_that_is_gone_is_an_error_unless_it_was_off_or_said_only_where():
    then = entry()
    then["parameters"] |= {"mixup": 0.0, "resume": True, "extra": "none"}
    _, words = rerun.parameters_now(then, KNOWN, {})
    assert [word for word in words if "gone" in word] == [
        "parameter gone since, off then: mixup = 0.0",
        "parameter gone since, off then: extra = 'none'",
    ]
    then["parameters"] |= {"threshold": 0.3}  # CASN's, a constant of the module since
    words = rerun.parameters_now(then, KNOWN, {})[1]
    assert "parameter gone since, as it is always now then: threshold = 0.3" in words
    then["parameters"]["mixup"] = 0.2
    with pytest.raises(
        ValueError, match=r"no longer takes mixup = 0\.2; check out the entry's commit, c{40}"
    ):
        rerun.parameters_now(then, KNOWN, {})


def test_a_row_that_means_something_else_now_is_an_error():
    with pytest.raises(
        ValueError, match=r"sets lr = 0\.3 \(then 0\.01\), rerank = True \(then False\) now"
    ):
        rerun.parameters_now(entry(), KNOWN, {"lr": 0.3, "rerank": True})


@pytest.mark.parametrize(
    ("values", "data", "weights", "words"),
    [
        ({"dataset": "market1501"}, "", "", "ran on market1501; give DATA="),
        ({"parameters": {"source": "msmt17"}}, "", "", "give DATA="),
        ({"parameters": {"data_root": "town"}}, "", "", "out of a folder; give DATA="),
        (
            {"parameters": {"weights": "a.safetensors"}}, "", "",
            "started from a.safetensors; give WEIGHTS=",
        ),
        ({"parameters": {"weights": "a.safetensors"}}, "", "no/such", "WEIGHTS=no/such is no file"),
        ({"dataset": "market1501"}, "x", "", None),
        ({"parameters": {"weights": "imagenet", "source": ""}}, "", "", None),
    ],
)
def test_what_an_entry_needs_is_asked_for(values, data, weights, words):
    if words is None:
        return rerun.check_needs(entry(**values), data, weights)
    with pytest.raises(ValueError, match=words):
        rerun.check_needs(entry(**values), data, weights)


def test_only_what_differs_is_named():
    now = {"commit": "c" * 40, "fingerprint": "f", "device": "one, 1 threads", "versions": VERSIONS}
    assert rerun.differences(entry(), now, "nbs/4_baselines/ide/2_reproduce.ipynb") == {}
    other = now | {"fingerprint": "g", "versions": VERSIONS | {"torch": "3.0"}, "device": "two"}
    assert rerun.differences(entry(), other, "nbs/4_baselines/ide/2_reproduce.ipynb") == {
        "data": "fingerprint f → g", "versions": "torch 2.15.0 → 3.0",
        "device": "one, 1 threads → two",
    }
    dirty = rerun.differences(
        entry(commit="c" * 40 + "-dirty"), now | {"commit": "c" * 40 + "-dirty"}, "x"
    )
    assert "cannot be told" in dirty["code"]  # the same word twice is not the same code


def test_what_changed_between_two_commits_is_what_git_says(tmp_path):
    if not shutil.which("git"):
        pytest.skip("needs git")
    git = lambda *words: subprocess.run(
        ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=b", *words], check=True,
        capture_output=True, text=True,
    ).stdout.strip()
    git("init", "-q")
    for name in ("reid_repro/a.py", "reid_repro/b.py", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    git("add", "."), git("commit", "-qm", "one")
    first = git("rev-parse", "HEAD")
    for name in ("reid_repro/b.py", "README.md"):
        (tmp_path / name).write_text("2")
    git("commit", "-qam", "two")
    second, before, rerun.ROOT = git("rev-parse", "HEAD"), rerun.ROOT, tmp_path
    try:
        assert (
            rerun.code_changed(first, second, "nbs/x.ipynb", "ide")
            == f"commit {first} → {second}; changed: reid_repro/b.py"
        )
        unsaved = rerun.code_changed(f"{first}-dirty", second, "x", "ide")
        assert "changed: reid_repro/b.py; the run had changes that no commit holds" in unsaved
        assert rerun.code_changed(first, first, "x", "ide") == ""
    finally:
        rerun.ROOT = before


def test_agreement_is_exact_or_the_difference_is_told():
    same = rerun.compare(
        {"rank1": 11.5, "mAP": 7.915}, {"rank1": 11.5, "mAP": 7.915, "rank20": 60.0}
    )
    assert (
        same == [("rank1", 11.5, 11.5, 0.0), ("mAP", 7.915, 7.915, 0.0)]
        and rerun.verdict(same, {}) == "agrees exactly"
    )
    apart = rerun.compare({"rank1": 11.5, "mAP": 7.9}, {"rank1": 11.0, "mAP": 7.91})
    assert (
        rerun.verdict(apart, {"device": "a → b"})
        == "differs by up to 0.5 points (rank1); device is not what it was"
    )
    assert rerun.verdict(apart, {"code": "", "data": ""}).endswith(
        "code, data are not what they were"
    )
    assert "not deterministic" in rerun.verdict(apart, {})


@pytest.mark.slow("a whole run")
def test_an_entry_runs_again_and_the_ledger_stays_as_it_is():
    path = ROOT / "results" / "ide-chance-toytown-smoke-s0.json"
    out = ROOT / "runs" / "rerun" / path.stem
    before = {file: file.read_bytes() for file in (ROOT / "results").glob("*.json")}
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        [sys.executable, "ci/rerun.py", path], cwd=ROOT, env=environment, capture_output=True,
        text=True, timeout=600,
    )
    try:
        told = json.loads((out / "rerun.json").read_text())
        assert done.returncode == 0, done.stderr
        # a table must not take it for the entry
        assert (out / "notebook.ipynb").is_file() and not (out / "ledger.json").exists()
        assert {score["metric"]: score["then"] for score in told["scores"]} == {
            name: value for name, value in json.loads(path.read_text())["metrics"].items()}
        assert told["verdict"] == "agrees exactly" or told["differences"]
        assert told["verdict"] in done.stdout and all(
            how in done.stdout for how in told["differences"].values()
        )
        assert {file: file.read_bytes() for file in (ROOT / "results").glob("*.json")} == before
    finally:
        shutil.rmtree(out, ignore_errors=True)


def test_no_entry_is_one_clear_word(tmp_path, monkeypatch, capsys):
    def told(path: Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["rerun.py", str(path)])
        monkeypatch.chdir(ROOT)
        return rerun.main(), capsys.readouterr().err

    status, words = told(tmp_path / "none.json")
    assert status == 2 and "is no file" in words
    for text, fault in (('{"device": "x"}', "'schema' is missing"), ("{", "damaged")):
        (tmp_path / "bad.json").write_text(text)
        status, words = told(tmp_path / "bad.json")
        assert status == 1 and fault in words and len(words.strip().splitlines()) == 1
