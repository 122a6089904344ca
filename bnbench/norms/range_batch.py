"""Range batch normalization: batch normalization by the range of the values (Banner et al., 2018)."""

from __future__ import annotations

import math

from torch import Tensor

from bnbench.norms.averages import ScaleAverages
from bnbench.norms.base import norm


def range_batch_norm(x: Tensor, *, eps: float = 1e-5, **others: object) -> Tensor:
    columns = x.movedim(1, 0).flatten(1)
    values = columns.shape[1]
    spread = (columns.max(1).values - columns.min(1).values) / math.sqrt(2 * math.log(values))
    y = (columns - columns.mean(1, keepdim=True)) / (spread + eps)[:, None]
    return y.view(-1, len(x), *x.shape[2:]).movedim(0, 1)


@norm(
    "range_batch",
    paper="arXiv:1805.11046",
    reference=range_batch_norm,
    batch_dependent=True,
    running_stats=True,
    centres=True,
    examples=({}, {"momentum": None}),
)
class RangeBatchNorm(ScaleAverages):
    """Batch normalization whose scale is the range of a channel's values, the largest less the smallest.

    y = γ (x − μ) / (C(n) range(x − μ) + eps) + β,   C(n) = 1 / √(2 ln n),   range(z) = max z − min z; x and y
    are (N, C, *), μ, max and min are those of a channel over N and *, n is the number of its values there,
    and γ and β are learned, a number a channel. Evaluation puts running_mean and running_scale (C) in the
    place of μ and C(n) range(x − μ). A training step moves both to (1 − momentum) old + momentum batch.

    momentum: None averages all steps alike. affine=False leaves out γ and β.

    Pitfalls: the range of n Gaussian values tends to 2 σ √(2 ln n), so that the scale is nearly 2 σ (1.7 σ at
    n = 1000) and the output has a deviation of little over a half; γ makes up for it. Two values decide the
    scale of a channel: an outlier shrinks all others, and the gradient through the scale reaches only these
    two (equal ones share it). C(n) takes the values for independent, which those of one image are not. The
    scale is no moment: recalibration averages it over batches.

    Raises BadInput for an eps or a momentum that cannot be; ValueError in training on one value a channel.

    Source: Banner et al. 2018, section 3. The authors' public code divides by the mean range of several
    chunks of the batch (here there are none), makes up for the factor 2 by a constant 0.54, and quantizes,
    which is no part of the norm. Hoffer et al. 2018 (arXiv:1803.01814) take max|x − μ|, the L∞ norm. Where
    eps stands is our choice: beside the range, as in "l1_batch".
    """

    def measure_scale(self, centred: Tensor) -> Tensor:
        dims = [0, *range(2, centred.ndim)]
        values = centred.numel() // self.num_features
        return (centred.amax(dims) - centred.amin(dims)) / math.sqrt(2 * math.log(values))
