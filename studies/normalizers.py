"""Which normalizer, if any: a ranking of every strategy of this package by network and batch size.

A strategy is a norm with its usual options, with reparametrized weights or clipped gradients where its
authors pair it with them, or an option of residual networks in place of a norm. Each is tuned over the same
learning rates, and they are ranked by test accuracy, beside the time and the memory of a step. No claim rests
on it: even what is asked most often, batch normalization against none, layer and group, is exploratory. The
short trainings of small networks in `quick` rank what learns fast; `full` has longer ones and a residual
network.

A norm of your own, in bnbench/norms/ or installed behind the entry point group `bnbench.norms`, joins in a
file of yours, and only what is not recorded yet is trained:

    from dataclasses import replace
    from bnbench.study import Arm
    from studies.normalizers import QUICK, STUDY as OTHERS

    MINE = replace(QUICK, arms=(*QUICK.arms, Arm("mine", norm="my_norm")))
    STUDY = replace(OTHERS, name="normalizers and mine", quick=MINE, tried=MINE)
"""

from dataclasses import replace
from functools import partial

from bnbench.study import Arm, Cell, Design, Hypothesis, Study, Trial
from bnbench.study.estimands import accuracy_difference

# Names of arms, with what each changes in the row.
ANYWHERE = {
    "none": {"norm": "none"},
    "batch": {"norm": "batch"},
    "batch, no affine": {"norm": "batch", "norm_options": {"affine": False}},
    "mean_only_batch + weight_norm": {"norm": "mean_only_batch", "reparam": "weight_norm"},
    "variance_only_batch": {"norm": "variance_only_batch"},
    "l1_batch": {"norm": "l1_batch"},
    "range_batch": {"norm": "range_batch"},
    "batch_renorm": {"norm": "batch_renorm"},
    "frozen_batch": {"norm": "frozen_batch", "norm_options": {"freeze_after": 0.1, "learn_affine": True}},
    "example_weighted_batch": {"norm": "example_weighted_batch"},
    "virtual_batch": {"norm": "virtual_batch"},
    "noisy_batch": {"norm": "noisy_batch"},
    "iterative_whitening": {"norm": "iterative_whitening"},
    "decorrelated_batch": {"norm": "decorrelated_batch"},
    "batch_channel": {"norm": "batch_channel"},
    "switchable": {"norm": "switchable"},
    "online": {"norm": "online"},
    "layer": {"norm": "layer"},
    "rms": {"norm": "rms"},
    "group": {"norm": "group"},
    "group + weight_standardization": {"norm": "group", "reparam": "weight_standardization"},
    "weight_norm": {"norm": "none", "reparam": "weight_norm"},
    "scaled weights + adaptive_clip": {
        "norm": "none",
        "reparam": "scaled_weight_standardization",
        "adaptive_clip": 0.1,
    },
    "dynamic_tanh": {"norm": "dynamic_tanh"},
    "dynamic_erf": {"norm": "dynamic_erf"},
    "local_response": {"norm": "local_response"},
}
# Those that need positions, or are something else where there are some.
WITH_POSITIONS = {
    "batch_instance": {"norm": "batch_instance"},
    "instance": {"norm": "instance"},
    "layer, channels": {"norm": "layer", "norm_options": {"over": "channels"}},
    "rms, sample": {"norm": "rms", "norm_options": {"over": "sample"}},
    "filter_response": {"norm": "filter_response"},
    **{
        name: {"norm": name}
        for name in ("evonorm_b0", "evonorm_b1", "evonorm_b2", "evonorm_s0", "evonorm_s1")
    },
}
# In place of a norm, where there are shortcuts.
RESIDUAL = {
    name: {"norm": "none", "model_options": {"residual": name}} for name in ("fixup", "skip_init", "rezero")
}
# A warm-up of 100 steps, and averages over some 50, would leave no room in a short training.
AVERAGED_QUICK = {
    "moving_average_batch": {
        "norm": "moving_average_batch",
        "norm_options": {"warmup": 20, "momentum": 0.1},
        "reparam": "centred_weight",
    },
    "power": {"norm": "power", "norm_options": {"warmup": 20}},
}
AVERAGED_FULL = {
    "moving_average_batch": {"norm": "moving_average_batch", "reparam": "centred_weight"},
    "power": {"norm": "power", "norm_options": {"warmup": 400}},
}
GHOST_16 = {"norm": "ghost_batch", "norm_options": {"ghost_size": 16}}
GHOST_4 = {"norm": "ghost_batch", "norm_options": {"ghost_size": 4}}

# By itself each row: some of these norms cannot train in a fleet, and a cell has one back end.
SIGNAL = {"data": "mnist1d", "backend": "single"}
SMALL_CNN = {"model": "cnn", "model_options": {"channels": 16}}
CNN_64 = Cell(
    "cnn-mnist1d, B 64", batch_size=64, steps=80, **SIGNAL, **SMALL_CNN, constants={"delta_acc": 0.5}
)

