"""C3: does batch normalization regularize, and does it do so by the noise of its statistics?

The SGD batch stays 64, and only the number of samples that are normalized together (NBS) changes, by ghost
batches: the fewer, the noisier the statistics. Scores use precise statistics, so that an error of the running
averages is not taken for an effect of the noise. Controls without this noise: layer normalization; batch
normalization whose statistics are frozen after a tenth of the training; virtual batch normalization by 256
reference samples. Few training samples (400) leave something to regularize.

Probes in two replicates measure the noise and the gap between statistics; no verdict reads them.

Noise also slows fitting down. In the cells "matched" every training stops at the same training loss instead.
"""

from functools import partial

from bnbench.study import Arm, Cell, Design, Hypothesis, Study, Trial
from bnbench.study.estimands import accuracy_difference, interior_gain, metric_slope

CNN = {"model": "cnn", "model_options": {"channels": 16}}
PRIMARY = ("mlp-digits", "mlp-mnist1d", "cnn-digits", "cnn-mnist1d")
MATCHED = "mlp-mnist1d, matched"

# Replicates below 300 were looked at while lengths, grid and the matched loss were chosen; six of
# them, tuned in the same way, gave the expected half-widths.
QUICK = Design(
    base=Trial(schedule="trapezoid", warmup=0.05, n_train=400, seed=300, data_seed=300),
    cells=(
        Cell(
            "mlp-digits",
            data="digits",
            model="mlp",
            steps=150,
            constants={"min_train_acc": 0.95},
            replicates=20,
        ),
        Cell(
            "mlp-mnist1d",
            data="mnist1d",
            model="mlp",
            steps=400,
            constants={"min_train_acc": 0.95},
            replicates=20,
        ),
        Cell("cnn-digits", data="digits", steps=150, **CNN, constants={"min_train_acc": 0.95}),
        Cell("cnn-mnist1d", data="mnist1d", steps=200, **CNN, constants={"min_train_acc": 0.95}),
        Cell(
            MATCHED,
            data="mnist1d",
            model="mlp",
            steps=300,
            until_train_nll=0.1,
            schedule="constant",
        ),
    ),
    arms=(
        Arm("none", norm="none"),
        Arm("layer", norm="layer", cells=("mlp-mnist1d", MATCHED)),
        Arm("NBS 4", norm="ghost_batch", norm_options={"ghost_size": 4}, cells=PRIMARY),
        Arm("NBS 16", norm="ghost_batch", norm_options={"ghost_size": 16}),
        Arm("NBS full", norm="batch"),
        Arm(
            "frozen",
            norm="frozen_batch",
            norm_options={"freeze_after": 0.1, "learn_affine": True},
            cells=(MATCHED,),
        ),
        Arm(
            "virtual",
            norm="virtual_batch",
            norm_options={"reference_size": 256, "own_weight": 0},
            cells=(MATCHED,),
        ),
    ),
    lr=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    tuning="once",
    curve_points=0,
    probes={name: {"steps": [0, 150, 300]} for name in ("batch_noise", "eval_gap")},
    probed=2,
)

# The SGD batch is 512, 40 epochs. No pilot has run on a GPU yet.
FULL = Design(
    base=Trial(
        data="cifar10",
        augment="crop-flip",
        batch_size=512,
        steps=3480,
        schedule="trapezoid",
        warmup=0.125,
        weight_decay=5e-4,
    ),
    cells=(
        Cell("resnet18-cifar10", model="resnet18"),
        Cell("resnet18-cifar100", data="cifar100", model="resnet18"),
        Cell("vgg11-cifar10", model="vgg11"),
        Cell("resnet18-cifar10, plain", model="resnet18", augment="none", constants={"min_train_acc": 0.95}),
        Cell("resnet18-cifar10, noisy labels", model="resnet18", label_noise=0.2),
        Cell("resnet18-cifar10, 4500 samples", model="resnet18", n_train=4500),
        Cell("resnet18-cifar10, 4500 samples, plain", model="resnet18", n_train=4500, augment="none"),
        Cell("resnet18-cifar10, matched", model="resnet18", until_train_nll=0.3, schedule="constant"),
    ),
    arms=(
        Arm("none", norm="none"),
        Arm("layer", norm="layer"),
        Arm("group", norm="group"),
        *(
            Arm(f"NBS {size}", norm="ghost_batch", norm_options={"ghost_size": size})
            for size in (8, 16, 32, 64, 128)
        ),
        Arm("NBS full", norm="batch"),
        Arm("frozen", norm="frozen_batch", norm_options={"freeze_after": 0.1, "learn_affine": True}),
    ),
    lr=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    tuning="once",
    probes={name: {"every": 700} for name in ("batch_noise", "eval_gap")},
    probed=2,
)

