"""The contract of a normalization layer: the @norm decorator, its traits, its hooks and build_norm."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
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


# What several norms share. Each norm is one file and none imports another, so it lives here.


def check_eps(eps: float) -> float:
    """Return eps. Raises BadInput unless it is positive and finite."""
    if not 0 < eps < math.inf:
        raise BadInput(f"eps must be a positive number, not {eps!r}")
    return eps


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


class BatchStatistics(nn.Module):
    """What the layers with batch statistics share: γ, β, running averages and evaluation by them.

    y = γ (x − running_mean) / √(running_var + eps) + β in evaluation, x (N, C, *). A training step moves
    an average by new = (1 − momentum) old + momentum batch; momentum None averages all steps alike.
    running_var holds the unbiased variance. State and names are those of torch.nn.BatchNorm.
    """

    num_features: int
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, num_features: int, *, eps: float, momentum: float | None, affine: bool) -> None:
        super().__init__()
        if momentum is not None and not 0 <= momentum <= 1:
            raise BadInput(f"momentum must be a number from 0 to 1, or None, not {momentum!r}")
        self.num_features = num_features
        self.eps = check_eps(eps)
        self.momentum = momentum
        self.affine = affine
        add_affine(self, num_features, gamma=affine, beta=affine)
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    extra_repr = show_options

    def normalize_by_batch(self, x: Tensor) -> Tensor:
        """Normalize by the statistics of x, and move the running averages towards them."""
        if self.momentum is not None and widen(self.running_mean) is self.running_mean:
            self.num_batches_tracked.add_(1)
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps
            )
        # The kernel wants its rate as a number from the host, and 1 / num_batches_tracked is on the device;
        # it also keeps statistics in the type of the averages, and bfloat16 is too short for them.
        y, mean, var = self.normalize_chunks(x)
        self.update_averages(mean, var)
        return y

    def normalize_chunks(self, x: Tensor, chunks: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Normalize each channel of x (N, chunks · C, *) by itself, without touching the running averages.

        x holds chunks of a batch side by side. Returns the output, and the means and unbiased variances.
        """
        mean = torch.zeros_like(widen(self.running_mean)).repeat(chunks)
        var = torch.zeros_like(widen(self.running_var)).repeat(chunks)
        weight = None if self.weight is None else widen(self.weight).repeat(chunks)
        bias = None if self.bias is None else widen(self.bias).repeat(chunks)
        return F.batch_norm(x, mean, var, weight, bias, True, 1.0, self.eps), mean, var

    def normalize_by_averages(self, x: Tensor) -> Tensor:
        """Normalize by the running averages."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    @torch.no_grad()
    def update_averages(self, mean: Tensor, var: Tensor) -> None:
        """Take one step's mean and unbiased variance into the running averages."""
        self.num_batches_tracked.add_(1)
        for average, batch in ((self.running_mean, mean), (self.running_var, var)):
            if self.momentum is None:
                average.add_((batch - average) / self.num_batches_tracked)
            else:
                average.mul_(1 - self.momentum).add_(batch, alpha=self.momentum)

    def variance_over_batch(
        self, x: Tensor, mean: Tensor, var: Tensor, origin: Tensor | float = 0.0
    ) -> Tensor:
        """The biased variance of each channel over the batch, of which the running averages take their share.

        mean and var are the biased moments (N, C, 1, ...) of each channel of each sample of x (N, C, *), the
        means measured from an origin that the samples share. In evaluation it is running_var. The shape is
        that of var. Raises ValueError in training on one value a channel.
        """
        if not self.training:
            return per_sample(widen(self.running_var), x)
        count = x.numel() // self.num_features
        if count < 2:
            raise ValueError(
                f"training needs more than one value a channel, and the input is {tuple(x.shape)}"
            )
        variance = var.mean(0) + mean.var(0, correction=0)
        self.update_averages((origin + mean.mean(0)).flatten(), variance.flatten() * (count / (count - 1)))
        return variance.expand_as(var)

    def batch_moments(self, x: Tensor) -> tuple[Tensor, ...]:
        return channel_moments(x)

    def set_moments(self, *means: Tensor) -> None:
        set_mean_and_variance(self, *means)
