"""What the notebooks cannot hold: the papers' texts, hostile ledgers, published names, and every
rule of the table.
"""
import html
import json
import math
import os
import re
import unicodedata
from pathlib import Path

import pandas as pd
import pytest

from reid_repro.lab import results
from reid_repro.lab.ledger import (
    FORMER, LATER, computed_parameters, publish, read_entry, read_ledger, write_entry,
)
from reid_repro.lab.provenance import project_root, run_provenance

PAPERS = ("minet", "dcc", "casn", "ianet", "can")
CSV = Path(results.__file__).parents[1] / "reported"
RUN = dict(
    paper="ide", row="ide", title="IDE", dataset="toytown", protocol="single-query",
    split="standard", profile="smoke", conditions=[], seed=0, parameters={"lr": 0.1},
    metrics={"rank1": 50.0, "mAP": 30.0}, counts={"queries": 10}, epochs=2, wall_seconds=1.0,
    peak_memory_mib=10.0, fingerprint="f00", device="cpu",
)
ROWS = [
    {
        "name": "ide", "title": "IDE", "datasets": ["toytown"],
        "reported": {"paper": "casn", "table": 3, "row": "IDE"},
    }
]
REAL = "IDE: paper and reproduction"
TOY = "Toytown (no paper number exists)"
WAITING = "IDE: not run yet"


# ---------------------------------------------------------------- the papers' own numbers
def raw(paper):
    return pd.read_csv(CSV / f"{paper}.csv", dtype=str, keep_default_na=False)


@pytest.mark.parametrize("paper", PAPERS)
def test_reported_reads(paper):
    table = results.reported(paper)
    columns = ["table", "row", "dataset", "protocol", "metric", "value", "own", "note"]
    assert list(table.columns) == columns and table["own"].any() and len(table) > 50


def _squash(text):
    """Letters and digits only, LaTeX and HTML markup dropped, so that '$IDE + IA$' and 'IDE + IA'
    agree.
    """
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"<[^>]*>|\\(mathcal|text|mathbf)", "", text)
    return re.sub(r"[^0-9a-z]", "", text.lower())


# where a table's row is one line of the extracted text: (start, end) as regular expressions around
# each table
LINE_TABLES = {
    "casn": {
        "1": (r"^\tDetected", r"^Table 1:"), "2": (r"Table 2: Duke", r"^DukeMTMC-ReID\. We"),
        "3": (r"Table 3: Ablation", r"^Comparisons of the"),
    },
    "can": {
        "2": (r"^patterns of how", r"^Table 2\."),
        "3": (r"^Method\tmAP\trank-1\trank-3", r"^Table 3\."), "4": (r"^Loss Comb", r"^Table 4\."),
        "5": (r"^Method\tmAP\trank-1\trank-5", r"^Table 5\."),
        "6": (r"^Method\tDuke", r"^Table 6\."),
    },
    "dcc": {
        "I": (r"TABLE I:", r"^ Fig\. 11"), "II": (r"^TABLE II:", r"^SpindleNet \[7\], Part"),
        "III": (r"^TABLE III:", r"^TABLE IV"), "IV": (r"^TABLE IV:", r"^with other unsup"),
    },
    "minet": {"1": (r"^Table 1: CMC", r"^variant figure")},
}
# IANet's tables are extracted column by column: the value must stand among the lines of its table
BLOCK_TABLES = {
    "ianet": {
        "1": (r"^Table 1\. Comp", r"^Specially, "), "2": (r"^Table 2\. Comp", r"^Table 3\. Comp"),
        "3": (r"^Table 3\. Comp", r"^dicates that"),
        **{f"4{x}": (r"^Table 4\. Abl", r"^when K is incr") for x in "abcdef"},
        "5": (r"^Table 5\. Perf", r"^tial spatial"),
    }
}
# Q read as O by the extraction
SPELLING = {("casn", "1", "BoW+XQDA"): "BoW+XODA", ("casn", "2", "LOMO+XQDA"): "LOMO+XODA",
            ("can", "5", "CAN"): "CAN(ours)", ("can", "6", "CAN"): "CAN(ours)"}


