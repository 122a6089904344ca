"""Reference batches: norms that take one have its statistics as the network makes them at each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bnbench.norms.base import TakesReference
from bnbench.registry import BadInput


def layers_with_reference(model: nn.Module) -> list[TakesReference]:
    """List the norms of a model that take a reference batch."""
    return [module for module in model.modules() if isinstance(module, TakesReference)]


def reference_size(layers: Sequence[TakesReference], default: int) -> int:
    """How many samples the reference of a model has. Raises BadInput where its layers differ in that."""
    sizes = {default if layer.reference_size is None else layer.reference_size for layer in layers}
    if len(sizes) != 1:
        given = " and ".join(map(str, sorted(sizes)))
        raise BadInput(f"reference_size is {given} in one model; give all its layers the same")
    return sizes.pop()


def run_with_reference(
    model: Callable[[Tensor], Tensor], layers: Sequence[TakesReference], reference: Tensor, x: Tensor
) -> Tensor:
    """The model's output for x, with each layer's statistics from the reference, and gradients through both.

    The reference (R, *) runs at the head of the batch x (N, *), so every sample meets the same network at the
    same moment: where there is dropout, the reference is dropped as the batch is, since its statistics are to
    be those of what the batch becomes. A layer of the model that mixes samples in another way mixes the
    reference in.
    """
    with _rows_of_reference(layers, len(reference)):
        return model(torch.cat([reference, x]))[len(reference) :]


@torch.no_grad()
def refresh_reference(model: nn.Module, layers: Sequence[TakesReference], reference: Tensor) -> None:
    """Give each layer the statistics of the reference under the weights as they are, for an evaluation.

    All is in evaluation mode (no dropout), and modes are put back. So an evaluation is the function that the
    next training step without dropout would compute.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with _rows_of_reference(layers, len(reference)):
            model(reference)
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _rows_of_reference(layers: Sequence[TakesReference], rows: int) -> Iterator[None]:
    for layer in layers:
        layer.reference_rows = rows
    try:
        yield
    finally:
        for layer in layers:
            layer.reference_rows = 0
