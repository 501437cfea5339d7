"""The explorer without a browser: rankings that agree with the evaluation, parts that keep right
answers, photographs only on request.
"""

import threading
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from reid_repro.lab import explorer as module
from reid_repro.datasets import open_benchmark
from reid_repro.evaluation import evaluate
from reid_repro.lab.explorer import Explorer, explore
from reid_repro.lab.rankings import part, rank_answers

IDE, DCC = "ide-ide_plus-toytown-smoke-s0", "dcc-dcc-toytown-smoke-s0"


@pytest.fixture(autouse=True)
def no_figure_of_another_test():
    plt.close("all")


@pytest.fixture(scope="module")
def town():
    return open_benchmark("toytown", identities=24, images_per_identity=4, junk=3, distractors=5)


@pytest.fixture
def small(town, monkeypatch):
    "An explorer whose Toytown has eight people to look for; also what it opened, in order."
    opened = []
    monkeypatch.setattr(
        module, "open_benchmark", lambda name, root=None: opened.append(name) or town
    )
    explorer = Explorer(device="cpu")
    explorer.opened = opened
    return explorer


def ids(town) -> tuple:
    return town.query.pids, town.query.camids, town.gallery.pids, town.gallery.camids


@pytest.mark.parametrize("device", ["cpu:0", torch.device("cpu")])
def test_devices_are_objects_or_their_names(small, device):
    rows = []
    for explorer in (small, Explorer(device=device)):
        explorer.open("toytown", IDE)
        rows.append([answer.distance for answer in explorer.answers(5)])
    assert rows[0] == rows[1]
    with pytest.raises(ValueError, match="is unknown; take auto"):
        Explorer(device=torch.device("meta"))


# ---------------------------------------------------------------- rankings


def test_a_ranking_is_what_the_evaluation_counts():
    "Five hundred made-up queries, distances full of ties, junk, distractors, own cameras."
    rng = np.random.default_rng(0)
    for _ in range(500):
        g = int(rng.integers(2, 12))
        dist = rng.integers(0, 4, g) / 4
        pids = rng.integers(-1, 4, g)
        camids = rng.integers(1, 4, g)
        pid, camid = int(rng.integers(1, 4)), int(rng.integers(1, 4))
        ranking = rank_answers(dist, pid, camid, pids, camids, np.arange(100, 100 + g))
        assert (
            sorted(ranking.rows) == list(range(100, 100 + g))
            and (np.diff(ranking.distances) >= 0).all()
        )
        for row, verdict in zip(ranking.rows - 100, ranking.verdicts):
            out = pids[row] == -1 or (pids[row] == pid and camids[row] == camid)
            assert verdict is (None if out else bool(pids[row] == pid))
        assert [rank for rank in ranking.ranks if rank] == list(
            range(1, 1 + sum(v is not None for v in ranking.verdicts))
        )
        if True not in ranking.verdicts:
            assert ranking.first == 0
            continue
        assert ranking.first == evaluate(dist[None], [pid], [camid], pids, camids).first[0]


def test_a_part_keeps_to_its_limits_and_every_right_answer(town):
    q, g = len(town.query), len(town.gallery)
    assert [len(rows) for rows in part(town, q * g, q + g)] == [q, g]
    for pairs, images in (
        (q * g - 1, 10**6), (300, 10**6), (1, 10**6), (10**6, q + g - 1), (10**6, 1),
    ):
        queries, gallery = part(town, pairs, images)
        assert len(queries) < q or len(gallery) < g or q <= 20
        assert len(set(queries.tolist())) == len(queries) and (np.diff(gallery) > 0).all()
        right = np.flatnonzero(np.isin(town.gallery.pids, town.query.pids[queries]))
        assert np.isin(right, gallery).all() and len(queries) >= min(q, 16)
    for limits in ((0, 5), (5, 0), (float("nan"), 5), ("x", 5)):
        with pytest.raises(ValueError, match="must be a whole number from 1"):
            part(town, *limits)


# ---------------------------------------------------------------- the explorer


