"""The explorer without a browser: rankings that agree with the evaluation, parts that keep right
answers, photographs only on request.
"""

import threading

import matplotlib.pyplot as plt
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
        shown = [ranking.verdicts[n] for n in small.shown(5)]
        assert None not in shown and [int(label.split()[0]) for label in small.labels(5)] == [
            1, 2, 3, 4, 5,
        ]
        assert [label.split()[1] for label in small.labels(5)] == [
            "✓" if verdict else "✗" for verdict in shown
        ]
    assert f"rank-1 {100 * expected.rank(1):.1f} %" in small.describe() and not small.note


def test_next_goes_round_through_wrong_and_right_answers(small, town):
    first = evaluate(small.open("toytown", IDE).state.dist, *ids(town)).first
    for kind, rows in (("wrong", np.flatnonzero(first > 1)), ("right", np.flatnonzero(first == 1))):
        assert len(rows) > 1
        small.ask(int(rows[-1]))
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


def test_figures_show_what_the_ranking_says_and_leave_nothing_open(small):
    small.open("toytown", IDE).next("wrong")
    figure = small.figure(4)
    assert len(figure.axes) == 5 and [ax.get_title() for ax in figure.axes[1:]] == small.labels(4)
    marks = [t.get_text() for ax in figure.axes[1:] for t in ax.texts]
    assert marks == [label.split()[1] for label in small.labels(4)] and marks[0] == "✗"
    everything = small.labels(99, left_out=True)
    assert len(everything) == len(small.state.gallery) and any(
        label.startswith("–") for label in everything
    )
    assert len(small.picture(small.shown()[0]).axes) == 4 and not plt.get_fignums()
    with pytest.raises(ValueError, match="place 999 does not exist"):
        small.picture(999)


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
    small.open("toytown", IDE)
    for query in (1.5, "3", None, True):
        with pytest.raises(
            ValueError, match=f"query {query!r} does not exist; toytown has queries 0 to 15"
        ):
            small.ask(query)
    for count in (1.5, -1):
        with pytest.raises(ValueError, match=f"count must be a whole number from 0, got {count}"):
            small.shown(count)
    with pytest.raises(ValueError, match="place '0' does not exist; the ranking has places 0 to"):
        small.picture("0")
    with pytest.raises(ValueError, match="seed must be a whole number from 0, got -1"):
        small.next("random", -1)
    for name, value in (("pairs", "x"), ("pairs", 0), ("images", float("nan")), ("images", True)):
        with pytest.raises(ValueError, match=f"{name} must be a whole number from 1"):
            Explorer(**{name: value})
    with pytest.raises(ValueError, match="device 'tpu' is unknown"):
        Explorer(device="tpu")
    assert small.query == 0


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


def test_controls_have_names_for_people_and_for_scripts(box):
    import ipywidgets as w

    assert box.parts["benchmark"].options == ("toytown",) and IDE in box.parts["checkpoint"].options
    for name, control in box.parts.items():
        assert f"reid-{name}" in control._dom_classes
        if name in ("ranking", "pair"):
            assert (
                control.value.startswith('<img alt="Query 0')
                and "data:image/png;base64,iVBOR" in control.value
            )
        elif not isinstance(control, w.HTML):
            assert control.description


def test_controls_do_what_the_explorer_does(box):
    parts, explorer = box.parts, box.explorer
    for kind in ("wrong", "right", "random"):
        before = parts["ranking"].value, parts["pair"].value, explorer.query
        parts[kind].click()
        assert parts["number"].value == explorer.query and parts["status"].value.startswith(
            f"Query {explorer.query},"
        )
        assert [label for label, _ in parts["answers"].options] == explorer.labels()
        assert (
            explorer.query == before[2]
            or (parts["ranking"].value, parts["pair"].value) != before[:2]
        )
    parts["number"].value = 5
    assert explorer.query == 5
    pair = parts["pair"].value
    parts["answers"].value = parts["answers"].options[2][1]
    assert (
        parts["pair"].value != pair
        and f"distance {explorer.labels()[2].split()[2]}" in parts["words"].value
    )
    parts["left-out"].value = True
    assert [label for label, _ in parts["answers"].options] == explorer.labels(8, True)
    parts["checkpoint"].value = DCC
    assert explorer.state.method.name == DCC and not plt.get_fignums()
    assert explorer.describe() in parts["status"].value


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
    assert [label for label, _ in parts["answers"].options] == explorer.labels(
        8, parts["left-out"].value
    )


def test_an_error_stands_on_the_screen_and_not_in_a_traceback(box):
    box.explorer.state.scores.first[:] = 1
    before = box.parts["ranking"].value
    box.parts["wrong"].click()
    assert (
        box.parts["status"].value == "✗ no query is answered wrong at rank 1"
        and box.parts["ranking"].value == before
    )
    box.parts["right"].click()
    assert box.parts["status"].value.startswith("Query")


def test_after_a_failed_switch_the_lists_show_what_is_open(box, monkeypatch):
    parts, explorer = box.parts, box.explorer
    before, index = parts["ranking"].value, parts["checkpoint"].options.index(DCC)

    def broken(name, *_):
        raise OSError("weights cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(module, "from_checkpoint", broken)
        parts["checkpoint"].set_state({"index": index})  # as the browser does
    assert (
        parts["checkpoint"].value == IDE == explorer.state.method.name
        and parts["benchmark"].value == "toytown"
    )
    assert parts["status"].value == "✗ weights cannot be read" and parts["ranking"].value == before
    parts["checkpoint"].set_state({"index": index})
    assert parts["checkpoint"].value == DCC == explorer.state.method.name and parts[
        "status"
    ].value.startswith("Query")
