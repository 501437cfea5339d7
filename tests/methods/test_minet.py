"""MI-Net: gate, sweeps and loss against independent forms, pairs one by one against blocks, table
1's rows; VGG streams and FC-CNN.
"""

import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made import pixels, random
from torch import nn

from reid_repro.lab.configuration import declared, resolve
from reid_repro.evaluation import evaluate
from reid_repro.evaluation.metric_learning import Metric, pair_covariances, xqda
from reid_repro import minet
from reid_repro.minet import (
    MINet, MultiplicativeGate, RecurrentPooling, batch_pairs, binomial_deviance, minet_objective,
    pair_differences, pulse, minet_distances, two_way,
)
from reid_repro.lab.provenance import project_root
from reid_repro.learning.recipe import Recipe, build_optimizer
from reid_repro.lab.results import reported
from reid_repro.lab.rows import plan, read_profile, read_rows
from reid_repro.learning.augmentation import normalise
from reid_repro.learning.batches import IdentityBatches, passes_for
from reid_repro.learning.pooling import FourWayIRNN, pyramid_pool
from reid_repro.learning.training import train
from reid_repro.learning.vgg import FCCNN, build_stream, map_size

NETWORKS = [
    {}, {"pooling": "spp"}, {"fusion": "bilinear"}, {"fusion": "hadamard"},
    {"fusion": "hadamard", "pooling": "spp"}, {"fusion": "linear", "norm_maps": True},
    {"norm_maps": True, "pooling": "spp"}, {"fusion": "bilinear", "pooling": "spp"},
]


def network(seed=0, backbone="tiny", **options):
    """A tiny MI-Net for 64×32 images; recurrent matrices off the identity, batch norms off it as
    well.
    """
    torch.manual_seed(seed)
    model = MINet(
        (64, 32), backbone=backbone,
        **{"embedding": 12, "hidden": 6, "width": 8, "dropout": 0.0, **options},
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("recurrent"):
                p.add_(0.2 * torch.randn_like(p))
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 1.5), norm.bias.uniform_(-0.3, 0.3)
            norm.running_mean.uniform_(-0.2, 0.2), norm.running_var.uniform_(0.5, 1.5)
    return model


# ---------------------------------------------------------------- the gate


@pytest.mark.parametrize("activation", ["sigmoid", "identity"])
def test_gate_is_the_equation_at_every_position(activation):
    torch.manual_seed(0)
    gate = MultiplicativeGate(5, 7, activation).double()
    gA, gB = random(2, 5, 3, 4), random(2, 5, 3, 4, seed=1)
    U, V, P = (m.weight.flatten(1).T for m in (gate.U, gate.V, gate.P))  # (C, d), (C, d), (d, C)
    act = (lambda x: 1 / (1 + (-x).exp())) if activation == "sigmoid" else (lambda x: x)
    out = gate(gA, gB)
    for n, i, j in ((0, 0, 0), (1, 2, 3), (0, 1, 2)):
        joint = act(U.T @ gA[n, :, i, j] + gate.U.bias) * act(V.T @ gB[n, :, i, j] + gate.V.bias)
        torch.testing.assert_close(out[n, :, i, j], P.T @ joint + gate.P.bias)
    a, b = gate.embed(gA, gB)
    torch.testing.assert_close(gate.P(a * b), out)
    assert torch.equal(gate.embed(gA, 5 * gB)[0], a) and torch.equal(
        gate.embed(5 * gA, gB)[1], b
    ), "a factor belongs to one image"
    assert not torch.allclose(gate(gB, gA), out), "the order counts"
    assert sum(p.numel() for p in gate.parameters()) == 3 * 5 * 7 + 5 + 2 * 7


def test_eq_3_as_derived_and_as_printed():
    """Linear gate, one position: U diag(v) P G and V diag(u) P G are the gradients; the printed
    lines are not, with P = 1 either.
    """
    torch.manual_seed(0)
    gate = MultiplicativeGate(4, 4, "identity").double()
    gA, gB, G = (random(1, 4, 1, 1, seed=s).requires_grad_() for s in range(3))
    exact = [g.flatten() for g in torch.autograd.grad((gate(gA, gB) * G).sum(), (gA, gB))]
    U, V, P = (m.weight.flatten(1).T for m in (gate.U, gate.V, gate.P))
    x, y, G = gA.flatten(), gB.flatten(), G.flatten()
    u, v = U.T @ x + gate.U.bias, V.T @ y + gate.V.bias
    torch.testing.assert_close(U @ (v * (P @ G)), exact[0])
    torch.testing.assert_close(V @ (u * (P @ G)), exact[1])
    assert not torch.allclose(U @ ((V.T @ y) * G), exact[0]) and not torch.allclose(
        V @ ((U.T @ y) * G), exact[1]
    )
    with torch.no_grad():
        gate.P.weight.copy_(torch.eye(4)[..., None, None]), gate.U.bias.zero_(), gate.V.bias.zero_()
    exact = [
        g.flatten() for g in torch.autograd.grad((gate(gA, gB) * G[:, None, None]).sum(), (gA, gB))
    ]
    torch.testing.assert_close(U @ ((V.T @ y) * G), exact[0])  # then the first line holds
    assert not torch.allclose(V @ ((U.T @ y) * G), exact[1])  # and the second does not