def test_every_query_has_the_rank_and_precision_of_the_evaluation(small, town):
    small.open("toytown", IDE)
    expected = evaluate(small.state.method.distances(*small.state.pixels), *ids(town))
    for query in range(len(town.query)):
        ranking = small.ask(query)
        assert ranking.first == expected.first[query]
        assert f"average precision {100 * expected.ap[query]:.1f} %" in small.describe()
        answers = small.answers(5)
        later = [ranking.first] if ranking.first > 5 else []
        assert [answer.rank for answer in answers] == [1, 2, 3, 4, 5, *later]
        for answer in answers:
            assert ranking.rows[answer.place] == answer.row
            assert answer.person == town.gallery.pids[answer.row]
            assert answer.camera == town.gallery.camids[answer.row]
            assert answer.right == (answer.person == town.query.pids[query])
            mark = "✓" if answer.right else "✗"
            assert answer.label.split()[:2] == [str(answer.rank), mark]
    assert f"rank-1 {100 * expected.rank(1):.1f} %" in small.describe() and not small.note


def test_queries_come_worst_first_and_the_worst_is_asked_at_first(small, town):
    state = small.open("toytown", IDE).state
    precision = evaluate(state.dist, *ids(town)).ap
    order = state.worst_first()
    assert sorted(order) == list(range(len(town.query))) and small.query == order[0]
    assert (np.diff(precision[order]) >= 0).all() and precision[order[0]] == precision.min()
    state.scores.valid[order[0]] = False
    assert state.worst_first() == [*order[1:], order[0]], "without a right answer: last"


def test_next_goes_round_through_wrong_and_right_answers_from_the_worst(small, town):
    state = small.open("toytown", IDE).state
    first = evaluate(state.dist, *ids(town)).first
    order = state.worst_first()
    for kind in ("wrong", "right"):
        rows = [row for row in order if (first[row] == 1) == (kind == "right")]
        assert len(rows) > 1
        small.ask(rows[-1])
        assert [(small.next(kind), small.query)[1] for _ in range(len(rows) + 1)] == [
            *rows,
            rows[0],
        ]
    small.next("random", seed=3)
    chosen = small.query
    small.next("random", seed=3)
    assert small.query == chosen
    with pytest.raises(ValueError, match="kind 'odd' is unknown"):
        small.next("odd")
    small.state.scores.first[:] = 1
    with pytest.raises(ValueError, match="no query is answered wrong at rank 1"):
        small.next("wrong")
    assert small.query == chosen


def test_distances_are_computed_once_for_each_pair_of_names(small, monkeypatch):
    state = small.open("toytown", IDE).state
    small.open("toytown", DCC)
    assert small.state is not state and small.opened == ["toytown", "toytown"]
    monkeypatch.setattr(module, "from_checkpoint", None)  # would fail if it were called
    assert small.open("toytown", IDE).state is state and small.opened == ["toytown", "toytown"]


def test_pairwise_methods_rank_a_part_and_say_so(small, town):
    small.pairs = 100
    assert not small.open("toytown", IDE).note  # one feature per image: all pairs are cheap
    small.open("toytown", DCC)
    s = small.state
    assert (
        len(s.gallery) < len(town.gallery) and "Ranks count these alone, and flatter" in small.note
    )
    whole = s.method.distances(*(small._states["toytown", IDE].pixels))  # both networks take 128×64
    torch.testing.assert_close(s.dist, whole[s.queries][:, s.gallery], rtol=1e-4, atol=1e-4)
    assert f"{len(s.queries)} of {len(town.query)} queries" in small.note


def test_a_query_outside_the_part_is_ranked_when_it_is_asked(small, town):
    small.open("toytown", DCC)
    s, whole = small.state, small.state.dist.clone()
    s.queries, s.dist = s.queries[::2].copy(), s.dist[::2]
    small.ask(1)
    assert s.queries[-1] == 1 and s.dist.shape == (len(s.queries), len(s.gallery))
    torch.testing.assert_close(s.dist[-1], whole[1], rtol=1e-4, atol=1e-4)
    assert (
        small.rank().first
        == evaluate(whole[1:2], *(x[1:2] for x in ids(town)[:2]), *ids(town)[2:]).first[0]
    )
    assert len(s.scores.first) == len(s.queries)


