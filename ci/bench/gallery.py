"""Embedding as many image files as MSMT17's gallery holds: speed, and memory that does not grow.

    python ci/bench/gallery.py --out results/bench/gallery.json
"""

# first: it sets the number of threads
from common import cpu_seconds, main, resident_mib
import tempfile
from pathlib import Path

import numpy as np
import torch

GALLERY = 82161  # images in MSMT17's gallery
LIMIT = 2048  # MiB


def made(number, folder):
    "JPEG files of `number` distinct random pictures, 128×64."
    from PIL import Image

    rng = np.random.default_rng(0)
    paths = []
    for i in range(number):
        coarse = rng.integers(0, 256, (16, 8, 3), dtype=np.uint8)
        paths.append(Path(folder) / f"{i:04d}.jpg")
        Image.fromarray(coarse).resize((64, 128)).save(paths[-1], quality=90)
    return paths


def gallery(
    *, images=8192, distinct=300, backbone="tiny", dim=2048, height=128, width=64, batch=128
):
    """Resident memory of `embed` over `ImageFiles` at a quarter of `images` and at all of them.

    What grows is the result alone, so memory for the whole gallery follows; `--images 82161`
    embeds it in full. The features are brought to `dim` numbers, as ResNet-50's are.
    """
    from reid_repro.datasets.core import ImageFiles
    from reid_repro.ide import IDE
    from reid_repro.learning.training import embed

    model = torch.nn.Sequential(IDE(2, backbone=backbone), torch.nn.LazyLinear(dim))
    rows, peaks = [], {}
    with tempfile.TemporaryDirectory() as folder:
        paths = made(distinct, folder)
        few = ImageFiles(paths[:batch], height, width)
        embed(model, few, batch, "cpu")  # libraries take their working memory
        for number in (images // 4, images):
            files = ImageFiles([paths[i % distinct] for i in range(number)], height, width)
            seconds, ((features, peak, beyond)) = cpu_seconds(
                lambda files=files: resident_mib(lambda: embed(model, files, batch, "cpu")), 1
            )
            result = features.numel() * 4 / 2**20
            peaks[number] = peak, result
            rows.append(
                {
                    "images": number, "images/CPU-s": round(number / seconds, 1),
                    "peak MiB": round(peak), "beyond before, MiB": round(beyond, 1),
                    "features MiB": round(result, 1),
                }
            )
    (few, (low, _)), (many, (high, _)) = peaks.items()
    growth = max(0.0, high - low) / (many - few)
    expected = high + growth * max(0, GALLERY - many)
    verdict = "kept" if expected <= LIMIT else "NOT kept"
    return rows, [
        f"{growth * 1024:.2f} KiB of resident memory for each further image:"
        f" {expected:.0f} MiB for MSMT17's gallery of {GALLERY:,}; the limit of {LIMIT} MiB is"
        f" {verdict}. {distinct} distinct files, repeated by path; {backbone} at {height}x{width},"
        f" {dim} features."
    ]


if __name__ == "__main__":
    main(gallery)