def test_bilinear_pooling_has_roots_and_length_one_at_every_position():
    """The rule of `pooling.signed_sqrt_normalize` on one vector, by hand; the plain gate has the
    product.
    """
    torch.manual_seed(0)
    gate = MultiplicativeGate(5, 7, "identity", evened=True).double()
    plain = MultiplicativeGate(5, 7, "identity").double()
    plain.load_state_dict(gate.state_dict())
    gA, gB = random(2, 5, 3, 4), random(2, 5, 3, 4, seed=1)
    product = torch.prod(torch.stack(gate.embed(gA, gB)), 0)
    evened = gate.multiply(*gate.embed(gA, gB))
    for n, i, j in ((0, 0, 0), (1, 2, 3)):
        roots = product[n, :, i, j].sign() * product[n, :, i, j].abs().sqrt()
        torch.testing.assert_close(evened[n, :, i, j], roots / roots.norm())
    torch.testing.assert_close(gate(gA, gB), gate.P(evened))
    assert torch.equal(plain.multiply(*plain.embed(gA, gB)), product)
    one = [f[:1, None] for f in gate.embed(gA, gB)]  # leading sizes broadcast
    torch.testing.assert_close(gate.multiply(one[0], gate.embed(gA, gB)[1]).shape, (1, 2, 7, 3, 4))


def test_gate_refuses():
    with pytest.raises(ValueError, match="activation 'tanh' is unknown; take sigmoid"):
        MultiplicativeGate(4, 4, "tanh")


# ---------------------------------------------------------------- the sweeps


@pytest.mark.parametrize("height,width", [(1, 1), (1, 6), (5, 1), (4, 4), (3, 7)])
def test_sweeps_are_torchs_recurrent_layers(height, width):
    torch.manual_seed(0)
    layer = FourWayIRNN(5, 4).double()
    assert torch.equal(layer.recurrent, torch.eye(4, dtype=torch.float64).expand(4, 4, 4))
    nn.init.normal_(layer.recurrent, std=0.7)
    maps = random(3, 5, height, width)
    x = layer.inward(maps)
    out = layer(maps)
    assert out.shape == (3, 16, height, width) and out.min() >= 0
    for number in range(4):
        rnn = nn.RNN(4, 4, nonlinearity="relu", bias=False, batch_first=True).double()
        with torch.no_grad():
            rnn.weight_ih_l0.copy_(torch.eye(4)), rnn.weight_hh_l0.copy_(layer.recurrent[number])
        axis, backwards = (2, 3)[number // 2], number % 2
        lines = x.movedim((axis, 1), (2, 3))  # (B, other axis, steps, h)
        lines = lines.flip(2) if backwards else lines
        states = rnn(lines.flatten(0, 1))[0].view(lines.shape)
        states = (states.flip(2) if backwards else states).movedim((2, 3), (axis, 1))
        torch.testing.assert_close(out[:, 4 * number : 4 * number + 4], states)


def test_sweeps_start_as_running_sums():
    layer, x = FourWayIRNN(3, 3), torch.rand(2, 3, 4, 5)
    down, up, right, left = layer.sweep(x).split(3, dim=1)
    torch.testing.assert_close(right, x.cumsum(3))
    torch.testing.assert_close(left, x.flip(3).cumsum(3).flip(3))
    torch.testing.assert_close(down, x.cumsum(2))
    torch.testing.assert_close(up, x.flip(2).cumsum(2).flip(2))


def test_sweeps_gradient_and_reach():
    torch.manual_seed(0)
    layer = FourWayIRNN(2, 2).double()
    nn.init.normal_(layer.recurrent, std=0.5)
    assert torch.autograd.gradcheck(layer, random(2, 2, 3, 2).requires_grad_())
    pooling = RecurrentPooling(3, 4, dropout=0.0).double()
    # all units active
    nn.init.constant_(pooling.first.inward.bias, 5.0), nn.init.constant_(
        pooling.second.inward.bias, 5.0
    )
    maps = random(1, 3, 5, 6).requires_grad_()
    for net, cross in ((pooling.first, True), (pooling, False)):
        (gradient,) = torch.autograd.grad(net(maps)[0, :, 1, 2].square().sum(), maps)
        felt = gradient[0].abs().sum(0) > 1e-12
        expected = torch.ones(5, 6, dtype=torch.bool)
        if cross:
            expected[:] = False
            expected[1], expected[:, 2] = True, True
        assert torch.equal(felt, expected)
    assert pooling(maps).shape == maps.shape
    torch.testing.assert_close(pooling.rest(pooling.first.inward(maps)), pooling(maps))
    noisy = RecurrentPooling(3, 4, dropout=0.5).double().train()
    assert not torch.equal(noisy(maps), noisy(maps)) and torch.equal(
        noisy.eval()(maps), noisy(maps)
    )
    seen = []
    noisy.dropout.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    noisy(maps)
    torch.testing.assert_close(seen[0], noisy.first(maps)), torch.testing.assert_close(
        seen[1], noisy.second(seen[0])
    )
    assert len(seen) == 2, "behind both layers"


# ---------------------------------------------------------------- loss and pairs


def deviance(similarity, same, alpha=2.0, beta=0.5):
    kinds = [
        [
            math.log1p(math.exp(sign * alpha * (s - beta)))
            for s, positive in zip(similarity, same)
            if positive is kind
        ]
        for kind, sign in ((True, -1), (False, 1))
    ]
    return sum(sum(values) / len(values) for values in kinds if values)


@pytest.mark.parametrize("alpha,beta", [(2.0, 0.5), (10.0, 0.0), (1.0, -0.3)])
def test_deviance_is_the_formula(alpha, beta):
    similarity = random(40).tanh()
    for positives in (0, 1, 7, 40):
        same = torch.arange(40) < positives
        loss = binomial_deviance(similarity, same, alpha, beta)
        assert loss.item() == pytest.approx(
            deviance(similarity.tolist(), same.tolist(), alpha, beta), rel=1e-5
        )
        assert loss.dtype == torch.float32
        order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            binomial_deviance(similarity[order], same[order], alpha, beta), loss
        )


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 90.0, -90.0, 1e4, -1e4, 1e30, -1e30])
@pytest.mark.parametrize("same", [[True, False], [True, True], [False, False]])
def test_deviance_is_finite_for_any_similarity(value, same):
    leaf = torch.tensor([value, -value], requires_grad=True)
    loss = binomial_deviance(leaf, torch.tensor(same))
    loss.backward()
    assert loss.isfinite() and leaf.grad.isfinite().all()
    lower = binomial_deviance(torch.zeros(2, dtype=torch.bfloat16), torch.tensor(same))
    assert lower.dtype == torch.float32


