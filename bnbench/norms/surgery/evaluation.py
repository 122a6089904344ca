"""What a norm computes in evaluation, found out by running a copy of it in float64."""

from __future__ import annotations

import copy
import itertools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnbench.norms.base import KeepsMoments, channel_moments
from bnbench.norms.surgery.layers import (
    TORCH_BATCH_NORMS,
    count_channels,
    foreign,
    over_last_axis,
    registered_name,
    spatial_axes,
)


def first_float(*modules: nn.Module) -> Tensor:
    """The first floating point parameter or buffer of these modules; a float32 tensor if they have none."""
    tensors = itertools.chain.from_iterable((*module.parameters(), *module.buffers()) for module in modules)
    return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))


def copy_for_evaluation(layer: nn.Module) -> Any:
    """A copy of a layer in float64, on the CPU and in evaluation mode."""
    return copy.deepcopy(layer).cpu().double().eval()


def random_input(layer: nn.Module) -> Tensor:
    """A float64 input of 8 samples for a norm, standard normal, always the same; channels are on axis 1."""
    axes = spatial_axes(layer)
    generator = torch.Generator().manual_seed(0)
    shape = (8, count_channels(layer), *(3,) * (2 if axes is None else axes))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@torch.no_grad()
def channel_map(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Slope and shift of each channel, in float64, if that is all of the norm's evaluation; else None.

    They are read off the outputs for 0 and 1, and tried on a random input.
    """
    if over_last_axis(layer):
        return None
    twin, x = copy_for_evaluation(layer), random_input(layer)
    first = (slice(0, 1), slice(None), *(slice(0, 1),) * (x.ndim - 2))
    shift = twin(torch.zeros_like(x))[first]
    slope = twin(torch.ones_like(x))[first] - shift
    scale = float(shift.abs().max() + slope.abs().max())
    if not torch.allclose(twin(x), slope * x + shift, rtol=0.0, atol=1e-9 * scale):
        return None
    return slope.flatten(), shift.flatten()


@torch.no_grad()
def takes_moments(layer: nn.Module) -> bool:
    """Whether the moments that a norm keeps are determined by its input's mean and mean square alone."""
    if not isinstance(layer, KeepsMoments):
        return False
    x = random_input(layer)
    moments, plain = copy_for_evaluation(layer).batch_moments(x), channel_moments(x)
    return len(moments) == len(plain) and all(
        mine.shape == other.shape and bool(torch.allclose(mine, other))
        for mine, other in zip(moments, plain, strict=True)
    )


@torch.no_grad()
def evaluates_as_batch_norm(layer: nn.Module) -> bool:
    """Whether the evaluation of a norm is γ (x − μ) / √(σ² + eps) + β by running statistics that it keeps."""
    known = foreign(layer)
    if type(layer) in TORCH_BATCH_NORMS or (known is not None and known.twin == "frozen_batch"):
        return isinstance(layer.running_mean, Tensor)
    if registered_name(layer) is None or not hasattr(layer, "eps") or not takes_moments(layer):
        return False
    twin, x = copy_for_evaluation(layer), random_input(layer)
    channels = x.shape[1]
    affine = _set_affine(twin, torch.linspace(0.5, 1.5, channels), torch.linspace(-1.0, 1.0, channels))
    mean, mean_square = channel_moments(3 * x + 2)
    twin.set_moments(mean, mean_square)
    wanted = F.batch_norm(x, mean, mean_square - mean.square(), *affine, False, 0.0, twin.eps)
    return bool(torch.allclose(twin(x), wanted, rtol=1e-6, atol=1e-6))


@torch.no_grad()
def running_statistics(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Running mean and variance, in float64 on the CPU, of a norm that :func:`evaluates_as_batch_norm`.

    They are read off its evaluation with γ = 1 and β = 0, so that it does not matter how it keeps them.
    """
    twin = copy_for_evaluation(layer)
    _set_affine(twin, torch.tensor(1.0), torch.tensor(0.0))
    slope, shift = cast(tuple[Tensor, Tensor], channel_map(twin))
    return -shift / slope, (1 / slope.square() - twin.eps).clamp_min(0.0)


def _set_affine(layer: nn.Module, gamma: Tensor, beta: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Write γ and β where a layer has them, and return them."""
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    for mine, value in ((weight, gamma), (bias, beta)):
        if mine is not None:
            mine.copy_(value)
    return weight, bias
