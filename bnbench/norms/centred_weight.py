"""Centred weights: each output's weights minus their mean (Yan et al., 2020)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnbench.norms.base import widen
from bnbench.norms.reparam import reparam, require_inputs


@reparam("centred_weight", paper="arXiv:2001.06838", proportional_to="original")
def centred_weight(layer: nn.Module) -> None:
    """Subtract from each output's weights their mean.

    Ŵ = W − mean, for each output by itself over its inputs (and positions of the kernel); W is learned. An
    output then has mean 0 where all its inputs have the same mean, which is what the norm
    "moving_average_batch" has in place of centring.

    Pitfalls: inputs differ in their means, so what is left of an output's mean may be large. The size of the
    weights is not held: W may grow as ever.

    Raises BadInput where an output has one input, as Ŵ would be 0 for good.

    Source: Yan et al. 2020, weights centralization.
    """
    require_inputs(layer, "centred")
    parametrize.register_parametrization(layer, "weight", CentredWeight())


class CentredWeight(nn.Module):
    """The map from W (outputs first) to Ŵ; see :func:`centred_weight`."""

    def forward(self, weight: Tensor) -> Tensor:
        rows = widen(weight).flatten(1)
        return (rows - rows.mean(1, keepdim=True)).view_as(weight).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight
