"""What a run begins with: ImageNet's weights unless told otherwise, files by architecture, another
run's backbone; nothing by accident.
"""

import os
import re
import shutil
import subprocess
import sys
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ci"))

import batch
import estimates
import rerun
from reid_repro.learning.backbones import build_backbone, fetch_published, pick_weights
from reid_repro.learning.checkpoints import read_metadata, save_weights
from reid_repro.lab.configuration import declared, networks, random_starts, resolve, start_words
from reid_repro.datasets import open_benchmark
from reid_repro.ide import IDE
from reid_repro.lab.ledger import computed_parameters
from reid_repro.lab.methods import build, from_checkpoint
from reid_repro.lab.rows import plan, read_profile, read_rows
from reid_repro.lab.runs import open_data, record, validation

RESNET50 = [
    "conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv3.weight",
    *(f"layer3.{k}.conv1.weight" for k in range(6)),
]
VGG16 = [f"features.{k}.weight" for k in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)]


def parameters(paper: str, profile: str, row: str, **given) -> dict:
    "What a notebook has behind its parameters cell when a batch started it."
    defaults = {
        name: default
        for name, (_, default) in declared(ROOT / read_rows(paper)[0].notebook).items()
    }
    return {
        **defaults, **read_profile(profile).of(paper, row), "profile": profile, "row": row, **given,
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    "Files whose names and tensors say what they are; nothing could be computed with them."
    for name, keys in (("resnet50_imagenet", RESNET50), ("vgg16_features", VGG16)):
        save_file({key: torch.zeros(1) for key in keys}, tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    "A machine whose torch has no weights and no network."
    def refuse(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tmp_path / "hub"


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize(("paper", "profile", "row", "weights", "begins"), [
    ("ide", "paper", "ide", "imagenet", []),
    ("ide", "short", "ide", "imagenet", []),
    ("ide", "smoke", "ide", "", []),
    ("ide", "short", "pixels", "", []),  # a floor loads nothing
    ("minet", "paper", "fv_sift", "", []),
    ("minet", "paper", "minet_dm", "imagenet", ["vgg_m"]),
    ("minet", "paper", "minet_mm", "", ["vgg_m"]),
])
def test_weights_that_nobody_names_are_imagenets(paper, profile, row, weights, begins):
    config = resolve(paper, parameters(paper, profile, row))
    assert config.weights == weights and random_starts(vars(config)) == begins


def test_no_row_of_profile_paper_begins_at_random_without_saying_so(capsys):
    "By its title; `make plan` shows it, too."
    for job in plan("paper"):
        config = {**estimates.parameters(job), "start_from": ""}
        if random := random_starts(
            {**config, "weights": "imagenet" if networks(config) != ["vgg_m"] else ""}
        ):
            assert random == ["vgg_m"] and "VGG-M" in job.row.title, job.row
    batch.show_plan("paper", "minet/minet_mm,minet/minet,ide/ide,ide/pixels", "", "viper", 0)
    lines = [line for line in capsys.readouterr().out.splitlines() if "start:" in line]
    told = {line.split()[0]: line.split("start: ")[1].split("  ")[0].strip() for line in lines}
    assert told == {
        "minet/minet_mm/viper-s0": "random (vgg_m)", "minet/minet/viper-s0": "ImageNet",
        "ide/ide/viper-s0": "ImageNet", "ide/pixels/viper-s0": "–",
    }


def test_a_job_without_weights_is_not_counted_among_those_that_can_run(capsys):
    batch.show_plan("paper", "ide/ide,ide/pixels", "", "viper", 0, weights="/no/such/file")
    told = capsys.readouterr().out
    can = sum(" runs" in line for line in told.splitlines() if "start:" in line)
    assert "cannot run:" in told and f"{can} of 2 jobs can run" in told


def test_a_random_start_is_asked_for_and_told():
    config = resolve(
        "ide", parameters("ide", "short", "ide", weights="random", dataset="cuhk03-np-detected")
    )
    assert config.weights == "random" and "resnet50 from a random start" in config.conditions
    assert not resolve("ide", parameters("ide", "paper", "ide", dataset="market1501")).conditions


def test_a_folder_gives_each_architecture_its_own_file(folder):
    for paper, row, name in (
        ("ide", "ide", "resnet50_imagenet"), ("minet", "minet", "vgg16_features"),
    ):
        config = resolve(paper, parameters(paper, "paper", row, weights=str(folder)))
        assert Path(config.weights).name == f"{name}.safetensors"
    both = f"{folder / 'vgg16_features.safetensors'},{folder / 'resnet50_imagenet.safetensors'}"
    assert Path(pick_weights(both, "resnet50")).name == "resnet50_imagenet.safetensors"
    assert (
        start_words(parameters("minet", "paper", "minet", weights=both))
        == "vgg16_features.safetensors"
    )


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (
            "resnet50_imagenet.safetensors",
            "those of resnet50, this network is vgg16; give a file vgg16",
        ),
        (
            "nothing.safetensors",
            "nothing.safetensors' is no file; give random, imagenet, a safetensors file for vgg16",
        ),
        ("", "need one file vgg16"),
    ],
)
def test_weights_of_another_network_are_named_before_anything_runs(folder, weights, words):
    (folder / "vgg16_features.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(ValueError, match=words):
        resolve("minet", parameters("minet", "short", "minet", weights=str(folder / weights)))
    with pytest.raises(SystemExit, match=words):
        batch.check_starts(plan("paper", "minet/minet"), str(folder / weights), "")


def test_two_files_of_one_architecture_are_no_choice(folder):
    shutil.copy(folder / "resnet50_imagenet.safetensors", folder / "resnet50_again.safetensors")
    with pytest.raises(
        ValueError, match=r"need one file resnet50.*resnet50_again.*resnet50_imagenet"
    ):
        pick_weights(folder, "resnet50")


def test_without_a_network_a_run_ends_before_its_data_with_the_name_of_the_file(offline):
    config = resolve(
        "ide", parameters("ide", "short", "ide", dataset="market1501", data_root="/nowhere")
    )
    words = (
        r"resnet50 begins with ImageNet's.*resnet50-0676ba61\.pth is not in"
        r" '.*hub/checkpoints'.*WEIGHTS="
    )
    with pytest.raises(ValueError, match=words):
        open_data(config)
    with pytest.raises(SystemExit, match=r"ide/ide.*resnet50-0676ba61\.pth"):
        batch.check_starts([job for job in plan("short", "ide/ide")], "", "")
    place = offline / "checkpoints" / "resnet50-0676ba61.pth"
    place.write_bytes(b"")
    assert fetch_published("resnet50") == place  # one that is there is not asked for again


# ---------------------------------------------------------------- another run's backbone


@pytest.fixture(scope="module")
def lender(tmp_path_factory) -> Path:
    """The folder of a finished run of ide/ide under profile smoke, with weights that nobody else
    has.
    """
    folder = tmp_path_factory.mktemp("lender")
    torch.manual_seed(5)
    metadata = {
        "paper": "ide", "row": "ide", "dataset": "toytown", "profile": "smoke", "seed": 0,
        "identities": 7, "parameters": {"backbone": "tiny"},
        "fingerprint": open_benchmark("toytown").fingerprint,
    }
    save_weights(folder / "model.safetensors", IDE(7, backbone="tiny"), metadata)
    return folder


@pytest.mark.parametrize(
    ("paper", "row", "place"),
    [
        ("ide", "ide_plus", "backbone"), ("pcb", "pcb", "backbone"),
        ("casn", "casn_pcb", "net.backbone"), ("can", "can", "backbone"),
        ("ianet", "base", "backbone"), ("dcc", "dcc", "backbone"), ("minet", "minet", "backbone.0"),
    ],
)
def test_a_network_begins_with_the_backbone_of_a_finished_run(paper, row, place, lender):
    config = resolve(paper, parameters(paper, "smoke", row, start_from=str(lender)))
    assert (
        config.start_from.startswith("ide-ide-toytown-smoke-s0@")
        and len(config.start_from.rpartition("@")[2]) == 8
    )
    assert "backbone from a finished ide/ide (smoke profile)" in config.conditions
    model = build(paper, vars(config), 4)
    torch.manual_seed(5)
    theirs = IDE(7, backbone="tiny").backbone.state_dict()
    ours = model.get_submodule(place).state_dict()
    if paper == "can":  # each branch has a last stage of its own
        ours = {re.sub(r"^stages\.3\.2\.", "stages.3.", key): value for key, value in ours.items()}
        ours = {
            key: value for key, value in ours.items() if not re.match(r"stages\.3\.\d+\.\d", key)
        }
    assert set(ours) <= set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert len(ours) == len(theirs) or paper == "dcc"


def test_blocks_are_put_into_a_backbone_that_was_lent(lender):
    config = resolve("ianet", parameters("ianet", "study", "ianet", start_from=str(lender)))
    model = build("ianet", vars(config), 4)
    torch.manual_seed(5)
    assert torch.equal(
        model.backbone.stages[1][0][0].conv1.weight,
        IDE(7, backbone="tiny").backbone.stages[1][0].conv1.weight,
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"start_from": "no/such"}, "'start_from' is 'no/such': there is no"),
        (
            {"start_from": "results/ide-ide-toytown-smoke-s0.json"},
            "there is no .*published entries hold no weights",
        ),
        ({"start_from": "none"}, "begins with no other run"),
        (
            {"start_from": "LENDER", "backbone": "resnet18"},
            "whose backbone is tiny; this run's is resnet18",
        ),
    ],
)
def test_a_start_that_does_not_serve_is_named(given, words, lender):
    given = {key: str(lender) if value == "LENDER" else value for key, value in given.items()}
    with pytest.raises(ValueError, match=words):
        resolve("ide", parameters("ide", "smoke", "ide", **given))


def test_nobody_may_be_searched_for_whom_the_lender_was_trained_on(lender, tmp_path):
    town = open_benchmark("toytown")
    config = resolve("ide", parameters("ide", "smoke", "ide", start_from=str(lender)))
    assert open_data(config).fingerprint == town.fingerprint
    told = read_metadata(lender / "model.safetensors")
    trained_here = {"dataset": "viper", "parameters": {"source": "toytown", "backbone": "tiny"}}
    for number, other in enumerate(
        ({"fingerprint": "0" * 16}, {"dataset": "toytown-too"}, trained_here)
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_weights(folder / "model.safetensors", IDE(7, backbone="tiny"), {**told, **other})
        with pytest.raises(ValueError, match="another division of its people"):
            open_data(resolve("ide", parameters("ide", "smoke", "ide", start_from=str(folder))))
    save_weights(
        tmp_path / "model.safetensors", IDE(7, backbone="tiny"), {**told, "dataset": "viper"}
    )
    assert (
        open_data(resolve("ide", parameters("ide", "smoke", "ide", start_from=str(tmp_path)))).name
        == "toytown"
    )


def test_the_same_run_with_another_seed_or_training_lends_the_same():
    given = {"lr": 0.1, "start_from": "ide-ide-toytown-smoke-s3@12345678"}
    assert computed_parameters(given)["start_from"] == "ide-ide-toytown-smoke-s3"
    assert computed_parameters(given, ["seed"])["start_from"] == "ide-ide-toytown-smoke"


def test_a_row_that_begins_with_another_one_brings_it_along_first(lender, tmp_path):
    for name in ("ci", "nbs/4_baselines/pcb"):
        shutil.copytree(ROOT / name, tmp_path / name)
    file = tmp_path / "ci" / "rows" / "pcb.yaml"
    text = file.read_text()
    file.write_text(text.replace("  - name: pcb\n", "  - name: pcb\n    start: ide/ide\n"))
    jobs = plan("smoke", "pcb", root=tmp_path)
    assert [job.name for job in jobs[:2]] == ["ide/ide/toytown-s0", "pcb/pcb/toytown-s0"] and jobs[
        1
    ].start == jobs[0].name
    given = parameters("pcb", "smoke", "pcb")
    with pytest.raises(
        ValueError, match="row 'pcb' begins with the backbone of a finished ide/ide"
    ):
        resolve("pcb", given, tmp_path)
    assert not resolve("pcb", given | {"start_from": str(lender)}, tmp_path).conditions == []
    with pytest.raises(ValueError, match="begins with ide/ide, seed 1"):
        resolve("pcb", given | {"start_from": str(lender), "seed": 1}, tmp_path)
    assert resolve("pcb", given | {"start_from": "none"}, tmp_path).conditions == [
        "without the start from ide/ide"
    ]
    file.write_text(text.replace("  - name: pcb\n", "  - name: pcb\n    start: ide/ide_minus\n"))
    with pytest.raises(ValueError, match="name a row that is there"):
        plan("smoke", "pcb", root=tmp_path)
    file.write_text(text.replace("  - name: pcb\n", "  - name: pcb\n    start: ide\n"))
    with pytest.raises(ValueError, match="name the row whose backbone"):
        plan("smoke", "pcb", root=tmp_path)


def test_the_batch_runs_the_lender_first_and_names_its_folder(tmp_path):
    command = [
        "snakemake", "-s", "ci/Snakefile", "-n", "-p", "--cores", "1", "--nolock", "--config",
        "profile=smoke", "dataset=toytown", "only=casn/casn_ide_from_ide", f"runs={tmp_path}",
    ]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    }
    told = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    ).stdout
    commands = [line for line in told.splitlines() if "ci/batch.py run" in line]
    assert "4_baselines/ide" in commands[0] and "5_papers/3_casn" in commands[1]
    assert (
        f'"start_from": "{tmp_path}/smoke/ide/ide/toytown-s0"' in commands[1]
        and '"start_from": ""' in commands[0]
    )


