"""A network run for many replicas at once: stacked parameters and buffers, one call by `torch.vmap`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bnbench.engine.chunked import ChunkedClassifier
from bnbench.norms import FollowsProgress
from bnbench.norms.base import widen
from bnbench.norms.reference import layers_with_reference, run_with_reference


class MaskedDropout(nn.Module):
    """Dropout whose mask comes as a tensor; it takes the place of `nn.Dropout` in a stacked network."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(()), persistent=False)
        #: What the mask is to look like, known after one forward pass.
        self.like: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.like is None:
            self.like = torch.empty_like(x, device="meta")
            return x
        return x * self.mask


class MultipliedReLU(nn.Module):
    """ReLU as x · 1[x > 0], its derivative at 0 being 0."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x > 0).to(x.dtype)


class UnfoldedBatchNorm(TorchFunctionMode):
    """`F.batch_norm` in training as its formula: y = γ (x − mean) / √(var + eps) + β, var biased."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        # A network of one's own may keep no running statistics.
        averages = arguments[1:3]
        if function is F.batch_norm and len(averages) == 2 and all(isinstance(a, Tensor) for a in averages):
            return _batch_norm(*arguments, **(options or {}))
        return function(*arguments, **(options or {}))


def _batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    shape = (1, -1, *(1,) * (x.ndim - 2))
    if training:
        wide = widen(x)
        var, mean = torch.var_mean(wide, [0, *range(2, x.ndim)], correction=0)
        with torch.no_grad():
            count = x.numel() // x.shape[1]
            running_mean.mul_(1 - momentum).add_(mean.detach(), alpha=momentum)
            running_var.mul_(1 - momentum).add_(var.detach(), alpha=momentum * count / (count - 1))
    else:
        wide, mean, var = widen(x), running_mean, running_var
    y = (wide - mean.view(shape)) * (var + eps).rsqrt().view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    return (y if bias is None else y + bias.view(shape)).to(x.dtype)


class StackedLoss:
    """The losses of replicas and their gradients, from stacked parameters and buffers (K, ...).

    The module's code runs once, by `torch.vmap`, over all replicas; buffers are updated in place.
    """

    def __init__(self, classifier: ChunkedClassifier) -> None:
        self.template = copy.deepcopy(classifier.model)
        self.masks: dict[str, MaskedDropout] = {}
        for name, module in list(self.template.named_modules()):
            if isinstance(module, nn.Dropout):
                self.masks[f"{name}.mask"] = MaskedDropout()
                self.template.set_submodule(name, self.masks[f"{name}.mask"])
        self.followers = [m for m in self.template.modules() if isinstance(m, FollowsProgress)]
        self.referring = layers_with_reference(self.template)
        self.scale: float = classifier.hparams["logit_scale"]
        self.label_smoothing: float = classifier.hparams["label_smoothing"]
        self.run = self._run_stacked

    @torch.no_grad()
    def find_masks(self, x: Tensor, reference: Tensor | None) -> None:
        """See what the dropout masks of a batch (N, ...) of one replica are to look like."""
        self._logits({}, x, reference)

    def compile(self) -> None:
        """Compile the forward and the backward pass; the first call then takes seconds.

        With the same numbers, two things are written otherwise, which inductor makes slow code of on
        processors (torch 2.13): the mask of ReLU's backward pass, and the axis of batch norm into which
        vmap folds replicas and channels.
        """
        for name, module in list(self.template.named_modules()):
            if isinstance(module, nn.ReLU):
                self.template.set_submodule(name, MultipliedReLU())
        self.run = torch.compile(self._run_unfolded, dynamic=False)

    def tell_progress(self, fraction: float) -> None:
        """Tell the norms that follow the training how far it is."""
        for layer in self.followers:
            layer.set_progress(fraction)

    def _logits(self, tensors: Mapping[str, Tensor], x: Tensor, reference: Tensor | None) -> Tensor:
        def run(batch: Tensor) -> Tensor:
            logits: Tensor = functional_call(self.template, dict(tensors), (batch,))
            return logits

        if not self.referring or reference is None:
            return run(x)
        return run_with_reference(run, self.referring, reference, x)

    def _loss(self, tensors: Mapping[str, Tensor], reference: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
        logits = self._logits(tensors, x, reference)
        scaled = logits if self.scale == 1 else self.scale * logits
        return F.cross_entropy(scaled, y, label_smoothing=self.label_smoothing)

    def _run_stacked(
        self, tensors: Mapping[str, Tensor], reference: Tensor | None, x: Tensor, y: Tensor
    ) -> Tensor:
        dims = (0, None if reference is None else 0, 0, 0)
        losses: Tensor = torch.vmap(self._loss, in_dims=dims)(tensors, reference, x, y)
        return losses

    def _run_unfolded(
        self, tensors: Mapping[str, Tensor], reference: Tensor | None, x: Tensor, y: Tensor
    ) -> Tensor:
        with UnfoldedBatchNorm():
            return self._run_stacked(tensors, reference, x, y)
