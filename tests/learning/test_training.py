"The training loop: what stops it, what it never writes, what it never waits for."

import errno
import json
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import quarter_hour
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from made import in_process
from reid_repro.can import can_objective
from reid_repro.casn import casn_objective
from reid_repro.datasets.core import ImageFiles
from reid_repro.ide import ide_objective
from reid_repro.learning.losses import CenterLoss, batch_hard_triplet, id_loss
from reid_repro.minet import minet_objective
from reid_repro.pcb import pcb_objective
from reid_repro.lab.provenance import peak_memory_mib, run_provenance
from reid_repro.utils import arguments, files
from reid_repro.learning.pairs import describe_images
from reid_repro.learning.processes import Replicas, for_processes
from reid_repro.learning.recipe import (
    Recipe, _glibc, borrowed, build_optimizer, fast_math, pick_device,
)
from reid_repro.learning.augmentation import Augment, images_at
from reid_repro.learning.batches import (
    IdentityBatches, PairBatches, RepeatedBatches, ShuffledBatches,
)
from reid_repro.learning.training import Losses, embed, train

LABELS = torch.arange(4).repeat_interleave(6)
IMAGES = torch.randint(
    0, 256, (24, 3, 16, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
BATCHES = ShuffledBatches(24, 8, seed=0)  # three steps an epoch
RECIPE = partial(Recipe, epochs=3, batch_size=8, lr=0.01)


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.classifier = nn.Linear(8, 4)

    def forward(self, pixels):
        f = nn.functional.dropout(self.backbone(pixels).mean((2, 3)), 0.2, self.training)
        return (f, self.classifier(f)) if self.training else f


def fresh() -> Mean:
    torch.manual_seed(0)
    return Mean()


def at(step: int, change):
    "The baseline's objective, but at `step` (from 0) `change` makes its terms."
    plain, calls = ide_objective(LABELS), []

    def objective(model, batch, get_images):
        terms = plain(model, batch, get_images)
        calls.append(1)
        return (
            change(terms, model) if len(calls) == step + 1 else {**terms, "extra": 0 * terms["id"]}
        )

    return objective


def nan_loss(terms, model):
    return {**terms, "extra": terms["id"] * float("nan")}


def nan_gradient(terms, model):
    "A finite loss with an infinite gradient: the root of zero."
    return {
        **terms,
        "extra": (model.classifier.bias - model.classifier.bias.detach()).abs().sum().sqrt(),
    }


def held(path) -> list | None:
    "Epochs in a checkpoint whose every number is finite; None without one."
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        assert all(file.get_tensor(key).isfinite().all() for key in file.keys())
        return [row["epoch"] for row in json.loads(file.metadata()["state"])["history"]]


@pytest.mark.parametrize(
    ("step", "epoch", "kept"),
    [(0, 1, None), (1, 1, None), (2, 1, None), (3, 2, [1]), (5, 2, [1]), (8, 3, [1, 2])],
)
def test_a_bad_loss_is_named_with_its_own_step_and_no_bad_weights_are_written(
    tmp_path, step, epoch, kept
):
    with pytest.raises(
        FloatingPointError, match=rf"step {step} \(epoch {epoch}\): extra = nan; lower lr"
    ):
        train(fresh(), at(step, nan_loss), IMAGES, BATCHES, RECIPE(), out=tmp_path, device="cpu")
    assert held(tmp_path / "checkpoint.safetensors") == kept


@pytest.mark.parametrize(("step", "kept"), [(2, None), (5, [1]), (8, [1, 2])])
def test_weights_that_the_last_step_of_an_epoch_broke_are_not_written(tmp_path, step, kept):
    with pytest.raises(
        FloatingPointError,
        match=(
            rf"weights 'classifier\.bias' are not finite after step {step} \(epoch"
            rf" {step // 3 + 1}\)"
        ),
    ):
        train(
            fresh(), at(step, nan_gradient), IMAGES, BATCHES, RECIPE(weight_decay=0), out=tmp_path,
            device="cpu",
        )
    assert held(tmp_path / "checkpoint.safetensors") == kept


def test_the_step_limit_is_an_end_of_an_epoch_too(tmp_path):
    with pytest.raises(FloatingPointError, match="step 3"):
        train(
            fresh(), at(3, nan_loss), IMAGES, BATCHES, RECIPE(steps=4), out=tmp_path, device="cpu"
        )
    assert held(tmp_path / "checkpoint.safetensors") == [1]


def test_a_bad_gradient_within_an_epoch_shows_in_the_next_steps_loss():
    with pytest.raises(FloatingPointError, match=r"step 1 \(epoch 1\): id = nan"):
        train(fresh(), at(0, nan_gradient), IMAGES, BATCHES, RECIPE(), device="cpu")


def test_what_fails_because_of_a_bad_loss_does_not_hide_it():
    def objective(model, batch, get_images):
        features, scores = model(get_images(batch))
        if not features.isfinite().all():
            raise ValueError("a row of NaN")
        calls.append(1)
        return {"id": id_loss(scores, LABELS[batch]) * (float("nan") if len(calls) == 2 else 1.0)}

    calls = []
    with pytest.raises(FloatingPointError, match=r"step 1 \(epoch 1\): id = nan") as caught:
        train(fresh(), objective, IMAGES, BATCHES, RECIPE(), device="cpu")
    assert isinstance(caught.value.__context__, ValueError)


def test_a_fault_of_an_objective_with_good_losses_is_told_as_it_is():
    with pytest.raises(KeyError, match="mine"):
        train(
            fresh(), at(1, lambda terms, model: terms["mine"]), IMAGES, BATCHES, RECIPE(),
            device="cpu",
        )
    with pytest.raises(ValueError, match="returned id after id, extra"):
        train(
            fresh(), at(1, lambda terms, model: {"id": terms["id"]}), IMAGES, BATCHES, RECIPE(),
            device="cpu",
        )


def test_means_are_those_of_plain_sums():
    losses, seen = Losses(Replicas(), 0), []
    for step in range(50):
        seen.append(torch.rand((), generator=torch.Generator().manual_seed(step)))
        losses.add(step, {"a": seen[-1], "b": 3 * seen[-1]})
    assert losses.means()["a"] == sum(x.item() for x in seen) / 50


def test_embed_refuses_other_images_and_broken_weights():
    model = fresh()
    for images in (IMAGES.float(), IMAGES.float().numpy(), IMAGES[0], IMAGES[:, :1]):
        with pytest.raises(ValueError, match="images must be uint8 of shape"):
            embed(model, images, device="cpu")
    with torch.no_grad():
        model.backbone[0].weight[0] = float("nan")
    with pytest.raises(
        ValueError,
        match=r"embeddings of 24 images \(first: 0\) are not finite: broken weights; load others",
    ):
        embed(model, IMAGES, device="cpu")


class Counted:
    "A source of images that keeps how many were asked for at a time."

    def __init__(self, images):
        self.images, self.asked = images, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, indices):
        self.asked.append(len(indices))
        return self.images[indices]


def sources(folder) -> dict:
    "The same images as a memory map, as files, and as an object of one's own."
    paths = [folder / f"{i}.png" for i in range(len(IMAGES))]
    for path, image in zip(paths, IMAGES):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    np.save(folder / "images.npy", IMAGES.numpy())
    mapped = np.load(folder / "images.npy", mmap_mode="r")
    return {"map": mapped, "files": ImageFiles(paths, 16, 8), "own": Counted(IMAGES)}


def test_any_source_of_images_gives_what_one_tensor_gives_and_is_asked_for_a_batch_at_a_time(
    tmp_path,
):
    def trained(images):
        model = fresh()
        history = train(model, ide_objective(LABELS), images, BATCHES, RECIPE(pad=1), device="cpu")
        return history.loss.tolist(), embed(model, images, batch_size=5, device="cpu")

    losses, features = trained(IMAGES)
    images = sources(tmp_path)
    for source in images.values():
        other_losses, other_features = trained(source)
        assert other_losses == losses and torch.equal(other_features, features)
    assert set(images["own"].asked) == {8, 5, 4}
    with pytest.raises(ValueError, match="images must be uint8 of shape"):
        embed(fresh(), Counted(IMAGES.float()), device="cpu")


def test_recipe_and_sampler_agree_on_the_batch_size():
    def job(batches, size):
        recipe = RECIPE(epochs=0, batch_size=size)
        train(fresh(), ide_objective(LABELS), IMAGES, batches, recipe, device="cpu")

    pairs = PairBatches(LABELS.numpy(), 4)
    for batches, size in (
        (BATCHES, 8), (IdentityBatches(LABELS.numpy(), 2, 3), 6), (RepeatedBatches(BATCHES, 2), 8),
        (pairs, 4), (pairs, 8), ([[0, 1]], 5),
    ):
        job(batches, size)
    for batches, size in ((BATCHES, 9), (RepeatedBatches(BATCHES, 2), 16), (pairs, 16)):
        with pytest.raises(ValueError, match=rf"batch_size \d, the recipe has batch_size {size}"):
            job(batches, size)


def test_a_checkpoint_from_before_there_were_processes_continues(tmp_path):
    from safetensors.torch import load_file, save_file

    job = (ide_objective(LABELS), IMAGES, BATCHES)
    path = tmp_path / "checkpoint.safetensors"
    train(fresh(), *job, RECIPE(epochs=1), out=tmp_path, device="cpu")
    with safe_open(path, "pt") as file:
        state = json.loads(file.metadata()["state"])
    del state["run"]["processes"]
    state["run"]["epochs"] = 3
    save_file(load_file(path), path, {"state": json.dumps(state)})
    assert len(train(fresh(), *job, RECIPE(), out=tmp_path, device="cpu")) == 3


def test_a_compiled_network_trains_to_the_same_weights_under_the_same_names(monkeypatch):
    # all but the compiler at its end
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain, compiled = fresh(), fresh()
    recipe = RECIPE(optimizer="sgd")
    first = train(plain, ide_objective(LABELS), IMAGES, BATCHES, recipe, device="cpu")
    second = train(
        compiled, ide_objective(LABELS), IMAGES, BATCHES, recipe, device="cpu", compile=True
    )
    torch.testing.assert_close(
        torch.tensor(first.loss), torch.tensor(second.loss), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(plain.state_dict(), compiled.state_dict(), rtol=1e-4, atol=1e-5)
    assert embed(compiled, IMAGES, device="cpu").shape == (24, 8)


def test_half_precision_hands_the_objective_float32_and_leaves_the_model_as_it_was():
    def objective(model, batch, get_images):
        features, scores = model(get_images(batch))
        kinds.append((features.dtype, scores.dtype))
        return {"id": id_loss(scores, LABELS[batch])}

    kinds, model = [], fresh()
    for _ in range(2):  # a second training of the same model, too
        train(model, objective, IMAGES, BATCHES, RECIPE(epochs=1, precision="bf16"), device="cpu")
        assert embed(model, IMAGES, device="cpu").dtype == torch.float32
    assert set(kinds) == {(torch.float32, torch.float32)}
    assert "forward" not in vars(model)


# what a step makes a GPU wait for, looked for without one: tensors that only pretend to be on it
# refuse to be read

class Copies(TorchDispatchMode):
    "Fails at a copy between devices that waits for the queue."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") not in (
            None, args[0].device,
        ):
            assert kwargs.get(
                "non_blocking"
            ), "a copy to another device waits; pass non_blocking=True"
        if func is torch.ops.aten.copy_.default:
            assert args[0].device == args[1].device or (
                args[2:] and args[2]
            ), "a copy to another device waits"
        return func(*args, **kwargs)


class Pretence(FakeTensorMode):
    "A GPU that only pretends to be there; what is on the CPU is computed there."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tree_leaves((args, kwargs or {}))
        devices = [value.type for value in given if isinstance(value, torch.device)]
        if "cuda" in devices or any(isinstance(value, FakeTensor) for value in given):
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def placed(model, place):
    "The model with each parameter and buffer as `place` returns it."
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(place(value.detach()))
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = place(value)
    return model


def step_of(headline: str, place: str) -> None:
    "A step of a headline row, all of it on `place` but the batch; back, too, where it can."
    model, objective, batches, images, _ = quarter_hour._task(headline, "smoke", (128, 64))
    model = placed(model, lambda value: torch.empty_like(value, device=place)).train()
    pixels, augment = torch.empty_like(images, device=place), Augment(0.5, 4, 2, 0.5)

    class OnDevice:
        def uniform(self, shape, axis):
            return torch.rand(shape, device=place)

    with Copies():
        terms = objective(
            model, next(iter(batches.epoch(0))),
            lambda rows: augment(images_at(pixels, rows, place), OnDevice()),
        )
        if place == "meta":
            sum(terms.values()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            build_optimizer(model, RECIPE()).step()
        Replicas().total(torch.stack([term.detach().double() for term in terms.values()]))
    assert {term.device.type for term in terms.values()} == {place}


@pytest.mark.parametrize("headline", quarter_hour.HEADLINES)
def test_no_method_waits_for_its_device_in_a_step(headline, monkeypatch):
    # CASN's loss holds a gradient, and the pretended GPU has no way back
    monkeypatch.setattr(
        torch.autograd, "grad", lambda value, to, **options: [torch.empty_like(to)]
    )
    with Pretence(allow_non_fake_inputs=True):
        step_of(headline, "cuda")


def step_on_meta(headline: str) -> None:
    torch.autocast = lambda device, **options: nullcontext()
    step_of(headline, "meta")


@pytest.mark.parametrize("headline", quarter_hour.HEADLINES)
def test_nor_does_it_on_the_way_back(headline):
    # gradients on another device start threads, after which a process must not fork any more
    assert in_process(step_on_meta, headline) == 0


def test_losses_read_nothing_back_from_the_device():
    with FakeTensorMode(), Copies():
        features, labels = torch.rand(12, 8, device="cuda"), torch.arange(12, device="cuda") // 3
        center = nn.Module.__new__(CenterLoss)
        nn.Module.__init__(center)
        center.squared, center.centers = True, torch.rand(4, 8, device="cuda")
        (
            id_loss(features, labels, 0.1)
            + batch_hard_triplet(features, labels)
            + center(features, labels)
        )
        center.update_centers(features, labels)


def test_the_search_for_waits_finds_some():
    with FakeTensorMode():
        x = torch.rand(3, device="cuda")
        with pytest.raises(Exception, match="_local_scalar_dense"):
            x.sum().item()
        with Copies(), pytest.raises(AssertionError, match="non_blocking"):
            torch.rand(3).to("cuda")


def test_the_optimiser_is_fused_on_a_gpu_and_plain_on_the_cpu():
    assert not build_optimizer(fresh(), RECIPE()).param_groups[0]["fused"]
    with FakeTensorMode():
        with torch.device("cuda"):
            model = Mean()
        for kind in ("adamw", "adam", "sgd"):
            assert build_optimizer(model, RECIPE(optimizer=kind)).param_groups[0]["fused"]


HERE = ["cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)]


@pytest.mark.parametrize("device", HERE)
def test_devices_are_objects_or_their_names(device):
    model = fresh()
    assert pick_device(device) == torch.device("cpu")
    expected = embed(model, IMAGES, device="cpu")
    assert embed(model, IMAGES, device=device).equal(expected)
    assert embed(model, IMAGES, device=next(model.parameters()).device).equal(expected)
    with borrowed(model, device) as place:
        assert place.type == "cpu"
    history = train(model, ide_objective(LABELS), IMAGES, BATCHES, RECIPE(epochs=1), device=device)
    assert len(history) == 1 and peak_memory_mib(device) > 0 and run_provenance(device)["device"]
    with fast_math(device), fast_math("auto"):
        assert torch.backends.cudnn.benchmark == torch.cuda.is_available()


@pytest.mark.parametrize(
    "device", ["tpu", "cuda:x", "", None, 0, "meta", torch.device("meta"), "CPU"]
)
def test_other_devices_are_named(device):
    with pytest.raises(ValueError, match="is unknown; take auto, cpu, cuda or one of several GPUs"):
        pick_device(device)
    if isinstance(device, str):
        with pytest.raises(ValueError, match="is unknown; take auto"), fast_math(device):
            pass


def test_one_of_several_gpus(monkeypatch):
    monkeypatch.setattr(arguments, "_has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda", "cuda:1", torch.device("cuda", 1)):
        assert pick_device(device) == torch.device(device)
    with pytest.raises(ValueError, match=r"'cuda:2' is not available.*cuda:0 to cuda:1"):
        pick_device("cuda:2")
    with pytest.raises(ValueError, match="'cuda:1' is one GPU, but processes is 2"):
        for_processes(pick_device("cuda:1"), 2)
    monkeypatch.setattr(arguments, "_has_gpu", lambda: False)
    with pytest.raises(ValueError, match="'cuda:1' is not available on this machine"):
        pick_device("cuda:1")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_embeddings_of_any_precision_are_float32(kind):
    plain, other = fresh(), fresh().to(kind)
    expected, found = embed(plain, IMAGES, device="cpu"), embed(other, IMAGES, device="cpu")
    assert found.dtype == torch.float32 and next(other.parameters()).dtype == kind
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    (maps,) = describe_images(other, lambda pixels: (other(pixels),), IMAGES, device="cpu")
    assert maps.dtype == torch.float32 and maps.equal(found)
    with pytest.raises(ValueError, match=rf"model is in {kind}; this needs float32: take"):
        train(other, ide_objective(LABELS), IMAGES, BATCHES, RECIPE(), device="cpu")
    with pytest.raises(ValueError, match="this needs float32"), borrowed(other, "cpu"):
        pass


def test_mixed_precision_that_does_not_fit_and_overflow_are_named():
    mixed = fresh()
    mixed.backbone.half()
    mixed.backbone[0].float()  # its output meets norms in half precision
    mixed.backbone.append(nn.Conv2d(8, 8, 1).double())
    with pytest.raises(ValueError, match=r"model is in torch.float32 and .*take model.float()"):
        embed(mixed, IMAGES, device="cpu")
    large = fresh().half()
    with torch.no_grad():
        large.backbone[0].weight.fill_(6e4)
        large.backbone[1].weight.fill_(6e4)
    with pytest.raises(ValueError, match=r"too large for torch.float16; take model.float()"):
        embed(large, IMAGES, device="cpu")


def test_a_model_with_another_number_of_rows_is_named():
    "One row would otherwise be taken for all."
    class Pooled(Mean):
        def forward(self, pixels):
            return super().forward(pixels).mean(0, keepdim=True)

    with pytest.raises(ValueError, match="model gave 1 rows for 24 images"):
        embed(Pooled(), IMAGES, device="cpu")
    assert embed(fresh(), IMAGES[:0], device="cpu").shape == (0, 8)


def test_the_epoch_that_validates_best_stays_in_a_run_that_was_killed_too(tmp_path):
    scores, seen = [1.0, 5.0, 2.0, 5.0], []

    def validate(model):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return scores[len(seen) - 1]

    def killed(step):
        def change(terms, model):
            raise KeyboardInterrupt

        return at(step, change)

    options = dict(recipe=RECIPE(epochs=4), out=tmp_path, device="cpu", validate=validate)
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), killed(7), IMAGES, BATCHES, **options)  # in the third epoch
    model = fresh()
    history = train(model, ide_objective(LABELS), IMAGES, BATCHES, **options)
    assert history.validation.tolist() == scores
    torch.testing.assert_close(model.state_dict(), seen[1], rtol=0, atol=0)
    again = fresh()  # the checkpoint that is left is of that epoch, too
    train(again, ide_objective(LABELS), IMAGES, BATCHES, **options)
    assert len(seen) == 4
    torch.testing.assert_close(again.state_dict(), seen[1], rtol=0, atol=0)
    with pytest.raises(ValueError, match="validate gave nan after epoch 1"):
        train(
            fresh(), ide_objective(LABELS), IMAGES, BATCHES, RECIPE(), device="cpu",
            validate=lambda model: float("nan"),
        )


class Giving(torch.nn.Module):
    "A network that gives what `change` makes of its feature vectors."

    def __init__(self, change):
        super().__init__()
        self.net, self.change = fresh(), change

    def forward(self, images):
        return self.change(self.net(images))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f, f), "tuple"), (lambda f: {"features": f}, "dict"), (lambda f: [f], "list"),
        (lambda f: f.numpy(), "ndarray"), (lambda f: None, "NoneType"),
        (lambda f: f[:, :, None, None], r"shape \(\d+, 8, 1, 1\)"), (lambda f: f[:, 0], "shape"),
        (lambda f: f[:, :0], r"shape \(\d+, 0\)"), (lambda f: f + 0j, "complex64"),
        (lambda f: f.to_sparse(), "sparse"),
    ],
)
def test_what_is_no_feature_vector_is_named(change, words):
    with pytest.raises(ValueError, match=f"model gave .*{words}.*one vector per image"):
        embed(Giving(change), IMAGES, device="cpu")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda images: images.mean((2, 3)), "model is function"),
        (lambda: None, "model is function"), (None, "model is NoneType"),
        (fresh().forward, "model is method"), (type(fresh()), "model is type"),
        (fresh().to("meta"), "holds no numbers"), (fresh().to(torch.complex64), "complex64"),
    ],
)
@pytest.mark.filterwarnings("ignore:Complex modules")
def test_what_is_no_network_is_named(model, words):
    objective = ide_objective(LABELS)
    for action in (
        lambda: embed(model, IMAGES, device="cpu"),
        lambda: train(model, objective, IMAGES, recipe=RECIPE(epochs=1), device="cpu"),
        lambda: describe_images(model, lambda x: (model(x),), IMAGES, device="cpu"),
    ):
        with pytest.raises(ValueError, match=words):
            action()


