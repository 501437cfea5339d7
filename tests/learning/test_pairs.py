"""Scoring every pair: descriptions against one batch, scores against the loop for tiles of every
size, memory counted, hostile input.
"""

import math
import re
from itertools import product

import pytest
import torch
from torch import nn

from reid_repro.datasets import Split
from reid_repro.learning.pairs import (
    describe_images, pair_block, score_listed, score_pairs, shortlist_distances,
)
from reid_repro.learning.augmentation import normalise


class Network(nn.Module):
    "A convolution and a batch norm, which tells training from evaluation mode."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4))
        self.layers[1].running_mean.uniform_(-1, 1)
        self.batches = []

    def describe(self, pixels):
        self.batches.append((pixels, self.training, torch.is_grad_enabled()))
        maps = self.layers(pixels)
        return (
            maps, maps.mean((2, 3)).double(), pixels.amax((1, 2, 3)) > 2, torch.arange(len(pixels)),
        )


def pictures(number, seed=0):
    return torch.randint(
        0, 256, (number, 3, 8, 6), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 11, 1000])
def test_describing_in_batches_is_describing_at_once(batch_size):
    model, images = Network().train(), pictures(10)
    maps, means, bright, place = describe_images(model, model.describe, images, batch_size, "cpu")
    assert not model.training and [len(pixels) for pixels, *_ in model.batches] == [
        len(part) for part in images.split(batch_size)
    ]
    assert not any(
        training or grad for _, training, grad in model.batches
    ), "in evaluation mode, without gradients"
    pixels = torch.cat([pixels for pixels, *_ in model.batches])
    torch.testing.assert_close(pixels, normalise(images))
    assert all(
        pixels.is_contiguous(memory_format=torch.channels_last) for pixels, *_ in model.batches
    )
    with torch.no_grad():
        expected = model.layers(normalise(images))
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(means, expected.mean((2, 3)))
    assert [t.dtype for t in (maps, means, bright, place)] == [
        torch.float32, torch.float32, torch.bool, torch.int64,
    ]
    assert torch.equal(bright, pixels.amax((1, 2, 3)) > 2) and place.tolist() == [
        n % batch_size for n in range(10)
    ]
    assert not any(t.requires_grad for t in (maps, means, bright, place))


@pytest.mark.parametrize("describe,words", [
    (lambda pixels: (pixels[:1],), "1 rows as tensor 0 for 4 images"),
    (lambda pixels: (pixels, pixels[:3]), "3 rows as tensor 1 for 4 images"),
    (lambda pixels: (torch.cat([pixels, pixels]),), "8 rows as tensor 0 for 4 images"),
])
def test_a_row_for_each_image(describe, words):
    with pytest.raises(ValueError, match=words):
        describe_images(Network(), describe, pictures(4), device="cpu")


def test_a_bare_tensor_is_named():
    with pytest.raises(ValueError, match="tuple"):
        describe_images(
            Network(), lambda pixels: pixels.flatten(1)[:, :4], pictures(4), device="cpu"
        )


def test_an_empty_batch_is_named():
    with pytest.raises(ValueError, match="batch_size"):
        describe_images(
            Network(), lambda pixels: (pixels,), pictures(4), batch_size=0, device="cpu"
        )


@pytest.mark.parametrize("images", [pictures(4).float(), pictures(4)[:, :1], pictures(4)[0]])
def test_only_photographs_are_described(images):
    model = Network()
    with pytest.raises(ValueError, match="images must be uint8 of shape"):
        describe_images(model, model.describe, images, device="cpu")


def lopsided(query, gallery):
    """A score without a matrix product, so that it is the same number in every tile: Σ max(a, 2b),
    and the images' own numbers.
    """
    (a, one), (b, two) = query, gallery
    return torch.maximum(a[:, None], 2 * b[None]).sum(2) + 3 * one[:, None] - two[None]


def lopsided_loop(a, one, b, two):
    score = lambda i, j: sum(max(x, 2 * y) for x, y in zip(a[i], b[j])) + 3 * one[i] - two[j]
    return torch.tensor([[score(i, j) for j in range(len(b))] for i in range(len(a))])


@pytest.mark.parametrize("q,g", [(1, 1), (1, 9), (9, 1), (5, 7), (12, 12), (13, 4)])
def test_tiles_of_every_size_are_the_loop(q, g):
    a, one, b, two = numbers(q, 4), torch.arange(q), numbers(g, 4, seed=1), torch.arange(g)
    loop, seen = lopsided_loop(a, one, b, two), None
    for side in range(1, max(q, g) + 2):
        for memory in (100 * side**2, 100 * (side + 1) ** 2 - 1):
            scores = score_pairs(lopsided, (a, one), (b, two), 100, memory, "cpu")
            assert (
                scores.shape == (q, g)
                and scores.dtype == torch.float32
                and scores.device.type == "cpu"
            )
            assert seen is None or torch.equal(scores, seen), "to the bit"
            seen = scores
    torch.testing.assert_close(seen, loop)


