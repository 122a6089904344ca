"""Reparametrized weights: the @reparam decorator, apply_reparam, weight norm, weight standardizations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm as torch_weight_norm

from bnbench.norms.base import check_eps, widen
from bnbench.registry import BadInput, Registry, check_options

Apply = Callable[..., None]


@dataclass(frozen=True)
class ReparamEntry:
    """A reparametrization: `apply(layer, **options)` changes how a layer's weight is computed, in place.

    proportional_to: the tensor under `layer.parametrizations.weight` that the weight is proportional to, by
        name; None where no tensor sets the size of the weight.
    """

    name: str
    apply: Apply
    paper: str
    proportional_to: str | None = None


# Any file of this package, or an entry point of the group "bnbench.norms", may add to it.
REPARAMS: Registry[ReparamEntry] = Registry("reparametrization", "bnbench.norms")


def reparam(name: str, *, paper: str, proportional_to: str | None = None) -> Callable[[Apply], Apply]:
    """Register a function `apply(layer, **options)`; its options are keyword-only parameters.

    :class:`ReparamEntry` says what `proportional_to` names. Raises BadInput where the name is taken.
    """

    def register(apply: Apply) -> Apply:
        REPARAMS.add(name, ReparamEntry(name, apply, paper, proportional_to))
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
    if parametrize.is_parametrized(module, "weight"):
        _maps_of(module).entry = entry  # type: ignore[assignment]
    return module


def reparam_of(layer: nn.Module) -> ReparamEntry | None:
    """The reparametrization that `apply_reparam` gave a layer, or None."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    return cast(ReparamEntry | None, getattr(_maps_of(layer), "entry", None))


@torch.no_grad()
def scale_weight(layer: nn.Module, factor: float | Tensor) -> None:
    """Multiply the weight of a layer in place, reparametrized or not, by a number or by one an output.

    Raises BadInput where the reparametrization gives the weight a size of its own.
    """
    weight = layer.weight
    if parametrize.is_parametrized(layer, "weight"):
        entry = reparam_of(layer)
        if entry is None or entry.proportional_to is None:
            raise BadInput(f"{type(layer).__name__}: its reparametrization fixes the size of its weight")
        weight = getattr(_maps_of(layer), entry.proportional_to)
    weight = cast(Tensor, weight)
    weight.mul_(factor.view(-1, *(1,) * (weight.ndim - 1)) if isinstance(factor, Tensor) else factor)


def _maps_of(layer: nn.Module) -> parametrize.ParametrizationList:
    """The tensors and maps that a reparametrized weight is computed from."""
    maps = cast(Mapping[str, nn.Module], layer.parametrizations)
    return cast(parametrize.ParametrizationList, maps["weight"])


def require_inputs(layer: nn.Module, action: str) -> None:
    """Raise BadInput where an output of a layer has a single weight, so that it cannot be centred."""
    if layer.get_parameter("weight")[0].numel() < 2:
        raise BadInput(f"an output needs at least 2 input weights to be {action}")


@reparam("weight_norm", paper="arXiv:1602.07868", proportional_to="original0")
def weight_norm(layer: nn.Module) -> None:
    """W = g v / ‖v‖, for each output by itself; the length g and the direction v are learned.

    By torch's own code. It starts at the layer's weight, which must have no output that is all zero; the
    paper's data-dependent start of g and the bias is :func:`data_dependent_init`.

    Pitfalls: activations are not controlled; pair it with the norm "mean_only_batch", or start from data. An
    output whose weights are all zero has no direction.

    Source: Salimans & Kingma 2016, equation 2.
    """
    torch_weight_norm(layer, "weight", dim=0)


