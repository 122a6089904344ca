"""Reparametrized weights: the @reparam decorator, apply_reparam, weight norm and weight standardization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm as torch_weight_norm

from bnbench.norms.base import check_eps
from bnbench.registry import BadInput, Registry, check_options

Apply = Callable[..., None]


@dataclass(frozen=True)
class ReparamEntry:
    """A reparametrization: `apply(layer, **options)` changes how a layer's weight is computed, in place."""

    name: str
    apply: Apply
    paper: str


# Any file of this package, or an entry point of the group "bnbench.norms", may add to it.
REPARAMS: Registry[ReparamEntry] = Registry("reparametrization", "bnbench.norms")


def reparam(name: str, *, paper: str) -> Callable[[Apply], Apply]:
    """Register a function `apply(layer, **options)`; its options are keyword-only parameters.

    Raises BadInput where the name is taken.
    """

    def register(apply: Apply) -> Apply:
        REPARAMS.add(name, ReparamEntry(name, apply, paper))
        return apply

    return register


def apply_reparam(module: nn.Module, name: str, **options: Any) -> nn.Module:
    """Reparametrize the weight of one linear or convolution layer in place, and return the layer.

    The weight as it is becomes the parameter under the parametrization; assigning `layer.weight = values`
    sets it anew. To be called before an optimizer takes the parameters. It goes with any norm.
    Raises BadInput for an unknown name or option, another kind of layer, a lazy layer that has no shape
    yet, or a weight that is reparametrized already.
    """
    entry = REPARAMS[name]
    check_options(f"reparametrization {name!r}", entry.apply, options)
    if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise BadInput(
            f"reparametrization {name!r} takes a Linear or Conv layer, not {type(module).__name__}"
        )
    if isinstance(module.weight, nn.UninitializedParameter):
        raise BadInput(f"reparametrization {name!r}: run the lazy layer once before, so that it has a shape")
    if parametrize.is_parametrized(module, "weight"):
        raise BadInput(f"reparametrization {name!r}: this layer's weight is reparametrized already")
    try:
        entry.apply(module, **options)
    except ValueError as error:
        raise BadInput(f"reparametrization {name!r}: {error}") from error
    return module


@reparam("weight_norm", paper="arXiv:1602.07868")
def weight_norm(layer: nn.Module) -> None:
    """W = g v / ‖v‖, for each output by itself; the length g and the direction v are learned.

    By torch's own code. It starts at the layer's weight, which must have no output that is all zero; the
    paper's data-dependent start of g and the bias is not part of it.
    Source: Salimans & Kingma 2016, equation 2.
    """
    torch_weight_norm(layer, "weight", dim=0)


@reparam("weight_standardization", paper="arXiv:1903.10520")
def weight_standardization(layer: nn.Module, *, eps: float = 1e-5) -> None:
    """Ŵ = (W − mean) / √(var + eps), for each output by itself over its inputs; W is learned.

    Here var is biased and eps is inside the root. Sources differ in both: the form (σ + eps) and an
    unbiased σ are in use too.
    Raises BadInput where an output has one input, as Ŵ would be 0 for good.
    Source: Qiao et al. 2019.
    """
    if layer.get_parameter("weight")[0].numel() < 2:
        raise BadInput("an output needs at least 2 input weights to be standardized")
    parametrize.register_parametrization(layer, "weight", StandardizedWeight(eps))


class StandardizedWeight(nn.Module):
    """The map from W (outputs first) to Ŵ; see :func:`weight_standardization`."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = check_eps(eps)

    def forward(self, weight: Tensor) -> Tensor:
        rows = weight.flatten(1)
        var, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
        return ((rows - mean) * (var + self.eps).rsqrt()).view_as(weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def extra_repr(self) -> str:
        return f"eps={self.eps}"
