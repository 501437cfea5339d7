"""What the notebook cannot hold: refusals, marks in the finished figure, colour never alone, small
files.
"""
import base64
import io

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from matplotlib.colors import to_hex

from reid_repro.viewing import pictures as P


@pytest.fixture(autouse=True)
def closed_figures():
    P.style()
    yield
    plt.close("all")


@pytest.fixture
def images():
    return torch.randint(
        0, 256, (5, 3, 32, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x.float(), lambda x: x.permute(0, 2, 3, 1), lambda x: x[:, :1], lambda x: x[None],
        lambda x: x / 255,
    ],
)
def test_what_is_not_an_image_is_refused(images, spoil):
    for draw in (
        lambda x: P.show_images(x),
        lambda x: P.overlay(x[0], np.ones((2, 2))),
        lambda x: P.ranked_list(x[0], x[1:], [True] * len(x[1:])),
    ):
        with pytest.raises(ValueError, match=r"uint8 of shape \(3, H, W\)"):
            draw(spoil(images))
        with pytest.raises(ValueError, match="float64"):
            draw(np.zeros((2, 3, 4, 4)))


def test_show_images(images):
    figure = P.show_images(images, list("abcde"), rows=2)
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title() for ax in shown] == list("abcde")
    for ax, image in zip(shown, images):
        np.testing.assert_array_equal(np.asarray(ax.images[0].get_array()), image.permute(1, 2, 0))
    with pytest.raises(ValueError, match="5 images and 2 titles"):
        P.show_images(images, ["a", "b"])
    with pytest.raises(ValueError, match="0 images"):
        P.show_images([])


def test_ranked_list_marks_by_colour_line_and_sign(images):
    right = [True, False, None, np.bool_(True)]
    figure = P.ranked_list(images[0], images[1:], right)
    query, *cells = figure.axes
    assert query.get_title() == "query" and [ax.get_title() for ax in cells] == ["1", "2", "3", "4"]
    signs = [ax.texts[0].get_text() for ax in cells]
    colours = [to_hex(ax.spines["top"].get_edgecolor()) for ax in cells]
    lines = [ax.spines["top"].get_linestyle() for ax in cells]
    assert signs == ["✓", "✗", "–", "✓"] and not query.texts
    assert colours == [P.RIGHT, P.WRONG, P.JUNK, P.RIGHT]
    assert len(set(lines[:3])) == 3 and lines[0] == lines[3]
    for ax, image in zip(cells, images[1:]):
        np.testing.assert_array_equal(np.asarray(ax.images[0].get_array()), image.permute(1, 2, 0))
    with pytest.raises(ValueError, match="4 gallery images, 2 verdicts"):
        P.ranked_list(images[0], images[1:], [True, False])
    with pytest.raises(ValueError, match="1 titles"):
        P.ranked_list(images[0], images[1:], right, ["a"])


@pytest.mark.parametrize("draw", ["show", "rank", "rows"])
def test_titles_over_narrow_images_do_not_run_into_one_another(draw):
    narrow, titles = torch.zeros(6, 3, 384, 32, dtype=torch.uint8), ["112 ✓ 0.213"] * 5
    if draw == "show":
        figure = P.show_images(narrow[1:], titles)
    elif draw == "rank":
        figure = P.ranked_list(narrow[0], narrow[1:], [True] * 5, titles)
    else:
        answers = [(image, True, title) for image, title in zip(narrow, titles)]
        figure = P.ranked_lists(narrow[0], {"one": answers, "two": answers[:2]})
    figure.canvas.draw()
    boxes = [ax.title.get_window_extent() for ax in figure.axes if ax.get_visible()]
    boxes = [box for box in boxes if box.width > 1]
    assert len(boxes) >= 5
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert 0 <= box.x0 and box.x1 <= figure.bbox.x1


def test_ranked_lists_are_rows_that_begin_with_their_method(images):
    lists = {"first": [(images[1], True, "1"), (images[2], False, "2")], "second": []}
    figure = P.ranked_lists(images[0], lists)
    rows = [[ax for ax in figure.axes[3 * i : 3 * i + 3] if ax.get_visible()] for i in (0, 1)]
    assert [len(row) for row in rows] == [3, 1]
    assert [row[0].get_ylabel() for row in rows] == ["first", "second"]
    assert [ax.texts[0].get_text() for ax in rows[0][1:]] == ["✓", "✗"]
    with pytest.raises(ValueError, match="no lists; give one for each method"):
        P.ranked_lists(images[0], {})


def test_overlay_puts_the_heat_where_the_attention_is():
    flat = np.full((3, 40, 20), 128, np.uint8)
    attention = np.zeros((4, 2))
    attention[3, 1] = 1.0
    drawn = np.asarray(P.overlay(flat, attention).images[0].get_array())
    colourful = drawn.max(2) - drawn.min(2)
    assert drawn.shape == (40, 20, 3) and np.unravel_index(colourful.argmax(), (40, 20)) >= (30, 10)
    assert colourful[:20].max() < 1e-9 and 0 <= drawn.min() and drawn.max() <= 1
    weak = np.asarray(P.overlay(flat, attention, limits=(0, 2)).images[0].get_array())
    assert (weak.max(2) - weak.min(2)).max() < colourful.max()
    even = np.asarray(P.overlay(flat, np.full((4, 2), 3.0)).images[0].get_array())
    assert (even.max(2) - even.min(2)).max() < 1e-9
    needs_grad = torch.ones(2, 2, requires_grad=True, dtype=torch.bfloat16)
    ax = plt.subplots()[1]
    assert P.overlay(flat, needs_grad, ax=ax) is ax


