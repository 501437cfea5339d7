"Sampling: what must hold for any data set, any seed and any device."

from itertools import pairwise

import numpy as np
import pytest
import torch

from reid_repro.learning.recipe import Recipe
from reid_repro.learning.augmentation import (
    IMAGENET_MEAN, Augment, normalise, random_erase, random_flip, random_pad_crop, random_shift,
)
from reid_repro.learning.batches import (
    IdentityBatches, PairBatches, RepeatedBatches, ShuffledBatches, passes_for,
)


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n=16, height=24, width=12, seed=0):
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=chance(seed))


def people(seed, identities, most=12, least=1):
    rng = np.random.default_rng(seed)
    ids = rng.choice(10_000, identities, replace=False)  # published ids have gaps
    return rng.permutation(np.repeat(ids, rng.integers(least, most + 1, identities)))


SAMPLERS = [
    lambda pids, seed: ShuffledBatches(len(pids), 16, seed),
    lambda pids, seed: IdentityBatches(pids, 4, 4, seed),
    lambda pids, seed: PairBatches(pids, 16, 0.5, seed),
]


@pytest.mark.parametrize("make", SAMPLERS)
def test_an_epoch_depends_on_seed_and_number_alone(make):
    pids = people(0, 30)

    def flat(seed, e):
        return torch.cat(
            [
                torch.stack(b).T.reshape(-1) if isinstance(b, tuple) else b
                for b in make(pids, seed).epoch(e)
            ]
        )

    batches = make(pids, 5)
    list(batches.epoch(0)), next(batches.epoch(1))  # what was drawn before must not matter
    again = torch.cat(
        [torch.stack(b).T.reshape(-1) if isinstance(b, tuple) else b for b in batches.epoch(7)]
    )
    assert torch.equal(again, flat(5, 7))
    assert not torch.equal(flat(5, 7), flat(5, 8))
    assert not torch.equal(flat(5, 7), flat(6, 7))
    assert len(list(batches.epoch(0))) == len(batches) == len(pids) // 16
    assert again.dtype == torch.int64


