"""P4: does the scale parameter γ control regularization, more of it the higher it is?

γ multiplies signal and batch noise alike, so it cannot change their ratio. Between a ReLU and the next batch
normalization it changes nothing at all (up to eps); that of the last layer scales the logits, as a
temperature does. So γ is fixed at several values in every layer, in all layers but the last, and in the last
alone; beside these stands a network with γ = 1 whose logits are multiplied by a constant.

The primary comparison stops every training at the same training loss, and divides the logits by one
temperature that is fitted on validation data: without the former a large γ fits sooner, without the latter
larger logits look like a larger gap. It reads the test loss, not its gap to the training loss: the training
loss is the same by design, and the temperature of an overconfident network (15 at γ = 5 in a pilot) would
raise it and so close the gap. 400 training samples leave something to regularize.
"""

from functools import partial

from bnbench.study import Arm, Cell, Design, Hypothesis, Study, Trial
from bnbench.study.estimands import accuracy_difference, metric_slope, spread_shrinkage

CNN = {"model": "cnn", "model_options": {"channels": 16}}
ONE = {"learn_gamma": False, "gamma": 1.0}
#: Fixed scales with their decades.
FOUR = {"0.5": -0.30103, "1": 0.0, "2": 0.30103, "5": 0.69897}
FIVE = {"0.2": -0.69897, "0.5": -0.30103, "1": 0.0, "2": 0.30103, "5": 0.69897}
ENDS = ("0.2", "5")
MATCHED = ("mlp-digits, matched", "mlp-mnist1d, matched", "cnn-digits, matched")
EQUAL_STEPS = "mlp-mnist1d, equal steps"
FULL_MATCHED = ("resnet20-cifar10, matched", "vgg11-cifar10, matched")
FULL_NOISY = "vgg11-cifar10, noisy labels, matched"
FULL_STEPS, FULL_NARROW = "vgg11-cifar10, equal steps", "narrow mlp-cifar10, equal steps"
FULL_WIDE = "wide mlp-cifar10, equal steps"
FULL_AFFINE = (FULL_STEPS, FULL_NARROW, FULL_WIDE)

STEPS = (EQUAL_STEPS, FULL_STEPS)
#: The scale of a part alone: all layers but the last, the last, the logits, or where a learned scale starts.
IN_PARTS = {
    cell: (
        *(
            Arm(
                f"inner γ {gamma}",
                norm_options={**ONE, "gamma": float(gamma)},
                last_norm_options={"gamma": 1.0},
                cells=(cell,),
            )
            for gamma in ENDS
        ),
        *(
            Arm(
                f"last γ {gamma}",
                norm_options=ONE,
                last_norm_options={"gamma": float(gamma)},
                cells=(cell,),
            )
            for gamma in ENDS
        ),
        *(
            Arm(f"logits × {gamma}", norm_options=ONE, logit_scale=float(gamma), cells=(cell,))
            for gamma in ENDS
        ),
        *(
            Arm(f"learned γ from {gamma}", norm_options={"gamma_init": float(gamma)}, cells=(cell,))
            for gamma in ENDS
        ),
    )
    for cell in STEPS
}

