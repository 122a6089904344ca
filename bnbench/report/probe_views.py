"""How each probe is shown in a report: which of its numbers in which figures, and what they mean in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Quantity:
    """A value or series of a probe as figures show it: `words` name it on its axis.

    The scale is logarithmic where `log` says so, or, where it says nothing, where all numbers are positive
    and differ by more than a factor of 30. `reference` is a number to compare with.
    """

    name: str
    words: str
    log: bool | None = None
    reference: float | None = None

    def is_log(self, numbers: Iterable[float]) -> bool:
        """Whether these numbers are shown on a logarithmic scale."""
        finite = [n for n in numbers if math.isfinite(n)]
        positive = [n for n in finite if n > 0]
        if self.log is not None:
            return self.log and bool(positive)
        return bool(finite) and len(positive) == len(finite) and max(finite) > 30 * min(finite)


@dataclass(frozen=True)
class View:
    """Which values of a probe are drawn over steps, and which series as ranges, over depth and as heat maps.

    `caption` says what the numbers are.
    """

    title: str
    caption: str
    curves: tuple[Quantity, ...] = ()
    ranges: tuple[Quantity, ...] = ()
    depths: tuple[Quantity, ...] = ()
    heat_maps: tuple[Quantity, ...] = ()


_GRADIENT = Quantity("gradient", "gradient norm", log=True)
_INPUT_DRIFT = Quantity("input_wasserstein", "drift of layer inputs, sd", log=True)

#: By the name of the probe. The order is that of the report; other probes come last.
VIEWS: Mapping[str, View] = {
    "gradient_flow": View(
        "Gradient flow",
        "The gradient norm of a layer is that of the loss with respect to the outputs of its linear map. Its"
        " growth is the factor from one layer to the one below: above 1 gradients explode on their way back,"
        " below 1 they vanish; 1.2 × over 30 layers is 240 ×. Layer 1 is next to the input.",
        curves=(Quantity("factor", "gradient growth per layer, ×", reference=1.0),),
        depths=(_GRADIENT,),
        heat_maps=(_GRADIENT,),
    ),
    "drift": View(
        "Drift of the activations",
        "How far the values of a unit moved from one reading to the next, on the same examples: the"
        " Wasserstein distance of the two distributions in standard deviations (sd), a mean over units."
        " Layer inputs are taken after the norm and the activation of the layer below, outputs before the"
        " norm. Layer 1 reads the data, which do not move.",
        curves=(_INPUT_DRIFT, Quantity("output_wasserstein", "drift of layer outputs, sd", log=True)),
        heat_maps=(_INPUT_DRIFT,),
    ),
    "covariate_shift": View(
        "Internal covariate shift",
        "How much the gradient of a layer's weights changes when only the layers below it take a step"
        " (Santurkar et al. 2018), a mean over some layers. Change: the length of the difference over that of"
        " the gradient; 0 where the layers below do not matter. Cosine: 1 where the direction stays. Common"
        " step: the same share of the length of all weights in every arm. Own step: that of the run's"
        " learning rate.",
        curves=(
            Quantity("relative_common", "change of the gradient, common step", log=True),
            Quantity("cosine_common", "cosine, common step", reference=1.0),
            Quantity("relative", "change of the gradient, own step", log=True),
        ),
    ),
    "landscape": View(
        "The loss along its gradient",
        "The loss on a fixed batch after steps of ½, 1, 2 and 4 times one size along its gradient (Santurkar"
        " et al. 2018). Ranges reach from the smallest to the largest of these losses. Change: the largest"
        " difference of the gradient over these steps, over its length; 0 where it predicts itself. Common"
        " step: the same share of the length of all weights in every arm. Own step: that of the run's"
        " learning rate.",
        ranges=(
            Quantity("loss_common", "loss, common step", log=True),
            Quantity("loss", "loss, own step", log=True),
        ),
        curves=(
            Quantity("predictiveness_common", "change of the gradient, common step", log=True),
            Quantity("beta_common", "effective smoothness β, common step", log=True),
        ),
    ),
    "hessian": View(
        "Curvature of the loss",
        "The largest eigenvalue of the Hessian of the loss on a fixed batch, through batch statistics. Plain"
        " gradient descent is unstable at learning rates above 2 over it. Scaled: times the squared length of"
        " all weights, so that networks with weights of different lengths can be compared.",
        curves=(
            Quantity("largest", "largest eigenvalue"),
            Quantity("scaled", "largest eigenvalue, scaled"),
        ),
    ),
    "batch_noise": View(
        "Noise of batch statistics",
        "How much the mean of a batch scatters over random batches, as a share of the variance of the unit: a"
        " mean over units and layers, also where no norm uses it. Output noise: the standard deviation of"
        " an example's output over random companions in its batch, over that between examples; 0 where no"
        " norm looks at the batch.",
        curves=(
            Quantity("mean_noise", "variance of the batch mean, share"),
            Quantity("logit_noise", "noise of the output, share"),
        ),
    ),
    "eval_gap": View(
        "From training to evaluation",
        "How far the predictions lie from those with the exact statistics of the data, as a Kullback-Leibler"
        " divergence in nats. Noise: with the statistics of batches, as in training. Lag: with the running"
        " averages, as in evaluation. Both are 0 without running statistics.",
        curves=(
            Quantity("variance_kl", "noise of batch statistics, nats"),
            Quantity("lag_kl", "lag of running averages, nats"),
        ),
    ),
    "gradient_noise": View(
        "Noise of the gradient",
        "The simple noise scale (McCandlish et al. 2018): the variance of an example's gradient over the"
        " squared length of the mean one. Far smaller batches are mostly noise, far larger ones save few"
        " steps. Blank where the gradient drowns in the noise.",
        curves=(Quantity("noise_scale", "noise scale, examples", log=True),),
    ),
    "cross_example": View(
        "Influence between examples",
        "How much an example's loss depends on the inputs of the others in its batch: the length of that"
        " gradient over that with respect to its own input. Exactly 0 where no norm looks at the batch.",
        curves=(Quantity("ratio", "influence of the others, share"),),
    ),
    "rank": View(
        "Rank of the representations",
        "In how many directions the representations of examples spread (Roy & Vetterli 2007, with squared"
        " singular values): 1 where all examples look alike. Cosine: that of two examples, on average. The"
        " first layer is the first hidden representation, the last one what the output layer reads.",
        curves=(
            Quantity("effective_rank", "effective rank, last layer"),
            Quantity("cosine", "cosine between examples, last layer"),
        ),
        depths=(Quantity("effective_rank", "effective rank"),),
        heat_maps=(Quantity("effective_rank", "effective rank"),),
    ),
    "dead_units": View(
        "Dead and saturated units",
        "Dead: never active on the examples. Saturated: at the flat end of tanh or the sigmoid on nearly all"
        " of them. Shares of all units behind such a function.",
        curves=(
            Quantity("dead", "dead units, share"),
            Quantity("saturated", "saturated units, share"),
        ),
    ),
    "weights": View(
        "Weights and the effective learning rate",
        "The length of all weights of linear maps together, and the learning rate over the squared length of"
        " a layer's weights, a geometric mean over layers. It says how fast weights turn where a norm follows"
        " that takes their length away (van Laarhoven 2017), and nothing elsewhere.",
        curves=(
            Quantity("norm", "length of the weights"),
            Quantity("effective_lr", "effective learning rate", log=True),
        ),
    ),
    "calibration": View(
        "Calibration",
        "How far the stated confidence is from the accuracy, on average over 15 bins (Guo et al. 2017).",
        curves=(Quantity("ece", "calibration error, share"),),
    ),
    "generalization_gap": View(
        "Generalization gap",
        "Held-out data minus training data, both in evaluation mode: a loss gap above 0 and an accuracy gap"
        " below 0 say that the network does worse on what it has not seen.",
        curves=(
            Quantity("loss_gap", "loss gap, nats", reference=0.0),
            Quantity("accuracy_gap", "accuracy gap, share", reference=0.0),
        ),
    ),
}  # fmt: skip


def plain_view(probe: str, values: Iterable[str]) -> View:
    """The view of a probe that has none of its own, as from a plug-in: its values over steps."""
    curves = tuple(Quantity(value, value.replace("_", " ")) for value in values)
    return View(f"Probe: {probe.replace('_', ' ')}", f"What the probe “{probe}” recorded.", curves)