@pytest.mark.parametrize(
    "similarity,same,options,words",
    [
        (torch.zeros(3), torch.zeros(2).bool(), {}, r"similarity \(3,\) and same \(2,\)"),
        (torch.zeros(0), torch.zeros(0).bool(), {}, "n at least 1"),
        (torch.zeros(2), torch.zeros(2), {}, "bools"),
        (torch.zeros(2, 2), torch.zeros(2, 2).bool(), {}, r"\(2, 2\)"),
        (torch.zeros(2), torch.zeros(2).bool(), {"alpha": 0.0}, "alpha 0.0"),
        (torch.zeros(2), torch.zeros(2).bool(), {"beta": math.nan}, "beta nan"),
    ],
)
def test_deviance_refuses(similarity, same, options, words):
    with pytest.raises(ValueError, match=words):
        binomial_deviance(similarity, same, **options)


@pytest.mark.parametrize(
    "people", [[0, 0, 0], [0, 1, 2, 3], [5, 5, 7, 7, 7, 9, 5], list(range(10)) * 3]
)
@pytest.mark.parametrize("negatives", [1, 3, 1000])
def test_batch_pairs(people, negatives):
    labels = torch.tensor(people)
    i, j, same = batch_pairs(labels, negatives, seed=3)
    chosen = set(zip(i.tolist(), j.tolist()))
    every = {(a, b): people[a] == people[b] for b in range(len(people)) for a in range(b)}
    positives = {pair for pair, alike in every.items() if alike}
    assert len(chosen) == len(i) and all(
        every[pair] == alike for pair, alike in zip(zip(i.tolist(), j.tolist()), same.tolist())
    )
    assert positives <= chosen
    assert (~same).sum() == min(len(every) - len(positives), negatives * max(len(positives), 1))
    again, other = batch_pairs(labels, negatives, seed=3), batch_pairs(labels, negatives, seed=4)
    assert all(torch.equal(a, b) for a, b in zip((i, j, same), again))
    if 3 * len(i) < 2 * len(every) and negatives > 1:
        assert set(zip(other[0].tolist(), other[1].tolist())) != chosen


@pytest.mark.parametrize("labels,negatives", [([1], 3), ([1, 2], 0)])
def test_batch_pairs_refuses(labels, negatives):
    with pytest.raises(ValueError, match="two images at least"):
        batch_pairs(torch.tensor(labels), negatives)


# ---------------------------------------------------------------- networks


def normed(norm, x):
    "A batch norm at rest, written out; x itself without one."
    if not norm:
        return x
    column = lambda v: v[:, None, None]
    centred = (x - column(norm.running_mean)) / column(norm.running_var + norm.eps).sqrt()
    return centred * column(norm.weight) + column(norm.bias)


@pytest.mark.parametrize("options", NETWORKS)
def test_minet_is_its_parts(options):
    model = network(**options).double().eval()
    images = normalise(pixels(6)).double()
    gA = gB = normed(model.map_norms and model.map_norms[0], model.backbone[0](images))
    fusion = options.get("fusion", "gate")
    joint = gA[:3] * gB[3:] if fusion == "hadamard" else model.gate(gA[:3], gB[3:])
    if fusion != "hadamard":
        assert model.gate.activation == ("sigmoid" if fusion == "gate" else "identity")
        assert model.gate.evened == (fusion == "bilinear")
    if options.get("pooling") == "spp":
        joint = normed(options.get("norm_maps") and model.joint_norm, joint)
        squares = [(pyramid_pool(g) - pyramid_pool(joint)) ** 2 for g in (gA[:3], gB[3:])]
    else:
        pooled = normed(options.get("norm_maps") and model.joint_norm, model.pooling(joint))
        squares = [((g - pooled) ** 2).flatten(1) for g in (gA[:3], gB[3:])]
    for ours, square in zip(model(images[:3], images[3:]), squares):
        torch.testing.assert_close(ours, square @ model.layer.weight.T + model.layer.bias)
    swapped = model(images[3:], images[:3])
    if options.get("fusion") == "hadamard":
        torch.testing.assert_close(swapped[0], model(images[:3], images[3:])[1])
    else:
        assert not torch.allclose(swapped[0], model(images[:3], images[3:])[1])