@pytest.mark.parametrize("n,size", [(1, 1), (7, 7), (100, 32), (65, 8)])
def test_shuffled_batches_show_everything_at_most_once(n, size):
    shown = torch.cat(list(ShuffledBatches(n, size, 3).epoch(2))).tolist()
    assert (
        len(shown) == n // size * size
        and len(set(shown)) == len(shown)
        and set(shown) <= set(range(n))
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("P,K", [(4, 4), (8, 2), (3, 5), (20, 1)])
def test_identity_batches(seed, P, K):
    pids = people(seed, 20 + seed)
    batches = IdentityBatches(pids, P, K, seed)
    have = dict(zip(*np.unique(pids, return_counts=True)))
    shown = []
    for batch in batches.epoch(seed):
        who = pids[batch].reshape(P, K)
        assert (who == who[:, :1]).all(), "the K photographs of a person stand together"
        assert len(set(who[:, 0])) == P, "P distinct people"
        for person, own in zip(who[:, 0], batch.reshape(P, K).tolist()):
            assert len(set(own)) == min(
                K, have[person]
            ), "distinct photographs as far as there are any"
        shown.append(who[:, 0])
    turns = np.array([(np.concatenate(shown) == person).sum() for person in have])
    assert turns.sum() == len(batches) * P
    if turns.sum() >= len(have):
        assert turns.min() >= 1, "everybody in every epoch"
    else:
        assert turns.max() <= 1


def test_identity_batches_show_fresh_photographs_before_repeats():
    pids = np.repeat(np.arange(10), 8)  # 8 = two turns of K = 4, and the turns come out even
    shown = torch.cat(list(IdentityBatches(pids, 5, 4, 1).epoch(0)))
    assert sorted(shown.tolist()) == list(range(80))


def test_every_photograph_of_a_person_comes_first_equally_often():
    batches = IdentityBatches([1, 1, 2, 1, 1, 2], 2, 1, seed=0)
    pids = np.array([1, 1, 2, 1, 1, 2])
    first = []
    for epoch in range(400):
        batch = next(batches.epoch(epoch))
        first += batch[pids[batch] == 1].tolist()
    # 400 draws of four: 100 ± 8.7 each
    assert all(65 < first.count(image) < 135 for image in (0, 1, 3, 4))


def test_identity_batches_mix_people_anew():
    pids = np.repeat(np.arange(40), 16)
    companions = [set(pids[b]) for b in IdentityBatches(pids, 4, 4, 0).epoch(0)]
    assert sum(len(a & b) for a, b in pairwise(companions)) < 0.25 * 4 * len(companions)


@pytest.mark.parametrize("counts", [[500, 1, 1, 1], [500, 400, 1, 1, 1], [1] * 9, [2, 2, 2, 2]])
def test_identity_batches_survive_lopsided_data(counts):
    pids = np.repeat(np.arange(len(counts)), counts)
    batches = list(IdentityBatches(pids, 4, 4, 0).epoch(0))
    assert len(batches) == max(1, len(pids) // 16)
    assert all(len(set(pids[b])) == 4 for b in batches)


def test_spare_turns_go_to_fresh_photographs():
    pids = np.repeat(np.arange(10), [8] * 5 + [2] * 5)  # 12 turns: everybody once, and two over
    for e in range(10):
        shown = torch.cat(list(IdentityBatches(pids, 2, 4, 0).epoch(e)))
        turns = np.bincount(pids[shown], minlength=10) // 4
        assert turns.sum() == 12 and (turns[5:] == 1).all()


def test_who_needs_every_batch_is_in_every_batch():
    # 8 batches of 2 people, 10 turns' worth of photographs of person 0
    pids = np.repeat(np.arange(4), [40, 8, 8, 8])
    for e in range(10):
        assert all(0 in pids[b] for b in IdentityBatches(pids, 2, 4, 0).epoch(e))


def test_with_few_places_everybody_comes_in_some_epoch():
    batches, pids = IdentityBatches(np.arange(9), 4, 4, 0), np.arange(9)
    assert set(pids[torch.cat([b for e in range(30) for b in batches.epoch(e)])]) == set(range(9))


@pytest.mark.parametrize("positive,expected", [(0.0, 0), (0.25, 4), (0.5, 8), (1.0, 16)])
def test_pairs_tell_the_truth(positive, expected):
    pids = people(1, 25)
    partners = np.zeros(len(pids))
    for e in range(5):
        for i, j, same in PairBatches(pids, 16, positive, 2).epoch(e):
            assert same.dtype == torch.bool and same.sum() == expected
            assert (i != j).all() and np.array_equal(pids[i] == pids[j], same.numpy())
            assert same.tolist() == sorted(same.tolist(), reverse=True), "positives first"
            partners += np.bincount(j, minlength=len(pids))
    assert (partners > 0).sum() > 0.5 * len(pids)


def test_every_fitting_partner_is_equally_likely():
    pids = np.array([5, 3, 3, 5, 8, 3, 5, 3])
    drawn = {True: np.zeros((8, 8)), False: np.zeros((8, 8))}
    for e in range(3000):
        for i, j, same in PairBatches(pids, 8, 0.5, 0).epoch(e):
            for a, b, s in zip(i, j, same):
                drawn[bool(s)][a, b] += 1
    for same, count in drawn.items():
        fits = (pids[:, None] == pids) == same
        np.fill_diagonal(fits, False)
        for i in range(8):
            if not fits[i].any():
                assert count[i].sum() == 0  # person 8 has no partner
                continue
            assert (count[i][~fits[i]] == 0).all()
            share = count[i][fits[i]] / count[i].sum()
            assert abs(share - 1 / fits[i].sum()).max() < 0.06


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: ShuffledBatches(8, 32), "n = 8.*batch_size = 32"),
        (lambda: ShuffledBatches(8, 0), "batch_size"),
        (lambda: ShuffledBatches(8, 2, seed=-1), "seed"),
        (lambda: IdentityBatches([1, 1, 2], 3, 2), "identities = 3.*only 2"),
        (lambda: IdentityBatches([1, 1, 2], 0, 2), "identities"),
        (lambda: IdentityBatches([1, 1, 2], 2, 0), "instances"),
        (lambda: IdentityBatches([[1, 2]], 1, 1), "pids"),
        (lambda: IdentityBatches([], 1, 1), "pids"),
        (lambda: IdentityBatches([0.5, 1.0], 1, 1), "pids"),
        (lambda: IdentityBatches([1, 2, -1], 2, 1), r"pids\[2\] = -1: -1 means junk"),
        (lambda: IdentityBatches(np.int8([-2, 1, 1]), 2, 1), r"pids\[0\] = -2"),
        (lambda: PairBatches([1, 1, -1, -1], 2), r"pids\[2\] = -1.*leave out"),
        (lambda: PairBatches([1, 2, 3], 2), "pids holds no identity with two"),
        (lambda: PairBatches([1, 1, 1], 2), "pids holds a single identity"),
        (lambda: PairBatches([1, 1, 2], 2, positive=1.5), "positive"),
        (lambda: PairBatches([1, 1, 2], 0), "batch_size"),
        (lambda: Augment(flip=1.5), "flip"),
        (lambda: Augment(erase=-0.1), "erase"),
        (lambda: Augment(pad=-1), "pad"),
        (lambda: Augment(shift=0.5), "shift"),
    ],
)
def test_errors_name_the_argument(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "abc", True])
def test_numbers_that_are_none_name_the_argument(value):
    for call, word in (
        (lambda: ShuffledBatches(value, 2), "n"), (lambda: ShuffledBatches(8, value), "batch_size"),
        (lambda: ShuffledBatches(8, 2, value), "seed"),
        (lambda: list(ShuffledBatches(8, 2).epoch(value)), "epoch"),
        (lambda: IdentityBatches([1, 1, 2], value, 2), "identities"),
        (lambda: IdentityBatches([1, 1, 2], 2, value), "instances"),
        (lambda: PairBatches([1, 1, 2], value), "batch_size"), (lambda: Augment(pad=value), "pad"),
        (lambda: Augment(shift=value), "shift"),
    ):
        with pytest.raises(ValueError, match=f"^{word} must be a whole number"):
            call()
    for call, word in (
        (lambda: PairBatches([1, 1, 2], 2, value), "positive"),
        (lambda: Augment(flip=value), "flip"), (lambda: Augment(erase=value), "erase"),
    ):
        if value is not True:
            with pytest.raises(ValueError, match=f"^{word} must be a"):
                call()


