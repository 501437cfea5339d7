"""Writes the block of README.md that holds results, from the committed ledger alone: `make readme`, after every `make publish`."""

import argparse
from collections import Counter
from pathlib import Path

import pandas as pd

from reid_repro.claims import verdicts, verdicts_in_short
from reid_repro.compare import standing_table
from reid_repro.ledger import read_ledger
from reid_repro.results import Table

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- ledger: begin (written by `make readme`, not by hand) -->", "<!-- ledger: end -->"
ORDER = ("held", "did not hold", "inconclusive", "not run", "differs by data set")


def _counted(words: pd.Series) -> str:
    "\"2 inconclusive, 1 not run\"."
    count = Counter(words)
    return ", ".join(f"{count[word]} {word}" for word in ORDER if count[word])


def claims_by_paper(ledger: pd.DataFrame) -> pd.DataFrame:
    "One line per paper: how many claims, and their verdicts on photographs and on Toytown, counted."
    short = verdicts_in_short(verdicts(ledger, ROOT))
    lines = [(paper, str(len(g)), _counted(g["photographs"]), _counted(g["Toytown"])) for paper, g in short.groupby("paper", sort=False)]
    return pd.DataFrame(lines, columns=["paper", "claims", "on photographs", "on Toytown"])


def times(ledger: pd.DataFrame) -> pd.DataFrame:
    "One line per profile: trained runs, minutes of the shortest, median and longest, and the devices they ran on."
    lines = []
    for profile, runs in ledger[ledger["epochs"] > 0].groupby("profile", sort=False) if len(ledger) else ():
        minutes = runs["wall_seconds"] / 60
        spread = f"{minutes.min():.0f} / {minutes.median():.0f} / {minutes.max():.0f}"
        devices = "; ".join(sorted(set(runs["device"])))
        lines.append((profile, str(len(runs)), spread, f"{runs['peak_memory_mib'].max() / 1024:.1f}", devices))
    return pd.DataFrame(lines, columns=["profile", "trained runs", "minutes of a run (least / median / most)", "most memory (GiB)", "on"])


def block(ledger: pd.DataFrame) -> str:
    "The results as Markdown: what every method reached, how the papers' claims fared, what the runs took."
    tables = [standing_table(ledger, short=True), Table({"The papers' claims, tested": claims_by_paper(ledger)}),
              Table({"What the runs took": times(ledger)})]
    return "\n\n".join(table._repr_markdown_() for table in tables)


def rendered(text: str, ledger: pd.DataFrame) -> str:
    "`text` with what stands between the two marks made anew. ValueError unless each mark stands there once, in order."
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md must hold the lines {BEGIN} and {END} once each, in this order")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{block(ledger)}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when README.md is not what the ledger gives")
    only_check = parser.parse_args().check
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    try:
        new = rendered(old, read_ledger(ROOT / "results"))  # never runs/: the block is the same on every machine
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if only_check and new != old:
        raise SystemExit("README.md is not what results/ gives; run `make readme` and commit it")
    if not only_check:
        path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
