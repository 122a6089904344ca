"""Filter response normalization with its thresholded linear unit (Singh & Krishnan, 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnbench.norms.base import add_affine, check_eps, norm, per_sample, require_axes, show_options, widen


def filter_response_norm(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    return (x / (x.square().mean(list(range(2, x.ndim)), keepdim=True) + eps).sqrt()).clamp_min(0)


@norm(
    "filter_response",
    paper="arXiv:1911.09737",
    reference=filter_response_norm,
    batch_dependent=False,
    replaces_activation=True,
    min_dim=1,
)
class FilterResponseNorm(nn.Module):
    """Divide each channel of each sample by its root mean square, then cut off below a learned threshold.

    y = max(γ x / √(ν² + ε) + β, τ) for x (N, C, *), with ν² the mean of x² in a channel of one sample over *
    alone, and γ, β and the threshold τ (TLU, the thresholded linear unit) a channel; β and τ start at 0. The
    same in training and evaluation. ε is eps; where the input has one position a channel, it is eps + |e|
    with one learned number e of the layer (learned_eps, from 1e-4), since x / √(x² + eps) is the sign of x.
    learn_eps=False leaves e out. affine=False leaves out γ and β; τ stays.

    Pitfalls: τ is its activation, so none belongs after it. The mean is not subtracted, so that a channel
    with a large mean comes out nearly constant. With one position it is close to a sign even with e. The
    authors warm the learning rate up.

    Raises BadInput without spatial axes.
    Source: Singh & Krishnan 2020, section 3. The listing there has |ε|, with an ε that is given or learned;
    here it is learned only where there is one position, and on top of eps.
    """

    weight: Tensor | None
    bias: Tensor | None
    learned_eps: Tensor | None

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        eps: float = 1e-6,
        affine: bool = True,
        learn_eps: bool = True,
    ) -> None:
        super().__init__()
        require_axes(dim, "'rms' does")
        self.num_features = num_features
        self.eps = check_eps(eps)
        self.affine = affine
        self.learn_eps = learn_eps
        add_affine(self, num_features, gamma=affine, beta=affine)
        self.tau = nn.Parameter(torch.zeros(num_features))
        self.register_parameter("learned_eps", nn.Parameter(torch.full((1,), 1e-4)) if learn_eps else None)

    extra_repr = show_options

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        scale = (wide.square().mean([*range(2, x.ndim)], keepdim=True) + self._choose_eps(x)).rsqrt()
        tau = per_sample(widen(self.tau), x)
        if self.weight is None or self.bias is None:
            return (wide * scale).clamp_min(tau).to(x.dtype)
        weight, bias = per_sample(widen(self.weight), x), per_sample(widen(self.bias), x)
        return torch.addcmul(bias, wide, weight * scale).clamp_min(tau).to(x.dtype)

    def _choose_eps(self, x: Tensor) -> Tensor | float:
        if self.learned_eps is None:
            return self.eps
        # Where it is not used its gradient is 0 and not None: distributed training waits for every gradient.
        is_used = x.shape[2:].numel() == 1
        return self.eps + widen(self.learned_eps).abs() * float(is_used)
