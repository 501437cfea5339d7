"""The site: what becomes of a notebook on its page, a small site built whole, and what its pages
load.

The small site has a made-up library of one module; `make docs` builds the real one under the same
checks (`ci/docs.py`).
"""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ci"))
import docs

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)


def picture(width: int = 40) -> nbformat.NotebookNode:
    file = io.BytesIO()
    Image.new("RGB", (width, 20), (200, 90, 40)).save(file, "PNG")
    return new_output(
        "display_data",
        {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": "<Figure>"},
    )


def code(source: str, *outputs) -> nbformat.NotebookNode:
    return new_code_cell(source, outputs=list(outputs))


def alts(cells) -> list[str]:
    docs.describe_pictures(cells)
    return [cell.metadata["mystnb"]["image"]["alt"] for cell in cells if "mystnb" in cell.metadata]


# ---------------------------------------------------------------- one cell, one page


@pytest.mark.parametrize(
    "source,told",
    [
        (
            "*Figure: left, the loss. Right, the rank.*\n\n**Change one thing.** More.",
            "Figure: left, the loss. Right, the rank.",
        ),
        ("*Figures: two\nof them.*", "Figures: two of them."),
        (
            "*Figure: the matrix $R$ of `rerank`, see [it](x.ipynb).*\n",
            "Figure: the matrix R of rerank, see it.",
        ),
        ("*Table and figure: both.*", "Table and figure: both."),
        ("*Figure: $M_m^*$, the row profile.*", "Figure: M_m^, the row profile."),
        ("**Figure it out.** A paragraph.", ""), ("*Other words* and more.", ""),
        ("Figure: not italic.", ""),
    ],
)
def test_a_caption_is_the_italic_paragraph_that_begins_with_figure(source, told):
    assert docs.caption(source) == told


def test_a_picture_takes_the_caption_below_it():
    cells = [
        new_markdown_cell("*Figure: of an earlier one.*"), code("plot(1);", picture()),
        code("x = 1"), code("plot(2)", picture()), new_markdown_cell("*Figures: both.*"),
        code("y = 2\nplot(3);\n", picture()), new_markdown_cell("No caption."), code("z = 3"),
    ]
    assert alts(cells) == ["Figures: both.", "Figures: both.", "A figure, drawn by plot(3)"]


def test_directives_go_and_exported_cells_are_marked():
    cells = docs.without_directives(
        [
            code("#| default_exp thing"), code("#| export\ndef f():\n    return '#| text'"),
            code("#| hide\nx = 1", picture()), code("y = 2"),
            new_markdown_cell("#| no directive here"),
        ]
    )
    assert [cell.source for cell in cells] == [
        "def f():\n    return '#| text'", "y = 2", "#| no directive here",
    ]
    assert [cell.metadata.get("tags") for cell in cells] == [["exported"], None, None]


def test_html_that_a_cell_shows_leads_to_pages():
    html = '<a href="5_papers/1_minet/1_derive.ipynb">a</a> <a href="b.ipynb#c">b</a>'
    outside = '<a href="https://example.org/c.ipynb">c</a>'
    cell = code("show", new_output("execute_result", {"text/html": html + outside}))
    docs.link_pages([cell])
    assert cell.outputs[0].data["text/html"] == (
        '<a href="5_papers/1_minet/1_derive.html">a</a> <a href="b.html#c">b</a>' + outside
    )


def test_controls_become_a_sentence_and_keep_what_else_is_stored():
    plain = (
        "interactive(children=(IntSlider(value=0, description='query', max=199), IntSlider(value=5,"
        " description='row'…"
    )
    alone = new_output("display_data", {docs.WIDGET: {"model_id": "a"}, "text/plain": plain})
    drawn = new_output(
        "display_data", {docs.WIDGET: {"model_id": "b"}, "text/plain": plain, "image/png": "iVBO"}
    )
    cell = code("interactive(look)", alone, drawn)
    docs.still(cell)
    assert cell.outputs[0].data == {
        "text/markdown": "*Controls (query, row, …): run the notebook to move them.*"
    }
    assert set(cell.outputs[1].data) == {"text/plain", "image/png"}


@pytest.mark.parametrize(
    "source,what",
    [
        ("import torch\nfrom math import pi", "the imports"), ("import torch\nx = 1", ""),
        ("assert f(2) == 4", "the check"),
        ("torch.testing.assert_close(a, b)\nx = 1", "the check"),
        ("for n in (1, 2):\n    assert f(n) == n", "the check"),
        ("a = 1\nb = a + 1\nassert b == 2", ""),
        ("for n in (1, 2):\n    a = f(n)\n    b = g(a)\n    assert a == b", ""),
        ("fig, ax = plt.subplots()\nax.plot(x)", "the drawing"),
        ("x = f(1)\nfig, ax = plt.subplots()\nfor y in x:\n    ax.plot(y)", "the drawing"),
        ("for x in batches:\n    a = f(x)\n    b = g(a)\nplt.subplots()", ""),
        ("def loop(x):\n    for y in x:\n        assert y\n    return x", ""),
        ("total = 0\nfor x in xs:\n    total += x", ""), ("%timeit f()", ""), ("model(x)", ""),
    ],
)
def test_imports_checks_and_drawing_are_folded_and_the_lesson_stays_open(source, what):
    cell, exported = code(source), code(source)
    exported.metadata["tags"] = ["exported"]
    docs.fold(cell)
    docs.fold(exported)
    assert ("hide-input" in cell.metadata.get("tags", [])) == bool(what)
    assert cell.metadata.get("mystnb", {}).get("code_prompt_show", "Show ") == f"Show {what}"
    assert exported.metadata == {"tags": ["exported"]}


def test_a_check_that_shows_something_stays_open():
    assert docs.secondary(code("assert x\nprint(x)", new_output("stream", text="1"))) == ""


def test_the_first_equation_under_a_heading_with_a_number_can_be_linked():
    text = "### Eq. (3): b\nThus $x$ and\n\n$$ a $$\n\nand\n\n$$ c $$\n"
    link = '<a id="equation-3" href="#equation-3" title="Link to equation 3">(3)</a>'
    assert docs.with_anchors(text) == text.replace(
        "$$ a", f'<span class="equation">{link}</span>\n\n$$ a'
    )
    several = docs.with_anchors("## Eq. (2) to (4): all\n\n$$ a $$\n\n## Eq. (7) and (9)\n$$ b $$\n")
    assert re.findall(r">\((\d)\)<", several) == ["2", "3", "4", "7", "9"]
    for same in ("### Eq. (3): words\n\n### Two\n\n$$ a $$\n", "## Other\n\n$$ a $$\n"):
        assert docs.with_anchors(same) == same


def test_solutions_are_markdown():
    text = docs.text_for_page(
        "1. Why?\n<details><summary>Solution</summary> Because $a$ is `b`. </details>\n\n2. How?"
    )
    assert (
        text
        == "1. Why?\n\n\n<details><summary>Solution</summary>\n\nBecause $a$ is"
        " `b`.\n\n</details>\n\n\n2. How?"
    )


def test_docstrings_are_plain_text():
    rest = docs.rest
    assert (
        rest("maps (B, C): |x|, 2*k, name_ and <b>")
        == r"maps (B, C)\: \|x\|, 2\*k, name\_ and \<b\>"
    )
    assert (
        rest("`p` > 0, see `pcb.strip_pool`s")
        == r"``p`` \> 0, see :py:obj:`pcb.strip_pool <reid_repro.pcb.strip_pool>`\ s"
    )
    assert rest("n×`p`, (`q`)") == "n×\\ ``p``, (``q``)"
    assert rest("`read_ledger()`") == ":py:obj:`read_ledger() <reid_repro.lab.ledger.read_ledger>`"
    assert rest("`pulse`") == "``pulse``", "six modules have it"
    assert rest("`pulse`", "reid_repro.can") == ":py:obj:`pulse <reid_repro.can.pulse>`"


@pytest.mark.parametrize(
    "link,page",
    [
        ("[a](../pcb/1_derive.ipynb)", "[a](../pcb/1_derive.ipynb)"),
        (
            "[a](../../2_measuring/2_scores.ipynb#As-the-papers,-state-them)",
            "[a](../../2_measuring/2_scores.ipynb#as-the-papers-state-them)",
        ),
        ("[a](../../../reid_repro/pcb.py)", "[a](../../../api/reid_repro.pcb.md)"),
        ("[a](../../../ci/batch.py)", "[a](../../../files/ci/batch.py.md)"),
        ("[a](../../../CONTRIBUTING.md#house-rules)", "[a](../../../contributing.md#house-rules)"),
        ("[a](../../../ci)", "a"),
        ("[a](https://example.org/x.ipynb#A.B)", "[a](https://example.org/x.ipynb#A.B)"),
        ("[a](#Evaluation)", "[a](#evaluation)"),
        (
            "`03_losses` and `reid_repro.learning.losses`",
            (
                "[`03_losses`](../../3_learning/03_losses.ipynb) and"
                " [`reid_repro.learning.losses`](../../../api/reid_repro.learning.losses.md)"
            ),
        ),
        (
            "`pcb.PCB`, `pcb.gone`, `PCB`",
            "{py:obj}`pcb.PCB <reid_repro.pcb.PCB>`, `pcb.gone`, `PCB`",
        ),
        ("`1_derive`, `losses`, ``03_losses``", "`1_derive`, `losses`, ``03_losses``"),
        ("```\n`03_losses` [a](nothing.ipynb)\n```", "```\n`03_losses` [a](nothing.ipynb)\n```"),
        ("![a](x.png)", "![a](x.png)"), ("`stages[k](x)`, $f[k](x)$", "`stages[k](x)`, $f[k](x)$"),
        ("[a](1_derive.ipynb#Eq.-(1)), [`b`](#The-(b))", "[a](1_derive.ipynb#eq-1), [`b`](#the-b)"),
    ],
)
def test_links_lead_to_pages(link, page):
    shown = set()
    assert docs.with_links(link, "nbs/4_baselines/ide/1_derive.ipynb", ROOT, shown) == page
    assert shown == ({"ci/batch.py"} if "batch" in link else set())


def test_a_link_to_nothing_is_an_error():
    with pytest.raises(
        ValueError,
        match=(
            r"1_derive.ipynb: the link \[a\]\(../gone/x.ipynb\) leads to"
            r" nbs/4_baselines/gone/x.ipynb"
        ),
    ):
        docs.with_links(
            "see [a](../gone/x.ipynb)", "nbs/4_baselines/ide/1_derive.ipynb", ROOT, set()
        )


def test_every_notebook_has_its_place_in_reading_order():
    names, listed = docs.notebooks(ROOT), "\n".join(docs.parts(ROOT).values())
    assert [name for name in names if name.count("/") == 1][-1] == "nbs/notation.ipynb"
    inner = [name for name in names if name.count("/") > 1]
    assert inner == sorted(inner) and len(inner) > 40
    assert [name for name in inner if listed.count(f"/{name.removesuffix('.ipynb')}\n") != 1] == []
    assert list(docs.modules(ROOT).values()) == [
        name for name in names if name in docs.modules(ROOT).values()
    ]


# ---------------------------------------------------------------- a small site

MODULE = '''"""A claim with 2 * k stars, about `pool`."""

# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/1_town/01_alpha.ipynb.

# %% auto #0
__all__ = ['LIMIT', 'pool', 'Box']

LIMIT = (1, 2)  # lowest_ and highest


def pool(maps: list[float], long_name_of_an_option: str = "value", another_long_name: int | None = None) -> list[float]:
    """Maps (B, C, H, W) → (B, C), |x| * 2 for `maps`; see `Box`.

    `another_long_name`: a name_ with an underscore, or *stars.
    Raises ValueError.
    """


class Box:
    "A box."

    def open(self) -> None:
        "Opens it, unlike `pool`."
'''


def small_project(root: Path) -> None:
    (root / "ci").mkdir(parents=True)
    shutil.copyfile(ROOT / "ci/docs.py", root / "ci/docs.py")
    shutil.copytree(ROOT / "docs", root / "docs", ignore=shutil.ignore_patterns("_build", "*.md"))
    for name in ("settings.ini", "CHANGELOG.md"):
        shutil.copyfile(ROOT / name, root / name)
    (root / "CONTRIBUTING.md").write_text(
        "# Contributing\n\n[Rules](#house-rules), [a file](ci/docs.py)\n\n## House rules\n\nNone.\n"
    )
    (root / "docs/index.md").write_text(
        "# Small\n\n```{toctree}\n:glob:\n\nparts/*\napi/index\n*\n```\n\n[alpha](../nbs/1_town/01_alpha.ipynb)\n"
    )
    (root / "README.md").write_text(
        "# Readme\n\n## On real photographs\n\n[Licence](settings.ini)\n"
    )
    (root / "docs/cluster.md").write_text(
        "# Cluster\n\nFound by its name; see [there](../README.md#on-real-photographs).\n"
    )
    (root / "reid_repro").mkdir()
    (root / "reid_repro/__init__.py").write_text("")
    (root / "reid_repro/alpha.py").write_text(MODULE)
    wide = (
        "| "
        + " | ".join(["a long head"] * 30)
        + " |\n|"
        + "---|" * 30
        + "\n| "
        + " | ".join(["cell"] * 30)
        + " |"
    )
    plain = "interactive(children=(IntSlider(value=0, description='query'…"
    equation = r"\sum_{i=1}^{n} " + " + ".join(rf"\frac{{x_{{{i}}}}}{{y}}" for i in range(60))
    alpha = new_notebook(
        cells=[
            new_markdown_cell("# Alpha\n\n> A claim about `pool`."), code("#| default_exp alpha"),
            code("#| export\ndef pool(maps): ...", new_output("stream", text="x" * 400)),
            code("#| hide\nsecret = 1"), code("import folded_module"),
            new_markdown_cell(
                rf"### Eq. (1)"
                "\n\n"
                rf"$$ {equation} $$"
                "\n\nand $\\boldsymbol{x} \\in \\mathbb R^C$.\n\n" + wide
            ),
            code("plot();", picture(2000)),
            new_markdown_cell(
                "*Figure: an orange <box> & \"more\".*\n\n1."
                " Why?\n<details><summary>Solution</summary> Because `b`. </details>"
            ),
            code(
                "interactive(look)",
                new_output("display_data", {docs.WIDGET: {"model_id": "a"}, "text/plain": plain}),
            ),
            code(
                "table",
                new_output(
                    "execute_result",
                    {"text/html": "<table><tr>" + "<td>a_long_cell</td>" * 60 + "</tr></table>"},
                ),
            ),
        ]
    )
    beta = new_notebook(
        cells=[
            new_markdown_cell("# Beta\n\n> It builds on another."),
            new_markdown_cell(
                "# A second title\n\n[alpha](01_alpha.ipynb#Eq.-(1)), `01_alpha`, [a"
                " script](../../ci/docs.py), `reid_repro.alpha`"
            ),
        ]
    )
    for name, notebook in (("1_town/01_alpha", alpha), ("1_town/02_beta", beta)):
        (root / f"nbs/{name}.ipynb").parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, root / f"nbs/{name}.ipynb")