def test_products_hardly_depend_on_tiles():
    a, b = numbers(30, 64), numbers(40, 64, seed=1)
    dot = lambda query, gallery: query[0] @ gallery[0].T
    whole = (a.double() @ b.double().T).float()
    for memory in (8, 77, 2000, 10**9):
        torch.testing.assert_close(
            score_pairs(dot, (a,), (b,), 8, memory, "cpu"), whole, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    "pair_bytes,memory",
    list(product((1, 3, 100, 12_288), (1, 99, 100, 101, 399, 400, 10_000, 99_999, 2**20))),
)
def test_no_tile_is_larger_than_the_memory(pair_bytes, memory):
    tiles = []

    def score(query, gallery):
        tiles.append((len(query[0]), len(gallery[0])))
        return torch.zeros(tiles[-1])

    if memory < pair_bytes:
        with pytest.raises(
            ValueError,
            match=f"memory is {memory} bytes, but one pair takes {pair_bytes}; give at least that",
        ):
            score_pairs(score, (numbers(23, 2),), (numbers(31, 2),), pair_bytes, memory, "cpu")
        return
    score_pairs(score, (numbers(23, 2),), (numbers(31, 2),), pair_bytes, memory, "cpu")
    assert sum(b * c for b, c in tiles) == 23 * 31
    largest = max(b * c for b, c in tiles)
    assert largest * pair_bytes <= memory
    side = math.isqrt(memory // pair_bytes)
    assert len(tiles) == math.ceil(23 / side) * math.ceil(31 / side), "nor smaller than need be"


def test_the_usual_memory_is_half_a_gibibyte():
    tiles = []
    score = lambda query, gallery: torch.zeros(
        tiles.append(len(query[0])) or (len(query[0]), len(gallery[0]))
    )
    score_pairs(score, (numbers(60, 1),), (numbers(5, 1),), 2**29 // 50**2, device="cpu")
    assert tiles == [50, 10]


def test_a_block_of_the_gallery_stays_while_the_queries_pass():
    order = []

    def score(query, gallery):
        order.append((int(query[0][0]), int(gallery[0][0])))
        return torch.zeros(len(query[0]), len(gallery[0]))

    score_pairs(score, (torch.arange(5),), (torch.arange(6),), 1, 4, "cpu")
    assert order == [(i, j) for j in (0, 2, 4) for i in (0, 2, 4)]


def test_halves_arrive_as_float32_and_whole_numbers_as_they_are():
    kinds = []

    def score(query, gallery):
        kinds.append([t.dtype for t in (*query, *gallery)])
        assert not torch.is_grad_enabled()
        return (query[0] @ gallery[0].T).to(torch.bfloat16)

    a, b = numbers(3, 4).half().requires_grad_(), numbers(2, 4, seed=1).double()
    scores = score_pairs(
        score, (a, torch.arange(3)), (b, torch.tensor([True, False])), 8, device="cpu"
    )
    assert kinds == [[torch.float32, torch.int64, torch.float32, torch.bool]]
    assert scores.dtype == torch.float32 and not scores.requires_grad
    torch.testing.assert_close(scores, a.float() @ b.float().T, atol=0.05, rtol=0.02)
    assert (
        a.dtype == torch.float16 and b.dtype == torch.float64
    ), "the caller's tensors are left alone"


@pytest.mark.parametrize(
    "query,gallery,words",
    [
        ((), (3,), r"query: give at least one tensor.*got \[\]"),
        ((3,), (), r"gallery: give at least one tensor.*got \[\]"),
        ((3, 4), (3,), r"query: .*same number of images, got \[3, 4\]"),
        ((3,), (2, 3), r"gallery: .*got \[2, 3\]"), ((0,), (3,), r"query: .*got \[0\]"),
        ((3,), (0, 0), r"gallery: .*got \[0, 0\]"),
    ],
)
def test_uneven_and_empty_sides(query, gallery, words):
    with pytest.raises(ValueError, match=words):
        score_pairs(
            lambda q, g: torch.zeros(3, 3),
            *((numbers(n, 2) for n in side) for side in (query, gallery)), 8, device="cpu",
        )


@pytest.mark.parametrize(
    "pair_bytes,memory,named",
    [
        (0, 100, "pair_bytes"), (-1, 100, "pair_bytes"), (math.nan, 100, "pair_bytes"),
        ("8", 100, "pair_bytes"), (8, 0, "memory"), (8, -5, "memory"), (8, "1M", "memory"),
        (8, math.inf, "memory"), (8, None, "memory"),
    ],
)
def test_bytes_are_positive(pair_bytes, memory, named):
    with pytest.raises(ValueError, match=f"^{named} must be a whole number from 1, got"):
        score_pairs(lopsided, (numbers(3, 2),), (numbers(3, 2),), pair_bytes, memory, "cpu")


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 2, 1), (6,), ()])
def test_a_score_of_the_wrong_shape(shape):
    with pytest.raises(
        ValueError, match=re.escape(f"score returned {shape} for 3 queries and 2 gallery images")
    ):
        score_pairs(
            lambda q, g: torch.zeros(shape), (numbers(3, 2),), (numbers(2, 2),), 8, device="cpu"
        )


