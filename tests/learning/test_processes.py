"""Several processes: what they compute together against one process on the whole batch, started
from a notebook's process and from a shell.
"""

import errno
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from reid_repro.learning import processes as several
from reid_repro.can import CAN, can_objective
from reid_repro.casn import CASN, casn_objective
from reid_repro.dcc import DCC, dcc_objective
from reid_repro.ide import IDE, ide_objective
from reid_repro.lab.ledger import computed_parameters
from reid_repro.learning.losses import batch_hard_triplet
from reid_repro.minet import MINet, minet_objective
from reid_repro.learning.processes import (
    ShardedGenerator, Replicas, gather, global_batch_norm, launch, share,
)
from reid_repro.learning.recipe import Recipe, lr_factor
from reid_repro.learning.augmentation import Augment, normalise
from reid_repro.learning.batches import IdentityBatches, PairBatches, ShuffledBatches
from reid_repro.learning.training import train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")

LABELS = torch.arange(10).repeat_interleave(4)
NOISE = torch.Generator().manual_seed(0)
FACES, GRAIN = (
    torch.randint(0, top, (n, 3, 32, 16), generator=NOISE) for n, top in ((10, 150), (40, 100))
)
IMAGES = (FACES[LABELS] + GRAIN).to(torch.uint8)
# five people: two processes get three and two
PEOPLE = IdentityBatches(LABELS.numpy(), 5, 4, seed=0)
RECIPE = partial(
    Recipe, epochs=3, batch_size=20, optimizer="sgd", lr=0.02, flip=0.5, pad=2, shift=1, erase=0.5,
    clip=5.0,
)


class Small(nn.Module):
    """Two convolutions with batch norm, an unused layer, and methods that an objective calls beside
    `forward`.
    """

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2),
            nn.BatchNorm2d(16),
        )
        self.unused, self.classifier = nn.Linear(3, 3), nn.Linear(16, 10)

    def features(self, pixels):
        return self.backbone(pixels).mean((2, 3))

    def forward(self, pixels):
        f = self.features(pixels)
        return (f, self.classifier(f)) if self.training else f


def small() -> Small:
    torch.manual_seed(0)
    return Small()


def by_methods(model, batch, get_images):
    "Calls the model twice, and not by its name."
    first, again = model.features(get_images(batch)), model.features(get_images(batch))
    return {"id": nn.functional.cross_entropy(model.classifier(first + again), LABELS[batch])}


def of_pairs(model, batch, get_images):
    i, j, same = batch
    a, b = model.features(get_images(torch.cat([i, j]))).chunk(2)
    return {"pair": nn.functional.binary_cross_entropy_with_logits((a * b).sum(1), same.float())}


