"""A LightningDataModule over the registry, for a plain Trainer or LightningCLI."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset

from bnbench.data.base import Arrays, default_folder, fetch, load_split, load_test, shape_of
from bnbench.data.batches import epoch_permutation
from bnbench.registry import BadInput

Loader = DataLoader[tuple[Tensor, ...]]


class EpochOrder(Sampler[int]):
    """Yield the samples of the epoch that the Trainer sets, in an order that depends on nothing else.

    So a run resumed at the start of an epoch sees the batches that it would have seen undisturbed.
    """

    def __init__(self, n: int, data_seed: int) -> None:
        self.n = n
        self.data_seed = data_seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_permutation(self.n, self.epoch, self.data_seed).tolist())


class DataModule(L.LightningDataModule):
    """Serve a registered data set in batches (x float32, y int64).

    Training drops the last incomplete batch, evaluation drops nothing. `in_shape` and `num_classes` are
    known from the start; `options` are those of the data set. Data that must be downloaded is, once, in
    `prepare_data`. Raises BadInput at construction for unknown names and options.
    """

    def __init__(
        self,
        name: str = "mnist1d",
        batch_size: int = 64,
        data_seed: int = 0,
        n_train: int | None = None,
        label_noise: float = 0.0,
        folder: str | Path | None = None,
        options: dict[str, Any] | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise BadInput(f"batch_size is {batch_size}; use 1 or more")
        self.dataset_name = name
        self.batch_size = batch_size
        self.data_seed = data_seed
        self.n_train = n_train
        self.label_noise = label_noise
        self.folder = default_folder() if folder is None else Path(folder)
        self.options = options or {}
        self.num_workers = num_workers
        self.in_shape, self.num_classes = shape_of(name, **self.options)
        self._train: Arrays | None = None
        self._val: Arrays | None = None
        self._test: Arrays | None = None

    def prepare_data(self) -> None:
        fetch(self.dataset_name, self.folder, **self.options)

    def setup(self, stage: str) -> None:
        if stage in ("fit", "validate") and self._train is None:
            split = load_split(
                self.dataset_name,
                self.data_seed,
                folder=self.folder,
                n_train=self.n_train,
                label_noise=self.label_noise,
                **self.options,
            )
            if self.batch_size > len(split.train):
                raise BadInput(
                    f"batch_size is {self.batch_size}, but there are {len(split.train)} training samples"
                )
            self._train, self._val = split.train, split.val
        if stage in ("test", "predict") and self._test is None:
            self._test = load_test(self.dataset_name, self.data_seed, folder=self.folder, **self.options)

    def train_dataloader(self) -> Loader:
        train = _loaded(self._train, "fit")
        return self._loader(train, sampler=EpochOrder(len(train), self.data_seed), drop_last=True)

    def val_dataloader(self) -> Loader:
        return self._loader(_loaded(self._val, "fit"))

    def test_dataloader(self) -> Loader:
        return self._loader(_loaded(self._test, "test"))

    def predict_dataloader(self) -> Loader:
        return self.test_dataloader()

    def _loader(self, arrays: Arrays, **arguments: Any) -> Loader:
        return DataLoader(
            TensorDataset(arrays.x, arrays.y),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            **arguments,
        )


def _loaded(arrays: Arrays | None, stage: str) -> Arrays:
    if arrays is None:
        raise BadInput(f"the data is not loaded; call setup({stage!r}) first, or let a Trainer do it")
    return arrays
