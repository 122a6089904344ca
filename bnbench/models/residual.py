"""What the residual options of :class:`bnbench.models.resnet.ResNet` are made of.

The attribute `lr_scale` of a module is the share of the learning rate that its parameters learn at; see
:meth:`bnbench.lit.NormClassifier.parameter_groups`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from bnbench.models.base import LINEAR_MAPS, Slot
from bnbench.norms.reparam import REPARAMS
from bnbench.registry import BadInput

Residual = Literal["plain", "fixup", "skip_init", "rezero"]


class Shift(nn.Module):
    """x + b, where b is one learned number that starts at 0: Fixup's scalar bias."""

    lr_scale = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bias.to(x.dtype)


class Multiplier(nn.Module):
    """α x, where α is one learned number."""

    def __init__(self, start: float, *, lr_scale: float = 1.0) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), start))
        self.lr_scale = lr_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.alpha.to(x.dtype)


def add_shifts(parts: nn.Module) -> nn.Module:
    """Put a shift before each convolution and activation of a sequence, its first part left out."""
    if not isinstance(parts, nn.Sequential):
        return parts
    shifted = nn.Sequential()
    for name, part in parts.named_children():
        activates = name.endswith("activation") and not isinstance(part, nn.Identity)
        if len(shifted) > 0 and (activates or isinstance(part, LINEAR_MAPS)):
            shifted.add_module(f"{name}_shift", Shift())
        shifted.add_module(name, part)
    return shifted


def check_residual(residual: Residual, slot: Slot, zero_gamma: bool) -> None:
    """Raise BadInput where a residual option cannot stand beside the others."""
    if residual == "plain":
        return
    if zero_gamma:
        raise BadInput(
            f"zero_gamma beside residual {residual!r} leaves every branch dead; use one of the two"
        )
    if residual == "rezero" and slot.order == "post-add":
        raise BadInput("residual 'rezero' has nothing behind the addition; use the order 'norm-act'")
    if residual == "fixup" and slot.reparam and REPARAMS[slot.reparam].proportional_to is None:
        raise BadInput(
            f"residual 'fixup' starts from small weights, and {slot.reparam!r} fixes their size;"
            " use 'scaled_weight_standardization', 'weight_norm' or no reparametrization"
        )