def test_a_rerun_asks_for_the_run_that_lent_its_backbone(lender):
    entry = {
        "dataset": "toytown",
        "parameters": {
            "start_from": "ide-ide-toytown-smoke-s0@00000000", "weights": "model.safetensors",
        },
    }
    with pytest.raises(
        ValueError,
        match="began with the backbone of ide-ide-toytown-smoke-s0@00000000; give START=",
    ):
        rerun.check_needs(entry, "", "")
    with pytest.raises(
        ValueError, match=r"START=.* is ide-ide-toytown-smoke-s0@.*; the entry began with"
    ):
        rerun.check_needs(entry, "", "", str(lender))


# ---------------------------------------------------------------- where strides sit


def test_weights_of_a_run_say_where_its_strides_sit(tmp_path, monkeypatch):
    """A run on ImageNet weights of 2015 halves maps in other convolutions than torchvision's;
    whoever opens its weights must too.
    """
    published = tmp_path / "resnet50.safetensors"
    plain = build_backbone("resnet50")
    names = {
        f"layer{k + 1}.{key}": value
        for k, stage in enumerate(plain.stages)
        for key, value in stage.state_dict().items()
    }
    stem = {
        f"{('conv1', 'bn1')[int(key[0])]}{key[1:]}": value
        for key, value in plain.stem.state_dict().items()
    }
    save_file({**names, **stem}, published, {"stride": "v1: in conv1"})
    benchmark, out = open_benchmark("toytown"), tmp_path / "run"
    config = resolve(
        "ide",
        parameters(
            "ide", "short", "ide", weights=str(published), epochs=1, out=str(out), height=32,
            width=16,
        ),
    )
    model = build("ide", vars(config), benchmark.train.num_identities)
    assert model.backbone.stages[1][0].conv1.stride == (2, 2)

    from reid_repro.learning.checkpoints import save_checkpoint
    from reid_repro.evaluation import evaluate

    history = [{"epoch": 1, "loss": 1.0}]
    optimizer = torch.optim.SGD(model.parameters())
    save_checkpoint(
        out / "checkpoint.safetensors", model, optimizer,
        {"run": {}, "history": history, "code": []},
    )
    scores = evaluate(np.array([[0.0]]), np.array([1]), np.array([1]), np.array([1]), np.array([2]))
    record("ide", config, benchmark, scores, history, out, 0.0)
    assert read_metadata(out / "model.safetensors")["stride"] == "v1: in conv1"
    pixels = torch.rand(2, 3, 32, 16)
    again = from_checkpoint(out / "model.safetensors", device="cpu").model
    assert again.backbone.stages[1][0].conv1.stride == (2, 2)
    assert build_backbone("resnet50", weights=out / "model.safetensors").stages[2][
        0
    ].conv1.stride == (2, 2)
    with torch.no_grad():
        torch.testing.assert_close(again(pixels), model.eval()(pixels))


