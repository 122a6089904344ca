"""The checks of what a norm promises: dependence on the batch, statistics, invariances, fleets."""

from __future__ import annotations

import copy

import torch
from torch.func import functional_call, stack_module_state

from bnbench.norms import KeepsMoments
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
    run,
    run_copy,
    sample_input,
)


def check_norm_batch_dependence(case: NormCase) -> None:
    """In training, other samples matter to the first or the last, if and only if it is batch_dependent.

    Both are asked, since a layer may take the samples one after the other.
    """
    for dim, x in case.inputs():
        other = 2 * sample_input(dim, seed=1)
        y, matters = run(case.build(dim), x), False
        for kept in (0, -1):
            changed_batch = other.clone()
            changed_batch[kept] = x[kept]
            first, second = y[kept], run(case.build(dim), changed_batch)[kept]
            matters |= differ(first, second)
            if case.entry is not None and not case.keeps("batch_dependent"):
                expect_close(second, first, case, f"dim {dim}: other samples matter", 1e-12)
        if case.keeps("batch_dependent"):
            expect(matters, case, f"dim {dim}: other samples do not matter")


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

    Of a norm that is frozen, recalibration asks neither. x repeats one sample that has positions, so that
    any part of the batch, and each sample by itself, has the statistics of the whole.
    """
    for dim in case.dims:
        layer = case.build(dim)
        if not isinstance(layer, KeepsMoments) or getattr(layer, "frozen", False):
            return
        x = sample_input(dim, samples=1).repeat(SAMPLES, *(1,) * (dim + 1))
        moments = layer.batch_moments(x.float())
        expect(all(moment.dtype == torch.float64 for moment in moments), case, "moments are not float64")
        before = dict(layer.named_buffers())
        layer.set_moments(*layer.batch_moments(x))
        in_place = all(before[name] is buffer for name, buffer in layer.named_buffers())
        expect(in_place, case, "set_moments replaced a buffer in place of writing into it")
        y, random = run_copy(layer, x), run_copy(layer, x, seed=1)
        if dim > 0 and not differ(y, random):
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