def build(root: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "ci/docs.py", "--jobs", "1"]
    return subprocess.run(
        command, cwd=root, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("myst_nb", reason="needs what builds the site: pip install '.[docs]'")
    root = tmp_path_factory.mktemp("small") / "project"
    small_project(root)
    done = build(root)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    return root / "docs/_build/html"


def test_a_page_shows_what_a_reader_needs(site):
    page = (site / "nbs/1_town/01_alpha.html").read_text()
    assert 'alt="Figure: an orange &lt;box&gt; &amp; &quot;more&quot;."' in page
    assert (
        "default_exp" not in page
        and "#|" not in page
        and "secret" not in page
        and "tag_exported" in page
    )
    assert "Controls (query, …)" in page and "IntSlider" not in page
    assert "<summary>Solution</summary>" in page and '<span class="pre">b</span>' in page
    assert "nbs/1_town/01_alpha.ipynb" in page and 'href="../../api/reid_repro.alpha.html"' in page
    assert "Show the imports" in page and page.index("<details") < page.index("folded_module")
    assert 'id="equation-1"' in page and 'href="#equation-1"' in page
    assert 'href="../../notebooks/nbs/1_town/01_alpha.ipynb" download' in page
    assert (site / "notebooks/nbs/1_town/01_alpha.ipynb").is_file()
    assert ".venv/bin/jupyter lab nbs/1_town/01_alpha.ipynb</code>" in page


def test_a_second_title_is_a_heading_and_links_between_pages_hold(site):
    page = (site / "nbs/1_town/02_beta.html").read_text()
    assert page.count("<h1") == 1 and "<h2>A second title" in page
    for target in (
        "01_alpha.html#eq-1", "../../files/ci/docs.py.html", "../../api/reid_repro.alpha.html",
        '"01_alpha.html"',
    ):
        assert target in page, target
    assert docs.faults(site) == []


def test_the_reference_is_the_docstrings(site):
    page = (site / "api/reid_repro.alpha.html").read_text()
    text = " ".join(re.sub(r"<[^>]+>", "", page).split())
    assert "Maps (B, C, H, W) → (B, C), |x| * 2 for maps; see Box." in text
    assert (
        "a name_ with an underscore, or *stars." in text
        and "lowest_ and highest" in text
        and "LIMIT" in text
    )
    assert 'href="#reid_repro.alpha.Box"' in page and 'href="#reid_repro.alpha.pool"' in page
    assert "01_alpha.html" in page and 'href="../_modules/reid_repro/alpha.html' in page


def test_pages_are_found_by_glob(site):
    index = (site / "index.html").read_text()
    assert all(
        f'href="{page}.html"' in index
        for page in ("cluster", "contributing", "changelog", "parts/1_town", "api/index")
    )
    assert 'href="files/README.html#on-real-photographs"' in (site / "cluster.html").read_text()
    assert "[DEFAULT]" in (site / "files/settings.ini.html").read_text()


@pytest.mark.parametrize(
    "bad",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//cdn.example/x.css">',
        '<img src="http://cdn.example/x.png">',
        '<style>a { background: url("https://cdn.example/x.png") }</style>',
        '<style>@import "https://cdn.example/x.css";</style>',
        '<p style="background: url(https://cdn.example/x.png)">',
        '<iframe src="https://cdn.example/"></iframe>',
        '<link rel="preconnect" href="https://cdn.example">', '<a href="gone.html">x</a>',
        '<a href="#gone">x</a>', '<a href="other.html#gone">x</a>',
    ],
)
def test_what_is_loaded_from_elsewhere_and_links_to_nothing_are_faults(bad, tmp_path):
    good = (
        '<p id="here"><a href="https://example.org">may be followed</a> <a'
        ' href="other.html#here">or</a> <a href="#here">this</a>'
    )
    for name, text in (("index", good), ("other", good)):
        (tmp_path / f"{name}.html").write_text(
            f'<script src="x.js"></script><link rel="next" href="other.html">{text}'
        )
    (tmp_path / "x.css").write_text("a { background: url(x.png), url(data:image/svg+xml;x) }")
    assert docs.faults(tmp_path) == []
    (tmp_path / "index.html").write_text(good + bad)
    found = docs.faults(tmp_path)
    assert len(found) == 1 and ("cdn.example" in found[0] or "gone" in found[0]), found