@pytest.mark.parametrize("size", [0, -1, True, "4", None, 2.5])
def test_a_batch_is_a_whole_number(size):
    model = fresh()
    for action in (
        lambda: embed(model, IMAGES, batch_size=size, device="cpu"),
        lambda: describe_images(model, lambda x: (model(x),), IMAGES, size, "cpu"),
    ):
        with pytest.raises(
            ValueError, match=r"batch_size (must be a whole number from|is .* at least) 1"
        ):
            action()
    assert embed(model, IMAGES, batch_size=4.0, device="cpu").shape == (24, 8)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (list(IMAGES), "images is a list.*torch.stack.*ImageFiles"),
        (["a.jpg", "b.jpg"] * 12, "images is a list.*ImageFiles"),
        (tuple(IMAGES), "images is a tuple"), (IMAGES.to("meta"), "hold no numbers"),
        (torch.utils.data.TensorDataset(IMAGES), "not tuple"), (IMAGES.to_sparse(), "sparse"),
        (np.ma.masked_array(IMAGES.numpy(), IMAGES.numpy() > 9), "images: .* are masked"),
        ("photographs", "images is a str"), (None, "images is a NoneType"),
    ],
)
def test_what_is_no_source_of_images_is_named(images, words):
    model = fresh()
    for action in (
        lambda: embed(model, images, device="cpu"),
        lambda: train(model, ide_objective(LABELS), images, recipe=RECIPE(epochs=1), device="cpu"),
        lambda: describe_images(model, lambda x: (model(x),), images, device="cpu"),
    ):
        with pytest.raises(ValueError, match=words):
            action()


