"""Verdicts and comparisons from made ledgers: what must be found, what must be refused, and what
may not stand beside what.
"""

import shutil
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from reid_repro.lab import claims as module
from reid_repro.lab.claim_list import Claim, paper_gain, read_claims
from reid_repro.lab.claims import judge, verdict_figure, verdict_table, verdicts, verdicts_in_short
from reid_repro.lab.compare import (
    ROWS, SearchCost, comparisons, leaderboard, leaderboard_table, search_cost, training_figure,
)
from reid_repro.lab.ledger import read_ledger
from reid_repro.lab.provenance import project_root
from reid_repro.lab.report import acts
from reid_repro.lab.results import reported
from reid_repro.lab.rows import read_profile, read_rows
from reid_repro.lab.studies import Gain, holm, study_figure

ROOT = project_root()
CLAIMS = {claim.name: claim for claim in read_claims()}
WHOLE, FINER = CLAIMS["ianet_whole"], CLAIMS["can_finer"]
TOWNS = np.random.default_rng(9).normal(40, 7, 99)


@cache
def rows_of(paper):
    return {row.name: row for row in read_rows(paper)}


def runs(
    paper, row, lift=0.0, seeds=range(6), wall=100.0, noise=0.5, seed=0, where=("toytown", "study"),
    fields=None, **change,
):
    """Made entries of a row: the town's own level, the row's lift, a little noise; `change` alters
    parameters, `fields` the entry.
    """
    rng = np.random.default_rng([seed, *row.encode()])
    own = read_profile(where[1]).papers.get(f"{paper}/{row}", {}) | rows_of(paper)[row].set
    parameters = {"row": row, "lr": 0.003, "epochs": 40, "stages": []} | own | change
    entry = dict(
        paper=paper, row=row, title=row, dataset=where[0], protocol="single-query",
        split="standard", profile=where[1], conditions=[], epochs=parameters["epochs"],
        device="cpu", wall_seconds=wall, peak_memory_mib=900.0,
    ) | (fields or {})
    return pd.DataFrame(
        [
            {
                **entry, "seed": s, "fingerprint": entry.get("fingerprint", f"town{s}"),
                "rank1": 50.0, "mAP": TOWNS[s] + lift + rng.normal(0, noise),
                "parameters": {**parameters, "seed": s},
            }
            for s in seeds
        ]
    )


def claim_of(name, contrast, **more):
    "A claim about IANet's rows that no paper makes."
    fields = {"paper": "ianet", "claim": "made", "where": "nowhere", "metric": "mAP"}
    return Claim(name=name, contrast=contrast, **fields, **more)


def study(lift=3.0, seed=0, noise=0.5, **ianet):
    "IANet, its baseline and the longer one."
    rows = {"ianet": ianet.pop("wall", 145.0), "base": 100.0, "base_longer": 150.0}
    made = [
        runs(
            "ianet", row, lift * (row == "ianet"), wall=wall, seed=seed, noise=noise,
            **(ianet if row == "ianet" else {}),
        )
        for row, wall in rows.items()
    ]
    return pd.concat(made, ignore_index=True)


# ---------------------------------------------------------------- one verdict


@pytest.mark.parametrize(
    "lift, noise, word",
    [
        (3.0, 0.5, "held"), (-3.0, 0.5, "did not hold"), (0.0, 0.5, "smaller than printed"),
        (0.0, 4.0, "inconclusive"),
    ],
)
def test_an_effect_is_found_and_its_absence_is_told_from_too_wide_an_interval(lift, noise, word):
    found = judge(WHOLE, study(lift, seed=2, noise=noise))
    assert (
        found.word == word
        and found.tested
        and found.over == "base_longer"
        and found.gain.pairs == 6
    )
    assert found.p == pytest.approx(found.gain.p) and (found.p < 0.05) == (
        word in ("held", "did not hold")
    )


def test_smaller_than_printed_excludes_a_point_and_the_papers_own_gain():
    """By hand: the interval of the difference must lie below min(printed, 1), and a paper without a
    number has no such word.
    """
    seen = set()
    for seed in range(30):
        noise = 0.2 + 0.1 * seed
        found = judge(WHOLE, study(0.3, seed=seed, noise=noise))
        upper = found.gain.mean + found.gain.half_width
        if found.word not in ("held", "did not hold"):
            assert (found.word == "smaller than printed") == (
                upper < module.SMALL < found.printed
            ), (found.gain, found.word)
        seen.add(found.word)
    assert {"smaller than printed", "inconclusive"} <= seen
    small = claim_of("small", {"ianet": 1, "base": -1}, equal={"base": "base_longer"})
    assert (
        judge(small, study(0.0, seed=2)).printed is None
        and judge(small, study(0.0, seed=2)).word == "inconclusive"
    )
    # above zero without doubt: held, however small
    tight = judge(WHOLE, study(0.7, seed=3, noise=0.05))
    assert tight.word == "held"


