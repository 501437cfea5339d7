"""IANet's relations on photographs: how near to one another two forms come.

    python ci/bench/ianet_relations.py --out results/bench/ianet-relations.json
"""

# first: it sets the number of threads
from common import main
import numpy as np
import torch


def ianet_relations(*, data="", weights="", images=24, seed=0):
    """What IANet's relations are on ImageNet features of photographs (CUHK03-NP detected at
    256x128), scale by scale, before training.
    """
    from reid_repro.learning.backbones import build_backbone
    from reid_repro.datasets import load_images, open_benchmark
    from reid_repro.ianet import CIA, SIA
    from reid_repro.learning.augmentation import normalise

    if not data or not weights:
        raise SystemExit(
            "give --data, the folder of CUHK03-NP, and --weights, a safetensors file of ImageNet's"
            " ResNet-50"
        )
    split = open_benchmark("cuhk03-np-detected", data).query
    chosen = np.random.default_rng(seed).choice(len(split), images, replace=False)
    pixels = normalise(load_images(split.subset(np.sort(chosen)), 256, 128))
    backbone = build_backbone("resnet50", 1, weights).eval()
    readings = {
        "S, products as printed": SIA(scale="printed"), "S, over √C·K²": SIA(),
        "S, cosines": SIA(scale="cosine"), "S, second softmax": SIA(fusion="literal"),
        "S, authors' code": SIA(fusion="released"), "R, products as printed": CIA("printed"),
        "R, over √M": CIA(), "R, cosines": CIA("cosine"),
    }
    rows = []
    with torch.no_grad():
        for stage in (2, 3):
            maps = torch.cat([backbone(part, stage) for part in pixels.split(8)])
            for what, reading in readings.items():
                relation = torch.cat([reading.relation_map(part) for part in maps.split(4)])
                givers = torch.special.entr(relation).sum(-1).exp()
                rows.append(
                    {
                        "stage": stage, "relation": what,
                        "givers in a row": round(givers.median().item(), 1),
                        "of": relation.shape[-1],
                        "kept for itself": f"{relation.diagonal(dim1=1, dim2=2).mean():.1%}",
                        "weight of the most popular": f"{relation.mean(1).amax(-1).mean():.1%}",
                    }
                )
    notes = [
        (
            "Givers: exp(entropy) of a row, its median over rows and photographs; 1 when one gives"
            " all, `of` when all give alike."
        ),
        (
            f"{images} photographs of CUHK03-NP detected (query), 64x128 enlarged to 256x128;"
            " ResNet-50 with ImageNet weights, untrained."
        ),
    ]
    return rows, notes


if __name__ == "__main__":
    main(ianet_relations)
