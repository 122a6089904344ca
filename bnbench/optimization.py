"""What the optimizer's step is made of: schedules, groups of parameters, and clipping unit by unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

SCHEDULES = ("constant", "cosine", "trapezoid")
COOLDOWN = 0.2  # share of the steps over which a trapezoid falls
SMALLEST_UNIT = 1e-3  # norm of the weights of a unit that adaptive clipping takes smaller ones for


def learning_rate_factor(step: int, steps: int, schedule: str, warmup: float) -> float:
    """The learning rate of a step (from 0) as a share of its peak.

    It rises linearly over the first `warmup` share of the steps. Then it stays ("constant"), follows half a
    cosine to 0 ("cosine"; Loshchilov & Hutter, 2017, eq. 5, without restarts), or stays and falls linearly
    to 0 over the last fifth of the steps ("trapezoid"; a constant rate with cooldown, Hägele et al., 2024).
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising))))
    if schedule == "trapezoid":
        return min(1.0, max(0.0, (steps - step) / max(1, round(COOLDOWN * steps))))
    return 1.0


def split_parameters(model: nn.Module, decay_norm: bool) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that weight decay acts on, and those that it leaves alone; frozen ones are in neither.

    Weights of linear maps and convolutions decay. Scales, shifts and biases (one number a feature) only
    where `decay_norm` asks for it.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in (p for p in model.parameters() if p.requires_grad):
        is_weight = parameter.ndim > 1 and parameter.numel() > parameter.shape[0]
        (decayed if is_weight or decay_norm else free).append(parameter)
    return decayed, free


class ParameterGroup(NamedTuple):
    """Parameters that an optimizer treats alike: their L2 decay, and their share of the learning rate."""

    parameters: Sequence[nn.Parameter]
    decay: float
    lr_scale: float = 1.0


def clip_by_unit(parameters: Sequence[Tensor], gradients: Sequence[Tensor], limit: float) -> list[Tensor]:
    """Gradients g of weights w, clipped for each unit by itself: g · min(1, limit · max(‖w‖, 1e-3) / ‖g‖).

    A unit is what makes one output: a row of a matrix, a kernel of a convolution with all its inputs. A
    tensor that has one number an output, such as a bias or the scale of a norm, is one unit as a whole.
    Source: Brock et al., 2021b (arXiv:2102.06171), equation 3; units of vectors as in the authors' code.
    """
    clipped = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        most = limit * _unit_norms(parameter.detach()).clamp_min(SMALLEST_UNIT)
        # A gradient of zero gives 1.
        clipped.append(gradient * (most / _unit_norms(gradient)).clamp_max(1.0))
    return clipped


def _unit_norms(tensor: Tensor) -> Tensor:
    """The L2 norms of the units of a parameter or of its gradient, of a shape that multiplies it."""
    has_rows = tensor.ndim > 1 and tensor.numel() > tensor.shape[0]
    dims = tuple(range(1, tensor.ndim)) if has_rows else None
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True)
    return norms
