"""Passes through a model that leave no trace in it: what probes measure with."""

from __future__ import annotations

import contextlib
import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnbench.models.base import LINEAR_MAPS
from bnbench.registry import BadInput

Loss = Callable[[Tensor, Tensor], Tensor]


#: What a module's own code may set on the way and is put back. Others, such as hooks, are not a module's.
_PLAIN = (bool, int, float, str, type(None))
#: The models that are being left untouched at this moment.
_guarded: ContextVar[frozenset[int]] = ContextVar("guarded", default=frozenset())
_P = ParamSpec("_P")
_R = TypeVar("_R")


@contextmanager
def untouched(model: nn.Module) -> Iterator[nn.Module]:
    """Leave a model and all random numbers as they were: whatever happens inside is undone.

    Put back are the values of parameters and buffers, the modes and other plain attributes of every module,
    and the random states of Python, NumPy and torch. Inside, gradients are enabled, autocast is off, and
    compiled modules run eagerly, so that hooks see every layer.
    """
    tensors = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    device = tensors[0][0].device if tensors else torch.device("cpu")
    guarded = _guarded.set(_guarded.get() | {id(model)})
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with (
            same_draws(),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            torch.compiler.set_stance("force_eager"),
        ):
            yield model
    finally:
        _guarded.reset(guarded)
        random.setstate(python)
        np.random.set_state(numpy)
        with torch.no_grad():
            for tensor, value in tensors:
                # What was not written to need not be written back, and keeps its version for autograd.
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
        for module, kept in buffers:
            module._buffers.update(kept)
        for now, before in attributes:
            for name in now.keys() - before.keys():
                del now[name]
            now.update((name, value) for name, value in before.items() if isinstance(value, _PLAIN))


def leaving_no_trace(measure: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function of a model, its first argument: it runs :func:`untouched`, or its caller does."""

    @functools.wraps(measure)
    def measured(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        model = cast(nn.Module, args[0])
        with contextlib.nullcontext() if id(model) in _guarded.get() else untouched(model):
            return measure(*args, **kwargs)

    return measured


def train_mode(model: nn.Module) -> None:
    """Batch statistics and dropout, as in training; layers that their owner froze stay so.

    A model that is in training mode is as its owner wants it. Another one is put there.
    """
    if not model.training:
        model.train()


@contextmanager
def same_draws() -> Iterator[None]:
    """Draw the same random numbers in every such block: the random state is put back at its end."""
    # Asking a card that nobody uses for its random state would start it.
    cards = range(torch.cuda.device_count()) if torch.cuda.memory_allocated() else []
    with torch.random.fork_rng(cards):
        yield


def run(model: nn.Module, x: Tensor) -> Tensor:
    """The output for a batch, as the model computes it in a training step.

    A module of ours whose norms take a reference batch has its own way for that, `run_training_batch`.
    """
    own = getattr(model, "run_training_batch", None)
    output = own(x) if own is not None and model.training else model(x)
    if not isinstance(output, Tensor):
        raise BadInput(f"{type(model).__name__} gives a {type(output).__name__}; probes need one tensor")
    return output


def loss_of(model: nn.Module, loss: Loss | None) -> Loss:
    """The loss asked for, else the model's own method `loss(output, y)`, else cross-entropy in nats."""
    own = getattr(model, "loss", None)
    return loss or (own if callable(own) else F.cross_entropy)


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are learned. Raises BadInput where there are none."""
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise BadInput(f"{type(model).__name__} learns nothing: all its parameters are frozen")
    return found


def gradients_at(model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, list[Tensor]]:
    """The loss of a batch and its gradients with respect to :func:`weights_of`, unused ones as zeros."""
    value = loss(run(model, x), y)
    gradients = torch.autograd.grad(value, weights_of(model), materialize_grads=True)
    return value.detach(), list(gradients)


@dataclass(frozen=True)
class Layer:
    """A linear map or convolution that ran: its name, its input h and its output a = W h + b."""

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor


def run_and_watch(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Layer]]:
    """The output for a batch, and the linear maps and convolutions in the order in which they first ran.

    The last of them is the output layer. Inputs and outputs are part of the graph of the output.
    """
    seen: list[Layer] = []

    def keep(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if all(layer.module is not module for layer in seen):
            seen.append(Layer(name, module, inputs[0], output))
        # A copy goes on, so that an activation in place does not change what is kept.
        return output.clone()

    with watching(model, is_linear_map, keep):
        output = run(model, x)
    check_seen(model, seen)
    return output, seen


def is_linear_map(module: nn.Module) -> bool:
    """Whether a module is a linear map or a convolution."""
    return isinstance(module, LINEAR_MAPS)


def check_seen(model: nn.Module, seen: Sized) -> None:
    """Raise BadInput where no linear map or convolution has run."""
    if not seen:
        raise BadInput(f"{type(model).__name__} has no linear map or convolution that a probe could watch")


@contextmanager
def watching(
    model: nn.Module,
    wanted: Callable[[nn.Module], bool],
    keep: Callable[..., Any],
    *,
    before: bool = False,
) -> Iterator[None]:
    """Call `keep(name, module, inputs, output)` after each run of the modules that are wanted.

    What it returns, unless None, takes the place of the output. With `before` it is called ahead of each run,
    without an output.
    """
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if wanted(module):
                register = module.register_forward_pre_hook if before else module.register_forward_hook
                stack.callback(register(functools.partial(keep, name)).remove)
        yield


def check_relative_step(name: str, relative_step: float) -> None:
    """Raise BadInput, in the name of a probe, unless a relative step is a positive number."""
    if not 0 < relative_step < math.inf:
        raise BadInput(f"probe {name!r}: relative_step must be a positive number, not {relative_step!r}")


def norm_of(tensors: Sequence[Tensor]) -> float:
    """The l2 norm of all numbers of some tensors together, in float64: small gradients do not underflow."""
    return math.sqrt(math.fsum(tensor.detach().double().square().sum().item() for tensor in tensors))
