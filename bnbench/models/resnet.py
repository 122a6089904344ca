"""Residual networks: the CIFAR family of He et al. (2016) and ResNet-18 for small images."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from bnbench.models.base import LINEAR_MAPS, ORDERS, Slot, average_pool, model
from bnbench.models.residual import Multiplier, Residual, Shift, add_shifts, check_residual
from bnbench.norms.reparam import scale_weight
from bnbench.registry import BadInput

Shortcut = Literal["A", "B"]


class SubsampleAndPad(nn.Module):
    """Shortcut A: every `stride`-th position, and zeros for the new channels, half of them on each side."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.channels = (new_channels // 2, new_channels - new_channels // 2)
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[..., :: self.stride] if x.ndim == 3 else x[..., :: self.stride, :: self.stride]
        return F.pad(x, (0, 0) * (x.ndim - 2) + self.channels)


class Block(nn.Module):
    """after(branch(r) + shortcut(s)) with r = before(x): two 3-wide convolutions beside a shortcut.

    The slot's order decides what `before`, `branch` and `after` hold; see :class:`bnbench.models.Slot`. What
    `residual` adds to that is said in :class:`ResNet`.
    s is x, except for a projection in a pre-activation block: it reads r, as the authors' code does.
    `index` is the place of the first convolution among the `depth` hidden layers of the network.
    """

    def __init__(
        self,
        num_inputs: int,
        num_features: int,
        dim: int,
        slot: Slot,
        index: int,
        depth: int,
        *,
        stride: int,
        shortcut: Shortcut,
        residual: Residual,
    ) -> None:
        super().__init__()
        conv1 = slot.build_conv(num_inputs, num_features, dim, stride=stride)
        gap = slot.build(num_features, dim, index, depth)
        second = slot.at(index + 1, depth)
        conv2 = second.build_conv(num_features, num_features, dim)
        self.branch = nn.Sequential(OrderedDict([("conv1", conv1), *gap.named_children(), ("conv2", conv2)]))
        self.before: nn.Module = nn.Identity()
        self.after: nn.Module = nn.Identity()
        if slot.order == "norm-act":
            for name, part in second.build_norm_parts(num_features, dim):
                self.branch.add_module(f"last_{name}", part)
            self.after = slot.build_activation()
        elif slot.order == "pre-act":
            self.before = slot.build_pair(num_inputs, dim)
        else:
            self.after = second.build_pair(num_features, dim)

        self.shortcut: nn.Module = nn.Identity()
        self.projects = False
        if stride != 1 or num_inputs != num_features:
            self.projects = shortcut == "B"
            if self.projects:
                self.shortcut = nn.Sequential(
                    OrderedDict(conv=slot.build_conv(num_inputs, num_features, dim, kernel=1, stride=stride))
                )
                if slot.order == "norm-act":
                    self.shortcut.add_module("norm", slot.build_norm(num_features, dim))
            else:
                self.shortcut = SubsampleAndPad(num_features - num_inputs, stride)
        if residual == "fixup":
            self._add_fixup_scalars()
        elif residual != "plain":
            if residual == "rezero" and slot.order != "pre-act":
                for name, part in [*self.after.named_children()] or [("activation", self.after)]:
                    self.branch.add_module(f"last_{name}", part)
                self.after = nn.Identity()
            self.branch.add_module("multiplier", Multiplier(0.0))

    def _add_fixup_scalars(self) -> None:
        before = add_shifts(self.before).named_children()
        self.before = nn.Sequential(OrderedDict([*before, ("shift", Shift())]))
        self.branch = cast(nn.Sequential, add_shifts(self.branch))
        self.branch.add_module("multiplier", Multiplier(1.0, lr_scale=Shift.lr_scale))
        self.branch.add_module("shift", Shift())
        self.after = add_shifts(self.after)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ready = self.before(x)
        skip = self.shortcut(ready if self.projects else x)
        out: torch.Tensor = self.after(self.branch(ready) + skip)
        return out


