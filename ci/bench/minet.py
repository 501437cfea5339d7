"""MI-Net's sweeps, pairs and training steps.

    python ci/bench/minet.py --out results/bench/minet.json
"""

# first: it sets the number of threads
from common import cpu_seconds, interleaved, main, resident_mib
import torch


def four_loops(x, recurrent):
    """FourWayIRNN.sweep cell by cell: direction (down, up, right, left), image, row, column;
    autograd can follow.
    """
    ways = []
    for matrix, (di, dj) in zip(recurrent, ((1, 0), (-1, 0), (0, 1), (0, -1))):
        images = []
        for image in x:
            (_, H, W), states = image.shape, {}
            for i in range(H) if di >= 0 else reversed(range(H)):
                for j in range(W) if dj >= 0 else reversed(range(W)):
                    state, before = image[:, i, j], states.get((i - di, j - dj))
                    states[i, j] = (state if before is None else matrix @ before + state).relu()
            images.append(
                torch.stack([torch.stack([states[i, j] for j in range(W)], 1) for i in range(H)], 1)
            )
        ways.append(torch.stack(images))
    return torch.cat(ways, 1)


def torch_rnns(x, recurrent):
    """A call that does the same by two bidirectional layers of torch, whose input matrices are the
    identity.
    """
    B, h, H, W = x.shape
    layers = [
        torch.nn.RNN(h, h, nonlinearity="relu", bias=False, bidirectional=True) for _ in range(2)
    ]
    with torch.no_grad():
        for number in range(4):
            layer, suffix = layers[number // 2], ("", "_reverse")[number % 2]
            getattr(layer, f"weight_ih_l0{suffix}").copy_(torch.eye(h))
            getattr(layer, f"weight_hh_l0{suffix}").copy_(recurrent[number])

    def call():
        across = (
            layers[1](x.permute(3, 0, 2, 1).reshape(W, B * H, h))[0]
            .view(W, B, H, 2 * h)
            .permute(1, 3, 2, 0)
        )
        along = (
            layers[0](x.permute(2, 0, 3, 1).reshape(H, B * W, h))[0]
            .view(H, B, W, 2 * h)
            .permute(1, 3, 0, 2)
        )
        return torch.cat([along, across], 1)

    return call


class GivenMaps(torch.nn.Module):
    """A stream that answers with the same random maps whatever the images are: the pairs' cost
    without the stream's.
    """

    def __init__(self, channels, side):
        super().__init__()
        self.channels = (channels,)
        self.maps = torch.nn.Parameter(torch.rand(1, channels, side, side), requires_grad=False)

    def forward(self, images):
        return self.maps * (1 + images.float().mean((1, 2, 3), keepdim=True))


def minet_head(channels, side, hidden):
    "MINet at full size on given maps."
    from reid_repro import minet

    stream, build = GivenMaps(channels, side), minet.build_stream
    minet.build_stream = lambda name, weights=None: stream
    try:
        return minet.MINet((8, 8), embedding=hidden, hidden=hidden, width=hidden, dropout=0.0)
    finally:
        minet.build_stream = build


def row(what, size, seconds, reference, hours=None):
    "A line of the table."
    return {
        "what": what, "size": size, "CPU-s": round(seconds, 4),
        "x reference": round(seconds / reference, 3), "hours for Market-1501": hours,
    }


def sweeps(batch, side, hidden, repeats):
    "The sweep in three forms, with and without gradient: rows, and how much faster ours is."
    from reid_repro.learning.pooling import FourWayIRNN

    layer, x = FourWayIRNN(hidden, hidden), torch.rand(batch, hidden, side, side) - 0.4
    with torch.no_grad():
        layer.recurrent.copy_(
            0.9 * layer.recurrent + 0.2 / hidden * torch.randn_like(layer.recurrent)
        )
        forms = {
            "four loops": lambda: four_loops(x, layer.recurrent),
            "one axis at a time": lambda: layer.sweep(x),
            "torch's RNN": torch_rnns(x, layer.recurrent),
        }
        reference = forms["four loops"]()
        for name, call in forms.items():
            torch.testing.assert_close(call(), reference, rtol=1e-4, atol=1e-4, msg=name)
        plain = interleaved(forms, repeats)
    leaf = x.clone().requires_grad_()

    def slope(sweep):
        return lambda: torch.autograd.grad(sweep().sum(), (leaf, layer.recurrent))

    slopes = {
        "four loops": slope(lambda: four_loops(leaf, layer.recurrent)),
        "one axis at a time": slope(lambda: layer.sweep(leaf)),
    }
    for one, other in zip(*(call() for call in slopes.values())):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    learning = interleaved(slopes, 1)
    size, rows, faster = f"{batch}x{hidden}x{side}x{side}", [], []
    for title, seconds in (("sweep", plain), ("sweep with gradient", learning)):
        first = seconds["four loops"]
        rows += [row(f"{title}, {name}", size, s, first) for name, s in seconds.items()]
        faster.append(first / seconds["one axis at a time"])
    return rows, faster


def ranking(model, images, repeats):
    """All pairs one by one, in blocks with every sweep kept, and as ranked: rows, G multiply-adds
    of a pair by form, shares of the rate of a matrix product, that rate, and Market's hours.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from reid_repro.learning.augmentation import normalise
    from reid_repro.minet import _merged, minet_distances

    square = torch.randn(1024, 1024)
    rate = 1024**3 / cpu_seconds(lambda: square @ square, 6)[0]  # multiply-adds a second
    query, gallery = (torch.randint(0, 256, (images, 3, 8, 8), dtype=torch.uint8) for _ in range(2))
    cosine = torch.nn.functional.cosine_similarity
    with torch.no_grad():
        query_maps, _ = model.eval().maps(normalise(query))
        _, gallery_maps = model.maps(normalise(gallery))

    @torch.no_grad()
    def one_by_one():
        out = torch.empty(images, images)
        for i in range(images):
            for j in range(images):
                fA, fB = model.represent(query_maps[i : i + 1], gallery_maps[j : j + 1])
                out[i, j] = 1 - cosine(fA, fB).item()
        return out

    @torch.no_grad()
    def sweeps_kept():
        a, b = model.gate.embed(query_maps, gallery_maps)
        products = model.gate.multiply(a[:, None], b)
        x = torch.nn.functional.conv2d(
            products.flatten(0, 1), *_merged(model.gate, model.pooling.first.inward)
        )
        joint = model.joint_norm(model.pooling.rest(x)).unflatten(0, (images, images))
        return 1 - cosine(*model.compare(query_maps[:, None], gallery_maps[None], joint), dim=2)

    def blocks():
        return minet_distances(model, query, gallery, memory=2**29, device="cpu")

    wanted = one_by_one()
    for call in (sweeps_kept, blocks):
        torch.testing.assert_close(call(), wanted, rtol=1e-4, atol=1e-5)
    jobs = {"one by one": one_by_one, "in blocks, sweeps kept": sweeps_kept, "in blocks": blocks}
    seconds, counts = interleaved(jobs, repeats), {}
    for name, call in jobs.items():
        with FlopCounterMode(display=False) as counter:
            call()
        counts[name] = counter.get_total_flops() // 2
    size, first = f"{images}x{images} pairs", seconds["one by one"]
    hours = {name: 3368 * 15913 * s / images**2 / 3600 for name, s in seconds.items()}
    rows = [
        row(f"pairs, {name}", size, s, first, round(hours[name], 1)) for name, s in seconds.items()
    ]
    each = {name: n / images**2 / 1e9 for name, n in counts.items()}
    shares = {name: counts[name] / seconds[name] / rate for name in jobs}
    return rows, each, shares, rate, hours


@torch.no_grad()
def stages(model, pairs, repeats):
    "Where the time of a pair goes: rows whose reference is their sum, and G multiply-adds of each."
    from torch.utils.flop_counter import FlopCounterMode

    from reid_repro.minet import _merged, _read_sweeps

    linear, pooling = torch.nn.functional.linear, model.pooling
    weight, bias = _merged(model.gate, pooling.first.inward)
    hidden, channels = weight.shape[:2]
    products = torch.rand(pairs, channels, *model.shape)
    x = torch.rand(*model.shape, pairs, hidden) - 0.4
    maps = [torch.rand(pairs, pooling.output.out_channels, *model.shape) for _ in range(3)]
    jobs = {
        "the product's convolution": lambda: linear(
            products.permute(2, 3, 0, 1), weight.flatten(1), bias
        ),
        "sweeps of layer 1, read": lambda: _read_sweeps(x, pooling.first, pooling.second.inward),
        "sweeps of layer 2, read": lambda: _read_sweeps(x, pooling.second, pooling.output),
        "differences and W_f": lambda: model.compare(*maps),
    }
    seconds, counts = interleaved(jobs, repeats), {}
    for name, call in jobs.items():
        with FlopCounterMode(display=False) as counter:
            call()
        counts[name] = counter.get_total_flops() / 2e9
    total = sum(seconds.values())
    rows = [row(f"stage, {name}", f"{pairs} pairs", s, total) for name, s in seconds.items()]
    return rows, {name: counts[name] / seconds[name] for name in jobs}


def steps(model, pairs, chunk):
    "A training step in chunks and at once: rows, and MiB by which the process grows."
    from reid_repro.minet import minet_objective

    labels = torch.arange(pairs).remainder(pairs // 2)
    photographs = torch.randn(pairs, 3, 8, 8)
    seconds, memory = {}, {}
    before = resident_mib(lambda: None)[1]
    for size in (chunk, 10**6):  # the smaller one first: freed memory stays with the process
        objective = minet_objective(labels, negatives=1, chunk=size)

        def step(objective=objective):
            model.zero_grad()
            objective(model, torch.arange(pairs), photographs.__getitem__)["deviance"].backward()

        seconds[size], peak, _ = resident_mib(lambda step=step: cpu_seconds(step, repeat=1)[0])
        memory[size] = peak - before
    names = {chunk: f"chunks of {chunk}", 10**6: "at once"}
    rows = [
        row(f"training step, {names[size]}", f"{pairs} pairs", spent, seconds[chunk])
        for size, spent in seconds.items()
    ]
    return rows, memory


def minet(*, batch=4, side=14, hidden=512, images=6, pairs=64, chunk=8, repeats=2, seed=0):
    """MI-Net at full size: the sweep in three forms, a ranking's pairs against the rate of matrix
    products, a training step in chunks.
    """
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)  # as training does
    sweep_rows, (faster, faster_learning) = sweeps(batch, side, hidden, repeats)
    model = minet_head(hidden, side, hidden)
    pair_rows, each, shares, rate, hours = ranking(model, images, repeats)
    stage_rows, speeds = stages(model, images**2, repeats)
    step_rows, memory = steps(model, pairs, chunk)
    notes = [
        (
            "Sweeps and pairs: interleaved after a warm-up, the least of the repeats counts; x"
            " reference is to the first row of each group."
        ),
        (
            f"One axis at a time is {faster:.1f}x as fast as four loops, {faster_learning:.0f}x"
            " with the gradient, against an aim of 10x. Without gradient the loops are 512x512"
            " matrix-vector products out of the cache; all forms are equal to 1e-4, asserted."
        ),
        (
            f"A pair takes {each['one by one']:.3f} G multiply-adds one by one,"
            f" {each['in blocks']:.3f} G in blocks, the images' own part included; blocks run at"
            f" {shares['in blocks']:.0%} of the rate of a 1024x1024 product, {rate / 1e9:.0f} G a"
            f" CPU-second, and at {shares['in blocks, sweeps kept']:.0%} with every sweep kept."
        ),
        (
            "Market-1501's 3,368 x 15,913 pairs, extrapolated:"
            f" {hours['one by one']:.0f} hours one by one, {hours['in blocks, sweeps kept']:.0f} in"
            f" blocks with every sweep kept, {hours['in blocks']:.0f} in blocks. At the full rate"
            f" of a product it would be {3368 * 15913 * each['in blocks'] * 1e9 / rate / 3600:.0f}."
        ),
        (
            "Stages, of their sum: G multiply-adds a CPU-second are "
            + ", ".join(f"{speed:.0f} ({name})" for name, speed in speeds.items())
            + "."
        ),
        (
            f"A step on {pairs} pairs makes the process grow by {memory[chunk]:.0f} MiB in chunks"
            f" of {chunk}, {memory[10**6]:.0f} MiB at once."
        ),
    ]
    return [*sweep_rows, *pair_rows, *stage_rows, *step_rows], notes


if __name__ == "__main__":
    main(minet)