def test_pairs_of_one_kind_need_only_that_kind():
    assert not next(PairBatches([1, 2, 3], 2, positive=0).epoch(0))[2].any()
    assert next(PairBatches([1, 1, 1], 2, positive=1).epoch(0))[2].all()


STEPS = [
    lambda x, g: random_flip(x, 0.5, g),
    lambda x, g: random_pad_crop(x, 4, g),
    lambda x, g: random_shift(x, 4, g),
    lambda x, g: random_erase(x, 0.5, g),
]


@pytest.mark.parametrize("step", STEPS)
def test_a_step_keeps_shape_and_input_and_follows_its_generator(step):
    x = pictures()
    before = x.clone()
    out = step(x, chance(1))
    assert out.shape == x.shape and out.dtype == torch.uint8 and torch.equal(x, before)
    assert torch.equal(out, step(x, chance(1))) and not torch.equal(out, step(x, chance(2)))
    state = torch.get_rng_state()
    step(x, chance(1))
    assert torch.equal(state, torch.get_rng_state()), "the global generator is left alone"


@pytest.mark.parametrize("step", STEPS + [lambda x, g: normalise(x)])
@pytest.mark.parametrize("wrong", [pictures().float(), pictures()[0], pictures()[:, :1]])
def test_a_step_wants_a_batch_of_bytes(step, wrong):
    with pytest.raises(ValueError, match=r"images must be uint8 of shape \(B, 3, H, W\)"):
        step(wrong, chance())