@pytest.mark.parametrize("memory", [8, 8 * 4, 8 * 9, 10**6])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_names_its_pair(value, memory):
    a, b = numbers(7, 1), numbers(9, 1, seed=1)
    a[5], b[6] = 100, 100
    score = lambda query, gallery: torch.where(
        (query[0] == 100) & (gallery[0].T == 100), value, query[0] + gallery[0].T
    )
    with pytest.raises(ValueError, match=f"score of query 5 and gallery image 6 is {value}"):
        score_pairs(score, (a,), (b,), 8, memory, "cpu")


def test_devices_are_named():
    for call in (lambda: score_pairs(lopsided, (numbers(1, 1),), (numbers(1, 1),), 8, device="tpu"),
                 lambda: describe_images(Network(), lambda p: (p,), pictures(1), device="tpu")):
        with pytest.raises(ValueError, match="device 'tpu' is unknown"):
            call()


def test_progress_counts_pairs(capsys):
    side = (numbers(6, 1),)
    score = lambda query, gallery: query[0] + gallery[0].T
    score_pairs(score, side, side, 8, 8 * 4, "cpu")
    assert capsys.readouterr().err == "", "silent unless it is given a title"


# ---------------------------------------------------------------- listed pairs, and a shortlist


def test_listed_pairs_are_scored_as_they_stand():
    a, b = numbers(7, 3), numbers(5, 3)
    i, j = torch.randint(7, (23,)), torch.randint(5, (23,))
    seen = []

    def both(x, y):
        seen.append(len(x[0]))
        return torch.stack([(x[0] * y[0]).sum(1), x[1].float()], 1)

    found = score_listed(both, (a, torch.arange(7)), (b,), i, j, batch_size=10, device="cpu")
    torch.testing.assert_close(found, torch.stack([(a[i] * b[j]).sum(1), i.float()], 1))
    assert seen == [10, 10, 3]


@pytest.mark.parametrize("size", [1.0, 1e8])
@pytest.mark.parametrize("shortlist", [1, 4, 40])
def test_a_shortlist_keeps_the_cheap_order_behind_it(shortlist, size):
    near, full = numbers(6, 40), size * numbers(6, 40)
    dist = shortlist_distances(near, shortlist, lambda i, j: full[i, j])
    assert dist.dtype == torch.float32
    for row, cheap, truth in zip(dist, near, full):
        order = cheap.argsort()
        listed, rest = order[:shortlist], order[shortlist:]
        assert torch.equal(row[listed], truth[listed])
        assert row.argsort().tolist() == [*listed[truth[listed].argsort()].tolist(), *rest.tolist()]
        assert len(row.unique()) == 40, "no ties"


@pytest.mark.parametrize("shortlist", [0, -1, 6, 2.0, None, True])
def test_a_shortlist_of_another_size_is_refused(shortlist):
    with pytest.raises(ValueError, match=r"shortlist is .* whole number from 1 to 5"):
        shortlist_distances(numbers(3, 5), shortlist, lambda i, j: torch.zeros(len(i)))


def test_a_listed_score_that_is_no_number_names_its_pair():
    near = torch.tensor([[0.0, 2, 1], [5, 4, 3]])
    with pytest.raises(ValueError, match="query 1 and gallery image 1 is nan"):
        shortlist_distances(near, 2, lambda i, j: torch.where((i == 1) & (j == 1), torch.nan, 1.0))


def test_a_block_asks_for_people_under_another_camera():
    "A person seen by the own camera alone does not ask; right images come first."

    def split(name, pids, camids):
        return Split(name, [f"{i}.jpg" for i in range(len(pids))], pids, camids)

    query = split("query", [1, 2, 3], [1, 1, 1])
    gallery = split("gallery", [1, 1, 1, 2, 2, -1, 0, 3], [1, 2, 1, 1, 3, 2, 2, 1])
    images = [torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1) for n in (3, 8)]
    block = pair_block(query, images[0], gallery, images[1], each=2)
    assert sorted(block.query.flatten().tolist()) == [0, 1]
    first = block.gallery.flatten().tolist()[::2]  # of each person's two
    assert sorted(first) == [1, 4]
    assert set(block.gallery_pids) == {1, 2}
    with pytest.raises(ValueError, match="another camera"):
        alone = split("query", [3], [1])
        pair_block(alone, images[0][:1], gallery, images[1])


@pytest.mark.parametrize("device", ["auto", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)])
def test_devices_are_objects_or_their_names(device):
    model, images = Network(), pictures(5)
    expected = describe_images(model, model.describe, images, 4, "cpu")
    if device == "auto" and torch.cuda.is_available():
        pytest.skip("another device computes other bits")
    for one, other in zip(describe_images(model, model.describe, images, 4, device), expected):
        assert one.equal(other)
    pair = (numbers(3, 4), torch.arange(3)), (numbers(5, 4), torch.arange(5))
    assert score_pairs(lopsided, *pair, 100, 2**20, device).equal(
        score_pairs(lopsided, *pair, 100, 2**20, "cpu")
    )
