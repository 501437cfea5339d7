"""Numbers of our own runs that stand in sentences: they come from the ledger, too."""

import re
from functools import cache
from pathlib import Path

import nbformat
import numpy as np
import pytest

from reid_repro.lab.claims import verdicts
from reid_repro.lab.ledger import read_ledger
from reid_repro.lab.studies import paired_gain

ROOT = Path(__file__).resolve().parents[2]
NUMBER = r"([−+]?\d*\.?\d+)"
GAIN = rf"{NUMBER} ± {NUMBER}"


@cache
def ledger():
    return read_ledger(ROOT / "results")


@cache
def claimed(name: str, profile: str = "study") -> tuple[float, float]:
    "Difference and half-width of a claim under a profile, Toytown's study, whatever its verdict."
    (verdict,) = (
        v for v in verdicts(ledger()) if v.claim.name == name and v.place.endswith(profile)
    )
    return verdict.gain.mean, verdict.gain.half_width


def compared(paper: str, row: str, other: str) -> tuple[float, float]:
    "Difference and half-width of mAP between two rows of a study."
    entries = ledger()
    study = entries[(entries.paper == paper) & (entries.profile == "study")].set_index("seed")
    ours, theirs = (
        study[study.row == name]["mAP"]
        for name in (row, other)
    )
    gain = paired_gain(ours, theirs)
    return gain.mean, gain.half_width


def pulses(row: str, *names: str) -> tuple[float, ...]:
    "Numbers of the pulse of a smoke entry."
    paper, _, name = row.partition("/")
    entries = ledger()
    (pulse,) = entries[
        (entries.paper == paper) & (entries.row == name) & (entries.profile == "smoke")
        & (entries.seed == 0)
    ]["pulse"]
    return tuple(pulse[key] for key in names)


def on_photographs(row: str, name: str) -> list[float]:
    "A number of the pulse of a row's photograph entries, a seed each."
    paper, _, name_of_row = row.partition("/")
    entries = ledger()
    chosen = (entries.paper == paper) & (entries.row == name_of_row)
    return [pulse[name] for pulse in entries[chosen & (entries.profile == "photographs")]["pulse"]]


# notebook, sentence with its numbers, where these come from; a number agrees as far as it is given
SAID = [
    (
        "5_papers/2_dcc/3_more",
        rf"ahead of the pyramid \({GAIN} points of mAP\) and of global pooling \({GAIN}\)"
        rf".*four recurrent sweeps it is inconclusive \({GAIN}\)",
        lambda: (
            *claimed("dcc_spp"), *claimed("dcc_gp"), *compared("dcc", "dcc", "irnn"),
        ),
    ),
    (
        "5_papers/2_dcc/3_more",
        rf"printed form kept a correlation of {NUMBER} and lost {NUMBER} points, the cosine kept"
        rf" {NUMBER} and lost {NUMBER}",
        lambda: (
            *pulses("dcc/dcc", "mean_z_correlation", "mean_z_loss"),
            *pulses("dcc/dcc_cosine", "mean_z_correlation", "mean_z_loss"),
        ),
    ),
    (
        "5_papers/3_casn/1_derive",
        rf"CASN ends {NUMBER} points of mAP above IDE and {NUMBER} above identification attention",
        lambda: (claimed("casn_whole")[0], claimed("casn_consistency")[0]),
    ),
    (
        "5_papers/5_can/1_derive",
        rf"joining the strips of parts 1, 3, 5, 7 changes nothing that shows: {GAIN} points of mAP",
        lambda: claimed("can_joining", "photographs"),
    ),
    (
        "5_papers/5_can/1_derive",
        rf"parts 1, 3, 5 stand {GAIN} points of mAP above 1, 3, 5, 7, 9",
        lambda: claimed("can_many_strips", "photographs"),
    ),
    (
        "5_papers/2_dcc/1_derive",
        rf"take longer, it stands at {GAIN} points of mAP: inconclusive",
        lambda: claimed("dcc_irnn", "photographs"),
    ),
    (
        "5_papers/2_dcc/1_derive",
        rf"twelve, it comes out worse: {GAIN}; likewise against a spatial pyramid: {GAIN}",
        lambda: (*claimed("dcc_gp", "photographs"), *claimed("dcc_spp", "photographs")),
    ),
    (
        "5_papers/2_dcc/1_derive",
        rf"for every pair the scores correlate at {NUMBER} with",
        lambda: (np.mean(on_photographs("dcc/dcc", "mean_window_correlation")),),
    ),
    (
        "index",
        rf"one look at the whole, trained for as long, is {NUMBER} ± {NUMBER} points of mAP ahead",
        lambda: (-claimed("dcc_gp", "photographs")[0], claimed("dcc_gp", "photographs")[1]),
    ),
]
# a result in a sentence: a number of points or mAP, or one with an interval
RESULT = re.compile(r"\d (?:points|mAP)\b|points of mAP|\d ± \d")
# whose it is, where it isn't a run of ours: the papers', an exercise's, this notebook's own
ELSEWHERE = re.compile(
    r"§|[Tt]ables? (?:\d|I)|Audit|figure \d|the paper|pyramid \(\+|Solution|Alone: t|p < "
)
HERE = {  # of what the notebook itself has just trained, of the paper's tables, or of no run at all
    "4_baselines/pcb/1_derive": ("`mean_strip_loss`",),
    "4_baselines/pcb/2_reproduce": ("`mean_strip_loss`",),
    "5_papers/1_minet/3_more": ("MI + SPP is not the gate",),
    "5_papers/2_dcc/3_more": ("with cosines the scores hardly notice",),
    "5_papers/4_ianet/3_more": ("Only SIA + CIA is nowhere below",),
    "6_comparison/10_luck": ("± 1 point of mAP needs", "with a deviation of 1.3"),
}


def sentences(notebook: str) -> list[str]:
    cells = nbformat.read(ROOT / "nbs" / f"{notebook}.ipynb", 4).cells
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    return [s for text in texts for s in re.split(r"(?<=[.!?])\s+|\n", text)]


@pytest.mark.parametrize(("notebook", "words", "source"), SAID)
def test_a_number_in_a_sentence_is_the_ledgers(notebook, words, source):
    found = re.search(words, " ".join(sentences(notebook)))
    assert found, f"{notebook}: the sentence is no longer there: {words}"
    for said, value in zip(found.groups(), source(), strict=True):
        digits = len(said.partition(".")[2])
        number = float(said.replace("−", "-"))
        assert abs(round(value, digits) - number) < 1e-9, f"{notebook}: {said}, measured {value}"


def test_no_other_sentence_tells_a_result_of_ours():
    "One that does belongs into SAID."
    missed = []
    for path in sorted((ROOT / "nbs").glob("[456]_*/**/*.ipynb")):
        notebook = path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
        for sentence in sentences(notebook):
            known = any(
                re.search(words.partition(".*")[0], sentence)
                for name, words, _ in SAID
                if name == notebook
            )
            here = any(words in sentence for words in HERE.get(notebook, ()))
            if RESULT.search(sentence) and not (known or here or ELSEWHERE.search(sentence)):
                missed.append(f"{notebook}: {sentence[:160]}")
    assert not missed, "\n".join(missed)