QUICK_NBS = (("NBS 4", -2.0), ("NBS 16", -4.0), ("NBS full", -6.0))
FULL_NBS = (*((f"NBS {2**k}", -float(k)) for k in (3, 4, 5, 6, 7)), ("NBS full", -9.0))
FULL_CELLS = ("resnet18-cifar10", "resnet18-cifar100", "vgg11-cifar10")
MATCHED_CELLS = (MATCHED, "resnet18-cifar10, matched")

STUDY = Study(
    name="regularization",
    question="Does the noise of batch statistics regularize?",
    baseline="NBS full",
    hypotheses=(
        Hypothesis(
            name="C3.a",
            claim="C3",
            sentence="With noisier statistics (16 samples normalized together instead of the whole batch) the"
            " test loss is lower.",
            estimand=partial(
                accuracy_difference,
                better="NBS 16",
                other="NBS full",
                metric="test/loss_precise",
                points=-1.0,
            ),
            delta=0.03,
            better=("NBS 16",),
            other=("NBS full",),
            unit="nats",
            cells=(*PRIMARY, *FULL_CELLS),
            half_width=dict(zip(PRIMARY, (0.033, 0.26, 0.01, 0.07), strict=True)),
        ),
        *(
            Hypothesis(
                name=f"C3.a2 {preset}",
                claim="C3",
                sentence="Halving the samples that are normalized together raises the training loss.",
                estimand=partial(metric_slope, doses=doses, metric="train/loss"),
                delta=0.01,
                better=tuple(arm for arm, _ in doses[:-1]),
                other=("NBS full",),
                unit="nats/halving",
                primary=False,
                cells=cells,
            )
            for preset, doses, cells in (("quick", QUICK_NBS, PRIMARY), ("full", FULL_NBS, FULL_CELLS))
        ),
        Hypothesis(
            name="C3.accuracy",
            claim="C3",
            sentence="The noisier statistics also raise test accuracy.",
            estimand=partial(
                accuracy_difference, better="NBS 16", other="NBS full", metric="test/acc_precise"
            ),
            delta=1.0,
            better=("NBS 16",),
            other=("NBS full",),
            unit="pp",
            primary=False,
        ),
        Hypothesis(
            name="C3.interior",
            claim="C3",
            sentence="An intermediate noise has a higher test accuracy than both the least and the most.",
            estimand=partial(interior_gain, arms=("NBS 4", "NBS 16", "NBS full"), metric="test/acc_precise"),
            delta=1.0,
            better=("NBS 4", "NBS 16"),
            other=("NBS full",),
            unit="pp",
            primary=False,
            cells=PRIMARY,
        ),
        *(
            Hypothesis(
                name=f"C3.b {twin}",
                claim="C3",
                sentence="At the same training loss, batch normalization has a lower test loss than"
                f" {words}.",
                estimand=partial(
                    accuracy_difference,
                    better="NBS full",
                    other=twin,
                    metric="test/loss_precise",
                    points=-1.0,
                ),
                delta=0.03,
                better=("NBS full",),
                other=(twin,),
                unit="nats",
                primary=False,
                cells=cells,
            )
            for twin, words, cells in (
                ("layer", "layer normalization, which has no such noise", MATCHED_CELLS),
                ("frozen", "with statistics that are frozen, and so without noise", MATCHED_CELLS),
                ("virtual", "with the statistics of a reference batch, which have no noise", (MATCHED,)),
            )
        ),
        Hypothesis(
            name="C3.c",
            claim="C3",
            sentence="At the standard batch size, batch normalization has a lower test loss than no"
            " normalization.",
            estimand=partial(
                accuracy_difference, better="NBS full", other="none", metric="test/loss_precise", points=-1.0
            ),
            delta=0.03,
            better=("NBS full",),
            other=("none",),
            unit="nats",
            primary=False,
        ),
    ),
    quick=QUICK,
    full=FULL,
)
