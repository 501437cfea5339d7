"""Protocols: what is asked, how it is pooled, averaged over splits, and what a run's configuration
makes of it.
"""

import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from reid_repro.datasets import (
    Benchmark, Split, benchmark_names, open_benchmark, unsupported_reason,
)
from reid_repro.evaluation import distance_matrix, evaluate, single_shot
from reid_repro.evaluation.large_galleries import evaluate_features
from reid_repro.evaluation.protocols import (
    PROTOCOLS, check_search, mistakes, over_splits, pool_queries, protocol_of, score_distances,
    score_features,
)
from reid_repro.evaluation.reranking import expand_queries, rerank
from reid_repro.lab.ledger import SEARCH, computed_parameters
from reid_repro.lab.runs import load_pixels, open_data, record, run_key, show_answers


def made(name, people=12, per_view=3, seed=0):
    "A benchmark of unread files and features of its query (view 1) and gallery (view 2)."
    rng = np.random.default_rng(seed)
    pids, camids = (
        ids.ravel()
        for ids in np.meshgrid(np.arange(1, people + 1), np.repeat([1, 2], per_view), indexing="ij")
    )
    everyone = Split("everyone", tuple(f"{i}.png" for i in range(len(pids))), pids, camids)
    features = torch.from_numpy(
        rng.normal(size=(people, 8))[pids - 1] + rng.normal(size=(len(pids), 8))
    )
    train = Split("train", ("a.png", "b.png"), [people + 1, people + 2], [1, 1])
    lists = train, everyone.subset(camids == 1, "query"), everyone.subset(camids == 2, "gallery")
    return (
        Benchmark(name, None, protocol_of(name).scoring, *lists), features[camids == 1],
        features[camids == 2],
    )


def ids(benchmark):
    return (
        benchmark.query.pids, benchmark.query.camids, benchmark.gallery.pids,
        benchmark.gallery.camids,
    )


def test_every_readable_benchmark_has_one_protocol():
    names = [name for protocol in PROTOCOLS for name in protocol.benchmarks]
    assert sorted(names) == sorted(
        name for name in benchmark_names().index if not unsupported_reason(name)
    )
    with pytest.raises(ValueError, match="'cuhk03' has no protocol; known are toytown"):
        protocol_of("cuhk03")


@pytest.mark.parametrize(
    "name,splits,trials",
    [
        ("market1501", 1, 0), ("cuhk03-np-labelled", 1, 0), ("cuhk03-classic-labelled", 20, 10),
        ("cuhk03-1160-detected", 10, 10), ("viper", 10, 1),
    ],
)
def test_how_often_a_protocol_asks(name, splits, trials):
    protocol = protocol_of(name)
    assert (protocol.splits, protocol.trials) == (splits, trials)


def test_answer_scores_as_the_functions_below_it():
    benchmark, q, g = made("cuhk03-np-detected")
    dist = distance_matrix(q, g)
    plain = score_features(benchmark, q, g)
    assert (
        plain.dist.equal(dist)
        and plain.rows.tolist() == list(range(len(q)))
        and plain.query is benchmark.query
    )
    np.testing.assert_array_equal(plain.scores.ap, evaluate(dist, *ids(benchmark)).ap)
    np.testing.assert_array_equal(plain.scores.ap, evaluate_features(q, g, *ids(benchmark)).ap)
    classic = made("cuhk03-classic-detected")[0]
    assert (
        score_features(classic, q, g).scores.mAP
        == single_shot(dist, *ids(classic), trials=10).mAP
        != plain.scores.mAP
    )
    assert len(score_features(made("viper")[0], q, g).scores.trials) == 1


def test_expansion_and_reranking_are_what_they_are_called():
    benchmark, q, g = made("cuhk03-np-detected")
    assert score_features(benchmark, q, g, expand=2).dist.equal(
        distance_matrix(expand_queries(q, g, k=2), g)
    )
    assert score_features(benchmark, q, g, reranked=True).dist.equal(rerank(q, g))
    both = score_features(benchmark, q, g, expand=2, reranked=True).dist
    assert both.equal(rerank(expand_queries(q, g, k=2), g)) and not both.equal(rerank(q, g))