def labels(answers) -> list[str]:
    return [answer.label for answer in answers]


def test_figures_show_what_the_ranking_says_and_leave_nothing_open(small):
    small.open("toytown", IDE)
    figure, answers = small.figure(4), small.answers(4)
    assert [ax.get_title() for ax in figure.axes[1:]] == labels(answers)
    assert len(answers) == 5 and answers[-1].right, "the first right one stands further down"
    marks = [t.get_text() for ax in figure.axes[1:] for t in ax.texts]
    assert marks == [label.split()[1] for label in labels(answers)] and marks[0] == "✗"
    everything = labels(small.answers(999, left_out=True))
    assert len(everything) == len(small.state.gallery) and any(
        label.startswith("–") for label in everything
    )
    assert len(small.picture(small.answers()[0].place).axes) == 4 and not plt.get_fignums()
    with pytest.raises(ValueError, match="place 999 does not exist"):
        small.picture(999)


def test_all_networks_answer_one_query_and_a_pairwise_one_compares_it_alone(small, town):
    query = small.open("toytown", IDE).query
    found = dict(small.of_all(3))
    assert list(found) == small.checkpoints and labels(found[IDE]) == labels(small.answers(3))
    assert ("toytown", DCC) not in small._states
    assert small.open("toytown", DCC).query == query
    assert [a.row for a in found[DCC]] == [a.row for a in small.answers(3)]
    small.checkpoints = [IDE, DCC]
    figure = small.figure_of_all(2)
    assert [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()] == ["IDE+", "DCCs"]
    assert not plt.get_fignums()


def test_a_network_is_labelled_by_its_profile_and_a_smoke_one_ranks_nothing(small):
    assert small.label(DCC) == "DCCs · toytown, smoke, ranks nothing"
    small.entries[DCC] = {**small.entries[DCC], "profile": "photographs", "title": "no windows"}
    assert small.label(DCC) == "DCC: no windows · toytown, photographs"
    small.entries[DCC] = {"file": "x"}
    assert small.label(DCC) == DCC
    small.open("toytown", IDE)
    assert "profile smoke" in small.standing and "ranks no method" in small.standing
    small.entries[IDE] = {**small.entries[IDE], "profile": "short"}
    assert small.standing == "A network of profile short."


def test_photographs_need_the_word_before_anything_is_read(small):
    small.benchmarks.append("market1501")
    with pytest.raises(
        ValueError, match=r"'toytown' shows nothing of market1501; .*'data', for your own eyes"
    ):
        small.open("market1501", IDE)
    assert small.opened == []
    small.pictures = "data"
    small.open("market1501", IDE)
    assert small.opened == ["market1501"]
    with pytest.raises(ValueError, match="pictures 'all' is unknown"):
        Explorer(pictures="all")
    none = Explorer(pictures="none")
    with pytest.raises(ValueError, match=r"'none' shows nothing of toytown; .*'toytown'"):
        none.open()


def test_unknown_names_are_errors_that_list_the_known(small):
    with pytest.raises(ValueError, match="nothing is open yet"):
        small.rank()
    with pytest.raises(
        ValueError, match="benchmark 'nowhere' is unknown here; take one of toytown"
    ):
        small.open("nowhere")
    with pytest.raises(ValueError, match=f"checkpoint 'bot' is unknown here; take one of .*{DCC}"):
        small.open("toytown", "bot")
    small.open("toytown")
    assert small.state.method.name == IDE  # the first
    for query in (-1, 16):
        with pytest.raises(
            ValueError, match=f"query {query} does not exist; toytown has queries 0 to 15"
        ):
            small.ask(query)


