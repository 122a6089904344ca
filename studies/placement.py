"""P2: does batch normalization belong before the activation?

Before: act(norm(Wx)). After: norm(act(Wx)). In a residual block "after" is
norm(act(W₂ norm(act(W₁x)) + s(x))), and "pre-activation" is x + W₂ act(norm(W₁ act(norm(x)))). The learning
rate is tuned for every place. All networks train long enough to fit their training data: after the 30 to 60
steps that ResNet-20 could be given here, a pilot saw how fast each place learns, and not how well.
"""

from functools import partial

from bnbench.study import Arm, Cell, Design, Factor, Hypothesis, Study, Trial, cross
from bnbench.study.estimands import accuracy_difference

CNN = {"model": "cnn", "model_options": {"channels": 16}}
RESNET = {"model": "resnet8"}
PRIMARY = ("mlp-digits", "mlp-mnist1d", "cnn-digits", "cnn-mnist1d", "resnet8-digits", "resnet8-mnist1d")
RESIDUAL = ("resnet8-digits",)

# Replicates below 300 were looked at while lengths and grid were chosen; six of
# them, tuned in the same way, gave the expected half-widths.
QUICK = Design(
    base=Trial(schedule="trapezoid", warmup=0.05, seed=300, data_seed=300),
    cells=(
        Cell(
            "mlp-digits", data="digits", model="mlp", steps=150, constants={"delta_acc": 1.0}, replicates=20
        ),
        Cell(
            "mlp-mnist1d", data="mnist1d", model="mlp", steps=600, constants={"delta_acc": 1.0}, replicates=20
        ),
        Cell("cnn-digits", data="digits", steps=100, **CNN, constants={"delta_acc": 1.0}),
        Cell("cnn-mnist1d", data="mnist1d", steps=400, **CNN, constants={"delta_acc": 0.5}),
        Cell("resnet8-digits", data="digits", steps=80, **RESNET, constants={"delta_acc": 1.0}),
        Cell("resnet8-mnist1d", data="mnist1d", steps=120, **RESNET, constants={"delta_acc": 0.5}),
    ),
    arms=(
        Arm("before", order="norm-act"),
        Arm("after", order="act-norm"),
        Arm("pre-activation", order="pre-act", cells=RESIDUAL),
    ),
    lr=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    tuning="once",
    curve_points=0,
)

# 40 epochs of 45,000 images in batches of 128. No pilot has run on a GPU yet.
FULL_PRIMARY = (
    Cell(
        "mlp-cifar10", model="mlp", augment="none", model_options={"width": 512}, constants={"delta_acc": 0.5}
    ),
    Cell(
        "cnn-cifar10",
        model="cnn",
        model_options={"depth": 6, "channels": 64},
        constants={"delta_acc": 0.5},
    ),
    Cell("vgg11-cifar10", model="vgg11", constants={"delta_acc": 0.5}),
    Cell("resnet20-cifar10", model="resnet20", constants={"delta_acc": 0.5}),
)
FULL = Design(
    base=Trial(
        data="cifar10",
        augment="crop-flip",
        batch_size=128,
        steps=14040,
        schedule="trapezoid",
        warmup=0.125,
        weight_decay=5e-4,
    ),
    cells=(
        *FULL_PRIMARY,
        *cross(FULL_PRIMARY[1:2], Factor("activation", ("tanh", "sigmoid", "gelu"))),
        Cell(
            "cnn-cifar10 · no affine",
            model="cnn",
            model_options={"depth": 6, "channels": 64},
            norm_options={"affine": False},
            constants={"delta_acc": 0.5},
        ),
    ),
    arms=(
        Arm("before", order="norm-act"),
        Arm("after", order="act-norm"),
        Arm("pre-activation", order="pre-act", cells=("resnet20-cifar10",)),
        Arm("none", norm="none", cells=tuple(cell.name for cell in FULL_PRIMARY)),
    ),
    lr=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    tuning="once",
)

STUDY = Study(
    name="placement",
    question="Does batch normalization belong before the activation?",
    baseline="before",
    hypotheses=(
        Hypothesis(
            name="P2.a",
            claim="P2",
            sentence="Normalizing before the activation is more accurate than after it.",
            estimand=partial(accuracy_difference, better="before", other="after"),
            delta="delta_acc",
            better=("before",),
            other=("after",),
            unit="pp",
            cells=(*PRIMARY, *(cell.name for cell in FULL_PRIMARY)),
            half_width={
                "mlp-digits": 0.52,
                "mlp-mnist1d": 0.46,
                "cnn-digits": 1.2,
                "cnn-mnist1d": 0.5,
                "resnet8-digits": 0.6,
                "resnet8-mnist1d": 1.1,
            },
        ),
        Hypothesis(
            name="P2.variants",
            claim="P2",
            sentence="So it is with another activation, or without scale and shift.",
            estimand=partial(accuracy_difference, better="before", other="after"),
            delta="delta_acc",
            better=("before",),
            other=("after",),
            unit="pp",
            primary=False,
            cells=tuple(cell.name for cell in FULL.cells[len(FULL_PRIMARY) :]),
        ),
        Hypothesis(
            name="P2.common",
            claim="P2",
            sentence="At the learning rate that suits the place before, it is more accurate than after.",
            estimand=partial(accuracy_difference, better="before", other="after", role="common"),
            delta="delta_acc",
            better=("before",),
            other=("after",),
            unit="pp",
            primary=False,
            cells=(*PRIMARY, *(cell.name for cell in FULL_PRIMARY)),
        ),
        Hypothesis(
            name="P2.pre-activation",
            claim="P2",
            sentence="In a residual network, pre-activation blocks are more accurate than the usual ones.",
            estimand=partial(accuracy_difference, better="pre-activation", other="before"),
            delta="delta_acc",
            better=("pre-activation",),
            other=("before",),
            unit="pp",
            primary=False,
            cells=(*RESIDUAL, "resnet20-cifar10"),
        ),
    ),
    quick=QUICK,
    full=FULL,
)
