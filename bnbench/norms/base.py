"""The contract of a normalization layer: the @norm decorator, its traits, its hooks and build_norm."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from bnbench.registry import BadInput, Registry, check_options, nearest

Layer = TypeVar("Layer", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class NormEntry:
    """A normalization layer and its traits. A trait is a promise: `bnbench.testing` tests every one.

    A norm that takes a reference batch has its traits with that batch given, and left as it is.

    layer: called as `layer(num_features, dim, **options)`; dim is the number of spatial axes, 0 to 3.
    paper: where the layer comes from.
    reference: `reference(x, **options)`, the train-mode output of a fresh layer for a float64 x (N, C, *),
        written as a formula; None where the layer has no short one.
    batch_dependent: in training, the output of a sample depends on the other samples.
    running_stats: training updates buffers, and evaluation reads them.
    replaces_activation: the layer is nonlinear by itself; no activation belongs after it.
    scale_invariant: the input times a positive number gives the same output (in training, eps to 0).
    centres: the input plus any constant a channel gives the same output (in training), so that a bias
        before the layer is dead.
    permutation_equivariant: in training, permuted samples give equally permuted outputs.
    exact_gradient: the backward pass is the derivative of the forward pass.
    vmap: replicas may be stacked and run by `torch.vmap`.
    min_dim: the least number of spatial axes that the layer takes.
    examples: options that the contract is tested with; each must suit 8 samples of 8 channels.
    """

    name: str
    layer: Callable[..., nn.Module]
    paper: str
    reference: Callable[..., Tensor] | None
    batch_dependent: bool
    running_stats: bool
    replaces_activation: bool
    scale_invariant: bool
    centres: bool
    permutation_equivariant: bool
    exact_gradient: bool
    vmap: bool
    min_dim: int
    examples: tuple[Mapping[str, Any], ...]


NORMS: Registry[NormEntry] = Registry("norm", "bnbench.norms")

TRAITS = tuple(
    field.name
    for field in fields(NormEntry)
    if field.name not in ("name", "layer", "paper", "reference", "examples")
)


def norm(
    name: str,
    *,
    paper: str,
    batch_dependent: bool,
    reference: Callable[..., Tensor] | None = None,
    running_stats: bool = False,
    replaces_activation: bool = False,
    scale_invariant: bool = True,
    centres: bool = False,
    permutation_equivariant: bool = True,
    exact_gradient: bool = True,
    vmap: bool = True,
    min_dim: int = 0,
    examples: tuple[Mapping[str, Any], ...] = ({},),
) -> Callable[[Layer], Layer]:
    """Register a normalization layer; :class:`NormEntry` says what each trait promises.

    Raises BadInput where the name is taken.
    """

    def register(layer: Layer) -> Layer:
        entry = NormEntry(
            name=name,
            layer=layer,
            paper=paper,
            reference=reference,
            batch_dependent=batch_dependent,
            running_stats=running_stats,
            replaces_activation=replaces_activation,
            scale_invariant=scale_invariant,
            centres=centres,
            permutation_equivariant=permutation_equivariant,
            exact_gradient=exact_gradient,
            vmap=vmap,
            min_dim=min_dim,
            examples=examples,
        )
        NORMS.add(name, entry)
        return layer

    return register


# Hooks: what a norm may offer beyond forward(). A caller asks with isinstance; nothing need be inherited.


class _Hook(ABC):  # noqa: B024 (its heirs are abstract)
    """What a class offers that has all methods of the hook.

    ABC keeps the answer for each class. A Protocol looks at every layer anew, and a row asks 200 times.
    """

    @classmethod
    def __subclasshook__(cls, kind: type) -> Any:
        # A layer that inherits from a hook has no abstract methods, and is no hook itself.
        methods = cls.__abstractmethods__
        return all(hasattr(kind, method) for method in methods) if methods else NotImplemented


class KeepsMoments(_Hook):
    """A norm whose running statistics can be set to those of a population (precise statistics).

    While its attribute `frozen`, if it has one, is true, its statistics are left as they are.
    """

    @abstractmethod
    def batch_moments(self, x: Tensor) -> tuple[Tensor, ...]:
        """Float64 means over the input, one tensor a quantity; averages of them over batches, weighted by
        the number of samples, determine the buffers."""

    @abstractmethod
    def set_moments(self, *means: Tensor) -> None:
        """Write the buffers from these averages, in place."""


class FollowsProgress(_Hook):
    """A norm with a ramp over the training."""

    @abstractmethod
    def set_progress(self, fraction: float) -> None:
        """Called with the fraction of the training that is done, 0 to 1: before each training step, and
        before the evaluations in between and at the end."""


class TakesReference(_Hook):
    """A norm whose statistics come from a reference batch.

    reference_size: how many samples it should have; None leaves it to the caller.
    reference_rows: so many samples at the head of the input of forward() are the reference: they give the
        statistics, and gradients flow through these; 0 where the input has none. The caller sets it.
    """

    reference_size: int | None
    reference_rows: int

    @abstractmethod
    def set_reference(self, x: Tensor) -> None:
        """Take the statistics of x, the layer's input for the reference batch, as constants."""


