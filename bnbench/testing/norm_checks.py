"""The checks that every normalization layer passes, each a function of a case."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from bnbench.norms import KeepsMoments, build_norm
from bnbench.registry import BadInput
from bnbench.testing.norm_case import (
    CHANNELS,
    SAMPLES,
    NormCase,
    buffers,
    changed,
    differ,
    expect,
    expect_close,
    expect_equal_iff,
    norm_cases,
    run,
    run_copy,
    sample_input,
)

NormCheck = Callable[[NormCase], None]


def check_norm(
    norm: str | Callable[..., nn.Module], *, dims: tuple[int, ...] = (0, 1, 2, 3), **options: Any
) -> None:
    """Run every check on a norm: a registered name, or a callable `(num_features, dim, **options)`.

    Without options a registered norm is checked with each of its examples. dims below the norm's min_dim
    are left out. Of a callable that is not registered no traits are known, so none is checked.
    Raises AssertionError that names the norm and what failed.
    """
    for case in norm_cases(norm, dims=dims, **options):
        for check in norm_checks():
            check(case)


def norm_checks() -> tuple[NormCheck, ...]:
    """Every check of the contract of a norm, to parametrize over."""
    return tuple(value for name, value in globals().items() if name.startswith("check_norm_"))


# Shapes, types, places


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
    for dim, x in case.inputs():
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


def check_norm_without_host(case: NormCase) -> None:
    """No value is fetched to the host in either pass: the layer runs on the meta device, which has none."""
    for dim, x in case.inputs(dtype=torch.float32):
        with torch.device("meta"):
            layer = case.build(dim, dtype=torch.float32)
        leaf = x.to("meta").requires_grad_()
        for training in (True, False):
            y = layer.train(training)(leaf)
            expect(y.is_meta and y.shape == x.shape, case, f"dim {dim}: left the meta device")
            torch.autograd.grad(y.sum(), [leaf, *layer.parameters()], allow_unused=True)


def check_norm_vmap(case: NormCase) -> None:
    """Stacked replicas run by torch.vmap equal separate ones, buffers included; only with the trait vmap."""
    if not case.keeps("vmap"):
        return
    for dim in case.dims:
        layers = [case.build(dim), case.build(dim)]
        x = torch.stack([sample_input(dim, seed=1), sample_input(dim, seed=2)])
        state = stack_module_state(layers)
        skeleton = copy.deepcopy(layers[0]).to("meta")
        for training in (True, True, False):
            skeleton.train(training)
            together = torch.vmap(
                lambda *given, skeleton=skeleton: functional_call(skeleton, given[:2], given[2])
            )
            for index, y in enumerate(together(*state, x)):
                alone = layers[index].train(training)(x[index])
                expect_close(y, alone, case, f"dim {dim}: vmap changed the output")
                for name, buffer in layers[index].named_buffers():
                    expect_close(state[1][name][index], buffer, case, f"dim {dim}: vmap changed {name}")


# Values


def check_norm_reference(case: NormCase) -> None:
    """A fresh layer's train-mode output is the float64 formula's, where the norm has one."""
    if case.entry is None or case.entry.reference is None:
        return
    for dim, x in case.inputs():
        wanted = case.entry.reference(x, **case.options)
        expect_close(run(case.build(dim), x), wanted, case, f"dim {dim}: not the formula's output")


def check_norm_degenerate(case: NormCase) -> None:
    """Constant inputs, one constant channel, zeros and large values give finite outputs and gradients."""
    for dim, x in case.inputs(dtype=torch.float32):
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
    for dim, x in case.inputs():
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


# Traits


def check_norm_batch_dependence(case: NormCase) -> None:
    """In training, other samples matter if and only if the norm says batch_dependent."""
    for dim, x in case.inputs():
        other = torch.cat([x[:1], 2 * sample_input(dim, seed=1)[1:]])
        first, second = run(case.build(dim), x)[0], run(case.build(dim), other)[0]
        if case.keeps("batch_dependent"):
            expect(differ(first, second), case, f"dim {dim}: other samples do not matter")
        elif case.entry is not None:
            expect_close(second, first, case, f"dim {dim}: other samples matter", 1e-12)


def check_norm_running_stats(case: NormCase) -> None:
    """Training changes buffers and evaluation reads them, if and only if the norm says running_stats."""
    for dim, x in case.inputs():
        layer, fresh = case.build(dim), case.build(dim)
        y = run(layer, x)
        moved, evaluation = changed(buffers(fresh), layer), run(layer.eval(), x)
        if case.keeps("running_stats"):
            expect(moved, case, f"dim {dim}: training changed no buffer")
            used = differ(run(fresh.eval(), x), evaluation)
            expect(used, case, f"dim {dim}: evaluation does not read the buffers")
        elif case.entry is not None and not case.keeps("batch_dependent"):
            expect(not moved, case, f"dim {dim}: training changed a buffer")
            expect_close(evaluation, y, case, f"dim {dim}: evaluation differs from training")


def check_norm_moments(case: NormCase) -> None:
    """Once set_moments has batch_moments(x), evaluation on x equals training on x; where a norm has these.

    Of a norm that is frozen, recalibration asks neither. x repeats two samples, so that any even part of the
    batch has its statistics.
    """
    for dim in case.dims:
        layer = case.build(dim)
        if not isinstance(layer, KeepsMoments) or getattr(layer, "frozen", False):
            return
        x = sample_input(dim, samples=2).repeat(SAMPLES // 2, *(1,) * (dim + 1))
        y, random = run_copy(layer, x), run_copy(layer, x, seed=1)
        moments = layer.batch_moments(x.float())
        expect(all(moment.dtype == torch.float64 for moment in moments), case, "moments are not float64")
        before = dict(layer.named_buffers())
        layer.set_moments(*layer.batch_moments(x))
        in_place = all(before[name] is buffer for name, buffer in layer.named_buffers())
        expect(in_place, case, "set_moments replaced a buffer in place of writing into it")
        if not differ(y, random):
            evaluation = run(layer.eval(), x)
            expect_close(evaluation, y, case, f"dim {dim}: not the population's statistics", 1e-8)


def check_norm_invariances(case: NormCase) -> None:
    """Scales of the input, shifts of a channel and the samples' order do not matter where traits say so."""
    order = torch.tensor([5, 0, 3, 6, 1, 7, 2, 4])
    for dim, x in case.inputs():
        shift = torch.linspace(-1, 1, CHANNELS, dtype=x.dtype).view(1, -1, *(1,) * dim)
        y = run(case.build(dim, eps=1e-14), x)
        scaled = run(case.build(dim, eps=1e-14), 3 * x)
        expect_equal_iff("scale_invariant", y, scaled, case, f"dim {dim}: a scale of the input")
        shifted = run(case.build(dim, eps=1e-14), x + shift)
        expect_equal_iff("centres", y, shifted, case, f"dim {dim}: a shift of a channel")
        permuted = run(case.build(dim, eps=1e-14), x[order])
        expect_equal_iff(
            "permutation_equivariant", y[order], permuted, case, f"dim {dim}: the samples' order"
        )


