"""Can everybody read it? Headings make an outline, every picture has its caption, colours survive
colour blindness, text stays legible.
"""

import re
import struct
from base64 import b64decode
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path

import nbformat
import numpy as np
import pytest
import seaborn as sns
from matplotlib.colors import to_rgb
from skimage.color import rgb2lab

from reid_repro.viewing import pictures

NBS = Path(__file__).resolve().parents[2] / "nbs"
NAMES = sorted(
    p.relative_to(NBS).as_posix()
    for p in NBS.rglob("*.ipynb")
    if ".ipynb_checkpoints" not in p.parts
)
# linear RGB as eyes without one kind of cone have it (Machado, Oliveira, Fernandes 2009, severity
# 1)
BLIND = {
    "red": [
        [0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "green": [
        [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "blue": [
        [1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


@cache
def cells(name: str) -> list:
    return nbformat.read(NBS / name, as_version=4).cells


def pngs(cell) -> list[bytes]:
    return [
        b64decode(o.data["image/png"])
        for o in cell.get("outputs", [])
        if "image/png" in o.get("data", {})
    ]


@pytest.mark.parametrize("name", NAMES)
def test_headings_make_an_outline(name):
    """One title first, and no level left out: JupyterLab's table of contents and a screen reader's
    list of headings follow them.
    """
    text = "\n".join(
        re.sub(r"```.*?```", "", c.source, flags=re.DOTALL)
        for c in cells(name)
        if c.cell_type == "markdown"
    )
    levels = [len(m) for m in re.findall(r"^(#+) \S", text, re.MULTILINE)]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in pairwise(levels)), levels


def slider(cell) -> bool:
    "Whether a cell shows pictures that a slider moves."
    html = ("".join(o.get("data", {}).get("text/html", "")) for o in cell.get("outputs", ()))
    return any("reid-slides" in text for text in html)


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_has_a_caption(name):
    "In the markdown cell after it: what there is to see, in words. Sliders move pictures, too."
    words, bare = re.compile(r"^\*(?:Figures?|Table and figure|Left|Above)\b", re.MULTILINE), []
    for i, cell in enumerate(cells(name)):
        if cell.cell_type == "code" and (pngs(cell) or slider(cell)):
            after = next((c.source for c in cells(name)[i + 1 :] if c.cell_type == "markdown"), "")
            if not words.search(after):
                bare.append(cell.source[:80])
    assert not bare, f"a picture without '*Figure: …*' in the next markdown cell: {bare}"


def inches(png: bytes) -> float:
    "Width of a figure as it was drawn: pixels over the resolution that the file names."
    place = png.find(b"pHYs")
    per_inch = struct.unpack(">I", png[place + 4 : place + 8])[0] * 0.0254 if place > 0 else 100
    return struct.unpack(">I", png[16:20])[0] / per_inch


@pytest.mark.parametrize("name", NAMES)
def test_text_in_figures_stays_legible_at_half_the_width_of_a_page(name):
    """A figure w inches wide, fitted into half of 1280 pixels, shows letters of s points s/72 ·
    640/w pixels high.
    """
    small = []
    for cell in cells(name):
        sizes = [float(size) for size in re.findall(r"(?:font|label)size=([0-9.]+)", cell.source)]
        for png in pngs(cell) if cell.cell_type == "code" else ():
            height = min([*sizes, 9]) / 72 * 640 / max(inches(png), 640 / 96)
            small += [f"{height:.1f} pixels in a figure {inches(png):.1f} inches wide"] * (
                height < 6
            )
    assert not small, f"letters too small: {small}"


@pytest.mark.parametrize("name", NAMES)
def test_no_colour_scale_that_hides_order(name):
    source = "\n".join(c.source for c in cells(name) if c.cell_type == "code")
    assert not re.findall(
        r"cmap=.(?:jet|rainbow|hsv|gist_rainbow|nipy_spectral|RdYlGn|turbo|Set1|Paired)\b", source
    )


def seen(colour, blindness: str | None) -> np.ndarray:
    "CIELAB of a colour as it is seen; distances of 2.3 are just noticed."
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    if blindness:
        linear = np.clip(np.array(BLIND[blindness]) @ linear, 0, 1)
    return rgb2lab(
        np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)[
            None, None
        ]
    )[0, 0]


@pytest.mark.parametrize("blindness", [None, *BLIND])
def test_colours_are_told_apart_by_everybody(blindness):
    marks = (pictures.RIGHT, pictures.WRONG, pictures.JUNK, pictures.QUERY)
    for colours in (marks, sns.color_palette("colorblind")[:4]):
        for a, b in combinations(colours, 2):
            assert np.linalg.norm(seen(a, blindness) - seen(b, blindness)) > 10, (a, b, blindness)


def test_the_check_of_colours_can_fail():
    assert (
        np.linalg.norm(seen("#b3b300", "red") - seen("#80b300", "red"))
        < 10
        < np.linalg.norm(seen("red", None) - seen("green", None))
    )
