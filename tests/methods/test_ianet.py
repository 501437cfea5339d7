"""IANet: patches against loops and unfold, relations against the formulas written out, blocks that
start as the identity, counted cost.
"""

import math
from functools import cache
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reid_repro.learning.backbones import build_backbone, cost
from reid_repro.ianet import (
    CIA, OPTIONS, SIA, IABlock, IANet, appearance_relation, diagonal_box, insert_ia,
    location_relation, pulse, spatial_relations,
)
from reid_repro.ide import IDE, ide_objective
from reid_repro.lab.configuration import declared
from reid_repro.lab.methods import build
from reid_repro.lab.provenance import project_root
from reid_repro.lab.results import reported
from reid_repro.lab.rows import plan, read_profile, read_rows
from reid_repro.learning.augmentation import normalise

FUSIONS, COMBINES, ORDERS = OPTIONS["fusion"], OPTIONS["combine"], OPTIONS["order"]
SCALES = [*(s for s in OPTIONS["scale"] if s != "learned"), 3.0]
STEPS = {
    "sia": ["sia"], "cia": ["cia"], "sia-cia": ["sia", "cia"], "cia-sia": ["cia", "sia"],
    "parallel": ["sia", "cia"],
}


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(ours, expected, tolerance=1e-5):
    torch.testing.assert_close(ours.double(), expected.double(), atol=tolerance, rtol=tolerance)


