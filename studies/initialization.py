"""P1: does it matter to initialize the weights as Xavier or He say?

With batch normalization after every linear map, the scale of the weights before it changes only the
effective learning rate, so once that is tuned an initialization may not matter at all (P1.a). Without it, a
ReLU network keeps the size of its signals with He's variance only: Xavier's loses a factor √2 a layer,
torch's default √6 (P1.b, over 20 layers). Biases: with batch normalization they are dead;
without it they start at zero or, as torch's own layers do, uniformly.
"""

from functools import partial

from bnbench.study import Arm, Cell, Design, Hypothesis, Study, Trial
from bnbench.study.estimands import accuracy_difference

INITS = {"xavier": "Xavier's", "torch": "torch's default", "normal": "N(0, 0.01²)"}
HALF_WIDTHS = {
    "xavier": {"mlp8-digits": 0.72, "cnn-digits": 0.6},
    "torch": {"mlp8-digits": 0.52, "cnn-digits": 0.7},
    "normal": {"mlp8-digits": 0.39, "cnn-digits": 0.8},
}
SHALLOW, DEEP = ("mlp8-digits", "cnn-digits"), ("mlp20-digits",)
FULL_DEEP = ("mlp20-cifar10", "vgg16-cifar10")

# Replicates below 300 were looked at while lengths and grid were chosen; six of
# them, tuned in the same way, gave the expected half-widths.
QUICK = Design(
    base=Trial(schedule="trapezoid", warmup=0.05, seed=300, data_seed=300),
    cells=(
        Cell(
            "mlp8-digits",
            data="digits",
            model="mlp",
            model_options={"depth": 8},
            steps=150,
            constants={"delta_acc": 1.0},
            replicates=20,
        ),
        Cell(
            "cnn-digits",
            data="digits",
            model="cnn",
            model_options={"channels": 16},
            steps=150,
            constants={"delta_acc": 1.0},
        ),
        Cell(
            "mlp20-digits",
            data="digits",
            model="mlp",
            model_options={"depth": 20},
            steps=80,
            constants={"delta_acc": 1.0},
        ),
    ),
    arms=(
        Arm("batch, he", norm="batch"),
        *(Arm(f"batch, {init}", norm="batch", init=init, cells=SHALLOW) for init in INITS),
        Arm("none, he", norm="none", cells=DEEP),
        *(Arm(f"none, {init}", norm="none", init=init, cells=DEEP) for init in INITS),
        Arm("none, he, uniform bias", norm="none", bias_init="uniform", cells=DEEP),
    ),
    lr=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    tuning="once",
    curve_points=0,
)

# 40 epochs of 45,000 images in batches of 128. No pilot has run on a GPU yet.
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
        Cell("vgg16-cifar10", model="vgg16", constants={"delta_acc": 0.5}),
        Cell("resnet20-cifar10", model="resnet20", constants={"delta_acc": 0.5}),
        Cell(
            "mlp20-cifar10",
            model="mlp",
            augment="none",
            model_options={"depth": 20, "width": 512},
            constants={"delta_acc": 0.5},
        ),
    ),
    arms=(
        Arm("batch, he", norm="batch"),
        *(Arm(f"batch, {init}", norm="batch", init=init) for init in (*INITS, "lecun", "orthogonal")),
        Arm(
            "batch, he, zero gamma",
            norm="batch",
            model_options={"zero_gamma": True},
            cells=("resnet20-cifar10",),
        ),
        Arm("none, he", norm="none", cells=FULL_DEEP),
        *(Arm(f"none, {init}", norm="none", init=init, cells=FULL_DEEP) for init in INITS),
        Arm("none, he, uniform bias", norm="none", bias_init="uniform", cells=FULL_DEEP),
    ),
    lr=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    tuning="once",
)

STUDY = Study(
    name="initialization",
    question="Does the initialization of the weights matter, with batch normalization and without?",
    baseline="batch, he",
    hypotheses=(
        *(
            Hypothesis(
                name=f"P1.a {init}",
                claim="P1",
                sentence=f"With batch normalization, {words} initialization is as accurate as He's.",
                estimand=partial(accuracy_difference, better="batch, he", other=f"batch, {init}"),
                delta="delta_acc",
                better=("batch, he", f"batch, {init}"),
                kind="equivalent",
                unit="pp",
                cells=(*SHALLOW, "vgg16-cifar10", "resnet20-cifar10"),
                against=True,
                half_width=HALF_WIDTHS[init],
            )
            for init, words in INITS.items()
        ),
        *(
            Hypothesis(
                name=f"P1.b {init}",
                claim="P1",
                sentence="Without normalization, a deep network from He's initialization is more accurate"
                f" than from {words}.",
                estimand=partial(accuracy_difference, better="none, he", other=f"none, {init}"),
                delta="delta_acc",
                better=("none, he",),
                other=(f"none, {init}",),
                unit="pp",
                primary=False,
                cells=(*DEEP, *FULL_DEEP),
            )
            for init, words in INITS.items()
        ),
        *(
            Hypothesis(
                name=f"P1.c {init}",
                claim="P1",
                sentence="With batch normalization, at the learning rate that suits He's initialization,"
                f" {words} is less accurate.",
                estimand=partial(
                    accuracy_difference, better="batch, he", other=f"batch, {init}", role="common"
                ),
                delta="delta_acc",
                better=("batch, he",),
                other=(f"batch, {init}",),
                unit="pp",
                primary=False,
                cells=(*SHALLOW, "vgg16-cifar10", "resnet20-cifar10"),
            )
            for init, words in INITS.items()
        ),
        Hypothesis(
            name="P1.bias",
            claim="P1",
            sentence="Without normalization, biases that start at zero are as good as uniform ones.",
            estimand=partial(accuracy_difference, better="none, he", other="none, he, uniform bias"),
            delta="delta_acc",
            better=("none, he", "none, he, uniform bias"),
            kind="equivalent",
            unit="pp",
            primary=False,
            cells=(*DEEP, *FULL_DEEP),
        ),
    ),
    quick=QUICK,
    full=FULL,
)
