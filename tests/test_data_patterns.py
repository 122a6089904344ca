"""The made-up images: what a network can and cannot see in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bnbench.data import DATASETS, load_split
from bnbench.data.patterns import draw_images

MADE_UP = sorted(name for name, entry in DATASETS.items() if entry.offline == {"synthetic": True})


def test_four_data_sets_have_made_up_images():
    assert MADE_UP == ["cifar10", "cifar100", "fashion_mnist", "mnist"]


@pytest.mark.parametrize("name", MADE_UP)
def test_classes_can_be_told_apart_but_not_by_one_pixel(name, tmp_path):
    parts = load_split(name, 0, folder=tmp_path, synthetic=True)
    classes = range(parts.num_classes)
    means = np.stack([parts.train.x[parts.train.y == label].mean(0).numpy().ravel() for label in classes])
    val = parts.val.x.numpy().reshape(len(parts.val), -1)
    distances = np.stack([((val - mean) ** 2).sum(1) for mean in means], axis=1)
    assert (distances.argmin(1) == parts.val.y.numpy()).mean() > 0.98
    by_one_pixel = (val[:, :1] - means[:, 0]) ** 2
    assert (by_one_pixel.argmin(1) == parts.val.y.numpy()).mean() < 0.6


def test_files_of_one_name_share_their_patterns_and_other_names_have_others():
    def pattern(name: str, file: str) -> torch.Tensor:
        images, labels = draw_images(name, file, 4000, 2, channels=1, side=8)
        return images[labels == 0].double().mean(0)

    # Noise of 32 over about 2,000 images: standard error 0.7 for each pixel.
    assert (pattern("a", "train") - pattern("a", "test")).abs().max() < 6
    assert (pattern("a", "train") - pattern("b", "train")).abs().max() > 30
    first, second = (draw_images("a", file, 50, 2, channels=1, side=8)[0] for file in ("train", "test"))
    assert not torch.equal(first, second)
