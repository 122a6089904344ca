"""Noisy batch normalization: batch normalization whose output shifts at random (Santurkar et al., 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bnbench.norms.averages import BatchStatistics
from bnbench.norms.base import norm, widen
from bnbench.registry import BadInput

# At noise=1: half the range of a unit's mean μ, the range of its scale σ above 1, half the range of a
# sample's shift m around μ, and the standard deviation of its scale s around σ.
MEAN, SCALE, SAMPLE_SHIFT, SAMPLE_SCALE = 0.5, 0.25, 0.1, 0.1


class AffineNoise(nn.Module):
    """In training, an affine map of each sample and channel whose distribution moves from step to step.

    y ↦ s y + m for y (N, C, *), with draws for each forward pass, and k = noise:

        for each channel:             μ ~ U(−k/2, k/2),         σ ~ U(1, 1 + k/4);
        for each sample and channel:  m ~ U(μ − k/10, μ + k/10),  s ~ N(σ, (k/10)²).

    So E[m] = 0, Var[m] = k²/12 + k²/300, E[s] = 1 + k/8 and Var[s] = k²/192 + k²/100. The draws come from
    torch's global generator of the device, as those of nn.Dropout do, and are float32 whatever y is, so
    that the same seed gives the same noise in any precision. In evaluation, and with noise=0, y is returned
    as it is and nothing is drawn.
    """

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, y: Tensor) -> Tensor:
        if not self.training or self.noise == 0:
            return y
        samples, units = y.shape[:2]
        mean = MEAN * (2 * torch.rand(1, units, device=y.device) - 1)
        scale = SCALE * torch.rand(1, units, device=y.device)
        shifts = mean + SAMPLE_SHIFT * (2 * torch.rand(samples, units, device=y.device) - 1)
        scales = scale + SAMPLE_SCALE * torch.randn(samples, units, device=y.device)
        wide = widen(y)
        shape = (samples, units, *(1,) * (y.ndim - 2))
        m, s = ((self.noise * draw).view(shape).to(wide.dtype) for draw in (shifts, scales))
        return torch.addcmul(m, 1 + s, wide).to(y.dtype)

    def extra_repr(self) -> str:
        return f"noise={self.noise!r}"


@norm(
    "noisy_batch",
    paper="arXiv:1805.11604",
    batch_dependent=True,
    running_stats=True,
    centres=True,
    permutation_equivariant=False,  # The draws belong to places in the batch.
    vmap=False,  # Replicas under vmap would not draw what each draws alone.
    examples=({}, {"noise": 0.5}),
)
class NoisyBatchNorm(BatchStatistics):
    """Batch normalization whose output a random affine map shifts, differently at every training step.

    y = s (γ x̂ + β) + m, with x̂ normalized as by the norm "batch"; x (N, C, *). :class:`AffineNoise` has the
    distribution of m and s. It brings back the drift that normalization removes: a network that trains fast
    nevertheless does not owe this to stable distributions. Evaluation is that of "batch". So are the running
    averages; but they are averages over inputs with the noise of the layers below, which evaluation has not.
    Recalibration is done without noise.

    noise: the dose, at least 0, by which all four widths are multiplied; 0 is "batch" to the bit.

    Pitfalls: The effect depends on the dose, so name it with every result. A layer can learn a large γ,
    beside which m is small. Replicas of it cannot train in one fleet.

    Raises BadInput for a noise that is negative or not finite, and what "batch" raises.

    Source: Santurkar et al. 2018, section 2.1: noise after the normalization layer, for each activation and
    sample, from a distribution of mean other than 0 and variance other than 1 that is itself drawn anew at
    each step. The kinds of these distributions and their widths are those of appendix A as far as we know;
    they were not compared with its text. The dose is ours, and so is that the unit of a convolution is a
    channel, whose positions share the draws of a sample.
    """

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        noise: float = 1.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)
        if not 0 <= noise < math.inf:
            raise BadInput(f"noise must be a finite number of at least 0, not {noise!r}")
        self.noise = noise
        # A module of its own, so that it can be switched off alone, as dropout can.
        self.affine_noise = AffineNoise(noise)

    def forward(self, x: Tensor) -> Tensor:
        y = self.normalize_by_batch(x) if self.training else self.normalize_by_averages(x)
        noisy: Tensor = self.affine_noise(y)
        return noisy
