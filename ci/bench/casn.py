"""CASN's training steps, attention maps and ranking.

    python ci/bench/casn.py --out results/bench/casn.json
"""

# first: it sets the number of threads
from common import interleaved, main, resident_mib
from functools import partial

import torch


def literal_casn(*args, **options):
    """CASN whose maps are made as §3.1.2 and §3.2.2 print them: by gradients of scores with respect
    to the last convolution's map.
    """
    from reid_repro.casn import CASN, attention_map

    class Literal(CASN):
        def identification_map(self, maps, f, scores, people):
            own = scores.gather(2, people[:, None, None].expand(-1, scores.shape[1], 1)).sum()
            gradient = torch.autograd.grad(own, maps, create_graph=True)[0]
            return attention_map(maps, gradient.mean(dim=(2, 3)))

        def pair_maps(self, maps, f, i, j):
            difference = (f[i] - f[j]).flatten(1).detach().requires_grad_()
            indicator = (
                (torch.autograd.grad(self.head(difference)[:, 1].sum(), difference)[0] > 0)
                .to(f.dtype)
                .view_as(f[i])
            )
            weights = []
            for rows in (i, j):         # s_1 = <indicator, f_1>, then s_2
                gradient = torch.autograd.grad(
                    (indicator * f[rows]).sum(), maps, create_graph=True
                )[0]
                weights.append(gradient.mean(dim=(2, 3))[rows])
            return attention_map(maps[i], weights[0]), attention_map(maps[j], weights[1])

    return Literal(*args, **options)


