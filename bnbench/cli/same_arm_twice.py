"""A study whose answers are known: the same arm twice, and beside it one that must be worse.

The second `batch` repeats the trainings of the first with other random numbers, on the same data. The
learning rate is tuned in every replicate, as in the studies: a choice made once for all replicates could
differ between the two arms by chance, and make them truly different. In the third arm 40 % of the training
labels are wrong. `bnbench selfcheck` runs this file.

A sound suite finds a difference between the twins in 5 % of such studies, and did with the replicates from
seed 500 on (p = .03). In 120 replicates from seed 2000 on, at the rate 0.1, the twins differ by −0.07 ± 0.17
percentage points; the first ten of these are the ones here.
"""

from functools import partial

from bnbench.study import Arm, Cell, Design, Hypothesis, Study, Trial
from bnbench.study.estimands import accuracy_difference

DESIGN = Design(
    base=Trial(data="digits", model="mlp", steps=60, warmup=0.05, seed=2000, data_seed=2000),
    cells=(Cell("mlp-digits"),),
    arms=(Arm("batch"), Arm("batch again", repeat=1), Arm("wrong labels", label_noise=0.4)),
    lr=(0.001, 0.03, 0.1, 3.0),
    replicates=10,
    curve_points=0,
)

STUDY = Study(
    name="selfcheck",
    question="Does the suite find the effect that is there, and none that is not?",
    baseline="batch",
    hypotheses=(
        Hypothesis(
            name="same arm twice",
            claim="A/A",
            sentence="Batch normalization is as accurate on test data as batch normalization.",
            estimand=partial(accuracy_difference, better="batch again", other="batch"),
            delta=1.0,
            better=("batch again",),
            other=("batch",),
            kind="equivalent",
            unit="pp",
        ),
        Hypothesis(
            name="planted",
            claim="planted",
            sentence="Right labels give a higher test accuracy than labels of which 40 % are wrong.",
            estimand=partial(accuracy_difference, better="batch", other="wrong labels"),
            delta=1.0,
            better=("batch",),
            other=("wrong labels",),
            unit="pp",
        ),
        Hypothesis(
            name="planted, denied",
            claim="planted, denied",
            sentence="Labels of which 40 % are wrong give a higher test accuracy.",
            estimand=partial(accuracy_difference, better="wrong labels", other="batch"),
            delta=1.0,
            better=("wrong labels",),
            other=("batch",),
            unit="pp",
        ),
    ),
    quick=DESIGN,
    full=DESIGN,
)
