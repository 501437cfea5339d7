"""The table of symbols is binding: every letter in it is used in the notebooks that it names, and
the letters of a derivation stand in it.

(That the names *in code* exist is checked in the notation notebook itself.)
"""

import re
from functools import cache
from pathlib import Path

import nbformat
import pytest

NBS = Path(__file__).resolve().parents[2] / "nbs"
PAPERS = {"MI-Net": "minet", "DCC": "dcc", "CASN": "casn", "IANet": "ianet", "CAN": "can"}
GROUPS = {
    "all": None, "papers": ("ide", "pcb", *PAPERS.values()),
    "papers on pairs": ("minet", "dcc", "casn"),
}
FONTS = r"\\(?:mathrm|mathbf|mathbb|text|operatorname|left|right|[bB]igg?[lr]?|quad|qquad|[,;!:> ])"


def plain(text: str) -> str:
    """LaTeX without fonts, spaces and braces, subscripts before superscripts: x^{a}_b and x_b^a are
    one symbol.
    """
    text = re.sub(FONTS, " ", text.replace(r"\ast", "*"))
    text = re.sub(r"\^(\{[^{}]*\}|\\\w+|[\w*])_(\{[^{}]*\}|\\\w+|\w)", r"_\2^\1", text)
    return re.sub(r"[\s{}]", "", text)


@cache
def source(path: Path) -> str:
    return "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)


@cache
def named(name: str) -> tuple[Path, ...]:
    """The notebooks that the column *used in* means by a name: a foundation, or a method's
    derivation and reproduction.
    """
    found = [
        p
        for p in sorted(NBS.rglob("*.ipynb"))
        if p.stem != "notation" and ".ipynb_checkpoints" not in p.parts
    ]
    if name in GROUPS:
        return (
            tuple(found)
            if GROUPS[name] is None
            else tuple(p for one in GROUPS[name] for p in named(one))
        )
    paths = [
        p
        for p in found
        if name in {re.sub(r"^[0-9A-Z]+_", "", part) for part in (p.stem, p.parent.name)}
    ]
    assert paths, f"the column 'used in' names '{name}', and no notebook is called so"
    return tuple(paths)


def rows() -> list[tuple[str, list[str]]]:
    """(heading, cells) of every line of the notation's tables: five cells for ours, six for a
    paper's letters.
    """
    found, heading = [], ""
    for line in source(NBS / "notation.ipynb").splitlines():
        heading = line.lstrip("# ") if line.startswith("#") else heading
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if line.startswith("|") and len(cells) in (5, 6) and cells[0] not in ("symbol", "printed"):
            found.append((heading, cells))
    return found


def symbols(text: str) -> list[str]:
    "What stands between dollars, lists taken apart at the commas outside brackets."
    return [
        part
        for inside in re.findall(r"\$([^$]+)\$", text)
        for part in re.split(r",(?![^({]*[)}])|;\s|\s=\s", inside)
        if part.strip()
    ]


def unused() -> list[str]:
    faults = []
    for heading, cells in rows():
        if len(cells) == 6:  # printed, meaning, shape, we write, in code, where
            ours = (
                f"{cells[0]} {cells[3]}"
                if "as printed" in cells[3] and "$" not in cells[3]
                else cells[3]
            )
            places = named(PAPERS[heading])
        else:
            ours = cells[0]
            places = tuple(p for name in re.split(r",\s*", cells[4]) for p in named(name))
        text = plain("".join(map(source, places)))
        faults += [
            f"{heading}: {symbol} ({cells[1]})"
            for symbol in symbols(ours)
            if plain(symbol) not in text
        ]
    return faults


def test_every_letter_is_used_where_the_table_says():
    assert len(rows()) > 100 and sum(len(symbols(cells[0])) for _, cells in rows()) > 150
    assert not (faults := unused()), "not used in the notebooks named: " + "; ".join(faults)


@pytest.mark.parametrize("paper", PAPERS.values())
def test_the_letters_of_a_derivation_stand_in_the_table(paper):
    "Those of its lists of symbols, which stand where an equation first needs them."
    (path,) = (p for p in named(paper) if p.stem == "1_derive")
    lists = [
        part.partition("\n\n")[0]
        for cell in nbformat.read(path, as_version=4).cells
        for part in cell.source.split("**Symbols")[1:]
    ]
    assert lists, f"{path.name} of {paper} lists no symbols"
    table, strange = plain(source(NBS / "notation.ipynb")), []
    for symbol in symbols(" ".join(lists)):
        letter = plain(re.split(r"\\in\\mathbb|\\in\b|\\times\b|=|\(", symbol)[0])
        if letter and letter not in table:
            strange.append(symbol)
    assert not strange, f"{paper}: in its list of symbols, not in nbs/notation.ipynb: {strange}"


def test_the_check_can_fail(monkeypatch):
    lines = source(NBS / "notation.ipynb").replace(r"| $\varepsilon$ |", r"| $\varXi_{77}$ |")
    monkeypatch.setitem(
        globals(), "source",
        lambda path, real=source: lines if path.stem == "notation" else real(path),
    )
    assert len(unused()) == 1 and r"\varXi" in unused()[0]