def test_a_style_sheet_may_not_load_from_elsewhere_either(tmp_path):
    (tmp_path / "x.css").write_text(
        "@import 'https://cdn.example/y.css'; a { background: url(https://cdn.example/x.png) }"
    )
    assert docs.faults(tmp_path) == [
        "x.css loads https://cdn.example/x.png", "x.css loads https://cdn.example/y.css",
    ]


def test_a_second_build_reads_only_what_changed_and_a_broken_link_stops_it(site):
    root = site.parents[2]
    source = root / "docs/_build/source/nbs/1_town/02_beta.ipynb"
    before = source.stat().st_mtime_ns
    cluster = root / "docs/cluster.md"
    cluster.write_text("# Cluster\n\nChanged, and [broken](gone.md).\n")
    done = build(root)
    assert (
        done.returncode != 0
        and "docs/cluster.md: the link [broken](gone.md) leads to docs/gone.md" in done.stderr
    )
    cluster.write_text("# Cluster\n\nChanged.\n")
    assert build(root).returncode == 0
    assert "Changed." in (site / "cluster.html").read_text() and source.stat().st_mtime_ns == before


def test_a_build_that_was_cut_off_is_begun_anew(site):
    root = site.parents[2]
    (root / "docs/_build/unfinished").touch()
    (site / "searchindex.js").write_text("half of")
    (site / "left.html").touch()
    done = build(root)
    assert done.returncode == 0, done.stderr
    assert not (site / "left.html").exists() and not (root / "docs/_build/unfinished").exists()