def block(text, start, end):
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if re.search(start, line))
    last = next(i for i in range(first + 1, len(lines)) if re.search(end, lines[i]))
    return lines[first:last]


def row_lines(lines, name):
    """The numbers of every line that holds this row name and then nothing but numbers: 'PCB' is not
    'PCB + IA'.
    """
    found = []
    for line in lines:
        clean = re.sub(r"\[[\d, ]+\]|<[^>]*>|\\mathcal|[$%\\{}]", " ", html.unescape(line))
        head = re.match(r"^(.*?)((?:\s+(?:-|\d+\.\d+))*)\s*$", clean)
        values = head[2].split()
        label = re.sub(r"^(se|m|i/u n-|su pe rv is ed|ed) ", "", head[1].strip())
        if values and _squash(label) == _squash(name):
            found.append(values)
    return found


@pytest.mark.parametrize("paper", PAPERS)
def test_reported_agrees_with_the_paper(paper):
    folder = os.environ.get("REID_REPRO_PAPERS")
    if not folder or not (Path(folder) / f"{paper}.txt").is_file():
        pytest.skip(f"REID_REPRO_PAPERS does not name a folder with {paper}.txt")
    text = (Path(folder) / f"{paper}.txt").read_text(encoding="utf-8")
    table, wrong = raw(paper), []
    for (number, row), lines in table.groupby(["table", "row"], sort=False):
        values = list(lines["value"])
        if number in LINE_TABLES.get(paper, {}):
            name = SPELLING.get((paper, number, row), row)
            printed = [
                [v for v in found if v != "-"]
                for found in row_lines(block(text, *LINE_TABLES[paper][number]), name)
            ]
            if values not in printed:  # the same numbers in the same order, none missing
                wrong.append((number, row, values, printed))
        elif number in BLOCK_TABLES.get(paper, {}):
            words = " ".join(block(text, *BLOCK_TABLES[paper][number])).split()
            wrong += [(number, row, v, "absent") for v in values if v not in words]
        else:
            assert number == "text", f"{paper}: table {number} has no place in this test"
            wrong += [
                (number, row, v, "absent")
                for v in values
                if not re.search(rf"(?<![\d.]){re.escape(v)}(?![\d])", text)
            ]
    assert not wrong, f"{paper}: typed otherwise than printed: {wrong}"


def test_ianet_columns_are_complete(tmp_path):
    """Every number printed inside IANet's tables is typed, as often as it is printed (its tables
    lose their rows in extraction).
    """
    folder = os.environ.get("REID_REPRO_PAPERS")
    if not folder or not (Path(folder) / "ianet.txt").is_file():
        pytest.skip("REID_REPRO_PAPERS does not name a folder with ianet.txt")
    text = (Path(folder) / "ianet.txt").read_text(encoding="utf-8")
    typed = raw("ianet")
    for number in ("1", "2", "3", "4", "5"):
        start, end = BLOCK_TABLES["ianet"][number if number != "4" else "4a"]
        printed = sorted(
            line.strip()
            for line in block(text, start, end)
            for line in line.split()
            if re.fullmatch(r"\d\d\.\d", line)
        )
        assert printed == sorted(
            typed.loc[typed["table"].str.startswith(number), "value"]
        ), f"table {number}"


@pytest.mark.parametrize(
    "change, message",
    [
        (("dataset", "market"), "dataset 'market' is unknown"),
        (("metric", "top-1"), "metric 'top-1'"), (("value", "143.8"), "value is 143.8"),
        (("protocol", "np"), "protocol 'np'"), (("own", "2"), "own 2"),
    ],
)
def test_reported_names_the_line(tmp_path, monkeypatch, change, message):
    (tmp_path / "reported").mkdir()
    table = raw("casn").head(3)
    table.loc[1, change[0]] = change[1]
    table.to_csv(tmp_path / "reported" / "casn.csv", index=False)
    monkeypatch.setattr(results, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match=f"casn.csv line 3: {message}"):
        results.reported("casn")


