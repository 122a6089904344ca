"""C4: does batch normalization prevent vanishing and exploding gradients?

What is read is the factor by which the gradient's norm grows from a layer to the one below: 1 is perfect,
above 1 explodes, below 1 vanishes. At initialization it depends on no learning rate. The claim is held
against three networks without normalization: with He's initialization, which keeps the norm of the gradient
in ReLU networks, with Xavier's, and with torch's default. Exploratory: the exact mean-field theory of the
factor over batch sizes, the factor after some training, skip connections, the rank of deep representations,
and how deep a network still trains. Every arm trains at every rate of a small grid.

Replicates below 500 were looked at in pilots; two of them gave the expected half-widths.
"""

from functools import partial
from math import log

from bnbench.study import Arm, Cell, Design, Factor, Hypothesis, Study, Trial, cross
from bnbench.study.estimands import (
    best_accuracy_difference,
    flow_against_theory,
    flow_gain,
    flow_repair,
    log_probe_ratio,
)

# A factor of 1.02 a layer is one of e over 50 layers.
DELTA = log(1.02)
WIDE = {"model": "mlp", "model_options": {"depth": 30, "width": 256}}
CNN20 = {"model": "cnn", "model_options": {"depth": 20, "channels": 16}}

# Where only the initialization is read, one step is enough of a training.
QUICK_THEORY = cross(
    (Cell("mlp30-digits", data="digits", steps=1, **WIDE),), Factor("batch_size", (8, 16, 32, 128, 512))
)
QUICK_INITIAL = (
    Cell("mlp30-mnist1d", data="mnist1d", steps=1, model="mlp", model_options={"depth": 30}),
    Cell("cnn20-mnist1d", data="mnist1d", steps=1, **CNN20),
    Cell("resnet20-digits", data="digits", steps=1, model="resnet20"),
)
QUICK_TRAINED = (Cell("mlp30-digits", data="digits", model="mlp", model_options={"depth": 30}),)
QUICK_DEPTHS = tuple(
    Cell(
        f"mlp{depth}-digits",
        data="digits",
        model="mlp",
        model_options={"depth": depth, "width": 64},
        replicates=5,
    )
    for depth in (10, 60)
)

FULL_THEORY = cross(
    (Cell("mlp30-cifar10", steps=1, model="mlp", model_options={"depth": 30, "width": 1024}),),
    Factor("batch_size", (8, 16, 32, 128, 512)),
)
FULL_TRAINED = (
    Cell("mlp30-cifar10", model="mlp", model_options={"depth": 30, "width": 512}),
    Cell("cnn20-cifar10", model="cnn", model_options={"depth": 20, "channels": 64}),
    Cell("vgg16-cifar10", model="vgg16"),
    Cell("resnet56-cifar10", model="resnet56"),
)
FULL_DEPTHS = tuple(
    Cell(f"mlp{depth}-cifar10", model="mlp", model_options={"depth": depth, "width": 512})
    for depth in (10, 50, 80)
)

QUICK_COMPARED = (*QUICK_TRAINED, *QUICK_INITIAL)
THEORY = tuple(cell.name for cell in (*QUICK_THEORY, *FULL_THEORY))
DEPTHS = tuple(cell.name for cell in (*QUICK_DEPTHS, *FULL_DEPTHS))
TRAINED = tuple(cell.name for cell in (*QUICK_TRAINED, *QUICK_DEPTHS, *FULL_TRAINED, *FULL_DEPTHS))
PLAIN = ("mlp30-digits", "mlp30-mnist1d", "cnn20-mnist1d", "mlp30-cifar10", "cnn20-cifar10")
PRIMARY = ("mlp30-digits", "cnn20-mnist1d", "mlp30-cifar10", "cnn20-cifar10")
SECONDARY = (*(name for name in PLAIN if name not in PRIMARY), "vgg16-cifar10")
SKIPS = ("resnet20-digits", "resnet56-cifar10")
OTHERS = {
    "he": "He's initialization",
    "xavier": "Xavier's initialization",
    "torch": "torch's default initialization",
}
# The arms that are compared at initialization alone, beside batch normalization and He's.
BESIDE = {
    "xavier": {"norm": "none", "init": "xavier"},
    "torch": {"norm": "none", "init": "torch"},
    "layer": {"norm": "layer"},
}

