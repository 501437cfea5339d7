"""The training loop beside the usual one.

    python ci/bench/training.py --out results/bench/training.json
"""

# first: it sets the number of threads
from common import main
import contextlib
import copy
import io
import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch


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


def usual_loop(model, data, steps, recipe, device, workers):
    """Trains as most code does: workers decode and augment image by image, each step asks for its
    loss. `steps` clocks the last epoch.
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
    losses = []
    for _ in range(recipe.epochs):
        start = steps.clock()
        for images, people in batches:
            images = images.to(device, non_blocking=True)
            people = people.to(device, non_blocking=True)
            with torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = torch.nn.functional.cross_entropy(model(images)[1], people)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        steps.stop(start)
    return losses


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
    "{what: a call that trains}: the usual loop on IDE, then ours on every model."
    from reid_repro.learning.training import train

    def ours(model, compile):
        def job(objective=objective):
            train(
                model, objective, pixels, watch, recipe, seed=0, device=device, name="",
                compile=compile,
            )

        return job

    plain = copy.deepcopy(models["IDE"])
    jobs = {"the usual loop, IDE": lambda: usual_loop(plain, data, watch, recipe, device, workers)}
    for name, model in models.items():
        jobs[f"ours, {name}"] = ours(model, compile=False)
        jobs[f"ours, {name}, compiled"] = ours(copy.deepcopy(model), compile=True)
    return jobs


def measured(jobs, watch, repeats, device, precision):
    "Rounds of {what: (wall, CPU) seconds of the last epoch}, and the machine's matrix rate."
    from reid_repro.lab.costs import matrix_rate

    clock = time.perf_counter if device == "cuda" else time.process_time
    rounds, rate = [], 0.0
    for _ in range(repeats):  # A, B, C, A, B, C: other load meets all
        rate = max(rate, matrix_rate(device, precision, clock=clock))
        times = {}
        for what, job in jobs.items():
            with contextlib.redirect_stdout(io.StringIO()):
                job()
            times[what] = watch.spent
        rounds.append(times)
    return rounds, rate


def speed_rows(size, walls, cpus, speed, counts, rate, shares):
    "The table: one line for each training."
    usual = next(iter(speed))
    none = dict.fromkeys(next(iter(shares.values())))
    rows = []
    for what in speed:
        count = counts["IANet" if "IANet" in what else "IDE"]
        parts = shares.get(what, none)
        rows.append(
            {
                "what": what, "size": size,
                "images/s": round(walls[what], 1), "images/CPU-s": round(cpus[what], 1),
                "x usual": round(speed[what] / speed[usual], 3),
                "M multiply-adds forward": round(count.evaluation / 1e6, 1),
                "in training": round(count.training / 1e6, 1),
                "of the matrix rate": round(count.training * speed[what] / rate, 3),
                **{part: share and round(share, 3) for part, share in parts.items()},
            }
        )
    return rows


def speed_notes(speed, counts, rate, second):
    "How far the aims are reached."
    def verdict(good):
        return "reached" if good else "NOT reached"

    usual = speed["the usual loop, IDE"]
    faster = speed["ours, IDE"] / usual
    best = max(speed[what] for what in speed if what.startswith("ours, IDE")) / usual
    slower = speed["ours, IDE"] / speed["ours, IANet"]
    counted = counts["IANet"].training / counts["IDE"].training
    notes = [
        (
            f"Ours is {faster:.2f}x the usual loop's speed, {best:.2f}x in its faster form: the aim"
            f" of 2x is {verdict(best >= 2)}."
        ),
        (
            f"IANet takes {slower:.3f}x the time of its baseline for {counted:.3f}x its"
            f" multiply-adds: the aim of 1.30x is {verdict(slower <= 1.3)}."
        ),
        (
            f"Matrix rate: {rate / 1e9:.1f} G multiply-adds a {second}, a square product in the"
            " same precision, the best of the rounds."
        ),
        (
            "Parts: from a run of their own in which each part is waited for, warm-up included;"
            " those of the usual loop are not measured."
        ),
    ]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    if load > os.cpu_count():
        notes.append(
            f"Other work shared the machine (load {load:.0f} on {os.cpu_count()} cores): images/s"
            " is too low, all else is noisy."
        )
    return notes


def drawn(images, batch, steps):
    "`steps` batches of indices, the images taken round and round in random order."
    generator = torch.Generator().manual_seed(0)
    rounds = -(-batch * steps // images)
    order = torch.cat([torch.randperm(images, generator=generator) for _ in range(rounds)])
    return order[: batch * steps].split(batch)


def training(
    *, device="auto", backbone="", height=0, width=0, batch=0, images=2000, steps=0,
    precision="float32", workers=0, repeats=3,
):
    """Images per second of our training loop beside the usual one, its parts, and its distance to
    the machine's matrix rate.

    Empty and 0 take, on a CPU, the tiny backbone at 128x64, batches of 32, 20 steps; on a GPU
    ResNet-50 at 256x128, 64, 100.
    `workers`: processes of the usual loop, 0 takes one per core, eight at most."""
    from reid_repro.lab.costs import multiply_adds
    from reid_repro.ianet import IANet
    from reid_repro.ide import IDE, ide_objective
    from reid_repro.learning.recipe import Recipe, pick_device

    device = pick_device(device).type
    cuda = device == "cuda"
    usual = ("resnet50", 256, 128, 64, 100) if cuda else ("tiny", 128, 64, 32, 20)
    given = (backbone, height, width, batch, steps)
    backbone, height, width, batch, steps = (value or other for value, other in zip(given, usual))
    workers = workers or min(8, os.cpu_count())
    recipe = Recipe(epochs=2, batch_size=batch, precision=precision, pad=10, erase=0.5)
    watch = Steps(drawn(images, batch, steps), cuda)
    torch.set_flush_denormal(True)  # as train does; for the usual loop too

    with tempfile.TemporaryDirectory() as folder:
        pixels, paths, labels = photographs(images, height, width, folder)
        objective, people = ide_objective(labels), int(labels.max()) + 1
        models = {
            "IDE": IDE(people, backbone=backbone),
            "IANet": IANet(people, backbone=backbone, stages=(2, 3)),
        }
        counts = {name: multiply_adds(model, (height, width)) for name, model in models.items()}
        data = Photographs(paths, labels, (height, width), recipe)
        jobs = jobs_of(
            models, pixels.to(device), data, watch, recipe, objective, device, workers
        )
        rounds, rate = measured(jobs, watch, repeats, device, precision)
        with contextlib.redirect_stdout(io.StringIO()):
            shares = {
                what: parts_of_training(job, objective, cuda)
                for what, job in jobs.items()
                if what.startswith("ours")
            }

    seen = batch * steps
    walls = {what: seen / min(times[what][0] for times in rounds) for what in jobs}
    cpus = {what: seen / min(times[what][1] for times in rounds) for what in jobs}
    speed = walls if cuda else cpus  # what other work on the machine disturbs least
    second = "second" if cuda else "CPU-second"
    rows = speed_rows(f"{batch}x3x{height}x{width}", walls, cpus, speed, counts, rate, shares)
    notes = [
        (
            f"{backbone} at {height}x{width}, {precision}, on {device}; {images} photographs of"
            f" Toytown, {steps} steps of {batch} after as many to warm up, interleaved, the best of"
            f" {repeats} rounds. Ratios and share are of images per {second}."
        ),
        (
            f"The usual loop: a DataLoader whose {workers} worker processes decode 128x64 JPEGs,"
            " resize and augment them one by one, channels first, loss.item() at each step; same"
            " optimiser, batches, augmentation and precision. CPU-seconds include the workers'."
        ),
    ]
    return rows, [*notes, *speed_notes(speed, counts, rate, second)]


if __name__ == "__main__":
    main(training)
