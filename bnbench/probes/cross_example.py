"""Cross-example gradient: whether the loss of one example depends on the input of another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bnbench.probes.base import Moment, Probe, probe
from bnbench.probes.passes import Loss, leaving_no_trace, loss_of, run, train_mode
from bnbench.probes.trace import Reading
from bnbench.registry import BadInput


@leaving_no_trace
def measure_cross_example(
    model: nn.Module, x: Tensor, y: Tensor, *, examples: int = 4, loss: Loss | None = None
) -> Reading:
    """The gradient of an example's loss with respect to the inputs of the others, in training mode.

    For the losses l_i of the first `examples` samples of a batch (of all, where it has fewer),

        ratio = mean over i of ‖(∂l_i/∂x_j) for all j ≠ i‖ / ‖∂l_i/∂x_i‖,
        dependent = max |∂l_i/∂x_j| over i, j ≠ i and the numbers of x_j.

    Both are exactly 0 where the output of a sample depends on no other one, and above 0 where it does, as
    under batch statistics. An example whose loss has no gradient of its own is no part of the ratio, which is
    NaN where none is left.
    Raises BadInput for a batch of one sample, inputs that are not floating-point numbers, and no examples.
    """
    _check(examples)
    if len(x) < 2 or not x.is_floating_point():
        raise BadInput(
            "probe 'cross_example' needs two or more samples of floating-point numbers,"
            f" not {len(x)} of {str(x.dtype).removeprefix('torch.')}"
        )
    train_mode(model)
    inputs = x.detach().clone().requires_grad_()
    output, of = run(model, inputs), loss_of(model, loss)
    ratios, largest = [], []
    for i in range(min(examples, len(x))):
        value = of(output[i : i + 1], y[i : i + 1])
        (found,) = torch.autograd.grad(value, inputs, retain_graph=True)
        own = found[i].double().norm()
        others = torch.cat([found[:i], found[i + 1 :]]).double()
        ratios.append(others.norm() / own)
        largest.append(others.abs().max())
    row = torch.stack(ratios)
    return Reading(
        {"ratio": row[row.isfinite()].mean().item(), "dependent": torch.stack(largest).max().item()}
    )


def _check(examples: int) -> int:
    if examples < 1:
        raise BadInput(f"probe 'cross_example': examples must be 1 or more, not {examples!r}")
    return examples


@probe("cross_example", passes=3.5)
class CrossExample(Probe):
    """Whether one example's loss depends on another's input; see :func:`measure_cross_example`."""

    def __init__(self, *, examples: int = 4, **schedule: Any) -> None:
        super().__init__(**schedule)
        self.examples = _check(examples)

    def measure(self, model: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Reading:
        return measure_cross_example(model, x, y, examples=self.examples, loss=self.given_loss)
