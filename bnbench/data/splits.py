"""Which samples go where: stratified order and label noise."""

from __future__ import annotations

import torch
from torch import Tensor


def stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random order of the samples whose every prefix has all classes in proportion.

    The r-th sample of a class of n (in random order, r from 0) gets the key (r + u) / n with u uniform in
    [0, 1); the order is by key. With K classes of N samples a prefix of m has m n / N samples of a class of
    n, up to 1 + K n / N. So splits and subsets are prefixes, of exact size, and a smaller subset lies
    within a larger one.
    """
    shuffle = torch.randperm(len(labels), generator=generator)
    by_class = shuffle[torch.argsort(labels[shuffle], stable=True)]
    counts = torch.bincount(labels)
    own_class = labels[by_class]
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[own_class]
    jitter = torch.rand(len(labels), generator=generator, dtype=torch.float64)
    return by_class[torch.argsort((rank + jitter) / counts[own_class], stable=True)]


def hold_out(labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the samples that stay and `count` samples, a stratified choice, that are held out.

    Both in ascending order, so that memory is read in one direction.
    """
    order = stratified_order(labels, generator)
    return order[count:].sort().values, order[:count].sort().values


def add_label_noise(labels: Tensor, fraction: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """Return a copy in which `round(fraction * N)` labels are another class, drawn uniformly.

    Half a label rounds to the even count. Symmetric noise without the true class, so the share of wrong
    labels is the fraction itself.
    """
    noisy = labels.clone()
    count = round(fraction * len(labels))
    chosen = torch.randperm(len(labels), generator=generator)[:count]
    shift = torch.randint(1, num_classes, (count,), generator=generator)
    noisy[chosen] = (labels[chosen] + shift) % num_classes
    return noisy
