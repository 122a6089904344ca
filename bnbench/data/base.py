"""Data sets: what an entry is, how its splits are loaded, normalized, subset and given noisy labels."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bnbench.data.randomness import generator
from bnbench.data.splits import add_label_noise, stratified_order
from bnbench.registry import BadInput, Registry, nearest

Shape = tuple[int, ...]
_BLOCK = 512  # samples that are in float64 at a time: few, so that they stay in the cache


@dataclass(frozen=True)
class Arrays:
    """Samples for a network: `x` float32 (N × in_shape), normalized; `y` int64 (N)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: str | torch.device) -> Arrays:
        return Arrays(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class Split:
    """What training and tuning may see. `train_clean_y` are the training labels before label noise."""

    train: Arrays
    train_clean_y: Tensor
    val: Arrays
    in_shape: Shape
    num_classes: int
    name: str


@dataclass(frozen=True)
class Samples:
    """Samples as they are stored: `x` uint8 or float (N × in_shape), `y` integers (N)."""

    x: NDArray[Any]
    y: NDArray[Any]

    def take(self, index: Tensor) -> Samples:
        return Samples(self.x[index.numpy()], self.y[index.numpy()])


@dataclass(frozen=True)
class Parts:
    """The three parts that a data set's reader returns."""

    train: Samples
    val: Samples
    test: Samples


@dataclass(frozen=True)
class Dataset:
    """A registered data set.

    `read(data_seed, folder, **options)` returns the Parts; its keyword-only arguments are the options.
    `shape(**options)` returns (in_shape, num_classes) without loading. `fetch(folder, **options)` gets
    what reading needs and cannot make by itself. With `fresh`, every data_seed is an independent draw of
    new data, else another split of the same data. `offline` are options that need no network.
    """

    name: str
    read: Callable[..., Parts]
    shape: Callable[..., tuple[Shape, int]]
    fetch: Callable[..., None] | None = None
    fresh: bool = False
    offline: Mapping[str, Any] = field(default_factory=dict)


DATASETS: Registry[Dataset] = Registry("data set", "bnbench.data")


def dataset(
    name: str,
    *,
    in_shape: Shape | None = None,
    num_classes: int | None = None,
    shape: Callable[..., tuple[Shape, int]] | None = None,
    fetch: Callable[..., None] | None = None,
    fresh: bool = False,
    offline: Mapping[str, Any] | None = None,
) -> Callable[[Callable[..., Parts]], Callable[..., Parts]]:
    """Register a reader as a data set, with either its shape or a function that finds it."""
    if shape is None:
        if in_shape is None or num_classes is None:
            raise BadInput(f"the data set {name!r} needs in_shape and num_classes, or shape")
        known = (in_shape, num_classes)

        def shape(**options: Any) -> tuple[Shape, int]:
            return known

    def register(read: Callable[..., Parts]) -> Callable[..., Parts]:
        DATASETS.add(name, Dataset(name, read, shape, fetch, fresh, offline or {}))
        return read

    return register


def default_folder() -> Path:
    """Return the folder for data: the variable BNBENCH_DATA, or else the user's cache folder."""
    if named := os.environ.get("BNBENCH_DATA"):
        return Path(named).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("bnbench"))


def shape_of(name: str, **options: Any) -> tuple[Shape, int]:
    """Return (in_shape, num_classes) without loading the data."""
    entry = _checked(name, options)
    with _naming_missing_packages(name):
        return entry.shape(**options)


def fetch(name: str, folder: Path, **options: Any) -> None:
    """Download what this data set needs; nothing happens where all is there. Raises BadInput."""
    entry = _checked(name, options)
    if entry.fetch is not None:
        with _naming_missing_packages(name):
            entry.fetch(folder, **options)


def load_split(
    name: str,
    data_seed: int,
    *,
    folder: Path,
    n_train: int | None = None,
    label_noise: float = 0.0,
    **options: Any,
) -> Split:
    """Load training and validation data, never test data.

    Both are normalized by the mean and standard deviation of each channel over the whole training part
    (before `n_train`), as in :func:`load_test`. `n_train` takes a subset with all classes in proportion;
    smaller subsets lie within larger ones. Then `round(label_noise * n)` of these training labels become
    another class, drawn uniformly; validation labels are never noisy. All draws depend on data_seed only.
    """
    entry = _checked(name, options)
    if not 0 <= label_noise < 1:
        raise BadInput(f"label_noise is {label_noise}; it is a fraction of the labels, from 0 to below 1")
    with _naming_missing_packages(name):
        parts = entry.read(data_seed, folder, **options)
    train = parts.train
    if n_train is not None:
        most = len(train.y)
        if not 1 <= n_train <= most:
            raise BadInput(f"n_train is {n_train}, but {name} has {most} training samples; use 1 to {most}")
        order = stratified_order(_labels(train), generator(data_seed, name, "subset"))
        train = train.take(order[:n_train])
    in_shape, num_classes = entry.shape(**options)
    mean, sd = _channel_statistics(parts.train.x)
    clean = _labels(train)
    noisy = add_label_noise(clean, label_noise, num_classes, generator(data_seed, "label noise"))
    return Split(
        Arrays(_normalize(train.x, mean, sd), noisy),
        clean,
        Arrays(_normalize(parts.val.x, mean, sd), _labels(parts.val)),
        in_shape,
        num_classes,
        name,
    )


def load_test(name: str, data_seed: int, *, folder: Path, **options: Any) -> Arrays:
    """Load the test data that belongs to :func:`load_split` of the same seed and options.

    Apart from it, so that code which tunes never reads test data. `n_train` and label noise change
    nothing here: the statistics are those of the whole training part.
    """
    entry = _checked(name, options)
    with _naming_missing_packages(name):
        parts = entry.read(data_seed, folder, **options)
    mean, sd = _channel_statistics(parts.train.x)
    return Arrays(_normalize(parts.test.x, mean, sd), _labels(parts.test))


def _checked(name: str, options: Mapping[str, Any]) -> Dataset:
    entry = DATASETS[name]
    parameters = inspect.signature(entry.read).parameters.values()
    known = {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    for option in options:
        if option not in known:
            raise BadInput(f"the data set {name!r} has no option {option!r}{nearest(option, known)}")
    for option, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and option not in options:
            raise BadInput(f"the data set {name!r} needs the option {option!r}")
    return entry


@contextmanager
def _naming_missing_packages(name: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise BadInput(
            f"the data set {name!r} needs the package {error.name}; pip install 'bnbench[study]'"
        ) from error


def _labels(samples: Samples) -> Tensor:
    return torch.from_numpy(samples.y.astype(np.int64))


def _channel_statistics(x: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and (biased) standard deviation of each channel (1 × C × 1 …); a constant channel has 1."""
    axes = (0, *range(2, x.ndim))
    count = x.size // x.shape[1]
    blocks = [x[start : start + _BLOCK] for start in range(0, len(x), _BLOCK)]
    total = [block.sum(axis=axes, keepdims=True, dtype=np.float64) for block in blocks]
    mean = np.sum(total, axis=0) / count
    squares = [np.square(block - mean).sum(axis=axes, keepdims=True) for block in blocks]
    sd = np.sqrt(np.sum(squares, axis=0) / count)
    return mean, np.where(sd > 0, sd, 1.0)


def _normalize(x: NDArray[Any], mean: NDArray[np.float64], sd: NDArray[np.float64]) -> Tensor:
    out = np.empty(x.shape, np.float32)
    for start in range(0, len(x), _BLOCK):
        block = slice(start, start + _BLOCK)
        out[block] = (x[block] - mean) / sd
    return torch.from_numpy(out)
