"""Losses: values and gradients against plain loops and libraries, and faults that must name their
argument.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from reid_repro.learning.losses import CenterLoss, batch_hard_triplet, id_loss


def batch(people=8, each=4, dim=16, seed=0):
    features = torch.randn(people * each, dim, generator=torch.Generator().manual_seed(seed))
    return features, torch.arange(people).repeat_interleave(each)


def scores(n=16, classes=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, classes, generator=g), torch.randint(0, classes, (n,), generator=g)


def loop_triplet(features, labels, margin, squared):
    total = 0.0
    for a, fa in enumerate(features.double()):
        far, near = -math.inf, math.inf
        for b, fb in enumerate(features.double()):
            d = float((fa - fb).square().sum())
            d = d if squared else math.sqrt(d)
            if labels[a] != labels[b]:
                near = min(near, d)
            elif a != b:
                far = max(far, d)
        total += (
            math.log1p(math.exp(far - near)) if margin is None else max(0.0, margin + far - near)
        )
    return total / len(features)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_id_loss_is_smoothed_cross_entropy(smoothing):
    z, y = scores()
    torch.testing.assert_close(
        id_loss(z, y, smoothing), F.cross_entropy(z, y, label_smoothing=smoothing), atol=1e-6,
        rtol=0,
    )
    z.requires_grad_(True)
    (gradient,) = torch.autograd.grad(id_loss(z, y, smoothing), z)
    q = (1 - smoothing) * F.one_hot(y, 10) + smoothing / 10
    torch.testing.assert_close(gradient, (z.softmax(1) - q) / 16, atol=1e-7, rtol=0)


def test_id_loss_by_hand_and_at_extremes():
    assert id_loss(torch.zeros(3, 7), torch.tensor([0, 3, 6])).item() == pytest.approx(
        math.log(7), abs=1e-6
    )
    assert id_loss(torch.tensor([[1e4, 0.0]]), torch.tensor([1])).item() == 1e4
    assert id_loss(torch.tensor([[1e4, 0.0]]), torch.tensor([0])).item() == 0


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("margin", [0.3, 2.0, 0.0, None])
@pytest.mark.parametrize("seed", range(3))
def test_triplet_equals_the_loop(margin, squared, seed):
    features, labels = batch(seed=seed)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    features, labels = features[order], labels[order]
    assert batch_hard_triplet(features, labels, margin, squared).item() == pytest.approx(
        loop_triplet(features, labels, margin, squared), abs=1e-5)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("margin", [0.3, None])
def test_triplet_equals_pytorch_metric_learning(margin, squared):
    pml = pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, miners, reducers

    assert pml
    features, labels = batch()
    distance = distances.LpDistance(normalize_embeddings=False, power=2 if squared else 1)
    oracle = losses.TripletMarginLoss(
        margin or 0.0, smooth_loss=margin is None, distance=distance, reducer=reducers.MeanReducer()
    )
    gradients = []
    for loss in (lambda f: batch_hard_triplet(f, labels, margin, squared),
                 lambda f: oracle(f, labels, miners.BatchHardMiner(distance=distance)(f, labels))):
        f = features.clone().requires_grad_(True)
        value = loss(f)
        gradients.append((value, *torch.autograd.grad(value, f)))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-6)


def test_triplet_by_hand():
    f = torch.tensor([[0.0, 0], [0, 4], [3, 0], [3, 1]])
    y = torch.tensor([0, 0, 1, 1])
    # distances: 0-1 4, 2-3 1, 0-2 3, 0-3 √10, 1-2 5, 1-3 √18
    expected = ((0.3 + 4 - 3) + max(0, 0.3 + 4 - math.sqrt(18)) + 0 + 0) / 4
    assert batch_hard_triplet(f, y).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("margin", [0.3, None])
def test_identical_features_give_finite_gradients(margin, squared):
    f = torch.ones(8, 4, requires_grad=True)
    loss = batch_hard_triplet(f, torch.arange(4).repeat_interleave(2), margin, squared)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2) if margin is None else margin, abs=1e-6)
    assert (f.grad == 0).all()


def test_close_features_keep_their_digits():
    f = 1000 + torch.tensor([[0.0], [0.25], [1.0], [1.25]])
    assert batch_hard_triplet(f, torch.tensor([0, 0, 1, 1]), margin=1.0).item() == pytest.approx(
        (1 + 0.25 - 1.0 + 1 + 0.25 - 0.75) / 2, abs=1e-6)


@pytest.mark.parametrize("squared", [False, True])
def test_center_loss_and_its_gradients(squared):
    features, labels = batch(seed=5)
    loss = CenterLoss(10, 16, squared)
    loss.centers.requires_grad_(True)
    f = features.clone().requires_grad_(True)
    value = loss(f, labels)
    away = (features - loss.centers[labels]).detach()
    norms = away.norm(dim=1)
    expected = (norms.square() / 2 if squared else norms).mean()
    torch.testing.assert_close(value, expected)
    to_f, to_c = torch.autograd.grad(value, (f, loss.centers))
    pull = (away if squared else away / norms[:, None]) / len(f)
    torch.testing.assert_close(to_f, pull)
    torch.testing.assert_close(to_c, torch.zeros(10, 16).index_add(0, labels, -pull))
    assert (to_c[8:] == 0).all()


def test_center_loss_starts_from_its_seed_and_saves_its_centers():
    state = torch.get_rng_state()
    a, b, c = CenterLoss(4, 3, seed=1), CenterLoss(4, 3, seed=1), CenterLoss(4, 3, seed=2)
    assert torch.equal(a.centers, b.centers) and not torch.equal(a.centers, c.centers)
    assert torch.equal(state, torch.get_rng_state()), "the global generator is left alone"
    assert (
        list(a.state_dict()) == ["centers"]
        and not a.centers.requires_grad
        and not list(a.parameters())
    )


@pytest.mark.parametrize("rate", [0.1, 0.5, 1])
def test_centers_follow_person_by_person(rate):
    features, labels = batch(seed=6)
    labels[-1] = labels[0]  # somebody with more photographs than the others
    loss = CenterLoss(10, 16)
    before = loss.centers.clone()
    loss.update_centers(features.requires_grad_(True), labels, rate)
    for k in range(10):
        mine = features[labels == k].detach()
        step = sum((before[k] - f for f in mine), torch.zeros(16)) / (1 + len(mine))
        torch.testing.assert_close(loss.centers[k], before[k] - rate * step)
    assert torch.equal(loss.centers[8:], before[8:]) and not loss.centers.requires_grad


def test_centers_may_follow_between_forward_and_backward():
    features, labels = batch(seed=7)
    loss, f = CenterLoss(10, 16), features.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(loss(f, labels), f)
    value = loss(f, labels)
    loss.update_centers(f, labels)
    torch.testing.assert_close(torch.autograd.grad(value, f)[0], expected)


def test_center_on_its_photograph_gives_finite_gradients():
    loss = CenterLoss(2, 3, squared=False)
    f = loss.centers.clone().requires_grad_(True)
    loss(f, torch.tensor([0, 1])).backward()
    assert (f.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_everything_is_float32_even_under_autocast(dtype):
    features, labels = batch()
    z, y = scores()
    center = CenterLoss(8, 16)
    cases = {
        "id": lambda t: id_loss(z.to(t), y, 0.1),
        "triplet": lambda t: batch_hard_triplet(features.to(t), labels, None),
        "center": lambda t: center(features.to(t), labels),
    }
    for name, case in cases.items():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = case(dtype)
        assert inside.dtype == torch.float32 and torch.equal(inside, case(dtype)), name


def ids(*values):
    return torch.tensor(values)


F42 = torch.randn(4, 2)


@pytest.mark.parametrize(
    "call,words",
    [
        (
            lambda: batch_hard_triplet(F42, ids(3, 3, 3, 3)),
            r"labels hold a single identity \(3\).*IdentityBatches",
        ),
        (
            lambda: batch_hard_triplet(F42, ids(1, 1, 2, 5)),
            "labels hold identity 2 only once.*IdentityBatches",
        ),
        (lambda: batch_hard_triplet(F42, ids(1, 2, 3, 4)), "labels hold identity 1 only once"),
        (lambda: batch_hard_triplet(F42[0], ids(1, 1)), "features must be floating point"),
        (lambda: batch_hard_triplet(F42[:0], ids(1)[:0]), "features must be"),
        (lambda: batch_hard_triplet(F42.long(), ids(1, 1, 2, 2)), "features must be"),
        (lambda: batch_hard_triplet(F42, ids(1, 1, 2)), r"labels must be int64 of shape \(4,\)"),
        (lambda: batch_hard_triplet(F42, ids(1, 1, 2, 2).float()), "labels must be int64"),
        (lambda: id_loss(F42, ids(0, 1, 2, 0)), "labels must lie in 0 … 1, but range from 0 to 2"),
        (
            lambda: id_loss(F42, ids(0, 1, -1, 0)),
            "labels must lie in 0 … 1, but range from -1 to 1",
        ),
        (lambda: id_loss(F42, ids(0, 1, 1)), "labels must be"),
        (lambda: id_loss(F42[0], ids(0, 1)), "logits must be"),
        (lambda: id_loss(F42, ids(0, 1, 1, 0), smoothing=1.0), "smoothing"),
        (lambda: id_loss(F42, ids(0, 1, 1, 0), smoothing="0.1"), "smoothing"),
        (lambda: id_loss(F42, ids(0, 1, 1, 0), smoothing=math.nan), "smoothing"),
        (lambda: id_loss(F42, [0, 1, 1, 0]), "labels must be int64.*not list"),
        (lambda: id_loss(torch.tensor(1.0), ids(0)), "logits must be"),
        (lambda: id_loss([[0.0, 1.0]], ids(0)), "logits must be.*not list"),
        (lambda: batch_hard_triplet(F42, [1, 1, 2, 2]), "labels must be int64"),
        (lambda: batch_hard_triplet(F42, ids(1, 1, 2, 2), margin=math.nan), "margin"),
        (lambda: batch_hard_triplet(F42, ids(1, 1, 2, 2), margin="soft"), "margin"),
        (lambda: CenterLoss(3, 2)(F42, [0, 1, 2, 0]), "labels must be int64"),
        (lambda: id_loss(F42, ids(0, 1, 1, 0), smoothing=-0.1), "smoothing"),
        (lambda: CenterLoss(3, 2)(F42, ids(0, 1, 3, 0)), "labels must lie in 0 … 2"),
        (lambda: CenterLoss(4, 3)(F42, ids(0, 1, 3, 0)), "features must have 3 columns.*not 2"),
        (
            lambda: CenterLoss(4, 3).update_centers(F42, ids(0, 1, 3, 0)),
            "features must have 3 columns.*not 2",
        ),
        (lambda: CenterLoss(3, 2).update_centers(F42, ids(0, 1, 3, 0)), "labels must lie in 0 … 2"),
        (lambda: CenterLoss(4, 2).update_centers(F42, ids(0, 1, 3, 0), 0.0), "rate must lie in"),
        (
            lambda: CenterLoss(4, 2).update_centers(F42, ids(0, 1, 3, 0), float("nan")),
            "rate must lie in",
        ),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()