def check_norm_activation(case: NormCase) -> None:
    """A fresh layer is odd around its output for zeros, if and only if it does not replace the activation."""
    for dim, x in case.inputs():
        centre = run(case.build(dim), torch.zeros_like(x))
        first, second = run(case.build(dim), x) - centre, centre - run(case.build(dim), -x)
        if case.keeps("replaces_activation"):
            expect(differ(first, second), case, f"dim {dim}: it is odd, so there is no activation in it")
        elif case.entry is not None:
            expect_close(second, first, case, f"dim {dim}: it is not odd, so an activation is in it")


def check_norm_evaluation(case: NormCase) -> None:
    """Evaluation is deterministic, changes no buffer, and treats each sample by itself."""
    for dim, x in case.inputs():
        layer = case.build(dim)
        run(layer, x)
        before, y = buffers(layer.eval()), run(layer, x)
        expect(torch.equal(y, run(layer, x, seed=1)), case, f"dim {dim}: evaluation is random")
        expect(not changed(before, layer), case, f"dim {dim}: evaluation changed a buffer")
        other = torch.cat([x[:1], 2 * sample_input(dim, seed=1)[1:]])
        expect_close(run(layer, other)[0], y[0], case, f"dim {dim}: evaluation sees the batch", 1e-12)


# The module as an object


def check_norm_copies(case: NormCase) -> None:
    """state_dict, pickle and deepcopy carry the whole state, and a copy shares nothing."""
    for dim, x in case.inputs():
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