def test_smaller_than_printed_minds_a_small_printed_gain_and_the_number_of_claims():
    def word(gain, printed=6.0, claims=1):
        found = replace(judge(WHOLE, study(0.0, seed=2)), gain=gain, printed=printed)
        return module._settle([found] * claims)[0].word

    # up to 0.7: below one point, but the paper prints half a point
    assert word(Gain(0.1, 0.6, 6)) == "smaller than printed"
    assert word(Gain(0.1, 0.6, 6), printed=0.5) == "inconclusive"
    # up to 0.95: excluded at 95 % once, not for five claims together
    assert word(Gain(0.1, 0.85, 6)) == "smaller than printed"
    assert word(Gain(0.1, 0.85, 6), claims=5) == "inconclusive"


def test_the_training_time_is_cpu_seconds_where_all_runs_have_them():
    made = study(3.0)
    made["cpu_seconds"] = made["row"].map({"ianet": 100.0, "base": 60.0, "base_longer": 95.0})
    assert judge(WHOLE, made).ratio == pytest.approx(0.95) and judge(WHOLE, made).word == "held"
    made.loc[0, "cpu_seconds"] = np.nan  # one run of before: seconds for all
    assert judge(WHOLE, made).ratio == pytest.approx(150 / 145)


def test_what_several_rows_cost_is_what_they_took_together():
    assert module._cost(study(wall=145.0), ["ianet", "base"]) == pytest.approx(245)


def test_no_effect_is_called_one_in_one_of_twenty_studies_at_most():
    words = [judge(WHOLE, study(0.0, seed=seed)).word for seed in range(60)]
    # 95 % of 60, less two and a half deviations
    assert words.count("inconclusive") + words.count("smaller than printed") >= 53


def test_swapping_the_rows_flips_the_verdict():
    other = {"held": "did not hold", "did not hold": "held", "inconclusive": "inconclusive"}
    plain = claim_of("plain", {"ianet": 1, "base": -1})
    swapped = claim_of("swapped", {"ianet": -1, "base": 1})
    seen = set()
    for seed in range(20):
        made = study(
            np.random.default_rng(seed).choice([-2, -0.5, 0, 0.5, 2]), seed=seed, wall=100.0
        )
        first, second = judge(plain, made), judge(swapped, made)
        assert second.word == other[first.word] and second.gain.mean == pytest.approx(
            -first.gain.mean
        )
        assert second.p == pytest.approx(first.p)
        seen.add(first.word)
    assert seen == set(other)


def test_a_contrast_of_four_rows_is_the_sum_over_seeds():
    lifts = {"part_1357_ca": 5.0, "part_1357": 2.0, "part_123_ca": 1.0, "part_123": 1.5}
    made = pd.concat(
        [runs("can", row, lift, seed=3) for row, lift in lifts.items()], ignore_index=True
    )
    score = {(row, s): mAP for row, s, mAP in zip(made["row"], made["seed"], made["mAP"])}
    by_hand = [
        score["part_1357_ca", s]
        - score["part_1357", s]
        - (score["part_123_ca", s] - score["part_123", s])
        for s in range(6)
    ]
    found = judge(FINER, made)
    oracle = stats.ttest_1samp(by_hand, 0)
    assert (
        found.word == "held"
        and found.gain.mean == pytest.approx(np.mean(by_hand))
        and found.gain.p == pytest.approx(oracle.pvalue)
    )
    low, high = oracle.confidence_interval(0.95)
    assert (found.gain.mean - found.gain.half_width, found.gain.mean + found.gain.half_width) == pytest.approx(
        (low, high)
    )


def test_too_few_seeds_test_nothing_however_large_the_difference():
    found = judge(WHOLE, study(30.0, seeds=range(4)))
    assert (found.word, found.tested, found.gain.pairs) == (
        "not tested", False, 4,
    ) and found.why == "4 seeds, 5 are needed"
    assert judge(WHOLE, study(30.0, seeds=range(5))).word == "held"
    assert judge(WHOLE, study(30.0, seeds=range(50, 60))).why == "no seed that all rows share"