def test_reported_refuses_doubles_and_strangers(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="paper 'nobody' is unknown; take one of can, casn"):
        results.reported("nobody")
    (tmp_path / "reported").mkdir()
    table = raw("casn").head(3)
    pd.concat([table, table.head(1)]).to_csv(tmp_path / "reported" / "casn.csv", index=False)
    monkeypatch.setattr(results, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match="line 5 repeats"):
        results.reported("casn")


# ---------------------------------------------------------------- the ledger
def write(folder, **changes):
    return write_entry(folder, **{**RUN, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"metrics": {"rank1": math.inf}}, "rank1"), ({"metrics": {"rank1": -1}}, "rank1"),
        ({"metrics": {"rank1": 100.5}}, "rank1"), ({"metrics": {"mAP": 3.0}}, "need rank1"),
        ({"metrics": {"rank1": 50.0, "rank5": 49.0}}, "never lower"),
        ({"metrics": {"rank1": True}}, "rank1"), ({"metrics": {"rank1": 5.0, "top1": 5.0}}, "metrics 'top1' is unknown; take one of 'rank1'"),
        ({"dataset": "market"}, "dataset 'market'"), ({"paper": "x"}, "paper 'x'"),
        ({"profile": "fast"}, "profile 'fast'"), ({"protocol": "np"}, "protocol 'np'"),
        ({"seed": "0"}, "seed"), ({"seed": True}, "seed"), ({"epochs": -1}, "epochs"),
        ({"wall_seconds": math.nan}, "wall_seconds"), ({"row": ""}, "row"),
        ({"parameters": {"lr": math.nan}}, r"parameters\['lr'\] holds NaN"),
        ({"counts": {"queries": math.inf}}, r"counts\['queries'\]"),
        ({"history": [{"loss": math.inf}]}, r"history\['loss'\]"),
        ({"history": "abc"}, "history is 'abc'"), ({"parameters": None}, "parameters is None"),
        ({"parameters": {"x": object()}}, "plain value"),
        ({"parameters": {"seed": 3}}, "seed is 0"),
        ({"parameters": {"row": "other"}}, "row is 'ide'"),
        ({"parameters": {"dataset": "viper"}}, "dataset is 'toytown' but parameters"),
        ({"parameters": {"profile": "paper"}}, "profile is 'smoke' but parameters"),
        ({"parameters": {"epochs": 3}}, "epochs is 2 but parameters"),
        ({"parameters": {"epochs": 0, "pretrain": 3}}, "epochs is 2 but parameters say 3"),
        ({"seed": -1}, "seed is -1"), ({"seed": 2**32}, "seed is 4294967296"),
        ({"counts": {"junk": -1}}, r"counts\['junk'\] is -1"),
        ({"counts": {"junk": 1.5}}, r"counts\['junk'\]"),
        ({"counts": {"junk": None}}, r"counts\['junk'\]"),
        ({"dataset": "market1501", "profile": "short"}, "name every departure"),
        ({"conditions": "fewer epochs"}, "conditions"), ({"conditions": [""]}, "conditions"),
        ({"fingerprint": ""}, "fingerprint"),
    ],
)
def test_write_refuses(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_epochs_that_are_fewer_than_asked_or_those_of_a_first_training_are_kept(tmp_path):
    write(tmp_path / "a", parameters={"epochs": 9, "steps": 30})
    write(tmp_path / "b", parameters={"epochs": 0, "pretrain": 2})
    assert len(read_ledger(tmp_path)) == 2


def test_an_entry_moved_to_another_data_set_is_refused(tmp_path):
    path = Path(__file__).resolve().parents[2] / "results" / "ide-ide-toytown-smoke-s0.json"
    moved = json.loads(path.read_text()) | {"dataset": "market1501", "profile": "paper"}
    (tmp_path / "ledger.json").write_text(json.dumps(moved))
    with pytest.raises(
        ValueError, match=r"ledger\.json: dataset is 'market1501' but parameters say 'toytown'"
    ):
        read_ledger(tmp_path)


def test_write_refuses_names_it_does_not_know(tmp_path):
    with pytest.raises(ValueError, match="'colour' is unknown; known are schema, paper"):
        write(tmp_path, colour="red")
    with pytest.raises(ValueError, match="'metrics' is missing"):
        write_entry(tmp_path, **{k: v for k, v in RUN.items() if k != "metrics"})


def test_a_failed_write_leaves_the_old_entry_whole(tmp_path, monkeypatch):
    path = write(tmp_path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr("reid_repro.utils.files.os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path, metrics={"rank1": 99.0})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["ledger.json"]


def test_a_write_that_cannot_land_leaves_nothing(tmp_path):
    (tmp_path / "ledger.json").mkdir()
    with pytest.raises(OSError):
        write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["ledger.json"]
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(ValueError, match=r"folder .*file.* cannot be made"):
            write(folder)


def test_local_folders_are_not_kept(tmp_path):
    places = {
        "data_root": "/home/someone/photos/cuhk03", "out": tmp_path / "deep",
        "weights": "/home/someone/w.safetensors",
    }
    text = write(tmp_path, parameters=places).read_text()
    assert "someone" not in text and str(tmp_path) not in text
    assert json.loads(text)["parameters"] == {
        "data_root": "cuhk03", "out": "deep", "weights": "w.safetensors",
    }


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t[: len(t) // 2], lambda t: "", lambda t: "[]",
        lambda t: t.replace('"rank1": 50.0', '"rank1": NaN'),
        lambda t: t.replace('"schema": 1', '"schema": 2'),
        lambda t: t.replace('"epochs"', '"epoch"'), lambda t: "[" * 100_000,
        lambda t: re.sub('"finished": "[^"]*"', '"finished": "yesterday"', t),
    ],
)
def test_a_damaged_entry_is_named(tmp_path, damage):
    path = write(tmp_path / "a")
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=r"a.ledger\.json"):
        read_ledger(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        read_ledger(tmp_path / "b")


def test_a_folder_in_place_of_an_entry_is_named(tmp_path):
    (tmp_path / "results" / "x.json").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"x\.json: damaged ledger entry"):
        read_ledger(tmp_path / "results")


def test_the_same_run_counts_once_and_the_newest_wins(tmp_path, monkeypatch):
    class Clock:
        now_ = iter(pd.date_range("2030-01-01", periods=9, tz="UTC"))
        fromisoformat = pd.Timestamp.fromisoformat

        @classmethod
        def now(cls, zone):
            return next(cls.now_)

    monkeypatch.setattr("reid_repro.lab.ledger.datetime", Clock)
    write(tmp_path / "results", metrics={"rank1": 10.0}).rename(tmp_path / "results" / "z.json")
    write(
        tmp_path / "runs" / "b", metrics={"rank1": 20.0},
        parameters={"lr": 0.1, "out": "elsewhere", "resume": True},
    )
    write(tmp_path / "runs" / "c", metrics={"rank1": 30.0}, parameters={"lr": 0.2})
    write(tmp_path / "runs" / "d", metrics={"rank1": 40.0}, seed=1)
    for folders in (("results", "runs"), ("runs", "results")):
        assert read_ledger(*(tmp_path / f for f in folders))["rank1"].tolist() == [20.0, 30.0, 40.0]


def project(folder):
    (folder / "settings.ini").write_text("[DEFAULT]\nname = reid_repro\n")
    return folder


def test_publish(tmp_path, monkeypatch):
    monkeypatch.chdir(project(tmp_path))
    target = publish(write(tmp_path / "runs" / "a", row="ide+ bn/neck"))
    assert target == tmp_path / "results" / "ide-ide+_bn_neck-toytown-smoke-s0.json"
    # the same run, newer
    assert (
        publish(write(tmp_path / "runs" / "a", row="ide+ bn/neck", metrics={"rank1": 60.0}))
        == target
    )
    other = publish(write(tmp_path / "runs" / "b", row="ide+ bn/neck", parameters={"lr": 0.3}))
    assert other != target and other.parent == target.parent and len(read_ledger()) == 2
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json"):
        publish(tmp_path / "bad.json")


def test_project_root(tmp_path, monkeypatch):
    (project(tmp_path) / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "settings.ini").write_text("[DEFAULT]\nname = other\n")
    assert project_root(tmp_path / "a" / "b") == tmp_path
    # no section, one twice, not text
    for foreign in (b"name = reid_repro\n", b"[a]\nx = 1\n[a]\n", b"\xff\xfe\x00"):
        (tmp_path / "a" / "settings.ini").write_bytes(foreign)
        assert project_root(tmp_path / "a" / "b") == tmp_path
    (tmp_path / "settings.ini").unlink()
    with pytest.raises(ValueError, match="start from inside the project"):
        project_root(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path)
    assert run_provenance("cpu")["commit"] is None


def test_commit_says_dirty(tmp_path, monkeypatch):
    import subprocess

    def git(*arguments):
        identity = [
            "-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.hooksPath=/dev/null", "-c",
            "commit.gpgsign=false",
        ]
        subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True
        )

    monkeypatch.chdir(project(tmp_path))
    git("init"); git("add", "."); git("commit", "-m", "a")
    assert re.fullmatch("[0-9a-f]{40}", run_provenance("cpu")["commit"])
    (tmp_path / "results").mkdir()
    # results of earlier runs do not change the code
    (tmp_path / "results" / "new.json").write_text("{}")
    assert re.fullmatch("[0-9a-f]{40}", run_provenance("cpu")["commit"])
    (tmp_path / "code.py").write_text("")
    assert run_provenance("cpu")["commit"].endswith("-dirty")


