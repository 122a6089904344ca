"""P5: does batch normalization combine well with dropout and with weight decay?

Dropout is in every hidden layer after the activation, at 0.1 or 0.3; the better of the two by validation is
read. Its place: directly before the normalization, where the variance differs between training (with dropout)
and evaluation (without), or before the classifier only. Weight decay acts on the weights, or on scales and
shifts too. 400 training samples leave something to regularize.
"""

from functools import partial

from bnbench.study import Arm, Cell, Design, Hypothesis, Study, Trial
from bnbench.study.estimands import accuracy_difference, best_difference, interaction, metric_change

CNN = {"model": "cnn", "model_options": {"channels": 16}}
FITS = {"delta_acc": 1.0, "min_train_acc": 0.95}
FULL_CELLS = ("resnet20-cifar10", "vgg11-cifar10", "resnet18-cifar100")
BESIDE_CELLS = ("mlp-mnist1d",)
BATCH_DROPOUT = ("batch, dropout 0.1", "batch, dropout 0.3")
NONE_DROPOUT = ("none, dropout 0.1", "none, dropout 0.3")

ARMS = (
    Arm("batch", norm="batch"),
    Arm("batch, dropout 0.1", norm="batch", dropout=0.1),
    Arm("batch, dropout 0.3", norm="batch", dropout=0.3),
)
BESIDE = (
    {"name": "none", "norm": "none"},
    {"name": "none, dropout 0.1", "norm": "none", "dropout": 0.1},
    {"name": "none, dropout 0.3", "norm": "none", "dropout": 0.3},
    {"name": "none, decay 0.01", "norm": "none", "weight_decay": 0.01},
    {"name": "before, dropout 0.3", "norm": "batch", "dropout": 0.3, "dropout_at": "before-norm"},
    {"name": "last, dropout 0.3", "norm": "batch", "dropout": 0.3, "dropout_at": "last"},
    {"name": "batch, decay 0.01", "norm": "batch", "weight_decay": 0.01},
    {"name": "batch, decay 0.01 on all", "norm": "batch", "weight_decay": 0.01, "decay_norm": True},
)

# Replicates below 300 were looked at while lengths and grid were chosen; six of them, tuned in the same way,
# gave the expected half-widths. A first version of this study, on the replicates 300 to 309, had a grid from
# 0.003 to 1, and in two cells the arm without dropout chose 1, so that there was no verdict.
QUICK = Design(
    base=Trial(schedule="trapezoid", warmup=0.05, n_train=400, seed=400, data_seed=400),
    cells=(
        Cell("mlp-digits", data="digits", model="mlp", steps=200, constants=FITS, replicates=20),
        Cell("mlp-mnist1d", data="mnist1d", model="mlp", steps=300, constants=FITS, replicates=20),
        Cell("cnn-digits", data="digits", steps=150, **CNN, constants=FITS),
        Cell("cnn-mnist1d", data="mnist1d", steps=250, **CNN, constants={**FITS, "delta_acc": 0.5}),
    ),
    arms=(*ARMS, *(Arm(**arm, cells=BESIDE_CELLS) for arm in BESIDE)),
    lr=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    tuning="once",
    curve_points=0,
)

# 40 epochs of 45,000 images in batches of 128. No pilot has run on a GPU yet.
FULL = Design(
    base=Trial(data="cifar10", batch_size=128, steps=14040, schedule="trapezoid", warmup=0.125),
    cells=(
        Cell("resnet20-cifar10", model="resnet20", augment="crop-flip", constants={"delta_acc": 0.5}),
        Cell("vgg11-cifar10", model="vgg11", constants={"delta_acc": 0.5, "min_train_acc": 0.95}),
        Cell("resnet18-cifar100", data="cifar100", model="resnet18", constants={"delta_acc": 1.0}),
    ),
    arms=(
        *ARMS,
        Arm("batch, dropout 0.5", norm="batch", dropout=0.5),
        *(Arm(**arm) for arm in BESIDE),
        *(
            Arm(f"{norm}, decay {decay:g}", norm=norm, weight_decay=decay)
            for norm in ("none", "batch")
            for decay in (1e-4, 5e-4, 2e-3)
        ),
    ),
    lr=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    tuning="once",
)

