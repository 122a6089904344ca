"""C1: does batch normalization speed up training?

Steps to a target accuracy, and the time that they take: the step time of every arm is measured in a short row
of every replicate, while nothing else runs. The learning rate is constant after a short warm-up and falls
only over the last fifth of the steps: a schedule that falls throughout would itself set the time to the
target, and one that never falls would leave the choice of the rate to noise. A target lies 95 % of the way
from chance to what the arm without normalization reached before the fall, in four pilot replicates; six,
tuned in the same way, gave the expected half-widths. None of them is used again. Probes in three replicates
show the loss along the gradient and its flow; no verdict reads them.
"""

from functools import partial
from math import log

from bnbench.study import Arm, Cell, Design, Hypothesis, Study, Trial
from bnbench.study.estimands import accuracy_difference, area_difference, log_steps_ratio, log_time_ratio

ARMS = (Arm("none", norm="none"), Arm("batch", norm="batch"), Arm("layer", norm="layer"))

# Replicates below 300 were looked at while lengths, grid and targets were chosen.
QUICK = Design(
    base=Trial(schedule="trapezoid", warmup=0.05, seed=300, data_seed=300),
    cells=(
        Cell(
            "mlp-digits",
            data="digits",
            model="mlp",
            steps=75,
            constants={"target": 0.91, "delta_acc": 1.0},
            replicates=20,
        ),
        Cell(
            "mlp-mnist1d",
            data="mnist1d",
            model="mlp",
            steps=600,
            constants={"target": 0.54, "delta_acc": 1.0},
            replicates=20,
        ),
        Cell(
            "cnn-digits",
            data="digits",
            model="cnn",
            model_options={"channels": 16},
            steps=150,
            constants={"target": 0.87, "delta_acc": 1.0},
        ),
        Cell(
            "cnn-mnist1d",
            data="mnist1d",
            model="cnn",
            model_options={"channels": 16},
            steps=250,
            constants={"target": 0.68, "delta_acc": 0.5},
        ),
    ),
    arms=ARMS,
    lr=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    timing_steps=200,
    probes={"landscape": {"steps": [0, 30, 70, 200, 500]}, "gradient_flow": {"every": 50}},
    probed=3,
)

# 40 epochs of 45,000 images in batches of 128. The targets are guesses: no pilot has run on a GPU yet. With
# sigmoid, where a network without normalization may not train at all, it is what one with it may reach.
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
        Cell(
            "mlp-cifar10",
            model="mlp",
            augment="none",
            model_options={"width": 512},
            constants={"target": 0.45, "delta_acc": 0.5},
        ),
        Cell(
            "mlp12-cifar10",
            model="mlp",
            augment="none",
            model_options={"depth": 12, "width": 512},
            constants={"target": 0.45, "delta_acc": 0.5},
        ),
        Cell(
            "mlp-cifar10, sigmoid",
            model="mlp",
            augment="none",
            activation="sigmoid",
            model_options={"width": 512},
            constants={"target": 0.4, "delta_acc": 0.5},
        ),
        Cell(
            "cnn-cifar10",
            model="cnn",
            model_options={"depth": 6, "channels": 64},
            constants={"target": 0.65, "delta_acc": 0.5},
        ),
        Cell(
            "cnn-cifar10, sigmoid",
            model="cnn",
            activation="sigmoid",
            model_options={"depth": 6, "channels": 64},
            constants={"target": 0.55, "delta_acc": 0.5},
        ),
        Cell("resnet20-cifar10", model="resnet20", constants={"target": 0.75, "delta_acc": 0.5}),
        Cell("vgg11-cifar10", model="vgg11", constants={"target": 0.75, "delta_acc": 0.5}),
        Cell("resnet56-cifar10", model="resnet56", constants={"target": 0.75, "delta_acc": 0.5}),
    ),
    arms=ARMS,
    lr=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    timing_steps=200,
    probes={"landscape": {"every": 700}, "gradient_flow": {"every": 700}},
    probed=3,
)
PRIMARY = (
    *(cell.name for cell in QUICK.cells),
    *(f"{model}-cifar10" for model in ("mlp", "mlp12", "cnn", "vgg11", "resnet20", "resnet56")),
)

STUDY = Study(
    name="convergence",
    question="Does a network with batch normalization need fewer steps to a target accuracy?",
    baseline="none",
    hypotheses=(
        Hypothesis(
            name="C1.a",
            claim="C1",
            sentence="At each arm's best learning rate, batch normalization needs fewer steps to the target.",
            estimand=partial(log_steps_ratio, better="batch", other="none", role="own"),
            delta=log(1.25),
            better=("batch",),
            other=("none",),
            unit="log ratio",
            cells=PRIMARY,
            half_width={"mlp-digits": 0.33, "mlp-mnist1d": 0.12, "cnn-digits": 0.18, "cnn-mnist1d": 0.22},
        ),
        Hypothesis(
            name="C1.sigmoid",
            claim="C1",
            sentence="With sigmoid units, it needs fewer steps to the target as well.",
            estimand=partial(log_steps_ratio, better="batch", other="none", role="own"),
            delta=log(1.25),
            better=("batch",),
            other=("none",),
            unit="log ratio",
            primary=False,
            cells=("mlp-cifar10, sigmoid", "cnn-cifar10, sigmoid"),
        ),
        Hypothesis(
            name="C1.b",
            claim="C1",
            sentence="At the best learning rate of the network without it, it needs fewer steps too.",
            estimand=partial(log_steps_ratio, better="batch", other="none", role="common"),
            delta=log(1.25),
            better=("batch",),
            other=("none",),
            unit="log ratio",
            primary=False,
        ),
        Hypothesis(
            name="C1.c",
            claim="C1",
            sentence="It needs less time to the target too, although each of its steps takes longer.",
            estimand=partial(log_time_ratio, better="batch", other="none"),
            delta=log(1.25),
            better=("batch",),
            other=("none",),
            unit="log ratio",
            primary=False,
        ),
        Hypothesis(
            name="C1.area",
            claim="C1",
            sentence="Over the whole training, its mean validation accuracy is higher.",
            estimand=partial(area_difference, better="batch", other="none"),
            delta="delta_acc",
            better=("batch",),
            other=("none",),
            unit="pp",
            primary=False,
        ),
        Hypothesis(
            name="C1.layer",
            claim="C1",
            sentence="Layer normalization, which uses no batch statistics, needs fewer steps as well.",
            estimand=partial(log_steps_ratio, better="layer", other="none", role="own"),
            delta=log(1.25),
            better=("layer",),
            other=("none",),
            unit="log ratio",
            primary=False,
        ),
        Hypothesis(
            name="C1.test",
            claim="C1",
            sentence="After the same steps, batch normalization is more accurate on test data.",
            estimand=partial(accuracy_difference, better="batch", other="none", metric="test/acc"),
            delta="delta_acc",
            better=("batch",),
            other=("none",),
            unit="pp",
            primary=False,
        ),
    ),
    quick=QUICK,
    full=FULL,
)