def test_committed_results_are_sound():
    root = Path(__file__).resolve().parents[2]
    for path in (root / "results").glob("*.json"):
        read_entry(path)


def test_an_entry_of_before_is_read_and_compared_with_later_ones(tmp_path):
    """Fields and parameters that came later: an entry without them is the same run as one that has
    them at their value of before.
    """
    path = write(tmp_path, parameters={"lr": 0.1}, pulse={"share": 0.25}, cpu_seconds=3.5)
    entry = json.loads(path.read_text())
    assert entry["pulse"] == {"share": 0.25} and entry["cpu_seconds"] == 3.5
    old = {name: value for name, value in entry.items() if name not in ("pulse", "cpu_seconds")}
    path.write_text(json.dumps(old))
    assert read_entry(path)["pulse"] == {} and read_entry(path)["cpu_seconds"] is None
    assert computed_parameters({"lr": 0.1, **LATER, **FORMER}) == {"lr": 0.1}
    others = {"order": "sia-cia", "centre": "divide"}  # IANet's and DCC's
    assert computed_parameters(others) == others
    assert computed_parameters({"lr": 0.1, "start_from": "a run"}) == {
        "lr": 0.1, "start_from": "a run",
    }


def test_settings_that_were_tried_stand_in_no_table_of_results(tmp_path):
    write(
        tmp_path / "a", row="tried", profile="pilot", dataset="market1501", conditions=["a pilot"]
    )
    rows = [
        {"name": "tried", "title": "a pilot", "datasets": ["market1501"], "profiles": ("pilot",)}
    ]
    assert not results.comparison_table(RUN["paper"], rows, read_ledger(tmp_path)).sections
    assert not results.comparison_table(RUN["paper"], [], read_ledger(tmp_path)).sections