QUICK = Design(
    base=Trial(steps=100, schedule="constant", seed=500, data_seed=500),
    cells=(*QUICK_THEORY, *QUICK_COMPARED, *QUICK_DEPTHS),
    arms=(
        Arm("batch", norm="batch"),
        Arm("he", norm="none", cells=tuple(cell.name for cell in (*QUICK_COMPARED, *QUICK_DEPTHS))),
        *(
            Arm(name, cells=tuple(cell.name for cell in QUICK_COMPARED), **changes)
            for name, changes in BESIDE.items()
        ),
    ),
    lr=(0.003, 0.02),
    curve_points=0,
    probes={"gradient_flow": {"steps": [0, 1, 10, 100]}, "rank": {"steps": [0]}},
)

# 5 epochs of 45,000 images in batches of 64. Nothing of it has run on a GPU yet.
FULL = Design(
    base=Trial(data="cifar10", steps=3515, schedule="constant"),
    cells=(*FULL_THEORY, *FULL_TRAINED, *FULL_DEPTHS),
    arms=(
        Arm("batch", norm="batch"),
        Arm("he", norm="none", cells=tuple(cell.name for cell in (*FULL_TRAINED, *FULL_DEPTHS))),
        *(
            Arm(name, cells=tuple(cell.name for cell in FULL_TRAINED), **changes)
            for name, changes in BESIDE.items()
        ),
    ),
    lr=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    curve_points=0,
    probes={"gradient_flow": {"steps": [0, 1, 10, 100, 1000]}, "rank": {"steps": [0]}},
)

STUDY = Study(
    name="gradient_flow",
    question="Does batch normalization keep gradients from vanishing and exploding?",
    program="sweep",
    baseline="batch",
    hypotheses=(
        *(
            Hypothesis(
                name=f"{name}, {other}",
                claim="C4",
                sentence="At initialization, the gradient keeps its size from layer to layer better with"
                f" batch normalization than without it, with {words}.",
                estimand=partial(flow_gain, better="batch", other=other),
                delta=DELTA,
                better=("batch",),
                other=(other,),
                unit="log factor",
                primary=primary,
                cells=cells,
                half_width={"mlp30-digits": 0.01, "cnn20-mnist1d": 0.07} if primary else {},
            )
            for name, primary, cells in (
                ("C4.b", True, PRIMARY),
                ("C4.b2", False, SECONDARY),
                ("C4.e", False, SKIPS),
            )
            for other, words in OTHERS.items()
        ),
        Hypothesis(
            name="C4.a",
            claim="C4",
            sentence="In wide networks the gradient grows as the exact mean-field theory says.",
            estimand=partial(flow_against_theory, arm="batch"),
            delta=DELTA,
            better=("batch",),
            kind="equivalent",
            unit="log factor",
            primary=False,
            cells=THEORY,
        ),
        Hypothesis(
            name="C4.d",
            claim="C4",
            sentence="A hundred steps of training bring the factor of networks with batch normalization"
            " closer to 1.",
            estimand=partial(flow_repair, arm="batch", late=100),
            delta=DELTA,
            better=("batch",),
            unit="log factor",
            primary=False,
            cells=TRAINED,
        ),
        Hypothesis(
            name="C4.d2",
            claim="C4",
            sentence="After ten steps, the gradient keeps its size better with batch normalization than"
            " without it, with He's initialization.",
            estimand=partial(flow_gain, better="batch", other="he", step=10),
            delta=DELTA,
            better=("batch",),
            other=("he",),
            unit="log factor",
            primary=False,
            cells=TRAINED,
        ),
        Hypothesis(
            name="C4.f",
            claim="C4",
            sentence="The representations of the deepest layer have a higher rank with it.",
            estimand=partial(
                log_probe_ratio,
                larger="batch",
                smaller="he",
                probe="rank",
                value="rank_bound",
                role="best",
                step=0,
            ),
            delta=log(2),
            better=("batch",),
            other=("he",),
            unit="log ratio",
            primary=False,
            cells=DEPTHS,
        ),
        Hypothesis(
            name="C4.depth",
            claim="C4",
            sentence="After the same short training, at its best learning rate, the deep network is more"
            " accurate with it.",
            estimand=partial(best_accuracy_difference, better="batch", other="he"),
            delta=1.0,
            better=("batch",),
            other=("he",),
            unit="pp",
            primary=False,
            cells=TRAINED,
        ),
    ),
    quick=QUICK,
    full=FULL,
)
