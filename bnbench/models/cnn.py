"""Small convolutional networks for signals and images."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import nn

from bnbench.models.base import Slot, average_pool, model


@model("cnn", orders=("norm-act", "act-norm"), ranks=(2, 3), paper="arXiv:2011.14439")
class CNN(nn.Module):
    """`depth` convolutions of `channels` channels, average pooling, then the classifier.

    The first kernel is 5 wide with stride 1, the others are 3 wide, with stride 2 while the map is at least
    8 wide: with three layers, maps of 40, 20, 10 for a signal of 40, and 32, 16, 8 for an image of 32.
    Greydanus & Kobak (2024) start MNIST-1D's reference network with stride 2 and flatten at the end; pooling
    suits its shifted signals better.
    """

    def __init__(
        self, in_shape: tuple[int, ...], num_classes: int, slot: Slot, *, depth: int = 3, channels: int = 32
    ) -> None:
        super().__init__()
        num_inputs, *sizes = in_shape
        dim, size = len(sizes), min(sizes)
        self.layers = nn.Sequential()
        for index in range(depth):
            kernel, stride = (5, 1) if index == 0 else (3, 2 if size >= 8 else 1)
            conv = slot.at(index, depth).build_conv(num_inputs, channels, dim, kernel=kernel, stride=stride)
            gap = slot.build(channels, dim, index, depth)
            self.layers.append(nn.Sequential(OrderedDict([("conv", conv), *gap.named_children()])))
            num_inputs = channels
            size = math.ceil(size / stride)
        self.dropout = slot.build_last_dropout()
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = average_pool(self.layers(x))
        logits: torch.Tensor = self.head(self.dropout(hidden))
        return logits