@pytest.mark.parametrize("value", [math.nan, math.inf, "much", True])
def test_a_pulse_is_finite_numbers(tmp_path, value):
    with pytest.raises(ValueError, match="share"):
        write(tmp_path, pulse={"share": value})


# ---------------------------------------------------------------- the table
def lines(tmp_path, section, rows=ROWS):
    return results.comparison_table("ide", rows, read_ledger(tmp_path)).sections[section]


def test_what_was_not_run_says_so(tmp_path):
    waiting = lines(tmp_path, WAITING)
    printed = [f"{d} · single-query" for d in ("cuhk03-np-detected", "dukemtmc", "market1501")]
    assert waiting["dataset · protocol"].tolist() == [*printed, "toytown"]
    assert set(waiting["ours (mean ± sd)"]) == {"not run"}
    assert waiting["paper (rank-1 / mAP)"].tolist()[::3] == [
        "43.8 / 38.9 (CASN, table 3)", "no number reported",
    ]
    write(tmp_path, dataset="market1501", profile="paper")
    assert lines(tmp_path, REAL)["dataset · protocol"].tolist() == ["market1501 · single-query"]
    assert lines(tmp_path, WAITING)["dataset · protocol"].tolist() == [*printed[:2], "toytown"]


def test_a_row_printed_in_several_tables(tmp_path):
    keys = [
        {"paper": "ianet", "table": table, "row": row}
        for table, row in (("4f", "stage23"), ("1", "IANet"), ("3", "IANet"))
    ]
    waiting = results.comparison_table(
        "ianet", [{"name": "ianet", "reported": keys}], read_ledger(tmp_path)
    )
    waiting = waiting.sections["IANet: not run yet"].set_index("dataset · protocol")[
        "paper (rank-1 / mAP)"
    ]
    assert waiting["market1501 · single-query"] == "94.4 / 83.1 (tables 4f, 1)"
    assert waiting["msmt17 · single-query"] == "75.5 / 46.8 (table 3)"
    with pytest.raises(ValueError, match="'stage2' in table '4e' differs"):
        results.comparison_table(
            "ianet",
            [{"name": "x", "reported": [keys[0], {**keys[0], "table": "4e", "row": "stage2"}]}],
            read_ledger(tmp_path),
        )


