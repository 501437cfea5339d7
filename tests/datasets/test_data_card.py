"""What the data card says: the papers' statements about the benchmarks, typed once, against the
papers' texts and the card's counts.
"""
import ast
import os
import re
import unicodedata
from pathlib import Path

import nbformat
import pandas as pd
import pytest

import reid_repro

ROOT = Path(__file__).resolve().parents[2]
CARD = ROOT / "nbs/A_benchmarks/01_data_card.ipynb"
COLUMNS = ["paper", "section", "dataset", "quantity", "stated", "released", "note"]
PAPERS = ("minet", "dcc", "casn", "ianet", "can")

# (paper, section, data set) → first words of the passage and of what follows it, in the text as
# `flat` leaves it
PASSAGES = {
    ("minet", "4.1", "viper"): ("the viper dataset contains", "the cuhk03 dataset"),
    ("minet", "4.1", "cuhk03"): ("the cuhk03 dataset includes", "the market-1501 data set"),
    ("minet", "4.1", "market1501"): ("the market-1501 data set contains", "4.2 implementations"),
    ("dcc", "IV-A", "dukemtmc"): (
        "the dukemtmc-reid dataset is a subset", "the cuhk03 dataset includes",
    ),
    ("dcc", "IV-A", "cuhk03"): ("the cuhk03 dataset includes", "the market-1501 data set"),
    ("dcc", "IV-A", "market1501"): (
        "the market-1501 data set contains", "b. experimental settings",
    ),
    ("dcc", "IV-D", "market1501"): ("c) experimental results on market-1501", "v. conclusions"),
    ("casn", "4", "market1501"): ("market-1501 collects person images", "cuhk03-np is a new"),
    ("casn", "4", "cuhk03-np"): ("cuhk03-np is a new", "dukemtmc-reid is an image-based"),
    ("casn", "4", "dukemtmc"): ("dukemtmc-reid is an image-based", "implementation details"),
    ("casn", "table 3", "market1501"): ("table 3: ablation study", "loss type"),
    ("ianet", "4.1", "cuhk03"): ("for cuhk03, we follow", "implementation details"),
    ("ianet", "4.2", "msmt17"): ("msmt17. we further evaluate", "4.3. ablation study"),
    ("can", "4.1", "market1501"): (
        "market-1501 this dataset was built", "dukemtmc-reid this is a subset",
    ),
    ("can", "4.1", "dukemtmc"): ("dukemtmc-reid this is a subset", "cuhk03 this dataset is stored"),
    ("can", "4.1", "cuhk03"): ("cuhk03 this dataset is stored", "4.2. comparison"),
    ("can", "4.7", "cuhk03"): ("in our experimental settings for cuhk03", "as what is shown"),
    **{
        ("minet", "4.2", name): ("we adopt the widely used single-shot", "4.3 baselines")
        for name in ("viper", "cuhk03", "market1501")
    },
    **{
        ("dcc", "IV-B", name): ("the evaluation protocol we adopt", "c. ablation studies")
        for name in ("dukemtmc", "cuhk03", "market1501")
    },
}
# numbers of those passages that say nothing about a benchmark
ELSEWHERE = {
    ("dcc", "IV-D", "market1501"): {"1", "86.7", "69.4", "88.4"},
    ("casn", "table 3", "market1501"): {"3"},
    ("ianet", "4.2", "msmt17"): {"1", "3", "14.1", "12.8"},
}
NAMES = r"market-\s?1501|cuhk03-np|cuhk03|msmt17|dukemtmc(-reid)?"


def card() -> pd.DataFrame:
    with (Path(reid_repro.__file__).parent / "reported" / "datasets.csv").open(
        encoding="utf-8"
    ) as file:
        return pd.read_csv(file, dtype=str, keep_default_na=False)


def published() -> dict:
    "The counts of the notebook's table, read from its source."
    for cell in nbformat.read(CARD, as_version=4).cells:
        if cell.cell_type == "code" and "PUBLISHED = {" in cell.source:
            return ast.literal_eval(ast.parse(cell.source).body[0].value)
    raise AssertionError(f"{CARD.name} has no PUBLISHED")


