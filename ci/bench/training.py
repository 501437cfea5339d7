"""The training loop beside others and beside its own convolutions.

    python ci/bench/training.py --out results/bench/training.json
"""

# first: it sets the number of threads
from common import main
import contextlib
import copy
import functools
import io
import multiprocessing
import os
import shutil
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Steps:
    """The same `batches` (index tensors) in every epoch, as a sampler of notebook 18; clocks the
    last epoch from first draw to end.

    Own CPU time and that of live child processes count: the workers of a DataLoader."""

    def __init__(self, batches, cuda):
        self.batches, self.cuda = batches, cuda

    def __len__(self):
        return len(self.batches)

    def clock(self):
        "(wall seconds, CPU-seconds) by now, the GPU's queue empty."
        import psutil

        if self.cuda:
            torch.cuda.synchronize()
        workers = [
            psutil.Process(child.pid).cpu_times() for child in multiprocessing.active_children()
        ]
        return time.perf_counter(), time.process_time() + sum(t.user + t.system for t in workers)

    def epoch(self, e):
        start = self.clock()
        yield from self.batches
        self.stop(start)

    def stop(self, start):
        "Sets `spent`, (wall seconds, CPU-seconds) since the `clock()` that gave `start`."
        self.spent = [after - before for before, after in zip(start, self.clock())]


class Photographs(torch.utils.data.Dataset):
    """JPEGs decoded and augmented one by one, (pixels, class): flip, pad and crop, erase as
    `recipe` says, sized and normalised.
    """

    def __init__(self, paths, labels, size, recipe):
        from torchvision import transforms as T

        from reid_repro.learning.augmentation import IMAGENET_MEAN, IMAGENET_STD

        self.paths, self.labels = paths, labels
        self.transform = T.Compose(
            [
                T.Resize(size), T.RandomHorizontalFlip(recipe.flip), T.Pad(recipe.pad),
                T.RandomCrop(size), T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
                T.RandomErasing(recipe.erase, (0.02, 0.4)),
            ]
        )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        from PIL import Image

        return self.transform(Image.open(self.paths[i]).convert("RGB")), int(self.labels[i])


def usual_step(model, images, people, optimiser):
    "A step as most code has it: the loss is asked for at once."
    loss = torch.nn.functional.cross_entropy(model(images)[1], people)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


def torchreid_step(model, images, people, optimiser):
    """A step after the description of torchreid's engine: cross-entropy over smoothed one-hot
    targets, the share of right answers, both asked for at once.
    """
    scores = model(images)[1]
    classes = scores.shape[1]
    targets = torch.zeros(scores.shape).scatter_(1, people.cpu()[:, None], 1).to(scores.device)
    targets = 0.9 * targets + 0.1 / classes
    loss = -(targets * scores.log_softmax(1)).mean(0).sum()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    right = scores.topk(1)[1][:, 0] == people
    return loss.item() + 0 * right.float().mean().mul(100).item()


def layumi_step(model, images, people, optimiser):
    """A step after the description of layumi's training script: gradients are cleared first, loss
    and right answers are summed up for the epoch, both asked for at once.
    """
    optimiser.zero_grad()
    scores = model(images)[1]
    loss = torch.nn.functional.cross_entropy(scores, people)
    predicted = scores.detach().max(1)[1]
    loss.backward()
    optimiser.step()
    summed = loss.item() * len(images)
    return summed / len(images) + 0 * float((predicted == people).sum())


RIVALS = {
    "the usual loop": usual_step, "a loop like torchreid's": torchreid_step,
    "a loop like layumi's": layumi_step,
}


def rival(step, model, data, steps, recipe, device, workers):
    """Trains by `step` on what workers decode and augment image by image. `steps` clocks the last
    epoch.
    """
    from reid_repro.learning.recipe import build_optimizer

    model.to(device).train()
    optimiser = build_optimizer(model, recipe)
    for group in optimiser.param_groups:
        group["fused"] = False  # as torch's own default
    # workers stay for both epochs, so that the second measures the loop and not their start
    batches = torch.utils.data.DataLoader(
        data, batch_sampler=[batch.tolist() for batch in steps.batches], num_workers=workers,
        pin_memory=device == "cuda", persistent_workers=workers > 0,
    )
    for _ in range(recipe.epochs):
        start = steps.clock()
        for images, people in batches:
            images = images.to(device, non_blocking=True)
            people = people.to(device, non_blocking=True)
            with torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bf16"):
                step(model, images, people, optimiser)
        steps.stop(start)