def test_toytown_never_stands_beside_a_paper(tmp_path):
    write(tmp_path, metrics={"rank1": 77.7})
    table = results.comparison_table("ide", ROWS, read_ledger(tmp_path))
    assert REAL not in table.sections
    assert (
        not table.sections[WAITING]
        .apply(lambda c: c.astype(str).str.contains("77.7|toytown"))
        .any(axis=None)
    )
    assert not {"paper (rank-1 / mAP)", "difference"} & set(table.sections[TOY].columns)
    assert table.sections[TOY]["ours (mean ± sd)"].tolist() == ["77.7 / – (1 seed)"]
    assert not table.sections[TOY].apply(lambda c: c.str.contains("43.8|85.3")).any(axis=None)


def test_conditions_are_named_and_the_difference_is_blank(tmp_path):
    short = {
        "dataset": "cuhk03-np-detected", "profile": "short",
        "conditions": ["64×128 source", "7 epochs"], "epochs": 7,
    }
    write(tmp_path / "a", **short)
    first = lines(tmp_path, REAL).iloc[0]
    assert (
        first["difference"] == ""
        and first["ours (mean ± sd)"] == "50.0 / 30.0 (1 seed)"
        and "43.8" in first["paper (rank-1 / mAP)"]
    )
    assert first["evidence"].startswith(
        "under other conditions: 64×128 source; 7 epochs · short · seed 0 · 7 epochs"
    )