def weights(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


CASES = {
    "ide_plus": (ide_objective(LABELS, smoothing=0.1, triplet=1.0), PEOPLE),
    "methods": (by_methods, ShuffledBatches(40, 9, seed=1)),  # nine images: five and four
    "pairs": (of_pairs, PairBatches(LABELS.numpy(), 7, 0.5, seed=2)),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_when_the_whole_batch_is_seen(case):
    objective, batches = CASES[case]
    one, two = small(), small()
    recipe = partial(RECIPE, batch_size=batches.batch_size)
    first = train(one, objective, IMAGES, batches, recipe(), seed=3, device="cpu")
    second = train(
        two, objective, IMAGES, batches, recipe(global_batch=True), seed=3, device="cpu",
        processes=2,
    )
    terms = [c for c in first if c not in ("images_per_second", "seconds", "cpu_seconds")]
    torch.testing.assert_close(
        torch.tensor(second[terms].values), torch.tensor(first[terms].values), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-4, atol=1e-5)
    assert not torch.equal(one.classifier.weight, small().classifier.weight) or case == "pairs"


def test_the_baseline_trains_the_same_on_two_processes():
    def ide():
        torch.manual_seed(0)
        return IDE(10, backbone="tiny", last_stride=1, neck="bn")

    one, two, losses = ide(), ide(), ["id", "triplet"]
    job = (ide_objective(LABELS, smoothing=0.1, triplet=1.0), IMAGES, PEOPLE)
    first = train(one, *job, RECIPE(lr=0.005), device="cpu")
    second = train(two, *job, RECIPE(lr=0.005, global_batch=True), device="cpu", processes=2)
    torch.testing.assert_close(
        torch.tensor(second[losses].values), torch.tensor(first[losses].values), rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-3, atol=1e-4)


def test_apart_two_processes_make_the_steps_of_shares_that_know_nothing_of_each_other():
    "The same in one process: batch norm and triplet on each share, losses weighted by it."
    ours, hand, recipe = small(), small(), RECIPE(clip=0.0)
    train(
        ours, ide_objective(LABELS, smoothing=0.1, triplet=1.0), IMAGES, PEOPLE, recipe, seed=3,
        device="cpu", processes=2,
    )
    optimizer = torch.optim.SGD(
        hand.parameters(), momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )
    augment = Augment(recipe.flip, recipe.pad, recipe.shift, recipe.erase)
    objective = ide_objective(LABELS, smoothing=0.1, triplet=1.0)
    for epoch in range(recipe.epochs):
        chance = torch.Generator().manual_seed(3 * 1_000_003 + epoch + 500_000)
        for done, batch in enumerate(PEOPLE.epoch(epoch)):
            pixels = augment(IMAGES[batch], chance)
            optimizer.param_groups[0]["lr"] = recipe.lr * lr_factor(
                recipe, epoch + done / len(PEOPLE)
            )
            optimizer.zero_grad()
            for mine in (share(20, 4, 2, r) for r in range(2)):
                terms = objective(
                    hand.train(), batch[mine], lambda _, mine=mine, pixels=pixels: pixels[mine]
                )
                (len(mine) / 20 * sum(terms.values())).backward()
            optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), hand.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    whole = small()
    train(
        whole, ide_objective(LABELS, smoothing=0.1, triplet=1.0), IMAGES, PEOPLE, recipe, seed=3,
        device="cpu",
    )
    assert (
        whole.classifier.weight - ours.classifier.weight
    ).abs().max() > 1e-3, "one process on the whole batch is another thing"


@pytest.mark.slow("pairs of processes, killed")
def test_a_killed_run_of_two_processes_continues_to_the_bit_and_only_the_main_one_writes_and_prints(
    tmp_path, capfd
):
    job = (ide_objective(LABELS, smoothing=0.1, triplet=1.0), IMAGES, PEOPLE)

    def dies(model, batch, get_images):
        if (
            len(list((tmp_path / "cut").glob("*.safetensors")))
            and calls.append(1) is None
            and len(calls) > 2
        ):
            raise MemoryError("power cut")
        return job[0](model, batch, get_images)

    calls = []
    whole, cut = small(), small()
    run = dict(device="cpu", processes=2, seed=1, identity={"row": "x"})
    first = train(whole, *job, RECIPE(), out=tmp_path / "whole", **run)
    said = capfd.readouterr()
    assert (
        said.out.count("epoch 1/3") == 1 and said.out.count("\n") == 3 and "Warning" not in said.err
    )
    with pytest.raises(MemoryError, match="power cut"):
        train(small(), dies, *job[1:], RECIPE(), out=tmp_path / "cut", **run)
    with safe_open(tmp_path / "cut" / "checkpoint.safetensors", "pt") as file:
        assert 0 < len(json.loads(file.metadata()["state"])["history"]) < 3
    second = train(cut, *job, RECIPE(), out=tmp_path / "cut", **run)
    assert first.loss.tolist() == second.loss.tolist()
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), cut.state_dict().values())
    )
    assert len(list((tmp_path / "whole" / "tensorboard").iterdir())) == 1
    with pytest.raises(ValueError, match="processes 2 ≠ 1"):  # apart, it would be another run
        train(
            small(),
            *job,
            RECIPE(), out=tmp_path / "cut", device="cpu", seed=1, identity={"row": "x"},
        )


