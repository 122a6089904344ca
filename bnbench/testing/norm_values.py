"""The checks of a norm's numbers: shapes, types, memory formats, formulas, degenerate inputs, gradients."""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bnbench.norms import build_norm
from bnbench.registry import BadInput
from bnbench.testing.norm_case import (
    CHANNELS,
    NormCase,
    expect,
    expect_close,
    run,
    run_copy,
    sample_input,
)


def check_norm_shape(case: NormCase) -> None:
    """The output has the input's shape and type, and the input stays as it was."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for dim, x in case.inputs(dtype=dtype):
            layer, before = case.build(dim, dtype=dtype), x.clone()
            for training in (True, False):
                y = run(layer.train(training), x)
                expect(y.shape == x.shape, case, f"dim {dim}: {tuple(x.shape)} became {tuple(y.shape)}")
                expect(y.dtype == dtype, case, f"dim {dim}: {dtype} became {y.dtype}")
                expect(torch.equal(x, before), case, f"dim {dim}: the input was changed in place")


def check_norm_dims(case: NormCase) -> None:
    """Fewer spatial axes than min_dim are refused at construction."""
    if case.entry is None:
        return
    for dim in range(case.entry.min_dim):
        try:
            build_norm(case.entry.name, CHANNELS, dim, **case.options)
        except BadInput:
            continue
        raise AssertionError(f"{case}: dim={dim} was not refused, though min_dim is {case.entry.min_dim}")


def check_norm_memory_format(case: NormCase) -> None:
    """Contiguous and channels_last inputs give outputs of their own format, with equal values."""
    for dim, last in ((2, torch.channels_last), (3, torch.channels_last_3d)):
        if dim not in case.dims:
            continue
        x, layer = sample_input(dim), case.build(dim)
        for training in (True, False):
            layer.train(training)
            y, y_last = run_copy(layer, x), run_copy(layer, x.contiguous(memory_format=last))
            expect(y.is_contiguous(), case, f"dim {dim}: contiguous became strides {y.stride()}")
            kept = y_last.is_contiguous(memory_format=last)
            expect(kept, case, f"dim {dim}: channels_last became strides {y_last.stride()}")
            expect_close(y_last, y, case, f"dim {dim}: channels_last changed the values")


def check_norm_low_precision(case: NormCase) -> None:
    """Of bfloat16 inputs, statistics are float32's: the output is the float64 one, rounded to bfloat16."""
    for dim, x in case.inputs(extremes=True):
        low = (x + 8).bfloat16()
        for training in (True, False):
            wanted = run(case.build(dim).train(training), low.double())
            for dtype in (torch.float32, torch.bfloat16):
                layer = case.build(dim, dtype=dtype).train(training)
                for autocast in (True, False):
                    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                        y = run_copy(layer, low).double()
                    message = f"dim {dim}, {dtype} layer, autocast={autocast}: bfloat16 input is imprecise"
                    expect_close(y, wanted, case, message, 2.0**-7)


def check_norm_large_offset(case: NormCase) -> None:
    """With mean 1e4 and deviations of 1 to 2, float32's errors are at most 4 times those of torch's norms."""
    for dim, x in case.inputs():
        # Neighbours along every axis differ, so that any part of the batch has a variance above 1.
        sign = torch.stack(torch.meshgrid(*map(torch.arange, x.shape), indexing="ij")).sum(0) % 2 * 2 - 1
        low = (1e4 + sign * (1 + x.sigmoid())).float()
        batch, layer = (
            (norm(low) - norm(low.double())).abs().max()
            for norm in (
                functools.partial(F.batch_norm, running_mean=None, running_var=None, training=True),
                functools.partial(F.layer_norm, normalized_shape=low.shape[1:]),
            )
        )
        ours = run(case.build(dim, dtype=torch.float32), low) - run(case.build(dim), low.double())
        ours = ours.detach().abs().max()
        allowed = 4 * float(max(batch, layer))
        message = f"dim {dim}: the error {float(ours):.2g} is above {allowed:.2g}"
        expect(ours <= allowed, case, message)


def check_norm_reference(case: NormCase) -> None:
    """A fresh layer's train-mode output is the float64 formula's, where the norm has one."""
    if case.entry is None or case.entry.reference is None:
        return
    for dim, x in case.inputs():
        wanted = case.entry.reference(x, **case.options)
        expect_close(run(case.build(dim), x), wanted, case, f"dim {dim}: not the formula's output")


def check_norm_degenerate(case: NormCase) -> None:
    """Constant inputs, one constant channel, zeros and large values give finite outputs and gradients."""
    for dim, x in case.inputs(dtype=torch.float32, extremes=True):
        one_constant_channel = x.clone()
        one_constant_channel[:, 0] = 3.0
        for name, values in {
            "zeros": torch.zeros_like(x),
            "a constant": torch.full_like(x, 3.0),
            "a constant channel": one_constant_channel,
            "values of 1e4": 1e4 * x,
            "bfloat16 values of 1e4": (1e4 * x).bfloat16(),
        }.items():
            layer, leaf = case.build(dim, dtype=values.dtype), values.clone().requires_grad_()
            y = run(layer, leaf)
            gradients = torch.autograd.grad(
                y.float().square().sum(), [leaf, *layer.parameters()], allow_unused=True
            )
            for tensor in (y, run(layer.eval(), leaf), *gradients, *layer.buffers()):
                finite = tensor is None or tensor.isfinite().all()
                expect(
                    finite, case, f"dim {dim}: {name} gave an output, gradient or buffer that is not finite"
                )


def check_norm_single_sample(case: NormCase) -> None:
    """Training on one sample gives finite values or a ValueError; evaluation takes one sample."""
    for dim, x in case.inputs():
        layer = case.build(dim)
        try:
            y = run(layer, x[:1])
        except ValueError:
            pass
        else:
            finite = all(tensor.isfinite().all() for tensor in (y, *layer.buffers()))
            expect(finite, case, f"dim {dim}: training on one sample gave values that are not finite")
        layer = case.build(dim).eval()
        expect_close(run(layer, x[:1]), run(layer, x)[:1], case, f"dim {dim}: evaluation sees the batch")


def check_norm_gradient(case: NormCase) -> None:
    """Gradients are the numeric derivatives in both modes; only with the trait exact_gradient."""
    if case.entry is not None and not case.keeps("exact_gradient"):
        return
    for dim, x in case.inputs(extremes=True):
        layer = case.build(dim)
        names = [name for name, _ in layer.named_parameters()]
        leaves = [x.clone(), *(parameter.detach() + 0.1 for parameter in layer.parameters())]

        def forward(x: Tensor, *values: Tensor, layer: nn.Module = layer, names: list[str] = names) -> Tensor:
            parts = copy.deepcopy(layer)
            with torch.random.fork_rng([]):
                torch.manual_seed(0)
                y: Tensor = functional_call(parts, dict(zip(names, values, strict=True)), x)
                return y

        for training in (True, False):
            layer.train(training)
            inputs = [leaf.requires_grad_() for leaf in leaves]
            right = torch.autograd.gradcheck(forward, inputs, fast_mode=True, raise_exception=False)
            expect(right, case, f"dim {dim}: the gradient is not the derivative")