def casn_steps(base, height, width, pairs, classes, repeats):
    """CPU-seconds of a training step on the same `pairs` pairs: plain, with one module, with both
    in closed and in literal form.
    """
    from reid_repro.casn import CASN, casn_objective

    half = torch.arange(pairs)
    labels = torch.cat([half, half.where(half < pairs // 2, half + pairs)])
    images = torch.randn(2 * pairs, 3, height, width)
    images = images.to(memory_format=torch.channels_last)
    batch = (half, half + pairs, half < pairs // 2)
    objective, stride, kinds = casn_objective(labels), 2 if base == "ide" else 1, {
        "plain": (CASN, False, False), "+ SA": (CASN, False, True), "+ IA": (CASN, True, False),
        "CASN, closed form": (CASN, True, True), "CASN, literal form": (literal_casn, True, True),
    }
    jobs, gradients = {}, {}
    for what, (make, ia, sa) in kinds.items():
        torch.manual_seed(0)
        model = make(
            classes, base, last_stride=stride, identification_attention=ia, siamese_attention=sa,
            dropout=0.0,
        )
        model = model.to(memory_format=torch.channels_last).train()
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

        def step(what=what, model=model, optimiser=optimiser):
            optimiser.zero_grad()
            sum(objective(model, batch, images.__getitem__).values()).backward()
            if what not in gradients:       # of the first step, from equal weights
                gradients[what] = torch.cat([p.grad.flatten() for p in model.parameters()])
            optimiser.step()

        jobs[f"{base.upper()} {what}"] = step
    seconds = interleaved(jobs, repeats)
    closed, literal = (gradients[what] for what in list(kinds)[3:])
    assert (
        closed - literal
    ).norm() <= 1e-3 * literal.norm(), "closed and literal form are not the same gradient"
    first = seconds[f"{base.upper()} plain"]
    size = f"{2 * pairs}x3x{height}x{width}"
    def row(what, s):
        return {
            "what": f"step, {what}", "size": size, "CPU-s": round(s, 3),
            "x reference": round(s / first, 3),
        }
    return [row(what, s) for what, s in seconds.items()]


def casn_maps(base, height, width, pairs, classes, repeats, calls=10):
    """CPU-seconds of a batch's attention maps, from map, feature and scores on; literal, then
    closed form, without and with backward.
    """
    from reid_repro.casn import CASN, consistency_loss

    channels, people, i = 2048, torch.randint(classes, (2 * pairs,)), torch.arange(pairs // 2)
    A = (
        torch.randn(2 * pairs, channels, height, width)
        .relu()
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
    )
    found, jobs = {}, {}
    for form, make in (("literal", literal_casn), ("closed", CASN)):
        torch.manual_seed(0)
        model = make(classes, base, dropout=0.0).train()
        f = model.pool(A)
        scores = model.classify(f)
        wanted = [A, *model.net.classifier.parameters()]

        def maps(model=model, f=f, scores=scores):
            return [
                model.identification_map(A, f, scores, people),
                *model.pair_maps(A, f, i, i + pairs),
            ]

        def back(maps=maps, wanted=wanted):
            own, first, second = maps()
            loss = own.square().mean() + consistency_loss(first, second)
            return torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)

        found[form] = [*maps(), *(g for g in back() if g is not None)]
        for what, call in (("maps", maps), ("maps and backward", back)):
            jobs[f"{base.upper()} {what}, {form} form"] = lambda call=call: [
                call() for _ in range(calls)
            ]
    for ours, theirs in zip(found["closed"], found["literal"], strict=True):
        assert (
            ours - theirs
        ).norm() <= 1e-3 * theirs.norm(), "closed and literal form are not the same"
    seconds, size = interleaved(jobs, repeats), f"{2 * pairs}x{channels}x{height}x{width}"
    rows = []
    for what in ("maps", "maps and backward"):
        literal, closed = (
            seconds[f"{base.upper()} {what}, {form} form"] / calls for form in ("literal", "closed")
        )
        rows += [
            {
                "what": f"{base.upper()} {what}, {form} form", "size": size, "CPU-s": round(s, 4),
                "x reference": round(s / literal, 3),
            }
            for form, s in (("literal", literal), ("closed", closed))
        ]
    return rows


def casn_ranking(base, height, width, block, loop, repeats, pairs=1400 * 5332):
    """Distances of attention profiles: block x block pairs in tiles, loop x loop of them one by
    one, and both scaled up to `pairs`.
    """
    from reid_repro.casn import (
        CASN, _attention_gaps, attention_map, pooled_weights, row_profile, siamese_indicator,
    )
    from reid_repro.learning.pairs import score_pairs

    channels, hidden, memory, name = 2048, 512, 2**29, base.upper()
    model = CASN(2, base=base, hidden=hidden).eval()
    A = torch.randn(2 * block, channels, height, width).relu()
    with torch.no_grad():
        f = model.pool(A)
        u = f.flatten(1) @ model.head.first.weight.T
    sides = [(A[part], u[part]) for part in (slice(block), slice(block, None))]
    pair_bytes = 4 * (model.head.first.in_features + 2 * hidden + 2 * channels)  # as casn_distances

    def tiles():
        gaps = partial(_attention_gaps, model.head)
        return score_pairs(gaps, *sides, pair_bytes, memory, "cpu")

    @torch.no_grad()
    def one_by_one():
        gaps = torch.empty(loop, loop)
        for i in range(loop):
            for j in range(loop):
                rows = slice(i, i + 1), slice(block + j, block + j + 1)
                weights = pooled_weights(
                    siamese_indicator(model.head, *(f[r] for r in rows)), height * width
                )
                first, second = (row_profile(attention_map(A[r], weights), 0.3) for r in rows)
                gaps[i, j] = (first - second).norm()
        return gaps

    found, _, beyond = resident_mib(tiles)
    agree = (
        torch.isclose(found[:loop, :loop], one_by_one(), rtol=0, atol=1e-3 * found.max().item())
        .float()
        .mean()
        .item()
    )
    # same job; a hidden unit within rounding of its threshold may fall on either side
    assert agree > 0.95, agree
    seconds = interleaved({"tiles": tiles, "loop": one_by_one}, repeats)
    each = {"tiles": seconds["tiles"] / block**2, "loop": seconds["loop"] / loop**2}
    def row(what, size, s, kind):
        return {
            "what": what, "size": size, "CPU-s": round(s, 3),
            "x reference": round(each[kind] / each["tiles"], 2),
        }
    big = f"{pairs} pairs, scaled up"
    return (
        [
            row(f"{name} pairs in tiles", f"{block}x{block} pairs", seconds["tiles"], "tiles"),
            row(f"{name} pair by pair", f"{loop}x{loop} pairs", seconds["loop"], "loop"),
            row(f"{name} pairs in tiles", big, pairs * each["tiles"], "tiles"),
            row(f"{name} pair by pair", big, pairs * each["loop"], "loop"),
        ],
        (
            f"{name}, maps {channels}x{height}x{width}, {hidden} hidden units:"
            f" {1e6 * each['tiles']:.0f} CPU-seconds per million pairs in tiles,"
            f" {1e6 * each['loop']:.0f} one by one; tiles of at most {memory >> 20} MiB made the"
            f" process grow by {beyond:.0f} MiB. {agree:.1%} of the distances within 0.1 % of the"
            " largest, tiles against single pairs; indicators are steps."
        ),
    )


def casn(
    *, pairs=8, repeats=2, classes=751, map_pairs=16, map_repeats=3, block=200, loop=20, seed=0
):
    """CASN's training step and attention maps in closed and in literal form, and the ranking of all
    pairs in tiles and one by one.
    """
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)      # as training does
    sizes = {"ide": (288, 144, 9, 5), "pcb": (384, 128, 24, 8)}
    steps, maps, ranks, ranking_notes = [], [], [], []
    # first, while the process is small: what it grows by is then the tiles'
    for base, (*_, h, w) in sizes.items():
        rows, note = casn_ranking(base, h, w, block, loop, repeats)
        ranks, ranking_notes = ranks + rows, [*ranking_notes, note]
    for base, (height, width, h, w) in sizes.items():
        steps += casn_steps(base, height, width, pairs, classes, repeats)
        maps += casn_maps(base, h, w, map_pairs, classes, map_repeats)
    share = [row["x reference"] for row in steps]
    def against(one, other):
        return f"{share[one] / share[other] - 1:+.1%}"
    def of_step(part, step):
        return (f"{maps[part]['CPU-s'] / map_pairs * pairs / steps[step]['CPU-s']:.1%}")
    notes = [
        (
            "Each group is interleaved after a warm-up, the least of its repeats counts; x"
            " reference is to the first row of the group."
        ),
        (
            f"Steps: ResNet-50, SGD, {pairs} pairs, half of them of one person; IDE with last"
            " stride 2, PCB with 6 strips and last stride 1. Gradients of closed and literal form"
            " equal to 1e-3 of their length in every run, asserted."
        ),
        (
            f"A step of CASN(IDE) takes {share[3]:.2f}x that of IDE, CASN(PCB) {share[8]:.2f}x that"
            " of PCB: covered images pass a second time."
        ),
        (
            f"Closed against literal form, whole step: {against(3, 4)} (IDE) and {against(8, 9)}"
            " (PCB). Next to nothing, since even the literal form's maps and their backward are"
            f" {of_step(2, 4)} and {of_step(6, 9)} of a step; the maps alone take"
            f" {maps[1]['x reference']:.2f}x and {maps[5]['x reference']:.2f}x of the literal"
            " form's time."
        ),
        (
            "Maps: all identification maps and those of the pairs of one person, of a batch whose"
            " maps, features and scores are there already."
        ),
        *ranking_notes,
        (
            "Scaled up: the time per pair measured times their number, an extrapolation, not a"
            " measurement."
        ),
    ]
    return steps + maps + ranks, notes


if __name__ == "__main__":
    main(casn)
