"""Fully connected networks."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import nn

from bnbench.models.base import Slot, model


@model("mlp", orders=("norm-act", "act-norm"), ranks=(1, 2, 3))
class MLP(nn.Module):
    """`depth` hidden layers of `width` units on the flattened input, then the classifier."""

    def __init__(
        self, in_shape: tuple[int, ...], num_classes: int, slot: Slot, *, depth: int = 4, width: int = 128
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        num_inputs = math.prod(in_shape)
        for index in range(depth):
            linear = slot.at(index, depth).build_linear(num_inputs, width)
            gap = slot.build(width, 0, index, depth)
            self.layers.append(nn.Sequential(OrderedDict([("linear", linear), *gap.named_children()])))
            num_inputs = width
        self.dropout = slot.build_last_dropout()
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.layers(x.flatten(1))
        logits: torch.Tensor = self.head(self.dropout(hidden))
        return logits