def test_multi_query_pools_boxes_of_a_person_and_camera():
    split = Split("query", tuple(f"{i}.jpg" for i in range(5)), [9, 4, 9, 4, 9], [1, 1, 1, 2, 2])
    features = torch.tensor([[1.0, 0], [0, 2], [0, 3], [5, 0], [1, 1]])
    pooled, asked, rows = pool_queries(features, split)
    assert list(zip(asked.pids, asked.camids)) == [
        (4, 1), (4, 2), (9, 1), (9, 2),
    ] and rows.tolist() == [1, 3, 0, 4]
    torch.testing.assert_close(
        pooled, torch.tensor([[0, 1], [1, 0], [0.5, 0.5], [0.5**0.5, 0.5**0.5]])
    )
    longer = features * torch.tensor([[1.0], [7], [100], [1], [1]])  # a box's length has no say
    torch.testing.assert_close(pool_queries(longer, split)[0], pooled)


def test_multi_query_answers_once_per_person_and_camera():
    benchmark, q, g = made("market1501-multi-query")
    answers = score_features(benchmark, q, g)
    assert answers.scores.queries == 12 and answers.dist.shape == (12, 36)
    single = score_features(made("market1501")[0], q, g)
    # three boxes know more than one
    assert single.scores.queries == 36 and answers.scores.mAP > single.scores.mAP


@pytest.mark.parametrize(
    "change,told",
    [
        (
            {"query": slice(1, None)},
            "query has 35 features, cuhk03-np-detected has 36 images there",
        ),
        ({"gallery": slice(0, 3)}, "gallery has 3 features"),
        ({"expand": -1}, "expand must be at least 0"), ({"expand": 99}, "expand = 99"),
    ],
)
def test_what_does_not_fit_is_refused(change, told):
    benchmark, q, g = made("cuhk03-np-detected")
    with pytest.raises(ValueError, match=told):
        score_features(
            benchmark, q[change.get("query", slice(None))], g[change.get("gallery", slice(None))],
            change.get("expand", 0),
        )


def test_distances_of_pairs_are_scored_alike():
    benchmark, q, g = made("cuhk03-classic-detected")
    answers, dist = score_features(benchmark, q, g), distance_matrix(q, g)
    assert score_distances(benchmark, dist).scores.mAP == answers.scores.mAP
    with pytest.raises(
        ValueError, match=r"shape \(36, 35\), cuhk03-classic-detected needs \(36, 36\)"
    ):
        score_distances(benchmark, dist[:, 1:])
    with pytest.raises(ValueError, match="single queries"):
        score_distances(made("market1501-multi-query")[0], dist)


def test_mistakes_one_query_after_the_other():
    """Distances of few levels, so that right and wrong images tie; junk, distractors, images of the
    query's own camera, and a person whom nobody else photographed.
    """
    rng = np.random.default_rng(3)
    benchmark, _, _ = made("market1501")
    pids, camids = benchmark.gallery.pids.copy(), rng.integers(1, 3, len(benchmark.gallery))
    pids[:4], pids[4:8], pids[pids == 12] = -1, 0, 11
    gallery = Split("gallery", benchmark.gallery.paths, pids, camids)
    benchmark = Benchmark("market1501", None, "single-query", benchmark.train, benchmark.query, gallery)
    dist = torch.from_numpy(rng.integers(1, 5, (len(benchmark.query), len(gallery)))).float()
    answers = score_distances(benchmark, dist)
    expected = []
    for row, (person, camera) in enumerate(zip(benchmark.query.pids, benchmark.query.camids)):
        right, wrong = [], []
        for column, (pid, camid) in enumerate(zip(pids, camids)):
            if pid == -1 or (pid == person and camid == camera):
                continue
            (right if pid == person else wrong).append((float(dist[row, column]), column))
        if right and min(wrong)[0] <= min(right)[0]:
            expected.append((row, min(wrong)[1], min(right)[1]))
    assert 5 < len(expected) < len(benchmark.query) - 3
    assert mistakes(benchmark, answers).tolist() == [list(rows) for rows in expected]


