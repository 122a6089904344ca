"""What the norms with a backward pass of their own share: how their functions run, and sums over channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from bnbench.norms.averages import hold
from bnbench.norms.base import widen

# A backward pass that is not a derivative is a torch.autograd.Function, and it may write into a buffer. The
# rule by which torch makes such a function for replicas would not see that. So in all of these every tensor
# has an axis of replicas first, of length 1 where there are none: x (R, N, C, *), values of a channel (R, C).


def run_function(
    function: type[torch.autograd.Function],
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *numbers: float,
) -> Tensor:
    """Run a function on tensors without replicas, in this order.

    constants may come from buffers that have since been moved; `buffers` are those that its backward pass
    writes into.
    """
    if torch.compiler.is_compiling() and any(map(torch._C._functorch.is_batchedtensor, inputs)):
        # Of a function under vmap torch.compile takes the derivative of the forward pass, without a word
        # (torch 2.13). So what runs under vmap is left as it is.
        torch._dynamo.graph_break()
    tensors = (*inputs, *map(hold, constants), *buffers)
    y: Tensor = function.apply(*(tensor[None] for tensor in tensors), *numbers)  # type: ignore[no-untyped-call]
    return y[0]


def run_replicas(
    function: type[torch.autograd.Function],
    info: Any,
    in_dims: tuple[int | None, ...],
    inputs: tuple[Any, ...],
) -> tuple[Tensor, int]:
    """The rule for `torch.vmap` of a function with an axis of replicas: its replicas join that axis.

    Buffers that the function writes into are joined as views of the stacked ones.
    """

    def join(value: Any, dim: int | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        stacked = value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
        return stacked.flatten(0, 1)

    y: Tensor = function.apply(*map(join, inputs, in_dims))  # type: ignore[no-untyped-call]
    return y.reshape(info.batch_size, -1, *y.shape[1:]), 0


def affine_or_identity(layer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """γ and β of a layer, or ones and zeros (C) in the place of those it lacks."""
    weight, bias = layer.weight, layer.bias
    return (
        torch.ones_like(like) if weight is None else widen(cast(Tensor, weight)),
        torch.zeros_like(like) if bias is None else widen(cast(Tensor, bias)),
    )


def spread(values: Tensor, x: Tensor) -> Tensor:
    """Shape values (R, C) of channels, or (R, N, C), so that they broadcast over x (R, N, C, *)."""
    if values.ndim == 2:
        values = values[:, None]
    return values.reshape(*values.shape, *(1,) * (x.ndim - 3))


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale · x + shift in one pass, in the type of x."""
    return torch.addcmul(spread(shift, x), widen(x), spread(scale, x)).to(x.dtype)


def sum_channels(x: Tensor) -> Tensor:
    """The sums of x (R, N, C, *) over samples and positions, (R, C)."""
    return x.sum([1, *range(3, x.ndim)])