# Replicates below 300 were looked at while sizes were chosen.
QUICK = Design(
    base=Trial(schedule="trapezoid", warmup=0.05, seed=300, data_seed=300),
    cells=(
        Cell(
            "mlp-mnist1d, B 64", model="mlp", batch_size=64, steps=130, **SIGNAL, constants={"delta_acc": 1.0}
        ),
        Cell(
            "mlp-mnist1d, B 8", model="mlp", batch_size=8, steps=120, **SIGNAL, constants={"delta_acc": 1.0}
        ),
        CNN_64,
        Cell("cnn-mnist1d, B 8", batch_size=8, steps=90, **SIGNAL, **SMALL_CNN, constants={"delta_acc": 0.5}),
    ),
    arms=(
        *(Arm(name, **changes) for name, changes in {**ANYWHERE, **AVERAGED_QUICK}.items()),
        *(
            Arm(name, cells=("cnn-mnist1d, B 64", "cnn-mnist1d, B 8"), **changes)
            for name, changes in WITH_POSITIONS.items()
        ),
        Arm("ghost_batch, 16", cells=("mlp-mnist1d, B 64", "cnn-mnist1d, B 64"), **GHOST_16),
        Arm("ghost_batch, 4", cells=("mlp-mnist1d, B 8", "cnn-mnist1d, B 8"), **GHOST_4),
    ),
    # Wide: so short a training is at its best at 0.2 or above with many of them.
    lr=(0.04, 0.2, 1.0),
    replicates=5,
    tuning="once",
    curve_points=0,
    timing_steps=20,
    timed=2,
    common=False,
)

# One network with positions tries them all.
TRIED = replace(
    QUICK,
    cells=(CNN_64,),
    arms=(
        *(Arm(name, **changes) for name, changes in {**ANYWHERE, **AVERAGED_QUICK, **WITH_POSITIONS}.items()),
        Arm("ghost_batch, 4", **GHOST_4),
    ),
)

# 40 epochs of 45,000 images in batches of 128, 5 in batches of 8. No pilot has run on a GPU yet.
LARGE_CELLS = tuple(f"{model}-cifar10, B 128" for model in ("mlp", "cnn", "resnet20"))
SMALL_CELLS = tuple(f"{model}-cifar10, B 8" for model in ("mlp", "cnn", "resnet20"))
RESNET_CELLS = ("resnet20-cifar10, B 128", "resnet20-cifar10, B 8")
NETWORKS = (
    {"model": "mlp", "augment": "none", "model_options": {"width": 512}},
    {"model": "cnn", "model_options": {"depth": 6, "channels": 64}},
    {"model": "resnet20"},
)
FULL = replace(
    QUICK,
    base=Trial(
        data="cifar10",
        augment="crop-flip",
        schedule="trapezoid",
        warmup=0.125,
        weight_decay=5e-4,
    ),
    cells=tuple(
        Cell(name, batch_size=size, steps=steps, backend="single", **network, constants={"delta_acc": 0.5})
        for names, size, steps in ((LARGE_CELLS, 128, 14_040), (SMALL_CELLS, 8, 28_125))
        for name, network in zip(names, NETWORKS, strict=True)
    ),
    arms=(
        *(Arm(name, **changes) for name, changes in {**ANYWHERE, **AVERAGED_FULL}.items()),
        *(
            Arm(name, cells=(*LARGE_CELLS[1:], *SMALL_CELLS[1:]), **changes)
            for name, changes in WITH_POSITIONS.items()
        ),
        *(Arm(name, cells=RESNET_CELLS, **changes) for name, changes in RESIDUAL.items()),
        Arm("ghost_batch, 16", cells=LARGE_CELLS, **GHOST_16),
        Arm("ghost_batch, 4", cells=SMALL_CELLS, **GHOST_4),
    ),
    lr=(0.01, 0.03, 0.1, 0.3),
    timing_steps=200,
    common=True,
)

STUDY = Study(
    name="normalizers",
    question="Which normalizer is most accurate on this network at this batch size, and what does it cost?",
    baseline="batch",
    hypotheses=tuple(
        Hypothesis(
            name=f"C5.over {other}",
            claim="C5",
            sentence=f"With only the learning rate tuned, batch normalization is more accurate than {words}.",
            estimand=partial(accuracy_difference, better="batch", other=other),
            delta="delta_acc",
            better=("batch",),
            other=(other,),
            unit="pp",
            primary=False,
        )
        for other, words in (
            ("none", "no normalization"),
            ("layer", "layer normalization"),
            ("group", "group normalization"),
        )
    ),
    quick=QUICK,
    full=FULL,
    tried=TRIED,
    ranked=True,
)