@pytest.mark.parametrize("change, named", [
    (dict(lr=0.01), "lr 0.01 and 0.003"),
    (dict(batch_size=64), "batch_size 64 and absent"),
    (dict(epochs=80), "epochs 80 and 60"),  # the longer baseline's 60 are its own, 80 are nobody's
    (dict(stages=[3]), "stages [3] and []"),  # not what the row of that name is
    (dict(fields={"fingerprint": "another town"}), "fingerprint of the same seed"),
    (dict(fields={"protocol": "multi-query"}), "protocol"),
    (dict(fields={"split": "another"}), "split of the same seed"),
    (dict(fields={"conditions": ["stopped after 2 steps"]}), "conditions of the same seed"),
])
def test_unequal_conditions_are_refused_without_a_number(change, named):
    made = study(3.0, **change)
    found = judge(WHOLE, made)
    assert found.word == "not tested" and found.gain is None and not found.tested
    assert named in found.why, found.why


def test_epochs_in_the_conditions_are_compared_as_a_parameter():
    told = lambda n: {
        "conditions": [f"resnet50 at 128×64, {n} epochs, short profile", "small images"]
    }
    made = pd.concat(
        [
            runs("ianet", "ianet", 3, wall=145, fields=told(40)),
            runs("ianet", "base", fields=told(40)),
            runs("ianet", "base_longer", wall=150, fields=told(60)),
        ],
        ignore_index=True,
    )
    assert judge(WHOLE, made).word == "held"


def test_a_cheaper_baseline_decides_nothing():
    cheap = study(3.0, wall=170.0)
    found = judge(WHOLE, cheap)
    assert (found.word, found.tested) == (
        "not tested", False,
    ) and "0.88 of the method's time" in found.why
    waiting = judge(WHOLE, cheap[cheap["row"] != "base_longer"])
    assert (
        waiting.word == "not tested"
        and waiting.over == "base"
        and "has not run: base_longer" in waiting.why
    )
    assert judge(WHOLE, study(3.0, wall=160.0)).word == "held"


@pytest.mark.parametrize("free", [["ianet"], ["base_longer"], ["ianet", "base_longer"]])
def test_training_without_time_decides_nothing(free):
    made = study(3.0)
    made.loc[made["row"].isin(free), "wall_seconds"] = 0.0
    found = judge(WHOLE, made)
    assert (found.word, found.gain, found.tested) == (
        "not tested", None, False,
    ) and "training time is 0" in found.why


def test_missing_rows_are_not_run():
    made = study()
    found = judge(WHOLE, made[made["row"] != "ianet"])
    assert (found.word, found.gain) == ("not run", None) and found.why == "not run: ianet"
    assert judge(WHOLE, made[made["row"] == "ianet"]).why == "not run: base"
    # the longer baseline alone is enough
    assert judge(WHOLE, made[made["row"] != "base"]).word == "held"
    assert judge(WHOLE, made[:0]).word == "not run"


def test_of_a_run_twice_the_newest_counts():
    made = study()
    old = made[made["row"] == "ianet"].assign(mAP=0.0)
    assert judge(WHOLE, pd.concat([old, made], ignore_index=True)) == judge(WHOLE, made)


# ---------------------------------------------------------------- all of them


def test_verdicts_are_corrected_for_their_number():
    "One claim that holds alone at p = 0.03 does not among many without effect."
    made = []
    for row, lift in (
        ("ianet", 0.66), ("sia", 0.0), ("cia", 0.0), ("base", 0.0), ("base_longer", 0.0),
    ):
        made.append(runs("ianet", row, lift, seed=4, wall=100.0))
    ledger = pd.concat(made, ignore_index=True)
    found = {v.claim.name: v for v in verdicts(ledger) if v.tested}
    assert set(found) == {"ianet_whole", "ianet_spatial", "ianet_channel"}
    assert [v.p for v in found.values()] == pytest.approx(holm([v.gain.p for v in found.values()]))
    first = found["ianet_whole"]
    # what the made numbers are chosen for
    assert 0.05 / 3 < first.gain.p < 0.05 <= first.p, first.gain.p
    assert (
        first.word == "inconclusive"
        and "among 3 claims" in first.why
        and judge(WHOLE, ledger).word == "held"
    )


