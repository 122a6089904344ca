"""Internal covariate shift: how a layer's gradient changes when the layers below it take their step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnbench.probes.base import Moment, Probe, probe
from bnbench.probes.passes import (
    Layer,
    Loss,
    check_relative_step,
    leaving_no_trace,
    loss_of,
    norm_of,
    run,
    run_and_watch,
    same_draws,
    train_mode,
    weights_of,
)
from bnbench.probes.trace import Reading
from bnbench.registry import BadInput

MEASURES = ("difference", "relative", "cosine")


@leaving_no_trace
def measure_covariate_shift(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    lr: float,
    layers: int | None = 3,
    relative_step: float = 0.001,
    loss: Loss | None = None,
) -> Reading:
    """How much the gradient of a layer's weights changes when all that is below the layer takes a step.

    For W the weights of a linear map or convolution, b all learned parameters that its input depends on, and
    the loss of the batch in training mode,

        G = ∂loss/∂W,   G′ = the same after b ← b − s ∂loss/∂b, W and everything else being where they were,

        difference: ‖G − G′‖,   relative: ‖G − G′‖ / ‖G‖,   cosine: ⟨G, G′⟩ / (‖G‖ ‖G′‖).

    The step is one of plain gradient descent, whatever the optimizer: of size s = lr, and, with names that
    end in `_common`, of one relative size for all networks, s = relative_step ‖θ‖ / ‖∂loss/∂θ‖ for θ all
    learned parameters. G and G′ see the same batch, random draws and running averages. W of a reparametrized
    layer are the parameters that its weight is computed from.

    layers: so many linear maps, evenly over the depth (3: at 1/4, 1/2 and 3/4 of the way from the first to
        the last), or None for all; never the first, which has nothing below it.
    Values: the means over these layers of `relative`, `cosine`, `relative_common` and `cosine_common`; NaN
    where lr is NaN or a gradient is zero. Series by layer: these, `difference` and `difference_common`.
    Raises BadInput for fewer than 1 layers and for a relative step that is not a positive number.
    Source: Santurkar et al. 2018 (arXiv:1805.11604), Definition 2.1, which is `difference`. It depends on
    the scale of the weights, also where the function that is computed does not: with W ← cW below a norm,
    G ← G/c. The other two do not depend on it.
    """
    _check(layers, relative_step)
    train_mode(model)
    loss = loss_of(model, loss)
    weights = weights_of(model)
    # Buffers too: a norm may read its running averages in training.
    start = [(tensor, tensor.detach().clone()) for tensor in (*weights, *model.buffers())]
    with same_draws():
        output, maps = run_and_watch(model, x)
        found = torch.autograd.grad(loss(output, y), weights, materialize_grads=True)
    gradients = dict(zip(weights, found, strict=True))
    size = norm_of(found)
    steps = {"": lr, "_common": relative_step * norm_of(weights) / size if size else math.nan}

    def gradient_after(step: float, moved: set[nn.Parameter], own: Sequence[nn.Parameter]) -> Tensor:
        with torch.no_grad():
            for tensor, value in start:
                tensor.copy_(value)
            for parameter in moved:
                parameter.sub_(gradients[parameter], alpha=step)
        with same_draws():
            return _as_vector(torch.autograd.grad(loss(run(model, x), y), own, materialize_grads=True))

    series: dict[str, list[float]] = {f"{name}{kind}": [] for kind in steps for name in MEASURES}
    chosen = _spread([layer for layer in maps[1:] if _weights_within(layer.module)], layers)
    for layer in chosen:
        own = _weights_within(layer.module)
        below = _learned_below(layer, gradients.keys()) - set(own)
        before = _as_vector([gradients[weight] for weight in own])
        for kind, step in steps.items():
            after = gradient_after(step, below, own) if math.isfinite(step) else before * math.nan
            for name, number in zip(MEASURES, _compare(before, after), strict=True):
                series[f"{name}{kind}"].append(number)
    return Reading(
        {
            name: statistics.fmean(numbers) if numbers else math.nan
            for name, numbers in series.items()
            if not name.startswith("difference")
        },
        {name: tuple(numbers) for name, numbers in series.items()},
        "layer",
        tuple(layer.name for layer in chosen),
    )


def _check(layers: int | None, relative_step: float) -> None:
    if layers is not None and layers < 1:
        raise BadInput(f"probe 'covariate_shift': layers must be 1 or more, or None for all, not {layers!r}")
    check_relative_step("covariate_shift", relative_step)


def _spread(maps: list[Layer], count: int | None) -> list[Layer]:
    """So many of the linear maps after the first: the k-th is k/(count + 1) of the way to the last."""
    if count is None or count >= len(maps):
        return maps
    places = [math.floor(k * len(maps) / (count + 1) + 0.5) for k in range(1, count + 1)]
    return [maps[place - 1] for place in places]


def _weights_within(module: nn.Module) -> list[nn.Parameter]:
    """The learned parameters that the weight of a linear map is, or is computed from."""
    named = module.named_parameters()
    return [p for name, p in named if p.requires_grad and "bias" not in name.split(".")]


def _learned_below(layer: Layer, learned: Iterable[nn.Parameter]) -> set[nn.Parameter]:
    """The learned parameters that the input of a layer depends on, by the graph of autograd."""
    waiting, seen = [layer.input.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    # A leaf of the graph, and nothing else in it, holds the parameter itself.
    leaves = {id(getattr(node, "variable", None)) for node in seen}
    return {parameter for parameter in learned if id(parameter) in leaves}


def _as_vector(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.detach().flatten() for gradient in gradients]).double()


def _compare(before: Tensor, after: Tensor) -> list[float]:
    """‖G − G′‖, the same over ‖G‖, and the cosine of G and G′."""
    difference, old, new = (before - after).norm(), before.norm(), after.norm()
    relative = (difference / old).where(old > 0, math.nan)
    # Rounding must not make a cosine larger than 1.
    cosine = (before.dot(after) / (old * new)).clamp(-1, 1)
    return torch.stack((difference, relative, cosine)).tolist()


@probe("covariate_shift", passes=10, paper="arXiv:1805.11604")
class CovariateShift(Probe):
    """Internal covariate shift with the learning rate of the moment; see :func:`measure_covariate_shift`."""

    def __init__(self, *, layers: int | None = 3, relative_step: float = 0.001, **schedule: Any) -> None:
        super().__init__(**schedule)
        _check(layers, relative_step)
        self.layers = layers
        self.relative_step = relative_step

    def measure(self, model: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Reading:
        return measure_covariate_shift(
            model,
            x,
            y,
            lr=moment.lr,
            layers=self.layers,
            relative_step=self.relative_step,
            loss=self.given_loss,
        )