def test_what_a_network_is_given_reaches_its_parts():
    model = network(embedding=12, hidden=6, width=8, dropout=0.3)
    assert model.pooling.dropout.p == 0.3 and model.layer.out_features == 8
    assert model.gate.U.out_channels == 12 and len(model.pooling.second.recurrent[0]) == 6


@pytest.mark.parametrize("options,words", [
    ({"fusion": "sum"}, "fusion 'sum' is unknown; take gate, linear, bilinear, hadamard"),
    ({"pooling": "gap"}, "pooling 'gap'"),
    ({"backbone": "vgg19"}, "'vgg19' is unknown; take one of vgg16, vgg_m, tiny"),
    ({"backbone": "tiny", "second": "resnet18"}, "second 'resnet18'"),
])
def test_minet_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        MINet(**{"size": (64, 32), "backbone": "tiny", **options})


def test_two_streams_of_vgg():
    model = network(backbone="vgg16", second="vgg_m", norm_maps=True).eval()
    assert (
        len(model.backbone) == 2
        and model.shape == (3, 1)
        and len(network(second="tiny").backbone) == 1
    )
    x = normalise(pixels(2))
    with torch.no_grad():
        gA, gB = model.maps(x)
        large, small = model.backbone[0](x), model.backbone[1](x)
        first, second = model.map_norms  # each stream has its own
        wanted = normed(first, F.interpolate(large, (3, 1), mode="bilinear")), normed(second, small)
    assert large.shape[2:] == (4, 2) and gA.shape == gB.shape == (2, 512, 3, 1)
    torch.testing.assert_close((gA, gB), wanted)
    found = minet_distances(model, pixels(2), pixels(3, seed=1), device="cpu")
    with torch.no_grad():
        wanted = 1 - F.cosine_similarity(
            *model(normalise(pixels(2))[[1]], normalise(pixels(3, seed=1))[[2]])
        )
    torch.testing.assert_close(found[1, 2], wanted[0], atol=1e-5, rtol=1e-4)


def test_streams_learn_at_the_streams_rate():
    model = network()
    groups = build_optimizer(model, Recipe(lr=0.1, head_lr=3.0, epochs=1)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    for group, rate, inside in zip(groups, (0.1, 0.3), (True, False)):
        assert group["lr"] == pytest.approx(rate)
        assert {names[id(p)].startswith("backbone.") for p in group["params"]} == {inside}


def test_vgg_is_torchvisions(tmp_path):
    from safetensors.torch import save_file
    from torchvision.models import vgg16

    torch.manual_seed(0)
    published = vgg16(weights=None).eval()
    save_file(
        {k: v for k, v in published.state_dict().items() if k.startswith("features.")},
        tmp_path / "vgg.safetensors",
    )
    stream = build_stream("vgg16", tmp_path / "vgg.safetensors").eval()
    image = random(1, 3, 64, 48, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(stream(image), published.features[:-1](image))
    assert map_size(stream, (224, 224)) == (14, 14) and map_size(
        build_stream("vgg_m"), (224, 224)
    ) == (13, 13)
    assert not stream.training, "its mode is its own"
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "short.safetensors")
    with pytest.raises(
        ValueError, match=r"short.safetensors' do not fit this backbone: 25 missing"
    ):
        build_stream("vgg16", tmp_path / "short.safetensors")
    random_start = build_stream("vgg_m", "imagenet")  # none are published
    assert torch.equal(random_start.stem[0].matrix, torch.eye(3))


def cadene(donor):
    "VGG-M's tensors under the names of the public conversion, with a fully connected layer."
    layers = (m for m in donor.modules() if isinstance(m, nn.Conv2d))
    found = {"classif.0.weight": torch.zeros(16, 18432), "classif.0.bias": torch.zeros(16)}
    for k, layer in zip((0, 4, 8, 10, 12), layers):
        found |= {f"features.{k}.{name}": p.detach() for name, p in layer.named_parameters()}
    return found


def torchvision_names(stream):
    "VGG-16's tensors under torchvision's names."
    layers = (m for m in stream.modules() if isinstance(m, nn.Conv2d))
    found = {}
    for k, layer in zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), layers):
        found |= {f"features.{k}.{name}": p.detach() for name, p in layer.named_parameters()}
    return found