def test_toytown_and_photographs_are_two_families_and_two_tables():
    photographs = pd.concat(
        [
            runs("ianet", row, lift, wall=wall, where=("market1501", "paper"), epochs=60)
            for row, lift, wall in (("ianet", -3, 145), ("base", 0, 100), ("base_longer", 0, 150))
        ],
        ignore_index=True,
    )
    found = verdicts(pd.concat([study(3.0, seed=2), photographs], ignore_index=True))
    words = {v.place: v.word for v in found if v.claim.name == "ianet_whole"}
    assert words == {"toytown · study": "held", "market1501 · paper": "did not hold"}
    for verdict in found:  # one tested claim in each family: nothing to correct
        assert not verdict.tested or verdict.p == pytest.approx(verdict.gain.p)
    table = verdict_table(found).sections
    real = table["Photographs"]
    toy = table["Toytown, profile study: says nothing about photographs"]
    line = real[real["our data · profile"] == "market1501 · paper"].iloc[0]
    assert line["the paper's gain"] == "+6.9 mAP, market1501" and line["ours (± 95 %)"].startswith(
        "-2.5 ±"
    )
    assert not any("paper's" in column for column in toy.columns)
    assert not toy.apply(lambda column: column.str.contains(r"\+6\.9|market1501")).any().any()
    short = verdicts_in_short(found).set_index("claim").loc[WHOLE.claim]
    assert (short["photographs"], short["Toytown"]) == ("did not hold", "held")


def test_of_several_places_the_word_that_says_most_counts():
    def short(*words):
        found = [module.Verdict(WHOLE, f"place {k} · short", word) for k, word in enumerate(words)]
        found.append(module.Verdict(WHOLE, "toytown · study", "not run"))
        return verdicts_in_short(found).set_index("claim").loc[WHOLE.claim, "photographs"]

    assert short("not run", "smaller than printed", "not tested") == "smaller than printed"
    assert short("inconclusive", "held") == "held"
    assert short("held", "did not hold") == "differs by data set"


def test_smoke_runs_decide_nothing():
    assert {v.word for v in verdicts(study().assign(profile="smoke"))} == {"not run"}


def test_an_empty_ledger_and_the_committed_one_give_every_claim_a_word():
    for ledger in (study()[:0], read_ledger(ROOT / "results")):
        found = verdicts(ledger)
        assert set(verdicts_in_short(found)["claim"]) == {claim.claim for claim in CLAIMS.values()}
        assert {v.word for v in found} <= set(module.WORDS)
        str(verdict_table(found)), verdict_figure(found)


# ---------------------------------------------------------------- the claims themselves


def test_the_papers_own_gains_follow_from_their_tables():
    for claim in CLAIMS.values():
        if claim.printed and len(claim.contrast) == 2 and claim.paper == "casn":
            titles = {
                "casn_ide": "CASN(IDE)", "ide": "IDE", "ide_ia": "IDE + IA", "ide_sa": "IDE + SA",
                "casn_pcb": "CASN(PCB)", "pcb": "PCB",
            }
            table = (
                reported("casn")
                .query("table == '3' and dataset == 'cuhk03-np-detected' and metric == 'mAP'")
                .set_index("row")["value"]
            )
            assert paper_gain(claim) == pytest.approx(
                sum(sign * table[titles[row]] for row, sign in claim.contrast.items())
            )
    assert {
        CLAIMS[n].name: paper_gain(CLAIMS[n])
        for n in ("minet_sweeps", "dcc_kissme", "can_many_strips", "dcc_irnn")
    } == {"minet_sweeps": 11.81, "dcc_kissme": 1.7, "can_many_strips": 2.2, "dcc_irnn": None}


def test_every_paper_has_claims_with_equally_long_baselines_that_do_not_differ_otherwise():
    assert {claim.paper for claim in CLAIMS.values()} == {
        "minet", "dcc", "casn", "ianet", "can", "pcb",
    }
    for claim in CLAIMS.values():
        rows = rows_of(claim.paper)
        for row, longer in claim.equal.items():
            shared = {"study", "photographs"} & set(rows[row].profiles) & set(rows[longer].profiles)
            assert shared, f"{claim.name}: no profile runs both {row} and {longer}"
            for name in shared:
                profile = read_profile(name)
                own, theirs = (
                    {**profile.of(claim.paper, key), **rows[key].set} for key in (row, longer)
                )
                differ = {key for key in own | theirs if own.get(key) != theirs.get(key)}
                assert differ in (
                    {"epochs"}, {"pretrain"},
                ), f"{claim.name}, {name}: {longer} differs in {differ}"


