"""C2: does batch normalization make training less sensitive to the learning rate?

Reads the tuning rows of the study `convergence`, which are trained once for both.
"""

from dataclasses import replace
from functools import partial

from bnbench.study import Hypothesis, Study
from bnbench.study.estimands import lr_width_difference
from studies.convergence import FULL, PRIMARY, QUICK

STUDY = Study(
    name="lr_stability",
    question="Does a network with batch normalization train well over a wider range of learning rates?",
    program="sweep",
    baseline="none",
    hypotheses=(
        Hypothesis(
            name="C2.a",
            claim="C2",
            sentence="Accuracy stays within 2 points of the arm's best over more decades of learning rate.",
            estimand=partial(lr_width_difference, better="batch", other="none", margin=0.02),
            delta=0.5,
            better=("batch",),
            other=("none",),
            unit="decades",
            cells=PRIMARY,
            half_width={"mlp-digits": 0.33, "mlp-mnist1d": 0.14, "cnn-digits": 0.22, "cnn-mnist1d": 0.22},
        ),
        Hypothesis(
            name="C2.layer",
            claim="C2",
            sentence="Layer normalization widens the range as well.",
            estimand=partial(lr_width_difference, better="layer", other="none", margin=0.02),
            delta=0.5,
            better=("layer",),
            other=("none",),
            unit="decades",
            primary=False,
        ),
    ),
    quick=replace(QUICK, probes={}),
    full=replace(FULL, probes={}),
)
