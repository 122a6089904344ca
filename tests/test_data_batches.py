"""Seeds, batches and augmentation: pure functions of a seed and a step."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnbench.data import (
    AUGMENTATIONS,
    Arrays,
    augmentation,
    epoch_permutation,
    eval_batches,
    generator,
    seed_of,
    step_indices,
)
from bnbench.data.augment import crop, cutout, flip
from bnbench.registry import BadInput

IMAGE = (3, 12, 10)


# Seeds.


def test_seeds_stay_what_they_are():
    # printf '[0, "order", 3]' | sha256sum begins with e6925c03d9ce3c23.
    assert seed_of(0, "order", 3) == 0xE6925C03D9CE3C23 >> 1


def test_seeds_do_not_depend_on_the_process():
    code = "from bnbench.data import seed_of; print(seed_of(7, 'noise', 0.5))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(answer.stdout) == seed_of(7, "noise", 0.5)


@settings(deadline=None)
@given(st.lists(st.one_of(st.integers(), st.text()), max_size=4, unique=True))
def test_each_list_of_parts_has_its_own_seed(parts):
    assert 0 <= seed_of(*parts) < 2**63
    assert seed_of(*parts) != seed_of(*parts, "more")
    if len(parts) > 1:
        assert seed_of(*parts) != seed_of(*reversed(parts))
    assert seed_of(1) != seed_of("1")


def test_generators_of_one_purpose_draw_the_same():
    assert torch.equal(torch.rand(5, generator=generator(1, "a")), torch.rand(5, generator=generator(1, "a")))
    assert not torch.equal(
        torch.rand(5, generator=generator(1, "a")), torch.rand(5, generator=generator(1, "b"))
    )


def test_global_random_numbers_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(3, generator=torch.Generator().manual_seed(3))
    step_indices(20, 4, 0, 9, 0)
    x = torch.zeros(4, *IMAGE)
    augmentation("crop-flip-cutout", IMAGE)(x, generator(0))
    assert torch.equal(torch.rand(3), expected)


# Batches.


@st.composite
def loops(draw):
    n = draw(st.integers(1, 60))
    return n, draw(st.integers(1, n)), draw(st.integers(0, 10**6))


@settings(deadline=None)
@given(loops(), st.integers(1, 4))
def test_an_epoch_visits_no_sample_twice(loop, epochs):
    n, batch_size, seed = loop
    per_epoch = n // batch_size
    steps = step_indices(n, batch_size, 0, epochs * per_epoch, seed)
    assert steps.shape == (epochs * per_epoch, batch_size)
    for epoch, block in enumerate(steps.split(per_epoch)):
        visited = block.flatten().tolist()
        assert len(set(visited)) == len(visited)
        assert set(visited) <= set(range(n))
        if n % batch_size == 0:
            assert visited == epoch_permutation(n, epoch, seed).tolist()


@settings(deadline=None)
@given(loops(), st.integers(0, 40), st.integers(0, 40))
def test_any_start_gives_a_slice_of_the_whole(loop, one, other):
    n, batch_size, seed = loop
    start, stop = sorted((one, other))
    whole = step_indices(n, batch_size, 0, 41, seed, "confirm")
    assert torch.equal(step_indices(n, batch_size, start, stop, seed, "confirm"), whole[start:stop])


def test_orders_differ_between_epochs_and_seeds():
    orders = [epoch_permutation(100, epoch, seed) for epoch in (0, 1) for seed in (0, 1)]
    assert len({tuple(order.tolist()) for order in orders}) == 4


def test_impossible_batches_are_refused():
    with pytest.raises(BadInput, match="batch_size is 11, but there are 10"):
        step_indices(10, 11, 0, 1, 0)
    with pytest.raises(BadInput, match="batch_size is 0"):
        step_indices(10, 0, 0, 1, 0)
    with pytest.raises(BadInput, match="steps 3 to 2"):
        step_indices(10, 2, 3, 2, 0)


@settings(deadline=None)
@given(n=st.integers(1, 50), size=st.integers(1, 60))
def test_evaluation_never_drops_a_sample(n, size):
    arrays = Arrays(torch.arange(2.0 * n).view(n, 2), torch.arange(n))
    batches = list(eval_batches(arrays, size))
    assert torch.equal(torch.cat([x for x, _ in batches]), arrays.x)
    assert torch.equal(torch.cat([y for _, y in batches]), arrays.y)
    assert all(len(x) == size for x, _ in batches[:-1])


# Augmentation.


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_augmentation_is_a_pure_function_of_seed_and_step(name):
    x = torch.randn(32, *IMAGE)
    before = x.clone()
    augment = augmentation(name, IMAGE)
    first = augment(x, generator(0, "augment", 5))
    assert torch.equal(x, before)
    assert first.shape == x.shape
    assert first.dtype == x.dtype
    assert torch.equal(first, augment(x, generator(0, "augment", 5)))
    assert torch.equal(first, augment(x, generator(0, "augment", 6))) == (name == "none")


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_augmentation_needs_images(name):
    if name == "none":
        assert augmentation(name, (1, 40)) is AUGMENTATIONS["none"]
    else:
        with pytest.raises(BadInput, match=r"needs images, but the samples are \(1, 40\)"):
            augmentation(name, (1, 40))
    with pytest.raises(BadInput, match="no augmentation named"):
        augmentation(name + "!", IMAGE)


def test_flip_mirrors_half_of_the_images():
    x = torch.randn(400, *IMAGE)
    flipped = flip(x, generator(0))
    mirrored = [torch.equal(new, old.flip(-1)) for new, old in zip(flipped, x, strict=True)]
    kept = [torch.equal(new, old) for new, old in zip(flipped, x, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 150 < sum(mirrored) < 250  # 200 ± 5 standard deviations


def test_crop_shifts_by_each_amount_equally_often():
    pad, (channels, height, width) = 2, IMAGE
    x = torch.randn(2000, *IMAGE)
    cropped = crop(x, generator(0), pad)
    counts = dict.fromkeys([(dy, dx) for dy in range(-pad, pad + 1) for dx in range(-pad, pad + 1)], 0)
    for old, new in zip(x, cropped, strict=True):
        matches = []
        for dy, dx in counts:
            shifted = torch.zeros(channels, height, width)
            target = shifted[:, max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)]
            target.copy_(old[:, max(-dy, 0) : height + min(-dy, 0), max(-dx, 0) : width + min(-dx, 0)])
            if torch.equal(shifted, new):
                matches.append((dy, dx))
        (match,) = matches
        counts[match] += 1
    assert all(35 < count < 130 for count in counts.values())  # 80 ± 5 standard deviations of 8.8


def test_cutout_clears_one_square_with_its_centre_anywhere():
    height, width, side = 8, 6, 4
    erased = cutout(torch.ones(3000, 2, height, width), generator(0), side) == 0
    assert torch.equal(erased[:, 0], erased[:, 1])
    hits = torch.zeros(height, width)
    for mask in erased[:, 0]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert mask.sum() == len(rows) * len(columns)
        assert len(rows) == rows[-1] - rows[0] + 1 <= side
        assert len(columns) == columns[-1] - columns[0] + 1 <= side
        hits += mask
    # A pixel is hit by the centres at most side/2 below and side/2 - 1 above it (left and right alike).
    covering = [
        [
            sum(-side // 2 <= r - cy < side - side // 2 and -side // 2 <= c - cx < side - side // 2
                for cy in range(height) for cx in range(width))
            for c in range(width)
        ]
        for r in range(height)
    ]  # fmt: skip
    expected = torch.tensor(covering) / (height * width)
    assert (hits / 3000 - expected).abs().max() < 0.05


def test_cutout_takes_half_of_the_height_by_default():
    erased = cutout(torch.ones(200, 1, 32, 32), generator(0)) == 0
    assert erased.sum((1, 2, 3)).max() == 16 * 16
