"""Frozen batch normalization: a fixed affine map, from the start or from some point of the training on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bnbench.norms.averages import BatchStatistics
from bnbench.norms.base import norm
from bnbench.registry import BadInput


def frozen_batch_norm(x: Tensor, *, eps: float = 1e-5, **others: object) -> Tensor:
    return x / math.sqrt(1 + eps)


@norm(
    "frozen_batch",
    paper="arXiv:1512.03385",
    reference=frozen_batch_norm,
    batch_dependent=False,
    scale_invariant=False,
    examples=({}, {"freeze_after": 0.25, "learn_affine": True}),
)
class FrozenBatchNorm(BatchStatistics):
    """Batch normalization with constant statistics: a fixed affine map, in training and evaluation alike.

    y = γ (x − running_mean) / √(running_var + eps) + β; x (N, C, *). No gradient flows through the
    statistics, no sample depends on another, and train() changes nothing. γ and β are buffers, or with
    learn_affine parameters, which learn all the time. The state is that of torchvision's FrozenBatchNorm2d:
    weight, bias, running_mean and running_var; that of a BatchNorm loads too.

    freeze_after: the share of the training during which the layer is batch normalization (to the bit the norm
    "batch"); from then on its running averages are the constants. bnbench's trainers tell it how far they
    are, by `set_progress`; a layer that nobody tells is frozen. While it is `frozen`, recalibration leaves
    its statistics as they are, since it trains with them; before, they are set like those of "batch".

    Pitfalls: Whoever takes statistics from elsewhere needs the eps that they were used with, which is part of
    the map. A fresh layer that is frozen from the start normalizes nothing: It is x / √(1 + eps). Weights
    that go on learning leave frozen statistics behind.

    Raises BadInput for a freeze_after outside [0, 1), and what "batch" raises until the layer is frozen.

    Source: He et al. 2015, appendix A, who fix the statistics of ImageNet for detection.
    """

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        freeze_after: float = 0.0,
        learn_affine: bool = False,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=True)
        if not 0 <= freeze_after < 1:
            raise BadInput(f"freeze_after must be at least 0 and below 1, not {freeze_after!r}")
        self.freeze_after = freeze_after
        self.learn_affine = learn_affine
        self.frozen = True
        if not learn_affine:
            for name, start in (("weight", torch.ones(num_features)), ("bias", torch.zeros(num_features))):
                delattr(self, name)
                self.register_buffer(name, start)
        # Nothing reads it, and the state of frozen layers has no such number.
        self.register_buffer("num_batches_tracked", torch.tensor(0), persistent=False)

    @staticmethod
    def normalization_batch_size(
        batch_size: int, *, freeze_after: float = 0.0, **others: object
    ) -> int | None:
        if freeze_after and batch_size < 2:
            raise BadInput(
                "norm 'frozen_batch' cannot train on a batch of 1 sample before it is frozen;"
                " it needs at least 2"
            )
        return batch_size if freeze_after else None

    def set_progress(self, fraction: float) -> None:
        self.frozen = fraction >= self.freeze_after

    def forward(self, x: Tensor) -> Tensor:
        moves = self.training and not self.frozen
        return self.normalize_by_batch(x) if moves else self.normalize_by_averages(x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *more)
