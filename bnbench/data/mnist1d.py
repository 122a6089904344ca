"""MNIST-1D: ten templates as noisy, shifted, sheared signals (Greydanus & Kobak, 2024, arXiv:2011.14439)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np

from bnbench.data import cache
from bnbench.data.base import Parts, Samples, dataset
from bnbench.registry import BadInput

TRAIN, VAL, TEST = 4_000, 2_000, 6_000


@dataset("mnist1d", in_shape=(1, 40), num_classes=10, fresh=True)
def read_mnist1d(data_seed: int, folder: Path) -> Parts:
    """Read 4,000 training, 2,000 validation and 6,000 test signals of 40 points, 1,200 a class in all.

    They are the library's own `make_dataset` with its default difficulty, 12,000 samples and
    seed = data_seed, in its (shuffled) order: every data_seed is an independent draw. Generated in about
    2 s, then kept in the folder. Raises BadInput for a seed that numpy's legacy generator cannot take.
    """
    if not 0 <= data_seed < 2**32:
        raise BadInput(f"data_seed is {data_seed}; mnist1d takes 0 to {2**32 - 1}")
    name = f"mnist1d-{version('mnist1d')}-{data_seed}.npz"
    arrays = cache.cached_arrays(folder / name, lambda: _generate(data_seed))
    x, y = arrays["x"][:, None, :], arrays["y"]
    first_test = TRAIN + VAL
    return Parts(
        Samples(x[:TRAIN], y[:TRAIN]),
        Samples(x[TRAIN:first_test], y[TRAIN:first_test]),
        Samples(x[first_test:], y[first_test:]),
    )


def _generate(data_seed: int) -> cache.Arrays:
    with _global_random_state_kept():
        from mnist1d.data import get_dataset_args, make_dataset

        args = get_dataset_args()
        args.num_samples, args.train_split, args.seed = TRAIN + VAL + TEST, 1.0, data_seed
        made = make_dataset(args)
    return {"x": made["x"].astype(np.float32), "y": made["y"]}


@contextmanager
def _global_random_state_kept() -> Iterator[None]:
    # The library seeds the generators of numpy and of Python, which belong to the caller.
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
