"""Precise statistics: running averages replaced by population statistics of given batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnbench.norms.base import KeepsMoments, channel_moments, set_mean_and_variance
from bnbench.registry import BadInput


def recalibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Set the running statistics of every normalization layer to those of the population in `batches`.

    The model runs over the batches with its weights as they are: layers with running statistics normalize
    by the batch, all else (dropout too) is in evaluation mode. From averages over the batches, weighted by
    their samples, mean = E[x] and variance = E[x²] − E[x]² of each layer's input (the law of total
    variance; biased, so without Bessel's correction), summed in float64 and over all processes of
    torch.distributed; each of these needs the same model and at least one batch, and as many as the others
    where layers or wrappers communicate in forward(). A batch is a tensor, or a tuple or list that begins
    with it. Takes the norms of this package that keep moments, and torch's BatchNorm, where they are not
    frozen; without any, nothing runs.

    Nothing else changes: weights, gradients, other buffers, num_batches_tracked, train and eval flags and
    torch's random state stay, also where a batch raises.
    Raises BadInput without a batch, and what a layer raises on a batch that it cannot train on.
    Source: Wu & Johnson 2021 (arXiv:2105.07576), section 3, PreciseBN.
    """
    layers = _layers_with_moments(model)
    if not layers:
        return
    sums: list[list[Tensor]] = [[] for _ in layers]
    device = next(itertools.chain(model.parameters(), model.buffers())).device
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng([device.index] if device.type == "cuda" else []))
        stack.enter_context(buffers_restored(model))
        stack.enter_context(_modes_restored(model))
        model.eval()
        for layer, layer_sums in zip(layers, sums, strict=True):
            layer.training = True
            stack.callback(layer.register_forward_pre_hook(_collector(layer_sums)).remove)
        for batch in batches:
            model(_inputs(batch).to(device))
    if not any(sums):
        raise BadInput("recalibration needs at least one batch, and there was none")
    for layer, layer_sums in zip(layers, sums, strict=True):
        if layer_sums:
            means = _means_over_processes(layer_sums)
            if isinstance(layer, KeepsMoments):
                layer.set_moments(*means)
            else:
                set_mean_and_variance(layer, *means)


@contextmanager
def precise_statistics(model: nn.Module, batches: Iterable[Any]) -> Iterator[nn.Module]:
    """Recalibrate a model for the duration of a `with` block, then put its buffers back."""
    with buffers_restored(model):
        recalibrate(model, batches)
        yield model


def has_moments(model: nn.Module) -> bool:
    """Whether a model has running statistics that :func:`recalibrate` would set."""
    return bool(_layers_with_moments(model))


def _layers_with_moments(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in model.modules()
        if not getattr(module, "frozen", False)
        and (
            isinstance(module, KeepsMoments)
            or (isinstance(module, _BatchNorm) and isinstance(module.running_mean, Tensor))
        )
    ]


def _inputs(batch: object) -> Tensor:
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(inputs, Tensor):
        raise BadInput(
            f"a batch must be a tensor, or a tuple or list that begins with one, not {type(batch)}"
        )
    return inputs


def _collector(sums: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A hook that adds a layer's moments, times the samples, to `sums`; the first entry counts samples."""

    def collect(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        x: Tensor = inputs[0]
        if isinstance(layer, KeepsMoments):
            moments = layer.batch_moments(x)
            # Some norms read their running statistics in training too.
            layer.set_moments(*moments)
        else:
            moments = channel_moments(x)
        samples = moments[0].new_full((), len(x))
        terms = [samples, *(moment * samples for moment in moments)]
        sums[:] = [total + term for total, term in zip(sums, terms, strict=True)] if sums else terms

    return collect


def _means_over_processes(sums: list[Tensor]) -> list[Tensor]:
    if dist.is_available() and dist.is_initialized():
        for total in sums:
            dist.all_reduce(total)
    return [total / sums[0] for total in sums[1:]]


@contextmanager
def buffers_restored(model: nn.Module) -> Iterator[None]:
    """Put all buffers of a model back at the end of a `with` block."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


@contextmanager
def _modes_restored(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
