"""VGG networks for small images, with one linear classifier."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from bnbench.models.base import Slot, average_pool, model

# Simonyan & Zisserman (2015), table 1: convolutions in each of the five stages.
STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}

_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d}


class VGG(nn.Module):
    """Five stages of 3-wide convolutions, each followed by a max-pooling that halves the map.

    The stages have 1, 2, 4, 8 and 8 times `width` channels. A map of size 1 is not pooled again; one that is
    larger at the end (inputs above 32) is averaged. In place of the paper's three fully connected layers
    there is one classifier, as is usual on CIFAR.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        num_classes: int,
        slot: Slot,
        stages: tuple[int, ...],
        *,
        width: int = 64,
    ) -> None:
        super().__init__()
        num_inputs, *sizes = in_shape
        dim, size, depth = len(sizes), min(sizes), sum(stages)
        self.layers = nn.Sequential()
        for stage, num_layers in enumerate(stages):
            channels = width * min(2**stage, 8)
            for place in range(num_layers):
                index = len(self.layers)
                conv = slot.at(index, depth).build_conv(num_inputs, channels, dim)
                gap = slot.build(channels, dim, index, depth)
                layer = nn.Sequential(OrderedDict([("conv", conv), *gap.named_children()]))
                if place == num_layers - 1 and size >= 2:
                    layer.add_module("pool", _POOLS[dim](2))
                    size //= 2
                self.layers.append(layer)
                num_inputs = channels
        self.dropout = slot.build_last_dropout()
        self.head = nn.Linear(num_inputs, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = average_pool(self.layers(x))
        logits: torch.Tensor = self.head(self.dropout(hidden))
        return logits


def _register(name: str, stages: tuple[int, ...]) -> None:
    @model(name, orders=("norm-act", "act-norm"), ranks=(2, 3), paper="arXiv:1409.1556")
    def build(in_shape: tuple[int, ...], num_classes: int, slot: Slot, *, width: int = 64) -> nn.Module:
        return VGG(in_shape, num_classes, slot, stages, width=width)


for _depth, _stages in STAGES.items():
    _register(f"vgg{_depth}", _stages)
