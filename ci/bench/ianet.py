"""IANet's training steps, and its relations in three forms.

    python ci/bench/ianet.py --out results/bench/ianet.json
"""

# first: it sets the number of threads
from common import interleaved, main, training_step
import torch


def unfolded_relation(x, contexts):
    """appearance_relation in the direct form: patches padded with zeros and written out, their dot
    products, one softmax of the sum.
    """
    logits = 0
    for K in contexts:
        before, after = (K - 1) // 2, K // 2
        # (B, C·K², M)
        patches = torch.nn.functional.unfold(
            torch.nn.functional.pad(x, (before, after, before, after)), K
        )
        logits = logits + patches.transpose(1, 2) @ patches / (x.shape[1] ** 0.5 * K * K)
    return logits.softmax(-1)


def relation_jobs(batch, channels, height, width):
    """Forward and backward of S and of S Fᵀ in four forms, on features as after a ReLU; the first
    is the reference.
    """
    from reid_repro.ianet import appearance_relation

    x = torch.relu(torch.randn(batch, channels, height, width)).requires_grad_()
    weight = torch.randn(batch, height * width, channels)

    def job(relation, *args, **options):
        return lambda: torch.autograd.grad(
            relation(x, *args, **options) @ x.flatten(2).transpose(1, 2), x, weight
        )[0]

    jobs = {
        "one context": job(appearance_relation, (1,)),
        "contexts 1, 2, 3: diagonal box": job(appearance_relation, (1, 2, 3)),
        "contexts 1, 2, 3: literal fusion": job(appearance_relation, (1, 2, 3), fusion="literal"),
        "contexts 1, 2, 3: unfold": job(unfolded_relation, (1, 2, 3)),
    }
    # same job, entry by entry; S is peaked, so each entry is compared in proportion to itself
    with torch.no_grad():
        torch.testing.assert_close(
            appearance_relation(x, (1, 2, 3)), unfolded_relation(x, (1, 2, 3)), rtol=1e-4, atol=0
        )
    torch.testing.assert_close(
        jobs["contexts 1, 2, 3: diagonal box"](), jobs["contexts 1, 2, 3: unfold"](), rtol=1e-4,
        atol=1e-4,
    )
    return jobs


def ianet(*, batch=8, repeats=3, relation_repeats=5, classes=751, seed=0):
    """The spatial relation of IANet by diagonal box and by unfold, and the training step of
    ResNet-50 with and without IA blocks.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from reid_repro.learning.backbones import cost
    from reid_repro.ianet import IANet

    def counted(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    def compare(size, jobs, repeats, counts):
        seconds, first = interleaved(jobs, repeats), next(iter(jobs))
        def times(numbers, what):
            return round(numbers[what] / numbers[first], 3)
        return [
            {
                "what": what, "size": size, "CPU-s": round(seconds[what], 3),
                "x reference": times(seconds, what), "counted x": times(counts, what),
            }
            for what in jobs
        ]

    torch.manual_seed(seed)
    # a peaked softmax underflows to denormal numbers, on which a CPU is slow
    torch.set_flush_denormal(True)
    rows = []
    for stage, shape in {2: (8, 512, 32, 16), 3: (16, 1024, 16, 8)}.items():
        jobs = relation_jobs(*shape)
        counts = {what: counted(call) for what, call in jobs.items()}
        rows += compare(
            f"stage {stage}: {'x'.join(map(str, shape))}", jobs, relation_repeats, counts
        )
    _, box, literal, unfold = ([row["x reference"] for row in rows[i::4]] for i in range(4))

    options = {
        "step, baseline": {"stages": ()},
        "step, one SIA at stage 3": {"stages": (3,), "order": "sia"},
        "step, IANet": {"stages": (2, 3)},
    }
    models = {what: IANet(classes, **chosen) for what, chosen in options.items()}
    counts = {what: cost(model, 256, 128)[1] for what, model in models.items()}
    steps = {what: training_step(model, batch, classes) for what, model in models.items()}
    flushed = compare(f"{batch}x3x256x128", steps, repeats, counts)
    torch.set_flush_denormal(False)
    kept = compare(f"{batch}x3x256x128, denormals kept", steps, repeats, counts)

    def within(value, limit):
        return (
            f"{value:.3f}x, {'within' if value <= limit else 'BEYOND'} the limit of {limit}x"
        )
    notes = [
        (
            "Each group is interleaved after a warm-up, the least of its repeats counts; x"
            " reference is to the first row of the group."
        ),
        (
            "The relation is S and S Fᵀ, forward and backward; its counted x are the matrix"
            " products of both, that of a step is its forward's."
        ),
        (
            f"Diagonal box, contexts 1, 2, 3: stage 2 {within(box[0], 2.0)}; stage 3"
            f" {within(box[1], 2.0)}."
        ),
        (
            f"Unfold: same S and gradient, asserted to 1e-4, at {unfold[0] / box[0]:.1f}x and"
            f" {unfold[1] / box[1]:.1f}x the time of the box."
        ),
        (
            f"Literal fusion takes {literal[0] / box[0]:.2f}x the time of the box with renormalised"
            " fusion at stage 2."
        ),
        (
            f"One SIA, denormals flushed to zero: {within(flushed[1]['x reference'], 1.05)}; kept:"
            f" {within(kept[1]['x reference'], 1.05)}."
        ),
        (
            "Denormals are flushed except where the size says kept, torch's default; their number"
            " depends on the weights, here random."
        ),
    ]
    return rows + flushed + kept, notes


if __name__ == "__main__":
    main(ianet)