def test_a_loss_that_is_not_finite_on_one_process_stops_both_and_nothing_is_written(tmp_path):
    def explodes(model, batch, get_images):
        terms = by_methods(model, batch, get_images)
        bad = Replicas.current.rank == 1 and len(steps) == 3
        steps.append(1)
        return terms | {"center": terms["id"] * (float("inf") if bad else 1.0)}

    steps = []
    with pytest.raises(FloatingPointError, match=r"step 3 \(epoch 1\): center = inf"):
        train(
            small(), explodes, IMAGES, ShuffledBatches(40, 10), RECIPE(batch_size=10), out=tmp_path,
            device="cpu", processes=2,
        )
    assert not list(tmp_path.glob("*.safetensors"))


SCRIPT = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from test_processes import IMAGES, PEOPLE, RECIPE, LABELS, small, ide_objective, train
train(small(), ide_objective(LABELS, smoothing=0.1, triplet=1.0), IMAGES, PEOPLE, RECIPE(global_batch=True), out=sys.argv[2], device="cpu", name="shell")
"""


def shell(command: list, tmp_path: Path, **env) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "WORLD_SIZE"} | {
        "OMP_NUM_THREADS": "1", **env,
    }
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=240, env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow("four starts of Python")
def test_accelerate_launch_gives_what_the_notebooks_processes_give(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    here = str(Path(__file__).parent)
    command = [
        "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        "script.py", here, "shell",
    ]
    said = shell(command, tmp_path)
    assert said.count("shell  epoch 1/3") == 1
    job = (
        ide_objective(LABELS, smoothing=0.1, triplet=1.0), IMAGES, PEOPLE,
        RECIPE(global_batch=True),
    )
    train(small(), *job, out=tmp_path / "fork", device="cpu", processes=2)
    files = [
        safe_open(tmp_path / name / "checkpoint.safetensors", "pt") for name in ("shell", "fork")
    ]
    for key in files[0].keys():
        torch.testing.assert_close(
            *(file.get_tensor(key) for file in files), rtol=1e-4, atol=1e-5, msg=key
        )


def test_processes_can_be_started_after_the_parent_has_computed_with_threads(tmp_path):
    script = SCRIPT.replace("train(small()", "torch.set_num_threads(2)\ntrain(small()", 1)
    script += script.splitlines()[-1].replace(
        'name="shell"', 'name="two", resume=False, processes=2'
    )
    (tmp_path / "script.py").write_text(script)
    said = shell(["script.py", str(Path(__file__).parent), "out"], tmp_path, OMP_NUM_THREADS="2")
    assert "shell  epoch 3/3" in said and "two  epoch 3/3" in said


# parts, in one process


@pytest.mark.parametrize(
    ("size", "unit", "processes"), [(64, 4, 3), (7, 1, 7), (12, 3, 4), (32, 1, 5)]
)
def test_shares_are_whole_people_each_once_and_as_even_as_can_be(size, unit, processes):
    shares = [share(size, unit, processes, r) for r in range(processes)]
    assert torch.cat(shares).sort().values.tolist() == list(range(size))
    assert all(
        (part.view(-1, unit) // unit).float().std(dim=1, correction=0).eq(0).all()
        for part in shares
    )
    assert max(map(len, shares)) - min(map(len, shares)) <= unit


def test_every_share_of_a_batch_of_pairs_has_its_part_of_both_kinds():
    i, j, same = next(PairBatches(LABELS.numpy(), 16, 0.5).epoch(0))
    for r in range(4):
        part, weight = Replicas(4, r).shard((i, j, same))
        assert part[2].sum() == 2 and len(part[0]) == 4 and weight == 0.25


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: share(20, 4, 6, 0), "processes is 6, but a batch has only 5 people of 4 images"),
        (lambda: share(10, 4, 2, 0), "whole units of 4"),
        (lambda: launch(print, 1), "launch starts 2 or more"),
        (
            lambda: train(
                small(), by_methods, IMAGES, ShuffledBatches(40, 1), RECIPE(batch_size=1), processes=2,
                device="cpu",
            ),
            "only 1 images or pairs",
        ),
    ],
)
def test_what_cannot_be_shared_is_told(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_rows_that_are_no_multiple_of_the_share_are_told():
    replicas = Replicas(2, 0)
    replicas.shard(torch.arange(10))
    with pytest.raises(ValueError, match="7 rows are no multiple of this process's 5 images"):
        replicas.rows(7)


def test_too_few_gpus_and_a_gpu_in_use_are_told(monkeypatch):
    monkeypatch.setattr(several, "pick_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="processes is 2, but there are 1 GPUs"):
        launch(print, 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="has used the GPU"):
        launch(print, 2)


@pytest.mark.parametrize("seed", range(4))
def test_every_image_gets_the_draw_of_the_single_run(seed):
    augment = Augment(flip=0.5, pad=3, shift=2, erase=0.7)
    batch = IMAGES[:12]
    whole = augment(batch, torch.Generator().manual_seed(seed))
    for r in range(3):
        mine = share(12, 2, 3, r)
        assert torch.equal(
            augment(batch[mine], ShardedGenerator(torch.Generator().manual_seed(seed), mine, 12)),
            whole[mine],
        )


def test_norms_over_all_can_be_differentiated_twice():
    ours, torchs = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    results = []
    for norm in (ours, torchs):
        with global_batch_norm(ours):
            (g,) = torch.autograd.grad((norm(x) ** 3).sum(), x, create_graph=True)
            results.append(torch.autograd.grad((g ** 2).sum(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_gather_is_the_identity_alone_and_apart():
    x = torch.randn(4, 3)
    assert gather(x) is x
    with Replicas(2, 0).active(small()):
        assert gather(x) is x
    assert Replicas.current is None
    torch.testing.assert_close(
        batch_hard_triplet(gather(x), torch.tensor([0, 0, 1, 1])),
        batch_hard_triplet(x, torch.tensor([0, 0, 1, 1])),
    )


def test_the_ledger_tells_apart_only_what_was_computed_apart():
    old = {"lr": 0.1, "device": "cpu"}
    new = old | {"processes": 1, "compile": True, "global_batch": False}
    assert computed_parameters(old) == computed_parameters(new) == {"lr": 0.1}
    assert computed_parameters(new | {"processes": 4, "global_batch": True}) == {"lr": 0.1}
    assert computed_parameters(new | {"processes": 4}) == {"lr": 0.1, "processes": 4}


def test_views_of_the_augmented_share_are_normalised_pixels():
    assert torch.equal(
        Augment(0, 0)(IMAGES[:2], ShardedGenerator(torch.Generator(), torch.arange(2), 4)),
        normalise(IMAGES[:2]),
    )


def can():
    return CAN(10, backbone="tiny", parts=(1, 2), windows="adaptive", collaborative=False, dim=16)


METHODS = {  # each compares images in a way of its own
    "can": (can, can_objective(LABELS), PEOPLE),
    "casn": (
        partial(CASN, 10, backbone="tiny", last_stride=1, hidden=16), casn_objective(LABELS),
        PairBatches(LABELS.numpy(), 8, 0.5),
    ),
    "dcc": (
        partial(DCC, backbone="tiny", dropout=0.0), dcc_objective(training="episodes"),
        IdentityBatches(LABELS.numpy(), 5, 2),
    ),
    "minet": (
        partial(MINet, (64, 32), backbone="tiny", embedding=8, hidden=8, width=16, dropout=0.0),
        minet_objective(LABELS, negatives=1, chunk=64), PEOPLE,
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_shared(method):
    build, objective, batches = METHODS[method]
    images, trained = IMAGES.repeat_interleave(2, 2).repeat_interleave(2, 3), []
    for number in (1, 2):
        torch.manual_seed(0)
        recipe = RECIPE(
            epochs=1, steps=2, lr=0.003, batch_size=batches.batch_size, global_batch=True
        )
        model = build()
        trained.append(
            (
                train(
                    model, objective, images, batches, recipe, device="cpu", processes=number
                ).loss[0],
                weights(model),
            )
        )
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.ENOSYS])
def test_shared_memory_that_cannot_be_written_is_told(monkeypatch, kind):
    def refuse():
        raise OSError(kind, os.strerror(kind))

    monkeypatch.setattr(several.multiprocessing, "Lock", refuse)
    with pytest.raises(ValueError, match=r"processes is 2, but shared memory.*/dev/shm.*processes=1"):
        launch(print, 2, "cpu")
