"""CAN's copies of the last stage, training steps and triplets.

    python ci/bench/can.py --out results/bench/can.json
"""

# first: it sets the number of threads
from common import cpu_seconds, interleaved, main, wall_seconds
import copy

import torch


def grouped_stage(stages):
    """Copies of a ResNet stage as one stage of as many times the channels; its output is theirs,
    side by side.

    Convolutions are grouped but the first and the shortcut's, since all copies share the stage's
    input."""
    joined = copy.deepcopy(stages[0])
    for name, part in list(joined.named_modules()):
        twins = [stage.get_submodule(name) for stage in stages]
        if isinstance(part, torch.nn.Conv2d):
            groups = 1 if name in ("0.conv1", "0.downsample.0") else len(stages)
            width = part.in_channels * groups, part.out_channels * len(stages)
            new = torch.nn.Conv2d(
                *width, part.kernel_size, part.stride, part.padding, groups=groups, bias=False
            )
        elif isinstance(part, torch.nn.BatchNorm2d):
            new = torch.nn.BatchNorm2d(part.num_features * len(stages))
        else:
            continue
        owner, _, attribute = name.rpartition(".")
        setattr(joined.get_submodule(owner), attribute, new)
        for key, value in new.state_dict().items():
            if value.ndim:
                value.copy_(torch.cat([twin.state_dict()[key] for twin in twins]))
    return joined


def can_stages(backbone, batch, height, width, copies, repeats, measure, device):
    """Seconds of `copies` unshared last stages on one map, forward and backward: in a loop as CAN
    does, as one grouped pass, under vmap.
    """
    from reid_repro.learning.backbones import build_backbone

    built = build_backbone(backbone, 1)
    stages = [copy.deepcopy(built.stages[3]) for _ in range(copies)]
    for parameter in (p for stage in stages for p in stage.parameters()):
        with torch.no_grad():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))       # copies that differ
    def layout(part):
        return part.to(device, memory_format=torch.channels_last).train()
    joined = layout(grouped_stage(stages))
    stages = [layout(stage) for stage in stages]
    stacked, buffers = torch.func.stack_module_state(stages)
    def one(p, b, maps):
        return torch.func.functional_call(stages[0], (p, b), (maps,))
    x = (
        torch.randn(batch, built.channels[2], height, width, device=device)
        .to(memory_format=torch.channels_last)
        .requires_grad_()
    )
    passes = {
        "loop over the copies": (
            lambda: torch.cat([stage(x) for stage in stages], 1),
            [p for s in stages for p in s.parameters()],
        ),
        "one grouped pass": (lambda: joined(x), list(joined.parameters())),
        "vmap over stacked weights": (
            lambda: torch.vmap(one, (0, 0, None))(stacked, buffers, x)
            .transpose(0, 1)
            .flatten(1, 2),
            list(stacked.values()),
        ),
    }
    with torch.no_grad():
        weight = torch.randn_like(passes["loop over the copies"][0]())
    found, jobs = {}, {}
    for what, (forward, parameters) in passes.items():
        def job(forward=forward, parameters=parameters):
            out = forward()
            return [out, *torch.autograd.grad(out, [x, *parameters], weight)]

        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            out, to_x, *rest = job()
        norm = torch.stack([g.square().sum() for g in rest]).sum().sqrt()
        found[what], jobs[f"{backbone}: {what}"] = (out, to_x, norm), job
    first, *others = found.values()
    for other in others:
        for ours, theirs in zip(other, first):
            # 1 %, since a ReLU whose input is within rounding of 0 may go either way
            assert (
                ours - theirs
            ).norm() <= 1e-2 * theirs.norm(), "the three are not the same stages"
    seconds = interleaved(jobs, repeats, measure)
    size = f"{batch}x{built.channels[2]}x{height}x{width}"
    return [(what, size, s, s / next(iter(seconds.values())), None) for what, s in seconds.items()]


