"""Data sets in memory, their splits, batches and augmentation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnbench.data.augment import AUGMENTATIONS, augmentation
from bnbench.data.base import (
    DATASETS,
    Arrays,
    Dataset,
    Parts,
    Samples,
    Split,
    dataset,
    default_folder,
    fetch,
    load_split,
    load_test,
    shape_of,
)
from bnbench.data.batches import epoch_permutation, eval_batches, step_indices
from bnbench.data.randomness import generator, seed_of

if TYPE_CHECKING:
    from bnbench.data.module import DataModule

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "Arrays",
    "DataModule",
    "Dataset",
    "Parts",
    "Samples",
    "Split",
    "augmentation",
    "dataset",
    "default_folder",
    "epoch_permutation",
    "eval_batches",
    "fetch",
    "generator",
    "load_split",
    "load_test",
    "seed_of",
    "shape_of",
    "step_indices",
]


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import, and loading data does without it.
    if name == "DataModule":
        from bnbench.data.module import DataModule

        return DataModule
    raise AttributeError(f"module 'bnbench.data' has no attribute {name!r}")