def test_flip_certain_never_and_rate():
    x = pictures(5000, 2, 4)
    assert torch.equal(random_flip(x, 1.0, chance()), x.flip(3)) and torch.equal(
        random_flip(x, 0.0, chance()), x
    )
    rate = (random_flip(x, 0.3, chance()) != x).flatten(1).any(1).float().mean()
    assert abs(rate - 0.3) < 4 * (0.3 * 0.7 / 5000) ** 0.5


def offset_of(out, original, fill):
    "Every (down, right) that explains `out`, by trying them all."
    H, W = original.shape[1:]
    found = []
    for down in range(-H, H + 1):
        for right in range(-W, W + 1):
            loop = torch.empty_like(original)
            for y in range(H):
                for x in range(W):
                    r, c = y + down, x + right
                    inside = 0 <= r < H and 0 <= c < W
                    loop[:, y, x] = original[:, r, c] if inside else fill(original, r, c)
            if torch.equal(loop, out):
                found.append((down, right))
    return found


@pytest.mark.parametrize(
    "step,fill",
    [
        (random_pad_crop, lambda x, r, c: torch.zeros(3, dtype=torch.uint8)),
        (
            random_shift,
            lambda x, r, c: x[:, min(max(r, 0), x.shape[1] - 1), min(max(c, 0), x.shape[2] - 1)],
        ),
    ],
)
def test_every_photograph_moves_by_its_own_offset_within_reach(step, fill):
    x = pictures(12, 6, 5) // 2 + 1  # no black pixel of its own
    offsets = [offset_of(out, original, fill) for out, original in zip(step(x, 2, chance(3)), x)]
    assert all(len(o) == 1 for o in offsets)
    offsets = [o[0] for o in offsets]
    assert all(max(abs(d), abs(r)) <= 2 for d, r in offsets) and len(set(offsets)) > 4