def can_steps(backbone, batch, height, width, classes, repeats, measure, device):
    """Seconds of a whole training step (Adam) of IDE and of CAN on the same photographs, and their
    multiply-adds for one image.
    """
    from reid_repro.learning.backbones import cost
    from reid_repro.can import CAN, can_objective
    from reid_repro.ide import IDE, ide_objective

    labels = torch.arange(batch, device=device) // 2
    images = torch.randn(batch, 3, height, width, device=device).to(
        memory_format=torch.channels_last
    )
    network = CAN(classes, backbone=backbone)
    jobs, counts = {}, {}
    pair = ("IDE", IDE(classes, backbone=backbone), ide_objective(labels)), (
        "CAN 1, 3, 5, 7", network, can_objective(labels),
    )
    for what, model, objective in pair:
        counts[f"step, {what}"] = cost(model, height, width)[1]
        model = model.to(device, memory_format=torch.channels_last).train()
        optimiser = torch.optim.Adam(model.parameters(), lr=3e-4)

        def step(model=model, objective=objective, optimiser=optimiser):
            optimiser.zero_grad()
            sum(
                objective(model, torch.arange(batch, device=device), images.__getitem__).values()
            ).backward()
            optimiser.step()

        jobs[f"step, {what}"] = step
    seconds, size = interleaved(jobs, repeats, measure), f"{batch}x3x{height}x{width}"
    return [
        (what, size, s, s / seconds["step, IDE"], counts[what] / 1e9) for what, s in seconds.items()
    ]


def can_triplets(batch, heads, dim, repeats, measure, device, calls=20):
    """Seconds of the triplet loss of several heads, forward and backward: a loop over the heads,
    and all at once as CANLoss does.
    """
    from reid_repro.learning.losses import batch_hard_triplet

    labels = torch.arange(batch, device=device) // 4
    f = torch.nn.functional.normalize(
        torch.randn(batch, heads, dim, device=device), dim=2
    ).requires_grad_()
    def one(features):
        return batch_hard_triplet(features, labels, 0.3, squared=True)
    ways = {
        "triplet, loop over heads": (
            lambda: torch.stack([one(features) for features in f.unbind(1)]).mean()
        ),
        "triplet, vmap": lambda: torch.vmap(one, in_dims=1)(f).mean(),
    }
    loop, together = (torch.autograd.grad(way(), f)[0] for way in ways.values())
    torch.testing.assert_close(together, loop)
    jobs = {
        what: lambda way=way: [torch.autograd.grad(way(), f) for _ in range(calls)]
        for what, way in ways.items()
    }
    seconds = {what: s / calls for what, s in interleaved(jobs, repeats, measure).items()}
    return [
        (what, f"{batch}x{heads}x{dim}", s, s / seconds["triplet, loop over heads"], None)
        for what, s in seconds.items()
    ]


def can(*, device="auto", batch=8, repeats=3, step_repeats=2, classes=751, seed=0):
    """CAN's unshared last stages in a loop, grouped and under vmap; its training step beside IDE's;
    its triplets head by head and at once.
    """
    from reid_repro.learning.recipe import pick_device

    device = pick_device(device)
    unit, measure = ("CPU-s", cpu_seconds) if device.type == "cpu" else ("wall-s", wall_seconds)
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)      # as training does
    found = [
        *can_stages("resnet50", batch, 24, 8, 4, repeats, measure, device),
        *can_stages("tiny", 32, 24, 4, 4, repeats, measure, device),
        *can_triplets(32, 16, 256, repeats, measure, device),
        *can_steps("resnet50", batch, 384, 128, classes, step_repeats, measure, device),
    ]
    rows = [
        {
            "what": what, "size": size, unit: round(seconds, 4), "x reference": round(share, 3),
            "G multiply-adds": madds and round(madds, 2),
        }
        for what, size, seconds, share, madds in found
    ]
    times = [row["x reference"] for row in rows]
    counts = [row["G multiply-adds"] for row in rows[-2:]]
    notes = [
        (
            "Each group is interleaved after a warm-up, the least of its repeats counts; x"
            " reference is to the first row of the group."
        ),
        (
            "Stages: four copies of the last stage with weights of their own, training mode,"
            " forward and backward; outputs and the gradient of the map equal to 1 % of their"
            " length in all three forms, and so the length of the weights' gradient, asserted."
        ),
        (
            f"Grouped against loop: {times[1]:.2f}x with ResNet-50, {times[4]:.2f}x with tiny; vmap"
            f" {times[2]:.2f}x and {times[5]:.2f}x."
        ),
        (
            f"The triplet loss of 16 heads at once takes {times[7]:.2f}x of the loop's time, same"
            " gradient, asserted."
        ),
        (
            "Steps: ResNet-50, last stride 1, Adam, ID loss (IDE) or all three losses on all heads"
            f" (CAN). CAN takes {times[9]:.2f}x the time for {counts[1] / counts[0]:.2f}x the"
            " multiply-adds of an image's forward pass."
        ),
    ]
    return rows, notes


if __name__ == "__main__":
    main(can)
