"""A network run for many replicas at once: stacked parameters and buffers, one call by `torch.vmap`."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from bnbench.engine.chunked import ChunkedClassifier
from bnbench.norms import FollowsProgress
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
        return x * self.mask


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
        """Compile the forward and the backward pass; the first call then takes seconds."""
        self.run = torch.compile(self._run_stacked, dynamic=False)

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