def build_norm(name: str, num_features: int, dim: int = 2, **options: Any) -> nn.Module:
    """Build a registered normalization layer for inputs (N, num_features, *), with dim axes in *.

    Raises BadInput for an unknown name or option, a wrong type, or a value that the layer refuses.
    """
    entry = NORMS[name]
    if isinstance(num_features, bool) or not isinstance(num_features, int) or num_features < 1:
        raise BadInput(
            f"norm {name!r}: num_features must be a whole number of at least 1, not {num_features!r}"
        )
    if isinstance(dim, bool) or dim not in (0, 1, 2, 3):
        raise BadInput(f"norm {name!r}: dim, the number of spatial axes, must be 0, 1, 2 or 3, not {dim!r}")
    check_options(f"norm {name!r}", entry.layer, options)
    try:
        return entry.layer(num_features, dim, **options)
    except ValueError as error:
        raise BadInput(f"norm {name!r}: {error}") from error


def norm_names(**traits: object) -> tuple[str, ...]:
    """List the norms that have all the given traits, as in `norm_names(batch_dependent=False)`."""
    for trait in traits:
        if trait not in TRAITS:
            raise BadInput(f"no norm trait named {trait!r}{nearest(trait, TRAITS)}")
    return tuple(
        name
        for name, entry in NORMS.items()
        if all(getattr(entry, trait) == value for trait, value in traits.items())
    )


def normalization_batch_size(name: str, batch_size: int, **options: Any) -> int | None:
    """How many samples share one set of statistics in training; None where the norm uses no batch statistics.

    batch_size is the number of samples of one process; for `sync_batch`, that of all together. A layer with
    a rule of its own has it as the static method `normalization_batch_size(batch_size, **options)`.
    Raises BadInput where that batch cannot be trained on.
    """
    entry = NORMS[name]
    check_options(f"norm {name!r}", entry.layer, options)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise BadInput(f"batch_size must be a whole number of at least 1, not {batch_size!r}")
    rule = getattr(entry.layer, "normalization_batch_size", None)
    if rule is not None:
        return cast(int | None, rule(batch_size, **options))
    if not entry.batch_dependent:
        return None
    if batch_size < 2:
        raise BadInput(f"norm {name!r} cannot train on a batch of 1 sample; it needs at least 2")
    return batch_size


# What several norms share. Each norm is one file and none imports another, so it lives here, or where it is
# about running averages, in averages.py.


def check_eps(eps: float) -> float:
    """Return eps. Raises BadInput unless it is positive and finite."""
    if not 0 < eps < math.inf:
        raise BadInput(f"eps must be a positive number, not {eps!r}")
    return eps


def check_share(name: str, value: float) -> float:
    """Return the value. Raises BadInput, with the name of the option, unless it is from 0 to 1."""
    if not 0 <= value <= 1:
        raise BadInput(f"{name} must be a number from 0 to 1, not {value!r}")
    return value


def require_axes(dim: int, others: str = "'layer' and 'group' do") -> None:
    """Raise BadInput without spatial axes; `others` says which norms take such inputs."""
    if dim < 1:
        raise BadInput(f"it needs spatial axes, and dim=0 has none; {others} without")


