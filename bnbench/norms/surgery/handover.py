"""The state of an old norm given to the new one in its place, and the two compared."""

from __future__ import annotations

import functools
from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnbench.norms.base import set_mean_and_variance
from bnbench.norms.surgery.evaluation import (
    copy_for_evaluation,
    evaluates_as_batch_norm,
    first_float,
    random_input,
    running_statistics,
    takes_moments,
)
from bnbench.norms.surgery.layers import TORCH_BATCH_NORMS, Site, foreign, over_last_axis, registered_name
from bnbench.registry import BadInput


@dataclass(frozen=True)
class Kept:
    """The names of what a new layer took over, of what it has afresh, and of what it has not."""

    kept: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]


def tensors_of(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a layer by name, also those that its state_dict has not."""
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


@torch.no_grad()
def hand_over(old: nn.Module, new: nn.Module, chosen: Set[str]) -> Kept:
    """Give γ, β and running statistics to a new layer; between like norms all that has the same name.

    A Parameter stays the same object where both learn it. Statistics that the new layer keeps in another
    form are computed. What is in `chosen` was chosen for the new layer, and is left as it is.
    """
    old_is_batch, had, has = evaluates_as_batch_norm(old), tensors_of(old), tensors_of(new)
    alike = type(old) is type(new) or (old_is_batch and evaluates_as_batch_norm(new))
    kept: set[str] = set()
    if old_is_batch and (type(new) in TORCH_BATCH_NORMS or takes_moments(new)):
        mean, var = (values.to(first_float(new).device) for values in running_statistics(old))
        set_moments = getattr(new, "set_moments", functools.partial(set_mean_and_variance, new))
        set_moments(mean, var + mean.square())
        kept |= {name for name in has if name.startswith("running_")}
    names = set(had) if alike else {"weight", "bias"}
    if alike or not isinstance(old, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d):
        # Instance norm's averages are those of its samples' variances, without that between samples.
        names |= {"running_mean", "running_var"}
    for name in sorted((names & had.keys() & has.keys()) - chosen):
        if had[name].shape == has[name].shape:
            _give(new, name, had[name], has[name])
            kept.add(name)
    # All that learned may learn on; what did not learn at all stays so.
    learned = [parameter.requires_grad for parameter in old.parameters()]
    if learned and not any(learned):
        new.requires_grad_(False)
    return Kept(
        kept=tuple(name for name in has if name in kept),
        new=tuple(name for name in has if name not in kept),
        dropped=tuple(name for name in had if name not in has),
    )


def _give(new: nn.Module, name: str, value: Tensor, place: Tensor) -> None:
    path, _, last = name.rpartition(".")
    holder = new.get_submodule(path)
    if not isinstance(place, nn.Parameter):
        # Not copied into the place, which has the type of the parameters.
        setattr(holder, last, value.detach().clone())
    elif isinstance(value, nn.Parameter):
        holder.register_parameter(last, value)
    else:
        place.copy_(value)


def must_agree(old: nn.Module, new: nn.Module, name: str) -> bool:
    """Whether a new layer of this registered name, with the old one's state, must evaluate as the old one."""
    if evaluates_as_batch_norm(old):
        return evaluates_as_batch_norm(new)
    known = foreign(old)
    return known is not None and known.twin == name and getattr(old, "running_mean", None) is None


@torch.no_grad()
def compare(site: Site, new: nn.Module) -> float:
    """The difference of the evaluations of two layers, in units of the greatest output.

    Raises BadInput where it is greater than rounding explains.
    """
    old = site.layer
    # Of the two, a class of torch may insist on a number of axes.
    x = random_input(old if foreign(new) is None else new)
    if evaluates_as_batch_norm(old):
        mean, var = (values.view(1, -1, *(1,) * (x.ndim - 2)) for values in running_statistics(old))
        x = mean + x * (var + old.eps).sqrt()  # type: ignore[operator]
    if over_last_axis(old):
        x = x.movedim(1, -1)
        if registered_name(new) is not None:
            # It stands there by itself only where the input has two axes.
            x = x.flatten(0, -2)
    before, after = copy_for_evaluation(old)(x), copy_for_evaluation(new)(x)
    difference = float((before - after).abs().max() / before.abs().max().clamp_min(1.0))
    # Not `>`, since NaN must not pass. A statistic that is kept in another form is rounded once more.
    if not difference <= 16 * torch.finfo(first_float(old, new).dtype).eps:
        raise BadInput(
            f"{site.path}: evaluation must stay the same, and that of {type(new).__name__} differs from"
            f" that of {type(old).__name__} by {difference:.1e} of its greatest output; nothing was changed"
        )
    return difference