class ResNet(nn.Module):
    """A 3-wide stem, stages of residual blocks that double the channels, average pooling, the classifier.

    `blocks` are the numbers of blocks in each stage; the first stage has `width` channels, and each later
    one starts with stride 2. `shortcut` is used where the shape changes: ``"A"`` subsamples and pads with
    zeros, ``"B"`` projects by a 1-wide convolution (He et al., 2016a, section 3.3); a projection has a norm
    of its own in the order norm-act, where the branch ends in one. `zero_gamma` starts the scale of each
    branch's last norm at zero, so that every block starts as its shortcut (Goyal et al., 2017, section 5.1).

    In the order pre-act the stem has no norm and no activation, and both stand before the pooling.

    `residual` is how a branch f is joined to its shortcut s; each goes with every norm and with none:

    - ``"plain"``: s + f.
    - ``"skip_init"``: s + α f, α a learned number a block that starts at 0 (De & Smith, 2020, section 3).
      What the slot's order has behind the addition stays there. The paper has pre-activation blocks.
    - ``"rezero"``: s + α f, α from 0 too, with nothing behind the addition: what the slot's order has there
      ends the branch instead, before α (Bachlechner et al., 2020; their code for CIFAR-10). So the shortcuts
      are the identity from end to end, and in the order pre-act this is skip_init.
    - ``"fixup"`` (Zhang et al., 2019, section 3): with L blocks, `initialize` scales what it draws for the
      first convolution of a branch by L^(−1/2) (with "he": a deviation of √(2 / (fan_in L))), and sets the
      second one and the classifier to 0. One learned number is added before each convolution but the stem,
      before each activation and before the classifier, from 0; one multiplies the end of each branch, from 1,
      before the last shift. They take the place of the convolutions' biases, and learn at a tenth of the
      learning rate. Authors' code: the deviation has fan_out.

    Pitfalls: a net without a norm overfits sooner; the authors of Fixup add mixup, those of SkipInit dropout.
    The learned numbers are no weights, so `weight_decay` spares them as it does scales and biases. Adaptive
    clipping takes an α at 0 for 1e-3, and so opens the branches slowly.

    Raises BadInput for `zero_gamma` where no branch ends in a norm (in the orders other than norm-act a zero
    scale would leave the branch, or all, dead for good), where that norm has no learned scale, and beside
    another `residual` than plain, as two zeros in a row have no gradient. Raises BadInput also for rezero in
    the order post-add, and for fixup with a reparametrization that fixes the size of weights.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        num_classes: int,
        slot: Slot,
        blocks: tuple[int, ...],
        *,
        width: int,
        shortcut: Shortcut,
        zero_gamma: bool = False,
        residual: Residual = "plain",
    ) -> None:
        super().__init__()
        check_residual(residual, slot, zero_gamma)
        self.residual = residual
        num_inputs, *sizes = in_shape
        dim, depth = len(sizes), 1 + 2 * sum(blocks)
        self.stem = nn.Sequential(OrderedDict(conv=slot.build_conv(num_inputs, width, dim)))
        self.layers = nn.Sequential()
        self.final: nn.Module = nn.Identity()
        num_features = width
        for stage, num_blocks in enumerate(blocks):
            for place in range(num_blocks):
                num_inputs, num_features = num_features, width * 2**stage
                stride = 2 if stage > 0 and place == 0 else 1
                index = 1 + 2 * len(self.layers)
                block = Block(
                    num_inputs,
                    num_features,
                    dim,
                    slot,
                    index,
                    depth,
                    stride=stride,
                    shortcut=shortcut,
                    residual=residual,
                )
                self.layers.append(block)
        if slot.order == "pre-act":
            self.final = slot.at(depth - 1, depth).build_pair(num_features, dim)
        else:
            for name, part in slot.build_pair(width, dim).named_children():
                self.stem.add_module(name, part)
        self.dropout = slot.build_last_dropout()
        self.head = nn.Linear(num_features, num_classes)
        if zero_gamma:
            self._zero_gamma(slot)
        if residual == "fixup":
            self._add_fixup_scalars()

    def _add_fixup_scalars(self) -> None:
        self.stem = cast(nn.Sequential, add_shifts(self.stem))
        self.final = add_shifts(self.final)
        self.dropout = nn.Sequential(OrderedDict(dropout=self.dropout, shift=Shift()))
        for module in self.modules():
            if isinstance(module, LINEAR_MAPS) and module is not self.head:
                module.register_parameter("bias", None)

    @torch.no_grad()
    def adjust_initial_weights(self) -> None:
        """Start where the residual option does; `initialize` calls this after it has drawn all weights."""
        if self.residual == "fixup":
            for block in self.layers:
                scale_weight(block.get_submodule("branch.conv1"), len(self.layers) ** -0.5)
                scale_weight(block.get_submodule("branch.conv2"), 0.0)
            for parameter in self.head.parameters():
                parameter.zero_()

    def _zero_gamma(self, slot: Slot) -> None:
        if slot.order != "norm-act":
            raise BadInput(
                f"zero_gamma needs a norm at the end of each branch, so not the order {slot.order!r}"
            )
        for block in self.layers:
            gamma = getattr(block.get_submodule("branch.last_norm"), "weight", None)
            if not isinstance(gamma, nn.Parameter):
                raise BadInput(
                    f"zero_gamma needs a norm with a learned scale, and {slot.norm!r} has none here"
                )
            nn.init.zeros_(gamma)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = average_pool(self.final(self.layers(self.stem(x))))
        logits: torch.Tensor = self.head(self.dropout(hidden))
        return logits


def _register(name: str, blocks: tuple[int, ...], default_width: int, default_shortcut: Shortcut) -> None:
    @model(name, orders=ORDERS, ranks=(2, 3), paper="arXiv:1512.03385")
    def build(
        in_shape: tuple[int, ...],
        num_classes: int,
        slot: Slot,
        *,
        width: int = default_width,
        shortcut: Shortcut = default_shortcut,
        zero_gamma: bool = False,
        residual: Residual = "plain",
    ) -> nn.Module:
        return ResNet(
            in_shape,
            num_classes,
            slot,
            blocks,
            width=width,
            shortcut=shortcut,
            zero_gamma=zero_gamma,
            residual=residual,
        )


for _depth in (8, 20, 32, 44, 56, 110):
    _register(f"resnet{_depth}", 3 * ((_depth - 2) // 6,), 16, "A")
_register("resnet18", (2, 2, 2, 2), 64, "B")