STUDY = Study(
    name="combination",
    question="Does batch normalization gain from dropout and from weight decay?",
    baseline="batch",
    hypotheses=(
        Hypothesis(
            name="P5.a",
            claim="P5",
            sentence="Batch normalization with dropout, at the better of two rates, is more accurate than"
            " without.",
            estimand=partial(best_difference, better=BATCH_DROPOUT, other=("batch",)),
            delta="delta_acc",
            better=BATCH_DROPOUT,
            other=("batch",),
            unit="pp",
            half_width={"mlp-digits": 0.49, "mlp-mnist1d": 0.59, "cnn-digits": 0.7, "cnn-mnist1d": 2.5},
        ),
        Hypothesis(
            name="P5.nll",
            claim="P5",
            sentence="Its test loss is lower as well.",
            estimand=partial(
                best_difference,
                better=BATCH_DROPOUT,
                other=("batch",),
                metric="test/loss_precise",
                points=-1.0,
            ),
            delta=0.03,
            better=BATCH_DROPOUT,
            other=("batch",),
            unit="nats",
            primary=False,
        ),
        Hypothesis(
            name="P5.b",
            claim="P5",
            sentence="Dropout adds more accuracy to a network without normalization than to one with it.",
            estimand=partial(
                interaction,
                treated=NONE_DROPOUT,
                plain=("none",),
                other_treated=BATCH_DROPOUT,
                other_plain=("batch",),
            ),
            delta="delta_acc",
            better=("none", *NONE_DROPOUT, *BATCH_DROPOUT),
            other=("batch",),
            unit="pp",
            primary=False,
            cells=(*BESIDE_CELLS, *FULL_CELLS),
        ),
        Hypothesis(
            name="P5.c",
            claim="P5",
            sentence="Dropout before the classifier only is more accurate than directly before every"
            " normalization.",
            estimand=partial(accuracy_difference, better="last, dropout 0.3", other="before, dropout 0.3"),
            delta="delta_acc",
            better=("last, dropout 0.3", "before, dropout 0.3"),
            other=("batch",),
            unit="pp",
            primary=False,
            cells=(*BESIDE_CELLS, *FULL_CELLS),
        ),
        Hypothesis(
            name="P5.d",
            claim="P5",
            sentence="With dropout before the normalization, statistics recomputed without dropout raise test"
            " accuracy.",
            estimand=partial(
                metric_change, arm="before, dropout 0.3", metric="test/acc_precise", minus="test/acc"
            ),
            delta="delta_acc",
            better=("before, dropout 0.3",),
            other=("batch",),
            unit="pp",
            primary=False,
            cells=(*BESIDE_CELLS, *FULL_CELLS),
        ),
        Hypothesis(
            name="P5.decay",
            claim="P5",
            sentence="Weight decay raises the accuracy of batch normalization.",
            estimand=partial(accuracy_difference, better="batch, decay 0.01", other="batch"),
            delta="delta_acc",
            better=("batch, decay 0.01",),
            other=("batch",),
            unit="pp",
            primary=False,
            cells=(*BESIDE_CELLS, *FULL_CELLS),
        ),
        Hypothesis(
            name="P5.decay on all",
            claim="P5",
            sentence="To decay scales and shifts too makes no difference.",
            estimand=partial(
                accuracy_difference, better="batch, decay 0.01 on all", other="batch, decay 0.01"
            ),
            delta="delta_acc",
            better=("batch, decay 0.01 on all", "batch, decay 0.01"),
            other=("batch",),
            kind="equivalent",
            unit="pp",
            primary=False,
            cells=(*BESIDE_CELLS, *FULL_CELLS),
        ),
        Hypothesis(
            name="P5.decay interaction",
            claim="P5",
            sentence="Weight decay adds more accuracy to a network without normalization than to one with"
            " it.",
            estimand=partial(
                interaction,
                treated=("none, decay 0.01",),
                plain=("none",),
                other_treated=("batch, decay 0.01",),
                other_plain=("batch",),
            ),
            delta="delta_acc",
            better=("none", "none, decay 0.01", "batch, decay 0.01"),
            other=("batch",),
            unit="pp",
            primary=False,
            cells=(*BESIDE_CELLS, *FULL_CELLS),
        ),
    ),
    quick=QUICK,
    full=FULL,
)
