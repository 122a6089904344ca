"""Initial weights of a model, drawn from a generator of its own."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from bnbench.models.base import LINEAR_MAPS, output_layer
from bnbench.registry import BadInput, nearest

INITS = ("he", "xavier", "lecun", "torch", "normal", "orthogonal")


@torch.no_grad()
def initialize(
    model: nn.Module,
    init: str,
    *,
    scale: float = 1.0,
    bias: str | float = "zero",
    generator: torch.Generator,
) -> None:
    """Draw the weights and set the biases of all linear maps and convolutions; norms stay as they are.

    With fan_in = inputs x kernel size and fan_out = outputs x kernel size, a weight is drawn from

    - ``"he"``: N(0, 2 / fan_in), which keeps the variance under ReLU (He et al., 2015, equation 10);
    - ``"xavier"``: N(0, 2 / (fan_in + fan_out)) (Glorot & Bengio, 2010, equation 12);
    - ``"lecun"``: N(0, 1 / fan_in) (LeCun et al., 1998, section 4.6);
    - ``"torch"``: U(-b, b), b = 1 / √fan_in, what torch's own layers start with;
    - ``"normal"``: N(0, 0.01²), as in AlexNet (Krizhevsky et al., 2012);
    - ``"orthogonal"``: a random matrix (outputs, fan_in) with orthonormal rows or columns (Saxe et al.,
      2014).

    No gain is added for other activations. `scale` multiplies every weight but those of the classifier,
    which no norm follows. `bias` is ``"zero"``, ``"uniform"`` (U(-b, b), as torch's own layers) or a number;
    it is not scaled.

    A reparametrized weight gets the drawn value as its effective one where its reparametrization can
    represent it. A model whose architecture starts otherwise has a method `adjust_initial_weights()`, which
    is called at the end. Draws are made in float32 on the generator's device, layer by layer, weight before
    bias, so that the same generator gives the same network in every precision and on every device. Raises
    BadInput for an unknown `init` or `bias` and a `scale` that is not positive and finite.
    """
    if init not in INITS:
        raise BadInput(f"no initialization named {init!r}{nearest(init, INITS)}")
    if not (scale > 0 and math.isfinite(scale)):
        raise BadInput(f"the scale of an initialization is positive and finite, not {scale}")
    if isinstance(bias, str) and bias not in ("zero", "uniform"):
        raise BadInput(f"the bias is 'zero', 'uniform' or a number, not {bias!r}")
    head = output_layer(model)
    for layer in model.modules():
        if isinstance(layer, LINEAR_MAPS):
            drawn = _draw(init, layer.weight.shape, generator)
            if layer is not head:
                drawn *= scale
            if is_parametrized(layer, "weight"):
                layer.weight = drawn.to(layer.weight)
            else:
                layer.weight.copy_(drawn)
            if layer.bias is not None:
                layer.bias.copy_(_draw_bias(bias, layer.weight.shape, generator))
    adjust = getattr(model, "adjust_initial_weights", None)
    if adjust is not None:
        adjust()


def _draw(init: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    fan_in, fan_out = math.prod(shape[1:]), shape[0] * math.prod(shape[2:])
    weight = torch.empty(shape, device=generator.device)
    if init == "orthogonal":
        return nn.init.orthogonal_(weight, generator=generator)
    if init == "torch":
        bound = 1 / math.sqrt(fan_in)
        return weight.uniform_(-bound, bound, generator=generator)
    std = {
        "he": math.sqrt(2 / fan_in),
        "xavier": math.sqrt(2 / (fan_in + fan_out)),
        "lecun": math.sqrt(1 / fan_in),
        "normal": 0.01,
    }[init]
    return weight.normal_(0, std, generator=generator)


def _draw_bias(bias: str | float, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.zeros(shape[0], device=generator.device)
    if bias == "uniform":
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        return drawn.uniform_(-bound, bound, generator=generator)
    return drawn if isinstance(bias, str) else drawn.fill_(bias)
