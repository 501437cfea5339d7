"""The floors: colour histograms, pixels and chance, by hand and within a bounded memory."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reid_repro.ide import colour_histograms, random_features, raw_pixels

IMAGES = torch.randint(
    0, 256, (150, 3, 24, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


class Largest(TorchDispatchMode):
    "Inside, `bytes` is the size of the largest tensor that an operation gave."

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.bytes = max(self.bytes, out.numel() * out.element_size())
        return out


@pytest.mark.parametrize("describe", [colour_histograms, raw_pixels, random_features])
def test_a_large_gallery_is_described_in_chunks(describe):
    gallery = torch.zeros(1000, 3, 128, 64, dtype=torch.uint8)
    with Largest() as seen:
        assert len(describe(gallery)) == 1000
    assert seen.bytes < gallery.numel(), "less than one byte for each number of the photographs"
    assert describe(gallery[:0]).shape[0] == 0


def test_chunks_change_nothing():
    for describe in (colour_histograms, raw_pixels):
        one_by_one = torch.cat([describe(image[None]) for image in IMAGES])
        assert torch.equal(describe(IMAGES), one_by_one)
    seed = int(IMAGES.long().sum())
    drawn = torch.randn(150, 64, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(random_features(IMAGES), drawn)


def test_histograms_by_counting():
    found = colour_histograms(IMAGES[:2], strips=3, bins=2).view(2, 3, 8)
    for n in range(2):
        for strip in range(3):
            pixels = IMAGES[n, :, 8 * strip : 8 * strip + 8].flatten(1).T.tolist()
            colours = [4 * (r > 127) + 2 * (g > 127) + (b > 127) for r, g, b in pixels]
            share = torch.tensor([colours.count(c) / len(colours) for c in range(8)])
            torch.testing.assert_close(found[n, strip], share.sqrt())