def flat(text: str, join: str = "-") -> str:
    """Lower case on one line, without links, citations and emphasis; `join` replaces a hyphen that
    ends a line.
    """
    # tags, links, emphasis
    text = re.sub(r"<[^>]*>|\(#page[^)]*\)|[*#$\\•]", "", unicodedata.normalize("NFKC", text))
    # [Gray et al., 2007], [48], [[21, 35]]
    text = re.sub(r"\[+(?:[A-Z][^\]]*\d{4}\w?|[\d, ]*)\]+", "", text)
    return re.sub(r"\s+", " ", re.sub(r"-\n(?=[a-z])", join, text).lower())


def passage(paper: str, section: str, dataset: str, join: str) -> str:
    folder = os.environ.get("REID_REPRO_PAPERS")
    if not folder or not (Path(folder) / f"{paper}.txt").is_file():
        pytest.skip(f"REID_REPRO_PAPERS does not name a folder with {paper}.txt")
    text = flat((Path(folder) / f"{paper}.txt").read_text(encoding="utf-8"), join)
    start, end = PASSAGES[paper, section, dataset]
    first = text.find(start)
    assert first >= 0, f"{paper} {section}: no passage begins with '{start}'"
    last = text.find(end, first + len(start))
    assert 0 < last - first < 2500, f"{paper} {section}: '{end}' does not follow '{start}'"
    return text[first:last]


def test_columns_are_complete():
    table = card()
    assert list(table.columns) == COLUMNS
    for column in COLUMNS[:-1]:
        empty = table.index[table[column].str.strip() == ""]
        assert empty.empty, f"datasets.csv line {empty[0] + 2}: {column} is empty"
    assert set(table["paper"]) == set(PAPERS)
    assert (table == table.apply(lambda column: column.str.strip())).all(
        axis=None
    ), "blanks around a cell"


def test_no_statement_stands_twice():
    twice = card().duplicated(["paper", "section", "dataset", "quantity"])
    assert (
        not twice.any()
    ), f"datasets.csv line {twice.idxmax() + 2} repeats an earlier line; keep one"


def test_released_is_what_the_card_publishes():
    counts, wrong = published(), []
    for line, row in enumerate(card().itertuples(index=False), start=2):
        known = counts.get(row.dataset, {}).get(row.quantity)
        if str(known) != row.released:
            wrong.append(
                f"line {line}: {row.dataset}, {row.quantity}: released {row.released!r}, the card"
                f" has {known!r}"
            )
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("paper", PAPERS)
def test_stated_stands_in_the_paper(paper):
    table, wrong = card(), []
    for row in table[table["paper"] == paper].itertuples():
        words = re.escape(row.stated.lower())
        found = [passage(paper, row.section, row.dataset, join) for join in ("-", "")]
        if not any(re.search(rf"(?<![\w.,]){words}(?!\w|[.,]\d)", text) for text in found):
            wrong.append(
                f"line {row.Index + 2}: '{row.stated}' does not stand in {paper} {row.section}"
            )
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("place", PASSAGES, ids=" ".join)
def test_no_number_of_a_passage_is_left_out(place):
    table = card()
    rows = table[
        (table["paper"] == place[0])
        & (table["section"] == place[1])
        & (table["dataset"] == place[2])
    ]
    assert len(rows), f"{place}: no statement typed"
    text = re.sub(NAMES, "", passage(*place, "")).replace("120, 000", "120,000")
    typed = " ".join(rows["stated"]).replace("120, 000", "120,000")
    printed = {n.rstrip(".,") for n in re.findall(r"(?<![\w.])\d[\d,.]*", text)} - ELSEWHERE.get(
        place, set()
    )
    assert not printed - {
        n.rstrip(".,") for n in re.findall(r"\d[\d,.]*", typed)
    }, f"{place}: printed {printed}, typed '{typed}'"