def patch_dots(x, K):
    "The sum in Eq. 1: cut every patch out of the padded map, multiply; (B, M, M)."
    P = F.unfold(F.pad(x, ((K - 1) // 2, K // 2) * 2), K)
    return P.transpose(1, 2) @ P


def appearance(
    x, contexts=(1, 2, 3), scale="normalised", fusion="renormalise", combine="product",
    location=None,
):
    """Eq. 1, 2 and, with a location relation, 5, in float64 and in the order in which the paper
    states them.
    """
    x, root = x.double(), math.sqrt(x.shape[1])
    x = x / x.norm(dim=1, keepdim=True) if scale == "cosine" else x
    factor = {"printed": 1, "normalised": 1 / root, "cosine": 10 / len(contexts)}.get(
        scale
    ) or scale / root
    S = torch.stack(
        [
            (patch_dots(x, K) * factor / (1 if scale == "printed" else K**2)).softmax(-1)
            for K in contexts
        ]
    )
    fused = {"product": S.prod(0), "sum": S.sum(0), "max": S.amax(0)}[combine]
    if fusion == "renormalise":
        fused = fused if location is None else fused * location
        return fused / fused.sum(-1, keepdim=True)
    fused = fused.softmax(-1) if len(contexts) > 1 else fused
    return fused if location is None else (fused * location).softmax(-1)


@cache
def location(height, width, sigma_1, sigma_2):
    "Eq. 3 with its constant, then Eq. 4; float64 (M, M)."
    places = [(x, y) for y in range(height) for x in range(width)]
    l = torch.tensor(
        [
            [
                math.exp(-0.5 * ((xj - xi) ** 2 / sigma_1**2 + (yj - yi) ** 2 / sigma_2**2))
                / (2 * math.pi * sigma_1 * sigma_2)
                for xj, yj in places
            ]
            for xi, yi in places
        ],
        dtype=torch.float64,
    )
    return l / l.sum(1, keepdim=True)


def gather(S, x):
    "Eq. 6 position by position: e_i = Σ_j S_ij f_j."
    f = x.double().flatten(2)
    return torch.stack(
        [sum(S[:, i, j, None] * f[:, :, j] for j in range(f.shape[2])) for i in range(f.shape[2])],
        2,
    ).view(x.shape)


def lively(model, seed=0):
    "Random statistics and weights in every batch norm, evaluation mode."
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for tensor, low, high in (
                (m.weight, 0.3, 1.2), (m.bias, -0.3, 0.3), (m.running_mean, -0.3, 0.3),
                (m.running_var, 0.5, 2),
            ):
                tensor.data.uniform_(low, high, generator=g)
    return model.eval()


@pytest.mark.parametrize("K", [1, 2, 3])
def test_box_is_the_definition(K):
    # an even patch reaches right and down
    H, W, steps = 4, 3, {1: (0,), 2: (0, 1), 3: (-1, 0, 1)}[K]
    dots = random(1, H, W, H, W, dtype=torch.float64)  # any numbers, not only symmetric ones
    kept, expected = dots.clone(), torch.zeros_like(dots)
    for r, c, s, d, a, b in product(range(H), range(W), range(H), range(W), steps, steps):
        if 0 <= r + a < H and 0 <= s + a < H and 0 <= c + b < W and 0 <= d + b < W:
            expected[0, r, c, s, d] += dots[0, r + a, c + b, s + a, d + b]
    close(diagonal_box(dots, K), expected, 1e-12)
    assert torch.equal(dots, kept), "the input is left alone"


@pytest.mark.parametrize(
    "size,K",
    [(size, K) for size in [(8, 4), (6, 5), (5, 7)] for K in range(1, min(size) + 1) if K < 6],
)
def test_box_multiplies_patches(size, K):
    x = random(2, 3, *size, dtype=torch.float64)
    close(
        diagonal_box(torch.einsum("bcij,bckl->bijkl", x, x), K).flatten(3).flatten(1, 2),
        patch_dots(x, K), 1e-12,
    )


@pytest.mark.parametrize("K", [1, 2, 3, 4])
def test_box_gradient(K):
    x = random(1, 5, 4, 5, 4, dtype=torch.float64)
    y = random(1, 5, 4, 5, 4, seed=1, dtype=torch.float64).requires_grad_()
    (transposed,) = torch.autograd.grad(diagonal_box(y, K), y, x)  # A'x
    close((x * diagonal_box(y, K)).sum().detach(), (transposed * y).sum().detach(), 1e-12)
    small = random(1, 4, 4, 4, 4, seed=2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda dots: diagonal_box(dots, K), small)
    assert K != 2 or not torch.allclose(
        transposed, diagonal_box(x, K)
    ), "an even box is not its own transpose"


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_appearance_is_the_formula(fusion, combine, scale):
    x = 0.7 * random(2, 5, 6, 5)
    for contexts in [(1,), (2,), (3, 1), (1, 2, 3), (1, 4, 5)]:
        S = appearance_relation(x, contexts, scale, fusion, combine)
        assert S.shape == (2, 30, 30) and S.dtype == torch.float32
        close(S, appearance(x, contexts, scale, fusion, combine))
        close(S.sum(-1), torch.ones(2, 30))
    close(
        appearance_relation(x[1:], None, scale, fusion, combine),
        appearance_relation(x, None, scale, fusion, combine)[1:],
    )
    S = appearance_relation(1e3 * x, None, scale, fusion, combine)
    assert S.isfinite().all() and (S >= 0).all()
    close(S.sum(-1), torch.ones(2, 30))


def test_appearance_of_two_positions_by_hand():
    # f_1 = (1, 0, 0, 0), f_2 = (2, 1, 2, 4)
    x = torch.tensor([[[[1.0, 2.0]], [[0.0, 1.0]], [[0.0, 2.0]], [[0.0, 4.0]]]])
    printed, normalised = (
        appearance_relation(x, (1,), scale)[0, 0, 0].item() for scale in ("printed", "normalised")
    )
    # dots 1 and 2, √4
    assert printed == pytest.approx(1 / (1 + math.e)) and normalised == pytest.approx(
        1 / (1 + math.exp(0.5))
    )
    assert appearance_relation(x, (1,), 4.0)[0, 0, 0].item() == pytest.approx(
        1 / (1 + math.exp(2))
    ), "a number multiplies"


@pytest.mark.parametrize("fusion", FUSIONS)
def test_appearance_defaults_precisions_and_symmetries(fusion):
    x = 3 * random(2, 4, 6, 4)
    relation = lambda maps, contexts=None, scale="normalised": appearance_relation(
        maps, contexts, scale, fusion
    )
    assert torch.equal(relation(x), relation(x, (1,) if fusion == "released" else (1, 2, 3)))
    for dtype in (torch.float16, torch.bfloat16):
        S = relation(x.to(dtype))
        assert S.dtype == torch.float32 and torch.equal(S, relation(x.to(dtype).float()))
    constant = torch.full((2, 1, 6, 4), 3.0)
    # every logit 9 larger
    close(relation(torch.cat([x, constant], 1), (1,), "printed"), relation(x, (1,), "printed"))
    flipped = lambda S, axis: S.view(2, 6, 4, 6, 4).flip(axis - 1, axis + 1).view(2, 24, 24)
    for axis in (2, 3):
        close(relation(x.flip(axis), (1, 3)), flipped(relation(x, (1, 3)), axis))
        assert (
            torch.dist(relation(x.flip(axis), (2,)), flipped(relation(x, (2,)), axis)) > 0.1
        ), "an even patch is lopsided"


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("combine,most", [("product", 1), ("max", 1), ("sum", 3)])
def test_the_second_softmax_can_choose_nothing(combine, most, size):
    """It weighs numbers between 0 and `most` (three softmaxes add up to 3 at most), whatever the
    features are.
    """
    x = size * random(2, 16, 8, 4)
    spread = lambda S: (S.amax(-1) / S.amin(-1)).max().item()
    for scale in ("normalised", "printed"):
        assert spread(appearance_relation(x, None, scale, "literal", combine)) <= math.e**most * (
            1 + 1e-5
        )
    if size == 1:
        assert spread(appearance_relation(x, None, "printed", combine=combine)) > 1e3


def test_location_is_the_formula():
    for height, width, sigma_x, sigma_y in [
        (4, 3, 2.0, 5.0), (3, 5, 0.7, 1.5), (1, 6, 1.0, 1.0), (16, 8, 5, 10),
    ]:
        S = location_relation(height, width, sigma_x, sigma_y)
        close(S, location(height, width, sigma_x, sigma_y))
        close(S.sum(1), torch.ones(height * width))
        decay = S / S.diagonal()[:, None]  # l_ij / l_ii
        along = decay[0].view(height, width)  # from the corner
        assert (
            S.dtype == torch.float32
            and (along.diff(dim=0) < 0).all()
            and (along.diff(dim=1) < 0).all()
        )
        close(decay, decay.T)
    # σ_x goes along columns: rows share
    close(location_relation(4, 3, 1e4, 0.05), torch.kron(torch.eye(4), torch.full((3, 3), 1 / 3)))
    assert torch.equal(location_relation(4, 3, 1e-3, 1e-3), torch.eye(12))
    close(location_relation(4, 3, 1e6, 1e6), torch.full((12, 12), 1 / 12))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("relation", OPTIONS["relation"])
def test_sia_is_eq_6(relation, fusion):
    x, contexts = random(2, 3, 5, 4), (1,) if fusion == "released" else (1, 2, 3)
    sia, L = SIA(relation=relation, fusion=fusion, sigma=(1.5, 3)), location(5, 4, 1.5, 3)
    formula = lambda *options: (
        L.expand(2, -1, -1)
        if relation == "location"
        else appearance(x, *options, {"both": L}.get(relation))
    )
    close(sia(x), gather(formula(contexts, "normalised", fusion, "product"), x))
    close(sia(x.to(memory_format=torch.channels_last)), sia(x))
    for combine, scale in product(COMBINES, SCALES[:-1]):
        close(
            SIA((1, 4), relation, combine, fusion, scale, (1.5, 3)).relation_map(x),
            formula((1, 4), scale, fusion, combine),
        )


def test_sia_knows_the_size_of_the_map():
    sia = SIA(relation="location")
    for size in [(16, 8), (32, 16), (8, 16), (16, 8)]:
        # §4.1: (5, 10) at stage 3; twice the map at stage 2
        sigma = {(16, 8): (5, 10), (32, 16): (10, 20), (8, 16): (10, 5)}[size]
        close(sia.relation_map(torch.zeros(1, 2, *size))[0], location(*size, *sigma))
    assert not sia.state_dict() and not list(sia.parameters())
    both = SIA()
    for size in [(6, 4), (4, 6), (6, 4)]:  # as many positions, another shape
        x = random(2, 3, *size)
        close(
            both(x),
            gather(appearance(x, location=location(*size, 5 * size[1] / 8, 5 * size[0] / 8)), x),
        )
    assert not both.state_dict()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("fusion", ["literal", "released"])
def test_read_literally_sia_is_average_pooling(fusion, size):
    x = size * random(2, 8, 16, 8).abs()
    mean = x.mean((2, 3), keepdim=True)
    assert ((SIA(fusion=fusion).relation_map(x) * 128 - 1).abs() < 0.016).all()
    assert ((SIA(fusion=fusion)(x) / mean - 1).abs() < 0.016).all()
    assert size < 1 or ((SIA()(x) / mean - 1).abs() > 0.16).any(), "renormalised it is not"


def test_learned_scale():
    x, weight = random(2, 3, 5, 4), random(2, 3, 5, 4, seed=1)
    for make in (SIA, CIA):
        module = make(scale="learned")
        assert (
            torch.equal(module(x), make()(x)) and sum(p.numel() for p in module.parameters()) == 1
        )
        (module(x) * weight).sum().backward()
        (gradient,) = (p.grad for p in module.parameters())
        assert gradient.isfinite() and gradient != 0
        module.scale.data.fill_(3.0)
        f = x.double().flatten(2)
        expected = (
            appearance(x, scale=3.0, location=location(5, 4, 2.5, 3.125))
            if make is SIA
            else (3 * f @ f.mT / 20**0.5).softmax(-1)
        )
        close(module.relation_map(x).detach(), expected)


@pytest.mark.parametrize(
    "make", [SIA, CIA, lambda: SIA(fusion="literal"), lambda: SIA(relation="location")]
)
def test_products_stay_float32_under_autocast(make):
    module, x = make(), 3 * random(2, 4, 5, 4)
    for dtype in (torch.float32, torch.bfloat16):
        exact = module(x.to(dtype).float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(x.to(dtype))
        assert y.dtype == dtype and torch.equal(y, exact.to(dtype))


@pytest.mark.parametrize("scale", SCALES[:-1])
def test_cia_is_eq_7_and_8(scale):
    x = random(2, 4, 3, 5)
    f = x.double().flatten(2)
    R = torch.zeros(2, 4, 4, dtype=torch.float64)
    E = torch.zeros(2, 4, 15, dtype=torch.float64)
    for b, m in product(range(2), range(4)):
        for n in range(4):
            length = {
                "printed": 1, "normalised": math.sqrt(15),
                "cosine": 0.1 * f[b, m].norm() * f[b, n].norm(),
            }[scale]
            R[b, m, n] = math.exp(f[b, m] @ f[b, n] / length)
        R[b, m] /= R[b, m].sum()
        for n in range(4):
            E[b, m] += R[b, m, n] * f[b, n]
    cia = CIA(scale)
    close(cia.relation_map(x), R)
    close(cia(x), E.view(2, 4, 3, 5))
    close(cia(x.to(memory_format=torch.channels_last)), cia(x))
    assert cia(1e3 * x).isfinite().all() and IABlock(4, scale=scale).steps["cia"].scale == scale
    released = lively(IABlock(4, "cia", fusion="released", scale=scale))
    released.norms["cia"].reset_parameters(), released.norms["cia"].reset_running_stats()
    close(released(x).detach(), x + CIA("printed")(x) / math.sqrt(1 + 1e-5))  # as the authors' code


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_block_is_the_identity_and_then_eq_9(order, training):
    block = IABlock(6, order, contexts=(1, 2)).train(training)
    x = random(3, 6, 5, 4).requires_grad_()
    weight = random(3, 6, 5, 4, seed=1)
    assert list(block.steps) == list(block.norms) == STEPS[order] and sum(
        p.numel() for p in block.parameters()
    ) == 12 * len(STEPS[order])
    assert torch.equal(block(x), x)
    (block(x) * weight).sum().backward()
    assert torch.equal(x.grad, weight), "as if the block were not there"
    for norm in block.norms.values():
        assert (norm.weight.grad != 0).all() and (
            norm.bias.grad != 0
        ).all(), "γ is zero, and can leave"
    x, y = x.detach(), x.detach()
    lively(block).train(training)
    for name in STEPS[order]:
        E = (SIA((1, 2)) if name == "sia" else CIA())(x if order == "parallel" else y)
        norm, wide = block.norms[name], lambda v: v.detach()[:, None, None]
        mean, variance = (
            (E.mean((0, 2, 3)), E.var((0, 2, 3), unbiased=False))
            if training
            else (norm.running_mean, norm.running_var)
        )
        y = (
            (E - wide(mean)) / (wide(variance) + 1e-5).sqrt() * wide(norm.weight)
            + wide(norm.bias)
            + y
        )
    close(block(x).detach(), y, 1e-4)


@pytest.mark.parametrize("name,stages", [
    *(("tiny", stages) for stages in [(), (1,), (2,), (3,), (4,), (3, 2)]),
    *((name, (1, 2, 3, 4)) for name in ("tiny", "resnet18", "resnet34", "googlenet")),
])
def test_insertion_changes_no_output(name, stages):
    model, images = lively(IDE(5, backbone=name)), random(1, 3, 64, 48)
    backbone, plain = model.backbone, list(model.backbone.stages)
    with torch.no_grad():
        before = model(images)
        assert insert_ia(model, stages) is model and torch.equal(
            model(images), before
        ), "to the bit"
    assert before.isfinite().all() and before.std() > 0
    for k, (stage, old) in enumerate(zip(backbone.stages, plain), 1):
        assert (
            stage is old
            if k not in stages
            else stage[0] is old and isinstance(stage[1], IABlock) and len(stage) == 2
        )
        assert k not in stages or stage[1].norms["sia"].num_features == backbone.channels[k - 1]
    if stages:
        with pytest.raises(ValueError, match="IA blocks already"):
            insert_ia(backbone, (1,))


def test_every_residual_block():
    backbone, images = lively(build_backbone("resnet18")), random(1, 3, 64, 48)
    with torch.no_grad():
        before = backbone(images)
        assert torch.equal(insert_ia(backbone, every_block=True)(images), before)
    deep = insert_ia(build_backbone("resnet50"), every_block=True)
    for stage, count in zip([*backbone.stages, *deep.stages], (0, 2, 2, 0, 0, 4, 6, 0)):
        assert sum(isinstance(m, IABlock) for m in stage.modules()) == count
        assert not count or [isinstance(m, IABlock) for m in stage] == [False, True] * count


@pytest.mark.parametrize(
    "network,options,words",
    [
        ("googlenet", {"every_block": True}, "every_block needs a ResNet.*stage 2"),
        ("tiny", {"stages": (0, 2)}, "stages are .0, 2.*1 to 4"),
        ("tiny", {"stages": (2, 5)}, "stages are .2, 5.*1 to 4"),
        ("tiny", {"stages": (3, 2, 3)}, "stages are .3, 2, 3"),
        ("tiny", {"order": "cia+sia"}, r"order 'cia\+sia'.*parallel"),
        ("tiny", {"contexts": (0, 1)}, "contexts are .0, 1"),
    ],
)
def test_refused_insertions_leave_the_model_alone(network, options, words):
    model = IDE(5, backbone=network)
    parts = list(model.modules())
    with pytest.raises(ValueError, match=words):
        insert_ia(model, **options)
    assert list(model.modules()) == parts


def test_new_blocks_take_over_mode_type_and_device():
    backbone = build_backbone("tiny").double()
    backbone.stages[1].eval()
    insert_ia(backbone)
    assert not any(m.training for m in backbone.stages[1].modules()) and all(
        m.training for m in backbone.stages[2].modules()
    )
    assert {p.dtype for p in backbone.parameters()} == {torch.float64}
    assert backbone(random(1, 3, 64, 48, dtype=torch.float64)).dtype == torch.float64
    far = insert_ia(build_backbone("tiny").to("meta"))
    assert {t.device.type for t in (*far.parameters(), *far.buffers())} == {"meta"}


@pytest.mark.parametrize("neck", ["none", "bn"])
@pytest.mark.parametrize("order", ["sia-cia", "parallel"])
def test_ianet_starts_as_ide(neck, order):
    images, models = random(4, 3, 64, 48), []
    for make in (
        lambda: IDE(5, backbone="tiny", neck=neck),
        lambda: IANet(5, backbone="tiny", neck=neck, order=order, scale="learned"),
    ):
        torch.manual_seed(3)
        models.append(make())
    for ours, theirs in zip(models[1].train()(images), models[0].train()(images)):
        assert torch.equal(ours, theirs)
    features, scores = models[1](images)
    assert features.shape == (4, 128) and scores.shape == (4, 5)
    with torch.no_grad():
        models[0](images)  # both have seen two batches
        embedding = models[1].eval()(images)
        assert embedding.shape == (4, 128) and torch.equal(embedding, models[0].eval()(images))


def test_the_bases_own_arguments_reach_it():
    heights = [
        IANet(5, backbone="tiny", last_stride=s).backbone(torch.zeros(1, 3, 128, 64)).shape[2]
        for s in (1, 2)
    ]
    assert heights == [8, 4]
    with pytest.raises(ValueError, match=r"weights 'none.*' is no file"):
        IANet(5, backbone="tiny", weights="none.safetensors")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_ianet_trains(fusion):
    torch.manual_seed(0)
    model, images = IANet(5, backbone="tiny", fusion=fusion).train(), random(5, 3, 128, 64)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model.zero_grad()
        F.cross_entropy(model(images)[1], torch.arange(5)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimiser.step()
    for block in (m for m in model.modules() if isinstance(m, IABlock)):
        assert all((norm.weight != 0).any() for norm in block.norms.values())


def test_cost_of_resnet50():
    (p, base), (p1, one), (p2, full) = (
        cost(IANet(751, **options), 256, 128)
        for options in ({"stages": ()}, {"stages": (3,), "order": "sia"}, {})
    )
    assert base == pytest.approx(4.053e9, abs=1e6) and full == pytest.approx(4.892e9, abs=1e6)
    assert (
        one - base == 2 * 128**2 * 1024 == 33_554_432
    ), "the dot products once, for all contexts, and the aggregation"
    assert (
        full - base == 2 * 512**2 * 512 + 2 * 512**2 * 512 + 2 * 128**2 * 1024 + 2 * 1024**2 * 128
    )
    assert p1 - p == 2 * 1024 and p2 - p == 2 * 2 * (
        512 + 1024
    ), "γ and β of each batch norm, nothing else"


def test_spatial_relations_are_those_of_the_network():
    model, pixels = lively(IANet(5, backbone="tiny", stages=(3, 2))).train(), random(2, 3, 128, 64)
    found, seen = spatial_relations(model, pixels), []
    assert (
        not model.training
        and [size for _, size in found] == [(16, 8), (8, 4)]
        and not any(S.requires_grad for S, _ in found)
    )
    assert not any(m._forward_pre_hooks for m in model.modules())
    for sia in (m for m in model.modules() if isinstance(m, SIA)):
        sia.register_forward_hook(lambda sia, inputs, E: seen.append((inputs[0], E)))
    model(pixels)
    for (S, (height, width)), (x, E) in zip(found, seen, strict=True):
        assert S.shape == (2, height * width, height * width)
        close(S.sum(-1), torch.ones(2, height * width))
        close(
            S,
            appearance(x.detach(), location=location(height, width, 5 * width / 8, 5 * height / 8)),
            1e-4,
        )
        close((x.flatten(2) @ S.mT).view_as(x).detach(), E.detach(), 1e-4)
    assert len(spatial_relations(IANet(5, depth=18, every_block=True), pixels[:1])) == 4
    assert (
        spatial_relations(IANet(5, backbone="tiny", order="cia"), pixels)
        == []
        == spatial_relations(IDE(5, backbone="tiny"), pixels)
    )


@pytest.mark.parametrize(
    "call,words",
    [
        *(
            (lambda K=K: diagonal_box(torch.zeros(1, 5, 4, 5, 4), K), f"contexts: {K}.*5×4")
            for K in (0, -1, 5)
        ),
        *(
            (lambda v=v: location_relation(4, 3, v, 1.0), f"sigma_x is {v}")
            for v in (0, -1.0, math.nan, math.inf)
        ),
        *(
            (lambda v=v: location_relation(4, 3, 1.0, v), f"sigma_y is {v}")
            for v in (0, -1.0, math.nan, math.inf)
        ),
        (lambda: location_relation(0, 3, 1.0, 1.0), "height is 0"),
        (lambda: location_relation(4, 0, 1.0, 1.0), "width is 0"),
        *(
            (
                lambda n=n: IABlock(4, **{n: "best"}),
                f"{n} 'best' is unknown; take one of {OPTIONS[n][0]}, ",
            )
            for n in OPTIONS
        ),
        *(
            (lambda n=n: appearance_relation(torch.zeros(1, 2, 4, 4), **{n: "best"}), f"{n} 'best'")
            for n in ("fusion", "combine", "scale")
        ),
        (lambda: appearance_relation(torch.zeros(1, 2, 4, 4), scale="learned"), "to modules"),
        *((lambda c=c: SIA(c), "contexts are") for c in ((), (1, 1), (0,), (1.5,))),
        (lambda: CIA("best"), "scale 'best'"),
        (lambda: SIA(sigma=(5, 10, 20)), r"sigma is \(5, 10, 20\)"),
        (lambda: SIA(sigma=(5, 0)), "sigma_y is 0"),
        (lambda: SIA()(torch.zeros(1, 2, 2, 5)), "contexts: 3.*2×5"),
        (lambda: appearance_relation(torch.zeros(2, 5, 5)), "x must be.*2, 5, 5"),
        (lambda: insert_ia(nn.Linear(2, 2)), "model Linear has no stages"),
        (lambda: IANet(5, backbone="tiny", stages=(5,)), "stages are .5"),
        (lambda: insert_ia(IANet(5, backbone="tiny")), "IA blocks already"),
    ],
)
def test_errors_name_the_culprit(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("relation", ["both", "location"])
def test_a_module_may_change_its_type_between_two_images(relation):
    module, x = SIA(relation=relation), random(1, 3, 5, 4)
    before = module(x)
    torch.testing.assert_close(module.bfloat16()(x), before, msg="the buffer was rounded")
    assert module.double()(x.double()).dtype == torch.float64


def test_relations_alone_stay_float32_under_autocast():
    x = 3 * random(2, 4, 5, 4)
    for relation in (appearance_relation, SIA().relation_map, CIA().relation_map):
        exact = relation(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(relation(x), exact)


def test_what_is_looked_at_is_what_the_network_used():
    model = IANet(5, backbone="tiny", scale="learned")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (S, _), *_ = spatial_relations(model, random(1, 3, 128, 64))
    assert S.dtype == torch.float32 and not S.requires_grad
    torch.testing.assert_close(S.sum(-1), torch.ones_like(S[..., 0]))


@pytest.mark.parametrize("make", [SIA, CIA, IABlock])
def test_maps_of_the_wrong_kind_are_named(make):
    module = make(3) if make is IABlock else make()
    for wrong in (random(3, 5, 4), torch.ones(1, 3, 5, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="x must be a floating point map"):
            module(wrong)


def test_every_row_the_paper_prints_has_a_name():
    own = reported("ianet").query("own")
    named = {(key["table"], key["row"]) for row in read_rows("ianet") for key in row.reported}
    assert named == set(zip(own["table"], own["row"]))
    assert [
        job.row.name for job in plan("paper", "ianet/table4e") if job.dataset == "market1501"
    ] == ["base", "sia_cia", "stage1", "stage2", "stage4"]
    with pytest.raises(ValueError, match=r"no row or table 'table9'.*table4a"):
        plan("paper", "ianet/table9")


@pytest.mark.parametrize("row", read_rows("ianet"), ids=lambda row: row.name)
def test_every_row_is_a_block_that_can_be_built(row):
    names = ("order", "relation", "contexts", "combine", "fusion", "scale", "sigma")
    IABlock(4, **{name: row.set[name] for name in names if name in row.set})
    run = {name: default for name, (_, default) in declared(project_root() / row.notebook).items()}
    network = build("ianet", {**run, **row.set, "backbone": "tiny"}, 4)
    for module in network.modules():
        for name in names if isinstance(module, SIA) else ():
            wanted = row.set.get(name)
            if wanted and name != "order" and wanted != "learned":
                assert getattr(module, name) == (tuple(wanted) if name == "contexts" else wanted)
        if isinstance(module, IABlock):
            assert module.order == row.set.get("order", "sia-cia")
    assert set(row.set.get("stages", [])) <= {1, 2, 3, 4} and "stages" in row.set


def test_the_study_has_seeds_towns_and_a_baseline_with_more_time():
    jobs = plan("study", "ianet")
    assert {job.seed for job in jobs} == {0, 1, 2, 3, 4} and {
        job.parameters["rendering"] for job in jobs
    } == {"own"}
    epochs = {job.row.name: job.parameters["epochs"] for job in jobs}
    assert {
        "base", "base_longer", "ianet", "ianet_literal", "ianet_released", "ianet_cosine",
    } <= set(epochs)
    assert epochs["base_longer"] >= 1.5 * epochs["ianet"] == 1.5 * epochs["base"]


@pytest.mark.parametrize("table", ["4a", "4b", "4c"])
def test_every_row_of_tables_4a_to_4c_that_has_a_scale_stands_beside_one_on_cosines(table):
    rows = {row.name: row for row in read_rows("ianet")}
    printed = [name for name, row in rows.items() for key in row.reported if key["table"] == table]
    assert len(printed) > 3
    for name in printed:
        if name not in ("base", "location"):
            assert rows[f"{name}_cosine"].set == {**rows[name].set, "scale": "cosine"}
            assert (
                "study" in rows[f"{name}_cosine"].profiles or name == "k5"
            ), "5×5 patches do not fit the study's maps"


def test_figure_7_sweeps_sigma_alone():
    rows = {row.name: row.set for row in read_rows("ianet")}
    swept = {name: values for name, values in rows.items() if values.get("relation") == "location"}
    # σ = (5, 10)
    assert len(swept) == 5 and swept.pop("location") == {
        "stages": [3], "order": "sia", "relation": "location",
    }
    for values in swept.values():
        assert values == {**rows["location"], "sigma": [values["sigma"][0], 2 * values["sigma"][0]]}


def test_ide_plus_is_one_recipe_wherever_the_name_stands():
    (plus,) = (row for row in read_rows("ide") if row.name == "ide_plus")
    over = [row for row in read_rows("ianet") if "IDE+" in row.title]
    assert [row.name for row in over] == ["ianet_plus", "ianet_cosine_plus"]
    for row in over:
        assert {k: v for k, v in row.set.items() if k not in ("stages", "scale")} == plus.set
        for profile in row.profiles:
            recipe = read_profile(profile)
            assert recipe.of("ianet", row.name) == recipe.of("ide", "ide_plus")


class Fixed(nn.Module):
    """A backbone of one stage that shows every image as one of these maps, after their order in the
    batch.
    """

    def __init__(self, maps, **options):
        super().__init__()
        self.maps = maps
        self.stages = nn.ModuleList([nn.Sequential(IABlock(maps.shape[1], **options))])

    def forward(self, pixels):
        return self.stages[0](self.maps[: len(pixels)])


def images(n, height=8, width=8):
    return torch.randint(
        0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(n), dtype=torch.uint8
    )


@pytest.mark.parametrize(
    "step,options", [("sia", {"relation": "appearance", "contexts": (1,)}), ("cia", {})]
)
def test_pulse_of_blocks_whose_answer_is_known(step, options):
    n = 12  # positions, and channels
    alone = 100 * torch.eye(n).view(1, n, 4, 3)  # a position, or channel, resembles itself alone
    alike = torch.ones(1, n, 4, 3)
    known = [
        (alike, n, 1 / n), (alone, 1, 1), (torch.cat([alike, alone]), (n + 1) / 2, (1 / n + 1) / 2),
    ]
    for maps, givers, kept in known:
        found = pulse(Fixed(maps, order=step, **options), images(len(maps)))
        expected = {"of": n, "givers": givers, "kept": kept, "moved": 0}
        assert found == {
            f"stage1_{step}_{name}": pytest.approx(value, abs=1e-4)
            for name, value in expected.items()
        }
        assert found[f"stage1_{step}_moved"] == 0, "γ = 0: to the bit"


def test_pulse_says_how_far_the_norm_moves_the_input():
    model = Fixed(
        torch.cat([2 * torch.ones(1, 4, 3, 2), 8 * torch.ones(1, 4, 3, 2)]), order="parallel",
        contexts=(1,),
    )
    for name, beta in (("sia", 1.0), ("cia", 3.0)):
        # γ = 0, so BN(E) = β everywhere
        nn.init.constant_(model.stages[0][0].norms[name].bias, beta)
    found = pulse(model, images(2))
    assert found["stage1_sia_moved"] == pytest.approx((1 / 2 + 1 / 8) / 2)
    assert found["stage1_cia_moved"] == pytest.approx((3 / 2 + 3 / 8) / 2)
    model.stages[0][0].order = "sia-cia"  # CIA reads what SIA has moved to 3 and 9
    assert pulse(model, images(2))["stage1_cia_moved"] == pytest.approx((3 / 3 + 3 / 9) / 2)


def test_pulse_names_every_block_and_leaves_the_model_as_it_was():
    model = lively(IANet(5, backbone="tiny", stages=(2, 3), scale="learned")).train()
    model.backbone.stages[2].eval()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    modes = [m.training for m in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    pictures, random_state = images(10, 128, 64), torch.get_rng_state()
    found = pulse(model, pictures)
    names = ("of", "givers", "kept", "moved")
    assert list(found) == [
        f"stage{k}_{step}_{name}" for k in (2, 3) for step in ("sia", "cia") for name in names
    ]
    for k, (positions, channels) in {2: (128, 32), 3: (32, 64)}.items():
        for step, n in (("sia", positions), ("cia", channels)):
            of, givers, kept, moved = (found[f"stage{k}_{step}_{name}"] for name in names)
            assert of == n and 1 < givers < n and 0 < kept < 1 and moved > 0
    assert [m.training for m in model.modules()] == modes and all(
        p.grad is None and p.requires_grad for p in model.parameters()
    )
    assert all(
        torch.equal(value, state[name]) for name, value in model.state_dict().items()
    ), "statistics too"
    assert not any(m._forward_hooks for m in model.modules()) and torch.equal(
        torch.get_rng_state(), random_state
    )
    assert all(p is q for p, q in zip(model.parameters(), optimiser.param_groups[0]["params"]))
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    assert pulse(model, pictures, batch_size=3) == {
        name: pytest.approx(value, rel=1e-4) for name, value in found.items()
    }
    assert seen == [3, 3, 3, 1]


def test_pulse_is_that_of_the_relations_the_network_uses():
    model, pictures = lively(IANet(5, backbone="tiny", scale="cosine")), images(4, 128, 64)
    found = pulse(model, pictures)
    for k, (S, _) in zip((2, 3), spatial_relations(model, normalise(pictures))):
        givers = torch.stack(
            [
                sum(-p * p.log() for p in row).exp()
                for row in S.flatten(0, 1).double().clamp(min=1e-30)
            ]
        ).mean()
        assert found[f"stage{k}_sia_givers"] == pytest.approx(givers.item(), rel=1e-4)
        assert found[f"stage{k}_sia_kept"] == pytest.approx(
            S.diagonal(dim1=1, dim2=2).mean().item(), rel=1e-4
        )


def test_pulse_of_other_networks():
    pictures = images(2, 64, 32)
    assert (
        pulse(IDE(5, backbone="tiny"), pictures)
        == {}
        == pulse(IANet(5, backbone="tiny", stages=()), pictures)
    )
    every = pulse(IANet(5, depth=18, stages=(2,), every_block=True, order="cia"), pictures)
    assert {name.removesuffix("_of") for name in every if name.endswith("_of")} == {
        "stage2_1_cia", "stage2_2_cia",
    }
    for wrong in (pictures.float(), pictures[0], pictures[:0]):
        with pytest.raises(ValueError, match="images must be uint8"):
            pulse(IDE(5, backbone="tiny"), wrong)


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Converting a tensor")
def test_ianet_can_be_traced_and_saved_and_its_block_exported(tmp_path):
    model, pixels = lively(IANet(5, backbone="tiny")), random(2, 3, 128, 64)
    # parameters ask for gradients, as a user would call it
    torch.jit.trace(model, pixels).save(tmp_path / "traced.pt")
    traced = torch.jit.load(tmp_path / "traced.pt")  # a file holds no Python function
    close(traced(pixels.flip(3)).detach(), model(pixels.flip(3)).detach())
    block, x = lively(IABlock(6)), random(2, 6, 5, 4)
    exported = torch.export.export(block, (x,)).module()
    close(exported(x.flip(3)).detach(), block(x.flip(3)).detach())
    assert block(random(1, 6, 4, 5)).isfinite().all(), "no tensor of the tracer was kept"


def test_neck_and_triplet_of_the_released_model():
    torch.manual_seed(0)
    model = IANet(5, backbone="tiny", neck="after").train()
    pixels = random(6, 3, 128, 64)
    people = torch.tensor([0, 0, 1, 1, 2, 2])
    model.neck.bias.data.fill_(0.5)
    f = model.backbone(pixels).mean((2, 3))
    features, scores = model(pixels)
    close(
        features.detach(),
        F.batch_norm(f, None, None, model.neck.weight, model.neck.bias, True).detach(), 1e-4,
    )
    assert (
        torch.equal(scores, model.classifier(features))
        and model.classifier.bias is not None
        and model.neck.bias.requires_grad
    )
    model.eval()
    assert torch.equal(model(pixels), model.neck(model.backbone(pixels).mean((2, 3))))
    unit = F.normalize(features, dim=1)
    d, same = 1 - unit @ unit.T, people[:, None] == people
    hard = [F.relu(0.3 + d[a][same[a]].max() - d[a][~same[a]].min()) for a in range(6)]
    terms = ide_objective(people, triplet=2.0, triplet_distance="cosine")(
        model.train(), torch.arange(6), lambda batch: pixels[batch]
    )
    close(terms["triplet"].detach(), 2 * torch.stack(hard).mean().detach(), 1e-4)
    plain = ide_objective(people, triplet=2.0)(model, torch.arange(6), lambda batch: pixels[batch])
    assert not torch.isclose(plain["triplet"], terms["triplet"])
    with pytest.raises(
        ValueError, match="triplet_distance 'dot' is unknown; take euclidean or cosine"
    ):
        ide_objective(people, triplet_distance="dot")
    with pytest.raises(ValueError, match="neck 'behind' is unknown; take none, bn or after"):
        IANet(5, backbone="tiny", neck="behind")