def test_a_first_stage_counts_its_own_epochs(capsys):
    "Whatever the run that it is part of calls its epochs."
    train(
        fresh(), ide_objective(LABELS), IMAGES, BATCHES, RECIPE(epochs=2), device="cpu",
        identity={"epochs": 7},
    )
    assert "epoch 2/2" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_training_where_nothing_can_be_locked(kind, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(kind, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(files, "_warned", [])
    given = ide_objective(LABELS), IMAGES, BATCHES
    with pytest.warns(UserWarning, match="has no locks"):
        train(fresh(), *given, RECIPE(), device="cpu", out=tmp_path)
    assert held(tmp_path / "checkpoint.safetensors")


@pytest.mark.skipif(_glibc() is None, reason="glibc alone can be told to keep what is freed")
def test_a_step_does_not_ask_for_memory_anew():
    "Pages that come anew are emptied by the system first; behind the training they are given back."
    import resource

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(16):
            torch.ones(2**23)  # 32 MiB, 8,192 pages, unless the system has larger ones
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with fast_math("cpu"):
        faults()
        inside = faults()
    # among many tests another object may take the place in between, once
    assert inside < faults() / 4


OBJECTIVES = [ide_objective, pcb_objective, can_objective, casn_objective, minet_objective]


@pytest.mark.parametrize("given", [LABELS.numpy(), LABELS.tolist(), LABELS.int(), LABELS])
def test_labels_may_be_an_array_or_a_list(given):
    for make in OBJECTIVES:
        assert make(given).labels.dtype == torch.int64 and make(given).labels.equal(LABELS)
    found, wanted = (
        train(fresh(), ide_objective(labels), IMAGES, BATCHES, RECIPE(epochs=1), device="cpu").loss
        for labels in (given, LABELS)
    )
    assert found.equals(wanted)


@pytest.mark.parametrize(
    "given", [LABELS.float(), LABELS > 1, LABELS[:, None], ["ann"], [[0], [1, 2]], None, 3, []]
)
@pytest.mark.parametrize("make", OBJECTIVES)
def test_what_are_no_labels_is_named(make, given):
    with pytest.raises(ValueError, match=r"labels must be whole numbers .*pass Split.labels"):
        make(given)


@pytest.mark.parametrize("number", [12, 23, 48])
@pytest.mark.parametrize("make", OBJECTIVES)
def test_labels_of_other_images_are_told_before_training(make, number):
    labels = torch.arange(number) % 4
    with pytest.raises(ValueError, match=f"objective has {number} labels for 24 images"):
        train(fresh(), make(labels), IMAGES, BATCHES, RECIPE(epochs=1), device="cpu")
