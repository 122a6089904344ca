"""Evaluation in a probe: a sample cut into training batches, and outputs by the statistics of each batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnbench.norms.recalibrate import has_moments, recalibrate
from bnbench.norms.reference import layers_with_reference, refresh_reference
from bnbench.probes.passes import run
from bnbench.registry import BadInput


def training_batches(name: str, x: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    """Cut samples into batches of a size, in their order; what is left over is left out.

    Raises BadInput, in the name of a probe, where there are fewer than two batches.
    """
    if batch_size < 1 or len(x) < 2 * batch_size:
        raise BadInput(
            f"probe {name!r} needs two batches of at least 1 sample, not {len(x)} samples in batches of"
            f" {batch_size!r}; give it more samples"
        )
    return torch.split(x[: len(x) // batch_size * batch_size], batch_size)


def evaluation_mode(model: nn.Module) -> None:
    """Running averages, no dropout; norms with a reference batch have its statistics as they are now."""
    model.eval()
    layers, reference = layers_with_reference(model), getattr(model, "reference", None)
    if layers and isinstance(reference, Tensor):
        refresh_reference(model, layers, reference)


def outputs_by_batch(model: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """What a model gives for each batch by the statistics of that batch, all else as in evaluation.

    The model, in evaluation mode, then has the precise statistics of all the batches together: these are
    the passes of :func:`bnbench.norms.recalibrate`. One without running statistics is evaluated.
    """
    if not has_moments(model):
        with torch.no_grad():
            return [run(model, batch) for batch in batches]
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        outputs.append(output)

    hook = model.register_forward_hook(keep)
    try:
        recalibrate(model, batches)
    finally:
        hook.remove()
    return outputs
