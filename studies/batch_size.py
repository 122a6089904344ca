"""P3: what does the batch size do to batch normalization?

Two axes, apart: the normalization batch size (NBS) at a fixed SGD batch of 64, by ghost batches; and the SGD
batch at a fixed NBS of 16 and a fixed number of examples. Schedule, target and expected half-widths as in the
study `convergence`, with which the arms at batch 64 are shared.
"""

from dataclasses import replace
from functools import partial
from math import log

from bnbench.study import Arm, Cell, Hypothesis, Study
from bnbench.study.estimands import (
    accuracy_difference,
    interior_gain,
    log_examples_ratio,
    log_examples_ratio_difference,
    log_steps_ratio,
)
from studies import convergence

QUICK = replace(
    convergence.QUICK,
    probes={},
    tuning="once",
    timing_steps=0,
    cells=(
        Cell(
            "mlp-mnist1d",
            data="mnist1d",
            model="mlp",
            steps=600,
            constants={"target": 0.54, "delta_acc": 1.0},
            replicates=20,
        ),
    ),
    arms=(
        Arm("NBS 4", norm="ghost_batch", norm_options={"ghost_size": 4}),
        Arm("NBS 16", norm="ghost_batch", norm_options={"ghost_size": 16}),
        Arm("NBS 32", norm="ghost_batch", norm_options={"ghost_size": 32}),
        Arm("NBS 64", norm="batch"),
        Arm("B 64, NBS 16", norm="ghost_batch", norm_options={"ghost_size": 16}),
        Arm("B 256, NBS 16", norm="ghost_batch", norm_options={"ghost_size": 16}, batch_size=256, steps=150),
        Arm("none, B 64", norm="none"),
        Arm("none, B 256", norm="none", batch_size=256, steps=150),
    ),
)

FULL = replace(
    convergence.FULL,
    probes={},
    tuning="once",
    timing_steps=0,
    cells=(
        Cell("resnet20-cifar10", model="resnet20", constants={"target": 0.75, "delta_acc": 0.5}),
        Cell("resnet56-cifar10", model="resnet56", constants={"target": 0.75, "delta_acc": 0.5}),
    ),
    arms=(
        Arm("NBS 2", norm="ghost_batch", norm_options={"ghost_size": 2}),
        Arm("NBS 4", norm="ghost_batch", norm_options={"ghost_size": 4}),
        Arm("NBS 8", norm="ghost_batch", norm_options={"ghost_size": 8}),
        Arm("NBS 16", norm="ghost_batch", norm_options={"ghost_size": 16}),
        Arm("NBS 32", norm="ghost_batch", norm_options={"ghost_size": 32}),
        Arm("NBS 64", norm="ghost_batch", norm_options={"ghost_size": 64}),
        Arm("NBS 128", norm="batch"),
        Arm("B 16, NBS 16", norm="batch", batch_size=16, steps=112320),
        Arm("B 64, NBS 16", norm="ghost_batch", norm_options={"ghost_size": 16}, batch_size=64, steps=28080),
        Arm("B 256, NBS 16", norm="ghost_batch", norm_options={"ghost_size": 16}, batch_size=256, steps=7020),
        Arm("none, B 16", norm="none", batch_size=16, steps=112320),
        Arm("none, B 64", norm="none", batch_size=64, steps=28080),
        Arm("none, B 128", norm="none"),
        Arm("none, B 256", norm="none", batch_size=256, steps=7020),
        Arm("layer", norm="layer"),
        Arm("group", norm="group"),
    ),
)

STUDY = Study(
    name="batch_size",
    question="Is a small batch noisy for batch normalization, and does a large one converge more slowly?",
    baseline="none, B 64",
    hypotheses=(
        Hypothesis(
            name="P3.a",
            claim="P3",
            sentence="Normalizing over 4 samples instead of 32 costs test accuracy.",
            estimand=partial(accuracy_difference, better="NBS 32", other="NBS 4", metric="test/acc"),
            delta="delta_acc",
            better=("NBS 32",),
            other=("NBS 4",),
            unit="pp",
            half_width={"mlp-mnist1d": 0.72},
        ),
        Hypothesis(
            name="P3.b",
            claim="P3",
            sentence="It costs test accuracy too where the statistics are recomputed after training.",
            estimand=partial(accuracy_difference, better="NBS 32", other="NBS 4", metric="test/acc_precise"),
            delta="delta_acc",
            better=("NBS 32",),
            other=("NBS 4",),
            unit="pp",
            primary=False,
        ),
        Hypothesis(
            name="P3.e",
            claim="P3",
            sentence="An intermediate NBS is more accurate than both the smallest and the whole batch of 64.",
            estimand=partial(
                interior_gain, arms=("NBS 4", "NBS 16", "NBS 32", "NBS 64"), metric="test/acc_precise"
            ),
            delta="delta_acc",
            better=("NBS 4", "NBS 16", "NBS 32", "NBS 64"),
            unit="pp",
            primary=False,
            cells=("mlp-mnist1d",),
        ),
        Hypothesis(
            name="P3.steps",
            claim="P3",
            sentence="At a fixed NBS, a batch of 256 takes fewer steps to the target than one of 64.",
            estimand=partial(log_steps_ratio, better="B 256, NBS 16", other="B 64, NBS 16"),
            delta=log(1.25),
            better=("B 256, NBS 16",),
            other=("B 64, NBS 16",),
            unit="log ratio",
            primary=False,
        ),
        Hypothesis(
            name="P3.d slower",
            claim="P3",
            sentence="At a fixed NBS, a batch of 256 reads more examples to the target than one of 64.",
            estimand=partial(log_examples_ratio, large="B 256, NBS 16", small="B 64, NBS 16"),
            delta=log(1.25),
            better=("B 64, NBS 16",),
            other=("B 256, NBS 16",),
            unit="log ratio",
            half_width={"mlp-mnist1d": 0.092},
        ),
        Hypothesis(
            name="P3.d not BN",
            claim="P3",
            sentence="That cost is the same without normalization, so it is none of batch normalization's.",
            estimand=partial(
                log_examples_ratio_difference,
                large="B 256, NBS 16",
                small="B 64, NBS 16",
                other_large="none, B 256",
                other_small="none, B 64",
            ),
            delta=log(1.25),
            better=("B 256, NBS 16", "B 64, NBS 16", "none, B 256", "none, B 64"),
            kind="equivalent",
            unit="log ratio",
            half_width={"mlp-mnist1d": 0.098},
        ),
        Hypothesis(
            name="P3.d 64 to 16",
            claim="P3",
            sentence="At a fixed NBS, a batch of 64 reads more examples to the target than one of 16.",
            estimand=partial(log_examples_ratio, large="B 64, NBS 16", small="B 16, NBS 16"),
            delta=log(1.25),
            better=("B 16, NBS 16",),
            other=("B 64, NBS 16",),
            unit="log ratio",
            primary=False,
            cells=("resnet20-cifar10", "resnet56-cifar10"),
        ),
    ),
    quick=QUICK,
    full=FULL,
)
