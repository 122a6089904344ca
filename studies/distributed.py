"""P3 on several devices: does each device's own small batch cost accuracy, and does SyncBN repair that?

Under data parallelism every device normalizes the samples that it has: a batch of 8 on two devices is
normalized by fours. Synchronized batch normalization takes the statistics of all 8, as one device would.
Group and layer normalization use no batch statistics. Arms are named by devices x samples of each.

Rows of one and of two devices are trained by one back end: the same trainer and kernels, from the same
initial weights, on the same batches. Two devices average what each has computed, so group, layer and
synchronized normalization differ from one device by rounding alone (tests hold that to 1e-9 in float64), and
where images are augmented by the second device's own draws. In `quick`, layer normalization therefore trains
on one device, which costs less; and where nothing is augmented, synchronized statistics on two devices and
one device with both shares can have the same accuracy to the last digit, so their equivalence is a hypothesis
in `full` alone. All of this is exploratory.
"""

from functools import partial

from bnbench.study import Arm, Cell, Design, Hypothesis, Study, Trial
from bnbench.study.estimands import accuracy_difference

# Replicates below 300 were looked at while steps and grid were chosen.
QUICK = Design(
    base=Trial(schedule="trapezoid", warmup=0.05, seed=300, data_seed=300),
    cells=(
        Cell(
            "mlp2-mnist1d",
            data="mnist1d",
            model="mlp",
            model_options={"depth": 2},
            steps=60,
            constants={"delta_acc": 1.0},
        ),
    ),
    arms=(
        Arm("local, 2 x 4", norm="batch", devices=2, batch_size=4),
        Arm("synchronized, 2 x 4", norm="sync_batch", devices=2, batch_size=4),
        Arm("layer, batch of 8", norm="layer", batch_size=8),
    ),
    lr=(0.003, 0.01, 0.03),
    replicates=5,
    tuning="once",
    curve_points=3,
)

# 10 epochs of 45,000 images at every batch size. No pilot has run on a GPU yet.
FULL = Design(
    base=Trial(
        data="cifar10", augment="crop-flip", schedule="trapezoid", warmup=0.125, weight_decay=5e-4, devices=2
    ),
    cells=(Cell("resnet20-cifar10", model="resnet20", constants={"delta_acc": 0.5}),),
    arms=(
        Arm("local, 2 x 4", norm="batch", batch_size=4, steps=56250),
        Arm("synchronized, 2 x 4", norm="sync_batch", batch_size=4, steps=56250),
        Arm("batch, 1 x 8", norm="batch", devices=1, batch_size=8, steps=56250),
        Arm("group, batch of 8", norm="group", batch_size=4, steps=56250),
        Arm("layer, batch of 8", norm="layer", batch_size=4, steps=56250),
        Arm("local, 2 x 16", norm="batch", batch_size=16, steps=14060),
        Arm("synchronized, 2 x 16", norm="sync_batch", batch_size=16, steps=14060),
        Arm("local, 2 x 64", norm="batch", batch_size=64, steps=3510),
        Arm("synchronized, 2 x 64", norm="sync_batch", batch_size=64, steps=3510),
    ),
    lr=(0.003, 0.01, 0.03, 0.1, 0.3),
    replicates=5,
    tuning="once",
)

STUDY = Study(
    name="distributed",
    question="Does batch normalization on several devices lose accuracy, and does SyncBN repair it?",
    baseline="synchronized, 2 x 4",
    hypotheses=(
        Hypothesis(
            name="P3.sync",
            claim="P3",
            sentence="With 4 samples a device, synchronized statistics are more accurate than local ones.",
            estimand=partial(accuracy_difference, better="synchronized, 2 x 4", other="local, 2 x 4"),
            delta="delta_acc",
            better=("synchronized, 2 x 4",),
            other=("local, 2 x 4",),
            unit="pp",
            primary=False,
        ),
        Hypothesis(
            name="P3.sync joined",
            claim="P3",
            sentence="Synchronized statistics on two devices are as accurate as one device with both shares.",
            estimand=partial(accuracy_difference, better="synchronized, 2 x 4", other="batch, 1 x 8"),
            delta="delta_acc",
            better=("synchronized, 2 x 4", "batch, 1 x 8"),
            kind="equivalent",
            unit="pp",
            primary=False,
            cells=("resnet20-cifar10",),
        ),
        Hypothesis(
            name="P3.sync group",
            claim="P3",
            sentence="With batches of 8, group normalization is more accurate than statistics of 4 samples.",
            estimand=partial(accuracy_difference, better="group, batch of 8", other="local, 2 x 4"),
            delta="delta_acc",
            better=("group, batch of 8",),
            other=("local, 2 x 4",),
            unit="pp",
            primary=False,
            cells=("resnet20-cifar10",),
        ),
        Hypothesis(
            name="P3.sync layer",
            claim="P3",
            sentence="With batches of 8, layer normalization is more accurate than statistics of 4 samples.",
            estimand=partial(accuracy_difference, better="layer, batch of 8", other="local, 2 x 4"),
            delta="delta_acc",
            better=("layer, batch of 8",),
            other=("local, 2 x 4",),
            unit="pp",
            primary=False,
        ),
        Hypothesis(
            name="P3.sync 16",
            claim="P3",
            sentence="With 16 samples a device, synchronized statistics are more accurate than local ones.",
            estimand=partial(accuracy_difference, better="synchronized, 2 x 16", other="local, 2 x 16"),
            delta="delta_acc",
            better=("synchronized, 2 x 16",),
            other=("local, 2 x 16",),
            unit="pp",
            primary=False,
            cells=("resnet20-cifar10",),
        ),
    ),
    quick=QUICK,
    full=FULL,
)
