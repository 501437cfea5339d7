"""Writes what README.md and nbs/index.ipynb say of the whole: `make readme`, after every `make
publish` and every new notebook.

README.md: the block of results, from the committed ledger alone. nbs/index.ipynb: the reading
order, from the notebooks' first cells. docs/pair.png, the README's picture: the first picture among
the outputs of nbs/index.ipynb. docs/speed.md: its table, from results/bench.
"""

import argparse
import re
from base64 import b64decode
from collections import Counter
from pathlib import Path

import nbformat
import pandas as pd

from docs import PARTS, read_notebook
from reid_repro.lab.claims import WORDS, verdicts, verdicts_in_short
from reid_repro.lab.compare import run_times, leaderboard_table
from reid_repro.lab.ledger import read_ledger
from reid_repro.lab.report import acts, found, helps
from reid_repro.lab.results import Table
from speed import speed_table

ROOT = Path(__file__).resolve().parents[1]
HEADING = "## Reading order"
BEGIN = "<!-- ledger: begin (written by `make readme`, not by hand) -->"
END = "<!-- ledger: end -->"
BENCH = BEGIN.replace("ledger", "bench", 1), END.replace("ledger", "bench", 1)
ORDER = (*WORDS, "differs by data set")


def _counted(words: pd.Series) -> str:
    "\"2 inconclusive, 1 not run\"."
    count = Counter(words)
    return ", ".join(f"{count[word]} {word}" for word in ORDER if count[word])


def claims_by_paper(ledger: pd.DataFrame) -> pd.DataFrame:
    """One line per paper: how many claims, and their verdicts on photographs and on Toytown,
    counted.
    """
    short = verdicts_in_short(verdicts(ledger, ROOT))
    lines = [
        (paper, str(len(g)), _counted(g["photographs"]), _counted(g["Toytown"]))
        for paper, g in short.groupby("paper", sort=False)
    ]
    return pd.DataFrame(lines, columns=["paper", "claims", "on photographs", "on Toytown"])


def block(ledger: pd.DataFrame) -> str:
    """The results as Markdown: does each mechanism help, does it act, what was found; folded away
    below, what every method reached, all claims counted, what the runs took.
    """
    judged = verdicts(ledger, ROOT)
    lead = [
        Table({"Does it help? On photographs, over five seeds": helps(judged)}),
        Table({"Does it act? Inside the trained network": acts(ledger, most=1)}),
    ]
    sentences = "\n".join(f"- {sentence}" for sentence in found(judged).values())
    rest = [
        leaderboard_table(ledger, short=True),
        Table({"The papers' claims, tested": claims_by_paper(ledger)}),
        Table({"What the runs took": run_times(ledger)}),
    ]
    shown, folded = ("\n\n".join(t._repr_markdown_() for t in tables) for tables in (lead, rest))
    summary = "<summary>Every row that has run, every claim, and what the runs took</summary>"
    return (
        f"{shown}\n\n**What we found**\n\n{sentences}\n\n"
        f"<details>{summary}\n\n{folded}\n\n</details>"
    )


def between(text: str, begin: str, end: str, new: str, file: str) -> str:
    """`text` with `new` between two marks. ValueError unless each mark stands there once, in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(
            f"{file} must hold the lines {begin} and {end} once each, in this order"
        )
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n{new}\n\n{end}{rest.partition(end)[2]}"


def rendered(text: str, ledger: pd.DataFrame) -> str:
    "The README's `text` with the results made anew."
    return between(text, BEGIN, END, block(ledger), "README.md")


def with_speed(text: str) -> str:
    "The `text` of docs/speed.md with its table made anew."
    return between(text, *BENCH, speed_table()._repr_markdown_(), "docs/speed.md")


def reading_order(root: Path = ROOT) -> str:
    """All notebooks in reading order with their claims, as Markdown: title and sentence of each
    one's first cell. ValueError without them.
    """
    lines = []
    for folder, (title, what) in PARTS.items():
        paths = sorted(root.glob(f"nbs/{folder}/**/*.ipynb"))
        lines += ["", f"### {title}", "", what, ""] if paths else []
        for path in paths:
            if not (match := re.match(r"# (.+)\n+> (.+)", read_notebook(path).cells[0].source)):
                raise ValueError(
                    f"{path.relative_to(root)}: the first cell must begin with '# title' and '>"
                    " claim'"
                )
            name, claim = match.groups()
            lines.append(f"- [{name}]({path.relative_to(root / 'nbs').as_posix()}): {claim}")
    first = (
        "First [the symbols](notation.ipynb). A notebook needs only what stands above it; what has"
        " a letter is looked up when it is needed."
    )
    return "\n".join([HEADING, "", first, *lines])


def picture(notebook: nbformat.NotebookNode) -> bytes:
    "The first picture among a notebook's outputs, as a PNG. ValueError where there is none."
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                return b64decode(output["data"]["image/png"])
    raise ValueError("nbs/index.ipynb holds no picture; run it with nbdev-test --save")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true",
        help="change nothing; fail when something is not what it should be",
    )
    only_check = parser.parse_args().check
    path = ROOT / "README.md"
    index = ROOT / "nbs" / "index.ipynb"
    shown = ROOT / "docs" / "pair.png"
    speed = ROOT / "docs" / "speed.md"
    try:
        old = path.read_text(encoding="utf-8")
        notebook = read_notebook(index)
        order = reading_order()
        if not (
            cell := next((cell for cell in notebook.cells if cell.source.startswith(HEADING)), None)
        ):
            raise ValueError(
                f"nbs/index.ipynb: no cell begins with '{HEADING}'; restore it with git"
            )
        # never runs/: the block is the same on every machine
        new = rendered(old, read_ledger(ROOT / "results"))
        seen = picture(notebook)
        fast = with_speed(speed.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    same = {
        path: new == old, index: cell.source == order,
        shown: shown.is_file() and shown.read_bytes() == seen,
        speed: speed.read_text(encoding="utf-8") == fast,
    }
    stale = [file.relative_to(ROOT).as_posix() for file in same if not same[file]]
    if only_check and stale:
        raise SystemExit(
            f"not what results/ and the notebooks give: {', '.join(stale)}; run `make readme` and"
            " commit them"
        )
    if not same[path]:
        path.write_text(new, encoding="utf-8")
    if not same[index]:
        cell.source = order
        nbformat.write(notebook, index)
    if not same[speed]:
        speed.write_text(fast, encoding="utf-8")
    if not same[shown]:
        shown.write_bytes(seen)


if __name__ == "__main__":
    main()