HIDDEN = """() => [...document.querySelectorAll('pre, div.cell_output')].filter(
    box => box.scrollWidth > box.clientWidth + 1).map(box => box.innerText.slice(0, 40))"""


def test_in_a_browser_equations_are_set_nothing_is_requested_and_no_page_scrolls_sideways(
    site, tmp_path
):
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("needs a chromium")
    quiet = [
        "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--no-first-run",
    ]
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch_persistent_context(
            str(tmp_path / "profile"), executable_path=CHROMIUM, args=quiet,
            viewport={"width": 1280, "height": 900},
        )
        asked, wrong = [], []
        browser.on("request", lambda request: asked.append(request.url))
        for name in (
            "nbs/1_town/01_alpha.html", "nbs/1_town/02_beta.html", "api/reid_repro.alpha.html",
            "index.html",
        ):
            page = browser.new_page()
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.goto((site / name).as_uri())
            page.evaluate("window.MathJax ? MathJax.startup.promise.then(() => true) : true")
            sizes = page.evaluate(
                "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
            )
            assert sizes[0] <= sizes[1] == 1280, f"{name} is {sizes[0]} pixels wide"
            if "alpha.html" in name and "nbs" in name:
                assert (
                    page.locator("mjx-container").count() == 2
                    and page.locator("[data-mjx-error]").count() == 0
                )
        page = browser.new_page()
        page.set_viewport_size({"width": 390, "height": 844})
        page.goto((site / "nbs/1_town/01_alpha.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.evaluate(f"({HIDDEN})()") == []
        frame = page.locator("div.text_html:has(table)")
        assert frame.evaluate("f => f.scrollWidth > f.clientWidth && f.clientWidth < 390")
        assert frame.evaluate("f => getComputedStyle(f).borderRightStyle") == "solid"
        page.locator("div.tag_exported button.copy").click()
        page.locator("button.copy", has_text="copied").or_(
            page.locator("button.copy", has_text="selected")
        ).wait_for(timeout=10_000)
        assert (
            wrong == [] and [url for url in asked if not url.startswith(("file:", "data:"))] == []
        )
        assert any("tex-svg-full.js" in url for url in asked)
        browser.close()


def test_a_picture_of_a_page_is_found_from_where_the_page_stands():
    pictures = set()
    moved = docs.with_pictures(
        "![a pair](docs/pair.png) ![x](https://a/b.png)", "README.md", ROOT, pictures
    )
    assert moved == "![a pair](../docs/pair.png) ![x](https://a/b.png)" and pictures == {
        "docs/pair.png"
    }
    with pytest.raises(ValueError, match=r"README\.md: the picture none\.png"):
        docs.with_pictures("![a](none.png)", "README.md", ROOT, pictures)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", "\x00", nbformat.writes(nbformat.v4.new_notebook())]
)
def test_a_damaged_notebook_is_named(tmp_path, content):
    (tmp_path / "one.ipynb").write_text(content)
    with pytest.raises(ValueError, match=r"one\.ipynb' is no notebook .*restore it"):
        docs.read_notebook(tmp_path / "one.ipynb")