def test_vgg_m_takes_cadenes_file_and_sees_his_pixels(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    donor = build_stream("vgg_m").eval()
    save_file(cadene(donor), tmp_path / "vgg_m.safetensors")
    stream = build_stream("vgg_m", tmp_path / "vgg_m.safetensors").eval()
    levels = pixels(2, height=96)
    red, green, blue = levels.float().unbind(1)
    his = torch.stack([blue - 103.939, green - 116.779, red - 123.68], 1)
    with torch.no_grad():
        x = normalise(levels)
        torch.testing.assert_close(stream.stem[0](x), his, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(stream(x), donor(his), atol=1e-2, rtol=1e-4)
        torch.testing.assert_close(donor.stem[0](x), x)  # a random start sees ours
    # the colours are part of a run's weights
    build_stream("vgg_m").load_state_dict(stream.state_dict())
    fewer = {k: v for k, v in cadene(donor).items() if not k.startswith("features.12")}
    save_file(fewer, tmp_path / "short.safetensors")
    with pytest.raises(
        ValueError, match=r"short\.safetensors' do not fit this backbone: 2 missing"
    ):
        build_stream("vgg_m", tmp_path / "short.safetensors")
    reference = build_stream("vgg16")  # a file for either stream, by its name
    save_file(torchvision_names(reference), tmp_path / "vgg16.safetensors")
    both = ",".join(str(tmp_path / f"{name}.safetensors") for name in ("vgg16", "vgg_m"))
    model = network(backbone="vgg_m", second="vgg16", weights=both)
    torch.testing.assert_close(model.backbone[1].stem[0].weight, reference.stem[0].weight)
    torch.testing.assert_close(model.backbone[0].stem[1].weight, donor.stem[1].weight)


def test_fc_cnn_goes_on_from_fc6_and_fc7(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    stream, size = build_stream("vgg16"), (64, 32)  # 4×2 positions, 2×1 behind the last pooling
    fc = {"classifier.0.weight": torch.randn(12, 1024), "classifier.0.bias": torch.randn(12),
          "classifier.3.weight": torch.randn(12, 12), "classifier.3.bias": torch.randn(12)}
    save_file(fc, tmp_path / "whole.safetensors")
    save_file({"features.0.bias": torch.zeros(64)}, tmp_path / "features.safetensors")
    model = FCCNN(7, stream, size, 12, 0.0, "vgg16", tmp_path / "whole.safetensors").eval()
    assert model.published
    with torch.no_grad():
        x = F.max_pool2d(stream(normalise(pixels(2))), 2).flatten(1)
        first = (x @ fc["classifier.0.weight"].T + fc["classifier.0.bias"]).relu()
        second = (first @ fc["classifier.3.weight"].T + fc["classifier.3.bias"]).relu()
        torch.testing.assert_close(model(normalise(pixels(2))), second)
    for width, name in ((11, "whole"), (12, "features")):  # another size, and convolutions alone
        path = tmp_path / f"{name}.safetensors"
        assert not FCCNN(7, stream, size, width, 0.0, "vgg16", path).published
    assert not FCCNN(7, build_stream("tiny"), size, 12, 0.0, "tiny", "imagenet").published
    with torch.device("meta"):
        large = FCCNN(7, build_stream("vgg_m"), (224, 224), name="vgg_m")
    assert large.layers[0].in_features == 18432  # its last pooling is 3×3: 6×6 of 13×13


def test_vgg_m_divides_by_five_neighbouring_channels():
    norms = [m for m in build_stream("vgg_m").modules() if isinstance(m, nn.LocalResponseNorm)]
    x = 60 * torch.rand(1, 9, 1, 1, generator=torch.Generator().manual_seed(0))
    around = torch.stack([x[:, max(k - 2, 0) : k + 3].square().sum(1) for k in range(9)], 1)
    for norm in norms:
        torch.testing.assert_close(norm(x), x / (2 + 1e-4 * around) ** 0.75)
    assert len(norms) == 2


def test_fc_cnn():
    torch.manual_seed(0)
    stream = build_stream("tiny").train()
    before = {k: v.clone() for k, v in stream.state_dict().items()}
    model = FCCNN(7, stream, (64, 32), width=11, dropout=0.0)
    assert stream.training and all(
        torch.equal(v, before[k]) for k, v in stream.state_dict().items()
    ), "the size was asked without a trace"
    x = random(3, 3, 64, 32, dtype=torch.float32)
    f, scores = model.train()(x)
    assert f.shape == (3, 11) and scores.shape == (3, 7) and f.min() >= 0
    torch.testing.assert_close(scores, model.classifier(f))
    assert torch.equal(model.eval()(x), model.layers(F.max_pool2d(stream(x), 2).flatten(1)))
    with pytest.raises(ValueError, match="map of 2×1"):
        FCCNN(7, stream, (32, 16))


# ---------------------------------------------------------------- training and ranking


@cache
def made(people=6, each=4):
    "Pictures of people who differ in their colours, and their labels."
    coarse = pixels(people, seed=3).float()[:, None] + 25 * random(
        people, each, 3, 64, 32, dtype=torch.float32
    )
    return coarse.clamp(0, 255).to(torch.uint8).flatten(0, 1), torch.arange(
        people
    ).repeat_interleave(each)


@pytest.mark.parametrize("chunk", [1, 5, 10_000])
@pytest.mark.parametrize("options", NETWORKS[:2])
def test_objective_is_eq_5_on_pairs(options, chunk):
    images, labels = made()
    model = network(**options).double().eval()
    batch = torch.tensor([0, 1, 4, 9, 2, 5])
    view = lambda rows: normalise(images[rows]).double()
    terms = minet_objective(labels, negatives=2, chunk=chunk)(model, batch, view)
    assert list(terms) == ["deviance"]
    seed = int((batch * torch.arange(1, 7)).sum())
    i, j, same = batch_pairs(labels[batch], 2, seed)
    cosines = []
    for a, b in zip(i.tolist(), j.tolist()):
        fA, fB = model(view(batch[[a]]), view(batch[[b]]))
        cosines.append((fA @ fB.T)[0, 0] / (fA.norm() * fB.norm()))
    wanted = deviance([s.item() for s in cosines], same.tolist())
    assert terms["deviance"].item() == pytest.approx(wanted, rel=1e-5)
    gradients = torch.autograd.grad(terms["deviance"], list(model.parameters()))
    # of both images of a pair: nothing is held still
    single = torch.autograd.grad(
        binomial_deviance(torch.stack(cosines), same), list(model.parameters())
    )
    for mine, theirs in zip(gradients, single):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_similarities_are_of_features_in_float32(monkeypatch):
    "Under autocast features have two bytes; cosines of them are not rounded once more."
    images, labels = made()
    model, batch = network().eval(), torch.tensor([0, 1, 4, 9, 2, 5])
    represent, seen = model.represent, []

    def halved(gA, gB):
        seen.append([f.bfloat16() for f in represent(gA, gB)])
        return seen[-1]

    monkeypatch.setattr(model, "represent", halved)
    loss = minet_objective(labels)(model, batch, lambda rows: normalise(images[rows]))["deviance"]
    same = batch_pairs(labels[batch], 3, int((batch * torch.arange(1, 7)).sum()))[2]
    cosines = F.cosine_similarity(*(f.double() for f in seen[0]))
    assert loss.item() == pytest.approx(deviance(cosines.tolist(), same.tolist()), rel=1e-5)


def test_statistics_of_the_joint_map_are_counted_once():
    "A chunk is computed again on the way back; its batch norm must not count it twice."
    images, labels = made()
    model = network(fusion="linear", norm_maps=True).train()
    norm, counted = model.joint_norm, []

    def count(module, inputs, output):
        counted.append(inputs[0].mean((0, 2, 3)).detach())

    norm.register_forward_hook(count)
    before, batch = norm.running_mean.clone(), torch.tensor([0, 1, 4, 9, 2, 5])
    terms = minet_objective(labels, negatives=2, chunk=5)(
        model, batch, lambda rows: normalise(images[rows])
    )
    for mean in counted.copy():
        before = 0.9 * before + 0.1 * mean
    chunks = len(counted)
    terms["deviance"].backward()
    assert len(counted) == 2 * chunks > 2 and norm.momentum == 0.1
    torch.testing.assert_close(norm.running_mean, before)


@pytest.mark.parametrize("people,kinds", [([0, 0, 0, 0], (True,)), ([0, 1, 2, 3], (False,))])
def test_a_batch_of_one_kind(people, kinds):
    images, _ = made()
    model, labels = network().double().eval(), torch.tensor(people)
    loss = minet_objective(labels)(
        model, torch.arange(4), lambda rows: normalise(images[rows]).double()
    )["deviance"]
    assert (
        loss.isfinite()
        and all(g.isfinite().all() for g in torch.autograd.grad(loss, list(model.parameters())))
        and loss > 0
    )
    assert {bool(s) for s in batch_pairs(labels)[2]} == set(kinds)


def test_objective_refuses():
    with pytest.raises(ValueError, match="chunk 0"):
        minet_objective(torch.zeros(3).long(), chunk=0)


@pytest.mark.parametrize("memory", [20_000, 300_000, 2**28])
@pytest.mark.parametrize("options", NETWORKS)
def test_ranking_is_pair_by_pair(options, memory):
    model = network(**options).eval()
    query, gallery = pixels(3), pixels(5, seed=1)
    dist = minet_distances(model, query, gallery, batch_size=2, memory=memory, device="cpu")
    with torch.no_grad():
        for a in range(3):
            for b in range(5):
                fA, fB = model(normalise(query[[a]]), normalise(gallery[[b]]))
                assert dist[a, b].item() == pytest.approx(
                    1 - (fA @ fB.T).item() / (fA.norm() * fB.norm()).item(), abs=2e-5
                )


@pytest.mark.parametrize("shape", [(4, 3), (1, 5), (5, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_sweeps_read_as_they_are_made(normed, shape):
    """What ranking does in place of the two layers, against their definition, each way its own
    matrix.
    """
    model, products = network(norm_maps=normed).double().eval(), random(3, 12, *shape)
    first_layer = minet._merged(model.gate, model.pooling.first.inward)
    with torch.no_grad():
        wanted = model.pool(model.gate.P(products))
        found = model.joint_norm(minet._pool_lean(model.pooling, first_layer, products))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert found.is_contiguous() and found.std() > 1e-3


def test_a_block_keeps_to_the_memory(monkeypatch):
    "In bytes, at its peak: of every position the product, F̃ and two copies as wide; mostly used."
    model, blocks = network().eval(), []
    pair = 4 * math.prod(model.shape) * (12 + 3 * 128)
    compare = model.compare
    monkeypatch.setattr(
        model, "compare",
        lambda gA, gB, joint: blocks.append(joint.shape[:2].numel()) or compare(gA, gB, joint),
    )
    for memory in (5 * pair, 20 * pair):
        blocks.clear()
        minet_distances(model, pixels(6), pixels(8, seed=1), memory=memory, device="cpu")
        assert 0.3 * memory < max(blocks) * pair <= memory and sum(blocks) == 48


def test_ranking_by_a_learnt_metric():
    images, labels = made()
    model = network().eval()
    i, j, same = batch_pairs(labels, 5)
    e = pair_differences(model, images, i, j, batch_size=7, device="cpu")
    with torch.no_grad():
        fA, fB = model(normalise(images[i[:4]]), normalise(images[j[:4]]))
    torch.testing.assert_close(e[:4], fA - fB, atol=1e-4, rtol=1e-4)
    metric = xqda(pair_covariances(e, same))
    dist = minet_distances(model, images[:5], images[5:12], metric, device="cpu", memory=100_000)
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5, 12))
    wanted = metric.of_pairs(pair_differences(model, images, *pairs.T, device="cpu"))
    torch.testing.assert_close(
        dist.flatten(), wanted.float(), atol=1e-4 * wanted.max().item(), rtol=1e-3
    )
    plain = Metric(torch.eye(8).double(), torch.ones(8).double(), torch.ones(8).double())
    assert (minet_distances(model, images[:2], images[2:4], plain, device="cpu") >= 0).all()


def test_training_tells_people_apart():
    images, labels = made()
    torch.manual_seed(0)
    model = MINet((64, 32), backbone="tiny", embedding=16, hidden=8, width=16, dropout=0.0)
    recipe = Recipe(epochs=25, batch_size=12, lr=3e-3, flip=0.0)
    history = train(
        model, minet_objective(labels), images, IdentityBatches(labels.numpy(), 4, 3), recipe,
        device="cpu",
    )
    assert history["deviance"].iloc[-1] < 0.75 * history["deviance"].iloc[0]
    dist = minet_distances(model, images, images, device="cpu")
    same = labels[:, None] == labels
    off = ~torch.eye(len(labels), dtype=torch.bool)
    assert dist[same & off].mean() < 0.6 * dist[~same].mean()


# ---------------------------------------------------------------- the pulse


def shares(values):
    return two_way(lambda row: values[row], len(values))[0]


def test_two_way_shares_by_hand():
    a, b = random(5, 1, 3), random(1, 4, 3, seed=1)
    for constant in (0.0, 1e5):  # as a difference of sums it would cost all digits
        additive = shares(constant + a + b)
        assert additive["interaction"] < 1e-9
        rows, columns = a.var(0, unbiased=False).sum(), b.var(1, unbiased=False).sum()
        assert additive["rows"] == pytest.approx((rows / (rows + columns)).item())
    a0, b0 = a - a.mean(0), b - b.mean(1, keepdim=True)
    assert shares(a0 * b0) == pytest.approx({"rows": 0, "columns": 0, "interaction": 1}, abs=1e-12)
    x = (2 + a0[..., :1]) * (3 + b0[..., :1])  # means 2 and 3
    va, vb = a0[..., :1].square().mean(), b0[..., :1].square().mean()
    assert shares(x)["interaction"] == pytest.approx((va * vb / (9 * va + 4 * vb + va * vb)).item())
    by_row, by_column = two_way(lambda row: x[row], len(x))[1:]
    additive = x.mean(1, keepdim=True) + x.mean(0, keepdim=True) - x.mean((0, 1))
    torch.testing.assert_close(by_row[:, None] + by_column[None], additive)
    assert shares(torch.ones(3, 2, 4)) == {"rows": 0, "columns": 0, "interaction": 0}


def block(people=6, cameras=2):
    images = pixels(people * cameras, seed=5)
    pids, camids = np.arange(1, people + 1), np.repeat(np.arange(cameras), people)
    return images[:people], images, pids, camids[:people], np.tile(pids, cameras), camids


class Additive(MultiplicativeGate):
    "A gate that adds: no pair counts."

    def multiply(self, a, b):
        return a + b


def test_pulse_of_a_gate_that_adds_and_of_one_that_multiplies():
    model = network(pooling="spp", fusion="linear")
    assert pulse(model, *block(), device="cpu")["interaction"] > 0.01
    model.gate.__class__ = Additive
    found = pulse(model, *block(), device="cpu")
    assert found["interaction"] < 1e-6 and found["correlation_additive"] == pytest.approx(1)
    assert found["map_loss_additive"] == 0
    assert found["correlation_common"] < 0.9999, "what one image brings is gone"
    assert found["variance_query"] + found["variance_gallery"] == pytest.approx(1)
    nn.init.zeros_(model.gate.P.weight)  # one F for all pairs
    found = pulse(model, *block(), device="cpu")
    assert found["interaction"] == found["variance_query"] == found["map_loss_common"] == 0
    assert found["correlation_common"] == pytest.approx(1)


@pytest.mark.parametrize("options", [NETWORKS[0], NETWORKS[5], NETWORKS[4]])
def test_pulse_is_its_definition_and_leaves_the_model_alone(options):
    model, args = network(**options), block()
    model.train()
    model.backbone[0].stem.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    found = pulse(model, *args, device="cpu")
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.values())
    alone = found["variance_query"] + found["variance_gallery"]
    assert alone == pytest.approx(1 - found["interaction"])
    model.eval()
    with torch.no_grad():
        gA, gB = model.maps(normalise(args[0]))[0], model.maps(normalise(args[1]))[1]
        pairs = torch.cartesian_prod(torch.arange(len(gA)), torch.arange(len(gB)))
        joint = model.pool(model.gate(gA[pairs[:, 0]], gB[pairs[:, 1]]))
        joint = joint.view(len(gA), len(gB), *gA.shape[1:])
        additive = joint.mean(1, True) + joint.mean(0, True) - joint.mean((0, 1))
        ways = joint, additive, joint.mean((0, 1)).expand_as(joint)
        features = [model.compare(gA[:, None], gB[None], way) for way in ways]
        own, added, common = (F.cosine_similarity(*pair, dim=2) for pair in features)
    share = (joint - additive).square().sum() / (joint - joint.mean((0, 1))).square().sum()
    assert found["interaction"] == pytest.approx(share.item(), rel=1e-3)
    correlation = lambda s: np.corrcoef(own.flatten(), s.flatten())[0, 1]
    assert found["correlation_additive"] == pytest.approx(correlation(added), abs=1e-4)
    assert found["correlation_common"] == pytest.approx(correlation(common), abs=1e-4)
    scores = [100 * evaluate(1 - s, *args[2:]).mAP for s in (own, added, common)]
    assert found["map_loss_additive"] == pytest.approx(scores[0] - scores[1])
    assert found["map_loss_common"] == pytest.approx(scores[0] - scores[2])


# ---------------------------------------------------------------- rows


def test_rows_are_table_1():
    rows, printed = read_rows("minet"), reported("minet")
    table = {row.name: key["row"] for row in rows for key in row.reported}
    assert (
        sorted(table.values()) == sorted(printed[(printed["table"] == "1")]["row"].unique())
        and len(table) == 9
    )
    known = declared(project_root() / "nbs/5_papers/1_minet/2_reproduce.ipynb")
    for row in rows:
        assert set(row.set) <= set(known)
        for name in row.profiles:
            profile = read_profile(name)
            assert set(profile.of("minet", row.name)) <= set(known), (row.name, name)
    smoke = {job.row.name for job in plan("smoke", "minet")}
    assert {"minet", "minet_acts", "mi_spp", "fc_cnn", "fv_sift"} == smoke
    compared = {"minet", "minet_norm", "minet_acts", "mi_spp", "mi_spp_longer", "gate_spp"}
    for name in ("study", "photographs"):
        rows = {job.row.name for job in plan(name, "minet")}
        assert rows == compared | {"bilinear_irnn", "fc_cnn"}
        longer, same = (read_profile(name).of("minet", row) for row in ("mi_spp_longer", "mi_spp"))
        assert longer["epochs"] > same["epochs"]


def test_a_shift_is_a_number_or_two():
    notebook = project_root() / "nbs/5_papers/1_minet/2_reproduce.ipynb"
    known = declared(notebook)
    assert known["shift"] == ("int or list", 0)
    values = {name: default for name, (_, default) in known.items()}
    assert resolve("minet", values | {"shift": [10, 5]}).shift == [10, 5]
    for wrong in ("ten", 1.5, True):
        with pytest.raises(ValueError, match=r"shift is .*; it should be an integer or a list"):
            resolve("minet", values | {"shift": wrong})


def test_paper_profile_is_the_papers():
    own = read_profile("paper").of("minet")
    assert (
        own["height"], own["width"], own["batch_size"], own["instances"], own["hidden"],
        own["dropout"],
    ) == (224, 224, 128, 0, 512, 0.5)
    assert own["backbone"] == "vgg16" and own["shift"] == [10, 5]
    for images in (632, 11230, 12936):  # VIPeR, CUHK03, Market-1501: one budget, in steps
        steps = own["epochs"] * passes_for(images, 128, own["epoch_steps"]) * (images // 128)
        assert 0.8 * 2000 < steps < 1.2 * 2000
    sift = read_profile("paper").of("minet", "fv_sift")
    rows, columns = ((sift[side] - 32) // 16 + 1 for side in ("height", "width"))
    assert rows * columns == 14 and sift["sift_components"] == 256
    # the lengths that §4.3 prints
    assert np.prod([2, 256, 80]) == 512 * 80 and 2 * 64 * 512 == 512 * 128


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: network(embedding=0), "embedding 0"), (lambda: network(hidden=0), "hidden 0"),
        (lambda: network(width=0), "width 0"),
        (
            lambda: network().maps(torch.zeros(2, 3, 32, 64)),
            r"images \(2, 3, 32, 64\) must be \(B, 3, 64, 32\)",
        ),
        (
            lambda: network()(torch.zeros(2, 3, 64, 32), torch.zeros(1, 3, 64, 32)),
            "gA .* gB .* as many pairs",
        ),
        (
            lambda: minet_distances(network(), pixels(2)[:0], pixels(2), device="cpu"),
            "query has 0 images",
        ),
        (lambda: minet_distances(network(), pixels(2), pixels(2)[:0], device="cpu"), "gallery 0"),
        (
            lambda: minet_distances(network(), pixels(2), pixels(2, height=128), device="cpu"),
            "size of this network",
        ),
        (
            lambda: minet_objective(torch.zeros(4, dtype=torch.int64))(
                network(), (torch.arange(2), torch.arange(2)), None
            ),
            "batch must be indices",
        ),
    ],
    ids=[
        "embedding", "hidden", "width", "turned images", "two and one", "no query", "no gallery",
        "another size", "batches of pairs",
    ],
)
def test_bad_inputs_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
