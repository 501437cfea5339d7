"""The results in README.md are what the committed ledger gives, and nothing else."""

import importlib.util
import re
import sys
import shutil

import nbformat
import pandas as pd
import pytest

from reid_repro.lab.ledger import read_ledger
from reid_repro.lab.provenance import project_root

ROOT = project_root()
sys.path.insert(0, str(ROOT / "ci"))
spec = importlib.util.spec_from_file_location("readme", ROOT / "ci" / "readme.py")
readme = importlib.util.module_from_spec(spec)
spec.loader.exec_module(readme)
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def ledger() -> pd.DataFrame:
    return read_ledger(ROOT / "results")


def test_the_readme_says_what_the_ledger_gives(ledger):
    assert readme.rendered(TEXT, ledger) == TEXT, "run `make readme` and commit README.md"


def test_a_changed_number_or_a_new_run_is_noticed(ledger):
    tampered = re.sub(r"\b27\.\d\b", "99.9", TEXT, count=1)
    assert tampered != TEXT and readme.rendered(tampered, ledger) == TEXT
    study = ledger[(ledger["profile"] == "study") & (ledger["row"] == "ianet")]
    assert readme.rendered(TEXT, ledger.drop(study.index[-1])) != TEXT


def test_the_speeds_are_what_the_records_give():
    text = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert readme.with_speed(text) == text, "run `make readme` and commit docs/speed.md"
    tampered = re.sub(r"\d+ images a CPU-second", "7 images a CPU-second", text, count=1)
    assert tampered != text and readme.with_speed(tampered) == text


def test_a_limit_is_judged_by_the_number_beside_it():
    from speed import Figure

    hardware = {"gpu": None, "cpu": "X", "cores": 2, "threads": 1, "torch": "2"}
    rows = [{"what": "ours", "images/CPU-s": 30.0, "CPU-s": 3.0}]
    rows += [{"what": "other", "images/CPU-s": 20.0, "CPU-s": 2.0}]
    record = {"hardware": hardware, "rows": rows}

    def limit(column="CPU-s", what="ours", **limit) -> str:
        rivals = {"it": {"what": "other"}}
        return Figure("", "b", {"what": what}, column, rivals, **limit).line(record)["limit"]

    assert limit() == "none set" and limit(most=3).endswith(": kept")
    assert limit(most=2.9).endswith(": NOT kept")
    assert limit("images/CPU-s", of="it", faster=1.4).endswith(": kept, 1.50 ×")
    assert limit("images/CPU-s", of="it", slower=0.6).endswith(": NOT kept, 0.67 ×")
    assert limit(of="it", slower=1.5).endswith(": kept, 1.50 ×")
    assert limit(of="it", faster=1).endswith(": NOT kept, 0.67 ×")
    with pytest.raises(ValueError, match=r"b\.json: 0 rows hold"):
        limit(what="nothing")


def test_local_runs_do_not_reach_it(monkeypatch):
    asked = []
    monkeypatch.setattr(
        readme, "read_ledger", lambda *folders: asked.append(folders) or read_ledger(*folders)
    )
    monkeypatch.setattr("sys.argv", ["readme.py", "--check"])
    readme.main()
    assert asked == [(ROOT / "results",)]


def test_scores_stand_in_the_generated_block_alone():
    outside = TEXT.split(readme.BEGIN)[0] + TEXT.split(readme.END)[1]
    assert not re.search(r"\d\s*%|mAP[^\n]{0,20}\d\d|rank-1[^\n]{0,20}\d\d", outside)


def test_an_empty_ledger_says_not_run(ledger):
    text = readme.block(ledger[:0])
    assert text.count("not run") > 20 and not re.search(r"\d\d\.\d", text)


def test_the_start_page_leads_to_every_notebook():
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    cell = next(cell for cell in notebook.cells if cell.source.startswith(readme.HEADING))
    assert cell.source == readme.reading_order(), "run `make readme` and commit nbs/index.ipynb"
    linked = set(re.findall(r"\(([^)]+\.ipynb)\)", cell.source))
    assert linked == {
        p.relative_to(ROOT / "nbs").as_posix()
        for p in (ROOT / "nbs").glob("**/*.ipynb")
        if ".ipynb_checkpoints" not in p.parts
    } - {"index.ipynb"}


def test_the_picture_is_the_one_of_the_start_page():
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    assert (
        readme.picture(notebook) == (ROOT / "docs" / "pair.png").read_bytes()
    ), "run `make readme` and commit docs/pair.png"
    with pytest.raises(ValueError, match="no picture"):
        readme.picture(nbformat.v4.new_notebook())


DAMAGE = {
    "README.md": (None, "README.md"), "ci/claims.yaml": (None, "ci/claims.yaml cannot be read"),
    "nbs/index.ipynb": ("{", "index.ipynb' is no notebook"),
    "nbs/4_baselines/ide/1_derive.ipynb": ("[]", "1_derive.ipynb' is no notebook"),
}
EMPTY = nbformat.writes(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("no title")]))


@pytest.mark.parametrize(
    "name, content, told",
    [
        *((name, *what) for name, what in DAMAGE.items()),
        ("nbs/index.ipynb", EMPTY, "no cell begins with '## Reading order'"),
        (
            "nbs/4_baselines/ide/1_derive.ipynb", EMPTY,
            "nbs/4_baselines/ide/1_derive.ipynb: the first cell must begin with",
        ),
    ],
)
def test_a_damaged_file_is_named_and_nothing_is_written(monkeypatch, tmp_path, name, content, told):
    for part in ("ci", "nbs", "docs", "results"):
        shutil.copytree(
            ROOT / part, tmp_path / part,
            ignore=shutil.ignore_patterns("_build", "[1-4]0_*", "00_*", "80_*", "90_*"),
        )
    for part in ("README.md", "settings.ini"):
        shutil.copy(ROOT / part, tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme.reading_order, "__defaults__", (tmp_path,))
    monkeypatch.setattr("sys.argv", ["readme.py"])
    with pytest.raises(SystemExit) as stopped:
        readme.main()
    assert told in str(stopped.value) and "\n" not in str(stopped.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_links_lead_somewhere():
    "The site's own index leads to pages that exist once it is built; `make docs` checks those."
    for page in (
        ROOT / "README.md", *(p for p in (ROOT / "docs").glob("*.md") if p.stem != "index"),
    ):
        for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize(
    "text", ["", "{BEGIN}", "{END}\n{BEGIN}", "{BEGIN}\n{END}\n{BEGIN}\n{END}"]
)
def test_lost_marks_are_told(ledger, text):
    with pytest.raises(ValueError, match="once each"):
        readme.rendered(text.format(BEGIN=readme.BEGIN, END=readme.END), ledger)
