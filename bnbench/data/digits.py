"""Digits: 1,797 handwritten digits of 8×8 pixels (Alpaydin & Kaynak, 1998; the copy in scikit-learn)."""

from __future__ import annotations

import functools
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from bnbench.data import cache
from bnbench.data.base import Parts, Samples, dataset
from bnbench.data.randomness import generator
from bnbench.data.splits import stratified_order

VAL, TEST = 360, 360


@dataset("digits", in_shape=(1, 8, 8), num_classes=10)
def read_digits(data_seed: int, folder: Path) -> Parts:
    """Read 1,077 training, 360 validation and 360 test images: another stratified split for each data_seed.

    Kept in the folder, because scikit-learn takes longer to import than this takes to read.
    """
    samples = _stored_digits(folder)
    order = stratified_order(torch.from_numpy(samples.y), generator(data_seed, "digits", "split"))
    return Parts(
        samples.take(order[VAL + TEST :]),
        samples.take(order[:VAL]),
        samples.take(order[VAL : VAL + TEST]),
    )


@functools.lru_cache(maxsize=1)
def _stored_digits(folder: Path) -> Samples:
    arrays = cache.cached_arrays(folder / f"digits-{version('scikit-learn')}.npz", _copy_from_sklearn)
    return Samples(arrays["x"], arrays["y"])


def _copy_from_sklearn() -> cache.Arrays:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return {"x": pixels.reshape(-1, 1, 8, 8).astype(np.uint8), "y": labels.astype(np.int64)}
