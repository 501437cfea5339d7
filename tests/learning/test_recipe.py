"""The recipe: rates by hand, which parameter is trained at which rate and how, and a borrowed network
that comes back as it was.
"""

import math

import pytest
import torch
from torch import nn

from reid_repro.ide import IDE
from reid_repro.learning.recipe import Recipe, borrowed, build_optimizer, lr_factor


def test_warm_up_by_hand():
    recipe = Recipe(epochs=10, warmup=2, schedule="step", milestones=(100,))
    # a hundredth, half way, done
    for epoch, factor in ((0, 0.01), (1, 0.505), (2, 1), (7, 1)):
        assert lr_factor(recipe, epoch) == pytest.approx(factor)
    assert lr_factor(Recipe(epochs=10), 0) == 1, "without one it starts in full"


def test_schedules_by_hand():
    cosine = Recipe(epochs=12)
    for epoch, factor in ((0, 1), (3, (1 + math.sqrt(0.5)) / 2), (6, 0.5), (12, 0), (13, 0)):
        assert lr_factor(cosine, epoch) == pytest.approx(factor)
    steps = Recipe(epochs=12, schedule="step", milestones=(4, 8), gamma=0.5)
    for epoch, factor in ((3.99, 1), (4, 0.5), (7.99, 0.5), (8, 0.25), (12, 0.25)):
        assert lr_factor(steps, epoch) == pytest.approx(factor)
    exponential = Recipe(epochs=12, schedule="exponential", gamma=0.9)
    assert lr_factor(exponential, 2.5) == pytest.approx(0.9**2.5)
    assert lr_factor(Recipe(epochs=12, warmup=4), 2) == pytest.approx(
        0.505 * (1 + math.cos(math.pi / 6)) / 2
    ), "both at once"


def test_the_backbone_has_the_rate_and_everything_else_its_multiple():
    model = IDE(5, backbone="tiny", neck="bn")  # β of its neck is frozen
    optimizer = build_optimizer(model, Recipe(lr=0.01, head_lr=10))
    backbone, others = optimizer.param_groups
    assert {id(p) for p in backbone["params"]} == {id(p) for p in model.backbone.parameters()}
    assert {id(p) for p in others["params"]} == {
        id(model.neck.weight), id(model.classifier.weight)
    }, "nothing frozen"
    assert (backbone["lr"], backbone["top_lr"]) == (0.01, 0.01)
    assert (others["lr"], others["top_lr"]) == pytest.approx((0.1, 0.1))


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_two_steps_of_each_optimizer_by_its_formula(kind):
    """One number w with gradient 3 and weight decay 0.1, rate 0.01: in AdamW the decay is apart, in
    Adam part of the gradient; SGD has Nesterov's momentum 0.9.
    """
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    optimizer = build_optimizer(model, Recipe(optimizer=kind, lr=0.01, weight_decay=0.1))
    w, first, second, velocity = 2.0, 0.0, 0.0, 0.0
    for step in (1, 2):
        optimizer.zero_grad()
        (3 * model.w).backward()
        optimizer.step()
        g = 3.0 if kind == "adamw" else 3 + 0.1 * w
        if kind == "sgd":
            velocity = 0.9 * velocity + g
            w -= 0.01 * (g + 0.9 * velocity)
        else:
            if kind == "adamw":
                w -= 0.01 * 0.1 * w
            first = 0.9 * first + 0.1 * g
            second = 0.999 * second + 0.001 * g**2
            mean = first / (1 - 0.9**step)
            w -= 0.01 * mean / (math.sqrt(second / (1 - 0.999**step)) + 1e-8)
        assert model.w.item() == pytest.approx(w, rel=1e-9)


def test_nothing_to_train_is_said():
    model = IDE(5, backbone="tiny").requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(model, Recipe())


def test_a_borrowed_network_evaluates_and_comes_back_as_it_was():
    model = IDE(5, backbone="tiny", neck="bn").train()
    model.neck.eval()  # frozen statistics amid training
    before = [module.training for module in model.modules()]
    with borrowed(model, "cpu"):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError, match="midway"), borrowed(model, "cpu"):
        raise RuntimeError("midway")
    assert [module.training for module in model.modules()] == before
