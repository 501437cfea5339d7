"""DCC's scores of all pairs, in blocks and one by one.

    python ci/bench/dcc.py --out results/bench/dcc.json
"""

# first: it sets the number of threads
from common import cpu_seconds, interleaved, main, wall_seconds
import torch


@torch.no_grad()
def dcc_size(name, model, shape, block, blocked, loop, device, memory, repeats, measure):
    """Pairs per second of the loop, the blocked and the folded form on random maps of `shape`;
    (rows, largest difference).
    """
    from torch.utils.flop_counter import FlopCounterMode

    from reid_repro.learning.pairs import score_pairs

    model = model.to(device).eval()
    maps = torch.randn(2 * block, *shape).relu()
    near, far = maps[:block], maps[block:]
    prepared = {}

    def tile(a, b):     # as dcc_distances
        if prepared.get("of") is not b[0]:
            prepared.update(of=b[0], block=model.prepare(*b))
        return -model.score(model.compare_all(model.prepare(*a), prepared["block"]))

    def folded():
        prepared.clear()
        return score_pairs(tile, (near,), (far,), -(-memory // block**2), memory, str(device.type))

    i, j = torch.arange(blocked).repeat_interleave(blocked), torch.arange(blocked).repeat(blocked)
    one, two = near[:blocked].to(device), far[:blocked].to(device)
    def in_blocks():
        return -model.score(model.compare(one[i], two[j]))
    def single():
        return torch.cat(
            [-model.score(model.compare(one[:1], two[n : n + 1])) for n in range(loop)]
        )
    found = folded()
    agree = (
        (found[:blocked, :blocked] - in_blocks().view(blocked, blocked).cpu()).abs().max().item()
    )
    # the same scores
    assert agree < 1e-3 and (found[0, :loop] - single().cpu()).abs().max() < 1e-3, agree
    numbers = {"pair by pair": loop, "blocked": blocked**2, "folded": block**2}
    seconds = interleaved(
        {"pair by pair": single, "blocked": in_blocks, "folded": folded}, repeats, measure
    )
    rates, counts = {form: numbers[form] / seconds[form] for form in numbers}, {}
    for form, number, call in (("blocked", blocked**2, in_blocks), ("folded", block**2, folded)):
        with FlopCounterMode(display=False) as counter:
            call()
        counts[form] = counter.get_total_flops() / number       # of the folded form with its tables
    counts["pair by pair"] = counts["blocked"]
    pairs = 3368 * 15913
    return [
        {
            "what": f"{name}, {form}", "pairs": numbers[form], "pairs/s": round(rate, 1),
            "x loop": round(rate / rates["pair by pair"], 2),
            "x blocked": round(rate / rates["blocked"], 2),
            "MFLOP/pair": round(counts[form] / 1e6, 2),
            "GFLOP/s": round(rate * counts[form] / 1e9, 1),
            "hours for Market-1501": round(pairs / rate / 3600, 2),
        }
        for form, rate in rates.items()
    ], agree


def dcc(*, block=256, full_block=32, loop=8, repeats=2, memory_mb=2048, device="cpu", seed=0):
    """Scoring all pairs with DCC: pair by pair, in blocks, and folded, at the size of the smoke
    profile and at full size.

    `block`, `full_block`: queries and gallery images of a folded tile; `device`: cpu or cuda."""
    from reid_repro.dcc import DCC
    from reid_repro.learning.recipe import pick_device

    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    device = pick_device(device)
    memory = memory_mb * 2**20
    measure, side = (cpu_seconds, 1024) if device.type == "cpu" else (wall_seconds, 8192)
    x = torch.randn(side, side, device=device)
    # of a float32 matrix product
    rate = 2 * side**3 / interleaved({"product": lambda: x @ x}, repeats, measure)["product"]
    with torch.device("meta"):
        full = DCC(backbone="resnet50")
    full = full.to_empty(device="cpu")  # random numbers of the right size; no backbone is run here
    for p in full.parameters():
        torch.nn.init.normal_(p, std=0.02)
    small, small_agree = dcc_size(
        "smoke", DCC(backbone="tiny", hidden=64), (64, 8, 4), block, 32, 4 * loop, device, memory,
        repeats, measure,
    )
    large, large_agree = dcc_size(
        "full size", full, (1024, 14, 14), full_block, min(8, full_block), loop, device, memory,
        repeats, measure,
    )
    def verdict(good):
        return "within" if good else "BEYOND"
    last, hours = large[2], large[2]["hours for Market-1501"]
    return small + large, [
        (
            "smoke: 64x8x4 maps, 64 units; full size: 1024x14x14 maps, 400 units; 16 steps, a 2x2"
            " window, random weights; maps are given."
        ),
        (
            f"Scores of the three forms equal: largest difference {small_agree:.0e} and"
            f" {large_agree:.0e}, asserted below 1e-3."
        ),
        (
            f"Folded: {small[2]['x loop']:.1f}x the loop at the smoke size,"
            f" {verdict(small[2]['x loop'] >= 20)} the aim of 20x; {last['x blocked']:.2f}x the"
            f" blocked form at full size, {verdict(last['x blocked'] >= 2)} the aim of 2x."
        ),
        (
            f"A float32 matrix product runs at {rate / 1e9:.0f} GFLOP/s here: full size reaches"
            f" {last['GFLOP/s'] * 1e9 / rate:.0%} of it folded,"
            f" {large[1]['GFLOP/s'] * 1e9 / rate:.0%} blocked. MFLOP of the folded form include the"
            f" tables of a tile of {full_block} x {full_block}."
        ),
        f"3368 x 15913 pairs at the folded rate: {hours} hours"
        + ("" if device.type == "cpu" else f", {verdict(hours <= 0.25)} the aim of 15 minutes")
        + "; an extrapolation.",
    ]


if __name__ == "__main__":
    main(dcc)
