"""Augmentation of image batches on their device: flip, crop, cutout."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from bnbench.registry import BadInput, nearest

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
# Each takes a batch (N × C × H × W) and a generator, and is a pure function of both. The draws are made
# where the generator lives: with a CPU generator they are the same numbers for every device. They are sent
# without blocking, since a copy that blocks makes every step wait for the one before.


def flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2."""
    mirrored = torch.rand(len(x), 1, 1, 1, generator=generator, device=generator.device) < 0.5
    return torch.where(mirrored.to(x.device, non_blocking=True), x.flip(-1), x)


def crop(x: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Shift each image by up to `pad` pixels each way, zeros moving in (He et al., 2016, section 4.2)."""
    count, channels, height, width = x.shape
    corner = torch.randint(2 * pad + 1, (2, count, 1), generator=generator, device=generator.device)
    top, left = corner.to(x.device, non_blocking=True)
    rows = top + torch.arange(height, device=x.device)
    columns = left + torch.arange(width, device=x.device)
    image = torch.arange(count, device=x.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=x.device).view(1, -1, 1, 1)
    return F.pad(x, (pad,) * 4)[image, channel, rows.view(count, 1, -1, 1), columns.view(count, 1, 1, -1)]


def cutout(x: Tensor, generator: torch.Generator, size: int | None = None) -> Tensor:
    """Set a square of each image to zero, its centre drawn over all pixels (DeVries & Taylor, 2017).

    `size` is the side, half of the height by default (16 for CIFAR-10, as in the paper). The square is cut
    off at the borders, so it is often smaller. Zero is the mean of normalized data.
    """
    count, _, height, width = x.shape
    side = height // 2 if size is None else size
    across = torch.arange(width, device=x.device).view(1, 1, 1, -1)
    down = torch.arange(height, device=x.device).view(1, 1, -1, 1)
    draw = torch.rand(2, count, 1, 1, 1, generator=generator, device=generator.device)
    draw = draw.to(x.device, non_blocking=True)
    top = (draw[0] * height).long() - side // 2
    left = (draw[1] * width).long() - side // 2
    inside = (down >= top) & (down < top + side) & (across >= left) & (across < left + side)
    return x.masked_fill(inside, 0.0)


def _keep(x: Tensor, generator: torch.Generator) -> Tensor:
    return x


def _crop_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    return flip(crop(x, generator), generator)


def _crop_flip_cutout(x: Tensor, generator: torch.Generator) -> Tensor:
    return cutout(_crop_flip(x, generator), generator)


AUGMENTATIONS: Mapping[str, Augmentation] = {
    "none": _keep,
    "flip": flip,
    "crop-flip": _crop_flip,
    "crop-flip-cutout": _crop_flip_cutout,
}


def augmentation(name: str, in_shape: tuple[int, ...]) -> Augmentation:
    """Return the augmentation of this name for samples of this shape.

    Raises BadInput for an unknown name, and for one that needs images (C × H × W) where there are none.
    """
    if name not in AUGMENTATIONS:
        raise BadInput(f"no augmentation named {name!r}{nearest(name, AUGMENTATIONS)}")
    if name != "none" and len(in_shape) != 3:
        raise BadInput(f"augmentation {name!r} needs images, but the samples are {in_shape}; use 'none'")
    return AUGMENTATIONS[name]