@pytest.mark.parametrize(
    "old, new, named",
    [
        ("contrast: {minet: 1, fc_cnn: -1}", "contrast: {minet: 1, fc_cn: -1}", "fc_cn"),
        ("contrast: {minet: 1, fc_cnn: -1}", "contrast: {minet: 1, fc_cnn: 1}", "as many rows"),
        ("equal: {spp: spp_long}", "equal: {gp: spp_long}", "rows of the contrast"),
        (
            "metric: rank1\n  contrast: {minet: 1, fc_cnn: -1}",
            "metric: rank2\n  contrast: {minet: 1, fc_cnn: -1}", "rank2",
        ),
        ("table: IV, dataset: market1501", "table: II, dataset: market1501", "0 values of row"),
        ("- name: minet_gate", "- name: minet_pairs", "twice"),
        (
            "  where: section 4.4, table 1\n  metric", "  were: section 4.4, table 1\n  metric",
            "were",
        ),
        ("paper: dcc\n", "paper: dc\n", "'dc'"),
        (
            "contrast: {minet: 1, fc_cnn: -1}", "contrast: [minet, fc_cnn]",
            "entry 1 (minet_pairs): contrast is ['minet', 'fc_cnn']",
        ),
        (
            "contrast: {minet: 1, fc_cnn: -1}", "contrast:",
            "entry 1 (minet_pairs): contrast is None",
        ),
        (
            "contrast: {minet: 1, fc_cnn: -1}", "contrast: {minet: 1, fc_cnn: []}",
            "contrast['fc_cnn'] is []",
        ),
        ("equal: {mi_spp: mi_spp_longer}", "equal:", "entry 3 (minet_sweeps): equal is None"),
        (
            "equal: {mi_spp: mi_spp_longer}", "equal: [mi_spp]",
            "entry 3 (minet_sweeps): equal is ['mi_spp']",
        ),
        ("printed: {table: IV, dataset: market1501}", "printed: table IV", "printed is 'table IV'"),
        ("printed: {table: IV, dataset: market1501}", "printed: {table: IV}", "'printed['dataset']' is missing"),
        (
            "printed: {table: IV, dataset: market1501}", "printed: {dataset: market1501}",
            "'printed['table']' is missing",
        ),
        (
            "printed: {table: IV, dataset: market1501}", "printed: {table: 4, dataset: market1501}",
            "in quotes",
        ),
        ("claim: Comparing a pair", "claim: 4 #", "claim is 4; it should be a valid string"),
        ("- name: minet_pairs", "- abc\n- name: minet_pairs", "entry 1: expected name, paper"),
        ("- name: minet_pairs", "-\n- name: minet_pairs", "entry 1: expected name, paper"),
        ("- name: minet_pairs", "- name: [minet_pairs", "cannot be read"),
        ("- name: minet_pairs", "name: minet_pairs\n- name: x", "cannot be read"),
    ],
)
def test_faults_of_the_claims_are_named(tmp_path, old, new, named):
    shutil.copytree(ROOT / "ci", tmp_path / "ci", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "ci" / "claims.yaml"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match="claim") as told:
        read_claims(tmp_path)
    assert named in str(told.value), told.value