def test_difference_and_spread(tmp_path):
    for seed, rank1 in ((0, 61.0), (1, 63.5), (2, 60.0)):
        write(
            tmp_path / str(seed), dataset="cuhk03-np-detected", profile="paper", seed=seed,
            metrics={"rank1": rank1, "mAP": 40.0},
        )
    first = lines(tmp_path, REAL).iloc[0]
    assert (
        first["ours (mean ± sd)"] == "61.5 ± 1.8 / 40.0 ± 0.0 (3 seeds)"
        and first["difference"] == "+17.7 / +1.1"
    )
    assert "paper · seeds 0, 1, 2 · 2 epochs" in first["evidence"]


@pytest.mark.parametrize(
    "changes",
    [
        {"profile": "short"}, {"conditions": ["a", "b"]}, {"parameters": {"lr": 0.2}},
        {"epochs": 3}, {"fingerprint": "other"}, {"split": "train-only"},
    ],
)
def test_unlike_runs_are_never_averaged(tmp_path, changes):
    base = {"dataset": "cuhk03-np-detected", "profile": "paper", "conditions": ["a"]}
    write(tmp_path / "0", **base)
    write(tmp_path / "1", **{**base, "seed": 1, "metrics": {"rank1": 70.0}, **changes})
    ours = lines(tmp_path, REAL)["ours (mean ± sd)"].tolist()
    assert sorted(ours[:2]) == ["50.0 / 30.0 (1 seed)", "70.0 / – (1 seed)"]
    if "parameters" in changes:
        assert {e.split(" · ")[4] for e in lines(tmp_path, REAL)["evidence"][:2]} == {
            "lr=0.1", "lr=0.2",
        }


def test_nothing_measured_is_hidden(tmp_path):
    write(tmp_path / "a", row="stranger", title="Stranger")
    write(tmp_path / "b", dataset="msmt17", profile="paper", row="ide")
    write(tmp_path / "c", dataset="market1501", profile="paper", protocol="multi-query", row="ide")
    table = results.comparison_table("ide", ROWS, read_ledger(tmp_path))
    assert "Stranger (not in the list of rows)" in table.sections[TOY]["row"].tolist()
    extra = table.sections[REAL].set_index("dataset · protocol")
    assert extra.loc["msmt17 · single-query", "paper (rank-1 / mAP)"] == "no number reported"
    assert "market1501 · single-query" in table.sections[WAITING]["dataset · protocol"].tolist()
    # another protocol is never subtracted
    assert extra.loc["market1501 · multi-query", "difference"] == ""


def test_wrong_rows_are_named(tmp_path):
    empty = read_ledger(tmp_path)
    with pytest.raises(ValueError, match="row 'IDEE' in table '3'"):
        results.comparison_table(
            "ide", [{**ROWS[0], "reported": {"paper": "casn", "table": "3", "row": "IDEE"}}], empty
        )
    with pytest.raises(ValueError, match="row 'ide': dataset 'market'"):
        results.comparison_table("ide", [{**ROWS[0], "datasets": ["market"]}], empty)
    with pytest.raises(ValueError, match="paper 'nobody'"):
        results.comparison_table("nobody", ROWS, empty)


@pytest.mark.parametrize("paper", PAPERS)
def test_every_own_row_is_listed_by_default(tmp_path, paper):
    table = results.comparison_table(paper, ledger=read_ledger(tmp_path))
    own = results.reported(paper).query("own")
    assert len(next(iter(table.sections.values()))) == len(
        own.drop_duplicates(["table", "row", "dataset", "protocol"])
    )


def test_table_shows_itself_everywhere(tmp_path):
    write(tmp_path, row="<b>|x|_y_</b>", title="<b>|x|_y_</b>")
    table = results.comparison_table("ide", ROWS, read_ledger(tmp_path))
    page = table._repr_html_()
    assert (
        "<b>|x" not in page
        and "&lt;b&gt;|x|_y_" in page
        and "style" not in page
        and page.count("<table>") == 2
    )
    markdown = [line for line in table._repr_markdown_().splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == n + 1 for line, n in zip(markdown, [4] * 20))
    assert "not run" in str(table) and repr(table) == str(table)