# Replicates below 300 were looked at while lengths, grid and the matched losses were chosen; six of
# them, tuned in the same way, gave the expected half-widths.
QUICK = Design(
    base=Trial(
        norm="batch", n_train=400, schedule="constant", warmup=0.05, steps=300, seed=300, data_seed=300
    ),
    cells=(
        Cell(MATCHED[0], data="digits", model="mlp", until_train_nll=0.1, replicates=20),
        Cell(MATCHED[1], data="mnist1d", model="mlp", until_train_nll=0.5, replicates=20),
        Cell(MATCHED[2], data="digits", **CNN, steps=200, until_train_nll=0.2),
        Cell(
            EQUAL_STEPS,
            data="mnist1d",
            model="mlp",
            steps=200,
            schedule="trapezoid",
            constants={"delta_acc": 1.0},
        ),
    ),
    arms=(
        Arm("γ 1", norm_options=ONE),
        Arm("γ 0.2", norm_options={**ONE, "gamma": 0.2}, cells=(EQUAL_STEPS,)),
        *(
            Arm(f"γ {gamma}", norm_options={**ONE, "gamma": float(gamma)}, cells=MATCHED)
            for gamma in ("0.5", "2")
        ),
        Arm("γ 5", norm_options={**ONE, "gamma": 5.0}),
        *IN_PARTS[EQUAL_STEPS],
        Arm("learned γ", cells=(EQUAL_STEPS,)),
        Arm("learned γ, decay 0.01", gamma_decay=0.01, cells=(EQUAL_STEPS,)),
        Arm("γ alone", norm_options={"learn_beta": False}, cells=(EQUAL_STEPS,)),
        Arm("neither", norm_options={"affine": False}, cells=(EQUAL_STEPS,)),
    ),
    lr=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    tuning="once",
    curve_points=0,
)

# No pilot has run on a GPU yet: the matched losses are guesses.
FULL = Design(
    base=Trial(data="cifar10", norm="batch", batch_size=128, steps=14040, schedule="constant", warmup=0.125),
    cells=(
        Cell(FULL_MATCHED[0], model="resnet20", until_train_nll=0.2),
        Cell(FULL_MATCHED[1], model="vgg11", until_train_nll=0.2),
        Cell(FULL_NOISY, model="vgg11", label_noise=0.2, until_train_nll=0.2),
        Cell(FULL_STEPS, model="vgg11", schedule="trapezoid", constants={"delta_acc": 0.5}),
        *(
            Cell(
                name,
                model="mlp",
                model_options={"width": width},
                schedule="trapezoid",
                constants={"delta_acc": 0.5},
            )
            for name, width in ((FULL_NARROW, 64), (FULL_WIDE, 512))
        ),
    ),
    arms=(
        Arm("γ 1", norm_options=ONE),
        *(
            Arm(
                f"γ {gamma}",
                norm_options={**ONE, "gamma": float(gamma)},
                cells=(*FULL_MATCHED, FULL_NOISY, FULL_STEPS),
            )
            for gamma in FIVE
            if gamma != "1"
        ),
        *IN_PARTS[FULL_STEPS],
        Arm("learned γ", cells=FULL_AFFINE),
        *(
            Arm(f"learned γ, decay {decay:g}", gamma_decay=decay, cells=(FULL_STEPS,))
            for decay in (1e-4, 1e-3, 1e-2)
        ),
        Arm("γ alone", norm_options={"learn_beta": False}, cells=FULL_AFFINE),
        Arm("neither", norm_options={"affine": False}, cells=FULL_AFFINE),
    ),
    lr=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    tuning="once",
)

