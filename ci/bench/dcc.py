"""DCC's scores of all pairs: four forms, the stages of a folded pair, and Market-1501's hours.

    python ci/bench/dcc.py --out results/bench/dcc.json
"""

# first: it sets the number of threads
from common import cpu_seconds, interleaved, main, wall_seconds
import torch

QUERIES, GALLERY = 3368, 15913  # of Market-1501
BYTES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def hours(pair, image, images):
    """Hours for all pairs of Market-1501 from the seconds of a pair and of an image's table, when
    the tables of `images` gallery images are held: a query's is made again for each such tile.
    """
    tables = GALLERY + QUERIES * -(-GALLERY // images)
    return (QUERIES * GALLERY * pair + tables * image) / 3600


def products(call):
    "Floating point operations of the matrix products of a call."
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@torch.no_grad()
def forms(name, model, shape, side, blocked, loop, device, memory, repeats, measure):
    """Rows for the loop, the blocked form, the folded form as training computes it, and the lean
    one in four bytes and in two on random maps of `shape`; and the largest differences, by form.
    """
    from reid_repro.dcc import _tile_sides, compare_lean, prepared

    maps = torch.randn(2 * side, *shape, device=device).relu()
    near, far = maps[:side], maps[side:]
    i, j = torch.arange(blocked).repeat_interleave(blocked), torch.arange(blocked).repeat(blocked)
    some = min(32, side)  # the folded form holds three matrices a pair
    tables = {"folded": [model.prepare(part[:some]) for part in (near, far)]}
    for kind, told in BYTES.items():
        tables[f"lean, {told}"] = [prepared(model, part, kind) for part in (near, far)]
    one = near[:1], far
    jobs = {
        "pair by pair": lambda: [model.compare(one[0], one[1][n : n + 1]) for n in range(loop)],
        "blocked": lambda: model.compare(near[i], far[j]),
        "folded": lambda: model.compare_all(*tables["folded"]),
        **{
            f"lean, {told}": lambda told=told: compare_lean(model, *tables[f"lean, {told}"])
            for told in BYTES.values()
        },
    }
    numbers = dict(zip(jobs, (loop, blocked**2, some**2, side**2, side**2)))
    makers = {
        "folded": lambda: model.prepare(near[:8]),
        **{
            f"lean, {told}": lambda kind=kind: prepared(model, near[:8], kind)
            for kind, told in BYTES.items()
        },
    }
    spent = interleaved(jobs, repeats, measure)
    made = interleaved(makers, repeats, measure)
    scores = {
        form: model.score(job() if form[0] != "p" else torch.cat(job()))
        for form, job in jobs.items()
    }
    wanted = scores["blocked"].view(blocked, blocked)
    apart = {
        form: (scores[form][:blocked, :blocked] - wanted).abs().max().item() for form in makers
    }
    apart["pair by pair"] = (scores["pair by pair"][:blocked] - wanted[0, :loop]).abs().max().item()
    assert max(value for form, value in apart.items() if "bfloat16" not in form) < 1e-5, apart
    rows = []
    for form, seconds in spent.items():
        pair, flops = seconds / numbers[form], products(jobs[form]) / numbers[form]
        image, images = 0.0, 1
        if form in makers:
            image = made[form] / 8
            kind = torch.bfloat16 if "bfloat16" in form else torch.float32
            images = some if form == "folded" else _tile_sides(model, near, memory, "pair", kind)[0]
        rows.append(
            {
                "what": f"{name}, {form}", "pairs": numbers[form], "pairs/s": round(1 / pair, 1),
                "MFLOP/pair": round(flops / 1e6, 2), "GFLOP/s": round(flops / pair / 1e9, 1),
                "ms/table": round(1e3 * image, 2) if image else None,
                "tables held": images if image else None,
                "share %": None, "hours for Market-1501": round(hours(pair, image, images), 2),
            }
        )
    spread = wanted.std().item()
    return rows, apart, spread


@torch.no_grad()
def stages(model, shape, side, repeats, measure, kind):
    """Rows: what a pair's time goes to, each stage for itself on tensors of a block's size."""
    from reid_repro.dcc import _exponentials, _over_gallery, _over_queries, prepared

    net, size = model.fusion, shape[1:]
    a, b = (prepared(model, torch.randn(side, *shape).relu(), kind) for _ in range(2))
    ours, theirs = (X[:8].to(kind).contiguous().flatten(0, 1) for X in (a.asked.mT, b.asked.mT))
    found = _exponentials(model, a, b)
    h = 0.1 * torch.randn(side, side, net.width)
    w = net._cell_weights(net.window_params(h), size)
    v = (w * found.per_row).to(kind) @ found.rows
    recurrent = net.cell.weight_hh.to(kind)
    gates = torch.nn.functional.linear(h.to(kind), recurrent).float()

    def one_of_each(even, odd):
        return lambda: (even(), odd())

    jobs = {  # a call, and how often a pair needs it
        "affinities": (lambda: ours @ theirs.mT, 64, 1),
        "affinities and softmax": (lambda: _exponentials(model, a, b), side**2, 1),
        "windows": (lambda: net._cell_weights(net.window_params(h), size), side**2, net.steps),
        "through attention": (
            one_of_each(
                lambda: (w * found.per_row).to(kind) @ found.rows,
                lambda: (w * found.per_column).to(kind) @ found.columns.mT,
            ), side**2, net.steps / 2,
        ),
        "input of the LSTM": (
            one_of_each(
                lambda: _over_gallery(v, b.tables[0]), lambda: _over_queries(v, a.tables[0])
            ), side**2, net.steps / 2,
        ),
        "the LSTM's own": (
            lambda: torch.nn.functional.linear(h.to(kind), recurrent), side**2, net.steps,
        ),
        "gates": (lambda: net.next_state(gates.float() + net.cell.bias_ih, h), side**2, net.steps),
    }
    spent = interleaved({name: call for name, (call, _, _) in jobs.items()}, repeats, measure)
    each = {n: (spent[n] / pairs * often) for n, (_, pairs, often) in jobs.items()}
    flops = {n: products(call) / pairs * often for n, (call, pairs, often) in jobs.items()}
    each["softmax"] = each.pop("affinities and softmax") - each["affinities"]
    flops["softmax"] = 0.0
    total = sum(each.values())
    return [
        {
            "what": f"stage, {BYTES[kind]}: {name}", "pairs": None,
            "pairs/s": round(1 / seconds, 1), "MFLOP/pair": round(flops[name] / 1e6, 2),
            "GFLOP/s": round(flops[name] / seconds / 1e9, 1), "ms/table": None,
            "tables held": None, "share %": round(100 * seconds / total, 1),
            "hours for Market-1501": round(QUERIES * GALLERY * seconds / 3600, 2),
        }
        for name, seconds in each.items()
    ]


def matrix_rates(device, repeats, measure):
    "Floating point operations a second of a square matrix product, by type."
    side = 1024 if device.type == "cpu" else 8192
    x = {kind: torch.randn(side, side, device=device).to(kind) for kind in BYTES}
    spent = interleaved({kind: lambda m=m: m @ m for kind, m in x.items()}, 3 * repeats, measure)
    return {kind: 2 * side**3 / seconds for kind, seconds in spent.items()}


def dcc(*, block=64, full_block=48, loop=8, repeats=2, memory_mb=4096, device="cpu", seed=0):
    """Random maps in place of a backbone's, at the smoke and at full size.

    `block`, `full_block`: queries and gallery images that meet; `memory_mb`: of a tile, which says
    how many tables are held; `device`: cpu or cuda."""
    from reid_repro.dcc import DCC, _can_halve
    from reid_repro.learning.recipe import pick_device

    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    device, memory = pick_device(device), memory_mb * 2**20
    measure = cpu_seconds if device.type == "cpu" else wall_seconds
    rates = matrix_rates(device, repeats, measure)
    with torch.device("meta"):
        full = DCC(backbone="resnet50")
    full = full.to_empty(device="cpu")  # random numbers of the right size; no backbone is run here
    for p in full.parameters():
        torch.nn.init.normal_(p, std=0.02)
    sizes = {
        "smoke": (DCC(backbone="tiny", hidden=64), (64, 8, 4), block, 32, 4 * loop),
        "full size": (full, (1024, 14, 14), full_block, min(8, full_block), loop),
    }
    found = {
        name: forms(name, model.to(device).eval(), *rest, device, memory, repeats, measure)
        for name, (model, *rest) in sizes.items()
    }
    rows = [row for part, _, _ in found.values() for row in part]
    if device.type == "cpu":
        for kind in BYTES:
            rows += stages(full, (1024, 14, 14), full_block, repeats, measure, kind)
    by_name = {row["what"]: row for row in rows}
    _, apart, spread = found["full size"]
    lean = by_name["full size, lean, float32"]
    halved, folded = by_name["full size, lean, bfloat16"], by_name["full size, folded"]
    market = "hours for Market-1501"
    least = QUERIES * GALLERY * lean["MFLOP/pair"] * 1e6 / 3600
    return rows, [
        (
            "smoke: 64x8x4 maps, 64 units; full size: 1024x14x14 maps, 400 units; 16 steps, a 2x2"
            " window, random weights; maps and tables are given. pair by pair and blocked: the"
            " equations; folded: compare_all; lean: compare_lean, what dcc_distances uses."
        ),
        (
            f"Scores equal those of the blocked form: at full size to {apart['folded']:.0e} folded"
            f" and {apart['lean, float32']:.0e} lean, asserted below 1e-5; in bfloat16 to"
            f" {apart['lean, bfloat16']:.0e}, where the scores of these random weights have a"
            f" standard deviation of {spread:.0e}."
        ),
        (
            f"Matrix products run at {rates[torch.float32] / 1e9:.0f} GFLOP/s in float32 and"
            f" {rates[torch.bfloat16] / 1e9:.0f} in bfloat16"
            f" ({'in hardware' if _can_halve(device) else 'emulated'}). At full size lean reaches"
            f" {lean['GFLOP/s'] * 1e9 / rates[torch.float32]:.0%} of the one and"
            f" {halved['GFLOP/s'] * 1e9 / rates[torch.bfloat16]:.0%} of the other."
        ),
        (
            f"Hours: extrapolated, with the tables that fit into {memory_mb} MiB; folded held"
            f" {folded['tables held']}. Market-1501 takes {folded[market]} hours folded,"
            f" {lean[market]} lean in float32, {halved[market]} in bfloat16, against an aim of 20."
            f" At the full rate of float32, with no table and no softmax, it would be"
            f" {least / rates[torch.float32]:.1f}."
        ),
        (
            "Stages: each for itself, share of their sum. What is no product is read and written:"
            " the window's weights go through an MxM matrix a pair in each of 16 steps."
        ),
    ]


if __name__ == "__main__":
    main(dcc)