@pytest.mark.parametrize(
    "content, named",
    [
        (None, "cannot be read"), (b"", "must be a list"), (b"name: x", "must be a list"),
        (b"[]", "must be a list"), (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_file_without_claims_is_named(tmp_path, content, named):
    (tmp_path / "ci").mkdir()
    if content is not None:
        (tmp_path / "ci" / "claims.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=rf"ci/claims\.yaml {named}"):
        read_claims(tmp_path)


# ---------------------------------------------------------------- side by side


def test_departures_from_the_recipe_are_named_and_their_differences_left_out():
    extra = [
        runs("can", "part_1357_ca", 9.0, epochs=20, height=384), runs("dcc", "dcc", 1.0, seeds=[0]),
    ]
    made = pd.concat([study(2.0), *extra], ignore_index=True)
    line = leaderboard(made, "study", "toytown")
    assert line.loc["CAN", ["row", "departs"]].tolist() == [
        "can/part_1357_ca", "height 384, epochs 20",
    ]
    assert line.loc["IANet", "departs"] == "" and line.loc["IANet", "gain"].mean == pytest.approx(
        2.0, abs=0.6
    )
    table = next(iter(leaderboard_table(made).sections.values())).set_index("method")
    cell = table["mAP − IDE's (± 95 %)"]
    assert (
        cell["CAN"] == "other recipe"
        and "±" in cell["IANet"]
        and cell["DCC"].endswith(", one seed")
        and cell["IDE"] == "–"
    )
    assert (
        table.loc["MI-Net", "mAP (± sd)"] == "not run" and "raw pixels (floor)" not in table.index
    )


def test_every_place_is_a_section_of_its_own():
    made = pd.concat(
        [
            study(where=("toytown", "smoke")), study(where=("cuhk03-np-detected", "short")),
            study(where=("viper", "paper")),
        ]
    )
    assert comparisons(made) == [
        ("paper", "viper"), ("short", "cuhk03-np-detected"), ("study", "toytown"),
        ("smoke", "toytown"),
    ]
    assert (
        len(leaderboard_table(made).sections) == 4
        and len(leaderboard_table(made, short=True).sections) == 3
    )
    assert comparisons(made[:0]) == [("study", "toytown"), ("smoke", "toytown")]
    for place in comparisons(made):
        training_figure(made, *place)


def test_every_row_that_stands_for_a_method_exists():
    for rows in ROWS.values():
        for paper, row in (name.split("/") for name in rows):
            assert row in [r.name for r in read_rows(paper)]


@pytest.mark.parametrize("paper", ["dcc", "minet", "casn"])
def test_a_counted_search_predicts_larger_ones(paper):
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    if paper == "dcc":
        from reid_repro.dcc import DCC, dcc_distances as distances
        model = DCC(backbone="tiny", hidden=8)
    elif paper == "casn":
        from reid_repro.casn import CASN, casn_distances as distances
        model = CASN(5, backbone="tiny", hidden=8)
    else:
        from reid_repro.minet import MINet, minet_distances as distances
        model = MINet((64, 32), backbone="tiny", embedding=8, hidden=8, width=8)
    cost = search_cost(lambda q, g: distances(model, q, g, device="cpu"), (64, 32))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        distances(
            model, *(torch.zeros(n, 3, 64, 32, dtype=torch.uint8) for n in (3, 5)), device="cpu"
        )
    assert counter.get_total_flops() // 2 == cost.total(3, 5)
    assert cost.pair > 64 and min(cost) >= 0 and isinstance(cost, SearchCost)


def test_the_figure_of_a_study_draws_the_rows_that_ran_and_no_other():
    # the last shares no seed
    runs = [
        ("base", 0, 30.0), ("base", 1, 40.0), ("sia", 0, 32.0), ("sia", 1, 43.0), ("cia", 7, 50.0),
    ]
    made = pd.DataFrame(runs, columns=["row", "seed", "mAP"]).assign(
        paper="ianet", profile="study", dataset="toytown", rank1=50.0
    )
    # neither a short training nor photographs are a study
    others = [made.assign(profile="smoke", mAP=1.0), made.assign(dataset="market1501", mAP=2.0)]
    ax = study_figure("ianet", "base", pd.concat([made, *others]))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["SIA (appearance and location)"]
    dots, mean = (line.get_xdata() for line in ax.lines[:2])
    assert list(dots) == [2, 3] and list(mean) == [2.5]
    low, high = sorted(ax.get_ylim())
    assert low < 0 < high  # no dot on the frame
    with pytest.raises(ValueError, match="against 'bose' is no row"):
        study_figure("ianet", "bose", made)


def test_what_acts_is_told_of_every_row_where_it_ran_best():
    def run(row, profile, value, dataset="toytown"):
        pulse = {"z_deviation": value} if value is not None else {}
        return {
            "paper": "dcc", "row": row, "profile": profile, "dataset": dataset, "pulse": pulse
        }

    ledger = pd.DataFrame(
        [
            run("dcc", "smoke", 0.1), run("dcc", "photographs", 0.2, "market1501-train-only"),
            run("dcc", "photographs", 0.4, "market1501-train-only"), run("dcc_cosine", "smoke", 0.6),
            run("spp", "photographs", None, "market1501-train-only"), run("gp", "pilot", 0.9),
        ]
    )
    titles = {row.name: row.title for row in read_rows("dcc")}
    found = acts(ledger).set_index("row")[["value", "where"]].apply(tuple, axis=1).to_dict()
    assert found == {
        titles["dcc"]: ("0.30 ± 0.14", "photographs"),
        titles["dcc_cosine"]: ("0.60", "Toytown, smoke"),
    }