def convolutions(model, images):
    "(input, weight, options, gradient of the output) of every convolution, channels last."
    found = []

    def seen(layer, inputs, output):
        laid = [
            torch.rand_like(x).contiguous(memory_format=torch.channels_last)
            for x in (inputs[0].detach(), output.detach())
        ]
        options = layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups
        weight = layer.weight.detach().contiguous(memory_format=torch.channels_last)
        found.append((laid[0], weight, options, laid[1]))

    hooks = [
        layer.register_forward_hook(seen)
        for layer in model.modules()
        if isinstance(layer, torch.nn.Conv2d)
    ]
    with torch.no_grad():
        model.train()(images)
    for hook in hooks:
        hook.remove()
    return found


def bare_convolutions(model, steps, size, recipe, device):
    """Every convolution of a step forwards and backwards, on inputs that stay: what a step cannot
    do without. `steps` clocks the last epoch.
    """
    from reid_repro.learning.recipe import fast_math

    model.to(device)
    images = torch.rand(len(steps.batches[0]), 3, *size, device=device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bf16")
    with fast_math(device), autocast:
        layers = convolutions(model, images)
        for _ in range(recipe.epochs):
            start = steps.clock()
            for _ in steps.batches:
                for place, (x, weight, options, gradient) in enumerate(layers):
                    torch.ops.aten.convolution(x, weight, None, *options)
                    wanted = [place > 0, True, False]  # photographs need no gradient
                    torch.ops.aten.convolution_backward(
                        gradient, x, weight, None, *options, wanted
                    )
            steps.stop(start)


class OperatorClock(TorchDispatchMode):
    """CPU-seconds of each operator of torch, forwards and backwards, by name.

    torch.profiler clocks wall time, in which other processes of a shared machine have their turns.
    """

    def __init__(self):
        super().__init__()
        self.spent = defaultdict(float)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        start = time.thread_time()
        result = operator(*args, **kwargs or {})
        self.spent[operator.overloadpacket.__name__] += time.thread_time() - start
        return result


def operators(job):
    "Shares of the operators' CPU time in a training, largest first."
    with OperatorClock() as clock:
        job()
    whole = sum(clock.spent.values())
    largest = sorted(clock.spent.items(), key=lambda item: -item[1])
    return {name: seconds / whole for name, seconds in largest}


def apart(job):
    """What the call `job` returns, from a process of its own: what one tells the allocator does not
    reach the next.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def work():
        with contextlib.redirect_stdout(io.StringIO()):
            there.send(job())

    child = context.Process(target=work)
    child.start()
    there.close()
    try:
        return here.recv()
    finally:
        child.join()


def parts_of_training(run, objective, cuda):
    """Shares of the time of `run(objective)`, a call of `train`: augmentation, forward and loss,
    backward, optimiser, the rest.

    The GPU's queue is emptied around each part, so a part's time is its own and the whole is slower
    than when it is not watched."""
    from torch.optim.optimizer import (
        register_optimizer_step_post_hook, register_optimizer_step_pre_hook,
    )

    spent = dict.fromkeys(("augmentation", "forward and loss", "backward", "optimiser"), 0.0)
    since = []

    def now():
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() if cuda else time.process_time()

    def timed(part, call):
        def inner(*args, **options):
            start = now()
            result = call(*args, **options)
            spent[part] += now() - start
            return result
        return inner

    def watched(model, batch, get_images):
        start, before = now(), spent["augmentation"]
        terms = objective(model, batch, timed("augmentation", get_images))
        spent["forward and loss"] += now() - start - (spent["augmentation"] - before)
        return terms

    def opened(*_):
        since.append(now())

    def closed(*_):
        spent["optimiser"] += now() - since.pop()

    hooks = register_optimizer_step_pre_hook(opened), register_optimizer_step_post_hook(closed)
    backward, torch.Tensor.backward = torch.Tensor.backward, timed(
        "backward", torch.Tensor.backward
    )
    try:
        start = now()
        run(watched)
        whole = now() - start
    finally:
        torch.Tensor.backward = backward
        for hook in hooks:
            hook.remove()
    shares = {part: seconds / whole for part, seconds in spent.items()}
    return {**shares, "rest": 1 - sum(shares.values())}


def photographs(number, height, width, folder):
    """(uint8 tensor (number, 3, height, width), JPEG files, classes) of Toytown's training images,
    taken round and round.
    """
    from reid_repro.datasets import load_images, open_benchmark

    town = open_benchmark("toytown").train
    rows = np.arange(number) % len(town)
    paths = [
        shutil.copy(town.paths[row], Path(folder) / f"{i:06d}.jpg") for i, row in enumerate(rows)
    ]
    return load_images(town, height, width)[rows], paths, torch.from_numpy(town.labels[rows])


def jobs_of(models, pixels, data, watch, recipe, objective, device, workers):
    "{what: a call that trains}: other loops on IDE, its bare convolutions, ours on every model."
    from reid_repro.learning.training import train

    def ours(model, compile, objective=objective):
        train(
            model, objective, pixels, watch, recipe, seed=0, device=device, name="",
            compile=compile,
        )

    jobs = {}
    for name, step in RIVALS.items():
        plain = copy.deepcopy(models["IDE"])
        jobs[f"{name}, IDE"] = functools.partial(
            rival, step, plain, data, watch, recipe, device, workers
        )
    for name, model in models.items():
        jobs[f"ours, {name}"] = functools.partial(ours, model, False)
        if device == "cuda":
            jobs[f"ours, {name}, compiled"] = functools.partial(ours, copy.deepcopy(model), True)
    size = tuple(pixels.shape[2:])
    jobs["bare convolutions, IDE"] = functools.partial(
        bare_convolutions, copy.deepcopy(models["IDE"]), watch, size, recipe, device
    )
    return jobs


def measured(jobs, watch, repeats, device, precision):
    "Rounds of {what: (wall, CPU) seconds of the last epoch}, and the machine's matrix rate."
    from reid_repro.lab.costs import matrix_rate

    clock = time.perf_counter if device == "cuda" else time.process_time
    rounds, rate = [], 0.0

    def spent(job):
        with contextlib.redirect_stdout(io.StringIO()):
            job()
        return watch.spent

    for _ in range(repeats):  # A, B, C, A, B, C: other load meets all
        rate = max(rate, matrix_rate(device, precision, clock=clock))
        times = {}
        for what, job in jobs.items():
            call = functools.partial(spent, job)
            times[what] = call() if device == "cuda" else apart(call)
        rounds.append(times)
    return rounds, rate


def speed_rows(backbone, size, walls, cpus, speed, counts, rate, shares):
    "The table: one line for each training."
    none = dict.fromkeys(("augmentation", "forward and loss", "backward", "optimiser", "rest"))
    rows = []
    for what in speed:
        count = counts["IANet" if "IANet" in what else "IDE"]
        rows.append(
            {
                "what": what, "backbone": backbone, "size": size,
                "images/s": round(walls[what], 1), "images/CPU-s": round(cpus[what], 1),
                "x usual": round(speed[what] / speed["the usual loop, IDE"], 3),
                "time / bare convolutions": round(
                    speed["bare convolutions, IDE"] / speed[what], 3
                ),
                "M multiply-adds forward": round(count.evaluation / 1e6, 1),
                "in training": round(count.training / 1e6, 1),
                "of the matrix rate": round(count.training * speed[what] / rate, 3),
                **{
                    part: share and round(share, 3)
                    for part, share in shares.get(what, none).items()
                },
            }
        )
    return rows


def speed_notes(backbone, speed, counts, rate, second):
    "How far the aims are reached."
    def verdict(good):
        return "reached" if good else "NOT reached"

    ours = speed["ours, IDE"]
    times = ", ".join(
        f"{ours / speed[what]:.2f}x {what.removesuffix(', IDE')}"
        for what in (f"{name}, IDE" for name in RIVALS)
    )
    best = max(speed[what] for what in speed if what.startswith("ours, IDE"))
    twice = best / speed["the usual loop, IDE"]
    bare = speed["bare convolutions, IDE"] / ours
    notes = [
        f"{backbone}: ours is {times}: the aim of 2x the usual loop is {verdict(twice >= 2)}.",
        (
            f"{backbone}: ours takes {bare:.2f}x the time of its bare convolutions: the aim of"
            f" 1.05x is {verdict(bare <= 1.05)}."
        ),
        (
            f"Matrix rate: {rate / 1e9:.1f} G multiply-adds a {second}, a square product in the"
            " same precision, the best of the rounds."
        ),
    ]
    if "ours, IANet" in speed:
        slower = ours / speed["ours, IANet"]
        counted = counts["IANet"].training / counts["IDE"].training
        notes.append(
            f"IANet takes {slower:.3f}x the time of its baseline for {counted:.3f}x its"
            f" multiply-adds: the aim of 1.30x is {verdict(slower <= 1.3)}."
        )
    return notes


def load_notes():
    "A word about other work on the machine, where there is some."
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    if load <= 1.2:
        return []
    return [
        f"Other work shared the machine (load {load:.0f} on {os.cpu_count()} cores): images/s"
        " is too low, all else is noisy."
    ]


def drawn(images, batch, steps):
    "`steps` batches of indices, the images taken round and round in random order."
    generator = torch.Generator().manual_seed(0)
    rounds = -(-batch * steps // images)
    order = torch.cat([torch.randperm(images, generator=generator) for _ in range(rounds)])
    return order[: batch * steps].split(batch)


def measured_backbone(
    backbone, steps, *, device, height, width, batch, images, precision, workers, repeats
):
    "Rows and notes of one backbone, `steps` steps in an epoch."
    from reid_repro.ianet import IANet
    from reid_repro.ide import IDE, ide_objective
    from reid_repro.lab.costs import multiply_adds
    from reid_repro.learning.recipe import Recipe

    cuda = device == "cuda"
    recipe = Recipe(epochs=2, batch_size=batch, precision=precision, pad=10, erase=0.5)
    watch = Steps(drawn(images, batch, steps), cuda)
    with tempfile.TemporaryDirectory() as folder:
        pixels, paths, labels = photographs(images, height, width, folder)
        objective, people = ide_objective(labels), int(labels.max()) + 1
        models = {"IDE": IDE(people, backbone=backbone)}
        if cuda or backbone == "tiny":
            models["IANet"] = IANet(people, backbone=backbone, stages=(2, 3))
        counts = {name: multiply_adds(model, (height, width)) for name, model in models.items()}
        data = Photographs(paths, labels, (height, width), recipe)
        jobs = jobs_of(
            models, pixels.to(device), data, watch, recipe, objective, device, workers
        )
        rounds, rate = measured(jobs, watch, repeats, device, precision)
        ours = {what: job for what, job in jobs.items() if what.startswith("ours")}
        shares = {}
        for what, job in ours.items():
            look = functools.partial(parts_of_training, job, objective, cuda)
            shares[what] = look() if cuda else apart(look)
        table = {} if cuda else apart(functools.partial(operators, ours["ours, IDE"]))

    seen = batch * steps
    walls = {what: seen / min(times[what][0] for times in rounds) for what in jobs}
    cpus = {what: seen / min(times[what][1] for times in rounds) for what in jobs}
    speed = walls if cuda else cpus  # what other work on the machine disturbs least
    second = "second" if cuda else "CPU-second"
    size = f"{batch}x3x{height}x{width}"
    rows = speed_rows(backbone, size, walls, cpus, speed, counts, rate, shares)
    told = ", ".join(f"{name} {share:.1%}" for name, share in list(table.items())[:14])
    notes = [
        (
            f"{backbone} at {height}x{width}, {precision}, on {device}; {images} photographs of"
            f" Toytown, {steps} steps of {batch} after as many to warm up, interleaved, the best of"
            f" {repeats} rounds. Ratios and share are of images per {second}."
        ),
        *speed_notes(backbone, speed, counts, rate, second),
    ]
    if told:
        notes.append(f"Operators of ours, {backbone}, shares of their CPU time: {told}.")
    return rows, notes


def training(
    *, device="auto", backbone="", height=0, width=0, batch=0, images=2000, steps=0,
    precision="float32", workers=2, repeats=3,
):
    """Images per second of our training loop beside other loops and its own bare convolutions, its
    parts, and its distance to the machine's matrix rate.

    Empty and 0 take, on a CPU, the tiny backbone and ResNet-50 at 128x64, batches of 32, 20 steps
    and 3; on a GPU ResNet-50 at 256x128, 64, 100.
    `workers`: processes that decode and augment for the other loops."""
    from reid_repro.learning.recipe import pick_device

    device = pick_device(device).type
    usual = (256, 128, 64) if device == "cuda" else (128, 64, 32)
    height, width, batch = (
        value or other for value, other in zip((height, width, batch), usual)
    )
    chosen = {"resnet50": 100} if device == "cuda" else {"tiny": 20, "resnet50": 3}
    if backbone:
        chosen = {backbone: chosen.get(backbone, 20)}
    torch.set_flush_denormal(True)  # as train does; for the other loops too
    rows, notes = [], []
    for name, count in chosen.items():
        more, said = measured_backbone(
            name, steps or count, device=device, height=height, width=width, batch=batch,
            images=images, precision=precision, workers=workers, repeats=repeats,
        )
        rows += more
        notes += said
    notes += [
        (
            f"The other loops: a DataLoader whose {workers} worker processes decode 128x64 JPEGs,"
            " resize and augment them one by one, channels first, loss.item() at each step; same"
            " network, optimiser, batches, augmentation and precision. Those like torchreid's and"
            " layumi's are written anew from the descriptions of the two projects, not their code."
            " CPU-seconds include the workers'."
        ),
        (
            "Bare convolutions: each of the network's, forwards and backwards, channels last, on"
            " inputs that stay; no norm, no ReLU, no sum, no loss, no optimiser, no images."
        ),
        (
            "Parts: from a run of their own in which each part is waited for, warm-up included;"
            " those of the other loops are not measured."
        ),
        *load_notes(),
    ]
    return rows, notes


if __name__ == "__main__":
    main(training)