def test_a_query_without_right_answers_in_the_part_is_not_said_to_have_none(
    small, town, monkeypatch
):
    """With twenty queries and more a part is small enough to leave people out; here it leaves out
    all but one.
    """
    same = np.flatnonzero(town.gallery.pids == town.query.pids[0])
    monkeypatch.setattr("reid_repro.lab.rankings.part", lambda *_: (np.array([0]), same))
    small.open("toytown", IDE)
    row = int(np.flatnonzero(town.query.pids != town.query.pids[0])[0])
    assert small.ask(row).first == 0
    right = (
        (town.gallery.pids == town.query.pids[row])
        & (town.gallery.camids != town.query.camids[row])
    ).sum()
    shown = len(small.state.gallery)
    assert (
        f"has no right answer among the {shown} gallery images shown; the full gallery has {right}."
        in small.describe()
    )
    monkeypatch.setattr(small.state, "right", lambda query: 0)
    assert "has no right answer in the gallery." in small.describe()


def test_arguments_of_another_kind_are_refused_by_name(small):
    asked = small.open("toytown", IDE).query
    for query in (1.5, "3", None, True):
        with pytest.raises(
            ValueError, match=f"query {query!r} does not exist; toytown has queries 0 to 15"
        ):
            small.ask(query)
    for count in (1.5, -1):
        with pytest.raises(ValueError, match=f"count must be a whole number from 0, got {count}"):
            small.answers(count)
    with pytest.raises(ValueError, match="place '0' does not exist; the ranking has places 0 to"):
        small.picture("0")
    with pytest.raises(ValueError, match="seed must be a whole number from 0, got -1"):
        small.next("random", -1)
    for name, value in (("pairs", "x"), ("pairs", 0), ("images", float("nan")), ("images", True)):
        with pytest.raises(ValueError, match=f"{name} must be a whole number from 1"):
            Explorer(**{name: value})
    with pytest.raises(ValueError, match="device 'tpu' is unknown"):
        Explorer(device="tpu")
    assert small.query == asked


def test_an_empty_list_says_how_to_fill_it(tmp_path):
    (tmp_path / "weights.json").write_text("{}")
    with pytest.raises(ValueError, match="list is empty: `make checkpoints` fills it"):
        Explorer(folder=tmp_path).open()


# ---------------------------------------------------------------- its controls


@pytest.fixture
def box(town, monkeypatch):
    pytest.importorskip("ipywidgets")
    monkeypatch.setattr(module, "open_benchmark", lambda name, root=None: town)
    return explore(device="cpu")


def buttons(box) -> list:
    return list(box.parts["ranking"].children[1:])


def test_controls_have_names_for_people_and_for_scripts(box):
    import ipywidgets as w

    parts, explorer = box.parts, box.explorer
    assert parts["benchmark"].options == ("toytown",)
    assert (explorer.label(IDE), IDE) in parts["checkpoint"].options
    assert [row for _, row in parts["queries"].options] == explorer.state.worst_first()
    for name, control in parts.items():
        assert f"reid-{name}" in control._dom_classes
        if not isinstance(control, (w.HTML, w.HBox)):
            assert control.description
    for shown in (parts["pair"], parts["ranking"].children[0]):
        assert f'<img alt="Query {explorer.query}' in shown.value
        assert "data:image/png;base64,iVBOR" in shown.value
    for n, (button, answer) in enumerate(zip(buttons(box), explorer.answers(), strict=True)):
        person = f"person {answer.person}, cam {answer.camera}"
        assert button.description == f"{answer.label}\n{person}"
        assert answer.words in button.tooltip
        assert f"-{n} {{border" in parts["look"].value


def test_controls_do_what_the_explorer_does(box):
    parts, explorer = box.parts, box.explorer
    for kind in ("wrong", "right", "random"):
        before = parts["look"].value, parts["pair"].value, explorer.query
        parts[kind].click()
        assert parts["number"].value == parts["queries"].value == explorer.query
        assert parts["status"].value.startswith(f"Query {explorer.query},")
        shown = [button.description.partition("\n")[0] for button in buttons(box)]
        assert shown == labels(explorer.answers())
        assert (
            explorer.query == before[2] or (parts["look"].value, parts["pair"].value) != before[:2]
        )
    parts["number"].value = 5
    assert explorer.query == 5
    parts["queries"].value = 7
    assert explorer.query == 7 == parts["number"].value
    pair = parts["pair"].value
    buttons(box)[2].click()
    answer = explorer.answers()[2]
    assert parts["pair"].value != pair and f"distance {answer.distance:.3f}" in parts["words"].value
    assert ["reid-picked" in button._dom_classes for button in buttons(box)[:4]] == [
        False, False, True, False,
    ]
    parts["left-out"].value = True
    shown = [button.description.partition("\n")[0] for button in buttons(box)]
    assert shown == labels(explorer.answers(8, True))
    parts["checkpoint"].value = DCC
    assert explorer.state.method.name == DCC and not plt.get_fignums()
    assert explorer.query == 7, "the query is kept"
    assert explorer.describe() in parts["status"].value
    assert "ranks no method" in parts["status"].value


