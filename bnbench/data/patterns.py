"""Made-up images that stand for real ones where nothing can be downloaded."""

from __future__ import annotations

import torch
from torch import Tensor

from bnbench.data.randomness import generator


def draw_images(
    name: str, file: str, count: int, num_classes: int, channels: int, side: int
) -> tuple[Tensor, Tensor]:
    """Return images (N × C × side × side, uint8) and labels (N, int64): a pattern a class, in as much noise.

    Pixel = 128 + 32 (pattern + noise), clipped to 0 … 255, patterns and noise standard normal. A pattern is
    constant over squares of a quarter of the side, and the same in all files of a name. Labels are uniform.
    """
    draw = generator(name, "patterns")
    patterns = torch.randn(num_classes, channels, 4, 4, generator=draw)
    smooth = patterns.repeat_interleave(side // 4, dim=2).repeat_interleave(side // 4, dim=3)
    draw = generator(name, file)
    labels = torch.randint(num_classes, (count,), generator=draw)
    noise = torch.randn(count, channels, side, side, generator=draw)
    return (128 + 32 * (smooth[labels] + noise)).clamp(0, 255).to(torch.uint8), labels