def test_over_splits_is_mean_and_deviation_between_splits():
    scores = [score_features(*made("cuhk03-classic-detected", seed=seed)).scores for seed in range(4)]
    together = over_splits(scores)
    ranks = [np.mean([t.rank(1) for t in s.trials]) for s in scores]
    assert together.rank(1) == pytest.approx(np.mean(ranks)) and together.deviation(
        1
    ) == pytest.approx(np.std(ranks, ddof=1))
    assert together.mAP == pytest.approx(np.mean([s.mAP for s in scores]))
    assert "(4 splits)" in repr(together) and np.isnan(over_splits(scores[:1]).deviation(1))
    with pytest.raises(ValueError, match="no scores"):
        over_splits([])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two made benchmarks side by side: VIPeR and the new protocol's CUHK03, whose people have a
    colour of their own.
    """
    top, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for person in range(632):
        for camera in "ab":
            path = top / "VIPeR" / f"cam_{camera}" / f"{person:03d}_45.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 8), tuple(int(c) for c in rng.integers(0, 255, 3))).save(path)
    return top


def config(**change):
    given = dict(
        row="ide", title="IDE", dataset="toytown", data_root="", profile="smoke", seed=0, epochs=0,
        conditions=["made"], height=16, width=8, device="cpu", pictures="toytown", source="",
        expand=0, rerank=False,
    )
    return SimpleNamespace(**given | change)


def test_the_seed_of_a_run_is_the_number_of_its_split(folder, tmp_path):
    halves = [
        open_data(config(dataset="viper", data_root=str(folder), seed=seed)) for seed in (0, 3, 3)
    ]
    assert [b.division for b in halves] == ["random half 0", "random half 3", "random half 3"]
    assert halves[0].fingerprint != halves[1].fingerprint == halves[2].fingerprint
    given = config(dataset="viper", data_root=str(folder), seed=3)
    _, query, gallery = load_pixels(halves[1], given)
    answers = score_features(halves[1], *(x.float().flatten(1) + 1 for x in (query, gallery)))
    entry = json.loads(
        record("ide", given, halves[1], answers.scores, [], tmp_path, 0.0).read_text()
    )
    assert (
        entry["split"].startswith("random half 3: 632/316/316")
        and entry["counts"]["trials"] == 1
        and entry["protocol"] == "single-shot"
    )


def test_a_run_may_train_on_another_benchmark(folder):
    both = open_data(config(dataset="viper", data_root=str(folder), source="toytown", seed=1))
    assert (
        both.name == "viper"
        and both.division == "random half 1"
        and "trained on toytown" in both.conditions
    )
    town = open_data(config())
    assert len(both.train) == len(town.train) and (both.train.labels == town.train.labels).all()
    # its own people are no other domain
    assert open_data(config(source="toytown")).fingerprint == town.fingerprint


def test_a_run_of_no_epochs_decodes_no_training_images():
    town = open_data(config())
    train, query, _ = load_pixels(town, config())
    assert len(train) == 0 and len(query) == len(town.query)
    assert len(load_pixels(town, config(epochs=1))[0]) == len(town.train)


def test_answers_of_pooled_queries_show_the_first_box():
    town = open_data(config())
    given = config()
    _, query, gallery = load_pixels(town, given)
    answers = score_features(town, query.float().flatten(1) + 1, gallery.float().flatten(1) + 1)
    assert len(show_answers(given, town, answers, query, gallery, each=1)) == 2
    assert show_answers(config(pictures="none"), town, answers, query, gallery) == []


def test_the_splits_of_a_protocol_are_one_line_of_a_table():
    from reid_repro.lab.results import _groups
    import pandas as pd

    run = dict(
        dataset="cuhk03-classic-detected", profile="short", conditions=["made"], epochs=0,
        parameters={"seed": 0},
    )
    runs = [
        run
        | dict(
            split=f"seeded split {n}: {n}/5/5 images", fingerprint=str(n), parameters={"seed": n}
        )
        for n in range(12)
    ]
    assert [len(group) for group, _ in _groups(pd.DataFrame(runs))] == [12]
    published = run | dict(split="published split 0: 0/5/5 images", fingerprint="0")
    # another kind of division
    assert sorted(len(group) for group, _ in _groups(pd.DataFrame([*runs, published]))) == [1, 12]
    # other data without a division: not averaged
    whole = [run | dict(split="9/5/5 images", fingerprint=str(n)) for n in range(2)]
    assert [len(group) for group, _ in _groups(pd.DataFrame(whole))] == [1, 1]


@pytest.mark.parametrize("options", [dict(k1=7, k2=3), dict(k1=4, k2=1, lam=0.0), dict(lam=1)])
def test_re_ranking_is_told_its_neighbours(options):
    benchmark, q, g = made("viper")
    answers = score_features(benchmark, q, g, reranked=True, **options)
    assert answers.dist.equal(rerank(q, g, **options))
    expanded = score_features(benchmark, q, g, expand=2, alpha=0.5).dist
    assert expanded.equal(distance_matrix(expand_queries(q, g, k=2, alpha=0.5), g))


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(reranked=True, k1=10**4), r"k1 = 10000, but there are only \d+ images.*give"),
        (dict(reranked=True, k2=10**4), "k2 = 10000"), (dict(reranked=True, k1=0), "k1 must be"),
        (dict(reranked=True, lam=1.5), "lam must be a number in 0…1"),
        (dict(expand=10**4), r"expand = 10000, but the gallery has \d+ images"),
        (dict(expand=2, alpha=-1.0), "alpha must be"), (dict(expand=-1), "expand must be"),
        (dict(expand="2"), "expand must be a whole number from 0, got '2'"),
        (dict(expand=None), "expand must be"), (dict(expand=True), "expand must be"),
        (dict(reranked="False"), "reranked must be True or False, got 'False'"),
        (dict(reranked=1), "reranked must be"), (dict(reranked=None), "reranked must be"),
    ],
)
@pytest.mark.parametrize("name", ["viper", "market1501-multi-query"])
def test_what_does_not_fit_the_lists_is_told_without_features(name, options, words):
    benchmark, q, g = made(name)
    with pytest.raises(ValueError, match=words):
        check_search(benchmark, **options)
    with pytest.raises(ValueError, match=words):
        score_features(benchmark, q, g, **options)
    check_search(benchmark, k1=10**4, alpha=-1.0)  # of no matter where neither is asked for


def test_a_run_is_told_before_it_trains_and_older_entries_compare_equal(folder):
    few = dict(dataset="viper", data_root=str(folder), rerank=True)
    with pytest.raises(ValueError, match=r"k1 = 2000, but there are only .* images"):
        open_data(config(**few, k1=2000, k2=3, lam=0.3, alpha=3.0))
    benchmark = open_data(config(**few, k1=3, k2=2, lam=0.5, alpha=3.0))
    # a checkpoint from before goes on, and one training serves several searches
    old, new = config(**few), config(**few, k1=3, k2=2)
    assert run_key(old, benchmark) == run_key(new, benchmark)
    assert computed_parameters(vars(old)) == computed_parameters(vars(old) | SEARCH)
    assert computed_parameters(vars(old)) != computed_parameters(vars(new))


def test_a_name_in_place_of_a_benchmark_and_a_root_that_is_no_path_are_named():
    with pytest.raises(ValueError, match=r"the name 'viper'; give open_benchmark\('viper'\)"):
        score_features("viper", torch.ones(2, 3), torch.ones(2, 3))
    for root in (b"/data", 3):
        with pytest.raises(ValueError, match=f"root is {root!r}; give a folder's path"):
            open_benchmark("market1501", root)


@pytest.mark.parametrize("people", [2, 4])
def test_few_images_under_the_usual_neighbours_are_told(people):
    benchmark, q, g = made("viper", people=people, per_view=2)
    words = f"k1 = 20, but there are only {4 * people} images.*give {4 * people - 1}"
    with pytest.raises(ValueError, match=words):
        check_search(benchmark, reranked=True)
    with pytest.raises(ValueError, match=words):
        rerank(q, g)
    assert rerank(q, g, k1=4 * people - 1, k2=3).shape == (2 * people, 2 * people)


def test_without_cameras_every_door_scores_alike():
    benchmark, q, g = made("viper")
    q_pids, q_camids, g_pids, g_camids = ids(benchmark)
    dist = distance_matrix(q, g)
    alone, apart = (q_pids, None, g_pids, None), (q_pids, q_camids, g_pids, g_camids)
    assert single_shot(dist, *alone).mAP == single_shot(dist, *apart).mAP
    assert evaluate_features(q, g, *alone).mAP == evaluate(dist, *apart).mAP
    for function, given in ((single_shot, (dist,)), (evaluate_features, (q, g))):
        with pytest.raises(ValueError, match="g_camids is None but q_camids is not"):
            function(*given, q_pids, q_camids, g_pids, None)


def test_a_notebooks_parameter_scores_own_photographs_without_cameras(tmp_path):
    table = ["path,identity"]
    for number in range(16):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (4, 8), (number, 40, 90)).save(path)
        table.append(f"{path.name},{number // 4}")
    (tmp_path / "photographs.csv").write_text("\n".join(table))
    given = dict(dataset="photographs-without-cameras", data_root=str(tmp_path))
    with pytest.warns(UserWarning, match="identity 0 means distractors"):
        benchmark = open_data(config(**given))
    assert benchmark.conditions == ("scored without cameras",) and len(benchmark.query) >= 1
    with pytest.raises(ValueError, match=r"k1 = 20, but there are only \d+ images"), \
            warnings.catch_warnings():
        warnings.simplefilter("ignore")
        open_data(config(**given | dict(rerank=True)))
    with pytest.raises(ValueError, match="no column 'camera'"):
        open_data(config(**given | dict(dataset="photographs")))


def test_the_python_of_the_documentation_runs():
    text = (Path(__file__).resolve().parents[2] / "docs" / "running.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    benchmark, q, g = made("market1501")
    exec(block, {"benchmark": benchmark, "query_features": q, "gallery_features": g})