def test_all_networks_stand_in_rows_until_another_query_is_asked(box):
    parts, explorer = box.parts, box.explorer
    explorer.checkpoints = [IDE, DCC]
    parts["all"].click()
    for name, answers in explorer.of_all():
        assert explorer.label(name) in parts["rows"].value
        for answer in answers:
            assert f"{answer.label}: {answer.words}" in parts["rows"].value
    assert not parts["rows"].value.endswith("…</p>")
    parts["number"].value = (explorer.query + 1) % 16
    assert parts["rows"].value == ""


def test_no_click_is_lost_while_another_thread_draws(box, monkeypatch):
    "JupyterLab hands clicks to more than one thread of the kernel."
    parts, explorer = box.parts, box.explorer
    drawing, clicked = threading.Event(), threading.Event()
    picture = explorer.picture

    def slow(place):
        drawing.set()
        clicked.wait(0.5)
        return picture(place)

    monkeypatch.setattr(explorer, "picture", slow)
    row = (explorer.query + 1) % 10
    first = threading.Thread(target=setattr, args=(parts["number"], "value", row))
    first.start()
    drawing.wait()
    parts["left-out"].value = not parts["left-out"].value
    clicked.set()
    first.join()
    assert explorer.query == row
    shown = [button.description.partition("\n")[0] for button in buttons(box)]
    assert shown == labels(explorer.answers(8, parts["left-out"].value))


def test_an_error_stands_on_the_screen_and_not_in_a_traceback(box):
    box.explorer.state.scores.first[:] = 1
    before = box.parts["look"].value
    box.parts["wrong"].click()
    assert (
        box.parts["status"].value == "✗ no query is answered wrong at rank 1"
        and box.parts["look"].value == before
    )
    box.parts["right"].click()
    assert box.parts["status"].value.startswith("Query")


def test_after_a_failed_switch_the_lists_show_what_is_open(box, monkeypatch):
    parts, explorer = box.parts, box.explorer
    before, names = parts["look"].value, [name for _, name in parts["checkpoint"].options]
    index = names.index(DCC)

    def broken(name, *_):
        raise OSError("weights cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(module, "from_checkpoint", broken)
        parts["checkpoint"].set_state({"index": index})  # as the browser does
    assert (
        parts["checkpoint"].value == IDE == explorer.state.method.name
        and parts["benchmark"].value == "toytown"
    )
    assert parts["status"].value == "✗ weights cannot be read" and parts["look"].value == before
    parts["checkpoint"].set_state({"index": index})
    assert parts["checkpoint"].value == DCC == explorer.state.method.name and parts[
        "status"
    ].value.startswith("Query")


# ---------------------------------------------------------------- its one cell

TOOL = Path(__file__).resolve().parents[2] / "nbs/6_comparison/05_explorer.ipynb"


def test_the_tool_opens_on_a_fresh_kernel_from_its_one_cell():
    "Nothing but the last code cell is run; how long it takes is measured by ci/bench/imports.py."
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipywidgets")
    cell = [c for c in nbformat.read(TOOL, 4).cells if c.cell_type == "code"][-1]
    open_benchmark("toytown")  # rendered once for each machine
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.source)])
    done = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    kinds = [kind for output in done.cells[0].outputs for kind in output.get("data", {})]
    assert "application/vnd.jupyter.widget-view+json" in kinds