def require_positions(x: Tensor) -> None:
    """Raise ValueError where a channel of a sample of x (N, C, *) is a single value."""
    if x.shape[2:].numel() == 1:
        raise ValueError(f"one position a channel cannot be normalized, and the input is {tuple(x.shape)}")


def divisors(number: int) -> tuple[int, ...]:
    """List the divisors of a positive whole number in rising order."""
    return tuple(divisor for divisor in range(1, number + 1) if number % divisor == 0)


def choose_num_groups(num_features: int, num_groups: int | None) -> int:
    """Return num_groups, or for None gcd(32, C/4): 32 where the channels allow it, of at least 4 channels.

    Where 4 does not divide C, the part of this that divides C (18 channels: 2 groups).
    Raises BadInput where num_groups does not divide num_features.
    """
    if num_groups is None:
        return math.gcd(32, max(num_features // 4, 1), num_features)
    if num_groups < 1 or num_features % num_groups:
        known = ", ".join(str(divisor) for divisor in divisors(num_features))
        raise BadInput(
            f"num_groups={num_groups} does not divide {num_features} channels; what would do: {known}"
        )
    return num_groups


def add_affine(
    layer: nn.Module, num_features: int, *, gamma: bool, beta: bool, gamma_init: float = 1.0
) -> None:
    """Give a layer the parameters weight (γ, at gamma_init) and bias (β, zeros), or None for what it lacks.

    Raises BadInput for a gamma_init without a γ.
    """
    if not gamma and gamma_init != 1.0:
        raise BadInput("affine=False leaves no scale to set; leave out gamma_init")
    weight = torch.full((num_features,), float(gamma_init))
    layer.register_parameter("weight", nn.Parameter(weight) if gamma else None)
    layer.register_parameter("bias", nn.Parameter(torch.zeros(num_features)) if beta else None)


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Shape C values so that they broadcast over x (N, C, *)."""
    return values.view(-1, *(1,) * (x.ndim - 2))


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """Shape C values so that they broadcast over x (N, C, *), with a view of them for each sample.

    Their gradient is then summed over positions before it is over samples, which compiled code does beside
    its other sums over positions: EvoNorm-B0 takes 1.2 times as long as batch norm, and 1.7 times without.
    """
    return per_channel(values, x).expand(x.shape[0], *(-1,) * (x.ndim - 1))


def apply_affine(
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: Callable[[Tensor, Tensor], Tensor] = per_channel,
) -> Tensor:
    """γ y + β for y (N, C, *), or y where there is neither; `shape` is `per_channel` or `per_sample`."""
    if weight is None or bias is None:
        return y
    return torch.addcmul(shape(widen(bias), y), y, shape(widen(weight), y))


def widen(x: Tensor) -> Tensor:
    """Return x in a type that holds statistics: float32 in place of bfloat16 and float16."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def match(x: Tensor, weight: Tensor | None) -> Tensor:
    """Return x in the type of the weight, since not every kernel takes two types."""
    return x if weight is None else x.to(weight.dtype)


def channels_adjacent(x: Tensor) -> bool:
    """Whether the channels of a position lie side by side in memory (channels_last, or no spatial axes)."""
    return x.ndim == 2 or x.stride(1) == 1


def show_options(layer: nn.Module) -> str:
    """Write num_features and every option of a layer, as `extra_repr` does; attributes bear their names."""
    options = (
        parameter.name
        for parameter in inspect.signature(type(layer)).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    )
    return ", ".join([str(layer.num_features), *(f"{name}={getattr(layer, name)!r}" for name in options)])


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean square of each channel of x (N, C, *), in float64."""
    dims = [0, *range(2, x.ndim)]
    wide = x.detach().double()
    return wide.mean(dims), wide.square().mean(dims)


def set_mean_and_variance(layer: nn.Module, mean: Tensor, mean_square: Tensor) -> None:
    """Write running_mean and the population's (biased) variance E[x²] − E[x]² into running_var."""
    cast(Tensor, layer.running_mean).copy_(mean)
    cast(Tensor, layer.running_var).copy_((mean_square - mean.square()).clamp_min(0.0))
