"""C0: does batch normalization work by reducing internal covariate shift?

The sentence is taken in its two meanings. Functional (Santurkar et al., 2018): by how much, relative to its
size, a layer's gradient changes when the layers below take a step, here one of 0.1 % of the norm of all
weights for every network, since batch normalization trains best at a larger learning rate. (Real steps have
0.02 to 1 %; at 1 % the gradients before and after have little in common in any network.)
Distributional: how far the mean of each unit among a layer's inputs moves, in its own standard deviations,
in 20 steps. Both are geometric means over the training. `noisy_batch` shifts and scales what
batch normalization gives, by random numbers whose distribution changes every step: if training stays fast
where the inputs drift more than without normalization, their stability cannot be the reason of the speed.

Replicates below 500 were looked at in pilots; they chose lengths, targets, the size of the common step and
the dose of the noise (the largest of 0.5 to 4 at which a network still trains). Six of them, tuned in the
same way, gave the expected half-widths.
"""

from functools import partial
from math import log

from bnbench.study import Arm, Cell, Design, Hypothesis, Study, Trial
from bnbench.study.estimands import log_probe_ratio, log_steps_allowance, log_steps_ratio

DOSE = "noisy 3"
MLP8 = {"model": "mlp", "model_options": {"depth": 8}}
CNN = {"model": "cnn", "model_options": {"channels": 16}}
PROBES = {"covariate_shift": {"every": 20, "relative_step": 0.001}, "drift": {"every": 20}}

QUICK = Design(
    base=Trial(schedule="trapezoid", warmup=0.05, recalibration="precise", seed=500, data_seed=500),
    cells=(
        Cell("mlp8-digits", data="digits", steps=120, **MLP8, constants={"target": 0.88}, replicates=20),
        Cell("mlp8-mnist1d", data="mnist1d", steps=240, **MLP8, constants={"target": 0.4}, replicates=20),
        Cell("cnn-digits", data="digits", steps=150, **CNN, constants={"target": 0.87}),
    ),
    arms=(
        Arm("none", norm="none"),
        Arm("batch", norm="batch"),
        Arm("noisy 1", norm="noisy_batch", cells=("mlp8-digits",)),
        Arm("noisy 3", norm="noisy_batch", norm_options={"noise": 3}),
        Arm("layer", norm="layer", cells=("mlp8-digits",)),
    ),
    lr=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    tuning="once",
    probes=PROBES,
)

# 15 epochs of 45,000 images in batches of 128. The targets are guesses: nothing of it has run on a GPU yet.
FULL = Design(
    base=Trial(
        data="cifar10",
        augment="crop-flip",
        batch_size=128,
        steps=5265,
        schedule="trapezoid",
        warmup=0.05,
        weight_decay=5e-4,
        recalibration="precise",
    ),
    cells=(
        Cell("vgg11-cifar10", model="vgg11", constants={"target": 0.75}),
        Cell(
            "mlp25-cifar10",
            model="mlp",
            augment="none",
            model_options={"depth": 25, "width": 512},
            constants={"target": 0.4},
        ),
        Cell("resnet20-cifar10", model="resnet20", constants={"target": 0.7}),
    ),
    arms=(
        Arm("none", norm="none"),
        Arm("batch", norm="batch"),
        *(
            Arm(f"noisy {dose:g}", norm="noisy_batch", norm_options={"noise": dose})
            for dose in (0.5, 1, 2, 3)
        ),
        Arm("layer", norm="layer"),
    ),
    lr=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    probes={"covariate_shift": {"every": 250, "relative_step": 0.001}, "drift": {"every": 250}},
)

PAIR = {"better": ("batch",), "other": ("none",), "unit": "log ratio"}

STUDY = Study(
    name="covariate_shift",
    question="Does batch normalization work by reducing internal covariate shift?",
    baseline="none",
    hypotheses=(
        Hypothesis(
            name="C0.b",
            claim="C0",
            sentence="When the layers below take a step of one relative size, the gradient of a layer changes"
            " less, relative to its size, in a network with batch normalization.",
            estimand=partial(
                log_probe_ratio,
                larger="none",
                smaller="batch",
                probe="covariate_shift",
                value="relative_common",
            ),
            delta=log(1.25),
            half_width={"mlp8-digits": 0.085, "cnn-digits": 0.16},
            **PAIR,
        ),
        Hypothesis(
            name="C0.b own step",
            claim="C0",
            sentence="The same for a step at the learning rate at which each network is trained.",
            estimand=partial(
                log_probe_ratio, larger="none", smaller="batch", probe="covariate_shift", value="relative"
            ),
            delta=log(1.25),
            primary=False,
            **PAIR,
        ),
        *(
            Hypothesis(
                name=name,
                claim="C0",
                sentence=f"The inputs of the layers drift less with batch normalization, {where}.",
                estimand=partial(
                    log_probe_ratio,
                    larger="none",
                    smaller="batch",
                    probe="drift",
                    value="input_mean",
                    role=role,
                ),
                delta=log(1.25),
                primary=False,
                **PAIR,
            )
            for name, role, where in (
                ("C0.a", "common", "at the same learning rate"),
                ("C0.a own rate", "own", "at each network's best learning rate"),
            )
        ),
        Hypothesis(
            name="C0.c drift",
            claim="C0",
            sentence="With the noise, the inputs of the layers drift more than without normalization.",
            estimand=partial(log_probe_ratio, larger=DOSE, smaller="none", probe="drift", value="input_mean"),
            delta=log(1.25),
            better=(DOSE,),
            other=("none",),
            unit="log ratio",
            primary=False,
            against=True,
        ),
        Hypothesis(
            name="C0.c speed",
            claim="C0",
            sentence="And yet with that noise the target takes less than 1.25 times the steps that it takes"
            " without normalization.",
            estimand=partial(log_steps_allowance, better=DOSE, other="none", times=1.25),
            delta=log(1.25),
            better=(DOSE,),
            other=("none",),
            unit="log ratio",
            primary=False,
            against=True,
        ),
        Hypothesis(
            name="C0.speed",
            claim="C0",
            sentence="Without the noise it takes fewer steps than without normalization.",
            estimand=partial(log_steps_ratio, better="batch", other="none"),
            delta=log(1.25),
            primary=False,
            **PAIR,
        ),
    ),
    quick=QUICK,
    full=FULL,
)