@torch.no_grad()
def data_dependent_init(model: nn.Module, x: Tensor) -> None:
    """Start the weight-normalized layers of a model so that a batch leaves each with mean 0 and variance 1.

    For each output of a layer, with t = v·input / ‖v‖ over the samples and positions of the batch x:
    g = 1 / σ[t] and bias = −μ[t] / σ[t], σ biased. It is one forward pass in the mode that the model is in;
    a layer sees what the layers before it put out once they are started. A layer without a bias keeps its
    mean. Raises BadInput where no layer has the reparametrization "weight_norm", and where an output is the
    same over all of x.
    Source: Salimans & Kingma 2016, section 3.
    """

    def start(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        outputs = output.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
        std, mean = torch.std_mean(outputs, 1, correction=0)
        if not bool((std > 0).all()):
            raise BadInput("data_dependent_init: an output is the same over all of x; give other samples")
        scale_weight(layer, 1 / std)
        if layer.bias is not None:
            bias = cast(Tensor, layer.bias)
            bias.copy_((bias - mean) / std)
        return cast(Tensor, layer.forward(*inputs))

    layers = [m for m in model.modules() if (entry := reparam_of(m)) and entry.name == "weight_norm"]
    if not layers:
        raise BadInput("data_dependent_init: no layer of the model is reparametrized by 'weight_norm'")
    handles = [layer.register_forward_hook(start) for layer in layers]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()


@reparam("weight_standardization", paper="arXiv:1903.10520")
def weight_standardization(layer: nn.Module, *, eps: float = 1e-5) -> None:
    """Ŵ = (W − mean) / √(var + eps), for each output by itself over its inputs; W is learned.

    Here var is biased and eps is inside the root. Sources differ in both: the form (σ + eps) and an
    unbiased σ are in use too.

    Pitfalls: scale and mean of W do not matter, so weight decay acts only through the learning rate, and an
    initialization's scale is lost. It is meant to go with group normalization.

    Raises BadInput where an output has one input, as Ŵ would be 0 for good.

    Source: Qiao et al. 2019.
    """
    require_inputs(layer, "standardized")
    parametrize.register_parametrization(layer, "weight", StandardizedWeight(eps))


class StandardizedWeight(nn.Module):
    """The map from W (outputs first) to Ŵ; see :func:`weight_standardization`."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = check_eps(eps)

    def forward(self, weight: Tensor) -> Tensor:
        rows = widen(weight).flatten(1)
        var, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
        return ((rows - mean) * (var + self.eps).rsqrt()).view_as(weight).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


@reparam("scaled_weight_standardization", paper="arXiv:2101.08692", proportional_to="original1")
def scaled_weight_standardization(
    layer: nn.Module,
    *,
    activation: Literal["relu", "identity", "tanh", "sigmoid", "gelu"] = "relu",
    eps: float = 1e-4,
) -> None:
    """Ŵ = γ_act · gain · (W − mean) / √max(var · fan_in, eps), for each output by itself; W and gain learned.

    With independent inputs act(z), z ~ N(0, 1), every output then has mean 0 and variance gain², so that a
    network without a norm keeps its signal. Here var is the biased variance of an output's fan_in weights,
    gain starts at 1, and γ_act = 1 / √Var[act(z)]: √(2 / (1 − 1/π)) = 1.7129 for ReLU. `activation` is the
    one before the layer. Weights that are assigned set W, and put gain back to 1.

    Pitfalls: γ_act has to be that of the activation in use. The classifier stays as it is. Without a norm,
    large batches need adaptive clipping of the gradients.

    Raises BadInput where an output has one input, as Ŵ would be 0 for good.

    Source: Brock et al. 2021, equation 1. Their code multiplies the activation by γ_act instead, which also
    reaches the classifier, and estimates γ_act from samples (1.71396 for ReLU); it has the bound on
    var · fan_in, which the equation leaves out.
    """
    require_inputs(layer, "standardized")
    scaled = ScaledStandardizedWeight(check_eps(eps), activation)
    parametrize.register_parametrization(layer, "weight", scaled)


def activation_gain(activation: str) -> float:
    """γ_act = 1 / √Var[act(z)], z ~ N(0, 1): in closed form, or by the trapezoidal rule in float64."""
    if activation == "identity":
        return 1.0
    if activation == "relu":
        return math.sqrt(2 / (1 - 1 / math.pi))
    # For a smooth function the rule converges faster than any power of the step.
    z = torch.linspace(-12, 12, 2401, dtype=torch.float64, device="cpu")
    weights = torch.softmax(-z.square() / 2, 0)
    smooth: dict[str, Callable[[Tensor], Tensor]] = {
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "gelu": F.gelu,
    }
    values = smooth[activation](z)
    mean = (weights * values).sum()
    return float((weights * (values - mean).square()).sum().rsqrt())


class ScaledStandardizedWeight(nn.Module):
    """The map from W (outputs first) and gain to Ŵ; see :func:`scaled_weight_standardization`."""

    def __init__(self, eps: float, activation: str) -> None:
        super().__init__()
        self.eps, self.activation = eps, activation
        self.scale = activation_gain(activation)

    def forward(self, weight: Tensor, gain: Tensor) -> Tensor:
        wide = widen(weight)
        var, mean = torch.var_mean(wide, tuple(range(1, weight.ndim)), correction=0, keepdim=True)
        fan_in = weight[0].numel()
        factor = self.scale * gain.view_as(mean) * (var * fan_in).clamp_min(self.eps).rsqrt()
        return ((wide - mean) * factor).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight, weight.new_ones(weight.shape[0])

    def extra_repr(self) -> str:
        return f"eps={self.eps}, activation={self.activation!r}"