@pytest.mark.parametrize("step", [random_pad_crop, random_shift])
def test_offsets_reach_both_ends_evenly(step):
    x = torch.arange(1, 101, dtype=torch.uint8).reshape(1, 1, 10, 10).expand(9000, 3, 10, 10)
    middle = step(x, 1, chance())[:, 0, 5, 5].long() - 1
    count = torch.bincount((middle // 10 - 4) * 3 + middle % 10 - 4, minlength=9)
    assert len(count) == 9 and (count - 1000).abs().max() < 150


def test_a_shift_of_two_numbers_is_vertical_then_horizontal():
    x = torch.arange(1, 226, dtype=torch.uint8).reshape(1, 1, 15, 15).expand(400, 3, 15, 15)
    middle = random_shift(x, (3, 1), chance())[:, 0, 7, 7].long() - 1
    assert set((middle // 15 - 7).tolist()) == set(range(-3, 4))
    assert set((middle % 15 - 7).tolist()) == {-1, 0, 1}
    assert torch.equal(random_shift(x, [2, 2], chance()), random_shift(x, 2, chance()))
    expected = normalise(random_shift(x, (3, 1), chance()))
    assert torch.equal(Augment(0, 0, [3, 1])(x, chance()), expected)
    assert torch.equal(Augment(0, 0, (0, 0))(x, chance()), normalise(x))
    assert Recipe(shift=[10, 5]).shift == (10, 5) and Recipe(shift=3).shift == 3
    for wrong in ((1, 2, 3), (1,), (1, -2), "ab", (1, 0.5)):
        with pytest.raises(ValueError, match=r"^shift"):
            Recipe(shift=wrong)


def test_an_epoch_of_several_passes():
    single = IdentityBatches([1, 1, 2, 2, 3, 3], 2, 2, seed=4)
    repeated = RepeatedBatches(single, 3)
    assert len(repeated) == 3 * len(single) and repeated.instances == 2
    for e in (0, 2):
        expected = [b.tolist() for number in range(3) for b in single.epoch(3 * e + number)]
        assert [b.tolist() for b in repeated.epoch(e)] == expected
    assert [passes_for(632, 128, steps) for steps in (0, 3, 6, 100)] == [1, 1, 2, 25]
    assert passes_for(5, 128, 10) == 10
    with pytest.raises(ValueError, match="passes"):
        RepeatedBatches(single, 0)


def test_erase_paints_one_rectangle_in_the_mean_colour():
    x = torch.zeros(500, 3, 32, 16, dtype=torch.uint8)
    out = random_erase(x, 0.5, chance(), area=(0.1, 0.3), aspect=(0.5, 2))
    painted = (out > 0).all(1)
    assert 0.4 < painted.flatten(1).any(1).float().mean() < 0.6
    for mask, picture in zip(painted, out):
        if mask.any():
            y, x_ = mask.nonzero().T
            h, w = y.max() - y.min() + 1, x_.max() - x_.min() + 1
            assert mask.sum() == h * w, "a full rectangle"
            assert 0.07 < h * w / (32 * 16) < 0.34 and 0.35 < h / w < 2.8
            assert picture[:, mask].unique(dim=1).flatten().tolist() == [124, 116, 104]
    colour = torch.tensor([124, 116, 104], dtype=torch.uint8)[None, :, None, None]
    assert normalise(colour).abs().max() < 0.01


def test_erase_aspect_is_height_over_width():
    x = torch.zeros(20, 3, 40, 40, dtype=torch.uint8)
    out = random_erase(x, 1.0, chance(), area=(0.1, 0.1), aspect=(2.9, 3.1))
    painted = (out > 0).all(1)  # (n, H, W)
    tall, wide = painted.any(2).sum(1), painted.any(1).sum(1)
    # 160 pixels: 22 × 7
    assert ((tall >= 21) & (tall <= 23) & (wide == 7)).all()


def test_erase_paints_the_area_asked_for():
    out = random_erase(
        torch.zeros(50, 3, 32, 32, dtype=torch.uint8), 1.0, chance(), area=(0.25, 0.25),
        aspect=(1, 1),
    )
    assert ((out > 0).all(1).flatten(1).sum(1) == 16 * 16).all()


def test_erase_rectangles_that_cannot_fit_leave_the_photograph_whole():
    x = pictures(8, 16, 8)
    assert torch.equal(random_erase(x, 1.0, chance(), area=(3.0, 4.0)), x)


def test_normalise_by_hand():
    x = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    hand = [
        (v - m) / s for v, m, s in zip((0, 0.2, 1), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    ]
    assert torch.allclose(normalise(x).flatten(), torch.tensor(hand), atol=1e-6)
    assert normalise(x, mean=(0, 0, 0), std=(1, 1, 1)).flatten().tolist() == pytest.approx(
        [0, 0.2, 1]
    )
    assert IMAGENET_MEAN == (0.485, 0.456, 0.406)


def test_augment_applies_the_steps_in_order():
    x, g = pictures(), chance(9)
    expected = normalise(
        random_erase(random_shift(random_pad_crop(random_flip(x, 0.5, g), 3, g), 2, g), 0.5, g)
    )
    assert torch.equal(Augment(0.5, 3, 2, 0.5)(x, chance(9)), expected)
    assert torch.equal(Augment(0, 0, 0, 0)(x, chance(9)), normalise(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_augment_on_a_gpu_with_either_generator():
    x, augment = pictures(), Augment(0.5, 3, 2, 0.5)
    from_cpu = augment(x.cuda(), chance(9))
    assert from_cpu.is_cuda
    torch.testing.assert_close(from_cpu.cpu(), augment(x, chance(9)))
    on_device = augment(x.cuda(), torch.Generator("cuda").manual_seed(9))
    assert on_device.is_cuda and on_device.shape == x.shape
