"""C2: does batch normalization make training less sensitive to the initial weights?

Every weight but the classifier's is drawn from He's distribution and multiplied by a scale; the learning rate
is tuned at every scale. Under a following batch normalization the function does not depend on the scale, and
the gradient is inversely proportional to it: the scale s acts as a learning rate of lr / s². So the same
comparison at one fixed learning rate (C2.c) says how much of the robustness the tuning pays for.
"""

from functools import partial

from bnbench.study import Arm, Cell, Design, Hypothesis, Study, Trial
from bnbench.study.estimands import init_scale_width_difference

SCALES = (0.1, 0.3, 1.0, 3.0, 10.0)
NORMS = ("none", "batch")
ARMS = tuple(Arm(f"{norm} × {scale:g}", norm=norm, init_scale=scale) for norm in NORMS for scale in SCALES)
WIDTHS = {norm: tuple((f"{norm} × {scale:g}", scale) for scale in SCALES) for norm in NORMS}

# Replicates below 300 were looked at while depth, length and grid were chosen; six of
# them, tuned in the same way, gave the expected half-widths.
QUICK = Design(
    base=Trial(schedule="trapezoid", warmup=0.05, seed=300, data_seed=300),
    cells=(
        Cell(
            "mlp12-digits", data="digits", model="mlp", model_options={"depth": 12}, steps=80, replicates=20
        ),
    ),
    arms=ARMS,
    lr=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
)

# 20 epochs of 45,000 images in batches of 128. No pilot has run on a GPU yet.
FULL = Design(
    base=Trial(
        data="cifar10",
        augment="crop-flip",
        batch_size=128,
        steps=7020,
        schedule="trapezoid",
        warmup=0.125,
        weight_decay=5e-4,
    ),
    cells=(
        Cell("mlp12-cifar10", model="mlp", augment="none", model_options={"depth": 12, "width": 512}),
        Cell("vgg16-cifar10", model="vgg16"),
        Cell("resnet56-cifar10", model="resnet56"),
    ),
    arms=ARMS,
    lr=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
)

STUDY = Study(
    name="init_stability",
    question="Does a network with batch normalization train well from a wider range of initial weights?",
    program="sweep",
    baseline="none × 1",
    hypotheses=(
        Hypothesis(
            name="C2.b",
            claim="C2",
            sentence="With the learning rate tuned at every scale of the initial weights, accuracy stays"
            " within 2 points of the best over more decades of scale.",
            estimand=partial(
                init_scale_width_difference, better=WIDTHS["batch"], other=WIDTHS["none"], margin=0.02
            ),
            delta=0.5,
            better=tuple(name for name, _ in WIDTHS["batch"]),
            other=tuple(name for name, _ in WIDTHS["none"]),
            unit="decades",
            half_width={"mlp12-digits": 0.16},
        ),
        Hypothesis(
            name="C2.c",
            claim="C2",
            sentence="At one learning rate for all scales, each network's best at scale 1, it stays within 2"
            " points over more decades too.",
            estimand=partial(
                init_scale_width_difference,
                better=WIDTHS["batch"],
                other=WIDTHS["none"],
                margin=0.02,
                tuned=False,
            ),
            delta=0.5,
            better=tuple(name for name, _ in WIDTHS["batch"]),
            other=tuple(name for name, _ in WIDTHS["none"]),
            unit="decades",
            primary=False,
        ),
    ),
    quick=QUICK,
    full=FULL,
)