def test_a_receptive_field_is_bright_where_most_is_given_and_framed():
    weights = torch.zeros(4, 2)
    weights[1, 1] = 1.0
    axes = P.receptive_field(np.full((3, 16, 8), 128, np.uint8), weights, (2, 0))
    drawn = np.asarray(axes.images[0].get_array())
    assert drawn[6, 6].std() > drawn[14, 1].std(), "the giver shines"
    (frame,) = axes.patches
    assert frame.get_xy() == (-0.5, 7.5) and (frame.get_width(), frame.get_height()) == (
        4, 4,
    ), "row 2, column 0 of 4×2 cells"
    with pytest.raises(ValueError, match="outside a map of 4×2"):
        P.receptive_field(np.zeros((3, 16, 8), np.uint8), weights, (4, 0))


@pytest.mark.parametrize(
    "bad", [np.ones(4), np.ones((1, 2, 2)), np.array([[1.0, np.nan]]), np.array([[1.0, np.inf]])]
)
def test_overlay_refuses(bad):
    with pytest.raises(ValueError, match="finite map of shape"):
        P.overlay(np.zeros((3, 4, 4), np.uint8), bad)


def test_cmc_curve():
    ax = P.cmc_curve({"a": [0.5, 0.75, 1.0], "b": torch.tensor([0.25, 0.5, 0.5])}, ranks=2)
    first, second = ax.lines
    assert first.get_xydata().tolist() == [[1, 50], [2, 75]] and second.get_xydata().tolist() == [
        [1, 25], [2, 50],
    ]
    assert (
        first.get_linestyle() != second.get_linestyle()
        and first.get_marker() != second.get_marker()
    )
    assert [t.get_text() for t in ax.get_legend().texts] == ["a (50.0)", "b (25.0)"]
    for bad in ([50.0, 75.0], [0.5, 0.4], [0.5, np.nan], [], [[0.1, 0.2]], [-0.1, 0.2]):
        with pytest.raises(ValueError, match="curve 'bad'"):
            P.cmc_curve({"bad": bad})


def test_loss_curve():
    history = pd.DataFrame(
        {
            "epoch": [1, 2], "step": [5, 10], "lr": [1, 1], "loss": [3.0, 2.0], "id": [3.0, 2.0],
            "images_per_second": [9, 9], "seconds": [1, 1],
        }
    )
    ax = P.loss_curve(history)
    assert (
        len(ax.lines) == 1
        and ax.lines[0].get_xydata().tolist() == [[1, 3], [2, 2]]
        and ax.get_legend() is None
    )
    ax = P.loss_curve(history.assign(triplet=[0.5, 0.4]))
    assert [t.get_text() for t in ax.get_legend().texts] == ["loss", "id", "triplet"]
    for bad in (history.drop(columns="loss"), history.drop(columns="epoch"), history.iloc[:0]):
        with pytest.raises(ValueError, match="one row per epoch"):
            P.loss_curve(bad)


def test_may_show():
    truth = {
        ("toytown", "toytown"): True, ("data", "toytown"): True, ("none", "toytown"): False,
        ("toytown", "market1501"): False, ("data", "market1501"): True,
        ("none", "market1501"): False,
    }
    assert {key: P.may_show(*key) for key in truth} == truth
    for bad in ("Data", "", "all", None):
        with pytest.raises(ValueError, match="pictures '"):
            P.may_show(bad, "toytown")


def test_figures_are_small_and_nothing_is_shown(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *a, **k: pytest.fail("plt.show was called"))
    noise = 255 * torch.rand(6, 3, 16, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, (128, 64)).byte()  # flat patches, as Toytown is
    for figure in (
        P.ranked_list(smooth[0], smooth[1:6], [True] * 5), P.show_images(smooth[:5]),
        P.cmc_curve({c: np.linspace(0.3, 0.9, 20) for c in "abcd"}).figure,
        P.overlay(smooth[0], torch.rand(8, 4)).figure,
    ):
        file = io.BytesIO()
        figure.savefig(file, format="png")
        assert len(file.getvalue()) < 80_000


@pytest.mark.parametrize("how", ["papermill", "nbdev"])
def test_a_figure_has_the_same_dots_whoever_runs_the_notebook(how, tmp_path):
    """nbdev's shell doubles the dots, a Jupyter kernel does not; `style` makes both show what it
    says.
    """
    lines = (
        "import matplotlib.pyplot as plt",
        "from reid_repro.viewing import pictures",
        "pictures.style(dpi=100)",
        "plt.figure(figsize=(3, 2))",
        "plt.gcf().add_axes([0, 0, 1, 1]).imshow([[0, 1]], aspect='auto')",
        "plt.gca().axis('off');",
    )
    code = "\n".join(lines)
    if how == "nbdev":
        from execnb.shell import CaptureShell

        outputs = CaptureShell().run(code)
    else:
        import papermill

        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
        notebook.metadata.kernelspec = {
            "name": "python3", "display_name": "Python 3", "language": "python",
        }
        nbformat.write(notebook, tmp_path / "in.ipynb")
        papermill.execute_notebook(
            tmp_path / "in.ipynb", tmp_path / "out.ipynb", progress_bar=False
        )
        outputs = nbformat.read(tmp_path / "out.ipynb", 4).cells[-1].outputs
    shown = [
        output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})
    ]
    assert len(shown) == 1
    width = PIL.Image.open(io.BytesIO(base64.b64decode("".join(shown[0])))).width
    assert 300 <= width <= 325, f"3 inches at 100 dots are {width} dots wide"
