"""The checks of a norm as a module: copies, text, untrained passes, torch.compile and torch.export."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bnbench.testing.norm_case import (
    NormCase,
    buffers,
    changed,
    expect,
    expect_close,
    run,
    run_copy,
    sample_input,
)


def check_norm_without_host(case: NormCase) -> None:
    """No value is fetched to the host in either pass: the layer runs on the meta device, which has none."""
    for dim, x in case.inputs(dtype=torch.float32, extremes=True):
        with torch.device("meta"):
            layer = case.build(dim, dtype=torch.float32)
        leaf = x.to("meta").requires_grad_()
        for training in (True, False):
            y = layer.train(training)(leaf)
            expect(y.is_meta and y.shape == x.shape, case, f"dim {dim}: left the meta device")
            torch.autograd.grad(y.sum(), [leaf, *layer.parameters()], allow_unused=True)


def check_norm_copies(case: NormCase) -> None:
    """state_dict, pickle and deepcopy carry the whole state, and a copy shares nothing."""
    for dim, x in case.inputs(extremes=True):
        layer, loaded = case.build(dim), case.build(dim)
        run(layer, x)
        stream = io.BytesIO()
        torch.save(layer.state_dict(), stream)
        stream.seek(0)
        loaded.load_state_dict(torch.load(stream, weights_only=True))
        twins = {
            "state_dict": loaded,
            "pickle": pickle.loads(pickle.dumps(layer)),
            "deepcopy": copy.deepcopy(layer),
        }
        before = buffers(layer)
        for way, twin in twins.items():
            for training in (False, True):
                y = run_copy(layer.train(training), x)
                expect(torch.equal(run(twin.train(training), x), y), case, f"dim {dim}: {way} lost something")
            expect(not changed(before, layer), case, f"dim {dim}: the copy by {way} shares a buffer")


def check_norm_text(case: NormCase) -> None:
    """Options show in the layer's text."""
    text = repr(case.build(case.dims[-1]))
    for option, value in case.options.items():
        expect(f"{option}={value!r}" in text, case, f"{option}={value!r} is not in {text}")


def check_norm_frozen_steps(case: NormCase) -> None:
    """Passes that do not train leave no mark: a training step after three of them is the step without them.

    They are those in evaluation mode, and those in training mode while the attribute `frozen` is true, where
    the layer has one.
    """
    for dim, x in case.inputs(extremes=True):
        layer, fresh = case.build(dim), case.build(dim)
        _pass_thrice(layer.eval(), dim)
        if hasattr(layer, "frozen"):
            _set_frozen(layer, True)
            _pass_thrice(layer.train(), dim)
            _set_frozen(layer, False)
            _set_frozen(fresh, False)
        y, wanted = run(layer.train(), x), run(fresh, x)
        message = f"dim {dim}: passes that do not train changed the training step that follows"
        expect(torch.equal(y, wanted), case, message)
        expect(not changed(buffers(fresh), layer), case, message)


def _pass_thrice(layer: nn.Module, dim: int) -> None:
    for seed in (1, 2, 3):
        run(layer, 2 * sample_input(dim, seed=seed), seed=seed)


def _set_frozen(layer: Any, frozen: bool) -> None:
    layer.frozen = frozen


def check_norm_compile(case: NormCase) -> None:
    """torch.compile makes one graph of a training step, with the layer's output, gradients and buffers.

    The graph of an evaluation is that of check_norm_export.
    """
    compare_compiled(case, "aot_eager")


def compare_compiled(case: NormCase, backend: str, modes: tuple[bool, ...] = (True,)) -> None:
    """Raise AssertionError unless the layer, compiled by this backend, computes what it computes by itself.

    modes: whether it trains, in one pass after the other. Only at the largest dim: other ranks are other
    graphs of the same operations. The backend "inductor" makes real kernels, takes seconds, and draws other
    random numbers.
    """
    dim = case.dims[-1]
    layer, twin, x = case.build(dim), case.build(dim), sample_input(dim)
    # Every layer of one class counts as another version of the same graph, of which torch takes eight.
    torch.compiler.reset()
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    for training in modes:
        layer.train(training)
        twin.train(training)
        wanted = _both_ways(layer, layer, x)
        with warnings.catch_warnings():
            # The compiler makes objects of autograd functions, of which torch itself warns.
            warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
            got = _both_ways(compiled, twin, x)
        message = f"dim {dim}, training={training}: torch.compile changed the output, gradients or buffers"
        for first, second in zip(wanted, got, strict=True):
            expect((first is None) == (second is None), case, message)
            if first is not None and second is not None:
                expect_close(second, first, case, message)


def _both_ways(call: Callable[..., Any], layer: nn.Module, x: Tensor) -> list[Tensor | None]:
    """The output, the gradients of a weighted sum of it, and the buffers."""
    leaf = x.clone().requires_grad_()
    y = run(call, leaf)
    total = (y * sample_input(x.ndim - 2, seed=3)).sum()
    gradients = torch.autograd.grad(total, [leaf, *layer.parameters()], allow_unused=True)
    return [y.detach(), *gradients, *layer.buffers()]


def check_norm_export(case: NormCase) -> None:
    """torch.export takes the layer in evaluation mode, for a batch of any size, and the program agrees."""
    dim = case.dims[-1]
    layer, x = case.build(dim), sample_input(dim)
    run(layer, x)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(layer.eval(), (x,), dynamic_shapes=({0: batch},))
    other = sample_input(dim, samples=5, seed=1)
    message = f"dim {dim}: the exported program gives another output"
    expect_close(program.module()(other), run(layer, other), case, message)