# ---------------------------------------------------------------- people on whom settings are
# chosen


def test_settings_are_chosen_among_training_people_alone():
    town = open_benchmark("toytown")
    chosen = validation(town, held_out=10, people=20, seed=900)
    people = [set(split.pids.tolist()) for split in (chosen.train, chosen.query)]
    assert len(people[0]) == 20 and len(people[1]) == 10 and not people[0] & people[1]
    assert people[0] | people[1] <= set(town.train.pids.tolist())
    assert (
        chosen.query.paths == chosen.gallery.paths
        and chosen.leave_one_out
        and chosen.division == "validation 900"
    )
    assert set(validation(town, 10, 20, 901).query.pids) != people[1]
    assert (
        chosen.conditions[-1]
        == f"20 of {town.train.num_identities} training people train, 10 others are searched for"
    )
    config = SimpleNamespace(dataset="toytown", data_root="", seed=900, held_out=10, people=20)
    assert open_data(config).fingerprint == chosen.fingerprint


@pytest.mark.parametrize(
    ("held_out", "people"), [(1, 0), (0, 20), (10, 10_000), (10, -1), (10_000, 0)]
)
def test_a_division_that_cannot_be_is_refused(held_out, people):
    with pytest.raises(ValueError, match="must remain on either side"):
        validation(open_benchmark("toytown"), held_out, people, 0)