STUDY = Study(
    name="scale",
    question="Does a higher scale parameter regularize more?",
    baseline="γ 1",
    hypotheses=(
        *(
            Hypothesis(
                name=name,
                claim="P4",
                sentence="At the same training loss, the test loss at the best temperature is lower the"
                f" higher γ is{more}.",
                estimand=partial(
                    metric_slope,
                    doses=tuple((f"γ {gamma}", decade) for gamma, decade in doses.items()),
                    metric="test/loss_calibrated",
                    sign=-1.0,
                ),
                delta=0.03,
                better=tuple(f"γ {gamma}" for gamma in doses),
                unit="nats/decade",
                primary=not more,
                cells=cells,
                half_width=dict(zip(MATCHED, (0.2, 0.052, 0.04), strict=True)) if cells == MATCHED else {},
            )
            for name, doses, cells, more in (
                ("P4.a", FOUR, MATCHED, ""),
                ("P4.a full", FIVE, FULL_MATCHED, ""),
                ("P4.noisy", FIVE, (FULL_NOISY,), ", with a fifth of the labels wrong too"),
            )
        ),
        *(
            Hypothesis(
                name=f"P4.gap {preset}",
                claim="P4",
                sentence="At the same training loss and the best temperature, the gap between test and"
                " training loss is smaller the higher γ is.",
                estimand=partial(
                    metric_slope,
                    doses=tuple((f"γ {gamma}", decade) for gamma, decade in doses.items()),
                    metric="test/gap_calibrated",
                    sign=-1.0,
                ),
                delta=0.03,
                better=tuple(f"γ {gamma}" for gamma in doses),
                unit="nats/decade",
                primary=False,
                cells=cells,
            )
            for preset, doses, cells in (("quick", FOUR, MATCHED), ("full", FIVE, FULL_MATCHED))
        ),
        Hypothesis(
            name="P4.steps",
            claim="P4",
            sentence="After the same steps, without a temperature, the gap is smaller at γ = 5 than at 0.2.",
            estimand=partial(
                accuracy_difference, better="γ 5", other="γ 0.2", metric="test/gap", points=-1.0
            ),
            delta=0.03,
            better=("γ 5",),
            other=("γ 0.2",),
            unit="nats",
            primary=False,
            cells=STEPS,
        ),
        Hypothesis(
            name="P4.b",
            claim="P4",
            sentence="The γ of all layers but the last does not matter for test accuracy: 0.2 is as good"
            " as 5.",
            estimand=partial(accuracy_difference, better="inner γ 5", other="inner γ 0.2"),
            delta="delta_acc",
            better=("inner γ 5", "inner γ 0.2"),
            kind="equivalent",
            unit="pp",
            primary=False,
            cells=STEPS,
            against=True,
        ),
        Hypothesis(
            name="P4.c",
            claim="P4",
            sentence="A higher γ of the last layer alone makes the gap smaller.",
            estimand=partial(
                accuracy_difference, better="last γ 5", other="last γ 0.2", metric="test/gap", points=-1.0
            ),
            delta=0.03,
            better=("last γ 5",),
            other=("last γ 0.2",),
            unit="nats",
            primary=False,
            cells=STEPS,
        ),
        Hypothesis(
            name="P4.temperature",
            claim="P4",
            sentence="Multiplying the logits by 5 instead of 0.2, with γ = 1, makes the gap smaller too.",
            estimand=partial(
                accuracy_difference, better="logits × 5", other="logits × 0.2", metric="test/gap", points=-1.0
            ),
            delta=0.03,
            better=("logits × 5",),
            other=("logits × 0.2",),
            unit="nats",
            primary=False,
            cells=STEPS,
        ),
        Hypothesis(
            name="P4.d",
            claim="P4",
            sentence="Learned scales that start at 0.2 and at 5 end closer together.",
            estimand=partial(
                spread_shrinkage, starts=(("learned γ from 0.2", 0.2), ("learned γ from 5", 5.0))
            ),
            delta=0.3,
            better=("learned γ from 0.2", "learned γ from 5"),
            unit="decades",
            primary=False,
            cells=STEPS,
        ),
        Hypothesis(
            name="P4.e",
            claim="P4",
            sentence="Weight decay on γ, which makes it smaller, makes the gap larger.",
            estimand=partial(
                accuracy_difference,
                better="learned γ, decay 0.01",
                other="learned γ",
                metric="test/gap",
                points=1.0,
            ),
            delta=0.03,
            better=("learned γ, decay 0.01",),
            other=("learned γ",),
            unit="nats",
            primary=False,
            cells=STEPS,
        ),
        *(
            Hypothesis(
                name=f"P4.affine {arm}",
                claim="P4",
                sentence=f"Learning scale and shift is more accurate than {words}.",
                estimand=partial(accuracy_difference, better="learned γ", other=arm),
                delta="delta_acc",
                better=("learned γ",),
                other=(arm,),
                unit="pp",
                primary=False,
                cells=(EQUAL_STEPS, *FULL_AFFINE),
            )
            for arm, words in (
                ("γ 1", "learning the shift alone"),
                ("γ alone", "learning the scale alone"),
                ("neither", "learning neither"),
            )
        ),
    ),
    quick=QUICK,
    full=FULL,
)
