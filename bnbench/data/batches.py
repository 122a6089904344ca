"""Batches of data in memory: which samples belong to which step, and evaluation without loss of a sample."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bnbench.data.base import Arrays
from bnbench.data.randomness import Part, generator
from bnbench.registry import BadInput


def epoch_permutation(n: int, epoch: int, *seed: Part) -> Tensor:
    """Return the order of n samples in an epoch, a pure function of the seed and the epoch (from 0)."""
    return torch.randperm(n, generator=generator(*seed, "order", epoch))


def step_indices(n: int, batch_size: int, start_step: int, stop_step: int, *seed: Part) -> Tensor:
    """Return which samples belong to the steps start … stop - 1, as indices (steps × batch_size).

    An epoch has n // batch_size steps, each sample in at most one of them; the rest of its permutation is
    dropped. A row depends on the seed and its step only, so a run can go on at any step. Raises BadInput
    where a batch is larger than the data.
    """
    if not 1 <= batch_size <= n:
        raise BadInput(f"batch_size is {batch_size}, but there are {n} training samples; use 1 to {n}")
    if not 0 <= start_step <= stop_step:
        raise BadInput(
            f"steps {start_step} to {stop_step}: the first must be 0 or more, the last not before it"
        )
    per_epoch = n // batch_size
    if start_step == stop_step:
        return torch.empty(0, batch_size, dtype=torch.int64)
    first, last = start_step // per_epoch, (stop_step - 1) // per_epoch
    epochs = [
        epoch_permutation(n, epoch, *seed)[: per_epoch * batch_size].view(per_epoch, batch_size)
        for epoch in range(first, last + 1)
    ]
    return torch.cat(epochs)[start_step - first * per_epoch : stop_step - first * per_epoch]


def eval_batches(arrays: Arrays, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all samples in order, `size` at a time; the last batch may be smaller."""
    for start in range(0, len(arrays), size):
        yield arrays.x[start : start + size], arrays.y[start : start + size]
